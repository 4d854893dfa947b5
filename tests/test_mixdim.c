/* test_mixdim.c - mixdim.ours: bases, ranks against every assignment, and the replay against plain double loops. */
#include <unistd.h>

#include "sim/mixdim.h"
#include "sim/replay.h"
#define kv_value kv_value_row /* metric.h has a type of that name */
#include "tests/twins.h"

static char dir[] = "/tmp/kvtest.XXXXXX";
static char *trace_path;
enum { MAX_TOKEN = 64, MAX_D = 24 };

/* Rows orthonormal, B M B^T diagonal and descending. */
static void test_basis(void)
{
    static const size_t SHAPES[][2] = {{1, 1}, {3, 8}, {40, 8}, {200, 64}, {20, 24}, {5, 3}};
    kv_error e = {""};
    kv_rng g = {3};
    for (size_t s = 0; s < 6; s++)
        for (int kind = 0; kind < 3; kind++) { /* random with a strong mean, all equal, zero */
            size_t n = SHAPES[s][0], d = SHAPES[s][1];
            float *x = malloc(n * d * sizeof *x);
            double *b = malloc(d * d * sizeof *b), *again = malloc(d * d * sizeof *b), worst = 0, trace = 0, off = 0;
            double last = INFINITY;
            bool falls = true;
            for (size_t i = 0; i < n * d; i++)
                x[i] = kind == 2 ? 0 : kind ? 2 : (float)kv_rng_normal(&g) + (float)(i % d == 0 ? 20 : 0);
            CHECKF(!kv_mixdim_basis(n, d, x, b, &e) && !kv_mixdim_basis(n, d, x, again, &e), "%s", e.msg);
            CHECK(!memcmp(b, again, d * d * sizeof *b));
            for (size_t i = 0; i < n * d; i++) trace += (double)x[i] * x[i];
            for (size_t p = 0; p < d; p++)
                for (size_t q = 0; q < d; q++) {
                    double dot = 0, m = 0;
                    for (size_t j = 0; j < d; j++) dot += b[p * d + j] * b[q * d + j];
                    worst = fmax(worst, fabs(dot - (p == q)));
                    for (size_t i = 0; i < n; i++) {
                        double cp = 0, cq = 0;
                        for (size_t j = 0; j < d; j++)
                            cp += b[p * d + j] * x[i * d + j], cq += b[q * d + j] * x[i * d + j];
                        m += cp * cq;
                    }
                    if (p != q) off = fmax(off, fabs(m));
                    if (p == q) falls &= m <= last + 1e-12 * trace, last = m;
                }
            CHECKF(worst < 1e-12 && off <= 1e-12 * trace && falls, "shape %zu kind %d: %g %g", s, kind, worst, off);
            free(x), free(b), free(again);
        }
}

/* Every assignment of ranks to a few tokens: the greedy one is never over the budget, falls with it, is never better
 * than the best and is the best wherever it spends everything without leaving a step out. */
