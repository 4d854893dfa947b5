/* engine_cpu.c - the forward pass on the CPU, layer by layer for all rows of a call.
 *
 *   x = embedding of the tokens                                              [rows][hidden]
 *   each layer:  h = rmsnorm(x); q, k, v = h Wq^T, h Wk^T, h Wv^T (+ bias); rotate q and k; round to the dtype
 *                o = attention(q, K, V);  x += o Wo^T;  x += (silu(h' Wg^T) * (h' Wu^T)) Wd^T, h' = rmsnorm(x)
 *   logits = rmsnorm(x) E^T, in blocks of rows and only when somebody wants them
 *
 * Rows are projected in blocks of ROW_BLOCK, so memory beyond the cache is one layer's: x, q, o and a block of the
 * feed-forward. Every task is fixed by the shape (head, block of rows) and writes its own part, so the bytes do not
 * depend on the number of threads. Not here: quantised arithmetic (weights are float by now) and sampling. */
#include "capture/engine.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/isa.h"
#include "kernels/kernels.h"
#include "kernels/math.h"
#include "kernels/parallel.h"
#include "traces/cli.h"

#define ROW_BLOCK  512u        /* rows projected at a time */
#define ATT_BLOCK  256u        /* query rows of one attention task */
#define NORM_BLOCK 64u         /* rows of one elementwise task */
#define LOGIT_MAX  (32u << 20) /* bytes of logits held at a time */

typedef struct {
    kv_engine base;
    const kv_model *m;
    kv_engine_options o;
    int bits;        /* rounding, as kernels name it */
    uint32_t n_past; /* rows in the cache */
    float **k, **v;  /* [n_layer] of [kv_heads][capacity][head_dim]; NULL in an engine without a cache */
    float *bk, *bv;  /* [kv_heads][rows][head_dim]: rows of branches, of one layer */
    uint32_t branch_rows;
    uint32_t rows;     /* rows the buffers below hold */
    float *x;          /* [rows][hidden] residual stream */
    float *q;          /* [q_heads][rows][head_dim] */
    float *out;        /* [rows][q_heads*head_dim] */
    float *lse, *stat; /* [q_heads][rows], [q_heads][rows][4] */
    float *x_norm;     /* [rows] */
    float *block;      /* [ROW_BLOCK][hidden + max(projections, 2*ffn, hidden)] */
    float *rot;        /* [rows][rope_dim] cos, then sin of each row's angles */
    float *logits;     /* [logit rows][n_vocab] */
    uint32_t logit_rows;
    size_t *overflow; /* [q_heads + 2*kv_heads] values lost to rounding, by projection head */
    bool *failed;     /* [tasks] out of memory in a kernel */
    size_t n_failed;
} cpu_engine;

/* ------------------------------------------------------------------------------------------------ open and close */
/* Bytes the system can still hand out, or SIZE_MAX when it does not say. */
static size_t memory_available(void)
{
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    unsigned long long kib = 0;
    bool found = false;
    while (f && !found && fgets(line, sizeof line, f)) found = sscanf(line, "MemAvailable: %llu kB", &kib) == 1;
    if (f) fclose(f);
    return found ? (size_t)kib * 1024u : SIZE_MAX;
}

static void cpu_reset(kv_engine *base)
{
    ((cpu_engine *)base)->n_past = 0;
}

static void cpu_close(kv_engine *base)
{
    cpu_engine *e = (cpu_engine *)base;
    for (uint32_t l = 0; l < e->m->desc.n_layer; l++) {
        if (e->k) free(e->k[l]);
        if (e->v) free(e->v[l]);
    }
    free(e->k), free(e->v), free(e->bk), free(e->bv), free(e->x), free(e->q), free(e->out), free(e->lse), free(e->stat),
        free(e->x_norm);
    free(e->block), free(e->rot), free(e->logits), free(e->overflow), free(e->failed);
    free(e);
}

/* n x width floats in place of *p. */
static kv_status renew(float **p, size_t n, size_t width, kv_error *err)
{
    size_t count;
    free(*p);
    *p = NULL;
    if (!kv_mul(n, width, &count)) return kv_fail(err, KV_ENOMEM, "out of memory for %zu rows of activations", n);
    return kv_array(p, count, sizeof(float), err);
}

