/* bench_kernels.c - timings of the kernels, one CSV row each: name,shape,median_ms,min_ms,rate,unit.
 * Rates use the median. GFLOP/s count 2 d flops for a visible (row, key) pair and product, so attention has 4 d and
 * column sums 2 d; the exponentials are not counted. `bench_kernels NAME` runs the rows whose name begins with NAME. */
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "kernels/table.h"
#include "tests/bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RUNS_MAX 50
#define BUDGET_S 1.0

static const char *only = "";

/* Everything a timed call may need; made once. */
static struct {
    float *q, *k, *v, *w, *out, *lse, *stat;
    double *acc, *mass;
    uint32_t *order, *check;
    uint8_t *bytes;
} g;

typedef struct {
    size_t m, n, d, extra;
    float softcap;
    bool flag;
} args;

static void bench(const char *name, const char *shape, double work, const char *unit, bool (*fn)(const args *), args a)
{
    if (strncmp(name, only, strlen(only))) return;
    double t[RUNS_MAX], begin = kv_seconds(CLOCK_MONOTONIC);
    int n = 0;
    fn(&a); /* warm: pages, caches, OpenBLAS buffers */
    while (n < RUNS_MAX && (n < 5 || kv_seconds(CLOCK_MONOTONIC) - begin < BUDGET_S)) {
        double t0 = kv_seconds(CLOCK_MONOTONIC);
        if (!fn(&a)) {
            fprintf(stderr, "bench_kernels: %s %s failed\n", name, shape);
            exit(1);
        }
        t[n++] = kv_seconds(CLOCK_MONOTONIC) - t0;
    }
    qsort(t, (size_t)n, sizeof *t, kv_ascending);
    printf("%s,%s,%.4g,%.4g,%.4g,%s\n", name, shape, 1e3 * t[n / 2], 1e3 * t[0], work / t[n / 2], unit);
    fflush(stdout);
}

static kv_attn_shape shape_of(const args *a)
{
    kv_attn_shape s = {.n_row = a->m, .n_key = a->n, .d = a->d, .row0 = a->n - a->m, .window = a->extra};
    s.scale = 1 / sqrtf((float)a->d);
    s.softcap = a->softcap;
    return s;
}
static bool attention(const args *a)
{
    kv_attn_shape s = shape_of(a);
    return kv_attention(&s, g.q, g.k, g.v, g.out, a->d, g.lse, a->flag ? g.stat : NULL);
}
static bool colsum(const args *a)
{
    kv_attn_shape s = shape_of(a);
    return kv_colsum(&s, g.q, g.k, g.lse, g.acc);
}
static bool probs(const args *a)
{
    kv_attn_shape s = shape_of(a);
    return kv_probs(&s, g.q, g.k, g.out);
}
static bool rank(const args *a)
{
    return kv_rank(a->n, g.q, g.order);
}
static bool prefix(const args *a)
{
    for (size_t c = 0; c < a->extra; c++) /* log-spaced like --budget auto, the last is everything */
        g.check[c] = (uint32_t)((double)a->n * pow(0.01, 1 - (double)(c + 1) / (double)a->extra));
    return kv_prefix(a->m, a->d, g.q, g.lse, 0.125f, 0, g.k, g.v, a->n, g.order, a->extra, g.check, NULL, NULL, NULL,
                     g.mass, NULL, a->flag ? g.out : NULL);
}
static bool turned(const args *a)
{
    kv_attn_shape s = {.n_row = a->m / 3, .n_key = a->n, .d = a->d, .row0 = a->n, .scale = 0.125f};
    return kv_probs_turned(&s, 3, g.q, s.n_row * a->d, g.k, g.out, a->m, g.lse);
}
static bool walk(const args *a)
{
    size_t at = 0, rows = a->m * a->d;
    memset(g.stat, 0, 2 * rows * sizeof *g.stat), memset(g.mass, 0, a->m * sizeof *g.mass);
    for (size_t c = 0; c < a->extra; c++) {
        size_t to = (size_t)((double)a->n * pow(0.01, 1 - (double)(c + 1) / (double)a->extra));
        kv_walk(a->m, a->d, g.out, a->m, g.v, at, to - at, g.order + at, NULL, g.mass, NULL, a->flag ? g.stat : NULL,
                g.stat + rows);
        if (a->flag) kv_walk_compare(a->m, a->d, g.mass, g.stat, g.stat + rows, g.q, g.acc, g.acc + a->m, NULL, 0);
        at = to;
    }
    return true;
}
static bool gemm(const args *a)
{
    kv_sgemm_nt(a->m, a->n, a->d, 1, g.q, a->d, g.w, a->d, 0, g.out, a->n);
    return true;
}
static bool matmul(const args *a)
{
    return kv_matmul(a->m, a->n, a->d, g.q, g.w, g.out, a->n, (uint32_t)a->extra);
}
static bool project(const args *a)
{
    return kv_project_norm(a->m, a->d, a->n, g.q, g.w, g.mass);
}
static bool project_upper(const args *a)
{
    return kv_project_norm_upper(a->m, a->d, a->n, g.q, g.w, g.mass);
}
static bool triangle(const args *a)
{
    return kv_triangle(a->n, a->d, g.w, g.out);
}
static bool rmsnorm(const args *a)
{
    kv_rmsnorm(a->m, a->d, g.q, g.w, 1e-5f, g.out);
    return true;
}
static bool rope(const args *a)
{
    float freq[64];
    for (int i = 0; i < 64; i++) freq[i] = powf(1e4f, -(float)i / 64);
    kv_rope(a->m, a->d, a->d, 1000, freq, 1, g.v, a->d);
    return true;
}
static bool swiglu(const args *a)
{
    memcpy(g.out, g.q, a->n * sizeof *g.out);
    kv_swiglu(a->n, g.out, g.k);
    return true;
}
static bool pack(const args *a)
{
    return kv_pack((int)a->extra, a->n, g.q, g.bytes) == 0;
}
static bool round_to(const args *a)
{
    return kv_round((int)a->extra, a->n, g.q) == 0;
}
static bool pack_device(const args *a)
{
    size_t over;
    return kv_pack_cuda((int)a->extra, a->n, g.q, g.bytes, &over) == 0;
}

