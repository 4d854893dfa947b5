/* capkv - CAPKV (arXiv 2604.25975, kvpress cap_press.py; policies.md 8.1): what a token adds to the capacity of the
 * values, weighted by how well its key agrees with the queries. For each query head, behind the sinks, w_i = exp(tau
 * cos(k_i, anchor) - max),  M = I + sum (w_i + epsilon) v_i v_i^T,  score_i = w_i v_i^T M^-1 v_i, then the mean over
 * the group. anchor = mean query before RoPE, turned by the average rotation of the next n_future positions. M^-1 by
 * Cholesky in double. The first `sinks` score above all others. */
#include <math.h>
#include <stdlib.h>

#include "sim/query_stats.h"
#include "sim/scorer.h"

/* w[i] = exp(tau cos(k_i, anchor) - the largest of them); norms have torch's floor of 1e-12, cosines are clamped to
 * -1..1. */
static void weights(size_t n, size_t d, const double *anchor, double tau, const float *k, double *w)
{
    double a2 = 0, max = -INFINITY;
    for (size_t j = 0; j < d; j++) a2 += anchor[j] * anchor[j];
    for (size_t i = 0; i < n; i++, k += d) {
        double dot = 0, k2 = 0;
        for (size_t j = 0; j < d; j++) dot += k[j] * anchor[j], k2 += (double)k[j] * k[j];
        double c = dot / (fmax(sqrt(a2), 1e-12) * fmax(sqrt(k2), 1e-12));
        w[i] = tau * (c > 1 ? 1 : c < -1 ? -1 : c);
        if (w[i] > max) max = w[i];
    }
    for (size_t i = 0; i < n; i++) w[i] = kv_exp_below(w[i] - max);
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    size_t d = l->d, ld = kv_pad4(d), L = l->L, first = s->sinks < L ? s->sinks : L, n = L - first;
    kv_rotation rot = {0};
    float *q = NULL, *per_head = NULL;
    double *anchor = NULL, *m = NULL, *w = NULL, *x = NULL;
    kv_status st = kv_rotation_open(l, "capkv", s->n_future, true, &rot, err);
    if (!st) st = kv_array(&per_head, l->n_q_head * L, sizeof *per_head, err);
    if (!st) st = kv_array(&q, n * d, sizeof *q, err);
    if (!st) st = kv_array(&anchor, d, sizeof *anchor, err);
    if (!st) st = kv_array(&m, d * ld, sizeof *m, err);
    if (!st) st = kv_array(&w, n, sizeof *w, err);
    if (!st) st = kv_array(&x, n, sizeof *x, err);
    for (size_t h = 0; h < l->n_q_head && !st && n; h++) {
        size_t kv = (h / l->group * l->scene->n_token + first) * d;
        kv_rotation_undo(&rot, l, (uint32_t)first, l->q_all + h * L * d, q);
        kv_mean_row(n, d, q, anchor);
        kv_rotation_future(&rot, d, anchor, NULL);
        weights(n, d, anchor, s->tau, l->k + kv, w);
        memset(m, 0, d * ld * sizeof *m);
        for (size_t j = 0; j < d; j++) m[j * ld + j] = 1;
        for (size_t i = 0; i < n; i++) x[i] = w[i] + s->epsilon;
        bool done = kv_gram(n, d, l->v + kv, x, NULL, m);
        kv_cholesky_inverse(d, m);
        if (!done || !kv_lower_forms(n, d, m, l->v + kv, true, x)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t i = 0; i < n && !st; i++) per_head[h * L + first + i] = (float)(w[i] * x[i]);
    }
    kv_spec plain = *s; /* the mean over the group, nothing smoothed */
    plain.group_reduce = KV_GROUP_MEAN, plain.pooling = KV_POOL_NONE;
    if (!st) st = kv_reduce_heads(l, &plain, L, per_head, out, err);
    if (!st) kv_raise_sinks(l, kv_unit_count(l, s->granularity), s->sinks, out);
    kv_rotation_close(&rot);
    free(q), free(per_head), free(anchor), free(m), free(w), free(x);
    return st;
}

const kv_scorer kv_scorer_capkv = {"capkv",
                                   "capacity a value adds, weighted by its key's agreement with the mean query",
                                   "sinks n_future tau epsilon window",
                                   KV_NEED_QUERIES,
                                   false,
                                   false,
                                   score};
