/* replay.c - the metric pass. */
#include "sim/replay.h"
#include "sim/mixdim.h"
#include "sim/reindex.h"
#include "sim/schedule.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "sim/dmath.h"
#include "traces/cli.h"

enum { ROWS = 128 }; /* rows in flight: bounds the memory of all points' outputs */
#define NATS_CAP     20.0
#define LOST_NOTHING 1e-6 /* 1 - R below this: the distance of the means is noise */

/* One layer being measured; scratch of one task. */
typedef struct {
    const kv_plan *plan;
    const kv_point *point;
    size_t n_point;
    unsigned wanted;
    kv_layer l;
    double *ref;        /* [n_row] ||x|| or the norm of the layer's own output */
    float *o, *lse;     /* [Hq][n_row][d], [Hq][n_row]: full-cache rows */
    float *base_out;    /* [Hq][n_row][d]: sum p v over tokens after the cut */
    double *base_mass;  /* [Hq][n_row] */
    uint8_t *contested; /* [n_token] 1 = outside F */
    kv_replay *out;
} task;

static kv_head_sums *sums(const task *t, size_t point, uint32_t h)
{
    return &t->out->head[(point * t->plan->scene->n_evict + t->l.order) * t->l.n_q_head + h];
}

/* Full-cache output, log-sum-exp, and the part of the tokens after the cut, for every measured row. */
static kv_status full_rows(task *t, kv_error *err)
{
    const kv_scene *sc = t->plan->scene;
    const kv_layer *l = &t->l;
    size_t n = sc->n_row, d = l->d, after = sc->n_token - sc->n_cut;
    float *part = NULL, *part_lse = NULL;
    kv_attn_shape full = {n, sc->n_token, d, sc->row_first, 0, l->scale, l->softcap};
    kv_attn_shape tail = {n, after, d, sc->row_first - sc->n_cut, 0, l->scale, l->softcap};
    kv_status st = kv_array(&part, n * d, sizeof *part, err);
    if (!st) st = kv_array(&part_lse, n, sizeof *part_lse, err);
    for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
        const float *q = l->q_row + h * n * d;
        const float *k = l->k + (size_t)(h / l->group) * sc->n_token * d,
                    *v = l->v + (size_t)(h / l->group) * sc->n_token * d;
        float *lse = t->lse + h * n;
        if (!kv_attention(&full, q, k, v, t->o + h * n * d, d, lse, NULL) ||
            !kv_attention(&tail, q, k + sc->n_cut * d, v + sc->n_cut * d, part, d, part_lse, NULL)) {
            st = kv_fail(err, KV_ENOMEM, "out of memory");
            break;
        }
        for (size_t r = 0; r < n; r++) {
            double m = exp((double)part_lse[r] - lse[r]);
            if (m > 1) m = 1;
            t->base_mass[h * n + r] = m;
            for (size_t j = 0; j < d; j++) t->base_out[(h * n + r) * d + j] = (float)(m * part[r * d + j]);
            if (!isfinite(lse[r]))
                st = kv_fail(err, KV_EFORMAT, "trace '%s': layer %u head %u row %zu: attention is not finite",
                             kv_trace_path(sc->trace), l->number, h, sc->row_first + r);
        }
    }
    free(part), free(part_lse);
    return st;
}

