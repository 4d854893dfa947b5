/* stats.c - mean, quantile, percentile bootstrap (stats.h). */
#include "analyze/stats.h"

#include <math.h>
#include <stdlib.h>

double kv_mean(const double *v, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += v[i];
    return n ? sum / (double)n : NAN;
}

double kv_quantile(const double *sorted, size_t n, double q)
{
    double at = q * (double)(n - 1);
    size_t i = (size_t)at;
    if (i + 1 >= n) return sorted[n - 1];
    return sorted[i] + (at - (double)i) * (sorted[i + 1] - sorted[i]);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    if (isnan(x) || isnan(y)) return !!isnan(x) - !!isnan(y);
    return (x > y) - (x < y);
}

void kv_sort_doubles(double *v, size_t n)
{
    if (n > 1) qsort(v, n, sizeof *v, by_value);
}

kv_status kv_bootstrap_mean(const double *v, size_t n, uint32_t resamples, uint64_t seed, double level,
                            kv_interval *out, kv_error *err)
{
    *out = (kv_interval){.mean = kv_mean(v, n), .low = NAN, .high = NAN};
    if (n < 2 || !resamples) return KV_OK;
    double *means = NULL;
    kv_status st = kv_array(&means, resamples, sizeof *means, err);
    if (st) return st;
    kv_rng rng = {.s = seed};
    for (uint32_t b = 0; b < resamples; b++) {
        double sum = 0;
        /* The high 32 bits times n: a bias of n / 2^32, far below what 10,000 resamples resolve. */
        for (size_t i = 0; i < n; i++) sum += v[(size_t)((kv_rng_next(&rng) >> 32) * n >> 32)];
        means[b] = sum / (double)n;
    }
    kv_sort_doubles(means, resamples);
    out->low = kv_quantile(means, resamples, (1 - level) / 2);
    out->high = kv_quantile(means, resamples, (1 + level) / 2);
    out->has_interval = true;
    free(means);
    return KV_OK;
}
