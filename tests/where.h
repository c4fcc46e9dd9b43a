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

/* LONGSPAN_TEST_TRANSPORT=nccl: between ranks that have a GPU each. Otherwise what can be had. */
static inline ls_transport test_transport(void)
{
    const char *name = getenv("LONGSPAN_TEST_TRANSPORT");
    return name != NULL && strcmp(name, "nccl") == 0 ? LS_TRANSPORT_NCCL : LS_TRANSPORT_AUTO;
}

/* The GPU of this rank: one for all, or, where they speak by NCCL, its own. */
static inline int test_number(int rank)
{
    int devices = 0;
    const ls_device_ops *ops = ls_device_find(test_where());
    if (test_transport() != LS_TRANSPORT_NCCL || ops == NULL || ops->count(&devices) != LS_OK || devices == 0) return 0;
    return rank % devices;
}

/* 0: the test is to be skipped, which this says: there is no GPU, or not one for each rank that needs its own. */
static inline int test_has_device(int processes)
{
    int devices = 0;
    const ls_device_ops *ops = ls_device_find(test_where());
    const int needed = test_transport() == LS_TRANSPORT_NCCL && getenv("LONGSPAN_TEST_GPU") != NULL ? processes : 1;
    if (ops != NULL && (ops->count(&devices) != LS_OK || devices >= needed)) return 1;
    printf("skipped: there are %d GPUs here that this build can use, and %d are needed\n", devices, needed);
    return 0;
}

#endif
