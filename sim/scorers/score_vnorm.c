/* vnorm - the L2 norm of the value, large first: what a token can add to the output whatever attends to it (the value
 * half of VATP, arXiv 2406.12335). On its own it drops the sinks, whose values are tiny; try it with --protect sink=4.
 */
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
            const float *v = l->v + ((size_t)h * l->scene->n_token + i) * l->d;
            double sum = 0;
            for (uint32_t j = 0; j < l->d; j++) sum += (double)v[j] * v[j];
            per_kv[(size_t)h * l->L + i] = (float)sqrt(sum);
        }
    kv_spread_kv(l, s, per_kv, out);
    free(per_kv);
    return KV_OK;
}

const kv_scorer kv_scorer_vnorm = {"vnorm", "L2 norm of the value", "window", 0, false, false, score};
