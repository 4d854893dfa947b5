/* account.c - rows become sums. */
#include "sim/measure.h"

#include <math.h>
#include <stdlib.h>

#define NATS_CAP     20.0
#define LOST_NOTHING 1e-6 /* 1 - R below this: the distance of the means is noise */

kv_head_sums *kv_measure_sums(const kv_measure *m, size_t point, uint32_t head)
{
    return &m->out->head[(point * m->plan->scene->n_evict + m->l.order) * m->l.n_q_head + head];
}

/* One row of one head; NAN = undefined. */
typedef struct {
    double v[KV_STEP_MEANS];
    double R, prompt;
} row_values;

static double nats_of(double share)
{
    return share > 0 ? fmin(-log(share), NATS_CAP) : NATS_CAP;
}

static row_values values_of(const kv_measure *m, const kv_kept_rows *x, size_t i)
{
    size_t at = x->head * (size_t)m->plan->scene->n_row + x->r0 + i;
    double mass = x->mass[i], base = m->base_mass[at];
    row_values w = {.R = x->whole || mass > 1 ? 1 : mass < 0 ? 0 : mass, .prompt = NAN};
    for (int k = 0; k < KV_STEP_MEANS; k++) w.v[k] = NAN;
    w.v[KV_STEP_RECALL] = w.R;
    w.v[KV_STEP_NATS] = nats_of(w.R);
    if (base < 1 - 1e-9) {
        double share = x->whole ? 1 : (w.R - x->after[i]) / (1 - base);
        w.v[KV_STEP_PROMPT] = w.prompt = share < 0 ? 0 : share > 1 ? 1 : share;
        w.v[KV_STEP_NATS_PROMPT] = nats_of(w.prompt);
    }
    if (x->contested && m->contested_mass[at] > 0)
        w.v[KV_STEP_CONTESTED] = x->whole ? 1 : fmin(x->contested[i] / m->contested_mass[at], 1);
    if (x->variation) w.v[KV_STEP_VARIATION] = x->variation[i];
    if (!x->error2) return w;
    double norm = m->norm_o[at], rel = norm > 0 && !x->whole ? sqrt(x->error2[i]) / norm : 0;
    /* o . o_hat and ||o_hat||^2 from what is there: o_hat = o - (o - o_hat) */
    double hat2 = norm * norm - 2 * x->dot[i] + x->error2[i];
    w.v[KV_STEP_HEAD_ERROR] = rel;
    w.v[KV_STEP_COSINE] = x->whole ? 1 : norm > 0 && hat2 > 0 ? (norm * norm - x->dot[i]) / (norm * sqrt(hat2)) : 0;
    if (w.v[KV_STEP_COSINE] > 1) w.v[KV_STEP_COSINE] = 1;
    if (1 - w.R > LOST_NOTHING) w.v[KV_STEP_DISTANCE] = rel / (1 - w.R);
    return w;
}

/* Row i of x into s. */
static void add(const kv_kept_rows *x, size_t i, const row_values *w, kv_head_sums *s)
{
    s->recall += w->R;
    if (!s->n++ || w->R < s->recall_min) s->recall_min = w->R;
    s->n_capped += w->v[KV_STEP_NATS] >= NATS_CAP;
    s->nats += w->v[KV_STEP_NATS];
    if (x->contested) s->contested_kept += x->contested[i];
    s->n_whole += x->whole;
    if (!isnan(w->prompt)) {
        s->recall_prompt += w->prompt, s->nats_prompt += w->v[KV_STEP_NATS_PROMPT];
        if (!s->n_prompt++ || w->prompt < s->prompt_min) s->prompt_min = w->prompt;
    }
    if (x->variation) s->total_variation += x->variation[i];
    if (!x->error2) return;
    s->head_error += w->v[KV_STEP_HEAD_ERROR], s->cosine += w->v[KV_STEP_COSINE];
    if (!isnan(w->v[KV_STEP_DISTANCE])) s->value_distance += w->v[KV_STEP_DISTANCE], s->n_distance++;
}

