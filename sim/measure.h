/* measure.h - one layer of a replay: from kept sets to sums over rows.
 *
 *   measure.c           loads the layer, decides how W_O is applied, calls the parts below
 *   measure_prefix.c    the full cache's rows, and points whose kept sets are prefixes of a ranking
 *   measure_local.c     the same when only masses are wanted: kept slots alone are read, by the recorded log-sum-exp
 *   measure_schedule.c  points whose kept sets change from row to row, or are no prefix of anything
 *   account.c           the only place where rows become sums: a metric of rows is added there
 *
 * The boundary a device backend stands behind is kv_measure_prefixes. In go the layer (q_row, k, v, wo or its
 * triangle, ref), the points' counts and the rankings' orders of the plan; out come the full cache's rows (o, lse,
 * norm_o, base_mass) and, for the points that are prefixes, kv_head_sums and layer_error of this layer. */
#ifndef KV_MEASURE_H
#define KV_MEASURE_H

#include "sim/replay.h"
#include "sim/schedule.h"

enum { KV_LAYER_ROWS = 64 }; /* rows projected at a time */

/* One layer being measured; belongs to one thread. Hq = query heads, d = head size, n_row = measured rows. */
typedef struct {
    const kv_plan *plan;
    const kv_point *point;
    size_t n_point;
    kv_metric_set wanted;
    bool errors;  /* some metric of outputs is wanted */
    bool contest; /* contested recall is wanted */
    bool diffs;   /* differences of outputs are formed: for layer errors, or for hat */
    float *hat;   /* NULL, or [n_row][n_point + 1][Hq * d], filled: the full cache's outputs, then each point's */
    kv_layer l;
    float *triangle;   /* [n_triangle][Hq * d]: stands for W_O in norms (kv_triangle), or NULL */
    size_t n_triangle; /* its rows */
    float *projected;  /* [KV_LAYER_ROWS][hidden] W_O o of the rows from projected_r0 on, where a norm follows;
                          or NULL */
    size_t projected_r0;
    double *ref;              /* [n_row] ||x|| or the norm of the layer's own output; NULL without layer errors */
    float *o, *lse;           /* [Hq][n_row][d], [Hq][n_row]: the full cache's outputs and log-sum-exps */
    double *norm_o;           /* [Hq][n_row] ||o|| */
    double *base_mass;        /* [Hq][n_row]: mass of the tokens after the cut */
    uint8_t *contested;       /* [n_token] 1 = outside F */
    double *contested_mass;   /* [Hq][n_row] mass outside F; NULL when not wanted */
    kv_step_sums *step;       /* [n_point][n_row] of this layer; NULL when series are not wanted */
    struct kv_bounds *bounds; /* NULL when not wanted */
    kv_replay *out;
} kv_measure;

/* Measure evicting layer `index` of all points: fills out's entries of that layer. */
kv_status kv_measure_layer(kv_measure *m, uint32_t index, kv_error *err);
kv_status kv_measure_prefixes(kv_measure *m, kv_error *err);
/* Points that kv_measure_prefixes measures at once, where layer errors are wanted; width = Hq * d. */
size_t kv_measure_points_at_once(size_t width);
kv_status kv_measure_schedules(kv_measure *m, kv_error *err);
/* Is it enough, and less work, to read what is kept? Masses only, and log-sum-exps in the trace. */
bool kv_measure_is_local(const kv_measure *m);
kv_status kv_measure_local(kv_measure *m, kv_error *err);

/* norm[r] = how much the stream changes when the attention outputs of rows r0.. (m->o) lose x [n][Hq * d]: ||W_O
 * x[r]||, times the model's factor on it; where a norm follows W_O, the distance of the two outputs behind it. r0 and n
 * as in kv_account_layer. */
kv_status kv_measure_project(kv_measure *m, size_t r0, size_t n, const float *x, double *norm, kv_error *err);

/* The rankings that prefix points of the plan use, each with the counts they ask for: what a walk stops at. */
typedef struct {
    size_t n;
    uint32_t *count; /* [n] ascending, all different */
    size_t *first;   /* [n+1]: points of count c are point[first[c]..first[c+1]-1] */
    size_t *point;
} kv_checkpoints;
/* One for every unit of ranking r in this layer, [n_unit], of points from..to-1; n is 0 throughout where none uses it.
 */
kv_status kv_checkpoints_make(const kv_measure *m, size_t r, size_t from, size_t to, kv_checkpoints **out,
                              kv_error *err);
void kv_checkpoints_free(kv_checkpoints *c, size_t n_unit);

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
/* The same for whole rows of the layer, and into hat: diff [n_point][n][Hq * d] = o - o_hat of all heads of rows r0..
 * at each point; r0 a multiple of KV_LAYER_ROWS, n as many as there are up to that. */
kv_status kv_account_layer(kv_measure *m, const size_t *point, size_t n_point, size_t r0, size_t n, const float *diff,
                           kv_error *err);

/* The same when ||W_O (o - o_hat)|| of n <= KV_LAYER_ROWS rows is known: norm [n], without the model's factor. */
void kv_account_norms(kv_measure *m, size_t point, size_t r0, size_t n, const float *norm);

/* Series of one more layer into those of the layers before it; n = points times rows. */
void kv_steps_merge(kv_step_sums *all, const kv_step_sums *layer, size_t n);

kv_head_sums *kv_measure_sums(const kv_measure *m, size_t point, uint32_t head);

#endif
