/* test_cuda.c - every device kernel of kernels/cuda.h against its definition (kernels/table_cuda.cu, table_replay.cu).
 * Needs a device: without one, or in a build without CUDA, nothing was tested and the line at the end says so.
 *   test_cuda [NAME [SIZE]]   rows whose name begins so, cases of n_row * n_key * d up to SIZE (compute-sanitizer) */
#include "kernels/table_cuda.h"
#include "tests/check.h"

#include <stdlib.h>

static void walk(const kv_kernel *table, size_t n, const char *only, double size, const char *device)
{
    for (size_t i = 0; i < n; i++) {
        const kv_kernel *k = &table[i];
        double worst = 0;
        size_t ran = 0;
        if (strncmp(k->name, only, strlen(only))) continue;
        for (size_t c = 0; c < k->n_case; c++) {
            const kv_case *x = &k->cases[c];
            kv_verdict v = {.ok = true};
            if ((double)x->n_row * (double)x->n_key * (double)x->d > size) continue;
            k->check_cuda(k, x, 20261122u + c, &v), ran++;
            CHECKF(v.ok, "%s on %s case %zu: %s", k->name, device, c, v.why);
            if (v.worst > worst) worst = v.worst;
        }
        printf("%-22s %2zu cases, worst error %.2f of what is allowed\n", k->name, ran, worst);
    }
}

int main(int argc, char **argv)
{
    const char *only = argc > 1 ? argv[1] : "";
    double size = argc > 2 ? strtod(argv[2], NULL) : INFINITY;
    char device[128];
    if (!kv_cuda_device(device, sizeof device)) {
        SKIP("no CUDA device: no device kernel was run");
        printf("0 passed, 0 failed, %d skipped\n", kv_n_skip);
        return 0;
    }
    walk(kv_cuda_table, kv_cuda_count, only, size, device);
    walk(kv_replay_table, kv_replay_count, only, size, device);
    return kv_tally();
}
