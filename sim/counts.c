/* counts.c - how many entries of each ranking a policy keeps at a budget. Everything here counts items: tokens, or
 * whole pages of spec.page tokens (floor(C / page) of them); only the last step of kv_plan_counts turns items into
 * tokens. */
#include <math.h>
#include <stdlib.h>

#include "sim/dmath.h"
#include "sim/oracle.h"
#include "sim/plan.h"
#include "sim/select.h"

typedef struct {
    double part;
    uint32_t at;
} remainder_of;

static int larger_first(const void *x, const void *y)
{
    const remainder_of *a = x, *b = y;
    if (a->part != b->part) return a->part < b->part ? 1 : -1;
    return (a->at > b->at) - (a->at < b->at);
}

/* Shares of total that add up to it exactly: floors, then one more for the largest fractions. */
static kv_status largest_remainder(const double *share, uint32_t n, int64_t total, int64_t *b, kv_error *err)
{
    remainder_of *rest = NULL;
    double sum = 0;
    int64_t given = 0;
    kv_status st = kv_array(&rest, n, sizeof *rest, err);
    if (st) return st;
    for (uint32_t l = 0; l < n; l++) sum += share[l];
    for (uint32_t l = 0; l < n; l++) {
        double x = sum > 0 ? share[l] / sum * (double)total : (double)total / n;
        b[l] = (int64_t)x;
        rest[l] = (remainder_of){x - (double)b[l], l};
        given += b[l];
    }
    qsort(rest, n, sizeof *rest, larger_first);
    for (uint32_t l = 0; l < n && given < total; l++, given++) b[rest[l].at]++;
    free(rest);
    return KV_OK;
}

/* LAVa's repository: after each layer the earlier ones are cut again, heads by flat top-k over all their scores, with
 * the floor frozen at int(alpha * C) of the whole nominal C (policies.md section 6, 4). counts are window-free, L -
 * window = whole. */
static void lava_code(const kv_spec *s, const kv_ranking *r, uint32_t n, size_t m, uint32_t C, uint32_t *counts)
{
    uint32_t U = r->n_unit, won[1024];
    int64_t total = ((int64_t)C - r->n_forced) * n;
    float keep = (float)(1 - s->alpha), floor_part = (float)(int64_t)(s->alpha * C);
    for (uint32_t l = 0; l < n; l++) {
        const float *sorted = r->sorted + (size_t)l * U * m;
        uint32_t *len = counts + (size_t)l * U;
        double sum = 0;
        for (uint32_t k = 0; k < l; k++) sum += r->spread[k];
        for (uint32_t u = 0; u < U; u++) len[u] = (uint32_t)m;
        for (uint32_t stage = l; stage < n; stage++) {
            sum += r->spread[stage];
            int64_t b =
                total > 0 ? (int64_t)(sum > 0 ? r->spread[l] / sum * (double)total : (double)total / (stage + 1)) : 0;
            if (b > (int64_t)m) continue;
            kv_flat_topk(sorted, U, m, NULL, (uint64_t)b * U, won);
            for (uint32_t u = 0; u < U; u++) {
                uint32_t cap = (uint32_t)rintf((float)won[u] * keep + floor_part);
                if (cap < len[u]) len[u] = cap;
            }
        }
    }
}

/* HeadKV: B // beta of every budget goes into a pool shared by importance, the rest is equal (policies.md section 7).
 */
static void table_heads(const kv_spec *s, const kv_ranking *r, uint32_t n, uint32_t layer, uint32_t C,
                        uint32_t n_q_head, uint32_t *won)
{
    /* Python's C // beta: from the exact remainder, not from the rounded quotient */
    double pool = rint((C - fmod(C, s->beta)) / s->beta), least = C - pool;
    uint32_t g = n_q_head / r->n_unit;
    for (uint32_t u = 0; u < r->n_unit; u++) {
        double sum = 0;
        for (uint32_t q = u * g; q < (u + 1) * g; q++)
            sum += rint(r->importance[(size_t)layer * n_q_head + q] * pool * n * n_q_head + least);
        won[u] = (uint32_t)rint(sum / g);
    }
}

/* kvpress AdaKV: the first int(C alpha) entries of every unit are immune, the rest is one flat top-k in which protected
 * entries stand above all; counts include the protected ones. */
