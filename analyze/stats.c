/* stats.c - mean, quantile, bootstrap intervals (stats.h). */
#include "analyze/stats.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/dist.h"

double kv_mean(const double *v, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += v[i];
    return n ? sum / (double)n : NAN;
}

double kv_sd(const double *v, size_t n)
{
    double m = kv_mean(v, n), sum = 0;
    for (size_t i = 0; i < n; i++) sum += (v[i] - m) * (v[i] - m);
    return n > 1 ? sqrt(sum / (double)(n - 1)) : NAN;
}

double kv_quantile(const double *sorted, size_t n, double q)
{
    double at = q * (double)(n - 1);
    size_t i = (size_t)at;
    if (i + 1 >= n) return sorted[n - 1];
    return sorted[i] + (at - (double)i) * (sorted[i + 1] - sorted[i]);
}

/* v[k] becomes the k-th smallest, nothing larger before it and nothing smaller behind it: quickselect with the values
 * equal to the pivot kept together. */
static void nth(double *v, size_t n, size_t k)
{
    for (size_t lo = 0, hi = n; hi - lo > 1;) {
        double pivot = v[lo + (hi - lo) / 2], t;
        size_t less = lo, i = lo, more = hi;
        while (i < more)
            if (v[i] < pivot)
                t = v[i], v[i++] = v[less], v[less++] = t;
            else if (v[i] > pivot)
                t = v[i], v[i] = v[--more], v[more] = t;
            else
                i++;
        if (k < less)
            hi = less;
        else if (k >= more)
            lo = more;
        else
            return;
    }
}

