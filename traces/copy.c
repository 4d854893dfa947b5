/* copy.c - a part of a trace (some layers, some heads, a prefix of the tokens) as a new trace. Chunk by chunk and in
 * the old order, so that a copy of everything has the old content hash. */
#include "traces/cli.h"
#include "traces/format.h"

#include <stdlib.h>

typedef struct {
    const kv_trace *t;
    const kv_trace_info *old;
    kv_trace_info info; /* of the copy */
    const kvt_part *part;
    kv_trace_writer *w;
    size_t text_end; /* bytes of text that belong to the kept tokens; SIZE_MAX = all */
} job;

static bool has(const uint32_t *list, uint32_t n, uint32_t x)
{
    for (uint32_t i = 0; i < n; i++)
        if (list[i] == x) return true;
    return !list;
}

/* ------------------------------------------------------------------------------------------- metadata */
static kv_status find_text_end(job *j, kv_error *err)
{
    uint32_t n = j->part->n_token, end = 0;
    j->text_end = SIZE_MAX;
    if (!n || n >= j->old->n_token || !kv_trace_has(j->t, KV_S_OFFSETS, 0, 0, n, n + 1)) return KV_OK;
    kv_status st = kv_trace_read_u32(j->t, KV_S_OFFSETS, n, n + 1, &end, err);
    j->text_end = end;
    return st;
}

static kv_status new_info(job *j, kv_error *err)
{
    kv_trace_info *i = &j->info;
    const kvt_part *p = j->part;
    kv_status st = kv_trace_info_copy(j->old, i, err);
    uint32_t n = 0;
    if (st || (st = find_text_end(j, err))) return st;
    for (uint32_t l = 0; l < i->n_layer; l++)
        if (has(p->layer, p->n_layer, i->layer[l])) i->layer[n] = i->layer[l], i->window[n++] = i->window[l];
    i->n_layer = n;
    if (p->head) {
        i->n_q_head = p->n_head * (i->n_q_head / i->n_kv_head);
        i->n_kv_head = p->n_head;
    }
    if (p->n_token && p->n_token < i->n_token) {
        i->n_token = p->n_token;
        if (i->n_prompt > i->n_token) i->n_prompt = i->n_token;
        if (i->n_context > i->n_token) i->n_context = 0;
    }
    n = 0;
    for (uint32_t k = 0; k < i->n_evidence; k++)
        if (i->evidence[k].end <= j->text_end) i->evidence[n++] = i->evidence[k];
    i->n_evidence = n;
    if (i->question.end > j->text_end) i->question = (kv_span){0, 0};
    return KV_OK;
}

/* --------------------------------------------------------------------------------------------- chunks */
/* One past the last row of the stream that the copy has; 0 = leave the stream out. */
static uint64_t row_end(const job *j, uint32_t stream)
{
    uint32_t n = j->info.n_token;
    bool shorter = n < j->old->n_token, less_prompt = n < j->old->n_prompt;
    if (!shorter) return UINT64_MAX;
    switch (stream) {
    case KV_S_POST_NORM:
    case KV_S_WO: return UINT64_MAX; /* its rows are no tokens */
    case KV_S_COLSUM:
    case KV_S_MAP_WINDOW: return less_prompt ? 0 : UINT64_MAX; /* sums over, or rows at the end of, the whole prompt */
    case KV_S_COLSUM_CTX: return n < j->old->n_context ? 0 : UINT64_MAX;
    case KV_S_LOGITS: return less_prompt ? 0 : n;
    case KV_S_OFFSETS: return (uint64_t)n + 1;
    case KV_S_NLL: return n - 1;
    default: return n;
    }
}

/* Columns of W_O that belong to kept heads, in place. */
static uint32_t keep_columns(const job *j, uint8_t *raw, uint32_t rows, size_t size)
{
    uint32_t g = j->old->n_q_head / j->old->n_kv_head, d = j->old->head_dim;
    size_t piece = (size_t)g * d * size;
    uint8_t *to = raw;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t h = 0; h < j->old->n_kv_head; h++, raw += piece)
            if (has(j->part->head, j->part->n_head, h)) memmove(to, raw, piece), to += piece;
    return j->part->n_head * g * d;
}

/* The kept heads, rows and columns of a decoded chunk, moved together; *c describes what is left. */
static void cut(const job *j, const kvt_entry *e, uint8_t *raw, kv_chunk *c)
{
    const kvt_stream_info *s = kvt_stream(e->stream);
    size_t size = kv_dtype_bytes((kv_dtype)e->dtype), width = (size_t)e->width * size;
    uint32_t per = s->kind == 'h' ? j->old->n_q_head / j->old->n_kv_head : 1; /* heads of one KV head */
    uint64_t end = row_end(j, e->stream);
    uint32_t rows = e->token_count;
    if (end < e->token_first + rows) rows = end > e->token_first ? (uint32_t)(end - e->token_first) : 0;
    if (e->stream == KV_S_MAP && j->info.n_token < j->old->n_token) c->width = j->info.n_token;
    size_t new_width = (size_t)c->width * size;
    uint8_t *to = raw;
    uint32_t before = 0, kept = 0;
    for (uint32_t h = 0; h < (uint32_t)e->head_first + e->head_count; h++) {
        bool keep = (s->kind != 'h' && s->kind != 'g') || has(j->part->head, j->part->n_head, h / per);
        if (h < e->head_first) {
            before += keep;
            continue;
        }
        const uint8_t *from = raw + (size_t)(h - e->head_first) * e->token_count * width;
        for (uint32_t r = 0; keep && r < rows; r++, to += new_width) memmove(to, from + r * width, new_width);
        kept += keep;
    }
    c->head_first = s->kind == 'h' || s->kind == 'g' ? before : e->head_first;
    c->head_count = kept, c->token_count = rows;
    if (e->stream == KV_S_WO && j->part->head) c->width = keep_columns(j, raw, rows, size);
}

