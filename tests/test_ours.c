/* test_ours.c - DefensiveKV, Q-Filters, DuoAttention, SqueezeAttention, leave-one-out and the .ours rows against brute
 * force on seeded tiny traces of odd shapes. The twins are plain double loops over whole attention rows (twins.h). */
#include <stdarg.h>
#include <unistd.h>

#include "sim/select.h"
#include "tests/twins.h"
#include "traces/npy.h"

static char dir[32] = "/dev/shm/kvtest.XXXXXX";
static char *trace_path, *table_path;
static float table[8 * 32 * 8]; /* what table_path holds */

/* ------------------------------------------------------------------------------------- scores, [unit][L] of a layer */
static uint32_t before_window(const kv_world *w, const kv_spec *s)
{
    return w->L > s->window ? w->L - s->window : 0;
}

static void smooth(const kv_spec *s, int n, double *y)
{
    double out[128];
    int half = (int)s->kernel / 2;
    if (s->pooling == KV_POOL_NONE) return;
    for (int i = 0; i < n; i++) {
        double sum = 0, max = 0;
        for (int j = i - half; j <= i + half; j++)
            if (j >= 0 && j < n) sum += y[j], max = fmax(max, y[j]);
        out[i] = s->pooling == KV_POOL_AVG ? sum / s->kernel : max;
    }
    memcpy(y, out, (size_t)n * sizeof *y);
}

static void max_clamp(const kv_world *w, const kv_spec *s, size_t l, double *x)
{
    uint32_t n = before_window(w, s);
    for (uint32_t u = 0; u < kv_units(w, s->granularity); u++) {
        uint32_t first, count = kv_heads_of(w, s->granularity, u, &first);
        double *y = x + (size_t)u * w->L, mean = 0;
        for (size_t i = 0; i < w->L; i++) y[i] = 0;
        for (size_t h = first; h < first + count; h++)
            for (size_t r = n; r < w->L; r++) {
                double row[128], was = 0, is = 0;
                memcpy(row, kv_row(w, l, h, r), n * sizeof *row);
                for (size_t i = 0; i < n; i++) was += row[i];
                smooth(s, (int)n, row);
                for (size_t i = 0; i < n; i++) is += row[i];
                for (size_t i = 0; i < n; i++) y[i] = fmax(y[i], row[i] * was / is);
            }
        for (size_t i = 0; i < n; i++) mean += y[i] / n;
        for (size_t i = 0; i < n; i++) y[i] = y[i] > mean ? y[i] : mean;
    }
}

/* Mean (+ gamma variance) of the window's rows, smoothed, mean over the heads of a unit. */
static void window_mean(const kv_world *w, const kv_spec *s, size_t l, double *x)
{
    uint32_t n = before_window(w, s);
    for (uint32_t u = 0; u < kv_units(w, s->granularity); u++) {
        uint32_t first, count = kv_heads_of(w, s->granularity, u, &first);
        double *y = x + (size_t)u * w->L;
        for (size_t i = 0; i < w->L; i++) y[i] = 0;
        for (size_t h = first; h < first + count; h++)
            for (size_t i = 0; i < n; i++) {
                double mean = 0, var = 0;
                for (size_t r = n; r < w->L; r++) mean += kv_row(w, l, h, r)[i] / s->window;
                for (size_t r = n; r < w->L; r++) var += pow(kv_row(w, l, h, r)[i] - mean, 2) / (s->window - 1.0);
                y[i] += (s->row_reduce == KV_ROWS_MEAN ? mean : mean + s->gamma * var) / count;
            }
        smooth(s, (int)n, y);
    }
}

static void filters(const kv_world *w, const kv_spec *s, size_t l, double *x)
{
    for (uint32_t u = 0; u < kv_units(w, s->granularity); u++) {
        uint32_t first, count = kv_heads_of(w, s->granularity, u, &first);
        for (size_t i = 0; i < w->L; i++) {
            double sum = 0;
            for (size_t h = first; h < first + count; h++)
                for (size_t j = 0; j < w->d; j++)
                    sum += (double)table[(l * w->U + h / w->g) * w->d + j] * kv_key(w, l, h / w->g, i)[j] / count;
            x[u * w->L + i] = -sum;
        }
    }
}

/* Mean over query heads of the L1 norm of the value behind W_O. */
static double projected(const kv_world *w, const kv_spec *s, size_t l, uint32_t u, size_t i)
{
    uint32_t first, count = kv_heads_of(w, s->granularity, u, &first);
    size_t width = (size_t)w->H * w->d, g = count < w->g ? w->g : count; /* a query head has its KV head's mean */
    double sum = 0;
    first = first / w->g * w->g;
    for (size_t h = first; h < first + g; h++)
        for (size_t o = 0; o < width; o++) {
            double out = 0;
            for (size_t j = 0; j < w->d; j++)
                out += (double)w->t.wo[(l * width + o) * width + h * w->d + j] * kv_value_at(w, l, h / w->g, i)[j];
            sum += fabs(out) / (double)g;
        }
    return sum;
}

/* Error of the window's mean row when position i alone is left out and the rest renormalised, mean over the heads of
 * a unit; and the mean attention. */
static double left_out(const kv_world *w, const kv_spec *s, size_t l, uint32_t u, size_t i, double *attention)
{
    uint32_t first, count = kv_heads_of(w, s->granularity, u, &first), n = before_window(w, s), rows = w->L - n;
    double error = 0;
    *attention = 0;
    for (size_t h = first; h < first + count; h++) {
        double with[16] = {0}, without[16] = {0}, rest = 0, own = 0, e2 = 0;
        for (size_t k = 0; k < w->L; k++) {
            double a = 0;
            for (size_t r = n; r < w->L; r++) a += kv_row(w, l, h, r)[k] / rows;
            *(k == i ? &own : &rest) += a;
            for (size_t j = 0; j < w->d; j++) {
                with[j] += a * kv_value_at(w, l, h / w->g, k)[j];
                if (k != i) without[j] += a * kv_value_at(w, l, h / w->g, k)[j];
            }
        }
        for (size_t j = 0; j < w->d; j++) e2 += pow(with[j] - without[j] / rest, 2);
        if (rest < 1e-3) kv_gap = 0; /* 1 - a in floats */
        error += sqrt(e2) / count, *attention += own / count;
    }
    return error;
}

