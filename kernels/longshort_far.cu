/* Longshort on a GPU: the vectors that stand for what is far. NS and CS are one here: a vector is a mean of the tokens
 * of a range, weighted by e^score: the whole sequence in NS, whose sums are made in slices of it, a chunk in CS.
 *
 *   sum_tokens       a tile of columns of one head over a range, visited by its tokens: elements of SUMS
 *   make_raw         elements become vectors x / s, which then are normalised as items
 *   return_raw       gradients of vectors become those of elements: dx = dx̂ / s
 *   token_gradients  a tile of tokens, visited by the columns of one head: dscores, dk, dv
 *
 * What s is owed is paid where the scores take theirs: e_jc (ds_c + k_j·dK_c + v_j·dV_c) with ds_c = -K_c·dK_c -
 * V_c·dV_c is a small difference of large numbers where few tokens are left. So k_j, v_j, K_c, V_c are all taken from
 * the mean of the range's vectors, K and V, of that head. */
#include "longshort_cuda.h"
#include "pairs.h"

extern "C" {
#include "dense.h"
}

/* `count` ranges of rows: i has [first + i length, first + (i + 1) length), those before limit. */
namespace
{
typedef struct ranges {
    int64_t count, first, length, limit;
} ranges;
} // namespace

/* Tokens and their scores: n rows of each batch row. */
namespace
{
typedef struct tokens {
    ls_view k, v, extra;
    const uint8_t *pad;
    int64_t B, H, n, r, d;
} tokens;
} // namespace

static int64_t element_reals(const ls_pass *p)
{
    return 2 + 2 * p->d;
}

static tokens own_tokens(const ls_pass *p)
{
    const int64_t E = p->H * p->d, half = p->B * p->S * E;
    ls_real *own = p->work[OWN];
    return tokens{longshort_side_by_side(own, p->S * E, E, p->d),
                  longshort_side_by_side(own + half, p->S * E, E, p->d),
                  p->own.extra,
                  p->own.pad,
                  p->B,
                  p->H,
                  p->S,
                  vectors(p),
                  p->d};
}

static tokens halo_tokens(const ls_pass *p)
{
    return tokens{p->halo.k, p->halo.v, p->halo.extra, p->halo.pad, p->B, p->H, p->halo.n, vectors(p), p->d};
}

static ranges slices_of(const ls_pass *p)
{
    const int64_t count = ls_min(SUM_SLICES, (p->S + 255) / 256), length = count > 0 ? (p->S + count - 1) / count : 0;
    return ranges{count, 0, length, p->S};
}

static ranges chunks_of(const ls_pass *p)
{
    int64_t first;
    const int64_t c = chunk_length(p), count = ls_longshort_chunks(p, &first);
    return ranges{count, first * c - p->halo.span[0].lo, c, p->halo.n};
}

/* ------------------------------------------------------------------------------------------------ sums */

