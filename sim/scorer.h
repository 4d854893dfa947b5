/* scorer.h - what a scorer sees and gives. One scorer = one file in sim/scorers/ and one name in KV_SCORER_LIST. */
#ifndef KV_SCORER_H
#define KV_SCORER_H

#include "sim/layer.h"
#include "sim/policy.h"

typedef struct {
    const char *name, *help;
    const char *params; /* parameters it reads beyond `granularity`, "window row_reduce ..." */
    unsigned needs;     /* KV_NEED_*: which data the layer must load */
    bool windowed;      /* the window's rows are the observation and its positions are not scored */
    bool future;        /* reads rows after the cut: an oracle, never a policy one could run */
    /* score[unit][position], units of s->granularity, positions 0..L-1 (the protected ones are ignored). Deterministic:
     * EXACT kernels and fixed-order double sums only. */
    kv_status (*score)(kv_layer *l, const kv_spec *s, float *score, kv_error *err);
} kv_scorer;

extern const kv_scorer *const kv_scorers[];
extern const size_t kv_n_scorers;

/* clang-format off */
#define KV_SCORER_LIST(X) \
    X(recency) \
    X(random) \
    X(knorm) \
    X(window) \
    X(colsum) \
    X(future) \
    X(future_value) \
    X(keydiff) \
    X(lag) \
    X(cur) \
    X(noncausal) \
    X(expected) \
    X(expected_stats) \
    X(capkv) \
    X(rkv) \
    X(maxclamp) \
    X(qfilter) \
    X(random_protected) \
    X(vnorm) \
    X(plugin) \
    /* one name a line */
/* clang-format on */
#define X(name) extern const kv_scorer kv_scorer_##name;
KV_SCORER_LIST(X)
#undef X

/* KV_NEED_* of a policy: its scorer, a plug-in's own, value term, allocators, selection and decode rule. */
unsigned kv_spec_needs(const kv_spec *s);

/* ---- shared steps (reduce.c) ---- */
/* Units of a layer at a granularity, and the query heads that unit u reads: heads first..first+count-1. */
uint32_t kv_unit_count(const kv_layer *l, uint32_t granularity);
void kv_unit_heads(const kv_layer *l, uint32_t granularity, uint32_t u, uint32_t *first, uint32_t *count);
kv_grouping kv_grouping_of(const kv_layer *l, const kv_spec *s);
/* From one value per (query head, position) to units: pooling over positions 0..n-1 and the group reduction, in the
 * order of s->pool_first. per_head is [n_q_head][L] and is overwritten; score is [units][L]. */
kv_status kv_reduce_heads(const kv_layer *l, const kv_spec *s, size_t n, float *per_head, float *score, kv_error *err);
/* sign * L2 norm of every key or value (x = l->k or l->v), spread to units. */
kv_status kv_score_norms(const kv_layer *l, const kv_spec *s, const float *x, float sign, float *score, kv_error *err);
/* KeyDiff (arXiv 2504.15364, as kvpress runs it): score[j] = minus the cosine between key idx[j] (NULL: j) of KV head h
 * and the mean direction of these n keys. Norms have the floors of torch's normalize (1e-12) and cosine_similarity
 * (1e-8), so a zero key scores 0. anchor [d] is scratch. */
void kv_key_diversity(const kv_layer *l, uint32_t h, uint32_t n, const uint32_t *idx, double *anchor, float *score);
/* The same for values per KV head: copied to query heads, or averaged over the layer. per_kv is [n_kv_head][L]. */
void kv_spread_kv(const kv_layer *l, const kv_spec *s, const float *per_kv, float *score);

#endif