/* Mass outside F of every head, the denominator of contested recall. */
static kv_status contested_total(task *t, kv_error *err)
{
    const kv_scene *sc = t->plan->scene;
    const kv_layer *l = &t->l;
    size_t n = sc->n_row, d = l->d;
    uint32_t n_order = 0, *order = NULL;
    float *zero = NULL;
    double *mass = NULL, *none = NULL;
    kv_status st = kv_array(&order, sc->n_cut, sizeof *order, err);
    if (!st) st = kv_array(&zero, n * d, sizeof *zero, err);
    if (!st) st = kv_array(&mass, n, sizeof *mass, err);
    if (!st) st = kv_array(&none, n, sizeof *none, err);
    for (uint32_t i = 0; i < sc->n_cut && !st; i++)
        if (t->contested[i]) order[n_order++] = i;
    for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
        size_t kv = (size_t)(h / l->group) * sc->n_token * d;
        if (!kv_prefix(n, d, l->q_row + h * n * d, t->lse + h * n, l->scale, l->softcap, l->k + kv, l->v + kv, n_order,
                       order, 1, &n_order, none, zero, NULL, mass, NULL, NULL))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        double sum = 0;
        for (size_t r = 0; r < n && !st; r++) sum += mass[r];
        for (size_t i = 0; i < t->n_point; i++) sums(t, i, h)->contested_all = sum;
    }
    free(order), free(zero), free(mass), free(none);
    return st;
}

