/* recording.cu - the kernels of a capture (gpu.h): byte planes, next-token losses, attention maps, weights at random.
 */
#include "kernels/block.cuh"
#include "kernels/gpu.h"
#include "kernels/half.h"
#include "kernels/kernels.h"
#include "kernels/random.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#define THREADS 256

static unsigned blocks_for(size_t n, size_t per_block, size_t most)
{
    size_t b = (n + per_block - 1) / per_block;
    return (unsigned)(b < 1 ? 1 : b < most ? b : most);
}

/* ------------------------------------------------------------------------------------------------ byte planes */
/* Bits of element i of an array of src_bits, rounded to `bits` (kv_planes_dev). */
static __device__ uint32_t element(const void *src, int src_bits, size_t i, int bits)
{
    if (src_bits == 16 || src_bits == 17) return ((const uint16_t *)src)[i];
    uint32_t u = __float_as_uint(src_bits == 64 ? (float)((const double *)src)[i] : ((const float *)src)[i]);
    return bits == 32 ? u : bits == 17 ? kv_bf16_bits(u) : kv_f16_bits(u);
}

/* Four elements a thread, so that a plane is written in words. */
static __global__ void planes(size_t n, const uint8_t *src, int src_bits, size_t src_head, uint8_t *dst, int bits,
                              int split)
{
    int size = bits == 32 ? 4 : 2, src_size = src_bits == 64 ? 8 : src_bits == 32 ? 4 : 2;
    size_t h = blockIdx.y, step = (size_t)gridDim.x * blockDim.x * 4;
    const void *from = src + h * src_head * src_size;
    uint8_t *to = dst + h * n * size;
    bool words = n % 4 == 0;
    for (size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x); i < n; i += step) {
        uint32_t u[4];
        int count = n - i < 4 ? (int)(n - i) : 4;
#pragma unroll
        for (int j = 0; j < 4; j++) u[j] = j < count ? element(from, src_bits, i + j, bits) : 0;
        for (int p = 0; p < (split ? size : 1); p++) {
            if (!split) {
                for (int j = 0; j < count; j++)
                    for (int b = 0; b < size; b++) to[(i + j) * size + b] = (uint8_t)(u[j] >> 8 * b);
                continue;
            }
            uint32_t w = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) w |= (u[j] >> 8 * p & 0xff) << 8 * j;
            if (words) {
                *(uint32_t *)(to + p * n + i) = w;
            } else {
                for (int j = 0; j < count; j++) to[p * n + i + j] = (uint8_t)(w >> 8 * j);
            }
        }
    }
}

extern "C" int kv_planes_dev(size_t n_head, size_t n, const void *src, int src_bits, size_t src_head, uint8_t *dst,
                             int bits, bool split, kv_gpu_stream s)
{
    bool half = src_bits == 16 || src_bits == 17;
    if (!n_head || !n) return 0;
    if (n_head > 65535 || (uintptr_t)dst % 4 || (half && bits != src_bits) ||
        (bits != 32 && bits != 16 && bits != 17) || (!half && src_bits != 32 && src_bits != 64))
        return cudaErrorInvalidValue;
    dim3 grid(blocks_for(n, 4 * THREADS, 512), (unsigned)n_head);
    planes<<<grid, THREADS, 0, s>>>(n, (const uint8_t *)src, src_bits, src_head, dst, bits, split);
    return cudaGetLastError();
}

extern "C" int kv_pack_cuda(int bits, size_t n, const float *src, uint8_t *dst, size_t *n_overflow)
{
    void *d_src = NULL, *d_dst = NULL;
    size_t n_out = n * (bits == 32 ? 4 : 2);
    *n_overflow = 0;
    if (!n) return 0;
    if (n > SIZE_MAX / 8) return cudaErrorInvalidValue;
    int e = kv_gpu_alloc(4 * n, &d_src);
    if (!e) e = kv_gpu_alloc(n_out, &d_dst);
    if (!e) e = cudaMemcpy(d_src, src, 4 * n, cudaMemcpyHostToDevice);
    if (!e) e = kv_planes_dev(1, n, d_src, 32, n, (uint8_t *)d_dst, bits, true, NULL);
    if (!e) e = cudaMemcpy(dst, d_dst, n_out, cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < n && !e && bits != 32; i++) {
        uint32_t u;
        memcpy(&u, src + i, 4);
        *n_overflow += bits == 17 ? kv_bf16_over(u) : kv_f16_over(u);
    }
    kv_gpu_free(d_src), kv_gpu_free(d_dst);
    return e;
}

