/* by_head.c - kv-analyze heads: which heads lose more under one policy than under another (the oracle, unless told
 * otherwise), tested head by head over prompts with the false discovery rate held, and the slots both gave them. */
#include "analyze/allocation.h"
#include "analyze/analysis.h"
#include "analyze/grid.h"
#include "analyze/ranks.h"
#include "analyze/signif.h"
#include "analyze/stats.h"
#include "traces/memtext.h"

#include <math.h>
#include <stdlib.h>

#define Q_LEVEL 0.05
#define SHOWN   15u

/* One variant at one budget; seeds and the like averaged per trace. */
#define OF_VARIANT                                                                                                     \
    " r.budget = :budget AND r.model = :model AND r.spec = :spec AND r.granularity = :g AND r.cut = :c AND"            \
    " r.protect = :protect AND r.page = CAST(:p AS INTEGER)"                                                           \
    " AND (:traces IS NULL OR r.trace IN (SELECT value FROM json_each(:traces)))"                                      \
    " AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))"
static const char VALUES_SQL[] =
    "SELECT m.layer, m.head, r.category || '/' || r.prompt AS prompt, r.trace_sha256, avg(m.value) AS value"
    " FROM v_run r JOIN v_metric m ON m.run_id = r.run_id WHERE m.metric = :metric AND m.layer IS NOT NULL"
    " AND m.head IS NOT NULL AND m.step IS NULL AND" OF_VARIANT
    " GROUP BY m.layer, m.head, r.trace_sha256 ORDER BY m.layer, m.head, prompt, r.trace_sha256";
static const char SLOTS_SQL[] =
    "SELECT s.layer, s.head, avg(s.slots) AS slots FROM v_run r JOIN v_slots s ON"
    " s.run_id = r.run_id WHERE" OF_VARIANT " GROUP BY s.layer, s.head ORDER BY s.layer, s.head";

typedef struct {
    kv_sheet values, slots;
} side;

static kv_status load(kv_db *db, const kv_selection *s, const kv_grid_variant *v, side *out, kv_error *err)
{
    char page[24];
    snprintf(page, sizeof page, "%lld", (long long)v->page);
    const kv_bind bind[] = {{":budget", s->budget},   {":model", s->model},
                            {":metric", s->metric},   {":spec", v->spec},
                            {":g", v->granularity},   {":c", v->cut},
                            {":protect", v->protect}, {":p", page},
                            {":traces", s->traces},   {":categories", s->categories}};
    size_t n = sizeof bind / sizeof *bind;
    kv_status st = kv_query(db, "the heads' values", VALUES_SQL, bind, n, &out->values, err);
    if (!st && !out->values.n_row)
        st = kv_fail(err, KV_EMISSING, "no '%s' by head for '%s' at budget '%s' (kv-sim run --detail head stores it)",
                     s->metric, v->label, s->budget);
    if (!st) st = kv_query(db, "the heads' slots", SLOTS_SQL, bind, n, &out->slots, err);
    return st;
}

/* Mean slots of the unit a query head belongs to: heads per layer / units per layer query heads share one. */
static double slots_of(const kv_sheet *slots, int64_t layer, int64_t head, int64_t n_head)
{
    size_t from = 0, n = 0;
    for (size_t r = 0; r < slots->n_row; r++)
        if (kv_sheet_at(slots, r, 0)->u.i == layer && !n++) from = r;
    if (!n || n_head < (int64_t)n) return NAN;
    return kv_cell_number(kv_sheet_at(slots, from + (size_t)(head * (int64_t)n / n_head), 2));
}

static const char *const COLUMNS[] = {"layer", "head", "n", "mean", "baseline_mean", "difference",
                                      "low",   "high", "p", "q",    "slots",         "baseline_slots"};
enum { LAYER, HEAD, N, MEAN, BASE, DIFF, LOW, HIGH, P, Q, SLOTS, BASE_SLOTS, N_COL };

