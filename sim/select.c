/* select.c - value terms, chunks, two stages, blocks. */
#include "sim/select.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/scorer.h"

/* Mean over a KV head's query heads of ||v_i W_O[q]||_1, [n_kv_head][L] (policies.md 8.1). */
static kv_status projected_norms(const kv_layer *l, double *nu, kv_error *err)
{
    double *one = NULL;
    kv_status st = kv_array(&one, l->L, sizeof *one, err);
    for (uint32_t q = 0; q < l->n_q_head && !st; q++) {
        double *to = nu + (size_t)(q / l->group) * l->L;
        if (!kv_project_l1(l->L, l->d, l->scene->info->hidden, l->v + (size_t)(q / l->group) * l->scene->n_token * l->d, l->wo + (size_t)q * l->d,
                           (size_t)l->n_q_head * l->d, one))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (uint32_t i = 0; i < l->L && !st; i++) to[i] += one[i] / l->group;
    }
    free(one);
    return st;
}

static double value_norm(const kv_layer *l, uint32_t kv, uint32_t i, bool l1)
{
    const float *v = l->v + ((size_t)kv * l->scene->n_token + i) * l->d;
    double s = 0;
    for (uint32_t j = 0; j < l->d; j++) s += l1 ? fabs(v[j]) : (double)v[j] * v[j];
    return l1 ? s : sqrt(s);
}

kv_status kv_value_weight(const kv_layer *l, const kv_spec *s, uint32_t n, float *score, kv_error *err)
{
    double *w = NULL; /* [n_kv_head][L] */
    if (s->value == KV_VALUE_NONE) return KV_OK;
    kv_status st = kv_array(&w, (size_t)l->n_kv_head * l->L, sizeof *w, err);
    if (!st && s->value == KV_VALUE_WO_L1) st = projected_norms(l, w, err);
    for (uint32_t h = 0; h < l->n_kv_head && !st; h++) {
        double max = 0;
        for (uint32_t i = 0; i < n && s->value != KV_VALUE_WO_L1; i++) {
            w[(size_t)h * l->L + i] = value_norm(l, h, i, s->value == KV_VALUE_HEAD_MAX_L1);
            if (w[(size_t)h * l->L + i] > max) max = w[(size_t)h * l->L + i];
        }
        for (uint32_t i = 0; i < n && s->value == KV_VALUE_HEAD_MAX_L1; i++) w[(size_t)h * l->L + i] = max;
    }
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity) && !st; u++)
        for (uint32_t i = 0; i < n; i++) {
            double f = 0;
            uint32_t first, count;
            kv_unit_heads(l, s->granularity, u, &first, &count);
            for (uint32_t q = first; q < first + count; q++) f += w[(size_t)(q / l->group) * l->L + i];
            score[(size_t)u * l->L + i] = (float)(score[(size_t)u * l->L + i] * (f / count));
        }
    free(w);
    return st;
}

