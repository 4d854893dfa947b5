/* test_capture.c - the engine against a forward pass in double, the recorder against what the hook saw. */
#include "tests/check.h"

#include <stdlib.h>
#include <unistd.h>

#include "capture/engine.h"
#include "capture/prompts.h"
#include "capture/record.h"
#include "capture/run.h"
#include "kernels/kernels.h"
#include "traces/trace.h"

enum { LAYERS = 2, HQ = 4, HK = 2, D = 8, HIDDEN = 24, FFN = 40, VOCAB = 90, ROT = 6, N_MAX = 600 };
enum { WIDE = HQ * D, NARROW = HK * D };

static char dir[] = "/tmp/kv_capture_XXXXXX";

static char *in_dir(const char *name)
{
    static char path[4][256];
    static unsigned turn;
    char *p = path[turn++ % 4];
    snprintf(p, 256, "%s/%s", dir, name);
    return p;
}

/* ------------------------------------------------------------------------------------------------ a random model */
static float *weights(kv_rng *r, size_t n, double size, double mean)
{
    float *w = malloc(n * sizeof *w);
    for (size_t i = 0; i < n; i++) w[i] = (float)(mean + size * kv_rng_normal(r));
    return w;
}

static void model_free(kv_model *m)
{
    for (int l = 0; l < LAYERS; l++) {
        kv_layer_weights *w = &m->layer[l];
        free(w->attn_norm.w), free(w->ffn_norm.w), free(w->wq.f32), free(w->wk.f32), free(w->wv.f32), free(w->bq);
        free(w->bk), free(w->bv), free(w->bo), free(w->wo.f32);
        free(w->ffn->gate.f32), free(w->ffn->up.f32), free(w->ffn->down.f32), free(w->ffn);
    }
    free(m->layer), free(m->tok_embd.f32), free(m->out_norm.w), free(m->output.f32);
    free(m->desc.rope[0].inv_freq), free(m->desc.window), free(m->desc.layer_rope);
}

static kv_tensor matrix(kv_rng *r, uint32_t rows, uint32_t cols, double size)
{
    return (kv_tensor){.rows = rows, .cols = cols, .f32 = weights(r, (size_t)rows * cols, size, 0)};
}

/* Everything the header allows at once: biases, part of a head rotated, a window on layer 1, both caps. */
static kv_model model_make(uint64_t seed)
{
    kv_rng r = {seed};
    kv_model m = {.desc = {.name = "tiny",
                           .arch = "llama",
                           .file = "tiny.gguf",
                           .quant = "F32",
                           .n_layer = LAYERS,
                           .n_q_head = HQ,
                           .n_kv_head = HK,
                           .head_dim = D,
                           .hidden = HIDDEN,
                           .ffn = FFN,
                           .n_vocab = VOCAB,
                           .n_ctx = 4096,
                           .norm_eps = 1e-5f,
                           .gated = true,
                           .embed_scale = 1,
                           .residual_scale = 1,
                           .logit_scale = 1,
                           .rope_dim = ROT,
                           .n_rope = 1,
                           .rope = {{.theta = 100, .mscale = 1.1f}},
                           .scale = 0.4f,
                           .softcap = 6,
                           .final_softcap = 9}};
    memset(m.desc.sha256, 'a', 64);
    m.desc.rope[0].inv_freq = malloc(ROT / 2 * sizeof(float));
    for (int i = 0; i < ROT / 2; i++) m.desc.rope[0].inv_freq[i] = (float)pow(100, -2.0 * i / ROT);
    m.desc.window = calloc(LAYERS, sizeof(uint32_t));
    m.desc.window[1] = 37;
    m.desc.layer_rope = calloc(LAYERS, 1);
    m.tok_embd = matrix(&r, VOCAB, HIDDEN, 1);
    m.out_norm.w = weights(&r, HIDDEN, 0.1, 1);
    m.output = matrix(&r, VOCAB, HIDDEN, 0.6);
    m.layer = calloc(LAYERS, sizeof *m.layer);
    for (int l = 0; l < LAYERS; l++) {
        kv_layer_weights *w = &m.layer[l];
        w->attn_norm.w = weights(&r, HIDDEN, 0.1, 1), w->ffn_norm.w = weights(&r, HIDDEN, 0.1, 1);
        w->wq = matrix(&r, WIDE, HIDDEN, 0.4), w->wk = matrix(&r, NARROW, HIDDEN, 0.4);
        w->wv = matrix(&r, NARROW, HIDDEN, 0.2);
        w->bq = weights(&r, WIDE, 0.5, 0), w->bk = weights(&r, NARROW, 0.5, 0), w->bv = weights(&r, NARROW, 0.5, 0);
        w->bo = weights(&r, HIDDEN, 0.1, 0), w->wo = matrix(&r, HIDDEN, WIDE, 0.2);
        w->ffn = calloc(1, sizeof *w->ffn);
        w->ffn->gate = matrix(&r, FFN, HIDDEN, 0.2), w->ffn->up = matrix(&r, FFN, HIDDEN, 0.2);
        w->ffn->down = matrix(&r, HIDDEN, FFN, 0.2);
    }
    return m;
}

