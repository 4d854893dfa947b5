/* closed_attend.c - what each branch sees in a layer: the prompt's entries its policy kept, and its own rows.
 *
 * Branches whose kept set does not change, a prefix of a ranking or not, gather their keys once and attend to them in
 * one call per query head. Where it changes from row to row (decode rules) the policy decides anew on this branch's
 * queries and keys: the layer's arrays get the branch's rows in place of the trace's, and every row gathers what it
 * sees.
 *
 * Nothing is lost before the first layer that evicts, so its measured rows are the trace's own: the open loop's
 * arithmetic gives their outputs, and the same bytes as errors. */
#include "sim/closed_attend.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "sim/measure.h"
#include "sim/mixdim.h"
#include "sim/reindex.h"

typedef struct {
    const kv_branches *b;
    const kv_attn_view *a;
    kv_layer l;
    bool evicts;
    uint32_t n_row;   /* the first rows of every branch, which attend here; the first layer's others are measured */
    kv_schedule *set; /* [n_branch] of sets that do not change and are no prefix; zero for the others */
    /* of the branch at hand, when it has a schedule */
    uint32_t branch;
    const kv_schedule *sch;
    kv_status *st; /* [tasks] */
    kv_error *err;
} attend;

static size_t row_of(const attend *t, uint32_t r, uint32_t branch)
{
    return (size_t)r * t->b->n_branch + branch;
}

static float *out_of(const attend *t, uint32_t r, uint32_t branch, uint32_t h)
{
    return t->a->out + (row_of(t, r, branch) * t->l.n_q_head + h) * t->l.d;
}

/* Rows of one head of one branch, one behind the other. from: [heads][all rows][d]. */
static void gather_rows(const attend *t, const float *from, size_t stride, uint32_t h, uint32_t branch, float *to)
{
    size_t d = t->l.d;
    for (uint32_t r = 0; r < t->n_row; r++)
        memcpy(to + r * d, from + (h * stride + row_of(t, r, branch)) * d, d * sizeof *to);
}

/* ------------------------------------------------------------------------------------------------ fixed sets */
size_t kv_gather_kept(const kv_plan *plan, const kv_point *point, bool ranked, const kv_layer *l, uint32_t q_head,
                      float *k, float *v)
{
    const kv_scene *sc = l->scene;
    const kv_ranking *rk = point && ranked ? &plan->ranking[plan->ranking_of[point->spec]] : NULL;
    size_t d = l->d, n = sc->n_cut, from = (size_t)(q_head / l->group) * sc->n_token * d;
    const uint32_t *order = NULL;
    if (rk) {
        size_t at = (size_t)l->order * rk->n_unit + kv_unit_of(rk->n_unit, l->n_kv_head, l->n_q_head, q_head);
        order = rk->order + at * sc->n_cut;
        n = point->counts[at];
    }
    for (size_t i = 0; i < n; i++) {
        size_t key = order ? order[i] : i;
        memcpy(k + i * d, l->k + from + key * d, d * sizeof *k);
        memcpy(v + i * d, l->v + from + key * d, d * sizeof *v);
    }
    return n;
}

/* Does the set change behind the cut? */
static bool changes(const kv_branches *b, uint32_t branch)
{
    size_t i = branch ? b->point[branch - 1]->spec : 0;
    return branch && kv_schedule_used(b->plan, i) && (b->plan->spec[i].file || !kv_schedule_fixed(&b->plan->spec[i]));
}

static void set_task(void *ctx, size_t i)
{
    attend *t = ctx;
    const kv_point *p = i ? t->b->point[i - 1] : NULL;
    t->st[i] = KV_OK;
    if (p && kv_schedule_used(t->b->plan, p->spec) && !changes(t->b, (uint32_t)i))
        t->st[i] = kv_schedule_make(t->b->plan, p->spec, &p->c, p->counts, &t->l, &t->set[i], &t->err[i]);
}

/* As kv_gather_kept. */
static size_t gather_set(const attend *t, const kv_schedule *set, uint32_t q_head, float *k, float *v)
{
    const kv_layer *l = &t->l;
    size_t d = l->d, n = 0, from = (size_t)(q_head / l->group) * l->scene->n_token * d;
    uint32_t u = kv_unit_of(set->n_unit, l->n_kv_head, l->n_q_head, q_head);
    for (uint32_t i = 0; i < l->scene->n_cut; i++) {
        if (!kv_schedule_visible(set, l->scene, u, i, 0)) continue;
        memcpy(k + n * d, l->k + from + i * d, d * sizeof *k);
        memcpy(v + n++ * d, l->v + from + i * d, d * sizeof *v);
    }
    return n;
}

