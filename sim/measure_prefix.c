/* measure_prefix.c - the full cache's rows, and the points that keep prefixes of a ranking.
 *
 * The probabilities of a block of rows over all keys are formed once a KV head. Then every ranking is walked along them
 * (kv_walk) with a look at each count that some point asks for: points of one count share what is measured there, and
 * another policy on the same ranking costs its looks alone. The differences of all points meet in one product with
 * W_O. */
#include "sim/measure.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/dmath.h"
#include "traces/cli.h"

enum { POINTS_LEAST = 16, DIFF_BYTES = 128 << 20 }; /* points in flight: their differences stay below this */

/* Where the walks of a KV head stand; R = group * n rows of a block. */
typedef struct {
    size_t n_max, ld;                    /* rows of a block, columns of p */
    float *p;                            /* [n_token][ld] */
    uint32_t *late;                      /* [n_token] positions, those after the cut first */
    float *out, *part, *base_out;        /* [R][d] */
    double *full_mass, *full_cmass;      /* [R] of the full cache, 1 nearly, and of it outside F */
    double *mass, *cmass, *error2, *dot; /* [R] */
    double *contested_all;               /* [Hq] */
    kv_checkpoints **checks;             /* [n_ranking][n_unit] */
    size_t n_diff;                       /* points that drop something in this layer */
    size_t *diff_point, *slot;           /* [n_diff] which, [n_point] and back */
    float *diff;                         /* [n_diff][n][Hq * d]; NULL where none are asked for */
} blocks;

static void blocks_free(const kv_measure *m, blocks *b)
{
    for (size_t r = 0; r < m->plan->n_ranking && b->checks; r++)
        kv_checkpoints_free(b->checks[r], m->plan->ranking[r].n_unit);
    free(b->p), free(b->late), free(b->out), free(b->part), free(b->base_out), free(b->mass), free(b->cmass);
    free(b->full_mass), free(b->full_cmass);
    free(b->error2), free(b->dot), free(b->contested_all), free(b->checks), free(b->diff_point), free(b->slot);
    free(b->diff);
}

/* Points whose difference in this layer is not zero. */
static void find_diffs(const kv_measure *m, size_t from, size_t to, blocks *b)
{
    uint32_t L = m->plan->scene->n_cut;
    for (size_t i = from; i < to; i++) {
        const kv_ranking *rk = &m->plan->ranking[m->plan->ranking_of[m->point[i].spec]];
        b->slot[i] = SIZE_MAX;
        if (kv_schedule_used(m->plan, m->point[i].spec)) continue;
        for (size_t u = 0; u < rk->n_unit; u++)
            if (m->point[i].counts[m->l.order * rk->n_unit + u] != L) {
                b->slot[i] = b->n_diff, b->diff_point[b->n_diff++] = i;
                break;
            }
    }
}

