/* report_verdict.c - the verdict in words, with its uncertainty: at about 5, 10 and 20 % of the prompt, which policy
 * loses least, whether these prompts tell it from the next one, and how much of the loss no policy could avoid. */
#include "analyze/report.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/contrast.h"

enum { N_BUDGET = 3, N_ENOUGH = 6 }; /* five pairs, all of one sign: p = 1/16 */

bool kv_report_is_reference(const char *policy)
{
    return !strcmp(policy, "full") || kv_policy_place(policy) >= 1000;
}

/* Index of the first row of the budget nearest to `frac` on a log scale. */
static size_t nearest(const kv_report *r, double frac)
{
    size_t best = 0;
    double least = INFINITY;
    for (size_t i = 0; i < r->curve.n_row; i++) {
        double f = kv_cell_number(kv_sheet_at(&r->curve, i, r->c_frac)), far = fabs(log(fmax(f, 1e-9)) - log(frac));
        if (far < least - 1e-12) least = far, best = i;
    }
    return best;
}

/* a is better than b; undefined is worse than everything. */
static bool better(const kv_report *r, size_t a, size_t b)
{
    double x = kv_cell_number(kv_sheet_at(&r->curve, a, r->c_mean)),
           y = kv_cell_number(kv_sheet_at(&r->curve, b, r->c_mean));
    if (isnan(x) || isnan(y)) return !isnan(x);
    return r->lower ? x < y : x > y;
}

static void put_interval(FILE *f, double mean, double low, double high)
{
    fprintf(f, "%.4g", mean);
    if (!isnan(low)) fprintf(f, " <span class=\"note\">[%.4g, %.4g]</span>", low, high);
}

static void put_label(kv_report *r, size_t row)
{
    fputs("<b>", r->f);
    kv_html_puts(r->f, kv_cell_text(kv_sheet_at(&r->curve, row, r->c_label)));
    fputs("</b>", r->f);
}

/* "NAME is higher by 0.02 [0.01, 0.03] over 12 prompts, better on 3 of 12, p = 0.001: these prompts tell the two
 * apart."
 */
static kv_status put_against(kv_report *r, const kv_grid *g, size_t best, size_t other, const char *what, kv_error *err)
{
    const char *label[2] = {kv_cell_text(kv_sheet_at(&r->curve, other, kv_sheet_find(&r->curve, "label"))),
                            kv_cell_text(kv_sheet_at(&r->curve, best, kv_sheet_find(&r->curve, "label")))};
    size_t who[2] = {0}, budget = 0;
    kv_pairs p = {0};
    kv_contrast c;
    char text[16];
    kv_error why = {.msg = ""};
    kv_status st = kv_grid_find_budget(g, kv_cell_text(kv_sheet_at(&r->curve, best, r->c_budget)), &budget, &why);
    for (int k = 0; k < 2 && !st; k++) st = kv_grid_find(g, label[k], &who[k], &why);
    /* The page lists the builds and the prompts of every line; what is refused here was measured differently. */
    if (!st)
        st = kv_grid_comparable(g, who[0], who[1], &budget, 1, (kv_allow){.common = true, .any_build = true}, &why);
    if (st) {
        fputs(" <span class=\"note\">", r->f), kv_html_puts(r->f, why.msg), fputs(".</span>", r->f);
        return KV_OK;
    }
    st = kv_grid_pairs(g, who[0], who[1], budget, &p, err);
    if (!st && p.n) st = kv_contrast_of(&p, g->better, 0, NAN, &c, err);
    if (!st && p.n) {
        double d = c.diff.mean, flip = d < 0 ? -1 : 1;
        bool whole = c.diff.has_interval;
        fprintf(r->f, " %s ", what);
        put_label(r, other);
        fputs(d < 0 ? " is lower by " : " is higher by ", r->f);
        put_interval(r->f, flip * d, whole ? fmin(flip * c.diff.low, flip * c.diff.high) : NAN,
                     fmax(flip * c.diff.low, flip * c.diff.high));
        fprintf(r->f, " over %zu prompt%s", p.n, p.n == 1 ? "" : "s");
        if (whole) {
            fprintf(r->f, ", better on %zu (%s p ", c.wins, c.binary ? "McNemar" : "Wilcoxon");
            kv_html_format(r->f, "%s%s", c.p < 1e-6 ? "" : "= ", kv_p_text(c.p, text));
            bool told = (c.diff.low > 0 || c.diff.high < 0) && c.p < 1 - KV_BOOT_LEVEL;
            fputs(told             ? "): these prompts tell the two apart"
                  : p.n < N_ENOUGH ? "): too few prompts to tell the two apart"
                                   : "): these prompts do <em>not</em> tell the two apart",
                  r->f);
        }
        fputs(".", r->f);
    }
    kv_pairs_free(&p);
    return st;
}

