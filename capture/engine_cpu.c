/* engine_cpu.c - the forward pass on the CPU (model.h says what it computes), layer by layer for all rows of a call.
 *
 * Rows are projected in blocks of KV_CPU_ROWS, so memory beyond the cache is one layer's: x, q, o and a block of the
 * feed-forward. Every task is fixed by the shape (head, block of rows) and writes its own part, so the bytes do not
 * depend on the number of threads. Here: memory, embedding, logits; engine_layer.c has a layer, engine_rows.c the row
 * operations. Not here: quantised arithmetic (weights are float by now) and sampling. */
#include "capture/engine_cpu.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "traces/cli.h"

#define LOGIT_MAX (32u << 20) /* bytes of logits held at a time */

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
    free(e->block), free(e->rot[0]), free(e->rot[1]), free(e->logits), free(e->overflow), free(e->failed);
    free(e);
}

kv_status kv_cpu_renew(float **p, size_t n, size_t width, kv_error *err)
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
    kv_status st;

    if (n <= e->rows) return KV_OK;
    e->rows = 0;
    free(e->stat), e->stat = NULL;
    free(e->failed), e->failed = NULL;
    e->n_failed = (size_t)d->n_q_head * ((n + KV_CPU_ATT - 1) / KV_CPU_ATT);
    if ((st = kv_cpu_renew(&e->x, n, d->hidden, err)) ||
        (st = kv_cpu_renew(&e->q, (size_t)n * d->n_q_head, d->head_dim, err)) ||
        (st = kv_cpu_renew(&e->out, (size_t)n * d->n_q_head, d->head_dim, err)) ||
        (st = kv_cpu_renew(&e->lse, n, d->n_q_head, err)) || (st = kv_cpu_renew(&e->x_norm, n, 1, err)) ||
        (d->n_rope > 0 && (st = kv_cpu_renew(&e->rot[0], n, d->rope_dim, err))) ||
        (d->n_rope > 1 && (st = kv_cpu_renew(&e->rot[1], n, d->rope_dim, err))) ||
        (st = kv_cpu_renew(&e->block, n < KV_CPU_ROWS ? n : KV_CPU_ROWS, kv_cpu_block_width(d), err)) ||
        (st = kv_array(&e->failed, e->n_failed, sizeof *e->failed, err)))
        return st;
    e->rows = n;
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ logits */
typedef struct {
    cpu_engine *e;
    _Atomic bool bad; /* only ever set: the order does not matter */
} scaling;

static void scale_task(void *ctx, size_t row)
{
    scaling *s = ctx;
    const kv_model_desc *d = &s->e->m->desc;
    float *z = s->e->logits + row * d->n_vocab, cap = d->final_softcap;
    bool bad = false;
    for (uint32_t i = 0; i < d->n_vocab; i++) {
        if (d->logit_scale != 1) z[i] *= d->logit_scale;
        if (cap > 0) z[i] = cap * tanhf(z[i] / cap);
        bad |= !(fabsf(z[i]) <= FLT_MAX);
    }
    if (bad) s->bad = true;
}

