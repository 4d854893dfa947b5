/* table.c - the checks of all kernels; see table.h. */
#include "kernels/table.h"
#include "kernels/math.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define COUNT(a) (sizeof(a) / sizeof *(a))

/* splitmix64 */
static uint64_t next(uint64_t *s)
{
    uint64_t z = *s += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void kv_fill_normal(uint64_t seed, size_t n, float *x)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t a = next(&seed), b = next(&seed);
        int64_t sum = 0; /* six uniforms of 21 bits, each of width 2 after scaling: variance 2 */
        for (int j = 0; j < 3; j++) sum += (int64_t)(a >> 21 * j & 0x1fffff) + (int64_t)(b >> 21 * j & 0x1fffff);
        x[i] = (float)(sum - 3 * 0x1fffff) * 0x1p-20f * 0.7071f;
    }
}

static void fail(kv_verdict *v, const char *why)
{
    if (v->ok) snprintf(v->why, sizeof v->why, "%s", why);
    v->ok = false;
}

static void compare_d(const char *what, size_t n, const double *got, const double *want, double tol, kv_verdict *v)
{
    double sq = 0;
    size_t finite = 0;
    for (size_t i = 0; i < n; i++)
        if (isfinite(want[i])) sq += want[i] * want[i], finite++;
    double rms = finite ? sqrt(sq / (double)finite) : 0;
    for (size_t i = 0; i < n; i++) {
        if (got[i] == want[i]) continue;
        double share = fabs(got[i] - want[i]) / (tol * (rms + fabs(want[i])));
        if (share > v->worst) v->worst = share;
        if (share <= 1) continue;
        if (v->ok) snprintf(v->why, sizeof v->why, "%s[%zu] is %.9g, expected %.9g", what, i, got[i], want[i]);
        v->ok = false;
    }
}

void kv_compare(const char *what, size_t n, const float *got, const float *want, double tol, kv_verdict *v)
{
    double *wide = malloc((2 * n + 1) * sizeof *wide);
    if (!wide) {
        fail(v, "out of memory");
        return;
    }
    for (size_t i = 0; i < n; i++) wide[i] = got[i], wide[n + i] = want[i];
    compare_d(what, n, wide, wide + n, tol, v);
    free(wide);
}

static void same_bytes(const char *what, const void *got, const void *want, size_t n, kv_verdict *v)
{
    const unsigned char *a = got, *b = want;
    for (size_t i = 0; i < n; i++) {
        if (a[i] == b[i]) continue;
        if (v->ok) snprintf(v->why, sizeof v->why, "%s differs at byte %zu of %zu", what, i, n);
        v->ok = false;
        return;
    }
}

/* n floats: normal, or zero when the fill factor is 0. NULL only when out of memory. */
static float *normals(uint64_t *seed, size_t n, float factor)
{
    float *x = malloc((n + 1) * sizeof *x);
    if (!x) return NULL;
    kv_fill_normal(next(seed), n, x);
    for (size_t i = 0; i < n; i++) x[i] *= factor;
    return x;
}

static kv_attn_shape shape_of(const kv_case *c)
{
    float scale = 1 / sqrtf((float)c->d);
    return (kv_attn_shape){c->n_row, c->n_key, c->d, c->row0, c->window, scale, c->softcap};
}

/* kind of attention inputs: 0 ordinary, 1 all queries zero (all scores equal), 2 peaked (scores up to some tens) */
static float query_factor(const kv_case *c)
{
    return c->kind == 1 ? 0.f : c->kind == 2 ? 8.f : 1.f;
}

