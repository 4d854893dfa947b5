/* test_portable.c - the baseline version of the EXACT kernels, which a machine with AVX2 never chooses: the sources are
 * compiled here a second time, under other names and without it, and must give the bytes of the reference. */
#define KV_NO_V3
#define kv_colsum portable_colsum
#define kv_probs  portable_probs
#define kv_pack   portable_pack
#define kv_round  portable_round

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
#include "kernels/pack.c"

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
    halves(16);
    halves(17);
    halves(32);
    return kv_tally();
}
