/* query_stats.c - queries before RoPE, average rotation, Gram matrices and quadratic forms in double. */
#include "sim/query_stats.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/isa.h"
#include "kernels/lanes.h"
#include "sim/dmath.h"

double kv_exp_below(double x)
{
    return x > -700 ? kv_exp(x) : x <= -700 ? 0 : x; /* kv_exp takes |x| < 700 */
}

/* ------------------------------------------------------------------------------------------------ rotation */
float kv_rope_frequency(const kv_trace_info *in, uint32_t j)
{
    uint32_t rot = in->rope_dim ? in->rope_dim : in->head_dim;
    return in->inv_freq ? in->inv_freq[j] : (float)kv_exp(-2.0 * j / rot * kv_log(in->rope_theta));
}

kv_status kv_rotation_open(const kv_layer *l, const char *who, uint32_t n_future, bool rows, kv_rotation *r,
                           kv_error *err)
{
    const kv_trace_info *in = l->scene->info;
    uint32_t rot = in->rope_dim ? in->rope_dim : in->head_dim;
    size_t n;
    *r = (kv_rotation){.n_pair = rot / 2, .undo = 1 / ((double)in->rope_mscale * in->rope_mscale)};
    if (!(in->rope_theta > 0) && !in->inv_freq)
        return kv_fail(
            err, KV_EMISSING,
            "score=%s needs queries before RoPE, and trace '%s' does not say how they were rotated; import with "
            "--rope-theta X",
            who, kv_trace_path(l->scene->trace));
    if (!kv_mul(l->L, r->n_pair, &n)) return kv_fail(err, KV_ENOMEM, "tables of %u rotations are too large", l->L);
    kv_status st = kv_array(&r->mean_cos, r->n_pair, sizeof *r->mean_cos, err);
    if (!st) st = kv_array(&r->mean_sin, r->n_pair, sizeof *r->mean_sin, err);
    if (!st && rows) st = kv_array(&r->cos, n, sizeof *r->cos, err);
    if (!st && rows) st = kv_array(&r->sin, n, sizeof *r->sin, err);
    for (uint32_t j = 0; j < r->n_pair && !st; j++) {
        double f = kv_rope_frequency(in, j), m = in->rope_mscale;
        for (uint32_t t = 0; t < l->L && rows; t++) {
            r->cos[(size_t)t * r->n_pair + j] = (float)(cos(t * f) * m);
            r->sin[(size_t)t * r->n_pair + j] = (float)(sin(t * f) * m);
        }
        for (uint32_t t = 0; t < n_future; t++) {
            double angle = ((double)l->L + t) * f;
            r->mean_cos[j] += (float)(cos(angle) * m);
            r->mean_sin[j] += (float)(sin(angle) * m);
        }
        r->mean_cos[j] /= n_future, r->mean_sin[j] /= n_future;
    }
    if (st) kv_rotation_close(r);
    return st;
}

void kv_rotation_close(kv_rotation *r)
{
    free(r->cos), free(r->sin), free(r->mean_cos), free(r->mean_sin);
    *r = (kv_rotation){0};
}

void kv_rotation_undo(const kv_rotation *r, const kv_layer *l, uint32_t first, const float *q, float *out)
{
    size_t d = l->d, h = r->n_pair;
    for (size_t t = first; t < l->L; t++, out += d) {
        const float *x = q + t * d, *c = r->cos + t * h, *s = r->sin + t * h;
        for (size_t j = 0; j < h; j++) {
            out[j] = (float)(((double)x[j] * c[j] + (double)x[j + h] * s[j]) * r->undo);
            out[j + h] = (float)(((double)x[j + h] * c[j] - (double)x[j] * s[j]) * r->undo);
        }
        for (size_t j = 2 * h; j < d; j++) out[j] = x[j];
    }
}

/* x = R x for elements `stride` apart. */
static void turn(const kv_rotation *r, double *x, size_t stride)
{
    for (size_t j = 0; j < r->n_pair; j++) {
        double *a = x + j * stride, *b = x + (j + r->n_pair) * stride, a0 = *a;
        *a = a0 * r->mean_cos[j] - *b * r->mean_sin[j];
        *b = *b * r->mean_cos[j] + a0 * r->mean_sin[j];
    }
}

void kv_rotation_future(const kv_rotation *r, size_t d, double *mean, double *cov)
{
    size_t ld = kv_pad4(d);
    turn(r, mean, 1);
    for (size_t j = 0; j < d && cov; j++) turn(r, cov + j, ld);
    for (size_t i = 0; i < d && cov; i++) turn(r, cov + i * ld, 1);
}

/* ------------------------------------------------------------------------------------------------ matrices */
void kv_mean_row(size_t n, size_t d, const float *x, double *mean)
{
    memset(mean, 0, d * sizeof *mean);
    for (size_t r = 0; r < n; r++)
        for (size_t j = 0; j < d; j++) mean[j] += x[r * d + j];
    for (size_t j = 0; j < d; j++) mean[j] /= (double)n;
}

enum { GRAM_ROWS = 8, FORM_ROWS = 16 };

