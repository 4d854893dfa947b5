/* test_gap.c - where a loss comes from: allocation for a given order against dynamic programming, the parts an oracle
 * takes over against what they promise, and the oracle of each policy's own class. */
#include "sim/oracle.h"
#include "tests/twins.h"

static char dir[32], *path;
#define TOL 1e-5 /* scores are rounded to float once */

/* ------------------------------------------------------------------------------------- given orders */
/* The most that k entries from the fronts of the lists gain, by dynamic programming. */
static double best_fronts(const float *gain, size_t n, size_t m, const uint32_t *len, uint64_t k)
{
    double best[64], next[64];
    for (uint64_t c = 0; c <= k; c++) best[c] = c ? -INFINITY : 0;
    for (size_t i = 0; i < n; i++) {
        for (uint64_t c = 0; c <= k; c++) {
            double sum = 0;
            next[c] = best[c];
            for (uint32_t j = 1; j <= len[i] && j <= c; j++) {
                sum += gain[i * m + j - 1];
                next[c] = fmax(next[c], best[c - j] + sum);
            }
        }
        memcpy(best, next, sizeof best);
    }
    return best[k];
}

/* Never above the optimum, short of it by less than the gain of the list's longest hull segment; the optimum where
 * gains descend; every entry spent. */
static void test_hull(void)
{
    kv_count n = {0};
    size_t exact = 0;
    double share = 0;
    for (uint64_t seed = 1; seed <= 3000; seed++) {
        kv_rng r = {seed};
        size_t N = 1 + kv_dice(&r, 5), m = 1 + kv_dice(&r, 10);
        float gain[5 * 10] = {0};
        uint32_t len[5], won[5], room = 0, used = 0;
        bool descends = seed % 4 == 0, ties = seed % 3 == 0;
        for (size_t i = 0; i < N; i++) {
            room += len[i] = kv_dice(&r, (uint32_t)m + 1);
            for (size_t j = 0; j < m; j++) {
                float x = ties ? (float)kv_dice(&r, 3) : (float)(kv_rng_unit(&r) * pow(8, kv_dice(&r, 3)));
                gain[i * m + j] = descends && j && x > gain[i * m + j - 1] ? gain[i * m + j - 1] : x;
            }
        }
        uint64_t k = kv_dice(&r, room + 3), spend = k < room ? k : room;
        kv_error e = {""};
        double got = 0, worst = 0, want = best_fronts(gain, N, m, len, spend);
        kv_status st = kv_hull_alloc(gain, N, m, len, k, won, &e);
        for (size_t i = 0; i < N && !st; i++) {
            used += won[i];
            for (uint32_t j = 0; j < won[i]; j++) got += gain[i * m + j];
            for (uint32_t a = 0; a < len[i]; a++) { /* no segment gains more than the best run */
                double run = 0;
                for (uint32_t b = a; b < len[i]; b++) worst = fmax(worst, run += gain[i * m + b]);
            }
        }
        bool equal = fabs(got - want) <= 1e-6 * (1 + want);
        kv_gap = 1;
        KV_COMPARE(&n, !st && used == spend && (descends ? equal : got <= want + 1e-6 && got >= want - worst - 1e-6),
                   "seed %d: %.9g, best %.9g, %u of %u", (int)seed, got, want, used, (unsigned)spend);
        exact += equal, share += want > 0 ? got / want : 1;
    }
    kv_judge("hulls against dynamic programming", &n, 3000);
    printf("%.2f %% of the optimum on average, all of it in %.0f %% of the cases\n", share / 30, (double)exact / 30);
}

