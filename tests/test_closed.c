/* test_closed.c - the closed loop against the model run in the plainest way: one sequence a point, the whole of it
 * through the engine, every row behind the cut attending by two loops to what its policy leaves. Run from the
 * repository root. */
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "analyze/spawn.h"
#include "capture/tokenizer.h"
#include "sim/generate.h"
#include "sim/schedule.h"
#include "tests/check.h"
#include "tests/world.h"

enum { N = 72, P = 44, CONTEXT = 36 };
static char dir[] = "/tmp/kvclosed.XXXXXX";
static kv_error err;
static const char MODEL[] = "tests/golden/models/gguf/llama256/llama256.F16.gguf";

/* One trace by kv-capture, as users make them. */
static char *capture(const char *name, const char *prompt, uint64_t seed)
{
    char *exe = kv_exe_folder(), *bin = kv_format("%s/../kv-capture", exe), *json = kv_format("%s/%s.json", dir, name),
         *out = kv_format("%s/%s.kvt", dir, name), *said = NULL;
    kv_rng r = {seed};
    int code = 0;
    FILE *f = fopen(json, "w");
    for (int i = 0; i < N; i++) fprintf(f, "%s%d", i ? "," : "[", (int)(3 + kv_rng_next(&r) % 250));
    fputs("]", f), fclose(f);
    const char *const argv[] = {bin,    "run",     "-m",  MODEL,       "--tokens", json, "--prompt-tokens",
                                prompt, "--dtype", "f32", "--backend", "cpu",      "-o", out,
                                NULL};
    CHECKF(!kv_spawn(argv, NULL, &code, &said, &err) && code == 0, "%s", said ? said : err.msg);
    unlink(json);
    free(exe), free(bin), free(json), free(said);
    return out;
}

/* ------------------------------------------------------------------------------------------------ the plain way */
typedef struct {
    world *w;
    const kv_point *p; /* NULL: the full cache */
    uint32_t n_vocab;
    double *logit; /* [N][n_vocab] */
    bool changes;
    uint32_t slots; /* of a cache that holds unrotated keys and turns them by slot (StreamingLLM); 0 = it does not */
    double *x;      /* [layers][N][hidden] residual stream entering each block */
} plain;

enum { SINKS = 4, ROOM = 256 };

static plain plain_of(world *w, const kv_point *p)
{
    bool slots = p && w->spec[p->spec].reindex;
    return (plain){.w = w,
                   .p = p,
                   .changes = p && !slots && kv_schedule_used(&w->plan, p->spec),
                   .slots = slots ? p->c.tokens : 0};
}

/* x, turned for position `from` by the model's RoPE, as it would be at position `to`. */
static void turn(const kv_trace_info *in, const float *x, uint32_t from, uint32_t to, double *y)
{
    uint32_t half = in->head_dim / 2;
    for (uint32_t j = 0; j < in->head_dim; j++) y[j] = x[j];
    if (from == to) return;
    for (uint32_t j = 0; j < half; j++) {
        double f = pow(in->rope_theta, -(double)j / half), a = -f * from, b = f * to;
        double re = x[j] * cos(a) - x[j + half] * sin(a), im = x[j] * sin(a) + x[j + half] * cos(a);
        y[j] = re * cos(b) - im * sin(b), y[j + half] = re * sin(b) + im * cos(b);
    }
}

static bool sees(const plain *s, const kv_schedule *sch, uint32_t layer, uint32_t h, uint32_t row, uint32_t key)
{
    const kv_scene *sc = &s->w->scene;
    if (key > row) return false;
    if (row < sc->n_cut || !s->p) return true;
    if (s->slots) return key < SINKS || key + (s->slots - SINKS) >= row; /* itself beside a full cache */
    const kv_ranking *rk = &s->w->plan.ranking[s->w->plan.ranking_of[s->p->spec]];
    uint32_t group = sc->info->n_q_head / sc->info->n_kv_head, U = rk->n_unit;
    uint32_t u = U == 1 ? 0 : U == sc->info->n_q_head ? h : h / group;
    if (sch) return kv_schedule_visible(sch, sc, u, key, row - sc->row_first);
    if (key >= sc->n_cut) return true;
    const uint32_t *order = rk->order + ((size_t)layer * U + u) * sc->n_cut;
    for (uint32_t i = 0; i < s->p->counts[layer * U + u]; i++)
        if (order[i] == key) return true;
    return false;
}

