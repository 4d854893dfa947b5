/* mask.c - kept sets from and to .npy files. */
#include "sim/mask.h"

#include <stdlib.h>

#include "sim/schedule.h"
#include "traces/npy.h"

typedef struct {
    const kv_scene *sc;
    const char *file;
    kv_npy a;
    size_t heads, tokens; /* tokens = 0: a bitmap for every row */
    bool at;              /* int32 evicted_at, else uint8 mask */
} mask_file;

static kv_status check_shape(mask_file *m, kv_error *err)
{
    const kv_trace_info *in = m->sc->info;
    const kv_npy *a = &m->a;
    bool rows = a->rank == 4;
    uint32_t L = m->sc->n_cut, N = in->n_token, R = m->sc->n_row;
    m->at = a->size == 4 && a->kind == 'i';
    if (!m->at && !(a->size == 1 && (a->kind == 'u' || a->kind == 'b')))
        return kv_fail(err, KV_EFORMAT, "mask '%s': want uint8 (1 = kept) or int32 (evicted_at), not %c%u", m->file,
                       a->kind, a->size);
    if (rows && (m->at || a->kind != 'u'))
        return kv_fail(err, KV_EFORMAT,
                       "mask '%s': an array with four axes holds one bitmap a row and must be uint8, not %c%u", m->file,
                       a->kind, a->size);
    const size_t *shape = a->shape + rows;
    m->heads = a->rank == 3 || rows ? shape[1] : 0;
    m->tokens = rows ? 0 : a->rank == 3 ? shape[2] : 0;
    if (!m->heads || shape[0] != in->n_layer ||
        (m->heads != in->n_kv_head && m->heads != in->n_q_head && m->heads != 1) ||
        (rows ? (a->shape[0] != R && a->shape[0] != R + (size_t)1) || shape[2] != (N + (size_t)7) / 8
              : m->tokens != L && m->tokens != N))
        return kv_fail(err, KV_EFORMAT,
                       "mask '%s': for this trace the shape must be [%u layers, %u or %u or 1 heads, %u or %u tokens], "
                       "or bitmaps [%u or %u rows, layers, heads, %u bytes]",
                       m->file, in->n_layer, in->n_kv_head, in->n_q_head, L, N, R, R + 1, (N + 7) / 8);
    return KV_OK;
}

/* When token i of head h in the trace's layer leaves, as in kv_schedule. */
static kv_status leaves(const mask_file *m, size_t layer, size_t h, uint32_t i, int32_t *at, kv_error *err)
{
    size_t k = (layer * m->heads + h) * m->tokens + i;
    int32_t own = (int32_t)i - (int32_t)m->sc->row_first + 1; /* a decoded token is there for its own row */
    *at = -1;
    if (i >= m->tokens) return KV_OK;
    if (!m->at) {
        uint8_t v = ((uint8_t *)m->a.data)[k];
        if (v > 1)
            return kv_fail(err, KV_EFORMAT, "mask '%s': value %u of layer %zu head %zu token %u is neither 0 nor 1",
                           m->file, v, layer, h, i);
        *at = v ? -1 : own > 0 ? own : 0;
        return KV_OK;
    }
    *at = ((int32_t *)m->a.data)[k];
    if (*at < -1 || (*at >= 0 && (uint32_t)*at > m->sc->n_row))
        return kv_fail(err, KV_EFORMAT,
                       "mask '%s': evicted_at %d of layer %zu head %zu token %u: want -1 (never) or a row from 0 to %u",
                       m->file, *at, layer, h, i, m->sc->n_row);
    if (*at >= 0 && *at < own)
        return kv_fail(err, KV_EFORMAT,
                       "mask '%s': evicted_at %d of layer %zu head %zu token %u: this token comes with row %d and is "
                       "seen by it, so want -1 or %d and above",
                       m->file, *at, layer, h, i, own - 1, own);
    return KV_OK;
}

/* One bitmap a row, for the layers that evict; a file without the row after the last gets the last one again. */
static kv_status copy_rows(const mask_file *m, uint8_t **out, kv_error *err)
{
    const kv_scene *sc = m->sc;
    size_t rows = m->a.shape[0], row = m->heads * m->a.shape[3], n;
    if (!kv_mul(sc->n_row + (size_t)1, sc->n_evict, &n))
        return kv_fail(err, KV_ENOMEM, "mask '%s' is too large", m->file);
    kv_status st = kv_array(out, n, row, err);
    for (size_t r = 0; r <= sc->n_row && !st; r++)
        for (size_t l = 0; l < sc->n_evict; l++)
            memcpy(*out + (r * sc->n_evict + l) * row,
                   (uint8_t *)m->a.data + ((r < rows ? r : rows - 1) * sc->info->n_layer + sc->evict[l]) * row, row);
    return st;
}

