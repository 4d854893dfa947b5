/* decode.c - decode rules: what leaves once a row has attended (policies.md 3.1, 3.4, 3.5, 4.6, 8.5; the loop around
 * them is in steps.c). Ties: larger weight first, then the earlier cache entry. */
#include <stdlib.h>

#include "sim/rkv.h"
#include "sim/schedule.h"
#include "sim/scorer.h"

typedef struct {
    double score;
    uint32_t at; /* index in cache order */
} entry;

static int best_first(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return (x->at > y->at) - (x->at < y->at);
}

static int by_place(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    return (x->at > y->at) - (x->at < y->at);
}

/* Keep the `keep` best of the first n entries (sorted: in cache order, else best first), then the rest of the cache. */
static kv_status keep_best(kv_cache *c, entry *e, uint32_t n, uint32_t keep, bool sorted, kv_error *err)
{
    uint32_t *pos = NULL, m = 0;
    double *acc = NULL;
    if (sorted && keep + 1 == n) { /* the usual step: one leaves, the others close up */
        uint32_t worst = 0;
        for (uint32_t i = 1; i < n; i++)
            if (e[i].score <= e[worst].score) worst = i;
        memmove(c->pos + worst, c->pos + worst + 1, (c->n - worst - 1) * sizeof *c->pos);
        memmove(c->acc + worst, c->acc + worst + 1, (c->n - worst - 1) * sizeof *c->acc);
        c->n--;
        return KV_OK;
    }
    kv_status st = kv_array(&pos, c->n, sizeof *pos, err);
    if (!st) st = kv_array(&acc, c->n, sizeof *acc, err);
    if (!st) {
        qsort(e, n, sizeof *e, best_first);
        if (keep > n) keep = n;
        if (sorted) qsort(e, keep, sizeof *e, by_place);
        for (uint32_t i = 0; i < keep; i++) pos[m] = c->pos[e[i].at], acc[m++] = c->acc[e[i].at];
        for (uint32_t i = n; i < c->n; i++) pos[m] = c->pos[i], acc[m++] = c->acc[i];
        memcpy(c->pos, pos, m * sizeof *pos), memcpy(c->acc, acc, m * sizeof *acc);
        c->n = m;
    }
    free(pos), free(acc);
    return st;
}

static kv_status entries(uint32_t n, entry **e, kv_error *err)
{
    kv_status st = kv_array(e, n, sizeof **e, err);
    for (uint32_t i = 0; i < n && !st; i++) (*e)[i].at = i;
    return st;
}

/* TOVA: mean over the heads of the newest row, the smallest leaves; the newest may evict itself. */
static kv_status tova(const kv_spec *s, kv_cache *c, uint32_t n_head, const double *w, kv_error *err)
{
    entry *e;
    uint32_t capacity = c->keep + c->recent;
    (void)s;
    if (c->n <= capacity) return KV_OK;
    kv_status st = entries(c->n, &e, err);
    if (st) return st;
    for (uint32_t h = 0; h < n_head; h++)
        for (uint32_t i = 0; i < c->n; i++) e[i].score += w[(size_t)h * c->n + i] / n_head;
    st = keep_best(c, e, c->n, capacity, true, err);
    free(e);
    return st;
}

/* StreamingLLM: first `sinks` entries and the newest. */
static kv_status streaming(const kv_spec *s, kv_cache *c, uint32_t n_head, const double *w, kv_error *err)
{
    uint32_t capacity = c->keep + c->recent, sinks = s->sinks < capacity ? s->sinks : capacity;
    (void)n_head, (void)w, (void)err;
    if (c->n <= capacity) return KV_OK;
    memmove(c->pos + sinks, c->pos + c->n - (capacity - sinks), (capacity - sinks) * sizeof *c->pos);
    c->n = capacity;
    return KV_OK;
}

/* H2O with real dropping: accumulated weights, heavy hitters among the entries older than `recent`. acc of the prompt
 * holds its last row. */
static kv_status h2o(const kv_spec *s, kv_cache *c, uint32_t n_head, const double *w, kv_error *err)
{
    entry *e;
    (void)s, (void)n_head, (void)w;
    if (c->n <= c->keep + c->recent) return KV_OK;
    uint32_t n = c->n - c->recent;
    kv_status st = entries(n, &e, err);
    if (st) return st;
    for (uint32_t i = 0; i < n; i++) e[i].score = c->acc[i];
    st = keep_best(c, e, n, c->keep, true, err);
    free(e);
    return st;
}

/* CAKE: the newest row, average of 5 in cache order per head, mean over the group; kept entries stand in score order,
 * then the window. */
static kv_status cake(const kv_spec *s, kv_cache *c, uint32_t n_head, const double *w, kv_error *err)
{
    entry *e;
    (void)s;
    if (c->n <= c->keep + c->recent) return KV_OK;
    uint32_t n = c->n - c->recent;
    kv_status st = entries(n, &e, err);
    if (st) return st;
    for (uint32_t h = 0; h < n_head; h++)
        for (uint32_t i = 0; i < n; i++) {
            double sum = 0;
            for (uint32_t j = i > 2 ? i - 2 : 0; j <= i + 2 && j < n; j++) sum += w[(size_t)h * c->n + j];
            e[i].score += sum / 5 / n_head;
        }
    st = keep_best(c, e, n, c->keep, false, err);
    free(e);
    return st;
}

