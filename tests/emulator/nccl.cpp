/* The emulated NCCL: what it promises is said in nccl.h.
 *
 * A communicator is made by way of rank 0, whose place in MPI_COMM_WORLD is its address: each rank tells it its own,
 * and gets those of all. From then on ranks send to each other, in the order of their calls. */
#include <nccl.h>

#include "streams.h"

#define OMPI_SKIP_MPICXX 1 /* the C functions alone */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

#include <list>
#include <memory>
#include <vector>

namespace
{
enum { FIRST_TAG = 4096, MOST_WORLD = 1024, QUESTIONS = 2, PIECE = 64 };

/* The address of a communicator, in an ncclUniqueId. */
struct address {
    int world, tag;
};

/* One message. Of a sum there are one to and one from each other rank. */
struct message {
    unsigned char *memory;
    int peer;
    bool receive;
    std::vector<unsigned char> bytes; /* sent, or received */
    MPI_Request request;
};
typedef std::list<message> messages;

/* What a communicator is: its work on streams holds on to it. */
struct connection {
    int rank, size, tag;
    std::vector<int> world; /* of each rank */
    bool connected, given_up, lost, stuck;
    int hello, missing; /* of rank 0 until it is connected */
    MPI_Request request;
    int questions; /* that are answered by ncclInProgress */
    int groups;
    int under_way; /* groups and sums that the stream is not past */
    cudaStream_t stream;
    messages leaving; /* sends that MPI may still read */
};

struct fault {
    int rank, after;
    char what[16];
};

/* NULL: there is none. */
const fault *fault_asked_for()
{
    static fault one = {-1, 0, ""};
    static int known = 0;
    const char *text = getenv("LONGSPAN_EMULATOR_NCCL");
    if (!known && text != NULL && sscanf(text, "%d:%d:%15s", &one.rank, &one.after, one.what) != 3)
        emulator::die("LONGSPAN_EMULATOR_NCCL is not RANK:GROUP:lost or RANK:GROUP:stuck");
    known = 1;
    return one.rank < 0 ? NULL : &one;
}

size_t size_of(ncclDataType_t type)
{
    return type == ncclUint8 ? 1 : type == ncclFloat ? sizeof(float) : sizeof(double);
}

/* A call of a group that has not ended, or alone. */
struct call {
    std::shared_ptr<connection> c;
    cudaStream_t stream;
    unsigned char *to;
    const unsigned char *from;
    size_t count;
    ncclDataType_t type;
    int peer; /* -1: a sum */
};
std::vector<call> waiting; /* for the end of the group */
int depth;

void check_length(const message &m, const MPI_Status &status)
{
    int bytes = 0;
    MPI_Get_count(&status, MPI_BYTE, &bytes);
    if (m.receive && (size_t)bytes != m.bytes.size())
        emulator::die("NCCL: a message is shorter than its receiver says");
}

bool is_through(message &m)
{
    int through = 0;
    MPI_Status status;
    if (m.request == MPI_REQUEST_NULL) return true;
    MPI_Test(&m.request, &through, &status);
    if (through) check_length(m, status);
    return through;
}

void wait_for_message(message &m)
{
    MPI_Status status;
    if (m.request == MPI_REQUEST_NULL) return;
    MPI_Wait(&m.request, &status);
    check_length(m, status);
}

/* The message goes to the ranks' MPI; a receiver's later calls come after it. */
void start(const connection &c, message &m)
{
    void *bytes = m.bytes.data();
    if (m.receive)
        MPI_Irecv(bytes, (int)m.bytes.size(), MPI_BYTE, c.world[(size_t)m.peer], c.tag, MPI_COMM_WORLD, &m.request);
    else
        MPI_Isend(bytes, (int)m.bytes.size(), MPI_BYTE, c.world[(size_t)m.peer], c.tag, MPI_COMM_WORLD, &m.request);
}

/* ------------------------------------------------------------------------------------------------ connecting */

void tell_all(connection &c)
{
    for (int r = 1; r < c.size; r++)
        MPI_Send(c.world.data(), c.size, MPI_INT, c.world[(size_t)r], c.tag, MPI_COMM_WORLD);
    c.connected = true;
}

void go_on_connecting(connection &c)
{
    int through = 0;
    MPI_Status status;
    MPI_Test(&c.request, &through, &status);
    if (!through) return;
    if (c.rank > 0) {
        c.connected = true;
        return;
    }
    c.world[(size_t)c.hello] = status.MPI_SOURCE;
    if (--c.missing == 0)
        tell_all(c);
    else
        MPI_Irecv(&c.hello, 1, MPI_INT, MPI_ANY_SOURCE, c.tag, MPI_COMM_WORLD, &c.request);
}

/* ------------------------------------------------------------------------------------------------ messages */

/* Whether sends still are what they were when they left. */
void check_sent(const messages &sent)
{
    const emulator::device_access open;
    for (const message &m : sent)
        if (!m.receive && memcmp(m.memory, m.bytes.data(), m.bytes.size()) != 0)
            emulator::die("NCCL: what is sent was written to before the stream was past the message");
}

void deliver(const messages &all)
{
    const emulator::device_access open;
    for (const message &m : all) {
        if (!m.receive) continue;
        memcpy(m.memory, m.bytes.data(), m.bytes.size());
        emulator::check_filled(m.memory, m.bytes.size());
    }
}

template <typename T> void add_up(const connection &c, const messages &all, T *to, size_t count)
{
    const emulator::device_access open;
    std::vector<const T *> from((size_t)c.size, to);
    for (const message &m : all)
        if (m.receive) from[(size_t)m.peer] = reinterpret_cast<const T *>(m.bytes.data());
    for (size_t i = 0; i < count; i++) {
        const size_t first = i / PIECE % (size_t)c.size;
        T sum = from[first][i];
        for (size_t r = 1; r < (size_t)c.size; r++) sum += from[(first + r) % (size_t)c.size][i];
        to[i] = sum;
    }
    emulator::check_filled(to, count * sizeof *to);
}

/* The messages of calls on one stream leave, and the stream gets the rest of the work. */
void give(const std::shared_ptr<connection> &c, cudaStream_t stream, messages &&all,
          const std::function<void(const messages &)> &finish)
{
    const auto kept = std::make_shared<messages>(std::move(all));
    emulator::run_given(stream); /* what is sent is there now */
    {
        const emulator::device_access open;
        for (message &m : *kept) {
            if (m.receive) continue;
            emulator::check_taken("ncclSend", m.memory, m.bytes.size());
            memcpy(m.bytes.data(), m.memory, m.bytes.size());
        }
    }
    for (message &m : *kept) start(*c, m);
    c->under_way++;
    c->stream = stream;
    const auto may = [c, kept] {
        if (c->given_up) return true;
        for (message &m : *kept)
            if (m.receive && !is_through(m)) return false;
        return true;
    };
    const auto act = [c, kept, finish] {
        c->under_way--;
        if (c->given_up) {
            new messages(std::move(*kept)); /* MPI may write there, whenever the other rank sends */
            return;
        }
        for (message &m : *kept)
            if (m.receive) wait_for_message(m);
        check_sent(*kept);
        finish(*kept);
        for (auto m = kept->begin(); m != kept->end();) {
            const auto next = std::next(m);
            if (!m->receive) c->leaving.splice(c->leaving.end(), *kept, m);
            m = next;
        }
    };
    emulator::give_work(stream, act, may);
}

message message_of(unsigned char *memory, size_t bytes, int peer, bool receive)
{
    return {memory, peer, receive, std::vector<unsigned char>(bytes), MPI_REQUEST_NULL};
}

void give_sum(const call &one)
{
    const std::shared_ptr<connection> c = one.c;
    const size_t bytes = one.count * size_of(one.type), count = one.count;
    messages all;
    for (int r = 0; r < c->size; r++) {
        if (r == c->rank) continue;
        all.push_back(message_of(one.to, bytes, r, false));
        all.push_back(message_of(one.to, bytes, r, true));
    }
    const bool wide = one.type == ncclDouble;
    unsigned char *to = one.to;
    give(c, one.stream, std::move(all), [c, to, count, wide](const messages &got) {
        if (wide)
            add_up(*c, got, reinterpret_cast<double *>(to), count);
        else
            add_up(*c, got, reinterpret_cast<float *>(to), count);
    });
}

ncclResult_t check(const call &one)
{
    const connection &c = *one.c;
    const size_t bytes = one.count * size_of(one.type);
    if (c.given_up || !c.connected || c.questions > 0) return ncclInvalidUsage;
    if (one.peer >= c.size || one.peer == c.rank) return ncclInvalidArgument; /* to itself nobody sends here */
    if (one.to != NULL && !emulator::is_allocated(one.to, bytes)) return ncclInvalidArgument;
    if (one.from != NULL && !emulator::is_allocated(one.from, bytes)) return ncclInvalidArgument;
    if (one.peer < 0 && (one.to != one.from || one.type == ncclUint8)) return ncclInvalidArgument;
    return ncclSuccess;
}

/* All calls of one group are of one communicator and one stream: so it is in the library. */
ncclResult_t end_group()
{
    std::vector<call> calls;
    calls.swap(waiting);
    if (calls.empty()) return ncclSuccess;
    const std::shared_ptr<connection> c = calls[0].c;
    messages all;
    for (const call &one : calls) {
        if (one.c != c || one.stream != calls[0].stream || (one.peer < 0 && calls.size() > 1)) return ncclInvalidUsage;
        if (one.peer < 0) continue;
        unsigned char *memory = one.to != NULL ? one.to : const_cast<unsigned char *>(one.from);
        all.push_back(message_of(memory, one.count * size_of(one.type), one.peer, one.to != NULL));
    }
    if (calls[0].peer < 0)
        give_sum(calls[0]);
    else
        give(c, calls[0].stream, std::move(all), deliver);
    c->groups++;
    c->questions = QUESTIONS;
    const fault *f = fault_asked_for();
    if (f != NULL && c->world[(size_t)c->rank] == f->rank && c->groups > f->after) {
        c->lost = strcmp(f->what, "lost") == 0;
        c->stuck = !c->lost;
    }
    return ncclInProgress;
}

ncclResult_t take(const call &one)
{
    const ncclResult_t r = check(one);
    if (r != ncclSuccess) return r;
    if (one.count == 0) return ncclSuccess;
    waiting.push_back(one);
    return depth > 0 ? ncclSuccess : end_group();
}
} // namespace

