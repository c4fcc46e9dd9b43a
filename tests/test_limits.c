/* Shapes that meet a GPU's limits, against the CPU: heads so wide that a block needs more shared memory than it has
 * unasked, and heads so many that a grid has no second dimension for them. What no block can have is refused by name.
 * And heads that several blocks make, all the same; features that a block makes piece by piece.
 *   test_limits [--pieces]   those alone */
#include "harness.h"
#include "where.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ls_context *cpu;

static setting setting_of(const case_row *row, int64_t B, int64_t H, int64_t d, int64_t T)
{
    const unsigned traits = mechanism_of(row->mechanism)->traits;
    return (setting){.row = row,
                     .level = traits & LAYER_ONLY ? LS_LEVEL_LAYER : LS_LEVEL_CORE,
                     .layout = LS_BTHD,
                     .B = B,
                     .H = H,
                     .d = d,
                     .T = T,
                     .S = T,
                     .pad = PAD_RANDOM,
                     .alias = traits & LAYER_ONLY || !(traits & ONE_INPUT) ? ALIAS_NONE : ALIAS_ALL,
                     .seed = (uint64_t)d};
}

/* longer: queries and keys are so many times as long, which tells of what overflows, and rounds logits the more. */
static void compare_longer(const char *mechanism, ls_pattern pattern, const char *options, int64_t B, int64_t H,
                           int64_t d, int64_t T, ls_real longer)
{
    const case_row row = {mechanism, pattern, options, 0};
    const setting s = setting_of(&row, B, H, d, T);
    problem p;
    answer here_is = {0}, should = {0};
    char what[512] = "";
    watchdog(300);
    if (problem_draw(&s, &p) != LS_OK) {
        verdict(0, "%s: %s", mechanism, here.error);
        return;
    }
    for (int64_t i = 0; longer != 1 && i < B * T * H * d; i++) p.query[i] *= longer, p.key[i] *= longer;
    const int ok = problem_run(here.all, here.comm, &p, NULL, NULL, &here_is) == LS_OK &&
                   problem_run(cpu, here.comm, &p, NULL, NULL, &should) == LS_OK;
    const int equal = ok && answer_equal(&p, &here_is, &should, longer * LAW_TOLERANCE, what, sizeof what);
    verdict(equal, "%s: %s", p.text, ok ? what : here.error);
    answer_free(&here_is), answer_free(&should);
    problem_free(&p);
}

static void compare(const char *mechanism, ls_pattern pattern, const char *options, int64_t B, int64_t H, int64_t d,
                    int64_t T)
{
    compare_longer(mechanism, pattern, options, B, H, d, T, 1);
}

static void refuse(const char *mechanism, ls_pattern pattern, const char *options, int64_t d)
{
    const case_row row = {mechanism, pattern, options, 0};
    const setting s = setting_of(&row, 1, 1, d, 3);
    problem p;
    answer a = {0};
    char expected[128];
    watchdog(300);
    if (problem_draw(&s, &p) != LS_OK) {
        verdict(0, "%s: %s", mechanism, here.error);
        return;
    }
    snprintf(expected, sizeof expected, "%s: a head dimension of %lld with these options is too large", mechanism,
             (long long)d);
    const int status = problem_run(here.all, here.comm, &p, NULL, NULL, &a);
    verdict(status == LS_ERR_UNSUPPORTED && strstr(here.error, expected) != NULL, "%s is not what was said, but: %s",
            expected, status == LS_OK ? "nothing" : here.error);
    answer_free(&a);
    problem_free(&p);
}

/* The second half of each row becomes the first. */
static void repeat(int64_t rows, int64_t d, ls_real *x)
{
    for (int64_t i = 0; i < rows; i++, x += d) memcpy(x + d / 2, x, (size_t)(d / 2) * sizeof *x);
}

/* Blocks make 128 features of softmax's results. Where all have the same numbers to go by, features 128 apart are the
 * same bit for bit, whichever block was first: here steep logits choose one key, and δ is taken from its tile. */
static void slices(void)
{
    const case_row row = {"softmax", LS_NS, "", STEEP};
    setting s = setting_of(&row, 1, 2, 256, 150);
    problem p;
    answer a = {0};
    s.pad = PAD_NONE;
    watchdog(300);
    if (problem_draw(&s, &p) != LS_OK) {
        verdict(0, "slices: %s", here.error);
        return;
    }
    const int64_t rows = p.B * p.heads * p.T;
    ls_real *const tensors[] = {p.query, p.key, p.value, p.dout};
    for (int i = 0; i < 4; i++) repeat(rows, p.d, tensors[i]);
    const int ok = problem_run(here.all, here.comm, &p, NULL, NULL, &a) == LS_OK;
    ls_real *const results[] = {a.out, a.dquery, a.dkey, a.dvalue};
    for (int i = 0; ok && i < 4; i++) {
        int64_t differ = 0;
        for (int64_t r = 0; r < rows; r++)
            differ +=
                memcmp(results[i] + r * p.d, results[i] + r * p.d + p.d / 2, (size_t)(p.d / 2) * sizeof(ls_real)) != 0;
        verdict(differ == 0, "slices: tensor %d: %lld of %lld rows differ", i, (long long)differ, (long long)rows);
    }
    verdict(ok, "slices: %s", ok ? "" : here.error);
    answer_free(&a);
    problem_free(&p);
}

