/* model.c - from a GGUF file to a description and float weights.
 *
 * An architecture is a row of `arch_table`; its tensors are the rows of `top_table` and `layer_table` whose flag it
 * has. A tensor of the file that no row names is refused: it would change the numbers in a way this program does not
 * know. */
#include "capture/model.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "capture/gguf.h"
#include "capture/vocab.h"
#include "kernels/parallel.h"

#define LAYERS_MAX   1024u
#define HEADS_MAX    1024u
#define HEAD_DIM_MAX 512u

/* ------------------------------------------------------------------------------------------------ tables */

enum {
    ARCH_PAIRED = 1, /* rows of Q and K are in RoPE pairs (2i, 2i+1): reorder them to halves (i, i + rope_dim/2) */
};

typedef struct {
    const char *name; /* general.architecture, and the prefix of its keys */
    unsigned flags;
} arch_row;

static const arch_row arch_table[] = {
    {"llama", ARCH_PAIRED}, /* Llama 2 and 3, Mistral, SmolLM2 */
};

/* Sizes a tensor's dimensions are made of. */
enum { D_1, D_HIDDEN, D_FFN, D_VOCAB, D_Q, D_KV, D_COUNT };
static const char *const dim_keys[D_COUNT] = {
    "",
    "embedding_length",
    "feed_forward_length",
    "the vocabulary",
    "attention.head_count x key_length",
    "attention.head_count_kv x key_length",
};

typedef struct {
    const char *name;   /* behind "blk.N." in layer_table */
    size_t field;       /* of the float * in kv_model or kv_layer_weights */
    uint8_t rows, cols; /* D_*; cols is the contiguous dimension */
    bool optional;
    bool heads; /* rows belong to Q or K heads: reordered for ARCH_PAIRED */
} tensor_row;

static const tensor_row top_table[] = {
    {"token_embd.weight", offsetof(kv_model, tok_embd), D_VOCAB, D_HIDDEN, false, false},
    {"output_norm.weight", offsetof(kv_model, out_norm), D_1, D_HIDDEN, false, false},
    {"output.weight", offsetof(kv_model, output), D_VOCAB, D_HIDDEN, true, false},
};

#define L(field) offsetof(kv_layer_weights, field)
static const tensor_row layer_table[] = {
    {"attn_norm.weight", L(attn_norm), D_1, D_HIDDEN, false, false},
    {"attn_q.weight", L(wq), D_Q, D_HIDDEN, false, true},
    {"attn_k.weight", L(wk), D_KV, D_HIDDEN, false, true},
    {"attn_v.weight", L(wv), D_KV, D_HIDDEN, false, false},
    {"attn_q.bias", L(bq), D_1, D_Q, true, true},
    {"attn_k.bias", L(bk), D_1, D_KV, true, true},
    {"attn_v.bias", L(bv), D_1, D_KV, true, false},
    {"attn_output.weight", L(wo), D_HIDDEN, D_Q, false, false},
    {"attn_output.bias", L(bo), D_1, D_HIDDEN, true, false},
    {"ffn_norm.weight", L(ffn_norm), D_1, D_HIDDEN, false, false},
    {"ffn_gate.weight", L(w_gate), D_FFN, D_HIDDEN, false, false},
    {"ffn_up.weight", L(w_up), D_FFN, D_HIDDEN, false, false},
    {"ffn_down.weight", L(w_down), D_HIDDEN, D_FFN, false, false},
};
#undef L
#define N_ROWS(table) (sizeof(table) / sizeof *(table))

/* Keys that change the arithmetic in ways the engine does not have; harmless when 0 or at their neutral value. */
static const struct {
    const char *key, *what;
    double neutral;
} foreign[] = {
    {"expert_count", "a mixture of experts", 0},
    {"attention.kv_lora_rank", "multi-head latent attention", 0},
    {"attention.clamp_kqv", "clamped queries, keys and values", 0},
    {"attention.max_alibi_bias", "ALiBi position biases", 0},
    {"attention.sliding_window_pattern", "a pattern of sliding windows", 0},
    {"logit_scale", "scaled logits", 1},
    {"residual_scale", "scaled residuals", 1},
    {"embedding_scale", "scaled embeddings", 1},
};

/* ------------------------------------------------------------------------------------------------ reading keys */

typedef struct {
    kv_model m;   /* first: this is what the caller holds */
    float *arena; /* all weights */
} model_box;

