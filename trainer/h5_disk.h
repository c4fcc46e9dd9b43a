/* How HDF5 reaches the disk when it writes. HDF5 does not survive a failed write: it cannot close the file any more,
 * and crashes when the program ends (seen with 1.10.8 and a full disk). So this driver tells it of none: from the first
 * failure on nothing more is written, every call still succeeds, and h5.c asks at the end what happened. */
#ifndef LS_H5_DISK_H
#define LS_H5_DISK_H

#include <hdf5.h>

/* Puts the driver into a file access list, for creating files only. *failed becomes the errno of the first failure; it
 * must stay where it is until the file is closed. */
herr_t h5_disk_use(hid_t access, int *failed);

#endif
