/* safetensors.h - the tensors of a safetensors file, or of the shards an index names, entered into a store.
 *
 *   u64 n ; n bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end)}, "__metadata__": {..}} ; data
 *
 * Checked as the reference implementation does: n and the file's size, UTF-8, no name twice, known dtypes, sizes that
 * agree with shapes, tensors that tile the data without holes or overlap. Symbolic links are followed (hubs keep their
 * files behind them). F32, F16 and BF16 can be used; other dtypes are entered as far as ggml has a type for them and
 * refused by name otherwise. */
#ifndef KV_SAFETENSORS_H
#define KV_SAFETENSORS_H

#include "capture/store.h"

#define KV_ST_HEADER_MAX 100000000u
#define KV_ST_FILES_MAX  4096u

/* folder/model.safetensors, or the shards of folder/model.safetensors.index.json: every name of its weight_map must be
 * in the shard it names, and the other way round. */
kv_status kv_safetensors_folder(kv_store *s, const char *folder, kv_error *err);

#endif
