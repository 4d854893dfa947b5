/* predict.c - kv-analyze predict: does a cheap metric order caches as the model's own loss does? Rank correlation of
 * every metric with a target (delta_nll), over cells (policy variant, budget):
 *   pooled         cell means over prompts, all cells. Easy: it knows that more budget is better.
 *   within budget  over the policies of one budget, then the mean over budgets: does it rank policies?
 *   within prompt  the same prompt by prompt, then the mean over prompts: does it hold for a single prompt?
 *   budget B, family F   the parts of it
 *   layer          what one layer loses alone against what has accumulated there (predict_layers.h)
 * The full cache, and cells that keep everything, are left out: they are ties at zero. Intervals resample prompts. */
#include "analyze/predict_layers.h"
#include "analyze/ranks.h"
#include "analyze/stats.h"

#include <math.h>
#include <stdlib.h>

#define RESAMPLES 2000u /* thousands of correlations over hundreds of cells each: 10,000 would take minutes */
#define CELLS_MIN 4u    /* fewer cells at a budget: no correlation */

static const char SQL[] =
    "SELECT r.model, r.spec || ' ' || r.granularity || ' ' || r.page || ' ' || r.cut || ' ' || r.protect AS variant,"
    " r.budget, m.metric || CASE WHEN m.unit LIKE '%layer output%' THEN ' (own output)' ELSE '' END AS metric,"
    " r.category || '/' || r.prompt AS prompt, r.category, m.better, min(r.build) AS build, max(r.build) AS build2,"
    " avg(m.value) AS value"
    " FROM v_run r JOIN v_metric m ON m.run_id = r.run_id"
    " WHERE m.layer IS NULL AND m.head IS NULL AND m.step IS NULL AND r.policy <> 'full'"
    " AND r.mean_bytes < 0.9999 * r.full_bytes AND" KV_WHERE_RUN "GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5";
enum { MODEL, VARIANT, BUDGET, METRIC, PROMPT, CATEGORY, BETTER, BUILD, BUILD2, VALUE };

typedef struct {
    const char **v;
    size_t n;
} names;

typedef struct {
    const kv_sheet *rows;
    size_t from, to; /* rows of this model */
    names metric, prompt, budget, family;
    const char **better;         /* [metric] */
    size_t n_cell, *cell_budget; /* [cell] */
    uint32_t *prompt_family;     /* [prompt] */
    double *value;               /* [metric][cell][prompt], NaN = absent */
    size_t target;
    /* scratch */
    double *x, *y;
} table;

static const char *cell_text(const table *t, size_t r, int c)
{
    return kv_cell_text(kv_sheet_at(t->rows, r, c));
}

