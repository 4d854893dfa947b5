/* test_twins.c - every scorer of attention, allocator and selection of the prompt's cut against a brute-force twin, on
 * seeded tiny traces of odd shapes (1 head, 1 token, L < window, groups of 1, 3 and 8, all keys equal) and budgets
 * around every boundary. The twins are written from the papers' arithmetic over full attention rows in double. Scorers
 * of kvpress's family have theirs in test_scorers.c, decode rules in test_twins_decode.c. */
#include <stdarg.h>

#include "tests/twins_scores.h"
#include "traces/npy.h"

static char dir[32], *trace_path, *table_path;
static float table[8 * 32]; /* head importances of the world at hand, [layer][query head] */

/* ------------------------------------------------------------------------------------- layers: entries per unit,
 * window included */
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
    double H = 0, V = 0;
    uint32_t n = scored(w, s);
    for (size_t h = 0; h < w->H; h++)
        for (size_t i = 0; i < n; i++) {
            double mean = 0;
            for (size_t r = n; r < w->L; r++) mean += kv_row(w, l, h, r)[i] / s->window;
            for (size_t r = n; r < w->L; r++) {
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

static void pyramid_layers(const kv_world *w, const kv_spec *s, int64_t C, int64_t *m)
{
    int64_t win = s->window, n = w->n_layer, room = scored(w, s), B = C - win, lo = B / (int64_t)s->beta,
            hi = 2 * B - lo, step = 0;
    if (hi >= room) hi = room, lo = 2 * B - hi;
    if (n > 1) step = (int64_t)floor((double)(hi - lo) / (double)(n - 1));
    for (int64_t l = 0; l < n; l++) m[l] = win + hi - l * step;
    if (s->layers == KV_LAYERS_PYRAMID_KVF && w->L < 2 * B)
        for (int64_t l = 0; l < n; l++) m[l] = C;
}

/* Real steps, rounded; the count includes the window. */
static void pyramid_kvpress(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, int64_t *m)
{
    double win = s->window, L = w->L, most = win + c->real, min = (most - win) / s->beta, max = (most - win) * 2 - min;
    if (max >= L - win) max = L - win, min = (most - win) * 2 - max;
    bool fits = L >= max && max >= min && min >= win;
    for (uint32_t l = 0; l < w->n_layer; l++) {
        double x = !fits ? c->real : l ? max - l * ((max - min) / (w->n_layer - 1.0)) : max;
        m[l] = (int64_t)nearbyint(x);
        if (c->real != floor(c->real) && fabs(x - floor(x) - 0.5) < 1e-9) kv_gap = 0;
    }
}

static double lava_entropy(const kv_world *w, const kv_spec *s, const double *x)
{
    double sum = 0, e = 0;
    uint32_t U = kv_units(w, s->granularity), n = scored(w, s);
    for (size_t u = 0; u < U; u++)
        for (size_t i = 0; i < n; i++) sum += x[u * w->L + i];
    for (size_t u = 0; u < U; u++)
        for (size_t i = 0; i < n; i++)
            e -= x[u * w->L + i] / (sum + 1e-16) * log(x[u * w->L + i] / (sum + 1e-16) + 1e-16);
    return e; /* the divisor ln(U n) is the same for all layers */
}

/* Real shares of the first `stage` layers. */
static void lava_shares(const kv_world *w, const kv_spec *s, const double *x, uint32_t stage, int64_t B, double *share)
{
    double sum = 0;
    size_t per_layer = (size_t)kv_units(w, s->granularity) * w->L;
    for (uint32_t l = 0; l < stage; l++) sum += share[l] = lava_entropy(w, s, x + l * per_layer);
    for (uint32_t l = 0; l < stage; l++) share[l] = (sum > 0 ? share[l] / sum : 1.0 / stage) * (double)(B * w->n_layer);
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
    for (size_t k = 0; k < (size_t)U * w->L; k++)
        y[k] = forced(w, s, k % w->L) ? -INFINITY : x[k] * (factor ? factor[k / w->L] : 1);
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
    for (uint32_t u = 0; u < U; u++)
        n[u] = (uint32_t)nearbyint(n[u] * (1 - s->alpha) + (double)(int64_t)(s->alpha * (double)B)) + s->window;
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

/* Python's a // b of floats: exact, where a / b may round up to the next whole number (11 // 1.1 is 9). */
static double floor_div(double a, double b)
{
    return nearbyint((a - fmod(a, b)) / b);
}

/* KVCache-Factory's form: the formula takes the whole C, and the window comes on top. */
static void table_heads(const kv_world *w, const kv_spec *s, uint32_t U, size_t l, uint32_t C, uint32_t *n)
{
    double sum = 0, pool = floor_div(C, s->beta);
    for (size_t k = 0; k < (size_t)w->n_layer * w->H; k++) sum += table[k];
    for (uint32_t u = 0; u < U; u++) {
        uint32_t first, count = kv_heads_of(w, s->granularity, u, &first);
        double caps = 0;
        for (size_t h = first; h < first + count; h++) {
            double cap = table[l * w->H + h] / sum * pool * w->n_layer * w->H + C - pool;
            kv_gap = fmin(kv_gap, fabs(cap - floor(cap) - 0.5)), caps += nearbyint(cap);
        }
        n[u] = (uint32_t)nearbyint(caps / count) + s->window;
    }
}

/* The repository's stages: a layer is cut at the first stage whose share is no more than what it scored, later and
 * smaller shares cut again; the floor is that of the nominal budget, window included. */
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
                uint32_t cap = (uint32_t)nearbyint(won[u] * (1 - s->alpha) + floor(s->alpha * C)) + s->window;
                if (cap < n[l * U + u]) n[l * U + u] = cap;
            }
        }
        free(y);
    }
}