/* Room for n rows of one call. The statistics come later, with the first hook that wants them. */
static kv_status need_rows(cpu_engine *e, uint32_t n, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    size_t wide = ((size_t)d->n_q_head + 2u * (size_t)d->n_kv_head) * d->head_dim;
    kv_status st;

    if (n <= e->rows) return KV_OK;
    e->rows = 0;
    if (wide < 2u * (size_t)d->ffn) wide = 2u * (size_t)d->ffn;
    free(e->stat), e->stat = NULL;
    free(e->failed), e->failed = NULL;
    e->n_failed = (size_t)d->n_q_head * ((n + ATT_BLOCK - 1) / ATT_BLOCK);
    if ((st = renew(&e->x, n, d->hidden, err)) || (st = renew(&e->q, (size_t)n * d->n_q_head, d->head_dim, err)) ||
        (st = renew(&e->out, (size_t)n * d->n_q_head, d->head_dim, err)) ||
        (st = renew(&e->lse, n, d->n_q_head, err)) || (st = renew(&e->x_norm, n, 1, err)) ||
        (st = renew(&e->rot, n, d->rope_dim, err)) ||
        (st = renew(&e->block, n < ROW_BLOCK ? n : ROW_BLOCK, 2u * (size_t)d->hidden + wide, err)) ||
        (st = kv_array(&e->failed, e->n_failed, sizeof *e->failed, err)))
        return st;
    e->rows = n;
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ elementwise tasks */
typedef struct {
    cpu_engine *e;
    size_t n_row, width;
    const float *in, *w, *bias;
    float *out;
} rows_job;

static size_t rows_of(const rows_job *j, size_t i)
{
    size_t left = j->n_row - i * NORM_BLOCK;
    return left < NORM_BLOCK ? left : NORM_BLOCK;
}

static void norm_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    size_t at = i * NORM_BLOCK * j->width;
    kv_rmsnorm(rows_of(j, i), j->width, j->in + at, j->w, j->e->m->desc.norm_eps, j->out + at);
}

static void swiglu_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    size_t at = i * NORM_BLOCK * j->width;
    kv_swiglu(rows_of(j, i) * j->width, j->out + at, j->in + at);
}

/* out += in (+ bias in every row) */
static void add_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    for (size_t r = i * NORM_BLOCK; r < i * NORM_BLOCK + rows_of(j, i); r++) {
        const float *in = j->in + r * j->width;
        float *out = j->out + r * j->width;
        for (size_t c = 0; c < j->width; c++) out[c] += j->bias ? in[c] + j->bias[c] : in[c];
    }
}

static void length_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    for (size_t r = i * NORM_BLOCK; r < i * NORM_BLOCK + rows_of(j, i); r++) {
        double sum = 0;
        for (size_t c = 0; c < j->width; c++) sum += (double)j->in[r * j->width + c] * (double)j->in[r * j->width + c];
        j->out[r] = (float)sqrt(sum);
    }
}

static void over_rows(const cpu_engine *e, void (*task)(void *, size_t), rows_job *j)
{
    kv_parallel((j->n_row + NORM_BLOCK - 1) / NORM_BLOCK, e->o.threads, task, j);
}

/* ------------------------------------------------------------------------------------------------ one layer */
typedef struct {
    cpu_engine *e;
    uint32_t layer, row0, n_row; /* the whole call */
    uint32_t first, count;       /* the block of rows at hand, relative to row0 */
    const float *proj;           /* [count][(q_heads + 2 kv_heads) * head_dim] */
    float *k, *v;                /* where its rows go: [kv_heads][kv_stride][head_dim], from row kv_first on */
    uint32_t kv_stride, kv_first;
    bool want_stat;
} layer_job;

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