kv_status kv_mask_ranking(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err)
{
    mask_file m = {.sc = sc, .file = s->file};
    size_t L = sc->n_cut, N = sc->n_token, n = 0;
    bool later = false;
    kv_status st = kv_npy_read(s->file, &m.a, err);
    if (!st) st = check_shape(&m, err);
    if (st) goto out;
    size_t heads = m.heads;
    r->n_unit = (uint32_t)heads;
    r->granularity = heads == sc->info->n_kv_head  ? KV_GRAN_KV_HEAD
                     : heads == sc->info->n_q_head ? KV_GRAN_QUERY_HEAD
                                                   : KV_GRAN_LAYER;
    if (!kv_mul(sc->n_evict * heads, N, &n)) st = kv_fail(err, KV_ENOMEM, "mask '%s' is too large", s->file);
    if (!st) st = kv_array(&r->order, sc->n_evict * heads, L * sizeof *r->order, err);
    if (!st) st = kv_array(&r->fixed, sc->n_evict * heads, sizeof *r->fixed, err);
    if (!st && !m.tokens) st = copy_rows(&m, &r->seen, err);
    if (!st) st = kv_array(&r->at, n, sizeof *r->at, err);
    for (size_t l = 0; l < sc->n_evict && !st; l++)
        for (size_t h = 0; h < heads && !st; h++) {
            size_t u = l * heads + h;
            const uint8_t *first = r->seen ? r->seen + u * ((N + 7) / 8) : NULL;
            uint32_t *order = r->order + u * L;
            for (uint32_t i = 0; i < N && !st; i++) {
                if (first)
                    r->at[u * N + i] = i >= L || first[i / 8] >> (i % 8) & 1 ? -1 : 0;
                else
                    st = leaves(&m, sc->evict[l], h, i, &r->at[u * N + i], err);
                later |= r->at[u * N + i] > 0 || (i >= L && r->at[u * N + i] == 0);
            }
            uint32_t at = 0;
            for (uint32_t i = 0; i < L; i++)
                if (r->at[u * N + i]) order[at++] = i;
            r->fixed[u] = at;
            for (uint32_t i = 0; i < L; i++)
                if (!r->at[u * N + i]) order[at++] = i;
        }
    if (!later || r->seen) free(r->at), r->at = NULL; /* one cut: a prefix of the order says it all */
out:
    kv_npy_free(&m.a);
    return st;
}

/* The schedule of one layer, with the layer loaded for it where more than its shape is read. */
static kv_status make_schedule(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts,
                               uint32_t layer, kv_schedule *out, kv_error *err)
{
    kv_layer l = kv_layer_shape(p->scene, layer);
    kv_status st = kv_schedule_planned(p, i) ? KV_OK : kv_layer_load(p->scene, layer, p->needs, p->max_window, &l, err);
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
        if (!kv_schedule_used(p, i)) {
            for (size_t u = 0; u < U; u++)
                for (size_t k = counts[l * U + u]; k < L; k++) to[u * N + r->order[(l * U + u) * L + k]] = 0;
            continue;
        }
        kv_schedule s;
        if ((st = make_schedule(p, i, c, counts, l, &s, err))) break;
        if (s.seen && !seen && !(st = kv_array(&seen, (sc->n_row + 1) * sc->info->n_layer * U * bytes, 1, err)))
            memset(seen, 0xff, (sc->n_row + 1) * sc->info->n_layer * U * bytes);
        for (size_t u = 0; u < U && !st; u++) counts[l * U + u] = kv_schedule_slots(&s, sc, (uint32_t)u);
        if (s.seen && !st)
            for (size_t row = 0; row <= sc->n_row; row++)
                memcpy(seen + (row * sc->info->n_layer + sc->evict[l]) * U * bytes, s.seen + row * U * bytes,
                       U * bytes);
        else if (!st)
            memcpy(to, s.at, U * N * sizeof *to);
        kv_schedule_free(&s);
    }
    for (size_t k = 0; k < n && !st; k++) { /* after `rows` rows: still to come is 0, dropped up to then is 0 */
        size_t token = k % N;
        mask[k] = token < sc->row_first + rows && (at[k] < 0 || (uint32_t)at[k] > rows);
        if (seen)
            mask[k] = token < sc->row_first + rows &&
                      (seen[((size_t)rows * sc->info->n_layer * U + k / N) * bytes + token / 8] >> (token % 8) & 1);
    }
    if (!st && as_mask)
        st = kv_npy_write(path, "|u1", 3, shape, mask, err);
    else if (!st && seen)
        st = kv_npy_write(path, "|u1", 4, (size_t[]){sc->n_row + 1, shape[0], U, bytes}, seen, err);
    else if (!st)
        st = kv_npy_write(path, "<i4", 3, shape, at, err);
    free(mask), free(at), free(seen);
    return st;
}
