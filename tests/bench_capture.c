/* bench_capture.c MODEL TOKENS [THREADS [cpu|cuda [REPEAT]]] - what recording costs: the forward pass of a prompt alone
 * and with each level of recording written to /dev/null, on one engine, in turn; medians of REPEAT (3). Shares: how
 * busy each stage was. `make bench-capture` runs it on a device for the 8B shape. */
#include <stdlib.h>
#include <sys/resource.h>

#include "capture/run.h"
#include "kernels/parallel.h"
#include "tests/bench.h"
#include "traces/cli.h"

enum { REPEAT_MAX = 99 };

static void die(const kv_error *e)
{
    fprintf(stderr, "bench_capture: %s\n", e->msg);
    exit(1);
}

int main(int argc, char **argv)
{
    kv_error err = {""};
    kv_model *m = NULL;
    kv_job j;
    uint64_t n = 0, threads = kv_cpu_count(), repeat = 3;
    kv_engine *e = NULL;
    double off[REPEAT_MAX], on[REPEAT_MAX];
    if (argc < 3 || !kv_parse_u64(argv[2], &n) || !n || n > KV_TOKENS_MAX ||
        (argc > 3 && (!kv_parse_u64(argv[3], &threads) || threads < 1 || threads > 256)) ||
        (argc > 5 && (!kv_parse_u64(argv[5], &repeat) || repeat < 1 || repeat > REPEAT_MAX)))
        return fprintf(stderr, "usage: bench_capture MODEL TOKENS [THREADS [cpu|cuda [REPEAT]]]\n"), 2;
    bool cuda = argc <= 4 || strcmp(argv[4], "cpu");
    char *tokens = kv_format("random:%llu", (unsigned long long)n);
    if (kv_model_open(argv[1], cuda ? KV_WEIGHTS_STORED : KV_WEIGHTS_F32, (uint32_t)threads, &m, &err) ||
        kv_job_from_tokens(m, tokens, 0, 0, &j, &err))
        die(&err);
    kv_dtype dtype = cuda && m->layer[0].wq.random > 0 ? KV_BF16 : KV_F16;
    kv_engine_options o = {.dtype = dtype, .threads = (uint32_t)threads, .capacity = (uint32_t)n};
    float *last = malloc(m->desc.n_vocab * sizeof *last);
    double t = kv_seconds(CLOCK_MONOTONIC);
    if ((cuda ? kv_engine_open_cuda : kv_engine_open_cpu)(m, &o, &e, &err)) die(&err);
    printf("# bench_capture %s, %llu tokens, %s, %llu threads compress, %s, build %s\n", argv[1], (unsigned long long)n,
           kv_dtype_name(dtype), (unsigned long long)threads, kv_engine_get_usage(e).device, kv_build_id());
    printf("name,what,median,min,unit\nopen,weights on the device,%.3f,,s\n", kv_seconds(CLOCK_MONOTONIC) - t);
    for (int r = -1; r < (int)repeat; r++) {
        kv_engine_reset(e);
        t = kv_seconds(CLOCK_MONOTONIC);
        if (kv_engine_run(e, j.token, (uint32_t)n, NULL, last, &err)) die(&err);
        if (r >= 0) off[r] = kv_seconds(CLOCK_MONOTONIC) - t;
    }
    double plain = kv_median(off, (int)repeat);
    printf("forward,recording off,%.4f,%.4f,s\n", plain, off[0]);
    for (kv_record_level level = KV_RECORD_OBS; level <= KV_RECORD_QKV; level++) {
        kv_capture_request q = {.level = level, .dtype = dtype, .wo = "none", .threads = (uint32_t)threads};
        kv_capture_plan p;
        kv_capture_result res;
        q.cuda = cuda, q.engine = &e;
        for (int r = -1; r < (int)repeat; r++) {
            if (kv_capture_plan_open(m, &q, &j, &p, &err)) die(&err);
            if (kv_capture_plan_run(&p, m, &q, &j, "/dev/null", &res, &err)) die(&err);
            kv_capture_plan_close(&p);
            if (r >= 0) on[r] = res.model_s;
        }
        double s = kv_median(on, (int)repeat);
        printf("capture,--record %s,%.4f,%.4f,s\n", kv_record_name(level), s, on[0]);
        printf("cost,--record %s / off,%.3f,,ratio\n", kv_record_name(level), s / plain);
        printf("compute,--record %s,%.4f,,s on the device\n", kv_record_name(level), res.engine.compute_s);
        printf("rate,--record %s,%.2f,,GB/s before compression (%.2f GB; %.2fx)\n", kv_record_name(level),
               1e-9 * (double)res.raw / s, 1e-9 * (double)res.raw, (double)res.raw / (double)res.stored);
        for (int i = 0; i < KV_STAGE_COUNT; i++)
            printf("busy,%s: %s,%.3f,,share\n", kv_record_name(level), kv_stage_name((kv_stage)i), res.busy[i]);
    }
    kv_engine_usage u = kv_engine_get_usage(e);
    printf("memory,device,%.3f,,GiB\nmemory,weights,%.3f,,GiB\nmemory,cache,%.3f,,GiB\nmemory,more,%.2f,,%%\n",
           (double)u.device_bytes / 0x1p30, (double)u.weight_bytes / 0x1p30, (double)u.cache_bytes / 0x1p30,
           100 * ((double)u.device_bytes / (double)(u.weight_bytes + u.cache_bytes + 1) - 1));
    printf("memory,driver says in use,%.3f,,GiB\n", (double)u.device_used / 0x1p30);
    struct rusage own;
    if (!getrusage(RUSAGE_SELF, &own)) printf("memory,host at its largest,%.3f,,GiB\n", (double)own.ru_maxrss / 0x1p20);
    kv_engine_close(e);
    kv_job_free(&j);
    kv_model_close(m);
    free(last), free(tokens);
    return 0;
}