/* ------------------------------------------------------------------------------------------------ what a run saw */
typedef struct {
    double q[LAYERS][HQ][N_MAX][D], k[LAYERS][HK][N_MAX][D], v[LAYERS][HK][N_MAX][D];
    double lse[LAYERS][HQ][N_MAX], stat[LAYERS][HQ][N_MAX][4], out[LAYERS][N_MAX][WIDE], x_norm[LAYERS][N_MAX];
    double colsum[LAYERS][HQ][N_MAX]; /* reference only: over rows 0..colsum_rows-1 */
    double logits[N_MAX][VOCAB];
    uint32_t n_logit;
} seen;

static kv_status see_layer(void *ctx, const kv_attn_view *a, kv_error *err)
{
    seen *s = ctx;
    (void)err;
    for (uint32_t r = 0; r < a->n_row; r++) {
        uint32_t at = a->row0 + r;
        for (int h = 0; h < HQ; h++) {
            for (int c = 0; c < D; c++) s->q[a->layer][h][at][c] = (double)a->q[(h * a->n_row + r) * D + c];
            if (a->lse) s->lse[a->layer][h][at] = (double)a->lse[h * a->n_row + r];
            for (int c = 0; a->stat && c < 4; c++)
                s->stat[a->layer][h][at][c] = (double)a->stat[(h * a->n_row + r) * 4 + c];
        }
        for (int h = 0; h < HK; h++)
            for (int c = 0; c < D; c++) {
                s->k[a->layer][h][at][c] = (double)a->k[(h * a->kv_stride + at) * D + c];
                s->v[a->layer][h][at][c] = (double)a->v[(h * a->kv_stride + at) * D + c];
            }
        for (int c = 0; c < WIDE; c++) s->out[a->layer][at][c] = (double)a->out[r * WIDE + c];
        s->x_norm[a->layer][at] = (double)a->x_norm[r];
    }
    return KV_OK;
}

static kv_status see_logits(void *ctx, uint32_t row0, uint32_t n, const float *logits, kv_error *err)
{
    seen *s = ctx;
    (void)err;
    if (row0 == s->n_logit) s->n_logit += n;
    for (uint32_t i = 0; i < n * VOCAB; i++) s->logits[row0 + i / VOCAB][i % VOCAB] = (double)logits[i];
    return KV_OK;
}

static unsigned want_stat(void *ctx, uint32_t layer)
{
    (void)ctx, (void)layer;
    return KV_WANT_STAT;
}

static kv_engine_hook see(seen *s)
{
    return (kv_engine_hook){.ctx = s, .want = want_stat, .record = see_layer, .logits = see_logits};
}

static kv_status run(const kv_model *m, kv_dtype t, uint32_t threads, const uint32_t *token, uint32_t n, uint32_t step,
                     const kv_engine_hook *hook, float *last, kv_error *err)
{
    kv_engine *e = NULL;
    kv_status st = kv_engine_open_cpu(m, &(kv_engine_options){.dtype = t, .threads = threads, .capacity = n}, &e, err);
    for (uint32_t i = 0; i < n && !st; i += step) {
        uint32_t count = n - i < step ? n - i : step;
        st = kv_engine_run(e, token + i, count, hook, i + count == n ? last : NULL, err);
    }
    kv_engine_close(e);
    return st;
}

/* ------------------------------------------------------------------------------------------------ the same in double
 */
static void norm(const double *x, const float *w, double *y)
{
    double sum = 0;
    for (int i = 0; i < HIDDEN; i++) sum += x[i] * x[i];
    for (int i = 0; i < HIDDEN; i++) y[i] = x[i] / sqrt(sum / HIDDEN + 1e-5) * (double)w[i];
}

static double dot(const double *a, const float *w, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * (double)w[i];
    return sum;
}

static void rotate(double *x, uint32_t pos, const kv_model *m)
{
    for (int i = 0; i < ROT / 2; i++) {
        double angle = pos * (double)m->desc.rope[0].inv_freq[i], mscale = (double)m->desc.rope[0].mscale, a = x[i],
               b = x[i + ROT / 2];
        x[i] = mscale * (a * cos(angle) - b * sin(angle));
        x[i + ROT / 2] = mscale * (b * cos(angle) + a * sin(angle));
    }
}

