/* colsum - attention each column received from all rows before the cut (H2O, arXiv 2306.14048, as one cut after the
 * prompt); per_row=1 divides by the number of rows that can see the column (kvpress ObservedAttention). */
#include <stdlib.h>

#include "sim/future.h"
#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    uint32_t w = s->window < l->L ? s->window : l->L;
    float *per_head = NULL;
    double *ahead = NULL; /* of the measured rows, all of which see every column before the cut */
    kv_status st = kv_array(&per_head, (size_t)l->n_q_head * l->L, sizeof *per_head, err);
    if (!st && s->observe) st = kv_array(&ahead, (size_t)l->n_q_head * l->L, sizeof *ahead, err);
    if (!st && s->observe) st = kv_future_mass(l, l->scene->n_row, ahead, err);
    for (size_t h = 0; h < l->n_q_head && !st; h++)
        for (uint32_t i = 0; i < l->L; i++)
            per_head[h * l->L + i] = s->observe ? (float)ahead[h * l->L + i]
                                                : l->colsum[h * l->L + i] / (s->per_row ? (float)(l->L - i) : 1.0f);
    if (!st) st = kv_reduce_heads(l, s, l->L - w, per_head, out, err);
    free(per_head), free(ahead);
    return st;
}

const kv_scorer kv_scorer_colsum = {"colsum",
                                    "column sums of all rows before the cut",
                                    "window observe per_row group_reduce pooling kernel pool_first",
                                    KV_NEED_COLSUM,
                                    false,
                                    false,
                                    score};
