/* recency - the newer the better; the first `sinks` positions above all (StreamingLLM, arXiv 2309.17453). */
#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    (void)err;
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity); u++)
        for (uint32_t i = 0; i < l->L;
             i++) /* exact up to 2^24; sinks share one score, the tie rule keeps the first ones */
            out[(size_t)u * l->L + i] = i < s->sinks ? 2.0f : (float)((double)i / l->L);
    return KV_OK;
}

const kv_scorer kv_scorer_recency = {
    "recency", "position; the first `sinks` tokens above all", "sinks", KV_NEED_SHAPE, false, false, score};
