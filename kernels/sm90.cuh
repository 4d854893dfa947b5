/* sm90.cuh - host side of the Hopper kernels: is this a Hopper, and tensor maps for the copy engine. */
#ifndef KV_SM90_CUH
#define KV_SM90_CUH

#include <cuda.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

/* Code for sm_90a runs on compute capability 9.0 alone. */
static inline bool kv_is_sm90(void)
{
    int device = 0, major = 0, minor = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
           cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
           minor == 0;
}

/* A map of [head][row][d] 16-bit elements (strides in elements) in boxes of 64 elements by `box` rows, swizzled by 128
 * bytes; what lies beyond d, the rows or the heads reads as zero. 0 or a CUDA error code. The encoder is looked up in
 * the driver, so that programs do not link with it and start without one. */
static inline int kv_tensor_map(CUtensorMap *map, int bits, const void *p, uint32_t d, uint32_t n_row, uint32_t n_head,
                                size_t row, size_t head, uint32_t box)
{
    typedef CUresult (*encoder)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    void *f = NULL;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
#else
    cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
#endif
    if (e) return (int)e;
    if (!f) return (int)cudaErrorNotSupported;
    if (n_head == 1) head = row * n_row; /* not used, but must be a valid stride */
    const cuuint64_t dim[3] = {d, n_row, n_head}, stride[2] = {row * 2, head * 2};
    const cuuint32_t shape[3] = {64, box, 1}, step[3] = {1, 1, 1};
    CUresult r =
        ((encoder)f)(map, bits == 16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)p,
                     dim, stride, shape, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? 0 : (int)cudaErrorInvalidValue;
}

#endif
