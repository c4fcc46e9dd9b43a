/* What the tests of files share: a folder of their own, whole files as bytes, refusals with their words, and that
 * nothing of HDF5 stays open. */
#ifndef FILES_H
#define FILES_H

#include "rng.h"
#include "status.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <dirent.h>
#include <hdf5.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[120];

/* Below the folder. The same text for the same name, valid until the program ends. */
static inline const char *in_folder(const char *name)
{
    enum { MOST = 200 };
    static char *path[MOST];
    char text[512];
    int i = 0;
    snprintf(text, sizeof text, "%s/%s", folder, name);
    while (i < MOST - 1 && path[i] != NULL && strcmp(path[i], text) != 0) i++;
    if (path[i] == NULL) path[i] = strdup(text);
    return path[i];
}

static inline void remove_tree(const char *path)
{
    DIR *dir = opendir(path);
    if (dir != NULL) {
        for (const struct dirent *entry; (entry = readdir(dir)) != NULL;) {
            char below[1024];
            const int n = snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
            const int dots = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
            if (!dots && n < (int)sizeof below) remove_tree(below);
        }
        closedir(dir);
    }
    remove(path);
}

/* Identifiers of HDF5 that are in use: leak checkers do not see those that are forgotten. */
static inline int64_t identifiers(void)
{
    static const H5I_type_t kinds[] = {H5I_FILE,    H5I_GROUP, H5I_DATATYPE,   H5I_DATASPACE,
                                       H5I_DATASET, H5I_ATTR,  H5I_GENPROP_LST};
    int64_t sum = 0;
    H5open();
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        hsize_t n = 0;
        if (H5Inmembers(kinds[i], &n) >= 0) sum += (int64_t)n;
    }
    return sum;
}

static int64_t identifiers_before;

static inline int make_folder(void **state)
{
    (void)state;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    identifiers_before = identifiers();
    const char *base = getenv("TMPDIR");
    const int usable = base != NULL && strlen(base) <= 100; /* or paths below grow too long for the tests */
    snprintf(folder, sizeof folder, "%.100s/longspan-XXXXXX", usable ? base : "/tmp");
    return mkdtemp(folder) == NULL;
}

static inline int remove_folder(void **state)
{
    (void)state;
    remove_tree(folder);
    const int64_t forgotten = identifiers() - identifiers_before;
    if (forgotten != 0) print_error("%lld identifiers of HDF5 were not closed\n", (long long)forgotten);
    return forgotten != 0;
}

/* Files in a folder whose names contain a text. */
static inline int count_files(const char *path, const char *containing)
{
    int n = 0;
    DIR *dir = opendir(path);
    assert_non_null(dir);
    for (const struct dirent *entry; (entry = readdir(dir)) != NULL;)
        if (entry->d_name[0] != 0 && strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            n += strstr(entry->d_name, containing) != NULL;
    closedir(dir);
    return n;
}

static inline void write_bytes(const char *path, const void *bytes, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static inline const char *write_text(const char *name, const char *text)
{
    const char *path = in_folder(name);
    write_bytes(path, text, strlen(text));
    return path;
}

static inline unsigned char *read_bytes(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    *n = (size_t)ftell(f);
    rewind(f);
    unsigned char *bytes = malloc(*n + 1);
    assert_non_null(bytes);
    assert_int_equal(fread(bytes, 1, *n, f), *n);
    fclose(f);
    return bytes;
}

static inline int exists(const char *path)
{
    return access(path, F_OK) == 0;
}

/* Refused with this status, in one sentence that contains the words. */
static inline void expect_refusal(ls_status got, ls_status wanted, const char *words, const char *of)
{
    const char *message = ls_last_error();
    if (got != wanted)
        fail_msg("%s: %s, not %s (%s)", of, ls_status_name(got), ls_status_name(wanted), got == LS_OK ? "" : message);
    if (strstr(message, words) == NULL) fail_msg("%s\n  says:   %s\n  wanted: %s", of, message, words);
    if (strchr(message, '\n') != NULL) fail_msg("%s says more than a line: %s", of, message);
}

static inline void expect_ok(ls_status got, const char *of)
{
    if (got != LS_OK) fail_msg("%s: %s", of, ls_last_error());
}

/* A whole number below n, the k-th of a fixed sequence. */
static inline int64_t draw_below(uint64_t k, int64_t n)
{
    uint32_t word[4];
    ls_random4(20240229, 0, 0, k, word);
    return (int64_t)(((uint64_t)word[0] << 31 ^ word[1]) % (uint64_t)n);
}

#endif
