/* report.c - kv-analyze report: one HTML file with what was run, the verdict, curves, tables, maps, the prompt's words
 * and the limits of it all. Sections are in report_verdict.c and report_tables.c; the frame is page.c. */
#include "analyze/report.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "analyze/figure.h"
#include "traces/memtext.h"

enum { TOKENS_MAX = 3 << 20 }; /* bytes of token views in the page */

static const kv_page_section SECTIONS[] = {{"verdict", "Verdict"},         {"run", "What was run"},
                                           {"curves", "Curves"},           {"gap", "Budget or policy"},
                                           {"table", "All numbers"},       {"layers", "Layers and heads"},
                                           {"prompts", "Kinds of prompt"}, {"failures", "Failures"},
                                           {"text", "The prompt's words"}, {"limits", "Limits"}};

static void open_section(FILE *f, const char *id)
{
    size_t i = 0;
    while (strcmp(SECTIONS[i].id, id)) i++;
    fprintf(f, "<section id=\"%s\">\n<h2>%s</h2>\n", id, SECTIONS[i].title);
}

/* ------------------------------------------------------------------------------------------------ what was run */
static kv_status put_list(kv_report *r, const char *title, const char *sql, kv_error *err)
{
    kv_sheet s = {0};
    kv_status st = kv_query(r->db, title, sql, r->s.bind, r->s.n_bind, &s, err);
    if (st) return st;
    fprintf(r->f, "<div class=\"scroll\"><table class=\"sortable\"><caption>%s (%zu)</caption><thead><tr>", title,
            s.n_row);
    for (size_t c = 0; c < s.n_col; c++)
        fprintf(r->f, "<th scope=\"col\" class=\"t\">"), kv_html_puts(r->f, s.col[c]), fputs("</th>", r->f);
    fputs("</tr></thead>\n<tbody>\n", r->f);
    for (size_t i = 0; i < s.n_row; i++) {
        fputs("<tr>", r->f);
        for (size_t c = 0; c < s.n_col; c++) {
            const kv_cell *x = kv_sheet_at(&s, i, (int)c);
            if (x->kind == KV_CELL_TEXT)
                fputs("<td class=\"t\">", r->f), kv_html_puts(r->f, kv_cell_text(x));
            else
                fprintf(r->f, "<td data-v=\"%.17g\">%.6g", kv_cell_number(x), kv_cell_number(x));
            fputs("</td>", r->f);
        }
        fputs("</tr>\n", r->f);
    }
    fputs("</tbody></table></div>\n", r->f);
    kv_html_sql(r->f, title, sql, r->s.bind, r->s.n_bind);
    kv_sheet_free(&s);
    return KV_OK;
}

/* kv-sim run T.. -p SPEC.. -b BUDGET..: canonical specs name every parameter, so the line repeats the runs. */
static kv_status put_command(kv_report *r, kv_error *err)
{
    static const struct {
        const char *before, *between, *format, *sql;
    } PART[] = {
        {"kv-sim run", "", " %s", "SELECT DISTINCT r.trace || '.kvt' FROM v_run r WHERE" KV_WHERE_RUN "ORDER BY 1"},
        {" \\\n  -p", " \\\n  -p", " '%s'", "SELECT DISTINCT r.spec FROM v_run r WHERE" KV_WHERE_RUN "ORDER BY 1"},
        {" \\\n  -b ", ",", "%s",
         "SELECT r.budget FROM v_run r WHERE" KV_WHERE_RUN "GROUP BY r.budget ORDER BY avg(r.budget_frac)"},
        {" \\\n  --cut ", " or ", "%s", "SELECT DISTINCT r.cut FROM v_run r WHERE r.cut <> 'prompt' AND" KV_WHERE_RUN},
        {" ", "", "%s", "SELECT '--gap' WHERE EXISTS (SELECT 1 FROM v_corner WHERE corner <> '')"}};
    fputs("<details><summary>Command to repeat it</summary><pre><code>", r->f);
    for (size_t k = 0; k < sizeof PART / sizeof *PART; k++) {
        kv_sheet s = {0};
        kv_status st = kv_query(r->db, "the command", PART[k].sql, r->s.bind, r->s.n_bind, &s, err);
        if (st) return st;
        for (size_t i = 0; i < s.n_row; i++) {
            fputs(i ? PART[k].between : PART[k].before, r->f);
            kv_html_format(r->f, PART[k].format, kv_cell_text(kv_sheet_at(&s, i, 0)));
        }
        kv_sheet_free(&s);
    }
    fputs(" \\\n  --db results.db</code></pre></details>\n", r->f);
    return KV_OK;
}

