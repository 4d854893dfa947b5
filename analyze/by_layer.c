/* by_layer.c - kv-analyze layers: who loses, layer by layer, at one budget; and the slots each layer was given, next to
 * the same bytes spread evenly. */
#include "analyze/allocation.h"
#include "analyze/analysis.h"
#include "traces/memtext.h"

#include <math.h>
#include <stdlib.h>

/* Slots are counted in KV slots (one layer, KV head and token), whatever the granularity: bytes / bytes of a slot.
 * uniform_slots = what each layer would get if the budget were spread evenly. */
static const char SQL[] =
    "WITH given AS (SELECT run_id, layer, sum(bytes) AS bytes FROM v_slots"
    "  WHERE run_id IN (SELECT r.run_id FROM v_run r WHERE r.budget = :budget AND" KV_WHERE_RUN ")"
    "  GROUP BY run_id, layer),"
    " count AS (SELECT run_id, count(*) AS layers FROM given GROUP BY run_id)"
    " SELECT r.model, g.layer, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, :metric AS metric, m.unit, "
    "r.budget,"
    "  r.category || '/' || r.prompt AS prompt,"
    "  CAST(g.bytes AS REAL) * r.kept_slots / nullif(r.kept_bytes, 0) AS slots,"
    "  CAST(r.nominal_bytes AS REAL) / c.layers * r.kept_slots / nullif(r.kept_bytes, 0) AS uniform_slots,"
    "  CAST(g.bytes AS REAL) * c.layers / nullif(r.nominal_bytes, 0) AS slots_ratio,"
    "  m.better, m.value"
    " FROM v_run r JOIN given g ON g.run_id = r.run_id JOIN count c ON c.run_id = r.run_id"
    " LEFT JOIN v_metric m ON m.run_id = r.run_id AND m.metric = :metric AND m.layer = g.layer AND m.head IS NULL"
    "  AND m.step IS NULL"
    " ORDER BY r.model, g.layer, r.policy, r.spec, r.run_id";

/* Which matrix: the metric's mean, or the slots of the series whose layers differ. */
typedef enum { SHOW_METRIC, SHOW_SLOTS } matrix;

/* 1 for series whose allocation differs between layers by more than 1 % of the even share. */
static void uneven_series(const kv_sheet *s, size_t from, size_t to, bool *uneven, size_t n)
{
    int series = kv_sheet_find(s, "series"), ratio = kv_sheet_find(s, "slots_ratio");
    for (size_t k = 0; k < n; k++) {
        double lo = INFINITY, hi = -INFINITY;
        for (size_t r = from; r < to; r++) {
            double v = kv_cell_number(kv_sheet_at(s, r, ratio));
            if (kv_cell_number(kv_sheet_at(s, r, series)) != (double)k || v != v) continue;
            lo = fmin(lo, v), hi = fmax(hi, v);
        }
        uneven[k] = hi - lo > 0.01;
    }
}

/* Layers down, policies across, for the lines [from, to) of one model. *shown = number of policy columns. */
static kv_status print_matrix(const kv_analysis *a, const kv_sheet *s, size_t from, size_t to, matrix what,
                              size_t *shown, kv_error *err)
{
    enum { MAX = KV_SHEET_COLS_MAX - 2 };
    int layer = kv_sheet_find(s, "layer"), series = kv_sheet_find(s, "series"), label = kv_sheet_find(s, "label");
    int value = kv_sheet_find(s, what == SHOW_METRIC ? "mean" : "slots"), uniform = kv_sheet_find(s, "uniform_slots");
    int dec = what == SHOW_METRIC ? kv_decimals(kv_column_largest(s, value)) : 1;
    char align[KV_SHEET_COLS_MAX];
    int col[MAX] = {0}; /* column of a series in the matrix, 0 = not shown */
    bool uneven[MAX] = {false};
    kv_sheet t = {0};
    memset(align, 'r', sizeof align);
    uneven_series(s, from, to, uneven, MAX);
    kv_status st = kv_sheet_init(&t, 1, &(const char *const){"layer"}, err);
    if (!st && what == SHOW_SLOTS) st = kv_sheet_add_col(&t, "uniform", err);
    size_t fixed = t.n_col;
    for (size_t k = 0; k < MAX && !st; k++) /* series in legend order */
        for (size_t r = from; r < to && !col[k] && !st; r++) {
            const kv_cell *c = kv_sheet_at(s, r, 0);
            if (kv_cell_number(&c[series]) != (double)k || c[value].kind == KV_CELL_NULL) continue;
            if ((what == SHOW_SLOTS && !uneven[k]) || t.n_col == KV_SHEET_COLS_MAX) continue;
            char *name = NULL;
            size_t size;
            FILE *m = kv_text_stream(&name, &size);
            if (m) kv_put_plain(m, kv_cell_text(&c[label]), c[label].len);
            if (!m || fclose(m))
                st = kv_fail(err, KV_ENOMEM, "out of memory");
            else
                col[k] = (int)t.n_col, st = kv_sheet_add_col(&t, name, err);
            free(name);
        }
    *shown = t.n_col - fixed;
    /* The sheet is sorted by series; every series has its layers ascending, so a row is made when a layer is new. */
    for (size_t r = from; r < to && !st; r++) {
        const kv_cell *c = kv_sheet_at(s, r, 0);
        double k = kv_cell_number(&c[series]);
        if (!(k < MAX) || !col[(int)k]) continue;
        size_t i = 0;
        while (i < t.n_row && kv_cell_cmp(kv_sheet_at(&t, i, 0), &c[layer])) i++;
        kv_cell *row = i < t.n_row ? kv_sheet_at(&t, i, 0) : NULL;
        if (!row && !(st = kv_sheet_add(&t, &row, err))) row[0] = c[layer];
        if (!st && what == SHOW_SLOTS && row[1].kind == KV_CELL_NULL && c[uniform].kind != KV_CELL_NULL)
            st = kv_cell_format(&t, &row[1], err, "%.*f", dec, kv_cell_number(&c[uniform]));
        if (!st && c[value].kind != KV_CELL_NULL)
            st = kv_cell_format(&t, &row[col[(int)k]], err, "%.*f", dec, kv_cell_number(&c[value]));
    }
    if (!st && *shown) kv_print_table(a->out, &t, align, 2);
    kv_sheet_free(&t);
    return st;
}

