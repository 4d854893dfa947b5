/* engine_cpu.h - inside the CPU engine: its buffers, and the row operations its files share. */
#ifndef KV_ENGINE_CPU_H
#define KV_ENGINE_CPU_H

#include "capture/engine.h"

#define KV_CPU_ROWS 512u /* rows projected at a time */
#define KV_CPU_ATT  256u /* query rows of one attention task */

typedef struct {
    kv_engine base;
    const kv_model *m;
    kv_engine_options o;
    int bits;        /* rounding, as kernels name it */
    uint32_t n_past; /* rows in the cache */
    float **k, **v;  /* [n_layer] of [kv_heads][capacity][head_dim]; NULL in an engine without a cache */
    float *bk, *bv;  /* [kv_heads][rows][head_dim]: rows of branches, of one layer */
    uint32_t branch_rows;
    uint32_t rows;     /* rows the buffers below hold */
    float *x;          /* [rows][hidden] residual stream */
    float *q;          /* [q_heads][rows][head_dim] */
    float *out;        /* [rows][q_heads*head_dim] */
    float *lse, *stat; /* [q_heads][rows], [q_heads][rows][4] */
    float *x_norm;     /* [rows] */
    float *block;      /* [KV_CPU_ROWS][kv_cpu_block_width] */
    float *rot[2];     /* of each rope: [rows][rope_dim] cos, then sin of each row's angles */
    float *logits;     /* [logit rows][n_vocab] */
    uint32_t logit_rows;
    size_t *overflow; /* [q_heads + 2*kv_heads] values lost to rounding, by projection head */
    bool *failed;     /* [tasks] out of memory in a kernel */
    size_t n_failed;
} cpu_engine;

kv_status kv_cpu_no_memory(kv_error *err);
/* Floats of `block` a row needs. */
size_t kv_cpu_block_width(const kv_model_desc *d);
/* c [rows][n_out] at stride ldc = x [rows][w.cols] times w^T. */
bool kv_cpu_times(const cpu_engine *e, size_t rows, const float *x, const kv_tensor *w, float *c, size_t ldc);

/* Over rows of `width`, in parallel blocks; in and out may be the same. */
void kv_cpu_norm(const cpu_engine *e, size_t n_row, size_t width, const float *in, kv_norm w, float *out);
/* to += factor * from */
void kv_cpu_add(const cpu_engine *e, size_t n_row, size_t width, const float *from, float factor, float *to);
/* x += bias in every row; bias NULL: nothing */
void kv_cpu_bias(const cpu_engine *e, size_t n_row, size_t width, const float *bias, float *x);
/* gate = act(gate) * up, up NULL: 1 */
void kv_cpu_activate(const cpu_engine *e, size_t n_row, size_t width, float *gate, const float *up);
/* out[r] = L2 norm of row r */
void kv_cpu_lengths(const cpu_engine *e, size_t n_row, size_t width, const float *in, float *out);

/* out [n][hidden] = ffn(in [n][hidden]) of a layer, without norms. `room`: n x (hidden + 2 ffn), and n x 2 (hidden +
 * n_expert) more for a mixture of experts. */
kv_status kv_cpu_ffn(const cpu_engine *e, const kv_layer_weights *w, uint32_t n, const float *in, float *out,
                     float *room, kv_error *err);

/* One layer for n rows, with the hook around its attention. branches = 0: they are the rows from position row0 on and
 * follow the cache. Else they belong to as many branches behind position row0 - 1 (engine.h: kv_engine_branches). */
kv_status kv_cpu_layer(cpu_engine *e, uint32_t layer, uint32_t row0, uint32_t n, uint32_t branches,
                       const kv_engine_hook *hook, kv_error *err);
/* A buffer of n x width floats in place of *p. */
kv_status kv_cpu_renew(float **p, size_t n, size_t width, kv_error *err);

#endif
