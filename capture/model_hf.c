/* model_hf.c - the description of a model out of a folder as Hugging Face's libraries save it: config.json, in the key
 * style of transformers 4 or 5, and safetensors. */
#include <math.h>
#include <stdlib.h>

#include "capture/arch.h"
#include "capture/safetensors.h"
#include "capture/strictjson.h"
#include "capture/tokenizer.h"

#define CONFIG_MAX ((size_t)4 << 20)
#define VOCAB_MAX  (1u << 20)

/* Spellings of the same thing, first the common one. */
#define LAYERS   "num_hidden_layers n_layer"
#define HIDDEN   "hidden_size n_embd"
#define HEADS    "num_attention_heads n_head"
#define KV_HEADS "num_key_value_heads"
#define FFN      "intermediate_size n_inner"
#define CONTEXT  "max_position_embeddings n_positions"
#define EPS      "rms_norm_eps layer_norm_eps layer_norm_epsilon"
#define EXPERTS  "num_local_experts num_experts"

/* A loader and the configuration it reads. */
typedef struct {
    kv_loader *l;
    const json_t *c; /* of the language model */
    kv_model_desc *d;
    kv_error why; /* of the getters; fail() puts the model's name in front */
} reader;

#define BAD(r, st, ...) KV_BAD((r)->l, st, __VA_ARGS__)

static kv_status fail(reader *r, kv_status st)
{
    return st ? BAD(r, st, "config.json: %s", r->why.msg) : KV_OK;
}

static kv_status get_count(reader *r, const char *keys, bool required, uint32_t lo, uint32_t hi, uint32_t *out)
{
    bool found;
    char name[64];
    kv_status st = kv_json_count(r->c, keys, lo, hi, &found, out, &r->why);
    if (st || found || !required) return fail(r, st);
    kv_json_find(NULL, keys, name);
    return BAD(r, KV_EFORMAT, "config.json: key '%s' is missing", name);
}

static kv_status get_number(reader *r, const json_t *o, const char *keys, bool zero, bool *found, double *out)
{
    return fail(r, kv_json_number(o, keys, zero, found, out, &r->why));
}

/* ------------------------------------------------------------------------------------------------ refusals */
/* Keys that change the arithmetic in ways the engine does not have; harmless when absent, null, false, 0, empty or at
 * their neutral value. */
static const struct {
    const char *key, *what;
    double neutral;
} foreign[] = {
    {"quantization_config", "a quantised model in a folder", 0},
    {"kv_lora_rank", "multi-head latent attention", 0},
    {"q_lora_rank", "multi-head latent attention", 0},
    {"alibi", "ALiBi position biases", 0},
    {"clip_qkv", "clamped queries, keys and values", 0},
    {"use_bidirectional_attention", "attention that is not causal", 0},
    {"is_encoder_decoder", "an encoder", 0},
    {"add_cross_attention", "cross-attention", 0},
    {"scale_attn_by_inverse_layer_idx", "score scales that differ between layers", 0},
    {"decoder_sparse_step", "a mixture of dense and expert layers", 1},
    {"mlp_only_layers", "a mixture of dense and expert layers", 0},
    {"shared_expert_intermediate_size", "shared experts", 0},
    {"n_shared_experts", "shared experts", 0},
    {"num_kv_shared_layers", "keys and values shared between layers", 0},
    {"mamba_d_state", "recurrent layers", 0},
    {"ssm_cfg", "recurrent layers", 0},
};

static kv_status refuse_foreign(reader *r)
{
    bool scaled = true;
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        const json_t *v = json_object_get(r->c, foreign[i].key);
        double x = json_is_number(v) ? json_number_value(v) : 0;
        if (json_is_true(v) || json_is_string(v) || json_object_size(v) || json_array_size(v) ||
            (x != 0 && x != foreign[i].neutral))
            return BAD(r, KV_EUNSUPPORTED, "%s (config.json: key '%s') is not supported", foreign[i].what,
                       foreign[i].key);
    }
    kv_status st = fail(r, kv_json_bool(r->c, "scale_attn_weights", NULL, &scaled, &r->why));
    if (!st && !scaled)
        st =
            BAD(r, KV_EUNSUPPORTED, "scores without a scale (config.json: key 'scale_attn_weights') are not supported");
    return st;
}

