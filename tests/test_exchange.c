/* Every crossing against its adjoint, and its bytes against its formula, on this many ranks.
 *
 *   A linear crossing y = A x on all ranks has the adjoint x' = Aᵀ y' exactly when  Σ_ranks ⟨A x, y'⟩ = Σ_ranks ⟨x, Aᵀ
 * y'⟩ for random x, y'. A softsum is linear in its scaled and plain parts while the maxima stand still.
 *
 * All verdicts are made from sums over all ranks, so every rank fails or none does, and none is left waiting. */
#include "packed.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>

static ls_context *ctx;
static int rank, size;
#ifdef LS_REAL_DOUBLE
static const double tolerance = 1e-12;
#else
static const double tolerance = 2e-5;
#endif

static uint64_t state = 88172645463325252ull;
static double draw(void) /* xorshift, in [-1, 1); each rank starts elsewhere */
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) * 0x1p-52 - 1;
}
static ls_real *filled(int64_t n)
{
    ls_real *x = malloc(((size_t)n + 1) * sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++) x[i] = (ls_real)draw();
    return x;
}
static double all(double x)
{
    double sum = 0;
    MPI_Allreduce(&x, &sum, 1, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    return sum;
}
static void must(ls_status s)
{
    const double failed = all(s != LS_OK);
    if (s != LS_OK) print_message("rank %d: %s\n", rank, ls_last_error());
    assert_true(failed == 0);
}
/* |a - b| against the size of what was summed. */
static void same(double a, double b, double scale)
{
    const double x = all(a), y = all(b), s = all(scale);
    if (!(fabs(x - y) <= tolerance * (s + 1e-30))) print_message("%g is not %g (scale %g)\n", x, y, s);
    assert_true(fabs(x - y) <= tolerance * (s + 1e-30));
}
static void ledger_agrees(void)
{
    ls_traffic t;
    ls_context_traffic(ctx, &t);
    double wrong = 0;
    for (int i = 0; i < LS_CROSSINGS; i++) wrong += t.sent[i] != t.predicted[i];
    assert_true(all(wrong) == 0);
}

/* ---------------------------------------------------------------------------------------- reduce and scan */

static const double decays[] = {-0.1, 2, -0.003, -0.5, -1.5, 0, 0, 1}; /* λ: re, im */
static const ls_monoid shapes[] = {
    {.groups = 5, .plain = 7},
    {.groups = 3, .has_max = 1, .scaled = 4},
    {.groups = 4, .has_max = 1, .scaled = 3, .plain = 2},
    {.groups = 0, .plain = 3},
    {.groups = 8, .plain = 2, .decay = decays, .decays = 4, .counts = 1},
    {.groups = 3, .plain = 2, .decay = decays, .decays = 3, .counts = 1},
};

/* sent of a rank; with some elements, and on some ranks all, the identity (nothing was there to sum). */
static ls_real *summary(ls_monoid m)
{
    ls_real *x = filled(ls_monoid_size(m));
    for (int64_t g = 0; m.has_max && g < m.groups; g++) {
        ls_real *e = x + g * ls_monoid_stride(m);
        e[0] *= 40; /* far apart: e^-80 */
        if ((g + rank) % 3 != 0) continue;
        e[0] = -INFINITY;
        for (int64_t i = 1; i <= m.scaled; i++) e[i] = 0;
    }
    if (m.counts) x[ls_monoid_size(m) - 1] = (ls_real)((3 * rank + 2) % 4); /* positions, of rank 2 none */
    return x;
}

static double inner(ls_monoid m, const ls_real *x, const ls_real *y, double *scale)
{
    double s = 0;
    for (int64_t i = 0; i < ls_monoid_size(m) - m.counts; i++) {
        if (m.has_max && i % ls_monoid_stride(m) == 0) continue;
        s += (double)x[i] * (double)y[i];
        *scale += fabs((double)x[i] * (double)y[i]);
    }
    return s;
}

/* What `rank` gets of states that decay, from everyone's, n reals each: Σ e^(λ positions between) s. */
static void fold_decays(ls_monoid m, const double *everyone, int from, int to, double *out)
{
    const int64_t n = ls_monoid_size(m);
    for (int64_t i = 0; i < n; i++) out[i] = 0;
    for (int p = from; p < to; p++) {
        double between = 0;
        for (int q = p < rank ? p + 1 : rank + 1; q < (p < rank ? rank : p); q++) between += everyone[q * n + n - 1];
        out[n - 1] += everyone[p * n + n - 1];
        for (int64_t g = 0; g < m.groups; g++) {
            const double *lambda = m.decay + 2 * (g % m.decays), *s = everyone + p * n + 2 * g;
            const double length = exp(lambda[0] * between), angle = lambda[1] * between;
            out[2 * g] += length * (cos(angle) * s[0] - sin(angle) * s[1]);
            out[2 * g + 1] += length * (cos(angle) * s[1] + sin(angle) * s[0]);
        }
    }
}

/* The plain fold over ranks [from, to), in double, of what everybody sent. */
static void fold(ls_monoid m, const ls_real *sent, int from, int to, double *out)
{
    const int64_t n = ls_monoid_size(m), stride = ls_monoid_stride(m);
    double *everyone = malloc(((size_t)(n * size) + 1) * sizeof *everyone),
           *mine = malloc(((size_t)n + 1) * sizeof *mine);
    for (int64_t i = 0; i < n; i++) mine[i] = (double)sent[i];
    MPI_Allgather(mine, (int)n, MPI_DOUBLE, everyone, (int)n, MPI_DOUBLE, MPI_COMM_WORLD);
    if (m.decay != NULL) fold_decays(m, everyone, from, to, out);
    for (int64_t g = 0; m.decay == NULL && g < m.groups; g++) {
        double top = -INFINITY;
        for (int p = from; m.has_max && p < to; p++) top = fmax(top, everyone[p * n + g * stride]);
        for (int64_t i = 0; i < stride; i++) {
            double s = 0;
            for (int p = from; p < to; p++) {
                const double *e = everyone + p * n + g * stride;
                s += i >= m.has_max && i < m.has_max + m.scaled && m.has_max
                         ? (isinf(e[0]) ? 0 : exp(e[0] - top) * e[i])
                         : e[i];
            }
            out[g * stride + i] = m.has_max && i == 0 ? top : s;
        }
    }
    free(everyone), free(mine);
}

static void check_combination(ls_monoid m, int kind) /* 0 reduce, 1 scan, 2 reverse scan */
{
    const int64_t n = ls_monoid_size(m);
    ls_exchange *x = &ctx->exchange;
    ls_real *sent = summary(m), *got = filled(n), *dgot = filled(n), *dsent = filled(n);
    double *want = malloc(((size_t)n + 1) * sizeof *want), scale = 0, error = 0;
    must(kind == 0 ? ls_reduce(x, m, sent, got) : ls_scan(x, m, kind == 2, sent, got));
    fold(m, sent, kind == 2 ? rank + 1 : 0, kind == 1 ? rank : size, want);
    for (int64_t i = 0; i < n; i++)
        if (!((double)got[i] == want[i])) error = fmax(error, fabs((double)got[i] - want[i]) / (1 + fabs(want[i])));
    assert_true(all(error <= tolerance ? 0 : 1) == 0);
    if (kind == 0) { /* the same bits everywhere */
        ls_real *first = malloc(((size_t)n + 1) * sizeof *first);
        memcpy(first, got, (size_t)n * sizeof *first);
        MPI_Bcast(first, (int)((size_t)n * sizeof *first), MPI_BYTE, 0, MPI_COMM_WORLD);
        assert_true(all(n > 0 && memcmp(first, got, (size_t)n * sizeof *first) != 0) == 0);
        free(first);
    }
    must(kind == 0 ? ls_reduce_adjoint(x, m, sent, got, dgot, dsent)
                   : ls_scan_adjoint(x, m, kind == 2, sent, got, dgot, dsent));
    const double left = inner(m, got, dgot, &scale), right = inner(m, sent, dsent, &scale);
    same(left, right, scale);
    free(sent), free(got), free(dgot), free(dsent), free(want);
}

static void test_reduce_and_scan(void **unused)
{
    (void)unused;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int kind = 0; kind < 3; kind++)
            for (int repeat = 0; repeat < 5; repeat++)
                if (kind > 0 || shapes[i].decay == NULL) check_combination(shapes[i], kind);
    ledger_agrees();
}

