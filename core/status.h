/* How failures travel inside Longspan: a code is returned, the sentence is kept per thread until the next failure. */
#ifndef LS_STATUS_H
#define LS_STATUS_H

#include "longspan.h"

/* Keeps the message and returns code, so that `return ls_fail(...)` reads well. */
ls_status ls_fail(ls_status code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The same where what is refused has a name, which goes to the caller beside the sentence: an option, a key. name: what
 * is wrong; other: what it does not go with, or lacks; either may be NULL. Static texts. */
ls_status ls_fail_of(const char *name, const char *other, ls_status code, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Of the last failure: its name (0), and the other (1); NULL: none. */
const char *ls_last_name(int which);

/* The last failure became known to all ranks, with its sentence. */
ls_status ls_share_failure(ls_status status);
/* 1 if this is that failure. */
int ls_is_shared(ls_status status);
/* The same status, whose sentence is then ls_last_error(): its name, where the last failure was another one. What is no
 * status becomes LS_ERR_ARGUMENT. */
ls_status ls_explained(ls_status status);

#define LS_FAIL(code, ...) return ls_fail((code), __VA_ARGS__)

#define LS_TRY(call)                                                                                                   \
    do {                                                                                                               \
        const ls_status ls_try_status_ = (call);                                                                       \
        if (ls_try_status_ != LS_OK) return ls_try_status_;                                                            \
    } while (0)

/* What a call cannot do without: LS_NEED(pointer, sentence). Of a collective call: there is nobody to agree with. */
#define LS_NEED(pointer, ...)                                                                                          \
    do {                                                                                                               \
        if ((pointer) == NULL) LS_FAIL(LS_ERR_ARGUMENT, __VA_ARGS__);                                                  \
    } while (0)

/* For functions with something to release: keeps the status in `status` and goes to the label `done`. */
#define LS_TRY_GOTO(call)                                                                                              \
    do {                                                                                                               \
        if ((status = (call)) != LS_OK) goto done;                                                                     \
    } while (0)

#endif
