/* test_schedules.c - decode rules against double simulations of a few lines each, row by row: project, append, attend,
 * record, update, evict; masks that are schedules, there and back; positions by cache slot; what is refused. */
#include <unistd.h>

#include "sim/mask.h"
#include "sim/reindex.h"
#include "sim/replay.h"
#define kv_value kv_value_row /* metric.h has a type of that name */
#include "tests/twins.h"
#include "traces/npy.h"

static char dir[] = "/tmp/kvtest.XXXXXX";
static char *trace_path, *mask_path;
enum { MAX_TOKEN = 64, MAX_HEAD = 24 };

/* ------------------------------------------------------------------------------------- the program's side */
typedef struct {
    kv_spec *spec;
    kv_budget *budget;
    size_t n_spec, n_budget, n;
    kv_plan plan;
    kv_point *point;
    kv_replay rp;
} replayed;

static kv_status replay(const kv_scene *sc, const char *policies, const char *budgets, replayed *x, kv_error *e)
{
    *x = (replayed){0};
    kv_status st = kv_spec_parse(policies, &x->spec, &x->n_spec, e);
    if (!st) st = kv_budget_parse(budgets, &x->budget, &x->n_budget, e);
    if (!st) st = kv_plan_build(sc, x->spec, x->n_spec, 1, &x->plan, e);
    if (!st) st = kv_array(&x->point, x->n_spec * x->n_budget, sizeof *x->point, e);
    for (size_t i = 0; i < x->n_spec && !st; i++)
        for (size_t b = 0; b < x->n_budget && !st; b++, x->n++) {
            kv_point *p = &x->point[x->n];
            *p = (kv_point){.spec = i, .budget = b, .c = kv_budget_resolve(&x->budget[b], sc->n_cut, 8, 1, 1)};
            st = kv_array(&p->counts, (size_t)sc->n_evict * x->plan.ranking[x->plan.ranking_of[i]].n_unit, 4, e);
            if (!st) st = kv_plan_counts(&x->plan, i, &p->c, p->counts, e);
        }
    if (!st) st = kv_replay_run(&x->plan, x->point, x->n, KV_M_ALL, 1, NULL, NULL, &x->rp, e);
    return st;
}

static void replay_free(replayed *x)
{
    for (size_t i = 0; i < x->n; i++) free(x->point[i].counts);
    for (size_t i = 0; i < x->n_spec; i++) kv_spec_free(&x->spec[i]);
    free(x->point), free(x->spec), free(x->budget);
    kv_replay_free(&x->rp), kv_plan_free(&x->plan);
}

/* ------------------------------------------------------------------------------------- the twin's side
 * One unit of one layer: a list of live positions in cache order with a score each. */
typedef struct {
    const kv_world *w;
    const kv_spec *s;
    uint32_t L, P, R, l, u, first,
        heads; /* tokens at the cut, first measured row, rows; layer, unit, its query heads */
    uint32_t n, pos[MAX_TOKEN], n_bin, bin[MAX_TOKEN], keep, recent;
    double acc[MAX_TOKEN];
    bool vis[MAX_TOKEN][MAX_TOKEN]; /* [row][position] */
} sim;

static double mean_weight(const sim *x, uint32_t row, uint32_t p)
{
    double sum = 0;
    for (uint32_t h = x->first; h < x->first + x->heads; h++) {
        const double *a = kv_row(x->w, x->l, h, row);
        double live = 0;
        for (uint32_t k = 0; k < x->n; k++) live += a[x->pos[k]];
        for (uint32_t k = 0; k < x->n_bin; k++) live += a[x->bin[k]];
        sum += a[p] / (x->s->scores == KV_SCORES_RAW ? 1 : live) / x->heads;
    }
    return sum;
}

/* Keep the best `keep` of the first m, in place or best first, then the rest. */
static void take(sim *x, const double *score, uint32_t m, uint32_t keep, bool in_place)
{
    uint32_t order[MAX_TOKEN], pos[MAX_TOKEN], n = 0;
    bool in[MAX_TOKEN] = {false};
    double acc[MAX_TOKEN];
    kv_sorted(score, m, order);
    for (uint32_t k = 0; k < keep && k < m; k++) in[order[k]] = true;
    if (keep && keep < m) kv_close_call(score[order[keep - 1]], score[order[keep]]);
    for (uint32_t k = 1; k < keep && k < m && !in_place; k++) kv_close_call(score[order[k - 1]], score[order[k]]);
    for (uint32_t k = 0; k < m; k++) {
        uint32_t i = in_place ? k : order[k];
        if (in[i]) pos[n] = x->pos[i], acc[n++] = x->acc[i];
    }
    for (uint32_t k = m; k < x->n; k++) pos[n] = x->pos[k], acc[n++] = x->acc[k];
    for (uint32_t k = 0; k < x->n && x->n > n; k++) { /* what left goes through the bin */
        bool stays = false;
        for (uint32_t j = 0; j < n; j++) stays |= pos[j] == x->pos[k];
        if (!stays) x->bin[x->n_bin++] = x->pos[k];
    }
    memcpy(x->pos, pos, n * sizeof *pos), memcpy(x->acc, acc, n * sizeof *acc);
    x->n = n;
}

