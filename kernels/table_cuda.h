/* table_cuda.h - the checks of the kernels of cuda.h, and of a replay's (exact_dev.h, walk_dev.h), as rows of table.h
 * with `check_cuda` alone. Empty without CUDA.
 */
#ifndef KV_TABLE_CUDA_H
#define KV_TABLE_CUDA_H

#include "kernels/table.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const kv_kernel kv_cuda_table[];
extern const size_t kv_cuda_count;
extern const kv_kernel kv_replay_table[];
extern const size_t kv_replay_count;

#ifdef __cplusplus
}
#endif
#endif
