/* walk_ref.c - a walk along a ranking, each row by itself. */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <math.h>

void kv_walk_ref(size_t n_row, size_t d, const float *p, size_t ld, const float *v, size_t at, size_t n,
                 const uint32_t *order, const uint8_t *flag, double *mass, double *cmass, float *out, float *part)
{
    for (size_t r = 0; r < n_row; r++)
        for (size_t i = 0; i < n; i++) {
            const float *row = out ? v + (size_t)order[i] * d : NULL;
            float x = p[(size_t)order[i] * ld + r];
            mass[r] += x;
            if (cmass && flag[order[i]]) cmass[r] += x;
            for (size_t j = 0; out && j < d; j++) part[r * d + j] = fmaf(x, row[j], part[r * d + j]);
            if (!out || (at + i + 1) % KV_WALK_BLOCK) continue;
            for (size_t j = 0; j < d; j++) out[r * d + j] += part[r * d + j], part[r * d + j] = 0;
        }
}

void kv_walk_compare_ref(size_t n_row, size_t d, const double *mass, const float *out, const float *part,
                         const float *o, double *error2, double *dot, float *diff, size_t ld_diff)
{
    for (size_t r = 0; r < n_row; r++) {
        double sq[8] = {0}, pr[8] = {0};
        float inv = mass[r] > 0 ? (float)(1 / mass[r]) : 0;
        for (size_t j = 0; j < d; j++) {
            float gone = o[r * d + j] - (out[r * d + j] + part[r * d + j]) * inv;
            sq[j % 8] += (double)gone * gone;
            pr[j % 8] += (double)gone * o[r * d + j];
            if (diff) diff[r * ld_diff + j] = gone;
        }
        error2[r] = kv_sum8(sq);
        dot[r] = kv_sum8(pr);
    }
}
