/* writer.c - writing a trace: blocks are compressed side by side and written in the caller's order by one thread.
 *
 *   kv_trace_put -> slot of a ring (EMPTY -> FULL) -> a compressor (BUSY -> DONE) -> the writer thread (-> EMPTY)
 *
 * The ring is the back-pressure: put waits for an empty slot. With threads = 0 put does all three steps itself. A block
 * whose bytes are still on their way (kv_trace_put_from) is FULL at once; the compressor that takes it waits for them.
 * What stands in the file depends on the calls only, never on time or threads. */
#include "traces/format.h"
#include "traces/memtext.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include <zstd.h>

enum { EMPTY, FULL, BUSY, DONE };

typedef struct {
    int state;
    kvt_entry e;
    uint8_t *raw, *out; /* out: chunk header and frames */
    size_t raw_cap, out_cap, out_bytes;
    bool split;                 /* raw is in planes already */
    const kv_trace_source *src; /* NULL: raw is there */
    uint64_t ticket;            /* of src */
    kv_status st;
    kv_error err;
} slot;

/* What one compressor owns. */
typedef struct {
    ZSTD_CCtx *zstd;
    kvt_coder *literals;
    uint8_t *plane;
    size_t plane_cap;
} packer;

struct kv_trace_writer {
    kv_outfile file;
    kv_trace_info info;
    uint64_t at; /* bytes written: touched by the writing side only */
    uint64_t seq;
    bool meta_last; /* the last chunk is the current metadata */
    uint8_t *index; /* entries written */
    size_t index_n, index_cap;
    uint64_t ckpt_at, ckpt_prev; /* entries since entry ckpt_from are in no checkpoint yet */
    size_t ckpt_from;
    kv_trace_usage usage;
    packer own;           /* threads = 0 */
    kv_trace_memory room; /* where the slots' raw bytes lie */

    uint32_t n_thread;
    size_t n_slot, head, n_used; /* ring: slots head .. head+n_used-1 are in use */
    slot *slot;
    pthread_t *thread;
    uint32_t n_started;
    pthread_mutex_t lock;
    pthread_cond_t moved; /* any slot changed its state, or quit */
    bool quit;
    kv_status st; /* the first failure; put and finish report it */
    kv_error err;
};

/* ------------------------------------------------------------------------------------------ compressing */
static kv_status packer_open(packer *p, kv_error *err)
{
    p->zstd = ZSTD_createCCtx(), p->literals = kvt_coder_open();
    if (!p->zstd || !p->literals) return kv_fail(err, KV_ENOMEM, "out of memory: cannot start a compressor");
    ZSTD_CCtx_setParameter(p->zstd, ZSTD_c_compressionLevel, 1);
    ZSTD_CCtx_setParameter(p->zstd, ZSTD_c_checksumFlag, 1);
    return KV_OK;
}

static void packer_close(packer *p)
{
    ZSTD_freeCCtx(p->zstd);
    free(p->literals), free(p->plane);
    memset(p, 0, sizeof *p);
}

static kv_status grow(uint8_t **p, size_t *cap, size_t need, kv_error *err)
{
    if (need <= *cap) return KV_OK;
    free(*p);
    *cap = 0;
    if (!(*p = malloc(need))) return kv_fail(err, KV_ENOMEM, "out of memory: cannot allocate %zu bytes", need);
    *cap = need;
    return KV_OK;
}

/* n elements of 2 or 4 bytes -> planes of n bytes, lowest byte first. The fixed inner count lets gcc -O2 vectorise. */
static void split_planes(const uint8_t *src, size_t n, size_t size, uint8_t *dst)
{
    enum { LANES = 32 };
    size_t i = 0;
    for (; size == 2 && i + LANES <= n; i += LANES) {
        uint16_t v[LANES];
        memcpy(v, src + 2 * i, sizeof v);
        for (int k = 0; k < LANES; k++) dst[i + k] = (uint8_t)v[k];
        for (int k = 0; k < LANES; k++) dst[n + i + k] = (uint8_t)(v[k] >> 8);
    }
    for (; size == 4 && i + LANES <= n; i += LANES) {
        uint32_t v[LANES];
        memcpy(v, src + 4 * i, sizeof v);
        for (size_t p = 0; p < 4; p++)
            for (int k = 0; k < LANES; k++) dst[p * n + i + k] = (uint8_t)(v[k] >> 8 * p);
    }
    for (; i < n; i++)
        for (size_t p = 0; p < size; p++) dst[p * n + i] = src[size * i + p];
}