static int by_count(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* One row of one head at one point: add to the sums; diff (NULL allowed) gets o - o_hat. after: visible mass behind the
 * cut, base: all of it. */
static void account(kv_head_sums *s, double mass, double cmass, double after, double base, const float *o,
                    const float *o_hat, double norm_o, size_t d, bool whole, bool errors, float *diff)
{
    double R = whole || mass > 1 ? 1 : mass < 0 ? 0 : mass, nats = R > 0 ? -log(R) : INFINITY, e2 = 0;
    s->recall += R;
    if (!s->n++ || R < s->recall_min) s->recall_min = R;
    if (nats > NATS_CAP) nats = NATS_CAP, s->n_capped++;
    s->nats += nats;
    s->contested_kept += cmass;
    s->n_whole += whole;
    if (base < 1 - 1e-9) {
        double share = whole ? 1 : (R - after) / (1 - base);
        s->recall_prompt += share < 0 ? 0 : share > 1 ? 1 : share;
        s->n_prompt++;
    }
    if (!errors) return;
    if (!whole)
        e2 = kv_diff_squares(d, o, o_hat, diff);
    else if (diff)
        memset(diff, 0, d * sizeof *diff);
    double rel = norm_o > 0 ? sqrt(e2) / norm_o : 0;
    s->head_error += rel;
    if (1 - R > LOST_NOTHING) s->value_distance += rel / (1 - R), s->n_distance++;
}

/* All points of one ranking over rows r0..r0+n-1. points = their indices. */
static kv_status measure(task *t, size_t ranking, const size_t *points, size_t n_points, size_t r0, size_t n,
                         kv_error *err)
{
    const kv_scene *sc = t->plan->scene;
    const kv_ranking *rk = &t->plan->ranking[ranking];
    const kv_layer *l = &t->l;
    size_t d = l->d, N = sc->n_row, U = rk->n_unit, width = (size_t)l->n_q_head * d;
    bool errors = t->wanted & (1u << KV_M_HEAD_ERROR | 1u << KV_M_VALUE_DISTANCE | 1u << KV_M_LAYER_ERROR),
         contest = t->wanted >> KV_M_RECALL_CONTESTED & 1;
    size_t heads = rk->granularity == KV_GRAN_QUERY_HEAD ? 1 : l->group, rows = heads * n;
    uint32_t *check = NULL;
    float *q = NULL, *lse = NULL, *base_out = NULL, *out = NULL, *diff = NULL;
    double *base_mass = NULL, *mass = NULL, *cmass = NULL, *norm = NULL, *norm_o = NULL;
    kv_status st = kv_array(&check, n_points, sizeof *check, err);
    if (!st) st = kv_array(&q, rows * d, sizeof *q, err);
    if (!st) st = kv_array(&lse, rows, sizeof *lse, err);
    if (!st) st = kv_array(&base_out, rows * d, sizeof *base_out, err);
    if (!st) st = kv_array(&base_mass, rows, sizeof *base_mass, err);
    if (!st) st = kv_array(&norm_o, rows, sizeof *norm_o, err);
    if (!st) st = kv_array(&mass, n_points * rows, sizeof *mass, err);
    if (!st) st = kv_array(&cmass, n_points * rows, sizeof *cmass, err);
    if (!st && errors) st = kv_array(&out, n_points * rows * d, sizeof *out, err);
    if (!st && t->out->layer_error) st = kv_array(&diff, n_points * n * width, sizeof *diff, err);
    if (!st && t->out->layer_error) st = kv_array(&norm, n, sizeof *norm, err);
    for (uint32_t h0 = 0; h0 < l->n_q_head && !st; h0 += (uint32_t)heads) {
        size_t u = rk->granularity == KV_GRAN_LAYER ? 0 : h0 / heads, kv = (size_t)(h0 / l->group) * sc->n_token * d;
        size_t n_check = 0;
        for (size_t i = 0; i < n_points; i++) check[i] = t->point[points[i]].counts[l->order * U + u];
        qsort(check, n_points, sizeof *check, by_count);
        for (size_t i = 0; i < n_points; i++)
            if (!n_check || check[n_check - 1] != check[i]) check[n_check++] = check[i];
        for (size_t g = 0; g < heads; g++) {
            size_t from = (h0 + g) * N + r0;
            memcpy(q + g * n * d, l->q_row + from * d, n * d * sizeof *q);
            memcpy(lse + g * n, t->lse + from, n * sizeof *lse);
            memcpy(base_mass + g * n, t->base_mass + from, n * sizeof *base_mass);
            memcpy(base_out + g * n * d, t->base_out + from * d, n * d * sizeof *base_out);
            for (size_t r = 0; r < n; r++) norm_o[g * n + r] = kv_norm(d, t->o + (from + r) * d);
        }
        if (!kv_prefix(rows, d, q, lse, l->scale, l->softcap, l->k + kv, l->v + kv, sc->n_cut,
                       rk->order + (l->order * U + u) * sc->n_cut, n_check, check, base_mass, base_out,
                       contest ? t->contested : NULL, mass, contest ? cmass : NULL, out)) {
            st = kv_fail(err, KV_ENOMEM, "out of memory");
            break;
        }
        for (size_t i = 0; i < n_points; i++) {
            uint32_t count = t->point[points[i]].counts[l->order * U + u];
            size_t c = (size_t)((uint32_t *)bsearch(&count, check, n_check, sizeof *check, by_count) - check);
            for (size_t g = 0; g < heads; g++)
                for (size_t r = 0; r < n; r++) {
                    size_t at = c * rows + g * n + r, row = (h0 + g) * N + r0 + r;
                    account(sums(t, points[i], h0 + (uint32_t)g), mass[at], contest ? cmass[at] : 0,
                            base_mass[g * n + r], base_mass[g * n + r], t->o + row * d, errors ? out + at * d : NULL,
                            norm_o[g * n + r], d, count == sc->n_cut, errors,
                            diff ? diff + (i * n + r) * width + (h0 + g) * d : NULL);
                }
        }
    }
    for (size_t i = 0; i < n_points && !st && diff; i++) {
        bool whole = true; /* nothing dropped: the difference is zero */
        for (size_t u = 0; u < U; u++) whole &= t->point[points[i]].counts[l->order * U + u] == sc->n_cut;
        if (whole) continue;
        if (!kv_project_norm(n, width, sc->info->hidden, diff + i * n * width, t->l.wo, norm))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t r = 0; r < n && !st; r++)
            t->out->layer_error[points[i] * sc->n_evict + l->order] +=
                t->ref[r0 + r] > 0 ? norm[r] / t->ref[r0 + r] : 0;
    }
    free(check), free(q), free(lse), free(base_out), free(out), free(diff), free(base_mass), free(mass), free(cmass),
        free(norm), free(norm_o);
    return st;
}