/* ------------------------------------------------------------------------------------- counts of a policy at a budget
 */
static void counts_of(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, const double *x, uint32_t *n)
{
    uint32_t U = kv_units(w, s->granularity), L = w->L, C = s->guard == KV_GUARD_BEYOND ? (uint32_t)c->real : c->tokens;
    int64_t m[8], B = (int64_t)C - s->window;
    bool whole =
        s->keep_all || (s->guard == KV_GUARD_WINDOW && L <= C + s->window) || (s->guard == KV_GUARD_NONE && L <= C);
    bool cut = !whole && B >= 0 && scored(w, s); /* a budget below the window keeps its newest part */
    for (uint32_t l = 0; l < w->n_layer; l++) m[l] = whole ? L : C; /* beyond: each layer looks at its own share */
    if (!whole && s->layers == KV_LAYERS_PYRAMID_KVPRESS) {
        pyramid_kvpress(w, s, c, m);
    } else if (cut && s->layers == KV_LAYERS_CAKE) {
        cake_layers(w, s, B, m);
        for (uint32_t l = 0; l < w->n_layer; l++) m[l] += s->window;
    } else if (cut && s->layers == KV_LAYERS_LAVA) {
        lava_layers(w, s, x, B, m);
    } else if (cut && (s->layers == KV_LAYERS_PYRAMID_KVF || s->layers == KV_LAYERS_PYRAMID_FFY0)) {
        pyramid_layers(w, s, C, m);
    }
    for (uint32_t l = 0; l < w->n_layer; l++) {
        uint32_t *to = n + (size_t)l * U;
        const double *xl = x + (size_t)l * U * L;
        for (uint32_t u = 0; u < U; u++) to[u] = m[l] < L ? (uint32_t)m[l] : L;
        if (m[l] > L || m[l] < s->window || !cut) continue;
        if (s->heads == KV_HEADS_ADA) ada_heads(w, s, U, xl, m[l] - s->window, to);
        if (s->heads == KV_HEADS_POOL) flat(w, U, xl, (uint64_t)U * (uint64_t)m[l], to);
        if (s->heads == KV_HEADS_SAFEGUARD) safeguard_heads(w, s, U, xl, (uint32_t)m[l], to);
        if (s->heads == KV_HEADS_TABLE) table_heads(w, s, U, l, C, to);
    }
    if (cut && s->layers == KV_LAYERS_POOL) flat(w, w->n_layer * U, x, (uint64_t)w->n_layer * U * C, n);
    if (cut && s->layers == KV_LAYERS_LAVA_CODE) lava_code(w, s, x, C, n);
    for (uint32_t k = 0; k < w->n_layer * U; k++) n[k] = s->skip_layers[0] >> (k / U) & 1 || n[k] > L ? L : n[k];
}