/* One row of a head's attention; p[j] for all keys. */
static void attend_row(const kv_model *m, seen *s, int l, int h, uint32_t i, uint32_t colsum_rows)
{
    uint32_t w = m->desc.window[l], lo = w && i + 1 > w ? i + 1 - w : 0;
    double p[N_MAX], sum = 0, entropy = 0, square = 0, best = -1;
    int g = h / (HQ / HK);
    for (uint32_t j = lo; j <= i; j++) {
        double score = 0, cap = (double)m->desc.softcap;
        for (int c = 0; c < D; c++) score += s->q[l][h][i][c] * s->k[l][g][j][c];
        p[j] = exp(cap * tanh(score * (double)m->desc.scale / cap));
        sum += p[j];
    }
    for (int c = 0; c < D; c++) s->out[l][i][h * D + c] = 0;
    for (uint32_t j = lo; j <= i; j++) {
        p[j] /= sum;
        entropy -= p[j] * log(p[j]), square += p[j] * p[j];
        if (p[j] > best) best = p[j], s->stat[l][h][i][1] = j;
        for (int c = 0; c < D; c++) s->out[l][i][h * D + c] += p[j] * s->v[l][g][j][c];
        if (i < colsum_rows) s->colsum[l][h][j] += p[j];
    }
    s->lse[l][h][i] = log(sum);
    s->stat[l][h][i][0] = best, s->stat[l][h][i][2] = entropy, s->stat[l][h][i][3] = square;
}

static void reference(const kv_model *m, const uint32_t *token, uint32_t n, uint32_t colsum_rows, bool blind, seen *s)
{
    static double x[N_MAX][HIDDEN];
    memset(s, 0, sizeof *s);
    for (uint32_t i = 0; i < n; i++)
        for (int c = 0; c < HIDDEN; c++) x[i][c] = (double)m->tok_embd.f32[token[i] * HIDDEN + c];
    for (int l = 0; l < LAYERS; l++) {
        const kv_layer_weights *w = &m->layer[l];
        for (uint32_t i = 0; i < n; i++) {
            double h[HIDDEN], length = 0, gate[FFN];
            for (int c = 0; c < HIDDEN; c++) length += x[i][c] * x[i][c];
            s->x_norm[l][i] = sqrt(length);
            norm(x[i], w->attn_norm.w, h);
            for (int c = 0; c < WIDE; c++)
                s->q[l][c / D][i][c % D] = dot(h, w->wq.f32 + c * HIDDEN, HIDDEN) + (double)w->bq[c];
            for (int c = 0; c < NARROW; c++) {
                s->k[l][c / D][i][c % D] = dot(h, w->wk.f32 + c * HIDDEN, HIDDEN) + (double)w->bk[c];
                s->v[l][c / D][i][c % D] = dot(h, w->wv.f32 + c * HIDDEN, HIDDEN) + (double)w->bv[c];
            }
            for (int g = 0; g < HQ; g++) rotate(s->q[l][g][i], i, m);
            for (int g = 0; g < HK; g++) rotate(s->k[l][g][i], i, m);
            for (int g = 0; g < HQ && !blind; g++) attend_row(m, s, l, g, i, colsum_rows);
            for (int c = 0; c < HIDDEN; c++)
                x[i][c] += dot(s->out[l][i], w->wo.f32 + c * WIDE, WIDE) + (double)w->bo[c];
            norm(x[i], w->ffn_norm.w, h);
            for (int c = 0; c < FFN; c++) {
                double g = dot(h, w->ffn->gate.f32 + c * HIDDEN, HIDDEN);
                gate[c] = g / (1 + exp(-g)) * dot(h, w->ffn->up.f32 + c * HIDDEN, HIDDEN);
            }
            for (int c = 0; c < HIDDEN; c++) x[i][c] += dot(gate, w->ffn->down.f32 + c * FFN, FFN);
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        double h[HIDDEN], cap = (double)m->desc.final_softcap;
        norm(x[i], m->out_norm.w, h);
        for (int c = 0; c < VOCAB; c++) s->logits[i][c] = cap * tanh(dot(h, m->output.f32 + c * HIDDEN, HIDDEN) / cap);
    }
}

/* Largest difference relative to 1 + |want|; infinite for NaN. */
static double apart(const double *a, const double *b, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs(a[i] - b[i]) / (1 + fabs(b[i]));
        if (!(d <= worst)) worst = d == d ? d : INFINITY;
    }
    return worst;
}

#define APART(a, b, field)                                                                                             \
    apart((const double *)(a)->field, (const double *)(b)->field, sizeof(a)->field / sizeof(double))

static void compare(const seen *a, const seen *b, double limit, const char *what)
{
    CHECKF(APART(a, b, q) <= limit, "%s %g", what, APART(a, b, q));
    CHECKF(APART(a, b, k) <= limit, "%s %g", what, APART(a, b, k));
    CHECKF(APART(a, b, v) <= limit, "%s %g", what, APART(a, b, v));
    CHECKF(APART(a, b, lse) <= limit, "%s %g", what, APART(a, b, lse));
    CHECKF(APART(a, b, stat) <= limit, "%s %g", what, APART(a, b, stat));
    CHECKF(APART(a, b, out) <= limit, "%s %g", what, APART(a, b, out));
    CHECKF(APART(a, b, x_norm) <= limit, "%s %g", what, APART(a, b, x_norm));
    CHECKF(APART(a, b, logits) <= limit, "%s %g", what, APART(a, b, logits));
}

