/* test_cuda_engine.c - the CUDA engine on a device in memory (fake_gpu.h): what it records equals what the CPU records,
 * whatever the architecture, the chunks, the number of devices and the number of calls; and whichever call to the
 * device fails, the error is clean and nothing is left behind. */
#include "tests/fake_gpu.h"

#include "tests/closed_pairs.h"
#include "traces/format.h"

#include <unistd.h>

#define GGUF "tests/golden/models/gguf/llama256/llama256.Q4_K_M.gguf"

/* Every stream of a is in b and as large as `tol` allows. */
static void compare(const char *what, const char *a_name, const char *b_name, double tol)
{
    static const kv_stream streams[] = {KV_S_Q,     KV_S_K,      KV_S_V,          KV_S_LSE, KV_S_ROWSTAT,
                                        KV_S_XNORM, KV_S_COLSUM, KV_S_COLSUM_CTX, KV_S_MAP, KV_S_MAP_WINDOW,
                                        KV_S_WO,    KV_S_NLL,    KV_S_LOGITS};
    kv_trace *a = NULL, *b = NULL;
    kv_error err = {""};
    CHECKF(!kv_trace_open(in_dir(a_name), &a, &err) && !kv_trace_open(in_dir(b_name), &b, &err), "%s: %s", what,
           err.msg);
    if (!a || !b) goto out;
    const kv_trace_info *i = kv_trace_get_info(a);
    for (size_t s = 0; s < sizeof streams / sizeof *streams; s++) {
        uint32_t width = kv_trace_width(a, streams[s]);
        double worst = 0, size = 0;
        bool whole = streams[s] == KV_S_NLL || streams[s] == KV_S_LOGITS, one = streams[s] == KV_S_XNORM;
        CHECKF(kv_trace_width(b, streams[s]) == width, "%s: %s", what, kv_stream_name(streams[s]));
        if (!width || streams[s] == KV_S_WO) continue;
        float *x = malloc(2 * (size_t)width * sizeof *x);
        for (uint32_t l = 0; l < (whole ? 1 : i->n_layer); l++)
            for (uint32_t h = 0; h < (whole || one ? 1 : i->n_q_head); h++)
                for (uint32_t r = 0; r < i->n_token; r++) {
                    uint32_t layer = whole ? 0 : i->layer[l];
                    bool have = kv_trace_has(a, streams[s], layer, h, r, r + 1);
                    if (have != kv_trace_has(b, streams[s], layer, h, r, r + 1)) worst = INFINITY;
                    if (!have) continue;
                    if (kv_trace_read_f32(a, streams[s], layer, h, r, r + 1, x, &err) ||
                        kv_trace_read_f32(b, streams[s], layer, h, r, r + 1, x + width, &err)) {
                        worst = INFINITY;
                        continue;
                    }
                    for (uint32_t c = 0; c < width; c++) {
                        /* columns and token numbers: near ties may differ */
                        if ((streams[s] == KV_S_ROWSTAT && c == 1) || (streams[s] == KV_S_LOGITS && c < width / 2))
                            continue;
                        double d = fabs((double)x[c] - (double)x[width + c]);
                        if (!(d <= worst)) worst = isnan(d) ? INFINITY : d;
                        size = fmax(size, fabs((double)x[c]));
                    }
                }
        if (streams[s] == KV_S_MAP || streams[s] == KV_S_MAP_WINDOW) worst /= 50; /* f16 */
        CHECKF(worst <= tol * fmax(size, 1), "%s: %s differs by %g of %g", what, kv_stream_name(streams[s]), worst,
               size);
        CHECKF(size > 0, "%s: %s is all zero", what, kv_stream_name(streams[s]));
        free(x);
    }
    for (uint32_t l = 0; l < i->n_layer; l++) CHECK(kv_trace_has_wo(a, i->layer[l]) == kv_trace_has_wo(b, i->layer[l]));
out:
    kv_trace_close(a), kv_trace_close(b);
}