/* Positions that row r of unit u sees, ascending, from the n that row r-1 saw; n = 0 starts anew. */
static uint32_t visible(const kv_schedule *sch, const kv_scene *sc, uint32_t u, uint32_t r, uint32_t n, uint32_t *list)
{
    uint32_t row = sc->row_first + r, m = 0;
    if (!n || sch->seen) { /* entries may come back */
        for (uint32_t i = 0; i <= row; i++)
            if (kv_schedule_visible(sch, sc, u, i, r)) list[m++] = i;
        return m;
    }
    for (uint32_t i = 0; i < n; i++)
        if (kv_schedule_visible(sch, sc, u, list[i], r)) list[m++] = list[i];
    if (kv_schedule_visible(sch, sc, u, row, r)) list[m++] = row;
    return m;
}

/* One point whose kept set changes from row to row: every row by itself, its visible positions in order, those before
 * the cut first. */
static kv_status measure_schedule(task *t, size_t point, const kv_schedule *sch, kv_error *err)
{
    const kv_scene *sc = t->plan->scene;
    const kv_layer *l = &t->l;
    size_t d = l->d, N = sc->n_token, T = sc->n_row, width = (size_t)l->n_q_head * d, U = sch->n_unit,
           g = U > l->n_kv_head ? 1 : l->group;
    bool errors = t->wanted & (1u << KV_M_HEAD_ERROR | 1u << KV_M_VALUE_DISTANCE | 1u << KV_M_LAYER_ERROR);
    bool reindex = t->plan->spec[t->point[point].spec].reindex, contest = t->wanted >> KV_M_RECALL_CONTESTED & 1;
    uint32_t *list = NULL;
    float *q = NULL, *lse = NULL, *p = NULL, *diff = NULL, *hat = NULL;
    double *mass = NULL, *cmass = NULL, *norm = NULL, *weight = NULL;
    kv_status st = kv_array(&list, N, sizeof *list, err);
    if (!st) st = kv_array(&q, g * d, sizeof *q, err);
    if (!st) st = kv_array(&lse, g, sizeof *lse, err);
    if (!st) st = kv_array(&mass, 2 * g, sizeof *mass, err);
    if (!st) st = kv_array(&cmass, 2 * g, sizeof *cmass, err);
    if (!st) st = kv_array(&hat, 2 * g * d, sizeof *hat, err);
    if (!st) st = kv_array(&p, N, sizeof *p, err);
    if (!st) st = kv_array(&weight, N, sizeof *weight, err);
    if (!st && t->out->layer_error) st = kv_array(&diff, ROWS * width, sizeof *diff, err);
    if (!st && diff) st = kv_array(&norm, ROWS, sizeof *norm, err);
    for (size_t r0 = 0; r0 < T && !st; r0 += ROWS) {
        size_t rows = T - r0 < ROWS ? T - r0 : ROWS;
        for (uint32_t h0 = 0; h0 < l->n_q_head && !st; h0 += (uint32_t)g) {
            uint32_t u = U == 1 ? 0 : h0 / (uint32_t)g, n = 0;
            size_t kv = (size_t)(h0 / l->group) * N * d;
            const float *K = l->k + kv, *V = l->v + kv, *V_hat = sch->v ? sch->v + kv : V;
            bool reduced = sch->k && sch->slots[u] < sc->n_cut;
            for (size_t r = 0; r < rows && !st; r++) {
                size_t row = sc->row_first + r0 + r;
                n = visible(sch, sc, u, (uint32_t)(r0 + r), n, list);
                uint32_t check[2] = {0, n};
                while (check[0] < n && list[check[0]] < sc->n_cut) check[0]++;
                for (size_t k = 0; k < g; k++) {
                    memcpy(q + k * d, l->q_row + ((h0 + k) * T + r0 + r) * d, d * sizeof *q);
                    lse[k] = t->lse[(h0 + k) * T + r0 + r];
                }
                if (!kv_prefix(g, d, q, lse, l->scale, l->softcap, K, V, n, list, 2, check, NULL, NULL,
                               contest ? t->contested : NULL, mass, contest ? cmass : NULL, errors ? hat : NULL))
                    st = kv_fail(err, KV_ENOMEM, "out of memory");
                for (size_t k = 0; k < g && !st; k++) {
                    size_t h = h0 + k, at = h * T + r0 + r;
                    float *o_hat = hat + (g + k) * d;
                    double distance = 0;
                    bool whole = n == row + 1 && !reduced; /* has every key in its place */
                    if ((reindex || sch->k) && !whole) {
                        kv_attn_shape shape = {1, row + 1, d, row, 0, l->scale, l->softcap};
                        if (!kv_probs(&shape, q + k * d, K, p))
                            st = kv_fail(err, KV_ENOMEM, "out of memory");
                        else if (sch->k)
                            kv_mixdim_row(l, (uint32_t)h, (uint32_t)(r0 + r), sch->k + kv, list, n, p, weight,
                                          &distance);
                        else
                            st = kv_reindex_row(l, (uint32_t)h, (uint32_t)(r0 + r), list, n, p, weight, &distance, err);
                        for (size_t j = 0; j < d && errors && !st; j++) {
                            double x = 0;
                            for (uint32_t i = 0; i < n; i++) x += weight[i] * V_hat[list[i] * d + j];
                            o_hat[j] = (float)x;
                        }
                        sums(t, point, (uint32_t)h)->total_variation += distance;
                    }
                    account(sums(t, point, (uint32_t)h), mass[g + k], contest ? cmass[g + k] : 0, mass[g + k] - mass[k],
                            t->base_mass[at], t->o + at * d, o_hat, kv_norm(d, t->o + at * d), d, whole, errors,
                            diff ? diff + r * width + h * d : NULL);
                }
            }
        }
        if (st || !diff) continue;
        if (!kv_project_norm(rows, width, sc->info->hidden, diff, l->wo, norm))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t r = 0; r < rows && !st; r++)
            t->out->layer_error[point * sc->n_evict + l->order] += t->ref[r0 + r] > 0 ? norm[r] / t->ref[r0 + r] : 0;
    }
    free(list), free(q), free(lse), free(mass), free(cmass), free(hat), free(p), free(weight), free(diff), free(norm);
    return st;
}

