/* test_stats.c - the statistics against SciPy (tests/golden/stats, made by make.py there) and against answers known by
 * hand, and their error rates by simulation. Run from the repository root. */
#include <jansson.h>
#include <stdlib.h>

#include "analyze/dist.h"
#include "analyze/ranks.h"
#include "analyze/signif.h"
#include "analyze/stats.h"
#include "tests/check.h"

static kv_error err;

/* Within 1e-6 of SciPy, relative to the size of the number. */
static bool agrees(double got, double want)
{
    return kv_close(got, want, 1e-12, 1e-6) || (got == want);
}

static double num(const json_t *j, const char *key)
{
    return json_number_value(json_object_get(j, key));
}

static double at(const json_t *j, size_t i)
{
    return json_number_value(json_array_get(j, i));
}

/* Array of numbers, malloc'd. */
static double *numbers(const json_t *j, size_t *n)
{
    double *v = NULL;
    *n = json_array_size(j);
    CHECK(!kv_array(&v, *n, sizeof *v, &err));
    for (size_t i = 0; i < *n; i++) v[i] = at(j, i);
    return v;
}

static void test_distributions(const json_t *g)
{
    size_t i;
    json_t *c;
    json_array_foreach(json_object_get(g, "normal_quantile"), i, c)
        CHECKF(agrees(kv_normal_quantile(at(c, 0)), at(c, 1)), "p %g", at(c, 0));
    json_array_foreach(json_object_get(g, "normal_cdf"), i, c)
        CHECKF(agrees(kv_normal_cdf(at(c, 0)), at(c, 1)), "z %g", at(c, 0));
    json_array_foreach(json_object_get(g, "student_cdf"), i, c)
        CHECKF(agrees(kv_student_cdf(at(c, 0), at(c, 1)), at(c, 2)), "t %g df %g: %.12g", at(c, 0), at(c, 1),
               kv_student_cdf(at(c, 0), at(c, 1)));
    json_array_foreach(json_object_get(g, "student_quantile"), i, c)
        CHECKF(agrees(kv_student_quantile(at(c, 0), at(c, 1)), at(c, 2)), "p %g df %g", at(c, 0), at(c, 1));
    json_array_foreach(json_object_get(g, "binomial_cdf"), i, c) CHECKF(
        agrees(kv_binomial_cdf((uint64_t)at(c, 0), (uint64_t)at(c, 1)), at(c, 2)), "%g of %g", at(c, 0), at(c, 1));
    json_array_foreach(json_object_get(g, "power"), i, c) CHECKF(
        agrees(kv_t_power(at(c, 0), at(c, 1), at(c, 2), (int)at(c, 3)), at(c, 4)), "effect %g n %g: %.12g, not %.12g",
        at(c, 0), at(c, 1), kv_t_power(at(c, 0), at(c, 1), at(c, 2), (int)at(c, 3)), at(c, 4));
    CHECK(isinf(kv_normal_quantile(0)) && isinf(kv_normal_quantile(1)) && isnan(kv_normal_quantile(-1)));
    CHECK(kv_student_quantile(0.5, 7) == 0 && kv_binomial_cdf(9, 3) == 1);
    /* Cohen 1988: d 0.5, alpha 0.05 two-sided, power 0.8 on pairs needs 34; one-sided 27. */
    CHECK(kv_t_power_n(0.5, 0.8, 0.05, 2) == 34 && kv_t_power_n(0.5, 0.8, 0.05, 1) == 27);
    CHECK(kv_t_power_n(-0.5, 0.8, 0.05, 2) == 34 && kv_t_power_n(-0.5, 0.8, 0.05, 1) == 0);
    CHECK(kv_t_power_n(0, 0.8, 0.05, 2) == 0 && kv_t_power_n(1e-9, 0.8, 0.05, 2) == 0);
    for (double e = 0.05; e < 4; e *= 1.7) { /* the least n: one fewer is not enough */
        uint32_t n = kv_t_power_n(e, 0.8, 0.05, 2);
        CHECK(kv_t_power(e, n, 0.05, 2) >= 0.8 && (n == 2 || kv_t_power(e, n - 1, 0.05, 2) < 0.8));
    }
}

