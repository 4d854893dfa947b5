/* cuda_ref.c - the definitions of device kernels that have no CPU version of their own; see cuda.h. */
#include "kernels/cuda.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

void kv_heads_ref(size_t n_row, size_t n_head, size_t d, const float *proj, size_t ld_proj, const float *bias,
                  const float *norm_w, float w_add, float eps, const float *inv_freq, float mscale, size_t pos0,
                  size_t rot, float *out, int bits, size_t out_head)
{
    for (size_t h = 0; h < n_head; h++) {
        for (size_t r = 0; r < n_row; r++) {
            float *x = out + h * out_head + r * d;
            double sum = 0;
            for (size_t i = 0; i < d; i++) {
                x[i] = proj[r * ld_proj + h * d + i] + (bias ? bias[h * d + i] : 0);
                sum += (double)x[i] * x[i];
            }
            double f = 1 / sqrt(sum / (double)d + eps);
            for (size_t i = 0; norm_w && i < d; i++) x[i] = (float)(x[i] * f * ((double)norm_w[i] + w_add));
        }
        if (inv_freq) kv_rope_ref(n_row, d, rot, pos0, inv_freq, mscale, out + h * out_head, d);
        kv_round_ref(bits, n_row * d, out + h * out_head);
    }
}

void kv_layernorm_dev_ref(size_t n_row, size_t n, const float *x, const float *w, const float *b, float eps, float *y)
{
    for (size_t r = 0; r < n_row; r++, x += n, y += n) {
        double mean = 0, var = 0;
        for (size_t i = 0; i < n; i++) mean += x[i];
        mean /= (double)n;
        for (size_t i = 0; i < n; i++) var += (x[i] - mean) * (x[i] - mean);
        double f = 1 / sqrt(var / (double)n + eps);
        for (size_t i = 0; i < n; i++) y[i] = (float)((x[i] - mean) * f * w[i] + (b ? b[i] : 0));
    }
}

void kv_gate_ref(size_t n, int act, const float *gate, const float *up, float *out)
{
    for (size_t i = 0; i < n; i++) {
        double g = gate[i];
        double y = act == KV_GATE_SILU   ? g / (1 + exp(-g))
                   : act == KV_GATE_GELU ? 0.5 * g * (1 + erf(g / sqrt(2.0)))
                                         : 0.5 * g * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
        out[i] = (float)(y * (up ? up[i] : 1));
    }
}
