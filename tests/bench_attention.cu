/* bench_attention.cu - rates of the device kernels on one GPU, as CSV: name,shape,median_ms,rate,unit,share.
 *
 * Prefill attention and column sums at the shape of an 8B model (32 query heads on 8 KV heads, d 128, causal, bf16);
 * the share is of the matrix peak that cuBLAS reaches in the same run. Attention counts 4 d flops for a visible pair,
 * column sums 2 d. Elementwise kernels have GB/s beside a device copy. Timings are medians over launches between two
 * events. Before timing, the kernels check each other at that size, and column sums must add up to the number of rows.
 */
#include "kernels/attention.cuh"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRY(x)                                                                                                         \
    do {                                                                                                               \
        int e_ = (int)(x);                                                                                             \
        if (e_) {                                                                                                      \
            fprintf(stderr, "bench_attention: %s: %s\n", #x, cudaGetErrorString((cudaError_t)e_));                     \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static double peak; /* TFLOP/s of cuBLAS */
static const char *only = "";

/* Approximately normal numbers, four 16-bit pieces of a hash each. */
static __global__ void fill(size_t n, uint64_t seed, float factor, __nv_bfloat16 *x)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u + seed * 0xda942042e4dd58b5u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        float s = 0;
        for (int k = 0; k < 4; k++) s += (float)(z >> 16 * k & 0xffff);
        x[i] = __float2bfloat16_rn((s * (1.f / 65536) - 2) * 1.732f * factor);
    }
}

static void *memory(size_t bytes)
{
    void *p = NULL;
    TRY(cudaMalloc(&p, bytes));
    return p;
}

template <typename F> static double median_ms(int runs, F launch)
{
    cudaEvent_t a, b;
    float t[64];
    TRY(cudaEventCreate(&a));
    TRY(cudaEventCreate(&b));
    launch();
    for (int i = 0; i < runs; i++) {
        TRY(cudaEventRecord(a));
        launch();
        TRY(cudaEventRecord(b));
        TRY(cudaEventSynchronize(b));
        TRY(cudaEventElapsedTime(&t[i], a, b));
    }
    TRY(cudaEventDestroy(a));
    TRY(cudaEventDestroy(b));
    for (int i = 1; i < runs; i++)
        for (int j = i; j && t[j - 1] > t[j]; j--) {
            float x = t[j];
            t[j] = t[j - 1], t[j - 1] = x;
        }
    return t[runs / 2];
}

template <typename F>
static void rate(const char *name, const char *shape, double work, const char *unit, double yard, F launch)
{
    if (strncmp(name, only, strlen(only))) return;
    double ms = median_ms(9, launch);
    printf("%s,%s,%.4g,%.4g,%s,%.2f\n", name, shape, ms, work / ms * 1e3, unit, yard > 0 ? work / ms * 1e3 / yard : 0);
    fflush(stdout);
}

static void matrix_peak(void)
{
    const int n = 8192;
    __nv_bfloat16 *a = (__nv_bfloat16 *)memory(2ul * n * n), *b = (__nv_bfloat16 *)memory(2ul * n * n);
    __nv_bfloat16 *c = (__nv_bfloat16 *)memory(2ul * n * n);
    fill<<<1024, 256>>>((size_t)n * n, 1, 1, a);
    fill<<<1024, 256>>>((size_t)n * n, 2, 1, b);
    cublasHandle_t h;
    if (cublasCreate(&h)) exit(1);
    const float one = 1, zero = 0;
    double ms = median_ms(15, [&] {
        if (cublasGemmEx(h, CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, a, CUDA_R_16BF, n, b, CUDA_R_16BF, n, &zero, c,
                         CUDA_R_16BF, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT))
            exit(1);
    });
    peak = 2e-9 * n * n * (double)n / ms;
    printf("cublas,8192x8192x8192 bf16,%.4g,%.4g,TFLOP/s,1\n", ms, peak);
    cublasDestroy(h);
    cudaFree(a), cudaFree(b), cudaFree(c);
}

struct tensors {
    __nv_bfloat16 *q, *k, *v, *out[2];
    float *lse[2], *stat;
    double *acc;
};

static kv_cuda_attn shape_of(uint32_t n, uint32_t heads, uint32_t kv_heads, uint32_t d, uint32_t row0)
{
    kv_cuda_attn a;
    memset(&a, 0, sizeof a);
    a.n_q_head = heads, a.n_kv_head = kv_heads, a.d = d, a.n_row = n, a.n_key = row0 + n, a.row0 = row0;
    a.scale = 1 / sqrtf((float)d), a.bits = a.out_bits = 17;
    a.q_row = d, a.q_head = (size_t)n * d, a.kv_token = d, a.kv_head = (size_t)a.n_key * d;
    a.out_head = d, a.out_row = (size_t)heads * d, a.lse_head = n;
    return a;
}

static tensors make(const kv_cuda_attn *a)
{
    tensors t;
    size_t n_q = a->n_q_head * a->q_head, n_kv = a->n_kv_head * a->kv_head, rows = (size_t)a->n_q_head * a->n_row;
    t.q = (__nv_bfloat16 *)memory(2 * n_q), t.k = (__nv_bfloat16 *)memory(2 * n_kv);
    t.v = (__nv_bfloat16 *)memory(2 * n_kv);
    for (int i = 0; i < 2; i++) t.out[i] = (__nv_bfloat16 *)memory(2 * n_q), t.lse[i] = (float *)memory(4 * rows);
    t.stat = (float *)memory(16 * rows), t.acc = (double *)memory(8ul * a->n_q_head * a->n_key);
    fill<<<1024, 256>>>(n_q, 3, 1, t.q);
    fill<<<1024, 256>>>(n_kv, 4, 1, t.k);
    fill<<<1024, 256>>>(n_kv, 5, 1, t.v);
    TRY(cudaDeviceSynchronize());
    return t;
}

static void drop(tensors *t)
{
    void *all[] = {t->q, t->k, t->v, t->out[0], t->out[1], t->lse[0], t->lse[1], t->stat, t->acc};
    for (void *p : all) cudaFree(p);
}

/* Largest difference of lse, relative difference of the outputs, and what the column sums lack. */
static void check(const kv_cuda_attn *a, tensors *t)
{
    size_t n = a->n_q_head * a->q_head, rows = (size_t)a->n_q_head * a->n_row, keys = (size_t)a->n_q_head * a->n_key;
    uint16_t *o[2];
    float *l[2];
    double *acc = (double *)malloc(8 * keys), diff = 0, norm = 0, far = 0, sum = 0;
    for (int i = 0; i < 2; i++) {
        TRY(cudaMemset(t->out[i], 0xff, 2 * n));
        TRY(kv_attention_path(a, i, t->q, t->k, t->v, t->out[i], t->lse[i], i ? NULL : t->stat, 0));
        o[i] = (uint16_t *)malloc(2 * n), l[i] = (float *)malloc(4 * rows);
        TRY(cudaMemcpy(o[i], t->out[i], 2 * n, cudaMemcpyDeviceToHost));
        TRY(cudaMemcpy(l[i], t->lse[i], 4 * rows, cudaMemcpyDeviceToHost));
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t u = (uint32_t)o[0][i] << 16, w = (uint32_t)o[1][i] << 16;
        float x, y;
        memcpy(&x, &u, 4), memcpy(&y, &w, 4);
        diff += (x - y) * (double)(x - y), norm += y * (double)y;
    }
    for (size_t i = 0; i < rows; i++) far = fmax(far, fabs(l[0][i] - l[1][i]));
    TRY(cudaMemset(t->acc, 0, 8 * keys));
    TRY(kv_colsum_dev(a, t->q, t->k, t->lse[0], t->acc, a->n_key, 0));
    TRY(cudaMemcpy(acc, t->acc, 8 * keys, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < keys; i++) sum += acc[i];
    diff = sqrt(diff / norm), sum = fabs(sum / (double)rows - 1);
    bool ok = diff < 5e-3 && far < 1e-4 && sum < 1e-5;
    printf("# check %ux%ux%u: outputs differ by %.2g, lse by %.2g, column sums lack %.2g: %s\n", a->n_q_head, a->n_row,
           a->d, diff, far, sum, ok ? "ok" : "WRONG");
    for (int i = 0; i < 2; i++) free(o[i]), free(l[i]);
    free(acc);
    if (!ok) exit(1);
}

static void prefill(uint32_t n, uint32_t heads, uint32_t kv_heads, uint32_t d, bool mma)
{
    kv_cuda_attn a = shape_of(n, heads, kv_heads, d, 0);
    tensors t = make(&a);
    char shape[64];
    double work = 4e-12 * heads * d * ((double)n * (n + 1) / 2);
    snprintf(shape, sizeof shape, "%u/%u heads %ux%u", heads, kv_heads, n, d);
    if (n <= 8192) check(&a, &t);
    if (mma)
        rate("attention_mma", shape, work, "TFLOP/s", peak,
             [&] { TRY(kv_attention_path(&a, KV_PATH_MMA, t.q, t.k, t.v, t.out[0], t.lse[0], NULL, 0)); });
    rate("attention", shape, work, "TFLOP/s", peak,
         [&] { TRY(kv_attention_dev(&a, t.q, t.k, t.v, t.out[0], t.lse[0], NULL, 0)); });
    rate("attention_stat", shape, work, "TFLOP/s", peak,
         [&] { TRY(kv_attention_dev(&a, t.q, t.k, t.v, t.out[0], t.lse[0], t.stat, 0)); });
    if (mma)
        rate("colsum_mma", shape, work / 2, "TFLOP/s", peak,
             [&] { TRY(kv_colsum_path(&a, KV_PATH_MMA, t.q, t.k, t.lse[0], t.acc, a.n_key, 0)); });
    rate("colsum", shape, work / 2, "TFLOP/s", peak,
         [&] { TRY(kv_colsum_dev(&a, t.q, t.k, t.lse[0], t.acc, a.n_key, 0)); });
    drop(&t);
}

static void rows(void)
{
    const size_t m = 8192, n = 4096, ffn = 14336;
    float *x = (float *)memory(4 * m * n), *w = (float *)memory(4 * n);
    char *y = (char *)memory(2 * 2 * m * ffn), *z = (char *)memory(2 * m * ffn);
    TRY(cudaMemset(x, 0x3c, 4 * m * n));
    TRY(cudaMemset(w, 0x3c, 4 * n));
    TRY(cudaMemset(y, 0x3c, 4 * m * ffn));
    double ms = median_ms(9, [&] { TRY(cudaMemcpyAsync(z, y, 2 * m * ffn, cudaMemcpyDeviceToDevice, 0)); });
    double copy = 4e-9 * m * ffn / ms * 1e3;
    printf("copy,device to device,%.4g,%.4g,GB/s,1\n", ms, copy);
    rate("rmsnorm", "8192x4096 to bf16", 6e-9 * m * n, "GB/s", copy,
         [&] { TRY(kv_rmsnorm_dev(m, n, x, n, w, 0, 1e-5f, z, 17, n, 0)); });
    rate("gate", "8192x14336 bf16", 6e-9 * m * ffn, "GB/s", copy,
         [&] { TRY(kv_gate_dev(m, ffn, KV_GATE_SILU, y, y + 2 * ffn, 17, 2 * ffn, NULL, z, 17, 0)); });
    rate("add", "8192x4096 bf16", 10e-9 * m * n, "GB/s", copy, [&] { TRY(kv_add_dev(m, n, x, y, 17, n, NULL, 0)); });
    rate("heads", "8192x32x128 f32 to bf16", (6e-9 * n + 4e-9 * 128) * m, "GB/s", copy,
         [&] { TRY(kv_heads_dev(m, 32, 128, y, 32, n, NULL, NULL, 0, 0, x, 128, z, 17, m * 128, NULL, 0)); });
    cudaFree(x), cudaFree(w), cudaFree(y), cudaFree(z);
}

int main(int argc, char **argv)
{
    cudaDeviceProp p;
    if (argc > 1) only = argv[1];
    if (cudaGetDeviceProperties(&p, 0)) {
        fprintf(stderr, "bench_attention: no CUDA device\n");
        return 1;
    }
    printf("# %s, %d multiprocessors\nname,shape,median_ms,rate,unit,share of the yardstick\n", p.name,
           p.multiProcessorCount);
    matrix_peak();
    prefill(8192, 32, 8, 128, true);
    prefill(32768, 32, 8, 128, true);
    prefill(131072, 32, 8, 128, false);
    prefill(8192, 32, 8, 64, true);
    prefill(8192, 16, 8, 256, false);
    rows();
    return 0;
}
