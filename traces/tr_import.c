/* tr_import.c - kv-trace import: arrays made elsewhere become a trace. */
#include "traces/arrays.h"
#include "traces/json.h"
#include "traces/tr.h"

#include <math.h>
#include <stdlib.h>

#define TOKENS_JSON_MAX (1u << 30)

typedef struct {
    const char *path;
    kv_npy a;
} array;

/* A float array of the given rank; f8 becomes f4. */
static kv_status load(array *x, uint32_t rank, const char *shape, kv_error *err)
{
    kv_status st = kv_array_load(x->path, &x->a, err);
    if (st) return st;
    if (x->a.kind != 'f' && x->a.kind != 'B')
        return kv_fail(err, KV_EFORMAT, "cannot import '%s': floats are expected, not kind '%c'", x->path, x->a.kind);
    if (x->a.rank != rank || !x->a.n)
        return kv_fail(err, KV_EFORMAT, "cannot import '%s': %s is expected, the array has %u axes and %zu elements",
                       x->path, shape, x->a.rank, x->a.n);
    return x->a.size == 8 ? kv_npy_to_f32(&x->a, err) : KV_OK;
}

static kv_dtype type_of(const array *x)
{
    return x->a.kind == 'B' ? KV_BF16 : x->a.size == 2 ? KV_F16 : KV_F32;
}

static kv_status check_finite(const array *x, kv_error *err)
{
    const uint8_t *p = x->a.data;
    uint16_t all = x->a.kind == 'B' ? 0x7f80 : 0x7c00; /* an exponent of ones */
    for (size_t i = 0; i < x->a.n; i++) {
        bool bad =
            x->a.size == 2 ? (kv_get16(p + 2 * i) & all) == all : (kv_get32(p + 4 * i) & 0x7f800000u) == 0x7f800000u;
        if (bad) return kv_fail(err, KV_EFORMAT, "cannot import '%s': element %zu is not finite", x->path, i);
    }
    return KV_OK;
}

static kv_status check_dim(const array *x, uint32_t axis, const char *what, size_t want, size_t max, kv_error *err)
{
    size_t got = x->a.shape[axis];
    if (want && got != want)
        return kv_fail(err, KV_EFORMAT, "cannot import '%s': %zu %s, but %zu elsewhere", x->path, got, what, want);
    if (got > max)
        return kv_fail(err, KV_EFORMAT, "cannot import '%s': %zu %s, more than %zu", x->path, got, what, max);
    return KV_OK;
}

/* One array [layers][heads][rows][width], layer by layer. */
static kv_status put(kv_trace_writer *w, kv_stream s, const array *x, kv_dtype as, uint32_t layer, uint32_t first_row,
                     kv_error *err)
{
    const size_t *sh = x->a.shape;
    size_t n = sh[1] * sh[2] * (x->a.rank > 3 ? sh[3] : 1);
    kv_chunk c = {.stream = s, .layer = layer, .head_count = (uint32_t)sh[1], .dtype = type_of(x)};
    c.token_first = first_row, c.token_count = (uint32_t)sh[2], c.width = (uint32_t)sh[x->a.rank - 1];
    if (s == KV_S_WO) c.head_count = 1, c.token_count = (uint32_t)sh[1];
    const uint8_t *p = (const uint8_t *)x->a.data + (size_t)layer * n * x->a.size;
    if (as == c.dtype) return kv_trace_put(w, &c, p, err);
    /* q, k and v share a type: where they differ all are widened. */
    float *f = NULL;
    kv_status st = kv_array(&f, n, sizeof *f, err);
    if (!st) {
        kv_decode_f32(c.dtype, p, n, f);
        c.dtype = as;
        st = kv_trace_put_f32(w, &c, f, err);
    }
    free(f);
    return st;
}

/* A JSON array of `n` ids, or 0..n-1. */
static kv_status load_tokens(const char *path, size_t n, uint32_t **out, kv_error *err)
{
    uint8_t *text = NULL;
    size_t len;
    json_t *a = NULL;
    json_error_t je;
    kv_status st = kv_array(out, n, sizeof **out, err);
    if (st) return st;
    for (size_t i = 0; i < n; i++) (*out)[i] = (uint32_t)i;
    if (!path) return KV_OK;
    if ((st = kv_read_file(path, TOKENS_JSON_MAX, &text, &len, err))) return st;
    a = kv_json_load(text, len, 0, KV_TOKENS_MAX + (size_t)1, &je);
    if (!json_is_array(a)) {
        st = kv_fail(err, KV_EFORMAT, "cannot read tokens '%s': %s", path, a ? "not a JSON array of ids" : je.text);
    } else if (json_array_size(a) != n) {
        st = kv_fail(err, KV_EFORMAT, "cannot read tokens '%s': %zu ids for %zu tokens", path, json_array_size(a), n);
    }
    for (size_t i = 0; !st && i < n; i++) {
        const json_t *v = json_array_get(a, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > UINT32_MAX)
            st = kv_fail(err, KV_EFORMAT, "cannot read tokens '%s': element %zu is no token id", path, i);
        else
            (*out)[i] = (uint32_t)json_integer_value(v);
    }
    json_decref(a);
    free(text);
    return st;
}

