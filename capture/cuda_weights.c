/* cuda_weights.c - from stored tensors to device memory: all threads read rows as they are stored into page-locked
 * buffers, one on its way to the device while the next is filled; there they are expanded. Weights at random are made
 * where they are used. */
#include "capture/cuda_engine.h"

#include <pthread.h>
#include <stdlib.h>

#include "kernels/parallel.h"
#include "traces/cli.h"

#define PART_BYTES ((size_t)64 << 20) /* of one page-locked buffer */
#define TASK_ROWS  64u                /* rows read by a thread at a time, at least */

typedef struct {
    kv_cuda *e;
    kv_cuda_gpu *v;
    void *part[2];
    kv_gpu_event sent[2];
    int turn;
    void *raw;                /* a part on the device */
    uint64_t *found;          /* there, as kv_expand_dev says: matrix << 32 | row */
    const kv_tensor **sent_t; /* [n_sent] the matrices, as they went */
    uint32_t n_sent, cap;
} upload;

/* Rows row .. row+n-1 of a tensor into `to`, in tasks of `step` rows. */
typedef struct {
    const kv_cuda *e;
    const kv_tensor *t;
    uint32_t row, n, step;
    size_t row_bytes;
    uint8_t *to;
    pthread_mutex_t lock;
    size_t failed;
    kv_status st;
    kv_error err;
} reading;

static void read_task(void *ctx, size_t i)
{
    reading *x = ctx;
    const kv_tensor *t = x->t;
    uint32_t first = (uint32_t)i * x->step, n = x->n - first < x->step ? x->n - first : x->step;
    uint8_t *to = x->to + first * x->row_bytes;
    kv_error err;
    kv_status st = KV_OK;
    if (t->f32)
        memcpy(to, t->f32 + (size_t)(x->row + first) * t->cols, n * x->row_bytes);
    else
        st = kv_tensor_read(x->e->m, t, x->row + first, n, to, &err);
    if (!st) return;
    pthread_mutex_lock(&x->lock);
    if (!x->st || i < x->failed) x->failed = i, x->st = st, x->err = err;
    pthread_mutex_unlock(&x->lock);
}

static kv_status send(upload *u, const kv_tensor *t, void *to, kv_error *err)
{
    kv_cuda *e = u->e;
    size_t row_bytes = t->f32 ? t->cols * sizeof(float) : t->row_bytes; /* 0: weights that are drawn, not stored */
    uint32_t step = TASK_ROWS;
    kv_status st = KV_OK;

    if (row_bytes > PART_BYTES)
        return kv_fail(err, KV_EUNSUPPORTED, "a row of weights of %zu bytes is too long for the device", row_bytes);
    if (t->random > 0)
        return kv_cuda_check(u->v,
                             kv_random_dev(t->seed, 0, (size_t)t->rows * t->cols, t->random, to, e->bits, u->v->run),
                             "weights", err);
    if (u->n_sent == u->cap) {
        uint32_t cap = u->cap ? 2 * u->cap : 256;
        const kv_tensor **more = realloc(u->sent_t, cap * sizeof *more);
        if (!more) return kv_fail(err, KV_ENOMEM, "out of memory for the list of weights");
        u->sent_t = more, u->cap = cap;
    }
    uint64_t number = u->n_sent;
    u->sent_t[u->n_sent++] = t;
    if (t->group && t->group < t->rows && t->group > step) step = t->group; /* reordered heads are read whole */
    size_t most = PART_BYTES / row_bytes;
    if (most > step) most = most / step * step;
    for (uint32_t row = 0, n; row < t->rows && !st; row += n, u->turn ^= 1) {
        n = t->rows - row < most ? t->rows - row : (uint32_t)most;
        if (kv_interrupted()) return kv_fail(err, KV_EINTERRUPTED, "stopped by a signal while loading weights");
        if ((st = kv_cuda_check(u->v, kv_gpu_event_sync(u->sent[u->turn]), "the weights", err))) break;
        reading x = {.e = e, .t = t, .row = row, .n = n, .step = step, .row_bytes = row_bytes, .to = u->part[u->turn]};
        pthread_mutex_init(&x.lock, NULL);
        kv_parallel((n + step - 1) / step, e->o.threads, read_task, &x);
        pthread_mutex_destroy(&x.lock);
        if (x.st) {
            if (err) *err = x.err;
            return x.st;
        }
        int g = kv_gpu_copy(u->raw, u->part[u->turn], n * row_bytes, u->v->run);
        if (!g) g = kv_gpu_event_record(u->sent[u->turn], u->v->run);
        if (!g)
            g = kv_expand_dev(t->f32 ? KV_GGML_F32 : t->type->id, n, t->cols, u->raw,
                              (uint8_t *)to + (size_t)row * t->cols * e->size, e->bits, number << 32 | row, u->found,
                              u->v->run);
        st = kv_cuda_check(u->v, g, "the weights", err);
    }
    return st;
}