static void rkv_scores(const sim *x, uint32_t row, uint32_t m, double *score)
{
    const kv_world *w = x->w;
    double att[MAX_TOKEN] = {0}, red[MAX_TOKEN] = {0}, sum = 0;
    uint32_t first = row + 1 > x->s->window ? row + 1 - x->s->window : 0, rows = row + 1 - first;
    for (uint32_t r = first; r <= row; r++) {
        double z[MAX_TOKEN], total = 0;
        for (uint32_t i = 0; i < m; i++) {
            z[i] = -INFINITY;
            for (uint32_t h = x->first; h < x->first + x->heads; h++) {
                const float *q = w->t.q + (((size_t)x->l * w->H + h) * w->N + r) * w->d,
                            *k = kv_key(w, x->l, x->u, x->pos[i]);
                double dot = 0;
                for (uint32_t j = 0; j < w->d; j++) dot += (double)q[j] * k[j];
                z[i] = fmax(z[i], dot / sqrt(w->d));
            }
        }
        for (uint32_t i = 0; i < m; i++) total += z[i] = exp(z[i]);
        for (uint32_t i = 0; i < m; i++) att[i] += z[i] / total / rows;
    }
    for (uint32_t a = 0; a < x->n; a++) {
        double c[MAX_TOKEN];
        uint32_t zero = 0;
        for (uint32_t b = 0; b < x->n; b++) {
            const float *p = kv_key(w, x->l, x->u, x->pos[a]), *q = kv_key(w, x->l, x->u, x->pos[b]);
            double pq = 0, pp = 0, qq = 0;
            for (uint32_t j = 0; j < w->d; j++)
                pq += (double)p[j] * q[j], pp += (double)p[j] * p[j], qq += (double)q[j] * q[j];
            c[b] = a == b ? 0 : pq / sqrt(pp) / sqrt(qq);
            if (c[b] > 0.5) zero = b;
            kv_close_call(c[b], 0.5);
        }
        c[zero] = 0;
        for (uint32_t b = 0; b < x->n; b++) red[b] += c[b] / x->n;
    }
    for (uint32_t b = 0; b < x->n; b++) sum += exp(red[b]);
    for (uint32_t i = 0; i < m; i++) {
        double best = 0;
        for (uint32_t k = i > 3 ? i - 3 : 0; k <= i + 3 && k < m; k++) best = fmax(best, att[k]);
        score[i] = x->s->mix_lambda * best - (1 - x->s->mix_lambda) * exp(red[i]) / sum;
    }
}

/* Row `row` has attended and, where scores accumulate, been added: evict. */
static void evict(sim *x, uint32_t row)
{
    double score[MAX_TOKEN] = {0}, w[MAX_TOKEN];
    uint32_t cap = x->keep + x->recent, m = x->n - (x->recent < x->n ? x->recent : x->n);
    if (x->s->decode == KV_DECODE_RKV && x->n >= cap && m) {
        if (x->keep) rkv_scores(x, row, m, score);
        take(x, score, m, x->keep, false);
    }
    if (x->n <= cap) return;
    for (uint32_t k = 0; k < x->n; k++) w[k] = mean_weight(x, row, x->pos[k]);
    if (x->s->decode == KV_DECODE_TOVA) take(x, w, x->n, cap, true);
    if (x->s->decode == KV_DECODE_H2O) take(x, x->acc, m, x->keep, true);
    if (x->s->decode == KV_DECODE_STREAMING) {
        for (uint32_t k = 0; k < x->n; k++) score[k] = k < x->s->sinks ? 2 * MAX_TOKEN - k : k;
        take(x, score, x->n, cap, true);
    }
    if (x->s->decode == KV_DECODE_CAKE) {
        for (uint32_t k = 0; k < m; k++)
            for (int64_t j = (int64_t)k - 2; j <= k + 2; j++) score[k] += j >= 0 && j < m ? w[j] / 5 : 0;
        take(x, score, m, x->keep, false);
    }
}

/* Rules that drop for good. The cache after the prompt is the plan's; C = the budget, whatever L is. */
static void simulate(sim *x, const uint32_t *order, uint32_t count, uint32_t n_forced, uint32_t C)
{
    const kv_spec *s = x->s;
    bool ranked = (s->decode == KV_DECODE_CAKE || s->decode == KV_DECODE_RKV) && x->L >= C;
    uint32_t cap = s->prompt_cut ? C : count < x->L || C < x->L ? count : C;
    bool in[MAX_TOKEN] = {false};
    memset(x->vis, 0, sizeof x->vis);
    x->n = x->n_bin = 0;
    for (uint32_t k = 0; k < x->L; k++) in[order[k]] = s->prompt_cut || k < count;
    for (uint32_t k = n_forced; k < count && ranked; k++) x->pos[x->n++] = order[k], in[order[k]] = false;
    for (uint32_t p = 0; p < x->L; p++)
        if (in[p]) x->pos[x->n++] = p;
    x->recent = s->decode == KV_DECODE_H2O              ? s->recent == KV_RECENT_HALF ? cap / 2 : s->recent
                : ranked || s->decode >= KV_DECODE_CAKE ? s->window
                                                        : 0;
    if (x->recent > cap) x->recent = cap;
    x->keep = cap - x->recent;
    for (uint32_t k = 0; k < x->n; k++) {
        x->acc[k] = 0;
        for (uint32_t r = 0; r < x->L; r++)
            for (uint32_t h = x->first; h < x->first + x->heads; h++)
                x->acc[k] += kv_row(x->w, x->l, h, r)[x->pos[k]] / x->heads;
    }
    if (s->prompt_cut) evict(x, x->L - 1), x->n_bin = 0;
    for (uint32_t p = x->L; p < x->P; p++) x->acc[x->n] = 0, x->pos[x->n++] = p; /* the question */
    for (uint32_t r = 0; r < x->R; r++) {
        uint32_t row = x->P + r;
        x->acc[x->n] = 0, x->pos[x->n++] = row;
        for (uint32_t k = 0; k < x->n; k++) x->vis[r][x->pos[k]] = true;
        for (uint32_t k = 0; k < x->n_bin; k++) x->vis[r][x->bin[k]] = true;
        for (uint32_t k = 0; k < x->n; k++) x->acc[k] += mean_weight(x, row, x->pos[k]);
        if ((s->decode == KV_DECODE_RKV ? row : r + 1) % s->every == 0) evict(x, row);
        if (x->n_bin >= s->bin) x->n_bin = 0;
    }
    for (uint32_t k = 0; k < x->n; k++) x->vis[x->R][x->pos[k]] = true;
    for (uint32_t k = 0; k < x->n_bin; k++) x->vis[x->R][x->bin[k]] = true;
}

