/* test_sim.c - policies, allocators, replay and results against brute force on small seeded traces. */
#include <sqlite3.h>
#include <unistd.h>

#include "sim/dmath.h"
#include "sim/plan.h"
#include "sim/replay.h"
#include "sim/results.h"
#include "tests/check.h"
#include "tests/tiny.h"

static char dir[] = "/tmp/kvtest.XXXXXX";

static char *in_dir(const char *name)
{
    return kv_format("%s/%s", dir, name);
}

/* ------------------------------------------------------------------------------------- allocators (policies.md) */
static void test_adjust(void)
{
    static const struct {
        double x[4];
        uint32_t n;
        int64_t total, cap, want[4];
    } V[] = {{{10.7, 3.2, 6.1}, 3, 20, 8, {8, 5, 7}},
             {{20, 9.5, 1.5, 1.0}, 4, 32, 10, {10, 13, 5, 4}},
             {{30, 7.9, 2.1}, 3, 40, 8, {8, 18, 13}}};
    for (size_t i = 0; i < 3; i++) {
        int64_t b[4];
        CHECK(!kv_cake_adjust(V[i].x, V[i].n, V[i].total, V[i].cap, b, NULL));
        for (uint32_t k = 0; k < V[i].n; k++)
            CHECKF(b[k] == V[i].want[k], "vector %zu layer %u: %lld", i, k, (long long)b[k]);
    }
    /* the clamped second vector loses 3 tokens per head */
    double p[4] = {20, 9.5, 1.5, 1.0};
    int64_t b[4], lost = -1;
    CHECK(!kv_cake_budgets(p, 4, 32, 10, false, b, &lost, NULL));
    CHECK(b[0] == 10 && b[1] == 10 && b[2] == 5 && b[3] == 4 && lost == 3);
    double zero[3] = {0, 0, 0};
    CHECK(!kv_cake_budgets(zero, 3, 30, 100, true, b, &lost, NULL));
    CHECKF(b[0] == 10 && b[1] == 10 && b[2] == 10 && lost == 0, "%lld %lld %lld", (long long)b[0], (long long)b[1],
           (long long)b[2]);
}