static kv_status print_tables(const kv_analysis *a, const kv_sheet *s, const kv_selection *sel, kv_error *err)
{
    int model = kv_sheet_find(s, "model"), n_col = kv_sheet_find(s, "n");
    for (size_t from = 0, to; from < s->n_row; from = to) {
        size_t shown = 0, n = 0;
        kv_status st;
        for (to = from; to < s->n_row && !kv_cell_cmp(kv_sheet_at(s, from, model), kv_sheet_at(s, to, model)); to++)
            if (kv_cell_number(kv_sheet_at(s, to, n_col)) > (double)n)
                n = (size_t)kv_cell_number(kv_sheet_at(s, to, n_col));
        kv_put_plain(a->out, kv_cell_text(kv_sheet_at(s, from, model)), kv_sheet_at(s, from, model)->len);
        fputs(", budget ", a->out);
        kv_put_plain(a->out, sel->budget, strlen(sel->budget));
        fputs("\n\n", a->out);
        kv_put_plain(a->out, sel->metric, strlen(sel->metric));
        fprintf(a->out, " by layer, mean over %zu prompts\n", n);
        if ((st = print_matrix(a, s, from, to, SHOW_METRIC, &shown, err))) return st;
        if (!shown) fputs("  not in this database by layer (kv-sim run --detail layer)\n", a->out);
        fputs("\nKV slots (KV heads x tokens) by layer, mean over prompts; uniform = the budget spread evenly\n",
              a->out);
        if ((st = print_matrix(a, s, from, to, SHOW_SLOTS, &shown, err))) return st;
        if (!shown) fputs("  every policy here gives every layer the same\n", a->out);
        if (to < s->n_row) fputs("\n", a->out);
    }
    return KV_OK;
}

kv_status kv_cmd_layers(const kv_analysis *a, kv_error *err)
{
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_sheet rows = {0}, t = {0}, moved = {0};
    kv_group_note note, moves;
    kv_status st;
    if ((st = kv_analysis_open(a, &db, &s, err)) ||
        (st = kv_selection_metric(db, &s, a->metric, kv_default_metrics, err)) ||
        (st = kv_selection_budget(db, &s, err)) ||
        (st = kv_query(db, "the layers' rows", SQL, s.bind, s.n_bind, &rows, err)))
        goto out;
    if (!rows.n_row) {
        st = kv_fail(err, KV_EMISSING, "no slots by layer for budget '%s' in '%s'", s.budget, a->db);
        goto out;
    }
    if ((st = kv_group_prompts(&rows, &t, &note, err)) || (st = kv_label_series(&t, err))) goto out;
    st = a->format == KV_OUT_TABLE ? print_tables(a, &t, &s, err) : kv_print_data(a, s.metric, &t, err);
    if (!st && a->format == KV_OUT_TABLE && !(st = kv_allocation_load(db, &s, &moved, &moves, err)))
        st = kv_allocation_print(a->out, &moved, err);
    if (!st && note.n_max) kv_print_note(a->talk, &note);
out:
    kv_sheet_free(&rows), kv_sheet_free(&t), kv_sheet_free(&moved);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
