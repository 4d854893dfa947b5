/* cuda_engine.c - the CUDA engine: devices, memory, which layer runs where and when (cuda_engine.h). */
#include "capture/cuda_engine.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "traces/cli.h"

kv_status kv_cuda_check(const kv_cuda_gpu *v, int code, const char *what, kv_error *err)
{
    if (!code) return KV_OK;
    if (code != KV_GPU_ENOMEM)
        return kv_fail(err, KV_EIO, "GPU %d failed at %s: %s (error %d)", v->id, what, kv_gpu_text(code), code);
    size_t left = 0, all = 0;
    kv_gpu_memory(&left, &all);
    return kv_fail(err, KV_ENOMEM,
                   "GPU %d is out of memory at %s: %.1f GiB hold weights, %.1f GiB the cache and activations, %.1f of "
                   "%.1f GiB are free: run fewer tokens, more --gpus, or --backend cpu",
                   v->id, what, (double)v->weights.bytes / 0x1p30, (double)v->rooms.bytes / 0x1p30,
                   (double)left / 0x1p30, (double)all / 0x1p30);
}

kv_status kv_cuda_room(kv_cuda_gpu *v, kv_cuda_arena *a, size_t n, const char *what, void *out, kv_error *err)
{
    void *p = NULL;
    kv_status st;
    *(void **)out = NULL;
    if (a->n == a->cap) {
        size_t cap = a->cap ? 2 * a->cap : 64;
        void **more = realloc(a->block, cap * sizeof *more);
        if (!more) return kv_fail(err, KV_ENOMEM, "out of memory for %s", what);
        a->block = more, a->cap = cap;
    }
    if ((st = kv_cuda_check(v, kv_gpu_alloc(n, &p), what, err))) return st;
    a->block[a->n++] = p, a->bytes += n;
    *(void **)out = p;
    return KV_OK;
}

void kv_cuda_free_arena(kv_cuda_arena *a)
{
    for (size_t i = 0; i < a->n; i++) kv_gpu_free(a->block[i]);
    free(a->block);
    *a = (kv_cuda_arena){0};
}

int kv_cuda_need(kv_cuda_gpu *v, void **p, size_t *have, size_t n)
{
    int g;
    if (n <= *have) return 0;
    if ((g = kv_gpu_stream_sync(v->run)) || (g = kv_gpu_stream_sync(v->pack)) || (g = kv_gpu_stream_sync(v->copy)))
        return g;
    kv_gpu_free(*p);
    *have = 0;
    if ((g = kv_gpu_alloc(n, p))) return g;
    *have = n;
    return 0;
}

/* ------------------------------------------------------------------------------------------------ memory of a run */
bool kv_cuda_needs_tmp(const kv_model *m)
{
    const kv_layer_weights *w = m->layer;
    return m->desc.n_expert || w->post_attn_norm.w || w->post_ffn_norm.w || m->desc.residual_scale != 1;
}

static kv_status slot_rooms(kv_cuda *e, kv_cuda_gpu *v, kv_cuda_slot *s, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    size_t rows = e->o.capacity, q = rows * d->n_q_head, n_health = KV_HEALTH_OVER + d->n_q_head + 2u * d->n_kv_head;
    kv_cuda_arena *a = &v->rooms;
    kv_status st;
    if ((st = kv_cuda_room(v, a, q * d->head_dim * e->size, "queries", &s->q, err)) ||
        (st = kv_cuda_room(v, a, q * sizeof(float), "statistics", &s->lse, err)) ||
        (st = kv_cuda_room(v, a, rows * sizeof(float), "statistics", &s->x_norm, err)) ||
        (st = kv_cuda_room(v, a, n_health * sizeof *s->health, "statistics", &s->health, err)))
        return st;
    if (!s->health_host && !(s->health_host = kv_gpu_host_alloc(n_health * sizeof *s->health)))
        return kv_cuda_check(v, KV_GPU_ENOMEM, "page-locked host memory", err);
    s->stat = NULL, s->sum = NULL, s->sum_ctx = NULL;
    return KV_OK;
}

