/* The emulator's machine: device memory, and the threads of a block as fibers. What it promises: see cuda_runtime.h.
 *
 * A worker is a stack that runs threads. Worker 0 starts thread 0, then 1, ...: as long as none waits, all threads of a
 * block run on it, one call each. A thread that waits keeps its worker; then another goes on: first a thread of the
 * same warp that may, then the next that has not begun, on another worker, then one of another warp. */
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "checks.h"
#include "streams.h"

#include <cblas.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

void emulator::die(const char *what)
{
    fprintf(stderr, "emulator: %s\n", what);
    abort();
}

namespace
{
using emulator::die;

/* ------------------------------------------------------------------------------------------------ device memory */

const size_t REGION = (size_t)16 << 30; /* of addresses; pages are the system's as they are used */
const size_t ALIGN = 256, BEHIND = 256; /* bytes of a known value behind each allocation */
const size_t PAGE = 4096, HUGE_PAGE = 2 << 20;
const unsigned char FRESH = 0xff, GUARD = 0xff; /* a reader behind the end finds NaN, too */

unsigned char *region;
std::map<size_t, size_t> &allocated = *new std::map<size_t, size_t>; /* offset: bytes asked for. Lasts to the end */
int access_depth;
size_t top; /* the first page that holds nothing */

size_t round_up(size_t x, size_t to)
{
    return (x + to - 1) / to * to;
}

size_t whole(size_t bytes) /* what an allocation takes */
{
    return round_up(bytes + BEHIND, ALIGN);
}

void protect(size_t from, size_t to, int how)
{
    if (to > from && mprotect(region + from, to - from, how) != 0) die("mprotect of device memory failed");
}

/* The pages below top are open or closed by a protection key, where the processor has them: that is one instruction,
 * and mprotect a walk over all pages. Those above are always closed. */
int key = -1;

void open_memory(bool open)
{
    if (key >= 0)
        pkey_set(key, open ? 0 : PKEY_DISABLE_ACCESS);
    else
        protect(0, top, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

cudaError_t reserve_region()
{
    void *got = mmap(NULL, REGION + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) return cudaErrorInitializationError;
    region = reinterpret_cast<unsigned char *>(round_up(reinterpret_cast<size_t>(got), HUGE_PAGE));
    madvise(region, REGION, MADV_HUGEPAGE); /* the fewer pages, the shorter mprotect's walk */
    key = pkey_alloc(0, PKEY_DISABLE_ACCESS);
    emulator::check_memory(region, region + REGION);
    if (key >= 0 && pkey_mprotect(region, REGION, PROT_NONE, key) != 0) die("pkey_mprotect of device memory failed");
    return cudaSuccess;
}

void set_top()
{
    const size_t end = allocated.empty() ? 0 : allocated.rbegin()->first + whole(allocated.rbegin()->second);
    const size_t now = round_up(end, HUGE_PAGE);
    if (now < top) madvise(region + now, top - now, MADV_DONTNEED);
    if (key >= 0 || access_depth > 0) protect(top, now, PROT_READ | PROT_WRITE);
    protect(now, top, PROT_NONE);
    top = now;
}

cudaError_t last_error;
cudaError_t keep(cudaError_t error)
{
    if (error != cudaSuccess) last_error = error;
    return error;
}
} // namespace

emulator::device_access::device_access()
{
    if (access_depth++ == 0) open_memory(true);
}

emulator::device_access::~device_access()
{
    if (--access_depth == 0) open_memory(false);
}

namespace
{
/* The large pages of one allocation are open while this lives, where all are by mprotect: it walks over few of them
 * then. Were parts of them open, the system would have to cut them up, and every walk would be long. */
struct allocation_access {
    const size_t from, to;
    const bool alone;
    allocation_access(size_t at, size_t bytes)
        : from(at / HUGE_PAGE * HUGE_PAGE), to(round_up(at + whole(bytes), HUGE_PAGE)),
          alone(key < 0 && access_depth == 0)
    {
        if (alone)
            protect(from, to, PROT_READ | PROT_WRITE);
        else if (access_depth++ == 0)
            open_memory(true);
    }
    ~allocation_access()
    {
        if (alone)
            protect(from, to, PROT_NONE);
        else if (--access_depth == 0)
            open_memory(false);
    }
    allocation_access(const allocation_access &) = delete;
    allocation_access &operator=(const allocation_access &) = delete;
};
} // namespace

int emulator::is_device(const void *p)
{
    const unsigned char *x = static_cast<const unsigned char *>(p);
    return region != NULL && x >= region && x < region + REGION;
}

int emulator::is_allocated(const void *p, size_t bytes)
{
    if (!is_device(p)) return 0;
    const size_t at = (size_t)(static_cast<const unsigned char *>(p) - region);
    auto next = allocated.upper_bound(at);
    if (next == allocated.begin()) return 0;
    const auto one = std::prev(next);
    return bytes <= one->second && at - one->first <= one->second - bytes;
}

/* ------------------------------------------------------------------------------------------------ streams */

/* A place in a stream that an event stands for: once it is past, what was given before it has been done. */
struct mark {
    cudaStream_t stream;
    bool past;
    struct timespec at;
};
struct CUevent_st {
    std::shared_ptr<mark> last; /* of the last record */
};

namespace
{
/* What a stream has still to do; `after`: it must be past before. Host memory that a copy reads or writes meanwhile.
 * `may`: see streams.h. */
struct work_item {
    std::function<void()> act;
    std::shared_ptr<mark> after;
    const unsigned char *host;
    size_t host_bytes;
    std::function<bool()> may;
};
} // namespace

struct CUstream_st {
    unsigned flags;
    std::deque<work_item> items;
};

namespace
{
CUstream_st &first_stream = *new CUstream_st{0, {}}; /* that of NULL. These last to the end */
std::vector<cudaStream_t> &streams = *new std::vector<cudaStream_t>{&first_stream};
std::map<const unsigned char *, size_t> &pinned = *new std::map<const unsigned char *, size_t>;

cudaStream_t stream_of(cudaStream_t stream)
{
    return stream == NULL ? &first_stream : stream;
}

void run_one(cudaStream_t stream);

/* Device memory is opened once for all that is run: where that is mprotect's work, it took half of a test's time. */
void run_until(const mark &end)
{
    emulator::device_access open;
    while (!end.past) {
        if (end.stream->items.empty()) die("an event is waited for that never comes");
        run_one(end.stream);
    }
}

void run_one(cudaStream_t stream)
{
    const work_item one = std::move(stream->items.front());
    stream->items.pop_front();
    if (one.after != NULL) run_until(*one.after);
    if (one.act) one.act();
}

void run_all(cudaStream_t stream)
{
    if (stream->items.empty()) return;
    emulator::device_access open;
    while (!stream->items.empty()) run_one(stream);
}

void run_all_streams()
{
    for (cudaStream_t one : streams) run_all(one);
}

/* What the host waits in, see emulator_host_waits. Who asks for an event again, and has given nothing since, waits,
 * too. */
uint64_t waits;
const mark *questioned;
bool questioned_again;
void wait_for(cudaStream_t stream)
{
    waits += !stream->items.empty();
    run_all(stream);
}
void wait_for_all_streams()
{
    bool idle = true;
    for (cudaStream_t one : streams) idle = idle && one->items.empty();
    waits += !idle;
    run_all_streams();
}

/* -1: as late as may be. Else the state of the random numbers. */
int64_t order()
{
    static int64_t seed = -2;
    if (seed == -2) {
        const char *text = getenv("LONGSPAN_EMULATOR_ORDER");
        seed = text == NULL ? -1 : (int64_t)(strtoull(text, NULL, 10) & 0xffffffff);
    }
    if (seed >= 0) seed = (int64_t)(((uint64_t)seed * 6364136223846793005u + 1442695040888963407u) >> 1);
    return seed;
}

/* Now and then: something asynchronous may as well be done at once. */
bool at_once_by_chance()
{
    const int64_t chance = order();
    return chance >= 0 && (chance >> 30 & 1);
}

bool may_go_on(cudaStream_t stream)
{
    return !stream->items.empty() && (!stream->items.front().may || stream->items.front().may());
}

/* Some streams go on by some steps, those that wait for nobody. */
void go_on_by_chance()
{
    const int64_t chance = order();
    if (chance < 0) return;
    for (uint64_t bits = (uint64_t)chance >> 24; bits & 3; bits >>= 6) {
        cudaStream_t one = streams[(bits >> 2 & 15) % streams.size()];
        for (uint64_t steps = bits >> 4 & 7; steps > 0 && may_go_on(one); steps--) {
            if (one->items.front().after != NULL && !one->items.front().after->past) break;
            run_one(one);
        }
    }
}

void give(cudaStream_t stream, std::function<void()> act, const void *memory = NULL, size_t bytes = 0)
{
    questioned = NULL;
    stream_of(stream)->items.push_back({std::move(act), NULL, static_cast<const unsigned char *>(memory), bytes, {}});
    go_on_by_chance();
}

bool is_pinned(const void *p, size_t bytes)
{
    const unsigned char *x = static_cast<const unsigned char *>(p);
    const auto next = pinned.upper_bound(x);
    if (next == pinned.begin()) return false;
    const auto one = std::prev(next);
    return bytes <= one->second && (size_t)(x - one->first) <= one->second - bytes;
}
} // namespace

void emulator::give_work(cudaStream_t stream, std::function<void()> act, std::function<bool()> may)
{
    stream_of(stream)->items.push_back({std::move(act), NULL, NULL, 0, std::move(may)});
    go_on_by_chance();
}

void emulator::run_given(cudaStream_t stream)
{
    run_all(stream_of(stream));
}

bool emulator::step(cudaStream_t stream)
{
    if (!may_go_on(stream)) return false;
    const std::shared_ptr<mark> after = stream->items.front().after;
    if (after != NULL && !after->past) return step(after->stream);
    const device_access open;
    run_one(stream);
    return true;
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    *p = NULL;
    if (bytes == 0) return cudaSuccess;
    if (region == NULL && reserve_region() != cudaSuccess) return keep(cudaErrorInitializationError);
    if (bytes > REGION) return keep(cudaErrorMemoryAllocation);
    size_t at = 0; /* first fit */
    for (const auto &one : allocated) {
        if (one.first - at >= whole(bytes)) break;
        at = one.first + whole(one.second);
    }
    if (REGION - at < whole(bytes)) return keep(cudaErrorMemoryAllocation);
    allocated[at] = bytes;
    set_top();
    const allocation_access open(at, bytes);
    memset(region + at, FRESH, bytes);
    memset(region + at + bytes, GUARD, whole(bytes) - bytes);
    *p = region + at;
    emulator::check_allocated(*p, bytes);
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    if (p == NULL) return cudaSuccess;
    if (!emulator::is_device(p)) return keep(cudaErrorInvalidValue);
    const auto one = allocated.find((size_t)(static_cast<unsigned char *>(p) - region));
    if (one == allocated.end()) return keep(cudaErrorInvalidValue);
    wait_for_all_streams();
    {
        const allocation_access open(one->first, one->second);
        for (size_t i = one->second; i < whole(one->second); i++)
            if (region[one->first + i] != GUARD) die("a kernel wrote behind the end of an allocation");
    }
    emulator::check_freed(p, one->second);
    allocated.erase(one);
    set_top();
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **p, size_t bytes)
{
    if (bytes == 0) bytes = 1;
    *p = malloc(bytes);
    if (*p == NULL) return keep(cudaErrorMemoryAllocation);
    memset(*p, FRESH, bytes);
    pinned[static_cast<unsigned char *>(*p)] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p)
{
    if (p == NULL) return cudaSuccess;
    const auto one = pinned.find(static_cast<unsigned char *>(p));
    if (one == pinned.end()) return keep(cudaErrorInvalidValue);
    for (cudaStream_t stream : streams)
        for (const work_item &item : stream->items)
            if (item.host != NULL && item.host < one->first + one->second && item.host + item.host_bytes > one->first)
                die("pinned memory is freed before a copy from or to it was waited for");
    pinned.erase(one);
    free(p);
    return cudaSuccess;
}

namespace
{
void copy_rows(unsigned char *to, size_t to_pitch, const unsigned char *from, size_t from_pitch, size_t width,
               size_t height)
{
    emulator::device_access open;
    for (size_t i = 0; i < height; i++) {
        if (!emulator::is_device(to)) emulator::check_taken("a copy", from + i * from_pitch, width);
        memmove(to + i * to_pitch, from + i * from_pitch, width);
        emulator::check_copied(to + i * to_pitch, from + i * from_pitch, width);
    }
}
} // namespace

/* Of pageable host memory a copy is made at once, and what comes there has come when the call returns: as CUDA says. */
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream)
{
    if (width == 0 || height == 0) return cudaSuccess;
    if (height > 1 && (width > to_pitch || width > from_pitch)) return keep(cudaErrorInvalidValue);
    const size_t to_bytes = (height - 1) * to_pitch + width, from_bytes = (height - 1) * from_pitch + width;
    const int to_device = emulator::is_device(to), from_device = emulator::is_device(from);
    if (kind != cudaMemcpyDefault &&
        (to_device != (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) ||
         from_device != (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice)))
        return keep(cudaErrorInvalidValue);
    if (to == NULL || from == NULL || (to_device && !emulator::is_allocated(to, to_bytes)) ||
        (from_device && !emulator::is_allocated(from, from_bytes)))
        return keep(cudaErrorInvalidValue);
    unsigned char *x = static_cast<unsigned char *>(to);
    const unsigned char *y = static_cast<const unsigned char *>(from);
    if (!from_device && !is_pinned(from, from_bytes)) {
        const auto kept = std::make_shared<std::vector<unsigned char>>(y, y + from_bytes);
        give(stream, [=] { copy_rows(x, to_pitch, kept->data(), from_pitch, width, height); });
    } else {
        const void *memory = !to_device ? to : !from_device ? from : NULL;
        give(
            stream, [=] { copy_rows(x, to_pitch, y, from_pitch, width, height); }, memory,
            to_device ? from_bytes : to_bytes);
    }
    if (!to_device && !is_pinned(to, to_bytes)) wait_for(stream_of(stream));
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, NULL);
    wait_for(&first_stream);
    return error;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream)
{
    if (bytes == 0) return cudaSuccess;
    if (!emulator::is_allocated(p, bytes)) return keep(cudaErrorInvalidValue);
    give(stream, [=] {
        emulator::device_access open;
        memset(p, value, bytes);
        if (value == FRESH) /* work memory is said to be nobody's again */
            emulator::check_allocated(p, bytes);
        else
            emulator::check_filled(p, bytes);
    });
    return cudaSuccess;
}