/* ------------------------------------------------------------------------------------- selections: kept [unit][L] of a
 * layer */
/* Scores as kvpress pads them: protected positions hold the layer's maximum plus one. */
static double *padded(const kv_world *w, const kv_spec *s, uint32_t U, const double *x)
{
    double *y = bare(w, s, U, x, NULL), max = -INFINITY;
    for (size_t k = 0; k < (size_t)U * w->L; k++) max = fmax(max, y[k]);
    for (size_t k = 0; k < (size_t)U * w->L; k++)
        if (forced(w, s, k % w->L)) y[k] = max + 1;
    return y;
}

static void chunks(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, uint32_t U, const double *x,
                   bool *kept)
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
static void two_stages(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, size_t l, uint32_t U,
                       const double *x, const uint32_t *n, bool *kept)
{
    double *y = padded(w, s, U, x);
    for (uint32_t u = 0; u < U; u++) {
        bool first[128];
        bool ada = s->heads == KV_HEADS_SAFEGUARD;
        uint32_t safe = ada ? (uint32_t)(c->tokens * s->alpha) : 0,
                 n1 = (uint32_t)((ada ? n[u] : c->real) * s->first_stage_ratio);
        kv_top(x + u * w->L, w->L, n1 > safe ? n1 : safe, first);
        for (size_t i = 0; i < w->L; i++)
            y[u * w->L + i] =
                first[i] ? INFINITY : (y[u * w->L + i] + s->epsilon) * unit_value(w, s, KV_VALUE_WO_L1, l, u, i);
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
            for (size_t i = 0; i < w->L; i++)
                live[i] = from == C ? i < to : (i < from && kept[u * w->L + i]) || (i >= from && i < to);
            for (size_t i = 0; i < w->L; i++)
                for (size_t j = 0; j < w->d && live[i]; j++) {
                    double norm = 0;
                    for (size_t k = 0; k < w->d; k++) norm += pow(kv_key(w, l, u, i)[k], 2);
                    anchor[j] += kv_key(w, l, u, i)[j] / sqrt(norm);
                }
            for (size_t i = 0; i < w->L; i++) {
                double dot = 0, kk = 0, aa = 0;
                for (size_t j = 0; j < w->d; j++)
                    dot += anchor[j] * kv_key(w, l, u, i)[j], kk += pow(kv_key(w, l, u, i)[j], 2),
                        aa += anchor[j] * anchor[j];
                score[i] =
                    live[i] ? 3 - dot / sqrt(kk * aa) : 0; /* above zero, so that a relative distance means something */
                if (aa < 1e-3) kv_gap = 0;
            }
            kv_top(score, w->L, C, in);
            for (size_t i = 0; i < w->L; i++) kept[u * w->L + i] = in[i];
        }
}

/* Whole pages by their best position, as many as fit. */
static void pages(const kv_world *w, const kv_spec *s, uint32_t U, uint32_t C, const double *x, bool *kept)
{
    uint32_t n = (w->L + s->page - 1) / s->page;
    for (uint32_t u = 0; u < U; u++) {
        double best[128];
        bool in[128];
        for (uint32_t k = 0; k < n; k++) best[k] = -INFINITY;
        for (uint32_t i = 0; i < w->L; i++) best[i / s->page] = fmax(best[i / s->page], x[u * w->L + i]);
        kv_top(best, n, C >= w->L ? n : C / s->page, in);
        for (uint32_t i = 0; i < w->L; i++) kept[u * w->L + i] = in[i / s->page];
    }
}