static void test_ranks(const json_t *g)
{
    static const struct {
        const char *key;
        size_t exact_max;
    } kinds[] = {{"wilcoxon_exact", 50}, {"wilcoxon_exact_ties", 50}, {"wilcoxon_normal", 0}};
    size_t i, n, m;
    json_t *c;
    kv_wilcoxon_result w;
    for (int k = 0; k < 3; k++) json_array_foreach(json_object_get(g, kinds[k].key), i, c)
        {
            double *d = numbers(json_object_get(c, "d"), &n);
            CHECK(!kv_wilcoxon(d, n, kinds[k].exact_max, &w, &err));
            CHECKF(agrees(w.p, num(c, "p")) && agrees(w.w_plus, num(c, "w_plus")) &&
                       agrees(w.rank_biserial, num(c, "rank_biserial")) && w.exact == (k < 2),
                   "%s %zu: p %.12g, not %.12g", kinds[k].key, i, w.p, num(c, "p"));
            free(d);
        }
    const double up[] = {1, 2, 3, 4, 5, 6}, none[] = {0, 0, 0}, one[] = {0, -3, 0};
    CHECK(!kv_wilcoxon(up, 6, 50, &w, &err) && w.p == 2.0 / 64 && w.rank_biserial == 1 && w.w_plus == 21);
    CHECK(!kv_wilcoxon(none, 3, 50, &w, &err) && w.p == 1 && w.n == 0 && w.rank_biserial == 0);
    CHECK(!kv_wilcoxon(one, 3, 50, &w, &err) && w.p == 1 && w.n == 1 && w.rank_biserial == -1);
    CHECK(!kv_wilcoxon(up, 0, 50, &w, &err) && w.p == 1);
    /* exact, by counting all signs */
    kv_rng rng = {.s = 3};
    for (int t = 0; t < 50; t++) {
        double d[9], rank[9], plus = 0;
        size_t below = 0, above = 0;
        for (int k = 0; k < 9; k++) {
            d[k] = (double)(int64_t)(kv_rng_next(&rng) % 9) - 4;
            if (d[k] == 0) d[k] = 1;
        }
        double size[9];
        for (int k = 0; k < 9; k++) size[k] = fabs(d[k]);
        CHECK(!kv_ranks(size, 9, rank, &err) && !kv_wilcoxon(d, 9, 50, &w, &err));
        for (int k = 0; k < 9; k++) plus += d[k] > 0 ? rank[k] : 0;
        for (unsigned s = 0; s < 512; s++) {
            double sum = 0;
            for (int k = 0; k < 9; k++) sum += s >> k & 1 ? rank[k] : 0;
            below += sum <= plus, above += sum >= plus;
        }
        CHECK(w.p == fmin(1, 2 * (double)(below < above ? below : above) / 512));
    }
    static const char *const both[] = {"kendall", "spearman"};
    for (int k = 0; k < 2; k++) json_array_foreach(json_object_get(g, both[k]), i, c)
        {
            double r = NAN, *x = numbers(json_object_get(c, "x"), &n), *y = numbers(json_object_get(c, "y"), &m);
            CHECK(n == m && !(k ? kv_spearman : kv_kendall_tau_b)(x, y, n, &r, &err));
            CHECKF(agrees(r, num(c, "r")), "%s %zu: %.12g, not %.12g", both[k], i, r, num(c, "r"));
            free(x), free(y);
        }
    double r;
    const double flat[] = {2, 2, 2, 2, 2, 2};
    CHECK(!kv_kendall_tau_b(up, flat, 6, &r, &err) && isnan(r) && !kv_spearman(up, flat, 6, &r, &err) && isnan(r));
    CHECK(!kv_kendall_tau_b(up, up, 1, &r, &err) && isnan(r) && !kv_kendall_tau_b(up, up, 6, &r, &err) && r == 1);
}

