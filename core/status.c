#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[1024];

ls_status ls_fail(ls_status code, const char *format, ...)
{
    char text[sizeof message]; /* the arguments may point into the old message: an outer layer adds to an inner one */
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    memcpy(message, text, sizeof message);
    return code;
}

const char *ls_last_error(void)
{
    return message;
}

const char *ls_status_name(ls_status status)
{
    static const char *const names[] = {"ok",       "bad argument", "unsupported", "out of memory", "communication",
                                        "file i/o", "bad format",   "not finite",  "internal"};
    return (unsigned)status < sizeof names / sizeof *names ? names[status] : "unknown status";
}
