/* closed.c - the pass itself: which points need a branch, the model's rows, and logits into losses. */
#include "sim/closed.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/math.h"
#include "kernels/parallel.h"
#include "sim/closed_attend.h"
#include "sim/closed_device.h"
#include "traces/cli.h"

enum {
    ROWS_MAX = 16384, /* rows of all branches in flight: bounds the activations; weights are read once per group */
    TOP = 5
};

/* What the full cache says at one position. */
typedef struct {
    float *p; /* [n_vocab] probabilities */
    float nll;
    double lse, sum, dot; /* sum of p (1 but for rounding), sum of p * logit */
    uint32_t top[TOP];
} reference;

typedef struct {
    const kv_plan *plan;
    kv_branches b;
    size_t *point_of; /* [n_branch - 1] index of the point a branch stands for */
    const uint32_t *token;
    uint32_t n_vocab, n_pred;
    reference ref;
    kv_closed *out;
    double noise;          /* sum over predictions, of this group */
    const float *recorded; /* [n_pred] nll in the trace, or NULL */
    uint32_t layers_done, n_layer;
    size_t group, n_group;
    void (*tick)(void *, double);
    void *tick_ctx;
} pass;

kv_status kv_closed_check(kv_model *m, const kv_scene *sc, kv_error *err)
{
    const kv_trace_info *in = sc->info;
    const char *path = kv_trace_path(sc->trace);
    if (in->n_layer != in->n_layer_model || in->n_layer != m->desc.n_layer)
        return kv_fail(err, KV_EMISUSE, "trace '%s' holds %u of the model's %u layers: --model needs all of them", path,
                       in->n_layer, m->desc.n_layer);
    if (!in->model_sha256)
        return kv_fail(err, KV_EMISUSE, "trace '%s' does not say which model it is from: --model cannot check it",
                       path);
    kv_status st = *m->desc.sha256 ? KV_OK : kv_model_hash(m, err);
    if (!st && strcmp(m->desc.sha256, in->model_sha256))
        st = kv_fail(err, KV_EMISUSE,
                     "trace '%s' was captured with another model: '%s' (%.12s), --model is '%s' (%.12s)", path,
                     in->model ? in->model : "?", in->model_sha256, m->desc.name, m->desc.sha256);
    if (!st && sc->n_row < 1)
        st = kv_fail(err, KV_EMISSING,
                     "trace '%s' has no decoded tokens: capture with --decode N, or use --decode-rows N", path);
    return st;
}

/* ------------------------------------------------------------------------------------------------ logits */
/* The TOP largest, descending, lower index first among equals. */
static void top_of(const float *l, uint32_t n, uint32_t top[TOP])
{
    uint32_t have = 0;
    for (uint32_t j = 0; j < n; j++) {
        if (have == TOP && !(l[j] > l[top[TOP - 1]])) continue;
        uint32_t k = have < TOP ? have++ : TOP - 1;
        for (; k && l[j] > l[top[k - 1]]; k--) top[k] = top[k - 1];
        top[k] = j;
    }
}

static void set_reference(pass *p, const float *logit, uint32_t target)
{
    reference *r = &p->ref;
    kv_nll_rows(1, p->n_vocab, logit, &target, &r->nll);
    r->lse = (double)r->nll + (double)logit[target];
    r->sum = r->dot = 0;
    for (uint32_t j = 0; j < p->n_vocab; j++) {
        r->p[j] = kv_expf((float)((double)logit[j] - r->lse));
        r->sum += (double)r->p[j], r->dot += (double)r->p[j] * (double)logit[j];
    }
    top_of(logit, p->n_vocab, r->top);
}

typedef struct {
    pass *p;
    const float *logits;
    uint32_t pred, target, first; /* prediction; first branch in these rows */
} logit_job;

static void logit_task(void *ctx, size_t i)
{
    const logit_job *j = ctx;
    pass *p = j->p;
    const reference *ref = &p->ref;
    uint32_t branch = j->first + (uint32_t)i, top[TOP], common = 0, target = j->target;
    if (!branch) return;
    const float *l = j->logits + i * p->n_vocab;
    size_t at = p->point_of[branch - 1] * p->n_pred + j->pred;
    double lane[8] = {0}, dot = 0;
    float nll;
    kv_nll_rows(1, p->n_vocab, l, &target, &nll);
    for (uint32_t k = 0; k < p->n_vocab; k++) lane[k & 7] += (double)ref->p[k] * (double)l[k];
    for (int k = 0; k < 8; k++) dot += lane[k];
    double kl = (ref->dot - dot) / ref->sum + ((double)nll + (double)l[target]) - ref->lse;
    top_of(l, p->n_vocab, top);
    for (int a = 0; a < TOP; a++)
        for (int b = 0; b < TOP; b++) common += top[a] == ref->top[b];
    p->out->delta_nll[at] = nll - ref->nll;
    p->out->kl[at] = kl > 0 ? (float)kl : 0;
    p->out->top1[at] = top[0] == ref->top[0];
    p->out->top5[at] = (float)common / TOP;
}

