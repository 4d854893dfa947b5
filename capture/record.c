/* record.c - from the views of an engine to the chunks of a trace. */
#include "capture/record.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "kernels/parallel.h"

#define HOLD_ROWS  64u        /* decode rows held back before they are written */
#define PUT_ROWS   1024u      /* tokens handed to the writer at a time: its block */
#define MAP_FLOATS (8u << 20) /* floats of attention map computed at a time */

static const char *const level_name[KV_RECORD_COUNT] = {"tokens", "stats", "obs", "qkv"};

const char *kv_record_name(kv_record_level l)
{
    return l < KV_RECORD_COUNT ? level_name[l] : "unknown";
}

bool kv_record_parse(const char *s, kv_record_level *out)
{
    for (unsigned i = 0; i < KV_RECORD_COUNT; i++)
        if (!strcmp(s, level_name[i])) return *out = (kv_record_level)i, true;
    return false;
}

/* Rows of one layer that have not been written: [head][HOLD_ROWS][width] each. */
typedef struct {
    float *q, *k, *v, *lse, *stat, *x_norm;
    uint32_t first, count;
} held_rows;

struct kv_recorder {
    const kv_trace_info *info;
    kv_record_options o;
    const kv_model *m;
    const uint32_t *token;
    kv_trace_writer *w;
    const kv_trace_source *device; /* of the layer at hand; NULL: its rows are in memory */
    uint8_t *raw;                  /* a row on its way from the device */
    size_t n_raw;
    uint32_t top_k;
    held_rows *held; /* [info->n_layer] */
    float *stage;    /* where a block is made contiguous */
    size_t n_stage;
    double *sum;      /* [q_heads][P] column sums */
    float *sum_ctx;   /* [q_heads][context] */
    float *nll;       /* [N-1] */
    float *top;       /* [N-P+1][2*top_k] */
    uint32_t n_logit; /* rows whose logits have come */
};

/* Rows of a layer as they lie in memory; `ld` = rows between two heads. */
typedef struct {
    const float *q, *k, *v, *lse, *stat, *x_norm;
    size_t ld_q, ld_kv;
    uint32_t first, count; /* positions first..first+count-1; q[0], lse[0].. are row `first`, k[0] is too */
} row_source;

static uint32_t top_k_of(uint32_t n_vocab)
{
    return n_vocab < KV_RECORD_TOP_K ? n_vocab : KV_RECORD_TOP_K;
}

/* Is Q of this row stored? */
static bool keeps_q(const kv_trace_info *i, kv_record_level level, uint32_t row)
{
    if (level != KV_RECORD_OBS) return level == KV_RECORD_QKV;
    return row + i->obs_rows >= i->n_prompt || (row < i->n_context && row + i->obs_rows >= i->n_context);
}

