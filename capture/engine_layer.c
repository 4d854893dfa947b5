/* engine_layer.c - one layer of the CPU engine: projections, attention with the hook around it, the rest. The steps and
 * their order are those of model.h. */
#include "capture/engine_cpu.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "kernels/parallel.h"

typedef struct {
    cpu_engine *e;
    uint32_t layer, row0, n_row; /* the whole call */
    uint32_t first, count;       /* the block of rows at hand, relative to row0 */
    float *proj;                 /* [count][(q_heads + 2 kv_heads) * head_dim] */
    float *k, *v;                /* where its rows go: [kv_heads][kv_stride][head_dim], from row kv_first on */
    uint32_t kv_stride, kv_first;
    bool want_stat;
} layer_job;

kv_status kv_cpu_no_memory(kv_error *err)
{
    return kv_fail(err, KV_ENOMEM, "out of memory in the forward pass");
}

size_t kv_cpu_block_width(const kv_model_desc *d)
{
    size_t qkv = ((size_t)d->n_q_head + 2u * (size_t)d->n_kv_head) * d->head_dim;
    size_t ffn = 2u * ((size_t)d->hidden + d->ffn) + (d->n_expert ? 2u * ((size_t)d->hidden + d->n_expert) : 0);
    return d->hidden + (qkv > ffn ? qkv : ffn);
}

/* ------------------------------------------------------------------------------------------------ q, k, v */
/* x [n][d] by the table of cos and sin: pairs (i, i + rot/2), the rest stays. */
static void rotate(size_t n, size_t d, size_t rot, const float *table, float *x)
{
    size_t half = rot / 2;
    for (size_t r = 0; r < n; r++, x += d, table += rot)
        for (size_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half], c = table[i], s = table[i + half];
            x[i] = a * c - b * s;
            x[i + half] = b * c + a * s;
        }
}

/* Row r of the projected block: a norm over all heads at once needs the whole row, bias first. */
static void whole_norm_task(void *ctx, size_t r)
{
    const layer_job *j = ctx;
    const kv_model_desc *d = &j->e->m->desc;
    const kv_layer_weights *w = &j->e->m->layer[j->layer];
    size_t nq = (size_t)d->n_q_head * d->head_dim, nk = (size_t)d->n_kv_head * d->head_dim;
    float *q = j->proj + r * (nq + 2 * nk), *k = q + nq;
    for (size_t c = 0; w->bq && c < nq; c++) q[c] += w->bq[c];
    for (size_t c = 0; w->bk && c < nk; c++) k[c] += w->bk[c];
    kv_rmsnorm(1, nq, q, w->q_norm.w, d->norm_eps, q);
    kv_rmsnorm(1, nk, k, w->k_norm.w, d->norm_eps, k);
}

/* One head of q, k or v out of the projected block: bias, norm, rotation, rounding, into its place. */
static void head_task(void *ctx, size_t i)
{
    const layer_job *j = ctx;
    cpu_engine *e = j->e;
    const kv_model_desc *d = &e->m->desc;
    const kv_layer_weights *w = &e->m->layer[j->layer];
    size_t hd = d->head_dim, nq = d->n_q_head, nk = d->n_kv_head, ld = (nq + 2 * nk) * hd;
    size_t h = i < nq ? i : (i - nq) % nk;
    bool is_v = i >= nq + nk, had_bias = d->qk_norm == KV_QK_NORM_ALL && !is_v;
    const float *all = had_bias ? NULL : i < nq ? w->bq : is_v ? w->bv : w->bk, *bias = all ? all + h * hd : NULL;
    float *own = is_v ? j->v : j->k;
    float *to =
        i < nq ? e->q + (h * j->n_row + j->first) * hd : own + ((size_t)h * j->kv_stride + j->kv_first + j->first) * hd;

    for (size_t r = 0; r < j->count; r++) {
        const float *from = j->proj + r * ld + i * hd;
        for (size_t c = 0; c < hd; c++) to[r * hd + c] = bias ? from[c] + bias[c] : from[c];
    }
    if (d->qk_norm == KV_QK_NORM_HEAD && !is_v)
        kv_rmsnorm(j->count, hd, to, i < nq ? w->q_norm.w : w->k_norm.w, d->norm_eps, to);
    if (!is_v && d->n_rope)
        rotate(j->count, hd, d->rope_dim, e->rot[d->layer_rope[j->layer]] + (size_t)j->first * d->rope_dim, to);
    e->overflow[i] += kv_round(e->bits, j->count * hd, to);
}

