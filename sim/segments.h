/* segments.h - named parts of the prompt as tokens: the prompt set's segments (by kind or title), "evidence",
 * "question". */
#ifndef KV_SEGMENTS_H
#define KV_SEGMENTS_H

#include "traces/trace.h"

/* in[i] = token i of 0..n-1 overlaps a segment called `name`. KV_EMISSING lists the names the trace has. */
kv_status kv_segment_tokens(const kv_trace *t, const char *name, uint32_t n, bool *in, kv_error *err);

#endif