static void check_attention(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    kv_attn_shape s = shape_of(c);
    size_t ld = c->d + 3;
    /* a score of some tens in float is off by some 1e-6, and p by as much in proportion */
    double tol = self->tol * (c->kind == 2 ? 4 : 1);
    float *q = normals(&seed, c->n_row * c->d, query_factor(c)), *k = normals(&seed, c->n_key * c->d, 1);
    float *x = normals(&seed, c->n_key * c->d, 1), *got = normals(&seed, c->n_row * (ld + 5), 1);
    float *want = normals(&seed, c->n_row * (ld + 5), 1);
    if (q && k && x && got && want) {
        float *lse[2] = {got + c->n_row * ld, want + c->n_row * ld}, *st[2] = {lse[0] + c->n_row, lse[1] + c->n_row};
        memcpy(want, got, c->n_row * ld * sizeof *want); /* what lies between the rows must stay */
        if (!kv_attention(&s, q, k, x, got, ld, lse[0], st[0])) fail(v, "kv_attention failed");
        if (!kv_attention_ref(&s, q, k, x, want, ld, lse[1], st[1])) fail(v, "kv_attention_ref failed");
        kv_compare("out", c->n_row * ld, got, want, tol, v);
        kv_compare("lse", c->n_row, lse[0], lse[1], tol, v);
        for (size_t r = 0; r < c->n_row; r++) {
            /* near ties may fall either way: the column is as good as the one expected */
            float *a = st[0] + 4 * r, *b = st[1] + 4 * r;
            if (a[1] != b[1] &&
                !(a[1] < (float)c->n_key && kv_score(&s, q + r * c->d, k + (size_t)a[1] * c->d) >=
                                                kv_score(&s, q + r * c->d, k + (size_t)b[1] * c->d) - 1e-4f))
                fail(v, "column of the largest p is wrong");
            a[1] = b[1] = 0;
        }
        kv_compare("stat", 4 * c->n_row, st[0], st[1], 4 * tol, v); /* products of two such numbers */
        float *again = normals(&seed, c->n_row * ld, 1);
        if (!again || !kv_attention(&s, q, k, x, again, ld, lse[1], NULL))
            fail(v, "kv_attention failed");
        else
            kv_compare("lse without stat", c->n_row, lse[1], lse[0], tol, v);
        free(again);
    } else {
        fail(v, "out of memory");
    }
    free(q), free(k), free(x), free(got), free(want);
}

static void check_colsum(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    (void)self;
    kv_attn_shape s = shape_of(c);
    float *q = normals(&seed, c->n_row * c->d, query_factor(c)), *k = normals(&seed, c->n_key * c->d, 1);
    float *lse = normals(&seed, c->n_row, 1);
    double *acc = malloc((2 * c->n_key + 1) * sizeof *acc);
    if (q && k && lse && acc) {
        for (size_t i = 0; i < 2 * c->n_key; i++) acc[i] = (double)(i % c->n_key % 7);
        for (size_t i = 0; i < c->n_row; i++) lse[i] += 3;
        if (!kv_colsum(&s, q, k, lse, acc) || !kv_colsum_ref(&s, q, k, lse, acc + c->n_key)) fail(v, "out of memory");
        same_bytes("acc", acc, acc + c->n_key, c->n_key * sizeof *acc, v);
    } else {
        fail(v, "out of memory");
    }
    free(q), free(k), free(lse), free(acc);
}

static void check_probs(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    (void)self;
    kv_attn_shape s = shape_of(c);
    float *q = normals(&seed, c->n_row * c->d, query_factor(c)), *k = normals(&seed, c->n_key * c->d, 1);
    float *p = normals(&seed, 2 * c->n_row * c->n_key, 1), *want = p + c->n_row * c->n_key;
    if (q && k && p) {
        if (!kv_probs(&s, q, k, p) || !kv_probs_ref(&s, q, k, want)) fail(v, "out of memory");
        same_bytes("p", p, want, c->n_row * c->n_key * sizeof *p, v);
    } else {
        fail(v, "out of memory");
    }
    free(q), free(k), free(p);
}

/* kind: 0 normal, 1 all equal, 2 with NaN, both infinities and zeros, 3 a handful of values, 4 within one exponent */
static void check_rank(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    (void)self;
    size_t n = c->n_key;
    float *x = normals(&seed, n, 1);
    uint32_t *order = malloc((2 * n + 1) * sizeof *order);
    if (x && order) {
        const float odd[] = {NAN, -NAN, INFINITY, -INFINITY, 0.f, -0.f, 1.f, -1.f, FLT_MIN / 2, -FLT_MAX};
        for (size_t i = 0; i < n; i++) {
            uint64_t r = next(&seed);
            if (c->kind == 1) x[i] = 0.25f;
            if (c->kind == 2 && r % 2) x[i] = odd[r / 2 % COUNT(odd)];
            if (c->kind == 3) x[i] = (float)(r % 5) - 2;
            if (c->kind == 4) x[i] = 1 + (float)(r % 1000) * 0x1p-23f;
        }
        if (!kv_rank(n, x, order) || !kv_rank_ref(n, x, order + n)) fail(v, "out of memory");
        same_bytes("order", order, order + n, n * sizeof *order, v);
    } else {
        fail(v, "out of memory");
    }
    free(x), free(order);
}

