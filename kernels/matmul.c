/* matmul.c - products with weights: fixed blocks of c, each one OpenBLAS product in one thread. */
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "kernels/parallel.h"

/* A block of c. Large enough that packing the operands is lost in the noise, small enough that a layer of a small model
 * gives work to several cores (SPEED.md). A few rows only read the weights once: narrow blocks, for the cores' sake. */
#define ROWS      256
#define COLS      512
#define COLS_THIN 128
#define THIN      32

#define FEW (1u << 20) /* multiply-adds below which starting a thread costs more than it saves */

typedef struct {
    size_t m, n, k, ldc, cols, n_col;
    const float *a, *b;
    float *c;
} job;

static void block(void *ctx, size_t i)
{
    const job *p = ctx;
    size_t r = i / p->n_col * ROWS, c = i % p->n_col * p->cols;
    size_t m = p->m - r < ROWS ? p->m - r : ROWS, n = p->n - c < p->cols ? p->n - c : p->cols;
    kv_sgemm_nt(m, n, p->k, 1, p->a + r * p->k, p->k, p->b + c * p->k, p->k, 0, p->c + r * p->ldc + c, p->ldc);
}

bool kv_matmul(size_t m, size_t n, size_t k, const float *a, const float *b, float *c, size_t ldc, uint32_t threads)
{
    if (k > KV_BLAS_MAX || ldc > KV_BLAS_MAX) return false;
    if (m == 0 || n == 0) return true;
    if (k == 0) {
        for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < n; j++) c[i * ldc + j] = 0;
        return true;
    }
    size_t cols = m <= THIN ? COLS_THIN : COLS;
    job p = {m, n, k, ldc, cols, (n - 1) / cols + 1, a, b, c};
    if (m <= FEW && n <= FEW && k <= FEW && m * n <= FEW && m * n * k <= FEW) threads = 1;
    kv_parallel(((m - 1) / ROWS + 1) * p.n_col, threads, block, &p);
    return true;
}
