/* plan.c - the ranking pass and the counts. */
#include "sim/plan.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "sim/dmath.h"
#include "sim/gpu_pass.h"
#include "sim/mask.h"
#include "sim/memory.h"
#include "sim/oracle.h"
#include "sim/schedule.h"
#include "sim/scorer.h"
#include "sim/segments.h"
#include "sim/select.h"
#include "sim/tables.h"
#include "traces/npy.h"

/* Protected positions of a ranking: the recent ones newest first, then sinks, then named segments, without repeats; to
 * may be NULL. Returns how many. */
static uint32_t forced_positions(const kv_ranking *r, uint32_t L, uint32_t *to)
{
    const kv_spec *s = r->spec;
    uint32_t recent = s->protect_recent > s->window ? s->protect_recent : s->window, n = 0;
    if (s->select == KV_SELECT_CHUNKS && L >= s->chunk_length) return 0; /* the window competes through its chunk */
    if (recent > L) recent = L;
    uint32_t sink = s->protect_sink < L - recent ? s->protect_sink : L - recent;
    for (uint32_t i = 0; i < recent; i++) to ? to[n++] = L - 1 - i : n++;
    for (uint32_t i = sink; i-- > 0;) to ? to[n++] = i : n++;
    for (uint32_t i = L - recent; r->segment && i-- > sink;)
        if (r->segment[i]) to ? to[n++] = i : n++;
    return n;
}

/* CAKE's H = -sum a ln(a + 1e-10) and V = sum of the unbiased variance over rows, window columns left out. */
static kv_status preference(kv_layer *l, uint32_t window, double *H, double *V, kv_error *err)
{
    uint32_t w = window < l->L ? window : l->L, n = l->L - w;
    const float *p;
    double h = 0, v = 0, *mean = NULL, *var = NULL;
    kv_status st = kv_layer_probs(l, w, &p, err);
    if (!st) st = kv_array(&mean, n, sizeof *mean, err);
    if (!st) st = kv_array(&var, n, sizeof *var, err);
    for (uint32_t q = 0; q < l->n_q_head && !st; q++, p += (size_t)w * l->L) {
        for (uint32_t r = 0; r < w; r++) h += kv_entropy(n, p + (size_t)r * l->L, 1e-10f);
        kv_column_spread(w, n, p, l->L, mean, var);
        for (uint32_t i = 0; i < n; i++) var[i] = w > 1 ? var[i] / (w - 1) : 0;
        v += kv_sum_blocks(n, var);
    }
    *H = h, *V = v;
    free(mean), free(var);
    return st;
}

/* LAVa: entropy of a layer's scores, normalised over all its heads; the common divisor ln(heads * positions) is left
 * out because only shares matter. */
static double spread_entropy(const kv_ranking *r, uint32_t layer, size_t m)
{
    const float *s = r->sorted + (size_t)layer * r->n_unit * m;
    double sum = 0, e = 0;
    for (size_t i = 0; i < r->n_unit * m; i++)
        sum += s[i] > 0 ? s[i] : 0; /* an entropy needs shares: negative scores count as none */
    for (size_t i = 0; i < r->n_unit * m; i++) {
        double p = (s[i] > 0 ? s[i] : 0) / (sum + 1e-16);
        e -= p * kv_log(p + 1e-16);
    }
    return e;
}

/* Whole pages instead of tokens: a page's score is the largest in it (of an oracle's mass: the sum), a page with a
 * protected token is protected; inside a page positions ascend. to [L], sorted [n_item - n_forced]. */
