/* group.c - rows per prompt -> mean and interval per group; names and order of series (group.h). */
#include "analyze/group.h"
#include "analyze/stats.h"
#include "traces/memtext.h"

#include <math.h>
#include <stdlib.h>

const char *const kv_variant_columns[] = {"spec", "granularity", "page", "cut", "protect", "unit", NULL};

/* ------------------------------------------------------------------------------------------------ grouping */
typedef struct {
    const kv_sheet *in;
    size_t n_key; /* columns 0..n_key-1 name the group */
    int prompt, value;
} plan;

static int cmp_key(const plan *p, const kv_cell *a, const kv_cell *b)
{
    for (size_t c = 0; c < p->n_key; c++) {
        int d = kv_cell_cmp(&a[c], &b[c]);
        if (d) return d;
    }
    return 0;
}

typedef struct {
    const kv_cell *row;
    size_t at; /* place in the input */
} entry;

static int cmp_entry(const plan *p, const entry *a, const entry *b)
{
    int d = cmp_key(p, a->row, b->row);
    if (!d) d = kv_cell_cmp(&a->row[p->prompt], &b->row[p->prompt]);
    return d ? d : (a->at > b->at) - (a->at < b->at);
}

static void sort_entries(const plan *p, entry *v, entry *tmp, size_t n)
{
    if (n < 2) return;
    size_t h = n / 2, i = 0, j = h, k = 0;
    sort_entries(p, v, tmp, h);
    sort_entries(p, v + h, tmp, n - h);
    while (i < h && j < n) tmp[k++] = cmp_entry(p, &v[i], &v[j]) <= 0 ? v[i++] : v[j++];
    while (i < h) tmp[k++] = v[i++];
    memcpy(v, tmp, k * sizeof *v);
}

/* Mean of a column over rows e[0..n), NULLs left out; NaN when all are NULL. */
static double mean_of(const entry *e, size_t n, int col)
{
    double sum = 0;
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        double v = kv_cell_number(&e[i].row[col]);
        if (v == v) sum += v, k++;
    }
    return k ? sum / (double)k : NAN;
}

/* One group, rows sorted by prompt: e[0..n). value[] has room for n. */
static kv_status one_group(const plan *p, const entry *e, size_t n, double *value, double *scratch, kv_sheet *out,
                           kv_cell *row, kv_group_note *note, kv_error *err)
{
    const kv_sheet *in = p->in;
    size_t n_def = 0, n_prompt = 0;
    kv_interval iv;
    kv_status st;
    for (size_t i = 0, j; i < n; i = j, n_prompt++) {
        for (j = i + 1; j < n && !kv_cell_cmp(&e[i].row[p->prompt], &e[j].row[p->prompt]);) j++;
        double v = mean_of(e + i, j - i, p->value);
        if (v == v) value[n_def++] = v;
        note->merged += j - i > 1;
    }
    if ((st = kv_mean_interval(value, n_def, &iv, err))) return st;
    size_t to = 0;
    for (size_t c = 0; c < in->n_col; c++) {
        if ((int)c == p->prompt || (int)c == p->value) continue;
        bool text = e[0].row[c].kind == KV_CELL_TEXT;
        if (c < p->n_key || text) {
            if ((st = kv_sheet_copy_cell(out, &row[to++], &e[0].row[c], err))) return st;
            continue;
        }
        size_t k = 0;
        for (size_t i = 0, j; i < n; i = j) {
            for (j = i + 1; j < n && !kv_cell_cmp(&e[i].row[p->prompt], &e[j].row[p->prompt]);) j++;
            double defined = mean_of(e + i, j - i, p->value), v = mean_of(e + i, j - i, (int)c);
            if (v == v && (defined == defined || !n_def)) scratch[k++] = v;
        }
        row[to++] = kv_real(kv_mean(scratch, k));
    }
    row[to++] = kv_real(iv.mean);
    row[to++] = kv_real(iv.low);
    row[to++] = kv_real(iv.high);
    row[to++] = kv_int((int64_t)n_def);
    row[to++] = kv_int((int64_t)(n_prompt - n_def));
    note->undefined += n_prompt - n_def;
    if (n_def < note->n_min) note->n_min = n_def;
    if (n_def > note->n_max) note->n_max = n_def;
    return KV_OK;
}

/* Groups back into the order of their first row. */
typedef struct {
    size_t first, at, n;
} span;

static int by_first(const void *a, const void *b)
{
    const span *x = a, *y = b;
    return (x->first > y->first) - (x->first < y->first);
}

