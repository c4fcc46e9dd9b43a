/* Long-short attention (Zhu et al., 2021): every query sees its surroundings as they are, and all the rest in a few
 * vectors made of it; one softmax over both. LayerNorms (LN) are over all E features, the heads together.
 *
 *   NS: K = LN_l(k), V = LN_l(v);  p_t = softmax over all tokens of column t of W_p x, t = 1 .. r, for each head
 *       landmarks K̃_t = LN_s(Σ_j p_tj K_j), Ṽ_t likewise;  query i of block g = floor(i/w) sees them and the keys
 *       [g w - e, (g+1) w + e), e = max(floor(w/2), 1);  logits q·K̃ and q·K
 *   CS: chunk p of c tokens gives r vectors K_p = LN_d(Σ_j softmax_j(W_d x) k_j), V_p likewise;  query i sees the keys
 *       (i - w, i] after LN_w, and the vectors of the chunks p < floor(i/c);  logits
 *       (q + r_w)·k_j + (q + r_r)·R_win(i - j)  near,  q·(K_n + R_chunk(δ))  far, δ = how many newer vectors it sees
 *
 * with q = scale W_q x, R_win(δ) = W_rw pe(δ), R_chunk(δ) = W_rc pe(δ) + b_rc. The scores W_p x, W_d x are the layer's
 * fourth projection (own.extra). Padded tokens are in no sum and no window.
 *
 * What crosses. NS: landmark sums → fetch of the keys around → reduce of the sums → attend. CS: fetch of the keys to
 * the left, as far as the window or the first chunk that ends here reaches (a chunk is of the rank that has its last
 * token) → summaries → gather of them → attend. A step does the same with one token, but the list of summaries is
 * shared by the ranks: each looks at its part, and a reduce brings together what they saw.
 *
 * longshort_far.c makes landmarks and summaries, longshort_attend.c is the softmax over near and far. */
#include "longshort.h"

extern const ls_cuda_mechanism ls_longshort_cuda;

static const ls_option_info options[] = {
    {"num_landmarks", "r", 0, 0, 4096, 1,
     "vectors per head that stand for what is far: NS for the sequence, CS for each chunk; 0: 16 in NS, 1 in CS"},
    {"window", "w", 15, 1, 65536, 1,
     "NS: queries per block, which sees half as many keys on both sides; CS: keys seen"},
    {"chunk", "c", 32, 1, 1048576, 1, "CS: tokens of a chunk"},
    {.name = NULL},
};

static void layer(const ls_attention_options *o, ls_layer_form *form)
{
    const int causal = o->pattern == LS_CS;
    form->inputs = 4;
    form->input[3].weight = causal ? "d_proj.weight" : "p_proj.weight";
    form->input[3].width = o->num_heads * vectors_of(o->pattern, o->value);
    for (int i = 0; causal && i < 3; i++) form->input[i].bias = NULL;
    if (causal) form->out_bias = NULL;
}

static int params(const ls_attention_options *o, ls_param_info *list)
{
    const int64_t E = o->embed_dim, H = o->num_heads;
    const int causal = o->pattern == LS_CS;
    const double glorot = sqrt(3.0 / (double)E);
    list[NEAR_WEIGHT] = (ls_param_info){causal ? "ln_w.weight" : "ln_l.weight", 1, {E}, 0, 0, LS_INIT_ONE, 0};
    list[NEAR_BIAS] = (ls_param_info){causal ? "ln_w.bias" : "ln_l.bias", 1, {E}, 0, 0, LS_INIT_ZERO, 0};
    list[FAR_WEIGHT] = (ls_param_info){causal ? "ln_d.weight" : "ln_s.weight", 1, {E}, 0, 0, LS_INIT_ONE, 0};
    list[FAR_BIAS] = (ls_param_info){causal ? "ln_d.bias" : "ln_s.bias", 1, {E}, 0, 0, LS_INIT_ZERO, 0};
    if (!causal) return R_WIN;
    list[R_WIN] = (ls_param_info){"r_win.weight", 2, {E, E}, 0, 0, LS_INIT_UNIFORM, glorot};
    list[R_CHUNK] = (ls_param_info){"r_chunk.weight", 2, {E, E}, 0, 0, LS_INIT_UNIFORM, glorot};
    list[R_CHUNK_BIAS] = (ls_param_info){"r_chunk.bias", 1, {E}, 0, 0, LS_INIT_ZERO, 0};
    list[R_W] = (ls_param_info){"r_w", 2, {H, E / H}, 0, 0, LS_INIT_ZERO, 0};
    list[R_R] = (ls_param_info){"r_r", 2, {H, E / H}, 0, 0, LS_INIT_ZERO, 0};
    return R_R + 1;
}

