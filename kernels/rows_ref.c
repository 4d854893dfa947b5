/* rows_ref.c - the row operations of a transformer block, in double. */
#include "kernels/kernels.h"

#include <math.h>

void kv_rmsnorm_ref(size_t n_row, size_t n, const float *x, const float *w, float eps, float *y)
{
    for (size_t r = 0; r < n_row; r++, x += n, y += n) {
        double sq = 0;
        for (size_t i = 0; i < n; i++) sq += (double)x[i] * x[i];
        double inv = 1 / sqrt(sq / (double)n + eps);
        for (size_t i = 0; i < n; i++) y[i] = (float)(x[i] * inv * w[i]);
    }
}

void kv_layernorm_ref(size_t n_row, size_t n, const float *x, const float *w, const float *b, float eps, float *y)
{
    for (size_t r = 0; r < n_row; r++, x += n, y += n) {
        double mean = 0, sq = 0;
        for (size_t i = 0; i < n; i++) mean += x[i];
        mean /= (double)n;
        for (size_t i = 0; i < n; i++) sq += (x[i] - mean) * (x[i] - mean);
        double inv = 1 / sqrt(sq / (double)n + eps);
        for (size_t i = 0; i < n; i++) y[i] = (float)((x[i] - mean) * inv * w[i] + b[i]);
    }
}

void kv_rope_ref(size_t n_row, size_t d, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *x,
                 size_t ld)
{
    (void)d; /* elements rot..d-1 stay */
    for (size_t r = 0; r < n_row; r++, x += ld) {
        for (size_t i = 0; i < rot / 2; i++) {
            double angle = (double)(pos0 + r) * inv_freq[i], c = cos(angle) * mscale, s = sin(angle) * mscale;
            double a = x[i], b = x[i + rot / 2];
            x[i] = (float)(a * c - b * s);
            x[i + rot / 2] = (float)(b * c + a * s);
        }
    }
}

void kv_swiglu_ref(size_t n, float *gate, const float *up)
{
    for (size_t i = 0; i < n; i++) gate[i] = (float)(gate[i] / (1 + exp(-(double)gate[i])) * up[i]);
}

void kv_geglu_ref(bool tanh_form, size_t n, float *gate, const float *up)
{
    for (size_t i = 0; i < n; i++) {
        double x = gate[i], u = sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x);
        double y = x / 2 * (1 + (tanh_form ? tanh(u) : erf(x / sqrt(2.0))));
        gate[i] = (float)(up ? y * up[i] : y);
    }
}
