/* layer.c - loading a layer, and the shape of a replay. */
#include "sim/layer.h"

#include <stdlib.h>

#include "kernels/kernels.h"

kv_status kv_scene_open(const kv_trace *t, const char *cut, uint32_t decode_rows, kv_scene *s, kv_error *err)
{
    const kv_trace_info *in = kv_trace_get_info(t);
    const char *path = kv_trace_path(t);
    *s = (kv_scene){.trace = t, .info = in, .n_prompt = in->n_prompt};
    if (decode_rows) {
        if (decode_rows >= in->n_token)
            return kv_fail(err, KV_EMISUSE, "--decode-rows %u: trace '%s' has %u tokens", decode_rows, path,
                           in->n_token);
        if (in->n_prompt != in->n_token && decode_rows != in->n_token - in->n_prompt)
            return kv_fail(err, KV_EMISUSE,
                           "--decode-rows %u: trace '%s' already has %u decoded rows; leave the option out",
                           decode_rows, path, in->n_token - in->n_prompt);
        s->n_prompt = in->n_token - decode_rows;
    }
    if (!strcmp(cut, "prompt")) {
        s->n_cut = s->n_prompt;
    } else if (!strcmp(cut, "context")) {
        if (!in->n_context || in->n_context > s->n_prompt)
            return kv_fail(err, KV_EMISSING, "--cut context: trace '%s' does not say where its question begins", path);
        s->n_cut = in->n_context;
    } else {
        return kv_fail(err, KV_EMISUSE, "--cut '%s': want prompt or context", cut);
    }
    s->row_first = s->n_prompt;
    s->n_row = in->n_token - s->n_prompt;
    s->n_token = in->n_token;
    s->slot_bytes = 2 * (size_t)in->head_dim * kv_dtype_bytes(in->dtype);
    kv_status st = kv_array(&s->evict, in->n_layer, sizeof *s->evict, err);
    if (st) return st;
    for (uint32_t i = 0; i < in->n_layer; i++)
        if (!in->window[i] || in->window[i] >= in->n_token) s->evict[s->n_evict++] = i;
    if (!s->n_evict) {
        kv_scene_close(s);
        return kv_fail(err, KV_EMISSING,
                       "trace '%s' has no layer that could evict (none recorded, or sliding windows only)", path);
    }
    return KV_OK;
}

void kv_scene_close(kv_scene *s)
{
    free(s->evict);
    s->evict = NULL;
}

static kv_status floats(float **p, size_t a, size_t b, size_t c, kv_error *err)
{
    size_t n;
    if (!kv_mul(a, b, &n) || !kv_mul(n, c, &n))
        return kv_fail(err, KV_ENOMEM, "array of %zu x %zu x %zu floats is too large", a, b, c);
    return kv_array(p, n, sizeof(float), err);
}

static kv_status load(const kv_layer *l, kv_stream s, uint32_t n_head, uint32_t a, uint32_t b, size_t width, float *to,
                      kv_error *err)
{
    kv_status st = KV_OK;
    for (uint32_t h = 0; h < n_head && !st; h++)
        st = kv_trace_read_f32(l->scene->trace, s, l->number, h, a, b, to + (size_t)h * (b - a) * width, err);
    return st;
}

/* Column sums of rows 0..L-1 from all queries, for traces that do not carry them (imported ones). */
static kv_status derive_colsum(const kv_layer *l, float *out, kv_error *err)
{
    kv_attn_shape shape = {l->L, l->L, l->d, 0, 0, l->scale, l->softcap};
    float *q = NULL, *o = NULL, *lse = NULL;
    double *acc = NULL;
    kv_status st = floats(&q, l->L, l->d, 1, err);
    if (!st) st = floats(&o, l->L, l->d, 1, err);
    if (!st) st = floats(&lse, l->L, 1, 1, err);
    if (!st) st = kv_array(&acc, l->L, sizeof *acc, err);
    for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
        size_t kv = (size_t)(h / l->group) * l->scene->n_token * l->d;
        st = kv_trace_read_f32(l->scene->trace, KV_S_Q, l->number, h, 0, l->L, q, err);
        if (st) break;
        memset(acc, 0, l->L * sizeof *acc);
        if (!kv_attention(&shape, q, l->k + kv, l->v + kv, o, l->d, lse, NULL) ||
            !kv_colsum(&shape, q, l->k + kv, lse, acc))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (uint32_t i = 0; i < l->L; i++) out[(size_t)h * l->L + i] = (float)acc[i];
    }
    free(q), free(o), free(lse), free(acc);
    return st;
}