/* ---------------------------------------------------------------------------------------- gather */

static void test_gather(void **unused)
{
    (void)unused;
    for (int variant = 0; variant < 4; variant++) {
        int64_t *count = malloc((size_t)size * sizeof *count), total = 0;
        for (int p = 0; p < size; p++) total += count[p] = variant == 0 ? 5 : (p * 7 + variant) % 4; /* with zeros */
        ls_real *mine = filled(count[rank]), *everything = filled(total), *dall = filled(total),
                *dmine = filled(count[rank]);
        must(ls_gather(&ctx->exchange, count, mine, everything));
        must(ls_gather_adjoint(&ctx->exchange, count, dall, dmine));
        double left = 0, right = 0, scale = 0;
        for (int64_t i = 0; i < total; i++)
            left += (double)everything[i] * (double)dall[i], scale += fabs((double)dall[i]);
        for (int64_t i = 0; i < count[rank]; i++) right += (double)mine[i] * (double)dmine[i];
        same(left, right, scale);
        int64_t at = 0;
        for (int p = 0; p < rank; p++) at += count[p];
        assert_true(all(count[rank] > 0 && memcmp(everything + at, mine, (size_t)count[rank] * sizeof *mine) != 0) ==
                    0);
        free(count), free(mine), free(everything), free(dall), free(dmine);
    }
    ledger_agrees();
}

/* ---------------------------------------------------------------------------------------- shards */

static const int64_t lengths[] = {1, 2, 3, 6, 7, 8, 97};
enum { LENGTHS = sizeof lengths / sizeof *lengths };

/* variant 0: even; others: uneven, with empty ranks, the same on every rank */
static void make_shard(int64_t length, int variant, ls_shard *shard)
{
    int64_t mine = 0;
    if (variant == 0) {
        must(ls_shard_even(ctx, length, shard));
        return;
    }
    int64_t left = length;
    for (int p = 0; p < size; p++) {
        const int64_t n = p == size - 1 ? left : (p + variant) % 2 ? 0 : (left * (p * 5 + variant) % (left + 1));
        if (p == rank) mine = n;
        left -= n;
    }
    must(ls_shard_local(ctx, mine, shard));
    assert_true(shard->length == length);
}

/* ---------------------------------------------------------------------------------------- fetch */

static void test_fetch(void **unused)
{
    (void)unused;
    enum { B = 2, H = 3, D = 4 };
    for (int l = 0; l < LENGTHS; l++)
        for (int variant = 0; variant < 3; variant++) {
            ls_shard shard;
            make_shard(lengths[l], variant, &shard);
            const int64_t L = shard.length;
            ls_span *want = malloc(2 * (size_t)size * sizeof *want);
            for (int p = 0; p < size; p++) { /* a halo over the own piece, and something far away */
                const int64_t lo = ls_max(0, shard.bounds[p] - 2), hi = ls_min(L, shard.bounds[p + 1] + 3);
                want[2 * p] = (ls_span){0, lo, p % 3 == 2 ? 0 : hi - lo};
                want[2 * p + 1] = (ls_span){0, L / 2, ls_min(L - L / 2, p % 2 ? 3 : 0)};
            }
            const int64_t n = want[2 * rank].n + want[2 * rank + 1].n;
            ls_real *from = filled(B * H * shard.n * D), *to = filled(B * H * n * D);
            ls_real *dfrom = calloc((size_t)(B * H * shard.n * D) + 1, sizeof *dfrom), *dto = filled(B * H * n * D);
            for (int64_t i = 0; i < B * H * shard.n * D; i++) /* a value says where it is from */
                from[i] = (ls_real)(shard.lo + i / D % (shard.n ? shard.n : 1)) / 8 + (ls_real)(i % D);
            /* (B,H,n,d) at the owner, (n,B,H,d) at the wanter: layouts need not agree */
            const ls_view vf = {from, H * shard.n * D, shard.n * D, D}, vdf = {dfrom, H * shard.n * D, shard.n * D, D};
            const ls_view vt = {to, H * D, D, B * H * D}, vdt = {dto, H * D, D, B * H * D};
            const ls_rows a = ls_rows_of_view(vf, B, H, D), b = ls_rows_of_view(vt, B, H, D);
            const ls_rows da = ls_rows_of_view(vdf, B, H, D), db = ls_rows_of_view(vdt, B, H, D);
            must(ls_fetch(&ctx->exchange, &shard, want, &a, &b, 1));
            double wrong = 0;
            for (int64_t t = 0; t < n; t++) {
                const ls_span first = want[2 * rank];
                const int64_t global = t < first.n ? first.lo + t : want[2 * rank + 1].lo + t - first.n;
                for (int64_t e = 0; e < D; e++) wrong += to[t * B * H * D + e] != (ls_real)global / 8 + (ls_real)e;
            }
            assert_true(all(wrong) == 0);
            must(ls_fetch_adjoint(&ctx->exchange, &shard, want, &da, &db, 1));
            double left = 0, right = 0, scale = 0;
            for (int64_t i = 0; i < B * H * n * D; i++)
                left += (double)to[i] * (double)dto[i], scale += fabs((double)to[i]);
            for (int64_t i = 0; i < B * H * shard.n * D; i++) right += (double)from[i] * (double)dfrom[i];
            same(left, right, scale);
            free(from), free(to), free(dfrom), free(dto), free(want);
            ls_shard_free(&shard);
        }
    ledger_agrees();
}