/* One (branch, KV head): its query heads attend to the kept entries of the prompt and the branch's own rows. */
static kv_status attend_fixed(attend *t, uint32_t branch, uint32_t kv, kv_error *err)
{
    const kv_layer *l = &t->l;
    const kv_scene *sc = l->scene;
    uint32_t R = t->n_row;
    size_t d = l->d, room = (size_t)sc->n_cut + R, n = 0;
    const kv_point *p = branch ? t->b->point[branch - 1] : NULL;
    /* per query head: another set for every head */
    bool each = p && t->evicts && t->b->plan->ranking[t->b->plan->ranking_of[p->spec]].n_unit > l->n_kv_head;
    float *k = NULL, *v = NULL, *q = NULL, *lse = NULL;
    kv_status st = kv_array(&k, room * d, sizeof *k, err);
    if (!st) st = kv_array(&v, room * d, sizeof *v, err);
    if (!st) st = kv_array(&q, R * d, sizeof *q, err);
    if (!st) st = kv_array(&lse, R, sizeof *lse, err);
    for (uint32_t g = 0; g < l->group && !st; g++) {
        uint32_t h = kv * l->group + g;
        if (!g || each) {
            n = t->set[branch].n_unit ? gather_set(t, &t->set[branch], h, k, v)
                                      : kv_gather_kept(t->b->plan, p, t->evicts, l, h, k, v);
            gather_rows(t, t->a->k, t->a->kv_stride, kv, branch, k + n * d);
            gather_rows(t, t->a->v, t->a->kv_stride, kv, branch, v + n * d);
        }
        gather_rows(t, t->a->q, t->a->n_row, h, branch, q);
        uint32_t window = t->evicts ? 0 : sc->info->window[l->index];
        kv_attn_shape s = {R, n + R, d, n, window, l->scale, l->softcap};
        if (!kv_attention(&s, q, k, v, out_of(t, 0, branch, h), (size_t)t->b->n_branch * l->n_q_head * d, lse, NULL))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
    }
    free(k), free(v), free(q), free(lse);
    return st;
}

static void fixed_task(void *ctx, size_t i)
{
    attend *t = ctx;
    uint32_t branch = (uint32_t)(i / t->l.n_kv_head), kv = (uint32_t)(i % t->l.n_kv_head);
    t->st[i] = t->evicts && changes(t->b, branch) ? KV_OK : attend_fixed(t, branch, kv, &t->err[i]);
}

/* ------------------------------------------------------------------------------------------------ changing sets */
/* The branch's rows in place of the trace's: keys, values and queries behind the cut. */
static void lend_rows(attend *t, uint32_t branch)
{
    kv_layer *l = &t->l;
    const kv_scene *sc = l->scene;
    size_t d = l->d, N = sc->n_token, skip = sc->row_first - sc->n_cut;
    for (uint32_t h = 0; h < l->n_kv_head; h++) {
        gather_rows(t, t->a->k, t->a->kv_stride, h, branch, l->k + (h * N + sc->n_cut) * d);
        gather_rows(t, t->a->v, t->a->kv_stride, h, branch, l->v + (h * N + sc->n_cut) * d);
    }
    for (uint32_t h = 0; h < l->n_q_head && l->q_row; h++)
        for (size_t r = 0; r < sc->n_row; r++)
            memcpy(l->q_row + (h * (size_t)sc->n_row + r) * d,
                   t->a->q + (h * (size_t)t->a->n_row + row_of(t, (uint32_t)(skip + r), branch)) * d,
                   d * sizeof *l->q_row);
}

