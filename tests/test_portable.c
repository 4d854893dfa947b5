/* test_portable.c - the baseline version of the EXACT kernels, which a machine with AVX2 never chooses: the sources are
 * compiled here a second time, under other names and without it, and must give the bytes of the reference. */
#define KV_NO_V3
#define kv_colsum        portable_colsum
#define kv_probs         portable_probs
#define kv_pack          portable_pack
#define kv_round         portable_round
#define kv_probs_turned  portable_turned
#define kv_walk          portable_walk
#define kv_walk_compare  portable_compare
#define kv_entropy       portable_entropy
#define kv_diff_squares  portable_squares
#define kv_column_spread portable_spread

#define body  colsum_body
#define plain colsum_plain
#define v3    colsum_v3
#include "kernels/colsum.c"
#undef body
#undef plain
#undef v3
#define body  probs_body
#define plain probs_plain
#define v3    probs_v3
#include "kernels/probs.c"
#include "kernels/entropy.c"
#include "kernels/pack.c"
#undef body
#undef plain
#undef v3
#define body  turned_body
#define plain turned_plain
#define v3    turned_v3
#undef ROWS
#include "kernels/turned.c"
#include "kernels/walk.c"

#include "kernels/table.h"
#include "tests/check.h"

static void *bytes(size_t n)
{
    void *p = calloc(n + 1, 1);
    if (!p) abort();
    return p;
}

static void attention(const kv_case *c)
{
    kv_attn_shape s = {c->n_row, c->n_key, c->d, c->row0, c->window, 1 / sqrtf((float)c->d), c->softcap};
    float *q = bytes(s.n_row * s.d * 4), *k = bytes(s.n_key * s.d * 4), *lse = bytes(s.n_row * 4);
    float *p = bytes(2 * s.n_row * s.n_key * 4), *want = p + s.n_row * s.n_key;
    double *acc = bytes(2 * s.n_key * 8);
    kv_fill_normal(1, s.n_row * s.d, q);
    kv_fill_normal(2, s.n_key * s.d, k);
    for (size_t r = 0; r < s.n_row; r++) lse[r] = 3;
    CHECK(portable_probs(&s, q, k, p) && kv_probs_ref(&s, q, k, want));
    CHECK(!memcmp(p, want, s.n_row * s.n_key * 4));
    CHECK(portable_colsum(&s, q, k, lse, acc) && kv_colsum_ref(&s, q, k, lse, acc + s.n_key));
    CHECK(!memcmp(acc, acc + s.n_key, s.n_key * 8));
    free(q), free(k), free(lse), free(p), free(acc);
}

/* A ranking of n keys walked in two steps; the rows of `turned` and their walk. */
static void walks(void)
{
    enum { N_ROW = 7, HEADS = 3, R = N_ROW * HEADS, LD = 32, KEYS = 150, D = 20 };
    kv_attn_shape s = {N_ROW, KEYS, D, KEYS - N_ROW - 2, 0, 0.3f, 0};
    float *q = bytes(R * D * 4), *k = bytes(KEYS * D * 4), *p = bytes(2 * (KEYS * LD + R) * 4);
    float *want = p + KEYS * LD + R, *out = bytes(6 * R * D * 4), *part = out + 2 * R * D, *diff = out + 4 * R * D;
    double mass[2][R] = {{0}}, some[2][R] = {{0}}, e[2][2 * R], spread[4 * LD];
    uint32_t order[KEYS];
    uint8_t flag[KEYS];
    kv_fill_normal(3, R * D, q), kv_fill_normal(4, KEYS * D, k);
    for (uint32_t i = 0; i < KEYS; i++) order[i] = i * 7 % KEYS, flag[i] = i % 3 == 0;
    CHECK(portable_turned(&s, HEADS, q, N_ROW * D, k, p, LD, p + KEYS * LD));
    CHECK(kv_probs_turned_ref(&s, HEADS, q, N_ROW * D, k, want, LD, want + KEYS * LD));
    CHECK(!memcmp(p, want, (KEYS * LD + R) * 4));
    portable_walk(R, D, p, LD, k, 0, 41, order, flag, mass[0], some[0], out, part);
    portable_walk(R, D, p, LD, k, 41, 99, order + 41, flag, mass[0], some[0], out, part);
    kv_walk_ref(R, D, p, LD, k, 0, 140, order, flag, mass[1], some[1], out + R * D, part + R * D);
    CHECK(!memcmp(mass[0], mass[1], sizeof *mass) && !memcmp(some[0], some[1], sizeof *some));
    CHECK(!memcmp(out, out + R * D, R * D * 4) && !memcmp(part, part + R * D, R * D * 4));
    portable_compare(R, D, mass[0], out, part, q, e[0], e[0] + R, diff, D);
    kv_walk_compare_ref(R, D, mass[0], out, part, q, e[1], e[1] + R, diff + R * D, D);
    CHECK(!memcmp(e[0], e[1], sizeof *e) && !memcmp(diff, diff + R * D, R * D * 4));
    portable_spread(KEYS, R, p, LD, spread, spread + LD);
    kv_column_spread_ref(KEYS, R, p, LD, spread + 2 * LD, spread + 3 * LD);
    CHECK(!memcmp(spread, spread + 2 * LD, R * 8) && !memcmp(spread + LD, spread + 3 * LD, R * 8));
    CHECK(portable_entropy(KEYS, p, 1e-10f) == kv_entropy_ref(KEYS, p, 1e-10f));
    CHECK(portable_squares(R * D, q, k, NULL) == kv_diff_squares_ref(R * D, q, k, NULL));
    free(q), free(k), free(p), free(out);
}

static void halves(int bits)
{
    enum { N = 30000 };
    float *x = bytes(2 * N * 4);
    uint8_t *p = bytes(8 * N);
    for (uint32_t i = 0; i < N; i++) x[i] = x[N + i] = kv_bits_float(i * 0x9e3779b1u & 0xfffff800u);
    CHECK(portable_pack(bits, N, x, p) == kv_pack_ref(bits, N, x, p + 4 * N));
    CHECK(!memcmp(p, p + 4 * N, bits == 32 ? 4 * N : 2 * N));
    CHECK(portable_round(bits, N, x) == kv_round_ref(bits, N, x + N));
    CHECK(!memcmp(x, x + N, N * 4));
    free(x), free(p);
}

int main(void)
{
    for (size_t i = 0; i < kv_kernel_count; i++) {
        const kv_kernel *k = &kv_kernel_table[i];
        for (size_t c = 0; c < k->n_case && !strcmp(k->name, "colsum"); c++) attention(&k->cases[c]);
    }
    walks();
    halves(16);
    halves(17);
    halves(32);
    return kv_tally();
}
