/* replay.c - the metric pass: layers as independent tasks. */
#include "sim/replay.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "kernels/parallel.h"
#include "sim/measure.h"
#include "traces/cli.h"

typedef struct {
    kv_measure proto;
    kv_status *st;
    kv_error *err;
    void (*tick)(void *ctx, size_t done);
    void *ctx;
    atomic_size_t done;
} job;

static void run_task(void *ctx, size_t i)
{
    job *j = ctx;
    kv_measure m = j->proto;
    j->st[i] = kv_interrupted() ? kv_fail(&j->err[i], KV_EINTERRUPTED, "interrupted")
                                : kv_measure_layer(&m, (uint32_t)i, &j->err[i]);
    size_t done = atomic_fetch_add(&j->done, 1) + 1;
    if (j->tick) j->tick(j->ctx, done);
}

kv_status kv_replay_run(const kv_plan *p, const kv_point *point, size_t n_point, unsigned wanted, uint32_t threads,
                        void (*tick)(void *ctx, size_t done), void *ctx, kv_replay *out, kv_error *err)
{
    const kv_scene *sc = p->scene;
    job j = {.proto = {.plan = p, .point = point, .n_point = n_point, .wanted = wanted, .out = out},
             .tick = tick,
             .ctx = ctx};
    size_t n;
    *out = (kv_replay){.n_point = n_point};
    if (!sc->n_row)
        return kv_fail(err, KV_EMISSING,
                       "trace '%s' has no decoded rows to measure; capture with --decode N, or use --decode-rows N",
                       kv_trace_path(sc->trace));
    bool wo = wanted >> KV_M_LAYER_ERROR & 1;
    for (uint32_t l = 0; l < sc->n_evict; l++) {
        uint32_t number = sc->info->layer[sc->evict[l]];
        if (!kv_trace_has_wo(sc->trace, number)) wo = false;
        if (sc->info->post_norm_eps > 0 && !kv_trace_has(sc->trace, KV_S_POST_NORM, number, 0, 0, sc->info->hidden))
            wo = false;
        if (!kv_trace_has(sc->trace, KV_S_XNORM, number, 0, sc->row_first, sc->n_token)) out->own_output = true;
    }
    if (!kv_mul(n_point, (size_t)sc->n_evict * sc->info->n_q_head, &n))
        return kv_fail(err, KV_ENOMEM, "too many points");
    kv_status st = kv_array(&out->head, n, sizeof *out->head, err);
    if (!st) st = kv_array(&out->rows, n_point * sc->n_evict, sizeof *out->rows, err);
    if (!st && wo) st = kv_array(&out->layer_error, n_point * sc->n_evict, sizeof *out->layer_error, err);
    if (!st) st = kv_array(&j.st, sc->n_evict, sizeof *j.st, err);
    if (!st) st = kv_array(&j.err, sc->n_evict, sizeof *j.err, err);
    if (!st) {
        kv_parallel(sc->n_evict, threads, run_task, &j);
        for (uint32_t l = 0; l < sc->n_evict && !st; l++)
            if ((st = j.st[l]) && err) *err = j.err[l];
    }
    free(j.st), free(j.err);
    if (st) kv_replay_free(out);
    return st;
}

void kv_replay_free(kv_replay *r)
{
    free(r->head), free(r->layer_error), free(r->rows);
    *r = (kv_replay){0};
}