static void test_allot(void)
{
    kv_rng g = {11};
    kv_error e = {""};
    size_t best_hits = 0, over = 0, rises = 0, beats = 0, far = 0;
    for (int round = 0; round < 40; round++) {
        enum { N = 4 };
        uint32_t d = 8u << (round % 2), rank[KV_MIXDIM_RANKS], R = kv_mixdim_ranks(d, rank), out[N];
        double loss[N * KV_MIXDIM_RANKS], last = INFINITY, biggest = 0;
        CHECK(R == 5 && rank[1] == d / 8 && rank[4] == d);
        for (int i = 0; i < N; i++) {
            loss[i * 5 + 4] = 0;
            for (int k = 3; k >= 0; k--) loss[i * 5 + k] = loss[i * 5 + k + 1] + kv_rng_unit(&g);
            for (int k = 0; k < 4; k++) biggest = fmax(biggest, loss[i * 5 + k]);
        }
        for (uint64_t budget = 0; budget <= N * d + 3; budget++) {
            CHECK(!kv_mixdim_allot(N, R, rank, loss, budget, out, &e));
            double got = 0, best = INFINITY;
            uint64_t cost = 0;
            for (int i = 0; i < N; i++) got += loss[i * 5 + out[i]], cost += rank[out[i]];
            for (int code = 0; code < 625; code++) {
                double x = 0;
                uint64_t c = 0;
                for (int i = 0, k = code; i < N; i++, k /= 5) x += loss[i * 5 + k % 5], c += rank[k % 5];
                if (c <= budget && x < best) best = x;
            }
            over += cost > budget, rises += got > last + 1e-12, beats += got < best - 1e-12;
            far += got > best + biggest; /* one step of one token at most */
            best_hits += got <= best + 1e-12;
            last = got;
            if (budget >= N * d) CHECK(got == 0 && cost == N * d);
        }
    }
    CHECKF(!over && !rises && !beats && !far, "over %zu, rises %zu, beats %zu, far %zu", over, rises, beats, far);
    CHECKF(best_hits > 400, "the best assignment %zu times only", best_hits);

    uint32_t rank[KV_MIXDIM_RANKS], R = kv_mixdim_ranks(8, rank), out[5];
    double same[25], none[25] = {0};
    for (int i = 0; i < 25; i++) same[i] = (double[]){10, 5, 3, 1, 0}[i % 5];
    CHECK(!kv_mixdim_allot(5, R, rank, same, 3, out, &e)); /* ties by position */
    CHECK(out[0] == 1 && out[1] == 1 && out[2] == 1 && !out[3] && !out[4]);
    CHECK(!kv_mixdim_allot(5, R, rank, same, 7, out, &e)); /* all one step, then the first two the next */
    CHECK(out[0] == 2 && out[1] == 2 && out[2] == 1 && out[4] == 1);
    CHECK(!kv_mixdim_allot(5, R, rank, none, 17, out, &e)); /* nothing to lose: whole tokens in order */
    CHECK(out[0] == 4 && out[1] == 4 && out[2] == 1 && !out[3]);
    /* a step that does not fit gives way to a shorter one of less use */
    const double two[10] = {9, 9, 9, 9, 0, 1, 0.5, 0.5, 0.5, 0.5};
    CHECK(!kv_mixdim_allot(2, R, rank, two, 7, out, &e) && !out[0] && out[1] == 3);
    CHECK(!kv_mixdim_allot(2, R, rank, two, 8, out, &e) && out[0] == 4 && !out[1]);
    CHECK(kv_mixdim_ranks(4, rank) == 4 && rank[1] == 1 && rank[3] == 4);
    CHECK(kv_mixdim_ranks(1, rank) == 2 && rank[1] == 1);
}

/* ------------------------------------------------------------------------------------- the replay */
typedef struct {
    kv_spec *spec;
    kv_budget *budget;
    size_t n_spec, n_budget;
    kv_plan plan;
    kv_point *point;
    kv_replay rp;
} replayed;

static kv_status replay(const kv_scene *sc, const char *policy, const char *budgets, uint32_t threads, replayed *x,
                        kv_error *e)
{
    *x = (replayed){0};
    kv_status st = kv_spec_parse(policy, &x->spec, &x->n_spec, e);
    if (!st) st = kv_budget_parse(budgets, &x->budget, &x->n_budget, e);
    if (!st) st = kv_plan_build(sc, x->spec, x->n_spec, threads, &x->plan, e);
    if (!st) st = kv_array(&x->point, x->n_budget, sizeof *x->point, e);
    for (size_t b = 0; b < x->n_budget && !st; b++) {
        kv_point *p = &x->point[b];
        *p = (kv_point){.budget = b, .c = kv_budget_resolve(&x->budget[b], sc->n_cut, 8, 1, 1)};
        st = kv_array(&p->counts, (size_t)sc->n_evict * x->plan.ranking[0].n_unit, sizeof *p->counts, e);
        if (!st) st = kv_plan_counts(&x->plan, 0, &p->c, p->counts, e);
    }
    if (!st) st = kv_replay_run(&x->plan, x->point, x->n_budget, KV_M_ALL, threads, NULL, NULL, &x->rp, e);
    return st;
}