/* ------------------------------------------------------------------------------------------------ sizes */
kv_status kv_record_sizes(const kv_trace_info *i, const kv_record_options *o, uint32_t n_vocab, size_t n_text,
                          uint64_t raw[32], kv_error *err)
{
    /* In double the sum cannot wrap; below 2^53 it is exact, and nothing larger is ever written. */
    double n = i->n_token, p = i->n_prompt, layers = i->n_layer, hq = i->n_q_head, hk = i->n_kv_head, d = i->head_dim;
    double e = (double)kv_dtype_bytes(i->dtype), size[32] = {0}, all = 0, q_rows = 0;

    size[KV_S_TOKENS] = 4 * n, size[KV_S_OFFSETS] = 4 * (n + 1), size[KV_S_TEXT] = (double)n_text;
    if (o->level >= KV_RECORD_STATS) {
        size[KV_S_LSE] = layers * hq * n * 4;
        size[KV_S_ROWSTAT] = layers * hq * n * 16;
        size[KV_S_XNORM] = layers * n * 4;
        size[KV_S_COLSUM] = layers * hq * p * 4;
        size[KV_S_COLSUM_CTX] = layers * hq * i->n_context * 4;
        size[KV_S_NLL] = 4 * (n - 1);
        size[KV_S_LOGITS] = (n - p + 1) * 2 * top_k_of(n_vocab) * 4;
    }
    if (o->level >= KV_RECORD_OBS) {
        for (uint32_t r = 0; r < i->n_token; r++) q_rows += keeps_q(i, o->level, r);
        size[KV_S_K] = size[KV_S_V] = layers * hk * n * d * e;
        size[KV_S_Q] = layers * hq * q_rows * d * e;
        if (i->post_norm_eps > 0) size[KV_S_POST_NORM] = layers * i->hidden * 8;
        if (o->wo) size[KV_S_WO] = layers * i->hidden * hq * d * e;
    }
    if (o->map_rows) size[KV_S_MAP_WINDOW] = layers * hq * (o->map_rows < p ? o->map_rows : p) * p * 2;
    if (o->map_full) size[KV_S_MAP] = layers * hq * n * n * 2;
    for (int s = 0; s < 32; s++) raw[s] = 0, all += size[s];
    if (!(all < 0x1p53)) return kv_fail(err, KV_EUNSUPPORTED, "a trace of %.3g bytes is out of reach", all);
    for (int s = 0; s < 32; s++) raw[s] = (uint64_t)size[s];
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ rows */
static kv_status need_stage(kv_recorder *r, size_t n, kv_error *err)
{
    if (n <= r->n_stage) return KV_OK;
    free(r->stage);
    r->n_stage = 0;
    kv_status st = kv_array(&r->stage, n, sizeof *r->stage, err);
    if (!st) r->n_stage = n;
    return st;
}

/* Rows a..b-1 of a stream whose row 0 is position `first` and whose heads lie ld rows apart, or lie on the device. */
static kv_status put_rows(kv_recorder *r, kv_chunk c, const float *from, size_t ld, uint32_t first, uint32_t a,
                          uint32_t b, kv_error *err)
{
    kv_status st;
    if (r->device) {
        c.token_first = a, c.token_count = b - a;
        return kv_trace_put_from(r->w, &c, r->device, err);
    }
    for (uint32_t at = a; at < b; at += PUT_ROWS) {
        size_t n = b - at < PUT_ROWS ? b - at : PUT_ROWS;
        const float *block = from + (at - first) * (size_t)c.width;
        c.token_first = at, c.token_count = (uint32_t)n;
        if (ld != n && c.head_count > 1) {
            if ((st = need_stage(r, c.head_count * n * c.width, err))) return st;
            for (size_t h = 0; h < c.head_count; h++)
                memcpy(r->stage + h * n * c.width, block + h * ld * c.width, n * c.width * sizeof *block);
            block = r->stage;
        }
        if ((st = kv_trace_put_f32(r->w, &c, block, err))) return st;
    }
    return KV_OK;
}

static kv_chunk chunk_of(const kv_recorder *r, kv_stream s, uint32_t layer)
{
    const kv_trace_info *i = r->info;
    kv_chunk c = {.stream = s, .layer = layer, .head_count = i->n_q_head, .width = 1, .dtype = KV_F32};
    if (s == KV_S_K || s == KV_S_V) c.head_count = i->n_kv_head;
    if (s == KV_S_XNORM || s == KV_S_WO) c.head_count = 1;
    if (s == KV_S_Q || s == KV_S_K || s == KV_S_V) c.width = i->head_dim, c.dtype = i->dtype;
    if (s == KV_S_ROWSTAT) c.width = 4;
    return c;
}

static kv_status put_block(kv_recorder *r, uint32_t layer, const row_source *s, uint32_t a, uint32_t b, kv_error *err)
{
    uint32_t first = s->first;
    kv_status st;
    if (r->o.level >= KV_RECORD_OBS) {
        if ((st = put_rows(r, chunk_of(r, KV_S_K, layer), s->k, s->ld_kv, first, a, b, err))) return st;
        if ((st = put_rows(r, chunk_of(r, KV_S_V, layer), s->v, s->ld_kv, first, a, b, err))) return st;
        for (uint32_t from = a, to; from < b; from = to) { /* runs of rows that are stored */
            bool keep = keeps_q(r->info, r->o.level, from);
            for (to = from + 1; to < b && keeps_q(r->info, r->o.level, to) == keep;) to++;
            if (keep && (st = put_rows(r, chunk_of(r, KV_S_Q, layer), s->q, s->ld_q, first, from, to, err))) return st;
        }
    }
    if ((st = put_rows(r, chunk_of(r, KV_S_LSE, layer), s->lse, s->ld_q, first, a, b, err))) return st;
    if ((st = put_rows(r, chunk_of(r, KV_S_ROWSTAT, layer), s->stat, s->ld_q, first, a, b, err))) return st;
    return put_rows(r, chunk_of(r, KV_S_XNORM, layer), s->x_norm, s->count, first, a, b, err);
}

/* All streams of a block of rows before the next block: large and small blocks of the trace take turns, so that a ring
 * of a few never holds small ones only, which would leave the compressors without work. */
static kv_status put_source(kv_recorder *r, uint32_t layer, const row_source *s, kv_error *err)
{
    uint32_t end = s->first + s->count;
    kv_status st = KV_OK;
    for (uint32_t a = s->first; a < end && !st; a += PUT_ROWS)
        st = put_block(r, layer, s, a, end - a < PUT_ROWS ? end : a + PUT_ROWS, err);
    return st;
}

static kv_status release_held(kv_recorder *r, uint32_t index, kv_error *err)
{
    held_rows *h = &r->held[index];
    row_source s = {h->q, h->k, h->v, h->lse, h->stat, h->x_norm, HOLD_ROWS, HOLD_ROWS, h->first, h->count};
    h->count = 0;
    return s.count ? put_source(r, r->info->layer[index], &s, err) : KV_OK;
}

static kv_status hold_open(kv_recorder *r, held_rows *h, kv_error *err)
{
    const kv_trace_info *i = r->info;
    size_t q = (size_t)HOLD_ROWS * i->n_q_head, k = (size_t)HOLD_ROWS * i->n_kv_head;
    kv_status st;
    if (h->lse) return KV_OK;
    if (r->o.level >= KV_RECORD_OBS && ((st = kv_array(&h->q, q * i->head_dim, sizeof(float), err)) ||
                                        (st = kv_array(&h->k, k * i->head_dim, sizeof(float), err)) ||
                                        (st = kv_array(&h->v, k * i->head_dim, sizeof(float), err))))
        return st;
    if ((st = kv_array(&h->stat, q * 4, sizeof(float), err)) ||
        (st = kv_array(&h->x_norm, HOLD_ROWS, sizeof(float), err)))
        return st;
    return kv_array(&h->lse, q, sizeof(float), err);
}

/* n rows of all heads, heads ld_from and HOLD_ROWS rows apart. */
static void hold_copy(float *to, uint32_t at, const float *from, size_t ld_from, uint32_t heads, uint32_t n,
                      size_t width)
{
    for (size_t h = 0; to && h < heads; h++)
        memcpy(to + (h * HOLD_ROWS + at) * width, from + h * ld_from * width, n * width * sizeof *to);
}

static kv_status hold(kv_recorder *r, uint32_t index, const row_source *s, kv_error *err)
{
    const kv_trace_info *i = r->info;
    held_rows *h = &r->held[index];
    uint32_t at = h->count, n = s->count;
    kv_status st = hold_open(r, h, err);
    if (st) return st;
    if (!at) h->first = s->first;
    hold_copy(h->q, at, s->q, s->ld_q, i->n_q_head, n, i->head_dim);
    hold_copy(h->k, at, s->k, s->ld_kv, i->n_kv_head, n, i->head_dim);
    hold_copy(h->v, at, s->v, s->ld_kv, i->n_kv_head, n, i->head_dim);
    hold_copy(h->lse, at, s->lse, s->ld_q, i->n_q_head, n, 1);
    hold_copy(h->stat, at, s->stat, s->ld_q, i->n_q_head, n, 4);
    hold_copy(h->x_norm, at, s->x_norm, n, 1, n, 1);
    h->count += n;
    return h->count == HOLD_ROWS ? release_held(r, index, err) : KV_OK;
}

/* One row of a layer out of the device into memory, heads next to each other: into `stage`, as *s says. */
static kv_status bring_row(kv_recorder *r, const kv_attn_view *a, row_source *s, kv_error *err)
{
    static const kv_stream what[6] = {KV_S_Q, KV_S_K, KV_S_V, KV_S_LSE, KV_S_ROWSTAT, KV_S_XNORM};
    const float **to[6] = {&s->q, &s->k, &s->v, &s->lse, &s->stat, &s->x_norm};
    size_t at[7] = {0}, bytes = 0;
    uint64_t ticket[6];
    kv_chunk c[6];
    int first = r->o.level >= KV_RECORD_OBS ? 0 : 3, begun = first;
    kv_status st = KV_OK, done;

    for (int i = first; i < 6; i++) {
        c[i] = chunk_of(r, what[i], a->layer);
        c[i].token_first = a->row0, c[i].token_count = 1;
        at[i + 1] = at[i] + (size_t)c[i].head_count * c[i].width;
        bytes += (size_t)c[i].head_count * c[i].width * kv_dtype_bytes(c[i].dtype);
    }
    if (bytes > r->n_raw) {
        free(r->raw);
        r->n_raw = 0;
        if ((st = kv_array(&r->raw, bytes, 1, err))) return st;
        r->n_raw = bytes;
    }
    if ((st = need_stage(r, at[6], err))) return st;
    uint8_t *raw = r->raw;
    for (; begun < 6 && !st; begun++) {
        st = a->device->fill(a->device->ctx, &c[begun], 1, raw, &ticket[begun], err);
        raw += (at[begun + 1] - at[begun]) * kv_dtype_bytes(c[begun].dtype);
        if (st) break;
    }
    raw = r->raw;
    for (int i = first; i < begun; i++) {
        done = a->device->wait(a->device->ctx, ticket[i], st ? NULL : err);
        if (!st) st = done;
        if (!st) kv_decode_f32(c[i].dtype, raw, at[i + 1] - at[i], r->stage + at[i]);
        raw += (at[i + 1] - at[i]) * kv_dtype_bytes(c[i].dtype);
        *to[i] = r->stage + at[i];
    }
    s->ld_q = s->ld_kv = 1, s->first = a->row0, s->count = 1;
    return st;
}

/* ------------------------------------------------------------------------------------------------ column sums, maps */
typedef struct {
    kv_recorder *r;
    const kv_attn_view *a;
    kv_attn_shape shape; /* rows of a map */
    float *map;          /* [q_heads][rows][keys] */
    bool failed[KV_HEADS_MAX];
} heads_job;

static const float *keys_of(const heads_job *j, size_t h)
{
    const kv_trace_info *i = j->r->info;
    return j->a->k + h / (i->n_q_head / i->n_kv_head) * j->a->kv_stride * i->head_dim;
}

/* One pass over the prompt rows gives both cut points: the sums are copied on the way. */
static void colsum_task(void *ctx, size_t h)
{
    heads_job *j = ctx;
    const kv_trace_info *i = j->r->info;
    const float *q = j->a->q + h * j->a->n_row * i->head_dim, *lse = j->a->lse + h * j->a->n_row, *k = keys_of(j, h);
    double *sum = j->r->sum + h * i->n_prompt;
    size_t c = i->n_context;
    kv_attn_shape s = j->shape;

    memset(sum, 0, i->n_prompt * sizeof *sum);
    s.n_row = s.n_key = c;
    bool ok = !c || kv_colsum(&s, q, k, lse, sum);
    for (size_t t = 0; t < c; t++) j->r->sum_ctx[h * c + t] = (float)sum[t];
    s.row0 = c, s.n_row = i->n_prompt - c, s.n_key = i->n_prompt;
    j->failed[h] = !ok || (s.n_row && !kv_colsum(&s, q + c * i->head_dim, k, lse + c, sum));
}

static void map_task(void *ctx, size_t h)
{
    heads_job *j = ctx;
    size_t d = j->r->info->head_dim, n = j->shape.n_row, n_key = j->shape.n_key;
    const float *q = j->a->q + (h * j->a->n_row + (j->shape.row0 - j->a->row0)) * d;
    j->failed[h] = !kv_probs(&j->shape, q, keys_of(j, h), j->map + h * n * n_key);
}

static kv_status over_heads(heads_job *j, void (*task)(void *, size_t), kv_error *err)
{
    uint32_t n = j->r->info->n_q_head;
    kv_parallel(n, j->r->o.threads, task, j);
    for (uint32_t h = 0; h < n; h++)
        if (j->failed[h]) return kv_fail(err, KV_ENOMEM, "out of memory for the statistics of layer %u", j->a->layer);
    return KV_OK;
}

static kv_status put_colsum(kv_recorder *r, heads_job *j, kv_error *err)
{
    const kv_trace_info *i = r->info;
    size_t n = (size_t)i->n_q_head * i->n_prompt;
    kv_status st = r->device ? KV_OK : over_heads(j, colsum_task, err);
    if (st) return st;
    float *f = NULL;
    if (i->n_context) {
        kv_chunk c = chunk_of(r, KV_S_COLSUM_CTX, j->a->layer);
        if ((st = put_rows(r, c, r->sum_ctx, i->n_context, 0, 0, i->n_context, err))) return st;
    }
    if (r->device) return put_rows(r, chunk_of(r, KV_S_COLSUM, j->a->layer), NULL, 0, 0, 0, i->n_prompt, err);
    if ((st = kv_array(&f, n, sizeof *f, err))) return st;
    for (size_t t = 0; t < n; t++) f[t] = (float)r->sum[t];
    st = put_rows(r, chunk_of(r, KV_S_COLSUM, j->a->layer), f, i->n_prompt, 0, 0, i->n_prompt, err);
    free(f);
    return st;
}

/* Rows a..b-1 of the attention map, each `width` columns; blocks of rows so that no more than MAP_FLOATS are held. */
static kv_status put_map(kv_recorder *r, heads_job *j, kv_stream s, uint32_t a, uint32_t b, uint32_t width,
                         kv_error *err)
{
    const kv_trace_info *i = r->info;
    size_t per_row = (size_t)i->n_q_head * width, step = MAP_FLOATS / per_row;
    kv_status st;

    step = step < 1 ? 1 : step > HOLD_ROWS ? HOLD_ROWS : step;
    if (r->device) {
        kv_chunk c = {.stream = s, .layer = j->a->layer, .head_count = i->n_q_head, .width = width, .dtype = KV_F16};
        return put_rows(r, c, NULL, 0, 0, a, b, err);
    }
    for (uint32_t at = a; at < b; at += (uint32_t)step) {
        uint32_t n = b - at < step ? b - at : (uint32_t)step;
        size_t n_key = at + n;
        kv_chunk c = {.stream = s, .layer = j->a->layer, .head_count = i->n_q_head, .token_first = at};
        c.token_count = n, c.width = width, c.dtype = KV_F16;
        /* Keys beyond the last row are not in the cache yet: compute the visible part, then widen the rows. */
        if ((st = need_stage(r, n * per_row + (size_t)i->n_q_head * n * n_key, err))) return st;
        j->shape.row0 = at, j->shape.n_row = n, j->shape.n_key = n_key;
        j->map = r->stage + n * per_row;
        if ((st = over_heads(j, map_task, err))) return st;
        memset(r->stage, 0, n * per_row * sizeof *r->stage);
        for (size_t row = 0; row < (size_t)i->n_q_head * n; row++)
            memcpy(r->stage + row * width, j->map + row * n_key, n_key * sizeof *r->stage);
        if ((st = kv_trace_put_f32(r->w, &c, r->stage, err))) return st;
    }
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ hook */
static unsigned want(void *ctx, uint32_t layer)
{
    const kv_recorder *r = ctx;
    (void)layer;
    return r->o.level >= KV_RECORD_STATS ? KV_WANT_STAT | KV_WANT_SUMS : 0;
}

/* What happens to the attention output behind W_O: the norm's weight and the bias in front of it. */
static kv_status put_post_norm(kv_recorder *r, uint32_t layer, kv_error *err)
{
    const kv_layer_weights *w = &r->m->layer[layer];
    kv_chunk c = chunk_of(r, KV_S_POST_NORM, layer);
    float *v = NULL;
    c.head_count = 1, c.token_count = r->info->hidden, c.width = 2;
    kv_status st = kv_array(&v, 2 * (size_t)c.token_count, sizeof *v, err);
    for (uint32_t i = 0; i < c.token_count && !st; i++)
        v[2 * i] = w->post_attn_norm.w[i], v[2 * i + 1] = w->bo ? w->bo[i] : 0;
    if (!st) st = kv_trace_put_f32(r->w, &c, v, err);
    free(v);
    return st;
}

static kv_status record(void *ctx, const kv_attn_view *a, kv_error *err)
{
    kv_recorder *r = ctx;
    const kv_trace_info *i = r->info;
    size_t d = i->head_dim;
    uint32_t index = 0, p = i->n_prompt;
    kv_status st = KV_OK;

    while (index < i->n_layer && i->layer[index] != a->layer) index++;
    if (index == i->n_layer || r->o.level == KV_RECORD_TOKENS) return KV_OK;
    if ((!a->lse && !a->device) || (a->row0 && a->row0 < p) || (!a->row0 && a->n_row < p) || a->n_key > i->n_token)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "cannot record rows %u to %u of layer %u: the prompt's %u rows must be one call", a->row0,
                       a->n_key, a->layer, p);
    row_source s = {
        .q = a->q, .lse = a->lse, .stat = a->stat, .x_norm = a->x_norm, .ld_q = a->n_row, .ld_kv = a->kv_stride};
    s.first = a->row0, s.count = a->n_row;
    if (!a->device) s.k = a->k + a->row0 * d, s.v = a->v + a->row0 * d;
    bool single = a->n_row == 1 && a->row0;
    r->device = NULL;
    if (single && a->device) st = bring_row(r, a, &s, err);
    if (!single) r->device = a->device;
    if (!st) st = single ? hold(r, index, &s, err) : put_source(r, a->layer, &s, err);
    r->device = a->device;
    if (st) return st;

    heads_job *j = NULL;
    if ((st = kv_array(&j, 1, sizeof *j, err))) return st;
    j->r = r, j->a = a;
    j->shape = (kv_attn_shape){.d = d, .window = i->window[index], .scale = i->scale, .softcap = i->softcap};
    if (!a->row0) {
        uint32_t rows = r->o.map_rows < p ? r->o.map_rows : p;
        if ((st = put_colsum(r, j, err))) goto out;
        if (rows && (st = put_map(r, j, KV_S_MAP_WINDOW, p - rows, p, p, err))) goto out;
        if (i->post_norm_eps > 0 && r->o.level >= KV_RECORD_OBS && (st = put_post_norm(r, a->layer, err))) goto out;
        if (r->o.wo && r->o.level >= KV_RECORD_OBS) {
            kv_chunk c = chunk_of(r, KV_S_WO, a->layer);
            c.width = i->n_q_head * i->head_dim, c.dtype = i->dtype;
            float *wo = NULL;
            st = r->device ? KV_OK : kv_array(&wo, (size_t)i->hidden * c.width, sizeof *wo, err);
            if (!st && wo) st = kv_tensor_floats(r->m, &r->m->layer[a->layer].wo, 0, i->hidden, wo, err);
            if (!st) st = put_rows(r, c, wo, i->hidden, 0, 0, i->hidden, err);
            free(wo);
            if (st) goto out;
        }
    }
    if (r->o.map_full) st = put_map(r, j, KV_S_MAP, a->row0, a->n_key, i->n_token, err);
out:
    free(j);
    return st;
}

typedef struct {
    kv_recorder *r;
    uint32_t row0;
    const float *logits;
} logits_job;

/* The k largest of n by (logit descending, id ascending): ids, then logits. */
static void top_of(const float *logit, uint32_t n, uint32_t k, float *out)
{
    float *id = out, *best = out + k;
    uint32_t have = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t at = have;
        if (have == k && !(logit[i] > best[k - 1])) continue;
        if (have < k)
            have++;
        else
            at = k - 1;
        for (; at && logit[i] > best[at - 1]; at--) best[at] = best[at - 1], id[at] = id[at - 1];
        best[at] = logit[i], id[at] = (float)i;
    }
}

