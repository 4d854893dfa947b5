/* measure_schedule.c - kept sets that change from row to row, or attend to other keys: every row by itself. */
#include "sim/bounds.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/dmath.h"
#include "sim/mixdim.h"
#include "sim/reindex.h"
#include "traces/cli.h"

/* Positions that row r of unit u sees, ascending, from the n that row r-1 saw; n = 0 starts anew. */
static uint32_t visible(const kv_schedule *sch, const kv_scene *sc, uint32_t u, uint32_t r, uint32_t n, uint32_t *list)
{
    uint32_t row = sc->row_first + r, m = 0;
    if (!n || sch->seen) { /* entries may come back */
        for (uint32_t i = 0; i <= row; i++)
            if (kv_schedule_visible(sch, sc, u, i, r)) list[m++] = i;
        return m;
    }
    for (uint32_t i = 0; i < n; i++)
        if (kv_schedule_visible(sch, sc, u, list[i], r)) list[m++] = list[i];
    if (kv_schedule_visible(sch, sc, u, row, r)) list[m++] = row;
    return m;
}

/* One point whose kept set changes from row to row: every row by itself, its visible positions in order, those before
 * the cut first. */
static kv_status measure_schedule(kv_measure *m, size_t point, const kv_schedule *sch, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, N = sc->n_token, T = sc->n_row, width = (size_t)l->n_q_head * d, U = sch->n_unit,
           g = U > l->n_kv_head ? 1 : l->group;
    bool reindex = m->plan->spec[m->point[point].spec].reindex;
    uint32_t *list = NULL;
    float *q = NULL, *lse = NULL, *p = NULL, *diff = NULL, *hat = NULL, *gap = NULL, *none = NULL;
    double *mass = NULL, *cmass = NULL, *weight = NULL, one = 1;
    kv_status st = kv_array(&list, N, sizeof *list, err);
    if (!st) st = kv_array(&q, g * d, sizeof *q, err);
    if (!st) st = kv_array(&lse, g, sizeof *lse, err);
    if (!st) st = kv_array(&mass, 2 * g, sizeof *mass, err);
    if (!st) st = kv_array(&cmass, 2 * g, sizeof *cmass, err);
    if (!st) st = kv_array(&hat, 2 * g * d, sizeof *hat, err);
    if (!st) st = kv_array(&p, N, sizeof *p, err);
    if (!st) st = kv_array(&weight, N, sizeof *weight, err);
    if (!st) st = kv_array(&gap, d, sizeof *gap, err);
    if (!st) st = kv_array(&none, d, sizeof *none, err);
    if (!st && m->diffs) st = kv_array(&diff, KV_LAYER_ROWS * width, sizeof *diff, err);
    for (size_t r0 = 0; r0 < T && !st; r0 += KV_LAYER_ROWS) {
        size_t rows = T - r0 < KV_LAYER_ROWS ? T - r0 : KV_LAYER_ROWS;
        for (uint32_t h0 = 0; h0 < l->n_q_head && !st; h0 += (uint32_t)g) {
            uint32_t u = U == 1 ? 0 : h0 / (uint32_t)g, n = 0;
            size_t kv = (size_t)(h0 / l->group) * N * d;
            const float *K = l->k + kv, *V = l->v + kv, *V_hat = sch->v ? sch->v + kv : V;
            bool reduced = sch->k && sch->slots[u] < sc->n_cut;
            for (size_t r = 0; r < rows && !st; r++) {
                size_t row = sc->row_first + r0 + r;
                n = visible(sch, sc, u, (uint32_t)(r0 + r), n, list);
                uint32_t check[2] = {0, n};
                while (check[0] < n && list[check[0]] < sc->n_cut) check[0]++;
                for (size_t k = 0; k < g; k++) {
                    memcpy(q + k * d, l->q_row + ((h0 + k) * T + r0 + r) * d, d * sizeof *q);
                    lse[k] = m->lse[(h0 + k) * T + r0 + r];
                }
                if (!kv_prefix(g, d, q, lse, l->scale, l->softcap, K, V, n, list, 2, check, NULL, NULL,
                               m->contest ? m->contested : NULL, mass, m->contest ? cmass : NULL,
                               m->errors ? hat : NULL))
                    st = kv_fail(err, KV_ENOMEM, "out of memory");
                for (size_t k = 0; k < g && !st; k++) {
                    size_t h = h0 + k, at = h * T + r0 + r;
                    float *o_hat = hat + (g + k) * d;
                    double distance = 0;
                    bool whole = n == row + 1 && !reduced; /* has every key in its place */
                    if ((reindex || sch->k) && !whole) {
                        kv_attn_shape shape = {1, row + 1, d, row, 0, l->scale, l->softcap};
                        if (!kv_probs(&shape, q + k * d, K, p))
                            st = kv_fail(err, KV_ENOMEM, "out of memory");
                        else if (sch->k)
                            kv_mixdim_row(l, (uint32_t)h, (uint32_t)(r0 + r), sch->k + kv, list, n, p, weight,
                                          &distance);
                        else
                            st = kv_reindex_row(l, (uint32_t)h, (uint32_t)(r0 + r), list, n, p, weight, &distance, err);
                        for (size_t j = 0; j < d && m->errors && !st; j++) {
                            double x = 0;
                            for (uint32_t i = 0; i < n; i++) x += weight[i] * V_hat[list[i] * d + j];
                            o_hat[j] = (float)x;
                        }
                    }
                    if (st) break;
                    double after = mass[g + k] - mass[k], error2 = 0, dot = 0;
                    float *gone = diff ? diff + r * width + h * d : gap;
                    if (m->errors && !whole)
                        kv_walk_compare(1, d, &one, o_hat, none, m->o + at * d, &error2, &dot, gone, d);
                    else
                        memset(gone, 0, d * sizeof *gone);
                    kv_kept_rows x = {.head = (uint32_t)h,
                                      .r0 = r0 + r,
                                      .n = 1,
                                      .whole = whole,
                                      .mass = mass + g + k,
                                      .after = &after,
                                      .contested = m->contest ? cmass + g + k : NULL,
                                      .error2 = m->errors ? &error2 : NULL,
                                      .dot = m->errors ? &dot : NULL,
                                      .variation = &distance};
                    kv_account_rows(m, &point, 1, &x);
                }
            }
        }
        if (!st && diff) st = kv_account_layer(m, &point, 1, r0, rows, diff, err);
    }
    free(list), free(q), free(lse), free(mass), free(cmass), free(hat), free(p), free(weight), free(diff), free(gap),
        free(none);
    return st;
}

