/* plan.c - the ranking pass and the counts. */
#include "sim/plan.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "sim/dmath.h"
#include "sim/mask.h"
#include "sim/scorer.h"

/* Protected positions of a ranking, newest first, without repeats; returns how many. */
static uint32_t forced_positions(const kv_spec *s, uint32_t L, uint32_t *to)
{
    uint32_t recent = s->protect_recent > s->window ? s->protect_recent : s->window, n = 0;
    if (recent > L) recent = L;
    uint32_t sink = s->protect_sink < L - recent ? s->protect_sink : L - recent;
    for (uint32_t i = 0; i < recent; i++) to ? to[n++] = L - 1 - i : n++;
    for (uint32_t i = sink; i-- > 0;) to ? to[n++] = i : n++;
    return n;
}

/* CAKE's H = -sum a ln(a + 1e-10) and V = sum of the unbiased variance over rows, window columns left out. */
static kv_status preference(kv_layer *l, uint32_t window, double *H, double *V, kv_error *err)
{
    uint32_t w = window < l->L ? window : l->L, n = l->L - w;
    const float *p;
    double h = 0, v = 0;
    kv_status st = kv_layer_probs(l, w, &p, err);
    if (st) return st;
    for (uint32_t q = 0; q < l->n_q_head; q++, p += (size_t)w * l->L)
        for (uint32_t i = 0; i < n; i++) {
            double sum = 0, var = 0;
            for (uint32_t r = 0; r < w; r++) {
                double a = p[(size_t)r * l->L + i];
                sum += a;
                h -= a * kv_log(a + 1e-10);
            }
            for (uint32_t r = 0; r < w; r++) {
                double d = p[(size_t)r * l->L + i] - sum / w;
                var += d * d;
            }
            v += w > 1 ? var / (w - 1) : 0;
        }
    *H = h, *V = v;
    return KV_OK;
}

