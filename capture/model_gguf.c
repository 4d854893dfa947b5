/* model_gguf.c - the description of a model out of the metadata of a GGUF file. */
#include <math.h>
#include <stdlib.h>

#include "capture/arch.h"
#include "capture/gguf.h"
#include "capture/vocab.h"

/* Keys that change the arithmetic in ways the engine does not have; harmless when 0 or at their neutral value. `flag`:
 * architectures with it have the feature. */
static const struct {
    const char *key, *what;
    double neutral;
    unsigned flag;
} foreign[] = {
    {"expert_count", "a mixture of experts", 0, KV_ARCH_EXPERTS},
    {"expert_shared_count", "shared experts", 0, 0},
    {"expert_shared_feed_forward_length", "shared experts", 0, 0},
    {"expert_gating_func", "an expert choice other than softmax", 1, 0},
    {"expert_weights_scale", "scaled experts", 1, 0},
    {"expert_group_count", "groups of experts", 1, 0},
    {"leading_dense_block_count", "a mixture of dense and expert layers", 0, 0},
    {"interleave_moe_layer_step", "a mixture of dense and expert layers", 1, 0},
    {"attention.kv_lora_rank", "multi-head latent attention", 0, 0},
    {"attention.q_lora_rank", "multi-head latent attention", 0, 0},
    {"attention.clamp_kqv", "clamped queries, keys and values", 0, 0},
    {"attention.max_alibi_bias", "ALiBi position biases", 0, 0},
    {"attention.causal", "attention that is not causal", 1, 0},
    {"rope.scaling.yarn_log_multiplier", "YaRN with a multiplier of its own", 0, 0},
    {"rope.scaling.yarn_ext_factor", "YaRN with a mix of its own", 1, 0},
    {"logit_scale", "scaled logits", 1, KV_ARCH_MULTIPLIERS},
    {"residual_scale", "scaled residuals", 1, KV_ARCH_MULTIPLIERS},
    {"embedding_scale", "scaled embeddings", 1, KV_ARCH_MULTIPLIERS},
    {"ssm.state_size", "recurrent layers", 0, 0},
    {"ssm.inner_size", "recurrent layers", 0, 0},
    {"nextn_predict_layers", "layers that predict further tokens", 0, 0},
};

#define KV_SPLITS_MAX 4096u

/* A loader and the file it reads; `l` first. */
typedef struct {
    kv_loader *l;
    const kv_gguf *g;
} reader;
#define BAD(r, st, ...) KV_BAD((r)->l, st, __VA_ARGS__)

typedef struct {
    char s[96];
} key_name;
static key_name full_key(const reader *r, const char *suffix)
{
    key_name k;
    snprintf(k.s, sizeof k.s, "%s.%s", r->l->arch->name, suffix);
    return k;
}

/* A count in lo..hi. Absent: *out keeps its value, or an error when `required`. An array with an element per layer is
 * accepted when all layers agree. */
static kv_status get_count(const reader *r, const char *suffix, bool required, uint32_t lo, uint32_t hi, uint32_t *out)
{
    key_name k = full_key(r, suffix);
    const kv_gguf_value *v = kv_gguf_find(r->g, k.s);
    if (!v) return required ? BAD(r, KV_EFORMAT, "metadata key '%s' is missing", k.s) : KV_OK;
    uint32_t n = v->array ? r->l->m->desc.n_layer : 1;
    if (v->array && (!n || v->n < n))
        return BAD(r, KV_EFORMAT, "metadata key '%s' has %u elements for %u layers", k.s, v->n, n);
    uint64_t first = 0, x;
    for (uint32_t i = 0; i < n; i++) {
        if (!kv_gguf_uint(v, i, &x)) return BAD(r, KV_EFORMAT, "metadata key '%s' is not a count", k.s);
        if (x < lo || x > hi)
            return BAD(r, KV_EFORMAT, "metadata key '%s' is %llu (%u to %u are possible)", k.s, (unsigned long long)x,
                       lo, hi);
        if (!i) first = x;
        if (x != first)
            return BAD(r, KV_EUNSUPPORTED, "metadata key '%s' differs between layers, which is not supported", k.s);
    }
    *out = (uint32_t)first;
    return KV_OK;
}

