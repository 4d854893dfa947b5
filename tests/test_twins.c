/* test_twins.c - every scorer of attention, allocator and selection of the prompt's cut against a brute-force twin, on seeded
 * tiny traces of odd shapes (1 head, 1 token, L < window, groups of 1, 3 and 8, all keys equal) and budgets around every
 * boundary. The twins are written from the papers' arithmetic over full attention rows in double. Scorers of kvpress's family
 * have theirs in test_scorers.c, decode rules and nesting in test_twins_decode.c. */
#include <stdarg.h>
#include <unistd.h>

#include "tests/twins.h"
#include "traces/npy.h"

static char dir[] = "/tmp/kvtest.XXXXXX";
static char *trace_path, *table_path;
static float table[8 * 32]; /* head importances of the world at hand, [layer][query head] */

/* ------------------------------------------------------------------------------------- scores */
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
            for (size_t r = n; r < w->L; r++) var += pow(kv_row(w, l, h, r)[i] - sum / s->window, 2) / (s->window - 1.0);
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
            if (j >= 0 && j < (int)n) out[i] = s->pooling == KV_POOL_AVG ? out[i] + y[j] / s->kernel : fmax(out[i], y[j]);
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

/* What the value says about (query head, position): L2 norm, L1 norm, or L1 norm behind W_O. */
static double value_term(const kv_world *w, uint32_t term, size_t l, size_t h, size_t i)
{
    const float *v = kv_value(w, l, h / w->g, i);
    double sum = 0, width = w->H * w->d;
    for (size_t j = 0; j < w->d; j++) sum += term == KV_VALUE_NORM ? (double)v[j] * v[j] : fabs(v[j]);
    if (term != KV_VALUE_WO_L1) return term == KV_VALUE_NORM ? sqrt(sum) : sum;
    sum = 0;
    for (size_t o = 0; o < (size_t)width; o++) {
        double out = 0;
        for (size_t j = 0; j < w->d; j++) out += (double)w->t.wo[((size_t)(l * width) + o) * (size_t)width + h * w->d + j] * v[j];
        sum += fabs(out);
    }
    return sum;
}

static double unit_value(const kv_world *w, const kv_spec *s, uint32_t term, size_t l, uint32_t u, size_t i)
{
    uint32_t first, n = kv_heads_of(w, s->granularity, u, &first);
    double sum = 0;
    for (size_t h = first; h < first + n; h++) sum += value_term(w, term, l, h, i);
    return sum / n;
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
    if (!strcmp(name, "window")) rows_of_window(w, s, l, y);
    else if (!strcmp(name, "colsum")) column_sums(w, s, l, y);
    else if (!strcmp(name, "future")) future_mass(w, l, y);
    else if (!strcmp(name, "knorm")) key_norms(w, l, y);
    else
        for (size_t k = 0; k < (size_t)w->H * L; k++) y[k] = k % L < s->sinks ? 1e6 : (double)(k % L);
    for (size_t h = 0; h < w->H && s->value == KV_VALUE_HEAD_MAX_L1; h++) {
        double max = 0;
        for (size_t i = 0; i < n; i++) max = fmax(max, value_term(w, s->value, l, h, i));
        for (size_t i = 0; i < n; i++) y[h * L + i] *= max;
    }
    for (size_t h = 0; h < w->H && !plain && s->pool_first; h++) pool(s, n, y + h * L);
    for (uint32_t u = 0; u < U; u++) {
        for (size_t i = 0; i < L; i++) x[u * L + i] = group(w, plain ? &mean : s, u, y, i);
        if (!plain && !s->pool_first) pool(s, n, x + u * L);
        for (size_t i = 0; i < L; i++) {
            if (s->value == KV_VALUE_NORM || s->value == KV_VALUE_WO_L1) x[u * L + i] *= unit_value(w, s, s->value, l, u, i);
            if (forced(w, s, i)) x[u * L + i] = ldexp(1e100, (int)i);
        }
    }
    free(y);
}