/* One head of q, k or v out of the projected block: bias, rotation, rounding, into its place. */
static void head_task(void *ctx, size_t i)
{
    const layer_job *j = ctx;
    cpu_engine *e = j->e;
    const kv_model_desc *d = &e->m->desc;
    const kv_layer_weights *w = &e->m->layer[j->layer];
    size_t hd = d->head_dim, nq = d->n_q_head, nk = d->n_kv_head, ld = (nq + 2 * nk) * hd;
    size_t h = i < nq ? i : (i - nq) % nk;
    const float *all = i < nq ? w->bq : i < nq + nk ? w->bk : w->bv, *bias = all ? all + h * hd : NULL;
    float *own = i < nq + nk ? j->k : j->v;
    float *to =
        i < nq ? e->q + (h * j->n_row + j->first) * hd : own + ((size_t)h * j->kv_stride + j->kv_first + j->first) * hd;

    for (size_t r = 0; r < j->count; r++) {
        const float *from = j->proj + r * ld + i * hd;
        for (size_t c = 0; c < hd; c++) to[r * hd + c] = bias ? from[c] + bias[c] : from[c];
    }
    if (i < nq + nk && d->rope_dim) rotate(j->count, hd, d->rope_dim, e->rot + (size_t)j->first * d->rope_dim, to);
    e->overflow[i] += kv_round(e->bits, j->count * hd, to);
}

static void attention_task(void *ctx, size_t i)
{
    const layer_job *j = ctx;
    cpu_engine *e = j->e;
    const kv_model_desc *d = &e->m->desc;
    size_t hd = d->head_dim, nq = d->n_q_head, n_tile = (j->n_row + ATT_BLOCK - 1) / ATT_BLOCK;
    size_t h = i % nq, first = (n_tile - 1 - i / nq) * ATT_BLOCK; /* longest rows first: threads end together */
    size_t count = j->n_row - first < ATT_BLOCK ? j->n_row - first : ATT_BLOCK;
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

static kv_status no_memory(kv_error *err)
{
    return kv_fail(err, KV_ENOMEM, "out of memory in the forward pass");
}

/* c [rows][n_out] at stride ldc = x [rows][n_in] times w^T. */
static bool times(const cpu_engine *e, size_t rows, const float *x, size_t n_in, size_t n_out, const float *w, float *c,
                  size_t ldc)
{
    return kv_matmul(rows, n_out, n_in, x, w, c, ldc, e->o.threads);
}

static kv_status project(cpu_engine *e, layer_job *j, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    const kv_layer_weights *w = &e->m->layer[j->layer];
    size_t hd = d->head_dim, nq = d->n_q_head, nk = d->n_kv_head, ld = (nq + 2 * nk) * hd;

    memset(e->overflow, 0, (nq + 2 * nk) * sizeof *e->overflow);
    for (uint32_t r = 0; r < j->n_row; r += ROW_BLOCK) {
        uint32_t n = j->n_row - r < ROW_BLOCK ? j->n_row - r : ROW_BLOCK;
        float *h = e->block, *proj = h + (size_t)n * d->hidden;
        rows_job norm = {.e = e, .n_row = n, .width = d->hidden, .w = w->attn_norm.w, .out = h};
        norm.in = e->x + (size_t)r * d->hidden;
        over_rows(e, norm_task, &norm);
        if (!times(e, n, h, d->hidden, nq * hd, w->wq.f32, proj, ld) ||
            !times(e, n, h, d->hidden, nk * hd, w->wk.f32, proj + nq * hd, ld) ||
            !times(e, n, h, d->hidden, nk * hd, w->wv.f32, proj + (nq + nk) * hd, ld))
            return no_memory(err);
        j->first = r, j->count = n, j->proj = proj;
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

/* The rest of the layer for a block of rows: x += o Wo^T, x += feed-forward(x). */
static kv_status finish_rows(cpu_engine *e, uint32_t layer, uint32_t r, uint32_t n, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    const kv_layer_weights *w = &e->m->layer[layer];
    size_t wide = (size_t)d->n_q_head * d->head_dim;
    float *h = e->block, *sum = h + (size_t)n * d->hidden, *gate = sum + (size_t)n * d->hidden;
    float *up = gate + (size_t)n * d->ffn, *x = e->x + (size_t)r * d->hidden;
    rows_job add = {.e = e, .n_row = n, .width = d->hidden, .in = sum, .bias = w->bo, .out = x};
    rows_job norm = {.e = e, .n_row = n, .width = d->hidden, .in = x, .w = w->ffn_norm.w, .out = h};
    rows_job act = {.e = e, .n_row = n, .width = d->ffn, .in = up, .out = gate};

    if (!times(e, n, e->out + r * wide, wide, d->hidden, w->wo.f32, sum, d->hidden)) return no_memory(err);
    over_rows(e, add_task, &add);
    over_rows(e, norm_task, &norm);
    if (!times(e, n, h, d->hidden, d->ffn, w->ffn->gate.f32, gate, d->ffn) ||
        !times(e, n, h, d->hidden, d->ffn, w->ffn->up.f32, up, d->ffn))
        return no_memory(err);
    over_rows(e, swiglu_task, &act);
    if (!times(e, n, gate, d->ffn, d->hidden, w->ffn->down.f32, sum, d->hidden)) return no_memory(err);
    add.bias = NULL;
    over_rows(e, add_task, &add);
    return KV_OK;
}

static kv_status check_finite(const float *v, size_t n, uint32_t layer, const char *what, kv_error *err)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(v[i]) <= FLT_MAX))
            return kv_fail(err, KV_EFORMAT, "layer %u: the %s is not finite: the model's weights are damaged", layer,
                           what);
    return KV_OK;
}

