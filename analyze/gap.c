/* gap.c - kv-analyze gap: was it the budget or the policy? The loss of every policy taken apart (metrics.md 5.3), as
 * v_gap of sim/schema.sql defines it: means and intervals over prompts, and one sentence a policy. Needs the runs of
 * `kv-sim run --gap`. */
#include "analyze/analysis.h"

#include <math.h>

/* Rows per run; a run has several of them: ways and terms. */
#define GAP_FROM                                                                                                       \
    " FROM v_gap g JOIN v_run r ON r.run_id = g.run_id"                                                                \
    " LEFT JOIN v_metric e ON e.run_id = g.run_id AND e.metric = 'layer_error' AND e.layer IS NULL AND e.step IS NULL" \
    " LEFT JOIN v_corner o ON o.run_id = g.run_id AND o.metric = 'layer_error' AND o.layer IS NULL AND o.step IS NULL" \
    "  AND o.corner IN ('rank', 'drops') AND o.target = 'recall'"                                                      \
    " WHERE g.metric = :metric AND"

static const char SQL[] =
    "SELECT r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, r.budget, g.metric, g.unit, g.way,"
    " g.term, r.category || '/' || r.prompt AS prompt, r.budget_frac, g.place, e.value AS layer_error,"
    " o.value AS oracle_layer_error, g.value" GAP_FROM " (:budgets IS NOT NULL OR r.budget = :budget) AND" KV_WHERE_RUN
    "ORDER BY r.model, r.budget_frac, r.budget, r.policy, r.spec, g.way, g.place, r.run_id";

#define VARIANT "policy, spec, granularity, page, cut, protect"
const char kv_gap_means[] =
    "SELECT " VARIANT ", budget, way, term, avg(value) AS mean, avg(layer_error) AS layer_error,"
    " avg(oracle_layer_error) AS oracle_layer_error, count(value) AS prompts FROM (SELECT r.policy, r.spec,"
    " r.granularity, r.page, r.cut, r.protect, r.budget, g.way, g.term, g.place, avg(e.value) AS layer_error,"
    " avg(o.value) AS oracle_layer_error, avg(g.value) AS value" GAP_FROM " r.budget = :budget AND" KV_WHERE_RUN
    "GROUP BY r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, r.budget, g.way, g.term, r.category, r.prompt)"
    " GROUP BY " VARIANT ", budget, way, term ORDER BY " VARIANT ", way, place";

static const char *const WAYS[] = {"forward", "reverse", "mean"};
static const char *const SAYS[] = {"ranking, then heads, then layers handed to the oracle",
                                   "layers, then heads, then ranking", "mean of all six orders (Shapley)"};
enum { LOST, RANKING, PREDICTION, AGGREGATION, HEADS, LAYERS, STATICNESS, BUDGET, N_TERM };

typedef struct {
    int model, frac, budget, series, way, place, mean, label, error, oracle_error, n;
} columns;

static int way_of(const kv_cell *c)
{
    int w = 0;
    while (w < 2 && strcmp(kv_cell_text(c), WAYS[w])) w++;
    return w;
}

/* (model, budget by its share, series, way, term). */
static int cmp_rows(const kv_sheet *s, const kv_cell *a, const kv_cell *b, const void *ctx)
{
    const columns *c = ctx;
    (void)s;
    int d = kv_cell_cmp(&a[c->model], &b[c->model]);
    if (!d) d = kv_cell_cmp(&a[c->frac], &b[c->frac]);
    if (!d) d = kv_cell_cmp(&a[c->budget], &b[c->budget]);
    if (!d) d = kv_cell_cmp(&a[c->series], &b[c->series]);
    if (!d) d = way_of(&a[c->way]) - way_of(&b[c->way]);
    return d ? d : kv_cell_cmp(&a[c->place], &b[c->place]);
}

/* Rows of one policy at one budget: term[way][place], NULL where there is none. */
typedef struct {
    const kv_cell *term[3][N_TERM];
    size_t next;
} policy_terms;

static policy_terms read_policy(const kv_sheet *s, const columns *c, size_t from)
{
    policy_terms t = {.next = from};
    const kv_cell *first = kv_sheet_at(s, from, 0);
    for (; t.next < s->n_row; t.next++) {
        const kv_cell *row = kv_sheet_at(s, t.next, 0);
        if (kv_cell_cmp(&row[c->model], &first[c->model]) || kv_cell_cmp(&row[c->budget], &first[c->budget]) ||
            kv_cell_cmp(&row[c->series], &first[c->series]))
            break;
        t.term[way_of(&row[c->way])][(int)kv_cell_number(&row[c->place])] = row;
    }
    return t;
}

static double mean_of(const columns *c, const kv_cell *row)
{
    return row ? kv_cell_number(&row[c->mean]) : NAN;
}

