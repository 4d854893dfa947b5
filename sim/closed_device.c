/* closed_device.c - what every branch keeps of a layer's prompt, as lists that the device reads: the orders of the
 * rankings once, of which a budget is a count; sets that are no prefix of an order beside them. */
#include "sim/closed_device.h"

#include <stdlib.h>

#include "kernels/parallel.h"
#include "sim/schedule.h"
#include "traces/cli.h"

typedef struct {
    const kv_device_branches *b;
    float *k, *v; /* [kv_heads][n_cut][d] */
    uint32_t layer;
    uint32_t *list, *first, *count; /* [n_list]; [n_branch][q_heads] twice */
    size_t *order_at;               /* [n_ranking] where a ranking's orders begin; SIZE_MAX: no branch needs them */
    size_t *set_at;                 /* [n_branch] where a set that is no prefix begins */
    size_t n_list;
    kv_layer l;    /* where sets are made; a shape when they follow from the plan */
    kv_status *st; /* [2 * kv_heads + n_branch] */
    kv_error *err;
} source;

static bool listed(const source *s, uint32_t branch)
{
    return kv_schedule_used(s->b->plan, s->b->point[branch - 1]->spec);
}

static const kv_ranking *ranking_of(const source *s, uint32_t branch, size_t *number)
{
    *number = s->b->plan->ranking_of[s->b->point[branch - 1]->spec];
    return &s->b->plan->ranking[*number];
}

/* Keys, then values, of one head. */
static void load_task(void *ctx, size_t i)
{
    source *s = ctx;
    const kv_scene *sc = s->b->plan->scene;
    uint32_t heads = sc->info->n_kv_head, h = (uint32_t)(i % heads);
    float *to = (i < heads ? s->k : s->v) + (size_t)h * sc->n_cut * sc->info->head_dim;
    s->st[i] = kv_trace_read_f32(sc->trace, i < heads ? KV_S_K : KV_S_V, sc->info->layer[s->layer], h, 0, sc->n_cut, to,
                                 &s->err[i]);
}

static void point_heads(source *s, uint32_t branch, uint32_t h, size_t first, size_t count)
{
    size_t i = (size_t)branch * s->b->plan->scene->info->n_q_head + h;
    s->first[i] = (uint32_t)first, s->count[i] = (uint32_t)count;
}

/* The set of a branch that is no prefix. */
static kv_status list_set(source *s, uint32_t branch, kv_error *err)
{
    const kv_scene *sc = s->b->plan->scene;
    const kv_point *p = s->b->point[branch - 1];
    const kv_layer *l = &s->l;
    size_t at = s->set_at[branch];
    kv_schedule sch;
    kv_status st = kv_schedule_make(s->b->plan, p->spec, &p->c, p->counts, &s->l, &sch, err);
    if (st) return st;
    for (uint32_t u = 0; u < sch.n_unit; u++) {
        size_t from = at;
        for (uint32_t i = 0; i < sc->n_cut; i++)
            if (kv_schedule_visible(&sch, sc, u, i, 0)) s->list[at++] = i;
        for (uint32_t h = 0; h < l->n_q_head; h++)
            if (kv_unit_of(sch.n_unit, l->n_kv_head, l->n_q_head, h) == u) point_heads(s, branch, h, from, at - from);
    }
    kv_schedule_free(&sch);
    return KV_OK;
}

static void set_task(void *ctx, size_t i)
{
    source *s = ctx;
    s->st[i] = i && listed(s, (uint32_t)i) ? list_set(s, (uint32_t)i, &s->err[i]) : KV_OK;
}

static kv_status keep(source *s, uint32_t order, kv_error *err)
{
    const kv_plan *plan = s->b->plan;
    const kv_scene *sc = plan->scene;
    const kv_trace_info *in = sc->info;
    size_t number;
    bool sets = false, load = false;
    kv_status st = KV_OK;
    for (size_t r = 0; r < plan->n_ranking; r++) {
        const kv_ranking *rk = &plan->ranking[r];
        size_t n = (size_t)rk->n_unit * sc->n_cut;
        if (s->order_at[r] == SIZE_MAX) continue;
        memcpy(s->list + s->order_at[r], rk->order + order * n, n * sizeof *s->list);
    }
    for (uint32_t b = 1; b < s->b->n_branch; b++) {
        const kv_ranking *rk = ranking_of(s, b, &number);
        if (listed(s, b)) {
            sets = true, load |= !kv_schedule_planned(plan, s->b->point[b - 1]->spec);
            continue;
        }
        for (uint32_t h = 0; h < in->n_q_head; h++) {
            size_t u = kv_unit_of(rk->n_unit, in->n_kv_head, in->n_q_head, h);
            point_heads(s, b, h, s->order_at[number] + u * sc->n_cut,
                        s->b->point[b - 1]->counts[order * rk->n_unit + u]);
        }
    }
    if (!sets) return KV_OK;
    s->l = kv_layer_shape(sc, order);
    if (load) st = kv_layer_load(sc, order, KV_NEED_FUTURE | plan->needs, plan->max_window, &s->l, err);
    if (!st) kv_parallel(s->b->n_branch, s->b->threads, set_task, s);
    for (uint32_t b = 0; b < s->b->n_branch && !st; b++)
        if ((st = s->st[b])) *err = s->err[b];
    kv_layer_free(&s->l);
    return st;
}

