/* The YAML side of the configuration. libcyaml loads the document by a schema made from the table of keys; since it
 * tells neither the line of what it refuses nor what may have been meant, a walk over libyaml's tree looks first. */
#include "config_yaml.h"

#include <cyaml/cyaml.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

/* ------------------------------------------------------------------------------------------------ schema */

typedef struct builder {
    cyaml_schema_field_t *field; /* all mappings one after the other, each with its end */
    char *name;                  /* the fields' keys */
    int fields;
    int keys;
} builder;

/* Length of the component of path that starts at `from`. */
static size_t component(const char *path, size_t from)
{
    return strcspn(path + from, ".");
}

/* Is an earlier key of the table in the same section, at the depth of `from`, with the same component? */
static int seen_before(int index, size_t from)
{
    const char *path = config_key_at(index)->path;
    const size_t n = from + component(path, from);
    for (int i = 0; i < index; i++) {
        const char *other = config_key_at(i)->path;
        if (strncmp(other, path, n) == 0 && (other[n] == '.' || other[n] == 0)) return 1;
    }
    return 0;
}

/* The fields of the section path[0..from), "" for the whole: every leaf is a string whose pointer goes to the slot of
 * its key, so all sections share one array and lie at offset 0 in it. */
static const cyaml_schema_field_t *build(builder *b, const char *section, size_t from)
{
    int count = 0, members[CONFIG_MAX_KEYS];
    for (int i = 0; i < b->keys; i++) {
        if (strncmp(config_key_at(i)->path, section, from) == 0 && !seen_before(i, from)) members[count++] = i;
    }
    cyaml_schema_field_t *list = b->field + b->fields;
    b->fields += count + 1; /* the end is already zero */
    for (int k = 0; k < count; k++) {
        const char *path = config_key_at(members[k])->path;
        const size_t n = component(path, from);
        char *name = b->name;
        b->name += n + 1;
        memcpy(name, path + from, n);
        list[k].key = name;
        cyaml_schema_value_t *value = &list[k].value;
        if (path[from + n] == '.') {
            value->type = CYAML_MAPPING;
            value->flags = CYAML_FLAG_OPTIONAL;
            value->data_size = (uint32_t)((size_t)b->keys * sizeof(char *));
            value->mapping.fields = build(b, path, from + n + 1);
        } else {
            value->type = CYAML_STRING;
            value->flags = (enum cyaml_flag)((int)CYAML_FLAG_OPTIONAL | (int)CYAML_FLAG_POINTER);
            value->data_size = 1;
            value->string.max = CYAML_UNLIMITED;
            list[k].data_offset = (uint32_t)((size_t)members[k] * sizeof(char *));
        }
    }
    return list;
}

typedef struct schema {
    cyaml_schema_value_t top;
    cyaml_schema_field_t *field;
    char *names;
    char reason[200]; /* libcyaml's first complaint */
} schema;

static void keep_reason(cyaml_log_t level, void *context, const char *format, va_list list)
{
    schema *s = context;
    if (level == CYAML_LOG_ERROR && s->reason[0] == 0) {
        vsnprintf(s->reason, sizeof s->reason, format, list);
        s->reason[strcspn(s->reason, "\n")] = 0;
    }
}

static cyaml_config_t settings(schema *s)
{
    return (cyaml_config_t){.log_fn = keep_reason, .log_ctx = s, .mem_fn = cyaml_mem, .log_level = CYAML_LOG_ERROR};
}