static kv_status what_was_run(kv_report *r, kv_error *err)
{
    kv_status st = put_list(r, "Traces",
                            "SELECT DISTINCT r.trace, r.model, r.category, r.prompt_tokens AS 'prompt tokens', "
                            "r.decode_tokens AS 'decoded tokens', substr(r.trace_sha256, 1, 12) AS 'content hash' FROM "
                            "v_run r WHERE" KV_WHERE_RUN "ORDER BY 2, 3, 1",
                            err);
    if (!st)
        st = put_list(r, "Policies",
                      "SELECT r.policy, r.spec, r.verified AS 'how it was checked', count(*) AS runs FROM v_run r "
                      "WHERE" KV_WHERE_RUN "GROUP BY r.policy, r.spec, r.verified ORDER BY 1, 2",
                      err);
    if (!st)
        st = put_list(r, "Builds",
                      "SELECT r.build, count(*) AS runs, sum(r.wall_s) AS 'seconds' FROM v_run r WHERE" KV_WHERE_RUN
                      "GROUP BY r.build ORDER BY 1",
                      err);
    return st ? st : put_command(r, err);
}

/* ------------------------------------------------------------------------------------------------ figures */
/* The SVG without its prologue, ids made its own: several figures stand in one document. */
static void put_svg(FILE *f, const char *svg, const char *name, const char *label)
{
    static const char *const REFER[] = {" id=\"", " id='", "href=\"#", "href='#", "url(#"};
    const char *p = strstr(svg, "<svg");
    if (!p) return;
    fputs("<figure>\n<svg role=\"img\" aria-label=\"", f);
    kv_html_puts(f, label);
    fputc('"', f);
    for (p += 4; *p;) {
        size_t k = 0;
        while (k < 5 && strncmp(p, REFER[k], strlen(REFER[k]))) k++;
        if (k < 5)
            fprintf(f, "%s%s-", REFER[k], name), p += strlen(REFER[k]);
        else
            putc(*p++, f);
    }
    fputs("</figure>\n", f);
}

/* plots/NAME drawn for this model and put into the page; says so where it cannot be drawn. metric NULL: the figure's
 * own. */
static kv_status figure(kv_report *r, const char *name, const char *metric, const char *label, kv_error *err)
{
    const char *tmp = getenv("TMPDIR"), *words[2] = {"plot", name};
    static const char *const KINDS[] = {"svg", "png", "csv"};
    char *dir = kv_format("%s/kv-report-XXXXXX", tmp && *tmp ? tmp : "/tmp"), *path = NULL;
    uint8_t *svg = NULL;
    size_t n;
    kv_error why = {.msg = ""};
    kv_analysis plot = *r->a;
    if (!dir || !mkdtemp(dir)) {
        free(dir);
        return kv_fail(err, KV_EIO, "cannot make a folder for the figures: %s", strerror(errno));
    }
    plot.folder = dir, plot.model = r->s.model, plot.rest = (kv_list){words, 2}, plot.metric = metric;
    plot.talk = fopen("/dev/null", "w");
    kv_status st = plot.talk ? kv_cmd_plot(&plot, &why) : kv_fail(&why, KV_EIO, "/dev/null: %s", strerror(errno));
    if (!st && !(path = kv_format("%s/%s.svg", dir, name))) st = kv_fail(&why, KV_ENOMEM, "out of memory");
    if (!st) st = kv_read_file(path, 8u << 20, &svg, &n, &why);
    if (!st)
        put_svg(r->f, (char *)svg, name, label);
    else if (st == KV_EMISSING || st == KV_EUNSUPPORTED ||
             st == KV_EMISUSE) { /* nothing to draw, no gnuplot that can */
        fputs("<p class=\"note\">Figure left out: ", r->f);
        kv_html_puts(r->f, why.msg);
        fputs("</p>\n", r->f);
        st = KV_OK;
    }
    if (plot.talk) fclose(plot.talk);
    for (int k = 0; k < 3; k++) {
        char *made = kv_format("%s/%s.%s", dir, name, KINDS[k]);
        if (made) unlink(made);
        free(made);
    }
    rmdir(dir);
    free(dir), free(path), free(svg);
    return st ? kv_fail(err, st, "%s", why.msg) : KV_OK;
}

