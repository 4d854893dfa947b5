/* nocuda.c - what the .cu files offer, in builds without nvcc: no device, and every launch fails. */
#include "kernels/cuda.h"
#include "kernels/gpu.h"
#include "kernels/kernels.h"
#include "kernels/table_cuda.h"

#define NO_DEVICE 100 /* cudaErrorNoDevice */

bool kv_cuda_device(char *name, size_t n)
{
    if (n) name[0] = 0;
    return false;
}

int kv_pack_cuda(int bits, size_t n, const float *src, uint8_t *dst, size_t *n_overflow)
{
    (void)bits, (void)n, (void)src, (void)dst;
    *n_overflow = 0;
    return NO_DEVICE;
}

int kv_matmul_cuda(size_t m, size_t n, size_t k, const float *a, const float *b, float *c, size_t ldc)
{
    (void)m, (void)n, (void)k, (void)a, (void)b, (void)c, (void)ldc;
    return NO_DEVICE;
}

/* ------------------------------------------------------------------------------------------------ gpu.h */
const char *kv_gpu_text(int code)
{
    return code == NO_DEVICE ? "this build has no CUDA" : "unknown error";
}

int kv_gpu_count(void)
{
    return 0;
}

int kv_gpu_select(int device)
{
    (void)device;
    return NO_DEVICE;
}

int kv_gpu_memory(size_t *available, size_t *total)
{
    *available = *total = 0;
    return NO_DEVICE;
}

int kv_gpu_alloc(size_t n, void **p)
{
    (void)n;
    *p = NULL;
    return NO_DEVICE;
}

void kv_gpu_free(void *p)
{
    (void)p;
}

void *kv_gpu_host_alloc(size_t n)
{
    (void)n;
    return NULL;
}

void kv_gpu_host_free(void *p)
{
    (void)p;
}

int kv_gpu_stream_open(bool urgent, kv_gpu_stream *s)
{
    (void)urgent;
    *s = NULL;
    return NO_DEVICE;
}

void kv_gpu_stream_close(kv_gpu_stream s)
{
    (void)s;
}

int kv_gpu_stream_sync(kv_gpu_stream s)
{
    (void)s;
    return NO_DEVICE;
}

int kv_gpu_stream_wait(kv_gpu_stream s, kv_gpu_event e)
{
    (void)s, (void)e;
    return NO_DEVICE;
}

int kv_gpu_event_open(kv_gpu_event *e)
{
    *e = NULL;
    return NO_DEVICE;
}

void kv_gpu_event_close(kv_gpu_event e)
{
    (void)e;
}

int kv_gpu_event_record(kv_gpu_event e, kv_gpu_stream s)
{
    (void)e, (void)s;
    return NO_DEVICE;
}

int kv_gpu_event_sync(kv_gpu_event e)
{
    (void)e;
    return NO_DEVICE;
}

int kv_gpu_event_seconds(kv_gpu_event a, kv_gpu_event b, double *s)
{
    (void)a, (void)b;
    *s = 0;
    return NO_DEVICE;
}

int kv_gpu_copy(void *to, const void *from, size_t n, kv_gpu_stream s)
{
    (void)to, (void)from, (void)n, (void)s;
    return NO_DEVICE;
}

int kv_gpu_copy_peer(void *to, int to_device, const void *from, int from_device, size_t n, kv_gpu_stream s)
{
    (void)to, (void)to_device, (void)from, (void)from_device, (void)n, (void)s;
    return NO_DEVICE;
}

int kv_gpu_zero(void *p, size_t n, kv_gpu_stream s)
{
    (void)p, (void)n, (void)s;
    return NO_DEVICE;
}

int kv_gpu_blas_open(kv_gpu_stream s, kv_gpu_blas **out)
{
    (void)s;
    *out = NULL;
    return NO_DEVICE;
}

void kv_gpu_blas_close(kv_gpu_blas *b)
{
    (void)b;
}

size_t kv_gpu_blas_bytes(void)
{
    return 0;
}

int kv_gpu_matmul(kv_gpu_blas *b, size_t m, size_t n, size_t k, int bits, float alpha, const void *a, size_t ld_a,
                  const void *w, int c_bits, void *c, size_t ld_c, bool add)
{
    (void)b, (void)m, (void)n, (void)k, (void)bits, (void)alpha, (void)a, (void)ld_a, (void)w, (void)c_bits;
    (void)c, (void)ld_c, (void)add;
    return NO_DEVICE;
}