cudaError_t cudaMemset(void *p, int value, size_t bytes)
{
    const cudaError_t error = cudaMemsetAsync(p, value, bytes, NULL);
    wait_for(&first_stream);
    return error;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    *total = REGION;
    *available = REGION - top;
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------------ threads of a block
 */

namespace
{
#ifdef __SANITIZE_ADDRESS__
const size_t STACK = (size_t)512 << 10; /* variables have margins there */
#else
const size_t STACK = (size_t)64 << 10;
#endif
/* of dynamic shared memory, unasked and at all: what an H100 has, less 8 KiB for what is static */
const size_t SHARED_UNASKED = (size_t)40 << 10, SHARED_MOST = (size_t)219 << 10, SHARED_STATIC = (size_t)8 << 10;
const size_t SHARED_END = (SHARED_MOST + PAGE - 1) / PAGE * PAGE;            /* dynamic shared memory ends here */
std::map<const void *, size_t> &asked = *new std::map<const void *, size_t>; /* by kernel */
const int MOST = 1024, WARP = 32, WARPS = MOST / WARP;

/* Of another GPU, in KiB: LONGSPAN_EMULATOR_SHARED. */
size_t shared_most()
{
    static size_t most = 0;
    if (most == 0) {
        const char *text = getenv("LONGSPAN_EMULATOR_SHARED");
        const size_t wanted = text == NULL ? SHARED_MOST + SHARED_STATIC : strtoull(text, NULL, 10) << 10;
        most = std::min(SHARED_MOST, std::max(wanted, SHARED_UNASKED + SHARED_STATIC) - SHARED_STATIC);
    }
    return most;
}

struct worker {
    void *where[5];   /* of __builtin_setjmp, which saves little: a quarter of a test's time was the library's */
    ucontext_t start; /* until it has begun */
    bool begun;
    const void *stack; /* this and what follows: for AddressSanitizer */
    size_t stack_bytes;
    void *fake;
};

struct thread_state {
    worker *on;
    emulator::collective what;
    unsigned mask;
    uint64_t value; /* given, then what it got */
    int argument, width, line;
    const char *file;
};

struct warp_state {
    unsigned ended, collecting, ready; /* bits of lanes; ready: they wait no more and have not gone on yet */
    unsigned exists;
};

worker host; /* where a launch came from */
std::vector<worker *> &idle = *new std::vector<worker *>;
thread_state thread[MOST];
warp_state warp[WARPS];
int count, started, ended, waiting; /* of the block; waiting: at __syncthreads */
bool at_barrier[MOST];
int barrier_votes, barrier_vote; /* of those who wait; of the last barrier that all have come to */
uint32_t warps_ready;            /* bits of warps with ready lanes */
int current;
const char *kernel_name;
void (*kernel_thread)(void *);
void *kernel_arguments;
unsigned char *shared_pages, *shared_now;

[[noreturn]] void fail(int t, const char *what)
{
    fprintf(stderr, "emulator: kernel %s, block (%u,%u,%u), thread %d of %d: %s\n", kernel_name, blockIdx.x, blockIdx.y,
            blockIdx.z, t, count, what);
    int shown = 0;
    for (int i = 0; i < started && shown < 8; i++) {
        const bool collects = warp[i / WARP].collecting >> i % WARP & 1;
        if (!collects && !at_barrier[i]) continue;
        fprintf(stderr, "  thread %d waits at %s:%d, ", i, thread[i].file, thread[i].line);
        if (collects)
            fprintf(stderr, "a shuffle, vote or __syncwarp of mask %08x\n", thread[i].mask);
        else
            fprintf(stderr, "__syncthreads\n");
        shown++;
    }
    if (ended > 0) fprintf(stderr, "  %d threads have returned\n", ended);
    abort();
}

worker *self, *before; /* who runs now, and who switched to it */

void arrived([[maybe_unused]] void *fake)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &before->stack, &before->stack_bytes);
#endif
}

