/* lookup.c - questions to an open trace: which rows are there, read them, metadata, W_O. */
#include "traces/format.h"

#include <inttypes.h>
#include <stdlib.h>

const kv_trace_info *kv_trace_get_info(const kv_trace *t)
{
    return &t->info;
}

const char *kv_trace_path(const kv_trace *t)
{
    return t->path;
}

const char *kv_trace_content_sha256(const kv_trace *t)
{
    return t->sha;
}

size_t kvt_group(const kv_trace *t, uint32_t stream, uint32_t layer, size_t *count)
{
    size_t lo = 0, hi = t->n, first;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        const kvt_entry *e = &t->entry[mid];
        if (e->stream < stream || (e->stream == stream && e->layer < layer))
            lo = mid + 1;
        else
            hi = mid;
    }
    first = lo;
    while (lo < t->n && t->entry[lo].stream == stream && t->entry[lo].layer == layer) lo++;
    *count = lo - first;
    return first;
}

/* The chunk that holds `row` of `head`, searched from entry *from of the group (rows are asked for in order). */
static const kvt_entry *find(const kv_trace *t, size_t first, size_t count, size_t *from, uint32_t head, uint64_t row)
{
    for (size_t k = 0; k < count; k++) {
        size_t i = first + (*from + k) % count;
        const kvt_entry *e = &t->entry[i];
        if (e->token_first <= row && row - e->token_first < e->token_count && e->head_first <= head &&
            head - e->head_first < e->head_count)
            return *from = i - first, e;
    }
    return NULL;
}

uint64_t kvt_run_end(const kv_trace *t, uint32_t stream, uint32_t layer, uint32_t head, uint64_t from)
{
    size_t count, first = kvt_group(t, stream, layer, &count), at = 0;
    const kvt_entry *e;
    while (count && (e = find(t, first, count, &at, head, from))) from = e->token_first + e->token_count;
    return from;
}

uint64_t kv_trace_largest_chunk(const kv_trace *t)
{
    uint64_t most = t->side ? kv_trace_largest_chunk(t->side) : 0;
    for (size_t i = 0; i < t->n; i++)
        if (t->entry[i].raw > most) most = t->entry[i].raw;
    return most;
}

bool kv_trace_has(const kv_trace *t, kv_stream s, uint32_t layer, uint32_t head, uint32_t a, uint32_t b)
{
    size_t count;
    kvt_group(t, (uint32_t)s, layer, &count);
    if (!count) return false;
    const kvt_stream_info *i = kvt_stream((uint32_t)s);
    return i && (i->kind == 'b' || kvt_run_end(t, (uint32_t)s, layer, head, a) >= b);
}

uint32_t kv_trace_width(const kv_trace *t, kv_stream s)
{
    for (size_t i = 0; i < t->n; i++)
        if (t->entry[i].stream == (uint32_t)s) return t->entry[i].width;
    return 0;
}

void kvt_rows_text(const kv_trace *t, uint32_t stream, uint32_t layer, uint32_t head, char *s, size_t n)
{
    size_t count, first = kvt_group(t, stream, layer, &count), len = 0;
    uint64_t end = 0;
    snprintf(s, n, "none");
    for (size_t i = first; i < first + count && len + 48 < n; i++) {
        const kvt_entry *e = &t->entry[i];
        if (head < e->head_first || head - e->head_first >= e->head_count || (len && e->token_first < end)) continue;
        end = kvt_run_end(t, stream, layer, head, e->token_first);
        len += (size_t)snprintf(s + len, n - len, "%s%" PRIu64 ":%" PRIu64, len ? "," : "", e->token_first, end);
    }
}

/* ------------------------------------------------------------------------------------------- reading */
static kv_status missing(const kv_trace *t, uint32_t stream, uint32_t layer, uint32_t head, uint32_t a, uint32_t b,
                         kv_error *err)
{
    const kvt_stream_info *s = kvt_stream(stream);
    char rows[256];
    kvt_rows_text(t, stream, layer, head, rows, sizeof rows);
    return kv_fail(err, KV_EMISSING,
                   "trace '%s' (recorded at level '%s') holds no %s for layer %u head %u rows %u:%u (stored rows: "
                   "%s)%s%s",
                   t->path, t->info.record ? t->info.record : "?", s ? s->name : "such stream", layer, head, a, b, rows,
                   s && s->level ? "; capture with " : "", s && s->level ? s->level : "");
}

static kv_status read_rows(const kv_trace *t, kv_stream s, uint32_t layer, uint32_t head, uint32_t a, uint32_t b,
                           kv_dtype to, void *dst, kv_error *err)
{
    size_t count, first = kvt_group(t, (uint32_t)s, layer, &count), at = 0;
    uint8_t *p = dst;
    kv_status st;
    for (uint32_t row = a; row < b;) {
        const kvt_entry *e = count ? find(t, first, count, &at, head, row) : NULL;
        if (!e) return missing(t, (uint32_t)s, layer, head, a, b, err);
        bool floats = e->dtype == KV_F32 || e->dtype == KV_F16 || e->dtype == KV_BF16;
        if (to == KV_F32 ? !floats : e->dtype != to)
            return kv_fail(err, KV_EMISSING, "trace '%s': %s holds %s, not %s", t->path, kv_stream_name(s),
                           kv_dtype_name((kv_dtype)e->dtype), kv_dtype_name(to));
        uint64_t end = e->token_first + e->token_count;
        uint32_t stop = end < b ? (uint32_t)end : b;
        if ((st = kvt_read_head(t, e, head, row, stop, to, p, err))) return st;
        p += (size_t)(stop - row) * e->width * kv_dtype_bytes(to);
        row = stop;
    }
    return KV_OK;
}

