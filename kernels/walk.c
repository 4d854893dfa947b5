/* walk.c - a walk along a ranking: blocks of 64 keys, six rows by sixteen columns of the output in registers. Values
 * are read where they lie, probabilities are packed by tiles of six rows: where they lie, their stride maps them to a
 * few sets of the L1 cache. */
#include "kernels/isa.h"
#include "kernels/lanes.h"

#if KV_HAVE_V3
#include <immintrin.h>
#endif

enum { TILE = 6, ROWS = 16 * TILE };

/* mass[r] += p[r] for all rows of one key. */
KV_INLINE void add_row(size_t n_row, const float *p, double *mass)
{
    size_t r = 0;
    for (; r + 4 <= n_row; r += 4) {
        kv_d4 m = KV_LOAD(kv_d4, mass + r) + KV_WIDE4(p + r);
        memcpy(mass + r, &m, sizeof m);
    }
    for (; r < n_row; r++) mass[r] += p[r];
}

/* Columns j0.. of rows r0.. for n keys, one after the other. */
KV_INLINE void add_plain(size_t r0, size_t r1, size_t j0, size_t d, size_t n, const float *const *p,
                         const float *const *v, float *part)
{
    for (size_t r = r0; r < r1; r++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = j0; j < d; j++) part[r * d + j] = __builtin_fmaf(p[i][r], v[i][j], part[r * d + j]);
}

#if KV_HAVE_V3
/* R rows by 16 columns: x [n] packed rows of TILE. R is a constant at each call. */
__attribute__((always_inline)) KV_V3 static inline void add_tile(const int R, size_t j0, size_t d, size_t n,
                                                                 const float *x, const float *const *v, float *part)
{
    __m256 a[6], b[6];
    for (int r = 0; r < R; r++) {
        a[r] = _mm256_loadu_ps(part + r * d + j0);
        b[r] = _mm256_loadu_ps(part + r * d + j0 + 8);
    }
    for (size_t i = 0; i < n; i++, x += TILE) {
        __m256 v0 = _mm256_loadu_ps(v[i] + j0), v1 = _mm256_loadu_ps(v[i] + j0 + 8);
        for (int r = 0; r < R; r++) {
            __m256 w = _mm256_broadcast_ss(x + r);
            a[r] = _mm256_fmadd_ps(w, v0, a[r]);
            b[r] = _mm256_fmadd_ps(w, v1, b[r]);
        }
    }
    for (int r = 0; r < R; r++) {
        _mm256_storeu_ps(part + r * d + j0, a[r]);
        _mm256_storeu_ps(part + r * d + j0 + 8, b[r]);
    }
}

__attribute__((always_inline)) KV_V3 static inline void add_rows(const int R, size_t r0, size_t d, size_t n,
                                                                 const float *const *p, const float *x,
                                                                 const float *const *v, float *part)
{
    size_t j = 0;
    for (; j + 16 <= d; j += 16) add_tile(R, j, d, n, x, v, part + r0 * d);
    if (j < d) add_plain(r0, r0 + R, j, d, n, p, v, part);
}

KV_V3 static void add_v3(size_t n_row, size_t d, size_t n, const float *const *p, const float *const *v, float *part)
{
    float pack[ROWS * KV_WALK_BLOCK];
    for (size_t r0 = 0; r0 < n_row; r0 += ROWS) {
        size_t m = n_row - r0 < ROWS ? n_row - r0 : ROWS, r = 0;
        for (size_t t = 0; t + TILE <= m; t += TILE)
            for (size_t i = 0; i < n; i++)
                memcpy(pack + t * KV_WALK_BLOCK + i * TILE, p[i] + r0 + t, TILE * sizeof *pack);
        for (size_t i = 0, t = m - m % TILE; i < n && t < m; i++)
            memcpy(pack + t * KV_WALK_BLOCK + i * TILE, p[i] + r0 + t, (m - t) * sizeof *pack);
        for (; r + TILE <= m; r += TILE) add_rows(TILE, r0 + r, d, n, p, pack + r * KV_WALK_BLOCK, v, part);
        const float *x = pack + r * KV_WALK_BLOCK;
        switch (m - r) {
        case 5: add_rows(5, r0 + r, d, n, p, x, v, part); break;
        case 4: add_rows(4, r0 + r, d, n, p, x, v, part); break;
        case 3: add_rows(3, r0 + r, d, n, p, x, v, part); break;
        case 2: add_rows(2, r0 + r, d, n, p, x, v, part); break;
        case 1: add_rows(1, r0 + r, d, n, p, x, v, part); break;
        default: break;
        }
    }
}
#endif

