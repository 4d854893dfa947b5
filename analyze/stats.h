/* stats.h - means over prompts and their intervals, as pure functions on arrays.
 *
 * The prompt is the unit: heads, layers and rows of one prompt are not independent samples, so they are aggregated to
 * one number per prompt before anything here sees them (group.h does it). */
#ifndef KV_STATS_H
#define KV_STATS_H

#include "traces/base.h"

/* What every interval in this program uses; printed with the results. */
#define KV_BOOT_RESAMPLES 10000u
#define KV_BOOT_SEED      1u
#define KV_BOOT_LEVEL     0.95
#define KV_BOOT_BCA_BELOW 50u /* fewer prompts: BCa instead of percentile */

/* Arithmetic mean, summed in the order given; NaN for n = 0. */
double kv_mean(const double *v, size_t n);
/* Standard deviation with n - 1; NaN for n < 2. */
double kv_sd(const double *v, size_t n);

/* Quantile q in [0, 1] of n >= 1 ascending values, linear between order statistics (NumPy's default, R's type 7). */
double kv_quantile(const double *sorted, size_t n, double q);
/* The same of values in any order, which it rearranges. No NaN among them. */
double kv_quantile_of(double *v, size_t n, double q);

/* Sort ascending; NaN last. */
void kv_sort_doubles(double *v, size_t n);

/* ------------------------------------------------------------------------------------------------ bootstrap
 * `resamples` samples of n values drawn with replacement by kv_rng seeded with `seed`: equal (v, seed) give equal
 * bytes everywhere. n < 2^32 finite values; n < 2 gives no interval. KV_ENOMEM only. */
typedef struct {
    double mean, low, high; /* low and high are NaN when there is no interval */
    bool has_interval;      /* false for n < 2: one prompt says nothing about the spread over prompts */
} kv_interval;

/* Percentile interval: quantiles (1-level)/2 and (1+level)/2 of the resampled means. */
kv_status kv_bootstrap_mean(const double *v, size_t n, uint32_t resamples, uint64_t seed, double level,
                            kv_interval *out, kv_error *err);
/* BCa interval (Efron 1987): quantiles shifted for the bias of the resampled means and for the skew of v. */
kv_status kv_bootstrap_bca(const double *v, size_t n, uint32_t resamples, uint64_t seed, double level, kv_interval *out,
                           kv_error *err);
/* The interval of this program: KV_BOOT_*, BCa below KV_BOOT_BCA_BELOW values. */
kv_status kv_mean_interval(const double *v, size_t n, kv_interval *out, kv_error *err);

/* One-sided upper bound of the mean: studentised bootstrap (Efron & Tibshirani 1993, 12.5). The mean of 24 normal
 * values lies above it 5 % of the time and that of 24 exponential ones 6 %; the percentile bound fails 6 and 11 %, BCa
 * 6 and 8 %, Student's t 6 and 11 %. NaN for n < 2. */
kv_status kv_upper_bound(const double *v, size_t n, uint32_t resamples, uint64_t seed, double level, double *bound,
                         kv_error *err);

/* Two intervals of a mean over prompts that come in families, family[i] < n_family:
 *   these  for these families: prompts are drawn within each family. Deviations from the family's mean are stretched
 *          by sqrt(m / (m - 1)), m its prompts: plain resampling of two prompts shows half their variance. No interval
 *          when a family has one prompt, which says nothing about the spread inside it.
 *   fresh  for new families: families are drawn, then prompts within each. No interval for fewer than 2 families. */
kv_status kv_family_intervals(const double *v, const uint32_t *family, size_t n, size_t n_family, uint32_t resamples,
                              uint64_t seed, double level, kv_interval *these, kv_interval *fresh, kv_error *err);

/* Simultaneous band of n_point means over n prompts, v[point][prompt], whole prompts resampled: half-widths
 * half[point] = c * standard error of the point, c (*factor) = the `level` quantile of the largest |deviation| /
 * standard error over the points. Points without spread get half-width 0. NaN for n < 2. */
kv_status kv_band(const double *v, size_t n_point, size_t n, uint32_t resamples, uint64_t seed, double level,
                  double *half, double *factor, kv_error *err);

#endif