/* A block: columns [tile · rows, ..) of head h, for one range and batch row. */
static __global__ void sum_tokens(ranges x, tokens s, int rows, ls_real *elements)
{
    LS_SHARED(ls_real, memory);
    __shared__ ls_group keys, values;
    const ls_pair_memory m = ls_pair_memory_at(memory);
    double *sum_k = (double *)(memory + LS_PAIR_ALL), *sum_v = sum_k + rows * s.d;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const int64_t tiles = (s.r + rows - 1) / rows, column = blockIdx.x % tiles * rows, rest = blockIdx.x / tiles;
    const int64_t h = rest % s.H, b = rest / s.H % s.B, range = rest / s.H / s.B;
    const int64_t begin = x.first + range * x.length, end = ls_min(begin + x.length, x.limit);
    ls_real top[LS_PAIR_EACH], shrink[LS_PAIR_EACH];
    double total[LS_PAIR_EACH];
    for (int u = 0; u < LS_PAIR_EACH; u++) {
        const int i = warp + u * LS_PAIR_WARPS;
        top[u] = -INFINITY, total[u] = 0;
        for (int64_t e = lane; e < s.d && i < rows; e += LS_WARP) sum_k[i * s.d + e] = sum_v[i * s.d + e] = 0;
    }
    for (int64_t t = begin; t < end; t += LS_PAIR_GUESTS) {
        __syncwarp(); /* the weights before have been read */
        const int64_t j = t + lane;
        const int there = j < end && !ls_is_padded(s.pad, b * s.n + j);
        if (warp == 0) {
            keys.row[lane] = there ? ls_row(s.k, b, h, j) : NULL, keys.more[lane] = NULL;
            values.row[lane] = there ? ls_row(s.v, b, h, j) : NULL, values.more[lane] = NULL;
        }
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int i = warp + u * LS_PAIR_WARPS;
            const int64_t c = column + i;
            const ls_real a = there && i < rows && c < s.r ? ls_row(s.extra, b, 0, j)[h * s.r + c] : -INFINITY;
            const ls_real most = ls_warp_max(a), next = most > top[u] ? most : top[u];
            const ls_real base = next == -INFINITY ? 0 : next, e = ls_exp(a - base);
            shrink[u] = ls_exp(top[u] - base);
            total[u] = total[u] * (double)shrink[u] + (double)e;
            top[u] = next;
            m.weight[i * LS_PAIR_WIDE + lane] = e;
        }
        ls_pair_sums(m.weight, &keys, rows, s.d, m, shrink, sum_k);
        ls_pair_sums(m.weight, &values, rows, s.d, m, shrink, sum_v);
    }
    for (int u = 0; u < LS_PAIR_EACH; u++) {
        const int i = warp + u * LS_PAIR_WARPS;
        const double all = ls_warp_sum(total[u]);
        if (i >= rows || column + i >= s.r) continue;
        ls_real *to = elements + (((range * s.B + b) * s.H + h) * s.r + column + i) * (2 + 2 * s.d);
        if (lane == 0) to[0] = top[u], to[1] = (ls_real)all;
        for (int64_t e = lane; e < s.d; e += LS_WARP) {
            to[2 + e] = (ls_real)sum_k[i * s.d + e];
            to[2 + s.d + e] = (ls_real)sum_v[i * s.d + e];
        }
    }
}

static void make_sums(ls_pass *p, ranges x, tokens s)
{
    const int rows = (int)ls_min(s.r, ls_pair_rows(s.d, sizeof(double)));
    const int64_t blocks = x.count * s.B * s.H * ((s.r + rows - 1) / rows);
    const size_t bytes = ls_pair_bytes(0) + (size_t)ls_fours(2 * rows * s.d) * sizeof(double);
    if (blocks > 0) LS_LAUNCH(p->queue, sum_tokens, (int)blocks, LS_PAIR_THREADS, bytes, x, s, rows, p->work[SUMS]);
}

/* to (groups,reals) = the softsum over slices of elements (slices,groups,reals): m, then what scales with e^m. */
static __global__ void combine(int64_t slices, int64_t groups, int64_t reals, const ls_real *from, ls_real *to)
{
    LS_EACH(i, groups * reals)
    {
        const ls_real *element = from + i / reals * reals;
        ls_real top = -INFINITY;
        double sum = 0;
        for (int64_t s = 0; s < slices; s++) {
            const ls_real m = element[s * groups * reals];
            top = m > top ? m : top;
        }
        const ls_real base = top == -INFINITY ? 0 : top;
        for (int64_t s = 0; s < slices; s++) {
            const ls_real *x = element + s * groups * reals;
            sum += (double)ls_exp(x[0] - base) * (double)x[i % reals];
        }
        to[i] = i % reals == 0 ? top : (ls_real)sum;
    }
}

/* ------------------------------------------------------------------------------------------------ vectors */

/* raw: x / s of each element, 0 where nothing was summed. flag (groups apart by item): 1 where something was. */
static __global__ void make_raw(int64_t groups, int64_t H, int64_t r, int64_t d, const ls_real *elements, ls_real *raw,
                                ls_real *items, int64_t item)
{
    const int64_t E = H * d;
    LS_EACH(i, groups * 2 * r * E)
    {
        const int64_t e = i % d, h = i / d % H, t = i / E % r, w = i / E / r % 2, g = i / E / r / 2;
        const ls_real *x = elements + (g * H * r + h * r + t) * (2 + 2 * d);
        raw[i] = x[1] > 0 ? x[2 + w * d + e] / x[1] : 0;
        if (items != NULL && i % (2 * r * E) == 0) items[g * item + item - 1] = x[1] > 0 ? 1 : 0;
    }
}

