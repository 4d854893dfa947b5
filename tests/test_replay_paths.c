/* test_replay_paths.c - every row of the policy table, measured the fast way and the slow one.
 *
 *   together = alone   all policies and budgets in one replay give the bytes of every point replayed by itself
 *   definition         what walks a ranking: recall, contested recall and head error of the _ref kernels, row by row,
 * in the order of the ranking, to the last bit brute force        recall, head error and layer error of the kept sets
 * in plain double loops, to 1e-6 local              recall from recorded log-sum-exps, where only kept slots are read,
 * to 1e-6 */
#include "kernels/kernels.h"
#include "sim/replay.h"
#include "tests/twins.h"
#include "traces/npy.h"

enum { LAYERS = 3, HQ = 6, HKV = 2, D = 8, L = 140, N = 149, T = N - L, W = HQ * D, BUDGETS = 4, POLICIES_MAX = 128 };
static const uint32_t BUDGET[BUDGETS] = {6, 45, 90, 139};
static char dir[32];

/* ------------------------------------------------------------------------------------------------ the table's rows */
static char *file(const char *name, uint32_t rank, const size_t *shape, float bias)
{
    size_t n = 1;
    kv_error e = {""};
    for (uint32_t i = 0; i < rank; i++) n *= shape[i];
    float *x = malloc(n * sizeof *x);
    kv_rng r = {n};
    for (size_t i = 0; i < n; i++) x[i] = bias + (float)kv_rng_normal(&r);
    char *path = kv_format("%s/%s.npy", dir, name);
    CHECKF(!kv_npy_write(path, "<f4", rank, shape, x, &e), "%s", e.msg);
    free(x);
    return path;
}

/* The row's name with the files it asks for. */
static char *argument(const kv_policy *p)
{
    static const struct {
        const char *slot, *name;
        uint32_t rank;
        size_t shape[4];
        float bias;
    } FILES[] = {{"heads=table", "importance", 2, {LAYERS, HQ}, 9},
                 {"score=qfilter", "filters", 3, {LAYERS, HKV, D}, 0},
                 {"heads=duo", "pattern", 2, {LAYERS, HKV}, 0},
                 {"layers=squeeze", "cosine", 1, {LAYERS}, 0}};
    char *arg = kv_format("%s", p->name);
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++) {
        if (!strstr(p->slots, FILES[i].slot)) continue;
        char *path = file(FILES[i].name, FILES[i].rank, FILES[i].shape, FILES[i].bias);
        char *more = kv_format("%s:%s=%s", arg, FILES[i].name, path);
        free(arg), free(path);
        arg = more;
    }
    if (strstr(p->slots, "score=expected_stats")) {
        char *mean = file("mean", 3, (size_t[]){LAYERS, HQ, D}, 0),
             *cov = file("cov", 4, (size_t[]){LAYERS, HQ, D, D}, 0);
        char *more = kv_format("%s:mean=%s,cov=%s", arg, mean, cov);
        free(arg), free(mean), free(cov);
        arg = more;
    }
    return arg;
}

typedef struct {
    kv_spec *spec;
    kv_plan plan;
    size_t n_spec, n;
    kv_point *point;
    kv_replay rp;
} replayed;

static void close_it(replayed *x)
{
    for (size_t i = 0; i < x->n; i++) free(x->point[i].counts);
    for (size_t i = 0; i < x->n_spec; i++) kv_spec_free(&x->spec[i]);
    free(x->spec), free(x->point), kv_replay_free(&x->rp), kv_plan_free(&x->plan);
}

/* Budgets first..last of these policies. */
static kv_status replay(const kv_scene *sc, const char *const *policies, size_t n, int first, int last,
                        kv_metric_set wanted, replayed *x, kv_error *e)
{
    *x = (replayed){0};
    kv_status st = KV_OK;
    for (size_t i = 0; i < n && !st; i++) st = kv_spec_parse(policies[i], &x->spec, &x->n_spec, e);
    if (!st) st = kv_plan_build(sc, x->spec, x->n_spec, 2, &x->plan, e);
    if (!st) st = kv_array(&x->point, x->n_spec * BUDGETS, sizeof *x->point, e);
    for (size_t i = 0; i < x->n_spec && !st; i++)
        for (int b = first; b <= last && !st; b++) {
            kv_point *p = &x->point[x->n++];
            kv_budget budget = {.kind = KV_BUDGET_TOKENS, .value = BUDGET[b]};
            *p = (kv_point){.spec = i, .budget = (size_t)b, .c = kv_budget_resolve(&budget, sc->n_cut, 8, 1, 1)};
            st = kv_array(&p->counts, (size_t)sc->n_evict * x->plan.ranking[x->plan.ranking_of[i]].n_unit, 4, e);
            if (!st) st = kv_plan_counts(&x->plan, i, &p->c, p->counts, e);
        }
    if (!st) st = kv_replay_run(&x->plan, x->point, x->n, wanted, 2, NULL, NULL, &x->rp, e);
    return st;
}

