/* selection.c - which runs, metric, budget and model a command looks at (query.h). */
#include "analyze/query.h"
#include "traces/memtext.h"

#include <math.h>
#include <stdlib.h>

/* "no policy 'snapvk' in 'x.db' (it has: snapkv ...)", nearest first. `sql` lists the names. */
static kv_status unknown(kv_db *db, const char *kind, const char *name, const char *sql, kv_error *err)
{
    kv_sheet s = {0};
    char *list = NULL;
    size_t size = 0;
    const char **v = NULL;
    kv_status st = kv_query(db, "a list of names", sql, NULL, 0, &s, err);
    FILE *m = st ? NULL : kv_text_stream(&list, &size);
    if (!m || kv_array(&v, s.n_row, sizeof *v, NULL)) {
        if (!st) st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    size_t n = 0;
    for (size_t i = 0; i < s.n_row; i++)
        if (s.cell[i].kind == KV_CELL_TEXT) v[n++] = s.cell[i].u.s;
    const char *near = kv_nearest(name, v, n);
    if (near) kv_put_plain(m, near, strlen(near));
    for (size_t i = 0, shown = near != NULL; i < n; i++) {
        if (near && !strcmp(v[i], near)) continue;
        if (shown++ == 40) {
            fputs(" ...", m);
            break;
        }
        fputs(shown > 1 ? " " : "", m);
        kv_put_plain(m, v[i], strlen(v[i]));
    }
out:
    if (m && fclose(m)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st)
        st = kv_fail(err, KV_EMISSING, "no %s '%s' in '%s' (it has: %s)", kind, name, kv_db_path(db),
                     list ? list : "none");
    free(list), free(v);
    kv_sheet_free(&s);
    return st;
}

size_t kv_item_length(const char *s, bool spec)
{
    size_t n = 0;
    for (;;) {
        n += strcspn(s + n, ",");
        if (!s[n] || !spec) return n;
        const char *next = s + n + 1;
        if (next[strcspn(next, "=:,")] != '=') return n;
        n++;
    }
}

/* Items -> JSON array, each checked against the database by `exists` (parameter :x). */
static kv_status to_json(kv_db *db, const char *kind, const kv_list *l, const char *exists, const char *all, bool spec,
                         char **json, char **first, kv_error *err)
{
    size_t size, n_item = 0;
    kv_status st = KV_OK;
    if (!l || !l->n) return KV_OK;
    FILE *m = kv_text_stream(json, &size);
    if (!m) return kv_fail(err, KV_ENOMEM, "out of memory");
    putc('[', m);
    for (size_t i = 0; i < l->n && !st; i++) {
        const char *s = l->v[i];
        do {
            size_t n = kv_item_length(s, spec);
            char *item = strndup(s, n);
            bool found = false;
            if (!item)
                st = kv_fail(err, KV_ENOMEM, "out of memory");
            else if (!n)
                st = kv_fail(err, KV_EMISUSE, "empty name in --%s '%s'", kind, l->v[i]);
            else
                st = kv_query_any(db, "a name", exists, &(kv_bind){":x", item}, 1, &found, err);
            if (!st && !found) st = unknown(db, kind, item, all, err);
            if (!st) {
                if (n_item++) putc(',', m);
                kv_put_json(m, item, n);
                if (first && !*first && !(*first = strdup(item))) st = kv_fail(err, KV_ENOMEM, "out of memory");
            }
            free(item);
            s += n;
        } while (!st && *s++ == ',');
    }
    putc(']', m);
    if (fclose(m) && !st) st = kv_fail(err, KV_ENOMEM, "out of memory");
    return st;
}

void kv_selection_rebind(kv_selection *s)
{
    const kv_bind b[] = {{":policies", s->policies},
                         {":budgets", s->budgets},
                         {":traces", s->traces},
                         {":categories", s->categories},
                         {":policy", s->policy},
                         {":budget", s->budget},
                         {":model", s->model},
                         {":metric", s->metric},
                         {":granularity", s->granularity},
                         {":page", s->page},
                         {":cut", s->cut}};
    memcpy(s->bind, b, sizeof b);
    s->n_bind = sizeof b / sizeof *b;
}

void kv_selection_free(kv_selection *s)
{
    free(s->policies), free(s->budgets), free(s->traces), free(s->categories);
    free(s->policy), free(s->budget), free(s->model), free(s->metric);
    free(s->granularity), free(s->page), free(s->cut);
    *s = (kv_selection){0};
}

static kv_status some_runs(kv_db *db, const kv_selection *s, kv_error *err)
{
    bool any = false;
    kv_status st = kv_query_any(db, "the selection", "SELECT 1 FROM v_run r WHERE" KV_WHERE_RUN "LIMIT 1", s->bind,
                                s->n_bind, &any, err);
    if (!st && !any)
        st = kv_fail(err, KV_EMISSING,
                     "no run in '%s' has all of these at once: widen --policy, --budget, --trace, --category, --model, "
                     "--granularity, --page or --cut",
                     kv_db_path(db));
    return st;
}

kv_status kv_selection_variant(kv_db *db, kv_selection *s, const char *granularity, const char *page, const char *cut,
                               kv_error *err)
{
    const struct {
        const char *kind, *given, *exists, *all;
        char **to;
    } v[] = {{"granularity", granularity, "SELECT 1 FROM v_run WHERE granularity = :x LIMIT 1",
              "SELECT DISTINCT granularity FROM v_run ORDER BY 1", &s->granularity},
             {"page", page, "SELECT 1 FROM v_run WHERE CAST(page AS TEXT) = :x LIMIT 1",
              "SELECT DISTINCT CAST(page AS TEXT) FROM v_run ORDER BY page", &s->page},
             {"cut", cut, "SELECT 1 FROM v_run WHERE cut = :x LIMIT 1", "SELECT DISTINCT cut FROM v_run ORDER BY 1",
              &s->cut}};
    bool any = false, found;
    for (int i = 0; i < 3; i++) {
        if (!v[i].given) continue;
        kv_status st = kv_query_any(db, "a name", v[i].exists, &(kv_bind){":x", v[i].given}, 1, &found, err);
        if (!st && !found) st = unknown(db, v[i].kind, v[i].given, v[i].all, err);
        if (!st && !(*v[i].to = strdup(v[i].given))) st = kv_fail(err, KV_ENOMEM, "out of memory");
        if (st) return st;
        any = true;
    }
    kv_selection_rebind(s);
    return any ? some_runs(db, s, err) : KV_OK;
}

kv_status kv_selection_init(kv_db *db, const kv_list *policies, const kv_list *budgets, const kv_list *traces,
                            const kv_list *categories, const char *model, kv_selection *out, kv_error *err)
{
    kv_status st;
    bool any = false;
    *out = (kv_selection){0};
    if ((st = kv_query_any(db, "a check for runs", "SELECT 1 FROM v_run LIMIT 1", NULL, 0, &any, err))) return st;
    if (!any)
        return kv_fail(err, KV_EMISSING, "no runs in '%s' yet: kv-sim run TRACE.. -p POLICY -b BUDGET --db fills it",
                       kv_db_path(db));
    if ((st = to_json(db, "policy", policies, "SELECT 1 FROM v_run WHERE policy = :x OR spec = :x LIMIT 1",
                      "SELECT DISTINCT policy FROM v_run ORDER BY 1", true, &out->policies, &out->policy, err)) ||
        (st = to_json(db, "budget", budgets, "SELECT 1 FROM v_run WHERE budget = :x LIMIT 1",
                      "SELECT budget FROM v_run GROUP BY budget ORDER BY avg(budget_frac), budget", false,
                      &out->budgets, &out->budget, err)) ||
        (st = to_json(db, "trace", traces, "SELECT 1 FROM v_run WHERE trace = :x LIMIT 1",
                      "SELECT DISTINCT trace FROM v_run ORDER BY 1", false, &out->traces, NULL, err)) ||
        (st = to_json(db, "category", categories, "SELECT 1 FROM v_run WHERE category = :x LIMIT 1",
                      "SELECT DISTINCT category FROM v_run ORDER BY 1", false, &out->categories, NULL, err)))
        goto out;
    if (model) {
        if ((st = kv_query_any(db, "a name", "SELECT 1 FROM v_run WHERE model = :x LIMIT 1", &(kv_bind){":x", model}, 1,
                               &any, err)))
            goto out;
        if (!any)
            st = unknown(db, "model", model, "SELECT DISTINCT model FROM v_run ORDER BY 1", err);
        else if (!(out->model = strdup(model)))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        if (st) goto out;
    }
    kv_selection_rebind(out);
    st = some_runs(db, out, err);
out:
    if (st) kv_selection_free(out);
    return st;
}

kv_status kv_selection_metric(kv_db *db, kv_selection *s, const char *name, const char *const *prefer, kv_error *err)
{
    bool any = false;
    kv_status st = KV_OK;
    const char *chosen = name;
    if (name) {
        st = kv_query_any(db, "a name", "SELECT 1 FROM v_metric WHERE metric = :x LIMIT 1", &(kv_bind){":x", name}, 1,
                          &any, err);
        if (!st && !any) st = unknown(db, "metric", name, "SELECT DISTINCT metric FROM v_metric ORDER BY 1", err);
    }
    for (; !st && !any && *prefer; prefer++) {
        free(s->metric);
        if (!(s->metric = strdup(*prefer))) return kv_fail(err, KV_ENOMEM, "out of memory");
        kv_selection_rebind(s);
        st = kv_query_any(
            db, "a metric",
            "SELECT 1 FROM v_run r JOIN v_metric m ON m.run_id = r.run_id WHERE m.metric = :metric AND "
            "m.layer IS NULL AND m.head IS NULL AND m.step IS NULL AND m.value IS NOT NULL AND" KV_WHERE_RUN "LIMIT 1",
            s->bind, s->n_bind, &any, err);
        chosen = *prefer;
    }
    if (!st && !any) {
        kv_sheet k = {0};
        st = kv_query(db, "a metric", "SELECT metric FROM v_metric ORDER BY metric LIMIT 1", NULL, 0, &k, err);
        if (!st && !k.n_row) st = kv_fail(err, KV_EMISSING, "no metrics in '%s'", kv_db_path(db));
        free(s->metric), s->metric = NULL;
        if (!st && !(s->metric = strdup(kv_cell_text(k.cell)))) st = kv_fail(err, KV_ENOMEM, "out of memory");
        kv_sheet_free(&k);
    } else if (!st) {
        char *copy = strdup(chosen);
        if (!copy) return kv_fail(err, KV_ENOMEM, "out of memory");
        free(s->metric);
        s->metric = copy;
    }
    kv_selection_rebind(s);
    return st;
}

kv_status kv_selection_budget(kv_db *db, kv_selection *s, kv_error *err)
{
    kv_sheet k = {0};
    if (s->budget) return KV_OK;
    kv_status st = kv_query(db, "the budgets",
                            "SELECT r.budget, avg(r.budget_frac) AS frac FROM v_run r WHERE" KV_WHERE_RUN
                            "GROUP BY r.budget ORDER BY frac, r.budget",
                            s->bind, s->n_bind, &k, err);
    size_t best = 0;
    double least = INFINITY;
    for (size_t i = 0; i < k.n_row; i++) {
        double frac = kv_cell_number(kv_sheet_at(&k, i, 1)), far = fabs(log(frac > 1e-9 ? frac : 1e-9) - log(0.1));
        if (far < least - 1e-12) least = far, best = i;
    }
    if (!st && !k.n_row) st = kv_fail(err, KV_EMISSING, "no budgets in '%s'", kv_db_path(db));
    if (!st && !(s->budget = strdup(kv_cell_text(kv_sheet_at(&k, best, 0)))))
        st = kv_fail(err, KV_ENOMEM, "out of memory");
    kv_sheet_free(&k);
    kv_selection_rebind(s);
    return st;
}

kv_status kv_selection_model(kv_db *db, kv_selection *s, kv_error *err)
{
    kv_sheet k = {0};
    if (s->model) return KV_OK;
    kv_status st = kv_query(db, "the models", "SELECT DISTINCT r.model FROM v_run r WHERE" KV_WHERE_RUN "ORDER BY 1",
                            s->bind, s->n_bind, &k, err);
    if (!st && k.n_row > 1) {
        char *list = NULL;
        size_t size;
        FILE *m = kv_text_stream(&list, &size);
        for (size_t i = 0; m && i < k.n_row; i++) {
            fputs(i ? " " : "", m);
            kv_put_plain(m, kv_cell_text(&k.cell[i]), k.cell[i].len);
        }
        if (m) fclose(m);
        st = kv_fail(err, KV_EMISUSE, "several models in '%s': choose one with --model (%s)", kv_db_path(db),
                     list ? list : "");
        free(list);
    }
    if (!st && k.n_row && !(s->model = strdup(kv_cell_text(k.cell)))) st = kv_fail(err, KV_ENOMEM, "out of memory");
    kv_sheet_free(&k);
    kv_selection_rebind(s);
    return st;
}