static kv_status project(cpu_engine *e, layer_job *j, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    const kv_layer_weights *w = &e->m->layer[j->layer];
    size_t hd = d->head_dim, nq = d->n_q_head, nk = d->n_kv_head, ld = (nq + 2 * nk) * hd;

    memset(e->overflow, 0, (nq + 2 * nk) * sizeof *e->overflow);
    for (uint32_t r = 0; r < j->n_row; r += KV_CPU_ROWS) {
        uint32_t n = j->n_row - r < KV_CPU_ROWS ? j->n_row - r : KV_CPU_ROWS;
        float *h = e->block, *proj = h + (size_t)n * d->hidden;
        const float *in = e->x + (size_t)r * d->hidden;
        if (w->attn_norm.w) kv_cpu_norm(e, n, d->hidden, in, w->attn_norm, h), in = h;
        if (!kv_cpu_times(e, n, in, &w->wq, proj, ld) || !kv_cpu_times(e, n, in, &w->wk, proj + nq * hd, ld) ||
            !kv_cpu_times(e, n, in, &w->wv, proj + (nq + nk) * hd, ld))
            return kv_cpu_no_memory(err);
        j->first = r, j->count = n, j->proj = proj;
        if (d->qk_norm == KV_QK_NORM_ALL) kv_parallel(n, e->o.threads, whole_norm_task, j);
        kv_parallel(nq + 2 * nk, e->o.threads, head_task, j);
    }
    for (size_t i = 0; i < nq + 2 * nk; i++)
        if (e->overflow[i])
            return kv_fail(err, KV_EUNSUPPORTED,
                           "layer %u: %zu values of %s, head %zu, overflow %s: run with --dtype bf16 or f32", j->layer,
                           e->overflow[i],
                           i < nq        ? "Q"
                           : i < nq + nk ? "K"
                                         : "V",
                           i < nq ? i : (i - nq) % nk, kv_dtype_name(e->o.dtype));
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ attention */
static void attention_task(void *ctx, size_t i)
{
    const layer_job *j = ctx;
    cpu_engine *e = j->e;
    const kv_model_desc *d = &e->m->desc;
    size_t hd = d->head_dim, nq = d->n_q_head, n_tile = (j->n_row + KV_CPU_ATT - 1) / KV_CPU_ATT;
    size_t h = i % nq, first = (n_tile - 1 - i / nq) * KV_CPU_ATT; /* longest rows first: threads end together */
    size_t count = j->n_row - first < KV_CPU_ATT ? j->n_row - first : KV_CPU_ATT;
    size_t kv = h / (nq / d->n_kv_head) * e->o.capacity * hd, at = h * j->n_row + first;
    kv_attn_shape s = {.n_row = count,
                       .n_key = j->row0 + first + count,
                       .d = hd,
                       .row0 = j->row0 + first,
                       .window = d->window[j->layer],
                       .scale = d->scale,
                       .softcap = d->softcap};

    e->failed[i] =
        !kv_attention(&s, e->q + at * hd, e->k[j->layer] + kv, e->v[j->layer] + kv, e->out + (first * nq + h) * hd,
                      nq * hd, e->lse + at, j->want_stat ? e->stat + 4 * at : NULL);
}

static kv_status check_finite(const float *v, size_t n, uint32_t layer, const char *what, kv_error *err)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(v[i]) <= FLT_MAX))
            return kv_fail(err, KV_EFORMAT, "layer %u: the %s is not finite: the model's weights are damaged", layer,
                           what);
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ the rest */
/* For a block of rows: the output projection and the feed-forward, each with its norms, into the residual stream. */
static kv_status finish_rows(cpu_engine *e, uint32_t layer, uint32_t r, uint32_t n, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    const kv_layer_weights *w = &e->m->layer[layer];
    size_t hidden = d->hidden, wide = (size_t)d->n_q_head * d->head_dim;
    float *h = e->block, *o = h + n * hidden, *f = o + n * hidden, *room = f + n * hidden;
    float *x = e->x + r * hidden;
    const float *in = x;

    if (!kv_cpu_times(e, n, e->out + r * wide, &w->wo, o, hidden)) return kv_cpu_no_memory(err);
    kv_cpu_bias(e, n, hidden, w->bo, o);
    if (w->post_attn_norm.w) kv_cpu_norm(e, n, hidden, o, w->post_attn_norm, o);
    if (!d->parallel) kv_cpu_add(e, n, hidden, o, d->residual_scale, x);
    if (w->ffn_norm.w) kv_cpu_norm(e, n, hidden, x, w->ffn_norm, h), in = h;
    kv_status st = kv_cpu_ffn(e, w, n, in, f, room, err);
    if (st) return st;
    if (w->post_ffn_norm.w) kv_cpu_norm(e, n, hidden, f, w->post_ffn_norm, f);
    if (d->parallel) kv_cpu_add(e, n, hidden, o, d->residual_scale, x);
    kv_cpu_add(e, n, hidden, f, d->residual_scale, x);
    return KV_OK;
}

