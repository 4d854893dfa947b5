/* cuda_engine.h - the insides of the CUDA engine, for the capture/cuda_*.c files only.
 *
 *   cuda_weights.c  weights on their way to the devices
 *   cuda_forward.c  one layer of one chunk of rows, the logits
 *   cuda_fetch.c    what a recorder asks for on its way back: pack stream -> staging -> copy stream -> the writer's
 * ring cuda_engine.c   open, run, close; which layer runs where and when
 *   cuda_branches.c the closed loop's pass: many branches behind one prompt
 *
 * Memory of a device, for r rows of a call and chunks of CHUNK rows:
 *   weights of its layers          16 bits each (f32 in f32 runs)
 *   K and V of its layers          [kv_heads][capacity][head_dim], in the run's dtype
 *   x [r][hidden] f32              the residual stream
 *   two slots                      q [q_heads][r][head_dim], lse, statistics, column sums of a layer: one is recorded
 *                                  while the next layer fills the other
 *   work                           one chunk's projections, then its feed-forward; blocks of logits
 *
 * All rows of a call pass through a layer before the next one begins, so a layer is recorded while the next one runs.
 */
#ifndef KV_CUDA_ENGINE_H
#define KV_CUDA_ENGINE_H

#include "capture/engine.h"
#include "kernels/cuda.h"
#include "kernels/gpu.h"

#define KV_CUDA_CHUNK  4096u /* rows at a time: fixed, so that the bytes do not depend on the memory that is free */
#define KV_CUDA_STAGES 4u
#define KV_CUDA_LOGITS 512u /* rows of logits at a time */

typedef struct {
    void *gate_up, *down; /* [2 ffn][hidden] or, not gated, [ffn][hidden]; [hidden][ffn] */
    float *b_gate, *b_up, *b_down;
} kv_cuda_ffn;

typedef struct {
    float *w, *b; /* w NULL: no such norm */
} kv_cuda_norm;

typedef struct {
    kv_cuda_norm attn_norm, q_norm, k_norm, post_attn_norm, ffn_norm, post_ffn_norm;
    void *qkv, *wo; /* [(q_heads + 2 kv_heads) head_dim][hidden], [hidden][q_heads head_dim] */
    float *bq, *bk, *bv, *bo;
    void *router;
    kv_cuda_ffn *ffn; /* [max(1, n_expert)] */
    void *k, *v;      /* the cache */
} kv_cuda_layer;

/* What is wrong with a layer, on the device and in page-locked memory. */
enum { KV_HEALTH_X, KV_HEALTH_LSE, KV_HEALTH_OVER }; /* not finite, not finite, then values lost by projection head */

/* What one layer leaves for the recorder. */
typedef struct {
    uint32_t layer;
    void *q;        /* [q_heads][n_row][head_dim] */
    float *lse;     /* [q_heads][n_row] */
    float *stat;    /* [q_heads][n_row][4] or NULL */
    float *x_norm;  /* [n_row] */
    double *sum;    /* [q_heads][n_prompt] or NULL */
    float *sum_ctx; /* [q_heads][n_context] or NULL */
    uint32_t *health, *health_host;
    kv_gpu_event begun, done, fetched; /* fetched: the recorder needs the slot no more */
} kv_cuda_slot;

typedef struct {
    void *room; /* packed bytes */
    size_t bytes;
    kv_gpu_event packed, copied;
} kv_cuda_stage;

/* One copy to the host, timed. */
typedef struct {
    kv_gpu_event begun, done;
    int device;
} kv_cuda_ticket;

/* What the branches see of one layer's prompt. */
typedef struct {
    void *k, *v; /* [kv_heads][row0][head_dim] */
    uint32_t *list, *first, *count;
    size_t list_bytes;
    kv_gpu_event ready, used;
} kv_cuda_prompt;

/* What a comparison of branches holds beside x, h and work: room for branches of n rows behind row0 positions. */
typedef struct {
    uint32_t n, n_branch, row0;
    kv_cuda_prompt prompt[2]; /* of this layer and the next */
    float *wide;              /* keys or values on their way */
    void *q, *k, *v;          /* [heads][chunk][head_dim] */
    float *lse;               /* [q_heads][chunk] */
    void *base;               /* [n][q_heads * head_dim] what attention gives the full cache */
    float *x_norm;            /* [rows] */
    uint32_t *health;         /* [n_layer] of what a slot has */
    uint32_t *target;         /* [n] */
    float *logits;            /* [n][n_vocab] of the full cache */
    kv_logit_row *said;       /* [n] */
    float *loss;              /* [n_branch][n][4] */
    float *head, *stream;     /* [n_layer][n_branch][n] */
} kv_cuda_compare;

/* Device memory that is freed together. */
typedef struct {
    void **block;
    size_t n, cap, bytes;
} kv_cuda_arena;

typedef struct {
    int id;
    uint32_t first, end;          /* layers */
    kv_cuda_arena weights, rooms; /* rooms: what depends on the number of tokens */
    kv_gpu_stream run, pack, copy;
    kv_gpu_blas *blas;
    kv_gpu_event logits_begun, logits_done;
    kv_gpu_event handed;                /* x has been copied to the next device */
    void *tok_embd, *pos_embd, *output; /* where it has the first or last layer */
    kv_cuda_norm out_norm;
    float *residual;    /* desc.residual_scale */
    float *inv_freq[2]; /* [rope_dim/2] */
    float *rope[2];     /* [rows][rope_dim] of the call's rows */
    uint32_t *token;    /* [rows] */
    float *x;           /* [rows][hidden] */
    float *tmp;         /* [chunk][hidden], for architectures that need it */
    float *expert;      /* [chunk][n_expert] router weights */
    void *h;            /* [chunk][hidden] */
    void *work;         /* see kv_cuda_work_bytes */
    void *scratch;      /* of kv_decode_dev */
    float *nll;         /* [rows] losses */
    size_t work_bytes;
    kv_cuda_slot slot[2];
    kv_cuda_stage stage[KV_CUDA_STAGES];
    uint32_t next_stage;
    void *map; /* rows of an attention map before they are packed */
    size_t map_bytes, stage_bytes;
} kv_cuda_gpu;