/* The rows behind a figure: plots/NAME.sql as it was run. */
static kv_status figure_sql(kv_report *r, const char *name, kv_error *err)
{
    char *plots = NULL, *path = NULL;
    uint8_t *sql = NULL;
    size_t n;
    kv_status st = kv_plots_folder(&plots, err);
    if (!st && !(path = kv_format("%s/%s.sql", plots, name))) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st) st = kv_read_file(path, 1 << 20, &sql, &n, err);
    if (!st) {
        while (n && (sql[n - 1] == '\n' || sql[n - 1] == ';')) sql[--n] = 0;
        kv_html_sql(r->f, "the rows of this figure, one a prompt", (char *)sql, r->s.bind, r->s.n_bind);
    }
    free(plots), free(path), free(sql);
    return st;
}

static kv_status curves(kv_report *r, kv_error *err)
{
    char *label = kv_format("%s of %s against bytes kept, a line per policy; the numbers are in the tables below",
                            r->s.metric, r->s.model);
    if (!label) return kv_fail(err, KV_ENOMEM, "out of memory");
    kv_status st = figure(r, "curve", r->s.metric, label, err);
    if (!st) st = figure_sql(r, "curve", err);
    if (!st) st = figure(r, "budgets", NULL, "slots given to each layer, a line per policy", err);
    if (!st) st = figure_sql(r, "budgets", err);
    free(label);
    return st;
}

/* ------------------------------------------------------------------------------------------------ words */
/* Up to four policies (as given, else four usual ones) at up to two budgets (as given, else the one shown in detail),
 * on the traces named behind the command. */
static kv_status open_views(kv_report *r, kv_token_view *v, size_t *n, bool *cut_short, kv_error *err)
{
    enum { POLICIES = 4, BUDGETS = 2 };
    static const char *const USUAL[POLICIES] = {"snapkv", "cake", "streaming", "oracle"};
    char *policy[POLICIES] = {NULL}, *budget[BUDGETS] = {NULL};
    size_t n_policy, n_budget = 0, bytes = 0;
    kv_status st = kv_items(&r->a->text_policies, true, "text", POLICIES, policy, &n_policy, err);
    for (size_t i = 0; i < r->a->budgets.n && !st; i++) { /* a curve may have many budgets: the words show two */
        kv_list one = {&r->a->budgets.v[i], 1};
        if (n_budget < BUDGETS && !strchr(one.v[0], ',')) budget[n_budget++] = strdup(one.v[0]);
    }
    if (!n_budget) budget[n_budget++] = strdup(r->s.budget);
    for (size_t b = 0; b < n_budget && !st; b++)
        if (!budget[b]) st = kv_fail(err, KV_ENOMEM, "out of memory");
    for (size_t t = 1; t < r->a->rest.n && !st && !*cut_short; t++) {
        kv_token_view *w = &v[(*n)++];
        st = kv_token_view_open(r->a->rest.v[t], w, err);
        for (size_t p = 0; p < (n_policy ? n_policy : POLICIES); p++)
            for (size_t b = 0; b < n_budget && !st; b++)
                st = kv_token_view_pick(w, n_policy ? policy[p] : USUAL[p], budget[b], err);
        char *json = st ? NULL : kv_page_tokens(w, 1);
        bytes += json ? strlen(json) : 0;
        free(json);
        *cut_short = bytes > TOKENS_MAX; /* the page stays small enough to be sent around */
        if (*cut_short) kv_token_view_free(&v[--*n]);
    }
    for (size_t i = 0; i < POLICIES; i++) free(policy[i]);
    for (size_t i = 0; i < BUDGETS; i++) free(budget[i]);
    return st;
}

