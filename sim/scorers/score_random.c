/* random - a seeded uniform draw for each (layer, unit, position); the same for all budgets, so kept sets are nested.
 */
#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    (void)err;
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity); u++) {
        kv_rng r = {s->seed};
        r.s = kv_rng_next(&r) ^ ((uint64_t)l->number << 32 | u);
        for (uint32_t i = 0; i < l->L; i++) out[(size_t)u * l->L + i] = (float)(kv_rng_next(&r) >> 40);
    }
    return KV_OK;
}

const kv_scorer kv_scorer_random = {
    "random", "seeded uniform draw per unit and position", "seed window", KV_NEED_SHAPE, false, false, score};
