/* meta.c - a trace's metadata: checks, copies, and the JSON it is stored as. The JSON is one flat object; keys that are
 * not in the table of FORMAT.md are kept as they are in kv_trace_info.extra. */
#include "traces/format.h"
#include "traces/json.h"

#include <ctype.h>
#include <math.h>
#include <stdlib.h>

#define STRING_MAX 65536u
#define SPANS_MAX  (1u << 18)
#define VALUES_MAX (1u << 20) /* JSON values in all: spans are three each */
#define EXTRA_MAX  (1u << 17) /* of them in `extra` */

/* ---------------------------------------------------------------------------------------------- checks */
static bool is_sha(const char *s)
{
    if (!s) return true;
    size_t n = strlen(s);
    for (size_t i = 0; i < n; i++)
        if (!isdigit((unsigned char)s[i]) && !(s[i] >= 'a' && s[i] <= 'f')) return false;
    return n == 64;
}

/* Strings reach terminals and JSON: bounded, UTF-8. jansson tells us about the latter when it makes the value. */
static bool string_ok(const char *s, bool needed)
{
    return s ? strlen(s) <= STRING_MAX : !needed;
}

kv_status kvt_check_info(const kv_trace_info *i, kv_error *err)
{
    const char *what;
    uint32_t rot = i->rope_dim ? i->rope_dim : i->head_dim;
    if ((what = "layers", !i->n_layer || i->n_layer > KV_LAYERS_MAX || !i->layer || !i->window) ||
        (what = "n_layer_model", i->n_layer_model < i->n_layer || i->n_layer_model > KV_LAYERS_MAX) ||
        (what = "q_heads", !i->n_q_head || i->n_q_head > KV_HEADS_MAX) ||
        (what = "kv_heads (must divide q_heads)",
         !i->n_kv_head || i->n_kv_head > i->n_q_head || i->n_q_head % i->n_kv_head) ||
        (what = "head_dim", !i->head_dim || i->head_dim > KV_HEAD_DIM_MAX) ||
        (what = "hidden", !i->hidden || i->hidden > KVT_HIDDEN_MAX) ||
        (what = "tokens", !i->n_token || i->n_token > KV_TOKENS_MAX) ||
        (what = "prompt_tokens", !i->n_prompt || i->n_prompt > i->n_token) ||
        (what = "context_tokens", i->n_context > i->n_prompt) || (what = "scale", !isfinite(i->scale)) ||
        (what = "softcap", !isfinite(i->softcap) || i->softcap < 0) ||
        (what = "rope_theta", !isfinite(i->rope_theta) || i->rope_theta < 0) ||
        (what = "rope_dim", i->rope_dim > i->head_dim || i->rope_dim % 2) ||
        (what = "inv_freq", i->inv_freq && rot % 2) || (what = "rope_mscale", !isfinite(i->rope_mscale)) ||
        (what = "post_norm_eps", !isfinite(i->post_norm_eps) || i->post_norm_eps < 0) ||
        (what = "out_scale", !isfinite(i->out_scale) || i->out_scale < 0) ||
        (what = "dtype", i->dtype != KV_F32 && i->dtype != KV_F16 && i->dtype != KV_BF16) ||
        (what = "model", !string_ok(i->model, true)) || (what = "arch", !string_ok(i->arch, true)) ||
        (what = "record", !string_ok(i->record, true)) || (what = "prompt_id", !string_ok(i->prompt_id, false)) ||
        (what = "category", !string_ok(i->category, false)) || (what = "model_sha256", !is_sha(i->model_sha256)) ||
        (what = "wo_sha256", !is_sha(i->wo_sha256)) ||
        (what = "evidence", i->n_evidence > SPANS_MAX || (i->n_evidence && !i->evidence)) ||
        (what = "question", i->question.start > i->question.end))
        goto bad;
    for (uint32_t l = 0; l < i->n_layer; l++)
        if ((what = "layers (must ascend and lie in the model)",
             i->layer[l] >= i->n_layer_model || (l && i->layer[l] <= i->layer[l - 1])))
            goto bad;
    for (uint32_t k = 0; k < i->n_evidence; k++)
        if ((what = "evidence", i->evidence[k].start > i->evidence[k].end)) goto bad;
    for (uint32_t j = 0; i->inv_freq && j < rot / 2; j++)
        if ((what = "inv_freq", !isfinite(i->inv_freq[j]))) goto bad;
    return KV_OK;
bad:
    return kv_fail(err, KV_EFORMAT, "bad metadata: '%s' is missing, out of bounds or contradicts the rest", what);
}

/* ---------------------------------------------------------------------------------------------- copies */
static bool copy_string(const char *from, char **to)
{
    return !from || (*to = kv_format("%s", from));
}

