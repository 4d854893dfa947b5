/* synthetic.c - models with weights at random (synthetic.h). */
#include "capture/synthetic.h"

#include <math.h>
#include <stdlib.h>

#include "capture/arch.h"
#include "kernels/parallel.h"
#include "kernels/random.h"
#include "traces/cli.h"

#define PREFIX "synthetic:"

typedef struct {
    const char *name, *arch;
    uint32_t n_layer, n_q_head, n_kv_head, head_dim, hidden, ffn, n_vocab, n_ctx;
    double theta, factor; /* factor > 1: Llama 3's frequency scaling, from 8192 tokens */
    bool tied, qkv_bias;
} shape;

static const shape shapes[] = {
    {"tiny", "llama", 4, 8, 2, 32, 256, 512, 1024, 8192, 1e4, 1, false, false},
    {"tiny-qwen", "qwen2", 3, 6, 1, 32, 192, 384, 1000, 8192, 1e6, 1, true, true},
    {"smol-135m", "llama", 30, 9, 3, 64, 576, 1536, 49152, 8192, 1e5, 1, true, false},
    {"qwen-0.5b", "qwen2", 24, 14, 2, 64, 896, 4864, 151936, 32768, 1e6, 1, true, true},
    {"llama-1b", "llama", 16, 32, 8, 64, 2048, 8192, 128256, 131072, 5e5, 32, true, false},
    {"llama-8b", "llama", 32, 32, 8, 128, 4096, 14336, 128256, 131072, 5e5, 8, false, false},
};
#define N_SHAPES (sizeof shapes / sizeof *shapes)

bool kv_synthetic_named(const char *path)
{
    return !strncmp(path, PREFIX, strlen(PREFIX));
}

/* ------------------------------------------------------------------------------------------------ weights */
/* One array of the arena that is to be filled. */
typedef struct {
    float *to;
    uint64_t seed, first;
    size_t n;
    float base, scale;
} piece;

typedef struct {
    kv_model *m;
    uint64_t seed;
    uint32_t number; /* of the next tensor */
    kv_weights weights;
    size_t n_float; /* of the arena so far */
    bool filling;   /* second pass: the arena is there */
    piece *part;
    size_t n_part;
} builder;

enum { PART = 1 << 18 };

static float *reserve(builder *b, size_t n, uint64_t seed, float base, float scale)
{
    float *p = b->filling ? b->m->arena + b->n_float : NULL;
    b->n_float += (n + 15) & ~(size_t)15;
    for (size_t i = 0; i < n; i += PART, b->n_part++)
        if (b->filling) b->part[b->n_part] = (piece){p + i, seed, i, n - i < PART ? n - i : PART, base, scale};
    return p;
}

static uint64_t next_seed(builder *b)
{
    kv_rng r = {b->seed * 1000003u + b->number++};
    return kv_rng_next(&r);
}

static void matrix(builder *b, kv_tensor *t, size_t rows, size_t cols, double scale)
{
    uint64_t seed = next_seed(b);
    *t = (kv_tensor){.rows = (uint32_t)rows, .cols = (uint32_t)cols, .random = (float)scale, .seed = seed};
    if (b->weights == KV_WEIGHTS_F32) t->f32 = reserve(b, rows * cols, seed, 0, t->random);
    if (!b->filling) b->m->desc.n_params += rows * cols;
}

static void vector(builder *b, float **v, size_t n, float base, float scale)
{
    uint64_t seed = next_seed(b);
    if (b->weights != KV_WEIGHTS_NONE) *v = reserve(b, n, seed, base, scale);
    if (!b->filling) b->m->desc.n_params += n;
}

/* Every product keeps the size of what it is given, but for Q and K, which make scores of deviation `sharp` squared. */
static void all_weights(builder *b, const shape *s)
{
    const double sharp = 1.95, unit = 1 / sqrt((double)s->hidden);
    size_t nq = (size_t)s->n_q_head * s->head_dim, nk = (size_t)s->n_kv_head * s->head_dim, h = s->hidden;
    b->number = 0, b->n_float = 0, b->n_part = 0;
    matrix(b, &b->m->tok_embd, s->n_vocab, h, s->tied ? 2 * unit : 1);
    vector(b, &b->m->out_norm.w, h, 1, 0.1f);
    b->m->output = b->m->tok_embd;
    if (!s->tied) matrix(b, &b->m->output, s->n_vocab, h, 2 * unit);
    for (uint32_t l = 0; l < s->n_layer; l++) {
        kv_layer_weights *w = &b->m->layer[l];
        w->ffn = b->m->ffns + l;
        vector(b, &w->attn_norm.w, h, 1, 0.1f);
        matrix(b, &w->wq, nq, h, sharp * unit);
        matrix(b, &w->wk, nk, h, sharp * unit);
        matrix(b, &w->wv, nk, h, unit);
        if (s->qkv_bias) {
            vector(b, &w->bq, nq, 0, 0.3f);
            vector(b, &w->bk, nk, 0, 0.3f);
            vector(b, &w->bv, nk, 0, 0.3f);
        }
        matrix(b, &w->wo, h, nq, 1 / sqrt((double)nq));
        vector(b, &w->ffn_norm.w, h, 1, 0.1f);
        matrix(b, &w->ffn->gate, s->ffn, h, unit);
        matrix(b, &w->ffn->up, s->ffn, h, unit);
        matrix(b, &w->ffn->down, h, s->ffn, 1 / sqrt((double)s->ffn));
    }
}

static void fill_piece(void *ctx, size_t i)
{
    const piece *p = (const piece *)ctx + i;
    for (size_t k = 0; k < p->n; k++) p->to[k] = p->base + kv_random_weight(p->seed, p->first + k, p->scale);
}

