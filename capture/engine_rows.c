/* engine_rows.c - elementwise work of the CPU engine on blocks of rows, and the feed-forward. Every task is fixed by
 * the shape and writes its own part, so the bytes do not depend on the number of threads. */
#include "capture/engine_cpu.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "kernels/parallel.h"

#define BLOCK 64u /* rows of one task */

typedef struct {
    const cpu_engine *e;
    size_t n_row, width;
    const float *in;
    kv_norm norm;
    float factor;
    float *out;
} rows_job;

static size_t rows_of(const rows_job *j, size_t i)
{
    size_t left = j->n_row - i * BLOCK;
    return left < BLOCK ? left : BLOCK;
}

static void over_rows(void (*task)(void *, size_t), rows_job *j)
{
    kv_parallel((j->n_row + BLOCK - 1) / BLOCK, j->e->o.threads, task, j);
}

static void norm_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    const kv_model_desc *d = &j->e->m->desc;
    size_t at = i * BLOCK * j->width, n = rows_of(j, i);
    if (d->norm == KV_NORM_LAYER)
        kv_layernorm(n, j->width, j->in + at, j->norm.w, j->norm.b, d->norm_eps, j->out + at);
    else
        kv_rmsnorm(n, j->width, j->in + at, j->norm.w, d->norm_eps, j->out + at);
}

void kv_cpu_norm(const cpu_engine *e, size_t n_row, size_t width, const float *in, kv_norm w, float *out)
{
    over_rows(norm_task, &(rows_job){.e = e, .n_row = n_row, .width = width, .in = in, .norm = w, .out = out});
}

static void add_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    size_t at = i * BLOCK * j->width, n = rows_of(j, i) * j->width;
    const float *in = j->in + at;
    float *out = j->out + at;
    if (j->factor == 1)
        for (size_t c = 0; c < n; c++) out[c] += in[c];
    else
        for (size_t c = 0; c < n; c++) out[c] += j->factor * in[c];
}

void kv_cpu_add(const cpu_engine *e, size_t n_row, size_t width, const float *from, float factor, float *to)
{
    over_rows(add_task, &(rows_job){.e = e, .n_row = n_row, .width = width, .in = from, .factor = factor, .out = to});
}

static void bias_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    for (size_t r = i * BLOCK; r < i * BLOCK + rows_of(j, i); r++)
        for (size_t c = 0; c < j->width; c++) j->out[r * j->width + c] += j->in[c];
}

void kv_cpu_bias(const cpu_engine *e, size_t n_row, size_t width, const float *bias, float *x)
{
    if (bias) over_rows(bias_task, &(rows_job){.e = e, .n_row = n_row, .width = width, .in = bias, .out = x});
}

static void activate_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    size_t at = i * BLOCK * j->width, n = rows_of(j, i) * j->width;
    kv_act act = j->e->m->desc.act;
    if (act == KV_ACT_SILU)
        kv_swiglu(n, j->out + at, j->in + at); /* gated everywhere */
    else
        kv_geglu(act == KV_ACT_GELU_TANH, n, j->out + at, j->in ? j->in + at : NULL);
}

void kv_cpu_activate(const cpu_engine *e, size_t n_row, size_t width, float *gate, const float *up)
{
    over_rows(activate_task, &(rows_job){.e = e, .n_row = n_row, .width = width, .in = up, .out = gate});
}

static void length_task(void *ctx, size_t i)
{
    const rows_job *j = ctx;
    for (size_t r = i * BLOCK; r < i * BLOCK + rows_of(j, i); r++) {
        double sum = 0;
        for (size_t c = 0; c < j->width; c++) sum += (double)j->in[r * j->width + c] * (double)j->in[r * j->width + c];
        j->out[r] = (float)sqrt(sum);
    }
}

void kv_cpu_lengths(const cpu_engine *e, size_t n_row, size_t width, const float *in, float *out)
{
    over_rows(length_task, &(rows_job){.e = e, .n_row = n_row, .width = width, .in = in, .out = out});
}