/* What a policy keeps after the cut, by its twin: kept [layer][unit][L] from scores x of the same shape. */
static void twin(const kv_world *w, const kv_spec *s, const kv_budget_resolved *c, const double *x, uint32_t *n,
                 bool *kept)
{
    uint32_t U = kv_units(w, s->granularity);
    counts_of(w, s, c, x, n);
    for (size_t l = 0; l < w->n_layer; l++) {
        size_t at = l * U * w->L;
        bool cut = n[l * U] < w->L || s->heads; /* adaptive heads may leave one whole and another not */
        if (s->page > 1)
            pages(w, s, U, n[l * U], x + at, kept + at);
        else if (s->select == KV_SELECT_CHUNKS && w->L >= s->chunk_length)
            chunks(w, s, c, U, x + at, kept + at);
        else if (s->select == KV_SELECT_BLOCKS)
            blocks(w, s, l, c->tokens, kept + at);
        else if (s->select == KV_SELECT_TWO_STAGE && cut)
            two_stages(w, s, c, l, U, x + at, n + l * U, kept + at);
        else
            for (uint32_t u = 0; u < U; u++) kv_top(x + at + u * w->L, w->L, n[l * U + u], kept + at + u * w->L);
    }
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

/* Below the window no source says what these two keep: their formulas give a head more than the whole budget. */
static bool undefined(const kv_spec *s, const kv_budget_resolved *c)
{
    return c->tokens < s->window && (s->heads == KV_HEADS_TABLE || s->layers == KV_LAYERS_LAVA_CODE);
}

/* What CAKE's decode may hold: the last stage's budgets, or C - w everywhere when the prompt was not cut. */
static bool decode_keeps(const kv_world *w, const kv_plan *p, size_t i, const kv_budget_resolved *c, kv_error *e)
{
    kv_spec last = p->spec[i];
    int64_t b[8], B = (int64_t)c->tokens - last.window;
    bool same = true;
    last.cascading = 0;
    cake_layers(w, &last, B, b);
    for (uint32_t l = 0; l < w->n_layer; l++) {
        uint32_t keep = 0;
        same &= !kv_plan_decode_keep(p, i, c, l, &keep, e) && keep == (w->L <= c->tokens + last.window ? B : b[l]);
    }
    return same;
}

/* All policies of a list at all budgets in one world. */
static void compare(const kv_world *w, const char *policies, const char *budgets, kv_count *count)
{
    kv_budget *budget = NULL;
    size_t n_budget = 0, room = (size_t)w->n_layer * w->H * w->L, rows = w->N - w->L + 1;
    kv_error e = {""};
    kv_run run;
    kv_status st = kv_run_open(&run, w, policies, &e);
    if (!st) st = kv_budget_parse(budgets, &budget, &n_budget, &e);
    double *x = malloc(room * sizeof *x);
    bool *got = malloc(room), *want = malloc(room), *seen = malloc(w->H * rows * w->N);
    uint32_t n[8 * 32], twins[8 * 32];
    for (size_t i = 0; i < run.n_spec && !st; i++) {
        const kv_spec *s = &run.spec[i];
        uint32_t U = kv_units(w, s->granularity);
        for (size_t l = 0; l < w->n_layer; l++) scores_of(w, s, l, x + l * U * w->L);
        for (size_t b = 0; b < n_budget && !st; b++) {
            kv_budget_resolved c = kv_budget_resolve(&budget[b], w->L, 8, 1, 1);
            if (undefined(s, &c)) continue;
            kv_gap = 1;
            twin(w, s, &c, x, twins, want);
            st = kv_plan_counts(&run.plan, i, &c, n, &e);
            for (uint32_t l = 0; l < w->n_layer && !st; l++) {
                st = kv_run_seen(&run, w, i, &c, n, l, seen, &e);
                for (size_t u = 0; u < U && !st; u++) memcpy(got + (l * U + u) * w->L, seen + u * rows * w->N, w->L);
            }
            bool same = !st && !memcmp(got, want, (size_t)w->n_layer * U * w->L);
            if (s->layers == KV_LAYERS_CAKE && c.tokens >= s->window && scored(w, s))
                same &= decode_keeps(w, &run.plan, i, &c, &e);
            size_t bad = count->bad;
            KV_COMPARE(count, same, "seed %llu L=%u layers=%u U=%u g=%u d=%u: %s at %s", (unsigned long long)w->s.seed,
                       w->L, w->n_layer, w->U, w->g, w->d, s->canonical, budget[b].text);
            if (bad < 2 && count->bad > bad) print_sets(w, w->n_layer * U, got, want);
        }
    }
    CHECKF(!st, "seed %llu: %s: %s", (unsigned long long)w->s.seed, policies, e.msg);
    kv_run_close(&run);
    free(budget), free(x), free(got), free(want), free(seen);
}

/* ------------------------------------------------------------------------------------- worlds, policies and budgets by
 * dice */
static const char *pick(kv_rng *r, const char *const *list)
{
    uint32_t n = 0;
    while (list[n]) n++;
    return list[kv_dice(r, n)];
}
#define PICK(r, ...) pick(r, (const char *const[]){__VA_ARGS__, NULL})

static kv_tiny shape(kv_rng *r, uint64_t seed, uint32_t max_layers)
{
    static const uint32_t GROUP[] = {1, 3, 8}, LENGTH[] = {1, 2, 3, 5, 8, 9, 13, 21, 34, 45}, DIM[] = {2, 4, 8};
    uint32_t U = 1 + kv_dice(r, 3), L = LENGTH[kv_dice(r, 10)];
    return (kv_tiny){.n_layer = 1 + kv_dice(r, max_layers),
                     .n_q_head = U * GROUP[kv_dice(r, 3)],
                     .n_kv_head = U,
                     .d = DIM[kv_dice(r, 3)],
                     .n_token = L + 1 + kv_dice(r, 2),
                     .n_prompt = L,
                     .wo = true,
                     .flat = kv_dice(r, 12) == 0,
                     .seed = seed};
}

/* 0, 1, everything around the window and the length, and what kvpress calls ratios. */
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
                    kv_dice(r, L + 1)};
    char *out = kv_format("ratio=0.%u", 1 + kv_dice(r, 8));
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
    return kv_format("score=window,window=%u,granularity=%s,row_reduce=%s,gamma=%s,group_reduce=%s,pooling=%s,kernel=%"
                     "s,pool_first=%u",
                     window, granularity,
                     window > 1 ? PICK(r, "sum", "mean", "mean+gamma*var", "max") : PICK(r, "sum", "mean", "max"),
                     PICK(r, "200", "0", "7.5"), q ? PICK(r, "none", "all") : PICK(r, "mean", "max", "sum", "all"),
                     PICK(r, "none", "avgpool", "maxpool"), PICK(r, "1", "3", "5", "7", "21"), kv_dice(r, 2));
}

