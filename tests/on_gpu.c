/* on_gpu COUNT COMMAND...: runs the command where this build finds so many GPUs, or cannot count them, and why the
 * command says. Otherwise the status is that of a skipped test: sooner than mpirun could tell. */
#include "device.h"
#include "where.h"

#include <unistd.h>

int main(int argc, char **argv)
{
    int devices = 0;
    const int needed = argc > 2 ? atoi(argv[1]) : 0;
    const ls_device_ops *ops = ls_device_find(LS_CUDA);
    if (needed < 1) {
        fprintf(stderr, "usage: on_gpu COUNT COMMAND...\n");
        return 2;
    }
    if (ops == NULL || (ops->count(&devices) == LS_OK && devices < needed)) {
        printf("skipped: there are %d GPUs here that this build can use, and %d are needed\n", devices, needed);
        return TEST_SKIPPED;
    }
    execvp(argv[2], argv + 2);
    fprintf(stderr, "on_gpu: %s cannot be run\n", argv[2]);
    return 1;
}