double kv_quantile_of(double *v, size_t n, double q)
{
    double at = q * (double)(n - 1);
    size_t i = (size_t)at;
    if (i + 1 >= n) i = n - 1;
    nth(v, n, i);
    if (i + 1 >= n) return v[i];
    double next = v[i + 1];
    for (size_t j = i + 2; j < n; j++)
        if (v[j] < next) next = v[j];
    return v[i] + (at - (double)i) * (next - v[i]);
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

/* One of n. The high 32 bits times n: a bias of n / 2^32, far below what 10,000 resamples resolve. */
static inline size_t draw(kv_rng *rng, size_t n)
{
    return (size_t)((kv_rng_next(rng) >> 32) * n >> 32);
}

static kv_status resampled_means(const double *v, size_t n, uint32_t resamples, uint64_t seed, double **out,
                                 kv_error *err)
{
    kv_status st = kv_array(out, resamples, sizeof **out, err);
    kv_rng rng = {.s = seed};
    for (uint32_t b = 0; b < resamples && !st; b++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += v[draw(&rng, n)];
        (*out)[b] = sum / (double)n;
    }
    return st;
}

static void interval_at(double *means, uint32_t resamples, double low, double high, kv_interval *out)
{
    out->low = kv_quantile_of(means, resamples, low);
    out->high = kv_quantile_of(means, resamples, high);
    out->has_interval = true;
}

kv_status kv_bootstrap_mean(const double *v, size_t n, uint32_t resamples, uint64_t seed, double level,
                            kv_interval *out, kv_error *err)
{
    *out = (kv_interval){.mean = kv_mean(v, n), .low = NAN, .high = NAN};
    if (n < 2 || !resamples) return KV_OK;
    double *means = NULL;
    kv_status st = resampled_means(v, n, resamples, seed, &means, err);
    if (!st) interval_at(means, resamples, (1 - level) / 2, (1 + level) / 2, out);
    free(means);
    return st;
}

kv_status kv_bootstrap_bca(const double *v, size_t n, uint32_t resamples, uint64_t seed, double level, kv_interval *out,
                           kv_error *err)
{
    *out = (kv_interval){.mean = kv_mean(v, n), .low = NAN, .high = NAN};
    if (n < 2 || !resamples) return KV_OK;
    double *means = NULL, below = 0, cubes = 0, squares = 0;
    kv_status st = resampled_means(v, n, resamples, seed, &means, err);
    if (st) return st;
    /* bias: where the mean stands among the resampled ones, ties counted half */
    for (uint32_t b = 0; b < resamples; b++) below += means[b] < out->mean ? 1 : means[b] == out->mean ? 0.5 : 0;
    /* acceleration: for a mean, the jackknife values are its deviations / (n - 1) */
    for (size_t i = 0; i < n; i++) {
        double d = v[i] - out->mean;
        cubes += d * d * d, squares += d * d;
    }
    double z0 = kv_normal_quantile(below / resamples), a = squares > 0 ? cubes / (6 * squares * sqrt(squares)) : 0;
    double at[2];
    for (int k = 0; k < 2; k++) {
        double z = z0 + kv_normal_quantile(k ? (1 + level) / 2 : (1 - level) / 2);
        at[k] = kv_normal_cdf(z0 + z / (1 - a * z));
    }
    if (!(at[0] >= 0 && at[1] <= 1)) at[0] = (1 - level) / 2, at[1] = (1 + level) / 2; /* all values equal */
    interval_at(means, resamples, at[0], at[1], out);
    free(means);
    return KV_OK;
}

kv_status kv_mean_interval(const double *v, size_t n, kv_interval *out, kv_error *err)
{
    return (n < KV_BOOT_BCA_BELOW ? kv_bootstrap_bca : kv_bootstrap_mean)(v, n, KV_BOOT_RESAMPLES, KV_BOOT_SEED,
                                                                          KV_BOOT_LEVEL, out, err);
}

/* (mean of the drawn values - mean) / their own standard error, but no less than SPREAD_LEAST of se, that of v: where
 * few prompts differ from zero, draws without any of them have no spread, and the quotient no limit. With 0.2 the bound
 * of normal and exponential values is what it is with 0. */
#define SPREAD_LEAST 0.2
static double studentised(const double *v, const size_t *pick, size_t n, double mean, double se)
{
    double sum = 0, squares = 0; /* of deviations, so that the difference of sums keeps its digits */
    for (size_t i = 0; i < n; i++) {
        double d = v[pick[i]] - mean;
        sum += d, squares += d * d;
    }
    double m = sum / (double)n, var = (squares - sum * m) / (double)(n - 1) / (double)n, least = SPREAD_LEAST * se;
    return m / sqrt(fmax(var, least * least));
}

kv_status kv_upper_bound(const double *v, size_t n, uint32_t resamples, uint64_t seed, double level, double *bound,
                         kv_error *err)
{
    size_t *pick = NULL;
    double *t = NULL, mean = kv_mean(v, n), se = kv_sd(v, n) / sqrt((double)n);
    bool some = se > 1e-14 * fabs(mean); /* else the values are equal, but for rounding */
    *bound = NAN;
    if (n < 2 || !resamples) return KV_OK;
    kv_status st = kv_array(&t, resamples, sizeof *t, err);
    if (!st) st = kv_array(&pick, n, sizeof *pick, err);
    kv_rng rng = {.s = seed};
    for (uint32_t b = 0; b < resamples && !st; b++) {
        for (size_t i = 0; i < n; i++) pick[i] = draw(&rng, n);
        t[b] = some ? studentised(v, pick, n, mean, se) : 0;
    }
    if (!st) *bound = mean - (some ? kv_quantile_of(t, resamples, 1 - level) * se : 0);
    free(t), free(pick);
    return st;
}

/* Prompts of each family one after the other: at[f] .. at[f + 1] in order[]. */
static void by_family(const uint32_t *family, size_t n, size_t n_family, size_t *at, size_t *order)
{
    for (size_t f = 0; f <= n_family; f++) at[f] = 0;
    for (size_t i = 0; i < n; i++) at[family[i] + 1]++;
    for (size_t f = 0; f < n_family; f++) at[f + 1] += at[f];
    for (size_t f = 0, k = 0; f < n_family; f++)
        for (size_t i = 0; i < n; i++)
            if (family[i] == f) order[k++] = i;
}

kv_status kv_family_intervals(const double *v, const uint32_t *family, size_t n, size_t n_family, uint32_t resamples,
                              uint64_t seed, double level, kv_interval *these, kv_interval *fresh, kv_error *err)
{
    size_t *at = NULL, *order = NULL, single = 0, used = 0;
    double *means = NULL, *centre = NULL;
    kv_status st;
    *these = *fresh = (kv_interval){.mean = kv_mean(v, n), .low = NAN, .high = NAN};
    if ((st = kv_array(&at, n_family + 1, sizeof *at, err)) || (st = kv_array(&order, n, sizeof *order, err)) ||
        (st = kv_array(&means, resamples, sizeof *means, err)) ||
        (st = kv_array(&centre, n_family, sizeof *centre, err)))
        goto out;
    by_family(family, n, n_family, at, order);
    for (size_t f = 0; f < n_family; f++) {
        size_t m = at[f + 1] - at[f];
        single += m == 1, used += m > 0;
        for (size_t i = at[f]; i < at[f + 1]; i++) centre[f] += v[order[i]] / (double)m;
    }
    if (n && !single) {
        kv_rng rng = {.s = seed};
        for (uint32_t b = 0; b < resamples; b++) {
            double sum = 0;
            for (size_t f = 0; f < n_family; f++) {
                size_t m = at[f + 1] - at[f];
                double own = 0;
                for (size_t i = 0; i < m; i++) own += v[order[at[f] + draw(&rng, m)]] - centre[f];
                sum += m ? own * sqrt((double)m / (double)(m - 1)) + (double)m * centre[f] : 0;
            }
            means[b] = sum / (double)n;
        }
        interval_at(means, resamples, (1 - level) / 2, (1 + level) / 2, these);
    }
    if (used > 1) {
        kv_rng rng = {.s = seed};
        for (size_t f = 0, k = 0; f < n_family; f++) /* at[] keeps the families that have prompts */
            if (at[f + 1] > at[f]) at[k++] = at[f], at[k] = at[f + 1];
        for (uint32_t b = 0; b < resamples; b++) {
            double sum = 0;
            size_t count = 0;
            for (size_t k = 0; k < used; k++) {
                size_t f = draw(&rng, used), m = at[f + 1] - at[f];
                for (size_t i = 0; i < m; i++) sum += v[order[at[f] + draw(&rng, m)]];
                count += m;
            }
            means[b] = sum / (double)count;
        }
        interval_at(means, resamples, (1 - level) / 2, (1 + level) / 2, fresh);
    }
out:
    free(at), free(order), free(means), free(centre);
    return st;
}

kv_status kv_band(const double *v, size_t n_point, size_t n, uint32_t resamples, uint64_t seed, double level,
                  double *half, double *factor, kv_error *err)
{
    size_t *pick = NULL;
    double *largest = NULL, *mean = NULL;
    kv_status st;
    *factor = NAN;
    for (size_t k = 0; k < n_point; k++) half[k] = NAN;
    if (n < 2 || !resamples) return KV_OK;
    if ((st = kv_array(&pick, n, sizeof *pick, err)) || (st = kv_array(&largest, resamples, sizeof *largest, err)) ||
        (st = kv_array(&mean, n_point, sizeof *mean, err)))
        goto out;
    for (size_t k = 0; k < n_point; k++) {
        mean[k] = kv_mean(v + k * n, n);
        half[k] = kv_sd(v + k * n, n) / sqrt((double)n);
        if (!(half[k] > 1e-14 * fabs(mean[k]))) half[k] = 0; /* equal values, but for rounding */
    }
    kv_rng rng = {.s = seed};
    for (uint32_t b = 0; b < resamples; b++) {
        for (size_t i = 0; i < n; i++) pick[i] = draw(&rng, n);
        for (size_t k = 0; k < n_point; k++) {
            if (!(half[k] > 0)) continue;
            double sum = 0;
            for (size_t i = 0; i < n; i++) sum += v[k * n + pick[i]];
            double t = fabs(sum / (double)n - mean[k]) / half[k];
            if (t > largest[b]) largest[b] = t;
        }
    }
    /* resampled means spread by sqrt((n - 1) / n) too little */
    *factor = kv_quantile_of(largest, resamples, level) * sqrt((double)n / (double)(n - 1));
    for (size_t k = 0; k < n_point; k++) half[k] = half[k] > 0 ? half[k] * *factor : 0;
out:
    free(pick), free(largest), free(mean);
    return st;
}
