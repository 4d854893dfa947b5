/* vnorm - the L2 norm of the value, large first: what a token can add to the output whatever attends to it (the value
 * half of VATP, arXiv 2406.12335). On its own it drops the sinks, whose values are tiny; try it with --protect sink=4.
 */
#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    return kv_score_norms(l, s, l->v, 1, out, err);
}

const kv_scorer kv_scorer_vnorm = {"vnorm", "L2 norm of the value", "window", 0, false, false, score};
