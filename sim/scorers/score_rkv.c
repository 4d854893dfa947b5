/* rkv - R-KV (arXiv 2505.24133, Zefan-Cai/R-KV r1_kv.py, utils.py) as one cut: lambda * importance - (1 - lambda) *
 * redundancy. Importance: logits of the last `window` queries, the largest of the group before the softmax, no causal
 * mask, softmax over the scored columns only, mean over rows, max-pooled. Redundancy: cosines of all pairs of keys, 0
 * on the diagonal; in each row one key that counts as the one to retain is set to 0: the last above 0.5, column 0 when
 * there is none (retain_direction=last), or always column 0 (first: the code takes the smallest of the columns above
 * 0.5 and 0 for the others, and the diagonal is such another); mean over rows, softmax over all columns. L^2 d work in
 * blocks of rows. The cuts during decode (decode=rkv) share both terms through rkv.h. */
#include <math.h>
#include <stdlib.h>

#include "kernels/score.h"
#include "sim/query_stats.h"
#include "sim/rkv.h"
#include "sim/scorer.h"

enum { ROWS = 96, DIRECTION_LAST = 0 };

/* out [n_row][ld] = q [n_row][d] . k [n_key][d]; ld >= n_key rounded up to the panel. */
KV_INLINE void dots_body(const bool v3, size_t n_row, size_t d, const float *q, size_t n_key, const float *k,
                         float *panel, float *out, size_t ld)
{
    for (size_t j = 0; j < n_key; j += KV_PANEL) {
        kv_panel_fill(v3, n_key - j < KV_PANEL ? n_key - j : KV_PANEL, d, k + j * d, panel);
        kv_panel_dots(v3, n_row, d, q, panel, out + j, ld);
    }
}

static void dots_plain(size_t n_row, size_t d, const float *q, size_t n_key, const float *k, float *panel, float *out,
                       size_t ld)
{
    dots_body(false, n_row, d, q, n_key, k, panel, out, ld);
}

KV_V3 static void dots_v3(size_t n_row, size_t d, const float *q, size_t n_key, const float *k, float *panel,
                          float *out, size_t ld)
{
    dots_body(KV_HAVE_V3, n_row, d, q, n_key, k, panel, out, ld);
}

static void dots(size_t n_row, size_t d, const float *q, size_t n_key, const float *k, float *panel, float *out,
                 size_t ld)
{
    (kv_has_v3() ? dots_v3 : dots_plain)(n_row, d, q, n_key, k, panel, out, ld);
}

static void softmax(size_t n, double *x)
{
    double max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
    for (size_t i = 0; i < n; i++) sum += x[i] = kv_exp_below(x[i] - max);
    for (size_t i = 0; i < n; i++) x[i] /= sum;
}

/* to[0..n) = attention of w rows of one KV head. row, mean: scratch of n. */
static void importance(size_t d, float scale, size_t group, size_t w, const float *q, size_t n, const float *k,
                       float *panel, float *block, size_t ld, double *row, double *mean, float *to)
{
    memset(mean, 0, n * sizeof *mean);
    for (size_t r = 0; r < w; r++) {
        for (size_t i = 0; i < n; i++) row[i] = -INFINITY;
        for (size_t g = 0; g < group; g++) {
            dots(1, d, q + (r * group + g) * d, n, k, panel, block, ld);
            for (size_t i = 0; i < n; i++) row[i] = fmax(row[i], (double)block[i] * scale);
        }
        softmax(n, row);
        for (size_t i = 0; i < n; i++) mean[i] += row[i];
    }
    for (size_t i = 0; i < n; i++) to[i] = (float)(mean[i] / (double)w);
}

/* to[0..L) = softmax of the mean similarity of each key to the others. unit [L][d]: keys of length 1. */
static void redundancy(size_t L, size_t d, const float *unit, bool last, float *panel, float *block, size_t ld,
                       double *to)
{
    memset(to, 0, L * sizeof *to);
    for (size_t r0 = 0; r0 < L; r0 += ROWS) {
        size_t m = L - r0 < ROWS ? L - r0 : ROWS;
        dots(m, d, unit + r0 * d, L, unit, panel, block, ld);
        for (size_t r = 0; r < m; r++) {
            float *row = block + r * ld;
            size_t retain = last ? L - 1 : 0;
            row[r0 + r] = 0;
            while (retain && !(row[retain] > 0.5f)) retain--;
            row[retain] = 0;
            for (size_t j = 0; j < L; j++) to[j] += row[j];
        }
    }
    for (size_t j = 0; j < L; j++) to[j] /= (double)L;
    softmax(L, to);
}