static bool same_content(const char *a_name, const char *b_name)
{
    kv_trace *a = NULL, *b = NULL;
    bool same = !kv_trace_open(in_dir(a_name), &a, NULL) && !kv_trace_open(in_dir(b_name), &b, NULL) &&
                !strcmp(kv_trace_content_sha256(a), kv_trace_content_sha256(b));
    kv_trace_close(a), kv_trace_close(b);
    return same;
}

static kv_engine *open_engine(const kv_model *m, kv_dtype dtype, uint32_t gpus, uint32_t chunk)
{
    kv_engine_options o = {.dtype = dtype, .threads = 2, .capacity = 8, .gpus = gpus, .chunk = chunk};
    kv_engine *e = NULL;
    kv_error err = {""};
    CHECKF(kv_engine_open_cuda(m, &o, &e, &err) == KV_OK, "%s", err.msg);
    return e;
}

/* CPU against device; chunks and devices against each other. */
static void test_model(const char *path)
{
    kv_model *f32 = NULL, *stored = NULL;
    kv_error err = {""};
    CHECKF(!kv_model_open(path, KV_WEIGHTS_F32, 2, &f32, &err) &&
               !kv_model_open(path, KV_WEIGHTS_STORED, 2, &stored, &err),
           "%s", err.msg);
    if (!f32 || !stored) return;
    uint32_t rows[] = {0, 5, 6, 7, 40, 51}, layers[] = {0, f32->desc.n_layer - 1};
    kv_job j = job_of(60, 50, 33, 0, f32->desc.n_vocab), greedy = job_of(60, 50, 0, 10, f32->desc.n_vocab);
    kv_capture_request q = {.level = KV_RECORD_QKV, .dtype = KV_F32, .wo = "embed", .threads = 2, .map_rows = 9};
    kv_capture_result res;
    fake.devices = 3;
    q.logits = in_dir("l.npy"), q.logit_row = rows, q.n_logit_row = 6;

    CHECKF(!capture(f32, q, false, NULL, j, "cpu.kvt", NULL, &err), "%s", err.msg);
    CHECKF(!capture(stored, q, true, NULL, j, "gpu.kvt", &res, &err), "%s", err.msg);
    compare("one chunk", "cpu.kvt", "gpu.kvt", 1e-5);
    CHECK(res.engine.n_device == 1 && res.engine.device_bytes > res.engine.weight_bytes + res.engine.cache_bytes);
    CHECK(fake.live == 0 && fake.strangers == 0);

    kv_engine *e = open_engine(stored, KV_F32, 1, 16);
    CHECKF(!capture(stored, q, true, &e, j, "chunks.kvt", NULL, &err), "%s", err.msg);
    compare("chunks of 16", "cpu.kvt", "chunks.kvt", 1e-5);
    /* the same engine for another job, a smaller level, all of the map, some layers */
    q.level = KV_RECORD_OBS, q.map_rows = 0, q.map_full = true, q.layer = layers, q.n_layer = 2, q.logits = NULL;
    CHECKF(!capture(f32, q, false, NULL, greedy, "cpu2.kvt", NULL, &err), "%s", err.msg);
    CHECKF(!capture(stored, q, true, &e, greedy, "gpu2.kvt", NULL, &err), "%s", err.msg);
    compare("greedy, level obs", "cpu2.kvt", "gpu2.kvt", 1e-5);
    q.level = KV_RECORD_STATS, q.map_full = false, q.layer = NULL;
    CHECKF(!capture(f32, q, false, NULL, j, "cpu3.kvt", NULL, &err), "%s", err.msg);
    CHECKF(!capture(stored, q, true, &e, j, "gpu3.kvt", NULL, &err), "%s", err.msg);
    compare("level stats", "cpu3.kvt", "gpu3.kvt", 1e-5);
    kv_engine_close(e);
    CHECK(fake.live == 0 && fake.strangers == 0);

    /* devices */
    q.level = KV_RECORD_QKV, q.map_rows = 9, q.dtype = KV_BF16, q.threads = 1;
    CHECKF(!capture(stored, q, true, NULL, greedy, "one.kvt", NULL, &err), "%s", err.msg);
    for (uint32_t n = 2; n <= 3 && n <= stored->desc.n_layer; n++) {
        q.gpus = n, q.threads = n;
        CHECKF(!capture(stored, q, true, NULL, greedy, "many.kvt", &res, &err), "%s", err.msg);
        CHECKF(same_content("one.kvt", "many.kvt"), "%u devices", n);
        CHECK(res.engine.n_device == n && fake.strangers == 0 && fake.live == 0);
    }
    q.gpus = 4;
    CHECK(capture(stored, q, true, NULL, greedy, "x.kvt", NULL, &err) == KV_EMISUSE && strstr(err.msg, "--gpus 4"));
    job_done(&j), job_done(&greedy);
    kv_model_close(f32), kv_model_close(stored);
}

