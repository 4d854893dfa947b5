/* closed_device.h - the closed loop's branches on a device (closed.c decides which points need one). */
#ifndef KV_CLOSED_DEVICE_H
#define KV_CLOSED_DEVICE_H

#include "sim/closed.h"

/* Branch 0 is the full cache; branch b >= 1 is point[b - 1], whose set the cut fixes (kv_schedule_fixed). */
typedef struct {
    const kv_plan *plan;
    const kv_point *const *point; /* [n_branch - 1] */
    uint32_t n_branch, n_row;
    const uint32_t *token; /* [n_token] of the trace */
    uint32_t threads;
    void (*tick)(void *ctx, uint32_t layer); /* before a layer */
    void *ctx;
} kv_device_branches;

/* One pass over rows n_cut .. n_token-1 of every branch. */
kv_status kv_closed_compare(kv_engine *e, const kv_device_branches *b, kv_branch_losses *out, kv_error *err);

#endif
