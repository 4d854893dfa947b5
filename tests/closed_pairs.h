/* closed_pairs.h - small captures made in this process, and the closed loop on a device against the one on the CPU. For
 * one test program: on a real device, or on the one in memory (fake_gpu.h). */
#ifndef KV_CLOSED_PAIRS_H
#define KV_CLOSED_PAIRS_H

#include "capture/run.h"
#include "sim/closed.h"
#include "tests/world.h"

static char dir[64];

static const char *in_dir(const char *name)
{
    static char path[8][128];
    static int turn;
    char *p = path[turn++ % 8];
    snprintf(p, 128, "%s/%s", dir, name);
    return p;
}

static kv_job job_of(uint32_t n, uint32_t p, uint32_t context, uint32_t greedy, uint32_t n_vocab)
{
    kv_job j = {.id = "job", .n_token = n, .n_prompt = p, .n_context = context, .n_greedy = greedy};
    kv_rng r = {7};
    j.token = calloc(n, sizeof *j.token), j.offset = calloc(n + 1, sizeof *j.offset), j.text = calloc(1, 1);
    for (uint32_t i = 0; i < n - greedy; i++) j.token[i] = (uint32_t)(kv_rng_next(&r) % n_vocab);
    return j;
}

static void job_done(kv_job *j)
{
    free(j->token), free(j->offset), free(j->text);
}

/* One capture; `engine` is used when not NULL. */
static kv_status capture(const kv_model *m, kv_capture_request q, bool cuda, kv_engine **engine, kv_job j,
                         const char *name, kv_capture_result *res, kv_error *err)
{
    kv_capture_plan p;
    kv_capture_result own;
    uint32_t *token = malloc(j.n_token * sizeof *token);
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    memcpy(token, j.token, j.n_token * sizeof *token);
    q.cuda = cuda, q.engine = engine, j.token = token;
    char *text = calloc(1, 1);
    uint32_t *offset = calloc(j.n_token + 1, sizeof *offset);
    j.text = text, j.offset = offset;
    kv_status st = kv_capture_plan_open(m, &q, &j, &p, err);
    if (!st) {
        st = kv_capture_plan_run(&p, m, &q, &j, path, res ? res : &own, err);
        kv_capture_plan_close(&p);
    }
    free(token), free(j.text), free(j.offset);
    return st;
}

/* A model twice, and points on a trace of it. */
typedef struct {
    kv_model *f32, *stored;
    world w;
} closed_world;

/* Prefixes of all granularities, the full cache, a set that is no prefix; layers that do not evict where the model has
 * windows. */
static const char CLOSED_POLICIES[] =
    "snapkv:window=4,ada-snapkv:window=4,tova:window=1,snapkv:window=4,granularity=query_head,full,criticalkv:window=4";

static inline bool open_closed(closed_world *c, const char *model, kv_dtype dtype, const char *cut)
{
    static const char *const BUDGET[] = {"5", "14", "60%"};
    kv_error err = {""};
    *c = (closed_world){0};
    CHECKF(!kv_model_open(model, KV_WEIGHTS_F32, 2, &c->f32, &err) &&
               !kv_model_open(model, KV_WEIGHTS_STORED, 2, &c->stored, &err),
           "%s: %s", model, err.msg);
    if (!c->f32 || !c->stored) return false;
    kv_job j = job_of(60, 50, 33, 0, c->f32->desc.n_vocab);
    kv_capture_request q = {.level = KV_RECORD_OBS, .dtype = dtype, .wo = "embed", .threads = 2};
    kv_status st = capture(c->f32, q, false, NULL, j, "closed.kvt", NULL, &err);
    CHECKF(!st, "%s: %s", model, err.msg);
    job_done(&j);
    if (!st) open_world(&c->w, in_dir("closed.kvt"), cut, CLOSED_POLICIES, BUDGET, 3);
    return !st;
}

static inline void close_closed(closed_world *c)
{
    close_world(&c->w);
    kv_model_close(c->f32), kv_model_close(c->stored);
}

