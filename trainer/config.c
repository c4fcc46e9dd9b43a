/* One table says what can be configured: where each value lives, what it may be, its default, and a line of help.
 * Reading, --set, writing and the reference all walk this table; options of mechanisms join it at run time. */
#include "config.h"
#include "config_yaml.h"

#include "comm.h"
#include "mechanism.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static const char *const truth[] = {"false", "true", NULL};
static const char *const activations[] = {"gelu", "relu", NULL};
static const char *const schedules[] = {"cosine", "inverse_sqrt", "constant", NULL};
static const char *const transports[] = {"auto", "mpi", "nccl", NULL};
static const char *const precisions[] = {"float32", "tf32", "bf16", NULL};
static const char *const devices[] = {"cpu", "cuda", NULL};

#define FIELD(member) offsetof(config, member), sizeof(((config *)0)->member)
#define ATTENTION(which, what)                                                                                         \
    {"model." #which ".mechanism", KEY_MECHANISM, FIELD(model.which.mechanism), NULL, NULL, "softmax", what},          \
        {"model." #which ".dropout",                                                                                   \
         KEY_REAL,                                                                                                     \
         FIELD(model.which.dropout),                                                                                   \
         "[0, 1)",                                                                                                     \
         NULL,                                                                                                         \
         "0",                                                                                                          \
         "of attention probabilities (softmax)"},                                                                      \
    {                                                                                                                  \
        "model." #which ".scale", KEY_REAL, FIELD(model.which.scale), "[0, 1e6]", NULL, "0",                           \
            "of the logits; 0: head dimension ^ -1/2"                                                                  \
    }

static const config_key fixed[] = {
    {"device", KEY_TEXT, FIELD(device), NULL, devices, "cpu", "where tensors live"},
    {"data.path", KEY_TEXT, FIELD(data.path), NULL, NULL, "", "data set made by `longspan pack`"},
    {"data.max_source", KEY_WHOLE, FIELD(data.max_source), "[0, 2147483646]", NULL, "0",
     "tokens; longer sources are cut; 0: no limit"},
    {"data.max_target", KEY_WHOLE, FIELD(data.max_target), "[0, 2147483646]", NULL, "0",
     "tokens; longer targets are cut, and end there; 0: no limit"},
    {"data.verify", KEY_WORD, FIELD(data.verify), NULL, truth, "true", "check all digests when opening"},
    {"model.embed_dim", KEY_WHOLE, FIELD(model.embed_dim), "[1, 1048576]", NULL, "256", "width of the model"},
    {"model.ffn_dim", KEY_WHOLE, FIELD(model.ffn_dim), "[1, 4194304]", NULL, "1024",
     "width within feed-forward layers"},
    {"model.num_heads", KEY_WHOLE, FIELD(model.num_heads), "[1, 65535]", NULL, "4", "heads of every attention"},
    {"model.encoder_layers", KEY_WHOLE, FIELD(model.encoder_layers), "[1, 1000]", NULL, "4", "layers"},
    {"model.decoder_layers", KEY_WHOLE, FIELD(model.decoder_layers), "[1, 1000]", NULL, "4", "layers"},
    {"model.dropout", KEY_REAL, FIELD(model.dropout), "[0, 1)", NULL, "0.1", "of embeddings and residual branches"},
    {"model.activation", KEY_WORD, FIELD(model.activation), NULL, activations, "gelu", "of feed-forward layers"},
    {"model.tie_embeddings", KEY_WORD, FIELD(model.tie_embeddings), NULL, truth, "true",
     "one table for source, target and output"},
    ATTENTION(encoder, "the encoder's self attention"),
    ATTENTION(decoder, "the decoder's causal self attention"),
    ATTENTION(cross, "the decoder's attention to the encoder"),
    {"train.steps", KEY_WHOLE, FIELD(train.steps), "[1, 1000000000000]", NULL, "1000",
     "optimizer steps of the whole run"},
    {"train.batch", KEY_WHOLE, FIELD(train.batch), "[1, 1048576]", NULL, "8",
     "sequences per optimizer step, all ranks"},
    {"train.accumulation", KEY_WHOLE, FIELD(train.accumulation), "[1, 1048576]", NULL, "1",
     "micro-batches a batch is worked through in"},
    {"train.seed", KEY_SEED, FIELD(train.seed), NULL, NULL, "1", "of every random number"},
    {"train.learning_rate", KEY_REAL, FIELD(train.learning_rate), "[0, 1e3]", NULL, "5e-4", "the highest of the run"},
    {"train.min_learning_rate", KEY_REAL, FIELD(train.min_learning_rate), "[0, 1e3]", NULL, "0",
     "where cosine ends; inverse_sqrt stays above it"},
    {"train.warmup_steps", KEY_WHOLE, FIELD(train.warmup_steps), "[0, 1000000000000]", NULL, "100", "of linear growth"},
    {"train.schedule", KEY_WORD, FIELD(train.schedule), NULL, schedules, "cosine", "learning rate after warm-up"},
    {"train.short_length", KEY_WHOLE, FIELD(train.short_length), "[0, 2147483646]", NULL, "0",
     "tokens that documents are cut to at first; 0: never"},
    {"train.short_steps", KEY_WHOLE, FIELD(train.short_steps), "[0, 1000000000000]", NULL, "0",
     "steps with them cut so"},
    {"train.lengthen_steps", KEY_WHOLE, FIELD(train.lengthen_steps), "[0, 1000000000000]", NULL, "0",
     "steps after, until they are whole (or max_source, max_target)"},
    {"train.weight_decay", KEY_REAL, FIELD(train.weight_decay), "[0, 1e3]", NULL, "0.01", "of matrices (AdamW)"},
    {"train.beta1", KEY_REAL, FIELD(train.beta1), "[0, 1)", NULL, "0.9", "memory of gradients"},
    {"train.beta2", KEY_REAL, FIELD(train.beta2), "[0, 1)", NULL, "0.98", "memory of squared gradients"},
    {"train.epsilon", KEY_REAL, FIELD(train.epsilon), "[1e-30, 1]", NULL, "1e-8",
     "added to the root of squared gradients"},
    {"train.clip_norm", KEY_REAL, FIELD(train.clip_norm), "[0, inf)", NULL, "1", "of all gradients together; 0: none"},
    {"train.label_smoothing", KEY_REAL, FIELD(train.label_smoothing), "[0, 1)", NULL, "0", "of the training loss"},
    {"train.evaluate_every", KEY_WHOLE, FIELD(train.evaluate_every), "[0, 1000000000000]", NULL, "200",
     "steps; 0: only at the end"},
    {"train.evaluate_documents", KEY_WHOLE, FIELD(train.evaluate_documents), "[0, 1000000000000]", NULL, "0",
     "first documents of valid; 0: all"},
    {"train.save_every", KEY_WHOLE, FIELD(train.save_every), "[0, 1000000000000]", NULL, "200",
     "steps; 0: only at the end"},
    {"train.keep", KEY_WHOLE, FIELD(train.keep), "[1, 1000000000000]", NULL, "2",
     "recent checkpoints kept (best.h5 is always)"},
    {"train.recompute", KEY_WORD, FIELD(train.recompute), NULL, truth, "false",
     "layers run forward again in backward: less memory"},
    {"train.precision", KEY_WORD, FIELD(train.precision), NULL, precisions, "float32",
     "of products on a GPU: what operands are rounded to; sums are float32"},
    {"parallel.sequence", KEY_WHOLE, FIELD(parallel.sequence), "[0, 1000000000]", NULL, "0",
     "ranks that share each sequence; 0: all"},
    {"parallel.transport", KEY_TEXT, FIELD(parallel.transport), NULL, transports, "auto", "between ranks"},
    {"run.directory", KEY_TEXT, FIELD(run.directory), NULL, NULL, "", "checkpoints, metrics.jsonl, config.yaml"},
};

static const char *const places[PLACES] = {"model.encoder", "model.decoder", "model.cross"};
static const size_t place_offset[] = {offsetof(config, model.encoder), offsetof(config, model.decoder),
                                      offsetof(config, model.cross)};

/* ------------------------------------------------------------------------------------------------ the table */

static config_key table[CONFIG_MAX_KEYS];
static int table_keys;

/* The fixed keys with, after the scale of each attention, the options that any mechanism knows. */
static void table_build(void)
{
    const int room = CONFIG_MAX_KEYS - 1; /* the last stays empty: the end */
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed && table_keys < room; i++) {
        table[table_keys++] = fixed[i];
        for (size_t a = 0; a < sizeof places / sizeof *places; a++) {
            if (fixed[i].offset != place_offset[a] + offsetof(config_attention, scale)) continue;
            const int first = table_keys;
            for (int k = 0; ls_mechanism_name(k) != NULL; k++) {
                int count = 0;
                const ls_option_info *option = ls_mechanism_options(ls_mechanism_name(k), &count);
                for (int o = 0; o < count && table_keys < room; o++) {
                    config_key *key = &table[table_keys];
                    *key = (config_key){.kind = KEY_OPTION, .offset = place_offset[a], .help = option[o].help};
                    snprintf(key->path, sizeof key->path, "%s.options.%s", places[a], option[o].name);
                    int known = 0;
                    for (int j = first; j < table_keys; j++) known |= strcmp(table[j].path, key->path) == 0;
                    table_keys += !known;
                }
            }
        }
    }
}

