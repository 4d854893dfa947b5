/* report_tables.c - the tables and maps of the report. Every number comes from the statement printed beside it; only
 * the intervals are computed here (stats.h), from the values per prompt that the inner SELECT gives. */
#include "analyze/report.h"

#include <math.h>
#include <stdlib.h>

enum { MAP_HEADS_MAX = 8, WORST = 25 }; /* policies with a layer x head map; lines of the table of failures */

static char *statement(const kv_report *r, const char *fmt)
{
    return kv_format(fmt, r->where);
}

static void cell(FILE *f, double v, int digits)
{
    if (isnan(v))
        fputs("<td data-v=\"\">-</td>", f);
    else
        fprintf(f, "<td data-v=\"%.17g\">%.*g</td>", v, digits, v);
}

static void text_cell(FILE *f, const char *tag, const char *s)
{
    fprintf(f, "<%s class=\"t\"%s>", tag, *tag == 't' && tag[1] == 'h' ? " scope=\"row\"" : "");
    kv_html_puts(f, s);
    fprintf(f, "</%s>", tag);
}

/* ------------------------------------------------------------------------------------------------ policies x budgets
 */
static void put_metric_table(kv_report *r, const kv_sheet *s, const char *metric, bool open)
{
    static const char *const head[] = {"policy", "checked", "budget", "MB",     "% of full",
                                       "mean",   "low",     "high",   "prompts"};
    FILE *f = r->f;
    int label = kv_sheet_find(s, "label"), verified = kv_sheet_find(s, "verified"), budget = kv_sheet_find(s, "budget"),
        bytes = kv_sheet_find(s, "bytes"), frac = kv_sheet_find(s, "frac"), mean = kv_sheet_find(s, "mean"),
        over = kv_sheet_find(s, "overspent");
    fprintf(f, "<details%s><summary>%s", open ? " open" : "", metric);
    kv_html_format(f, " (%s), %s%s", kv_cell_text(kv_sheet_at(s, 0, kv_sheet_find(s, "unit"))),
                   kv_cell_text(kv_sheet_at(s, 0, kv_sheet_find(s, "better"))), " is better");
    fputs("</summary>\n<form class=\"pickers\" hidden><label>Budget <select data-filter=\"t-", f);
    kv_html_format(f, "%s-%s", metric, r->s.model);
    fputs("\"><option value=\"\">all</option>", f);
    for (size_t i = 0; i < s->n_row; i++) {
        bool seen = false;
        for (size_t j = 0; j < i && !seen; j++)
            seen = !kv_cell_cmp(kv_sheet_at(s, i, budget), kv_sheet_at(s, j, budget));
        if (seen) continue;
        bool shown = r->s.budget && !strcmp(r->s.budget, kv_cell_text(kv_sheet_at(s, i, budget)));
        fprintf(f, "<option%s>", shown ? " selected" : "");
        kv_html_puts(f, kv_cell_text(kv_sheet_at(s, i, budget)));
        fputs("</option>", f);
    }
    fputs("</select></label></form>\n<div class=\"scroll\"><table class=\"sortable\" id=\"t-", f);
    kv_html_format(f, "%s-%s", metric, r->s.model);
    fputs("\"><caption>", f);
    kv_html_format(f, "%s of %s; low and high: 95 %% interval over prompts; * = spent more than nominal", metric,
                   r->s.model);
    fputs("</caption><thead><tr>", f);
    for (size_t i = 0; i < sizeof head / sizeof *head; i++)
        fprintf(f, "<th scope=\"col\"%s>%s</th>", i < 3 ? " class=\"t\"" : "", head[i]);
    fputs("</tr></thead>\n<tbody>\n", f);
    for (size_t i = 0; i < s->n_row; i++) {
        const kv_cell *c = kv_sheet_at(s, i, 0);
        const char *how = kv_cell_text(&c[verified]);
        fputs("<tr data-budget=\"", f), kv_html_puts(f, kv_cell_text(&c[budget])), fputs("\">", f);
        text_cell(f, "th", kv_cell_text(&c[label]));
        fputs("<td class=\"t\" title=\"", f), kv_html_puts(f, how);
        fprintf(f, "\">%s</td>",
                !strncmp(how, "not verified", 12) ? "not verified"
                : !strncmp(how, "kept sets", 9)   ? "authors' code"
                                                  : "definition");
        fprintf(f, "<td class=\"t\" data-v=\"%.17g\">", kv_cell_number(&c[kv_sheet_find(s, "budget_frac")]));
        kv_html_puts(f, kv_cell_text(&c[budget]));
        fputs(kv_cell_number(&c[over]) > 0 ? "*</td>" : "</td>", f);
        cell(f, kv_cell_number(&c[bytes]) / 1e6, 4), cell(f, 100 * kv_cell_number(&c[frac]), 3);
        for (int k = 0; k < 3; k++) cell(f, kv_cell_number(&c[mean + k]), 4);
        cell(f, kv_cell_number(&c[mean + 3]), 6);
        fputs("</tr>\n", f);
    }
    fputs("</tbody></table></div>\n", f);
}