/* kind: 0 everything asked for, 1 masses only, 2 checkpoints at 0 and repeated */
static void check_prefix(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    enum { CHECKS = 9 };
    size_t n = c->n_key, m = c->n_row, d = c->d;
    uint32_t check[CHECKS];
    for (size_t i = 0; i < CHECKS; i++) check[i] = (uint32_t)(n * (i + 1) * (i + 1) / (CHECKS * CHECKS));
    if (c->kind == 2) check[0] = check[1] = 0, check[CHECKS - 2] = check[CHECKS - 3];
    kv_attn_shape s = shape_of(c);
    float *q = normals(&seed, m * d, 1), *k = normals(&seed, n * d, 1), *x = normals(&seed, n * d, 1);
    float *lse = normals(&seed, m, 1), *base = normals(&seed, m * d, 0.1f), *rank = normals(&seed, n, 1);
    float *out = malloc((2 * CHECKS * m * d + 1) * sizeof *out), *want = out ? out + CHECKS * m * d : NULL;
    double *mass = malloc((4 * CHECKS + 1) * m * sizeof *mass);
    uint32_t *order = malloc((n + 1) * sizeof *order);
    uint8_t *flag = malloc(n + 1);
    if (q && k && x && lse && base && rank && out && mass && order && flag && kv_rank(n, rank, order)) {
        double *a[4] = {mass, mass + CHECKS * m, mass + 2 * CHECKS * m, mass + 3 * CHECKS * m};
        double *base_mass = mass + 4 * CHECKS * m;
        for (size_t i = 0; i < n; i++) flag[i] = next(&seed) % 3 == 0;
        for (size_t r = 0; r < m; r++) base_mass[r] = (double)r / (double)m, lse[r] += logf((float)n + 1);
        bool only = c->kind == 1;
        if (!kv_prefix(m, d, q, lse, s.scale, s.softcap, k, only ? NULL : x, n, order, CHECKS, check, base_mass, base,
                       flag, a[0], a[1], only ? NULL : out) ||
            !kv_prefix_ref(m, d, q, lse, s.scale, s.softcap, k, x, n, order, CHECKS, check, base_mass, base, flag, a[2],
                           a[3], want))
            fail(v, "out of memory");
        compare_d("mass", CHECKS * m, a[0], a[2], self->tol, v);
        compare_d("cmass", CHECKS * m, a[1], a[3], self->tol, v);
        if (!only) kv_compare("out", CHECKS * m * d, out, want, self->tol, v);
    } else {
        fail(v, "out of memory");
    }
    free(q), free(k), free(x), free(lse), free(base), free(rank), free(out), free(mass), free(order), free(flag);
}

static void check_turned(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    (void)self;
    kv_attn_shape s = shape_of(c);
    size_t heads = c->d % 3 + 1, q_head = c->n_row * c->d + 5, n = heads * c->n_row,
           ld = (n + 15) / 16 * 16 + (c->kind == 2 ? 16 : 0), all = c->n_key * ld;
    float *q = normals(&seed, heads * q_head, query_factor(c)), *k = normals(&seed, c->n_key * c->d, 1);
    float *p = normals(&seed, 2 * (all + n), 1), *want = p + all + n;
    if (q && k && p) {
        if (!kv_probs_turned(&s, heads, q, q_head, k, p, ld, p + all) ||
            !kv_probs_turned_ref(&s, heads, q, q_head, k, want, ld, want + all))
            fail(v, "out of memory");
        same_bytes("p and lse", p, want, (all + n) * sizeof *p, v);
    } else {
        fail(v, "out of memory");
    }
    free(q), free(k), free(p);
}