static void logits_task(void *ctx, size_t i)
{
    const logits_job *j = ctx;
    kv_recorder *r = j->r;
    uint32_t row = j->row0 + (uint32_t)i, n_vocab = r->m->desc.n_vocab, p = r->info->n_prompt;
    const float *logit = j->logits + i * n_vocab;
    if (row + 1 < r->info->n_token) kv_nll_rows(1, n_vocab, logit, r->token + row + 1, r->nll + row);
    if (row + 1 >= p) top_of(logit, n_vocab, r->top_k, r->top + (size_t)(row + 1 - p) * 2 * r->top_k);
}

static kv_status next_tokens(void *ctx, uint32_t row0, uint32_t n_row, const float *logits, kv_error *err)
{
    logits_job j = {.r = ctx, .row0 = row0, .logits = logits};
    if (row0 != j.r->n_logit || n_row > j.r->info->n_token - row0)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot record logits of rows %u to %u: row %u is next", row0,
                       row0 + n_row, j.r->n_logit);
    kv_parallel(n_row, j.r->o.threads, logits_task, &j);
    j.r->n_logit += n_row;
    return KV_OK;
}

/* The best next tokens are stored from row P-1 on. */
static bool wants_logits(void *ctx, uint32_t row)
{
    return row + 1 >= ((const kv_recorder *)ctx)->info->n_prompt;
}