kv_status kv_group_prompts(const kv_sheet *in, kv_sheet *out, kv_group_note *note, kv_error *err)
{
    plan p = {.in = in, .prompt = kv_sheet_find(in, "prompt"), .value = kv_sheet_find(in, "value")};
    const char *names[KV_SHEET_COLS_MAX + 4];
    size_t n_name = 0, n_span = 0;
    entry *e = NULL, *tmp = NULL;
    span *g = NULL;
    double *value = NULL, *scratch = NULL;
    kv_status st;
    *out = (kv_sheet){0};
    *note = (kv_group_note){.n_min = SIZE_MAX};
    if (p.prompt < 0 || p.value < p.prompt)
        return kv_fail(err, KV_EFORMAT,
                       "cannot group: the query needs a column 'prompt' and, right of it, a column 'value'");
    p.n_key = (size_t)p.prompt;
    for (size_t c = 0; c < in->n_col; c++)
        if ((int)c != p.prompt && (int)c != p.value) names[n_name++] = in->col[c];
    const char *const added[] = {"mean", "low", "high", "n", "undefined"};
    for (size_t c = 0; c < 5; c++) names[n_name++] = added[c];
    if ((st = kv_sheet_init(out, n_name, names, err)) || (st = kv_array(&e, in->n_row, sizeof *e, err)) ||
        (st = kv_array(&tmp, in->n_row, sizeof *tmp, err)) || (st = kv_array(&g, in->n_row, sizeof *g, err)) ||
        (st = kv_array(&value, in->n_row, sizeof *value, err)) ||
        (st = kv_array(&scratch, in->n_row, sizeof *scratch, err)))
        goto out;
    for (size_t i = 0; i < in->n_row; i++) e[i] = (entry){in->cell + i * in->n_col, i};
    sort_entries(&p, e, tmp, in->n_row);
    for (size_t i = 0, j; i < in->n_row; i = j) {
        size_t first = e[i].at;
        for (j = i + 1; j < in->n_row && !cmp_key(&p, e[i].row, e[j].row); j++)
            if (e[j].at < first) first = e[j].at;
        g[n_span++] = (span){first, i, j - i};
    }
    if (n_span > 1) qsort(g, n_span, sizeof *g, by_first);
    for (size_t i = 0; i < n_span; i++) {
        kv_cell *row;
        if ((st = kv_sheet_add(out, &row, err)) ||
            (st = one_group(&p, e + g[i].at, g[i].n, value, scratch, out, row, note, err)))
            goto out;
    }
    if (!n_span) note->n_min = 0;
out:
    free(e), free(tmp), free(g), free(value), free(scratch);
    if (st) kv_sheet_free(out);
    return st;
}

/* ------------------------------------------------------------------------------------------------ labels */
int kv_policy_place(const char *policy)
{
    static const char *const known[] = {
        "full",   "random", "recency",   "streaming",  "knorm",         "keydiff",    "h2o",
        "tova",   "snapkv", "pyramidkv", "ada-snapkv", "ada-pyramidkv", "criticalkv", "expected-attention",
        "headkv", "lava",   "cake"};
    static const char *const last[] = {"oracle",       "oracle-layer",  "oracle-global",
                                       "oracle-steps", "oracle-belady", "oracle-match"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(policy, known[i])) return (int)i;
    for (size_t i = 0; i < sizeof last / sizeof *last; i++)
        if (!strcmp(policy, last[i])) return 1000 + (int)i;
    return strncmp(policy, "oracle-", 7) ? 500 : 1100;
}

#define VARIANT_COLS 6
typedef struct {
    const char *policy;
    const kv_cell *cell[VARIANT_COLS]; /* NULL where the sheet lacks the column */
    char *label;
    int variant;
} series;

static int cmp_series(const series *a, const series *b)
{
    int d = kv_policy_place(a->policy) - kv_policy_place(b->policy);
    if (!d) d = strcmp(a->policy, b->policy);
    for (int c = 0; c < VARIANT_COLS && !d; c++)
        if (a->cell[c]) d = kv_cell_cmp(a->cell[c], b->cell[c]);
    return d;
}

static int cmp_series_v(const void *a, const void *b)
{
    return cmp_series(a, b);
}

/* The next "key=value" of a spec behind *at, as a span; false at the end. A policy's name before ':' is skipped. */
static bool next_pair(const char **at, const char **pair, size_t *n)
{
    if (!**at) return false;
    *pair = *at;
    *n = strcspn(*at, ",");
    *at += *n + ((*at)[*n] == ',');
    return true;
}

static bool has_pair(const char *pairs, const char *pair, size_t n)
{
    const char *p;
    size_t k;
    while (next_pair(&pairs, &p, &k))
        if (k == n && !memcmp(p, pair, n)) return true;
    return false;
}

static const char *pairs_of(const series *s)
{
    const char *spec = s->cell[0] ? kv_cell_text(s->cell[0]) : "";
    size_t n = strlen(s->policy);
    return !strncmp(spec, s->policy, n) && spec[n] == ':' ? spec + n + 1 : "";
}

