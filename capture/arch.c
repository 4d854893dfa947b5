/* arch.c - the tables: architectures, roles of tensors, and their names in either container. */
#include "capture/arch.h"

#include <math.h>
#include <stdlib.h>

/* ------------------------------------------------------------------------------------------------ names in HF folders
 */
static const kv_role_name hf_sandwich[] = {{KV_R_POST_ATTN_NORM, "layers.#.post_attention_layernorm.weight"},
                                           {KV_R_FFN_NORM, "layers.#.pre_feedforward_layernorm.weight"},
                                           {KV_R_POST_FFN_NORM, "layers.#.post_feedforward_layernorm.weight"},
                                           {0, NULL}};
static const kv_role_name hf_gpt2[] = {{KV_R_TOK_EMBD, "wte.weight"},
                                       {KV_R_POS_EMBD, "wpe.weight"},
                                       {KV_R_OUT_NORM, "ln_f.weight"},
                                       {KV_R_OUT_NORM_B, "ln_f.bias"},
                                       {KV_R_ATTN_NORM, "h.#.ln_1.weight"},
                                       {KV_R_ATTN_NORM_B, "h.#.ln_1.bias"},
                                       {KV_R_QKV, "h.#.attn.c_attn.weight"},
                                       {KV_R_BQKV, "h.#.attn.c_attn.bias"},
                                       {KV_R_O, "h.#.attn.c_proj.weight"},
                                       {KV_R_BO, "h.#.attn.c_proj.bias"},
                                       {KV_R_FFN_NORM, "h.#.ln_2.weight"},
                                       {KV_R_FFN_NORM_B, "h.#.ln_2.bias"},
                                       {KV_R_UP, "h.#.mlp.c_fc.weight"},
                                       {KV_R_B_UP, "h.#.mlp.c_fc.bias"},
                                       {KV_R_DOWN, "h.#.mlp.c_proj.weight"},
                                       {KV_R_B_DOWN, "h.#.mlp.c_proj.bias"},
                                       {0, NULL}};
static const kv_role_name hf_neox[] = {{KV_R_TOK_EMBD, "embed_in.weight"},
                                       {KV_R_OUT_NORM, "final_layer_norm.weight"},
                                       {KV_R_OUT_NORM_B, "final_layer_norm.bias"},
                                       {KV_R_OUTPUT, "embed_out.weight"},
                                       {KV_R_ATTN_NORM_B, "layers.#.input_layernorm.bias"},
                                       {KV_R_QKV, "layers.#.attention.query_key_value.weight"},
                                       {KV_R_BQKV, "layers.#.attention.query_key_value.bias"},
                                       {KV_R_O, "layers.#.attention.dense.weight"},
                                       {KV_R_BO, "layers.#.attention.dense.bias"},
                                       {KV_R_FFN_NORM_B, "layers.#.post_attention_layernorm.bias"},
                                       {KV_R_UP, "layers.#.mlp.dense_h_to_4h.weight"},
                                       {KV_R_B_UP, "layers.#.mlp.dense_h_to_4h.bias"},
                                       {KV_R_DOWN, "layers.#.mlp.dense_4h_to_h.weight"},
                                       {KV_R_B_DOWN, "layers.#.mlp.dense_4h_to_h.bias"},
                                       {0, NULL}};
static const kv_role_name hf_mixtral[] = {{KV_R_ROUTER, "layers.#.block_sparse_moe.gate.weight"},
                                          {KV_R_EXPERT_GATE, "layers.#.block_sparse_moe.experts.@.w1.weight"},
                                          {KV_R_EXPERT_UP, "layers.#.block_sparse_moe.experts.@.w3.weight"},
                                          {KV_R_EXPERT_DOWN, "layers.#.block_sparse_moe.experts.@.w2.weight"},
                                          {0, NULL}};
