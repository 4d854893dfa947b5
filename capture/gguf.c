/* gguf.c - reader of the GGUF container. The header (everything before the tensor data) is read into one growing buffer
 * as far as the parser asks for it, so a length that lies costs nothing: `need` compares it with the file first. */
#include "capture/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct kv_gguf {
    char *path;
    int fd; /* -1 when `mem` is the file */
    const uint8_t *mem;
    uint64_t size; /* of the file */
    uint8_t *head; /* bytes 0 .. have-1 */
    size_t have, cap;
    size_t at; /* the parser's place; at <= have */
    kv_gguf_value *value;
    kv_gguf_tensor *tensor;
    uint32_t n_value, n_tensor;
    kv_slice *key, *name; /* of the two tables below */
    kv_strmap keys, names;
};

static const uint8_t value_bytes[KV_GGUF_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

#define BAD(g, ...) kv_gguf_fail(g, KV_EFORMAT, err, __VA_ARGS__)

kv_status kv_gguf_fail(const kv_gguf *g, kv_status st, kv_error *err, const char *fmt, ...)
{
    char msg[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    return kv_fail(err, st, "cannot read model '%s': %s", g->path, msg);
}

static kv_status read_at(const kv_gguf *g, uint64_t at, void *dst, size_t n, kv_error *err)
{
    if (g->mem) {
        memcpy(dst, g->mem + at, n);
        return KV_OK;
    }
    for (size_t done = 0; done < n;) {
        ssize_t r = pread(g->fd, (uint8_t *)dst + done, n - done, (off_t)(at + done));
        if (r < 0 && errno == EINTR) continue;
        if (r < 0) return kv_gguf_fail(g, KV_EIO, err, "%s", strerror(errno));
        if (!r) return kv_gguf_fail(g, KV_EIO, err, "the file became shorter while it was read");
        done += (size_t)r;
    }
    return KV_OK;
}

/* Make bytes at .. at+n-1 available in head. `what` is what would be cut off. */
static kv_status need(kv_gguf *g, uint64_t n, const char *what, kv_error *err)
{
    if (n > g->size - g->at)
        return BAD(g, "%s at byte %zu needs %llu bytes, but the file ends at %llu (truncated?)", what, g->at,
                   (unsigned long long)n, (unsigned long long)g->size);
    if (n > KV_GGUF_HEADER_MAX - g->at)
        return BAD(g, "%s at byte %zu: the metadata is larger than %u bytes", what, g->at, KV_GGUF_HEADER_MAX);
    size_t end = g->at + (size_t)n;
    if (end <= g->have) return KV_OK;
    size_t want = end < 65536 ? 65536 : end + end / 2;
    if (want > g->size) want = (size_t)g->size;
    if (want > g->cap) {
        uint8_t *p = realloc(g->head, want);
        if (!p) return kv_gguf_fail(g, KV_ENOMEM, err, "out of memory for %zu bytes of metadata", want);
        g->head = p, g->cap = want;
    }
    kv_status st = read_at(g, g->have, g->head + g->have, want - g->have, err);
    if (!st) g->have = want;
    return st;
}

static kv_status take_u32(kv_gguf *g, const char *what, uint32_t *out, kv_error *err)
{
    kv_status st = need(g, 4, what, err);
    if (!st) *out = kv_get32(g->head + g->at), g->at += 4;
    return st;
}

static kv_status take_u64(kv_gguf *g, const char *what, uint64_t *out, kv_error *err)
{
    kv_status st = need(g, 8, what, err);
    if (!st) *out = kv_get64(g->head + g->at), g->at += 8;
    return st;
}

/* A string of at most `max` bytes; *start is its place in head (which may still move). */
static kv_status take_string(kv_gguf *g, const char *what, uint32_t max, size_t *start, size_t *n, kv_error *err)
{
    uint64_t len;
    kv_status st = take_u64(g, what, &len, err);
    if (st) return st;
    if (len > max)
        return BAD(g, "%s at byte %zu claims a length of %llu bytes (at most %u)", what, g->at, (unsigned long long)len,
                   max);
    if ((st = need(g, len, what, err))) return st;
    *start = g->at, *n = (size_t)len, g->at += (size_t)len;
    return KV_OK;
}

/* The elements of value v, n of type v->type; checks bools and string lengths. */
static kv_status skip_elements(kv_gguf *g, const kv_gguf_value *v, const char *what, kv_error *err)
{
    kv_status st = KV_OK;
    if (v->type == KV_GGUF_STRING) {
        size_t start, n;
        for (uint32_t i = 0; i < v->n && !st; i++) st = take_string(g, what, KV_GGUF_STRING_MAX, &start, &n, err);
        return st;
    }
    uint64_t bytes = (uint64_t)v->n * value_bytes[v->type]; /* at most 2^24 * 8 */
    if ((st = need(g, bytes, what, err))) return st;
    if (v->type == KV_GGUF_BOOL)
        for (uint32_t i = 0; i < v->n; i++)
            if (g->head[g->at + i] > 1) return BAD(g, "%s: %u is not a boolean", what, g->head[g->at + i]);
    g->at += (size_t)bytes;
    return KV_OK;
}

/* Places in head are kept as numbers while it grows; `open` turns them into pointers. */
static const char *place(size_t at)
{
    return (const char *)(uintptr_t)at;
}

static kv_status take_value(kv_gguf *g, uint32_t i, kv_error *err)
{
    kv_gguf_value *v = &g->value[i];
    char what[160];
    snprintf(what, sizeof what, "metadata key %u", i);
    size_t start = 0, len = 0;
    kv_status st = take_string(g, what, KV_GGUF_KEY_MAX, &start, &len, err);
    if (st) return st;
    if (!len) return BAD(g, "%s is empty", what);
    v->key = (kv_slice){place(start), len};
    const char *key = (const char *)g->head + start;
    if (memchr(key, 0, len)) return BAD(g, "%s '%s' contains a zero byte", what, kv_show(key, len).s);
    snprintf(what, sizeof what, "metadata key '%s'", kv_show(key, len).s);

    if ((st = take_u32(g, what, &v->type, err))) return st;
    if (v->type >= KV_GGUF_TYPES) return BAD(g, "%s has unknown value type %u", what, v->type);
    v->n = 1;
    if (v->type == KV_GGUF_ARRAY) {
        uint64_t n;
        v->array = true;
        if ((st = take_u32(g, what, &v->type, err)) || (st = take_u64(g, what, &n, err))) return st;
        if (v->type == KV_GGUF_ARRAY) return BAD(g, "%s is an array of arrays, which is not supported", what);
        if (v->type >= KV_GGUF_TYPES) return BAD(g, "%s has unknown element type %u", what, v->type);
        if (n > KV_GGUF_ARRAY_MAX)
            return BAD(g, "%s claims %llu elements (at most %u)", what, (unsigned long long)n, KV_GGUF_ARRAY_MAX);
        v->n = (uint32_t)n;
    }
    v->p = (const uint8_t *)place(g->at);
    return skip_elements(g, v, what, err);
}

static kv_status take_tensor(kv_gguf *g, uint32_t i, kv_error *err)
{
    kv_gguf_tensor *t = &g->tensor[i];
    char what[160];
    snprintf(what, sizeof what, "name of tensor %u (behind %u metadata keys)", i, g->n_value);
    size_t start = 0, len = 0;
    kv_status st = take_string(g, what, KV_GGUF_NAME_MAX, &start, &len, err);
    if (st) return st;
    if (!len) return BAD(g, "%s is empty", what);
    t->name = (kv_slice){place(start), len};
    const char *name = (const char *)g->head + start;
    if (memchr(name, 0, len)) return BAD(g, "%s '%s' contains a zero byte", what, kv_show(name, len).s);
    snprintf(what, sizeof what, "tensor '%s'", kv_show(name, len).s);

    if ((st = take_u32(g, what, &t->n_dims, err))) return st;
    if (t->n_dims < 1 || t->n_dims > 4) return BAD(g, "%s has n_dims = %u (1 to 4 are possible)", what, t->n_dims);
    for (uint32_t d = 0; d < 4; d++) {
        t->ne[d] = 1;
        if (d < t->n_dims && (st = take_u64(g, what, &t->ne[d], err))) return st;
        if (t->ne[d] < 1 || t->ne[d] > KV_GGUF_DIM_MAX)
            return BAD(g, "%s: dimension %u is %llu", what, d, (unsigned long long)t->ne[d]);
    }
    uint32_t type;
    if ((st = take_u32(g, what, &type, err)) || (st = take_u64(g, what, &t->offset, err))) return st;
    t->quant = kv_quant_find(type);
    if (!t->quant) return BAD(g, "%s has unknown tensor type %u", what, type);
    if (t->ne[0] % t->quant->block)
        return BAD(g, "%s: rows of %llu elements are not whole blocks of %u (type %s)", what,
                   (unsigned long long)t->ne[0], t->quant->block, t->quant->name);
    t->row_bytes = t->ne[0] / t->quant->block * t->quant->bytes; /* < 2^34 */
    t->n_row = t->ne[1] * t->ne[2];                              /* < 2^62 */
    uint64_t bytes;
    if (__builtin_mul_overflow(t->n_row, t->ne[3], &t->n_row) || __builtin_mul_overflow(t->n_row, t->row_bytes, &bytes))
        return BAD(g, "%s: the size of its dimensions overflows", what);
    if (bytes > g->size)
        return BAD(g, "%s needs %llu bytes of tensor data, but the file has %llu", what, (unsigned long long)bytes,
                   (unsigned long long)g->size);
    return KV_OK;
}

/* Offsets must be the running sum of padded sizes: no gap, no overlap, no aliasing; the end must be in the file. */
static kv_status place_tensors(kv_gguf *g, uint32_t alignment, kv_error *err)
{
    uint64_t mask = alignment - 1, start = (g->at + mask) & ~mask, sum = 0;
    for (uint32_t i = 0; i < g->n_tensor; i++) {
        kv_gguf_tensor *t = &g->tensor[i];
        kv_shown name = kv_show((const char *)g->head + (uintptr_t)t->name.p, t->name.n);
        if (t->offset != sum)
            return BAD(g, "tensor '%s' has offset %llu, but the tensors before it end at %llu", name.s,
                       (unsigned long long)t->offset, (unsigned long long)sum);
        uint64_t bytes = t->n_row * t->row_bytes; /* <= file size; so is sum, before the next addition */
        t->offset += start;
        if (t->offset + bytes > g->size)
            return BAD(g, "tensor data of '%s' ends at byte %llu, but the file at %llu (truncated?)", name.s,
                       (unsigned long long)(t->offset + bytes), (unsigned long long)g->size);
        sum = (sum + bytes + mask) & ~mask;
    }
    return KV_OK;
}

/* Turn places into pointers and build the two tables; duplicates are refused. */
static kv_status index_names(kv_gguf *g, kv_error *err)
{
    kv_status st;
    const char *head = (const char *)g->head;
    if ((st = kv_array(&g->key, g->n_value, sizeof *g->key, err)) ||
        (st = kv_array(&g->name, g->n_tensor, sizeof *g->name, err)) ||
        (st = kv_strmap_init(&g->keys, g->key, g->n_value, err)) ||
        (st = kv_strmap_init(&g->names, g->name, g->n_tensor, err)))
        return st;
    for (uint32_t i = 0; i < g->n_value; i++) {
        kv_gguf_value *v = &g->value[i];
        v->key.p = head + (uintptr_t)v->key.p, v->p = g->head + (uintptr_t)v->p;
        g->key[i] = v->key;
        if (kv_strmap_put(&g->keys, i) != i)
            return BAD(g, "metadata key '%s' occurs twice", kv_show(v->key.p, v->key.n).s);
    }
    for (uint32_t i = 0; i < g->n_tensor; i++) {
        kv_gguf_tensor *t = &g->tensor[i];
        t->name.p = head + (uintptr_t)t->name.p;
        g->name[i] = t->name;
        if (kv_strmap_put(&g->names, i) != i)
            return BAD(g, "tensor '%s' occurs twice", kv_show(t->name.p, t->name.n).s);
    }
    return KV_OK;
}

static kv_status parse(kv_gguf *g, kv_error *err)
{
    uint32_t version = 0, alignment = 32;
    uint64_t n_tensor, n_value;
    if (g->size < 4) return BAD(g, "no magic: the file has %llu bytes", (unsigned long long)g->size);
    kv_status st = need(g, 4, "magic", err);
    if (st) return st;
    if (memcmp(g->head, "GGUF", 4))
        return BAD(g, "bad magic '%s' (not a GGUF file; a model is a GGUF file or a Hugging Face folder)",
                   kv_show((const char *)g->head, 4).s);
    g->at = 4;
    if ((st = take_u32(g, "version", &version, err))) return st;
    if (version && !(version & 0xffff))
        return BAD(g, "version field is byte-swapped: big-endian files are not supported");
    if (version != 2 && version != 3) return BAD(g, "version %u is not supported (2 and 3 are)", version);
    if ((st = take_u64(g, "tensor_count", &n_tensor, err)) || (st = take_u64(g, "metadata_kv_count", &n_value, err)))
        return st;
    /* the smallest entries have 14 (key of one byte, u8) and 33 bytes */
    if ((st = need(g, 14, "metadata", err))) return st;
    uint64_t rest = g->size - g->at;
    if (!n_tensor || n_tensor > KV_GGUF_TENSORS_MAX || n_tensor > rest / 33)
        return BAD(g, "tensor_count is %llu, in %llu bytes (1 to %u are possible)", (unsigned long long)n_tensor,
                   (unsigned long long)rest, KV_GGUF_TENSORS_MAX);
    if (!n_value || n_value > KV_GGUF_KEYS_MAX || n_value > rest / 14)
        return BAD(g, "metadata_kv_count is %llu, in %llu bytes (1 to %u are possible)", (unsigned long long)n_value,
                   (unsigned long long)rest, KV_GGUF_KEYS_MAX);
    if ((st = kv_array(&g->value, n_value, sizeof *g->value, err)) ||
        (st = kv_array(&g->tensor, n_tensor, sizeof *g->tensor, err)))
        return st;

    g->n_value = (uint32_t)n_value, g->n_tensor = (uint32_t)n_tensor;
    for (uint32_t i = 0; i < g->n_value && !st; i++) st = take_value(g, i, err);
    for (uint32_t i = 0; i < g->n_tensor && !st; i++) st = take_tensor(g, i, err);
    if (st) return st;
    for (uint32_t i = 0; i < g->n_value; i++) {
        kv_gguf_value v = g->value[i];
        static const char key[] = "general.alignment";
        if (v.key.n != strlen(key) || memcmp(g->head + (uintptr_t)v.key.p, key, v.key.n)) continue;
        uint64_t a;
        v.p = g->head + (uintptr_t)v.p;
        if (v.array || !kv_gguf_uint(&v, 0, &a)) return BAD(g, "metadata key '%s' is not a count", key);
        if (a < 8 || a > 65536 || (a & (a - 1)))
            return BAD(g, "metadata key '%s' is %llu (powers of two from 8 to 65536 are possible)", key,
                       (unsigned long long)a);
        alignment = (uint32_t)a;
    }
    if ((st = place_tensors(g, alignment, err))) return st;
    return index_names(g, err);
}

static kv_status create(const char *path, kv_gguf **out, kv_error *err)
{
    kv_gguf *g;
    *out = NULL;
    kv_status st = kv_array(&g, 1, sizeof *g, err);
    if (st) return st;
    g->fd = -1;
    /* the end of a very long path is the part that names the file */
    size_t n = strlen(path);
    g->path = kv_format("%s", n > 512 ? path + n - 512 : path);
    if (!g->path) {
        free(g);
        return kv_fail(err, KV_ENOMEM, "out of memory for the path of a model");
    }
    *out = g;
    return KV_OK;
}

static kv_status open_file(kv_gguf *g, const char *path, kv_error *err)
{
    struct stat s;
    g->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not block; regular files do not notice */
    if (g->fd < 0) return kv_fail(err, KV_EIO, "cannot open model '%s': %s", g->path, strerror(errno));
    if (fstat(g->fd, &s)) return kv_fail(err, KV_EIO, "cannot open model '%s': %s", g->path, strerror(errno));
    if (S_ISDIR(s.st_mode)) return kv_fail(err, KV_EUNSUPPORTED, "cannot open model '%s': not a GGUF file", g->path);
    if (!S_ISREG(s.st_mode)) return kv_fail(err, KV_EFORMAT, "cannot open model '%s': not a regular file", g->path);
    g->size = (uint64_t)s.st_size;
    return parse(g, err);
}

kv_status kv_gguf_open(const char *path, kv_gguf **out, kv_error *err)
{
    kv_status st = create(path, out, err);
    if (!st) st = open_file(*out, path, err);
    if (st) kv_gguf_close(*out), *out = NULL;
    return st;
}

kv_status kv_gguf_open_mem(const void *bytes, size_t n, const char *name, kv_gguf **out, kv_error *err)
{
    kv_status st = create(name, out, err);
    if (st) return st;
    (*out)->mem = bytes, (*out)->size = n;
    st = parse(*out, err);
    if (st) kv_gguf_close(*out), *out = NULL;
    return st;
}

void kv_gguf_close(kv_gguf *g)
{
    if (!g) return;
    if (g->fd >= 0) close(g->fd);
    kv_strmap_fini(&g->keys), kv_strmap_fini(&g->names);
    free(g->key), free(g->name), free(g->value), free(g->tensor), free(g->head), free(g->path);
    free(g);
}

const char *kv_gguf_path(const kv_gguf *g)
{
    return g->path;
}

const kv_gguf_value *kv_gguf_find(const kv_gguf *g, const char *key)
{
    uint32_t i = kv_strmap_get(&g->keys, key, strlen(key));
    return i == KV_NONE ? NULL : &g->value[i];
}

const kv_gguf_tensor *kv_gguf_tensor_find(const kv_gguf *g, const char *name)
{
    uint32_t i = kv_strmap_get(&g->names, name, strlen(name));
    return i == KV_NONE ? NULL : &g->tensor[i];
}

uint32_t kv_gguf_tensor_index(const kv_gguf *g, const kv_gguf_tensor *t)
{
    return (uint32_t)(t - g->tensor);
}

const kv_gguf_tensor *kv_gguf_tensors(const kv_gguf *g, uint32_t *n)
{
    *n = g->n_tensor;
    return g->tensor;
}

bool kv_gguf_uint(const kv_gguf_value *v, uint32_t i, uint64_t *out)
{
    if (i >= v->n) return false;
    const uint8_t *p = v->p + (size_t)i * (v->type < KV_GGUF_TYPES ? value_bytes[v->type] : 0);
    int64_t s;
    switch (v->type) {
    case KV_GGUF_U8: *out = *p; return true;
    case KV_GGUF_U16: *out = kv_get16(p); return true;
    case KV_GGUF_U32: *out = kv_get32(p); return true;
    case KV_GGUF_U64: *out = kv_get64(p); return true;
    case KV_GGUF_I8: s = (int8_t)*p; break;
    case KV_GGUF_I16: s = (int16_t)kv_get16(p); break;
    case KV_GGUF_I32: s = (int32_t)kv_get32(p); break;
    case KV_GGUF_I64: s = (int64_t)kv_get64(p); break;
    default: return false;
    }
    *out = (uint64_t)s;
    return s >= 0;
}

bool kv_gguf_float(const kv_gguf_value *v, uint32_t i, double *out)
{
    if (i >= v->n) return false;
    if (v->type == KV_GGUF_F32) {
        uint32_t u = kv_get32(v->p + 4 * (size_t)i);
        float f;
        memcpy(&f, &u, sizeof f);
        *out = f;
        return true;
    }
    if (v->type != KV_GGUF_F64) return false;
    uint64_t u = kv_get64(v->p + 8 * (size_t)i);
    memcpy(out, &u, sizeof *out);
    return true;
}

bool kv_gguf_bool(const kv_gguf_value *v, bool *out)
{
    if (v->array || v->type != KV_GGUF_BOOL) return false;
    *out = *v->p;
    return true;
}

bool kv_gguf_string(const kv_gguf_value *v, kv_slice *out)
{
    if (v->array || v->type != KV_GGUF_STRING) return false;
    *out = (kv_slice){(const char *)v->p + 8, (size_t)kv_get64(v->p)};
    return true;
}

kv_status kv_gguf_strings(const kv_gguf *g, const kv_gguf_value *v, kv_slice **out, kv_error *err)
{
    *out = NULL;
    if (!v->array || v->type != KV_GGUF_STRING)
        return BAD(g, "metadata key '%s' is not an array of strings", kv_show(v->key.p, v->key.n).s);
    kv_status st = kv_array(out, v->n, sizeof **out, err);
    if (st) return st;
    const uint8_t *p = v->p;
    for (uint32_t i = 0; i < v->n; i++) {
        (*out)[i] = (kv_slice){(const char *)p + 8, (size_t)kv_get64(p)};
        p += 8 + (*out)[i].n;
    }
    return KV_OK;
}

kv_status kv_gguf_read_rows(const kv_gguf *g, const kv_gguf_tensor *t, uint64_t row, uint64_t n, void *dst,
                            kv_error *err)
{
    return read_at(g, t->offset + row * t->row_bytes, dst, (size_t)(n * t->row_bytes), err);
}
