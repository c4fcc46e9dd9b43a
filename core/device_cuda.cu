/* The CUDA device: memory, a stream and a cuBLAS handle for each queue. */
#include "cuda.h"

extern "C" {
#include "arena.h"
}

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* What to do about an error, as the end of a sentence. */
static const char *advice(cudaError_t error)
{
    switch (error) {
    case cudaErrorMemoryAllocation:
        return "use more ranks or a smaller batch, or free the device of other programs";
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
        return "the driver is older than the CUDA of this build: update it";
    case cudaErrorNoDevice:
        return "no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorInvalidDevice:
        return "see nvidia-smi and CUDA_VISIBLE_DEVICES for what there is";
    case cudaErrorDevicesUnavailable:
        return "another program has it for itself: see nvidia-smi";
    case cudaErrorNoKernelImageForDevice:
        return "build with CMAKE_CUDA_ARCHITECTURES for this GPU";
    case cudaErrorECCUncorrectable:
        return "its memory is broken: see nvidia-smi -q";
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorLaunchFailure:
        return "a kernel broke, and this process cannot use the device any more: compute-sanitizer finds which; please "
               "report this";
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
        return "please report this";
    default:
        return "nvidia-smi may tell more";
    }
}

static ls_status failed(cudaError_t error, int device, const char *call)
{
    if (error == cudaSuccess) return LS_OK;
    cudaGetLastError(); /* so that the next call does not tell of it again; what cannot be undone it will tell */
    return ls_fail(error == cudaErrorMemoryAllocation ? LS_ERR_MEMORY : LS_ERR_INTERNAL,
                   "CUDA device %d: %s failed: %s: %s", device, call, cudaGetErrorString(error), advice(error));
}

static ls_status count(int *devices)
{
    *devices = 0;
    const cudaError_t error = cudaGetDeviceCount(devices);
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) { /* no driver at all is the latter, too */
        cudaGetLastError();
        *devices = 0;
        return LS_OK;
    }
    if (error == cudaSuccess) return LS_OK;
    cudaGetLastError();
    return ls_fail(LS_ERR_INTERNAL, "CUDA: cudaGetDeviceCount failed: %s: %s", cudaGetErrorString(error),
                   advice(error));
}

static void describe(int number, char *text, size_t size)
{
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, number) == cudaSuccess)
        snprintf(text, size, "%s, compute capability %d.%d, %.1f GiB", p.name, p.major, p.minor,
                 (double)p.totalGlobalMem / 1073741824.0);
    else
        snprintf(text, size, "cannot be asked: %s", cudaGetErrorString(cudaGetLastError()));
}

static int opened, queues; /* the device of this process, and how many queues it has: memory is of one device */

/* What is copied to the device passes through pinned memory of the queue, so that the caller's may be used again at
 * once and nobody waits for the work before: pieces of a few sizes, those of a size used one after the other in a ring.
 * A piece is used again when its copy is through. Where that of the oldest is not, its ring gets one more, until it has
 * MOST_PINNED bytes; only then the host waits for the oldest. */
static const size_t PIECE_BYTES[] = {(size_t)4 << 10, (size_t)64 << 10, (size_t)1 << 20, (size_t)8 << 20};
static const size_t LARGEST_PIECE = (size_t)8 << 20, MOST_PINNED = (size_t)128 << 20;
enum { PIECE_SIZES = sizeof PIECE_BYTES / sizeof *PIECE_BYTES };
struct bounce_piece {
    void *memory;
    cudaEvent_t copied;
};
struct bounce_ring {
    bounce_piece *piece;
    int count, capacity, next; /* next: the oldest */
};
struct ls_bounce {
    bounce_ring ring[PIECE_SIZES];
};

/* What this process has of the device's memory: nobody else knows how much a pointer stands for. */
struct holding {
    void *p;
    size_t bytes;
    holding *next;
};
static pthread_mutex_t ledger = PTHREAD_MUTEX_INITIALIZER;
static holding *holdings;
static size_t held, most_held;

/* A kernel that broke is told of by every call after it, by one for memory too. */
static cudaError_t refusal = cudaSuccess;
static const char *broken()
{
    return refusal == cudaSuccess ? NULL : advice(refusal);
}