/* ---------------------------------------------------------------------------------------- requests */

enum { RB = 2, RH = 3, RD = 4 };

/* What (b,h,position) holds, and its byte. */
static ls_real held(int64_t g, int64_t position, int64_t e)
{
    return (ls_real)(position + 200 * g) / 8 + (ls_real)e;
}
static uint8_t held_byte(int64_t g, int64_t position)
{
    return (uint8_t)(7 * position + g / RH);
}

/* Lists that nobody else knows: some empty, some of everything, most of a few intervals, also one beside the other. */
static void draw_lists(ls_requests *r, const ls_shard *shard, int variant)
{
    const int64_t L = shard->length;
    for (int pass = 0, count = 0; pass < 2; pass++) {
        const uint64_t seed = state; /* the second pass draws the same, and writes it down */
        if (pass == 1) must(ls_requests_begin(r, size, RB * RH, RH, count));
        for (int64_t g = 0, i = 0; g < RB * RH; g++) {
            const int none = (rank + g + variant) % 4 == 3 || (rank + variant) % 5 == 4, whole = (rank + g) % 7 == 1;
            for (int64_t at = none ? L : 0; at < L; i++) {
                const int64_t lo = whole ? 0 : at + (int64_t)((draw() + 1) * 3);
                const int64_t n = whole ? L : 1 + (int64_t)((draw() + 1) * 4);
                if (lo >= L) break;
                if (pass == 0) count++;
                if (pass == 1) r->list[i] = (ls_span){0, lo, ls_min(n, L - lo)};
                at = lo + n;
            }
            if (pass == 1) r->list_at[g + 1] = i;
        }
        if (pass == 0) state = seed;
    }
}

/* Rows and intervals that this rank wants of others, counted position by position. */
static void count_others(const ls_requests *r, const ls_shard *shard, double *rows, double *intervals)
{
    *rows = *intervals = 0;
    for (int64_t i = 0; i < r->list_at[RB * RH]; i++)
        for (int p = 0; p < size; p++) {
            double mine = 0;
            for (int64_t t = r->list[i].lo; t < r->list[i].lo + r->list[i].n; t++)
                mine += p != rank && t >= shard->bounds[p] && t < shard->bounds[p + 1];
            *rows += mine;
            *intervals += mine > 0;
        }
}

static double bytes_of_fetch(void)
{
    ls_traffic t;
    ls_context_traffic(ctx, &t);
    return all((double)t.sent[LS_FETCH]);
}

static void check_requests(int64_t length, int variant)
{
    ls_shard shard;
    make_shard(length, variant, &shard);
    ls_requests r = {0};
    draw_lists(&r, &shard, variant);
    ls_requests_cut(&shard, &r);
    const int64_t n = shard.n, reals = RB * RH * n * RD, row = RD * (int64_t)sizeof(ls_real);
    ls_real *from = filled(reals), *dfrom = calloc((size_t)reals + 1, sizeof *dfrom);
    ls_real *to = filled(r.rows * RD), *dto = filled(r.rows * RD);
    uint8_t *byte = calloc((size_t)(RB * n) + 1, 1), *got = calloc((size_t)r.rows + 1, 1);
    for (int64_t g = 0; g < RB * RH; g++) /* (B,n,H,D) */
        for (int64_t t = 0; t < n; t++) {
            ls_real *x = from + (((g / RH) * n + t) * RH + g % RH) * RD;
            for (int64_t e = 0; e < RD; e++) x[e] = held(g, shard.lo + t, e);
            byte[g / RH * n + t] = held_byte(g, shard.lo + t);
        }
    const ls_view v = {from, n * RH * RD, RD, RH * RD}, dv = {dfrom, n * RH * RD, RD, RH * RD};
    const ls_rows own[] = {ls_rows_of_view(v, RB, RH, RD), ls_rows_of_pad(byte, RB, n)};
    const ls_rows want[] = {ls_rows_of_view((ls_view){to, 0, 0, RD}, 1, 1, RD), ls_rows_of_pad(got, 1, r.rows)};
    const ls_rows down = ls_rows_of_view(dv, RB, RH, RD), dwant = ls_rows_of_view((ls_view){dto, 0, 0, RD}, 1, 1, RD);

    /* forward, against what the owners hold */
    double before = bytes_of_fetch(), rows, intervals, wrong = 0;
    count_others(&r, &shard, &rows, &intervals);
    must(ls_requests_exchange(ctx, &r, (size_t)row + 1, LS_OK));
    must(ls_request(&ctx->exchange, &shard, &r, own, want, 2));
    double sent = bytes_of_fetch() - before;
    assert_true(sent == all(16 * (size - 1) + 24 * intervals + rows * (double)(row + 1)));
    for (int64_t g = 0; g < RB * RH; g++) {
        int64_t at = r.first[g];
        for (int64_t i = r.list_at[g]; i < r.list_at[g + 1]; i++)
            for (int64_t t = r.list[i].lo; t < r.list[i].lo + r.list[i].n; t++, at++) {
                for (int64_t e = 0; e < RD; e++) wrong += to[at * RD + e] != held(g, t, e);
                wrong += got[at] != held_byte(g, t);
            }
        wrong += at != r.first[g + 1];
    }
    assert_true(all(wrong) == 0);

    /* the adjoint, twice: lists serve again */
    for (int repeat = 0; repeat < 2; repeat++) {
        double left = 0, right = 0, scale = 0;
        before = bytes_of_fetch();
        must(ls_request_adjoint(&ctx->exchange, &shard, &r, &down, &dwant, 1));
        sent = bytes_of_fetch() - before;
        assert_true(sent == all(rows * (double)row));
        for (int64_t i = 0; i < r.rows * RD; i++) left += (double)to[i] * (double)dto[i], scale += fabs((double)to[i]);
        for (int64_t i = 0; i < reals; i++) right += (double)from[i] * (double)dfrom[i] / (repeat + 1);
        same(left, right, scale);
    }
    free(from), free(to), free(dfrom), free(dto), free(byte), free(got);
    ls_requests_free(&r);
    ls_shard_free(&shard);
}

static void test_requests(void **unused)
{
    (void)unused;
    for (int l = 0; l < LENGTHS; l++)
        for (int variant = 0; variant < 6; variant++) check_requests(lengths[l], variant % 3);
    ledger_agrees();
}

