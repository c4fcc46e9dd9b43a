/* See checks.h. An access has a time: how many barriers there were in its block, of all kinds. */
#include "checks.h"

#include <cuda_runtime.h>

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <initializer_list>

int emulator::checked_thread;
const void *emulator::checked_stack, *emulator::checked_stack_end;

namespace
{
const uint32_t WARP = 32, WARPS = 32;

/* Who has read: one thread, or since the last barrier that orders them several of a warp, of a block, of the grid. Who
 * has written: one, or one is about to, by a copy. */
enum : uint8_t { ONE, OF_WARP, OF_BLOCK, OF_GRID };
enum : uint8_t { WRITTEN, UNDER_WAY };

/* block: a number that no other block has, 0: nobody. */
struct access {
    uint32_t block, time : 20, thread : 10, kind : 2;
};
const uint32_t MOST_BARRIERS = (1 << 20) - 1;
static_assert(sizeof(access) == sizeof(uint64_t), "one word is compared with another");
struct history {
    access write, read; /* the last write, and reads after it */
};

/* Words [from, end) of memory. What is kept of a word is kept of each of its bytes once they are not used together. Of
 * these tables only the pages that are asked for exist. */
const size_t WORD = 4;
struct part {
    const char *name;
    uintptr_t from, end;
    history *word, *byte;
    uint8_t *apart; /* of words: what is kept is that of bytes */
    uint8_t *state; /* of bytes; only that of device memory is asked for */
};
part device = {"device", 0, 0, NULL, NULL, NULL, NULL}, dynamic = {"dynamic shared", 0, 0, NULL, NULL, NULL, NULL},
     fixed = {"static shared", 0, 0, NULL, NULL, NULL, NULL};
const part elsewhere = {"the host's", 0, UINTPTR_MAX, NULL, NULL, NULL, NULL};
enum : uint8_t { NOWHERE, FRESH, FULL }; /* not allocated, allocated and not yet written, written */

bool on;
const char *kernel_name;
uint32_t first_block, block, time_now, barrier_time, warp_time[WARPS];

uintptr_t arguments, arguments_end; /* of the kernel */

/* What is constant in the program, then its own variables, among which are __shared__ arrays. */
extern "C" char __executable_start, __data_start, _end;

template <typename T> T *empty_table(size_t count)
{
    void *pages =
        mmap(NULL, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) emulator::die("no memory to watch accesses");
    return static_cast<T *>(pages);
}

uintptr_t number(const void *p)
{
    return reinterpret_cast<uintptr_t>(p);
}

void watch(part *s, const void *from, const void *end)
{
    if (s->word != NULL) return;
    s->from = number(from) / WORD * WORD, s->end = number(end);
    const size_t bytes = s->end - s->from + WORD;
    s->word = empty_table<history>(bytes / WORD), s->byte = empty_table<history>(bytes);
    s->apart = empty_table<uint8_t>(bytes / WORD), s->state = empty_table<uint8_t>(bytes);
}

inline bool is_in(const part &s, uintptr_t at)
{
    return at - s.from < s.end - s.from;
}

/* Most of what is asked for is on a thread's stack, NULL. */
inline const part *part_of(uintptr_t at)
{
    return is_in(dynamic, at) ? &dynamic : is_in(device, at) ? &device : is_in(fixed, at) ? &fixed : NULL;
}

/* What is known of the bytes of an allocation; NULL of host memory. */
uint8_t *state_of(const void *p)
{
    return is_in(device, number(p)) ? device.state + (number(p) - device.from) : NULL;
}

void tell(const part *s, uintptr_t at, const char *what)
{
    fprintf(stderr, "emulator: kernel %s, block (%u,%u,%u): thread %d %s byte %zu of %s memory, ", kernel_name,
            blockIdx.x, blockIdx.y, blockIdx.z, emulator::checked_thread, what, (size_t)(at - s->from), s->name);
}

[[noreturn]] void stop(const void *where)
{
    Dl_info of;
    const bool known = dladdr(where, &of) != 0;
    fprintf(stderr, " (addr2line -ifCe %s %#zx)\n", known ? of.dli_fname : "PROGRAM",
            (size_t)(number(where) - (known ? number(of.dli_fbase) : 0) - 1));
    abort();
}

[[noreturn]] void stop_race(const part *s, uintptr_t at, const char *mine, const access &other, const char *theirs,
                            const void *where)
{
    tell(s, at, mine);
    if (other.kind == OF_GRID || other.block != block)
        fprintf(stderr, "which another block %s", theirs);
    else
        fprintf(stderr, "which thread %d %s, with no barrier between", (int)other.thread, theirs);
    stop(where);
}

/* Whether what a thread of this block did is past, as the current thread sees it. */
bool is_before(const access &a)
{
    const uint32_t mine = (uint32_t)emulator::checked_thread;
    if (a.time <= barrier_time) return true;
    if (a.kind == OF_BLOCK || a.thread / WARP != mine / WARP) return false;
    return a.time <= warp_time[mine / WARP] || (a.kind == ONE && a.thread == mine);
}

/* Whether it may happen together with what the current thread does. */
bool is_beside(const part *s, const access &a)
{
    if (a.block < first_block) return false;
    if (a.kind == OF_GRID) return true;
    return a.block != block ? s == &device : !is_before(a);
}

access now(uint8_t kind)
{
    return {block, time_now & MOST_BARRIERS, (uint32_t)emulator::checked_thread % (WARP * WARPS), kind % 4u};
}

bool is_same(const access &a, const access &b)
{
    return memcmp(&a, &b, sizeof a) == 0;
}

/* Whether `mine` is one more of several readers: another of them was no nearer to the last write, and might read. */
inline bool is_one_of(const access &readers, const access &mine)
{
    if (readers.kind == OF_GRID) return readers.block >= first_block;
    return readers.block == mine.block && readers.time == mine.time &&
           (readers.kind == OF_BLOCK || (readers.kind == OF_WARP && readers.thread / WARP == mine.thread / WARP));
}

/* Against the last write. */
inline void check(const part *s, uintptr_t at, const history *h, const char *mine, const void *where)
{
    access last = h->write;
    if (last.block < first_block || (last.block == block && last.time <= barrier_time && last.kind == WRITTEN)) return;
    const bool under_way = last.kind == UNDER_WAY && last.block == block;
    last.kind = ONE;
    if (under_way) stop_race(s, at, mine, last, "has copied to, and not waited for", where);
    if (is_beside(s, last)) stop_race(s, at, mine, last, "has written", where);
}

/* f(history, address, bytes) of each word of [at, at + bytes), or of bytes where they are apart or not all are meant.
 */
template <typename F> void for_words(const part *s, uintptr_t at, size_t bytes, F f)
{
    while (bytes > 0) {
        const size_t word = (at - s->from) / WORD, first = word * WORD;
        history *each = s->byte + first;
        const bool whole = at - s->from == first && bytes >= WORD;
        if (whole && !s->apart[word]) {
            f(s->word[word], at, WORD);
            at += WORD, bytes -= WORD;
            continue;
        }
        if (!s->apart[word]) {
            for (size_t i = 0; i < WORD; i++) each[i] = s->word[word];
            s->apart[word] = 1;
        }
        for (size_t i = at - s->from - first; i < WORD && bytes > 0; i++, at++, bytes--) f(each[i], at, (size_t)1);
    }
}

void check_state(const part *s, uintptr_t at, size_t bytes, uint8_t least, const char *mine, const void *where)
{
    if (s != &device) return;
    const uint8_t *state = s->state + (at - s->from);
    const uint32_t all = FULL * 0x01010101u;
    for (uint32_t four; bytes >= sizeof four; state += sizeof four, at += sizeof four, bytes -= sizeof four) {
        memcpy(&four, state, sizeof four);
        if (four != all) break;
    }
    for (size_t i = 0; i < bytes; i++) {
        if (state[i] >= least) continue;
        tell(s, at + i, mine);
        fputs(state[i] == FRESH ? "which nobody has written" : "which is not allocated", stderr);
        stop(where);
    }
}

void read(const part *s, uintptr_t at, size_t bytes, const void *where)
{
    check_state(s, at, bytes, FULL, "reads", where);
    const access mine = now(ONE);
    for_words(s, at, bytes, [&](history &h, uintptr_t here, size_t) {
        access *last = &h.read;
        if (is_same(*last, mine) || is_one_of(*last, mine)) return;
        check(s, here, &h, "reads", where);
        if (s == &device && last->block >= first_block && last->block != block)
            *last = now(OF_GRID);
        else if (last->block != block || is_before(*last))
            *last = mine;
        else if (last->kind <= OF_WARP && last->thread / WARP == mine.thread / WARP)
            *last = now(OF_WARP);
        else
            *last = now(OF_BLOCK);
    });
}

void write(const part *s, uintptr_t at, size_t bytes, uint8_t kind, const void *where)
{
    check_state(s, at, bytes, FRESH, "writes", where);
    for_words(s, at, bytes, [&](history &h, uintptr_t here, size_t n) {
        check(s, here, &h, "writes", where);
        if (is_beside(s, h.read)) stop_race(s, here, "writes", h.read, "has read", where);
        h.write = now(kind);
        h.read = {};
        memset(s->state + (here - s->from), FULL, n);
    });
}

/* Of what is in no part: the thread's own variables, or else what it may only read. */
inline bool is_own(uintptr_t at)
{
    return at >= number(emulator::checked_stack) && at < number(emulator::checked_stack_end);
}

inline bool is_given(uintptr_t at)
{
    return (at >= arguments && at < arguments_end) || (at >= number(&__executable_start) && at < number(&__data_start));
}

[[noreturn]] void stop_elsewhere(uintptr_t at, const char *mine, const void *where)
{
    tell(&elsewhere, at, mine);
    fputs("which a kernel cannot reach", stderr);
    stop(where);
}

inline void read(uintptr_t at, size_t bytes, const void *where)
{
    const part *s = part_of(at);
    if (s != NULL)
        read(s, at, bytes, where);
    else if (!is_own(at) && !is_given(at))
        stop_elsewhere(at, "reads", where);
}

inline void write(uintptr_t at, size_t bytes, uint8_t kind, const void *where)
{
    const part *s = part_of(at);
    if (s != NULL)
        write(s, at, bytes, kind, where);
    else if (!is_own(at))
        stop_elsewhere(at, "writes", where);
}

void stop_unaligned(uintptr_t at, size_t bytes, const void *where)
{
    const part *s = part_of(at);
    if (s == NULL) return;
    tell(s, at, "reads or writes");
    fprintf(stderr, "on no boundary of %zu", bytes);
    stop(where);
}

template <size_t BYTES> inline void check_aligned(const void *at, const void *where)
{
    if (number(at) % BYTES != 0) stop_unaligned(number(at), BYTES, where);
}

uint32_t next_time()
{
    if (time_now == MOST_BARRIERS) emulator::die("there were more barriers in a block than can be counted");
    return time_now++;
}

/* LONGSPAN_EMULATOR_WITHOUT=FILE:LINE: this barrier orders nothing. What is found then is what it is for; where nothing
 * is, it can go, or no test needs it. */
bool is_without(const char *file, int line)
{
    static const char *const text = getenv("LONGSPAN_EMULATOR_WITHOUT");
    if (text == NULL) return false;
    const char *colon = strrchr(text, ':'), *name = strrchr(file, '/');
    name = name == NULL ? file : name + 1;
    const size_t length = colon == NULL ? 0 : (size_t)(colon - text);
    return length > 0 && atoi(colon + 1) == line && strncmp(name, text, length) == 0 && name[length] == 0;
}
} // namespace

