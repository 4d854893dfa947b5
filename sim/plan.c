/* plan.c - the ranking pass and the counts. */
#include "sim/plan.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "sim/dmath.h"
#include "sim/mask.h"
#include "sim/schedule.h"
#include "sim/scorer.h"
#include "sim/select.h"
#include "traces/npy.h"

/* Protected positions of a ranking, newest first, without repeats; returns how many. */
static uint32_t forced_positions(const kv_spec *s, uint32_t L, uint32_t *to)
{
    uint32_t recent = s->protect_recent > s->window ? s->protect_recent : s->window, n = 0;
    if (s->select == KV_SELECT_CHUNKS) return 0; /* the window competes through its chunk */
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

/* LAVa: entropy of a layer's scores, normalised over all its heads; the common divisor ln(heads * positions) is left out because only
 * shares matter. */
static double spread_entropy(const kv_ranking *r, uint32_t layer, size_t m)
{
    const float *s = r->sorted + (size_t)layer * r->n_unit * m;
    double sum = 0, e = 0;
    for (size_t i = 0; i < r->n_unit * m; i++) sum += s[i];
    for (size_t i = 0; i < r->n_unit * m; i++) {
        double p = s[i] / (sum + 1e-16);
        e -= p * kv_log(p + 1e-16);
    }
    return e;
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
    if (!st) st = kv_value_weight(l, r->spec, l->L - (r->spec->window < l->L ? r->spec->window : l->L), score, err);
    if (!st && r->want_preference)
        st = preference(l, r->spec->window, &r->entropy[l->order], &r->variance[l->order], err);
    for (uint32_t u = 0; u < r->n_unit && !st; u++) {
        uint32_t *to = r->order + ((size_t)l->order * r->n_unit + u) * L;
        float *sorted = r->sorted + ((size_t)l->order * r->n_unit + u) * m, *s = score + u * L;
        if (r->spec->select == KV_SELECT_CHUNKS) {
            st = kv_chunk_order(l, r->spec, score, to, sorted, err);
            continue;
        }
        uint32_t n = forced_positions(r->spec, (uint32_t)L, to);
        for (uint32_t i = 0; i < n; i++) is_forced[to[i]] = true;
        if (!kv_rank(L, s, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t i = 0; i < L && !st; i++)
            if (!is_forced[order[i]]) sorted[n - r->n_forced] = s[order[i]], to[n++] = order[i];
    }
    (void)p;
    if (!st && r->want_preference) r->spread[l->order] = spread_entropy(r, l->order, m);
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

/* HeadKV's table as a share of the model per query head. */
static kv_status importance_table(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err)
{
    kv_npy a = {0};
    size_t n = (size_t)sc->n_evict * sc->info->n_q_head;
    kv_status st = kv_npy_read(s->importance, &a, err);
    if (!st && (a.rank != 2 || a.shape[0] != sc->n_evict || a.shape[1] != sc->info->n_q_head || (a.kind != 'f')))
        st = kv_fail(err, KV_EFORMAT, "importance '%s': want floats [%u layers, %u query heads]", s->importance, sc->n_evict, sc->info->n_q_head);
    if (!st) st = kv_array(&r->importance, n, sizeof *r->importance, err);
    double sum = 0;
    for (size_t i = 0; i < n && !st; i++) {
        r->importance[i] = a.size == 8 ? ((double *)a.data)[i] : a.size == 4 ? (double)((float *)a.data)[i] : (double)kv_f16_to_f32(((uint16_t *)a.data)[i]);
        if (!(r->importance[i] >= 0) || !isfinite(r->importance[i])) st = kv_fail(err, KV_EFORMAT, "importance '%s': entry %zu is not a number >= 0", s->importance, i);
        sum += r->importance[i];
    }
    if (!st && !(sum > 0)) st = kv_fail(err, KV_EFORMAT, "importance '%s' is zero throughout", s->importance);
    for (size_t i = 0; i < n && !st; i++) r->importance[i] /= sum;
    kv_npy_free(&a);
    return st;
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
    if (!st) st = kv_array(&r->spread, sc->n_evict, sizeof *r->spread, err);
    if (!st && s->heads == KV_HEADS_TABLE) st = importance_table(sc, s, r, err);
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
        if (spec[i].layers == KV_LAYERS_CAKE) p->needs |= KV_NEED_WINDOW;
        if (spec[i].layers == KV_LAYERS_CAKE || spec[i].layers >= KV_LAYERS_LAVA) p->ranking[r].want_preference = true;
        if (spec[i].value == KV_VALUE_WO_L1 || spec[i].select == KV_SELECT_TWO_STAGE) p->needs |= KV_NEED_WO;
        if (spec[i].decode) p->needs |= KV_NEED_FUTURE;
        if (kv_decode_rules[spec[i].decode].cuts_prompt) p->needs |= KV_NEED_WINDOW;
        if (kv_decode_rules[spec[i].decode].accumulates) p->needs |= KV_NEED_COLSUM;
        if (kv_decode_rules[spec[i].decode].cuts_prompt && !p->max_window) p->max_window = 1;
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
        free(k->order), free(k->sorted), free(k->fixed), free(k->entropy), free(k->variance), free(k->spread), free(k->importance);
    }
    free(p->ranking), free(p->ranking_of);
    *p = (kv_plan){0};
}

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

/* LAVa's repository: after each layer the earlier ones are cut again, heads by flat top-k over all their scores, with the floor
 * frozen at int(alpha * C) of the whole nominal C (policies.md section 6, 4). counts are window-free, L - window = whole. */
static void lava_code(const kv_spec *s, const kv_ranking *r, uint32_t n, size_t m, uint32_t C, uint32_t *counts)
{
    uint32_t U = r->n_unit, won[1024];
    int64_t total = ((int64_t)C - s->window) * n;
    float keep = (float)(1 - s->alpha), floor_part = (float)(int64_t)(s->alpha * C);
    for (uint32_t l = 0; l < n; l++) {
        const float *sorted = r->sorted + (size_t)l * U * m;
        uint32_t *len = counts + (size_t)l * U;
        int64_t before = INT64_MAX;
        double sum = 0;
        for (uint32_t k = 0; k < l; k++) sum += r->spread[k];
        for (uint32_t u = 0; u < U; u++) len[u] = (uint32_t)m;
        for (uint32_t stage = l; stage < n; stage++) {
            sum += r->spread[stage];
            int64_t b = total > 0 ? (int64_t)(sum > 0 ? r->spread[l] / sum * (double)total : (double)total / (stage + 1)) : 0;
            if (b > (int64_t)m || b > before) continue;
            kv_flat_topk(sorted, U, m, NULL, (uint64_t)b * U, won);
            for (uint32_t u = 0; u < U; u++) {
                uint32_t cap = (uint32_t)rintf((float)won[u] * keep + floor_part);
                if (cap < len[u]) len[u] = cap;
            }
            before = b;
        }
    }
}

/* HeadKV: B // beta of every budget goes into a pool shared by importance, the rest is equal (policies.md section 7). */
static void table_heads(const kv_spec *s, const kv_ranking *r, uint32_t n, uint32_t layer, uint32_t C, uint32_t n_q_head, uint32_t *won)
{
    double pool = floor(C / s->beta), least = C - pool;
    uint32_t g = n_q_head / r->n_unit;
    for (uint32_t u = 0; u < r->n_unit; u++) {
        double sum = 0;
        for (uint32_t q = u * g; q < (u + 1) * g; q++) sum += rint(r->importance[(size_t)layer * n_q_head + q] * pool * n * n_q_head + least);
        won[u] = (uint32_t)rint(sum / g);
    }
}

/* kvpress AdaKV: the first int(C alpha) entries of every unit are immune, the rest is one flat top-k in which protected entries
 * stand above all; counts include the protected ones. */
static kv_status safeguard_heads(const kv_spec *s, const kv_ranking *r, uint32_t layer, uint32_t L, uint32_t C, uint32_t *won, kv_error *err)
{
    uint32_t safe = (uint32_t)(C * s->alpha), U = r->n_unit;
    size_t m = L - r->n_forced, rest = L - safe;
    float *x = NULL;
    kv_status st = kv_array(&x, U * rest, sizeof *x, err);
    if (st) return st;
    for (uint32_t u = 0; u < U; u++)
        for (size_t k = safe; k < L; k++)
            x[u * rest + k - safe] = k < r->n_forced ? INFINITY : r->sorted[((size_t)layer * U + u) * m + k - r->n_forced];
    kv_flat_topk(x, U, rest, NULL, (uint64_t)(C - safe) * U, won);
    for (uint32_t u = 0; u < U; u++) won[u] += safe;
    free(x);
    return KV_OK;
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
    case KV_LAYERS_LAVA_CODE: /* counts of its own: lava_code */
    case KV_LAYERS_POOL: break;
    case KV_LAYERS_LAVA: st = largest_remainder(r->spread, n, B * n, b, err); break;
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

kv_status kv_plan_decode_keep(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t layer, uint32_t *keep, kv_error *err)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    kv_spec once = p->spec[i]; /* the last stage's budgets, not what the earlier ones left */
    int64_t *b = NULL;
    kv_status st = kv_array(&b, p->scene->n_evict, sizeof *b, err);
    once.cascading = 0;
    bool uncut = p->scene->n_cut <= (uint64_t)c->tokens + once.window;
    if (!st && uncut) once.layers = KV_LAYERS_UNIFORM;
    if (!st) st = layer_budgets(p, &once, r, c, b, err);
    if (!st) *keep = b[layer] > 0 ? (uint32_t)b[layer] : 0;
    free(b);
    return st;
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
    if (s->select == KV_SELECT_CHUNKS && L >= s->chunk_length) {
        for (uint32_t l = 0; l < n; l++)
            for (uint32_t u = 0; u < U; u++) counts[(size_t)l * U + u] = kv_chunk_count(s, r->order + ((size_t)l * U + u) * L, L, c->share);
        goto out;
    }
    if (s->layers == KV_LAYERS_LAVA_CODE) lava_code(s, r, n, m, c->tokens, counts);
    if (s->layers == KV_LAYERS_POOL) kv_flat_topk(r->sorted, (size_t)n * U, m, NULL, (uint64_t)b[0] * n * U, counts);
    for (uint32_t l = 0; l < n; l++) {
        const float *sorted = r->sorted + (size_t)l * U * m;
        uint32_t *to = counts + (size_t)l * U;
        bool whole = b[l] > (int64_t)m || (s->skip_layers[l / 64 % 16] >> (l % 64) & 1);
        if (!whole && s->heads == KV_HEADS_SAFEGUARD) {
            if ((st = safeguard_heads(s, r, l, L, c->tokens, to, err))) goto out;
            continue;
        }
        if (!whole && s->layers != KV_LAYERS_POOL && s->layers != KV_LAYERS_LAVA_CODE) {
            if (s->heads == KV_HEADS_TABLE) table_heads(s, r, n, l, c->tokens, p->scene->info->n_q_head, to);
            else if (s->heads == KV_HEADS_ADA && b[l] > 0) ada_heads(s, sorted, U, m, b[l], scale, to);
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
