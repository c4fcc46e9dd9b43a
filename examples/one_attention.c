/* One exact attention, forward and backward, on however many ranks mpirun gives: every rank owns a piece of the
 * sequence.
 *
 *   cmake -S examples -B build-example -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build-example
 *   mpirun -n 2 build-example/one_attention */
#include <longspan.h>
#include <stdio.h>
#include <stdlib.h>

#define TRY(call)                                                                                                      \
    if ((call) != LS_OK) return fprintf(stderr, "%s\n", ls_last_error()), MPI_Abort(MPI_COMM_WORLD, 1)

int main(int argc, char **argv)
{
    MPI_Init(&argc, &argv);
    ls_context *ctx;
    TRY(ls_context_create(&(ls_context_options){.comm = MPI_COMM_WORLD, .seed = 1}, &ctx));

    ls_attention_options options;
    TRY(ls_attention_defaults("softmax", &options));
    options.pattern = LS_CS, options.level = LS_LEVEL_LAYER, options.layout = LS_BTHD;
    options.embed_dim = 64, options.num_heads = 4;
    ls_attention *attention;
    TRY(ls_attention_create(ctx, &options, &attention));

    ls_shard shard; /* 1000 positions, as even as the ranks allow */
    TRY(ls_shard_even(ctx, 1000, &shard));
    const size_t rows = (size_t)shard.n * 64, weights = (size_t)ls_attention_param_count(attention);
    ls_real *x = calloc(4 * rows + 2 * weights, sizeof *x), *y = x + rows, *dy = y + rows, *dx = dy + rows;
    ls_real *w = dx + rows, *dw = w + weights;
    for (size_t i = 0; i < rows; i++) x[i] = (ls_real)((shard.lo * 64 + (int64_t)i) % 17) / 17, dy[i] = 1;
    for (size_t i = 0; i < weights; i++) w[i] = (ls_real)(i % 13) / 130;

    ls_saved *saved;
    TRY(ls_saved_create(attention, &saved));
    const ls_attention_shape shape = {.batch = 1, .queries = &shard};
    const ls_attention_io io = {.query = x};
    TRY(ls_attention_forward(attention, &shape, &io, w, y, saved));
    TRY(ls_attention_backward(attention, &shape, &io, w, y, dy, saved,
                              &(ls_attention_grads){.query = dx, .params = dw}));
    TRY(ls_all_reduce_sum(ctx, dw, (int64_t)weights)); /* every rank has its share of the parameters' gradient */

    if (ls_context_rank(ctx) == 0)
        printf("%d ranks, y[0] = %.4f, dw[0] = %.2f\n", shard.size, (double)y[0], (double)dw[0]);
    ls_saved_free(saved), ls_shard_free(&shard), ls_attention_free(attention), ls_context_free(ctx), free(x);
    return MPI_Finalize();
}