static kv_status losses(void *ctx, uint32_t row0, uint32_t n_row, const float *nll, kv_error *err)
{
    kv_recorder *r = ctx;
    if (row0 != r->n_logit || n_row >= r->info->n_token - row0)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot record losses of rows %u to %u: row %u is next", row0,
                       row0 + n_row, r->n_logit);
    memcpy(r->nll + row0, nll, n_row * sizeof *nll);
    r->n_logit += n_row;
    return KV_OK;
}

kv_engine_hook kv_recorder_hook(kv_recorder *r)
{
    kv_engine_hook h = {.ctx = r, .want = want, .record = record};
    h.n_prompt = r->info->n_prompt, h.n_context = r->info->n_context;
    if (r->o.level >= KV_RECORD_STATS) h.logits = next_tokens, h.wants_logits = wants_logits, h.nll = losses;
    return h;
}

/* ------------------------------------------------------------------------------------------------ open and close */
kv_status kv_recorder_open(const kv_trace_info *info, const kv_record_options *o, const kv_model *m,
                           const uint32_t *token, kv_trace_writer *w, kv_recorder **out, kv_error *err)
{
    kv_recorder *r = NULL;
    kv_status st;
    size_t decode = (size_t)(info->n_token - info->n_prompt) + 1;

    *out = NULL;
    if (info->n_q_head > KV_HEADS_MAX)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot record %u query heads: at most %u", info->n_q_head, KV_HEADS_MAX);
    if ((st = kv_array(&r, 1, sizeof *r, err))) return st;
    r->info = info, r->o = *o, r->m = m, r->token = token, r->w = w;
    r->top_k = top_k_of(m->desc.n_vocab);
    if ((st = kv_array(&r->held, info->n_layer, sizeof *r->held, err))) goto out;
    if (o->level >= KV_RECORD_STATS &&
        ((st = kv_array(&r->sum, (size_t)info->n_q_head * info->n_prompt, sizeof *r->sum, err)) ||
         (st = kv_array(&r->sum_ctx, (size_t)info->n_q_head * info->n_context, sizeof *r->sum_ctx, err)) ||
         (st = kv_array(&r->nll, info->n_token, sizeof *r->nll, err)) ||
         (st = kv_array(&r->top, decode * 2 * r->top_k, sizeof *r->top, err))))
        goto out;
    *out = r;
    return KV_OK;
out:
    kv_recorder_close(r);
    return st;
}