static kv_status table_row(const columns *c, const policy_terms *t, int way, int dec, kv_sheet *out, kv_error *err)
{
    kv_cell *row;
    const kv_cell *lost = t->term[way][LOST];
    kv_status st = kv_sheet_add(out, &row, err);
    if (!st) st = kv_sheet_copy_cell(out, &row[0], &lost[c->label], err);
    for (int p = 0; p < N_TERM && !st; p++)
        if (t->term[way][p]) st = kv_cell_format(out, &row[1 + p], err, "%.*f", dec, mean_of(c, t->term[way][p]));
    const kv_cell *r = t->term[way][RANKING];
    if (!st && r && r[c->mean + 1].kind != KV_CELL_NULL)
        st = kv_cell_format(out, &row[9], err, "[%.*f, %.*f]", dec, kv_cell_number(&r[c->mean + 1]), dec,
                            kv_cell_number(&r[c->mean + 2]));
    row[10] = lost[c->n];
    return st;
}

/* One model and budget, rows [from, to). */
static kv_status print_block(const kv_analysis *a, const kv_sheet *s, const columns *c, size_t from, size_t to, int dec,
                             kv_error *err)
{
    static const char *const head[] = {"policy",      "lost",        "ranking", "prediction",
                                       "aggregation", "heads",       "layers",  "staticness",
                                       "budget",      "95% ranking", "n"};
    kv_status st = KV_OK;
    for (int way = 0; way < 3 && !st; way++) {
        kv_sheet t = {0};
        st = kv_sheet_init(&t, 11, head, err);
        for (size_t r = from; r < to && !st;) {
            policy_terms p = read_policy(s, c, r);
            if (p.term[way][LOST]) st = table_row(c, &p, way, dec, &t, err);
            r = p.next;
        }
        if (!st && t.n_row) {
            fprintf(a->out, "\n  %s: %s\n", WAYS[way], SAYS[way]);
            kv_print_table(a->out, &t, "lrrrrrrrrrr", 2);
        }
        kv_sheet_free(&t);
    }
    return st;
}

/* "12.3" of shares in points, else with the table's decimals. */
static void put(FILE *f, double x, bool share, int dec)
{
    if (share)
        fprintf(f, "%.1f", 100 * x);
    else
        fprintf(f, "%.*f", dec, x);
}

static void print_sentence(FILE *f, const char *metric, const columns *c, const policy_terms *t, int dec)
{
    bool share = !strncmp(metric, "recall", 6);
    static const struct {
        int place;
        const char *words;
    } PART[] = {{STATICNESS, "staticness"}, {LAYERS, "the layer split"}, {HEADS, "the head split"}};
    const kv_cell *const *way = (const kv_cell *const *)t->term[0], *row = way[LOST];
    bool rule = !way[HEADS];
    kv_put_plain(f, kv_cell_text(&row[c->label]), row[c->label].len);
    fputs(": at ", f);
    kv_put_plain(f, kv_cell_text(&row[c->budget]), row[c->budget].len);
    fputs(share ? " it loses " : " its loss is ", f);
    put(f, mean_of(c, row), share, dec);
    fprintf(f, share ? " points of %s: the budget itself costs " : " of %s: the budget itself costs ", metric);
    put(f, mean_of(c, way[BUDGET]), share, dec);
    for (int k = 0; k < 3; k++)
        if (way[PART[k].place]) {
            fprintf(f, ", %s ", rule && PART[k].place == STATICNESS ? "dropping for good" : PART[k].words);
            put(f, mean_of(c, way[PART[k].place]), share, dec);
        }
    fputs(rule ? ", the rule " : ", the ranking ", f);
    put(f, mean_of(c, way[RANKING]), share, dec);
    if (way[PREDICTION]) {
        fputs(" (prediction ", f);
        put(f, mean_of(c, way[PREDICTION]), share, dec);
        fputs(", aggregation ", f);
        put(f, mean_of(c, way[AGGREGATION]), share, dec);
        fputs(")", f);
    }
    if (t->term[1][RANKING]) {
        fputs("; the other way round layers ", f);
        put(f, mean_of(c, t->term[1][LAYERS]), share, dec);
        fputs(", heads ", f);
        put(f, mean_of(c, t->term[1][HEADS]), share, dec);
        fputs(", ranking ", f);
        put(f, mean_of(c, t->term[1][RANKING]), share, dec);
    }
    double own = kv_cell_number(&row[c->error]), oracle = kv_cell_number(&row[c->oracle_error]);
    if (own == own && oracle == oracle && oracle > 0)
        fprintf(f, ". Its layer error is %.3f, %.2f times that of the mass oracle %s (%.3f)", own, own / oracle,
                rule ? "of its class" : "at its counts", oracle);
    fputs(".\n", f);
}

