/* parallel.h - run n independent tasks on a few threads. The tasks are fixed by the caller, the threads only decide
 * who runs which, so results never depend on the number of threads. */
#ifndef KV_PARALLEL_H
#define KV_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

/* Call fn(ctx, i) for i = 0..n-1, each once, on up to `threads` threads (0 or 1: in the caller, in order). Returns when
 * all are done. A thread that cannot be started is done without, as is one that BLAS would have no room
 * for (kv_blas_room). */
void kv_parallel(size_t n, uint32_t threads, void (*fn)(void *ctx, size_t i), void *ctx);
/* Cores this process may run on, at least 1. */
uint32_t kv_cpu_count(void);

#endif
