/* arrays.c - one array out of .npy, .npz and safetensors files (arrays.h). */
#include "traces/arrays.h"
#include "traces/json.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <zlib.h>

#define TAIL_MAX      (22u + 65535u) /* a zip's end record and the longest comment */
#define DIRECTORY_MAX (64u << 20)
#define MEMBERS_MAX   65536u
#define DEFLATE_MAX   1032u /* deflate makes at most this many bytes of one */
#define HEADER_MAX    (100u << 20)
#define VALUES_MAX    (2u << 20) /* in a header */

/* An open container and what is looked for in it. */
typedef struct {
    const char *spec, *path, *name; /* name: NULL = the only one */
    FILE *f;
    uint64_t size;
    char seen[300]; /* the names that there are, for the message */
    uint32_t n_seen;
    kv_error *err;
} source;

#define BAD(s, ...) bad(s, KV_EFORMAT, __VA_ARGS__)

static kv_status __attribute__((format(printf, 3, 4))) bad(const source *s, kv_status st, const char *fmt, ...)
{
    char text[300];
    va_list a;
    va_start(a, fmt);
    vsnprintf(text, sizeof text, fmt, a);
    va_end(a);
    return kv_fail(s->err, st, "cannot read array '%s': %s", s->spec, text);
}

static kv_status read_at(const source *s, uint64_t at, void *dst, size_t n)
{
    if (at > s->size || n > s->size - at) return BAD(s, "truncated at byte %llu", (unsigned long long)at);
    if (fseeko(s->f, (off_t)at, SEEK_SET) || fread(dst, 1, n, s->f) != n)
        return bad(s, KV_EIO, "%s", ferror(s->f) ? strerror(errno) : "it became shorter");
    return KV_OK;
}

/* Note a name; true when it is the one that is wanted. `n` bytes, of which `end` go for ".npy". */
static bool wanted(source *s, const char *name, size_t n)
{
    char shown[64];
    size_t k = 0, len = strlen(s->seen);
    for (; k < n && k < sizeof shown - 1; k++) shown[k] = name[k] >= 0x20 && name[k] < 0x7f ? name[k] : '?';
    shown[k] = 0;
    if (len + k + 8 < sizeof s->seen)
        snprintf(s->seen + len, sizeof s->seen - len, "%s%s", len ? " " : "", shown);
    else if (s->n_seen < UINT32_MAX / 2 && strcmp(s->seen + len - 3, "..."))
        snprintf(s->seen + len, sizeof s->seen - len, " ...");
    s->n_seen++;
    return s->name ? strlen(s->name) == n && !memcmp(s->name, name, n) : true;
}

static kv_status not_there(const source *s)
{
    if (!s->n_seen) return bad(s, KV_EMISSING, "the file holds no arrays");
    if (!s->name) return bad(s, KV_EMISUSE, "the file holds several arrays: give FILE:NAME, NAME one of %s", s->seen);
    return bad(s, KV_EMISSING, "no array '%s' in the file; it has %s", s->name, s->seen);
}

/* ------------------------------------------------------------------------------------------------ zip */

typedef struct {
    uint64_t at, packed, raw;
    uint32_t crc;
    uint16_t method, flags;
} member;

