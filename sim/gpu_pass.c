/* gpu_pass.c - layers and lanes. */
#include "sim/gpu_pass.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>

#include "kernels/cuda.h"
#include "kernels/parallel.h"
#include "kernels/walk_dev.h"
#include "sim/metric.h"
#include "traces/cli.h"

enum { LANES = 16, STAGE = 4 << 20 };
#define KEEP_SHARE 0.6 /* of the free memory may hold layers; the rest is for lanes */

struct kv_gpu_pass {
    pthread_mutex_t lock;
    pthread_cond_t freed;
    kv_gpu_lane lane[LANES];
    int n_lane;            /* as many as there is memory for beside the layers that stay */
    const kv_trace *trace; /* whose layers these are; compared, not read */
    uint32_t n_layer;
    kv_gpu_layer *layer; /* [n_layer] kept ones */
    uint8_t *contested;
    size_t kept, room; /* bytes */
    double load_seconds;
};

kv_status kv_gpu_failed(int code, kv_error *err)
{
    return kv_fail(err, code == KV_GPU_ENOMEM ? KV_ENOMEM : KV_EIO, "replay on the GPU: %s%s", kv_gpu_text(code),
                   code == KV_GPU_ENOMEM ? "; use --backend cpu, or fewer points at a time" : "");
}

void *kv_gpu_buffer(kv_gpu_lane *l, int which, size_t n, int *code)
{
    if (*code) return NULL;
    if (l->size[which] >= n && l->buffer[which]) return l->buffer[which];
    kv_gpu_free(l->buffer[which]);
    l->buffer[which] = NULL, l->size[which] = 0;
    if (!(*code = kv_gpu_alloc(n + n / 8, &l->buffer[which]))) l->size[which] = n + n / 8;
    return l->buffer[which];
}

char *kv_gpu_pinned(kv_gpu_lane *l, size_t n, int *code)
{
    if (*code || (l->pinned && l->pinned_size >= n)) return l->pinned;
    kv_gpu_host_free(l->pinned);
    l->pinned = kv_gpu_host_alloc(n + n / 8), l->pinned_size = n + n / 8;
    if (!l->pinned) *code = KV_GPU_ENOMEM, l->pinned_size = 0;
    return l->pinned;
}

kv_status kv_gpu_pass_open(kv_gpu_pass **out, kv_error *err)
{
    kv_gpu_pass *g = NULL;
    size_t available, total;
    *out = NULL;
    if (kv_gpu_count() < 1)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "--backend cuda: no CUDA device that this build can use; take --backend cpu");
    kv_status st = kv_array(&g, 1, sizeof *g, err);
    if (st) return st;
    pthread_mutex_init(&g->lock, NULL), pthread_cond_init(&g->freed, NULL);
    int code = kv_gpu_select(0);
    if (!code) code = kv_gpu_memory(&available, &total);
    if (code) {
        kv_gpu_pass_close(g);
        return kv_gpu_failed(code, err);
    }
    g->room = (size_t)(KEEP_SHARE * (double)available), g->n_lane = 1;
    *out = g;
    return KV_OK;
}

void kv_gpu_pass_clear(kv_gpu_pass *g)
{
    if (!g) return;
    for (uint32_t i = 0; i < g->n_layer; i++) kv_gpu_free(g->layer[i].memory);
    kv_gpu_free(g->contested);
    free(g->layer);
    g->layer = NULL, g->n_layer = 0, g->kept = 0, g->contested = NULL, g->trace = NULL;
}

void kv_gpu_pass_close(kv_gpu_pass *g)
{
    if (!g) return;
    kv_gpu_pass_clear(g);
    for (int i = 0; i < LANES; i++) {
        kv_gpu_lane *l = &g->lane[i];
        for (int b = 0; b < KV_N_BUFFER; b++) kv_gpu_free(l->buffer[b]);
        for (int s = 0; s < 2; s++) kv_gpu_event_close(l->sent[s]), kv_gpu_host_free(l->stage[s]);
        kv_gpu_host_free(l->pinned);
        kv_gpu_blas_close(l->blas);
        kv_gpu_stream_close(l->stream);
    }
    pthread_mutex_destroy(&g->lock), pthread_cond_destroy(&g->freed);
    free(g);
}

double kv_gpu_load_seconds(const kv_gpu_pass *g)
{
    return g->load_seconds;
}

const uint8_t *kv_gpu_contested(const kv_gpu_pass *g)
{
    return g->contested;
}