/* ------------------------------------------------------------------------------------------------ the engine */
static void test_engine(const kv_model *m, const uint32_t *token)
{
    seen *ref = malloc(sizeof *ref), *one = calloc(1, sizeof *one), *two = calloc(1, sizeof *two);
    kv_engine_hook h1 = see(one), h2 = see(two);
    float last[VOCAB];
    kv_error err;

    CHECKF(!run(m, KV_F32, 2, token, N_MAX, N_MAX, &h1, last, &err), "%s", err.msg);
    CHECK(one->n_logit == N_MAX);
    for (int c = 0; c < VOCAB; c++) CHECK((double)last[c] == one->logits[N_MAX - 1][c]);
    reference(m, token, N_MAX, 0, false, ref);
    compare(one, ref, 2e-5, "one call against double");

    CHECK(!run(m, KV_F32, 1, token, 150, 1, &h2, last, &err)); /* token by token */
    reference(m, token, 150, 0, false, ref);
    compare(two, ref, 2e-5, "token by token against double");
    memset(two, 0, sizeof *two);
    CHECK(!run(m, KV_F32, 1, token, N_MAX, 299, &h2, NULL, &err)); /* in pieces */
    reference(m, token, N_MAX, 0, false, ref);
    compare(two, ref, 2e-5, "three calls against double");

    for (uint32_t threads = 1; threads <= 3; threads++) {
        memset(two, 0, sizeof *two);
        CHECK(!run(m, KV_F32, threads, token, N_MAX, N_MAX, &h2, NULL, &err));
        CHECKF(!memcmp(one, two, sizeof *one), "%u threads", threads);
    }
    free(ref), free(one), free(two);
}

static kv_status blind(void *ctx, const kv_attn_view *a, bool *done, kv_error *err)
{
    (void)ctx, (void)err;
    CHECK(!a->lse && !a->stat && a->n_key == a->row0 + a->n_row);
    memset(a->out, 0, (size_t)a->n_row * WIDE * sizeof(float));
    *done = true;
    return KV_OK;
}

static kv_status look(void *ctx, const kv_attn_view *a, bool *done, kv_error *err)
{
    (void)ctx, (void)a, (void)done, (void)err;
    return KV_OK;
}

static void test_attend(const kv_model *m, const uint32_t *token)
{
    seen *ref = malloc(sizeof *ref), *got = calloc(1, sizeof *got);
    kv_engine_hook h = see(got);
    kv_error err;

    h.attend = blind;
    CHECK(!run(m, KV_F32, 2, token, 200, 200, &h, NULL, &err));
    reference(m, token, 200, 0, true, ref);
    CHECK(APART(got, ref, k) <= 2e-5 && APART(got, ref, out) <= 0 && APART(got, ref, logits) <= 2e-5);
    memset(got, 0, sizeof *got);
    h.attend = look; /* leaves *done alone: the usual attention */
    CHECK(!run(m, KV_F32, 2, token, 200, 200, &h, NULL, &err));
    reference(m, token, 200, 0, false, ref);
    CHECK(APART(got, ref, logits) <= 2e-5);
    free(ref), free(got);
}

static void test_rounding(kv_model *m, const uint32_t *token)
{
    seen *s = calloc(1, sizeof *s);
    kv_engine_hook h = see(s);
    kv_error err = {""};
    size_t n = sizeof s->k / sizeof(double), exact = 0;

    CHECK(!run(m, KV_F16, 2, token, 100, 100, &h, NULL, &err));
    for (size_t i = 0; i < n; i++) {
        float k = (float)((double *)s->k)[i];
        exact += kv_f16_to_f32(kv_f32_to_f16(k)) == k;
    }
    CHECK(exact == n);
    float keep = m->layer[1].bk[3];
    m->layer[1].bk[3] = 1e6f;
    CHECK(run(m, KV_F16, 2, token, 100, 100, &h, NULL, &err) == KV_EUNSUPPORTED);
    CHECKF(strstr(err.msg, "layer 1") && strstr(err.msg, "K"), "%s", err.msg);
    CHECK(!run(m, KV_BF16, 2, token, 100, 100, &h, NULL, &err));
    m->layer[1].bk[3] = NAN;
    CHECK(run(m, KV_F32, 2, token, 100, 100, &h, NULL, &err) == KV_EFORMAT);
    m->layer[1].bk[3] = keep;
    free(s);
}