/* What is needed while a model is opened. */
typedef struct {
    const kv_gguf *g;
    const arch_row *arch;
    kv_model *m;
    size_t dim[D_COUNT];
    uint8_t *used; /* [tensors of the file] */
    struct job *job;
    size_t n_job;
    kv_error *err;
} loader;

#define BAD(l, st, ...) kv_gguf_fail((l)->g, st, (l)->err, __VA_ARGS__)

typedef struct {
    char s[96];
} key_name;
static key_name full_key(const loader *l, const char *suffix)
{
    key_name k;
    snprintf(k.s, sizeof k.s, "%s.%s", l->arch->name, suffix);
    return k;
}

/* A count in lo..hi. Absent: *out keeps its value, or an error when `required`. An array with an element per layer is
 * accepted when all layers agree. */
static kv_status get_count(const loader *l, const char *suffix, bool required, uint32_t lo, uint32_t hi, uint32_t *out)
{
    key_name k = full_key(l, suffix);
    const kv_gguf_value *v = kv_gguf_find(l->g, k.s);
    if (!v) return required ? BAD(l, KV_EFORMAT, "metadata key '%s' is missing", k.s) : KV_OK;
    uint32_t n = v->array ? l->m->desc.n_layer : 1;
    if (v->array && (!n || v->n < n))
        return BAD(l, KV_EFORMAT, "metadata key '%s' has %u elements for %u layers", k.s, v->n, n);
    uint64_t first = 0, x;
    for (uint32_t i = 0; i < n; i++) {
        if (!kv_gguf_uint(v, i, &x)) return BAD(l, KV_EFORMAT, "metadata key '%s' is not a count", k.s);
        if (x < lo || x > hi)
            return BAD(l, KV_EFORMAT, "metadata key '%s' is %llu (%u to %u are possible)", k.s, (unsigned long long)x,
                       lo, hi);
        if (!i) first = x;
        if (x != first)
            return BAD(l, KV_EUNSUPPORTED, "metadata key '%s' differs between layers, which is not supported", k.s);
    }
    *out = (uint32_t)first;
    return KV_OK;
}

/* A finite number above 0 (or at least 0 when `zero`). Absent: *out keeps its value. */
static kv_status get_number(const loader *l, const char *suffix, bool zero, bool *found, float *out)
{
    key_name k = full_key(l, suffix);
    const kv_gguf_value *v = kv_gguf_find(l->g, k.s);
    double x;
    if (found) *found = v;
    if (!v) return KV_OK;
    if (v->array || !kv_gguf_float(v, 0, &x)) return BAD(l, KV_EFORMAT, "metadata key '%s' is not a number", k.s);
    if (!isfinite(x) || x < 0 || (x == 0 && !zero) || fabs(x) > 1e30)
        return BAD(l, KV_EFORMAT, "metadata key '%s' is %g", k.s, x);
    *out = (float)x;
    return KV_OK;
}

/* *out = a copy of a string key, NULL when absent. It must be text: no zero bytes, valid UTF-8. */
static kv_status get_text(const loader *l, const char *key, char **out)
{
    const kv_gguf_value *v = kv_gguf_find(l->g, key);
    kv_slice s;
    *out = NULL;
    if (!v) return KV_OK;
    if (!kv_gguf_string(v, &s)) return BAD(l, KV_EFORMAT, "metadata key '%s' is not a string", key);
    if (s.n > 4096 || memchr(s.p, 0, s.n) || kv_utf8_bad(s.p, s.n) < s.n)
        return BAD(l, KV_EFORMAT, "metadata key '%s' is not text: '%s'", key, kv_show(s.p, s.n).s);
    *out = kv_format("%.*s", (int)s.n, s.p);
    return *out ? KV_OK : kv_fail(l->err, KV_ENOMEM, "out of memory");
}

/* ------------------------------------------------------------------------------------------------ description */

static kv_status find_arch(loader *l)
{
    char known[200] = "";
    kv_status st = get_text(l, "general.architecture", &l->m->desc.arch);
    if (st) return st;
    const char *name = l->m->desc.arch;
    if (!name) return BAD(l, KV_EFORMAT, "metadata key 'general.architecture' is missing");
    for (size_t i = 0; i < N_ROWS(arch_table); i++) {
        if (!strcmp(name, arch_table[i].name)) l->arch = &arch_table[i];
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, " %s", arch_table[i].name);
    }
    if (l->arch) return KV_OK;
    return BAD(l, KV_EUNSUPPORTED, "architecture '%s' (general.architecture) is not supported; known:%s",
               kv_show(name, strlen(name)).s, known);
}