/* ------------------------------------------------------------------------------------------------ the slow ways */
static bool in_contest(uint32_t i)
{
    return i >= 4 && i + 32 < L;
}

/* Sums of one head whose kept set is the first `count` of order, from the definitions of kernels.h. */
static kv_head_sums by_definition(const kv_world *w, uint32_t l, uint32_t h, const uint32_t *order, uint32_t count)
{
    static float p[N * 16], o[T * D], out[T * D], part[T * D], base[T * D], lse[16];
    double mass[T] = {0}, cmass[T] = {0}, base_mass[T], error2[T], dot[T];
    uint32_t late[N];
    uint8_t flag[N];
    kv_attn_shape s = {T, N, D, L, 0, w->scene.info->scale, 0};
    const float *v = kv_value_at(w, l, h / w->g, 0);
    kv_head_sums sum = {.n = T};
    for (uint32_t i = 0; i < N; i++) late[i] = (L + i) % N, flag[i] = in_contest(i);
    kv_probs_turned_ref(&s, 1, w->t.q + ((l * w->H + h) * (size_t)N + L) * D, 0, kv_key(w, l, h / w->g, 0), p, 16, lse);
    memset(out, 0, sizeof out), memset(part, 0, sizeof part);
    kv_walk_ref(T, D, p, 16, v, 0, T, late, flag, mass, NULL, out, part);
    for (size_t i = 0; i < T * D; i++) base[i] = out[i] + part[i];
    memcpy(base_mass, mass, sizeof mass);
    kv_walk_ref(T, D, p, 16, v, T, L, late + T, flag, mass, cmass, out, part);
    for (size_t r = 0; r < T; r++) {
        for (size_t j = 0; j < D; j++) o[r * D + j] = (out[r * D + j] + part[r * D + j]) * (float)(1 / mass[r]);
        sum.contested_all += cmass[r];
    }
    if (count == L) {
        sum.recall = T, sum.contested_kept = sum.contested_all;
        return sum;
    }
    memcpy(out, base, sizeof out), memset(part, 0, sizeof part);
    memcpy(mass, base_mass, sizeof mass), memset(cmass, 0, sizeof cmass);
    kv_walk_ref(T, D, p, 16, v, 0, count, order, flag, mass, cmass, out, part);
    kv_walk_compare_ref(T, D, mass, out, part, o, error2, dot, NULL, 0);
    for (size_t r = 0; r < T; r++) {
        double norm = 0;
        for (size_t j = 0; j < D; j++) norm += (double)o[r * D + j] * o[r * D + j];
        sum.recall += fmin(mass[r], 1), sum.contested_kept += cmass[r];
        sum.head_error += sqrt(error2[r]) / sqrt(norm);
    }
    return sum;
}

typedef struct {
    double recall[HQ], contested[HQ], head_error[HQ], layer_error;
} brute;

/* seen [unit][T+1][N] as kv_run_seen has it. */
static brute by_brute_force(const kv_world *w, uint32_t l, const bool *seen, uint32_t units)
{
    brute b = {.layer_error = 0};
    for (size_t r = 0; r < T; r++) {
        double diff[W];
        for (uint32_t h = 0; h < HQ; h++) {
            const double *a = kv_row(w, l, h, L + r);
            const bool *in = seen + ((size_t)(h * units / HQ) * (T + 1) + r) * N;
            double R = 0, e2 = 0, n2 = 0;
            for (uint32_t i = 0; i < L + r + 1; i++) {
                R += in[i] ? a[i] : 0;
                b.contested[h] += in[i] && in_contest(i) ? a[i] : 0;
            }
            for (size_t j = 0; j < D; j++) {
                double o = 0, hat = 0;
                for (uint32_t i = 0; i < L + r + 1; i++) {
                    double x = a[i] * kv_value_at(w, l, h / w->g, i)[j];
                    o += x, hat += in[i] ? x / R : 0;
                }
                diff[h * D + j] = o - hat, e2 += (o - hat) * (o - hat), n2 += o * o;
            }
            b.recall[h] += R, b.head_error[h] += sqrt(e2 / n2);
        }
        double sq = 0;
        for (size_t a = 0; a < W; a++) {
            double y = 0;
            for (size_t c = 0; c < W; c++) y += (double)w->t.wo[(l * W + a) * (size_t)W + c] * diff[c];
            sq += y * y;
        }
        b.layer_error += sqrt(sq) / w->t.xnorm[l * N + L + r];
    }
    return b;
}