/* A rank that cannot even say what it wants: all are told, and nobody waits. */
static void test_requests_fail_together(void **unused)
{
    (void)unused;
    ls_requests r = {0};
    ls_shard shard;
    make_shard(8, 0, &shard);
    draw_lists(&r, &shard, 0);
    ls_requests_cut(&shard, &r);
    const ls_status mine = rank == size - 1 ? ls_fail(LS_ERR_MEMORY, "no room for lists") : LS_OK;
    const ls_status status = ls_requests_exchange(ctx, &r, 8, mine);
    assert_true(all(status != LS_ERR_MEMORY || strstr(ls_last_error(), "no room for lists") == NULL) == 0);
    must(ls_requests_exchange(ctx, &r, 8, LS_OK));
    ls_requests_free(&r);
    ls_shard_free(&shard);
    ledger_agrees();
}

/* ---------------------------------------------------------------------------------------- ring */

/* A mechanism that is linear in v and knows positions: out_i = Σ_j c(i,j) v_j, over j <= i in CS. */
static double coefficient(int64_t i, int64_t j)
{
    return cos((double)(3 * i + 5 * j));
}
static ls_status begin(ls_pass *p, int phase)
{
    (void)phase;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t t = 0; t < p->T; t++)
            for (int64_t e = 0; e < p->d; e++) ls_row(p->out, b, 0, t)[e] = 0;
    return LS_OK;
}
static void visit_all(ls_pass *p, int backward)
{
    for (int64_t b = 0; b < p->B; b++)
        for (int qs = 0; qs < p->query_spans; qs++)
            for (int64_t i = 0; i < p->query_span[qs].n; i++)
                for (int ks = 0; ks < p->visit.spans; ks++)
                    for (int64_t j = 0; j < p->visit.span[ks].n; j++) {
                        const int64_t gi = p->query_span[qs].lo + i, gj = p->visit.span[ks].lo + j;
                        const int64_t row = p->query_span[qs].row + i, col = p->visit.span[ks].row + j;
                        if (p->pattern == LS_CS && gj > gi) continue;
                        if (p->visit.pad != NULL && p->visit.pad[b * p->visit.n + col]) continue;
                        const ls_real c = (ls_real)coefficient(gi, gj);
                        for (int64_t e = 0; e < p->d; e++)
                            if (backward)
                                ls_row(p->visit.dv, b, 0, col)[e] += c * ls_row(p->dout, b, 0, row)[e];
                            else
                                ls_row(p->out, b, 0, row)[e] += c * ls_row(p->visit.v, b, 0, col)[e];
                    }
}
static ls_status forward_ring(ls_pass *p, int phase)
{
    (void)phase;
    visit_all(p, 0);
    return LS_OK;
}
static ls_status backward_ring(ls_pass *p, int phase)
{
    (void)phase;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t t = 0; t < p->T; t++)
            for (int64_t e = 0; e < p->d; e++) ls_row(p->dq, b, 0, t)[e] = 0;
    visit_all(p, 1);
    return LS_OK;
}
static const ls_phase linear_phases[] = {
    {.name = "begin", .forward = begin},
    {.name = "ring", .crossing = LS_RING, .forward = forward_ring, .backward = backward_ring},
    {.name = NULL}};
static const ls_mechanism linear = {.name = "linear", .phases = {linear_phases, linear_phases}, .balance_causal = 1};

static void test_ring(void **unused)
{
    (void)unused;
    enum { B = 2, D = 3 };
    for (int l = 0; l < LENGTHS; l++)
        for (int variant = 0; variant < 3; variant++)
            for (int pattern = 0; pattern < 2; pattern++)
                for (int padding = 0; padding < 2; padding++) {
                    ls_shard shard;
                    make_shard(lengths[l], variant, &shard);
                    const int64_t n = shard.n, L = shard.length, reals = B * n * D;
                    ls_real *x[7]; /* q k v out, dq dk dv; dout is q's stand-in below */
                    for (int i = 0; i < 7; i++) x[i] = filled(reals);
                    ls_real *dout = filled(reals);
                    uint8_t *pad = calloc((size_t)(B * n) + 1, 1);
                    for (int64_t i = 0; padding && i < B * n; i++)
                        pad[i] = (uint8_t)((shard.lo + i % (n ? n : 1)) % 3 == 1);
                    ls_call c = {.ctx = ctx, .mechanism = &linear, .queries = &shard, .keys = &shard};
                    ls_view v[7];
                    for (int i = 0; i < 7; i++) v[i] = (ls_view){x[i], n * D, n * D, D};
                    c.pass = (ls_pass){.pattern = (ls_pattern)pattern,
                                       .B = B,
                                       .H = 1,
                                       .T = n,
                                       .S = n,
                                       .d = D,
                                       .all_queries = L,
                                       .all_keys = L,
                                       .q = v[0],
                                       .out = v[3],
                                       .dq = v[4],
                                       .dout = {dout, n * D, n * D, D},
                                       .backward = 1};
                    c.pass.own =
                        (ls_block){.k = v[1], .v = v[2], .dk = v[5], .dv = v[6], .n = n, .pad = padding ? pad : NULL};
                    ls_arena saved = {0}, work = {0};
                    ls_arena_measure(&saved), ls_arena_measure(&work);
                    ls_run_plan(&c, &saved, &work);
                    must(ls_arena_reserve(&saved, "test"));
                    must(ls_arena_reserve(&work, "test"));
                    ls_run_plan(&c, &saved, &work);
                    must(ls_run_forward(&c));
                    must(ls_run_backward(&c));
                    double left = 0, right = 0, scale = 0;
                    for (int64_t i = 0; i < reals; i++) {
                        left += (double)x[3][i] * (double)dout[i];
                        right += pad[i / D] ? 0 : (double)x[2][i] * (double)x[6][i];
                        scale += fabs((double)x[3][i] * (double)dout[i]);
                    }
                    same(left, right, scale + 1);
                    /* and forward against the plain sum: row i of v is known everywhere through an all-reduce */
                    double *whole = calloc((size_t)(B * L * D), sizeof *whole), wrong = 0;
                    for (int64_t b = 0; b < B; b++)
                        for (int64_t t = 0; t < n; t++)
                            for (int64_t e = 0; e < D; e++)
                                whole[(b * L + shard.lo + t) * D + e] =
                                    pad[b * n + t] ? 0 : (double)x[2][(b * n + t) * D + e];
                    MPI_Allreduce(MPI_IN_PLACE, whole, (int)(B * L * D), MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
                    for (int64_t b = 0; b < B; b++)
                        for (int64_t t = 0; t < n; t++)
                            for (int64_t e = 0; e < D; e++) {
                                double sum = 0;
                                for (int64_t j = 0; j < (pattern == LS_CS ? shard.lo + t + 1 : L); j++)
                                    sum += coefficient(shard.lo + t, j) * whole[(b * L + j) * D + e];
                                wrong += fabs(sum - (double)x[3][(b * n + t) * D + e]) > tolerance * (double)(L + 1);
                            }
                    assert_true(all(wrong) == 0);
                    for (int i = 0; i < 7; i++) free(x[i]);
                    free(dout), free(pad), free(whole);
                    ls_arena_free(&saved), ls_arena_free(&work);
                    ls_shard_free(&shard);
                }
    ledger_agrees();
}

/* Keys alone on the ring, with notes of their owner: out_i += Σ_j c(i,j) n_b k_j, where n_b is what the owner noted. */
static int64_t one_note_each(const ls_pass *p)
{
    return p->B;
}
static ls_real noted(int64_t lo, int64_t b)
{
    return (ls_real)(lo + 1) / 8 + (ls_real)b;
}
static ls_status begin_noted(ls_pass *p, int phase)
{
    for (int64_t b = 0; b < p->B; b++) p->work[0][b] = noted(p->own.span[0].lo, b);
    p->own.note = p->work[0];
    return begin(p, phase);
}
static ls_status visit_noted(ls_pass *p, int phase)
{
    const ls_block *v = &p->visit;
    (void)phase;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t i = 0; i < p->T; i++)
            for (int64_t j = 0; j < v->n; j++) {
                if (v->pad != NULL && v->pad[b * v->n + j]) continue;
                const ls_real c = (ls_real)coefficient(p->query_span[0].lo + i, v->span[0].lo + j) * v->note[b];
                for (int64_t e = 0; e < p->d; e++) ls_row(p->out, b, 0, i)[e] += c * ls_row(v->k, b, 0, j)[e];
            }
    return LS_OK;
}
static void plan_noted(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    (void)saved;
    p->work[0] = ls_take(work, p->B);
}
static const ls_phase noted_phases[] = {{.name = "begin", .forward = begin_noted, .constant = 1},
                                        {.name = "ring",
                                         .crossing = LS_RING,
                                         .keys_only = 1,
                                         .notes = one_note_each,
                                         .forward = visit_noted,
                                         .constant = 1},
                                        {.name = NULL}};
