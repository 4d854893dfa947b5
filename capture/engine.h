/* engine.h - run a model layer by layer, with a place to stand around attention.
 *
 * The engine runs all rows of a call through layer 0, then layer 1, ... (teacher forcing: the whole sequence in one
 * call; greedy: the prompt, then one row a call). It keeps K and V of every row for later calls. Around each layer's
 * attention it offers a hook: capture hangs a recorder there, the closed loop hangs a kept set. Q, K and V are rounded
 * to the engine's dtype before attention consumes them, so what a hook sees is exactly what was used. */
#ifndef KV_ENGINE_H
#define KV_ENGINE_H

#include "capture/model.h"
#include "traces/trace.h"

/* What happened in one layer's attention. Pointers are valid during the call only. */
typedef struct {
    uint32_t layer;
    uint32_t row0, n_row; /* rows of this call are positions row0 .. row0+n_row-1 */
    uint32_t n_key;       /* row0 + n_row */
    const float *q;       /* [q_heads][n_row][head_dim], after RoPE, rounded */
    const float *k, *v;   /* [kv_heads][kv_stride][head_dim], positions 0..n_key-1 valid */
    size_t kv_stride;     /* tokens between two heads of k and v */
    const float *x_norm;  /* [n_row] L2 norm of the residual stream entering the block */
    const float *x;       /* [n_row][hidden] that stream */
    float *out;           /* [n_row][q_heads*head_dim] attention output before W_O */
    const float *lse;     /* [q_heads][n_row]; NULL in `attend` */
    const float *stat;    /* [q_heads][n_row][4] when want() asked for it, else NULL */
    /* Not NULL: the arrays above are on a device and their pointers NULL. This hands out, as blocks of a trace, rows of
     * q, k, v in the engine's dtype; lse, rowstat, xnorm, colsum and colsum_ctx as f32 (those that want() asked for);
     * rows of map and map_window as f16; w_o of the layer in the engine's dtype. Valid until the next layer's record()
     * returns; copies begun go on. */
    const kv_trace_source *device;
} kv_attn_view;

enum { KV_WANT_STAT = 1, KV_WANT_SUMS = 2 };

typedef struct {
    void *ctx;
    /* What this hook needs of a layer beyond q, k, v, lse (KV_WANT_*). NULL = nothing. Engines whose views are in
     * memory leave column sums to the hook. */
    unsigned (*want)(void *ctx, uint32_t layer);
    uint32_t n_prompt, n_context; /* cut points of KV_WANT_SUMS: sums over rows 0..n_prompt-1, 0..n_context-1 */
    /* In place of the engine's attention: fill a->out and set *done; leave *done false for the usual attention. NULL =
     * never. */
    kv_status (*attend)(void *ctx, const kv_attn_view *a, bool *done, kv_error *err);
    /* After attention. NULL = nothing to record. */
    kv_status (*record)(void *ctx, const kv_attn_view *a, kv_error *err);
    /* Logits of rows row0..row0+n_row-1 of the sequence, [n_row][n_vocab], in blocks of ascending rows. NULL = only
     * what kv_engine_run returns. */
    kv_status (*logits)(void *ctx, uint32_t row0, uint32_t n_row, const float *logits, kv_error *err);
    /* Both or none. An engine that can may call nll() in place of logits() for rows of a call that wants_logits() says
     * no to and whose next token is in the call too: their -ln p(next token). Rows still come in ascending order. */
    bool (*wants_logits)(void *ctx, uint32_t row);
    kv_status (*nll)(void *ctx, uint32_t row0, uint32_t n_row, const float *nll, kv_error *err);
} kv_engine_hook;

typedef struct {
    kv_dtype dtype;    /* f32, f16, bf16: rounding of Q, K, V */
    uint32_t threads;  /* results do not depend on it */
    uint32_t capacity; /* tokens the cache must hold: the longest sequence */
    bool no_cache;     /* only kv_engine_branches will be called: no cache is allocated */
    uint32_t gpus;     /* CUDA: devices that share the layers, 0 = one; results do not depend on it */
    uint32_t chunk;    /* CUDA: rows computed at a time, 0 = 4096; the last bits may depend on it */
} kv_engine_options;

/* What the rows of branches see of a layer's prompt (kv_engine_compare). Head h of branch b sees the positions
 * list[first[i]] .. list[first[i] + count[i] - 1], i = b * q_heads + h, or all of them where first[i] is UINT32_MAX. */
typedef struct {
    const float *k, *v; /* [kv_heads][stride][head_dim], positions 0..row0-1, rounded to the engine's dtype */
    size_t stride;
    const uint32_t *list, *first, *count; /* [n_list], [n_branch][q_heads] twice */
    size_t n_list;
} kv_branch_prompt;

/* How branches differ from branch 0, the full cache. Arrays of the caller. */
typedef struct {
    float *nll;           /* [n] of branch 0: -ln p(target) */
    float *loss;          /* [n_branch][n][4] nll - nll of branch 0, KL(0 || b), same most likely token, share of the
                             five most likely that are the same; of branch 0 not set */
    float *head, *stream; /* [n_layer][n_branch][n] ||o - o_b|| / ||o||, mean over query heads, of attention before W_O;
                             the same of the residual stream entering the layer */
} kv_branch_losses;

/* Where an engine's time and memory went. */
typedef struct {
    const char *backend; /* "cpu", "cuda" */
    char device[64];     /* "NVIDIA H200", "" */
    uint32_t n_device;
    double compute_s, copy_s;           /* busy seconds on the device; 0 on the CPU */
    uint64_t weight_bytes, cache_bytes; /* of all devices together, as the next */
    uint64_t device_bytes;              /* most that this engine held, weights and cache included */
    uint64_t device_used;               /* what the driver said was in use, by everybody, after the run */
} kv_engine_usage;