static void attention_rows(void)
{
    for (size_t d = 64; d <= 128; d += 64) {
        char shape[64];
        double pairs = 2048. * 2049 / 2;
        snprintf(shape, sizeof shape, "2048x2048x%zu causal", d);
        bench("attention", shape, pairs * 4 * (double)d / 1e9, "GFLOP/s", attention,
              (args){2048, 2048, d, 0, 0, false});
        bench("attention_stat", shape, pairs * 4 * (double)d / 1e9, "GFLOP/s", attention,
              (args){2048, 2048, d, 0, 0, true});
        bench("colsum", shape, pairs * 2 * (double)d / 1e9, "GFLOP/s", colsum, (args){2048, 2048, d, 0, 0, false});
        snprintf(shape, sizeof shape, "32x32768x%zu", d);
        bench("probs", shape, 32. * 32768 * 2 * (double)d / 1e9, "GFLOP/s", probs, (args){32, 32768, d, 0, 0, false});
    }
    double pairs = 2048. * 2049 / 2, band = 512. * 2048 - 512. * 511 / 2;
    bench("attention_softcap", "2048x2048x64 causal", pairs * 256 / 1e9, "GFLOP/s", attention,
          (args){2048, 2048, 64, 0, 50, false});
    bench("colsum_softcap", "2048x2048x64 causal", pairs * 128 / 1e9, "GFLOP/s", colsum,
          (args){2048, 2048, 64, 0, 50, false});
    bench("attention_window", "2048x2048x64 window 512", band * 256 / 1e9, "GFLOP/s", attention,
          (args){2048, 2048, 64, 512, 0, false});
    bench("attention_decode", "1x8192x64", 8192 * 256 / 1e9, "GFLOP/s", attention, (args){1, 8192, 64, 0, 0, false});
}

static void prefix_rows(void)
{
    double flops = 384. * 8192 * 64 / 1e9;
    if (!kv_rank(8192, g.v, g.order)) exit(1);
    bench("attention_rows", "384x8192x64", flops * 4, "GFLOP/s", attention, (args){384, 8192, 64, 0, 0, false});
    bench("prefix_1", "384x8192x64", flops * 4, "GFLOP/s", prefix, (args){384, 8192, 64, 1, 0, true});
    bench("prefix_16", "384x8192x64", flops * 4, "GFLOP/s", prefix, (args){384, 8192, 64, 16, 0, true});
    bench("prefix_64", "384x8192x64", flops * 4, "GFLOP/s", prefix, (args){384, 8192, 64, 64, 0, true});
    bench("prefix_mass_1", "384x8192x64", flops * 2, "GFLOP/s", prefix, (args){384, 8192, 64, 1, 0, false});
    bench("prefix_mass_64", "384x8192x64", flops * 2, "GFLOP/s", prefix, (args){384, 8192, 64, 64, 0, false});
}

static void walk_rows(void)
{
    double flops = 384. * 8192 * 64 / 1e9;
    bench("probs_turned", "384x8192x64", flops * 2, "GFLOP/s", turned, (args){384, 8192, 64, 0, 0, false});
    bench("walk_1", "384x8192x64", flops * 2, "GFLOP/s", walk, (args){384, 8192, 64, 1, 0, true});
    bench("walk_64", "384x8192x64", flops * 2, "GFLOP/s", walk, (args){384, 8192, 64, 64, 0, true});
    bench("walk_mass_1", "384x8192x64", 384. * 8192 / 1e9, "Gadd/s", walk, (args){384, 8192, 64, 1, 0, false});
    bench("walk_mass_64", "384x8192x64", 384. * 8192 / 1e9, "Gadd/s", walk, (args){384, 8192, 64, 64, 0, false});
}

