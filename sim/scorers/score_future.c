/* future - the mass each position will receive from the measured rows, summed over rows and the unit's query heads: the
 * mass oracles O1-O3 of policies.md section 9. Not a policy one could run: it reads the rows it is judged on. */
#include <stdlib.h>

#include "kernels/kernels.h"
#include "sim/scorer.h"

enum { BLOCK = 64 };

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    const kv_scene *sc = l->scene;
    size_t N = sc->n_token;
    double *sum = NULL;
    float *p = NULL;
    if (!sc->n_row)
        return kv_fail(err, KV_EMISSING, "trace '%s' has no decoded rows; an oracle needs them (see --decode-rows)",
                       kv_trace_path(sc->trace));
    kv_status st = kv_array(&sum, (size_t)l->n_q_head * l->L, sizeof *sum, err);
    if (!st) st = kv_array(&p, BLOCK * N, sizeof *p, err);
    for (uint32_t h = 0; h < l->n_q_head && !st; h++)
        for (uint32_t r0 = 0; r0 < sc->n_row && !st; r0 += BLOCK) {
            uint32_t n = sc->n_row - r0 < BLOCK ? sc->n_row - r0 : BLOCK;
            kv_attn_shape shape = {n, sc->row_first + r0 + n, l->d, sc->row_first + r0, 0, l->scale, l->softcap};
            if (!kv_probs(&shape, l->q_row + ((size_t)h * sc->n_row + r0) * l->d,
                          l->k + (size_t)(h / l->group) * N * l->d, p))
                st = kv_fail(err, KV_ENOMEM, "out of memory");
            else
                for (uint32_t r = 0; r < n; r++)
                    for (uint32_t i = 0; i < l->L; i++) sum[(size_t)h * l->L + i] += p[(size_t)r * shape.n_key + i];
        }
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity) && !st; u++) {
        uint32_t first, count;
        kv_unit_heads(l, s->granularity, u, &first, &count);
        for (uint32_t i = 0; i < l->L; i++) {
            double f = 0;
            for (uint32_t h = first; h < first + count; h++) f += sum[(size_t)h * l->L + i];
            out[(size_t)u * l->L + i] = (float)f;
        }
    }
    free(sum), free(p);
    return st;
}

const kv_scorer kv_scorer_future = {
    "future", "mass the measured rows will give: an oracle", "window", KV_NEED_FUTURE, false, true, score};
