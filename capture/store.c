/* store.c - see store.h. */
#include "capture/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

struct kv_store {
    char *path;
    char **file;
    int *fd;
    uint32_t n_file;
    kv_stored *t;
    uint32_t n, cap;
    kv_slice *name; /* of the table, after kv_store_index */
    kv_strmap by_name;
};

kv_status kv_store_create(const char *path, kv_store **out, kv_error *err)
{
    kv_status st = kv_array(out, 1, sizeof **out, err);
    if (st) return st;
    (*out)->path = kv_format("%s", path);
    if ((*out)->path) return KV_OK;
    kv_store_close(*out), *out = NULL;
    return kv_fail(err, KV_ENOMEM, "out of memory");
}

void kv_store_close(kv_store *s)
{
    if (!s) return;
    for (uint32_t i = 0; i < s->n_file; i++) close(s->fd[i]), free(s->file[i]);
    for (uint32_t i = 0; i < s->n; i++) free((char *)s->t[i].name.p);
    kv_strmap_fini(&s->by_name);
    free(s->path), free(s->file), free(s->fd), free(s->t), free(s->name);
    free(s);
}

const char *kv_store_path(const kv_store *s)
{
    return s->path;
}

kv_status kv_store_fail(const kv_store *s, kv_status st, kv_error *err, const char *fmt, ...)
{
    char msg[700];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    return kv_fail(err, st, "cannot read model '%s': %s", s->path, msg);
}

kv_status kv_store_file(kv_store *s, const char *path, uint32_t *file, kv_error *err)
{
    char **names = realloc(s->file, (s->n_file + 1) * sizeof *names);
    if (names) s->file = names;
    int *fds = names ? realloc(s->fd, (s->n_file + 1) * sizeof *fds) : NULL;
    if (fds) s->fd = fds;
    char *copy = fds ? kv_format("%s", path) : NULL;
    if (!copy) return kv_fail(err, KV_ENOMEM, "out of memory");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        free(copy);
        return kv_store_fail(s, KV_EIO, err, "'%s': %s", path, strerror(errno));
    }
    s->file[s->n_file] = copy, s->fd[s->n_file] = fd;
    *file = s->n_file++;
    return KV_OK;
}

kv_status kv_store_add(kv_store *s, const kv_stored *t, kv_error *err)
{
    if (s->n == KV_STORE_TENSORS_MAX)
        return kv_store_fail(s, KV_EFORMAT, err, "more than %u tensors", KV_STORE_TENSORS_MAX);
    if (s->n == s->cap) {
        uint32_t cap = s->cap ? 2 * s->cap : 64;
        kv_stored *more = realloc(s->t, cap * sizeof *more);
        if (!more) return kv_fail(err, KV_ENOMEM, "out of memory for the names of tensors");
        s->t = more, s->cap = cap;
    }
    char *name = malloc(t->name.n + 1);
    if (!name) return kv_fail(err, KV_ENOMEM, "out of memory for the names of tensors");
    memcpy(name, t->name.p, t->name.n);
    name[t->name.n] = 0;
    s->t[s->n] = *t;
    s->t[s->n++].name.p = name;
    return KV_OK;
}

kv_status kv_store_index(kv_store *s, kv_error *err)
{
    kv_status st = kv_array(&s->name, s->n, sizeof *s->name, err);
    if (st) return st;
    for (uint32_t i = 0; i < s->n; i++) s->name[i] = s->t[i].name;
    if ((st = kv_strmap_init(&s->by_name, s->name, s->n, err))) return st;
    for (uint32_t i = 0; i < s->n; i++)
        if (kv_strmap_put(&s->by_name, i) != i)
            return kv_store_fail(s, KV_EFORMAT, err, "tensor '%s' occurs twice", kv_show(s->name[i].p, s->name[i].n).s);
    return KV_OK;
}

uint32_t kv_store_count(const kv_store *s)
{
    return s->n;
}

const kv_stored *kv_store_at(const kv_store *s, uint32_t i)
{
    return &s->t[i];
}

uint32_t kv_store_find(const kv_store *s, const char *name)
{
    return kv_strmap_get(&s->by_name, name, strlen(name));
}

uint32_t kv_store_files(const kv_store *s)
{
    return s->n_file;
}

const char *kv_store_file_path(const kv_store *s, uint32_t file)
{
    return s->file[file];
}

kv_status kv_store_read_file(const kv_store *s, uint32_t file, uint64_t at, size_t n, void *dst, kv_error *err)
{
    for (size_t done = 0; done < n;) {
        ssize_t r = pread(s->fd[file], (uint8_t *)dst + done, n - done, (off_t)(at + done));
        if (r < 0 && errno == EINTR) continue;
        if (r < 0) return kv_store_fail(s, KV_EIO, err, "%s", strerror(errno));
        if (!r) return kv_store_fail(s, KV_EIO, err, "a file became shorter while it was read");
        done += (size_t)r;
    }
    return KV_OK;
}

kv_status kv_store_read(const kv_store *s, uint32_t i, uint64_t at, size_t n, void *dst, kv_error *err)
{
    return kv_store_read_file(s, s->t[i].file, s->t[i].offset + at, n, dst, err);
}
