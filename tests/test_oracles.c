/* test_oracles.c - the oracles against exhaustive search: every set of the size, every sequence of drops, on seeded
 * tiny traces; and the order they must stand in (metrics.md 5.1, 8.2). */
#include "sim/future.h"
#include "tests/twins.h"

static char dir[32], *path;
#define TOL 1e-5 /* scores are rounded to float once */

/* Mass of the measured rows over what `seen` [unit][row][position] shows them, all units of a layer. */
static double mass_of(const kv_world *w, uint32_t granularity, uint32_t l, const bool *seen)
{
    uint32_t rows = w->N - w->L;
    double sum = 0;
    for (uint32_t u = 0; u < kv_units(w, granularity); u++) {
        uint32_t first, n = kv_heads_of(w, granularity, u, &first);
        for (uint32_t h = first; h < first + n; h++)
            for (uint32_t r = 0; r < rows; r++)
                for (uint32_t i = 0; i <= w->L + r; i++)
                    if (seen[((size_t)u * (rows + 1) + r) * w->N + i]) sum += kv_row(w, l, h, w->L + r)[i];
    }
    return sum;
}

/* What a policy keeps of the whole model, in mass; slots = entries of the prompt it keeps. */
static double value_of(kv_run *run, const kv_world *w, size_t i, uint32_t C, uint64_t *slots)
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
        sum += mass_of(w, run->spec[i].granularity, l, seen);
        for (uint32_t u = 0; u < U; u++) *slots += counts[l * U + u];
    }
    CHECKF(!st, "%s: %s", run->spec[i].canonical, e.msg);
    free(seen);
    return sum;
}

/* ------------------------------------------------------------------------------------- one set per unit, pools */
/* Best sum of k of x[0..n) by trying every subset. */
static double best_subset(const double *x, uint32_t n, uint32_t k)
{
    double best = 0;
    for (uint32_t set = 0; set < 1u << n; set++) {
        double sum = 0;
        if ((uint32_t)__builtin_popcount(set) != k) continue;
        for (uint32_t i = 0; i < n; i++) sum += set >> i & 1 ? x[i] : 0;
        best = fmax(best, sum);
    }
    return best;
}

static double l1_projected(const kv_world *w, size_t l, size_t h, size_t i)
{
    size_t width = (size_t)w->H * w->d;
    double sum = 0;
    for (size_t o = 0; o < width; o++) {
        double x = 0;
        for (size_t j = 0; j < w->d; j++)
            x += (double)w->t.wo[(l * width + o) * width + h * w->d + j] * kv_value_at(w, l, h / w->g, i)[j];
        sum += fabs(x);
    }
    return sum;
}

/* O1-O4 and O14: no set of the size gains more. The pool of a layer holds U L <= 12 entries, of the model twice that.
 */
static void test_sets(void)
{
    static const char *const P[] = {"oracle:window=0",
                                    "oracle-layer:window=0",
                                    "oracle-global:window=0",
                                    "oracle-value:window=0",
                                    "oracle-value-layer:window=0",
                                    "oracle-value-global:window=0",
                                    "oracle-lookahead:window=0,lookahead=2"};
    kv_count n = {0};
    for (uint64_t seed = 1; seed <= 40; seed++) {
        kv_rng r = {seed};
        kv_tiny s = {.n_layer = 2, .n_kv_head = 1 + kv_dice(&r, 2), .d = 4, .wo = true, .seed = seed};
        s.n_q_head = s.n_kv_head * (1 + kv_dice(&r, 3)), s.n_prompt = 3 + kv_dice(&r, 3);
        s.n_token = s.n_prompt + 1 + kv_dice(&r, 5);
        kv_world w;
        kv_error e = {""};
        bool open = kv_world_open(&w, path, &s);
        for (size_t k = 0; k < sizeof P / sizeof *P && open; k++) {
            kv_run run;
            kv_status st = kv_run_open(&run, &w, P[k], &e);
            CHECKF(!st, "%s: %s", P[k], e.msg);
            bool value = k >= 3 && k < 6;
            uint32_t scope = (uint32_t)k % 3, U = w.U, L = w.L, counts[64], rows = k == 6 ? 2 : w.N - L;
            double gain[64]; /* [layer][unit][position] */
            for (uint32_t l = 0; l < 2; l++)
                for (uint32_t u = 0; u < U; u++)
                    for (uint32_t i = 0; i < L; i++) {
                        double sum = 0;
                        for (uint32_t h = u * w.g; h < (u + 1) * w.g; h++)
                            for (uint32_t t = 0; t < rows && t < w.N - L; t++)
                                sum += kv_row(&w, l, h, L + t)[i] * (value ? l1_projected(&w, l, h, i) : 1);
                        gain[(l * U + u) * L + i] = sum;
                    }
            for (uint32_t C = 0; C <= L && !st; C++) {
                kv_budget_resolved c = kv_tokens(&w, C);
                double got = 0, want = 0;
                uint32_t step = scope == 0 ? L : scope == 1 ? U * L : 2 * U * L;
                st = kv_plan_counts(&run.plan, 0, &c, counts, &e);
                for (uint32_t k2 = 0; k2 < 2 * U; k2++)
                    for (uint32_t j = 0; j < counts[k2]; j++)
                        got += gain[k2 * L + run.plan.ranking[0].order[(size_t)k2 * L + j]];
                for (uint32_t from = 0; from < 2 * U * L; from += step)
                    want += best_subset(gain + from, step, C * (step / L));
                kv_gap = 1;
                KV_COMPARE(&n, fabs(got - want) <= TOL * want, "%s seed %d C %u: %.9g, best %.9g", P[k], (int)seed, C,
                           got, want);
            }
            kv_run_close(&run);
        }
        kv_world_close(&w);
    }
    kv_judge("sets against every subset", &n, 1300);
}

