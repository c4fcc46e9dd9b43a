/* Gradients of S4D. The theory and the letters are s4d.c's. */
#include "s4d_desk.h"

static double complex get(const double *x, int64_t lane)
{
    return CMPLX(x[lane], x[LS_LANES + lane]);
}

static void add_doubles(ls_lanes x, double *sum)
{
    for (int64_t i = 0; i < LS_LANES; i++) sum[i] += (double)x[i];
}

/* sum (N) += Σ_chunks x · y; x with its im times sign. */
static void correlate(const desk *k, int64_t chunks, const ls_lanes *x, ls_real sign, const ls_lanes *y, double *sum)
{
    for (int64_t m = 0; m < k->N; m += 2) {
        ls_lanes re = {0}, im = {0};
        for (int64_t i = m; i < chunks * k->N; i += k->N) {
            const ls_lanes t = x[i + 1] * sign;
            re += x[i] * y[i] - t * y[i + 1];
            im += x[i] * y[i + 1] + t * y[i];
        }
        add_doubles(re, sum + m * LS_LANES);
        add_doubles(im, sum + (m + 1) * LS_LANES);
    }
}

/* V of a channel: what the outputs of the chunks want from the states that enter. */
static void look_back(const desk *k, int64_t i, const piece *x, int direction, int64_t channel, ls_lanes *table,
                      ls_lanes *seen)
{
    ls_lanes_product(x->chunks, k->N, x->length, matrix(k->y + (channel * k->places + i) * STRIDE, x->length),
                     on_entering(k, table, direction, x->length), 0, matrix(seen, k->N));
}

static void look_back_all(const desk *k, int64_t i, const piece *x, int direction)
{
    for (int64_t c = 0; c < k->channels; c++)
        look_back(k, i, x, direction, c, k->group[i].power, k->seen + c * PIECE * k->N);
}

/* γ of a direction passes a piece against it and grows by V, in k->seen; k->leaving = γ' of the states that leave its
 * chunks, in gradient form. */
static void leave(const desk *k, int64_t i, const piece *x, int direction)
{
    const group *g = &k->group[i];
    for (int64_t c = 0; c < k->channels; c++)
        weigh(k, x->chunks, g->weight + (direction * k->channels + c) * k->N, k->seen + c * PIECE * k->N, 1, c > 0,
              k->local);
    chain(k, g, x, direction == FROM_LEFT, state_of(k, g, LEAVING, direction), k->local, -1, k->leaving[direction]);
}

/* du of what states that leave a piece's chunks are wanted for. */
static void leaving_inputs(const desk *k, int64_t i, const piece *x, int direction)
{
    ls_lanes_product(x->chunks, x->length, k->N, matrix(k->leaving[direction], k->N),
                     ls_transposed(on_leaving(k, k->group[i].power, direction, x->length)), 1,
                     matrix(k->du + i * STRIDE, x->length));
}

/* S goes over a piece, from its last chunk to its first, k->mixed = what the chunks add to it where they are left. From
 * the right that is the way of the state, S := a^n S + mixed; from the left S += a^(positions after the chunk) mixed.
 */
static void add_slopes(const desk *k, const group *g, const piece *x, int direction)
{
    const double *decay = decay_of(k, g, x);
    double *sum = g->slopes[direction], *faded = direction == FROM_LEFT ? g->fade : sum;
    for (int64_t c = x->chunks - 1; c >= 0; c--) {
        const ls_real *in = (const ls_real *)(const void *)(k->mixed + c * k->N);
        for (int64_t m = 0; m < k->N * LS_LANES; m += 2 * LS_LANES) {
#pragma omp simd
            for (int64_t re = m; re < m + LS_LANES; re++) {
                const int64_t im = re + LS_LANES;
                const double s = seen_or_zero(faded[re]), t = seen_or_zero(faded[im]);
                const double x_re = (double)in[re], x_im = (double)in[im];
                faded[re] = decay[re] * s - decay[im] * t;
                faded[im] = decay[re] * t + decay[im] * s;
                sum[re] += direction == FROM_LEFT ? s * x_re - t * x_im : x_re;
                sum[im] += direction == FROM_LEFT ? s * x_im + t * x_re : x_im;
            }
        }
    }
}