static void scores_of(const kv_world *w, const kv_spec *s, size_t l, double *x)
{
    const char *name = kv_scorers[s->scorer]->name;
    uint32_t U = kv_units(w, s->granularity), n = before_window(w, s);
    if (!strcmp(name, "maxclamp"))
        max_clamp(w, s, l, x);
    else if (!strcmp(name, "window"))
        window_mean(w, s, l, x);
    else if (!strcmp(name, "qfilter"))
        filters(w, s, l, x);
    else
        for (size_t k = 0; k < (size_t)U * w->L; k++) x[k] = k % w->L < s->sinks ? 1e6 : (double)(k % w->L);
    for (size_t i = 0; i < n && s->value; i++) {
        double all = 0;
        for (uint32_t u = 0; u < U && s->value == KV_VALUE_WO_SHARE; u++) all += projected(w, s, l, u, i);
        for (uint32_t u = 0; u < U; u++) {
            double a = 1,
                   f = s->value == KV_VALUE_WO_SHARE ? projected(w, s, l, u, i) / all : left_out(w, s, l, u, i, &a);
            x[u * w->L + i] *= f / a;
        }
    }
}

/* ------------------------------------------------------------------------------------- what stands first */
/* is[i]: the largest mean attentions of a unit whose sum stays below the threshold, at most `most`. */
static void mass_first(const kv_world *w, const kv_spec *s, size_t l, uint32_t u, int64_t most, int *key)
{
    uint32_t n = before_window(w, s), first, count = kv_heads_of(w, s->granularity, u, &first), order[128];
    double a[128] = {0}, all = 0, beta = 0, sum = 0;
    for (size_t h = 0; h < w->H; h++)
        for (size_t r = n; r < w->L; r++)
            for (size_t i = 0; i < w->L; i++) {
                bool counts = s->window_share == KV_SHARE_PAPER ? i >= n : i < n && i + s->window >= n;
                if (counts) beta += kv_row(w, l, h, r)[i] / (w->H * (double)s->window);
                if (i < n && h >= first && h < first + count)
                    a[i] += kv_row(w, l, h, r)[i] / (count * (double)s->window);
            }
    for (size_t i = 0; i < n; i++) all += a[i], key[i] = -1;
    kv_sorted(a, n, order);
    int64_t k = 0;
    for (; k < n; k++) {
        sum += a[order[k]] / all;
        kv_close_call(sum, 0.9 - beta);
        if (sum >= 0.9 - beta) break;
    }
    if (k == n) k = 0; /* never reached */
    if (k > most) k = most > 0 ? most : 0;
    if (k && k < n) kv_close_call(a[order[k - 1]], a[order[k]]);
    for (int64_t i = 0; i < k; i++) key[order[i]] = (int)i;
}

/* The best spans of a layer, each in the heads where its mean is largest. key [unit][L]. */
static void spans_first(const kv_world *w, const kv_spec *s, const double *x, double slots, int *key)
{
    uint32_t n = before_window(w, s), U = kv_units(w, s->granularity), len = s->chunk_length, m = (n + len - 1) / len;
    uint32_t cover = s->cover < U ? s->cover : U, order[128], heads[32];
    double mean[128][32] = {{0}}, best[128];
    int64_t most = slots > 0 ? (int64_t)(slots / (len * (double)cover)) : 0;
    for (uint32_t c = 0; c < m; c++) {
        uint32_t end = c * len + len < n ? c * len + len : n;
        best[c] = -INFINITY;
        for (uint32_t u = 0; u < U; u++) {
            for (uint32_t i = c * len; i < end; i++) mean[c][u] += x[u * w->L + i] / (end - c * len);
            best[c] = fmax(best[c], mean[c][u]);
        }
    }
    kv_sorted(best, m, order);
    if (most && most < m) kv_close_call(best[order[most - 1]], best[order[most]]);
    for (size_t k = 0; k < (size_t)U * w->L; k++) key[k] = -1;
    for (uint32_t k = 0; k < m && k < most; k++) {
        uint32_t c = order[k];
        if (k + 1 < m && k + 1 < most) kv_close_call(best[c], best[order[k + 1]]);
        kv_sorted(mean[c], U, heads);
        if (cover < U) kv_close_call(mean[c][heads[cover - 1]], mean[c][heads[cover]]);
        for (uint32_t j = 0; j < cover; j++)
            for (uint32_t i = c * len; i < n && i < c * len + len; i++) key[heads[j] * w->L + i] = (int)k;
    }
}

/* Positions of a unit: the window newest first, what stands first by (key, position), the rest by score; top[i] = list
 * entry i is one of the first two. */
static void list_of(const kv_world *w, const kv_spec *s, const double *x, const int *key, uint32_t *list, bool *top)
{
    uint32_t n = before_window(w, s), m = 0, order[128];
    for (uint32_t i = w->L; i-- > n;) list[m++] = i;
    for (int k = 0; k < (int)w->L; k++)
        for (uint32_t i = 0; i < n; i++)
            if (key[i] == k) list[m++] = i;
    for (uint32_t i = 0; i < w->L; i++) top[i] = i < m;
    kv_sorted(x, n, order);
    for (uint32_t k = 0; k < n; k++)
        if (key[order[k]] < 0) list[m++] = order[k];
}

