/* bench_replay_gpu.c TRACE - what a replay costs on a device, as CSV, wall seconds: the trace's layers go there once
 * (load), then 8 policies x 16 budgets with recall and both errors are ranked, counted and measured REPEAT times; and
 * what one more ranking costs. The CPU's part (accounts, copies) is in the figures, the database is not. */
#include <math.h>
#include <stdlib.h>

#include "kernels/parallel.h"
#include "sim/gpu_pass.h"
#include "sim/replay.h"
#include "tests/bench.h"
#include "traces/cli.h"

enum { REPEAT = 5, N_BUDGET = 16 };

static void die(const char *why)
{
    fprintf(stderr, "bench_replay_gpu: %s\n", why);
    exit(1);
}

typedef struct {
    double rank, count, measure, load;
} times;

static times once(kv_scene *sc, const char *policies, uint32_t threads, double *check)
{
    kv_error e = {""};
    kv_spec *spec = NULL;
    kv_plan plan;
    kv_replay rp;
    size_t n_spec = 0;
    times t;
    if (kv_spec_parse(policies, &spec, &n_spec, &e)) die(e.msg);
    double t0 = kv_seconds(CLOCK_MONOTONIC), load = kv_gpu_load_seconds(sc->gpu);
    if (kv_plan_build(sc, spec, n_spec, threads, &plan, &e)) die(e.msg);
    double t1 = kv_seconds(CLOCK_MONOTONIC);
    t.load = kv_gpu_load_seconds(sc->gpu) - load;
    size_t n = n_spec * N_BUDGET;
    kv_point *point = calloc(n, sizeof *point);
    for (size_t i = 0; point && i < n; i++) { /* 1 % to 60 %, as ../shared/bench has them */
        kv_budget b = {.kind = KV_BUDGET_TOKENS,
                       .value = floor(0.01 * pow(60, (double)(i % N_BUDGET) / (N_BUDGET - 1)) * sc->n_cut + 0.5)};
        point[i] = (kv_point){.spec = i / N_BUDGET,
                              .c = kv_budget_resolve(&b, sc->n_cut, sc->slot_bytes, sc->n_evict, sc->info->n_kv_head)};
    }
    if (!point || kv_points_count(&plan, point, n, threads, &e)) die(e.msg);
    double t2 = kv_seconds(CLOCK_MONOTONIC);
    if (kv_replay_run(&plan, point, n, sc->wanted, threads, NULL, NULL, &rp, &e)) die(e.msg);
    double t3 = kv_seconds(CLOCK_MONOTONIC);
    t.rank = t1 - t0 - t.load, t.count = t2 - t1, t.measure = t3 - t2;
    *check = rp.layer_error ? rp.layer_error[0] : rp.head[0].head_error;
    for (size_t i = 0; i < n; i++) free(point[i].counts);
    free(point);
    kv_replay_free(&rp), kv_plan_free(&plan);
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    free(spec);
    return t;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *what, *policies;
    } CASE[] = {{"8 policies, 6 rankings", "snapkv,tova,h2o,knorm,streaming,ada-snapkv,pyramidkv,cake"},
                {"snapkv", "snapkv"},
                {"snapkv and knorm", "snapkv,knorm"},
                {"snapkv and cake", "snapkv,cake"},
                {"snapkv and ada-snapkv, one ranking", "snapkv,ada-snapkv"}};
    enum { CASES = sizeof CASE / sizeof *CASE };
    kv_error e = {""};
    kv_trace *t = NULL;
    kv_scene sc;
    kv_gpu_pass *gpu = NULL;
    if (argc != 2) return fprintf(stderr, "usage: bench_replay_gpu TRACE\n"), 2;
    if (kv_gpu_pass_open(&gpu, &e) || kv_trace_open(argv[1], &t, &e) || kv_scene_open(t, "prompt", 0, &sc, &e))
        die(e.msg);
    sc.gpu = gpu;
    sc.wanted = KV_M_BIT(KV_M_RECALL) | KV_M_BIT(KV_M_HEAD_ERROR) | KV_M_BIT(KV_M_LAYER_ERROR);
    uint32_t threads = kv_cpu_count();
    printf("# %u + %u tokens, %u layers, %u query heads on %u, head size %u, hidden %u, %u threads, build %s\n",
           sc.n_cut, sc.n_row, sc.n_evict, sc.info->n_q_head, sc.info->n_kv_head, sc.info->head_dim, sc.info->hidden,
           threads, kv_build_id());
    printf("name,what,median,min,unit\n");
    for (int c = 0; c < CASES; c++) {
        double rank[REPEAT], count[REPEAT], measure[REPEAT], all[REPEAT], first = 0, check = 0, again;
        for (int r = -1; r < REPEAT; r++) {
            times x = once(&sc, CASE[c].policies, threads, r < 0 ? &check : &again);
            if (r < 0) {
                first = x.rank + x.count + x.measure;
                printf("load,%s,%.3f,,s\n", CASE[c].what, x.load);
                continue;
            }
            if (again != check) die("two runs differ");
            rank[r] = x.rank, count[r] = x.count, measure[r] = x.measure, all[r] = x.rank + x.count + x.measure;
        }
        printf("first run after load,%s,%.4f,,s\n", CASE[c].what, first);
        kv_bench_row("rank", CASE[c].what, rank, REPEAT, "s");
        kv_bench_row("count", CASE[c].what, count, REPEAT, "s");
        kv_bench_row("measure", CASE[c].what, measure, REPEAT, "s");
        kv_bench_row("rank + count + measure", CASE[c].what, all, REPEAT, "s");
    }
    kv_gpu_pass_close(gpu);
    kv_scene_close(&sc), kv_trace_close(t);
    return 0;
}