static const ls_mechanism noting = {.name = "noting", .plan = plan_noted, .phases = {noted_phases}};

static void check_notes(const ls_shard *shard, int padding)
{
    enum { B = 2, D = 3 };
    const int64_t n = shard->n, L = shard->length, reals = B * n * D;
    ls_real *q = filled(reals), *k = filled(reals), *out = filled(reals);
    uint8_t *pad = calloc((size_t)(B * n) + 1, 1);
    double *whole = calloc((size_t)(B * L * D), sizeof *whole), wrong = 0; /* n_b k_j, 0 where padded */
    for (int64_t i = 0; i < B * n; i++) {
        const int64_t b = i / n, t = i % n;
        pad[i] = (uint8_t)(padding && (shard->lo + t) % 3 == 1);
        for (int64_t e = 0; e < D; e++) {
            whole[(b * L + shard->lo + t) * D + e] = pad[i] ? 0 : (double)noted(shard->lo, b) * (double)k[i * D + e];
            if (pad[i]) k[i * D + e] = (ls_real)NAN;
        }
    }
    MPI_Allreduce(MPI_IN_PLACE, whole, (int)(B * L * D), MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    ls_call c = {.ctx = ctx, .mechanism = &noting, .queries = shard, .keys = shard};
    c.pass = (ls_pass){.B = B, .H = 1, .T = n, .S = n, .d = D, .all_queries = L, .all_keys = L};
    c.pass.q = (ls_view){q, n * D, n * D, D};
    c.pass.out = (ls_view){out, n * D, n * D, D};
    c.pass.own = (ls_block){.k = {k, n * D, n * D, D}, .n = n, .pad = padding ? pad : NULL};
    ls_arena saved = {0}, work = {0};
    ls_arena_measure(&saved), ls_arena_measure(&work);
    ls_run_plan(&c, &saved, &work);
    must(ls_arena_reserve(&saved, "test"));
    must(ls_arena_reserve(&work, "test"));
    ls_run_plan(&c, &saved, &work);
    ls_traffic before, after;
    ls_context_traffic(ctx, &before);
    must(ls_run_forward(&c));
    ls_context_traffic(ctx, &after);
    const int64_t block = n == 0 ? 0 : B * n * D + B; /* every block but the last to arrive goes on, size - 1 times */
    const double sent = all((double)(after.sent[LS_RING] - before.sent[LS_RING])),
                 pads = padding ? (double)(size - 1) * all((double)(B * n)) : 0;
    assert_true(sent == (double)(size - 1) * all((double)block) * (double)sizeof(ls_real) + pads);
    c.pass.backward = 1;
    must(ls_run_backward(&c)); /* all is constant: nothing happens */
    ls_context_traffic(ctx, &before);
    assert_true(all((double)(before.sent[LS_RING] - after.sent[LS_RING])) == 0);
    for (int64_t i = 0; i < reals; i++) {
        double sum = 0;
        for (int64_t j = 0; j < L; j++)
            sum += coefficient(shard->lo + i / D % n, j) * whole[(i / D / n * L + j) * D + i % D];
        wrong += !(fabs(sum - (double)out[i]) <= tolerance * (double)(L + 1) * (double)(L + 1));
    }
    assert_true(all(wrong) == 0);
    free(q), free(k), free(out), free(pad), free(whole);
    ls_arena_free(&saved), ls_arena_free(&work);
}

static void test_ring_notes(void **unused)
{
    (void)unused;
    for (int l = 0; l < LENGTHS; l++)
        for (int variant = 0; variant < 3; variant++)
            for (int padding = 0; padding < 2; padding++) {
                ls_shard shard;
                make_shard(lengths[l], variant, &shard);
                check_notes(&shard, padding);
                ls_shard_free(&shard);
            }
    ledger_agrees();
}

/* ---------------------------------------------------------------------------------------- bytes */

/* What all ranks together send over one kind of crossing in a forward pass of (B,T,E) queries on (B,S,E) keys. */
static double volume(const char *mechanism, ls_pattern pattern, const char *option, double value, int64_t B, int64_t T,
                     int64_t S, ls_crossing kind)
{
    enum { H = 2, E = 8 };
    ls_attention_options o;
    must(ls_attention_defaults(mechanism, &o));
    if (option != NULL) must(ls_attention_set(&o, option, value));
    o.pattern = pattern, o.embed_dim = E, o.num_heads = H;
    ls_attention *a;
    must(ls_attention_create(ctx, &o, &a));
    ls_shard q, k;
    must(ls_shard_even(ctx, T, &q));
    must(ls_shard_even(ctx, S, &k));
    ls_real *xq = filled(B * q.n * E), *xk = filled(B * k.n * E), *xv = filled(B * k.n * E), *out = filled(B * q.n * E);
    ls_traffic before, after;
    ls_context_traffic(ctx, &before);
    must(ls_attention_forward(a, &(ls_attention_shape){B, &q, &k},
                              &(ls_attention_io){.query = xq, .key = xk, .value = xv}, NULL, out, NULL));
    ls_context_traffic(ctx, &after);
    ledger_agrees();
    free(xq), free(xk), free(xv), free(out);
    ls_shard_free(&q), ls_shard_free(&k);
    ls_attention_free(a);
    return all((double)(after.sent[kind] - before.sent[kind])) / (double)sizeof(ls_real);
}

static void test_volumes(void **unused)
{
    (void)unused;
    enum { B = 2, E = 8, S = 97, W = 3 };
    /* exact softmax: every block of keys and values goes to all others */
    assert_true(volume("softmax", LS_NC, NULL, 0, B, 5, S, LS_RING) == (size - 1) * 2 * B * E * S);
    /* local: W keys and values from each side, or W - 1 from the left */
    assert_true(volume("local", LS_NS, "window", W, B, S, S, LS_FETCH) == (size - 1) * 2 * B * E * 2 * W);
    assert_true(volume("local", LS_CS, "window", W, B, S, S, LS_FETCH) == (size - 1) * 2 * B * E * (W - 1));
}

/* What this rank of c sends in a forward and a backward pass of a layer; all ranks have the same rows. */
static void travel(ls_context *c, const ls_attention_options *o, const ls_shard *shard, ls_traffic *t)
{
    const uint64_t kept = state;
    ls_attention *a;
    ls_saved *saved;
    state = 88172645463325252ull;
    must(ls_attention_create(c, o, &a));
    must(ls_saved_create(a, &saved));
    const int64_t n = shard->n * o->embed_dim, params = ls_attention_param_count(a);
    const int self = o->pattern == LS_NS || o->pattern == LS_CS;
    ls_real *q = filled(n), *k = filled(n), *out = filled(n), *dq = filled(n), *dk = filled(n);
    ls_real *w = filled(params), *dw = filled(params);
    const ls_attention_shape shape = {1, shard, shard};
    const ls_attention_io io = {.query = q, .key = self ? NULL : k, .training = 1};
    must(ls_attention_forward(a, &shape, &io, w, out, saved));
    const ls_attention_grads grads = {.query = dq, .key = self ? NULL : dk, .params = dw};
    must(ls_attention_backward(a, &shape, &io, w, out, q, saved, &grads));
    ls_context_traffic(c, t);
    free(q), free(k), free(out), free(dq), free(dk), free(w), free(dw);
    ls_saved_free(saved);
    ls_attention_free(a);
    state = kept;
}

static void check_dry(const char *mechanism, ls_pattern pattern, int64_t length, double align)
{
    ls_attention_options o;
    must(ls_attention_defaults(mechanism, &o));
    o.pattern = pattern, o.level = LS_LEVEL_LAYER, o.embed_dim = 8, o.num_heads = 2;
    if (strcmp(mechanism, "local") == 0) must(ls_attention_set(&o, "align", align));
    if (strcmp(mechanism, "cosformer") == 0) must(ls_attention_set(&o, "max_len", (double)length));
    ls_context *with, *without;
    ls_traffic sent, computed;
    ls_shard shard;
    must(ls_context_create(&(ls_context_options){.comm = MPI_COMM_WORLD}, &with));
    must(ls_context_create(&(ls_context_options){.dry_size = size, .dry_rank = rank}, &without));
    must(ls_shard_even(with, length, &shard));
    travel(with, &o, &shard, &sent);
    travel(without, &o, &shard, &computed);
    double wrong = 0;
    for (int i = 0; i < LS_CROSSINGS; i++)
        wrong += computed.sent[i] != sent.sent[i] || computed.messages[i] != sent.messages[i] ||
                 computed.sent[i] != computed.predicted[i];
    if (wrong > 0)
        print_message("%s %s, length %d, rank %d: fetches %llu bytes, computed %llu\n", mechanism,
                      ls_pattern_name(pattern), (int)length, rank, (unsigned long long)sent.sent[LS_FETCH],
                      (unsigned long long)computed.sent[LS_FETCH]);
    assert_true(all(wrong) == 0);
    ls_shard_free(&shard);
    ls_context_free(with), ls_context_free(without);
}

/* A rank without the others sends what it would send among them. Where it is asked for keys that only the queries of
 * others tell, it does if they are its own: here, where all ranks have as many rows, and the same. */
static void test_dry(void **unused)
{
    (void)unused;
    enum { EVEN = 420, ODD = 97 }; /* 420: divided by all of 1 to 7 */
    for (int m = 0; ls_mechanism_name(m) != NULL; m++)
        for (ls_pattern pattern = LS_NS; pattern <= LS_CC; pattern++) {
            const char *name = ls_mechanism_name(m);
            const int predicts = strcmp(name, "local") == 0 && pattern == LS_CC;
            if (!ls_mechanism_has(name, pattern)) continue;
            check_dry(name, pattern, EVEN, 1);
            if (!predicts) check_dry(name, pattern, ODD, 0);
        }
}

/* A dry rank that owns nearly all keys takes them for one half: it still looks for none beyond the last. */
static void test_dry_guesses(void **unused)
{
    (void)unused;
    enum { OTHERS = 10, ALL = 2047 };
    ls_attention_options o;
    ls_traffic t;
    ls_context *without;
    ls_shard shard;
    must(ls_attention_defaults("local", &o));
    o.pattern = LS_CC, o.level = LS_LEVEL_LAYER, o.embed_dim = 8, o.num_heads = 2;
    must(ls_context_create(&(ls_context_options){.dry_size = 2, .dry_rank = 1}, &without));
    must(ls_shard_even(without, ALL, &shard));
    shard.bounds[1] = shard.lo = OTHERS, shard.n = ALL - OTHERS;
    travel(without, &o, &shard, &t);
    assert_true(all(t.sent[LS_FETCH] != t.predicted[LS_FETCH]) == 0);
    assert_true(all(t.sent[LS_FETCH] < ALL / 2 * 2 * 8 * sizeof(ls_real)) == 0); /* half the keys and values */
    ls_shard_free(&shard);
    ls_context_free(without);
}

/* A rank that fails alone: all get its code, and its name and sentence. */
static void test_agree(void **unused)
{
    (void)unused;
    const int culprit = size - 1;
    const ls_status mine = rank == culprit ? ls_fail(LS_ERR_IO, "the disk of %s is full", "this rank") : LS_OK;
    const ls_status status = ls_agree(ctx, mine);
    char want[64];
    snprintf(want, sizeof want, size == 1 ? "the disk" : "rank %d: the disk of this rank is full", culprit);
    assert_true(all(status != LS_ERR_IO || strstr(ls_last_error(), want) == NULL) == 0);
    assert_true(all(ls_agree(ctx, LS_OK) != LS_OK) == 0);
}

static void *nothing(size_t bytes)
{
    (void)bytes;
    return NULL;
}
static const char *kernel_broke(void)
{
    return "a kernel broke";
}

/* Too little memory is one thing, a device that gives none since it failed another. */
static void test_reserve(void **unused)
{
    (void)unused;
    ls_device_ops device = *ls_device_find(LS_CPU);
    ls_arena arena = {.device = &device};
    void *p;
    assert_int_equal(ls_reserve(&device, "rows", 100, &p), LS_OK);
    device.release(p);
    device.alloc = nothing;
    ls_arena_measure(&arena);
    ls_arena_take(&arena, 100);
    assert_int_equal(ls_arena_reserve(&arena, "rows"), LS_ERR_MEMORY);
    assert_non_null(strstr(ls_last_error(), "rows: cannot reserve"));
    device.broken = kernel_broke;
    assert_int_equal(ls_reserve(&device, "rows", 100, &p), LS_ERR_INTERNAL);
    assert_null(p);
    assert_non_null(strstr(ls_last_error(), "a kernel broke"));
}

/* A rank that has no memory for a new source: the state of no rank has any, says so, and can be given one. */
static void test_source_without_memory(void **unused)
{
    (void)unused;
    enum { E = 8 };
    const ls_device_ops *const usual = ctx->ops;
    ls_device_ops device = *usual;
    ls_attention_options o;
    ls_attention *attention;
    ls_state *made;
    ls_shard few, many;
    must(ls_attention_defaults("softmax", &o));
    o.pattern = LS_NC, o.embed_dim = E, o.num_heads = 1;
    must(ls_attention_create(ctx, &o, &attention));
    ctx->ops = &device;
    must(ls_state_create(attention, 1, 0, &made));
    make_shard(size, 0, &few);
    make_shard(100 * size, 0, &many);
    ls_real *x = filled(100 * size * E);
    const ls_attention_shape shape = {.batch = 1, .keys = &few}, more = {.batch = 1, .keys = &many};
    const ls_attention_io io = {.query = x, .key = x, .value = x};
    ls_real out[E];
    must(ls_state_source(attention, made, &shape, &io, NULL));
    must(ls_attention_step(attention, made, &io, NULL, out));
    if (rank == size - 1) device.alloc = nothing;
    assert_true(all(ls_state_source(attention, made, &more, &io, NULL) != LS_ERR_MEMORY) == 0);
    device.alloc = usual->alloc;
    assert_true(all(ls_state_reorder(made, (int64_t[]){0}) != LS_OK) == 0);
    const ls_status status = ls_attention_step(attention, made, &io, NULL, out);
    assert_true(all(status != LS_ERR_ARGUMENT || strstr(ls_last_error(), "ls_state_source first") == NULL) == 0);
    must(ls_state_source(attention, made, &more, &io, NULL));
    must(ls_attention_step(attention, made, &io, NULL, out));
    ctx->ops = usual;
    ls_state_free(made);
    ls_attention_free(attention);
    ls_shard_free(&few), ls_shard_free(&many);
    free(x);
}

/* A rank that fails while messages travel leaves the others waiting, unless all were told. */
static void test_alone(void **unused)
{
    (void)unused;
    assert_true(all(ls_agree(ctx, LS_OK) != LS_OK) == 0);
    const ls_status lost = size == 1 ? LS_ERR_MEMORY : LS_ERR_COMM;
    const ls_status status = ls_alone(ctx, ls_fail(LS_ERR_MEMORY, "no memory for rows"));
    assert_true(all(status != lost || strstr(ls_last_error(), "no memory for rows") == NULL) == 0);
    assert_true(all(ls_alone(ctx, LS_OK) != LS_OK || ls_alone(ctx, LS_ERR_ARGUMENT) != LS_ERR_ARGUMENT) == 0);
    const ls_status told = ls_agree(ctx, rank == 0 ? ls_fail(LS_ERR_MEMORY, "no memory for a list") : LS_OK);
    assert_true(all(told != LS_ERR_MEMORY || ls_alone(ctx, told) != LS_ERR_MEMORY) == 0);
    assert_true(all(ls_agree(ctx, LS_OK) != LS_OK) == 0);
    assert_true(all(ls_alone(ctx, ls_fail(LS_ERR_INTERNAL, "no such kernel")) !=
                    (size == 1 ? LS_ERR_INTERNAL : LS_ERR_COMM)) == 0);
}

static ls_status no_requests(ls_comm *c, const ls_message *m, int count, ls_pending *p)
{
    (void)c, (void)m, (void)count, (void)p;
    return ls_fail(LS_ERR_MEMORY, "no memory for requests");
}

/* So it is when ranks tell one another of their documents. Here all of them fail, and so none waits. */
static void test_alone_packed(void **unused)
{
    (void)unused;
    const ls_comm_ops *const usual = ctx->exchange.comm.ops;
    ls_comm_ops ops = *usual;
    ls_attention_options o;
    ls_attention *attention;
    ls_shard shard;
    ls_real x[4], y[4];
    const int32_t id[1] = {3};
    must(ls_attention_defaults("softmax", &o));
    o.embed_dim = 4, o.num_heads = 1;
    must(ls_attention_create(ctx, &o, &attention));
    make_shard(size, 0, &shard);
    for (int i = 0; i < 4; i++) x[i] = (ls_real)draw();
    const ls_attention_shape shape = {.batch = 1, .queries = &shard};
    const ls_attention_io io = {.query = x, .key = x, .value = x, .query_segments = id};
    must(ls_attention_forward(attention, &shape, &io, NULL, y, NULL));
    ops.begin = no_requests;
    ctx->exchange.comm.ops = &ops;
    const ls_status status = ls_attention_forward(attention, &shape, &io, NULL, y, NULL);
    ctx->exchange.comm.ops = usual;
    assert_true(all(status != (size == 1 ? LS_ERR_MEMORY : LS_ERR_COMM) ||
                    strstr(ls_last_error(), "no memory for requests") == NULL) == 0);
    ls_shard_free(&shard);
    ls_attention_free(attention);
}

/* Options that one rank alone gets wrong, or gives otherwise: all hear of it. */
static void test_create_together(void **unused)
{
    (void)unused;
    ls_context *other = ctx;
    ls_context_options options = {.comm = MPI_COMM_WORLD};
    if (rank == size - 1) options.precision = (ls_precision)77;
    assert_true(all(ls_context_create(&options, &other) != LS_ERR_ARGUMENT || other != NULL ||
                    strstr(ls_last_error(), "no precision 77") == NULL) == 0);
    options = (ls_context_options){.comm = MPI_COMM_WORLD};
    if (rank == size - 1) options.transport = LS_TRANSPORT_MPI;
    const ls_status status = ls_context_create(&options, &other);
    assert_true(all(status != (size == 1 ? LS_OK : LS_ERR_ARGUMENT)) == 0);
    if (status == LS_OK) ls_context_free(other);
    assert_true(all(ls_agree(ctx, LS_OK) != LS_OK) == 0);
}

/* Linked in the place of calloc: of `allowed` more calls, then fails once; -1: never. */
static int allowed = -1;
void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes)
{
    return allowed >= 0 && allowed-- == 0 ? NULL : __real_calloc(count, bytes);
}

