/* Linear attention to few keys: they go to all ranks as they are, and each query weighs each of them. Formulas:
 * linear.c. Sums cannot hold what is a small difference of large numbers; pairs can. */
#include "linear_rows.h"

/* A key on its way is [b][v] and, where there are exponentials, [top]; keys go (n,B,H) one after the other, so that the
 * ranks' pieces make the sequence. */
static int64_t shared_width(const ls_pass *p)
{
    return map_of(p)->features(p) + p->d + (exponentials_of(p) > 0);
}

int64_t ls_linear_shared_piece(const ls_pass *p, int64_t lo, int64_t n)
{
    (void)lo;
    return n * p->B * p->H * shared_width(p);
}

static ls_real *shared(const linear *x, ls_real *keys, int64_t b, int64_t h, int64_t j)
{
    return keys + ((j * x->p->B + b) * x->p->H + h) * shared_width(x->p);
}

ls_status ls_linear_share(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->S, .step = SHORT, .reads = HAS_K | HAS_V};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            load_keys(&x, k);
            for (int64_t j = 0; j < k.n; j++) {
                ls_real *to = shared(&x, p->gathered[phase + 1].mine, b, k.h, k.t + j);
                memcpy(to, x.b + j * x.r, (size_t)x.r * sizeof *to);
                memcpy(to + x.r, x.v + j * x.d, (size_t)x.d * sizeof *to);
                if (x.exponentials > 0) to[x.r + x.d] = x.top[j];
            }
        }
    return LS_OK;
}

ls_status ls_linear_share_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->S, .step = SHORT, .reads = HAS_K, .writes = HAS_DK | HAS_OUT};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            load_keys(&x, k);
            for (int64_t j = 0; j < k.n; j++) {
                const ls_real *from = shared(&x, p->gathered[phase + 1].dmine, b, k.h, k.t + j);
                memcpy(x.db + j * x.r, from, (size_t)x.r * sizeof *from);
                memcpy(x.out + j * x.d, from + x.r, (size_t)x.d * sizeof *from);
            }
            finish_keys(&x, k);
        }
    return LS_OK;
}

/* All keys of (b,h): b seen from c. */
static void load_shared(const linear *x, int phase, chunk k, ls_real c)
{
    for (int64_t j = 0; j < x->p->all_keys; j++)
        memcpy(x->b + j * x->r, shared(x, x->p->gathered[phase].all, k.b, k.h, j), (size_t)x->r * sizeof *x->b);
    exponentiate(x, 0, x->p->all_keys, c);
}

/* Their values (S,d), and the distance between two rows. */
static const ls_real *shared_values(const linear *x, int phase, chunk k)
{
    return shared(x, x->p->gathered[phase].all, k.b, k.h, 0) + x->r;
}

static int64_t shared_stride(const linear *x)
{
    return ls_linear_shared_piece(x->p, 0, 1);
}

/* How many keys row t of the queries sees. */
static int64_t seen(const linear *x, int64_t t)
{
    const ls_pass *p = x->p;
    return p->pattern == LS_CS ? p->query_span[0].lo + t + 1 : p->all_keys;
}

/* cos ω(i - j) of all keys j that row t of the queries sees, 0 of the others. */
static const ls_real *apart_from_all(const linear *x, int64_t t)
{
    const double angle = x->turn * (double)(x->p->query_span[0].lo + t), s = sin(angle), c = cos(angle);
    const int64_t sees = seen(x, t);
    for (int64_t j = 0; j < x->p->all_keys; j++) {
        const double apart = x->F == x->r ? 1 : c * x->step[2 * j + 1] + s * x->step[2 * j];
        x->apart[j] = j < sees ? (ls_real)apart : 0;
    }
    return x->apart;
}

/* Queries of a chunk, and their c. */
static void load_short(const linear *x, int phase, chunk k)
{
    load_queries(x, k);
    for (int64_t i = 0; i < k.n; i++) x->c[i] = 0;
    for (int64_t i = 0; i < k.n && x->exponentials > 0; i++) {
        const int64_t n = seen(x, k.t + i);
        for (int64_t j = 0; j < n; j++) x->top[j] = shared(x, x->p->gathered[phase].all, k.b, k.h, j)[x->r + x->d];
        x->c[i] = ls_row_max(n, x->top);
    }
}

