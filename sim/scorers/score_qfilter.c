/* qfilter - minus the projection of the key on a learned direction of its head (Q-Filters, arXiv 2503.02812;
 * policies.md 3.9), keys after RoPE. The directions come from a file: they are trained per model. */
#include "sim/scorer.h"
#include "sim/tables.h"

#include <stdlib.h>

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    kv_npy f = {0};
    float *per_kv = NULL;
    if (!s->filters)
        return kv_fail(err, KV_EMISUSE, "policy '%s' needs filters=FILE.npy, floats [layers, KV heads, head size]",
                       s->row->name);
    kv_status st = kv_table_read(l->scene->info, "filters", s->filters, l->n_kv_head, l->d, &f, err);
    if (!st) st = kv_array(&per_kv, (size_t)l->n_kv_head * l->L, sizeof *per_kv, err);
    for (size_t h = 0; h < l->n_kv_head && !st; h++)
        for (size_t i = 0; i < l->L; i++) {
            const float *k = l->k + (h * l->scene->n_token + i) * l->d;
            const float *dir = kv_table_layer(l->scene->info, &f, l->index) + h * l->d;
            double dot = 0;
            for (size_t j = 0; j < l->d; j++) dot += (double)dir[j] * k[j];
            per_kv[h * l->L + i] = (float)-dot;
        }
    if (!st) kv_spread_kv(l, s, per_kv, out);
    kv_npy_free(&f), free(per_kv);
    return st;
}

const kv_scorer kv_scorer_qfilter = {
    "qfilter", "minus the key's projection on its head's filter", "filters window", 0, false, false, score};