/* A finite number above 0 (or at least 0 when `zero`). Absent: *out keeps its value. */
static kv_status get_number(const reader *r, const char *suffix, bool zero, bool *found, float *out)
{
    key_name k = full_key(r, suffix);
    const kv_gguf_value *v = kv_gguf_find(r->g, k.s);
    double x;
    if (found) *found = v;
    if (!v) return KV_OK;
    if (v->array || !kv_gguf_float(v, 0, &x)) return BAD(r, KV_EFORMAT, "metadata key '%s' is not a number", k.s);
    if (!isfinite(x) || x < 0 || (x == 0 && !zero) || fabs(x) > 1e30)
        return BAD(r, KV_EFORMAT, "metadata key '%s' is %g", k.s, x);
    *out = (float)x;
    return KV_OK;
}

/* *out = a copy of a string key, NULL when absent. It must be text: no zero bytes, valid UTF-8. */
static kv_status get_text(const reader *r, const char *key, char **out)
{
    const kv_gguf_value *v = kv_gguf_find(r->g, key);
    kv_slice s;
    *out = NULL;
    if (!v) return KV_OK;
    if (!kv_gguf_string(v, &s)) return BAD(r, KV_EFORMAT, "metadata key '%s' is not a string", key);
    if (s.n > 4096 || memchr(s.p, 0, s.n) || kv_utf8_bad(s.p, s.n) < s.n)
        return BAD(r, KV_EFORMAT, "metadata key '%s' is not text: '%s'", key, kv_show(s.p, s.n).s);
    *out = kv_format("%.*s", (int)s.n, s.p);
    return *out ? KV_OK : kv_fail(r->l->err, KV_ENOMEM, "out of memory");
}

/* ------------------------------------------------------------------------------------------------ description */

static kv_status find_arch(reader *r)
{
    char known[200];
    const kv_arch *arch;
    char **name = &r->l->m->desc.arch;
    kv_status st = get_text(r, "general.architecture", name);
    if (st) return st;
    if (!*name) return BAD(r, KV_EFORMAT, "metadata key 'general.architecture' is missing");
    if ((arch = kv_arch_of_gguf(*name))) return kv_arch_begin(r->l, arch), KV_OK;
    kv_arch_list(false, known, sizeof known);
    return BAD(r, KV_EUNSUPPORTED, "architecture '%s' (general.architecture) is not supported; known:%s",
               kv_show(*name, strlen(*name)).s, known);
}

/* A scalar key of any kind as a number; NaN when it is none. */
static double as_number(const kv_gguf_value *v)
{
    uint64_t u;
    double x = NAN;
    bool b;
    if (v->array) return NAN;
    if (kv_gguf_uint(v, 0, &u)) return (double)u;
    if (kv_gguf_bool(v, &b)) return b;
    return kv_gguf_float(v, 0, &x) ? x : NAN;
}

static kv_status refuse_foreign(const reader *r)
{
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        key_name k = full_key(r, foreign[i].key);
        const kv_gguf_value *v = kv_gguf_find(r->g, k.s);
        double x = v ? as_number(v) : 0;
        if (v && x != 0 && x != foreign[i].neutral && !(foreign[i].flag & r->l->arch->flags))
            return BAD(r, KV_EUNSUPPORTED, "%s (metadata key '%s') is not supported", foreign[i].what, k.s);
        if (v && x == 0 && foreign[i].neutral == 1 && !strcmp(foreign[i].key, "attention.causal"))
            return BAD(r, KV_EUNSUPPORTED, "%s (metadata key '%s') is not supported", foreign[i].what, k.s);
    }
    return KV_OK;
}

/* A tensor of one factor per rotated pair; NULL when there is none. */
static kv_status read_factors(reader *r, const char *name, float **out)
{
    uint32_t half = r->l->m->desc.rope_dim / 2, i = kv_store_find(r->l->m->store, name);
    uint8_t raw[4 * KV_MODEL_HEAD_DIM_MAX / 2];
    kv_status st;
    *out = NULL;
    if (i == KV_NONE) return KV_OK;
    const kv_stored *t = kv_store_at(r->l->m->store, i);
    if (t->quant->id != 0 || t->n_dims != 1 || t->ne[0] != half)
        return BAD(r, KV_EFORMAT, "tensor '%s' is not %u values of type F32", name, half);
    if ((st = kv_array(out, half, sizeof **out, r->l->err)) ||
        (st = kv_store_read(r->l->m->store, i, 0, 4 * half, raw, r->l->err)))
        return st;
    kv_decode_f32(KV_F32, raw, half, *out);
    r->l->used[i] = 1;
    return KV_OK;
}

