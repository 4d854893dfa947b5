/* ranks.c - signed ranks and rank correlations (ranks.h). */
#include "analyze/ranks.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/dist.h"

typedef struct {
    double v, w;
    size_t at;
} item;

static int by_v(const void *a, const void *b)
{
    const item *x = a, *y = b;
    if (x->v != y->v) return x->v < y->v ? -1 : 1;
    if (x->w != y->w) return x->w < y->w ? -1 : 1;
    return 0;
}

kv_status kv_ranks(const double *v, size_t n, double *rank, kv_error *err)
{
    item *o = NULL;
    kv_status st = kv_array(&o, n, sizeof *o, err);
    if (st) return st;
    for (size_t i = 0; i < n; i++) o[i] = (item){.v = v[i], .at = i};
    if (n > 1) qsort(o, n, sizeof *o, by_v);
    for (size_t i = 0, j; i < n; i = j) {
        for (j = i + 1; j < n && o[j].v == o[i].v;) j++;
        for (size_t k = i; k < j; k++) rank[o[k].at] = (double)(i + j + 1) / 2;
    }
    free(o);
    return KV_OK;
}

/* P(W <= w) and P(W >= w) over all signs, W the sum of the ranks with sign plus. Ranks are multiples of one half, so
 * sums of doubled ranks are counted: ways[s] / 2^n. */
static kv_status exact_tails(const double *rank, size_t n, double w, double *below, double *above, kv_error *err)
{
    double *ways = NULL;
    size_t top = n * (n + 1), done = 0, at = (size_t)(2 * w + 0.5);
    kv_status st = kv_array(&ways, top + 1, sizeof *ways, err);
    if (st) return st;
    ways[0] = 1;
    for (size_t i = 0; i < n; i++) {
        size_t r = (size_t)(2 * rank[i] + 0.5);
        done += r;
        for (size_t s = done; s + 1 > r; s--) ways[s] = (ways[s] + ways[s - r]) / 2;
        for (size_t s = 0; s < r; s++) ways[s] /= 2;
    }
    *below = *above = 0;
    for (size_t s = 0; s <= top; s++) {
        if (s <= at) *below += ways[s];
        if (s >= at) *above += ways[s];
    }
    free(ways);
    return KV_OK;
}

kv_status kv_wilcoxon(const double *d, size_t n, size_t exact_max, kv_wilcoxon_result *out, kv_error *err)
{
    double *size = NULL, *rank = NULL, minus = 0, ties = 0;
    kv_status st;
    *out = (kv_wilcoxon_result){.p = 1};
    if ((st = kv_array(&size, n, sizeof *size, err)) || (st = kv_array(&rank, n, sizeof *rank, err))) goto out;
    size_t m = 0;
    for (size_t i = 0; i < n; i++)
        if (d[i] != 0) size[m++] = fabs(d[i]);
    out->n = m;
    if (!m || (st = kv_ranks(size, m, rank, err))) goto out;
    for (size_t i = 0, k = 0; i < n; i++)
        if (d[i] != 0) *(d[i] > 0 ? &out->w_plus : &minus) += rank[k++];
    out->rank_biserial = (out->w_plus - minus) / (out->w_plus + minus);
    if ((out->exact = m <= exact_max)) {
        double below, above;
        if ((st = exact_tails(rank, m, out->w_plus, &below, &above, err))) goto out;
        out->p = fmin(1, 2 * fmin(below, above));
        goto out;
    }
    /* sum of t^3 - t over groups of t equal ranks: a rank that t share adds t^2 - 1 */
    for (size_t i = 0; i < m; i++) {
        double t = 0;
        for (size_t k = 0; k < m; k++) t += rank[k] == rank[i];
        ties += t * t - 1;
    }
    double c = (double)m, mean = c * (c + 1) / 4, var = c * (c + 1) * (2 * c + 1) / 24 - ties / 48;
    out->p = 2 * kv_normal_cdf(-fabs(out->w_plus - mean) / sqrt(var));
out:
    free(size), free(rank);
    return st;
}

/* Exchanges a merge sort needs on w, counted: pairs in the wrong order. */
static double exchanges(double *w, double *tmp, size_t n)
{
    if (n < 2) return 0;
    size_t h = n / 2, i = 0, j = h, k = 0;
    double count = exchanges(w, tmp, h) + exchanges(w + h, tmp, n - h);
    while (i < h && j < n)
        if (w[j] < w[i])
            count += (double)(h - i), tmp[k++] = w[j++];
        else
            tmp[k++] = w[i++];
    while (i < h) tmp[k++] = w[i++];
    memcpy(w, tmp, k * sizeof *w);
    return count;
}

static double pairs(double t)
{
    return t * (t - 1) / 2;
}

/* Knight 1966: sort by (x, y), count ties, count exchanges of y. */
kv_status kv_kendall_tau_b(const double *x, const double *y, size_t n, double *tau, kv_error *err)
{
    item *o = NULL;
    double *w = NULL, *tmp = NULL, tx = 0, ty = 0, both = 0, all = pairs((double)n);
    kv_status st;
    *tau = NAN;
    if ((st = kv_array(&o, n, sizeof *o, err)) || (st = kv_array(&w, n, sizeof *w, err)) ||
        (st = kv_array(&tmp, n, sizeof *tmp, err)))
        goto out;
    for (size_t i = 0; i < n; i++) o[i] = (item){.v = x[i], .w = y[i]};
    if (n > 1) qsort(o, n, sizeof *o, by_v);
    for (size_t i = 0, j; i < n; i = j) {
        for (j = i + 1; j < n && o[j].v == o[i].v;) j++;
        tx += pairs((double)(j - i));
        for (size_t k = i, l; k < j; k = l) {
            for (l = k + 1; l < j && o[l].w == o[k].w;) l++;
            both += pairs((double)(l - k));
        }
    }
    for (size_t i = 0; i < n; i++) w[i] = o[i].w;
    double wrong = exchanges(w, tmp, n);
    for (size_t i = 0, j; i < n; i = j) { /* w is sorted now */
        for (j = i + 1; j < n && w[j] == w[i];) j++;
        ty += pairs((double)(j - i));
    }
    if (all - tx > 0 && all - ty > 0) *tau = (all - tx - ty + both - 2 * wrong) / sqrt((all - tx) * (all - ty));
out:
    free(o), free(w), free(tmp);
    return st;
}

kv_status kv_spearman(const double *x, const double *y, size_t n, double *rho, kv_error *err)
{
    double *a = NULL, *b = NULL, xy = 0, xx = 0, yy = 0, mid = ((double)n + 1) / 2;
    kv_status st;
    *rho = NAN;
    if ((st = kv_array(&a, n, sizeof *a, err)) || (st = kv_array(&b, n, sizeof *b, err)) ||
        (st = kv_ranks(x, n, a, err)) || (st = kv_ranks(y, n, b, err)))
        goto out;
    for (size_t i = 0; i < n; i++) {
        double p = a[i] - mid, q = b[i] - mid;
        xy += p * q, xx += p * p, yy += q * q;
    }
    if (xx > 0 && yy > 0) *rho = xy / sqrt(xx * yy);
out:
    free(a), free(b);
    return st;
}