static kv_status device_rooms(kv_cuda *e, kv_cuda_gpu *v, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    size_t rows = e->o.capacity, n = e->chunk, h = d->hidden;
    size_t cache = rows * d->n_kv_head * d->head_dim * e->size;
    kv_cuda_arena *a = &v->rooms;
    kv_status st = kv_cuda_check(v, kv_gpu_select(v->id), "the device", err);

    for (uint32_t l = v->first; l < v->end && !st; l++)
        if (!(st = kv_cuda_room(v, a, cache, "the cache", &e->layer[l].k, err)))
            st = kv_cuda_room(v, a, cache, "the cache", &e->layer[l].v, err);
    for (int i = 0; i < 2 && !st; i++) st = slot_rooms(e, v, &v->slot[i], err);
    for (uint32_t i = 0; i < d->n_rope && !st; i++) {
        const float *freq = kv_rope_of_run(&d->rope[i], e->o.capacity);
        size_t bytes = d->rope_dim / 2 * sizeof *freq;
        if ((st = kv_cuda_room(v, a, rows * d->rope_dim * sizeof(float), "angles", &v->rope[i], err)) ||
            (st = kv_cuda_room(v, a, bytes, "angles", &v->inv_freq[i], err)))
            break;
        st = kv_cuda_check(v, kv_gpu_copy(v->inv_freq[i], freq, bytes, v->run), "angles", err);
    }
    kv_cuda_attn one = {.n_q_head = d->n_q_head, .n_kv_head = d->n_kv_head, .d = d->head_dim, .n_row = 1, .scale = 1};
    one.n_key = e->o.capacity, one.row0 = one.n_key - 1, one.bits = one.out_bits = e->bits;
    if (!st && !kv_decode_scratch(&one)) st = kv_fail(err, KV_EUNSUPPORTED, "no kernel decodes this shape");
    v->work_bytes = kv_cuda_work_bytes(e, e->chunk);
    if (st || (st = kv_cuda_room(v, a, rows * sizeof *v->token, "tokens", &v->token, err)) ||
        (st = kv_cuda_room(v, a, rows * h * sizeof(float), "the residual stream", &v->x, err)) ||
        (st = kv_cuda_room(v, a, n * h * e->size, "activations", &v->h, err)) ||
        (st = kv_cuda_room(v, a, v->work_bytes, "activations", &v->work, err)) ||
        (st = kv_cuda_room(v, a, kv_decode_scratch(&one), "activations", &v->scratch, err)) ||
        (st = kv_cuda_room(v, a, rows * sizeof(float), "activations", &v->nll, err)))
        return st;
    if (d->n_expert && (st = kv_cuda_room(v, a, n * d->n_expert * sizeof(float), "activations", &v->expert, err)))
        return st;
    return kv_cuda_needs_tmp(e->m) ? kv_cuda_room(v, a, n * h * sizeof(float), "activations", &v->tmp, err) : KV_OK;
}

/* Room for statistics and column sums of as many rows as there may be, with the first call that wants them. */
static kv_status call_rooms(kv_cuda *e, kv_error *err)
{
    size_t q = (size_t)e->m->desc.n_q_head * e->o.capacity;
    bool stat = e->stat && !e->stat_room, sums = e->sums && !e->sum_room,
         context = e->sums && e->n_context && !e->context_room;
    kv_status st = KV_OK;
    for (uint32_t i = 0; i < e->n_dev && !st && (stat || sums || context); i++) {
        kv_cuda_gpu *v = &e->dev[i];
        st = kv_cuda_check(v, kv_gpu_select(v->id), "the device", err);
        for (int k = 0; k < 2 && !st; k++) {
            kv_cuda_slot *s = &v->slot[k];
            if (stat) st = kv_cuda_room(v, &v->rooms, q * 4 * sizeof(float), "statistics", &s->stat, err);
            if (!st && sums) st = kv_cuda_room(v, &v->rooms, q * sizeof(double), "column sums", &s->sum, err);
            if (!st && context) st = kv_cuda_room(v, &v->rooms, q * sizeof(float), "column sums", &s->sum_ctx, err);
        }
    }
    if (!st) e->stat_room |= stat, e->sum_room |= sums, e->context_room |= context;
    return st;
}

