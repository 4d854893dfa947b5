/* keydiff - minus the cosine between a key and the mean direction of all keys of its head (KeyDiff, arXiv 2504.15364,
 * as kvpress runs it: one anchor for the whole prompt; the paper's is recomputed block by block). Norms have the floors
 * of torch's normalize (1e-12) and cosine_similarity (1e-8), so a zero key scores 0. */
#include <math.h>
#include <stdlib.h>

#include "sim/scorer.h"

static double norm(size_t d, const double *x)
{
    double sum = 0;
    for (size_t j = 0; j < d; j++) sum += x[j] * x[j];
    return sqrt(sum);
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    size_t d = l->d, L = l->L;
    float *per_kv = NULL;
    double *anchor = NULL, *k = NULL;
    kv_status st = kv_array(&per_kv, l->n_kv_head * L, sizeof *per_kv, err);
    if (!st) st = kv_array(&anchor, d, sizeof *anchor, err);
    if (!st) st = kv_array(&k, d, sizeof *k, err);
    for (size_t h = 0; h < l->n_kv_head && !st; h++) {
        const float *keys = l->k + h * l->scene->n_token * d;
        memset(anchor, 0, d * sizeof *anchor);
        for (size_t i = 0; i < L; i++) {
            for (size_t j = 0; j < d; j++) k[j] = keys[i * d + j];
            double n = fmax(norm(d, k), 1e-12);
            for (size_t j = 0; j < d; j++) anchor[j] += k[j] / n;
        }
        for (size_t j = 0; j < d; j++) anchor[j] /= (double)L;
        double n_anchor = fmax(norm(d, anchor), 1e-8);
        for (size_t i = 0; i < L; i++) {
            double dot = 0;
            for (size_t j = 0; j < d; j++) k[j] = keys[i * d + j], dot += k[j] * anchor[j];
            per_kv[h * L + i] = (float)-(dot / (fmax(norm(d, k), 1e-8) * n_anchor));
        }
    }
    if (!st) kv_spread_kv(l, s, per_kv, out);
    free(per_kv), free(anchor), free(k);
    return st;
}

const kv_scorer kv_scorer_keydiff = {
    "keydiff", "minus the cosine of the key with the mean key direction", "window", 0, false, false, score};
