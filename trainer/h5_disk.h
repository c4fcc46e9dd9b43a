/* How HDF5 reaches the disk. HDF5 does not survive a failed write: it cannot close the file any more, and crashes when
 * the program ends (seen with 1.10.8 and a full disk). So this driver tells it of none: from the first failure on
 * nothing more is written, every call still succeeds, and h5.c asks at the end what happened.
 *
 * Of a file that is only read, HDF5's own driver takes what lies beyond its end for zeros: a data set that is cut while
 * a run reads it would be trained on as such. Here such a read fails. */
#ifndef LS_H5_DISK_H
#define LS_H5_DISK_H

#include <hdf5.h>

/* What a read finds that meets the end of the file. */
enum { H5_DISK_CUT = -1 };
/* Puts the driver into a file access list, for a file that is created, or only read. *failed becomes the errno of the
 * first failure, or H5_DISK_CUT; it must stay where it is until the file is closed. */
herr_t h5_disk_use(hid_t access, int *failed);

#endif