/* Whatever one rank has no memory for as a context is made: all hear of it, and what there is of it is freed. */
static void test_create_without_memory(void **unused)
{
    (void)unused;
    const ls_context_options options = {.comm = MPI_COMM_WORLD};
    double failed = 1;
    for (int calls = 0; failed > 0; calls++) {
        ls_context *other = NULL;
        allowed = rank == size - 1 ? calls : -1;
        const ls_status status = ls_context_create(&options, &other);
        failed = all(rank == size - 1 && allowed < 0);
        allowed = -1;
        if (failed > 0)
            assert_true(all(status != LS_ERR_MEMORY || other != NULL || strstr(ls_last_error(), "no memory") == NULL) ==
                        0);
        else
            must(status);
        assert_true(failed > 0 || calls >= 3); /* of a context, of this rank's own, and of their lists */
        ls_context_free(other);
    }
    must(ls_agree(ctx, LS_OK));
}

/* Lists that a call leaves are in the figures, beside the memory of its tensors. */
static void test_bytes(void **unused)
{
    (void)unused;
    enum { N = 40, E = 4 };
    ls_attention_options o;
    ls_attention *attention;
    ls_context *other;
    ls_saved *saved;
    ls_shard shard;
    int32_t id[N];
    const ls_context_options options = {.comm = MPI_COMM_WORLD};
    must(ls_context_create(&options, &other));
    must(ls_attention_defaults("local", &o));
    o.pattern = LS_CC, o.embed_dim = E, o.num_heads = 1;
    must(ls_attention_create(other, &o, &attention));
    must(ls_saved_create(attention, &saved));
    make_shard(N * size, 0, &shard);
    ls_real *x = filled(N * E), *y = filled(N * E), *params = filled(ls_attention_param_count(attention));
    for (int64_t i = 0; i < ls_attention_param_count(attention); i++) params[i] = (ls_real)0.1; /* on all ranks */
    for (int64_t t = 0; t < N; t++) id[t] = (int32_t)(shard.lo + t) / 3; /* some go on at the next rank */
    const ls_attention_shape shape = {.batch = 1, .queries = &shard, .keys = &shard};
    ls_attention_io io = {.query = x, .key = x, .value = x, .query_segments = id, .key_segments = id};
    must(ls_attention_forward(attention, &shape, &io, params, y, NULL));
    must(ls_attention_forward(attention, &shape, &io, params, y, saved));
    const ls_documents *docs = other->documents;
    size_t lists = (size_t)docs->count * (sizeof *docs->list + sizeof *docs->requests);
    for (int64_t i = 0; i < docs->count; i++) lists += docs->requests[i].asked.capacity;
    assert_true(all(docs->count <= N / 3 || ls_saved_bytes(saved) < other->unsaved.capacity + lists) == 0);
    io.query_segments = io.key_segments = NULL;
    must(ls_attention_forward(attention, &shape, &io, params, y, NULL));
    const size_t wires = other->exchange.wire.capacity + other->alone->exchange.wire.capacity;
    const size_t tensors = other->work.capacity + other->unsaved.capacity, asked = other->requests.asked.capacity;
    assert_true(all(other->alone->exchange.wire.capacity == 0 || asked == 0) == 0);
    assert_true(all(ls_context_bytes(other) < tensors + wires + asked + lists) == 0);
    ls_saved_free(saved);
    ls_attention_free(attention);
    ls_shard_free(&shard);
    ls_context_free(other);
    free(x), free(y), free(params);
}

