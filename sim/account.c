/* account.c - rows become sums. */
#include "sim/measure.h"

#include <math.h>
#include <stdlib.h>

#define NATS_CAP     20.0
#define LOST_NOTHING 1e-6 /* 1 - R below this: the distance of the means is noise */

kv_head_sums *kv_measure_sums(const kv_measure *m, size_t point, uint32_t head)
{
    return &m->out->head[(point * m->plan->scene->n_evict + m->l.order) * m->l.n_q_head + head];
}

/* Row i of x into s. */
static void add(const kv_measure *m, const kv_kept_rows *x, size_t i, kv_head_sums *s)
{
    size_t at = x->head * (size_t)m->plan->scene->n_row + x->r0 + i;
    double mass = x->mass[i], base = m->base_mass[at];
    double R = x->whole || mass > 1 ? 1 : mass < 0 ? 0 : mass, nats = R > 0 ? -log(R) : INFINITY;
    s->recall += R;
    if (!s->n++ || R < s->recall_min) s->recall_min = R;
    if (nats > NATS_CAP) nats = NATS_CAP, s->n_capped++;
    s->nats += nats;
    if (x->contested) s->contested_kept += x->contested[i];
    s->n_whole += x->whole;
    if (base < 1 - 1e-9) {
        double share = x->whole ? 1 : (R - x->after[i]) / (1 - base);
        s->recall_prompt += share < 0 ? 0 : share > 1 ? 1 : share;
        s->n_prompt++;
    }
    if (x->variation) s->total_variation += x->variation[i];
    if (!x->error2) return;
    double norm = m->norm_o[at], rel = norm > 0 && !x->whole ? sqrt(x->error2[i]) / norm : 0;
    s->head_error += rel;
    if (1 - R > LOST_NOTHING) s->value_distance += rel / (1 - R), s->n_distance++;
}

void kv_account_rows(kv_measure *m, const size_t *point, size_t n_point, const kv_kept_rows *x)
{
    kv_head_sums *first = kv_measure_sums(m, point[0], x->head);
    for (size_t i = 0; i < x->n; i++) add(m, x, i, first);
    for (size_t p = 1; p < n_point; p++) *kv_measure_sums(m, point[p], x->head) = *first;
}

kv_status kv_account_layer(kv_measure *m, const size_t *point, size_t n_point, size_t r0, size_t n, const float *diff,
                           kv_error *err)
{
    double *norm = NULL;
    kv_status st = kv_array(&norm, n, sizeof *norm, err);
    /* point by point: a row's place in a product decides its last bits, and must not depend on the other points */
    for (size_t i = 0; i < n_point && !st; i++) {
        st = kv_measure_project(m, r0, n, diff + i * n * m->l.n_q_head * m->l.d, norm, err);
        double *sum = &m->out->layer_error[point[i] * m->plan->scene->n_evict + m->l.order];
        for (size_t r = 0; r < n && !st; r++) *sum += m->ref[r0 + r] > 0 ? norm[r] / m->ref[r0 + r] : 0;
    }
    free(norm);
    return st;
}
