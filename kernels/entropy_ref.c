/* entropy_ref.c - sum of -a ln(a + eps): terms in float, with the logarithm of math.h, their sum in double. */
#include "kernels/kernels.h"
#include "kernels/math.h"

double kv_entropy_ref(size_t n, const float *a, float eps)
{
    double sum = 0;
    for (size_t b = 0; b < n; b += KV_SUM_BLOCK) {
        double lane[8] = {0};
        for (size_t i = b; i < n && i < b + KV_SUM_BLOCK; i++) lane[i % 8] += a[i] * kv_logf(a[i] + eps);
        sum -= kv_sum8(lane);
    }
    return sum;
}

double kv_diff_squares_ref(size_t n, const float *a, const float *b, float *diff)
{
    double lane[8] = {0};
    for (size_t i = 0; i < n; i++) {
        float d = a[i] - b[i];
        if (diff) diff[i] = d;
        lane[i % 8] += (double)d * d;
    }
    return kv_sum8(lane);
}

void kv_column_spread_ref(size_t n_row, size_t n, const float *p, size_t ld, double *mean, double *sq)
{
    for (size_t i = 0; i < n; i++) {
        mean[i] = sq[i] = 0;
        for (size_t r = 0; r < n_row; r++) mean[i] += p[r * ld + i];
        mean[i] /= (double)n_row;
        for (size_t r = 0; r < n_row; r++) sq[i] += (p[r * ld + i] - mean[i]) * (p[r * ld + i] - mean[i]);
    }
}