/* ------------------------------------------------------------------------------------------------ lanes */
static int lane_open(kv_gpu_lane *l)
{
    int code = kv_gpu_stream_open(false, &l->stream);
    if (!code) code = kv_gpu_blas_open(l->stream, &l->blas);
    for (int s = 0; s < 2 && !code; s++) {
        code = kv_gpu_event_open(&l->sent[s]);
        if (!code && !(l->stage[s] = kv_gpu_host_alloc(STAGE))) code = KV_GPU_ENOMEM;
    }
    return code;
}

kv_gpu_lane *kv_gpu_lane_take(kv_gpu_pass *g, kv_error *err)
{
    kv_gpu_lane *l = NULL;
    int code = kv_gpu_select(0);
    pthread_mutex_lock(&g->lock);
    while (!l && !code) {
        for (int i = 0; i < g->n_lane && !l; i++)
            if (!g->lane[i].busy) l = &g->lane[i];
        if (!l) pthread_cond_wait(&g->freed, &g->lock);
    }
    if (!code) l->busy = true;
    pthread_mutex_unlock(&g->lock);
    if (!code && !l->blas && (code = lane_open(l))) kv_gpu_lane_give(g, l);
    if (code) kv_gpu_failed(code, err);
    return code ? NULL : l;
}

void kv_gpu_lane_give(kv_gpu_pass *g, kv_gpu_lane *l)
{
    pthread_mutex_lock(&g->lock);
    l->busy = false;
    pthread_cond_signal(&g->freed);
    pthread_mutex_unlock(&g->lock);
}

/* n bytes of the host through page-locked memory: one half is filled while the other is sent. */
static int upload(kv_gpu_lane *l, void *to, const void *from, size_t n)
{
    int code = 0;
    for (size_t at = 0, s = 0; at < n && !code; at += STAGE, s ^= 1) {
        size_t m = n - at < STAGE ? n - at : STAGE;
        code = kv_gpu_event_sync(l->sent[s]);
        if (code) break;
        memcpy(l->stage[s], (const char *)from + at, m);
        code = kv_gpu_copy((char *)to + at, l->stage[s], m, l->stream);
        if (!code) code = kv_gpu_event_record(l->sent[s], l->stream);
    }
    return code;
}

/* ------------------------------------------------------------------------------------------------ layers */
size_t kv_gpu_order_at(const kv_plan *p, size_t r)
{
    size_t n = 0;
    for (size_t i = 0; i < r; i++) n += (size_t)p->ranking[i].n_unit * p->scene->n_cut;
    return n;
}

static size_t aligned(size_t n)
{
    return (n + 255) / 256 * 256;
}

/* The parts of a layer and where they begin; returns the bytes of all. */
enum { PART_K, PART_V, PART_WIN, PART_ROW, PART_COLSUM, PART_WO, PART_ORDER, N_PART = KV_GPU_PARTS };
static size_t layout(const kv_plan *p, size_t at[N_PART], size_t size[N_PART])
{
    const kv_scene *sc = p->scene;
    const kv_trace_info *in = sc->info;
    size_t d = in->head_dim, Hq = in->n_q_head, w = p->max_window < sc->n_cut ? p->max_window : sc->n_cut, sum = 0;
    bool wo = !sc->wanted || (sc->wanted >> KV_M_LAYER_ERROR & 1);
    for (uint32_t l = 0; l < sc->n_evict; l++) wo &= kv_trace_has_wo(sc->trace, in->layer[sc->evict[l]]);
    size[PART_K] = size[PART_V] = (size_t)in->n_kv_head * sc->n_token * d * 4;
    size[PART_WIN] = p->needs & KV_NEED_WINDOW ? Hq * w * d * 4 : 0;
    size[PART_ROW] = Hq * sc->n_row * d * 4;
    size[PART_COLSUM] = p->needs & KV_NEED_COLSUM ? Hq * sc->n_cut * 4 : 0;
    size[PART_WO] = wo ? (size_t)in->hidden * Hq * d * 2 : 0;
    size[PART_ORDER] = kv_gpu_order_at(p, p->n_ranking) * 4;
    for (int i = 0; i < N_PART; i++) at[i] = sum, sum += aligned(size[i]);
    return sum;
}