/* ------------------------------------------------------------------------------------- layers: entries per unit, window included */
static void adjust(const double *x, uint32_t n, int64_t total, int64_t cap, int64_t *b)
{
    int64_t excess = 0, left = total, open = 0, k = 0;
    for (uint32_t i = 0; i < n; i++) {
        b[i] = n > 1 ? kv_truncate(x[i]) : total;
        if (b[i] > cap) excess += b[i] - cap, b[i] = cap;
        open += b[i] < cap;
    }
    for (int round = 0; round < 2; round++, excess = left, open = 0, k = 0) { /* the excess, then the leftovers */
        for (uint32_t i = 0; i < n && round; i++) open += b[i] < cap;
        for (uint32_t i = 0; i < n && excess > 0; i++)
            if (b[i] < cap) b[i] += excess / open + (k++ < excess % open);
        left = total;
        for (uint32_t i = 0; i < n; i++) left -= b[i];
    }
}

static double cake_preference(const kv_world *w, const kv_spec *s, size_t l)
{
    double H = 0, V = 0, n = scored(w, s);
    for (size_t h = 0; h < w->H; h++)
        for (size_t i = 0; i < n; i++) {
            double mean = 0;
            for (size_t r = (size_t)n; r < w->L; r++) mean += kv_row(w, l, h, r)[i] / s->window;
            for (size_t r = (size_t)n; r < w->L; r++) {
                double a = kv_row(w, l, h, r)[i];
                H -= a * log(a + 1e-10), V += (a - mean) * (a - mean) / (s->window - 1.0);
            }
        }
    return pow(H, 1 / s->tau1) * pow(V, 1 / s->tau2);
}

/* Budgets behind the window. A stage divides everything among the layers seen so far; what was cut stays cut. */
static void cake_layers(const kv_world *w, const kv_spec *s, int64_t B, int64_t *b)
{
    double P[8], x[8];
    int64_t now[8], cap = scored(w, s);
    for (uint32_t l = 0; l < w->n_layer; l++) P[l] = cake_preference(w, s, l), b[l] = cap;
    for (uint32_t l = s->cascading ? 0 : w->n_layer - 1; l < w->n_layer; l++) {
        double sum = 0;
        for (uint32_t m = 0; m <= l; m++) sum += P[m];
        for (uint32_t m = 0; m <= l; m++) x[m] = P[m] / sum * (double)(B * w->n_layer);
        adjust(x, l + 1, B * w->n_layer, cap, now);
        for (uint32_t m = 0; m <= l; m++) b[m] = now[m] < b[m] ? now[m] : b[m];
    }
}

static void pyramid_layers(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, int64_t *m)
{
    int64_t win = s->window, n = w->n_layer, room = scored(w, s), B = (int64_t)c->tokens - win, lo = B / (int64_t)s->beta, hi = 2 * B - lo;
    if (hi >= room) hi = room, lo = 2 * B - hi;
    for (int64_t l = 0; l < n; l++) m[l] = win + hi - (n > 1 ? l * ((hi - lo) / (n - 1)) : 0);
    if (s->layers == KV_LAYERS_PYRAMID_KVF && w->L < 2 * B)
        for (int64_t l = 0; l < n; l++) m[l] = win + B;
    if (s->layers != KV_LAYERS_PYRAMID_KVPRESS) return;
    double most = s->window + c->real, min = (most - s->window) / s->beta, max = (most - s->window) * 2 - min;
    if (max >= (double)room) max = (double)room, min = (most - s->window) * 2 - max;
    for (int64_t l = 0; l < n; l++)
        m[l] = (int64_t)nearbyint(w->L >= max && max >= min && min >= s->window ? max - (double)l * ((max - min) / (double)(n - 1)) : c->real);
}

static double lava_entropy(const kv_world *w, const kv_spec *s, const double *x)
{
    double sum = 0, e = 0;
    uint32_t U = kv_units(w, s->granularity), n = scored(w, s);
    for (size_t u = 0; u < U; u++)
        for (size_t i = 0; i < n; i++) sum += x[u * w->L + i];
    for (size_t u = 0; u < U; u++)
        for (size_t i = 0; i < n; i++) e -= x[u * w->L + i] / (sum + 1e-16) * log(x[u * w->L + i] / (sum + 1e-16) + 1e-16);
    return e / log(U * n);
}

