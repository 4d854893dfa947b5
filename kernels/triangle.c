/* triangle.c - the triangular factor of a matrix: LAPACK's QR in double, inside OpenBLAS. */
#include "kernels/blas.h"
#include "kernels/kernels.h"

#include <stdlib.h>

extern void dgeqrf_(const int *m, const int *n, double *a, const int *lda, double *tau, double *work, const int *lwork,
                    int *info);

bool kv_triangle(size_t n_out, size_t n_in, const float *w, float *r)
{
    size_t k = n_out < n_in ? n_out : n_in;
    if (!k || n_out > KV_BLAS_MAX || n_in > KV_BLAS_MAX || n_in > SIZE_MAX / sizeof(double) / n_out) return k == 0;
    int m = (int)n_out, n = (int)n_in, lwork = -1, info = 0;
    double *a = malloc(n_out * n_in * sizeof *a), *tau = malloc(k * sizeof *tau), *work = NULL, want = 0;
    bool ok = a && tau;
    kv_blas_one_thread();
    if (ok) dgeqrf_(&m, &n, a, &m, tau, &want, &lwork, &info);
    lwork = (int)want;
    if (ok) ok = info == 0 && (work = malloc((size_t)lwork * sizeof *work));
    for (size_t i = 0; i < n_out && ok; i++) /* LAPACK's columns lie together */
        for (size_t j = 0; j < n_in; j++) a[j * n_out + i] = w[i * n_in + j];
    if (ok) dgeqrf_(&m, &n, a, &m, tau, work, &lwork, &info);
    for (size_t i = 0; i < k && ok; i++)
        for (size_t j = 0; j < n_in; j++) r[i * n_in + j] = j < i ? 0 : (float)a[j * n_out + i];
    free(a), free(tau), free(work);
    return ok && info == 0;
}
