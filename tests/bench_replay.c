/* bench_replay.c KV-SIM TRACE - what a replay costs, as CSV: the program itself is run, so loading, ranking, measuring
 * and writing the database are all in the figure. CPU seconds (user and system) and largest resident set from the
 * system's own account of the process. Ratios compare medians of REPEAT runs, alternated. */
#include <math.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sim/results.h"
#include "tests/bench.h"
#include "traces/cli.h"

enum { REPEAT = 5, BUDGETS_MAX = 64 };
#define DB "build/bench.db"

static void die(const char *why)
{
    fprintf(stderr, "bench_replay: %s\n", why);
    exit(1);
}

/* One run of kv-sim: CPU seconds; peak (NULL allowed) in MiB. */
static double once(const char *sim, const char *trace, const char *policies, const char *budgets, const char *metrics,
                   const char *limit, double *peak)
{
    struct rusage u;
    int status;
    remove(DB);
    pid_t child = fork();
    if (child < 0) die("cannot fork");
    if (!child) {
        if (!freopen("/dev/null", "w", stderr)) _exit(127);
        execl(sim, sim, "run", trace, "-p", policies, "-b", budgets, "--metrics", metrics, "--db", DB, "--mem-limit",
              limit, (char *)NULL);
        _exit(127);
    }
    if (wait4(child, &status, 0, &u) != child || !WIFEXITED(status) || WEXITSTATUS(status))
        die("kv-sim run did not succeed");
    if (peak) *peak = (double)u.ru_maxrss / 1024;
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* n budgets, log-spaced from 1 % to 60 % of L tokens, as ../shared/bench has them. */
static char *budgets(int n, uint32_t L)
{
    char *s = kv_format("%s", "");
    for (int i = 0; i < n && s; i++) {
        double x = 0.01;
        for (int k = 0; k < i; k++) x *= n > 1 ? exp(log(60.0) / (n - 1)) : 1;
        char *more = kv_format("%s%s%u", s, i ? "," : "", (unsigned)(x * L + 0.5));
        free(s), s = more;
    }
    if (!s) die("out of memory");
    return s;
}

/* Rows of metrics a second, in transactions of one trace's runs. */
static void database(const kv_trace *t, const kv_scene *sc)
{
    enum { RUNS = 400, HEADS = 9, LAYERS = 30, ROWS = LAYERS * (HEADS + 1) + 1 };
    static kv_value v[2 * ROWS];
    kv_error e = {""};
    kv_results *db = NULL;
    kv_spec *spec = NULL;
    kv_budget *budget = NULL;
    size_t n_spec = 0, n_budget = 0, n = 0;
    uint32_t counts[LAYERS] = {0}, number[LAYERS];
    int64_t trace_id;
    double rate[REPEAT], cpu_rate[REPEAT];
    static double read_bytes[LAYERS];
    const kv_ledger ledger = {.unit_read = read_bytes};
    for (uint32_t l = 0; l < LAYERS; l++) number[l] = l;
    for (int m = 0; m < 2; m++) {
        kv_metric_id id = m ? KV_M_HEAD_ERROR : KV_M_RECALL;
        v[n++] = (kv_value){.metric = id, .layer = -1, .head = -1, .value = 0.5, .n = 64};
        for (int l = 0; l < LAYERS; l++)
            for (int h = -1; h < HEADS; h++)
                v[n++] = (kv_value){.metric = id, .layer = l, .head = h, .value = 0.9 + 1e-3 * h + 1e-4 * l, .n = 64};
    }
    if (kv_spec_parse("snapkv", &spec, &n_spec, &e) || kv_budget_parse("5%", &budget, &n_budget, &e)) die(e.msg);
    for (int r = 0; r < REPEAT; r++) {
        remove(DB);
        if (kv_results_open(DB, &db, &e)) die(e.msg);
        double t0 = kv_seconds(CLOCK_MONOTONIC), c0 = kv_seconds(CLOCK_PROCESS_CPUTIME_ID);
        if (kv_results_begin(db, &e) || kv_results_trace(db, t, sc, &trace_id, &e)) die(e.msg);
        for (int i = 0; i < RUNS; i++) {
            kv_run run = {.spec = spec,
                          .budget = budget,
                          .cut = "prompt",
                          .granularity = "kv_head",
                          .page = 1,
                          .base = spec->canonical,
                          .corner = "",
                          .target = "",
                          .oracle = "",
                          .rows = 64,
                          .detail = KV_DETAIL_HEAD,
                          .wanted = KV_M_BIT(KV_M_RECALL) | KV_M_BIT(KV_M_HEAD_ERROR),
                          .counts = counts,
                          .number = number,
                          .ledger = &ledger,
                          .n_layer = LAYERS,
                          .n_unit = 1,
                          .value = v,
                          .n_value = n};
            snprintf(run.run_id, sizeof run.run_id, "%032d", i);
            if (kv_results_put(db, trace_id, &run, &e)) die(e.msg);
        }
        if (kv_results_commit(db, &e)) die(e.msg);
        rate[r] = (double)n * RUNS / (kv_seconds(CLOCK_MONOTONIC) - t0);
        cpu_rate[r] = (double)n * RUNS / (kv_seconds(CLOCK_PROCESS_CPUTIME_ID) - c0);
        kv_results_close(db);
    }
    kv_bench_row("database", "metric rows with layer and head (wanted >= 300000)", rate, REPEAT, "rows/s");
    kv_bench_row("database", "the same by CPU time", cpu_rate, REPEAT, "rows/CPU-s");
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    free(spec), free(budget);
}

int main(int argc, char **argv)
{
    static const char *const EIGHT = "snapkv,tova,h2o,knorm,streaming,ada-snapkv,pyramidkv,cake",
                             *const FAMILY = "snapkv,pyramidkv,ada-snapkv,ada-pyramidkv,snapkv:layers=cake",
                             *const BOTH = "recall,head_error", *const ALL = "recall,head_error,layer_error";
    enum { ONE, SIXTY_FOUR, SIXTEEN, FIVE, LOCAL, WHOLE, JOB, TIGHT, CASES };
    double cpu[CASES][REPEAT], peak[CASES][REPEAT], m[CASES];
    kv_error e = {""};
    kv_trace *t = NULL;
    kv_scene sc;
    if (argc != 3) return fprintf(stderr, "usage: bench_replay KV-SIM TRACE\n"), 2;
    if (kv_trace_open(argv[2], &t, &e) || kv_scene_open(t, "prompt", 0, &sc, &e)) die(e.msg);
    char *b1 = kv_format("%u", (unsigned)(0.6 * sc.n_cut + 0.5)), *b16 = budgets(16, sc.n_cut),
         *b64 = budgets(64, sc.n_cut), *small = kv_format("%u", sc.n_cut / 20);
    printf("# %u + %u tokens, %u layers, %u query heads on %u, head size %u, build %s\n", sc.n_cut, sc.n_row,
           sc.n_evict, sc.info->n_q_head, sc.info->n_kv_head, sc.info->head_dim, kv_build_id());
    printf("name,what,median,min,unit\n");
    const struct {
        const char *what, *policies, *budgets, *metrics, *limit;
    } CASE[CASES] = {
        {"snapkv, 1 budget: recall and head error", "snapkv", b1, BOTH, "64GiB"},
        {"snapkv, 64 budgets: recall and head error", "snapkv", b64, BOTH, "64GiB"},
        {"snapkv, 16 budgets: recall and head error", "snapkv", b16, BOTH, "64GiB"},
        {"5 allocations of its ranking, 16 budgets: recall and head error", FAMILY, b16, BOTH, "64GiB"},
        {"snapkv, 5 %: recall alone (kept slots only)", "snapkv", small, "recall", "64GiB"},
        {"snapkv, 5 %: recall and contested recall (every slot)", "snapkv", small, "recall,recall_contested", "64GiB"},
        {"8 policies x 16 budgets: recall and both errors", EIGHT, b16, ALL, "64GiB"},
        {"the same under --mem-limit 100MiB", EIGHT, b16, ALL, "100MiB"}};
    for (int r = 0; r < REPEAT; r++)
        for (int c = 0; c < CASES; c++)
            cpu[c][r] =
                once(argv[1], argv[2], CASE[c].policies, CASE[c].budgets, CASE[c].metrics, CASE[c].limit, &peak[c][r]);
    for (int c = 0; c < CASES; c++) m[c] = kv_bench_row("replay", CASE[c].what, cpu[c], REPEAT, "CPU-s");
    kv_bench_row("peak", CASE[JOB].what, peak[JOB], REPEAT, "MiB");
    kv_bench_row("peak", CASE[TIGHT].what, peak[TIGHT], REPEAT, "MiB");
    printf("replay_cost,64 budgets / 1 (wanted <= 1.5),%.3f,,ratio\n", m[SIXTY_FOUR] / m[ONE]);
    printf("replay_cost,5 allocations / 1 (wanted <= 1.2),%.3f,,ratio\n", m[FIVE] / m[SIXTEEN]);
    printf("replay_cost,8 x 16 (wanted <= 8),%.3f,,CPU-s\n", m[JOB]);
    database(t, &sc);
    remove(DB);
    kv_scene_close(&sc), kv_trace_close(t);
    free(b1), free(b16), free(b64), free(small);
    return 0;
}
