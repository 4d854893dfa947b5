/* cur - CurDKV (arXiv 2509.15038, kvpress cur_press.py with its defaults: kv_product, local approximation, no random
 * projection). |k|^2 and |v|^2, each divided by its sum over an aligned window of local_window tokens; their product,
 * divided by its sum over the prompt. The first `sinks` score 1. A window of zero keys or values scores 0 (kvpress: NaN
 * for the whole head). */
#include <stdlib.h>

#include "sim/scorer.h"

/* to[i] = |x[i]|^2 / sum over the window of i. */
static void leverage(size_t L, size_t d, size_t window, const float *x, double *to)
{
    for (size_t a = 0; a < L; a += window) {
        size_t b = L - a < window ? L : a + window;
        double sum = 0;
        for (size_t i = a; i < b; i++) {
            to[i] = 0;
            for (size_t j = 0; j < d; j++) to[i] += (double)x[i * d + j] * x[i * d + j];
            sum += to[i];
        }
        for (size_t i = a; i < b; i++) to[i] = sum > 0 ? to[i] / sum : 0;
    }
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    size_t d = l->d, L = l->L;
    float *per_kv = NULL;
    double *k2 = NULL, *v2 = NULL;
    kv_status st = kv_array(&per_kv, l->n_kv_head * L, sizeof *per_kv, err);
    if (!st) st = kv_array(&k2, L, sizeof *k2, err);
    if (!st) st = kv_array(&v2, L, sizeof *v2, err);
    for (size_t h = 0; h < l->n_kv_head && !st; h++) {
        double sum = 0;
        leverage(L, d, s->local_window, l->k + h * l->scene->n_token * d, k2);
        leverage(L, d, s->local_window, l->v + h * l->scene->n_token * d, v2);
        for (size_t i = 0; i < L; i++) sum += k2[i] * v2[i];
        for (size_t i = 0; i < L; i++)
            per_kv[h * L + i] = i < s->sinks ? 1 : sum > 0 ? (float)(k2[i] * v2[i] / sum) : 0;
    }
    if (!st) kv_spread_kv(l, s, per_kv, out);
    free(per_kv), free(k2), free(v2);
    return st;
}

const kv_scorer kv_scorer_cur = {"cur",
                                 "squared norms of key and value, relative to their local window",
                                 "sinks local_window window",
                                 0,
                                 false,
                                 false,
                                 score};
