/* project_ref.c - norms of projected rows, in double. */
#include "kernels/kernels.h"

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
