/* predict_layers.c - where the error of a layer alone stops ordering policies as the running model does: the open
 * loop's head_error of a layer against the closed loop's, which has the damage of all layers below in it. */
#include "analyze/predict_layers.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/ranks.h"
#include "analyze/stats.h"

#define CELLS_MIN 4u /* fewer policies of a prompt at a budget: no correlation */

static const char SQL[] =
    "SELECT r.model, m.layer, r.category || '/' || r.prompt AS prompt, r.budget,"
    " r.spec || ' ' || r.granularity || ' ' || r.page || ' ' || r.cut || ' ' || r.protect AS variant,"
    " avg(CASE WHEN m.metric = 'head_error' THEN m.value END) AS alone,"
    " avg(CASE WHEN m.metric = 'closed_head_error' THEN m.value END) AS closed"
    " FROM v_run r JOIN v_metric m ON m.run_id = r.run_id"
    " WHERE m.layer IS NOT NULL AND m.head IS NULL AND m.step IS NULL AND r.policy <> 'full'"
    " AND m.metric IN ('head_error', 'closed_head_error')"
    " AND r.mean_bytes < 0.9999 * r.full_bytes AND" KV_WHERE_RUN "GROUP BY 1, 2, 3, 4, 5"
    " HAVING alone IS NOT NULL AND closed IS NOT NULL ORDER BY 1, 2, 3, 4, 5";
enum { MODEL, LAYER, PROMPT, BUDGET, VARIANT, ALONE, CLOSED };

/* Row r and the one before it differ in a column up to `last`. */
static bool breaks(const kv_sheet *s, size_t r, int last)
{
    for (int c = 0; c <= last && r < s->n_row; c++)
        if (kv_cell_cmp(kv_sheet_at(s, r, c), kv_sheet_at(s, r - 1, c))) return true;
    return r == s->n_row;
}

static kv_status put_layer(const kv_sheet *rows, size_t at, kv_interval rho, size_t prompts, size_t cells,
                           double factor, kv_sheet *out, kv_error *err)
{
    size_t r = out->n_row;
    char name[24];
    kv_cell *unused;
    kv_status st;
    snprintf(name, sizeof name, "%.0f", kv_cell_number(kv_sheet_at(rows, at, LAYER)));
    if ((st = kv_sheet_add(out, &unused, err)) ||
        (st = kv_set_text(out, r, "model", kv_cell_text(kv_sheet_at(rows, at, MODEL)), err)) ||
        (st = kv_set_text(out, r, "metric", "head_error", err)) ||
        (st = kv_set_text(out, r, "target", "closed_head_error", err)) ||
        (st = kv_set_text(out, r, "scope", "layer", err)) || (st = kv_set_text(out, r, "name", name, err)))
        return st;
    kv_set_int(out, r, "cells", (int64_t)cells), kv_set_int(out, r, "prompts", (int64_t)prompts);
    kv_set_real(out, r, "spearman", rho.mean), kv_set_real(out, r, "factor", factor);
    kv_set_real(out, r, "spearman_low", rho.low), kv_set_real(out, r, "spearman_high", rho.high);
    return KV_OK;
}

kv_status kv_predict_layers(kv_db *db, const kv_selection *s, kv_sheet *out, kv_error *err)
{
    kv_sheet rows = {0};
    double *alone = NULL, *closed = NULL, *rho = NULL, *ratio = NULL, sum = 0;
    size_t n = 0, n_ratio = 0, n_rho = 0, n_budget = 0, cells = 0;
    kv_status st = kv_query(db, "the errors of layers", SQL, s->bind, s->n_bind, &rows, err);
    if (!st) st = kv_array(&alone, rows.n_row + 1, sizeof *alone, err);
    if (!st) st = kv_array(&closed, rows.n_row + 1, sizeof *closed, err);
    if (!st) st = kv_array(&rho, rows.n_row + 1, sizeof *rho, err);
    if (!st) st = kv_array(&ratio, rows.n_row + 1, sizeof *ratio, err);
    for (size_t r = 0; r < rows.n_row && !st; r++) {
        double one;
        alone[n] = kv_cell_number(kv_sheet_at(&rows, r, ALONE)),
        closed[n] = kv_cell_number(kv_sheet_at(&rows, r, CLOSED));
        if (alone[n] > 0) ratio[n_ratio++] = closed[n] / alone[n];
        n++;
        if (!breaks(&rows, r + 1, BUDGET)) continue; /* all policies of a prompt at a budget are there */
        if (n >= CELLS_MIN && !(st = kv_spearman(alone, closed, n, &one, err)) && one == one)
            sum += one, n_budget++, cells += n;
        n = 0;
        if (st || !breaks(&rows, r + 1, PROMPT)) continue;
        if (n_budget) rho[n_rho++] = sum / (double)n_budget;
        sum = 0, n_budget = 0;
        if (!breaks(&rows, r + 1, LAYER)) continue;
        kv_interval mean;
        if (n_rho && !(st = kv_mean_interval(rho, n_rho, &mean, err)))
            st = put_layer(&rows, r, mean, n_rho, cells, kv_quantile_of(ratio, n_ratio, 0.5), out, err);
        n_rho = n_ratio = cells = 0;
    }
    free(alone), free(closed), free(rho), free(ratio);
    kv_sheet_free(&rows);
    return st;
}

kv_status kv_predict_layers_print(FILE *f, const kv_sheet *rows, const char *model, kv_error *err)
{
    const char *const head[] = {"layer", "Spearman", "factor"};
    int scope = kv_sheet_find(rows, "scope"), name = kv_sheet_find(rows, "name"), rho = kv_sheet_find(rows, "spearman"),
        factor = kv_sheet_find(rows, "factor");
    kv_sheet x = {0};
    kv_status st = kv_sheet_init(&x, 3, head, err);
    for (size_t r = 0; r < rows->n_row && !st; r++) {
        const kv_cell *c = kv_sheet_at(rows, r, 0);
        kv_cell *to;
        if (strcmp(kv_cell_text(&c[scope]), "layer") || strcmp(kv_cell_text(&c[0]), model)) continue;
        if ((st = kv_sheet_add(&x, &to, err)) || (st = kv_cell_format(&x, &to[0], err, "%s", kv_cell_text(&c[name]))) ||
            (st = kv_cell_format(&x, &to[1], err, "%+.2f [%+.2f, %+.2f]", kv_cell_number(&c[rho]),
                                 kv_cell_number(&c[rho + 1]), kv_cell_number(&c[rho + 2]))))
            break;
        st = kv_cell_format(&x, &to[2], err, "%.2f", kv_cell_number(&c[factor]));
    }
    if (!st && x.n_row) {
        fputs(
            "\nby layer: head_error of the layer alone against closed_head_error, policies of one prompt and budget;\n"
            "factor: how much larger the second is (median)\n",
            f);
        kv_print_table(f, &x, "lrr", 2);
    }
    kv_sheet_free(&x);
    return st;
}
