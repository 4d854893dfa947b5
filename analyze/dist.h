/* dist.h - the distributions behind p-values, intervals and sample sizes, as pure functions of numbers. Checked against
 * SciPy in tests/golden/stats. */
#ifndef KV_DIST_H
#define KV_DIST_H

#include "traces/base.h"

double kv_normal_cdf(double z);
double kv_normal_quantile(double p); /* -INFINITY at 0, INFINITY at 1; Wichura 1988, algorithm AS 241 */
double kv_student_cdf(double t, double df);
double kv_student_quantile(double p, double df); /* 0 < p < 1 */
double kv_binomial_cdf(uint64_t k, uint64_t n);  /* P(X <= k) of n fair coins */

/* Power of the t-test on n >= 2 paired differences whose true mean is `effect` standard deviations: the probability
 * of p < alpha. sides 2: a difference in either direction; 1: above zero. */
double kv_t_power(double effect, double n, double alpha, int sides);
/* The least n with that power, or 0 when more than KV_POWER_N_MAX would be needed (effect 0, or near it). */
#define KV_POWER_N_MAX 10000000u
uint32_t kv_t_power_n(double effect, double power, double alpha, int sides);

#endif
