/* test_twins_decode.c - every decode rule against a simulation of a few lines over full attention rows: rules that cut
 * the prompt themselves, and rules behind a policy's cut. */
#include "tests/twins.h"

static char dir[32], *trace_path;

/* seen[row][position] of one unit: may measured row `row` attend to it; the last entry is the set after the last row.
 */
#define SEEN(r) (seen + (size_t)(r)*w->N)

/* What a rule starts from: live after the plan's cut (everything where the rule cuts the prompt itself), how many
 * entries it may hold, and the query heads it listens to. */
typedef struct {
    bool live[128];
    uint32_t C, first, heads;
} cache;

/* Weights of a row over what is live, mean over the heads; dropped entries weigh less than anything. */
static void weigh(const kv_world *w, const kv_spec *s, size_t l, const cache *c, size_t row, double *out)
{
    for (size_t i = 0; i < w->N; i++) out[i] = c->live[i] ? 0 : -INFINITY;
    for (size_t h = c->first; h < c->first + c->heads; h++) {
        const double *a = kv_row(w, l, h, row);
        double sum = 0;
        for (size_t i = 0; i < w->N; i++) sum += c->live[i] ? a[i] : 0;
        for (size_t i = 0; i < w->N; i++)
            out[i] += c->live[i] ? a[i] / c->heads / (s->scores == KV_SCORES_RAW ? 1 : sum) : 0;
    }
}

/* Row t has attended: evict now? After the prompt's last row always, then after every so many. */
static void evict(const kv_world *w, const kv_spec *s, size_t t, const double *x, cache *c)
{
    uint32_t n = 0;
    for (size_t i = 0; i < w->N; i++) n += c->live[i];
    if (n > c->C && (t < w->L || (t + 1 - w->L) % s->every == 0)) kv_top(x, w->N, c->C, c->live);
}

/* The newest row decides, itself included. */
static void tova(const kv_world *w, const kv_spec *s, size_t l, cache *c, bool *seen)
{
    double x[128];
    for (size_t t = w->L - s->prompt_cut; t < w->N; t++) {
        c->live[t] = true;
        if (t >= w->L) memcpy(SEEN(t - w->L), c->live, w->N);
        weigh(w, s, l, c, t, x);
        evict(w, s, t, x, c);
    }
    memcpy(SEEN(w->N - w->L), c->live, w->N);
}

/* The first entries of the cache and the newest ones. */
static void streaming(const kv_world *w, const kv_spec *s, cache *c, bool *seen)
{
    double x[128];
    for (size_t t = w->L - s->prompt_cut; t < w->N; t++) {
        uint32_t sinks = s->sinks;
        c->live[t] = true;
        if (t >= w->L) memcpy(SEEN(t - w->L), c->live, w->N);
        for (size_t i = 0; i < w->N; i++) x[i] = !c->live[i] ? -INFINITY : sinks ? sinks--, 1e6 : (double)i;
        evict(w, s, t, x, c);
    }
    memcpy(SEEN(w->N - w->L), c->live, w->N);
}

/* Accumulated weights, the prompt's column sums first; heavy ones among the entries older than `recent`. */
static void h2o(const kv_world *w, const kv_spec *s, size_t l, cache *c, bool *seen)
{
    uint32_t recent = s->recent == KV_RECENT_HALF ? c->C / 2 : s->recent < c->C ? s->recent : c->C;
    double acc[128] = {0}, x[128];
    for (size_t r = 0; r < w->L; r++)
        for (size_t h = c->first; h < c->first + c->heads; h++)
            for (size_t i = 0; i <= r; i++) acc[i] += kv_row(w, l, h, r)[i] / c->heads;
    for (size_t t = w->L - s->prompt_cut; t < w->N; t++) {
        c->live[t] = true;
        if (t >= w->L) {
            memcpy(SEEN(t - w->L), c->live, w->N);
            weigh(w, s, l, c, t, x);
            for (size_t i = 0; i <= t; i++) acc[i] += c->live[i] ? x[i] : 0;
        }
        for (size_t i = 0; i < w->N; i++) x[i] = c->live[i] ? acc[i] : -INFINITY;
        for (size_t i = t + 1, newest = recent; i-- > 0 && newest;)
            if (c->live[i]) x[i] = INFINITY, newest--;
        evict(w, s, t, x, c);
    }
    memcpy(SEEN(w->N - w->L), c->live, w->N);
}

