/* `longspan eval`: how well a checkpoint predicts a split, and how much of that comes from the encoder. */
#include "trainer.h"

#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: longspan eval CHECKPOINT [options]\n"
    "\n"
    "Measures how well a checkpoint predicts the targets of a split, each label given the source and the labels "
    "before\n"
    "it. The end of a target is a label too, so a target of n bytes has n + 1 labels; bits per byte are per label.\n"
    "\n"
    "  --data FILE         the data set (default: the one that the checkpoint was trained on)\n"
    "  --split NAME        train, valid or test (default valid)\n"
    "  --documents N       only the first N documents (default 0: all)\n"
    "  --shuffle-sources   also give each target the source of another document: the difference is what the encoder\n"
    "                      contributes\n"
    "  --set KEY=VALUE     change a key of the checkpoint's configuration, e.g. parallel.sequence=2\n"
    "  --help              this text\n";

double bits_per_byte(double nll)
{
    return nll / 0.69314718055994530942;
}

/* ------------------------------------------------------------------------------------------------ evaluation */

typedef struct ordered {
    int64_t document, length;
} ordered;

/* By length, so that batches pad little; by number where lengths are equal, so that the order is one. */
static int by_length(const void *a, const void *b)
{
    const ordered *x = a, *y = b;
    if (x->length != y->length) return x->length < y->length ? -1 : 1;
    return x->document < y->document ? -1 : x->document > y->document;
}

/* What a rank reads of documents: b, and for --shuffle-sources another batch whose sources take the place of its own.
 */
typedef struct reading {
    batch b, other;
} reading;

/* `seen` is the batch to work on; its memory belongs to the reading. */
static ls_status read_pair(const config *c, const ranks *r, dataset *data, const char *split, const int64_t *targets,
                           const int64_t *sources, int64_t rows, reading *in, batch *seen)
{
    const int rank = ls_context_rank(r->sequence), size = ls_context_size(r->sequence);
    LS_TRY(dataset_read(data, split, targets, rows, c->data.max_source, c->data.max_target, rank, size, &in->b));
    *seen = in->b;
    if (sources == targets) return LS_OK;
    LS_TRY(dataset_read(data, split, sources, rows, c->data.max_source, c->data.max_target, rank, size, &in->other));
    seen->source = in->other.source;
    seen->source_token = in->other.source_token;
    seen->source_pad = in->other.source_pad;
    return LS_OK;
}

typedef struct sums {
    double nll, tokens, stop;
} sums;

static int asked_to_stop(const evaluation_choice *choice)
{
    return choice->stop != NULL && choice->stop(choice->of);
}

/* Collective: before each batch the ranks tell each other whether one has failed, and in the same message whether one
 * was asked to stop. So all go on, or none. */
static ls_status agree_to_go_on(const ranks *r, const evaluation_choice *choice, ls_status mine, int *stop)
{
    if (mine == LS_ERR_COMM) return mine; /* the others may never come */
    const int told[2] = {mine != LS_OK, asked_to_stop(choice)};
    int any[2];
    if (MPI_Allreduce(told, any, 2, MPI_INT, MPI_MAX, r->comm) != MPI_SUCCESS)
        LS_FAIL(LS_ERR_COMM, "mpi: agreeing on a batch of the evaluation failed");
    *stop = any[1];
    return any[0] ? agree(r, mine) : LS_OK;
}

/* Collective: this rank's share of the sums, the batches of its group, its rows of them. The groups take turns, so that
 * all ranks come to each agreement; in the last turn there may be no batch for some. out->stop: ended before all were
 * worked through, on every rank alike. */