/* Rows come position by position, the full cache's branch first in each. */
static kv_status on_logits(void *ctx, uint32_t row0, uint32_t n_row, const float *logits, kv_error *err)
{
    pass *p = ctx;
    const kv_scene *sc = p->plan->scene;
    (void)err;
    for (uint32_t i = 0; i < n_row;) {
        uint32_t r = (row0 + i) / p->b.n_branch, branch = (row0 + i) % p->b.n_branch, position = sc->n_cut + r;
        uint32_t n = p->b.n_branch - branch < n_row - i ? p->b.n_branch - branch : n_row - i;
        if (position + 1 >= sc->n_prompt && position + 1 < sc->n_token) { /* predicts a decoded token */
            logit_job j = {p, logits + (size_t)i * p->n_vocab, position + 1 - sc->n_prompt, p->token[position + 1],
                           branch};
            if (!branch) {
                set_reference(p, j.logits, j.target);
                if (p->recorded) p->noise += fabs((double)p->ref.nll - (double)p->recorded[j.pred]);
            }
            kv_parallel(n, p->b.threads, logit_task, &j);
        }
        i += n;
    }
    return KV_OK;
}

static kv_status on_attend(void *ctx, const kv_attn_view *a, bool *done, kv_error *err)
{
    pass *p = ctx;
    kv_status st = kv_branches_attend(&p->b, a, err);
    *done = !st;
    p->layers_done++;
    if (p->tick) p->tick(p->tick_ctx, ((double)p->group + (double)p->layers_done / p->n_layer) / (double)p->n_group);
    return st;
}

/* ------------------------------------------------------------------------------------------------ branches */
/* Points whose sets are those of the full cache, or of an earlier point, share its branch: same[i] = -1 = full, i = its
 * own, else the earlier one. */
static kv_status share_branches(const kv_plan *p, const kv_point *point, size_t n, int64_t *same, kv_error *err)
{
    uint64_t *print = NULL;
    kv_status st = kv_array(&print, n, sizeof *print, err);
    for (size_t i = 0; i < n && !st; i++) {
        const kv_ranking *rk = &p->ranking[p->ranking_of[point[i].spec]];
        bool whole = true;
        same[i] = (int64_t)i;
        if (kv_schedule_used(p, point[i].spec)) continue;
        for (size_t k = 0; k < (size_t)p->scene->n_evict * rk->n_unit; k++)
            whole &= point[i].counts[k] == p->scene->n_cut;
        print[i] = kv_plan_fingerprint(p, point[i].spec, point[i].counts);
        if (whole) same[i] = -1;
        for (size_t k = 0; k < i && same[i] == (int64_t)i; k++)
            if (same[k] == (int64_t)k && !kv_schedule_used(p, point[k].spec) && print[k] == print[i] &&
                p->ranking[p->ranking_of[point[k].spec]].n_unit == rk->n_unit)
                same[i] = (int64_t)k;
    }
    free(print);
    return st;
}

static kv_status run_group(pass *p, kv_engine *e, const uint32_t *token, kv_error *err)
{
    const kv_scene *sc = p->plan->scene;
    kv_engine_hook hook = {.ctx = p, .attend = on_attend, .logits = on_logits};
    uint32_t nb = p->b.n_branch, R = p->b.n_row, *all = NULL;
    size_t n_error = (size_t)(nb - 1) * sc->n_evict;
    double *head = NULL, *stream = NULL;
    kv_status st = kv_array(&all, (size_t)R * nb, sizeof *all, err);
    if (!st) st = kv_array(&head, n_error + 1, sizeof *head, err);
    if (!st) st = kv_array(&stream, n_error + 1, sizeof *stream, err);
    for (size_t i = 0; i < (size_t)R * nb && !st; i++) all[i] = token[sc->n_cut + i / nb];
    p->b.head_error = head, p->b.stream_error = stream;
    p->layers_done = 0, p->noise = 0;
    if (!st) st = kv_engine_branches(e, all, sc->n_cut, R, nb, &hook, err);
    for (uint32_t b = 0; b + 1 < nb && !st; b++)
        for (uint32_t l = 0; l < sc->n_evict; l++) {
            p->out->head_error[p->point_of[b] * sc->n_evict + l] = head[(size_t)b * sc->n_evict + l];
            p->out->stream_error[p->point_of[b] * sc->n_evict + l] = stream[(size_t)b * sc->n_evict + l];
        }
    free(all), free(head), free(stream);
    return st;
}

