/* Private to config: a YAML document as one text for each key of the table. */
#ifndef LS_CONFIG_YAML_H
#define LS_CONFIG_YAML_H

#include "config.h"

/* The scalar that a document gives to each key of the table, in its order. */
typedef struct yaml_values {
    char **text; /* NULL: the document does not mention the key */
    int *line;   /* 1-based */
    void *loaded, *schema;
} yaml_values;
/* Structure only: sections, unknown keys, duplicates. What a text must look like is for the caller to say. */
ls_status yaml_values_load(const char *name, const char *text, size_t size, int keys, yaml_values *v);
void yaml_values_free(yaml_values *v);

/* Valid UTF-8 is what YAML can hold. */
int yaml_can_hold(const char *text);

enum { CONFIG_MAX_KEYS = 256 };
/* "unknown key (did you mean embed_dim?)"; "" where the path is a section, NULL where it is a key. */
const char *config_unknown(const char *path, char buffer[256]);
int config_find(const char *path); /* index in the table, or -1 */

#endif
