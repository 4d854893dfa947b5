/* grid.c - one metric as variant x budget x trace (grid.h). */
#include "analyze/grid.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/group.h"
#include "traces/memtext.h"

static const char SQL[] =
    "SELECT r.model, r.policy, r.spec, r.granularity, r.page, r.cut, r.protect, m.metric, m.unit, r.budget,"
    " r.category || '/' || r.prompt AS prompt, r.category, r.trace, r.trace_sha256, r.prompt_tokens, r.decode_tokens,"
    " r.rows, r.build, r.verified, r.budget_tokens, r.budget_frac, r.mean_bytes AS bytes, r.full_bytes, m.better,"
    " m.value"
    " FROM v_run r JOIN v_metric m ON m.run_id = r.run_id"
    " WHERE m.metric = :metric AND m.layer IS NULL AND m.head IS NULL AND m.step IS NULL AND" KV_WHERE_RUN
    "ORDER BY r.category, r.prompt, r.trace_sha256, r.budget_frac, r.budget, r.run_id";

void kv_grid_free(kv_grid *g)
{
    kv_sheet_free(&g->rows);
    free(g->variant), free(g->budget), free(g->trace), free(g->prompt);
    free(g->family), free(g->build), free(g->cell);
    *g = (kv_grid){0};
}

static double number(const kv_grid *g, size_t row, const char *col)
{
    return kv_cell_number(kv_sheet_at(&g->rows, row, kv_sheet_find(&g->rows, col)));
}

static const char *text(const kv_grid *g, size_t row, const char *col)
{
    return kv_cell_text(kv_sheet_at(&g->rows, row, kv_sheet_find(&g->rows, col)));
}

/* Place of `s` in v[0..*n), added at the end when it is new. */
static size_t intern(const char **v, size_t *n, const char *s)
{
    for (size_t i = *n; i-- > 0;) /* rows come in runs of the same name */
        if (!strcmp(v[i], s)) return i;
    v[*n] = s;
    return (*n)++;
}

static int by_frac(const void *a, const void *b)
{
    const kv_grid_budget *x = a, *y = b;
    return x->frac != y->frac ? (x->frac < y->frac ? -1 : 1) : strcmp(x->label, y->label);
}

static int by_prompt(const void *a, const void *b)
{
    const kv_grid_prompt *x = a, *y = b;
    return strcmp(x->name, y->name);
}