/* Rules that hide: H2O by masks and VATP, from the authors' lines, a mask over n + 1 slots at a time. */
static void simulate_masks(sim *x)
{
    const kv_world *w = x->w;
    bool vatp = x->s->decode == KV_DECODE_VATP;
    uint32_t heavy = (uint32_t)(x->s->heavy_ratio * x->L), recent = (uint32_t)(x->s->recent_ratio * x->L);
    double score[MAX_TOKEN] = {0}, norm[MAX_TOKEN];
    bool mask[MAX_TOKEN + 1];
    memset(x->vis, 0, sizeof x->vis);
    for (uint32_t p = 0; p < w->N; p++) {
        norm[p] = vatp ? 0 : 1;
        for (uint32_t j = 0; j < w->d && vatp; j++)
            norm[p] += fabs((double)kv_value_at(w, x->l, x->first / w->g, p)[j]);
    }
    for (uint32_t p = 0; p < x->L; p++)
        for (uint32_t r = 0; r < x->L; r++)
            for (uint32_t h = x->first; h < x->first + x->heads; h++)
                score[p] += kv_row(w, x->l, h, r)[p] * norm[p] / x->heads;
    for (uint32_t p = 0; p < x->L && p < x->s->sinks && vatp; p++) score[p] = INFINITY;
    for (uint32_t r = 0; r <= x->R; r++) {
        uint32_t n = r ? x->P + r : x->L;
        if (r) {
            x->n = 0, x->n_bin = 0;
            for (uint32_t p = 0; p < n; p++)
                if (x->vis[r - 1][p]) x->pos[x->n++] = p;
            for (uint32_t k = 0; k < x->n; k++) score[x->pos[k]] += mean_weight(x, n - 1, x->pos[k]) * norm[x->pos[k]];
        }
        for (uint32_t p = 0; p <= n; p++) mask[p] = true;
        if (n > heavy + recent && recent) {
            bool top[MAX_TOKEN];
            for (uint32_t p = 0; p < n + 1 - recent; p++) mask[p] = false;
            kv_top(score, n - recent, heavy, top);
            for (uint32_t p = 0; p < n - recent; p++) mask[p] |= top[p];
            bool scored[MAX_TOKEN];
            for (uint32_t p = 0; p < n; p++) scored[p] = mask[p] || p + recent >= n;
            for (uint32_t p = 0; p < n; p++) {
                score[p] = scored[p] ? score[p] : 0;
                if (vatp) mask[p] = scored[p]; /* one memory */
            }
        }
        for (uint32_t p = 0; p < w->N; p++) x->vis[r][p] = p <= n ? mask[p] : p <= x->P + r;
    }
}

/* ------------------------------------------------------------------------------------- rules against their twins */
/* Every unit and row of every policy and budget; recall of every query head with it. */
static void compare(kv_world *w, const char *policies, const char *budgets, kv_count *sets, kv_count *recalls)
{
    kv_error e = {""};
    replayed x;
    static sim m;
    kv_status st = replay(&w->scene, policies, budgets, &x, &e);
    CHECKF(!st, "seed %llu: %s: %s", (unsigned long long)w->s.seed, policies, e.msg);
    for (size_t i = 0; i < x.n && !st; i++)
        for (uint32_t l = 0; l < w->n_layer && !st; l++) {
            const kv_point *p = &x.point[i];
            const kv_spec *s = &x.spec[p->spec];
            const kv_ranking *rk = &x.plan.ranking[x.plan.ranking_of[p->spec]];
            uint32_t counts[8 * MAX_HEAD];
            kv_layer layer;
            kv_schedule sch;
            st = kv_plan_counts(&x.plan, p->spec, &p->c, counts, &e);
            if (!st) st = kv_layer_load(&w->scene, l, x.plan.needs, x.plan.max_window, &layer, &e);
            if (st) break;
            st = kv_schedule_make(&x.plan, p->spec, &p->c, counts, &layer, &sch, &e);
            for (uint32_t u = 0; u < rk->n_unit && !st; u++) {
                m = (sim){
                    .w = w, .s = s, .L = w->scene.n_cut, .P = w->scene.row_first, .R = w->scene.n_row, .l = l, .u = u};
                m.heads = kv_heads_of(w, s->granularity, u, &m.first);
                kv_gap = 1;
                if (s->decode == KV_DECODE_H2O_MASK || s->decode == KV_DECODE_VATP)
                    simulate_masks(&m);
                else
                    simulate(&m, rk->order + ((size_t)l * rk->n_unit + u) * m.L, counts[l * rk->n_unit + u],
                             rk->n_forced, p->c.real > m.L ? (uint32_t)p->c.real : p->c.tokens);
                int64_t bad = -1;
                for (uint32_t r = 0; r <= m.R && bad < 0; r++)
                    for (uint32_t k = 0; k < m.P + r && bad < 0; k++)
                        if (kv_schedule_visible(&sch, &w->scene, u, k, r) != m.vis[r][k]) bad = (int64_t)r * 1000 + k;
                KV_COMPARE(sets, bad < 0,
                           "seed %llu L=%u P=%u R=%u U=%u g=%u: %s at %s: layer %u unit %u, row * 1000 + position %lld",
                           (unsigned long long)w->s.seed, m.L, m.P, m.R, w->U, w->g, s->canonical,
                           x.budget[p->budget].text, l, u, (long long)bad);
                for (uint32_t h = m.first; h < m.first + m.heads; h++) {
                    double sum = 0;
                    for (uint32_t r = 0; r < m.R; r++)
                        for (uint32_t k = 0; k <= m.P + r; k++) sum += m.vis[r][k] ? kv_row(w, l, h, m.P + r)[k] : 0;
                    double got = x.rp.head[(i * w->n_layer + l) * w->H + h].recall;
                    KV_COMPARE(recalls, kv_close(got, sum, 3e-6 * m.R, 0),
                               "%s at %s: layer %u head %u: recall %.9f for %.9f", s->canonical,
                               x.budget[p->budget].text, l, h, got / m.R, sum / m.R);
                }
            }
            if (!st) kv_schedule_free(&sch);
            kv_layer_free(&layer);
        }
    CHECKF(!st, "%s: %s", policies, e.msg);
    replay_free(&x);
}