/* Everything has arrived: was every value finite, before and behind its rounding? */
static kv_status check_found(const upload *u, kv_error *err)
{
    const kv_model *m = u->e->m;
    uint64_t found[2];
    kv_status st = kv_cuda_check(u->v, kv_gpu_copy(found, u->found, sizeof found, u->v->run), "the weights", err);
    if (st || (st = kv_cuda_check(u->v, kv_gpu_stream_sync(u->v->run), "the weights", err))) return st;
    if (found[0] == UINT64_MAX && found[1] == UINT64_MAX) return KV_OK;
    if (found[1] < found[0])
        return kv_fail(err, KV_EUNSUPPORTED, "a weight of '%s' is beyond 65504: run with --dtype bf16 or f32",
                       m->desc.name);
    /* The CPU finds it too, and has the words. */
    const kv_tensor *t = u->sent_t[found[0] >> 32];
    float *f = NULL;
    if ((st = kv_array(&f, t->cols, sizeof *f, err))) return st;
    st = kv_tensor_floats(m, t, (uint32_t)found[0], 1, f, err);
    free(f);
    return st ? st : kv_fail(err, KV_EFORMAT, "weights of '%s' are not finite", m->desc.name);
}

/* The matrices of a list below one another in one array. */
static kv_status matrices(upload *u, const kv_tensor *const *list, int n, void *out, kv_error *err)
{
    kv_cuda_gpu *v = u->v;
    size_t bytes = 0, at = 0;
    uint8_t *to = NULL;
    for (int i = 0; i < n; i++) bytes += (size_t)list[i]->rows * list[i]->cols * u->e->size;
    kv_status st = kv_cuda_room(v, &v->weights, bytes, "weights", &to, err);
    for (int i = 0; i < n && !st; i++) {
        st = send(u, list[i], to + at, err);
        at += (size_t)list[i]->rows * list[i]->cols * u->e->size;
    }
    *(void **)out = to;
    return st;
}

static kv_status matrix(upload *u, const kv_tensor *t, void *out, kv_error *err)
{
    return matrices(u, &t, 1, out, err);
}

static kv_status vector(upload *u, const float *from, size_t n, float **out, kv_error *err)
{
    kv_status st;
    *out = NULL;
    if (!from) return KV_OK;
    if ((st = kv_cuda_room(u->v, &u->v->weights, n * sizeof *from, "weights", out, err))) return st;
    return kv_cuda_check(u->v, kv_gpu_copy(*out, from, n * sizeof *from, u->v->run), "the weights", err);
}

static kv_status norm(upload *u, const kv_norm *from, size_t n, kv_cuda_norm *to, kv_error *err)
{
    kv_status st = vector(u, from->w, n, &to->w, err);
    return st ? st : vector(u, from->b, n, &to->b, err);
}

static kv_status feed_forward(upload *u, const kv_ffn *f, kv_cuda_ffn *to, kv_error *err)
{
    const kv_model_desc *d = &u->e->m->desc;
    const kv_tensor *gate_up[2] = {&f->gate, &f->up};
    kv_status st = d->gated ? matrices(u, gate_up, 2, &to->gate_up, err) : matrix(u, &f->up, &to->gate_up, err);
    if (st || (st = matrix(u, &f->down, &to->down, err)) || (st = vector(u, f->b_gate, d->ffn, &to->b_gate, err)) ||
        (st = vector(u, f->b_up, d->ffn, &to->b_up, err)))
        return st;
    return vector(u, f->b_down, d->hidden, &to->b_down, err);
}

