/* tiny.h - small seeded traces for tests: random Q, K, V of any shape, written with the real writer. */
#ifndef KV_TINY_H
#define KV_TINY_H

#include <math.h>
#include <stdlib.h>

#include "traces/trace.h"

typedef struct {
    uint32_t n_layer, n_q_head, n_kv_head, d, n_token, n_prompt;
    bool wo;   /* with W_O of hidden = q_heads * d */
    bool flat; /* all keys equal: every score ties */
    uint64_t seed;
} kv_tiny;

typedef struct {
    float *q, *k, *v, *wo; /* [layer][head][token][d], [layer][hidden][q_heads*d] */
    float *xnorm;          /* [layer][token], or NULL: not written */
    char *text;            /* or NULL; then offset [n_token + 1] too */
    uint32_t *offset;
    kv_span evidence[8]; /* the first n_evidence go into the metadata */
    uint32_t n_evidence;
} kv_tiny_data;

static inline kv_tiny_data kv_tiny_make(const kv_tiny *s)
{
    kv_rng r = {s->seed};
    size_t nq = (size_t)s->n_layer * s->n_q_head * s->n_token * s->d,
           nk = (size_t)s->n_layer * s->n_kv_head * s->n_token * s->d;
    size_t w = (size_t)s->n_q_head * s->d;
    kv_tiny_data t = {.q = malloc(nq * 4 + 4),
                      .k = malloc(nk * 4 + 4),
                      .v = malloc(nk * 4 + 4),
                      .wo = malloc(s->n_layer * w * w * 4 + 4)};
    for (size_t i = 0; i < nq; i++) t.q[i] = (float)kv_rng_normal(&r) * 1.5f;
    for (size_t i = 0; i < nk; i++) t.k[i] = s->flat ? 1.0f : (float)kv_rng_normal(&r);
    for (size_t i = 0; i < nk; i++) t.v[i] = (float)kv_rng_normal(&r);
    for (size_t i = 0; i < s->n_layer * w * w; i++) t.wo[i] = (float)kv_rng_normal(&r);
    return t;
}

static inline void kv_tiny_free(kv_tiny_data *t)
{
    free(t->q), free(t->k), free(t->v), free(t->wo);
    free(t->xnorm), free(t->text), free(t->offset);
}

static inline kv_status kv_tiny_write(const kv_tiny *s, const kv_tiny_data *t, const char *path, kv_error *err)
{
    uint32_t layer[64], window[64] = {0};
    kv_trace_writer *w = NULL;
    uint32_t width = s->n_q_head * s->d;
    kv_span evidence[8];
    memcpy(evidence, t->evidence, sizeof evidence);
    for (uint32_t i = 0; i < s->n_layer; i++) layer[i] = i;
    kv_trace_info in = {.model = "tiny",
                        .arch = "synth",
                        .n_layer = s->n_layer,
                        .layer = layer,
                        .n_layer_model = s->n_layer,
                        .n_q_head = s->n_q_head,
                        .n_kv_head = s->n_kv_head,
                        .head_dim = s->d,
                        .hidden = width,
                        .n_token = s->n_token,
                        .n_prompt = s->n_prompt,
                        .window = window,
                        .scale = 1 / sqrtf((float)s->d),
                        .rope_mscale = 1,
                        .dtype = KV_F32,
                        .evidence = evidence,
                        .n_evidence = t->n_evidence,
                        .record = "qkv"};
    kv_status st = kv_trace_create(path, &in, NULL, 0, &w, err);
    for (uint32_t l = 0; l < s->n_layer && !st; l++) {
        const float *from[3] = {t->q + (size_t)l * s->n_q_head * s->n_token * s->d,
                                t->k + (size_t)l * s->n_kv_head * s->n_token * s->d,
                                t->v + (size_t)l * s->n_kv_head * s->n_token * s->d};
        for (int i = 0; i < 3 && !st; i++) {
            kv_chunk c = {.stream = (kv_stream)(KV_S_Q + i),
                          .layer = l,
                          .head_count = i ? s->n_kv_head : s->n_q_head,
                          .token_count = s->n_token,
                          .width = s->d,
                          .dtype = KV_F32};
            st = kv_trace_put(w, &c, from[i], err);
        }
        kv_chunk c = {
            .stream = KV_S_WO, .layer = l, .head_count = 1, .token_count = width, .width = width, .dtype = KV_F32};
        if (!st && s->wo) st = kv_trace_put(w, &c, t->wo + (size_t)l * width * width, err);
        kv_chunk x = {
            .stream = KV_S_XNORM, .layer = l, .head_count = 1, .token_count = s->n_token, .width = 1, .dtype = KV_F32};
        if (!st && t->xnorm) st = kv_trace_put(w, &x, t->xnorm + (size_t)l * s->n_token, err);
    }
    kv_chunk o = {.stream = KV_S_OFFSETS, .head_count = 1, .token_count = s->n_token + 1, .width = 1, .dtype = KV_U32};
    if (!st && t->text) st = kv_trace_put(w, &o, t->offset, err);
    if (!st && t->text) st = kv_trace_put_bytes(w, KV_S_TEXT, t->text, strlen(t->text), err);
    if (st)
        kv_trace_abandon(w);
    else
        st = kv_trace_finish(w, err);
    return st;
}

#endif