void emulator::check_memory(const void *region, const void *end)
{
    watch(&device, region, end);
}

void emulator::check_allocated(const void *p, size_t bytes)
{
    memset(state_of(p), FRESH, bytes);
}

void emulator::check_freed(const void *p, size_t bytes)
{
    memset(state_of(p), NOWHERE, bytes);
}

void emulator::check_filled(const void *p, size_t bytes)
{
    uint8_t *state = state_of(p);
    if (state != NULL) memset(state, FULL, bytes);
}

void emulator::check_copied(const void *to, const void *from, size_t bytes)
{
    uint8_t *state = state_of(to);
    const uint8_t *other = state_of(from);
    if (state != NULL && other != NULL)
        memmove(state, other, bytes);
    else
        check_filled(to, bytes);
}

void emulator::check_taken(const char *who, const void *from, size_t bytes)
{
    const uint8_t *state = state_of(from);
    for (size_t i = 0; state != NULL && i < bytes; i++)
        if (state[i] != FULL) {
            fprintf(stderr, "emulator: %s reads byte %zu of device memory, which nobody has written\n", who,
                    (size_t)(state + i - device.state));
            abort();
        }
}

void emulator::check_kernel(const char *name, const void *shared, const void *shared_end, const void *given,
                            size_t bytes)
{
    kernel_name = name;
    arguments = number(given), arguments_end = arguments + bytes;
    watch(&dynamic, shared, shared_end);
    watch(&fixed, &__data_start, &_end);
    first_block = block + 1;
    on = true;
}

