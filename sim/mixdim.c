/* mixdim.c - bases, losses, ranks; the keys and values that are left of them. */
#include "sim/mixdim.h"

#include <math.h>
#include <stdlib.h>

enum { SWEEPS = 50 };

uint32_t kv_mixdim_ranks(uint32_t d, uint32_t rank[KV_MIXDIM_RANKS])
{
    const uint32_t want[KV_MIXDIM_RANKS] = {0, d / 8, d / 4, d / 2, d};
    uint32_t n = 1;
    rank[0] = 0;
    for (int i = 1; i < KV_MIXDIM_RANKS; i++)
        if (want[i] > rank[n - 1]) rank[n++] = want[i];
    return n;
}

/* Rotates axes a < b of the symmetric m [d][d] so that m[a][b] becomes 0; the rows of e follow. */
static void rotate(size_t d, double *m, double *e, size_t a, size_t b)
{
    double theta = (m[b * d + b] - m[a * d + a]) / (2 * m[a * d + b]);
    double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1)), c = 1 / sqrt(t * t + 1), s = t * c;
    double daa = m[a * d + a] - t * m[a * d + b], dbb = m[b * d + b] + t * m[a * d + b];
    for (size_t j = 0; j < d; j++) { /* rows, then columns by symmetry */
        double x = m[a * d + j], y = m[b * d + j];
        m[a * d + j] = c * x - s * y, m[b * d + j] = s * x + c * y;
        x = e[a * d + j], y = e[b * d + j];
        e[a * d + j] = c * x - s * y, e[b * d + j] = s * x + c * y;
    }
    for (size_t j = 0; j < d; j++) m[j * d + a] = m[a * d + j], m[j * d + b] = m[b * d + j];
    m[a * d + a] = daa, m[b * d + b] = dbb, m[a * d + b] = m[b * d + a] = 0;
}

kv_status kv_mixdim_basis(size_t n, size_t d, const float *x, double *basis, kv_error *err)
{
    double *m = NULL, *e = NULL;
    bool *used = NULL;
    kv_status st = kv_array(&m, d * d, sizeof *m, err);
    if (!st) st = kv_array(&e, d * d, sizeof *e, err);
    if (!st) st = kv_array(&used, d, sizeof *used, err);
    if (st) goto out;
    for (size_t i = 0; i < n; i++)
        for (size_t a = 0; a < d; a++)
            for (size_t b = 0; b <= a; b++) m[a * d + b] += (double)x[i * d + a] * x[i * d + b];
    double trace = 0;
    for (size_t a = 0; a < d; a++) {
        for (size_t b = 0; b < a; b++) m[b * d + a] = m[a * d + b];
        trace += m[a * d + a], e[a * d + a] = 1;
    }
    double least = trace * 1e-17; /* what is left beside a diagonal of this sum turns no axis by a visible angle */
    bool turned = true;
    for (int sweep = 0; sweep < SWEEPS && turned; sweep++) {
        turned = false;
        for (size_t a = 0; a < d; a++)
            for (size_t b = a + 1; b < d; b++)
                if (fabs(m[a * d + b]) > least) rotate(d, m, e, a, b), turned = true;
    }
    for (size_t k = 0; k < d; k++) {
        size_t best = d;
        for (size_t a = 0; a < d; a++)
            if (!used[a] && (best == d || m[a * d + a] > m[best * d + best])) best = a;
        used[best] = true;
        memcpy(basis + k * d, e + best * d, d * sizeof *e);
    }
out:
    free(m), free(e), free(used);
    return st;
}

/* ------------------------------------------------------------------------------------------------ ranks */
typedef struct {
    double slope; /* loss drop per dimension, >= 0, never above that of the token's step before */
    size_t token;
    uint32_t from, to; /* indices of ranks */
} climb;

static int steeper_first(const void *x, const void *y)
{
    const climb *a = x, *b = y;
    if (a->slope != b->slope) return a->slope < b->slope ? 1 : -1;
    if (a->token != b->token) return a->token < b->token ? -1 : 1;
    return (a->from > b->from) - (a->from < b->from);
}