/* ------------------------------------------------------------------------------------------------ on a device */
kv_status kv_closed_on_device(const kv_spec *s, kv_error *err)
{
    if (kv_schedule_fixed(s)) return KV_OK;
    return kv_fail(
        err, KV_EUNSUPPORTED,
        "policy '%s' decides row by row, which the closed loop on a GPU does not follow: leave it out, or run "
        "it with --backend cpu",
        s->canonical);
}

static kv_status check_point(const kv_plan *p, size_t spec, kv_error *err)
{
    const kv_spec *s = &p->spec[spec];
    if (s->file && kv_schedule_used(p, spec))
        return kv_fail(
            err, KV_EUNSUPPORTED,
            "mask '%s' changes from row to row, which the closed loop on a GPU does not follow: use --backend "
            "cpu",
            s->file);
    return kv_closed_on_device(s, err);
}

static void on_layer(void *ctx, uint32_t layer)
{
    const pass *p = ctx;
    if (p->tick) p->tick(p->tick_ctx, ((double)p->group + (double)layer / p->n_layer) / (double)p->n_group);
}

/* Mean of one branch's rows from `skip` on. */
static double row_mean(const float *v, uint32_t skip, uint32_t n)
{
    double sum = 0;
    for (uint32_t r = skip; r < n; r++) sum += (double)v[r];
    return sum / (n - skip);
}

static void take_branch(pass *p, const kv_branch_losses *r, uint32_t branch)
{
    const kv_scene *sc = p->plan->scene;
    uint32_t R = p->b.n_row, nb = p->b.n_branch, skip = sc->row_first - sc->n_cut;
    size_t point = p->point_of[branch - 1];
    for (uint32_t row = 0; row + 1 < R; row++) {
        const float *v = r->loss + ((size_t)branch * R + row) * 4;
        if (sc->n_cut + row + 1 < sc->n_prompt) continue; /* predicts a token of the question */
        size_t at = point * p->n_pred + (sc->n_cut + row + 1 - sc->n_prompt);
        p->out->delta_nll[at] = v[0], p->out->kl[at] = v[1], p->out->top1[at] = v[2], p->out->top5[at] = v[3];
    }
    for (uint32_t l = 0; l < sc->n_evict; l++) {
        size_t from = ((size_t)sc->evict[l] * nb + branch) * R;
        p->out->head_error[point * sc->n_evict + l] = row_mean(r->head + from, skip, R);
        p->out->stream_error[point * sc->n_evict + l] = row_mean(r->stream + from, skip, R);
    }
}

static kv_status run_group_device(pass *p, kv_engine *e, kv_error *err)
{
    const kv_scene *sc = p->plan->scene;
    kv_branch_losses r = {0};
    uint32_t R = p->b.n_row, nb = p->b.n_branch;
    size_t rows = (size_t)R * nb;
    kv_device_branches b = {p->plan, p->b.point, nb, R, p->token, p->b.threads, on_layer, p};
    kv_status st = kv_array(&r.nll, R, sizeof *r.nll, err);
    if (!st) st = kv_array(&r.loss, rows * 4, sizeof *r.loss, err);
    if (!st) st = kv_array(&r.head, rows * p->n_layer, sizeof *r.head, err);
    if (!st) st = kv_array(&r.stream, rows * p->n_layer, sizeof *r.stream, err);
    if (!st) st = kv_closed_compare(e, &b, &r, err);
    p->noise = 0;
    for (uint32_t row = 0; row + 1 < R && p->recorded && !st; row++)
        if (sc->n_cut + row + 1 >= sc->n_prompt)
            p->noise += fabs((double)r.nll[row] - (double)p->recorded[sc->n_cut + row + 1 - sc->n_prompt]);
    for (uint32_t branch = 1; branch < nb && !st; branch++) take_branch(p, &r, branch);
    free(r.nll), free(r.loss), free(r.head), free(r.stream);
    return st;
}