void emulator::check_block()
{
    if (++block == 0) die("there were more blocks than can be counted");
    time_now = 1, barrier_time = 0;
    for (uint32_t &time : warp_time) time = 0;
}

void emulator::check_barrier(const char *file, int line)
{
    if (is_without(file, line)) return;
    barrier_time = next_time();
}

void emulator::check_warp(int warp, const char *file, int line)
{
    if (is_without(file, line)) return;
    warp_time[warp] = next_time();
}

void emulator::check_end()
{
    on = false;
}

void emulator::check_read(const void *from, size_t bytes)
{
    if (on) read(number(from), bytes, __builtin_return_address(0));
}

void emulator::check_copy(const void *to, const void *from, size_t bytes)
{
    if (from != NULL) read(number(from), bytes, __builtin_return_address(0));
    write(number(to), bytes, UNDER_WAY, __builtin_return_address(0));
}

void emulator::check_copy_end(const void *to, size_t bytes)
{
    const part *s = part_of(number(to));
    if (s != NULL) for_words(s, number(to), bytes, [&](history &h, uintptr_t, size_t) { h.write = now(WRITTEN); });
}

/* ---- what the compiler calls */
#define ACCESS(name, act)                                                                                              \
    extern "C" void __tsan_##name(void *at);                                                                           \
    void __tsan_##name(void *at)                                                                                       \
    {                                                                                                                  \
        const void *where = __builtin_return_address(0);                                                               \
        if (on) act;                                                                                                   \
    }
#define ACCESSES(bytes)                                                                                                \
    ACCESS(read##bytes, (check_aligned<bytes>(at, where), read(number(at), bytes, where)))                             \
    ACCESS(write##bytes, (check_aligned<bytes>(at, where), write(number(at), bytes, WRITTEN, where)))                  \
    ACCESS(unaligned_read##bytes, read(number(at), bytes, where))                                                      \
    ACCESS(unaligned_write##bytes, write(number(at), bytes, WRITTEN, where))                                           \
    ACCESS(volatile_read##bytes, read(number(at), bytes, where))                                                       \
    ACCESS(volatile_write##bytes, write(number(at), bytes, WRITTEN, where))
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

extern "C" {
void __tsan_init(void);
void __tsan_vptr_update(void **, void *);
void __tsan_read_range(void *, size_t);
void __tsan_write_range(void *, size_t);
}
void __tsan_init() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_read_range(void *at, size_t bytes)
{
    if (on) read(number(at), bytes, __builtin_return_address(0));
}
void __tsan_write_range(void *at, size_t bytes)
{
    if (on) write(number(at), bytes, WRITTEN, __builtin_return_address(0));
}
