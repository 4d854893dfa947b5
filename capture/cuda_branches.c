/* cuda_branches.c - branches behind a prompt's kept entries, compared with branch 0 on the device (kv_engine_compare).
 *
 * Rows of a branch stand together and branches one behind the other, so a chunk of rows is some whole branches and runs
 * through a layer by itself: no cache, only this chunk's queries, keys and values. Chunks are always computed whole,
 * the rows behind the last branch being idle branches that see nothing of the prompt: then products have the same shape
 * whatever came along, and a branch the same bytes. Logits are made a block of rows at a time and compared with those
 * of branch 0 where they lie. The next layer's prompt is loaded and copied while the device computes this one. */
#include "capture/cuda_engine.h"

#include <math.h>
#include <stdlib.h>

#include "traces/cli.h"

#define ROWS_MAX 131072u /* of all branches: bounds the residual stream */

static size_t health_bytes(const kv_model_desc *d)
{
    return (KV_HEALTH_OVER + d->n_q_head + 2u * (size_t)d->n_kv_head) * sizeof(uint32_t);
}

/* Branches of a chunk. */
static uint32_t of_chunk(const kv_cuda *e, uint32_t n)
{
    uint32_t chunk = e->o.chunk ? e->o.chunk : KV_CUDA_CHUNK;
    return chunk > n ? chunk / n : 1;
}

static uint32_t whole_chunks(const kv_cuda *e, uint32_t n, uint32_t n_branch)
{
    uint32_t step = of_chunk(e, n);
    return (n_branch + step - 1) / step * step;
}

/* ------------------------------------------------------------------------------------------------ memory */
static kv_status chunk_rooms(kv_cuda *e, kv_cuda_gpu *v, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_compare *c = &e->compare;
    kv_cuda_arena *a = &v->rooms;
    size_t n = e->chunk, hd = d->head_dim * e->size, q = n * d->n_q_head * hd, kv = n * d->n_kv_head * hd;
    kv_status st;
    v->work_bytes = kv_cuda_work_bytes(e, e->chunk);
    if ((st = kv_cuda_room(v, a, q, "queries", &c->q, err)) || (st = kv_cuda_room(v, a, kv, "keys", &c->k, err)) ||
        (st = kv_cuda_room(v, a, kv, "values", &c->v, err)) ||
        (st = kv_cuda_room(v, a, n * d->n_q_head * sizeof(float), "statistics", &c->lse, err)) ||
        (st = kv_cuda_room(v, a, n * d->hidden * e->size, "activations", &v->h, err)) ||
        (st = kv_cuda_room(v, a, v->work_bytes, "activations", &v->work, err)))
        return st;
    for (uint32_t i = 0; i < d->n_rope; i++)
        if ((st = kv_cuda_room(v, a, n * d->rope_dim * sizeof(float), "angles", &v->rope[i], err)) ||
            (st = kv_cuda_room(v, a, d->rope_dim / 2 * sizeof(float), "angles", &v->inv_freq[i], err)))
            return st;
    if (d->n_expert && (st = kv_cuda_room(v, a, n * d->n_expert * sizeof(float), "activations", &v->expert, err)))
        return st;
    return kv_cuda_needs_tmp(e->m) ? kv_cuda_room(v, a, n * d->hidden * sizeof(float), "activations", &v->tmp, err)
                                   : KV_OK;
}

static kv_status prompt_rooms(kv_cuda *e, kv_cuda_gpu *v, size_t branches, uint32_t row0, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_compare *c = &e->compare;
    size_t cache = (size_t)row0 * d->n_kv_head * d->head_dim, heads = branches * d->n_q_head * sizeof(uint32_t);
    kv_status st =
        e->bits == 32 ? KV_OK : kv_cuda_room(v, &v->rooms, cache * sizeof(float), "the prompt", &c->wide, err);
    for (int i = 0; i < 2 && !st; i++) {
        kv_cuda_prompt *p = &c->prompt[i];
        if ((st = kv_cuda_room(v, &v->rooms, cache * e->size, "the prompt", &p->k, err)) ||
            (st = kv_cuda_room(v, &v->rooms, cache * e->size, "the prompt", &p->v, err)) ||
            (st = kv_cuda_room(v, &v->rooms, heads, "kept sets", &p->first, err)) ||
            (st = kv_cuda_room(v, &v->rooms, heads, "kept sets", &p->count, err)))
            return st;
    }
    return st;
}

