/* gpu.cu - gpu.h in terms of the CUDA runtime and cuBLAS. */
#include "kernels/gpu.h"
#include "kernels/kernels.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <stdlib.h>

#define BLAS_ERROR     100000 /* + cublasStatus_t */
#define BLAS_WORKSPACE ((size_t)32 << 20)

struct kv_gpu_blas {
    cublasHandle_t handle;
    void *workspace;
};

extern "C" const char *kv_gpu_text(int code)
{
    if (code >= BLAS_ERROR) return cublasGetStatusString((cublasStatus_t)(code - BLAS_ERROR));
    return cudaGetErrorString((cudaError_t)code);
}

extern "C" int kv_gpu_count(void)
{
    int n = 0;
    if (!kv_cuda_device(NULL, 0) || cudaGetDeviceCount(&n) != cudaSuccess) n = 0;
    cudaGetLastError();
    return n;
}

extern "C" int kv_gpu_select(int device)
{
    return cudaSetDevice(device);
}

extern "C" int kv_gpu_memory(size_t *available, size_t *total)
{
    return cudaMemGetInfo(available, total);
}

/* A refused allocation is this call's result, not the next one's. */
extern "C" int kv_gpu_alloc(size_t n, void **p)
{
    cudaError_t e = cudaMalloc(p, n ? n : 1);
    if (e) *p = NULL, cudaGetLastError();
    return e;
}

extern "C" void kv_gpu_free(void *p)
{
    cudaFree(p);
}

extern "C" void *kv_gpu_host_alloc(size_t n)
{
    void *p = NULL;
    if (cudaHostAlloc(&p, n ? n : 1, cudaHostAllocPortable)) p = NULL, cudaGetLastError();
    return p;
}

extern "C" void kv_gpu_host_free(void *p)
{
    if (p) cudaFreeHost(p);
}

extern "C" int kv_gpu_stream_open(bool urgent, kv_gpu_stream *s)
{
    int low = 0, high = 0;
    *s = NULL;
    cudaError_t e = cudaDeviceGetStreamPriorityRange(&low, &high);
    return e ? e : cudaStreamCreateWithPriority(s, cudaStreamNonBlocking, urgent ? high : low);
}

extern "C" void kv_gpu_stream_close(kv_gpu_stream s)
{
    if (s) cudaStreamDestroy(s);
}

extern "C" int kv_gpu_stream_sync(kv_gpu_stream s)
{
    return cudaStreamSynchronize(s);
}

extern "C" int kv_gpu_stream_wait(kv_gpu_stream s, kv_gpu_event e)
{
    return cudaStreamWaitEvent(s, e, 0);
}

extern "C" int kv_gpu_event_open(kv_gpu_event *e)
{
    *e = NULL;
    return cudaEventCreateWithFlags(e, cudaEventBlockingSync);
}

extern "C" void kv_gpu_event_close(kv_gpu_event e)
{
    if (e) cudaEventDestroy(e);
}

extern "C" int kv_gpu_event_record(kv_gpu_event e, kv_gpu_stream s)
{
    return cudaEventRecord(e, s);
}

extern "C" int kv_gpu_event_sync(kv_gpu_event e)
{
    return cudaEventSynchronize(e);
}

extern "C" int kv_gpu_event_seconds(kv_gpu_event a, kv_gpu_event b, double *s)
{
    float ms = 0;
    cudaError_t e = cudaEventElapsedTime(&ms, a, b);
    *s = 1e-3 * (double)ms;
    return e;
}

extern "C" int kv_gpu_copy(void *to, const void *from, size_t n, kv_gpu_stream s)
{
    return cudaMemcpyAsync(to, from, n, cudaMemcpyDefault, s);
}

extern "C" int kv_gpu_copy_peer(void *to, int to_device, const void *from, int from_device, size_t n, kv_gpu_stream s)
{
    return cudaMemcpyPeerAsync(to, to_device, from, from_device, n, s);
}

extern "C" int kv_gpu_zero(void *p, size_t n, kv_gpu_stream s)
{
    return cudaMemsetAsync(p, 0, n, s);
}

