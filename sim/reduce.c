/* reduce.c - from values per query head to values per unit: pooling and the group reduction (policies.md 2.3, 2.4).
 * Sums are double in a fixed order, rounded once to float. */
#include <stdlib.h>

#include "sim/dmath.h"
#include "sim/scorer.h"

uint32_t kv_unit_count(const kv_layer *l, uint32_t granularity)
{
    return granularity == KV_GRAN_QUERY_HEAD ? l->n_q_head : granularity == KV_GRAN_KV_HEAD ? l->n_kv_head : 1;
}

void kv_unit_heads(const kv_layer *l, uint32_t granularity, uint32_t u, uint32_t *first, uint32_t *count)
{
    *count = granularity == KV_GRAN_QUERY_HEAD ? 1 : granularity == KV_GRAN_KV_HEAD ? l->group : l->n_q_head;
    *first = u * *count;
}

kv_grouping kv_grouping_of(const kv_layer *l, const kv_spec *s)
{
    return (kv_grouping){.n_q_head = l->n_q_head,
                         .n_unit = kv_unit_count(l, s->granularity),
                         .kernel = s->kernel,
                         .reduce = (kv_group_reduce)s->group_reduce,
                         .pooling = (kv_pooling)s->pooling,
                         .pool_first = s->pool_first};
}

kv_status kv_reduce_heads(const kv_layer *l, const kv_spec *s, size_t n, float *per_head, float *score, kv_error *err)
{
    kv_grouping g = kv_grouping_of(l, s);
    float *tmp = NULL;
    kv_status st = kv_array(&tmp, n, sizeof *tmp, err);
    if (!st) kv_group_heads(&g, n, l->L, per_head, score, tmp);
    free(tmp);
    return st;
}

void kv_spread_kv(const kv_layer *l, const kv_spec *s, const float *per_kv, float *score)
{
    size_t L = l->L;
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity); u++)
        for (size_t i = 0; i < L; i++) {
            double sum = 0;
            if (s->granularity == KV_GRAN_LAYER)
                for (uint32_t h = 0; h < l->n_kv_head; h++) sum += per_kv[h * L + i];
            score[u * L + i] = s->granularity == KV_GRAN_LAYER        ? (float)(sum / l->n_kv_head)
                               : s->granularity == KV_GRAN_QUERY_HEAD ? per_kv[u / l->group * L + i]
                                                                      : per_kv[u * L + i];
        }
}

kv_status kv_score_norms(const kv_layer *l, const kv_spec *s, const float *x, float sign, float *score, kv_error *err)
{
    float *per_kv = NULL;
    kv_status st = kv_array(&per_kv, (size_t)l->n_kv_head * l->L, sizeof *per_kv, err);
    if (st) return st;
    for (uint32_t h = 0; h < l->n_kv_head; h++)
        for (uint32_t i = 0; i < l->L; i++)
            per_kv[(size_t)h * l->L + i] =
                sign * (float)kv_length(l->d, x + ((size_t)h * l->scene->n_token + i) * l->d);
    kv_spread_kv(l, s, per_kv, score);
    free(per_kv);
    return KV_OK;
}

void kv_key_diversity(const kv_layer *l, uint32_t h, uint32_t n, const uint32_t *idx, double *anchor, float *score)
{
    const float *keys = l->k + (size_t)h * l->scene->n_token * l->d;
    double square = 0;
    memset(anchor, 0, l->d * sizeof *anchor);
    for (uint32_t i = 0; i < n; i++) {
        const float *k = keys + (size_t)(idx ? idx[i] : i) * l->d;
        double floor_norm = fmax(kv_length(l->d, k), 1e-12);
        for (uint32_t j = 0; j < l->d; j++) anchor[j] += k[j] / floor_norm;
    }
    for (uint32_t j = 0; j < l->d; j++) anchor[j] /= n, square += anchor[j] * anchor[j];
    for (uint32_t i = 0; i < n; i++) {
        const float *k = keys + (size_t)(idx ? idx[i] : i) * l->d;
        double dot = 0;
        for (uint32_t j = 0; j < l->d; j++) dot += k[j] * anchor[j];
        score[i] = (float)-(dot / (fmax(kv_length(l->d, k), 1e-8) * fmax(sqrt(square), 1e-8)));
    }
}
