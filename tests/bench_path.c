/* bench_path.c MODEL PROMPTS.jsonl ID - the main jobs end to end, as CSV: capture against the same model's plain
 * forward pass, compression and reading per stream, a sweep of the closed loop against plain passes. Every ratio
 * compares two things of the same run, alternated; medians of REPEAT, of SWEEPS for the closed loop. Replay:
 * bench_replay.c. */
#include <stdlib.h>

#include "capture/run.h"
#include "capture/tokenizer.h"
#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "sim/closed.h"
#include "tests/bench.h"
#include "traces/cli.h"

enum { REPEAT = 5, SWEEPS = 3 };

static void die(const kv_error *e)
{
    fprintf(stderr, "bench_path: %s\n", e->msg);
    exit(1);
}

/* Logits of every row, as any forward pass that scores a text has them; nothing is kept. */
static kv_status see_logits(void *ctx, uint32_t row0, uint32_t n, const float *logits, kv_error *err)
{
    (void)row0, (void)n, (void)err;
    *(float *)ctx = logits[0];
    return KV_OK;
}

/* Wall and CPU seconds. */
static void plain_pass(const kv_model *m, const kv_job *j, double *wall, double *cpu)
{
    kv_engine_options o = {.dtype = KV_F16, .threads = kv_cpu_count(), .capacity = j->n_token};
    kv_engine *en = NULL;
    kv_error e = {""};
    float sink;
    kv_engine_hook hook = {.ctx = &sink, .logits = see_logits};
    double t = kv_seconds(CLOCK_MONOTONIC), c = kv_seconds(CLOCK_PROCESS_CPUTIME_ID);
    if (kv_engine_open_cpu(m, &o, &en, &e) || kv_engine_run(en, j->token, j->n_token, &hook, NULL, &e)) die(&e);
    kv_engine_close(en);
    *wall = kv_seconds(CLOCK_MONOTONIC) - t, *cpu = kv_seconds(CLOCK_PROCESS_CPUTIME_ID) - c;
}

static void capture(const kv_model *m, kv_job *j)
{
    double plain[REPEAT], rec[2][REPEAT], cpu[3][REPEAT];
    static const kv_record_level LEVEL[2] = {KV_RECORD_QKV, KV_RECORD_OBS};
    kv_error e = {""};
    for (int r = 0; r < REPEAT; r++) {
        double t, c;
        plain_pass(m, j, &t, &cpu[2][r]);
        plain[r] = j->n_token / t;
        for (int l = 0; l < 2; l++) {
            kv_capture_request q = {.level = LEVEL[l], .dtype = KV_F16, .wo = "none", .threads = kv_cpu_count()};
            kv_capture_plan p;
            kv_capture_result res;
            if (kv_capture_plan_open(m, &q, j, &p, &e)) die(&e);
            t = kv_seconds(CLOCK_MONOTONIC), c = kv_seconds(CLOCK_PROCESS_CPUTIME_ID);
            if (kv_capture_plan_run(&p, m, &q, j, "build/bench.kvt", &res, &e)) die(&e);
            rec[l][r] = j->n_token / (kv_seconds(CLOCK_MONOTONIC) - t),
            cpu[l][r] = kv_seconds(CLOCK_PROCESS_CPUTIME_ID) - c;
            kv_capture_plan_close(&p);
        }
    }
    double p = kv_bench_row("forward", "plain forward pass", plain, REPEAT, "tokens/s");
    double q = kv_bench_row("capture", "--record qkv", rec[0], REPEAT, "tokens/s"),
           o = kv_bench_row("capture", "--record obs", rec[1], REPEAT, "tokens/s");
    kv_bench_row("forward_cpu", "plain forward pass", cpu[2], REPEAT, "CPU-s"),
        kv_bench_row("capture_cpu", "--record qkv", cpu[0], REPEAT, "CPU-s");
    kv_bench_row("capture_cpu", "--record obs", cpu[1], REPEAT, "CPU-s");
    printf("capture_cost,plain / qkv,%.3f,,ratio\ncapture_cost,plain / obs,%.3f,,ratio\n", p / q, p / o);
}

