/* reader.c - opening a trace and decoding its chunks. Every number that came from the file is checked against the
 * file's size and the limits of format.h before it is used to allocate or to read. lookup.c holds the questions on top.
 */
#include "traces/format.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#define UNFINISHED "its writer never finished or the file was cut off; 'kv-trace recover IN OUT' saves what is complete"

/* pread, not mmap: a file that shrinks while it is read is then an error and not a SIGBUS. */
kv_status kvt_read_at(const kv_trace *t, uint64_t at, size_t n, void *dst, kv_error *err)
{
    if (at > t->size || n > t->size - at)
        return kv_fail(err, KV_EFORMAT, "cannot read trace '%s': truncated at byte %" PRIu64, t->path, t->size);
    if (t->fd < 0) {
        if (n) memcpy(dst, t->mem + at, n);
        return KV_OK;
    }
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(t->fd, (uint8_t *)dst + done, n - done, (off_t)(at + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return kv_fail(err, KV_EIO, "cannot read trace '%s': %s", t->path, strerror(errno));
        if (!got) return kv_fail(err, KV_EIO, "cannot read trace '%s': it became shorter while being read", t->path);
        done += (size_t)got;
    }
    return KV_OK;
}

static kv_status new_trace(const char *path, kv_trace **out, kv_error *err)
{
    kv_trace *t = NULL;
    kv_status st = kv_array(&t, 1, sizeof *t, err);
    *out = NULL;
    if (st) return st;
    t->fd = -1;
    if (!(t->path = kv_format("%s", path))) {
        free(t);
        return kv_fail(err, KV_ENOMEM, "out of memory");
    }
    pthread_mutex_init(&t->lock, NULL);
    *out = t;
    return KV_OK;
}

kv_status kvt_attach(const char *path, kv_trace **out, kv_error *err)
{
    struct stat sb;
    kv_status st = new_trace(path, out, err);
    if (st) return st;
    kv_trace *t = *out;
    t->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO must not hang us before fstat names it */
    if (t->fd < 0 || fstat(t->fd, &sb)) {
        st = kv_fail(err, KV_EIO, "cannot open trace '%s': %s", path, strerror(errno));
    } else if (!S_ISREG(sb.st_mode)) {
        st = kv_fail(err, KV_EIO, "cannot open trace '%s': not a regular file", path);
    } else {
        t->size = (uint64_t)sb.st_size;
        return KV_OK;
    }
    kv_trace_close(t);
    *out = NULL;
    return st;
}

void kv_trace_close(kv_trace *t)
{
    if (!t) return;
    for (kvt_scratch *s = t->scratch, *next; s; s = next) {
        next = s->next;
        ZSTD_freeDCtx(s->dctx);
        free(s->head), free(s->in), free(s->plane), free(s->raw), free(s);
    }
    kv_trace_close(t->side);
    if (t->fd >= 0) close(t->fd);
    kv_trace_info_free(&t->info);
    pthread_mutex_destroy(&t->lock);
    free(t->entry), free(t->path), free(t);
}

/* -------------------------------------------------------------------------------------------- opening */
static kv_status check_head(kv_trace *t, kv_error *err)
{
    uint8_t h[KVT_HEAD_BYTES];
    kv_status st;
    if (t->size < sizeof h)
        return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': %" PRIu64 " bytes are no trace", t->path, t->size);
    if ((st = kvt_read_at(t, 0, sizeof h, h, err))) return st;
    if (memcmp(h + 8, kvt_tags[KVT_HEAD], 8) || kv_get32(h) != KVT_SKIPPABLE) {
        const char *hint = kv_get32(h) == 0xFD2FB528u          ? " (a plain zstd file)"
                           : h[0] == 0x1f && h[1] == 0x8b      ? " (is it gzip? traces are zstd)"
                           : !memcmp(h, "GGUF", 4)             ? " (a GGUF model; see kv-capture)"
                           : !memcmp(h, "\x93NUMPY", 6)        ? " (a NumPy array; see kv-trace import)"
                           : !memcmp(h, "SQLite format 3", 15) ? " (a database; see kv-analyze)"
                                                               : "";
        return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': bad magic at byte 0%s", t->path, hint);
    }
    if (!kvt_sealed(h, sizeof h, KVT_HEAD))
        return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': bad checksum of the head at byte 0", t->path);
    if (kv_get16(h + 16) != KVT_MAJOR)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot open trace '%s': format version %u.%u, this program reads %u.x",
                       t->path, kv_get16(h + 16), kv_get16(h + 18), KVT_MAJOR);
    if (kv_get64(h + 24))
        return kv_fail(err, KV_EUNSUPPORTED,
                       "cannot open trace '%s': it needs features %#" PRIx64 " that this version does not have",
                       t->path, kv_get64(h + 24));
    t->minor = kv_get16(h + 18);
    return KV_OK;
}

