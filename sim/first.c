/* first.c - selections in which some positions stand first as long as the budget allows it and everything else competes
 * in one flat top-k (KV_SELECT_MASS, KV_SELECT_SPANS). What stands first is data of the ranking: a key per position,
 * protected while it is below a limit that grows with the budget, so larger budgets keep supersets. */
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/scorer.h"
#include "sim/select.h"

#define MASS 0.9 /* of the mean attention, policies.md 8.1 */

/* Keys of one unit: positions by mean attention of the window, those strictly before the cumulated share reaches
 * `threshold`, which is below 1. a [n] is the mean over the unit's heads and rows; none stand first where it is zero
 * throughout. */
static kv_status mass_keys(uint32_t n, const float *a, double threshold, uint32_t *key, kv_error *err)
{
    uint32_t *order = NULL, k = 0;
    double sum = 0, reached = 0;
    kv_status st = kv_array(&order, n, sizeof *order, err);
    if (!st && !kv_rank(n, a, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    for (uint32_t i = 0; i < n; i++) sum += a[i];
    for (; k < n && !st; k++) {
        reached += a[order[k]] / sum;
        if (!(reached < threshold)) break;
    }
    for (uint32_t i = 0; i < k && !st; i++) key[order[i]] = i;
    free(order);
    return st;
}

/* DefensiveKV: threshold 0.9 - beta, beta = the window's own share of attention as the paper means it, or what the
 * repository measures after the window's columns are cut off: the share of the last `window` columns before it. */
static kv_status mass_first(kv_layer *l, const kv_spec *s, uint32_t *key, kv_error *err)
{
    uint32_t L = l->L, w = s->window < L ? s->window : L, n = L - w;
    uint32_t from = s->window_share == KV_SHARE_PAPER ? n
                    : n > w                           ? n - w
                                                      : 0,
             to = s->window_share == KV_SHARE_PAPER ? L : n;
    const float *p;
    float *a = NULL;
    double *sum = NULL, beta = 0;
    kv_status st = kv_layer_probs(l, w, &p, err);
    if (!st) st = kv_array(&a, n, sizeof *a, err);
    if (!st) st = kv_array(&sum, n, sizeof *sum, err);
    for (size_t r = 0; r < (size_t)l->n_q_head * w && !st; r++)
        for (uint32_t i = from; i < to; i++) beta += p[r * L + i] / ((double)l->n_q_head * w);
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity) && !st; u++) {
        uint32_t first, count;
        kv_unit_heads(l, s->granularity, u, &first, &count);
        memset(sum, 0, n * sizeof *sum);
        for (size_t r = (size_t)first * w; r < (size_t)(first + count) * w; r++)
            for (uint32_t i = 0; i < n; i++) sum[i] += p[r * L + i];
        for (uint32_t i = 0; i < n; i++) a[i] = (float)(sum[i] / ((double)count * w));
        st = mass_keys(n, a, MASS - beta, key + (size_t)u * L, err);
    }
    free(a), free(sum);
    return st;
}

/* Coverage: the positions before the window in spans of chunk_length tokens, a span's score in a unit = the mean there,
 * in the layer = the largest of its units. The key of a span is its rank in the layer, in the `cover` units where it
 * scores most; elsewhere it has none. */
