/* oracle_rows.c - sets with foresight that change from row to row (policies.md 9: O8, O9, O11). Mass is the recorded
 * one (raw), summed over the query heads of a unit. */
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/future.h"
#include "sim/scorer.h"
#include "traces/cli.h"

static void see(uint8_t *mask, uint32_t i)
{
    mask[i / 8] |= (uint8_t)(1u << (i % 8));
}

/* O8, one cut's slots: every row sees its own best `count` positions of the prompt, protected ones first, and all
 * later tokens. mass [n_row][n_token]; order: the ranking of the unit. */
static kv_status own_prompt(const kv_scene *sc, const float *mass, const uint32_t *order, uint32_t n_forced,
                            uint32_t count, uint32_t unit, kv_schedule *out, kv_error *err)
{
    uint32_t L = sc->n_cut, N = sc->n_token, *best = NULL;
    size_t bytes = (N + 7) / 8;
    bool *forced = NULL;
    kv_status st = kv_array(&best, L, sizeof *best, err);
    if (!st) st = kv_array(&forced, L, sizeof *forced, err);
    for (uint32_t k = 0; k < n_forced && k < count && !st; k++) forced[order[k]] = true;
    for (uint32_t r = 0; r <= sc->n_row && !st; r++) {
        uint8_t *mask = out->seen + ((size_t)r * out->n_unit + unit) * bytes;
        uint32_t left = count, row = r < sc->n_row ? r : sc->n_row - 1; /* after the last: what the last one saw */
        for (uint32_t i = L; i < N; i++) see(mask, i);
        for (uint32_t k = 0; k < n_forced && left; k++, left--) see(mask, order[k]);
        if (!kv_rank(L, mass + (size_t)row * N, best)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (uint32_t k = 0; k < L && left && !st; k++)
            if (!forced[best[k]]) see(mask, best[k]), left--;
    }
    free(best), free(forced);
    return st;
}

/* O8, a cache of `capacity` entries: every row sees its own best of all earlier tokens, and itself. */
static kv_status own_tokens(const kv_scene *sc, const float *mass, uint32_t capacity, uint32_t unit, kv_schedule *out,
                            kv_error *err)
{
    uint32_t N = sc->n_token, *best = NULL;
    size_t bytes = (N + 7) / 8;
    kv_status st = kv_array(&best, N, sizeof *best, err);
    for (uint32_t r = 0; r <= sc->n_row && !st; r++) {
        uint8_t *mask = out->seen + ((size_t)r * out->n_unit + unit) * bytes;
        uint32_t row = r < sc->n_row ? r : sc->n_row - 1, own = sc->row_first + r;
        if (!kv_rank(own, mass + (size_t)row * N, best)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (uint32_t k = 0; k < own && k < capacity && !st; k++) see(mask, best[k]);
        for (uint32_t i = own; i < N; i++) see(mask, i); /* itself, and what no row asks about yet */
    }
    free(best);
    return st;
}

/* Positions that arrive with row r, in order: the question behind --cut context comes with row 0. */
static uint32_t arrivals(const kv_drops *d, uint32_t r, uint32_t *from)
{
    *from = r ? d->row_first + r : d->n_cut;
    return d->row_first + r + 1 - *from;
}

/* Drop what has least to give from row `row` on until the cache fits. */
static void shrink(const kv_drops *d, uint32_t row, uint32_t *cache, uint32_t *n, int32_t *at)
{
    const float *rest = d->remain + (size_t)row * d->n_token;
    while (*n > d->capacity) {
        uint32_t worst = 0;
        for (uint32_t k = 1; k < *n; k++)
            if (rest[cache[k]] < rest[cache[worst]] ||
                (rest[cache[k]] == rest[cache[worst]] && cache[k] < cache[worst]))
                worst = k;
        at[cache[worst]] = (int32_t)row;
        cache[worst] = cache[--*n];
    }
}

/* What the cut leaves of live: the `capacity` that have most to give, by rank; the others leave before row 0. */
static kv_status cut(const kv_drops *d, const uint32_t *live, uint32_t n_live, uint32_t *cache, uint32_t *n,
                     int32_t *at, kv_error *err)
{
    float *rest = NULL;
    uint32_t *order = NULL;
    kv_status st = kv_array(&rest, n_live, sizeof *rest, err);
    if (!st) st = kv_array(&order, n_live, sizeof *order, err);
    for (uint32_t k = 0; k < n_live && !st; k++) rest[k] = d->remain[live[k]];
    if (!st && !kv_rank(n_live, rest, order)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    *n = 0;
    for (uint32_t k = 0; k < n_live && !st; k++)
        if (k < d->capacity)
            cache[(*n)++] = live[order[k]];
        else
            at[live[order[k]]] = 0;
    free(rest), free(order);
    return st;
}

kv_status kv_drops_greedy(const kv_drops *d, const uint32_t *live, uint32_t n_live, int32_t *at, kv_error *err)
{
    uint32_t *cache = NULL, n = 0;
    kv_status st = kv_array(&cache, d->n_token, sizeof *cache, err);
    if (!st) st = cut(d, live, n_live, cache, &n, at, err);
    for (uint32_t r = 0; r < d->n_row && !st; r++) {
        uint32_t from, new = arrivals(d, r, &from);
        for (uint32_t k = 0; k < new; k++) cache[n++] = from + k;
        shrink(d, r + 1, cache, &n, at);
    }
    free(cache);
    return st;
}

/* ------------------------------------------------------------------------------------------------ exact
 * Transport of tokens to the times they leave. Node t <= n_row: "leaves before row t", with as many places as must be
 * dropped then; the last node: stays, `capacity` places, cost 0. A token that arrives with row t when the cache is full
 * brings one more place at node t + 1; the assignment stays optimal when it is changed along a shortest path from the
 * token to there, because a new token and a new place close no cycle. An edge s -> u is the cheapest move of a token
 * from s to u. */
typedef struct {
    const kv_drops *d;
    uint32_t n_node, stays;
    int32_t *of;         /* [n_token] node of a token, -1 = not in the game */
    uint32_t *born;      /* [n_token] first node it can be at */
    int64_t *price;      /* [n_token][n_node] what it gives up there */
    int64_t *cost;       /* [n_node][n_node] of the cheapest move */
    uint32_t *move;      /* [n_node][n_node] its token */
    int64_t *dist;       /* [n_node] */
    uint32_t *by, *from; /* [n_node] token that moves in, node it comes from (n_node: the new token) */
} flow;
#define FAR INT64_MAX

/* The node behind u among 0..last and "stays". */
static uint32_t next_node(const flow *f, uint32_t u, uint32_t last)
{
    return u == last ? f->stays : u + 1;
}

/* Is moving token i from s to u the cheapest so far? */
static void offer(flow *f, uint32_t i, uint32_t s, uint32_t u)
{
    const int64_t *p = f->price + (size_t)i * f->n_node;
    size_t at = (size_t)s * f->n_node + u;
    if (u != s && p[u] - p[s] < f->cost[at]) f->cost[at] = p[u] - p[s], f->move[at] = i;
}

/* Cheapest moves out of node s. */
static void edges(flow *f, uint32_t s, uint32_t last)
{
    for (uint32_t u = 0; u < f->n_node; u++) f->cost[(size_t)s * f->n_node + u] = FAR;
    for (uint32_t i = 0; i < f->d->n_token; i++)
        for (uint32_t u = f->of[i] == (int32_t)s ? f->born[i] : f->n_node; u < f->n_node; u = next_node(f, u, last))
            offer(f, i, s, u);
}

/* Shortest paths from the token (Bellman and Ford: costs may be negative). */
static void paths(flow *f, uint32_t token, uint32_t last)
{
    uint32_t n = f->n_node;
    for (uint32_t u = 0; u < n; u++) {
        bool open = (u <= last || u == f->stays) && u >= f->born[token];
        f->dist[u] = open ? f->price[(size_t)token * n + u] : FAR;
        f->by[u] = token, f->from[u] = n;
    }
    for (bool changed = true; changed;) {
        changed = false;
        for (uint32_t s = 0; s < n; s = next_node(f, s, last)) {
            if (f->dist[s] == FAR) continue;
            for (uint32_t u = 0; u < n; u = next_node(f, u, last)) {
                int64_t c = f->cost[(size_t)s * n + u];
                if (c == FAR || f->dist[s] + c >= f->dist[u]) continue;
                f->dist[u] = f->dist[s] + c, f->by[u] = f->move[(size_t)s * n + u], f->from[u] = s;
                changed = true;
            }
        }
    }
}

kv_status kv_drops_exact(const kv_drops *d, const uint32_t *live, uint32_t n_live, int32_t *at, kv_error *err)
{
    uint32_t n = d->n_row + 2, stays = d->n_row + 1, room = d->capacity, n_held = 0, *held = NULL, *dirty = NULL;
    flow f = {.d = d, .n_node = n, .stays = stays};
    kv_status st = kv_array(&f.of, d->n_token, sizeof *f.of, err);
    if (!st) st = kv_array(&f.born, d->n_token, sizeof *f.born, err);
    if (!st) st = kv_array(&f.price, (size_t)n * d->n_token, sizeof *f.price, err);
    if (!st) st = kv_array(&f.cost, (size_t)n * n, sizeof *f.cost, err);
    if (!st) st = kv_array(&f.move, (size_t)n * n, sizeof *f.move, err);
    if (!st) st = kv_array(&f.dist, n, sizeof *f.dist, err);
    if (!st) st = kv_array(&f.by, n, sizeof *f.by, err);
    if (!st) st = kv_array(&f.from, n, sizeof *f.from, err);
    if (!st) st = kv_array(&dirty, n, sizeof *dirty, err);
    if (!st) st = kv_array(&held, n_live, sizeof *held, err);
    if (!st) st = cut(d, live, n_live, held, &n_held, at, err);
    if (st) goto out;
    for (uint32_t i = 0; i < d->n_token; i++) f.of[i] = -1;
    for (size_t u = 0; u <= d->n_row; u++)
        for (size_t i = 0; i < d->n_token; i++)
            f.price[i * n + u] = (int64_t)(d->remain[u * d->n_token + i] * 0x1p40 + 0.5);
    for (uint32_t k = 0; k < n_live; k++) f.of[live[k]] = 0;
    for (uint32_t k = 0; k < n_held; k++) f.of[held[k]] = (int32_t)stays;
    room -= n_held;
    for (uint32_t s = 0; s < n; s++) edges(&f, s, 0);
    for (uint32_t r = 0; r < d->n_row && !st; r++) {
        uint32_t from, new = arrivals(d, r, &from), last = r + 1;
        for (uint32_t s = 0; s < n; s = next_node(&f, s, last)) f.cost[(size_t)s * n + last] = FAR;
        for (uint32_t i = 0; i < d->n_token; i++) /* every token may now be at `last` too */
            if (f.of[i] >= 0) offer(&f, i, (uint32_t)f.of[i], last);
        for (uint32_t k = 0; k < new && !st; k++) {
            uint32_t token = from + k, n_dirty = 0;
            f.born[token] = last;
            if (room) {
                f.of[token] = (int32_t)stays, room--;
                for (uint32_t u = last; u < stays; u = next_node(&f, u, last)) offer(&f, token, stays, u);
                continue;
            }
            paths(&f, token, last);
            for (uint32_t u = last; u < n; u = f.from[u]) { /* every token on the path moves on, from the end */
                f.of[f.by[u]] = (int32_t)u;
                dirty[n_dirty++] = u;
            }
            for (uint32_t j = 0; j < n_dirty; j++) edges(&f, dirty[j], last);
            if (kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
        }
    }
    for (uint32_t i = 0; i < d->n_token && !st; i++)
        if (f.of[i] >= 0 && f.of[i] < (int32_t)stays) at[i] = f.of[i];
out:
    free(f.of), free(f.born), free(f.price), free(f.cost), free(f.move), free(f.dist), free(f.by), free(f.from);
    free(dirty), free(held);
    return st;
}

/* ------------------------------------------------------------------------------------------------ one layer */
/* mass [n_row][n_token] becomes remain, whose last row is zero. */
static void suffix_sums(const kv_scene *sc, float *mass, double *acc)
{
    size_t N = sc->n_token;
    memset(acc, 0, N * sizeof *acc);
    for (uint32_t r = sc->n_row; r-- > 0;)
        for (size_t i = 0; i < N; i++) acc[i] += mass[r * N + i], mass[r * N + i] = (float)acc[i];
}

/* Entries a cache of this budget may hold: one of more than L grows before anything leaves. */
static uint32_t entries_of(const kv_budget_resolved *c, uint32_t L)
{
    return c->real > L ? (uint32_t)fmin(c->real, KV_BUDGET_TOKENS_MAX) : c->tokens;
}

static kv_status drops(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *order, uint32_t count,
                       float *remain, uint32_t unit, kv_schedule *out, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_scene *sc = p->scene;
    uint32_t L = sc->n_cut, N = sc->n_token;
    int32_t *at = out->at + (size_t)unit * N;
    double *acc = NULL;
    kv_status st = kv_array(&acc, N, sizeof *acc, err);
    if (st) return st;
    suffix_sums(sc, remain, acc);
    bool whole = s->prompt_cut || count == L; /* the rule cuts the prompt, or nothing did */
    kv_drops d = {sc->n_row, N, sc->row_first, L, whole ? entries_of(c, L) : count, remain};
    if (whole) count = L;
    for (uint32_t k = count; k < L; k++) at[order[k]] = 0;
    st = s->decode == KV_DECODE_MATCH ? kv_drops_exact(&d, order, count, at, err)
                                      : kv_drops_greedy(&d, order, count, at, err);
    free(acc);
    return st;
}

kv_status kv_oracle_rows(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                         kv_schedule *out, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_scene *sc = p->scene;
    const kv_ranking *rk = &p->ranking[p->ranking_of[i]];
    bool steps = !s->decode || s->decode == KV_DECODE_STEPS;
    size_t N = sc->n_token;
    float *mass = NULL;
    double *sum = NULL, *worth = NULL;
    kv_status st = kv_array(&mass, ((size_t)sc->n_row + 1) * N, sizeof *mass, err);
    if (!st) st = kv_array(&sum, (size_t)l->n_q_head * l->L, sizeof *sum, err);
    if (!st) st = kv_array(&worth, l->n_q_head, sizeof *worth, err);
    if (!st) st = kv_future_mass(l, sc->n_row, sum, err);
    if (!st) kv_future_worth(l, s->target, sum, worth);
    if (!st && steps) st = kv_array(&out->seen, ((size_t)sc->n_row + 1) * out->n_unit * ((N + 7) / 8), 1, err);
    for (uint32_t u = 0; u < out->n_unit && !st; u++) {
        size_t at = (size_t)l->order * out->n_unit + u;
        const uint32_t *order = rk->order + at * l->L;
        uint32_t first, heads, count = counts[at];
        kv_unit_heads(l, rk->granularity, u, &first, &heads);
        memset(mass + (size_t)sc->n_row * N, 0, N * sizeof *mass);
        st = kv_future_rows(l, first, heads, s->target, worth, mass, err);
        if (st) break;
        if (!s->decode)
            st = own_prompt(sc, mass, order, rk->n_forced, count, u, out, err);
        else if (steps)
            st = own_tokens(sc, mass, entries_of(c, l->L), u, out, err);
        else
            st = drops(p, i, c, order, count, mass, u, out, err);
    }
    free(mass), free(sum), free(worth);
    return st;
}