kv_status kvt_parse_index(const uint8_t *p, size_t bytes, kvt_entry **entry, size_t *n, const char *path, kv_error *err)
{
    uint32_t size = kv_get32(p + 16), count = kv_get32(p + 20);
    kvt_entry *more;
    kv_status st;
    if (bytes < KVT_INDEX_MIN || size < KVT_ENT_BYTES || size > 4096 || count != (bytes - KVT_INDEX_MIN) / size ||
        (bytes - KVT_INDEX_MIN) % size)
        return kv_fail(err, KV_EFORMAT, "cannot read trace '%s': the index has %u entries of %u bytes in %zu bytes",
                       path, count, size, bytes);
    if (!(more = realloc(*entry, (*n + count + 1) * sizeof **entry)))
        return kv_fail(err, KV_ENOMEM, "out of memory: index of %u chunks", count);
    *entry = more;
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *q = p + 32 + (size_t)i * size;
        kvt_entry *e = &more[*n];
        memset(e, 0, sizeof *e);
        kvt_get_record(q, e);
        e->offset = kv_get64(q + KVT_REC_BYTES);
        if ((st = kvt_check_record(e, path, err))) return st;
        ++*n;
    }
    return KV_OK;
}

static int by_place(const void *a, const void *b)
{
    const kvt_entry *x = a, *y = b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static int by_key(const void *a, const void *b)
{
    const kvt_entry *x = a, *y = b;
    if (x->stream != y->stream) return x->stream < y->stream ? -1 : 1;
    if (x->layer != y->layer) return x->layer < y->layer ? -1 : 1;
    if (x->token_first != y->token_first) return x->token_first < y->token_first ? -1 : 1;
    if (x->head_first != y->head_first) return x->head_first < y->head_first ? -1 : 1;
    return x->seq < y->seq ? -1 : x->seq > y->seq;
}

kv_status kvt_adopt(kv_trace *t, kv_error *err)
{
    kv_sha256 s;
    uint8_t r[KVT_REC_BYTES];
    uint64_t end = KVT_HEAD_BYTES, meta = 0;
    if (t->n) qsort(t->entry, t->n, sizeof *t->entry, by_place);
    for (size_t i = 0; i < t->n; i++) {
        const kvt_entry *e = &t->entry[i];
        uint64_t bytes = kvt_header_bytes(e) + e->stored;
        if (e->offset < end || e->offset > t->data_end || bytes > t->data_end - e->offset)
            return kv_fail(err, KV_EFORMAT,
                           "cannot read trace '%s': the chunk at byte %" PRIu64 " overlaps another or leaves the file",
                           t->path, e->offset);
        end = e->offset + bytes;
    }
    if (t->n) qsort(t->entry, t->n, sizeof *t->entry, by_key);
    for (size_t i = 0; i < t->n; i++)
        if (t->entry[i].stream == KV_S_META && t->entry[i].seq >= meta) meta = t->entry[i].seq;
    /* Everything about a chunk that does not depend on the compressor or on its place in the file. Metadata that was
     * replaced later, and the provenance, do not count. */
    kv_sha256_init(&s);
    for (size_t i = 0; i < t->n; i++) {
        kvt_entry e = t->entry[i];
        if (e.stream == KV_S_PROVENANCE || (e.stream == KV_S_META && e.seq != meta)) continue;
        e.seq = 0, e.stored = 0, e.crc = 0;
        kvt_put_record(r, &e);
        kv_sha256_update(&s, r, sizeof r);
    }
    kv_sha256_hex(&s, t->sha);
    return KV_OK;
}

static kv_status load_index(kv_trace *t, kv_error *err)
{
    uint8_t f[KVT_FOOT_BYTES], *b = NULL;
    kv_status st = KV_OK;
    if (t->size < KVT_HEAD_BYTES + KVT_INDEX_MIN + KVT_FOOT_BYTES)
        return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': no footer: " UNFINISHED, t->path);
    if ((st = kvt_read_at(t, t->size - sizeof f, sizeof f, f, err))) return st;
    if (memcmp(f + 8, kvt_tags[KVT_FOOT], 8))
        return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': no footer: " UNFINISHED, t->path);
    if (!kvt_sealed(f, sizeof f, KVT_FOOT) || memcmp(f + 48, "KVTDONE1", 8))
        return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': bad checksum of the footer", t->path);
    uint64_t at = kv_get64(f + 16), bytes = kv_get64(f + 24), room = t->size - KVT_FOOT_BYTES;
    if (at < KVT_HEAD_BYTES || at > room || bytes != room - at || bytes < KVT_INDEX_MIN || bytes > KVT_INDEX_MAX)
        return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': the footer places the index at %" PRIu64 "+%" PRIu64,
                       t->path, at, bytes);
    if (!(b = malloc((size_t)bytes)))
        return kv_fail(err, KV_ENOMEM, "out of memory: index of %" PRIu64 " bytes", bytes);
    if ((st = kvt_read_at(t, at, (size_t)bytes, b, err))) goto out;
    if (!kvt_sealed(b, (size_t)bytes, KVT_INDEX)) {
        st =
            kv_fail(err, KV_EFORMAT, "cannot open trace '%s': bad checksum of the index at byte %" PRIu64, t->path, at);
        goto out;
    }
    if ((st = kvt_parse_index(b, (size_t)bytes, &t->entry, &t->n, t->path, err))) goto out;
    if (kv_get64(f + 32) != t->n) {
        st = kv_fail(err, KV_EFORMAT, "cannot open trace '%s': the footer counts %" PRIu64 " chunks, the index %zu",
                     t->path, kv_get64(f + 32), t->n);
        goto out;
    }
    t->data_end = at;
    st = kvt_adopt(t, err);
out:
    free(b);
    return st;
}