/* Every step of the forward pass that some architecture has: small models of many. */
static void test_architectures(void)
{
    static const char *const names[] = {"gemma",   "gemma3",         "gemma3_old",     "gpt2",
                                        "gptneox", "gptneox_serial", "granite",        "llama3_scaled",
                                        "olmo2",   "phi3_long",      "qwen2_window",   "qwen2_yarn",
                                        "qwen3",   "qwen3_moe",      "qwen3_moe_plain"};
    kv_capture_request q = {.level = KV_RECORD_QKV, .dtype = KV_F32, .wo = "embed", .threads = 2};
    int same = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *path = kv_format("tests/golden/models_extra/tiny/%s", names[i]);
        kv_model *f32 = NULL, *stored = NULL;
        kv_error err = {""};
        CHECKF(!kv_model_open(path, KV_WEIGHTS_F32, 2, &f32, &err) &&
                   !kv_model_open(path, KV_WEIGHTS_STORED, 2, &stored, &err),
               "%s: %s", names[i], err.msg);
        free(path);
        if (!f32 || !stored) continue;
        kv_job j = job_of(40, 30, 20, 0, f32->desc.n_vocab);
        CHECKF(!capture(f32, q, false, NULL, j, "cpu.kvt", NULL, &err), "%s: %s", names[i], err.msg);
        kv_engine_options o = {.dtype = KV_F32, .threads = 2, .capacity = 40, .chunk = 16};
        kv_engine *e = NULL;
        kv_status st = kv_engine_open_cuda(stored, &o, &e, &err);
        CHECKF(!st && !capture(stored, q, true, &e, j, "gpu.kvt", NULL, &err), "%s: %s", names[i], err.msg);
        compare(names[i], "cpu.kvt", "gpu.kvt", 2e-5);
        same += !st;
        kv_engine_close(e);
        CHECK(fake.live == 0 && fake.strangers == 0);
        job_done(&j);
        kv_model_close(f32), kv_model_close(stored);
    }
    CHECKF(same == sizeof names / sizeof *names, "%d", same);
}

/* Layers that recovery finds in PATH.partial. */
static uint32_t layers_left(const char *partial)
{
    kv_trace *t = NULL;
    kvt_damage d;
    kvt_part part = {0};
    uint32_t no_layers, no_tokens;
    kv_error err;
    if (!kvt_salvage(partial, &t, &d, &err) && kvt_consistent(t, &part, &no_layers, &no_tokens, &err)) part.n_layer = 0;
    free(part.layer);
    kv_trace_close(t);
    return part.n_layer;
}

/* Call k fails, alone or with all that follow: a line that says so, nothing left on the device, nothing under the final
 * name, and behind it the layers that the line promises. Only what was recorded before the call may be right without
 * it: the trace is then the whole one. */