static void *alloc(size_t bytes)
{
    holding *h = static_cast<holding *>(malloc(sizeof *h));
    void *p = NULL;
    cudaError_t error = cudaSetDevice(opened);
    if (error == cudaSuccess) error = cudaMalloc(&p, bytes > 0 ? bytes : 1);
    if (h == NULL || error != cudaSuccess) {
        cudaGetLastError();
        refusal = error == cudaErrorMemoryAllocation ? cudaSuccess : error;
        cudaFree(p);
        free(h);
        return NULL;
    }
    h->p = p;
    h->bytes = bytes;
    pthread_mutex_lock(&ledger);
    h->next = holdings;
    holdings = h;
    held += bytes;
    if (held > most_held) most_held = held;
    pthread_mutex_unlock(&ledger);
    return p;
}

static void release(void *p)
{
    if (p == NULL) return;
    pthread_mutex_lock(&ledger);
    for (holding **at = &holdings; *at != NULL; at = &(*at)->next) {
        holding *h = *at;
        if (h->p != p) continue;
        *at = h->next;
        held -= h->bytes;
        free(h);
        break;
    }
    pthread_mutex_unlock(&ledger);
    if (cudaSetDevice(opened) == cudaSuccess) cudaDeviceSynchronize(); /* it may be in use; cudaFree need not wait */
    cudaFree(p);
}

static size_t most(void)
{
    pthread_mutex_lock(&ledger);
    const size_t bytes = most_held;
    pthread_mutex_unlock(&ledger);
    return bytes;
}

static void free_bounce(ls_bounce *b)
{
    for (int k = 0; b != NULL && k < PIECE_SIZES; k++) {
        bounce_ring *r = &b->ring[k];
        for (int i = 0; i < r->count; i++) {
            if (r->piece[i].memory != NULL) cudaFreeHost(r->piece[i].memory);
            if (r->piece[i].copied != NULL) cudaEventDestroy(r->piece[i].copied);
        }
        free(r->piece);
    }
    free(b);
}

static void close_queue(ls_queue *q)
{
    if (q == NULL) return;
    if (q->stream != NULL) cudaStreamSynchronize(q->stream);
    free_bounce(q->bounce);
    if (q->end != NULL) cudaEventDestroy(q->end);
    release(q->narrow);
    release(q->parts);
    if (q->blas != NULL) cublasDestroy(q->blas);
    if (q->stream != NULL) cudaStreamDestroy(q->stream);
    free(q);
    queues--;
}

/* first: its blocks go before those of other queues that wait for room on the GPU. */
static ls_status make_stream(ls_queue *q, int first)
{
    int least = 0, greatest = 0;
    LS_TRY(failed(cudaSetDevice(q->device), q->device, "cudaSetDevice"));
    LS_TRY(failed(cudaDeviceGetStreamPriorityRange(&least, &greatest), q->device, "cudaDeviceGetStreamPriorityRange"));
    return failed(cudaStreamCreateWithPriority(&q->stream, cudaStreamNonBlocking, first ? greatest : least), q->device,
                  "cudaStreamCreate");
}

static ls_status make_queue(ls_queue *q)
{
    int most_shared = 0;
    LS_TRY(make_stream(q, 0));
    LS_TRY(failed(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, q->device), q->device,
                  "cudaDeviceGetAttribute"));
    q->most_shared = (size_t)most_shared;
    cublasStatus_t status = cublasCreate(&q->blas);
    if (status == CUBLAS_STATUS_SUCCESS) status = cublasSetStream(q->blas, q->stream);
    /* products of floats in floats: TF32 only where a call asks for it; and sums in floats, of pieces too, where what
     * comes of them is rounded to bfloat16 */
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasSetMathMode(
            q->blas, (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    if (status != CUBLAS_STATUS_SUCCESS)
        return ls_fail(status == CUBLAS_STATUS_ALLOC_FAILED ? LS_ERR_MEMORY : LS_ERR_INTERNAL,
                       "CUDA device %d: cuBLAS cannot be opened: %s: free the device of other programs", q->device,
                       cublasGetStatusString(status));
    LS_TRY(ls_reserve(&ls_cuda_device, "CUDA: parts of sums", LS_PARTS_BYTES, &q->parts));
    if (q->precision != LS_BF16) return LS_OK;
    return ls_reserve(&ls_cuda_device, "CUDA: copies in bfloat16", LS_NARROW_BYTES, &q->narrow);
}

/* tensor cores that take tf32 and bfloat16 */
static ls_status check_precision(int number, ls_precision precision)
{
    int major = 0;
    if (precision == LS_FLOAT32) return LS_OK;
    LS_TRY(failed(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number), number,
                  "cudaDeviceGetAttribute"));
    if (major < 8)
        LS_FAIL(LS_ERR_UNSUPPORTED,
                "CUDA device %d: its compute capability is %d.x: tf32 and bf16 need 8.0: use float32", number, major);
    return LS_OK;
}

