/* The emulator itself: what threads of a block say to each other, and the products, against plain loops; that it
 * refuses what is wrong, and that what must crash does. The device of a queue (core/device_cuda.cu) is tested on the
 * way. */
#include "cuda.h"
#include "rng_inline.h"

#include <cuda_copy.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vector>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

extern "C" {
#include <cmocka.h>
}

#ifdef LS_REAL_DOUBLE
static const double tolerance = 1e-13;
#else
static const double tolerance = 1e-5;
#endif

static ls_queue *q;

/* A tensor on the device, and what came of it. */
template <typename T> struct on_device {
    T *p;
    size_t n;
    explicit on_device(const std::vector<T> &host) : p(NULL), n(host.size())
    {
        p = static_cast<T *>(ls_cuda_device.alloc(n * sizeof *p));
        assert_non_null(p);
        assert_int_equal(ls_cuda_device.to_device(q, p, host.data(), n * sizeof *p), LS_OK);
    }
    on_device(const on_device &) = delete;
    on_device &operator=(const on_device &) = delete;
    ~on_device()
    {
        ls_cuda_device.release(p);
    }
    std::vector<T> host() const
    {
        std::vector<T> x(n);
        assert_int_equal(ls_cuda_device.to_host(q, x.data(), p, n * sizeof *p), LS_OK);
        return x;
    }
};

static void launched()
{
    if (ls_launched(q, "test") != LS_OK) fail_msg("%s", ls_last_error());
}

/* ------------------------------------------------------------------------------------------------ threads */

template <typename T> __global__ static void shuffles(T *out, const T *in, int argument, int width)
{
    const unsigned all = 0xffffffffu;
    const int t = (int)threadIdx.x;
    const T x = in[t];
    out[t * 4] = __shfl_sync(all, x, argument, width);
    out[t * 4 + 1] = __shfl_xor_sync(all, x, argument, width);
    out[t * 4 + 2] = __shfl_up_sync(all, x, (unsigned)argument, width);
    out[t * 4 + 3] = __shfl_down_sync(all, x, (unsigned)argument, width);
}

template <typename T> static void check_shuffles()
{
    std::vector<T> in(64), fresh(256);
    for (int i = 0; i < 64; i++) in[(size_t)i] = (T)(3 * i - 70);
    for (int width = 2; width <= 32; width *= 2)
        for (int argument = 0; argument < width; argument++) {
            const on_device<T> x(in), y(fresh);
            LS_LAUNCH(q, shuffles<T>, 1, 64, 0, y.p, x.p, argument, width);
            launched();
            const std::vector<T> out = y.host();
            for (int t = 0; t < 64; t++) {
                const int first = t / width * width, after = first + width;
                const int from[] = {first + argument, (t ^ argument) < after ? t ^ argument : t,
                                    t - argument >= first ? t - argument : t, t + argument < after ? t + argument : t};
                for (int i = 0; i < 4; i++) assert_true(out[(size_t)(t * 4 + i)] == in[(size_t)from[i]]);
            }
        }
}

static void test_shuffles(void **)
{
    check_shuffles<int>();
    check_shuffles<unsigned>();
    check_shuffles<int64_t>();
    check_shuffles<float>();
    check_shuffles<double>();
}

/* 48 threads: a warp and a half; the halves of warps part ways, thread 5 leaves first. */
__global__ static void parts(unsigned *out)
{
    const int t = (int)threadIdx.x;
    if (t == 5) return;
    const unsigned half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    if (t % 32 < 16) {
        out[t * 4] = __ballot_sync(half, t % 3 == 0);
        __syncwarp(half);
    } else {
        const int x = __shfl_xor_sync(half, t, 1);
        out[t * 4] = (unsigned)__shfl_down_sync(half, x, 2);
    }
    out[t * 4 + 1] = __ballot_sync(0xffffffffu, t % 2);
    out[t * 4 + 2] = (unsigned)__any_sync(0xffffffffu, t == 40);
    out[t * 4 + 3] = (unsigned)__all_sync(0xffffffffu, t != 3) + 2u * (unsigned)__shfl_sync(0xffffffffu, t, 5);
}

static void test_parts_of_warps(void **)
{
    const on_device<unsigned> y(std::vector<unsigned>(48 * 4, 77));
    LS_LAUNCH(q, parts, 1, 48, 0, y.p);
    launched();
    const std::vector<unsigned> out = y.host();
    unsigned votes[2] = {0, 0}, odd[2] = {0, 0};
    for (int t = 0; t < 48; t++) {
        if (t == 5) continue;
        if (t % 32 < 16 && t % 3 == 0) votes[t / 32] |= 1u << t % 32;
        if (t % 2) odd[t / 32] |= 1u << t % 32;
    }
    for (int t = 0; t < 48; t++) {
        const unsigned *o = &out[(size_t)t * 4];
        if (t == 5) {
            for (int i = 0; i < 4; i++) assert_int_equal(o[i], 77);
            continue;
        }
        const int down = t % 32 + 2 < 32 ? t + 2 : t;
        assert_int_equal(o[0], t % 32 < 16 ? votes[t / 32] : (unsigned)(down ^ 1));
        assert_int_equal(o[1], odd[t / 32]);
        assert_int_equal(o[2], t >= 32);
        const unsigned of_5 = t < 32 ? ~0u : 37u; /* of who is not there: all ones */
        assert_int_equal(o[3], (unsigned)(t >= 32) + 2u * of_5);
    }
}