static void replay_free(replayed *x)
{
    for (size_t b = 0; b < x->n_budget && x->point; b++) free(x->point[b].counts);
    for (size_t i = 0; i < x->n_spec; i++) kv_spec_free(&x->spec[i]);
    free(x->point), free(x->spec), free(x->budget);
    kv_replay_free(&x->rp), kv_plan_free(&x->plan);
}

static double projected(const double *basis, uint32_t d, uint32_t r, const float *x, double *to)
{
    double e2 = 0;
    for (uint32_t a = 0; a < d; a++) to[a] = r == d ? x[a] : 0;
    for (uint32_t j = 0; j < r && r < d; j++) {
        double c = 0;
        for (uint32_t a = 0; a < d; a++) c += basis[j * d + a] * x[a];
        for (uint32_t a = 0; a < d; a++) to[a] += c * basis[j * d + a];
    }
    for (uint32_t a = 0; a < d; a++) e2 += (x[a] - to[a]) * (x[a] - to[a]);
    return sqrt(e2);
}

typedef struct {
    uint32_t rank[MAX_TOKEN]; /* dimensions */
    double k[MAX_TOKEN][MAX_D], v[MAX_TOKEN][MAX_D];
    uint64_t spent;
} head_cache;

/* One KV head at C slots: steps are picked one by one, the best of all tokens each time. */
static void twin(const kv_world *w, uint32_t l, uint32_t u, uint32_t C, uint32_t window, head_cache *o)
{
    uint32_t L = w->L, d = w->d, rank[5] = {0}, R = 1, at[MAX_TOKEN] = {0}, whole = window < C ? window : C;
    double kb[MAX_D * MAX_D], vb[MAX_D * MAX_D], loss[MAX_TOKEN][5], full[MAX_D] = {0};
    bool shut[MAX_TOKEN] = {false};
    kv_error e = {""};
    if (whole > L) whole = L;
    for (uint32_t f = 8; f; f /= 2)
        if (d / f > rank[R - 1]) rank[R++] = d / f;
    CHECK(!kv_mixdim_basis(L, d, kv_key(w, l, u, 0), kb, &e) &&
          !kv_mixdim_basis(L, d, kv_value_at(w, l, u, 0), vb, &e));
    for (uint32_t t = 0; t < L; t++) {
        double a = 0, nk = projected(kb, d, 0, kv_key(w, l, u, t), full),
               nv = projected(vb, d, 0, kv_value_at(w, l, u, t), full);
        for (uint32_t r = L > window ? L - window : 0; r < L; r++)
            for (uint32_t h = u * w->g; h < (u + 1) * w->g; h++)
                a += kv_row(w, l, h, r)[t] / ((window < L ? window : L) * w->g);
        for (uint32_t k = 0; k < R; k++)
            loss[t][k] = a * (projected(vb, d, rank[k], kv_value_at(w, l, u, t), full) +
                              projected(kb, d, rank[k], kv_key(w, l, u, t), full) * nv / nk);
        shut[t] = t + window >= L;
        if (t + whole >= L) at[t] = R - 1;
    }
    uint64_t left = C < L ? (uint64_t)(C - whole) * d : (uint64_t)(L - whole) * d;
    o->spent = whole * d;
    for (;;) {
        double best = -1, second = -1;
        uint32_t who = 0, to = 0;
        for (uint32_t t = 0; t < L; t++) {
            double own = -1;
            uint32_t next = 0;
            for (uint32_t k = at[t] + 1; k < R && !shut[t]; k++) {
                double s = (loss[t][at[t]] - loss[t][k]) / (rank[k] - rank[at[t]]);
                if (next) kv_close_call(s, own);
                if (s > own) own = s, next = k;
            }
            if (next && own > best)
                second = best, best = own, who = t, to = next;
            else if (next && own > second)
                second = own;
        }
        if (!to) break;
        if (left < 2 * d && second >= 0) kv_close_call(best, second);
        uint32_t cost = rank[to] - rank[at[who]];
        if (cost > left)
            shut[who] = true;
        else
            left -= cost, o->spent += cost, at[who] = to;
    }
    for (uint32_t t = 0; t < w->N; t++) {
        o->rank[t] = t < L ? rank[at[t]] : d;
        projected(kb, d, o->rank[t], kv_key(w, l, u, t), o->k[t]);
        projected(vb, d, o->rank[t], kv_value_at(w, l, u, t), o->v[t]);
    }
}