static void limits(FILE *f)
{
    fputs(
        "<ul>\n"
        "<li>Except where a row says <code>delta_nll</code>, these are open-loop numbers: each layer is measured on "
        "the "
        "full model's own inputs. In layer 0 that is exact; deeper layers of an evicted model see other inputs.</li>\n"
        "<li><code>layer_error</code> is the headline because it orders policies most like the model's own loss does; "
        "recall explains it. Neither is a task score.</li>\n"
        "<li>The prompt is the unit of every interval. Heads, layers and rows of one prompt are not independent "
        "samples.</li>\n"
        "<li>Budgets are nominal; the table shows the bytes really kept, and marks with * what spent more.</li>\n"
        "<li>Policies marked <em>not verified</em> were not compared with their authors' code, because there is none "
        "or it could not be run.</li>\n</ul>\n",
        f);
}

/* ------------------------------------------------------------------------------------------------ the page */
/* One model: bind it, load its curve, run `part` under the model's name. */
static kv_status for_model(kv_report *r, const char *model, kv_status (*part)(kv_report *, kv_error *), kv_error *err)
{
    free(r->s.model);
    if (!(r->s.model = strdup(model))) return kv_fail(err, KV_ENOMEM, "out of memory");
    kv_selection_rebind(&r->s);
    kv_sheet_free(&r->curve);
    kv_status st = kv_curve_load(r->db, &r->s, &r->curve, &r->note, err);
    if (st) return st;
    const kv_sheet *c = &r->curve;
    r->c_policy = kv_sheet_find(c, "policy"), r->c_label = kv_sheet_find(c, "label");
    r->c_budget = kv_sheet_find(c, "budget"), r->c_frac = kv_sheet_find(c, "budget_frac");
    r->c_mean = kv_sheet_find(c, "mean"), r->c_low = kv_sheet_find(c, "low"), r->c_high = kv_sheet_find(c, "high");
    r->c_n = kv_sheet_find(c, "n"), r->c_bytes = kv_sheet_find(c, "bytes");
    r->lower = !strcmp(kv_cell_text(kv_sheet_at(c, 0, kv_sheet_find(c, "better"))), "lower");
    return part(r, err);
}

/* The figure and the sentences of `kv-analyze gap`; a line where the runs it needs are not there. */
static kv_status gap(kv_report *r, kv_error *err)
{
    char *headline = r->s.metric, *text = NULL;
    size_t size = 0;
    kv_error why = {.msg = ""};
    FILE *m = kv_text_stream(&text, &size);
    r->s.metric = NULL;
    kv_status st = m ? kv_selection_metric(r->db, &r->s, NULL, kv_gap_metrics, &why) : KV_ENOMEM;
    if (!st) st = kv_gap_sentences(r->db, &r->s, m, &why);
    if (m && fclose(m)) st = KV_ENOMEM;
    if (!st) {
        st = figure(r, "gap", NULL, "where the loss came from: budget, layer split, head split, ranking", err);
        fputs("<ul class=\"gap\">\n", r->f);
        for (const char *p = text; *p; p += strcspn(p, "\n") + 1)
            fputs("<li>", r->f), kv_html_put(r->f, p, strcspn(p, "\n")), fputs("</li>\n", r->f);
        fputs("</ul>\n", r->f);
        kv_html_sql(r->f, "the numbers of the figure and of these sentences", kv_gap_means, r->s.bind, r->s.n_bind);
    } else if (st == KV_EMISSING) {
        fputs("<p>", r->f), kv_html_puts(r->f, why.msg), fputs("</p>\n", r->f);
        st = KV_OK;
    } else
        st = kv_fail(err, st, "%s", m && *why.msg ? why.msg : "out of memory");
    free(text), free(r->s.metric);
    r->s.metric = headline;
    kv_selection_rebind(&r->s);
    return st;
}

