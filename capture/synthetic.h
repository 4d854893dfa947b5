/* synthetic.h - models that nobody trained: the shape of a known one, weights at random, for benches and tests that
 * need no download. `-m synthetic:NAME` or `-m synthetic:NAME:SEED` wherever a model is named.
 *
 * Weights are bfloat16 numbers made from the seed, the tensor and the place in it (kernels/random.h), so a GPU makes
 * them where they are needed. Q and K are scaled so that scores have a deviation of some 3.8: attention is as peaked as
 * that of a trained model (largest probability of a row 0.1 to 0.5 on average), a wrong mask or head shows. */
#ifndef KV_SYNTHETIC_H
#define KV_SYNTHETIC_H

#include "capture/model.h"

bool kv_synthetic_named(const char *path); /* begins with "synthetic:" */
/* As kv_model_open. KV_EMISUSE lists the names. */
kv_status kv_synthetic_open(const char *path, kv_weights weights, uint32_t threads, kv_model **out, kv_error *err);
/* Identity of a synthetic model in place of a file's hash. */
void kv_synthetic_hash(const kv_model *m, char sha256[65]);
/* Rows row .. row+n-1 of a matrix of such a model. */
void kv_synthetic_floats(const kv_tensor *t, uint32_t row, uint32_t n, float *dst);

#endif