/* ------------------------------------------------------------------------------------------------ rotation */
static kv_status read_scaling(reader *r, const json_t *o, kv_rope_scaling *s)
{
    const char *type = NULL;
    uint32_t near = 0;
    double low = 1, high = 4, attn = 0, mscale = 0, mscale_all = 0;
    bool has_factor = false, has_attn = false, truncate = true, two = false, all = false;
    kv_status st = fail(r, kv_json_text(o, "rope_type type", &type, &r->why));
    if (st || !o) return st;
    s->beta_fast = 32, s->beta_slow = 1, s->factor = 1;
    if ((st = get_number(r, o, "factor", false, &has_factor, &s->factor)) ||
        (st = get_number(r, o, "low_freq_factor", false, NULL, &low)) ||
        (st = get_number(r, o, "high_freq_factor", false, NULL, &high)) ||
        (st = get_number(r, o, "beta_fast", false, NULL, &s->beta_fast)) ||
        (st = get_number(r, o, "beta_slow", false, NULL, &s->beta_slow)) ||
        (st = get_number(r, o, "attention_factor", false, &has_attn, &attn)) ||
        (st = get_number(r, o, "mscale", false, &two, &mscale)) ||
        (st = get_number(r, o, "mscale_all_dim", false, &all, &mscale_all)) ||
        (st = fail(r, kv_json_bool(o, "truncate", NULL, &truncate, &r->why))) ||
        (st = fail(r,
                   kv_json_count(o, "original_max_position_embeddings", 1, KV_MODEL_DIM_MAX, NULL, &near, &r->why))) ||
        (!near && (st = get_count(r, "original_max_position_embeddings", false, 1, KV_MODEL_DIM_MAX, &near))))
        return st;
    s->low = low, s->high = high, s->whole = !truncate, s->near_ctx = near ? near : r->d->n_ctx;
    if (!type || !strcmp(type, "default")) return KV_OK;
    if (!strcmp(type, "linear")) {
        s->kind = KV_ROPE_LINEAR;
    } else if (!strcmp(type, "llama3")) {
        s->kind = KV_ROPE_LLAMA3;
        if (!near) return BAD(r, KV_EFORMAT, "config.json: rope_scaling: original_max_position_embeddings is missing");
        if (!(high > low))
            return BAD(r, KV_EFORMAT, "config.json: rope_scaling: high_freq_factor is not above low_freq_factor");
    } else if (!strcmp(type, "yarn")) {
        s->kind = KV_ROPE_YARN;
        double plain = s->factor > 1 ? 0.1 * log(s->factor) : 0;
        s->mscale = has_attn ? attn : two && all ? (plain * mscale + 1) / (plain * mscale_all + 1) : plain + 1;
    } else if (!strcmp(type, "longrope") || !strcmp(type, "su")) {
        double grow = has_factor ? s->factor : r->d->n_ctx / s->near_ctx;
        s->kind = KV_ROPE_PLAIN, has_factor = true;
        s->mscale = has_attn ? attn : grow > 1 ? sqrt(1 + log(grow) / log(s->near_ctx)) : 1;
    } else {
        return BAD(r, KV_EUNSUPPORTED, "RoPE scaling '%s' (config.json: rope_scaling) is not supported",
                   kv_show(type, strlen(type)).s);
    }
    if (!has_factor) return BAD(r, KV_EFORMAT, "config.json: rope_scaling: factor is missing");
    return KV_OK;
}

/* The list short_factor or long_factor, one number for each rotated pair. */
static kv_status read_factors(reader *r, const json_t *o, const char *key, float **out)
{
    const json_t *v = o ? json_object_get(o, key) : NULL;
    uint32_t half = r->d->rope_dim / 2;
    if (!v) return KV_OK;
    kv_status st = kv_array(out, half, sizeof **out, r->l->err);
    if (st) return st;
    if (json_array_size(v) != half)
        return BAD(r, KV_EFORMAT, "config.json: rope_scaling: %s is not a list of %u numbers", key, half);
    for (uint32_t i = 0; i < half; i++) {
        (*out)[i] =
            (float)json_number_value(json_array_get(v, i)); /* 0 when it is no number: refused by kv_rope_make */
    }
    return KV_OK;
}