const config_key *config_key_at(int index)
{
    if (table_keys == 0) table_build();
    return index >= 0 && index < table_keys ? &table[index] : NULL;
}

int config_find(const char *path)
{
    for (int i = 0; config_key_at(i) != NULL; i++) {
        if (strcmp(table[i].path, path) == 0) return i;
    }
    return -1;
}

/* Levenshtein's distance, of words short enough to be keys. */
static int distance(const char *a, const char *b)
{
    enum { LONGEST = 64 };
    const size_t n = strlen(b);
    int row[LONGEST + 1];
    if (n > LONGEST) return LONGEST;
    for (size_t j = 0; j <= n; j++) row[j] = (int)j;
    for (size_t i = 0; a[i] != 0; i++) {
        int diagonal = row[0];
        row[0] = (int)i + 1;
        for (size_t j = 0; j < n; j++) {
            const int replace = diagonal + (tolower((unsigned char)a[i]) != tolower((unsigned char)b[j]));
            const int other = (row[j] < row[j + 1] ? row[j] : row[j + 1]) + 1;
            diagonal = row[j + 1];
            row[j + 1] = replace < other ? replace : other;
        }
    }
    return row[n];
}

const char *nearest_word(const char *word, const char *const *list)
{
    const char *best = NULL;
    const int length = (int)strlen(word);
    int bound = length < 3 ? 1 : length < 9 ? 2 : 3; /* more edits than this is another word */
    for (; *list != NULL; list++) {
        const int d = distance(word, *list);
        if (d <= bound) {
            best = *list;
            bound = d - 1;
        }
    }
    return best;
}