/* All layers evict here, so a layer's number is its place among them. */
static kv_status attend(void *ctx, const kv_attn_view *a, bool *done, kv_error *e)
{
    plain *s = ctx;
    const kv_scene *sc = &s->w->scene;
    uint32_t Hq = sc->info->n_q_head, Hk = sc->info->n_kv_head, d = sc->info->head_dim;
    kv_layer l = {0};
    kv_schedule sch = {0};
    CHECK(d <= ROOM);
    if (s->changes) { /* the policy decides on the rows of this very run */
        CHECK(!kv_layer_load(sc, a->layer, KV_NEED_FUTURE | s->w->plan.needs, s->w->plan.max_window, &l, e));
        for (uint32_t h = 0; h < Hk; h++)
            for (uint32_t i = 0; i < N; i++) {
                memcpy(l.k + ((size_t)h * N + i) * d, a->k + ((size_t)h * a->kv_stride + i) * d, d * sizeof(float));
                memcpy(l.v + ((size_t)h * N + i) * d, a->v + ((size_t)h * a->kv_stride + i) * d, d * sizeof(float));
            }
        for (uint32_t h = 0; h < Hq; h++)
            for (uint32_t i = P; i < N; i++)
                memcpy(l.q_row + ((size_t)h * (N - P) + i - P) * d, a->q + ((size_t)h * N + i) * d, d * sizeof(float));
        CHECK(!kv_schedule_make(&s->w->plan, s->p->spec, &s->p->c, s->p->counts, &l, &sch, e));
    }
    for (uint32_t h = 0; h < Hq; h++)
        for (uint32_t row = 0; row < N; row++) {
            const float *q = a->q + ((size_t)h * N + row) * d, *K = a->k + (size_t)(h / (Hq / Hk)) * a->kv_stride * d,
                        *V = a->v + (size_t)(h / (Hq / Hk)) * a->kv_stride * d;
            double score[N], top = -INFINITY, sum = 0, x[ROOM], y[ROOM];
            uint32_t n = 0, slot = 0;
            for (uint32_t i = 0; i < N; i++) n += sees(s, s->changes ? &sch : NULL, a->layer, h, row, i);
            for (uint32_t i = 0; i < N; i++) {
                score[i] = -INFINITY;
                if (!sees(s, s->changes ? &sch : NULL, a->layer, h, row, i)) continue;
                bool turned = s->slots && row >= sc->n_cut;
                score[i] = 0;
                turn(sc->info, q, row, turned ? n - 1 : row, x);
                turn(sc->info, K + (size_t)i * d, i, turned ? slot++ : i, y);
                for (uint32_t j = 0; j < d; j++) score[i] += x[j] * y[j];
                score[i] *= (double)sc->info->scale;
                top = fmax(top, score[i]);
            }
            for (uint32_t i = 0; i < N; i++) sum += score[i] = exp(score[i] - top);
            for (uint32_t j = 0; j < d; j++) {
                double o = 0;
                for (uint32_t i = 0; i < N; i++) o += score[i] / sum * (double)V[(size_t)i * d + j];
                a->out[((size_t)row * Hq + h) * d + j] = (float)o;
            }
        }
    for (size_t i = 0; i < (size_t)N * sc->info->hidden; i++)
        s->x[(size_t)a->layer * N * sc->info->hidden + i] = (double)a->x[i];
    if (s->changes) kv_schedule_free(&sch), kv_layer_free(&l);
    *done = true;
    return KV_OK;
}

static kv_status logits(void *ctx, uint32_t row0, uint32_t n, const float *v, kv_error *e)
{
    plain *s = ctx;
    (void)e;
    for (size_t i = 0; i < (size_t)n * s->n_vocab; i++) s->logit[(size_t)row0 * s->n_vocab + i] = (double)v[i];
    return KV_OK;
}

