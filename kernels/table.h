/* table.h - every kernel with its class, its tolerance and the shapes it is checked on.
 * A check makes seeded inputs, runs the fast version (or its CUDA twin) and the reference, and compares. Tests, the
 * benchmarks and the self-test of kv-sim walk the table; a new kernel is one row. */
#ifndef KV_TABLE_H
#define KV_TABLE_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { KV_EXACT, KV_CLOSE } kv_kernel_class;

/* What n_row, n_key, d stand for is the kernel's: rows and keys of attention, m n k of a product, the length alone. */
typedef struct {
    size_t n_row, n_key, d;
    size_t row0, window; /* attention; rope: first position and rotated elements */
    float softcap;
    int kind; /* of input: see the kernel's check; element type for pack and round */
} kv_case;

typedef struct {
    bool ok;
    double worst;  /* largest error as a share of what is allowed; 0 for equal bytes */
    char why[160]; /* when not ok */
} kv_verdict;

typedef struct kv_kernel {
    const char *name;
    kv_kernel_class cls;
    double tol; /* CLOSE: |got - want| <= tol * (rms of want + |want|) */
    const kv_case *cases;
    size_t n_case;
    void (*check)(const struct kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v);
    void (*check_cuda)(const struct kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v); /* or NULL */
} kv_kernel;

extern const kv_kernel kv_kernel_table[];
extern const size_t kv_kernel_count;

/* The comparison: into *v (which starts as ok) goes the first element that differs too much. Never passes a NaN. */
void kv_compare(const char *what, size_t n, const float *got, const float *want, double tol, kv_verdict *v);

/* Seeded inputs: normal-like numbers in steps of 2^-20, the same on every machine. */
void kv_fill_normal(uint64_t seed, size_t n, float *x);

#ifdef __cplusplus
}
#endif
#endif
