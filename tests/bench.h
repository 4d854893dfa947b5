/* bench.h - what the benches share: clocks, medians, CSV rows. */
#ifndef KV_BENCH_H
#define KV_BENCH_H

#include <stdio.h>
#include <stdlib.h>

#include "traces/base.h"

static inline int kv_ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts v[0..n). */
static inline double kv_median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof *v, kv_ascending);
    return v[n / 2];
}

/* name,what,median,min,unit of n values, which are sorted; returns the median. */
static inline double kv_bench_row(const char *name, const char *what, double *v, int n, const char *unit)
{
    double median = kv_median(v, n);
    printf("%s,%s,%.4g,%.4g,%s\n", name, what, median, v[0], unit);
    fflush(stdout);
    return median;
}

#endif