/* What most folders say. */
static const kv_role_name hf_common[] = {{KV_R_TOK_EMBD, "embed_tokens.weight"},
                                         {KV_R_OUT_NORM, "norm.weight"},
                                         {KV_R_OUTPUT, "lm_head.weight"},
                                         {KV_R_ATTN_NORM, "layers.#.input_layernorm.weight"},
                                         {KV_R_Q, "layers.#.self_attn.q_proj.weight"},
                                         {KV_R_K, "layers.#.self_attn.k_proj.weight"},
                                         {KV_R_V, "layers.#.self_attn.v_proj.weight"},
                                         {KV_R_BQ, "layers.#.self_attn.q_proj.bias"},
                                         {KV_R_BK, "layers.#.self_attn.k_proj.bias"},
                                         {KV_R_BV, "layers.#.self_attn.v_proj.bias"},
                                         {KV_R_QKV, "layers.#.self_attn.qkv_proj.weight"},
                                         {KV_R_Q_NORM, "layers.#.self_attn.q_norm.weight"},
                                         {KV_R_K_NORM, "layers.#.self_attn.k_norm.weight"},
                                         {KV_R_O, "layers.#.self_attn.o_proj.weight"},
                                         {KV_R_BO, "layers.#.self_attn.o_proj.bias"},
                                         {KV_R_FFN_NORM, "layers.#.post_attention_layernorm.weight"},
                                         {KV_R_GATE, "layers.#.mlp.gate_proj.weight"},
                                         {KV_R_UP, "layers.#.mlp.up_proj.weight"},
                                         {KV_R_DOWN, "layers.#.mlp.down_proj.weight"},
                                         {KV_R_GATE_UP, "layers.#.mlp.gate_up_proj.weight"},
                                         {KV_R_B_GATE, "layers.#.mlp.gate_proj.bias"},
                                         {KV_R_B_UP, "layers.#.mlp.up_proj.bias"},
                                         {KV_R_B_DOWN, "layers.#.mlp.down_proj.bias"},
                                         {KV_R_ROUTER, "layers.#.mlp.gate.weight"},
                                         {KV_R_EXPERT_GATE, "layers.#.mlp.experts.@.gate_proj.weight"},
                                         {KV_R_EXPERT_UP, "layers.#.mlp.experts.@.up_proj.weight"},
                                         {KV_R_EXPERT_DOWN, "layers.#.mlp.experts.@.down_proj.weight"},
                                         {0, NULL}};

/* ------------------------------------------------------------------------------------------------ architectures */
#define GEMMA (KV_ARCH_SCALE_EMBED | KV_ARCH_UNIT_NORM)

const kv_arch kv_arch_table[] = {
    {.name = "llama", /* Llama 1 to 3, SmolLM2; Mistral and Mixtral in GGUF */
     .hf = "llama",
     .flags = KV_ARCH_PAIRED | KV_ARCH_EXPERTS,
     .gated = true,
     .window = KV_WINDOW_ALL},
    {.hf = "mistral", .gated = true, .window = KV_WINDOW_ALL},
    {.hf = "mixtral", .flags = KV_ARCH_EXPERTS, .gated = true, .window = KV_WINDOW_ALL, .hf_names = hf_mixtral},
    {.name = "qwen2", .hf = "qwen2", .flags = KV_ARCH_QKV_BIAS, .gated = true},
    {.name = "qwen3", .hf = "qwen3", .qk_norm = KV_QK_NORM_HEAD, .gated = true},
    {.name = "qwen3moe", .hf = "qwen3_moe", .flags = KV_ARCH_EXPERTS, .qk_norm = KV_QK_NORM_HEAD, .gated = true},
    {.name = "gemma", .hf = "gemma", .flags = GEMMA, .act = KV_ACT_GELU_TANH, .gated = true},
    {.name = "gemma2",
     .hf = "gemma2",
     .flags = GEMMA | KV_ARCH_POST_NORM,
     .act = KV_ACT_GELU_TANH,
     .gated = true,
     .window = KV_WINDOW_PERIOD,
     .period = 2,
     .softcap = 50,
     .final_softcap = 30,
     .wide_scale_layers = 46, /* 27B */
     .hf_names = hf_sandwich},
    {.name = "gemma3",
     .hf = "gemma3_text",
     .flags = GEMMA | KV_ARCH_POST_NORM | KV_ARCH_LOCAL_ROPE,
     .qk_norm = KV_QK_NORM_HEAD,
     .act = KV_ACT_GELU_TANH,
     .gated = true,
     .window = KV_WINDOW_PERIOD,
     .period = 6,
     .wide_scale_layers = 62, /* 27B */
     .hf_defaults =
         "{\"num_attention_heads\": 8, \"num_key_value_heads\": 4, \"head_dim\": 256, \"vocab_size\": 262208,"
         "\"rms_norm_eps\": 1e-6, \"max_position_embeddings\": 131072, \"sliding_window\": 4096,"
         "\"rope_theta\": 1e6, \"rope_local_base_freq\": 1e4, \"query_pre_attn_scalar\": 256}",
     .hf_names = hf_sandwich},
    {.name = "phi3", .hf = "phi3", .gated = true, .window = KV_WINDOW_ALL},
    {.name = "olmo2",
     .hf = "olmo2",
     .flags = KV_ARCH_NO_PRE_NORM | KV_ARCH_POST_NORM,
     .qk_norm = KV_QK_NORM_ALL,
     .gated = true,
     .hf_names = hf_sandwich},
    {.name = "granite", .hf = "granite", .flags = KV_ARCH_PAIRED | KV_ARCH_MULTIPLIERS, .gated = true},
    {.name = "gpt2",
     .hf = "gpt2",
     .flags = KV_ARCH_POSITIONS | KV_ARCH_TURNED | KV_ARCH_QKV_BIAS,
     .norm = KV_NORM_LAYER,
     .act = KV_ACT_GELU_TANH,
     .hf_names = hf_gpt2},
    {.name = "gptneox", /* Pythia */
     .hf = "gpt_neox",
     .flags = KV_ARCH_QKV_BY_HEAD | KV_ARCH_QKV_BIAS,
     .norm = KV_NORM_LAYER,
     .act = KV_ACT_GELU,
     .parallel = true,
     .hf_names = hf_neox},
};
const uint32_t kv_arch_count = sizeof kv_arch_table / sizeof *kv_arch_table;