static ls_status schema_create(int keys, schema **out)
{
    schema *s = *out = calloc(1, sizeof *s);
    /* a path of k components starts at most k mappings, and each costs a field and an end */
    if (s == NULL || (s->field = calloc((size_t)keys * 8 + 2, sizeof *s->field)) == NULL ||
        (s->names = calloc((size_t)keys, 2 * sizeof config_key_at(0)->path)) == NULL) {
        LS_FAIL(LS_ERR_MEMORY, "configuration: no memory for its schema");
    }
    builder b = {.field = s->field, .name = s->names, .keys = keys};
    s->top.type = CYAML_MAPPING;
    s->top.flags = CYAML_FLAG_POINTER;
    s->top.data_size = (uint32_t)((size_t)keys * sizeof(char *));
    s->top.mapping.fields = build(&b, "", 0);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ walk */

typedef struct walk {
    const char *name;
    yaml_document_t *document;
    yaml_values *values;
} walk;

static int line_of(const yaml_node_t *node)
{
    return (int)node->start_mark.line + 1;
}

/* One section: path is its name with the dot after it, or "". */
static ls_status visit(const walk *w, const yaml_node_t *node, const char *path)
{
    if (node->type != YAML_MAPPING_NODE) {
        LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: %.*s%sexpected keys with values, such as \"%s\"", w->name, line_of(node),
                path[0] ? (int)strlen(path) - 1 : 0, path, path[0] ? ": " : "",
                path[0] ? "num_heads: 4" : "model: {num_heads: 4}");
    }
    yaml_node_pair_t *const pairs = node->data.mapping.pairs.start;
    const ptrdiff_t count = node->data.mapping.pairs.top - pairs;
    for (ptrdiff_t i = 0; i < count; i++) {
        const yaml_node_t *key = yaml_document_get_node(w->document, pairs[i].key);
        const yaml_node_t *value = yaml_document_get_node(w->document, pairs[i].value);
        const int line = line_of(key);
        const char *word = key->type == YAML_SCALAR_NODE ? (const char *)key->data.scalar.value : NULL;
        if (word == NULL || strlen(word) != key->data.scalar.length)
            LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: a key must be a word", w->name, line);
        if (strchr(word, '.') != NULL) /* as --set has it, and messages */
            LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: %s%.80s: in a file the parts of a key are nested, such as %s", w->name,
                    line, path, word, "\"model: {num_heads: 4}\"");
        char full[160], buffer[256];
        snprintf(full, sizeof full, "%s%s", path, word);
        for (ptrdiff_t j = 0; j < i; j++) {
            const yaml_node_t *other = yaml_document_get_node(w->document, pairs[j].key);
            if (strcmp((const char *)other->data.scalar.value, word) == 0) {
                LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: %s: was already given in line %d", w->name, line, full,
                        line_of(other));
            }
        }
        const char *complaint = config_unknown(full, buffer);
        const int index = config_find(full);
        if (index < 0 && complaint[0] != 0) LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: %s: %s", w->name, line, full, complaint);
        if (index < 0) {
            strcat(full, ".");
            LS_TRY(visit(w, value, full));
            continue;
        }
        if (value->type != YAML_SCALAR_NODE) {
            LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: %s: expected a single value, found %s", w->name, line, full,
                    value->type == YAML_SEQUENCE_NODE ? "a list" : "keys");
        }
        if (strlen((const char *)value->data.scalar.value) != value->data.scalar.length) {
            LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: %s: the value contains a zero byte", w->name, line, full);
        }
        w->values->line[index] = line;
    }
    return LS_OK;
}

static ls_status syntax(const char *name, const yaml_parser_t *p)
{
    if (p->error == YAML_MEMORY_ERROR) LS_FAIL(LS_ERR_MEMORY, "%s: no memory to read it", name);
    if (p->error == YAML_READER_ERROR) {
        LS_FAIL(LS_ERR_ARGUMENT, "%s: not a text file: %s at byte %zu", name, p->problem, p->problem_offset);
    }
    LS_FAIL(LS_ERR_ARGUMENT, "%s:%d: not YAML: %s%s%s", name, (int)p->problem_mark.line + 1,
            p->context ? p->context : "", p->context ? ", " : "", p->problem ? p->problem : "unknown problem");
}

static ls_status look(const char *name, const char *text, size_t size, yaml_values *values)
{
    yaml_parser_t parser;
    yaml_document_t document;
    if (!yaml_parser_initialize(&parser)) LS_FAIL(LS_ERR_MEMORY, "%s: no memory to read it", name);
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, size);
    ls_status status = LS_OK;
    for (int count = 0; status == LS_OK; count++) {
        if (!yaml_parser_load(&parser, &document)) {
            status = syntax(name, &parser);
            break;
        }
        const yaml_node_t *root = yaml_document_get_root_node(&document);
        if (root != NULL && count > 0) {
            status = ls_fail(LS_ERR_ARGUMENT, "%s:%d: a second document begins here; a configuration is one", name,
                             line_of(root));
        } else if (root != NULL) {
            status = visit(&(walk){name, &document, values}, root, "");
        }
        yaml_document_delete(&document);
        if (root == NULL) break;
    }
    yaml_parser_delete(&parser);
    return status;
}

/* ------------------------------------------------------------------------------------------------ load */

