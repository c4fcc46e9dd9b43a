#include "h5.h"

#include "h5_disk.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------ messages */

typedef struct reason {
    char text[200];
} reason;

/* HDF5 keeps a stack of errors, the innermost first: the only one that says what happened. Where the system refused
 * something, its words are wrapped in file descriptors and addresses. */
static herr_t take_innermost(unsigned n, const H5E_error2_t *error, void *data)
{
    static const char system_says[] = "error message = '";
    reason *why = data;
    if (n != 0 || error->desc == NULL) return 0;
    const char *from = strstr(error->desc, system_says), *to = NULL;
    if (from != NULL) {
        from += sizeof system_says - 1;
        to = strchr(from, '\'');
    } else {
        from = error->desc;
    }
    const size_t n_bytes = to != NULL ? (size_t)(to - from) : strcspn(from, "\n");
    snprintf(why->text, sizeof why->text, "%.*s", (int)(n_bytes < 180 ? n_bytes : 180), from);
    return 0;
}

/* Why the last call of HDF5 failed. */
static reason because(void)
{
    reason why = {"no reason given"};
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_innermost, &why);
    H5Eclear2(H5E_DEFAULT);
    return why;
}

/* ------------------------------------------------------------------------------------------------ files */

/* No locks: files are never changed in place, and not every file system of a cluster has them. Older versions of HDF5
 * have only the environment variable HDF5_USE_FILE_LOCKING for that, which is the user's. */
#if H5_VERSION_GE(1, 12, 1) || (H5_VERSION_GE(1, 10, 7) && !H5_VERSION_GE(1, 12, 0))
#define WITHOUT_LOCKS(access) H5Pset_file_locking((access), 0, 1)
#else
#define WITHOUT_LOCKS(access) 0
#endif

/* Metadata of the 1.8 format: the oldest with checksums, hence readable everywhere. */
static hid_t file_access(int *failed)
{
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    if (access < 0) return access;
    herr_t ok = h5_disk_use(access, failed);
    if (ok >= 0) ok = H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_LATEST);
    if (ok >= 0) ok = H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
    if (ok >= 0) ok = WITHOUT_LOCKS(access);
    if (ok >= 0) return access;
    H5Pclose(access);
    return -1;
}

static ls_status set_path(const char *path, h5_file *f)
{
    *f = (h5_file){0};
    const size_t n = strlen(path);
    if (n == 0) LS_FAIL(LS_ERR_ARGUMENT, "a file name is empty");
    if (n >= sizeof f->path)
        LS_FAIL(LS_ERR_ARGUMENT, "%.60s...: a file name of %zu bytes is too long (at most %zu)", path, n,
                sizeof f->path - 1);
    memcpy(f->path, path, n + 1);
    return LS_OK;
}

/* The plain questions first, since HDF5's answers to them are not for people. */
static ls_status check_readable(const char *path, int64_t *bytes)
{
    struct stat about;
    if (stat(path, &about) != 0) LS_FAIL(LS_ERR_IO, "%s: cannot be opened (%s)", path, strerror(errno));
    if (S_ISDIR(about.st_mode)) LS_FAIL(LS_ERR_IO, "%s: is a directory, an HDF5 file is needed", path);
    if (!S_ISREG(about.st_mode)) LS_FAIL(LS_ERR_IO, "%s: is not a plain file", path);
    const int fd = open(path, O_RDONLY);
    if (fd < 0) LS_FAIL(LS_ERR_IO, "%s: cannot be read (%s)", path, strerror(errno));
    close(fd);
    *bytes = (int64_t)about.st_size;
    return LS_OK;
}