const kv_arch *kv_arch_of_gguf(const char *name)
{
    for (uint32_t i = 0; i < kv_arch_count; i++)
        if (kv_arch_table[i].name && !strcmp(name, kv_arch_table[i].name)) return &kv_arch_table[i];
    return NULL;
}

const kv_arch *kv_arch_of_hf(const char *model_type)
{
    for (uint32_t i = 0; i < kv_arch_count; i++)
        if (kv_arch_table[i].hf && !strcmp(model_type, kv_arch_table[i].hf)) return &kv_arch_table[i];
    return NULL;
}

void kv_arch_list(bool hf, char *out, size_t n)
{
    *out = 0;
    for (uint32_t i = 0; i < kv_arch_count; i++) {
        const char *name = hf ? kv_arch_table[i].hf : kv_arch_table[i].name;
        size_t at = strlen(out);
        if (name) snprintf(out + at, n - at, " %s", name);
    }
}

/* ------------------------------------------------------------------------------------------------ roles */
#define M(field) offsetof(kv_model, field)
#define L(field) offsetof(kv_layer_weights, field)
#define F(field) offsetof(kv_ffn, field)
const kv_role_row kv_role_table[KV_R_COUNT] = {
    [KV_R_TOK_EMBD] = {"token_embd.weight", M(tok_embd), KV_D_VOCAB, KV_D_HIDDEN, false, false},
    [KV_R_POS_EMBD] = {"position_embd.weight", M(pos_embd), KV_D_CTX, KV_D_HIDDEN, false, false},
    [KV_R_OUT_NORM] = {"output_norm.weight", M(out_norm.w), KV_D_1, KV_D_HIDDEN, false, true},
    [KV_R_OUT_NORM_B] = {"output_norm.bias", M(out_norm.b), KV_D_1, KV_D_HIDDEN, false, false},
    [KV_R_OUTPUT] = {"output.weight", M(output), KV_D_VOCAB, KV_D_HIDDEN, false, false},
    [KV_R_ATTN_NORM] = {"blk.#.attn_norm.weight", L(attn_norm.w), KV_D_1, KV_D_HIDDEN, false, true},
    [KV_R_ATTN_NORM_B] = {"blk.#.attn_norm.bias", L(attn_norm.b), KV_D_1, KV_D_HIDDEN, false, false},
    [KV_R_Q] = {"blk.#.attn_q.weight", L(wq), KV_D_Q, KV_D_HIDDEN, true, false},
    [KV_R_K] = {"blk.#.attn_k.weight", L(wk), KV_D_KV, KV_D_HIDDEN, true, false},
    [KV_R_V] = {"blk.#.attn_v.weight", L(wv), KV_D_KV, KV_D_HIDDEN, false, false},
    [KV_R_BQ] = {"blk.#.attn_q.bias", L(bq), KV_D_1, KV_D_Q, true, false},
    [KV_R_BK] = {"blk.#.attn_k.bias", L(bk), KV_D_1, KV_D_KV, true, false},
    [KV_R_BV] = {"blk.#.attn_v.bias", L(bv), KV_D_1, KV_D_KV, false, false},
    [KV_R_QKV] = {.gguf = "blk.#.attn_qkv.weight"}, /* into wq, wk, wv */
    [KV_R_BQKV] = {.gguf = "blk.#.attn_qkv.bias"},
    [KV_R_Q_NORM] = {"blk.#.attn_q_norm.weight", L(q_norm.w), KV_D_1, KV_D_Q_NORM, false, true},
    [KV_R_K_NORM] = {"blk.#.attn_k_norm.weight", L(k_norm.w), KV_D_1, KV_D_K_NORM, false, true},
    [KV_R_O] = {"blk.#.attn_output.weight", L(wo), KV_D_HIDDEN, KV_D_Q, false, false},
    [KV_R_BO] = {"blk.#.attn_output.bias", L(bo), KV_D_1, KV_D_HIDDEN, false, false},
    [KV_R_POST_ATTN_NORM] = {"blk.#.post_attention_norm.weight", L(post_attn_norm.w), KV_D_1, KV_D_HIDDEN, false, true},
    [KV_R_FFN_NORM] = {"blk.#.ffn_norm.weight", L(ffn_norm.w), KV_D_1, KV_D_HIDDEN, false, true},
    [KV_R_FFN_NORM_B] = {"blk.#.ffn_norm.bias", L(ffn_norm.b), KV_D_1, KV_D_HIDDEN, false, false},
    [KV_R_POST_FFN_NORM] = {"blk.#.post_ffw_norm.weight", L(post_ffn_norm.w), KV_D_1, KV_D_HIDDEN, false, true},
    [KV_R_ROUTER] = {"blk.#.ffn_gate_inp.weight", L(router), KV_D_EXPERTS, KV_D_HIDDEN, false, false},
    [KV_R_GATE] = {"blk.#.ffn_gate.weight", F(gate), KV_D_FFN, KV_D_HIDDEN, false, false},
    [KV_R_UP] = {"blk.#.ffn_up.weight", F(up), KV_D_FFN, KV_D_HIDDEN, false, false},
    [KV_R_DOWN] = {"blk.#.ffn_down.weight", F(down), KV_D_HIDDEN, KV_D_FFN, false, false},
    [KV_R_GATE_UP] = {.gguf = "blk.#.ffn_up.weight"}, /* into gate and up, where there is no ffn_gate */
    [KV_R_B_GATE] = {"blk.#.ffn_gate.bias", F(b_gate), KV_D_1, KV_D_FFN, false, false},
    [KV_R_B_UP] = {"blk.#.ffn_up.bias", F(b_up), KV_D_1, KV_D_FFN, false, false},
    [KV_R_B_DOWN] = {"blk.#.ffn_down.bias", F(b_down), KV_D_1, KV_D_HIDDEN, false, false},
    [KV_R_EXPERTS_GATE] = {"blk.#.ffn_gate_exps.weight", F(gate), KV_D_FFN, KV_D_HIDDEN, false, false},
    [KV_R_EXPERTS_UP] = {"blk.#.ffn_up_exps.weight", F(up), KV_D_FFN, KV_D_HIDDEN, false, false},
    [KV_R_EXPERTS_DOWN] = {"blk.#.ffn_down_exps.weight", F(down), KV_D_HIDDEN, KV_D_FFN, false, false},
    [KV_R_EXPERT_GATE] = {"blk.#.ffn_gate.@.weight", F(gate), KV_D_FFN, KV_D_HIDDEN, false, false},
    [KV_R_EXPERT_UP] = {"blk.#.ffn_up.@.weight", F(up), KV_D_FFN, KV_D_HIDDEN, false, false},
    [KV_R_EXPERT_DOWN] = {"blk.#.ffn_down.@.weight", F(down), KV_D_HIDDEN, KV_D_FFN, false, false},
};

