/* device.cu - is there a device that can run what this build holds? */
#include "kernels/kernels.h"

#include <cuda_runtime.h>
#include <string.h>

static __global__ void nothing(void)
{
}

bool kv_cuda_device(char *name, size_t n)
{
    cudaDeviceProp p;
    int count = 0;
    if (n) name[0] = 0;
    bool ok = cudaGetDeviceCount(&count) == cudaSuccess && count > 0 && cudaGetDeviceProperties(&p, 0) == cudaSuccess;
    if (ok) {
        /* A card older than every architecture of the build has a driver and a name, and cannot launch a thing. */
        cudaFuncAttributes a;
        ok = cudaFuncGetAttributes(&a, nothing) == cudaSuccess;
    }
    if (ok && n) {
        strncpy(name, p.name, n - 1);
        name[n - 1] = 0;
    }
    cudaGetLastError(); /* a refusal here is an answer, not an error for the next caller to find */
    return ok;
}