kv_status kv_mixdim_allot(size_t n, uint32_t n_rank, const uint32_t *rank, const double *loss, uint64_t budget,
                          uint32_t *out, kv_error *err)
{
    climb *step = NULL;
    size_t n_step = 0;
    kv_status st = kv_array(&step, n, (n_rank - 1) * sizeof *step, err);
    for (size_t i = 0; i < n && !st; i++) {
        const double *x = loss + i * n_rank;
        double last = INFINITY;
        out[i] = 0;
        for (uint32_t from = 0, to; from + 1 < n_rank;
             from = to) { /* the hull: the steepest way down, shortest first */
            double best = -1;
            to = n_rank - 1;
            for (uint32_t k = from + 1; k < n_rank; k++) {
                double slope = (x[from] - x[k]) / (rank[k] - rank[from]);
                if (!(slope >= 0)) slope = 0;
                if (slope > best) best = slope, to = k;
            }
            if (best < last) last = best;
            step[n_step++] = (climb){last, i, from, to};
        }
    }
    if (!st && n_step) qsort(step, n_step, sizeof *step, steeper_first);
    for (size_t k = 0; k < n_step; k++) {
        const climb *s = &step[k];
        uint32_t cost = rank[s->to] - rank[s->from];
        if (out[s->token] != s->from || cost > budget) continue;
        out[s->token] = s->to, budget -= cost;
    }
    free(step);
    return st;
}

/* Bases of the layer, keys before values, [2][n_kv_head][d][d]: the same at every budget. */
static kv_status bases(kv_layer *l, kv_error *err)
{
    size_t d = l->d, N = l->scene->n_token, H = l->n_kv_head;
    double *b = NULL;
    if (l->basis) return KV_OK;
    kv_status st = kv_array(&b, 2 * H, d * d * sizeof *b, err);
    for (size_t h = 0; h < H && !st; h++) {
        st = kv_mixdim_basis(l->L, d, l->k + h * N * d, b + h * d * d, err);
        if (!st) st = kv_mixdim_basis(l->L, d, l->v + h * N * d, b + (H + h) * d * d, err);
    }
    if (st)
        free(b);
    else
        l->basis = b;
    return st;
}

/* Coordinates c [d] of x; to[k] = ||x - x_r|| for rank k, computed from the coordinates left out so that it falls. */
static void residuals(size_t d, const double *basis, const float *x, uint32_t n_rank, const uint32_t *rank, double *c,
                      double *to)
{
    for (size_t j = 0; j < d; j++) {
        c[j] = 0;
        for (size_t a = 0; a < d; a++) c[j] += basis[j * d + a] * x[a];
    }
    double rest = 0;
    for (size_t j = d, k = n_rank; k-- > 0; to[k] = sqrt(rest))
        while (j > rank[k]) j--, rest += c[j] * c[j];
}

/* x on its first r coordinates, in place; full rank leaves it as it is. */
static void project(size_t d, const double *basis, uint32_t r, float *x, double *c, double *sum)
{
    if (r == d) return;
    memset(sum, 0, d * sizeof *sum);
    for (size_t j = 0; j < r; j++) {
        c[j] = 0;
        for (size_t a = 0; a < d; a++) c[j] += basis[j * d + a] * x[a];
        for (size_t a = 0; a < d; a++) sum[a] += c[j] * basis[j * d + a];
    }
    for (size_t a = 0; a < d; a++) x[a] = (float)sum[a];
}

