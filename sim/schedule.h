/* schedule.h - kept sets that are not a prefix of a ranking: decode rules (an entry leaves after some row) and
 * selections that depend on the budget (two stages, blocks). Made for one layer at a time, from the layer's data. */
#ifndef KV_SCHEDULE_H
#define KV_SCHEDULE_H

#include "sim/plan.h"

typedef struct {
    uint32_t n_unit;
    int32_t *at;     /* [n_unit][n_token] evicted_at: -1 = never, t = visible to measured rows before row t and to none
                        after (0 = gone   when the prompt is cut) */
    uint8_t *seen;   /* NULL, or [n_row+1][n_unit][(n_token+7)/8]: bit p of row r = row r may attend to p (entry n_row:
                        the row after the last), for rules whose entries come back; `at` is then -1 throughout */
    float *k, *v;    /* NULL, or [n_kv_head][n_token][d]: what rows attend to instead of the layer's keys and values */
    uint32_t *slots; /* NULL, or [n_unit]: slots that the prompt's entries fill where they are not whole ones; all of
                        the prompt = nothing is missing */
} kv_schedule;

/* How the engine serves a policy's budgets; what `kv-sim policies` prints. */
typedef enum {
    KV_REPLAY_RANKING,  /* kept sets are prefixes of an order that no budget changes: one walk serves all of them */
    KV_REPLAY_CHAIN,    /* the order is formed once; each budget makes its own set from it */
    KV_REPLAY_SIMULATED /* each budget is simulated, row by row or block by block */
} kv_replay_class;
kv_replay_class kv_replay_class_of(const kv_spec *s);
extern const char *const kv_replay_class_names[]; /* index = class */
/* True when policies of this spec need schedules instead of prefixes: every class but the first. */
bool kv_schedule_needed(const kv_spec *s);
/* The same for policy i of a plan: mask files that say when entries leave among them. */
bool kv_schedule_used(const kv_plan *p, size_t i);
/* True when the cut fixes what policies of this spec keep: every later row sees that, and all that came after the cut,
 * as it is. Else they decide while decoding, turn keys or hold parts of them. */
bool kv_schedule_fixed(const kv_spec *s);
/* True when its sets follow from the plan: of a layer no more than its shape is read. */
bool kv_schedule_planned(const kv_plan *p, size_t i);
/* Policy i of the plan at budget c with these counts (kv_plan_counts). l must hold what kv_plan says in `needs`, or be
 * a shape where kv_schedule_planned. Where kv_schedule_fixed it is read alone: threads may share it. */
kv_status kv_schedule_make(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                           kv_schedule *out, kv_error *err);
void kv_schedule_free(kv_schedule *s);
/* Slots of unit u right after the cut. */
uint32_t kv_schedule_slots(const kv_schedule *s, const kv_scene *sc, uint32_t u);
/* Is position p visible to measured row r (n_row: after the last) for unit u? p must exist by then. */
bool kv_schedule_visible(const kv_schedule *s, const kv_scene *sc, uint32_t u, uint32_t p, uint32_t r);

/* ------------------------------------------------------------------------------------------------ decode rules
 * (decode.c) The order of a step (metrics.md 3.1): project, append, attend, record, update, evict. The row that
 * triggers an eviction has attended to the victim. */
typedef struct {
    uint32_t n;      /* live entries, cache order */
    uint32_t *pos;   /* [n] their positions */
    double *acc;     /* [n] state that follows the entry (accumulated weight) */
    uint32_t keep;   /* entries the cache may hold besides `recent` */
    uint32_t recent; /* newest entries the rule protects */
    const kv_layer *l;
    uint32_t unit;
    int64_t row; /* the row that has just attended; -1: the prompt's last */
} kv_cache;

enum {
    KV_RULE_CUTS = 1, /* can cut the prompt too (prompt_cut=rule) */
    KV_RULE_RANKED =
        2, /* a cut leaves the cache in the order of the scores, the window behind, and the rule reads that order */
    KV_RULE_WEIGHS = 4,      /* reads the row's weights */
    KV_RULE_ACCUMULATES = 8, /* reads acc: column sums of the prompt, then every row's weights */
    KV_RULE_POSITION = 16,   /* `every` counts processed tokens, prompt included, instead of decoded rows */
    KV_RULE_FORESEES = 64,   /* an oracle that reads the rows to come: the whole rule is kv_oracle_rows */
    KV_RULE_HIDES = 32       /* entries may come back: the whole rule is kv_hide_rows; it cuts the prompt itself */
};
typedef struct {
    const char *name, *help, *params; /* params: parameters it reads beyond every, bin and prompt_cut */
    unsigned needs, flags;            /* KV_NEED_* beyond the scorer's, KV_RULE_* */
    /* weight [n_head][c->n]: the row's attention over the live entries in cache order. Shrinks c->pos, c->acc, c->n. */
    kv_status (*evict)(const kv_spec *s, kv_cache *c, uint32_t n_head, const double *weight, kv_error *err);
} kv_decode_rule;
extern const kv_decode_rule kv_decode_rules[]; /* index = enum kv_decode; 0 = keep */

/* Query of measured row r of head h, as loaded; r < 0: -1 is the last row before the cut, -2 the one before it. */
const float *kv_step_query(const kv_layer *l, uint32_t h, int64_t r);
/* A rule that drops for good, row by row (steps.c): policy i of the plan at budget b in layer l, whose scene says how
 * many tokens there will be. at [n_unit][n_token of l's scene], all -1, is the caller's and says what leaves when, as
 * in kv_schedule. open() cuts the prompt; row() follows row r of l, 0, 1, .., once it has attended: keys, values and
 * the query of that row are in l by then, later ones need not. */
typedef struct kv_steps kv_steps;
kv_status kv_steps_open(const kv_plan *p, size_t i, const kv_budget_resolved *b, const uint32_t *counts, kv_layer *l,
                        int32_t *at, kv_steps **out, kv_error *err);
kv_status kv_steps_row(kv_steps *s, uint32_t r, kv_error *err);
void kv_steps_close(kv_steps *s); /* NULL accepted */
/* What schedule.c calls (steps.c): rules that drop for good fill out->at, rules that hide fill out->seen. */
kv_status kv_step_rows(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                       kv_schedule *out, kv_error *err);
kv_status kv_hide_rows(const kv_spec *s, kv_layer *l, kv_schedule *out, kv_error *err);

#endif