kv_status kv_attend_list(const kv_layer *l, bool reindex, const kv_schedule *sch, uint32_t h, uint32_t row,
                         const float *q, const uint32_t *list, uint32_t n, bool gather, const kv_list_room *room,
                         float *out, kv_error *err)
{
    const kv_scene *sc = l->scene;
    size_t d = l->d, kv = (size_t)(h / l->group) * sc->n_token * d;
    float lse;
    if ((reindex || (sch && sch->k)) && row >= sc->row_first) {
        uint32_t measured = row - sc->row_first;
        const float *V = sch && sch->v ? sch->v + kv : l->v + kv;
        kv_attn_shape full = {1, (size_t)row + 1, d, row, 0, l->scale, l->softcap};
        double distance;
        if (!kv_probs(&full, q, l->k + kv, room->p)) return kv_fail(err, KV_ENOMEM, "out of memory");
        kv_status st = KV_OK;
        if (sch && sch->k)
            kv_mixdim_row(l, h, measured, sch->k + kv, list, n, room->p, room->weight, &distance);
        else
            st = kv_reindex_row(l, h, measured, list, n, room->p, room->weight, &distance, err);
        for (size_t j = 0; j < d && !st; j++) {
            double x = 0;
            for (uint32_t i = 0; i < n; i++) x += room->weight[i] * V[list[i] * d + j];
            out[j] = (float)x;
        }
        return st;
    }
    for (uint32_t i = 0; i < n && gather; i++) {
        memcpy(room->k + i * d, l->k + kv + list[i] * d, d * sizeof *room->k);
        memcpy(room->v + i * d, l->v + kv + list[i] * d, d * sizeof *room->v);
    }
    kv_attn_shape s = {1, n, d, n - 1, 0, l->scale, l->softcap};
    return kv_attention(&s, q, room->k, room->v, out, d, &lse, NULL) ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory");
}

kv_status kv_list_room_open(const kv_layer *l, kv_list_room *room, kv_error *err)
{
    size_t N = l->scene->n_token;
    *room = (kv_list_room){0};
    kv_status st = kv_array(&room->list, N, sizeof *room->list, err);
    if (!st) st = kv_array(&room->k, N * l->d, sizeof *room->k, err);
    if (!st) st = kv_array(&room->v, N * l->d, sizeof *room->v, err);
    if (!st) st = kv_array(&room->p, N, sizeof *room->p, err);
    if (!st) st = kv_array(&room->weight, N, sizeof *room->weight, err);
    return st;
}

void kv_list_room_close(kv_list_room *room)
{
    free(room->list), free(room->k), free(room->v), free(room->p), free(room->weight);
    *room = (kv_list_room){0};
}

/* One KV head of the branch at hand. */
static kv_status attend_changing(attend *t, uint32_t kv, kv_error *err)
{
    const kv_layer *l = &t->l;
    const kv_scene *sc = l->scene;
    uint32_t U = t->sch->n_unit;
    kv_list_room room;
    bool reindex = t->b->plan->spec[t->b->point[t->branch - 1]->spec].reindex;
    kv_status st = kv_list_room_open(l, &room, err);
    for (uint32_t r = 0; r < t->n_row && !st; r++)
        for (uint32_t g = 0; g < l->group && !st; g++) {
            uint32_t h = kv * l->group + g, u = kv_unit_of(U, l->n_kv_head, l->n_q_head, h), n = 0;
            uint32_t row = sc->n_cut + r, measured = row < sc->row_first ? 0 : row - sc->row_first;
            const float *q = t->a->q + (h * (size_t)t->a->n_row + row_of(t, r, t->branch)) * l->d;
            /* Rows of the question, behind a cut at the context, see what the cut left and each other. */
            for (uint32_t i = 0; i <= row; i++)
                if ((row < sc->row_first && i >= sc->n_cut) || kv_schedule_visible(t->sch, sc, u, i, measured))
                    room.list[n++] = i;
            st = kv_attend_list(l, reindex, t->sch, h, row, q, room.list, n, !g || U > l->n_kv_head, &room,
                                out_of(t, r, t->branch, h), err);
        }
    kv_list_room_close(&room);
    return st;
}

static void changing_task(void *ctx, size_t i)
{
    attend *t = ctx;
    t->st[i] = attend_changing(t, (uint32_t)i, &t->err[i]);
}

/* ------------------------------------------------------------------------------------------------ the first layer */
/* Measured rows of all branches: outputs, and errors as the metrics form them (metric.c). */
static kv_status attend_first(attend *t, kv_error *err)
{
    const kv_branches *b = t->b;
    const kv_scene *sc = t->l.scene;
    size_t n = b->n_branch - 1, Hq = t->l.n_q_head, skip = sc->row_first - sc->n_cut;
    kv_replay sums = {.n_point = n};
    kv_point *point = NULL;
    kv_measure m = {.plan = b->plan,
                    .n_point = n,
                    .wanted = KV_M_BIT(KV_M_HEAD_ERROR),
                    .hat = t->a->out + skip * b->n_branch * Hq * t->l.d,
                    .out = &sums};
    kv_status st = kv_array(&point, n, sizeof *point, err);
    if (!st) st = kv_array(&sums.head, n * sc->n_evict * Hq, sizeof *sums.head, err);
    for (size_t i = 0; i < n && !st; i++) point[i] = *b->point[i];
    m.point = point;
    if (!st) st = kv_measure_layer(&m, t->l.order, err);
    for (size_t i = 0; i < n && !st; i++) {
        const kv_head_sums *s = sums.head + i * sc->n_evict * Hq;
        double error = 0;
        for (size_t h = 0; h < Hq; h++) error += s[h].head_error / s[h].n;
        b->head_error[i * sc->n_evict] = error / (double)Hq;
    }
    free(point);
    kv_replay_free(&sums);
    return st;
}