kv_status kv_cpu_layer(cpu_engine *e, uint32_t layer, uint32_t row0, uint32_t n, uint32_t branches,
                       const kv_engine_hook *hook, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    layer_job j = {.e = e, .layer = layer, .row0 = row0, .n_row = n};
    if (branches)
        j.k = e->bk, j.v = e->bv, j.kv_stride = n;
    else
        j.k = e->k[layer], j.v = e->v[layer], j.kv_stride = e->o.capacity, j.kv_first = row0;
    kv_attn_view view = {.layer = layer,
                         .row0 = row0,
                         .n_row = n,
                         .n_key = row0 + (branches ? n / branches : n),
                         .q = e->q,
                         .k = j.k,
                         .v = j.v,
                         .kv_stride = j.kv_stride,
                         .x_norm = e->x_norm,
                         .x = e->x,
                         .out = e->out};
    bool done = false;
    kv_status st;

    kv_cpu_lengths(e, n, d->hidden, e->x, e->x_norm);
    if ((st = check_finite(e->x_norm, n, layer, "residual stream", err)) || (st = project(e, &j, err))) return st;
    if (hook && hook->attend && (st = hook->attend(hook->ctx, &view, &done, err))) return st;
    if (!done && branches)
        return kv_fail(err, KV_EMISUSE, "layer %u: nobody attended for the branches of this run", layer);
    if (!done) {
        j.want_stat = hook && hook->want && hook->want(hook->ctx, layer) & KV_WANT_STAT;
        if (j.want_stat && !e->stat && (st = kv_cpu_renew(&e->stat, e->rows, 4u * (size_t)d->n_q_head, err))) return st;
        size_t n_task = (size_t)d->n_q_head * ((n + KV_CPU_ATT - 1) / KV_CPU_ATT);
        kv_parallel(n_task, e->o.threads, attention_task, &j);
        for (size_t i = 0; i < n_task; i++)
            if (e->failed[i]) return kv_cpu_no_memory(err);
        if ((st = check_finite(e->lse, (size_t)n * d->n_q_head, layer, "attention", err))) return st;
        view.lse = e->lse, view.stat = j.want_stat ? e->stat : NULL;
    }
    if (hook && hook->record && (st = hook->record(hook->ctx, &view, err))) return st;
    for (uint32_t r = 0; r < n; r += KV_CPU_ROWS)
        if ((st = finish_rows(e, layer, r, n - r < KV_CPU_ROWS ? n - r : KV_CPU_ROWS, err))) return st;
    return KV_OK;
}
