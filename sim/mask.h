/* mask.h - kept sets as NumPy files, in and out (design.md section 3).
 *   int32 evicted_at [layers, heads, tokens]   -1 = never dropped, t = gone after decode row t-1, 0 = dropped at the
 * cut. A decoded token is seen by its own row: token P+k has -1 or at least k+1 uint8 mask       [layers, heads,
 * tokens]   1 = kept, 0 = dropped at the cut; a decoded token with 0 is seen by its own row alone uint8 bitmaps [rows,
 * layers, heads, ceil(tokens of the trace/8)]   row r may attend to p where bit p%8 of byte p/8 is 1, whatever the rows
 * before it saw; one row more = what the row after the last would see layers = the recorded ones, heads = query heads,
 * KV heads or 1, tokens = the cut's (later ones stay) or the trace's. */
#ifndef KV_MASK_H
#define KV_MASK_H

#include "sim/plan.h"

/* Fill r from s->file: order lists the positions that row 0 sees first, fixed holds their counts; at or seen when that
 * is not all. Whatever fits no trace of this shape is KV_EFORMAT, with the place. */
kv_status kv_mask_ranking(const kv_scene *sc, const kv_spec *s, kv_ranking *r, kv_error *err);
/* Kept set of policy i at budget c as a file: uint8 mask or int32 evicted_at, last axis = tokens of the trace. A mask
 * is the set after `rows` decoded rows; tokens after them are 0. Layers that do not evict keep everything. Policies
 * whose entries come back have no evicted_at: they write uint8 [rows+1, layers, heads, ceil(tokens/8)], bit p%8 of byte
 * p/8 = row r may attend to p. For policies with schedules, counts becomes what the cut left. */
kv_status kv_mask_write(const char *path, const kv_plan *p, size_t i, const kv_budget_resolved *c, uint32_t *counts,
                        bool as_mask, uint32_t rows, kv_error *err);

#endif