/* R-KV: the last `window` queries against all live keys; kept entries stand in score order, then the window. It runs,
 * and reorders, as soon as the cache is full. */
static kv_status rkv(const kv_spec *s, kv_cache *c, uint32_t n_head, const double *w, kv_error *err)
{
    const kv_layer *l = c->l;
    uint32_t n = c->n - (c->recent < c->n ? c->recent : c->n), n_row = 0, gap = l->scene->row_first - l->L;
    size_t d = l->d;
    float *k = NULL, *q = NULL, *attention = NULL, *alike = NULL, *tmp = NULL;
    entry *e = NULL;
    (void)w;
    if (c->n < (uint64_t)c->keep + c->recent || !n) return KV_OK;
    kv_status st = entries(n, &e, err);
    if (!st) st = kv_array(&k, c->n, d * sizeof *k, err);
    if (!st) st = kv_array(&q, (size_t)s->window * n_head, d * sizeof *q, err);
    if (!st) st = kv_array(&attention, n, sizeof *attention, err);
    if (!st) st = kv_array(&alike, c->n, sizeof *alike, err);
    if (!st) st = kv_array(&tmp, n, sizeof *tmp, err);
    for (uint32_t i = 0; i < c->n && !st; i++)
        memcpy(k + i * d, l->k + ((size_t)c->unit * l->scene->n_token + c->pos[i]) * d, d * sizeof *k);
    for (int64_t back = s->window; back-- > 0 && !st;) {
        int64_t r = c->row - back;
        if (r < 0 && (r += gap) >= 0) continue; /* rows of the question behind --cut context are not loaded */
        if (r < -(int64_t)l->max_window) continue;
        for (uint32_t h = 0; h < n_head; h++)
            memcpy(q + ((size_t)n_row * n_head + h) * d, kv_step_query(l, c->unit * n_head + h, r), d * sizeof *q);
        n_row++;
    }
    if (!st && c->keep) st = kv_rkv_terms(s, d, l->scale, n_head, n_row, q, c->n, k, n, attention, alike, err);
    if (!st) kv_pool(s->pooling, s->kernel, n, attention, tmp);
    for (uint32_t i = 0; i < n && !st; i++)
        e[i].score = (float)(s->mix_lambda * attention[i] - (1 - s->mix_lambda) * alike[i]);
    if (!st) st = keep_best(c, e, n, c->keep, false, err);
    free(e), free(k), free(q), free(attention), free(alike), free(tmp);
    return st;
}

const kv_decode_rule kv_decode_rules[] = {
    [KV_DECODE_KEEP] = {"keep", "every decoded token stays", "", 0, 0, NULL},
    [KV_DECODE_TOVA] = {"tova", "the newest row's mean over heads; the smallest leaves", "scores", KV_NEED_WINDOW,
                        KV_RULE_CUTS | KV_RULE_WEIGHS, tova},
    [KV_DECODE_STREAMING] = {"streaming", "first `sinks` of the cache and the newest", "sinks", 0, KV_RULE_CUTS,
                             streaming},
    [KV_DECODE_H2O] = {"h2o", "accumulated weights, the newest `recent` protected", "scores recent", KV_NEED_COLSUM,
                       KV_RULE_CUTS | KV_RULE_ACCUMULATES, h2o},
    [KV_DECODE_CAKE] = {"cake", "the newest row, smoothed in cache order, window protected", "scores window", 0,
                        KV_RULE_RANKED | KV_RULE_WEIGHS, cake},
    [KV_DECODE_H2O_MASK] = {"h2o-mask", "H2O's masking variant: dropped entries may return",
                            "scores heavy_ratio recent_ratio", KV_NEED_COLSUM, KV_RULE_CUTS | KV_RULE_HIDES, NULL},
    [KV_DECODE_RKV] = {"rkv", "R-KV: attention of the last rows against likeness to other keys",
                       "window pooling kernel mix_lambda retain_direction", KV_NEED_WINDOW,
                       KV_RULE_RANKED | KV_RULE_POSITION, rkv},
    [KV_DECODE_VATP] = {"vatp", "as h2o-mask, times the value's L1 norm, first `sinks` forced",
                        "scores sinks heavy_ratio recent_ratio", KV_NEED_COLSUM, KV_RULE_CUTS | KV_RULE_HIDES, NULL},
    [KV_DECODE_BELADY] = {"belady", "an oracle: what has least mass to give from here on leaves for good", "", 0,
                          KV_RULE_CUTS | KV_RULE_FORESEES, NULL},
    [KV_DECODE_MATCH] = {"match", "an oracle: the exact least loss of dropping for good, by minimum-cost flow", "", 0,
                         KV_RULE_CUTS | KV_RULE_FORESEES, NULL},
    [KV_DECODE_STEPS] = {"steps", "an oracle: every row has its own best entries, nothing is lost for good", "", 0,
                         KV_RULE_CUTS | KV_RULE_FORESEES, NULL},
};