/* Logits of rows first..first+n-1 of the call into e->logits. */
static kv_status logit_block(cpu_engine *e, uint32_t first, uint32_t n, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cpu_norm(e, n, d->hidden, e->x + (size_t)first * d->hidden, e->m->out_norm, e->block);
    if (!kv_cpu_times(e, n, e->block, &e->m->output, e->logits, d->n_vocab)) return kv_cpu_no_memory(err);
    scaling s = {.e = e};
    kv_parallel(n, e->o.threads, scale_task, &s);
    if (s.bad) return kv_fail(err, KV_EFORMAT, "the logits are not finite: the model's weights are damaged");
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
    step = step < 1 ? 1 : step > KV_CPU_ROWS ? KV_CPU_ROWS : step;
    if (step > n || !all) step = all ? n : 1;
    if (step > e->logit_rows) {
        e->logit_rows = 0;
        if ((st = kv_cpu_renew(&e->logits, step, d->n_vocab, err))) return st;
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
static void angle_tables(cpu_engine *e, uint32_t row0, uint32_t n, uint32_t repeat)
{
    const kv_model_desc *d = &e->m->desc;
    size_t rot = d->rope_dim;
    for (uint32_t r = 0; r < d->n_rope; r++) {
        float *t = e->rot[r];
        for (size_t i = 0; i < n * rot; i++) t[i] = i % rot < rot / 2 ? 1.0f : 0.0f;
        kv_rope(n, rot, rot, row0, kv_rope_of_run(&d->rope[r], e->o.capacity), d->rope[r].mscale, t, rot);
        for (size_t i = (size_t)n * repeat; repeat > 1 && i-- > 0;)
            memmove(t + i * rot, t + i / repeat * rot, rot * sizeof *t);
    }
}

/* token [n * repeat], one a row; rows of one position stand together. */
static void embed(cpu_engine *e, const uint32_t *token, uint32_t row0, uint32_t n, uint32_t repeat)
{
    const kv_model_desc *d = &e->m->desc;
    for (size_t i = 0; i < (size_t)n * repeat; i++) {
        const float *from = e->m->tok_embd.f32 + (size_t)token[i] * d->hidden;
        const float *pos = e->m->pos_embd.rows ? e->m->pos_embd.f32 + (row0 + i / repeat) * d->hidden : NULL;
        float *x = e->x + i * d->hidden;
        for (uint32_t c = 0; c < d->hidden; c++) x[c] = from[c] * d->embed_scale + (pos ? pos[c] : 0);
    }
}

/* Through all layers: n positions; one row each, or one in each of `branches`. */
static kv_status run_rows(cpu_engine *e, const uint32_t *token, uint32_t row0, uint32_t n, uint32_t branches,
                          const kv_engine_hook *hook, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    uint32_t repeat = branches ? branches : 1, rows = n * repeat;
    kv_status st;

    for (uint32_t i = 0; i < rows; i++)
        if (token[i] >= d->n_vocab)
            return kv_fail(err, KV_EMISUSE, "token %u at position %u is not in the vocabulary of '%s' (%u tokens)",
                           token[i], row0 + i / repeat, d->name, d->n_vocab);
    if ((st = need_rows(e, rows, err))) return st;
    embed(e, token, row0, n, repeat);
    angle_tables(e, row0, n, repeat);
    for (uint32_t l = 0; l < d->n_layer; l++) {
        if (kv_interrupted()) return kv_fail(err, KV_EINTERRUPTED, "stopped by a signal before layer %u", l);
        if ((st = kv_cpu_layer(e, l, row0, rows, branches, hook, err))) return st;
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
    if ((st = run_rows(e, token, e->n_past, n, 0, hook, err)) ||
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
        if ((st = kv_cpu_renew(&e->bk, rows, width, err)) || (st = kv_cpu_renew(&e->bv, rows, width, err))) return st;
        e->branch_rows = (uint32_t)rows;
    }
    st = run_rows(e, token, row0, n, n_branch, hook, err);
    return st ? st : run_logits(e, 0, n * n_branch, hook, NULL, err);
}

kv_status kv_engine_open_cpu(const kv_model *m, const kv_engine_options *o, kv_engine **out, kv_error *err)
{
    static const kv_engine_ops ops = {.run = cpu_run, .reset = cpu_reset, .close = cpu_close, .branches = cpu_branches};
    const kv_model_desc *d = &m->desc;
    size_t per_head, per_layer, total;
    cpu_engine *e = NULL;
    kv_status st;

    *out = NULL;
    if (o->dtype != KV_F32 && o->dtype != KV_F16 && o->dtype != KV_BF16)
        return kv_fail(err, KV_EMISUSE, "cannot run in dtype '%s': use f32, f16 or bf16", kv_dtype_name(o->dtype));
    if (!kv_blas_room(1)) return kv_fail(err, KV_ENOMEM, "out of memory: OpenBLAS needs 128 MiB of address space");
    if (!m->tok_embd.f32)
        return kv_fail(err, KV_EMISUSE, "cannot run '%s' on the CPU: it was opened without its weights", d->name);
    if (m->pos_embd.rows && o->capacity > m->pos_embd.rows)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot run %u tokens: '%s' has learned positions for %u", o->capacity,
                       d->name, m->pos_embd.rows);
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