static kv_status copy_chunk(job *j, const kvt_entry *e, kv_error *err)
{
    const kvt_stream_info *s = kvt_stream(e->stream);
    kv_status st = KV_OK;
    uint8_t *raw = NULL;
    kv_chunk c = {.stream = (kv_stream)e->stream, .layer = e->layer, .width = e->width, .dtype = (kv_dtype)e->dtype};
    if (s->kind != 't' && s->kind != 'b' && !has(j->part->layer, j->part->n_layer, e->layer)) return KV_OK;
    if (!row_end(j, e->stream) || e->token_first >= row_end(j, e->stream)) return KV_OK;
    if (!(raw = malloc(e->raw ? e->raw : 1))) return kv_fail(err, KV_ENOMEM, "out of memory");
    if ((st = kvt_read_chunk(j->t, e, raw, err))) goto out;
    if (s->kind == 'b') {
        st = kv_trace_put_bytes(j->w, c.stream, raw, e->raw < j->text_end ? e->raw : j->text_end, err);
        goto out;
    }
    c.token_first = (uint32_t)e->token_first;
    cut(j, e, raw, &c);
    if (c.head_count && c.token_count) st = kv_trace_put(j->w, &c, raw, err);
out:
    free(raw);
    return st;
}

static int by_seq(const void *a, const void *b)
{
    const kvt_entry *x = *(const kvt_entry *const *)a, *y = *(const kvt_entry *const *)b;
    return x->seq < y->seq ? -1 : x->seq > y->seq;
}

static kv_status copy_all(job *j, const kv_trace *from, bool only_wo, kv_error *err)
{
    const kvt_entry **order = NULL;
    kv_status st = kv_array(&order, from->n, sizeof(void *), err);
    kv_progress *bar = kv_progress_start("copying", (double)from->n, "chunks");
    for (size_t i = 0; !st && i < from->n; i++) order[i] = &from->entry[i];
    if (!st) qsort(order, from->n, sizeof *order, by_seq);
    j->t = from;
    for (size_t i = 0; !st && i < from->n; i++) {
        const kvt_entry *e = order[i];
        bool skip = e->stream == KV_S_META || e->stream == KV_S_PROVENANCE || !kvt_stream(e->stream);
        if (only_wo) skip = e->stream != KV_S_WO;
        if (!skip) st = copy_chunk(j, e, err);
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
        kv_progress_step(bar, (double)i, NULL);
    }
    kv_progress_end(bar);
    free(order);
    return st;
}

/* A reference to the side file stays when the copy stands beside the same file and keeps all heads; otherwise W_O is
 * embedded. A side file that is not there cannot be embedded: then the reference stays. */
static kv_status side_file(const job *j, const char *out, const kv_trace **embed, kv_error *err)
{
    *embed = NULL;
    if (!j->old->wo_sha256) return KV_OK;
    const kv_trace *side = kvt_side(j->t, NULL);
    if (!side) {
        if (!j->part->head) return KV_OK;
        kvt_side(j->t, err);
        return KV_EMISSING;
    }
    char *path = kv_wo_path(out, j->old->wo_sha256);
    kv_trace *there = NULL;
    if (!path) return kv_fail(err, KV_ENOMEM, "out of memory");
    bool beside = !j->part->head && !kv_trace_open(path, &there, NULL) && !strcmp(there->sha, side->sha);
    if (!beside) *embed = side;
    kv_trace_close(there);
    free(path);
    return KV_OK;
}

kv_status kvt_copy(const kv_trace *t, const kvt_part *part, const char *out, uint32_t threads, kv_error *err)
{
    job j = {.t = t, .old = &t->info, .part = part};
    const kv_trace *embed = NULL;
    char *provenance = NULL;
    size_t n = 0;
    kv_status st = KV_OK;
    if ((st = new_info(&j, err)) || (st = side_file(&j, out, &embed, err))) goto out;
    if (embed) free(j.info.wo_sha256), j.info.wo_sha256 = NULL;
    if (kv_trace_has(t, KV_S_PROVENANCE, 0, 0, 0, 0) &&
        (st = kv_trace_read_bytes(t, KV_S_PROVENANCE, &provenance, &n, err)))
        goto out;
    if ((st = kv_trace_create(out, &j.info, provenance, threads, &j.w, err))) goto out;
    st = copy_all(&j, t, false, err);
    if (!st && embed) {
        j.old = &t->info;
        st = copy_all(&j, embed, true, err);
    }
    if (st) goto out;
    st = kv_trace_finish(j.w, err);
    j.w = NULL;
out:
    if (j.w) kvt_discard(j.w);
    kv_trace_info_free(&j.info);
    free(provenance);
    return st;
}