/* In layer 0 V and what enters depend on the token alone and repeat with it; elsewhere nothing repeats (capture
 * measurements), and a search for repeats costs much and finds nothing. */
static bool no_repeats(const kvt_entry *e)
{
    return e->stream == KV_S_Q || e->stream == KV_S_K || e->stream == KV_S_OUT ||
           (e->layer > 0 && (e->stream == KV_S_V || e->stream == KV_S_X));
}

/* raw -> header and frames in s->out. */
static kv_status pack(packer *p, slot *s, kv_error *err)
{
    kvt_entry *e = &s->e;
    bool literals = e->planes > 1 && no_repeats(e);
    size_t head = kvt_header_bytes(e), frame_raw = kvt_frame_raw(e), at = head, cap;
    size_t bound = literals ? kvt_literals_bound(frame_raw) : ZSTD_compressBound(frame_raw);
    kv_status st;
    if (!kv_mul(bound, e->frames, &cap) || !kv_add(cap, head, &cap)) return kv_fail(err, KV_EMISUSE, "chunk too large");
    if ((st = grow(&s->out, &s->out_cap, cap, err)) ||
        (st = grow(&p->plane, &p->plane_cap, frame_raw * e->planes, err)))
        return st;
    memset(s->out, 0, head);
    e->check = 0;
    for (uint32_t f = 0; f < e->frames; f++) {
        uint32_t plane = f % e->planes;
        const uint8_t *raw = s->raw + (size_t)(s->split ? f : f - plane) * frame_raw;
        if (e->planes > 1 && !s->split) {
            if (!plane) split_planes(raw, frame_raw, e->planes, p->plane);
            raw = p->plane + plane * frame_raw;
        }
        size_t got = literals ? kvt_literals(p->literals, s->out + at, raw, frame_raw)
                              : ZSTD_compress2(p->zstd, s->out + at, s->out_cap - at, raw, frame_raw);
        if (ZSTD_isError(got)) return kv_fail(err, KV_ENOMEM, "cannot compress: %s", ZSTD_getErrorName(got));
        kv_put32(s->out + 88 + 8 * (size_t)f, (uint32_t)got);
        kv_put32(s->out + 92 + 8 * (size_t)f, (uint32_t)frame_raw);
        at += got;
        e->check = kv_crc32(e->check, s->out + at - 4, 4); /* a frame ends with the checksum of its content */
    }
    e->stored = at - head;
    e->crc = kv_crc32(0, s->out + head, at - head);
    kv_put32(s->out + 16, KVT_REC_BYTES);
    kvt_put_record(s->out + 24, e);
    kvt_seal(s->out, head, KVT_CHUNK);
    s->out_bytes = at;
    return KV_OK;
}

/* A slot's bytes are complete: those on their way arrive, then they are compressed. *cpu_s += seconds of work. */
static kv_status pack_when_there(packer *p, slot *s, double *cpu_s, kv_error *err)
{
    kv_status st = s->src ? s->src->wait(s->src->ctx, s->ticket, err) : KV_OK;
    double t0 = kv_seconds(CLOCK_THREAD_CPUTIME_ID);
    if (!st) st = pack(p, s, err);
    *cpu_s += kv_seconds(CLOCK_THREAD_CPUTIME_ID) - t0;
    return st;
}

/* -------------------------------------------------------------------------------------------- writing */
static kv_status write_all(kv_trace_writer *w, const void *p, size_t n, kv_error *err)
{
    const uint8_t *b = p;
    for (size_t done = 0; done < n;) {
        ssize_t got = write(fileno(w->file.f), b + done, n - done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            const char *name = w->file.partial ? w->file.partial : w->file.path;
            return kv_fail(err, KV_EIO, "cannot write trace '%s': %s%s", name, strerror(errno),
                           w->file.partial ? "; 'kv-trace recover' saves what is complete" : "");
        }
        done += (size_t)got;
    }
    w->at += n;
    return KV_OK;
}

