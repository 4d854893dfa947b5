/* allocation.c - slots of a policy against the oracle's (allocation.h). */
#include "analyze/allocation.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/analysis.h"

static const char SQL[] =
    "SELECT r.trace_sha256, r.run_id, r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect,"
    " r.category || '/' || r.prompt AS prompt, s.layer, s.head, s.bytes"
    " FROM v_run r JOIN v_slots s ON s.run_id = r.run_id"
    " WHERE r.budget = :budget AND (r.policy = 'oracle-global' OR (" KV_WHERE_RUN "))"
    " AND (:model IS NULL OR r.model = :model) AND (:traces IS NULL OR r.trace IN (SELECT value FROM "
    "json_each(:traces)))"
    " AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))"
    " ORDER BY r.trace_sha256, r.policy <> 'oracle-global', r.run_id, s.layer, s.head";
enum { TRACE, RUN, MODEL, POLICY, SPEC, GRANULARITY, PAGE, CUT, PROTECT, PROMPT, LAYER, HEAD, BYTES };

typedef struct {
    size_t from, to; /* rows of one run */
} run;

static bool same(const kv_sheet *s, size_t a, size_t b, int from, int to)
{
    for (int c = from; c <= to; c++)
        if (kv_cell_cmp(kv_sheet_at(s, a, c), kv_sheet_at(s, b, c))) return false;
    return true;
}

static double bytes_at(const kv_sheet *s, size_t row)
{
    return kv_cell_number(kv_sheet_at(s, row, BYTES));
}

/* Half the sum of |share - share| over layers (by layer) or units; NaN when the two do not have the same ones. */
static double moved(const kv_sheet *s, run a, run b, bool units)
{
    double total[2] = {0, 0}, sum = 0;
    for (size_t i = a.from; i < a.to; i++) total[0] += bytes_at(s, i);
    for (size_t i = b.from; i < b.to; i++) total[1] += bytes_at(s, i);
    if (!(total[0] > 0) || !(total[1] > 0)) return NAN;
    for (size_t i = a.from, j = b.from; i < a.to || j < b.to;) {
        if (i == a.to || j == b.to || !same(s, i, j, LAYER, units ? HEAD : LAYER)) return NAN;
        size_t p = i, q = j;
        double x = 0, y = 0;
        for (; i < a.to && same(s, p, i, LAYER, units ? HEAD : LAYER); i++) x += bytes_at(s, i);
        for (; j < b.to && same(s, q, j, LAYER, units ? HEAD : LAYER); j++) y += bytes_at(s, j);
        sum += fabs(x / total[0] - y / total[1]);
    }
    return sum / 2;
}

kv_status kv_allocation_load(kv_db *db, const kv_selection *s, kv_sheet *out, kv_group_note *note, kv_error *err)
{
    const char *const cols[] = {"model", "policy",  "spec",   "granularity", "page",
                                "cut",   "protect", "prompt", "moved_units", "value"};
    kv_sheet rows = {0}, per = {0};
    run *runs = NULL;
    size_t n = 0;
    *out = (kv_sheet){0};
    kv_status st = kv_query(db, "the slots", SQL, s->bind, s->n_bind, &rows, err);
    if (!st) st = kv_array(&runs, rows.n_row, sizeof *runs, err);
    if (!st) st = kv_sheet_init(&per, 10, cols, err);
    for (size_t i = 0; i < rows.n_row && !st; i++) {
        if (i && same(&rows, i - 1, i, RUN, RUN))
            runs[n - 1].to = i + 1;
        else
            runs[n++] = (run){i, i + 1};
    }
    for (size_t k = 0, first = 0; k < n && !st; k++) { /* runs of one trace follow each other, oracles first */
        size_t r = runs[k].from;
        const run *oracle = NULL;
        kv_cell *row;
        if (!same(&rows, runs[first].from, r, TRACE, TRACE)) first = k;
        const char *policy = kv_cell_text(kv_sheet_at(&rows, r, POLICY));
        if (!strcmp(policy, "oracle-global") || !strcmp(policy, "full")) continue;
        for (size_t o = first; o < k; o++) {
            size_t q = runs[o].from;
            if (strcmp(kv_cell_text(kv_sheet_at(&rows, q, POLICY)), "oracle-global")) break;
            if (!same(&rows, q, r, PAGE, PROTECT)) continue;
            if (!oracle || same(&rows, q, r, GRANULARITY, GRANULARITY)) oracle = &runs[o];
        }
        if (!oracle) continue;
        double units =
            same(&rows, oracle->from, r, GRANULARITY, GRANULARITY) ? moved(&rows, runs[k], *oracle, true) : NAN;
        if ((st = kv_sheet_add(&per, &row, err))) break;
        for (int c = MODEL; c <= PROMPT && !st; c++)
            st = kv_sheet_copy_cell(&per, &row[c - MODEL], kv_sheet_at(&rows, r, c), err);
        row[8] = kv_real(units), row[9] = kv_real(moved(&rows, runs[k], *oracle, false));
    }
    if (!st && per.n_row) st = kv_group_prompts(&per, out, note, err);
    if (!st && per.n_row) st = kv_label_series(out, err);
    if (st) kv_sheet_free(out);
    kv_sheet_free(&rows), kv_sheet_free(&per);
    free(runs);
    return st;
}

kv_status kv_allocation_print(FILE *f, const kv_sheet *s, kv_error *err)
{
    const char *const head[] = {"policy", "in other layers", "95% interval", "in other layers or heads", "n"};
    int label = kv_sheet_find(s, "label"), mean = kv_sheet_find(s, "mean"), units = kv_sheet_find(s, "moved_units");
    kv_sheet t = {0};
    if (!s->n_row) return KV_OK;
    kv_status st = kv_sheet_init(&t, 5, head, err);
    for (size_t r = 0; r < s->n_row && !st; r++) {
        const kv_cell *c = kv_sheet_at(s, r, 0);
        kv_cell *row;
        if ((st = kv_sheet_add(&t, &row, err)) || (st = kv_sheet_copy_cell(&t, &row[0], &c[label], err)) ||
            (st = kv_cell_format(&t, &row[1], err, "%.1f%%", 100 * kv_cell_number(&c[mean]))))
            break;
        if (c[mean + 1].kind != KV_CELL_NULL)
            st = kv_cell_format(&t, &row[2], err, "[%.1f%%, %.1f%%]", 100 * kv_cell_number(&c[mean + 1]),
                                100 * kv_cell_number(&c[mean + 2]));
        if (!st && c[units].kind != KV_CELL_NULL)
            st = kv_cell_format(&t, &row[3], err, "%.1f%%", 100 * kv_cell_number(&c[units]));
        row[4] = c[mean + 3];
    }
    if (!st) {
        fputs("\nshare of the slots that oracle-global would keep elsewhere\n", f);
        kv_print_table(f, &t, "lrrrr", 2);
    }
    kv_sheet_free(&t);
    return st;
}
