/* random.h - weights that nobody trained, the same bytes on every CPU and GPU: element i of a tensor depends on the
 * tensor's seed and on i alone, so any part of it can be made anywhere, in any order. */
#ifndef KV_RANDOM_H
#define KV_RANDOM_H

#include "kernels/half.h"

#ifdef __CUDACC__
#define KV_RANDOM __host__ __device__ static inline
#else
#define KV_RANDOM static inline
#endif

/* Near normal with standard deviation `scale`, at most 3.46 scale, and a bfloat16: the sum of four uniform 16-bit
 * numbers of a splitmix64 output, an exact integer, times a factor, rounded. */
KV_RANDOM float kv_random_weight(uint64_t seed, uint64_t i, float scale)
{
    uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    int32_t sum = (int32_t)(z & 0xffff) + (int32_t)(z >> 16 & 0xffff) + (int32_t)(z >> 32 & 0xffff) +
                  (int32_t)(z >> 48) - 2 * 0xffff;
    float v = (float)sum * (scale * 0x1.bb67aep-16f); /* the sum's deviation is 65536 / sqrt(3) */
    uint32_t u;
    memcpy(&u, &v, 4);
    u = kv_bf16_bits(u) << 16;
    memcpy(&v, &u, 4);
    return v;
}

#endif
