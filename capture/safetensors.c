/* safetensors.c - see safetensors.h. */
#include "capture/safetensors.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "capture/strictjson.h"

#define INDEX_MAX ((size_t)64 << 20)

/* One file while it is read. */
typedef struct {
    kv_store *s;
    const char *path, *base; /* base: the file's name, for messages */
    uint32_t file;
    uint64_t data, size; /* where the data begins; its bytes */
    kv_error *err;
} shard;

#define BAD(x, ...) kv_store_fail((x)->s, KV_EFORMAT, (x)->err, __VA_ARGS__)

typedef struct {
    kv_stored t;
    uint64_t begin, end;
} entry;

static const struct {
    const char *name;
    uint32_t ggml;
} dtypes[] = {{"F32", 0}, {"F16", 1}, {"BF16", 30}, {"I8", 24}, {"I16", 25}, {"I32", 26}, {"I64", 27}, {"F64", 28}};

static kv_status read_dtype(shard *x, const char *name, const json_t *v, entry *e)
{
    const char *s = json_string_value(v);
    if (!s) return BAD(x, "'%s': tensor '%s': dtype is missing or not a string", x->base, name);
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (!strcmp(s, dtypes[i].name)) return e->t.quant = kv_quant_find(dtypes[i].ggml), KV_OK;
    return kv_store_fail(x->s, KV_EUNSUPPORTED, x->err,
                         "'%s': tensor '%s' has dtype %s, which is not supported (F32, F16 "
                         "and BF16 are)",
                         x->base, name, kv_show(s, strlen(s)).s);
}

/* The shape is slowest dimension first; a store has them the other way round. */
static kv_status read_shape(shard *x, const char *name, const json_t *v, entry *e)
{
    size_t n = json_array_size(v), bytes;
    if (!json_is_array(v)) return BAD(x, "'%s': tensor '%s': shape is missing or not a list", x->base, name);
    if (n > 4) return BAD(x, "'%s': tensor '%s': shape has %zu dimensions (at most 4)", x->base, name, n);
    for (size_t i = 0; i < 4; i++) e->t.ne[i] = 1;
    for (size_t i = 0; i < n; i++) {
        const json_t *d = json_array_get(v, n - 1 - i);
        json_int_t is = json_integer_value(d);
        if (!json_is_integer(d) || is < 1 || is > 0x7fffffff)
            return BAD(x, "'%s': tensor '%s': its shape has a dimension that is not 1 to %d", x->base, name,
                       0x7fffffff);
        e->t.ne[i] = (uint64_t)is;
    }
    e->t.n_dims = n ? (uint32_t)n : 1;
    if (!kv_mul(e->t.ne[1], e->t.ne[2], &bytes) || !kv_mul(bytes, e->t.ne[3], &bytes))
        return BAD(x, "'%s': tensor '%s': its shape overflows", x->base, name);
    e->t.n_row = bytes, e->t.row_bytes = e->t.ne[0] * e->t.quant->bytes;
    return KV_OK;
}

static kv_status read_offsets(shard *x, const char *name, const json_t *v, entry *e)
{
    const json_t *a = json_array_get(v, 0), *b = json_array_get(v, 1);
    json_int_t begin = json_integer_value(a), end = json_integer_value(b);
    size_t bytes;
    if (json_array_size(v) != 2 || !json_is_integer(a) || !json_is_integer(b) || begin < 0 || end < begin)
        return BAD(x, "'%s': tensor '%s': data_offsets is not [begin, end]", x->base, name);
    if ((uint64_t)end > x->size)
        return BAD(x, "'%s': tensor '%s': data_offsets end at %lld, the data at %llu (truncated?)", x->base, name,
                   (long long)end, (unsigned long long)x->size);
    if (!kv_mul(e->t.n_row, e->t.row_bytes, &bytes) || bytes != (uint64_t)(end - begin))
        return BAD(x, "'%s': tensor '%s': data_offsets hold %lld bytes, its shape asks for another number", x->base,
                   name, (long long)(end - begin));
    e->begin = (uint64_t)begin, e->end = (uint64_t)end;
    e->t.offset = x->data + e->begin, e->t.file = x->file;
    return KV_OK;
}

