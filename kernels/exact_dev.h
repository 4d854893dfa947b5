/* exact_dev.h - on a device, what decides kept sets: attention of a window, its reductions, norms, orders. EXACT in the
 * sense of kernels.h: the same operations in the same order as the definitions there, so the bytes are the CPU's.
 * (exact.cu is compiled without contraction and shares math.h.) Conventions of cuda.h: device pointers, a stream, no
 * allocation, 0 or a CUDA error code. Sizes below 2^31. */
#ifndef KV_EXACT_DEV_H
#define KV_EXACT_DEV_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

/* Attention rows of all heads of a layer, turned: keys are rows, columns are query rows. Column h * n_row + r is row r
 * of query head h, at position row0 + r; it sees keys 0..row0 + r. Head h reads KV head h / (n_q_head / n_kv_head). */
typedef struct {
    uint32_t n_q_head, n_kv_head, n_row, row0, n_key, d;
    float scale, softcap;
    size_t q_head, k_head; /* elements from head to head; rows of both are d apart */
    size_t ld;             /* of p: at least n_q_head * n_row */
} kv_turned;

/* p [n_key][ld] = scores (kv_score of math.h), also where a key is not visible. */
int kv_scores_dev(const kv_turned *t, const float *q, const float *k, float *p, struct CUstream_st *stream);
/* From scores to e = exp(score - largest), 0 where not visible, in place; sum [column] = their sum as kv_probs divides
 * by it, so p = e / sum; lse [column] (NULL = not wanted) as in kv_probs_turned. scratch: kv_softmax_scratch bytes. */
size_t kv_softmax_scratch(const kv_turned *t);
int kv_softmax_dev(const kv_turned *t, float *p, float *sum, float *lse, void *scratch, struct CUstream_st *stream);

/* kv_reduce_rows of the last w rows of every head: out[h][i] for i < n, rows at ld_out. n <= n_key, w <= n_row.
 * stats NULL, or kv_window_stats bytes that begin with [n_q_head * w] kv_entropy of the first n keys of
 * every row, then [n_q_head] kv_sum_blocks over the n columns of kv_column_spread's sq / (w - 1) (0 when w is 1). */
size_t kv_window_stats(const kv_turned *t, uint32_t w, uint32_t n);
int kv_reduce_rows_dev(const kv_turned *t, kv_row_reduce how, double gamma, uint32_t w, uint32_t n, const float *p,
                       const float *sum, float *out, size_t ld_out, float eps, double *stats,
                       struct CUstream_st *stream);
/* kv_group_heads; per_head is not overwritten. */
int kv_group_heads_dev(const kv_grouping *g, size_t n, size_t ld, const float *per_head, float *score,
                       struct CUstream_st *stream);
/* score[u][i] = sign |x[u][i]| for n rows of d: x[u] starts at x + u * x_head, score[u] at score + u * ld. */
int kv_norms_dev(size_t n_unit, size_t n, size_t d, size_t x_head, float sign, const float *x, float *score, size_t ld,
                 struct CUstream_st *stream);
/* Per KV head to units: copied to n_unit = n_kv * group heads, or (n_unit 1) averaged in double; rows of n at ld. */
int kv_spread_kv_dev(size_t n_kv, size_t n_unit, size_t n, size_t ld, const float *per_kv, float *score,
                     struct CUstream_st *stream);
/* score[i] = x[i], or x[i] / (n - i) when per_row, for rows of n at ld. */
int kv_column_share_dev(size_t n_head, size_t n, size_t ld, bool per_row, const float *x, float *score,
                        struct CUstream_st *stream);

/* Rankings. list [n]: the n_forced positions that come first, in their order, then all others ascending. order [n] =
 * the forced ones, then the others by kv_rank of score; sorted [n - n_forced] = the others' scores in that order. `at`
 * = the sum of n - n_forced over the units before this one. All units of a call in one sort; unit is a device array. */
typedef struct {
    const float *score;
    const uint32_t *list;
    uint32_t *order;
    float *sorted;
    uint32_t n, n_forced, at;
} kv_rank_unit;
/* total = sum of n - n_forced over the units; most = the largest n. */
size_t kv_rank_scratch(size_t n_unit, size_t total);
int kv_rank_dev(size_t n_unit, const kv_rank_unit *unit, size_t total, size_t most, void *scratch,
                struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