static int send_layer(kv_gpu_lane *lane, const kv_layer *h, const size_t at[N_PART], const size_t size[N_PART],
                      kv_gpu_layer *l)
{
    char *m = l->memory;
    const float *from[N_PART] = {h->k, h->v, h->q_win, h->q_row, h->colsum};
    int code = 0;
    for (int i = 0; i <= PART_COLSUM && !code; i++)
        if (size[i]) code = upload(lane, m + at[i], from[i], size[i]);
    l->k = (float *)(m + at[PART_K]), l->v = (float *)(m + at[PART_V]);
    l->q_win = size[PART_WIN] ? (float *)(m + at[PART_WIN]) : NULL;
    l->q_row = (float *)(m + at[PART_ROW]);
    l->colsum = size[PART_COLSUM] ? (float *)(m + at[PART_COLSUM]) : NULL;
    l->wo = size[PART_WO] ? m + at[PART_WO] : NULL;
    l->order = (uint32_t *)(m + at[PART_ORDER]);
    l->max_window = h->max_window;
    if (l->wo) { /* as f32 to a buffer, rounded from there */
        float *wide = kv_gpu_buffer(lane, KV_B_C, size[PART_WO] * 2, &code);
        if (!code) code = upload(lane, wide, h->wo, size[PART_WO] * 2);
        if (!code) code = kv_cast_dev(size[PART_WO] / 2, wide, l->wo, 16, NULL, lane->stream);
    }
    float *top = kv_gpu_buffer(lane, KV_B_NORM, 1025 * 4, &code);
    if (!code) code = kv_largest_dev(size[PART_V] / 4, l->v, top, top + 1, lane->stream);
    char *to = kv_gpu_pinned(lane, sizeof l->v_top, &code);
    if (!code) code = kv_gpu_copy(to, top, sizeof l->v_top, lane->stream);
    if (!code) code = kv_gpu_stream_sync(lane->stream);
    if (!code) memcpy(&l->v_top, to, sizeof l->v_top);
    return code;
}

static kv_status load_layer(kv_gpu_lane *lane, const kv_plan *p, uint32_t index, kv_gpu_layer *l, kv_error *err)
{
    size_t at[N_PART], size[N_PART], bytes = layout(p, at, size);
    kv_layer h;
    unsigned needs = (p->needs & (KV_NEED_WINDOW | KV_NEED_COLSUM)) | KV_NEED_FUTURE | (size[PART_WO] ? KV_NEED_WO : 0);
    kv_status st = kv_layer_load(p->scene, index, needs, p->max_window, &h, err);
    if (st) return st;
    int code = kv_gpu_alloc(bytes, &l->memory);
    l->bytes = bytes;
    memcpy(l->size, size, sizeof size);
    if (!code) code = send_layer(lane, &h, at, size, l);
    if (code) kv_gpu_free(l->memory), l->memory = NULL;
    kv_layer_free(&h);
    return code ? kv_gpu_failed(code, err) : KV_OK;
}

/* The tables of a trace, once. */
static kv_status begin(kv_gpu_pass *g, const kv_plan *p, kv_error *err)
{
    const kv_scene *sc = p->scene;
    uint8_t *flag = NULL;
    if (g->trace == sc->trace && g->n_layer == sc->n_evict) return KV_OK;
    kv_gpu_pass_clear(g);
    kv_status st = kv_array(&g->layer, sc->n_evict, sizeof *g->layer, err);
    if (!st) st = kv_array(&flag, sc->n_token, 1, err);
    int code = st ? 0 : kv_gpu_alloc(sc->n_token, (void **)&g->contested);
    for (uint32_t i = 0; i < sc->n_cut && !st; i++) flag[i] = kv_contested(sc, i);
    if (!st && !code) code = kv_gpu_copy(g->contested, flag, sc->n_token, NULL);
    if (!st && !code) code = kv_gpu_stream_sync(NULL);
    free(flag);
    if (code) st = kv_gpu_failed(code, err);
    if (st) return st;
    /* attention of the measured rows or of the window, sums of pieces, differences, a product */
    size_t at[N_PART], size[N_PART], layers = layout(p, at, size) * sc->n_evict, left, total;
    size_t rows = sc->n_row < 64 ? sc->n_row : 64;
    if (p->max_window > rows) rows = p->max_window;
    size_t lane = (size_t)sc->info->n_q_head * rows * sc->n_token * 6 + ((size_t)1 << 30);
    if ((code = kv_gpu_memory(&left, &total))) return kv_gpu_failed(code, err);
    for (int i = 0; i < LANES; i++)
        for (int b = 0; b < KV_N_BUFFER; b++) left += g->lane[i].size[b];
    if (layers > g->room) layers = g->room;
    size_t n = left > layers ? (left - layers) / lane : 0;
    g->n_lane = n < 1 ? 1 : n < LANES ? (int)n : LANES;
    g->trace = sc->trace, g->n_layer = sc->n_evict;
    return KV_OK;
}