static void first_kept(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, const double *x, bool *kept)
{
    uint32_t U = kv_units(w, s->granularity), n = before_window(w, s), L = w->L, NL = w->n_layer;
    bool pool = s->layers == KV_LAYERS_POOL, top[128];
    uint32_t given = pool                ? 0
                     : L - n < c->tokens ? L - n
                                         : c->tokens,
             *list = malloc((size_t)NL * U * L * sizeof *list);
    double *y = malloc((size_t)NL * U * L * sizeof *y);
    int *key = malloc((size_t)U * L * sizeof *key);
    bool *in = malloc((size_t)NL * U * L);
    double real = s->select == KV_SELECT_MASS ? c->real : c->tokens;
    uint64_t total = (uint64_t)(pool ? real * U * NL : real * U);
    for (size_t l = 0; l < NL; l++) {
        const double *xl = x + l * U * L;
        double max = -INFINITY;
        for (size_t u = 0; u < U; u++)
            for (size_t i = 0; i < n; i++) max = fmax(max, xl[u * L + i]);
        if (!n) max = 0;
        if (s->select == KV_SELECT_SPANS) spans_first(w, s, xl, s->alpha * ((double)c->tokens - (L - n)) * U, key);
        for (uint32_t u = 0; u < U; u++) {
            size_t at = (l * U + u) * L;
            if (s->select == KV_SELECT_MASS) mass_first(w, s, l, u, (int64_t)floor(c->real - s->window), key + u * L);
            list_of(w, s, xl + u * L, key + u * L, list + at, top);
            for (uint32_t k = 0; k < L; k++) y[at + k] = top[k] ? max : xl[u * L + list[at + k]];
            for (uint32_t k = 0; k < given; k++) y[at + k] = INFINITY;
        }
        if (!pool) kv_top(y + l * U * L, U * L, total, in + l * U * L);
    }
    if (pool) kv_top(y, NL * U * L, total, in);
    for (size_t k = 0; k < (size_t)NL * U * L; k++) kept[k / L * L + list[k]] = in[k];
    free(list), free(y), free(key), free(in);
}

/* ------------------------------------------------------------------------------------- heads and layers */
/* Heads become full one after the other while everything still fits. */
static void duo(const kv_world *w, const kv_spec *s, uint32_t C, uint32_t *n)
{
    uint32_t H = w->n_layer * w->U, order[8 * 32], least = s->sinks + s->recent < w->L ? s->sinks + s->recent : w->L;
    uint64_t total = (uint64_t)C * H, used;
    double key[8 * 32];
    for (uint32_t k = 0; k < H; k++) key[k] = table[k];
    kv_sorted(key, H, order);
    if (C < least) least = C;
    for (uint32_t k = 0; k < H; k++) n[k] = least;
    for (uint32_t k = 0; k < H; k++) {
        used = 0;
        for (uint32_t j = 0; j < H; j++) used += n[j];
        if (used - least + w->L > total) break;
        n[order[k]] = w->L;
    }
}

/* Every way to put the layers into three classes; the one of least squared distances. */
static void squeeze(const kv_world *w, const kv_spec *s, uint32_t C, int64_t *m)
{
    uint32_t NL = w->n_layer, ways = 1, distinct = 0, n3 = 0;
    double best = INFINITY, second = INFINITY, p = s->squeeze;
    bool similar[8] = {false};
    for (uint32_t l = 0; l < NL; l++) {
        bool seen = false;
        for (uint32_t k = 0; k < l; k++) seen |= table[k] == table[l];
        ways *= 3, distinct += !seen;
    }
    uint32_t classes = distinct < 3 ? distinct : 3;
    for (uint32_t way = 0; way < ways && classes > 1; way++) {
        double mean[3] = {0}, sum = 0;
        uint32_t size[3] = {0}, used = 0, of[8];
        bool parted = false;
        for (uint32_t l = 0, x = way; l < NL; l++, x /= 3) of[l] = x % 3, size[of[l]]++, mean[of[l]] += table[l];
        for (int k = 0; k < 3; k++) used += size[k] > 0, mean[k] /= size[k];
        for (uint32_t l = 0; l < NL; l++) {
            sum += pow(table[l] - mean[of[l]], 2);
            for (uint32_t k = 0; k < l; k++) parted |= table[k] == table[l] && of[k] != of[l];
        }
        if (used != classes || parted) continue;
        bool is[8];
        for (uint32_t l = 0; l < NL; l++) {
            is[l] = true;
            for (int k = 0; k < 3; k++) is[l] &= !size[k] || mean[of[l]] >= mean[k];
        }
        bool same = !memcmp(is, similar, NL);
        if (sum < best) {
            if (!same) second = best;
            best = sum, memcpy(similar, is, NL);
        } else if (!same && sum < second)
            second = sum;
    }
    if (second < INFINITY && second - best <= 1e-9 * second) kv_gap = 0; /* two ways as good */
    for (uint32_t l = 0; l < NL; l++) n3 += similar[l];
    for (uint32_t l = 0; l < NL; l++) m[l] = (int64_t)((similar[l] ? p : (NL - n3 * p) / (NL - n3)) * C);
}

/* Mean projected norm of a layer's values times the window's mean of 1 / ||x||. */
static double stream_factor(const kv_world *w, const kv_spec *s, size_t l)
{
    double norm = 0, inverse = 0;
    kv_spec per_kv = *s;
    per_kv.granularity = KV_GRAN_KV_HEAD;
    for (uint32_t u = 0; u < w->U; u++)
        for (size_t i = 0; i < w->L; i++) norm += projected(w, &per_kv, l, u, i) / (w->U * (double)w->L);
    uint32_t n = before_window(w, s);
    for (size_t r = n; r < w->L; r++) inverse += 1 / (double)w->t.xnorm[l * w->N + r] / (w->L - n);
    return norm * inverse;
}

