/* test_kernels.c - every kernel against its reference (kernels/table.c), and what must hold beside that: sums, bytes
 * that do not depend on threads, blocks, compilers or instruction sets, inputs that must be refused. */
#include "kernels/math.h"
#include "kernels/parallel.h"
#include "kernels/table.h"
#include "tests/check.h"

#include <stdatomic.h>
#include <stdlib.h>

#define SEED 20261122u

static float *normals(uint64_t seed, size_t n)
{
    float *x = malloc((n + 1) * sizeof *x);
    if (!x) abort();
    kv_fill_normal(seed, n, x);
    return x;
}

static void walk_table(void)
{
    char device[128];
    bool cuda = kv_cuda_device(device, sizeof device);
    for (size_t i = 0; i < kv_kernel_count; i++) {
        const kv_kernel *k = &kv_kernel_table[i];
        double worst = 0;
        for (size_t c = 0; c < k->n_case; c++) {
            for (uint64_t seed = SEED; seed < SEED + 2; seed++) {
                kv_verdict v = {.ok = true};
                k->check(k, &k->cases[c], seed, &v);
                CHECKF(v.ok, "%s case %zu seed %llu: %s", k->name, c, (unsigned long long)seed, v.why);
                if (v.worst > worst) worst = v.worst;
                if (!k->check_cuda || !cuda) continue;
                v = (kv_verdict){.ok = true};
                k->check_cuda(k, &k->cases[c], seed, &v);
                CHECKF(v.ok, "%s on %s case %zu seed %llu: %s", k->name, device, c, (unsigned long long)seed, v.why);
            }
        }
        if (worst > 0.5 && worst <= 1) printf("MARGINAL %s: %.2f of its tolerance\n", k->name, worst);
        if (k->check_cuda && !cuda) {
            SKIP("no CUDA device");
            printf("     kv_%s_cuda was not run\n", k->name);
        }
    }
}

/* A comparator that cannot fail proves nothing. */
static void comparator(void)
{
    float want[3] = {1, -2, 3}, nan[3] = {1, NAN, 3}, inf[3] = {1, -2, INFINITY}, off[3] = {1, -2.001f, 3};
    float near[3] = {1, -2.000001f, 3};
    kv_verdict v = {.ok = true};
    kv_compare("x", 3, want, want, 1e-6, &v);
    CHECK(v.ok && v.worst == 0);
    kv_compare("x", 3, near, want, 1e-6, &v);
    CHECK(v.ok && v.worst > 0);
    kv_compare("x", 3, nan, want, 1e6, &v);
    CHECK(!v.ok);
    v = (kv_verdict){.ok = true};
    kv_compare("x", 3, want, nan, 1e6, &v);
    CHECK(!v.ok);
    v = (kv_verdict){.ok = true};
    kv_compare("x", 3, nan, nan, 1e6, &v);
    CHECK(!v.ok);
    v = (kv_verdict){.ok = true};
    kv_compare("x", 3, inf, want, 1e6, &v);
    CHECK(!v.ok);
    v = (kv_verdict){.ok = true};
    kv_compare("x", 3, off, want, 1e-6, &v);
    CHECK(!v.ok && strstr(v.why, "x[1]"));
    CHECK(!kv_close(NAN, 0, 1, 1) && !kv_close(0, NAN, 1, 1));
}

static void exponential(void)
{
    double worst = 0, worst_tanh = 0;
    for (uint32_t u = 0x33000000; u < 0x42b17218; u += 1009) {
        for (uint32_t sign = 0; sign <= 1; sign++) {
            float x = kv_bits_float(u | sign << 31), t = kv_tanhf(x);
            double e = exp((double)x), h = tanh((double)x);
            if (x > -87) worst = fmax(worst, fabs(kv_expf(x) - e) / ldexp(1, ilogb(e) - 23));
            worst_tanh = fmax(worst_tanh, fabs(t - h) / ldexp(1, ilogb(h) - 23));
        }
    }
    CHECKF(worst <= 1, "%g ulp", worst);
    CHECKF(worst_tanh <= 2, "%g ulp", worst_tanh);
    CHECK(kv_expf(0) == 1 && kv_expf(-0.f) == 1);
    CHECK(kv_expf(-87.01f) == 0 && kv_expf(-INFINITY) == 0 && kv_expf(-FLT_MAX) == 0);
    CHECK(kv_expf(-87) >= FLT_MIN);
    CHECK(isfinite(kv_expf(88.7228f)) && isinf(kv_expf(88.73f)) && isinf(kv_expf(INFINITY)) && isinf(kv_expf(FLT_MAX)));
    CHECK(isnan(kv_expf(NAN)));
    CHECK(kv_tanhf(INFINITY) == 1 && kv_tanhf(-100) == -1 && kv_tanhf(0) == 0 && isnan(kv_tanhf(NAN)));
}