/* Where the directory is: the end record, or the 64-bit one in front of it. */
static kv_status find_directory(const source *s, uint64_t *at, uint64_t *bytes)
{
    size_t n = s->size < TAIL_MAX ? (size_t)s->size : TAIL_MAX, i;
    uint8_t *tail = NULL, *e;
    kv_status st = kv_array(&tail, n, 1, s->err);
    if (!st) st = read_at(s, s->size - n, tail, n);
    if (st) goto out;
    for (i = n - 22; n >= 22; i--) { /* the comment may hold anything: its length must fit */
        e = tail + i;
        if (kv_get32(e) == 0x06054b50 && i + 22 + kv_get16(e + 20) == n) break;
        if (!i) break;
    }
    if (n < 22 || kv_get32(tail + i) != 0x06054b50) {
        st = BAD(s, "not a whole .npz file: no end record (truncated?)");
        goto out;
    }
    e = tail + i;
    *bytes = kv_get32(e + 12), *at = kv_get32(e + 16);
    if ((*bytes == UINT32_MAX || *at == UINT32_MAX || kv_get16(e + 10) == 0xffff) && i >= 20 &&
        kv_get32(e - 20) == 0x07064b50) {
        uint8_t big[56];
        if ((st = read_at(s, kv_get64(e - 12), big, sizeof big))) goto out;
        if (kv_get32(big) != 0x06064b50) {
            st = BAD(s, "bad 64-bit end record of the .npz file");
            goto out;
        }
        *bytes = kv_get64(big + 40), *at = kv_get64(big + 48);
    }
    if (*bytes > DIRECTORY_MAX || *at > s->size || *bytes > s->size - *at)
        st = BAD(s, "the directory of the .npz file lies outside it");
out:
    free(tail);
    return st;
}

/* The 64-bit values of a directory entry, in place of those that do not fit. */
static bool widen(const uint8_t *extra, size_t n, member *m)
{
    while (n >= 4) {
        size_t len = kv_get16(extra + 2);
        if (len > n - 4) return false;
        if (kv_get16(extra) == 1) {
            const uint8_t *p = extra + 4;
            uint64_t *to[3] = {&m->raw, &m->packed, &m->at};
            for (int i = 0; i < 3; i++) {
                if (*to[i] != UINT32_MAX) continue;
                if (len < 8) return false;
                *to[i] = kv_get64(p), p += 8, len -= 8;
            }
            return true;
        }
        extra += 4 + len, n -= 4 + len;
    }
    return true;
}

/* The member NAME.npy (or NAME), or the only one. */
static kv_status find_member(source *s, member *m)
{
    uint64_t at = 0, bytes = 0, found = 0;
    uint8_t *dir = NULL;
    kv_status st = find_directory(s, &at, &bytes);
    if (!st) st = kv_array(&dir, (size_t)bytes, 1, s->err);
    if (!st) st = read_at(s, at, dir, (size_t)bytes);
    for (size_t i = 0; !st && i < bytes;) {
        const uint8_t *e = dir + i;
        if (bytes - i < 46 || kv_get32(e) != 0x02014b50) {
            st = BAD(s, "bad entry in the directory of the .npz file");
            break;
        }
        size_t name = kv_get16(e + 28), extra = kv_get16(e + 30), comment = kv_get16(e + 32);
        if (bytes - i - 46 < name + extra + comment || s->n_seen == MEMBERS_MAX) {
            st = BAD(s, "the directory of the .npz file is cut off, or has more than %u entries", MEMBERS_MAX);
            break;
        }
        size_t shown = name > 4 && !memcmp(e + 46 + name - 4, ".npy", 4) ? name - 4 : name;
        if (wanted(s, (const char *)e + 46, shown)) {
            *m = (member){kv_get32(e + 42), kv_get32(e + 20), kv_get32(e + 24),
                          kv_get32(e + 16), kv_get16(e + 10), kv_get16(e + 8)};
            if (!widen(e + 46 + name, extra, m)) st = BAD(s, "bad 64-bit sizes in the directory of the .npz file");
            found++;
        }
        i += 46 + name + extra + comment;
    }
    free(dir);
    if (!st && found != 1) st = found && s->name ? BAD(s, "the .npz file has that name more than once") : not_there(s);
    return st;
}