/* What a policy keeps: kept [layer][unit][L] from scores x of the same shape. */
static void twin(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, const double *x, bool *kept)
{
    uint32_t U = kv_units(w, s->granularity), L = w->L, C = c->tokens, NL = w->n_layer, n[8 * 32];
    int64_t m[8];
    double *y = malloc((size_t)NL * U * L * sizeof *y), factor[8];
    for (uint32_t l = 0; l < NL; l++) factor[l] = s->layer_weight ? stream_factor(w, s, l) : 1;
    memset(kept, C >= L, (size_t)NL * U * L);
    for (uint32_t k = 0; k < NL * U; k++) n[k] = C < L ? C : L;
    for (size_t k = 0; k < (size_t)NL * U * L; k++) /* the window first, newest first */
        y[k] = k % L + s->window >= L ? 1e9 * (double)(1 + k % L) : x[k] * factor[k / L / U];
    if (C >= L) goto out;
    if (s->select == KV_SELECT_MASS || s->select == KV_SELECT_SPANS) {
        first_kept(w, s, c, x, kept);
        goto out;
    }
    if (s->heads == KV_HEADS_DUO) duo(w, s, C, n);
    if (s->layers == KV_LAYERS_SQUEEZE) {
        squeeze(w, s, C, m);
        for (uint32_t k = 0; k < NL * U; k++) n[k] = m[k / U] < L ? (uint32_t)m[k / U] : L;
    }
    if (s->layers == KV_LAYERS_POOL && C > s->window && s->window < L) {
        kv_top(y, NL * U * L, (uint64_t)NL * U * C, kept);
        goto out;
    }
    for (uint32_t k = 0; k < NL * U; k++) kv_top(y + (size_t)k * L, L, n[k], kept + (size_t)k * L);
out:
    free(y);
}

/* ------------------------------------------------------------------------------------- the program's side */
static kv_status program(const kv_plan *p, size_t i, const kv_budget_resolved *c, kv_layer *layer, bool *kept,
                         kv_error *e)
{
    const kv_ranking *rk = &p->ranking[p->ranking_of[i]];
    uint32_t n[8 * 32], L = p->scene->n_cut;
    kv_status st = kv_plan_counts(p, i, c, n, e);
    memset(kept, 0, (size_t)p->scene->n_evict * rk->n_unit * L);
    for (uint32_t l = 0; l < p->scene->n_evict && !st; l++) {
        kv_schedule sch = {0};
        bool scheduled = kv_schedule_needed(&p->spec[i]);
        if (scheduled) st = kv_schedule_make(p, i, c, n, &layer[l], &sch, e);
        for (size_t u = 0; u < rk->n_unit && !st; u++)
            for (uint32_t k = 0; k < L; k++) {
                size_t unit = l * rk->n_unit + u;
                if (scheduled)
                    kept[unit * L + k] = kv_schedule_visible(&sch, p->scene, (uint32_t)u, k, 0);
                else if (k < n[unit])
                    kept[unit * L + rk->order[unit * L + k]] = true;
            }
        if (scheduled) kv_schedule_free(&sch);
    }
    return st;
}

typedef struct {
    kv_spec *spec;
    kv_budget *budget;
    size_t n_spec, n_budget;
    kv_plan plan;
    kv_layer layer[8];
} setup;

static kv_status setup_open(setup *o, const kv_world *w, const char *policies, const char *budgets, kv_error *e)
{
    *o = (setup){0};
    kv_status st = kv_spec_parse(policies, &o->spec, &o->n_spec, e);
    if (!st) st = kv_budget_parse(budgets, &o->budget, &o->n_budget, e);
    if (!st) st = kv_plan_build(&w->scene, o->spec, o->n_spec, 1, &o->plan, e);
    for (uint32_t l = 0; l < w->n_layer && !st; l++)
        st = kv_layer_load(&w->scene, l, o->plan.needs, o->plan.max_window, &o->layer[l], e);
    return st;
}

static void setup_close(setup *o)
{
    for (uint32_t l = 0; l < 8; l++) kv_layer_free(&o->layer[l]);
    for (size_t i = 0; i < o->n_spec; i++) kv_spec_free(&o->spec[i]);
    kv_plan_free(&o->plan), free(o->spec), free(o->budget);
}

static void compare(const kv_world *w, const char *policies, const char *budgets, kv_count *count)
{
    setup o;
    kv_error e = {""};
    kv_status st = setup_open(&o, w, policies, budgets, &e);
    size_t room = (size_t)w->n_layer * w->H * w->L;
    double *x = malloc(room * sizeof *x);
    bool *got = malloc(room), *want = malloc(room);
    for (size_t i = 0; i < o.n_spec && !st; i++) {
        const kv_spec *s = &o.spec[i];
        uint32_t U = kv_units(w, s->granularity);
        double gap = kv_gap = 1;
        for (size_t l = 0; l < w->n_layer; l++) scores_of(w, s, l, x + l * U * w->L);
        gap = kv_gap;
        for (size_t b = 0; b < o.n_budget && !st; b++) {
            kv_budget_resolved c = kv_budget_resolve(&o.budget[b], w->L, 8, 1, 1);
            kv_gap = gap;
            twin(w, s, &c, x, want);
            st = program(&o.plan, i, &c, o.layer, got, &e);
            bool same = !st && !memcmp(got, want, (size_t)w->n_layer * U * w->L);
            KV_COMPARE(count, same, "seed %llu L=%u layers=%u U=%u g=%u d=%u: %s at %s", (unsigned long long)w->s.seed,
                       w->L, w->n_layer, w->U, w->g, w->d, s->canonical, o.budget[b].text);
        }
    }
    CHECKF(!st, "seed %llu: %s: %s", (unsigned long long)w->s.seed, policies, e.msg);
    setup_close(&o);
    free(x), free(got), free(want);
}

