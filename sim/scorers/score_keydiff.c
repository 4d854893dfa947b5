/* keydiff - minus the cosine between a key and the mean direction of all keys of its head (KeyDiff, arXiv 2504.15364,
 * as kvpress runs it: one anchor for the whole prompt; the paper's is recomputed block by block). Norms have the floors
 * of torch's normalize (1e-12) and cosine_similarity (1e-8), so a zero key scores 0. */
#include <stdlib.h>

#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    float *per_kv = NULL;
    double *anchor = NULL;
    kv_status st = kv_array(&per_kv, (size_t)l->n_kv_head * l->L, sizeof *per_kv, err);
    if (!st) st = kv_array(&anchor, l->d, sizeof *anchor, err);
    for (uint32_t h = 0; h < l->n_kv_head && !st; h++)
        kv_key_diversity(l, h, l->L, NULL, anchor, per_kv + (size_t)h * l->L);
    if (!st) kv_spread_kv(l, s, per_kv, out);
    free(per_kv), free(anchor);
    return st;
}

const kv_scorer kv_scorer_keydiff = {
    "keydiff", "minus the cosine of the key with the mean key direction", "window", 0, false, false, score};
