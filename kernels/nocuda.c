/* nocuda.c - what the .cu files offer, in builds without nvcc: no device, and every launch fails. */
#include "kernels/gpu.h"
#include "kernels/kernels.h"

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

int kv_random_dev(uint64_t seed, uint64_t first, size_t n, float scale, void *out, int bits, kv_gpu_stream s)
{
    (void)seed, (void)first, (void)n, (void)scale, (void)out, (void)bits, (void)s;
    return NO_DEVICE;
}
