/* project.c - norms of projected rows: OpenBLAS on blocks of rows and of outputs, squares summed in double. */
#include "kernels/blas.h"
#include "kernels/isa.h"
#include "kernels/lanes.h"

#include <math.h>
#include <stdlib.h>

#define ROWS 256
#define OUTS 256

static double plain(size_t n, const float *y)
{
    return kv_squares_of(n, y);
}

KV_V3 static double v3(size_t n, const float *y)
{
    return kv_squares_of(n, y);
}

bool kv_project_norm(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm)
{
    if (n_in > KV_BLAS_MAX) return false;
    float *y = malloc(ROWS * OUTS * sizeof *y);
    if (!y) return false;
    for (size_t r = 0; r < n_row; r++) norm[r] = 0;
    for (size_t r0 = 0; r0 < n_row && n_in > 0; r0 += ROWS) {
        size_t m = n_row - r0 < ROWS ? n_row - r0 : ROWS;
        for (size_t o = 0; o < n_out; o += OUTS) {
            size_t n = n_out - o < OUTS ? n_out - o : OUTS;
            kv_sgemm_nt(m, n, n_in, 1, x + r0 * n_in, n_in, w + o * n_in, n_in, 0, y, OUTS);
            for (size_t r = 0; r < m; r++) norm[r0 + r] += (kv_has_v3() ? v3 : plain)(n, y + r * OUTS);
        }
    }
    for (size_t r = 0; r < n_row; r++) norm[r] = sqrt(norm[r]);
    free(y);
    return true;
}