/* NULL stays NULL. */
static bool copy_array(const void *from, size_t n, size_t size, void *to)
{
    void *p = NULL;
    if (from && kv_array(&p, n, size, NULL) == KV_OK && n) memcpy(p, from, n * size);
    memcpy(to, &p, sizeof p);
    return !from || p;
}

kv_status kv_trace_info_copy(const kv_trace_info *from, kv_trace_info *to, kv_error *err)
{
    kv_trace_info c = *from;
    size_t rot = (from->rope_dim ? from->rope_dim : from->head_dim) / 2;
    c.model = c.arch = c.model_sha256 = c.prompt_id = c.category = c.record = c.wo_sha256 = c.extra = NULL;
    c.layer = c.window = NULL, c.inv_freq = NULL, c.evidence = NULL;
    bool ok = copy_string(from->model, &c.model) && copy_string(from->arch, &c.arch) &&
              copy_string(from->model_sha256, &c.model_sha256) && copy_string(from->prompt_id, &c.prompt_id) &&
              copy_string(from->category, &c.category) && copy_string(from->record, &c.record) &&
              copy_string(from->wo_sha256, &c.wo_sha256) && copy_string(from->extra, &c.extra) &&
              copy_array(from->layer, from->n_layer, sizeof *c.layer, &c.layer) &&
              copy_array(from->window, from->n_layer, sizeof *c.window, &c.window) &&
              copy_array(from->inv_freq, rot, sizeof *c.inv_freq, &c.inv_freq) &&
              copy_array(from->evidence, from->n_evidence, sizeof *c.evidence, &c.evidence);
    if (!ok) {
        kv_trace_info_free(&c);
        memset(to, 0, sizeof *to);
        return kv_fail(err, KV_ENOMEM, "out of memory");
    }
    *to = c;
    return KV_OK;
}

void kv_trace_info_free(kv_trace_info *i)
{
    if (!i) return;
    free(i->model), free(i->arch), free(i->model_sha256), free(i->prompt_id), free(i->category);
    free(i->layer), free(i->window), free(i->inv_freq), free(i->record), free(i->evidence);
    free(i->wo_sha256), free(i->extra);
    memset(i, 0, sizeof *i);
}

/* --------------------------------------------------------------------------------------------- to JSON */
static json_t *array_u32(const uint32_t *v, uint32_t n)
{
    json_t *a = json_array();
    for (uint32_t i = 0; i < n; i++) json_array_append_new(a, json_integer(v[i]));
    return a;
}

static json_t *span_json(kv_span s)
{
    return json_pack("[I,I]", (json_int_t)s.start, (json_int_t)s.end);
}

/* NULL strings are left out; a string that is not UTF-8 is an error. */
static bool set_string(json_t *o, const char *key, const char *s)
{
    return !s || json_object_set_new(o, key, json_string(s)) == 0;
}