/* A walk in uneven steps against one in a single step, with a look after each. kind: 1 masses only */
static void check_walk(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    (void)self;
    size_t m = c->n_row, d = c->d, n = c->n_key, ld = m + 7, ld_diff = d + 2;
    float *p = normals(&seed, n * ld, 1), *x = normals(&seed, n * d, 1), *rank = normals(&seed, n, 1);
    float *o = normals(&seed, m * d, 1), *f = normals(&seed, 2 * m * (2 * d + ld_diff), 1);
    double *sum = malloc((8 * m + 1) * sizeof *sum);
    uint32_t *order = malloc((n + 1) * sizeof *order);
    uint8_t *flag = malloc(n + 1);
    if (p && x && rank && o && f && sum && order && flag && kv_rank(n, rank, order)) {
        float *out[2] = {f, f + m * d}, *part[2] = {f + 2 * m * d, f + 3 * m * d},
              *diff[2] = {f + 4 * m * d, f + 4 * m * d + m * ld_diff};
        memcpy(out[1], out[0], m * d * sizeof *f), memcpy(diff[1], diff[0], m * ld_diff * sizeof *f);
        for (size_t i = 0; i < 2 * m * d; i++) part[0][i] = 0; /* both */
        for (size_t i = 0; i < n; i++) flag[i] = next(&seed) % 3 == 0;
        for (size_t r = 0; r < m; r++) sum[r] = sum[m + r] = (double)r / (double)m, sum[2 * m + r] = sum[3 * m + r] = 0;
        bool only = c->kind == 1;
        for (size_t at = 0, to; at < n; at = to) {
            to = at + 1 + next(&seed) % 100;
            if (to > n) to = n;
            kv_walk(m, d, p, ld, only ? NULL : x, at, to - at, order + at, flag, sum, sum + 2 * m, only ? NULL : out[0],
                    only ? NULL : part[0]);
        }
        kv_walk_ref(m, d, p, ld, x, 0, n, order, flag, sum + m, sum + 3 * m, only ? NULL : out[1], part[1]);
        same_bytes("mass", sum, sum + m, m * sizeof *sum, v);
        same_bytes("cmass", sum + 2 * m, sum + 3 * m, m * sizeof *sum, v);
        same_bytes("out", out[0], out[1], m * d * sizeof *f, v);
        same_bytes("part", part[0], part[1], m * d * sizeof *f, v);
        kv_walk_compare(m, d, sum, out[0], part[0], o, sum + 4 * m, sum + 5 * m, only ? NULL : diff[0], ld_diff);
        kv_walk_compare_ref(m, d, sum, out[0], part[0], o, sum + 6 * m, sum + 7 * m, only ? NULL : diff[1], ld_diff);
        same_bytes("error2 and dot", sum + 4 * m, sum + 6 * m, 2 * m * sizeof *sum, v);
        same_bytes("diff", diff[0], diff[1], m * ld_diff * sizeof *f, v);
    } else {
        fail(v, "out of memory");
    }
    free(p), free(x), free(rank), free(o), free(f), free(sum), free(order), free(flag);
}

static void check_project(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    float *x = normals(&seed, c->n_row * c->d, 1), *w = normals(&seed, c->n_key * c->d, 1);
    double *norm = malloc((2 * c->n_row + 1) * sizeof *norm);
    if (x && w && norm) {
        if (!kv_project_norm(c->n_row, c->d, c->n_key, x, w, norm) ||
            !kv_project_norm_ref(c->n_row, c->d, c->n_key, x, w, norm + c->n_row))
            fail(v, "out of memory");
        compare_d("norm", c->n_row, norm, norm + c->n_row, self->tol, v);
    } else {
        fail(v, "out of memory");
    }
    free(x), free(w), free(norm);
}