int kv_planes_dev(size_t n_head, size_t n, const void *src, int src_bits, size_t src_head, uint8_t *dst, int bits,
                  bool split, kv_gpu_stream s)
{
    (void)n_head, (void)n, (void)src, (void)src_bits, (void)src_head, (void)dst, (void)bits, (void)split, (void)s;
    return NO_DEVICE;
}

int kv_nll_dev(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, float *nll, kv_gpu_stream s)
{
    (void)n_row, (void)n_vocab, (void)logits, (void)target, (void)nll, (void)s;
    return NO_DEVICE;
}

int kv_router_dev(size_t n_row, size_t n_expert, size_t used, bool norm, float *weight, kv_gpu_stream s)
{
    (void)n_row, (void)n_expert, (void)used, (void)norm, (void)weight, (void)s;
    return NO_DEVICE;
}

int kv_add_weighted_dev(size_t n_row, size_t n, float *x, const float *y, const float *weight, size_t ld_w,
                        kv_gpu_stream s)
{
    (void)n_row, (void)n, (void)x, (void)y, (void)weight, (void)ld_w, (void)s;
    return NO_DEVICE;
}

int kv_finite_dev(size_t n, const float *x, uint32_t *flag, kv_gpu_stream s)
{
    (void)n, (void)x, (void)flag, (void)s;
    return NO_DEVICE;
}

int kv_map_dev(const kv_gpu_map *m, const void *q, const void *k, const float *lse, void *p, kv_gpu_stream s)
{
    (void)m, (void)q, (void)k, (void)lse, (void)p, (void)s;
    return NO_DEVICE;
}

int kv_expand_dev(uint32_t type, size_t n_row, size_t n_col, const void *src, void *dst, int bits, uint64_t first,
                  uint64_t *found, kv_gpu_stream s)
{
    (void)type, (void)n_row, (void)n_col, (void)src, (void)dst, (void)bits, (void)first, (void)found, (void)s;
    return NO_DEVICE;
}

int kv_random_dev(uint64_t seed, uint64_t first, size_t n, float scale, void *out, int bits, kv_gpu_stream s)
{
    (void)seed, (void)first, (void)n, (void)scale, (void)out, (void)bits, (void)s;
    return NO_DEVICE;
}

/* ------------------------------------------------------------------------------------------------ cuda.h */
int kv_attention_dev(const kv_cuda_attn *a, const void *q, const void *k, const void *v, void *out, float *lse,
                     float *stat, struct CUstream_st *stream)
{
    (void)a, (void)q, (void)k, (void)v, (void)out, (void)lse, (void)stat, (void)stream;
    return NO_DEVICE;
}

int kv_attention_branches_dev(const kv_cuda_attn *a, const kv_cuda_branches *b, const void *q, const void *k,
                              const void *v, void *out, float *lse, struct CUstream_st *stream)
{
    (void)a, (void)b, (void)q, (void)k, (void)v, (void)out, (void)lse, (void)stream;
    return NO_DEVICE;
}

int kv_logit_rows_dev(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, kv_logit_row *out,
                      struct CUstream_st *stream)
{
    (void)n_row, (void)n_vocab, (void)logits, (void)target, (void)out, (void)stream;
    return NO_DEVICE;
}

int kv_logit_compare_dev(size_t n_row, size_t n_vocab, const float *logits, size_t first, size_t n_base,
                         const float *base, const kv_logit_row *said, const uint32_t *target, float *out,
                         struct CUstream_st *stream)
{
    (void)n_row, (void)n_vocab, (void)logits, (void)first, (void)n_base, (void)base, (void)said, (void)target;
    (void)out, (void)stream;
    return NO_DEVICE;
}

int kv_row_distance_dev(size_t n_row, size_t n_base, size_t n_unit, size_t width, int bits, const void *base,
                        const void *x, float *out, struct CUstream_st *stream)
{
    (void)n_row, (void)n_base, (void)n_unit, (void)width, (void)bits, (void)base, (void)x, (void)out, (void)stream;
    return NO_DEVICE;
}

int kv_colsum_dev(const kv_cuda_attn *a, const void *q, const void *k, const float *lse, double *acc, size_t acc_head,
                  struct CUstream_st *stream)
{
    (void)a, (void)q, (void)k, (void)lse, (void)acc, (void)acc_head, (void)stream;
    return NO_DEVICE;
}

