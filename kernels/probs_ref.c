/* probs_ref.c - softmax rows.
 * m = largest visible score, e[j] = kv_expf(score[j] - m); sum = eight double lanes, lane j % 8 adds its e[j] in order
 * of j, then kv_sum8; p[j] = e[j] / (float)sum. */
#include "kernels/kernels.h"
#include "kernels/math.h"

bool kv_probs_ref(const kv_attn_shape *s, const float *q, const float *k, float *p)
{
    for (size_t r = 0; r < s->n_row; r++, p += s->n_key) {
        size_t lo, hi;
        kv_visible(s, r, &lo, &hi);
        float m = -__builtin_inff();
        for (size_t j = 0; j < s->n_key; j++) {
            p[j] = j < lo || j >= hi ? 0 : kv_score(s, q + r * s->d, k + j * s->d);
            if (j >= lo && j < hi && p[j] > m) m = p[j];
        }
        double lane[8] = {0};
        for (size_t j = lo; j < hi; j++) {
            p[j] = kv_expf(p[j] - m);
            lane[j % 8] += p[j];
        }
        float sum = (float)kv_sum8(lane);
        for (size_t j = lo; j < hi; j++) p[j] /= sum;
    }
    return true;
}