kv_status kv_report_tables(kv_report *r, kv_error *err)
{
    static const char *const METRICS[] = {"layer_error", "head_error",    "recall",    "recall_contested",
                                          "gap_closed",  "evidence_kept", "delta_nll", NULL};
    char *sql = statement(
        r, "SELECT policy, spec, granularity, page, cut, protect, unit, budget, avg(bytes) AS bytes, "
           "avg(frac) AS frac, avg(value) AS mean, count(value) AS prompts FROM (" KV_PER_PROMPT(
               ", r.budget", "m.layer IS NULL AND m.head IS NULL") " %s GROUP BY " KV_VARIANT
                                                                   ", r.budget, r.category, r.prompt) GROUP BY policy, "
                                                                   "spec, granularity, page, cut, protect, "
                                                                   "unit, budget ORDER BY policy, spec, mean");
    if (!sql) return kv_fail(err, KV_ENOMEM, "out of memory");
    kv_status st = KV_OK;
    char *headline = r->s.metric;
    for (int m = -1; (m < 0 || METRICS[m]) && !st; m++) {
        kv_sheet s = {0};
        kv_group_note note;
        if (m >= 0 && !strcmp(METRICS[m], headline)) continue;
        if (m >= 0) {
            r->s.metric = (char *)(uintptr_t)METRICS[m];
            kv_selection_rebind(&r->s);
            st = kv_curve_load(r->db, &r->s, &s, &note, err);
            if (st == KV_EMISSING) { /* not measured: no table */
                st = KV_OK;
                continue;
            }
        }
        if (!st) put_metric_table(r, m < 0 ? &r->curve : &s, r->s.metric, m < 0);
        if (!st) kv_html_sql(r->f, "the means of this table", sql, r->s.bind, r->s.n_bind), fputs("</details>\n", r->f);
        kv_sheet_free(&s);
    }
    r->s.metric = headline;
    kv_selection_rebind(&r->s);
    free(sql);
    return st;
}

/* ------------------------------------------------------------------------------------------------ layers and heads */
/* A column's labels in legend order: index by series; n of them. */
static size_t series_of(const kv_sheet *s, const char **label, size_t max)
{
    int series = kv_sheet_find(s, "series"), name = kv_sheet_find(s, "label");
    size_t n = 0;
    for (size_t i = 0; i < s->n_row; i++) {
        size_t k = (size_t)kv_cell_number(kv_sheet_at(s, i, series));
        if (k < max) label[k] = kv_cell_text(kv_sheet_at(s, i, name)), n = k + 1 > n ? k + 1 : n;
    }
    return n;
}

static double largest(const kv_sheet *s)
{
    double top = kv_column_largest(s, kv_sheet_find(s, "mean"));
    return top > 0 ? top : 1;
}

