/* bounds.h - what three papers bound the error of a layer's attention output by, beside that error: all in the L1 norm
 * of y - y_hat, y = sum_h o_h W_O[h] of one row.
 *
 *   Ada-KV Theorem 3.1   2 C sum_h (1 - R_h), C = max over heads and visible tokens of n_i = ||v_i W_O[h]||_1
 *   CriticalKV           sum_h theta_h, theta = sum_i p_i n_i - (2 - 1/R) sum_S p_i n_i
 *   LAVa Theorem 1       2 ||W_O^T||_1 sum_h (1 - R_h) max_i ||v_i||_1
 *
 * All follow from y - y_hat = sum_h sum_i (p_i - p_hat_i) v_i W_O[h], p_hat = p/R on S and 0 elsewhere, with the
 * triangle inequality: theta is sum_i |p_i - p_hat_i| n_i itself, and sum_i |p_i - p_hat_i| = 2 (1 - R). So theta <=
 * Ada-KV's
 * <= LAVa's for every row. Sets whose weights are not p/R (reindex=1, select=mixdim) have no bound here. */
#ifndef KV_BOUNDS_H
#define KV_BOUNDS_H

#include "sim/measure.h"

/* Of one layer; all row indices are measured rows. */
struct kv_bounds {
    float *n;          /* [Hq][n_token] ||v_i W_O[h]||_1 */
    double *largest_n; /* [n_row] over all heads and tokens the row sees */
    double *largest_v; /* [Hq][n_row] ||v_i||_1 over tokens the row sees */
    double wo;         /* ||W_O^T||_1: largest sum of |W_O| over outputs, of one input */
};

/* The layer must hold W_O. */
kv_status kv_bounds_open(const kv_measure *m, struct kv_bounds *b, kv_error *err);
void kv_bounds_close(struct kv_bounds *b);
/* Add all measured rows of points (indices) to m->out->bound of this layer: prefixes of their rankings when sch is
 * NULL, else one point with its schedule. */
kv_status kv_bounds_add(kv_measure *m, const struct kv_bounds *b, const size_t *point, size_t n_point,
                        const kv_schedule *sch, kv_error *err);
/* The policy's weights are p/R on its kept sets. */
bool kv_bounds_apply(const kv_spec *s);

#endif
