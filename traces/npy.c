/* npy.c - NumPy .npy files (npy.h). The header is a Python literal; only the three keys NumPy writes are understood. */
#include "traces/npy.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>

#define HEADER_MAX (1u << 20)

typedef struct {
    const char *p, *end;
} text;

static void skip(text *t)
{
    while (t->p < t->end && isspace((unsigned char)*t->p)) t->p++;
}

static bool eat(text *t, char c)
{
    skip(t);
    return t->p < t->end && *t->p == c ? (t->p++, true) : false;
}

/* 'abc' or "abc" into s, at most n-1 characters. */
static bool quoted(text *t, char *s, size_t n)
{
    skip(t);
    if (t->p >= t->end || (*t->p != '\'' && *t->p != '"')) return false;
    char q = *t->p++;
    size_t k = 0;
    while (t->p < t->end && *t->p != q) {
        if (k + 1 >= n) return false;
        s[k++] = *t->p++;
    }
    s[k] = 0;
    return t->p++ < t->end;
}

static bool word(text *t, const char *w)
{
    size_t n = strlen(w);
    skip(t);
    return (size_t)(t->end - t->p) >= n && !memcmp(t->p, w, n) ? (t->p += n, true) : false;
}

static bool number(text *t, size_t *out)
{
    size_t v = 0, digits = 0;
    skip(t);
    for (; t->p < t->end && isdigit((unsigned char)*t->p); t->p++, digits++)
        if (!kv_mul(v, 10, &v) || !kv_add(v, (size_t)(*t->p - '0'), &v)) return false;
    return *out = v, digits > 0;
}

static kv_status parse_descr(const char *d, const char *name, kv_npy *a, kv_error *err)
{
    char order = d[0], kind = order ? d[1] : 0;
    text t = {kind ? d + 2 : d, d + strlen(d)};
    size_t size = 0;
    bool known = strchr("<>=|", order) && number(&t, &size) && t.p == t.end &&
                 ((kind == 'f' && (size == 2 || size == 4 || size == 8)) || (kind == 'b' && size == 1) ||
                  ((kind == 'i' || kind == 'u') && (size == 1 || size == 2 || size == 4 || size == 8)));
    if (!known)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "cannot read array '%s': element type '%s' (only floats, integers and booleans are read)", name,
                       d);
    if (order == '>' && size > 1)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "cannot read array '%s': element type '%s' is big-endian; save it with "
                       "astype(a.dtype.newbyteorder('<'))",
                       name, d);
    a->kind = kind, a->size = (uint32_t)size;
    return KV_OK;
}

static bool parse_shape(text *t, kv_npy *a)
{
    a->rank = 0, a->n = 1;
    if (!eat(t, '(')) return false;
    while (!eat(t, ')')) {
        size_t v;
        if (a->rank == KV_NPY_RANK_MAX || !number(t, &v)) return false;
        a->shape[a->rank++] = v;
        if (!kv_mul(a->n, v, &a->n)) return false;
        if (!eat(t, ',')) {
            /* (3) is an int in Python, not a shape */
            if (a->rank < 2 || !eat(t, ')')) return false;
            break;
        }
    }
    /* A zero hides an overflow of the other dimensions; refuse those too, others multiply them again. */
    size_t all = 1;
    for (uint32_t i = 0; i < a->rank; i++)
        if (a->shape[i] && !kv_mul(all, a->shape[i], &all)) return false;
    return true;
}

static kv_status parse_header(const char *h, size_t n, const char *name, kv_npy *a, kv_error *err)
{
    text t = {h, h + n};
    char key[16], descr[32];
    bool got_descr = false, got_order = false, got_shape = false, fortran = false;
    if (!eat(&t, '{')) goto bad;
    while (!eat(&t, '}')) {
        if (!quoted(&t, key, sizeof key) || !eat(&t, ':')) goto bad;
        if (!strcmp(key, "descr") && !got_descr) {
            skip(&t);
            if (t.p < t.end && *t.p == '[')
                return kv_fail(err, KV_EUNSUPPORTED, "cannot read array '%s': it is a record array; save plain numbers",
                               name);
            if (!quoted(&t, descr, sizeof descr)) goto bad;
            kv_status st = parse_descr(descr, name, a, err);
            if (st) return st;
            got_descr = true;
        } else if (!strcmp(key, "fortran_order") && !got_order) {
            fortran = word(&t, "True");
            if (!fortran && !word(&t, "False")) goto bad;
            got_order = true;
        } else if (!strcmp(key, "shape") && !got_shape) {
            if (!parse_shape(&t, a)) goto bad;
            got_shape = true;
        } else {
            goto bad;
        }
        if (!eat(&t, ',')) {
            if (!eat(&t, '}')) goto bad;
            break;
        }
    }
    skip(&t);
    if (t.p != t.end || !got_descr || !got_order || !got_shape) goto bad;
    if (fortran && a->rank > 1)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "cannot read array '%s': column-major order; save it with np.ascontiguousarray", name);
    return KV_OK;
