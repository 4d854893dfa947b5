/* twins_scores.h - scores of the prompt as their twins see them: window and column sums, future mass, key norms,
 * positions; pooling, group reduction, value terms; protected positions above all. */
#ifndef KV_TWINS_SCORES_H
#define KV_TWINS_SCORES_H

#include "tests/twins.h"

/* Scores are y [query head][L] per layer; pooled and grouped into x [unit][L]. n = positions that are scored. */
static uint32_t scored(const kv_world *w, const kv_spec *s)
{
    return w->L > s->window ? w->L - s->window : 0;
}

static void rows_of_window(const kv_world *w, const kv_spec *s, size_t l, double *y)
{
    uint32_t n = scored(w, s);
    for (size_t h = 0; h < w->H; h++)
        for (size_t i = 0; i < n; i++) {
            double sum = 0, max = 0, var = 0;
            for (size_t r = n; r < w->L; r++) sum += kv_row(w, l, h, r)[i], max = fmax(max, kv_row(w, l, h, r)[i]);
            for (size_t r = n; r < w->L; r++)
                var += pow(kv_row(w, l, h, r)[i] - sum / s->window, 2) / (s->window - 1.0);
            y[h * w->L + i] = s->row_reduce == KV_ROWS_SUM    ? sum
                              : s->row_reduce == KV_ROWS_MEAN ? sum / s->window
                              : s->row_reduce == KV_ROWS_MAX  ? max
                                                              : sum / s->window + s->gamma * var;
        }
}

static void column_sums(const kv_world *w, const kv_spec *s, size_t l, double *y)
{
    for (size_t h = 0; h < w->H; h++)
        for (size_t i = 0; i < w->L; i++) {
            for (size_t r = i; r < w->L; r++) y[h * w->L + i] += kv_row(w, l, h, r)[i];
            if (s->per_row) y[h * w->L + i] /= (double)(w->L - i);
        }
}

static void future_mass(const kv_world *w, size_t l, double *y)
{
    for (size_t h = 0; h < w->H; h++)
        for (size_t r = w->L; r < w->N; r++)
            for (size_t i = 0; i < w->L; i++) y[h * w->L + i] += kv_row(w, l, h, r)[i];
}

static void key_norms(const kv_world *w, size_t l, double *y)
{
    for (size_t h = 0; h < w->H; h++)
        for (size_t i = 0; i < w->L; i++) {
            double sum = 0;
            for (size_t j = 0; j < w->d; j++) sum += pow(kv_key(w, l, h / w->g, i)[j], 2);
            y[h * w->L + i] = -sqrt(sum);
        }
}

static void pool(const kv_spec *s, uint32_t n, double *y)
{
    double out[128];
    if (s->pooling == KV_POOL_NONE) return;
    for (int i = 0; i < (int)n; i++) {
        out[i] = s->pooling == KV_POOL_AVG ? 0 : -INFINITY;
        for (int j = i - (int)s->kernel / 2; j <= i + (int)s->kernel / 2; j++)
            if (j >= 0 && j < (int)n)
                out[i] = s->pooling == KV_POOL_AVG ? out[i] + y[j] / s->kernel : fmax(out[i], y[j]);
    }
    memcpy(y, out, n * sizeof *y);
}

static double group(const kv_world *w, const kv_spec *s, uint32_t u, const double *y, size_t i)
{
    uint32_t first = 0, n = s->group_reduce == KV_GROUP_ALL ? w->H : kv_heads_of(w, s->granularity, u, &first);
    double sum = 0, max = -INFINITY;
    for (size_t h = first; h < first + n; h++) sum += y[h * w->L + i], max = fmax(max, y[h * w->L + i]);
    return s->group_reduce == KV_GROUP_MAX ? max : s->group_reduce == KV_GROUP_SUM ? sum : sum / n;
}

/* What the value of a KV head says: L2 norm, L1 norm, or the mean over its query heads of the L1 norm behind W_O. */
static double value_term(const kv_world *w, uint32_t term, size_t l, size_t kv, size_t i)
{
    const float *v = kv_value_at(w, l, kv, i);
    size_t width = (size_t)w->H * w->d;
    double sum = 0;
    if (term != KV_VALUE_WO_L1) {
        for (size_t j = 0; j < w->d; j++) sum += term == KV_VALUE_NORM ? (double)v[j] * v[j] : fabs(v[j]);
        return term == KV_VALUE_NORM ? sqrt(sum) : sum;
    }
    for (size_t h = kv * w->g; h < (kv + 1) * w->g; h++)
        for (size_t o = 0; o < width; o++) {
            double out = 0;
            for (size_t j = 0; j < w->d; j++) out += (double)w->t.wo[(l * width + o) * width + h * w->d + j] * v[j];
            sum += fabs(out) / w->g;
        }
    return sum;
}

static double unit_value(const kv_world *w, const kv_spec *s, uint32_t term, size_t l, uint32_t u, size_t i)
{
    uint32_t first, n = kv_heads_of(w, s->granularity, u, &first);
    double sum = 0;
    if (n <= w->g) return value_term(w, term, l, first / w->g, i);
    for (size_t kv = 0; kv < w->U; kv++) sum += value_term(w, term, l, kv, i) / w->U;
    return sum;
}

static bool forced(const kv_world *w, const kv_spec *s, size_t i)
{
    return i + s->window >= w->L || i < s->protect_sink || i + s->protect_recent >= w->L;
}

/* Scores of all units of a layer, protected positions above all others and the newest first. */
static void scores_of(const kv_world *w, const kv_spec *s, size_t l, double *x)
{
    const char *name = kv_scorers[s->scorer]->name;
    uint32_t U = kv_units(w, s->granularity), L = w->L, n = scored(w, s);
    double *y = calloc((size_t)w->H * L, sizeof *y);
    bool plain = !strcmp(name, "recency") || !strcmp(name, "knorm") || !strcmp(name, "future");
    kv_spec mean = *s;
    mean.group_reduce = KV_GROUP_MEAN; /* scores without a group reduction of their own */
    if (!strcmp(name, "window"))
        rows_of_window(w, s, l, y);
    else if (!strcmp(name, "colsum"))
        column_sums(w, s, l, y);
    else if (!strcmp(name, "future"))
        future_mass(w, l, y);
    else if (!strcmp(name, "knorm"))
        key_norms(w, l, y);
    else
        for (size_t k = 0; k < (size_t)w->H * L; k++) y[k] = k % L < s->sinks ? 1e6 : (double)(k % L);
    for (size_t h = 0; h < w->H && s->value == KV_VALUE_HEAD_MAX_L1; h++) {
        double max = 0;
        for (size_t i = 0; i < n; i++) max = fmax(max, value_term(w, s->value, l, h / w->g, i));
        for (size_t i = 0; i < n; i++) y[h * L + i] *= max;
    }
    for (size_t h = 0; h < w->H && !plain && s->pool_first; h++) pool(s, n, y + h * L);
    for (uint32_t u = 0; u < U; u++) {
        for (size_t i = 0; i < L; i++) x[u * L + i] = group(w, plain ? &mean : s, u, y, i);
        if (!plain && !s->pool_first) pool(s, n, x + u * L);
        for (size_t i = 0; i < L; i++) {
            if (s->value == KV_VALUE_NORM || s->value == KV_VALUE_WO_L1)
                x[u * L + i] *= unit_value(w, s, s->value, l, u, i);
            if (forced(w, s, i)) x[u * L + i] = ldexp(1e100, (int)i);
        }
    }
    free(y);
}

#endif