/* Entries from..index_n as a checkpoint or as the index. */
static kv_status write_entries(kv_trace_writer *w, kvt_tag tag, size_t from, uint64_t prev, kv_error *err)
{
    size_t n = w->index_n - from, bytes = KVT_INDEX_MIN + n * KVT_ENT_BYTES;
    uint8_t *b = NULL;
    if (bytes > KVT_INDEX_MAX)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot write trace '%s': %zu chunks, too many", w->file.path, n);
    kv_status st = kv_array(&b, bytes, 1, err);
    if (st) return st;
    kv_put32(b + 16, KVT_ENT_BYTES), kv_put32(b + 20, (uint32_t)n);
    kv_put64(b + 24, prev);
    if (n) memcpy(b + 32, w->index + from * KVT_ENT_BYTES, n * KVT_ENT_BYTES);
    kvt_seal(b, bytes, tag);
    st = write_all(w, b, bytes, err);
    free(b);
    return st;
}

static kv_status write_chunk(kv_trace_writer *w, slot *s, kv_error *err)
{
    kv_status st;
    if (s->st) {
        if (err) *err = s->err;
        return s->st;
    }
    if (w->at - w->ckpt_at >= KVT_CHECKPOINT) {
        uint64_t at = w->at;
        if ((st = write_entries(w, KVT_CKPT, w->ckpt_from, w->ckpt_prev, err))) return st;
        w->ckpt_from = w->index_n, w->ckpt_prev = w->ckpt_at = at;
        if (w->file.partial) fdatasync(fileno(w->file.f));
    }
    s->e.offset = w->at;
    if ((st = write_all(w, s->out, s->out_bytes, err))) return st;
    if ((w->index_n + 1) * KVT_ENT_BYTES > w->index_cap) {
        size_t cap = w->index_cap ? 2 * w->index_cap : 64 * KVT_ENT_BYTES;
        uint8_t *more = realloc(w->index, cap);
        if (!more) return kv_fail(err, KV_ENOMEM, "out of memory: index of %zu chunks", w->index_n);
        w->index = more, w->index_cap = cap;
    }
    uint8_t *p = w->index + KVT_ENT_BYTES * w->index_n++;
    kvt_put_record(p, &s->e);
    kv_put64(p + KVT_REC_BYTES, s->e.offset);
    return KV_OK;
}

static void count(kv_trace_writer *w, const slot *s)
{
    w->usage.raw[s->e.stream % 32] += s->e.raw;
    w->usage.stored[s->e.stream % 32] += s->out_bytes;
}

/* -------------------------------------------------------------------------------------------- threads */
static void set_failed(kv_trace_writer *w, kv_status st, const kv_error *err)
{
    if (!w->st && st) w->st = st, w->err = *err;
}

static void *compressor(void *arg)
{
    kv_trace_writer *w = arg;
    packer p = {0};
    kv_error err = {""};
    kv_status open = packer_open(&p, &err);
    pthread_mutex_lock(&w->lock);
    for (;;) {
        slot *s = NULL;
        for (size_t k = 0; k < w->n_used && !s; k++) {
            slot *c = &w->slot[(w->head + k) % w->n_slot];
            if (c->state == FULL) s = c;
        }
        if (s) {
            s->state = BUSY;
            bool dead = w->st != KV_OK; /* after a failure the rest is only passed through */
            double t = 0;
            pthread_mutex_unlock(&w->lock);
            s->err = err;
            if (!open && !dead) {
                s->st = pack_when_there(&p, s, &t, &s->err);
            } else {
                s->st = open;
                if (s->src) s->src->wait(s->src->ctx, s->ticket, NULL); /* nothing may be on its way to a free slot */
            }
            pthread_mutex_lock(&w->lock);
            w->usage.compress_s += t;
            s->state = DONE;
            pthread_cond_broadcast(&w->moved);
        } else if (w->quit) {
            break;
        } else {
            pthread_cond_wait(&w->moved, &w->lock);
        }
    }
    pthread_mutex_unlock(&w->lock);
    packer_close(&p);
    return NULL;
}