/* Returns when somebody switches back. */
__attribute__((noinline)) void switch_to(worker *to)
{
    worker *const from = self;
    before = from;
    self = to;
    emulator::checked_stack = to->stack;
    emulator::checked_stack_end = static_cast<const char *>(to->stack) + to->stack_bytes;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to->stack_bytes);
#endif
    if (__builtin_setjmp(from->where) == 0) {
        if (to->begun) __builtin_longjmp(to->where, 1);
        to->begun = true;
        setcontext(&to->start);
    }
    arrived(self->fake);
}

void set_thread(int t)
{
    current = emulator::checked_thread = t;
    const unsigned i = (unsigned)t;
    if (blockDim.y == 1 && blockDim.z == 1)
        threadIdx = {i, 0, 0};
    else
        threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
}

void make_ready(int t)
{
    warp[t / WARP].ready |= 1u << t % WARP;
    warps_ready |= 1u << t / WARP;
}

int take_ready(int w)
{
    const int lane = __builtin_ctz(warp[w].ready);
    warp[w].ready &= ~(1u << lane);
    if (warp[w].ready == 0) warps_ready &= ~(1u << w);
    return w * WARP + lane;
}

void work();

/* apart, since getcontext may return twice as far as the compiler knows */
__attribute__((noinline)) worker *new_stack()
{
    worker *one = new worker();
    void *pages = mmap(NULL, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, PAGE, PROT_NONE) != 0) die("no memory for the stacks of threads");
    void *stack = static_cast<unsigned char *>(pages) + PAGE; /* it grows down, to the page that is closed */
    one->stack = stack;
    one->stack_bytes = STACK;
    static size_t number; /* stacks begin at other places of their pages, or they would share few lines of the cache */
    getcontext(&one->start);
    one->start.uc_stack.ss_sp = stack;
    one->start.uc_stack.ss_size = STACK - number++ % 16 * 256;
    one->start.uc_link = NULL;
    makecontext(&one->start, work, 0);
    return one;
}