/* One table from a scaling object (NULL: none) and the base outside it. */
static kv_status make_rope(reader *r, const json_t *o, double theta)
{
    kv_rope_scaling s = {.theta = theta, .mscale = 1};
    float *near = NULL, *far = NULL;
    kv_status st = get_number(r, o, "rope_theta", false, NULL, &s.theta);
    if (!st) st = read_scaling(r, o, &s);
    if (!st) st = read_factors(r, o, "short_factor", &near);
    if (!st) st = read_factors(r, o, "long_factor", &far);
    s.factors = near, s.factors_far = far;
    if (!st) st = kv_rope_make(r->l, &s, "rope_theta, rope_scaling");
    free(near), free(far);
    return st;
}

static kv_status read_rope(reader *r)
{
    kv_model_desc *d = r->d;
    bool local_rope = r->l->arch->flags & KV_ARCH_LOCAL_ROPE;
    double theta = 10000, local = 10000, part = 1;
    char name[64];
    const json_t *o = kv_json_find(r->c, "rope_parameters rope_scaling", name), *near = NULL;
    kv_status st;
    if (r->l->arch->flags & KV_ARCH_POSITIONS) return KV_OK;
    if (o && !json_is_object(o)) return BAD(r, KV_EFORMAT, "config.json: key '%s' is not an object", name);
    if (o && json_object_get(o, "full_attention")) {
        near = json_object_get(o, "sliding_attention"), o = json_object_get(o, "full_attention");
        if (!json_is_object(o) || (near && !json_is_object(near)))
            return BAD(r, KV_EFORMAT, "config.json: key '%s' does not hold objects", name);
        if (!local_rope)
            return BAD(r, KV_EUNSUPPORTED, "rotations by layer (config.json: '%s') are not supported", name);
    }
    if ((st = get_number(r, r->c, "rope_theta rotary_emb_base", false, NULL, &theta)) ||
        (st = get_number(r, r->c, "rope_local_base_freq", false, NULL, &local)) ||
        (st = get_number(r, r->c, "partial_rotary_factor rotary_pct", false, NULL, &part)) ||
        (st = get_number(r, o, "partial_rotary_factor", false, NULL, &part)))
        return st;
    if (part > 1) return BAD(r, KV_EFORMAT, "config.json: key 'partial_rotary_factor' is %g", part);
    d->rope_dim = (uint32_t)(d->head_dim * part);
    if (d->rope_dim < 2 || d->rope_dim % 2)
        return BAD(r, KV_EFORMAT,
                   "config.json: key 'head_dim' (%u x partial_rotary_factor %g) gives %u rotated elements, "
                   "not an even number",
                   d->head_dim, part, d->rope_dim);
    st = make_rope(r, o, theta);
    return st || !local_rope ? st : make_rope(r, near, local);
}

/* ------------------------------------------------------------------------------------------------ windows */
/* layer_types names each layer's kind. */
static kv_status typed_windows(reader *r, const json_t *types, uint32_t window)
{
    kv_model_desc *d = r->d;
    kv_status st = kv_array(&d->window, d->n_layer, sizeof *d->window, r->l->err);
    if (!st && json_array_size(types) != d->n_layer)
        st = BAD(r, KV_EFORMAT, "config.json: key 'layer_types' is not a list of %u names", d->n_layer);
    for (uint32_t i = 0; i < d->n_layer && !st; i++) {
        const char *t = json_string_value(json_array_get(types, i));
        if (!t || (strcmp(t, "full_attention") && strcmp(t, "sliding_attention")))
            st = BAD(r, KV_EUNSUPPORTED, "layers of type '%s' (config.json: layer_types) are not supported",
                     t ? kv_show(t, strlen(t)).s : "(not a string)");
        else if (*t == 's' && !window)
            st = BAD(r, KV_EFORMAT, "config.json: layer %u slides (layer_types), but there is no sliding_window", i);
        else
            d->window[i] = *t == 's' ? window : 0;
    }
    return st;
}