/* ------------------------------------------------------------------------------------------------ what is seen */

static ls_span reach_around(const ls_pass *p, int64_t lo, int64_t n)
{
    const ls_span first = ls_longshort_sight(p, lo), last = ls_longshort_sight(p, lo + n - 1);
    return (ls_span){0, first.lo, last.lo + last.n - first.lo};
}

/* To the left as far as the window, or the first chunk whose last token is here. */
static ls_span reach_left(const ls_pass *p, int64_t lo, int64_t n)
{
    const int64_t c = chunk_length(p), chunk = lo / c, ends_here = (lo + n) / c > chunk;
    const int64_t window = ls_longshort_sight(p, lo).lo, from = ends_here ? ls_min(window, chunk * c) : window;
    return (ls_span){0, from, lo + n - from};
}

/* ------------------------------------------------------------------------------------------------ memory */

static double *take_doubles(ls_arena *a, int64_t n)
{
    return ls_arena_take(a, (size_t)n * sizeof(double));
}

int64_t ls_longshort_halo_rows(const ls_pass *p)
{
    if (p->T == 0) return 0;
    const int64_t lo = p->query_span[0].lo;
    const ls_span s = p->pattern == LS_CS ? reach_left(p, lo, p->T) : reach_around(p, lo, p->T);
    return ls_min(s.lo + s.n, p->all_keys) - ls_max(s.lo, 0);
}

static void plan_far(const ls_pass *p, longshort_memory *m, ls_arena *a, int64_t seen)
{
    const int64_t back = p->backward, H = p->H, d = p->d, E = H * d, NE = m->N * E;
    const int causal = p->pattern == LS_CS, tables = causal && !p->step;
    for (int i = 0; i < 2; i++) m->far[i] = ls_take(a, NE);
    for (int i = 0; i < 2; i++) m->dfar[i] = ls_take(a, back * NE);
    m->far_mask = ls_take(a, p->step ? H : m->N);
    m->merged = ls_take(a, tables ? m->N * d : 0);
    m->dmerged = ls_take(a, tables ? back * m->N * d : 0);
    m->far_table = ls_take(a, tables ? NE : 0);
    m->dfar_table = ls_take(a, tables ? back * NE : 0);
    m->near_table = ls_take(a, causal ? m->D * E : 0);
    m->dnear_table = ls_take(a, causal ? back * m->D * E : 0);
    m->positions = ls_take(a, causal ? ls_max(seen, m->D) * E : 0);
    m->dr = take_doubles(a, causal ? back * 2 * E : 0);
    m->dnorm = take_doubles(a, back * 4 * E);
    m->u = ls_take(a, p->step ? H * E : 0);
    m->distance_term = ls_take(a, p->step ? H * seen : 0);
}

static void plan_tile(const ls_pass *p, longshort_memory *m, ls_arena *a, int64_t n)
{
    const int64_t w = (int64_t)p->option[WINDOW], rows = ls_min(TILE, p->T), back = p->backward ? rows : 0;
    const int64_t most = p->pattern == LS_CS ? rows + w - 1 : ls_max(TILE, w) + 2 * ls_max(w / 2, 1);
    const int64_t keys = ls_min(n, most), D = p->pattern == LS_CS ? m->D : 0;
    m->width = (m->N + keys + 15) / 16 * 16;
    m->q = ls_take(a, rows * p->d);
    m->q_w = ls_take(a, rows * p->d);
    m->q_r = ls_take(a, rows * p->d);
    m->dout = ls_take(a, back * p->d);
    m->dq = ls_take(a, back * p->d);
    m->dq_r = ls_take(a, back * p->d);
    m->scores = ls_take(a, rows * m->width);
    m->dscores = ls_take(a, back * m->width);
    m->relative = ls_take(a, rows * D);
    m->drelative = ls_take(a, back * D);
    m->near_mask = ls_take(a, keys);
}