/* What meets where states leave: du, and γ_λ of the steps up to there. */
static void leaving_gradients(const desk *k, int64_t i, const piece *x, int direction)
{
    const group *g = &k->group[i];
    const int64_t n = x->length;
    leaving_inputs(k, i, x, direction);
    ls_lanes_product(x->chunks, k->N, n, matrix(k->u + i * STRIDE, n), on_leaving(k, g->slope, direction, n), 0,
                     matrix(k->mixed, k->N));
    weigh(k, x->chunks, g->slope + n * k->N, k->entering[direction], 1, 1, k->mixed);
    correlate(k, x->chunks, k->leaving[direction], -1, k->mixed, g->dlambda);
    if (k->several) add_slopes(k, g, x, direction);
}

/* What meets where outputs look at entering states: γ_W, and γ_λ of the steps from there. */
static void entering_gradients(const desk *k, int64_t i, const piece *x, int direction)
{
    const group *g = &k->group[i];
    for (int64_t c = 0; c < k->channels; c++) {
        const int64_t row = (direction * k->channels + c) * k->N;
        correlate(k, x->chunks, k->entering[direction], 1, k->seen + c * PIECE * k->N, g->dweight + row * LS_LANES);
        look_back(k, i, x, direction, c, g->slope, k->local);
        weigh(k, x->chunks, g->weight + row, k->local, 1, c > 0, k->mixed);
    }
    correlate(k, x->chunks, k->entering[direction], 1, k->mixed, g->dlambda);
}

/* The taps: du = dy Tᵀ, and dK from uᵀ dy summed along its diagonals. */
static void tap_gradients(const desk *k, int64_t i, const piece *x)
{
    const group *g = &k->group[i];
    const int64_t n = x->length;
    const ls_entries u = matrix(k->u + i * STRIDE, n), du = matrix(k->du + i * STRIDE, n);
    for (int64_t c = 0; c < k->channels; c++) {
        const ls_entries dy = matrix(k->y + (c * k->places + i) * STRIDE, n);
        ls_lanes_product(x->chunks, n, n, dy, ls_transposed(toeplitz(k, g, c)), c > 0, du);
        ls_lanes_product(n, n, x->chunks, ls_transposed(u), dy, 0, matrix(k->products, n));
        for (int64_t distance = 1 - n; distance < n; distance++) {
            ls_lanes sum = {0};
            for (int64_t j = ls_max(0, -distance); j < n - ls_max(0, distance); j++)
                sum += k->products[j * n + j + distance];
            add_doubles(sum, g->dtap + (c * (2 * k->n - 1) + k->n - 1 + distance) * LS_LANES);
        }
    }
}

static void load_dout(const ls_pass *p, const desk *k, int64_t b, const piece *x)
{
    for (int64_t c = 0; c < k->channels; c++)
        load(p, k, features(p->dout, c * p->d + k->group[0].first), b, x, k->y + c * k->places * STRIDE);
}

/* γ has passed all pieces: it is the gradient of what came from other ranks. */
static void write_gradients(const ls_pass *p, const desk *k, int64_t b, int direction)
{
    for (int64_t i = 0; i < k->groups; i++)
        write_state(p, k, &k->group[i], b, state_of(k, &k->group[i], LEAVING, direction), -1,
                    p->summary[scan_of(p, direction)].dgot);
}

/* S of a batch row and direction, (N, LANES), for ends backward. */
static double *slopes_of(const ls_pass *p, const desk *k, const group *g, int64_t b, int direction)
{
    const int64_t lanes = (p->d + LS_LANES - 1) / LS_LANES * LS_LANES;
    return (double *)(void *)p->work[SLOPES] + ((direction * p->B + b) * lanes + g->first) * k->N;
}

