/* knorm - minus the L2 norm of the key (arXiv 2406.11430; rotation does not change a norm, so post-RoPE keys serve). */
#include <math.h>
#include <stdlib.h>

#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    float *per_kv = NULL;
    kv_status st = kv_array(&per_kv, (size_t)l->n_kv_head * l->L, sizeof *per_kv, err);
    if (st) return st;
    for (uint32_t h = 0; h < l->n_kv_head; h++)
        for (uint32_t i = 0; i < l->L; i++) {
            const float *k = l->k + ((size_t)h * l->scene->n_token + i) * l->d;
            double sum = 0;
            for (uint32_t j = 0; j < l->d; j++) sum += (double)k[j] * k[j];
            per_kv[(size_t)h * l->L + i] = -(float)sqrt(sum);
        }
    kv_spread_kv(l, s, per_kv, out);
    free(per_kv);
    return KV_OK;
}

const kv_scorer kv_scorer_knorm = {"knorm", "minus the L2 norm of the key", "window", 0, false, false, score};
