/* noncausal - column sums of attention in which every row of an aligned chunk sees the whole chunk, times |v|, smoothed
 * over three positions, z-scored (the attention part of Compactor, arXiv 2507.08143, kvpress
 * non_causal_attention_press.py at 8bb29b9). That snapshot's peculiarities are kept: logits are not scaled by
 * 1/sqrt(d); the zero keys that pad the last chunk are masked with -1e-9, that is not at all, so they take their share
 * of the softmax, and the zero queries beside them spread theirs evenly; mean and standard deviation of the z-score run
 * over all heads of the layer. The z-score moves no kept set within a layer.
 *
 * `pad` zero keys of logit 0 are one such key in kv_probs: with its share p0 the other shares shrink by 1 + (pad - 1)
 * p0. */
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/scorer.h"

enum { ROWS = 64 };

/* acc[j] += column sums of one chunk of n tokens, `pad` of them missing. k [n (+ 1 zero row when pad)][d]. */
static bool chunk_sums(size_t n, size_t pad, size_t d, const float *q, const float *k, float *p, double *acc)
{
    size_t n_key = n + (pad > 0);
    for (size_t j = 0; j < n; j++) acc[j] += (double)pad / (double)(n + pad); /* the zero queries */
    for (size_t r0 = 0; r0 < n; r0 += ROWS) {
        size_t m = n - r0 < ROWS ? n - r0 : ROWS;
        kv_attn_shape shape = {m, n_key, d, n_key, 0, 1, 0}; /* rows behind all keys see all of them */
        if (!kv_probs(&shape, q + r0 * d, k, p)) return false;
        for (size_t r = 0; r < m; r++) {
            double shrink = pad ? 1 + ((double)pad - 1) * p[r * n_key + n] : 1;
            for (size_t j = 0; j < n; j++) acc[j] += p[r * n_key + j] / shrink;
        }
    }
    return true;
}

static void z_score(size_t n, float *x)
{
    double mean = 0, var = 0;
    for (size_t i = 0; i < n; i++) mean += x[i];
    mean /= (double)n;
    for (size_t i = 0; i < n; i++) var += (x[i] - mean) * (x[i] - mean);
    double std = n > 1 ? sqrt(var / (double)(n - 1)) : 0;
    for (size_t i = 0; i < n; i++) x[i] = (float)((x[i] - mean) / (std < 1e-6 ? 1e-6 : std));
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    size_t d = l->d, L = l->L, size = s->chunk_size, n_max = size < L ? size : L, tail = L % size;
    float *per_head = NULL, *p = NULL, *last = NULL;
    double *acc = NULL;
    kv_status st = kv_array(&per_head, l->n_q_head * L, sizeof *per_head, err);
    if (!st) st = kv_array(&p, ROWS * (n_max + 1), sizeof *p, err);
    if (!st) st = kv_array(&last, (tail + 1) * d, sizeof *last, err);
    if (!st) st = kv_array(&acc, L, sizeof *acc, err);
    for (size_t h = 0; h < l->n_q_head && !st; h++) {
        const float *k = l->k + h / l->group * l->scene->n_token * d, *v = l->v + h / l->group * l->scene->n_token * d;
        const float *q = l->q_all + h * L * d;
        memset(acc, 0, L * sizeof *acc);
        memcpy(last, k + (L - tail) * d, tail * d * sizeof *last);
        for (size_t a = 0; a < L && !st; a += size) {
            size_t n = L - a < size ? L - a : size;
            if (!chunk_sums(n, size - n, d, q + a * d, n < size ? last : k + a * d, p, acc + a))
                st = kv_fail(err, KV_ENOMEM, "out of memory");
        }
        for (size_t i = 0; i < L; i++) {
            double v2 = 0;
            for (size_t j = 0; j < d; j++) v2 += (double)v[i * d + j] * v[i * d + j];
            per_head[h * L + i] = (float)(acc[i] * sqrt(v2));
        }
    }
    kv_spec fixed = *s; /* the mean over the group, then avg3, whatever the spec says about pooling */
    fixed.group_reduce = KV_GROUP_MEAN, fixed.pooling = KV_POOL_AVG, fixed.kernel = 3, fixed.pool_first = 0;
    if (!st) st = kv_reduce_heads(l, &fixed, L, per_head, out, err);
    if (!st) z_score(kv_unit_count(l, s->granularity) * L, out);
    free(per_head), free(p), free(last), free(acc);
    return st;
}

const kv_scorer kv_scorer_noncausal = {"noncausal",
                                       "column sums of two-sided attention in chunks, times the value's norm",
                                       "chunk_size window",
                                       KV_NEED_QUERIES,
                                       false,
                                       false,
                                       score};
