/* world.h - a trace with policies and budgets planned on it, for tests of what happens at single points. */
#ifndef KV_WORLD_H
#define KV_WORLD_H

#include <stdlib.h>

#include "sim/closed.h"
#include "sim/plan.h"
#include "sim/replay.h"
#include "tests/check.h"

typedef struct {
    kv_trace *trace;
    kv_scene scene;
    kv_spec *spec;
    size_t n_spec, n_point;
    kv_plan plan;
    kv_point *point; /* [n_spec][n_budget] */
    uint32_t *token; /* [n_token] */
} world;

static void open_world(world *w, const char *path, const char *cut, const char *policies, const char *const *budget,
                       size_t n_budget)
{
    kv_error err;
    *w = (world){0};
    CHECKF(!kv_trace_open(path, &w->trace, &err), "%s", err.msg);
    CHECKF(!kv_scene_open(w->trace, cut, 0, &w->scene, &err), "%s", err.msg);
    CHECKF(!kv_spec_parse(policies, &w->spec, &w->n_spec, &err), "%s", err.msg);
    CHECKF(!kv_plan_build(&w->scene, w->spec, w->n_spec, 2, &w->plan, &err), "%s", err.msg);
    w->token = calloc(w->scene.n_token, sizeof *w->token);
    CHECK(!kv_trace_read_u32(w->trace, KV_S_TOKENS, 0, w->scene.n_token, w->token, &err));
    w->n_point = w->n_spec * n_budget;
    w->point = calloc(w->n_point, sizeof *w->point);
    for (size_t i = 0; i < w->n_point; i++) {
        kv_budget *b = NULL;
        size_t n_b = 0;
        kv_point *p = &w->point[i];
        p->spec = i / n_budget;
        CHECK(!kv_budget_parse(budget[i % n_budget], &b, &n_b, &err) && n_b == 1);
        p->c = kv_budget_resolve(b, w->scene.n_cut, w->scene.slot_bytes, w->scene.n_evict, w->scene.info->n_kv_head);
        p->counts = calloc((size_t)w->scene.n_evict * w->plan.ranking[w->plan.ranking_of[p->spec]].n_unit, 4);
        CHECKF(!kv_plan_counts(&w->plan, p->spec, &p->c, p->counts, &err), "%s", err.msg);
        free(b);
    }
}

/* The first layer that evicts has lost nothing before it: what the closed loop on the CPU measures there is the open
 * loop's number, to the last bit (the mean over rows of each head, then over heads, as metric.c forms it). */
static inline void check_first_layer(const world *w, const kv_closed *c)
{
    kv_error err;
    kv_replay rp;
    size_t E = w->scene.n_evict, Hq = w->scene.info->n_q_head;
    CHECK(!kv_replay_run(&w->plan, w->point, w->n_point, KV_M_BIT(KV_M_HEAD_ERROR), 2, NULL, NULL, &rp, &err));
    for (size_t i = 0; i < w->n_point && E && rp.head; i++) {
        const kv_head_sums *s = rp.head + i * E * Hq;
        double open = 0;
        for (size_t h = 0; h < Hq; h++) open += s[h].head_error / s[h].n;
        CHECKF(open / (double)Hq == c->head_error[i * E], "%s: first layer %.17g, open loop %.17g",
               w->spec[w->point[i].spec].canonical, c->head_error[i * E], open / (double)Hq);
    }
    kv_replay_free(&rp);
}

static void close_world(world *w)
{
    for (size_t i = 0; i < w->n_point; i++) free(w->point[i].counts);
    free(w->point), free(w->token);
    kv_plan_free(&w->plan);
    for (size_t i = 0; i < w->n_spec; i++) kv_spec_free(&w->spec[i]);
    free(w->spec);
    kv_scene_close(&w->scene);
    kv_trace_close(w->trace);
}

#endif