static const uint32_t WINDOWS[] = {1, 2, 3, 4, 8, 32};

static void test_scorers(void)
{
    kv_count count = {0};
    for (uint64_t seed = 1; seed <= 250; seed++) {
        kv_rng r = {seed};
        kv_tiny s = shape(&r, seed, 2);
        kv_world w;
        uint32_t window = WINDOWS[kv_dice(&r, 6)];
        char *list = NULL, *budgets = around(&r, s.n_prompt, window);
        for (int k = 0; k < 4; k++) {
            char *score = window_score(&r, window, PICK(&r, "query_head", "kv_head", "layer"));
            /* no source says whether a factor per head comes before or after a mean over all heads */
            bool layer = strstr(score, "granularity=layer") || strstr(score, "group_reduce=all");
            append(&list, "recency:%s,page=%s,value=%s,protect_sink=%u,protect_recent=%u", score,
                   PICK(&r, "1", "1", "1", "2", "3", "16"),
                   PICK(&r, "none", "norm", "wo-l1", layer ? "none" : "head-max-l1"),
                   kv_dice(&r, 3) ? 0 : kv_dice(&r, 6), kv_dice(&r, 3) ? 0 : kv_dice(&r, 12));
            free(score);
        }
        const char *gran = PICK(&r, "query_head", "kv_head", "layer");
        append(&list,
               "recency:score=colsum,granularity=%s,window=%u,per_row=%u,group_reduce=%s,pooling=%s,kernel=%s,pool_"
               "first=%u",
               gran, kv_dice(&r, 2) * window, kv_dice(&r, 2),
               !strcmp(gran, "query_head") ? PICK(&r, "none", "all") : PICK(&r, "mean", "max", "sum", "all"),
               PICK(&r, "none", "avgpool", "maxpool"), PICK(&r, "3", "7"), kv_dice(&r, 2));
        append(&list, "recency:sinks=%u,granularity=%s,protect_sink=%u", kv_dice(&r, 6),
               PICK(&r, "query_head", "kv_head", "layer"), kv_dice(&r, 4));
        append(&list, "knorm:granularity=%s,window=%u,value=%s,skip_layers=%s",
               PICK(&r, "query_head", "kv_head", "layer"), kv_dice(&r, 2) * window, PICK(&r, "none", "norm"),
               PICK(&r, "none", "0", "1"));
        append(&list, "oracle:granularity=%s,window=%u", PICK(&r, "query_head", "kv_head", "layer"),
               kv_dice(&r, 2) * window);
        if (kv_world_open(&w, trace_path, &s)) compare(&w, list, budgets, &count);
        kv_world_close(&w);
        free(list), free(budgets);
    }
    kv_judge("scorers", &count, 25000);
}

