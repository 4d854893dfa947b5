/* closed_attend.h - attention of the branches of a closed loop, one layer at a time (closed.c runs the model). */
#ifndef KV_CLOSED_ATTEND_H
#define KV_CLOSED_ATTEND_H

#include "sim/closed.h"
#include "sim/schedule.h"

/* Branch 0 is the full cache; branch b >= 1 is point[b - 1]. Rows are positions n_cut .. n_token-1. */
typedef struct {
    const kv_plan *plan;
    const kv_point *const *point; /* [n_branch - 1] */
    uint32_t n_branch, n_row;
    uint32_t threads;
    double *head_error;   /* [n_branch - 1][n_evict] */
    double *stream_error; /* likewise */
} kv_branches;

/* Keys and values of the prompt's entries that a point keeps for one query head of layer l (loaded from the scene),
 * [n][d] each, in the ranking's order; point NULL, or a layer that does not evict (ranked false): the whole prompt.
 * k and v have room for n_cut rows. Returns n. */
size_t kv_gather_kept(const kv_plan *plan, const kv_point *point, bool ranked, const kv_layer *l, uint32_t q_head,
                      float *k, float *v);

/* Fills a->out for every row of every branch, and this layer's errors when the layer evicts. */
kv_status kv_branches_attend(const kv_branches *b, const kv_attn_view *a, kv_error *err);

#endif
