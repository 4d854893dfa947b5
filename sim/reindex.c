/* reindex.c - positions by cache slot. */
#include "sim/reindex.h"

#include <math.h>

#include "sim/query_stats.h"

static double capped(const kv_layer *l, double x)
{
    return l->softcap > 0 ? l->softcap * tanh(x / l->softcap) : x;
}

/* Change of q . k when k is turned by `shift` positions: the elements that RoPE leaves alone cancel. *before = q . k.
 */
static double turned(const kv_trace_info *in, const float *q, const float *k, uint32_t shift, double *before)
{
    uint32_t pairs = (in->rope_dim ? in->rope_dim : in->head_dim) / 2;
    double sum = 0;
    *before = 0;
    for (uint32_t j = 0; j < in->head_dim; j++) *before += (double)q[j] * k[j];
    for (uint32_t j = 0; j < pairs; j++) {
        double angle = (double)shift * kv_rope_frequency(in, j), c = cos(angle), s = sin(angle), a = k[j],
               b = k[j + pairs];
        sum += q[j] * (a * c - b * s - a) + q[j + pairs] * (b * c + a * s - b);
    }
    return sum;
}

kv_status kv_reindex_row(const kv_layer *l, uint32_t h, uint32_t r, const uint32_t *pos, uint32_t n, const float *p,
                         double *weight, double *distance, kv_error *err)
{
    const kv_scene *sc = l->scene;
    const float *q = l->q_row + ((size_t)h * sc->n_row + r) * l->d,
                *K = l->k + (size_t)(h / l->group) * sc->n_token * l->d;
    uint32_t row = sc->row_first + r;
    double sum = 0, lost = 1, moved = 0;
    if (!(sc->info->rope_theta > 0) && !sc->info->inv_freq)
        return kv_fail(err, KV_EMISSING,
                       "reindex=1 rotates keys anew, and trace '%s' does not say how they were rotated; import with "
                       "--rope-theta X",
                       kv_trace_path(sc->trace));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t shift = row - pos[i] - (n - 1 - i);
        double x;
        weight[i] = p[pos[i]];
        if (shift) {
            double change = turned(sc->info, q, K + (size_t)pos[i] * l->d, shift, &x);
            weight[i] *= exp(capped(l, (x + change) * l->scale) - capped(l, x * l->scale));
        }
        sum += weight[i];
    }
    for (uint32_t i = 0; i < n; i++) {
        weight[i] = sum > 0 ? weight[i] / sum : 0;
        moved += fabs(p[pos[i]] - weight[i]);
        lost -= p[pos[i]];
    }
    *distance = (moved + (lost > 0 ? lost : 0)) / 2;
    return KV_OK;
}