/* What works on the device is done; for when nothing may be on its way any more. */
static void drain(kv_cuda *e)
{
    for (uint32_t i = 0; i < e->n_dev; i++) {
        kv_cuda_gpu *v = &e->dev[i];
        kv_gpu_select(v->id);
        if (v->run) kv_gpu_stream_sync(v->run);
        if (v->pack) kv_gpu_stream_sync(v->pack);
        if (v->copy) kv_gpu_stream_sync(v->copy);
    }
}

static kv_status cuda_resize(kv_engine *base, uint32_t capacity, kv_error *err)
{
    kv_cuda *e = (kv_cuda *)base;
    kv_status st = KV_OK;
    e->n_past = 0, e->compute_s = 0;
    kv_cuda_copy_restart(e);
    if (e->o.no_cache) { /* what branches need is made with them */
        e->o.capacity = capacity;
        return KV_OK;
    }
    if (capacity <= e->o.capacity && e->dev[0].rooms.n) return KV_OK;
    drain(e);
    e->o.capacity = capacity;
    e->chunk = e->o.chunk ? e->o.chunk : KV_CUDA_CHUNK;
    if (e->chunk > capacity) e->chunk = capacity;
    kv_gpu_host_free(e->nll_host);
    if (!(e->nll_host = kv_gpu_host_alloc(capacity * sizeof *e->nll_host)))
        return kv_cuda_check(e->dev, KV_GPU_ENOMEM, "page-locked host memory", err);
    e->stat_room = e->sum_room = e->context_room = false;
    for (uint32_t i = 0; i < e->n_dev && !st; i++) {
        if ((st = kv_cuda_check(&e->dev[i], kv_gpu_select(e->dev[i].id), "the device", err))) break;
        kv_cuda_free_arena(&e->dev[i].rooms);
        st = device_rooms(e, &e->dev[i], err);
    }
    return st;
}

/* ------------------------------------------------------------------------------------------------ running */
static kv_cuda_slot *slot_of(kv_cuda_gpu *v, uint32_t layer)
{
    return &v->slot[(layer - v->first) % 2];
}

/* x of the device before, which has done its last layer, to this one. */
static int hand_over(kv_cuda *e, kv_cuda_gpu *from, kv_cuda_gpu *to)
{
    size_t n = (size_t)e->call_rows * e->m->desc.hidden * sizeof(float);
    int g = kv_gpu_select(from->id);
    if (!g) g = kv_gpu_copy_peer(to->x, to->id, from->x, from->id, n, from->run);
    if (!g) g = kv_gpu_event_record(from->handed, from->run);
    if (!g) g = kv_gpu_select(to->id);
    return g ? g : kv_gpu_stream_wait(to->run, from->handed);
}

static int begin_call(kv_cuda *e, const uint32_t *token)
{
    const kv_model_desc *d = &e->m->desc;
    uint32_t n = e->call_rows;
    int g = 0;
    for (uint32_t i = 0; i < e->n_dev && !g; i++) {
        kv_cuda_gpu *v = &e->dev[i];
        g = kv_gpu_select(v->id);
        for (uint32_t r = 0; r < d->n_rope && !g; r++)
            g = kv_rope_table_dev(n, d->rope_dim, e->n_past, v->inv_freq[r], d->rope[r].mscale, v->rope[r], v->run);
        if (!g) g = kv_gpu_copy(v->token, token, n * sizeof *token, v->run);
    }
    kv_cuda_gpu *v = e->dev;
    if (!g) g = kv_gpu_select(v->id);
    if (!g) g = kv_embed_dev(n, d->hidden, d->n_vocab, v->token, v->tok_embd, e->bits, d->embed_scale, v->x, v->run);
    if (!g && v->pos_embd) {
        const uint8_t *rows = (const uint8_t *)v->pos_embd + (size_t)e->n_past * d->hidden * e->size;
        g = kv_add_dev(n, d->hidden, v->x, rows, e->bits, d->hidden, NULL, v->run);
    }
    return g;
}