static void test_many(const json_t *g)
{
    size_t i, n, m;
    json_t *c;
    double low, high;
    json_array_foreach(json_object_get(g, "mcnemar"), i, c)
        CHECKF(agrees(kv_mcnemar((uint64_t)at(c, 0), (uint64_t)at(c, 1)), at(c, 2)), "%g %g", at(c, 0), at(c, 1));
    CHECK(kv_mcnemar(0, 0) == 1);
    json_array_foreach(json_object_get(g, "wilson"), i, c)
    {
        kv_wilson((uint64_t)at(c, 0), (uint64_t)at(c, 1), 0.95, &low, &high);
        CHECKF(agrees(low, at(c, 2)) && agrees(high, at(c, 3)), "%g of %g: %g %g", at(c, 0), at(c, 1), low, high);
    }
    kv_wilson(0, 0, 0.95, &low, &high);
    CHECK(isnan(low) && isnan(high));
    json_array_foreach(json_object_get(g, "benjamini_hochberg"), i, c)
    {
        double *p = numbers(json_object_get(c, "p"), &n), *q = numbers(json_object_get(c, "q"), &m);
        bool same = !kv_benjamini_hochberg(p, n, &err);
        for (size_t k = 0; k < n; k++) same = same && agrees(p[k], q[k]);
        CHECKF(same, "%zu p-values", n);
        free(p), free(q);
    }
    /* Holm by hand: .01*4, .02*3, .03*2, and .04 may not fall below .06 */
    double p[] = {0.04, 0.01, NAN, 0.03, 0.02};
    CHECK(!kv_holm(p, 5, &err) && agrees(p[1], 0.04) && agrees(p[4], 0.06) && agrees(p[3], 0.06) && agrees(p[0], 0.06));
    CHECK(isnan(p[2]));
    double one[] = {0.7, 0.9};
    CHECK(!kv_holm(one, 2, &err) && one[0] == 1 && one[1] == 1 && !kv_holm(one, 0, &err));
}

static void test_bootstrap(const json_t *g)
{
    size_t i, n;
    json_t *c;
    kv_interval iv, again;
    json_array_foreach(json_object_get(g, "bootstrap"), i, c)
    {
        double *v = numbers(json_object_get(c, "v"), &n);
        const json_t *pct = json_object_get(c, "percentile"), *bca = json_object_get(c, "BCa");
        uint32_t b = (uint32_t)num(c, "resamples");
        uint64_t seed = (uint64_t)num(c, "seed");
        CHECK(!kv_bootstrap_mean(v, n, b, seed, num(c, "level"), &iv, &err));
        CHECKF(agrees(iv.low, at(pct, 0)) && agrees(iv.high, at(pct, 1)), "percentile %zu: %.12g %.12g", i, iv.low,
               iv.high);
        CHECK(!kv_bootstrap_bca(v, n, b, seed, num(c, "level"), &iv, &err));
        CHECKF(agrees(iv.low, at(bca, 0)) && agrees(iv.high, at(bca, 1)), "BCa %zu: %.12g %.12g, not %.12g %.12g", i,
               iv.low, iv.high, at(bca, 0), at(bca, 1));
        free(v);
    }
    const double same[] = {0.3, 0.3, 0.3}, v[] = {1, 2, 4, 9, 3, 2.5};
    CHECK(!kv_bootstrap_bca(same, 3, 100, 1, 0.95, &iv, &err) && kv_close(iv.low, 0.3, 1e-15, 0) &&
          kv_close(iv.high, 0.3, 1e-15, 0));
    CHECK(!kv_bootstrap_bca(v, 1, 100, 1, 0.95, &iv, &err) && !iv.has_interval && isnan(iv.low));
    CHECK(!kv_mean_interval(v, 6, &iv, &err) && !kv_mean_interval(v, 6, &again, &err) && iv.low == again.low &&
          iv.high == again.high && iv.low < iv.mean && iv.mean < iv.high);
    CHECK(!kv_bootstrap_bca(v, 6, KV_BOOT_RESAMPLES, KV_BOOT_SEED, KV_BOOT_LEVEL, &again, &err) && iv.low == again.low);
    /* quantiles without sorting are those of the sorted array */
    kv_rng rng = {.s = 9};
    for (int t = 0; t < 200; t++) {
        double a[40], b[40], q = kv_rng_unit(&rng);
        n = 1 + kv_rng_next(&rng) % 40;
        for (size_t k = 0; k < n; k++) a[k] = b[k] = (double)(kv_rng_next(&rng) % 12);
        kv_sort_doubles(a, n);
        if (t < 2) q = t;
        CHECK(kv_quantile_of(b, n, q) == kv_quantile(a, n, q));
    }
}