/* H2O by masking. With n tokens so far, the mask of the next row (n + 1 slots) holds the heaviest of all but the last
 * `recent` tokens and its own last `recent` slots, so that token n - recent is in neither; what is masked forgets its
 * score unless it is among the last `recent` of the n. With recent = 0 the published code masks nothing. */
static void h2o_mask(const kv_world *w, const kv_spec *s, size_t l, cache *c, bool *seen)
{
    uint32_t heavy = (uint32_t)(s->heavy_ratio * w->L), recent = (uint32_t)(s->recent_ratio * w->L);
    double acc[128] = {0}, x[128];
    bool top[128];
    for (size_t r = 0; r < w->L; r++)
        for (size_t h = c->first; h < c->first + c->heads; h++)
            for (size_t i = 0; i <= r; i++) acc[i] += kv_row(w, l, h, r)[i] / c->heads;
    for (size_t n = w->L; n <= w->N; n++) {
        for (size_t i = 0; i < w->N; i++) c->live[i] = i <= n;
        if (n > heavy + recent && recent) {
            kv_top(acc, (uint32_t)n - recent, heavy, top);
            for (size_t i = 0; i < n - recent; i++) c->live[i] = top[i], acc[i] = top[i] ? acc[i] : 0;
            c->live[n - recent] = false;
        }
        memcpy(SEEN(n - w->L), c->live, w->N);
        if (n == w->N) break;
        weigh(w, s, l, c, n, x);
        for (size_t i = 0; i <= n; i++) acc[i] += c->live[i] ? x[i] : 0;
    }
}

/* The cache in its own order, ranked part first: the newest row, average of 5 over neighbours in that order, the best
 * in order of score, then the `recent` last. */
static void cake(const kv_world *w, const kv_spec *s, size_t l, cache *c, uint32_t n, uint32_t *slot, uint32_t recent,
                 bool *seen)
{
    uint32_t keep = c->C - recent, order[128], next[128];
    for (size_t t = w->L; t <= w->N; t++) {
        double y[128] = {0}, x[128];
        if (t < w->N) slot[n++] = (uint32_t)t;
        for (uint32_t i = 0; i < w->N; i++) c->live[i] = false;
        for (uint32_t k = 0; k < n; k++) c->live[slot[k]] = true;
        memcpy(SEEN(t - w->L), c->live, w->N);
        if (t == w->N || n <= c->C || (t + 1 - w->L) % s->every) continue;
        weigh(w, s, l, c, t, x);
        for (int k = 0, m = (int)(n - recent); k < m; k++)
            for (int j = k - 2; j <= k + 2; j++) y[k] += j >= 0 && j < m ? x[slot[j]] / 5 : 0;
        kv_sorted(y, n - recent, order);
        for (uint32_t k = 0; k < keep; k++) kv_close_call(y[order[k]], y[order[k + 1]]); /* the order matters later */
        for (uint32_t k = 0; k < keep; k++) next[k] = slot[order[k]];
        memcpy(next + keep, slot + n - recent, recent * sizeof *next);
        memcpy(slot, next, c->C * sizeof *slot);
        n = c->C;
    }
}

/* A cut cache stands in the order of the indicator, the window behind: mean + gamma var of the window's rows, average
 * of 5, group mean. An untouched one stands in order of position. */
static uint32_t cake_order(const kv_world *w, const kv_spec *s, size_t l, const cache *c, bool cut, uint32_t *slot)
{
    uint32_t m = w->L > s->window ? w->L - s->window : 0, order[128], n = 0;
    double y[128] = {0}, x[128] = {0};
    for (size_t h = c->first; h < c->first + c->heads && cut; h++)
        for (size_t i = 0; i < m; i++) {
            double mean = 0, var = 0;
            for (size_t r = m; r < w->L; r++) mean += kv_row(w, l, h, r)[i] / s->window;
            for (size_t r = m; r < w->L; r++) var += pow(kv_row(w, l, h, r)[i] - mean, 2) / (s->window - 1.0);
            y[i] += (mean + s->gamma * var) / c->heads;
        }
    for (int i = 0; i < (int)m; i++)
        for (int j = i - 2; j <= i + 2; j++) x[i] += j >= 0 && j < (int)m ? y[j] / 5 : 0;
    kv_sorted(x, m, order); /* all zero: in order of position */
    for (uint32_t i = 0; i + 1 < m; i++) kv_close_call(x[order[i]], x[order[i + 1]]);
    for (uint32_t i = 0; i < w->L; i++)
        if (c->live[i < m ? order[i] : i]) slot[n++] = i < m ? order[i] : i;
    return n;
}

/* The twin of policy i for unit u. What the plan itself cuts has its twin in test_twins.c and is taken from there, and
 * so are CAKE's decode budgets. */