bad:
    return kv_fail(err, KV_EFORMAT, "cannot read array '%s': bad .npy header near byte %zu", name,
                   (size_t)(t.p - h) + 10);
}

/* The fixed part: magic, version, length of the header. *at = where the header starts. */
static kv_status parse_magic(const uint8_t *b, size_t n, const char *name, size_t *at, size_t *len, kv_error *err)
{
    if (n < 10 || memcmp(b, "\x93NUMPY", 6))
        return kv_fail(err, KV_EFORMAT, "cannot read array '%s': not a .npy file", name);
    if ((b[6] != 1 && b[6] != 2) || b[7] != 0)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot read array '%s': .npy version %u.%u (1.0 and 2.0 are read)", name,
                       b[6], b[7]);
    if (b[6] == 2 && n < 12) return kv_fail(err, KV_EFORMAT, "cannot read array '%s': truncated header", name);
    *at = b[6] == 1 ? 10 : 12;
    *len = b[6] == 1 ? kv_get16(b + 8) : kv_get32(b + 8);
    if (*len > HEADER_MAX) return kv_fail(err, KV_EFORMAT, "cannot read array '%s': header of %zu bytes", name, *len);
    return KV_OK;
}

static kv_status check_size(const kv_npy *a, const char *name, uint64_t have, size_t *bytes, kv_error *err)
{
    if (!kv_mul(a->n, a->size, bytes) || *bytes != have)
        return kv_fail(err, KV_EFORMAT,
                       "cannot read array '%s': shape and type ask for %zu elements of %u bytes, the file has %llu "
                       "bytes of data",
                       name, a->n, a->size, (unsigned long long)have);
    return KV_OK;
}

kv_status kv_npy_parse(const void *bytes, size_t n_bytes, const char *name, kv_npy *out, kv_error *err)
{
    kv_status st = KV_OK;
    const uint8_t *b = bytes;
    size_t at = 0, len = 0, size = 0;
    memset(out, 0, sizeof *out);
    if ((st = parse_magic(b, n_bytes, name, &at, &len, err))) goto out;
    if (len > n_bytes - at) {
        st = kv_fail(err, KV_EFORMAT, "cannot read array '%s': truncated header", name);
        goto out;
    }
    if ((st = parse_header((const char *)b + at, len, name, out, err))) goto out;
    if ((st = check_size(out, name, n_bytes - at - len, &size, err))) goto out;
    if ((st = kv_array(&out->data, size, 1, err))) goto out;
    if (size) memcpy(out->data, b + at + len, size);
out:
    if (st) kv_npy_free(out);
    return st;
}

kv_status kv_npy_read_part(FILE *f, uint64_t from, uint64_t n, const char *name, const uint32_t *crc, kv_npy *out,
                           kv_error *err)
{
    kv_status st = KV_OK;
    uint8_t fixed[12];
    char *head = NULL;
    size_t at = 0, len = 0, size = 0, got;
    uint32_t sum = 0;
    memset(out, 0, sizeof *out);
    if (fseeko(f, (off_t)from, SEEK_SET)) goto io;
    got = fread(fixed, 1, n < sizeof fixed ? (size_t)n : sizeof fixed, f);
    if (ferror(f)) goto io;
    if ((st = parse_magic(fixed, got, name, &at, &len, err))) goto out;
    if (at + len > n) {
        st = kv_fail(err, KV_EFORMAT, "cannot read array '%s': truncated header", name);
        goto out;
    }
    if ((st = kv_array(&head, len, 1, err))) goto out;
    if (fseeko(f, (off_t)(from + at), SEEK_SET) || fread(head, 1, len, f) != len) goto io;
    if ((st = parse_header(head, len, name, out, err))) goto out;
    if ((st = check_size(out, name, n - at - len, &size, err))) goto out;
    if ((st = kv_array(&out->data, size, 1, err))) goto out;
    if (fread(out->data, 1, size, f) != size) goto io;
    if (crc) {
        sum = kv_crc32(kv_crc32(kv_crc32(0, fixed, at), head, len), out->data, size);
        if (sum != *crc) st = kv_fail(err, KV_EFORMAT, "cannot read array '%s': its bytes have another checksum", name);
    }
    goto out;
io:
    st = kv_fail(err, KV_EIO, "cannot read array '%s': %s", name, ferror(f) ? strerror(errno) : "it became shorter");
out:
    free(head);
    if (st) kv_npy_free(out);
    return st;
}

