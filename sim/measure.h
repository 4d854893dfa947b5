/* measure.h - one layer of a replay: from kept sets to sums over rows.
 *
 *   measure.c           loads the layer, the full cache's rows, and calls the two below
 *   measure_prefix.c    points whose kept sets are prefixes of a ranking
 *   measure_schedule.c  points whose kept sets change from row to row, or are no prefix of anything
 *   account.c           the only place where rows become sums: a metric of rows is added there
 *
 * The boundary a device backend stands behind is kv_measure_prefixes: in go the layer (q_row, k, v, wo), the full
 * cache's rows and, from the plan, rankings' orders and the points' counts; out come kv_head_sums and layer_error of
 * the prefix points of this layer, nothing else. */
#ifndef KV_MEASURE_H
#define KV_MEASURE_H

#include "sim/replay.h"
#include "sim/schedule.h"

/* One layer being measured; belongs to one thread. Hq = query heads, d = head size, n_row = measured rows. */
typedef struct {
    const kv_plan *plan;
    const kv_point *point;
    size_t n_point;
    unsigned wanted; /* bit per kv_metric_id */
    bool errors;     /* some metric of outputs is wanted */
    bool contest;    /* contested recall is wanted */
    kv_layer l;
    double *ref;        /* [n_row] ||x|| or the norm of the layer's own output; NULL without layer errors */
    float *o, *lse;     /* [Hq][n_row][d], [Hq][n_row]: the full cache's outputs and log-sum-exps */
    double *norm_o;     /* [Hq][n_row] ||o|| */
    float *base_out;    /* [Hq][n_row][d]: sum p v over tokens after the cut */
    double *base_mass;  /* [Hq][n_row]: their mass */
    uint8_t *contested; /* [n_token] 1 = outside F */
    kv_replay *out;
} kv_measure;

/* Measure evicting layer `index` of all points: fills out's entries of that layer. */
kv_status kv_measure_layer(kv_measure *m, uint32_t index, kv_error *err);
kv_status kv_measure_prefixes(kv_measure *m, kv_error *err);
kv_status kv_measure_schedules(kv_measure *m, kv_error *err);

/* Points in flight at a time are bounded by rows: KV_MEASURE_ROWS of every point. */
enum { KV_MEASURE_ROWS = 128 };

/* What one kept set leaves of measured rows r0..r0+n-1 of query head `head`; arrays of n. */
typedef struct {
    uint32_t head;
    size_t r0, n;
    bool whole;              /* nothing visible was dropped */
    const double *mass;      /* of what is visible */
    const double *after;     /* of what is visible behind the cut */
    const double *contested; /* of what is visible outside F; NULL = not wanted */
    const double *error2;    /* ||o - o_hat||^2; NULL = no errors wanted */
    const double *dot;       /* o . (o - o_hat), likewise */
    const double *variation; /* total variation, where it is not 1 - mass; else NULL */
} kv_kept_rows;

/* Add the rows to the sums of the points that keep this set (all of them have had the same rows so far). Rows of a
 * head come in order, so the sums do not depend on how they were cut into blocks. */
void kv_account_rows(kv_measure *m, const size_t *point, size_t n_point, const kv_kept_rows *x);
/* The same for whole rows of the layer: diff [n][Hq * d] = o - o_hat of all heads of rows r0.. at one point. */
kv_status kv_account_layer(kv_measure *m, size_t point, size_t r0, size_t n, const float *diff, kv_error *err);

/* error2, dot [n] and diff [n][d] = o - o_hat of rows o, o_hat [n][d]; diff may be o_hat. */
void kv_compare_outputs(size_t n, size_t d, const float *o, const float *o_hat, double *error2, double *dot,
                        float *diff);

kv_head_sums *kv_measure_sums(const kv_measure *m, size_t point, uint32_t head);

#endif
