/* blas.h - the two products of OpenBLAS that kernels use, row-major, each in one thread.
 * The caller keeps every size below KV_BLAS_MAX (OpenBLAS counts in int). */
#ifndef KV_BLAS_H
#define KV_BLAS_H

#include <stddef.h>
#include <stdint.h>

#define KV_BLAS_MAX ((size_t)0x7fffffff)

/* c[m][n] = alpha a[m][k] b[n][k]^T + beta c. Rows at strides lda, ldb, ldc. */
void kv_sgemm_nt(size_t m, size_t n, size_t k, float alpha, const float *a, size_t lda, const float *b, size_t ldb,
                 float beta, float *c, size_t ldc);
/* c[m][n] = alpha a[m][k] b[k][n] + beta c. */
void kv_sgemm_nn(size_t m, size_t n, size_t k, float alpha, const float *a, size_t lda, const float *b, size_t ldb,
                 float beta, float *c, size_t ldc);

/* Address space for so many threads inside OpenBLAS at a time, held from now on: it takes 128 MiB for each and tries
 * for ever where there is none (`ulimit -v`). Returns for how many there is, 0 to `threads`; with two and more as much
 * again is left to everything else. Any thread may call it. */
uint32_t kv_blas_room(uint32_t threads);

/* For callers of other functions of OpenBLAS: it leaves threads to us from now on. */
void kv_blas_one_thread(void);

#endif