/* ------------------------------------------------------------------------------------------------ chunks */
kv_status kv_chunk_order(const kv_layer *l, const kv_spec *s, const float *score, uint32_t *order, float *sorted,
                         kv_error *err)
{
    uint32_t L = l->L, len = s->chunk_length, n = (L + len - 1) / len, U = kv_unit_count(l, s->granularity), w = s->window < L ? s->window : L, m = 0;
    float *mean = NULL, top = -INFINITY;
    uint32_t *best = NULL;
    kv_status st = kv_array(&mean, n, sizeof *mean, err);
    if (!st) st = kv_array(&best, n, sizeof *best, err);
    for (uint32_t u = 0; u < U && !st; u++)
        for (uint32_t i = 0; i + w < L; i++)
            if (score[(size_t)u * L + i] > top) top = score[(size_t)u * L + i];
    for (uint32_t c = 0; c < n && !st; c++) {
        uint32_t end = (c + 1) * len < L ? (c + 1) * len : L;
        double sum = 0;
        for (uint32_t i = c * len; i < end; i++)
            for (uint32_t u = 0; u < U; u++) sum += i + w < L ? score[(size_t)u * L + i] : top + 1;
        mean[c] = (float)(sum / (end - c * len));
    }
    if (!st && !kv_rank(n, mean, best)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    for (uint32_t c = 0; c < n && !st; c++)
        for (uint32_t i = best[c] * len; i < L && i < (best[c] + 1) * len; i++) sorted[m] = mean[best[c]], order[m++] = i;
    free(mean), free(best);
    return st;
}

uint32_t kv_chunk_count(const kv_spec *s, const uint32_t *order, uint32_t L, double share)
{
    uint32_t len = s->chunk_length, n = (L + len - 1) / len, keep = (uint32_t)(n * share), at = 0;
    if (keep < 1) keep = 1;
    for (uint32_t c = 0; c < keep && at < L; c++) at += L - order[at] < len ? L - order[at] : len;
    return at;
}

/* ------------------------------------------------------------------------------------------------ two stages */
kv_status kv_select_two_stage(const kv_plan *p, size_t i, const uint32_t *counts, kv_layer *l, int32_t *at, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    uint32_t L = l->L, nf = r->n_forced;
    size_t m = L - nf;
    double *nu = NULL;
    float *key = NULL, top = -INFINITY;
    uint32_t *second = NULL;
    bool *in = NULL;
    kv_status st = kv_array(&nu, (size_t)l->n_kv_head * L, sizeof *nu, err);
    if (!st) st = kv_array(&key, L, sizeof *key, err);
    if (!st) st = kv_array(&second, L, sizeof *second, err);
    if (!st) st = kv_array(&in, L, sizeof *in, err);
    if (!st) st = projected_norms(l, nu, err);
    for (uint32_t u = 0; u < r->n_unit && !st; u++)
        if (m && r->sorted[((size_t)l->order * r->n_unit + u) * m] > top) top = r->sorted[((size_t)l->order * r->n_unit + u) * m];
    for (uint32_t u = 0; u < r->n_unit && !st; u++) {
        const uint32_t *order = r->order + ((size_t)l->order * r->n_unit + u) * L;
        const float *sorted = r->sorted + ((size_t)l->order * r->n_unit + u) * m;
        uint32_t count = counts[(size_t)l->order * r->n_unit + u], first = (uint32_t)(count * s->first_stage_ratio), n = 0;
        memset(in, 0, L * sizeof *in);
        for (uint32_t k = 0; k < first; k++) in[order[k]] = true, n++;
        for (uint32_t k = 0; k < L; k++)
            key[order[k]] = (float)(((k < nf ? top + 1 : sorted[k - nf]) + (float)s->epsilon) * nu[(size_t)u * L + order[k]]);
        if (!kv_rank(L, key, second)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (uint32_t k = 0; k < L && n < count; k++)
            if (!in[second[k]]) in[second[k]] = true, n++;
        for (uint32_t k = 0; k < L && !st; k++)
            if (!in[k]) at[(size_t)u * l->scene->n_token + k] = 0;
    }
    free(nu), free(key), free(second), free(in);
    return st;
}

/* ------------------------------------------------------------------------------------------------ blocks */
/* score[j] = -cos(k_j, mean of the normalised keys) over n entries idx of a KV head. */
static void key_diversity(const kv_layer *l, uint32_t h, uint32_t n, const uint32_t *idx, double *anchor, float *score)
{
    const float *K = l->k + (size_t)h * l->scene->n_token * l->d;
    memset(anchor, 0, l->d * sizeof *anchor);
    for (uint32_t j = 0; j < n; j++) {
        const float *k = K + (size_t)idx[j] * l->d;
        double n2 = 0;
        for (uint32_t c = 0; c < l->d; c++) n2 += (double)k[c] * k[c];
        double inv = 1 / (n2 > 0 ? sqrt(n2) : 1e-12);
        for (uint32_t c = 0; c < l->d; c++) anchor[c] += k[c] * inv / n;
    }
    double a2 = 0;
    for (uint32_t c = 0; c < l->d; c++) a2 += anchor[c] * anchor[c];
    for (uint32_t j = 0; j < n; j++) {
        const float *k = K + (size_t)idx[j] * l->d;
        double dot = 0, n2 = 0;
        for (uint32_t c = 0; c < l->d; c++) dot += anchor[c] * k[c], n2 += (double)k[c] * k[c];
        double den = sqrt(a2) * sqrt(n2);
        score[j] = (float)(-dot / (den > 1e-8 ? den : 1e-8));
    }
}

kv_status kv_select_blocks(const kv_plan *p, size_t i, const kv_budget_resolved *c, kv_layer *l, int32_t *at, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    uint32_t L = l->L, C = c->tokens, *idx = NULL, *order = NULL, *next = NULL;
    float *score = NULL;
    double *anchor = NULL;
    kv_status st = kv_array(&idx, L, sizeof *idx, err);
    if (!st) st = kv_array(&order, L, sizeof *order, err);
    if (!st) st = kv_array(&next, L, sizeof *next, err);
    if (!st) st = kv_array(&score, L, sizeof *score, err);
    if (!st) st = kv_array(&anchor, l->d, sizeof *anchor, err);
    for (uint32_t h = 0; h < l->n_kv_head && !st; h++) {
        for (uint32_t k = 0; k < C; k++) idx[k] = k;
        for (uint32_t from = C; from < L && !st; from += s->block_size) {
            uint32_t end = from + s->block_size < L ? from + s->block_size : L, n = C;
            for (uint32_t k = from; k < end; k++) idx[n++] = k;
            key_diversity(l, h, n, idx, anchor, score);
            if (!kv_rank(n, score, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
            for (uint32_t k = 0; k < C && !st; k++) next[k] = idx[order[k]];
            memcpy(idx, next, C * sizeof *idx);
        }
        int32_t *to = at + (size_t)h * l->scene->n_token;
        for (uint32_t k = 0; k < L && !st; k++) to[k] = 0;
        for (uint32_t k = 0; k < C && !st; k++) to[idx[k]] = -1;
    }
    free(idx), free(order), free(next), free(score), free(anchor);
    return st;
}