static int by_word(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Distinct texts of a column, sorted. */
static kv_status distinct(const table *t, int col, names *out, kv_error *err)
{
    kv_status st = kv_array(&out->v, t->to - t->from, sizeof *out->v, err);
    if (st) return st;
    for (size_t r = t->from; r < t->to; r++) out->v[r - t->from] = cell_text(t, r, col);
    qsort(out->v, t->to - t->from, sizeof *out->v, by_word);
    for (size_t i = 0; i < t->to - t->from; i++)
        if (!out->n || strcmp(out->v[out->n - 1], out->v[i])) out->v[out->n++] = out->v[i];
    return KV_OK;
}

static size_t place(const names *n, const char *s)
{
    const char **hit = bsearch(&s, n->v, n->n, sizeof *n->v, by_word);
    return hit ? (size_t)(hit - n->v) : SIZE_MAX;
}

static bool new_cell(const table *t, size_t r)
{
    return r == t->from || strcmp(cell_text(t, r, VARIANT), cell_text(t, r - 1, VARIANT)) ||
           strcmp(cell_text(t, r, BUDGET), cell_text(t, r - 1, BUDGET));
}

static void table_free(table *t)
{
    free(t->metric.v), free(t->prompt.v), free(t->budget.v), free(t->family.v);
    free(t->better), free(t->cell_budget), free(t->prompt_family), free(t->value), free(t->x), free(t->y);
}

static kv_status table_fill(table *t, const char *target, kv_error *err)
{
    size_t n;
    kv_status st;
    if ((st = distinct(t, METRIC, &t->metric, err)) || (st = distinct(t, PROMPT, &t->prompt, err)) ||
        (st = distinct(t, BUDGET, &t->budget, err)) || (st = distinct(t, CATEGORY, &t->family, err)))
        return st;
    for (size_t r = t->from; r < t->to; r++) t->n_cell += new_cell(t, r);
    t->target = place(&t->metric, target);
    if (!kv_mul(t->metric.n, t->n_cell, &n) || !kv_mul(n, t->prompt.n, &n))
        return kv_fail(err, KV_EUNSUPPORTED, "too many runs: narrow the selection");
    if ((st = kv_array(&t->value, n, sizeof *t->value, err)) ||
        (st = kv_array(&t->cell_budget, t->n_cell, sizeof *t->cell_budget, err)) ||
        (st = kv_array(&t->prompt_family, t->prompt.n, sizeof *t->prompt_family, err)) ||
        (st = kv_array(&t->better, t->metric.n, sizeof *t->better, err)) ||
        (st = kv_array(&t->x, t->n_cell, sizeof *t->x, err)) || (st = kv_array(&t->y, t->n_cell, sizeof *t->y, err)))
        return st;
    for (size_t i = 0; i < n; i++) t->value[i] = NAN;
    for (size_t r = t->from, cell = SIZE_MAX; r < t->to; r++) {
        if (new_cell(t, r)) cell++;
        size_t m = place(&t->metric, cell_text(t, r, METRIC)), p = place(&t->prompt, cell_text(t, r, PROMPT));
        t->value[(m * t->n_cell + cell) * t->prompt.n + p] = kv_cell_number(kv_sheet_at(t->rows, r, VALUE));
        t->cell_budget[cell] = place(&t->budget, cell_text(t, r, BUDGET));
        t->prompt_family[p] = (uint32_t)place(&t->family, cell_text(t, r, CATEGORY));
        t->better[m] = cell_text(t, r, BETTER);
    }
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ correlations */
typedef struct {
    double tau, rho, n; /* n = cells behind it */
} corr;

/* weight[p] = how often prompt p was drawn. Cells of `budget` (SIZE_MAX: all). +: a worse metric goes with a worse
 * target. */
static kv_status correlate(table *t, size_t m, const double *weight, size_t budget, corr *out, kv_error *err)
{
    size_t n = 0, P = t->prompt.n;
    const char *b = t->better[m], *g = t->better[t->target];
    double sign =
        (!strcmp(b, "higher") && !strcmp(g, "lower")) || (!strcmp(b, "lower") && !strcmp(g, "higher")) ? -1 : 1;
    *out = (corr){NAN, NAN, 0};
    for (size_t c = 0; c < t->n_cell; c++) {
        const double *x = t->value + (m * t->n_cell + c) * P, *y = t->value + (t->target * t->n_cell + c) * P;
        double sx = 0, sy = 0, sw = 0;
        if (budget != SIZE_MAX && t->cell_budget[c] != budget) continue;
        for (size_t p = 0; p < P; p++)
            if (weight[p] > 0 && x[p] == x[p] && y[p] == y[p])
                sx += weight[p] * x[p], sy += weight[p] * y[p], sw += weight[p];
        if (sw > 0) t->x[n] = sign * sx / sw, t->y[n++] = sy / sw;
    }
    out->n = (double)n;
    if (n < CELLS_MIN) return KV_OK;
    kv_status st = kv_kendall_tau_b(t->x, t->y, n, &out->tau, err);
    return st ? st : kv_spearman(t->x, t->y, n, &out->rho, err);
}

/* Mean over the budgets that have enough cells. */
static kv_status within_budget(table *t, size_t m, const double *weight, corr *out, kv_error *err)
{
    double tau = 0, rho = 0, n = 0, k = 0;
    for (size_t b = 0; b < t->budget.n; b++) {
        corr c;
        kv_status st = correlate(t, m, weight, b, &c, err);
        if (st) return st;
        if (c.rho == c.rho) tau += c.tau, rho += c.rho, n += c.n, k++;
    }
    *out = (corr){k > 0 ? tau / k : NAN, k > 0 ? rho / k : NAN, n};
    return KV_OK;
}

/* which: SIZE_MAX = pooled, SIZE_MAX - 1 = within budget, else a budget */
#define POOLED SIZE_MAX
#define WITHIN (SIZE_MAX - 1)
static kv_status in_scope(table *t, size_t m, const double *weight, size_t which, corr *out, kv_error *err)
{
    return which == WITHIN ? within_budget(t, m, weight, out, err) : correlate(t, m, weight, which, out, err);
}

static const char *const COLUMNS[] = {"model",    "metric",       "target",        "scope",       "name",
                                      "cells",    "prompts",      "kendall",       "kendall_low", "kendall_high",
                                      "spearman", "spearman_low", "spearman_high", "worst",       "factor"};

static kv_status put_row(const table *t, size_t m, const char *scope, const char *name, corr c, size_t prompts,
                         const double *range, double worst, kv_sheet *s, kv_error *err)
{
    kv_cell *unused;
    size_t r = s->n_row;
    kv_status st;
    if ((st = kv_sheet_add(s, &unused, err)) || (st = kv_set_text(s, r, "model", cell_text(t, t->from, MODEL), err)) ||
        (st = kv_set_text(s, r, "metric", t->metric.v[m], err)) ||
        (st = kv_set_text(s, r, "target", t->metric.v[t->target], err)) ||
        (st = kv_set_text(s, r, "scope", scope, err)) || (st = kv_set_text(s, r, "name", name, err)))
        return st;
    kv_set_int(s, r, "cells", (int64_t)c.n), kv_set_int(s, r, "prompts", (int64_t)prompts);
    kv_set_real(s, r, "kendall", c.tau), kv_set_real(s, r, "spearman", c.rho), kv_set_real(s, r, "worst", worst);
    for (int i = 0; i < 4 && range; i++) {
        static const char *const names4[] = {"kendall_low", "kendall_high", "spearman_low", "spearman_high"};
        kv_set_real(s, r, names4[i], range[i]);
    }
    return KV_OK;
}

/* Percentile intervals over resampled prompts: range = tau low, high, rho low, high; NaN for fewer than 3 prompts. */
static kv_status intervals(table *t, size_t m, size_t which, double range[4], kv_error *err)
{
    double *tau = NULL, *rho = NULL, *weight = NULL;
    size_t P = t->prompt.n, n = 0;
    kv_rng rng = {.s = KV_BOOT_SEED};
    kv_status st;
    for (int i = 0; i < 4; i++) range[i] = NAN;
    if (P < 3) return KV_OK;
    if ((st = kv_array(&tau, RESAMPLES, sizeof *tau, err)) || (st = kv_array(&rho, RESAMPLES, sizeof *rho, err)) ||
        (st = kv_array(&weight, P, sizeof *weight, err)))
        goto out;
    for (uint32_t b = 0; b < RESAMPLES && !st; b++) {
        corr c;
        for (size_t p = 0; p < P; p++) weight[p] = 0;
        for (size_t p = 0; p < P; p++) weight[(kv_rng_next(&rng) >> 32) * P >> 32]++;
        st = in_scope(t, m, weight, which, &c, err);
        if (!st && c.rho == c.rho) tau[n] = c.tau, rho[n++] = c.rho;
        if (kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    for (int i = 0; i < 4 && n && !st; i++)
        range[i] = kv_quantile_of(i < 2 ? tau : rho, n, i % 2 ? (1 + KV_BOOT_LEVEL) / 2 : (1 - KV_BOOT_LEVEL) / 2);
out:
    free(tau), free(rho), free(weight);
    return st;
}

static kv_status one_metric(table *t, size_t m, kv_sheet *s, kv_error *err)
{
    size_t P = t->prompt.n, n = 0;
    double *weight = NULL, *tau = NULL, *rho = NULL, range[4], worst = NAN, cells = 0;
    kv_interval it, ir;
    corr c;
    kv_status st;
    if ((st = kv_array(&weight, P, sizeof *weight, err)) || (st = kv_array(&tau, P, sizeof *tau, err)) ||
        (st = kv_array(&rho, P, sizeof *rho, err)))
        goto out;
    for (size_t p = 0; p < P; p++) weight[p] = 1;
    for (int k = 0; k < 2; k++) {
        size_t which = k ? WITHIN : POOLED;
        if ((st = in_scope(t, m, weight, which, &c, err)) || (st = intervals(t, m, which, range, err)) ||
            (st = put_row(t, m, k ? "within budget" : "pooled", "", c, P, range, NAN, s, err)))
            goto out;
    }
    for (size_t b = 0; b < t->budget.n; b++)
        if ((st = correlate(t, m, weight, b, &c, err)) ||
            (c.n >= CELLS_MIN && (st = put_row(t, m, "budget", t->budget.v[b], c, P, NULL, NAN, s, err))))
            goto out;
    for (size_t f = 0; f < t->family.n; f++) {
        size_t in = 0;
        for (size_t p = 0; p < P; p++) weight[p] = t->prompt_family[p] == f, in += t->prompt_family[p] == f;
        if ((st = within_budget(t, m, weight, &c, err)) ||
            (st = put_row(t, m, "family", t->family.v[f], c, in, NULL, NAN, s, err)))
            goto out;
    }
    for (size_t q = 0; q < P; q++) {
        for (size_t p = 0; p < P; p++) weight[p] = p == q;
        if ((st = within_budget(t, m, weight, &c, err))) goto out;
        if (!(c.rho == c.rho)) continue;
        tau[n] = c.tau, rho[n++] = c.rho, cells += c.n;
        if (!(c.rho >= worst)) worst = c.rho;
    }
    if ((st = kv_mean_interval(tau, n, &it, err)) || (st = kv_mean_interval(rho, n, &ir, err))) goto out;
    c = (corr){it.mean, ir.mean, n ? cells / (double)n : 0};
    const double both[4] = {it.low, it.high, ir.low, ir.high};
    st = put_row(t, m, "within prompt", "", c, n, both, worst, s, err);
out:
    free(weight), free(tau), free(rho);
    return st;
}

/* ------------------------------------------------------------------------------------------------ output */
typedef struct {
    const char *metric;
    double rank; /* within budget */
} place_of;

static int best_first(const void *a, const void *b)
{
    const place_of *x = a, *y = b;
    double p = x->rank == x->rank ? x->rank : -2, q = y->rank == y->rank ? y->rank : -2;
    return p != q ? (p > q ? -1 : 1) : strcmp(x->metric, y->metric);
}

static const kv_cell *row_of(const kv_sheet *s, const char *model, const char *metric, const char *scope,
                             const char *name)
{
    for (size_t r = 0; r < s->n_row; r++) {
        const kv_cell *c = kv_sheet_at(s, r, 0);
        if (!strcmp(kv_cell_text(&c[0]), model) && !strcmp(kv_cell_text(&c[1]), metric) &&
            !strcmp(kv_cell_text(&c[3]), scope) && !strcmp(kv_cell_text(&c[4]), name))
            return c;
    }
    return NULL;
}

static kv_status put_corr(kv_sheet *t, kv_cell *to, const kv_cell *c, int col, kv_error *err)
{
    if (!c || c[col].kind == KV_CELL_NULL) return KV_OK;
    if (c[col + 1].kind == KV_CELL_NULL) return kv_cell_format(t, to, err, "%+.2f", kv_cell_number(&c[col]));
    return kv_cell_format(t, to, err, "%+.2f [%+.2f, %+.2f]", kv_cell_number(&c[col]), kv_cell_number(&c[col + 1]),
                          kv_cell_number(&c[col + 2]));
}

static kv_status print_text(const kv_analysis *a, const table *t, const kv_sheet *s, kv_error *err)
{
    enum { TAU = 7, RHO = 10, WORST = 13, TOP = 4 };
    const char *const head[] = {"metric",       "cells",         "pooled",      "within budget",
                                "tau-b within", "within prompt", "worst prompt"};
    const char *model = cell_text(t, t->from, MODEL), *target = t->metric.v[t->target];
    place_of *o = NULL;
    size_t n = 0;
    kv_sheet x = {0}, f = {0};
    kv_status st = kv_array(&o, t->metric.n, sizeof *o, err);
    for (size_t m = 0; m < t->metric.n && !st; m++)
        if (m != t->target) {
            const kv_cell *c = row_of(s, model, t->metric.v[m], "within budget", "");
            o[n++] = (place_of){t->metric.v[m], c ? kv_cell_number(&c[RHO]) : NAN};
        }
    if (!st) qsort(o, n, sizeof *o, best_first);
    if (!st) st = kv_sheet_init(&x, 7, head, err);
    if (!st) st = kv_sheet_init(&f, 1, &(const char *const){"family"}, err);
    for (size_t i = 0; i < n && !st; i++) {
        const kv_cell *p = row_of(s, model, o[i].metric, "pooled", ""),
                      *w = row_of(s, model, o[i].metric, "within budget", ""),
                      *q = row_of(s, model, o[i].metric, "within prompt", "");
        kv_cell *row;
        if ((st = kv_sheet_add(&x, &row, err)) || (st = kv_cell_format(&x, &row[0], err, "%s", o[i].metric)) ||
            (st = put_corr(&x, &row[2], p, RHO, err)) || (st = put_corr(&x, &row[3], w, RHO, err)) ||
            (st = put_corr(&x, &row[4], w, TAU, err)) || (st = put_corr(&x, &row[5], q, RHO, err)))
            break;
        if (p) row[1] = p[5];
        if (q && q[WORST].kind != KV_CELL_NULL)
            st = kv_cell_format(&x, &row[6], err, "%+.2f", kv_cell_number(&q[WORST]));
        if (!st && i < TOP && o[i].rank == o[i].rank) st = kv_sheet_add_col(&f, o[i].metric, err);
    }
    for (size_t k = 0; k < t->family.n && !st; k++) {
        kv_cell *row;
        if ((st = kv_sheet_add(&f, &row, err)) ||
            (st = kv_cell_format(&f, &row[0], err, "%s", *t->family.v[k] ? t->family.v[k] : "(none)")))
            break;
        for (size_t i = 1; i < f.n_col && !st; i++)
            st = put_corr(&f, &row[i], row_of(s, model, o[i - 1].metric, "family", t->family.v[k]), RHO, err);
    }
    if (!st) {
        fputs("rank correlation with ", a->out);
        kv_put_plain(a->out, target, strlen(target));
        fputs(", ", a->out);
        kv_put_plain(a->out, model, strlen(model));
        fprintf(a->out, ", %zu prompts: Spearman, and Kendall's tau-b within a budget\n\n", t->prompt.n);
        kv_print_table(a->out, &x, "lrrrrrr", 2);
        if (f.n_col > 1) {
            fputs("\nby family, Spearman within a budget\n", a->out);
            kv_print_table(a->out, &f, "lrrrr", 2);
        }
        st = kv_predict_layers_print(a->out, s, model, err);
    }
    free(o);
    kv_sheet_free(&x), kv_sheet_free(&f);
    return st;
}

kv_status kv_cmd_predict(const kv_analysis *a, kv_error *err)
{
    const char *target = a->metric ? a->metric : "delta_nll";
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_sheet rows = {0}, out = {0};
    bool any = false, found = false;
    kv_status st;
    if ((st = kv_analysis_open(a, &db, &s, err)) ||
        (st = kv_query(db, "the metrics", SQL, s.bind, s.n_bind, &rows, err)) ||
        (st = kv_sheet_init(&out, sizeof COLUMNS / sizeof *COLUMNS, COLUMNS, err)))
        goto out;
    for (size_t r = 0; r < rows.n_row; r++) {
        const char *b = kv_cell_text(kv_sheet_at(&rows, r, BUILD)), *c = kv_cell_text(kv_sheet_at(&rows, r, BUILD2)),
                   *first = kv_cell_text(kv_sheet_at(&rows, 0, BUILD));
        found |= !strcmp(kv_cell_text(kv_sheet_at(&rows, r, METRIC)), target);
        if (a->any_build || (!strcmp(b, first) && !strcmp(c, first))) continue;
        st = kv_fail(
            err, KV_EFORMAT,
            "these results come from different builds, '%s' and '%s' (run them again with one, or say --any-build)",
            first, strcmp(b, first) ? b : c);
        goto out;
    }
    if (!found) {
        st = a->metric ? kv_selection_metric(db, &s, a->metric, kv_default_metrics, err) : KV_OK;
        if (!st)
            st =
                kv_fail(err, KV_EMISSING,
                        "no '%s' in this selection of '%s': kv-sim run --model measures delta_nll; --metric NAME takes "
                        "another target",
                        target, a->db);
        goto out;
    }
    if (!strcmp(target, "delta_nll")) st = kv_predict_layers(db, &s, &out, err);
    for (size_t from = 0, to; from < rows.n_row && !st; from = to) {
        for (to = from;
             to < rows.n_row && !kv_cell_cmp(kv_sheet_at(&rows, from, MODEL), kv_sheet_at(&rows, to, MODEL));)
            to++;
        table t = {.rows = &rows, .from = from, .to = to};
        st = table_fill(&t, target, err);
        kv_progress *bar = kv_progress_start("predict", (double)t.metric.n, "metrics");
        for (size_t m = 0; m < t.metric.n && !st && t.target != SIZE_MAX; m++) {
            if (m != t.target) st = one_metric(&t, m, &out, err);
            kv_progress_step(bar, (double)m + 1, NULL);
        }
        kv_progress_end(bar);
        if (!st && t.target != SIZE_MAX && a->format == KV_OUT_TABLE) {
            if (any) fputs("\n", a->out);
            st = print_text(a, &t, &out, err);
            any = true;
        }
        table_free(&t);
    }
    if (st) goto out;
    if (a->format == KV_OUT_CSV)
        kv_print_csv(a->out, &out);
    else if (a->format == KV_OUT_JSON) {
        fprintf(
            a->out,
            "{\"interval\": {\"level\": %g, \"method\": \"percentile bootstrap over prompts; within prompt: over the "
            "prompts' own correlations\", \"resamples\": %u, \"seed\": %u},\n \"rows\": ",
            KV_BOOT_LEVEL, RESAMPLES, KV_BOOT_SEED);
        kv_print_json(a->out, &out);
        fputs("}\n", a->out);
    } else
        fprintf(
            a->out,
            "\n+ : where the metric says worse, the target is worse. cells: (policy variant, budget) without the full "
            "cache\n"
            "[%g%% intervals]: prompts resampled, %u times, seed %u; within prompt: the prompts' own correlations\n",
            100 * KV_BOOT_LEVEL, RESAMPLES, KV_BOOT_SEED);
out:
    kv_sheet_free(&rows), kv_sheet_free(&out);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