/* Everything of a layer goes to the device's queue; nothing is waited for. */
static int start_layer(kv_cuda *e, uint32_t l)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_gpu *v = kv_cuda_at_layer(e, l);
    kv_cuda_slot *s = slot_of(v, l);
    uint32_t n = e->call_rows;
    size_t health = (KV_HEALTH_OVER + d->n_q_head + 2u * (size_t)d->n_kv_head) * sizeof *s->health;
    int g = kv_gpu_select(v->id);

    s->layer = l;
    if (!g && l && l == v->first) g = hand_over(e, v - 1, v);
    if (!g) g = kv_gpu_stream_wait(v->run, s->fetched);
    if (!g) g = kv_gpu_event_record(s->begun, v->run);
    if (!g) g = kv_gpu_zero(s->health, health, v->run);
    for (uint32_t r = 0; r < n && !g; r += e->chunk)
        g = kv_cuda_layer_rows(e, v, l, s, r, n - r < e->chunk ? n - r : e->chunk);
    if (!g && e->sums) g = kv_cuda_column_sums(e, v, l, s);
    if (!g) g = kv_finite_dev(n, s->x_norm, s->health + KV_HEALTH_X, v->run);
    if (!g) g = kv_finite_dev((size_t)n * d->n_q_head, s->lse, s->health + KV_HEALTH_LSE, v->run);
    if (!g) g = kv_gpu_copy(s->health_host, s->health, health, v->run);
    return g ? g : kv_gpu_event_record(s->done, v->run);
}

kv_status kv_cuda_health(const kv_cuda *e, const kv_cuda_slot *s, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    uint32_t nq = d->n_q_head, nk = d->n_kv_head;
    const uint32_t *over = s->health_host + KV_HEALTH_OVER;
    if (s->health_host[KV_HEALTH_X])
        return kv_fail(
            err, KV_EFORMAT,
            "layer %u: the residual stream is not finite: the model's weights are damaged, or its activations "
            "do not fit into %s",
            s->layer, kv_dtype_name(e->o.dtype));
    for (uint32_t i = 0; i < nq + 2 * nk; i++)
        if (over[i])
            return kv_fail(err, KV_EUNSUPPORTED,
                           "layer %u: %u values of %s, head %u, overflow %s: run with --dtype bf16 or f32", s->layer,
                           over[i],
                           i < nq        ? "Q"
                           : i < nq + nk ? "K"
                                         : "V",
                           i < nq ? i : (i - nq) % nk, kv_dtype_name(e->o.dtype));
    if (s->health_host[KV_HEALTH_LSE])
        return kv_fail(err, KV_EFORMAT, "layer %u: the attention is not finite: the model's weights are damaged",
                       s->layer);
    return KV_OK;
}

/* Wait for the layer and let it be recorded, while the next one runs. */
static kv_status finish_layer(kv_cuda *e, uint32_t l, const kv_engine_hook *hook, kv_error *err)
{
    kv_cuda_gpu *v = kv_cuda_at_layer(e, l);
    kv_cuda_slot *s = slot_of(v, l);
    kv_attn_view view = {.layer = l, .row0 = e->n_past, .n_row = e->call_rows, .n_key = e->n_past + e->call_rows};
    double seconds = 0;
    kv_status st;
    int g = kv_gpu_event_sync(s->done);

    if (!g) g = kv_gpu_event_seconds(s->begun, s->done, &seconds);
    if ((st = kv_cuda_check(v, g, "a layer", err)) || (st = kv_cuda_health(e, s, err))) return st;
    e->compute_s += seconds;
    e->at = s;
    view.device = &e->source;
    if (hook && hook->record && (st = hook->record(hook->ctx, &view, err))) return st;
    return kv_cuda_check(v, kv_gpu_event_record(s->fetched, v->pack), "a layer", err);
}

