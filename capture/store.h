/* store.h - the tensors of a model's file or files under one roof, whatever the container: names, types, shapes,
 * places. Filled by the GGUF and safetensors readers, which have compared every tensor's extent with its file; read
 * with pread, so that another process that truncates a file causes an error, not a signal. Does not change after
 * kv_store_index and may then be read by several threads. */
#ifndef KV_STORE_H
#define KV_STORE_H

#include "kernels/quant.h"
#include "traces/base.h"
#include "capture/strmap.h"

#define KV_STORE_TENSORS_MAX (1u << 17)

typedef struct {
    kv_slice name; /* zero-terminated */
    const kv_quant *quant;
    uint32_t n_dims;
    uint64_t ne[4]; /* contiguous dimension first; missing dimensions are 1 */
    uint64_t row_bytes, n_row;
    uint64_t offset; /* in its file */
    uint32_t file;
} kv_stored;

typedef struct kv_store kv_store;

/* path: the model as the user named it, for messages. */
kv_status kv_store_create(const char *path, kv_store **out, kv_error *err);
void kv_store_close(kv_store *s);
const char *kv_store_path(const kv_store *s);
/* kv_fail with "cannot read model 'PATH': " in front. */
kv_status kv_store_fail(const kv_store *s, kv_status st, kv_error *err, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* A further file, by name (opened again for this store); *file is its number. */
kv_status kv_store_file(kv_store *s, const char *path, uint32_t *file, kv_error *err);
kv_status kv_store_add(kv_store *s, const kv_stored *t, kv_error *err); /* the name is copied */
kv_status kv_store_index(kv_store *s, kv_error *err);                   /* KV_EFORMAT when a name occurs twice */

uint32_t kv_store_count(const kv_store *s);
const kv_stored *kv_store_at(const kv_store *s, uint32_t i);
uint32_t kv_store_find(const kv_store *s, const char *name); /* KV_NONE when absent */
uint32_t kv_store_files(const kv_store *s);
const char *kv_store_file_path(const kv_store *s, uint32_t file);
/* Bytes at .. at+n-1 of a file. */
kv_status kv_store_read_file(const kv_store *s, uint32_t file, uint64_t at, size_t n, void *dst, kv_error *err);
/* Bytes at .. at+n-1 of the data of tensor i, which must be inside it. */
kv_status kv_store_read(const kv_store *s, uint32_t i, uint64_t at, size_t n, void *dst, kv_error *err);

#endif