static kv_status rooms(kv_cuda *e, kv_cuda_gpu *v, uint32_t row0, uint32_t n, uint32_t n_branch, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_compare *c = &e->compare;
    kv_cuda_arena *a = &v->rooms;
    size_t branches = whole_chunks(e, n, n_branch), rows = branches * n, L = d->n_layer, step;
    kv_status st;
    if (a->n && c->n == n && c->n_branch >= n_branch && c->row0 >= row0) return KV_OK;
    kv_cuda_free_arena(a);
    c->n = 0, e->chunk = of_chunk(e, n) * n;
    if ((st = chunk_rooms(e, v, err)) || (st = prompt_rooms(e, v, branches, row0, err))) return st;
    step = kv_cuda_logit_step(e, v);
    size_t x = (rows + step) * d->hidden * sizeof(float), base = (n + step - 1) / step * step;
    if ((st = kv_cuda_room(v, a, x, "the residual stream", &v->x, err)) ||
        (st = kv_cuda_room(v, a, rows * sizeof(uint32_t), "tokens", &v->token, err)) ||
        (st = kv_cuda_room(v, a, n * sizeof(uint32_t), "tokens", &c->target, err)) ||
        (st = kv_cuda_room(v, a, rows * sizeof(float), "statistics", &c->x_norm, err)) ||
        (st = kv_cuda_room(v, a, L * health_bytes(d), "statistics", &c->health, err)) ||
        (st = kv_cuda_room(v, a, n * (size_t)d->n_q_head * d->head_dim * e->size, "activations", &c->base, err)) ||
        (st = kv_cuda_room(v, a, base * d->n_vocab * sizeof(float), "logits of the full cache", &c->logits, err)) ||
        (st = kv_cuda_room(v, a, n * sizeof *c->said, "losses", &c->said, err)) ||
        (st = kv_cuda_room(v, a, rows * 4 * sizeof(float), "losses", &c->loss, err)) ||
        (st = kv_cuda_room(v, a, L * rows * sizeof(float), "errors", &c->head, err)) ||
        (st = kv_cuda_room(v, a, L * rows * sizeof(float), "errors", &c->stream, err)) ||
        (st = kv_cuda_check(v, kv_gpu_zero(v->x, x, v->run), "the residual stream", err)))
        return st;
    c->n = n, c->n_branch = (uint32_t)branches, c->row0 = row0;
    return KV_OK;
}

uint32_t kv_cuda_compare_room(kv_engine *base, uint32_t row0, uint32_t n)
{
    kv_cuda *e = (kv_cuda *)base;
    const kv_model_desc *d = &e->m->desc;
    size_t left = 0, all = 0, most = ROWS_MAX / (n ? n : 1);
    size_t branch = n * ((size_t)d->hidden * 4 + 32 + 8 * (size_t)d->n_layer) + (size_t)row0 * d->n_q_head * 8;
    if (!kv_gpu_select(e->dev[0].id) && !kv_gpu_memory(&left, &all) &&
        (left + e->dev[0].rooms.bytes) / 2 / branch < most)
        most = (left + e->dev[0].rooms.bytes) / 2 / branch;
    return most < 2 ? 2 : (uint32_t)most;
}

/* ------------------------------------------------------------------------------------------------ one layer's prompt
 */
static int upload_cache(kv_cuda *e, kv_cuda_gpu *v, const float *from, size_t stride, uint32_t row0, void *to)
{
    const kv_model_desc *d = &e->m->desc;
    size_t head = (size_t)row0 * d->head_dim;
    float *wide = e->bits == 32 ? to : e->compare.wide;
    int g = 0;
    for (uint32_t h = 0; h < d->n_kv_head && !g; h++)
        g = kv_gpu_copy(wide + h * head, from + h * stride * d->head_dim, head * sizeof *wide, v->copy);
    if (g || e->bits == 32) return g;
    return kv_cast_dev(head * d->n_kv_head, wide, to, e->bits, NULL, v->copy);
}