static kv_status refuse_foreign(const loader *l)
{
    for (size_t i = 0; i < N_ROWS(foreign); i++) {
        key_name k = full_key(l, foreign[i].key);
        const kv_gguf_value *v = kv_gguf_find(l->g, k.s);
        uint64_t u;
        double x = NAN;
        bool b;
        if (!v) continue;
        if (!v->array && kv_gguf_uint(v, 0, &u))
            x = (double)u;
        else if (!v->array && kv_gguf_bool(v, &b))
            x = b;
        else if (!v->array)
            kv_gguf_float(v, 0, &x);
        if (x != 0 && x != foreign[i].neutral)
            return BAD(l, KV_EUNSUPPORTED, "%s (metadata key '%s') is not supported", foreign[i].what, k.s);
    }
    const kv_gguf_value *v = kv_gguf_find(l->g, "split.count");
    uint64_t parts;
    if (v && (!kv_gguf_uint(v, 0, &parts) || parts > 1))
        return BAD(l, KV_EUNSUPPORTED,
                   "the file is one of several parts (split.count), which is not supported; "
                   "join them with gguf-split --merge");
    return KV_OK;
}

/* inv_freq[i] = theta^(-2i/rope_dim) / f_i / factor, f_i from rope_freqs.weight (Llama 3 scaling is baked in there). */
static kv_status read_rope(loader *l)
{
    kv_model_desc *d = &l->m->desc;
    float factor = 1;
    char *type = NULL, key[96];
    kv_status st;
    d->rope_dim = d->head_dim, d->rope_theta = 10000, d->rope_mscale = 1;
    if ((st = get_count(l, "rope.dimension_count", false, 2, d->head_dim, &d->rope_dim)) ||
        (st = get_number(l, "rope.freq_base", false, NULL, &d->rope_theta)) ||
        (st = get_number(l, "rope.scale_linear", false, NULL, &factor)) ||
        (st = get_number(l, "rope.scaling.factor", false, NULL, &factor)) ||
        (st = get_number(l, "rope.scaling.attn_factor", false, NULL, &d->rope_mscale)))
        return st;
    if (d->rope_dim % 2)
        return BAD(l, KV_EFORMAT, "metadata key '%s' is %u, which is odd", full_key(l, "rope.dimension_count").s,
                   d->rope_dim);
    snprintf(key, sizeof key, "%s.rope.scaling.type", l->arch->name);
    if ((st = get_text(l, key, &type))) return st;
    bool none = type && !strcmp(type, "none"), known = !type || none || !strcmp(type, "linear");
    if (!known)
        st = BAD(l, KV_EUNSUPPORTED, "RoPE scaling '%s' (metadata key '%s') is not supported",
                 kv_show(type, strlen(type)).s, key);
    free(type);
    if (st) return st;

    uint32_t half = d->rope_dim / 2;
    if ((st = kv_array(&d->inv_freq, half, sizeof *d->inv_freq, l->err))) return st;
    const kv_gguf_tensor *t = kv_gguf_tensor_find(l->g, "rope_freqs.weight");
    uint8_t raw[4 * HEAD_DIM_MAX / 2];
    if (t) {
        if (t->quant->id != 0 || t->n_dims != 1 || t->ne[0] != half)
            return BAD(l, KV_EFORMAT, "tensor 'rope_freqs.weight' is not %u values of type F32", half);
        if ((st = kv_gguf_read_rows(l->g, t, 0, 1, raw, l->err))) return st;
        l->used[kv_gguf_tensor_index(l->g, t)] = 1;
    }
    for (uint32_t i = 0; i < half; i++) {
        float f = 1;
        if (t) kv_decode_f32(KV_F32, raw + 4 * i, 1, &f);
        double inv = pow(d->rope_theta, -2.0 * i / d->rope_dim) / f / (none ? 1 : factor);
        d->inv_freq[i] = (float)inv;
        if (!isfinite(f) || f <= 0 || !isfinite(d->inv_freq[i]))
            return BAD(l, KV_EFORMAT, "RoPE frequency %u is not finite (rope.freq_base %g, rope_freqs.weight %g)", i,
                       (double)d->rope_theta, (double)f);
    }
    return KV_OK;
}