static void test_families(void)
{
    /* two families of two prompts: deviations 1, -1 and 3, -3 about 10 and 20 */
    const double v[] = {11, 23, 9, 17}, lone[] = {1, 2, 5};
    const uint32_t f[] = {0, 2, 0, 2}, g[] = {0, 0, 1}, h[] = {0, 0, 0};
    kv_interval these, fresh;
    CHECK(!kv_family_intervals(v, f, 4, 3, 20000, 1, 0.95, &these, &fresh, &err));
    CHECK(these.has_interval && fresh.has_interval && these.mean == 15);
    /* sums of the two families: sd of one is sqrt(2) * 1 * sqrt(2) = 2 after stretching, of the other 6: extremes
     * +-(2 sqrt 2 + 6 sqrt 2) / 4 with 1/16 each */
    double reach = (2 + 6) * sqrt(2) / 4;
    CHECK(kv_close(these.low, 15 - reach, 1e-12, 0) && kv_close(these.high, 15 + reach, 1e-12, 0));
    CHECK(fresh.low >= 9 && fresh.low < 11 && fresh.high > 19); /* families alone span 10 to 20 */
    CHECK(!kv_family_intervals(lone, g, 3, 2, 500, 1, 0.95, &these, &fresh, &err) && !these.has_interval &&
          isnan(these.low) && fresh.has_interval);
    CHECK(!kv_family_intervals(lone, h, 3, 1, 500, 1, 0.95, &these, &fresh, &err) && these.has_interval &&
          !fresh.has_interval);
    CHECK(!kv_family_intervals(lone, h, 0, 1, 500, 1, 0.95, &these, &fresh, &err) && !these.has_interval &&
          !fresh.has_interval && isnan(these.mean));
}

/* How often of `times` a test with 5 % error says something of samples where there is nothing. draw() has mean 0. */
static double normal(kv_rng *r)
{
    return kv_rng_normal(r);
}
static double skewed(kv_rng *r) /* exponential, to the right */
{
    return -log(1 - kv_rng_unit(r)) - 1;
}
static double left(kv_rng *r)
{
    return -skewed(r);
}

