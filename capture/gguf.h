/* gguf.h - GGUF files, versions 2 and 3, little-endian: metadata and tensor directory checked whole at open, tensor
 * bytes read on demand.
 *
 *   u32 magic "GGUF" ; u32 version ; u64 tensor_count ; u64 metadata_kv_count
 *   metadata_kv_count x { string key ; u32 type ; value }
 *   tensor_count x { string name ; u32 n_dims ; u64 ne[n_dims] ; u32 type ; u64 offset }      ne[0] is contiguous
 *   padding to general.alignment ; tensor data, in order, each padded to the alignment
 *
 * Nothing is believed before it is compared with the bytes that are there: every length with what remains of the file,
 * every product with overflow detection, every tensor's end with the file's size. The file is read with pread, not
 * mapped: another process that truncates it meanwhile causes an error, not a signal.
 *
 * A kv_gguf does not change after it is opened and may be shared between threads. Error messages name the file and the
 * key, field or tensor. */
#ifndef KV_GGUF_H
#define KV_GGUF_H

#include "kernels/quant.h"
#include "traces/base.h"
#include "capture/strmap.h"

#define KV_GGUF_KEYS_MAX    (1u << 16)
#define KV_GGUF_TENSORS_MAX (1u << 16)
#define KV_GGUF_KEY_MAX     (1u << 16)   /* bytes of a key */
#define KV_GGUF_NAME_MAX    64u          /* bytes of a tensor name */
#define KV_GGUF_STRING_MAX  (64u << 20)  /* bytes of a string value */
#define KV_GGUF_ARRAY_MAX   (1u << 24)   /* elements of an array */
#define KV_GGUF_HEADER_MAX  (128u << 20) /* bytes before the tensor data */
#define KV_GGUF_DIM_MAX     0x7fffffffu

enum {
    KV_GGUF_U8,
    KV_GGUF_I8,
    KV_GGUF_U16,
    KV_GGUF_I16,
    KV_GGUF_U32,
    KV_GGUF_I32,
    KV_GGUF_F32,
    KV_GGUF_BOOL,
    KV_GGUF_STRING,
    KV_GGUF_ARRAY,
    KV_GGUF_U64,
    KV_GGUF_I64,
    KV_GGUF_F64,
    KV_GGUF_TYPES
};

typedef struct {
    kv_slice key;
    uint32_t type; /* KV_GGUF_* of the value, or of the elements of an array */
    bool array;
    uint32_t n;       /* elements; 1 when not an array */
    const uint8_t *p; /* first element, in file layout */
} kv_gguf_value;

typedef struct {
    kv_slice name;
    const kv_quant *quant;
    uint32_t n_dims;
    uint64_t ne[4];     /* missing dimensions are 1; 1 .. KV_GGUF_DIM_MAX */
    uint64_t row_bytes; /* of ne[0] elements */
    uint64_t n_row;     /* ne[1] * ne[2] * ne[3] */
    uint64_t offset;    /* from the start of the file */
} kv_gguf_tensor;

typedef struct kv_gguf kv_gguf;

kv_status kv_gguf_open(const char *path, kv_gguf **out, kv_error *err);
/* The same from bytes in memory (borrowed until close). `name` stands for the file in messages. */
kv_status kv_gguf_open_mem(const void *bytes, size_t n, const char *name, kv_gguf **out, kv_error *err);
void kv_gguf_close(kv_gguf *g);
const char *kv_gguf_path(const kv_gguf *g);
/* kv_fail with "cannot read model 'PATH': " in front. */
kv_status kv_gguf_fail(const kv_gguf *g, kv_status st, kv_error *err, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* NULL when there is none. */
const kv_gguf_value *kv_gguf_find(const kv_gguf *g, const char *key);
const kv_gguf_tensor *kv_gguf_tensor_find(const kv_gguf *g, const char *name);
uint32_t kv_gguf_tensor_index(const kv_gguf *g, const kv_gguf_tensor *t);
const kv_gguf_tensor *kv_gguf_tensors(const kv_gguf *g, uint32_t *n);

/* Element i of a value (0 for a scalar). False when the type is another or the number does not fit. */
bool kv_gguf_uint(const kv_gguf_value *v, uint32_t i, uint64_t *out); /* any integer type, not negative */
bool kv_gguf_float(const kv_gguf_value *v, uint32_t i, double *out);  /* f32, f64 */
bool kv_gguf_bool(const kv_gguf_value *v, bool *out);
bool kv_gguf_string(const kv_gguf_value *v, kv_slice *out); /* a scalar string */
/* All strings of an array of strings as slices into the file's header; free() the array. KV_EFORMAT when it is not one.
 */
kv_status kv_gguf_strings(const kv_gguf *g, const kv_gguf_value *v, kv_slice **out, kv_error *err);

/* Rows row .. row+n-1 of a tensor, as stored. The range must be inside the tensor. */
kv_status kv_gguf_read_rows(const kv_gguf *g, const kv_gguf_tensor *t, uint64_t row, uint64_t n, void *dst,
                            kv_error *err);

#endif