/* Layer and head allocations over one ranking each, and the plain names and presets that are made of them. */
static void test_allocators(void)
{
    kv_count count = {0};
    for (uint64_t seed = 1001; seed <= 1300; seed++) {
        kv_rng r = {seed};
        kv_tiny s = shape(&r, seed, 5);
        kv_world w;
        uint32_t window = WINDOWS[kv_dice(&r, 5)];
        char *list = NULL, *budgets = around(&r, s.n_prompt, window);
        const size_t rows[2] = {s.n_layer, s.n_q_head};
        kv_error e;
        for (size_t k = 0; k < rows[0] * rows[1]; k++) table[k] = (float)kv_rng_unit(&r);
        CHECK(!kv_npy_write(table_path, "<f4", 2, rows, table, &e));
        for (int k = 0; k < 6; k++) {
            const char *gran = PICK(&r, "query_head", "kv_head", "kv_head", "layer");
            char *score = window_score(&r, window, gran);
            const char *layers = PICK(&r, "uniform", "uniform", "pyramid-kvf", "pyramid-ffy0", "pyramid-kvpress",
                                      "cake", "lava", "lava-code", "pool");
            const char *heads = !strcmp(layers, "lava-code") || !strcmp(layers, "pool") ? "uniform"
                                : !strcmp(layers, "uniform") ? PICK(&r, "uniform", "ada", "pool", "safeguard")
                                                             : PICK(&r, "uniform", "ada", "pool");
            if (!strcmp(layers, "cake") && window < 2) layers = "uniform";
            append(&list,
                   "recency:%s,layers=%s,heads=%s,alpha=%s,normalize=%u,beta=%s,guard=%s,cascading=%u,tau1=%s,tau2=%s",
                   score, layers, heads, PICK(&r, "0", "0.2", "0.5", "1"), kv_dice(&r, 2), PICK(&r, "2", "7", "20"),
                   !strcmp(layers, "uniform") || strstr(layers, "pyramid-ffy0") ? PICK(&r, "none", "window", "beyond")
                                                                                : PICK(&r, "none", "window"),
                   kv_dice(&r, 2), PICK(&r, "1", "1.6", "0.5"), PICK(&r, "1", "0.4", "2"));
            free(score);
        }
        append(&list, "oracle:window=%u,layers=pool,oracle:window=%u,heads=pool,knorm:window=%u,heads=ada,full", window,
               window, window);
        append(&list, "knorm:window=%u,granularity=%s,heads=table,importance=%s,beta=%s,guard=%s", window,
               PICK(&r, "query_head", "kv_head", "layer"), table_path,
               PICK(&r, "1.005", "1.01", "1.1", "1.5", "2", "10"), PICK(&r, "none", "beyond"));
        if (kv_world_open(&w, trace_path, &s)) compare(&w, list, budgets, &count);
        kv_world_close(&w);
        free(list), free(budgets);
    }
    kv_judge("allocators", &count, 25000);
}