/* Each thread passes a number on to the next, through shared memory, as often as there are threads. */
template <typename T> __global__ static void around(T *out)
{
    LS_SHARED(T, place);
    const int t = (int)threadIdx.x, n = (int)blockDim.x;
    out[blockIdx.x * blockDim.x + threadIdx.x] = place[t]; /* what was there before */
    __syncthreads();
    T x = (T)t;
    for (int i = 0; i < n; i++) {
        place[t] = x;
        __syncthreads();
        x = place[(t + 1) % n] + T(1);
        __syncthreads();
    }
    if (out[blockIdx.x * blockDim.x + threadIdx.x] != T(0)) out[blockIdx.x * blockDim.x + threadIdx.x] = x;
}

static void test_barriers(void **)
{
    for (int n : {1, 31, 32, 33, 100, 256}) {
        const on_device<double> y(std::vector<double>((size_t)(3 * n)));
        LS_LAUNCH(q, around<double>, 3, n, (size_t)n * sizeof(double), y.p);
        launched();
        const std::vector<double> out = y.host();
        for (int i = 0; i < 3 * n; i++) assert_true(out[(size_t)i] == i % n + n); /* NaN was there: != 0 */
    }
}

/* Threads that have returned are not waited for. */
__global__ static void fewer(int *out)
{
    __shared__ int left[256];
    const int t = (int)threadIdx.x;
    left[t] = t;
    for (int n = (int)blockDim.x; n > 1; n /= 2) {
        __syncthreads();
        if (t >= n / 2) return;
        left[t] += left[t + n / 2];
    }
    out[blockIdx.x] = left[0];
}

template <typename T> __global__ static void reductions(T *out, const T *in)
{
    __shared__ T scratch[32];
    const int t = (int)threadIdx.x;
    const T x = in[t];
    out[t * 4] = ls_warp_sum(x);
    out[t * 4 + 1] = ls_warp_max(x);
    out[t * 4 + 2] = ls_block_sum(x, scratch);
    out[t * 4 + 3] = ls_block_max(x, scratch);
}

template <typename T> static void check_reductions(int n)
{
    std::vector<T> in((size_t)n);
    for (int i = 0; i < n; i++) in[(size_t)i] = (T)((i * 37) % 101 - 60);
    const on_device<T> x(in), y(std::vector<T>((size_t)n * 4));
    LS_LAUNCH(q, reductions<T>, 1, n, 0, y.p, x.p);
    launched();
    const std::vector<T> out = y.host();
    T sum = 0, most = in[0];
    for (T one : in) sum += one, most = one > most ? one : most;
    for (int t = 0; t < n; t++) {
        T warp_sum = 0, warp_most = in[(size_t)(t / 32 * 32)];
        for (int i = t / 32 * 32; i < t / 32 * 32 + 32; i++) {
            const T one = in[(size_t)i];
            warp_sum += one, warp_most = one > warp_most ? one : warp_most;
        }
        const T *o = &out[(size_t)t * 4];
        assert_true(o[0] == warp_sum && o[1] == warp_most && o[2] == sum && o[3] == most);
    }
}

static void test_reductions(void **)
{
    for (int n : {32, 64, 96, 256, 1024}) {
        check_reductions<int>(n);
        check_reductions<float>(n);
        check_reductions<double>(n);
    }
    const on_device<int> y(std::vector<int>(3));
    LS_LAUNCH(q, fewer, 3, 256, 0, y.p);
    launched();
    for (int x : y.host()) assert_int_equal(x, 255 * 128);
}

/* Where a thread stands, and the arguments of a launch: converted, and copied before it returns. */
__global__ static void places(int64_t *out, ls_view view, double scale)
{
    const int64_t thread = threadIdx.x + (int64_t)blockDim.x * (threadIdx.y + (int64_t)blockDim.y * threadIdx.z);
    const int64_t block = blockIdx.x + (int64_t)gridDim.x * (blockIdx.y + (int64_t)gridDim.y * blockIdx.z);
    const int64_t threads = (int64_t)blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + thread] = block * 1000 + thread + view.sb + (int64_t)scale;
}

__global__ static void each(int *out, int64_t n)
{
    LS_EACH(i, n) atomicAdd(out + i % 3, (int)i);
}

