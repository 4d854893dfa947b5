/* project_ref.c - norms of projected rows: L2 in double, L1 as a chain per output (EXACT). */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <math.h>

bool kv_project_norm_ref(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm)
{
    for (size_t r = 0; r < n_row; r++) {
        double sq = 0;
        for (size_t o = 0; o < n_out; o++) {
            double y = 0;
            for (size_t i = 0; i < n_in; i++) y += (double)x[r * n_in + i] * w[o * n_in + i];
            sq += y * y;
        }
        norm[r] = sqrt(sq);
    }
    return true;
}

bool kv_project_norm_upper_ref(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm)
{
    if (n_out > n_in) return false;
    for (size_t r = 0; r < n_row; r++) {
        double sq = 0;
        for (size_t o = 0; o < n_out; o++) {
            double y = 0;
            for (size_t i = o; i < n_in; i++) y += (double)x[r * n_in + i] * w[o * n_in + i];
            sq += y * y;
        }
        norm[r] = sqrt(sq);
    }
    return true;
}

bool kv_project_l1_ref(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, size_t ld_w,
                       double *norm)
{
    for (size_t r = 0; r < n_row; r++) {
        double lane[8] = {0};
        for (size_t o = 0; o < n_out; o++) {
            float y = 0;
            for (size_t i = 0; i < n_in; i++) y = fmaf(x[r * n_in + i], w[o * ld_w + i], y);
            lane[o % 8] += fabsf(y);
        }
        norm[r] = kv_sum8(lane);
    }
    return true;
}