static void product_rows(void)
{
    static const size_t s[][3] = {{1024, 576, 576}, {1024, 1536, 576}, {1024, 576, 1536}, {2048, 2048, 2048}};
    for (size_t i = 0; i < sizeof s / sizeof *s; i++) {
        char shape[64];
        size_t m = s[i][0], n = s[i][1], k = s[i][2];
        double work = 2. * (double)m * (double)n * (double)k / 1e9;
        snprintf(shape, sizeof shape, "%zux%zux%zu", m, n, k);
        bench("openblas_sgemm", shape, work, "GFLOP/s", gemm, (args){m, n, k, 0, 0, false});
        bench("matmul_1", shape, work, "GFLOP/s", matmul, (args){m, n, k, 1, 0, false});
        bench("matmul_2", shape, work, "GFLOP/s", matmul, (args){m, n, k, 2, 0, false});
    }
    bench("matmul_decode_1", "1x1536x576", 4. * 1536 * 576 / 1e9, "GB/s", matmul, (args){1, 1536, 576, 1, 0, false});
    bench("matmul_decode_1", "1x4096x2048", 4. * 4096 * 2048 / 1e9, "GB/s", matmul, (args){1, 4096, 2048, 1, 0, false});
    bench("matmul_decode_2", "1x4096x2048", 4. * 4096 * 2048 / 1e9, "GB/s", matmul, (args){1, 4096, 2048, 2, 0, false});
    bench("project_norm", "2048x576x576", 2. * 2048 * 576 * 576 / 1e9, "GFLOP/s", project,
          (args){2048, 576, 576, 0, 0, false});
    bench("project_norm_upper", "2048x576x576", 2. * 2048 * 576 * 577 / 2 / 1e9, "GFLOP/s", project_upper,
          (args){2048, 576, 576, 0, 0, false});
    bench("triangle", "576x576", 4. / 3 * 576 * 576 * 576 / 1e9, "GFLOP/s", triangle, (args){0, 576, 576, 0, 0, false});
}

static void row_rows(void)
{
    for (size_t n = 1000; n <= 1000000; n *= 10) {
        char shape[64];
        snprintf(shape, sizeof shape, "%zu", n);
        bench("rank", shape, (double)n / 1e6, "Mkeys/s", rank, (args){0, n, 0, 0, 0, false});
    }
    bench("rmsnorm", "1024x576", 1024 * 576 * 4 / 1e9, "GB/s", rmsnorm, (args){1024, 0, 576, 0, 0, false});
    bench("rope", "1024x64", 1024 * 64 * 4 / 1e9, "GB/s", rope, (args){1024, 0, 64, 0, 0, false});
    bench("swiglu", "1572864", 1572864 * 8 / 1e9, "GB/s", swiglu, (args){0, 1572864, 0, 0, 0, false});
    for (size_t bits = 16; bits <= 32; bits += bits == 16 ? 1 : 15) {
        char shape[64];
        const char *type = bits == 32 ? "f32" : bits == 16 ? "f16" : "bf16";
        snprintf(shape, sizeof shape, "1048576 %s", type);
        bench("pack", shape, 1048576 * 4 / 1e9, "GB/s in", pack, (args){0, 1048576, 0, bits, 0, false});
        if (kv_cuda_device(NULL, 0))
            bench("pack_cuda", shape, 1048576 * 4 / 1e9, "GB/s in", pack_device, (args){0, 1048576, 0, bits, 0, false});
    }
    /* last: these round the inputs */
    bench("round", "1048576 f16", 1048576 * 4 / 1e9, "GB/s in", round_to, (args){0, 1048576, 0, 16, 0, false});
    bench("round", "1048576 bf16", 1048576 * 4 / 1e9, "GB/s in", round_to, (args){0, 1048576, 0, 17, 0, false});
}

int main(int argc, char **argv)
{
    size_t n = (size_t)1 << 22;
    if (argc > 1) only = argv[1];
    g.q = malloc(n * 4), g.k = malloc(n * 4), g.v = malloc(n * 4), g.w = malloc(n * 4), g.out = malloc(8 * n * 4);
    g.lse = malloc(n * 4), g.stat = malloc(n * 4), g.acc = calloc(n, 8), g.mass = malloc(n * 8);
    g.order = malloc(n * 4), g.check = malloc(4096), g.bytes = malloc(4 * n);
    if (!g.q || !g.k || !g.v || !g.w || !g.out || !g.lse || !g.stat || !g.acc || !g.mass || !g.order || !g.check ||
        !g.bytes) {
        fprintf(stderr, "bench_kernels: out of memory\n");
        return 1;
    }
    float *fill[] = {g.q, g.k, g.v, g.w};
    for (size_t i = 0; i < 4; i++) kv_fill_normal(i + 1, n, fill[i]);
    for (size_t i = 0; i < n; i++) g.lse[i] = 8;
    char device[128];
    printf("# cores %u, device %s\n", kv_cpu_count(), kv_cuda_device(device, sizeof device) ? device : "none");
    printf("name,shape,median_ms,min_ms,rate,unit\n");
    attention_rows();
    prefix_rows();
    walk_rows();
    product_rows();
    row_rows();
    return 0; /* the system takes the arrays back */
}