/* prompt(): once a layer, in order; the arrays are read before the next call. */
typedef struct {
    void *ctx;
    kv_status (*prompt)(void *ctx, uint32_t layer, kv_branch_prompt *out, kv_error *err);
} kv_branch_source;

/* An engine is one of several implementations: its struct begins with a kv_engine, whose table the functions below
 * call. */
typedef struct kv_engine kv_engine;
typedef struct {
    kv_status (*run)(kv_engine *e, const uint32_t *token, uint32_t n, const kv_engine_hook *hook, float *last_logits,
                     kv_error *err);
    void (*reset)(kv_engine *e);
    void (*close)(kv_engine *e);
    kv_status (*branches)(kv_engine *e, const uint32_t *token, uint32_t row0, uint32_t n, uint32_t n_branch,
                          const kv_engine_hook *hook, kv_error *err);    /* NULL: not in this backend */
    kv_status (*resize)(kv_engine *e, uint32_t capacity, kv_error *err); /* the rest may be NULL */
    kv_status (*compare)(kv_engine *e, const uint32_t *token, const uint32_t *target, uint32_t row0, uint32_t n,
                         uint32_t n_branch, const kv_branch_source *source, kv_branch_losses *out, kv_error *err);
    uint32_t (*compare_room)(kv_engine *e, uint32_t row0, uint32_t n);
    kv_engine_usage (*usage)(const kv_engine *e);
    bool (*memory)(const kv_engine *e, kv_trace_memory *out);
} kv_engine_ops;
struct kv_engine {
    const kv_engine_ops *ops;
};

/* Backends. The model is borrowed and must outlive the engine; the CPU needs KV_WEIGHTS_F32. KV_ENOMEM before anything
 * is run when the cache does not fit. */
kv_status kv_engine_open_cpu(const kv_model *m, const kv_engine_options *o, kv_engine **out, kv_error *err);
/* Computes in the dtype: products of bf16 or f16 with f32 sums, or all in f32. Takes KV_WEIGHTS_STORED (or F32):
 * weights are expanded on their way to the device. Of the hook, attend() is refused, and views are on the device.
 * KV_EUNSUPPORTED without a device or for a step it does not have; KV_EIO when the device fails, and then the engine
 * can only be closed. Same input and same kind of device, same bytes, whatever `gpus`. */
kv_status kv_engine_open_cuda(const kv_model *m, const kv_engine_options *o, kv_engine **out, kv_error *err);

/* Run n more tokens. last_logits NULL or [n_vocab]: logits of the last row. KV_EINTERRUPTED between two layers when a
 * signal came; KV_EUNSUPPORTED when rounding to the dtype overflowed (names layer and tensor). */
kv_status kv_engine_run(kv_engine *e, const uint32_t *token, uint32_t n, const kv_engine_hook *hook, float *last_logits,
                        kv_error *err);
/* Run n tokens, at positions row0 .. row0+n-1, in each of n_branch sequences that do not see each other, sharing every
 * weight load: row r * n_branch + b is token r of branch b, and token [n][n_branch] lies in that order. The engine's
 * cache is neither read nor written; attention is the hook's alone, which must attend in every layer: view.k and view.v
 * hold the branches' own rows (kv_stride = n * n_branch, in the same order), view.row0 = row0, view.n_key = row0 + n,
 * view.n_row = n * n_branch, what comes before row0 the hook knows. logits(): as in kv_engine_run, its row0 counting
 * these rows from 0. KV_EMISUSE when the hook leaves a layer undone; KV_EUNSUPPORTED where the backend has no branches.
 */
kv_status kv_engine_branches(kv_engine *e, const uint32_t *token, uint32_t row0, uint32_t n, uint32_t n_branch,
                             const kv_engine_hook *hook, kv_error *err);
/* Branches that are compared where they are computed: the same n tokens at positions row0 .. row0+n-1 in each of
 * n_branch sequences, behind what its heads see of the prompt; branch 0 is the reference of the others. target [n]: the
 * next tokens. The engine must have been opened with no_cache. A branch's numbers do not depend on the others.
 * KV_EUNSUPPORTED where the backend has no such pass; KV_ENOMEM when so many branches do not fit. */
kv_status kv_engine_compare(kv_engine *e, const uint32_t *token, const uint32_t *target, uint32_t row0, uint32_t n,
                            uint32_t n_branch, const kv_branch_source *source, kv_branch_losses *out, kv_error *err);
/* Branches of n rows behind row0 positions that such a call has memory for: a guess, at least 2. */
uint32_t kv_engine_compare_room(kv_engine *e, uint32_t row0, uint32_t n);
void kv_engine_reset(kv_engine *e); /* forget all rows */
/* Forget all rows and make room for at least `capacity`. KV_EUNSUPPORTED: open another engine. */
kv_status kv_engine_resize(kv_engine *e, uint32_t capacity, kv_error *err);
kv_engine_usage kv_engine_get_usage(const kv_engine *e);
/* The memory that copies from this engine are fastest to; false: any. */
bool kv_engine_memory(const kv_engine *e, kv_trace_memory *out);
void kv_engine_close(kv_engine *e); /* NULL accepted */
/* -ln p(target[r] | row r) for rows of logits [n_row][n_vocab], in double log-sum-exp. */
void kv_nll_rows(uint32_t n_row, uint32_t n_vocab, const float *logits, const uint32_t *target, float *nll);

#endif
