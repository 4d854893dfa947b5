/* score.h - dot products of query rows with a panel of keys, each one a chain of fused multiply-adds over the head size
 * in order (math.h: kv_score), eight keys in a vector side by side. So the lanes never meet, and the bytes are those of
 * the plain loop. Shared by the EXACT kernels; the caller passes v3 = true only inside a KV_V3 function. */
#ifndef KV_SCORE_H
#define KV_SCORE_H

#include "kernels/isa.h"
#include "kernels/math.h"

#if KV_HAVE_V3
#include <immintrin.h>
#endif

#define KV_PANEL 16 /* keys in a panel: two AVX2 vectors, so that 6 rows fill 12 of the 16 registers */

#if KV_HAVE_V3
/* Eight keys (rows of k, d apart) by eight elements, turned. */
KV_V3 static inline void kv_turn8(const float *k, size_t d, float *panel)
{
    __m256 r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(k + i * d);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(panel + i * KV_PANEL, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(panel + (i + 4) * KV_PANEL, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

/* R rows by 16 keys, the sums in registers. R is a constant at each call. */
__attribute__((always_inline)) KV_V3 static inline void kv_dots_rows(const int R, size_t d, const float *q,
                                                                     const float *panel, float *dst, size_t ld)
{
    __m256 a[6], b[6];
    for (int r = 0; r < R; r++) a[r] = b[r] = _mm256_setzero_ps();
    for (size_t i = 0; i < d; i++) {
        __m256 k0 = _mm256_loadu_ps(panel + i * KV_PANEL), k1 = _mm256_loadu_ps(panel + i * KV_PANEL + 8);
        for (int r = 0; r < R; r++) {
            __m256 x = _mm256_broadcast_ss(q + r * d + i);
            a[r] = _mm256_fmadd_ps(x, k0, a[r]);
            b[r] = _mm256_fmadd_ps(x, k1, b[r]);
        }
    }
    for (int r = 0; r < R; r++) {
        _mm256_storeu_ps(dst + r * ld, a[r]);
        _mm256_storeu_ps(dst + r * ld + 8, b[r]);
    }
}

KV_V3 static inline void kv_panel_dots_v3(size_t n_row, size_t d, const float *q, const float *panel, float *dst,
                                          size_t ld)
{
    size_t r = 0;
    for (; r + 6 <= n_row; r += 6) kv_dots_rows(6, d, q + r * d, panel, dst + r * ld, ld);
    q += r * d, dst += r * ld;
    switch (n_row - r) {
    case 5: kv_dots_rows(5, d, q, panel, dst, ld); break;
    case 4: kv_dots_rows(4, d, q, panel, dst, ld); break;
    case 3: kv_dots_rows(3, d, q, panel, dst, ld); break;
    case 2: kv_dots_rows(2, d, q, panel, dst, ld); break;
    case 1: kv_dots_rows(1, d, q, panel, dst, ld); break;
    default: break;
    }
}
#endif

/* panel [d][16] = the first n <= 16 keys of k, turned, zeros for those that are missing. */
KV_INLINE void kv_panel_fill(const bool v3, size_t n, size_t d, const float *k, float *panel)
{
    size_t i = 0;
#if KV_HAVE_V3
    if (v3 && n == KV_PANEL) {
        for (; i + 8 <= d; i += 8) {
            kv_turn8(k + i, d, panel + i * KV_PANEL);
            kv_turn8(k + 8 * d + i, d, panel + i * KV_PANEL + 8);
        }
    }
#endif
    (void)v3;
    for (; i < d; i++)
        for (size_t j = 0; j < KV_PANEL; j++) panel[i * KV_PANEL + j] = j < n ? k[j * d + i] : 0;
}

/* dst[r][j] (rows at stride ld) = q[r] . key j, for n_row rows and the 16 keys of the panel. */
KV_INLINE void kv_panel_dots(const bool v3, size_t n_row, size_t d, const float *q, const float *panel, float *dst,
                             size_t ld)
{
#if KV_HAVE_V3
    if (v3) {
        kv_panel_dots_v3(n_row, d, q, panel, dst, ld);
        return;
    }
#endif
    (void)v3;
    for (size_t r = 0; r < n_row; r++) {
        float sum[KV_PANEL] = {0};
        for (size_t i = 0; i < d; i++)
            for (size_t j = 0; j < KV_PANEL; j++)
                sum[j] = __builtin_fmaf(q[r * d + i], panel[i * KV_PANEL + j], sum[j]);
        for (size_t j = 0; j < KV_PANEL; j++) dst[r * ld + j] = sum[j];
    }
}

#endif