static void logarithm(void)
{
    double worst = 0;
    for (uint32_t u = 0x00800000; u < 0x7f800000; u += 1009) {
        float x = kv_bits_float(u);
        double e = log((double)x);
        if (x != 1) worst = fmax(worst, fabs(kv_logf(x) - e) / ldexp(1, ilogb(e) - 23));
    }
    CHECKF(worst <= 1.15, "%g ulp", worst);
    CHECK(kv_logf(1) == 0 && kv_logf(1.17549435e-38f) < -87.3f);
}

static uint64_t fnv(uint64_t h, const void *p, size_t n)
{
    for (const unsigned char *b = p; n--; b++) h = (h ^ *b) * 0x100000001b3u;
    return h;
}

/* The bytes of everything that decides a kept set, as one number. It was the same under gcc 12 -O0 -O2 -O3 and clang 14
 * -O0 -O2 -O3, with AVX2 and without (KV_NO_V3), with fmaf in hardware and in software; it may change only when a
 * definition changes. */
#define GOLDEN_EXACT 0xbb5f6fb75f23dfbeu
static void golden_bytes(void)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (int cap = 0; cap <= 50; cap += 50) {
        kv_attn_shape s = {.n_row = 75, .n_key = 333, .d = 64, .row0 = 258, .window = cap ? 100 : 0, .scale = 0.125f};
        s.softcap = (float)cap;
        float *q = normals(SEED, s.n_row * s.d), *k = normals(SEED + 1, s.n_key * s.d),
              *lse = normals(SEED + 2, s.n_row);
        float *p = malloc(s.n_row * s.n_key * sizeof *p);
        double *acc = calloc(s.n_key, sizeof *acc);
        uint32_t *order = malloc(s.n_key * sizeof *order);
        if (!p || !acc || !order) abort();
        for (size_t i = 0; i < s.n_row * s.d; i++) q[i] *= 4;
        for (size_t i = 0; i < s.n_row; i++) lse[i] += 9;
        CHECK(kv_probs(&s, q, k, p) && kv_colsum(&s, q, k, lse, acc) && kv_rank(s.n_key, p + s.n_key, order));
        h = fnv(h, p, s.n_row * s.n_key * sizeof *p);
        h = fnv(h, acc, s.n_key * sizeof *acc);
        h = fnv(h, order, s.n_key * sizeof *order);
        free(q), free(k), free(lse), free(p), free(acc), free(order);
    }
    float *x = normals(SEED, 5000);
    for (size_t i = 0; i < 5000; i++) x[i] = kv_tanhf(x[i]) + kv_expf(-x[i]);
    double entropy = kv_entropy(5000, x, 1e-10f);
    h = fnv(fnv(h, x, 5000 * sizeof *x), &entropy, sizeof entropy);
    kv_round(16, 5000, x);
    h = fnv(h, x, 5000 * sizeof *x);
    free(x);
    CHECKF(h == GOLDEN_EXACT, "it is 0x%llxu", (unsigned long long)h);
}

