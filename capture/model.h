/* model.h - a model as data: a description that says everything the forward pass needs, and the weights, whatever the
 * container they came in.
 *
 * One forward pass serves every architecture; a step whose weight is absent is left out. x [rows][hidden]:
 *
 *   x = tok_embd[token] * embed_scale                (+ pos_embd[position])
 *   each layer l:
 *     h = norm(x, attn_norm)                         h = x without attn_norm (olmo2)
 *     q, k, v = h wq^T + bq, h wk^T + bk, h wv^T + bv
 *     q, k = norm(q, q_norm), norm(k, k_norm)        by qk_norm: over each head, or over all heads at once
 *     q, k rotated by rope[layer_rope[l]]            pairs (i, i + rope_dim/2); n_rope = 0: none
 *     s = scale * q.k;  s = softcap * tanh(s / softcap) when softcap > 0;  j <= i, and i - j < window[l] when > 0
 *     o = (softmax(s) v) wo^T + bo;  o = norm(o, post_attn_norm)
 *     parallel:  x = x + o + ffn(norm(x, ffn_norm))
 *     else:      x = x + residual_scale * o;  f = ffn(norm(x, ffn_norm));  f = norm(f, post_ffn_norm)
 *                x = x + residual_scale * f
 *   logits = norm(x, out_norm) output^T * logit_scale;  z = final_softcap * tanh(z / final_softcap) when > 0
 *
 *   ffn(h) = (act(h gate^T + b_gate) * (h up^T + b_up)) down^T + b_down      gated
 *            act(h up^T + b_up) down^T + b_down                              not gated
 *   with n_expert > 0: p = softmax(h router^T), E = the n_expert_used largest (ties: lower number),
 *            ffn(h) = sum over E, in the order of their numbers, of p_e ffn_e(h), p divided by its sum over E when
 *            expert_norm
 *
 * Matrices are [out][in] = [rows][cols], whatever the file's order: fused tensors are cut into their parts, transposed
 * ones turned, the row permutation of GGUF `llama` files undone, norm weights stored as w - 1 made w. Heads are in the
 * half-split layout. Everything is validated before it is used; a loaded model can be run without checks. */
#ifndef KV_MODEL_H
#define KV_MODEL_H

#include "kernels/quant.h"
#include "traces/base.h"

typedef enum { KV_NORM_RMS, KV_NORM_LAYER } kv_norm_kind;                     /* LAYER: mean subtracted, with bias */
typedef enum { KV_QK_NORM_NONE, KV_QK_NORM_HEAD, KV_QK_NORM_ALL } kv_qk_norm; /* weights [head_dim]; [heads*head_dim] */
typedef enum {
    KV_ACT_SILU,      /* x / (1 + exp(-x)) */
    KV_ACT_GELU_TANH, /* x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) */
    KV_ACT_GELU,      /* x/2 (1 + erf(x / sqrt 2)) */
    KV_ACT_COUNT
} kv_act;

/* One table of rotation frequencies, every scaling (linear, llama3, YaRN, longrope) applied. */
typedef struct {
    float theta;         /* base, for display */
    float mscale;        /* factor on cos and sin: YaRN, longrope; 1 when there is none */
    float *inv_freq;     /* [rope_dim/2] */
    float *inv_freq_far; /* [rope_dim/2] in place of inv_freq for runs of more than n_near tokens (longrope), or NULL */
    uint32_t n_near;
} kv_rope_freqs;

typedef struct {
    char *name, *arch;  /* the file's or folder's name without .gguf; "llama", "gemma3", ... as GGUF names it */
    char *file, *quant; /* base name of the file; "Q4_1 x 210, F32 x 61, ..." */
    char sha256[65];    /* of the model file(s); empty until kv_model_hash */
    uint32_t n_layer, n_q_head, n_kv_head, head_dim, hidden, n_vocab, n_ctx;
    uint32_t ffn;                     /* inner width of the feed-forward; of one expert */
    uint32_t n_expert, n_expert_used; /* 0 = dense */
    bool expert_norm;
    kv_norm_kind norm;
    float norm_eps;
    kv_qk_norm qk_norm;
    kv_act act;
    bool gated, parallel;
    bool post_norm;    /* there are post_attn_norm and post_ffn_norm */
    uint32_t rope_dim; /* rotated elements of a head, even; 0 = no rotation */
    uint32_t n_rope;   /* 0, 1 or 2 */
    kv_rope_freqs rope[2];
    uint8_t *layer_rope;  /* [n_layer] which rope */
    uint32_t *window;     /* [n_layer] 0 = full attention */
    float scale, softcap; /* softcap 0 = none */
    float embed_scale;    /* 1 = none, as for the next two */
    float residual_scale;
    float logit_scale;
    float final_softcap; /* 0 = none */
    bool tied;           /* output is tok_embd */
    uint64_t n_params;
} kv_model_desc;