typedef struct {
    const char *out, *tokens;
    uint32_t n_prompt;
    double rope_theta;
    array q, k, v, wo, map;
} job;

static kv_status check_qkv(job *j, kv_error *err)
{
    const char *const shape = "[layers, heads, tokens, head_dim]";
    const size_t *s;
    kv_status st;
    if ((st = load(&j->q, 4, shape, err)) || (st = load(&j->k, 4, shape, err)) || (st = load(&j->v, 4, shape, err)))
        return st;
    s = j->q.a.shape;
    if ((st = check_dim(&j->q, 0, "layers", 0, KV_LAYERS_MAX, err)) ||
        (st = check_dim(&j->q, 1, "heads", 0, KV_HEADS_MAX, err)) ||
        (st = check_dim(&j->q, 2, "tokens", 0, KV_TOKENS_MAX, err)) ||
        (st = check_dim(&j->q, 3, "elements a head", 0, KV_HEAD_DIM_MAX, err)))
        return st;
    array *kv[2] = {&j->k, &j->v};
    for (int i = 0; i < 2; i++)
        if ((st = check_dim(kv[i], 0, "layers", s[0], KV_LAYERS_MAX, err)) ||
            (st = check_dim(kv[i], 1, "KV heads", i ? j->k.a.shape[1] : 0, KV_HEADS_MAX, err)) ||
            (st = check_dim(kv[i], 2, "tokens", s[2], KV_TOKENS_MAX, err)) ||
            (st = check_dim(kv[i], 3, "elements a head", s[3], KV_HEAD_DIM_MAX, err)))
            return st;
    if (s[1] % j->k.a.shape[1])
        return kv_fail(err, KV_EFORMAT, "cannot import '%s': %zu query heads do not divide among %zu KV heads",
                       j->q.path, s[1], j->k.a.shape[1]);
    if ((st = check_finite(&j->q, err)) || (st = check_finite(&j->k, err)) || (st = check_finite(&j->v, err)))
        return st;
    if (!j->wo.path) return KV_OK;
    if ((st = load(&j->wo, 3, "[layers, hidden, q_heads * head_dim]", err)) ||
        (st = check_dim(&j->wo, 0, "layers", s[0], KV_LAYERS_MAX, err)) ||
        (st = check_dim(&j->wo, 1, "rows", 0, KVT_HIDDEN_MAX, err)) ||
        (st = check_dim(&j->wo, 2, "columns", s[1] * s[3], SIZE_MAX, err)))
        return st;
    return check_finite(&j->wo, err);
}

static kv_status check_map(job *j, kv_error *err)
{
    const size_t *s = j->map.a.shape;
    kv_status st = load(&j->map, 4, "[layers, heads, rows, tokens]", err);
    if (!st && j->map.a.kind == 'B') st = kv_npy_to_f32(&j->map.a, err); /* a map is f16 or f32 */
    if (st || (st = check_dim(&j->map, 0, "layers", 0, KV_LAYERS_MAX, err)) ||
        (st = check_dim(&j->map, 1, "heads", 0, KV_HEADS_MAX, err)) ||
        (st = check_dim(&j->map, 3, "tokens", 0, KV_TOKENS_MAX, err)) ||
        (st = check_dim(&j->map, 2, "rows", 0, s[3], err)))
        return st;
    return check_finite(&j->map, err);
}