kv_status kv_mixdim_make(const kv_plan *p, size_t i, const uint32_t *counts, kv_layer *l, kv_schedule *out,
                         kv_error *err)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    size_t L = l->L, N = l->scene->n_token, d = l->d, nf = r->n_forced, all = l->n_kv_head * N * d;
    uint32_t rank[KV_MIXDIM_RANKS], n_rank = kv_mixdim_ranks(l->d, rank), *got = NULL, *pick = NULL;
    double *loss = NULL, *score = NULL, *c = NULL;
    bool *forced = NULL;
    kv_status st = bases(l, err);
    if (!st) st = kv_array(&out->slots, out->n_unit, sizeof *out->slots, err);
    if (!st) st = kv_array(&out->k, all, sizeof *out->k, err);
    if (!st) st = kv_array(&out->v, all, sizeof *out->v, err);
    if (!st) st = kv_array(&got, L, sizeof *got, err);
    if (!st) st = kv_array(&pick, L, sizeof *pick, err);
    if (!st) st = kv_array(&loss, L, n_rank * sizeof *loss, err);
    if (!st) st = kv_array(&score, L, sizeof *score, err);
    if (!st) st = kv_array(&c, 2 * d, sizeof *c, err);
    if (!st) st = kv_array(&forced, L, sizeof *forced, err);
    if (st) goto out;
    memcpy(out->k, l->k, all * sizeof *out->k), memcpy(out->v, l->v, all * sizeof *out->v);
    for (size_t u = 0; u < out->n_unit && !st; u++) {
        size_t at = (size_t)l->order * out->n_unit + u, n = 0, whole = counts[at] < nf ? counts[at] : nf;
        const uint32_t *order = r->order + at * L;
        const double *kb = l->basis + u * d * d, *vb = l->basis + (l->n_kv_head + u) * d * d;
        float *K = out->k + u * N * d, *V = out->v + u * N * d;
        for (size_t k = 0; k < L; k++) {
            forced[order[k]] = k < nf, got[order[k]] = k < whole ? n_rank - 1 : 0;
            score[order[k]] = k < nf ? 0 : r->sorted[at * (L - nf) + k - nf];
        }
        for (size_t t = 0; t < L; t++) {
            double rk[KV_MIXDIM_RANKS], rv[KV_MIXDIM_RANKS], *x = loss + n * n_rank;
            if (forced[t]) continue;
            residuals(d, kb, K + t * d, n_rank, rank, c, rk);
            residuals(d, vb, V + t * d, n_rank, rank, c, rv);
            double w = score[t] > 0 ? score[t] : 0, f = rk[0] > 0 ? rv[0] / rk[0] : 0;
            for (uint32_t k = 0; k < n_rank; k++) x[k] = w * (rv[k] + rk[k] * f);
            n++;
        }
        st = kv_mixdim_allot(n, n_rank, rank, loss, (uint64_t)(counts[at] - whole) * d, pick, err);
        uint64_t spent = 0;
        for (size_t t = 0, m = 0; t < L && !st; t++) {
            if (!forced[t]) got[t] = pick[m++];
            uint32_t dims = rank[got[t]];
            spent += dims;
            if (!dims) out->at[u * N + t] = 0;
            project(d, kb, dims, K + t * d, c, c + d), project(d, vb, dims, V + t * d, c, c + d);
        }
        out->slots[u] = (uint32_t)((spent + d - 1) / d);
    }
out:
    free(got), free(pick), free(loss), free(score), free(c), free(forced);
    return st; /* the caller frees the schedule */
}

void kv_mixdim_row(const kv_layer *l, uint32_t h, uint32_t r, const float *k, const uint32_t *pos, uint32_t n,
                   const float *p, double *weight, double *distance)
{
    const float *q = l->q_row + ((size_t)h * l->scene->n_row + r) * l->d;
    double top = -INFINITY, sum = 0, lost = 1, moved = 0;
    for (uint32_t i = 0; i < n; i++) {
        double x = 0;
        for (uint32_t j = 0; j < l->d; j++) x += (double)q[j] * k[(size_t)pos[i] * l->d + j];
        x *= l->scale;
        weight[i] = l->softcap > 0 ? l->softcap * tanh(x / l->softcap) : x;
        if (weight[i] > top) top = weight[i];
    }
    for (uint32_t i = 0; i < n; i++) sum += weight[i] = exp(weight[i] - top);
    for (uint32_t i = 0; i < n; i++) {
        weight[i] /= sum;
        moved += fabs(p[pos[i]] - weight[i]), lost -= p[pos[i]];
    }
    *distance = (moved + (lost > 0 ? lost : 0)) / 2;
}