/* The last metadata chunk. */
static kv_status load_meta(kv_trace *t, kv_error *err)
{
    kv_status st;
    kv_error why = {""};
    char *json = NULL;
    size_t n = 0, count;
    size_t first = kvt_group(t, KV_S_META, 0, &count);
    if (!count) return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': no metadata", t->path);
    for (size_t i = first; i < first + count; i++)
        if (t->entry[i].raw > KVT_META_MAX)
            return kv_fail(err, KV_EFORMAT, "cannot open trace '%s': metadata of %" PRIu64 " bytes", t->path,
                           t->entry[i].raw);
    if ((st = kv_trace_read_bytes(t, KV_S_META, &json, &n, err))) return st;
    st = kvt_info_from_json(json, n, &t->info, &why);
    if (st) st = kv_fail(err, st, "cannot open trace '%s': %.800s", t->path, why.msg);
    free(json);
    t->have_info = st == KV_OK;
    return st;
}

/* What the metadata promises bounds what the chunks may say: head counts, layers, tokens, widths. */
static kv_status check_shapes(const kv_trace *t, kv_error *err)
{
    const kv_trace_info *i = &t->info;
    for (size_t k = 0; k < t->n; k++) {
        const kvt_entry *e = &t->entry[k];
        const kvt_stream_info *s = kvt_stream(e->stream);
        uint64_t rows = i->n_token, width = 0;
        bool layer = false;
        if (!s) continue;
        switch (e->stream) {
        case KV_S_Q:
        case KV_S_K:
        case KV_S_V:
        case KV_S_OUT: width = i->head_dim; break;
        case KV_S_X: width = i->hidden; break;
        case KV_S_ROWSTAT: width = 4; break;
        case KV_S_WO: width = (uint64_t)i->n_q_head * i->head_dim, rows = i->hidden; break;
        case KV_S_POST_NORM: width = 2, rows = i->hidden; break;
        case KV_S_OFFSETS: width = 1, rows++; break;
        case KV_S_MAP: width = e->width < i->n_token ? i->n_token : 0; break; /* a run may stop before its limit */
        case KV_S_MAP_WINDOW: width = i->n_prompt, rows = i->n_prompt; break;
        case KV_S_COLSUM: width = 1, rows = i->n_prompt; break;
        case KV_S_COLSUM_CTX: width = 1, rows = i->n_context; break;
        case KV_S_LOGITS: break;
        default: width = 1; break;
        }
        for (uint32_t l = 0; l < i->n_layer && !layer; l++) layer = i->layer[l] == e->layer;
        if (s->kind == 'b' || s->kind == 't') layer = e->layer == 0;
        if (s->kind == 'b') continue;
        if (!layer || (uint32_t)e->head_first + e->head_count > kvt_heads(i, e->stream) ||
            (width && e->width != width) || e->token_first + e->token_count > rows)
            return kv_fail(err, KV_EFORMAT,
                           "cannot open trace '%s': %s chunk at byte %" PRIu64 " (layer %u heads %u+%u rows %" PRIu64
                           "+%u width %u) does not fit the metadata",
                           t->path, s->name, e->offset, e->layer, e->head_first, e->head_count, e->token_first,
                           e->token_count, e->width);
    }
    return KV_OK;
}

