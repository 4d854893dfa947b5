/* summary.c - kv-analyze summary: policies x budgets, mean and interval over prompts, bytes, the oracle of the same
 * class.
 *
 * kv-sim names the oracle of each run's class (v_run.oracle: the same units, pages and protected positions). Where that
 * run is not in the database, and for sets made elsewhere, the class is read off the allocation (v_slots):
 *   layer totals differ      -> the fair bound is oracle-global (the whole model is one pool)
 *   heads of a layer differ  -> oracle-layer
 *   neither                  -> oracle (the same count everywhere)
 * When that oracle was not run, the next wider one stands in: it is still a bound, only a looser one. */
#include "analyze/analysis.h"

static const char *const ORACLES[] = {"oracle", "oracle-layer", "oracle-global"};

/* How far apart the counts of one run are, over the runs of a variant. One slot (or page) per head is rounding. */
static const char CLASS_SQL[] =
    "WITH per AS (SELECT run_id, layer, sum(slots) AS total, max(slots) - min(slots) AS head_spread, count(*) AS heads"
    "  FROM v_slots WHERE run_id IN (SELECT r.run_id FROM v_run r WHERE" KV_WHERE_RUN ") GROUP BY run_id, layer),"
    " spread AS (SELECT run_id, max(total) - min(total) AS layers, max(head_spread) AS heads, max(heads) AS n FROM per"
    "  GROUP BY run_id)"
    " SELECT r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect,"
    "  CASE WHEN max(s.layers - s.n * r.page) > 0 THEN 2 WHEN max(s.heads - r.page) > 0 THEN 1 ELSE 0 END AS class,"
    "  max(r.oracle) AS oracle"
    " FROM v_run r JOIN spread s ON s.run_id = r.run_id"
    " GROUP BY r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect";
#define N_VARIANT 7 /* columns that name a variant, first in both sheets */

/* Class by slots (0 head, 1 layer, 2 global); *oracle = spec of the oracle kv-sim names, or "". */
static int class_of(const kv_sheet *classes, const kv_cell *row, const char **oracle)
{
    *oracle = "";
    for (size_t i = 0; i < classes->n_row; i++) {
        const kv_cell *c = kv_sheet_at(classes, i, 0);
        int k = 0;
        while (k < N_VARIANT && !kv_cell_cmp(&c[k], &row[k])) k++;
        if (k == N_VARIANT) return *oracle = kv_cell_text(&c[N_VARIANT + 1]), (int)kv_cell_number(&c[N_VARIANT]);
    }
    return 0;
}

typedef struct {
    int model, policy, spec, granularity, page, cut, protect, budget, mean;
} columns;

/* The line of `oracle` that is comparable with `row`: same model, budget, page, cut and protection; the same
 * granularity if there is one. NULL when it was not run. */
static const kv_cell *find_oracle(const kv_sheet *s, const columns *c, const kv_cell *row, const char *oracle)
{
    const kv_cell *best = NULL;
    for (size_t i = 0; i < s->n_row; i++) {
        const kv_cell *o = kv_sheet_at(s, i, 0);
        if (strcmp(kv_cell_text(&o[c->policy]), oracle) || kv_cell_cmp(&o[c->model], &row[c->model]) ||
            kv_cell_cmp(&o[c->budget], &row[c->budget]) || kv_cell_cmp(&o[c->page], &row[c->page]) ||
            kv_cell_cmp(&o[c->cut], &row[c->cut]) || kv_cell_cmp(&o[c->protect], &row[c->protect]))
            continue;
        if (!kv_cell_cmp(&o[c->granularity], &row[c->granularity])) return o;
        if (!best) best = o;
    }
    return best;
}

/* The line of the oracle with this spec, at the row's budget. */
static const kv_cell *find_spec(const kv_sheet *s, const columns *c, const kv_cell *row, const char *spec)
{
    for (size_t i = 0; i < s->n_row; i++) {
        const kv_cell *o = kv_sheet_at(s, i, 0);
        if (!strcmp(kv_cell_text(&o[c->spec]), spec) && !kv_cell_cmp(&o[c->model], &row[c->model]) &&
            !kv_cell_cmp(&o[c->budget], &row[c->budget]) && !kv_cell_cmp(&o[c->cut], &row[c->cut]) &&
            !kv_cell_cmp(&o[c->protect], &row[c->protect]))
            return o;
    }
    return NULL;
}

