/* schedule.c - schedules of one layer: the step loop around the decode rules, and budget-dependent selections. */
#include "sim/schedule.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/dmath.h"
#include "sim/scorer.h"
#include "sim/select.h"

bool kv_schedule_needed(const kv_spec *s)
{
    return s->decode != KV_DECODE_KEEP || s->select >= KV_SELECT_TWO_STAGE;
}

void kv_schedule_free(kv_schedule *s)
{
    free(s->at), free(s->seen);
    *s = (kv_schedule){0};
}

bool kv_schedule_visible(const kv_schedule *s, const kv_scene *sc, uint32_t u, uint32_t p, uint32_t r)
{
    if (s->seen) return s->seen[((size_t)r * s->n_unit + u) * ((sc->n_token + 7) / 8) + p / 8] >> (p % 8) & 1;
    int32_t at = s->at[(size_t)u * sc->n_token + p];
    return at < 0 || (uint32_t)at > r;
}

/* Softmax row of query q at position `row` over keys 0..row of a KV head, in double: decode rules decide on differences that float rounding
 * would move (policies.md 13.8). */
static void attention_row(const kv_layer *l, uint32_t kv, const float *q, size_t row, double *p)
{
    const float *K = l->k + (size_t)kv * l->scene->n_token * l->d;
    double max = -INFINITY, sum = 0;
    for (size_t i = 0; i <= row; i++) {
        double s = 0;
        for (uint32_t j = 0; j < l->d; j++) s += (double)q[j] * K[i * l->d + j];
        p[i] = s * l->scale;
        if (l->softcap > 0) p[i] = l->softcap * (1 - 2 / (kv_exp(2 * p[i] / l->softcap) + 1));
        if (p[i] > max) max = p[i];
    }
    for (size_t i = 0; i <= row; i++) sum += p[i] = kv_exp(p[i] - max);
    for (size_t i = 0; i <= row; i++) p[i] /= sum;
}

/* Measured row r (-1: the prompt's last row) of every query head, [Hq][n_token]. */
static void attention_rows(const kv_layer *l, int64_t r, double *p)
{
    const kv_scene *sc = l->scene;
    for (uint32_t h = 0; h < l->n_q_head; h++) {
        const float *q = r < 0 ? l->q_win + ((size_t)h * l->max_window + l->max_window - 1) * l->d : l->q_row + ((size_t)h * sc->n_row + (size_t)r) * l->d;
        attention_row(l, h / l->group, q, r < 0 ? l->L - 1 : sc->row_first + (size_t)r, p + (size_t)h * sc->n_token);
    }
}

typedef struct {
    double score;
    uint32_t pos;
} scored;

static int best_first(const void *a, const void *b)
{
    const scored *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return (x->pos > y->pos) - (x->pos < y->pos);
}

/* CAKE's cache after the prompt stands in the order of the indicator (mean + gamma var of the window rows, average of 5, group mean),
 * and its decode rule smooths in that order, so neighbours must not swap by rounding: sort the kept ones by the indicator in double. */
static kv_status cake_order(const kv_spec *s, const kv_layer *l, uint32_t u, uint32_t n, uint32_t *pos, kv_error *err)
{
    uint32_t L = l->L, w = s->window < L ? s->window : L, m = L - w;
    double *p = NULL, *sum = NULL, *ind = NULL;
    scored *e = NULL;
    kv_status st = kv_array(&p, (size_t)w * L, sizeof *p, err);
    if (!st) st = kv_array(&sum, m, sizeof *sum, err);
    if (!st) st = kv_array(&ind, m, sizeof *ind, err);
    if (!st) st = kv_array(&e, n, sizeof *e, err);
    for (uint32_t h = u * l->group; h < (u + 1) * l->group && !st; h++) {
        for (uint32_t r = 0; r < w; r++)
            attention_row(l, u, l->q_win + ((size_t)h * l->max_window + l->max_window - w + r) * l->d, L - w + r, p + (size_t)r * L);
        for (uint32_t i = 0; i < m; i++) {
            double mean = 0, var = 0;
            for (uint32_t r = 0; r < w; r++) mean += p[(size_t)r * L + i] / w;
            for (uint32_t r = 0; r < w; r++) var += (p[(size_t)r * L + i] - mean) * (p[(size_t)r * L + i] - mean);
            sum[i] = mean + s->gamma * (w > 1 ? var / (w - 1) : 0);
        }
        for (uint32_t i = 0; i < m; i++)
            for (uint32_t k = i > 2 ? i - 2 : 0; k <= i + 2 && k < m; k++) ind[i] += sum[k] / 5 / l->group;
    }
    for (uint32_t i = 0; i < n && !st; i++) e[i] = (scored){ind[pos[i]], pos[i]};
    if (!st) qsort(e, n, sizeof *e, best_first);
    for (uint32_t i = 0; i < n && !st; i++) pos[i] = e[i].pos;
    free(p), free(sum), free(ind), free(e);
    return st;
}