static void plan_vectors(const ls_pass *p, longshort_memory *m, ls_arena *a, int64_t n)
{
    const int causal = p->pattern == LS_CS;
    const int64_t E = p->H * p->d, r = vectors(p), C = columns(p), rows = causal ? ls_min(chunk_length(p), n) : BLOCK;
    const int64_t some = causal ? 0 : C;
    for (int i = 0; i < 2; i++) {
        m->raw[i] = ls_take(a, r * E);
        m->centre[i] = ls_take(a, E);
        m->weighted[i] = take_doubles(a, some * p->d);
    }
    m->vectors = ls_take(a, r * E);
    for (int i = 0; i < 6; i++) m->block[i] = ls_take(a, BLOCK * E);
    m->logits = ls_take(a, C * rows);
    m->dlogits = ls_take(a, p->backward ? C * rows : 0);
    m->top = ls_take(a, some);
    m->next_top = ls_take(a, some);
    m->constant = ls_take(a, some);
    m->product = ls_take(a, some * p->d);
    m->sum = take_doubles(a, some);
    m->shrink = take_doubles(a, some);
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    (void)saved;
    longshort_memory memory = {0}, *m = &memory;
    const int64_t n = ls_longshort_halo_rows(p), seen = ls_longshort_seen(p);
    m->N = p->step ? 1 : p->pattern == LS_CS ? seen : vectors(p);
    m->D = ls_longshort_distances(p);
    void *place = ls_arena_take(work, sizeof memory);
    for (int i = 0; i < 2; i++) m->near[i] = ls_take(work, p->B * n * p->H * p->d);
    plan_far(p, m, work, seen);
    plan_tile(p, m, work, n);
    plan_vectors(p, m, work, n);
    if (place != NULL) memcpy(place, &memory, sizeof memory);
    p->work[0] = place;
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_phase noncausal[] = {
    {.name = "landmarks",
     .forward = ls_longshort_landmarks,
     .backward = ls_longshort_landmarks_backward,
     .keys_alone = 1},
    {.name = "window", .crossing = LS_FETCH, .reach = reach_around, .fetches = LS_KEYS | LS_VALUES},
    {.name = "attend",
     .crossing = LS_REDUCE,
     .monoid = ls_longshort_landmark_sums,
     .forward = ls_longshort_attend,
     .backward = ls_longshort_attend_backward},
    {.name = NULL},
};
static const ls_phase causal[] = {
    {.name = "summaries",
     .crossing = LS_FETCH,
     .reach = reach_left,
     .fetches = LS_KEYS | LS_VALUES | LS_EXTRA,
     .forward = ls_longshort_summaries,
     .backward = ls_longshort_summaries_backward,
     .keys_alone = 1},
    {.name = "attend",
     .crossing = LS_GATHER,
     .piece = ls_longshort_piece,
     .forward = ls_longshort_attend,
     .backward = ls_longshort_attend_backward},
    {.name = NULL},
};
static const ls_phase step[] = {
    {.name = "summaries",
     .crossing = LS_FETCH,
     .reach = reach_left,
     .fetches = LS_KEYS | LS_VALUES | LS_EXTRA,
     .forward = ls_longshort_summaries},
    {.name = "far",
     .crossing = LS_GATHER,
     .piece = ls_longshort_piece,
     .item = ls_longshort_item,
     .forward = ls_longshort_look_far},
    {.name = "attend", .crossing = LS_REDUCE, .monoid = ls_longshort_statistics, .forward = ls_longshort_attend},
    {.name = NULL},
};

static const char *idle(const ls_attention_options *o, const char *option)
{
    return o->pattern != LS_CS && strcmp(option, options[CHUNK].name) == 0 ? "it is for causal self attention" : NULL;
}

const ls_mechanism ls_longshort_mechanism = {
    .name = "longshort",
    .option = options,
    .params = params,
    .idle = idle,
    .layer = layer,
    .plan = plan,
    .phases = {[LS_NS] = noncausal, [LS_CS] = causal},
    .step = {[LS_CS] = step},
    .cuda = LS_IF_CUDA(&ls_longshort_cuda),
    .layer_only = 1,
};
