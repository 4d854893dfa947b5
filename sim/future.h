/* future.h - what the measured rows will ask for: the foresight that makes an oracle (policies.md section 9). */
#ifndef KV_FUTURE_H
#define KV_FUTURE_H

#include "sim/layer.h"
#include "sim/plan.h"
#include "sim/schedule.h"

/* mass [n_q_head][L]: attention that the first n measured rows give to each position before the cut, in double, rows
 * ascending. n <= n_row. KV_EMISSING when the trace has no measured rows. */
kv_status kv_future_mass(const kv_layer *l, uint32_t n, double *mass, kv_error *err);
/* What an entry is worth to the target: its mass (recall), or, outside F, its share of the head's mass outside F
 * (recall_contested; 0 in F). worth [n_q_head] is the factor of each query head, from kv_future_mass over all rows. */
void kv_future_worth(const kv_layer *l, uint32_t target, const double *mass, double *worth);
/* mass [n_row][n_token]: attention of each measured row times worth, summed over the query heads first..first+count-1,
 * 0 behind the row's own position and, with the contested target, in F. */
kv_status kv_future_rows(const kv_layer *l, uint32_t first, uint32_t count, uint32_t target, const double *worth,
                         float *mass, kv_error *err);

/* The sets of one layer that a rule with foresight keeps (oracle=steps, decode=belady|match|steps); fills out->at or
 * out->seen. */
kv_status kv_oracle_rows(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                         kv_schedule *out, kv_error *err);

/* Irrevocable dropping at least cost. remain [n_row + 1][n_token]: what a position has still to give from row r on (row
 * n_row: nothing); it never grows with r. live[0..n_live) = distinct positions that are there before the cut; what is
 * beyond `capacity` leaves then, and again after each row: position row_first + r arrives with row r (those between the
 * prompt and row_first with row 0). at [n_token] of what leaves gets the row it leaves before, as in kv_schedule; the
 * rest is not touched. */
typedef struct {
    uint32_t n_row, n_token, row_first, n_cut, capacity;
    const float *remain;
} kv_drops;
/* Always what has least to give (O9). Ties: the lowest position leaves. */
kv_status kv_drops_greedy(const kv_drops *d, const uint32_t *live, uint32_t n_live, int32_t *at, kv_error *err);
/* The exact least sum of what is given up (O11): minimum-cost flow, successive shortest paths, one per drop. Costs are
 * rounded to multiples of 2^-40 and then exact. Takes about n_row^2 n_token operations. */
kv_status kv_drops_exact(const kv_drops *d, const uint32_t *live, uint32_t n_live, int32_t *at, kv_error *err);

#endif