/* Slots of a scheduled point in this layer: right after the cut, and summed and at most over the measured rows. */
static void ledger(task *t, size_t point, const kv_schedule *sch)
{
    const kv_scene *sc = t->plan->scene;
    for (uint32_t u = 0; u < sch->n_unit; u++)
        t->point[point].counts[t->l.order * sch->n_unit + u] = kv_schedule_slots(sch, sc, u);
    kv_row_slots *rs = &t->out->rows[point * sc->n_evict + t->l.order];
    for (uint32_t r = 0; r < sc->n_row; r++) {
        uint64_t now = 0;
        for (uint32_t u = 0; u < sch->n_unit; u++) {
            now += sch->slots ? sch->slots[u] : 0;
            for (uint32_t i = sch->slots ? sc->n_cut : 0; i <= sc->row_first + r; i++)
                now += kv_schedule_visible(sch, sc, u, i, r);
        }
        rs->sum += now;
        if (now > rs->peak) rs->peak = now;
    }
}

/* What layer errors are divided by. */
static kv_status reference(task *t, kv_error *err)
{
    const kv_scene *sc = t->plan->scene;
    size_t n = sc->n_row, width = (size_t)t->l.n_q_head * t->l.d;
    float *x = NULL;
    kv_status st = kv_array(&t->ref, n, sizeof *t->ref, err);
    if (!st) st = kv_array(&x, t->out->own_output ? n * width : n, sizeof *x, err);
    if (!st && !t->out->own_output) {
        st = kv_trace_read_f32(sc->trace, KV_S_XNORM, t->l.number, 0, sc->row_first, sc->n_token, x, err);
        for (size_t r = 0; r < n && !st; r++) t->ref[r] = x[r];
    } else if (!st) {
        for (size_t h = 0; h < t->l.n_q_head; h++)
            for (size_t r = 0; r < n; r++)
                memcpy(x + r * width + h * t->l.d, t->o + (h * n + r) * t->l.d, t->l.d * sizeof *x);
        if (!kv_project_norm(n, width, sc->info->hidden, x, t->l.wo, t->ref))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
    }
    free(x);
    return st;
}