const char *config_unknown(const char *path, char buffer[256])
{
    const size_t length = strlen(path);
    const char *dot = strrchr(path, '.');
    const size_t parent = dot == NULL ? 0 : (size_t)(dot - path) + 1;
    const char *list[CONFIG_MAX_KEYS], *elsewhere = NULL;
    char name[CONFIG_MAX_KEYS][48];
    int count = 0;
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const char *other = table[i].path;
        if (strcmp(other, path) == 0) return NULL;
        if (strncmp(other, path, length) == 0 && other[length] == '.') return strcpy(buffer, "");
        const char *last = strrchr(other, '.');
        if (last != NULL && elsewhere == NULL && strcmp(last + 1, path + parent) == 0) elsewhere = other;
        if (strncmp(other, path, parent) == 0) { /* a neighbour, or a neighbour's section */
            snprintf(name[count], sizeof name[count], "%.*s", (int)strcspn(other + parent, "."), other + parent);
            list[count] = name[count];
            count++;
        }
    }
    list[count] = NULL;
    const char *near = nearest_word(path + parent, list);
    if (near == NULL) near = elsewhere;
    snprintf(buffer, 256, near == NULL ? "unknown key" : "unknown key (did you mean %s?)", near);
    return buffer;
}

/* ------------------------------------------------------------------------------------------------ values */

/* Where the text of a key came from, for messages. */
typedef struct source {
    const char *text; /* NULL: not given */
    const char *name; /* the file, or NULL: --set */
    int line;
} source;