static kv_status write_trace(job *j, kv_error *err)
{
    const array *x = j->map.path ? &j->map : &j->q;
    const size_t *s = x->a.shape;
    uint32_t n = (uint32_t)(j->map.path ? s[3] : s[2]), layers = (uint32_t)s[0];
    uint32_t *ids = NULL;
    kv_trace_info in = {0};
    kv_trace_writer *w = NULL;
    kv_chunk c = {.stream = KV_S_TOKENS, .head_count = 1, .token_count = n, .width = 1, .dtype = KV_U32};
    kv_dtype as = KV_F32;
    kv_status st;
    if (j->n_prompt > n) {
        return kv_fail(err, KV_EMISUSE, "--prompt-tokens %u: the arrays have %u tokens", j->n_prompt, n);
    }
    if ((st = load_tokens(j->tokens, n, &ids, err)) ||
        (st = tr_new_info(&in, "import", layers, (uint32_t)s[1], (uint32_t)(j->map.path ? s[1] : j->k.a.shape[1]),
                          j->map.path ? 1 : (uint32_t)s[3], n, err)))
        goto out;
    if (j->n_prompt) in.n_prompt = j->n_prompt;
    in.rope_theta = (float)j->rope_theta;
    if (j->map.path) {
        free(in.record);
        in.dtype = as = type_of(&j->map);
        in.record = kv_format("map");
    } else {
        if (type_of(&j->q) == type_of(&j->k) && type_of(&j->k) == type_of(&j->v)) as = type_of(&j->q);
        in.dtype = as;
        if (j->wo.path) in.hidden = (uint32_t)j->wo.a.shape[1];
    }
    if ((st = kv_trace_create(j->out, &in, NULL, tr_threads(), &w, err)) || (st = kv_trace_put(w, &c, ids, err)))
        goto out;
    kv_progress *bar = kv_progress_start("importing", layers, "layers");
    for (uint32_t l = 0; l < layers && !st; l++) {
        if (j->map.path) {
            st = put(w, KV_S_MAP, &j->map, as, l, (uint32_t)(s[3] - s[2]), err);
        } else if (!(st = put(w, KV_S_Q, &j->q, as, l, 0, err)) && !(st = put(w, KV_S_K, &j->k, as, l, 0, err)) &&
                   !(st = put(w, KV_S_V, &j->v, as, l, 0, err)) && j->wo.path) {
            st = put(w, KV_S_WO, &j->wo, type_of(&j->wo), l, 0, err);
        }
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
        kv_progress_step(bar, l + 1, NULL);
    }
    kv_progress_end(bar);
    if (st) goto out;
    st = kv_trace_finish(w, err);
    w = NULL;
out:
    kvt_discard(w);
    kv_trace_info_free(&in);
    free(ids);
    return st;
}

static kv_status run(int argc, char **argv, int *code, kv_error *err)
{
    job j = {0};
    kv_list rest = {0};
    const kv_opt opts[] = {{"q", 0, KV_OPT_STR, &j.q.path},      {"k", 0, KV_OPT_STR, &j.k.path},
                           {"v", 0, KV_OPT_STR, &j.v.path},      {"wo", 0, KV_OPT_STR, &j.wo.path},
                           {"map", 0, KV_OPT_STR, &j.map.path},  {"rope-theta", 0, KV_OPT_F64, &j.rope_theta},
                           {"tokens", 0, KV_OPT_STR, &j.tokens}, {"prompt-tokens", 0, KV_OPT_U32, &j.n_prompt},
                           {"output", 'o', KV_OPT_STR, &j.out},  {0}};
    kv_status st = tr_parse(argc, argv, opts, &rest, 0, 0, err);
    (void)code;
    if (st) goto out;
    if (!j.out) {
        st = kv_fail(err, KV_EMISUSE, "-o OUT.kvt is missing");
    } else if (j.map.path ? j.q.path || j.k.path || j.v.path || j.wo.path : !j.q.path || !j.k.path || !j.v.path) {
        st = kv_fail(err, KV_EMISUSE, "either --q, --k and --v, or --map alone");
    } else if (!(j.rope_theta >= 0 && j.rope_theta < 1e30)) {
        st = kv_fail(err, KV_EMISUSE, "--rope-theta %g: a positive number is expected", j.rope_theta);
    } else if (!(st = j.map.path ? check_map(&j, err) : check_qkv(&j, err))) {
        st = write_trace(&j, err);
    }
out:
    kv_npy_free(&j.q.a), kv_npy_free(&j.k.a), kv_npy_free(&j.v.a), kv_npy_free(&j.wo.a), kv_npy_free(&j.map.a);
    kv_list_free(&rest);
    return st;
}

const tr_command tr_import = {
    "import", "arrays made elsewhere as a trace",
    "usage: kv-trace import --q Q --k K --v V [--wo W] [--rope-theta X] [options] -o OUT.kvt\n"
    "       kv-trace import --map M [options] -o OUT.kvt\n\n"
    "An array is a .npy file, or FILE:NAME in an .npz or a safetensors file (NAME may be left out where there is "
    "one).\n"
    "Q, K, V: [layers, heads, tokens, head_dim], post-RoPE, float16, bfloat16 or float32 (kept as they are) or "
    "float64\n"
    "(rounded to float32); scores are q.k / sqrt(head_dim). W: [layers, hidden, q_heads * head_dim], as Hugging Face\n"
    "stores o_proj. M: [layers, heads, rows, tokens], softmaxed; fewer rows than tokens are the last ones; gives "
    "recall\n"
    "only.\n"
    "  --tokens T.json      JSON array of token ids (default: 0, 1, 2, ...)\n"
    "  --prompt-tokens N    the first N tokens are the prompt (default: all)\n\n"
    "  kv-trace import --q q.npy --k k.npy --v v.npy --prompt-tokens 512 -o a.kvt\n"
    "  kv-trace import --q mine.npz:q --k mine.npz:k --v mine.npz:v -o mine.kvt\n"
    "  kv-trace import --map attention.npy -o map.kvt\n",
    run};
