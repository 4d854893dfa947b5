/* branches.cu - how the rows of branches differ from those of the full cache (cuda.h): logits, and distances. One block
 * a row; sums in double, in an order that the shape fixes. */
#include "kernels/block.cuh"
#include "kernels/cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

namespace
{
const int THREADS = 256;

/* A thread's largest logits, descending. It meets them by ascending position, so equal ones stay in that order. */
struct largest {
    float v[KV_TOP];
    uint32_t at[KV_TOP];
    __device__ largest()
    {
#pragma unroll
        for (int k = 0; k < KV_TOP; k++) v[k] = -CUDART_INF_F, at[k] = UINT32_MAX;
    }
    __device__ void meet(float x, uint32_t i)
    {
        if (!(x > v[KV_TOP - 1])) return;
        v[KV_TOP - 1] = x, at[KV_TOP - 1] = i;
#pragma unroll
        for (int k = KV_TOP - 1; k > 0; k--) {
            if (!(v[k] > v[k - 1])) break;
            float w = v[k];
            uint32_t j = at[k];
            v[k] = v[k - 1], at[k] = at[k - 1], v[k - 1] = w, at[k - 1] = j;
        }
    }
    /* The first as a number that grows with the logit and falls with its position; 0: there is none. */
    __device__ unsigned long long key() const
    {
        if (at[0] == UINT32_MAX) return 0;
        uint32_t u = __float_as_uint(v[0] == 0 ? 0.f : v[0]); /* -0 equals +0 */
        u = u & 0x80000000u ? ~u : u | 0x80000000u;
        return (unsigned long long)u << 32 | (0xffffffffu - at[0]);
    }
    __device__ void drop()
    {
#pragma unroll
        for (int k = 0; k + 1 < KV_TOP; k++) v[k] = v[k + 1], at[k] = at[k + 1];
        v[KV_TOP - 1] = -CUDART_INF_F, at[KV_TOP - 1] = UINT32_MAX;
    }
};

struct room {
    float top[32];
    double sum[32];
    unsigned long long key[32];
};

/* ln sum exp of a row, and of all threads' largest the row's. */
__device__ double finish_row(float top, double part, largest &mine, uint32_t (&found)[KV_TOP], room &s)
{
    float all = kv_over_block(top, s.top, [](float a, float b) { return fmaxf(a, b); });
    double sum = top > -CUDART_INF_F ? part * exp((double)top - (double)all) : 0;
    sum = kv_over_block(sum, s.sum, [](double a, double b) { return a + b; });
    for (int k = 0; k < KV_TOP; k++) {
        unsigned long long key = mine.key();
        unsigned long long best =
            kv_over_block(key, s.key, [](unsigned long long a, unsigned long long b) { return a > b ? a : b; });
        found[k] = best ? 0xffffffffu - (uint32_t)best : UINT32_MAX;
        if (best && key == best) mine.drop();
    }
    return log(sum) + (double)all;
}

__global__ void __launch_bounds__(THREADS)
    logit_rows(size_t n_vocab, const float *logits, const uint32_t *target, kv_logit_row *out)
{
    __shared__ room s;
    const float *l = logits + (size_t)blockIdx.x * n_vocab;
    float top = -CUDART_INF_F;
    double part = 0;
    largest mine;
    uint32_t found[KV_TOP];
    for (size_t i = threadIdx.x; i < n_vocab; i += THREADS) {
        float v = l[i];
        if (v > top) part *= expf(top - v), top = v; /* the first time expf(-inf) = 0 */
        part += expf(v - top);
        mine.meet(v, (uint32_t)i);
    }
    double lse = finish_row(top, part, mine, found, s);
    if (threadIdx.x) return;
    kv_logit_row *to = out + blockIdx.x;
    to->lse = lse, to->nll = (float)(lse - (double)l[target[blockIdx.x]]);
    for (int k = 0; k < KV_TOP; k++) to->top[k] = found[k];
}

__global__ void __launch_bounds__(THREADS)
    logit_compare(size_t n_vocab, const float *logits, size_t first, size_t n_base, const float *base,
                  const kv_logit_row *said, const uint32_t *target, float *out)
{
    __shared__ room s;
    const size_t which = (first + blockIdx.x) % n_base;
    const float *l = logits + (size_t)blockIdx.x * n_vocab, *b = base + which * n_vocab;
    const kv_logit_row *full = said + which;
    const float shift = (float)full->lse, rest = (float)(full->lse - (double)shift);
    float top = -CUDART_INF_F;
    double part = 0, sum = 0, gain = 0; /* of p, of p (base - logit) */
    largest mine;
    uint32_t found[KV_TOP];
    for (size_t i = threadIdx.x; i < n_vocab; i += THREADS) {
        float v = l[i], w = b[i], p = expf(w - shift - rest);
        if (v > top) part *= expf(top - v), top = v;
        part += expf(v - top);
        sum += (double)p, gain += (double)p * ((double)w - (double)v);
        mine.meet(v, (uint32_t)i);
    }
    double lse = finish_row(top, part, mine, found, s);
    auto add = [](double x, double y) { return x + y; };
    sum = kv_over_block(sum, s.sum, add);
    gain = kv_over_block(gain, s.sum, add);
    if (threadIdx.x) return;
    double kl = gain / sum + lse - full->lse;
    int common = 0;
    for (int i = 0; i < KV_TOP; i++)
        for (int j = 0; j < KV_TOP; j++) common += found[i] == full->top[j] && found[i] != UINT32_MAX;
    float *to = out + 4 * (size_t)blockIdx.x;
    to[0] = (float)(lse - (double)l[target[which]]) - full->nll;
    to[1] = kl <= 0 ? 0.f : (float)kl; /* a NaN stays one */
    to[2] = found[0] == full->top[0];
    to[3] = (float)common / KV_TOP;
}

__device__ float element(const void *p, size_t i, int bits)
{
    if (bits == 32) return ((const float *)p)[i];
    return bits == 17 ? __bfloat162float(((const __nv_bfloat16 *)p)[i]) : __half2float(((const __half *)p)[i]);
}

/* A warp takes every so many units. */
__global__ void row_distance(size_t n_base, size_t n_unit, size_t width, int bits, const void *base, const void *x,
                             float *out)
{
    __shared__ double part[32];
    const size_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const size_t at = blockIdx.x * n_unit * width, from = blockIdx.x % n_base * n_unit * width;
    double mean = 0;
    for (size_t u = warp; u < n_unit; u += warps) {
        double far = 0, size = 0;
        for (size_t i = u * width + lane; i < (u + 1) * width; i += 32) {
            float b = element(base, from + i, bits), d = b - element(x, at + i, bits);
            far += (double)d * (double)d, size += (double)b * (double)b;
        }
        for (int i = 16; i; i /= 2) {
            far += __shfl_xor_sync(0xffffffff, far, i);
            size += __shfl_xor_sync(0xffffffff, size, i);
        }
        if (size > 0) mean += sqrt(far / size);
    }
    if (!lane) part[warp] = mean;
    __syncthreads();
    if (threadIdx.x) return;
    for (size_t w = 1; w < warps; w++) mean += part[w];
    out[blockIdx.x] = (float)(mean / (double)n_unit);
}
} // namespace

