/* Where a test runs that opens a device by itself: from the environment, LONGSPAN_TEST_DEVICE=cuda, or on the CPU. */
#ifndef TESTS_WHERE_H
#define TESTS_WHERE_H

#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEST_SKIPPED = 77 };

static inline ls_device test_where(void)
{
    const char *name = getenv("LONGSPAN_TEST_DEVICE");
    return name != NULL && strcmp(name, "cuda") == 0 ? LS_CUDA : LS_CPU;
}

/* What operands of products are rounded to there: LONGSPAN_TEST_PRECISION=tf32 or bf16, or float32. */
static inline ls_precision test_rounding(void)
{
    const char *name = getenv("LONGSPAN_TEST_PRECISION");
    if (name == NULL) return LS_FLOAT32;
    for (int i = LS_FLOAT32; i <= LS_BF16; i++)
        if (strcmp(name, ls_precision_name((ls_precision)i)) == 0) return (ls_precision)i;
    fprintf(stderr, "LONGSPAN_TEST_PRECISION=%s is no precision\n", name);
    exit(2);
}

/* 0: the test is to be skipped, which this says. */
static inline int test_has_device(void)
{
    int devices = 0;
    const ls_device_ops *ops = ls_device_find(test_where());
    if (ops != NULL && (ops->count(&devices) != LS_OK || devices > 0)) return 1;
    printf("skipped: there is no GPU here, or this build cannot use it\n");
    return 0;
}

#endif