static void test_misuse(const kv_model *m, const uint32_t *token)
{
    const uint32_t bad[3] = {1, VOCAB, 2};
    kv_engine *e = NULL;
    kv_error err;
    CHECK(run(m, KV_F32, 1, bad, 3, 3, NULL, NULL, &err) == KV_EMISUSE && strstr(err.msg, "position 1"));
    CHECK(kv_engine_open_cpu(m, &(kv_engine_options){.dtype = KV_U8, .threads = 1, .capacity = 4}, &e, &err) ==
              KV_EMISUSE &&
          !e);
    CHECK(kv_engine_open_cpu(m, &(kv_engine_options){.dtype = KV_F32, .threads = 1, .capacity = UINT32_MAX}, &e,
                             &err) == KV_ENOMEM &&
          !e);
    CHECK(!kv_engine_open_cpu(m, &(kv_engine_options){.dtype = KV_F32, .threads = 1, .capacity = 4}, &e, &err));
    CHECK(kv_engine_run(e, token, 5, NULL, NULL, &err) == KV_EMISUSE);
    CHECK(!kv_engine_run(e, token, 4, NULL, NULL, &err));
    CHECK(kv_engine_run(e, token, 1, NULL, NULL, &err) == KV_EMISUSE);
    kv_engine_reset(e);
    CHECK(!kv_engine_run(e, token, 4, NULL, NULL, &err));
    kv_engine_close(e);
}

static void test_nll(void)
{
    kv_rng r = {5};
    enum { V = 1003 };
    float logits[2 * V], nll[2];
    uint32_t target[2] = {17, V - 1};
    for (int i = 0; i < 2 * V; i++) logits[i] = (float)(8 * kv_rng_normal(&r));
    logits[V + 3] = 300; /* exp would overflow without the maximum */
    kv_nll_rows(2, V, logits, target, nll);
    for (int row = 0; row < 2; row++) {
        double sum = 0, top = row ? 300 : 0;
        for (int i = 0; i < V; i++) sum += exp((double)logits[row * V + i] - top);
        double want = log(sum) + top - (double)logits[row * V + (int)target[row]];
        CHECKF(kv_close((double)nll[row], want, 1e-6, 1e-6), "%g %g", (double)nll[row], want);
    }
}

/* ------------------------------------------------------------------------------------------------ the recorder */
static void write_tokens(const char *path, const uint32_t *token, uint32_t n)
{
    FILE *f = fopen(path, "w");
    for (uint32_t i = 0; i < n; i++) fprintf(f, "%s%u", i ? "," : "[", token[i]);
    fputs("]\n", f);
    fclose(f);
}

static kv_status capture(const kv_model *m, const kv_capture_request *q, uint32_t n_prompt, uint32_t n_context,
                         uint32_t decode, const char *path, kv_job *j, kv_capture_plan *p, kv_error *err)
{
    kv_capture_result res;
    kv_status st = kv_job_from_tokens(m, in_dir("t.json"), n_prompt, decode, j, err);
    if (st) return st;
    j->n_context = n_context;
    if ((st = kv_capture_plan_open(m, q, j, p, err))) return st;
    CHECK(!kv_capture_plan_done(p, j, path));
    return kv_capture_plan_run(p, m, q, j, path, &res, err);
}

/* One stream of the trace against what was seen: `width` of every `stride` doubles of each (layer, head, row). */
static double stream_apart(const kv_trace *t, kv_stream s, uint32_t layer, uint32_t head, uint32_t a, uint32_t b,
                           uint32_t width, const double *want)
{
    float *v = calloc((size_t)(b - a) * width, sizeof *v);
    double worst = INFINITY;
    kv_error err;
    if (!kv_trace_read_f32(t, s, layer, head, a, b, v, &err)) {
        worst = 0;
        for (size_t i = 0; i < (size_t)(b - a) * width; i++) {
            double d = fabs((double)v[i] - want[i]);
            if (!(d <= worst)) worst = d == d ? d : INFINITY;
        }
    } else
        printf("read %s: %s\n", kv_stream_name(s), err.msg);
    free(v);
    return worst;
}