static kv_status safeguard_heads(const kv_spec *s, const kv_ranking *r, uint32_t layer, uint32_t L, uint32_t C,
                                 uint32_t *won, kv_error *err)
{
    uint32_t safe = (uint32_t)(C * s->alpha), U = r->n_unit;
    size_t m = L - r->n_forced, rest = L - safe;
    float *x = NULL;
    if (C <= r->n_forced) { /* protected entries of different units tie: every unit keeps its newest */
        for (uint32_t u = 0; u < U; u++) won[u] = C;
        return KV_OK;
    }
    kv_status st = kv_array(&x, U * rest, sizeof *x, err);
    if (st) return st;
    for (uint32_t u = 0; u < U; u++)
        for (size_t k = safe; k < L; k++)
            x[u * rest + k - safe] =
                k < r->n_forced ? INFINITY : r->sorted[((size_t)layer * U + u) * m + k - r->n_forced];
    kv_flat_topk(x, U, rest, NULL, (uint64_t)(C - safe) * U, won);
    for (uint32_t u = 0; u < U; u++) won[u] += safe;
    free(x);
    return KV_OK;
}

/* Exponents of CAKE's scripts, set for two budgets only; every other one falls into an exception handler and gets 1.0
 * (policies.md 4.7). */
static void script_tau(const kv_spec *s, uint32_t C, double *tau1, double *tau2)
{
    static const double T[][4] = {[KV_TAU_LLAMA31_8B] = {1.6, 0.4, 1.6, 0.6},
                                  [KV_TAU_LLAMA2_7B] = {1.9, 1.8, 0.9, 2.3},
                                  [KV_TAU_LLAMA2_13B] = {0.5, 0.4, 1.8, 2.0},
                                  [KV_TAU_MISTRAL_7B] = {0.8, 0.5, 1.0, 0.8},
                                  [KV_TAU_QWEN25_7B] = {1.5, 0.6, 0.4, 0.6}};
    if (s->tau_table == KV_TAU_NONE) return;
    const double *t = T[s->tau_table];
    *tau1 = C == 1024 ? t[0] : C == 128 ? t[2] : 1;
    *tau2 = C == 1024 ? t[1] : C == 128 ? t[3] : 1;
}

void kv_cake_preference(const kv_spec *s, const kv_ranking *r, uint32_t n, uint32_t C, double *preference)
{
    double tau1 = s->tau1, tau2 = s->tau2;
    script_tau(s, C, &tau1, &tau2);
    for (uint32_t l = 0; l < n; l++)
        preference[l] = r->entropy[l] > 0 && r->variance[l] > 0
                            ? kv_pow(r->entropy[l], 1 / tau1) * kv_pow(r->variance[l], 1 / tau2)
                            : 0;
}

/* Window-free budgets of the layers; -1 = the layer keeps everything. */
static kv_status layer_budgets(const kv_plan *p, const kv_spec *s, const kv_ranking *r, const kv_budget_resolved *c,
                               int64_t *b, kv_error *err)
{
    uint32_t n = p->scene->n_evict;
    /* a budget beyond L matters to Ada-KV's guard alone, which looks at each layer's own share */
    int64_t L = r->n_item, nf = r->n_forced, C = s->guard == KV_GUARD_BEYOND ? (int64_t)c->real : c->tokens;
    int64_t B = C > nf ? C - nf : 0;
    kv_status st = KV_OK;
    for (uint32_t l = 0; l < n; l++) b[l] = B;
    switch ((kv_layer_alloc)s->layers) {
    case KV_LAYERS_UNIFORM:
    case KV_LAYERS_LAVA_CODE: /* counts of its own: lava_code */
    case KV_LAYERS_POOL: break;
    case KV_LAYERS_LAVA: st = largest_remainder(r->spread, n, B * n, b, err); break;
    case KV_LAYERS_SQUEEZE:
        kv_squeeze_budgets(r->similar, n, s->squeeze, C, b);
        for (uint32_t l = 0; l < n; l++) b[l] -= nf; /* counts include the protected ones; may fall below them */
        break;
    case KV_LAYERS_PYRAMID_KVF:
        if (L >= 2 * B) kv_pyramid(B, (int64_t)s->beta, L - nf, n, b);
        break;
    case KV_LAYERS_PYRAMID_FFY0: kv_pyramid(B, (int64_t)s->beta, L - nf, n, b); break;
    case KV_LAYERS_PYRAMID_KVPRESS: {
        double w = s->window, mean = c->real, lo = mean / s->beta, hi = 2 * mean - lo;
        if (hi >= (double)L - w) hi = (double)L - w, lo = 2 * mean - hi;
        bool fits = (double)L >= hi && hi >= lo && lo >= w;
        for (uint32_t l = 0; l < n; l++) {
            double count = fits ? hi - l * (n > 1 ? (hi - lo) / (n - 1) : 0) : mean;
            b[l] = (int64_t)rint(count) - nf; /* counts include the window; may fall below it */
        }
        break;
    }
    case KV_LAYERS_CAKE: {
        double *pref = NULL;
        st = kv_array(&pref, n, sizeof *pref, err);
        if (!st) kv_cake_preference(s, r, n, c->tokens, pref);
        if (!st) st = kv_cake_budgets(pref, n, B * n, L - nf, s->cascading, b, NULL, err);
        free(pref);
        break;
    }
    }
    return st;
}