/* kind 1: w without full rank, where r is not unique and only its norms are compared */
static void check_triangle(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t out = c->n_key, in = c->d, k = out < in ? out : in;
    float *x = normals(&seed, c->n_row * in, 1), *w = normals(&seed, out * in, 1), *r = malloc((2 * k * in + 1) * 4);
    double *norm = malloc((3 * c->n_row + 1) * sizeof *norm);
    if (x && w && r && norm) {
        for (size_t i = 0; i < out * in && c->kind == 1; i++) w[i] = i / in % 3 == 2 ? w[i % in] : w[i];
        for (size_t i = 0; i < out && c->kind == 1; i++) w[i * in + in / 2] = 0;
        if (!kv_triangle(out, in, w, r) || !kv_triangle_ref(out, in, w, r + k * in) ||
            !kv_project_norm_ref(c->n_row, in, out, x, w, norm) ||
            !kv_project_norm_upper(c->n_row, in, k, x, r, norm + c->n_row) ||
            !kv_project_norm_upper_ref(c->n_row, in, k, x, r + k * in, norm + 2 * c->n_row))
            fail(v, "out of memory");
        if (c->kind != 1) kv_compare("r", k * in, r, r + k * in, self->tol, v);
        for (size_t i = 0; i < k; i++)
            for (size_t j = 0; j < i; j++)
                if (r[i * in + j] != 0) fail(v, "not a triangle");
        compare_d("norm through r", c->n_row, norm + c->n_row, norm, self->tol, v);
        compare_d("norm through the definition's r", c->n_row, norm + 2 * c->n_row, norm, self->tol, v);
    } else {
        fail(v, "out of memory");
    }
    free(x), free(w), free(r), free(norm);
}

static void check_project_l1(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t ld = c->d + 3;
    float *x = normals(&seed, c->n_row * c->d, 1), *w = normals(&seed, c->n_key * ld, 1);
    double *norm = malloc((2 * c->n_row + 1) * sizeof *norm);
    if (x && w && norm) {
        if (!kv_project_l1(c->n_row, c->d, c->n_key, x, w, ld, norm) ||
            !kv_project_l1_ref(c->n_row, c->d, c->n_key, x, w, ld, norm + c->n_row))
            fail(v, "out of memory");
        compare_d("norm", c->n_row, norm, norm + c->n_row, self->tol, v);
    } else {
        fail(v, "out of memory");
    }
    free(x), free(w), free(norm);
}

static void check_entropy(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t n = c->n_row * c->n_key;
    float *a = normals(&seed, n, 1), *b = normals(&seed, n, 1), *d = malloc((2 * n + 1) * sizeof *d);
    if (a && b && d) {
        double got[2] = {0, kv_diff_squares(n, a, b, d)}, want[2] = {0, kv_diff_squares_ref(n, a, b, d + n)};
        if (memcmp(d, d + n, n * sizeof *d)) fail(v, "differences differ");
        for (size_t i = 0; i < n; i++) a[i] = i % 7 ? a[i] * a[i] * 1e-3f : 0;
        double *col = malloc((4 * c->n_key + 1) * sizeof *col);
        if (col) {
            kv_column_spread(c->n_row, c->n_key, a, c->n_key, col, col + c->n_key);
            kv_column_spread_ref(c->n_row, c->n_key, a, c->n_key, col + 2 * c->n_key, col + 3 * c->n_key);
            same_bytes("mean and spread", col, col + 2 * c->n_key, 2 * c->n_key * sizeof *col, v);
        } else {
            fail(v, "out of memory");
        }
        free(col);
        got[0] = kv_entropy(n, a, 1e-10f), want[0] = kv_entropy_ref(n, a, 1e-10f);
        compare_d("entropy and squares", 2, got, want, self->tol, v);
        for (size_t i = 0; i < n; i++) {
            double x = a[i] + 1e-10;
            if (!(fabs(kv_logd(x) - log(x)) <= 1e-14 * fabs(log(x)) + 1e-16)) fail(v, "kv_logd is not the logarithm");
        }
    } else {
        fail(v, "out of memory");
    }
    free(a), free(b), free(d);
}

static void check_matmul(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t m = c->n_row, n = c->n_key, ldc = n + 5;
    float *a = normals(&seed, m * c->d, 1), *b = normals(&seed, n * c->d, 1), *got = normals(&seed, m * ldc, 1);
    float *want = malloc((m * ldc + 1) * sizeof *want);
    if (a && b && got && want) {
        memcpy(want, got, m * ldc * sizeof *want);
        if (!kv_matmul(m, n, c->d, a, b, got, ldc, 2) || !kv_matmul_ref(m, n, c->d, a, b, want, ldc))
            fail(v, "kv_matmul failed");
        kv_compare("c", m * ldc, got, want, self->tol, v);
    } else {
        fail(v, "out of memory");
    }
    free(a), free(b), free(got), free(want);
}

