/* knorm - minus the L2 norm of the key (arXiv 2406.11430; rotation does not change a norm, so post-RoPE keys serve). */
#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    return kv_score_norms(l, s, l->k, -1, out, err);
}

const kv_scorer kv_scorer_knorm = {"knorm", "minus the L2 norm of the key", "window", 0, false, false, score};
