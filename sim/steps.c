/* steps.c - decode rules row by row: append, attend, record, update, evict (policies.md 1.1, 3.4, 3.5, 3.8, 4.6).
 * Weights are formed in double: the rules decide on differences that float rounding would move (policies.md 13.8). */
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/dmath.h"
#include "sim/schedule.h"
#include "sim/scorer.h"

const float *kv_step_query(const kv_layer *l, uint32_t h, int64_t r)
{
    if (r < 0) return l->q_win + ((size_t)h * l->max_window + (size_t)(l->max_window + r)) * l->d;
    return l->q_row + ((size_t)h * l->scene->n_row + (size_t)r) * l->d;
}

/* Softmax of query q of head h over n keys, those listed or, with pos NULL, keys 0..n-1. Dots run in four lanes, then
 * one rest, in a fixed order. */
static void softmax_over(const kv_layer *l, uint32_t h, const float *q, const uint32_t *pos, size_t n, double *w)
{
    const float *K = l->k + (size_t)(h / l->group) * l->scene->n_token * l->d;
    double qd[KV_HEAD_DIM_MAX], max = -INFINITY, sum = 0;
    size_t d = l->d;
    for (size_t j = 0; j < d; j++) qd[j] = q[j];
    for (size_t i = 0; i < n; i++) {
        const float *k = K + (pos ? pos[i] : i) * d;
        double lane[4] = {0}, rest = 0;
        size_t j = 0;
        for (; j + 4 <= d; j += 4)
            for (int t = 0; t < 4; t++) lane[t] += qd[j + t] * k[j + t];
        for (; j < d; j++) rest += qd[j] * k[j];
        double x = (lane[0] + lane[1] + (lane[2] + lane[3]) + rest) * l->scale;
        if (l->softcap > 0) x = l->softcap * (1 - 2 / (kv_exp(2 * x / l->softcap) + 1));
        w[i] = x;
        if (x > max) max = x;
    }
    for (size_t i = 0; i < n; i++) sum += w[i] = kv_exp(w[i] - max);
    for (size_t i = 0; i < n; i++) w[i] /= sum;
}

/* Weights of row r of query head h over the listed positions: of a softmax over them, or those of the recorded row
 * (raw); `all` is scratch for the recorded row. */
static void row_weights(const kv_layer *l, const kv_spec *s, uint32_t h, int64_t r, const uint32_t *pos, size_t n,
                        double *all, double *w)
{
    if (s->scores == KV_SCORES_RENORM) {
        softmax_over(l, h, kv_step_query(l, h, r), pos, n, w);
        return;
    }
    softmax_over(l, h, kv_step_query(l, h, r), NULL, r < 0 ? l->L : l->scene->row_first + (size_t)r + 1, all);
    for (size_t i = 0; i < n; i++) w[i] = all[pos[i]];
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

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* CAKE's cache after the prompt stands in the order of the indicator (mean + gamma var of the window rows, average of
 * 5, group mean), and its decode rule smooths in that order, so neighbours must not swap by rounding: sort the kept
 * ones by the indicator in double. */
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
            softmax_over(l, h, kv_step_query(l, h, (int64_t)r - w), NULL, (size_t)m + r + 1, p + (size_t)r * L);
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

/* One unit of the step loop. */
typedef struct {
    kv_cache c;
    uint32_t first, heads; /* its query heads */
    uint32_t *bin, n_bin;  /* entries that wait to leave together; rows still see them */
} unit;

/* What the cache holds after the prompt and how much it may hold: what the plan gave the unit where it cut, else the
 * budget. */
