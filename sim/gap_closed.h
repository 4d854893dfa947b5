/* gap_closed.h - gap_closed: how much of the way from the base to the oracle a policy goes, on recall_contested. */
#ifndef KV_GAP_CLOSED_H
#define KV_GAP_CLOSED_H

#include "sim/replay.h"

/* The gap below which the share says nothing. */
#define KV_GAP_LEAST 0.01

/* gap [n_point] of points that rp has replayed with recall_contested wanted; NAN = undefined. Base is `streaming`, the
 * oracle `oracle`, with the point's granularity, protection and page, uniform over layers and units with the point's
 * mean entries a unit right after the cut (rounded): two more rankings, each replayed once. */
kv_status kv_gap_closed(const kv_plan *p, const kv_point *point, size_t n_point, const kv_replay *rp, uint32_t threads,
                        double *gap, kv_error *err);

#endif