static void check_streams(const kv_trace *t, const seen *s, const seen *ref, uint32_t n, uint32_t p, double tol)
{
    for (uint32_t l = 0; l < LAYERS; l++) {
        for (uint32_t h = 0; h < HQ; h++) {
            CHECK(stream_apart(t, KV_S_Q, l, h, 0, n, D, s->q[l][h][0]) <= tol);
            CHECK(stream_apart(t, KV_S_LSE, l, h, 0, n, 1, s->lse[l][h]) <= tol);
            CHECK(stream_apart(t, KV_S_ROWSTAT, l, h, 0, n, 4, s->stat[l][h][0]) <= tol);
            double colsum = stream_apart(t, KV_S_COLSUM, l, h, 0, p, 1, ref->colsum[l][h]);
            CHECKF(colsum <= (tol > 0 ? 1e-4 : 0.05), "%g", colsum); /* at tol 0 the run rounds to f16, ref does not */
        }
        for (uint32_t h = 0; h < HK; h++) {
            CHECK(stream_apart(t, KV_S_K, l, h, 0, n, D, s->k[l][h][0]) <= tol);
            CHECK(stream_apart(t, KV_S_V, l, h, 0, n, D, s->v[l][h][0]) <= tol);
        }
        CHECK(stream_apart(t, KV_S_XNORM, l, 0, 0, n, 1, s->x_norm[l]) <= tol);
    }
    for (uint32_t r = 0; r + 1 < n; r++) {
        uint32_t target;
        double sum = 0;
        CHECK(!kv_trace_read_u32(t, KV_S_TOKENS, r + 1, r + 2, &target, NULL));
        for (int c = 0; c < VOCAB; c++) sum += exp(s->logits[r][c]);
        double nll = log(sum) - s->logits[r][target];
        CHECK(stream_apart(t, KV_S_NLL, 0, 0, r, r + 1, 1, &nll) <= 2e-5);
    }
    float top[2 * KV_RECORD_TOP_K];
    CHECK(!kv_trace_read_f32(t, KV_S_LOGITS, 0, 0, n - 1, n, top, NULL));
    for (uint32_t i = 0; i < KV_RECORD_TOP_K; i++) { /* descending, and as many larger ones as its place says */
        double got = (double)top[KV_RECORD_TOP_K + i];
        const double *row = s->logits[n - 1];
        uint32_t larger = 0, as_large = 0;
        for (int c = 0; c < VOCAB; c++) larger += row[c] > got + tol, as_large += row[c] >= got - tol;
        CHECK(larger <= i && as_large > i && fabs(row[(int)top[i]] - got) <= tol);
    }
}

static void check_sizes(const kv_trace *t, const kv_capture_plan *p)
{
    kv_trace_usage u = kv_trace_reader_usage(t);
    for (int s = 1; s < 32; s++)
        if (s != KV_S_META && s != KV_S_PROVENANCE && s != KV_S_TEXT)
            CHECKF(u.raw[s] == p->raw[s], "stream %d: %llu, planned %llu", s, (unsigned long long)u.raw[s],
                   (unsigned long long)p->raw[s]);
}

static void test_record(const kv_model *m, const uint32_t *token)
{
    const uint32_t n = 400, p = 310, ctx = 200;
    kv_capture_request q = {.level = KV_RECORD_QKV, .dtype = KV_F16, .wo = "auto", .threads = 2, .map_rows = 20};
    seen *s = calloc(1, sizeof *s), *ref = malloc(sizeof *ref);
    kv_engine_hook h = see(s);
    kv_trace *t = NULL;
    kv_job j;
    kv_capture_plan plan;
    kv_error err = {""};

    CHECK(!run(m, KV_F16, 1, token, n, n, &h, NULL, &err));
    reference(m, token, n, p, false, ref);
    write_tokens(in_dir("t.json"), token, n);
    CHECKF(!capture(m, &q, p, ctx, KV_JOB_DECODE_ALL, in_dir("a.kvt"), &j, &plan, &err), "%s", err.msg);
    CHECK(kv_capture_plan_done(&plan, &j, in_dir("a.kvt")));
    CHECK(access(in_dir("a.kvt.partial"), F_OK));
    CHECKF(!kv_trace_open(in_dir("a.kvt"), &t, &err), "%s", err.msg);
    if (!t) goto out;
    const kv_trace_info *i = kv_trace_get_info(t);
    CHECK(i->n_token == n && i->n_prompt == p && i->n_context == ctx && i->window[1] == 37 && i->rope_dim == ROT);
    check_streams(t, s, ref, n, p, 0);
    check_sizes(t, &plan);
    CHECK(kv_trace_has_wo(t, 1) && !i->wo_sha256);
    for (uint32_t l = 0; l < LAYERS; l++) { /* both cut points, the window of maps */
        float sum[310], map[20 * 310];
        double worst = 0, all = 0;
        reference(m, token, ctx, ctx, false, ref);
        CHECK(stream_apart(t, KV_S_COLSUM_CTX, l, 3, 0, ctx, 1, ref->colsum[l][3]) <= 0.05);
        CHECK(!kv_trace_read_f32(t, KV_S_COLSUM, l, 3, 0, p, sum, &err));
        for (uint32_t c = 0; c < p; c++) all += (double)sum[c];
        CHECK(kv_close(all, p, 1e-3, 0));
        CHECK(!kv_trace_read_f32(t, KV_S_MAP_WINDOW, l, 1, p - 20, p, map, &err));
        for (uint32_t r = 0; r < 20; r++) {
            double row = 0;
            for (uint32_t c = 0; c < p; c++) row += (double)map[r * p + c];
            worst = fmax(worst, fabs(row - 1));
        }
        CHECK(worst <= 2e-3);
    }
    kv_trace_close(t), t = NULL;
    q.map_rows = 0; /* another request: the finished trace does not answer it */
    q.dtype = KV_BF16;
    kv_capture_plan other;
    CHECK(!kv_capture_plan_open(m, &q, &j, &other, &err) && !kv_capture_plan_done(&other, &j, in_dir("a.kvt")));
    kv_capture_plan_close(&other);
out:
    kv_capture_plan_close(&plan), kv_job_free(&j);
    free(s), free(ref);
}

