/* cuda.h - the kernels of the CUDA engine: device pointers, a stream, no allocation, no synchronisation.
 *
 * kv_NAME_dev launches on `stream` and returns 0 or a CUDA error code (refused arguments are cudaErrorInvalidValue =
 * 1); errors of the device itself appear at the caller's next synchronisation. Every function may be captured in a CUDA
 * graph. There are no atomics on floats: the same arguments on the same kind of GPU give the same bytes, and the bytes
 * of a head or a row do not depend on which heads or rows came with it, except where a comment says otherwise.
 * The definitions are the _ref functions of kernels.h (CLOSE); kernels/table.c checks each kernel against them.
 *
 * `bits` names an element type as in kernels.h: 32 = f32, 16 = f16, 17 = bf16. Strides count elements. Head h of a
 * query reads KV head h / (n_q_head / n_kv_head). Pointers of 16-bit arrays and their strides should be multiples of 16
 * bytes; where they are not, or the head size is not a multiple of 8 or above 256, slower kernels without tensor cores
 * run. All sizes below 2^31.
 *
 * kernels/table_cuda.cu is the table of the checks, walked by tests/test_cuda.c. */
#ifndef KV_CUDA_H
#define KV_CUDA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st; /* cudaStream_t is a pointer to one: this header needs no CUDA headers */

/* One layer's attention over all heads. Rows sit at positions row0 .. row0+n_row-1 (a chunk of a prefill has row0 > 0);
 * row r sees key j when j <= row0 + r and (window == 0 or row0 + r - j < window), of n_key keys from position 0.
 * score = scale q.k, then softcap tanh(score / softcap) when softcap > 0. */
typedef struct {
    uint32_t n_q_head, n_kv_head, d;
    uint32_t n_row, n_key, row0, window;
    float scale, softcap;
    int bits;                 /* of q, k and v */
    int out_bits;             /* of out: bits or 32 */
    size_t q_head, q_row;     /* q: from head to head, from row to row */
    size_t kv_head, kv_token; /* k and v alike */
    size_t out_head, out_row; /* for [row][head * d]: d and n_q_head * d */
    size_t lse_head;          /* lse: from head to head (rows are adjacent); stat: 4 times this */
} kv_cuda_attn;

/* out, lse [head][row] (natural log), stat NULL or [head][row][4]: largest p, its column, entropy in nats, sum of p^2.
 * bits 16 and 17 use the tensor cores with f32 sums, and round p to the type before it meets v, as flash attention
 * does; bits 32 is plain f32. A row that sees no key: output 0, lse -infinity, stat 0. Near ties of the largest p may
 * name either column. For one row a sequence use kv_decode_dev. */
int kv_attention_dev(const kv_cuda_attn *a, const void *q, const void *k, const void *v, void *out, float *lse,
                     float *stat, struct CUstream_st *stream);

/* The same for branches: sequences that share a prompt, of which each head sees what its branch kept, and their own
 * rows behind it. Row r of branch b is row b * n_row + r of q, out and lse, and of own_k, own_v [KV head][all rows][d],
 * heads own_head apart; it sees rows 0..r of its branch. Of k and v, n_key rows of the prompt, query head h of branch b
 * sees the positions list[first[i]] .. list[first[i] + count[i] - 1], i = b * n_q_head + h; where first[i] is KV_WHOLE
 * all of them, and then the window counts. a: n_row = rows of one branch; row0 is not read. All arrays on the device.
 */
#define KV_WHOLE UINT32_MAX
typedef struct {
    uint32_t n_branch;
    const void *own_k, *own_v;
    size_t own_head;
    const uint32_t *list, *first, *count;
} kv_cuda_branches;
int kv_attention_branches_dev(const kv_cuda_attn *a, const kv_cuda_branches *b, const void *q, const void *k,
                              const void *v, void *out, float *lse, struct CUstream_st *stream);

/* acc[h][j] += sum of p[r][j] over the rows that see key j; acc [q_head] rows of n_key doubles at stride acc_head. Rows
 * are added in a fixed order, by tiles in f32 and across tiles in double. out_*, stat and v are not read. */
int kv_colsum_dev(const kv_cuda_attn *a, const void *q, const void *k, const float *lse, double *acc, size_t acc_head,
                  struct CUstream_st *stream);

/* The same attention for a few rows (decoding): keys are split over blocks and joined in a fixed order. The split, and
 * with it the last bits, depends on n_key, the heads and the device, not on the stream or what ran before. scratch: as
 * many bytes as kv_decode_scratch says for any n_key up to that of `a`. stat as above. */
size_t kv_decode_scratch(const kv_cuda_attn *a);
int kv_decode_dev(const kv_cuda_attn *a, const void *q, const void *k, const void *v, void *out, float *lse,
                  float *stat, void *scratch, struct CUstream_st *stream);

/* ---------------------------------------------------------------------------------------------- rows and elements */
/* x[r] = table[token[r]] * scale: table [n_vocab][n] of `bits`. A token >= n_vocab gives a row of NaN. */
int kv_embed_dev(size_t n_row, size_t n, uint32_t n_vocab, const uint32_t *token, const void *table, int bits,
                 float scale, float *x, struct CUstream_st *stream);
/* y[r] = x[r] / sqrt(mean x^2 + eps) * (w + w_add): x [n_row] rows of n at ld_x, y of `bits`, rows at ld_y. In place
 * when bits is 32 and ld_x == ld_y. w_add is 1 for weights stored as an offset from 1 (gemma), else 0. */
int kv_rmsnorm_dev(size_t n_row, size_t n, const float *x, size_t ld_x, const float *w, float w_add, float eps, void *y,
                   int bits, size_t ld_y, struct CUstream_st *stream);