/* ------------------------------------------------------------------------------------------------ next tokens */
/* One pass: every thread keeps its largest logit and the sum relative to it, in float over some hundreds of terms; the
 * threads' sums meet in double. */
static __global__ void nll_rows(size_t n_vocab, const float *logits, const uint32_t *target, float *nll)
{
    __shared__ float top_of[32];
    __shared__ double sum_of[32];
    const float *l = logits + (size_t)blockIdx.x * n_vocab;
    float top = -CUDART_INF_F, part = 0;
    for (size_t i = threadIdx.x; i < n_vocab; i += blockDim.x) {
        float v = l[i];
        if (v > top) part *= expf(top - v), top = v; /* the first time expf(-inf) = 0 */
        part += expf(v - top);
    }
    float all = kv_over_block(top, top_of, [](float a, float b) { return fmaxf(a, b); });
    double sum = top > -CUDART_INF_F ? (double)part * exp((double)top - (double)all) : 0;
    sum = kv_over_block(sum, sum_of, [](double a, double b) { return a + b; });
    if (!threadIdx.x) nll[blockIdx.x] = (float)(log(sum) + (double)all - (double)l[target[blockIdx.x]]);
}

extern "C" int kv_nll_dev(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, float *nll,
                          kv_gpu_stream s)
{
    if (!n_row) return 0;
    if (n_row > INT32_MAX || !n_vocab) return cudaErrorInvalidValue;
    nll_rows<<<(unsigned)n_row, 512, 0, s>>>(n_vocab, logits, target, nll);
    return cudaGetLastError();
}

static __global__ void finite(size_t n, const float *x, uint32_t *flag)
{
    bool bad = false;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        bad |= !isfinite(x[i]);
    if (bad) *flag = 1;
}

extern "C" int kv_finite_dev(size_t n, const float *x, uint32_t *flag, kv_gpu_stream s)
{
    if (!n) return 0;
    finite<<<blocks_for(n, THREADS * 4, 1024), THREADS, 0, s>>>(n, x, flag);
    return cudaGetLastError();
}

/* ------------------------------------------------------------------------------------------------ experts */
/* One warp a row: `used` times the largest of what is left. */
static __global__ void router(size_t n_row, int n_expert, int used, bool norm, float *weight)
{
    size_t row = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (row >= n_row) return;
    float *w = weight + row * n_expert, top = -CUDART_INF_F, sum = 0, kept = 0;
    for (int i = lane; i < n_expert; i += 32) top = fmaxf(top, w[i]);
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
    for (int i = lane; i < n_expert; i += 32) sum += expf(w[i] - top);
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(0xffffffff, sum, d);
    unsigned chosen = 0; /* bit j: expert lane + 32 j */
    for (int u = 0; u < used; u++) {
        float best = -CUDART_INF_F;
        int at = n_expert;
        for (int i = lane, j = 0; i < n_expert; i += 32, j++)
            if (!(chosen >> j & 1) && w[i] > best) best = w[i], at = i;
        for (int d = 16; d; d /= 2) {
            float b = __shfl_xor_sync(0xffffffff, best, d);
            int a = __shfl_xor_sync(0xffffffff, at, d);
            if (b > best || (b == best && a < at)) best = b, at = a;
        }
        if (at % 32 == lane) chosen |= 1u << at / 32;
        kept += expf(best - top) / sum;
    }
    for (int i = lane, j = 0; i < n_expert; i += 32, j++)
        w[i] = chosen >> j & 1 ? expf(w[i] - top) / sum / (norm ? kept : 1) : 0;
}