/* Write and read one stream of the captured trace through /dev/null and from the page cache. */
static void stream(const kv_trace *t, kv_stream s, kv_dtype dtype)
{
    const kv_trace_info *in = kv_trace_get_info(t);
    uint32_t heads = s == KV_S_Q ? in->n_q_head : in->n_kv_head, N = in->n_token, d = in->head_dim;
    size_t n = (size_t)heads * N * d;
    float *x = malloc(n * sizeof *x);
    uint8_t *raw = malloc(n * 2);
    double rate[REPEAT], read[REPEAT], ratio = 0;
    kv_error e = {""};
    char what[32];
    for (int r = 0; r < REPEAT && x && raw; r++) {
        kv_trace_info out = *in;
        kv_trace_writer *w = NULL;
        double spent = 0, got = 0;
        out.dtype = dtype;
        if (kv_trace_create("/dev/null", &out, NULL, 0, &w, &e)) die(&e);
        for (uint32_t l = 0; l < in->n_layer; l++) {
            double t0 = kv_seconds(CLOCK_MONOTONIC);
            for (uint32_t h = 0; h < heads; h++)
                if (kv_trace_read_f32(t, s, in->layer[l], h, 0, N, x + (size_t)h * N * d, &e)) die(&e);
            got += kv_seconds(CLOCK_MONOTONIC) - t0;
            kv_encode_f32(dtype, x, n, raw);
            kv_chunk c = {
                .stream = s, .layer = in->layer[l], .head_count = heads, .token_count = N, .width = d, .dtype = dtype};
            t0 = kv_seconds(CLOCK_MONOTONIC);
            if (kv_trace_put(w, &c, raw, &e)) die(&e);
            spent += kv_seconds(CLOCK_MONOTONIC) - t0;
        }
        kv_trace_usage u = kv_trace_writer_usage(w);
        ratio = (double)u.raw[s] / (double)u.stored[s];
        rate[r] = 2e-9 * (double)n * in->n_layer / spent, read[r] = 2e-9 * (double)n * in->n_layer / got;
        kv_trace_abandon(w);
    }
    snprintf(what, sizeof what, "%s %s", kv_stream_name(s), kv_dtype_name(dtype));
    kv_bench_row("write", what, rate, REPEAT, "GB/s one thread");
    if (dtype == in->dtype) kv_bench_row("read", what, read, REPEAT, "GB/s one thread");
    printf("ratio,%s,%.4f,,raw / stored\n", what, ratio);
    free(x), free(raw);
}

/* The trace of a job in build/bench.kvt. */
static void record(const kv_model *m, kv_job *j, kv_trace **t)
{
    kv_capture_request q = {.level = KV_RECORD_QKV, .dtype = KV_F16, .wo = "embed", .threads = kv_cpu_count()};
    kv_capture_plan p;
    kv_capture_result res;
    kv_error e = {""};
    if (kv_capture_plan_open(m, &q, j, &p, &e) || kv_capture_plan_run(&p, m, &q, j, "build/bench.kvt", &res, &e))
        die(&e);
    kv_capture_plan_close(&p);
    if (kv_trace_open("build/bench.kvt", t, &e)) die(&e);
}

