/* gpu.h - the little of the CUDA runtime and of cuBLAS that programs need, as plain C functions: memory, streams,
 * events, copies, matrix products. Builds without CUDA have them too; then there is no device and everything fails.
 *
 * Functions that return int: 0, or an error code that kv_gpu_text puts into words. Work on a device goes to the device
 * that kv_gpu_select chose for the calling thread; streams, events and products belong to the device they were made
 * on. NULL is accepted wherever something is freed. */
#ifndef KV_GPU_H
#define KV_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *kv_gpu_stream;
typedef struct CUevent_st *kv_gpu_event;
typedef struct kv_gpu_blas kv_gpu_blas;

#define KV_GPU_ENOMEM 2 /* cudaErrorMemoryAllocation */

const char *kv_gpu_text(int code); /* "out of memory", ...; never NULL */
int kv_gpu_count(void);            /* devices that run what this build holds */
int kv_gpu_select(int device);
int kv_gpu_memory(size_t *available, size_t *total);

int kv_gpu_alloc(size_t n, void **p); /* *p = NULL on failure */
void kv_gpu_free(void *p);
void *kv_gpu_host_alloc(size_t n); /* page-locked; NULL when there is none */
void kv_gpu_host_free(void *p);

/* `urgent`: its kernels go first where both could run. A stream does not wait for the default stream. */
int kv_gpu_stream_open(bool urgent, kv_gpu_stream *s);
void kv_gpu_stream_close(kv_gpu_stream s);
int kv_gpu_stream_sync(kv_gpu_stream s);
int kv_gpu_stream_wait(kv_gpu_stream s, kv_gpu_event e); /* later work of s waits; also across devices */
int kv_gpu_event_open(kv_gpu_event *e);
void kv_gpu_event_close(kv_gpu_event e);
int kv_gpu_event_record(kv_gpu_event e, kv_gpu_stream s);
int kv_gpu_event_sync(kv_gpu_event e);                               /* an event never recorded has happened */
int kv_gpu_event_seconds(kv_gpu_event a, kv_gpu_event b, double *s); /* both must have happened */

/* Between any of host and device, by what the pointers are; asynchronous only from and to page-locked memory. */
int kv_gpu_copy(void *to, const void *from, size_t n, kv_gpu_stream s);
int kv_gpu_copy_peer(void *to, int to_device, const void *from, int from_device, size_t n, kv_gpu_stream s);
int kv_gpu_zero(void *p, size_t n, kv_gpu_stream s);

/* Products on one stream with a workspace of their own, so that the same shapes take the same path every time. */
int kv_gpu_blas_open(kv_gpu_stream s, kv_gpu_blas **out);
void kv_gpu_blas_close(kv_gpu_blas *b);
size_t kv_gpu_blas_bytes(void); /* device memory of one */
/* c [m][n] = alpha a [m][k] w [n][k]^T (+ c when `add`), rows at ld_a, k and ld_c; a and w of `bits`, c of c_bits (32 =
 * f32, 16 = f16, 17 = bf16). Sums in f32; bits 32 is plain f32, never tf32. */
int kv_gpu_matmul(kv_gpu_blas *b, size_t m, size_t n, size_t k, int bits, float alpha, const void *a, size_t ld_a,
                  const void *w, int c_bits, void *c, size_t ld_c, bool add);

/* ------------------------------------------------------------------------------------------------ kernels of a capture
 * Device pointers; 0 or an error code; errors of the device itself appear at the next synchronisation. */

/* For each of n_head arrays of n elements (from one to the next src_head elements), of src_bits (16, 17, 32, or 64 for
 * doubles): rounded to `bits`, and split into byte planes (lowest first) when `split`: dst [head][plane][n]. A 16-bit
 * source is stored as it is: bits == src_bits. kv_pack of kernels.h is the definition. */
int kv_planes_dev(size_t n_head, size_t n, const void *src, int src_bits, size_t src_head, uint8_t *dst, int bits,
                  bool split, kv_gpu_stream s);
/* nll[r] = ln sum exp(logits[r]) - logits[r][target[r]]; rows of n_vocab. kv_nll_ref is the definition. */
int kv_nll_dev(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, float *nll, kv_gpu_stream s);
/* Mixture of experts: weight [n_row][n_expert] from router logits of the same shape, in place: softmax, 0 for all but
 * the `used` largest (ties: lower number), the rest divided by their sum when `norm`. n_expert <= 1024. */
int kv_router_dev(size_t n_row, size_t n_expert, size_t used, bool norm, float *weight, kv_gpu_stream s);
/* x[r] += weight[r * ld_w] * y[r], rows of n. */
int kv_add_weighted_dev(size_t n_row, size_t n, float *x, const float *y, const float *weight, size_t ld_w,
                        kv_gpu_stream s);
/* flag[0] = 1 when one of x[0..n) is not finite; else it stays. */
int kv_finite_dev(size_t n, const float *x, uint32_t *flag, kv_gpu_stream s);
/* p [n_head][n_row][width], f16: rows row0.. of the attention map of query heads head_first.. from their log-sum-exp; 0
 * where a row does not look. q [query head][row][d] from row0 on, heads q_head apart; k [KV head][token][d], kv_head
 * apart, both of `bits`; lse [query head][row], lse_head apart; query head h reads KV head h / group. */
typedef struct {
    uint32_t head_first, n_head, group, d, n_row, row0, width, window;
    float scale, softcap;
    int bits;
    size_t q_head, kv_head, lse_head;
} kv_gpu_map;
int kv_map_dev(const kv_gpu_map *m, const void *q, const void *k, const float *lse, void *p, kv_gpu_stream s);
/* out[i] = kv_random_weight(seed, first + i, scale) as `bits` (random.h). */
int kv_random_dev(uint64_t seed, uint64_t first, size_t n, float scale, void *out, int bits, kv_gpu_stream s);

/* Rows of a stored matrix, whole blocks of ggml's tensor type (quant.h) one behind the other, as `bits`: what the
 * type's `expand` gives, rounded, to the bit. found[0] falls to first + r for the first row r with a value that is not
 * finite, found[1] for the first with one that becomes infinite. Types without `expand` are refused. */
int kv_expand_dev(uint32_t type, size_t n_row, size_t n_col, const void *src, void *dst, int bits, uint64_t first,
                  uint64_t *found, kv_gpu_stream s);

/* Definitions of these, on floats in memory: sources of kv_planes_ref are floats, p of kv_map_ref is not rounded. */
void kv_planes_ref(size_t n_head, size_t n, const float *src, size_t src_head, uint8_t *dst, int bits, bool split);
void kv_nll_ref(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, float *nll);
void kv_router_ref(size_t n_row, size_t n_expert, size_t used, bool norm, float *weight);
void kv_map_ref(const kv_gpu_map *m, const float *q, const float *k, const float *lse, float *p);

#ifdef __cplusplus
}
#endif
#endif
