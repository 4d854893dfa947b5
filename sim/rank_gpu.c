/* rank_gpu.c - the rankings of one layer on a device: scores of the window, column sums and key norms, orders of all
 * units in one sort. What it does not know (other scorers, selections, value terms, pages) the CPU ranks. */
#include <math.h>
#include <stdlib.h>

#include "kernels/exact_dev.h"
#include "sim/gpu_pass.h"
#include "sim/scorer.h"

typedef struct {
    kv_gpu_lane *lane;
    kv_gpu_layer *dev;
    kv_plan *p;
    kv_layer l; /* shape */
    const bool *mine;
    kv_turned t;
    float *attention, *sum; /* of the window, where some ranking looks at it */
    float *score;           /* [all units of mine][L] */
    size_t n_unit, total;   /* of mine; entries to sort */
    kv_error *err;
} ranker;

static bool can(const kv_plan *p, const kv_ranking *r)
{
    const kv_spec *s = r->spec;
    const kv_scorer *c = kv_scorers[s->scorer];
    return !r->fixed && !s->value && !s->select && !s->layer_weight && !s->observe && s->page == 1 && p->scene->n_cut &&
           (c == &kv_scorer_knorm || c == &kv_scorer_colsum || (c == &kv_scorer_window && s->window > 0));
}

static uint32_t window_of(const ranker *k, const kv_spec *s)
{
    return s->window < k->l.L ? s->window : k->l.L;
}

/* Softmax rows of the longest window; a shorter one is its last rows. */
static int attend(ranker *k)
{
    const kv_layer *l = &k->l;
    bool looked = false;
    int code = 0;
    for (size_t r = 0; r < k->p->n_ranking; r++)
        looked |= k->mine[r] &&
                  (kv_scorers[k->p->ranking[r].spec->scorer] == &kv_scorer_window || k->p->ranking[r].want_preference);
    if (!looked) return 0;
    k->t = (kv_turned){.n_q_head = l->n_q_head,
                       .n_kv_head = l->n_kv_head,
                       .n_row = k->dev->max_window,
                       .row0 = l->L - k->dev->max_window,
                       .n_key = l->L,
                       .d = l->d,
                       .scale = l->scale,
                       .softcap = l->softcap,
                       .q_head = (size_t)k->dev->max_window * l->d,
                       .k_head = (size_t)l->scene->n_token * l->d,
                       .ld = ((size_t)l->n_q_head * k->dev->max_window + 31) / 32 * 32};
    k->attention = kv_gpu_buffer(k->lane, KV_B_P, l->L * k->t.ld * 4, &code);
    k->sum = kv_gpu_buffer(k->lane, KV_B_SUM, k->t.ld * 4, &code);
    void *scratch = kv_gpu_buffer(k->lane, KV_B_SCRATCH, kv_softmax_scratch(&k->t), &code);
    if (!code) code = kv_scores_dev(&k->t, k->dev->q_win, k->dev->k, k->attention, k->lane->stream);
    return code ? code : kv_softmax_dev(&k->t, k->attention, k->sum, NULL, scratch, k->lane->stream);
}

/* CAKE's H and V, as preference() of plan.c. */
static int preference(ranker *k, kv_ranking *r, const double *stats)
{
    size_t heads = k->l.n_q_head, rows = heads * window_of(k, r->spec);
    int code = 0;
    double *host = (double *)(void *)kv_gpu_pinned(k->lane, (rows + heads) * 8, &code), h = 0, v = 0;
    if (!code) code = kv_gpu_copy(host, stats, (rows + heads) * 8, k->lane->stream);
    if (!code) code = kv_gpu_stream_sync(k->lane->stream);
    for (size_t i = 0; i < rows && !code; i++) h += host[i];
    for (size_t i = 0; i < heads && !code; i++) v += host[rows + i];
    r->entropy[k->l.order] = h, r->variance[k->l.order] = v;
    return code;
}

/* Scores of one ranking into score [n_unit][L]; positions of the window stay 0. */
static int scores_of(ranker *k, kv_ranking *r, float *score)
{
    const kv_layer *l = &k->l;
    const kv_spec *s = r->spec;
    const kv_scorer *c = kv_scorers[s->scorer];
    uint32_t L = l->L, w = window_of(k, s), n = L - w;
    kv_grouping g = kv_grouping_of(l, s);
    int code = 0;
    float *head = kv_gpu_buffer(k->lane, KV_B_HEAD, (size_t)l->n_q_head * L * 4, &code);
    double *stats = NULL;
    if (r->want_preference) stats = kv_gpu_buffer(k->lane, KV_B_STATS, kv_window_stats(&k->t, w, n), &code);
    if (!code && (stats || c == &kv_scorer_window))
        code = kv_reduce_rows_dev(&k->t, (kv_row_reduce)s->row_reduce, s->gamma, w, n, k->attention, k->sum, head, L,
                                  1e-10f, stats, k->lane->stream);
    if (!code && stats) code = preference(k, r, stats);
    if (!code && c == &kv_scorer_knorm) {
        code = kv_norms_dev(l->n_kv_head, L, l->d, (size_t)l->scene->n_token * l->d, -1, k->dev->k, head, L,
                            k->lane->stream);
        return code ? code : kv_spread_kv_dev(l->n_kv_head, r->n_unit, L, L, head, score, k->lane->stream);
    }
    if (!code && c == &kv_scorer_colsum)
        code = kv_column_share_dev(l->n_q_head, L, L, s->per_row, k->dev->colsum, head, k->lane->stream);
    return code ? code : kv_group_heads_dev(&g, n, L, head, score, k->lane->stream);
}