/* ------------------------------------------------------------------------------------- parts of a policy */
/* What policy i keeps, in mass or in contested recall summed over query heads; slots = entries of the prompt. */
static double value_of(kv_run *run, const kv_world *w, size_t i, uint32_t C, bool contested, uint64_t *slots)
{
    kv_error e = {""};
    uint32_t counts[512], rows = w->N - w->L, U = kv_units(w, run->spec[i].granularity);
    bool *seen = malloc((size_t)U * (rows + 1) * w->N);
    kv_budget_resolved c = kv_tokens(w, C);
    double sum = 0;
    kv_status st = kv_plan_counts(&run->plan, i, &c, counts, &e);
    *slots = 0;
    for (uint32_t l = 0; l < w->n_layer && !st; l++) {
        st = kv_run_seen(run, w, i, &c, counts, l, seen, &e);
        for (uint32_t u = 0; u < U; u++) {
            uint32_t first, n = kv_heads_of(w, run->spec[i].granularity, u, &first);
            *slots += counts[l * U + u];
            for (uint32_t h = first; h < first + n; h++) {
                double kept = 0, all = 0;
                for (uint32_t r = 0; r < rows; r++)
                    for (uint32_t t = 0; t <= w->L + r; t++) {
                        bool in = !contested || (t >= 4 && t + 32 < w->L);
                        all += in ? kv_row(w, l, h, w->L + r)[t] : 0;
                        if (in && seen[((size_t)u * (rows + 1) + r) * w->N + t]) kept += kv_row(w, l, h, w->L + r)[t];
                    }
                sum += contested ? kept / all : kept;
            }
        }
    }
    CHECKF(!st, "%s: %s", run->spec[i].canonical, e.msg);
    free(seen);
    return sum;
}

enum { OWN, R, H, L, RH, RL, HL, RHL, STEPS, N_CORNER };
static const char *const PARTS[N_CORNER] = {"none",
                                            "rank",
                                            "heads",
                                            "layers",
                                            "rank+heads",
                                            "rank+layers",
                                            "heads+layers",
                                            "rank+heads+layers",
                                            "rank+heads+layers+steps"};

/* More freedom never costs anything, at the same slots, for the target the oracle has. */
static void test_corners(void)
{
    static const char *const P[] = {"snapkv:window=3,kernel=3",
                                    "ada-snapkv:window=3,kernel=3",
                                    "pyramidkv:window=3,kernel=3",
                                    "cake:window=3,kernel=3",
                                    "h2o:window=3",
                                    "knorm:window=0",
                                    "random:window=3,granularity=query_head",
                                    "snapkv:window=3,granularity=layer,protect_sink=2",
                                    "snapkv:window=3,layers=pool",
                                    "kvpress.adakv:window=3",
                                    "lava.code:window=3",
                                    "streaming"};
    static const uint8_t PAIR[][2] = {{R, OWN}, {H, OWN},  {L, OWN},  {HL, H},   {HL, L}, {RH, R},
                                      {RL, R},  {RHL, RH}, {RHL, RL}, {RHL, HL}, {RH, H}, {STEPS, RHL}};
    size_t bad = 0, n = 0, moved[N_CORNER] = {0};
    for (uint64_t seed = 1; seed <= 24; seed++) {
        kv_rng r = {seed + 77};
        kv_tiny s = {.n_layer = 1 + kv_dice(&r, 3), .n_kv_head = 1 + kv_dice(&r, 3), .d = 4, .wo = true, .seed = seed};
        s.n_q_head = s.n_kv_head * (1 + kv_dice(&r, 2)), s.n_prompt = 38 + kv_dice(&r, 20);
        s.n_token = s.n_prompt + 1 + kv_dice(&r, 6);
        kv_world w;
        bool open = kv_world_open(&w, path, &s);
        for (size_t k = 0; k < sizeof P / sizeof *P && open; k++) {
            bool contested = (seed + k) % 2;
            char *list = kv_format("%s", P[k]);
            for (int c = 1; c < N_CORNER; c++) {
                char *more = kv_format("%s,%s%soracle=%s%s", list, P[k], strchr(P[k], ':') ? "," : ":", PARTS[c],
                                       contested ? ",target=recall_contested" : "");
                free(list), list = more;
            }
            kv_run run;
            kv_error e = {""};
            kv_status st = kv_run_open(&run, &w, list, &e);
            CHECKF(!st && run.n_spec == N_CORNER, "%s: %s", P[k], e.msg);
            for (uint32_t C = 3; C <= w.L && !st; C += 1 + C / 2) {
                double v[N_CORNER];
                uint64_t slots[N_CORNER];
                for (size_t c = 0; c < N_CORNER; c++) {
                    v[c] = value_of(&run, &w, c, C, contested, &slots[c]);
                    bad += slots[c] != slots[0], moved[c] += v[c] > v[0] * (1 + TOL);
                }
                for (size_t q = 0; q < sizeof PAIR / sizeof *PAIR; q++) {
                    int more = PAIR[q][0], less = PAIR[q][1];
                    bool ok = v[more] >= v[less] - TOL * v[less];
                    n++;
                    if (!ok && bad++ < 5)
                        printf("  %s C %u seed %d: %s %.9g, %s %.9g\n", P[k], C, (int)seed, PARTS[more], v[more],
                               PARTS[less], v[less]);
                }
            }
            kv_run_close(&run), free(list);
        }
        kv_world_close(&w);
    }
    CHECKF(bad == 0 && n > 10000, "%zu of %zu out of order", bad, n);
    for (int c = 1; c < N_CORNER; c++) CHECKF(moved[c] > 20, "oracle=%s hardly ever changes anything", PARTS[c]);
}

