#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local struct {
    ls_status code;
    int shared; /* all ranks have this sentence */
    const char *name[2];
    char text[1024];
} last;

static void keep(const char *name, const char *other, ls_status code, const char *format, va_list list)
{
    char text[sizeof last.text]; /* the arguments may point into the old one: an outer layer adds to an inner one */
    vsnprintf(text, sizeof text, format, list);
    memcpy(last.text, text, sizeof text);
    last.code = code;
    last.shared = 0;
    last.name[0] = name, last.name[1] = other;
}

ls_status ls_fail(ls_status code, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    keep(NULL, NULL, code, format, list);
    va_end(list);
    return code;
}

ls_status ls_fail_of(const char *name, const char *other, ls_status code, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    keep(name, other, code, format, list);
    va_end(list);
    return code;
}

const char *ls_last_name(int which)
{
    return last.name[which];
}

ls_status ls_set_error(ls_status status, const char *sentence)
{
    return status == LS_OK ? LS_OK : ls_fail(status, "%s", sentence != NULL ? sentence : ls_status_name(status));
}

ls_status ls_share_failure(ls_status status)
{
    last.shared = 1;
    return status;
}

int ls_is_shared(ls_status status)
{
    return last.shared && last.code == status;
}

ls_status ls_explained(ls_status status)
{
    if (status == LS_OK || (last.code == status && last.text[0] != 0)) return status;
    if ((unsigned)status > LS_ERR_INTERNAL) return ls_fail(LS_ERR_ARGUMENT, "there is no status %d", (int)status);
    return ls_fail(status, "%s", ls_status_name(status));
}

const char *ls_last_error(void)
{
    return last.text;
}

const char *ls_status_name(ls_status status)
{
    static const char *const names[] = {"ok",       "bad argument", "unsupported", "out of memory", "communication",
                                        "file i/o", "bad format",   "not finite",  "internal"};
    return (unsigned)status < sizeof names / sizeof *names ? names[status] : "unknown status";
}