/* Rows by `key` (a column), columns by series, shaded by value / largest. */
static void put_matrix(kv_report *r, const kv_sheet *s, const char *key, const char *caption)
{
    const char *label[KV_SHEET_COLS_MAX] = {NULL};
    size_t n = series_of(s, label, KV_SHEET_COLS_MAX);
    int k = kv_sheet_find(s, key), series = kv_sheet_find(s, "series"), mean = kv_sheet_find(s, "mean");
    double top = largest(s);
    FILE *f = r->f;
    fputs("<div class=\"scroll\"><table class=\"heat\"><caption>", f);
    kv_html_puts(f, caption);
    fprintf(f, "</caption><thead><tr><th scope=\"col\" class=\"t\">%s</th>", key);
    for (size_t c = 0; c < n; c++)
        fputs("<th scope=\"col\">", f), kv_html_puts(f, label[c] ? label[c] : ""), fputs("</th>", f);
    fputs("</tr></thead>\n<tbody>\n", f);
    for (size_t i = 0; i < s->n_row; i++) {
        const kv_cell *at = kv_sheet_at(s, i, k);
        bool seen = false;
        for (size_t j = 0; j < i && !seen; j++) seen = !kv_cell_cmp(at, kv_sheet_at(s, j, k));
        if (seen) continue;
        fputs("<tr>", f);
        if (at->kind == KV_CELL_TEXT)
            text_cell(f, "th", kv_cell_text(at));
        else
            fprintf(f, "<th scope=\"row\" class=\"t\">%.0f</th>", kv_cell_number(at));
        for (size_t c = 0; c < n; c++) {
            double v = NAN;
            for (size_t j = 0; j < s->n_row; j++)
                if (!kv_cell_cmp(at, kv_sheet_at(s, j, k)) && kv_cell_number(kv_sheet_at(s, j, series)) == (double)c)
                    v = kv_cell_number(kv_sheet_at(s, j, mean));
            if (isnan(v))
                fputs("<td style=\"--v:0\">-</td>", f);
            else {
                double share = v / top < 0 ? 0 : v / top;
                fprintf(f, "<td style=\"--v:%.3f\"%s title=\"", share, share > 0.55 ? " class=\"dark\"" : "");
                kv_html_puts(f, label[c]);
                fprintf(f, ": %.6g\">%.3g</td>", v, v);
            }
        }
        fputs("</tr>\n", f);
    }
    fputs("</tbody></table></div>\n", f);
}

#define MEANS(keys, outer, which)                                                                                      \
    "SELECT policy, spec, granularity, page, cut, protect, unit" outer ", avg(value) AS mean, count(value) AS prompts" \
    " FROM (" KV_PER_PROMPT(                                                                                           \
        keys, which) " AND r.budget = :budget %s GROUP BY " KV_VARIANT keys                                            \
                     ", r.category, r.prompt) GROUP BY policy, spec, granularity, page, cut, protect, unit" outer      \
                     " ORDER BY policy, spec, granularity, page, cut, protect" outer

/* Run, label, and leave in *out; an empty sheet is no error. */
static kv_status load(kv_report *r, const char *what, const char *sql, kv_sheet *out, kv_error *err)
{
    kv_status st =
        sql ? kv_query(r->db, what, sql, r->s.bind, r->s.n_bind, out, err) : kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st && out->n_row && (st = kv_label_series(out, err))) kv_sheet_free(out);
    return st;
}