/* Greedy: one row a call gives the same trace as teacher forcing over the tokens it chose, but for rounding noise. */
static void test_greedy(const kv_model *m, const uint32_t *token)
{
    const uint32_t p = 150, n = 150 + 80;
    kv_capture_request q = {.level = KV_RECORD_QKV, .dtype = KV_F32, .wo = "none", .threads = 2, .map_full = true};
    seen *s = calloc(1, sizeof *s), *ref = malloc(sizeof *ref);
    kv_engine_hook h = see(s);
    kv_trace *t = NULL;
    kv_job j;
    kv_capture_plan plan;
    kv_error err = {""};

    write_tokens(in_dir("t.json"), token, p);
    CHECKF(!capture(m, &q, 0, 0, n - p, in_dir("g.kvt"), &j, &plan, &err), "%s", err.msg);
    CHECK(j.n_token == n && j.n_greedy == n - p);
    CHECK(!run(m, KV_F32, 1, j.token, n, n, &h, NULL, &err));
    reference(m, j.token, n, p, false, ref);
    for (uint32_t r = p - 1; r + 1 < n; r++) {
        double best = s->logits[r][0];
        for (int c = 1; c < VOCAB; c++) best = fmax(best, s->logits[r][c]);
        CHECK(best - s->logits[r][j.token[r + 1]] <= 1e-5);
    }
    CHECKF(!kv_trace_open(in_dir("g.kvt"), &t, &err), "%s", err.msg);
    if (t) {
        float *row = malloc(n * sizeof *row);
        check_streams(t, s, ref, n, p, 2e-5);
        check_sizes(t, &plan);
        for (uint32_t r = 0; r < n; r++) {
            double sum = 0;
            CHECK(!kv_trace_read_f32(t, KV_S_MAP, 1, 2, r, r + 1, row, &err));
            for (uint32_t c = 0; c < n; c++) sum += (double)row[c];
            CHECK(kv_close(sum, 1, 2e-3, 0) && (r + 1 == n || row[r + 1] == 0));
        }
        CHECK(!kv_trace_has_wo(t, 0));
        free(row);
    }
    kv_trace_close(t), kv_capture_plan_close(&plan), kv_job_free(&j);
    free(s), free(ref);
}

static void test_levels(const kv_model *m, const uint32_t *token)
{
    const uint32_t n = 300, p = 250, ctx = 120;
    kv_capture_request q = {.dtype = KV_F16, .wo = "auto", .threads = 1};
    static const uint32_t only[] = {1};
    kv_trace *t = NULL;
    kv_job j;
    kv_capture_plan plan;
    kv_error err = {""};

    write_tokens(in_dir("t.json"), token, n);
    for (kv_record_level level = KV_RECORD_TOKENS; level <= KV_RECORD_OBS; level++) {
        char *path = in_dir(kv_record_name(level));
        q.level = level;
        q.layer = level == KV_RECORD_OBS ? only : NULL, q.n_layer = 1;
        q.wo = level == KV_RECORD_OBS ? in_dir("shared-wo.kvt") : "auto";
        CHECKF(!capture(m, &q, p, ctx, KV_JOB_DECODE_ALL, path, &j, &plan, &err), "%s", err.msg);
        CHECKF(!kv_trace_open(path, &t, &err), "%s", err.msg);
        if (t) {
            CHECK(kv_trace_has(t, KV_S_LSE, 1, 0, 0, n) == (level >= KV_RECORD_STATS));
            CHECK(kv_trace_has(t, KV_S_K, 1, 0, 0, n) == (level >= KV_RECORD_OBS));
            CHECK(!kv_trace_has(t, KV_S_Q, 1, 0, 0, p));
            if (level == KV_RECORD_OBS) {
                CHECK(kv_trace_has(t, KV_S_Q, 1, 3, p - KV_RECORD_OBS_ROWS, n));
                CHECK(kv_trace_has(t, KV_S_Q, 1, 3, ctx - KV_RECORD_OBS_ROWS, ctx));
                CHECK(!kv_trace_has(t, KV_S_Q, 1, 3, ctx, ctx + 1) && !kv_trace_has(t, KV_S_K, 0, 0, 0, 1));
                CHECK(kv_trace_get_info(t)->wo_sha256 && kv_trace_has_wo(t, 1));
                float *wo = malloc(HIDDEN * WIDE * sizeof *wo);
                CHECKF(!kv_trace_read_wo(t, 1, wo, &err), "%s", err.msg);
                for (int i = 0; i < HIDDEN * WIDE; i++)
                    CHECK(wo[i] == kv_f16_to_f32(kv_f32_to_f16(m->layer[1].wo.f32[i])));
                free(wo);
            }
            check_sizes(t, &plan);
        }
        kv_trace_close(t), t = NULL;
        kv_capture_plan_close(&plan), kv_job_free(&j);
    }
}

