/* colsum_ref.c - column sums of the attention matrix: one key after the other, rows ascending. */
#include "kernels/kernels.h"
#include "kernels/math.h"

bool kv_colsum_ref(const kv_attn_shape *s, const float *q, const float *k, const float *lse, double *acc)
{
    for (size_t j = 0; j < s->n_key; j++) {
        for (size_t r = 0; r < s->n_row; r++) {
            size_t lo, hi;
            kv_visible(s, r, &lo, &hi);
            if (j < lo || j >= hi) continue;
            acc[j] += kv_expf(kv_score(s, q + r * s->d, k + j * s->d) - lse[r]);
        }
    }
    return true;
}