size_t kv_decode_scratch(const kv_cuda_attn *a)
{
    (void)a;
    return 0;
}

int kv_decode_dev(const kv_cuda_attn *a, const void *q, const void *k, const void *v, void *out, float *lse,
                  float *stat, void *scratch, struct CUstream_st *stream)
{
    (void)a, (void)q, (void)k, (void)v, (void)out, (void)lse, (void)stat, (void)scratch, (void)stream;
    return NO_DEVICE;
}

int kv_embed_dev(size_t n_row, size_t n, uint32_t n_vocab, const uint32_t *token, const void *table, int bits,
                 float scale, float *x, struct CUstream_st *stream)
{
    (void)n_row, (void)n, (void)n_vocab, (void)token, (void)table, (void)bits, (void)scale, (void)x, (void)stream;
    return NO_DEVICE;
}

int kv_rmsnorm_dev(size_t n_row, size_t n, const float *x, size_t ld_x, const float *w, float w_add, float eps, void *y,
                   int bits, size_t ld_y, struct CUstream_st *stream)
{
    (void)n_row, (void)n, (void)x, (void)ld_x, (void)w, (void)w_add, (void)eps, (void)y, (void)bits, (void)ld_y,
        (void)stream;
    return NO_DEVICE;
}

int kv_layernorm_dev(size_t n_row, size_t n, const float *x, size_t ld_x, const float *w, const float *b, float eps,
                     void *y, int bits, size_t ld_y, struct CUstream_st *stream)
{
    (void)n_row, (void)n, (void)x, (void)ld_x, (void)w, (void)b, (void)eps, (void)y, (void)bits, (void)ld_y,
        (void)stream;
    return NO_DEVICE;
}

int kv_rope_table_dev(size_t n_row, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *table,
                      struct CUstream_st *stream)
{
    (void)n_row, (void)rot, (void)pos0, (void)inv_freq, (void)mscale, (void)table, (void)stream;
    return NO_DEVICE;
}

int kv_heads_dev(size_t n_row, size_t n_head, size_t d, const void *proj, int in_bits, size_t ld_proj,
                 const float *bias, const float *norm_w, float w_add, float eps, const float *table, size_t rot,
                 void *out, int bits, size_t out_head, uint32_t *over, struct CUstream_st *stream)
{
    (void)n_row, (void)n_head, (void)d, (void)proj, (void)in_bits, (void)ld_proj, (void)bias, (void)norm_w, (void)w_add,
        (void)eps, (void)table, (void)rot, (void)out, (void)bits, (void)out_head, (void)over, (void)stream;
    return NO_DEVICE;
}

int kv_gate_dev(size_t n_row, size_t n, int act, const void *gate, const void *up, int in_bits, size_t ld_in,
                const float *gate_bias, void *out, int bits, struct CUstream_st *stream)
{
    (void)n_row, (void)n, (void)act, (void)gate, (void)up, (void)in_bits, (void)ld_in, (void)gate_bias, (void)out,
        (void)bits, (void)stream;
    return NO_DEVICE;
}

int kv_add_dev(size_t n_row, size_t n, float *x, const void *y, int in_bits, size_t ld_y, const float *bias,
               struct CUstream_st *stream)
{
    (void)n_row, (void)n, (void)x, (void)y, (void)in_bits, (void)ld_y, (void)bias, (void)stream;
    return NO_DEVICE;
}

int kv_length_dev(size_t n_row, size_t n, const float *x, float *norm, struct CUstream_st *stream)
{
    (void)n_row, (void)n, (void)x, (void)norm, (void)stream;
    return NO_DEVICE;
}

int kv_cast_dev(size_t n, const float *src, void *dst, int bits, uint32_t *over, struct CUstream_st *stream)
{
    (void)n, (void)src, (void)dst, (void)bits, (void)over, (void)stream;
    return NO_DEVICE;
}

int kv_softcap_dev(size_t n, float *x, float cap, struct CUstream_st *stream)
{
    (void)n, (void)x, (void)cap, (void)stream;
    return NO_DEVICE;
}

const kv_kernel kv_cuda_table[1];
const size_t kv_cuda_count;
const kv_kernel kv_replay_table[1];
const size_t kv_replay_count;
