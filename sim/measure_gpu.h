/* measure_gpu.h - the metric pass of prefix points on a device, behind kv_measure_prefixes' boundary (measure.h).
 *
 * Differs from the CPU by rounding: weights and sums of outputs are f32 in another order, differences go through W_O as
 * f16 with f32 sums. Metrics agree to about 1e-5; kept sets come from the CPU's ranking pass and are the same. */
#ifndef KV_MEASURE_GPU_H
#define KV_MEASURE_GPU_H

#include "sim/measure.h"

typedef struct kv_gpu_pass kv_gpu_pass;

/* Device 0, a stream and buffers that grow with the layers. KV_EUNSUPPORTED without a device: says why. One pass may
 * serve several threads; one layer at a time is on the device, the others load and account meanwhile. */
kv_status kv_gpu_pass_open(kv_gpu_pass **out, kv_error *err);
void kv_gpu_pass_close(kv_gpu_pass *g); /* NULL accepted */
/* True when this layer can be measured there: W_O without a norm behind it, ||x|| in the trace. */
bool kv_gpu_pass_can(const kv_measure *m);
/* KV_ENOMEM names the device memory that was missing; KV_EIO a failure of the device. */
kv_status kv_measure_prefixes_gpu(kv_gpu_pass *g, kv_measure *m, kv_error *err);

#endif