static kv_status add_oracles(kv_sheet *s, const kv_sheet *oracles, const kv_sheet *classes, kv_error *err)
{
    kv_status st;
    if ((st = kv_sheet_add_col(s, "class", err)) || (st = kv_sheet_add_col(s, "oracle", err)) ||
        (st = kv_sheet_add_col(s, "oracle_mean", err)))
        return st;
    columns c = {kv_sheet_find(s, "model"),       kv_sheet_find(s, "policy"), kv_sheet_find(s, "spec"),
                 kv_sheet_find(s, "granularity"), kv_sheet_find(s, "page"),   kv_sheet_find(s, "cut"),
                 kv_sheet_find(s, "protect"),     kv_sheet_find(s, "budget"), kv_sheet_find(s, "mean")};
    static const char *const names[] = {"head", "layer", "global"};
    int to = kv_sheet_find(s, "class");
    for (size_t i = 0; i < s->n_row; i++) {
        kv_cell *row = kv_sheet_at(s, i, 0);
        const char *policy = kv_cell_text(&row[c.policy]);
        const char *spec;
        int class = class_of(classes, row, &spec);
        const kv_cell *own = *spec ? find_spec(oracles, &c, row, spec) : NULL;
        if (own && !strcmp(kv_cell_text(&row[c.policy]), kv_cell_text(&own[c.policy]))) own = NULL; /* itself */
        const char *name = own ? kv_cell_text(&own[c.policy]) : "";
        for (int k = 0; k < 3 && own; k++)
            if (!strcmp(name, ORACLES[k])) class = k;
        const char *word =
            own && (!strcmp(name, "oracle-match") || !strcmp(name, "oracle-steps.decode")) ? name + 7 : names[class];
        if ((st = kv_cell_format(s, &row[to], err, "%s", word))) return st;
        if (!strcmp(policy, "full") || kv_policy_place(policy) >= 1000) continue; /* nothing to be compared with */
        if (own) {
            if ((st = kv_cell_format(s, &row[to + 1], err, "%s", name))) return st;
            row[to + 2] = own[c.mean];
            continue;
        }
        for (int k = class; k < 3; k++) {
            const kv_cell *o = find_oracle(oracles, &c, row, ORACLES[k]);
            if (!o) continue;
            if ((st = kv_cell_format(s, &row[to + 1], err, "%s", ORACLES[k]))) return st;
            row[to + 2] = o[c.mean];
            break;
        }
    }
    return KV_OK;
}

/* (model, budget by its share of the prompt, best mean first). */
typedef struct {
    int model, frac, budget, mean, series;
    double sign; /* +1: lower is better */
} order;

static int cmp_rows(const kv_sheet *s, const kv_cell *a, const kv_cell *b, const void *ctx)
{
    const order *o = ctx;
    (void)s;
    int d = kv_cell_cmp(&a[o->model], &b[o->model]);
    if (!d) d = kv_cell_cmp(&a[o->frac], &b[o->frac]);
    if (!d) d = kv_cell_cmp(&a[o->budget], &b[o->budget]);
    if (!d && o->sign != 0) {
        bool na = a[o->mean].kind == KV_CELL_NULL, nb = b[o->mean].kind == KV_CELL_NULL;
        double x = o->sign * kv_cell_number(&a[o->mean]), y = o->sign * kv_cell_number(&b[o->mean]);
        d = na || nb ? na - nb : (x > y) - (x < y);
    }
    return d ? d : kv_cell_cmp(&a[o->series], &b[o->series]);
}

