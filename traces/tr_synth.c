/* tr_synth.c - kv-trace synth: a made-up trace whose attention has the habits of real heads - a sink at the first
 * token, a pull towards recent ones, a few topics that come and go - so that policies differ on it. Seeded; additions,
 * multiplications and one square root only, so that every machine makes the same bytes. */
#include "traces/tr.h"

#include <math.h>
#include <stdlib.h>

enum { RANK = 8 }; /* topics */

typedef struct {
    uint32_t layers, q_heads, kv_heads, d, n;
    float *topic; /* [n][RANK]: what each token is about */
} world;

/* Cheap noise of variance one, rectangular. */
static float noise(kv_rng *r)
{
    return (float)((kv_rng_unit(r) - 0.5) * 3.4641016151377544);
}

/* Topics drift slowly and now and then jump: neighbours are alike, and old ones come back. */
static kv_status make_world(world *w, kv_rng *r, kv_error *err)
{
    double z[RANK] = {0};
    kv_status st = kv_array(&w->topic, (size_t)w->n * RANK, sizeof *w->topic, err);
    if (st) return st;
    for (uint32_t t = 0; t < w->n; t++) {
        uint32_t jump = kv_rng_unit(r) < 0.03 ? (uint32_t)(kv_rng_unit(r) * RANK) : RANK;
        for (uint32_t k = 0; k < RANK; k++) {
            z[k] = 0.93 * z[k] + 0.25 * kv_rng_normal(r);
            if (k == jump) z[k] += 2.5;
            w->topic[(size_t)t * RANK + k] = (float)(z[k] + 0.5 * kv_rng_normal(r));
        }
    }
    return KV_OK;
}

/* out[t] = topics through a random basis + noise; axis 0 carries the sink, axis 1 the position. */
static void make_vectors(const world *w, kv_rng *r, const float *basis, float gain, bool key, float sink, float recent,
                         float *out)
{
    for (uint32_t t = 0; t < w->n; t++) {
        const float *z = w->topic + (size_t)t * RANK;
        float *v = out + (size_t)t * w->d;
        for (uint32_t c = 0; c < w->d; c++) {
            float s = 0.5f * noise(r);
            for (uint32_t k = 0; k < RANK; k++) s += gain * z[k] * basis[c * RANK + k];
            v[c] = s;
        }
        if (w->d < 2) continue;
        v[0] = key ? (t == 0 ? sink : 0.0f) : sink;
        v[1] = key ? recent * (float)t / (float)w->n : recent;
    }
}

static void random_basis(kv_rng *r, uint32_t d, float *basis)
{
    for (uint32_t i = 0; i < d * RANK; i++) basis[i] = noise(r);
}

static kv_status put(kv_trace_writer *w, kv_stream s, uint32_t layer, uint32_t heads, uint32_t rows, uint32_t width,
                     const float *v, kv_error *err)
{
    kv_chunk c = {.stream = s, .layer = layer, .head_count = heads, .token_count = rows, .width = width};
    c.dtype = KV_F16;
    return kv_trace_put_f32(w, &c, v, err);
}

static kv_status write_layer(const world *w, kv_trace_writer *out, uint32_t layer, kv_rng *r, kv_error *err)
{
    uint32_t g = w->q_heads / w->kv_heads, hidden = w->q_heads * w->d;
    size_t head = (size_t)w->n * w->d;
    float *q = NULL, *k = NULL, *v = NULL, *wo = NULL, *basis = NULL;
    kv_status st = KV_OK;
    if ((st = kv_array(&q, head * w->q_heads, sizeof *q, err)) ||
        (st = kv_array(&k, head * w->kv_heads, sizeof *k, err)) ||
        (st = kv_array(&v, head * w->kv_heads, sizeof *v, err)) ||
        (st = kv_array(&wo, (size_t)hidden * hidden, sizeof *wo, err)) ||
        (st = kv_array(&basis, (size_t)w->d * RANK, sizeof *basis, err)))
        goto out;
    float root = sqrtf(sqrtf((float)w->d)); /* q.k / sqrt(d) then has the same spread for every d */
    for (uint32_t h = 0; h < w->kv_heads; h++) {
        /* Heads differ: some look for topics, some at the sink, some at what is near. */
        float gain = (0.6f + 0.7f * (float)kv_rng_unit(r)) / root;
        float sink = root * (2.4f + 1.0f * (float)kv_rng_unit(r)), recent = root * 3.5f * (float)kv_rng_unit(r);
        random_basis(r, w->d, basis);
        make_vectors(w, r, basis, gain, true, sink, recent, k + h * head);
        for (uint32_t i = 0; i < g; i++) make_vectors(w, r, basis, gain, false, sink, recent, q + (h * g + i) * head);
        random_basis(r, w->d, basis);
        make_vectors(w, r, basis, 0.4f, true, 0.1f, 0, v + h * head);
    }
    float scale = 1 / sqrtf((float)hidden);
    for (size_t i = 0; i < (size_t)hidden * hidden; i++) wo[i] = noise(r) * scale;
    if ((st = put(out, KV_S_Q, layer, w->q_heads, w->n, w->d, q, err)) ||
        (st = put(out, KV_S_K, layer, w->kv_heads, w->n, w->d, k, err)) ||
        (st = put(out, KV_S_V, layer, w->kv_heads, w->n, w->d, v, err)))
        goto out;
    st = put(out, KV_S_WO, layer, 1, hidden, hidden, wo, err);
out:
    free(q), free(k), free(v), free(wo), free(basis);
    return st;
}