/* ------------------------------------------------------------------------------------------------ the tests */
static bool world(kv_world *w, kv_trace_info *info)
{
    kv_tiny s = {LAYERS, HQ, HKV, D, N, L, true, false, 4};
    char *path = kv_format("%s/t.kvt", dir);
    kv_world_make(w, &s);
    w->t.xnorm = malloc(LAYERS * N * sizeof *w->t.xnorm);
    for (size_t i = 0; i < LAYERS * N; i++) w->t.xnorm[i] = 20 + (float)(i % 7);
    w->t.text = malloc(2 * N + 1), w->t.offset = malloc((N + 1) * sizeof *w->t.offset);
    for (uint32_t i = 0; i <= N; i++) w->t.offset[i] = 2 * i;
    for (uint32_t i = 0; i < N; i++) memcpy(w->t.text + 2 * i, i % 11 == 5 ? ". " : i % 17 == 8 ? "\n\n" : "a ", 2);
    w->t.text[2 * N] = 0;
    bool ok = kv_world_open_data(w, path);
    *info = ok ? *w->scene.info : (kv_trace_info){0};
    info->rope_theta = 10000; /* for those that rotate queries back */
    w->scene.info = info;
    free(path);
    return ok;
}

static void every_policy(size_t n_asked)
{
    kv_world w;
    kv_trace_info info;
    kv_error e = {""};
    char *arg[POLICIES_MAX];
    size_t n = 0, exact = 0, brutal = 0, other = 0, by_class[3] = {0};
    replayed all;
    if (!world(&w, &info)) return;
    w.scene.n_asked = n_asked; /* above 4 * W / T: layer errors go through the triangular factor */
    for (const kv_policy *p = kv_policies; p->name && n < POLICIES_MAX; p++) arg[n++] = argument(p);
    const kv_metric_set every = kv_metric_default();
    kv_status st = replay(&w.scene, (const char *const *)arg, n, 0, BUDGETS - 1, every, &all, &e);
    CHECKF(!st && all.n == n * BUDGETS, "%s", e.msg);
    for (size_t i = 0; i < all.n && !st; i++) {
        const kv_spec *s = &all.spec[all.point[i].spec];
        const kv_ranking *rk = &all.plan.ranking[all.plan.ranking_of[all.point[i].spec]];
        const char *who = s->row->name;
        uint32_t C = BUDGET[all.point[i].budget];
        replayed one;
        st = replay(&w.scene, (const char *const *)&arg[all.point[i].spec], 1, (int)all.point[i].budget,
                    (int)all.point[i].budget, every, &one, &e);
        CHECKF(!st, "%s: %s", who, e.msg);
        if (st) break;
        by_class[kv_replay_class_of(s)]++;
        CHECKF(!memcmp(one.rp.head, all.rp.head + i * LAYERS * HQ, LAYERS * HQ * sizeof *one.rp.head),
               "%s at %u: head sums alone and together differ", who, C);
        CHECKF(!memcmp(one.rp.layer_error, all.rp.layer_error + i * LAYERS, LAYERS * sizeof *one.rp.layer_error),
               "%s at %u: layer errors alone and together differ", who, C);
        CHECKF(!memcmp(one.point[0].counts, all.point[i].counts, (size_t)LAYERS * rk->n_unit * 4),
               "%s at %u: counts alone and together differ", who, C);
        bool ranking = kv_replay_class_of(s) == KV_REPLAY_RANKING,
             changed = s->reindex || s->select == KV_SELECT_MIXDIM;
        kv_run run;
        CHECKF(!kv_run_open(&run, &w, arg[all.point[i].spec], &e), "%s", e.msg);
        bool *seen = malloc((size_t)rk->n_unit * (T + 1) * N);
        for (uint32_t l = 0; l < LAYERS; l++) {
            uint32_t counts[LAYERS * HQ], U = rk->n_unit;
            if (kv_plan_counts(&run.plan, 0, &all.point[i].c, counts, &e) ||
                kv_run_seen(&run, &w, 0, &all.point[i].c, counts, l, seen, &e))
                CHECKF(0, "%s: %s", who, e.msg);
            brute b = by_brute_force(&w, l, seen, U);
            for (uint32_t h = 0; h < HQ; h++) {
                const kv_head_sums *got = &all.rp.head[(i * LAYERS + l) * HQ + h];
                bool ok = kv_close(got->recall / T, b.recall[h] / T, 1e-6, 0) &&
                          kv_close(got->contested_kept / T, b.contested[h] / T, 1e-6, 0) &&
                          (changed || kv_close(got->head_error / T, b.head_error[h] / T, 1e-6, 1e-6));
                CHECKF(ok,
                       "%s at %u, layer %u head %u: recall %.9g for %.9g, contested %.9g for %.9g, error %.9g for %.9g",
                       who, C, l, h, got->recall, b.recall[h], got->contested_kept, b.contested[h], got->head_error,
                       b.head_error[h]);
                brutal++, other += changed;
                if (!ranking) continue;
                size_t u = (size_t)l * U + h * U / HQ;
                kv_head_sums d = by_definition(&w, l, h, rk->order + u * L, all.point[i].counts[u]);
                ok = d.recall == got->recall && d.contested_kept == got->contested_kept &&
                     d.contested_all == got->contested_all && d.head_error == got->head_error;
                CHECKF(ok, "%s at %u, layer %u head %u: recall %.17g, by definition %.17g; error %.17g and %.17g", who,
                       C, l, h, got->recall, d.recall, got->head_error, d.head_error);
                exact++;
            }
            double got = all.rp.layer_error[i * LAYERS + l];
            CHECKF(changed || kv_close(got / T, b.layer_error / T, 1e-6, 1e-6),
                   "%s at %u, layer %u: layer error %.9g for %.9g", who, C, l, got, b.layer_error);
        }
        free(seen), kv_run_close(&run), close_it(&one);
    }
    printf("%zu policies: %zu points walk a ranking, %zu make a set from one, %zu are simulated; %zu heads by the "
           "definition, %zu by brute force\n",
           n, by_class[0], by_class[1], by_class[2], exact, brutal);
    CHECK(n > 70 && by_class[0] > 150 && by_class[1] > 12 && by_class[2] > 40 && other < brutal / 20);
    for (size_t i = 0; i < n; i++) free(arg[i]);
    close_it(&all), kv_world_close(&w);
}

