/* base.h - what every module needs: status and error text, checked sizes, little-endian loads, half floats,
 * hashes, a seeded generator, files that appear whole or not at all.
 *
 * Everything that can fail returns kv_status (0 = KV_OK) and takes `kv_error *err` last; err may be NULL.
 * Nothing here prints or exits. All functions are safe to call from several threads on different objects. */
#ifndef KV_BASE_H
#define KV_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define KV_VERSION "0.1.0"

typedef enum {
    KV_OK = 0,
    KV_EMISUSE,      /* an argument of the user is wrong: programs exit 2                                   */
    KV_ENOMEM,       /* allocation failed                                                                   */
    KV_EIO,          /* the system refused a read or a write (errno text is in the message)                  */
    KV_EFORMAT,      /* bytes that are not what they claim to be                                             */
    KV_EMISSING,     /* a well-formed file lacks what was asked for (stream, layer, rows, column)            */
    KV_EUNSUPPORTED, /* well-formed, but a feature this program does not have; never wrong numbers instead   */
    KV_EINTERRUPTED, /* stopped by a signal                                                                  */
    KV_STATUS_COUNT
} kv_status;

typedef struct {
    char msg[1024]; /* one line, lower case, no full stop: what failed, the subject quoted, why, what to do */
} kv_error;

/* Fill `err` (NULL allowed) and hand `st` back, so that a failure is one line:
 *     return kv_fail(err, KV_EFORMAT, "cannot read '%s': truncated at byte %zu", path, at);               */
kv_status kv_fail(kv_error *err, kv_status st, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* Products and sums of sizes. False when the result does not fit (then *out is untouched). */
static inline bool kv_mul(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}
static inline bool kv_add(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

/* *out = zeroed array of n elements of `size` bytes (never NULL on KV_OK, also for n = 0); free() it. */
kv_status kv_array(void *out, size_t n, size_t size, kv_error *err);

/* strdup that reports; printf into a fresh string (NULL when out of memory). free() the result. */
char *kv_format(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* --- little-endian loads and stores (any alignment) --- */
static inline uint16_t kv_get16(const void *p)
{
    const uint8_t *b = p;
    return (uint16_t)(b[0] | b[1] << 8);
}
static inline uint32_t kv_get32(const void *p)
{
    const uint8_t *b = p;
    return (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}
static inline uint64_t kv_get64(const void *p)
{
    return (uint64_t)kv_get32(p) | (uint64_t)kv_get32((const uint8_t *)p + 4) << 32;
}
static inline void kv_put16(void *p, uint16_t v)
{
    uint8_t *b = p;
    b[0] = (uint8_t)v, b[1] = (uint8_t)(v >> 8);
}
static inline void kv_put32(void *p, uint32_t v)
{
    kv_put16(p, (uint16_t)v), kv_put16((uint8_t *)p + 2, (uint16_t)(v >> 16));
}
static inline void kv_put64(void *p, uint64_t v)
{
    kv_put32(p, (uint32_t)v), kv_put32((uint8_t *)p + 4, (uint32_t)(v >> 32));
}

/* --- element types of arrays in files --- */
typedef enum { KV_F32 = 0, KV_F16 = 1, KV_BF16 = 2, KV_U8 = 3, KV_U32 = 4, KV_I32 = 5, KV_DTYPE_COUNT } kv_dtype;
size_t kv_dtype_bytes(kv_dtype t);     /* 0 for an unknown type */
const char *kv_dtype_name(kv_dtype t); /* "f32" "f16" "bf16" "u8" "u32" "i32" */
bool kv_dtype_parse(const char *s, kv_dtype *out);

/* IEEE half and bfloat16; rounding is to nearest, ties to even; overflow gives infinity. */
float kv_f16_to_f32(uint16_t h);
uint16_t kv_f32_to_f16(float f);
static inline float kv_bf16_to_f32(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
uint16_t kv_f32_to_bf16(float f);
/* n elements of type `t` (f32, f16 or bf16) to or from float. Encoding to f16 returns false when a finite value
 * overflowed (the data is written as infinity). src and dst must not overlap. */
void kv_decode_f32(kv_dtype t, const void *src, size_t n, float *dst);
bool kv_encode_f32(kv_dtype t, const float *src, size_t n, void *dst);

/* --- hashes --- */
uint32_t kv_crc32(uint32_t crc, const void *p, size_t n); /* CRC-32 (IEEE, as zlib); start with 0 */
typedef struct {
    uint32_t h[8];
    uint64_t n_bytes;
    uint8_t buf[64];
} kv_sha256;
void kv_sha256_init(kv_sha256 *s);
void kv_sha256_update(kv_sha256 *s, const void *p, size_t n);
void kv_sha256_final(kv_sha256 *s, uint8_t out[32]);
void kv_sha256_hex(kv_sha256 *s, char out[65]); /* final, as lower-case hex */
kv_status kv_sha256_file(const char *path, char out[65], kv_error *err);

/* --- seeded generator: splitmix64; equal seeds give equal numbers on every machine --- */
typedef struct {
    uint64_t s;
} kv_rng;
uint64_t kv_rng_next(kv_rng *r);
double kv_rng_unit(kv_rng *r); /* [0, 1) with 53 bits */
double
kv_rng_normal(kv_rng *r); /* standard normal, from the sum of 12 units minus 6 (no libm: equal bits everywhere) */

/* --- files --- */
/* Whole file into a fresh buffer with a zero byte behind it; refuses more than `max` bytes. */
kv_status kv_read_file(const char *path, size_t max, uint8_t **out, size_t *n, kv_error *err);
/* The same for a name that stands in somebody else's folder or file: no pipe that never ends, no device. */
kv_status kv_read_regular(const char *path, size_t max, uint8_t **out, size_t *n, kv_error *err);
/* Write the bytes to PATH.partial, fsync, rename, fsync the folder; a path that is not a regular file
 * (/dev/null, a pipe) is written in place. On failure no file stands under the final name. */
kv_status kv_write_file(const char *path, const void *data, size_t n, kv_error *err);
/* The folder that holds `path`, open to sync or to lock; -1 where that is not possible. The caller closes it. */
int kv_open_folder_of(const char *path);
/* The two halves of it, for writers that stream. `partial` (the temporary name) is malloc'd and is NULL when the
 * target is not a regular file. commit: flush, fsync, close, rename. abandon: close, remove the partial. */
typedef struct {
    FILE *f;
    char *path, *partial;
} kv_outfile;
kv_status kv_outfile_open(const char *path, kv_outfile *o, kv_error *err);
kv_status kv_outfile_commit(kv_outfile *o, kv_error *err);
void kv_outfile_abandon(kv_outfile *o);

/* Seconds of a clock, CLOCK_MONOTONIC or a CPU time. */
double kv_seconds(clockid_t clock);

#endif
