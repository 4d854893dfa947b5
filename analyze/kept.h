/* kept.h - what a policy keeps of one trace, asked of `kv-sim keep`, the program that made the results. */
#ifndef KV_KEPT_H
#define KV_KEPT_H

#include "traces/trace.h"

typedef struct {
    uint32_t n_head; /* 1 (one set per layer), KV heads or query heads */
    size_t n_token;  /* of a row: prompt tokens, or all of them */
    uint8_t *kept;   /* [n_layer][n_head][n_token], 1 = kept right after the cut */
} kv_kept;

/* policy and budget as on kv-sim's command line. The shape is checked against the trace. KV_EMISSING when kv-sim is not
 * beside this program; KV_EIO with its own words when it refused. */
kv_status kv_kept_load(const kv_trace *t, const char *policy, const char *budget, kv_kept *out, kv_error *err);
void kv_kept_free(kv_kept *k);
/* The row of a query head; at least n_prompt entries. */
const uint8_t *kv_kept_row(const kv_kept *k, const kv_trace_info *i, uint32_t layer_index, uint32_t q_head);

#endif