/* c, a [GRAM_ROWS][ld]: centred rows and the same times their weight. */
KV_INLINE void gram_body(size_t n, size_t d, const float *x, const double *w, const double *mean, double *g, double *c,
                         double *a)
{
    size_t ld = kv_pad4(d);
    for (size_t r0 = 0; r0 < n; r0 += GRAM_ROWS) {
        size_t m = n - r0 < GRAM_ROWS ? n - r0 : GRAM_ROWS;
        for (size_t t = 0; t < m; t++)
            for (size_t j = 0; j < d; j++) {
                c[t * ld + j] = x[(r0 + t) * d + j] - (mean ? mean[j] : 0);
                a[t * ld + j] = c[t * ld + j] * (w ? w[r0 + t] : 1);
            }
        for (size_t i = 0; i < d; i++)
            for (size_t j = 0; j <= i; j += 4) {
                kv_d4 sum = KV_LOAD(kv_d4, g + i * ld + j);
                for (size_t t = 0; t < m; t++) sum += a[t * ld + i] * KV_LOAD(kv_d4, c + t * ld + j);
                memcpy(g + i * ld + j, &sum, sizeof sum);
            }
    }
}

static void gram_plain(size_t n, size_t d, const float *x, const double *w, const double *mean, double *g, double *c,
                       double *a)
{
    gram_body(n, d, x, w, mean, g, c, a);
}

KV_V3 static void gram_v3(size_t n, size_t d, const float *x, const double *w, const double *mean, double *g, double *c,
                          double *a)
{
    gram_body(n, d, x, w, mean, g, c, a);
}

bool kv_gram(size_t n, size_t d, const float *x, const double *w, const double *mean, double *g)
{
    size_t ld = kv_pad4(d);
    double *c = calloc(2 * GRAM_ROWS * ld, sizeof *c);
    if (!c) return false;
    (kv_has_v3() ? gram_v3 : gram_plain)(n, d, x, w, mean, g, c, c + GRAM_ROWS * ld);
    free(c);
    return true;
}

/* Sixteen rows side by side, xt [d][16]: no lane meets another. */
KV_INLINE void forms_body(size_t n, size_t d, const double *lower, const float *x, bool square, double *out, double *xt)
{
    size_t ld = kv_pad4(d);
    for (size_t r0 = 0; r0 < n; r0 += FORM_ROWS) {
        size_t m = n - r0 < FORM_ROWS ? n - r0 : FORM_ROWS;
        kv_d4 z[4] = {{0}, {0}, {0}, {0}};
        for (size_t j = 0; j < d; j++)
            for (size_t t = 0; t < FORM_ROWS; t++) xt[j * FORM_ROWS + t] = t < m ? x[(r0 + t) * d + j] : 0;
        for (size_t i = 0; i < d; i++) {
            kv_d4 y0 = {0}, y1 = {0}, y2 = {0}, y3 = {0};
            for (size_t j = 0; j <= i; j++) {
                const double s = lower[i * ld + j], *v = xt + j * FORM_ROWS;
                y0 += s * KV_LOAD(kv_d4, v), y1 += s * KV_LOAD(kv_d4, v + 4);
                y2 += s * KV_LOAD(kv_d4, v + 8), y3 += s * KV_LOAD(kv_d4, v + 12);
            }
            const double *v = xt + i * FORM_ROWS;
            z[0] += y0 * (square ? y0 : KV_LOAD(kv_d4, v)), z[1] += y1 * (square ? y1 : KV_LOAD(kv_d4, v + 4));
            z[2] += y2 * (square ? y2 : KV_LOAD(kv_d4, v + 8)), z[3] += y3 * (square ? y3 : KV_LOAD(kv_d4, v + 12));
        }
        for (size_t t = 0; t < m; t++) out[r0 + t] = z[t / 4][t % 4];
    }
}

static void forms_plain(size_t n, size_t d, const double *lower, const float *x, bool square, double *out, double *xt)
{
    forms_body(n, d, lower, x, square, out, xt);
}

KV_V3 static void forms_v3(size_t n, size_t d, const double *lower, const float *x, bool square, double *out,
                           double *xt)
{
    forms_body(n, d, lower, x, square, out, xt);
}

bool kv_lower_forms(size_t n, size_t d, const double *lower, const float *x, bool square, double *out)
{
    double *xt = malloc(d * FORM_ROWS * sizeof *xt + 1);
    if (!xt) return false;
    (kv_has_v3() ? forms_v3 : forms_plain)(n, d, lower, x, square, out, xt);
    free(xt);
    return true;
}

void kv_cholesky_inverse(size_t d, double *a)
{
    size_t ld = kv_pad4(d);
    for (size_t j = 0; j < d; j++)
        for (size_t i = j; i < d; i++) {
            double sum = a[i * ld + j];
            for (size_t k = 0; k < j; k++) sum -= a[i * ld + k] * a[j * ld + k];
            /* a >= I, so every pivot is at least 1; less is rounding */
            if (i == j)
                a[j * ld + j] = sqrt(sum >= 1 ? sum : 1);
            else
                a[i * ld + j] = sum / a[j * ld + j];
        }
    for (size_t j = 0; j < d; j++) { /* column j of the inverse: rows above it stay as they are needed below */
        a[j * ld + j] = 1 / a[j * ld + j];
        for (size_t i = j + 1; i < d; i++) {
            double sum = 0;
            for (size_t k = j; k < i; k++) sum -= a[i * ld + k] * a[k * ld + j];
            a[i * ld + j] = sum / a[i * ld + i];
        }
    }
}

void kv_raise_sinks(const kv_layer *l, uint32_t n_unit, uint32_t sinks, float *score)
{
    float max = -INFINITY;
    size_t L = l->L, n = sinks < L ? sinks : L;
    for (size_t u = 0; u < n_unit; u++)
        for (size_t i = n; i < L; i++) max = score[u * L + i] > max ? score[u * L + i] : max;
    float above = max > -INFINITY ? max + 1 : 1;
    if (!(above > max)) above = nextafterf(max, INFINITY); /* beyond 2^24 one more is no more */
    for (size_t u = 0; u < n_unit; u++)
        for (size_t i = 0; i < n; i++) score[u * L + i] = above;
}
