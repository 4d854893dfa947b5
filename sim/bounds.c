/* bounds.c - L1 errors of layers and their bounds. */
#include "sim/bounds.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"

enum { ROWS = 32, TOKENS = 512, POINTS = 64 }; /* in flight: rows of some points, tokens of one head */
#define LOST_NOTHING 1e-6                      /* 1 - R below this is rounding, as in account.c */

static double l1(size_t n, const float *x)
{
    double s = 0;
    for (size_t i = 0; i < n; i++) s += fabs((double)x[i]);
    return s;
}

/* n_i of one query head; slice [hidden][d], out [TOKENS][hidden] are scratch. */
static kv_status head_norms(const kv_measure *m, uint32_t h, float *slice, float *out, float *norm, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, width = (size_t)l->n_q_head * d, hidden = sc->info->hidden;
    const float *v = l->v + (size_t)(h / l->group) * sc->n_token * d;
    for (size_t o = 0; o < hidden; o++) memcpy(slice + o * d, l->wo + o * width + h * d, d * sizeof *slice);
    for (size_t i = 0; i < sc->n_token; i += TOKENS) {
        size_t n = sc->n_token - i < TOKENS ? sc->n_token - i : TOKENS;
        if (!kv_matmul(n, hidden, d, v + i * d, slice, out, hidden, 1)) return kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t k = 0; k < n; k++) norm[i + k] = (float)l1(hidden, out + k * hidden);
    }
    return KV_OK;
}

kv_status kv_bounds_open(const kv_measure *m, struct kv_bounds *b, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, width = (size_t)l->n_q_head * d, hidden = sc->info->hidden, N = sc->n_token, T = sc->n_row;
    float *slice = NULL, *out = NULL;
    double *column = NULL;
    *b = (struct kv_bounds){0};
    kv_status st = kv_array(&b->n, l->n_q_head * N, sizeof *b->n, err);
    if (!st) st = kv_array(&b->largest_n, T, sizeof *b->largest_n, err);
    if (!st) st = kv_array(&b->largest_v, l->n_q_head * T, sizeof *b->largest_v, err);
    if (!st) st = kv_array(&slice, hidden * d, sizeof *slice, err);
    if (!st) st = kv_array(&out, TOKENS * hidden, sizeof *out, err);
    if (!st) st = kv_array(&column, width, sizeof *column, err);
    for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
        const float *v = l->v + (size_t)(h / l->group) * N * d;
        double most = 0, most_v = 0;
        st = head_norms(m, h, slice, out, b->n + h * N, err);
        for (size_t i = 0; i < N && !st; i++) {
            most = fmax(most, (double)b->n[h * N + i]), most_v = fmax(most_v, l1(d, v + i * d));
            if (i < sc->row_first) continue;
            size_t r = i - sc->row_first;
            b->largest_n[r] = fmax(b->largest_n[r], most), b->largest_v[h * T + r] = most_v;
        }
    }
    for (size_t o = 0; o < hidden && !st; o++)
        for (size_t j = 0; j < width; j++) column[j] += fabs((double)l->wo[o * width + j]);
    for (size_t j = 0; j < width && !st; j++) b->wo = fmax(b->wo, column[j]);
    free(slice), free(out), free(column);
    if (st) kv_bounds_close(b);
    return st;
}

void kv_bounds_close(struct kv_bounds *b)
{
    free(b->n), free(b->largest_n), free(b->largest_v);
    *b = (struct kv_bounds){0};
}

/* Bounds of one row, summed over heads. */
typedef struct {
    double ada, critical, lava;
} row_sums;

/* Sums over everything that a row of a head sees. */
typedef struct {
    double mass, weighted; /* of p, of p n */
} row_weight;