/* g is empty where the metric's values are not of one kind. */
static kv_status at_budget(kv_report *r, const kv_grid *g, const char *budget, kv_error *err)
{
    const kv_sheet *c = &r->curve;
    size_t none = SIZE_MAX, best = none, second = none, simple = none, oracle = none;
    kv_status st = KV_OK;
    for (size_t i = 0; i < c->n_row; i++) {
        const char *policy = kv_cell_text(kv_sheet_at(c, i, r->c_policy));
        if (strcmp(kv_cell_text(kv_sheet_at(c, i, r->c_budget)), budget)) continue;
        if (isnan(kv_cell_number(kv_sheet_at(c, i, r->c_mean)))) continue;
        if (!strncmp(policy, "oracle", 6) && strcmp(policy, "oracle-steps") && (oracle == none || better(r, i, oracle)))
            oracle = i;
        if (kv_report_is_reference(policy)) continue;
        if (!strcmp(policy, "streaming") && simple == none) simple = i;
        if (best == none || better(r, i, best))
            second = best, best = i;
        else if (second == none || better(r, i, second))
            second = i;
    }
    if (best == none) return KV_OK;
    double mean = kv_cell_number(kv_sheet_at(c, best, r->c_mean));
    fputs("<li>At ", r->f);
    kv_html_puts(r->f, budget);
    fprintf(r->f, " (%.3g&nbsp;MB of keys and values a request, %.3g&nbsp;%% of the full cache): ",
            kv_cell_number(kv_sheet_at(c, best, r->c_bytes)) / 1e6,
            100 * kv_cell_number(kv_sheet_at(c, best, kv_sheet_find(c, "frac"))));
    put_label(r, best);
    fprintf(r->f, " has the %s %s, ", r->lower ? "lowest" : "highest", r->s.metric);
    put_interval(r->f, mean, kv_cell_number(kv_sheet_at(c, best, r->c_low)),
                 kv_cell_number(kv_sheet_at(c, best, r->c_high)));
    fputs(".", r->f);
    if (second != none && g->n_variant) st = put_against(r, g, best, second, "The next,", err);
    if (!st && simple != none && simple != best && simple != second && g->n_variant)
        st = put_against(r, g, best, simple, "Sinks and the most recent tokens alone,", err);
    if (!st && oracle != none) {
        double bound = kv_cell_number(kv_sheet_at(c, oracle, r->c_mean));
        bool bounds = r->lower ? bound <= mean : bound >= mean;
        fputs(bounds ? " With foresight " : " Knowing the attention to come does not help here: ", r->f);
        put_label(r, oracle);
        fprintf(r->f, " reaches %.4g", bound);
        if (bounds && r->lower && mean > 0)
            fprintf(r->f, ": %.0f&nbsp;%% of the loss is the policy's, the rest is what the budget itself costs",
                    100 * (mean - bound) / mean);
        fputs(".", r->f);
    }
    fputs("</li>\n", r->f);
    return st;
}

/* Means (a policy against itself) and mean differences of any two policies at the budgets spoken of. */
static kv_status put_sql(kv_report *r, const char *const *budget, kv_error *err)
{
    static const char *const names[N_BUDGET] = {":b0", ":b1", ":b2"};
    kv_bind bind[KV_BINDS_MAX + N_BUDGET];
    memcpy(bind, r->s.bind, r->s.n_bind * sizeof *bind);
    for (int k = 0; k < N_BUDGET; k++) bind[r->s.n_bind + (size_t)k] = (kv_bind){names[k], budget[k]};
    char *sql = kv_format(
        "WITH p AS (%s AND r.budget IN (:b0, :b1, :b2) %s GROUP BY " KV_VARIANT ", r.budget, r.category, r.prompt) "
        "SELECT x.budget, x.policy, x.spec, y.policy AS other, y.spec AS other_spec, avg(y.value - x.value) AS "
        "difference,"
        " avg(x.value) AS mean, avg(x.bytes) AS bytes, avg(x.frac) AS frac, count(*) AS prompts "
        "FROM p x JOIN p y ON y.budget = x.budget AND y.prompt = x.prompt AND y.unit = x.unit "
        "WHERE x.value IS NOT NULL AND y.value IS NOT NULL "
        "GROUP BY x.budget, x.policy, x.spec, x.granularity, x.page, x.cut, x.protect, y.policy, y.spec, y.granularity,"
        " y.page, y.cut, y.protect ORDER BY x.budget, mean, difference",
        KV_PER_PROMPT(", r.budget", "m.layer IS NULL AND m.head IS NULL"), r->where);
    if (!sql) return kv_fail(err, KV_ENOMEM, "out of memory");
    kv_html_sql(r->f, "the means and differences above", sql, bind, r->s.n_bind + N_BUDGET);
    free(sql);
    return KV_OK;
}

kv_status kv_report_verdict(kv_report *r, kv_error *err)
{
    static const double FRACS[N_BUDGET] = {0.05, 0.1, 0.2};
    const char *seen[N_BUDGET] = {NULL};
    kv_grid g;
    kv_status st = kv_grid_load(r->db, &r->s, &g, err);
    if (st == KV_EFORMAT) { /* two units of one metric: each line stands for itself */
        kv_grid_free(&g);
        st = KV_OK;
    }
    fputs("<h3>", r->f);
    kv_html_puts(r->f, r->s.model);
    fputs("</h3>\n<ul class=\"verdict\">\n", r->f);
    for (int k = 0; k < N_BUDGET && !st; k++) {
        seen[k] = kv_cell_text(kv_sheet_at(&r->curve, nearest(r, FRACS[k]), r->c_budget));
        bool again = false;
        for (int j = 0; j < k; j++) again |= !strcmp(seen[j], seen[k]);
        if (!again) st = at_budget(r, &g, seen[k], err);
    }
    fputs("</ul>\n<p class=\"note\">In brackets: ", r->f);
    kv_print_interval_line(r->f);
    fputs("; differences are paired by prompt. They speak about prompts like these, not about other kinds of "
          "prompt.</p>\n",
          r->f);
    if (!st) st = put_sql(r, seen, err);
    kv_grid_free(&g);
    return st;
}