static kv_status make_weights(builder *b, const shape *s, uint32_t threads, kv_error *err)
{
    kv_model *m = b->m;
    kv_status st;
    if ((st = kv_array(&m->layer, s->n_layer, sizeof *m->layer, err)) ||
        (st = kv_array(&m->ffns, s->n_layer, sizeof *m->ffns, err)))
        return st;
    all_weights(b, s);
    if (b->weights == KV_WEIGHTS_NONE) return KV_OK;
    if (posix_memalign((void **)&m->arena, 64, b->n_float * sizeof(float))) m->arena = NULL;
    if (!m->arena)
        return kv_fail(err, KV_ENOMEM, "out of memory for %.1f GiB of weights of '%s'",
                       (double)b->n_float * sizeof(float) / 0x1p30, m->desc.name);
    if ((st = kv_array(&b->part, b->n_part, sizeof *b->part, err))) return st;
    b->filling = true;
    all_weights(b, s);
    kv_parallel(b->n_part, threads, fill_piece, b->part);
    free(b->part);
    return KV_OK;
}

void kv_synthetic_floats(const kv_tensor *t, uint32_t row, uint32_t n, float *dst)
{
    uint64_t first = (uint64_t)row * t->cols;
    for (size_t i = 0; i < (size_t)n * t->cols; i++) dst[i] = kv_random_weight(t->seed, first + i, t->random);
}

/* ------------------------------------------------------------------------------------------------ description */
static kv_status describe(kv_loader *l, const shape *s, uint64_t seed)
{
    kv_model_desc *d = &l->m->desc;
    kv_status st;

    kv_arch_begin(l, kv_arch_of_gguf(s->arch));
    d->n_layer = s->n_layer, d->n_q_head = s->n_q_head, d->n_kv_head = s->n_kv_head, d->head_dim = s->head_dim;
    d->hidden = s->hidden, d->ffn = s->ffn, d->n_vocab = s->n_vocab, d->n_ctx = s->n_ctx, d->norm_eps = 1e-5f;
    d->rope_dim = s->head_dim, d->scale = 1 / sqrtf((float)s->head_dim), d->tied = s->tied;
    free(d->arch), free(d->name), free(d->file), free(d->quant);
    d->arch = kv_format("%s", s->arch);
    d->name = kv_format(PREFIX "%s", s->name);
    d->file = kv_format(PREFIX "%s", s->name);
    d->quant = kv_format("BF16 at random, seed %llu", (unsigned long long)seed);
    if (!d->arch || !d->name || !d->file || !d->quant) return kv_fail(l->err, KV_ENOMEM, "out of memory");
    kv_rope_scaling r = {.kind = s->factor > 1 ? KV_ROPE_LLAMA3 : KV_ROPE_PLAIN, .theta = s->theta};
    r.factor = s->factor, r.mscale = 1, r.near_ctx = 8192, r.low = 1, r.high = 4;
    if ((st = kv_arch_windows(l, 0, 0)) || (st = kv_rope_make(l, &r, "synthetic"))) return st;
    if ((st = kv_arch_layer_ropes(l))) return st;
    snprintf(l->m->no_tok, sizeof l->m->no_tok, "weights at random come without a vocabulary");
    return KV_OK;
}

static kv_status find_shape(const char *path, const shape **out, uint64_t *seed, kv_error *err)
{
    const char *name = path + strlen(PREFIX), *colon = strchr(name, ':'), *names[N_SHAPES];
    size_t n = colon ? (size_t)(colon - name) : strlen(name);
    char known[256] = "", typed[64];

    *seed = 1;
    if (colon && !kv_parse_u64(colon + 1, seed))
        return kv_fail(err, KV_EMISUSE, "model '%s': '%s' is not a seed", path, colon + 1);
    for (size_t i = 0; i < N_SHAPES; i++) {
        if (strlen(shapes[i].name) == n && !memcmp(shapes[i].name, name, n)) return *out = &shapes[i], KV_OK;
        size_t at = strlen(known);
        snprintf(known + at, sizeof known - at, "%s%s", i ? ", " : "", shapes[i].name);
        names[i] = shapes[i].name;
    }
    snprintf(typed, sizeof typed, "%.*s", (int)(n < 63 ? n : 63), name);
    const char *near = kv_nearest(typed, names, N_SHAPES);
    return kv_fail(err, KV_EMISUSE, "model '%s': no such shape%s%s%s; known: %s", path, near ? " (did you mean '" : "",
                   near ? near : "", near ? "'?)" : "", known);
}

kv_status kv_synthetic_open(const char *path, kv_weights weights, uint32_t threads, kv_model **out, kv_error *err)
{
    kv_loader l = {.err = err};
    builder b = {.weights = weights};
    const shape *s = NULL;
    kv_status st = find_shape(path, &s, &b.seed, err);

    *out = NULL;
    if (st || (st = kv_array(&l.m, 1, sizeof *l.m, err))) return st;
    b.m = l.m;
    if (!(st = kv_store_create(path, &l.m->store, err)) && !(st = describe(&l, s, b.seed)))
        st = make_weights(&b, s, threads, err);
    if (st)
        kv_model_close(l.m);
    else
        *out = l.m;
    return st;
}

void kv_synthetic_hash(const kv_model *m, char sha256[65])
{
    const kv_model_desc *d = &m->desc;
    kv_sha256 s;
    kv_sha256_init(&s);
    kv_sha256_update(&s, "kvtrace synthetic 1", 20);
    kv_sha256_update(&s, d->name, strlen(d->name) + 1);
    kv_sha256_update(&s, d->quant, strlen(d->quant) + 1);
    kv_sha256_hex(&s, sha256);
}
