/* select.h - selections that depend on the budget: evicted_at of one layer (0 = dropped at the cut, untouched = kept).
 */
#ifndef KV_SELECT_H
#define KV_SELECT_H

#include "sim/plan.h"

/* CriticalKV (arXiv 2502.03805, kvpress): of each unit's count, int(count * first_stage_ratio) by the score, the rest
 * by (score + epsilon) * mean over the group of ||v W_O||_1; protected entries score max + 1. at [n_unit][n_token]. */
kv_status kv_select_two_stage(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts,
                              const kv_layer *l, int32_t *at, kv_error *err);
/* The second stage's order of a layer, which no budget changes: fills its part of r->second. */
kv_status kv_second_order(kv_ranking *r, kv_layer *l, kv_error *err);
/* kvpress BlockPress around KeyDiff: start with the first C tokens, append a block, keep the C of lowest cosine to the
 * mean direction of what is there, and so on. */
kv_status kv_select_blocks(const kv_plan *p, size_t i, const kv_budget_resolved *c, kv_layer *l, int32_t *at,
                           kv_error *err);
/* score[unit][position] times the value term of the spec (positions before the window); in place. */
kv_status kv_value_weight(kv_layer *l, const kv_spec *s, uint32_t n, float *score, kv_error *err);
/* Factor of a layer in a pool over layers: mean ||v W_O||_1 over its query heads and positions, times the mean over the
 * window's rows of 1 / ||x||, x the residual stream that enters the layer. The trace must carry W_O and xnorm. */
kv_status kv_stream_weight(kv_layer *l, const kv_spec *s, double *weight, kv_error *err);
/* KV_SELECT_MASS and KV_SELECT_SPANS (first.c). Keys [n_unit][L]: a position stands first while its key is below a
 * limit of the budget; UINT32_MAX = never. Counts and selection as elsewhere; counts include the protected entries. */
kv_status kv_first_keys(kv_layer *l, const kv_spec *s, const float *score, uint32_t *key, kv_error *err);
kv_status kv_first_counts(const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts, kv_error *err);
kv_status kv_select_first(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                          int32_t *at, kv_error *err);
/* ChunkKV's ranking: chunks of the layer by mean score (window = largest score + 1), best first; positions in order
 * inside a chunk. Fills order [L] and the chunk's score of every entry. */
kv_status kv_chunk_order(const kv_layer *l, const kv_spec *s, const float *score, uint32_t *order, float *sorted,
                         kv_error *err);
/* Tokens in the first max(1, int(chunks * share)) chunks of such an order. */
uint32_t kv_chunk_count(const kv_spec *s, const uint32_t *order, uint32_t L, double share);

#endif