/* Real shares of the first `stage` layers. */
static void lava_shares(const kv_world *w, const kv_spec *s, const double *x, uint32_t stage, int64_t B, double *share)
{
    double sum = 0;
    size_t per_layer = (size_t)kv_units(w, s->granularity) * w->L;
    for (uint32_t l = 0; l < stage; l++) sum += share[l] = lava_entropy(w, s, x + l * per_layer);
    for (uint32_t l = 0; l < stage; l++) share[l] = share[l] / sum * (double)(B * w->n_layer);
}

static void lava_layers(const kv_world *w, const kv_spec *s, const double *x, int64_t B, int64_t *m)
{
    double share[8], rest[8];
    uint32_t order[8];
    int64_t left = B * w->n_layer;
    lava_shares(w, s, x, w->n_layer, B, share);
    for (uint32_t l = 0; l < w->n_layer; l++) {
        m[l] = w->n_layer > 1 ? kv_truncate(share[l]) : left; /* one layer takes it all */
        rest[l] = share[l] - (double)m[l], left -= m[l];
    }
    kv_sorted(rest, w->n_layer, order);
    if (left && left < w->n_layer) kv_close_call(rest[order[left - 1]], rest[order[left]]);
    for (uint32_t k = 0; k < w->n_layer; k++) m[order[k]] += (k < left) + s->window;
}

/* ------------------------------------------------------------------------------------- heads: entries of each unit */
/* Winners per unit among the `k` best of U units together. */
static void flat(const kv_world *w, uint32_t U, const double *x, uint64_t k, uint32_t *won)
{
    bool *in = malloc((size_t)U * w->L + 1);
    kv_top(x, U * w->L, k, in);
    for (uint32_t u = 0; u < U; u++) {
        won[u] = 0;
        for (size_t i = 0; i < w->L; i++) won[u] += in[u * w->L + i];
    }
    free(in);
}

/* x without the protected entries; every other one times a factor per unit. */
static double *bare(const kv_world *w, const kv_spec *s, uint32_t U, const double *x, const double *factor)
{
    double *y = malloc((size_t)U * w->L * sizeof *y + 1);
    for (size_t k = 0; k < (size_t)U * w->L; k++) y[k] = forced(w, s, k % w->L) ? -INFINITY : x[k] * (factor ? factor[k / w->L] : 1);
    return y;
}

static void ada_heads(const kv_world *w, const kv_spec *s, uint32_t U, const double *x, int64_t B, uint32_t *n)
{
    double ratio[32];
    for (size_t u = 0; u < U && s->normalize; u++) {
        bool in[128];
        double top = 0, all = 0;
        double *y = bare(w, s, U, x, NULL);
        kv_top(y + u * w->L, w->L, (uint64_t)B, in);
        for (size_t i = 0; i < w->L; i++)
            if (!forced(w, s, i)) all += x[u * w->L + i], top += in[i] ? x[u * w->L + i] : 0;
        ratio[u] = top / all;
        free(y);
    }
    double *y = bare(w, s, U, x, s->normalize ? ratio : NULL);
    flat(w, U, y, U * (uint64_t)B, n);
    for (uint32_t u = 0; u < U; u++) n[u] = (uint32_t)nearbyint(n[u] * (1 - s->alpha) + (double)(int64_t)(s->alpha * (double)B)) + s->window;
    free(y);
}

