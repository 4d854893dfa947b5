/* future - the mass each position will receive from the measured rows, or the first `lookahead` of them, summed over
 * rows and the unit's query heads: the mass oracles O1-O3 and O14 of policies.md section 9 (target=recall_contested:
 * the share of each head's contested mass instead, so that contested recall is what they maximise). future_value - each
 * query head's mass times ||v W_O||_1 behind that head (O4): with sets of given size it makes the sum of a_i ||v_i
 * W_O||_1 over what is dropped least, which bounds the error of dropping without renormalising. Not policies one could
 * run: they read the rows they are judged on. */
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/future.h"
#include "sim/scorer.h"

static kv_status score(kv_layer *l, const kv_spec *s, bool value, float *out, kv_error *err)
{
    uint32_t n = l->scene->n_row, L = l->L;
    size_t d = l->d, N = l->scene->n_token;
    bool contested = !value && s->target == KV_TARGET_CONTESTED;
    double *sum = NULL, *norm = NULL, *worth = NULL;
    kv_status st = kv_array(&sum, (size_t)l->n_q_head * L, sizeof *sum, err);
    if (!st) st = kv_array(&norm, L, sizeof *norm, err);
    if (!st) st = kv_future_mass(l, !value && s->lookahead && s->lookahead < n ? s->lookahead : n, sum, err);
    if (!st && contested) st = kv_array(&worth, l->n_q_head, sizeof *worth, err);
    if (!st && contested) kv_future_worth(l, s->target, sum, worth);
    for (uint32_t h = 0; h < l->n_q_head && contested && !st; h++)
        for (uint32_t i = 0; i < L; i++) sum[(size_t)h * L + i] *= kv_contested(l->scene, i) ? worth[h] : 0;
    for (uint32_t h = 0; h < l->n_q_head && value && !st; h++) {
        if (!kv_project_l1(L, d, l->scene->info->hidden, l->v + (h / l->group) * N * d, l->wo + h * d, l->n_q_head * d,
                           norm))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        for (uint32_t i = 0; i < L && !st; i++) sum[(size_t)h * L + i] *= norm[i];
    }
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity) && !st; u++) {
        uint32_t first, count;
        kv_unit_heads(l, s->granularity, u, &first, &count);
        for (uint32_t i = 0; i < L; i++) {
            double f = 0;
            for (uint32_t h = first; h < first + count; h++) f += sum[(size_t)h * L + i];
            out[(size_t)u * L + i] = (float)f;
        }
    }
    free(sum), free(norm), free(worth);
    return st;
}

static kv_status mass(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    return score(l, s, false, out, err);
}

static kv_status mass_value(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    return score(l, s, true, out, err);
}

const kv_scorer kv_scorer_future = {
    "future", "mass the measured rows will give: an oracle", "window lookahead target", KV_NEED_FUTURE, false, true,
    mass};
const kv_scorer kv_scorer_future_value = {
    "future_value", "that mass times the projected value norm, per query head: an oracle",
    "window",       KV_NEED_FUTURE | KV_NEED_WO,
    false,          true,
    mass_value};