static ls_status refuse(const config_key *key, const source *s, const char *message)
{
    if (s->name == NULL) LS_FAIL(LS_ERR_ARGUMENT, "--set %s=%s: %s", key->path, s->text, message);
    LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: %s: %s", s->name, s->line, key->path, message);
}

/* The words of a list for a message: "cosine, inverse_sqrt or constant". */
static void enumerate(const char *const *words, char *out, size_t size)
{
    size_t used = 0;
    for (int i = 0; words[i] != NULL && used < size; i++) {
        used += (size_t)snprintf(out + used, size - used, "%s%s",
                                 i == 0                 ? ""
                                 : words[i + 1] == NULL ? " or "
                                                        : ", ",
                                 words[i]);
    }
}

static int within(const char *range, double x)
{
    char open = '[', close = ']';
    double low = -INFINITY, high = INFINITY;
    if (range != NULL) sscanf(range, "%c%lf, %lf%c", &open, &low, &high, &close);
    return (open == '[' ? x >= low : x > low) && (close == ']' ? x <= high : x < high);
}

/* A mechanism and its default options; the key is its name. */
static ls_status assign_mechanism(const config_key *key, const source *s, config *c)
{
    const char *list[64] = {0};
    char message[600], names[400];
    for (int i = 0; i < 63 && ls_mechanism_name(i) != NULL; i++) list[i] = ls_mechanism_name(i);
    ls_attention_options options;
    if (ls_attention_defaults(s->text, &options) != LS_OK || strlen(s->text) >= key->size) {
        const char *near = nearest_word(s->text, list);
        enumerate(list, names, sizeof names);
        snprintf(message, sizeof message, "'%.80s' is no mechanism%s%s%s: use %s", s->text,
                 near ? " (did you mean " : "", near ? near : "", near ? "?)" : "", names);
        return refuse(key, s, message);
    }
    config_attention *a = (config_attention *)(void *)((char *)c + key->offset - offsetof(config_attention, mechanism));
    strcpy(a->mechanism, s->text);
    memcpy(a->value, options.value, sizeof a->value);
    return LS_OK;
}

static int read_number(const char *text, double *out)
{
    char *end;
    const char first = text[text[0] == '-' || text[0] == '+'];
    *out = strtod(text, &end);
    return end != text && *end == 0 && (isdigit((unsigned char)first) || first == '.' || first == 'i');
}

static ls_status assign_option(const config_key *key, const source *s, config *c)
{
    config_attention *a = (config_attention *)(void *)((char *)c + key->offset);
    const char *name = strrchr(key->path, '.') + 1;
    char message[600] = "", list[400] = "";
    int count = 0, known = 0;
    const ls_option_info *info = ls_mechanism_options(a->mechanism, &count);
    const char *names[LS_MAX_OPTIONS + 1] = {0};
    for (int i = 0; i < count && i < LS_MAX_OPTIONS; i++) {
        names[i] = info[i].name;
        known |= strcmp(name, names[i]) == 0;
    }
    double value;
    if (!known) {
        enumerate(names, list, sizeof list);
        snprintf(message, sizeof message, "%s has no such option (it has %s)", a->mechanism, count ? list : "none");
        return refuse(key, s, message);
    }
    if (!read_number(s->text, &value)) {
        snprintf(message, sizeof message, "'%.80s' is not a number", s->text);
        return refuse(key, s, message);
    }
    ls_attention_options options;
    ls_status status = ls_attention_defaults(a->mechanism, &options);
    memcpy(options.value, a->value, sizeof a->value);
    if (status == LS_OK) status = ls_attention_set(&options, name, value);
    if (status != LS_OK) {
        snprintf(message, sizeof message, "%s", ls_last_error());
        return refuse(key, s, message);
    }
    memcpy(a->value, options.value, sizeof a->value);
    return LS_OK;
}

/* strtoll, with K and M for 1024 and 1024². */
static int read_whole(const char *text, int64_t *out)
{
    char *end;
    errno = 0;
    long long x = strtoll(text, &end, 10);
    if (end == text || isspace((unsigned char)text[0])) return 0;
    const int shift = *end == 'K' ? 10 : *end == 'M' ? 20 : 0;
    end += shift > 0;
    if (*end != 0) return 0;
    if (errno == ERANGE || x > (INT64_MAX >> shift) || x < (INT64_MIN >> shift))
        x = x > 0 ? INT64_MAX : INT64_MIN;
    else
        x *= 1LL << shift;
    *out = x;
    return 1;
}