extern "C" int kv_logit_rows_dev(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target,
                                 kv_logit_row *out, cudaStream_t stream)
{
    if (!n_row) return 0;
    if (n_row > INT32_MAX || !n_vocab || n_vocab >= UINT32_MAX) return cudaErrorInvalidValue;
    logit_rows<<<(unsigned)n_row, THREADS, 0, stream>>>(n_vocab, logits, target, out);
    return cudaGetLastError();
}

extern "C" int kv_logit_compare_dev(size_t n_row, size_t n_vocab, const float *logits, size_t first, size_t n_base,
                                    const float *base, const kv_logit_row *said, const uint32_t *target, float *out,
                                    cudaStream_t stream)
{
    if (!n_row) return 0;
    if (n_row > INT32_MAX || !n_vocab || n_vocab >= UINT32_MAX || !n_base) return cudaErrorInvalidValue;
    logit_compare<<<(unsigned)n_row, THREADS, 0, stream>>>(n_vocab, logits, first, n_base, base, said, target, out);
    return cudaGetLastError();
}

extern "C" int kv_row_distance_dev(size_t n_row, size_t n_base, size_t n_unit, size_t width, int bits,
                                   const void *base, const void *x, float *out, cudaStream_t stream)
{
    if (!n_row) return 0;
    if (n_row > INT32_MAX || !n_base || !n_unit || !width || (bits != 32 && bits != 16 && bits != 17))
        return cudaErrorInvalidValue;
    const unsigned warps = n_unit < 8 ? (unsigned)n_unit : 8;
    row_distance<<<(unsigned)n_row, 32 * warps, 0, stream>>>(n_base, n_unit, width, bits, base, x, out);
    return cudaGetLastError();
}