static void test_selections(void)
{
    kv_count count = {0};
    for (uint64_t seed = 2001; seed <= 2250; seed++) {
        kv_rng r = {seed};
        kv_tiny s = shape(&r, seed, 2);
        kv_world w;
        uint32_t window = WINDOWS[kv_dice(&r, 5)];
        char *list = NULL, *budgets = around(&r, s.n_prompt, window);
        char *score = window_score(&r, window, PICK(&r, "query_head", "kv_head", "layer")),
             *kv = window_score(&r, window, "kv_head");
        append(&list, "recency:%s,select=chunks,chunk_length=%s", score, PICK(&r, "1", "2", "3", "5", "20"));
        append(&list, "knorm:window=0,select=chunks,chunk_length=%s", PICK(&r, "1", "2", "3", "5", "20"));
        append(&list, "recency:%s,select=two-stage,epsilon=%s,first_stage_ratio=%s", kv, PICK(&r, "0.0001", "0", "0.1"),
               PICK(&r, "0.5", "0", "0.25", "1"));
        append(&list, "recency:%s,select=two-stage,epsilon=0.0001,heads=safeguard,alpha=%s", kv,
               PICK(&r, "0.2", "0.5", "0"));
        append(&list, "kvpress.block_keydiff:block_size=%s", PICK(&r, "1", "3", "4", "16", "128"));
        if (kv_world_open(&w, trace_path, &s)) compare(&w, list, budgets, &count);
        kv_world_close(&w);
        free(list), free(budgets), free(score), free(kv);
    }
    kv_judge("selections", &count, 10000);
}

/* ADJUST in integers, against its twin. */
static void test_adjust(void)
{
    kv_rng r = {42};
    uint32_t bad = 0;
    for (int round = 0; round < 20000; round++) {
        uint32_t n = 1 + kv_dice(&r, 6);
        double x[6], sum = 0;
        int64_t total = kv_dice(&r, 200), cap = kv_dice(&r, 80), got[6], want[6];
        for (uint32_t i = 0; i < n; i++) sum += x[i] = exp(2 * kv_rng_normal(&r));
        for (uint32_t i = 0; i < n; i++) x[i] = n > 1 ? x[i] / sum * (double)total : (double)total;
        adjust(x, n, total, cap, want);
        bad += kv_cake_adjust(x, n, total, cap, got, NULL) || memcmp(got, want, n * sizeof *got);
    }
    CHECKF(bad == 0, "%u of 20000 differ", bad);
}

int main(void)
{
    if (!kv_scratch(dir)) return 1;
    trace_path = kv_format("%s/t.kvt", dir), table_path = kv_format("%s/table.npy", dir);
    test_adjust();
    test_scorers();
    test_allocators();
    test_selections();
    kv_scratch_remove(dir);
    free(trace_path), free(table_path);
    return kv_tally();
}