static void check_rmsnorm(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t n = c->n_row * c->d;
    float *x = normals(&seed, n, 3), *w = normals(&seed, c->d, 1), *y = malloc((2 * n + 1) * sizeof *y);
    if (x && w && y) {
        kv_rmsnorm_ref(c->n_row, c->d, x, w, 1e-5f, y + n);
        kv_rmsnorm(c->n_row, c->d, x, w, 1e-5f, y);
        kv_compare("y", n, y, y + n, self->tol, v);
        kv_rmsnorm(c->n_row, c->d, x, w, 1e-5f, x);
        same_bytes("in place", x, y, n * sizeof *x, v);
    } else {
        fail(v, "out of memory");
    }
    free(x), free(w), free(y);
}

static void check_layernorm(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t n = c->n_row * c->d;
    float *x = normals(&seed, n, 3), *w = normals(&seed, 2 * c->d, 1), *y = malloc((2 * n + 1) * sizeof *y);
    if (x && w && y) {
        for (size_t i = 0; i < n; i++) x[i] += 40; /* far from 0 */
        kv_layernorm_ref(c->n_row, c->d, x, w, w + c->d, 1e-5f, y + n);
        kv_layernorm(c->n_row, c->d, x, w, w + c->d, 1e-5f, y);
        kv_compare("y", n, y, y + n, self->tol, v);
        kv_layernorm(c->n_row, c->d, x, w, w + c->d, 1e-5f, x);
        same_bytes("in place", x, y, n * sizeof *x, v);
    } else {
        fail(v, "out of memory");
    }
    free(x), free(w), free(y);
}

static void check_rope(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t ld = c->d + 2, n = c->n_row * ld;
    float *x = normals(&seed, n, 1), *y = malloc((n + 1) * sizeof *y), *freq = normals(&seed, c->window / 2, 1);
    if (x && y && freq) {
        memcpy(y, x, n * sizeof *y);
        for (size_t i = 0; i < c->window / 2; i++) freq[i] = powf(1e4f, -2 * (float)i / (float)c->window);
        kv_rope(c->n_row, c->d, c->window, c->row0, freq, 1.25f, x, ld);
        kv_rope_ref(c->n_row, c->d, c->window, c->row0, freq, 1.25f, y, ld);
        kv_compare("x", n, x, y, self->tol, v);
    } else {
        fail(v, "out of memory");
    }
    free(x), free(y), free(freq);
}

static void check_swiglu(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t n = c->n_key;
    float *gate = normals(&seed, n, 20), *up = normals(&seed, n, 1), *y = malloc((n + 1) * sizeof *y);
    if (gate && up && y) {
        if (n > 3) gate[0] = -100, gate[1] = 100, gate[2] = -88; /* where the exponential leaves the floats */
        memcpy(y, gate, n * sizeof *y);
        kv_swiglu(n, gate, up);
        kv_swiglu_ref(n, y, up);
        kv_compare("gate", n, gate, y, self->tol, v);
    } else {
        fail(v, "out of memory");
    }
    free(gate), free(up), free(y);
}

static void check_geglu(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    size_t n = c->n_key;
    float *gate = normals(&seed, n, 3), *up = normals(&seed, n, 1), *y = malloc((2 * n + 1) * sizeof *y);
    for (int form = 0; form < 4 && gate && up && y; form++) { /* erf or tanh, gated or not */
        if (n > 3) gate[0] = -100, gate[1] = 100, gate[2] = 0;
        memcpy(y, gate, n * sizeof *y), memcpy(y + n, gate, n * sizeof *y);
        kv_geglu(form & 1, n, y, form & 2 ? up : NULL);
        kv_geglu_ref(form & 1, n, y + n, form & 2 ? up : NULL);
        kv_compare("gate", n, y, y + n, self->tol, v);
    }
    if (!gate || !up || !y) fail(v, "out of memory");
    free(gate), free(up), free(y);
}