static kv_status read_windows(reader *r)
{
    kv_model_desc *d = r->d;
    const kv_arch *a = r->l->arch;
    uint32_t window = 0, period = a->period, from = 0;
    bool use = true, asked = false;
    char name[64];
    const json_t *types = kv_json_find(r->c, "layer_types", name);
    kv_status st;
    if ((st = get_count(r, "sliding_window", false, 0, KV_MODEL_DIM_MAX, &window)) ||
        (st = get_count(r, "sliding_window_pattern", false, 1, KV_MODEL_LAYERS_MAX, &period)) ||
        (st = get_count(r, "max_window_layers", false, 0, KV_MODEL_DIM_MAX, &from)) ||
        (st = fail(r, kv_json_bool(r->c, "use_sliding_window", &asked, &use, &r->why))))
        return st;
    if (asked && !use) window = 0;
    if (types) return typed_windows(r, types, window);
    if (a->window == KV_WINDOW_PERIOD && !window)
        return BAD(r, KV_EFORMAT, "config.json: key 'sliding_window' is missing");
    if (a->window != KV_WINDOW_NONE && strcmp(a->hf, "llama")) return kv_arch_windows(r->l, window, period);
    if ((st = kv_arch_windows(r->l, 0, 0)) || !window) return st;
    /* qwen2 and qwen3: layers from max_window_layers on slide, and only when the switch says so */
    if (!asked || !kv_json_find(r->c, "max_window_layers", name) || d->n_expert)
        return BAD(r, KV_EUNSUPPORTED, "a sliding window (config.json: key 'sliding_window') is not supported for '%s'",
                   a->hf);
    for (uint32_t i = from; i < d->n_layer; i++) d->window[i] = window;
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ the rest */
static kv_status read_activation(reader *r)
{
    static const struct {
        const char *name;
        kv_act act;
    } known[] = {{"silu", KV_ACT_SILU},          {"swish", KV_ACT_SILU},
                 {"gelu", KV_ACT_GELU},          {"gelu_pytorch_tanh", KV_ACT_GELU_TANH},
                 {"gelu_new", KV_ACT_GELU_TANH}, {"gelu_fast", KV_ACT_GELU_TANH},
                 {"gelu_python", KV_ACT_GELU},   {"gelu_python_tanh", KV_ACT_GELU_TANH}};
    bool gemma = r->l->arch->flags & KV_ARCH_UNIT_NORM; /* its hidden_act is a relic that the library ignores */
    const char *name, *key = gemma ? "hidden_activation" : "hidden_activation hidden_act activation_function";
    kv_status st = fail(r, kv_json_text(r->c, key, &name, &r->why));
    if (st || !name) return st;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name) && (r->d->gated || known[i].act != KV_ACT_SILU))
            return r->d->act = known[i].act, KV_OK;
    return BAD(r, KV_EUNSUPPORTED, "activation '%s' (config.json: hidden_act) is not supported",
               kv_show(name, strlen(name)).s);
}

static kv_status read_shape(reader *r)
{
    kv_model_desc *d = r->d;
    uint32_t rows = 0;
    char name[64];
    kv_status st;
    if ((st = get_count(r, LAYERS, true, 1, KV_MODEL_LAYERS_MAX, &d->n_layer)) ||
        (st = get_count(r, HIDDEN, true, 1, 1u << 24, &d->hidden)) ||
        (st = get_count(r, HEADS, true, 1, KV_MODEL_HEADS_MAX, &d->n_q_head)) ||
        (st = get_count(r, CONTEXT, true, 1, KV_MODEL_DIM_MAX, &d->n_ctx)) ||
        (st = get_count(r, "vocab_size", true, 1, VOCAB_MAX, &rows)) ||
        (st = get_count(r, FFN, !(r->l->arch->flags & KV_ARCH_POSITIONS), 1, KV_MODEL_DIM_MAX, &d->ffn)))
        return st;
    if (!d->ffn) d->ffn = 4 * d->hidden; /* gpt2 */
    d->n_vocab = rows, d->n_kv_head = d->n_q_head;
    if (r->l->arch->flags & KV_ARCH_EXPERTS &&
        (st = get_count(r, EXPERTS, false, 0, KV_MODEL_EXPERTS_MAX, &d->n_expert)))
        return st;
    if (!d->n_expert && kv_json_find(r->c, EXPERTS, name))
        return BAD(r, KV_EUNSUPPORTED, "a mixture of experts (config.json: key '%s') is not supported for '%s'", name,
                   r->l->arch->hf);
    if (d->n_expert) {
        d->expert_norm = true;
        if ((st = get_count(r, "num_experts_per_tok", true, 1, d->n_expert, &d->n_expert_used)) ||
            (st = get_count(r, "moe_intermediate_size", false, 1, KV_MODEL_DIM_MAX, &d->ffn)) ||
            (st = fail(r, kv_json_bool(r->c, "norm_topk_prob", NULL, &d->expert_norm, &r->why))))
            return st;
    }
    if ((st = get_count(r, KV_HEADS, false, 1, KV_MODEL_HEADS_MAX, &d->n_kv_head)) ||
        (st = get_count(r, "head_dim", false, 1, KV_MODEL_HEAD_DIM_MAX, &d->head_dim)))
        return st;
    return kv_arch_check(r->l, "num_attention_heads", "num_key_value_heads", "head_dim");
}