static int by_begin(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* Names are shown in messages. */
static kv_status check_name(shard *x, const char *name)
{
    size_t n = strlen(name), plain = 0;
    while (plain < n && name[plain] > 0x20 && name[plain] < 0x7f) plain++;
    if (n && n < 120 && plain == n) return KV_OK;
    return BAD(x, "'%s': tensor name '%s' is not 1 to 119 printable characters", x->base, kv_show(name, n).s);
}

static kv_status read_entries(shard *x, json_t *head)
{
    size_t n = json_object_size(head), used = 0;
    entry *e = NULL;
    const char *name;
    json_t *v;
    kv_status st = n > KV_STORE_TENSORS_MAX ? BAD(x, "'%s': its header names %zu tensors", x->base, n)
                                            : kv_array(&e, n, sizeof *e, x->err);
    if (st) return st;
    json_object_foreach(head, name, v)
    {
        entry *to = &e[used];
        if (!strcmp(name, "__metadata__")) {
            const char *key;
            json_t *text;
            if (!json_is_object(v)) st = BAD(x, "'%s': __metadata__ is not an object", x->base);
            json_object_foreach(v, key, text) if (!st && !json_is_string(text)) st =
                BAD(x, "'%s': __metadata__ holds something that is not a string", x->base);
            if (st) break;
            continue;
        }
        if ((st = check_name(x, name)) || (st = read_dtype(x, name, json_object_get(v, "dtype"), to)) ||
            (st = read_shape(x, name, json_object_get(v, "shape"), to)) ||
            (st = read_offsets(x, name, json_object_get(v, "data_offsets"), to)))
            break;
        to->t.name = (kv_slice){name, strlen(name)}, used++;
    }
    if (!st && !used) st = BAD(x, "'%s': its header names no tensors", x->base);
    if (!st) qsort(e, used, sizeof *e, by_begin);
    for (size_t i = 0, at = 0; i < used && !st; at = e[i++].end) {
        if (e[i].begin != at)
            st = BAD(x, "'%s': tensor '%s': data_offsets begin at %llu, the one before ends at %zu", x->base,
                     e[i].t.name.p, (unsigned long long)e[i].begin, at);
        else
            st = kv_store_add(x->s, &e[i].t, x->err);
    }
    if (!st && e[used - 1].end != x->size)
        st = BAD(x, "'%s': tensor '%s' is the last, but %llu bytes follow it (data_offsets)", x->base,
                 e[used - 1].t.name.p, (unsigned long long)(x->size - e[used - 1].end));
    free(e);
    return st;
}

static kv_status read_shard(shard *x)
{
    struct stat sb;
    uint8_t *text = NULL, len[8];
    json_t *head = NULL;
    char what[160];
    kv_status st;
    if (stat(x->path, &sb)) return kv_store_fail(x->s, KV_EIO, x->err, "'%s': %s", x->base, strerror(errno));
    if (!S_ISREG(sb.st_mode)) return kv_store_fail(x->s, KV_EIO, x->err, "'%s' is not a regular file", x->base);
    if ((st = kv_store_file(x->s, x->path, &x->file, x->err))) return st;
    uint64_t size = (uint64_t)sb.st_size, n = 0;
    if (size < 8) return BAD(x, "'%s' has %llu bytes: not even the header length", x->base, (unsigned long long)size);
    if ((st = kv_store_read_file(x->s, x->file, 0, 8, len, x->err))) return st;
    n = kv_get64(len);
    if (n < 2 || n > KV_ST_HEADER_MAX || n > size - 8)
        return BAD(x, "'%s': header length %llu (the file has %llu bytes)", x->base, (unsigned long long)n,
                   (unsigned long long)size);
    x->data = 8 + n, x->size = size - x->data;
    snprintf(what, sizeof what, "the header of '%.100s'", x->base);
    st = kv_array(&text, (size_t)n, 1, x->err);
    if (!st) st = kv_store_read_file(x->s, x->file, 8, (size_t)n, text, x->err);
    if (!st) {
        kv_error why;
        st = kv_json_object(text, (size_t)n, what, &head, &why);
        if (st) st = kv_store_fail(x->s, st, x->err, "%s", why.msg);
    }
    free(text);
    if (!st) st = read_entries(x, head);
    json_decref(head);
    return st;
}

static kv_status open_shard(kv_store *s, const char *folder, const char *base, kv_error *err)
{
    shard x = {.s = s, .base = base, .err = err};
    char *path = kv_format("%s/%s", folder, base);
    if (!path) return kv_fail(err, KV_ENOMEM, "out of memory for a path");
    x.path = path;
    kv_status st = read_shard(&x);
    free(path);
    return st;
}

/* A shard is a file of the same folder and nothing else. */
static bool plain_name(const char *s)
{
    size_t n = strlen(s);
    return n > 12 && n < 256 && !strcmp(s + n - 12, ".safetensors") && !strchr(s, '/') && *s != '.' &&
           kv_utf8_bad(s, n) == n;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Every name is in the shard that the index says, and every tensor is in the index. */
static kv_status compare_index(kv_store *s, const json_t *map, kv_error *err)
{
    const char *name;
    json_t *v;
    json_object_foreach((json_t *)map, name, v)
    {
        uint32_t i = kv_store_find(s, name);
        const char *base = i == KV_NONE ? "" : strrchr(kv_store_file_path(s, kv_store_at(s, i)->file), '/') + 1;
        if (strcmp(base, json_string_value(v)))
            return kv_store_fail(s, KV_EFORMAT, err, "tensor '%s' is not in '%s', where weight_map has it",
                                 kv_show(name, strlen(name)).s, json_string_value(v));
    }
    for (uint32_t i = 0; i < kv_store_count(s); i++)
        if (!json_object_get(map, kv_store_at(s, i)->name.p))
            return kv_store_fail(s, KV_EFORMAT, err, "tensor '%s' is not in the weight_map of the index",
                                 kv_store_at(s, i)->name.p);
    return KV_OK;
}

static kv_status open_index(kv_store *s, const char *folder, const char *path, kv_error *err)
{
    json_t *index = NULL, *v;
    const char **shards = NULL, *name;
    size_t n = 0, count;
    kv_error why;
    kv_status st = kv_json_file(path, INDEX_MAX, &index, &why);
    if (st) return kv_store_fail(s, st, err, "%s", why.msg);
    const json_t *map = json_object_get(index, "weight_map");
    count = json_object_size(map);
    if (!count) {
        st = kv_store_fail(s, KV_EFORMAT, err, "'model.safetensors.index.json' has no weight_map");
        goto out;
    }
    if ((st = kv_array(&shards, count, sizeof *shards, err))) goto out;
    json_object_foreach((json_t *)map, name, v)
    {
        const char *base = json_string_value(v);
        if (!base || !plain_name(base)) {
            st = kv_store_fail(s, KV_EFORMAT, err,
                               "weight_map of the index names '%s', which is not a file of the folder",
                               base ? kv_show(base, strlen(base)).s : "(not a string)");
            goto out;
        }
        shards[n++] = base;
    }
    qsort(shards, n, sizeof *shards, by_text);
    for (size_t i = 0, opened = 0; i < n && !st; i++) {
        if (i && !strcmp(shards[i], shards[i - 1])) continue;
        if (++opened > KV_ST_FILES_MAX)
            st = kv_store_fail(s, KV_EFORMAT, err, "the index names more than %u files", KV_ST_FILES_MAX);
        else
            st = open_shard(s, folder, shards[i], err);
    }
    if (!st) st = kv_store_index(s, err);
    if (!st) st = compare_index(s, map, err);
out:
    free(shards);
    json_decref(index);
    return st;
}

kv_status kv_safetensors_folder(kv_store *s, const char *folder, kv_error *err)
{
    char *index = kv_format("%s/model.safetensors.index.json", folder);
    struct stat sb;
    if (!index) return kv_fail(err, KV_ENOMEM, "out of memory for a path");
    kv_status st;
    if (!stat(index, &sb))
        st = open_index(s, folder, index, err);
    else if (!(st = open_shard(s, folder, "model.safetensors", err)))
        st = kv_store_index(s, err);
    free(index);
    return st;
}