/* Bit patterns of all kinds: every exponent, ties, subnormals of float and half, infinities, NaN. */
static void fill_bits(uint64_t seed, size_t n, float *x)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t r = next(&seed);
        uint32_t u = (uint32_t)r;
        if (r >> 32 & 1)
            u = (u & 0x80001fffu) | (uint32_t)(102 + (r >> 40) % 42) << 23; /* what f16 can hold, and around */
        if (r >> 33 & 1) u &= 0xfffff000u;                                  /* ties */
        if ((r >> 34 & 15) == 0) u = (u & 0x80000000u) | (0x477fdfffu + (uint32_t)(r >> 40) % 0x4000u); /* near 65520 */
        memcpy(&x[i], &u, 4);
    }
}

static void pack_with(const kv_case *c, uint64_t seed, kv_verdict *v, bool cuda)
{
    size_t n = c->n_key, over = 0;
    float *x = malloc((n + 1) * sizeof *x);
    uint8_t *dst = malloc(8 * n + 1);
    if (x && dst) {
        fill_bits(seed, n, x);
        if (cuda && kv_pack_cuda(c->kind, n, x, dst, &over) != 0) fail(v, "kv_pack_cuda failed");
        if (!cuda) over = kv_pack(c->kind, n, x, dst);
        if (over != kv_pack_ref(c->kind, n, x, dst + 4 * n)) fail(v, "count of overflows differs");
        same_bytes("planes", dst, dst + 4 * n, n * (c->kind == 32 ? 4 : 2), v);
    } else {
        fail(v, "out of memory");
    }
    free(x), free(dst);
}

static void check_pack(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    (void)self;
    pack_with(c, seed, v, false);
}

static void check_pack_cuda(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    (void)self;
    pack_with(c, seed, v, true);
}

static void check_round(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    (void)self;
    size_t n = c->n_key;
    float *x = malloc((2 * n + 1) * sizeof *x);
    if (x) {
        fill_bits(seed, n, x);
        memcpy(x + n, x, n * sizeof *x);
        if (kv_round(c->kind, n, x) != kv_round_ref(c->kind, n, x + n)) fail(v, "count of overflows differs");
        same_bytes("x", x, x + n, n * sizeof *x, v);
    } else {
        fail(v, "out of memory");
    }
    free(x);
}

/*                                   n_row n_key  d  row0 window cap kind */
static const kv_case attn_cases[] = {
    {1, 1, 64, 0, 0, 0, 0},       {1, 700, 64, 699, 0, 0, 0},  {130, 130, 64, 0, 0, 0, 0},
    {257, 300, 32, 43, 0, 0, 2},  {70, 530, 80, 460, 0, 0, 0}, {40, 333, 128, 293, 0, 0, 2},
    {33, 600, 64, 567, 0, 50, 2}, {300, 300, 64, 0, 17, 0, 0}, {200, 600, 32, 400, 256, 0, 2},
    {64, 290, 64, 226, 1, 0, 0},  {50, 50, 64, 0, 0, 0, 1},    {5, 40, 64, 20, 0, 0, 0},
    {20, 30, 64, 40, 16, 30, 0},  {9, 21, 7, 12, 0, 0, 0}};
/*                                   rows 0..: n_key alone, kind */
static const kv_case rank_cases[] = {{.n_key = 0},
                                     {.n_key = 1},
                                     {.n_key = 64, .kind = 2},
                                     {.n_key = 65, .kind = 2},
                                     {.n_key = 1000, .kind = 1},
                                     {.n_key = 5000, .kind = 3},
                                     {.n_key = 4097},
                                     {.n_key = 100000},
                                     {.n_key = 100000, .kind = 2},
                                     {.n_key = 30000, .kind = 4}};
static const kv_case prefix_cases[] = {{.n_row = 1, .n_key = 1, .d = 64},
                                       {.n_row = 128, .n_key = 1000, .d = 64},
                                       {.n_row = 128, .n_key = 1000, .d = 64, .kind = 1},
                                       {.n_row = 300, .n_key = 515, .d = 32, .softcap = 30},
                                       {.n_row = 17, .n_key = 256, .d = 128, .kind = 2},
                                       {.n_row = 5, .n_key = 37, .d = 80, .kind = 2}};
