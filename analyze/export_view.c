/* export_view.c - kv-analyze export: one of the views, row by row, filtered; nothing is held in memory. */
#include "analyze/analysis.h"

static const char RUN_SQL[] =
    "SELECT r.* FROM v_run r WHERE" KV_WHERE_RUN "ORDER BY r.model, r.trace, r.policy, r.spec, r.budget_frac, r.run_id";
static const char METRIC_SQL[] =
    "SELECT m.* FROM v_run r JOIN v_metric m ON m.run_id = r.run_id WHERE (:metric IS NULL OR m.metric = :metric) "
    "AND" KV_WHERE_RUN
    "ORDER BY r.model, r.trace, r.policy, r.spec, r.budget_frac, r.run_id, m.metric, m.layer, m.head, m.step";
static const char SLOTS_SQL[] = "SELECT s.* FROM v_run r JOIN v_slots s ON s.run_id = r.run_id WHERE" KV_WHERE_RUN
                                "ORDER BY r.model, r.trace, r.policy, r.spec, r.budget_frac, r.run_id, s.layer, s.head";

typedef struct {
    const kv_analysis *a;
    size_t n;
} exporter;

static kv_status put_row(void *ctx, size_t n_col, const char *const *names, const kv_cell *row, kv_error *err)
{
    exporter *e = ctx;
    FILE *f = e->a->out;
    if (e->a->format == KV_OUT_CSV) {
        for (size_t c = 0; !e->n && c < n_col; c++) {
            kv_put_csv(f, names[c], strlen(names[c]));
            putc(c + 1 < n_col ? ',' : '\n', f);
        }
        for (size_t c = 0; row && c < n_col; c++) {
            kv_put_cell_csv(f, &row[c]);
            putc(c + 1 < n_col ? ',' : '\n', f);
        }
    } else {
        if (e->a->format == KV_OUT_JSON) fputs(!e->n ? "[\n" : ",\n", f);
        if (row) putc('{', f);
        for (size_t c = 0; row && c < n_col; c++) {
            if (c) fputs(", ", f);
            kv_put_json(f, names[c], strlen(names[c]));
            fputs(": ", f);
            kv_put_cell_json(f, &row[c]);
        }
        if (row) putc('}', f);
        if (row && e->a->format == KV_OUT_JSONL) putc('\n', f);
    }
    e->n++;
    return ferror(f) ? kv_flush_output(f, "standard output", err) : KV_OK; /* a full disk must not scan on */
}

kv_status kv_cmd_export(const kv_analysis *a, kv_error *err)
{
    static const char *const names[] = {"run", "metric", "slots"};
    static const char *const sql[] = {RUN_SQL, METRIC_SQL, SLOTS_SQL};
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_analysis used = *a;
    exporter e = {.a = &used};
    const char *what = a->what ? a->what : "run";
    size_t k = 0;
    while (k < 3 && strcmp(what, names[k])) k++;
    if (k == 3) return kv_fail(err, KV_EMISUSE, "unknown --what '%s': run, metric or slots", what);
    if (used.format == KV_OUT_TABLE) used.format = KV_OUT_CSV;
    kv_status st = kv_analysis_open(a, &db, &s, err);
    if (!st && a->metric) {
        if (k != 1)
            st = kv_fail(err, KV_EMISUSE, "--metric goes with --what metric, not with '%s'", what);
        else
            st = kv_selection_metric(db, &s, a->metric, kv_default_metrics, err);
    }
    if (!st) st = kv_query_each(db, "the export", sql[k], s.bind, s.n_bind, put_row, &e, err);
    if (!st && used.format == KV_OUT_JSON) fputs("\n]\n", a->out);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