static const char RULES[] =
    "tova.decode,tova.decode:scores=raw,tova.decode:granularity=kv_head,streamingllm.decode,h2o.realdrop,h2o.realdrop:"
    "scores=raw,recent=3,granularity=kv_head,"
    "h2o.mask:heavy_ratio=0.3,recent_ratio=0.2,h2o.mask:heavy_ratio=0.2,recent_ratio=0.15,scores=raw,granularity=kv_"
    "head,h2o.mask:heavy_ratio=0,recent_ratio=0.3,h2o.mask:recent_ratio=0,"
    "vatp.decode:heavy_ratio=0.3,recent_ratio=0.2,sinks=2,vatp.decode:heavy_ratio=0.2,recent_ratio=0.3,sinks=20,scores="
    "raw,vatp.decode:granularity=kv_head,sinks=0,heavy_ratio=0.3,"
    "snapkv:window=4,decode=tova,snapkv:window=4,decode=tova,every=3,scores=raw,snapkv:window=4,decode=tova,bin=3,"
    "snapkv:window=4,decode=streaming,sinks=2,"
    "snapkv:window=4,decode=h2o,recent=4,every=2,ada-snapkv:window=4,decode=h2o,h2o:window=4,decode=h2o,scores=raw,"
    "tova:decode=tova,tova:decode=tova,scores=raw,every=4,"
    "hae.ours:recent=4,window=4,bin=3,hae.ours:recent=2,window=4,bin=2,every=3,granularity=layer,snapkv:window=4,"
    "decode=cake,snapkv:window=3,decode=cake,scores=raw,every=2,"
    "rkv.decode:window=4,every=4,rkv.decode:window=2,every=1,mix_lambda=0.5,knorm:window=3,decode=rkv,every=3,pooling="
    "maxpool,kernel=7,knorm:window=0,decode=tova,granularity=query_head,"
    "recency:decode=streaming,recency:decode=h2o,recent=5,bin=4,prompt_cut=rule";

static void test_rules(void)
{
    kv_count sets = {0}, recalls = {0};
    for (uint64_t seed = 1; seed <= 60; seed++) {
        static const uint32_t GROUP[] = {1, 2, 4}, LENGTH[] = {1, 3, 6, 11, 17, 24};
        kv_rng r = {seed};
        uint32_t U = 1 + (uint32_t)(kv_rng_next(&r) >> 33) % 2, g = GROUP[(kv_rng_next(&r) >> 33) % 3],
                 L = LENGTH[seed % 6], R = 1 + (uint32_t)(kv_rng_next(&r) >> 33) % 14;
        kv_tiny s = {.n_layer = 1 + seed % 2,
                     .n_q_head = U * g,
                     .n_kv_head = U,
                     .d = seed % 3 ? 8 : 6,
                     .n_token = L + R,
                     .n_prompt = L,
                     .wo = true,
                     .seed = seed};
        kv_world w;
        char *budgets = kv_format("0,1,2,%u,%u,%u,%u,%u", L / 3, L / 2 + 1, L, L + 1, L + 3);
        if (kv_world_open(&w, trace_path, &s)) {
            if (seed % 4 == 0 && L > 2) w.scene.n_cut -= 2; /* --cut context: two tokens of a question behind the cut */
            if (!(seed % 4 == 0 && L > 2))
                compare(&w, RULES, budgets, &sets, &recalls);
            else
                compare(&w,
                        "tova.decode,streamingllm.decode,h2o.realdrop,h2o.mask:heavy_ratio=0.3,recent_ratio=0.2,vatp."
                        "decode:heavy_ratio=0.3,recent_ratio=0.2,sinks=1,snapkv:window=4,decode=tova,hae.ours:window=2,"
                        "recent=2",
                        budgets, &sets, &recalls);
        }
        kv_world_close(&w);
        free(budgets);
    }
    kv_judge("decode rules", &sets, 30000);
    kv_judge("recall under decode rules", &recalls, 60000);
}

/* One head, three keys, weights known by hand: the row that triggers an eviction has attended to the victim, and raw
 * and renormalised weights accumulate to different victims. */