static kv_status blocks_make(const kv_measure *m, size_t from, size_t to, blocks *b, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, width = (size_t)l->n_q_head * d, N = sc->n_token;
    kv_status st = kv_array(&b->checks, m->plan->n_ranking, sizeof *b->checks, err);
    for (size_t r = 0; r < m->plan->n_ranking && !st; r++) st = kv_checkpoints_make(m, r, from, to, &b->checks[r], err);
    if (!st) st = kv_array(&b->diff_point, m->n_point, sizeof *b->diff_point, err);
    if (!st) st = kv_array(&b->slot, m->n_point, sizeof *b->slot, err);
    if (st) return st;
    if (m->diffs) find_diffs(m, from, to, b);
    b->n_max = sc->n_row < KV_LAYER_ROWS ? sc->n_row : KV_LAYER_ROWS;
    size_t R = l->group * b->n_max;
    b->ld = (R + 15) / 16 * 16;
    st = kv_array(&b->p, N * b->ld, sizeof *b->p, err);
    if (!st) st = kv_array(&b->late, N, sizeof *b->late, err);
    if (!st) st = kv_array(&b->out, R * d, sizeof *b->out, err);
    if (!st) st = kv_array(&b->part, R * d, sizeof *b->part, err);
    if (!st) st = kv_array(&b->base_out, R * d, sizeof *b->base_out, err);
    if (!st) st = kv_array(&b->full_mass, R, sizeof *b->full_mass, err);
    if (!st) st = kv_array(&b->full_cmass, R, sizeof *b->full_cmass, err);
    if (!st) st = kv_array(&b->mass, R, sizeof *b->mass, err);
    if (!st) st = kv_array(&b->cmass, R, sizeof *b->cmass, err);
    if (!st) st = kv_array(&b->error2, R, sizeof *b->error2, err);
    if (!st) st = kv_array(&b->dot, R, sizeof *b->dot, err);
    if (!st) st = kv_array(&b->contested_all, l->n_q_head, sizeof *b->contested_all, err);
    if (!st && b->n_diff) st = kv_array(&b->diff, b->n_diff * b->n_max * width, sizeof *b->diff, err);
    for (size_t i = 0; i < N && !st; i++) b->late[i] = (uint32_t)((sc->n_cut + i) % N);
    return st;
}

/* Rows r0.. of a KV head with the full cache: o, lse, the part of the tokens after the cut, all mass outside F. */
static kv_status full_rows(kv_measure *m, blocks *b, uint32_t kv, size_t r0, size_t n, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, N = sc->n_token, g = l->group, R = g * n, after = N - sc->n_cut, T = sc->n_row;
    uint32_t h0 = kv * l->group;
    const float *v = l->v + (size_t)kv * N * d, *q = l->q_row + (h0 * T + r0) * d;
    float *lse = b->out; /* until it is needed */
    kv_attn_shape shape = {n, N, d, sc->row_first + r0, 0, l->scale, l->softcap};
    if (!kv_probs_turned(&shape, g, q, T * d, l->k + (size_t)kv * N * d, b->p, b->ld, lse))
        return kv_fail(err, KV_ENOMEM, "out of memory");
    for (size_t i = 0; i < R; i++) {
        size_t h = h0 + i / n, r = r0 + i % n;
        if (!isfinite(lse[i]))
            return kv_fail(err, KV_EFORMAT, "trace '%s': layer %u head %zu row %zu: attention is not finite",
                           kv_trace_path(sc->trace), l->number, h, sc->row_first + r);
        m->lse[h * T + r] = lse[i];
    }
    memset(b->out, 0, R * d * sizeof *b->out), memset(b->part, 0, R * d * sizeof *b->part);
    memset(b->full_mass, 0, R * sizeof *b->full_mass), memset(b->full_cmass, 0, R * sizeof *b->full_cmass);
    float *out = m->errors ? b->out : NULL;
    kv_walk(R, d, b->p, b->ld, v, 0, after, b->late, NULL, b->full_mass, NULL, out, b->part);
    for (size_t i = 0; i < R; i++) m->base_mass[(h0 + i / n) * T + r0 + i % n] = b->full_mass[i];
    for (size_t i = 0; i < R * d && out; i++) b->base_out[i] = b->out[i] + b->part[i];
    kv_walk(R, d, b->p, b->ld, v, after, sc->n_cut, b->late + after, m->contested, b->full_mass,
            m->contest ? b->full_cmass : NULL, out, b->part);
    for (size_t i = 0; i < R; i++) {
        size_t at = (h0 + i / n) * T + r0 + i % n;
        b->contested_all[h0 + i / n] += b->full_cmass[i];
        if (m->contest) m->contested_mass[at] = b->full_cmass[i];
        float inv = (float)(1 / b->full_mass[i]);
        for (size_t j = 0; j < d && out; j++) m->o[at * d + j] = (b->out[i * d + j] + b->part[i * d + j]) * inv;
        if (out) m->norm_o[at] = kv_length(d, m->o + at * d);
    }
    return KV_OK;
}