static kv_status layer_task(task *t, uint32_t index, kv_error *err)
{
    const kv_scene *sc = t->plan->scene;
    size_t n = sc->n_row, *points = NULL;
    unsigned needs = KV_NEED_FUTURE | (t->out->layer_error ? KV_NEED_WO : 0);
    bool schedules = false;
    for (size_t i = 0; i < t->n_point; i++) schedules |= kv_schedule_used(t->plan, t->point[i].spec);
    kv_status st = kv_layer_load(sc, index, needs | (schedules ? t->plan->needs : 0),
                                 schedules ? t->plan->max_window : 0, &t->l, err);
    if (st) return st;
    size_t rows = t->l.n_q_head * n, P = sc->n_prompt;
    st = kv_array(&t->o, rows * t->l.d, sizeof *t->o, err);
    if (!st) st = kv_array(&t->lse, rows, sizeof *t->lse, err);
    if (!st) st = kv_array(&t->base_out, rows * t->l.d, sizeof *t->base_out, err);
    if (!st) st = kv_array(&t->base_mass, rows, sizeof *t->base_mass, err);
    if (!st) st = kv_array(&t->contested, sc->n_token, 1, err);
    if (!st) st = kv_array(&points, t->n_point, sizeof *points, err);
    if (!st) st = full_rows(t, err);
    if (!st && t->out->layer_error) st = reference(t, err);
    for (size_t i = 4; i < sc->n_cut && !st; i++) t->contested[i] = i + 32 < P;
    if (!st && (t->wanted >> KV_M_RECALL_CONTESTED & 1)) st = contested_total(t, err);
    for (size_t r = 0; r < t->plan->n_ranking && !st; r++) {
        size_t m = 0;
        for (size_t i = 0; i < t->n_point; i++)
            if (t->plan->ranking_of[t->point[i].spec] == r && !kv_schedule_used(t->plan, t->point[i].spec))
                points[m++] = i;
        for (size_t r0 = 0; r0 < n && m && !st; r0 += ROWS) {
            st = measure(t, r, points, m, r0, n - r0 < ROWS ? n - r0 : ROWS, err);
            if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
        }
    }
    for (size_t i = 0; i < t->n_point && !st && schedules; i++) {
        kv_schedule sch;
        if (!kv_schedule_used(t->plan, t->point[i].spec)) continue;
        st = kv_schedule_make(t->plan, t->point[i].spec, &t->point[i].c, t->point[i].counts, &t->l, &sch, err);
        if (!st) st = measure_schedule(t, i, &sch, err);
        if (!st) ledger(t, i, &sch);
        kv_schedule_free(&sch);
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    free(points), free(t->o), free(t->lse), free(t->base_out), free(t->base_mass), free(t->contested), free(t->ref);
    kv_layer_free(&t->l);
    return st;
}

typedef struct {
    task proto;
    kv_status *st;
    kv_error *err;
    void (*tick)(void *ctx, size_t done);
    void *ctx;
    atomic_size_t done;
} job;

static void run_task(void *ctx, size_t i)
{
    job *j = ctx;
    task t = j->proto;
    j->st[i] = kv_interrupted() ? kv_fail(&j->err[i], KV_EINTERRUPTED, "interrupted")
                                : layer_task(&t, (uint32_t)i, &j->err[i]);
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
