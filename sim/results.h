/* results.h - results.db (schema.sql). One writer at a time waits for another; every trace's new runs are one
 * transaction, so a killed sweep leaves whole runs and nothing else. */
#ifndef KV_RESULTS_H
#define KV_RESULTS_H

#include "sim/ledger.h"

typedef struct kv_results kv_results;

/* Create or open for writing. KV_EFORMAT when the file is something else or of a newer schema. */
kv_status kv_results_open(const char *path, kv_results **out, kv_error *err);
void kv_results_close(kv_results *r);

kv_status kv_results_begin(kv_results *r, kv_error *err);
kv_status kv_results_commit(kv_results *r, kv_error *err);
void kv_results_rollback(kv_results *r);

/* True when run_id is there with at least this detail and all these metrics. */
kv_status kv_results_has(kv_results *r, const char *run_id, int detail, kv_metric_set wanted, bool *has, kv_error *err);

typedef struct {
    char run_id[33];
    const kv_spec *spec;
    const kv_budget *budget;
    kv_budget_resolved c;
    const char *cut, *protect, *granularity;
    const char *base, *corner, *target; /* kv_corner; base = the spec's own canonical string, "", "" otherwise */
    const char *oracle;                 /* spec of the oracle of its class, or "" */
    uint32_t page, rows;
    uint64_t seed;
    const kv_ledger *ledger;
    bool matched; /* c and counts are those of --match-bytes, nominal the tokens asked for */
    uint32_t nominal;
    double nominal_frac, wall_s;
    int detail;
    kv_metric_set wanted;
    /* slots: counts [n_layer][n_unit] of layers number[] */
    const uint32_t *counts, *number;
    uint32_t n_layer, n_unit;
    const kv_value *value;
    size_t n_value;
    bool own_output; /* layer_error's unit is the layer's own output */
} kv_run;

/* Row of the trace, made when it is new. */
kv_status kv_results_trace(kv_results *r, const kv_trace *t, const kv_scene *s, int64_t *trace_id, kv_error *err);
/* Insert a run with its metrics and slots. One with the same run_id keeps the metrics that this one has not measured;
 * its detail is then that of the coarser of the two. */
kv_status kv_results_put(kv_results *r, int64_t trace_id, const kv_run *run, kv_error *err);

#endif
