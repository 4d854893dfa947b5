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

/* Room for the rows below, of one thread. */
typedef struct {
    uint32_t *list; /* [n_token] */
    float *k, *v, *p;
    double *weight;
} kv_list_room;
kv_status kv_list_room_open(const kv_layer *l, kv_list_room *room, kv_error *err);
void kv_list_room_close(kv_list_room *room); /* also of one whose opening failed */
/* out [d] = what the row at position `row`, with query q, takes from the positions list[0..n), the last its own.
 * gather: keys and values are to be fetched from l; else they are those of the call before. reindex: positions are
 * slots; sch NULL or with keys and values of its own, which rows attend to instead. */
kv_status kv_attend_list(const kv_layer *l, bool reindex, const kv_schedule *sch, uint32_t h, uint32_t row,
                         const float *q, const uint32_t *list, uint32_t n, bool gather, const kv_list_room *room,
                         float *out, kv_error *err);

/* Fills a->out for every row of every branch, and this layer's errors when the layer evicts. */
kv_status kv_branches_attend(const kv_branches *b, const kv_attn_view *a, kv_error *err);

#endif