static void lowest(kv_step_sums *s, int kind, double x)
{
    if (isnan(x)) return;
    if (!s->n[kind]++ || x < s->v[kind]) s->v[kind] = x;
}

static void add_step(kv_step_sums *s, const row_values *w)
{
    for (int k = 0; k < KV_STEP_MEANS; k++)
        if (!isnan(w->v[k])) s->v[k] += w->v[k], s->n[k]++;
    lowest(s, KV_STEP_MIN, w->R), lowest(s, KV_STEP_PROMPT_MIN, w->prompt);
}

void kv_steps_merge(kv_step_sums *all, const kv_step_sums *layer, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        for (int k = 0; k < KV_STEP_MEANS; k++)
            if (layer[i].n[k]) all[i].v[k] += layer[i].v[k] / layer[i].n[k], all[i].n[k]++;
        for (int k = KV_STEP_MIN; k <= KV_STEP_PROMPT_MIN; k++)
            if (layer[i].n[k]) lowest(&all[i], k, layer[i].v[k]);
        all[i].v[KV_STEP_SQUARE] += layer[i].v[KV_STEP_SQUARE], all[i].n[KV_STEP_SQUARE] += layer[i].n[KV_STEP_SQUARE];
    }
}

void kv_account_rows(kv_measure *m, const size_t *point, size_t n_point, const kv_kept_rows *x)
{
    kv_head_sums *first = kv_measure_sums(m, point[0], x->head);
    for (size_t i = 0; i < x->n; i++) {
        row_values w = values_of(m, x, i);
        add(x, i, &w, first);
        for (size_t p = 0; p < n_point && m->step; p++)
            add_step(&m->step[point[p] * m->plan->scene->n_row + x->r0 + i], &w);
    }
    for (size_t p = 1; p < n_point; p++) *kv_measure_sums(m, point[p], x->head) = *first;
}

static void add_norms(kv_measure *m, size_t point, size_t r0, size_t n, const double *norm)
{
    double *sum = &m->out->layer_error[point * m->plan->scene->n_evict + m->l.order];
    for (size_t r = 0; r < n; r++) {
        double rel = m->ref[r0 + r] > 0 ? norm[r] / m->ref[r0 + r] : 0;
        *sum += rel;
        if (m->step) m->step[point * m->plan->scene->n_row + r0 + r].v[KV_STEP_SQUARE] += rel * rel;
    }
}

void kv_account_norms(kv_measure *m, size_t point, size_t r0, size_t n, const float *norm)
{
    double scaled[KV_LAYER_ROWS], factor = m->plan->scene->info->out_scale;
    for (size_t r = 0; r < n; r++) scaled[r] = (double)norm[r] * (factor > 0 ? factor : 1);
    add_norms(m, point, r0, n, scaled);
}

/* o_hat = o - diff */
static void give_outputs(const kv_measure *m, size_t point, size_t r0, size_t n, const float *diff)
{
    size_t d = m->l.d, Hq = m->l.n_q_head, T = m->plan->scene->n_row;
    for (size_t r = 0; r < n; r++)
        for (size_t h = 0; h < Hq; h++, diff += d) {
            const float *o = m->o + (h * T + r0 + r) * d;
            float *to = m->hat + (((r0 + r) * (m->n_point + 1) + 1 + point) * Hq + h) * d;
            for (size_t j = 0; j < d; j++) to[j] = o[j] - diff[j];
        }
}

kv_status kv_account_layer(kv_measure *m, const size_t *point, size_t n_point, size_t r0, size_t n, const float *diff,
                           kv_error *err)
{
    size_t all = n * m->l.n_q_head * m->l.d;
    double *norm = NULL;
    kv_status st = kv_array(&norm, n, sizeof *norm, err);
    for (size_t i = 0; i < n_point && m->hat; i++) give_outputs(m, point[i], r0, n, diff + i * all);
    /* point by point: a row's place in a product decides its last bits, and must not depend on the other points */
    for (size_t i = 0; i < n_point && m->out->layer_error && !st; i++) {
        st = kv_measure_project(m, r0, n, diff + i * all, norm, err);
        if (!st) add_norms(m, point[i], r0, n, norm);
    }
    free(norm);
    return st;
}