/* RAW, and from it items. */
static void make_vectors(ls_pass *p, int64_t groups, const ls_real *elements, ls_real *items)
{
    const int64_t r = vectors(p), E = p->H * p->d, all = groups * 2 * r * E, item = ls_longshort_item(p);
    if (all == 0) return;
    LS_LAUNCH(p->queue, make_raw, ls_blocks(all, LS_THREADS), LS_THREADS, 0, groups, p->H, r, p->d, elements,
              p->work[RAW], items, item);
    if (items == NULL) return;
    const longshort_rows raw = {longshort_side_by_side(p->work[RAW], 2 * r * E, E, p->d), groups, 2 * r, p->H, p->d};
    ls_longshort_cuda_norm(p, FAR_WEIGHT, raw, NULL, longshort_side_by_side(items, item, E, p->d));
}

static __global__ void return_raw(int64_t groups, int64_t H, int64_t r, int64_t d, const ls_real *elements,
                                  const ls_real *draw, ls_real *delements)
{
    const int64_t reals = 2 + 2 * d, E = H * d;
    LS_EACH(i, groups * H * r * reals)
    {
        const int64_t at = i % reals, c = i / reals % (H * r), g = i / reals / (H * r);
        const ls_real s = elements[i - at + 1];
        ls_real x = 0;
        if (at >= 2 && s > 0) x = draw[((g * 2 + (at - 2) / d) * r + c % r) * E + c / r * d + (at - 2) % d] / s;
        delements[i] = x;
    }
}

/* From the gradients of items, by way of RAW, to those of elements. */
static void return_vectors(ls_pass *p, int64_t groups, const ls_real *elements, const ls_real *ditems,
                           ls_real *delements)
{
    const int64_t r = vectors(p), E = p->H * p->d, all = groups * columns(p) * element_reals(p);
    const int64_t item = ls_longshort_item(p);
    if (all == 0) return;
    const longshort_rows raw = {longshort_side_by_side(p->work[RAW], 2 * r * E, E, p->d), groups, 2 * r, p->H, p->d};
    ls_longshort_cuda_norm_backward(p, FAR_WEIGHT, raw, NULL,
                                    longshort_side_by_side((ls_real *)(uintptr_t)ditems, item, E, p->d),
                                    longshort_side_by_side(p->work[DRAW], 2 * r * E, E, p->d), 0);
    LS_LAUNCH(p->queue, return_raw, ls_blocks(all, LS_THREADS), LS_THREADS, 0, groups, p->H, r, p->d, elements,
              p->work[DRAW], delements);
}

/* ------------------------------------------------------------------------------------------------ gradients */

/* A warp for each group and head: centre (groups,2,E), less the mean over t of raw; constant (groups,H r) = ds. */
static __global__ void centre_vectors(int64_t groups, int64_t H, int64_t r, int64_t d, const ls_real *raw,
                                      const ls_real *delements, ls_real *centre, ls_real *constant)
{
    const int lane = threadIdx.x % LS_WARP;
    const int64_t E = H * d, all = groups * H, stride = (int64_t)gridDim.x * (LS_THREADS / LS_WARP);
    for (int64_t i = ((int64_t)blockIdx.x * LS_THREADS + threadIdx.x) / LS_WARP; i < all; i += stride) {
        const int64_t g = i / H, h = i % H;
        for (int64_t e = lane; e < 2 * d; e += LS_WARP) {
            const int64_t w = e / d;
            double sum = 0;
            for (int64_t t = 0; t < r; t++) sum += (double)raw[((g * 2 + w) * r + t) * E + h * d + e % d];
            centre[(g * 2 + w) * E + h * d + e % d] = (ls_real)(-sum / (double)r);
        }
        for (int64_t t = 0; t < r; t++) {
            ls_real owed = 0;
            for (int64_t e = lane; e < 2 * d; e += LS_WARP) {
                const int64_t w = e / d, x = h * d + e % d;
                owed -= (raw[((g * 2 + w) * r + t) * E + x] + centre[(g * 2 + w) * E + x]) *
                        delements[((g * H + h) * r + t) * (2 + 2 * d) + 2 + e];
            }
            owed = ls_warp_sum(owed);
            if (lane == 0) constant[(g * H + h) * r + t] = owed;
        }
    }
}