kv_status kvt_info_to_json(const kv_trace_info *i, char **out, kv_error *err)
{
    kv_status st = kvt_check_info(i, err);
    json_t *o = NULL, *extra = NULL, *v;
    const char *key;
    json_error_t je;
    bool ok = true;
    *out = NULL;
    if (st) goto out;
    if (i->extra) {
        extra = kv_json_load(i->extra, strlen(i->extra), JSON_REJECT_DUPLICATES, EXTRA_MAX, &je);
        if (!json_is_object(extra)) {
            st = kv_fail(err, KV_EMISUSE, "bad metadata: 'extra' is not a JSON object of at most %u values", EXTRA_MAX);
            goto out;
        }
    }
    o = json_object();
    ok = set_string(o, "model", i->model) && set_string(o, "arch", i->arch) &&
         set_string(o, "model_sha256", i->model_sha256) && set_string(o, "prompt_id", i->prompt_id) &&
         set_string(o, "category", i->category) && set_string(o, "record", i->record) &&
         set_string(o, "wo_sha256", i->wo_sha256) && set_string(o, "dtype", kv_dtype_name(i->dtype));
    if (!ok) {
        st = kv_fail(err, KV_EFORMAT, "bad metadata: a string (model, prompt_id, category ...) is not valid UTF-8");
        goto out;
    }
    ok &= !json_object_set_new(o, "layers", array_u32(i->layer, i->n_layer));
    ok &= !json_object_set_new(o, "n_layer_model", json_integer(i->n_layer_model));
    ok &= !json_object_set_new(o, "q_heads", json_integer(i->n_q_head));
    ok &= !json_object_set_new(o, "kv_heads", json_integer(i->n_kv_head));
    ok &= !json_object_set_new(o, "head_dim", json_integer(i->head_dim));
    ok &= !json_object_set_new(o, "hidden", json_integer(i->hidden));
    ok &= !json_object_set_new(o, "tokens", json_integer(i->n_token));
    ok &= !json_object_set_new(o, "prompt_tokens", json_integer(i->n_prompt));
    ok &= !json_object_set_new(o, "context_tokens", json_integer(i->n_context));
    ok &= !json_object_set_new(o, "window", array_u32(i->window, i->n_layer));
    ok &= !json_object_set_new(o, "scale", json_real(i->scale));
    ok &= !json_object_set_new(o, "softcap", json_real(i->softcap));
    ok &= !json_object_set_new(o, "rope_theta", json_real(i->rope_theta));
    ok &= !json_object_set_new(o, "rope_dim", json_integer(i->rope_dim));
    ok &= !json_object_set_new(o, "rope_mscale", json_real(i->rope_mscale));
    if (i->post_norm_eps > 0) ok &= !json_object_set_new(o, "post_norm_eps", json_real(i->post_norm_eps));
    if (i->out_scale > 0 && i->out_scale != 1) ok &= !json_object_set_new(o, "out_scale", json_real(i->out_scale));
    ok &= !json_object_set_new(o, "obs_rows", json_integer(i->obs_rows));
    if (i->inv_freq) {
        json_object_set_new(o, "inv_freq", v = json_array());
        for (uint32_t j = 0; j < (i->rope_dim ? i->rope_dim : i->head_dim) / 2; j++)
            ok &= !json_array_append_new(v, json_real(i->inv_freq[j]));
    }
    json_object_set_new(o, "evidence", v = json_array());
    for (uint32_t k = 0; k < i->n_evidence; k++) ok &= !json_array_append_new(v, span_json(i->evidence[k]));
    ok &= !json_object_set_new(o, "question", span_json(i->question));
    json_object_foreach(extra, key, v)
    {
        if (json_object_get(o, key)) {
            st = kv_fail(err, KV_EMISUSE, "bad metadata: 'extra' repeats the key '%s'", key);
            goto out;
        }
        ok &= !json_object_set(o, key, v);
    }
    if (ok) *out = json_dumps(o, JSON_COMPACT);
    if (!*out) st = kv_fail(err, KV_ENOMEM, "out of memory");
out:
    json_decref(o);
    json_decref(extra);
    return st;
}

/* ------------------------------------------------------------------------------------------- from JSON */
/* Reads take their key out of the object, so that what is left is `extra`. */
typedef struct {
    json_t *o;
    const char *bad; /* first key that was wrong */
    bool memory;     /* or there was none to hold it */
} fields;

static void wrong(fields *f, const char *key)
{
    if (!f->bad) f->bad = key;
}

static char *take_string(fields *f, const char *key)
{
    json_t *v = json_object_get(f->o, key);
    char *s = NULL;
    if (!v) return NULL;
    if (!json_is_string(v))
        wrong(f, key);
    else if (!(s = kv_format("%s", json_string_value(v))))
        f->memory = true;
    json_object_del(f->o, key);
    return s;
}

static bool to_u32(const json_t *v, uint32_t *out)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > UINT32_MAX) return false;
    return *out = (uint32_t)json_integer_value(v), true;
}

static uint32_t take_u32(fields *f, const char *key, bool needed)
{
    json_t *v = json_object_get(f->o, key);
    uint32_t u = 0;
    if (v ? !to_u32(v, &u) : needed) wrong(f, key);
    json_object_del(f->o, key);
    return u;
}

static float take_float(fields *f, const char *key, double def)
{
    json_t *v = json_object_get(f->o, key);
    if (v && !json_is_number(v)) wrong(f, key);
    double d = json_is_number(v) ? json_number_value(v) : def;
    if (!(fabs(d) <= 3.0e38)) wrong(f, key), d = 0;
    json_object_del(f->o, key);
    return (float)d;
}

/* An array of at most `max` elements, referenced: the caller drops it. */
static json_t *take_array(fields *f, const char *key, size_t max, bool needed)
{
    json_t *v = json_incref(json_object_get(f->o, key));
    if (v ? !json_is_array(v) || json_array_size(v) > max : needed) {
        wrong(f, key);
        json_decref(v);
        v = NULL;
    }
    json_object_del(f->o, key);
    return v;
}

static uint32_t *take_u32s(fields *f, const char *key, size_t max, uint32_t *n)
{
    json_t *a = take_array(f, key, max, true);
    uint32_t *v = NULL;
    *n = (uint32_t)json_array_size(a);
    if (kv_array(&v, *n, sizeof *v, NULL)) f->memory = true, *n = 0;
    for (uint32_t i = 0; i < *n; i++)
        if (!to_u32(json_array_get(a, i), &v[i])) wrong(f, key);
    json_decref(a);
    return v;
}

static void to_span(fields *f, const char *key, const json_t *v, kv_span *s)
{
    if (json_array_size(v) != 2 || !to_u32(json_array_get(v, 0), &s->start) || !to_u32(json_array_get(v, 1), &s->end))
        wrong(f, key);
}