static void fail_at(const kv_model *m, kv_capture_request q, kv_job j, long k, bool once, int *done, int *recovered)
{
    kv_error err = {""};
    uint32_t promised = 0, of;
    fake.calls = 0, fake.fail_after = k, fake.once = once, fake.code = once && k % 2 ? KV_GPU_ENOMEM : FAKE_LOST;
    kv_status st = capture(m, q, true, NULL, j, "failed.kvt", NULL, &err);
    fake.fail_after = -1;
    CHECKF(st == KV_OK || ((st == KV_EIO || st == KV_ENOMEM) && (strstr(err.msg, "GPU") || strstr(err.msg, "memory"))),
           "call %ld, %d: %d %s", k, once, (int)st, err.msg);
    CHECKF(!strchr(err.msg, '\n'), "call %ld: more than a line: %s", k, err.msg);
    CHECKF(fake.live == 0, "call %ld, %d: %d left behind", k, once, fake.live);
    CHECKF(!st == !access(in_dir("failed.kvt"), F_OK), "call %ld, %d: status %d", k, once, (int)st);
    if (!st) CHECKF(same_content("whole.kvt", "failed.kvt"), "call %ld, %d: said nothing", k, once);
    const char *keeps = strstr(err.msg, "' keeps ");
    if (keeps && sscanf(keeps, "' keeps %u of %u layers", &promised, &of) == 2) {
        uint32_t left = layers_left(in_dir("failed.kvt.partial"));
        CHECKF(left >= promised, "call %ld, %d: %u layers of %u that were promised", k, once, left, promised);
        ++*recovered;
    }
    *done += !st;
    remove(in_dir("failed.kvt")), remove(in_dir("failed.kvt.partial"));
}

static void test_failures(void)
{
    kv_model *m = NULL;
    kv_error err = {""};
    CHECK(!kv_model_open("synthetic:tiny-qwen", KV_WEIGHTS_STORED, 1, &m, &err));
    kv_job j = job_of(12, 8, 5, 2, m->desc.n_vocab);
    kv_capture_request q = {.level = KV_RECORD_QKV, .dtype = KV_F16, .wo = "embed", .threads = 1, .gpus = 2};
    fake.devices = 2, fake.fail_after = -1, fake.calls = 0;
    CHECKF(!capture(m, q, true, NULL, j, "whole.kvt", NULL, &err), "%s", err.msg);
    long calls = fake.calls;
    long step = getenv("KV_EVERY_CALL") ? 1 : 7; /* every one takes some minutes */
    for (int once = 0; once < 2; once++) {
        int done = 0, recovered = 0;
        for (long k = calls - 1; k >= 0; k -= step) fail_at(m, q, j, k, once, &done, &recovered);
        /* what closes, and what looks at the memory that is free, may fail unheard */
        CHECKF(calls > 500 && done > 0 && done < 50 / step + 2 && recovered > 500 / step, "%ld calls, %d, %d", calls,
               done, recovered);
    }
    fake.once = false, fake.code = FAKE_LOST;
    /* memory that ends at any size */
    int refused = 0, done = 0;
    for (size_t limit = 4096; !done && limit < (size_t)1 << 30; limit += limit / 3) {
        fake.limit = limit;
        kv_status st = capture(m, q, true, NULL, j, "full.kvt", NULL, &err);
        CHECKF(st == KV_OK || (st == KV_ENOMEM && strstr(err.msg, "out of memory")), "%zu: %s", limit, err.msg);
        CHECKF(fake.live == 0, "%zu bytes: %d left behind", limit, fake.live);
        refused += st == KV_ENOMEM, done += st == KV_OK;
    }
    CHECK(refused > 5 && done == 1);
    fake.limit = 0, fake.devices = 0;
    CHECK(capture(m, q, true, NULL, j, "x.kvt", NULL, &err) == KV_EUNSUPPORTED && strstr(err.msg, "no CUDA device"));
    fake.devices = 1;
    job_done(&j);
    kv_model_close(m);
}