static void test_order(void)
{
    /* q.k / sqrt(1) = ln of these numbers, row by row: rows 0 and 1 are the prompt, 2 and 3 decoded */
    static const float WEIGHT[4][4] = {{1}, {3, 1}, {0.1f, 0.2f, 0.7f}, {1, 1, 1, 1}};
    kv_tiny s = {
        .n_layer = 1, .n_q_head = 1, .n_kv_head = 1, .d = 4, .n_token = 4, .n_prompt = 2, .wo = true, .seed = 1};
    kv_world w;
    kv_error e = {""};
    replayed x;
    kv_world_make(&w, &s);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            w.t.k[i * 4 + j] = i == j;
            w.t.q[i * 4 + j] = j <= i ? 2 * logf(WEIGHT[i][j]) : 0;
        }
    if (!kv_world_open_data(&w, trace_path)) return;
    CHECK(kv_close(kv_row(&w, 0, 0, 2)[1], 0.2, 1e-6, 0) && kv_close(kv_row(&w, 0, 0, 1)[0], 0.75, 1e-6, 0));
    CHECKF(!replay(&w.scene, "tova.decode", "2", &x, &e), "%s", e.msg);
    kv_layer l;
    kv_schedule sch;
    CHECK(!kv_layer_load(&w.scene, 0, x.plan.needs, x.plan.max_window, &l, &e));
    CHECK(!kv_schedule_make(&x.plan, 0, &x.point[0].c, x.point[0].counts, &l, &sch, &e));
    /* row 2 weighs 0.1 0.2 0.7 and drops position 0, which it has seen; row 3 sees 1, 2, 3 and drops the first of a
     * tie: the latest */
    CHECK(sch.at[0] == 1 && sch.at[1] == -1 && sch.at[2] == -1 && sch.at[3] == 2);
    CHECK(kv_schedule_visible(&sch, &w.scene, 0, 0, 0) && !kv_schedule_visible(&sch, &w.scene, 0, 0, 1));
    CHECKF(kv_close(x.rp.head[0].recall, 1 + 0.75, 1e-6, 0), "%.9f", x.rp.head[0].recall);
    CHECK(x.rp.rows[0].sum == 6 && x.rp.rows[0].peak == 3);
    kv_schedule_free(&sch), kv_layer_free(&l), replay_free(&x), kv_world_close(&w);
}

/* ------------------------------------------------------------------------------------- masks, there and back */
static const char DECODING[] = "cake.decode:window=4,tova.decode,h2o.realdrop,h2o.mask:heavy_ratio=0.3,recent_ratio=0."
                               "2,streamingllm.decode,vatp.decode:heavy_ratio=0.3,recent_ratio=0.2,"
                               "rkv.decode:window=4,every=4,hae.ours:window=4,recent=4,bin=3,snapkv:window=4,decode="
                               "tova,ada-snapkv:window=4,decode=h2o,every=2";

static void test_round_trip(void)
{
    kv_tiny s = {
        .n_layer = 3, .n_q_head = 4, .n_kv_head = 2, .d = 8, .n_token = 52, .n_prompt = 36, .wo = true, .seed = 77};
    kv_world w;
    kv_error e = {""};
    replayed x, y;
    char *arg = kv_format("mask:%s", mask_path);
    size_t n_seen = 0, n_at = 0;
    if (!kv_world_open(&w, trace_path, &s)) return;
    CHECKF(!replay(&w.scene, DECODING, "6,13,36", &x, &e), "%s", e.msg);
    for (size_t i = 0; i < x.n; i++) {
        const kv_ranking *rk = &x.plan.ranking[x.plan.ranking_of[x.point[i].spec]];
        size_t U = rk->n_unit, heads = (size_t)s.n_layer * w.H;
        uint32_t counts[8 * MAX_HEAD];
        const char *who = x.spec[x.point[i].spec].canonical;
        CHECK(!kv_plan_counts(&x.plan, x.point[i].spec, &x.point[i].c, counts, &e));
        CHECKF(!kv_mask_write(mask_path, &x.plan, x.point[i].spec, &x.point[i].c, counts, false, w.scene.n_row, &e),
               "%s: %s", who, e.msg);
        CHECK(!memcmp(counts, x.point[i].counts, s.n_layer * U * sizeof *counts));
        kv_status st = replay(&w.scene, arg, "13", &y, &e);
        CHECKF(!st, "%s: %s", who, e.msg);
        if (!st) {
            const kv_ranking *mine = &y.plan.ranking[0];
            n_seen += mine->seen != NULL, n_at += mine->at != NULL;
            CHECK(mine->granularity == rk->granularity &&
                  kv_plan_slots(&y.plan, 0, y.point[0].counts) ==
                      kv_plan_slots(&x.plan, x.point[i].spec, x.point[i].counts));
            CHECKF(!memcmp(y.rp.head, x.rp.head + i * heads, heads * sizeof *y.rp.head),
                   "%s at %s: the mask measures otherwise", who, x.budget[x.point[i].budget].text);
            CHECKF(!memcmp(y.rp.layer_error, x.rp.layer_error + i * s.n_layer, s.n_layer * sizeof *y.rp.layer_error),
                   "%s", who);
            if (kv_schedule_used(&y.plan, 0))
                CHECKF(!memcmp(y.rp.rows, x.rp.rows + i * s.n_layer, s.n_layer * sizeof *y.rp.rows), "%s", who);
            CHECK(!memcmp(y.point[0].counts, x.point[i].counts, s.n_layer * U * sizeof *counts));
        }
        replay_free(&y);
    }
    CHECKF(n_seen == 6 && n_at > 20, "%zu bitmaps, %zu schedules", n_seen, n_at);
    replay_free(&x);

    /* the set after the last row as a mask: decoded tokens that are gone are seen by their own row */
    CHECKF(!replay(&w.scene, "tova.decode", "13", &x, &e), "%s", e.msg);
    CHECK(!kv_mask_write(mask_path, &x.plan, 0, &x.point[0].c, x.point[0].counts, true, w.scene.n_row, &e));
    CHECKF(!replay(&w.scene, arg, "13", &y, &e), "%s", e.msg);
    kv_npy a = {0};
    CHECK(!kv_npy_read(mask_path, &a, &e) && a.rank == 3 && a.shape[1] == 1 && a.shape[2] == w.N);
    size_t wrong = 0, gone = 0;
    for (uint32_t l = 0; l < s.n_layer; l++)
        for (uint32_t k = 0; k < w.N; k++) {
            bool in = ((uint8_t *)a.data)[l * w.N + k];
            int32_t want = in ? -1 : k < w.L ? 0 : (int32_t)(k - w.L + 1);
            wrong += y.plan.ranking[0].at[l * w.N + k] != want, gone += k >= w.L && !in;
        }
    CHECKF(wrong == 0 && gone > 0, "%zu wrong, %zu gone", wrong, gone);
    for (uint32_t l = 0; l < s.n_layer; l++) {
        uint32_t kept = 0;
        for (uint32_t k = 0; k < w.L; k++) kept += ((uint8_t *)a.data)[l * w.N + k];
        CHECK(y.point[0].counts[l] == kept);
    }
    kv_npy_free(&a), replay_free(&x), replay_free(&y);

    /* a bitmap without the row after the last, which no measured row needs */
    CHECKF(!replay(&w.scene, "h2o.mask:heavy_ratio=0.3,recent_ratio=0.2", "13", &x, &e), "%s", e.msg);
    CHECK(!kv_mask_write(mask_path, &x.plan, 0, &x.point[0].c, x.point[0].counts, false, w.scene.n_row, &e));
    CHECK(!kv_npy_read(mask_path, &a, &e) && a.rank == 4 && a.shape[0] == w.scene.n_row + 1u && a.shape[3] == 7);
    a.shape[0]--;
    CHECK(!kv_npy_write(mask_path, "|u1", 4, a.shape, a.data, &e));
    CHECKF(!replay(&w.scene, arg, "13", &y, &e), "%s", e.msg);
    CHECK(!memcmp(y.rp.head, x.rp.head, (size_t)s.n_layer * w.H * sizeof *y.rp.head));
    const uint8_t *after = y.plan.ranking[0].seen + (size_t)w.scene.n_row * s.n_layer * w.H * 7;
    CHECK(!memcmp(after, after - (size_t)s.n_layer * w.H * 7, (size_t)s.n_layer * w.H * 7));
    kv_npy_free(&a), replay_free(&x), replay_free(&y);
    kv_world_close(&w);
    free(arg);
}