static void test_launches(void **)
{
    const dim3 grid(3, 2, 2), block(4, 5, 3);
    const on_device<int64_t> y(std::vector<int64_t>(12 * 60));
    ls_view view = {NULL, 7, 0, 0};
    LS_LAUNCH(q, places, grid, block, 0, y.p, view, 3);
    launched();
    const std::vector<int64_t> out = y.host();
    for (int64_t i = 0; i < 12 * 60; i++) assert_int_equal(out[(size_t)i], i / 60 * 1000 + i % 60 + 10);

    const on_device<int> sums(std::vector<int>(3));
    LS_LAUNCH(q, each, 2, 64, 0, sums.p, 1000);
    launched();
    int expected[3] = {0, 0, 0};
    for (int i = 0; i < 1000; i++) expected[i % 3] += i;
    for (int i = 0; i < 3; i++) assert_int_equal(sums.host()[(size_t)i], expected[i]);

    LS_LAUNCH(q, each, 0, 64, 0, sums.p, 1000); /* refused, as there: no blocks, too many threads, too much memory */
    assert_int_not_equal(ls_launched(q, "the sums of a test"), LS_OK);
    assert_non_null(strstr(ls_last_error(), "the sums of a test"));
    launched(); /* told once */
    LS_LAUNCH(q, each, 1, 2048, 0, sums.p, 1000);
    assert_int_not_equal(ls_launched(q, "test"), LS_OK);
    LS_START(q, each, 1, 32, 64 << 10, sums.p, 1000); /* of a kernel that has not asked for it */
    assert_int_not_equal(ls_launched(q, "test"), LS_OK);
    LS_LAUNCH(q, each, 1, 32, 200 << 10, sums.p, 1000);
    launched();
    LS_LAUNCH(q, each, 1, 32, 232 << 10, sums.p, 1000);
    assert_int_equal(ls_launched(q, "test"), LS_ERR_UNSUPPORTED);
    assert_non_null(strstr(ls_last_error(), "test: each needs 232 KiB of shared memory"));
    launched();
}

/* ------------------------------------------------------------------------------------------------ products */

template <typename T> static std::vector<T> noise(size_t n, uint32_t stream)
{
    std::vector<T> x(n);
    for (size_t i = 0; i < n; i++) x[i] = (T)ls_normal_inline(3, stream, 0, i);
    return x;
}

template <typename T> static void close(const std::vector<T> &got, const std::vector<double> &expected, double allowed)
{
    double most = 1;
    for (double x : expected) most = fabs(x) > most ? fabs(x) : most;
    for (size_t i = 0; i < got.size(); i++)
        if (!(fabs((double)got[i] - expected[i]) <= allowed * most))
            fail_msg("number %zu is %.9g, not %.9g", i, (double)got[i], expected[i]);
}

/* To so many bits, the nearest, ties to even. 0: as it is. */
static double rounded(double x, int bits)
{
    int exponent;
    frexp(x, &exponent);
    return bits == 0 || x == 0 ? x : ldexp(nearbyint(ldexp(x, bits - exponent)), exponent - bits);
}

/* Each matrix by rows, lds wider than rows, or, with aligned, multiples of 4. Of beta = 0, C is NaN before; what is
 * between rows stays. bits: of operands. */
template <typename T>
static void check_batch(void (*gemm)(ls_queue *, int, int, int64_t, int64_t, int64_t, double, const T *, int64_t,
                                     int64_t, const T *, int64_t, int64_t, double, T *, int64_t, int64_t, int64_t),
                        int ta, int tb, int64_t m, int64_t n, int64_t k, double beta, bool shared_b, double allowed,
                        int bits = 0, bool aligned = false, int64_t batch = 3)
{
    const int64_t wide_a = ta ? m : k, wide_b = tb ? k : n, ldc = n + 3;
    const int64_t lda = aligned ? (wide_a + 3) / 4 * 4 : wide_a + 2, ldb = aligned ? (wide_b + 3) / 4 * 4 : wide_b + 1;
    const int64_t sa = (ta ? k : m) * lda + !aligned, sb = shared_b ? 0 : (tb ? n : k) * ldb, sc = m * ldc + 2;
    const std::vector<T> a = noise<T>((size_t)(sa * batch + 1), 1);
    const std::vector<T> b = noise<T>((size_t)(((tb ? n : k) * ldb) * batch + 1), 2);
    std::vector<T> c = noise<T>((size_t)(sc * batch), 3);
    std::vector<double> expected(c.begin(), c.end());
    for (int64_t i = 0; i < batch; i++)
        for (int64_t r = 0; r < m; r++)
            for (int64_t s = 0; s < n; s++) {
                double sum = 0;
                for (int64_t x = 0; x < k; x++)
                    sum += rounded((double)a[(size_t)(i * sa + (ta ? x * lda + r : r * lda + x))], bits) *
                           rounded((double)b[(size_t)(i * sb + (tb ? s * ldb + x : x * ldb + s))], bits);
                double *e = &expected[(size_t)(i * sc + r * ldc + s)];
                *e = 0.5 * sum + beta * *e;
                if (beta == 0) c[(size_t)(i * sc + r * ldc + s)] = (T)NAN;
            }
    const on_device<T> A(a), B(b), C(c);
    gemm(q, ta, tb, m, n, k, 0.5, A.p, lda, sa, B.p, ldb, sb, beta, C.p, ldc, sc, batch);
    launched();
    close(C.host(), expected, allowed);
}