/* All that `kv-sim run --model` does of a trace but the database: rankings, counts, the replay, the model. */
static void closed(kv_model *m, kv_job *j)
{
    static const char *const POLICIES = "snapkv,tova,h2o,knorm,streaming,ada-snapkv,pyramidkv,cake,criticalkv,oracle",
                             *const BUDGETS = "2%,3%,5%,8%,13%,20%,32%,50%";
    kv_spec *spec = NULL;
    kv_budget *budget = NULL;
    kv_trace *t = NULL;
    kv_scene sc;
    size_t n_spec = 0, n_budget = 0;
    uint32_t threads = kv_cpu_count();
    double plain[SWEEPS], sweep[SWEEPS], wall;
    kv_error e = {""};
    if (kv_model_hash(m, &e)) die(&e); /* the trace says which model it is from */
    record(m, j, &t);
    if (kv_scene_open(t, "prompt", 0, &sc, &e) || kv_spec_parse(POLICIES, &spec, &n_spec, &e) ||
        kv_budget_parse(BUDGETS, &budget, &n_budget, &e) || kv_closed_check(m, &sc, &e))
        die(&e);
    size_t n = n_spec * n_budget;
    kv_point *point = calloc(n, sizeof *point);
    for (int r = 0; r < SWEEPS && point; r++) {
        kv_plan plan;
        kv_replay rp;
        kv_closed c;
        plain_pass(m, j, &wall, &plain[r]);
        double began = kv_seconds(CLOCK_PROCESS_CPUTIME_ID);
        for (size_t i = 0; i < n; i++)
            point[i] = (kv_point){
                .spec = i / n_budget,
                .c = kv_budget_resolve(&budget[i % n_budget], sc.n_cut, sc.slot_bytes, sc.n_evict, sc.info->n_kv_head)};
        if (kv_plan_build(&sc, spec, n_spec, threads, &plan, &e) || kv_points_count(&plan, point, n, threads, &e) ||
            kv_replay_run(&plan, point, n, KV_M_CLOSED, threads, NULL, NULL, &rp, &e) ||
            kv_closed_run(&plan, point, n, m, threads, NULL, NULL, NULL, &c, &e))
            die(&e);
        sweep[r] = kv_seconds(CLOCK_PROCESS_CPUTIME_ID) - began;
        kv_closed_free(&c), kv_replay_free(&rp), kv_plan_free(&plan);
        for (size_t i = 0; i < n; i++) free(point[i].counts);
    }
    printf("# closed loop: %u + %u tokens, %s at %s\n", sc.n_cut, sc.n_row, POLICIES, BUDGETS);
    double a = kv_bench_row("closed_plain", "plain forward pass", plain, SWEEPS, "CPU-s"),
           b = kv_bench_row("closed_sweep", "10 policies x 8 budgets", sweep, SWEEPS, "CPU-s");
    printf("closed_cost,sweep / plain (wanted < 10),%.3f,,ratio\n", b / a);
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    free(spec), free(budget), free(point);
    kv_scene_close(&sc), kv_trace_close(t);
}

int main(int argc, char **argv)
{
    kv_error e = {""};
    kv_model *m = NULL;
    kv_job j;
    kv_trace *t = NULL;
    kv_prompts ps;
    if (argc != 4) return fprintf(stderr, "usage: bench_path MODEL.gguf PROMPTS.jsonl ID\n"), 2;
    if (kv_model_open(argv[1], KV_WEIGHTS_F32, kv_cpu_count(), &m, &e) || kv_prompts_read(argv[2], &ps, &e)) die(&e);
    size_t at = 0;
    while (at < ps.n && strcmp(ps.v[at].id, argv[3])) at++;
    if (at == ps.n) return fprintf(stderr, "bench_path: no prompt '%s'\n", argv[3]), 2;
    kv_job_options whole = {.decode = KV_JOB_DECODE_ALL};
    if (kv_prompt_load(&ps.v[at], &e) || kv_job_from_prompt(m, &ps.v[at], &whole, &j, &e)) die(&e);
    printf("# %s, %s, prompt %s: %u + %u tokens, %u cores, build %s\n", argv[0], m->desc.name, argv[3], j.n_prompt,
           j.n_token - j.n_prompt, kv_cpu_count(), kv_build_id());
    printf("name,what,median,min,unit\n");
    capture(m, &j);
    /* streams of the qkv trace, which has everything */
    record(m, &j, &t);
    for (kv_stream s = KV_S_Q; s <= KV_S_V; s++) stream(t, s, KV_F16), stream(t, s, KV_BF16);
    kv_trace_close(t);
    kv_job_free(&j);
    kv_job_options rows = {.decode = 96};
    if (kv_job_from_prompt(m, &ps.v[at], &rows, &j, &e)) die(&e);
    closed(m, &j);
    kv_job_free(&j);
    kv_prompts_free(&ps);
    kv_model_close(m);
    remove("build/bench.kvt");
    return 0;
}