/* A template with its numbers filled in, behind a prefix. */
static void fill_name(const char *prefix, const char *name, uint32_t layer, uint32_t expert, char out[128])
{
    size_t at = (size_t)snprintf(out, 64, "%s", prefix);
    for (; *name && at < 112; name++) {
        if (*name == '#' || *name == '@')
            at += (size_t)snprintf(out + at, 12, "%u", *name == '#' ? layer : expert);
        else
            out[at++] = *name;
    }
    out[at] = 0;
}

static const char *hf_name(const kv_role_name *table, kv_role role)
{
    for (; table && table->name; table++)
        if (table->role == role) return table->name;
    return NULL;
}

uint32_t kv_loader_find(const kv_loader *l, kv_role role, uint32_t layer, uint32_t expert, char name[128])
{
    const char *of = kv_role_table[role].gguf, *prefix = "";
    if (l->hf) {
        of = hf_name(l->arch->hf_names, role);
        if (!of) of = hf_name(hf_common, role);
        if (role != KV_R_OUTPUT) prefix = l->prefix;
    }
    snprintf(name, 128, "%s", of ? of : "");
    if (!of) return KV_NONE;
    fill_name(prefix, of, layer, expert, name);
    uint32_t i = kv_store_find(l->m->store, name);
    if (i == KV_NONE && role == KV_R_OUTPUT && l->hf) { /* inside a multimodal wrapper */
        char wrapped[128];
        fill_name("language_model.", of, layer, expert, wrapped);
        i = kv_store_find(l->m->store, wrapped);
    }
    return i;
}