static size_t compared, near, partial;

static void against_twin(const kv_tiny *s, uint32_t window)
{
    kv_world w;
    kv_error e = {""};
    replayed x, y;
    char policy[64];
    snprintf(policy, sizeof policy, "mixdim.ours:window=%u", window);
    if (!kv_world_open(&w, trace_path, s)) return;
    CHECKF(!replay(&w.scene, policy, "0,1,3,6,10,17,100%", 1, &x, &e), "%s", e.msg);
    CHECK(!replay(&w.scene, policy, "0,1,3,6,10,17,100%", 3, &y, &e));
    CHECK(!memcmp(x.rp.head, y.rp.head, x.n_budget * w.n_layer * w.H * sizeof *x.rp.head));
    for (size_t b = 0; b < x.n_budget; b++)
        for (uint32_t l = 0; l < w.n_layer; l++) {
            static double diff[MAX_TOKEN][256], plain[MAX_TOKEN][256];
            uint32_t C = x.point[b].c.tokens, d = w.d, rows = w.N - w.L, width = w.H * d;
            uint64_t slots = 0;
            double layer = 0, recall[32] = {0}, error[32] = {0}, moved[32] = {0};
            bool ok = true;
            kv_gap = INFINITY;
            for (uint32_t u = 0; u < w.U; u++) {
                static head_cache o;
                twin(&w, l, u, C, window, &o);
                CHECKF(o.spent <= (uint64_t)C * d, "twin spends %llu", (unsigned long long)o.spent);
                uint32_t want = (uint32_t)((o.spent + d - 1) / d), got = x.point[b].counts[l * w.U + u];
                if (kv_gap >= KV_NEAR) CHECKF(got == want && got <= C, "slots %u for %u of %u", got, want, C);
                slots += got;
                for (uint32_t t = 0; t < w.L; t++) partial += o.rank[t] && o.rank[t] < d;
                for (uint32_t h = u * w.g; h < (u + 1) * w.g; h++)
                    for (uint32_t r = w.L; r < w.N; r++) {
                        const double *a = kv_row(&w, l, h, r);
                        const float *q = w.t.q + (((size_t)l * w.H + h) * w.N + r) * d;
                        double p[MAX_TOKEN], sum = 0, e2 = 0, o2 = 0;
                        for (uint32_t t = 0; t <= r; t++) {
                            double z = 0;
                            for (uint32_t j = 0; j < d; j++) z += q[j] * o.k[t][j];
                            sum += p[t] = o.rank[t] ? exp(z / sqrt(d)) : 0;
                        }
                        for (uint32_t t = 0; t <= r; t++) {
                            moved[h] += fabs(a[t] - p[t] / sum) / 2 / rows;
                            if (o.rank[t]) recall[h] += a[t] / rows;
                        }
                        for (uint32_t j = 0; j < d; j++) {
                            double full = 0, hat = 0;
                            for (uint32_t t = 0; t <= r; t++)
                                full += a[t] * kv_value_at(&w, l, u, t)[j], hat += p[t] / sum * o.v[t][j];
                            diff[r - w.L][h * d + j] = full - hat, plain[r - w.L][h * d + j] = full;
                            e2 += (full - hat) * (full - hat), o2 += full * full;
                        }
                        error[h] += sqrt(e2 / o2) / rows;
                    }
            }
            for (uint32_t r = 0; r < rows; r++) {
                double num = 0, den = 0;
                for (uint32_t i = 0; i < width; i++) {
                    double y0 = 0, y1 = 0;
                    for (uint32_t j = 0; j < width; j++) {
                        double wo = w.t.wo[((size_t)l * width + i) * width + j];
                        y0 += wo * diff[r][j], y1 += wo * plain[r][j];
                    }
                    num += y0 * y0, den += y1 * y1;
                }
                layer += sqrt(num / den) / rows;
            }
            const kv_row_slots *rs = &x.rp.rows[b * w.n_layer + l];
            CHECK(rs->peak == slots + (uint64_t)rows * w.U);
            for (uint32_t h = 0; h < w.H; h++) {
                const kv_head_sums *g = &x.rp.head[(b * w.n_layer + l) * w.H + h];
                if (C >= w.L) /* every rank is d: exact */
                    CHECK(g->recall == rows && g->head_error == 0 && g->total_variation == 0 && g->n_whole == rows);
                ok &= kv_close(g->recall / rows, recall[h], 1e-5, 0) &&
                      kv_close(g->head_error / rows, error[h], 1e-5, 1e-4) &&
                      kv_close(g->total_variation / rows, moved[h], 1e-5, 1e-4);
            }
            double got = x.rp.layer_error[b * w.n_layer + l] / rows;
            ok &= kv_close(got, layer, 1e-5, 1e-4);
            if (C >= w.L) CHECK(got == 0 && slots == (uint64_t)w.L * w.U);
            if (kv_gap < KV_NEAR) {
                near++;
                continue;
            }
            compared++;
            CHECKF(ok, "seed %llu C=%u layer %u: layer error %.8f for %.8f", (unsigned long long)s->seed, C, l, got,
                   layer);
        }
    replay_free(&x), replay_free(&y);
    kv_world_close(&w);
}