static kv_status sections(kv_report *r, const kv_sheet *models, kv_error *err)
{
    static const struct {
        const char *id;
        kv_status (*part)(kv_report *, kv_error *);
    } PART[] = {{"verdict", kv_report_verdict},
                {"run", NULL},
                {"curves", curves},
                {"gap", gap},
                {"table", kv_report_tables},
                {"layers", kv_report_layers},
                {"prompts", kv_report_families},
                {"failures", kv_report_failures}};
    kv_status st = KV_OK;
    for (size_t k = 0; k < sizeof PART / sizeof *PART && !st; k++) {
        open_section(r->f, PART[k].id);
        if (!PART[k].part) st = what_was_run(r, err); /* over all models */
        for (size_t m = 0; m < models->n_row && PART[k].part && !st; m++) {
            if (kv_interrupted()) return kv_fail(err, KV_EINTERRUPTED, "interrupted");
            if (models->n_row > 1 && k)
                fputs("<h3>", r->f), kv_html_puts(r->f, kv_cell_text(&models->cell[m])), fputs("</h3>\n", r->f);
            st = for_model(r, kv_cell_text(&models->cell[m]), PART[k].part, err);
        }
        if (PART[k].part && !st) {
            free(r->s.model), r->s.model = NULL;
            kv_selection_rebind(&r->s);
        }
        fputs("</section>\n", r->f);
    }
    return st;
}

kv_status kv_cmd_report(const kv_analysis *a, kv_error *err)
{
    kv_report r = {.a = a};
    kv_sheet models = {0};
    kv_token_view *view = NULL;
    size_t n_view = 0, size = 0;
    bool cut_short = false;
    char *page = NULL, *tokens = NULL, *sub = NULL;
    const char *path = a->html ? a->html : a->folder;
    kv_status st;
    if (!path) return kv_fail(err, KV_EMISUSE, "report needs -o FILE.html");
    if ((st = kv_analysis_open(a, &r.db, &r.s, err)) || (st = kv_selection_budget(r.db, &r.s, err)) ||
        (st = kv_selection_metric(r.db, &r.s, a->metric, kv_default_metrics, err)) ||
        (st = kv_query(r.db, "the models", "SELECT DISTINCT r.model FROM v_run r WHERE" KV_WHERE_RUN "ORDER BY 1",
                       r.s.bind, r.s.n_bind, &models, err)) ||
        (st = kv_array(&view, a->rest.n, sizeof *view, err)) || (st = open_views(&r, view, &n_view, &cut_short, err)))
        goto out;
    bool filtered = r.s.policies || r.s.budgets || r.s.traces || r.s.categories;
    r.where = filtered ? "AND" KV_WHERE_RUN : "";
    sub = kv_format("KV-cache eviction replayed on %zu model%s; headline: %s, in detail at budget %s", models.n_row,
                    models.n_row == 1 ? "" : "s", r.s.metric, r.s.budget);
    r.f = kv_text_stream(&page, &size);
    if (!r.f || !sub || (n_view && !(tokens = kv_page_tokens(view, n_view)))) {
        if (r.f) fclose(r.f);
        st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    kv_page_begin(r.f, "kvtrace report", sub, SECTIONS, sizeof SECTIONS / sizeof *SECTIONS);
    st = sections(&r, &models, err);
    if (n_view)
        kv_page_token_section(r.f);
    else
        fputs("<section id=\"text\">\n<h2>The prompt's words</h2>\n<p>No trace was named: <code>kv-analyze report "
              "T.kvt ..</code> "
              "adds the words of traces, <code>--text A,B</code> chooses the policies.</p>\n</section>\n",
              r.f);
    open_section(r.f, "limits");
    limits(r.f);
    fputs("</section>\n", r.f);
    kv_page_end(r.f, tokens);
    if (fclose(r.f) && !st) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st) st = kv_write_file(path, page, size, err);
    if (!st) fprintf(a->talk, "%s: %.1f MB\n", path, (double)size / 1e6);
    if (!st && cut_short)
        fprintf(a->talk, "note: the words of %zu of %zu traces fit into the page\n", n_view, a->rest.n - 1);
out:
    for (size_t i = 0; i < n_view; i++) kv_token_view_free(&view[i]);
    free(view), free(page), free(tokens), free(sub);
    kv_sheet_free(&models), kv_sheet_free(&r.curve);
    kv_selection_free(&r.s);
    kv_db_close(r.db);
    return st;
}