/* Some rows of all points. */
typedef struct {
    size_t r0, n;
    float *q, *lse, *p, *o_hat; /* p [n][n_token]: full-cache weights of one head */
    uint32_t *list;
    float *base;           /* [ROWS][d]: sum p v over tokens after the cut, of the head under way */
    float *diff;           /* [n_point][n][Hq * d] */
    row_sums *sum;         /* [n_point][n] */
    row_weight full[ROWS]; /* of the head under way */
    double *mass;
} block;

/* Row r of head h at one point, which sees list[0..n) and, of a prefix, all tokens from the cut on. False when what it
 * lost is rounding: the head then counts as whole. */
static bool add_row(const kv_measure *m, const struct kv_bounds *b, uint32_t h, size_t r, const float *p,
                    const uint32_t *list, uint32_t n, bool tail, const row_weight *full, row_sums *sum)
{
    const kv_scene *sc = m->plan->scene;
    const float *norm = b->n + (size_t)h * sc->n_token;
    double mass = 0, kept = 0, all = full->weighted, all_mass = full->mass;
    size_t row = sc->row_first + r;
    for (uint32_t i = 0; i < n; i++) mass += p[list[i]], kept += (double)p[list[i]] * norm[list[i]];
    for (size_t i = sc->n_cut; i <= row && tail; i++) mass += p[i], kept += (double)p[i] * norm[i];
    double R = mass / all_mass;
    if (1 - R < LOST_NOTHING) return false;
    sum->ada += 2 * b->largest_n[r] * (1 - R);
    sum->lava += 2 * b->wo * b->largest_v[h * sc->n_row + r] * (1 - R);
    sum->critical += (R > 0 ? all - (2 - 1 / R) * kept : all) / all_mass; /* nothing visible: o_hat = 0 */
    return true;
}

/* All rows of the block, one query head, one point. */
static kv_status head_rows(const kv_measure *m, const struct kv_bounds *b, block *k, uint32_t h, size_t point,
                           size_t slot, const kv_schedule *sch, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    const kv_ranking *rk = &m->plan->ranking[m->plan->ranking_of[m->point[point].spec]];
    size_t d = l->d, T = sc->n_row, N = sc->n_token, width = (size_t)l->n_q_head * d, kv = (h / l->group) * N * d;
    uint32_t u = h / (l->n_q_head / rk->n_unit), n = 0;
    const uint32_t *order = k->list;
    size_t at = l->order * (size_t)rk->n_unit + u, step = sch ? 1 : k->n;
    if (!sch) order = rk->order + at * sc->n_cut, n = m->point[point].counts[at];
    for (size_t r = 0; r < k->n; r += step) {
        size_t row = h * T + k->r0 + r;
        uint32_t i = 0;
        for (n = sch ? 0 : n; sch && i <= sc->row_first + k->r0 + r; i++)
            if (kv_schedule_visible(sch, sc, u, i, (uint32_t)(k->r0 + r))) k->list[n++] = i;
        if (!kv_prefix(step, d, l->q_row + row * d, m->lse + row, l->scale, l->softcap, l->k + kv, l->v + kv, n, order,
                       1, &n, sch ? NULL : m->base_mass + row, sch ? NULL : k->base + r * d, NULL, k->mass, NULL,
                       k->o_hat))
            return kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t s = 0; s < step; s++) {
            const float *o = m->o + (row + s) * d, *hat = k->o_hat + s * d;
            float *diff = k->diff + (slot * k->n + r + s) * width + h * d;
            bool lost = add_row(m, b, h, k->r0 + r + s, k->p + (r + s) * N, order, n, !sch, &k->full[r + s],
                                &k->sum[slot * k->n + r + s]);
            for (size_t j = 0; j < d; j++) diff[j] = lost ? o[j] - hat[j] : 0;
        }
    }
    return KV_OK;
}