struct ncclComm {
    std::shared_ptr<connection> c;
};

const char *ncclGetErrorString(ncclResult_t result)
{
    static const char *const names[] = {"no error",
                                        "unhandled cuda error",
                                        "unhandled system error",
                                        "internal error",
                                        "invalid argument",
                                        "invalid usage",
                                        "remote process exited or there was a network error",
                                        "NCCL operation in progress"};
    return names[result];
}

const char *ncclGetLastError(ncclComm_t comm)
{
    return comm != NULL && comm->c->lost ? "emulated: the connection is lost" : "";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    static int made;
    address a = {0, 0};
    MPI_Comm_rank(MPI_COMM_WORLD, &a.world);
    if (a.world >= MOST_WORLD) return ncclInvalidUsage;
    a.tag = FIRST_TAG + made++ * MOST_WORLD + a.world;
    memcpy(id->internal, &a, sizeof a);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    *comm = NULL;
    if (config->blocking != 0 || rank < 0 || rank >= size) return ncclInvalidArgument;
    address a;
    int world = 0;
    memcpy(&a, id.internal, sizeof a);
    MPI_Comm_rank(MPI_COMM_WORLD, &world);
    const auto c = std::make_shared<connection>();
    c->rank = rank, c->size = size, c->tag = a.tag;
    c->world.resize((size_t)size);
    c->world[(size_t)rank] = world;
    c->missing = size - 1;
    c->questions = QUESTIONS;
    c->request = MPI_REQUEST_NULL;
    *comm = new ncclComm{c};
    if (rank > 0) {
        MPI_Send(&rank, 1, MPI_INT, a.world, c->tag, MPI_COMM_WORLD);
        MPI_Irecv(c->world.data(), size, MPI_INT, a.world, c->tag, MPI_COMM_WORLD, &c->request);
    } else if (size > 1) {
        MPI_Irecv(&c->hello, 1, MPI_INT, MPI_ANY_SOURCE, c->tag, MPI_COMM_WORLD, &c->request);
    } else {
        c->connected = true;
    }
    return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *result)
{
    connection &c = *comm->c;
    if (c.given_up) return ncclInvalidArgument;
    if (!c.connected) go_on_connecting(c);
    std::erase_if(c.leaving, is_through);
    if (c.questions > 0 && c.connected) c.questions--;
    *result = c.lost ? ncclRemoteError : c.stuck || !c.connected || c.questions > 0 ? ncclInProgress : ncclSuccess;
    return ncclSuccess;
}

