/* rows.c - the row operations of a transformer block. */
#include "kernels/isa.h"
#include "kernels/lanes.h"

#include <math.h>

KV_INLINE void rmsnorm_body(size_t n_row, size_t n, const float *x, const float *w, float eps, float *y)
{
    for (size_t r = 0; r < n_row; r++, x += n, y += n) {
        float inv = (float)(1 / sqrt(kv_squares_of(n, x) / (double)n + eps));
        for (size_t i = 0; i < n; i++) y[i] = x[i] * inv * w[i];
    }
}

/* Two passes: the variance of rows far from 0 would drown in one. Sums in eight lanes, so that they vectorise. */
KV_INLINE void layernorm_body(size_t n_row, size_t n, const float *x, const float *w, const float *b, float eps,
                              float *y)
{
    for (size_t r = 0; r < n_row; r++, x += n, y += n) {
        double lane[8] = {0}, square[8] = {0};
        for (size_t i = 0; i < n; i++) lane[i % 8] += (double)x[i];
        double mean = kv_sum8(lane) / (double)n;
        for (size_t i = 0; i < n; i++) square[i % 8] += ((double)x[i] - mean) * ((double)x[i] - mean);
        double inv = 1 / sqrt(kv_sum8(square) / (double)n + (double)eps);
        for (size_t i = 0; i < n; i++) y[i] = (float)(((double)x[i] - mean) * inv) * w[i] + b[i];
    }
}

KV_INLINE void swiglu_body(size_t n, float *gate, const float *up)
{
    for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1 + kv_expf(-gate[i])) * up[i];
}

KV_INLINE void gelu_tanh_body(size_t n, float *x)
{
    for (size_t i = 0; i < n; i++) {
        float u = 0.797884561f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        x[i] = 0.5f * x[i] * (1 + kv_tanhf(u));
    }
}

#define PAIRS  64
#define ANCHOR 64

/* cos and sin by turning the last position's by one more step; libm gives them anew at every 64th position, so the
 * error stays near 1e-14 and a row's bytes do not depend on where the call began. */
KV_INLINE void rope_body(size_t n_row, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *x,
                         size_t ld)
{
    size_t half = rot / 2;
    for (size_t i0 = 0; i0 < half; i0 += PAIRS) {
        size_t n = half - i0 < PAIRS ? half - i0 : PAIRS;
        double c[PAIRS], s[PAIRS], dc[PAIRS], ds[PAIRS];
        for (size_t i = 0; i < n; i++) dc[i] = cos((double)inv_freq[i0 + i]), ds[i] = sin((double)inv_freq[i0 + i]);
        for (size_t pos = pos0 / ANCHOR * ANCHOR; pos < pos0 + n_row; pos++) {
            if (pos % ANCHOR == 0) {
                for (size_t i = 0; i < n; i++) {
                    double angle = (double)pos * inv_freq[i0 + i];
                    c[i] = cos(angle), s[i] = sin(angle);
                }
            } else {
                for (size_t i = 0; i < n; i++) {
                    double t = c[i] * dc[i] - s[i] * ds[i];
                    s[i] = s[i] * dc[i] + c[i] * ds[i];
                    c[i] = t;
                }
            }
            if (pos < pos0) continue;
            float *lo = x + (pos - pos0) * ld + i0, *hi = lo + half;
            for (size_t i = 0; i < n; i++) {
                float fc = (float)(c[i] * mscale), fs = (float)(s[i] * mscale), a = lo[i], b = hi[i];
                lo[i] = a * fc - b * fs;
                hi[i] = b * fc + a * fs;
            }
        }
    }
}

#define CLONE(suffix, target)                                                                                          \
    target static void rmsnorm_##suffix(size_t n_row, size_t n, const float *x, const float *w, float eps, float *y)   \
    {                                                                                                                  \
        rmsnorm_body(n_row, n, x, w, eps, y);                                                                          \
    }                                                                                                                  \
    target static void swiglu_##suffix(size_t n, float *gate, const float *up)                                         \
    {                                                                                                                  \
        swiglu_body(n, gate, up);                                                                                      \
    }                                                                                                                  \
    target static void layernorm_##suffix(size_t n_row, size_t n, const float *x, const float *w, const float *b,      \
                                          float eps, float *y)                                                         \
    {                                                                                                                  \
        layernorm_body(n_row, n, x, w, b, eps, y);                                                                     \
    }                                                                                                                  \
    target static void gelu_tanh_##suffix(size_t n, float *x)                                                          \
    {                                                                                                                  \
        gelu_tanh_body(n, x);                                                                                          \
    }                                                                                                                  \
    target static void rope_##suffix(size_t n_row, size_t rot, size_t pos0, const float *inv_freq, float mscale,       \
                                     float *x, size_t ld)                                                              \
    {                                                                                                                  \
        rope_body(n_row, rot, pos0, inv_freq, mscale, x, ld);                                                          \
    }
CLONE(plain, )
CLONE(v3, KV_V3)

void kv_rmsnorm(size_t n_row, size_t n, const float *x, const float *w, float eps, float *y)
{
    (kv_has_v3() ? rmsnorm_v3 : rmsnorm_plain)(n_row, n, x, w, eps, y);
}

void kv_rope(size_t n_row, size_t d, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *x, size_t ld)
{
    (void)d; /* elements rot..d-1 stay */
    (kv_has_v3() ? rope_v3 : rope_plain)(n_row, rot, pos0, inv_freq, mscale, x, ld);
}

void kv_swiglu(size_t n, float *gate, const float *up)
{
    (kv_has_v3() ? swiglu_v3 : swiglu_plain)(n, gate, up);
}

void kv_layernorm(size_t n_row, size_t n, const float *x, const float *w, const float *b, float eps, float *y)
{
    (kv_has_v3() ? layernorm_v3 : layernorm_plain)(n_row, n, x, w, b, eps, y);
}

void kv_geglu(bool tanh_form, size_t n, float *gate, const float *up)
{
    if (tanh_form)
        (kv_has_v3() ? gelu_tanh_v3 : gelu_tanh_plain)(n, gate);
    else
        for (size_t i = 0; i < n; i++) gate[i] = 0.5f * gate[i] * (1 + erff(gate[i] * 0.707106781f));
    for (size_t i = 0; up && i < n; i++) gate[i] *= up[i];
}