ls_status h5_open(const char *path, h5_file *f)
{
    LS_TRY(set_path(path, f));
    LS_TRY(check_readable(path, &f->bytes));
    f->failed = calloc(1, sizeof *f->failed);
    if (f->failed == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory to open it", path);
    const hid_t access = file_access(f->failed);
    const hid_t id = access < 0 ? -1 : H5Fopen(path, H5F_ACC_RDONLY, access);
    const reason why = because(); /* before the next call forgets it */
    if (access >= 0) H5Pclose(access);
    if (id >= 0) {
        f->id = id;
        return LS_OK;
    }
    h5_close(f);
    if (access < 0) LS_FAIL(LS_ERR_INTERNAL, "%s: HDF5 cannot be set up (%s)", path, why.text);
    if (H5Fis_hdf5(path) == 0) LS_FAIL(LS_ERR_FORMAT, "%s: is not an HDF5 file", path);
    LS_FAIL(LS_ERR_FORMAT, "%s: is truncated or damaged (HDF5: %s)", path, why.text);
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash == NULL ? path : slash + 1;
}

/* "DIR" of "DIR/NAME": "." without a slash, "/" directly below the root. */
static void directory_of(const char *path, char directory[H5_PATH])
{
    size_t n = (size_t)(base_name(path) - path);
    while (n > 1 && path[n - 1] == '/') n--;
    snprintf(directory, H5_PATH, "%.*s", n == 0 ? 1 : (int)n, n == 0 ? "." : path);
}

void h5_remove_leftovers(const char *directory, const char *prefix)
{
    DIR *dir = opendir(directory);
    if (dir == NULL) return; /* what is wrong with it, the writing will tell */
    for (const struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        const char *name = entry->d_name, *digits = strrchr(name, '.');
        if (strncmp(name, prefix, strlen(prefix)) != 0 || digits == NULL || digits - name < 4) continue;
        if (strncmp(digits - 4, ".tmp", 4) != 0 || digits[1] == 0) continue;
        if (digits[1 + strspn(digits + 1, "0123456789")] == 0) unlinkat(dirfd(dir), name, 0);
    }
    closedir(dir);
}

/* Creation times would make two packings of the same data differ. */
static hid_t untimed(hid_t class)
{
    const hid_t p = H5Pcreate(class);
    if (p >= 0) H5Pset_obj_track_times(p, 0);
    return p;
}

ls_status h5_create(const char *path, h5_file *f)
{
    LS_TRY(set_path(path, f));
    char directory[H5_PATH], prefix[300];
    const char *name = base_name(path);
    directory_of(path, directory);
    if (*name == 0 || strlen(name) > 200) LS_FAIL(LS_ERR_ARGUMENT, "%s: is no name for a file", path);
    struct stat about;
    if (stat(directory, &about) != 0)
        LS_FAIL(LS_ERR_IO, "%s: cannot be written, as directory %s cannot be used (%s)", path, directory,
                strerror(errno));
    if (stat(path, &about) == 0 && !S_ISREG(about.st_mode))
        LS_FAIL(LS_ERR_IO, "%s: cannot be written, as something that is not a plain file has this name", path);
    snprintf(prefix, sizeof prefix, ".%s.tmp.", name);
    h5_remove_leftovers(directory, prefix);
    snprintf(f->temporary, sizeof f->temporary, "%.*s%s%ld", (int)(name - path), path, prefix, (long)getpid());

    f->failed = calloc(1, sizeof *f->failed);
    if (f->failed == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory to write it", path);
    const hid_t access = file_access(f->failed), creation = untimed(H5P_FILE_CREATE);
    const hid_t id = access < 0 || creation < 0 ? -1 : H5Fcreate(f->temporary, H5F_ACC_EXCL, creation, access);
    const reason why = because();
    if (access >= 0) H5Pclose(access);
    if (creation >= 0) H5Pclose(creation);
    if (id >= 0) {
        f->id = id;
        return LS_OK;
    }
    const int failed = *f->failed;
    f->temporary[0] = 0;
    h5_close(f);
    LS_FAIL(LS_ERR_IO, "%s: cannot be written (%s)", path, failed != 0 ? strerror(failed) : why.text);
}

/* After every step of writing: HDF5 itself does not hear of failures. */
static ls_status check_disk(const int *failed, const char *where)
{
    if (failed != NULL && *failed != 0) LS_FAIL(LS_ERR_IO, "%s cannot be written (%s)", where, strerror(*failed));
    return LS_OK;
}

static ls_status sync_path(const h5_file *f, const char *path)
{
    const int fd = open(path, O_RDONLY);
    int failed = fd < 0 || fsync(fd) != 0 ? errno : 0;
    if (fd >= 0) close(fd);
    if (failed == EINVAL) failed = 0; /* a file system that cannot sync a directory has nothing to sync */
    if (failed != 0) LS_FAIL(LS_ERR_IO, "%s: cannot be made safe on the disk (%s)", f->path, strerror(failed));
    return LS_OK;
}

/* Afterwards the temporary holds everything, and is closed. */
static ls_status finish(h5_file *f)
{
    herr_t ok = H5Fflush(f->id, H5F_SCOPE_GLOBAL);
    const reason why = because();
    if (H5Fclose(f->id) < 0) ok = -1;
    f->id = 0;
    LS_TRY(check_disk(f->failed, f->path));
    if (ok < 0) LS_FAIL(LS_ERR_IO, "%s: cannot be written (HDF5: %s)", f->path, why.text);
    return sync_path(f, f->temporary);
}

ls_status h5_commit(h5_file *f)
{
    char directory[H5_PATH];
    directory_of(f->path, directory);
    ls_status status = finish(f);
    if (status == LS_OK && rename(f->temporary, f->path) != 0)
        status = ls_fail(LS_ERR_IO, "%s: the finished file cannot be put in its place (%s)", f->path,
                         errno == ENOENT ? "somebody removed it: is another run writing here?" : strerror(errno));
    if (status == LS_OK) {
        f->temporary[0] = 0;
        status = sync_path(f, directory);
    }
    h5_close(f);
    return status;
}

void h5_close(h5_file *f)
{
    if (f->id > 0) H5Fclose(f->id);
    if (f->temporary[0] != 0) unlink(f->temporary);
    free(f->failed);
    f->failed = NULL;
    f->id = 0;
    f->temporary[0] = 0;
    H5Eclear2(H5E_DEFAULT);
}

/* ------------------------------------------------------------------------------------------------ names */

/* A hard link: soft and external ones can lead into other files. */
static int has_link(const h5_file *f, const char *name)
{
    H5L_info_t about;
    return H5Lexists(f->id, name, H5P_DEFAULT) > 0 && H5Lget_info(f->id, name, &about, H5P_DEFAULT) >= 0 &&
           about.type == H5L_TYPE_HARD;
}

int h5_has(const h5_file *f, const char *name)
{
    char group[H5_NAME];
    const char *slash = strchr(name, '/');
    snprintf(group, sizeof group, "%.*s", slash == NULL ? 0 : (int)(slash - name), name);
    const int yes = (slash == NULL || has_link(f, group)) && has_link(f, name);
    H5Eclear2(H5E_DEFAULT);
    return yes;
}

ls_status h5_group_create(h5_file *f, const char *name)
{
    const hid_t creation = untimed(H5P_GROUP_CREATE);
    const hid_t id = H5Gcreate2(f->id, name, H5P_DEFAULT, creation, H5P_DEFAULT);
    H5Pclose(creation);
    if (id < 0) LS_FAIL(LS_ERR_IO, "%s: cannot write group %s (%s)", f->path, name, because().text);
    H5Gclose(id);
    return LS_OK;
}

typedef struct listing {
    h5_names *names;
    int64_t room;
    const char *trouble;
} listing;

static herr_t take_name(hid_t group, const char *name, const H5L_info_t *about, void *data)
{
    (void)group;
    listing *l = data;
    if (about->type != H5L_TYPE_HARD || strlen(name) >= H5_NAME) {
        l->trouble = about->type != H5L_TYPE_HARD ? "a link to elsewhere" : "a name that is too long";
        return -1;
    }
    if (l->names->n == l->room) {
        l->room = l->room == 0 ? 64 : 2 * l->room;
        void *more = realloc(l->names->name, (size_t)l->room * H5_NAME);
        if (more == NULL) {
            l->trouble = "more names than memory";
            return -1;
        }
        l->names->name = more;
    }
    snprintf(l->names->name[l->names->n++], H5_NAME, "%s", name);
    return 0;
}

static int by_bytes(const void *a, const void *b)
{
    return strcmp(a, b);
}

ls_status h5_group_names(const h5_file *f, const char *group, h5_names *names)
{
    *names = (h5_names){0};
    listing l = {.names = names};
    if (!h5_has(f, group)) LS_FAIL(LS_ERR_FORMAT, "%s: group %s is missing", f->path, group);
    const hid_t id = H5Gopen2(f->id, group, H5P_DEFAULT);
    const herr_t ok = id < 0 ? -1 : H5Literate(id, H5_INDEX_NAME, H5_ITER_NATIVE, NULL, take_name, &l);
    const reason why = because();
    if (id >= 0) H5Gclose(id);
    if (ok < 0) {
        free(names->name);
        *names = (h5_names){0};
        LS_FAIL(LS_ERR_FORMAT, "%s: group %s cannot be listed (%s)", f->path, group,
                l.trouble != NULL ? l.trouble : why.text);
    }
    if (names->n > 0) qsort(names->name, (size_t)names->n, H5_NAME, by_bytes);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ arrays */

hid_t h5_text_type(size_t width)
{
    const hid_t type = H5Tcopy(H5T_C_S1);
    if (H5Tset_size(type, width) < 0 || H5Tset_strpad(type, H5T_STR_NULLPAD) < 0 ||
        H5Tset_cset(type, H5T_CSET_UTF8) < 0)
        H5Eclear2(H5E_DEFAULT);
    return type;
}

static int type_fits(hid_t stored, hid_t wanted)
{
    if (wanted != H5_TEXT) return H5Tequal(stored, wanted) > 0;
    return H5Tget_class(stored) == H5T_STRING && H5Tis_variable_str(stored) == 0;
}

/* The shape, and that all of it lies in the file: then count * size is at most the size of the file. */
static ls_status take_shape(const h5_file *f, int ndim, h5_array *a)
{
    const hid_t space = H5Dget_space(a->id), creation = H5Dget_create_plist(a->id);
    hsize_t dim[4] = {0};
    const int rank = space < 0 ? -1 : H5Sget_simple_extent_ndims(space);
    const int plain = creation >= 0 && H5Pget_layout(creation) == H5D_CONTIGUOUS;
    const int known = rank >= 1 && rank <= 4 && H5Sget_simple_extent_dims(space, dim, NULL) == rank;
    if (space >= 0) H5Sclose(space);
    if (creation >= 0) H5Pclose(creation);
    if (!known || (ndim != 0 && rank != ndim))
        LS_FAIL(LS_ERR_FORMAT, "%s has %d dimensions, not %d", a->where, rank, ndim == 0 ? 1 : ndim);
    if (!plain) LS_FAIL(LS_ERR_FORMAT, "%s is not stored in one piece (contiguous layout)", a->where);

    const haddr_t address = H5Dget_offset(a->id);
    const uint64_t bytes = (uint64_t)f->bytes;
    uint64_t count = 1;
    for (int i = 0; i < rank; i++) {
        if (dim[i] == 0) LS_FAIL(LS_ERR_FORMAT, "%s is empty", a->where);
        if (dim[i] > bytes / count)
            LS_FAIL(LS_ERR_FORMAT, "%s claims to be larger than its file (%lld bytes)", a->where, (long long)f->bytes);
        count *= dim[i];
    }
    if (address == HADDR_UNDEF || a->size == 0 || address > bytes || count > (bytes - address) / a->size)
        LS_FAIL(LS_ERR_FORMAT, "%s claims %llu elements, which do not fit into its file (%lld bytes)", a->where,
                (unsigned long long)count, (long long)f->bytes);
    a->ndim = rank;
    a->count = (int64_t)count;
    for (int i = 0; i < rank; i++) a->dim[i] = (int64_t)dim[i];
    return LS_OK;
}

static ls_status open_array(const h5_file *f, const char *name, hid_t type, int ndim, h5_array *a)
{
    if (!h5_has(f, name)) LS_FAIL(LS_ERR_FORMAT, "%s is missing", a->where);
    const hid_t id = H5Dopen2(f->id, name, H5P_DEFAULT);
    if (id < 0) LS_FAIL(LS_ERR_FORMAT, "%s cannot be opened (HDF5: %s)", a->where, because().text);
    a->id = id;
    const hid_t stored = H5Dget_type(id);
    const int fits = stored >= 0 && type_fits(stored, type);
    a->size = stored >= 0 ? H5Tget_size(stored) : 0;
    if (stored >= 0) H5Tclose(stored);
    if (!fits) LS_FAIL(LS_ERR_FORMAT, "%s has another type of elements than it should", a->where);
    return take_shape(f, ndim, a);
}

ls_status h5_array_open(const h5_file *f, const char *name, hid_t type, int ndim, h5_array *a)
{
    *a = (h5_array){.failed = f->failed};
    snprintf(a->where, sizeof a->where, "%s: %s", f->path, name);
    const ls_status status = open_array(f, name, type, ndim, a);
    if (status != LS_OK) h5_array_close(a);
    return status;
}

ls_status h5_array_create(h5_file *f, const char *name, hid_t type, int ndim, const int64_t *dim, h5_array *a)
{
    *a = (h5_array){.ndim = ndim, .count = 1, .size = H5Tget_size(type), .failed = f->failed};
    snprintf(a->where, sizeof a->where, "%s: %s", f->path, name);
    hsize_t extent[4];
    for (int i = 0; i < ndim; i++) {
        if (dim[i] < 1) LS_FAIL(LS_ERR_ARGUMENT, "%s would be empty", a->where);
        a->dim[i] = dim[i];
        a->count *= dim[i];
        extent[i] = (hsize_t)dim[i];
    }
    /* Everything is written, so no fill values; and room is taken now, so that a full disk shows early. */
    const hid_t creation = untimed(H5P_DATASET_CREATE), space = H5Screate_simple(ndim, extent, NULL);
    herr_t ok = H5Pset_layout(creation, H5D_CONTIGUOUS);
    if (ok >= 0) ok = H5Pset_alloc_time(creation, H5D_ALLOC_TIME_EARLY);
    if (ok >= 0) ok = H5Pset_fill_time(creation, H5D_FILL_TIME_NEVER);
    const hid_t id = ok < 0 ? -1 : H5Dcreate2(f->id, name, type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
    const reason why = because();
    H5Sclose(space);
    H5Pclose(creation);
    if (id < 0) LS_FAIL(LS_ERR_IO, "%s cannot be written (%s)", a->where, why.text);
    a->id = id;
    const ls_status status = check_disk(a->failed, a->where);
    if (status != LS_OK) h5_array_close(a);
    return status;
}

typedef struct selection {
    hid_t memory, file, type;
} selection;

static ls_status select_part(const h5_array *a, int64_t lo, int64_t n, selection *s)
{
    const int whole = lo == 0 && n == a->count;
    if (lo < 0 || n < 1 || lo > a->count - n || (a->ndim != 1 && !whole))
        LS_FAIL(LS_ERR_INTERNAL, "%s has no elements %lld to %lld to read or write", a->where, (long long)lo,
                (long long)(lo + n - 1));
    const hsize_t start = (hsize_t)lo, extent = (hsize_t)n;
    *s = (selection){.memory = H5S_ALL, .file = H5S_ALL, .type = H5Dget_type(a->id)};
    if (whole) return LS_OK;
    s->memory = H5Screate_simple(1, &extent, NULL);
    s->file = H5Dget_space(a->id);
    H5Sselect_hyperslab(s->file, H5S_SELECT_SET, &start, NULL, &extent, NULL);
    return LS_OK;
}

static void end_selection(selection *s)
{
    if (s->memory != H5S_ALL) H5Sclose(s->memory);
    if (s->file != H5S_ALL) H5Sclose(s->file);
    H5Tclose(s->type);
}

ls_status h5_array_read(const h5_array *a, int64_t lo, int64_t n, void *x)
{
    selection s = {0};
    LS_TRY(select_part(a, lo, n, &s));
    const herr_t ok = H5Dread(a->id, s.type, s.memory, s.file, H5P_DEFAULT, x);
    const reason why = because();
    end_selection(&s);
    const int failed = a->failed == NULL ? 0 : *a->failed;
    if (failed == H5_DISK_CUT)
        LS_FAIL(LS_ERR_IO, "%s cannot be read: the file became shorter while it was in use", a->where);
    if (failed != 0) LS_FAIL(LS_ERR_IO, "%s cannot be read (%s)", a->where, strerror(failed));
    if (ok < 0) LS_FAIL(LS_ERR_IO, "%s cannot be read (HDF5: %s)", a->where, why.text);
    return LS_OK;
}

ls_status h5_array_write(const h5_array *a, int64_t lo, int64_t n, const void *x)
{
    selection s = {0};
    LS_TRY(select_part(a, lo, n, &s));
    const herr_t ok = H5Dwrite(a->id, s.type, s.memory, s.file, H5P_DEFAULT, x);
    const reason why = because();
    end_selection(&s);
    if (ok < 0) LS_FAIL(LS_ERR_IO, "%s cannot be written (%s)", a->where, why.text);
    return check_disk(a->failed, a->where);
}

void h5_array_close(h5_array *a)
{
    if (a->id > 0) H5Dclose(a->id);
    a->id = 0;
}

ls_status h5_array_put(h5_file *f, const char *name, hid_t type, int ndim, const int64_t *dim, const void *x)
{
    h5_array a;
    LS_TRY(h5_array_create(f, name, type, ndim, dim, &a));
    const ls_status status = h5_array_write(&a, 0, a.count, x);
    h5_array_close(&a);
    return status;
}

/* ------------------------------------------------------------------------------------------------ attributes */

/* "FILE: attribute version", "FILE: attribute digest of params/embedding" */
typedef struct attribute_name {
    char text[H5_PATH + 2 * H5_NAME];
} attribute_name;

static attribute_name call_it(const h5_file *f, const char *object, const char *name)
{
    attribute_name called;
    const int root = strcmp(object, "/") == 0;
    snprintf(called.text, sizeof called.text, "%s: attribute %s%s%s", f->path, name, root ? "" : " of ",
             root ? "" : object);
    return called;
}

/* Opens a scalar attribute; id < 0 and a message if there is none or its type is another. */
static ls_status open_attribute(const h5_file *f, const char *object, const char *name, hid_t type, hid_t *id,
                                hid_t *stored)
{
    const attribute_name called = call_it(f, object, name);
    *id = H5Aexists_by_name(f->id, object, name, H5P_DEFAULT) > 0
              ? H5Aopen_by_name(f->id, object, name, H5P_DEFAULT, H5P_DEFAULT)
              : -1;
    H5Eclear2(H5E_DEFAULT);
    if (*id < 0) LS_FAIL(LS_ERR_FORMAT, "%s is missing", called.text);
    *stored = H5Aget_type(*id);
    const hid_t space = H5Aget_space(*id);
    const int fits = *stored >= 0 && space >= 0 && type_fits(*stored, type) && H5Sget_simple_extent_npoints(space) == 1;
    if (space >= 0) H5Sclose(space);
    H5Eclear2(H5E_DEFAULT);
    if (fits) return LS_OK;
    if (*stored >= 0) H5Tclose(*stored);
    H5Aclose(*id);
    LS_FAIL(LS_ERR_FORMAT, "%s has another type than it should", called.text);
}

ls_status h5_get(const h5_file *f, const char *object, const char *name, hid_t type, void *x)
{
    hid_t id, stored;
    LS_TRY(open_attribute(f, object, name, type, &id, &stored));
    const herr_t ok = H5Aread(id, type, x);
    const reason why = because();
    H5Tclose(stored);
    H5Aclose(id);
    if (ok < 0) LS_FAIL(LS_ERR_FORMAT, "%s cannot be read (HDF5: %s)", call_it(f, object, name).text, why.text);
    return LS_OK;
}

ls_status h5_get_text(const h5_file *f, const char *object, const char *name, char **text)
{
    *text = NULL;
    hid_t id, stored;
    LS_TRY(open_attribute(f, object, name, H5_TEXT, &id, &stored));
    const size_t size = H5Tget_size(stored);
    char *x = size <= H5_MAX_TEXT ? calloc(size + 1, 1) : NULL;
    const herr_t ok = x == NULL ? -1 : H5Aread(id, stored, x);
    const reason why = because();
    H5Tclose(stored);
    H5Aclose(id);
    if (ok >= 0) {
        *text = x;
        return LS_OK;
    }
    free(x);
    LS_FAIL(LS_ERR_FORMAT, "%s cannot be read (%s)", call_it(f, object, name).text,
            size > H5_MAX_TEXT ? "it is too long" : why.text);
}

/* Through the open object: in HDF5 1.10.8 an attribute that was opened by the object's name is written to the object
 * from which the name leads. */
ls_status h5_put(h5_file *f, const char *object, const char *name, hid_t type, const void *x)
{
    const hid_t owner = H5Oopen(f->id, object, H5P_DEFAULT), space = H5Screate(H5S_SCALAR);
    const hid_t id = owner < 0 ? -1 : H5Acreate2(owner, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    const herr_t ok = id < 0 ? -1 : H5Awrite(id, type, x);
    const reason why = because();
    if (id >= 0) H5Aclose(id);
    if (owner >= 0) H5Oclose(owner);
    H5Sclose(space);
    const attribute_name called = call_it(f, object, name);
    if (ok < 0) LS_FAIL(LS_ERR_IO, "%s cannot be written (%s)", called.text, why.text);
    return check_disk(f->failed, called.text);
}

ls_status h5_put_text(h5_file *f, const char *object, const char *name, const char *text)
{
    const size_t n = strlen(text);
    if (n > H5_MAX_TEXT)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: %zu bytes are too long (at most %d)", call_it(f, object, name).text, n,
                (int)H5_MAX_TEXT);
    const hid_t type = h5_text_type(n > 0 ? n : 1);
    const ls_status status = h5_put(f, object, name, type, text);
    H5Tclose(type);
    return status;
}
