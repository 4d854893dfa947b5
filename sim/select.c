/* select.c - value terms, chunks, two stages, blocks. */
#include "sim/select.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/scorer.h"

static double value_norm(const kv_layer *l, uint32_t kv, uint32_t i, bool l1)
{
    const float *v = l->v + ((size_t)kv * l->scene->n_token + i) * l->d;
    double s = 0;
    for (uint32_t j = 0; j < l->d; j++) s += l1 ? fabs(v[j]) : (double)v[j] * v[j];
    return l1 ? s : sqrt(s);
}

/* Leave one out (CAOTE, arXiv 2504.14051; policies.md 1.2): dropping position i alone moves the output of a row by a_i
 * / (1 - a_i) *
 * ||o - v_i||. a is the mean row of the window, o what it gives. The factor of a unit is the mean of ||o - v_i|| / (1 -
 * a_i) over its query heads, weighted by their a_i, so that the group mean of a times the factor is exactly the group
 * mean of the errors. */
static kv_status leave_one_out(kv_layer *l, const kv_spec *s, uint32_t n, float *score, kv_error *err)
{
    uint32_t L = l->L, d = l->d, w = s->window < L ? s->window : L;
    const float *p;
    double *a = NULL, *o = NULL, *num = NULL, *den = NULL, *plain = NULL;
    kv_status st = kv_layer_probs(l, w, &p, err);
    if (!st) st = kv_array(&a, L, sizeof *a, err);
    if (!st) st = kv_array(&o, d, sizeof *o, err);
    if (!st) st = kv_array(&num, n, sizeof *num, err);
    if (!st) st = kv_array(&den, n, sizeof *den, err);
    if (!st) st = kv_array(&plain, n, sizeof *plain, err);
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity) && !st; u++) {
        uint32_t first, count;
        kv_unit_heads(l, s->granularity, u, &first, &count);
        memset(num, 0, n * sizeof *num), memset(den, 0, n * sizeof *den), memset(plain, 0, n * sizeof *plain);
        for (uint32_t q = first; q < first + count; q++) {
            const float *row = p + (size_t)q * w * L, *v = l->v + (size_t)(q / l->group) * l->scene->n_token * d;
            memset(a, 0, L * sizeof *a), memset(o, 0, d * sizeof *o);
            for (uint32_t r = 0; r < w; r++)
                for (uint32_t i = 0; i < L; i++) a[i] += row[(size_t)r * L + i];
            for (uint32_t i = 0; i < L; i++) {
                a[i] /= w;
                for (uint32_t j = 0; j < d; j++) o[j] += a[i] * v[(size_t)i * d + j];
            }
            for (uint32_t i = 0; i < n; i++) {
                double d2 = 0, rest = 1 - a[i] > 1e-9 ? 1 - a[i] : 1e-9; /* floats that round to 1 */
                for (uint32_t j = 0; j < d; j++) d2 += (o[j] - v[(size_t)i * d + j]) * (o[j] - v[(size_t)i * d + j]);
                num[i] += a[i] * (sqrt(d2) / rest), den[i] += a[i], plain[i] += sqrt(d2) / rest / count;
            }
        }
        for (uint32_t i = 0; i < n; i++)
            score[(size_t)u * L + i] = (float)(score[(size_t)u * L + i] * (den[i] > 0 ? num[i] / den[i] : plain[i]));
    }
    free(a), free(o), free(num), free(den), free(plain);
    return st;
}

kv_status kv_stream_weight(kv_layer *l, const kv_spec *s, double *weight, kv_error *err)
{
    uint32_t L = l->L, w = s->window && s->window < L ? s->window : L;
    const double *nu;
    double norm = 0, inverse = 0;
    float *x = NULL;
    kv_status st = kv_array(&x, w, sizeof *x, err);
    if (!st) st = kv_trace_read_f32(l->scene->trace, KV_S_XNORM, l->number, 0, L - w, L, x, err);
    if (!st) st = kv_layer_value_norms(l, &nu, err);
    for (size_t k = 0; k < (size_t)l->n_kv_head * L && !st; k++) norm += nu[k] / ((double)l->n_kv_head * L);
    for (uint32_t r = 0; r < w && !st; r++) inverse += x[r] > 0 ? 1 / (double)x[r] / w : 0;
    *weight = norm * inverse;
    free(x);
    return st;
}

static double unit_mean(const kv_layer *l, const kv_spec *s, const double *w, uint32_t u, uint32_t i)
{
    uint32_t first, count;
    double f = 0;
    kv_unit_heads(l, s->granularity, u, &first, &count);
    for (uint32_t q = first; q < first + count; q++) f += w[(size_t)(q / l->group) * l->L + i];
    return f / count;
}