/* ------------------------------------------------------------------------------------- worlds by dice */
static uint32_t dice(kv_rng *r, uint32_t n)
{
    return (uint32_t)(kv_rng_next(r) >> 33) % n;
}

#define PICK(r, ...) pick(r, (const char *const[]){__VA_ARGS__, NULL})
static const char *pick(kv_rng *r, const char *const *list)
{
    uint32_t n = 0;
    while (list[n]) n++;
    return list[dice(r, n)];
}

/* A world with W_O and stream norms; the table holds NL x a x b numbers (b = 0: NL x a, both 0: NL). */
static bool world_open(kv_world *w, kv_rng *r, uint64_t seed, uint32_t max_layers)
{
    static const uint32_t GROUP[] = {1, 3, 8}, LENGTH[] = {1, 2, 3, 5, 8, 9, 13, 21, 34, 45}, DIM[] = {2, 4, 8};
    uint32_t U = 1 + dice(r, 3), L = LENGTH[dice(r, 10)];
    kv_tiny s = {.n_layer = 1 + dice(r, max_layers),
                 .n_q_head = U * GROUP[dice(r, 3)],
                 .n_kv_head = U,
                 .d = DIM[dice(r, 3)],
                 .n_token = L + 1 + dice(r, 2),
                 .n_prompt = L,
                 .wo = true,
                 .flat = dice(r, 12) == 0,
                 .seed = seed};
    kv_world_make(w, &s);
    w->t.xnorm = malloc(s.n_layer * s.n_token * sizeof *w->t.xnorm);
    for (uint32_t k = 0; k < s.n_layer * s.n_token; k++) w->t.xnorm[k] = 0.5f + 40 * (float)kv_rng_unit(r);
    return kv_world_open_data(w, trace_path);
}

static void table_write(const kv_world *w, kv_rng *r, size_t a, size_t b, uint32_t values)
{
    kv_error e;
    size_t n = w->n_layer * (a ? a : 1) * (b ? b : 1);
    for (size_t k = 0; k < n; k++) table[k] = values ? (float)dice(r, values) / 8 : (float)kv_rng_normal(r);
    CHECK(!kv_npy_write(table_path, "<f4", 1 + (a > 0) + (b > 0), (size_t[]){w->n_layer, a, b}, table, &e));
}

static char *around(kv_rng *r, uint32_t L, uint32_t window)
{
    int64_t at[] = {0,
                    1,
                    2,
                    window - 1,
                    window,
                    window + 1,
                    L / 2,
                    (int64_t)L - window - 1,
                    (int64_t)L - window,
                    (int64_t)L - window + 1,
                    L - 1,
                    L,
                    L + 1,
                    dice(r, L + 1)};
    char *out = kv_format("ratio=0.%u,ratio=0.%u", 1 + dice(r, 8), 11 + dice(r, 80));
    for (size_t i = 0; i < sizeof at / sizeof *at && out; i++) {
        char *more = at[i] < 0 ? kv_format("%s", out) : kv_format("%s,%lld", out, (long long)at[i]);
        free(out), out = more;
    }
    return out;
}

static void append(char **list, const char *format, ...)
{
    char one[512];
    va_list ap;
    va_start(ap, format);
    vsnprintf(one, sizeof one, format, ap);
    va_end(ap);
    char *more = kv_format("%s%s%s", *list ? *list : "", *list ? "," : "", one);
    free(*list), *list = more;
}

/* ------------------------------------------------------------------------------------- the tests */
static const uint32_t WINDOWS[] = {1, 2, 3, 4, 8, 32};

static void test_defensive(void)
{
    kv_count count = {0};
    for (uint64_t seed = 1; seed <= 200; seed++) {
        kv_rng r = {seed};
        kv_world w;
        bool open = world_open(&w, &r, seed, 3);
        uint32_t window = WINDOWS[dice(&r, 6)];
        char *list = NULL, *budgets = around(&r, w.L, window);
        append(&list, "defensivekv:window=%u,layer-defensivekv:window=%u,maxclamp-floor.ours:window=%u", window, window,
               window);
        for (int k = 0; k < 2; k++) { /* query heads share their values' norm: f / (f + f + f) is a third up to
                                         rounding, and ties are not */
            const char *gran = PICK(&r, "query_head", "kv_head", "layer");
            append(&list, "%s:window=%u,granularity=%s,pooling=%s,kernel=%s,value=%s,window_share=%s",
                   PICK(&r, "defensivekv", "layer-defensivekv"), window, gran, PICK(&r, "none", "avgpool", "maxpool"),
                   PICK(&r, "1", "3", "7", "21"), PICK(&r, "none", *gran == 'q' ? "none" : "wo-share"),
                   PICK(&r, "code", "paper"));
        }
        append(&list, "maxclamp-floor.ours:window=%u,granularity=%s,alpha=%s,chunk_length=%s,cover=%s,%s", window,
               PICK(&r, "kv_head", "layer"), PICK(&r, "0", "0.3", "1"), PICK(&r, "1", "3", "5"),
               PICK(&r, "1", "2", "7"), PICK(&r, "heads=pool", "heads=uniform,layers=pool"));
        if (open) compare(&w, list, budgets, &count);
        kv_world_close(&w), free(list), free(budgets);
    }
    kv_judge("defensive", &count, 15000);
}

