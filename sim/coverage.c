/* coverage.c - evidence and breadth of kept sets. */
#include "sim/coverage.h"

#include <math.h>
#include <stdlib.h>

#include "sim/segments.h"

kv_status kv_evidence_open(const kv_scene *sc, kv_evidence *out, kv_error *err)
{
    const kv_trace_info *in = sc->info;
    uint32_t *offset = NULL, n = sc->n_cut;
    bool *is = NULL;
    *out = (kv_evidence){0};
    if (!in->n_evidence || !kv_trace_has(sc->trace, KV_S_OFFSETS, 0, 0, 0, n + 1)) return KV_OK;
    kv_status st = kv_array(&offset, n + (size_t)1, sizeof *offset, err);
    if (!st) st = kv_array(&is, n, sizeof *is, err);
    if (!st) st = kv_array(&out->first, in->n_evidence, sizeof *out->first, err);
    if (!st) st = kv_array(&out->past, in->n_evidence, sizeof *out->past, err);
    if (!st) st = kv_array(&out->token, n, sizeof *out->token, err);
    if (!st) st = kv_trace_read_u32(sc->trace, KV_S_OFFSETS, 0, n + 1, offset, err);
    for (uint32_t k = 0; k < in->n_evidence && !st; k++) {
        uint32_t a, b;
        kv_span_tokens(offset, n, in->evidence[k].start, in->evidence[k].end, &a, &b);
        if (a == b) continue; /* behind the cut: no policy can lose it */
        out->first[out->n_span] = a, out->past[out->n_span++] = b;
        for (uint32_t i = a; i < b; i++) is[i] = true;
    }
    for (uint32_t i = 0; i < n && !st; i++)
        if (is[i]) out->token[out->n_token++] = i;
    free(offset), free(is);
    if (st) kv_evidence_close(out);
    return st;
}

void kv_evidence_close(kv_evidence *e)
{
    free(e->first), free(e->past), free(e->token);
    *e = (kv_evidence){0};
}

kv_status kv_coverage_open(const kv_plan *p, size_t n_point, kv_coverage *out, kv_error *err)
{
    const kv_scene *sc = p->scene;
    size_t n_layer = 0, n_head = 0;
    *out = (kv_coverage){.plan = p, .n_point = n_point};
    pthread_mutex_init(&out->lock, NULL);
    kv_status st = kv_evidence_open(sc, &out->evidence, err);
    if (!st && (!kv_mul(n_point, sc->n_evict, &n_layer) || !kv_mul(n_layer, sc->info->n_q_head, &n_head)))
        st = kv_fail(err, KV_ENOMEM, "too many points");
    if (!out->evidence.n_token) n_head = 0;
    if (!st) st = kv_array(&out->kept, n_head, sizeof *out->kept, err);
    if (!st) st = kv_array(&out->half, n_head, sizeof *out->half, err);
    if (!st) st = kv_array(&out->layer, n_layer, sizeof *out->layer, err);
    if (!st) st = kv_array(&out->model, n_point, sizeof *out->model, err);
    for (size_t i = 0; i < n_point && !st; i++) st = kv_array(&out->model[i].until, sc->n_cut, sizeof(uint32_t), err);
    if (st) kv_coverage_close(out);
    return st;
}

void kv_coverage_close(kv_coverage *c)
{
    for (size_t i = 0; i < c->n_point && c->model; i++) free(c->model[i].until), free(c->model[i].seen);
    free(c->kept), free(c->half), free(c->layer), free(c->model);
    kv_evidence_close(&c->evidence);
    if (c->plan) pthread_mutex_destroy(&c->lock);
    *c = (kv_coverage){0};
}

static int descending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x < y) - (x > y);
}

/* One layer being counted. */
typedef struct {
    const kv_scene *sc;
    const kv_evidence *ev;
    const kv_schedule *sch;
    uint32_t T;      /* rows that are told apart: 1 when the set does not change */
    uint32_t *until; /* [n_unit][n_cut] rows that see the position; NULL when it may come back */
} job;

/* Number of rows that see at least half of tokens a..b-1. until falls where entries leave, so it is the number that see
 * the ceil(m/2)-th most lasting one. */
static uint32_t half_rows(const job *j, uint32_t u, uint32_t a, uint32_t b, uint32_t *tmp)
{
    uint32_t n = b - a, rows = 0;
    if (j->until) {
        memcpy(tmp, j->until + (size_t)u * j->sc->n_cut + a, n * sizeof *tmp);
        qsort(tmp, n, sizeof *tmp, descending);
        return tmp[(n + 1) / 2 - 1];
    }
    for (uint32_t r = 0; r < j->T; r++) {
        uint32_t in = 0;
        for (uint32_t i = a; i < b; i++) in += kv_schedule_visible(j->sch, j->sc, u, i, r);
        rows += 2 * in >= n;
    }
    return rows;
}

static uint64_t rows_of(const job *j, uint32_t u, uint32_t i)
{
    uint64_t n = 0;
    if (j->until) return j->until[(size_t)u * j->sc->n_cut + i];
    for (uint32_t r = 0; r < j->T; r++) n += kv_schedule_visible(j->sch, j->sc, u, i, r);
    return n;
}

static void unit_evidence(const job *j, uint32_t u, double *kept, double *half, uint32_t *tmp)
{
    const kv_evidence *ev = j->ev;
    uint64_t in = 0, spans = 0;
    for (uint32_t k = 0; k < ev->n_token; k++) in += rows_of(j, u, ev->token[k]);
    for (uint32_t s = 0; s < ev->n_span; s++) spans += half_rows(j, u, ev->first[s], ev->past[s], tmp);
    *kept = (double)in / ((double)j->T * ev->n_token);
    *half = (double)spans / ((double)j->T * ev->n_span);
}

