/* tables.h - numbers that come with a policy in a NumPy file: [layers, ...] floats, layers those of the trace or all of
 * the model. */
#ifndef KV_TABLES_H
#define KV_TABLES_H

#include "sim/layer.h"
#include "traces/npy.h"

/* Read `path`, the parameter `what`, as float32 [layers][a][b]; a = 0 and b = 0 leave the axis out. Errors name the
 * file and the shape it should have; entries must be finite. kv_npy_free(out) also after an error. */
kv_status kv_table_read(const kv_trace_info *in, const char *what, const char *path, size_t a, size_t b, kv_npy *out,
                        kv_error *err);
/* The row of a recorded layer (`index` among the recorded ones). */
const float *kv_table_layer(const kv_trace_info *in, const kv_npy *a, uint32_t index);

#endif
