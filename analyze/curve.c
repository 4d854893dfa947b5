/* curve.c - kv-analyze curve: a metric against the bytes kept, one line per policy and budget, intervals over prompts.
 * The loader is shared with `summary`; the figure plots/curve.sql selects the same rows and goes through the same
 * grouping. */
#include "analyze/analysis.h"
#include "analyze/grid.h"
#include "analyze/stats.h"

#include <math.h>
#include <stdlib.h>

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

/* Half-widths of the band around one curve, by budget; NaN where the variant has no runs, and everywhere unless at
 * least two prompts, the same ones at every budget, have values. v[n_budget * n_prompt] is scratch. */
static kv_status half_widths(const kv_grid *g, size_t variant, const double *zero, double *v, double *half,
                             kv_error *err)
{
    size_t n_point = 0, n = 0, *point = NULL, *prompt = NULL;
    double *found = NULL, factor;
    bool same = true;
    kv_status st;
    for (size_t b = 0; b < g->n_budget; b++) half[b] = NAN;
    if ((st = kv_array(&point, g->n_budget, sizeof *point, err)) ||
        (st = kv_array(&prompt, g->n_prompt, sizeof *prompt, err)) ||
        (st = kv_array(&found, g->n_budget, sizeof *found, err)))
        goto out;
    for (size_t b = 0; b < g->n_budget; b++) {
        kv_pairs p;
        if ((st = kv_grid_against(g, variant, zero, b, &p, err))) goto out;
        if (p.n || p.undefined) {
            if (!n_point) n = p.n, memcpy(prompt, p.prompt, n * sizeof *prompt);
            same = same && p.n == n && !memcmp(prompt, p.prompt, n * sizeof *prompt);
            if (same) memcpy(v + n_point * n, p.d, n * sizeof *v);
            point[n_point++] = b;
        }
        kv_pairs_free(&p);
    }
    if (!same || n < 2) goto out;
    st = kv_band(v, n_point, n, KV_BOOT_RESAMPLES, KV_BOOT_SEED, KV_BOOT_LEVEL, found, &factor, err);
    for (size_t k = 0; k < n_point && !st; k++) half[point[k]] = found[k];
out:
    free(point), free(prompt), free(found);
    return st;
}

/* Columns band_low and band_high: around each mean, so wide that the policy's whole curve lies inside with the stated
 * level. NULL for several models or units (--model chooses). */
static kv_status add_bands(kv_db *db, const kv_selection *s, kv_sheet *t, kv_error *err)
{
    int label = kv_sheet_find(t, "label"), budget = kv_sheet_find(t, "budget"), mean = kv_sheet_find(t, "mean");
    int model = kv_sheet_find(t, "model"), unit = kv_sheet_find(t, "unit");
    kv_grid g = {0};
    double *v = NULL, *half = NULL, *zero = NULL;
    kv_status st;
    if ((st = kv_sheet_add_col(t, "band_low", err)) || (st = kv_sheet_add_col(t, "band_high", err))) return st;
    for (size_t r = 1; r < t->n_row; r++)
        if (kv_cell_cmp(kv_sheet_at(t, r, model), kv_sheet_at(t, 0, model)) ||
            kv_cell_cmp(kv_sheet_at(t, r, unit), kv_sheet_at(t, 0, unit)))
            return KV_OK;
    if ((st = kv_grid_load(db, s, &g, err)) || (st = kv_array(&v, g.n_budget * g.n_prompt, sizeof *v, err)) ||
        (st = kv_array(&half, g.n_budget, sizeof *half, err)) || (st = kv_array(&zero, g.n_trace, sizeof *zero, err)))
        goto out;
    for (size_t i = 0; i < g.n_variant && !st; i++) {
        st = half_widths(&g, i, zero, v, half, err);
        for (size_t r = 0; r < t->n_row && !st; r++) {
            const kv_cell *row = kv_sheet_at(t, r, 0);
            double m = kv_cell_number(&row[mean]);
            if (strcmp(kv_cell_text(&row[label]), g.variant[i].label)) continue;
            for (size_t b = 0; b < g.n_budget; b++)
                if (!strcmp(kv_cell_text(&row[budget]), g.budget[b].label))
                    kv_set_real(t, r, "band_low", m - half[b]), kv_set_real(t, r, "band_high", m + half[b]);
        }
    }
out:
    kv_grid_free(&g);
    free(v), free(half), free(zero);
    return st;
}

static kv_status print_table(const kv_analysis *a, const kv_sheet *s, kv_error *err)
{
    const char *const head[] = {"policy", "budget", "bytes",    "of full",   "mean",
                                "low",    "high",   "band low", "band high", "n"};
    int label = kv_sheet_find(s, "label"), mean = kv_sheet_find(s, "mean"), model = kv_sheet_find(s, "model");
    int dec = kv_decimals(kv_column_largest(s, mean)), band = kv_sheet_find(s, "band_low");
    kv_print_heading(a->out, s);
    fputs(", against mean bytes of K and V\n", a->out);
    for (size_t from = 0, to; from < s->n_row; from = to) {
        kv_sheet t = {0};
        kv_status st = kv_sheet_init(&t, 10, head, err);
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
            for (int k = 0; k < 2 && !st; k++)
                if (c[band + k].kind != KV_CELL_NULL)
                    st = kv_cell_format(&t, &row[7 + k], err, "%.*f", dec, kv_cell_number(&c[band + k]));
            row[9] = c[kv_sheet_find(s, "n")];
        }
        if (!st) {
            fputs("\nmodel ", a->out);
            kv_put_plain(a->out, kv_cell_text(kv_sheet_at(s, from, model)), kv_sheet_at(s, from, model)->len);
            fputs("\n", a->out);
            kv_print_table(a->out, &t, "lrrrrrrrrr", 2);
        }
        kv_sheet_free(&t);
        if (st) return st;
    }
    fputs("\nlow and high: ", a->out);
    kv_print_interval_line(a->out);
    fputs("\nband: holds for all budgets of a policy at once (max-t), prompts resampled", a->out);
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
        (st = kv_curve_load(db, &s, &t, &note, err)) || (st = add_bands(db, &s, &t, err)))
        goto out;
    st = a->format == KV_OUT_TABLE ? print_table(a, &t, err) : kv_print_data(a, s.metric, &t, err);
    if (!st) kv_print_note(a->talk, &note);
out:
    kv_sheet_free(&t);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
