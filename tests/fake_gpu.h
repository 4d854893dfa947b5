/* fake_gpu.h - gpu.h and the device functions of cuda.h in memory, slow and plain, so that the CUDA engine's own work
 * (which layer where, what is copied when, what is freed) is tested on machines without a device. Devices are numbers:
 * memory belongs to the one that was selected when it was allocated, and work on a stream may touch only its own.
 * Any call may be made to fail. For one test program: everything is static but what the library calls. */
#ifndef KV_FAKE_GPU_H
#define KV_FAKE_GPU_H

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/cuda.h"
#include "kernels/gpu.h"
#include "kernels/half.h"
#include "kernels/kernels.h"
#include "kernels/quant.h"
#include "kernels/random.h"
#include "traces/base.h"

typedef struct fake_block {
    struct fake_block *next;
    size_t n;
    int device; /* -1: page-locked host memory */
} fake_block;

struct CUstream_st {
    int device;
};
struct CUevent_st {
    double at;
};
struct kv_gpu_blas {
    int device;
};

#define FAKE_LOST 719               /* cudaErrorLaunchFailure */
#define FAKE_FILL ((size_t)1 << 20) /* bytes of fresh memory that hold rubbish, at most */

static struct {
    int devices, at;
    size_t limit;    /* bytes of a device; 0 = none */
    long fail_after; /* calls until everything fails, -1 = never */
    bool once;       /* only that one call fails */
    int code;        /* with this error */
    long calls;
    size_t held[8];
    int live;      /* blocks, streams, events, handles */
    int strangers; /* accesses to another device's memory */
    fake_block *blocks;
    pthread_mutex_t lock;
} fake = {.devices = 1, .fail_after = -1, .code = FAKE_LOST, .lock = PTHREAD_MUTEX_INITIALIZER};

static int fake_call(void)
{
    pthread_mutex_lock(&fake.lock);
    bool fails = fake.fail_after >= 0 && (fake.once ? fake.calls == fake.fail_after : fake.calls >= fake.fail_after);
    int code = fails ? fake.code : 0;
    fake.calls++;
    pthread_mutex_unlock(&fake.lock);
    return code;
}

static void fake_touch(const void *p, int device)
{
    pthread_mutex_lock(&fake.lock);
    for (const fake_block *b = fake.blocks; p && b; b = b->next)
        if ((const char *)p >= (const char *)(b + 1) && (const char *)p < (const char *)(b + 1) + b->n &&
            b->device >= 0 && b->device != device)
            fake.strangers++;
    pthread_mutex_unlock(&fake.lock);
}

static void *fake_alloc(size_t n, int device)
{
    fake_block *b = malloc(sizeof *b + n + 1);
    if (!b) abort();
    memset(b + 1, 0xA5, n < FAKE_FILL ? n : FAKE_FILL);
    pthread_mutex_lock(&fake.lock);
    *b = (fake_block){.next = fake.blocks, .n = n + 1, .device = device};
    fake.blocks = b, fake.live++;
    if (device >= 0) fake.held[device] += n;
    pthread_mutex_unlock(&fake.lock);
    return b + 1;
}

static void fake_free(void *p)
{
    if (!p) return;
    pthread_mutex_lock(&fake.lock);
    for (fake_block **b = &fake.blocks; *b; b = &(*b)->next)
        if ((void *)(*b + 1) == p) {
            fake_block *gone = *b;
            *b = gone->next, fake.live--;
            if (gone->device >= 0) fake.held[gone->device] -= gone->n - 1;
            free(gone);
            break;
        }
    pthread_mutex_unlock(&fake.lock);
}

static float fake_get(const void *p, size_t i, int bits)
{
    uint16_t h;
    if (bits == 32) return ((const float *)p)[i];
    memcpy(&h, (const char *)p + 2 * i, 2);
    return bits == 16 ? kv_f16_to_f32(h) : kv_bf16_to_f32(h);
}