/* ------------------------------------------------------------------------------------------------ prompt sets */
static kv_status read_set(const char *text, kv_prompts *set, kv_error *err)
{
    kv_status st = kv_write_file(in_dir("set.jsonl"), text, strlen(text), NULL);
    CHECK(!st);
    return kv_prompts_read(in_dir("set.jsonl"), set, err);
}

static void test_prompts(void)
{
    static const struct {
        const char *line, *word; /* what the message must name */
    } bad[] = {
        {"", "no prompts"},
        {"[1]", "object"},
        {"{\"id\":\"a\"", "line 1"},
        {"{\"text\":\"x\"}", "'id'"},
        {"{\"id\":\"../a\",\"text\":\"x\"}", "'id'"},
        {"{\"id\":\"a\"}", "'text'"},
        {"{\"id\":\"a\",\"text\":\"x\",\"file\":\"y\"}", "'file'"},
        {"{\"id\":\"a\",\"text\":\"x\",\"prompt_end_byte\":-1}", "prompt_end_byte"},
        {"{\"id\":\"a\",\"text\":\"x\",\"evidence\":[[3,2]]}", "evidence"},
        {"{\"id\":\"a\",\"text\":\"x\"}\n{\"id\":\"a\",\"text\":\"y\"}", "twice"},
    };
    static const char *const late[] = {
        "{\"id\":\"a\",\"text\":\"xyz\",\"prompt_end_byte\":4}",
        "{\"id\":\"a\",\"text\":\"xyz\",\"prompt_end_byte\":2,\"context_end_byte\":3}",
        "{\"id\":\"a\",\"text\":\"xyz\",\"evidence\":[[0,4]]}",
        "{\"id\":\"a\",\"text\":\"xyz\",\"question_span\":[0,4]}",
        "{\"id\":\"a\",\"text\":\"xyz\",\"sha256\":\"00\"}",
        "{\"id\":\"a\",\"file\":\"absent.txt\"}",
    };
    kv_prompts set;
    kv_error err = {""};

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK(read_set(bad[i].line, &set, &err) == KV_EFORMAT && !set.v);
        CHECKF(strstr(err.msg, bad[i].word) && strstr(err.msg, "set.jsonl"), "%s", err.msg);
    }
    for (size_t i = 0; i < sizeof late / sizeof *late; i++) {
        CHECK(!read_set(late[i], &set, &err));
        CHECK(kv_prompt_load(&set.v[0], &err) != KV_OK && strlen(err.msg) > 10);
        kv_prompts_free(&set);
    }
    CHECK(!kv_write_file(in_dir("x.txt"), "question: abc", 13, NULL));
    CHECK(
        !read_set("\n{\"id\":\"a\",\"file\":\"x.txt\",\"bytes\":13,\"prompt_end_byte\":10,\"evidence\":[[0,8],[9,13]],"
                  "\"note\":[1],\"context_end_byte\":null}\r\n\n{\"id\":\"b\",\"text\":\"\\u0000x\"}",
                  &set, &err));
    CHECK(set.n == 2 && set.v[0].n_evidence == 2 && set.v[0].prompt_end == 10 && set.v[0].context_end == SIZE_MAX);
    CHECK(!kv_prompt_load(&set.v[0], &err) && set.v[0].n_text == 13 && !strcmp(set.v[0].extra, "{\"note\":[1]}"));
    CHECK(set.v[1].n_text == 2 && !set.v[1].text[0]);
    kv_prompts_free(&set);
}

int main(void)
{
    kv_model m = model_make(42);
    uint32_t token[N_MAX];
    kv_rng r = {7};

    if (!mkdtemp(dir)) return perror("mkdtemp"), 1;
    for (int i = 0; i < N_MAX; i++) token[i] = (uint32_t)(kv_rng_next(&r) % VOCAB);
    test_engine(&m, token);
    test_attend(&m, token);
    test_rounding(&m, token);
    test_misuse(&m, token);
    test_nll();
    test_record(&m, token);
    test_greedy(&m, token);
    test_levels(&m, token);
    test_prompts();
    model_free(&m);
    char cmd[300];
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    CHECK(!system(cmd));
    return kv_tally();
}