ls_status yaml_values_load(const char *name, const char *text, size_t size, int keys, yaml_values *v)
{
    *v = (yaml_values){0};
    schema *s = NULL;
    ls_status status = schema_create(keys, &s);
    v->schema = s;
    if (status == LS_OK && (v->line = calloc((size_t)keys, sizeof *v->line)) == NULL) {
        status = ls_fail(LS_ERR_MEMORY, "%s: no memory to read it", name);
    }
    if (status == LS_OK) status = look(name, text, size, v);
    if (status == LS_OK) {
        const cyaml_config_t how = settings(s);
        const cyaml_err_t error = cyaml_load_data((const uint8_t *)text, size, &how, &s->top, &v->loaded, NULL);
        if (error == CYAML_ERR_OOM) {
            status = ls_fail(LS_ERR_MEMORY, "%s: no memory to read it", name);
        } else if (error != CYAML_OK) {
            status = ls_fail(LS_ERR_ARGUMENT, "%s: %s", name, s->reason[0] ? s->reason : cyaml_strerror(error));
        }
        v->text = v->loaded;
    }
    if (status != LS_OK) yaml_values_free(v);
    return status;
}

void yaml_values_free(yaml_values *v)
{
    schema *s = v->schema;
    if (v->loaded != NULL) {
        const cyaml_config_t how = settings(s);
        cyaml_free(&how, &s->top, v->loaded, 0);
    }
    if (s != NULL) {
        free(s->field);
        free(s->names);
    }
    free(s);
    free(v->line);
    *v = (yaml_values){0};
}

/* ------------------------------------------------------------------------------------------------ writing */

int yaml_can_hold(const char *text)
{
    for (const unsigned char *p = (const unsigned char *)text; *p != 0;) {
        const int more = *p < 0x80 ? 0 : *p >= 0xc2 && *p < 0xe0 ? 1 : *p >= 0xe0 && *p < 0xf0 ? 2 : *p < 0xf5 ? 3 : 4;
        if (more == 4 || (*p >= 0x80 && *p < 0xc2)) return 0;
        uint32_t code = more == 0 ? *p : *p & (0x3fu >> more);
        p++;
        for (int k = 0; k < more; k++, p++) {
            if ((*p & 0xc0) != 0x80) return 0;
            code = code << 6 | (*p & 0x3fu);
        }
        if ((more == 2 && code < 0x800) || (more == 3 && (code < 0x10000 || code > 0x10ffff)) ||
            (code >= 0xd800 && code < 0xe000)) {
            return 0;
        }
    }
    return 1;
}

/* Double quotes; what a reader of YAML would take for a line break or refuse is escaped. */
static void write_quoted(FILE *out, const char *text)
{
    fputc('"', out);
    for (const unsigned char *p = (const unsigned char *)text; *p != 0; p++) {
        const uint32_t next = p[1]; /* 0 at the end */
        if (*p == '"' || *p == '\\') {
            fprintf(out, "\\%c", *p);
        } else if (*p < 0x20 || *p == 0x7f) {
            fprintf(out, "\\x%02x", *p);
        } else if (*p == 0xc2 && next < 0xa0) { /* the C1 controls, U+0080 to U+009F */
            fprintf(out, "\\x%02x", next);
            p++;
        } else if ((*p == 0xe2 && next == 0x80 && (p[2] | 1) == 0xa9) || (*p == 0xef && p[1] >= 0xbb)) {
            /* U+2028, U+2029, and the end of the plane with its byte order mark and noncharacters */
            fprintf(out, "\\u%04x", (*p & 0xfu) << 12 | (next & 0x3f) << 6 | (p[2] & 0x3fu));
            p += 2;
        } else {
            fputc(*p, out);
        }
    }
    fputc('"', out);
}

/* With as few digits as read back to the same value. */
static void write_real(FILE *out, double x)
{
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, x);
        if (strtod(text, NULL) == x) break;
    }
    fputs(text, out);
}

static void write_value(FILE *out, const config_key *key, const config *c)
{
    const char *field = (const char *)c + key->offset;
    int64_t whole;
    uint64_t seed;
    double real;
    int word;
    switch (key->kind) {
    case KEY_WHOLE:
        memcpy(&whole, field, sizeof whole);
        fprintf(out, "%lld", (long long)whole);
        break;
    case KEY_SEED:
        memcpy(&seed, field, sizeof seed);
        fprintf(out, "%llu", (unsigned long long)seed);
        break;
    case KEY_REAL:
        memcpy(&real, field, sizeof real);
        write_real(out, real);
        break;
    case KEY_WORD:
        memcpy(&word, field, sizeof word);
        fputs(key->words[word], out);
        break;
    default:
        if (key->words == NULL && key->kind == KEY_TEXT)
            write_quoted(out, field);
        else
            fputs(field, out);
        break;
    }
}