/* One small map per policy: layers down, query heads across, hover for the value. */
static void put_maps(kv_report *r, const kv_sheet *s)
{
    const char *label[MAP_HEADS_MAX] = {NULL};
    size_t n = series_of(s, label, MAP_HEADS_MAX);
    int layer = kv_sheet_find(s, "layer"), head = kv_sheet_find(s, "head"), series = kv_sheet_find(s, "series"),
        mean = kv_sheet_find(s, "mean");
    double top = largest(s);
    FILE *f = r->f;
    fputs("<div class=\"maps\">\n", f);
    for (size_t c = 0; c < n; c++) {
        double heads = 0, rows = 0, before = NAN;
        for (size_t i = 0; i < s->n_row; i++) {
            if (kv_cell_number(kv_sheet_at(s, i, series)) != (double)c) continue;
            double l = kv_cell_number(kv_sheet_at(s, i, layer));
            heads = fmax(heads, kv_cell_number(kv_sheet_at(s, i, head)) + 1);
            if (l != before) rows++, before = l;
        }
        if (!label[c] || rows < 1) continue;
        double w = fmax(6, fmin(14, 200 / heads)), h = fmax(4, fmin(10, 300 / rows)), at = -1;
        before = NAN;
        fputs("<figure><figcaption>", f), kv_html_puts(f, label[c]);
        fprintf(f,
                "</figcaption><svg role=\"img\" width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\" aria-label=\"",
                30 + w * heads, 14 + h * rows, 30 + w * heads, 14 + h * rows);
        kv_html_format(f, "%s by layer (down) and query head (across): %s", r->s.metric, label[c]);
        fputs("\">", f);
        for (size_t i = 0; i < s->n_row; i++) {
            if (kv_cell_number(kv_sheet_at(s, i, series)) != (double)c) continue;
            double l = kv_cell_number(kv_sheet_at(s, i, layer)), k = kv_cell_number(kv_sheet_at(s, i, head)),
                   v = kv_cell_number(kv_sheet_at(s, i, mean));
            if (l != before) {
                before = l, at++;
                if (h >= 8 || fmod(at, 5) == 0) fprintf(f, "<text x=\"0\" y=\"%.1f\">%.0f</text>", h * (at + 1), l);
            }
            fprintf(f,
                    "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" style=\"--v:%.3f\">"
                    "<title>layer %.0f, head %.0f: %.4g</title></rect>",
                    26 + w * k, h * at, w - 0.5, h - 0.5, isnan(v) ? 0 : fmax(v / top, 0), l, k, v);
        }
        fputs("</svg></figure>\n", f);
    }
    fputs("</div>\n", f);
}

kv_status kv_report_layers(kv_report *r, kv_error *err)
{
    kv_sheet s = {0};
    char *sql = statement(r, MEANS(", m.layer", ", layer", "m.layer IS NOT NULL AND m.head IS NULL")), *caption = NULL;
    kv_status st = load(r, "the layers", sql, &s, err);
    if (!st && s.n_row) {
        caption = kv_format("%s of %s by layer at budget %s, mean over prompts", r->s.metric, r->s.model, r->s.budget);
        put_matrix(r, &s, "layer", caption ? caption : "");
        kv_html_sql(r->f, "the numbers of this map", sql, r->s.bind, r->s.n_bind);
    } else if (!st)
        fputs("<p>No metric by layer is stored: <code>kv-sim run --detail layer</code> stores it.</p>\n", r->f);
    kv_sheet_free(&s), free(sql), free(caption);
    if (st) return st;

    /* By query head: layer_error is one number a layer, so the errors of heads show which head lost it. */
    char *headline = r->s.metric;
    r->s.metric = (char *)(uintptr_t)(!strcmp(headline, "layer_error") ? "head_error" : headline);
    kv_selection_rebind(&r->s);
    sql = statement(r, MEANS(", m.layer, m.head", ", layer, head", "m.layer IS NOT NULL AND m.head IS NOT NULL"));
    st = load(r, "the heads", sql, &s, err);
    fprintf(r->f, "<h3>By layer and query head</h3>\n");
    if (!st && s.n_row) {
        kv_html_format(r->f, "%s of %s at budget %s, mean over prompts; darker is larger.", r->s.metric, r->s.model,
                       r->s.budget);
        if (kv_column_largest(&s, kv_sheet_find(&s, "series")) >= MAP_HEADS_MAX)
            fprintf(r->f, " The first %d policies in legend order.", MAP_HEADS_MAX);
        put_maps(r, &s);
        kv_html_sql(r->f, "the numbers of these maps", sql, r->s.bind, r->s.n_bind);
    } else if (!st)
        fputs("<p>No metric by head is stored at this budget: <code>kv-sim run --detail head</code> stores it.</p>\n",
              r->f);
    r->s.metric = headline;
    kv_selection_rebind(&r->s);
    kv_sheet_free(&s), free(sql);
    return st;
}