/* A budget's share must be one number for all its lines, although policies may lack prompts: the smallest counts. */
static void level_fracs(kv_sheet *s, const order *o)
{
    for (size_t i = 0; i < s->n_row; i++)
        for (size_t j = 0; j < s->n_row; j++) {
            kv_cell *a = kv_sheet_at(s, i, 0), *b = kv_sheet_at(s, j, 0);
            if (!kv_cell_cmp(&a[o->model], &b[o->model]) && !kv_cell_cmp(&a[o->budget], &b[o->budget]) &&
                kv_cell_cmp(&b[o->frac], &a[o->frac]) < 0)
                a[o->frac] = b[o->frac];
        }
}

/* Lines [from, to) of one budget. */
static kv_status print_block(const kv_analysis *a, const kv_sheet *s, size_t from, size_t to, int dec, kv_error *err)
{
    const char *const head[] = {"policy", "mean", "95% interval", "kept", "MiB", "n", "oracle", "of class", ""};
    int mean = kv_sheet_find(s, "mean"), oracle = kv_sheet_find(s, "oracle"), n = kv_sheet_find(s, "n");
    int verified = kv_sheet_find(s, "verified"), overspent = kv_sheet_find(s, "overspent");
    kv_sheet t = {0};
    kv_status st = kv_sheet_init(&t, 9, head, err);
    for (size_t r = from; r < to && !st; r++) {
        const kv_cell *c = kv_sheet_at(s, r, 0);
        kv_cell *row;
        if ((st = kv_sheet_add(&t, &row, err)) ||
            (st = kv_sheet_copy_cell(&t, &row[0], &c[kv_sheet_find(s, "label")], err)))
            break;
        if (c[mean].kind != KV_CELL_NULL) st = kv_cell_format(&t, &row[1], err, "%.*f", dec, kv_cell_number(&c[mean]));
        if (!st && c[mean + 1].kind != KV_CELL_NULL)
            st = kv_cell_format(&t, &row[2], err, "[%.*f, %.*f]", dec, kv_cell_number(&c[mean + 1]), dec,
                                kv_cell_number(&c[mean + 2]));
        if (!st) st = kv_cell_format(&t, &row[3], err, "%.1f%%", 100 * kv_cell_number(&c[kv_sheet_find(s, "frac")]));
        double mib = kv_cell_number(&c[kv_sheet_find(s, "bytes")]) / (1 << 20);
        if (!st) st = kv_cell_format(&t, &row[4], err, "%.*f", mib < 10 ? 3 : 1, mib);
        row[5] = c[n];
        if (!st && c[oracle + 1].kind != KV_CELL_NULL)
            st = kv_cell_format(&t, &row[6], err, "%.*f", dec, kv_cell_number(&c[oracle + 1]));
        const char *name = kv_cell_text(&c[oracle]);
        if (!st && *name) st = kv_cell_format(&t, &row[7], err, "%s", name[6] == '-' ? name + 7 : "head");
        if (!st)
            st = kv_cell_format(&t, &row[8], err, "%s%s", kv_cell_number(&c[overspent]) > 0 ? "*" : "",
                                strncmp(kv_cell_text(&c[verified]), "not verified", 12) ? "" : "?");
    }
    if (!st) kv_print_table(a->out, &t, "lrrrrrrll", 2);
    kv_sheet_free(&t);
    return st;
}