/* ------------------------------------------------------------------------------------------------ errors */
static double distance(size_t n, const float *a, const float *b)
{
    double base = 0;
    for (size_t i = 0; i < n; i++) base += (double)a[i] * (double)a[i];
    return base > 0 ? sqrt(kv_diff_squares(n, a, b, NULL) / base) : 0;
}

/* One branch: means over the rows P..N-1. */
static void error_task(void *ctx, size_t i)
{
    attend *t = ctx;
    const kv_scene *sc = t->l.scene;
    uint32_t branch = (uint32_t)i + 1, skip = sc->row_first - sc->n_cut;
    size_t hidden = sc->info->hidden, at = i * sc->n_evict + t->l.order;
    double head = 0, stream = 0;
    for (uint32_t r = skip; r < t->b->n_row; r++) {
        for (uint32_t h = 0; h < t->l.n_q_head && t->l.order; h++)
            head += distance(t->l.d, out_of(t, r, 0, h), out_of(t, r, branch, h));
        stream += distance(hidden, t->a->x + row_of(t, r, 0) * hidden, t->a->x + row_of(t, r, branch) * hidden);
    }
    if (t->l.order) t->b->head_error[at] = head / ((double)sc->n_row * t->l.n_q_head);
    t->b->stream_error[at] = stream / sc->n_row;
}

static kv_status first_failure(const attend *t, size_t n, kv_error *err)
{
    for (size_t i = 0; i < n; i++)
        if (t->st[i]) return *err = t->err[i], t->st[i];
    return KV_OK;
}

kv_status kv_branches_attend(const kv_branches *b, const kv_attn_view *a, kv_error *err)
{
    const kv_scene *sc = b->plan->scene;
    attend t = {.b = b, .a = a};
    size_t n_task = (size_t)b->n_branch * sc->info->n_kv_head;
    bool read = false; /* for sets that do not follow from the plan */
    for (uint32_t i = 1; i < b->n_branch; i++)
        read |=
            kv_schedule_used(b->plan, b->point[i - 1]->spec) && !kv_schedule_planned(b->plan, b->point[i - 1]->spec);
    kv_status st =
        kv_layer_load_at(sc, a->layer, read ? KV_NEED_FUTURE | b->plan->needs : 0, b->plan->max_window, &t.l, err);
    t.evicts = !st && t.l.order != KV_NEVER_EVICTS;
    bool first = t.evicts && !t.l.order;
    t.n_row = first ? sc->row_first - sc->n_cut : b->n_row;
    if (!st) st = kv_array(&t.st, n_task, sizeof *t.st, err);
    if (!st) st = kv_array(&t.err, n_task, sizeof *t.err, err);
    if (!st) st = kv_array(&t.set, b->n_branch, sizeof *t.set, err);
    if (!st && t.evicts && t.n_row) {
        kv_parallel(b->n_branch, b->threads, set_task, &t);
        st = first_failure(&t, b->n_branch, err);
    }
    if (!st && t.n_row) {
        kv_parallel(n_task, b->threads, fixed_task, &t);
        st = first_failure(&t, n_task, err);
    }
    for (uint32_t i = 1; i < b->n_branch && t.evicts && t.n_row && !st; i++) {
        kv_schedule sch;
        const kv_point *p = b->point[i - 1];
        if (!changes(b, i)) continue;
        if (!first) lend_rows(&t, i);
        if ((st = kv_schedule_make(b->plan, p->spec, &p->c, p->counts, &t.l, &sch, err))) break;
        t.branch = i, t.sch = &sch;
        kv_parallel(t.l.n_kv_head, b->threads, changing_task, &t);
        st = first_failure(&t, t.l.n_kv_head, err);
        kv_schedule_free(&sch);
    }
    if (!st && first) st = attend_first(&t, err);
    if (!st && t.evicts) kv_parallel(b->n_branch - 1, b->threads, error_task, &t);
    for (uint32_t i = 0; i < b->n_branch && t.set; i++) kv_schedule_free(&t.set[i]);
    free(t.st), free(t.err), free(t.set);
    kv_layer_free(&t.l);
    return st;
}
