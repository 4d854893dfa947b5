/* arch.h - the table of architectures, and what the loaders of both containers share.
 *
 * An architecture is a row of kv_arch_table: how its description starts out, and what its tensors are called. The
 * readers (model_gguf.c, model_hf.c) fill the rest of the description from the file's keys; load.c then looks every
 * tensor up by its role, compares its shape with the description and cuts, turns and reorders it. A tensor of the file
 * that plays no role is refused: it would change the numbers in a way this program does not know. */
#ifndef KV_ARCH_H
#define KV_ARCH_H

#include "capture/model.h"
#include "capture/store.h"

#define KV_MODEL_LAYERS_MAX   1024u
#define KV_MODEL_HEADS_MAX    1024u
#define KV_MODEL_HEAD_DIM_MAX 512u
#define KV_MODEL_DIM_MAX      0x7fffffffu
#define KV_MODEL_EXPERTS_MAX  1024u
#define KV_MODEL_FFNS_MAX     (1u << 16) /* layers x experts */

/* What a tensor is for. The order is that of role_table in arch.c. */
typedef enum {
    KV_R_TOK_EMBD,
    KV_R_POS_EMBD,
    KV_R_OUT_NORM,
    KV_R_OUT_NORM_B,
    KV_R_OUTPUT,
    KV_R_ATTN_NORM, /* of a layer from here on */
    KV_R_ATTN_NORM_B,
    KV_R_Q,
    KV_R_K,
    KV_R_V,
    KV_R_BQ,
    KV_R_BK,
    KV_R_BV,
    KV_R_QKV, /* Q, K and V in one */
    KV_R_BQKV,
    KV_R_Q_NORM,
    KV_R_K_NORM,
    KV_R_O,
    KV_R_BO,
    KV_R_POST_ATTN_NORM,
    KV_R_FFN_NORM,
    KV_R_FFN_NORM_B,
    KV_R_POST_FFN_NORM,
    KV_R_ROUTER,
    KV_R_GATE, /* of a feed-forward from here on */
    KV_R_UP,
    KV_R_DOWN,
    KV_R_GATE_UP, /* gate, then up */
    KV_R_B_GATE,
    KV_R_B_UP,
    KV_R_B_DOWN,
    KV_R_EXPERTS_GATE, /* all experts in one */
    KV_R_EXPERTS_UP,
    KV_R_EXPERTS_DOWN,
    KV_R_EXPERT_GATE, /* of one expert */
    KV_R_EXPERT_UP,
    KV_R_EXPERT_DOWN,
    KV_R_COUNT
} kv_role;

/* Sizes a tensor's dimensions are made of. */
typedef enum {
    KV_D_1,
    KV_D_HIDDEN,
    KV_D_FFN,
    KV_D_VOCAB,
    KV_D_CTX,
    KV_D_Q,
    KV_D_KV,
    KV_D_Q_NORM,
    KV_D_K_NORM,
    KV_D_EXPERTS,
    KV_D_COUNT
} kv_dim;

typedef struct {
    kv_role role;
    const char *name; /* '#' stands for the layer's number, '@' for the expert's */
} kv_role_name;

enum {
    KV_ARCH_PAIRED = 1,         /* GGUF: rows of Q and K are in RoPE pairs (2i, 2i+1) */
    KV_ARCH_NO_PRE_NORM = 2,    /* no attn_norm and ffn_norm */
    KV_ARCH_POST_NORM = 4,      /* post_attn_norm and post_ffn_norm */
    KV_ARCH_QKV_BIAS = 8,       /* biases of Q, K and V must be there (elsewhere they are used when there) */
    KV_ARCH_POSITIONS = 16,     /* learned positions, no rotation */
    KV_ARCH_SCALE_EMBED = 32,   /* embed_scale = sqrt(hidden) */
    KV_ARCH_UNIT_NORM = 64,     /* HF: norm weights are stored as w - 1 */
    KV_ARCH_TURNED = 128,       /* HF: layer matrices are stored [in][out] */
    KV_ARCH_QKV_BY_HEAD = 256,  /* HF: fused QKV has q, k, v of head 0, then of head 1, ... */
    KV_ARCH_LOCAL_ROPE = 512,   /* layers with a window rotate with a base of their own, unscaled */
    KV_ARCH_MULTIPLIERS = 1024, /* scales of embedding, residual, attention and logits are keys */
    KV_ARCH_EXPERTS = 2048 /* may be a mixture of experts: softmax over all, the weights of the chosen add up to 1 */
};

/* Layers with a sliding window, when the file gives one window for the model. */
typedef enum { KV_WINDOW_NONE, KV_WINDOW_ALL, KV_WINDOW_PERIOD } kv_window_rule;