static kv_status inflate_member(const source *s, const member *m, uint64_t at, kv_npy *out)
{
    uint8_t *packed = NULL, *raw = NULL;
    z_stream z = {.zalloc = NULL};
    kv_status st;
    if (m->raw / DEFLATE_MAX > m->packed + 64) return BAD(s, "it claims to be larger than it can be");
    if ((st = kv_array(&packed, (size_t)m->packed, 1, s->err)) || (st = kv_array(&raw, (size_t)m->raw, 1, s->err)) ||
        (st = read_at(s, at, packed, (size_t)m->packed)))
        goto out;
    if (inflateInit2(&z, -MAX_WBITS) != Z_OK) {
        st = bad(s, KV_ENOMEM, "out of memory");
        goto out;
    }
    uint64_t in = 0, done = 0;
    int rc = Z_OK;
    while (rc == Z_OK) { /* zlib counts in 32 bits */
        enum { STEP = 1 << 30 };
        z.next_in = packed + in, z.avail_in = (uInt)(m->packed - in < STEP ? m->packed - in : STEP);
        z.next_out = raw + done, z.avail_out = (uInt)(m->raw - done < STEP ? m->raw - done : STEP);
        uInt have_in = z.avail_in, have_out = z.avail_out;
        rc = inflate(&z, Z_NO_FLUSH);
        in += have_in - z.avail_in, done += have_out - z.avail_out;
        if (rc == Z_OK && have_in == z.avail_in && have_out == z.avail_out) rc = Z_BUF_ERROR;
    }
    inflateEnd(&z);
    if (rc != Z_STREAM_END || done != m->raw || in != m->packed || kv_crc32(0, raw, (size_t)m->raw) != m->crc)
        st = BAD(s, "damaged: the compressed bytes are not what the directory says");
    else
        st = kv_npy_parse(raw, (size_t)m->raw, s->spec, out, s->err);
out:
    free(packed), free(raw);
    return st;
}

static kv_status load_npz(source *s, kv_npy *out)
{
    member m;
    uint8_t local[30];
    kv_status st = find_member(s, &m);
    if (st) return st;
    if (m.flags & 1) return bad(s, KV_EUNSUPPORTED, "it is encrypted");
    if ((st = read_at(s, m.at, local, sizeof local))) return st;
    uint64_t at = m.at + 30 + kv_get16(local + 26) + kv_get16(local + 28);
    if (kv_get32(local) != 0x04034b50 || at > s->size || m.packed > s->size - at)
        return BAD(s, "the .npz file has no such member where its directory says");
    if (m.method == 8) return inflate_member(s, &m, at, out);
    if (m.method) return bad(s, KV_EUNSUPPORTED, "compression method %u (stored and deflate are read)", m.method);
    if (m.raw != m.packed) return BAD(s, "a stored member of two sizes");
    return kv_npy_read_part(s->f, at, m.raw, s->spec, &m.crc, out, s->err);
}

/* ------------------------------------------------------------------------------------------------ safetensors */

static kv_status read_tensor(const source *s, const json_t *t, uint64_t data, kv_npy *out)
{
    static const struct {
        const char *name;
        char kind;
        uint32_t size;
    } types[] = {{"F32", 'f', 4}, {"F16", 'f', 2}, {"BF16", 'B', 2}, {"F64", 'f', 8}};
    const char *dtype = json_string_value(json_object_get(t, "dtype"));
    const json_t *shape = json_object_get(t, "shape"), *range = json_object_get(t, "data_offsets");
    json_int_t a = json_integer_value(json_array_get(range, 0)), b = json_integer_value(json_array_get(range, 1));
    size_t i = 0, bytes;
    while (i < 4 && (!dtype || strcmp(dtype, types[i].name))) i++;
    if (i == 4) return bad(s, KV_EUNSUPPORTED, "dtype '%.20s' (F16, BF16, F32 and F64 are read)", dtype ? dtype : "?");
    out->kind = types[i].kind, out->size = types[i].size, out->n = 1;
    out->rank = (uint32_t)json_array_size(shape);
    if (!json_is_array(shape) || json_array_size(shape) > KV_NPY_RANK_MAX)
        return BAD(s, "no shape of at most %d axes", KV_NPY_RANK_MAX);
    for (uint32_t k = 0; k < out->rank; k++) {
        const json_t *d = json_array_get(shape, k);
        if (!json_is_integer(d) || json_integer_value(d) < 1) return BAD(s, "axis %u of its shape is not 1 or more", k);
        out->shape[k] = (size_t)json_integer_value(d);
        if (!kv_mul(out->n, out->shape[k], &out->n)) return BAD(s, "its shape overflows");
    }
    if (json_array_size(range) != 2 || a < 0 || b < a || (uint64_t)b > s->size - data ||
        !kv_mul(out->n, out->size, &bytes) || bytes != (uint64_t)(b - a))
        return BAD(s, "data_offsets do not fit its shape or leave the file");
    kv_status st = kv_array(&out->data, bytes, 1, s->err);
    return st ? st : read_at(s, data + (uint64_t)a, out->data, bytes);
}

