/* maxclamp - the worst case of the window (DefensiveKV, arXiv 2510.13334; policies.md 8.1): every row of every query
 * head is smoothed and scaled back to the mass it had, a position scores its largest entry over the heads of the unit
 * and the rows, and no position scores less than the unit's mean. A row without any mass stays zero (0/0 in the
 * authors' code). */
#include <math.h>
#include <stdlib.h>

#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    size_t L = l->L, w = s->window < L ? s->window : L, n = L - w;
    const float *p;
    float *row = NULL, *tmp = NULL;
    double *best = NULL;
    kv_status st = kv_layer_probs(l, (uint32_t)w, &p, err);
    if (!st) st = kv_array(&row, n, sizeof *row, err);
    if (!st) st = kv_array(&tmp, n, sizeof *tmp, err);
    if (!st) st = kv_array(&best, n, sizeof *best, err);
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity) && !st; u++) {
        uint32_t first, count;
        double mean = 0;
        kv_unit_heads(l, s->granularity, u, &first, &count);
        memset(best, 0, n * sizeof *best);
        for (size_t r = first * w; r < (first + count) * w; r++) {
            double before = 0, after = 0;
            memcpy(row, p + r * L, n * sizeof *row);
            for (size_t i = 0; i < n; i++) before += row[i];
            kv_pool(s->pooling, s->kernel, n, row, tmp);
            for (size_t i = 0; i < n; i++) after += row[i];
            for (size_t i = 0; i < n && after > 0; i++) best[i] = fmax(best[i], row[i] / after * before);
        }
        for (size_t i = 0; i < n; i++) mean += best[i] / (double)n;
        for (size_t i = 0; i < n; i++) out[u * L + i] = (float)fmax(best[i], mean);
    }
    free(row), free(tmp), free(best);
    return st;
}

const kv_scorer kv_scorer_maxclamp = {"maxclamp",
                                      "largest attention over rows and heads, at least the mean",
                                      "window observe pooling kernel",
                                      KV_NEED_WINDOW,
                                      true,
                                      false,
                                      score};
