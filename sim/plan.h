/* plan.h - which positions each policy keeps at each budget: rankings (one pass over the layers, shared by the policies
 * that agree on it) and counts (cheap, per policy and budget). A kept set is the first count[layer][unit] entries of
 * the ranking's order. */
#ifndef KV_PLAN_H
#define KV_PLAN_H

#include "sim/layer.h"
#include "sim/policy.h"

typedef struct {
    const kv_spec *spec; /* the first policy that asked for it */
    uint32_t granularity, n_unit;
    uint32_t n_item;   /* what counts count: positions, or pages of spec->page positions */
    uint32_t n_forced; /* protected items: the first of every order, newest first */
    bool *segment;     /* [L] positions of the protected segment, or NULL */
    uint32_t *order;   /* [n_evict][n_unit][L] */
    float *sorted;     /* [n_evict][n_unit][n_item - n_forced] item scores along the order, behind the protected ones */
    uint32_t *fixed;   /* mask: [n_evict][n_unit] counts that no budget changes, else NULL */
    int32_t *at;       /* mask whose entries leave later: [n_evict][n_unit][n_token] as in kv_schedule, or NULL */
    uint8_t *seen;     /* mask row by row: [n_row+1][n_evict][n_unit][(n_token+7)/8] as in kv_schedule, or NULL */
    bool want_preference, want_spread; /* some policy gives its layers slots by CAKE's preference, by LAVa's entropy */
    double *entropy, *variance;        /* [n_evict] CAKE's H and V of the window (policies.md 4.1) */
    double *spread;                    /* [n_evict] LAVa's entropy of the scores */
    double *importance;                /* [n_evict][n_q_head] HeadKV's table, shares of the model, or NULL */
    float *pattern;                    /* [n_evict][n_kv_head] DuoAttention's table, or NULL */
    bool *similar;                     /* [n_evict] layers that attention changes least (SqueezeAttention), or NULL */
    double *weight;                    /* [n_evict] factor on the layer's scores in a pool over layers, or NULL */
    uint32_t *first_key;               /* [n_evict][n_unit][L] select.h, or NULL */
    uint32_t *second;                  /* [n_evict][n_unit][L] positions, best for the second stage first, or NULL */
} kv_ranking;

/* The unit of query head h: one for the layer, one for each KV head, or one for each query head. */
static inline uint32_t kv_unit_of(uint32_t n_unit, uint32_t n_kv_head, uint32_t n_q_head, uint32_t h)
{
    return n_unit == 1 ? 0 : n_unit == n_kv_head ? h / (n_q_head / n_kv_head) : h;
}

typedef struct {
    const kv_scene *scene;
    size_t n_spec;
    const kv_spec *spec; /* borrowed */
    size_t *ranking_of;  /* [n_spec] whose order the kept sets are prefixes of */
    size_t *count_of;    /* [n_spec] whose scores give the counts: another one only with oracle= */
    size_t *future_of;   /* [n_spec] future mass, with oracle=rank, heads or layers */
    kv_spec *derived;    /* [2 n_spec] future mass and the scorer that sees the future, of specs with oracle= */
    size_t n_ranking;
    kv_ranking *ranking;
    unsigned needs; /* KV_NEED_* of all scorers together */
    uint32_t max_window;
} kv_plan;

/* Rank every layer under every distinct ranking of the specs. */
kv_status kv_plan_build(const kv_scene *scene, const kv_spec *spec, size_t n_spec, uint32_t threads, kv_plan *p,
                        kv_error *err);
void kv_plan_free(kv_plan *p);
/* list [L]: the protected positions of a ranking of tokens in their order, then all others ascending. */
kv_status kv_plan_list(const kv_ranking *r, uint32_t L, uint32_t *list, kv_error *err);

/* counts [n_evict][n_unit]: how many entries of each order policy i keeps at budget C (protected ones included). */
kv_status kv_plan_counts(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts, kv_error *err);

