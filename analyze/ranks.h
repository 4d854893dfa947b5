/* ranks.h - statistics on ranks: signed ranks of paired differences, rank correlations. */
#ifndef KV_RANKS_H
#define KV_RANKS_H

#include "traces/base.h"

/* rank[i] = 1..n by value, equal values share the mean of their ranks. No NaN. */
kv_status kv_ranks(const double *v, size_t n, double *rank, kv_error *err);

/* Wilcoxon's signed-rank test of n paired differences. Zeros are left out, as Wilcoxon did. */
typedef struct {
    size_t n;             /* differences that are not zero */
    double w_plus;        /* sum of the ranks of positive differences */
    double p;             /* two-sided; 1 for n = 0 */
    double rank_biserial; /* matched pairs: (W+ - W-) / (W+ + W-), in [-1, 1]; 0 for n = 0 */
    bool exact;
} kv_wilcoxon_result;
/* n <= exact_max: exact, over all 2^n signs of the ranks at hand, ties included; else normal with the variance
 * corrected for ties, no continuity correction. The program passes KV_WILCOXON_EXACT_MAX. */
#define KV_WILCOXON_EXACT_MAX 50u
kv_status kv_wilcoxon(const double *d, size_t n, size_t exact_max, kv_wilcoxon_result *out, kv_error *err);

/* Rank correlations of n pairs; NaN when n < 2 or one side is constant. */
kv_status kv_kendall_tau_b(const double *x, const double *y, size_t n, double *tau, kv_error *err);
kv_status kv_spearman(const double *x, const double *y, size_t n, double *rho, kv_error *err);

#endif
