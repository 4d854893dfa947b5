/* json.h - JSON out of files, through jansson, which makes a hundred bytes of memory out of two of text: values are
 * counted before anything is built. And JSON onto a terminal. */
#ifndef KV_JSON_H
#define KV_JSON_H

#include <jansson.h>

#include "traces/base.h"

/* json_loadb of at most `values` values (array elements, members, and the whole); NULL with why->text. */
json_t *kv_json_load(const void *p, size_t n, size_t flags, size_t values, json_error_t *why);
/* json_dumpf and a line end, the same document with \u escapes for what a terminal would obey (plain.h). False when it
 * is out of memory. */
bool kv_json_print(FILE *f, const json_t *v, size_t flags);

#endif