kv_status kv_rkv_terms(const kv_spec *s, size_t d, float scale, size_t group, size_t n_row, const float *q, size_t n,
                       const float *k, size_t n_scored, float *attention, float *alike, kv_error *err)
{
    size_t ld = (n + KV_PANEL - 1) / KV_PANEL * KV_PANEL;
    float *unit = NULL, *panel = NULL, *block = NULL;
    double *row = NULL, *mean = NULL;
    kv_status st = kv_array(&unit, n, d * sizeof *unit, err);
    if (!st) st = kv_array(&panel, KV_PANEL * d, sizeof *panel, err);
    if (!st) st = kv_array(&block, ROWS * ld, sizeof *block, err);
    if (!st) st = kv_array(&row, n, sizeof *row, err);
    if (!st) st = kv_array(&mean, n, sizeof *mean, err);
    if (st) goto out;
    importance(d, scale, group, n_row, q, n_scored, k, panel, block, ld, row, mean, attention);
    for (size_t i = 0; i < n; i++) {
        double k2 = 0;
        for (size_t j = 0; j < d; j++) k2 += (double)k[i * d + j] * k[i * d + j];
        for (size_t j = 0; j < d; j++) unit[i * d + j] = (float)(k[i * d + j] / (sqrt(k2) + 1e-8));
    }
    redundancy(n, d, unit, s->retain_direction == DIRECTION_LAST, panel, block, ld, row);
    for (size_t i = 0; i < n; i++) alike[i] = (float)row[i];
out:
    free(unit), free(panel), free(block), free(row), free(mean);
    return st;
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    size_t d = l->d, L = l->L, w = s->window < L ? s->window : L, n = L - w;
    float *attention = NULL, *alike = NULL, *mixed = NULL, *q = NULL;
    kv_status st = kv_array(&attention, l->n_q_head * L, sizeof *attention, err);
    if (!st) st = kv_array(&alike, l->n_kv_head * L, sizeof *alike, err);
    if (!st) st = kv_array(&mixed, kv_unit_count(l, s->granularity) * L, sizeof *mixed, err);
    if (!st) st = kv_array(&q, w * l->group, d * sizeof *q, err);
    for (size_t h = 0; h < l->n_kv_head && !st && n; h++) {
        float *to = attention + h * l->group * L;
        for (size_t r = 0; r < w; r++)
            for (size_t g = 0; g < l->group; g++)
                memcpy(q + (r * l->group + g) * d,
                       l->q_win + ((h * l->group + g) * l->max_window + (l->max_window - w) + r) * d, d * sizeof *q);
        st = kv_rkv_terms(s, d, l->scale, l->group, w, q, L, l->k + h * l->scene->n_token * d, n, to, alike + h * L,
                          err);
        for (size_t g = 1; g < l->group; g++) memcpy(to + g * L, to, L * sizeof *to);
    }
    kv_spec fixed = *s; /* the heads of a group hold the same numbers by now; pooling comes after */
    fixed.group_reduce = KV_GROUP_MEAN, fixed.pool_first = 0;
    if (!st) st = kv_reduce_heads(l, &fixed, n, attention, out, err);
    if (!st) kv_spread_kv(l, s, alike, mixed);
    for (size_t u = 0; u < kv_unit_count(l, s->granularity) && !st; u++)
        for (size_t i = 0; i < n; i++)
            out[u * L + i] = (float)(s->mix_lambda * out[u * L + i] - (1 - s->mix_lambda) * mixed[u * L + i]);
    free(attention), free(alike), free(mixed), free(q);
    return st;
}

const kv_scorer kv_scorer_rkv = {"rkv",
                                 "attention of the window against similarity to other keys",
                                 "window pooling kernel mix_lambda retain_direction",
                                 KV_NEED_WINDOW,
                                 true,
                                 false,
                                 score};