/* "Q4_1 x 210, F32 x 61": tensors by type, most frequent first. */
static kv_status describe_quants(loader *l)
{
    uint32_t n, count[64] = {0};
    const kv_gguf_tensor *t = kv_gguf_tensors(l->g, &n);
    char text[512] = "";
    for (uint32_t i = 0; i < n; i++) {
        count[t[i].quant->id]++;
        l->m->desc.n_params += t[i].n_row * t[i].ne[0]; /* at most 8 x the file's size */
    }
    for (;;) {
        uint32_t best = 0;
        for (uint32_t i = 0; i < 64; i++)
            if (count[i] > count[best]) best = i;
        if (!count[best]) break;
        size_t at = strlen(text);
        snprintf(text + at, sizeof text - at, "%s%s x %u", at ? ", " : "", kv_quant_find(best)->name, count[best]);
        count[best] = 0;
    }
    l->m->desc.quant = kv_format("%s", text);
    return l->m->desc.quant ? KV_OK : kv_fail(l->err, KV_ENOMEM, "out of memory");
}

static kv_status name_model(loader *l)
{
    kv_model_desc *d = &l->m->desc;
    const char *slash = strrchr(kv_gguf_path(l->g), '/'), *base = slash ? slash + 1 : kv_gguf_path(l->g);
    d->file = kv_format("%s", base);
    if (!d->file) return kv_fail(l->err, KV_ENOMEM, "out of memory");
    /* a file's name may be any bytes; this copy is shown and goes into JSON */
    for (size_t bad_at; (bad_at = kv_utf8_bad(d->file, strlen(d->file))) < strlen(d->file);) d->file[bad_at] = '?';
    /* general.name is often the training run's; people know a model by its file */
    size_t n = strlen(d->file);
    d->name = kv_format("%.*s", (int)(n > 5 && !strcmp(d->file + n - 5, ".gguf") ? n - 5 : n), d->file);
    return d->name ? KV_OK : kv_fail(l->err, KV_ENOMEM, "out of memory");
}

static kv_status read_desc(loader *l)
{
    kv_model_desc *d = &l->m->desc;
    kv_status st;
    uint32_t window = 0, key_length = 0, value_length, vocab_size = 0;
    bool has_eps = false;
    if ((st = name_model(l)) || (st = find_arch(l)) || (st = refuse_foreign(l)) ||
        (st = get_count(l, "block_count", true, 1, LAYERS_MAX, &d->n_layer)) ||
        (st = get_count(l, "embedding_length", true, 1, KV_GGUF_DIM_MAX, &d->hidden)) ||
        (st = get_count(l, "feed_forward_length", true, 1, KV_GGUF_DIM_MAX, &d->ffn)) ||
        (st = get_count(l, "context_length", true, 1, KV_GGUF_DIM_MAX, &d->n_ctx)) ||
        (st = get_count(l, "attention.head_count", true, 1, HEADS_MAX, &d->n_q_head)))
        return st;
    d->n_kv_head = d->n_q_head;
    if ((st = get_count(l, "attention.head_count_kv", false, 1, HEADS_MAX, &d->n_kv_head))) return st;
    if (d->n_q_head % d->n_kv_head)
        return BAD(l, KV_EFORMAT, "metadata key '%s' is %u, which does not divide the %u query heads",
                   full_key(l, "attention.head_count_kv").s, d->n_kv_head, d->n_q_head);
    if ((st = get_count(l, "attention.key_length", false, 1, HEAD_DIM_MAX, &key_length))) return st;
    if (!key_length && d->hidden % d->n_q_head)
        return BAD(l, KV_EFORMAT, "metadata key '%s' is %u, which does not divide the embedding_length %u",
                   full_key(l, "attention.head_count").s, d->n_q_head, d->hidden);
    d->head_dim = key_length ? key_length : d->hidden / d->n_q_head;
    if (d->head_dim > HEAD_DIM_MAX)
        return BAD(l, KV_EFORMAT, "embedding_length / attention.head_count gives heads of %u (at most %u)", d->head_dim,
                   HEAD_DIM_MAX);
    value_length = d->head_dim;
    if ((st = get_count(l, "attention.value_length", false, 1, HEAD_DIM_MAX, &value_length)) ||
        (st = get_count(l, "attention.sliding_window", false, 0, KV_GGUF_DIM_MAX, &window)) ||
        (st = get_count(l, "vocab_size", false, 1, KV_VOCAB_MAX, &vocab_size)))
        return st;
    if (value_length != d->head_dim)
        return BAD(l, KV_EUNSUPPORTED, "values of %u per head with keys of %u (metadata key '%s') are not supported",
                   value_length, d->head_dim, full_key(l, "attention.value_length").s);

    if ((st = get_number(l, "attention.layer_norm_rms_epsilon", false, &has_eps, &d->norm_eps))) return st;
    if (!has_eps)
        return BAD(l, KV_EFORMAT, "metadata key '%s' is missing", full_key(l, "attention.layer_norm_rms_epsilon").s);
    d->scale = (float)(1 / sqrt(d->head_dim));
    if ((st = get_number(l, "attention.scale", false, NULL, &d->scale)) ||
        (st = get_number(l, "attn_logit_softcapping", true, NULL, &d->softcap)) ||
        (st = get_number(l, "final_logit_softcapping", true, NULL, &d->final_softcap)) || (st = read_rope(l)) ||
        (st = kv_array(&d->window, d->n_layer, sizeof *d->window, l->err)))
        return st;
    for (uint32_t i = 0; i < d->n_layer; i++) d->window[i] = window;

    const kv_gguf_tensor *t = kv_gguf_tensor_find(l->g, "token_embd.weight");
    if (!t) return BAD(l, KV_EFORMAT, "tensor 'token_embd.weight' is missing");
    if (t->ne[1] > KV_VOCAB_MAX)
        return BAD(l, KV_EFORMAT, "tensor 'token_embd.weight' has %llu rows (at most %u)", (unsigned long long)t->ne[1],
                   KV_VOCAB_MAX);
    d->n_vocab = (uint32_t)t->ne[1];
    if (vocab_size && vocab_size != d->n_vocab)
        return BAD(l, KV_EFORMAT, "metadata key '%s' is %u, but tensor 'token_embd.weight' has %u rows",
                   full_key(l, "vocab_size").s, vocab_size, d->n_vocab);
    d->tied = !kv_gguf_tensor_find(l->g, "output.weight");
    return describe_quants(l);
}

