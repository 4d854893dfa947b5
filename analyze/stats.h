/* stats.h - statistics over prompts, as pure functions on arrays.
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

/* Arithmetic mean, summed in the order given; NaN for n = 0. */
double kv_mean(const double *v, size_t n);

/* Quantile q in [0, 1] of n >= 1 ascending values, linear between order statistics (NumPy's default, R's type 7). */
double kv_quantile(const double *sorted, size_t n, double q);

/* Sort ascending; NaN last. */
void kv_sort_doubles(double *v, size_t n);

typedef struct {
    double mean, low, high; /* low and high are NaN when there is no interval */
    bool has_interval;      /* false for n < 2: one prompt says nothing about the spread over prompts */
} kv_interval;

/* Mean and percentile bootstrap interval of n finite values (n < 2^32): `resamples` samples of n values drawn with
 * replacement, their means sorted, quantiles (1-level)/2 and (1+level)/2. Equal (v, seed) give equal bytes everywhere.
 * n = 0 gives NaN. KV_ENOMEM only. */
kv_status kv_bootstrap_mean(const double *v, size_t n, uint32_t resamples, uint64_t seed, double level,
                            kv_interval *out, kv_error *err);

#endif
