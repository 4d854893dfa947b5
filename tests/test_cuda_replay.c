/* test_cuda_replay.c - the metric pass on a device against the one on the CPU, point by point, over shapes,
 * granularities, protections and budgets; then the closed loop on both. Without a device: skipped. Run from the
 * repository root. */
#include <stdlib.h>
#include <unistd.h>

#include "kernels/gpu.h"
#include "sim/measure_gpu.h"
#include "tests/closed_pairs.h"
#include "tests/tiny.h"

static kv_error err;

static const char POLICIES[] = "snapkv:window=4,ada-snapkv:window=4,pyramidkv:window=4,h2o:window=2,tova:window=1,"
                               "streaming,knorm:window=2,random:window=0,cake:window=4,oracle:window=2,"
                               "snapkv:window=4,granularity=query_head,full,lava:window=4,criticalkv:window=4,"
                               "snapkv:window=7,row_reduce=max,pooling=avgpool,kernel=3,kvpress.observed_attention,"
                               "kvpress.snapkv:window=40,h2o:window=2,granularity=layer,knorm:window=2,granularity="
                               "query_head,snapkv:window=4,row_reduce=sum,group_reduce=max,kernel=5,keydiff:window=2";
static const char *const BUDGET[] = {"3", "9", "17", "60%", "100%"};
enum { N_BUDGET = sizeof BUDGET / sizeof *BUDGET };

typedef struct {
    double worst;
    const char *what;
} gap;

static void far(gap *g, double a, double b, double scale, const char *what)
{
    double e = fabs(a - b) / scale;
    if (!(e <= g->worst)) g->worst = e, g->what = what;
}

/* What decides kept sets is the same, byte for byte. */
static void same_rankings(const kv_plan *a, const kv_plan *b)
{
    size_t E = a->scene->n_evict, L = a->scene->n_cut;
    for (size_t r = 0; r < a->n_ranking; r++) {
        const kv_ranking *x = &a->ranking[r], *y = &b->ranking[r];
        size_t n = E * x->n_unit, m = x->n_item - x->n_forced;
        CHECKF(!memcmp(x->order, y->order, n * L * 4), "%s: orders differ", x->spec->canonical);
        CHECKF(!memcmp(x->sorted, y->sorted, n * m * 4), "%s: scores differ", x->spec->canonical);
        CHECKF(!memcmp(x->entropy, y->entropy, E * 8) && !memcmp(x->variance, y->variance, E * 8) &&
                   !memcmp(x->spread, y->spread, E * 8),
               "%s: preferences differ", x->spec->canonical);
    }
}