/* Regular files are read straight into place; anything else (a pipe) is collected first. */
kv_status kv_npy_read(const char *path, kv_npy *out, kv_error *err)
{
    kv_status st = KV_OK;
    uint8_t *all = NULL;
    FILE *f = fopen(path, "rbe");
    memset(out, 0, sizeof *out);
    if (!f) return kv_fail(err, KV_EIO, "cannot read array '%s': %s", path, strerror(errno));
    off_t end = fseeko(f, 0, SEEK_END) ? -1 : ftello(f);
    if (end < 0) {
        size_t n = 0;
        if (!(st = kv_read_file(path, SIZE_MAX / 2, &all, &n, err))) st = kv_npy_parse(all, n, path, out, err);
    } else {
        st = kv_npy_read_part(f, 0, (uint64_t)end, path, NULL, out, err);
    }
    fclose(f);
    free(all);
    return st;
}

static float element(const kv_npy *a, size_t i)
{
    const uint8_t *p = (const uint8_t *)a->data + i * a->size;
    uint64_t u = a->size == 1 ? *p : a->size == 2 ? kv_get16(p) : a->size == 4 ? kv_get32(p) : kv_get64(p);
    if (a->kind == 'f') {
        double d;
        memcpy(&d, &u, 8);
        return (float)d; /* f8: the other two are converted in bulk */
    }
    if (a->kind == 'b') return u != 0;
    if (a->kind == 'i') {
        int shift = 64 - 8 * (int)a->size;
        return (float)((int64_t)(u << shift) >> shift);
    }
    return (float)u;
}

kv_status kv_npy_to_f32(kv_npy *a, kv_error *err)
{
    float *f = NULL;
    if (a->kind == 'f' && a->size == 4) return KV_OK;
    kv_status st = kv_array(&f, a->n, sizeof *f, err);
    if (st) return st;
    if ((a->kind == 'f' || a->kind == 'B') && a->size == 2)
        kv_decode_f32(a->kind == 'B' ? KV_BF16 : KV_F16, a->data, a->n, f);
    else
        for (size_t i = 0; i < a->n; i++) f[i] = element(a, i);
    free(a->data);
    a->data = f, a->kind = 'f', a->size = 4;
    return KV_OK;
}

kv_status kv_npy_begin(kv_outfile *o, const char *descr, uint32_t rank, const size_t *shape, kv_error *err)
{
    char h[512];
    size_t len = 10;
    if (rank > KV_NPY_RANK_MAX) return kv_fail(err, KV_EMISUSE, "cannot write array '%s': rank %u", o->path, rank);
    len += (size_t)snprintf(h + len, sizeof h - len, "{'descr': '%.8s', 'fortran_order': False, 'shape': (", descr);
    for (uint32_t i = 0; i < rank; i++) len += (size_t)snprintf(h + len, sizeof h - len, i ? ", %zu" : "%zu", shape[i]);
    len += (size_t)snprintf(h + len, sizeof h - len, "%s), }", rank == 1 ? "," : "");
    /* NumPy pads with spaces so that the data begins at a multiple of 64. */
    while ((len + 1) % 64) h[len++] = ' ';
    h[len++] = '\n';
    memcpy(h, "\x93NUMPY\x01", 8);
    kv_put16(h + 8, (uint16_t)(len - 10));
    if (fwrite(h, 1, len, o->f) != len)
        return kv_fail(err, KV_EIO, "cannot write array '%s': %s", o->path, strerror(errno));
    return KV_OK;
}

kv_status kv_npy_write(const char *path, const char *descr, uint32_t rank, const size_t *shape, const void *data,
                       kv_error *err)
{
    kv_status st = KV_OK;
    kv_outfile o = {0};
    kv_npy probe = {0};
    size_t size;
    if ((st = parse_descr(descr, path, &probe, err))) return st;
    size = probe.size;
    for (uint32_t i = 0; i < rank && i < KV_NPY_RANK_MAX; i++)
        if (!kv_mul(size, shape[i], &size)) return kv_fail(err, KV_EMISUSE, "cannot write array '%s': too large", path);
    if ((st = kv_outfile_open(path, &o, err))) return st;
    if (!(st = kv_npy_begin(&o, descr, rank, shape, err)) && size && fwrite(data, 1, size, o.f) != size)
        st = kv_fail(err, KV_EIO, "cannot write array '%s': %s", path, strerror(errno));
    if (!st) return kv_outfile_commit(&o, err);
    kv_outfile_abandon(&o);
    return st;
}

void kv_npy_free(kv_npy *a)
{
    free(a->data);
    memset(a, 0, sizeof *a);
}