static void safeguard_heads(const kv_world *w, const kv_spec *s, uint32_t U, const double *x, uint32_t C, uint32_t *n)
{
    double *y = malloc((size_t)U * w->L * sizeof *y + 1);
    memcpy(y, x, (size_t)U * w->L * sizeof *y);
    for (size_t u = 0; u < U; u++) {
        bool safe[128];
        double gap = kv_gap;
        kv_top(y + u * w->L, w->L, (uint64_t)(C * s->alpha), safe);
        kv_gap = gap; /* which of two nearly equal ones is safe changes no count of its own head */
        for (size_t i = 0; i < w->L; i++)
            if (safe[i]) y[u * w->L + i] = INFINITY;
    }
    flat(w, U, y, (uint64_t)U * C, n);
    free(y);
}

static void table_heads(const kv_world *w, const kv_spec *s, uint32_t U, size_t l, int64_t B, uint32_t *n)
{
    double sum = 0, shared = floor((double)B / s->beta);
    for (size_t k = 0; k < (size_t)w->n_layer * w->H; k++) sum += table[k];
    for (uint32_t u = 0; u < U; u++) {
        uint32_t first, count = kv_heads_of(w, s->granularity, u, &first);
        double caps = 0;
        for (size_t h = first; h < first + count; h++) {
            double cap = table[l * w->H + h] / sum * shared * w->n_layer * w->H + (double)B - shared;
            kv_gap = fmin(kv_gap, fabs(cap - floor(cap) - 0.5)), caps += nearbyint(cap);
        }
        n[u] = (uint32_t)nearbyint(caps / count) + s->window;
    }
}

/* The repository's stages: a layer is cut at the first stage whose share is no more than what it scored, later and smaller
 * shares cut again; the floor is that of the nominal budget, window included. */
static void lava_code(const kv_world *w, const kv_spec *s, const double *x, uint32_t C, uint32_t *n)
{
    uint32_t U = kv_units(w, s->granularity), room = scored(w, s), won[32];
    for (uint32_t l = 0; l < w->n_layer; l++) {
        double share[8];
        int64_t before = room;
        double *y = bare(w, s, U, x + (size_t)l * U * w->L, NULL);
        for (uint32_t u = 0; u < U; u++) n[l * U + u] = w->L;
        for (uint32_t stage = l + 1; stage <= w->n_layer; stage++) {
            lava_shares(w, s, x, stage, (int64_t)C - s->window, share);
            int64_t b = stage > 1 ? kv_truncate(share[l]) : ((int64_t)C - s->window) * w->n_layer;
            if (b > before) continue;
            before = b;
            flat(w, U, y, U * (uint64_t)b, won);
            for (uint32_t u = 0; u < U; u++) {
                uint32_t cap = (uint32_t)nearbyint(won[u] * (1 - s->alpha) + (int64_t)(s->alpha * C)) + s->window;
                if (cap < n[l * U + u]) n[l * U + u] = cap;
            }
        }
        free(y);
    }
}

/* ------------------------------------------------------------------------------------- counts of a policy at a budget */
static void counts_of(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, const double *x, uint32_t *n)
{
    uint32_t U = kv_units(w, s->granularity), L = w->L, C = c->tokens;
    int64_t m[8], B = (int64_t)C - s->window;
    bool whole = s->guard == KV_GUARD_BEYOND ? L < c->real : s->guard == KV_GUARD_WINDOW ? L <= C + s->window : L <= C;
    for (uint32_t l = 0; l < w->n_layer; l++) m[l] = whole || s->keep_all ? L : C;
    bool cut = !whole && !s->keep_all && B >= 0; /* a budget below the window keeps its newest part */
    if (cut && s->layers == KV_LAYERS_CAKE) {
        cake_layers(w, s, B, m);
        for (uint32_t l = 0; l < w->n_layer; l++) m[l] += s->window;
    } else if (cut && s->layers == KV_LAYERS_LAVA) {
        lava_layers(w, s, x, B, m);
    } else if (cut && s->layers >= KV_LAYERS_PYRAMID_KVF && s->layers <= KV_LAYERS_PYRAMID_KVPRESS) {
        pyramid_layers(w, s, c, m);
    }
    for (uint32_t l = 0; l < w->n_layer; l++) {
        uint32_t *to = n + (size_t)l * U;
        const double *xl = x + (size_t)l * U * L;
        bool all = m[l] > L || (m[l] == L && s->guard != KV_GUARD_BEYOND);
        for (uint32_t u = 0; u < U; u++) to[u] = m[l] < L ? (uint32_t)m[l] : L;
        if (all || m[l] < s->window || !cut) continue;
        if (s->heads == KV_HEADS_ADA) ada_heads(w, s, U, xl, m[l] - s->window, to);
        if (s->heads == KV_HEADS_POOL) flat(w, U, xl, (uint64_t)U * (uint64_t)m[l], to);
        if (s->heads == KV_HEADS_SAFEGUARD) safeguard_heads(w, s, U, xl, (uint32_t)m[l], to);
        if (s->heads == KV_HEADS_TABLE) table_heads(w, s, U, l, m[l] - s->window, to);
    }
    if (cut && s->layers == KV_LAYERS_POOL) flat(w, w->n_layer * U, x, (uint64_t)w->n_layer * U * C, n);
    if (cut && s->layers == KV_LAYERS_LAVA_CODE) lava_code(w, s, x, C, n);
    for (uint32_t k = 0; k < w->n_layer * U; k++) n[k] = s->skip_layers[0] >> (k / U) & 1 || n[k] > L ? L : n[k];
}

