/* table_cuda.cuh - what the checks of device kernels share: memory of one check, uploads and downloads in an element
 * type, the comparison. Everything is a file's own. */
#ifndef KV_TABLE_CUDA_CUH
#define KV_TABLE_CUDA_CUH

#include "kernels/half.h"
#include "kernels/table_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* table_branches.cu */
void kv_check_branches(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v);
void kv_check_logits(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v);
void kv_check_distance(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v);

namespace
{
void fail(kv_verdict *v, const char *why)
{
    if (v->ok) snprintf(v->why, sizeof v->why, "%s", why);
    v->ok = false;
}

/* Memory of one check, host and device; all of it goes at the end. */
struct pool {
    kv_verdict *v;
    uint64_t seed;
    void *host[32], *dev[32];
    int n_host, n_dev;
    cudaError_t error;
};

inline float *floats(pool *p, size_t n, float factor)
{
    float *x = (float *)malloc((n + 1) * sizeof *x);
    if (!x) abort();
    p->host[p->n_host++] = x;
    if (factor == 0)
        memset(x, 0xff, n * sizeof *x); /* NaN */
    else
        kv_fill_normal(p->seed++ * 7919 + 13, n, x);
    for (size_t i = 0; factor != 0 && factor != 1 && i < n; i++) x[i] *= factor;
    return x;
}

inline void *device(pool *p, size_t bytes)
{
    void *d = NULL;
    if (!p->error) p->error = cudaMalloc(&d, bytes + 16);
    if (!p->error) p->error = cudaMemset(d, 0xff, bytes);
    p->dev[p->n_dev++] = d;
    return d;
}

/* x rounded to bits, on the device in that type and on the host in place. */
inline void *upload(pool *p, int bits, size_t n, float *x)
{
    kv_round_ref(bits, n, x);
    void *d = device(p, n * 4);
    if (bits == 32) {
        if (!p->error) p->error = cudaMemcpy(d, x, n * 4, cudaMemcpyHostToDevice);
        return d;
    }
    uint16_t *h = (uint16_t *)malloc(2 * n + 2);
    if (!h) abort();
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, x + i, 4);
        h[i] = (uint16_t)(bits == 16 ? kv_f16_bits(u) : u >> 16);
    }
    if (!p->error) p->error = cudaMemcpy(d, h, 2 * n, cudaMemcpyHostToDevice);
    free(h);
    return d;
}

/* n elements of the device as floats. */
inline float *download(pool *p, int bits, size_t n, const void *d)
{
    float *x = floats(p, n, 0);
    if (!p->error) p->error = cudaMemcpy(x, d, n * (bits == 32 ? 4 : 2), cudaMemcpyDeviceToHost);
    if (bits == 32) return x;
    for (size_t i = n; i--;) {
        uint16_t h;
        memcpy(&h, (char *)x + 2 * i, 2);
        x[i] = bits == 17 ? __bfloat162float(__ushort_as_bfloat16(h)) : __half2float(__ushort_as_half(h));
    }
    return x;
}

void close_pool(pool *p)
{
    cudaError_t e = cudaDeviceSynchronize();
    if (!p->error) p->error = e;
    if (p->error) fail(p->v, cudaGetErrorString(p->error));
    for (int i = 0; i < p->n_host; i++) free(p->host[i]);
    for (int i = 0; i < p->n_dev; i++) cudaFree(p->dev[i]);
}

/* kv_compare where the definition wrote; where it left the poison, so must the kernel. */
void compare(pool *p, const char *what, size_t n, const float *got, const float *want, double tol)
{
    float *a = floats(p, n, 1), *b = floats(p, n, 1);
    for (size_t i = 0; i < n; i++) {
        const bool poison = isnan(want[i]);
        a[i] = !poison ? got[i] : isnan(got[i]) ? 0 : 1e30f;
        b[i] = poison ? 0 : want[i];
    }
    kv_compare(what, n, a, b, tol, p->v);
}
} // namespace

#endif