/* ------------------------------------------------------------------------------------- irrevocable drops */
/* Least loss from row r on, over every way to drop down to the capacity: cache = bit set of positions. */
static double least_loss(const kv_drops *d, uint32_t r, uint32_t cache)
{
    double best = INFINITY;
    if (r && r <= d->n_row) { /* row r-1 has come and attended */
        for (uint32_t i = r == 1 ? d->n_cut : d->row_first + r - 1; i < d->row_first + r; i++) cache |= 1u << i;
    }
    uint32_t n = (uint32_t)__builtin_popcount(cache), out = n > d->capacity ? n - d->capacity : 0;
    for (uint32_t set = cache;; set = (set - 1) & cache) { /* every subset */
        if ((uint32_t)__builtin_popcount(set) == out) {
            double loss = 0;
            for (uint32_t i = 0; i < d->n_token; i++) loss += set >> i & 1 ? d->remain[r * d->n_token + i] : 0;
            best = fmin(best, loss + (r < d->n_row ? least_loss(d, r + 1, cache & ~set) : 0));
        }
        if (!set) return best;
    }
}

/* Loss of a schedule, and that it obeys: capacity after every row, nothing leaves before it came. */
static double loss_of(const kv_drops *d, const int32_t *at, bool *legal)
{
    double loss = 0;
    for (uint32_t i = 0; i < d->n_token; i++) {
        int32_t born = i < d->n_cut ? 0 : i < d->row_first ? 1 : (int32_t)(i - d->row_first) + 1;
        if (at[i] >= 0) loss += d->remain[(uint32_t)at[i] * d->n_token + i];
        *legal &= at[i] == -1 || (at[i] >= born && at[i] <= (int32_t)d->n_row);
    }
    for (uint32_t r = 0; r <= d->n_row; r++) { /* held between row r-1 and row r */
        uint32_t n = 0, end = r ? d->row_first + r : d->n_cut;
        for (uint32_t i = 0; i < end; i++) n += at[i] < 0 || (uint32_t)at[i] > r;
        *legal &= n <= d->capacity;
    }
    return loss;
}

static void test_drops(void)
{
    kv_count n = {0};
    size_t equal = 0;
    double ratio = 0, worst = 1;
    for (uint64_t seed = 1; seed <= 1500; seed++) {
        kv_rng g = {seed};
        kv_drops d = {.n_row = 1 + kv_dice(&g, 5), .n_cut = 1 + kv_dice(&g, 4)};
        d.row_first = d.n_cut + (kv_dice(&g, 4) ? 0 : kv_dice(&g, 3)); /* sometimes a question in between */
        d.n_token = d.row_first + d.n_row, d.capacity = kv_dice(&g, d.n_token + 1);
        float remain[16 * 8] = {0};
        double kept = 0;
        for (uint32_t i = 0; i < d.n_token; i++) {
            double acc = 0;
            for (uint32_t r = d.n_row; r-- > 0;) {
                uint32_t born = i < d.row_first ? 0 : i - d.row_first;
                double a = kv_dice(&g, 3) ? kv_rng_unit(&g) * pow(4, kv_dice(&g, 4)) : 0;
                if (seed % 3 == 0) a = kv_dice(&g, 3); /* many ties */
                if (r >= born) acc += a;
                remain[r * d.n_token + i] = (float)acc;
            }
            kept += acc;
        }
        d.remain = remain;
        uint32_t live[16];
        int32_t greedy[16], exact[16];
        for (uint32_t i = 0; i < 16; i++) greedy[i] = exact[i] = -1, live[i] = i;
        kv_error e = {""};
        kv_status st = kv_drops_greedy(&d, live, d.n_cut, greedy, &e);
        if (!st) st = kv_drops_exact(&d, live, d.n_cut, exact, &e);
        bool legal = !st;
        double g_loss = loss_of(&d, greedy, &legal), x_loss = loss_of(&d, exact, &legal),
               least = least_loss(&d, 0, (1u << d.n_cut) - 1);
        kv_gap = 1;
        KV_COMPARE(&n, legal && fabs(x_loss - least) <= 1e-6 * (1 + least) && g_loss >= least - 1e-6 * (1 + least),
                   "seed %d: exact %.9g greedy %.9g enumeration %.9g %s", (int)seed, x_loss, g_loss, least,
                   legal ? "" : "not legal");
        double q = kept - least > 1e-9 ? (kept - g_loss) / (kept - least) : 1;
        equal += q > 1 - 1e-9, ratio += q, worst = fmin(worst, q);
    }
    kv_judge("drops against every sequence", &n, 1500);
    printf("greedy keeps %.2f %% of the optimum on average, %.1f %% at worst, all of it in %.0f %% of the cases\n",
           ratio / 15, worst * 100, (double)equal / 15);
    CHECK(worst < 0.99 && equal > 300); /* the cases tell them apart */
}

