/* checkpoints.c - which counts the prefix points of a ranking ask for. */
#include <stdlib.h>

#include "sim/measure.h"

typedef struct {
    uint32_t count;
    size_t point;
} wish;

static int by_count(const void *a, const void *b)
{
    const wish *x = a, *y = b;
    if (x->count != y->count) return x->count < y->count ? -1 : 1;
    return (x->point > y->point) - (x->point < y->point);
}

void kv_checkpoints_free(kv_checkpoints *c, size_t n_unit)
{
    for (size_t u = 0; u < n_unit && c; u++) free(c[u].count), free(c[u].first), free(c[u].point);
    free(c);
}

kv_status kv_checkpoints_make(const kv_measure *m, size_t r, size_t from, size_t to, kv_checkpoints **out,
                              kv_error *err)
{
    size_t U = m->plan->ranking[r].n_unit, n = 0;
    wish *w = NULL;
    kv_checkpoints *c = NULL;
    *out = NULL;
    for (size_t i = from; i < to; i++)
        n += m->plan->ranking_of[m->point[i].spec] == r && !kv_schedule_used(m->plan, m->point[i].spec);
    kv_status st = kv_array(&c, U, sizeof *c, err);
    if (!st) st = kv_array(&w, n, sizeof *w, err);
    for (size_t u = 0; u < U && n && !st; u++) {
        st = kv_array(&c[u].count, n, sizeof *c->count, err);
        if (!st) st = kv_array(&c[u].first, n + 1, sizeof *c->first, err);
        if (!st) st = kv_array(&c[u].point, n, sizeof *c->point, err);
        if (st) break;
        size_t k = 0;
        for (size_t i = from; i < to; i++)
            if (m->plan->ranking_of[m->point[i].spec] == r && !kv_schedule_used(m->plan, m->point[i].spec))
                w[k++] = (wish){m->point[i].counts[m->l.order * U + u], i};
        qsort(w, n, sizeof *w, by_count);
        for (size_t i = 0; i < n; i++) {
            if (!i || w[i].count != w[i - 1].count) c[u].first[c[u].n] = i, c[u].count[c[u].n++] = w[i].count;
            c[u].point[i] = w[i].point;
        }
        c[u].first[c[u].n] = n;
    }
    free(w);
    if (st)
        kv_checkpoints_free(c, U);
    else
        *out = c;
    return st;
}