/* Is through when the streams are past all that was given, and MPI reads none of it. */
ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    const std::shared_ptr<connection> c = comm->c;
    if (c->given_up || c->questions > 0) return ncclInvalidUsage;
    if (c->under_way > 0) emulator::run_given(c->stream);
    for (message &m : c->leaving) wait_for_message(m);
    c->leaving.clear();
    c->questions = QUESTIONS;
    return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    if (comm->c->under_way > 0 || !comm->c->leaving.empty()) return ncclInvalidUsage;
    delete comm;
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    connection &c = *comm->c;
    c.given_up = true;
    if (c.request != MPI_REQUEST_NULL) { /* nobody says hello any more */
        MPI_Cancel(&c.request);
        MPI_Request_free(&c.request);
    }
    new messages(std::move(c.leaving)); /* MPI may read them until the program ends */
    delete comm;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart()
{
    depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd()
{
    if (depth == 0) return ncclInvalidUsage;
    return --depth > 0 ? ncclSuccess : end_group();
}

ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    return take({comm->c, stream, NULL, static_cast<const unsigned char *>(from), count, type, peer});
}

ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    return take({comm->c, stream, static_cast<unsigned char *>(to), NULL, count, type, peer});
}

ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t, ncclComm_t comm,
                           cudaStream_t stream)
{
    return take(
        {comm->c, stream, static_cast<unsigned char *>(to), static_cast<const unsigned char *>(from), count, type, -1});
}
