/* measure_gpu.h - the metric pass of prefix points on a device, behind kv_measure_prefixes' boundary (measure.h).
 *
 * Differs from the CPU by rounding: sums of outputs are f32 in another order, differences go through W_O as f16, scaled
 * to its range, with f32 sums. Metrics agree to about 1e-5; rankings are the same bytes (rank_gpu.c). */
#ifndef KV_MEASURE_GPU_H
#define KV_MEASURE_GPU_H

#include "sim/gpu_pass.h"
#include "sim/measure.h"

/* True when the layers of this replay can be measured there: no norm behind W_O, ||x|| in the trace where layer errors
 * are wanted. The host's arrays of the layer (m->l) are not read. */
bool kv_measure_gpu_can(const kv_measure *m);
/* KV_ENOMEM names the device memory that was missing; KV_EIO a failure of the device. */
kv_status kv_measure_prefixes_gpu(kv_gpu_pass *g, kv_measure *m, kv_error *err);

#endif