static kv_status read_scaling(reader *r, kv_rope_scaling *s)
{
    char *type = NULL;
    key_name k = full_key(r, "rope.scaling.type");
    uint32_t near = r->l->m->desc.n_ctx;
    float factor = 1, fast = 32, slow = 1, attn = 1;
    bool given, linear = false;
    kv_status st;
    if ((st = get_number(r, "rope.scale_linear", false, &linear, &factor)) ||
        (st = get_number(r, "rope.scaling.factor", false, &given, &factor)) ||
        (st = get_number(r, "rope.scaling.attn_factor", false, NULL, &attn)) ||
        (st = get_number(r, "rope.scaling.yarn_beta_fast", false, NULL, &fast)) ||
        (st = get_number(r, "rope.scaling.yarn_beta_slow", false, NULL, &slow)) ||
        (st = get_count(r, "rope.scaling.original_context_length", false, 1, KV_MODEL_DIM_MAX, &near)) ||
        (st = get_text(r, k.s, &type)))
        return st;
    s->factor = factor, s->beta_fast = fast, s->beta_slow = slow, s->near_ctx = near, s->mscale = attn;
    if (!type || !strcmp(type, "linear"))
        s->kind = KV_ROPE_LINEAR;
    else if (!strcmp(type, "none"))
        s->kind = KV_ROPE_PLAIN;
    else if (!strcmp(type, "yarn"))
        s->kind = KV_ROPE_YARN, s->mscale = attn * (factor > 1 ? 1 + 0.1 * log((double)factor) : 1);
    else if (!strcmp(type, "longrope"))
        s->kind = KV_ROPE_PLAIN; /* the factor tensors say it all */
    else
        st = BAD(r, KV_EUNSUPPORTED, "RoPE scaling '%s' (metadata key '%s') is not supported",
                 kv_show(type, strlen(type)).s, k.s);
    free(type);
    return st;
}

/* Llama 3 scaling is baked into rope_freqs.weight; phi3 has two tensors, for short and for long runs. */
static kv_status read_rope(reader *r)
{
    kv_model_desc *d = &r->l->m->desc;
    kv_rope_scaling s = {0}, local = {.kind = KV_ROPE_PLAIN, .mscale = 1};
    float theta = 10000, local_theta = 10000, *all = NULL, *near = NULL, *far = NULL;
    kv_status st;
    if (r->l->arch->flags & KV_ARCH_POSITIONS) return KV_OK;
    d->rope_dim = d->head_dim;
    if ((st = get_count(r, "rope.dimension_count", false, 2, d->head_dim, &d->rope_dim)) ||
        (st = get_number(r, "rope.freq_base", false, NULL, &theta)) ||
        (st = get_number(r, "rope.freq_base_swa", false, NULL, &local_theta)))
        return st;
    if (d->rope_dim % 2)
        return BAD(r, KV_EFORMAT, "metadata key '%s' is %u, which is odd", full_key(r, "rope.dimension_count").s,
                   d->rope_dim);
    if ((st = read_scaling(r, &s)) || (st = read_factors(r, "rope_freqs.weight", &all)) ||
        (st = read_factors(r, "rope_factors_short.weight", &near)) ||
        (st = read_factors(r, "rope_factors_long.weight", &far)))
        goto out;
    s.theta = (double)theta, local.theta = (double)local_theta;
    s.factors = all ? all : near, s.factors_far = far;
    st = kv_rope_make(r->l, &s, "rope.freq_base, rope.scaling");
    if (!st && r->l->arch->flags & KV_ARCH_LOCAL_ROPE) st = kv_rope_make(r->l, &local, "rope.freq_base_swa");
out:
    free(all), free(near), free(far);
    return st;
}