/* ------------------------------------------------------------------------------------- selections: kept [unit][L] of a layer */
/* Scores as kvpress pads them: protected positions hold the layer's maximum plus one. */
static double *padded(const kv_world *w, const kv_spec *s, uint32_t U, const double *x)
{
    double *y = bare(w, s, U, x, NULL), max = -INFINITY;
    for (size_t k = 0; k < (size_t)U * w->L; k++) max = fmax(max, y[k]);
    for (size_t k = 0; k < (size_t)U * w->L; k++)
        if (forced(w, s, k % w->L)) y[k] = max + 1;
    return y;
}

static void chunks(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, uint32_t U, const double *x, bool *kept)
{
    double *y = padded(w, s, U, x), score[128] = {0};
    uint32_t n = (w->L + s->chunk_length - 1) / s->chunk_length, keep = (uint32_t)(n * c->share);
    bool in[128];
    for (uint32_t k = 0; k < n; k++) {
        uint32_t a = k * s->chunk_length, b = a + s->chunk_length < w->L ? a + s->chunk_length : w->L;
        for (size_t u = 0; u < U; u++)
            for (uint32_t i = a; i < b; i++) score[k] += y[u * w->L + i] / (b - a);
    }
    kv_top(score, n, keep ? keep : 1, in);
    for (size_t k = 0; k < (size_t)U * w->L; k++) kept[k] = in[k % w->L / s->chunk_length];
    free(y);
}

/* The first n1 by score, then the rest of n by score times the projected value's norm. */
static void two_stages(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, size_t l, uint32_t U, const double *x, const uint32_t *n,
                       bool *kept)
{
    double *y = padded(w, s, U, x);
    for (uint32_t u = 0; u < U; u++) {
        bool first[128];
        bool ada = s->heads == KV_HEADS_SAFEGUARD;
        uint32_t safe = ada ? (uint32_t)(c->tokens * s->alpha) : 0, n1 = (uint32_t)((ada ? n[u] : c->real) * s->first_stage_ratio);
        kv_top(x + u * w->L, w->L, n1 > safe ? n1 : safe, first);
        for (size_t i = 0; i < w->L; i++)
            y[u * w->L + i] = first[i] ? INFINITY : (y[u * w->L + i] + s->epsilon) * unit_value(w, s, KV_VALUE_WO_L1, l, u, i);
        kv_top(y + u * w->L, w->L, n[u], kept + u * w->L);
    }
    free(y);
}

