/* measure.c - a layer under measurement. */
#include "sim/measure_gpu.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/bounds.h"

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
    if (m->l.post_norm) return KV_OK; /* its norm needs the output itself */
    if (m->plan->scene->n_asked < 4 * width / m->plan->scene->n_row + 1) return KV_OK;
    m->n_triangle = hidden < width ? hidden : width;
    kv_status st = kv_array(&m->triangle, m->n_triangle * width, sizeof *m->triangle, err);
    if (!st && !kv_triangle(hidden, width, m->l.wo, m->triangle)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    return st;
}

/* W_O o of all heads of rows r0.. */
static kv_status project_outputs(kv_measure *m, size_t r0, size_t n, kv_error *err)
{
    size_t d = m->l.d, T = m->plan->scene->n_row, width = (size_t)m->l.n_q_head * d,
           hidden = m->plan->scene->info->hidden;
    float *x = NULL;
    kv_status st = kv_array(&x, n * width, sizeof *x, err);
    if (!st && !m->projected) st = kv_array(&m->projected, KV_LAYER_ROWS * hidden, sizeof *m->projected, err);
    for (size_t h = 0; h < m->l.n_q_head && !st; h++)
        for (size_t r = 0; r < n; r++) memcpy(x + r * width + h * d, m->o + (h * T + r0 + r) * d, d * sizeof *x);
    if (!st && !kv_matmul(n, hidden, width, x, m->l.wo, m->projected, hidden, 1))
        st = kv_fail(err, KV_ENOMEM, "out of memory");
    m->projected_r0 = st ? SIZE_MAX : r0;
    free(x);
    return st;
}

/* y = z / sqrt(mean z^2 + eps) * weight for z = row + bias - less (less NULL: 0). */
static void normalise(const kv_measure *m, const float *row, const float *less, double *y)
{
    size_t n = m->plan->scene->info->hidden;
    const float *norm = m->l.post_norm;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        y[i] = (double)row[i] + norm[2 * i + 1] - (less ? (double)less[i] : 0);
        sum += y[i] * y[i];
    }
    double inv = 1 / sqrt(sum / (double)n + m->plan->scene->info->post_norm_eps);
    for (size_t i = 0; i < n; i++) y[i] *= inv * norm[2 * i];
}