static int by_word(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Names of budgets, prompts, families, builds and traces; sorted, so that they do not depend on what was run first. */
static kv_status names(kv_grid *g, kv_error *err)
{
    size_t n = g->rows.n_row, n_sha = 0, n_prompt = 0, n_budget = 0;
    const char **sha = NULL, **prompt = NULL, **budget = NULL;
    double *sum = NULL;
    kv_status st;
    if ((st = kv_array(&sha, n, sizeof *sha, err)) || (st = kv_array(&prompt, n, sizeof *prompt, err)) ||
        (st = kv_array(&budget, n, sizeof *budget, err)) || (st = kv_array(&sum, 2 * n, sizeof *sum, err)) ||
        (st = kv_array(&g->family, n, sizeof *g->family, err)) ||
        (st = kv_array(&g->build, n, sizeof *g->build, err)) || (st = kv_array(&g->trace, n, sizeof *g->trace, err)) ||
        (st = kv_array(&g->prompt, n, sizeof *g->prompt, err)) ||
        (st = kv_array(&g->budget, n, sizeof *g->budget, err)))
        goto out;
    for (size_t r = 0; r < n; r++) {
        size_t b = intern(budget, &n_budget, text(g, r, "budget"));
        sum[2 * b] += number(g, r, "budget_frac"), sum[2 * b + 1]++;
        intern(g->family, &g->n_family, text(g, r, "category"));
        intern(g->build, &g->n_build, text(g, r, "build"));
        intern(prompt, &n_prompt, text(g, r, "prompt"));
    }
    for (size_t b = 0; b < n_budget; b++) g->budget[b] = (kv_grid_budget){budget[b], sum[2 * b] / sum[2 * b + 1]};
    qsort(g->budget, n_budget, sizeof *g->budget, by_frac);
    qsort(g->family, g->n_family, sizeof *g->family, by_word);
    qsort(g->build, g->n_build, sizeof *g->build, by_word);
    for (size_t i = 0; i < n_prompt; i++) g->prompt[i].name = prompt[i];
    qsort(g->prompt, n_prompt, sizeof *g->prompt, by_prompt);
    g->n_budget = n_budget, g->n_prompt = n_prompt;
    for (size_t r = 0; r < n; r++) {
        size_t before = n_sha, t = intern(sha, &n_sha, text(g, r, "trace_sha256"));
        const kv_grid_prompt key = {.name = text(g, r, "prompt")};
        kv_grid_prompt *p = bsearch(&key, g->prompt, n_prompt, sizeof *p, by_prompt);
        if (t < before) continue;
        g->trace[t] = (kv_grid_trace){text(g, r, "trace"), sha[t], (size_t)(p - g->prompt),
                                      (int64_t)(number(g, r, "prompt_tokens") + number(g, r, "decode_tokens"))};
        p->family = (uint32_t)intern(g->family, &g->n_family, text(g, r, "category"));
    }
    g->n_trace = n_sha;
out:
    free(sha), free(prompt), free(budget), free(sum);
    return st;
}

/* One run more: means so far weigh what they stand for. */
static void add_run(kv_grid *g, size_t r)
{
    size_t v = (size_t)number(g, r, "series"), b = 0, t = 0, build = 0;
    while (strcmp(g->budget[b].label, text(g, r, "budget"))) b++;
    while (strcmp(g->trace[t].sha256, text(g, r, "trace_sha256"))) t++;
    while (strcmp(g->build[build], text(g, r, "build"))) build++;
    kv_grid_cell *c = &g->cell[(v * g->n_budget + b) * g->n_trace + t];
    double value = number(g, r, "value"), n = ++c->runs;
    int64_t rows = (int64_t)number(g, r, "rows");
    if (value == value) c->defined++, c->value += (value - c->value) / c->defined;
    c->bytes += (number(g, r, "bytes") - c->bytes) / n;
    c->full_bytes += (number(g, r, "full_bytes") - c->full_bytes) / n;
    c->tokens += (number(g, r, "budget_tokens") - c->tokens) / n;
    c->build = n > 1 && c->build != (int)build ? -1 : (int)build;
    c->rows = n > 1 && c->rows != rows ? -1 : rows;
    g->variant[v] = (kv_grid_variant){.policy = text(g, r, "policy"),
                                      .spec = text(g, r, "spec"),
                                      .granularity = text(g, r, "granularity"),
                                      .cut = text(g, r, "cut"),
                                      .protect = text(g, r, "protect"),
                                      .label = text(g, r, "label"),
                                      .page = (int64_t)number(g, r, "page"),
                                      .unverified = !strncmp(text(g, r, "verified"), "not verified", 12)};
}

kv_status kv_grid_load(kv_db *db, const kv_selection *s, kv_grid *out, kv_error *err)
{
    kv_grid *g = out;
    size_t n_cell;
    *g = (kv_grid){0};
    kv_status st = kv_query(db, "the values per prompt", SQL, s->bind, s->n_bind, &g->rows, err);
    if (!st && !g->rows.n_row)
        st = kv_fail(err, KV_EMISSING,
                     "no value of '%s' over whole prompts in this selection of '%s' (kv-sim run --metrics chooses "
                     "what is measured)",
                     s->metric, kv_db_path(db));
    if (st) return st;
    g->metric = text(g, 0, "metric"), g->unit = text(g, 0, "unit");
    g->better = !strcmp(text(g, 0, "better"), "higher") ? 1 : !strcmp(text(g, 0, "better"), "lower") ? -1 : 0;
    for (size_t r = 1; r < g->rows.n_row; r++)
        if (strcmp(g->unit, text(g, r, "unit")))
            return kv_fail(err, KV_EFORMAT,
                           "cannot compare: '%s' is measured in '%s' on some traces and in '%s' on others; --trace "
                           "picks those that belong together",
                           g->metric, g->unit, text(g, r, "unit"));
    if ((st = names(g, err)) || (st = kv_label_series(&g->rows, err))) return st;
    for (size_t r = 0; r < g->rows.n_row; r++)
        if (number(g, r, "series") >= (double)g->n_variant) g->n_variant = (size_t)number(g, r, "series") + 1;
    if (!kv_mul(g->n_variant, g->n_budget, &n_cell) || !kv_mul(n_cell, g->n_trace, &n_cell))
        return kv_fail(err, KV_EUNSUPPORTED, "too many runs to compare: narrow the selection");
    if ((st = kv_array(&g->cell, n_cell, sizeof *g->cell, err)) ||
        (st = kv_array(&g->variant, g->n_variant, sizeof *g->variant, err)))
        return st;
    for (size_t r = 0; r < g->rows.n_row; r++) add_run(g, r);
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ names */
/* "a b c", the nearest to `word` first; at most 40 names. */
static char *listed(const char *word, const char *const *v, size_t n)
{
    char *list = NULL;
    size_t size = 0, shown = 0;
    FILE *m = kv_text_stream(&list, &size);
    const char *near = kv_nearest(word, v, n);
    if (!m) return NULL;
    if (near) kv_put_plain(m, near, strlen(near)), shown++;
    for (size_t i = 0; i < n && shown < 40; i++) {
        if (near && !strcmp(near, v[i])) continue;
        fputs(shown++ ? ", " : "", m);
        kv_put_plain(m, v[i], strlen(v[i]));
    }
    if (fclose(m)) free(list), list = NULL;
    return list;
}

static kv_status not_found(const char *what, const char *word, const char *why, const char *const *v, size_t n,
                           kv_error *err)
{
    char *list = listed(word, v, n);
    kv_status st = list ? kv_fail(err, KV_EMISSING, "%s '%s' %s: %s", what, word, why, list)
                        : kv_fail(err, KV_ENOMEM, "out of memory");
    free(list);
    return st;
}

kv_status kv_grid_find(const kv_grid *g, const char *word, size_t *variant, kv_error *err)
{
    const char **label = NULL;
    size_t hits = 0;
    kv_status st = kv_array(&label, g->n_variant, sizeof *label, err);
    if (st) return st;
    for (size_t pass = 0; pass < 3 && !hits; pass++)
        for (size_t v = 0; v < g->n_variant; v++) {
            const kv_grid_variant *k = &g->variant[v];
            if (strcmp(pass == 0 ? k->label : pass == 1 ? k->spec : k->policy, word)) continue;
            *variant = v;
            label[hits++] = k->label;
        }
    if (hits > 1) st = not_found("policy", word, "has several variants here, name one of", label, hits, err);
    if (!hits) {
        for (size_t v = 0; v < g->n_variant; v++) label[v] = g->variant[v].label;
        st = not_found("policy", word, "is not among these runs", label, g->n_variant, err);
    }
    free(label);
    return st;
}

kv_status kv_grid_find_budget(const kv_grid *g, const char *label, size_t *budget, kv_error *err)
{
    const char **v = NULL;
    kv_status st = kv_array(&v, g->n_budget, sizeof *v, err);
    if (st) return st;
    for (*budget = 0; *budget < g->n_budget; ++*budget) {
        if (!strcmp(g->budget[*budget].label, label)) break;
        v[*budget] = g->budget[*budget].label;
    }
    if (*budget == g->n_budget) st = not_found("budget", label, "is not among these runs", v, g->n_budget, err);
    free(v);
    return st;
}

kv_status kv_grid_sides(const kv_grid *g, const kv_list *words, const char *baseline, size_t *who, size_t *n,
                        size_t *against, kv_error *err)
{
    size_t n_word = words->n - 1;
    *n = 0;
    if (!baseline && n_word < 2)
        return kv_fail(err, KV_EMISUSE, "%s needs two policies, or --baseline P (%s A B: A against B)", words->v[0],
                       words->v[0]);
    kv_status st = kv_grid_find(g, baseline ? baseline : words->v[n_word], against, err);
    if (!baseline) n_word--;
    for (size_t i = 0; i < n_word && !st; i++) {
        const char *word = words->v[1 + i];
        if ((st = kv_grid_find(g, word, &who[*n], err))) break;
        if (who[*n] == *against) st = kv_fail(err, KV_EMISUSE, "'%s' stands on both sides", word);
        for (size_t j = 0; j < *n && !st; j++)
            if (who[j] == who[*n]) st = kv_fail(err, KV_EMISUSE, "'%s' is named twice", word);
        ++*n;
    }
    for (size_t v = 0; v < g->n_variant && !n_word && !st; v++)
        if (v != *against && strcmp(g->variant[v].policy, "full")) who[(*n)++] = v;
    if (!st && !*n) st = kv_fail(err, KV_EMISSING, "there is nothing beside '%s' here", g->variant[*against].label);
    return st;
}

/* ------------------------------------------------------------------------------------------------ like with like */
kv_status kv_grid_one_build(const kv_grid *g, kv_error *err)
{
    if (g->n_build < 2) return KV_OK;
    return kv_fail(
        err, KV_EFORMAT,
        "these results come from different builds, '%s' and '%s' (run them again with one, or say --any-build)",
        g->build[0], g->build[1]);
}

kv_status kv_grid_comparable(const kv_grid *g, size_t a, size_t b, const size_t *budget, size_t n, kv_allow allow,
                             kv_error *err)
{
    const kv_grid_variant *va = &g->variant[a], *vb = &g->variant[b];
    const kv_grid_cell *first = NULL;
    if (strcmp(va->cut, vb->cut))
        return kv_fail(err, KV_EFORMAT, "cannot compare '%s' with '%s': one cuts after the %s, the other after the %s",
                       va->label, vb->label, va->cut, vb->cut);
    for (size_t k = 0; k < n; k++)
        for (size_t t = 0; t < g->n_trace; t++) {
            const kv_grid_cell *x = kv_grid_at(g, a, budget[k], t), *y = kv_grid_at(g, b, budget[k], t);
            const char *trace = g->trace[t].name, *label = g->budget[budget[k]].label;
            if (!x->runs && !y->runs) continue;
            if (!x->runs || !y->runs) {
                if (allow.common) continue;
                return kv_fail(err, KV_EFORMAT,
                               "cannot compare '%s' with '%s': '%s' has no run on trace '%s' at budget '%s' (kv-sim "
                               "run completes it; --common compares what both have)",
                               va->label, vb->label, (x->runs ? vb : va)->label, trace, label);
            }
            if (x->rows != y->rows || x->rows < 0)
                return kv_fail(err, KV_EFORMAT,
                               "cannot compare '%s' with '%s': on trace '%s' their errors were measured over different "
                               "numbers of rows (--decode-rows of kv-sim run)",
                               va->label, vb->label, trace);
            if (!first) first = x;
            if (!allow.any_build && (x->build != first->build || y->build != first->build || x->build < 0)) {
                int other = x->build != first->build ? x->build : y->build;
                return kv_fail(err, KV_EFORMAT,
                               "cannot compare '%s' with '%s': results come from different builds, '%s' and '%s' (run "
                               "them again with one, or say --any-build)",
                               va->label, vb->label, first->build < 0 ? "several" : g->build[first->build],
                               other < 0 ? "several" : g->build[other]);
            }
        }
    return KV_OK;
}

size_t kv_grid_shared(const kv_grid *g, size_t a, size_t b, kv_allow allow, size_t *budget)
{
    size_t n = 0;
    for (size_t k = 0; k < g->n_budget; k++) {
        size_t both = 0, one = 0;
        for (size_t t = 0; t < g->n_trace; t++) {
            bool x = kv_grid_at(g, a, k, t)->runs, y = kv_grid_at(g, b, k, t)->runs;
            both += x && y, one += x != y;
        }
        if (both && (!one || allow.common)) budget[n++] = k;
    }
    return n;
}

/* ------------------------------------------------------------------------------------------------ pairs */
void kv_pairs_free(kv_pairs *p)
{
    free(p->d), free(p->a), free(p->b), free(p->family), free(p->prompt);
    *p = (kv_pairs){0};
}

/* a[t], b[t] per trace (NaN = undefined, absent where there is no pair) to means per prompt. */
static kv_status per_prompt(const kv_grid *g, const double *a, const double *b, const bool *there, kv_pairs *out,
                            kv_error *err)
{
    kv_status st;
    if ((st = kv_array(&out->d, g->n_prompt, sizeof *out->d, err)) ||
        (st = kv_array(&out->a, g->n_prompt, sizeof *out->a, err)) ||
        (st = kv_array(&out->b, g->n_prompt, sizeof *out->b, err)) ||
        (st = kv_array(&out->family, g->n_prompt, sizeof *out->family, err)) ||
        (st = kv_array(&out->prompt, g->n_prompt, sizeof *out->prompt, err)))
        return st;
    for (size_t p = 0; p < g->n_prompt; p++) {
        double x = 0, y = 0;
        size_t n = 0, all = 0;
        for (size_t t = 0; t < g->n_trace; t++) {
            if (g->trace[t].prompt != p || !there[t]) continue;
            all++;
            if (a[t] == a[t] && b[t] == b[t]) x += a[t], y += b[t], n++;
        }
        out->undefined += all && !n;
        if (!n) continue;
        size_t i = out->n++;
        out->a[i] = x / (double)n, out->b[i] = y / (double)n, out->d[i] = out->a[i] - out->b[i];
        out->family[i] = g->prompt[p].family, out->prompt[i] = p;
    }
    return KV_OK;
}

/* Budget `budget` of variant a against variant b, or against reference[] when there is no b. */
static kv_status pairs_at(const kv_grid *g, size_t a, const size_t *b, const double *reference, size_t budget,
                          kv_pairs *out, kv_error *err)
{
    double *x = NULL, *y = NULL;
    bool *there = NULL;
    size_t n = 0;
    kv_status st;
    *out = (kv_pairs){0};
    if ((st = kv_array(&x, g->n_trace, sizeof *x, err)) || (st = kv_array(&y, g->n_trace, sizeof *y, err)) ||
        (st = kv_array(&there, g->n_trace, sizeof *there, err)))
        goto out;
    for (size_t t = 0; t < g->n_trace; t++) {
        const kv_grid_cell *p = kv_grid_at(g, a, budget, t), *q = b ? kv_grid_at(g, *b, budget, t) : NULL;
        if (!(there[t] = p->runs && (q ? q->runs > 0 : reference[t] == reference[t]))) continue;
        x[t] = p->defined ? p->value : NAN;
        y[t] = !q ? reference[t] : q->defined ? q->value : NAN;
        out->bytes_a += p->bytes, out->bytes_b += q ? q->bytes : 0, n++;
    }
    if (n) out->bytes_a /= (double)n, out->bytes_b /= (double)n;
    st = per_prompt(g, x, y, there, out, err);
out:
    free(x), free(y), free(there);
    if (st) kv_pairs_free(out);
    return st;
}

kv_status kv_grid_pairs(const kv_grid *g, size_t a, size_t b, size_t budget, kv_pairs *out, kv_error *err)
{
    return pairs_at(g, a, &b, NULL, budget, out, err);
}

kv_status kv_grid_against(const kv_grid *g, size_t a, const double *reference, size_t budget, kv_pairs *out,
                          kv_error *err)
{
    return pairs_at(g, a, NULL, reference, budget, out, err);
}

typedef struct {
    double x, y; /* log2 bytes, value */
} point;

static int by_x(const void *a, const void *b)
{
    const point *p = a, *q = b;
    return (p->x > q->x) - (p->x < q->x);
}

/* The curve of one variant on one trace, ascending in bytes; equal bytes are averaged. Returns the number of points. */
static size_t curve_of(const kv_grid *g, size_t v, const size_t *budget, size_t n, size_t t, point *out)
{
    size_t m = 0, kept = 0;
    for (size_t k = 0; k < n; k++) {
        const kv_grid_cell *c = kv_grid_at(g, v, budget[k], t);
        if (c->runs && c->defined && c->bytes > 0) out[m++] = (point){log2(c->bytes), c->value};
    }
    if (m > 1) qsort(out, m, sizeof *out, by_x);
    for (size_t i = 0, j; i < m; i = j) {
        double sum = 0;
        for (j = i; j < m && out[j].x == out[i].x; j++) sum += out[j].y;
        out[kept++] = (point){out[i].x, sum / (double)(j - i)};
    }
    return kept;
}

/* Mean height of the piecewise linear curve between lo and hi, both inside it. */
static double height(const point *c, size_t n, double lo, double hi)
{
    double area = 0;
    for (size_t i = 0; i + 1 < n; i++) {
        double l = fmax(lo, c[i].x), r = fmin(hi, c[i + 1].x), slope = (c[i + 1].y - c[i].y) / (c[i + 1].x - c[i].x);
        if (r > l) area += (r - l) * (c[i].y + slope * ((l + r) / 2 - c[i].x));
    }
    return area / (hi - lo);
}

kv_status kv_grid_area(const kv_grid *g, size_t a, size_t b, const size_t *budget, size_t n, kv_pairs *out, double *low,
                       double *high, kv_error *err)
{
    double *x = NULL, *y = NULL;
    point *p = NULL, *q = NULL;
    bool *there = NULL;
    size_t used = 0;
    kv_status st;
    *out = (kv_pairs){0};
    *low = *high = 0;
    if ((st = kv_array(&x, g->n_trace, sizeof *x, err)) || (st = kv_array(&y, g->n_trace, sizeof *y, err)) ||
        (st = kv_array(&p, n, sizeof *p, err)) || (st = kv_array(&q, n, sizeof *q, err)) ||
        (st = kv_array(&there, g->n_trace, sizeof *there, err)))
        goto out;
    for (size_t t = 0; t < g->n_trace; t++) {
        size_t np = curve_of(g, a, budget, n, t, p), nq = curve_of(g, b, budget, n, t, q), runs = 0;
        for (size_t k = 0; k < n; k++)
            runs += kv_grid_at(g, a, budget[k], t)->runs && kv_grid_at(g, b, budget[k], t)->runs;
        if (!(there[t] = runs > 0)) continue;
        x[t] = y[t] = NAN;
        if (np < 2 || nq < 2) continue;
        double lo = fmax(p[0].x, q[0].x), hi = fmin(p[np - 1].x, q[nq - 1].x);
        if (!(hi > lo)) continue;
        x[t] = height(p, np, lo, hi), y[t] = height(q, nq, lo, hi);
        *low += lo, *high += hi, used++;
    }
    if (used) *low /= (double)used, *high /= (double)used;
    st = per_prompt(g, x, y, there, out, err);
out:
    free(x), free(y), free(p), free(q), free(there);
    if (st) kv_pairs_free(out);
    return st;
}