static kv_status layer(upload *u, uint32_t l, kv_error *err)
{
    const kv_model_desc *d = &u->e->m->desc;
    const kv_layer_weights *w = &u->e->m->layer[l];
    const kv_tensor *qkv[3] = {&w->wq, &w->wk, &w->wv};
    kv_cuda_layer *to = &u->e->layer[l];
    size_t h = d->hidden, nq = (size_t)d->n_q_head * d->head_dim, nk = (size_t)d->n_kv_head * d->head_dim;
    size_t n_ffn = d->n_expert ? d->n_expert : 1;
    bool all = d->qk_norm == KV_QK_NORM_ALL;
    kv_status st;

    if ((st = kv_array(&to->ffn, n_ffn, sizeof *to->ffn, err)) ||
        (st = norm(u, &w->attn_norm, h, &to->attn_norm, err)) ||
        (st = norm(u, &w->q_norm, all ? nq : d->head_dim, &to->q_norm, err)) ||
        (st = norm(u, &w->k_norm, all ? nk : d->head_dim, &to->k_norm, err)) ||
        (st = norm(u, &w->post_attn_norm, h, &to->post_attn_norm, err)) ||
        (st = norm(u, &w->ffn_norm, h, &to->ffn_norm, err)) ||
        (st = norm(u, &w->post_ffn_norm, h, &to->post_ffn_norm, err)) || (st = matrices(u, qkv, 3, &to->qkv, err)) ||
        (st = matrix(u, &w->wo, &to->wo, err)) || (st = vector(u, w->bq, nq, &to->bq, err)) ||
        (st = vector(u, w->bk, nk, &to->bk, err)) || (st = vector(u, w->bv, nk, &to->bv, err)) ||
        (st = vector(u, w->bo, h, &to->bo, err)))
        return st;
    if (d->n_expert && (st = matrix(u, &w->router, &to->router, err))) return st;
    for (size_t i = 0; i < n_ffn; i++)
        if ((st = feed_forward(u, &w->ffn[i], &to->ffn[i], err))) return st;
    return KV_OK;
}

static kv_status device(upload *u, kv_error *err)
{
    kv_cuda *e = u->e;
    kv_cuda_gpu *v = u->v;
    const kv_model *m = e->m;
    const kv_model_desc *d = &m->desc;
    bool first = !v->first, last = v->end == d->n_layer;
    kv_status st = vector(u, &d->residual_scale, 1, &v->residual, err);

    if (!st && first) st = matrix(u, &m->tok_embd, &v->tok_embd, err);
    if (!st && first && m->pos_embd.rows) st = matrix(u, &m->pos_embd, &v->pos_embd, err);
    if (!st && last) st = norm(u, &m->out_norm, d->hidden, &v->out_norm, err);
    if (!st && last && d->tied && first) v->output = v->tok_embd;
    if (!st && last && !v->output) st = matrix(u, &m->output, &v->output, err);
    for (uint32_t l = v->first; l < v->end && !st; l++) st = layer(u, l, err);
    if (!st && u->n_sent) return check_found(u, err);
    return st ? st : kv_cuda_check(v, kv_gpu_stream_sync(v->run), "the weights", err);
}

static kv_status open_upload(upload *u, kv_error *err)
{
    static const uint64_t none[2] = {UINT64_MAX, UINT64_MAX};
    int g = kv_gpu_select(u->v->id);
    for (int k = 0; k < 2 && !g; k++) g = kv_gpu_event_open(&u->sent[k]);
    if (g || u->e->m->tok_embd.random > 0) return kv_cuda_check(u->v, g, "the weights", err);
    for (int k = 0; k < 2 && !g; k++)
        if (!(u->part[k] = kv_gpu_host_alloc(PART_BYTES)))
            return kv_cuda_check(u->v, KV_GPU_ENOMEM, "page-locked host memory", err);
    g = kv_gpu_alloc(PART_BYTES, &u->raw);
    if (!g) g = kv_gpu_alloc(sizeof none, (void **)&u->found);
    if (!g) g = kv_gpu_copy(u->found, none, sizeof none, u->v->run);
    return kv_cuda_check(u->v, g, "the weights", err);
}

kv_status kv_cuda_load(kv_cuda *e, kv_error *err)
{
    kv_status st = KV_OK;
    for (uint32_t i = 0; i < e->n_dev && !st; i++) {
        upload u = {.e = e, .v = &e->dev[i]};
        if (!(st = open_upload(&u, err))) st = device(&u, err);
        if (st) kv_gpu_stream_sync(u.v->run);
        for (int k = 0; k < 2; k++) kv_gpu_event_close(u.sent[k]), kv_gpu_host_free(u.part[k]);
        kv_gpu_free(u.raw), kv_gpu_free(u.found);
        free(u.sent_t);
    }
    return st;
}
