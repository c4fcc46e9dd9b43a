/* How failures travel inside Longspan: a code is returned, the sentence is kept per thread until the next failure. */
#ifndef LS_STATUS_H
#define LS_STATUS_H

#include "longspan.h"

/* Keeps the message and returns code, so that `return ls_fail(...)` reads well. */
ls_status ls_fail(ls_status code, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define LS_FAIL(code, ...) return ls_fail((code), __VA_ARGS__)

#define LS_TRY(call)                                                                                                   \
    do {                                                                                                               \
        const ls_status ls_try_status_ = (call);                                                                       \
        if (ls_try_status_ != LS_OK) return ls_try_status_;                                                            \
    } while (0)

/* For functions with something to release: keeps the status in `status` and goes to the label `done`. */
#define LS_TRY_GOTO(call)                                                                                              \
    do {                                                                                                               \
        if ((status = (call)) != LS_OK) goto done;                                                                     \
    } while (0)

#endif