/* Heads h0..h0+heads-1 share a kept set of a unit: what its points see of n rows, and their differences. col: the
 * first one's place in the group, times n. */
static void look(kv_measure *m, blocks *b, uint32_t h0, size_t heads, size_t col, const kv_checkpoints *c, size_t k,
                 size_t r0, size_t n)
{
    size_t d = m->l.d, T = m->plan->scene->n_row, width = (size_t)m->l.n_q_head * d;
    bool whole = c->count[k] == m->plan->scene->n_cut;
    for (size_t g = 0; g < heads; g++) {
        size_t h = h0 + g, at = g * n;
        float *first = NULL;
        for (size_t p = c->first[k]; p < c->first[k + 1] && b->diff && !whole && !first; p++)
            first = b->diff + b->slot[c->point[p]] * n * width + h * d; /* it has one: this unit drops something */
        if (m->errors && !whole)
            kv_walk_compare(n, d, b->mass + at, b->out + at * d, b->part + at * d, m->o + (h * T + r0) * d, b->error2,
                            b->dot, first, width);
        else
            memset(b->error2, 0, n * sizeof *b->error2), memset(b->dot, 0, n * sizeof *b->dot);
        kv_kept_rows x = {.head = (uint32_t)h,
                          .r0 = r0,
                          .n = n,
                          .whole = whole,
                          .mass = whole ? b->full_mass + col + at : b->mass + at,
                          .after = m->base_mass + h * T + r0,
                          .contested = !m->contest ? NULL
                                       : whole     ? b->full_cmass + col + at
                                                   : b->cmass + at,
                          .error2 = m->errors ? b->error2 : NULL,
                          .dot = m->errors ? b->dot : NULL};
        kv_account_rows(m, c->point + c->first[k], c->first[k + 1] - c->first[k], &x);
        for (size_t p = c->first[k]; p < c->first[k + 1] && b->diff; p++) {
            size_t slot = b->slot[c->point[p]];
            if (slot == SIZE_MAX) continue; /* whole in every unit: no difference to project */
            float *to = b->diff + slot * n * width + h * d;
            for (size_t r = 0; r < n && to != first; r++)
                whole ? memset(to + r * width, 0, d * sizeof *to)
                      : memcpy(to + r * width, first + r * width, d * sizeof *to);
        }
    }
}

/* The walk of one unit: its heads are columns col.. of p. */
static void walk_unit(kv_measure *m, blocks *b, const uint32_t *order, uint32_t h0, size_t heads, size_t col,
                      const kv_checkpoints *c, size_t r0, size_t n)
{
    const kv_scene *sc = m->plan->scene;
    size_t d = m->l.d, R = heads * n, at = 0;
    const float *v = m->l.v + (size_t)(h0 / m->l.group) * sc->n_token * d;
    float *out = m->errors ? b->out : NULL;
    if (out) memcpy(out, b->base_out + col * d, R * d * sizeof *out), memset(b->part, 0, R * d * sizeof *b->part);
    memset(b->cmass, 0, R * sizeof *b->cmass);
    for (size_t g = 0; g < heads; g++)
        memcpy(b->mass + g * n, m->base_mass + (h0 + g) * sc->n_row + r0, n * sizeof *b->mass);
    for (size_t k = 0; k < c->n; k++) {
        if (c->count[k] < sc->n_cut) /* the whole prompt needs no walk */
            kv_walk(R, d, b->p + col, b->ld, v, at, c->count[k] - at, order + at, m->contested, b->mass,
                    m->contest ? b->cmass : NULL, out, b->part);
        at = c->count[k];
        look(m, b, h0, heads, col, c, k, r0, n);
    }
}