static void take_spans(fields *f, kv_trace_info *i)
{
    json_t *a = take_array(f, "evidence", SPANS_MAX, false);
    i->n_evidence = (uint32_t)json_array_size(a);
    if (i->n_evidence && kv_array(&i->evidence, i->n_evidence, sizeof *i->evidence, NULL))
        f->memory = true, i->n_evidence = 0;
    for (uint32_t k = 0; k < i->n_evidence; k++) to_span(f, "evidence", json_array_get(a, k), &i->evidence[k]);
    json_decref(a);
    if ((a = take_array(f, "question", 2, false))) to_span(f, "question", a, &i->question);
    json_decref(a);
}

static void take_inv_freq(fields *f, kv_trace_info *i)
{
    json_t *a = take_array(f, "inv_freq", KV_HEAD_DIM_MAX / 2, false);
    size_t n = json_array_size(a);
    if (a && n != (i->rope_dim ? i->rope_dim : i->head_dim) / 2) wrong(f, "inv_freq");
    if (a && kv_array(&i->inv_freq, n, sizeof *i->inv_freq, NULL)) f->memory = true, n = 0;
    for (size_t j = 0; j < n; j++) {
        const json_t *v = json_array_get(a, j);
        double d = json_is_number(v) ? json_number_value(v) : NAN;
        if (!(fabs(d) <= 3.0e38)) wrong(f, "inv_freq"), d = 0;
        i->inv_freq[j] = (float)d;
    }
    json_decref(a);
}

kv_status kvt_info_from_json(const char *json, size_t n, kv_trace_info *i, kv_error *err)
{
    kv_status st = KV_OK;
    json_error_t je;
    char *dtype = NULL;
    uint32_t n_window;
    fields f = {kv_json_load(json, n, JSON_REJECT_DUPLICATES, VALUES_MAX, &je), NULL, false};
    memset(i, 0, sizeof *i);
    if (!json_is_object(f.o)) {
        st = kv_fail(err, KV_EFORMAT, "bad metadata: %s", f.o ? "not a JSON object" : je.text);
        goto out;
    }
    i->model = take_string(&f, "model"), i->arch = take_string(&f, "arch");
    i->model_sha256 = take_string(&f, "model_sha256"), i->prompt_id = take_string(&f, "prompt_id");
    i->category = take_string(&f, "category"), i->record = take_string(&f, "record");
    i->wo_sha256 = take_string(&f, "wo_sha256"), dtype = take_string(&f, "dtype");
    if (!dtype || !kv_dtype_parse(dtype, &i->dtype)) wrong(&f, "dtype");
    i->layer = take_u32s(&f, "layers", KV_LAYERS_MAX, &i->n_layer);
    i->window = take_u32s(&f, "window", KV_LAYERS_MAX, &n_window);
    if (n_window != i->n_layer) wrong(&f, "window");
    i->n_layer_model = take_u32(&f, "n_layer_model", true);
    i->n_q_head = take_u32(&f, "q_heads", true), i->n_kv_head = take_u32(&f, "kv_heads", true);
    i->head_dim = take_u32(&f, "head_dim", true), i->hidden = take_u32(&f, "hidden", true);
    i->n_token = take_u32(&f, "tokens", true), i->n_prompt = take_u32(&f, "prompt_tokens", true);
    i->n_context = take_u32(&f, "context_tokens", false);
    i->scale = take_float(&f, "scale", NAN), i->softcap = take_float(&f, "softcap", 0);
    i->rope_theta = take_float(&f, "rope_theta", 0), i->rope_dim = take_u32(&f, "rope_dim", false);
    i->rope_mscale = take_float(&f, "rope_mscale", 1), i->obs_rows = take_u32(&f, "obs_rows", false);
    i->post_norm_eps = take_float(&f, "post_norm_eps", 0), i->out_scale = take_float(&f, "out_scale", 0);
    if (i->head_dim <= KV_HEAD_DIM_MAX && i->rope_dim <= KV_HEAD_DIM_MAX) take_inv_freq(&f, i);
    take_spans(&f, i);
    if (f.memory) goto memory;
    if (f.bad) {
        st = kv_fail(err, KV_EFORMAT, "bad metadata: '%s' is missing or not what it should be", f.bad);
        goto out;
    }
    if (json_object_size(f.o) && !(i->extra = json_dumps(f.o, JSON_COMPACT))) goto memory;
    st = kvt_check_info(i, err);
out:
    free(dtype);
    json_decref(f.o);
    if (st) kv_trace_info_free(i);
    return st;
memory:
    st = kv_fail(err, KV_ENOMEM, "out of memory for the metadata");
    goto out;
}
