/* probs.c - softmax rows for windows of rows: panels of 16 keys for all rows, then each row by itself. */
#include "kernels/lanes.h"
#include "kernels/score.h"

#include <stdlib.h>

/* One row, scores in p[lo..hi): the normaliser's eight lanes are those of columns j % 8 (probs_ref.c). */
KV_INLINE void softmax(const kv_attn_shape *s, size_t lo, size_t hi, float *p)
{
    double lane[8] = {0};
    float m = kv_max_of(hi - lo, p + lo);
    for (size_t j = lo; j < hi; j++) p[j] = kv_expf(p[j] - m);
    size_t mid = (lo + 7) / 8 * 8; /* the first column of lane 0 */
    if (mid > hi) mid = hi;
    for (size_t j = lo; j < mid; j++) lane[j % 8] += p[j];
    kv_add_lanes(false, hi - mid, p + mid, lane);
    float sum = (float)kv_sum8(lane);
    for (size_t j = 0; j < lo; j++) p[j] = 0;
    for (size_t j = lo; j < hi; j++) p[j] /= sum;
    for (size_t j = hi; j < s->n_key; j++) p[j] = 0;
}

KV_INLINE void body(const bool v3, const kv_attn_shape *s, const float *q, const float *k, float *p, float *panel,
                    float *part)
{
    for (size_t j0 = 0; j0 < s->n_key; j0 += KV_PANEL) {
        size_t n = s->n_key - j0 < KV_PANEL ? s->n_key - j0 : KV_PANEL;
        kv_panel_fill(v3, n, s->d, k + j0 * s->d, panel);
        if (n == KV_PANEL) {
            kv_panel_dots(v3, s->n_row, s->d, q, panel, p + j0, s->n_key);
            continue;
        }
        kv_panel_dots(v3, s->n_row, s->d, q, panel, part, KV_PANEL);
        for (size_t r = 0; r < s->n_row; r++)
            for (size_t j = 0; j < n; j++) p[r * s->n_key + j0 + j] = part[r * KV_PANEL + j];
    }
    for (size_t r = 0; r < s->n_row; r++, p += s->n_key) {
        size_t lo, hi;
        kv_visible(s, r, &lo, &hi);
        float scale = s->scale, softcap = s->softcap;
        for (size_t j = lo; j < hi; j++) p[j] *= scale;
        if (softcap > 0)
            for (size_t j = lo; j < hi; j++) p[j] = kv_cap(p[j], softcap);
        softmax(s, lo, hi, p);
    }
}

static void plain(const kv_attn_shape *s, const float *q, const float *k, float *p, float *panel, float *part)
{
    body(false, s, q, k, p, panel, part);
}

KV_V3 static void v3(const kv_attn_shape *s, const float *q, const float *k, float *p, float *panel, float *part)
{
    body(KV_HAVE_V3, s, q, k, p, panel, part);
}

bool kv_probs(const kv_attn_shape *s, const float *q, const float *k, float *p)
{
    size_t n = s->d + s->n_row + 1;
    if (n < s->d || n > SIZE_MAX / KV_PANEL / sizeof(float)) return false;
    float *panel = malloc(n * KV_PANEL * sizeof *panel);
    if (!panel) return false;
    (kv_has_v3() ? v3 : plain)(s, q, k, p, panel, panel + s->d * KV_PANEL);
    free(panel);
    return true;
}