/* Weights of one row over live entries in cache order: the recorded row itself, or renormalised over what is live. */
static void live_weights(const kv_spec *s, const kv_cache *c, const double *row, double *w)
{
    double sum = 0;
    for (uint32_t i = 0; i < c->n; i++) sum += w[i] = row[c->pos[i]];
    if (s->scores == KV_SCORES_RENORM && sum > 0)
        for (uint32_t i = 0; i < c->n; i++) w[i] /= sum;
}

/* The rules that drop for good. */
static kv_status step_loop(const kv_plan *p, size_t i, const kv_budget_resolved *b, const uint32_t *counts, kv_layer *l,
                           kv_schedule *out, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_scene *sc = p->scene;
    const kv_ranking *rk = &p->ranking[p->ranking_of[i]];
    const kv_decode_rule *rule = &kv_decode_rules[s->decode];
    uint32_t N = sc->n_token, U = out->n_unit, L = l->L;
    kv_cache *cache = NULL;
    uint32_t *slots = NULL;
    double *acc = NULL, *w = NULL, *rows = NULL;
    bool *live = NULL;
    kv_status st = kv_array(&cache, U, sizeof *cache, err);
    if (!st) st = kv_array(&slots, (size_t)U * (N + 1), sizeof *slots, err);
    if (!st) st = kv_array(&acc, (size_t)U * (N + 1), sizeof *acc, err);
    if (!st) st = kv_array(&w, (size_t)l->n_q_head * (N + 1), sizeof *w, err);
    if (!st) st = kv_array(&rows, (size_t)l->n_q_head * N, sizeof *rows, err);
    if (!st) st = kv_array(&live, N, sizeof *live, err);
    for (uint32_t u = 0; u < U && !st; u++) {
        kv_cache *c = &cache[u];
        uint32_t count = counts[(size_t)l->order * rk->n_unit + (rk->n_unit == U ? u : 0)], first, heads;
        const uint32_t *order = rk->order + ((size_t)l->order * rk->n_unit + (rk->n_unit == U ? u : 0)) * L;
        *c = (kv_cache){.pos = slots + (size_t)u * (N + 1), .acc = acc + (size_t)u * (N + 1)};
        kv_unit_heads(l, s->granularity, u, &first, &heads);
        if (rule->cuts_prompt) {
            c->recent = s->decode != KV_DECODE_H2O ? 0 : s->recent == KV_RECENT_HALF ? b->tokens / 2 : s->recent < b->tokens ? s->recent : b->tokens;
            c->keep = b->tokens - c->recent;
            for (uint32_t k = 0; k < L; k++) c->pos[c->n++] = k;
        } else { /* CAKE: descending indicator, then the window in order; untouched caches stand in order of position */
            c->recent = s->window < L ? s->window : L;
            if ((st = kv_plan_decode_keep(p, i, b, l->order, &c->keep, err))) break;
            bool sorted = L > (uint64_t)b->tokens + s->window; /* the guard held: a cut ran, even where it dropped nothing */
            uint32_t window = count < rk->n_forced ? count : rk->n_forced;
            for (uint32_t k = rk->n_forced; k < count && sorted; k++) c->pos[c->n++] = order[k];
            if (sorted && (st = cake_order(s, l, u, c->n, c->pos, err))) break;
            for (uint32_t k = sorted ? L - window : 0; k < L; k++) c->pos[c->n++] = k;
        }
        for (uint32_t k = 0; k < c->n && rule->accumulates; k++) {
            double sum = 0;
            for (uint32_t h = first; h < first + heads; h++) sum += l->colsum[(size_t)h * L + c->pos[k]];
            c->acc[k] = sum / heads;
        }
    }
    for (int64_t r = rule->cuts_prompt ? -1 : 0; r < (int64_t)sc->n_row && !st; r++) {
        attention_rows(l, r, rows);
        for (uint32_t u = 0; u < U && !st; u++) {
            kv_cache *c = &cache[u];
            uint32_t first, heads;
            kv_unit_heads(l, s->granularity, u, &first, &heads);
            if (r == 0) /* the question of --cut context is in the cache by now */
                for (uint32_t k = L; k < sc->row_first; k++) c->acc[c->n] = 0, c->pos[c->n++] = k;
            if (r >= 0) c->acc[c->n] = 0, c->pos[c->n++] = sc->row_first + (uint32_t)r;
            for (uint32_t h = 0; h < heads; h++) live_weights(s, c, rows + (size_t)(first + h) * N, w + (size_t)h * c->n);
            uint32_t before = c->n;
            for (uint32_t k = 0; k < before; k++) live[c->pos[k]] = true;
            uint32_t upto = r < 0 ? L : sc->row_first + (uint32_t)r + 1;
            st = rule->evict(s, c, heads, r < 0 && rule->accumulates ? NULL : w, err);
            bool shrank = c->n < before;
            for (uint32_t k = 0; k < c->n; k++) live[c->pos[k]] = false; /* what is still marked was dropped now */
            for (uint32_t k = 0; k < upto; k++)
                if (live[k]) {
                    live[k] = false;
                    if (shrank) out->at[(size_t)u * N + k] = (int32_t)(r + 1);
                }
        }
    }
    if (!rule->cuts_prompt) /* what the plan cut */
        for (uint32_t u = 0; u < U && !st; u++) {
            uint32_t count = counts[(size_t)l->order * rk->n_unit + u];
            const uint32_t *order = rk->order + ((size_t)l->order * rk->n_unit + u) * L;
            for (uint32_t k = count; k < L; k++) out->at[(size_t)u * N + order[k]] = 0;
        }
    free(cache), free(slots), free(acc), free(w), free(rows), free(live);
    return st;
}

