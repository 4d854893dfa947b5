/* measure_local.c - masses of prefixes from what is kept alone: p = exp(score - lse), lse as recorded. */
#include "sim/measure.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "traces/cli.h"

/* Keys that the walks of all rankings would read, against those of the full cache. */
bool kv_measure_is_local(const kv_measure *m)
{
    const kv_scene *sc = m->plan->scene;
    uint64_t kept = 0;
    if (m->errors || m->contest ||
        !kv_trace_has(sc->trace, KV_S_LSE, m->l.number, m->l.n_q_head - 1, sc->row_first, sc->n_token))
        return false;
    for (size_t r = 0; r < m->plan->n_ranking; r++) {
        uint32_t most = 0;
        size_t U = m->plan->ranking[r].n_unit;
        for (size_t i = 0; i < m->n_point; i++) {
            if (m->plan->ranking_of[m->point[i].spec] != r) continue;
            if (kv_schedule_used(m->plan, m->point[i].spec)) return false;
            for (size_t u = 0; u < U; u++) {
                uint32_t c = m->point[i].counts[m->l.order * U + u];
                if (c > most && c < sc->n_cut) most = c;
            }
        }
        kept += most;
    }
    return kept < sc->n_cut / 2;
}

/* Heads h0.. of one unit at all its checkpoints; mass has room for them. */
static kv_status unit(kv_measure *m, const uint32_t *order, uint32_t h0, size_t heads, const kv_checkpoints *c,
                      double *mass, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t T = sc->n_row, d = l->d, kv = (size_t)(h0 / l->group) * sc->n_token * d, R = heads * T,
           n = c->n - (c->count[c->n - 1] == sc->n_cut); /* the whole prompt needs no look */
    if (!kv_prefix(R, d, l->q_row + h0 * T * d, m->lse + h0 * T, l->scale, l->softcap, l->k + kv, l->v + kv, sc->n_cut,
                   order, n, c->count, m->base_mass + h0 * T, NULL, NULL, mass, NULL, NULL))
        return kv_fail(err, KV_ENOMEM, "out of memory");
    for (size_t k = 0; k < c->n; k++)
        for (size_t g = 0; g < heads; g++) {
            kv_kept_rows x = {.head = h0 + (uint32_t)g,
                              .n = T,
                              .whole = k == n,
                              .mass = k == n ? m->base_mass + (h0 + g) * T : mass + k * R + g * T,
                              .after = m->base_mass + (h0 + g) * T};
            kv_account_rows(m, c->point + c->first[k], c->first[k + 1] - c->first[k], &x);
        }
    return KV_OK;
}

/* Log-sum-exps, and the mass of the tokens after the cut. */
static kv_status base(kv_measure *m, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t T = sc->n_row, d = l->d, after = sc->n_token - sc->n_cut;
    kv_attn_shape tail = {T, after, d, sc->row_first - sc->n_cut, 0, l->scale, l->softcap};
    float *out = NULL, *lse = NULL;
    kv_status st = kv_array(&out, T * d, sizeof *out, err);
    if (!st) st = kv_array(&lse, T, sizeof *lse, err);
    for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
        size_t kv = ((size_t)(h / l->group) * sc->n_token + sc->n_cut) * d;
        st = kv_trace_read_f32(sc->trace, KV_S_LSE, l->number, h, sc->row_first, sc->n_token, m->lse + h * T, err);
        if (!st && !kv_attention(&tail, l->q_row + h * T * d, l->k + kv, l->v + kv, out, d, lse, NULL))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t r = 0; r < T && !st; r++) {
            if (!isfinite(m->lse[h * T + r]) || !isfinite(lse[r]))
                st = kv_fail(err, KV_EFORMAT, "trace '%s': layer %u head %u row %zu: attention is not finite",
                             kv_trace_path(sc->trace), l->number, h, sc->row_first + r);
            m->base_mass[h * T + r] = fmin(exp((double)lse[r] - m->lse[h * T + r]), 1);
        }
    }
    free(out), free(lse);
    return st;
}

kv_status kv_measure_local(kv_measure *m, kv_error *err)
{
    const kv_layer *l = &m->l;
    size_t T = m->plan->scene->n_row, L = m->plan->scene->n_cut;
    double *mass = NULL;
    kv_checkpoints *c = NULL;
    kv_status st = base(m, err);
    for (size_t r = 0; r < m->plan->n_ranking && !st; r++) {
        const kv_ranking *rk = &m->plan->ranking[r];
        size_t U = rk->n_unit, heads = U > l->n_kv_head ? 1 : l->group, most = 0;
        st = kv_checkpoints_make(m, r, 0, m->n_point, &c, err);
        for (size_t u = 0; u < U && !st; u++) most = c[u].n > most ? c[u].n : most;
        if (!st) st = kv_array(&mass, most * heads * T, sizeof *mass, err);
        for (uint32_t h0 = 0; h0 < l->n_q_head && most && !st; h0 += (uint32_t)heads) {
            size_t u = U == 1 ? 0 : h0 / heads;
            st = unit(m, rk->order + (l->order * U + u) * L, h0, heads, &c[u], mass, err);
        }
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
        kv_checkpoints_free(c, U), free(mass);
        mass = NULL, c = NULL;
    }
    return st;
}
