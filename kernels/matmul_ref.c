/* matmul_ref.c - products with weights stored (out, in), in double. */
#include "kernels/kernels.h"

#include <math.h>

bool kv_matmul_ref(size_t m, size_t n, size_t k, const float *a, const float *b, float *c, size_t ldc)
{
    for (size_t i = 0; i < m; i++) {
        for (size_t j = 0; j < n; j++) {
            double sum = 0;
            for (size_t x = 0; x < k; x++) sum += (double)a[i * k + x] * b[j * k + x];
            c[i * ldc + j] = (float)sum;
        }
    }
    return true;
}