/* ------------------------------------------------------------------------------------------------ weights */

/* One tensor to expand. */
typedef struct job {
    const kv_gguf_tensor *t;
    float **to;         /* the field */
    size_t arena_at;    /* its place in the arena */
    uint32_t head_rows; /* reorder within groups of this many rows (or elements of a vector), 0 = as stored */
} job;

/* Look one tensor up, compare its shape with the description, and note the work. layer < 0: not in a layer. */
static kv_status plan_tensor(loader *l, const tensor_row *r, int layer, void *base, size_t *n_float)
{
    char name[KV_GGUF_NAME_MAX + 1];
    if (layer < 0)
        snprintf(name, sizeof name, "%s", r->name);
    else
        snprintf(name, sizeof name, "blk.%d.%s", layer, r->name);
    const kv_gguf_tensor *t = kv_gguf_tensor_find(l->g, name);
    if (!t && r->optional) return KV_OK;
    if (!t) return BAD(l, KV_EFORMAT, "tensor '%s' is missing", name);
    size_t rows = l->dim[r->rows], cols = l->dim[r->cols], n;
    if (t->ne[0] != cols || t->ne[1] != rows || t->ne[2] != 1 || t->ne[3] != 1)
        return BAD(l, KV_EFORMAT,
                   "tensor '%s' has shape [%llu, %llu, %llu, %llu] where the metadata asks for [%zu, %zu] (%s%s%s)",
                   name, (unsigned long long)t->ne[0], (unsigned long long)t->ne[1], (unsigned long long)t->ne[2],
                   (unsigned long long)t->ne[3], cols, rows, dim_keys[r->cols], r->rows ? ", " : "", dim_keys[r->rows]);
    if (!t->quant->expand)
        return BAD(l, KV_EUNSUPPORTED, "tensor '%s' has type %s, which is not supported (%s are)", name, t->quant->name,
                   kv_quant_supported());
    l->used[kv_gguf_tensor_index(l->g, t)] = 1;
    job *j = &l->job[l->n_job++];
    j->t = t, j->to = (float **)((char *)base + r->field), j->arena_at = *n_float;
    j->head_rows = r->heads && l->arch->flags & ARCH_PAIRED ? l->m->desc.head_dim : 0;
    /* every tensor starts on a 64-byte line */
    if (!kv_mul(rows, cols, &n) || !kv_add(n, 15, &n) || !kv_add(*n_float, n & ~(size_t)15, n_float))
        return BAD(l, KV_EFORMAT, "the size of tensor '%s' overflows", name);
    return KV_OK;
}

