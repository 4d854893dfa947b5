/* plot.c - kv-analyze plot: NAME.sql against the database, grouped over prompts, written as CSV, drawn by NAME.gp.
 *
 * Lines at the top of a .sql file tell what it needs (plots/README.md):
 *   -- metric: a b c     metrics to try in this order when --metric is not given; the first one with rows is taken
 *   -- metric: none      the figure names its metrics itself; --metric does not apply
 *   -- policy: a b c     the policy :policy stands for when -p is not given: the first one the database has */
#include "analyze/analysis.h"
#include "analyze/figure.h"
#include "analyze/stats.h"
#include "traces/memtext.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>

#define SQL_MAX       ((size_t)1 << 20)
#define CANDIDATE_MAX 8

typedef struct {
    char *name, *sql;
    char *metric[CANDIDATE_MAX], *policy[CANDIDATE_MAX];
    size_t n_metric, n_policy;
    bool own_metric; /* "-- metric: none" */
} figure;

static void figure_free(figure *f)
{
    for (size_t i = 0; i < f->n_metric; i++) free(f->metric[i]);
    for (size_t i = 0; i < f->n_policy; i++) free(f->policy[i]);
    free(f->name), free(f->sql);
    *f = (figure){0};
}

static bool good_name(const char *s)
{
    return *s && *s != '-' && !s[strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")];
}

/* Words behind "-- key:" among the comment lines at the top. */
static kv_status directive(const char *sql, const char *key, char **word, size_t *n, kv_error *err)
{
    char *head = kv_format("-- %s:", key);
    kv_status st = head ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory");
    for (const char *p = sql; !st && !strncmp(p, "--", 2);) {
        const char *end = p + strcspn(p, "\n"), *w = p + strlen(head);
        while (!strncmp(p, head, strlen(head)) && w < end && *n < CANDIDATE_MAX && !st) {
            w += strspn(w, " \t");
            size_t len = strcspn(w, " \t\n");
            if (!len) break;
            if (!(word[(*n)++] = strndup(w, len))) (*n)--, st = kv_fail(err, KV_ENOMEM, "out of memory");
            w += len;
        }
        p = end + (*end == '\n');
    }
    free(head);
    return st;
}

static kv_status figure_read(const char *plots, const char *name, figure *f, kv_error *err)
{
    uint8_t *text = NULL;
    size_t n;
    *f = (figure){0};
    char *path = kv_format("%s/%s.sql", plots, name);
    kv_status st = path ? kv_read_file(path, SQL_MAX, &text, &n, err) : kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st) {
        f->sql = (char *)text;
        f->name = strdup(name);
        if (!f->name)
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        else if (strlen(f->sql) != n)
            st = kv_fail(err, KV_EFORMAT, "cannot use '%s': it holds a zero byte", path);
    }
    if (!st) st = directive(f->sql, "metric", f->metric, &f->n_metric, err);
    if (!st) st = directive(f->sql, "policy", f->policy, &f->n_policy, err);
    f->own_metric = f->n_metric == 1 && !strcmp(f->metric[0], "none");
    free(path);
    if (st) figure_free(f);
    return st;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Names of the .sql files, sorted. free each and the array. */
static kv_status figure_names(const char *plots, char ***out, size_t *n, kv_error *err)
{
    kv_status st = KV_OK;
    DIR *d = opendir(plots);
    *out = NULL, *n = 0;
    if (!d) return kv_fail(err, KV_EIO, "cannot read folder '%s': %s", plots, strerror(errno));
    for (struct dirent *e; !st && (e = readdir(d));) {
        size_t len = strlen(e->d_name);
        if (len <= 4 || strcmp(e->d_name + len - 4, ".sql")) continue;
        char **v = realloc(*out, (*n + 1) * sizeof *v);
        if (v) *out = v;
        char *name = v ? strndup(e->d_name, len - 4) : NULL;
        if (!name)
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        else if (good_name(name))
            (*out)[(*n)++] = name;
        else
            free(name);
    }
    closedir(d);
    if (*n > 1) qsort(*out, *n, sizeof **out, by_text);
    return st;
}

/* Value for :policy when the user named none: the first candidate with runs, else any policy. */
static kv_status default_policy(kv_db *db, kv_selection *s, const figure *f, kv_error *err)
{
    bool found = false;
    kv_status st = KV_OK;
    if (s->policy || !f->n_policy) return KV_OK;
    for (size_t i = 0; i < f->n_policy && !found && !st; i++) {
        free(s->policy);
        if (!(s->policy = strdup(f->policy[i]))) return kv_fail(err, KV_ENOMEM, "out of memory");
        kv_selection_rebind(s);
        st = kv_query_any(db, f->name,
                          "SELECT 1 FROM v_run r WHERE r.policy = :policy AND r.budget = :budget AND" KV_WHERE_RUN
                          "LIMIT 1",
                          s->bind, s->n_bind, &found, err);
    }
    if (st || found) return st;
    kv_sheet k = {0};
    st = kv_query(db, f->name, "SELECT min(r.policy) FROM v_run r WHERE r.budget = :budget AND" KV_WHERE_RUN, s->bind,
                  s->n_bind, &k, err);
    free(s->policy), s->policy = NULL;
    if (!st && !(s->policy = strdup(kv_cell_text(k.cell)))) st = kv_fail(err, KV_ENOMEM, "out of memory");
    kv_sheet_free(&k);
    kv_selection_rebind(s);
    return st;
}

/* Run the SQL with the first metric that gives rows. */
static kv_status figure_rows(const kv_analysis *a, kv_db *db, kv_selection *s, const figure *f, kv_sheet *rows,
                             kv_error *err)
{
    kv_status st = KV_OK;
    size_t tries = a->metric || f->own_metric || !f->n_metric ? 1 : f->n_metric;
    if (!f->own_metric && (a->metric || !f->n_metric))
        if ((st = kv_selection_metric(db, s, a->metric, kv_default_metrics, err))) return st;
    char *what = kv_format("plots/%s.sql", f->name);
    if (!what) return kv_fail(err, KV_ENOMEM, "out of memory");
    for (size_t i = 0; i < tries && !st; i++) {
        if (tries > 1 || (!a->metric && f->n_metric && !f->own_metric)) {
            free(s->metric);
            if (!(s->metric = strdup(f->metric[i]))) st = kv_fail(err, KV_ENOMEM, "out of memory");
            kv_selection_rebind(s);
        }
        kv_sheet_free(rows);
        if (!st) st = kv_query(db, what, f->sql, s->bind, s->n_bind, rows, err);
        if (rows->n_row) break;
    }
    if (!st && !rows->n_row)
        st = kv_fail(err, KV_EMISSING,
                     "no data for figure '%s' in this selection of '%s' (by head it needs kv-sim run "
                     "--detail head, by step --detail step, gap needs kv-sim run --gap)",
                     f->name, a->db);
    free(what);
    return st;
}

/* "SmolLM2-135M, n = 4 prompts" */
static char *subtitle(const kv_selection *s, const kv_group_note *note)
{
    const char *model = s->model ? s->model : "";
    if (!note->n_max) return strdup(model);
    if (note->n_min != note->n_max) return kv_format("%s, n = %zu to %zu prompts", model, note->n_min, note->n_max);
    return kv_format("%s, n = %zu prompt%s", model, note->n_max, note->n_max == 1 ? "" : "s");
}

static kv_status make_figure(const kv_analysis *a, kv_db *db, const kv_selection *chosen, const char *plots,
                             const char *folder, const char *name, kv_error *err)
{
    figure f = {0};
    kv_sheet rows = {0}, grouped = {0};
    kv_group_note note = {0};
    kv_selection s = {0};
    char *csv = NULL, *sub = NULL;
    size_t n_csv = 0;
    kv_status st = figure_read(plots, name, &f, err);
    /* A selection of its own: :policy and :metric are chosen per figure. */
    if (!st) st = kv_selection_init(db, &a->policies, &a->budgets, &a->traces, &a->categories, chosen->model, &s, err);
    if (!st) st = kv_selection_budget(db, &s, err);
    if (!st) st = default_policy(db, &s, &f, err);
    if (!st) st = figure_rows(a, db, &s, &f, &rows, err);
    if (!st && kv_sheet_find(&rows, "prompt") >= 0) {
        if ((st = kv_group_prompts(&rows, &grouped, &note, err))) goto out;
        kv_sheet_free(&rows);
        rows = grouped, grouped = (kv_sheet){0};
    }
    if (!st && kv_sheet_find(&rows, "policy") >= 0) st = kv_label_series(&rows, err);
    if (st) goto out;
    FILE *m = kv_text_stream(&csv, &n_csv);
    sub = subtitle(&s, &note);
    if (m) kv_print_plot_csv(m, &rows);
    if (!m || fclose(m) || !sub) {
        st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    int unit = kv_sheet_find(&rows, "unit");
    char band[64];
    snprintf(band, sizeof band, ", bands: %g%% bootstrap intervals", 100 * KV_BOOT_LEVEL);
    kv_figure_words w = {{f.own_metric ? "" : s.metric, unit < 0 ? "" : kv_cell_text(kv_sheet_at(&rows, 0, unit)), sub,
                          s.budget, s.policy, note.n_max > 1 ? band : ""}};
    st = kv_figure_draw(plots, folder, name, csv, n_csv, &w, err);
    if (!st) fprintf(a->talk, "%s/%s.svg .png .csv\n", a->folder, name);
    if (!st && note.n_max) kv_print_note(a->talk, &note);
out:
    free(csv), free(sub);
    kv_sheet_free(&rows), kv_sheet_free(&grouped);
    kv_selection_free(&s);
    figure_free(&f);
    return st;
}

static kv_status unknown_figure(const char *name, char **names, size_t n, kv_error *err)
{
    char list[512] = "attention cake";
    const char *near = kv_nearest(name, (const char *const *)(uintptr_t)names, n);
    if (near) snprintf(list, sizeof list, "%s attention cake", near);
    for (size_t i = 0; i < n; i++)
        if ((!near || strcmp(near, names[i])) && strlen(list) + strlen(names[i]) + 2 < sizeof list)
            strcat(strcat(list, " "), names[i]);
    return kv_fail(err, KV_EMISUSE, "unknown figure '%s' (known: %s)", name, list);
}

/* One item of an option that may be given once here, or an error that names it. */
static kv_status one_of(const kv_list *l, const char *option, const char **out, kv_error *err)
{
    if (l->n != 1) return kv_fail(err, KV_EMISUSE, "this figure needs one --%s", option);
    *out = l->v[0];
    return KV_OK;
}

static kv_status attention(const kv_analysis *a, const char *plots, const char *folder, kv_error *err)
{
    const char *policy = NULL, *budget = NULL;
    kv_status st;
    if ((st = one_of(&a->policies, "policy", &policy, err)) || (st = one_of(&a->budgets, "budget", &budget, err)))
        return st;
    if (!a->trace_file) return kv_fail(err, KV_EMISUSE, "plot attention needs --trace-file T.kvt");
    st = kv_figure_attention(plots, folder, a->trace_file, policy, budget, a->layer,
                             a->head == UINT32_MAX ? 0 : a->head, err);
    if (!st) fprintf(a->talk, "%s/attention.svg .png .csv\n", a->folder);
    return st;
}

static kv_status cake(const kv_analysis *a, const char *plots, const char *folder, kv_error *err)
{
    const char *budget = "10%";
    kv_status st = a->budgets.n ? one_of(&a->budgets, "budget", &budget, err) : KV_OK;
    if (!st && !a->trace_file) st = kv_fail(err, KV_EMISUSE, "plot cake needs --trace-file T.kvt");
    if (!st) st = kv_figure_cake(plots, folder, a->trace_file, budget, err);
    if (!st) fprintf(a->talk, "%s/cake.svg .png .csv\n", a->folder);
    return st;
}

kv_status kv_cmd_plot(const kv_analysis *a, kv_error *err)
{
    char *plots = NULL, *folder = NULL, **names = NULL;
    size_t n = 0, done = 0;
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_status st;
    const char *want = a->rest.n > 1 ? a->rest.v[1] : "all";
    if (a->rest.n > 2) return kv_fail(err, KV_EMISUSE, "unexpected argument '%s': one figure, or all", a->rest.v[2]);
    if (!a->folder) return kv_fail(err, KV_EMISUSE, "plot needs -o DIR, the folder for the figures");
    if ((st = kv_plots_folder(&plots, err)) || (st = figure_names(plots, &names, &n, err))) goto out;
    size_t k = 0;
    while (k < n && strcmp(names[k], want)) k++;
    if (k == n && strcmp(want, "all") && strcmp(want, "attention") && strcmp(want, "cake")) {
        st = unknown_figure(want, names, n, err);
        goto out;
    }
    if (!strcmp(want, "attention")) { /* needs a trace, not the database */
        if (!(st = kv_figure_folder(a->folder, &folder, err))) st = attention(a, plots, folder, err);
        goto out;
    }
    if (!strcmp(want, "cake")) {
        if (!(st = kv_figure_folder(a->folder, &folder, err))) st = cake(a, plots, folder, err);
        goto out;
    }
    if ((st = kv_analysis_open(a, &db, &s, err)) || (st = kv_selection_model(db, &s, err))) goto out;
    if (a->metric && (st = kv_selection_metric(db, &s, a->metric, kv_default_metrics, err)))
        goto out; /* a misspelt metric is no reason to leave figures out */
    if ((st = kv_figure_folder(a->folder, &folder, err))) goto out;
    for (size_t i = 0; i < n; i++) {
        if (k < n && i != k) continue;
        st = make_figure(a, db, &s, plots, folder, names[i], err);
        if (st == KV_EMISSING && k == n && err) { /* of all figures, those the database has data for */
            fprintf(a->talk, "%s: left out: ", names[i]);
            kv_put_plain(a->talk, err->msg, strlen(err->msg));
            fputs("\n", a->talk);
            continue;
        }
        if (st) goto out;
        done++;
    }
    if (!done) goto out; /* with the last reason */
    st = KV_OK;
    if (k == n && a->trace_file) st = attention(a, plots, folder, err);
out:
    for (size_t i = 0; i < n; i++) free(names[i]);
    free(names), free(plots), free(folder);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