/* Ada-KV (FFY0 update_kv_gqa): heads compete for units * B entries, a share alpha of B is guaranteed to each. */
static void ada_heads(const kv_spec *s, const float *sorted, uint32_t n_unit, size_t m, int64_t B, float *scale,
                      uint32_t *won)
{
    if (s->normalize)
        for (uint32_t u = 0; u < n_unit; u++) {
            double top = 0, all = 0;
            for (size_t i = 0; i < m; i++) {
                all += sorted[u * m + i];
                if ((int64_t)i < B) top += sorted[u * m + i];
            }
            scale[u] = all > 0 ? (float)(top / all) : 0;
        }
    kv_flat_topk(sorted, n_unit, m, s->normalize ? scale : NULL, (uint64_t)B * n_unit, won);
    float keep = (float)(1 - s->alpha), floor_part = (float)(int64_t)(s->alpha * (double)B);
    for (uint32_t u = 0; u < n_unit; u++) won[u] = (uint32_t)rintf((float)won[u] * keep + floor_part);
}

kv_status kv_plan_decode_keep(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t layer, uint32_t *keep,
                              kv_error *err)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    kv_spec once = p->spec[i]; /* the last stage's budgets, not what the earlier ones left */
    int64_t *b = NULL;
    kv_status st = kv_array(&b, p->scene->n_evict, sizeof *b, err);
    once.cascading = 0;
    if (p->scene->n_cut <= (uint64_t)c->tokens + once.window) { /* the prompt was not cut: the provisional C - w */
        *keep = c->tokens > once.window ? c->tokens - once.window : 0;
    } else {
        if (!st) st = layer_budgets(p, &once, r, c, b, err);
        if (!st) *keep = b[layer] > 0 ? (uint32_t)b[layer] : 0;
    }
    free(b);
    return st;
}

static kv_status item_counts(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_ranking *r = &p->ranking[p->count_of[i]];
    uint32_t n = p->scene->n_evict, L = r->n_item, U = r->n_unit;
    size_t m = L - r->n_forced;
    int64_t *b = NULL;
    float *scale = NULL;
    kv_status st = KV_OK;
    if (s->keep_all || (c->tokens >= L && s->guard != KV_GUARD_BEYOND) ||
        (s->guard == KV_GUARD_WINDOW && L <= (uint64_t)c->tokens + r->n_forced)) {
        for (size_t k = 0; k < (size_t)n * U; k++) counts[k] = L;
        return KV_OK;
    }
    st = kv_array(&b, n, sizeof *b, err);
    if (!st) st = kv_array(&scale, U, sizeof *scale, err);
    if (!st) st = layer_budgets(p, s, r, c, b, err);
    if (st) goto out;
    if (s->select == KV_SELECT_CHUNKS && L >= s->chunk_length) {
        for (uint32_t l = 0; l < n; l++)
            for (uint32_t u = 0; u < U; u++)
                counts[(size_t)l * U + u] = kv_chunk_count(s, r->order + ((size_t)l * U + u) * L, L, c->share);
        goto out;
    }
    if (s->layers == KV_LAYERS_LAVA_CODE) lava_code(s, r, n, m, c->tokens, counts);
    if (r->first_key)
        st = kv_first_counts(p, i, c, counts, err);
    else if (s->heads == KV_HEADS_DUO)
        st = kv_duo_heads(r->pattern, (size_t)n * U, (uint64_t)c->tokens * n * U, L, s->sinks + s->recent, counts, err);
    else if (s->layers == KV_LAYERS_POOL) {
        if (r->weight) free(scale), scale = NULL, st = kv_layer_scales(r, n, &scale, err);
        if (!st) kv_flat_topk(r->sorted, (size_t)n * U, m, r->weight ? scale : NULL, (uint64_t)b[0] * n * U, counts);
    }
    if (st) goto out;
    for (uint32_t l = 0; l < n; l++) {
        const float *sorted = r->sorted + (size_t)l * U * m;
        uint32_t *to = counts + (size_t)l * U;
        bool whole = b[l] > (int64_t)m || (s->skip_layers[l / 64 % 16] >> (l % 64) & 1);
        if (!whole && (r->first_key || s->heads == KV_HEADS_DUO))
            continue; /* counted above, protected entries included */
        if (!whole && s->heads == KV_HEADS_SAFEGUARD) {
            int64_t C = s->layers == KV_LAYERS_UNIFORM ? c->tokens : b[l] + r->n_forced;
            if ((st = safeguard_heads(s, r, l, L, C < 0 ? 0 : C < L ? (uint32_t)C : L, to, err))) goto out;
            continue;
        }
        if (!whole && s->layers != KV_LAYERS_POOL && s->layers != KV_LAYERS_LAVA_CODE) {
            if (s->heads == KV_HEADS_TABLE)
                table_heads(s, r, n, l, c->tokens, p->scene->info->n_q_head, to);
            else if (s->heads == KV_HEADS_ADA && b[l] > 0)
                ada_heads(s, sorted, U, m, b[l], scale, to);
            else if (s->heads == KV_HEADS_POOL && b[l] > 0)
                kv_flat_topk(sorted, U, m, NULL, (uint64_t)b[l] * U, to);
            else
                for (uint32_t u = 0; u < U; u++) to[u] = b[l] > 0 ? (uint32_t)b[l] : 0;
        }
        for (uint32_t u = 0; u < U; u++) {
            /* less than what is protected: the newest protected tokens stay */
            int64_t total = s->layers == KV_LAYERS_PYRAMID_KVPRESS || s->layers == KV_LAYERS_SQUEEZE
                                ? r->n_forced + b[l]
                                : c->tokens;
            int64_t protect = total < r->n_forced ? total : r->n_forced;
            int64_t k = whole ? (int64_t)L : (int64_t)to[u] + (protect > 0 ? protect : 0);
            to[u] = k < (int64_t)L ? (uint32_t)k : L;
        }
    }
out:
    free(b), free(scale);
    return st;
}