static void test_scores(void)
{
    kv_count count = {0};
    for (uint64_t seed = 1001; seed <= 1200; seed++) {
        kv_rng r = {seed};
        kv_world w;
        bool open = world_open(&w, &r, seed, 3);
        uint32_t window = WINDOWS[1 + dice(&r, 5)];
        char *list = NULL, *budgets = around(&r, w.L, window);
        table_write(&w, &r, w.U, w.d, 0);
        append(&list, "qfilters:filters=%s,window=%u,granularity=%s,kvpress.qfilter:filters=%s", table_path, window,
               PICK(&r, "query_head", "kv_head", "layer"), table_path);
        append(&list, "caote.ours:window=%u,granularity=%s,meanvar-loo.ours:window=%u,gamma=%s", window,
               PICK(&r, "query_head", "kv_head", "layer"), window, PICK(&r, "200", "0", "7"));
        append(&list, "caote.ours:window=1,stream-pool.ours:window=%u,granularity=%s", window,
               PICK(&r, "kv_head", "layer"));
        append(&list, "stream-pool.ours:window=%u,value=wo-share", window);
        if (open) compare(&w, list, budgets, &count);
        kv_world_close(&w), free(list), free(budgets);
    }
    kv_judge("scores", &count, 15000);
}

static void test_allocations(void)
{
    kv_count count = {0};
    for (uint64_t seed = 2001; seed <= 2200; seed++) {
        kv_rng r = {seed};
        kv_world w;
        bool open = world_open(&w, &r, seed, 6);
        char *list = NULL, *budgets = around(&r, w.L, 4);
        table_write(&w, &r, w.U, 0, dice(&r, 2) * 4);
        append(&list, "duo:pattern=%s,duo:pattern=%s,sinks=%s,recent=%s,duo:pattern=%s,sinks=0,recent=1", table_path,
               table_path, PICK(&r, "0", "1", "4"), PICK(&r, "0", "3", "9", "40"), table_path);
        if (open) compare(&w, list, budgets, &count);
        free(list), list = NULL;
        static const uint32_t VALUES[] = {0, 0, 1, 2, 30};
        table_write(&w, &r, 0, 0, VALUES[dice(&r, 5)]);
        append(&list, "squeeze:cosine=%s,squeeze:cosine=%s,p=%s,qfilters", table_path, table_path,
               PICK(&r, "0", "0.2", "1"));
        list[strlen(list) - 9] = 0; /* ",qfilters": a comma so that the next item is a policy */
        append(&list, "caote.ours:window=4,value=none,layers=squeeze,cosine=%s,p=%s", table_path, PICK(&r, "0", "0.5"));
        if (open) compare(&w, list, budgets, &count);
        kv_world_close(&w), free(list), free(budgets);
    }
    kv_judge("allocations", &count, 15000);
}

/* Two stages on any counts: those of the same policy without the second stage, the first part of each by score, the
 * rest by score times projected norm. */
static void test_two_stages(void)
{
    kv_count count = {0};
    for (uint64_t seed = 3001; seed <= 3200; seed++) {
        kv_rng r = {seed};
        kv_world w;
        kv_error e = {""};
        setup o, plain;
        bool open = world_open(&w, &r, seed, 4);
        uint32_t window = WINDOWS[1 + dice(&r, 4)], L = w.L;
        const char *layers = PICK(&r, "cake", "pool", "lava", "pyramid-ffy0"),
                   *heads = strcmp(layers, "pool") ? PICK(&r, "ada", "pool", "uniform") : "uniform";
        char *budgets = around(&r, L, window),
             *two = kv_format("cake-ada-critical.ours:window=%u,layers=%s,heads=%s", window, layers, heads);
        char *one = kv_format("cake:window=%u,layers=%s,heads=%s,alpha=0.2", window, layers, heads);
        kv_status st = open ? setup_open(&o, &w, two, budgets, &e) : KV_EIO;
        if (!st) st = setup_open(&plain, &w, one, budgets, &e);
        CHECKF(!st, "%s: %s", two, e.msg);
        for (size_t b = 0; b < o.n_budget && !st; b++) {
            kv_budget_resolved c = kv_budget_resolve(&o.budget[b], L, 8, 1, 1);
            uint32_t n[8 * 32];
            bool got[8 * 3 * 45], want[8 * 3 * 45];
            st = kv_plan_counts(&plain.plan, 0, &c, n, &e);
            if (!st) st = program(&o.plan, 0, &c, o.layer, got, &e);
            kv_gap = 1;
            for (uint32_t l = 0; l < w.n_layer; l++) {
                double x[3 * 45], y[3 * 45], max = -INFINITY;
                uint32_t done = before_window(&w, &o.spec[0]);
                scores_of(&w, &o.spec[0], l, x);
                for (size_t k = 0; k < (size_t)w.U * L; k++)
                    if (k % L < done) max = fmax(max, x[k]);
                for (uint32_t u = 0; u < w.U; u++) {
                    bool first[45];
                    for (size_t i = 0; i < L; i++) y[i] = i < done ? x[u * L + i] : INFINITY;
                    kv_top(y, L, n[l * w.U + u] / 2, first);
                    /* the window in the first stage: newest first */
                    for (size_t i = done; i < L && n[l * w.U + u] / 2 < L - done; i++)
                        first[i] = L - i <= n[l * w.U + u] / 2;
                    for (size_t i = 0; i < L; i++) {
                        double score = (i < done ? x[u * L + i] : max + 1) + 1e-4;
                        y[i] = first[i] ? INFINITY : score * projected(&w, &o.spec[0], l, u, i);
                    }
                    kv_top(y, L, n[l * w.U + u], want + (l * w.U + u) * L);
                }
            }
            KV_COMPARE(&count, !st && !memcmp(got, want, (size_t)w.n_layer * w.U * L), "seed %llu L=%u: %s at %s",
                       (unsigned long long)seed, L, two, o.budget[b].text);
        }
        CHECKF(!st, "%s: %s", two, e.msg);
        if (open) setup_close(&o), setup_close(&plain);
        kv_world_close(&w), free(two), free(one), free(budgets);
    }
    kv_judge("two stages", &count, 2000);
}

