/* oracle_counts.c - the best counts for a given order: what the oracle's split over heads and layers adds. */
#include <stdlib.h>

#include "sim/oracle.h"

/* ------------------------------------------------------------------------------------------------ hulls */
typedef struct {
    double slope;
    uint32_t list, from, to;
} segment;

static int steepest_first(const void *a, const void *b)
{
    const segment *x = a, *y = b;
    if (x->slope != y->slope) return x->slope < y->slope ? 1 : -1;
    if (x->list != y->list) return x->list < y->list ? -1 : 1;
    return (x->from > y->from) - (x->from < y->from);
}

/* Segments of the upper hull of the list's sums, appended to seg; sum [len + 1] is scratch. Returns how many. */
static size_t hull(const float *gain, uint32_t list, uint32_t len, double *sum, segment *seg)
{
    size_t n = 0;
    sum[0] = 0;
    for (uint32_t j = 0; j < len; j++) {
        sum[j + 1] = sum[j] + gain[j];
        segment s = {gain[j], list, j, j + 1};
        while (n && seg[n - 1].slope < s.slope) { /* equal ones stay apart: short segments fit better */
            s.from = seg[--n].from;
            s.slope = (sum[s.to] - sum[s.from]) / (s.to - s.from);
        }
        seg[n++] = s;
    }
    return n;
}

kv_status kv_hull_alloc(const float *gain, size_t n, size_t m, const uint32_t *len, uint64_t k, uint32_t *won,
                        kv_error *err)
{
    segment *seg = NULL;
    double *sum = NULL;
    size_t n_seg = 0, room = 0;
    for (size_t i = 0; i < n; i++) won[i] = 0, room += len[i];
    if (k > room) k = room;
    kv_status st = kv_array(&seg, room, sizeof *seg, err);
    if (!st) st = kv_array(&sum, m + 1, sizeof *sum, err);
    for (size_t i = 0; i < n && !st; i++) n_seg += hull(gain + i * m, (uint32_t)i, len[i], sum, seg + n_seg);
    if (!st) qsort(seg, n_seg, sizeof *seg, steepest_first);
    for (size_t s = 0; s < n_seg && !st && k; s++) {
        uint32_t size = seg[s].to - seg[s].from;
        if (size > k || won[seg[s].list] != seg[s].from) continue; /* a list ends where a segment did not fit */
        won[seg[s].list] = seg[s].to, k -= size;
    }
    while (k && !st) {
        double best = -1;
        size_t list = 0;
        uint32_t take = 0;
        for (size_t i = 0; i < n; i++) {
            double x = 0;
            for (uint32_t j = 1; j <= k && won[i] + j <= len[i]; j++) {
                x += gain[i * m + won[i] + j - 1];
                if (x / j > best) best = x / j, list = i, take = j;
            }
        }
        if (!take) take = 1; /* gains that are not numbers: any list with room */
        while (won[list] + take > len[list]) list++;
        won[list] += take, k -= take;
    }
    free(seg), free(sum);
    return st;
}

/* ------------------------------------------------------------------------------------------------ counts of a model */
typedef struct {
    const kv_plan *plan;
    const kv_ranking *order, *future; /* what the policy keeps in order; mass by item */
    uint32_t n, U, m, nf;             /* layers, units, items behind the protected ones, protected ones */
    float *gain;                      /* [n][U][m] along the order */
    uint32_t *len, *own, *won;        /* [n][U] items to give, the policy's, the best found; without protected ones */
    uint32_t *layered;                /* [n][U] best when only layers move */
} space;

/* Future mass of the items behind the protected ones, along the order of the kept sets. */
static kv_status gains(space *x, kv_error *err)
{
    uint32_t L = x->plan->scene->n_cut, page = x->order->spec->page;
    float *mass = NULL;
    kv_status st = kv_array(&mass, x->order->n_item, sizeof *mass, err);
    for (size_t u = 0; u < (size_t)x->n * x->U && !st; u++) {
        const uint32_t *from = x->future->order + u * L, *to = x->order->order + u * L;
        for (uint32_t k = 0, at = 0; k < x->order->n_item; k++) { /* items in the order of their first entry */
            uint32_t item = from[at] / page, size = L - item * page < page ? L - item * page : page;
            if (k >= x->nf) mass[item] = x->future->sorted[u * x->m + k - x->nf];
            at += size;
        }
        for (uint32_t k = 0, at = 0; k < x->order->n_item; k++) {
            uint32_t item = to[at] / page, size = L - item * page < page ? L - item * page : page;
            if (k >= x->nf) x->gain[u * x->m + k - x->nf] = mass[item];
            at += size;
        }
    }
    free(mass);
    return st;
}

static double value(const space *x, size_t from, size_t to, const uint32_t *count)
{
    double sum = 0;
    for (size_t u = from; u < to; u++)
        for (uint32_t k = 0; k < count[u]; k++) sum += x->gain[u * x->m + k];
    return sum;
}