static void test_pyramid(void)
{
    /* overshoot per head with 32 layers, beta 20, window 8 (policies.md 3.3 a) */
    static const int64_t B[] = {120, 248, 504, 1016, 2040}, OVER[] = {176, 112, 448, 160, 16};
    for (int i = 0; i < 5; i++) {
        int64_t b[32], sum = 0;
        kv_pyramid(B[i], 20, 100000, 32, b);
        for (int l = 0; l < 32; l++) sum += b[l];
        CHECKF(sum - 32 * B[i] == OVER[i], "B=%lld: %lld", (long long)B[i], (long long)(sum - 32 * B[i]));
    }
    /* not monotone: one more token of B costs the last layer 29 (policies.md 3.3, point 5) */
    int64_t a[32], c[32];
    kv_pyramid(81, 20, 100000, 32, a), kv_pyramid(82, 20, 100000, 32, c);
    CHECKF(a[31] - c[31] == 29, "%lld %lld", (long long)a[31], (long long)c[31]);
    kv_pyramid(10, 20, 100, 1, a);
    CHECK(a[0] == 20);
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static void test_flat_topk(void)
{
    kv_rng r = {7};
    for (int round = 0; round < 2000; round++) {
        size_t U = 1 + kv_rng_next(&r) % 5, m = kv_rng_next(&r) % 12;
        uint64_t k = kv_rng_next(&r) % (U * m + 2);
        float x[5 * 12], scale[5];
        uint32_t won[5];
        bool taken[60] = {false}, scaled = round & 1;
        for (size_t i = 0; i < U * m; i++) x[i] = (float)(int)(kv_rng_next(&r) % 7) - 2; /* many ties, some negative */
        for (size_t u = 0; u < U; u++) scale[u] = (float)(1 + kv_rng_next(&r) % 3), qsort(x + u * m, m, 4, descending);
        kv_flat_topk(x, U, m, scaled ? scale : NULL, k, won);
        uint32_t want[5] = {0};
        for (uint64_t i = 0; i < k && i < U * m; i++) { /* take the best, lowest unit then position first */
            size_t best = SIZE_MAX;
            for (size_t j = 0; j < U * m; j++)
                if (!taken[j] &&
                    (best == SIZE_MAX || x[j] * (scaled ? scale[j / m] : 1) > x[best] * (scaled ? scale[best / m] : 1)))
                    best = j;
            taken[best] = true, want[best / m]++;
        }
        bool same = !memcmp(won, want, U * sizeof *won);
        if (!same)
            CHECKF(same, "round %d", round);
        else
            kv_n_pass += round == 1999;
    }
}

static void test_dmath(void)
{
    for (double x = 1e-12; x < 1e12; x *= 1.37) {
        if (!kv_close(kv_log(x), log(x), 1e-15, 1e-14)) CHECKF(false, "log %g", x);
        if (!kv_close(kv_exp(log(x)), x, 0, 1e-13)) CHECKF(false, "exp(log %g)", x);
    }
    CHECK(kv_log(1) == 0 && kv_exp(0) == 1 && kv_pow(3.5, 1) == 3.5);
    CHECK(kv_close(kv_pow(0.3, 2.5), pow(0.3, 2.5), 0, 1e-13));
    CHECK(!kv_close(NAN, 1, 1e9, 1e9));
}

/* ------------------------------------------------------------------------------------- strings */
static void test_spec(void)
{
    kv_spec *s = NULL;
    size_t n = 0;
    kv_error e;
    CHECK(!kv_spec_parse("snapkv:window=16,kernel=5,h2o", &s, &n, &e) && n == 2);
    CHECK(n == 2 && s[0].window == 16 && s[0].kernel == 5 && !strcmp(s[1].row->name, "h2o"));
    CHECK(!kv_spec_parse("snapkv:window=16|32|64,pooling=maxpool|avgpool", &s, &n, &e) && n == 8);
    CHECK(n == 8 && s[2].window == 16 && s[3].window == 16 && s[7].window == 64 && s[3].pooling == KV_POOL_AVG);
    CHECK(!kv_spec_parse("cake:heads=ada,alpha=0.2", &s, &n, &e) && s[8].heads == KV_HEADS_ADA);
    for (size_t i = 0; i < n; i++) { /* the canonical string is itself a policy, and a fixed point */
        kv_spec *again = NULL;
        size_t m = 0;
        CHECK(!kv_spec_parse(s[i].canonical, &again, &m, &e) && m == 1 && !strcmp(again[0].canonical, s[i].canonical));
        for (size_t k = 0; k < m; k++) kv_spec_free(&again[k]);
        free(again);
    }
    CHECK(!strcmp(s[2].ranking_key, s[2].ranking_key) && strcmp(s[2].ranking_key, s[3].ranking_key));
    static const char *const BAD[] = {"",
                                      "snapvk",
                                      "snapkv:window",
                                      "snapkv:windw=3",
                                      "snapkv:window=x",
                                      "snapkv:window=3x",
                                      "snapkv:kernel=4",
                                      "window=3",
                                      "snapkv:window=99999999999",
                                      "cake:tau1=0",
                                      "snapkv:group_reduce=none",
                                      "mask:",
                                      "snapkv:window=",
                                      "snapkv:skip_layers=1+x",
                                      "snapkv:gamma=nan",
                                      "oracle:layers=pool,heads=pool",
                                      ",",
                                      "snapkv,"};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        kv_spec *b = NULL;
        size_t m = 0;
        e.msg[0] = 0;
        CHECKF(kv_spec_parse(BAD[i], &b, &m, &e) == KV_EMISUSE && e.msg[0], "'%s' was taken", BAD[i]);
        for (size_t k = 0; k < m; k++) kv_spec_free(&b[k]);
        free(b);
    }
    for (const kv_policy *p = kv_policies; p->name; p++) { /* every row parses; those that need a file say so */
        char *arg = kv_format("%s%s", p->name, strstr(p->slots, "heads=table") ? ":importance=x.npy" : "");
        CHECKF(!kv_spec_parse(arg, &s, &n, &e), "%s: %s", arg, e.msg);
        free(arg);
    }
    CHECK(kv_spec_parse("headkv", &s, &n, &e) == KV_EMISUSE && strstr(e.msg, "importance"));
    for (size_t i = 0; i < n; i++) kv_spec_free(&s[i]);
    free(s);
}