static void test_products(void **)
{
    for (int ta = 0; ta < 2; ta++)
        for (int tb = 0; tb < 2; tb++)
            for (double beta : {0.0, 1.0, -0.5})
                for (int64_t k : {0, 1, 7, 40})
                    for (int64_t m : {0, 1, 5, 33})
                        for (int64_t n : {0, 1, 6}) {
                            check_batch<ls_real>(ls_gemm_batch, ta, tb, m, n, k, beta, k == 7, tolerance);
                            check_batch<double>(ls_gemm_batch_double, ta, tb, m, n, k, beta, k == 7, 1e-13);
                        }
}

/* More matrices than a batch of cuBLAS surely takes. */
static void test_many_products(void **)
{
    check_batch<ls_real>(ls_gemm_batch, 0, 1, 2, 1, 1, 1, false, tolerance, 0, false, 65537);
    check_batch<double>(ls_gemm_batch_double, 0, 0, 1, 1, 2, 0, true, 1e-13, 0, false, 131071);
}

template <ls_precision precision>
static void product_in(ls_queue *queue, int ta, int tb, int64_t m, int64_t n, int64_t k, double alpha, const ls_real *a,
                       int64_t lda, int64_t sa, const ls_real *b, int64_t ldb, int64_t sb, double beta, ls_real *c,
                       int64_t ldc, int64_t sc, int64_t batch)
{
    ls_gemm_batch_in(queue, precision, ta, tb, m, n, k, alpha, a, lda, sa, b, ldb, sb, beta, c, ldc, sc, batch);
}

/* Operands rounded as told, by the queue or by the call, and sums not, of products that fit in the queue's memory for
 * bfloat16 and of products that are cut along m, n, k, or by matrices: A and B have room for 32 × 32. */
static void test_products_rounded(void **)
{
    static_assert(LS_NARROW_SIDE == 32, "the sizes below are for this one");
    ls_queue *const float32 = q;
    const int64_t sizes[][3] = {{5, 7, 3}, {32, 32, 32}, {300, 6, 20}, {6, 300, 20}, {70, 100, 50}, {40, 9, 200}};
    for (ls_precision precision : {LS_TF32, LS_BF16}) {
        const int tf32_bits = sizeof(ls_real) == sizeof(double) ? 0 : 11;
        const int bits = precision == LS_TF32 || tf32_bits == 0 ? tf32_bits : 8;
        assert_int_equal(ls_cuda_device.open(0, precision, &q), LS_OK);
        for (const auto &size : sizes)
            for (int how = 0; how < 16; how++) {
                const int ta = how & 1, tb = how >> 1 & 1;
                const bool shared = how & 4, aligned = how & 8;
                for (double beta : {0.0, -0.5})
                    check_batch<ls_real>(ls_gemm_batch, ta, tb, size[0], size[1], size[2], beta, shared, tolerance,
                                         bits, aligned);
                check_batch<ls_real>(product_in<LS_FLOAT32>, ta, tb, size[0], size[1], size[2], 1, shared, tolerance);
                check_batch<ls_real>(product_in<LS_TF32>, ta, tb, size[0], size[1], size[2], 1, shared, tolerance,
                                     tf32_bits);
            }
        ls_cuda_device.close(q);
    }
    q = float32;
}

/* A product is no coarser than its queue, which has no memory for that. */
static void test_coarser_product(void **)
{
    const on_device<ls_real> one(std::vector<ls_real>(3, 2));
    for (ls_precision precision : {LS_TF32, LS_BF16}) {
        product_in<LS_FLOAT32>(q, 0, 0, 1, 1, 1, 1, one.p, 1, 1, one.p + 1, 1, 1, 0, one.p + 2, 1, 1, 1);
        launched();
        ls_gemm_batch_in(q, precision, 0, 0, 1, 1, 1, 3, one.p, 1, 1, one.p + 1, 1, 1, 1, one.p + 2, 1, 1, 1);
        assert_int_equal(ls_launched(q, "test"), LS_ERR_INTERNAL);
    }
    assert_float_equal((float)one.host()[2], 4, 0);
}

/* (B,H,n,d) in memory as (B,H,n,d), (B,n,H,d) or (H,B,n,d). */
static ls_view laid(ls_real *p, int layout, int64_t B, int64_t H, int64_t n, int64_t d)
{
    const ls_view views[] = {{p, H * n * d, n * d, d}, {p, n * H * d, d, H * d}, {p, n * d, B * n * d, d}};
    return views[layout];
}

