/* signif.h - counts and many tests at once: McNemar, Wilson, Holm, Benjamini-Hochberg. */
#ifndef KV_SIGNIF_H
#define KV_SIGNIF_H

#include "traces/base.h"

/* Exact McNemar test: two-sided p of `a` against `b` discordant pairs, each a fair coin. 1 without any. */
double kv_mcnemar(uint64_t a, uint64_t b);
/* Wilson's score interval of k successes in n; NaN for n = 0. */
void kv_wilson(uint64_t k, uint64_t n, double level, double *low, double *high);

/* Adjusted p-values, in place of p[0..n): NaN stays NaN and is not counted among the tests. Holm 1979 holds the chance
 * of any false claim, Benjamini & Hochberg 1995 the expected share of false ones among the claims. */
kv_status kv_holm(double *p, size_t n, kv_error *err);
kv_status kv_benjamini_hochberg(double *p, size_t n, kv_error *err);

#endif