/* Slots of a scheduled point in this layer: right after the cut, and summed and at most over the measured rows. */
static void ledger(kv_measure *m, size_t point, const kv_schedule *sch)
{
    const kv_scene *sc = m->plan->scene;
    for (uint32_t u = 0; u < sch->n_unit; u++)
        m->point[point].counts[m->l.order * sch->n_unit + u] = kv_schedule_slots(sch, sc, u);
    kv_row_slots *rs = &m->out->rows[point * sc->n_evict + m->l.order];
    uint64_t *read = m->out->read + (point * sc->n_evict + m->l.order) * m->l.n_q_head;
    for (uint32_t r = 0; r < sc->n_row; r++) {
        uint64_t now = 0;
        for (uint32_t u = 0; u < sch->n_unit; u++) {
            uint64_t seen = sch->slots ? sch->slots[u] : 0;
            for (uint32_t i = sch->slots ? sc->n_cut : 0; i <= sc->row_first + r; i++)
                seen += kv_schedule_visible(sch, sc, u, i, r);
            read[u] += seen, now += seen;
        }
        rs->sum += now;
        if (now > rs->peak) rs->peak = now;
    }
}

kv_status kv_measure_schedules(kv_measure *m, kv_error *err)
{
    kv_status st = KV_OK;
    for (size_t i = 0; i < m->n_point && !st; i++) {
        kv_schedule sch;
        if (!kv_schedule_used(m->plan, m->point[i].spec)) continue;
        st = kv_schedule_make(m->plan, m->point[i].spec, &m->point[i].c, m->point[i].counts, &m->l, &sch, err);
        if (!st) st = measure_schedule(m, i, &sch, err);
        if (!st && m->out->rows) ledger(m, i, &sch);
        if (!st && m->out->coverage)
            st = kv_coverage_add(m->out->coverage, i, m->point[i].spec, m->point[i].counts, m->l.order, &sch, err);
        if (!st && m->bounds && kv_bounds_apply(&m->plan->spec[m->point[i].spec]))
            st = kv_bounds_add(m, m->bounds, &i, 1, &sch, err);
        kv_schedule_free(&sch);
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    return st;
}
