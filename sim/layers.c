/* layers.c - how many slots each layer gets (policies.md 3.3, 4.3-4.5). */
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/plan.h"

static int64_t floor_div(int64_t a, int64_t b)
{
    int64_t q = a / b;
    return a % b && (a < 0) != (b < 0) ? q - 1 : q;
}

void kv_pyramid(int64_t B, int64_t beta, int64_t room, uint32_t n, int64_t *b)
{
    int64_t lo = floor_div(B, beta), hi = 2 * B - lo;
    if (hi >= room) hi = room, lo = 2 * B - hi;
    int64_t step = n > 1 ? floor_div(hi - lo, n - 1) : 0;
    for (uint32_t l = 0; l < n; l++) b[l] = hi - l * step;
}

/* Add (sign +1) or take (-1) `amount` equally from the layers that `may`, +1 to the first remainder ones. */
static void spread(int64_t amount, int64_t sign, uint32_t n, const int64_t *limit_by, int64_t limit, int64_t *b)
{
    int64_t members = 0, seen = 0;
    for (uint32_t i = 0; i < n; i++) members += sign > 0 ? limit_by[i] < limit : limit_by[i] > limit;
    if (!members) return;
    for (uint32_t i = 0; i < n; i++)
        if (sign > 0 ? limit_by[i] < limit : limit_by[i] > limit)
            b[i] += sign * (amount / members + (seen++ < amount % members));
}

kv_status kv_cake_adjust(const double *x, uint32_t n, int64_t total, int64_t cap, int64_t *b, kv_error *err)
{
    int64_t excess = 0, sum = 0, *was = NULL;
    kv_status st = kv_array(&was, n, sizeof *was, err);
    if (st) return st;
    for (uint32_t i = 0; i < n; i++) {
        b[i] = (int64_t)x[i];
        if (b[i] > cap) excess += b[i] - cap, b[i] = cap;
    }
    memcpy(was, b, n * sizeof *b);
    if (excess > 0) spread(excess, +1, n, was, cap, b);
    for (uint32_t i = 0; i < n; i++) sum += b[i];
    memcpy(was, b, n * sizeof *b);
    if (sum < total) spread(total - sum, +1, n, was, cap, b);
    if (sum > total) spread(sum - total, -1, n, was, 1, b);
    free(was);
    return KV_OK;
}

kv_status kv_cake_budgets(const double *preference, uint32_t n, int64_t total, int64_t cap, bool cascading, int64_t *b,
                          int64_t *lost, kv_error *err)
{
    int64_t *stage = NULL;
    double *x = NULL;
    kv_status st = kv_array(&stage, n, sizeof *stage, err);
    if (!st) st = kv_array(&x, n, sizeof *x, err);
    for (uint32_t l = 0; l < n; l++) b[l] = cap; /* nothing is cut yet */
    for (uint32_t l = cascading ? 0 : n - 1; l < n && !st; l++) {
        double sum = 0;
        for (uint32_t m = 0; m <= l; m++) sum += preference[m];
        for (uint32_t m = 0; m <= l; m++) /* no preference at all: equal shares instead of 0/0 */
            x[m] = sum > 0 ? preference[m] / sum * (double)total : (double)total / (l + 1);
        st = kv_cake_adjust(x, l + 1, total, cap, stage, err);
        for (uint32_t m = 0; m <= l && !st; m++) {
            int64_t c = stage[m] < cap ? stage[m] : cap;
            if (c < b[m]) b[m] = c > 0 ? c : 0;
        }
    }
    if (lost && !st) {
        *lost = total < cap * n ? total : cap * n;
        for (uint32_t l = 0; l < n; l++) *lost -= b[l];
    }
    free(stage), free(x);
    return st;
}

/* Squared distances from their mean of x[order[a..b)). */
static double scatter(const float *x, const uint32_t *order, uint32_t a, uint32_t b)
{
    double mean = 0, sum = 0;
    for (uint32_t k = a; k < b; k++) mean += x[order[k]] / (double)(b - a);
    for (uint32_t k = a; k < b; k++) sum += (x[order[k]] - mean) * (x[order[k]] - mean);
    return sum;
}

/* Classes of numbers on a line are runs of the sorted numbers: every pair of cuts is tried, the authors' k-means from
 * random centres finds the same or worse. Equal numbers are never parted. */
kv_status kv_squeeze_classes(const float *cosine, uint32_t n, bool *similar, kv_error *err)
{
    uint32_t *order = NULL, first = 0, distinct = n > 0;
    double best = INFINITY, *tail = NULL; /* tail[b] = scatter of order[b..n) */
    kv_status st = kv_array(&order, n, sizeof *order, err);
    if (!st) st = kv_array(&tail, n, sizeof *tail, err);
    if (!st && !kv_rank(n, cosine, order)) st = kv_fail(err, KV_ENOMEM, "out of memory"); /* descending */
    if (st) goto out;
#define CUT(k) (cosine[order[(k)-1]] != cosine[order[k]])
    for (uint32_t k = 1; k < n; k++) distinct += CUT(k);
    for (uint32_t b = 0; b < n; b++) tail[b] = scatter(cosine, order, b, n);
    for (uint32_t a = 1; a < n; a++) { /* order[0..a) is the class of largest cosine */
        if (!CUT(a)) continue;
        double head = scatter(cosine, order, 0, a);
        if (distinct == 2) first = a;
        for (uint32_t b = a + 1; b < n && distinct > 2; b++) {
            double sum = CUT(b) ? head + scatter(cosine, order, a, b) + tail[b] : INFINITY;
            if (sum < best) best = sum, first = a;
        }
    }
#undef CUT
    for (uint32_t k = 0; k < n; k++) similar[order[k]] = k < first;
out:
    free(order), free(tail);
    return st;
}

void kv_squeeze_budgets(const bool *similar, uint32_t n, double p, int64_t C, int64_t *b)
{
    uint32_t n3 = 0;
    for (uint32_t l = 0; l < n; l++) n3 += similar[l];
    double other = n3 < n ? (n - n3 * p) / (n - n3) : 1;
    for (uint32_t l = 0; l < n; l++) b[l] = (int64_t)((similar[l] ? p : other) * (double)C);
}