/* A weight matrix: as floats (KV_WEIGHTS_F32) or where its stored blocks are (both kinds). rows = 0: absent. */
typedef struct {
    uint32_t rows, cols;
    float *f32;           /* [rows][cols], 64-byte aligned; NULL when the model was opened with KV_WEIGHTS_STORED */
    const kv_quant *type; /* of the stored elements; NULL when there is no file behind the model */
    size_t row_bytes;     /* of cols elements as stored */
    /* Row r of this matrix is row first + r / group * stride + within(r % group) of the stored tensor, `within` the
     * RoPE order of pairs when `paired`, else the identity; `turned`: it is a column. For kv_tensor_read only. */
    uint32_t stored; /* number of the tensor in the model's file(s) */
    uint32_t first, group, stride;
    bool paired, turned;
    /* A synthetic model (capture/synthetic.h) has no file: element i is kv_random_weight(seed, i, random). */
    float random; /* 0: the tensor is in a file */
    uint64_t seed;
} kv_tensor;

/* Norm weights. w NULL: there is no such norm; b NULL: no bias. */
typedef struct {
    float *w, *b;
} kv_norm;

typedef struct {
    kv_tensor gate, up, down;      /* [ffn][hidden] x 2, [hidden][ffn] */
    float *b_gate, *b_up, *b_down; /* or NULL */
} kv_ffn;

typedef struct {
    kv_norm attn_norm, q_norm, k_norm, post_attn_norm, ffn_norm, post_ffn_norm;
    kv_tensor wq, wk, wv;     /* [heads*head_dim][hidden] */
    kv_tensor wo;             /* [hidden][q_heads*head_dim] */
    float *bq, *bk, *bv, *bo; /* or NULL */
    kv_tensor router;         /* [n_expert][hidden]; absent when dense */
    kv_ffn *ffn;              /* [n_expert], or one when dense */
} kv_layer_weights;

typedef struct kv_tokenizer kv_tokenizer; /* capture/tokenizer.h */
typedef struct kv_store kv_store;         /* capture/store.h: the open file(s) */

typedef struct {
    kv_model_desc desc;
    kv_tensor tok_embd; /* [n_vocab][hidden] */
    kv_tensor pos_embd; /* [n_ctx][hidden], gpt2 */
    kv_norm out_norm;   /* [hidden] */
    kv_tensor output;   /* [n_vocab][hidden]; the same as tok_embd when tied */
    kv_layer_weights *layer;
    kv_tokenizer *tok; /* NULL when the file has no vocabulary this program can use (then --tokens is needed) */
    char no_tok[200];  /* why tok is NULL: "vocabularies of the kind 'bert' (tokenizer.ggml.model) are not ..." */
    /* private */
    kv_store *store;
    float *arena; /* every float above */
    kv_ffn *ffns;
} kv_model;

typedef enum {
    KV_WEIGHTS_NONE,   /* description and vocabulary only (info, tokenize, --dry-run): no weight memory */
    KV_WEIGHTS_F32,    /* matrices expanded to f32, all values checked to be finite */
    KV_WEIGHTS_STORED, /* matrices stay in the file(s), read with kv_tensor_read; norms and biases are f32 as ever.
                        * The reader of the blocks checks their values */
} kv_weights;

/* path: a GGUF file (any part of a split one), a folder with config.json and safetensors, or synthetic:NAME. `threads`
 * expand side by side. */
kv_status kv_model_open(const char *path, kv_weights weights, uint32_t threads, kv_model **out, kv_error *err);
/* Fills desc.sha256: of the one file; of several, the hash over their hashes in order. */
kv_status kv_model_hash(kv_model *m, kv_error *err);
void kv_model_close(kv_model *m);
/* Of the model's vocabulary, for those who only read tokens: the end token (UINT32_MAX: none), and the bytes of a token
 * (not zero-terminated, owned by the model; NULL without a vocabulary). */
uint32_t kv_model_eos(const kv_model *m);
const char *kv_model_token_bytes(const kv_model *m, uint32_t id, size_t *n);

/* Rows row .. row+n-1 of a matrix in this header's order, into dst: as stored blocks (n * row_bytes bytes; what a GPU
 * uploads), or as floats, checked to be finite. Any number of threads at once. The second works for every model, the
 * first for those that have a file. */
kv_status kv_tensor_read(const kv_model *m, const kv_tensor *t, uint32_t row, uint32_t n, void *dst, kv_error *err);
kv_status kv_tensor_floats(const kv_model *m, const kv_tensor *t, uint32_t row, uint32_t n, float *dst, kv_error *err);

/* The frequencies a run of n_token tokens in all is to use, [rope_dim/2]. */
static inline const float *kv_rope_of_run(const kv_rope_freqs *r, uint32_t n_token)
{
    return r->inv_freq_far && n_token > r->n_near ? r->inv_freq_far : r->inv_freq;
}

/* The rotation of the layers with full attention, which are the ones policies evict from; NULL when nothing rotates. */
const kv_rope_freqs *kv_model_rope(const kv_model_desc *d);

#endif
