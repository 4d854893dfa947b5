/* project.c - norms of projected rows. L2: OpenBLAS on blocks of rows and of outputs, squares summed in double. L1:
 * panels of 16 outputs, each output its own chain. */
#include "kernels/blas.h"
#include "kernels/isa.h"
#include "kernels/lanes.h"
#include "kernels/score.h"

#include <math.h>
#include <stdlib.h>

#define ROWS  256
#define OUTS  256
#define UPPER 96  /* outputs a block of a triangle */
#define SIZES 512 /* rows that share a panel of kv_project_l1: each block gathers all of W_O's columns again */

static double plain(size_t n, const float *y)
{
    return kv_squares_of(n, y);
}

KV_V3 static double v3(size_t n, const float *y)
{
    return kv_squares_of(n, y);
}

/* upper: w[o][i] is 0 for i < o, and those products are left out by blocks of outputs. */
static bool project(bool upper, size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm)
{
    if (n_in > KV_BLAS_MAX) return false;
    size_t outs = upper ? UPPER : OUTS;
    float *y = malloc(ROWS * OUTS * sizeof *y);
    if (!y) return false;
    for (size_t r = 0; r < n_row; r++) norm[r] = 0;
    for (size_t r0 = 0; r0 < n_row && n_in > 0; r0 += ROWS) {
        size_t m = n_row - r0 < ROWS ? n_row - r0 : ROWS;
        for (size_t o = 0; o < n_out; o += outs) {
            size_t n = n_out - o < outs ? n_out - o : outs, skip = upper ? o : 0;
            kv_sgemm_nt(m, n, n_in - skip, 1, x + r0 * n_in + skip, n_in, w + o * n_in + skip, n_in, 0, y, outs);
            for (size_t r = 0; r < m; r++) norm[r0 + r] += (kv_has_v3() ? v3 : plain)(n, y + r * outs);
        }
    }
    for (size_t r = 0; r < n_row; r++) norm[r] = sqrt(norm[r]);
    free(y);
    return true;
}

bool kv_project_norm(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm)
{
    return project(false, n_row, n_in, n_out, x, w, norm);
}

bool kv_project_norm_upper(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm)
{
    return n_out <= n_in && project(true, n_row, n_in, n_out, x, w, norm);
}

/* lane[j % 8] += |y[j]|, j = 0..n-1 in order; n <= KV_PANEL */
KV_INLINE void add_sizes(size_t n, const float *y, double lane[8])
{
    kv_d4 a = KV_LOAD(kv_d4, lane), b = KV_LOAD(kv_d4, lane + 4);
    size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        kv_f8 x = KV_LOAD8(y + j);
        kv_i8 bits = (kv_i8)x & 0x7fffffff;
        float size[8];
        memcpy(size, &bits, sizeof size);
        a += KV_WIDE4(size), b += KV_WIDE4(size + 4);
    }
    memcpy(lane, &a, sizeof a), memcpy(lane + 4, &b, sizeof b);
    for (; j < n; j++) lane[j % 8] += __builtin_fabsf(y[j]);
}

/* Blocks of rows against panels of 16 outputs; the lanes of a row live in norm's block between panels. */
KV_INLINE void l1_body(const bool isv3, size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w,
                       size_t ld_w, float *rows, float *panel, float *y, double *lane, double *norm)
{
    for (size_t r0 = 0; r0 < n_row; r0 += SIZES) {
        size_t m = n_row - r0 < SIZES ? n_row - r0 : SIZES;
        for (size_t i = 0; i < m * 8; i++) lane[i] = 0;
        for (size_t o = 0; o < n_out; o += KV_PANEL) {
            size_t n = n_out - o < KV_PANEL ? n_out - o : KV_PANEL;
            for (size_t j = 0; j < n; j++) memcpy(rows + j * n_in, w + (o + j) * ld_w, n_in * sizeof *rows);
            kv_panel_fill(isv3, n, n_in, rows, panel);
            kv_panel_dots(isv3, m, n_in, x + r0 * n_in, panel, y, KV_PANEL);
            for (size_t r = 0; r < m; r++) add_sizes(n, y + r * KV_PANEL, lane + r * 8);
        }
        for (size_t r = 0; r < m; r++) norm[r0 + r] = kv_sum8(lane + r * 8);
    }
}

static void l1_plain(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, size_t ld_w, float *rows,
                     float *panel, float *y, double *lane, double *norm)
{
    l1_body(false, n_row, n_in, n_out, x, w, ld_w, rows, panel, y, lane, norm);
}

KV_V3 static void l1_v3(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, size_t ld_w,
                        float *rows, float *panel, float *y, double *lane, double *norm)
{
    l1_body(KV_HAVE_V3, n_row, n_in, n_out, x, w, ld_w, rows, panel, y, lane, norm);
}

bool kv_project_l1(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, size_t ld_w, double *norm)
{
    float *f = malloc((2 * n_in * KV_PANEL + SIZES * KV_PANEL) * sizeof *f);
    double *lane = malloc(SIZES * 8 * sizeof *lane);
    bool ok = f && lane;
    if (ok)
        (kv_has_v3() ? l1_v3 : l1_plain)(n_row, n_in, n_out, x, w, ld_w, f, f + n_in * KV_PANEL,
                                         f + 2 * n_in * KV_PANEL, lane, norm);
    free(f), free(lane);
    return ok;
}