/* The one place where a text becomes a value. */
static ls_status assign(const config_key *key, const source *s, config *c)
{
    char *field = (char *)c + key->offset, *end, message[400], words[200];
    if (key->kind == KEY_MECHANISM) return assign_mechanism(key, s, c);
    if (key->kind == KEY_OPTION) return assign_option(key, s, c);
    if (key->words != NULL) {
        int i = 0;
        while (key->words[i] != NULL && strcmp(key->words[i], s->text) != 0) i++;
        if (key->words[i] == NULL) {
            enumerate(key->words, words, sizeof words);
            snprintf(message, sizeof message, "'%.80s' is not %s", s->text, words);
            return refuse(key, s, message);
        }
        if (key->kind == KEY_WORD)
            memcpy(field, &i, sizeof i);
        else
            strcpy(field, s->text);
        return LS_OK;
    }
    double number = 0;
    int64_t whole = 0;
    switch (key->kind) {
    case KEY_TEXT:
        if (strlen(s->text) >= key->size || !yaml_can_hold(s->text)) {
            snprintf(message, sizeof message, strlen(s->text) < key->size ? "is not UTF-8" : "is longer than %zu bytes",
                     key->size - 1);
            return refuse(key, s, message);
        }
        strcpy(field, s->text);
        return LS_OK;
    case KEY_SEED: {
        errno = 0;
        const unsigned long long seed = strtoull(s->text, &end, 10);
        if (!isdigit((unsigned char)s->text[0]) || *end != 0 || errno == ERANGE) {
            snprintf(message, sizeof message, "'%.80s' is not a whole number from 0 to 2^64-1", s->text);
            return refuse(key, s, message);
        }
        memcpy(field, &(uint64_t){seed}, sizeof(uint64_t));
        return LS_OK;
    }
    case KEY_WHOLE:
        if (!read_whole(s->text, &whole)) {
            snprintf(message, sizeof message, "'%.80s' is not a whole number", s->text);
            return refuse(key, s, message);
        }
        number = (double)whole;
        memcpy(field, &whole, sizeof whole);
        break;
    default:
        if (!read_number(s->text, &number)) {
            snprintf(message, sizeof message, "'%.80s' is not a number", s->text);
            return refuse(key, s, message);
        }
        memcpy(field, &number, sizeof number);
        break;
    }
    if (within(key->range, number)) return LS_OK;
    snprintf(message, sizeof message, "%.80s is out of range: allowed is %s", s->text, key->range);
    return refuse(key, s, message);
}

/* ------------------------------------------------------------------------------------------------ reading */

/* set = "path=value" replaces what the file says. */
static ls_status apply_set(const char *set, source *s)
{
    const char *equals = strchr(set, '=');
    char path[160], buffer[256];
    snprintf(path, sizeof path, "%s", set);
    path[strcspn(path, "=")] = 0;
    const char *complaint = config_unknown(path, buffer);
    if (complaint != NULL) {
        LS_FAIL(LS_ERR_ARGUMENT, "--set %s: %s", set, complaint[0] ? complaint : "this is a section, not a key");
    }
    if (equals == NULL) LS_FAIL(LS_ERR_ARGUMENT, "--set %s: expected %s=VALUE", set, path);
    const int index = config_find(path);
    if (table[index].kind == KEY_MECHANISM && (s[index].text == NULL || strcmp(s[index].text, equals + 1) != 0)) {
        const size_t attention = table[index].offset - offsetof(config_attention, mechanism);
        for (int i = 0; i < table_keys; i++) { /* the file's options were meant for the other mechanism */
            if (table[i].kind == KEY_OPTION && table[i].offset == attention && s[i].name != NULL) s[i].text = NULL;
        }
    }
    s[index] = (source){.text = equals + 1};
    return LS_OK;
}

/* What config_check refuses has a key, and perhaps another that it does not go with (ls_last_name): says where the
 * value came from, and --set first, as that was meant to change something. */