static ls_status evaluate_share(const ranks *r, const config *c, dataset *data, model *m, const ls_real *params,
                                const evaluation_choice *choice, int64_t n, sums *out)
{
    const int64_t all = dataset_documents(data, choice->split);
    const int64_t shift = choice->shuffle ? all / 2 : 0;
    int64_t rows = c->train.batch / c->train.accumulation / r->groups; /* what fits in training fits here */
    if (rows < 1 || config_counts_padding(c)) rows = 1;                /* then none is padded */
    ordered *order = malloc((size_t)n * sizeof *order);
    int64_t *index = malloc(2 * (size_t)rows * sizeof *index), *source = index + (shift > 0 ? rows : 0);
    reading in = {0};
    batch b;
    int stop = 0;
    ls_status status = LS_OK;
    if (order == NULL || index == NULL)
        status = ls_fail(LS_ERR_MEMORY, "evaluation: no memory for the order of %lld documents", (long long)n);
    for (int64_t i = 0; i < n && status == LS_OK; i++) {
        int64_t source_length, target_length;
        dataset_lengths(data, choice->split, i, &source_length, &target_length);
        order[i] = (ordered){i, source_length + target_length};
    }
    if (status == LS_OK) qsort(order, (size_t)n, sizeof *order, by_length);
    for (int64_t turn = 0; turn < n; turn += r->groups * rows) {
        const int64_t first = turn + r->group * rows;
        const int64_t count = n - first < rows ? n - first : rows;
        for (int64_t k = 0; k < count && status == LS_OK; k++) {
            index[k] = order[first + k].document;
            source[k] = (order[first + k].document + shift) % all;
        }
        if (count > 0 && status == LS_OK) status = read_pair(c, r, data, choice->split, index, source, count, &in, &b);
        LS_TRY_GOTO(agree_to_go_on(r, choice, status, &stop));
        out->stop = stop;
        if (stop) break;
        if (count <= 0) continue;
        b.sample = (uint64_t)first;
        model_loss loss;
        status = model_evaluate(m, &b, params, &loss); /* what is wrong is told in the next turn, or at the end */
        if (status != LS_OK) continue;
        out->nll += loss.nll;
        out->tokens += (double)loss.tokens;
    }
done:
    batch_free(&in.b);
    batch_free(&in.other);
    free(order);
    free(index);
    return status;
}

ls_status evaluate_split(const ranks *r, const config *c, dataset *data, model *m, const ls_real *params,
                         const evaluation_choice *choice, evaluation *out)
{
    const int64_t all = dataset_documents(data, choice->split);
    const int64_t n = choice->documents > 0 && choice->documents < all ? choice->documents : all;
    sums mine = {0}, total = {0};
    *out = (evaluation){.documents = n};
    sums *each = malloc((size_t)r->size * sizeof *each);
    ls_status status = each == NULL ? ls_fail(LS_ERR_MEMORY, "evaluation: no memory for %d sums", r->size) : LS_OK;
    LS_TRY_GOTO(agree(r, status));
    LS_TRY_GOTO(agree(r, evaluate_share(r, c, data, m, params, choice, n, &mine)));
    if (mine.stop == 0) mine.stop = asked_to_stop(choice); /* during the last batch */
    /* gathered and added in rank order: the same bits everywhere */
    if (MPI_Allgather(&mine, 3, MPI_DOUBLE, each, 3, MPI_DOUBLE, r->comm) != MPI_SUCCESS) {
        status = ls_fail(LS_ERR_COMM, "mpi: gathering the sums of the evaluation failed");
        goto done;
    }
    for (int p = 0; p < r->size; p++) {
        total.nll += each[p].nll;
        total.tokens += each[p].tokens;
        total.stop += each[p].stop;
    }
    out->stopped = total.stop > 0;
    if (out->stopped) goto done; /* of sums that are those of some batches alone nobody is told */
    out->tokens = (int64_t)total.tokens;
    out->nll = total.nll / total.tokens;
    if (!isfinite(out->nll)) {
        status = ls_fail(LS_ERR_NONFINITE, "evaluation: the negative log likelihood of split %s is not finite",
                         choice->split);
    }
done:
    free(each);
    return status;
}

/* ------------------------------------------------------------------------------------------------ the command */

typedef struct eval_options {
    const char *checkpoint, *data;
    evaluation_choice choice;
    text_list set;
    int help;
} eval_options;