static ls_status open_queue(int number, ls_precision precision, ls_queue **queue)
{
    *queue = NULL;
    int devices;
    LS_TRY(count(&devices));
    if (devices == 0)
        LS_FAIL(LS_ERR_UNSUPPORTED, "CUDA: this machine has no GPU, or no driver: %s", advice(cudaErrorNoDevice));
    if (number < 0 || number >= devices)
        LS_FAIL(LS_ERR_ARGUMENT, "CUDA: there is no device %d: this machine has %d, from 0", number, devices);
    if (queues > 0 && number != opened)
        LS_FAIL(LS_ERR_UNSUPPORTED,
                "CUDA device %d: this process has device %d open: a process uses one GPU: start one for each", number,
                opened);
    LS_TRY(check_precision(number, precision));
    ls_queue *q = static_cast<ls_queue *>(calloc(1, sizeof *q));
    if (q == NULL) LS_FAIL(LS_ERR_MEMORY, "CUDA device %d: no memory for a queue", number);
    queues++;
    q->device = opened = number;
    q->precision = precision;
    const ls_status status = make_queue(q);
    if (status != LS_OK) {
        close_queue(q);
        return status;
    }
    *queue = q;
    return LS_OK;
}

static ls_status open_beside(ls_queue *of, ls_queue **queue)
{
    *queue = NULL;
    ls_queue *q = static_cast<ls_queue *>(calloc(1, sizeof *q));
    if (q == NULL) LS_FAIL(LS_ERR_MEMORY, "CUDA device %d: no memory for a queue", of->device);
    queues++;
    q->device = of->device;
    /* What is to cross ranks must not wait behind a kernel of thousands of blocks that began at the same time. */
    const ls_status status = make_stream(q, 1);
    if (status != LS_OK)
        close_queue(q);
    else
        *queue = q;
    return status;
}

static void *alloc_host(size_t bytes)
{
    void *p = NULL;
    if (cudaMallocHost(&p, bytes > 0 ? bytes : 1) == cudaSuccess) return p;
    cudaGetLastError();
    return NULL;
}

static void release_host(void *p)
{
    if (p != NULL) cudaFreeHost(p);
}

static void poison(void *p, size_t bytes)
{
    if (bytes == 0) return;
    cudaDeviceSynchronize();               /* a call before may still work there */
    cudaMemsetAsync(p, 0xff, bytes, NULL); /* all ones is a NaN in both precisions */
    cudaStreamSynchronize(NULL);           /* queues do not wait for the stream of the device */
}

static ls_status begin_to_device(ls_queue *q, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) return LS_OK;
    LS_TRY(failed(cudaSetDevice(q->device), q->device, "cudaSetDevice"));
    return failed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, q->stream), q->device, "a copy to it");
}

static ls_status begin_to_host(ls_queue *q, void *to, const void *from, size_t bytes)
{
    if (bytes == 0) return LS_OK;
    LS_TRY(failed(cudaSetDevice(q->device), q->device, "cudaSetDevice"));
    return failed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, q->stream), q->device, "a copy from it");
}

static ls_status make_mark(ls_queue *q, cudaEvent_t *event)
{
    LS_TRY(failed(cudaSetDevice(q->device), q->device, "cudaSetDevice"));
    if (*event == NULL)
        LS_TRY(failed(cudaEventCreateWithFlags(event, cudaEventDisableTiming), q->device, "cudaEventCreate"));
    return failed(cudaEventRecord(*event, q->stream), q->device, "cudaEventRecord");
}

static ls_status mark(ls_queue *q, ls_mark **place)
{
    cudaEvent_t event = reinterpret_cast<cudaEvent_t>(*place);
    const ls_status status = make_mark(q, &event);
    *place = reinterpret_cast<ls_mark *>(event);
    return status;
}

