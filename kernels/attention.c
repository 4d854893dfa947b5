/* attention.c - attention of one head by tiles: S = Q K^T and S V by OpenBLAS, softmax online between them.
 *
 * Per row: m = largest score so far, l = sum e^(s-m), a = sum e^(s-m) (s-m), c = sum e^2(s-m), O = sum e^(s-m) v. When
 * m grows by x: O, l times e^-x, c times e^-2x, a becomes (a - x l) e^-x. At the end LSE = m + ln l, largest p = 1/l,
 * entropy = ln l - a/l, sum p^2 = c/l^2. Tiles beyond the diagonal or before the window are never touched. */
#include "kernels/blas.h"
#include "kernels/isa.h"
#include "kernels/lanes.h"

#include <math.h>
#include <stdlib.h>

#define ROWS 128 /* the tile of scores, 128 KiB, stays in the L2 cache between the two products */
#define KEYS 256

typedef struct {
    float m;
    double l, a, c;
    size_t arg;
} row_state;

/* Scores [lo, hi) of a tile row to e^(s - m), 0 elsewhere; returns what earlier sums must be multiplied by. */
KV_INLINE float soft_row(const bool cap, const bool stat, float softcap, size_t lo, size_t hi, size_t n, size_t col0,
                         float *s, row_state *st)
{
    for (size_t j = 0; j < lo; j++) s[j] = 0;
    for (size_t j = hi; j < n; j++) s[j] = 0;
    if (lo >= hi) return 1;
    s += lo, n = hi - lo, col0 += lo;
    if (cap)
        for (size_t j = 0; j < n; j++) s[j] = kv_cap(s[j], softcap);
    float top = kv_max_of(n, s), factor = 1;
    if (top > st->m) {
        factor = kv_expf(st->m - top);
        if (st->l > 0) {
            st->a = (st->a - ((double)top - st->m) * st->l) * factor;
            st->l *= factor;
            st->c *= (double)factor * factor;
        }
        if (stat) {
            size_t j = 0;
            while (j + 1 < n && s[j] != top) j++;
            st->arg = col0 + j;
        }
        st->m = top;
    }
    float m = st->m;
    if (!stat) {
        for (size_t j = 0; j < n; j++) s[j] = kv_expf(s[j] - m);
        st->l += kv_sum_of(n, s);
        return factor;
    }
    float e[KEYS];
    for (size_t j = 0; j < n; j++) e[j] = kv_expf(s[j] - m);
    kv_f8 a = {0}, c = {0};
    size_t j = 0;
    for (; j + 8 <= n; j += 8) {
        kv_f8 x = KV_LOAD8(e + j);
        a += x * (KV_LOAD8(s + j) - m);
        c += x * x;
    }
    double sa = 0, sc = 0;
    for (int i = 0; i < 8; i++) sa += a[i], sc += c[i];
    for (; j < n; j++) sa += (double)e[j] * (s[j] - m), sc += (double)e[j] * e[j];
    st->l += kv_sum_of(n, e);
    st->a += sa;
    st->c += sc;
    memcpy(s, e, n * sizeof *s);
    return factor;
}

/* All rows of a tile; o [n_row][d] is rescaled where a maximum grew. */
KV_INLINE void soft_tile(const bool cap, const bool stat, const kv_attn_shape *s, size_t r0, size_t n_row, size_t j0,
                         size_t n, float *tile, row_state *st, float *o)
{
    for (size_t r = 0; r < n_row; r++) {
        size_t lo, hi;
        kv_visible(s, r0 + r, &lo, &hi);
        lo = lo > j0 ? lo - j0 : 0;
        hi = hi > j0 ? hi - j0 : 0;
        float f = soft_row(cap, stat, s->softcap, lo < n ? lo : n, hi < n ? hi : n, n, j0, tile + r * KEYS, &st[r]);
        if (f < 1)
            for (size_t i = 0; i < s->d; i++) o[r * s->d + i] *= f;
    }
}

#define SOFT(name, target)                                                                                             \
    target static void name(const kv_attn_shape *s, bool stat, size_t r0, size_t n_row, size_t j0, size_t n,           \
                            float *tile, row_state *st, float *o)                                                      \
    {                                                                                                                  \
        if (s->softcap > 0 && stat)                                                                                    \
            soft_tile(true, true, s, r0, n_row, j0, n, tile, st, o);                                                   \
        else if (s->softcap > 0)                                                                                       \
            soft_tile(true, false, s, r0, n_row, j0, n, tile, st, o);                                                  \
        else if (stat)                                                                                                 \
            soft_tile(false, true, s, r0, n_row, j0, n, tile, st, o);                                                  \
        else                                                                                                           \
            soft_tile(false, false, s, r0, n_row, j0, n, tile, st, o);                                                 \
    }
SOFT(plain, )
SOFT(v3, KV_V3)

static void finish(const row_state *st, size_t d, const float *o, float *out, float *lse, float *stat)
{
    double inv = st->l > 0 ? 1 / st->l : 0, log_l = log(st->l);
    for (size_t i = 0; i < d; i++) out[i] = (float)(o[i] * inv);
    *lse = (float)(st->m + log_l);
    if (!stat) return;
    stat[0] = (float)inv;
    stat[1] = (float)st->arg;
    stat[2] = (float)(st->l > 0 ? log_l - st->a * inv : 0);
    stat[3] = (float)(st->c * inv * inv);
}

bool kv_attention(const kv_attn_shape *s, const float *q, const float *k, const float *v, float *out, size_t ld_out,
                  float *lse, float *stat)
{
    if (s->d > KV_BLAS_MAX / ROWS / sizeof(float)) return false;
    size_t d = s->d;
    size_t rows = s->n_row < ROWS ? s->n_row : ROWS;
    float *tile = malloc((KEYS + d) * (rows + 1) * sizeof *tile), *o = tile + KEYS * rows;
    row_state *st = malloc((rows + 1) * sizeof *st);
    bool ok = tile && st;
    for (size_t r0 = 0; ok && r0 < s->n_row; r0 += ROWS) {
        size_t n_row = s->n_row - r0 < ROWS ? s->n_row - r0 : ROWS, lo, end, j0;
        kv_visible(s, r0 + n_row - 1, &lo, &end);
        kv_visible(s, r0, &j0, &lo);
        memset(o, 0, n_row * d * sizeof *o);
        for (size_t r = 0; r < n_row; r++) st[r] = (row_state){.m = -INFINITY};
        for (; j0 < end; j0 += KEYS) {
            size_t n = end - j0 < KEYS ? end - j0 : KEYS;
            kv_sgemm_nt(n_row, n, d, s->scale, q + r0 * d, d, k + j0 * d, d, 0, tile, KEYS);
            (kv_has_v3() ? v3 : plain)(s, stat != NULL, r0, n_row, j0, n, tile, st, o);
            kv_sgemm_nn(n_row, d, n, 1, tile, KEYS, v + j0 * d, d, 1, o, d);
        }
        for (size_t r = 0; r < n_row; r++)
            finish(&st[r], d, o + r * d, out + (r0 + r) * ld_out, lse + r0 + r, stat ? stat + 4 * (r0 + r) : NULL);
    }
    free(tile);
    free(st);
    return ok;
}
