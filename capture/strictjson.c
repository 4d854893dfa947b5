/* strictjson.c - see strictjson.h. */
#include "capture/strictjson.h"

#include <math.h>
#include <stdlib.h>

#include "capture/strmap.h"

#define VALUES_MAX (2u << 20) /* of KV_STORE_TENSORS_MAX tensors, each some ten */

kv_status kv_json_object(const void *p, size_t n, const char *what, json_t **out, kv_error *err)
{
    json_error_t why;
    *out = kv_json_load(p, n, JSON_REJECT_DUPLICATES, VALUES_MAX, &why);
    if (!*out) return kv_fail(err, KV_EFORMAT, "%s is not valid JSON: %s (line %d)", what, why.text, why.line);
    if (json_is_object(*out)) return KV_OK;
    json_decref(*out), *out = NULL;
    return kv_fail(err, KV_EFORMAT, "%s is not a JSON object", what);
}

kv_status kv_json_file(const char *path, size_t max, json_t **out, kv_error *err)
{
    uint8_t *p = NULL;
    size_t n;
    char what[400];
    *out = NULL;
    kv_status st = kv_read_regular(path, max, &p, &n, err);
    if (st) return st;
    snprintf(what, sizeof what, "'%s'", path);
    st = kv_json_object(p, n, what, out, err);
    free(p);
    return st;
}

const json_t *kv_json_find(const json_t *o, const char *keys, char name[64])
{
    snprintf(name, 64, "%.*s", (int)strcspn(keys, " "), keys);
    for (const char *k = keys; o && *k;) {
        char one[64];
        size_t n = strcspn(k, " ");
        snprintf(one, sizeof one, "%.*s", (int)n, k);
        const json_t *v = json_object_get(o, one);
        if (v && !json_is_null(v)) return memcpy(name, one, sizeof one), v;
        k += n + (k[n] == ' ');
    }
    return NULL;
}

kv_status kv_json_count(const json_t *o, const char *keys, uint32_t lo, uint32_t hi, bool *found, uint32_t *out,
                        kv_error *err)
{
    char name[64];
    const json_t *v = kv_json_find(o, keys, name);
    if (found) *found = v;
    if (!v) return KV_OK;
    if (!json_is_integer(v)) return kv_fail(err, KV_EFORMAT, "key '%s' is not a whole number", name);
    json_int_t x = json_integer_value(v);
    if (x < lo || x > hi)
        return kv_fail(err, KV_EFORMAT, "key '%s' is %lld (%u to %u are possible)", name, (long long)x, lo, hi);
    /* other spellings that are there too must agree */
    for (const char *k = keys; *k;) {
        char one[64];
        size_t n = strcspn(k, " ");
        snprintf(one, sizeof one, "%.*s", (int)n, k);
        const json_t *w = json_object_get(o, one);
        if (w && !json_is_null(w) && !json_equal(v, w))
            return kv_fail(err, KV_EFORMAT, "keys '%s' and '%s' contradict each other", name, one);
        k += n + (k[n] == ' ');
    }
    *out = (uint32_t)x;
    return KV_OK;
}

kv_status kv_json_number(const json_t *o, const char *keys, bool zero, bool *found, double *out, kv_error *err)
{
    char name[64];
    const json_t *v = kv_json_find(o, keys, name);
    if (found) *found = v;
    if (!v) return KV_OK;
    if (!json_is_number(v)) return kv_fail(err, KV_EFORMAT, "key '%s' is not a number", name);
    double x = json_number_value(v);
    if (!isfinite(x) || x < 0 || (x == 0 && !zero) || x > 1e30)
        return kv_fail(err, KV_EFORMAT, "key '%s' is %g", name, x);
    *out = x;
    return KV_OK;
}

kv_status kv_json_bool(const json_t *o, const char *keys, bool *found, bool *out, kv_error *err)
{
    char name[64];
    const json_t *v = kv_json_find(o, keys, name);
    if (found) *found = v;
    if (!v) return KV_OK;
    if (!json_is_boolean(v)) return kv_fail(err, KV_EFORMAT, "key '%s' is neither true nor false", name);
    *out = json_is_true(v);
    return KV_OK;
}

kv_status kv_json_text(const json_t *o, const char *keys, const char **out, kv_error *err)
{
    char name[64];
    const json_t *v = kv_json_find(o, keys, name);
    *out = NULL;
    if (!v) return KV_OK;
    if (!json_is_string(v)) return kv_fail(err, KV_EFORMAT, "key '%s' is not a string", name);
    *out = json_string_value(v);
    return KV_OK;
}