static kv_status print_tables(const kv_analysis *a, const kv_sheet *s, const columns *c, const char *metric,
                              kv_error *err)
{
    int dec = kv_decimals(kv_column_largest(s, c->mean));
    kv_put_plain(a->out, metric, strlen(metric));
    fputs(": loss against the full cache and where it comes from, mean over prompts\n", a->out);
    for (size_t from = 0, to; from < s->n_row; from = to) {
        const kv_cell *first = kv_sheet_at(s, from, 0);
        for (to = from; to < s->n_row && !kv_cell_cmp(&kv_sheet_at(s, to, 0)[c->model], &first[c->model]) &&
                        !kv_cell_cmp(&kv_sheet_at(s, to, 0)[c->budget], &first[c->budget]);)
            to++;
        fputs("\nbudget ", a->out);
        kv_put_plain(a->out, kv_cell_text(&first[c->budget]), first[c->budget].len);
        fputs(", ", a->out);
        kv_put_plain(a->out, kv_cell_text(&first[c->model]), first[c->model].len);
        fputs("\n", a->out);
        kv_status st = print_block(a, s, c, from, to, dec, err);
        if (st) return st;
        fputs("\n", a->out);
        for (size_t r = from; r < to;) {
            policy_terms p = read_policy(s, c, r);
            fputs("  ", a->out);
            print_sentence(a->out, metric, c, &p, dec);
            r = p.next;
        }
    }
    fputs(
        "\nlost = ranking + heads + layers + staticness + budget; ranking = prediction (past rows instead of future "
        "ones)\n+ aggregation (pooling and reduction of rows and heads). staticness: one set for all rows; budget: no "
        "choice keeps it.\n",
        a->out);
    kv_print_interval_line(a->out);
    fputs(", here of ranking; --csv and --json have all\n", a->out);
    return KV_OK;
}

kv_status kv_gap_load(kv_db *db, const kv_selection *s, kv_sheet *out, kv_group_note *note, kv_error *err)
{
    kv_sheet rows = {0};
    *out = (kv_sheet){0};
    kv_status st = kv_query(db, "the terms of the loss", SQL, s->bind, s->n_bind, &rows, err);
    if (!st && !rows.n_row)
        st = kv_fail(err, KV_EMISSING,
                     "no loss of '%s' in '%s' can be taken apart: run the policies with kv-sim run --gap", s->metric,
                     kv_db_path(db));
    if (!st) st = kv_group_prompts(&rows, out, note, err);
    if (!st) st = kv_label_series(out, err);
    kv_sheet_free(&rows);
    if (st) kv_sheet_free(out);
    return st;
}

const char *const kv_gap_metrics[] = {"recall_contested", "recall", NULL};

/* Load and sort. */
static kv_status load(kv_db *db, const kv_selection *s, kv_sheet *t, columns *c, kv_group_note *note, kv_error *err)
{
    kv_status st = kv_gap_load(db, s, t, note, err);
    if (st) return st;
    *c = (columns){kv_sheet_find(t, "model"),
                   kv_sheet_find(t, "budget_frac"),
                   kv_sheet_find(t, "budget"),
                   kv_sheet_find(t, "series"),
                   kv_sheet_find(t, "way"),
                   kv_sheet_find(t, "place"),
                   kv_sheet_find(t, "mean"),
                   kv_sheet_find(t, "label"),
                   kv_sheet_find(t, "layer_error"),
                   kv_sheet_find(t, "oracle_layer_error"),
                   kv_sheet_find(t, "n")};
    return kv_sheet_sort(t, cmp_rows, c, err);
}

kv_status kv_gap_sentences(kv_db *db, const kv_selection *s, FILE *f, kv_error *err)
{
    kv_sheet t = {0};
    kv_group_note note;
    columns c;
    kv_status st = load(db, s, &t, &c, &note, err);
    int dec = st ? 0 : kv_decimals(kv_column_largest(&t, c.mean));
    for (size_t r = 0; r < t.n_row && !st;) {
        policy_terms p = read_policy(&t, &c, r);
        if (!strcmp(kv_cell_text(kv_sheet_at(&t, r, c.budget)), s->budget)) print_sentence(f, s->metric, &c, &p, dec);
        r = p.next;
    }
    kv_sheet_free(&t);
    return st;
}

kv_status kv_cmd_gap(const kv_analysis *a, kv_error *err)
{
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_sheet t = {0};
    kv_group_note note;
    columns c;
    kv_status st;
    if ((st = kv_analysis_open(a, &db, &s, err)) ||
        (st = kv_selection_metric(db, &s, a->metric, kv_gap_metrics, err)) || (st = kv_selection_budget(db, &s, err)) ||
        (st = load(db, &s, &t, &c, &note, err)))
        goto out;
    st = a->format == KV_OUT_TABLE ? print_tables(a, &t, &c, s.metric, err) : kv_print_data(a, s.metric, &t, err);
    if (!st) kv_print_note(a->talk, &note);
out:
    kv_sheet_free(&t);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