static void test_products_of_heads(void **)
{
    const int64_t sizes[][2] = {{1, 1}, {1, 4}, {4, 1}, {2, 3}, {3, 2}};
    for (const auto &size : sizes)
        for (int layouts = 0; layouts < 27; layouts++) {
            const int64_t B = size[0], H = size[1], T = 5, S = 7, d = 4;
            const std::vector<ls_real> a = noise<ls_real>((size_t)(B * H * T * d), 1);
            const std::vector<ls_real> b = noise<ls_real>((size_t)(B * H * S * d), 2);
            std::vector<ls_real> c((size_t)(B * H * T * S));
            std::vector<double> expected(c.size());
            const on_device<ls_real> A(a), D(b), C(c);
            const ls_view va = laid(A.p, layouts % 3, B, H, T, d), vb = laid(D.p, layouts / 3 % 3, B, H, S, d);
            const ls_view vc = laid(C.p, layouts / 9, B, H, T, S);
            for (int64_t i = 0; i < B; i++)
                for (int64_t h = 0; h < H; h++)
                    for (int64_t t = 0; t < T; t++)
                        for (int64_t s = 0; s < S; s++) {
                            double sum = 0;
                            for (int64_t x = 0; x < d; x++)
                                sum += (double)a[(size_t)(ls_row(va, i, h, t) + x - A.p)] *
                                       (double)b[(size_t)(ls_row(vb, i, h, s) + x - D.p)];
                            expected[(size_t)(ls_row(vc, i, h, t) + s - C.p)] = sum;
                        }
            ls_gemm_heads(q, 0, 1, T, S, d, 1, va, vb, 0, vc, B, H);
            launched();
            close(C.host(), expected, tolerance);
        }
}

/* ------------------------------------------------------------------------------------------------ memory */