/* Best counts over the model for a policy's order, against every way to share the slots. */
static void test_given_order(void)
{
    kv_count n = {0};
    for (uint64_t seed = 1; seed <= 60; seed++) {
        kv_tiny s = {.n_layer = 2, .n_q_head = 2, .n_kv_head = 2, .d = 4, .n_token = 12, .n_prompt = 8, .seed = seed};
        kv_world w;
        kv_run run;
        kv_error e = {""};
        bool open = kv_world_open(&w, path, &s);
        kv_status st = open ? kv_run_open(&run, &w, "knorm:window=1,oracle=heads+layers", &e) : KV_EIO;
        CHECKF(!st, "%s", e.msg);
        const kv_ranking *own = &run.plan.ranking[run.plan.ranking_of[0]];
        for (uint32_t C = 1; C <= 8 && !st; C++) {
            uint64_t slots;
            float gain[4 * 7];
            uint32_t len[4] = {7, 7, 7, 7};
            double want = 0, run_gain = 0;
            for (uint32_t u = 0; u < 4; u++)
                for (uint32_t j = 0; j < 8; j++) {
                    double x = 0;
                    for (uint32_t t = 8; t < 12; t++) x += kv_row(&w, u / 2, u % 2, t)[own->order[u * 8 + j]];
                    if (j) gain[u * 7 + j - 1] = (float)x;
                    run_gain = fmax(run_gain, x);
                    if (!j) want += x; /* the protected one */
                    for (uint32_t t = 8; t < 12 && j == 0; t++)
                        for (uint32_t i = 8; i <= t; i++) want += kv_row(&w, u / 2, u % 2, t)[i];
                }
            want += best_fronts(gain, 4, 7, len, 4 * (C - 1));
            double got = value_of(&run, &w, 0, C, false, &slots);
            kv_gap = 1;
            KV_COMPARE(&n, slots == 4 * C && got <= want * (1 + TOL) && got >= want - 7 * run_gain - TOL * want,
                       "seed %d C %u: %.9g, best %.9g", (int)seed, C, got, want);
        }
        kv_run_close(&run), kv_world_close(&w);
    }
    kv_judge("counts for a given order", &n, 480);
}

/* observe=future: the scorer of the row itself, on rows of the future. */
static void test_observe(void)
{
    kv_count n = {0};
    for (uint64_t seed = 1; seed <= 30; seed++) {
        kv_tiny s = {.n_layer = 1, .n_q_head = 4, .n_kv_head = 2, .d = 4, .n_prompt = 20, .seed = seed};
        s.n_token = 20 + 1 + (uint32_t)seed % 7;
        uint32_t rows = s.n_token - 20, win = 4;
        kv_world w;
        kv_run run;
        kv_error e = {""};
        bool open = kv_world_open(&w, path, &s);
        kv_status st =
            open ? kv_run_open(&run, &w,
                               "snapkv:window=4,kernel=3,observe=future,snapkv:window=4,kernel=3,oracle=window,"
                               "h2o:window=4,observe=future",
                               &e)
                 : KV_EIO;
        CHECKF(!st, "%s", e.msg);
        for (uint32_t u = 0; u < 2 && !st; u++)
            for (int colsum = 0; colsum < 2; colsum++) {
                double x[20] = {0};
                bool in[20];
                for (uint32_t h = 2 * u; h < 2 * u + 2; h++)
                    for (uint32_t k = 0; k < (colsum ? rows : win); k++)
                        for (uint32_t i = 0; i < 16; i++)
                            x[i] += kv_row(&w, 0, h, 20 + (colsum ? k : k * rows / win))[i];
                double smooth[20];
                for (int i = 0; i < 16; i++) {
                    smooth[i] = x[i];
                    for (int j = i - 1; j <= i + 1 && !colsum; j++)
                        if (j >= 0 && j < 16) smooth[i] = fmax(smooth[i], x[j]);
                }
                kv_gap = 1;
                kv_top(smooth, 16, 5, in);
                for (size_t i = colsum ? 2 : 0; i < (colsum ? 3u : 2u); i++) {
                    const uint32_t *order = run.plan.ranking[run.plan.ranking_of[i]].order + u * 20;
                    bool same = true;
                    for (uint32_t k = 4; k < 9; k++) same &= in[order[k]];
                    KV_COMPARE(&n, same, "seed %d unit %u %s", (int)seed, u, run.spec[i].canonical);
                }
            }
        CHECK(st || run.plan.count_of[1] != run.plan.ranking_of[1]);
        kv_run_close(&run), kv_world_close(&w);
    }
    kv_judge("rows of the future", &n, 180);
}