/* Share of the evidence that nothing in a cover sees, mean over T rows; `seen` rows are `bytes` apart. */
static double lost_share(const kv_evidence *ev, uint32_t T, const uint32_t *until, const uint8_t *seen, size_t bytes)
{
    uint64_t in = 0;
    for (uint32_t k = 0; k < ev->n_token; k++) {
        uint32_t i = ev->token[k];
        if (!seen) in += until[i];
        for (uint32_t r = 0; r < T && seen; r++) in += seen[r * bytes + i / 8] >> (i % 8) & 1;
    }
    return 1 - (double)in / ((double)T * ev->n_token);
}

static uint64_t count_seen(const kv_scene *sc, uint32_t T, const uint32_t *until, const uint8_t *seen, size_t bytes)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < sc->n_cut && !seen; i++) n += until[i];
    for (size_t k = 0; k < T * bytes && seen; k++) n += (uint64_t)__builtin_popcount(seen[k]);
    return n;
}

kv_status kv_coverage_add(kv_coverage *c, size_t point, size_t i, const uint32_t *counts, uint32_t layer,
                          const kv_schedule *sch, kv_error *err)
{
    const kv_scene *sc = c->plan->scene;
    const kv_ranking *rk = &c->plan->ranking[c->plan->ranking_of[i]];
    uint32_t L = sc->n_cut, U = rk->n_unit, Hq = sc->info->n_q_head;
    size_t at = point * sc->n_evict + layer, bytes = (L + (size_t)7) / 8;
    bool again = sch && sch->seen; /* entries may come back */
    job j = {sc, &c->evidence, sch, sch ? sc->n_row : 1, NULL};
    uint32_t *top = NULL, *tmp = NULL;
    uint8_t *any = NULL;
    kv_layer_cover *out = &c->layer[at];
    kv_status st = kv_array(&tmp, L, sizeof *tmp, err);
    if (!st && !again) st = kv_array(&j.until, (size_t)U * L, sizeof *j.until, err);
    if (!st && !again) st = kv_array(&top, L, sizeof *top, err);
    if (!st && again) st = kv_array(&any, j.T * bytes, 1, err);
    if (st) goto out;
    for (uint32_t u = 0; u < U; u++) {
        const uint32_t *order = rk->order ? rk->order + ((size_t)layer * U + u) * L : NULL;
        uint32_t *until = j.until ? j.until + (size_t)u * L : NULL;
        if (!sch)
            for (uint32_t k = 0; k < counts[(size_t)layer * U + u]; k++) until[order[k]] = 1;
        for (uint32_t k = 0; k < L && until && sch; k++) {
            int32_t gone = sch->at[(size_t)u * sc->n_token + k];
            until[k] = gone < 0 || (uint32_t)gone > j.T ? j.T : (uint32_t)gone;
        }
        for (uint32_t k = 0; k < L && until; k++) {
            if (until[k] > top[k]) top[k] = until[k];
            out->slots += until[k];
        }
        for (uint32_t r = 0; r < j.T && again; r++)
            for (uint32_t k = 0; k < L; k++)
                if (kv_schedule_visible(sch, sc, u, k, r))
                    any[r * bytes + k / 8] |= (uint8_t)(1u << (k % 8)), out->slots++;
    }
    /* one set for all heads takes a slot in every KV head */
    if (rk->granularity == KV_GRAN_LAYER) out->slots *= sc->info->n_kv_head;
    out->distinct = count_seen(sc, j.T, top, any, bytes);
    if (sch && sch->slots) { /* every token is there in part: no set of positions */
        out->slots = 0, out->lost = NAN;
        for (uint32_t h = 0; h < Hq && c->evidence.n_token; h++) c->kept[at * Hq + h] = c->half[at * Hq + h] = NAN;
    } else if (c->evidence.n_token) {
        for (uint32_t h = 0; h < Hq; h++) {
            double *kept = &c->kept[at * Hq + h], *half = &c->half[at * Hq + h];
            uint32_t u = h / (Hq / U), first = u * (Hq / U);
            if (h == first)
                unit_evidence(&j, u, kept, half, tmp);
            else
                *kept = c->kept[at * Hq + first], *half = c->half[at * Hq + first];
        }
        out->lost = lost_share(&c->evidence, j.T, top, any, bytes);
    }
    pthread_mutex_lock(&c->lock);
    kv_model_cover *m = &c->model[point];
    m->rows = j.T;
    if (again && !m->seen) st = kv_array(&m->seen, j.T * bytes, 1, err);
    for (uint32_t k = 0; k < L && !again; k++)
        if (top[k] > m->until[k]) m->until[k] = top[k];
    for (size_t k = 0; k < j.T * bytes && again && !st; k++) m->seen[k] |= any[k];
    pthread_mutex_unlock(&c->lock);
out:
    free(j.until), free(top), free(tmp), free(any);
    return st;
}

void kv_coverage_model(const kv_coverage *c, size_t point, double *lost, double *breadth)
{
    const kv_scene *sc = c->plan->scene;
    const kv_model_cover *m = &c->model[point];
    size_t bytes = (sc->n_cut + (size_t)7) / 8;
    const kv_layer_cover *layer = c->layer + point * sc->n_evict;
    uint64_t slots = 0;
    bool sets = true;
    for (uint32_t l = 0; l < sc->n_evict; l++) slots += layer[l].slots, sets &= !isnan(layer[l].lost);
    *lost = c->evidence.n_token && sets ? lost_share(&c->evidence, m->rows, m->until, m->seen, bytes) : NAN;
    *breadth = slots ? (double)count_seen(sc, m->rows, m->until, m->seen, bytes) / (double)slots : NAN;
}
