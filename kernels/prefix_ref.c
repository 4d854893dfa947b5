/* prefix_ref.c - mass and output of the first check[c] keys of a ranking, each row by itself in double. */
#include "kernels/kernels.h"

#include <math.h>
#include <stdlib.h>

bool kv_prefix_ref(size_t n_row, size_t d, const float *q, const float *lse, float scale, float softcap, const float *k,
                   const float *v, size_t n_order, const uint32_t *order, size_t n_check, const uint32_t *check,
                   const double *base_mass, const float *base_out, const uint8_t *contested, double *mass,
                   double *cmass, float *out)
{
    (void)n_order; /* an upper bound of check[], which says how far to read */
    double *sum = malloc((d + 1) * sizeof *sum);
    if (!sum) return false;
    for (size_t r = 0; r < n_row; r++) {
        double m = 0, cm = 0;
        for (size_t i = 0; i < d; i++) sum[i] = 0;
        for (size_t c = 0, at = 0; c < n_check; c++) {
            for (; at < check[c]; at++) {
                size_t j = order[at];
                double s = 0;
                for (size_t i = 0; i < d; i++) s += (double)q[r * d + i] * k[j * d + i];
                s *= scale;
                if (softcap > 0) s = softcap * tanh(s / softcap);
                double p = exp(s - lse[r]);
                m += p;
                if (contested && contested[j]) cm += p;
                for (size_t i = 0; out && i < d; i++) sum[i] += p * v[j * d + i];
            }
            double all = m + (base_mass ? base_mass[r] : 0);
            mass[c * n_row + r] = all;
            if (cmass) cmass[c * n_row + r] = cm;
            for (size_t i = 0; out && i < d; i++) {
                double o = sum[i] + (base_out ? base_out[r * d + i] : 0);
                out[(c * n_row + r) * d + i] = (float)(all > 0 ? o / all : 0);
            }
        }
    }
    free(sum);
    return true;
}