kv_status kv_value_weight(kv_layer *l, const kv_spec *s, uint32_t n, float *score, kv_error *err)
{
    double *own = NULL;
    const double *w; /* [n_kv_head][L] */
    bool projected = s->value == KV_VALUE_WO_L1 || s->value == KV_VALUE_WO_SHARE;
    uint32_t U = kv_unit_count(l, s->granularity);
    if (s->value == KV_VALUE_NONE) return KV_OK;
    if (s->value == KV_VALUE_LOO) return leave_one_out(l, s, n, score, err);
    kv_status st =
        projected ? kv_layer_value_norms(l, &w, err) : kv_array(&own, (size_t)l->n_kv_head * l->L, sizeof *own, err);
    for (uint32_t h = 0; h < l->n_kv_head && !projected && !st; h++) {
        double max = 0;
        for (uint32_t i = 0; i < n; i++) {
            own[(size_t)h * l->L + i] = value_norm(l, h, i, s->value == KV_VALUE_HEAD_MAX_L1);
            if (own[(size_t)h * l->L + i] > max) max = own[(size_t)h * l->L + i];
        }
        for (uint32_t i = 0; i < n && s->value == KV_VALUE_HEAD_MAX_L1; i++) own[(size_t)h * l->L + i] = max;
    }
    if (!projected) w = own;
    for (uint32_t i = 0; i < n && !st; i++) {
        double sum = 0; /* all values zero: a share of nothing is nothing */
        for (uint32_t u = 0; u < U && s->value == KV_VALUE_WO_SHARE; u++) sum += unit_mean(l, s, w, u, i);
        for (uint32_t u = 0; u < U; u++) {
            double f = unit_mean(l, s, w, u, i);
            if (s->value == KV_VALUE_WO_SHARE) f = sum > 0 ? f / sum : 0;
            score[(size_t)u * l->L + i] = (float)(score[(size_t)u * l->L + i] * f);
        }
    }
    free(own);
    return st;
}

/* ------------------------------------------------------------------------------------------------ chunks */
kv_status kv_chunk_order(const kv_layer *l, const kv_spec *s, const float *score, uint32_t *order, float *sorted,
                         kv_error *err)
{
    uint32_t L = l->L, len = s->chunk_length, n = (L + len - 1) / len, U = kv_unit_count(l, s->granularity),
             w = s->window < L ? s->window : L, m = 0;
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
        for (uint32_t i = best[c] * len; i < L && i < (best[c] + 1) * len; i++)
            sorted[m] = mean[best[c]], order[m++] = i;
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
kv_status kv_second_order(kv_ranking *r, kv_layer *l, kv_error *err)
{
    uint32_t L = l->L, nf = r->n_forced;
    size_t m = L - nf, from = (size_t)l->order * r->n_unit;
    const double *nu;
    float *key = NULL, top = -INFINITY;
    kv_status st = kv_array(&key, L, sizeof *key, err);
    if (!st) st = kv_layer_value_norms(l, &nu, err);
    for (size_t u = from; u < from + r->n_unit && m; u++)
        if (r->sorted[u * m] > top) top = r->sorted[u * m];
    for (uint32_t u = 0; u < r->n_unit && !st; u++) {
        const uint32_t *order = r->order + (from + u) * L;
        const float *sorted = r->sorted + (from + u) * m;
        for (uint32_t k = 0; k < L; k++)
            key[order[k]] =
                (float)(((k < nf ? top + 1 : sorted[k - nf]) + (float)r->spec->epsilon) * nu[(size_t)u * L + order[k]]);
        if (!kv_rank(L, key, r->second + (from + u) * L)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    }
    free(key);
    return st;
}

kv_status kv_select_two_stage(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts,
                              const kv_layer *l, int32_t *at, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    uint32_t L = l->L;
    bool *in = NULL;
    kv_status st = kv_array(&in, L, sizeof *in, err);
    for (uint32_t u = 0; u < r->n_unit && !st; u++) {
        size_t unit = (size_t)l->order * r->n_unit + u;
        const uint32_t *order = r->order + unit * L, *second = r->second + unit * L;
        uint32_t count = counts[unit], first = (uint32_t)(count * s->first_stage_ratio), n = 0;
        uint32_t immune = s->heads == KV_HEADS_SAFEGUARD ? (uint32_t)(c->tokens * s->alpha) : 0;
        if (first < immune) first = immune < count ? immune : count; /* what the safeguard guaranteed stays */
        memset(in, 0, L * sizeof *in);
        for (uint32_t k = 0; k < first; k++) in[order[k]] = true, n++;
        for (uint32_t k = 0; k < L && n < count; k++)
            if (!in[second[k]]) in[second[k]] = true, n++;
        for (uint32_t k = 0; k < L; k++)
            if (!in[k]) at[(size_t)u * l->scene->n_token + k] = 0;
    }
    free(in);
    return st;
}

/* ------------------------------------------------------------------------------------------------ blocks */
kv_status kv_select_blocks(const kv_plan *p, size_t i, const kv_budget_resolved *c, kv_layer *l, int32_t *at,
                           kv_error *err)
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
            kv_key_diversity(l, h, n, idx, anchor, score);
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
