/* strictjson.h - JSON of model folders, through jansson, read without mercy: one value, valid UTF-8, no key twice, and
 * typed look-ups that refuse what they did not expect. `null` counts as absent. */
#ifndef KV_STRICTJSON_H
#define KV_STRICTJSON_H

#include "traces/json.h"

/* `what` begins the message: "'config.json'", "the header of 'model.safetensors'". The value is an object. */
kv_status kv_json_object(const void *p, size_t n, const char *what, json_t **out, kv_error *err);
/* The same from a file of at most `max` bytes; messages name its path. */
kv_status kv_json_file(const char *path, size_t max, json_t **out, kv_error *err);

/* The first of `keys` ("num_hidden_layers n_layer", separated by spaces) that o has and that is not null; *name is the
 * key's spelling (the first one when there is none). NULL when absent. o may be NULL. */
const json_t *kv_json_find(const json_t *o, const char *keys, char name[64]);

/* Absent: *out keeps its value, and *found (NULL allowed) is false. Several spellings must agree. */
kv_status kv_json_count(const json_t *o, const char *keys, uint32_t lo, uint32_t hi, bool *found, uint32_t *out,
                        kv_error *err);
/* Finite and above 0, or at least 0 with `zero`. */
kv_status kv_json_number(const json_t *o, const char *keys, bool zero, bool *found, double *out, kv_error *err);
kv_status kv_json_bool(const json_t *o, const char *keys, bool *found, bool *out, kv_error *err);
/* *out belongs to o; NULL when absent. */
kv_status kv_json_text(const json_t *o, const char *keys, const char **out, kv_error *err);

#endif
