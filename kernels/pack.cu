/* pack.cu - rounding and byte planes on the device. One thread an element; the plane's bytes of a warp are contiguous.
 */
#include "kernels/half.h"
#include "kernels/kernels.h"

#include <cuda_runtime.h>

static __global__ void pack(int bits, size_t n, const uint32_t *src, uint8_t *dst, unsigned long long *over)
{
    size_t step = (size_t)gridDim.x * blockDim.x;
    unsigned long long count = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        uint32_t u = src[i];
        if (bits == 32) {
            for (int b = 0; b < 4; b++) dst[b * n + i] = (uint8_t)(u >> 8 * b);
            continue;
        }
        uint32_t h = bits == 17 ? kv_bf16_bits(u) : kv_f16_bits(u);
        count += bits == 17 ? kv_bf16_over(u) : kv_f16_over(u);
        dst[i] = (uint8_t)h;
        dst[n + i] = (uint8_t)(h >> 8);
    }
    if (count) atomicAdd(over, count);
}

int kv_pack_cuda(int bits, size_t n, const float *src, uint8_t *dst, size_t *n_overflow)
{
    uint32_t *d_src = NULL;
    uint8_t *d_dst = NULL;
    unsigned long long *d_over = NULL, over = 0;
    size_t n_out = n * (bits == 32 ? 4 : 2);
    cudaError_t e = cudaSuccess;
    *n_overflow = 0;
    if (n == 0) return 0;
    if (n > SIZE_MAX / 4) return (int)cudaErrorInvalidValue;

    e = cudaMalloc(&d_src, 4 * n);
    if (!e) e = cudaMalloc(&d_dst, n_out);
    if (!e) e = cudaMalloc(&d_over, sizeof *d_over);
    if (!e) e = cudaMemset(d_over, 0, sizeof *d_over);
    if (!e) e = cudaMemcpy(d_src, src, 4 * n, cudaMemcpyHostToDevice);
    if (!e) {
        size_t blocks = (n + 255) / 256;
        pack<<<(unsigned)(blocks < 4096 ? blocks : 4096), 256>>>(bits, n, d_src, d_dst, d_over);
        e = cudaGetLastError();
    }
    if (!e) e = cudaMemcpy(dst, d_dst, n_out, cudaMemcpyDeviceToHost);
    if (!e) e = cudaMemcpy(&over, d_over, sizeof over, cudaMemcpyDeviceToHost);
    if (!e) *n_overflow = (size_t)over;
    cudaFree(d_src);
    cudaFree(d_dst);
    cudaFree(d_over);
    return (int)e;
}