static kv_status run_layers(kv_cuda *e, const uint32_t *token, const kv_engine_hook *hook, kv_error *err)
{
    uint32_t n = e->m->desc.n_layer;
    kv_status st = kv_cuda_check(e->dev, begin_call(e, token), "the embedding", err);
    for (uint32_t l = 0; l <= n && !st; l++) {
        if (kv_interrupted()) return kv_fail(err, KV_EINTERRUPTED, "stopped by a signal before layer %u", l);
        if (l < n) st = kv_cuda_check(kv_cuda_at_layer(e, l), start_layer(e, l), "a layer", err);
        if (l == n) st = kv_cuda_check(&e->dev[e->n_dev - 1], kv_cuda_begin_losses(e, hook), "the logits", err);
        if (!st && l) st = finish_layer(e, l - 1, hook, err);
    }
    return st;
}

static void look_at_memory(kv_cuda *e)
{
    size_t used = 0, left, all;
    for (uint32_t i = 0; i < e->n_dev; i++)
        if (!kv_gpu_select(e->dev[i].id) && !kv_gpu_memory(&left, &all)) used += all - left;
    e->used_bytes = used;
}

static kv_status cuda_run(kv_engine *base, const uint32_t *token, uint32_t n, const kv_engine_hook *hook,
                          float *last_logits, kv_error *err)
{
    kv_cuda *e = (kv_cuda *)base;
    const kv_model_desc *d = &e->m->desc;
    unsigned want = 0;
    kv_status st;

    if (!n || n > e->o.capacity - e->n_past || e->o.no_cache)
        return kv_fail(err, KV_EMISUSE, "cannot run %u tokens: the cache holds %u of %u", n, e->n_past,
                       e->o.no_cache ? 0 : e->o.capacity);
    if (hook && hook->attend)
        return kv_fail(err, KV_EUNSUPPORTED, "the CUDA engine has no attention over kept sets: use the CPU");
    for (uint32_t i = 0; i < n; i++)
        if (token[i] >= d->n_vocab)
            return kv_fail(err, KV_EMISUSE, "token %u at position %u is not in the vocabulary of '%s' (%u tokens)",
                           token[i], e->n_past + i, d->name, d->n_vocab);
    for (uint32_t l = 0; l < d->n_layer && hook && hook->want; l++) want |= hook->want(hook->ctx, l);
    e->call_rows = n, e->stat = want & KV_WANT_STAT;
    e->sums = want & KV_WANT_SUMS && !e->n_past && hook->n_prompt && hook->n_prompt <= n;
    if (e->sums) e->n_prompt = hook->n_prompt, e->n_context = hook->n_context;
    if (!(st = call_rooms(e, err)) && !(st = run_layers(e, token, hook, err)))
        st = kv_cuda_logits(e, hook, last_logits, err);
    look_at_memory(e);
    if (st)
        drain(e);
    else
        e->n_past += n;
    return st;
}

static void cuda_reset(kv_engine *base)
{
    ((kv_cuda *)base)->n_past = 0;
}

static kv_engine_usage cuda_usage(const kv_engine *base)
{
    kv_cuda *e = (kv_cuda *)base;
    const kv_model_desc *d = &e->m->desc;
    kv_engine_usage u = {.backend = "cuda", .n_device = e->n_dev, .compute_s = e->compute_s};
    u.copy_s = kv_cuda_copy_seconds(e);
    u.cache_bytes = 2u * (size_t)d->n_layer * e->o.capacity * d->n_kv_head * d->head_dim * e->size;
    for (uint32_t i = 0; i < e->n_dev; i++) {
        const kv_cuda_gpu *v = &e->dev[i];
        u.weight_bytes += v->weights.bytes;
        u.device_bytes += v->weights.bytes + v->rooms.bytes + v->map_bytes + kv_gpu_blas_bytes();
        for (uint32_t k = 0; k < KV_CUDA_STAGES; k++) u.device_bytes += v->stage[k].bytes;
    }
    u.device_used = e->used_bytes;
    kv_cuda_device(u.device, sizeof u.device);
    return u;
}

