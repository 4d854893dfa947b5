/* curve.c - kv-analyze curve: a metric against the bytes kept, one line per policy and budget, intervals over prompts.
 * The loader is shared with `summary`; the figure plots/curve.sql selects the same rows and goes through the same
 * grouping. */
#include "analyze/analysis.h"

static const char SQL[] =
    "SELECT r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, m.metric, m.unit, r.budget,"
    " r.category || '/' || r.prompt AS prompt,"
    " r.budget_tokens, r.budget_frac, r.mean_bytes AS bytes, r.full_bytes, r.mean_bytes / r.full_bytes AS frac,"
    " r.overspent, r.verified, m.better, m.value"
    " FROM v_run r JOIN v_metric m ON m.run_id = r.run_id"
    " WHERE m.metric = :metric AND m.layer IS NULL AND m.head IS NULL AND m.step IS NULL AND" KV_WHERE_RUN
    "ORDER BY r.model, r.policy, r.spec, r.budget_frac, r.budget, r.run_id";

kv_status kv_curve_load(kv_db *db, const kv_selection *s, kv_sheet *out, kv_group_note *note, kv_error *err)
{
    kv_sheet rows = {0};
    *out = (kv_sheet){0};
    kv_status st = kv_query(db, "the curve's rows", SQL, s->bind, s->n_bind, &rows, err);
    if (!st && !rows.n_row)
        st = kv_fail(err, KV_EMISSING,
                     "no value of '%s' over whole prompts in this selection of '%s' (kv-sim run --metrics "
                     "chooses what is measured)",
                     s->metric, kv_db_path(db));
    if (!st) st = kv_group_prompts(&rows, out, note, err);
    if (!st && (st = kv_label_series(out, err))) kv_sheet_free(out);
    kv_sheet_free(&rows);
    return st;
}

static kv_status print_table(const kv_analysis *a, const kv_sheet *s, kv_error *err)
{
    const char *const head[] = {"policy", "budget", "bytes", "of full", "mean", "low", "high", "n"};
    int label = kv_sheet_find(s, "label"), mean = kv_sheet_find(s, "mean"), model = kv_sheet_find(s, "model");
    int dec = kv_decimals(kv_column_largest(s, mean));
    kv_print_heading(a->out, s);
    fputs(", against mean bytes of K and V\n", a->out);
    for (size_t from = 0, to; from < s->n_row; from = to) {
        kv_sheet t = {0};
        kv_status st = kv_sheet_init(&t, 8, head, err);
        for (to = from; !st && to < s->n_row && !kv_cell_cmp(kv_sheet_at(s, to, model), kv_sheet_at(s, from, model));
             to++) {
            kv_cell *row;
            if ((st = kv_sheet_add(&t, &row, err))) break;
            /* A series' name stands on its first line only. */
            bool first = to == from || kv_cell_cmp(kv_sheet_at(s, to, label), kv_sheet_at(s, to - 1, label));
            const kv_cell *c = kv_sheet_at(s, to, 0);
            if ((st = kv_sheet_copy_cell(&t, &row[0], &c[label], err)) ||
                (st = kv_sheet_copy_cell(&t, &row[1], &c[kv_sheet_find(s, "budget")], err)) ||
                (st = kv_cell_format(&t, &row[2], err, "%.0f", kv_cell_number(&c[kv_sheet_find(s, "bytes")]))) ||
                (st = kv_cell_format(&t, &row[3], err, "%.2f%%", 100 * kv_cell_number(&c[kv_sheet_find(s, "frac")]))))
                break;
            if (!first) st = kv_sheet_text(&t, &row[0], "", 0, err);
            for (int k = 0; k < 3 && !st; k++)
                if (c[mean + k].kind != KV_CELL_NULL)
                    st = kv_cell_format(&t, &row[4 + k], err, "%.*f", dec, kv_cell_number(&c[mean + k]));
            row[7] = c[kv_sheet_find(s, "n")];
        }
        if (!st) {
            fputs("\nmodel ", a->out);
            kv_put_plain(a->out, kv_cell_text(kv_sheet_at(s, from, model)), kv_sheet_at(s, from, model)->len);
            fputs("\n", a->out);
            kv_print_table(a->out, &t, "lrrrrrrr", 2);
        }
        kv_sheet_free(&t);
        if (st) return st;
    }
    fputs("\nlow and high: ", a->out);
    kv_print_interval_line(a->out);
    fputs("\nof full: mean bytes / mean bytes of the full cache over the same rows\n", a->out);
    return KV_OK;
}

kv_status kv_cmd_curve(const kv_analysis *a, kv_error *err)
{
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_sheet t = {0};
    kv_group_note note;
    kv_status st;
    if ((st = kv_analysis_open(a, &db, &s, err)) ||
        (st = kv_selection_metric(db, &s, a->metric, kv_default_metrics, err)) ||
        (st = kv_curve_load(db, &s, &t, &note, err)))
        goto out;
    st = a->format == KV_OUT_TABLE ? print_table(a, &t, err) : kv_print_data(a, s.metric, &t, err);
    if (!st) kv_print_note(a->talk, &note);
out:
    kv_sheet_free(&t);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