/* One line per head. Rows of both sides are the same (layer, head, trace) in the same order. */
static kv_status test_heads(const side *a, const side *b, kv_sheet *out, kv_error *err)
{
    const kv_sheet *x = &a->values, *y = &b->values;
    double *d = NULL, *p = NULL;
    int64_t n_head = 0;
    kv_status st;
    if ((st = kv_array(&d, x->n_row, sizeof *d, err)) || (st = kv_array(&p, x->n_row, sizeof *p, err))) goto out;
    for (size_t r = 0; r < x->n_row; r++)
        if (kv_sheet_at(x, r, 1)->u.i >= n_head) n_head = kv_sheet_at(x, r, 1)->u.i + 1;
    for (size_t i = 0, j; i < x->n_row && !st; i = j) {
        kv_wilcoxon_result w;
        kv_interval iv;
        kv_cell *row;
        double sum[2] = {0, 0};
        size_t n = 0;
        int64_t layer = kv_sheet_at(x, i, 0)->u.i, head = kv_sheet_at(x, i, 1)->u.i;
        for (j = i; j < x->n_row && kv_sheet_at(x, j, 0)->u.i == layer && kv_sheet_at(x, j, 1)->u.i == head;) {
            double u = 0, v = 0; /* traces of one prompt together */
            size_t from = j, m = 0;
            for (; j < x->n_row && kv_sheet_at(x, j, 0)->u.i == layer && kv_sheet_at(x, j, 1)->u.i == head &&
                   !kv_cell_cmp(kv_sheet_at(x, from, 2), kv_sheet_at(x, j, 2));
                 j++) {
                double s = kv_cell_number(kv_sheet_at(x, j, 4)), t = kv_cell_number(kv_sheet_at(y, j, 4));
                if (s == s && t == t) u += s, v += t, m++;
            }
            if (m) sum[0] += u / (double)m, sum[1] += v / (double)m, d[n++] = (u - v) / (double)m;
        }
        if ((st = kv_sheet_add(out, &row, err)) || (st = kv_wilcoxon(d, n, KV_WILCOXON_EXACT_MAX, &w, err)) ||
            (st = kv_mean_interval(d, n, &iv, err)))
            break;
        row[LAYER] = kv_int(layer), row[HEAD] = kv_int(head), row[N] = kv_int((int64_t)n);
        row[MEAN] = kv_real(sum[0] / (double)n), row[BASE] = kv_real(sum[1] / (double)n), row[DIFF] = kv_real(iv.mean);
        row[LOW] = kv_real(iv.low), row[HIGH] = kv_real(iv.high);
        row[SLOTS] = kv_real(slots_of(&a->slots, layer, head, n_head));
        row[BASE_SLOTS] = kv_real(slots_of(&b->slots, layer, head, n_head));
        p[out->n_row - 1] = n ? w.p : NAN;
        row[P] = kv_real(p[out->n_row - 1]);
    }
    if (!st) st = kv_benjamini_hochberg(p, out->n_row, err);
    for (size_t r = 0; r < out->n_row && !st; r++) *kv_sheet_at(out, r, Q) = kv_real(p[r]);
out:
    free(d), free(p);
    return st;
}

static kv_status aligned(const side *a, const side *b, const char *x, const char *y, kv_error *err)
{
    bool same = a->values.n_row == b->values.n_row;
    for (size_t r = 0; r < a->values.n_row && same; r++)
        for (int c = 0; c < 4 && same; c++)
            same = !kv_cell_cmp(kv_sheet_at(&a->values, r, c), kv_sheet_at(&b->values, r, c));
    return same
               ? KV_OK
               : kv_fail(err, KV_EFORMAT,
                         "cannot compare '%s' with '%s': by head they were not replayed on the same traces (kv-sim run "
                         "--detail head completes them; --trace picks)",
                         x, y);
}

/* Worst first: the policy loses most against the baseline. */
static int by_loss(const kv_sheet *s, const kv_cell *a, const kv_cell *b, const void *ctx)
{
    double sign = *(const double *)ctx, x = sign * kv_cell_number(&a[DIFF]), y = sign * kv_cell_number(&b[DIFF]);
    (void)s;
    if (!(x == x) || !(y == y)) return (x == x) ? -1 : (y == y);
    return (x < y) - (x > y);
}

