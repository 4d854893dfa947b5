/* rank_ref.c - the order of a ranking by comparison sort. */
#include "kernels/kernels.h"

#include <stdlib.h>

typedef struct {
    float score;
    uint32_t pos;
} item;

static int order_of(const void *pa, const void *pb)
{
    const item *a = pa, *b = pb;
    bool na = a->score != a->score, nb = b->score != b->score; /* NaN: last */
    if (na != nb) return na ? 1 : -1;
    if (!na && a->score != b->score) return a->score > b->score ? -1 : 1;
    return a->pos < b->pos ? -1 : a->pos > b->pos;
}

bool kv_rank_ref(size_t n, const float *score, uint32_t *order)
{
    if (n > UINT32_MAX) return false;
    item *it = malloc((n + 1) * sizeof *it);
    if (!it) return false;
    for (size_t i = 0; i < n; i++) it[i] = (item){score[i], (uint32_t)i};
    qsort(it, n, sizeof *it, order_of);
    for (size_t i = 0; i < n; i++) order[i] = it[i].pos;
    free(it);
    return true;
}
