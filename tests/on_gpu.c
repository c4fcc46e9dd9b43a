/* on_gpu RANKS COMMAND...: runs the command, or ends as a skipped test where there is no GPU for it (where.h): sooner
 * than so many ranks of mpirun could tell. */
#include "where.h"

#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: on_gpu RANKS COMMAND...\n");
        return 2;
    }
    if (!test_has_device(atoi(argv[1]))) return TEST_SKIPPED;
    execvp(argv[2], argv + 2);
    fprintf(stderr, "on_gpu: %s cannot be run\n", argv[2]);
    return 1;
}
