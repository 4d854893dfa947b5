/* replay.h - what kept sets do to attention: one pass over the layers for every (policy, budget) of a plan.
 *
 * The attention of the measured rows is formed once a layer; points that share a ranking share the walk along it
 * (kv_walk: all budgets for about the price of one), points of one count what is measured there; the error through W_O
 * is one product per point. Layers are independent tasks, sums are taken in a fixed order, so the numbers do not depend
 * on the number of threads. */
#ifndef KV_REPLAY_H
#define KV_REPLAY_H

#include "sim/coverage.h"
#include "sim/metric.h"

typedef struct {
    size_t spec;   /* index into the plan's specs */
    size_t budget; /* the caller's label */
    kv_budget_resolved c;
    uint32_t nominal; /* tokens of the budget as it was given: c.tokens unless --match-bytes changed it */
    uint32_t *counts; /* [n_evict][n_unit]; for policies with schedules the replay fills in what the cut left */
} kv_point;

/* Entries of all units of a layer that a row can attend to: summed over the measured rows, and the largest. */
typedef struct {
    uint64_t sum, peak;
} kv_row_slots;

typedef struct {
    size_t n_point;
    kv_row_slots *rows;  /* [n_point][n_evict]; zero where the kept set is a prefix of a ranking (it does not change) */
    uint64_t *read;      /* [n_point][n_evict][n_q_head] entries each unit's rows saw, likewise; units first */
    kv_head_sums *head;  /* [n_point][n_evict][n_q_head] */
    double *layer_error; /* [n_point][n_evict] sums over rows; NULL when there is no W_O or it was not wanted */
    kv_coverage *coverage; /* evidence and breadth; NULL when not wanted */
    kv_bound_sums *bound;  /* [n_point][n_evict]; NULL when there is no W_O or none of them was wanted */
    kv_step_sums *step;    /* [n_point][n_row] over all layers; NULL unless KV_M_STEPS was wanted */
    bool own_output;       /* layer_error is relative to the layer's own output: the trace has no ||x|| */
} kv_replay;

#define KV_M_STEPS KV_M_BIT(63) /* beside the metrics: their values at every row */

/* Makes and fills the counts of all points (kv_plan_counts); on failure those that were made are the caller's to free.
 */
kv_status kv_points_count(const kv_plan *p, kv_point *point, size_t n_point, uint32_t threads, kv_error *err);
/* print [n_point] = kv_plan_fingerprint of each point's kept sets. */
void kv_points_print(const kv_plan *p, const kv_point *point, size_t n_point, uint32_t threads, uint64_t *print);

/* wanted = metrics, and KV_M_STEPS. The counts of scheduled points are written. tick(ctx, layers done) is called after
 * each layer, from any thread (NULL = no). KV_EMISSING when the trace has no measured rows; KV_EINTERRUPTED after a
 * signal. */
kv_status kv_replay_run(const kv_plan *p, const kv_point *point, size_t n_point, kv_metric_set wanted, uint32_t threads,
                        void (*tick)(void *ctx, size_t done), void *ctx, kv_replay *out, kv_error *err);
void kv_replay_free(kv_replay *r);

#endif