static kv_status print_text(const kv_analysis *a, const kv_grid *g, const kv_selection *s, size_t va, size_t vb,
                            kv_sheet *t, const kv_sheet *moved, kv_error *err)
{
    FILE *f = a->out;
    const char *const head[] = {"layer", "head", "loses", "95% interval", "of", "against", "q", "slots", "oracle's"};
    const char *la = g->variant[va].label, *lb = g->variant[vb].label;
    double sign = g->better > 0 ? -1 : 1; /* sign * difference > 0: the policy is worse */
    size_t worse = 0, better = 0, n = 0;
    kv_sheet show = {0};
    kv_status st = kv_sheet_sort(t, by_loss, &sign, err);
    for (size_t r = 0; r < t->n_row; r++) {
        const kv_cell *c = kv_sheet_at(t, r, 0);
        bool sure = kv_cell_number(&c[Q]) < Q_LEVEL;
        worse += sure && sign * kv_cell_number(&c[DIFF]) > 0, better += sure && sign * kv_cell_number(&c[DIFF]) < 0;
        if (c[N].u.i > (int64_t)n) n = (size_t)c[N].u.i;
    }
    int dec = kv_decimals(kv_column_largest(t, DIFF));
    if (!st) st = kv_sheet_init(&show, 9, head, err);
    if (!st) {
        free(show.col[8]);
        show.col[8] = kv_format("%.30s's", lb);
        if (!show.col[8]) st = kv_fail(err, KV_ENOMEM, "out of memory");
    }
    for (size_t r = 0; r < t->n_row && r < SHOWN && !st; r++) {
        const kv_cell *c = kv_sheet_at(t, r, 0);
        double lo = sign * kv_cell_number(&c[sign > 0 ? LOW : HIGH]),
               hi = sign * kv_cell_number(&c[sign > 0 ? HIGH : LOW]);
        kv_cell *row;
        char q[16];
        if ((st = kv_sheet_add(&show, &row, err)) ||
            (st = kv_cell_format(&show, &row[2], err, "%+.*f", dec, sign * kv_cell_number(&c[DIFF]))))
            break;
        row[0] = c[LAYER], row[1] = c[HEAD];
        if (lo == lo) st = kv_cell_format(&show, &row[3], err, "[%.*f, %.*f]", dec, lo, dec, hi);
        if (!st) st = kv_cell_format(&show, &row[4], err, "%.*f", dec, kv_cell_number(&c[MEAN]));
        if (!st) st = kv_cell_format(&show, &row[5], err, "%.*f", dec, kv_cell_number(&c[BASE]));
        if (!st) st = kv_cell_format(&show, &row[6], err, "%s", kv_p_text(kv_cell_number(&c[Q]), q));
        for (int k = 0; k < 2 && !st; k++)
            if (c[SLOTS + k].kind != KV_CELL_NULL)
                st = kv_cell_format(&show, &row[7 + k], err, "%.1f", kv_cell_number(&c[SLOTS + k]));
    }
    if (!st) {
        fprintf(f, "%s (%s) by query head, ", g->metric, g->unit);
        kv_put_plain(f, la, strlen(la));
        fputs(" against ", f);
        kv_put_plain(f, lb, strlen(lb));
        fprintf(f, ", budget %s, ", s->budget);
        kv_put_plain(f, s->model, strlen(s->model));
        fprintf(
            f,
            ", %zu prompts\n\n%zu of %zu heads lose more, %zu lose less (Wilcoxon, Benjamini-Hochberg, q < %g); the "
            "worst:\n\n",
            n, worse, t->n_row, better, Q_LEVEL);
        kv_print_table(f, &show, "rrrrrrrrr", 2);
        st = kv_allocation_print(f, moved, err);
        fputs("\n", f);
        kv_print_interval_line(f);
        fputs("\nslots: tokens kept by the unit the query head belongs to, mean over prompts; all heads: --json or "
              "--csv\n",
              f);
        if (n < 6)
            fprintf(a->talk, "note: %zu prompts: no p-value of the signed ranks can be below 0.05, so no q either\n",
                    n);
    }
    kv_sheet_free(&show);
    return st;
}

/* Narrow the selection to the two sides. */
static kv_status both_policies(kv_selection *s, const kv_grid_variant *a, const kv_grid_variant *b, kv_error *err)
{
    size_t size;
    free(s->policies), s->policies = NULL;
    FILE *m = kv_text_stream(&s->policies, &size);
    if (!m) return kv_fail(err, KV_ENOMEM, "out of memory");
    putc('[', m);
    kv_put_json(m, a->spec, strlen(a->spec));
    putc(',', m);
    kv_put_json(m, b->spec, strlen(b->spec));
    putc(']', m);
    if (fclose(m)) return kv_fail(err, KV_ENOMEM, "out of memory");
    kv_selection_rebind(s);
    return KV_OK;
}