/* A buffer of C keys takes a block, keeps the C least like its own mean direction, and so on. */
static void blocks(const kv_world *w, const kv_spec *s, size_t l, uint32_t C, bool *kept)
{
    for (size_t u = 0; u < w->U; u++)
        for (size_t from = C; from < w->L + (from == C); from += s->block_size) {
            double score[128], anchor[16] = {0};
            bool live[128], in[128];
            size_t to = from + s->block_size < w->L ? from + s->block_size : w->L;
            for (size_t i = 0; i < w->L; i++) live[i] = from == C ? i < to : (i < from && kept[u * w->L + i]) || (i >= from && i < to);
            for (size_t i = 0; i < w->L; i++)
                for (size_t j = 0; j < w->d && live[i]; j++) {
                    double norm = 0;
                    for (size_t k = 0; k < w->d; k++) norm += pow(kv_key(w, l, u, i)[k], 2);
                    anchor[j] += kv_key(w, l, u, i)[j] / sqrt(norm);
                }
            for (size_t i = 0; i < w->L; i++) {
                double dot = 0, kk = 0, aa = 0;
                for (size_t j = 0; j < w->d; j++) dot += anchor[j] * kv_key(w, l, u, i)[j], kk += pow(kv_key(w, l, u, i)[j], 2), aa += anchor[j] * anchor[j];
                score[i] = live[i] ? 3 - dot / sqrt(kk * aa) : 0; /* above zero, so that a relative distance means something */
                if (aa < 1e-3) kv_gap = 0;
            }
            kv_top(score, w->L, C, in);
            for (size_t i = 0; i < w->L; i++) kept[u * w->L + i] = in[i];
        }
}

/* What a policy keeps after the cut, by its twin: kept [layer][unit][L] from scores x of the same shape. */
static void twin(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, const double *x, uint32_t *n, bool *kept)
{
    uint32_t U = kv_units(w, s->granularity);
    counts_of(w, s, c, x, n);
    for (size_t l = 0; l < w->n_layer; l++) {
        size_t at = l * U * w->L;
        bool cut = n[l * U] < w->L || s->heads; /* adaptive heads may leave one whole and another not */
        if (s->select == KV_SELECT_CHUNKS) chunks(w, s, c, U, x + at, kept + at);
        else if (s->select == KV_SELECT_BLOCKS) blocks(w, s, l, c->tokens, kept + at);
        else if (s->select == KV_SELECT_TWO_STAGE && cut) two_stages(w, s, c, l, U, x + at, n + l * U, kept + at);
        else
            for (uint32_t u = 0; u < U; u++) kv_top(x + at + u * w->L, w->L, n[l * U + u], kept + at + u * w->L);
    }
}

/* ------------------------------------------------------------------------------------- the program's side */
static kv_status program(const kv_plan *p, size_t i, const kv_budget_resolved *c, kv_layer *layer, const kv_world *w, bool *kept, kv_error *e)
{
    const kv_ranking *rk = &p->ranking[p->ranking_of[i]];
    uint32_t n[8 * 32];
    kv_status st = kv_plan_counts(p, i, c, n, e);
    memset(kept, 0, (size_t)w->n_layer * rk->n_unit * w->L);
    for (uint32_t l = 0; l < w->n_layer && !st; l++) {
        kv_schedule sch = {0};
        bool scheduled = kv_schedule_needed(&p->spec[i]);
        if (scheduled) st = kv_schedule_make(p, i, c, n + l * rk->n_unit, &layer[l], &sch, e);
        for (size_t u = 0; u < rk->n_unit && !st; u++)
            for (uint32_t k = 0; k < w->L; k++) {
                size_t at = (l * rk->n_unit + u) * w->L;
                if (scheduled) kept[at + k] = kv_schedule_visible(&sch, p->scene, (uint32_t)u, k, 0);
                else if (k < n[l * rk->n_unit + u]) kept[at + rk->order[at + k]] = true;
            }
        if (scheduled) kv_schedule_free(&sch);
    }
    return st;
}

static void print_sets(const kv_world *w, uint32_t rows, const bool *got, const bool *want)
{
    for (uint32_t k = 0; k < rows; k++) {
        if (!memcmp(got + (size_t)k * w->L, want + (size_t)k * w->L, w->L)) continue;
        printf("    set %u, got / want:\n    ", k);
        for (size_t i = 0; i < w->L; i++) putchar(got[k * w->L + i] ? '1' : '.');
        printf("\n    ");
        for (size_t i = 0; i < w->L; i++) putchar(want[k * w->L + i] ? '1' : '.');
        putchar('\n');
    }
}