static ls_status follow(ls_queue *q, ls_mark *place)
{
    LS_TRY(failed(cudaSetDevice(q->device), q->device, "cudaSetDevice"));
    return failed(cudaStreamWaitEvent(q->stream, reinterpret_cast<cudaEvent_t>(place), 0), q->device,
                  "waiting for another queue");
}

static ls_watch *watches; /* all of this process, whose waits are one after the other */

static void watch(ls_watch *w)
{
    w->next = watches;
    watches = w;
}

static void unwatch(ls_watch *w)
{
    ls_watch **at = &watches;
    while (*at != NULL && *at != w) at = &(*at)->next;
    if (*at != NULL) *at = w->next;
}

static ls_status look_around(void)
{
    for (const ls_watch *w = watches; w != NULL; w = w->next) LS_TRY(w->look(w->of));
    return LS_OK;
}

/* The host waits for an event. What a rank that is gone leaves others waiting for never comes: so where somebody
 * watches, the event is asked for, quickly at first. */
static ls_status until(ls_queue *q, cudaEvent_t event, const char *what)
{
    if (watches == NULL) return failed(cudaEventSynchronize(event), q->device, what);
    if (cudaPeekAtLastError() != cudaSuccess) return ls_launched(q, "a launch"); /* not to be forgotten below */
    const timespec pause = {0, 50000};
    for (int asked = 1;; asked++) {
        const cudaError_t error = cudaEventQuery(event);
        if (error != cudaErrorNotReady) return failed(error, q->device, what);
        cudaGetLastError(); /* it is none */
        if (asked % 64 == 0) LS_TRY(look_around());
        if (asked < 1024)
            sched_yield();
        else
            nanosleep(&pause, NULL);
    }
}

/* And for all that a queue was given. */
static ls_status until_end(ls_queue *q, const char *what)
{
    if (watches == NULL) return failed(cudaStreamSynchronize(q->stream), q->device, what);
    LS_TRY(make_mark(q, &q->end));
    return until(q, q->end, what);
}

static ls_status reach(ls_queue *q, ls_mark *place)
{
    LS_TRY(until(q, reinterpret_cast<cudaEvent_t>(place), "what was queued"));
    return ls_launched(q, "a product or a launch");
}

static void unmark(ls_mark *place)
{
    if (place != NULL) cudaEventDestroy(reinterpret_cast<cudaEvent_t>(place));
}

/* One more piece, before the oldest. */
static ls_status add_piece(ls_queue *q, bounce_ring *r, size_t bytes)
{
    if (r->count == r->capacity) {
        const int capacity = r->capacity > 0 ? 2 * r->capacity : 16;
        void *grown = realloc(r->piece, (size_t)capacity * sizeof *r->piece);
        if (grown == NULL) LS_FAIL(LS_ERR_MEMORY, "CUDA device %d: no memory for copies to it", q->device);
        r->piece = static_cast<bounce_piece *>(grown);
        r->capacity = capacity;
    }
    void *memory = alloc_host(bytes);
    if (memory == NULL)
        LS_FAIL(LS_ERR_MEMORY, "CUDA device %d: no memory for copies to it of %.1f MiB", q->device,
                (double)bytes / 1048576.0);
    memmove(r->piece + r->next + 1, r->piece + r->next, (size_t)(r->count - r->next) * sizeof *r->piece);
    r->piece[r->next] = bounce_piece{memory, NULL};
    r->count++;
    return LS_OK;
}

/* The next piece, of at least so many bytes. */
static ls_status take_piece(ls_queue *q, size_t bytes, bounce_piece **piece)
{
    const char *const what = "a copy to it, or what was queued before,";
    int k = 0;
    while (PIECE_BYTES[k] < bytes) k++;
    if (q->bounce == NULL) q->bounce = static_cast<ls_bounce *>(calloc(1, sizeof *q->bounce));
    if (q->bounce == NULL) LS_FAIL(LS_ERR_MEMORY, "CUDA device %d: no memory for copies to it", q->device);
    bounce_ring *r = &q->bounce->ring[k];
    const cudaEvent_t copied = r->count > 0 ? r->piece[r->next].copied : NULL;
    if (cudaPeekAtLastError() != cudaSuccess) return ls_launched(q, "a launch"); /* not to be forgotten below */
    const cudaError_t oldest = copied == NULL ? cudaSuccess : cudaEventQuery(copied);
    const int busy = oldest == cudaErrorNotReady;
    if (busy) cudaGetLastError(); /* it is none */
    if (!busy) LS_TRY(failed(oldest, q->device, what));
    const int first = r->count == 0, more = busy && (size_t)(r->count + 1) * PIECE_BYTES[k] <= MOST_PINNED;
    ls_status added = LS_ERR_MEMORY;
    if (first || more) added = add_piece(q, r, PIECE_BYTES[k]);
    if (first) LS_TRY(added);
    if (busy && added != LS_OK) LS_TRY(until(q, copied, what)); /* no more of them: the oldest will do */
    *piece = &r->piece[r->next];
    r->next = (r->next + 1) % r->count;
    return LS_OK;
}