kv_status kv_recorder_finish(kv_recorder *r, kv_error *err)
{
    uint32_t n = r->info->n_token, p = r->info->n_prompt;
    kv_status st;

    if (r->o.level == KV_RECORD_TOKENS) return KV_OK;
    r->device = NULL;
    if (r->n_logit != n) return kv_fail(err, KV_EMISSING, "only %u of %u rows have been run", r->n_logit, n);
    for (uint32_t l = 0; l < r->info->n_layer; l++)
        if ((st = release_held(r, l, err))) return st;
    kv_chunk nll = {.stream = KV_S_NLL, .head_count = 1, .token_count = n - 1, .width = 1, .dtype = KV_F32};
    if (n > 1 && (st = kv_trace_put_f32(r->w, &nll, r->nll, err))) return st;
    kv_chunk top = {.stream = KV_S_LOGITS, .head_count = 1, .token_first = p - 1, .dtype = KV_F32};
    top.token_count = n - p + 1, top.width = 2 * r->top_k;
    return kv_trace_put_f32(r->w, &top, r->top, err);
}

void kv_recorder_close(kv_recorder *r)
{
    if (!r) return;
    for (uint32_t l = 0; r->held && l < r->info->n_layer; l++) {
        held_rows *h = &r->held[l];
        free(h->q), free(h->k), free(h->v), free(h->lse), free(h->stat), free(h->x_norm);
    }
    free(r->held), free(r->stage), free(r->raw), free(r->sum), free(r->sum_ctx), free(r->nll), free(r->top);
    free(r);
}