/* The value of an option if the attention's mechanism has it, or NULL. */
static const double *option_value(const config_key *key, const config *c)
{
    const config_attention *a = (const config_attention *)(const void *)((const char *)c + key->offset);
    int count = 0;
    const ls_option_info *info = ls_mechanism_options(a->mechanism, &count);
    for (int i = 0; i < count && i < LS_MAX_OPTIONS; i++) {
        if (strcmp(info[i].name, strrchr(key->path, '.') + 1) == 0) return &a->value[i];
    }
    return NULL;
}

void config_value(const config_key *key, const config *c, char *text, size_t size)
{
    const double *option = key->kind == KEY_OPTION ? option_value(key, c) : NULL;
    char *all = NULL;
    size_t n = 0;
    FILE *out = open_memstream(&all, &n);
    text[0] = 0;
    if (out == NULL) return;
    if (option != NULL)
        write_real(out, *option);
    else if (key->kind != KEY_OPTION)
        write_value(out, key, c);
    if (fclose(out) == 0 && all != NULL) snprintf(text, size, "%s", all);
    free(all);
}

ls_status config_text(const config *c, char **text)
{
    size_t size = 0;
    const char *before = "";
    *text = NULL;
    FILE *out = open_memstream(text, &size);
    if (out == NULL) LS_FAIL(LS_ERR_MEMORY, "configuration: no memory to write it");
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const config_key *key = config_key_at(i);
        const double *option = key->kind == KEY_OPTION ? option_value(key, c) : NULL;
        if (key->kind == KEY_OPTION && option == NULL) continue;
        /* open the sections that the key before was not in */
        size_t from = 0;
        int depth = 0;
        for (; strchr(key->path + from, '.') != NULL; depth++) {
            const size_t n = from + component(key->path, from);
            if (strncmp(before, key->path, n + 1) != 0) {
                fprintf(out, "%*s%.*s:\n", 2 * depth, "", (int)(n - from), key->path + from);
            }
            from = n + 1;
        }
        fprintf(out, "%*s%s: ", 2 * depth, "", key->path + from);
        if (option != NULL)
            fprintf(out, "%.17g", *option);
        else
            write_value(out, key, c);
        fputc('\n', out);
        before = key->path;
    }
    if (fclose(out) == 0 && *text != NULL) return LS_OK;
    free(*text);
    *text = NULL;
    LS_FAIL(LS_ERR_MEMORY, "configuration: no memory to write it");
}

/* ------------------------------------------------------------------------------------------------ reference */

static void write_words(FILE *out, const char *const *words)
{
    for (int i = 0; words[i] != NULL; i++) fprintf(out, "%s%s", i ? "|" : "", words[i]);
}

void config_reference(FILE *out)
{
    fprintf(out, "Keys of a configuration, as section.key (a file nests them), with default and range:\n\n");
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const config_key *key = config_key_at(i);
        if (key->kind == KEY_OPTION) continue;
        fprintf(out, "  %-26s %-9s ", key->path, key->initial[0] ? key->initial : "\"\"");
        char *list = NULL;
        size_t size = 0;
        FILE *range = open_memstream(&list, &size);
        if (range == NULL) return;
        if (key->words != NULL)
            write_words(range, key->words);
        else if (key->range != NULL)
            fputs(key->range, range);
        else
            fputs(key->kind == KEY_SEED ? "[0, 2^64)" : key->kind == KEY_MECHANISM ? "a mechanism" : "text", range);
        fclose(range);
        fprintf(out, "%-28s %s\n", list, key->help);
        free(list);
    }
    fprintf(out, "\nSizes may end in K or M (1024, 1024^2).\n"
                 "\nOptions of mechanisms, as model.encoder.options.NAME (or decoder, cross):\n");
    for (int m = 0; ls_mechanism_name(m) != NULL; m++) {
        int count = 0;
        const ls_option_info *option = ls_mechanism_options(ls_mechanism_name(m), &count);
        fprintf(out, "\n  %s%s\n", ls_mechanism_name(m), count ? "" : ": none");
        for (int o = 0; o < count; o++) {
            fprintf(out, "    %-24s %-9g [%g, %g]%s  %s\n", option[o].name, option[o].initial, option[o].min,
                    option[o].max, option[o].is_integer ? " whole" : "", option[o].help ? option[o].help : "");
        }
    }
}