static kv_status plan_tensors(loader *l, size_t *n_float)
{
    kv_model *m = l->m;
    kv_model_desc *d = &m->desc;
    kv_status st = kv_array(&m->layer, d->n_layer, sizeof *m->layer, l->err);
    if (st || (st = kv_array(&l->job, N_ROWS(top_table) + d->n_layer * N_ROWS(layer_table), sizeof *l->job, l->err)))
        return st;
    l->dim[D_1] = 1, l->dim[D_HIDDEN] = d->hidden, l->dim[D_FFN] = d->ffn, l->dim[D_VOCAB] = d->n_vocab;
    l->dim[D_Q] = (size_t)d->n_q_head * d->head_dim, l->dim[D_KV] = (size_t)d->n_kv_head * d->head_dim;
    for (size_t i = 0; i < N_ROWS(top_table); i++)
        if ((st = plan_tensor(l, &top_table[i], -1, m, n_float))) return st;
    for (uint32_t b = 0; b < d->n_layer; b++)
        for (size_t i = 0; i < N_ROWS(layer_table); i++)
            if ((st = plan_tensor(l, &layer_table[i], (int)b, &m->layer[b], n_float))) return st;
    uint32_t n;
    const kv_gguf_tensor *t = kv_gguf_tensors(l->g, &n);
    for (uint32_t i = 0; i < n; i++)
        if (!l->used[i])
            return BAD(l, KV_EUNSUPPORTED, "tensor '%s' is not one of an ordinary %s model of %u layers",
                       kv_show(t[i].name.p, t[i].name.n).s, d->arch, d->n_layer);
    return KV_OK;
}

/* The place in the half-split layout of row r of a tensor whose heads are stored in RoPE pairs: within a head, row 2j+s
 * goes to s*rope_dim/2 + j; rows that are not rotated stay. */
static size_t half_split_row(size_t r, uint32_t head_rows, uint32_t rope_dim)
{
    size_t in = r % head_rows, base = r - in;
    return in < rope_dim ? base + in % 2 * (rope_dim / 2) + in / 2 : r;
}

static bool all_finite(const float *x, size_t n)
{
    uint32_t bad_bits = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &x[i], 4);
        bad_bits |= (uint32_t)((u & 0x7f800000) == 0x7f800000);
    }
    return !bad_bits;
}

/* Rows first .. first+n-1 of job j: the unit of parallel work. */
typedef struct {
    const job *j;
    uint64_t first, n;
} part;

typedef struct {
    const loader *l;
    const part *parts;
    pthread_mutex_t lock;
    size_t failed; /* the lowest part that failed: the same message whatever the threads */
    kv_status st;
    kv_error err;
} expansion;

static kv_status expand_rows(const loader *l, const part *p, kv_error *err)
{
    const kv_gguf_tensor *t = p->j->t;
    size_t cols = (size_t)t->ne[0], row_bytes = (size_t)t->row_bytes, n_blocks = cols / t->quant->block;
    uint32_t heads = p->j->head_rows, rope_dim = l->m->desc.rope_dim;
    uint8_t *raw = NULL;
    float *row = NULL;
    kv_status st = kv_array(&raw, (size_t)p->n, row_bytes, err);
    if (!st && heads && t->n_row == 1) st = kv_array(&row, cols, sizeof *row, err);
    if (!st) st = kv_gguf_read_rows(l->g, t, p->first, p->n, raw, err);
    for (uint64_t i = 0; i < p->n && !st; i++) {
        size_t r = (size_t)(p->first + i);
        float *y = row ? row : *p->j->to + (heads ? half_split_row(r, heads, rope_dim) : r) * cols;
        t->quant->expand(raw + i * row_bytes, n_blocks, y);
        if (!all_finite(y, cols))
            st = kv_gguf_fail(l->g, KV_EFORMAT, err, "tensor '%s' holds NaN or infinite values in row %zu",
                              kv_show(t->name.p, t->name.n).s, r);
    }
    if (row)
        for (size_t e = 0; e < cols && !st; e++) (*p->j->to)[half_split_row(e, heads, rope_dim)] = row[e];
    free(raw), free(row);
    return st;
}