static kv_status add_points(kv_measure *m, const struct kv_bounds *b, const size_t *point, size_t n_point,
                            const kv_schedule *sch, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, T = sc->n_row, N = sc->n_token, width = (size_t)l->n_q_head * d, hidden = sc->info->hidden;
    block k = {0};
    float *y = NULL;
    kv_status st = kv_array(&k.p, ROWS * N, sizeof *k.p, err);
    if (!st) st = kv_array(&k.o_hat, ROWS * d, sizeof *k.o_hat, err);
    if (!st) st = kv_array(&k.base, ROWS * d, sizeof *k.base, err);
    if (!st) st = kv_array(&k.list, N, sizeof *k.list, err);
    if (!st) st = kv_array(&k.diff, n_point * ROWS * width, sizeof *k.diff, err);
    if (!st) st = kv_array(&k.sum, n_point * ROWS, sizeof *k.sum, err);
    if (!st) st = kv_array(&k.mass, ROWS, sizeof *k.mass, err);
    if (!st) st = kv_array(&y, ROWS * hidden, sizeof *y, err);
    for (; k.r0 < T && !st; k.r0 += ROWS) {
        k.n = T - k.r0 < ROWS ? T - k.r0 : ROWS;
        memset(k.sum, 0, n_point * ROWS * sizeof *k.sum);
        for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
            kv_attn_shape shape = {k.n, N, d, sc->row_first + k.r0, 0, l->scale, l->softcap};
            if (!kv_probs(&shape, l->q_row + (h * T + k.r0) * d, l->k + (size_t)(h / l->group) * N * d, k.p))
                st = kv_fail(err, KV_ENOMEM, "out of memory");
            for (size_t r = 0; r < k.n && !st; r++) {
                const float *p = k.p + r * N, *norm = b->n + h * N;
                const float *v = l->v + (size_t)(h / l->group) * N * d;
                size_t row = sc->row_first + k.r0 + r;
                k.full[r] = (row_weight){0};
                for (size_t i = 0; i <= row; i++) k.full[r].mass += p[i], k.full[r].weighted += (double)p[i] * norm[i];
                for (size_t j = 0; j < d; j++) {
                    double sum = 0;
                    for (size_t i = sc->n_cut; i <= row; i++) sum += (double)p[i] * v[i * d + j];
                    k.base[r * d + j] = (float)sum;
                }
            }
            for (size_t i = 0; i < n_point && !st; i++) st = head_rows(m, b, &k, h, point[i], i, sch, err);
        }
        for (size_t i = 0; i < n_point && !st; i++) {
            kv_bound_sums *to = &m->out->bound[point[i] * sc->n_evict + l->order];
            if (!kv_matmul(k.n, hidden, width, k.diff + i * k.n * width, l->wo, y, hidden, 1))
                st = kv_fail(err, KV_ENOMEM, "out of memory");
            for (size_t r = 0; r < k.n && !st; r++) {
                const row_sums *row = &k.sum[i * k.n + r];
                double actual = l1(hidden, y + r * hidden);
                to->actual += actual, to->ada += row->ada, to->critical += row->critical, to->lava += row->lava;
                if (!(row->ada > 0)) continue;
                to->tightest = fmax(to->tightest, actual / row->critical);
                to->disorder = fmax(to->disorder, fmax(row->critical / row->ada, row->ada / row->lava));
            }
        }
    }
    free(k.p), free(k.o_hat), free(k.base), free(k.list), free(k.diff), free(k.sum), free(k.mass), free(y);
    return st;
}

kv_status kv_bounds_add(kv_measure *m, const struct kv_bounds *b, const size_t *point, size_t n_point,
                        const kv_schedule *sch, kv_error *err)
{
    kv_status st = KV_OK;
    for (size_t i = 0; i < n_point && !st; i += POINTS)
        st = add_points(m, b, point + i, n_point - i < POINTS ? n_point - i : POINTS, sch, err);
    return st;
}

bool kv_bounds_apply(const kv_spec *s)
{
    return !s->reindex && s->select != KV_SELECT_MIXDIM;
}