/* A null cap is none. */
static kv_status read_cap(reader *r, const char *key, float *out)
{
    double x = (double)*out;
    if (json_is_null(json_object_get(r->c, key))) x = 0;
    kv_status st = get_number(r, r->c, key, true, NULL, &x);
    *out = (float)x;
    return st;
}

static kv_status read_scales(reader *r)
{
    kv_model_desc *d = r->d;
    double eps = 0, per = 0, embed = 1, residual = 1, attention = 0, logits = 1;
    bool has_eps, multiplied = r->l->arch->flags & KV_ARCH_MULTIPLIERS;
    kv_status st;
    if ((st = get_number(r, r->c, EPS, false, &has_eps, &eps)) ||
        (st = get_number(r, r->c, "query_pre_attn_scalar", false, NULL, &per)) ||
        (st = get_number(r, r->c, "embedding_multiplier", false, NULL, &embed)) ||
        (st = get_number(r, r->c, "residual_multiplier", false, NULL, &residual)) ||
        (st = get_number(r, r->c, "attention_multiplier", false, NULL, &attention)) ||
        (st = get_number(r, r->c, "logits_scaling", false, NULL, &logits)) ||
        (st = read_cap(r, "attn_logit_softcapping", &d->softcap)) ||
        (st = read_cap(r, "final_logit_softcapping", &d->final_softcap)))
        return st;
    if (!has_eps)
        return BAD(r, KV_EFORMAT, "config.json: key '%s' is missing",
                   d->norm == KV_NORM_LAYER ? "layer_norm_eps" : "rms_norm_eps");
    if (!multiplied && (embed != 1 || residual != 1 || attention != 0 || logits != 1))
        return BAD(r, KV_EUNSUPPORTED,
                   "multipliers (config.json: embedding_multiplier and the like) are not supported for "
                   "'%s'",
                   r->l->arch->hf);
    d->norm_eps = (float)eps;
    if (r->l->arch->flags & KV_ARCH_SCALE_EMBED && r->l->arch->flags & KV_ARCH_POST_NORM)
        d->scale = (float)(1 / sqrt(per > 0 ? per : 256)); /* gemma 2 and 3 */
    if (!multiplied) return KV_OK;
    d->embed_scale = (float)embed, d->residual_scale = (float)residual, d->logit_scale = (float)(1 / logits);
    if (attention > 0) d->scale = (float)attention;
    return KV_OK;
}

static kv_status read_tied(reader *r)
{
    char name[128];
    bool given = false, tied = true;
    kv_status st = fail(r, kv_json_bool(r->c, "tie_word_embeddings", &given, &tied, &r->why));
    uint32_t head = kv_loader_find(r->l, KV_R_OUTPUT, 0, 0, name);
    r->d->tied = given ? tied : head == KV_NONE;
    if (r->d->tied && head != KV_NONE) r->l->used[head] = 1; /* a copy */
    return st;
}

static kv_status read_desc(reader *r)
{
    bool parallel = r->l->arch->parallel;
    kv_status st;
    if ((st = refuse_foreign(r)) || (st = read_shape(r)) || (st = read_activation(r)) || (st = read_scales(r)) ||
        (st = read_tied(r)) || (st = fail(r, kv_json_bool(r->c, "use_parallel_residual", NULL, &parallel, &r->why))))
        return st;
    if (parallel && !r->l->arch->parallel)
        return BAD(r, KV_EUNSUPPORTED, "config.json: key 'use_parallel_residual' is not supported for '%s'",
                   r->l->arch->hf);
    r->d->parallel = parallel;
    if ((st = read_rope(r)) || (st = read_windows(r)) || (st = kv_arch_layer_ropes(r->l))) return st;
    return kv_describe_tensors(r->l);
}

/* model_type picks the row; a multimodal wrapper has its language model's configuration inside. Keys that folders of
 * this kind leave out are added. */
