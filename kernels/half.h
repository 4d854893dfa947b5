/* half.h - rounding to half floats without branches, in integers and one float addition; for CPU vectors and CUDA.
 * pack_ref.c is the definition. Arguments and results are bit patterns. */
#ifndef KV_HALF_H
#define KV_HALF_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define KV_HALF __host__ __device__ static inline
#else
#define KV_HALF static inline __attribute__((always_inline))
#endif

/* yes ? a : b without a branch, which would keep gcc from vectorising around the float addition below. */
KV_HALF uint32_t kv_pick(int yes, uint32_t a, uint32_t b)
{
    uint32_t m = 0u - (uint32_t)yes;
    return (a & m) | (b & ~m);
}

/* mag + 0.5 - 0.5 for 0 <= mag < 2^-14: there the spacing of floats is 2^-24, that of subnormal halves, so the addition
 * rounds as wanted. Gives the bits of the sum (over 0.5, the half itself) or of the difference (the value). */
KV_HALF uint32_t kv_half_tiny(uint32_t mag, int difference)
{
    float x;
    memcpy(&x, &mag, 4);
    x += 0.5f;
    if (difference) x -= 0.5f;
    memcpy(&mag, &x, 4);
    return difference ? mag : mag - 0x3f000000u;
}

KV_HALF uint32_t kv_f16_bits(uint32_t u)
{
    uint32_t mag = u & 0x7fffffffu, sign = u >> 16 & 0x8000u;
    uint32_t h = (mag + 0xfffu + (mag >> 13 & 1u) - 0x38000000u) >> 13; /* exponent bias 127 -> 15, ties to even */
    h = kv_pick(mag < 0x38800000u, kv_half_tiny(mag, 0), h);
    h = kv_pick(mag >= 0x477ff000u, 0x7c00u, h); /* 65520, halfway past the largest */
    h = kv_pick(mag > 0x7f800000u, 0x7e00u | (mag >> 13 & 0x3ffu), h);
    return sign | h;
}

/* The same rounding, as a float. */
KV_HALF uint32_t kv_f16_round(uint32_t u)
{
    uint32_t mag = u & 0x7fffffffu, sign = u & 0x80000000u;
    uint32_t r = (mag + 0xfffu + (mag >> 13 & 1u)) & ~0x1fffu;
    r = kv_pick(mag < 0x38800000u, kv_half_tiny(mag, 1), r);
    r = kv_pick(mag >= 0x477ff000u, 0x7f800000u, r);
    r = kv_pick(mag > 0x7f800000u, (mag & ~0x1fffu) | 0x400000u, r);
    return sign | r;
}

KV_HALF uint32_t kv_bf16_bits(uint32_t u)
{
    uint32_t h = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 0x40u : h;
}

/* 1 when a finite u became infinite. */
KV_HALF uint32_t kv_f16_over(uint32_t u)
{
    uint32_t mag = u & 0x7fffffffu;
    return (uint32_t)(mag >= 0x477ff000u) & (uint32_t)(mag < 0x7f800000u);
}
KV_HALF uint32_t kv_bf16_over(uint32_t u)
{
    uint32_t mag = u & 0x7fffffffu;
    return (uint32_t)(mag >= 0x7f7f8000u) & (uint32_t)(mag < 0x7f800000u);
}

#endif