kv_status kvt_load_info(kv_trace *t, kv_error *err)
{
    kv_status st = load_meta(t, err);
    return st ? st : check_shapes(t, err);
}

static kv_status open_common(kv_trace *t, kv_trace **out, kv_error *err)
{
    kv_status st;
    if ((st = check_head(t, err)) || (st = load_index(t, err)) || (st = kvt_load_info(t, err))) {
        kv_trace_close(t);
        return st;
    }
    *out = t;
    return KV_OK;
}

kv_status kv_trace_open(const char *path, kv_trace **out, kv_error *err)
{
    kv_trace *t;
    kv_status st = kvt_attach(path, &t, err);
    *out = NULL;
    return st ? st : open_common(t, out, err);
}

kv_status kv_trace_open_mem(const void *bytes, size_t n, kv_trace **out, kv_error *err)
{
    kv_trace *t;
    kv_status st = new_trace("(memory)", &t, err);
    *out = NULL;
    if (st) return st;
    t->mem = bytes, t->size = n;
    return open_common(t, out, err);
}

/* ------------------------------------------------------------------------------------------- decoding */
static kvt_scratch *scratch_take(const kv_trace *ct, kv_error *err)
{
    kv_trace *t = (kv_trace *)ct; /* the pool is behind a lock and not part of what const promises */
    pthread_mutex_lock(&t->lock);
    kvt_scratch *s = t->scratch;
    if (s) t->scratch = s->next;
    pthread_mutex_unlock(&t->lock);
    if (s) return s;
    if (kv_array(&s, 1, sizeof *s, err)) return NULL;
    if (!(s->dctx = ZSTD_createDCtx())) {
        kv_fail(err, KV_ENOMEM, "out of memory: cannot start a decompressor");
        free(s);
        return NULL;
    }
    return s;
}

static void scratch_give(const kv_trace *ct, kvt_scratch *s)
{
    kv_trace *t = (kv_trace *)ct;
    pthread_mutex_lock(&t->lock);
    s->next = t->scratch, t->scratch = s;
    pthread_mutex_unlock(&t->lock);
}

static kv_status grow(uint8_t **p, size_t *cap, size_t need, kv_error *err)
{
    if (need <= *cap && *p) return KV_OK;
    free(*p);
    *cap = 0;
    if (!(*p = malloc(need ? need : 1))) return kv_fail(err, KV_ENOMEM, "out of memory: %zu bytes", need);
    *cap = need;
    return KV_OK;
}