/* CAKE's decode: window-free entries layer `layer` (among the evicting ones) may hold; the last stage's budget. */
kv_status kv_plan_decode_keep(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t layer, uint32_t *keep,
                              kv_error *err);

/* Bytes of K and V and slots (layer, KV head, token) that counts hold: a query head's entry costs a whole KV head's
 * slot (such a cache stores repeated heads), one set per layer costs n_kv_head slots a token. */
uint64_t kv_plan_slots(const kv_plan *p, size_t i, const uint32_t *counts);

/* Kept items of layer l (among the evicting ones) whose score equals the first dropped one's, and all kept ones: which
 * of such a tie class stay is decided by the tie rule alone (ambiguous_share). Zero for schedules and masks, which have
 * no cut in a ranking. */
void kv_plan_ambiguous(const kv_plan *p, size_t i, const uint32_t *counts, uint32_t l, uint64_t *tied, uint64_t *kept);
/* A number that two kept sets share only when they are the same (up to a 64-bit hash): all layers, units and positions.
 */
uint64_t kv_plan_fingerprint(const kv_plan *p, size_t i, const uint32_t *counts);

/* ---- the allocators (layers.c, heads.c; counts.c combines them), pure functions of numbers ---- */
/* x real shares of n layers, integer total, cap per layer: truncate, cap, spread the excess and the leftovers equally,
 * lowest index first, without a second cap (antgroup/cakekv adjust_budgets, policies.md 4.5). */
kv_status kv_cake_adjust(const double *x, uint32_t n, int64_t total, int64_t cap, int64_t *b, kv_error *err);
/* Window-free budgets per layer by preference, capped at `cap`; cascading = as the layers pass one after the other, a
 * cut layer never regains entries. lost (NULL allowed) = slots per KV head that no layer could use. */
kv_status kv_cake_budgets(const double *preference, uint32_t n, int64_t total, int64_t cap, bool cascading, int64_t *b,
                          int64_t *lost, kv_error *err);
/* CAKE's preference P = H^(1/tau1) V^(1/tau2) of n layers at budget C (policies.md 4.1); 0 where H or V is not
 * positive. The ranking must have entropy and variance (want_preference). */
void kv_cake_preference(const kv_spec *s, const kv_ranking *r, uint32_t n, uint32_t C, double *preference);
/* Arithmetic progression of policies.md 3.3 for n layers, window-free mean B, `room` = L - window. */
void kv_pyramid(int64_t B, int64_t beta, int64_t room, uint32_t n, int64_t *b);
/* SqueezeAttention: similar[l] = layer l is in the class of largest cosine when the n cosines are split into three
 * classes of least squared distance from their means (the exact optimum; two classes when there are two values, none
 * when all are equal). */
kv_status kv_squeeze_classes(const float *cosine, uint32_t n, bool *similar, kv_error *err);
/* int(p C) for similar layers, int((n - n3 p) C / (n - n3)) for the n - n3 others: counts with the window, above a
 * layer's tokens where the shares say so. */
void kv_squeeze_budgets(const bool *similar, uint32_t n, double p, int64_t C, int64_t *b);
/* DuoAttention: as many of the n heads as fit into `total` slots, in the order of (pattern descending, index
 * ascending), keep `all` entries, the others `least`, or an equal share where even that does not fit. */
kv_status kv_duo_heads(const float *pattern, size_t n, uint64_t total, uint32_t all, uint32_t least, uint32_t *counts,
                       kv_error *err);
/* One factor per (layer, unit) from the ranking's weights, [n][n_unit]; free(). */
kv_status kv_layer_scales(const kv_ranking *r, uint32_t n, float **scale, kv_error *err);
/* Winners of one flat top-k over n_unit lists of m scores each (descending), ties by unit then position; scale NULL or
 * a factor per unit. won[u] = entries of unit u among the k largest; their sum is min(k, n_unit * m). */
void kv_flat_topk(const float *sorted, size_t n_unit, size_t m, const float *scale, uint64_t k, uint32_t *won);

#endif