static kv_layer shape_at(const kv_scene *s, uint32_t index)
{
    const kv_trace_info *in = s->info;
    uint32_t order = 0;
    while (order < s->n_evict && s->evict[order] != index) order++;
    return (kv_layer){.scene = s,
                      .index = index,
                      .number = in->layer[index],
                      .order = order < s->n_evict ? order : KV_NEVER_EVICTS,
                      .n_q_head = in->n_q_head,
                      .n_kv_head = in->n_kv_head,
                      .group = in->n_q_head / in->n_kv_head,
                      .d = in->head_dim,
                      .L = s->n_cut,
                      .scale = in->scale,
                      .softcap = in->softcap};
}

kv_layer kv_layer_shape(const kv_scene *s, uint32_t evict_index)
{
    return shape_at(s, s->evict[evict_index]);
}

kv_status kv_layer_load(const kv_scene *s, uint32_t evict_index, unsigned needs, uint32_t max_window, kv_layer *l,
                        kv_error *err)
{
    return kv_layer_load_at(s, s->evict[evict_index], needs, max_window, l, err);
}

kv_status kv_layer_load_at(const kv_scene *s, uint32_t index, unsigned needs, uint32_t max_window, kv_layer *l,
                           kv_error *err)
{
    const kv_trace_info *in = s->info;
    *l = shape_at(s, index);
    kv_status st = floats(&l->k, l->n_kv_head, s->n_token, l->d, err);
    if (!st) st = floats(&l->v, l->n_kv_head, s->n_token, l->d, err);
    if (!st) st = load(l, KV_S_K, l->n_kv_head, 0, s->n_token, l->d, l->k, err);
    if (!st) st = load(l, KV_S_V, l->n_kv_head, 0, s->n_token, l->d, l->v, err);
    if (!st && (needs & KV_NEED_WINDOW) && l->L) {
        l->max_window = max_window < l->L ? max_window : l->L;
        st = floats(&l->q_win, l->n_q_head, l->max_window, l->d, err);
        if (!st) st = load(l, KV_S_Q, l->n_q_head, l->L - l->max_window, l->L, l->d, l->q_win, err);
    }
    if (!st && (needs & KV_NEED_FUTURE) && s->n_row) {
        st = floats(&l->q_row, l->n_q_head, s->n_row, l->d, err);
        if (!st) st = load(l, KV_S_Q, l->n_q_head, s->row_first, s->n_token, l->d, l->q_row, err);
    }
    if (!st && (needs & KV_NEED_QUERIES)) {
        st = floats(&l->q_all, l->n_q_head, l->L, l->d, err);
        if (!st) st = load(l, KV_S_Q, l->n_q_head, 0, l->L, l->d, l->q_all, err);
    }
    if (!st && (needs & KV_NEED_WO)) {
        st = floats(&l->wo, in->hidden, l->n_q_head, l->d, err);
        if (!st) st = kv_trace_read_wo(s->trace, l->number, l->wo, err);
        if (!st && in->post_norm_eps > 0) st = floats(&l->post_norm, in->hidden, 2, 1, err);
        if (!st && l->post_norm) st = load(l, KV_S_POST_NORM, 1, 0, in->hidden, 2, l->post_norm, err);
    }
    if (!st && (needs & KV_NEED_COLSUM)) {
        kv_stream cs = l->L == in->n_prompt ? KV_S_COLSUM : KV_S_COLSUM_CTX;
        st = floats(&l->colsum, l->n_q_head, l->L, 1, err);
        if (!st && kv_trace_has(s->trace, cs, l->number, 0, 0, l->L) && (cs == KV_S_COLSUM || l->L == in->n_context))
            st = load(l, cs, l->n_q_head, 0, l->L, 1, l->colsum, err);
        else if (!st)
            st = derive_colsum(l, l->colsum, err);
    }
    if (st) kv_layer_free(l);
    return st;
}