static kv_status prompt(void *ctx, uint32_t layer, kv_branch_prompt *out, kv_error *err)
{
    source *s = ctx;
    const kv_scene *sc = s->b->plan->scene;
    uint32_t order = 0, heads = sc->info->n_kv_head;
    size_t n = (size_t)s->b->n_branch * sc->info->n_q_head;
    if (s->b->tick) s->b->tick(s->b->ctx, layer);
    s->layer = layer;
    kv_parallel(2 * (size_t)heads, s->b->threads, load_task, s);
    for (size_t i = 0; i < 2 * (size_t)heads; i++)
        if (s->st[i]) return *err = s->err[i], s->st[i];
    memset(s->first, 0xff, n * sizeof *s->first); /* all of the prompt: branch 0, and layers that do not evict */
    while (order < sc->n_evict && sc->evict[order] != layer) order++;
    kv_status st = order < sc->n_evict ? keep(s, order, err) : KV_OK;
    *out = (kv_branch_prompt){s->k, s->v, sc->n_cut, s->list, s->first, s->count, order < sc->n_evict ? s->n_list : 0};
    return st;
}

/* Where the lists go: orders first, then room for the sets that are none. */
static kv_status lay_out(source *s, kv_error *err)
{
    const kv_plan *plan = s->b->plan;
    size_t n = 0, number;
    kv_status st = kv_array(&s->order_at, plan->n_ranking + 1, sizeof *s->order_at, err);
    if (!st) st = kv_array(&s->set_at, s->b->n_branch, sizeof *s->set_at, err);
    for (size_t r = 0; r < plan->n_ranking && !st; r++) s->order_at[r] = SIZE_MAX;
    for (uint32_t b = 1; b < s->b->n_branch && !st; b++) {
        ranking_of(s, b, &number);
        if (!listed(s, b)) s->order_at[number] = 0;
    }
    for (size_t r = 0; r < plan->n_ranking && !st; r++)
        if (!s->order_at[r]) s->order_at[r] = n, n += (size_t)plan->ranking[r].n_unit * plan->scene->n_cut;
    for (uint32_t b = 1; b < s->b->n_branch && !st; b++)
        if (listed(s, b)) s->set_at[b] = n, n += (size_t)ranking_of(s, b, &number)->n_unit * plan->scene->n_cut;
    s->n_list = n;
    if (!st && s->n_list >= UINT32_MAX)
        return kv_fail(err, KV_ENOMEM, "kept sets of %zu positions in a layer", s->n_list);
    return st ? st : kv_array(&s->list, s->n_list + 1, sizeof *s->list, err);
}

kv_status kv_closed_compare(kv_engine *e, const kv_device_branches *b, kv_branch_losses *out, kv_error *err)
{
    const kv_scene *sc = b->plan->scene;
    const kv_trace_info *in = sc->info;
    size_t cache = (size_t)in->n_kv_head * sc->n_cut * in->head_dim, heads = (size_t)b->n_branch * in->n_q_head;
    uint32_t *target = NULL;
    source s = {.b = b};
    kv_status st = lay_out(&s, err);
    if (!st) st = kv_array(&s.k, cache, sizeof *s.k, err);
    if (!st) st = kv_array(&s.v, cache, sizeof *s.v, err);
    if (!st) st = kv_array(&s.first, heads, sizeof *s.first, err);
    if (!st) st = kv_array(&s.count, heads, sizeof *s.count, err);
    if (!st) st = kv_array(&s.st, 2 * (size_t)in->n_kv_head + b->n_branch, sizeof *s.st, err);
    if (!st) st = kv_array(&s.err, 2 * (size_t)in->n_kv_head + b->n_branch, sizeof *s.err, err);
    if (!st) st = kv_array(&target, b->n_row, sizeof *target, err);
    for (uint32_t r = 0; r + 1 < b->n_row && !st; r++) target[r] = b->token[sc->n_cut + r + 1]; /* the last has none */
    kv_branch_source from = {&s, prompt};
    if (!st) st = kv_engine_compare(e, b->token + sc->n_cut, target, sc->n_cut, b->n_row, b->n_branch, &from, out, err);
    free(s.k), free(s.v), free(s.list), free(s.first), free(s.count), free(s.order_at), free(s.set_at), free(s.st);
    free(s.err), free(target);
    return st;
}
