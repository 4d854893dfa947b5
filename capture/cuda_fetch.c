/* cuda_fetch.c - what a layer left on the device, on its way into a trace (kv_trace_source).
 *
 * A block is packed on one stream (rounded, head by head, in byte planes) into one of a few staging buffers and copied
 * on another, beside the layers that run meanwhile; nobody waits but the compressor that wants the bytes. */
#include "capture/cuda_engine.h"

#include <pthread.h>
#include <stdlib.h>

/* Tickets are taken by the thread that records and given back by compressors. */
struct kv_cuda_tickets {
    pthread_mutex_t lock;
    kv_cuda_ticket *all;
    uint32_t *unused; /* [n_unused] numbers */
    uint32_t n, cap, n_unused;
    double copy_s;
};

kv_status kv_cuda_fetch_open(kv_cuda *e, kv_error *err)
{
    kv_status st = kv_array(&e->tickets, 1, sizeof *e->tickets, err);
    if (!st) pthread_mutex_init(&e->tickets->lock, NULL);
    return st;
}

void kv_cuda_fetch_close(kv_cuda *e)
{
    struct kv_cuda_tickets *t = e->tickets;
    if (!t) return;
    for (uint32_t i = 0; i < t->n; i++) kv_gpu_event_close(t->all[i].begun), kv_gpu_event_close(t->all[i].done);
    pthread_mutex_destroy(&t->lock);
    free(t->all), free(t->unused), free(t);
    e->tickets = NULL;
}

double kv_cuda_copy_seconds(kv_cuda *e)
{
    pthread_mutex_lock(&e->tickets->lock);
    double s = e->tickets->copy_s;
    pthread_mutex_unlock(&e->tickets->lock);
    return s;
}

void kv_cuda_copy_restart(kv_cuda *e)
{
    pthread_mutex_lock(&e->tickets->lock);
    e->tickets->copy_s = 0;
    pthread_mutex_unlock(&e->tickets->lock);
}

/* A ticket of the device that is selected. */
static kv_status take_ticket(kv_cuda *e, const kv_cuda_gpu *v, uint32_t *number, kv_cuda_ticket *out, kv_error *err)
{
    struct kv_cuda_tickets *t = e->tickets;
    kv_status st = KV_OK;

    pthread_mutex_lock(&t->lock);
    for (uint32_t i = 0; i < t->n_unused; i++)
        if (t->all[t->unused[i]].device == v->id) {
            *number = t->unused[i], *out = t->all[*number];
            t->unused[i] = t->unused[--t->n_unused];
            goto out;
        }
    if (t->n == t->cap) {
        uint32_t cap = t->cap ? 2 * t->cap : 64;
        kv_cuda_ticket *all = realloc(t->all, cap * sizeof *all);
        if (all) t->all = all;
        uint32_t *unused = realloc(t->unused, cap * sizeof *unused);
        if (unused) t->unused = unused;
        if (!all || !unused) {
            st = kv_fail(err, KV_ENOMEM, "out of memory for copies from the device");
            goto out;
        }
        t->cap = cap;
    }
    *out = (kv_cuda_ticket){.device = v->id};
    int g = kv_gpu_event_open(&out->begun);
    if (!g) g = kv_gpu_event_open(&out->done);
    if ((st = kv_cuda_check(v, g, "an event", err))) {
        kv_gpu_event_close(out->begun);
        goto out;
    }
    *number = t->n;
    t->all[t->n++] = *out;
out:
    pthread_mutex_unlock(&t->lock);
    return st;
}

static kv_status wait_for(void *ctx, uint64_t number, kv_error *err)
{
    kv_cuda *e = ctx;
    struct kv_cuda_tickets *t = e->tickets;
    double s = 0;
    pthread_mutex_lock(&t->lock);
    kv_cuda_ticket k = t->all[number];
    pthread_mutex_unlock(&t->lock);
    int g = kv_gpu_event_sync(k.done);
    if (!g) g = kv_gpu_event_seconds(k.begun, k.done, &s);
    pthread_mutex_lock(&t->lock);
    t->copy_s += s;
    t->unused[t->n_unused++] = (uint32_t)number;
    pthread_mutex_unlock(&t->lock);
    return g ? kv_fail(err, KV_EIO, "cannot copy from GPU %d: %s", k.device, kv_gpu_text(g)) : KV_OK;
}

/* Where a block lies: n_head arrays of n elements, `head` elements apart. */
typedef struct {
    const void *from;
    int bits;
    size_t head, n;
} place;