static void test_budget(void)
{
    kv_budget *b = NULL;
    size_t n = 0;
    kv_error e;
    CHECK(!kv_budget_parse("512,5%,64MiB,ratio=0.9,0,auto", &b, &n, &e) && n == 21);
    CHECK(kv_budget_resolve(&b[0], 640, 256, 30, 3).tokens == 512);
    CHECK(kv_budget_resolve(&b[0], 100, 256, 30, 3).tokens == 100);
    CHECK(kv_budget_resolve(&b[1], 640, 256, 30, 3).tokens == 32);
    CHECK(kv_budget_resolve(&b[1], 3, 256, 30, 3).tokens == 1);
    CHECK(kv_budget_resolve(&b[2], 100000, 256, 30, 3).tokens == (64u << 20) / (256 * 30 * 3));
    CHECK(kv_budget_resolve(&b[3], 640, 256, 30, 3).tokens == 63); /* int(640 * (1 - 0.9)) in double precision */
    CHECK(kv_budget_resolve(&b[4], 640, 256, 30, 3).tokens == 0);
    CHECK(kv_budget_resolve(&b[20], 640, 256, 30, 3).tokens == 640);
    static const char *const BAD[] = {"",    "x",     "5%%", "-1",   "101%",   "ratio=2",
                                      "10x", "1e400", "5,",  "NaN%", "ratio=", "99999999999"};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++)
        CHECKF(kv_budget_parse(BAD[i], &b, &n, &e) == KV_EMISUSE, "'%s' was taken", BAD[i]);
    free(b);
}

/* ------------------------------------------------------------------------------------- replay against brute force */
typedef struct {
    double recall, contested_kept, contested_all, nats, head_error, distance, layer_error;
    bool identity; /* o - o_hat = (1 - R)(mu_E - mu_S) */
} brute;

