/* schedule.h - kept sets that are not a prefix of a ranking: decode rules (an entry leaves after some row) and selections that depend
 * on the budget (two stages, blocks). Made for one layer at a time, from the layer's data. */
#ifndef KV_SCHEDULE_H
#define KV_SCHEDULE_H

#include "sim/plan.h"

typedef struct {
    uint32_t n_unit;
    int32_t *at;   /* [n_unit][n_token] evicted_at: -1 = never, t = visible to measured rows before row t and to none after (0 = gone
                      when the prompt is cut) */
    uint8_t *seen; /* NULL, or [n_row+1][n_unit][(n_token+7)/8]: bit p of row r = row r may attend to p (entry n_row: the row after
                      the last), for rules whose entries come back; `at` is then -1 throughout */
} kv_schedule;

/* True when policy i needs schedules instead of prefixes. */
bool kv_schedule_needed(const kv_spec *s);
/* Policy i of the plan at budget c with these counts (kv_plan_counts). l must hold what kv_plan says in `needs`. */
kv_status kv_schedule_make(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                           kv_schedule *out, kv_error *err);
void kv_schedule_free(kv_schedule *s);
/* Is position p visible to measured row r (n_row: after the last) for unit u? p must exist by then. */
bool kv_schedule_visible(const kv_schedule *s, const kv_scene *sc, uint32_t u, uint32_t p, uint32_t r);

/* One decode rule: called for the prompt's last row (r = -1) and after each measured row has attended, when its weights are known. */
typedef struct {
    uint32_t n;       /* live entries, cache order */
    uint32_t *pos;    /* [n] their positions */
    double *acc;      /* [n] state that follows the entry (accumulated weight) */
    uint32_t keep;    /* entries the cache may hold besides `recent` (CAKE: hh of the layer) */
    uint32_t recent;
} kv_cache;

typedef struct {
    const char *name, *help, *params; /* params: parameters it reads */
    bool whole_layer; /* one set per layer */
    bool cuts_prompt; /* cuts the prompt itself, by its own rule, instead of the plan's ranking */
    bool accumulates; /* acc starts with the prompt's column sums */
    /* weight [n_head][c->n]: the row's attention over the live entries in cache order. Shrinks c->pos, c->acc, c->n. */
    kv_status (*evict)(const kv_spec *s, kv_cache *c, uint32_t n_head, const double *weight, kv_error *err);
} kv_decode_rule;
extern const kv_decode_rule kv_decode_rules[]; /* index = enum kv_decode; 0 = keep */

#endif