static kv_status print_table(const kv_analysis *a, const kv_sheet *s, kv_error *err)
{
    int model = kv_sheet_find(s, "model"), budget = kv_sheet_find(s, "budget"), mean = kv_sheet_find(s, "mean");
    int dec = kv_decimals(kv_column_largest(s, mean)), verified = kv_sheet_find(s, "verified"),
        label = kv_sheet_find(s, "label");
    bool overspent = false;
    kv_print_heading(a->out, s);
    fputs(": mean over prompts\n", a->out);
    for (size_t from = 0, to; from < s->n_row; from = to) {
        const kv_cell *c = kv_sheet_at(s, from, 0);
        for (to = from; to < s->n_row && !kv_cell_cmp(&kv_sheet_at(s, to, 0)[budget], &c[budget]) &&
                        !kv_cell_cmp(&kv_sheet_at(s, to, 0)[model], &c[model]);)
            overspent |= kv_cell_number(kv_sheet_at(s, to++, kv_sheet_find(s, "overspent"))) > 0;
        fputs("\nbudget ", a->out);
        kv_put_plain(a->out, kv_cell_text(&c[budget]), c[budget].len);
        fprintf(a->out, " = %.1f tokens per KV head and layer, ",
                kv_cell_number(&c[kv_sheet_find(s, "budget_tokens")]));
        kv_put_plain(a->out, kv_cell_text(&c[model]), c[model].len);
        fputs("\n", a->out);
        kv_status st = print_block(a, s, from, to, dec, err);
        if (st) return st;
    }
    fputs("\n", a->out);
    kv_print_interval_line(a->out);
    fputs("\nkept: mean bytes / mean bytes of the full cache over the same rows\n", a->out);
    fputs(
        "oracle: the same metric for the oracle that may move slots as the policy does (class head, layer or global)\n",
        a->out);
    if (overspent) fputs("*  kept more slots than the budget allows (overspent)\n", a->out);
    for (size_t r = 0; r < s->n_row; r++) { /* once per variant */
        const char *v = kv_cell_text(kv_sheet_at(s, r, verified));
        bool said = strncmp(v, "not verified", 12) != 0;
        for (size_t q = 0; q < r && !said; q++) said = !kv_cell_cmp(kv_sheet_at(s, q, label), kv_sheet_at(s, r, label));
        if (said) continue;
        fputs("?  ", a->out);
        kv_put_plain(a->out, kv_cell_text(kv_sheet_at(s, r, label)), kv_sheet_at(s, r, label)->len);
        fputs(": ", a->out);
        kv_put_plain(a->out, v, strlen(v));
        fputs("\n", a->out);
    }
    return KV_OK;
}

/* The oracles' lines, also when --policy leaves them out of the table. None at all is not an error. */
static kv_status load_oracles(kv_db *db, const kv_selection *s, kv_sheet *out, kv_error *err)
{
    kv_selection o = *s; /* borrows the strings */
    kv_group_note note;
    char names[] = "[\"oracle\", \"oracle-layer\", \"oracle-global\", \"oracle-match\", \"oracle-steps.decode\"]";
    o.policies = names;
    kv_selection_rebind(&o);
    kv_status st = kv_curve_load(db, &o, out, &note, err);
    return st == KV_EMISSING ? KV_OK : st;
}

kv_status kv_cmd_summary(const kv_analysis *a, kv_error *err)
{
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_sheet t = {0}, classes = {0}, oracles = {0};
    kv_group_note note;
    kv_status st;
    if ((st = kv_analysis_open(a, &db, &s, err)) ||
        (st = kv_selection_metric(db, &s, a->metric, kv_default_metrics, err)))
        goto out;
    if ((st = kv_curve_load(db, &s, &t, &note, err)) || (st = load_oracles(db, &s, &oracles, err)) ||
        (st = kv_query(db, "the classes of allocation", CLASS_SQL, s.bind, s.n_bind, &classes, err)) ||
        (st = add_oracles(&t, &oracles, &classes, err)))
        goto out;
    order o = {kv_sheet_find(&t, "model"), kv_sheet_find(&t, "budget_frac"), kv_sheet_find(&t, "budget"),
               kv_sheet_find(&t, "mean"),  kv_sheet_find(&t, "series"),      0};
    const char *better = kv_cell_text(kv_sheet_at(&t, 0, kv_sheet_find(&t, "better")));
    o.sign = !strcmp(better, "lower") ? 1 : !strcmp(better, "higher") ? -1 : 0;
    if (a->format == KV_OUT_TABLE) level_fracs(&t, &o);
    if ((st = kv_sheet_sort(&t, cmp_rows, &o, err))) goto out;
    st = a->format == KV_OUT_TABLE ? print_table(a, &t, err) : kv_print_data(a, s.metric, &t, err);
    if (!st) kv_print_note(a->talk, &note);
out:
    kv_sheet_free(&t), kv_sheet_free(&classes), kv_sheet_free(&oracles);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