/* One layer in double, straight from the definitions. kept[h][i] per query head. */
static brute brute_layer(const kv_tiny *s, const kv_tiny_data *t, uint32_t l, const bool *kept)
{
    uint32_t N = s->n_token, P = s->n_prompt, d = s->d, H = s->n_q_head, g = H / s->n_kv_head, w = H * d, rows = N - P;
    brute b = {.identity = true};
    double *p = malloc(N * sizeof *p), *diff = calloc(w, sizeof *diff), *out = calloc(w, sizeof *out);
    for (uint32_t r = P; r < N; r++) {
        for (uint32_t h = 0; h < H; h++) {
            const float *q = t->q + ((size_t)(l * H + h) * N + r) * d,
                        *k = t->k + (size_t)(l * s->n_kv_head + h / g) * N * d,
                        *v = t->v + (size_t)(l * s->n_kv_head + h / g) * N * d;
            double max = -INFINITY, sum = 0, R = 0, n2 = 0, e2 = 0, m2 = 0;
            for (uint32_t i = 0; i <= r; i++) {
                p[i] = 0;
                for (uint32_t j = 0; j < d; j++) p[i] += (double)q[j] * k[i * d + j];
                p[i] /= sqrt(d);
                if (p[i] > max) max = p[i];
            }
            for (uint32_t i = 0; i <= r; i++) sum += p[i] = exp(p[i] - max);
            for (uint32_t i = 0; i <= r; i++) {
                p[i] /= sum;
                bool in = i >= P || kept[h * P + i];
                R += in ? p[i] : 0;
                if (i >= 4 && i + 32 < P) b.contested_all += p[i], b.contested_kept += in ? p[i] : 0;
            }
            for (uint32_t j = 0; j < d; j++) {
                double o = 0, s_in = 0, s_out = 0;
                for (uint32_t i = 0; i <= r; i++) {
                    bool in = i >= P || kept[h * P + i];
                    o += p[i] * v[i * d + j];
                    *(in ? &s_in : &s_out) += p[i] * v[i * d + j];
                }
                double hat = s_in / R;
                if (1 - R > 1e-9 && fabs((o - hat) - (1 - R) * (s_out / (1 - R) - hat)) > 1e-10) b.identity = false;
                diff[h * d + j] = o - hat, out[h * d + j] = o;
                n2 += o * o, e2 += (o - hat) * (o - hat);
                m2 += 1 - R > 1e-9 ? (s_out / (1 - R) - hat) * (s_out / (1 - R) - hat) : 0;
            }
            b.recall += R, b.nats += -log(R), b.head_error += sqrt(e2 / n2), b.distance += sqrt(m2 / n2);
        }
        double num = 0, den = 0;
        for (uint32_t a = 0; a < w; a++) {
            double x = 0, y = 0;
            for (uint32_t c = 0; c < w; c++) {
                double wo = t->wo[((size_t)l * w + a) * w + c];
                x += wo * diff[c], y += wo * out[c];
            }
            num += x * x, den += y * y;
        }
        b.layer_error += sqrt(num / den) / rows;
    }
    free(p), free(diff), free(out);
    b.recall /= rows * H, b.nats /= rows * H, b.head_error /= rows * H, b.distance /= rows * H;
    return b;
}

static const char POLICIES[] =
    "full,random,recency,streaming,knorm,h2o,tova,snapkv,pyramidkv,ada-snapkv,ada-pyramidkv,cake,oracle,oracle-layer,"
    "oracle-global,kvf.snapkv,kvf.adakv,kvpress.snapkv,snapkv:granularity=layer,snapkv:granularity=query_head,"
    "snapkv:protect_sink=4,cake:cascading=0,knorm:granularity=layer,oracle:granularity=query_head";
static const char BUDGETS[] = "0,1,7,10%,50%,100%,100000";

typedef struct {
    kv_trace *trace;
    kv_scene scene;
    kv_spec *spec;
    kv_budget *budget;
    size_t n_spec, n_budget, n;
    kv_plan plan;
    kv_point *point;
    kv_replay rp;
} world;

static kv_status world_open(world *w, const char *path, const char *policies, uint32_t threads, kv_error *e)
{
    *w = (world){0};
    kv_status st = kv_trace_open(path, &w->trace, e);
    if (!st) st = kv_scene_open(w->trace, "prompt", 0, &w->scene, e);
    if (!st) st = kv_spec_parse(policies, &w->spec, &w->n_spec, e);
    if (!st) st = kv_budget_parse(BUDGETS, &w->budget, &w->n_budget, e);
    if (!st) st = kv_plan_build(&w->scene, w->spec, w->n_spec, threads, &w->plan, e);
    if (!st) st = kv_array(&w->point, w->n_spec * w->n_budget, sizeof *w->point, e);
    for (size_t i = 0; i < w->n_spec && !st; i++)
        for (size_t b = 0; b < w->n_budget && !st; b++, w->n++) {
            kv_point *p = &w->point[w->n];
            *p = (kv_point){.spec = i, .budget = b, .c = kv_budget_resolve(&w->budget[b], w->scene.n_cut, 8, 1, 1)};
            st = kv_array(&p->counts, (size_t)w->scene.n_evict * w->plan.ranking[w->plan.ranking_of[i]].n_unit, 4, e);
            if (!st) st = kv_plan_counts(&w->plan, i, &p->c, p->counts, e);
        }
    if (!st) st = kv_replay_run(&w->plan, w->point, w->n, KV_M_ALL, threads, NULL, NULL, &w->rp, e);
    return st;
}

