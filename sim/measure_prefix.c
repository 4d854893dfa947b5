/* measure_prefix.c - points that keep prefixes of a ranking. Every ranking is walked once per unit, with a checkpoint
 * at each count that some point asks for; points of one count share what is measured there. */
#include "sim/measure.h"

#include <stdlib.h>

#include "kernels/kernels.h"
#include "traces/cli.h"

/* Counts of one unit, ascending and different, and the points that ask for each of them. */
typedef struct {
    size_t n;
    uint32_t *count; /* [n] */
    size_t *first;   /* [n+1]: points of count c are point[first[c]..first[c+1]-1] */
    size_t *point;
} checkpoints;

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

static void checkpoints_free(checkpoints *c)
{
    free(c->count), free(c->first), free(c->point);
    *c = (checkpoints){0};
}

static kv_status checkpoints_of(const kv_measure *m, const size_t *points, size_t n_points, size_t unit, checkpoints *c,
                                kv_error *err)
{
    wish *w = NULL;
    *c = (checkpoints){0};
    kv_status st = kv_array(&w, n_points, sizeof *w, err);
    if (!st) st = kv_array(&c->count, n_points, sizeof *c->count, err);
    if (!st) st = kv_array(&c->first, n_points + 1, sizeof *c->first, err);
    if (!st) st = kv_array(&c->point, n_points, sizeof *c->point, err);
    for (size_t i = 0; i < n_points && !st; i++) w[i] = (wish){m->point[points[i]].counts[unit], points[i]};
    if (!st) qsort(w, n_points, sizeof *w, by_count);
    for (size_t i = 0; i < n_points && !st; i++) {
        if (!i || w[i].count != w[i - 1].count) c->first[c->n] = i, c->count[c->n++] = w[i].count;
        c->point[i] = w[i].point;
    }
    if (!st) c->first[c->n] = n_points;
    free(w);
    return st;
}

/* Scratch for the points of one ranking and KV_MEASURE_ROWS rows of the heads of a unit. */
typedef struct {
    float *q, *lse, *base_out, *out;
    double *base_mass, *mass, *cmass, *error2, *dot;
    float *diff; /* [n_points][n][Hq * d], only for layer errors */
} scratch;

static void scratch_free(scratch *s)
{
    free(s->q), free(s->lse), free(s->base_out), free(s->out), free(s->base_mass), free(s->mass), free(s->cmass);
    free(s->error2), free(s->dot), free(s->diff);
}

/* Rows r0..r0+n-1 of the heads of a unit, at all its checkpoints. */
static kv_status measure_unit(kv_measure *m, const kv_ranking *rk, uint32_t h0, size_t heads, size_t unit,
                              const checkpoints *c, const size_t *slot, size_t r0, size_t n, scratch *s, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, N = sc->n_row, rows = heads * n, width = (size_t)l->n_q_head * d,
           kv = (size_t)(h0 / l->group) * sc->n_token * d;
    for (size_t g = 0; g < heads; g++) {
        size_t from = (h0 + g) * N + r0;
        memcpy(s->q + g * n * d, l->q_row + from * d, n * d * sizeof *s->q);
        memcpy(s->lse + g * n, m->lse + from, n * sizeof *s->lse);
        memcpy(s->base_mass + g * n, m->base_mass + from, n * sizeof *s->base_mass);
        memcpy(s->base_out + g * n * d, m->base_out + from * d, n * d * sizeof *s->base_out);
    }
    if (!kv_prefix(rows, d, s->q, s->lse, l->scale, l->softcap, l->k + kv, l->v + kv, sc->n_cut,
                   rk->order + unit * sc->n_cut, c->n, c->count, s->base_mass, s->base_out,
                   m->contest ? m->contested : NULL, s->mass, m->contest ? s->cmass : NULL, s->out))
        return kv_fail(err, KV_ENOMEM, "out of memory");
    for (size_t k = 0; k < c->n; k++)
        for (size_t g = 0; g < heads; g++) {
            size_t at = k * rows + g * n;
            bool whole = c->count[k] == sc->n_cut;
            if (m->errors) {
                float *o_hat = s->out + at * d;
                kv_compare_outputs(n, d, m->o + ((h0 + g) * N + r0) * d, o_hat, s->error2, s->dot, o_hat);
                if (whole) memset(o_hat, 0, n * d * sizeof *o_hat);
            }
            kv_kept_rows x = {.head = h0 + (uint32_t)g,
                              .r0 = r0,
                              .n = n,
                              .whole = whole,
                              .mass = s->mass + at,
                              .after = s->base_mass + g * n,
                              .contested = m->contest ? s->cmass + at : NULL,
                              .error2 = m->errors ? s->error2 : NULL,
                              .dot = m->errors ? s->dot : NULL};
            kv_account_rows(m, c->point + c->first[k], c->first[k + 1] - c->first[k], &x);
            for (size_t p = c->first[k]; p < c->first[k + 1] && s->diff; p++)
                for (size_t r = 0; r < n; r++)
                    memcpy(s->diff + (slot[c->point[p]] * n + r) * width + (h0 + g) * d, s->out + (at + r) * d,
                           d * sizeof *s->diff);
        }
    return KV_OK;
}