static ls_status blame(ls_status status, const char *name, const source *s)
{
    const char *message = ls_last_error();
    int key = -1;
    for (int k = 0; k < 2; k++) {
        const int i = ls_last_name(k) == NULL ? -1 : config_find(ls_last_name(k));
        if (i >= 0 && s[i].text != NULL && (key < 0 || (s[i].name == NULL && s[key].name != NULL))) key = i;
    }
    if (key >= 0 && s[key].name == NULL)
        return ls_fail(status, "--set %s=%s: %s", table[key].path, s[key].text, message);
    if (key >= 0) return ls_fail(status, "%s:%d: %s", name, s[key].line, message);
    return ls_fail(status, "%s: %s", name, message);
}

ls_status config_parse(const char *name, const char *text, size_t size, const char *const *set, int nset, config *c)
{
    memset(c, 0, sizeof *c);
    (void)config_key_at(0);
    yaml_values document;
    source s[CONFIG_MAX_KEYS] = {0};
    LS_TRY(yaml_values_load(name, text, size, table_keys, &document));
    for (int i = 0; i < table_keys && document.text != NULL; i++) {
        if (document.text[i] != NULL) s[i] = (source){document.text[i], name, document.line[i]};
    }
    ls_status status = LS_OK;
    for (int i = 0; i < nset; i++) LS_TRY_GOTO(apply_set(set[i], s));
    for (int i = 0; i < table_keys; i++) { /* in the table's order: a mechanism before its options */
        const source initial = {table[i].initial, "default", 0};
        if (s[i].text != NULL)
            LS_TRY_GOTO(assign(&table[i], &s[i], c));
        else if (table[i].initial != NULL)
            LS_TRY_GOTO(assign(&table[i], &initial, c));
    }
    status = config_check(c);
    if (status != LS_OK) status = blame(status, name, s);
done:
    yaml_values_free(&document);
    return status;
}

/* ------------------------------------------------------------------------------------------------ checking */

/* "KEY: " and why its value cannot stay, perhaps because of the other key's. The keys go to blame as they are, whatever
 * the words. */
__attribute__((format(printf, 4, 5))) static ls_status unfit(const char *key, const char *other, ls_status code,
                                                             const char *format, ...)
{
    char why[800];
    va_list list;
    va_start(list, format);
    vsnprintf(why, sizeof why, format, list);
    va_end(list);
    if (config_find(key) < 0 || (other != NULL && config_find(other) < 0))
        LS_FAIL(LS_ERR_INTERNAL, "configuration: %s or %s is no key (%s)", key, other ? other : key, why);
    return ls_fail_of(key, other, code, "%s: %s", key, why);
}

/* The key of what an attention's options call by this name, or of its mechanism. */
static const char *key_of(const char *place, const char *name)
{
    static const char *const sections[] = {"", "options."};
    char path[80];
    int i = -1;
    for (int k = 0; k < 2 && i < 0 && name != NULL; k++) {
        snprintf(path, sizeof path, "%s.%s%s", place, sections[k], name);
        i = config_find(path);
    }
    if (i >= 0) return table[i].path;
    snprintf(path, sizeof path, "%s.mechanism", place);
    return table[config_find(path)].path;
}

/* cross attention is causal: an output may depend on no later query, though training knows them all */
static const ls_pattern pattern_of[] = {LS_NS, LS_CS, LS_CC};

static const config_attention *attention_at(const config *c, int place)
{
    const config_attention *const used[] = {&c->model.encoder, &c->model.decoder, &c->model.cross};
    return used[place];
}

ls_status config_attention_options(const config *c, config_place place, ls_attention_options *o)
{
    const config_attention *a = attention_at(c, place);
    LS_TRY(ls_attention_defaults(a->mechanism, o));
    o->pattern = pattern_of[place];
    o->level = LS_LEVEL_LAYER;
    o->embed_dim = c->model.embed_dim;
    o->num_heads = c->model.num_heads;
    o->scale = a->scale;
    o->dropout = a->dropout;
    memcpy(o->value, a->value, sizeof o->value);
    return LS_OK;
}

