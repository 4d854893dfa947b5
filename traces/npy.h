/* npy.h - NumPy .npy files, versions 1.0 and 2.0, C order, little-endian.
 * Reading checks the header against the file's size before it allocates. */
#ifndef KV_NPY_H
#define KV_NPY_H

#include "traces/base.h"

#define KV_NPY_RANK_MAX 6

typedef struct {
    char kind;     /* 'f' float, 'i' signed, 'u' unsigned, 'b' bool (as NumPy's dtype.kind); arrays.h: 'B' bfloat16 */
    uint32_t size; /* bytes per element: f 2|4|8, i 1|2|4|8, u 1|2|4|8, b 1 */
    uint32_t rank; /* 0..KV_NPY_RANK_MAX */
    size_t shape[KV_NPY_RANK_MAX];
    size_t n;   /* product of shape */
    void *data; /* n * size bytes; owned, freed by kv_npy_free */
} kv_npy;

kv_status kv_npy_read(const char *path, kv_npy *out, kv_error *err);
kv_status kv_npy_parse(const void *bytes, size_t n_bytes, const char *name, kv_npy *out, kv_error *err); /* copies */
/* A .npy file inside another file: bytes at .. at+n-1 of f; `name` stands for it in messages. crc NULL, or the CRC-32
 * that they must have. */
kv_status kv_npy_read_part(FILE *f, uint64_t at, uint64_t n, const char *name, const uint32_t *crc, kv_npy *out,
                           kv_error *err);
/* Convert in place to float32 (from f2/f4/f8, bfloat16 or any integer kind). */
kv_status kv_npy_to_f32(kv_npy *a, kv_error *err);
/* dtype as NumPy spells it: "<f4" "<f2" "|u1" "<i4" "<u4" "<i8" "<f8". Atomic (kv_write_file). */
kv_status kv_npy_write(const char *path, const char *descr, uint32_t rank, const size_t *shape, const void *data,
                       kv_error *err);
/* The header only, into an open file: the caller then writes the elements itself, for arrays larger than memory. */
kv_status kv_npy_begin(kv_outfile *o, const char *descr, uint32_t rank, const size_t *shape, kv_error *err);
void kv_npy_free(kv_npy *a);

#endif
