/* mask.c - kept sets from and to .npy files. */
#include "sim/mask.h"

#include <stdlib.h>

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

kv_status kv_mask_write(const char *path, const kv_plan *p, size_t i, const uint32_t *counts, bool as_mask, uint32_t rows,
                        kv_error *err)
{
    const kv_scene *sc = p->scene;
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    size_t N = sc->n_token, U = r->n_unit, n = sc->info->n_layer * U * N;
    size_t shape[3] = {sc->info->n_layer, U, N};
    uint8_t *mask = NULL;
    int32_t *at = NULL;
    kv_status st = kv_array(&mask, n, 1, err);
    if (!st && !as_mask) st = kv_array(&at, n, sizeof *at, err);
    if (st) goto out;
    memset(mask, 1, n);
    for (uint32_t l = 0; l < sc->n_evict; l++)
        for (size_t u = 0; u < U; u++) {
            uint8_t *to = mask + (sc->evict[l] * U + u) * N;
            const uint32_t *order = r->order + (l * U + u) * sc->n_cut;
            memset(to, 0, sc->n_cut);
            for (uint32_t k = 0; k < counts[l * U + u]; k++) to[order[k]] = 1;
        }
    for (size_t k = 0; k < n; k++)
        if (as_mask && k % N >= (size_t)sc->row_first + rows) mask[k] = 0;
        else if (!as_mask) at[k] = mask[k] ? -1 : 0;
    st = kv_npy_write(path, as_mask ? "|u1" : "<i4", 3, shape, as_mask ? (void *)mask : (void *)at, err);
out:
    free(mask), free(at);
    return st;
}