/* Before a batch row: nothing after its last chunk. */
static void open_slopes(const ls_pass *p, const desk *k, group *g, int64_t b)
{
    for (int d = 0; d < k->directions; d++) {
        g->slopes[d] = slopes_of(p, k, g, b, d);
        zero_doubles(g->slopes[d], k->N);
    }
    for (int64_t i = 0; i < k->N * LS_LANES; i++) g->fade[i] = i / LS_LANES % 2 == 0;
}

/* One piece of pass 2, all its states known at the borders. */
static void piece_backward(const desk *k, int64_t i, const piece *x)
{
    tap_gradients(k, i, x);
    for (int d = 0; d < k->directions; d++) {
        look_back_all(k, i, x, d);
        enter(k, i, x, d);
        leave(k, i, x, d);
        entering_gradients(k, i, x, d);
        leaving_gradients(k, i, x, d);
    }
}

/* Pass 1, from left to right: at the pieces the states s, and in NS γ' of the states r, which go to the right.
 * Pass 2, from right to left: γ' of the states s, in NS the states r; what pass 1 kept comes back piece by piece. */
static void apply_block_backward(const ls_pass *p, const desk *k, int64_t b)
{
    const int64_t pieces = count_pieces(p), first = k->group[0].first;
    const int both = k->directions == 2;
    for (int d = 0; d < k->directions; d++)
        for (int64_t i = 0; i < k->groups; i++) {
            read_state(p, k, &k->group[i], b, p->summary[scan_of(p, d)].got, 1, state_of(k, &k->group[i], ENTERING, d));
            zero_doubles(state_of(k, &k->group[i], LEAVING, d), k->N);
        }
    for (int64_t i = 0; k->several && i < k->groups; i++) open_slopes(p, k, &k->group[i], b);
    for (int64_t j = 0; j < pieces; j++) {
        const piece x = piece_at(p, j);
        load(p, k, features(p->q, first), b, &x, k->u);
        if (both) load_dout(p, k, b, &x);
        for (int64_t i = 0; i < k->groups; i++) {
            keep(k, &k->group[i], 0, j, state_of(k, &k->group[i], ENTERING, FROM_LEFT));
            enter(k, i, &x, FROM_LEFT);
            if (!both) continue;
            keep(k, &k->group[i], 1, j, state_of(k, &k->group[i], LEAVING, FROM_RIGHT));
            look_back_all(k, i, &x, FROM_RIGHT);
            leave(k, i, &x, FROM_RIGHT);
        }
    }
    if (both) write_gradients(p, k, b, FROM_RIGHT);
    for (int64_t j = pieces - 1; j >= 0; j--) {
        const piece x = piece_at(p, j);
        load(p, k, features(p->q, first), b, &x, k->u);
        load_dout(p, k, b, &x);
        for (int64_t i = 0; i < k->groups; i++) {
            recall(k, &k->group[i], 0, j, state_of(k, &k->group[i], ENTERING, FROM_LEFT));
            if (both) recall(k, &k->group[i], 1, j, state_of(k, &k->group[i], LEAVING, FROM_RIGHT));
            piece_backward(k, i, &x);
        }
        store(p, k, k->du, b, &x, features(p->dq, first));
    }
    write_gradients(p, k, b, FROM_LEFT);
}