/* What layer errors are divided by where the trace has no ||x||: the norm of the layer's own output. */
static kv_status own_output(kv_measure *m, size_t r0, size_t n, kv_error *err)
{
    size_t d = m->l.d, T = m->plan->scene->n_row, width = (size_t)m->l.n_q_head * d;
    float *x = NULL;
    kv_status st = kv_array(&x, n * width, sizeof *x, err);
    for (size_t h = 0; h < m->l.n_q_head && !st; h++)
        for (size_t r = 0; r < n; r++) memcpy(x + r * width + h * d, m->o + (h * T + r0 + r) * d, d * sizeof *x);
    if (!st) st = kv_measure_project(m, r0, n, x, m->ref + r0, err);
    free(x);
    return st;
}

/* The full cache's outputs of rows r0.., also as those of points from..to-1: what drops nothing. */
static void full_outputs(kv_measure *m, size_t from, size_t to, size_t r0, size_t n)
{
    size_t d = m->l.d, T = m->plan->scene->n_row, width = (size_t)m->l.n_q_head * d;
    for (size_t r = r0; r < r0 + n; r++) {
        float *row = m->hat + r * (m->n_point + 1) * width;
        for (size_t h = 0; h < m->l.n_q_head; h++) memcpy(row + h * d, m->o + (h * T + r) * d, d * sizeof *row);
        for (size_t i = from; i < to; i++) memcpy(row + (1 + i) * width, row, width * sizeof *row);
    }
}

/* Points from..to-1, and the full cache's rows. */
static kv_status some_points(kv_measure *m, size_t from, size_t to, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    blocks b = {0};
    kv_status st = blocks_make(m, from, to, &b, err);
    for (size_t r0 = 0; r0 < sc->n_row && !st; r0 += b.n_max) {
        size_t n = sc->n_row - r0 < b.n_max ? sc->n_row - r0 : b.n_max;
        for (uint32_t kv = 0; kv < l->n_kv_head && !st; kv++) {
            st = full_rows(m, &b, kv, r0, n, err);
            for (size_t r = 0; r < m->plan->n_ranking && !st; r++) {
                const kv_ranking *rk = &m->plan->ranking[r];
                size_t units = rk->granularity == KV_GRAN_QUERY_HEAD ? l->group : 1, heads = l->group / units;
                for (size_t i = 0; i < units; i++) {
                    size_t u = rk->granularity == KV_GRAN_LAYER ? 0 : kv * units + i;
                    if (b.checks[r][u].n)
                        walk_unit(m, &b, rk->order + (l->order * (size_t)rk->n_unit + u) * sc->n_cut,
                                  (uint32_t)(kv * l->group + i * heads), heads, i * heads * n, &b.checks[r][u], r0, n);
                }
            }
            if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
        }
        if (!st && m->out->layer_error && m->out->own_output) st = own_output(m, r0, n, err);
        if (!st && m->hat) full_outputs(m, from, to, r0, n);
        if (!st && b.n_diff) st = kv_account_layer(m, b.diff_point, b.n_diff, r0, n, b.diff, err);
    }
    for (size_t i = from; i < to && !st; i++)
        for (uint32_t h = 0; h < l->n_q_head; h++) kv_measure_sums(m, i, h)->contested_all = b.contested_all[h];
    blocks_free(m, &b);
    return st;
}

size_t kv_measure_points_at_once(size_t width)
{
    size_t most = DIFF_BYTES / (KV_LAYER_ROWS * width * sizeof(float));
    return most < POINTS_LEAST ? POINTS_LEAST : most;
}

kv_status kv_measure_prefixes(kv_measure *m, kv_error *err)
{
    size_t most = m->diffs ? kv_measure_points_at_once((size_t)m->l.n_q_head * m->l.d) : m->n_point;
    kv_status st = KV_OK;
    size_t from = 0, to;
    do { /* without a point the full cache's rows alone */
        to = m->n_point - from < most ? m->n_point : from + most;
        st = some_points(m, from, to, err);
        from = to;
    } while (from < m->n_point && !st);
    return st;
}