/* One engine for prompts of every length: the device's memory does not grow. */
static void test_many_prompts(void)
{
    kv_model *m = NULL;
    kv_error err = {""};
    CHECK(!kv_model_open("synthetic:tiny", KV_WEIGHTS_STORED, 1, &m, &err));
    kv_engine *e = open_engine(m, KV_F32, 1, 0);
    kv_capture_request q = {.level = KV_RECORD_STATS, .dtype = KV_F32, .wo = "none", .threads = 1};
    size_t held = 0;
    for (uint32_t n = 30; n > 4; n -= 5) { /* the first is the longest */
        kv_job j = job_of(n, n, n / 2, 0, m->desc.n_vocab);
        CHECKF(!capture(m, q, true, &e, j, "many.kvt", NULL, &err), "%s", err.msg);
        if (held) CHECKF(fake.held[0] == held, "%zu bytes, then %zu", held, fake.held[0]);
        held = fake.held[0];
        job_done(&j);
    }
    kv_engine_close(e);
    kv_model_close(m);
}

/* What the engine says no to, and values that do not fit. */
static kv_status attend(void *ctx, const kv_attn_view *a, bool *done, kv_error *err)
{
    (void)ctx, (void)a, (void)err;
    *done = true;
    return KV_OK;
}

static void test_refusals(void)
{
    kv_model *m = NULL;
    kv_error err = {""};
    uint32_t token[4] = {1, 2, 3, 4};
    CHECK(!kv_model_open("synthetic:tiny", KV_WEIGHTS_STORED, 1, &m, &err));
    kv_engine *e = open_engine(m, KV_F32, 1, 0);
    kv_engine_hook hook = {.attend = attend};
    CHECK(kv_engine_run(e, token, 4, &hook, NULL, &err) == KV_EUNSUPPORTED);
    CHECK(kv_engine_run(e, token, 9, NULL, NULL, &err) == KV_EMISUSE && strstr(err.msg, "holds 0 of 8"));
    token[2] = m->desc.n_vocab;
    CHECK(kv_engine_run(e, token, 4, NULL, NULL, &err) == KV_EMISUSE && strstr(err.msg, "position 2"));
    token[2] = 3;
    /* the same logits in one call and in four, and again after a reset */
    float *one = malloc(m->desc.n_vocab * sizeof *one), *four = malloc(m->desc.n_vocab * sizeof *four);
    CHECKF(!kv_engine_run(e, token, 4, NULL, one, &err), "%s", err.msg);
    kv_engine_reset(e);
    for (int i = 0; i < 4; i++) CHECK(!kv_engine_run(e, token + i, 1, NULL, four, &err));
    double worst = 0;
    for (uint32_t i = 0; i < m->desc.n_vocab; i++) worst = fmax(worst, fabs((double)one[i] - (double)four[i]));
    CHECKF(worst < 1e-4, "%g", worst);
    kv_engine_close(e);
    free(one), free(four);
    /* keys beyond f16 */
    m->layer[2].wk.random = 1e4f;
    e = open_engine(m, KV_F16, 1, 0);
    CHECK(kv_engine_run(e, token, 4, NULL, NULL, &err) == KV_EUNSUPPORTED);
    CHECKF(strstr(err.msg, "layer 2") && strstr(err.msg, "values of K") && strstr(err.msg, "bf16"), "%s", err.msg);
    kv_engine_close(e);
    CHECK(fake.live == 0);
    kv_model_close(m);
}

/* The closed loop on the device against the one on the CPU, in chunks of some branches and in one. */
static void test_closed(void)
{
    static const char *const names[] = {"gemma3", "gpt2", "granite", "olmo2", "qwen2_window", "qwen3_moe"};
    fake.devices = 1;
    closed_pair("synthetic:tiny", KV_F32, 64, false, 2e-5);
    closed_pair("synthetic:tiny-qwen", KV_F32, 0, false, 2e-5);
    closed_pair(GGUF, KV_F32, 1, false, 2e-5); /* a branch at a time */
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *path = kv_format("tests/golden/models_extra/tiny/%s", names[i]);
        closed_pair(path, KV_F32, 64, false, 2e-5);
        free(path);
    }
    CHECKF(fake.live == 0 && fake.strangers == 0, "%d left, %d strangers", fake.live, fake.strangers);
}

