/* decode.c - decode rules, step by step: append, attend, record, update, evict (policies.md 3.4, 3.5, 4.6). The row that triggers
 * an eviction has attended to the victim. Ties: larger weight first, then the earlier cache entry. */
#include <stdlib.h>

#include "sim/schedule.h"

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
static void keep_best(kv_cache *c, entry *e, uint32_t n, uint32_t keep, bool sorted)
{
    uint32_t *pos = malloc((c->n + 1) * sizeof *pos);
    double *acc = malloc((c->n + 1) * sizeof *acc);
    uint32_t m = 0;
    if (pos && acc) {
        qsort(e, n, sizeof *e, best_first);
        if (keep > n) keep = n;
        if (sorted) qsort(e, keep, sizeof *e, by_place);
        for (uint32_t i = 0; i < keep; i++) pos[m] = c->pos[e[i].at], acc[m++] = c->acc[e[i].at];
        for (uint32_t i = n; i < c->n; i++) pos[m] = c->pos[i], acc[m++] = c->acc[i];
        memcpy(c->pos, pos, m * sizeof *pos), memcpy(c->acc, acc, m * sizeof *acc);
        c->n = m;
    }
    free(pos), free(acc);
}

static kv_status entries(uint32_t n, entry **e, kv_error *err)
{
    kv_status st = kv_array(e, n, sizeof **e, err);
    for (uint32_t i = 0; i < n && !st; i++) (*e)[i].at = i;
    return st;
}

/* TOVA: mean over all heads of the newest row, the smallest leaves; the newest may evict itself. */
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
    keep_best(c, e, c->n, capacity, true);
    free(e);
    return KV_OK;
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

/* H2O with real dropping: accumulated weights, heavy hitters among the entries older than `recent`. */
static kv_status h2o(const kv_spec *s, kv_cache *c, uint32_t n_head, const double *w, kv_error *err)
{
    entry *e;
    (void)s;
    for (uint32_t h = 0; h < n_head && w; h++) /* acc of the prompt holds its last row already: w is NULL there */
        for (uint32_t i = 0; i < c->n; i++) c->acc[i] += w[(size_t)h * c->n + i] / n_head;
    if (c->n <= c->keep + c->recent) return KV_OK;
    uint32_t n = c->n - c->recent;
    kv_status st = entries(n, &e, err);
    if (st) return st;
    for (uint32_t i = 0; i < n; i++) e[i].score = c->acc[i];
    keep_best(c, e, n, c->keep, true);
    free(e);
    return KV_OK;
}

/* CAKE: the newest row, average of 5 in cache order per head, mean over the group; kept entries stand in score order, then the window. */
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
    keep_best(c, e, n, c->keep, false);
    free(e);
    return KV_OK;
}

const kv_decode_rule kv_decode_rules[] = {
    [KV_DECODE_KEEP] = {"keep", "every decoded token stays", "", false, false, false, NULL},
    [KV_DECODE_TOVA] = {"tova", "the newest row's mean over heads; the smallest leaves", "scores", true, true, false, tova},
    [KV_DECODE_STREAMING] = {"streaming", "first `sinks` and the newest", "sinks", true, true, false, streaming},
    [KV_DECODE_H2O] = {"h2o", "accumulated weights, the newest `recent` protected", "scores recent", false, true, true, h2o},
    [KV_DECODE_CAKE] = {"cake", "the newest row, smoothed in cache order, window protected", "scores window", false, false, false, cake},
    [KV_DECODE_H2O_MASK] = {"h2o-mask", "H2O's masking variant: dropped entries may return", "scores heavy_ratio recent_ratio", false, true, true, NULL},
};
