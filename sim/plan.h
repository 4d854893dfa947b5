/* plan.h - which positions each policy keeps at each budget: rankings (one pass over the layers, shared by the policies
 * that agree on it) and counts (cheap, per policy and budget). A kept set is the first count[layer][unit] entries of
 * the ranking's order. */
#ifndef KV_PLAN_H
#define KV_PLAN_H

#include "sim/layer.h"
#include "sim/policy.h"

typedef struct {
    const kv_spec *spec;    /* the first policy that asked for it */
    uint32_t granularity, n_unit;
    uint32_t n_forced;      /* protected positions: the first entries of every order, newest first */
    uint32_t *order;        /* [n_evict][n_unit][L] */
    float *sorted;          /* [n_evict][n_unit][L - n_forced] scores along the order, behind the protected ones */
    uint32_t *fixed;        /* mask: [n_evict][n_unit] counts that no budget changes, else NULL */
    bool want_preference;   /* some policy spreads its layers by CAKE's preference or LAVa's entropy */
    double *entropy, *variance; /* [n_evict] CAKE's H and V of the window (policies.md 4.1) */
    double *spread;         /* [n_evict] LAVa's entropy of the scores */
    double *importance;     /* [n_evict][n_q_head] HeadKV's table, shares of the model, or NULL */
} kv_ranking;

typedef struct {
    const kv_scene *scene;
    size_t n_spec;
    const kv_spec *spec;    /* borrowed */
    size_t *ranking_of;     /* [n_spec] */
    size_t n_ranking;
    kv_ranking *ranking;
    unsigned needs;         /* KV_NEED_* of all scorers together */
    uint32_t max_window;
} kv_plan;

/* Rank every layer under every distinct ranking of the specs. */
kv_status kv_plan_build(const kv_scene *scene, const kv_spec *spec, size_t n_spec, uint32_t threads, kv_plan *p,
                        kv_error *err);
void kv_plan_free(kv_plan *p);

/* counts [n_evict][n_unit]: how many entries of each order policy i keeps at budget C (protected ones included). */
kv_status kv_plan_counts(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts, kv_error *err);

/* CAKE's decode: window-free entries layer `layer` (among the evicting ones) may hold; the last stage's budget. */
kv_status kv_plan_decode_keep(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t layer, uint32_t *keep,
                              kv_error *err);

/* Bytes of K and V and slots (layer, KV head, token) that counts hold: a query head's entry costs a whole KV head's slot
 * (such a cache stores repeated heads), one set per layer costs n_kv_head slots a token. */
uint64_t kv_plan_slots(const kv_plan *p, size_t i, const uint32_t *counts);

/* ---- the allocators (layers.c, heads.c), pure functions of numbers ---- */
/* x real shares of n layers, integer total, cap per layer: truncate, cap, spread the excess and the leftovers equally, lowest
 * index first, without a second cap (antgroup/cakekv adjust_budgets, policies.md 4.5). */
kv_status kv_cake_adjust(const double *x, uint32_t n, int64_t total, int64_t cap, int64_t *b, kv_error *err);
/* Window-free budgets per layer by preference, capped at `cap`; cascading = as the layers pass one after the other, a cut layer
 * never regains entries. lost (NULL allowed) = slots per KV head that no layer could use. */
kv_status kv_cake_budgets(const double *preference, uint32_t n, int64_t total, int64_t cap, bool cascading, int64_t *b,
                          int64_t *lost, kv_error *err);
/* Arithmetic progression of policies.md 3.3 for n layers, window-free mean B, `room` = L - window. */
void kv_pyramid(int64_t B, int64_t beta, int64_t room, uint32_t n, int64_t *b);
/* Winners of one flat top-k over n_unit lists of m scores each (descending), ties by unit then position; scale NULL or a factor per
 * unit. won[u] = entries of unit u among the k largest; their sum is min(k, n_unit * m). */
void kv_flat_topk(const float *sorted, size_t n_unit, size_t m, const float *scale, uint64_t k, uint32_t *won);

#endif
