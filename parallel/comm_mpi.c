/* MPI. The caller's communicator is duplicated, so our messages meet none of theirs, and its errors return to us. */
#include "comm.h"
#include "real.h"

#include <stdlib.h>
#include <string.h>

#ifdef LS_REAL_DOUBLE
#define MPI_LS_REAL MPI_DOUBLE
#else
#define MPI_LS_REAL MPI_FLOAT
#endif

enum { TAG = 1 };
static const size_t CHUNK = (size_t)1 << 30; /* MPI counts are int: larger messages travel as several */

static ls_status check(const ls_comm *c, int rc, const char *what)
{
    if (rc == MPI_SUCCESS) return LS_OK;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(rc, text, &length);
    LS_FAIL(LS_ERR_COMM, "mpi: %s failed on rank %d of %d: %s", what, c->rank, c->size, text);
}

/* The communicator lies in the pointer itself: a rank that had no memory for it would leave the others waiting. */
_Static_assert(sizeof(MPI_Comm) <= sizeof(void *), "an MPI_Comm is a number or a pointer");
static MPI_Comm mpi_of(const ls_comm *c)
{
    MPI_Comm mpi;
    memcpy(&mpi, &c->own, sizeof mpi);
    return mpi;
}

static ls_status begin(ls_comm *c, const ls_message *m, int count, ls_pending *p)
{
    size_t need = 0;
    for (int i = 0; i < count; i++) need += (m[i].bytes + CHUNK - 1) / CHUNK;
    if ((size_t)p->count + need > (size_t)p->capacity) {
        void *grown = realloc(p->requests, ((size_t)p->count + need) * sizeof(MPI_Request));
        if (grown == NULL) LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for %zu requests", need);
        p->requests = grown;
        p->capacity = p->count + (int)need;
    }
    MPI_Request *request = p->requests;
    for (int i = 0; i < count; i++)
        for (size_t at = 0; at < m[i].bytes; at += CHUNK) {
            const int n = (int)(m[i].bytes - at < CHUNK ? m[i].bytes - at : CHUNK);
            char *data = (char *)m[i].data + at;
            MPI_Request *r = &request[p->count];
            LS_TRY(check(c,
                         m[i].receive ? MPI_Irecv(data, n, MPI_BYTE, m[i].peer, TAG, mpi_of(c), r)
                                      : MPI_Isend(data, n, MPI_BYTE, m[i].peer, TAG, mpi_of(c), r),
                         m[i].receive ? "posting a receive" : "posting a send"));
            p->count++;
        }
    return LS_OK;
}

static ls_status end(ls_comm *c, ls_pending *p)
{
    const int n = p->count;
    p->count = 0;
    return n == 0 ? LS_OK : check(c, MPI_Waitall(n, p->requests, MPI_STATUSES_IGNORE), "waiting for messages");
}

/* Of messages that are one request each. */
static ls_status next(ls_comm *c, ls_pending *p, int *which)
{
    int one = MPI_UNDEFINED;
    if (p->count > 0) LS_TRY(check(c, MPI_Waitany(p->count, p->requests, &one, MPI_STATUS_IGNORE), "waiting for one"));
    *which = one == MPI_UNDEFINED ? -1 : one;
    return LS_OK;
}

/* After an error messages may still be under way: what they would write to is the caller's again. A receive that is
 * cancelled is over; a send that cannot be is left to MPI. */
static void forget(ls_pending *p)
{
    MPI_Request *request = p->requests;
    for (int i = 0; i < p->count; i++) {
        int over = request[i] == MPI_REQUEST_NULL;
        if (!over && MPI_Cancel(&request[i]) == MPI_SUCCESS) MPI_Test(&request[i], &over, MPI_STATUS_IGNORE);
        if (!over) MPI_Request_free(&request[i]);
    }
    free(p->requests);
    *p = (ls_pending){0};
}

static ls_status sum(ls_comm *c, ls_real *x, int64_t n)
{
    if (c->size == 1) return LS_OK; /* x may be a GPU's, which MPI need not know */
    for (int64_t at = 0; at < n; at += (int64_t)(CHUNK / sizeof *x)) {
        const int part = (int)ls_min(n - at, (int64_t)(CHUNK / sizeof *x));
        LS_TRY(check(c, MPI_Allreduce(MPI_IN_PLACE, x + at, part, MPI_LS_REAL, MPI_SUM, mpi_of(c)), "all-reduce"));
    }
    return LS_OK;
}

static ls_status min(ls_comm *c, int64_t *x, int n)
{
    return check(c, MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_INT64_T, MPI_MIN, mpi_of(c)), "all-reduce of a minimum");
}

static ls_status broadcast(ls_comm *c, void *data, int bytes, int root)
{
    return check(c, MPI_Bcast(data, bytes, MPI_BYTE, root, mpi_of(c)), "broadcast");
}

static ls_status gather(ls_comm *c, int64_t mine, int64_t *all)
{
    return check(c, MPI_Allgather(&mine, 1, MPI_INT64_T, all, 1, MPI_INT64_T, mpi_of(c)), "all-gather");
}

static void close_mpi(ls_comm *c)
{
    int finalized = 0;
    MPI_Finalized(&finalized);
    MPI_Comm mpi = mpi_of(c);
    if (!finalized) MPI_Comm_free(&mpi);
    c->own = NULL;
}

ls_status ls_comm_mpi(MPI_Comm mpi, ls_comm *comm)
{
    static const ls_comm_ops ops = {"mpi", begin, end, forget, sum, close_mpi, next, min, broadcast, gather};
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (!initialized) LS_FAIL(LS_ERR_ARGUMENT, "mpi: call MPI_Init before giving a communicator to a context");
    if (finalized) LS_FAIL(LS_ERR_ARGUMENT, "mpi: a context with a communicator cannot be made after MPI_Finalize");
    *comm = (ls_comm){&ops, 0, 1, NULL, NULL};
    int has_two_groups = 0;
    LS_TRY(check(comm, MPI_Comm_test_inter(mpi, &has_two_groups), "looking at the communicator"));
    if (has_two_groups)
        LS_FAIL(LS_ERR_ARGUMENT, "mpi: an inter-communicator is given: merge its groups by MPI_Intercomm_merge");
    MPI_Comm own;
    LS_TRY(check(comm, MPI_Comm_dup(mpi, &own), "duplicating the communicator"));
    memcpy(&comm->own, &own, sizeof own);
    MPI_Comm_set_errhandler(own, MPI_ERRORS_RETURN);
    MPI_Comm_rank(own, &comm->rank);
    MPI_Comm_size(own, &comm->size);
    return LS_OK;
}