extern "C" int kv_router_dev(size_t n_row, size_t n_expert, size_t used, bool norm, float *weight, kv_gpu_stream s)
{
    if (!n_row) return 0;
    if (!used || used > n_expert || n_expert > 1024) return cudaErrorInvalidValue;
    router<<<(unsigned)((n_row + 7) / 8), 256, 0, s>>>(n_row, (int)n_expert, (int)used, norm, weight);
    return cudaGetLastError();
}

static __global__ void add_weighted(size_t n_row, size_t n, float *x, const float *y, const float *weight, size_t ld_w)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n_row * n; i += (size_t)gridDim.x * blockDim.x)
        x[i] += weight[i / n * ld_w] * y[i];
}

extern "C" int kv_add_weighted_dev(size_t n_row, size_t n, float *x, const float *y, const float *weight, size_t ld_w,
                                   kv_gpu_stream s)
{
    if (!n_row || !n) return 0;
    add_weighted<<<blocks_for(n_row * n, THREADS, 4096), THREADS, 0, s>>>(n_row, n, x, y, weight, ld_w);
    return cudaGetLastError();
}

/* ------------------------------------------------------------------------------------------------ maps */
static __device__ float as_float(const void *p, size_t i, int bits)
{
    uint32_t h;
    if (bits == 32) return ((const float *)p)[i];
    h = ((const uint16_t *)p)[i];
    return bits == 17 ? __uint_as_float(h << 16) : __half2float(__ushort_as_half((unsigned short)h));
}

/* One block: THREADS keys of one row; the row's query lies in shared memory. */
static __global__ void map_rows(kv_gpu_map m, const void *q, const void *k, const float *lse, uint16_t *p)
{
    extern __shared__ float query[];
    size_t row = blockIdx.y, h = m.head_first + blockIdx.z, at = m.row0 + row,
           j = (size_t)blockIdx.x * THREADS + threadIdx.x;
    for (size_t c = threadIdx.x; c < m.d; c += THREADS) query[c] = as_float(q, h * m.q_head + row * m.d + c, m.bits);
    __syncthreads();
    if (j >= m.width) return;
    float v = 0;
    if (j <= at && (!m.window || at - j < m.window)) {
        size_t key = h / m.group * m.kv_head + j * m.d;
        float s = 0;
        for (size_t c = 0; c < m.d; c++) s = fmaf(query[c], as_float(k, key + c, m.bits), s);
        s *= m.scale;
        if (m.softcap > 0) s = m.softcap * tanhf(s / m.softcap);
        v = expf(s - lse[h * m.lse_head + row]);
    }
    p[(blockIdx.z * (size_t)m.n_row + row) * m.width + j] = (uint16_t)kv_f16_bits(__float_as_uint(v));
}

extern "C" int kv_map_dev(const kv_gpu_map *m, const void *q, const void *k, const float *lse, void *p, kv_gpu_stream s)
{
    if (!m->n_row) return 0;
    if (!m->group || m->n_row > 65535 || m->n_head > 65535 || m->d > 4096) return cudaErrorInvalidValue;
    dim3 grid(blocks_for(m->width, THREADS, INT32_MAX), m->n_row, m->n_head);
    map_rows<<<grid, THREADS, 4 * (size_t)m->d, s>>>(*m, q, k, lse, (uint16_t *)p);
    return cudaGetLastError();
}

/* ------------------------------------------------------------------------------------------------ weights */
static __global__ void random_weights(uint64_t seed, uint64_t first, size_t n, float scale, void *out, int bits)
{
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint32_t u = __float_as_uint(kv_random_weight(seed, first + i, scale));
        if (bits == 32) {
            ((uint32_t *)out)[i] = u;
        } else {
            ((uint16_t *)out)[i] = (uint16_t)(bits == 17 ? kv_bf16_bits(u) : kv_f16_bits(u));
        }
    }
}

extern "C" int kv_random_dev(uint64_t seed, uint64_t first, size_t n, float scale, void *out, int bits, kv_gpu_stream s)
{
    if (!n) return 0;
    random_weights<<<blocks_for(n, THREADS, 4096), THREADS, 0, s>>>(seed, first, n, scale, out, bits);
    return cudaGetLastError();
}
