/* lag - LagKV (arXiv 2504.04704, kvpress lagkv_press.py without cross_scoring). Behind the sinks the prompt is cut into
 * chunks of lag_size. Each channel of a chunk is scaled by the minimum and maximum that the next chunk has in it; a
 * token's value is the standard deviation over channels (divisor d-1), softmaxed over the chunk, the mean of keys and
 * values. The score is the rank within the chunk over lag_size: all chunks have the same scores, so every cut ties
 * between chunks and our tie rule (lower position first) decides where kvpress leaves it to the sort. Sinks, the last
 * full chunk and the rest score 1. Below sinks + 2 lag_size tokens the score is recency. A channel that is constant in
 * the next chunk makes a chunk's values undefined there (0/0); here such a chunk ranks by position. */
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/query_stats.h"
#include "sim/scorer.h"

/* value[t] += half the softmaxed deviation of chunk x [n][d] against the chunk behind it; lo, hi [d]. */
static void add_states(size_t n, size_t d, const float *x, double *lo, double *hi, double *dev, double *value)
{
    const float *ref = x + n * d;
    double max = -INFINITY, sum = 0;
    for (size_t j = 0; j < d; j++) {
        lo[j] = hi[j] = ref[j];
        for (size_t t = 1; t < n; t++) {
            if (ref[t * d + j] < lo[j]) lo[j] = ref[t * d + j];
            if (ref[t * d + j] > hi[j]) hi[j] = ref[t * d + j];
        }
    }
    for (size_t t = 0; t < n; t++) {
        double mean = 0, var = 0;
        for (size_t j = 0; j < d; j++) mean += (x[t * d + j] - lo[j]) / (hi[j] - lo[j]);
        mean /= (double)d;
        for (size_t j = 0; j < d; j++) {
            double c = (x[t * d + j] - lo[j]) / (hi[j] - lo[j]) - mean;
            var += c * c;
        }
        dev[t] = sqrt(var / ((double)d - 1));
        if (!(dev[t] <= max)) max = dev[t]; /* keeps a NaN, which then fills the chunk */
        if (max != max) break;
    }
    for (size_t t = 0; t < n; t++) sum += dev[t] = max == max ? kv_exp_below(dev[t] - max) : max;
    for (size_t t = 0; t < n; t++) value[t] += dev[t] / sum / 2;
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    size_t d = l->d, L = l->L, n = s->lag_size, sinks = s->sinks;
    double *lo = NULL, *hi = NULL, *dev = NULL, *value = NULL;
    float *per_kv = NULL, *rounded = NULL;
    uint32_t *order = NULL;
    bool few = L < sinks + 2 * n;
    if (few) n = 1;
    kv_status st = kv_array(&per_kv, l->n_kv_head * L, sizeof *per_kv, err);
    if (!st) st = kv_array(&lo, d, sizeof *lo, err);
    if (!st) st = kv_array(&hi, d, sizeof *hi, err);
    if (!st) st = kv_array(&dev, n, sizeof *dev, err);
    if (!st) st = kv_array(&value, n, sizeof *value, err);
    if (!st) st = kv_array(&rounded, n, sizeof *rounded, err);
    if (!st) st = kv_array(&order, n, sizeof *order, err);
    for (size_t h = 0; h < l->n_kv_head && !st; h++) {
        const float *k = l->k + h * l->scene->n_token * d, *v = l->v + h * l->scene->n_token * d;
        float *to = per_kv + h * L;
        for (size_t i = 0; i < L; i++)
            to[i] = few && i >= sinks ? (float)((double)(i - sinks) / (double)(L - sinks)) : 1;
        for (size_t a = sinks; !few && a + 2 * n <= L && !st; a += n) {
            memset(value, 0, n * sizeof *value);
            add_states(n, d, k + a * d, lo, hi, dev, value);
            add_states(n, d, v + a * d, lo, hi, dev, value);
            for (size_t t = 0; t < n; t++) rounded[t] = (float)value[t];
            if (!kv_rank(n, rounded, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
            for (size_t t = 0; t < n && !st; t++) to[a + order[t]] = (float)(n - 1 - t) / (float)n;
        }
    }
    if (!st) kv_spread_kv(l, s, per_kv, out);
    free(per_kv), free(lo), free(hi), free(dev), free(value), free(rounded), free(order);
    return st;
}

const kv_scorer kv_scorer_lag = {
    "lag", "rank in its chunk by deviation against the next chunk's range", "sinks lag_size window", 0, false, false,
    score};
