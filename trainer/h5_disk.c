#include "h5_disk.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* From version 1.13 on what drivers need has a header of its own. */
#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif

typedef struct disk {
    H5FD_t driver; /* HDF5's part comes first */
    int fd, reads; /* reads: it is never written */
    haddr_t end_allocated, end_written;
    int *failed;
} disk;

typedef struct disk_info {
    int *failed;
} disk_info;

enum { PIECE = 1 << 30 }; /* systems refuse, or cut, larger writes */

static void fail(const disk *d)
{
    if (*d->failed == 0) *d->failed = errno != 0 ? errno : EIO;
}

static H5FD_t *disk_open(const char *name, unsigned flags, hid_t access, haddr_t most)
{
    struct stat about;
    (void)most;
    const disk_info *info = H5Pget_driver_info(access);
    disk *d = info == NULL ? NULL : calloc(1, sizeof *d);
    if (d == NULL) return NULL;
    d->failed = info->failed;
    d->reads = (flags & H5F_ACC_RDWR) == 0;
    d->fd = d->reads ? open(name, O_RDONLY) : open(name, O_RDWR | O_CREAT | O_EXCL, 0666);
    if (d->fd >= 0 && fstat(d->fd, &about) == 0) {
        d->end_written = (haddr_t)about.st_size;
        return &d->driver;
    }
    fail(d);
    if (d->fd >= 0) close(d->fd);
    free(d);
    return NULL;
}

static herr_t disk_close(H5FD_t *file)
{
    disk *d = (disk *)file;
    if (close(d->fd) != 0) fail(d); /* network file systems keep bad news until here */
    free(d);
    return 0;
}

static herr_t disk_query(const H5FD_t *file, unsigned long *flags)
{
    (void)file;
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
             H5FD_FEAT_AGGREGATE_SMALLDATA | H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
    return 0;
}

static haddr_t disk_end_allocated(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const disk *)file)->end_allocated;
}

static herr_t disk_allocate(H5FD_t *file, H5FD_mem_t type, haddr_t end)
{
    (void)type;
    ((disk *)file)->end_allocated = end;
    return 0;
}

static haddr_t disk_end_written(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const disk *)file)->end_written;
}

static herr_t disk_read(H5FD_t *file, H5FD_mem_t type, hid_t transfer, haddr_t at, size_t size, void *bytes)
{
    (void)type;
    (void)transfer;
    disk *d = (disk *)file;
    char *to = bytes;
    while (size > 0 && *d->failed == 0) {
        const ssize_t n = pread(d->fd, to, size < PIECE ? size : PIECE, (off_t)at);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail(d);
        if (n == 0 && d->reads) *d->failed = H5_DISK_CUT;
        if (n <= 0) break;
        to += n;
        at += (haddr_t)n;
        size -= (size_t)n;
    }
    memset(to, 0, size); /* beyond the end, or after a failure */
    return d->reads && size > 0 ? -1 : 0;
}

static herr_t disk_write(H5FD_t *file, H5FD_mem_t type, hid_t transfer, haddr_t at, size_t size, const void *bytes)
{
    (void)type;
    (void)transfer;
    disk *d = (disk *)file;
    const char *from = bytes;
    const haddr_t end = at + size;
    while (size > 0 && *d->failed == 0) {
        errno = 0;
        const ssize_t n = pwrite(d->fd, from, size < PIECE ? size : PIECE, (off_t)at);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            fail(d);
            break;
        }
        from += n;
        at += (haddr_t)n;
        size -= (size_t)n;
    }
    if (end > d->end_written) d->end_written = end;
    return 0;
}

static herr_t disk_truncate(H5FD_t *file, hid_t transfer, hbool_t closing)
{
    (void)transfer;
    (void)closing;
    disk *d = (disk *)file;
    if (d->end_allocated == d->end_written) return 0;
    if (*d->failed == 0 && ftruncate(d->fd, (off_t)d->end_allocated) != 0) fail(d);
    d->end_written = d->end_allocated;
    return 0;
}

static const H5FD_class_t driver = {
#ifdef H5FD_CLASS_VERSION
    .version = H5FD_CLASS_VERSION,
    .value = 300, /* any of those that are left to programs: files do not mention it */
#endif
    .name = "longspan_disk",
    .maxaddr = INT64_MAX,
    .fc_degree = H5F_CLOSE_WEAK,
    .fapl_size = sizeof(disk_info),
    .open = disk_open,
    .close = disk_close,
    .query = disk_query,
    .get_eoa = disk_end_allocated,
    .set_eoa = disk_allocate,
    .get_eof = disk_end_written,
    .read = disk_read,
    .write = disk_write,
    .truncate = disk_truncate,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

herr_t h5_disk_use(hid_t access, int *failed)
{
    const disk_info info = {failed};
    const hid_t id = H5FDregister(&driver);
    if (id < 0) return -1;
    const herr_t ok = H5Pset_driver(access, id, &info);
    H5FDunregister(id); /* the list keeps its own hold on it */
    return ok;
}