static void *writer_thread(void *arg)
{
    kv_trace_writer *w = arg;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        slot *s = &w->slot[w->head];
        if (w->n_used && s->state == DONE) {
            kv_error err = {""};
            kv_status st = KV_OK;
            bool dead = w->st != KV_OK;
            pthread_mutex_unlock(&w->lock);
            double t0 = kv_seconds(CLOCK_MONOTONIC);
            if (!dead) st = write_chunk(w, s, &err);
            double t = kv_seconds(CLOCK_MONOTONIC) - t0;
            pthread_mutex_lock(&w->lock);
            w->usage.write_s += t;
            set_failed(w, st, &err);
            count(w, s);
            s->state = EMPTY;
            w->head = (w->head + 1) % w->n_slot, w->n_used--;
            pthread_cond_broadcast(&w->moved);
        } else if (w->quit && !w->n_used) {
            break;
        } else {
            pthread_cond_wait(&w->moved, &w->lock);
        }
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* Wait until everything handed in has been written (or dropped after a failure), and stop the threads. */
static void stop(kv_trace_writer *w)
{
    if (!w->n_started) return;
    pthread_mutex_lock(&w->lock);
    while (w->n_used) pthread_cond_wait(&w->moved, &w->lock);
    w->quit = true;
    pthread_cond_broadcast(&w->moved);
    pthread_mutex_unlock(&w->lock);
    for (uint32_t i = 0; i < w->n_started; i++) pthread_join(w->thread[i], NULL);
    w->n_started = 0;
}

static void release(kv_trace_writer *w)
{
    stop(w);
    for (size_t i = 0; w->slot && i < w->n_slot; i++) w->room.free(w->slot[i].raw), free(w->slot[i].out);
    packer_close(&w->own);
    kv_trace_info_free(&w->info);
    pthread_cond_destroy(&w->moved);
    pthread_mutex_destroy(&w->lock);
    free(w->slot), free(w->thread), free(w->index), free(w);
}

/* `raw` bytes of room in a slot. */
static kv_status slot_room(kv_trace_writer *w, slot *s, size_t need, kv_error *err)
{
    if (need <= s->raw_cap) return KV_OK;
    w->room.free(s->raw);
    s->raw_cap = 0;
    if (!(s->raw = w->room.alloc(need)))
        return kv_fail(err, KV_ENOMEM, "out of memory: cannot allocate %zu bytes to write a trace", need);
    s->raw_cap = need;
    return KV_OK;
}

/* One block: raw bytes copied, or src asked to bring them. */
static kv_status submit(kv_trace_writer *w, const kvt_entry *e, const uint8_t *raw, size_t head_stride,
                        const kv_trace_source *src, kv_error *err)
{
    kv_status st = KV_OK;
    slot *s;
    double t0 = kv_seconds(CLOCK_MONOTONIC), copy_s = 0;
    pthread_mutex_lock(&w->lock);
    while (w->n_used == w->n_slot && !w->st) pthread_cond_wait(&w->moved, &w->lock);
    w->usage.wait_s += kv_seconds(CLOCK_MONOTONIC) - t0;
    if (w->st) {
        st = w->st;
        if (err) *err = w->err;
        pthread_mutex_unlock(&w->lock);
        return st;
    }
    s = &w->slot[(w->head + w->n_used) % w->n_slot];
    pthread_mutex_unlock(&w->lock);

    /* The slot is EMPTY and outside the used part of the ring: nobody else looks at it. */
    s->e = *e;
    s->e.seq = w->seq++;
    s->st = KV_OK;
    s->src = src, s->split = src;
    if ((st = slot_room(w, s, e->raw, err))) return st;
    size_t per_head = e->raw / e->head_count;
    if (src) {
        kv_chunk c = {.stream = (kv_stream)e->stream, .layer = e->layer, .head_first = e->head_first};
        c.head_count = e->head_count, c.token_first = (uint32_t)e->token_first, c.token_count = e->token_count;
        c.width = e->width, c.dtype = (kv_dtype)e->dtype;
        if ((st = src->fill(src->ctx, &c, e->planes, s->raw, &s->ticket, err))) return st;
    } else {
        t0 = kv_seconds(CLOCK_MONOTONIC);
        for (uint32_t h = 0; per_head && h < e->head_count; h++)
            memcpy(s->raw + h * per_head, raw + h * head_stride, per_head);
        copy_s = kv_seconds(CLOCK_MONOTONIC) - t0;
    }
    w->meta_last = e->stream == KV_S_META;

    if (!w->n_thread) {
        kv_error why = {""};
        s->st = pack_when_there(&w->own, s, &w->usage.compress_s, &s->err);
        t0 = kv_seconds(CLOCK_MONOTONIC);
        set_failed(w, write_chunk(w, s, &why), &why);
        w->usage.write_s += kv_seconds(CLOCK_MONOTONIC) - t0, w->usage.copy_s += copy_s;
        count(w, s);
        if (w->st && err) *err = w->err;
        return w->st;
    }
    pthread_mutex_lock(&w->lock);
    w->usage.copy_s += copy_s;
    s->state = FULL;
    w->n_used++;
    pthread_cond_broadcast(&w->moved);
    pthread_mutex_unlock(&w->lock);
    return KV_OK;
}

/* --------------------------------------------------------------------------------------------- the API */
static kv_status put_meta(kv_trace_writer *w, kv_error *err)
{
    char *json = NULL;
    kv_status st = kvt_info_to_json(&w->info, &json, err);
    if (!st && strlen(json) > KVT_META_MAX) st = kv_fail(err, KV_EMISUSE, "metadata of more than 16 MiB");
    if (!st) st = kv_trace_put_bytes(w, KV_S_META, json, strlen(json), err);
    free(json);
    return st;
}

kv_status kv_trace_create(const char *path, const kv_trace_info *info, const char *provenance, uint32_t threads,
                          kv_trace_writer **out, kv_error *err)
{
    kv_status st = KV_OK;
    kv_trace_writer *w = NULL;
    uint8_t head[KVT_HEAD_BYTES] = {0};
    *out = NULL;
    if ((st = kvt_check_info(info, err))) return st;
    if ((st = kv_array(&w, 1, sizeof *w, err))) return st;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->moved, NULL);
    w->room = (kv_trace_memory){malloc, free};
    w->n_thread = w->usage.threads = threads < 256 ? threads : 256;
    /* Blocks leave in order: enough of them that a large one at the head does not stop the rest. */
    w->n_slot = threads ? 4 * w->n_thread + 4 : 1;
    if ((st = kv_array(&w->slot, w->n_slot, sizeof *w->slot, err)) ||
        (st = kv_array(&w->thread, w->n_thread + 1, sizeof *w->thread, err)) ||
        (st = kv_trace_info_copy(info, &w->info, err)) || (!threads && (st = packer_open(&w->own, err))) ||
        (st = kv_outfile_open(path, &w->file, err)))
        goto out;
    for (uint32_t i = 0; threads && i <= w->n_thread; i++) {
        int e = pthread_create(&w->thread[i], NULL, i ? compressor : writer_thread, w);
        if (e) {
            st = kv_fail(err, KV_ENOMEM, "cannot start thread %u: %s", i + 1, strerror(e));
            goto out;
        }
        w->n_started++;
    }
    kv_put16(head + 16, KVT_MAJOR), kv_put16(head + 18, KVT_MINOR);
    kvt_seal(head, sizeof head, KVT_HEAD);
    if ((st = write_all(w, head, sizeof head, err)) || (st = put_meta(w, err))) goto out;
    if (provenance) st = kv_trace_put_bytes(w, KV_S_PROVENANCE, provenance, strlen(provenance), err);
out:
    if (st) {
        /* Nothing worth keeping was written. */
        stop(w);
        kv_outfile_abandon(&w->file);
        release(w);
        w = NULL;
    }
    *out = w;
    return st;
}