typedef struct {
    const char *name; /* general.architecture, and the prefix of its GGUF keys; NULL: not in GGUF by that name */
    const char *hf;   /* model_type of config.json; NULL: not as a folder */
    unsigned flags;   /* KV_ARCH_* */
    kv_norm_kind norm;
    kv_qk_norm qk_norm;
    kv_act act; /* GGUF has no key for it; HF: what an absent key means */
    bool gated, parallel;
    kv_window_rule window;
    uint32_t period;              /* KV_WINDOW_PERIOD: layer l is global when l % period == period - 1 */
    float softcap, final_softcap; /* when the file does not say */
    uint32_t wide_scale_layers; /* a model of so many layers scales scores by 1/sqrt(hidden / heads): GGUF has no key */
    const char *hf_defaults;    /* JSON: keys that folders of this kind leave out; NULL: none */
    const kv_role_name *hf_names; /* where they differ from the common ones; ends with a NULL name */
} kv_arch;

extern const kv_arch kv_arch_table[];
extern const uint32_t kv_arch_count;
const kv_arch *kv_arch_of_gguf(const char *name);
const kv_arch *kv_arch_of_hf(const char *model_type);
/* " llama qwen2 ..." */
void kv_arch_list(bool hf, char *out, size_t n);

typedef struct {
    const char *gguf;   /* name template */
    size_t field;       /* offset of the kv_tensor, or of the float *, in kv_model, kv_layer_weights or kv_ffn */
    uint8_t rows, cols; /* KV_D_*; rows KV_D_1: a vector */
    bool heads;         /* rows belong to heads of Q or K */
    bool unit;          /* a norm weight: + 1 under KV_ARCH_UNIT_NORM */
} kv_role_row;
extern const kv_role_row kv_role_table[KV_R_COUNT];

/* A model while it is opened. */
typedef struct {
    kv_model *m;
    const kv_arch *arch;
    bool hf;
    bool has_output;    /* HF: tie_word_embeddings is false, so there must be one */
    const char *prefix; /* HF: in front of the names below the head */
    uint8_t *used;      /* [tensors of the store] */
    size_t n_used;
    kv_error *err;
} kv_loader;

/* kv_store_fail for loaders. */
#define KV_BAD(l, st, ...) kv_store_fail((l)->m->store, st, (l)->err, __VA_ARGS__)

/* The description as the row has it, before any key is read. */
void kv_arch_begin(kv_loader *l, const kv_arch *arch);
/* What follows from the keys: per-layer windows from one window for the model (0 = none); which rope a layer has. */
kv_status kv_arch_windows(kv_loader *l, uint32_t window, uint32_t period);
kv_status kv_arch_layer_ropes(kv_loader *l);
/* Checks that hold for every container: heads divide, sizes in bounds. `key` names the container's keys. */
kv_status kv_arch_check(kv_loader *l, const char *key_heads, const char *key_kv_heads, const char *key_head_dim);
/* Number in the store of the tensor with this role, KV_NONE when absent; name gets the name it was looked up by last.
 */
uint32_t kv_loader_find(const kv_loader *l, kv_role role, uint32_t layer, uint32_t expert, char name[128]);
/* Plan all tensors (shapes, types; nothing left over), then read what `weights` asks for. */
kv_status kv_load_weights(kv_loader *l, kv_weights weights, uint32_t threads);
/* "Q4_1 x 210, F32 x 61" and the number of parameters. */
kv_status kv_describe_tensors(kv_loader *l);
/* model->desc.file and .name from the path. */
kv_status kv_name_model(kv_loader *l);

/* How rotation frequencies are scaled; f_i = theta^(-2i/rope_dim). */
typedef enum {
    KV_ROPE_PLAIN,
    KV_ROPE_LINEAR, /* f / factor */
    KV_ROPE_LLAMA3, /* f / factor for long waves, f for short ones, between them a mix */
    KV_ROPE_YARN,   /* between f / factor and f by a ramp over the pairs */
} kv_rope_kind;
typedef struct {
    kv_rope_kind kind;
    double theta, factor, mscale;
    double near_ctx;                    /* the context before scaling */
    double low, high;                   /* llama3 */
    double beta_fast, beta_slow;        /* YaRN */
    bool whole;                         /* YaRN: the ramp's ends are not rounded */
    const float *factors, *factors_far; /* [rope_dim/2] f is divided by it as well, or NULL; far: beyond near_ctx */
} kv_rope_scaling;
/* Add a table of frequencies to the description. `keys` names where they come from, for messages. */
kv_status kv_rope_make(kv_loader *l, const kv_rope_scaling *s, const char *keys);

/* Read the description out of a file or a folder; fills l->m but for the weights. */
kv_status kv_open_gguf(kv_loader *l, const char *path);
kv_status kv_open_hf(kv_loader *l, const char *folder);

#endif
