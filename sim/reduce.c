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

void kv_pool(uint32_t pooling, uint32_t kernel, size_t n, float *x, float *tmp)
{
    size_t half = kernel / 2;
    if (pooling == KV_POOL_NONE || half == 0) return;
    memcpy(tmp, x, n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        size_t a = i > half ? i - half : 0, b = i + half < n ? i + half : n - 1;
        double sum = 0;
        float max = tmp[a];
        for (size_t j = a; j <= b; j++) {
            sum += tmp[j];
            if (tmp[j] > max) max = tmp[j];
        }
        x[i] = pooling == KV_POOL_AVG ? (float)(sum / kernel) : max;
    }
}

kv_status kv_reduce_heads(const kv_layer *l, const kv_spec *s, size_t n, float *per_head, float *score, kv_error *err)
{
    size_t L = l->L;
    float *tmp = NULL;
    kv_status st = kv_array(&tmp, n, sizeof *tmp, err);
    if (st) return st;
    if (s->pool_first)
        for (uint32_t h = 0; h < l->n_q_head; h++) kv_pool(s->pooling, s->kernel, n, per_head + h * L, tmp);
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity); u++) {
        uint32_t first, count;
        kv_unit_heads(l, s->granularity, u, &first, &count);
        if (s->group_reduce == KV_GROUP_ALL) first = 0, count = l->n_q_head;
        for (size_t i = 0; i < n; i++) {
            double sum = 0;
            float max = per_head[first * L + i];
            for (uint32_t h = first; h < first + count; h++) {
                float v = per_head[h * L + i];
                sum += v;
                if (v > max) max = v;
            }
            score[u * L + i] = s->group_reduce == KV_GROUP_MAX   ? max
                               : s->group_reduce == KV_GROUP_SUM ? (float)sum
                                                                 : (float)(sum / count);
        }
        if (!s->pool_first) kv_pool(s->pooling, s->kernel, n, score + u * L, tmp);
    }
    free(tmp);
    return KV_OK;
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
            per_kv[(size_t)h * l->L + i] = sign * (float)kv_norm(l->d, x + ((size_t)h * l->scene->n_token + i) * l->d);
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
        double floor_norm = fmax(kv_norm(l->d, k), 1e-12);
        for (uint32_t j = 0; j < l->d; j++) anchor[j] += k[j] / floor_norm;
    }
    for (uint32_t j = 0; j < l->d; j++) anchor[j] /= n, square += anchor[j] * anchor[j];
    for (uint32_t i = 0; i < n; i++) {
        const float *k = keys + (size_t)(idx ? idx[i] : i) * l->d;
        double dot = 0;
        for (uint32_t j = 0; j < l->d; j++) dot += k[j] * anchor[j];
        score[i] = (float)-(dot / (fmax(kv_norm(l->d, k), 1e-8) * fmax(sqrt(square), 1e-8)));
    }
}
