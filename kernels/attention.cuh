/* attention.cuh - the kernels behind cuda.h, so that tests and benchmarks can name one. */
#ifndef KV_ATTENTION_CUH
#define KV_ATTENTION_CUH

#include "kernels/cuda.h"

#include <cuda_runtime.h>

struct kv_attn_args;

/* The fastest there is; without wgmma; without tensor cores. */
enum { KV_PATH_BEST = 0, KV_PATH_MMA = 1, KV_PATH_PLAIN = 2 };

int kv_attention_path(const kv_cuda_attn *a, int path, const void *q, const void *k, const void *v, void *out,
                      float *lse, float *stat, cudaStream_t stream);
int kv_attention_branches_path(const kv_cuda_attn *a, const kv_cuda_branches *b, int path, const void *q, const void *k,
                               const void *v, void *out, float *lse, cudaStream_t stream);
int kv_colsum_path(const kv_cuda_attn *a, int path, const void *q, const void *k, const float *lse, double *acc,
                   size_t acc_head, cudaStream_t stream);

/* Launch when the device and the shape allow it: true, with the outcome in *status; false when they do not. */
bool kv_attention_sm90(const kv_attn_args &g, cudaStream_t stream, int *status);
bool kv_colsum_sm90(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream, int *status);

/* Any head size up to 512, any type, any alignment. */
int kv_attention_plain(const kv_attn_args &g, cudaStream_t stream);
int kv_attention_branches_plain(const kv_attn_args &g, const kv_cuda_branches &b, cudaStream_t stream);
int kv_colsum_plain(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream);

#endif