static kv_status page_order(const kv_ranking *r, uint32_t L, const float *score, uint32_t *to, float *sorted,
                            kv_error *err)
{
    bool mass = kv_scorers[r->spec->scorer]->future;
    uint32_t n_item = r->n_item, page = r->spec->page, *forced = NULL, *order = NULL, n = 0, m = 0;
    float *best = NULL;
    bool *done = NULL;
    kv_status st = kv_array(&forced, L, sizeof *forced, err);
    if (!st) st = kv_array(&order, n_item, sizeof *order, err);
    if (!st) st = kv_array(&best, n_item, sizeof *best, err);
    if (!st) st = kv_array(&done, n_item, sizeof *done, err);
    if (st) goto out;
    uint32_t n_forced = forced_positions(r, L, forced);
    for (uint32_t i = 0; i < L; i++)
        if (mass) /* what a page gives is what its tokens give together */
            best[i / page] += score[i];
        else if (i % page == 0 || score[i] > best[i / page])
            best[i / page] = score[i];
    if (!kv_rank(n_item, best, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    for (uint32_t k = 0; k < n_forced + n_item && !st; k++) {
        uint32_t p = k < n_forced ? forced[k] / page : order[k - n_forced];
        if (done[p]) continue;
        done[p] = true;
        if (k >= n_forced) sorted[m++] = best[p];
        for (uint32_t i = p * page; i < L && i < (p + 1) * page; i++) to[n++] = i;
    }
out:
    free(forced), free(order), free(best), free(done);
    return st;
}

kv_status kv_plan_list(const kv_ranking *r, uint32_t L, uint32_t *list, kv_error *err)
{
    bool *is_forced = NULL;
    uint32_t n = forced_positions(r, L, list);
    kv_status st = kv_array(&is_forced, L, sizeof *is_forced, err);
    for (uint32_t i = 0; i < n && !st; i++) is_forced[list[i]] = true;
    for (uint32_t i = 0; i < L && !st; i++)
        if (!is_forced[i]) list[n++] = i;
    free(is_forced);
    return st;
}

static kv_status rank_layer(kv_ranking *r, kv_layer *l, kv_error *err)
{
    size_t L = l->L, m = r->n_item - r->n_forced;
    uint32_t *order = NULL;
    float *score = NULL;
    bool *is_forced = NULL;
    kv_status st = kv_array(&score, r->n_unit * L, sizeof *score, err);
    if (!st) st = kv_array(&order, L, sizeof *order, err);
    if (!st) st = kv_array(&is_forced, L, sizeof *is_forced, err);
    l->ahead = r->spec->observe;
    if (!st) st = kv_scorers[r->spec->scorer]->score(l, r->spec, score, err);
    if (!st) st = kv_value_weight(l, r->spec, l->L - (r->spec->window < l->L ? r->spec->window : l->L), score, err);
    if (!st && r->first_key)
        st = kv_first_keys(l, r->spec, score, r->first_key + (size_t)l->order * r->n_unit * L, err);
    l->ahead = false; /* allocations go by the past */
    if (!st && r->weight) st = kv_stream_weight(l, r->spec, &r->weight[l->order], err);
    if (!st && r->want_preference)
        st = preference(l, r->spec->window, &r->entropy[l->order], &r->variance[l->order], err);
    for (uint32_t u = 0; u < r->n_unit && !st; u++) {
        uint32_t *to = r->order + ((size_t)l->order * r->n_unit + u) * L;
        float *sorted = r->sorted + ((size_t)l->order * r->n_unit + u) * m, *s = score + u * L;
        if (r->spec->select == KV_SELECT_CHUNKS && L >= r->spec->chunk_length) { /* else kvpress ranks tokens */
            st = kv_chunk_order(l, r->spec, score, to, sorted, err);
            continue;
        }
        if (r->spec->page > 1) {
            st = page_order(r, (uint32_t)L, s, to, sorted, err);
            continue;
        }
        uint32_t n = forced_positions(r, (uint32_t)L, to);
        for (uint32_t i = 0; i < n; i++) is_forced[to[i]] = true;
        if (!kv_rank(L, s, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t i = 0; i < L && !st; i++)
            if (!is_forced[order[i]]) sorted[n - r->n_forced] = s[order[i]], to[n++] = order[i];
    }
    if (!st && r->second) st = kv_second_order(r, l, err);
    free(score), free(order), free(is_forced);
    return st;
}

typedef struct {
    kv_plan *plan;
    kv_status *st;
    kv_error *err;
} job;

/* Rankings that a device made are done; the layer is loaded for the others, unless its shape is enough. */
static kv_status rank_rest(kv_plan *p, uint32_t i, const bool *done, kv_error *err)
{
    kv_layer l = kv_layer_shape(p->scene, i);
    bool load = false;
    for (size_t r = 0; r < p->n_ranking; r++) {
        const kv_spec *s = p->ranking[r].spec;
        load |= !p->ranking[r].fixed && !done[r] &&
                (kv_scorers[s->scorer]->needs != KV_NEED_SHAPE || s->value || s->select || s->layer_weight ||
                 p->ranking[r].want_preference);
    }
    kv_status st = load ? kv_layer_load(p->scene, i, p->needs, p->max_window, &l, err) : KV_OK;
    for (size_t r = 0; r < p->n_ranking && !st; r++) {
        kv_ranking *k = &p->ranking[r];
        if (k->fixed) continue;
        if (!done[r]) st = rank_layer(k, &l, err);
        if (!st && k->want_spread) k->spread[l.order] = spread_entropy(k, l.order, k->n_item - k->n_forced);
    }
    kv_layer_free(&l);
    return st;
}

static void rank_task(void *ctx, size_t i)
{
    job *j = ctx;
    bool *done = NULL;
    kv_status st = kv_array(&done, j->plan->n_ranking, sizeof *done, &j->err[i]);
    if (!st && j->plan->scene->gpu) st = kv_gpu_rank(j->plan->scene->gpu, j->plan, (uint32_t)i, done, &j->err[i]);
    if (!st) st = rank_rest(j->plan, (uint32_t)i, done, &j->err[i]);
    if (!st && j->plan->scene->gpu) st = kv_gpu_rank_done(j->plan->scene->gpu, j->plan, (uint32_t)i, done, &j->err[i]);
    free(done);
    j->st[i] = st;
}

/* HeadKV's table as a share of the model per query head. */
static kv_status importance_table(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err)
{
    kv_npy a = {0};
    size_t n = (size_t)sc->n_evict * sc->info->n_q_head;
    kv_status st = kv_npy_read(s->importance, &a, err);
    if (!st && (a.rank != 2 || a.shape[0] != sc->n_evict || a.shape[1] != sc->info->n_q_head || (a.kind != 'f')))
        st = kv_fail(err, KV_EFORMAT, "importance '%s': want floats [%u layers, %u query heads]", s->importance,
                     sc->n_evict, sc->info->n_q_head);
    if (!st) st = kv_array(&r->importance, n, sizeof *r->importance, err);
    double sum = 0;
    for (size_t i = 0; i < n && !st; i++) {
        r->importance[i] = a.size == 8   ? ((double *)a.data)[i]
                           : a.size == 4 ? (double)((float *)a.data)[i]
                                         : (double)kv_f16_to_f32(((uint16_t *)a.data)[i]);
        if (!(r->importance[i] >= 0) || !isfinite(r->importance[i]))
            st = kv_fail(err, KV_EFORMAT, "importance '%s': entry %zu is not a number >= 0", s->importance, i);
        sum += r->importance[i];
    }
    if (!st && !(sum > 0)) st = kv_fail(err, KV_EFORMAT, "importance '%s' is zero throughout", s->importance);
    for (size_t i = 0; i < n && !st; i++) r->importance[i] /= sum;
    kv_npy_free(&a);
    return st;
}

/* DuoAttention's table of the layers that evict. */
static kv_status pattern_table(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err)
{
    kv_npy a = {0};
    uint32_t U = sc->info->n_kv_head;
    if (!s->pattern)
        return kv_fail(err, KV_EMISUSE, "policy '%s' needs pattern=FILE.npy, floats [layers, KV heads]", s->row->name);
    kv_status st = kv_table_read(sc->info, "pattern", s->pattern, U, 0, &a, err);
    if (!st) st = kv_array(&r->pattern, (size_t)sc->n_evict * U, sizeof *r->pattern, err);
    for (uint32_t l = 0; l < sc->n_evict && !st; l++)
        memcpy(r->pattern + (size_t)l * U, kv_table_layer(sc->info, &a, sc->evict[l]), U * sizeof(float));
    kv_npy_free(&a);
    return st;
}

static kv_status squeeze_table(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err)
{
    kv_npy a = {0};
    float *cosine = NULL;
    if (!s->cosine) return kv_fail(err, KV_EMISUSE, "policy '%s' needs cosine=FILE.npy, floats [layers]", s->row->name);
    kv_status st = kv_table_read(sc->info, "cosine", s->cosine, 0, 0, &a, err);
    if (!st) st = kv_array(&cosine, sc->n_evict, sizeof *cosine, err);
    if (!st) st = kv_array(&r->similar, sc->n_evict, sizeof *r->similar, err);
    for (uint32_t l = 0; l < sc->n_evict && !st; l++) cosine[l] = *kv_table_layer(sc->info, &a, sc->evict[l]);
    if (!st) st = kv_squeeze_classes(cosine, sc->n_evict, r->similar, err);
    kv_npy_free(&a), free(cosine);
    return st;
}

/* Protected items: tokens, or pages that hold one. */
static kv_status count_forced(kv_ranking *r, uint32_t L, kv_error *err)
{
    uint32_t *forced = NULL;
    bool *page = NULL;
    kv_status st = kv_array(&forced, L, sizeof *forced, err);
    if (!st) st = kv_array(&page, r->n_item, sizeof *page, err);
    uint32_t n = st ? 0 : forced_positions(r, L, forced);
    for (uint32_t k = 0; k < n; k++)
        if (!page[forced[k] / r->spec->page]) page[forced[k] / r->spec->page] = true, r->n_forced++;
    free(forced), free(page);
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
    r->n_item = (sc->n_cut + s->page - 1) / s->page;
    if (!kv_mul((size_t)sc->n_evict * r->n_unit, sc->n_cut, &n)) return kv_fail(err, KV_ENOMEM, "ranking is too large");
    kv_status st = kv_array(&r->order, n, sizeof *r->order, err);
    if (!st && s->protect_segment) {
        st = kv_array(&r->segment, sc->n_cut, sizeof *r->segment, err);
        if (!st) st = kv_segment_tokens(sc->trace, s->protect_segment, sc->n_cut, r->segment, err);
    }
    if (!st) st = count_forced(r, sc->n_cut, err);
    if (!st) st = kv_array(&r->sorted, n, sizeof *r->sorted, err);
    if (!st) st = kv_array(&r->entropy, sc->n_evict, sizeof *r->entropy, err);
    if (!st) st = kv_array(&r->variance, sc->n_evict, sizeof *r->variance, err);
    if (!st) st = kv_array(&r->spread, sc->n_evict, sizeof *r->spread, err);
    if (!st && s->heads == KV_HEADS_TABLE) st = importance_table(sc, s, r, err);
    if (!st && s->heads == KV_HEADS_DUO) st = pattern_table(sc, s, r, err);
    if (!st && s->layers == KV_LAYERS_SQUEEZE) st = squeeze_table(sc, s, r, err);
    if (!st && s->layer_weight) st = kv_array(&r->weight, sc->n_evict, sizeof *r->weight, err);
    if (!st && (s->select == KV_SELECT_MASS || s->select == KV_SELECT_SPANS))
        st = kv_array(&r->first_key, n, sizeof *r->first_key, err);
    if (!st && s->select == KV_SELECT_TWO_STAGE) st = kv_array(&r->second, n, sizeof *r->second, err);
    return st;
}

/* The ranking of a spec: a new one unless another spec ranks alike. */
static kv_status ranking_for(kv_plan *p, const kv_spec *s, size_t *at, kv_error *err)
{
    size_t r = 0;
    while (r < p->n_ranking && strcmp(p->ranking[r].spec->ranking_key, s->ranking_key)) r++;
    *at = r;
    if (r < p->n_ranking) return KV_OK;
    p->n_ranking++;
    return ranking_init(p->scene, s, &p->ranking[r], err);
}

/* The rankings policy i needs: its own, which gives the counts, and those of the oracle that takes over (oracle.h). */
static kv_status rankings(kv_plan *p, size_t i, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    kv_spec *future = &p->derived[2 * i], *ahead = future + 1;
    kv_status st = ranking_for(p, s, &p->count_of[i], err);
    p->ranking_of[i] = p->count_of[i];
    if (!st && s->oracle & (KV_ORACLE_RANK | KV_ORACLE_HEADS | KV_ORACLE_LAYERS)) {
        st = kv_oracle_future(s, p->scene->n_cut, future, err);
        if (!st) st = ranking_for(p, future, &p->future_of[i], err);
        if (s->oracle & KV_ORACLE_RANK) p->ranking_of[i] = p->future_of[i];
    }
    if (!st && s->oracle & KV_ORACLE_WINDOW) {
        *ahead = *s; /* its strings stay s's */
        ahead->observe = 1, ahead->oracle = 0, ahead->canonical = ahead->ranking_key = NULL;
        st = kv_spec_seal(ahead, err);
        if (!st) st = ranking_for(p, ahead, &p->ranking_of[i], err);
    }
    return st;
}

kv_status kv_plan_build(const kv_scene *scene, const kv_spec *spec, size_t n_spec, uint32_t threads, kv_plan *p,
                        kv_error *err)
{
    kv_status st;
    job j = {.plan = p};
    bool work = false;
    *p = (kv_plan){.scene = scene, .n_spec = n_spec, .spec = spec};
    if (!kv_blas_room(1)) return kv_fail(err, KV_ENOMEM, "out of memory: OpenBLAS needs 128 MiB of address space");
    st = kv_array(&p->ranking_of, n_spec, sizeof *p->ranking_of, err);
    if (!st) st = kv_array(&p->ranking, 3 * n_spec, sizeof *p->ranking, err);
    if (!st) st = kv_array(&p->count_of, n_spec, sizeof *p->count_of, err);
    if (!st) st = kv_array(&p->future_of, n_spec, sizeof *p->future_of, err);
    if (!st) st = kv_array(&p->derived, 2 * n_spec, sizeof *p->derived, err);
    for (size_t i = 0; i < n_spec && !st; i++) {
        st = rankings(p, i, err);
        size_t r = p->count_of[i];
        if (spec[i].file || st) continue;
        work = true;
        p->needs |= kv_spec_needs(&spec[i]);
        p->ranking[r].want_preference |= spec[i].layers == KV_LAYERS_CAKE;
        p->ranking[r].want_spread |= spec[i].layers == KV_LAYERS_LAVA || spec[i].layers == KV_LAYERS_LAVA_CODE;
        if (spec[i].decode && !p->max_window) p->max_window = 1; /* the prompt's last row may decide */
        if (spec[i].window > p->max_window) p->max_window = spec[i].window;
    }
    if (!st) st = kv_array(&j.st, scene->n_evict, sizeof *j.st, err);
    if (!st) st = kv_array(&j.err, scene->n_evict, sizeof *j.err, err);
    if (!st && scene->n_asked) { /* said now, not after the ranking pass */
        uint32_t any = threads;
        st = kv_memory_fit(scene, "measuring", kv_memory_held(p, scene->n_asked, scene->wanted),
                           kv_memory_measure(p, scene->n_asked, scene->wanted), &any, err);
    }
    if (!st) st = kv_memory_fit(scene, "ranking", kv_memory_held(p, 0, 0), kv_memory_rank(p), &threads, err);
    if (!st && work && scene->gpu) st = kv_gpu_load(scene->gpu, p, threads, err);
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
        free(k->order), free(k->sorted), free(k->fixed), free(k->at), free(k->seen), free(k->entropy),
            free(k->variance), free(k->spread), free(k->importance), free(k->segment);
        free(k->pattern), free(k->similar), free(k->weight), free(k->first_key), free(k->second);
    }
    for (size_t i = 0; i < p->n_spec && p->derived; i++) {
        kv_spec_free(&p->derived[2 * i]);
        free(p->derived[2 * i + 1].canonical), free(p->derived[2 * i + 1].ranking_key);
    }
    free(p->ranking), free(p->ranking_of), free(p->count_of), free(p->future_of), free(p->derived);
    *p = (kv_plan){0};
}

uint64_t kv_plan_slots(const kv_plan *p, size_t i, const uint32_t *counts)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    uint64_t sum = 0;
    for (size_t k = 0; k < (size_t)p->scene->n_evict * r->n_unit; k++) sum += counts[k];
    return r->granularity == KV_GRAN_LAYER ? sum * p->scene->info->n_kv_head : sum;
}