/* dk, dv of the tokens of all ranges (with add: +=), dextra. */
static __global__ void token_gradients(ranges x, tokens s, int rows, const ls_real *elements, const ls_real *delements,
                                       const ls_real *centre, const ls_real *constant, ls_view dk, ls_view dv, int add,
                                       ls_view dextra)
{
    LS_SHARED(ls_real, memory);
    __shared__ ls_group keys, values, dkeys, dvalues;
    const ls_pair_memory m = ls_pair_memory_at(memory);
    ls_real *sum_k = memory + LS_PAIR_ALL, *sum_v = sum_k + rows * s.d;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const int64_t tiles = (x.length + rows - 1) / rows, rest = blockIdx.x / tiles, E = s.H * s.d;
    const int64_t h = rest % s.H, group = rest / s.H, b = group % s.B;
    const int64_t range = group / s.B, reals = 2 + 2 * s.d;
    const int64_t begin = x.first + range * x.length + blockIdx.x % tiles * rows;
    const int64_t end = ls_min(ls_min(begin + rows, x.first + (range + 1) * x.length), x.limit);
    const ls_real keep[LS_PAIR_EACH] = {1, 1, 1, 1};
    int there[LS_PAIR_EACH];
    for (int u = 0; u < LS_PAIR_EACH; u++) {
        const int i = warp + u * LS_PAIR_WARPS;
        there[u] = begin + i < end && !ls_is_padded(s.pad, b * s.n + begin + i);
        for (int64_t e = lane; e < s.d && i < rows; e += LS_WARP) sum_k[i * s.d + e] = sum_v[i * s.d + e] = 0;
        if (lane > 0) continue;
        keys.row[i] = there[u] ? ls_row(s.k, b, h, begin + i) : NULL;
        values.row[i] = there[u] ? ls_row(s.v, b, h, begin + i) : NULL;
        keys.more[i] = centre + group * 2 * E + h * s.d;
        values.more[i] = centre + (group * 2 + 1) * E + h * s.d;
    }
    for (int64_t c = 0; c < s.r; c += LS_PAIR_GUESTS) {
        const int64_t column = h * s.r + c + lane, at = (group * s.H * s.r + column) * reals;
        const int exists = c + lane < s.r;
        const ls_real top = exists ? elements[at] : 0, owed = exists ? constant[group * s.H * s.r + column] : 0;
        ls_real score[LS_PAIR_EACH] = {0};
        if (warp == 0) {
            dkeys.row[lane] = exists ? delements + at + 2 : NULL, dkeys.more[lane] = NULL;
            dvalues.row[lane] = exists ? delements + at + 2 + s.d : NULL, dvalues.more[lane] = NULL;
        }
        ls_pair_dots(&keys, &dkeys, s.d, m, score);
        ls_pair_dots(&values, &dvalues, s.d, m, score);
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int i = warp + u * LS_PAIR_WARPS;
            ls_real e = 0;
            if (exists && there[u]) e = ls_exp(ls_row(s.extra, b, 0, begin + i)[column] - top);
            m.weight[i * LS_PAIR_WIDE + lane] = e;
            if (exists && begin + i < end)
                ls_row(dextra, b, 0, begin + i)[column] = there[u] ? e * (owed + score[u]) : 0;
        }
        ls_pair_sums(m.weight, &dkeys, rows, s.d, m, keep, sum_k);
        ls_pair_sums(m.weight, &dvalues, rows, s.d, m, keep, sum_v);
    }
    for (int i = warp; i < rows && begin + i < end; i += LS_PAIR_WARPS) {
        ls_real *to_k = ls_row(dk, b, h, begin + i), *to_v = ls_row(dv, b, h, begin + i);
        for (int64_t e = lane; e < s.d; e += LS_WARP) {
            to_k[e] = (add ? to_k[e] : 0) + sum_k[i * s.d + e];
            to_v[e] = (add ? to_v[e] : 0) + sum_v[i * s.d + e];
        }
    }
}