kv_status kv_trace_read_f32(const kv_trace *t, kv_stream s, uint32_t layer, uint32_t head, uint32_t a, uint32_t b,
                            float *dst, kv_error *err)
{
    return read_rows(t, s, layer, head, a, b, KV_F32, dst, err);
}

kv_status kv_trace_read_u32(const kv_trace *t, kv_stream s, uint32_t a, uint32_t b, uint32_t *dst, kv_error *err)
{
    return read_rows(t, s, 0, 0, a, b, KV_U32, dst, err);
}

kv_status kv_trace_read_bytes(const kv_trace *t, kv_stream s, char **out, size_t *n, kv_error *err)
{
    size_t count, first = kvt_group(t, (uint32_t)s, 0, &count);
    const kvt_stream_info *i = kvt_stream((uint32_t)s);
    const kvt_entry *e;
    char *p = NULL;
    kv_status st;
    *out = NULL, *n = 0;
    if (!i || i->kind != 'b') return kv_fail(err, KV_EMISUSE, "stream %d does not hold bytes", (int)s);
    if (!count) return kv_fail(err, KV_EMISSING, "trace '%s' holds no %s", t->path, i->name);
    e = &t->entry[first];
    for (size_t k = 1; k < count; k++) /* the last one counts */
        if (t->entry[first + k].seq > e->seq) e = &t->entry[first + k];
    if (!(p = malloc((size_t)e->raw + 1))) return kv_fail(err, KV_ENOMEM, "out of memory: %" PRIu64 " bytes", e->raw);
    if ((st = kvt_read_chunk(t, e, (uint8_t *)p, err))) {
        free(p);
        return st;
    }
    p[e->raw] = 0;
    *out = p, *n = (size_t)e->raw;
    return KV_OK;
}

/* ----------------------------------------------------------------------------------------------- W_O */
/* The side file beside the trace, opened once. Its own metadata repeats the hash; the elements are under the checksums
 * of the file, and `verify --deep` recomputes the hash itself. */
const kv_trace *kvt_side(const kv_trace *ct, kv_error *err)
{
    kv_trace *t = (kv_trace *)ct; /* opened once, behind the lock */
    if (!t->info.wo_sha256 || t->fd < 0) {
        kv_fail(err, KV_EMISSING, "trace '%s' holds no W_O and names no side file; capture with --wo auto", t->path);
        return NULL;
    }
    pthread_mutex_lock(&t->lock);
    if (!t->side_tried) {
        char *path = kv_wo_path(t->path, t->info.wo_sha256);
        kv_error why = {""};
        kv_status st = path ? kv_trace_open(path, &t->side, &why) : kv_fail(&why, KV_ENOMEM, "out of memory");
        if (!st && (!t->side->info.wo_sha256 || strcmp(t->side->info.wo_sha256, t->info.wo_sha256))) {
            kv_fail(&why, KV_EFORMAT, "'%s' holds other weights than the trace names", path);
            kv_trace_close(t->side);
            t->side = NULL;
        }
        if (!t->side)
            kv_fail(&t->side_why, KV_EMISSING, "trace '%s' keeps W_O in a side file: %.700s", t->path, why.msg);
        t->side_tried = true;
        free(path);
    }
    pthread_mutex_unlock(&t->lock);
    if (!t->side && err) *err = t->side_why;
    return t->side;
}

bool kv_trace_has_wo(const kv_trace *t, uint32_t layer)
{
    if (kv_trace_has(t, KV_S_WO, layer, 0, 0, t->info.hidden)) return true;
    const kv_trace *side = kvt_side(t, NULL);
    return side && side->info.hidden == t->info.hidden &&
           kv_trace_width(side, KV_S_WO) == t->info.n_q_head * t->info.head_dim &&
           kv_trace_has(side, KV_S_WO, layer, 0, 0, t->info.hidden);
}

kv_status kv_trace_read_wo(const kv_trace *t, uint32_t layer, float *dst, kv_error *err)
{
    if (kv_trace_has(t, KV_S_WO, layer, 0, 0, t->info.hidden))
        return kv_trace_read_f32(t, KV_S_WO, layer, 0, 0, t->info.hidden, dst, err);
    const kv_trace *side = kvt_side(t, err);
    if (!side) return KV_EMISSING;
    if (!kv_trace_has_wo(t, layer))
        return kv_fail(err, KV_EMISSING, "the side file '%s' does not hold W_O of layer %u in the shape of trace '%s'",
                       side->path, layer, t->path);
    return kv_trace_read_f32(side, KV_S_WO, layer, 0, 0, t->info.hidden, dst, err);
}

kv_trace_usage kv_trace_reader_usage(const kv_trace *t)
{
    kv_trace_usage u = {0};
    for (size_t i = 0; i < t->n; i++) {
        const kvt_entry *e = &t->entry[i];
        if (e->stream >= 32) continue; /* a stream of a later version */
        u.raw[e->stream] += e->raw;
        u.stored[e->stream] += kvt_header_bytes(e) + e->stored;
    }
    return u;
}