static bool cuda_memory(const kv_engine *base, kv_trace_memory *out)
{
    (void)base;
    *out = (kv_trace_memory){kv_gpu_host_alloc, kv_gpu_host_free};
    return true;
}

/* ------------------------------------------------------------------------------------------------ open and close */
/* Also what a device that is lost has left on the host. */
static void close_device(kv_cuda_gpu *v)
{
    kv_gpu_select(v->id);
    for (int i = 0; i < 2; i++) {
        kv_cuda_slot *s = &v->slot[i];
        kv_gpu_event_close(s->begun), kv_gpu_event_close(s->done), kv_gpu_event_close(s->fetched);
        kv_gpu_host_free(s->health_host);
    }
    for (uint32_t i = 0; i < KV_CUDA_STAGES; i++) {
        kv_gpu_event_close(v->stage[i].packed), kv_gpu_event_close(v->stage[i].copied);
        kv_gpu_free(v->stage[i].room);
    }
    kv_gpu_free(v->map);
    kv_cuda_free_arena(&v->weights), kv_cuda_free_arena(&v->rooms);
    kv_gpu_event_close(v->handed), kv_gpu_event_close(v->logits_begun), kv_gpu_event_close(v->logits_done);
    kv_gpu_blas_close(v->blas);
    kv_gpu_stream_close(v->run), kv_gpu_stream_close(v->pack), kv_gpu_stream_close(v->copy);
}

static void cuda_close(kv_engine *base)
{
    kv_cuda *e = (kv_cuda *)base;
    drain(e);
    kv_cuda_fetch_close(e);
    kv_gpu_host_free(e->logits_host), kv_gpu_host_free(e->nll_host);
    if (e->n_dev) kv_gpu_select(e->dev[0].id);
    for (int i = 0; i < 2; i++) {
        kv_cuda_prompt *p = &e->compare.prompt[i];
        kv_gpu_event_close(p->ready), kv_gpu_event_close(p->used), kv_gpu_free(p->list);
    }
    for (uint32_t i = 0; i < e->n_dev; i++) close_device(&e->dev[i]);
    for (uint32_t l = 0; e->layer && l < e->m->desc.n_layer; l++) free(e->layer[l].ffn);
    free(e->dev), free(e->layer), free(e);
}

static kv_status open_device(kv_cuda_gpu *v, kv_error *err)
{
    int g = kv_gpu_select(v->id);
    if (!g) g = kv_gpu_stream_open(false, &v->run);
    if (!g) g = kv_gpu_stream_open(true, &v->pack);
    if (!g) g = kv_gpu_stream_open(true, &v->copy);
    if (!g) g = kv_gpu_blas_open(v->run, &v->blas);
    if (!g) g = kv_gpu_event_open(&v->handed);
    if (!g) g = kv_gpu_event_open(&v->logits_begun);
    if (!g) g = kv_gpu_event_open(&v->logits_done);
    for (int i = 0; i < 2 && !g; i++) {
        kv_cuda_slot *s = &v->slot[i];
        g = kv_gpu_event_open(&s->begun);
        if (!g) g = kv_gpu_event_open(&s->done);
        if (!g) g = kv_gpu_event_open(&s->fetched);
    }
    for (uint32_t i = 0; i < KV_CUDA_STAGES && !g; i++) {
        g = kv_gpu_event_open(&v->stage[i].packed);
        if (!g) g = kv_gpu_event_open(&v->stage[i].copied);
    }
    return kv_cuda_check(v, g, "the start", err);
}

