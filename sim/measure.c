/* measure.c - a layer under measurement: what the full cache gives, then every point. */
#include "sim/measure.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/dmath.h"
#include "traces/cli.h"

/* Full-cache output, log-sum-exp, and the part of the tokens after the cut, for every measured row. */
static kv_status full_rows(kv_measure *m, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t n = sc->n_row, d = l->d, after = sc->n_token - sc->n_cut;
    float *part = NULL, *part_lse = NULL;
    kv_attn_shape full = {n, sc->n_token, d, sc->row_first, 0, l->scale, l->softcap};
    kv_attn_shape tail = {n, after, d, sc->row_first - sc->n_cut, 0, l->scale, l->softcap};
    kv_status st = kv_array(&part, n * d, sizeof *part, err);
    if (!st) st = kv_array(&part_lse, n, sizeof *part_lse, err);
    for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
        const float *q = l->q_row + h * n * d;
        const float *k = l->k + (size_t)(h / l->group) * sc->n_token * d,
                    *v = l->v + (size_t)(h / l->group) * sc->n_token * d;
        float *lse = m->lse + h * n;
        if (!kv_attention(&full, q, k, v, m->o + h * n * d, d, lse, NULL) ||
            !kv_attention(&tail, q, k + sc->n_cut * d, v + sc->n_cut * d, part, d, part_lse, NULL)) {
            st = kv_fail(err, KV_ENOMEM, "out of memory");
            break;
        }
        for (size_t r = 0; r < n; r++) {
            double tail_mass = fmin(exp((double)part_lse[r] - lse[r]), 1);
            m->base_mass[h * n + r] = tail_mass;
            m->norm_o[h * n + r] = kv_norm(d, m->o + (h * n + r) * d);
            for (size_t j = 0; j < d; j++) m->base_out[(h * n + r) * d + j] = (float)(tail_mass * part[r * d + j]);
            if (!isfinite(lse[r]))
                st = kv_fail(err, KV_EFORMAT, "trace '%s': layer %u head %u row %zu: attention is not finite",
                             kv_trace_path(sc->trace), l->number, h, sc->row_first + r);
        }
    }
    free(part), free(part_lse);
    return st;
}

/* Mass outside F of every head, the denominator of contested recall. */
static kv_status contested_total(kv_measure *m, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t n = sc->n_row, d = l->d;
    uint32_t n_order = 0, *order = NULL;
    float *zero = NULL;
    double *mass = NULL, *none = NULL;
    kv_status st = kv_array(&order, sc->n_cut, sizeof *order, err);
    if (!st) st = kv_array(&zero, n * d, sizeof *zero, err);
    if (!st) st = kv_array(&mass, n, sizeof *mass, err);
    if (!st) st = kv_array(&none, n, sizeof *none, err);
    for (uint32_t i = 0; i < sc->n_cut && !st; i++)
        if (m->contested[i]) order[n_order++] = i;
    for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
        size_t kv = (size_t)(h / l->group) * sc->n_token * d;
        if (!kv_prefix(n, d, l->q_row + h * n * d, m->lse + h * n, l->scale, l->softcap, l->k + kv, l->v + kv, n_order,
                       order, 1, &n_order, none, zero, NULL, mass, NULL, NULL))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        double sum = 0;
        for (size_t r = 0; r < n && !st; r++) sum += mass[r];
        for (size_t i = 0; i < m->n_point; i++) kv_measure_sums(m, i, h)->contested_all = sum;
    }
    free(order), free(zero), free(mass), free(none);
    return st;
}

/* What layer errors are divided by. */
static kv_status reference(kv_measure *m, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    size_t n = sc->n_row, width = (size_t)m->l.n_q_head * m->l.d;
    float *x = NULL;
    kv_status st = kv_array(&m->ref, n, sizeof *m->ref, err);
    if (!st) st = kv_array(&x, m->out->own_output ? n * width : n, sizeof *x, err);
    if (!st && !m->out->own_output) {
        st = kv_trace_read_f32(sc->trace, KV_S_XNORM, m->l.number, 0, sc->row_first, sc->n_token, x, err);
        for (size_t r = 0; r < n && !st; r++) m->ref[r] = x[r];
    } else if (!st) {
        for (size_t h = 0; h < m->l.n_q_head; h++)
            for (size_t r = 0; r < n; r++)
                memcpy(x + r * width + h * m->l.d, m->o + (h * n + r) * m->l.d, m->l.d * sizeof *x);
        if (!kv_project_norm(n, width, sc->info->hidden, x, m->l.wo, m->ref))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
    }
    free(x);
    return st;
}

kv_status kv_measure_layer(kv_measure *m, uint32_t index, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    size_t n = sc->n_row;
    unsigned needs = KV_NEED_FUTURE | (m->out->layer_error ? KV_NEED_WO : 0);
    bool schedules = false;
    for (size_t i = 0; i < m->n_point; i++) schedules |= kv_schedule_used(m->plan, m->point[i].spec);
    kv_status st = kv_layer_load(sc, index, needs | (schedules ? m->plan->needs : 0),
                                 schedules ? m->plan->max_window : 0, &m->l, err);
    if (st) return st;
    size_t rows = m->l.n_q_head * n;
    m->errors = m->wanted & (1u << KV_M_HEAD_ERROR | 1u << KV_M_VALUE_DISTANCE | 1u << KV_M_LAYER_ERROR);
    m->contest = m->wanted >> KV_M_RECALL_CONTESTED & 1;
    st = kv_array(&m->o, rows * m->l.d, sizeof *m->o, err);
    if (!st) st = kv_array(&m->lse, rows, sizeof *m->lse, err);
    if (!st) st = kv_array(&m->norm_o, rows, sizeof *m->norm_o, err);
    if (!st) st = kv_array(&m->base_out, rows * m->l.d, sizeof *m->base_out, err);
    if (!st) st = kv_array(&m->base_mass, rows, sizeof *m->base_mass, err);
    if (!st) st = kv_array(&m->contested, sc->n_token, 1, err);
    if (!st) st = full_rows(m, err);
    if (!st && m->out->layer_error) st = reference(m, err);
    for (uint32_t i = 0; i < sc->n_cut && !st; i++) m->contested[i] = kv_contested(sc, i);
    if (!st && m->contest) st = contested_total(m, err);
    if (!st) st = kv_measure_prefixes(m, err);
    if (!st && schedules) st = kv_measure_schedules(m, err);
    free(m->o), free(m->lse), free(m->norm_o), free(m->base_out), free(m->base_mass), free(m->contested), free(m->ref);
    kv_layer_free(&m->l);
    return st;
}
