/* verify.c - is a trace whole, and does what it says add up? (format.h: kvt_verify) */
#include "traces/cli.h"
#include "traces/derive.h"
#include "traces/format.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#define SAMPLE_ROWS 4 /* rows of a head whose attention is recomputed */

/* ------------------------------------------------------------------------------------------- every byte */
static int by_place(const void *a, const void *b)
{
    const kvt_entry *x = *(const kvt_entry *const *)a, *y = *(const kvt_entry *const *)b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Between two chunks only whole skippable frames may stand; ours (checkpoints) must have a right checksum. */
static kv_status check_gap(const kv_trace *t, uint64_t at, uint64_t end, kv_error *err)
{
    kv_status st = KV_OK;
    uint8_t h[16], *b = NULL;
    while (at < end && !st) {
        size_t bytes = 0;
        if (end - at < 20) goto bad;
        if ((st = kvt_read_at(t, at, sizeof h, h, err))) break;
        int tag = kvt_tag_at(h, &bytes);
        if ((kv_get32(h) & 0xfffffff0u) != KVT_SKIPPABLE || bytes > end - at) goto bad;
        if (tag >= 0) {
            if (tag != KVT_CKPT || bytes > KVT_INDEX_MAX) goto bad;
            if (!(b = malloc(bytes))) return kv_fail(err, KV_ENOMEM, "out of memory");
            st = kvt_read_at(t, at, bytes, b, err);
            bool good = st || kvt_sealed(b, bytes, KVT_CKPT);
            free(b);
            if (!good) goto bad;
        }
        at += bytes;
    }
    return st;
bad:
    return kv_fail(err, KV_EFORMAT, "trace '%s': bytes %" PRIu64 " to %" PRIu64 " belong to nothing", t->path, at, end);
}

static kv_status check_bytes(const kv_trace *t, kvt_checked *c, kv_progress *bar, kv_error *err)
{
    const kvt_entry **order = NULL;
    uint64_t at = KVT_HEAD_BYTES;
    kv_status st = kv_array(&order, t->n, sizeof(void *), err);
    for (size_t i = 0; !st && i < t->n; i++) order[i] = &t->entry[i];
    if (!st) qsort(order, t->n, sizeof *order, by_place);
    for (size_t i = 0; !st && i < t->n; i++) {
        const kvt_entry *e = order[i];
        if ((st = check_gap(t, at, e->offset, err)) || (st = kvt_check_chunk(t, e, err))) break;
        at = e->offset + kvt_header_bytes(e) + e->stored;
        c->chunks++, c->frames += e->frames, c->bytes += e->stored;
        kv_progress_step(bar, (double)at, NULL);
        if (kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    if (!st) st = check_gap(t, at, t->data_end, err);
    free(order);
    return st;
}

/* ----------------------------------------------------------------------------------------------- deep */
static kv_status check_overlap(const kv_trace *t, kv_error *err)
{
    for (size_t i = 0; i < t->n; i++)
        for (size_t k = i + 1; k < t->n; k++) {
            const kvt_entry *a = &t->entry[i], *b = &t->entry[k];
            const kvt_stream_info *s = kvt_stream(a->stream);
            if (b->stream != a->stream || b->layer != a->layer || !s || s->kind == 'b' ||
                b->token_first >= a->token_first + a->token_count)
                break; /* sorted by token_first */
            if (a->head_first < b->head_first + b->head_count && b->head_first < a->head_first + a->head_count)
                return kv_fail(err, KV_EFORMAT,
                               "trace '%s': %s of layer %u is stored twice (bytes %" PRIu64 " and %" PRIu64 ")",
                               t->path, s->name, a->layer, a->offset, b->offset);
        }
    return KV_OK;
}

/* Index of the first element that is not finite, or n. */
static size_t first_bad(kv_dtype d, const uint8_t *p, size_t n)
{
    size_t i = 0;
    if (d == KV_F16)
        for (; i < n && (kv_get16(p + 2 * i) & 0x7c00) != 0x7c00; i++) continue;
    else if (d == KV_BF16)
        for (; i < n && (kv_get16(p + 2 * i) & 0x7f80) != 0x7f80; i++) continue;
    else if (d == KV_F32)
        for (; i < n && (kv_get32(p + 4 * i) & 0x7f800000u) != 0x7f800000u; i++) continue;
    else
        return n;
    return i;
}

static kv_status decode_all(const kv_trace *t, kv_progress *bar, kv_error *err)
{
    kv_status st = KV_OK;
    uint8_t *raw = NULL;
    uint64_t done = 0;
    for (size_t i = 0; i < t->n && !st; i++) {
        const kvt_entry *e = &t->entry[i];
        const kvt_stream_info *s = kvt_stream(e->stream);
        if (!s) continue;
        free(raw);
        if (!(raw = malloc(e->raw ? e->raw : 1))) return kv_fail(err, KV_ENOMEM, "out of memory");
        if ((st = kvt_read_chunk(t, e, raw, err))) break;
        size_t n = e->raw / kv_dtype_bytes((kv_dtype)e->dtype), bad = first_bad((kv_dtype)e->dtype, raw, n);
        if (bad < n)
            st = kv_fail(err, KV_EFORMAT, "trace '%s': %s of layer %u head %zu row %" PRIu64 " is not finite", t->path,
                         s->name, e->layer, e->head_first + bad / ((size_t)e->token_count * e->width),
                         e->token_first + bad / e->width % e->token_count);
        done += e->stored;
        kv_progress_step(bar, (double)done, "decoding");
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    free(raw);
    return st;
}

/* Every prompt row spreads a mass of one over the columns, so the column sums add up to the number of rows. */
static kv_status check_colsum(const kv_trace *t, kv_stream s, uint32_t rows, kv_error *err)
{
    const kv_trace_info *in = &t->info;
    kv_status st = KV_OK;
    float *v = NULL;
    if (!rows) return KV_OK;
    for (uint32_t l = 0; l < in->n_layer; l++)
        for (uint32_t h = 0; h < in->n_q_head; h++) {
            double sum = 0;
            if (!kv_trace_has(t, s, in->layer[l], h, 0, rows)) continue;
            if ((!v && (st = kv_array(&v, rows, sizeof *v, err))) ||
                (st = kv_trace_read_f32(t, s, in->layer[l], h, 0, rows, v, err)))
                goto out;
            for (uint32_t j = 0; j < rows; j++) sum += v[j];
            if (!(fabs(sum - rows) <= 1e-3 * rows + 1e-3)) {
                st = kv_fail(err, KV_EFORMAT, "trace '%s': %s of layer %u head %u adds up to %.6g, not to the %u rows",
                             t->path, kv_stream_name(s), in->layer[l], h, sum, rows);
                goto out;
            }
        }
out:
    free(v);
    return st;
}

typedef struct {
    const kv_trace *t;
    uint32_t layer, head;
    uint64_t *rows;
} sample;

static kv_status check_lse(void *ctx, uint32_t row, const double *p, double lse, kv_error *err)
{
    sample *s = ctx;
    float got = 0;
    (void)p;
    kv_status st = kv_trace_read_f32(s->t, KV_S_LSE, s->layer, s->head, row, row + 1, &got, err);
    /* exp of the difference is the sum of the row's p as the trace's own lse gives them */
    if (!st && !(fabs(exp(lse - (double)got) - 1) <= 5e-3))
        st = kv_fail(err, KV_EFORMAT, "trace '%s': layer %u head %u row %u: p adds up to %.6g with the stored lse",
                     s->t->path, s->layer, s->head, row, exp(lse - (double)got));
    ++*s->rows;
    return st;
}

static kv_status check_rows(const kv_trace *t, kvt_checked *c, kv_progress *bar, kv_error *err)
{
    const kv_trace_info *in = &t->info;
    uint32_t n = in->n_token;
    kv_status st = KV_OK;
    /* A few layers are enough to notice a wrong scale, order or rotation. */
    uint32_t step = in->n_layer > 4 ? in->n_layer / 4 : 1;
    for (uint32_t l = 0; l < in->n_layer && !st; l += step)
        for (uint32_t h = 0; h < in->n_q_head && !st; h++) {
            sample s = {t, in->layer[l], h, &c->rows};
            /* At level obs the last rows of the prompt and the decoded ones have their queries. */
            bool all = kv_trace_has(t, KV_S_Q, s.layer, h, 0, n) || in->obs_rows >= in->n_prompt;
            uint32_t first = all ? 0 : in->n_prompt - in->obs_rows;
            if (!kv_trace_has(t, KV_S_Q, s.layer, h, first, n) || !kv_trace_has(t, KV_S_LSE, s.layer, h, first, n) ||
                !kv_trace_has(t, KV_S_K, s.layer, h / (in->n_q_head / in->n_kv_head), 0, n))
                continue;
            st = kvt_derive(t, s.layer, h, first, n, (n - first) / SAMPLE_ROWS + 1, check_lse, &s, err);
            kv_progress_step(bar, 0, "row sums");
        }
    return st;
}

/* Stored maps: rows of p, each adding up to one, nothing beyond the diagonal. */
static kv_status check_map(const kv_trace *t, kvt_checked *c, kv_error *err)
{
    const kv_trace_info *in = &t->info;
    uint32_t width = kv_trace_width(t, KV_S_MAP);
    kv_status st = KV_OK;
    float *v = NULL;
    size_t count;
    for (uint32_t l = 0; l < in->n_layer && !st && width; l++) {
        size_t first = kvt_group(t, KV_S_MAP, in->layer[l], &count);
        for (size_t k = first; k < first + count && !st; k++) {
            const kvt_entry *e = &t->entry[k];
            uint32_t row = (uint32_t)e->token_first + e->token_count - 1;
            if (e->width != width) continue;
            if (!v && (st = kv_array(&v, width, sizeof *v, err))) break;
            double sum = 0, beyond = 0;
            if ((st = kv_trace_read_f32(t, KV_S_MAP, e->layer, e->head_first, row, row + 1, v, err))) break;
            for (uint32_t j = 0; j < width; j++) *(j <= row ? &sum : &beyond) += fabs((double)v[j]);
            if (!(fabs(sum - 1) <= 1e-2) || !(beyond <= 0))
                st = kv_fail(err, KV_EFORMAT,
                             "trace '%s': map of layer %u head %u row %u adds up to %.6g (%.6g beyond "
                             "the diagonal)",
                             t->path, e->layer, e->head_first, row, sum, beyond);
            c->rows++;
        }
    }
    free(v);
    return st;
}

static kv_status check_wo(const kv_trace *t, kvt_checked *c, kv_error *err)
{
    const char *want = t->info.wo_sha256;
    kv_error why = {""};
    kv_sha256 sha;
    char hex[65];
    kv_status st = KV_OK;
    if (!want) return KV_OK;
    size_t count;
    /* A side file is checked when it is itself the file at hand, or stands beside it. */
    bool self = false;
    for (uint32_t l = 0; l < t->info.n_layer; l++) self |= kv_trace_has(t, KV_S_WO, t->info.layer[l], 0, 0, 1);
    const kv_trace *side = self ? t : kvt_side(t, &why);
    if (!side) {
        snprintf(c->note, sizeof c->note, "%.250s", why.msg);
        return KV_OK;
    }
    kv_sha256_init(&sha);
    for (uint32_t l = 0; l < side->info.n_layer && !st; l++) {
        size_t first = kvt_group(side, KV_S_WO, side->info.layer[l], &count), bytes = 0, at = 0;
        uint8_t *raw = NULL;
        for (size_t k = first; k < first + count; k++) bytes += side->entry[k].raw;
        if (!count) continue;
        if (!(raw = malloc(bytes))) return kv_fail(err, KV_ENOMEM, "out of memory: %zu bytes", bytes);
        for (size_t k = first; k < first + count && !st; k++) {
            st = kvt_read_chunk(side, &side->entry[k], raw + at, err);
            at += side->entry[k].raw;
        }
        const kvt_entry *e = &side->entry[first];
        uint32_t rows = (uint32_t)(bytes / e->width / kv_dtype_bytes((kv_dtype)e->dtype));
        if (!st) kv_wo_hash(&sha, e->layer, rows, e->width, (kv_dtype)e->dtype, raw);
        free(raw);
    }
    kv_sha256_hex(&sha, hex);
    if (!st && strcmp(hex, want))
        st = kv_fail(err, KV_EFORMAT, "trace '%s': W_O in '%s' has the hash %.16s..., not %.16s...", t->path,
                     side->path, hex, want);
    return st;
}

kv_status kvt_verify(const kv_trace *t, bool deep, kvt_checked *c, kv_error *err)
{
    kv_progress *bar = kv_progress_start("checking", (double)t->size, "bytes");
    memset(c, 0, sizeof *c);
    kv_status st = check_bytes(t, c, bar, err);
    if (!st && deep) {
        if ((st = check_overlap(t, err)) || (st = decode_all(t, bar, err)) ||
            (st = check_colsum(t, KV_S_COLSUM, t->info.n_prompt, err)) ||
            (st = check_colsum(t, KV_S_COLSUM_CTX, t->info.n_context, err)) || (st = check_rows(t, c, bar, err)) ||
            (st = check_map(t, c, err)))
            goto out;
        st = check_wo(t, c, err);
    }
out:
    kv_progress_end(bar);
    return st;
}
