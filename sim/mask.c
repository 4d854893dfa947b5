/* mask.c - kept sets from and to .npy files. */
#include "sim/mask.h"

#include <stdlib.h>

#include "sim/schedule.h"
#include "traces/npy.h"

kv_status kv_mask_ranking(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err)
{
    const kv_trace_info *in = sc->info;
    kv_npy a = {0};
    kv_status st = kv_npy_read(s->file, &a, err);
    if (st) return st;
    bool mask = a.size == 1 && (a.kind == 'u' || a.kind == 'b'), at = a.size == 4 && a.kind == 'i';
    uint32_t L = sc->n_cut;
    if (!mask && !at) {
        st = kv_fail(err, KV_EFORMAT, "mask '%s': want uint8 (1 = kept) or int32 (evicted_at), not %c%u", s->file, a.kind, a.size);
        goto out;
    }
    if (a.rank != 3 || a.shape[0] != in->n_layer || (a.shape[2] != L && a.shape[2] != in->n_token) ||
        (a.shape[1] != in->n_kv_head && a.shape[1] != in->n_q_head && a.shape[1] != 1)) {
        st = kv_fail(err, KV_EFORMAT, "mask '%s': shape must be [%u layers, %u or %u or 1 heads, %u or %u tokens] for this trace", s->file,
                     in->n_layer, in->n_kv_head, in->n_q_head, L, in->n_token);
        goto out;
    }
    size_t heads = a.shape[1], tokens = a.shape[2];
    r->n_unit = (uint32_t)heads;
    r->granularity = heads == in->n_kv_head ? KV_GRAN_KV_HEAD : heads == in->n_q_head ? KV_GRAN_QUERY_HEAD : KV_GRAN_LAYER;
    st = kv_array(&r->order, (size_t)sc->n_evict * heads * L, sizeof *r->order, err);
    if (!st) st = kv_array(&r->fixed, (size_t)sc->n_evict * heads, sizeof *r->fixed, err);
    for (uint32_t l = 0; l < sc->n_evict && !st; l++)
        for (size_t h = 0; h < heads && !st; h++) {
            size_t from = ((size_t)sc->evict[l] * heads + h) * tokens;
            uint32_t *to = r->order + (l * heads + h) * L, n = 0;
            for (int pass = 0; pass < 2; pass++)
                for (uint32_t i = 0; i < tokens; i++) {
                    int64_t v = mask ? ((uint8_t *)a.data)[from + i] : ((int32_t *)a.data)[from + i];
                    bool kept = mask ? v == 1 : v == -1;
                    if (mask ? v > 1 : v < -1 || v > 0) {
                        st = kv_fail(err, KV_EUNSUPPORTED, mask ? "mask '%s': value %d at token %u is neither 0 nor 1"
                                              : "mask '%s': value %d at token %u: only -1 and 0 (cut once) can be replayed so far", s->file, (int)v, i);
                        goto out;
                    }
                    if (i < L && kept == !pass) to[n++] = i;
                    if (!pass) r->fixed[l * heads + h] = n;
                    if (i >= L && !kept) {
                        st = kv_fail(err, KV_EUNSUPPORTED, "mask '%s': token %u comes after the cut at %u and is dropped: only cuts of the prompt can be replayed so far", s->file, i, L);
                        goto out;
                    }
                }
        }
out:
    kv_npy_free(&a);
    return st;
}

/* The schedule of one layer, with the layer loaded for it. */
static kv_status make_schedule(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, uint32_t layer, kv_schedule *out,
                               kv_error *err)
{
    kv_layer l;
    kv_status st = kv_layer_load(p->scene, layer, p->needs, p->max_window, &l, err);
    if (st) return st;
    st = kv_schedule_make(p, i, c, counts, &l, out, err);
    kv_layer_free(&l);
    return st;
}

kv_status kv_mask_write(const char *path, const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts,
                        bool as_mask, uint32_t rows, kv_error *err)
{
    const kv_scene *sc = p->scene;
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    size_t N = sc->n_token, U = r->n_unit, n = sc->info->n_layer * U * N, L = sc->n_cut, bytes = (N + 7) / 8;
    size_t shape[4] = {sc->info->n_layer, U, N};
    uint8_t *mask = NULL, *seen = NULL;
    int32_t *at = NULL;
    kv_status st = kv_array(&mask, n, 1, err);
    if (!st) st = kv_array(&at, n, sizeof *at, err);
    for (size_t k = 0; k < n && !st; k++) at[k] = -1;
    for (uint32_t l = 0; l < sc->n_evict && !st; l++) {
        int32_t *to = at + sc->evict[l] * U * N;
        if (!kv_schedule_needed(&p->spec[i])) {
            for (size_t u = 0; u < U; u++)
                for (size_t k = counts[l * U + u]; k < L; k++) to[u * N + r->order[(l * U + u) * L + k]] = 0;
            continue;
        }
        kv_schedule s;
        if ((st = make_schedule(p, i, c, counts, l, &s, err))) break;
        if (s.seen && !seen && !(st = kv_array(&seen, (sc->n_row + 1) * sc->info->n_layer * U * bytes, 1, err))) memset(seen, 0xff, (sc->n_row + 1) * sc->info->n_layer * U * bytes);
        for (size_t u = 0; u < U && !st; u++) {
            counts[l * U + u] = 0;
            for (uint32_t k = 0; k < L; k++) counts[l * U + u] += kv_schedule_visible(&s, sc, (uint32_t)u, k, 0);
        }
        if (s.seen && !st)
            for (size_t row = 0; row <= sc->n_row; row++)
                memcpy(seen + (row * sc->info->n_layer + sc->evict[l]) * U * bytes, s.seen + row * U * bytes, U * bytes);
        else if (!st) memcpy(to, s.at, U * N * sizeof *to);
        kv_schedule_free(&s);
    }
    for (size_t k = 0; k < n && !st; k++) { /* after `rows` rows: still to come is 0, dropped up to then is 0 */
        size_t token = k % N;
        mask[k] = token < sc->row_first + rows && (at[k] < 0 || (uint32_t)at[k] > rows);
        if (seen) mask[k] = token < sc->row_first + rows && (seen[((size_t)rows * sc->info->n_layer * U + k / N) * bytes + token / 8] >> (token % 8) & 1);
    }
    if (!st && as_mask) st = kv_npy_write(path, "|u1", 3, shape, mask, err);
    else if (!st && seen) st = kv_npy_write(path, "|u1", 4, (size_t[]){sc->n_row + 1, shape[0], U, bytes}, seen, err);
    else if (!st) st = kv_npy_write(path, "<i4", 3, shape, at, err);
    free(mask), free(at), free(seen);
    return st;
}