/* ------------------------------------------------------------------------------------------------ prompts */
kv_status kv_report_families(kv_report *r, kv_error *err)
{
    kv_sheet s = {0};
    char *sql = statement(r, MEANS(", r.category", ", category", "m.layer IS NULL AND m.head IS NULL")),
         *caption = NULL;
    kv_status st = load(r, "the kinds of prompt", sql, &s, err);
    if (!st && s.n_row) {
        caption = kv_format("%s of %s by kind of prompt at budget %s", r->s.metric, r->s.model, r->s.budget);
        put_matrix(r, &s, "category", caption ? caption : "");
        kv_html_sql(r->f, "the numbers of this table", sql, r->s.bind, r->s.n_bind);
    }
    kv_sheet_free(&s), free(sql), free(caption);
    return st;
}

kv_status kv_report_failures(kv_report *r, kv_error *err)
{
    kv_sheet s = {0};
    /* The policies a user would choose: neither bounds nor the random row. */
    char *sql = kv_format("SELECT prompt, policy, spec, value, bytes FROM (" KV_PER_PROMPT(
                              "", "m.layer IS NULL AND m.head IS NULL") " AND r.budget = :budget AND r.policy NOT IN "
                                                                        "('full', 'random') AND r.policy NOT LIKE "
                                                                        "'oracle%%' %s GROUP BY " KV_VARIANT
                                                                        ", r.category, r.prompt) ORDER BY value IS "
                                                                        "NULL, value %s, prompt, policy, spec LIMIT %d",
                          r->where, r->lower ? "DESC" : "ASC", WORST);
    kv_status st = sql ? kv_query(r->db, "the worst prompts", sql, r->s.bind, r->s.n_bind, &s, err)
                       : kv_fail(err, KV_ENOMEM, "out of memory");
    FILE *f = r->f;
    if (!st && s.n_row) {
        fputs("<div class=\"scroll\"><table class=\"sortable\"><caption>", f);
        kv_html_format(f, "The %zu worst (prompt, policy) pairs at budget %s by %s, model %s", s.n_row, r->s.budget,
                       r->s.metric, r->s.model);
        fputs("</caption><thead><tr><th scope=\"col\" class=\"t\">prompt</th><th scope=\"col\" class=\"t\">policy</th>",
              f);
        fprintf(f, "<th scope=\"col\">%s</th><th scope=\"col\">MB</th></tr></thead>\n<tbody>\n", r->s.metric);
        for (size_t i = 0; i < s.n_row; i++) {
            const kv_cell *c = kv_sheet_at(&s, i, 0);
            fputs("<tr>", f);
            text_cell(f, "th", kv_cell_text(&c[0]));
            fputs("<td class=\"t\" title=\"", f), kv_html_puts(f, kv_cell_text(&c[2])), fputs("\">", f);
            kv_html_puts(f, kv_cell_text(&c[1])), fputs("</td>", f);
            cell(f, kv_cell_number(&c[3]), 4), cell(f, kv_cell_number(&c[4]) / 1e6, 4);
            fputs("</tr>\n", f);
        }
        fputs("</tbody></table></div>\n", f);
        kv_html_sql(f, "this table", sql, r->s.bind, r->s.n_bind);
    }
    kv_sheet_free(&s), free(sql);
    return st;
}