worker *take_worker()
{
    if (idle.empty()) return new_stack();
    worker *one = idle.back();
    idle.pop_back();
    return one;
}

/* Who runs now has nothing to do, or its thread waits: somebody else goes on. Returns when it is wanted again: its
 * thread may go on, or, if it is idle, there are threads to start. */
void go_on()
{
    const int w = current / WARP;
    int next = -1;
    if (warp[w].ready != 0)
        next = take_ready(w);
    else if (started < count)
        switch_to(take_worker());
    else if (warps_ready != 0)
        next = take_ready(__builtin_ctz(warps_ready));
    else if (ended == count)
        switch_to(&host);
    else
        fail(current, "no thread can go on");
    if (next >= 0) {
        set_thread(next);
        switch_to(thread[next].on);
    }
}

/* The current thread waits until it is made ready. */
void wait_here()
{
    const int t = current, w = t / WARP;
    if (warp[w].ready >> t % WARP & 1) { /* it was the last to come */
        warp[w].ready &= ~(1u << t % WARP);
        if (warp[w].ready == 0) warps_ready &= ~(1u << w);
        return;
    }
    thread[t].on = self;
    go_on();
}

/* Everybody of `mask` in warp w who is still there waits: tells each what it asked for. */
void complete(int w, unsigned mask)
{
    thread_state *lane = thread + w * WARP;
    const unsigned here = mask & warp[w].collecting;
    uint64_t given[WARP];
    unsigned votes = 0;
    for (unsigned left = here; left != 0; left &= left - 1) {
        const int i = __builtin_ctz(left);
        given[i] = lane[i].value;
        if (given[i] != 0) votes |= 1u << i;
    }
    for (unsigned left = here; left != 0; left &= left - 1) {
        const int i = __builtin_ctz(left), width = lane[i].width, first = i & ~(width - 1);
        int from = i;
        switch (lane[i].what) {
        case emulator::SHUFFLE:
            from = first + (lane[i].argument & (width - 1));
            break;
        case emulator::SHUFFLE_XOR:
            from = i ^ lane[i].argument;
            break;
        case emulator::SHUFFLE_UP:
            from = i - lane[i].argument;
            break;
        case emulator::SHUFFLE_DOWN:
            from = i + lane[i].argument;
            break;
        case emulator::BALLOT:
            lane[i].value = votes;
            continue;
        case emulator::ANY:
            lane[i].value = votes != 0;
            continue;
        case emulator::ALL:
            lane[i].value = votes == here;
            continue;
        case emulator::SYNC:
        case emulator::MEET:
            continue;
        }
        if (from >= first + width || (lane[i].what == emulator::SHUFFLE_UP && from < first)) from = i;
        lane[i].value = here >> from & 1 ? given[from] : ~(uint64_t)0;
    }
    const thread_state &any = lane[__builtin_ctz(here)];
    if (any.what == emulator::SYNC && here == (warp[w].exists & ~warp[w].ended))
        emulator::check_warp(w, any.file, any.line);
    warp[w].collecting &= ~here;
    warp[w].ready |= here;
    warps_ready |= 1u << w;
}