static void expand_part(void *ctx, size_t i)
{
    expansion *x = ctx;
    kv_error err;
    kv_status st = expand_rows(x->l, &x->parts[i], &err);
    if (!st) return;
    pthread_mutex_lock(&x->lock);
    if (!x->st || i < x->failed) x->failed = i, x->st = st, x->err = err;
    pthread_mutex_unlock(&x->lock);
}

static kv_status load_weights(loader *l, size_t n_float, uint32_t threads, float **arena)
{
    enum { PART = 1 << 18 }; /* elements of a part */
    size_t bytes, n_part = 0;
    part *parts = NULL;
    if (!kv_mul(n_float, sizeof(float), &bytes)) return BAD(l, KV_EFORMAT, "the size of the weights overflows");
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    /* the kernel would grant it and kill the process later */
    if (pages > 0 && page > 0 && bytes / (size_t)page >= (size_t)pages)
        return BAD(l, KV_ENOMEM, "the weights need %.1f GiB as f32, this machine has %.1f", (double)bytes / 0x1p30,
                   (double)pages * (double)page / 0x1p30);
    if (posix_memalign((void **)arena, 64, bytes)) {
        *arena = NULL;
        return BAD(l, KV_ENOMEM, "out of memory for %.1f GiB of weights", (double)bytes / 0x1p30);
    }
    for (int pass = 0; pass < 2; pass++) {
        n_part = 0;
        for (size_t i = 0; i < l->n_job; i++) {
            const job *j = &l->job[i];
            *j->to = *arena + j->arena_at;
            uint64_t step = PART / j->t->ne[0] ? PART / j->t->ne[0] : 1;
            for (uint64_t r = 0; r < j->t->n_row; r += step, n_part++)
                if (pass) parts[n_part] = (part){j, r, j->t->n_row - r < step ? j->t->n_row - r : step};
        }
        kv_status st = pass ? KV_OK : kv_array(&parts, n_part, sizeof *parts, l->err);
        if (st) return st;
    }
    expansion x = {.l = l, .parts = parts, .lock = PTHREAD_MUTEX_INITIALIZER};
    kv_parallel(n_part, threads, expand_part, &x);
    free(parts);
    if (x.st && l->err) *l->err = x.err;
    if (l->m->desc.tied) l->m->output = l->m->tok_embd;
    return x.st;
}

static kv_status load_vocab(loader *l)
{
    kv_vocab v;
    kv_error err = {""};
    kv_status st = kv_vocab_read(l->g, l->m->desc.n_vocab, &v, &err);
    if (st == KV_EUNSUPPORTED) {
        snprintf(l->m->no_tok, sizeof l->m->no_tok, "%.*s", (int)sizeof l->m->no_tok - 1, err.msg);
        return KV_OK;
    }
    if (!st) st = kv_tokenizer_create(&v, &l->m->tok, &err);
    return st ? BAD(l, st, "%s", err.msg) : KV_OK;
}

kv_status kv_model_open(const char *path, bool weights, uint32_t threads, kv_model **out, kv_error *err)
{
    kv_gguf *g = NULL;
    model_box *box = NULL;
    loader l = {.err = err};
    size_t n_float = 0;
    uint32_t n;
    *out = NULL;
    kv_status st = kv_gguf_open(path, &g, err);
    if (st || (st = kv_array(&box, 1, sizeof *box, err))) goto out;
    l.g = g, l.m = &box->m;
    kv_gguf_tensors(g, &n);
    if ((st = kv_array(&l.used, n, 1, err)) || (st = read_desc(&l)) || (st = plan_tensors(&l, &n_float)) ||
        (st = load_vocab(&l)))
        goto out;
    if (weights) st = load_weights(&l, n_float, threads, &box->arena);
out:
    free(l.used), free(l.job);
    kv_gguf_close(g);
    if (st)
        kv_model_close((kv_model *)box);
    else
        *out = &box->m;
    return st;
}

kv_status kv_model_hash(kv_model *m, const char *path, kv_error *err)
{
    return kv_sha256_file(path, m->desc.sha256, err);
}

void kv_model_close(kv_model *m)
{
    if (!m) return;
    model_box *box = (model_box *)m;
    kv_model_desc *d = &m->desc;
    kv_tokenizer_close(m->tok);
    free(d->name), free(d->arch), free(d->file), free(d->quant), free(d->inv_freq), free(d->window);
    free(m->layer), free(box->arena);
    free(box);
}