static const kv_case walk_cases[] = {
    {.n_row = 1, .n_key = 1, .d = 64},     {.n_row = 192, .n_key = 1000, .d = 64},
    {.n_row = 35, .n_key = 640, .d = 128}, {.n_row = 40, .n_key = 515, .d = 80, .kind = 1},
    {.n_row = 17, .n_key = 256, .d = 37},  {.n_row = 5, .n_key = 37, .d = 7}};
static const kv_case matmul_cases[] = {{.n_row = 1, .n_key = 1, .d = 1},      {.n_row = 1, .n_key = 600, .d = 577},
                                       {.n_row = 3, .n_key = 257, .d = 64},   {.n_row = 300, .n_key = 300, .d = 100},
                                       {.n_row = 256, .n_key = 512, .d = 31}, {.n_row = 2, .n_key = 3, .d = 0}};
static const kv_case triangle_cases[] = {{.n_row = 1, .n_key = 1, .d = 1},
                                         {.n_row = 300, .n_key = 192, .d = 192},
                                         {.n_row = 20, .n_key = 300, .d = 101},
                                         {.n_row = 20, .n_key = 101, .d = 300},
                                         {.n_row = 20, .n_key = 97, .d = 97, .kind = 1}};
static const kv_case norm_cases[] = {{.n_row = 1, .d = 1}, {.n_row = 3, .d = 576}, {.n_row = 2, .d = 37}};
static const kv_case rope_cases[] = {{.n_row = 1, .d = 64, .window = 64, .row0 = 131071},
                                     {.n_row = 200, .d = 64, .window = 64, .row0 = 4000},
                                     {.n_row = 70, .d = 80, .window = 32, .row0 = 61},
                                     {.n_row = 66, .d = 256, .window = 256}};
static const kv_case length_cases[] = {{.n_key = 1}, {.n_key = 1537}};
static const kv_case pack_cases[] = {{.n_key = 1, .kind = 16},
                                     {.n_key = 20000, .kind = 16},
                                     {.n_key = 4099, .kind = 17},
                                     {.n_key = 1025, .kind = 32},
                                     {.n_key = 0, .kind = 16}};

#define ROW(name, cls, tol, cases, check, cuda)                                                                        \
    {                                                                                                                  \
        name, cls, tol, cases, COUNT(cases), check, cuda                                                               \
    }
const kv_kernel kv_kernel_table[] = {
    ROW("attention", KV_CLOSE, 5e-6, attn_cases, check_attention, NULL),
    ROW("colsum", KV_EXACT, 0, attn_cases, check_colsum, NULL),
    ROW("probs", KV_EXACT, 0, attn_cases, check_probs, NULL),
    ROW("probs_turned", KV_EXACT, 0, attn_cases, check_turned, NULL),
    ROW("walk", KV_EXACT, 0, walk_cases, check_walk, NULL),
    ROW("rank", KV_EXACT, 0, rank_cases, check_rank, NULL),
    ROW("prefix", KV_CLOSE, 3e-6, prefix_cases, check_prefix, NULL),
    ROW("entropy", KV_EXACT, 0, matmul_cases, check_entropy, NULL),
    ROW("project_l1", KV_EXACT, 0, matmul_cases, check_project_l1, NULL),
    ROW("project_norm", KV_CLOSE, 1e-6, matmul_cases, check_project, NULL),
    ROW("triangle", KV_CLOSE, 1e-6, triangle_cases, check_triangle, NULL),
    ROW("matmul", KV_CLOSE, 2e-6, matmul_cases, check_matmul, NULL),
    ROW("rmsnorm", KV_CLOSE, 3e-7, norm_cases, check_rmsnorm, NULL),
    ROW("rope", KV_CLOSE, 3e-7, rope_cases, check_rope, NULL),
    ROW("swiglu", KV_CLOSE, 5e-7, length_cases, check_swiglu, NULL),
    ROW("layernorm", KV_CLOSE, 5e-7, norm_cases, check_layernorm, NULL),
    ROW("geglu", KV_CLOSE, 5e-7, length_cases, check_geglu, NULL),
    ROW("pack", KV_EXACT, 0, pack_cases, check_pack, check_pack_cuda),
    ROW("round", KV_EXACT, 0, pack_cases, check_round, NULL),
};
const size_t kv_kernel_count = COUNT(kv_kernel_table);
