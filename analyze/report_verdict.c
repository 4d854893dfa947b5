/* report_verdict.c - the verdict in words, with its uncertainty: at about 5, 10 and 20 % of the prompt, which policy
 * loses least, whether these prompts tell it from the next one, and how much of the loss no policy could avoid. */
#include "analyze/report.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/stats.h"

enum { N_BUDGET = 3 };

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

static kv_status values(kv_report *r, size_t row, kv_sheet *out, kv_error *err)
{
    static const char *const names[] = {"policy", "spec", "granularity", "page", "cut", "protect"};
    static const char *const params[] = {":v0", ":v1", ":v2", ":v3", ":v4", ":v5"};
    char page[32], *sql = kv_format("%s AND r.budget = :budget AND r.policy = :v0 AND r.spec = :v1 AND r.granularity = "
                                    ":v2 AND CAST(r.page AS TEXT) = :v3 AND r.cut = :v4 AND r.protect = :v5 %s"
                                    " GROUP BY r.category, r.prompt HAVING value IS NOT NULL ORDER BY prompt",
                                    KV_PER_PROMPT("", "m.layer IS NULL AND m.head IS NULL"), r->where);
    kv_bind bind[KV_BINDS_MAX + 6];
    memcpy(bind, r->s.bind, r->s.n_bind * sizeof *bind);
    for (size_t i = 0; i < r->s.n_bind; i++)
        if (!strcmp(bind[i].name, ":budget")) bind[i].text = kv_cell_text(kv_sheet_at(&r->curve, row, r->c_budget));
    for (int k = 0; k < 6; k++) {
        const kv_cell *c = kv_sheet_at(&r->curve, row, kv_sheet_find(&r->curve, names[k]));
        if (c->kind == KV_CELL_INT) snprintf(page, sizeof page, "%lld", (long long)c->u.i);
        bind[r->s.n_bind + (size_t)k] = (kv_bind){params[k], c->kind == KV_CELL_INT ? page : kv_cell_text(c)};
    }
    kv_status st = sql ? kv_query(r->db, "values by prompt", sql, bind, r->s.n_bind + 6, out, err)
                       : kv_fail(err, KV_ENOMEM, "out of memory");
    free(sql);
    return st;
}

/* Mean of b - a over the prompts that both have, with its interval. */
static kv_status difference(kv_report *r, size_t a, size_t b, kv_interval *out, size_t *n, kv_error *err)
{
    kv_sheet x = {0}, y = {0};
    double *d = NULL;
    *n = 0;
    kv_status st = values(r, a, &x, err);
    if (!st) st = values(r, b, &y, err);
    if (!st) st = kv_array(&d, x.n_row + 1, sizeof *d, err);
    if (!st && x.n_row && y.n_row) {
        int p = kv_sheet_find(&x, "prompt"), v = kv_sheet_find(&x, "value");
        for (size_t i = 0, j = 0; i < x.n_row && j < y.n_row;) { /* both by prompt */
            int c = kv_cell_cmp(kv_sheet_at(&x, i, p), kv_sheet_at(&y, j, p));
            if (c) {
                c < 0 ? i++ : j++;
                continue;
            }
            d[(*n)++] = kv_cell_number(kv_sheet_at(&y, j++, v)) - kv_cell_number(kv_sheet_at(&x, i++, v));
        }
    }
    if (!st) st = kv_mean_interval(d, *n, out, err);
    free(d);
    kv_sheet_free(&x), kv_sheet_free(&y);
    return st;
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

/* "; NAME is 0.02 [0.01, 0.03] higher: told apart" */
static kv_status put_against(kv_report *r, size_t best, size_t other, const char *what, kv_error *err)
{
    kv_interval d;
    size_t n;
    kv_status st = difference(r, best, other, &d, &n, err);
    if (st || !n) return st;
    fprintf(r->f, " %s ", what);
    put_label(r, other);
    fputs(d.mean < 0 ? " is lower by " : " is higher by ", r->f);
    double flip = d.mean < 0 ? -1 : 1;
    put_interval(r->f, flip * d.mean, d.has_interval ? fmin(flip * d.low, flip * d.high) : NAN,
                 fmax(flip * d.low, flip * d.high));
    fprintf(r->f, " over %zu prompt%s%s.", n, n == 1 ? "" : "s",
            !d.has_interval           ? ""
            : d.low > 0 || d.high < 0 ? ": these prompts tell the two apart"
                                      : ": these prompts do <em>not</em> tell the two apart");
    return KV_OK;
}

static kv_status at_budget(kv_report *r, const char *budget, kv_error *err)
{
    const kv_sheet *c = &r->curve;
    size_t none = SIZE_MAX, best = none, second = none, simple = none, oracle = none;
    kv_status st = KV_OK;
    for (size_t i = 0; i < c->n_row; i++) {
        const char *policy = kv_cell_text(kv_sheet_at(c, i, r->c_policy));
        if (strcmp(kv_cell_text(kv_sheet_at(c, i, r->c_budget)), budget)) continue;
        if (isnan(kv_cell_number(kv_sheet_at(c, i, r->c_mean)))) continue;
        if (!strncmp(policy, "oracle", 6) && (oracle == none || better(r, i, oracle))) oracle = i;
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
    if (second != none) st = put_against(r, best, second, "The next,", err);
    if (!st && simple != none && simple != best && simple != second)
        st = put_against(r, best, simple, "Sinks and the most recent tokens alone,", err);
    if (!st && oracle != none) {
        double bound = kv_cell_number(kv_sheet_at(c, oracle, r->c_mean));
        fputs(" With foresight ", r->f);
        put_label(r, oracle);
        fprintf(r->f, " reaches %.4g", bound);
        if (r->lower && mean > 0 && bound <= mean)
            fprintf(r->f, ": %.0f&nbsp;%% of the loss is the policy's, the rest is what the budget itself costs",
                    100 * (mean - bound) / mean);
        fputs(".", r->f);
    }
    fputs("</li>\n", r->f);
    return st;
}

kv_status kv_report_verdict(kv_report *r, kv_error *err)
{
    static const double FRACS[N_BUDGET] = {0.05, 0.1, 0.2};
    const char *seen[N_BUDGET] = {NULL};
    kv_status st = KV_OK;
    fputs("<h3>", r->f);
    kv_html_puts(r->f, r->s.model);
    fputs("</h3>\n<ul class=\"verdict\">\n", r->f);
    for (int k = 0; k < N_BUDGET && !st; k++) {
        seen[k] = kv_cell_text(kv_sheet_at(&r->curve, nearest(r, FRACS[k]), r->c_budget));
        bool again = false;
        for (int j = 0; j < k; j++) again |= !strcmp(seen[j], seen[k]);
        if (!again) st = at_budget(r, seen[k], err);
    }
    fputs("</ul>\n<p class=\"note\">In brackets: ", r->f);
    kv_print_interval_line(r->f);
    fputs("; differences are paired by prompt. They speak about prompts like these, not about other kinds of "
          "prompt.</p>\n",
          r->f);
    return st;
}