/* The piece of a chunk's queries that begins at row i is made ready: keys seen from c at its end, w = a·b. Returns its
 * length. */
static int64_t load_short_piece(const linear *x, int phase, chunk k, int64_t i)
{
    const int64_t end = end_of_piece(x, i, k.n), n = end - i, S = x->p->all_keys;
    load_shared(x, phase, k, x->c[end - 1]);
    make_up(x, i, n, x->a);
    ls_gemm(0, 1, n, S, x->r, 1, x->a + i * x->r, x->r, x->b, x->r, 0, x->w, S);
    return n;
}

ls_status ls_linear_pairs(ls_pass *p, int phase)
{
    linear x = begin(p);
    const int64_t S = p->all_keys, ld = shared_stride(&x);
    const walk w = {.rows = p->T, .step = CAUSAL_ROWS, .reads = HAS_Q, .writes = HAS_OUT};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            const ls_real *v = shared_values(&x, phase, k);
            load_short(&x, phase, k);
            for (int64_t i = 0, n; i < k.n; i += n) {
                n = load_short_piece(&x, phase, k, i);
                for (int64_t j = 0; j < n; j++) {
                    const int64_t t = k.t + i + j;
                    set_inverse(&x, i + j, weigh(S, apart_from_all(&x, t), x.w + j * S));
                }
                ls_gemm(0, 0, n, x.d, S, 1, x.w, S, v, ld, 0, x.out + i * x.d, x.d);
            }
            scale_rows(k.n, x.d, x.inverse, x.out);
        }
    return LS_OK;
}

/* A piece of queries that is ready: da, and what its keys get is added to what goes back to them. */
static void pairs_backward(const linear *x, int phase, chunk k, int64_t i, int64_t n)
{
    const int64_t S = x->p->all_keys, r = x->r, d = x->d, ld = shared_stride(x);
    ls_real *back = shared(x, x->p->gathered[phase].dall, k.b, k.h, 0);
    ls_gemm(0, 1, n, S, d, 1, x->dout + i * d, d, shared_values(x, phase, k), ld, 0, x->dw, S);
    for (int64_t j = 0; j < n; j++) {
        const ls_real *apart = apart_from_all(x, k.t + i + j);
        ls_real *w = x->w + j * S, *dw = x->dw + j * S;
        double cross;
        const double D = weigh_and_dot(S, apart, w, dw, &cross);
        set_inverse(x, i + j, D);
        const ls_real delta = x->flows[i + j] > 0 ? (ls_real)(cross / D) : 0;
        weigh_backward(S, apart, x->inverse[i + j], delta, w, dw);
    }
    ls_gemm(0, 0, n, r, S, 1, x->dw, S, x->b, r, 0, x->da + i * r, r);
    ls_gemm(1, 0, S, r, n, 1, x->dw, S, x->a + i * r, r, 0, x->db, r);
    ls_gemm(1, 0, S, d, n, 1, x->w, S, x->dout + i * d, d, 1, back + r, ld);
    exponentiate_backward(x, 0, S);
    for (int64_t j = 0; j < S; j++) ls_axpy(r, 1, x->db + j * r, back + j * ld);
    straighten(x, i, n);
    make_up(x, i, n, x->da);
}

ls_status ls_linear_pairs_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->T, .step = CAUSAL_ROWS, .reads = HAS_Q | HAS_DOUT, .writes = HAS_DQ};
    ls_zero(p->gathered[phase].dall, p->gathered[phase].total);
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            load_short(&x, phase, k);
            for (int64_t i = 0, n; i < k.n; i += n) {
                n = load_short_piece(&x, phase, k, i);
                pairs_backward(&x, phase, k, i, n);
            }
            finish_queries(&x, k);
        }
    return LS_OK;
}