/* ------------------------------------------------------------------------------------------------ description */
void kv_arch_begin(kv_loader *l, const kv_arch *arch)
{
    kv_model_desc *d = &l->m->desc;
    l->arch = arch;
    d->norm = arch->norm, d->qk_norm = arch->qk_norm, d->act = arch->act;
    d->gated = arch->gated, d->parallel = arch->parallel, d->post_norm = arch->flags & KV_ARCH_POST_NORM;
    d->softcap = arch->softcap, d->final_softcap = arch->final_softcap;
    d->embed_scale = d->residual_scale = d->logit_scale = 1;
}

kv_status kv_arch_windows(kv_loader *l, uint32_t window, uint32_t period)
{
    kv_model_desc *d = &l->m->desc;
    kv_status st = kv_array(&d->window, d->n_layer, sizeof *d->window, l->err);
    for (uint32_t i = 0; i < d->n_layer && !st; i++)
        if (l->arch->window == KV_WINDOW_ALL ||
            (l->arch->window == KV_WINDOW_PERIOD && (!period || i % period < period - 1)))
            d->window[i] = window;
    return st;
}

kv_status kv_arch_layer_ropes(kv_loader *l)
{
    kv_model_desc *d = &l->m->desc;
    kv_status st = kv_array(&d->layer_rope, d->n_layer, 1, l->err);
    for (uint32_t i = 0; i < d->n_layer && !st; i++) d->layer_rope[i] = d->n_rope == 2 && d->window[i];
    return st;
}

kv_status kv_arch_check(kv_loader *l, const char *key_heads, const char *key_kv_heads, const char *key_head_dim)
{
    kv_model_desc *d = &l->m->desc;
    if (d->n_q_head % d->n_kv_head)
        return KV_BAD(l, KV_EFORMAT, "'%s' is %u, which does not divide the %u query heads", key_kv_heads, d->n_kv_head,
                      d->n_q_head);
    if (!d->head_dim && d->hidden % d->n_q_head)
        return KV_BAD(l, KV_EFORMAT, "'%s' is %u, which does not divide the width %u", key_heads, d->n_q_head,
                      d->hidden);
    if (!d->head_dim) d->head_dim = d->hidden / d->n_q_head;
    if (d->head_dim > KV_MODEL_HEAD_DIM_MAX)
        return KV_BAD(l, KV_EFORMAT, "'%s' gives heads of %u (at most %u)", key_head_dim, d->head_dim,
                      KV_MODEL_HEAD_DIM_MAX);
    if ((uint64_t)d->n_layer * (d->n_expert ? d->n_expert : 1) > KV_MODEL_FFNS_MAX)
        return KV_BAD(l, KV_EFORMAT, "%u layers of %u experts are more than this program takes", d->n_layer,
                      d->n_expert);
    d->scale = (float)(1 / sqrt(l->arch->wide_scale_layers == d->n_layer ? (double)d->hidden / d->n_q_head
                                                                         : (double)d->head_dim));
    if (l->arch->flags & KV_ARCH_SCALE_EMBED) d->embed_scale = sqrtf((float)d->hidden);
    return KV_OK;
}