static void test_closed_failures(void)
{
    closed_world c;
    kv_closed got;
    kv_error err = {""};
    CHECK(open_closed(&c, "synthetic:tiny-qwen", KV_F16, "prompt"));
    fake.calls = 0, fake.fail_after = -1;
    CHECKF(!closed_on_device(&c, 64, &got, &err), "%s", err.msg);
    kv_closed_free(&got);
    long calls = fake.calls;
    for (long k = 0; k < calls; k += k < 100 ? 3 : 29) {
        fake.calls = 0, fake.fail_after = k;
        kv_status st = closed_on_device(&c, 64, &got, &err);
        bool closing = k + 8 >= calls;
        CHECKF(st == KV_EIO || st == KV_ENOMEM || (closing && !st), "call %ld of %ld: %d %s", k, calls, (int)st,
               err.msg);
        CHECKF(fake.live == 0, "call %ld of %ld: %d left behind", k, calls, fake.live);
        if (!st) kv_closed_free(&got);
    }
    fake.fail_after = -1;
    int refused = 0, done = 0;
    for (size_t limit = 4096; !done && limit < (size_t)1 << 30; limit += limit / 3) {
        fake.limit = limit;
        kv_status st = closed_on_device(&c, 64, &got, &err);
        CHECKF(st == KV_OK || (st == KV_ENOMEM && strstr(err.msg, "out of memory")), "%zu: %s", limit, err.msg);
        CHECKF(fake.live == 0, "%zu bytes: %d left behind", limit, fake.live);
        refused += st == KV_ENOMEM, done += st == KV_OK;
        if (!st) kv_closed_free(&got);
    }
    CHECK(refused > 5 && done == 1);
    fake.limit = 0;
    close_closed(&c);
}

/* Values that are not finite, or not in f16, are found on the device and named as the CPU names them. */
static void test_bad_weights(void)
{
    kv_model *m = NULL;
    kv_error err = {""};
    kv_engine_options o = {.dtype = KV_F16, .threads = 2, .capacity = 8};
    kv_engine *e = NULL;
    CHECKF(!kv_model_open(GGUF, KV_WEIGHTS_STORED, 1, &m, &err), "%s", err.msg);
    kv_tensor *t = &m->layer[1].wk;
    size_t n = (size_t)t->rows * t->cols;
    t->f32 = calloc(n, sizeof *t->f32);
    t->f32[n - 1] = 1e6f;
    CHECK(kv_engine_open_cuda(m, &o, &e, &err) == KV_EUNSUPPORTED && strstr(err.msg, "beyond 65504"));
    o.dtype = KV_BF16;
    CHECKF(!kv_engine_open_cuda(m, &o, &e, &err), "%s", err.msg);
    kv_engine_close(e);
    t->f32[3 * t->cols] = NAN;
    CHECK(kv_engine_open_cuda(m, &o, &e, &err) == KV_EFORMAT && strstr(err.msg, "not finite"));
    CHECK(fake.live == 0);
    free(t->f32), t->f32 = NULL;
    kv_model_close(m);
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/kv_cuda_XXXXXX");
    if (!mkdtemp(dir)) return perror("mkdtemp"), 1;
    test_model("synthetic:tiny");
    test_model("synthetic:tiny-qwen");
    test_model(GGUF);
    test_architectures();
    test_failures();
    test_many_prompts();
    test_refusals();
    test_closed();
    test_closed_failures();
    test_bad_weights();
    char *rm = kv_format("rm -rf '%s'", dir);
    if (!rm || system(rm)) printf("could not remove %s\n", dir);
    free(rm);
    return kv_tally();
}
