/* contrast.h - everything we say about "A against B on these prompts" from paired differences: mean, intervals, signed
 * ranks, wins, non-inferiority. Prompts are the unit; metrics.md 6.3. */
#ifndef KV_CONTRAST_H
#define KV_CONTRAST_H

#include "analyze/grid.h"
#include "analyze/stats.h"

/* Fewer families than this: the interval for new families is said to be unreliable. */
#define KV_FAMILIES_ENOUGH   8u
#define KV_NONINFERIOR_LEVEL 0.95 /* one-sided */

typedef struct {
    size_t n, undefined, n_family;
    double mean_a, mean_b;
    kv_interval diff;         /* of A - B, over prompts */
    kv_interval these, fresh; /* these families, new families */
    double median, sd, d_z;   /* d_z = mean / sd; NaN where nothing varies */
    size_t wins, ties,
        losses;               /* of A: better by more than the tie margin ("better" = higher where nothing is better) */
    double win_low, win_high; /* Wilson interval of wins / (wins + losses) */
    bool binary;              /* every value is 0 or 1: the test is McNemar's */
    bool exact;               /* Wilcoxon's p is exact */
    double p, rank_biserial;  /* rank_biserial NaN for binary metrics */
    double p_holm;            /* over the comparisons reported together; = p until somebody adjusts it */
    double worse_bound; /* A is worse than B by less than this, one-sided 95 %; NaN for n < 2 or no better direction */
    double margin;      /* NaN = none stated */
    bool noninferior;   /* worse_bound < margin */
    double bytes_a, bytes_b; /* mean bytes kept; 0 for curves */
} kv_contrast;

/* better: +1 higher, -1 lower, 0 neither. tie >= 0. */
kv_status kv_contrast_of(const kv_pairs *p, int better, double tie, double margin, kv_contrast *out, kv_error *err);
/* Holm over c[0..n). */
kv_status kv_contrast_holm(kv_contrast *c, size_t n, kv_error *err);

#endif
