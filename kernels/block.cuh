/* block.cuh - reductions over the threads of a block. */
#ifndef KV_BLOCK_CUH
#define KV_BLOCK_CUH

#include <cuda_runtime.h>

/* The block's value of op over its threads, in a fixed order. */
template <typename T, typename F> __device__ T kv_over_block(T v, T *shared, F op)
{
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int d = 16; d; d /= 2) v = op(v, __shfl_xor_sync(0xffffffff, v, d));
    __syncthreads();
    if (!lane) shared[warp] = v;
    __syncthreads();
    T all = shared[0];
    for (int w = 1; w < (int)blockDim.x / 32; w++) all = op(all, shared[w]);
    return all;
}

#endif