static void world_close(world *w)
{
    for (size_t i = 0; i < w->n; i++) free(w->point[i].counts);
    for (size_t i = 0; i < w->n_spec; i++) kv_spec_free(&w->spec[i]);
    free(w->point), free(w->spec), free(w->budget);
    kv_replay_free(&w->rp), kv_plan_free(&w->plan), kv_scene_close(&w->scene), kv_trace_close(w->trace);
}

static void test_replay(void)
{
    static const kv_tiny SHAPES[] = {
        {2, 4, 2, 8, 60, 50, true, false, 11},   {1, 1, 1, 4, 2, 1, true, false, 12},
        {3, 6, 2, 16, 90, 80, true, false, 13},  {2, 8, 1, 8, 45, 40, true, false, 14},
        {2, 3, 3, 8, 120, 100, true, false, 15}, {2, 4, 2, 8, 70, 60, true, true, 16},
        {1, 2, 1, 8, 20, 3, true, false, 17},
    };
    char *path = in_dir("t.kvt");
    for (size_t k = 0; k < sizeof SHAPES / sizeof *SHAPES; k++) {
        const kv_tiny *s = &SHAPES[k];
        kv_tiny_data data = kv_tiny_make(s);
        kv_error e = {""};
        world w, w2;
        CHECKF(!kv_tiny_write(s, &data, path, &e), "%s", e.msg);
        kv_status st = world_open(&w, path, POLICIES, 1, &e);
        CHECKF(!st, "shape %zu: %s", k, e.msg);
        CHECK(!world_open(&w2, path, POLICIES, 3, &e));
        uint32_t P = s->n_prompt, H = s->n_q_head, g = H / s->n_kv_head, rows = s->n_token - P;
        bool *kept = malloc(H * P * sizeof *kept);
        size_t bad = 0, checked = 0;
        double best[7] = {0}, best_all[7] = {0};
        for (size_t i = 0; i < w.n && !st; i++) {
            const kv_ranking *rk = &w.plan.ranking[w.plan.ranking_of[w.point[i].spec]];
            const char *who = w.spec[w.point[i].spec].canonical, *name = w.spec[w.point[i].spec].row->name;
            double all = 0;
            uint64_t slots = kv_plan_slots(&w.plan, w.point[i].spec, w.point[i].counts);
            for (uint32_t l = 0; l < s->n_layer; l++) {
                memset(kept, 0, H * P * sizeof *kept);
                for (uint32_t h = 0; h < H; h++) {
                    uint32_t u = rk->granularity == KV_GRAN_LAYER ? 0 : rk->granularity == KV_GRAN_KV_HEAD ? h / g : h;
                    uint32_t c = w.point[i].counts[l * rk->n_unit + u];
                    const uint32_t *order = rk->order + ((size_t)l * rk->n_unit + u) * P;
                    for (uint32_t j = 0; j < c; j++) {
                        if (kept[h * P + order[j]]) bad++; /* no position twice */
                        kept[h * P + order[j]] = true;
                    }
                }
                brute b = brute_layer(s, &data, l, kept);
                const kv_head_sums *hs = w.rp.head + (i * s->n_layer + l) * H;
                double recall = 0, nats = 0, err = 0, dist = 0, ck = 0, ca = 0;
                for (uint32_t h = 0; h < H; h++) {
                    recall += hs[h].recall / rows / H, nats += hs[h].nats / rows / H,
                        err += hs[h].head_error / rows / H;
                    dist += hs[h].value_distance / rows / H, ck += hs[h].contested_kept, ca += hs[h].contested_all;
                }
                all += recall / s->n_layer;
                bool ok = b.identity && kv_close(recall, b.recall, 2e-6, 0) && kv_close(nats, b.nats, 1e-5, 1e-5) &&
                          kv_close(err, b.head_error, 1e-5, 1e-4) && kv_close(dist, b.distance, 1e-4, 2e-3) &&
                          kv_close(ck, b.contested_kept, 1e-5, 1e-5) && kv_close(ca, b.contested_all, 1e-5, 1e-5) &&
                          kv_close(w.rp.layer_error[i * s->n_layer + l] / rows, b.layer_error, 1e-5, 1e-4);
                if (!ok)
                    CHECKF(ok,
                           "shape %zu %s %s layer %u: recall %.7f for %.7f, head error %.7f for %.7f, distance %g for "
                           "%g, layer error %.7f for %.7f",
                           k, who, w.budget[w.point[i].budget].text, l, recall, b.recall, err, b.head_error, dist,
                           b.distance, w.rp.layer_error[i * s->n_layer + l] / rows, b.layer_error);
                checked += ok;
                for (uint32_t h = 0; h < H; h++)
                    if (!(hs[h].recall_min >= 0 && hs[h].recall / rows <= 1)) bad++;
            }
            size_t bi = w.point[i].budget;
            if (!strcmp(who, w.spec[12].canonical)) best[bi] = all; /* oracle */
            if (!strcmp(name, "oracle-global")) best_all[bi] = all;
            if (bi >= 5) CHECKF(all == 1, "%s at the full budget: recall %.9f", who, all);
            if (bi && w.point[i].c.tokens >= w.point[i - 1].c.tokens &&
                !strncmp(w.spec[w.point[i].spec].row->nested, "yes", 3)) {
                double before = 0;
                const kv_head_sums *hs = w.rp.head + (i - 1) * s->n_layer * H;
                for (size_t h = 0; h < (size_t)s->n_layer * H; h++) before += hs[h].recall / rows / H / s->n_layer;
                CHECKF(all >= before - 1e-9, "%s: recall falls with the budget, %.9f after %.9f", who, all, before);
            }
            uint64_t nominal = (uint64_t)w.point[i].c.tokens * s->n_layer * s->n_kv_head;
            if (rk->granularity != KV_GRAN_QUERY_HEAD && strncmp(name, "full", 4) && strncmp(name, "pyramid", 7) &&
                strncmp(name, "ada-", 4) && w.spec[w.point[i].spec].guard != KV_GUARD_WINDOW)
                CHECKF(slots <= nominal, "%s: %llu slots for %llu", who, (unsigned long long)slots,
                       (unsigned long long)nominal);
        }
        /* never beaten: uniform counts, same protection */
        for (size_t i = 0; i < w.n && !st; i++) {
            const kv_spec *sp = &w.spec[w.point[i].spec];
            double all = 0;
            const kv_head_sums *hs = w.rp.head + i * s->n_layer * H;
            for (size_t h = 0; h < (size_t)s->n_layer * H; h++) all += hs[h].recall / rows / H / s->n_layer;
            size_t bi = w.point[i].budget;
            bool same = sp->granularity == KV_GRAN_KV_HEAD && sp->window == 32 && !sp->protect_sink && !sp->keep_all &&
                        sp->guard == KV_GUARD_NONE;
            if (same && sp->layers == KV_LAYERS_UNIFORM && sp->heads == KV_HEADS_UNIFORM)
                CHECKF(all <= best[bi] + 1e-6, "%s beats the oracle at %s: %.9f > %.9f", sp->canonical,
                       w.budget[bi].text, all, best[bi]);
            uint64_t nominal = (uint64_t)w.point[i].c.tokens * s->n_layer * s->n_kv_head;
            if (same && kv_plan_slots(&w.plan, w.point[i].spec, w.point[i].counts) <= nominal)
                CHECKF(all <= best_all[bi] + 1e-6, "%s beats oracle-global at %s: %.9f > %.9f", sp->canonical,
                       w.budget[bi].text, all, best_all[bi]);
        }
        CHECKF(bad == 0, "shape %zu: %zu bad", k, bad);
        CHECKF(checked == w.n * s->n_layer, "shape %zu: %zu of %zu", k, checked, w.n * s->n_layer);
        if (!st) { /* the number of threads changes nothing, to the last bit */
            CHECK(!memcmp(w.rp.head, w2.rp.head, w.n * s->n_layer * H * sizeof *w.rp.head));
            CHECK(!memcmp(w.rp.layer_error, w2.rp.layer_error, w.n * s->n_layer * sizeof *w.rp.layer_error));
        }
        free(kept);
        world_close(&w), world_close(&w2);
        kv_tiny_free(&data);
    }
    free(path);
}