/* What is forgotten while it is under way writes to nobody's memory: the message that comes too late is still there. */
static void test_forget(void **unused)
{
    (void)unused;
    enum { REALS = 1000 };
    ls_comm comm;
    ls_pending pending = {0};
    ls_real *x = filled(REALS);
    const ls_real before = x[0];
    const int next = (rank + 1) % size;
    must(ls_comm_mpi(MPI_COMM_WORLD, &comm));
    const ls_message expected = {x, REALS * sizeof *x, (rank + size - 1) % size, 1, 1};
    must(comm.ops->begin(&comm, &expected, 1, &pending));
    comm.ops->forget(&pending);
    MPI_Comm mpi;
    memcpy(&mpi, &comm.own, sizeof mpi);
    MPI_Barrier(mpi);
    MPI_Request late;
    MPI_Status status;
    ls_real y[REALS] = {0}, z[REALS];
    MPI_Isend(y, sizeof y, MPI_BYTE, next, 1, mpi, &late);
    MPI_Recv(z, sizeof z, MPI_BYTE, MPI_ANY_SOURCE, MPI_ANY_TAG, mpi, &status);
    MPI_Wait(&late, MPI_STATUS_IGNORE);
    assert_true(all(x[0] != before || z[0] != 0) == 0);
    comm.ops->close(&comm);
    free(x);
}

int main(int argc, char **argv)
{
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    for (int i = 0; i < 10 * rank + 10; i++) draw();
    const ls_context_options options = {.comm = MPI_COMM_WORLD};
    if (ls_context_create(&options, &ctx) != LS_OK) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reduce_and_scan),
        cmocka_unit_test(test_gather),
        cmocka_unit_test(test_fetch),
        cmocka_unit_test(test_requests),
        cmocka_unit_test(test_ring),
        cmocka_unit_test(test_ring_notes),
        cmocka_unit_test(test_requests_fail_together),
        cmocka_unit_test(test_volumes),
        cmocka_unit_test(test_dry),
        cmocka_unit_test(test_dry_guesses),
        cmocka_unit_test(test_agree),
        cmocka_unit_test(test_reserve),
        cmocka_unit_test(test_source_without_memory),
        cmocka_unit_test(test_alone),
        cmocka_unit_test(test_alone_packed),
        cmocka_unit_test(test_create_together),
        cmocka_unit_test(test_create_without_memory),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_forget),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    ls_context_free(ctx);
    MPI_Finalize();
    return failed != 0;
}