/* A damaged header's frame table, from the frames themselves: zstd frames know where they end. */
static kv_status walk_frames(const kv_trace *t, const kvt_entry *e, kvt_scratch *s, kv_error *err)
{
    kv_status st;
    size_t at = 0, n;
    if ((st = grow(&s->in, &s->in_cap, e->stored, err)) ||
        (st = kvt_read_at(t, e->offset + kvt_header_bytes(e), e->stored, s->in, err)))
        return st;
    for (uint32_t f = 0; f < e->frames; f++, at += n) {
        n = ZSTD_findFrameCompressedSize(s->in + at, e->stored - at);
        if (ZSTD_isError(n)) n = e->stored - at; /* the sum will not be right */
        kv_put32(s->head + 88 + 8 * (size_t)f, (uint32_t)n);
        kv_put32(s->head + 92 + 8 * (size_t)f, (uint32_t)kvt_frame_raw(e));
    }
    return KV_OK;
}

/* The chunk's header, checked against its checksum, the index and itself, into s->head. */
static kv_status chunk_header(const kv_trace *t, const kvt_entry *e, kvt_scratch *s, kv_error *err)
{
    size_t bytes = kvt_header_bytes(e);
    uint8_t r[KVT_REC_BYTES];
    uint64_t sum = 0;
    kv_status st;
    if ((st = grow(&s->head, &s->head_cap, bytes, err)) || (st = kvt_read_at(t, e->offset, bytes, s->head, err)))
        return st;
    kvt_put_record(r, e);
    if (e->walk) {
        if ((st = walk_frames(t, e, s, err))) return st;
    } else if (!kvt_sealed(s->head, bytes, KVT_CHUNK) || memcmp(s->head + 24, r, sizeof r))
        return kv_fail(err, KV_EFORMAT, "cannot read trace '%s': damaged chunk header at byte %" PRIu64, t->path,
                       e->offset);
    for (uint32_t f = 0; f < e->frames; f++) {
        sum += kv_get32(s->head + 88 + 8 * (size_t)f);
        if (kv_get32(s->head + 92 + 8 * (size_t)f) != kvt_frame_raw(e)) sum = UINT64_MAX / 2;
    }
    if (sum != e->stored)
        return kv_fail(err, KV_EFORMAT,
                       "cannot read trace '%s': the frames of the chunk at byte %" PRIu64 " do not add up", t->path,
                       e->offset);
    return KV_OK;
}

/* Byte planes back to elements. The fixed inner count lets gcc -O2 vectorise. */
static void join_planes(const uint8_t *p, size_t n, size_t size, uint8_t *dst)
{
    enum { LANES = 32 };
    size_t i = 0;
    for (; size == 2 && i + LANES <= n; i += LANES) {
        uint16_t v[LANES];
        for (int k = 0; k < LANES; k++) v[k] = (uint16_t)(p[i + k] | p[n + i + k] << 8);
        memcpy(dst + 2 * i, v, sizeof v);
    }
    for (; size == 4 && i + LANES <= n; i += LANES) {
        uint32_t v[LANES];
        for (int k = 0; k < LANES; k++)
            v[k] = (uint32_t)p[i + k] | (uint32_t)p[n + i + k] << 8 | (uint32_t)p[2 * n + i + k] << 16 |
                   (uint32_t)p[3 * n + i + k] << 24;
        memcpy(dst + 4 * i, v, sizeof v);
    }
    for (; i < n; i++)
        for (size_t k = 0; k < size; k++) dst[size * i + k] = p[k * n + i];
}