/* Arrays that fit no trace of this shape, or say what cannot be. */
static void test_hostile(void)
{
    kv_tiny s = {
        .n_layer = 2, .n_q_head = 4, .n_kv_head = 2, .d = 4, .n_token = 20, .n_prompt = 14, .wo = true, .seed = 5};
    static const struct {
        const char *descr;
        uint32_t rank;
        size_t shape[5];
        int32_t fill, at, value; /* entry `at` of the file is `value` */
        const char *word;        /* NULL: taken */
    } CASE[] = {
        {"<i4", 3, {2, 2, 20}, -1, 0, -1, NULL},
        {"<i4", 3, {2, 2, 20}, -1, 5, 6, NULL},
        {"<i4", 3, {2, 1, 14}, -1, 5, 3, NULL},
        {"<i4", 3, {2, 4, 20}, -1, 14, 1, NULL}, /* the first decoded token, after its own row */
        {"<i4", 3, {2, 2, 20}, -1, 5, 7, "from 0 to 6"},
        {"<i4", 3, {2, 2, 20}, -1, 5, -2, "evicted_at -2"},
        {"<i4", 3, {2, 2, 20}, -1, 5, INT32_MIN, "evicted_at -2147483648"},
        {"<i4", 3, {2, 2, 20}, -1, 5, INT32_MAX, "token 5"},
        {"<i4", 3, {2, 2, 20}, -1, 54, 0, "comes with row 0"}, /* layer 0 head 1 .. layer 1: 54 = layer 1 head 0 token
                                                                  14 */
        {"<i4", 3, {2, 2, 20}, -1, 19, 5, "comes with row 5"},
        {"<i4", 3, {2, 2, 20}, -1, 19, 6, NULL},
        {"|u1", 3, {2, 2, 20}, 1, 3, 0, NULL},
        {"|u1", 3, {2, 2, 20}, 1, 17, 0, NULL},
        {"|u1", 3, {2, 2, 14}, 1, 3, 2, "neither 0 nor 1"},
        {"|u1", 3, {2, 2, 20}, 1, 3, 255, "neither 0 nor 1"},
        {"|b1", 3, {2, 2, 20}, 1, 3, 0, NULL},
        {"<i4", 3, {3, 2, 20}, -1, 0, -1, "shape"},
        {"<i4", 3, {2, 3, 20}, -1, 0, -1, "shape"},
        {"<i4", 3, {2, 2, 19}, -1, 0, -1, "shape"},
        {"<i4", 3, {2, 0, 20}, -1, 0, -1, "shape"},
        {"<i4", 2, {2, 20}, -1, 0, -1, "shape"},
        {"<i4", 4, {7, 2, 2, 3}, -1, 0, -1, "uint8"},
        {"<f4", 3, {2, 2, 20}, 0, 0, 0, "f4"},
        {"<i8", 3, {2, 2, 20}, 0, 0, 0, "i8"},
        {"|u1", 4, {6, 2, 2, 3}, 255, 0, 0, NULL},
        {"|u1", 4, {7, 2, 4, 3}, 0, 0, 0, NULL}, /* rows that see nothing at all */
        {"|u1", 4, {8, 2, 2, 3}, 255, 0, 0, "shape"},
        {"|u1", 4, {5, 2, 2, 3}, 255, 0, 0, "shape"},
        {"|u1", 4, {6, 2, 2, 2}, 255, 0, 0, "shape"},
        {"|u1", 4, {6, 2, 2, 20}, 1, 0, 0, "shape"},
        {"|b1", 4, {6, 2, 2, 3}, 1, 0, 0, "uint8"},
        {"|u1", 5, {1, 6, 2, 2, 3}, 1, 0, 0, "shape"},
        {"|u1", 1, {6}, 1, 0, 0, "shape"},
    };
    kv_world w;
    char *arg = kv_format("mask:%s", mask_path);
    if (!kv_world_open(&w, trace_path, &s)) return;
    for (size_t i = 0; i < sizeof CASE / sizeof *CASE; i++) {
        static unsigned char bytes[8 * 1024];
        size_t size = (size_t)(CASE[i].descr[2] - '0'), n = 1;
        for (uint32_t k = 0; k < CASE[i].rank; k++) n *= CASE[i].shape[k];
        memset(bytes, 0, sizeof bytes);
        for (size_t k = 0; k < n; k++) {
            int32_t v = k == (size_t)CASE[i].at ? CASE[i].value : CASE[i].fill;
            memcpy(bytes + k * size, &v, size < 4 ? size : 4);
        }
        kv_error e = {""};
        replayed x;
        CHECK(!kv_npy_write(mask_path, CASE[i].descr, CASE[i].rank, CASE[i].shape, bytes, &e));
        kv_status st = replay(&w.scene, arg, "5", &x, &e);
        if (!CASE[i].word)
            CHECKF(!st, "case %zu: %s", i, e.msg);
        else
            CHECKF(st == KV_EFORMAT && strstr(e.msg, CASE[i].word) && strstr(e.msg, mask_path) && !strchr(e.msg, '\n'),
                   "case %zu: status %d, %s", i, (int)st, e.msg);
        replay_free(&x);
    }
    kv_world_close(&w);
    free(arg);
}

