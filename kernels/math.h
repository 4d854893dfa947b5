/* math.h - the arithmetic that decides kept sets, the same bytes on every machine and compiler.
 *
 * libm's expf and tanhf differ between C libraries, and a contracted multiply-add differs between compilers, so EXACT
 * kernels use only what IEEE 754 pins down: + - * / of floats, and fused multiply-adds that are written out. Where the
 * machine has no such instruction fmaf of the C library gives the same result slowly.
 * All functions here are branch-free, so that a compiler vectorises a loop over them. */
#ifndef KV_MATH_H
#define KV_MATH_H

#include "kernels/kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 || defined(__FAST_MATH__)
#error "EXACT kernels need float arithmetic in float (on 32-bit x86: -msse2 -mfpmath=sse) and no -ffast-math"
#endif

/* The same source serves a device, in files compiled without contraction (exact.cu). */
#ifdef __CUDACC__
#define KV_INLINE static __host__ __device__ __forceinline__
#define KV_FMAF   fmaf
#else
#define KV_INLINE static inline __attribute__((always_inline))
#define KV_FMAF   __builtin_fmaf
#endif

KV_INLINE uint32_t kv_float_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
KV_INLINE float kv_bits_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* e^x within 1 ulp (measured over every float: SPEED.md). 0 below -87 (results are never subnormal), infinity above
 * 88.72283, NaN for NaN. x = n ln 2 + r, |r| <= ln 2 / 2; e^r by a polynomial; n goes into the exponent. */
KV_INLINE float kv_expf(float x)
{
    const float shift = 12582912.f; /* 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits */
    float t = KV_FMAF(x, 1.44269504f, shift);
    uint32_t n = kv_float_bits(t) << 23;
    float nf = t - shift;
    float r = KV_FMAF(nf, -0.693145752f, x); /* ln 2 in two parts, the first with few bits */
    r = KV_FMAF(nf, -1.42860677e-6f, r);
    float p = 1.38144672e-3f;
    p = KV_FMAF(p, r, 8.36878084e-3f);
    p = KV_FMAF(p, r, 4.16683927e-2f);
    p = KV_FMAF(p, r, 1.66665196e-1f);
    p = KV_FMAF(p, r, 4.99999940e-1f);
    p = KV_FMAF(p, r, 1.f);
    p = KV_FMAF(p, r, 1.f);
    /* Special cases by masks: given a choice, gcc branches around the polynomial and vectorises nothing. */
    uint32_t y = kv_float_bits(p) + n;
    uint32_t low = -(uint32_t)(x < -87.f), high = -(uint32_t)(x > 88.7228317f), nan = -(uint32_t)(x != x);
    return kv_bits_float((y & ~(low | high)) | (high & 0x7f800000u) | (nan & 0x7fc00000u));
}

/* tanh x within 2 ulp: an odd polynomial near 0, where 1 - 2/(e^2x + 1) would cancel. */
KV_INLINE float kv_tanhf(float x)
{
    float a = kv_bits_float(kv_float_bits(x) & 0x7fffffffu), z = x * x;
    float p = -5.70498872745e-3f;
    p = KV_FMAF(p, z, 2.06390887954e-2f);
    p = KV_FMAF(p, z, -5.37397155531e-2f);
    p = KV_FMAF(p, z, 1.33314422036e-1f);
    p = KV_FMAF(p, z, -3.33332819422e-1f);
    float small = KV_FMAF(p * z, x, x);
    float big = 1.f - 2.f / (kv_expf(2.f * a) + 1.f);
    big = kv_bits_float(kv_float_bits(big) | (kv_float_bits(x) & 0x80000000u));
    uint32_t near = -(uint32_t)(a < 0.625f);
    return kv_bits_float((kv_float_bits(small) & near) | (kv_float_bits(big) & ~near));
}

/* The soft cap of a score, softcap > 0. */
KV_INLINE float kv_cap(float score, float softcap)
{
    return softcap * kv_tanhf(score / softcap);
}

/* The score: one chain of fused multiply-adds over the head size, in order. */
KV_INLINE float kv_score(const kv_attn_shape *s, const float *q, const float *k)
{
    float dot = 0;
    for (size_t i = 0; i < s->d; i++) dot = KV_FMAF(q[i], k[i], dot);
    return s->softcap > 0 ? kv_cap(dot * s->scale, s->softcap) : dot * s->scale;
}

