/* derive.c - attention from Q and K in double (derive.h). */
#include "traces/derive.h"
#include "traces/cli.h"

#include <math.h>
#include <stdlib.h>

/* Four partial sums: the processor need not wait for each addition. */
static double dot(const double *a, const double *b, uint32_t n)
{
    double s[4] = {0, 0, 0, 0};
    uint32_t k = 0;
    for (; k + 4 <= n; k += 4)
        for (uint32_t c = 0; c < 4; c++) s[c] += a[k + c] * b[k + c];
    for (; k < n; k++) s[0] += a[k] * b[k];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* Rows first..end-1 of a head as doubles. */
static kv_status load(const kv_trace *t, kv_stream s, uint32_t layer, uint32_t head, uint32_t first, uint32_t end,
                      double **out, kv_error *err)
{
    size_t n = (size_t)(end - first) * kv_trace_get_info(t)->head_dim;
    float *f = NULL;
    double *d = NULL;
    kv_status st = KV_OK;
    /* Ask before allocating: the token count is a claim of the metadata until the rows are there. */
    if (!kv_trace_has(t, s, layer, head, first, end)) n = 0;
    if ((st = kv_array(&f, n, sizeof *f, err)) || (st = kv_array(&d, n, sizeof *d, err)) ||
        (st = kv_trace_read_f32(t, s, layer, head, first, end, f, err)))
        goto out;
    for (size_t i = 0; i < n; i++) d[i] = f[i];
    *out = d;
    d = NULL;
out:
    free(f);
    free(d);
    return st;
}

kv_status kvt_derive(const kv_trace *t, uint32_t layer, uint32_t head, uint32_t a, uint32_t b, uint32_t step,
                     kvt_row_fn fn, void *ctx, kv_error *err)
{
    const kv_trace_info *in = kv_trace_get_info(t);
    uint32_t d = in->head_dim, window = 0;
    double *q = NULL, *k = NULL, *p = NULL;
    kv_status st = KV_OK;
    for (uint32_t l = 0; l < in->n_layer; l++)
        if (in->layer[l] == layer) window = in->window[l];
    if (a >= b) return KV_OK;
    if ((st = load(t, KV_S_Q, layer, head, a, b, &q, err)) ||
        (st = load(t, KV_S_K, layer, head / (in->n_q_head / in->n_kv_head), 0, b, &k, err)) ||
        (st = kv_array(&p, b, sizeof *p, err)))
        goto out;
    for (uint32_t i = a; i < b; i += step) {
        uint32_t from = window && i + 1 > window ? i + 1 - window : 0;
        double top = -INFINITY, sum = 0;
        if (kv_interrupted()) {
            st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
            goto out;
        }
        for (uint32_t j = 0; j < from; j++) p[j] = 0;
        for (uint32_t j = from; j <= i; j++) {
            double s = dot(q + (size_t)(i - a) * d, k + (size_t)j * d, d) * (double)in->scale;
            if (in->softcap > 0) s = in->softcap * tanh(s / in->softcap);
            p[j] = s;
            if (s > top) top = s;
        }
        for (uint32_t j = from; j <= i; j++) sum += p[j] = exp(p[j] - top);
        for (uint32_t j = from; j <= i; j++) p[j] /= sum;
        if ((st = fn(ctx, i, p, top + log(sum), err))) goto out;
        if (step > b - i) break;
    }
out:
    free(q);
    free(k);
    free(p);
    return st;
}

void kvt_row_stat(const double *p, uint32_t row, float stat[4])
{
    double best = -1, entropy = 0, square = 0;
    uint32_t at = 0;
    for (uint32_t j = 0; j <= row; j++) {
        if (p[j] > best) best = p[j], at = j;
        if (p[j] > 0) entropy -= p[j] * log(p[j]);
        square += p[j] * p[j];
    }
    stat[0] = (float)best, stat[1] = (float)at, stat[2] = (float)entropy, stat[3] = (float)square;
}