/* "snapkv:window=16 page=8": what tells variant s of g[0..n) (all one policy) from the others. */
static char *make_label(const series *g, size_t n, const series *s)
{
    char *text = NULL;
    size_t size;
    FILE *m = kv_text_stream(&text, &size);
    if (!m) return NULL;
    fputs(s->policy, m);
    const char *at = pairs_of(s), *pair;
    size_t k, shown = 0;
    while (next_pair(&at, &pair, &k)) {
        bool everywhere = true;
        for (size_t i = 0; i < n; i++) everywhere &= has_pair(pairs_of(&g[i]), pair, k);
        if (!everywhere) fprintf(m, "%c%.*s", shown++ ? ',' : ':', (int)k, pair);
    }
    for (int c = 1; c < VARIANT_COLS; c++) {
        bool same = true;
        for (size_t i = 0; i < n && s->cell[c]; i++) same &= !kv_cell_cmp(g[i].cell[c], s->cell[c]);
        if (same) continue;
        char name[24];
        int len = snprintf(name, sizeof name, "%s=", kv_variant_columns[c]);
        const char *in_spec = strstr(pairs_of(s), name); /* said already */
        if (in_spec && (in_spec == pairs_of(s) || in_spec[-1] == ',')) continue;
        fprintf(m, " %.*s", len, name);
        if (s->cell[c]->kind == KV_CELL_TEXT)
            fputs(kv_cell_text(s->cell[c]), m);
        else
            kv_put_cell_csv(m, s->cell[c]);
    }
    if (fclose(m)) free(text), text = NULL;
    return text;
}

typedef struct {
    int col[5];
} row_order;

static int cmp_rows(const kv_sheet *s, const kv_cell *a, const kv_cell *b, const void *ctx)
{
    const row_order *o = ctx;
    (void)s;
    int d = 0;
    for (int i = 0; i < 5 && !d; i++)
        if (o->col[i] >= 0) d = kv_cell_cmp(&a[o->col[i]], &b[o->col[i]]);
    return d;
}

kv_status kv_label_series(kv_sheet *s, kv_error *err)
{
    int policy = kv_sheet_find(s, "policy"), col[VARIANT_COLS];
    series *g = NULL;
    size_t n = 0;
    kv_status st;
    if (policy < 0) return kv_fail(err, KV_EFORMAT, "cannot name the series: the query has no column 'policy'");
    for (int c = 0; c < VARIANT_COLS; c++) col[c] = kv_sheet_find(s, kv_variant_columns[c]);
    if ((st = kv_sheet_add_col(s, "label", err)) || (st = kv_sheet_add_col(s, "series", err)) ||
        (st = kv_sheet_add_col(s, "variant", err)) || (st = kv_array(&g, s->n_row, sizeof *g, err)))
        goto out;
    for (size_t r = 0; r < s->n_row; r++) {
        g[r].policy = kv_cell_text(kv_sheet_at(s, r, policy));
        for (int c = 0; c < VARIANT_COLS; c++) g[r].cell[c] = col[c] < 0 ? NULL : kv_sheet_at(s, r, col[c]);
    }
    if (s->n_row > 1) qsort(g, s->n_row, sizeof *g, cmp_series_v);
    for (size_t r = 0; r < s->n_row; r++)
        if (!n || cmp_series(&g[n - 1], &g[r])) g[n++] = g[r];
    for (size_t i = 0, j; i < n; i = j) {
        for (j = i + 1; j < n && !strcmp(g[i].policy, g[j].policy);) j++;
        for (size_t k = i; k < j; k++) {
            g[k].variant = (int)(k - i);
            g[k].label = j - i == 1 ? strdup(g[k].policy) : make_label(g + i, j - i, &g[k]);
            if (!g[k].label) {
                st = kv_fail(err, KV_ENOMEM, "out of memory");
                goto out;
            }
        }
    }
    int label = kv_sheet_find(s, "label");
    for (size_t r = 0; r < s->n_row; r++) {
        series key = {.policy = kv_cell_text(kv_sheet_at(s, r, policy))};
        for (int c = 0; c < VARIANT_COLS; c++) key.cell[c] = col[c] < 0 ? NULL : kv_sheet_at(s, r, col[c]);
        const series *hit = bsearch(&key, g, n, sizeof *g, cmp_series_v);
        if ((st = kv_sheet_text(s, kv_sheet_at(s, r, label), hit->label, strlen(hit->label), err))) goto out;
        *kv_sheet_at(s, r, label + 1) = kv_int(hit - g);
        *kv_sheet_at(s, r, label + 2) = kv_int(hit->variant);
    }
    row_order o = {{kv_sheet_find(s, "model"), kv_sheet_find(s, "metric"), label + 1, kv_sheet_find(s, "layer"),
                    kv_sheet_find(s, "bytes")}};
    st = kv_sheet_sort(s, cmp_rows, &o, err);
out:
    for (size_t i = 0; g && i < n; i++) free(g[i].label);
    free(g);
    return st;
}
