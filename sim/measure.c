/* measure.c - a layer under measurement. */
#include "sim/measure.h"

#include <stdlib.h>

#include "kernels/kernels.h"

/* ||x|| where the trace has it; a layer's own output is measured as its rows come (measure_prefix.c). */
static kv_status reference(kv_measure *m, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    float *x = NULL;
    kv_status st = kv_array(&m->ref, sc->n_row, sizeof *m->ref, err);
    if (st || m->out->own_output) return st;
    st = kv_array(&x, sc->n_row, sizeof *x, err);
    if (!st) st = kv_trace_read_f32(sc->trace, KV_S_XNORM, m->l.number, 0, sc->row_first, sc->n_token, x, err);
    for (size_t r = 0; r < sc->n_row && !st; r++) m->ref[r] = x[r];
    free(x);
    return st;
}

/* The triangular factor halves every later product and costs as much as 8/3 as many rows as W_O is wide. Norms through
 * it differ in their last bits, so the request decides, not the points that are left of it. */
static kv_status triangle(kv_measure *m, kv_error *err)
{
    size_t width = (size_t)m->l.n_q_head * m->l.d, hidden = m->plan->scene->info->hidden;
    if (m->plan->scene->n_asked < 4 * width / m->plan->scene->n_row + 1) return KV_OK;
    m->n_triangle = hidden < width ? hidden : width;
    kv_status st = kv_array(&m->triangle, m->n_triangle * width, sizeof *m->triangle, err);
    if (!st && !kv_triangle(hidden, width, m->l.wo, m->triangle)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    return st;
}

kv_status kv_measure_project(const kv_measure *m, size_t n, const float *x, double *norm, kv_error *err)
{
    size_t width = (size_t)m->l.n_q_head * m->l.d;
    bool ok = m->triangle ? kv_project_norm_upper(n, width, m->n_triangle, x, m->triangle, norm)
                          : kv_project_norm(n, width, m->plan->scene->info->hidden, x, m->l.wo, norm);
    return ok ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory");
}

kv_status kv_measure_layer(kv_measure *m, uint32_t index, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    unsigned needs = KV_NEED_FUTURE | (m->out->layer_error ? KV_NEED_WO : 0);
    bool schedules = false;
    for (size_t i = 0; i < m->n_point; i++) schedules |= kv_schedule_used(m->plan, m->point[i].spec);
    kv_status st = kv_layer_load(sc, index, needs | (schedules ? m->plan->needs : 0),
                                 schedules ? m->plan->max_window : 0, &m->l, err);
    if (st) return st;
    size_t rows = (size_t)m->l.n_q_head * sc->n_row;
    m->errors = m->wanted & (1u << KV_M_HEAD_ERROR | 1u << KV_M_VALUE_DISTANCE | 1u << KV_M_LAYER_ERROR);
    m->contest = m->wanted >> KV_M_RECALL_CONTESTED & 1;
    st = kv_array(&m->o, rows * m->l.d, sizeof *m->o, err);
    if (!st) st = kv_array(&m->lse, rows, sizeof *m->lse, err);
    if (!st) st = kv_array(&m->norm_o, rows, sizeof *m->norm_o, err);
    if (!st) st = kv_array(&m->base_mass, rows, sizeof *m->base_mass, err);
    if (!st) st = kv_array(&m->contested, sc->n_token, 1, err);
    for (uint32_t i = 0; i < sc->n_cut && !st; i++) m->contested[i] = kv_contested(sc, i);
    if (!st && m->out->layer_error) st = reference(m, err);
    if (!st && m->out->layer_error) st = triangle(m, err);
    if (!st) st = kv_measure_is_local(m) ? kv_measure_local(m, err) : kv_measure_prefixes(m, err);
    if (!st && schedules) st = kv_measure_schedules(m, err);
    free(m->o), free(m->lse), free(m->norm_o), free(m->base_mass), free(m->contested), free(m->ref), free(m->triangle);
    kv_layer_free(&m->l);
    return st;
}