/* `elements` have the tops that delements go with. RAW is there. */
static void gradients_of_tokens(ls_pass *p, ranges x, tokens s, const ls_real *elements, const ls_real *delements,
                                ls_view dk, ls_view dv, int add, ls_view dextra)
{
    const int rows = ls_pair_rows(s.d, sizeof(ls_real));
    const int64_t groups = x.count * s.B, blocks = groups * s.H * ((x.length + rows - 1) / rows);
    ls_real *centre = p->work[CENTRE], *constant = centre + groups * 2 * s.H * s.d;
    if (blocks == 0) return;
    LS_LAUNCH(p->queue, centre_vectors, ls_blocks(groups * s.H * LS_WARP, LS_THREADS), LS_THREADS, 0, groups, s.H, s.r,
              s.d, p->work[RAW], delements, centre, constant);
    const size_t bytes = ls_pair_bytes(2 * rows * s.d);
    LS_LAUNCH(p->queue, token_gradients, (int)blocks, LS_PAIR_THREADS, bytes, x, s, rows, elements, delements, centre,
              constant, dk, dv, add, dextra);
}

/* ------------------------------------------------------------------------------------------------ NS */

static void normalise_own(ls_pass *p)
{
    const tokens own = own_tokens(p);
    ls_longshort_cuda_norm(p, NEAR_WEIGHT, longshort_rows{p->own.k, p->B, p->S, p->H, p->d}, p->own.pad, own.k);
    ls_longshort_cuda_norm(p, NEAR_WEIGHT, longshort_rows{p->own.v, p->B, p->S, p->H, p->d}, p->own.pad, own.v);
}

ls_status ls_longshort_cuda_landmarks(ls_pass *p, int phase)
{
    (void)phase;
    const ranges x = slices_of(p);
    const int64_t groups = p->B * columns(p), reals = element_reals(p);
    normalise_own(p);
    make_sums(p, x, own_tokens(p));
    LS_LAUNCH(p->queue, combine, ls_blocks(groups * reals, LS_THREADS), LS_THREADS, 0, x.count, groups, reals,
              p->work[SUMS], p->summary[NS_ATTEND].sent);
    return ls_launched(p->queue, "longshort: landmarks");
}

void ls_longshort_cuda_load_landmarks(ls_pass *p, const ls_summary *s)
{
    make_vectors(p, p->B, s->got, p->work[ITEMS]);
}

void ls_longshort_cuda_return_landmarks(ls_pass *p, const ls_summary *s)
{
    return_vectors(p, p->B, s->got, p->work[DITEMS], s->dgot);
}

ls_status ls_longshort_cuda_landmarks_backward(ls_pass *p, int phase)
{
    (void)phase;
    const ls_summary *s = &p->summary[NS_ATTEND];
    const int64_t E = p->H * p->d, half = p->B * p->S * E;
    const ranges whole = {1, 0, p->S, p->S};
    const ls_view down_k = longshort_side_by_side(p->work[DOWN], p->S * E, E, p->d);
    const ls_view down_v = longshort_side_by_side(p->work[DOWN] + half, p->S * E, E, p->d);
    ls_longshort_cuda_begin_norms(p);
    normalise_own(p);
    make_vectors(p, p->B, s->got, NULL);
    gradients_of_tokens(p, whole, own_tokens(p), s->sent, s->dsent, down_k, down_v, 0, p->own.dextra);
    ls_longshort_cuda_norm_backward(p, NEAR_WEIGHT, longshort_rows{p->own.k, p->B, p->S, p->H, p->d}, p->own.pad,
                                    down_k, p->own.dk, 1);
    ls_longshort_cuda_norm_backward(p, NEAR_WEIGHT, longshort_rows{p->own.v, p->B, p->S, p->H, p->d}, p->own.pad,
                                    down_v, p->own.dv, 1);
    ls_longshort_cuda_end_norms(p);
    return ls_launched(p->queue, "longshort: gradients of landmarks");
}