static kv_status spans_first(const kv_layer *l, const kv_spec *s, const float *score, uint32_t *key, kv_error *err)
{
    uint32_t L = l->L, w = s->window < L ? s->window : L, len = s->chunk_length, n = (L - w + len - 1) / len;
    uint32_t U = kv_unit_count(l, s->granularity), *order = NULL, *best = NULL;
    float *of_unit = NULL, *of_layer = NULL, *mean = NULL; /* mean [n][U] */
    kv_status st = kv_array(&order, n, sizeof *order, err);
    if (!st) st = kv_array(&best, U, sizeof *best, err);
    if (!st) st = kv_array(&of_layer, n, sizeof *of_layer, err);
    if (!st) st = kv_array(&mean, (size_t)n * U, sizeof *mean, err);
    for (uint32_t c = 0; c < n && !st; c++) {
        uint32_t end = (c + 1) * len < L - w ? (c + 1) * len : L - w;
        of_unit = mean + (size_t)c * U;
        for (uint32_t u = 0; u < U; u++) {
            double sum = 0;
            for (uint32_t i = c * len; i < end; i++) sum += score[(size_t)u * L + i];
            of_unit[u] = (float)(sum / (end - c * len));
            if (u == 0 || of_unit[u] > of_layer[c]) of_layer[c] = of_unit[u];
        }
    }
    if (!st && !kv_rank(n, of_layer, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    for (uint32_t k = 0; k < n && !st; k++) {
        uint32_t c = order[k], end = (c + 1) * len < L - w ? (c + 1) * len : L - w;
        if (!kv_rank(U, mean + (size_t)c * U, best)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (uint32_t j = 0; j < s->cover && j < U && !st; j++)
            for (uint32_t i = c * len; i < end; i++) key[(size_t)best[j] * L + i] = k;
    }
    free(order), free(best), free(of_layer), free(mean);
    return st;
}

kv_status kv_first_keys(kv_layer *l, const kv_spec *s, const float *score, uint32_t *key, kv_error *err)
{
    for (size_t k = 0; k < (size_t)kv_unit_count(l, s->granularity) * l->L; k++) key[k] = UINT32_MAX;
    return s->select == KV_SELECT_MASS ? mass_first(l, s, key, err) : spans_first(l, s, score, key, err);
}

/* Keys below this stand first. Mass: int(L(1-r) - window) a unit. Spans: as many as a share alpha of the layer's slots
 * behind the protected ones holds, each in `cover` units. */
static uint32_t limit_of(const kv_spec *s, const kv_ranking *r, const kv_budget_resolved *c)
{
    double B = (double)c->tokens - r->n_forced, cover = s->cover < r->n_unit ? s->cover : r->n_unit;
    double x = s->select == KV_SELECT_MASS ? c->real - s->window : s->alpha * B * r->n_unit / (s->chunk_length * cover);
    return x > 0 ? (uint32_t)x : 0;
}

typedef struct {
    uint32_t key, pos;
} entry;

static int by_key(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->key != y->key) return x->key < y->key ? -1 : 1;
    return (x->pos > y->pos) - (x->pos < y->pos);
}

/* All positions of a unit as the selection sees them: protected, standing first (*n_first of both), the rest by score.
 * tmp and list [L]. value (may be NULL) [L] = `top` for the first ones, then scores. */
static void list_of(const kv_ranking *r, size_t unit, uint32_t L, uint32_t limit, float top, entry *tmp, uint32_t *list,
                    float *value)
{
    const uint32_t *order = r->order + unit * L, *key = r->first_key + unit * L;
    const float *sorted = r->sorted + unit * (L - r->n_forced);
    uint32_t n = r->n_forced, m = 0;
    memcpy(list, order, n * sizeof *list);
    for (uint32_t k = n; k < L; k++)
        if (key[order[k]] < limit) tmp[m++] = (entry){key[order[k]], order[k]};
    qsort(tmp, m, sizeof *tmp, by_key);
    for (uint32_t k = 0; k < m; k++) list[n++] = tmp[k].pos;
    for (uint32_t k = 0; k < n && value; k++) value[k] = top;
    for (uint32_t k = r->n_forced; k < L; k++)
        if (key[order[k]] >= limit) {
            if (value) value[n] = sorted[k - r->n_forced];
            list[n++] = order[k];
        }
}

/* Largest score of a layer, which everything that stands first shares. */
static float layer_top(const kv_ranking *r, uint32_t layer, uint32_t L)
{
    size_t m = L - r->n_forced;
    float top = 0;
    for (uint32_t u = 0; u < r->n_unit && m; u++) {
        float x = r->sorted[((size_t)layer * r->n_unit + u) * m];
        if (u == 0 || x > top) top = x;
    }
    return top;
}

kv_status kv_first_counts(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_ranking *r = &p->ranking[p->count_of[i]];
    bool pool = s->layers == KV_LAYERS_POOL;
    uint32_t n = p->scene->n_evict, L = p->scene->n_cut, U = r->n_unit, limit = limit_of(s, r, c);
    /* within a layer every head has its window before anything competes; over layers the windows compete too */
    uint32_t given = pool ? 0 : r->n_forced < c->tokens ? r->n_forced : c->tokens;
    size_t m = L - given, group = pool ? (size_t)n * U : U;
    double real = s->select == KV_SELECT_MASS ? c->real : c->tokens; /* int(L(1-r) Hkv), as published */
    uint64_t total = (uint64_t)(pool ? real * U * n : real * U), rest = total - (uint64_t)given * group;
    float *x = NULL, *value = NULL, *scale = NULL;
    uint32_t *list = NULL;
    entry *tmp = NULL;
    kv_status st = kv_array(&x, group * m, sizeof *x, err);
    if (!st) st = kv_array(&value, L, sizeof *value, err);
    if (!st) st = kv_array(&list, L, sizeof *list, err);
    if (!st) st = kv_array(&tmp, L, sizeof *tmp, err);
    if (!st && r->weight) st = kv_layer_scales(r, n, &scale, err);
    for (size_t unit = 0; unit < (size_t)n * U && !st; unit++) {
        list_of(r, unit, L, limit, layer_top(r, (uint32_t)(unit / U), L), tmp, list, value);
        memcpy(x + unit % group * m, value + given, m * sizeof *x);
        if ((unit + 1) % group) continue;
        uint32_t *won = counts + unit + 1 - group;
        kv_flat_topk(x, group, m, pool ? scale : NULL, rest, won);
        for (size_t u = 0; u < group; u++) won[u] += given;
    }
    free(x), free(value), free(list), free(tmp), free(scale);
    return st;
}

kv_status kv_select_first(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                          int32_t *at, kv_error *err)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    uint32_t L = l->L, limit = limit_of(&p->spec[i], r, c), *list = NULL;
    entry *tmp = NULL;
    kv_status st = kv_array(&list, L, sizeof *list, err);
    if (!st) st = kv_array(&tmp, L, sizeof *tmp, err);
    for (uint32_t u = 0; u < r->n_unit && !st; u++) {
        size_t unit = (size_t)l->order * r->n_unit + u;
        list_of(r, unit, L, limit, 0, tmp, list, NULL);
        for (uint32_t k = counts[unit]; k < L; k++) at[(size_t)u * l->scene->n_token + list[k]] = 0;
    }
    free(list), free(tmp);
    return st;
}