/* chunk: rows at a time, as in kv_engine_options. */
static inline kv_status closed_on_device(closed_world *c, uint32_t chunk, kv_closed *out, kv_error *err)
{
    kv_closed_device device = {.chunk = chunk};
    kv_status st = kv_closed_run(&c->w.plan, c->w.point, c->w.n_point, c->stored, 2, &device, NULL, NULL, out, err);
    kv_closed_device_close(&device);
    return st;
}

static inline double farthest(const float *a, const float *b, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = fmax(worst, isnan(b[i]) ? 1e9 : fabs((double)a[i] - (double)b[i]));
    return worst;
}

/* exact: the device's products give a row the same bytes wherever it stands among others. */
static inline void closed_cut(const char *model, kv_dtype dtype, uint32_t chunk, bool exact, const char *cut,
                              double tol)
{
    closed_world c;
    kv_closed cpu, dev, one;
    kv_error err = {""};
    if (!open_closed(&c, model, dtype, cut)) return;
    CHECKF(!kv_closed_run(&c.w.plan, c.w.point, c.w.n_point, c.f32, 2, NULL, NULL, NULL, &cpu, &err), "%s", err.msg);
    CHECKF(!closed_on_device(&c, chunk, &dev, &err), "%s: %s", model, err.msg);
    if (!cpu.delta_nll || !dev.delta_nll) return;
    check_first_layer(&c.w, &cpu);
    size_t n = c.w.n_point * cpu.n_pred, errors = c.w.n_point * c.w.scene.n_evict;
    double nll = farthest(cpu.delta_nll, dev.delta_nll, n), kl = farthest(cpu.kl, dev.kl, n), far = 0, size = 0;
    double top1 = farthest(cpu.top1, dev.top1, n), top5 = farthest(cpu.top5, dev.top5, n);
    CHECKF(nll < tol && kl < tol, "%s, cut %s: nll differs by %g, kl by %g", model, cut, nll, kl);
    CHECKF(dtype != KV_F32 || (top1 == 0 && top5 < 1e-6), "%s, cut %s: top tokens differ", model, cut);
    for (size_t i = 0; i < errors; i++) {
        far = fmax(far, fabs(cpu.head_error[i] - dev.head_error[i]));
        far = fmax(far, fabs(cpu.stream_error[i] - dev.stream_error[i]));
        size = fmax(size, fmin(cpu.head_error[i], 1));
    }
    CHECKF(far < tol && size > 1e-3, "%s, cut %s: errors differ by %g of %g", model, cut, far, size);
    CHECKF(fabs(cpu.noise - dev.noise) < tol, "%s: noise %g, %g", model, cpu.noise, dev.noise);
    for (size_t i = 0; i < c.w.n_point; i++)
        for (uint32_t t = 0; t < dev.n_pred && !strcmp(c.w.spec[c.w.point[i].spec].row->name, "full"); t++)
            CHECK(dev.delta_nll[i * dev.n_pred + t] == 0 && dev.kl[i * dev.n_pred + t] == 0);
    /* A branch's numbers do not depend on the others. */
    c.w.point++, c.w.n_point -= 3;
    CHECKF(!closed_on_device(&c, chunk, &one, &err), "%s: %s", model, err.msg);
    if (!one.delta_nll) return;
    far = farthest(one.delta_nll, dev.delta_nll + dev.n_pred, c.w.n_point * dev.n_pred);
    CHECKF(far <= (exact ? 0 : tol), "%s: among fewer points nll differs by %g", model, far);
    c.w.point--, c.w.n_point += 3;
    kv_closed_free(&cpu), kv_closed_free(&dev), kv_closed_free(&one);
    close_closed(&c);
}

static inline void closed_pair(const char *model, kv_dtype dtype, uint32_t chunk, bool exact, double tol)
{
    closed_cut(model, dtype, chunk, exact, "prompt", tol);
    closed_cut(model, dtype, chunk, exact, "context", tol);
}

#endif
