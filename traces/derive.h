/* derive.h - attention recomputed from a trace's Q and K, in double, by the definition:
 *     p[i][j] = exp(s[i][j] - lse[i]),  s = scale * q_i.k_j (capped),  j <= i and inside the layer's window.
 * The slow and obvious version, for looking and checking; replays use kernels/. */
#ifndef KV_DERIVE_H
#define KV_DERIVE_H

#include "traces/trace.h"

/* One row: p[0..row] (0 where a window hides the column) and the log-sum-exp of its scores. */
typedef kv_status (*kvt_row_fn)(void *ctx, uint32_t row, const double *p, double lse, kv_error *err);

/* Rows a, a+step, ... below b of query head `head` (of the trace) in order. KV_EMISSING when Q or K is not stored. */
kv_status kvt_derive(const kv_trace *t, uint32_t layer, uint32_t head, uint32_t a, uint32_t b, uint32_t step,
                     kvt_row_fn fn, void *ctx, kv_error *err);

/* One row's largest p, its (lowest) column, entropy in nats, sum of squares. */
void kvt_row_stat(const double *p, uint32_t row, float stat[4]);

#endif