/* A chunk in blocks, from memory or from a source. */
static kv_status put_blocks(kv_trace_writer *w, const kv_chunk *c, const void *raw, const kv_trace_source *src,
                            kv_error *err)
{
    size_t size = kv_dtype_bytes(c->dtype), row, all;
    const kvt_stream_info *s = kvt_stream((uint32_t)c->stream);
    kv_status st = KV_OK;
    if (!s || s->kind == 'b' || !size || !c->width || !c->head_count || !c->token_count || c->layer >= KV_LAYERS_MAX ||
        c->head_count > KV_HEADS_MAX || c->head_first > KV_HEADS_MAX - c->head_count || c->width > KV_TOKENS_MAX ||
        c->token_first > KVT_RAW_MAX - c->token_count || c->token_count > KVT_RAW_MAX ||
        !kv_mul(c->width, size, &row) || row > KVT_RAW_MAX || !kv_mul(row, c->token_count, &all) ||
        !kv_mul(all, c->head_count, &all))
        return kv_fail(err, KV_EMISUSE, "bad chunk: stream %d layer %u heads %u+%u tokens %u+%u width %u",
                       (int)c->stream, c->layer, c->head_first, c->head_count, c->token_first, c->token_count,
                       c->width);
    /* Blocks of at most 1,024 rows, and of as many heads, in equal parts, as fit into 2 MiB (one row of one head is
     * never split): many threads then have much the same to do, whatever the stream. */
    size_t rows = KVT_BLOCK_BYTES / row, heads, parts, stride = row * c->token_count;
    rows = rows < 1 ? 1 : rows > KVT_BLOCK_ROWS ? KVT_BLOCK_ROWS : rows;
    rows = rows > c->token_count ? c->token_count : rows;
    heads = KVT_BLOCK_BYTES / (row * rows);
    parts = heads < 1 ? c->head_count : (c->head_count + heads - 1) / heads;
    heads = (c->head_count + parts - 1) / parts;
    kvt_entry e = {.stream = (uint16_t)c->stream, .layer = (uint16_t)c->layer, .width = c->width};
    e.dtype = (uint8_t)c->dtype;
    for (uint32_t t = 0; t < c->token_count && !st; t += (uint32_t)rows)
        for (uint32_t h = 0; h < c->head_count && !st; h += (uint32_t)heads) {
            e.head_first = (uint16_t)(c->head_first + h), e.token_first = (uint64_t)c->token_first + t;
            e.head_count = (uint16_t)(c->head_count - h < heads ? c->head_count - h : heads);
            e.token_count = c->token_count - t < rows ? c->token_count - t : (uint32_t)rows;
            /* A frame costs some 21 bytes: planes of a few values are not worth theirs. */
            bool split = size > 1 && (uint64_t)e.token_count * c->width >= KVT_PLANE_MIN;
            e.filter = split ? KVT_FILTER_PLANES : KVT_FILTER_NONE;
            e.planes = split ? (uint8_t)size : 1;
            e.frames = (uint32_t)e.head_count * e.planes;
            e.raw = (uint64_t)row * e.token_count * e.head_count;
            st = submit(w, &e, raw ? (const uint8_t *)raw + h * stride + t * row : NULL, stride, src, err);
        }
    return st;
}

