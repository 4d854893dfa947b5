/* entropy.c - the same loops with the lanes as vectors; one source for both instruction sets. */
#include "kernels/isa.h"
#include "kernels/lanes.h"

KV_INLINE double entropy(size_t n, const float *a, float eps)
{
    float term[KV_SUM_BLOCK];
    double sum = 0;
    for (; n; a += KV_SUM_BLOCK, n -= n < KV_SUM_BLOCK ? n : KV_SUM_BLOCK) {
        size_t m = n < KV_SUM_BLOCK ? n : KV_SUM_BLOCK;
        for (size_t i = 0; i < m; i++) term[i] = a[i] * kv_logf(a[i] + eps);
        sum -= kv_sum_of(m, term);
    }
    return sum;
}

KV_INLINE double squares(size_t n, const float *a, const float *b, float *diff)
{
    double lane[8] = {0};
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        kv_f8 d = KV_LOAD8(a + i) - KV_LOAD8(b + i);
        float f[8];
        memcpy(f, &d, sizeof f);
        if (diff) memcpy(diff + i, f, sizeof f);
        kv_add_lanes(true, 8, f, lane);
    }
    for (; i < n; i++) {
        float d = a[i] - b[i];
        if (diff) diff[i] = d;
        lane[i % 8] += (double)d * d;
    }
    return kv_sum8(lane);
}

KV_INLINE void spread(size_t n_row, size_t n, const float *p, size_t ld, double *mean, double *sq)
{
    for (size_t i0 = 0; i0 < n; i0 += 512) { /* columns whose sums stay in the L1 cache */
        size_t end = n - i0 < 512 ? n : i0 + 512;
        for (size_t i = i0; i < end; i++) mean[i] = sq[i] = 0;
        for (size_t r = 0; r < n_row; r++)
            for (size_t i = i0; i < end; i++) mean[i] += p[r * ld + i];
        for (size_t i = i0; i < end; i++) mean[i] /= (double)n_row;
        for (size_t r = 0; r < n_row; r++)
            for (size_t i = i0; i < end; i++) {
                double d = p[r * ld + i] - mean[i];
                sq[i] += d * d;
            }
    }
}

static double entropy_plain(size_t n, const float *a, float eps)
{
    return entropy(n, a, eps);
}

KV_V3 static double entropy_v3(size_t n, const float *a, float eps)
{
    return entropy(n, a, eps);
}

static double squares_plain(size_t n, const float *a, const float *b, float *diff)
{
    return squares(n, a, b, diff);
}

KV_V3 static double squares_v3(size_t n, const float *a, const float *b, float *diff)
{
    return squares(n, a, b, diff);
}

double kv_entropy(size_t n, const float *a, float eps)
{
    return (kv_has_v3() ? entropy_v3 : entropy_plain)(n, a, eps);
}

double kv_diff_squares(size_t n, const float *a, const float *b, float *diff)
{
    return (kv_has_v3() ? squares_v3 : squares_plain)(n, a, b, diff);
}

static void spread_plain(size_t n_row, size_t n, const float *p, size_t ld, double *mean, double *sq)
{
    spread(n_row, n, p, ld, mean, sq);
}

KV_V3 static void spread_v3(size_t n_row, size_t n, const float *p, size_t ld, double *mean, double *sq)
{
    spread(n_row, n, p, ld, mean, sq);
}

void kv_column_spread(size_t n_row, size_t n, const float *p, size_t ld, double *mean, double *sq)
{
    (kv_has_v3() ? spread_v3 : spread_plain)(n_row, n, p, ld, mean, sq);
}