/* Token ids, and a text of made-up words so that views of the text have something to show. */
static kv_status write_text(const world *w, kv_trace_writer *out, kv_rng *r, kv_error *err)
{
    static const char syllable[16][3] = {"ka", "ro", "mi", "te", "lu", "no", "sa", "vi",
                                         "do", "ze", "pa", "ri", "mo", "ne", "tu", "la"};
    uint32_t *ids = NULL, *offset = NULL, at = 0;
    char *text = NULL;
    kv_chunk c = {.stream = KV_S_TOKENS, .head_count = 1, .token_count = w->n, .width = 1, .dtype = KV_U32};
    kv_status st;
    if ((st = kv_array(&ids, w->n, sizeof *ids, err)) ||
        (st = kv_array(&offset, (size_t)w->n + 1, sizeof *offset, err)) || (st = kv_array(&text, w->n, 8, err)))
        goto out;
    for (uint32_t t = 0; t < w->n; t++) {
        ids[t] = (uint32_t)(kv_rng_next(r) % 4096);
        offset[t] = at;
        if (t) text[at++] = ' ';
        for (uint32_t k = 0, id = ids[t]; k < 3; k++, id /= 16) memcpy(text + at, syllable[id % 16], 2), at += 2;
    }
    offset[w->n] = at;
    if ((st = kv_trace_put(out, &c, ids, err)) || (st = kv_trace_put_bytes(out, KV_S_TEXT, text, at, err))) goto out;
    c.stream = KV_S_OFFSETS, c.token_count = w->n + 1;
    st = kv_trace_put(out, &c, offset, err);
out:
    free(ids), free(offset), free(text);
    return st;
}

static kv_status run(int argc, char **argv, int *code, kv_error *err)
{
    world w = {.layers = 4, .q_heads = 8, .kv_heads = 2, .d = 64, .n = 512};
    uint32_t n_prompt = 0;
    uint64_t seed = 1;
    const char *path = NULL;
    kv_list rest = {0};
    const kv_opt opts[] = {{"layers", 0, KV_OPT_U32, &w.layers},
                           {"q-heads", 0, KV_OPT_U32, &w.q_heads},
                           {"kv-heads", 0, KV_OPT_U32, &w.kv_heads},
                           {"head-dim", 0, KV_OPT_U32, &w.d},
                           {"tokens", 0, KV_OPT_U32, &w.n},
                           {"prompt-tokens", 0, KV_OPT_U32, &n_prompt},
                           {"seed", 0, KV_OPT_U64, &seed},
                           {"output", 'o', KV_OPT_STR, &path},
                           {0}};
    kv_trace_info in = {0};
    kv_trace_writer *out = NULL;
    kv_rng r;
    kv_status st = tr_parse(argc, argv, opts, &rest, 0, 0, err);
    (void)code;
    if (st) goto out;
    if (!n_prompt) n_prompt = w.n - w.n / 8;
    const char *bad = !path                                    ? "-o OUT.kvt is missing"
                      : !w.layers || w.layers > KV_LAYERS_MAX  ? "--layers: 1 to 1024"
                      : !w.q_heads || w.q_heads > KV_HEADS_MAX ? "--q-heads: 1 to 1024"
                      : !w.kv_heads || w.q_heads % w.kv_heads  ? "--kv-heads must divide --q-heads"
                      : !w.d || w.d > KV_HEAD_DIM_MAX          ? "--head-dim: 1 to 1024"
                      : (uint64_t)w.q_heads * w.d > 16384      ? "--q-heads times --head-dim: at most 16384"
                      : !w.n || w.n > 1u << 20                 ? "--tokens: 1 to 1048576"
                      : n_prompt > w.n                         ? "--prompt-tokens: at most --tokens"
                                                               : NULL;
    if (bad) {
        st = kv_fail(err, KV_EMISUSE, "%s", bad);
        goto out;
    }
    r.s = seed;
    if ((st = tr_new_info(&in, "synth", w.layers, w.q_heads, w.kv_heads, w.d, w.n, err))) goto out;
    in.n_prompt = n_prompt, in.dtype = KV_F16;
    if (!(in.prompt_id = kv_format("synth-%llu", (unsigned long long)seed)) ||
        !(in.category = kv_format("synthetic"))) {
        st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    if ((st = make_world(&w, &r, err)) || (st = kv_trace_create(path, &in, NULL, tr_threads(), &out, err)) ||
        (st = write_text(&w, out, &r, err)))
        goto out;
    kv_progress *bar = kv_progress_start("making", w.layers, "layers");
    for (uint32_t l = 0; l < w.layers && !st; l++) {
        st = write_layer(&w, out, l, &r, err);
        kv_progress_step(bar, l + 1, NULL);
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    kv_progress_end(bar);
    if (st) goto out;
    st = kv_trace_finish(out, err);
    out = NULL;
out:
    kvt_discard(out);
    kv_trace_info_free(&in);
    free(w.topic);
    kv_list_free(&rest);
    return st;
}

const tr_command tr_synth = {
    "synth", "a made-up trace, for trying things without a model",
    "usage: kv-trace synth [options] -o OUT.kvt\n\n"
    "Q, K, V and W_O with a sink, recency and recurring topics; equal options give equal bytes on every machine.\n"
    "  --layers N        4            --tokens N         512\n"
    "  --q-heads N       8            --prompt-tokens N  seven eighths of the tokens\n"
    "  --kv-heads N      2            --seed N           1\n"
    "  --head-dim N      64\n\n"
    "  kv-trace synth -o s.kvt\n"
    "  kv-trace synth --layers 2 --tokens 2048 --prompt-tokens 1024 --seed 7 -o long.kvt\n",
    run};
