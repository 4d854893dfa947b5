/* heads.c - one flat top-k over sorted lists, without merging them: the k-th largest score is found by bisection over
 * the order-preserving integer image of floats, each probe being one binary search per list. */
#include "sim/plan.h"

#include <stdlib.h>

#include "kernels/kernels.h"

static uint32_t key_of(float f)
{
    uint32_t u;
    if (f == 0) f = 0; /* -0 ties with +0 */
    memcpy(&u, &f, 4);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* Entries of a descending list whose key is >= k. */
static size_t at_least(const float *x, size_t m, float scale, bool scaled, uint32_t k)
{
    size_t lo = 0, hi = m;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (key_of(scaled ? x[mid] * scale : x[mid]) >= k)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

void kv_flat_topk(const float *sorted, size_t n_unit, size_t m, const float *scale, uint64_t k, uint32_t *won)
{
#define AT_LEAST(u, q) at_least(sorted + (u)*m, m, scale ? scale[u] : 1, scale != NULL, q)
    uint64_t above = 0;
    if (k >= (uint64_t)n_unit * m) {
        for (size_t u = 0; u < n_unit; u++) won[u] = (uint32_t)m;
        return;
    }
    /* the largest key that at least k entries reach; 0 is reached by all */
    uint32_t lo = 0, hi = UINT32_MAX;
    while (lo < hi) {
        uint32_t mid = (uint32_t)(((uint64_t)lo + hi + 1) / 2);
        uint64_t n = 0;
        for (size_t u = 0; u < n_unit; u++) n += AT_LEAST(u, mid);
        if (n >= k)
            lo = mid;
        else
            hi = mid - 1;
    }
    for (size_t u = 0; u < n_unit; u++) above += won[u] = lo == UINT32_MAX ? 0 : (uint32_t)AT_LEAST(u, lo + 1);
    for (size_t u = 0; u < n_unit && above < k; u++) { /* entries equal to the k-th: lowest unit first */
        size_t ties = AT_LEAST(u, lo) - won[u];
        if (ties > k - above) ties = (size_t)(k - above);
        won[u] += (uint32_t)ties;
        above += ties;
    }
#undef AT_LEAST
}

kv_status kv_layer_scales(const kv_ranking *r, uint32_t n, float **scale, kv_error *err)
{
    kv_status st = kv_array(scale, (size_t)n * r->n_unit, sizeof **scale, err);
    for (size_t k = 0; k < (size_t)n * r->n_unit && !st; k++) (*scale)[k] = (float)r->weight[k / r->n_unit];
    return st;
}

kv_status kv_duo_heads(const float *pattern, size_t n, uint64_t total, uint32_t all, uint32_t least, uint32_t *counts,
                       kv_error *err)
{
    uint32_t *order = NULL;
    size_t full = 0;
    kv_status st = kv_array(&order, n, sizeof *order, err);
    if (!st && !kv_rank(n, pattern, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (least > all) least = all;
    if (total < (uint64_t)n * least)
        least = (uint32_t)(total / n);
    else
        full = all > least ? (size_t)((total - (uint64_t)n * least) / (all - least)) : n;
    for (size_t k = 0; k < n && !st; k++) counts[order[k]] = k < full ? all : least;
    free(order);
    return st;
}