/* ------------------------------------------------------------------------------------- the oracle of the class */
/* Every row that needs no file: its class has words; at slots within the budget the oracle named is not beaten. */
static void test_class(void)
{
    size_t bad = 0, n = 0, named = 0;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        kv_tiny s = {.n_layer = 3, .n_q_head = 4, .n_kv_head = 2, .d = 8, .wo = true, .seed = seed + 5};
        s.n_prompt = 90 + (uint32_t)seed * 11, s.n_token = s.n_prompt + 9;
        kv_world w;
        kv_world_make(&w, &s);
        w.t.xnorm = malloc(3 * s.n_token * sizeof *w.t.xnorm);
        for (size_t i = 0; i < 3 * s.n_token; i++) w.t.xnorm[i] = 1;
        bool open = kv_world_open_data(&w, path);
        for (const kv_policy *p = kv_policies; p->name && open; p++) {
            kv_spec *one = NULL;
            size_t n_one = 0;
            kv_error e = {""};
            char *spec = NULL, *class = NULL, *list = NULL;
            kv_status st = kv_spec_parse(p->name, &one, &n_one, &e);
            if (!st && one->window > 32) st = kv_spec_set(one, "window", "32", &e);
            if (!st) st = kv_spec_seal(one, &e);
            if (!st) st = kv_oracle_of(one, &spec, &class, &e);
            CHECKF(st == KV_EMISUSE || (!st && class), "%s: %s", p->name, e.msg);
            named += spec != NULL;
            kv_run run = {0};
            if (!st && spec) list = kv_format("%s,%s", one->canonical, spec);
            if (list && !kv_run_open(&run, &w, list, &e))
                for (uint32_t C = 34; C <= w.L; C += 13) {
                    uint64_t slots[2];
                    double v = value_of(&run, &w, 0, C, false, &slots[0]),
                           best = value_of(&run, &w, 1, C, false, &slots[1]);
                    uint32_t units = w.n_layer * kv_units(&w, one->granularity);
                    if (slots[0] > (uint64_t)C * units) continue; /* overspent */
                    n++;
                    if (!(v <= best * (1 + TOL)) && bad++ < 5)
                        printf("  %s C %u: %.9g, %s has %.9g\n", p->name, C, v, spec, best);
                }
            kv_run_close(&run);
            for (size_t k = 0; k < n_one; k++) kv_spec_free(&one[k]);
            free(one), free(spec), free(class), free(list);
        }
        kv_world_close(&w);
    }
    CHECKF(bad == 0 && n > 700 && named > 180, "%zu of %zu beat the oracle of their class, %zu named", bad, n, named);
}

static void test_refused(void)
{
    static const char *const BAD[] = {
        "knorm:oracle=window",     "knorm:observe=future",      "snapkv:oracle=window+rank",
        "criticalkv:oracle=heads", "defensivekv:oracle=layers", "mixdim.ours:oracle=rank",
        "oracle:target=x"};
    kv_refuses(BAD, sizeof BAD / sizeof *BAD);
}

int main(void)
{
    if (!kv_scratch(dir)) return 1;
    path = kv_format("%s/t.kvt", dir);
    test_hull();
    test_corners();
    test_given_order();
    test_observe();
    test_class();
    test_refused();
    kv_scratch_remove(dir);
    free(path);
    return kv_tally();
}