/* y[r] = (x[r] - mean) / sqrt(variance + eps) * w + b; b may be NULL. */
int kv_layernorm_dev(size_t n_row, size_t n, const float *x, size_t ld_x, const float *w, const float *b, float eps,
                     void *y, int bits, size_t ld_y, struct CUstream_st *stream);
/* table [n_row][rot]: cos of (pos0 + r) * inv_freq[i] times mscale for i < rot/2, then sin; angles in double. */
int kv_rope_table_dev(size_t n_row, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *table,
                      struct CUstream_st *stream);
/* From projections to what attention consumes, one kind of head a call (Q, or K, or V):
 *   t = proj[r][h] (+ bias[h]);  norm_w: t = rmsnorm(t, norm_w + w_add, eps);  table: rotate pairs (i, i + rot/2);
 *   out[h][r] = t rounded to bits.
 * proj rows of `in_bits` at ld_proj, head h at h * d; bias [n_head * d], norm_w [d], table [n_row][rot] may be NULL.
 * out: from head to head out_head, rows at d (a KV cache: pass out + row0 * d). over [n_head] (NULL for f32) is
 * increased by the finite values that became infinite. d <= 1024. */
int kv_heads_dev(size_t n_row, size_t n_head, size_t d, const void *proj, int in_bits, size_t ld_proj,
                 const float *bias, const float *norm_w, float w_add, float eps, const float *table, size_t rot,
                 void *out, int bits, size_t out_head, uint32_t *over, struct CUstream_st *stream);
/* out = act(gate (+ gate_bias)) * up; up NULL = 1. gate and up: n_row rows of n at ld_in, of in_bits; out [n_row][n] of
 * `bits`; gate_bias [n] or NULL. */
enum { KV_GATE_SILU = 0, KV_GATE_GELU_TANH = 1, KV_GATE_GELU = 2 };
int kv_gate_dev(size_t n_row, size_t n, int act, const void *gate, const void *up, int in_bits, size_t ld_in,
                const float *gate_bias, void *out, int bits, struct CUstream_st *stream);
/* x[r] += y[r] (+ bias): x [n_row][n] f32; y of in_bits, rows at ld_y, may be NULL; bias [n] or NULL. */
int kv_add_dev(size_t n_row, size_t n, float *x, const void *y, int in_bits, size_t ld_y, const float *bias,
               struct CUstream_st *stream);
/* norm[r] = L2 norm of x[r], summed in double. */
int kv_length_dev(size_t n_row, size_t n, const float *x, float *norm, struct CUstream_st *stream);
/* dst = src rounded; over[0] (or NULL) is increased by the finite values that became infinite. */
int kv_cast_dev(size_t n, const float *src, void *dst, int bits, uint32_t *over, struct CUstream_st *stream);
/* x = cap tanh(x / cap) */
int kv_softcap_dev(size_t n, float *x, float cap, struct CUstream_st *stream);

/* ---------------------------------------------------------------------------------------------- branches compared */
/* What a row of logits says. */
enum { KV_TOP = 5 };
typedef struct {
    double lse; /* ln sum exp */
    float nll;  /* lse - logit of the target */
    uint32_t
        top[KV_TOP]; /* the largest, descending; ties: lower first; UINT32_MAX behind the last of a small vocabulary */
} kv_logit_row;
int kv_logit_rows_dev(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, kv_logit_row *out,
                      struct CUstream_st *stream);
/* Rows of logits against those of the full cache: row r with row i = (first + r) % n_base of base [n_base][n_vocab], of
 * which said [n_base] is what kv_logit_rows_dev says. out [n_row][4]: nll[r] - nll[i], KL(i || r) >= 0, 1 where the
 * most likely token is the same, the share of the KV_TOP most likely that are. target [n_base]. */
int kv_logit_compare_dev(size_t n_row, size_t n_vocab, const float *logits, size_t first, size_t n_base,
                         const float *base, const kv_logit_row *said, const uint32_t *target, float *out,
                         struct CUstream_st *stream);
/* out[r] = mean over n_unit parts of `width` elements of ||b - x|| / ||b|| (0 where b is 0), x row r, b row r % n_base
 * of base; rows of n_unit * width elements of `bits`, sums in double. */
int kv_row_distance_dev(size_t n_row, size_t n_base, size_t n_unit, size_t width, int bits, const void *base,
                        const void *x, float *out, struct CUstream_st *stream);

/* ---------------------------------------------------------------------------------------------- definitions */
/* On the host, for those of the functions above that have no twin in kernels.h. out and the others are float; what the
 * device rounds to `bits` is rounded the same way here. */
void kv_heads_ref(size_t n_row, size_t n_head, size_t d, const float *proj, size_t ld_proj, const float *bias,
                  const float *norm_w, float w_add, float eps, const float *inv_freq, float mscale, size_t pos0,
                  size_t rot, float *out, int bits, size_t out_head);
void kv_layernorm_dev_ref(size_t n_row, size_t n, const float *x, const float *w, const float *b, float eps, float *y);
void kv_gate_ref(size_t n, int act, const float *gate, const float *up, float *out);
/* q, k, v and those of b: floats at the strides of a; out float; false: out of memory. */
bool kv_attention_branches_ref(const kv_cuda_attn *a, const kv_cuda_branches *b, const float *q, const float *k,
                               const float *v, float *out, float *lse);
void kv_logit_rows_ref(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, kv_logit_row *out);
void kv_logit_compare_ref(size_t n_row, size_t n_vocab, const float *logits, size_t first, size_t n_base,
                          const float *base, const kv_logit_row *said, const uint32_t *target, float *out);
void kv_row_distance_ref(size_t n_row, size_t n_base, size_t n_unit, size_t width, const float *base, const float *x,
                         float *out);

#ifdef __cplusplus
}
#endif
#endif