static kv_status find(const kv_cuda *e, const kv_chunk *c, place *p, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    const kv_cuda_slot *s = e->at;
    const kv_cuda_layer *l = &e->layer[c->layer];
    size_t row = c->token_first, own = row - e->n_past, w = c->width, first = c->head_first;
    const uint8_t *base;

    p->bits = 32, p->n = c->token_count * w;
    switch (c->stream) {
    case KV_S_Q:
        base = s->q, p->bits = e->bits, p->head = e->call_rows * w;
        p->from = base + (first * p->head + own * w) * e->size;
        return KV_OK;
    case KV_S_K:
    case KV_S_V:
        base = c->stream == KV_S_K ? l->k : l->v, p->bits = e->bits, p->head = e->o.capacity * w;
        p->from = base + (first * p->head + row * w) * e->size;
        return KV_OK;
    case KV_S_WO:
        base = l->wo, p->bits = e->bits, p->head = 0;
        p->from = base + row * w * e->size;
        return KV_OK;
    case KV_S_LSE: p->head = e->call_rows, p->from = s->lse + first * p->head + own; return KV_OK;
    case KV_S_ROWSTAT: p->head = 4 * (size_t)e->call_rows, p->from = s->stat + first * p->head + 4 * own; return KV_OK;
    case KV_S_XNORM: p->head = 0, p->from = s->x_norm + own; return KV_OK;
    case KV_S_COLSUM: p->bits = 64, p->head = e->n_prompt, p->from = s->sum + first * p->head + row; return KV_OK;
    case KV_S_COLSUM_CTX: p->head = e->n_context, p->from = s->sum_ctx + first * p->head + row; return KV_OK;
    case KV_S_MAP:
    case KV_S_MAP_WINDOW: p->bits = 16, p->head = p->n, p->from = NULL; return KV_OK;
    default:
        return kv_fail(err, KV_EUNSUPPORTED, "the CUDA engine does not keep stream '%s' (layer %u, %u heads of %u)",
                       kv_stream_name(c->stream), c->layer, c->head_count, d->n_q_head);
    }
}

/* Rows of the attention map, on the pack stream. */
static int make_map(kv_cuda *e, kv_cuda_gpu *v, const kv_chunk *c)
{
    const kv_model_desc *d = &e->m->desc;
    size_t own = c->token_first - e->n_past, hd = d->head_dim;
    kv_gpu_map m = {.head_first = c->head_first, .n_head = c->head_count, .d = d->head_dim, .n_row = c->token_count};
    m.group = d->n_q_head / d->n_kv_head, m.row0 = c->token_first, m.width = c->width;
    m.window = d->window[c->layer], m.scale = d->scale, m.softcap = d->softcap, m.bits = e->bits;
    m.q_head = e->call_rows * hd, m.kv_head = e->o.capacity * hd, m.lse_head = e->call_rows;
    return kv_map_dev(&m, (uint8_t *)e->at->q + own * hd * e->size, e->layer[c->layer].k, e->at->lse + own, v->map,
                      v->pack);
}

static kv_status fill(void *ctx, const kv_chunk *c, uint32_t planes, uint8_t *dst, uint64_t *ticket, kv_error *err)
{
    kv_cuda *e = ctx;
    kv_cuda_gpu *v = kv_cuda_at_layer(e, c->layer);
    kv_cuda_stage *stage = &v->stage[v->next_stage++ % KV_CUDA_STAGES];
    int bits = c->dtype == KV_F32 ? 32 : c->dtype == KV_F16 ? 16 : 17, g;
    size_t bytes;
    kv_cuda_ticket k;
    uint32_t number = 0;
    place p = {0};
    kv_status st;

    if ((st = kv_cuda_check(v, kv_gpu_select(v->id), "the device", err)) || (st = find(e, c, &p, err))) return st;
    bytes = p.n * c->head_count * (bits == 32 ? 4 : 2);
    if (!p.from && (st = kv_cuda_check(v, kv_cuda_need(v, &v->map, &v->map_bytes, bytes), "attention maps", err)))
        return st;
    if ((st = kv_cuda_check(v, kv_cuda_need(v, &stage->room, &stage->bytes, bytes), "blocks of the trace", err)) ||
        (st = take_ticket(e, v, &number, &k, err)))
        return st;
    g = kv_gpu_stream_wait(v->pack, e->at->done);
    if (!g) g = kv_gpu_stream_wait(v->pack, stage->copied);
    if (!g && !p.from) g = make_map(e, v, c), p.from = v->map;
    if (!g) g = kv_planes_dev(c->head_count, p.n, p.from, p.bits, p.head, stage->room, bits, planes > 1, v->pack);
    if (!g) g = kv_gpu_event_record(stage->packed, v->pack);
    if (!g) g = kv_gpu_stream_wait(v->copy, stage->packed);
    if (!g) g = kv_gpu_event_record(k.begun, v->copy);
    if (!g) g = kv_gpu_copy(dst, stage->room, bytes, v->copy);
    if (!g) g = kv_gpu_event_record(k.done, v->copy);
    if (!g) g = kv_gpu_event_record(stage->copied, v->copy);
    if ((st = kv_cuda_check(v, g, "a block of the trace", err))) {
        kv_gpu_stream_sync(v->copy); /* dst goes back to its owner */
        return st;
    }
    *ticket = number;
    return KV_OK;
}

kv_trace_source kv_cuda_source(kv_cuda *e)
{
    return (kv_trace_source){.ctx = e, .fill = fill, .wait = wait_for};
}
