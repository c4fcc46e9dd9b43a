/* The table of mechanisms, and what can be asked of it without making one. */
#include "mechanism.h"

#define MECHANISM(name) extern const ls_mechanism ls_##name##_mechanism;
#include "mechanisms.def"
#undef MECHANISM

static const ls_mechanism *const table[] = {
#define MECHANISM(name) &ls_##name##_mechanism,
#include "mechanisms.def"
#undef MECHANISM
};
enum { COUNT = sizeof table / sizeof *table };

const ls_mechanism *ls_mechanism_find(const char *name)
{
    for (int i = 0; i < COUNT; i++)
        if (name != NULL && strcmp(table[i]->name, name) == 0) return table[i];
    return NULL;
}

const char *ls_mechanism_name(int index)
{
    return index >= 0 && index < COUNT ? table[index]->name : NULL;
}

const ls_option_info *ls_mechanism_options(const char *mechanism, int *count)
{
    const ls_mechanism *m = ls_mechanism_find(mechanism);
    int n = 0;
    while (m != NULL && m->option != NULL && m->option[n].name != NULL) n++;
    if (count != NULL) *count = n;
    return n > 0 ? m->option : NULL;
}

int ls_mechanism_has(const char *mechanism, ls_pattern pattern)
{
    const ls_mechanism *m = ls_mechanism_find(mechanism);
    return m != NULL && (unsigned)pattern < 4 && m->phases[pattern] != NULL;
}

int ls_mechanism_has_step(const char *mechanism, ls_pattern pattern)
{
    const ls_mechanism *m = ls_mechanism_find(mechanism);
    return m != NULL && (unsigned)pattern < 4 && m->step[pattern] != NULL;
}

int ls_mechanism_has_level(const char *mechanism, ls_level level)
{
    const ls_mechanism *m = ls_mechanism_find(mechanism);
    return m != NULL && (level == LS_LEVEL_LAYER || (level == LS_LEVEL_CORE && !m->layer_only));
}

const char *ls_mechanism_phase(const char *mechanism, ls_pattern pattern, int index, ls_crossing *crossing)
{
    if (!ls_mechanism_has(mechanism, pattern) || index < 0) return NULL;
    const ls_mechanism *m = ls_mechanism_find(mechanism);
    const ls_phase *phase = m->phases[pattern];
    double value[LS_MAX_OPTIONS] = {0};
    for (int i = 0; m->option != NULL && m->option[i].name != NULL; i++) value[i] = m->option[i].initial;
    const ls_pass p = {.pattern = pattern, .option = value, .kit = m->kit, .all_queries = 1 << 20, .all_keys = 1 << 20};
    for (; phase->name != NULL; phase++)
        if (ls_is_needed(&p, phase) && index-- == 0) break;
    if (phase->name != NULL && crossing != NULL) *crossing = phase->crossing;
    return phase->name;
}

const char *ls_pattern_name(ls_pattern pattern)
{
    static const char *const names[] = {"noncausal self", "causal self", "noncausal cross", "causal cross"};
    return (unsigned)pattern < 4 ? names[pattern] : "unknown pattern";
}

ls_status ls_attention_defaults(const char *mechanism, ls_attention_options *options)
{
    const ls_mechanism *m = ls_mechanism_find(mechanism);
    if (m == NULL) {
        char known[256] = "";
        for (int i = 0; i < COUNT; i++) {
            strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
            strncat(known, table[i]->name, sizeof known - strlen(known) - 1);
        }
        LS_FAIL(LS_ERR_ARGUMENT, "attention: there is no mechanism \"%s\": use one of %s",
                mechanism == NULL ? "" : mechanism, known);
    }
    LS_NEED(options, "attention: options is NULL");
    *options = (ls_attention_options){.mechanism = m->name, .pattern = LS_NS};
    for (int i = 0; m->option != NULL && m->option[i].name != NULL; i++) options->value[i] = m->option[i].initial;
    return LS_OK;
}

ls_status ls_attention_set(ls_attention_options *options, const char *name, double value)
{
    const ls_mechanism *m = options != NULL ? ls_mechanism_find(options->mechanism) : NULL;
    if (m == NULL) LS_FAIL(LS_ERR_ARGUMENT, "attention: set the mechanism before its options");
    LS_NEED(name, "%s: the name of an option is NULL", m->name);
    for (int i = 0; m->option != NULL && m->option[i].name != NULL; i++) {
        const ls_option_info *o = &m->option[i];
        if (strcmp(o->name, name) != 0 && strcmp(o->symbol, name) != 0) continue;
        if (!(value >= o->min && value <= o->max) || (o->is_integer && value != rint(value)))
            LS_FAIL(LS_ERR_ARGUMENT, "%s: %s = %g is out of range: use %s from %g to %g", m->name, o->name, value,
                    o->is_integer ? "an integer" : "a number", o->min, o->max);
        options->value[i] = value;
        return LS_OK;
    }
    LS_FAIL(LS_ERR_ARGUMENT, "%s: there is no option \"%s\"", m->name, name);
}
