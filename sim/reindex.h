/* reindex.h - positions by cache slot, as StreamingLLM has them (policies.md 3.1 point 4, metrics.md 3.2): keys are
 * cached unrotated and RoPE is applied by slot, so distances shrink with every eviction. RoPE sees distances only, so
 * of a cache that stands in order of position nothing changes but the scores of entries with a gap behind them: the
 * sinks. */
#ifndef KV_REINDEX_H
#define KV_REINDEX_H

#include "sim/layer.h"

/* Measured row r of query head h attends to pos[0..n), ascending, as slots 0..n-1; the last is the row itself. p [row +
 * 1] = its recorded weights. weight [n] = a softmax over the slots; *distance = total variation between both
 * distributions over all positions. KV_EMISSING when the trace does not say how keys were rotated. */
kv_status kv_reindex_row(const kv_layer *l, uint32_t h, uint32_t r, const uint32_t *pos, uint32_t n, const float *p,
                         double *weight, double *distance, kv_error *err);

#endif