/* Head h (counted in the chunk) into dst: token_count * width elements. The header is in s->head. */
static kv_status decode_head(const kv_trace *t, const kvt_entry *e, kvt_scratch *s, uint32_t h, uint8_t *dst,
                             kv_error *err)
{
    size_t raw = kvt_frame_raw(e), want = 0, first = (size_t)h * e->planes;
    uint64_t at = e->offset + kvt_header_bytes(e);
    uint8_t *to = dst;
    kv_status st;
    for (size_t f = 0; f < first; f++) at += kv_get32(s->head + 88 + 8 * f);
    for (size_t f = first; f < first + e->planes; f++) want += kv_get32(s->head + 88 + 8 * f);
    if (e->planes > 1) {
        if ((st = grow(&s->plane, &s->plane_cap, raw * e->planes, err))) return st;
        to = s->plane;
    }
    if ((st = grow(&s->in, &s->in_cap, want, err)) || (st = kvt_read_at(t, at, want, s->in, err))) return st;
    const uint8_t *src = s->in;
    for (size_t f = first; f < first + e->planes; f++) {
        size_t n = kv_get32(s->head + 88 + 8 * f);
        size_t got = ZSTD_decompressDCtx(s->dctx, to + (f - first) * raw, raw, src, n);
        if (got != raw)
            return kv_fail(err, KV_EFORMAT,
                           "cannot read trace '%s': damaged data in the chunk at byte %" PRIu64 " (%s layer %u head "
                           "%u): %s",
                           t->path, e->offset, kvt_stream(e->stream) ? kvt_stream(e->stream)->name : "?", e->layer,
                           e->head_first + h, ZSTD_isError(got) ? ZSTD_getErrorName(got) : "frame of another size");
        src += n;
    }
    if (e->planes > 1) join_planes(s->plane, raw, e->planes, dst);
    return KV_OK;
}

kv_status kvt_read_chunk(const kv_trace *t, const kvt_entry *e, uint8_t *dst, kv_error *err)
{
    kv_status st;
    kvt_scratch *s = scratch_take(t, err);
    if (!s) return KV_ENOMEM;
    size_t per_head = kvt_frame_raw(e) * e->planes;
    st = chunk_header(t, e, s, err);
    for (uint32_t h = 0; h < e->head_count && !st; h++) st = decode_head(t, e, s, h, dst + h * per_head, err);
    scratch_give(t, s);
    return st;
}

kv_status kvt_read_head(const kv_trace *t, const kvt_entry *e, uint32_t head, uint32_t a, uint32_t b, kv_dtype to,
                        void *dst, kv_error *err)
{
    kv_status st;
    kvt_scratch *s = scratch_take(t, err);
    if (!s) return KV_ENOMEM;
    size_t n = (size_t)(b - a) * e->width, skip, raw = kvt_frame_raw(e) * e->planes;
    skip = (size_t)(a - e->token_first) * e->width * kv_dtype_bytes((kv_dtype)e->dtype);
    /* The usual case decodes a block as a whole: straight to its place when no conversion is due. */
    bool straight = to == (kv_dtype)e->dtype && n * kv_dtype_bytes(to) == raw;
    if (!(st = chunk_header(t, e, s, err)) && (straight || !(st = grow(&s->raw, &s->raw_cap, raw, err))) &&
        !(st = decode_head(t, e, s, head - e->head_first, straight ? dst : s->raw, err)) && !straight) {
        if (to == (kv_dtype)e->dtype)
            memcpy(dst, s->raw + skip, n * kv_dtype_bytes(to));
        else
            kv_decode_f32((kv_dtype)e->dtype, s->raw + skip, n, dst);
    }
    scratch_give(t, s);
    return st;
}

kv_status kvt_check_chunk(const kv_trace *t, const kvt_entry *e, kv_error *err)
{
    kv_status st;
    kvt_scratch *s = scratch_take(t, err);
    if (!s) return KV_ENOMEM;
    uint64_t at = e->offset + kvt_header_bytes(e), left = e->stored;
    uint32_t crc = 0;
    st = chunk_header(t, e, s, err);
    if (!st) st = grow(&s->in, &s->in_cap, left < 1 << 20 ? left : 1 << 20, err);
    while (!st && left) {
        size_t n = left < 1 << 20 ? (size_t)left : 1 << 20;
        if (!(st = kvt_read_at(t, at, n, s->in, err))) crc = kv_crc32(crc, s->in, n);
        at += n, left -= n;
    }
    if (!st && crc != e->crc)
        st = kv_fail(err, KV_EFORMAT, "trace '%s': bad checksum of the chunk at byte %" PRIu64 " (%s layer %u)",
                     t->path, e->offset, kvt_stream(e->stream) ? kvt_stream(e->stream)->name : "?", e->layer);
    scratch_give(t, s);
    return st;
}
