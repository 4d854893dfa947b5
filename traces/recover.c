/* recover.c - what can still be read of a damaged or unfinished trace (format.h: kvt_salvage, kvt_consistent).
 *
 * The file is walked from skippable frame to skippable frame. A good chunk header is taken at its word and its payload
 * checked; where the walk is lost, the next tag is looked for at every byte. A chunk whose header is damaged may still
 * be known from the index or a checkpoint: its record is complete, and its frames know their own sizes. */
#include "traces/cli.h"
#include "traces/format.h"

#include <stdlib.h>

typedef struct {
    kv_trace *t;
    uint8_t *buf; /* one skippable frame */
    size_t cap;
    kvt_entry *listed; /* from the index and checkpoints */
    size_t n_listed, n_cap;
    uint64_t covered; /* bytes that are understood */
    uint64_t last_seq;
    bool any_seq;
    uint64_t bad_meta[16]; /* numbers of metadata chunks that are damaged: one good one is enough */
    uint32_t n_bad_meta;
    kvt_damage *d;
} scan;

static kv_status buffer(scan *s, size_t need, kv_error *err)
{
    if (need <= s->cap) return KV_OK;
    free(s->buf);
    s->cap = 0;
    if (!(s->buf = malloc(need))) return kv_fail(err, KV_ENOMEM, "out of memory: %zu bytes", need);
    s->cap = need;
    return KV_OK;
}

static kv_status add(scan *s, const kvt_entry *e, kv_error *err)
{
    kv_trace *t = s->t;
    if (t->n == s->n_cap) {
        size_t cap = s->n_cap ? 2 * s->n_cap : 64;
        kvt_entry *more = realloc(t->entry, cap * sizeof *more);
        if (!more) return kv_fail(err, KV_ENOMEM, "out of memory: %zu chunks", t->n);
        t->entry = more, s->n_cap = cap;
    }
    t->entry[t->n++] = *e;
    return KV_OK;
}

/* Does the checksum hold? A payload that cannot be read (the disk says so) is not called damaged: try again. */
static kv_status payload_good(const kv_trace *t, const kvt_entry *e, bool *good, kv_error *err)
{
    uint8_t b[16384];
    uint64_t at = e->offset + kvt_header_bytes(e), left = e->stored;
    uint32_t crc = 0;
    while (left) {
        size_t n = left < sizeof b ? (size_t)left : sizeof b;
        kv_status st = kvt_read_at(t, at, n, b, err);
        if (st) return st;
        crc = kv_crc32(crc, b, n);
        at += n, left -= n;
    }
    *good = crc == e->crc;
    return KV_OK;
}

static void seen(scan *s, const kvt_entry *e)
{
    if (!s->any_seq || e->seq > s->last_seq) s->last_seq = e->seq;
    s->any_seq = true;
}

static void lost(scan *s, const kvt_entry *e)
{
    if (e->stream != KV_S_META) {
        s->d->bad_chunks++;
        return;
    }
    for (uint32_t i = 0; i < s->n_bad_meta; i++)
        if (s->bad_meta[i] == e->seq) return;
    if (s->n_bad_meta < 16) s->bad_meta[s->n_bad_meta++] = e->seq;
}

/* A frame with tag `tag` of `bytes` is in s->buf. *next = where the walk goes on; false = not what it seems. */
static bool take(scan *s, uint64_t at, size_t bytes, kvt_tag tag, uint64_t *next, kv_status *st, kv_error *err)
{
    kvt_entry e = {0};
    bool good = false;
    if (!kvt_sealed(s->buf, bytes, tag)) return false;
    *next = at + bytes;
    switch (tag) {
    case KVT_CHUNK:
        if (bytes < KVT_CHUNK_MIN || kv_get32(s->buf + 16) < KVT_REC_BYTES) return false;
        kvt_get_record(s->buf + 24, &e);
        e.offset = at;
        if (kvt_check_record(&e, s->t->path, NULL) || kvt_header_bytes(&e) != bytes) return false;
        seen(s, &e);
        if (e.stored > s->t->size - *next) { /* cut off */
            lost(s, &e);
            *next = s->t->size;
            return true;
        }
        *next += e.stored;
        if ((*st = payload_good(s->t, &e, &good, err))) return true;
        if (good) {
            s->covered += bytes + e.stored;
            *st = add(s, &e, err);
        } else {
            lost(s, &e);
        }
        return true;
    case KVT_HEAD:
        if (bytes == KVT_HEAD_BYTES && (kv_get16(s->buf + 16) != KVT_MAJOR || kv_get64(s->buf + 24)))
            *st = kv_fail(err, KV_EUNSUPPORTED, "cannot recover '%s': a later version of the format wrote it",
                          s->t->path);
        break;
    case KVT_CKPT:
    case KVT_INDEX:
        *st = kvt_parse_index(s->buf, bytes, &s->listed, &s->n_listed, s->t->path, err);
        if (*st == KV_EFORMAT || *st == KV_EUNSUPPORTED) *st = KV_OK; /* the headers have it all */
        break;
    case KVT_FOOT: s->d->finished = true; break;
    default: break;
    }
    s->covered += bytes;
    return true;
}