/* Tie flood: constant attention keeps the lowest positions behind the window. */
static void test_ties(void)
{
    kv_tiny s = {1, 2, 1, 8, 52, 50, false, true, 5};
    kv_tiny_data data = kv_tiny_make(&s);
    kv_error e = {""};
    char *path = in_dir("flat.kvt");
    world w;
    CHECK(!kv_tiny_write(&s, &data, path, &e));
    CHECKF(!world_open(&w, path, "knorm", 1, &e), "%s", e.msg);
    const uint32_t *o = w.plan.ranking[0].order;
    CHECK(o[0] == 49 && o[31] == 18); /* the window, newest first */
    for (uint32_t i = 0; i < 18; i++) CHECK(o[32 + i] == i);
    world_close(&w);
    kv_tiny_free(&data);
    free(path);
}

/* Whole pages, never more than the budget, and no dropped page better than a kept one. */
static void test_pages(void)
{
    char *path = in_dir("page.kvt");
    kv_error e = {""};
    for (uint64_t seed = 0; seed < 12; seed++) {
        kv_tiny s = {2, 4, 2, 8, 70 + (uint32_t)seed, 64 + (uint32_t)seed, false, seed == 3, 40 + seed};
        kv_tiny_data data = kv_tiny_make(&s);
        world w;
        uint32_t page = 1 + (uint32_t)seed % 9, P = s.n_prompt;
        char *policies = kv_format("snapkv:window=8,page=%u,knorm:window=0,page=%u,cake:window=8,page=%u,ada-snapkv:"
                                   "window=8,page=%u,oracle-global:window=8,page=%u",
                                   page, page, page, page, page);
        CHECK(!kv_tiny_write(&s, &data, path, &e));
        kv_status st = world_open(&w, path, policies, 1, &e);
        CHECKF(!st, "page %u: %s", page, e.msg);
        for (size_t i = 0; i < w.n && !st; i++) {
            const kv_ranking *r = &w.plan.ranking[w.plan.ranking_of[w.point[i].spec]];
            uint32_t C = w.point[i].c.tokens;
            bool whole = true, best = true;
            for (uint32_t k = 0; k < s.n_layer * r->n_unit; k++) {
                uint32_t c = w.point[i].counts[k], in_page[80] = {0};
                const uint32_t *o = r->order + (size_t)k * P;
                for (uint32_t j = 0; j < c; j++) in_page[o[j] / page]++;
                for (uint32_t g = 0; g * page < P; g++)
                    whole &= in_page[g] == 0 || in_page[g] == (P - g * page < page ? P - g * page : page);
                for (uint32_t j = r->n_forced + 1; j < r->n_item; j++) {
                    size_t m = r->n_item - r->n_forced;
                    best &= r->sorted[k * m + j - r->n_forced] <= r->sorted[k * m + j - r->n_forced - 1];
                }
            }
            uint64_t slots = kv_plan_slots(&w.plan, w.point[i].spec, w.point[i].counts),
                     nominal = (uint64_t)C * s.n_layer * s.n_kv_head;
            bool ada = w.spec[w.point[i].spec].heads == KV_HEADS_ADA,
                 cake = w.spec[w.point[i].spec].guard == KV_GUARD_WINDOW;
            CHECKF(whole && best, "page %u, %s at %u", page, w.spec[w.point[i].spec].canonical, C);
            CHECKF(slots <= nominal || ada || cake || C >= P, "page %u, %s at %u: %llu slots", page,
                   w.spec[w.point[i].spec].canonical, C, (unsigned long long)slots);
        }
        world_close(&w);
        kv_tiny_free(&data);
        free(policies);
    }
    free(path);
}

