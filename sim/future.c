/* future.c - attention of the measured rows, as an oracle may read it. EXACT kernels and double sums in a fixed order:
 * they decide kept sets. */
#include "sim/future.h"

#include <stdlib.h>

#include "kernels/kernels.h"

enum { BLOCK = 64 };

/* Rows r0..r0+n-1 of query head h: p [n][row_first + r0 + n]. */
static kv_status block(const kv_layer *l, uint32_t h, uint32_t r0, uint32_t n, float *p, kv_error *err)
{
    const kv_scene *sc = l->scene;
    kv_attn_shape shape = {n, sc->row_first + r0 + n, l->d, sc->row_first + r0, 0, l->scale, l->softcap};
    return kv_probs(&shape, l->q_row + ((size_t)h * sc->n_row + r0) * l->d,
                    l->k + (size_t)(h / l->group) * sc->n_token * l->d, p)
               ? KV_OK
               : kv_fail(err, KV_ENOMEM, "out of memory");
}

kv_status kv_future_mass(const kv_layer *l, uint32_t n_row, double *mass, kv_error *err)
{
    const kv_scene *sc = l->scene;
    float *p = NULL;
    if (!sc->n_row)
        return kv_fail(err, KV_EMISSING, "trace '%s' has no decoded rows; an oracle needs them (see --decode-rows)",
                       kv_trace_path(sc->trace));
    kv_status st = kv_array(&p, BLOCK * (size_t)sc->n_token, sizeof *p, err);
    for (size_t k = 0; k < (size_t)l->n_q_head * l->L; k++) mass[k] = 0;
    for (uint32_t h = 0; h < l->n_q_head && !st; h++)
        for (uint32_t r0 = 0; r0 < n_row && !st; r0 += BLOCK) {
            uint32_t n = n_row - r0 < BLOCK ? n_row - r0 : BLOCK;
            size_t width = (size_t)sc->row_first + r0 + n;
            st = block(l, h, r0, n, p, err);
            for (uint32_t r = 0; r < n && !st; r++)
                for (uint32_t i = 0; i < l->L; i++) mass[(size_t)h * l->L + i] += p[r * width + i];
        }
    free(p);
    return st;
}

void kv_future_worth(const kv_layer *l, uint32_t target, const double *mass, double *worth)
{
    for (uint32_t h = 0; h < l->n_q_head; h++) {
        double all = 0;
        for (uint32_t i = 0; i < l->L; i++) all += kv_contested(l->scene, i) ? mass[(size_t)h * l->L + i] : 0;
        worth[h] = target == KV_TARGET_RECALL ? 1 : all > 0 ? 1 / all : 0;
    }
}

kv_status kv_future_rows(const kv_layer *l, uint32_t first, uint32_t count, uint32_t target, const double *worth,
                         float *mass, kv_error *err)
{
    const kv_scene *sc = l->scene;
    size_t N = sc->n_token;
    float *p = NULL;
    double *sum = NULL;
    kv_status st = kv_array(&p, BLOCK * N, sizeof *p, err);
    if (!st) st = kv_array(&sum, BLOCK * N, sizeof *sum, err);
    for (uint32_t r0 = 0; r0 < sc->n_row && !st; r0 += BLOCK) {
        uint32_t n = sc->n_row - r0 < BLOCK ? sc->n_row - r0 : BLOCK;
        size_t width = (size_t)sc->row_first + r0 + n;
        memset(sum, 0, BLOCK * N * sizeof *sum);
        for (uint32_t h = first; h < first + count && !st; h++) {
            st = block(l, h, r0, n, p, err);
            for (uint32_t r = 0; r < n && !st; r++)
                for (uint32_t i = 0; i < width; i++)
                    if (target == KV_TARGET_RECALL || kv_contested(sc, i))
                        sum[r * N + i] += p[r * width + i] * worth[h];
        }
        for (size_t k = 0; k < n * N; k++) mass[r0 * N + k] = (float)sum[k];
    }
    free(p), free(sum);
    return st;
}
