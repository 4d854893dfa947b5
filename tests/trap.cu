/* trap.cu - a library to preload (tests/gpu_check.py): before the KV_TRAP-th product of cuBLAS (from 1) a kernel traps.
 * The device is lost for this process then: every call fails from there on, also those that free and close. */
#include <atomic>
#include <dlfcn.h>
#include <stdlib.h>

static __global__ void trap(void)
{
    __trap();
}

/* cublasGemmEx as the linker sees it; the header overloads the name in C++. */
typedef int product(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type_a,
                    int ld_a, const void *b, int type_b, int ld_b, const void *beta, void *c, int type_c, int ld_c,
                    int compute, int algo);

extern "C" int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a,
                            int type_a, int ld_a, const void *b, int type_b, int ld_b, const void *beta, void *c,
                            int type_c, int ld_c, int compute, int algo)
{
    static product *real = (product *)dlsym(RTLD_NEXT, "cublasGemmEx");
    static std::atomic<long> calls;
    const char *nth = getenv("KV_TRAP");
    if (++calls == (nth ? atol(nth) : 0)) trap<<<1, 1>>>();
    return real(handle, ta, tb, m, n, k, alpha, a, type_a, ld_a, b, type_b, ld_b, beta, c, type_c, ld_c, compute, algo);
}
