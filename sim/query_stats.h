/* query_stats.h - what Expected Attention and CAPKV share: queries before RoPE, the average rotation of the positions
 * to come, Gram matrices and quadratic forms (policies.md 8.1).
 *
 * Rotation turns elements j and j + n_pair of a head by position * inv_freq[j], cos and sin times the trace's mscale;
 * elements from 2 * n_pair on stay. cos and sin are the C library's in double, rounded to float (as models hold them),
 * so a last bit of the library hardly ever shows; everything else is + - * / in a fixed order. Square matrices have
 * rows of kv_pad4(d) doubles, of which the lower triangle counts. */
#ifndef KV_QUERY_STATS_H
#define KV_QUERY_STATS_H

#include "sim/layer.h"

typedef struct {
    uint32_t n_pair;
    float *cos, *sin;            /* [L][n_pair], or NULL when no row is turned back */
    double *mean_cos, *mean_sin; /* [n_pair] over positions L..L+n_future-1 */
    double undo;                 /* 1 / mscale^2 */
} kv_rotation;

static inline size_t kv_pad4(size_t d)
{
    return (d + 3) / 4 * 4;
}

/* Radians per position of pair j; the trace must know its RoPE (rope_theta or inv_freq). */
float kv_rope_frequency(const kv_trace_info *in, uint32_t j);
/* rows: with the tables to turn rows 0..L-1 back. KV_EMISSING when the trace does not know its RoPE; `who` is the
 * scorer. */
kv_status kv_rotation_open(const kv_layer *l, const char *who, uint32_t n_future, bool rows, kv_rotation *r,
                           kv_error *err);
void kv_rotation_close(kv_rotation *r);
/* out [L - first][d] = rows first..L-1 of q [L][d] as they were before RoPE. */
void kv_rotation_undo(const kv_rotation *r, const kv_layer *l, uint32_t first, const float *q, float *out);
/* mean [d] = R mean and, unless NULL, cov = R cov R^T with the average rotation R; cov symmetric, both triangles given.
 */
void kv_rotation_future(const kv_rotation *r, size_t d, double *mean, double *cov);

/* mean [d] of n >= 1 rows x [n][d]. */
void kv_mean_row(size_t n, size_t d, const float *x, double *mean);
/* g += sum_r w[r] (x[r] - mean)(x[r] - mean)^T, lower triangle (what stands right of it is overwritten too); w NULL =
 * 1, mean NULL = 0. False when out of memory. */
bool kv_gram(size_t n, size_t d, const float *x, const double *w, const double *mean, double *g);
/* out[r] = <m, y> with y = lower x[r] and m = x[r], or m = y when `square`. False when out of memory. */
bool kv_lower_forms(size_t n, size_t d, const double *lower, const float *x, bool square, double *out);
/* a = I + a positive semidefinite matrix (lower triangle) becomes the inverse of its Cholesky factor, so that
 * x^T a^-1 x = ||a' x||^2. */
void kv_cholesky_inverse(size_t d, double *a);

/* score[u][0..sinks) = a number above every other score of the layer, the same for all units. */
void kv_raise_sinks(const kv_layer *l, uint32_t n_unit, uint32_t sinks, float *score);
/* exp x for x <= 0 of any size, and NaN for NaN. */
double kv_exp_below(double x);

#endif