static void run_plain(plain *s, const kv_model *m)
{
    kv_engine *e = NULL;
    kv_engine_hook hook = {.ctx = s, .attend = attend, .logits = logits};
    s->n_vocab = m->desc.n_vocab;
    s->logit = calloc((size_t)N * s->n_vocab, sizeof *s->logit);
    s->x = calloc((size_t)m->desc.n_layer * N * m->desc.hidden, sizeof *s->x);
    CHECK(!kv_engine_open_cpu(m, &(kv_engine_options){.dtype = KV_F32, .threads = 2, .capacity = N}, &e, &err));
    CHECKF(!kv_engine_run(e, s->w->token, N, &hook, NULL, &err), "%s", err.msg);
    kv_engine_close(e);
}

static double log_sum(const double *l, uint32_t n)
{
    double top = l[0], sum = 0;
    for (uint32_t i = 1; i < n; i++) top = fmax(top, l[i]);
    for (uint32_t i = 0; i < n; i++) sum += exp(l[i] - top);
    return top + log(sum);
}

/* Is token i among the k largest (ties: lower first)? */
static bool among(const double *l, uint32_t n, uint32_t i, uint32_t k)
{
    uint32_t before = 0;
    for (uint32_t j = 0; j < n; j++) before += l[j] > l[i] || (l[j] == l[i] && j < i);
    return before < k;
}

static void compare(const world *w, const kv_model *m, const kv_closed *c, size_t i, const plain *full, const plain *s)
{
    uint32_t V = m->desc.n_vocab, hidden = m->desc.hidden;
    double worst = 0, worst_kl = 0;
    for (uint32_t t = 0; t < N - P; t++) {
        const double *a = full->logit + (size_t)(P - 1 + t) * V, *b = s->logit + (size_t)(P - 1 + t) * V;
        double la = log_sum(a, V), lb = log_sum(b, V), kl = 0;
        uint32_t target = w->token[P + t], five = 0, one = 0;
        for (uint32_t j = 0; j < V; j++) {
            kl += exp(a[j] - la) * ((a[j] - la) - (b[j] - lb));
            five += among(a, V, j, 5) && among(b, V, j, 5);
            one += among(a, V, j, 1) && among(b, V, j, 1);
        }
        size_t at = i * c->n_pred + t;
        worst = fmax(worst, fabs(((lb - b[target]) - (la - a[target])) - (double)c->delta_nll[at]));
        worst_kl = fmax(worst_kl, fabs(kl - (double)c->kl[at]));
        CHECKF(c->top1[at] == (float)one && fabs((double)c->top5[at] - five / 5.0) < 1e-6,
               "%s: top tokens of prediction %u", w->spec[w->point[i].spec].canonical, t);
    }
    CHECKF(worst < 1e-4 && worst_kl < 1e-4, "%s: nll differs by %g, kl by %g", w->spec[w->point[i].spec].canonical,
           worst, worst_kl);
    for (uint32_t l = 0; l < w->scene.n_evict; l++) {
        double sum = 0;
        for (uint32_t r = P; r < N; r++) {
            const double *x = full->x + ((size_t)l * N + r) * hidden, *y = s->x + ((size_t)l * N + r) * hidden;
            double e2 = 0, n2 = 0;
            for (uint32_t j = 0; j < hidden; j++) e2 += (x[j] - y[j]) * (x[j] - y[j]), n2 += x[j] * x[j];
            sum += sqrt(e2 / n2);
        }
        CHECKF(fabs(sum / (N - P) - c->stream_error[i * w->scene.n_evict + l]) < 2e-5, "layer %u: stream error %g, %g",
               l, sum / (N - P), c->stream_error[i * w->scene.n_evict + l]);
    }
}

