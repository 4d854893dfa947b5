/* window - attention of the last `window` rows before the cut (policies.md 2.1): softmax over all L columns, the
 * window's own columns cut off, rows reduced (sum, mean, mean + gamma var with divisor w-1, max), then smoothing and
 * group. SnapKV, PyramidKV, Ada-KV, CAKE, TOVA (window 1), CaM. */
#include <stdlib.h>

#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    uint32_t w = s->window < l->L ? s->window : l->L, n = l->L - w;
    const float *p;
    float *per_head = NULL;
    double *sum = NULL, *var = NULL;
    kv_status st = kv_layer_probs(l, w, &p, err);
    if (!st) st = kv_array(&per_head, (size_t)l->n_q_head * l->L, sizeof *per_head, err);
    if (!st) st = kv_array(&sum, n, sizeof *sum, err);
    if (!st) st = kv_array(&var, n, sizeof *var, err);
    for (uint32_t h = 0; h < l->n_q_head && !st; h++) {
        const float *row = p + (size_t)h * w * l->L;
        float *to = per_head + (size_t)h * l->L;
        kv_reduce_rows((kv_row_reduce)s->row_reduce, s->gamma, w, n, row, l->L, sum, var, to);
    }
    if (!st) st = kv_reduce_heads(l, s, n, per_head, out, err);
    free(per_head), free(sum), free(var);
    return st;
}

const kv_scorer kv_scorer_window = {"window",
                                    "attention of the last `window` rows before the cut",
                                    "window observe row_reduce gamma group_reduce pooling kernel pool_first",
                                    KV_NEED_WINDOW,
                                    true,
                                    false,
                                    score};