/* A trace with log-sum-exps, small budgets, masses only: what is not kept is not read, which shows in the last bits. */
static void local(void)
{
    static const char *const FEW[] = {"snapkv:window=4", "knorm:window=4,granularity=query_head", "tova", "full"};
    const kv_metric_set CHEAP = KV_M_BIT(KV_M_RECALL) | KV_M_BIT(KV_M_NATS_LOST) | KV_M_BIT(KV_M_RECALL_PROMPT);
    kv_error e = {""};
    kv_trace *t = NULL;
    kv_scene sc = {0};
    replayed near = {0}, far = {0};
    size_t differ = 0;
    kv_status st = kv_trace_open("traces/samples/prose.kvt", &t, &e);
    if (!st) st = kv_scene_open(t, "prompt", 0, &sc, &e);
    if (!st) st = replay(&sc, FEW, 4, 0, 1, CHEAP, &near, &e);
    if (!st) st = replay(&sc, FEW, 4, 0, 1, CHEAP | KV_M_BIT(KV_M_RECALL_CONTESTED), &far, &e);
    CHECKF(!st && BUDGET[1] * 3 < sc.n_cut / 2, "%s", e.msg);
    for (size_t i = 0; i < near.n * sc.n_evict * sc.info->n_q_head && !st; i++) {
        const kv_head_sums *a = &near.rp.head[i], *b = &far.rp.head[i];
        CHECKF(a->n == b->n && kv_close(a->recall / a->n, b->recall / b->n, 1e-6, 0) &&
                   kv_close(a->recall_prompt / a->n, b->recall_prompt / b->n, 1e-5, 0) &&
                   kv_close(a->nats / a->n, b->nats / b->n, 1e-5, 1e-6) && a->n_whole == b->n_whole,
               "%zu: recall %.9g and %.9g", i, a->recall, b->recall);
        differ += a->recall != b->recall;
    }
    CHECK(differ > 0); /* else both went the same way */
    close_it(&near), close_it(&far);
    kv_scene_close(&sc), kv_trace_close(t);
}

int main(void)
{
    if (!kv_scratch(dir)) return perror("mkdtemp"), 1;
    every_policy(0);
    every_policy(1000);
    local();
    kv_scratch_remove(dir);
    return kv_tally();
}
