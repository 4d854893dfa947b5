/* probs_ref.c - softmax rows.
 * m = largest visible score, e[j] = kv_expf(score[j] - m); sum = eight double lanes, lane j % 8 adds its e[j] in order
 * of j, then kv_sum8; p[j] = e[j] / (float)sum. */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <stdlib.h>

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

bool kv_probs_turned_ref(const kv_attn_shape *s, size_t n_head, const float *q, size_t q_head, const float *k, float *p,
                         size_t ld, float *lse)
{
    float *row = malloc((s->n_key + 1) * sizeof *row);
    if (!row) return false;
    for (size_t c = 0; c < ld; c++) {
        kv_attn_shape one = *s;
        size_t h = c / s->n_row, r = c % s->n_row, lo, hi;
        one.n_row = 1, one.row0 += r;
        const float *x = q + h * q_head + r * s->d;
        bool real = c < n_head * s->n_row;
        if (real && !kv_probs_ref(&one, x, k, row)) return free(row), false;
        for (size_t j = 0; j < s->n_key; j++) p[j * ld + c] = real ? row[j] : 0;
        if (!real) continue;
        double lane[8] = {0};
        float m = -__builtin_inff();
        kv_visible(&one, 0, &lo, &hi);
        for (size_t j = lo; j < hi; j++) row[j] = kv_score(s, x, k + j * s->d), m = row[j] > m ? row[j] : m;
        for (size_t j = lo; j < hi; j++) lane[j % 8] += kv_expf(row[j] - m);
        lse[c] = lo < hi ? (float)(m + kv_logd(kv_sum8(lane))) : m;
    }
    free(row);
    return true;
}