void try_complete(int w, int t)
{
    const thread_state &one = thread[t];
    const unsigned wanted = one.mask & warp[w].exists & ~warp[w].ended;
    if ((wanted & ~warp[w].collecting) != 0) return;
    for (unsigned left = wanted; left != 0; left &= left - 1) {
        const int other = w * WARP + __builtin_ctz(left);
        if (thread[other].mask != one.mask || thread[other].what != one.what)
            fail(other, "the lanes of a mask are at different shuffles or votes, or with different masks");
    }
    complete(w, one.mask);
}

void try_barrier()
{
    if (waiting == 0 || waiting < count - ended) return;
    int first = -1;
    for (int t = 0; t < count; t++) {
        if (!at_barrier[t]) continue;
        if (first < 0) first = t;
        if (thread[t].line != thread[first].line ||
            (thread[t].file != thread[first].file && strcmp(thread[t].file, thread[first].file) != 0))
            fail(t, "threads of a block wait at different __syncthreads");
    }
    for (int t = 0; t < count; t++)
        if (at_barrier[t]) at_barrier[t] = false, make_ready(t);
    waiting = 0;
    barrier_vote = barrier_votes, barrier_votes = 0;
    emulator::check_barrier(thread[first].file, thread[first].line);
}

void run_threads()
{
    while (started < count) {
        set_thread(started++);
        kernel_thread(kernel_arguments);
        ended++;
        const int w = current / WARP;
        warp[w].ended |= 1u << current % WARP;
        if (warp[w].collecting != 0) /* somebody may have waited for this one */
            for (unsigned left = warp[w].collecting; left != 0; left &= left - 1) {
                const int t = w * WARP + __builtin_ctz(left);
                if (warp[w].collecting >> t % WARP & 1) try_complete(w, t);
            }
        try_barrier();
    }
}

void work()
{
    arrived(NULL);
    for (;;) {
        run_threads();
        idle.push_back(self);
        go_on();
    }
}
} // namespace

uint64_t emulator::collect(collective what, unsigned mask, uint64_t value, int argument, int width, const char *file,
                           int line)
{
    const int t = current, w = t / WARP;
    thread_state &me = thread[t];
    me.what = what, me.mask = mask, me.value = value, me.argument = argument, me.width = width;
    me.file = file, me.line = line;
    if (!(mask >> t % WARP & 1)) fail(t, "a thread calls a shuffle or vote whose mask it is not in");
    if (width < 1 || width > WARP || (width & (width - 1)) != 0) fail(t, "the width of a shuffle is not 1, 2, ..., 32");
    warp[w].collecting |= 1u << t % WARP;
    try_complete(w, t);
    wait_here();
    return me.value;
}

/* Returns whether any thread votes for it. */
int emulator::barrier(const char *file, int line, int vote)
{
    const int t = current;
    thread[t].file = file, thread[t].line = line;
    at_barrier[t] = true;
    waiting++;
    barrier_votes |= vote;
    try_barrier();
    wait_here();
    return barrier_vote;
}

unsigned char *emulator::shared_memory()
{
    return shared_now;
}

namespace
{
/* Copies to shared memory that a thread of the block has asked for: those since it last closed a group, and groups. */
struct late_copy {
    void *to;
    const void *from;
    size_t bytes;
    bool exists;
};
struct late_copies {
    std::vector<late_copy> open;
    std::deque<std::vector<late_copy>> groups;
};
late_copies late[MOST];
int late_threads; /* none behind this one has any */

void make(const late_copy &copy)
{
    emulator::check_copy_end(copy.to, copy.bytes);
    if (copy.exists)
        memcpy(copy.to, copy.from, copy.bytes);
    else
        memset(copy.to, 0, copy.bytes);
}

/* A block ends: whoever comes next would wait for its copies. */
void end_copies()
{
    for (int i = 0; i < late_threads; i++) {
        bool some = !late[i].open.empty();
        for (const auto &group : late[i].groups) some = some || !group.empty();
        if (some) die("a block has ended with copies under way");
        late[i].groups.clear();
    }
    late_threads = 0;
}

void run_grid(const char *kernel, void (*call)(void *), void *arguments, size_t bytes, dim3 grid, dim3 block,
              size_t shared)
{
    shared_now = shared_pages + SHARED_END - shared;
    kernel_name = kernel, kernel_thread = call, kernel_arguments = arguments;
    gridDim = grid, blockDim = block;
    count = (int)(block.x * block.y * block.z);
    emulator::device_access open;
    host.begun = true;
    self = &host;
    emulator::check_kernel(kernel, shared_pages, shared_pages + SHARED_END, arguments, bytes);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                memset(shared_now, FRESH, shared);
                started = ended = waiting = current = 0;
                warps_ready = 0;
                emulator::check_block();
                for (int w = 0; w * WARP < count; w++) {
                    const int lanes = count - w * WARP;
                    warp[w] = {};
                    warp[w].exists = lanes >= WARP ? ~0u : (1u << lanes) - 1;
                }
                switch_to(take_worker());
                end_copies();
            }
    emulator::check_end();
}
} // namespace