static kv_status take_prompt(kv_cuda *e, kv_cuda_gpu *v, kv_cuda_prompt *p, const kv_branch_prompt *from, uint32_t row0,
                             uint32_t n_branch, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    size_t heads = (size_t)n_branch * d->n_q_head * sizeof(uint32_t), n = from->n_list * sizeof(uint32_t),
           all = (size_t)e->compare.n_branch * d->n_q_head * sizeof(uint32_t);
    int g = kv_cuda_need(v, (void **)&p->list, &p->list_bytes, n);
    if (!g) g = kv_gpu_stream_wait(v->copy, p->used);
    if (!g) g = upload_cache(e, v, from->k, from->stride, row0, p->k);
    if (!g) g = upload_cache(e, v, from->v, from->stride, row0, p->v);
    if (!g && n) g = kv_gpu_copy(p->list, from->list, n, v->copy);
    if (!g) g = kv_gpu_zero(p->first, all, v->copy);
    if (!g) g = kv_gpu_zero(p->count, all, v->copy);
    if (!g) g = kv_gpu_copy(p->first, from->first, heads, v->copy);
    if (!g) g = kv_gpu_copy(p->count, from->count, heads, v->copy);
    if (!g) g = kv_gpu_event_record(p->ready, v->copy);
    return kv_cuda_check(v, g, "a layer's prompt", err);
}

/* ------------------------------------------------------------------------------------------------ rows */
/* Tokens, angles and embeddings. Every chunk's rows are at the same positions: one table serves all. */
static int begin(kv_cuda *e, kv_cuda_gpu *v, const uint32_t *token, const uint32_t *target, uint32_t row0, uint32_t n)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_compare *c = &e->compare;
    uint32_t branches = c->n_branch;
    size_t rows = (size_t)branches * n;
    int g = kv_gpu_zero(c->health, d->n_layer * health_bytes(d), v->run);
    for (uint32_t r = 0; r < d->n_rope && !g; r++) {
        size_t table = (size_t)n * d->rope_dim;
        const float *freq = kv_rope_of_run(&d->rope[r], e->o.capacity);
        g = kv_gpu_copy(v->inv_freq[r], freq, d->rope_dim / 2 * sizeof *freq, v->run);
        if (!g) g = kv_rope_table_dev(n, d->rope_dim, row0, v->inv_freq[r], d->rope[r].mscale, v->rope[r], v->run);
        for (uint32_t b = 1; b < e->chunk / n && !g; b++)
            g = kv_gpu_copy(v->rope[r] + b * table, v->rope[r], table * sizeof(float), v->run);
    }
    if (!g) g = kv_gpu_copy(c->target, target, n * sizeof *target, v->run);
    for (uint32_t b = 0; b < branches && !g; b++)
        g = kv_gpu_copy(v->token + (size_t)b * n, token, n * sizeof *token, v->run);
    if (!g) g = kv_embed_dev(rows, d->hidden, d->n_vocab, v->token, v->tok_embd, e->bits, d->embed_scale, v->x, v->run);
    for (uint32_t b = 0; b < branches && v->pos_embd && !g; b++)
        g = kv_add_dev(n, d->hidden, v->x + (size_t)b * n * d->hidden,
                       (const uint8_t *)v->pos_embd + (size_t)row0 * d->hidden * e->size, e->bits, d->hidden, NULL,
                       v->run);
    return g;
}