/* ------------------------------------------------------------------------------------------------ CS */

ls_status ls_longshort_cuda_summaries(ls_pass *p, int phase)
{
    const ranges x = chunks_of(p);
    make_sums(p, x, halo_tokens(p));
    make_vectors(p, x.count * p->B, p->work[SUMS], p->gathered[phase + 1].mine);
    return ls_launched(p->queue, "longshort: summaries");
}

static __global__ void clear_extra(int64_t B, int64_t n, int64_t width, ls_view x)
{
    LS_EACH(i, B * n * width)
    ls_row(x, i / width / n, 0, i / width % n)[i % width] = 0;
}

/* Adds to the halo's dk, dv, which the window wrote, and writes dextra. */
ls_status ls_longshort_cuda_summaries_backward(ls_pass *p, int phase)
{
    const ranges x = chunks_of(p);
    const tokens s = halo_tokens(p);
    const int64_t groups = x.count * p->B, all = p->B * p->halo.n * p->extra_width;
    LS_LAUNCH(p->queue, clear_extra, ls_blocks(all, LS_THREADS), LS_THREADS, 0, p->B, p->halo.n, p->extra_width,
              p->halo.dextra);
    ls_longshort_cuda_begin_norms(p);
    make_sums(p, x, s);
    make_vectors(p, groups, p->work[SUMS], NULL);
    return_vectors(p, groups, p->work[SUMS], p->gathered[phase + 1].dmine, p->work[DSUMS]);
    gradients_of_tokens(p, x, s, p->work[SUMS], p->work[DSUMS], p->halo.dk, p->halo.dv, 1, p->halo.dextra);
    ls_longshort_cuda_end_norms(p);
    return ls_launched(p->queue, "longshort: gradients of summaries");
}

/* ------------------------------------------------------------------------------------------------ a step */

static __global__ void clear(int64_t n, ls_real *x)
{
    LS_EACH(i, n)
    x[i] = 0;
}

void ls_longshort_cuda_positions(ls_pass *p, int64_t n, ls_real *positions)
{
    const int64_t E = p->H * p->d;
    LS_LAUNCH(p->queue, clear, ls_blocks(n * E, LS_THREADS), LS_THREADS, 0, n * E, positions);
    ls_dense_cuda.add_positions(p->queue, 1, n, E, 0, positions);
}

/* u (B,H,E) = W_rcᵀ q: what R_chunk(δ) adds to the logit at each distance is q·(W_rc pe(δ) + b_rc) = u·pe(δ) + q·b_rc,
 * so a single query need not make R_chunk. */
static __global__ void look_along(int64_t B, int64_t H, int64_t d, ls_real scale, ls_view q, const uint8_t *pad,
                                  const ls_real *weight, ls_real *u)
{
    const int64_t E = H * d;
    LS_EACH(i, B * H * E)
    {
        const int64_t e = i % E, h = i / E % H, b = i / E / H;
        ls_real sum = 0;
        for (int64_t x = 0; x < d && !ls_is_padded(pad, b); x++)
            sum += scale * ls_row(q, b, h, 0)[x] * weight[(h * d + x) * E + e];
        u[i] = sum;
    }
}

/* What this rank has of the list: item i is of chunk first + i every. */
namespace
{
typedef struct list {
    const ls_real *item;
    int64_t items, reals, first, every, seen;
} list;
} // namespace