bool kv_cpu_times(const cpu_engine *e, size_t rows, const float *x, const kv_tensor *w, float *c, size_t ldc)
{
    return kv_matmul(rows, w->rows, w->cols, x, w->f32, c, ldc, e->o.threads);
}

/* ------------------------------------------------------------------------------------------------ feed-forward */
static bool run_ffn(const cpu_engine *e, const kv_ffn *f, uint32_t n, const float *in, float *out, float *room)
{
    const kv_model_desc *d = &e->m->desc;
    float *first = room, *up = room + (size_t)n * d->ffn;
    const kv_tensor *w = d->gated ? &f->gate : &f->up;
    if (!kv_cpu_times(e, n, in, w, first, d->ffn) || (d->gated && !kv_cpu_times(e, n, in, &f->up, up, d->ffn)))
        return false;
    kv_cpu_bias(e, n, d->ffn, d->gated ? f->b_gate : f->b_up, first);
    if (d->gated) kv_cpu_bias(e, n, d->ffn, f->b_up, up);
    kv_cpu_activate(e, n, d->ffn, first, d->gated ? up : NULL);
    if (!kv_cpu_times(e, n, first, &f->down, out, d->hidden)) return false;
    kv_cpu_bias(e, n, d->hidden, f->b_down, out);
    return true;
}

/* logit [n_expert] becomes the weights of the experts: 0 for those not chosen. `p` holds as many. */
static void choose_experts(const kv_model_desc *d, float *logit, float *p)
{
    float top = logit[0];
    double sum = 0, chosen = 0;
    for (uint32_t i = 1; i < d->n_expert; i++) top = logit[i] > top ? logit[i] : top;
    for (uint32_t i = 0; i < d->n_expert; i++) sum += (double)(p[i] = expf(logit[i] - top));
    for (uint32_t i = 0; i < d->n_expert; i++) p[i] = (float)((double)p[i] / sum), logit[i] = 0;
    for (uint32_t k = 0; k < d->n_expert_used; k++) {
        uint32_t best = 0;
        for (uint32_t i = 1; i < d->n_expert; i++)
            if (p[i] > p[best]) best = i;
        logit[best] = p[best], chosen += (double)p[best], p[best] = -1;
    }
    if (d->expert_norm && chosen > 0)
        for (uint32_t i = 0; i < d->n_expert; i++) logit[i] = (float)((double)logit[i] / chosen);
}

/* Experts one after the other, each with the rows that chose it in one block. */
static bool run_experts(const cpu_engine *e, const kv_layer_weights *w, uint32_t n, const float *in, float *out,
                        float *room)
{
    const kv_model_desc *d = &e->m->desc;
    size_t width = d->hidden, row = width * sizeof *in;
    float *some = room, *result = some + n * width, *weight = result + n * width;
    float *p = weight + (size_t)n * d->n_expert, *inner = p + (size_t)n * d->n_expert;

    if (!kv_cpu_times(e, n, in, &w->router, weight, d->n_expert)) return false;
    for (uint32_t r = 0; r < n; r++) choose_experts(d, weight + (size_t)r * d->n_expert, p);
    memset(out, 0, n * row);
    for (uint32_t x = 0; x < d->n_expert; x++) {
        uint32_t count = 0;
        for (uint32_t r = 0; r < n; r++)
            if (weight[(size_t)r * d->n_expert + x] > 0) memcpy(some + width * count++, in + r * width, row);
        if (!count) continue;
        if (!run_ffn(e, &w->ffn[x], count, some, result, inner)) return false;
        for (uint32_t r = count = 0; r < n; r++) {
            float share = weight[(size_t)r * d->n_expert + x];
            if (!(share > 0)) continue;
            const float *from = result + width * count++;
            for (size_t c = 0; c < width; c++) out[r * width + c] += share * from[c];
        }
    }
    return true;
}

kv_status kv_cpu_ffn(const cpu_engine *e, const kv_layer_weights *w, uint32_t n, const float *in, float *out,
                     float *room, kv_error *err)
{
    bool ok = e->m->desc.n_expert ? run_experts(e, w, n, in, out, room) : run_ffn(e, w->ffn, n, in, out, room);
    return ok ? KV_OK : kv_cpu_no_memory(err);
}