static kv_status twin(const kv_run *run, const kv_world *w, size_t i, uint32_t C, const uint32_t *counts, uint32_t l,
                      uint32_t u, bool *seen, kv_error *e)
{
    const kv_spec *s = &run->spec[i];
    const kv_ranking *rk = &run->plan.ranking[run->plan.ranking_of[i]];
    const uint32_t *order = rk->order + ((size_t)l * rk->n_unit + u) * w->L;
    uint32_t slot[128], n = counts[l * rk->n_unit + u], m = 0, keep = 0;
    cache c = {.C = s->prompt_cut || (n == w->L && C > w->L) ? C : n}; /* a cache of more than the prompt grows */
    kv_budget_resolved b = kv_tokens(w, C);
    kv_status st = KV_OK;
    c.heads = kv_heads_of(w, s->granularity, u, &c.first);
    for (uint32_t k = 0; k < w->L; k++) c.live[order[k]] = k < n || s->prompt_cut;
    switch ((kv_decode)s->decode) {
    case KV_DECODE_TOVA: tova(w, s, l, &c, seen); break;
    case KV_DECODE_STREAMING: streaming(w, s, &c, seen); break;
    case KV_DECODE_H2O: h2o(w, s, l, &c, seen); break;
    case KV_DECODE_H2O_MASK: h2o_mask(w, s, l, &c, seen); break;
    case KV_DECODE_CAKE:
        if (s->layers == KV_LAYERS_CAKE) {
            b.tokens = C;
            st = kv_plan_decode_keep(&run->plan, i, &b, l, &keep, e);
            c.C = keep + s->window;
            n = cake_order(w, s, l, &c, w->L > C + s->window, slot);
        } else { /* behind another ranking: in its order, untouched where L < C */
            for (uint32_t k = rk->n_forced; k < n && w->L >= C; k++) slot[m++] = order[k];
            for (uint32_t k = 0; k < w->L; k++)
                if (c.live[k] && (w->L < C || k + s->window >= w->L)) slot[m++] = k;
        }
        cake(w, s, l, &c, n, slot, s->window, seen);
        break;
    default: break;
    }
    return st;
}

/* Rules with every option they read, alone and behind other policies. */
static char *rules(kv_rng *r, uint32_t window)
{
    static const char *const GRAN[] = {"query_head", "kv_head", "layer"};
    const char *g[6];
    for (int k = 0; k < 6; k++) g[k] = GRAN[kv_dice(r, 3)];
    char *alone = kv_format("tova.decode:scores=raw,every=%u,tova.decode,streamingllm.decode:sinks=%u,every=%u,"
                            "h2o.realdrop:granularity=%s,every=%u,h2o.realdrop:scores=raw,granularity=%s,recent=%u,"
                            "h2o.mask:heavy_ratio=%g,recent_ratio=%g,h2o.mask:scores=raw,granularity=%s,"
                            "cake.decode:window=%u,gamma=%u,cake.decode:window=%u,scores=raw,cascading=0,every=%u",
                            1 + kv_dice(r, 3), kv_dice(r, 6), 1 + kv_dice(r, 3), g[0], 1 + kv_dice(r, 3), g[1],
                            kv_dice(r, 7), kv_dice(r, 6) / 10.0, kv_dice(r, 5) / 10.0, g[2], window,
                            kv_dice(r, 2) * 200, window, 1 + kv_dice(r, 3));
    char *all =
        kv_format("%s,snapkv:window=%u,kernel=3,granularity=%s,decode=h2o,recent=%u,"
                  "ada-snapkv:window=%u,decode=h2o,every=2,knorm:window=0,granularity=%s,decode=tova,"
                  "streaming:sinks=%u,granularity=%s,decode=streaming,snapkv:window=%u,kernel=3,decode=cake,every=%u",
                  alone, window, g[3], kv_dice(r, 7), window, g[4], kv_dice(r, 6), g[5], window, 1 + kv_dice(r, 3));
    free(alone);
    return all;
}