kv_status kv_trace_put(kv_trace_writer *w, const kv_chunk *c, const void *raw, kv_error *err)
{
    return put_blocks(w, c, raw, NULL, err);
}

kv_status kv_trace_put_from(kv_trace_writer *w, const kv_chunk *c, const kv_trace_source *src, kv_error *err)
{
    return put_blocks(w, c, NULL, src, err);
}

kv_status kv_trace_flush(kv_trace_writer *w, kv_error *err)
{
    pthread_mutex_lock(&w->lock);
    while (w->n_used) pthread_cond_wait(&w->moved, &w->lock);
    kv_status st = w->st;
    if (st && err) *err = w->err;
    pthread_mutex_unlock(&w->lock);
    return st;
}

kv_status kv_trace_writer_memory(kv_trace_writer *w, const kv_trace_memory *room, size_t slot_bytes, kv_error *err)
{
    kv_status st = kv_trace_flush(w, err);
    for (size_t i = 0; i < w->n_slot; i++) {
        w->room.free(w->slot[i].raw);
        w->slot[i].raw = NULL, w->slot[i].raw_cap = 0;
    }
    w->room = *room;
    for (size_t i = 0; i < w->n_slot && !st; i++) st = slot_room(w, &w->slot[i], slot_bytes, err);
    return st;
}

