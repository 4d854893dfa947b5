/* colsum.c - column sums of the attention matrix, 48 rows by 16 keys at a time.
 * Each column adds its rows in ascending order whatever the blocks are, so the order is that of colsum_ref.c. */
#include "kernels/score.h"

#include <stdlib.h>

#define ROWS 48 /* rows of a block: 12 KiB of queries at d = 64, in L1 beside one panel of keys */

KV_INLINE void body(const bool v3, const bool cap, const kv_attn_shape *s, const float *q, const float *k,
                    const float *lse, double *acc, float *panel)
{
    for (size_t j0 = 0; j0 < s->n_key; j0 += KV_PANEL) {
        size_t n = s->n_key - j0 < KV_PANEL ? s->n_key - j0 : KV_PANEL;
        /* rows that see a key of the panel: from its first key to the end of its last key's window */
        size_t first = j0 > s->row0 ? j0 - s->row0 : 0, end = s->n_row;
        if (s->window) {
            size_t past = j0 + n - 1 + s->window; /* first position that sees none */
            end = past <= s->row0 ? 0 : past - s->row0 < end ? past - s->row0 : end;
        }
        if (first >= end) continue;
        kv_panel_fill(v3, n, s->d, k + j0 * s->d, panel);
        double sum[KV_PANEL] = {0};
        for (size_t j = 0; j < n; j++) sum[j] = acc[j0 + j];
        for (size_t r0 = first; r0 < end; r0 += ROWS) {
            float dot[ROWS][KV_PANEL];
            size_t n_row = end - r0 < ROWS ? end - r0 : ROWS;
            kv_panel_dots(v3, n_row, s->d, q + r0 * s->d, panel, dot[0], KV_PANEL);
            for (size_t r = 0; r < n_row; r++) {
                float l = lse[r0 + r], scale = s->scale, softcap = s->softcap;
                size_t lo, hi;
                kv_visible(s, r0 + r, &lo, &hi);
                for (size_t j = 0; j < KV_PANEL; j++) {
                    float x = dot[r][j] * scale;
                    dot[r][j] = kv_expf((cap ? kv_cap(x, softcap) : x) - l);
                }
                if (lo <= j0 && hi >= j0 + KV_PANEL) {
                    for (size_t j = 0; j < KV_PANEL; j++) sum[j] += dot[r][j];
                } else {
                    for (size_t j = 0; j < n; j++)
                        if (j0 + j >= lo && j0 + j < hi) sum[j] += dot[r][j];
                }
            }
        }
        for (size_t j = 0; j < n; j++) acc[j0 + j] = sum[j];
    }
}

/* The soft cap is a constant of each copy: its division would cost every kernel that has none. */
static void plain(const kv_attn_shape *s, const float *q, const float *k, const float *lse, double *acc, float *panel)
{
    if (s->softcap > 0)
        body(false, true, s, q, k, lse, acc, panel);
    else
        body(false, false, s, q, k, lse, acc, panel);
}

KV_V3 static void v3(const kv_attn_shape *s, const float *q, const float *k, const float *lse, double *acc,
                     float *panel)
{
    if (s->softcap > 0)
        body(KV_HAVE_V3, true, s, q, k, lse, acc, panel);
    else
        body(KV_HAVE_V3, false, s, q, k, lse, acc, panel);
}

bool kv_colsum(const kv_attn_shape *s, const float *q, const float *k, const float *lse, double *acc)
{
    if (s->d > SIZE_MAX / KV_PANEL / sizeof(float) - 1) return false;
    float *panel = malloc((s->d + 1) * KV_PANEL * sizeof *panel);
    if (!panel) return false;
    (kv_has_v3() ? v3 : plain)(s, q, k, lse, acc, panel);
    free(panel);
    return true;
}