static ls_status parse(int argc, char **argv, eval_options *o)
{
    static const struct option options[] = {{"data", required_argument, NULL, 'd'},
                                            {"split", required_argument, NULL, 's'},
                                            {"documents", required_argument, NULL, 'n'},
                                            {"shuffle-sources", no_argument, NULL, 'x'},
                                            {"set", required_argument, NULL, 'k'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    static const char *const known[] = {"--data", "--split", "--documents", "--shuffle-sources",
                                        "--set",  "--help",  NULL};
    static const char *const splits[] = {"train", "valid", "test", NULL};
    *o = (eval_options){.choice.split = "valid"};
    int which;
    opterr = 0;
    optind = 1;
    while ((which = getopt_long(argc, argv, ":", options, NULL)) != -1) {
        switch (which) {
        case 'd':
            o->data = optarg;
            break;
        case 's': {
            int i = 0;
            while (splits[i] != NULL && strcmp(splits[i], optarg) != 0) i++;
            if (splits[i] == NULL) {
                LS_FAIL(LS_ERR_ARGUMENT, "eval: --split: '%s' is not train, valid or test", optarg);
            }
            o->choice.split = splits[i];
            break;
        }
        case 'n':
            LS_TRY(read_count("eval", "--documents", optarg, 0, &o->choice.documents));
            break;
        case 'x':
            o->choice.shuffle = 1;
            break;
        case 'k':
            LS_TRY(text_list_add(&o->set, optarg));
            break;
        case 'h':
            o->help = 1;
            return LS_OK;
        default:
            return refuse_option("eval", which, argv, known);
        }
    }
    if (optind != argc - 1) {
        LS_FAIL(LS_ERR_ARGUMENT, "eval: %s; see longspan eval --help",
                optind >= argc ? "which checkpoint?" : "one checkpoint is all it takes");
    }
    o->checkpoint = argv[optind];
    return LS_OK;
}

static void print(const char *title, const evaluation *e)
{
    printf("%-18s%.6f nats per token, %.6f bits per byte\n", title, e->nll, bits_per_byte(e->nll));
}

static int names_data(const eval_options *o)
{
    for (int i = 0; i < o->set.count; i++)
        if (strncmp(o->set.item[i], "data.path=", strlen("data.path=")) == 0) return 1;
    return o->data != NULL;
}

static ls_status evaluate(const eval_options *o, ranks *r, dataset **data, model **m, ls_real **params)
{
    config c;
    LS_TRY(checkpoint_config_everywhere(r, o->checkpoint, o->set.item, o->set.count, &c));
    const char *path = o->data != NULL ? o->data : c.data.path;
    LS_TRY(ranks_split(r, &c, c.parallel.sequence));
    LS_TRY(dataset_open(r->world, path, c.data.verify, data));
    const int64_t documents = dataset_documents(*data, o->choice.split);
    if (documents == 0) LS_FAIL(LS_ERR_ARGUMENT, "%s: has no split %s", path, o->choice.split);
    LS_TRY(config_fits(&c, data_cut(dataset_longest(*data, o->choice.split, 0), c.data.max_source),
                       data_cut(dataset_longest(*data, o->choice.split, 1), c.data.max_target) + 1));
    if (o->choice.shuffle && documents < 2) {
        LS_FAIL(LS_ERR_ARGUMENT, "%s: split %s has one document: there is no other source", path, o->choice.split);
    }
    LS_TRY(agree(r, model_create(r->sequence, &c, m)));
    LS_TRY(agree(r, device_reals(r, "eval: parameters", model_count(*m), params)));
    training_state s = {.params = *params};
    LS_TRY(load_everywhere(r, o->checkpoint, *m, &s));
    if (!names_data(o) && s.data_digest != dataset_digest(*data))
        LS_FAIL(LS_ERR_ARGUMENT,
                "%s: is not the data set any more that %s was trained on: say --data %s to evaluate on it nevertheless",
                path, o->checkpoint, path);

    evaluation_choice choice = o->choice;
    evaluation right, wrong = {0};
    choice.shuffle = 0;
    LS_TRY(evaluate_split(r, &c, *data, *m, *params, &choice, &right));
    if (o->choice.shuffle) {
        LS_TRY(evaluate_split(r, &c, *data, *m, *params, &o->choice, &wrong));
    }
    if (r->rank != 0) return LS_OK;
    printf("%-18s%s, step %lld\n%-18s%s of %s: %lld documents, %lld tokens (ends included)\n", "checkpoint",
           o->checkpoint, (long long)s.step, "split", choice.split, path, (long long)right.documents,
           (long long)right.tokens);
    print("result", &right);
    if (o->choice.shuffle) {
        print("other sources", &wrong);
        printf("%-18s%.6f nats per token, %.6f bits per byte\n", "difference", wrong.nll - right.nll,
               bits_per_byte(wrong.nll - right.nll));
    }
    return LS_OK;
}

int command_eval(int argc, char **argv, ranks *r)
{
    eval_options o;
    dataset *data = NULL;
    model *m = NULL;
    ls_real *params = NULL;
    ls_status status = parse(argc, argv, &o);
    if (status == LS_OK && o.help) {
        if (r->rank == 0) fputs(usage, stdout);
    } else if (status == LS_OK) {
        status = evaluate(&o, r, &data, &m, &params);
    }
    const int code = report_error(r, status);
    model_free(m);
    dataset_close(data);
    device_free(r, params);
    free(o.set.item);
    return code;
}