/* ------------------------------------------------------------------------------------- in the program: order */
static void test_order(void)
{
    static const char LIST[] =
        "oracle:window=2,oracle-steps:window=2,oracle-layer:window=2,oracle-steps:window=2,heads=pool,"
        "oracle-global:window=2,oracle-steps:window=2,layers=pool,oracle-belady,oracle-match,oracle-steps.decode,"
        "tova.decode:granularity=kv_head,streamingllm.decode:granularity=kv_head,h2o.realdrop:granularity=kv_head,"
        "recency:decode=tova";
    enum { HEAD, HEAD_ROWS, LAYER, LAYER_ROWS, MODEL, MODEL_ROWS, BELADY, MATCH, ROWS, FIRST, N = FIRST + 4 };
    size_t bad = 0, n = 0, steps = 0, n_steps = 0;
    for (uint64_t seed = 1; seed <= 60; seed++) {
        kv_rng r = {seed + 900};
        kv_tiny s = {.n_layer = 2, .n_kv_head = 1 + kv_dice(&r, 3), .d = 4, .seed = seed};
        s.n_q_head = s.n_kv_head * (1 + kv_dice(&r, 2)), s.n_prompt = 6 + kv_dice(&r, 20);
        s.n_token = s.n_prompt + 2 + kv_dice(&r, 20);
        kv_world w;
        kv_run run;
        kv_error e = {""};
        bool open = kv_world_open(&w, path, &s);
        kv_status st = open ? kv_run_open(&run, &w, LIST, &e) : KV_EIO;
        CHECKF(!st && run.n_spec == N, "%s (%zu)", e.msg, run.n_spec);
        for (uint32_t C = 2; C <= w.L && !st; C += 1 + C / 4) {
            double v[N];
            uint64_t slots[N];
            for (size_t i = 0; i < N; i++) v[i] = value_of(&run, &w, i, C, &slots[i]);
#define AT_LEAST(a, b) bad += !(v[a] >= v[b] - TOL * v[b]), n++
            AT_LEAST(LAYER, HEAD), AT_LEAST(MODEL, LAYER);                                       /* pooled >= uniform */
            AT_LEAST(HEAD_ROWS, HEAD), AT_LEAST(LAYER_ROWS, LAYER), AT_LEAST(MODEL_ROWS, MODEL); /* per row >= fixed */
            AT_LEAST(MATCH, BELADY), AT_LEAST(ROWS, MATCH); /* greedy <= flow <= per row */
            for (int k = FIRST; k < N; k++) AT_LEAST(MATCH, k), AT_LEAST(ROWS, k);
            bad += slots[HEAD] != slots[LAYER] || slots[HEAD] != slots[MODEL] || slots[HEAD] != slots[HEAD_ROWS];
            /* per row, from the definition: the newest two, then the row's best of the rest, and every later token */
            double want = 0;
            for (uint32_t l = 0; l < w.n_layer; l++)
                for (uint32_t u = 0; u < w.U; u++)
                    for (uint32_t t = w.L; t < w.N; t++) {
                        double x[128] = {0};
                        bool in[128];
                        for (uint32_t h = u * w.g; h < (u + 1) * w.g; h++)
                            for (uint32_t i = 0; i <= t; i++) x[i] += kv_row(&w, l, h, t)[i];
                        kv_top(x, w.L - 2, C - 2, in);
                        for (uint32_t i = 0; i <= t; i++) want += i >= w.L - 2 || in[i] ? x[i] : 0;
                    }
            steps += fabs(want - v[HEAD_ROWS]) <= TOL * want, n_steps++;
        }
        kv_run_close(&run), kv_world_close(&w);
    }
    CHECKF(bad == 0 && n > 5000, "%zu of %zu out of order", bad, n);
    CHECKF(steps == n_steps, "%zu of %zu", steps, n_steps);
}

static void test_refused(void)
{
    static const char *const BAD[] = {
        "oracle-belady:every=2",   "oracle-match:bin=3", "oracle-steps.decode:prompt_cut=score",
        "tova.decode:oracle=rank", "snapkv:oracle=",     "snapkv:oracle=none+rank",
        "snapkv:oracle=rank+",     "snapkv:oracle=ranks"};
    kv_refuses(BAD, sizeof BAD / sizeof *BAD);
}

int main(void)
{
    if (!kv_scratch(dir)) return 1;
    path = kv_format("%s/t.kvt", dir);
    test_sets();
    test_drops();
    test_order();
    test_refused();
    kv_scratch_remove(dir);
    free(path);
    return kv_tally();
}