static void test_against_plain(const kv_model *m, const char *path, const char *policies)
{
    static const char *const BUDGET[] = {"6", "20", "44"};
    world w;
    kv_closed c;
    open_world(&w, path, "prompt", policies, BUDGET, 3);
    CHECKF(!kv_closed_run(&w.plan, w.point, w.n_point, m, 2, NULL, NULL, NULL, &c, &err), "%s", err.msg);
    plain full = {.w = &w};
    run_plain(&full, m);
    CHECK(c.n_pred == N - P && c.noise >= 0 && c.noise < 1e-5);
    for (size_t i = 0; i < w.n_point; i++) {
        plain s = plain_of(&w, &w.point[i]);
        run_plain(&s, m);
        compare(&w, m, &c, i, &full, &s);
        free(s.logit), free(s.x);
    }
    free(full.logit), free(full.x);

    /* The same bytes for any number of threads, and alone or beside others. */
    kv_closed one;
    CHECK(!kv_closed_run(&w.plan, w.point, w.n_point, m, 1, NULL, NULL, NULL, &one, &err));
    CHECK(!memcmp(one.delta_nll, c.delta_nll, w.n_point * c.n_pred * sizeof(float)) &&
          !memcmp(one.head_error, c.head_error, w.n_point * w.scene.n_evict * sizeof(double)));
    kv_closed_free(&one);
    CHECK(!kv_closed_run(&w.plan, w.point + 1, 1, m, 2, NULL, NULL, NULL, &one, &err));
    for (uint32_t t = 0; t < c.n_pred; t++)
        CHECK(fabs((double)one.delta_nll[t] - (double)c.delta_nll[c.n_pred + t]) < 1e-5);
    kv_closed_free(&one);

    check_first_layer(&w, &c);
    kv_closed_free(&c);
    close_world(&w);
}

static void test_full_is_free(const kv_model *m, const char *path)
{
    static const char *const BUDGET[] = {"8", "100%"};
    world w;
    kv_closed c;
    open_world(&w, path, "prompt", "full,snapkv", BUDGET, 2);
    CHECK(!kv_closed_run(&w.plan, w.point, w.n_point, m, 2, NULL, NULL, NULL, &c, &err));
    for (size_t i = 0; i < w.n_point; i++)
        for (uint32_t t = 0; t < c.n_pred; t++) {
            bool whole = i != 2;
            CHECK(!whole || (c.delta_nll[i * c.n_pred + t] == 0 && c.kl[i * c.n_pred + t] == 0));
            /* The prompt's last row never sees the cut. */
            CHECK(t || (c.delta_nll[i * c.n_pred] == 0 && c.top1[i * c.n_pred] == 1));
        }
    CHECK(c.kl[2 * c.n_pred + 3] > 0);
    kv_closed_free(&c);
    close_world(&w);
}

/* Free running, the plain way: before every token the whole sequence again, rows behind the prompt attending by two
 * loops. The trace has N tokens; here the rows behind the prompt are the answer's. */
static void test_generate(const kv_model *m, const char *path, const char *policies, size_t n)
{
    static const char *const BUDGET[] = {"10"};
    enum { LOOK = N - P };
    world w;
    kv_generated g;
    open_world(&w, path, "prompt", policies, BUDGET, 1);
    CHECKF(!kv_generate(&w.plan, w.point, w.n_point, m, 2, NULL, NULL, &g, &err), "%s", err.msg);
    CHECK(g.n_point == n && kv_first_divergence(&g, g.n_point) == g.n_step);
    for (size_t i = 0; i <= n && g.token; i++) {
        const kv_point *p = i == n ? NULL : &w.point[i];
        const uint32_t *got = g.token + i * g.n_step;
        bool same = true;
        CHECK(i == n || g.able[i]);
        for (uint32_t t = 0; t < LOOK && same; t++) {
            plain s = plain_of(&w, p);
            run_plain(&s, m); /* rows behind position P + t - 1 hold old tokens, which nothing before them sees */
            const double *l = s.logit + (size_t)(P - 1 + t) * s.n_vocab;
            uint32_t best = 0;
            for (uint32_t j = 1; j < s.n_vocab; j++)
                if (l[j] > l[best]) best = j;
            uint32_t said = got[t] == UINT32_MAX ? kv_model_eos(m) : got[t];
            same = l[best] - l[said] < 1e-4;
            CHECKF(same, "point %zu step %u: token %u, plainly %u", i, t, got[t], best);
            free(s.logit), free(s.x);
            if (got[t] == UINT32_MAX) break;
            w.token[P + t] = got[t];
        }
    }
    kv_generated_free(&g);
    close_world(&w);
}