static void test_copies(void **)
{
    int host[6][10], back[6][10];
    for (int i = 0; i < 60; i++) host[i / 10][i % 10] = i, back[i / 10][i % 10] = -1;
    int *x;
    assert_int_equal(cudaMalloc(&x, 6 * 7 * sizeof *x), cudaSuccess); /* columns 2 to 5, in rows of 7 */
    assert_int_equal(cudaMemsetAsync(x, 0, 6 * 7 * sizeof *x, q->stream), cudaSuccess);
    assert_int_equal(cudaMemcpy2DAsync(x, 28, &host[0][2], 40, 16, 6, cudaMemcpyHostToDevice, q->stream), cudaSuccess);
    assert_int_equal(cudaMemcpy2DAsync(back, 40, x, 28, 28, 6, cudaMemcpyDeviceToHost, q->stream), cudaSuccess);
    for (int i = 0; i < 60; i++) assert_int_equal(back[i / 10][i % 10], i % 10 < 4 ? i + 2 : i % 10 < 7 ? 0 : -1);

    /* more than there is, with the wrong kind, of memory that is gone */
    assert_int_equal(cudaMemcpy(back, x, 43 * sizeof *x, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(x, back, 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(back, host, 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    assert_int_equal(cudaMemset(x + 40, 0, 3 * sizeof *x), cudaErrorInvalidValue);
    assert_int_equal(cudaFree(x + 1), cudaErrorInvalidValue);
    assert_int_equal(cudaFree(x), cudaSuccess);
    assert_int_equal(cudaFree(x), cudaErrorInvalidValue);
    assert_int_equal(cudaFree(back), cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(back, x, 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    assert_int_equal(cudaGetLastError(), cudaErrorInvalidValue);
    assert_int_equal(cudaGetLastError(), cudaSuccess);

    const on_device<int> y(std::vector<int>(4));
    assert_int_not_equal(ls_cuda_device.to_device(q, y.p, host, 5 * sizeof(int)), LS_OK);
    assert_non_null(strstr(ls_last_error(), "CUDA device 0"));
}

/* Many copies are given before the first is done, from one place that changes after each: nobody waits, and each brings
 * what was there. Of large ones there is an end to it; after them there is still none of small ones. */
static void test_copies_ahead(void **)
{
    const size_t large = (size_t)5 << 20, small = 3, count = 40;
    const on_device<char> x(std::vector<char>(large * count, 0));
    assert_int_equal(ls_cuda_device.wait(q), LS_OK);
    for (size_t size : {small, large, small, (size_t)70000}) {
        std::vector<char> from(size);
        const uint64_t before = emulator_host_waits();
        for (size_t i = 0; i < count; i++) {
            memset(from.data(), (int)i + 1, size);
            assert_int_equal(ls_cuda_device.to_device(q, x.p + i * size, from.data(), size), LS_OK);
        }
        if (getenv("LONGSPAN_EMULATOR_ORDER") == NULL)
            assert_int_equal(emulator_host_waits() > before, size == large); /* 8 MiB for each, of 128 */
        const std::vector<char> there = x.host();
        for (size_t i = 0; i < count * size; i++) assert_true(there[i] == (char)(i / size + 1));
    }
}

static int looks;
static ls_status look(void *last)
{
    return ++looks == *static_cast<int *>(last) ? ls_fail(LS_ERR_COMM, "rank 1 is gone") : LS_OK;
}

__global__ static void count_up(int *x)
{
    *x += 1;
}

/* Work of some length: of every wait for it somebody who watches hears, and can end it; who does not watch any more
 * does not. */
static void test_watched_waits(void **)
{
    const int most = 300;
    int last = 0, got = 0, done = 0;
    ls_watch first = {look, &last, NULL}, second = first;
    ls_mark *mark = NULL;
    const on_device<int> x(std::vector<int>(1, 0));
    const auto work = [&] {
        for (int i = 0; i < most; i++) LS_LAUNCH(q, count_up, 1, 1, 0, x.p);
        done += most;
    };
    assert_int_equal(ls_cuda_device.wait(q), LS_OK);
    ls_cuda_device.watch(&first);
    ls_cuda_device.watch(&second);
    for (int how = 0; how < 3; how++) {
        looks = last = 0;
        work();
        if (how == 0) assert_int_equal(ls_cuda_device.wait(q), LS_OK);
        if (how == 1) assert_int_equal(ls_cuda_device.mark(q, &mark), LS_OK);
        if (how == 1) assert_int_equal(ls_cuda_device.reach(q, mark), LS_OK);
        if (how == 2) assert_int_equal(ls_cuda_device.to_host(q, &got, x.p, sizeof got), LS_OK);
        if (getenv("LONGSPAN_EMULATOR_ORDER") == NULL) assert_int_equal(looks, 2 * (most / 64));
    }
    assert_int_equal(got, done);

    looks = 0, last = 3;
    work();
    const ls_status ended = ls_cuda_device.wait(q);
    if (getenv("LONGSPAN_EMULATOR_ORDER") == NULL) { /* else there may be little left to wait for */
        assert_int_equal(ended, LS_ERR_COMM);
        assert_string_equal(ls_last_error(), "rank 1 is gone");
        assert_int_equal(looks, last);
    }
    last = looks;

    ls_cuda_device.unwatch(&first);
    ls_cuda_device.unwatch(&second);
    ls_cuda_device.unwatch(&second); /* is not there */
    work();
    assert_int_equal(ls_cuda_device.to_host(q, &got, x.p, sizeof got), LS_OK);
    assert_int_equal(got, done);
    assert_int_equal(looks, last);
    ls_cuda_device.unmark(mark);
}

static void test_allocations(void **)
{
    void *p[50];
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < 50; i++)
            if (round == 0 || i % (round + 1) == 0) {
                const size_t bytes = (size_t)(1 + (i * 7919 + round * 104729) % 100000);
                if (round > 0) ls_cuda_device.release(p[i]);
                p[i] = ls_cuda_device.alloc(bytes);
                assert_non_null(p[i]);
                assert_int_equal((uintptr_t)p[i] % 256, 0);
                assert_int_equal(cudaMemset(p[i], i, bytes), cudaSuccess);
            }
        for (int i = 0; i < 50; i++) {
            unsigned char first;
            assert_int_equal(cudaMemcpy(&first, p[i], 1, cudaMemcpyDeviceToHost), cudaSuccess);
            assert_int_equal(first, i);
        }
    }
    for (void *one : p) ls_cuda_device.release(one);
    assert_null(ls_cuda_device.alloc((size_t)1 << 40));
    launched();         /* no error is left behind */
#ifndef EMULATOR_CHECKS /* otherwise nobody can see it */
    float fresh;
    void *one = ls_cuda_device.alloc(4);
    assert_int_equal(cudaMemcpy(&fresh, one, 4, cudaMemcpyDeviceToHost), cudaSuccess);
    assert_true(isnan(fresh));
    ls_cuda_device.release(one);
#endif
}

/* ------------------------------------------------------------------------------------------------ what must crash */

/* How a child that does this ends: its signal, or -1; what it said. */
static int ends_by(void (*act)(), char *said, size_t room)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    const pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        signal(SIGABRT, SIG_DFL);
        dup2(ends[1], 2);
        act();
        ls_cuda_device.wait(q); /* work is done no sooner */
        _exit(0);
    }
    ::close(ends[1]);
    size_t got = 0;
    for (ssize_t n = 1; n > 0 && got + 1 < room; got += (size_t)(n > 0 ? n : 0))
        n = read(ends[0], said + got, room - 1 - got);
    said[got] = 0;
    ::close(ends[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -1;
}

static volatile float *device_memory;
static volatile float seen;

__global__ static void touch(float *x, int64_t at)
{
    x[at] = 1;
}

__global__ static void touch_shared(int at)
{
    LS_SHARED(volatile float, x);
    x[at] = 1;
}

__global__ static void divergent(int n)
{
    if ((int)threadIdx.x < n)
        __syncthreads();
    else
        __syncthreads();
}

__global__ static void stuck(int n)
{
    if ((int)threadIdx.x < n)
        __syncthreads();
    else
        __syncwarp();
}

__global__ static void not_in_mask()
{
    __syncwarp(1);
}

#ifdef EMULATOR_CHECKS /* seen before it happens */
static const int outside = SIGABRT;
static const char behind[] = "which is not allocated";
#else
static const int outside = SIGSEGV;
static const char behind[] = "behind the end";
#endif

static void test_crashes(void **)
{
    char said[4096];
    device_memory = static_cast<float *>(ls_cuda_device.alloc(100 * sizeof(float)));
    assert_int_equal(ends_by([] { seen = device_memory[0]; }, said, sizeof said), SIGSEGV);
    assert_int_equal(ends_by([] { device_memory[3] = 1; }, said, sizeof said), SIGSEGV);
    assert_int_equal(ends_by([] { LS_LAUNCH(q, touch, 1, 1, 0, (float *)device_memory, 99); }, said, sizeof said), -1);
    assert_int_equal(ends_by([] { LS_LAUNCH(q, touch, 1, 1, 0, (float *)device_memory, 1 << 26); }, said, sizeof said),
                     outside);
    assert_int_equal(ends_by(
                         [] {
                             LS_LAUNCH(q, touch, 1, 1, 0, (float *)device_memory, 100);
                             ls_cuda_device.release((void *)device_memory);
                         },
                         said, sizeof said),
                     SIGABRT);
    assert_non_null(strstr(said, behind));
    assert_int_equal(ends_by([] { LS_LAUNCH(q, touch_shared, 1, 1, 32, 7); }, said, sizeof said), -1);
#ifdef EMULATOR_CHECKS
    const int beyond = SIGABRT;
#else
    const int beyond = SIGSEGV;
#endif
    assert_int_equal(ends_by([] { LS_LAUNCH(q, touch_shared, 1, 1, 32, 8); }, said, sizeof said), beyond);
    assert_int_equal(ends_by([] { LS_LAUNCH(q, divergent, 1, 64, 0, 40); }, said, sizeof said), SIGABRT);
    assert_non_null(strstr(said, "divergent"));
    assert_non_null(strstr(said, "different __syncthreads"));
    assert_int_equal(ends_by([] { LS_LAUNCH(q, stuck, 1, 32, 0, 7); }, said, sizeof said), SIGABRT);
    assert_non_null(strstr(said, "kernel stuck, block (0,0,0), thread "));
    assert_non_null(strstr(said, "waits at"));
    assert_int_equal(ends_by([] { LS_LAUNCH(q, stuck, 1, 64, 0, 7); }, said, sizeof said), SIGABRT);
    assert_int_equal(ends_by([] { LS_LAUNCH(q, not_in_mask, 1, 2, 0); }, said, sizeof said), SIGABRT);
    ls_cuda_device.release((void *)device_memory);
}

#ifdef EMULATOR_CHECKS
/* Each thread leaves a number in shared memory and takes that of thread t ^ apart; between, the threads meet. */
enum meeting { NOWHERE, SHUFFLE, SYNCWARP, SYNCTHREADS };
__global__ static void exchanges(int *out, int apart, int where)
{
    __shared__ int x[64];
    const int t = (int)threadIdx.x;
    x[t] = t;
    if (where == SHUFFLE) out[t] = __shfl_xor_sync(0xffffffffu, t, 1);
    if (where == SYNCWARP) __syncwarp();
    if (where == SYNCTHREADS) __syncthreads();
    out[t] = x[t ^ apart];
}

/* The same in memory that all blocks have, a number for each thread, and `beside` numbers apart. */
__global__ static void takes(int *memory, int *out, int beside)
{
    const int t = (int)(threadIdx.x + blockIdx.x * blockDim.x), n = (int)(blockDim.x * gridDim.x);
    memory[t] = t;
    __syncthreads();
    out[t] = memory[(t + beside) % n];
}

__global__ static void reads(const float *x, int64_t at, float *out)
{
    out[threadIdx.x] = x[at];
}

__global__ static void reads_two(const float *x, int64_t at, float2 *out)
{
    out[threadIdx.x] = *reinterpret_cast<const float2 *>(x + at);
}

__global__ static void reads_four(const float *x, int64_t at, float *out)
{
    const float4 y = *reinterpret_cast<const float4 *>(x + at);
    *out = y.x + y.w;
}

__global__ static void copies_and_reads(const float *x, float *out, int waits)
{
    __shared__ float to[32];
    ls_copy<4>(to + threadIdx.x, x, true);
    ls_copy_close();
    if (waits) ls_copy_wait<0>();
    out[threadIdx.x] = to[threadIdx.x];
    ls_copy_wait<0>();
}

static float *checked;
static int *numbers;

/* Whether a child that does this is stopped with these words; NULL: it is not stopped. */
static void stops(void (*act)(), const char *word)
{
    char said[4096];
    const int signal = ends_by(act, said, sizeof said);
    if (signal != (word == NULL ? -1 : SIGABRT) || (word != NULL && strstr(said, word) == NULL))
        fail_msg("signal %d, expected to hear: %s, heard: %s", signal, word == NULL ? "nothing" : word, said);
}

static void test_checks(void **)
{
    const on_device<float> some(std::vector<float>(4)), fresh_room(std::vector<float>(64));
    const on_device<int> a(std::vector<int>(64)), b(std::vector<int>(64));
    static int *memory;
    checked = some.p, numbers = a.p, memory = b.p;
    static float *room;
    room = fresh_room.p;

    const char *const race = "with no barrier between";
    stops([] { LS_LAUNCH(q, exchanges, 1, 64, 0, numbers, 0, NOWHERE); }, NULL);
    stops([] { LS_LAUNCH(q, exchanges, 1, 64, 0, numbers, 1, NOWHERE); }, race);
    stops([] { LS_LAUNCH(q, exchanges, 1, 64, 0, numbers, 1, SHUFFLE); }, race);
    stops([] { LS_LAUNCH(q, exchanges, 1, 64, 0, numbers, 1, SYNCWARP); }, NULL);
    stops([] { LS_LAUNCH(q, exchanges, 1, 64, 0, numbers, 32, SYNCWARP); }, race);
    stops([] { LS_LAUNCH(q, exchanges, 2, 64, 0, numbers, 32, SYNCTHREADS); }, "which another block has written");
    stops([] { LS_LAUNCH(q, exchanges, 1, 64, 0, numbers, 32, SYNCTHREADS); }, NULL);
    stops([] { LS_LAUNCH(q, takes, 2, 32, 0, memory, numbers, 0); }, NULL);
    stops([] { LS_LAUNCH(q, takes, 1, 64, 0, memory, numbers, 1); }, NULL);
    stops([] { LS_LAUNCH(q, takes, 2, 32, 0, memory, numbers, 1); }, "which another block has");

    stops([] { LS_LAUNCH(q, copies_and_reads, 1, 32, 0, checked, room, 1); }, NULL);
    stops([] { LS_LAUNCH(q, copies_and_reads, 1, 32, 0, checked, room, 0); }, "has copied to, and not waited for");

    stops([] { LS_LAUNCH(q, reads, 1, 1, 0, checked, 3, room); }, NULL);
    stops([] { LS_LAUNCH(q, reads, 1, 1, 0, checked, 4, room); }, "which is not allocated");
    std::vector<float> of_host(4);
    static float *hosts;
    hosts = of_host.data();
    stops([] { LS_LAUNCH(q, reads, 1, 1, 0, hosts, 0, room); }, "of the host's memory, which a kernel cannot");
    stops([] { LS_LAUNCH(q, reads, 1, 1, 0, checked, 0, hosts); }, "of the host's memory, which a kernel cannot");
    stops([] { LS_LAUNCH(q, reads_two, 1, 1, 0, checked, 2, reinterpret_cast<float2 *>(room)); }, NULL);
    stops([] { LS_LAUNCH(q, reads_two, 1, 1, 0, checked, 1, reinterpret_cast<float2 *>(room)); },
          "on no boundary of 8");
    stops([] { LS_LAUNCH(q, reads_four, 1, 1, 0, checked, 0, room); }, NULL);
    stops([] { LS_LAUNCH(q, reads_four, 1, 1, 0, checked, 2, room); }, "on no boundary of 16");
    stops(
        [] {
            const float *fresh = static_cast<float *>(ls_cuda_device.alloc(4));
            LS_LAUNCH(q, reads, 1, 1, 0, fresh, 0, room);
        },
        "which nobody has written");
    stops(
        [] {
            ls_cuda_device.poison(checked, 4);
            LS_LAUNCH(q, reads, 1, 1, 0, checked, 0, room);
        },
        "which nobody has written");
    stops(
        [] {
            ls_cuda_device.poison(checked, 4);
            ls_gemm_batch(q, 0, 0, 1, 1, 1, 1, reinterpret_cast<ls_real *>(checked), 1, 0,
                          reinterpret_cast<ls_real *>(room), 1, 0, 0, reinterpret_cast<ls_real *>(room + 8), 1, 0, 1);
        },
        "cuBLAS reads");
}
#endif

static void test_devices(void **)
{
    int devices = 0;
    assert_int_equal(ls_cuda_device.count(&devices), LS_OK);
    assert_int_equal(devices, 1);
    ls_queue *other = q;
    assert_int_equal(ls_cuda_device.open(1, LS_FLOAT32, &other), LS_ERR_ARGUMENT);
    assert_null(other);
    assert_non_null(strstr(ls_last_error(), "no device 1"));
    ls_cuda_device.close(NULL);
}

static int open_queue(void **)
{
    return ls_cuda_device.open(0, LS_FLOAT32, &q) != LS_OK;
}

static int close_queue(void **)
{
    const ls_status status = ls_cuda_device.wait(q);
    ls_cuda_device.close(q);
    return status != LS_OK;
}

int main()
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shuffles),
        cmocka_unit_test(test_parts_of_warps),
        cmocka_unit_test(test_barriers),
        cmocka_unit_test(test_reductions),
        cmocka_unit_test(test_launches),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_many_products),
        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_products_of_heads),
        cmocka_unit_test(test_allocations),
        cmocka_unit_test(test_crashes),
        cmocka_unit_test(test_devices),
        cmocka_unit_test(test_products_rounded),
        cmocka_unit_test(test_coarser_product),
        cmocka_unit_test(test_copies_ahead),
        cmocka_unit_test(test_watched_waits),
#ifdef EMULATOR_CHECKS
        cmocka_unit_test(test_checks),
#endif
    };
    return cmocka_run_group_tests(tests, open_queue, close_queue);
}