/* All points of one ranking; points = their indices, slot [n_point] = the place of each among them. */
static kv_status measure_ranking(kv_measure *m, const kv_ranking *rk, const size_t *points, size_t n_points,
                                 const size_t *slot, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, U = rk->n_unit, width = (size_t)l->n_q_head * d;
    size_t heads = rk->granularity == KV_GRAN_QUERY_HEAD ? 1 : l->group,
           n_max = sc->n_row < KV_MEASURE_ROWS ? sc->n_row : KV_MEASURE_ROWS, rows = heads * n_max;
    scratch s = {0};
    checkpoints *c = NULL;
    kv_status st = kv_array(&c, U, sizeof *c, err);
    for (size_t u = 0; u < U && !st; u++) st = checkpoints_of(m, points, n_points, l->order * U + u, &c[u], err);
    if (!st) st = kv_array(&s.q, rows * d, sizeof *s.q, err);
    if (!st) st = kv_array(&s.lse, rows, sizeof *s.lse, err);
    if (!st) st = kv_array(&s.base_out, rows * d, sizeof *s.base_out, err);
    if (!st) st = kv_array(&s.base_mass, rows, sizeof *s.base_mass, err);
    if (!st) st = kv_array(&s.mass, n_points * rows, sizeof *s.mass, err);
    if (!st) st = kv_array(&s.cmass, n_points * rows, sizeof *s.cmass, err);
    if (!st) st = kv_array(&s.error2, n_max, sizeof *s.error2, err);
    if (!st) st = kv_array(&s.dot, n_max, sizeof *s.dot, err);
    if (!st && m->errors) st = kv_array(&s.out, n_points * rows * d, sizeof *s.out, err);
    if (!st && m->out->layer_error) st = kv_array(&s.diff, n_points * n_max * width, sizeof *s.diff, err);
    for (size_t r0 = 0; r0 < sc->n_row && !st; r0 += n_max) {
        size_t n = sc->n_row - r0 < n_max ? sc->n_row - r0 : n_max;
        for (uint32_t h0 = 0; h0 < l->n_q_head && !st; h0 += (uint32_t)heads) {
            size_t u = rk->granularity == KV_GRAN_LAYER ? 0 : h0 / heads;
            st = measure_unit(m, rk, h0, heads, l->order * U + u, &c[u], slot, r0, n, &s, err);
        }
        for (size_t i = 0; i < n_points && !st && s.diff; i++) {
            bool whole = true; /* nothing dropped: the difference is zero */
            for (size_t u = 0; u < U; u++) whole &= m->point[points[i]].counts[l->order * U + u] == sc->n_cut;
            if (!whole) st = kv_account_layer(m, points[i], r0, n, s.diff + i * n * width, err);
        }
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    for (size_t u = 0; u < U && c; u++) checkpoints_free(&c[u]);
    free(c);
    scratch_free(&s);
    return st;
}

kv_status kv_measure_prefixes(kv_measure *m, kv_error *err)
{
    size_t *points = NULL, *slot = NULL;
    kv_status st = kv_array(&points, m->n_point, sizeof *points, err);
    if (!st) st = kv_array(&slot, m->n_point, sizeof *slot, err);
    for (size_t r = 0; r < m->plan->n_ranking && !st; r++) {
        size_t n = 0;
        for (size_t i = 0; i < m->n_point; i++)
            if (m->plan->ranking_of[m->point[i].spec] == r && !kv_schedule_used(m->plan, m->point[i].spec))
                slot[i] = n, points[n++] = i;
        if (n) st = measure_ranking(m, &m->plan->ranking[r], points, n, slot, err);
    }
    free(points), free(slot);
    return st;
}