/* Branches first.. of the layer, a whole chunk; `real` rows of them are asked for. */
static int run_chunk(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, const kv_cuda_prompt *p, uint32_t row0, uint32_t n,
                     uint32_t first, size_t real)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_compare *c = &e->compare;
    size_t rows = e->chunk, hd = d->head_dim, width = (size_t)d->n_q_head * hd, row = (size_t)first * n;
    uint32_t *health = (uint32_t *)((uint8_t *)c->health + l * health_bytes(d));
    kv_cuda_qkv to = {.q = c->q, .k = c->k, .v = c->v, .q_head = rows * hd, .kv_head = rows * hd, .health = health};
    kv_cuda_attn a = {.n_q_head = d->n_q_head,
                      .n_kv_head = d->n_kv_head,
                      .d = d->head_dim,
                      .n_row = n,
                      .n_key = row0,
                      .window = d->window[l],
                      .scale = d->scale,
                      .softcap = d->softcap,
                      .bits = e->bits,
                      .out_bits = e->bits,
                      .q_head = rows * hd,
                      .q_row = hd,
                      .kv_head = row0 * hd,
                      .kv_token = hd,
                      .out_head = hd,
                      .out_row = width,
                      .lse_head = rows};
    kv_cuda_branches b = {.n_branch = (uint32_t)(rows / n),
                          .own_k = c->k,
                          .own_v = c->v,
                          .own_head = rows * hd,
                          .list = p->list,
                          .first = p->first + (size_t)first * d->n_q_head,
                          .count = p->count + (size_t)first * d->n_q_head};
    float *x = v->x + row * d->hidden;
    void *out = kv_cuda_attended(e, v, (uint32_t)rows);
    int g = kv_cuda_before(e, v, l, (uint32_t)rows, x, c->x_norm + row, &to);
    if (!g) g = kv_attention_branches_dev(&a, &b, c->q, p->k, p->v, out, c->lse, v->run);
    if (!g) g = kv_finite_dev(rows * d->n_q_head, c->lse, health + KV_HEALTH_LSE, v->run);
    if (!g && !first) g = kv_gpu_copy(c->base, out, n * width * e->size, v->run);
    if (!g)
        g = kv_row_distance_dev(real, n, d->n_q_head, hd, e->bits, c->base, out,
                                c->head + ((size_t)l * c->n_branch + first) * n, v->run);
    return g ? g : kv_cuda_after(e, v, l, (uint32_t)rows, x);
}

static int run_layer(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, const kv_cuda_prompt *p, uint32_t row0, uint32_t n,
                     uint32_t n_branch)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_compare *c = &e->compare;
    size_t rows = (size_t)n_branch * n;
    int g = kv_gpu_stream_wait(v->run, p->ready);
    if (!g)
        g = kv_row_distance_dev(rows, n, 1, d->hidden, 32, v->x, v->x, c->stream + (size_t)l * c->n_branch * n, v->run);
    for (uint32_t b = 0; b < n_branch && !g; b += e->chunk / n) {
        size_t left = rows - (size_t)b * n;
        g = run_chunk(e, v, l, p, row0, n, b, left < e->chunk ? left : e->chunk);
    }
    if (!g)
        g = kv_finite_dev(rows, c->x_norm, (uint32_t *)((uint8_t *)c->health + l * health_bytes(d)) + KV_HEALTH_X,
                          v->run);
    return g ? g : kv_gpu_event_record(p->used, v->run);
}

/* The full cache's logits stay; those of the others pass. Blocks are whole too, over what lies behind the last row. */
static int run_logits(kv_cuda *e, kv_cuda_gpu *v, uint32_t n, uint32_t n_branch)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_compare *c = &e->compare;
    uint32_t step = kv_cuda_logit_step(e, v), rows = n * n_branch;
    int g = 0;
    for (uint32_t r = 0; r < n && !g; r += step)
        g = kv_cuda_logit_rows(e, v, r, step, c->logits + (size_t)r * d->n_vocab);
    if (!g) g = kv_logit_rows_dev(n, d->n_vocab, c->logits, c->target, c->said, v->run);
    for (uint32_t r = n; r < rows && !g; r += step) {
        uint32_t count = rows - r < step ? rows - r : step;
        g = kv_cuda_logit_rows(e, v, r, step, v->work);
        if (!g)
            g = kv_logit_compare_dev(count, d->n_vocab, v->work, r, n, c->logits, c->said, c->target,
                                     c->loss + 4 * (size_t)r, v->run);
    }
    return g;
}

