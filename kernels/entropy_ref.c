/* entropy_ref.c - sum of -a ln(a + eps) in double; the logarithm is the one of math.h. */
#include "kernels/kernels.h"
#include "kernels/math.h"

double kv_entropy_ref(size_t n, const float *a, double eps)
{
    double lane[8] = {0};
    for (size_t i = 0; i < n; i++) lane[i % 8] -= a[i] * kv_logd(a[i] + eps);
    return kv_sum8(lane);
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
        for (size_t r = 0; r < n_row; r++) mean[i] += (double)p[r * ld + i] / (double)n_row;
        for (size_t r = 0; r < n_row; r++) sq[i] += (p[r * ld + i] - mean[i]) * (p[r * ld + i] - mean[i]);
    }
}