/* Steps that the forward pass on a device does not have. */
static kv_status check_architecture(const kv_model_desc *d, kv_error *err)
{
    const char *what = d->n_expert && d->residual_scale != 1 ? "a mixture of experts with scaled residuals"
                       : d->n_expert > 1024                  ? "more than 1,024 experts"
                                                             : NULL;
    if (!what) return KV_OK;
    return kv_fail(err, KV_EUNSUPPORTED, "model '%s' has %s, which the CUDA engine does not: use --backend cpu",
                   d->name, what);
}

kv_status kv_engine_open_cuda(const kv_model *m, const kv_engine_options *o, kv_engine **out, kv_error *err)
{
    static const kv_engine_ops ops = {.run = cuda_run,
                                      .reset = cuda_reset,
                                      .close = cuda_close,
                                      .resize = cuda_resize,
                                      .compare = kv_cuda_compare_run,
                                      .compare_room = kv_cuda_compare_room,
                                      .usage = cuda_usage,
                                      .memory = cuda_memory};
    const kv_model_desc *d = &m->desc;
    int have = kv_gpu_count();
    uint32_t n = o->gpus ? o->gpus : 1;
    kv_cuda *e = NULL;
    kv_status st;

    *out = NULL;
    if (!have) return kv_fail(err, KV_EUNSUPPORTED, "no CUDA device that this build can use: run with --backend cpu");
    if (n > (uint32_t)have || n > d->n_layer)
        return kv_fail(err, KV_EMISUSE, "--gpus %u: this machine has %d, the model %u layers", n, have, d->n_layer);
    if (o->dtype != KV_F32 && o->dtype != KV_F16 && o->dtype != KV_BF16)
        return kv_fail(err, KV_EMISUSE, "cannot run in dtype '%s': use f32, f16 or bf16", kv_dtype_name(o->dtype));
    if (!o->capacity) return kv_fail(err, KV_EMISUSE, "cannot run a model on no tokens");
    if ((st = check_architecture(d, err)) || (st = kv_array(&e, 1, sizeof *e, err))) return st;
    e->base.ops = &ops, e->m = m, e->o = *o;
    e->bits = o->dtype == KV_F32 ? 32 : o->dtype == KV_F16 ? 16 : 17;
    e->size = kv_dtype_bytes(o->dtype);
    e->source = kv_cuda_source(e);
    if ((st = kv_array(&e->layer, d->n_layer, sizeof *e->layer, err)) ||
        (st = kv_array(&e->dev, n, sizeof *e->dev, err)) || (st = kv_cuda_fetch_open(e, err)))
        goto out;
    e->n_dev = n;
    for (uint32_t i = 0; i < n; i++) {
        kv_cuda_gpu *v = &e->dev[i];
        v->id = (int)i, v->first = i * d->n_layer / n, v->end = (i + 1) * d->n_layer / n;
        if ((st = open_device(v, err))) goto out;
    }
    for (int i = 0; i < 2 && !st; i++) {
        kv_cuda_prompt *p = &e->compare.prompt[i];
        int g = kv_gpu_select(e->dev[0].id);
        if (!g) g = kv_gpu_event_open(&p->ready);
        if (!g) g = kv_gpu_event_open(&p->used);
        if ((st = kv_cuda_check(e->dev, g, "the start", err))) goto out;
    }
    size_t row = d->n_vocab * sizeof(float);
    e->logits_host_rows = (uint32_t)(((size_t)32 << 20) / row);
    if (!e->logits_host_rows) e->logits_host_rows = 1;
    e->logits_host = kv_gpu_host_alloc(e->logits_host_rows * row);
    if (!e->logits_host) {
        st = kv_cuda_check(e->dev, KV_GPU_ENOMEM, "page-locked host memory", err);
        goto out;
    }
    if ((st = kv_cuda_load(e, err)) || (st = cuda_resize(&e->base, o->capacity, err))) goto out;
    *out = &e->base;
    return KV_OK;
out:
    cuda_close(&e->base);
    return st;
}