/* random-protected.ours: the window, then sinks, then delimiters, then the rest, in a seeded order of each unit. */
static void test_protected(void)
{
    static const char *const WORD[] = {"a",   " b",  ".",  "c. ",          "\n", "d\n\n", "?",
                                       "!  ", "e.g", ".5", "\xe3\x80\x82", "",   " "};
    static const bool ENDS[] = {0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0};
    int bad = 0, same = 0, delimiters = 0;
    for (uint64_t seed = 1; seed <= 100; seed++) {
        kv_rng r = {seed};
        kv_tiny s = {.n_layer = 2, .n_q_head = 4, .n_kv_head = 2, .d = 2, .n_token = 46, .n_prompt = 45, .seed = seed};
        kv_world w;
        kv_error e = {""};
        setup o;
        bool delimiter[46];
        kv_world_make(&w, &s);
        w.t.text = malloc(46 * 8), w.t.offset = malloc(47 * sizeof *w.t.offset);
        w.t.text[0] = 0;
        for (uint32_t i = 0; i < 46; i++) {
            uint32_t k = dice(&r, 13);
            w.t.offset[i] = (uint32_t)strlen(w.t.text), delimiter[i] = ENDS[k] && seed % 4;
            delimiters += delimiter[i], strcat(w.t.text, WORD[k]);
        }
        w.t.offset[46] = (uint32_t)strlen(w.t.text);
        if (seed % 4 == 0) free(w.t.text), w.t.text = NULL; /* no text: sinks and window only */
        uint32_t sinks = dice(&r, 6), window = dice(&r, 9);
        char *list = kv_format(
            "random-protected.ours:sinks=%u,window=%u,seed=%u,random-protected.ours:sinks=%u,window=%u,seed=%u", sinks,
            window, (uint32_t)seed, sinks, window, (uint32_t)seed + 1);
        bool open = kv_world_open_data(&w, trace_path);
        CHECKF(open && !setup_open(&o, &w, list, "10", &e), "%s", e.msg);
        for (size_t k = 0; k < 2; k++) {
            const uint32_t *order = o.plan.ranking[o.plan.ranking_of[k]].order;
            for (uint32_t unit = 0; unit < 4; unit++, order += 45) {
                int before = 3;
                for (uint32_t j = 0; j < 45; j++) {
                    uint32_t i = order[j];
                    int class = i + window >= 45 ? 3 : i < sinks ? 2 : delimiter[i];
                    bad += class > before;
                    before = class;
                }
                if (unit) same += !memcmp(order, order - 45, 45 * sizeof *order);
            }
        }
        const uint32_t *a = o.plan.ranking[0].order, *b = o.plan.ranking[o.plan.ranking_of[1]].order;
        same += !memcmp(a, b, 45 * sizeof *a);
        setup_close(&o), kv_world_close(&w), free(list);
    }
    CHECKF(bad == 0 && same == 0 && delimiters > 500, "%d out of place, %d orders repeated, %d delimiters", bad, same,
           delimiters);
}

/* Specs in one plan keep what they keep alone: whatever shapes a ranking is part of its key. */
static void test_together(void)
{
    size_t n_same = 0;
    for (uint64_t seed = 4001; seed <= 4030; seed++) {
        kv_rng r = {seed};
        kv_world w;
        kv_error e = {""};
        setup all, one;
        bool open = world_open(&w, &r, seed, 4), got[8 * 24 * 45], want[8 * 24 * 45];
        char *path[2] = {kv_format("%s.a", table_path), kv_format("%s.b", table_path)}, *list = NULL;
        float values[8 * 24];
        for (int k = 0; k < 2; k++) {
            for (size_t i = 0; i < 8 * 24; i++) values[i] = (float)kv_rng_unit(&r);
            CHECK(!kv_npy_write(path[k], "<f4", 2, (size_t[]){w.n_layer, w.H}, values, &e));
        }
        append(&list, "snapkv:window=4,headkv:window=4,importance=%s,headkv:window=4,importance=%s", path[0], path[1]);
        append(&list, "kvpress.chunkkv:window=4,chunk_length=3,kvpress.chunkkv:window=4,chunk_length=5,knorm:window=4,"
                      "defensivekv:window=4");
        append(&list, "defensivekv:window=4,window_share=paper,maxclamp-floor.ours:window=4,chunk_length=2,maxclamp-"
                      "floor.ours:window=4,chunk_length=3");
        append(&list, "oracle-global:window=4,snapkv:window=4,layers=pool,stream-pool.ours:window=4,lava:window=4");
        kv_status st = open ? setup_open(&all, &w, list, "0,3,5,9,20", &e) : KV_EIO;
        CHECKF(!st, "%s: %s", list, e.msg);
        for (size_t i = 0; i < all.n_spec && !st; i++) {
            st = setup_open(&one, &w, all.spec[i].canonical, "0,3,5,9,20", &e);
            for (size_t b = 0; b < one.n_budget && !st; b++) {
                kv_budget_resolved c = kv_budget_resolve(&one.budget[b], w.L, 8, 1, 1);
                st = program(&all.plan, i, &c, all.layer, got, &e);
                if (!st) st = program(&one.plan, 0, &c, one.layer, want, &e);
                bool same = !st && !memcmp(got, want, (size_t)w.n_layer * kv_units(&w, all.spec[i].granularity) * w.L);
                n_same += same;
                if (!same) CHECKF(same, "seed %d: %s at %s", (int)seed, all.spec[i].canonical, one.budget[b].text);
            }
            CHECKF(!st, "%s: %s", all.spec[i].canonical, e.msg);
            setup_close(&one);
        }
        setup_close(&all), kv_world_close(&w), free(list), free(path[0]), free(path[1]);
    }
    CHECKF(n_same == 30 * 14 * 5, "%zu", n_same);
}