/* The sums of one feature become gradients of C and D, and of λ and w as far as they are known. */
static void settle(const ls_pass *p, const desk *k, const group *g, int64_t lane)
{
    const int64_t h = g->first + lane, taps = 2 * k->n - 1, middle = k->n - 1;
    for (int64_t c = 0; c < k->channels; c++)
        dparam(p, D_)[c * p->d + h] += (ls_real)g->dtap[(c * taps + middle) * LS_LANES + lane];
    for (int64_t m = 0; m < k->N; m += 2) {
        const double complex a = saved_of(p, POWER, h, m / 2), w = frequency(p, h, m / 2),
                             beta = saved_of(p, BETA, h, m / 2);
        double complex dlambda = get(g->dlambda + m * LS_LANES, lane), dbeta = 0;
        for (int d = 0; d < k->directions; d++)
            for (int64_t c = 0; c < k->channels; c++) {
                const double *dtap = g->dtap + c * taps * LS_LANES + lane;
                const double complex coefficient = c_of(p, d, c, h, m / 2);
                double complex dweight = get(g->dweight + ((d * k->channels + c) * k->N + m) * LS_LANES, lane);
                double complex power = 1, slopes = 0;
                for (int64_t l = 0; l < k->n - d; l++, power *= a) {
                    const double complex x = dtap[(d ? middle - 1 - l : middle + l) * LS_LANES] * power;
                    dweight += x;
                    slopes += (double)l * x;
                }
                dlambda += 2 * beta * coefficient * slopes;
                dbeta += 2 * coefficient * dweight;
                ls_real *dc = dparam(p, C_) + in_c(p, d, c, h, m / 2);
                dc[0] += (ls_real)creal(2 * beta * dweight);
                dc[1] -= (ls_real)cimag(2 * beta * dweight);
            }
        complex_of(p->work[DLAMBDA])[h * k->N / 2 + m / 2] = dlambda + dbeta * a / w;
        complex_of(p->work[DW])[in_set(p, h, m / 2)] -= dbeta * beta / w;
    }
}

ls_status ls_s4d_apply_backward(ls_pass *p, int phase)
{
    (void)phase;
    desk *k = desk_of(p);
    for (int64_t i = 0; i < (int64_t)p->option[SETS] * k->N / 2; i++) complex_of(p->work[DW])[i] = 0;
    for (int64_t first = 0; first < p->d; first += BLOCK) {
        open_block(p, k, first, 1);
        for (int64_t b = 0; b < p->B; b++) apply_block_backward(p, k, b);
        for (const group *g = k->group; g < k->group + k->groups; g++)
            for (int64_t lane = 0; lane < g->width; lane++) settle(p, k, g, lane);
    }
    return LS_OK;
}

/* γ' fades away from the end where the state leaves; du gets its part. 0: nothing is left of it. */
static int fade(const desk *k, const piece *x, int direction)
{
    int left = 0;
    zero_lanes(k->local, x->chunks * k->N);
    for (int64_t i = 0; i < k->groups; i++) {
        const group *g = &k->group[i];
        double *state = state_of(k, g, LEAVING, direction);
        chain(k, g, x, direction == FROM_LEFT, state, k->local, -1, k->leaving[direction]);
        leaving_inputs(k, i, x, direction);
        for (int64_t m = 0; m < k->N * LS_LANES; m++) left |= seen_or_zero(state[m]) != 0;
    }
    return left;
}

static void ends_block_backward(const ls_pass *p, const desk *k, int64_t b, int direction)
{
    const int64_t pieces = count_pieces(p), first = k->group[0].first;
    for (int64_t i = 0; i < k->groups; i++) {
        const group *g = &k->group[i];
        double *state = state_of(k, g, LEAVING, direction);
        read_state(p, k, g, b, p->summary[scan_of(p, direction)].dsent, -1, state);
        const double *slopes = slopes_of(p, k, g, b, direction);
        for (int64_t lane = 0; lane < g->width; lane++)
            for (int64_t m = 0; m < k->N; m += 2)
                complex_of(p->work[DLAMBDA])[((g->first + lane) * k->N + m) / 2] +=
                    get(state + m * LS_LANES, lane) * get(slopes + m * LS_LANES, lane);
    }
    for (int64_t j = 0, left = 1; left && j < pieces; j++) {
        const piece x = piece_at(p, direction == FROM_LEFT ? pieces - 1 - j : j);
        load(p, k, features(p->dq, first), b, &x, k->du);
        left = fade(k, &x, direction);
        store(p, k, k->du, b, &x, features(p->dq, first));
    }
}

ls_status ls_s4d_ends_backward(ls_pass *p, int phase)
{
    desk *k = desk_of(p);
    if (!k->several) return LS_OK; /* all others have no rows */
    for (int64_t first = 0; first < p->d; first += BLOCK) {
        open_block(p, k, first, 0);
        for (int64_t b = 0; b < p->B; b++) ends_block_backward(p, k, b, phase == ENDS_RIGHT ? FROM_RIGHT : FROM_LEFT);
    }
    return LS_OK;
}