static kv_status load_safetensors(source *s, kv_npy *out)
{
    uint8_t len[8];
    char *text = NULL;
    json_t *head = NULL, *t, *found = NULL;
    json_error_t why;
    const char *name;
    kv_status st = read_at(s, 0, len, 8);
    uint64_t n = kv_get64(len);
    if (st) return st;
    if (n > HEADER_MAX || n > s->size - 8) return BAD(s, "header length %llu", (unsigned long long)n);
    if ((st = kv_array(&text, (size_t)n, 1, s->err)) || (st = read_at(s, 8, text, (size_t)n))) goto out;
    if (!(head = kv_json_load(text, (size_t)n, JSON_REJECT_DUPLICATES, VALUES_MAX, &why)) || !json_is_object(head)) {
        st = BAD(s, "bad safetensors header: %s", head ? "not an object" : why.text);
        goto out;
    }
    json_object_foreach(head, name, t)
    {
        if (strcmp(name, "__metadata__") && wanted(s, name, strlen(name))) found = t;
    }
    st = found && (s->name || s->n_seen == 1) ? read_tensor(s, found, 8 + n, out) : not_there(s);
out:
    json_decref(head);
    free(text);
    return st;
}

/* ------------------------------------------------------------------------------------------------ which one */

static kv_status load(source *s, kv_npy *out)
{
    uint8_t first[9];
    off_t end = fseeko(s->f, 0, SEEK_END) ? -1 : ftello(s->f);
    s->size = end > 0 ? (uint64_t)end : 0;
    /* a pipe can only be a .npy file, read from the front */
    if (end < 0 && !s->name) return kv_npy_read(s->path, out, s->err);
    size_t n = s->size < sizeof first ? (size_t)s->size : sizeof first;
    kv_status st = read_at(s, 0, first, n);
    if (st) return st;
    if (n >= 4 && (!memcmp(first, "PK\3\4", 4) || !memcmp(first, "PK\5\6", 4))) return load_npz(s, out);
    if (n == 9 && first[8] == '{' && memcmp(first, "\x93NUMPY", 6)) return load_safetensors(s, out);
    if (s->name)
        return bad(s, KV_EMISUSE, "'%s' is neither an .npz nor a safetensors file, so it has no names", s->path);
    return kv_npy_read_part(s->f, 0, s->size, s->spec, NULL, out, s->err);
}

kv_status kv_array_load(const char *spec, kv_npy *out, kv_error *err)
{
    source s = {.spec = spec, .path = spec, .err = err};
    const char *colon = strrchr(spec, ':');
    char *path = NULL;
    memset(out, 0, sizeof *out);
    if (!(s.f = fopen(spec, "rbe")) && errno == ENOENT && colon && colon > spec) {
        if (!(path = kv_format("%.*s", (int)(colon - spec), spec))) return kv_fail(err, KV_ENOMEM, "out of memory");
        s.path = path, s.name = colon + 1;
        s.f = fopen(path, "rbe");
    }
    kv_status st = s.f ? load(&s, out) : kv_fail(err, KV_EIO, "cannot read array '%s': %s", spec, strerror(errno));
    if (s.f) fclose(s.f);
    free(path);
    if (st) kv_npy_free(out);
    return st;
}