/* The policy when none is named: the first of these that is here, else the first published one. */
static size_t default_policy(const kv_grid *g, size_t baseline)
{
    static const char *const like[] = {"cake", "snapkv", "h2o"};
    for (size_t i = 0; i < sizeof like / sizeof *like; i++)
        for (size_t v = 0; v < g->n_variant; v++)
            if (!strcmp(g->variant[v].policy, like[i]) && v != baseline) return v;
    for (size_t v = 0; v < g->n_variant; v++)
        if (v != baseline && strcmp(g->variant[v].policy, "full")) return v;
    return SIZE_MAX;
}

kv_status kv_cmd_heads(const kv_analysis *a, kv_error *err)
{
    static const char *const prefer[] = {"head_error", "recall_contested", "recall", NULL};
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_grid g = {0};
    kv_group_note note;
    side x = {0}, y = {0};
    kv_sheet t = {0}, moved = {0};
    size_t va = 0, vb = 0, budget;
    kv_status st;
    const char *who = a->rest.n > 1 ? a->rest.v[1] : NULL, *against = a->rest.n > 2 ? a->rest.v[2] : a->baseline;
    if (a->rest.n > 3) return kv_fail(err, KV_EMISUSE, "unexpected argument '%s': heads [A [B]]", a->rest.v[3]);
    if ((st = kv_analysis_open(a, &db, &s, err)) || (st = kv_selection_model(db, &s, err)) ||
        (st = kv_selection_metric(db, &s, a->metric, prefer, err)) || (st = kv_selection_budget(db, &s, err)) ||
        (st = kv_grid_load(db, &s, &g, err)) || (st = kv_grid_find_budget(&g, s.budget, &budget, err)))
        goto out;
    if ((st = kv_grid_find(&g, against ? against : "oracle", &vb, err))) {
        if (!against && st == KV_EMISSING)
            st = kv_fail(err, KV_EMISSING,
                         "heads compares with 'oracle', which is not here: replay it too (kv-sim run "
                         "-p oracle --detail head), or name a --baseline");
        goto out;
    }
    if (who)
        st = kv_grid_find(&g, who, &va, err);
    else if ((va = default_policy(&g, vb)) == SIZE_MAX)
        st = kv_fail(err, KV_EMISSING, "there is nothing beside '%s' here", g.variant[vb].label);
    if (!st && va == vb) st = kv_fail(err, KV_EMISUSE, "'%s' stands on both sides", g.variant[va].label);
    kv_allow allow = {.any_build = a->any_build};
    if (st || (st = kv_grid_comparable(&g, va, vb, &budget, 1, allow, err)) ||
        (st = load(db, &s, &g.variant[va], &x, err)) || (st = load(db, &s, &g.variant[vb], &y, err)) ||
        (st = aligned(&x, &y, g.variant[va].label, g.variant[vb].label, err)) ||
        (st = kv_sheet_init(&t, N_COL, COLUMNS, err)) || (st = test_heads(&x, &y, &t, err)) ||
        (st = both_policies(&s, &g.variant[va], &g.variant[vb], err)) ||
        (st = kv_allocation_load(db, &s, &moved, &note, err)))
        goto out;
    if (a->format == KV_OUT_CSV)
        kv_print_csv(a->out, &t);
    else if (a->format == KV_OUT_JSON) {
        const char *const words[] = {"metric",   g.metric,           "unit",   g.unit,
                                     "budget",   s.budget,           "policy", g.variant[va].label,
                                     "baseline", g.variant[vb].label};
        for (size_t i = 0; i < 10; i += 2) {
            fprintf(a->out, "%s\"%s\": ", i ? ", " : "{", words[i]);
            kv_put_json(a->out, words[i + 1], strlen(words[i + 1]));
        }
        fputs(", \"interval\": ", a->out);
        kv_print_interval_json(a->out);
        fputs(",\n \"rows\": ", a->out);
        kv_print_json(a->out, &t);
        fputs(",\n \"allocation\": ", a->out);
        kv_print_json(a->out, &moved);
        fputs("}\n", a->out);
    } else
        st = print_text(a, &g, &s, va, vb, &t, &moved, err);
out:
    kv_sheet_free(&x.values), kv_sheet_free(&x.slots), kv_sheet_free(&y.values), kv_sheet_free(&y.slots);
    kv_sheet_free(&t), kv_sheet_free(&moved);
    kv_grid_free(&g);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