/* The tie class at the cut: all scores equal, so everything kept behind the window is ambiguous. */
static void test_ambiguous(void)
{
    kv_tiny s = {1, 2, 1, 8, 52, 50, false, true, 5};
    kv_tiny_data data = kv_tiny_make(&s);
    kv_error e = {""};
    char *path = in_dir("amb.kvt");
    world w;
    CHECK(!kv_tiny_write(&s, &data, path, &e) && !world_open(&w, path, "knorm,recency", 1, &e));
    for (size_t i = 0; i < w.n; i++) {
        uint64_t tied, kept;
        uint32_t C = w.point[i].c.tokens;
        kv_plan_ambiguous(&w.plan, w.point[i].spec, w.point[i].counts, 0, &tied, &kept);
        CHECKF(kept == C && tied == (w.point[i].spec == 0 && C > 32 && C < 50 ? C - 32 : 0), "C=%u: %llu of %llu", C,
               (unsigned long long)tied, (unsigned long long)kept);
        CHECK((kv_plan_fingerprint(&w.plan, 0, w.point[i % w.n_budget].counts) ==
               kv_plan_fingerprint(&w.plan, 0, w.point[i % w.n_budget].counts)));
    }
    CHECK(kv_plan_fingerprint(&w.plan, 0, w.point[2].counts) != kv_plan_fingerprint(&w.plan, 0, w.point[4].counts));
    world_close(&w);
    kv_tiny_free(&data);
    free(path);
}