static kv_status find_arch(reader *r, json_t *config)
{
    char known[300];
    const char *type = NULL;
    json_t *inner = json_object_get(config, "text_config"), *c = json_is_object(inner) ? inner : config, *more;
    kv_status st;
    r->c = c;
    if ((st = fail(r, kv_json_text(c, "model_type", &type, &r->why)))) return st;
    if (!type) return BAD(r, KV_EFORMAT, "config.json: key 'model_type' is missing");
    const kv_arch *arch = kv_arch_of_hf(type);
    kv_arch_list(true, known, sizeof known);
    if (!arch)
        return BAD(r, KV_EUNSUPPORTED, "architecture '%s' (config.json: model_type) is not supported; known:%s",
                   kv_show(type, strlen(type)).s, known);
    kv_arch_begin(r->l, arch);
    r->d->arch = kv_format("%s", arch->name ? arch->name : arch->hf);
    if (!r->d->arch) return kv_fail(r->l->err, KV_ENOMEM, "out of memory");
    if (!arch->hf_defaults) return KV_OK;
    more = json_loads(arch->hf_defaults, 0, NULL);
    bool ok = more && !json_object_update_missing(c, more);
    json_decref(more);
    return ok ? KV_OK : kv_fail(r->l->err, KV_ENOMEM, "out of memory");
}

/* Tensors that do not take part: buffers of old versions, and what a multimodal model sees with. */
static bool is_idle(const char *name)
{
    static const char *const ends[] = {".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias",
                                       ".attention.masked_bias"};
    static const char *const begins[] = {"vision_tower.", "multi_modal_projector.", "model.vision_tower.",
                                         "model.multi_modal_projector."};
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (n > strlen(ends[i]) && !strcmp(name + n - strlen(ends[i]), ends[i])) return true;
    for (size_t i = 0; i < sizeof begins / sizeof *begins; i++)
        if (!strncmp(name, begins[i], strlen(begins[i]))) return true;
    return false;
}

/* What stands in front of the names of the body. */
static kv_status find_prefix(reader *r)
{
    static const char *const prefixes[] = {
        "model.", "", "transformer.", "gpt_neox.", "language_model.model.", "model.language_model."};
    char name[128];
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        r->l->prefix = prefixes[i];
        if (kv_loader_find(r->l, KV_R_TOK_EMBD, 0, 0, name) != KV_NONE) return KV_OK;
    }
    r->l->prefix = prefixes[0];
    kv_loader_find(r->l, KV_R_TOK_EMBD, 0, 0, name);
    return BAD(r, KV_EFORMAT, "tensor '%s' is missing", name);
}

/* Without one that this program understands the model can be run on token ids. */
static kv_status load_tokenizer(reader *r, const char *folder)
{
    kv_model *m = r->l->m;
    kv_status st = kv_tokenizer_open_hf(folder, r->d->n_vocab, &m->tok, &r->why);
    if (st != KV_EMISSING && st != KV_EUNSUPPORTED) return st ? BAD(r, st, "%s", r->why.msg) : KV_OK;
    snprintf(m->no_tok, sizeof m->no_tok, "%.*s", (int)sizeof m->no_tok - 1, r->why.msg);
    return KV_OK;
}

kv_status kv_open_hf(kv_loader *l, const char *folder)
{
    reader r = {.l = l, .d = &l->m->desc};
    json_t *config = NULL;
    char *path = kv_format("%s/config.json", folder);
    uint32_t file;
    kv_status st = path ? KV_OK : kv_fail(l->err, KV_ENOMEM, "out of memory for a path");
    l->hf = true;
    if (!st) st = kv_name_model(l);
    if (!st && (st = kv_json_file(path, CONFIG_MAX, &config, &r.why))) st = BAD(&r, st, "%s", r.why.msg);
    if (!st) st = find_arch(&r, config);
    if (!st) st = kv_store_file(l->m->store, path, &file, l->err); /* part of the model's identity */
    if (!st) st = kv_safetensors_folder(l->m->store, folder, l->err);
    if (!st) st = kv_array(&l->used, kv_store_count(l->m->store), 1, l->err);
    for (uint32_t i = 0; !st && i < kv_store_count(l->m->store); i++)
        l->used[i] = is_idle(kv_store_at(l->m->store, i)->name.p);
    if (!st && !(st = find_prefix(&r))) st = read_desc(&r);
    if (!st) st = load_tokenizer(&r, folder);
    json_decref(config);
    free(path);
    return st;
}