typedef struct {
    kv_gpu_pass *g;
    const kv_plan *p;
    kv_status *st;
    kv_error *err;
} job;

static void load_task(void *ctx, size_t i)
{
    job *j = ctx;
    kv_gpu_layer *l = &j->g->layer[i];
    size_t at[N_PART], size[N_PART], bytes = layout(j->p, at, size);
    if (kv_interrupted()) {
        j->st[i] = kv_fail(&j->err[i], KV_EINTERRUPTED, "interrupted");
        return;
    }
    if (l->kept && !memcmp(l->size, size, sizeof size)) {
        l->ordered = false; /* another plan */
        return;
    }
    pthread_mutex_lock(&j->g->lock);
    if (l->kept) j->g->kept -= l->bytes, kv_gpu_free(l->memory), *l = (kv_gpu_layer){0};
    bool fits = j->g->kept + bytes <= j->g->room;
    if (fits) j->g->kept += bytes;
    pthread_mutex_unlock(&j->g->lock);
    if (!fits) return;
    kv_gpu_lane *lane = kv_gpu_lane_take(j->g, &j->err[i]);
    if (!lane) {
        j->st[i] = KV_EIO;
        return;
    }
    j->st[i] = load_layer(lane, j->p, (uint32_t)i, l, &j->err[i]);
    kv_gpu_lane_give(j->g, lane);
    l->kept = !j->st[i];
    if (j->st[i] != KV_ENOMEM) return;
    j->st[i] = KV_OK; /* it goes there again for each pass */
    pthread_mutex_lock(&j->g->lock);
    j->g->kept -= bytes;
    pthread_mutex_unlock(&j->g->lock);
}

kv_status kv_gpu_load(kv_gpu_pass *g, const kv_plan *p, uint32_t threads, kv_error *err)
{
    job j = {.g = g, .p = p};
    uint32_t n = p->scene->n_evict;
    double began = kv_seconds(CLOCK_MONOTONIC);
    kv_status st = begin(g, p, err);
    if (!st) st = kv_array(&j.st, n, sizeof *j.st, err);
    if (!st) st = kv_array(&j.err, n, sizeof *j.err, err);
    if (!st) kv_parallel(n, threads, load_task, &j);
    for (uint32_t i = 0; i < n && !st; i++)
        if ((st = j.st[i]) && err) *err = j.err[i];
    free(j.st), free(j.err);
    g->load_seconds += kv_seconds(CLOCK_MONOTONIC) - began;
    return st;
}

kv_status kv_gpu_layer_take(kv_gpu_pass *g, kv_gpu_lane *lane, const kv_plan *p, uint32_t index, kv_gpu_layer **out,
                            kv_error *err)
{
    pthread_mutex_lock(&g->lock);
    kv_status st = begin(g, p, err);
    *out = st ? NULL : &g->layer[index];
    pthread_mutex_unlock(&g->lock);
    if (st || (*out)->kept) return st;
    st = kv_array(out, 1, sizeof **out, err);
    if (!st && (st = load_layer(lane, p, index, *out, err))) free(*out), *out = NULL;
    return st;
}

void kv_gpu_layer_give(kv_gpu_layer *l)
{
    if (!l || l->kept) return;
    kv_gpu_free(l->memory);
    free(l);
}

kv_status kv_gpu_orders(kv_gpu_lane *lane, const kv_plan *p, uint32_t index, const bool *skip, kv_gpu_layer *l,
                        kv_error *err)
{
    int code = 0;
    for (size_t r = 0; r < p->n_ranking && !code; r++) {
        size_t n = (size_t)p->ranking[r].n_unit * p->scene->n_cut;
        if (skip && skip[r]) continue;
        code = upload(lane, l->order + kv_gpu_order_at(p, r), p->ranking[r].order + index * n, n * 4);
    }
    if (!code) code = kv_gpu_stream_sync(lane->stream);
    if (code) return kv_gpu_failed(code, err);
    l->ordered = true;
    return KV_OK;
}

kv_status kv_gpu_rank_done(kv_gpu_pass *g, const kv_plan *p, uint32_t layer, const bool *done, kv_error *err)
{
    if (!g->layer[layer].kept) return KV_OK; /* they go there with the layer */
    kv_gpu_lane *lane = kv_gpu_lane_take(g, err);
    if (!lane) return KV_EIO;
    kv_status st = kv_gpu_orders(lane, p, layer, done, &g->layer[layer], err);
    kv_gpu_lane_give(g, lane);
    return st;
}