/* ------------------------------------------------------------------------------------------------ results */
static kv_status fetch(kv_cuda *e, kv_cuda_gpu *v, uint32_t n, uint32_t n_branch, kv_branch_losses *out, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_compare *c = &e->compare;
    size_t rows = (size_t)n * n_branch, all = (size_t)n * c->n_branch, bytes = health_bytes(d);
    kv_logit_row *said = NULL;
    uint32_t *health = NULL;
    bool finite = true;
    kv_status st = kv_array(&said, n, sizeof *said, err);
    if (!st) st = kv_array(&health, d->n_layer, bytes, err);
    int g = st ? 0 : kv_gpu_copy(said, c->said, n * sizeof *said, v->run);
    if (!st && !g) g = kv_gpu_copy(health, c->health, d->n_layer * bytes, v->run);
    if (!st && !g) g = kv_gpu_copy(out->loss, c->loss, rows * 4 * sizeof(float), v->run);
    for (uint32_t l = 0; l < d->n_layer && !st && !g; l++) {
        g = kv_gpu_copy(out->head + l * rows, c->head + l * all, rows * sizeof(float), v->run);
        if (!g) g = kv_gpu_copy(out->stream + l * rows, c->stream + l * all, rows * sizeof(float), v->run);
    }
    if (!g) g = kv_gpu_stream_sync(v->run);
    if (!st) st = kv_cuda_check(v, g, "the results", err);
    for (uint32_t l = 0; l < d->n_layer && !st; l++) {
        kv_cuda_slot s = {.layer = l, .health_host = (uint32_t *)((uint8_t *)health + l * bytes)};
        st = kv_cuda_health(e, &s, err);
    }
    for (uint32_t r = 0; r < n && !st; r++) out->nll[r] = said[r].nll, finite &= isfinite(said[r].nll) != 0;
    for (size_t i = 4 * (size_t)n; i < 4 * rows && !st; i++) finite &= isfinite(out->loss[i]) != 0;
    if (!st && !finite)
        st = kv_fail(err, KV_EFORMAT, "the logits are not finite: the model's weights are damaged, or too large for %s",
                     kv_dtype_name(e->o.dtype));
    free(said), free(health);
    return st;
}

kv_status kv_cuda_compare_run(kv_engine *base, const uint32_t *token, const uint32_t *target, uint32_t row0, uint32_t n,
                              uint32_t n_branch, const kv_branch_source *source, kv_branch_losses *out, kv_error *err)
{
    kv_cuda *e = (kv_cuda *)base;
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_gpu *v = e->dev;
    kv_status st;
    if (!n || !n_branch || !row0 || row0 > e->o.capacity || n > e->o.capacity - row0 ||
        (uint64_t)n * n_branch > INT32_MAX / 4 || !e->o.no_cache)
        return kv_fail(err, KV_EMISUSE, "cannot compare %u branches of %u tokens from position %u", n_branch, n, row0);
    if (e->n_dev > 1) return kv_fail(err, KV_EUNSUPPORTED, "branches are compared on one GPU, not on %u", e->n_dev);
    for (uint32_t i = 0; i < n; i++)
        if (token[i] >= d->n_vocab || target[i] >= d->n_vocab)
            return kv_fail(err, KV_EMISUSE, "a token at position %u is not in the vocabulary of '%s'", row0 + i,
                           d->name);
    if ((st = kv_cuda_check(v, kv_gpu_select(v->id), "the device", err)) || (st = rooms(e, v, row0, n, n_branch, err)))
        return st;
    st = kv_cuda_check(v, begin(e, v, token, target, row0, n), "the embedding", err);
    for (uint32_t l = 0; l < d->n_layer && !st; l++) {
        kv_cuda_prompt *p = &e->compare.prompt[l % 2];
        kv_branch_prompt from = {0};
        if (kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "stopped by a signal before layer %u", l);
        if (!st) st = source->prompt(source->ctx, l, &from, err);
        if (!st) st = take_prompt(e, v, p, &from, row0, n_branch, err);
        if (!st) st = kv_cuda_check(v, run_layer(e, v, l, p, row0, n, n_branch), "a layer", err);
    }
    if (!st) st = kv_cuda_check(v, run_logits(e, v, n, n_branch), "the logits", err);
    if (!st) st = fetch(e, v, n, n_branch, out, err);
    if (st) kv_gpu_stream_sync(v->copy), kv_gpu_stream_sync(v->run); /* what they still read must not go away */
    return st;
}
