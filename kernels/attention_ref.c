/* attention_ref.c - attention of one head, row by row in double. */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <math.h>
#include <stdlib.h>

bool kv_attention_ref(const kv_attn_shape *s, const float *q, const float *k, const float *v, float *out, size_t ld_out,
                      float *lse, float *stat)
{
    if (s->n_key > SIZE_MAX / sizeof(double) - s->d - 1) return false;
    double *score = malloc((s->n_key + s->d + 1) * sizeof *score), *sum = score + s->n_key;
    if (!score) return false;
    for (size_t r = 0; r < s->n_row; r++) {
        size_t lo, hi, arg = 0;
        kv_visible(s, r, &lo, &hi);
        double max = -INFINITY;
        for (size_t j = lo; j < hi; j++) {
            double dot = 0;
            for (size_t i = 0; i < s->d; i++) dot += (double)q[r * s->d + i] * k[j * s->d + i];
            dot *= s->scale;
            score[j] = s->softcap > 0 ? s->softcap * tanh(dot / s->softcap) : dot;
            if (score[j] > max) max = score[j], arg = j;
        }
        double l = 0, a = 0, c = 0;
        for (size_t i = 0; i < s->d; i++) sum[i] = 0;
        for (size_t j = lo; j < hi; j++) {
            double e = exp(score[j] - max);
            l += e;
            a += e * (score[j] - max);
            c += e * e;
            for (size_t i = 0; i < s->d; i++) sum[i] += e * v[j * s->d + i];
        }
        /* A row that sees nothing (a window that ended before key 0): output 0, LSE of an empty sum. */
        for (size_t i = 0; i < s->d; i++) out[r * ld_out + i] = (float)(l > 0 ? sum[i] / l : 0);
        lse[r] = (float)(max + log(l));
        if (stat) {
            stat[4 * r + 0] = (float)(l > 0 ? 1 / l : 0);
            stat[4 * r + 1] = (float)arg;
            stat[4 * r + 2] = (float)(l > 0 ? log(l) - a / l : 0);
            stat[4 * r + 3] = (float)(l > 0 ? c / (l * l) : 0);
        }
    }
    free(score);
    return true;
}
