/* The door to HDF5, and to nothing of it that Longspan does not need: contiguous arrays of one fixed type, scalar
 * attributes, groups. Files are read alone (no MPI-IO) and never changed: a new file is written beside its place under
 * a temporary name and takes the place only when it is whole and on the disk.
 *
 * A file may have been damaged or made to do harm. So: metadata is written in the format that carries checksums; what
 * is opened must be a plain object of this very file (no links elsewhere, no chunks or filters that unfold to more than
 * the file holds); and no size from a header is believed before it was held against the size of the file.
 *
 * Every failure leaves one sentence with the names of the file and of the object. HDF5 itself prints nothing. */
#ifndef LS_H5_H
#define LS_H5_H

#include "status.h"

#include <hdf5.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "digests are taken of little-endian bytes in memory: this machine needs a byte swap in h5.c"
#endif

enum { H5_PATH = 1200, H5_NAME = 160 };

typedef struct h5_file {
    hid_t id;                     /* 0: closed */
    int64_t bytes;                /* of a file that was opened: no array can be larger */
    char path[H5_PATH];           /* as the caller called it, for messages */
    char temporary[H5_PATH + 32]; /* where h5_create writes until h5_commit; "" when reading */
    int *failed;                  /* errno of the first read or write that failed, or H5_DISK_CUT */
} h5_file;

/* LS_ERR_IO: missing, unreadable, not a plain file. LS_ERR_FORMAT: not HDF5, truncated, damaged. */
ls_status h5_open(const char *path, h5_file *f);
/* Starts a new file; leftovers of earlier attempts at the same path are removed. Nothing is at `path` before commit. */
ls_status h5_create(const char *path, h5_file *f);
/* Flushes, syncs and renames: afterwards the file is whole under its name, also if the power fails; or LS_ERR_IO. */
ls_status h5_commit(h5_file *f);
/* Also ends a file that was not committed: its temporary is removed. Harmless on a zeroed or closed h5_file. */
void h5_close(h5_file *f);
/* Removes files named PREFIX*.tmp.DIGITS: what writers that died have left. */
void h5_remove_leftovers(const char *directory, const char *prefix);

/* ------------------------------------------------------------------------------------------------ arrays */

typedef struct h5_array {
    hid_t id; /* 0: closed */
    int ndim;
    int64_t dim[4], count;
    size_t size;                       /* bytes of an element */
    const int *failed;                 /* of the file */
    char where[H5_PATH + H5_NAME + 4]; /* "FILE: train/source" */
} h5_array;

/* The type in the file and in memory is the same. For strings of one fixed width pass H5_TEXT: any width is accepted
 * and a->size tells it. LS_ERR_FORMAT: missing, another type or rank, longer than the file, empty. */
#define H5_TEXT ((hid_t)-1)
ls_status h5_array_open(const h5_file *f, const char *name, hid_t type, int ndim, h5_array *a);
/* ndim 0: any rank up to 4. */
ls_status h5_array_create(h5_file *f, const char *name, hid_t type, int ndim, const int64_t *dim, h5_array *a);
/* Elements [lo, lo + n): of a one-dimensional array any, of others all. */
ls_status h5_array_read(const h5_array *a, int64_t lo, int64_t n, void *x);
ls_status h5_array_write(const h5_array *a, int64_t lo, int64_t n, const void *x);
void h5_array_close(h5_array *a);
/* Both ends at once, for arrays that are written in one piece. */
ls_status h5_array_put(h5_file *f, const char *name, hid_t type, int ndim, const int64_t *dim, const void *x);
/* A type of UTF-8 strings of a fixed width, padded with NUL; H5Tclose it. */
hid_t h5_text_type(size_t width);

/* ------------------------------------------------------------------------------------------------ the rest */

/* Scalar attributes of an object ("/": the file itself). */
ls_status h5_get(const h5_file *f, const char *object, const char *name, hid_t type, void *x);
ls_status h5_put(h5_file *f, const char *object, const char *name, hid_t type, const void *x);
/* Text without its closing NUL; at most H5_MAX_TEXT bytes, so that it stays under the checksum of its header. */
enum { H5_MAX_TEXT = 60000 };
ls_status h5_get_text(const h5_file *f, const char *object, const char *name, char **text); /* to be freed */
ls_status h5_put_text(h5_file *f, const char *object, const char *name, const char *text);

int h5_has(const h5_file *f, const char *name); /* group or array, of this file itself */
ls_status h5_group_create(h5_file *f, const char *name);
/* The names in a group in the order of their bytes; to be freed. */
typedef struct h5_names {
    int64_t n;
    char (*name)[H5_NAME];
} h5_names;
ls_status h5_group_names(const h5_file *f, const char *group, h5_names *names);

#endif