/* ------------------------------------------------------------------------------------- positions by cache slot */
/* x turned to another position, half-split pairs. */
static void turn(const float *x, uint32_t d, double by, double theta, double *out)
{
    for (uint32_t j = 0; j < d / 2; j++) {
        double a = by * pow(theta, -2.0 * j / d), c = cos(a), s = sin(a);
        out[j] = x[j] * c - x[j + d / 2] * s, out[j + d / 2] = x[j + d / 2] * c + x[j] * s;
    }
}

static void test_reindex(void)
{
    kv_tiny s = {
        .n_layer = 2, .n_q_head = 4, .n_kv_head = 2, .d = 8, .n_token = 60, .n_prompt = 40, .wo = true, .seed = 9};
    kv_world w;
    kv_error e = {""};
    replayed x, y;
    size_t n_more = 0;
    if (!kv_world_open(&w, trace_path, &s)) return;
    CHECK(replay(&w.scene, "streamingllm.reindex", "12", &x, &e) == KV_EMISSING && strstr(e.msg, "rope-theta"));
    replay_free(&x);
    kv_trace_info in = *w.scene.info;
    in.rope_theta = 100;
    w.scene.info = &in;
    CHECKF(!replay(&w.scene, "streamingllm.reindex,streamingllm.decode", "2,12,40,100", &x, &e), "%s", e.msg);
    for (size_t i = 0; i < 4 && x.n == 8; i++)
        for (uint32_t l = 0; l < s.n_layer; l++)
            for (uint32_t h = 0; h < w.H; h++) {
                const kv_head_sums *got = &x.rp.head[(i * s.n_layer + l) * w.H + h],
                                   *plain = &x.rp.head[((4 + i) * s.n_layer + l) * w.H + h];
                uint32_t C = (uint32_t)x.point[i].c.real, sinks = C < 4 ? C : 4;
                double distance = 0, error = 0;
                for (uint32_t r = w.L; r < w.N;
                     r++) { /* the cache: sinks, newest, and the row itself in the last slot */
                    uint32_t pos[MAX_TOKEN], n = 0, whole = r + 1 <= C + 1;
                    for (uint32_t p = 0; p <= r; p++)
                        if (whole || p < sinks || p + (C - sinks) >= r) pos[n++] = p;
                    const double *a = kv_row(&w, l, h, r);
                    double p[MAX_TOKEN], sum = 0, q0[8], q1[8], k0[8], k1[8], e2 = 0, o2 = 0, tv = 0;
                    const float *q = w.t.q + (((size_t)l * w.H + h) * w.N + r) * w.d;
                    turn(q, w.d, -(double)r, 100, q0);
                    float f[8];
                    for (uint32_t j = 0; j < w.d; j++) f[j] = (float)q0[j];
                    turn(f, w.d, n - 1, 100, q1);
                    for (uint32_t k = 0; k < n; k++) {
                        double dot = 0;
                        turn(kv_key(&w, l, h / w.g, pos[k]), w.d, -(double)pos[k], 100, k0);
                        for (uint32_t j = 0; j < w.d; j++) f[j] = (float)k0[j];
                        turn(f, w.d, k, 100, k1);
                        for (uint32_t j = 0; j < w.d; j++) dot += q1[j] * k1[j];
                        sum += p[k] = exp(dot / sqrt(w.d));
                    }
                    for (uint32_t j = 0; j < w.d; j++) {
                        double o = 0, hat = 0;
                        for (uint32_t k = 0; k <= r; k++) o += a[k] * kv_value_at(&w, l, h / w.g, k)[j];
                        for (uint32_t k = 0; k < n; k++) hat += p[k] / sum * kv_value_at(&w, l, h / w.g, pos[k])[j];
                        e2 += (o - hat) * (o - hat), o2 += o * o;
                    }
                    for (uint32_t k = 0, at = 0; k <= r; k++) {
                        bool in_cache = at < n && pos[at] == k;
                        tv += fabs(a[k] - (in_cache ? p[at] / sum : 0)) / 2;
                        at += in_cache;
                    }
                    distance += tv, error += sqrt(e2 / o2);
                }
                CHECKF(kv_close(got->total_variation, distance, 1e-4, 1e-4), "C=%u layer %u head %u: %.7f for %.7f", C,
                       l, h, got->total_variation, distance);
                CHECKF(kv_close(got->head_error, error, 1e-4, 1e-4), "C=%u layer %u head %u: %.7f for %.7f", C, l, h,
                       got->head_error, error);
                CHECK(got->recall == plain->recall && got->nats == plain->nats); /* the same kept sets */
                CHECK(got->total_variation > got->n - got->recall - 1e-4);       /* the hidden mass is a lower bound */
                n_more += C < 40 && got->total_variation > got->n - got->recall + 1e-3;
                if (C == 100) CHECK(got->total_variation == 0 && got->head_error == 0);
            }
    CHECKF(n_more > 8, "%zu", n_more);
    CHECK(!memcmp(x.rp.rows, x.rp.rows + 4 * s.n_layer, 4 * s.n_layer * sizeof *x.rp.rows));
    replay_free(&x);

    /* softcap and a head that is turned in part: a row without gaps changes nothing, one with a gap does */
    in.rope_dim = 4, in.softcap = 5;
    CHECKF(!replay(&w.scene, "streamingllm.reindex", "40,12", &y, &e), "%s", e.msg);
    CHECK(y.rp.head[0].total_variation > 0 &&
          y.rp.head[s.n_layer * w.H].total_variation > y.rp.head[0].total_variation);
    replay_free(&y);
    kv_world_close(&w);
}