void emulator::copy_late(void *to, const void *from, size_t bytes, bool exists)
{
    if ((uintptr_t)to % bytes != 0 || (uintptr_t)from % bytes != 0 || !is_allocated(from, exists ? bytes : 1))
        die("an asynchronous copy is not aligned, or not from device memory");
    const late_copy copy = {to, from, bytes, exists};
    check_copy(to, exists ? from : NULL, bytes);
    if (at_once_by_chance())
        make(copy);
    else
        late[threadIdx.x].open.push_back(copy);
    late_threads = std::max(late_threads, (int)threadIdx.x + 1);
}

void emulator::close_copies()
{
    late_copies &mine = late[threadIdx.x];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
    late_threads = std::max(late_threads, (int)threadIdx.x + 1);
}

void emulator::wait_for_copies(size_t but)
{
    for (auto &groups = late[threadIdx.x].groups; groups.size() > but; groups.pop_front())
        for (const late_copy &copy : groups.front()) make(copy);
}

void emulator::run(const char *name, const void *kernel, void (*call)(void *), void *arguments, size_t bytes,
                   void (*forget)(void *), dim3 grid, dim3 block, size_t shared, cudaStream_t stream)
{
    const std::shared_ptr<void> kept(arguments, forget);
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (threads < 1 || block.x > MOST || block.y > MOST || block.z > 64 || threads > MOST || grid.x < 1 || grid.y < 1 ||
        grid.z < 1 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        keep(cudaErrorInvalidConfiguration);
        return;
    }
    const auto has = asked.find(kernel);
    if (shared > (has == asked.end() ? SHARED_UNASKED : std::max(SHARED_UNASKED, has->second))) {
        keep(cudaErrorInvalidValue);
        return;
    }
    if (shared_pages == NULL) {
        void *pages = mmap(NULL, SHARED_END + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) die("no memory for shared memory");
        shared_pages = static_cast<unsigned char *>(pages);
        if (mprotect(shared_pages + SHARED_END, PAGE, PROT_NONE) != 0) die("mprotect of shared memory failed");
    }
    shared = round_up(shared, 16);
    give(stream, [=] { run_grid(name, call, kept.get(), bytes, grid, block, shared); });
}

/* ------------------------------------------------------------------------------------------------ the runtime */