static void one_shape(kv_gpu_pass *gpu, const kv_tiny *shape)
{
    char *path = kv_format("%s/t.kvt", dir);
    kv_tiny_data data = kv_tiny_make(shape);
    kv_trace *t = NULL;
    kv_scene sc;
    kv_spec *spec = NULL;
    kv_plan plan, on_device;
    kv_replay cpu, dev, again;
    size_t n_spec = 0;
    data.xnorm = malloc((size_t)shape->n_layer * shape->n_token * sizeof *data.xnorm);
    for (size_t i = 0; i < (size_t)shape->n_layer * shape->n_token; i++) data.xnorm[i] = 5 + (float)(i % 7);
    CHECKF(!kv_tiny_write(shape, &data, path, &err), "%s", err.msg);
    CHECK(!kv_trace_open(path, &t, &err) && !kv_scene_open(t, "prompt", 0, &sc, &err));
    CHECKF(!kv_spec_parse(POLICIES, &spec, &n_spec, &err), "%s", err.msg);
    CHECK(!kv_plan_build(&sc, spec, n_spec, 2, &plan, &err));
    sc.gpu = gpu;
    CHECKF(!kv_plan_build(&sc, spec, n_spec, 3, &on_device, &err), "%s", err.msg);
    same_rankings(&plan, &on_device);
    sc.gpu = NULL;
    size_t n = n_spec * N_BUDGET;
    kv_point *point = calloc(n, sizeof *point);
    for (size_t i = 0; i < n; i++) {
        kv_budget *b = NULL;
        size_t n_b = 0;
        CHECK(!kv_budget_parse(BUDGET[i % N_BUDGET], &b, &n_b, &err));
        point[i].spec = i / N_BUDGET;
        point[i].c = kv_budget_resolve(b, sc.n_cut, sc.slot_bytes, sc.n_evict, sc.info->n_kv_head);
        point[i].counts = calloc((size_t)sc.n_evict * plan.ranking[plan.ranking_of[point[i].spec]].n_unit, 4);
        CHECK(!kv_plan_counts(&plan, point[i].spec, &point[i].c, point[i].counts, &err));
        free(b);
    }
    kv_metric_set wanted = 1u << KV_M_RECALL | 1u << KV_M_RECALL_CONTESTED | 1u << KV_M_HEAD_ERROR |
                           1u << KV_M_LAYER_ERROR | 1u << KV_M_NATS_LOST | 1u << KV_M_VALUE_DISTANCE;
    CHECKF(!kv_replay_run(&plan, point, n, wanted, 2, NULL, NULL, &cpu, &err), "%s", err.msg);
    sc.gpu = gpu;
    CHECKF(!kv_replay_run(&on_device, point, n, wanted, 2, NULL, NULL, &dev, &err), "%s", err.msg);
    kv_gpu_pass_clear(gpu); /* layers that did not stay go again, with the plan's orders */
    CHECK(!kv_replay_run(&plan, point, n, wanted, 1, NULL, NULL, &again, &err));
    gap g = {0};
    for (size_t i = 0; i < n * sc.n_evict * sc.info->n_q_head; i++) {
        const kv_head_sums *a = &cpu.head[i], *b = &dev.head[i];
        far(&g, a->recall, b->recall, a->n, "recall"), far(&g, a->recall_min, b->recall_min, 1, "recall_min");
        far(&g, a->nats, b->nats, a->n + a->nats, "nats");
        far(&g, a->contested_kept, b->contested_kept, a->n, "contested kept");
        far(&g, a->contested_all, b->contested_all, a->n, "contested all");
        far(&g, a->head_error, b->head_error, a->n + a->head_error, "head error");
        CHECK(a->n == b->n && a->n_whole == b->n_whole);
        CHECK(b->recall == again.head[i].recall && b->head_error == again.head[i].head_error);
    }
    for (size_t i = 0; i < n * sc.n_evict; i++)
        far(&g, cpu.layer_error[i], dev.layer_error[i], 1e-3 + cpu.layer_error[i], "layer error");
    CHECKF(g.worst < 1e-4, "%u layers, %u heads on %u of %u, %u tokens: %s differs by %g", shape->n_layer,
           shape->n_q_head, shape->n_kv_head, shape->d, shape->n_token, g.what, g.worst);
    kv_replay_free(&cpu), kv_replay_free(&dev), kv_replay_free(&again);
    for (size_t i = 0; i < n; i++) free(point[i].counts);
    free(point);
    kv_gpu_pass_clear(gpu);
    kv_plan_free(&plan), kv_plan_free(&on_device);
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    free(spec);
    kv_scene_close(&sc), kv_trace_close(t), kv_tiny_free(&data);
    unlink(path), free(path);
}

/* In half precision the model itself computes otherwise than on the CPU, so losses agree only as far as that goes. */
static void closed_loop(void)
{
    static const char *const names[] = {"gemma3", "gpt2", "granite", "llama3_scaled", "olmo2", "qwen2_window", "qwen3"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *path = kv_format("tests/golden/models_extra/tiny/%s", names[i]);
        closed_pair(path, KV_F32, 64, true, 1e-4);
        free(path);
    }
    closed_pair("synthetic:tiny", KV_F32, 0, true, 1e-4);
    closed_pair("tests/golden/models/gguf/llama256/llama256.Q4_K_M.gguf", KV_F32, 0, true, 1e-4);
    closed_pair("synthetic:tiny", KV_BF16, 0, true, 0.1);
    closed_pair("synthetic:tiny-qwen", KV_F16, 64, true, 0.02);
}

int main(void)
{
    kv_gpu_pass *gpu = NULL;
    if (kv_gpu_count() < 1) {
        SKIP("no CUDA device: the replay on a GPU was not run");
        printf("0 passed, 0 failed, 1 skipped\n");
        return 0;
    }
    snprintf(dir, sizeof dir, "/tmp/kvgpu.XXXXXX");
    CHECK(mkdtemp(dir) != NULL);
    CHECKF(!kv_gpu_pass_open(&gpu, &err), "%s", err.msg);
    const kv_tiny SHAPES[] = {
        {2, 4, 2, 8, 60, 50, true, false, 11},    {1, 1, 1, 4, 2, 1, true, false, 12},
        {3, 6, 2, 16, 90, 80, true, false, 13},   {2, 8, 1, 64, 700, 600, true, false, 14},
        {2, 3, 3, 24, 420, 400, true, false, 15}, {2, 4, 2, 128, 1300, 1200, true, false, 16},
        {1, 2, 1, 8, 20, 3, true, false, 17},     {1, 4, 2, 16, 400, 150, true, false, 18},
    };
    for (size_t i = 0; gpu && i < sizeof SHAPES / sizeof *SHAPES; i++) one_shape(gpu, &SHAPES[i]);
    kv_gpu_pass_close(gpu);
    closed_loop();
    unlink(in_dir("closed.kvt"));
    rmdir(dir);
    return kv_tally();
}
