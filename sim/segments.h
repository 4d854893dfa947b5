/* segments.h - named parts of the prompt as tokens: the prompt set's segments (by kind or title), "evidence",
 * "question". */
#ifndef KV_SEGMENTS_H
#define KV_SEGMENTS_H

#include "traces/trace.h"

/* in[i] = token i of 0..n-1 overlaps a segment called `name`. KV_EMISSING lists the names the trace has. */
kv_status kv_segment_tokens(const kv_trace *t, const char *name, uint32_t n, bool *in, kv_error *err);
/* The tokens *first..*past-1 of 0..n-1 that overlap bytes start..end-1; offset [n+1] as traces have them. *first =
 * *past when there are none. */
void kv_span_tokens(const uint32_t *offset, uint32_t n, int64_t start, int64_t end, uint32_t *first, uint32_t *past);

#endif