static kv_status start_unit(const kv_plan *p, size_t i, const kv_budget_resolved *b, const uint32_t *counts,
                            const kv_layer *l, unit *x, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_ranking *rk = &p->ranking[p->ranking_of[i]];
    const kv_decode_rule *rule = &kv_decode_rules[s->decode];
    kv_cache *c = &x->c;
    size_t at = (size_t)l->order * rk->n_unit + c->unit;
    const uint32_t *order = rk->order + at * l->L;
    uint32_t L = l->L, count = s->prompt_cut ? L : counts[at], n_ranked = 0;
    /* b->tokens ends at L, but a cache of C > L entries grows to C before anything leaves */
    kv_budget_resolved whole = *b;
    if (b->real > L) whole.tokens = b->real < KV_BUDGET_TOKENS_MAX ? (uint32_t)b->real : KV_BUDGET_TOKENS_MAX;
    uint32_t C = whole.tokens, capacity = s->prompt_cut || (count == L && C > L) ? C : count;
    kv_status st = KV_OK;
    bool cake = s->decode == KV_DECODE_CAKE && s->layers == KV_LAYERS_CAKE;
    bool cut = !s->prompt_cut && L >= C + (s->guard == KV_GUARD_WINDOW ? (uint64_t)s->window + 1
                                                                       : 0); /* it ran, even where it dropped nothing */
    if (rule->flags & KV_RULE_RANKED && cut) {
        for (uint32_t k = rk->n_forced; k < count; k++) c->pos[c->n++] = order[k];
        n_ranked = c->n;
        if (cake) st = cake_order(s, l, c->unit, n_ranked, c->pos, err);
        for (uint32_t k = 0; k < count && k < rk->n_forced; k++) c->pos[c->n++] = order[k];
    } else {
        for (uint32_t k = 0; k < count; k++) c->pos[c->n++] = s->prompt_cut ? k : order[k];
    }
    qsort(c->pos + n_ranked, c->n - n_ranked, sizeof *c->pos, ascending);
    switch ((kv_decode)s->decode) {
    case KV_DECODE_H2O: c->recent = s->recent == KV_RECENT_HALF ? capacity / 2 : s->recent; break;
    case KV_DECODE_CAKE:
    case KV_DECODE_RKV: c->recent = s->window; break;
    default: break;
    }
    if (c->recent > capacity) c->recent = capacity;
    c->keep = capacity - c->recent;
    if (cake && !st) {         /* the layer's share in the last stage, which may be more than the cascade left it */
        c->recent = s->window; /* decoded rows fill it where the prompt is shorter */
        st = kv_plan_decode_keep(p, i, &whole, l->order, &c->keep, err);
    }
    for (uint32_t k = 0; k < c->n && rule->flags & KV_RULE_ACCUMULATES; k++) {
        double sum = 0;
        for (uint32_t h = x->first; h < x->first + x->heads; h++) sum += l->colsum[(size_t)h * L + c->pos[k]];
        c->acc[k] = sum / x->heads;
    }
    return st;
}

/* Rows that drop for good; w [heads][N], all and one [N], before and live [N] are scratch. */
typedef struct {
    double *w, *all, *one;
    uint32_t *before;
    bool *live;
} scratch;

/* Row r has attended to everything in the cache of unit x: update, then evict; at [N] takes what leaves. */
static kv_status step(const kv_spec *s, unit *x, int64_t r, const scratch *t, int32_t *at, kv_error *err)
{
    const kv_decode_rule *rule = &kv_decode_rules[s->decode];
    kv_cache *c = &x->c;
    uint32_t n = c->n, row = (uint32_t)(r < 0 ? 0 : r);
    bool accumulates = rule->flags & KV_RULE_ACCUMULATES;
    bool due = r < 0 || (rule->flags & KV_RULE_POSITION ? c->l->scene->row_first + row : row + 1) % s->every == 0;
    bool weighs = (accumulates && r >= 0) || (rule->flags & KV_RULE_WEIGHS && due && n > (uint64_t)c->keep + c->recent);
    memcpy(t->before, c->pos, n * sizeof *c->pos);
    memcpy(t->before + n, x->bin, x->n_bin * sizeof *x->bin);
    for (uint32_t h = 0; h < x->heads && weighs; h++) {
        row_weights(c->l, s, x->first + h, r, t->before, (size_t)n + x->n_bin, t->all, t->one);
        memcpy(t->w + (size_t)h * n, t->one, n * sizeof *t->w);
    }
    for (uint32_t h = 0; h < x->heads && accumulates && r >= 0; h++)
        for (uint32_t k = 0; k < n; k++) c->acc[k] += t->w[(size_t)h * n + k] / x->heads;
    if (!due) return KV_OK;
    c->row = r;
    kv_status st = rule->evict(s, c, x->heads, t->w, err);
    if (st || c->n == n) return st;
    for (uint32_t k = 0; k < c->n; k++) t->live[c->pos[k]] = true;
    for (uint32_t k = 0; k < n; k++)
        if (!t->live[t->before[k]]) x->bin[x->n_bin++] = t->before[k];
    for (uint32_t k = 0; k < c->n; k++) t->live[c->pos[k]] = false;
    if (r >= 0 && x->n_bin < s->bin) return KV_OK; /* the prompt's cut does not wait */
    for (uint32_t k = 0; k < x->n_bin; k++) at[x->bin[k]] = (int32_t)(r + 1);
    x->n_bin = 0;
    return KV_OK;
}

