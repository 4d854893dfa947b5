/* prefix.c - a ranking's mass and output at every checkpoint, in one attention pass over its keys.
 * Keys and values are gathered in rank order, 256 at a time; scores and outputs by OpenBLAS. Sums run on across
 * checkpoints, and a checkpoint only takes a snapshot, so 64 of them cost little more than one. */
#include "kernels/blas.h"
#include "kernels/isa.h"
#include "kernels/lanes.h"

#include <stdlib.h>

#define ROWS 256
#define KEYS 256

typedef struct {
    size_t d;
    const float *q, *lse;
    float scale, softcap;
    size_t n_row; /* of this block */
    float *p;     /* [n_row][KEYS]: scores, then probabilities */
    double *mass, *cmass;
} block;

KV_INLINE void exp_body(const bool cap, const block *b, size_t n)
{
    for (size_t r = 0; r < b->n_row; r++) {
        float *p = b->p + r * KEYS, lse = b->lse[r], softcap = b->softcap;
        for (size_t j = 0; j < n; j++) p[j] = kv_expf((cap ? kv_cap(p[j], softcap) : p[j]) - lse);
    }
}

/* Add columns [lo, hi) to the masses; flag is NULL or 1 where a key is contested. */
KV_INLINE void mass_body(const block *b, size_t lo, size_t hi, const float *flag)
{
    for (size_t r = 0; r < b->n_row; r++) {
        const float *p = b->p + r * KEYS;
        b->mass[r] += kv_sum_of(hi - lo, p + lo);
        if (!flag) continue;
        float some[KEYS];
        for (size_t j = lo; j < hi; j++) some[j - lo] = p[j] * flag[j];
        b->cmass[r] += kv_sum_of(hi - lo, some);
    }
}

#define CLONE(suffix, target)                                                                                          \
    target static void exp_##suffix(const block *b, size_t n)                                                          \
    {                                                                                                                  \
        if (b->softcap > 0)                                                                                            \
            exp_body(true, b, n);                                                                                      \
        else                                                                                                           \
            exp_body(false, b, n);                                                                                     \
    }                                                                                                                  \
    target static void mass_##suffix(const block *b, size_t lo, size_t hi, const float *flag)                          \
    {                                                                                                                  \
        mass_body(b, lo, hi, flag);                                                                                    \
    }
CLONE(plain, )
CLONE(v3, KV_V3)

bool kv_prefix(size_t n_row, size_t d, const float *q, const float *lse, float scale, float softcap, const float *k,
               const float *v, size_t n_order, const uint32_t *order, size_t n_check, const uint32_t *check,
               const double *base_mass, const float *base_out, const uint8_t *contested, double *mass, double *cmass,
               float *out)
{
    (void)n_order; /* an upper bound of check[], which says how far to read */
    if (d > KV_BLAS_MAX / (ROWS + 2 * KEYS) / sizeof(float)) return false;
    size_t n_key = n_check ? check[n_check - 1] : 0, n_block = n_row < ROWS ? n_row : ROWS;
    double *sum = malloc(2 * ROWS * sizeof *sum);
    float *p = malloc((n_block * (KEYS + d) + 2 * KEYS * d + KEYS) * sizeof *p);
    bool ok = sum && p;
    float *o = p + n_block * KEYS, *kg = o + n_block * d, *vg = kg + KEYS * d, *flag = vg + KEYS * d;

    for (size_t r0 = 0; ok && r0 < n_row; r0 += ROWS) {
        size_t m = n_row - r0 < ROWS ? n_row - r0 : ROWS, c = 0;
        block b = {d, q + r0 * d, lse + r0, scale, softcap, m, p, sum, sum + ROWS};
        for (size_t r = 0; r < m; r++) sum[r] = base_mass ? base_mass[r0 + r] : 0, sum[ROWS + r] = 0;
        if (out && base_out)
            memcpy(o, base_out + r0 * d, m * d * sizeof *o);
        else if (out)
            memset(o, 0, m * d * sizeof *o);
        for (size_t j0 = 0; c < n_check; j0 += KEYS) {
            size_t n = n_key - j0 < KEYS ? n_key - j0 : KEYS, at = 0;
            for (size_t j = 0; j < n; j++) {
                size_t key = order[j0 + j];
                memcpy(kg + j * d, k + key * d, d * sizeof *kg);
                if (out) memcpy(vg + j * d, v + key * d, d * sizeof *vg);
                if (cmass) flag[j] = contested && contested[key];
            }
            if (n) {
                kv_sgemm_nt(m, n, d, scale, b.q, d, kg, d, 0, p, KEYS);
                (kv_has_v3() ? exp_v3 : exp_plain)(&b, n);
            }
            /* Up to each checkpoint in these keys, a snapshot there, and what is left of them. */
            for (;;) {
                size_t to = c < n_check && check[c] - j0 <= n ? check[c] - j0 : n;
                if (to > at) {
                    (kv_has_v3() ? mass_v3 : mass_plain)(&b, at, to, cmass ? flag : NULL);
                    if (out) kv_sgemm_nn(m, d, to - at, 1, p + at, KEYS, vg + at * d, d, 1, o, d);
                    at = to;
                }
                if (c == n_check || check[c] - j0 != at) break;
                for (size_t r = 0; r < m; r++) {
                    size_t i = c * n_row + r0 + r;
                    mass[i] = sum[r];
                    if (cmass) cmass[i] = sum[ROWS + r];
                    float inv = sum[r] > 0 ? (float)(1 / sum[r]) : 0;
                    for (size_t x = 0; out && x < d; x++) out[i * d + x] = o[r * d + x] * inv;
                }
                c++;
            }
        }
    }
    free(sum);
    free(p);
    return ok;
}