static void attention_sums(void)
{
    kv_attn_shape s = {.n_row = 300, .n_key = 300, .d = 64, .scale = 0.125f};
    size_t n = s.n_key, d = s.d;
    float *q = normals(1, n * d), *k = normals(2, n * d), *v = normals(3, n * d), *out = normals(4, n * d);
    float *lse = normals(5, n), *p = malloc(n * n * sizeof *p);
    double *acc = calloc(2 * n, sizeof *acc), total = 0;
    if (!p || !acc) abort();
    CHECK(kv_attention(&s, q, k, v, out, d, lse, NULL));

    /* all column sums together are the number of rows; in two blocks of rows they are the same bytes as in one */
    CHECK(kv_colsum(&s, q, k, lse, acc));
    for (size_t j = 0; j < n; j++) total += acc[j];
    CHECKF(kv_close(total, 300, 1e-3, 0), "%g", total);
    kv_attn_shape a = s, b = s;
    a.n_row = 101;
    b.n_row = 199, b.row0 = 101;
    CHECK(kv_colsum(&a, q, k, lse, acc + n) && kv_colsum(&b, q + 101 * d, k, lse + 101, acc + n));
    CHECK(!memcmp(acc, acc + n, n * sizeof *acc));

    /* rows of probabilities sum to 1 and carry the output */
    CHECK(kv_probs(&s, q, k, p));
    double worst_sum = 0, worst_out = 0;
    for (size_t r = 0; r < n; r++) {
        double sum = 0;
        for (size_t j = 0; j < n; j++) sum += p[r * n + j];
        worst_sum = fmax(worst_sum, fabs(sum - 1));
        for (size_t i = 0; i < d; i++) {
            double o = 0;
            for (size_t j = 0; j <= r; j++) o += (double)p[r * n + j] * v[j * d + i];
            worst_out = fmax(worst_out, fabs(o - out[r * d + i]));
        }
        for (size_t j = r + 1; j < n; j++)
            if (p[r * n + j] != 0) worst_sum = 1;
    }
    CHECKF(worst_sum < 1e-6, "%g", worst_sum);
    CHECKF(worst_out < 1e-5, "%g", worst_out);

    /* a ranking that keeps everything gives the attention of a row that sees everything */
    enum { ROWS = 10 };
    kv_attn_shape last = s;
    last.n_row = ROWS, last.row0 = n;
    CHECK(kv_attention(&last, q, k, v, out, d, lse, NULL));
    uint32_t order[300 + 4], check[3] = {0, 150, 300};
    for (uint32_t j = 0; j < 300; j++) order[j] = (j * 7 + 3) % 300;
    for (int j = 300; j < 304; j++) order[j] = UINT32_MAX; /* past the last checkpoint: not to be read */
    double mass[3 * ROWS], only[3 * ROWS], cmass[3 * ROWS];
    float *got = normals(6, 3 * ROWS * d);
    CHECK(kv_prefix(ROWS, d, q, lse, s.scale, 0, k, v, 304, order, 3, check, NULL, NULL, NULL, mass, NULL, got));
    CHECK(kv_prefix(ROWS, d, q, lse, s.scale, 0, k, NULL, 304, order, 3, check, NULL, NULL, NULL, only, cmass, NULL));
    CHECK(!memcmp(mass, only, sizeof mass));
    for (size_t r = 0; r < ROWS; r++) {
        CHECK(mass[r] == 0 && mass[ROWS + r] > 0 && mass[ROWS + r] < 1 && kv_close(mass[2 * ROWS + r], 1, 1e-5, 0));
        CHECK(cmass[2 * ROWS + r] == 0); /* nothing was marked as contested */
        CHECK(got[r * d] == 0);
    }
    kv_verdict same = {.ok = true};
    kv_compare("out", ROWS * d, got + 2 * ROWS * d, out, 1e-5, &same);
    CHECKF(same.ok, "%s", same.why);
    free(q), free(k), free(v), free(out), free(lse), free(p), free(acc), free(got);
}

typedef struct {
    kv_attn_shape s;
    float *q, *k, *v, *out, *lse, *stat;
} heads;

static void one_head(void *ctx, size_t i)
{
    const heads *h = ctx;
    size_t n = h->s.n_row * h->s.d;
    if (!kv_attention(&h->s, h->q + i * n, h->k, h->v, h->out + i * n, h->s.d, h->lse + i * h->s.n_row,
                      h->stat + 4 * i * h->s.n_row))
        abort();
}

static void thread_counts(void)
{
    size_t m = 700, n = 530, d = 300;
    float *a = normals(1, m * d), *b = normals(2, n * d), *c[3];
    for (uint32_t t = 0; t < 3; t++) {
        c[t] = normals(3 + t, m * n);
        CHECK(kv_matmul(m, n, d, a, b, c[t], n, t + 1));
        CHECK(!memcmp(c[0], c[t], m * n * sizeof *c[t]));
    }
    free(a), free(b);
    for (int t = 0; t < 3; t++) free(c[t]);

    enum { HEADS = 8, N = 200 };
    heads h = {.s = {.n_row = N, .n_key = N, .d = 64, .scale = 0.125f}};
    h.q = normals(1, HEADS * N * 64), h.k = normals(2, N * 64), h.v = normals(3, N * 64);
    float *out[2], *lse[2], *stat[2];
    for (uint32_t t = 0; t < 2; t++) {
        h.out = out[t] = normals(4 + t, HEADS * N * 64);
        h.lse = lse[t] = normals(6 + t, HEADS * N);
        h.stat = stat[t] = normals(8 + t, 4 * HEADS * N);
        kv_parallel(HEADS, t ? 3 : 1, one_head, &h);
    }
    CHECK(!memcmp(out[0], out[1], HEADS * N * 64 * sizeof(float)));
    CHECK(!memcmp(lse[0], lse[1], HEADS * N * sizeof(float)));
    CHECK(!memcmp(stat[0], stat[1], 4 * HEADS * N * sizeof(float)));
    for (int t = 0; t < 2; t++) free(out[t]), free(lse[t]), free(stat[t]);
    free(h.q), free(h.k), free(h.v);
}