/* ------------------------------------------------------------------------------------- database */
static int64_t number(const char *db, const char *sql)
{
    sqlite3 *d = NULL;
    sqlite3_stmt *s = NULL;
    int64_t v = -1;
    if (sqlite3_open_v2(db, &d, SQLITE_OPEN_READONLY, NULL) == SQLITE_OK &&
        sqlite3_prepare_v2(d, sql, -1, &s, NULL) == SQLITE_OK && sqlite3_step(s) == SQLITE_ROW)
        v = sqlite3_column_int64(s, 0);
    sqlite3_finalize(s);
    sqlite3_close(d);
    return v;
}

static void test_results(void)
{
    char *db = in_dir("r.db"), *other = in_dir("other.db"), *text = in_dir("text.db");
    kv_results *r = NULL;
    kv_error e = {""};
    CHECKF(!kv_results_open(db, &r, &e), "%s", e.msg);
    kv_results_close(r);
    CHECK(number(db, "PRAGMA application_id") == 0x4b565452 && number(db, "SELECT count(*) FROM v_metric") == 0);
    CHECK(!kv_results_open(db, &r, &e)); /* again */
    kv_results_close(r);
    sqlite3 *d = NULL;
    CHECK(sqlite3_open(other, &d) == SQLITE_OK && sqlite3_exec(d, "CREATE TABLE x (y)", NULL, NULL, NULL) == SQLITE_OK);
    sqlite3_close(d);
    CHECK(kv_results_open(other, &r, &e) == KV_EFORMAT && strstr(e.msg, "something else"));
    CHECK(!kv_write_file(text, "this is no database, and it is long enough to be looked at", 58, &e));
    CHECK(kv_results_open(text, &r, &e) != KV_OK && strstr(e.msg, "text.db"));
    sqlite3_open(db, &d), sqlite3_exec(d, "PRAGMA user_version = 99", NULL, NULL, NULL), sqlite3_close(d);
    CHECK(kv_results_open(db, &r, &e) == KV_EFORMAT && strstr(e.msg, "99"));
    CHECK(kv_results_open("/nonexistent/x.db", &r, &e) == KV_EIO);
    free(db), free(other), free(text);
}

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    test_adjust();
    test_pyramid();
    test_flat_topk();
    test_dmath();
    test_spec();
    test_budget();
    test_replay();
    test_ties();
    test_pages();
    test_ambiguous();
    test_results();
    char *rm = kv_format("rm -rf %s", dir);
    if (rm && system(rm)) perror("rm");
    free(rm);
    return kv_tally();
}
