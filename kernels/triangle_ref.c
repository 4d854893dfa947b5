/* triangle_ref.c - Householder reflections, one column after the other, with LAPACK's signs. */
#include "kernels/kernels.h"

#include <math.h>
#include <stdlib.h>

bool kv_triangle_ref(size_t n_out, size_t n_in, const float *w, float *r)
{
    size_t k = n_out < n_in ? n_out : n_in;
    double *a = malloc((n_out * n_in + 1) * sizeof *a);
    if (!a) return false;
    for (size_t i = 0; i < n_out * n_in; i++) a[i] = w[i];
    for (size_t c = 0; c < k; c++) {
        double sq = 0, head = a[c * n_in + c];
        for (size_t i = c + 1; i < n_out; i++) sq += a[i * n_in + c] * a[i * n_in + c];
        if (sq == 0) continue; /* nothing below the diagonal */
        double norm = sqrt(sq + head * head), alpha = head >= 0 ? -norm : norm, v0 = head - alpha;
        for (size_t j = c + 1; j < n_in; j++) { /* the reflection that takes this column to alpha e_c */
            double dot = v0 * a[c * n_in + j];
            for (size_t i = c + 1; i < n_out; i++) dot += a[i * n_in + c] * a[i * n_in + j];
            dot *= 2 / (v0 * v0 + sq);
            a[c * n_in + j] -= dot * v0;
            for (size_t i = c + 1; i < n_out; i++) a[i * n_in + j] -= dot * a[i * n_in + c];
        }
        a[c * n_in + c] = alpha;
    }
    for (size_t i = 0; i < k; i++)
        for (size_t j = 0; j < n_in; j++) r[i * n_in + j] = j < i ? 0 : (float)a[i * n_in + j];
    free(a);
    return true;
}