/* Which layers have a window: one for the model by the architecture's rule, or a yes or no for each layer. */
static kv_status read_windows(reader *r)
{
    kv_model_desc *d = &r->l->m->desc;
    key_name k = full_key(r, "attention.sliding_window"), kp = full_key(r, "attention.sliding_window_pattern");
    const kv_gguf_value *pattern = kv_gguf_find(r->g, kp.s);
    uint32_t window = 0, period = r->l->arch->period;
    uint64_t u;
    kv_status st =
        get_count(r, "attention.sliding_window", r->l->arch->window == KV_WINDOW_PERIOD, 0, KV_MODEL_DIM_MAX, &window);
    if (st) return st;
    if (window && r->l->arch->window == KV_WINDOW_NONE)
        return BAD(r, KV_EUNSUPPORTED, "a sliding window of %u (metadata key '%s') is not supported for %s models",
                   window, k.s, d->arch);
    if (pattern && r->l->arch->window != KV_WINDOW_PERIOD)
        return BAD(r, KV_EUNSUPPORTED,
                   "a pattern of sliding windows (metadata key '%s') is not supported for %s models", kp.s, d->arch);
    if (pattern && !pattern->array) {
        if (!kv_gguf_uint(pattern, 0, &u) || !u || u > KV_MODEL_LAYERS_MAX)
            return BAD(r, KV_EFORMAT, "metadata key '%s' is not a number of layers", kp.s);
        period = (uint32_t)u;
    }
    if ((st = kv_arch_windows(r->l, window, period)) || !pattern || !pattern->array) return st;
    if (pattern->type != KV_GGUF_BOOL || pattern->n < d->n_layer)
        return BAD(r, KV_EFORMAT, "metadata key '%s' is not a boolean for each of %u layers", kp.s, d->n_layer);
    for (uint32_t i = 0; i < d->n_layer; i++) d->window[i] = pattern->p[i] ? window : 0;
    return KV_OK;
}

static kv_status read_multipliers(reader *r)
{
    kv_model_desc *d = &r->l->m->desc;
    float logits = 1;
    kv_status st;
    if (!(r->l->arch->flags & KV_ARCH_MULTIPLIERS)) return KV_OK;
    if ((st = get_number(r, "embedding_scale", false, NULL, &d->embed_scale)) ||
        (st = get_number(r, "residual_scale", false, NULL, &d->residual_scale)) ||
        (st = get_number(r, "logit_scale", false, NULL, &logits)))
        return st;
    d->logit_scale = 1 / logits;
    return KV_OK;
}

static kv_status read_shape(reader *r)
{
    kv_model_desc *d = &r->l->m->desc;
    uint32_t value_length = 0, vocab_size = 0;
    bool experts = r->l->arch->flags & KV_ARCH_EXPERTS;
    kv_status st;
    if ((st = get_count(r, "block_count", true, 1, KV_MODEL_LAYERS_MAX, &d->n_layer)) ||
        (st = get_count(r, "embedding_length", true, 1, KV_MODEL_DIM_MAX, &d->hidden)) ||
        (experts && (st = get_count(r, "expert_count", false, 0, KV_MODEL_EXPERTS_MAX, &d->n_expert))) ||
        (st = get_count(r, "feed_forward_length", !d->n_expert, 1, KV_MODEL_DIM_MAX, &d->ffn)) ||
        (st = get_count(r, "context_length", true, 1, KV_MODEL_DIM_MAX, &d->n_ctx)) ||
        (st = get_count(r, "attention.head_count", true, 1, KV_MODEL_HEADS_MAX, &d->n_q_head)))
        return st;
    if (d->n_expert && ((st = get_count(r, "expert_used_count", true, 1, d->n_expert, &d->n_expert_used)) ||
                        (st = get_count(r, "expert_feed_forward_length", !d->ffn, 1, KV_MODEL_DIM_MAX, &d->ffn))))
        return st;
    d->expert_norm = d->n_expert;
    d->n_kv_head = d->n_q_head;
    if ((st = get_count(r, "attention.head_count_kv", false, 1, KV_MODEL_HEADS_MAX, &d->n_kv_head)) ||
        (st = get_count(r, "attention.key_length", false, 1, KV_MODEL_HEAD_DIM_MAX, &d->head_dim)) ||
        (st = kv_arch_check(r->l, full_key(r, "attention.head_count").s, full_key(r, "attention.head_count_kv").s,
                            full_key(r, "attention.key_length").s)))
        return st;
    value_length = d->head_dim;
    if ((st = get_count(r, "attention.value_length", false, 1, KV_MODEL_HEAD_DIM_MAX, &value_length)) ||
        (st = get_count(r, "vocab_size", false, 1, KV_VOCAB_MAX, &vocab_size)))
        return st;
    if (value_length != d->head_dim)
        return BAD(r, KV_EUNSUPPORTED, "values of %u per head with keys of %u (metadata key '%s') are not supported",
                   value_length, d->head_dim, full_key(r, "attention.value_length").s);

    uint32_t i = kv_store_find(r->l->m->store, "token_embd.weight");
    if (i == KV_NONE) return BAD(r, KV_EFORMAT, "tensor 'token_embd.weight' is missing");
    uint64_t rows = kv_store_at(r->l->m->store, i)->ne[1];
    if (rows > KV_VOCAB_MAX)
        return BAD(r, KV_EFORMAT, "tensor 'token_embd.weight' has %llu rows (at most %u)", (unsigned long long)rows,
                   KV_VOCAB_MAX);
    d->n_vocab = (uint32_t)rows;
    if (vocab_size && vocab_size != d->n_vocab)
        return BAD(r, KV_EFORMAT, "metadata key '%s' is %u, but tensor 'token_embd.weight' has %u rows",
                   full_key(r, "vocab_size").s, vocab_size, d->n_vocab);
    d->tied = kv_store_find(r->l->m->store, "output.weight") == KV_NONE;
    return KV_OK;
}