/* What the library would refuse once there are ranks: patterns, and options that do not go together. */
static ls_status check_attention(int place, const config *c)
{
    ls_attention_options o;
    ls_status status = config_attention_options(c, (config_place)place, &o);
    if (status == LS_OK) status = ls_attention_check(&o);
    if (status == LS_OK) return LS_OK;
    return unfit(key_of(places[place], ls_last_name(0)), key_of(places[place], ls_last_name(1)), status, "%s",
                 ls_last_error());
}

/* The mechanism in a place that config_check has let pass, and its options there. */
static const ls_mechanism *mechanism_at(const config *c, int place, ls_attention_options *o)
{
    return config_attention_options(c, (config_place)place, o) == LS_OK ? ls_mechanism_find(o->mechanism) : NULL;
}

int config_counts_padding(const config *c)
{
    int counts = 0;
    for (int i = 0; i < PLACES; i++) {
        ls_attention_options o;
        const ls_mechanism *m = mechanism_at(c, i, &o);
        counts |= m != NULL && m->counts_padding != NULL && m->counts_padding(&o);
    }
    return counts;
}

const char *config_mixes_rows(const config *c)
{
    for (int i = 0; i < PLACES; i++) {
        ls_attention_options o;
        const ls_mechanism *m = mechanism_at(c, i, &o);
        if (m != NULL && m->mixes_rows != NULL && m->mixes_rows(&o)) return m->name;
    }
    return NULL;
}

/* The positions that the mechanism in a place is told to expect by *option; 0: any number. */
static int64_t expected_positions(const config *c, int place, const char **option)
{
    ls_attention_options o;
    const ls_mechanism *m = mechanism_at(c, place, &o);
    if (m == NULL || m->longest == NULL) return 0;
    for (int i = 0; m->option[i].name != NULL; i++)
        if (strcmp(m->option[i].name, m->longest) == 0) {
            *option = m->longest;
            return (int64_t)o.value[i];
        }
    return 0;
}

ls_status config_fits(const config *c, int64_t source_length, int64_t target_length)
{
    const int64_t longest[] = {source_length, target_length, ls_max(source_length, target_length)};
    for (int i = 0; i < PLACES; i++) {
        const char *option = NULL;
        const int64_t expected = expected_positions(c, i, &option);
        if (expected == 0 || expected >= longest[i]) continue;
        return unfit(key_of(places[i], option), NULL, LS_ERR_ARGUMENT,
                     "%lld is less than the %lld positions of the longest sequence: %s is made for no more",
                     (long long)expected, (long long)longest[i], attention_at(c, i)->mechanism);
    }
    return LS_OK;
}

int64_t config_longest_target(const config *c)
{
    int64_t longest = INT64_MAX;
    for (int i = 1; i < PLACES; i++) { /* the decoder and what it looks back by */
        const char *option;
        const int64_t expected = expected_positions(c, i, &option);
        if (expected > 0) longest = ls_min(longest, expected);
    }
    return longest;
}

const config_key *config_other_model(const config *a, const config *b)
{
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const config_key *key = config_key_at(i);
        const char *name = strrchr(key->path, '.');
        char x[96], y[96];
        if (strncmp(key->path, "model.", 6) != 0 || strcmp(name, ".dropout") == 0) continue;
        config_value(key, a, x, sizeof x);
        config_value(key, b, y, sizeof y);
        if (strcmp(x, y) != 0) return key;
    }
    return NULL;
}

static ls_status check_device(const config *c)
{
    const int cuda = strcmp(c->device, "cuda") == 0;
    if (cuda && ls_device_find(LS_CUDA) == NULL)
        return unfit("device", NULL, LS_ERR_UNSUPPORTED, "cuda: this build has no CUDA backend");
    for (int i = 0; cuda && i < PLACES; i++)
        if (ls_mechanism_find(attention_at(c, i)->mechanism)->cuda == NULL)
            return unfit(key_of(places[i], NULL), "device", LS_ERR_UNSUPPORTED,
                         "%s has no CUDA kernels in this version: use device: cpu", attention_at(c, i)->mechanism);
    if (!cuda && c->train.precision != LS_FLOAT32)
        return unfit("train.precision", "device", LS_ERR_ARGUMENT, "%s is for GPUs: it needs device: cuda",
                     precisions[c->train.precision]);
    if (strcmp(c->parallel.transport, "nccl") != 0) return LS_OK;
    if (!ls_has_nccl())
        return unfit("parallel.transport", NULL, LS_ERR_UNSUPPORTED, "nccl: this build has no NCCL transport");
    if (!cuda)
        return unfit("parallel.transport", "device", LS_ERR_ARGUMENT,
                     "nccl carries tensors of GPUs: it needs device: cuda");
    return LS_OK;
}