static kv_status open_device(kv_closed_device *d, const kv_model *m, const kv_engine_options *o, kv_error *err)
{
    if (d->engine && d->dtype == o->dtype) return kv_engine_resize(d->engine, o->capacity, err);
    kv_closed_device_close(d);
    kv_engine_options own = *o;
    d->dtype = o->dtype, own.chunk = d->chunk;
    return kv_engine_open_cuda(m, &own, &d->engine, err);
}

void kv_closed_device_close(kv_closed_device *d)
{
    kv_engine_close(d->engine);
    d->engine = NULL;
}

/* ------------------------------------------------------------------------------------------------ all together */
static kv_status arrays(kv_closed *c, size_t n, size_t n_evict, kv_error *err)
{
    size_t m = 0;
    kv_status st = kv_mul(n, c->n_pred, &m) ? KV_OK : kv_fail(err, KV_ENOMEM, "too many predictions");
    if (!st) st = kv_array(&c->delta_nll, m, sizeof(float), err);
    if (!st) st = kv_array(&c->kl, m, sizeof(float), err);
    if (!st) st = kv_array(&c->top1, m, sizeof(float), err);
    if (!st) st = kv_array(&c->top5, m, sizeof(float), err);
    if (!st) st = kv_array(&c->head_error, n * n_evict, sizeof(double), err);
    if (!st) st = kv_array(&c->stream_error, n * n_evict, sizeof(double), err);
    for (size_t i = 0; i < m && !st; i++) c->top1[i] = c->top5[i] = 1; /* nothing changed until it is seen */
    return st;
}

kv_status kv_closed_run(const kv_plan *p, const kv_point *point, size_t n_point, const kv_model *m, uint32_t threads,
                        kv_closed_device *device, void (*tick)(void *ctx, double done), void *ctx, kv_closed *out,
                        kv_error *err)
{
    const kv_scene *sc = p->scene;
    kv_engine *e = NULL;
    int64_t *same = NULL;
    size_t *own = NULL, n_own = 0, each;
    uint32_t *token = NULL, R = sc->n_token - sc->n_cut;
    float *recorded = NULL;
    const kv_point **branch = NULL;
    double began;
    pass ps = {.plan = p, .out = out, .n_layer = m->desc.n_layer, .n_vocab = m->desc.n_vocab, .tick = tick};
    kv_engine_options o = {.dtype = sc->info->dtype, .threads = threads, .capacity = sc->n_token, .no_cache = true};
    *out = (kv_closed){.n_point = n_point, .n_pred = sc->n_row, .noise = NAN};
    ps.n_pred = out->n_pred, ps.tick_ctx = ctx;
    kv_status st = arrays(out, n_point, sc->n_evict, err);
    if (!st) st = kv_array(&same, n_point + 1, sizeof *same, err);
    if (!st) st = kv_array(&own, n_point + 1, sizeof *own, err);
    if (!st) st = kv_array(&branch, n_point + 1, sizeof *branch, err);
    if (!st) st = kv_array(&token, sc->n_token, sizeof *token, err);
    if (!st) st = kv_array(&ps.ref.p, ps.n_vocab, sizeof(float), err);
    if (!st) st = kv_trace_read_u32(sc->trace, KV_S_TOKENS, 0, sc->n_token, token, err);
    if (!st && kv_trace_has(sc->trace, KV_S_NLL, 0, 0, sc->n_prompt - 1, sc->n_token - 1)) {
        st = kv_array(&recorded, sc->n_row, sizeof *recorded, err);
        if (!st) st = kv_trace_read_f32(sc->trace, KV_S_NLL, 0, 0, sc->n_prompt - 1, sc->n_token - 1, recorded, err);
    }
    if (!st) st = share_branches(p, point, n_point, same, err);
    for (size_t i = 0; i < n_point && !st; i++)
        if (same[i] == (int64_t)i) own[n_own] = i, branch[n_own++] = &point[i];
    for (size_t i = 0; i < n_own && device && !st; i++) st = check_point(p, branch[i]->spec, err);
    if (!st) st = device ? open_device(device, m, &o, err) : kv_engine_open_cpu(m, &o, &e, err);
    each = R < ROWS_MAX / 2 ? ROWS_MAX / R - 1 : 1; /* points a group, beside the full cache */
    if (device && !st) each = kv_engine_compare_room(device->engine, sc->n_cut, R) - 1;
    ps.n_group = (n_own + each - 1) / each;
    if (!n_own) ps.n_group = 1; /* the full cache alone, for the noise */
    ps.token = token, ps.recorded = recorded;
    out->n_branch = (uint32_t)n_own + 1;
    began = kv_seconds(CLOCK_MONOTONIC);
    for (ps.group = 0; ps.group < ps.n_group && !st; ps.group++) {
        size_t first = ps.group * each, n = n_own - first < each ? n_own - first : each;
        ps.b = (kv_branches){p, branch + first, (uint32_t)n + 1, R, threads, NULL, NULL};
        ps.point_of = own + first;
        st = device ? run_group_device(&ps, device->engine, err) : run_group(&ps, e, token, err);
        /* The first prediction comes from the prompt's last row, which is ours only behind a cut at the context. */
        uint32_t run = sc->n_row - (sc->n_cut == sc->n_prompt);
        if (!st && !ps.group && recorded && run) out->noise = ps.noise / run;
    }
    out->wall_s = kv_seconds(CLOCK_MONOTONIC) - began;
    for (size_t i = 0; i < n_point && !st; i++) {
        if (same[i] < 0 || same[i] == (int64_t)i) continue;
        size_t from = (size_t)same[i] * out->n_pred, to = i * out->n_pred, bytes = out->n_pred * sizeof(float);
        memcpy(out->delta_nll + to, out->delta_nll + from, bytes), memcpy(out->kl + to, out->kl + from, bytes);
        memcpy(out->top1 + to, out->top1 + from, bytes), memcpy(out->top5 + to, out->top5 + from, bytes);
        memcpy(out->head_error + i * sc->n_evict, out->head_error + (size_t)same[i] * sc->n_evict,
               sc->n_evict * sizeof(double));
        memcpy(out->stream_error + i * sc->n_evict, out->stream_error + (size_t)same[i] * sc->n_evict,
               sc->n_evict * sizeof(double));
    }
    kv_engine_close(e);
    free(same), free(own), free(branch), free(token), free(recorded), free(ps.ref.p);
    if (st) kv_closed_free(out);
    return st;
}