static kv_status read_desc(reader *r)
{
    kv_model_desc *d = &r->l->m->desc;
    const char *eps =
        r->l->arch->norm == KV_NORM_LAYER ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon";
    const kv_gguf_value *parallel = kv_gguf_find(r->g, full_key(r, "use_parallel_residual").s);
    bool has_eps = false;
    kv_status st;
    if ((st = refuse_foreign(r)) || (st = read_shape(r)) || (st = get_number(r, eps, false, &has_eps, &d->norm_eps)))
        return st;
    if (!has_eps) return BAD(r, KV_EFORMAT, "metadata key '%s' is missing", full_key(r, eps).s);
    if (parallel && (!kv_gguf_bool(parallel, &d->parallel) || (d->parallel && !r->l->arch->parallel)))
        return BAD(r, KV_EUNSUPPORTED, "metadata key '%s' is not supported", full_key(r, "use_parallel_residual").s);
    if ((st = get_number(r, "attention.scale", false, NULL, &d->scale)) ||
        (st = get_number(r, "attn_logit_softcapping", true, NULL, &d->softcap)) ||
        (st = get_number(r, "final_logit_softcapping", true, NULL, &d->final_softcap)) || (st = read_multipliers(r)) ||
        (st = read_rope(r)) || (st = read_windows(r)) || (st = kv_arch_layer_ropes(r->l)))
        return st;
    return kv_describe_tensors(r->l);
}

static kv_status load_vocab(reader *r)
{
    kv_model *m = r->l->m;
    kv_vocab v;
    kv_error err = {""};
    kv_status st = kv_vocab_read(r->g, m->desc.n_vocab, &v, &err);
    if (st == KV_EUNSUPPORTED) {
        snprintf(m->no_tok, sizeof m->no_tok, "%.*s", (int)sizeof m->no_tok - 1, err.msg);
        return KV_OK;
    }
    if (!st) st = kv_tokenizer_create(&v, &m->tok, &err);
    return st ? BAD(r, st, "%s", err.msg) : KV_OK;
}

/* ------------------------------------------------------------------------------------------------ files */
static kv_status add_file(reader *r, const kv_gguf *g)
{
    uint32_t n, file;
    const kv_gguf_tensor *t = kv_gguf_tensors(g, &n);
    kv_status st = kv_store_file(r->l->m->store, kv_gguf_path(g), &file, r->l->err);
    for (uint32_t i = 0; i < n && !st; i++) {
        kv_stored s = {.name = t[i].name,
                       .quant = t[i].quant,
                       .n_dims = t[i].n_dims,
                       .row_bytes = t[i].row_bytes,
                       .n_row = t[i].n_row,
                       .offset = t[i].offset,
                       .file = file};
        memcpy(s.ne, t[i].ne, sizeof s.ne);
        st = kv_store_add(r->l->m->store, &s, r->l->err);
    }
    return st;
}

