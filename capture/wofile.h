/* wofile.h - the output projections of a model in a file of their own, once for many traces. */
#ifndef KV_WOFILE_H
#define KV_WOFILE_H

#include "capture/model.h"

/* Hash of W_O of these layers (those recorded) in `dtype` (kv_wo_hash). KV_EUNSUPPORTED when the dtype overflows. */
kv_status kv_wo_sha256(const kv_model *m, uint32_t n_layer, const uint32_t *layer, kv_dtype dtype, char sha[65],
                       kv_error *err);
/* Make sure that the side file with this hash stands beside `trace_path`. `file` NULL: it is written there unless it is
 * there already. Else it is written to `file`, unless that already is the one, and linked to from beside the trace.
 * shard: I/N when other shards may be doing the same at this moment, else NULL. */
kv_status kv_wo_provide(const kv_model *m, uint32_t n_layer, const uint32_t *layer, kv_dtype dtype, const char *sha,
                        const char *trace_path, const char *file, const char *shard, uint32_t threads, kv_error *err);

#endif