static void test_not_followed(const kv_model *m, const char *path)
{
    static const char *const BUDGET[] = {"10"};
    world w;
    kv_generated g;
    open_world(&w, path, "prompt", "h2o.mask,snapkv,oracle-steps,mixdim.ours", BUDGET, 1);
    CHECKF(!kv_generate(&w.plan, w.point, w.n_point, m, 2, NULL, NULL, &g, &err), "%s", err.msg);
    CHECK(!g.able[0] && g.able[1] && !g.able[2] && !g.able[3] && g.token[0] == UINT32_MAX);
    kv_generated_free(&g);
    close_world(&w);
}

/* What an answer must hold, from the prompt's metadata. */
static void test_answers(const kv_model *m)
{
    static uint32_t token[KV_GENERATE_STEPS * 2];
    kv_generated g = {.n_point = 1, .n_step = KV_GENERATE_STEPS, .token = token};
    kv_tokens t;
    const char text[] = "the code is 12345 and\n THE  end";
    for (size_t i = 0; i < 2 * KV_GENERATE_STEPS; i++) token[i] = UINT32_MAX;
    if (!m->tok || kv_tokenize(m->tok, text, strlen(text), false, false, &t, &err)) {
        CHECKF(false, "no tokenizer takes the text: %s", err.msg);
        return;
    }
    for (size_t i = 0; i < t.n && i < KV_GENERATE_STEPS; i++) token[i] = t.id[i];
    kv_tokens_free(&t);
    kv_trace_info info = {.extra = "{\"prompt\":{\"answers\":[\"12345\",\"and the END\",\"absent\",\"code\"]}}"};
    CHECK(kv_answer_found(&g, 0, m, &info) == 0.75);
    info.extra = "{\"prompt\":{\"answer\":\"12345, 99999 or 7\"}}"; /* numbers of four digits and more */
    CHECK(kv_answer_found(&g, 0, m, &info) == 0.5);
    info.extra = "{\"prompt\":{\"answer\":\"Is 12345\"}}";
    CHECK(kv_answer_found(&g, 0, m, &info) == 1);
    info.extra = "{\"prompt\":{\"answer\":\"The End.\"}}";
    CHECK(kv_answer_found(&g, 0, m, &info) == 0);
    info.extra = "{}";
    CHECK(isnan(kv_answer_found(&g, 0, m, &info)));
    CHECK(kv_first_divergence(&g, 0) == 0);
}

static void test_refusals(kv_model *m, const char *path)
{
    world w;
    static const char *const BUDGET[] = {"8"};
    open_world(&w, path, "prompt", "snapkv", BUDGET, 1);
    CHECKF(!kv_closed_check(m, &w.scene, &err), "%s", err.msg);
    char was = m->desc.sha256[0];
    m->desc.sha256[0] = was == 'a' ? 'b' : 'a';
    CHECK(kv_closed_check(m, &w.scene, &err) == KV_EMISUSE && strstr(err.msg, "another model"));
    m->desc.sha256[0] = was;
    close_world(&w);
}

int main(void)
{
    kv_model *m = NULL;
    CHECK(mkdtemp(dir) != NULL);
    CHECKF(!kv_model_open(MODEL, KV_WEIGHTS_F32, 2, &m, &err), "%s", err.msg);
    char *path = capture("a", "44", 11);
    if (m && path) {
        test_against_plain(m, path,
                           "snapkv:window=4,ada-snapkv:window=4,h2o:window=2,random:window=0,"
                           "snapkv:window=4,granularity=query_head,tova:window=1");
        test_against_plain(m, path,
                           "streaming:decode=streaming,h2o:decode=h2o,window=4,tova:decode=tova,window=1,"
                           "criticalkv:window=4,streamingllm.reindex");
        test_full_is_free(m, path);
        test_generate(m, path, "snapkv:window=4,streaming,random:granularity=query_head,window=2", 3);
        test_generate(
            m, path,
            "h2o:decode=h2o,window=4,streaming:decode=streaming,tova:decode=tova,window=1,criticalkv:window=4,"
            "cake.decode,streamingllm.reindex",
            6);
        test_not_followed(m, path);
        test_answers(m);
        test_refusals(m, path);
    }
    char *side = kv_format("rm -rf %s", dir);
    if (side && system(side)) return 1;
    free(side), free(path);
    kv_model_close(m);
    return kv_tally();
}