static void count_up(void *ctx, size_t i)
{
    atomic_fetch_add((atomic_int *)ctx + i, 1);
}

static void each_task_once(void)
{
    enum { N = 1000 };
    static atomic_int hit[N + 1];
    uint32_t threads[] = {0, 1, 2, 5, 64, 5000};
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) {
        for (size_t i = 0; i <= N; i++) atomic_store(&hit[i], 0);
        kv_parallel(N, threads[t], count_up, hit);
        bool ok = atomic_load(&hit[N]) == 0;
        for (size_t i = 0; i < N; i++) ok = ok && atomic_load(&hit[i]) == 1;
        CHECKF(ok, "%u threads", threads[t]);
    }
    kv_parallel(0, 4, count_up, hit);
    CHECK(atomic_load(&hit[0]) == 1);
    CHECK(kv_cpu_count() >= 1);
}

/* A row's bytes do not depend on which rows came with it. */
static void rope_blocks(void)
{
    size_t n = 150, d = 64;
    float freq[32], *x = normals(1, n * d), *y = normals(1, n * d);
    for (int i = 0; i < 32; i++) freq[i] = 1 / (1 + (float)i * (float)i);
    kv_rope(n, d, d, 1000, freq, 1, x, d);
    kv_rope(37, d, d, 1000, freq, 1, y, d);
    kv_rope(n - 37, d, d, 1037, freq, 1, y + 37 * d, d);
    CHECK(!memcmp(x, y, n * d * sizeof *x));
    free(x), free(y);
}

/* Every half float is left as it is, and what kv_round leaves is what the planes of kv_pack say. */
static void halves(void)
{
    enum { N = 65536 };
    float *x = malloc(N * sizeof *x), *y = malloc(N * sizeof *y);
    uint8_t *p = malloc(2 * N);
    if (!x || !y || !p) abort();
    for (uint32_t i = 0; i < N; i++) {
        uint32_t e = i >> 10 & 31, m = i & 0x3ff;
        float mag = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024 + (float)m, (int)e - 25) : ldexpf((float)m, -24);
        x[i] = y[i] = i & 0x8000 ? -mag : mag;
    }
    CHECK(kv_round(16, N, x) == 0 && kv_pack(16, N, x, p) == 0);
    size_t changed = 0, wrong = 0;
    for (uint32_t i = 0; i < N; i++) {
        changed += !(x[i] == y[i] || (isnan(x[i]) && isnan(y[i])));
        wrong += !isnan(y[i]) && (p[i] | p[N + i] << 8) != (int)i;
    }
    CHECK(changed == 0);
    CHECK(wrong == 0);
    float big[4] = {65519, 65520, -1e30f, INFINITY};
    CHECK(kv_round(16, 4, big) == 2 && big[0] == 65504 && isinf(big[1]) && big[2] == -INFINITY && isinf(big[3]));
    float edge[2] = {FLT_MAX, -3.38e38f};
    CHECK(kv_round(17, 2, edge) == 1 && isinf(edge[0]) && isfinite(edge[1]));
    CHECK(kv_round(32, 2, edge) == 0);
    free(x), free(y), free(p);
}

static void refusals(void)
{
    float one = 1, got = 1;
    double sum = 0;
    uint32_t order = 0;
    kv_attn_shape wide = {.n_row = 1, .n_key = 1, .d = SIZE_MAX / 8};
    CHECK(!kv_rank((size_t)1 << 32, &one, &order));
    CHECK(!kv_colsum(&wide, &one, &one, &one, &sum));
    CHECK(!kv_probs(&wide, &one, &one, &got));
    CHECK(!kv_attention(&wide, &one, &one, &one, &got, 1, &got, NULL));
    CHECK(!kv_matmul(1, 1, (size_t)1 << 31, &one, &one, &got, 1, 1));
    CHECK(!kv_project_norm(1, (size_t)1 << 31, 1, &one, &one, &sum));
    CHECK(!kv_prefix(1, SIZE_MAX / 8, &one, &one, 1, 0, &one, &one, 0, &order, 0, &order, NULL, NULL, NULL, &sum, NULL,
                     &got));
}

int main(void)
{
    walk_table();
    comparator();
    exponential();
    logarithm();
    golden_bytes();
    attention_sums();
    thread_counts();
    each_task_once();
    rope_blocks();
    halves();
    refusals();
    return kv_tally();
}