int main(int argc, char **argv)
{
    world_open(&argc, &argv);
    if (test_device() != LS_CUDA) {
        printf("skipped: these are limits of GPUs\n");
        MPI_Finalize();
        return TEST_SKIPPED;
    }
    const ls_context_options options = {.comm = here.comm, .device = LS_CPU, .seed = 2024};
    verdict(ls_context_create(&options, &cpu) == LS_OK, "%s", ls_last_error());
    /* KiB of a block; elsewhere heads that are too large are too large to test */
    const char *shared = getenv("LONGSPAN_EMULATOR_SHARED");
    const int small = shared == NULL ? 0 : atoi(shared);
    const int all = argc < 2 || strcmp(argv[1], "--pieces") != 0;
    if (cpu != NULL && small == 64) refuse("longshort", LS_NS, "r=2,w=3", 2600);
    if (cpu != NULL && small == 99) compare("lara", LS_NS, "c=40", 1, 2, 36, 200); /* slots in two tiles of 32 */
    if (cpu != NULL && !small && all) {
        compare("local", LS_NC, "w=2,align=1", 1, 1, 1040, 4);
        compare("local", LS_NS, "w=2", 1, 1, 2600, 4);
        compare("longshort", LS_CS, "r=2,w=3,c=4", 1, 1, 1040, 12);
        compare("longshort", LS_NS, "r=2,w=3", 1, 1, 2000, 10);
        compare("local", LS_NS, "w=2", 1, 1, 40000, 3);
        slices();
    }
    if (cpu != NULL && !small) {
        /* features of several tiles and pieces, rows that can be read by fours and rows that cannot */
        compare("performer", LS_NS, "m=40", 2, 2, 80, 300);
        compare("performer", LS_CS, "m=17", 1, 3, 66, 200);
        compare("performer", LS_NC, "m=70", 2, 1, 132, 150);
        compare("performer", LS_NS, "m=120", 1, 2, 120, 40); /* directions in shared memory, and not */
        compare("performer", LS_NS, "m=180", 1, 2, 180, 40);
        compare("cosformer", LS_NS, "", 2, 2, 68, 300);
        /* slots in a tile of 16, 32, 64, and in three of 32; features for two blocks; many tiles of rows for a block */
        compare("nystrom", LS_NS, "m=12", 2, 2, 68, 300);
        compare("nystrom", LS_NC, "m=24", 1, 2, 33, 150);
        compare("nystrom", LS_CC, "m=70", 1, 1, 66, 200);
        compare("lara", LS_NS, "c=70", 1, 2, 68, 300);
        compare("lara", LS_NC, "c=9", 2, 1, 132, 150);
        compare("lara", LS_NC, "c=50", 1, 2, 36, 200);
        compare_longer("lara", LS_NC, "c=70", 1, 2, 4, 150, 30); /* slots' constants hundreds apart, a tile not full */
        compare("nystrom", LS_NS, "m=40", 1, 2, 70, 150);
        const int64_t times = getenv("LONGSPAN_TEST_GPU") != NULL ? 45 : 1; /* of blocks that are wanted there */
        compare("nystrom", LS_NS, "m=5", 2 * times, 4, 4, 700);
        compare("lara", LS_NC, "c=5", 2 * times, 4, 4, 700);
        /* rows in several pieces; windows that a tile of queries sees in two parts, and in more */
        compare("local", LS_NS, "w=9", 2, 2, 68, 100);
        compare("local", LS_CS, "w=70", 1, 2, 130, 150);
        compare("local", LS_NC, "w=9,align=1", 1, 2, 70, 100);
        compare("longshort", LS_NS, "r=3,w=9", 1, 2, 68, 90);
        compare("longshort", LS_CS, "r=2,w=9,c=8", 1, 2, 70, 90);
        /* several tiles of guests; vectors fewer than 64 in one, and 64 whose distances are two products */
        compare("longshort", LS_NS, "r=70,w=100", 1, 1, 36, 300);
        compare("longshort", LS_CS, "r=2,w=70,c=5", 1, 2, 36, 300);
        compare("longshort", LS_CS, "r=4,w=9,c=4", 2, 1, 20, 200);
        compare("cosformer", LS_CS, "act=1,max_len=250", 1, 2, 33, 200);
        /* several chunks in a thread's segment of a scan, and in a strip that is summed up */
        compare("s4d", LS_NS, "N=4", 2, 1, 3, 2500);
        compare("s4d", LS_CS, "N=20,channels=2", 2, 1, 2, 2500);
        if (getenv("LONGSPAN_TEST_EVERY") == NULL) { /* minutes on the emulated GPU */
            compare("probsparse", LS_CS, "f=1", 33000, 2, 2, 1);
            compare("longshort", LS_CS, "r=2,w=3,c=2", 33000, 2, 2, 3);
        }
    }
    ls_context_free(cpu);
    return world_close();
}