/* ------------------------------------------------------------------------------------- strings */
static void test_strings(void)
{
    static const char *const BAD[] = {"snapkv:every=5",
                                      "snapkv:bin=3",
                                      "snapkv:prompt_cut=rule",
                                      "snapkv:reindex=1",
                                      "snapkv:decode=h2o-mask",
                                      "snapkv:decode=vatp",
                                      "tova.decode:reindex=1",
                                      "cake.decode:prompt_cut=rule",
                                      "rkv.decode:prompt_cut=rule",
                                      "h2o.mask:every=2",
                                      "vatp.decode:bin=2",
                                      "vatp.decode:granularity=layer",
                                      "snapkv:decode=rkv,granularity=layer",
                                      "snapkv:decode=cake,granularity=query_head",
                                      "knorm:window=0,decode=rkv",
                                      "tova.decode:every=0",
                                      "tova.decode:prompt_cut=both",
                                      "criticalkv:decode=tova",
                                      "snapkv:decode=tova,page=16"};
    static const struct {
        const char *arg, *has;
    } GOOD[] = {{"snapkv:decode=tova", "decode=tova"},
                {"h2o:decode=h2o,scores=raw", "scores=raw"},
                {"snapkv:decode=tova,every=8,bin=4", "bin=4,decode=tova,every=8"},
                {"tova.decode", "prompt_cut=rule"},
                {"cake:decode=streaming,sinks=4", "sinks=4"},
                {"rkv.decode", "every=128"},
                {"streamingllm.reindex", "reindex=1"},
                {"oracle:decode=h2o", "recent=half"},
                {"lava:decode=rkv", "mix_lambda=0.07"}};
    kv_spec *s = NULL;
    size_t n = 0;
    kv_error e = {""};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        e.msg[0] = 0;
        CHECKF(kv_spec_parse(BAD[i], &s, &n, &e) == KV_EMISUSE && e.msg[0] && n == 0, "'%s' was taken", BAD[i]);
    }
    for (size_t i = 0; i < sizeof GOOD / sizeof *GOOD; i++) {
        n = 0;
        CHECKF(!kv_spec_parse(GOOD[i].arg, &s, &n, &e) && n == 1 && strstr(s->canonical, GOOD[i].has), "%s: %s",
               GOOD[i].arg, n ? s->canonical : e.msg);
        kv_spec *again = NULL;
        size_t m = 0;
        CHECK(n && !kv_spec_parse(s->canonical, &again, &m, &e) && m == 1 && !strcmp(again->canonical, s->canonical));
        for (size_t k = 0; k < m; k++) kv_spec_free(&again[k]);
        for (size_t k = 0; k < n; k++) kv_spec_free(&s[k]);
        free(again);
    }
    n = 0;
    CHECK(!kv_spec_parse("snapkv", &s, &n, &e) && !strstr(s->canonical, "every") &&
          !strstr(s->canonical, "prompt_cut"));
    for (size_t k = 0; k < n; k++) kv_spec_free(&s[k]);
    free(s);
}

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    trace_path = kv_format("%s/t.kvt", dir), mask_path = kv_format("%s/mask.npy", dir);
    test_strings();
    test_order();
    test_rules();
    test_round_trip();
    test_hostile();
    test_reindex();
    char *rm = kv_format("rm -rf %s", dir);
    if (rm && system(rm)) perror("rm");
    free(rm), free(trace_path), free(mask_path);
    return kv_tally();
}