struct kv_steps {
    const kv_spec *spec;
    kv_layer *l;
    uint32_t n_unit;
    int32_t *at;
    unit *x; /* [n_unit] */
    uint32_t *slots, *bins;
    double *acc;
    scratch t;
};

static kv_status all_units(kv_steps *s, int64_t r, kv_error *err)
{
    const kv_scene *sc = s->l->scene;
    kv_status st = KV_OK;
    for (uint32_t u = 0; u < s->n_unit && !st; u++) {
        kv_cache *c = &s->x[u].c;
        for (uint32_t k = s->l->L; r == 0 && k < sc->row_first; k++)
            c->acc[c->n] = 0, c->pos[c->n++] = k; /* the question of --cut context */
        if (r >= 0) c->acc[c->n] = 0, c->pos[c->n++] = sc->row_first + (uint32_t)r;
        st = step(s->spec, &s->x[u], r, &s->t, s->at + (size_t)u * sc->n_token, err);
    }
    return st;
}

kv_status kv_steps_open(const kv_plan *p, size_t i, const kv_budget_resolved *b, const uint32_t *counts, kv_layer *l,
                        int32_t *at, kv_steps **out, kv_error *err)
{
    const kv_ranking *rk = &p->ranking[p->ranking_of[i]];
    uint32_t N = l->scene->n_token, U = rk->n_unit, L = l->L;
    kv_steps *s = NULL;
    kv_status st = kv_array(&s, 1, sizeof *s, err);
    *out = NULL;
    if (st) return st;
    s->spec = &p->spec[i], s->l = l, s->n_unit = U, s->at = at;
    scratch *t = &s->t;
    st = kv_array(&s->x, U, sizeof *s->x, err);
    if (!st) st = kv_array(&s->slots, (size_t)U * N, sizeof *s->slots, err);
    if (!st) st = kv_array(&s->bins, (size_t)U * N, sizeof *s->bins, err);
    if (!st) st = kv_array(&s->acc, (size_t)U * N, sizeof *s->acc, err);
    if (!st) st = kv_array(&t->w, (size_t)l->n_q_head * N, sizeof *t->w, err);
    if (!st) st = kv_array(&t->all, N, sizeof *t->all, err);
    if (!st) st = kv_array(&t->one, N, sizeof *t->one, err);
    if (!st) st = kv_array(&t->before, N, sizeof *t->before, err);
    if (!st) st = kv_array(&t->live, N, sizeof *t->live, err);
    for (uint32_t u = 0; u < U && !st; u++) {
        unit *x = &s->x[u];
        *x = (unit){.c = {.pos = s->slots + (size_t)u * N, .acc = s->acc + (size_t)u * N, .l = l, .unit = u},
                    .bin = s->bins + (size_t)u * N};
        kv_unit_heads(l, rk->granularity, u, &x->first, &x->heads);
        st = start_unit(p, i, b, counts, l, x, err);
        uint32_t count = st || s->spec->prompt_cut ? L : counts[(size_t)l->order * U + u];
        const uint32_t *order = rk->order + ((size_t)l->order * U + u) * L;
        for (uint32_t k = count; k < L; k++) at[(size_t)u * N + order[k]] = 0; /* what the plan cut */
    }
    if (!st && s->spec->prompt_cut) st = all_units(s, -1, err);
    if (st)
        kv_steps_close(s);
    else
        *out = s;
    return st;
}

kv_status kv_steps_row(kv_steps *s, uint32_t r, kv_error *err)
{
    return all_units(s, r, err);
}

void kv_steps_close(kv_steps *s)
{
    if (!s) return;
    free(s->x), free(s->slots), free(s->bins), free(s->acc);
    free(s->t.w), free(s->t.all), free(s->t.one), free(s->t.before), free(s->t.live);
    free(s);
}

kv_status kv_step_rows(const kv_plan *p, size_t i, const kv_budget_resolved *b, const uint32_t *counts, kv_layer *l,
                       kv_schedule *out, kv_error *err)
{
    kv_steps *s = NULL;
    kv_status st = kv_steps_open(p, i, b, counts, l, out->at, &s, err);
    for (uint32_t r = 0; r < p->scene->n_row && !st; r++) st = kv_steps_row(s, r, err);
    kv_steps_close(s);
    return st;
}