/* Larger budgets keep supersets, whatever stands first. */
static void test_nested(void)
{
    size_t bad = 0, n = 0;
    for (uint64_t seed = 5001; seed <= 5060; seed++) {
        kv_rng r = {seed};
        kv_world w;
        kv_error e = {""};
        setup o;
        bool open = world_open(&w, &r, seed, 3), small[3 * 3 * 45], large[3 * 3 * 45];
        table_write(&w, &r, w.U, 0, 0);
        char *list = kv_format("defensivekv:window=3,layer-defensivekv:window=3,maxclamp-floor.ours:window=3,chunk_"
                               "length=2,duo:pattern=%s,recent=3,stream-pool.ours:window=3",
                               table_path);
        kv_status st = open ? setup_open(&o, &w, list, "0", &e) : KV_EIO;
        CHECKF(!st, "%s", e.msg);
        for (size_t i = 0; i < o.n_spec && !st; i++)
            for (uint32_t C = 0; C <= w.L && !st; C++) {
                kv_budget_resolved c = {.tokens = C, .real = C, .share = (double)C / w.L, .frac = (double)C / w.L};
                st = program(&o.plan, i, &c, o.layer, large, &e);
                size_t room = (size_t)w.n_layer * w.U * w.L, kept = 0;
                for (size_t k = 0; k < room && C; k++) bad += small[k] && !large[k];
                for (size_t k = 0; k < room; k++) kept += large[k];
                if (o.spec[i].heads != KV_HEADS_DUO && (C >= 3 || o.spec[i].select) && w.L > 3)
                    bad += kept != (size_t)C * w.n_layer * w.U;
                bad += kept > (size_t)C * w.n_layer * w.U;
                memcpy(small, large, room), n++;
            }
        setup_close(&o), kv_world_close(&w), free(list);
    }
    CHECKF(bad == 0 && n > 3000, "%zu of %zu", bad, n);
}

static void test_refused(void)
{
    kv_rng r = {1};
    kv_world w;
    kv_tiny s = {.n_layer = 3, .n_q_head = 4, .n_kv_head = 2, .d = 4, .n_token = 20, .n_prompt = 18, .seed = 1};
    bool open = kv_world_open(&w, trace_path, &s);
    table_write(&w, &r, 2, 4, 0);
    char *filters = kv_format("%s.f", table_path), *bad = kv_format("%s.nan", table_path);
    CHECK(open && !rename(table_path, filters));
    table[1] = NAN;
    CHECK(!kv_npy_write(bad, "<f4", 1, (size_t[]){3}, table, NULL));
    table_write(&w, &r, 2, 0, 0);
    char *p[] = {kv_format("qfilters:filters=%s", table_path), kv_format("duo:pattern=%s", filters),
                 kv_format("squeeze:cosine=%s", table_path), kv_format("squeeze:cosine=%s", bad)};
    const struct {
        const char *policy;
        kv_status want;
        const char *word;
    } BAD[] = {{"qfilters", KV_EMISUSE, "filters=FILE"},
               {"duo", KV_EMISUSE, "pattern=FILE"},
               {"squeeze", KV_EMISUSE, "cosine=FILE"},
               {"duo:pattern=/nonexistent.npy", KV_EIO, "/nonexistent.npy"},
               {p[0], KV_EFORMAT, "[3 layers, 2, 4]"},
               {p[1], KV_EFORMAT, "[3 layers, 2]"},
               {p[2], KV_EFORMAT, "[3 layers]"},
               {p[3], KV_EFORMAT, "not a finite number"},
               {"stream-pool.ours", KV_EMISSING, ""},
               {"defensivekv", KV_EMISSING, ""},
               {"defensivekv:heads=uniform", KV_EMISUSE, "heads=pool"},
               {"defensivekv:window=0", KV_EMISUSE, "window"},
               {"defensivekv:layers=pool", KV_EMISUSE, "flat"},
               {"caote.ours:score=knorm,window=0", KV_EMISUSE, "value=loo"},
               {"snapkv:layer_weight=stream", KV_EMISUSE, "layers=pool"},
               {"duo:score=knorm", KV_EMISUSE, "recency"},
               {"duo:layers=pool", KV_EMISUSE, "duo"},
               {"recency:heads=duo", KV_EMISUSE, "recent=N"},
               {"maxclamp-floor.ours:cover=0", KV_EMISUSE, "cover"}};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        kv_error e = {""};
        setup o;
        kv_status st = setup_open(&o, &w, BAD[i].policy, "5", &e);
        CHECKF(st == BAD[i].want && e.msg[0] && strstr(e.msg, BAD[i].word), "%s: %d %s", BAD[i].policy, st, e.msg);
        setup_close(&o);
    }
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) free(p[i]);
    free(filters), free(bad), kv_world_close(&w);
}

/* Every row says somewhere how it was checked. */
static void test_readme(void)
{
    uint8_t *text = NULL;
    size_t n = 0;
    kv_error e = {""};
    CHECKF(!kv_read_file("sim/policies/README.md", 1 << 20, &text, &n, &e), "%s", e.msg);
    for (const kv_policy *p = kv_policies; p->name && text; p++) {
        char *quoted = kv_format("`%s`", p->name);
        CHECKF(strstr((const char *)text, quoted), "sim/policies/README.md does not mention %s", p->name);
        free(quoted);
    }
    free(text);
}

int main(void)
{
    if (!mkdtemp(dir) && !mkdtemp(strcpy(dir, "/tmp/kvtest.XXXXXX"))) return 1;
    trace_path = kv_format("%s/t.kvt", dir), table_path = kv_format("%s/t.npy", dir);
    test_defensive();
    test_scores();
    test_allocations();
    test_two_stages();
    test_protected();
    test_together();
    test_nested();
    test_refused();
    test_readme();
    char *rm = kv_format("rm -rf %s", dir);
    if (rm && system(rm)) perror("rm");
    free(rm), free(trace_path), free(table_path);
    return kv_tally();
}