static kv_status rank_layer(const kv_plan *p, kv_ranking *r, kv_layer *l, kv_error *err)
{
    size_t L = l->L, m = L - r->n_forced;
    uint32_t *order = NULL;
    float *score = NULL;
    bool *is_forced = NULL;
    kv_status st = kv_array(&score, r->n_unit * L, sizeof *score, err);
    if (!st) st = kv_array(&order, L, sizeof *order, err);
    if (!st) st = kv_array(&is_forced, L, sizeof *is_forced, err);
    if (!st) st = kv_scorers[r->spec->scorer]->score(l, r->spec, score, err);
    if (!st && r->want_preference)
        st = preference(l, r->spec->window, &r->entropy[l->order], &r->variance[l->order], err);
    for (uint32_t u = 0; u < r->n_unit && !st; u++) {
        uint32_t *to = r->order + ((size_t)l->order * r->n_unit + u) * L;
        float *sorted = r->sorted + ((size_t)l->order * r->n_unit + u) * m, *s = score + u * L;
        uint32_t n = forced_positions(r->spec, (uint32_t)L, to);
        for (uint32_t i = 0; i < n; i++) is_forced[to[i]] = true;
        if (!kv_rank(L, s, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t i = 0; i < L && !st; i++)
            if (!is_forced[order[i]]) sorted[n - r->n_forced] = s[order[i]], to[n++] = order[i];
    }
    (void)p;
    free(score), free(order), free(is_forced);
    return st;
}

typedef struct {
    kv_plan *plan;
    kv_status *st;
    kv_error *err;
} job;

static void rank_task(void *ctx, size_t i)
{
    job *j = ctx;
    kv_plan *p = j->plan;
    kv_layer l;
    j->st[i] = kv_layer_load(p->scene, (uint32_t)i, p->needs, p->max_window, &l, &j->err[i]);
    if (j->st[i]) return;
    for (size_t r = 0; r < p->n_ranking && !j->st[i]; r++)
        if (!p->ranking[r].fixed) j->st[i] = rank_layer(p, &p->ranking[r], &l, &j->err[i]);
    kv_layer_free(&l);
}

static kv_status ranking_init(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err)
{
    size_t n;
    *r = (kv_ranking){.spec = s, .granularity = s->granularity};
    if (s->file) return kv_mask_ranking(sc, s, r, err);
    r->n_unit = s->granularity == KV_GRAN_QUERY_HEAD ? sc->info->n_q_head
                : s->granularity == KV_GRAN_KV_HEAD  ? sc->info->n_kv_head
                                                     : 1;
    r->n_forced = forced_positions(s, sc->n_cut, NULL);
    if (!kv_mul((size_t)sc->n_evict * r->n_unit, sc->n_cut, &n)) return kv_fail(err, KV_ENOMEM, "ranking is too large");
    kv_status st = kv_array(&r->order, n, sizeof *r->order, err);
    if (!st) st = kv_array(&r->sorted, n, sizeof *r->sorted, err);
    if (!st) st = kv_array(&r->entropy, sc->n_evict, sizeof *r->entropy, err);
    if (!st) st = kv_array(&r->variance, sc->n_evict, sizeof *r->variance, err);
    return st;
}

kv_status kv_plan_build(const kv_scene *scene, const kv_spec *spec, size_t n_spec, uint32_t threads, kv_plan *p,
                        kv_error *err)
{
    kv_status st;
    job j = {.plan = p};
    bool work = false;
    *p = (kv_plan){.scene = scene, .n_spec = n_spec, .spec = spec};
    st = kv_array(&p->ranking_of, n_spec, sizeof *p->ranking_of, err);
    if (!st) st = kv_array(&p->ranking, n_spec, sizeof *p->ranking, err);
    for (size_t i = 0; i < n_spec && !st; i++) {
        size_t r = 0;
        while (r < p->n_ranking && strcmp(p->ranking[r].spec->ranking_key, spec[i].ranking_key)) r++;
        p->ranking_of[i] = r;
        if (r == p->n_ranking) {
            p->n_ranking++;
            st = ranking_init(scene, &spec[i], &p->ranking[r], err);
        }
        if (spec[i].file) continue;
        work = true;
        p->needs |= kv_scorers[spec[i].scorer]->needs;
        if (spec[i].layers == KV_LAYERS_CAKE) p->needs |= KV_NEED_WINDOW, p->ranking[r].want_preference = true;
        if (spec[i].window > p->max_window) p->max_window = spec[i].window;
    }
    if (!st) st = kv_array(&j.st, scene->n_evict, sizeof *j.st, err);
    if (!st) st = kv_array(&j.err, scene->n_evict, sizeof *j.err, err);
    if (!st && work) {
        kv_parallel(scene->n_evict, threads, rank_task, &j);
        for (uint32_t l = 0; l < scene->n_evict && !st; l++)
            if ((st = j.st[l]) && err) *err = j.err[l];
    }
    free(j.st), free(j.err);
    if (st) kv_plan_free(p);
    return st;
}

void kv_plan_free(kv_plan *p)
{
    for (size_t r = 0; r < p->n_ranking; r++) {
        kv_ranking *k = &p->ranking[r];
        free(k->order), free(k->sorted), free(k->fixed), free(k->entropy), free(k->variance);
    }
    free(p->ranking), free(p->ranking_of);
    *p = (kv_plan){0};
}

/* Window-free budgets of the layers; -1 = the layer keeps everything. */
static kv_status layer_budgets(const kv_plan *p, const kv_spec *s, const kv_ranking *r, const kv_budget_resolved *c,
                               int64_t *b, kv_error *err)
{
    uint32_t n = p->scene->n_evict;
    /* a budget beyond L matters to Ada-KV's guard alone, which looks at each layer's own share */
    int64_t L = p->scene->n_cut, nf = r->n_forced, C = s->guard == KV_GUARD_BEYOND ? (int64_t)c->real : c->tokens;
    int64_t B = C > nf ? C - nf : 0;
    kv_status st = KV_OK;
    for (uint32_t l = 0; l < n; l++) b[l] = B;
    switch ((kv_layer_alloc)s->layers) {
    case KV_LAYERS_UNIFORM:
    case KV_LAYERS_POOL: break;
    case KV_LAYERS_PYRAMID_KVF:
        if (L >= 2 * B) kv_pyramid(B, s->beta, L - nf, n, b);
        break;
    case KV_LAYERS_PYRAMID_FFY0: kv_pyramid(B, s->beta, L - nf, n, b); break;
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
        for (uint32_t l = 0; l < n && !st; l++)
            pref[l] = r->entropy[l] > 0 && r->variance[l] > 0
                          ? kv_pow(r->entropy[l], 1 / s->tau1) * kv_pow(r->variance[l], 1 / s->tau2)
                          : 0;
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

kv_status kv_plan_counts(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    uint32_t n = p->scene->n_evict, L = p->scene->n_cut, U = r->n_unit;
    size_t m = L - r->n_forced;
    int64_t *b = NULL;
    float *scale = NULL;
    kv_status st = KV_OK;
    if (r->fixed) {
        memcpy(counts, r->fixed, (size_t)n * U * sizeof *counts);
        return KV_OK;
    }
    if (s->keep_all || (c->tokens >= L && s->guard != KV_GUARD_BEYOND) || (s->guard == KV_GUARD_WINDOW && L <= (uint64_t)c->tokens + s->window)) {
        for (size_t k = 0; k < (size_t)n * U; k++) counts[k] = L;
        return KV_OK;
    }
    st = kv_array(&b, n, sizeof *b, err);
    if (!st) st = kv_array(&scale, U, sizeof *scale, err);
    if (!st) st = layer_budgets(p, s, r, c, b, err);
    if (st) goto out;
    if (s->layers == KV_LAYERS_POOL) kv_flat_topk(r->sorted, (size_t)n * U, m, NULL, (uint64_t)b[0] * n * U, counts);
    for (uint32_t l = 0; l < n; l++) {
        const float *sorted = r->sorted + (size_t)l * U * m;
        uint32_t *to = counts + (size_t)l * U;
        bool whole = b[l] > (int64_t)m || (s->skip_layers[l / 64 % 16] >> (l % 64) & 1);
        if (!whole && s->layers != KV_LAYERS_POOL) {
            if (s->heads == KV_HEADS_ADA && b[l] > 0) ada_heads(s, sorted, U, m, b[l], scale, to);
            else if (s->heads == KV_HEADS_POOL && b[l] > 0) kv_flat_topk(sorted, U, m, NULL, (uint64_t)b[l] * U, to);
            else
                for (uint32_t u = 0; u < U; u++) to[u] = b[l] > 0 ? (uint32_t)b[l] : 0;
        }
        for (uint32_t u = 0; u < U; u++) {
            /* less than what is protected: the newest protected tokens stay */
            int64_t total = s->layers == KV_LAYERS_PYRAMID_KVPRESS ? r->n_forced + b[l] : c->tokens;
            int64_t protect = total < r->n_forced ? total : r->n_forced;
            int64_t k = whole ? (int64_t)L : (int64_t)to[u] + (protect > 0 ? protect : 0);
            to[u] = k < (int64_t)L ? (uint32_t)k : L;
        }
    }
out:
    free(b), free(scale);
    return st;
}

uint64_t kv_plan_slots(const kv_plan *p, size_t i, const uint32_t *counts)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    uint64_t sum = 0;
    for (size_t k = 0; k < (size_t)p->scene->n_evict * r->n_unit; k++) sum += counts[k];
    return r->granularity == KV_GRAN_LAYER ? sum * p->scene->info->n_kv_head : sum;
}