/* The next place at or behind `at` where one of our frames may begin, or the size of the file. */
static kv_status find_tag(scan *s, uint64_t at, uint64_t *out, kv_error *err)
{
    kv_status st = KV_OK;
    const size_t window = 1 << 20;
    for (*out = s->t->size; at + 20 <= s->t->size; at += window - 19) {
        size_t n = s->t->size - at < window ? (size_t)(s->t->size - at) : window;
        if ((st = buffer(s, n, err)) || (st = kvt_read_at(s->t, at, n, s->buf, err))) return st;
        for (uint8_t *p = s->buf, *end = s->buf + n - 16; p < end; p++) {
            size_t bytes;
            p = memchr(p, KVT_SKIPPABLE & 255, (size_t)(end - p));
            if (!p) break;
            if (kvt_tag_at(p, &bytes) >= 0) {
                *out = at + (uint64_t)(p - s->buf);
                return KV_OK;
            }
        }
    }
    return st;
}

/* Chunks that only the index or a checkpoint knows: the header on the disk is damaged. */
static kv_status add_listed(scan *s, kv_error *err)
{
    kv_trace *t = s->t;
    kv_status st = KV_OK;
    size_t n_walked = t->n;
    for (size_t i = 0; i < s->n_listed && !st; i++) {
        kvt_entry *e = &s->listed[i];
        size_t lo = 0, hi = n_walked;
        while (lo < hi) { /* found in ascending order of offset */
            size_t mid = lo + (hi - lo) / 2;
            if (t->entry[mid].offset < e->offset)
                lo = mid + 1;
            else
                hi = mid;
        }
        bool known = lo < n_walked && t->entry[lo].offset == e->offset;
        for (size_t k = n_walked; k < t->n && !known; k++) known = t->entry[k].offset == e->offset;
        uint64_t bytes = kvt_header_bytes(e) + e->stored;
        if (known || e->offset > t->size || bytes > t->size - e->offset || !kvt_stream(e->stream)) continue;
        seen(s, e);
        bool good = false;
        if ((st = payload_good(t, e, &good, err))) break;
        if (!good) {
            if (e->stream == KV_S_META) lost(s, e);
            continue;
        }
        e->walk = true;
        s->covered += e->stored;
        st = add(s, e, err);
    }
    return st;
}