/* Number `key` of a file, `absent` when it has none. */
static kv_status split_key(const reader *r, const kv_gguf *g, const char *key, uint32_t absent, uint32_t *out)
{
    const kv_gguf_value *v = kv_gguf_find(g, key);
    uint64_t u = absent;
    if (v && (v->array || !kv_gguf_uint(v, 0, &u) || u > KV_SPLITS_MAX))
        return BAD(r, KV_EFORMAT, "metadata key '%s' of '%s' is not a number of parts", key, kv_gguf_path(g));
    *out = (uint32_t)u;
    return KV_OK;
}

/* Part `no` (from 0) of `count`, named like the part at hand: NAME-00001-of-00003.gguf. */
static kv_status part_path(const reader *r, const char *path, uint32_t no, uint32_t count, char **out)
{
    char end[40];
    size_t n = strlen(path), tail = (size_t)snprintf(end, sizeof end, "-%05u-of-%05u.gguf", 1u, count);
    const char *of = n > tail ? path + n - tail + 6 : NULL; /* "-of-00003.gguf" */
    if (!of || strcmp(of, end + 6) || path[n - tail] != '-')
        return BAD(r, KV_EFORMAT,
                   "the file is one of %u parts (split.count), but its name does not end in -0000N-of-%05u.gguf", count,
                   count);
    *out = kv_format("%.*s-%05u-of-%05u.gguf", (int)(n - tail), path, no + 1, count);
    return *out ? KV_OK : kv_fail(r->l->err, KV_ENOMEM, "out of memory for a path");
}

/* Open the first part, which has the metadata, and enter the tensors of all. */
static kv_status open_parts(reader *r, const char *path, kv_gguf **first)
{
    uint32_t count, no, entered = 0, promised;
    kv_status st = kv_gguf_open(path, first, r->l->err);
    if (st || (st = split_key(r, *first, "split.count", 1, &count)) || (st = split_key(r, *first, "split.no", 0, &no)))
        return st;
    if (count <= 1) return add_file(r, *first);
    for (uint32_t i = 0; i < count && !st; i++) {
        kv_gguf *g = NULL;
        char *name = NULL;
        uint32_t is, of;
        if (!(st = part_path(r, path, i, count, &name)) && !(st = kv_gguf_open(name, &g, r->l->err)) &&
            !(st = split_key(r, g, "split.no", 0, &is)) && !(st = split_key(r, g, "split.count", 1, &of)) &&
            !(st = is != i || of != count
                       ? BAD(r, KV_EFORMAT, "'%s' says that it is part %u of %u (split.no, split.count)", name, is + 1,
                             of)
                       : KV_OK))
            st = add_file(r, g);
        free(name);
        if (!st && !i) {
            kv_gguf *old = *first;
            *first = g, g = old;
        }
        kv_gguf_close(g);
    }
    if (st) return st;
    entered = kv_store_count(r->l->m->store);
    const kv_gguf_value *v = kv_gguf_find(*first, "split.tensors.count");
    uint64_t u;
    if (v && (!kv_gguf_uint(v, 0, &u) || u != entered)) {
        promised = kv_gguf_uint(v, 0, &u) ? (uint32_t)u : 0;
        return BAD(r, KV_EFORMAT, "the parts have %u tensors, 'split.tensors.count' says %u", entered, promised);
    }
    return KV_OK;
}

kv_status kv_open_gguf(kv_loader *l, const char *path)
{
    kv_gguf *g = NULL;
    reader r = {.l = l};
    kv_status st = open_parts(&r, path, &g);
    r.g = g;
    if (!st) st = kv_store_index(l->m->store, l->err);
    if (!st) st = kv_array(&l->used, kv_store_count(l->m->store), 1, l->err);
    if (!st && !(st = kv_name_model(l)) && !(st = find_arch(&r)) && !(st = read_desc(&r))) st = load_vocab(&r);
    kv_gguf_close(g);
    return st;
}
