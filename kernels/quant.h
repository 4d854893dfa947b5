/* quant.h - the tensor types of GGUF files and their expansion to f32, exactly as ggml computes it: every product and
 * sum in the order of ggml's dequantize_row_*, each rounded to f32 (no fused multiply-add). */
#ifndef KV_QUANT_H
#define KV_QUANT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KV_GGML_F32 0u

typedef struct {
    const char *name; /* "Q4_1" */
    uint32_t id;      /* ggml's number */
    uint32_t block;   /* elements in a block; a row is a whole number of blocks */
    uint32_t bytes;   /* bytes in a block */
    void (*expand)(const uint8_t *src, size_t n_blocks, float *dst); /* NULL: the size is known, the values are not */
} kv_quant; /* kv_expand_dev (gpu.h) does the same on a device */

/* NULL for a number that is unknown or was removed from ggml. */
const kv_quant *kv_quant_find(uint32_t ggml_type);
/* "F32 F16 ... IQ4_XS": the types with values, for messages. */
const char *kv_quant_supported(void);

#ifdef __cplusplus
}
#endif

#endif