/* The best split of the slots that units from..to-1 hold together; never worse than the policy's own. */
static kv_status best_units(space *x, size_t from, size_t to, kv_error *err)
{
    uint64_t k = 0;
    for (size_t u = from; u < to; u++) k += x->own[u];
    kv_status st = kv_hull_alloc(x->gain + from * x->m, to - from, x->m, x->len + from, k, x->won + from, err);
    if (!st && value(x, from, to, x->won) < value(x, from, to, x->own))
        memcpy(x->won + from, x->own + from, (to - from) * sizeof *x->won);
    return st;
}

/* The unit of a layer that gets the next slot, when slots go by the policy's proportions: the highest quotient of
 * Webster's method, which gives every unit exactly its own at the policy's total. Units without a share come last. */
static uint32_t next_unit(const space *x, uint32_t layer, const uint32_t *given)
{
    uint32_t best = UINT32_MAX;
    double least = 0;
    for (uint32_t u = 0; u < x->U; u++) {
        size_t at = (size_t)layer * x->U + u;
        if (given[at] >= x->len[at]) continue;
        double q = x->own[at] ? (given[at] + 0.5) / x->own[at] : 1e9 + given[at];
        if (best == UINT32_MAX || q < least) best = u, least = q;
    }
    return best;
}

/* The best totals of the layers when every layer shares its own in the policy's proportions. */
static kv_status best_layers(space *x, kv_error *err)
{
    size_t wide = (size_t)x->U * x->m;
    float *gain = NULL;
    uint32_t *len = NULL, *total = NULL;
    uint64_t k = 0;
    kv_status st = kv_array(&gain, x->n * wide, sizeof *gain, err);
    if (!st) st = kv_array(&len, x->n, sizeof *len, err);
    if (!st) st = kv_array(&total, x->n, sizeof *total, err);
    for (uint32_t l = 0; l < x->n && !st; l++) {
        uint32_t u;
        for (u = 0; u < x->U; u++) k += x->own[(size_t)l * x->U + u], x->won[(size_t)l * x->U + u] = 0;
        while ((u = next_unit(x, l, x->won)) != UINT32_MAX) {
            size_t at = (size_t)l * x->U + u;
            gain[l * wide + len[l]++] = x->gain[at * x->m + x->won[at]++];
        }
    }
    if (!st) st = kv_hull_alloc(gain, x->n, wide, len, k, total, err);
    for (size_t u = 0; u < (size_t)x->n * x->U && !st; u++) x->won[u] = 0;
    for (uint32_t l = 0; l < x->n && !st; l++)
        for (uint32_t j = 0; j < total[l]; j++) x->won[(size_t)l * x->U + next_unit(x, l, x->won)]++;
    if (!st && value(x, 0, (size_t)x->n * x->U, x->won) < value(x, 0, (size_t)x->n * x->U, x->own))
        memcpy(x->won, x->own, (size_t)x->n * x->U * sizeof *x->won);
    free(gain), free(len), free(total);
    return st;
}

kv_status kv_oracle_counts(const kv_plan *p, size_t i, uint32_t *counts, kv_error *err)
{
    uint32_t parts = p->spec[i].oracle;
    const kv_ranking *order = &p->ranking[p->ranking_of[i]];
    space x = {.plan = p,
               .order = order,
               .future = &p->ranking[p->future_of[i]],
               .n = p->scene->n_evict,
               .U = order->n_unit,
               .m = order->n_item - order->n_forced,
               .nf = order->n_forced};
    size_t all = (size_t)x.n * x.U;
    if (!x.m) return KV_OK;
    kv_status st = kv_array(&x.gain, all * x.m, sizeof *x.gain, err);
    if (!st) st = kv_array(&x.len, all, sizeof *x.len, err);
    if (!st) st = kv_array(&x.own, all, sizeof *x.own, err);
    if (!st) st = kv_array(&x.won, all, sizeof *x.won, err);
    if (!st) st = kv_array(&x.layered, all, sizeof *x.layered, err);
    if (!st) st = gains(&x, err);
    for (size_t u = 0; u < all && !st; u++)
        if (counts[u] >= x.nf) x.len[u] = x.m, x.own[u] = counts[u] - x.nf;
    /* each step starts from the best so far, so that more freedom never costs anything */
    if (!st && parts & KV_ORACLE_LAYERS) st = best_layers(&x, err);
    if (!st && parts & KV_ORACLE_HEADS && parts & KV_ORACLE_LAYERS) {
        memcpy(x.layered, x.won, all * sizeof *x.won);
        for (size_t u = 0; u < all && !st; u += x.U) st = best_units(&x, u, u + x.U, err);
        memcpy(x.own, value(&x, 0, all, x.won) < value(&x, 0, all, x.layered) ? x.layered : x.won, all * sizeof *x.own);
        if (!st) st = best_units(&x, 0, all, err);
    } else if (!st && parts & KV_ORACLE_HEADS) {
        for (size_t u = 0; u < all && !st; u += x.U) st = best_units(&x, u, u + x.U, err);
    }
    for (size_t u = 0; u < all && !st; u++)
        if (x.len[u]) counts[u] = x.nf + x.won[u];
    free(x.gain), free(x.len), free(x.own), free(x.won), free(x.layered);
    return st;
}