KV_INLINE void walk(const bool v3, size_t n_row, size_t d, const float *p, size_t ld, const float *v, size_t at,
                    size_t n, const uint32_t *order, const uint8_t *flag, double *mass, double *cmass, float *out,
                    float *part)
{
    const float *pk[KV_WALK_BLOCK], *vk[KV_WALK_BLOCK];
    (void)v3;
    for (size_t i = 0; i < n;) {
        size_t room = KV_WALK_BLOCK - at % KV_WALK_BLOCK, m = n - i < room ? n - i : room;
        for (size_t k = 0; k < m; k++) {
            size_t key = order[i + k];
            pk[k] = p + key * ld;
            if (out) vk[k] = v + key * d;
            add_row(n_row, pk[k], mass);
            if (cmass && flag[key]) add_row(n_row, pk[k], cmass);
        }
        i += m, at += m;
        if (!out) continue;
#if KV_HAVE_V3
        if (v3)
            add_v3(n_row, d, m, pk, vk, part);
        else
#endif
            add_plain(0, n_row, 0, d, m, pk, vk, part);
        if (at % KV_WALK_BLOCK) continue;
        for (size_t j = 0; j < n_row * d; j++) out[j] += part[j], part[j] = 0;
    }
}

static void walk_plain(size_t n_row, size_t d, const float *p, size_t ld, const float *v, size_t at, size_t n,
                       const uint32_t *order, const uint8_t *flag, double *mass, double *cmass, float *out, float *part)
{
    walk(false, n_row, d, p, ld, v, at, n, order, flag, mass, cmass, out, part);
}

KV_V3 static void walk_v3(size_t n_row, size_t d, const float *p, size_t ld, const float *v, size_t at, size_t n,
                          const uint32_t *order, const uint8_t *flag, double *mass, double *cmass, float *out,
                          float *part)
{
    walk(KV_HAVE_V3, n_row, d, p, ld, v, at, n, order, flag, mass, cmass, out, part);
}

void kv_walk(size_t n_row, size_t d, const float *p, size_t ld, const float *v, size_t at, size_t n,
             const uint32_t *order, const uint8_t *flag, double *mass, double *cmass, float *out, float *part)
{
    (kv_has_v3() ? walk_v3 : walk_plain)(n_row, d, p, ld, v, at, n, order, flag, mass, cmass, out, part);
}

KV_INLINE void compare(size_t n_row, size_t d, const double *mass, const float *out, const float *part, const float *o,
                       double *error2, double *dot, float *diff, size_t ld_diff)
{
    for (size_t r = 0; r < n_row; r++, o += d, out += d, part += d) {
        double sq[8] = {0}, pr[8] = {0};
        float inv = mass[r] > 0 ? (float)(1 / mass[r]) : 0, gone[8];
        kv_d4 s0 = {0}, s1 = {0}, p0 = {0}, p1 = {0};
        size_t j = 0;
        for (; j + 8 <= d; j += 8) {
            kv_f8 x = KV_LOAD8(o + j), g = x - (KV_LOAD8(out + j) + KV_LOAD8(part + j)) * inv;
            memcpy(gone, &g, sizeof g);
            kv_d4 g0 = KV_WIDE4(gone), g1 = KV_WIDE4(gone + 4);
            s0 += g0 * g0, s1 += g1 * g1;
            p0 += g0 * KV_WIDE4(o + j), p1 += g1 * KV_WIDE4(o + j + 4);
            if (diff) memcpy(diff + r * ld_diff + j, &g, sizeof g);
        }
        memcpy(sq, &s0, sizeof s0), memcpy(sq + 4, &s1, sizeof s1);
        memcpy(pr, &p0, sizeof p0), memcpy(pr + 4, &p1, sizeof p1);
        for (; j < d; j++) {
            float g = o[j] - (out[j] + part[j]) * inv;
            sq[j % 8] += (double)g * g;
            pr[j % 8] += (double)g * o[j];
            if (diff) diff[r * ld_diff + j] = g;
        }
        error2[r] = kv_sum8(sq);
        dot[r] = kv_sum8(pr);
    }
}

static void compare_plain(size_t n_row, size_t d, const double *mass, const float *out, const float *part,
                          const float *o, double *error2, double *dot, float *diff, size_t ld_diff)
{
    compare(n_row, d, mass, out, part, o, error2, dot, diff, ld_diff);
}

KV_V3 static void compare_v3(size_t n_row, size_t d, const double *mass, const float *out, const float *part,
                             const float *o, double *error2, double *dot, float *diff, size_t ld_diff)
{
    compare(n_row, d, mass, out, part, o, error2, dot, diff, ld_diff);
}

void kv_walk_compare(size_t n_row, size_t d, const double *mass, const float *out, const float *part, const float *o,
                     double *error2, double *dot, float *diff, size_t ld_diff)
{
    (kv_has_v3() ? compare_v3 : compare_plain)(n_row, d, mass, out, part, o, error2, dot, diff, ld_diff);
}