/* A norm is not linear, so both outputs go through it. */
static kv_status normed_change(kv_measure *m, size_t r0, size_t n, const float *x, double *norm, kv_error *err)
{
    size_t hidden = m->plan->scene->info->hidden, width = (size_t)m->l.n_q_head * m->l.d;
    float *less = NULL;
    double *a = NULL;
    kv_status st = kv_array(&less, n * hidden, sizeof *less, err);
    if (!st) st = kv_array(&a, 2 * hidden, sizeof *a, err);
    if (!st && (!m->projected || m->projected_r0 != r0)) st = project_outputs(m, r0, n, err);
    if (!st && !kv_matmul(n, hidden, width, x, m->l.wo, less, hidden, 1)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    for (size_t r = 0; r < n && !st; r++) {
        const float *row = m->projected + r * hidden;
        double *b = a + hidden, sum = 0;
        normalise(m, row, NULL, a), normalise(m, row, less + r * hidden, b);
        for (size_t i = 0; i < hidden; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
        norm[r] = sqrt(sum);
    }
    free(less), free(a);
    return st;
}

kv_status kv_measure_project(kv_measure *m, size_t r0, size_t n, const float *x, double *norm, kv_error *err)
{
    const kv_trace_info *in = m->plan->scene->info;
    size_t width = (size_t)m->l.n_q_head * m->l.d;
    kv_status st = KV_OK;
    if (m->l.post_norm)
        st = normed_change(m, r0, n, x, norm, err);
    else if (!(m->triangle ? kv_project_norm_upper(n, width, m->n_triangle, x, m->triangle, norm)
                           : kv_project_norm(n, width, in->hidden, x, m->l.wo, norm)))
        st = kv_fail(err, KV_ENOMEM, "out of memory");
    for (size_t r = 0; r < n && !st && in->out_scale > 0; r++) norm[r] *= in->out_scale;
    return st;
}

/* Bounds and coverage of the points that keep prefixes. */
static kv_status prefix_facts(kv_measure *m, kv_error *err)
{
    size_t *points = NULL, n = 0;
    kv_status st = kv_array(&points, m->n_point, sizeof *points, err);
    for (size_t i = 0; i < m->n_point && !st; i++) {
        if (kv_schedule_used(m->plan, m->point[i].spec)) continue;
        points[n++] = i;
        if (m->out->coverage)
            st = kv_coverage_add(m->out->coverage, i, m->point[i].spec, m->point[i].counts, m->l.order, NULL, err);
    }
    if (!st && m->bounds) st = kv_bounds_add(m, m->bounds, points, n, NULL, err);
    free(points);
    return st;
}

kv_status kv_measure_layer(kv_measure *m, uint32_t index, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    unsigned needs = KV_NEED_FUTURE | (m->out->layer_error || m->out->bound ? KV_NEED_WO : 0);
    bool schedules = false, read = false; /* and made from the layer's data */
    for (size_t i = 0; i < m->n_point; i++) {
        bool used = kv_schedule_used(m->plan, m->point[i].spec);
        schedules |= used, read |= used && !kv_schedule_planned(m->plan, m->point[i].spec);
    }
    bool device = sc->gpu && !m->hat && kv_measure_gpu_can(m), host = !device || schedules || m->out->bound;
    m->l = kv_layer_shape(sc, index);
    kv_status st =
        host ? kv_layer_load(sc, index, needs | (read ? m->plan->needs : 0), read ? m->plan->max_window : 0, &m->l, err)
             : KV_OK;
    if (st) return st;
    size_t rows = (size_t)m->l.n_q_head * sc->n_row;
    struct kv_bounds bounds = {0};
    m->errors = m->out->bound || (m->wanted & KV_M_OUTPUTS);
    m->contest = m->wanted >> KV_M_RECALL_CONTESTED & 1;
    m->diffs = m->out->layer_error || m->hat;
    st = kv_array(&m->o, rows * m->l.d, sizeof *m->o, err);
    if (!st) st = kv_array(&m->lse, rows, sizeof *m->lse, err);
    if (!st) st = kv_array(&m->norm_o, rows, sizeof *m->norm_o, err);
    if (!st) st = kv_array(&m->base_mass, rows, sizeof *m->base_mass, err);
    if (!st) st = kv_array(&m->contested, sc->n_token, 1, err);
    if (!st && m->contest) st = kv_array(&m->contested_mass, rows, sizeof *m->contested_mass, err);
    for (uint32_t i = 0; i < sc->n_cut && !st; i++) m->contested[i] = kv_contested(sc, i);
    if (!st && m->out->step) st = kv_array(&m->step, m->n_point * sc->n_row, sizeof *m->step, err);
    for (size_t i = 0; i < m->n_point * sc->n_row && !st && m->step && m->out->layer_error; i++)
        m->step[i].n[KV_STEP_SQUARE] = 1;
    if (!st && m->out->layer_error) st = reference(m, err);
    if (!st && m->out->layer_error && (!device || schedules)) st = triangle(m, err);
    if (!st)
        st = device                   ? kv_measure_prefixes_gpu(sc->gpu, m, err)
             : kv_measure_is_local(m) ? kv_measure_local(m, err)
                                      : kv_measure_prefixes(m, err);
    if (!st && m->out->bound && !(st = kv_bounds_open(m, &bounds, err))) m->bounds = &bounds;
    if (!st) st = prefix_facts(m, err);
    if (!st && schedules) st = kv_measure_schedules(m, err);
    free(m->o), free(m->lse), free(m->norm_o), free(m->base_mass), free(m->contested), free(m->ref), free(m->triangle),
        free(m->projected);
    free(m->contested_mass);
    kv_bounds_close(&bounds);
    m->bounds = NULL;
    kv_layer_free(&m->l);
    return st;
}