/* branches = 0: rows that follow the cache. Else rows of as many branches behind position row0 - 1. */
static kv_status run_layer(cpu_engine *e, uint32_t layer, uint32_t row0, uint32_t n, uint32_t branches,
                           const kv_engine_hook *hook, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    layer_job j = {.e = e, .layer = layer, .row0 = row0, .n_row = n};
    if (branches)
        j.k = e->bk, j.v = e->bv, j.kv_stride = n;
    else
        j.k = e->k[layer], j.v = e->v[layer], j.kv_stride = e->o.capacity, j.kv_first = row0;
    rows_job length = {.e = e, .n_row = n, .width = d->hidden, .in = e->x, .out = e->x_norm};
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

    over_rows(e, length_task, &length);
    if ((st = check_finite(e->x_norm, n, layer, "residual stream", err)) || (st = project(e, &j, err))) return st;
    if (hook && hook->attend && (st = hook->attend(hook->ctx, &view, &done, err))) return st;
    if (!done && branches)
        return kv_fail(err, KV_EMISUSE, "layer %u: nobody attended for the branches of this run", layer);
    if (!done) {
        j.want_stat = hook && hook->want && hook->want(hook->ctx, layer) & KV_WANT_STAT;
        if (j.want_stat && !e->stat && (st = renew(&e->stat, e->rows, 4u * (size_t)d->n_q_head, err))) return st;
        size_t n_task = (size_t)d->n_q_head * ((n + ATT_BLOCK - 1) / ATT_BLOCK);
        kv_parallel(n_task, e->o.threads, attention_task, &j);
        for (size_t i = 0; i < n_task; i++)
            if (e->failed[i]) return no_memory(err);
        if ((st = check_finite(e->lse, (size_t)n * d->n_q_head, layer, "attention", err))) return st;
        view.lse = e->lse, view.stat = j.want_stat ? e->stat : NULL;
    }
    if (hook && hook->record && (st = hook->record(hook->ctx, &view, err))) return st;
    for (uint32_t r = 0; r < n; r += ROW_BLOCK)
        if ((st = finish_rows(e, layer, r, n - r < ROW_BLOCK ? n - r : ROW_BLOCK, err))) return st;
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ logits */
/* Logits of rows first..first+n-1 of the call into e->logits. */
static kv_status logit_block(cpu_engine *e, uint32_t first, uint32_t n, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    rows_job norm = {.e = e, .n_row = n, .width = d->hidden, .w = e->m->out_norm.w, .out = e->block};
    norm.in = e->x + (size_t)first * d->hidden;
    float cap = d->final_softcap;
    bool bad = false;

    over_rows(e, norm_task, &norm);
    if (!times(e, n, e->block, d->hidden, d->n_vocab, e->m->output.f32, e->logits, d->n_vocab)) return no_memory(err);
    for (size_t i = 0; i < (size_t)n * d->n_vocab; i++) {
        if (cap > 0) e->logits[i] = cap * tanhf(e->logits[i] / cap);
        bad |= !(fabsf(e->logits[i]) <= FLT_MAX);
    }
    if (bad) return kv_fail(err, KV_EFORMAT, "the logits are not finite: the model's weights are damaged");
    return KV_OK;
}

static kv_status run_logits(cpu_engine *e, uint32_t row0, uint32_t n, const kv_engine_hook *hook, float *last,
                            kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    bool all = hook && hook->logits;
    uint32_t step = (uint32_t)(LOGIT_MAX / (sizeof(float) * d->n_vocab));
    kv_status st;

    if (!all && !last) return KV_OK;
    step = step < 1 ? 1 : step > ROW_BLOCK ? ROW_BLOCK : step;
    if (step > n || !all) step = all ? n : 1;
    if (step > e->logit_rows) {
        e->logit_rows = 0;
        if ((st = renew(&e->logits, step, d->n_vocab, err))) return st;
        e->logit_rows = step;
    }
    for (uint32_t r = all ? 0 : n - 1; r < n; r += step) {
        uint32_t count = n - r < step ? n - r : step;
        if (kv_interrupted()) return kv_fail(err, KV_EINTERRUPTED, "stopped by a signal while computing logits");
        if ((st = logit_block(e, r, count, err))) return st;
        if (all && (st = hook->logits(hook->ctx, row0 + r, count, e->logits, err))) return st;
        if (last && r + count == n)
            memcpy(last, e->logits + (size_t)(count - 1) * d->n_vocab, d->n_vocab * sizeof *last);
    }
    return KV_OK;
}

/* The angles of n positions from row0 on, once for all heads and layers: the rope kernel itself turns the vector
 * (1..1, 0..0) into (cos.., sin..). Each stands `repeat` times, for rows that share a position. */
static void angle_table(cpu_engine *e, uint32_t row0, uint32_t n, uint32_t repeat)
{
    const kv_model_desc *d = &e->m->desc;
    size_t rot = d->rope_dim;
    for (size_t i = 0; i < n * rot; i++) e->rot[i] = i % rot < rot / 2 ? 1.0f : 0.0f;
    if (rot) kv_rope(n, rot, rot, row0, kv_rope_of_run(&d->rope[0], e->o.capacity), d->rope[0].mscale, e->rot, rot);
    for (size_t i = (size_t)n * repeat; rot && repeat > 1 && i-- > 0;)
        memmove(e->rot + i * rot, e->rot + i / repeat * rot, rot * sizeof *e->rot);
}

/* Through all layers: n tokens, each in `repeat` rows. branches as in run_layer. */
static kv_status run_rows(cpu_engine *e, const uint32_t *token, uint32_t row0, uint32_t n, uint32_t repeat,
                          uint32_t branches, const kv_engine_hook *hook, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    kv_status st;

    for (uint32_t i = 0; i < n; i++)
        if (token[i] >= d->n_vocab)
            return kv_fail(err, KV_EMISUSE, "token %u at position %u is not in the vocabulary of '%s' (%u tokens)",
                           token[i], row0 + i, d->name, d->n_vocab);
    if ((st = need_rows(e, n * repeat, err))) return st;
    for (size_t i = 0; i < (size_t)n * repeat; i++)
        memcpy(e->x + i * d->hidden, e->m->tok_embd.f32 + (size_t)token[i / repeat] * d->hidden,
               d->hidden * sizeof *e->x);
    angle_table(e, row0, n, repeat);
    for (uint32_t l = 0; l < d->n_layer; l++) {
        if (kv_interrupted()) return kv_fail(err, KV_EINTERRUPTED, "stopped by a signal before layer %u", l);
        if ((st = run_layer(e, l, row0, n * repeat, branches, hook, err))) return st;
    }
    return KV_OK;
}

static kv_status cpu_run(kv_engine *base, const uint32_t *token, uint32_t n, const kv_engine_hook *hook,
                         float *last_logits, kv_error *err)
{
    cpu_engine *e = (cpu_engine *)base;
    kv_status st;

    if (!n || n > e->o.capacity - e->n_past || e->o.no_cache)
        return kv_fail(err, KV_EMISUSE, "cannot run %u tokens: the cache holds %u of %u", n, e->n_past,
                       e->o.no_cache ? 0 : e->o.capacity);
    if ((st = run_rows(e, token, e->n_past, n, 1, 0, hook, err)) ||
        (st = run_logits(e, e->n_past, n, hook, last_logits, err)))
        return st;
    e->n_past += n;
    return KV_OK;
}

static kv_status cpu_branches(kv_engine *base, const uint32_t *token, uint32_t row0, uint32_t n, uint32_t n_branch,
                              const kv_engine_hook *hook, kv_error *err)
{
    cpu_engine *e = (cpu_engine *)base;
    size_t width = (size_t)e->m->desc.n_kv_head * e->m->desc.head_dim, rows;
    kv_status st;

    if (!n || !n_branch || row0 > e->o.capacity || n > e->o.capacity - row0 || !kv_mul(n, n_branch, &rows) ||
        rows > UINT32_MAX / 2)
        return kv_fail(err, KV_EMISUSE, "cannot run %u branches of %u tokens from position %u", n_branch, n, row0);
    if (rows > e->branch_rows) {
        e->branch_rows = 0;
        if ((st = renew(&e->bk, rows, width, err)) || (st = renew(&e->bv, rows, width, err))) return st;
        e->branch_rows = (uint32_t)rows;
    }
    st = run_rows(e, token, row0, n, n_branch, n_branch, hook, err);
    return st ? st : run_logits(e, 0, n * n_branch, hook, NULL, err);
}

kv_status kv_engine_open_cpu(const kv_model *m, const kv_engine_options *o, kv_engine **out, kv_error *err)
{
    static const kv_engine_ops ops = {cpu_run, cpu_reset, cpu_close, cpu_branches};
    const kv_model_desc *d = &m->desc;
    size_t per_head, per_layer, total;
    cpu_engine *e = NULL;
    kv_status st;

    *out = NULL;
    if (o->dtype != KV_F32 && o->dtype != KV_F16 && o->dtype != KV_BF16)
        return kv_fail(err, KV_EMISUSE, "cannot run in dtype '%s': use f32, f16 or bf16", kv_dtype_name(o->dtype));
    if (!o->capacity) return kv_fail(err, KV_EMISUSE, "cannot run a model on no tokens");
    if (!kv_mul(o->capacity, d->head_dim * sizeof(float), &per_head) || !kv_mul(per_head, d->n_kv_head, &per_layer) ||
        !kv_mul(per_layer, 2u * (size_t)d->n_layer, &total) || (!o->no_cache && total > memory_available()))
        return kv_fail(err, KV_ENOMEM,
                       "cannot hold the cache of %u tokens of '%s': %.1f GiB needed, %.1f GiB available", o->capacity,
                       d->name, 8.0 * o->capacity * d->head_dim * d->n_kv_head * d->n_layer / (double)(1u << 30),
                       (double)memory_available() / (double)(1u << 30));
    if ((st = kv_array(&e, 1, sizeof *e, err))) return st;
    e->base.ops = &ops, e->m = m, e->o = *o;
    e->bits = o->dtype == KV_F32 ? 32 : o->dtype == KV_F16 ? 16 : 17;
    if ((st = kv_array(&e->k, d->n_layer, sizeof *e->k, err))) goto out;
    if ((st = kv_array(&e->v, d->n_layer, sizeof *e->v, err))) goto out;
    if ((st = kv_array(&e->overflow, d->n_q_head + 2u * (size_t)d->n_kv_head, sizeof *e->overflow, err))) goto out;
    for (uint32_t l = 0; l < d->n_layer && !o->no_cache; l++) {
        if ((st = kv_array(&e->k[l], per_layer, 1, err))) goto out;
        if ((st = kv_array(&e->v[l], per_layer, 1, err))) goto out;
    }
    *out = &e->base;
    return KV_OK;
out:
    cpu_close(&e->base);
    return st;
}