typedef struct {
    kv_engine base;
    const kv_model *m;
    kv_engine_options o;
    int bits;    /* of weights, activations and cache */
    size_t size; /* bytes of such an element */
    uint32_t n_past, chunk;
    kv_cuda_gpu *dev; /* [n_dev] */
    uint32_t n_dev;
    kv_cuda_layer *layer; /* [n_layer] */
    kv_trace_source source;
    kv_cuda_compare compare; /* on the first device */
    kv_cuda_slot *at;        /* of the layer that is being recorded */
    uint32_t call_rows, n_prompt, n_context;
    uint32_t losses_begun; /* rows of this call whose losses are queued */
    bool stat, sums;       /* of this call */
    bool stat_room, sum_room, context_room;
    struct kv_cuda_tickets *tickets;
    double compute_s;
    float *logits_host, *nll_host; /* page-locked */
    uint32_t logits_host_rows;
    size_t used_bytes; /* of all devices, by everybody, when it was looked at last */
} kv_cuda;

static inline kv_cuda_gpu *kv_cuda_at_layer(kv_cuda *e, uint32_t layer)
{
    uint32_t i = 0;
    while (layer >= e->dev[i].end) i++;
    return &e->dev[i];
}

/* n bytes of the selected device, which is v; `what` goes into the message. */
kv_status kv_cuda_room(kv_cuda_gpu *v, kv_cuda_arena *a, size_t n, const char *what, void *out, kv_error *err);
/* A CUDA error as a status and a message: what failed, where. KV_OK for 0. */
kv_status kv_cuda_check(const kv_cuda_gpu *v, int code, const char *what, kv_error *err);

kv_status kv_cuda_load(kv_cuda *e, kv_error *err);

void kv_cuda_free_arena(kv_cuda_arena *a);
/* At least n bytes at *p, of the selected device, which is v; what lay there is lost. A CUDA error code. */
int kv_cuda_need(kv_cuda_gpu *v, void **p, size_t *have, size_t n);
/* What the host has of a slot's health says that something is wrong. */
kv_status kv_cuda_health(const kv_cuda *e, const kv_cuda_slot *s, kv_error *err);
/* Does this architecture pass products through `tmp`? */
bool kv_cuda_needs_tmp(const kv_model *m);

/* Where the projections of some rows go: from head to head q_head, kv_head elements. */
typedef struct {
    uint32_t first; /* their row in the table of angles */
    void *q, *k, *v;
    size_t q_head, kv_head;
    uint32_t *health;
} kv_cuda_qkv;
/* The two halves of a layer around attention, for n rows of x: up to q, k, v; from what attention left at
 * kv_cuda_attended(n) on. Return a CUDA error code. */
int kv_cuda_before(kv_cuda *e, kv_cuda_gpu *v, uint32_t layer, uint32_t n, const float *x, float *x_norm,
                   const kv_cuda_qkv *to);
void *kv_cuda_attended(const kv_cuda *e, const kv_cuda_gpu *v, uint32_t n); /* [n][q_heads * head_dim] */
int kv_cuda_after(kv_cuda *e, kv_cuda_gpu *v, uint32_t layer, uint32_t n, float *x);
/* Logits of rows first.. of v->x; most at a time: kv_cuda_logit_step. */
int kv_cuda_logit_rows(kv_cuda *e, kv_cuda_gpu *v, uint32_t first, uint32_t n, float *logits);
uint32_t kv_cuda_logit_step(const kv_cuda *e, const kv_cuda_gpu *v);

/* Rows first..first+n-1 of the call through the layer; return a CUDA error code. */
int kv_cuda_layer_rows(kv_cuda *e, kv_cuda_gpu *v, uint32_t layer, kv_cuda_slot *s, uint32_t first, uint32_t n);
int kv_cuda_column_sums(kv_cuda *e, kv_cuda_gpu *v, uint32_t layer, kv_cuda_slot *s);
/* Bytes of `work` for a chunk of n rows. */
size_t kv_cuda_work_bytes(const kv_cuda *e, uint32_t n);
/* Queue the losses with which a call begins; then all that is wanted, in order. */
int kv_cuda_begin_losses(kv_cuda *e, const kv_engine_hook *hook);
kv_status kv_cuda_logits(kv_cuda *e, const kv_engine_hook *hook, float *last, kv_error *err);

/* Of kv_engine_compare and kv_engine_compare_room. */
kv_status kv_cuda_compare_run(kv_engine *e, const uint32_t *token, const uint32_t *target, uint32_t row0, uint32_t n,
                              uint32_t n_branch, const kv_branch_source *source, kv_branch_losses *out, kv_error *err);
uint32_t kv_cuda_compare_room(kv_engine *e, uint32_t row0, uint32_t n);

kv_status kv_cuda_fetch_open(kv_cuda *e, kv_error *err);
void kv_cuda_fetch_close(kv_cuda *e);
kv_trace_source kv_cuda_source(kv_cuda *e);
double kv_cuda_copy_seconds(kv_cuda *e);
void kv_cuda_copy_restart(kv_cuda *e); /* count from 0 */

#endif