/* All policies of a list at all budgets in one world. */
static void compare(const kv_world *w, const char *policies, const char *budgets, kv_count *count)
{
    kv_spec *spec = NULL;
    kv_budget *budget = NULL;
    size_t n_spec = 0, n_budget = 0;
    kv_error e = {""};
    kv_plan plan = {0};
    kv_layer layer[8] = {{0}};
    kv_status st = kv_spec_parse(policies, &spec, &n_spec, &e);
    if (!st) st = kv_budget_parse(budgets, &budget, &n_budget, &e);
    if (!st) st = kv_plan_build(&w->scene, spec, n_spec, 1, &plan, &e);
    bool load = false;
    for (size_t i = 0; i < n_spec; i++) load |= kv_schedule_needed(&spec[i]);
    for (uint32_t l = 0; l < w->n_layer && load && !st; l++) st = kv_layer_load(&w->scene, l, plan.needs, plan.max_window, &layer[l], &e);
    size_t room = (size_t)w->n_layer * w->H * w->L;
    double *x = malloc(room * sizeof *x);
    bool *got = malloc(room), *want = malloc(room);
    uint32_t n[8 * 32];
    for (size_t i = 0; i < n_spec && !st; i++) {
        uint32_t U = kv_units(w, spec[i].granularity);
        for (size_t l = 0; l < w->n_layer; l++) scores_of(w, &spec[i], l, x + l * U * w->L);
        for (size_t b = 0; b < n_budget && !st; b++) {
            kv_budget_resolved c = kv_budget_resolve(&budget[b], w->L, 8, 1, 1);
            kv_gap = 1;
            twin(w, &spec[i], &c, x, n, want);
            st = program(&plan, i, &c, layer, w, got, &e);
            bool same = !st && !memcmp(got, want, (size_t)w->n_layer * U * w->L);
            size_t bad = count->bad;
            KV_COMPARE(count, same, "seed %llu L=%u layers=%u U=%u g=%u d=%u: %s at %s", (unsigned long long)w->s.seed, w->L, w->n_layer, w->U, w->g, w->d,
                       spec[i].canonical, budget[b].text);
            if (bad < 2 && count->bad > bad) print_sets(w, w->n_layer * U, got, want);
        }
    }
    CHECKF(!st, "seed %llu: %s: %s", (unsigned long long)w->s.seed, policies, e.msg);
    for (uint32_t l = 0; l < w->n_layer && load; l++) kv_layer_free(&layer[l]);
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    kv_plan_free(&plan);
    free(spec), free(budget), free(x), free(got), free(want);
}

/* ------------------------------------------------------------------------------------- worlds, policies and budgets by dice */
static uint32_t dice(kv_rng *r, uint32_t n)
{
    return (uint32_t)(kv_rng_next(r) >> 33) % n;
}

static const char *pick(kv_rng *r, const char *const *list)
{
    uint32_t n = 0;
    while (list[n]) n++;
    return list[dice(r, n)];
}
#define PICK(r, ...) pick(r, (const char *const[]){__VA_ARGS__, NULL})

static kv_tiny shape(kv_rng *r, uint64_t seed, uint32_t max_layers)
{
    static const uint32_t GROUP[] = {1, 3, 8}, LENGTH[] = {1, 2, 3, 5, 8, 9, 13, 21, 34, 45}, DIM[] = {2, 4, 8};
    uint32_t U = 1 + dice(r, 3), L = LENGTH[dice(r, 10)];
    return (kv_tiny){.n_layer = 1 + dice(r, max_layers), .n_q_head = U * GROUP[dice(r, 3)], .n_kv_head = U, .d = DIM[dice(r, 3)],
                     .n_token = L + 1 + dice(r, 2), .n_prompt = L, .wo = true, .flat = dice(r, 12) == 0, .seed = seed};
}