kv_status kv_trace_put_f32(kv_trace_writer *w, const kv_chunk *c, const float *v, kv_error *err)
{
    size_t n, bytes;
    void *raw = NULL;
    kv_status st;
    if (c->dtype == KV_F32) return kv_trace_put(w, c, v, err);
    if (c->dtype != KV_F16 && c->dtype != KV_BF16)
        return kv_fail(err, KV_EMISUSE, "bad chunk: floats cannot be stored as %s", kv_dtype_name(c->dtype));
    if (!kv_mul(c->head_count, c->token_count, &n) || !kv_mul(n, c->width, &n) || !kv_mul(n, 2, &bytes))
        return kv_fail(err, KV_EMISUSE, "bad chunk: too large");
    if ((st = kv_array(&raw, bytes, 1, err))) return st;
    if (!kv_encode_f32(c->dtype, v, n, raw)) {
        const char *name = kv_stream_name(c->stream);
        st = kv_fail(err, KV_EUNSUPPORTED,
                     "cannot store %s of layer %u as f16: a value is beyond 65504; use --dtype bf16 or f32",
                     name ? name : "values", c->layer);
    } else {
        st = kv_trace_put(w, c, raw, err);
    }
    free(raw);
    return st;
}

kv_status kv_trace_put_bytes(kv_trace_writer *w, kv_stream s, const void *p, size_t n, kv_error *err)
{
    const kvt_stream_info *i = kvt_stream((uint32_t)s);
    if (!i || i->kind != 'b') return kv_fail(err, KV_EMISUSE, "stream %d does not hold bytes", (int)s);
    if (n > KVT_BYTES_MAX)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot store %s: %zu bytes, more than 256 MiB", i->name, n);
    kvt_entry e = {.stream = (uint16_t)s, .head_count = 1, .token_count = (uint32_t)n, .width = 1};
    e.dtype = KV_U8, e.planes = 1, e.frames = 1, e.raw = n;
    return submit(w, &e, p, n, NULL, err);
}

kv_status kv_trace_set_info(kv_trace_writer *w, const kv_trace_info *info, kv_error *err)
{
    kv_trace_info copy;
    kv_status st = kvt_check_info(info, err);
    if (st || (st = kv_trace_info_copy(info, &copy, err))) return st;
    kv_trace_info_free(&w->info);
    w->info = copy;
    return put_meta(w, err);
}

kv_status kv_trace_finish(kv_trace_writer *w, kv_error *err)
{
    uint8_t foot[KVT_FOOT_BYTES] = {0};
    uint64_t index_at;
    /* Metadata stands at both ends, so that one damaged place does not make the file unreadable for recover. */
    kv_status st = w->meta_last ? KV_OK : put_meta(w, err);
    stop(w);
    if (!st && w->st) {
        st = w->st;
        if (err) *err = w->err;
    }
    index_at = w->at;
    if (!st) st = write_entries(w, KVT_INDEX, 0, 0, err);
    kv_put64(foot + 16, index_at), kv_put64(foot + 24, w->at - index_at);
    kv_put64(foot + 32, w->index_n), kv_put64(foot + 40, w->info.n_token);
    memcpy(foot + 48, "KVTDONE1", 8);
    kvt_seal(foot, sizeof foot, KVT_FOOT);
    if (!st) st = write_all(w, foot, sizeof foot, err);
    /* A full disk may show only here; unlike commit, abandon leaves the partial for recover. */
    if (!st && w->file.partial && fsync(fileno(w->file.f)))
        st = kv_fail(err, KV_EIO, "cannot write trace '%s': %s", w->file.partial, strerror(errno));
    if (!st && kv_text_lost())
        st = kv_fail(err, KV_ENOMEM, "cannot write trace '%s': out of memory for its metadata", w->file.path);
    if (!st) {
        st = kv_outfile_commit(&w->file, err); /* removes the partial when the rename fails */
        release(w);
    } else {
        kv_trace_abandon(w);
    }
    return st;
}

void kv_trace_abandon(kv_trace_writer *w)
{
    if (!w) return;
    stop(w);
    free(w->file.partial), w->file.partial = NULL; /* stays on the disk for recover */
    kv_outfile_abandon(&w->file);
    release(w);
}

void kvt_discard(kv_trace_writer *w)
{
    if (!w) return;
    stop(w);
    kv_outfile_abandon(&w->file);
    release(w);
}

kv_trace_usage kv_trace_writer_usage(const kv_trace_writer *w)
{
    kv_trace_writer *m = (kv_trace_writer *)w; /* the lock is not part of what const promises */
    pthread_mutex_lock(&m->lock);
    kv_trace_usage u = m->usage;
    pthread_mutex_unlock(&m->lock);
    return u;
}