static uint32_t fake_put(void *p, size_t i, int bits, float v)
{
    uint16_t h = bits == 16 ? kv_f32_to_f16(v) : kv_f32_to_bf16(v);
    if (bits == 32) return ((float *)p)[i] = v, 0;
    memcpy((char *)p + 2 * i, &h, 2);
    return isfinite(v) && !isfinite(fake_get(p, i, bits));
}

/* One head of an array of rows at a stride as floats. */
static float *fake_rows(const void *p, size_t first, size_t n, size_t stride, size_t d, int bits)
{
    float *f = malloc((n * d + 1) * sizeof *f);
    for (size_t r = 0; r < n; r++)
        for (size_t c = 0; c < d; c++) f[r * d + c] = fake_get(p, first + r * stride + c, bits);
    return f;
}

/* ------------------------------------------------------------------------------------------------ gpu.h */
const char *kv_gpu_text(int code)
{
    return code == KV_GPU_ENOMEM ? "out of memory" : code == FAKE_LOST ? "the fake device is lost" : "error";
}
bool kv_cuda_device(char *name, size_t n)
{
    if (n) snprintf(name, n, "fake");
    return fake.devices > 0;
}
int kv_gpu_count(void)
{
    return fake.devices;
}
int kv_gpu_select(int device)
{
    int g = fake_call();
    if (!g) fake.at = device;
    return g;
}
int kv_gpu_memory(size_t *available, size_t *total)
{
    *total = fake.limit, *available = fake.limit - fake.held[fake.at];
    return 0;
}
int kv_gpu_alloc(size_t n, void **p)
{
    int g = fake_call();
    *p = NULL;
    if (g) return g;
    if (fake.limit && fake.held[fake.at] + n > fake.limit) return KV_GPU_ENOMEM;
    *p = fake_alloc(n, fake.at);
    return 0;
}
void kv_gpu_free(void *p)
{
    fake_free(p);
}
void *kv_gpu_host_alloc(size_t n)
{
    return fake_call() ? NULL : fake_alloc(n, -1);
}
void kv_gpu_host_free(void *p)
{
    fake_free(p);
}
int kv_gpu_stream_open(bool urgent, kv_gpu_stream *s)
{
    (void)urgent;
    int g = fake_call();
    *s = NULL;
    if (g) return g;
    *s = malloc(sizeof **s);
    (*s)->device = fake.at, fake.live++;
    return 0;
}
void kv_gpu_stream_close(kv_gpu_stream s)
{
    if (s) fake.live--;
    free(s);
}
int kv_gpu_stream_sync(kv_gpu_stream s)
{
    (void)s;
    return fake_call();
}
int kv_gpu_stream_wait(kv_gpu_stream s, kv_gpu_event e)
{
    (void)s, (void)e;
    return fake_call();
}
int kv_gpu_event_open(kv_gpu_event *e)
{
    int g = fake_call();
    *e = NULL;
    if (g) return g;
    *e = calloc(1, sizeof **e);
    fake.live++;
    return 0;
}
void kv_gpu_event_close(kv_gpu_event e)
{
    if (e) fake.live--;
    free(e);
}
int kv_gpu_event_record(kv_gpu_event e, kv_gpu_stream s)
{
    struct timespec t;
    (void)s;
    clock_gettime(CLOCK_MONOTONIC, &t);
    e->at = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    return fake_call();
}
int kv_gpu_event_sync(kv_gpu_event e)
{
    (void)e;
    return fake_call();
}
int kv_gpu_event_seconds(kv_gpu_event a, kv_gpu_event b, double *s)
{
    *s = b->at - a->at;
    return fake_call();
}
int kv_gpu_copy(void *to, const void *from, size_t n, kv_gpu_stream s)
{
    int g = fake_call();
    fake_touch(to, s->device), fake_touch(from, s->device);
    if (!g) memcpy(to, from, n);
    return g;
}
int kv_gpu_copy_peer(void *to, int to_device, const void *from, int from_device, size_t n, kv_gpu_stream s)
{
    int g = fake_call();
    (void)s;
    fake_touch(to, to_device), fake_touch(from, from_device);
    if (!g) memcpy(to, from, n);
    return g;
}
int kv_gpu_zero(void *p, size_t n, kv_gpu_stream s)
{
    int g = fake_call();
    fake_touch(p, s->device);
    if (!g) memset(p, 0, n);
    return g;
}
int kv_gpu_blas_open(kv_gpu_stream s, kv_gpu_blas **out)
{
    int g = fake_call();
    *out = NULL;
    if (g) return g;
    *out = malloc(sizeof **out);
    (*out)->device = s->device, fake.live++;
    return 0;
}
void kv_gpu_blas_close(kv_gpu_blas *b)
{
    if (b) fake.live--;
    free(b);
}
size_t kv_gpu_blas_bytes(void)
{
    return 0;
}
int kv_gpu_matmul(kv_gpu_blas *b, size_t m, size_t n, size_t k, int bits, float alpha, const void *a, size_t ld_a,
                  const void *w, int c_bits, void *c, size_t ld_c, bool add)
{
    int g = fake_call();
    fake_touch(a, b->device), fake_touch(w, b->device), fake_touch(c, b->device);
    float *x = malloc((m + n) * k * sizeof *x), *y = malloc(m * n * sizeof *y);
    for (size_t r = 0; r < m; r++)
        for (size_t i = 0; i < k; i++) x[r * k + i] = fake_get(a, r * ld_a + i, bits);
    for (size_t i = 0; i < n * k; i++) x[m * k + i] = fake_get(w, i, bits);
    kv_matmul(m, n, k, x, x + m * k, y, n, 1);
    for (size_t r = 0; r < m && !g; r++)
        for (size_t j = 0; j < n; j++)
            fake_put(c, r * ld_c + j, c_bits, alpha * y[r * n + j] + (add ? fake_get(c, r * ld_c + j, c_bits) : 0));
    free(x), free(y);
    return g;
}
int kv_planes_dev(size_t n_head, size_t n, const void *src, int src_bits, size_t src_head, uint8_t *dst, int bits,
                  bool split, kv_gpu_stream s)
{
    fake_touch(src, s->device), fake_touch(dst, s->device);
    float *f = malloc((n_head * n + 1) * sizeof *f);
    for (size_t h = 0; h < n_head; h++)
        for (size_t i = 0; i < n; i++) {
            size_t at = h * src_head + i;
            f[h * n + i] = src_bits == 64 ? (float)((const double *)src)[at] : fake_get(src, at, src_bits);
        }
    kv_planes_ref(n_head, n, f, n, dst, bits, split);
    free(f);
    return fake_call();
}
int kv_nll_dev(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, float *nll, kv_gpu_stream s)
{
    fake_touch(logits, s->device), fake_touch(target, s->device), fake_touch(nll, s->device);
    kv_nll_ref(n_row, n_vocab, logits, target, nll);
    return fake_call();
}
int kv_finite_dev(size_t n, const float *x, uint32_t *flag, kv_gpu_stream s)
{
    fake_touch(x, s->device);
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i])) *flag = 1;
    return fake_call();
}
int kv_map_dev(const kv_gpu_map *m, const void *q, const void *k, const float *lse, void *p, kv_gpu_stream s)
{
    size_t heads = m->head_first + m->n_head, kv = (heads - 1) / m->group + 1,
           n = (size_t)m->n_head * m->n_row * m->width;
    fake_touch(q, s->device), fake_touch(k, s->device), fake_touch(p, s->device);
    float *fq = fake_rows(q, 0, heads, m->q_head, m->n_row * (size_t)m->d, m->bits);
    float *fk = fake_rows(k, 0, kv, m->kv_head, m->width * (size_t)m->d, m->bits), *fp = malloc(n * sizeof *fp);
    kv_gpu_map own = *m;
    own.q_head = m->n_row * (size_t)m->d, own.kv_head = m->width * (size_t)m->d;
    kv_map_ref(&own, fq, fk, lse, fp);
    for (size_t i = 0; i < n; i++) fake_put(p, i, 16, fp[i]);
    free(fq), free(fk), free(fp);
    return fake_call();
}
int kv_expand_dev(uint32_t type, size_t n_row, size_t n_col, const void *src, void *dst, int bits, uint64_t first,
                  uint64_t *found, kv_gpu_stream s)
{
    const kv_quant *q = kv_quant_find(type);
    size_t n = n_row * n_col;
    float *f = malloc((n + 1) * sizeof *f);
    fake_touch(src, s->device), fake_touch(dst, s->device), fake_touch(found, s->device);
    q->expand(src, n / q->block, f);
    for (size_t i = 0; i < n; i++) {
        uint32_t lost = fake_put(dst, i, bits, f[i]);
        uint64_t at = first + i / n_col;
        if (!isfinite(f[i]) && at < found[0]) found[0] = at;
        if (lost && at < found[1]) found[1] = at;
    }
    free(f);
    return fake_call();
}
int kv_random_dev(uint64_t seed, uint64_t first, size_t n, float scale, void *out, int bits, kv_gpu_stream s)
{
    fake_touch(out, s->device);
    for (size_t i = 0; i < n; i++) fake_put(out, i, bits, kv_random_weight(seed, first + i, scale));
    return fake_call();
}
int kv_router_dev(size_t n_row, size_t n_expert, size_t used, bool norm, float *weight, kv_gpu_stream s)
{
    fake_touch(weight, s->device);
    kv_router_ref(n_row, n_expert, used, norm, weight);
    return fake_call();
}
int kv_add_weighted_dev(size_t n_row, size_t n, float *x, const float *y, const float *weight, size_t ld_w,
                        kv_gpu_stream s)
{
    fake_touch(x, s->device), fake_touch(y, s->device), fake_touch(weight, s->device);
    for (size_t i = 0; i < n_row * n; i++) x[i] += weight[i / n * ld_w] * y[i];
    return fake_call();
}