/* ------------------------------------------------------------------------------------------------ products */
static int blas_code(cublasStatus_t s)
{
    if (s == CUBLAS_STATUS_ALLOC_FAILED) return cudaErrorMemoryAllocation;
    return s == CUBLAS_STATUS_SUCCESS ? 0 : BLAS_ERROR + (int)s;
}

extern "C" size_t kv_gpu_blas_bytes(void)
{
    return BLAS_WORKSPACE;
}

extern "C" int kv_gpu_blas_open(kv_gpu_stream s, kv_gpu_blas **out)
{
    kv_gpu_blas *b = (kv_gpu_blas *)calloc(1, sizeof *b);
    int e;
    *out = NULL;
    if (!b) return cudaErrorMemoryAllocation;
    e = blas_code(cublasCreate(&b->handle));
    if (!e) e = kv_gpu_alloc(BLAS_WORKSPACE, &b->workspace);
    if (!e) e = blas_code(cublasSetStream(b->handle, s));
    if (!e) e = blas_code(cublasSetWorkspace(b->handle, b->workspace, BLAS_WORKSPACE));
    /* Partial sums of 16-bit products stay in f32. */
    if (!e)
        e = blas_code(cublasSetMathMode(
            b->handle, (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
    if (!e) e = blas_code(cublasSetAtomicsMode(b->handle, CUBLAS_ATOMICS_NOT_ALLOWED));
    if (e) {
        kv_gpu_blas_close(b);
        return e;
    }
    *out = b;
    return 0;
}

extern "C" void kv_gpu_blas_close(kv_gpu_blas *b)
{
    if (!b) return;
    if (b->handle) cublasDestroy(b->handle);
    cudaFree(b->workspace);
    free(b);
}

static cudaDataType_t type_of(int bits)
{
    return bits == 16 ? CUDA_R_16F : bits == 17 ? CUDA_R_16BF : CUDA_R_32F;
}

/* cuBLAS counts columns first: what it calls c [n][m] is c [m][n] in rows. */
extern "C" int kv_gpu_matmul(kv_gpu_blas *b, size_t m, size_t n, size_t k, int bits, float alpha, const void *a,
                             size_t ld_a, const void *w, int c_bits, void *c, size_t ld_c, bool add)
{
    float beta = add ? 1.0f : 0.0f;
    cublasComputeType_t compute = bits == 32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
    if (m > INT32_MAX || n > INT32_MAX || k > INT32_MAX || ld_a > INT32_MAX || ld_c > INT32_MAX)
        return cudaErrorInvalidValue;
    return blas_code(cublasGemmEx(b->handle, CUBLAS_OP_T, CUBLAS_OP_N, (int)n, (int)m, (int)k, &alpha, w, type_of(bits),
                                  (int)k, a, type_of(bits), (int)ld_a, &beta, c, type_of(c_bits), (int)ld_c, compute,
                                  CUBLAS_GEMM_DEFAULT));
}

/* ------------------------------------------------------------------------------------------------ for tests */
extern "C" int kv_matmul_cuda(size_t m, size_t n, size_t k, const float *a, const float *b, float *c, size_t ldc)
{
    void *da = NULL, *db = NULL, *dc = NULL;
    kv_gpu_stream s = NULL;
    kv_gpu_blas *h = NULL;
    int e = kv_gpu_stream_open(false, &s);
    if (!e) e = kv_gpu_blas_open(s, &h);
    if (!e) e = kv_gpu_alloc(4 * m * k, &da);
    if (!e) e = kv_gpu_alloc(4 * n * k, &db);
    if (!e) e = kv_gpu_alloc(4 * m * n, &dc);
    if (!e) e = kv_gpu_copy(da, a, 4 * m * k, s);
    if (!e) e = kv_gpu_copy(db, b, 4 * n * k, s);
    if (!e) e = kv_gpu_matmul(h, m, n, k, 32, 1, da, k, db, 32, dc, n, false);
    for (size_t r = 0; r < m && !e; r++) e = kv_gpu_copy(c + r * ldc, (float *)dc + r * n, 4 * n, s);
    if (!e) e = kv_gpu_stream_sync(s);
    kv_gpu_blas_close(h);
    kv_gpu_free(da), kv_gpu_free(db), kv_gpu_free(dc);
    kv_gpu_stream_close(s);
    return e;
}
