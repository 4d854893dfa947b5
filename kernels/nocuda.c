/* nocuda.c - what the .cu files offer, in builds without nvcc: no device, and every launch fails. */
#include "kernels/kernels.h"

#define NO_DEVICE 100 /* cudaErrorNoDevice */

bool kv_cuda_device(char *name, size_t n)
{
    if (n) name[0] = 0;
    return false;
}

int kv_pack_cuda(int bits, size_t n, const float *src, uint8_t *dst, size_t *n_overflow)
{
    (void)bits, (void)n, (void)src, (void)dst;
    *n_overflow = 0;
    return NO_DEVICE;
}
