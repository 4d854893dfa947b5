/* report.h - the parts of kv-analyze report; each writes one section of the page. */
#ifndef KV_REPORT_H
#define KV_REPORT_H

#include "analyze/analysis.h"
#include "analyze/page.h"

typedef struct {
    const kv_analysis *a;
    kv_db *db;
    kv_selection s; /* model, metric (the headline) and budget (the one shown in detail) are set */
    FILE *f;
    const char *where;  /* the filter over `v_run r`, beginning with AND */
    kv_sheet curve;     /* kv_curve_load of the headline metric, this model */
    kv_group_note note; /* of that load */
    bool lower;         /* the headline metric's better direction is lower */
    int c_policy, c_label, c_budget, c_frac, c_mean, c_low, c_high, c_n, c_bytes; /* columns of curve */
} kv_report;

/* Columns that tell two variants of a policy apart, as SQL. */
#define KV_VARIANT "r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, m.unit"
/* One number per (variant, ..., prompt): several runs of a prompt (seeds, rows) are averaged first. `keys` are further
 * columns, beginning with a comma or empty; `which` restricts layer, head and step. */
#define KV_PER_PROMPT(keys, which)                                                                                     \
    "SELECT " KV_VARIANT keys ", r.category || '/' || r.prompt AS prompt, avg(m.value) AS value,"                      \
    " avg(r.mean_bytes) AS bytes, avg(r.mean_bytes / r.full_bytes) AS frac"                                            \
    " FROM v_run r JOIN v_metric m ON m.run_id = r.run_id"                                                             \
    " WHERE m.metric = :metric AND m.step IS NULL AND " which " AND r.model = :model"

bool kv_report_is_reference(const char *policy); /* full cache and oracles: bounds, not choices */

kv_status kv_report_verdict(kv_report *r, kv_error *err);
kv_status kv_report_tables(kv_report *r, kv_error *err);   /* every policy and budget, per metric */
kv_status kv_report_layers(kv_report *r, kv_error *err);   /* layer x policy, and layer x head where stored */
kv_status kv_report_families(kv_report *r, kv_error *err); /* kinds of prompt */
kv_status kv_report_failures(kv_report *r, kv_error *err); /* the worst prompts */

#endif
