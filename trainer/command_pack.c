/* `longspan pack`: text to a data set, by rank 0. */
#include "trainer.h"

#include <getopt.h>
#include <stdio.h>

static const char usage[] =
    "usage: longspan pack --out FILE [--train INPUT] [--valid INPUT] [--test INPUT]\n"
    "\n"
    "Makes a data set of pairs of documents; tokens are bytes. At least one INPUT is needed, each either\n"
    "  FILE.tsv             a line for each pair: name, source, target, or just source, target, with tabs between;\n"
    "                       within them \\t \\n \\r \\\\ stand for tab, line end, carriage return, backslash;\n"
    "                       a byte order mark at the beginning of the file is skipped\n"
    "  SOURCE_DIR:TARGET_DIR  a file for each source, and one of the same name for its target; those whose\n"
    "                         names begin with a dot are left out\n"
    "\n"
    "  --out FILE      the data set (HDF5); it appears when it is complete, and replaces a data set of that\n"
    "                  name, but no other file\n"
    "  --train INPUT   pairs to train on\n"
    "  --valid INPUT   pairs to evaluate on while training\n"
    "  --test INPUT    pairs kept for the end\n"
    "  --help          this text\n";

typedef struct pack_options {
    const char *out, *input[DATA_SPLITS];
    int help;
} pack_options;

/* Twice the same is refused: the first would be forgotten without a word. */
static ls_status take(const char **value, const char *option)
{
    if (*value != NULL)
        LS_FAIL(LS_ERR_ARGUMENT, "pack: --%s is given twice: join the inputs first, a split is one", option);
    if (optarg[0] == 0) LS_FAIL(LS_ERR_ARGUMENT, "pack: --%s: the name is empty", option);
    *value = optarg;
    return LS_OK;
}

static ls_status parse(int argc, char **argv, pack_options *o)
{
    enum { OUT = 256, HELP, INPUT };
    static const struct option options[] = {
        {"out", required_argument, NULL, OUT},
        {"train", required_argument, NULL, INPUT},
        {"valid", required_argument, NULL, INPUT + 1},
        {"test", required_argument, NULL, INPUT + 2},
        {"help", no_argument, NULL, HELP},
        {NULL, 0, NULL, 0},
    };
    static const char *const known[] = {"--out", "--train", "--valid", "--test", "--help", NULL};
    *o = (pack_options){0};
    opterr = 0; /* rank 0 alone says what is wrong */
    optind = 1;
    for (int which; (which = getopt_long(argc, argv, ":", options, NULL)) != -1;) {
        if (which == OUT)
            LS_TRY(take(&o->out, "out"));
        else if (which == HELP)
            o->help = 1;
        else if (which >= INPUT && which < INPUT + DATA_SPLITS)
            LS_TRY(take(&o->input[which - INPUT], data_split_name[which - INPUT]));
        else
            return refuse_option("pack", which, argv, known);
    }
    if (o->help) return LS_OK;
    if (optind < argc)
        LS_FAIL(LS_ERR_ARGUMENT, "pack: what is %s? Say --train, --valid or --test before an input", argv[optind]);
    if (o->out == NULL) LS_FAIL(LS_ERR_ARGUMENT, "pack: --out FILE is missing; see longspan pack --help");
    if (o->input[0] == NULL && o->input[1] == NULL && o->input[2] == NULL)
        LS_FAIL(LS_ERR_ARGUMENT, "pack: nothing to pack: give --train, --valid or --test; see longspan pack --help");
    return LS_OK;
}

int command_pack(int argc, char **argv, ranks *r)
{
    pack_options o;
    ls_status status = parse(argc, argv, &o);
    if (status != LS_OK) return report_error(r, status);
    if (o.help) {
        if (r->rank == 0) fputs(usage, stdout);
        return EXIT_OK;
    }
    if (r->rank == 0) status = dataset_pack(o.out, o.input[0], o.input[1], o.input[2]);
    status = agree(r, status);
    if (status != LS_OK) return report_error(r, status);
    if (r->rank == 0) printf("%s is complete; longspan inspect %s shows what it holds\n", o.out, o.out);
    return EXIT_OK;
}
