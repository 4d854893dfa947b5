/* lanes.h - eight floats side by side, for reductions a compiler may not reorder by itself.
 * GNU vector types, so the same source serves every instruction set. */
#ifndef KV_LANES_H
#define KV_LANES_H

#include "kernels/math.h"

typedef float kv_f4 __attribute__((vector_size(16)));
typedef float kv_f8 __attribute__((vector_size(32)));
typedef int32_t kv_i8 __attribute__((vector_size(32)));
typedef double kv_d4 __attribute__((vector_size(32)));

#define KV_LOAD(type, p)                                                                                               \
    __extension__({                                                                                                    \
        type v_;                                                                                                       \
        memcpy(&v_, (p), sizeof v_);                                                                                   \
        v_;                                                                                                            \
    })
#define KV_LOAD8(p) KV_LOAD(kv_f8, p)
/* Four floats as doubles. Eight in one vector would be more than AVX2 has, and gcc 12 then goes element by element. */
#define KV_WIDE4(p) __builtin_convertvector(KV_LOAD(kv_f4, p), kv_d4)

/* Largest of n floats, -infinity for none. */
KV_INLINE float kv_max_of(size_t n, const float *x)
{
    float top = -__builtin_inff();
    size_t j = 0;
    if (n >= 8) {
        kv_f8 m = KV_LOAD8(x);
        for (j = 8; j + 8 <= n; j += 8) {
            kv_f8 v = KV_LOAD8(x + j);
            kv_i8 gt = v > m;
            m = (kv_f8)(((kv_i8)v & gt) | ((kv_i8)m & ~gt));
        }
        for (int l = 0; l < 8; l++) top = m[l] > top ? m[l] : top;
    }
    for (; j < n; j++) top = x[j] > top ? x[j] : top;
    return top;
}

/* lane[j % 8] += x[j] (or its square) for j = 0..n-1, in order. */
KV_INLINE void kv_add_lanes(const bool square, size_t n, const float *x, double lane[8])
{
    kv_d4 a = KV_LOAD(kv_d4, lane), b = KV_LOAD(kv_d4, lane + 4);
    size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        kv_d4 p = KV_WIDE4(x + j), q = KV_WIDE4(x + j + 4);
        a += square ? p * p : p;
        b += square ? q * q : q;
    }
    memcpy(lane, &a, sizeof a);
    memcpy(lane + 4, &b, sizeof b);
    for (; j < n; j++) lane[j % 8] += square ? (double)x[j] * x[j] : x[j];
}

/* Sum of n floats in double. */
KV_INLINE double kv_sum_of(size_t n, const float *x)
{
    double lane[8] = {0};
    kv_add_lanes(false, n, x, lane);
    return kv_sum8(lane);
}

/* Sum of n squares in double. */
KV_INLINE double kv_squares_of(size_t n, const float *x)
{
    double lane[8] = {0};
    kv_add_lanes(true, n, x, lane);
    return kv_sum8(lane);
}

#endif