/* H2O's masking variant (FMInference/H2O utils_hh/modify_llama.py) and VATP, which grew out of it (guozhiyu/vatp, the
 * same file). Rows are softmaxed over the tokens their mask shows; scores of hidden tokens are lost, those of the last
 * `recent` are not. In H2O the mask of the next row protects one slot less than the scores do, so a token that leaves
 * the recent span is invisible for one row unless it is heavy. In VATP every weight counts times ||v||_1, the first
 * `sinks` scores are forced above all others, and the mask shares memory with the one of the scores, so one token more
 * than heavy + recent stays visible. Both hide nothing while int(recent_ratio L) is 0. */
kv_status kv_hide_rows(const kv_spec *s, kv_layer *l, kv_schedule *out, kv_error *err)
{
    const kv_scene *sc = l->scene;
    bool vatp = s->decode == KV_DECODE_VATP;
    uint32_t N = sc->n_token, L = l->L, U = out->n_unit, heavy = (uint32_t)(s->heavy_ratio * L),
             recent = (uint32_t)(s->recent_ratio * L);
    size_t bytes = (N + 7) / 8;
    float *key = NULL;
    double *acc = NULL, *norm = NULL, *w = NULL, *all = NULL;
    uint32_t *order = NULL, *pos = NULL;
    kv_status st = kv_array(&out->seen, (size_t)(sc->n_row + 1) * U * bytes, 1, err);
    if (!st) st = kv_array(&acc, N, sizeof *acc, err);
    if (!st) st = kv_array(&w, N, sizeof *w, err);
    if (!st) st = kv_array(&all, N, sizeof *all, err);
    if (!st) st = kv_array(&key, N, sizeof *key, err);
    if (!st) st = kv_array(&norm, N, sizeof *norm, err);
    if (!st) st = kv_array(&order, N, sizeof *order, err);
    if (!st) st = kv_array(&pos, N, sizeof *pos, err);
    for (uint32_t u = 0; u < U && !st; u++) {
        uint32_t first, heads;
        kv_unit_heads(l, s->granularity, u, &first, &heads);
        memset(acc, 0, N * sizeof *acc);
        const float *v = l->v + (size_t)(first / l->group) * N * l->d;
        for (size_t k = 0; k < N; k++) {
            double l1 = 0;
            for (uint32_t j = 0; j < l->d; j++) l1 += fabs((double)v[k * l->d + j]);
            norm[k] = vatp ? l1 : 1;
        }
        for (uint32_t h = first; h < first + heads; h++)
            for (uint32_t k = 0; k < L; k++) acc[k] += l->colsum[(size_t)h * L + k] * norm[k] / heads;
        for (uint32_t k = 0; k < L && k < s->sinks && vatp; k++) acc[k] = INFINITY;
        for (uint32_t r = 0; r <= sc->n_row && !st; r++) {
            uint32_t own = sc->row_first + r, n = r ? own : L; /* the row's own position; tokens that have a score */
            uint8_t *next = out->seen + ((size_t)r * U + u) * bytes;
            if (r) { /* row r-1 attends under its own mask, then adds its weights */
                const uint8_t *mask = next - U * bytes;
                uint32_t m = 0;
                for (uint32_t k = 0; k < n; k++)
                    if (mask[k / 8] >> (k % 8) & 1) pos[m++] = k;
                for (uint32_t h = first; h < first + heads; h++) {
                    row_weights(l, s, h, (int64_t)r - 1, pos, m, all, w);
                    for (uint32_t k = 0; k < m; k++) acc[pos[k]] += w[k] * norm[pos[k]] / heads;
                }
            }
            for (uint32_t k = 0; k <= own && k < N; k++) next[k / 8] |= (uint8_t)(1u << (k % 8));
            if (n <= heavy + recent || !recent) continue;
            uint32_t old = n > recent ? n - recent : 0, from = vatp ? old : old + 1;
            for (uint32_t k = 0; k < from; k++) next[k / 8] &= (uint8_t) ~(1u << (k % 8));
            for (uint32_t k = 0; k < old; k++) key[k] = (float)acc[k];
            if (!kv_rank(old, key, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
            for (uint32_t k = 0; k < heavy && k < old && !st; k++)
                next[order[k] / 8] |= (uint8_t)(1u << (order[k] % 8));
            for (uint32_t k = 0; k < old; k++)
                if (!(next[k / 8] >> (k % 8) & 1)) acc[k] = 0;
        }
    }
    free(acc), free(w), free(all), free(key), free(norm), free(order), free(pos);
    return st;
}