static void test_error_rates(void)
{
    enum { N = 24, TIMES = 3000 };
    kv_rng rng = {.s = 20261122};
    static double (*const draws[])(kv_rng *) = {normal, skewed, left};
    double v[N];
    unsigned hit = 0;
    /* compare: signed ranks of differences that are symmetric about 0 */
    for (int t = 0; t < TIMES; t++) {
        kv_wilcoxon_result w;
        for (int i = 0; i < N; i++) v[i] = normal(&rng) - normal(&rng);
        CHECK(!kv_wilcoxon(v, N, KV_WILCOXON_EXACT_MAX, &w, &err));
        hit += w.p < 0.05;
    }
    CHECKF(hit >= 0.04 * TIMES && hit <= 0.06 * TIMES, "signed ranks: %u of %d", hit, TIMES);
    /* compare with six policies: Holm keeps any false claim among them at 5 % */
    hit = 0;
    for (int t = 0; t < TIMES / 3; t++) {
        double p[6], least = 1;
        for (int k = 0; k < 6; k++) {
            kv_wilcoxon_result w;
            for (int i = 0; i < N; i++) v[i] = normal(&rng);
            CHECK(!kv_wilcoxon(v, N, KV_WILCOXON_EXACT_MAX, &w, &err));
            p[k] = w.p;
        }
        CHECK(!kv_holm(p, 6, &err));
        for (int k = 0; k < 6; k++) least = fmin(least, p[k]);
        hit += least < 0.05;
    }
    CHECKF(hit >= 0.035 * TIMES / 3 && hit <= 0.065 * TIMES / 3, "Holm: %u of %d", hit, TIMES / 3);
    /* non-inferiority: the true loss is exactly the margin (here 0); claimed when the bound is below it */
    for (int k = 0; k < 3; k++) {
        hit = 0;
        for (int t = 0; t < TIMES / 2; t++) {
            double bound;
            for (int i = 0; i < N; i++) v[i] = draws[k](&rng);
            CHECK(!kv_upper_bound(v, N, 800, 1, 0.95, &bound, &err));
            hit += bound < 0;
        }
        double share = (double)hit / (TIMES / 2.0);
        CHECKF(k == 1 ? share >= 0.04 && share <= 0.075 : share >= 0.035 && share <= 0.06, "bound, draw %d: %.3f", k,
               share);
    }
    /* the interval of this program holds the mean 95 % of the time, a little less for few prompts */
    hit = 0;
    for (int t = 0; t < 600; t++) {
        kv_interval iv;
        for (int i = 0; i < N; i++) v[i] = normal(&rng);
        CHECK(!kv_bootstrap_bca(v, N, 800, 1, 0.95, &iv, &err));
        hit += iv.low <= 0 && 0 <= iv.high;
    }
    CHECKF(hit >= 0.915 * 600 && hit <= 0.965 * 600, "BCa: %u of 600", hit);
    /* the band of ten correlated points holds all of them */
    hit = 0;
    for (int t = 0; t < 400; t++) {
        double w[10 * N], half[10], factor;
        bool all = true;
        for (int i = 0; i < N; i++) {
            double own = normal(&rng);
            for (int k = 0; k < 10; k++) w[k * N + i] = own + normal(&rng);
        }
        CHECK(!kv_band(w, 10, N, 400, 1, 0.95, half, &factor, &err));
        for (int k = 0; k < 10; k++) all = all && fabs(kv_mean(w + k * N, N)) <= half[k];
        hit += all;
    }
    CHECKF(hit >= 0.90 * 400 && hit <= 0.98 * 400, "band: %u of 400", hit);
}

static void test_bound_and_band(void)
{
    double bound, half[2], factor;
    const double flat[] = {0.3, 0.3, 0.3}, rare[] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.12};
    CHECK(!kv_upper_bound(flat, 3, 200, 1, 0.95, &bound, &err) && kv_close(bound, 0.3, 1e-12, 0));
    CHECK(!kv_upper_bound(flat, 1, 200, 1, 0.95, &bound, &err) && isnan(bound));
    CHECK(!kv_upper_bound(rare, 12, 2000, 1, 0.95, &bound, &err));
    /* most draws have no spread at all: wide, yet finite */
    CHECKF(bound > 0.02 && bound < 0.08, "bound %g", bound);
    const double two[] = {0, 0, 0, 1, 2, 3};
    CHECK(!kv_band(two, 2, 3, 1000, 1, 0.95, half, &factor, &err) && half[0] == 0 && half[1] > 0.5 && factor > 1);
    CHECK(!kv_band(two, 2, 1, 1000, 1, 0.95, half, &factor, &err) && isnan(half[0]) && isnan(factor));
    CHECK(isnan(kv_sd(two, 1)) && kv_sd(two + 3, 3) == 1);
}

int main(void)
{
    json_error_t why;
    json_t *g = json_load_file("tests/golden/stats/expected.json", 0, &why);
    CHECKF(g != NULL, "%s", why.text);
    if (g) {
        test_distributions(g);
        test_ranks(g);
        test_many(g);
        test_bootstrap(g);
    }
    json_decref(g);
    test_families();
    test_bound_and_band();
    test_error_rates();
    return kv_tally();
}