void kv_layer_free(kv_layer *l)
{
    free(l->k), free(l->v), free(l->q_row), free(l->q_win), free(l->q_all), free(l->wo), free(l->post_norm),
        free(l->colsum), free(l->probs), free(l->basis), free(l->value_norm);
    *l = (kv_layer){0};
}

/* Rows of the future cut to the columns before the cut. */
static kv_status probs_ahead(kv_layer *l, uint32_t w, kv_error *err)
{
    const kv_scene *s = l->scene;
    float *row = NULL;
    if (!s->n_row)
        return kv_fail(err, KV_EMISSING, "trace '%s' has no decoded rows; an oracle needs them (see --decode-rows)",
                       kv_trace_path(s->trace));
    kv_status st = kv_array(&row, s->n_token, sizeof *row, err);
    for (uint32_t h = 0; h < l->n_q_head && !st; h++)
        for (uint32_t k = 0; k < w && !st; k++) {
            uint32_t r = (uint32_t)((uint64_t)k * s->n_row / w);
            kv_attn_shape shape = {1, s->row_first + r + 1, l->d, s->row_first + r, 0, l->scale, l->softcap};
            if (!kv_probs(&shape, l->q_row + ((size_t)h * s->n_row + r) * l->d,
                          l->k + (size_t)(h / l->group) * s->n_token * l->d, row))
                st = kv_fail(err, KV_ENOMEM, "out of memory");
            memcpy(l->probs + ((size_t)h * w + k) * l->L, row, l->L * sizeof *row);
        }
    free(row);
    return st;
}

kv_status kv_layer_probs(kv_layer *l, uint32_t w, const float **p, kv_error *err)
{
    if (w > l->L) w = l->L;
    if (l->probs && l->probs_window == w && l->probs_ahead == l->ahead) return *p = l->probs, KV_OK;
    free(l->probs);
    l->probs = NULL;
    kv_status st = floats(&l->probs, l->n_q_head, w, l->L, err);
    if (st) return st;
    if (l->ahead && (st = probs_ahead(l, w, err))) return st;
    kv_attn_shape shape = {w, l->L, l->d, l->L - w, 0, l->scale, l->softcap};
    for (uint32_t h = 0; h < l->n_q_head && !l->ahead; h++) {
        const float *q = l->q_win + ((size_t)h * l->max_window + (l->max_window - w)) * l->d;
        const float *k = l->k + (size_t)(h / l->group) * l->scene->n_token * l->d;
        if (!kv_probs(&shape, q, k, l->probs + (size_t)h * w * l->L)) return kv_fail(err, KV_ENOMEM, "out of memory");
    }
    l->probs_window = w, l->probs_ahead = l->ahead;
    return *p = l->probs, KV_OK;
}

kv_status kv_layer_value_norms(kv_layer *l, const double **norm, kv_error *err)
{
    double *one = NULL;
    *norm = l->value_norm;
    if (l->value_norm) return KV_OK;
    kv_status st = kv_array(&l->value_norm, (size_t)l->n_kv_head * l->L, sizeof *l->value_norm, err);
    if (!st) st = kv_array(&one, l->L, sizeof *one, err);
    for (uint32_t q = 0; q < l->n_q_head && !st; q++) {
        double *to = l->value_norm + (size_t)(q / l->group) * l->L;
        if (!kv_project_l1(l->L, l->d, l->scene->info->hidden, l->v + (size_t)(q / l->group) * l->scene->n_token * l->d,
                           l->wo + (size_t)q * l->d, (size_t)l->n_q_head * l->d, one))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (uint32_t i = 0; i < l->L && !st; i++) to[i] += one[i] / l->group;
    }
    free(one);
    if (st) free(l->value_norm), l->value_norm = NULL;
    *norm = l->value_norm;
    return st;
}
