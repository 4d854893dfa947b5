/* rank.c - radix sort, least significant digit first: three passes of 11 bits over (key, position) pairs.
 * Every pass is stable and the positions start in order, so equal scores stay in order of position. */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <stdlib.h>

#define BITS    11
#define BUCKETS (1u << BITS)
#define FEW     64 /* below this an insertion sort beats clearing the counters */

typedef struct {
    uint32_t key, pos;
} item;

static void rank_few(size_t n, const float *score, uint32_t *order)
{
    uint32_t key[FEW];
    for (size_t i = 0; i < n; i++) {
        uint32_t x = kv_rank_key(score[i]);
        size_t j = i;
        for (; j > 0 && key[j - 1] > x; j--) key[j] = key[j - 1], order[j] = order[j - 1];
        key[j] = x, order[j] = (uint32_t)i;
    }
}

/* Counts to starting places; true when one bucket holds everything, and the pass would change nothing. */
static bool starts(uint32_t *count, size_t n)
{
    uint32_t at = 0;
    for (uint32_t b = 0; b < BUCKETS; b++) {
        uint32_t c = count[b];
        if (c == n) return true;
        count[b] = at;
        at += c;
    }
    return false;
}

bool kv_rank(size_t n, const float *score, uint32_t *order)
{
    if (n > UINT32_MAX) return false;
    if (n <= FEW) {
        rank_few(n, score, order);
        return true;
    }
    if (n > SIZE_MAX / (2 * sizeof(item)) - 3 * BUCKETS) return false;
    item *a = malloc(2 * n * sizeof *a + 3 * BUCKETS * sizeof(uint32_t));
    if (!a) return false;
    item *b = a + n;
    uint32_t *count = (uint32_t *)(b + n);
    memset(count, 0, 3 * BUCKETS * sizeof *count);
    for (size_t i = 0; i < n; i++) {
        uint32_t x = kv_rank_key(score[i]);
        a[i] = (item){x, (uint32_t)i};
        count[x % BUCKETS]++;
        count[BUCKETS + (x >> BITS) % BUCKETS]++;
        count[2 * BUCKETS + (x >> 2 * BITS)]++;
    }
    for (int pass = 0; pass < 3; pass++, count += BUCKETS) {
        if (starts(count, n)) continue;
        for (size_t i = 0; i < n; i++) b[count[a[i].key >> pass * BITS & (BUCKETS - 1)]++] = a[i];
        item *t = a;
        a = b, b = t;
    }
    for (size_t i = 0; i < n; i++) order[i] = a[i].pos;
    free(a < b ? a : b);
    return true;
}
