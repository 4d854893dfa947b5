/* signif.c - McNemar, Wilson, Holm, Benjamini-Hochberg (signif.h). */
#include "analyze/signif.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/dist.h"

double kv_mcnemar(uint64_t a, uint64_t b)
{
    return a + b ? fmin(1, 2 * kv_binomial_cdf(a < b ? a : b, a + b)) : 1;
}

void kv_wilson(uint64_t k, uint64_t n, double level, double *low, double *high)
{
    double z = kv_normal_quantile((1 + level) / 2), m = (double)n, share = (double)k / m, zz = z * z;
    double mid = (share + zz / (2 * m)) / (1 + zz / m);
    double half = z / (1 + zz / m) * sqrt(share * (1 - share) / m + zz / (4 * m * m));
    *low = n ? k ? mid - half : 0 : NAN;
    *high = n ? k < n ? mid + half : 1 : NAN;
}

typedef struct {
    double p;
    size_t at;
} test;

static int by_p(const void *a, const void *b)
{
    const test *x = a, *y = b;
    if (x->p != y->p) return x->p < y->p ? -1 : 1;
    return (x->at > y->at) - (x->at < y->at);
}

/* The p-values that are numbers, ascending. free(*out). */
static kv_status ascending(const double *p, size_t n, test **out, size_t *m, kv_error *err)
{
    kv_status st = kv_array(out, n, sizeof **out, err);
    *m = 0;
    for (size_t i = 0; i < n && !st; i++)
        if (!isnan(p[i])) (*out)[(*m)++] = (test){p[i], i};
    if (!st && *m > 1) qsort(*out, *m, sizeof **out, by_p);
    return st;
}

kv_status kv_holm(double *p, size_t n, kv_error *err)
{
    test *t;
    size_t m;
    double least = 0;
    kv_status st = ascending(p, n, &t, &m, err);
    if (st) return st;
    for (size_t i = 0; i < m; i++) p[t[i].at] = least = fmin(1, fmax(least, (double)(m - i) * t[i].p));
    free(t);
    return KV_OK;
}

kv_status kv_benjamini_hochberg(double *p, size_t n, kv_error *err)
{
    test *t;
    size_t m;
    double most = 1;
    kv_status st = ascending(p, n, &t, &m, err);
    if (st) return st;
    for (size_t i = m; i-- > 0;) p[t[i].at] = most = fmin(most, t[i].p * (double)m / (double)(i + 1));
    free(t);
    return KV_OK;
}