static void test_replay(void)
{
    static const uint32_t D[] = {8, 16, 4, 24, 10, 1};
    for (uint64_t seed = 0; seed < 24; seed++) {
        uint32_t U = 1 + (uint32_t)seed % 3, g = 1 + (uint32_t)(seed / 3) % 2;
        kv_tiny s = {.n_layer = 2, .n_q_head = U * g, .n_kv_head = U, .d = D[seed % 6], .wo = true, .seed = 500 + seed};
        s.n_prompt = 20 + (uint32_t)seed, s.n_token = s.n_prompt + 3 + (uint32_t)seed % 5;
        against_twin(&s, 1 + (uint32_t)seed % 7);
    }
    CHECKF(compared > 250 && near * 10 < compared, "%zu compared, %zu near ties", compared, near);
    CHECKF(partial > 1000, "%zu tokens in part", partial);
}

/* All keys equal and all scores tie: one direction holds every key. Nothing may be NaN. */
static void test_flat(void)
{
    kv_tiny s = {1, 2, 1, 8, 44, 40, true, true, 5};
    kv_world w;
    kv_error e = {""};
    replayed x;
    if (!kv_world_open(&w, trace_path, &s)) return;
    memset(w.t.v, 0, (size_t)w.N * w.d * sizeof *w.t.v); /* no value: no loss either */
    kv_scene_close(&w.scene), kv_trace_close(w.trace), free(w.a);
    if (!kv_world_open_data(&w, trace_path)) return;
    CHECKF(!replay(&w.scene, "mixdim.ours:window=4", "2,10,39", 1, &x, &e), "%s", e.msg);
    for (size_t b = 0; b < 3; b++)
        for (uint32_t h = 0; h < 2; h++) {
            const kv_head_sums *g = &x.rp.head[b * 2 + h];
            CHECKF(g->head_error == 0 && isfinite(g->recall) && isfinite(g->total_variation) &&
                       x.point[b].counts[0] == x.point[b].c.tokens,
                   "error %g recall %g", g->head_error, g->recall);
        }
    CHECK(x.rp.head[2].recall > x.rp.head[0].recall && x.rp.head[4].recall > x.rp.head[2].recall);
    replay_free(&x), kv_world_close(&w);
}

static void test_refused(void)
{
    static const char *const NO[] = {"mixdim.ours:granularity=layer", "mixdim.ours:granularity=query_head",
                                     "mixdim.ours:page=4", "mixdim.ours:decode=tova"};
    kv_refuses(NO, sizeof NO / sizeof *NO);
}

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    trace_path = kv_format("%s/t.kvt", dir);
    test_basis();
    test_allot();
    test_replay();
    test_flat();
    test_refused();
    unlink(trace_path), rmdir(dir), free(trace_path);
    return kv_tally();
}