kv_status kv_plan_counts(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts, kv_error *err)
{
    const kv_ranking *r = &p->ranking[p->count_of[i]];
    uint32_t n = p->scene->n_evict, L = p->scene->n_cut, page = p->spec[i].file ? 1 : p->spec[i].page;
    kv_budget_resolved items = *c;
    if (r->fixed) {
        memcpy(counts, r->fixed, (size_t)n * r->n_unit * sizeof *counts);
        return KV_OK;
    }
    if (page > 1) { /* a budget that holds everything holds the last, shorter page too */
        items.tokens = c->tokens >= L ? r->n_item : c->tokens / page;
        items.real = c->real > L ? r->n_item + 1.0 : c->real / page;
    }
    kv_status st = item_counts(p, i, &items, counts, err);
    if (!st && p->spec[i].oracle & (KV_ORACLE_HEADS | KV_ORACLE_LAYERS)) st = kv_oracle_counts(p, i, counts, err);
    for (size_t k = 0; k < (size_t)n * r->n_unit && page > 1 && !st; k++) {
        const uint32_t *order = p->ranking[p->ranking_of[i]].order + k * L;
        uint32_t tokens = 0;
        for (uint32_t left = counts[k]; left > 0; left--) { /* the first entry of each page in the order */
            uint32_t rest = L - order[tokens] / page * page;
            tokens += rest < page ? rest : page;
        }
        counts[k] = tokens;
    }
    return st;
}

void kv_plan_ambiguous(const kv_plan *p, size_t i, const uint32_t *counts, uint32_t l, uint64_t *tied, uint64_t *kept)
{
    const kv_spec *s = &p->spec[i];
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    size_t m = r->n_item - r->n_forced;
    *tied = *kept = 0;
    for (uint32_t u = 0; u < r->n_unit; u++) {
        uint32_t c = counts[(size_t)l * r->n_unit + u];
        const float *x = r->sorted + ((size_t)l * r->n_unit + u) * m;
        *kept += c;
        if (r->fixed || s->select || s->decode || s->page > 1 || c <= r->n_forced || c >= r->n_item) continue;
        uint32_t at = c - r->n_forced;
        for (uint32_t k = at; k-- > 0 && x[k] == x[at];) ++*tied;
    }
}

uint64_t kv_plan_fingerprint(const kv_plan *p, size_t i, const uint32_t *counts)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    uint64_t h = r->n_unit;
    for (size_t k = 0; k < (size_t)p->scene->n_evict * r->n_unit; k++) {
        uint64_t sum = counts[k]; /* the order of the positions does not matter */
        for (uint32_t j = 0; j < counts[k]; j++) {
            kv_rng g = {r->order[k * p->scene->n_cut + j]};
            sum += kv_rng_next(&g);
        }
        kv_rng g = {h ^ sum};
        h = kv_rng_next(&g);
    }
    return h;
}