/* 0, 1, everything around the window and the length, and what kvpress calls ratios. */
static char *around(kv_rng *r, uint32_t L, uint32_t window)
{
    int64_t at[] = {0, 1, 2, window - 1, window, window + 1, L / 2, (int64_t)L - window - 1, (int64_t)L - window, (int64_t)L - window + 1, L - 1, L, L + 1, dice(r, L + 1)};
    char *out = kv_format("ratio=0.%u", 1 + dice(r, 8));
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

/* A score of attention with every option that scorers of attention read. */
static char *window_score(kv_rng *r, uint32_t window, const char *granularity)
{
    bool q = !strcmp(granularity, "query_head");
    return kv_format("score=window,window=%u,granularity=%s,row_reduce=%s,gamma=%s,group_reduce=%s,pooling=%s,kernel=%s,pool_first=%u", window, granularity,
                     window > 1 ? PICK(r, "sum", "mean", "mean+gamma*var", "max") : PICK(r, "sum", "mean", "max"), PICK(r, "200", "0", "7.5"),
                     q ? PICK(r, "none", "all") : PICK(r, "mean", "max", "sum", "all"), PICK(r, "none", "avgpool", "maxpool"), PICK(r, "1", "3", "5", "7", "21"),
                     dice(r, 2));
}

static const uint32_t WINDOWS[] = {1, 2, 3, 4, 8, 32};

static void test_scorers(void)
{
    kv_count count = {0};
    for (uint64_t seed = 1; seed <= 250; seed++) {
        kv_rng r = {seed};
        kv_tiny s = shape(&r, seed, 2);
        kv_world w;
        uint32_t window = WINDOWS[dice(&r, 6)];
        char *list = NULL, *budgets = around(&r, s.n_prompt, window);
        for (int k = 0; k < 4; k++) {
            char *score = window_score(&r, window, PICK(&r, "query_head", "kv_head", "layer"));
            append(&list, "recency:%s,value=%s,protect_sink=%u,protect_recent=%u", score, PICK(&r, "none", "norm", "head-max-l1", "wo-l1"), dice(&r, 3) ? 0 : dice(&r, 6),
                   dice(&r, 3) ? 0 : dice(&r, 12));
            free(score);
        }
        const char *gran = PICK(&r, "query_head", "kv_head", "layer");
        append(&list, "recency:score=colsum,granularity=%s,window=%u,per_row=%u,group_reduce=%s,pooling=%s,kernel=%s,pool_first=%u", gran, dice(&r, 2) * window,
               dice(&r, 2), !strcmp(gran, "query_head") ? PICK(&r, "none", "all") : PICK(&r, "mean", "max", "sum", "all"), PICK(&r, "none", "avgpool", "maxpool"),
               PICK(&r, "3", "7"), dice(&r, 2));
        append(&list, "recency:sinks=%u,granularity=%s,protect_sink=%u", dice(&r, 6), PICK(&r, "query_head", "kv_head", "layer"), dice(&r, 4));
        append(&list, "knorm:granularity=%s,window=%u,value=%s,skip_layers=%s", PICK(&r, "query_head", "kv_head", "layer"), dice(&r, 2) * window, PICK(&r, "none", "norm"),
               PICK(&r, "none", "0", "1"));
        append(&list, "oracle:granularity=%s,window=%u", PICK(&r, "query_head", "kv_head", "layer"), dice(&r, 2) * window);
        if (kv_world_open(&w, trace_path, &s)) compare(&w, list, budgets, &count);
        kv_world_close(&w);
        free(list), free(budgets);
    }
    kv_judge("scorers", &count, 25000);
}

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    trace_path = kv_format("%s/t.kvt", dir), table_path = kv_format("%s/table.npy", dir);
    test_scorers();
    char *rm = kv_format("rm -rf %s", dir);
    if (rm && system(rm)) perror("rm");
    free(rm), free(trace_path), free(table_path);
    return kv_tally();
}