/* Overlapping claims cannot both be right; the copy must not trip over them. */
static int by_place(const void *a, const void *b)
{
    const kvt_entry *x = a, *y = b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static void drop_overlaps(kv_trace *t)
{
    uint64_t end = KVT_HEAD_BYTES;
    size_t n = 0;
    if (t->n) qsort(t->entry, t->n, sizeof *t->entry, by_place);
    for (size_t i = 0; i < t->n; i++) {
        const kvt_entry *e = &t->entry[i];
        if (e->offset < end) continue;
        end = e->offset + kvt_header_bytes(e) + e->stored;
        t->entry[n++] = *e;
    }
    t->n = n;
}

kv_status kvt_salvage(const char *path, kv_trace **out, kvt_damage *d, kv_error *err)
{
    kv_status st;
    scan s = {.d = d};
    memset(d, 0, sizeof *d);
    *out = NULL;
    if ((st = kvt_attach(path, &s.t, err))) return st;
    kv_progress *bar = kv_progress_start("scanning", (double)s.t->size, "bytes");
    uint64_t at = 0, next, found = 0;
    while (at + 20 <= s.t->size && !st) {
        uint8_t h[16];
        size_t bytes;
        if ((st = kvt_read_at(s.t, at, sizeof h, h, err))) break;
        int tag = kvt_tag_at(h, &bytes);
        size_t most = tag == KVT_CHUNK ? KVT_CHUNK_MIN + 8 * 4 * (size_t)KV_HEADS_MAX : KVT_INDEX_MAX;
        bool good = tag >= 0 && bytes <= most && bytes <= s.t->size - at && bytes >= 20;
        if (good && !(st = buffer(&s, bytes, err)) && !(st = kvt_read_at(s.t, at, bytes, s.buf, err)))
            good = take(&s, at, bytes, (kvt_tag)tag, &next, &st, err);
        if (st) break;
        found += good;
        if (!good && (st = find_tag(&s, at + 1, &next, err))) break;
        at = next;
        kv_progress_step(bar, (double)at, NULL);
        if (kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    kv_progress_end(bar);
    if (!st) st = add_listed(&s, err);
    if (st) goto out;
    if (!found) {
        st = kv_fail(err, KV_EFORMAT, "cannot recover '%s': nothing in it looks like a trace", path);
        goto out;
    }
    drop_overlaps(s.t);
    s.t->data_end = s.t->size;
    d->bad_bytes = s.t->size - (s.covered < s.t->size ? s.covered : s.t->size);
    /* Numbers run without gaps: one that is missing was a chunk, unless it was metadata, of which one is enough. */
    if ((st = kvt_adopt(s.t, err)) || (st = kvt_load_info(s.t, err))) goto out;
    uint64_t want = s.any_seq ? s.last_seq + 1 : 0, have;
    bool first_meta = false;
    for (size_t i = 0; i < s.t->n; i++) first_meta |= s.t->entry[i].stream == KV_S_META && s.t->entry[i].seq == 0;
    for (uint32_t i = 0; i < s.n_bad_meta; i++) first_meta |= s.bad_meta[i] == 0;
    have = s.t->n + s.n_bad_meta + !first_meta; /* chunk 0 is metadata, even when nothing of it is left */
    if (want > have && want - have > d->bad_chunks) d->bad_chunks = want - have;
    d->ended = d->finished;
    for (size_t i = 0; i < s.t->n && want > 1; i++)
        d->ended |= s.t->entry[i].stream == KV_S_META && s.t->entry[i].seq == want - 1;
    *out = s.t;
    s.t = NULL;
out:
    kv_trace_close(s.t);
    free(s.buf);
    free(s.listed);
    return st;
}

/* ------------------------------------------------------------------------------------- a consistent part */
/* Streams that a layer must have for every token, when any layer has them at all. */
static bool by_prefix(const kv_trace *t, uint32_t s)
{
    bool all_q = t->info.record && !strcmp(t->info.record, "qkv");
    return s == KV_S_K || s == KV_S_V || s == KV_S_LSE || s == KV_S_ROWSTAT || s == KV_S_XNORM ||
           (s == KV_S_Q && all_q);
}

static uint64_t cells(const kv_trace *t, uint32_t s, uint32_t layer)
{
    size_t count, first = kvt_group(t, s, layer, &count);
    uint64_t n = 0;
    for (size_t i = first; i < first + count; i++) n += (uint64_t)t->entry[i].head_count * t->entry[i].token_count;
    return n;
}

kv_status kvt_consistent(const kv_trace *t, kvt_part *part, uint32_t *dropped_layers, uint32_t *dropped_tokens,
                         kv_error *err)
{
    const kv_trace_info *in = &t->info;
    kv_status st = KV_OK;
    uint32_t *whole = NULL; /* [layer] rows 0..whole-1 are there in every stream */
    uint32_t best = 0, n;
    uint64_t score = 0;
    bool any = in->record && !strcmp(in->record, "tokens");
    memset(part, 0, sizeof *part);
    if ((st = kv_array(&whole, in->n_layer, sizeof *whole, err)) ||
        (st = kv_array(&part->layer, in->n_layer, sizeof *part->layer, err)))
        goto out;
    for (uint32_t l = 0; l < in->n_layer; l++) whole[l] = in->n_token;
    for (uint32_t s = 1; s < 32; s++) {
        const kvt_stream_info *si = kvt_stream(s);
        bool optional = s == KV_S_WO || s == KV_S_POST_NORM || s == KV_S_X || s == KV_S_OUT;
        uint64_t most = 0;
        if (!si || si->kind == 't' || si->kind == 'b') continue;
        for (uint32_t l = 0; l < in->n_layer; l++) any |= cells(t, s, in->layer[l]) > 0;
        if (optional) continue;
        for (uint32_t l = 0; l < in->n_layer; l++) {
            uint64_t c = cells(t, s, in->layer[l]);
            if (c > most) most = c;
        }
        for (uint32_t l = 0; l < in->n_layer && most; l++) {
            if (!by_prefix(t, s)) {
                /* As much as the other layers, or as nothing; a run cut short has no last rows anywhere. */
                uint64_t c = cells(t, s, in->layer[l]);
                if (s == KV_S_Q ? !c : c < most) whole[l] = 0;
                continue;
            }
            for (uint32_t h = 0; h < kvt_heads(in, s); h++) {
                uint64_t end = kvt_run_end(t, s, in->layer[l], h, 0);
                if (end < whole[l]) whole[l] = (uint32_t)end;
            }
        }
    }
    /* The prefix that keeps most rows times layers; a longer prefix wins a draw. */
    for (uint32_t l = 0; l < in->n_layer && any; l++) {
        uint64_t with = 0;
        for (uint32_t k = 0; k < in->n_layer; k++) with += whole[k] >= whole[l];
        if (whole[l] >= in->n_prompt && (with * whole[l] > score || (with * whole[l] == score && whole[l] > best)))
            score = with * whole[l], best = whole[l];
    }
    if (!best) {
        st = kv_fail(err, KV_EFORMAT, "nothing usable in '%s': no layer is complete", t->path);
        goto out;
    }
    for (uint32_t l = n = 0; l < in->n_layer; l++)
        if (whole[l] >= best) part->layer[n++] = in->layer[l];
    part->n_layer = n, part->n_token = best;
    *dropped_layers = in->n_layer - n, *dropped_tokens = in->n_token - best;
out:
    if (st) free(part->layer), part->layer = NULL;
    free(whole);
    return st;
}
