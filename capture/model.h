/* model.h - a model file as a description and float weights, whatever its container.
 *
 * Weights are expanded to f32 at load, rows [out][in], heads in the half-split layout (the row permutation of GGUF
 * `llama` files is undone). Everything is validated before it is used; a loaded model can be run without checks. */
#ifndef KV_MODEL_H
#define KV_MODEL_H

#include "traces/base.h"

typedef struct {
    char *name, *arch;  /* the file's name without .gguf; general.architecture */
    char *file, *quant; /* base name of the file; "Q4_1 x 210, F32 x 61, ..." */
    char sha256[65];    /* of the model file; empty until kv_model_hash */
    uint32_t n_layer, n_q_head, n_kv_head, head_dim, hidden, ffn, n_vocab, n_ctx;
    float norm_eps;
    float rope_theta, rope_mscale;
    uint32_t rope_dim;                   /* rotated elements of a head */
    float *inv_freq;                     /* [rope_dim/2] effective, scaling applied */
    float scale, softcap, final_softcap; /* softcap 0 = none */
    uint32_t *window;                    /* [n_layer] 0 = full attention */
    bool tied;                           /* output.weight is token_embd.weight */
    uint64_t n_params;
} kv_model_desc;

typedef struct {
    float *attn_norm, *ffn_norm;   /* [hidden] */
    float *wq, *wk, *wv;           /* [heads*head_dim][hidden] */
    float *bq, *bk, *bv, *bo;      /* or NULL */
    float *wo;                     /* [hidden][q_heads*head_dim] */
    float *w_gate, *w_up, *w_down; /* [ffn][hidden] x 2, [hidden][ffn] */
} kv_layer_weights;

typedef struct kv_tokenizer kv_tokenizer; /* capture/tokenizer.h */

typedef struct {
    kv_model_desc desc;
    float *tok_embd; /* [n_vocab][hidden] */
    float *out_norm; /* [hidden] */
    float *output;   /* [n_vocab][hidden]; == tok_embd when tied */
    kv_layer_weights *layer;
    kv_tokenizer *tok; /* NULL when the file has no vocabulary this program can use (then --tokens is needed) */
    char no_tok[200];  /* why tok is NULL: "vocabularies of the kind 'bert' (tokenizer.ggml.model) are not ..." */
} kv_model;

/* weights = false reads description and vocabulary only (info, tokenize, --dry-run): no weight memory. `threads` expand
 * quantised tensors side by side. */
kv_status kv_model_open(const char *path, bool weights, uint32_t threads, kv_model **out, kv_error *err);
kv_status kv_model_hash(kv_model *m, const char *path, kv_error *err); /* fills desc.sha256 */
void kv_model_close(kv_model *m);

#endif