cudaError_t cudaGetDeviceCount(int *devices)
{
    *devices = 1;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : keep(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}

/* One for all processes, or each its own. */
cudaError_t cudaDeviceGetPCIBusId(char *name, int bytes, int device)
{
    if (device != 0) return keep(cudaErrorInvalidDevice);
    snprintf(name, (size_t)bytes, "%08x:00:00.0", getenv("LONGSPAN_EMULATOR_GPUS") != NULL ? (unsigned)getpid() : 0u);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device)
{
    if (device != 0) return keep(cudaErrorInvalidDevice);
    *properties = {};
    strcpy(properties->name, "emulated on the CPU");
    properties->totalGlobalMem = REGION;
    properties->sharedMemPerBlock = SHARED_UNASKED + SHARED_STATIC;
    properties->sharedMemPerBlockOptin = shared_most() + SHARED_STATIC;
    properties->warpSize = WARP;
    properties->maxThreadsPerBlock = MOST;
    properties->major = 9;
    properties->multiProcessorCount = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, device);
    if (error != cudaSuccess) return keep(error);
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? properties.major : (int)properties.sharedMemPerBlockOptin;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || (size_t)value > shared_most())
        return keep(cudaErrorInvalidValue);
    asked[kernel] = (size_t)value;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize()
{
    wait_for_all_streams();
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetLastError()
{
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError()
{
    return last_error;
}

const char *cudaGetErrorName(cudaError_t error)
{
    switch (error) {
    case cudaSuccess:
        return "cudaSuccess";
    case cudaErrorInvalidValue:
        return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
        return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
        return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
        return "cudaErrorInvalidDevice";
    default:
        return "cudaErrorUnknown";
    }
}

const char *cudaGetErrorString(cudaError_t error)
{
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInvalidConfiguration:
        return "invalid configuration argument";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    default:
        return "an error of the emulator";
    }
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int)
{
    *stream = new CUstream_st{flags, {}};
    streams.push_back(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    wait_for(stream);
    std::erase(streams, stream);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    wait_for(stream_of(stream));
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    if (event->last != NULL) stream_of(stream)->items.push_back({NULL, event->last, NULL, 0, {}});
    go_on_by_chance();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    *event = new CUevent_st();
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    const auto now = std::make_shared<mark>(mark{stream_of(stream), false, {}});
    event->last = now;
    give(stream, [now] {
        now->past = true;
        clock_gettime(CLOCK_MONOTONIC, &now->at);
    });
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    if (event->last == NULL || event->last->past) return cudaSuccess;
    waits++;
    run_until(*event->last);
    return cudaSuccess;
}

/* Who asks again and again sees it come. */
cudaError_t cudaEventQuery(cudaEvent_t event)
{
    if (event->last == NULL || event->last->past) return cudaSuccess;
    waits += questioned == event->last.get() && !questioned_again;
    questioned_again = questioned == event->last.get();
    questioned = event->last.get();
    emulator::step(event->last->stream);
    return event->last->past ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    if (from->last == NULL || to->last == NULL) return keep(cudaErrorInvalidResourceHandle);
    if (!from->last->past || !to->last->past) return keep(cudaErrorNotReady);
    const struct timespec a = from->last->at, b = to->last->at;
    *ms = (float)((double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) * 1e-6);
    return cudaSuccess;
}

uint64_t emulator_host_waits()
{
    return waits;
}

/* ------------------------------------------------------------------------------------------------ cuBLAS */

struct cublasContext {
    cudaStream_t stream;
    cublasMath_t mode;
};

cublasStatus_t cublasCreate(cublasHandle_t *handle)
{
    openblas_set_num_threads(1); /* its other threads may not touch device memory; and results are always the same */
    *handle = new cublasContext{NULL, CUBLAS_DEFAULT_MATH};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy(cublasHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream)
{
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode)
{
    handle->mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusString(cublasStatus_t status)
{
    return status == CUBLAS_STATUS_SUCCESS         ? "CUBLAS_STATUS_SUCCESS"
           : status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
                                                   : "an error of the emulated cuBLAS";
}

namespace
{
void gemm(CBLAS_TRANSPOSE a_is, CBLAS_TRANSPOSE b_is, int m, int n, int k, float alpha, const float *a, int lda,
          const float *b, int ldb, float beta, float *c, int ldc)
{
    cblas_sgemm(CblasColMajor, a_is, b_is, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void gemm(CBLAS_TRANSPOSE a_is, CBLAS_TRANSPOSE b_is, int m, int n, int k, double alpha, const double *a, int lda,
          const double *b, int ldb, double beta, double *c, int ldc)
{
    cblas_dgemm(CblasColMajor, a_is, b_is, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

/* columns of `rows` numbers, ld apart, in live device memory */
template <typename T> bool fits(const T *x, int64_t rows, int64_t columns, int64_t ld, int64_t stride, int batch)
{
    return emulator::is_allocated(x, (size_t)((columns - 1) * ld + rows) * sizeof *x) &&
           emulator::is_allocated(x + (batch - 1) * stride, (size_t)((columns - 1) * ld + rows) * sizeof *x);
}

template <typename T> void check_columns(const T *x, int rows, int columns, int ld)
{
    for (int j = 0; j < columns; j++) emulator::check_taken("cuBLAS", x + (int64_t)j * ld, (size_t)rows * sizeof *x);
}

/* A matrix as OpenBLAS takes it: as it is, or rounded, in memory that lives as long as the batch. */
struct as_it_is {
    template <typename T> const T *operator()(const T *x, int, int, int, std::vector<T> &) const
    {
        return x;
    }
};
struct as_tf32 {
    const float *operator()(const float *x, int rows, int columns, int ld, std::vector<float> &room) const
    {
        room.resize((size_t)columns * (size_t)ld);
        for (int j = 0; j < columns; j++)
            for (int i = 0; i < rows; i++) {
                const size_t at = (size_t)j * (size_t)ld + (size_t)i;
                uint32_t bits;
                memcpy(&bits, x + at, sizeof bits);
                if (x[at] == x[at]) bits = (bits + 0xfff + (bits >> 13 & 1)) & ~(uint32_t)0x1fff;
                memcpy(&room[at], &bits, sizeof bits);
            }
        return room.data();
    }
};
struct as_bf16 {
    const float *operator()(const __nv_bfloat16 *x, int rows, int columns, int ld, std::vector<float> &room) const
    {
        room.resize((size_t)columns * (size_t)ld);
        for (int j = 0; j < columns; j++)
            for (int i = 0; i < rows; i++) {
                const size_t at = (size_t)j * (size_t)ld + (size_t)i;
                room[at] = __bfloat162float(x[at]);
            }
        return room.data();
    }
};

/* C where OpenBLAS can add to it, and back: as it is, or by way of floats where it lies in bfloat16. */
template <typename T> T *open_matrix(T *c, int, int, int, std::vector<T> &)
{
    return c;
}
template <typename T> void close_matrix(T *, int, int, int, const T *) {}
float *open_matrix(__nv_bfloat16 *c, int rows, int columns, int ld, std::vector<float> &room)
{
    as_bf16()(c, rows, columns, ld, room);
    return room.data();
}
void close_matrix(__nv_bfloat16 *c, int rows, int columns, int ld, const float *from)
{
    for (int j = 0; j < columns; j++)
        for (int i = 0; i < rows; i++) {
            const size_t at = (size_t)j * (size_t)ld + (size_t)i;
            c[at] = __float2bfloat16(from[at]);
        }
}

template <typename E, typename T, typename C, typename F>
cublasStatus_t batch_of(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                        const T *alpha, const E *a, int lda, int64_t stride_a, const E *b, int ldb, int64_t stride_b,
                        const T *beta, C *c, int ldc, int64_t stride_c, int batch, F taken)
{
    const int a_rows = op_a == CUBLAS_OP_N ? m : k, b_rows = op_b == CUBLAS_OP_N ? k : n;
    if (m < 0 || n < 0 || k < 0 || batch < 0 || lda < (a_rows > 1 ? a_rows : 1) || ldb < (b_rows > 1 ? b_rows : 1) ||
        ldc < (m > 1 ? m : 1) || alpha == NULL || beta == NULL)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (batch > 65535) return CUBLAS_STATUS_NOT_SUPPORTED; /* the real one may do more, and need not */
    if (m == 0 || n == 0 || batch == 0) return CUBLAS_STATUS_SUCCESS;
    if (!fits(c, m, n, ldc, stride_c, batch) ||
        (k > 0 && !(fits(a, a_rows, op_a == CUBLAS_OP_N ? k : m, lda, stride_a, batch) &&
                    fits(b, b_rows, op_b == CUBLAS_OP_N ? n : k, ldb, stride_b, batch))))
        return CUBLAS_STATUS_EXECUTION_FAILED; /* the real one would write anywhere, or fault */
    const T by = *alpha, keeps = *beta;        /* the host's, which may be gone later */
    give(handle->stream, [=] {
        const emulator::device_access open;
        std::vector<T> room_a, room_b, room_c;
        for (int i = 0; i < batch; i++) {
            C *ci = c + i * stride_c;
            if (k > 0) check_columns(a + i * stride_a, a_rows, op_a == CUBLAS_OP_N ? k : m, lda);
            if (k > 0) check_columns(b + i * stride_b, b_rows, op_b == CUBLAS_OP_N ? n : k, ldb);
            if (keeps != 0) check_columns(ci, m, n, ldc);
            for (int j = 0; j < n; j++) {
                C *column = ci + (int64_t)j * ldc;
                if (keeps == 0) memset(column, 0, (size_t)m * sizeof *ci);
                emulator::check_filled(column, (size_t)m * sizeof *ci);
            }
            T *to = open_matrix(ci, m, n, ldc, room_c);
            gemm(op_a == CUBLAS_OP_N ? CblasNoTrans : CblasTrans, op_b == CUBLAS_OP_N ? CblasNoTrans : CblasTrans, m, n,
                 k, by, taken(a + i * stride_a, a_rows, op_a == CUBLAS_OP_N ? k : m, lda, room_a), lda,
                 taken(b + i * stride_b, b_rows, op_b == CUBLAS_OP_N ? n : k, ldb, room_b), ldb, keeps, to, ldc);
            close_matrix(ci, m, n, ldc, to);
        }
    });
    return CUBLAS_STATUS_SUCCESS;
}
} // namespace

#define GEMM(name, T)                                                                                                  \
    cublasStatus_t cublas##name##gemm(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,    \
                                      int n, int k, const T *alpha, const T *a, int lda, const T *b, int ldb,          \
                                      const T *beta, T *c, int ldc)                                                    \
    {                                                                                                                  \
        return batch_of(handle, op_a, op_b, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c, ldc, 0, 1, as_it_is());     \
    }                                                                                                                  \
    cublasStatus_t cublas##name##gemmStridedBatched(                                                                   \
        cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k, const T *alpha,    \
        const T *a, int lda, long long stride_a, const T *b, int ldb, long long stride_b, const T *beta, T *c,         \
        int ldc, long long stride_c, int batch)                                                                        \
    {                                                                                                                  \
        return batch_of(handle, op_a, op_b, m, n, k, alpha, a, lda, stride_a, b, ldb, stride_b, beta, c, ldc,          \
                        stride_c, batch, as_it_is());                                                                  \
    }
GEMM(S, float)
GEMM(D, double)

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                                          int n, int k, const void *alpha, const void *a, cudaDataType a_type, int lda,
                                          long long stride_a, const void *b, cudaDataType b_type, int ldb,
                                          long long stride_b, const void *beta, void *c, cudaDataType c_type, int ldc,
                                          long long stride_c, int batch, cublasComputeType_t compute, cublasGemmAlgo_t)
{
    const float *by = static_cast<const float *>(alpha), *keeps = static_cast<const float *>(beta);
    float *to = static_cast<float *>(c);
    if (a_type != b_type || (c_type != CUDA_R_32F && (c_type != CUDA_R_16BF || a_type != CUDA_R_16BF)))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (c_type == CUDA_R_16BF && compute == CUBLAS_COMPUTE_32F)
        return batch_of(handle, op_a, op_b, m, n, k, by, static_cast<const __nv_bfloat16 *>(a), lda, stride_a,
                        static_cast<const __nv_bfloat16 *>(b), ldb, stride_b, keeps, static_cast<__nv_bfloat16 *>(c),
                        ldc, stride_c, batch, as_bf16());
    if (a_type == CUDA_R_16BF && compute == CUBLAS_COMPUTE_32F)
        return batch_of(handle, op_a, op_b, m, n, k, by, static_cast<const __nv_bfloat16 *>(a), lda, stride_a,
                        static_cast<const __nv_bfloat16 *>(b), ldb, stride_b, keeps, to, ldc, stride_c, batch,
                        as_bf16());
    if (a_type == CUDA_R_32F && compute == CUBLAS_COMPUTE_32F_FAST_TF32)
        return batch_of(handle, op_a, op_b, m, n, k, by, static_cast<const float *>(a), lda, stride_a,
                        static_cast<const float *>(b), ldb, stride_b, keeps, to, ldc, stride_c, batch, as_tf32());
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType a_type, int lda, const void *b,
                            cudaDataType b_type, int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm)
{
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0, beta, c,
                                      c_type, ldc, 0, 1, compute, algorithm);
}

/* ------------------------------------------------------------------------------------------------ other ranks */

/* A rank that waits for others asks again and again, and calls this between (mpi_yield_when_idle of Open MPI). Others
 * work for milliseconds: the processors are theirs meanwhile if it sleeps, and hardly if it only lets them go first. */
extern "C" int sched_yield(void) noexcept
{
    const struct timespec some = {0, 20000};
    return nanosleep(&some, NULL);
}
