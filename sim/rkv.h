/* rkv.h - the two terms of R-KV's score (scorers/score_rkv.c), for the cut of the prompt and the cuts during decode. */
#ifndef KV_RKV_H
#define KV_RKV_H

#include "sim/policy.h"

/* One KV head: keys k [n][d] in cache order, queries q [n_row][group][d] of the last rows, which see every key.
 * attention [n_scored]: mean over the rows of a softmax over the first n_scored keys alone, before pooling; alike [n]:
 * softmax of the mean likeness to all others. */
kv_status kv_rkv_terms(const kv_spec *s, size_t d, float scale, size_t group, size_t n_row, const float *q, size_t n,
                       const float *k, size_t n_scored, float *attention, float *alike, kv_error *err);

#endif