/* Row r sees keys *lo <= j < *hi. */
KV_INLINE void kv_visible(const kv_attn_shape *s, size_t r, size_t *lo, size_t *hi)
{
    size_t end = s->row0 + r + 1;
    *hi = end < s->n_key ? end : s->n_key;
    *lo = s->window && end > s->window ? end - s->window : 0;
    if (*lo > *hi) *lo = *hi;
}

/* A score as an integer that grows as the score falls: the usual monotone image of a float, inverted. */
KV_INLINE uint32_t kv_rank_key(float score)
{
    uint32_t u = kv_float_bits(score), mag = u & 0x7fffffff;
    u = mag == 0 ? 0 : u;                      /* -0 is 0 */
    u ^= (u >> 31 ? 0xffffffff : 0x80000000);  /* ascending */
    return mag > 0x7f800000 ? UINT32_MAX : ~u; /* descending, NaN last: no number has this key (-inf: ff800000) */
}

/* The sum of eight lanes, in the order every EXACT kernel adds them. */
KV_INLINE double kv_sum8(const double l[8])
{
    return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}

/* L2 norm of n floats, summed in double in order. */
KV_INLINE double kv_length(size_t n, const float *x)
{
    double s = 0;
    for (size_t i = 0; i < n; i++) s += (double)x[i] * x[i];
    return sqrt(s);
}

/* ln x within 1.15 ulp (measured over every normal float) for normal x > 0: x = m 2^e with m in [sqrt(1/2), sqrt 2), ln
 * m by a polynomial. For sums of many terms, where kv_logd would be most of the time. */
KV_INLINE float kv_logf(float x)
{
    uint32_t up = kv_float_bits(x) + (0x3f800000u - 0x3f3504f3u); /* as in kv_logd */
    float f = kv_bits_float((up & 0x007fffffu) + 0x3f3504f3u) - 1;
    float e = kv_bits_float(up >> 23 | 0x4b000000u) - (8388608.f + 127.f);
    float p = 8.73484090e-2f;
    p = KV_FMAF(p, f, -1.43075213e-1f);
    p = KV_FMAF(p, f, 1.49179742e-1f);
    p = KV_FMAF(p, f, -1.65705085e-1f);
    p = KV_FMAF(p, f, 1.99620724e-1f);
    p = KV_FMAF(p, f, -2.50017554e-1f);
    p = KV_FMAF(p, f, 3.33339512e-1f);
    p = KV_FMAF(p, f, -4.99999911e-1f);
    return KV_FMAF(e, 0.693147182f, KV_FMAF(f * f, p, f));
}

/* ln x in double for normal x > 0, from + - * / alone (no fused operations: contraction is off), so that every machine
 * and compiler gives the same bytes and a loop over it vectorises. x = m 2^e with m in [sqrt(1/2), sqrt 2), ln m = 2
 * atanh((m-1)/(m+1)); relative error below 1e-15 away from 1. */
KV_INLINE double kv_logd(double x)
{
    uint64_t u;
    memcpy(&u, &x, 8);
    /* adding the distance of sqrt(1/2) from 1 makes the exponent field round at sqrt 2 */
    uint64_t up = u + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
    uint64_t bits = (up & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu, raw = (up >> 52) | 0x4330000000000000u;
    double m, e;
    memcpy(&m, &bits, 8);
    memcpy(&e, &raw, 8); /* 2^52 + exponent field: an integer to double without a conversion instruction */
    e -= 4503599627370496.0 + 1023.0;
    double z = (m - 1) / (m + 1), w = z * z, s = 1.0 / 21;
    s = s * w + 1.0 / 19, s = s * w + 1.0 / 17, s = s * w + 1.0 / 15, s = s * w + 1.0 / 13, s = s * w + 1.0 / 11;
    s = s * w + 1.0 / 9, s = s * w + 1.0 / 7, s = s * w + 1.0 / 5, s = s * w + 1.0 / 3, s = s * w + 1;
    return 2 * z * s + e * 0.69314718055994531;
}

#endif