static ls_status to_device(ls_queue *q, void *to, const void *from, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += LARGEST_PIECE) {
        const size_t n = bytes - at < LARGEST_PIECE ? bytes - at : LARGEST_PIECE;
        bounce_piece *piece = NULL;
        LS_TRY(take_piece(q, n, &piece));
        memcpy(piece->memory, static_cast<const char *>(from) + at, n);
        LS_TRY(begin_to_device(q, static_cast<char *>(to) + at, piece->memory, n));
        LS_TRY(make_mark(q, &piece->copied));
    }
    return LS_OK;
}

static ls_status to_host(ls_queue *q, void *to, const void *from, size_t bytes)
{
    const char *const what = "a copy from it, or what was queued before,";
    if (bytes == 0) return LS_OK;
    if (watches != NULL) LS_TRY(until_end(q, what)); /* the copy itself waits, to memory that is not pinned */
    LS_TRY(begin_to_host(q, to, from, bytes));
    return until_end(q, what);
}

static ls_status enter(ls_queue *q)
{
    return failed(cudaSetDevice(q->device), q->device, "cudaSetDevice");
}

/* What the functions without a status have kept. */
static ls_status kept(ls_queue *q, const char *what)
{
    const ls_status status = q->status;
    q->status = LS_OK;
    return status == LS_OK ? LS_OK : ls_fail(status, "CUDA device %d: %s: %s", q->device, what, q->message);
}

static ls_status wait(ls_queue *q)
{
    LS_TRY(enter(q));
    LS_TRY(until_end(q, "what was queued"));
    return ls_launched(q, "a product or a launch");
}

ls_status ls_launched(ls_queue *q, const char *what)
{
    const ls_status status = kept(q, what);
    const cudaError_t error = cudaGetLastError();
    return status != LS_OK ? status : failed(error, q->device, what);
}

int ls_ask_shared(ls_queue *q, const void *kernel, const char *name, size_t bytes)
{
    const cudaError_t error =
        bytes > INT_MAX ? cudaErrorInvalidValue
                        : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaErrorInvalidValue) return 1; /* what else may have failed the launch tells */
    cudaGetLastError();
    if (q->status != LS_OK) return 0; /* the first failure stays */
    q->status = LS_ERR_UNSUPPORTED;
    snprintf(q->message, sizeof q->message, "%s needs %zu KiB of shared memory in a block, and there is not so much",
             name, (bytes + 1023) >> 10);
    return 0;
}

extern "C" void *ls_cuda_stream(ls_queue *queue, int *device)
{
    *device = queue->device;
    return queue->stream;
}

extern "C" const ls_device_ops ls_cuda_device = {.name = "cuda",
                                                 .count = count,
                                                 .describe = describe,
                                                 .open = open_queue,
                                                 .open_beside = open_beside,
                                                 .enter = enter,
                                                 .close = close_queue,
                                                 .alloc = alloc,
                                                 .broken = broken,
                                                 .release = release,
                                                 .most = most,
                                                 .alloc_host = alloc_host,
                                                 .release_host = release_host,
                                                 .poison = poison,
                                                 .to_device = to_device,
                                                 .to_host = to_host,
                                                 .begin_to_device = begin_to_device,
                                                 .begin_to_host = begin_to_host,
                                                 .mark = mark,
                                                 .follow = follow,
                                                 .reach = reach,
                                                 .unmark = unmark,
                                                 .watch = watch,
                                                 .unwatch = unwatch,
                                                 .wait = wait};