static void test_rules(void)
{
    static const uint32_t GROUP[] = {1, 3, 8}, LENGTH[] = {1, 2, 3, 5, 8, 13, 21, 30}, DIM[] = {2, 4, 8};
    kv_count count[KV_DECODE_H2O_MASK + 1] = {{0}};
    for (uint64_t seed = 3001; seed <= 3300; seed++) {
        kv_rng r = {seed};
        uint32_t U = 1 + kv_dice(&r, 2), L = LENGTH[kv_dice(&r, 8)], window = 2 + kv_dice(&r, 5);
        kv_tiny s = {.n_layer = 1 + kv_dice(&r, 2),
                     .n_q_head = U * GROUP[kv_dice(&r, 3)],
                     .n_kv_head = U,
                     .d = DIM[kv_dice(&r, 3)],
                     .n_token = L + 1 + kv_dice(&r, 14),
                     .n_prompt = L,
                     .flat = kv_dice(&r, 12) == 0,
                     .seed = seed};
        uint32_t budgets[] = {0, 1, 2, L / 2, L > window ? L - window : 0, L - 1, L, L + 3, kv_dice(&r, L + 1)};
        kv_world w;
        kv_run run = {0};
        kv_error e = {""};
        char *list = rules(&r, window);
        kv_status st = kv_world_open(&w, trace_path, &s) ? kv_run_open(&run, &w, list, &e) : KV_EIO;
        size_t all = (size_t)(w.N - w.L + 1) * w.N;
        bool *got = malloc(w.H * all), *want = malloc(all);
        for (size_t i = 0; i < run.n_spec; i++)
            for (size_t b = 0; b < sizeof budgets / sizeof *budgets && !st; b++) {
                const kv_spec *p = &run.spec[i];
                uint32_t counts[2 * 32], C = budgets[b];
                kv_budget_resolved c = kv_tokens(&w, C);
                if (p->decode == KV_DECODE_CAKE && C < p->window) continue; /* CAKE has no cache below the window */
                if (p->decode == KV_DECODE_H2O_MASK && b) continue;         /* it knows no budget */
                st = kv_plan_counts(&run.plan, i, &c, counts, &e);
                for (uint32_t l = 0; l < w.n_layer && !st; l++) {
                    st = kv_run_seen(&run, &w, i, &c, counts, l, got, &e);
                    for (uint32_t u = 0; u < kv_units(&w, p->granularity) && !st; u++) {
                        kv_gap = 1;
                        memset(want, 0, all);
                        st = twin(&run, &w, i, C, counts, l, u, want, &e);
                        KV_COMPARE(&count[p->decode], !memcmp(got + u * all, want, all),
                                   "seed %llu L=%u N=%u H=%u g=%u d=%u layer %u unit %u: %s at %u",
                                   (unsigned long long)seed, L, w.N, w.H, w.g, w.d, l, u, p->canonical, C);
                    }
                }
            }
        CHECKF(!st, "seed %llu: %s", (unsigned long long)seed, e.msg);
        free(got), free(want), free(list);
        kv_run_close(&run), kv_world_close(&w);
    }
    for (int k = KV_DECODE_TOVA; k <= KV_DECODE_H2O_MASK; k++) kv_judge(kv_decode_rules[k].name, &count[k], 2000);
}

/* Token n - recent leaves the recent span as row n begins and is in no set then; the next row has it back when it is
 * heavy. */
static void test_blackout(void)
{
    uint32_t back = 0, gone = 0, bad = 0, L = 20, recent = 4;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        kv_tiny s = {1, 2, 2, 4, 36, 20, false, false, seed};
        kv_world w;
        kv_run run = {0};
        kv_error e = {""};
        uint32_t counts[2];
        bool seen[2 * 17 * 36];
        kv_budget_resolved c = {.tokens = 8, .real = 8};
        kv_status st = kv_world_open(&w, trace_path, &s)
                           ? kv_run_open(&run, &w, "h2o.mask:heavy_ratio=0.7,recent_ratio=0.2", &e)
                           : KV_EIO;
        if (!st) st = kv_plan_counts(&run.plan, 0, &c, counts, &e);
        if (!st) st = kv_run_seen(&run, &w, 0, &c, counts, 0, seen, &e);
        CHECKF(!st, "%s", e.msg);
        for (uint32_t u = 0; u < 2; u++)
            for (uint32_t r = 1; r < 16 && !st; r++) {
                const bool *at = seen + (size_t)(u * 17 + r) * w.N + L + r - recent;
                bad += !at[-(int)w.N] || at[0];
                if (at[w.N])
                    back++;
                else
                    gone++;
            }
        kv_run_close(&run), kv_world_close(&w);
    }
    CHECKF(!bad && back > 10 && gone > 10, "%u bad, %u came back, %u did not", bad, back, gone);
}

int main(void)
{
    if (!kv_scratch(dir)) return 1;
    trace_path = kv_format("%s/t.kvt", dir);
    test_rules();
    test_blackout();
    kv_scratch_remove(dir);
    free(trace_path);
    return kv_tally();
}