/* ------------------------------------------------------------------------------------------------ cuda.h */
static kv_attn_shape fake_shape(const kv_cuda_attn *a)
{
    return (kv_attn_shape){a->n_row, a->n_key, a->d, a->row0, a->window, a->scale, a->softcap};
}
int kv_attention_dev(const kv_cuda_attn *a, const void *q, const void *k, const void *v, void *out, float *lse,
                     float *stat, struct CUstream_st *stream)
{
    kv_attn_shape s = fake_shape(a);
    fake_touch(q, stream->device), fake_touch(k, stream->device), fake_touch(out, stream->device);
    for (size_t h = 0; h < a->n_q_head; h++) {
        size_t kv = h / (a->n_q_head / a->n_kv_head) * a->kv_head;
        float *fq = fake_rows(q, h * a->q_head, a->n_row, a->q_row, a->d, a->bits);
        float *fk = fake_rows(k, kv, a->n_key, a->kv_token, a->d, a->bits);
        float *fv = fake_rows(v, kv, a->n_key, a->kv_token, a->d, a->bits);
        float *fo = malloc(a->n_row * a->d * sizeof *fo);
        kv_attention_ref(&s, fq, fk, fv, fo, a->d, lse + h * a->lse_head, stat ? stat + 4 * h * a->lse_head : NULL);
        for (size_t r = 0; r < a->n_row; r++)
            for (size_t c = 0; c < a->d; c++)
                fake_put(out, r * a->out_row + h * a->out_head + c, a->out_bits, fo[r * a->d + c]);
        free(fq), free(fk), free(fv), free(fo);
    }
    return fake_call();
}
int kv_attention_branches_dev(const kv_cuda_attn *a, const kv_cuda_branches *b, const void *q, const void *k,
                              const void *v, void *out, float *lse, struct CUstream_st *stream)
{
    size_t rows = (size_t)b->n_branch * a->n_row, Hq = a->n_q_head, Hk = a->n_kv_head, own = rows * a->d;
    fake_touch(q, stream->device), fake_touch(k, stream->device), fake_touch(b->own_k, stream->device);
    fake_touch(b->list, stream->device), fake_touch(b->first, stream->device), fake_touch(out, stream->device);
    kv_cuda_attn f = *a;
    kv_cuda_branches g = *b;
    f.q_row = a->d, f.q_head = own, f.kv_token = a->d, f.kv_head = a->n_key * (size_t)a->d;
    f.out_head = a->d, f.out_row = Hq * a->d;
    float *x[5], *fo = malloc((rows * f.out_row + 1) * sizeof *fo);
    for (int i = 0; i < 5; i++) { /* q, k, v, own keys, own values */
        const void *from = i == 0 ? q : i == 1 ? k : i == 2 ? v : i == 3 ? b->own_k : b->own_v;
        size_t heads = i ? Hk : Hq, n = i == 1 || i == 2 ? a->n_key : rows;
        size_t head = i == 0 ? a->q_head : i < 3 ? a->kv_head : b->own_head, step = i == 0 ? a->q_row : a->d;
        x[i] = malloc((heads * n * a->d + 1) * sizeof *x[i]);
        for (size_t h = 0; h < heads; h++) {
            float *one = fake_rows(from, h * head, n, step, a->d, a->bits);
            memcpy(x[i] + h * n * a->d, one, n * a->d * sizeof *one);
            free(one);
        }
    }
    g.own_k = x[3], g.own_v = x[4], g.own_head = own;
    kv_attention_branches_ref(&f, &g, x[0], x[1], x[2], fo, lse);
    for (size_t r = 0; r < rows; r++)
        for (size_t h = 0; h < Hq; h++)
            for (size_t c = 0; c < a->d; c++)
                fake_put(out, r * a->out_row + h * a->out_head + c, a->out_bits, fo[r * f.out_row + h * a->d + c]);
    for (int i = 0; i < 5; i++) free(x[i]);
    free(fo);
    return fake_call();
}
int kv_logit_rows_dev(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, kv_logit_row *out,
                      struct CUstream_st *stream)
{
    fake_touch(logits, stream->device), fake_touch(target, stream->device), fake_touch(out, stream->device);
    kv_logit_rows_ref(n_row, n_vocab, logits, target, out);
    return fake_call();
}
int kv_logit_compare_dev(size_t n_row, size_t n_vocab, const float *logits, size_t first, size_t n_base,
                         const float *base, const kv_logit_row *said, const uint32_t *target, float *out,
                         struct CUstream_st *stream)
{
    fake_touch(logits, stream->device), fake_touch(base, stream->device), fake_touch(out, stream->device);
    kv_logit_compare_ref(n_row, n_vocab, logits, first, n_base, base, said, target, out);
    return fake_call();
}
int kv_row_distance_dev(size_t n_row, size_t n_base, size_t n_unit, size_t width, int bits, const void *base,
                        const void *x, float *out, struct CUstream_st *stream)
{
    size_t n = n_unit * width;
    fake_touch(base, stream->device), fake_touch(x, stream->device), fake_touch(out, stream->device);
    float *b = fake_rows(base, 0, n_base < n_row ? n_base : n_row, n, n, bits), *y = fake_rows(x, 0, n_row, n, n, bits);
    kv_row_distance_ref(n_row, n_base, n_unit, width, b, y, out);
    free(b), free(y);
    return fake_call();
}
int kv_colsum_dev(const kv_cuda_attn *a, const void *q, const void *k, const float *lse, double *acc, size_t acc_head,
                  struct CUstream_st *stream)
{
    kv_attn_shape s = fake_shape(a);
    fake_touch(q, stream->device), fake_touch(acc, stream->device);
    for (size_t h = 0; h < a->n_q_head; h++) {
        size_t kv = h / (a->n_q_head / a->n_kv_head) * a->kv_head;
        float *fq = fake_rows(q, h * a->q_head, a->n_row, a->q_row, a->d, a->bits);
        float *fk = fake_rows(k, kv, a->n_key, a->kv_token, a->d, a->bits);
        kv_colsum_ref(&s, fq, fk, lse + h * a->lse_head, acc + h * acc_head);
        free(fq), free(fk);
    }
    return fake_call();
}
size_t kv_decode_scratch(const kv_cuda_attn *a)
{
    return a->scale > 0 && a->n_key ? 64 : 0; /* as the real one: nothing for a shape that it refuses */
}
int kv_decode_dev(const kv_cuda_attn *a, const void *q, const void *k, const void *v, void *out, float *lse,
                  float *stat, void *scratch, struct CUstream_st *stream)
{
    fake_touch(scratch, stream->device);
    return kv_attention_dev(a, q, k, v, out, lse, stat, stream);
}
int kv_embed_dev(size_t n_row, size_t n, uint32_t n_vocab, const uint32_t *token, const void *table, int bits,
                 float scale, float *x, struct CUstream_st *stream)
{
    (void)n_vocab;
    fake_touch(token, stream->device), fake_touch(table, stream->device), fake_touch(x, stream->device);
    for (size_t r = 0; r < n_row; r++)
        for (size_t i = 0; i < n; i++) x[r * n + i] = fake_get(table, token[r] * n + i, bits) * scale;
    return fake_call();
}
int kv_rmsnorm_dev(size_t n_row, size_t n, const float *x, size_t ld_x, const float *w, float w_add, float eps, void *y,
                   int bits, size_t ld_y, struct CUstream_st *stream)
{
    fake_touch(x, stream->device), fake_touch(w, stream->device), fake_touch(y, stream->device);
    for (size_t r = 0; r < n_row; r++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += (double)x[r * ld_x + i] * (double)x[r * ld_x + i];
        float f = (float)(1 / sqrt(sum / (double)n + (double)eps));
        for (size_t i = 0; i < n; i++) fake_put(y, r * ld_y + i, bits, x[r * ld_x + i] * f * (w[i] + w_add));
    }
    return fake_call();
}
int kv_layernorm_dev(size_t n_row, size_t n, const float *x, size_t ld_x, const float *w, const float *b, float eps,
                     void *y, int bits, size_t ld_y, struct CUstream_st *stream)
{
    fake_touch(x, stream->device);
    for (size_t r = 0; r < n_row; r++) {
        double mean = 0, sum = 0;
        for (size_t i = 0; i < n; i++) mean += (double)x[r * ld_x + i] / (double)n;
        for (size_t i = 0; i < n; i++) sum += pow((double)x[r * ld_x + i] - mean, 2);
        double f = 1 / sqrt(sum / (double)n + (double)eps);
        for (size_t i = 0; i < n; i++)
            fake_put(y, r * ld_y + i, bits, (float)(((double)x[r * ld_x + i] - mean) * f) * w[i] + (b ? b[i] : 0));
    }
    return fake_call();
}
int kv_rope_table_dev(size_t n_row, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *table,
                      struct CUstream_st *stream)
{
    fake_touch(table, stream->device), fake_touch(inv_freq, stream->device);
    for (size_t r = 0; r < n_row; r++)
        for (size_t i = 0; i < rot / 2; i++) {
            double t = (double)(pos0 + r) * (double)inv_freq[i];
            table[r * rot + i] = (float)cos(t) * mscale, table[r * rot + rot / 2 + i] = (float)sin(t) * mscale;
        }
    return fake_call();
}
int kv_heads_dev(size_t n_row, size_t n_head, size_t d, const void *proj, int in_bits, size_t ld_proj,
                 const float *bias, const float *norm_w, float w_add, float eps, const float *table, size_t rot,
                 void *out, int bits, size_t out_head, uint32_t *over, struct CUstream_st *stream)
{
    float t[1024];
    fake_touch(proj, stream->device), fake_touch(out, stream->device), fake_touch(table, stream->device);
    for (size_t r = 0; r < n_row; r++)
        for (size_t h = 0; h < n_head; h++) {
            double sum = 0;
            for (size_t i = 0; i < d; i++) {
                t[i] = fake_get(proj, r * ld_proj + h * d + i, in_bits) + (bias ? bias[h * d + i] : 0);
                sum += (double)t[i] * (double)t[i];
            }
            float f = (float)(1 / sqrt(sum / (double)d + (double)eps));
            for (size_t i = 0; i < d && norm_w; i++) t[i] = t[i] * f * (norm_w[i] + w_add);
            for (size_t i = 0; i < rot / 2 && table; i++) {
                float a = t[i], b = t[i + rot / 2], c = table[r * rot + i], s = table[r * rot + rot / 2 + i];
                t[i] = a * c - b * s, t[i + rot / 2] = b * c + a * s;
            }
            for (size_t i = 0; i < d; i++) {
                uint32_t lost = fake_put(out, h * out_head + r * d + i, bits, t[i]);
                if (over) over[h] += lost;
            }
        }
    return fake_call();
}
int kv_gate_dev(size_t n_row, size_t n, int act, const void *gate, const void *up, int in_bits, size_t ld_in,
                const float *gate_bias, void *out, int bits, struct CUstream_st *stream)
{
    fake_touch(gate, stream->device), fake_touch(out, stream->device);
    for (size_t r = 0; r < n_row; r++)
        for (size_t i = 0; i < n; i++) {
            float g = fake_get(gate, r * ld_in + i, in_bits) + (gate_bias ? gate_bias[i] : 0), y;
            float u = up ? fake_get(up, r * ld_in + i, in_bits) : 1;
            kv_gate_ref(1, act, &g, &u, &y);
            fake_put(out, r * n + i, bits, y);
        }
    return fake_call();
}
int kv_add_dev(size_t n_row, size_t n, float *x, const void *y, int in_bits, size_t ld_y, const float *bias,
               struct CUstream_st *stream)
{
    fake_touch(x, stream->device), fake_touch(y, stream->device);
    for (size_t r = 0; r < n_row; r++)
        for (size_t i = 0; i < n; i++)
            x[r * n + i] += (y ? fake_get(y, r * ld_y + i, in_bits) : 0) + (bias ? bias[i] : 0);
    return fake_call();
}
int kv_length_dev(size_t n_row, size_t n, const float *x, float *norm, struct CUstream_st *stream)
{
    fake_touch(x, stream->device), fake_touch(norm, stream->device);
    for (size_t r = 0; r < n_row; r++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += (double)x[r * n + i] * (double)x[r * n + i];
        norm[r] = (float)sqrt(sum);
    }
    return fake_call();
}
int kv_cast_dev(size_t n, const float *src, void *dst, int bits, uint32_t *over, struct CUstream_st *stream)
{
    fake_touch(src, stream->device), fake_touch(dst, stream->device);
    for (size_t i = 0; i < n; i++) {
        uint32_t lost = fake_put(dst, i, bits, src[i]);
        if (over) *over += lost;
    }
    return fake_call();
}
int kv_softcap_dev(size_t n, float *x, float cap, struct CUstream_st *stream)
{
    fake_touch(x, stream->device);
    for (size_t i = 0; i < n; i++) x[i] = cap * tanhf(x[i] / cap);
    return fake_call();
}

#endif