/* What changes nothing where it stands would only seem to have been tried. */
static ls_status check_effects(const config *c)
{
    for (int i = 0; i < PLACES; i++) {
        ls_attention_options o, initial;
        const ls_mechanism *m = mechanism_at(c, i, &o);
        if (m == NULL) continue;
        if (m->unscaled && o.scale != 0)
            return unfit(key_of(places[i], "scale"), key_of(places[i], NULL), LS_ERR_ARGUMENT,
                         "%g has no effect: %s has no logits to scale", o.scale, m->name);
        LS_TRY(ls_attention_defaults(m->name, &initial));
        for (int k = 0; m->idle != NULL && m->option[k].name != NULL; k++) {
            const char *why = m->idle(&o, m->option[k].name);
            if (why != NULL && o.value[k] != initial.value[k])
                return unfit(key_of(places[i], m->option[k].name), NULL, LS_ERR_ARGUMENT, "%g has no effect: %s",
                             o.value[k], why);
        }
    }
    return LS_OK;
}

ls_status config_check_training(const config *c)
{
    LS_TRY(check_effects(c));
    if (c->data.path[0] == 0) LS_FAIL(LS_ERR_ARGUMENT, "data.path: which data set?");
    if (c->run.directory[0] == 0) LS_FAIL(LS_ERR_ARGUMENT, "run.directory: where do checkpoints and metrics go?");
    if (c->train.schedule == SCHEDULE_CONSTANT && c->train.min_learning_rate > 0)
        LS_FAIL(LS_ERR_ARGUMENT, "train.min_learning_rate: %g has no effect with train.schedule=constant",
                c->train.min_learning_rate);
    const int64_t steps = c->train.short_steps + c->train.lengthen_steps;
    if (c->train.short_length > 0 && steps == 0)
        LS_FAIL(LS_ERR_ARGUMENT, "train.short_length: %lld has no effect without train.short_steps or lengthen_steps",
                (long long)c->train.short_length);
    if (c->train.short_length == 0 && steps > 0)
        LS_FAIL(LS_ERR_ARGUMENT, "train.%s: %lld has no effect without train.short_length",
                c->train.short_steps > 0 ? "short_steps" : "lengthen_steps",
                (long long)(c->train.short_steps > 0 ? c->train.short_steps : c->train.lengthen_steps));
    return LS_OK;
}

ls_status config_check(const config *c)
{
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const char *field = (const char *)c + table[i].offset;
        double number = 0;
        int64_t whole;
        if (table[i].range == NULL) continue;
        if (table[i].kind == KEY_WHOLE) {
            memcpy(&whole, field, sizeof whole);
            number = (double)whole;
        } else {
            memcpy(&number, field, sizeof number);
        }
        if (!within(table[i].range, number)) {
            return unfit(table[i].path, NULL, LS_ERR_ARGUMENT, "%g is out of range: allowed is %s", number,
                         table[i].range);
        }
    }
    if (c->model.embed_dim % c->model.num_heads != 0) {
        return unfit("model.embed_dim", "model.num_heads", LS_ERR_ARGUMENT,
                     "%lld cannot be shared by model.num_heads=%lld: it must be a multiple",
                     (long long)c->model.embed_dim, (long long)c->model.num_heads);
    }
    if (c->train.batch % c->train.accumulation != 0) {
        return unfit("train.batch", "train.accumulation", LS_ERR_ARGUMENT,
                     "%lld is not a multiple of train.accumulation=%lld", (long long)c->train.batch,
                     (long long)c->train.accumulation);
    }
    if (c->train.min_learning_rate > c->train.learning_rate) {
        return unfit("train.min_learning_rate", "train.learning_rate", LS_ERR_ARGUMENT,
                     "%g is above train.learning_rate=%g", c->train.min_learning_rate, c->train.learning_rate);
    }
    for (int i = 0; i < PLACES; i++) LS_TRY(check_attention(i, c));
    return check_device(c);
}
