/* mixdim.h - every token gets a number of dimensions from zero to full: our own approximation of MixedDimKV (arXiv
 * 2603.20616, policies.md 8.7), which has no public code. What is guessed: policies/README.md.
 *
 * Per KV head: a basis of the prompt's keys (as cached, RoPE applied) and one of its values, the eigenvectors of their
 * second moments; x_r = x projected on the first r of them. The ranks of a token are 0, d/8, d/4, d/2 and d (rounded
 * down), its loss at rank r is its score times (||v - v_r|| + ||k - k_r|| ||v|| / ||k||), rank r costs r dimensions.
 * The protected tokens take full rank, the others share what is left of (slots of the head) * d by kv_mixdim_allot. */
#ifndef KV_MIXDIM_H
#define KV_MIXDIM_H

#include "sim/schedule.h"

enum { KV_MIXDIM_RANKS = 5 };

/* Candidate ranks of d dimensions, ascending and distinct, 0 and d among them. Returns how many. */
uint32_t kv_mixdim_ranks(uint32_t d, uint32_t rank[KV_MIXDIM_RANKS]);
/* Orthonormal eigenvectors of sum_i x_i x_i^T for x [n][d], the rows of basis [d][d], largest eigenvalue first. Cyclic
 * Jacobi in double: the same bytes for the same input. */
kv_status kv_mixdim_basis(size_t n, size_t d, const float *x, double *basis, kv_error *err);
/* Ranks of n tokens of small summed loss within `budget` dimensions. loss [n][n_rank] falls along a row. Each token
 * climbs the lower convex hull of its losses; steps are taken by (loss drop per dimension descending, token ascending);
 * one that does not fit is left out with the token's later ones. out [n] = indices into rank. */
kv_status kv_mixdim_allot(size_t n, uint32_t n_rank, const uint32_t *rank, const double *loss, uint64_t budget,
                          uint32_t *out, kv_error *err);
/* Policy i of the plan in this layer; counts [n_evict][n_unit] = slots a head may spend. Fills out->at (tokens of rank
 * 0 leave), k, v and slots. */
kv_status kv_mixdim_make(const kv_plan *p, size_t i, const uint32_t *counts, kv_layer *l, kv_schedule *out,
                         kv_error *err);
/* Weights of measured row r of query head h over pos[0..n) with the keys k [n_token][d] of its KV head; p [row + 1] =
 * its weights in the full cache. *distance = total variation between both over all positions. */
void kv_mixdim_row(const kv_layer *l, uint32_t h, uint32_t r, const float *k, const uint32_t *pos, uint32_t n,
                   const float *p, double *weight, double *distance);

#endif