/* A block has a slice of the list for one (b,h), a warp one vector at a time. partial (slices,B,H,2+d). */
static __global__ void look(list x, int64_t B, int64_t H, int64_t r, int64_t d, ls_real scale, ls_view q,
                            const uint8_t *pad, const ls_real *bias, const ls_real *terms, ls_real *partial)
{
    LS_SHARED(ls_real, sum); /* a warp's (d) */
    __shared__ ls_real tops[LS_PAIR_WARPS], totals[LS_PAIR_WARPS];
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const int64_t b = blockIdx.x / H, h = blockIdx.x % H, E = H * d;
    const int padded = ls_is_padded(pad, b);
    const ls_real *query = ls_row(q, b, h, 0);
    ls_real top = -INFINITY, constant = 0;
    double total = 0;
    for (int64_t e = lane; e < d; e += LS_WARP) {
        sum[warp * d + e] = 0;
        constant += padded ? 0 : scale * query[e] * bias[h * d + e];
    }
    constant = ls_warp_sum(constant);
    const int64_t stride = (int64_t)gridDim.y * LS_PAIR_WARPS;
    for (int64_t n = (int64_t)blockIdx.y * LS_PAIR_WARPS + warp; n < x.items * r; n += stride) {
        const int64_t i = n / r, t = n % r, vector = (x.first + i * x.every) * r + t;
        const ls_real *from = x.item + (i * B + b) * x.reals, *key = from + t * E + h * d, *value = key + r * E;
        if (vector >= x.seen || from[x.reals - 1] == 0) continue;
        ls_real dot = 0;
        for (int64_t e = lane; e < d; e += LS_WARP) dot += padded ? 0 : scale * query[e] * key[e];
        const ls_real logit = ls_warp_sum(dot) + constant + terms[(b * H + h) * x.seen + x.seen - 1 - vector];
        const ls_real next = logit > top ? logit : top, shrink = ls_exp(top - next), weight = ls_exp(logit - next);
        total = total * (double)shrink + (double)weight;
        top = next;
        for (int64_t e = lane; e < d; e += LS_WARP) sum[warp * d + e] = sum[warp * d + e] * shrink + weight * value[e];
    }
    if (lane == 0) tops[warp] = top, totals[warp] = (ls_real)total;
    __syncthreads();
    ls_real all = -INFINITY;
    for (int i = 0; i < LS_PAIR_WARPS; i++) all = tops[i] > all ? tops[i] : all;
    const ls_real base = all == -INFINITY ? 0 : all;
    ls_real *to = partial + ((int64_t)blockIdx.y * B * H + blockIdx.x) * (2 + d);
    for (int64_t e = (int64_t)threadIdx.x - 1; e < d; e += LS_PAIR_THREADS) { /* -1: s */
        ls_real x_e = 0;
        for (int i = 0; i < LS_PAIR_WARPS; i++) x_e += ls_exp(tops[i] - base) * (e < 0 ? totals[i] : sum[i * d + e]);
        to[2 + e] = x_e;
    }
    if (threadIdx.x == 0) to[0] = all;
}

ls_status ls_longshort_cuda_look_far(ls_pass *p, int phase)
{
    const ls_collection *g = &p->gathered[phase];
    const int64_t B = p->B, H = p->H, d = p->d, E = H * d, r = vectors(p), seen = ls_longshort_seen(p);
    const int64_t item = ls_longshort_item(p), items = g->total / item / B;
    const int64_t slices = ls_max(1, ls_min(SUM_SLICES, (items * r + 63) / 64));
    const ls_real scale = (ls_real)p->scale;
    ls_real *u = p->work[ITEMS], *terms = u + B * H * E, *positions = p->work[TABLES];
    const list x = {g->all, items, item, g->first, g->every, seen};
    ls_longshort_cuda_positions(p, seen, positions);
    LS_LAUNCH(p->queue, look_along, ls_blocks(B * H * E, LS_THREADS), LS_THREADS, 0, B, H, d, scale, p->q, p->pad_q,
              parameter(p, R_CHUNK), u);
    ls_gemm_batch_in(p->queue, LS_FLOAT32, 0, 1, B * H, seen, E, 1, u, E, 0, positions, E, 0, 0, terms, seen, 0, 1);
    const dim3 blocks((unsigned)(B * H), (unsigned)slices);
    LS_LAUNCH(p->queue, look, blocks, LS_PAIR_THREADS, (size_t)(LS_PAIR_WARPS * d) * sizeof(ls_real), x, B, H, r, d,
              scale, p->q, p->pad_q, parameter(p, R_CHUNK_BIAS), terms, p->work[SUMS]);
    LS_LAUNCH(p->queue, combine, ls_blocks(B * H * (2 + d), LS_THREADS), LS_THREADS, 0, slices, B * H, 2 + d,
              p->work[SUMS], p->summary[phase + 1].sent);
    return ls_launched(p->queue, "longshort: far");
}
