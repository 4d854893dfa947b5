/* replay.c - the metric pass: layers as independent tasks. */
#include "sim/replay.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "kernels/parallel.h"
#include "sim/measure.h"
#include "sim/memory.h"
#include "traces/cli.h"

typedef struct {
    kv_measure proto;
    kv_status *st;
    kv_error *err;
    void (*tick)(void *ctx, size_t done);
    void *ctx;
    atomic_size_t done;
    pthread_mutex_t lock; /* of turn */
    pthread_cond_t moved;
    size_t turn; /* layers whose series are in the sums */
} job;

typedef struct {
    const kv_plan *plan;
    kv_point *point;
    uint64_t *print;
    kv_status *st;
    kv_error *err;
} points;

static void count_task(void *ctx, size_t i)
{
    points *x = ctx;
    kv_point *p = &x->point[i];
    size_t units = x->plan->ranking[x->plan->ranking_of[p->spec]].n_unit;
    x->st[i] = kv_array(&p->counts, x->plan->scene->n_evict * units, sizeof *p->counts, &x->err[i]);
    if (!x->st[i]) x->st[i] = kv_plan_counts(x->plan, p->spec, &p->c, p->counts, &x->err[i]);
}

kv_status kv_points_count(const kv_plan *p, kv_point *point, size_t n_point, uint32_t threads, kv_error *err)
{
    points x = {.plan = p, .point = point};
    kv_status st = kv_array(&x.st, n_point, sizeof *x.st, err);
    if (!st) st = kv_array(&x.err, n_point, sizeof *x.err, err);
    if (!st) kv_parallel(n_point, threads, count_task, &x);
    for (size_t i = 0; i < n_point && !st; i++)
        if ((st = x.st[i]) && err) *err = x.err[i];
    free(x.st), free(x.err);
    return st;
}

static void print_task(void *ctx, size_t i)
{
    points *x = ctx;
    x->print[i] = kv_plan_fingerprint(x->plan, x->point[i].spec, x->point[i].counts);
}

void kv_points_print(const kv_plan *p, const kv_point *point, size_t n_point, uint32_t threads, uint64_t *print)
{
    points x = {.plan = p, .point = (kv_point *)point, .print = print};
    kv_parallel(n_point, threads, print_task, &x);
}

/* The series of layer i, after those of the layers before it: sums of doubles keep one order whatever the threads, and
 * no more series are in memory than threads. Tasks start in order, so the layer waited for is under way. */
static void merge_steps(job *j, kv_measure *m, size_t i)
{
    pthread_mutex_lock(&j->lock);
    while (j->turn != i) pthread_cond_wait(&j->moved, &j->lock);
    if (m->step && !j->st[i]) kv_steps_merge(m->out->step, m->step, m->n_point * m->plan->scene->n_row);
    j->turn++;
    pthread_cond_broadcast(&j->moved);
    pthread_mutex_unlock(&j->lock);
    free(m->step);
}

static void run_task(void *ctx, size_t i)
{
    job *j = ctx;
    kv_measure m = j->proto;
    j->st[i] = kv_interrupted() ? kv_fail(&j->err[i], KV_EINTERRUPTED, "interrupted")
                                : kv_measure_layer(&m, (uint32_t)i, &j->err[i]);
    if (m.out->step) merge_steps(j, &m, i);
    size_t done = atomic_fetch_add(&j->done, 1) + 1;
    if (j->tick) j->tick(j->ctx, done);
}

kv_status kv_replay_run(const kv_plan *p, const kv_point *point, size_t n_point, kv_metric_set wanted, uint32_t threads,
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
    bool wo = true;
    for (uint32_t l = 0; l < sc->n_evict; l++) {
        uint32_t number = sc->info->layer[sc->evict[l]];
        if (!kv_trace_has_wo(sc->trace, number)) wo = false;
        if (sc->info->post_norm_eps > 0 && !kv_trace_has(sc->trace, KV_S_POST_NORM, number, 0, 0, sc->info->hidden))
            wo = false;
        if (!kv_trace_has(sc->trace, KV_S_XNORM, number, 0, sc->row_first, sc->n_token)) out->own_output = true;
    }
    if (!kv_mul(n_point, (size_t)sc->n_evict * sc->info->n_q_head, &n))
        return kv_fail(err, KV_ENOMEM, "too many points");
    kv_status st = kv_memory_fit(sc, "measuring", kv_memory_held(p, n_point, wanted),
                                 kv_memory_measure(p, n_point, wanted), &threads, err);
    if (!st) st = kv_array(&out->head, n, sizeof *out->head, err);
    if (!st) st = kv_array(&out->read, n, sizeof *out->read, err);
    if (!st) st = kv_array(&out->rows, n_point * sc->n_evict, sizeof *out->rows, err);
    if (!st && wo && (wanted >> KV_M_LAYER_ERROR & 1))
        st = kv_array(&out->layer_error, n_point * sc->n_evict, sizeof *out->layer_error, err);
    if (!st && wo && (wanted & KV_M_BOUNDS)) st = kv_array(&out->bound, n_point * sc->n_evict, sizeof *out->bound, err);
    if (!st && (wanted & KV_M_STEPS)) {
        if (!kv_mul(n_point, sc->n_row, &n)) st = kv_fail(err, KV_ENOMEM, "too many points");
        if (!st) st = kv_array(&out->step, n, sizeof *out->step, err);
    }
    if (!st && (wanted & (KV_M_EVIDENCE | KV_M_BIT(KV_M_BREADTH)))) {
        st = kv_array(&out->coverage, 1, sizeof *out->coverage, err);
        if (!st) st = kv_coverage_open(p, n_point, out->coverage, err);
    }
    if (!st) st = kv_array(&j.st, sc->n_evict, sizeof *j.st, err);
    if (!st) st = kv_array(&j.err, sc->n_evict, sizeof *j.err, err);
    pthread_mutex_init(&j.lock, NULL), pthread_cond_init(&j.moved, NULL);
    if (!st) {
        kv_parallel(sc->n_evict, threads, run_task, &j);
        for (uint32_t l = 0; l < sc->n_evict && !st; l++)
            if ((st = j.st[l]) && err) *err = j.err[l];
    }
    pthread_mutex_destroy(&j.lock), pthread_cond_destroy(&j.moved);
    free(j.st), free(j.err);
    if (st) kv_replay_free(out);
    return st;
}

void kv_replay_free(kv_replay *r)
{
    if (r->coverage) kv_coverage_close(r->coverage);
    free(r->head), free(r->layer_error), free(r->rows), free(r->read), free(r->coverage), free(r->bound), free(r->step);
    *r = (kv_replay){0};
}
