/* mask.h - kept sets as NumPy files, in and out (design.md section 3).
 * uint8 (1 = kept) or int32 evicted_at (-1 = never dropped, t = gone after decode row t-1, 0 = dropped at the cut), shape [layers, heads,
 * tokens]: layers = the recorded ones, heads = query heads, KV heads or 1, tokens = the cut's or the trace's. */
#ifndef KV_MASK_H
#define KV_MASK_H

#include "sim/plan.h"

/* Fill r from s->file: order lists kept positions first, fixed holds the counts. */
kv_status kv_mask_ranking(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err);
/* Kept set of policy i at budget c as a file: uint8 mask or int32 evicted_at, last axis = tokens of the trace. A mask is the set after
 * `rows` decoded rows; tokens after them are 0. Layers that do not evict keep everything. Policies whose entries come back have no
 * evicted_at: they write uint8 [rows+1, layers, heads, ceil(tokens/8)], bit p%8 of byte p/8 = row r may attend to p. For policies with
 * schedules, counts becomes what the cut left. */
kv_status kv_mask_write(const char *path, const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts,
                        bool as_mask, uint32_t rows, kv_error *err);

#endif