/* Units of all rankings: lists and places to the device, one sort, orders and scores back. */
static kv_status sort_all(ranker *k)
{
    const kv_plan *p = k->p;
    size_t L = k->l.L, n = k->n_unit, lists = 0, u = 0, at = 0;
    int code = 0;
    for (size_t r = 0; r < p->n_ranking; r++) lists += k->mine[r];
    size_t head = (n * sizeof(kv_rank_unit) + 255) / 256 * 256, table = head + lists * L * 4;
    float *sorted = kv_gpu_buffer(k->lane, KV_B_SORTED, n * L * 4, &code);
    char *dev = kv_gpu_buffer(k->lane, KV_B_TABLE, table, &code);
    void *scratch = kv_gpu_buffer(k->lane, KV_B_SORT, kv_rank_scratch(n, k->total), &code);
    char *host = kv_gpu_pinned(k->lane, table > n * L * 8 ? table : n * L * 8, &code);
    if (code) return kv_gpu_failed(code, k->err);
    kv_rank_unit *unit = (kv_rank_unit *)(void *)host;
    kv_status st = KV_OK;
    size_t list = 0;
    for (size_t r = 0; r < p->n_ranking && !st; r++) {
        const kv_ranking *rk = &p->ranking[r];
        if (!k->mine[r]) continue;
        st = kv_plan_list(rk, (uint32_t)L, (uint32_t *)(void *)(host + head) + list * L, k->err);
        for (size_t i = 0; i < rk->n_unit; i++, u++) {
            unit[u] = (kv_rank_unit){.score = k->score + u * L,
                                     .list = (uint32_t *)(void *)(dev + head) + list * L,
                                     .order = k->dev->order + kv_gpu_order_at(p, r) + i * L,
                                     .sorted = sorted + u * L,
                                     .n = (uint32_t)L,
                                     .n_forced = rk->n_forced,
                                     .at = (uint32_t)at};
            at += L - rk->n_forced;
        }
        list++;
    }
    if (st) return st;
    code = kv_gpu_copy(dev, host, table, k->lane->stream);
    if (!code) code = kv_rank_dev(n, (kv_rank_unit *)(void *)dev, k->total, L, scratch, k->lane->stream);
    u = 0;
    for (size_t r = 0; r < p->n_ranking && !code; r++) {
        size_t m = p->ranking[r].n_unit * L;
        if (!k->mine[r]) continue;
        code = kv_gpu_copy(host + u * L * 8, k->dev->order + kv_gpu_order_at(p, r), m * 4, k->lane->stream);
        if (!code) code = kv_gpu_copy(host + u * L * 8 + m * 4, sorted + u * L, m * 4, k->lane->stream);
        u += p->ranking[r].n_unit;
    }
    if (!code) code = kv_gpu_stream_sync(k->lane->stream);
    if (code) return kv_gpu_failed(code, k->err);
    u = 0;
    for (size_t r = 0; r < p->n_ranking; r++) {
        const kv_ranking *rk = &p->ranking[r];
        size_t U = rk->n_unit, m = L - rk->n_forced;
        if (!k->mine[r]) continue;
        memcpy(rk->order + k->l.order * U * L, host + u * L * 8, U * L * 4);
        for (size_t i = 0; i < U; i++)
            memcpy(rk->sorted + (k->l.order * U + i) * m, host + u * L * 8 + (U + i) * L * 4, m * 4);
        u += U;
    }
    return KV_OK;
}

kv_status kv_gpu_rank(kv_gpu_pass *g, kv_plan *p, uint32_t layer, bool *done, kv_error *err)
{
    ranker k = {.p = p, .l = kv_layer_shape(p->scene, layer), .mine = done, .err = err};
    for (size_t r = 0; r < p->n_ranking; r++) {
        const kv_ranking *rk = &p->ranking[r];
        size_t more = (size_t)rk->n_unit * (p->scene->n_cut - rk->n_forced);
        done[r] = can(p, rk) && k.n_unit + rk->n_unit <= 65535 && k.total + more <= INT32_MAX;
        if (done[r]) k.n_unit += rk->n_unit, k.total += more;
    }
    if (!k.n_unit) return KV_OK;
    if (!(k.lane = kv_gpu_lane_take(g, err))) return KV_EIO;
    kv_status st = kv_gpu_layer_take(g, k.lane, p, layer, &k.dev, err);
    int code = st ? 0 : attend(&k);
    k.score = kv_gpu_buffer(k.lane, KV_B_SCORE, k.n_unit * p->scene->n_cut * 4, &code);
    if (!st && !code) code = kv_gpu_zero(k.score, k.n_unit * p->scene->n_cut * 4, k.lane->stream);
    size_t u = 0;
    for (size_t r = 0; r < p->n_ranking && !st && !code; r++) {
        if (!done[r]) continue;
        code = scores_of(&k, &p->ranking[r], k.score + u * p->scene->n_cut);
        u += p->ranking[r].n_unit;
    }
    if (!st && code) st = kv_gpu_failed(code, err);
    if (!st) st = sort_all(&k);
    kv_gpu_layer_give(k.dev);
    kv_gpu_lane_give(g, k.lane);
    return st;
}