/* H2O's masking variant (utils_hh/modify_llama.py): weights of dropped tokens are zeroed, rows are softmaxed over visible tokens, and the
 * mask of the next row protects one slot less than `recent`, so a token that leaves the recent span is invisible for one row. */
static kv_status mask_loop(const kv_spec *s, kv_layer *l, kv_schedule *out, kv_error *err)
{
    const kv_scene *sc = l->scene;
    uint32_t N = sc->n_token, L = l->L, U = out->n_unit, heavy = (uint32_t)(s->heavy_ratio * L), recent = (uint32_t)(s->recent_ratio * L);
    size_t bytes = (N + 7) / 8;
    float *key = NULL;
    double *acc = NULL, *w = NULL, *rows = NULL;
    uint32_t *order = NULL;
    kv_status st = kv_array(&out->seen, (size_t)(sc->n_row + 1) * U * bytes, 1, err);
    if (!st) st = kv_array(&rows, (size_t)l->n_q_head * N, sizeof *rows, err);
    if (!st) st = kv_array(&acc, (size_t)U * N, sizeof *acc, err);
    if (!st) st = kv_array(&w, N, sizeof *w, err);
    if (!st) st = kv_array(&key, N, sizeof *key, err);
    if (!st) st = kv_array(&order, N, sizeof *order, err);
    for (uint32_t u = 0; u < U && !st; u++)
        for (uint32_t k = 0; k < L; k++) acc[(size_t)u * N + k] = l->colsum[(size_t)u * L + k];
    for (uint32_t r = 0; r <= sc->n_row && !st; r++) {
        uint32_t n = r ? sc->row_first + r : L; /* tokens so far; row r sees n + 1 of them */
        for (uint32_t u = 0; u < U && !st; u++) {
            double *a = acc + (size_t)u * N;
            uint8_t *next = out->seen + ((size_t)r * U + u) * bytes;
            if (r) { /* row r-1 attends under its own mask, then adds its weights */
                const uint8_t *mask = out->seen + ((size_t)(r - 1) * U + u) * bytes;
                const double *row = rows + (size_t)u * N;
                if (u == 0) attention_rows(l, (int64_t)r - 1, rows);
                double sum = 0;
                for (uint32_t k = 0; k < n; k++) sum += w[k] = mask[k / 8] >> (k % 8) & 1 ? row[k] : 0;
                for (uint32_t k = 0; k < n; k++) a[k] += s->scores == KV_SCORES_RENORM && sum > 0 ? w[k] / sum : w[k];
            }
            for (uint32_t k = 0; k <= n && k < N; k++) next[k / 8] |= (uint8_t)(1u << (k % 8));
            if (n <= heavy + recent) continue;
            uint32_t from = n + 1 > recent ? n + 1 - recent : 0, old = n > recent ? n - recent : 0;
            if (!recent) from = n + 1, old = n; /* as published: nothing protected */
            for (uint32_t k = 0; k < from && k < N; k++) next[k / 8] &= (uint8_t)~(1u << (k % 8));
            for (uint32_t k = 0; k < old; k++) key[k] = (float)a[k];
            if (!kv_rank(old, key, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
            for (uint32_t k = 0; k < heavy && k < old && !st; k++) next[order[k] / 8] |= (uint8_t)(1u << (order[k] % 8));
            for (uint32_t k = 0; k < n; k++) /* scores of dropped tokens are lost, those of the last `recent` are not */
                if (k + recent < n && !(next[k / 8] >> (k % 8) & 1)) a[k] = 0;
        }
    }
    free(rows), free(acc), free(w), free(key), free(order);
    return st;
}

kv_status kv_schedule_make(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                           kv_schedule *out, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    *out = (kv_schedule){.n_unit = kv_unit_count(l, s->granularity)};
    size_t n = (size_t)out->n_unit * p->scene->n_token;
    kv_status st = kv_array(&out->at, n, sizeof *out->at, err);
    for (size_t k = 0; k < n && !st; k++) out->at[k] = -1;
    if (st) return st;
    if (s->select == KV_SELECT_TWO_STAGE) st = kv_select_two_stage(p, i, counts, l, out->at, err);
    else if (s->select == KV_SELECT_BLOCKS) st = kv_select_blocks(p, i, c, l, out->at, err);
    else if (s->select == KV_SELECT_MASS || s->select == KV_SELECT_SPANS) st = kv_select_first(p, i, c, counts, l, out->at, err);
    else if (s->decode == KV_DECODE_H2O_MASK) st = mask_loop(s, l, out, err);
    else st = step_loop(p, i, c, counts, l, out, err);
    if (st) kv_schedule_free(out);
    return st;
}