static kv_value mean(kv_metric_id id, const float *v, uint32_t n)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += (double)v[i];
    return (kv_value){id, -1, -1, -1, sum / n, n};
}

size_t kv_closed_values(const kv_closed *c, size_t i, const uint32_t *number, uint32_t n_layer, kv_metric_set wanted,
                        int detail, kv_value *out)
{
    const struct {
        kv_metric_id id;
        const float *v;
    } row[] = {
        {KV_M_DELTA_NLL, c->delta_nll}, {KV_M_KL, c->kl}, {KV_M_TOP1_AGREE, c->top1}, {KV_M_TOP5_OVERLAP, c->top5}};
    const struct {
        kv_metric_id id;
        const double *v;
    } layer[] = {{KV_M_CLOSED_HEAD_ERROR, c->head_error}, {KV_M_STREAM_ERROR, c->stream_error}};
    size_t n = 0;
    for (int k = 0; k < 4; k++) {
        const float *v = row[k].v + i * c->n_pred;
        if (!(wanted >> row[k].id & 1)) continue;
        out[n++] = mean(row[k].id, v, c->n_pred);
        for (uint32_t t = 0; t < c->n_pred && detail >= KV_DETAIL_STEP; t++)
            out[n++] = (kv_value){row[k].id, -1, -1, (int32_t)t, (double)v[t], 1};
    }
    for (int k = 0; k < 2; k++) {
        if (!(wanted >> layer[k].id & 1)) continue;
        size_t all = n++;
        double sum = 0;
        for (uint32_t l = 0; l < n_layer; l++) {
            double v = layer[k].v[i * n_layer + l];
            sum += v;
            if (detail >= KV_DETAIL_LAYER) out[n++] = (kv_value){layer[k].id, (int32_t)number[l], -1, -1, v, c->n_pred};
        }
        out[all] = (kv_value){layer[k].id, -1, -1, -1, sum / n_layer, n_layer};
    }
    if (wanted >> KV_M_NLL_NOISE & 1) out[n++] = (kv_value){KV_M_NLL_NOISE, -1, -1, -1, c->noise, c->n_pred};
    return n;
}

void kv_closed_free(kv_closed *c)
{
    free(c->delta_nll), free(c->kl), free(c->top1), free(c->top5), free(c->head_error), free(c->stream_error);
    *c = (kv_closed){0};
}
