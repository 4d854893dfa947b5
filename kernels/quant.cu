/* quant.cu - stored weights on the device: kv_expand_dev of gpu.h, the tensor types of quant.h element by element.
 *
 * Products and sums are rounded one by one (__fmul_rn, __fadd_rn), in the order of quant_ref.c, so that the bytes are
 * the same. A thread makes one element; its neighbours read the same block. Blocks start at any byte. */
#include "kernels/gpu.h"
#include "kernels/half.h"
#include "kernels/quant.h"
#include "kernels/tensor.cuh"

namespace
{
const int THREADS = 256;

enum type {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0 = 6,
    Q5_1,
    Q8_0,
    Q2_K = 10,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30
};

__constant__ int8_t iq4_value[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

KV_DEV uint32_t word16(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8;
}
KV_DEV uint32_t word32(const uint8_t *p)
{
    return word16(p) | word16(p + 2) << 16;
}
KV_DEV float half_at(const uint8_t *p)
{
    return __half2float(__ushort_as_half((unsigned short)word16(p)));
}
KV_DEV float times(float d, int q)
{
    return __fmul_rn(d, (float)q);
}
/* Element e of the 4-bit halves of 16 bytes: low ones first. */
KV_DEV int nibble(const uint8_t *qs, int e)
{
    return e < 16 ? qs[e] & 15 : qs[e - 16] >> 4;
}
/* The 6-bit scale and minimum of group g (of 8) out of 12 bytes. */
KV_DEV int scale_of(const uint8_t *sc, int g)
{
    return g < 4 ? sc[g] & 63 : (sc[g + 4] & 15) | (sc[g - 4] >> 6) << 4;
}
KV_DEV int min_of(const uint8_t *sc, int g)
{
    return g < 4 ? sc[g + 4] & 63 : sc[g + 4] >> 4 | (sc[g] >> 6) << 4;
}

/* Elements and bytes of a block, element e of the block at s. */
template <int TYPE> struct block;
#define BLOCK(name, elements, bytes)                                                                                   \
    template <> struct block<name> {                                                                                   \
        static const int N = elements, BYTES = bytes;                                                                  \
        static KV_DEV float value(const uint8_t *s, int e);                                                            \
    };                                                                                                                 \
    KV_DEV float block<name>::value(const uint8_t *s, int e)

BLOCK(F32, 1, 4)
{
    (void)e;
    return __uint_as_float(word32(s));
}
BLOCK(F16, 1, 2)
{
    (void)e;
    return half_at(s);
}
BLOCK(BF16, 1, 2)
{
    (void)e;
    return __uint_as_float(word16(s) << 16);
}
BLOCK(Q4_0, 32, 18)
{
    return times(half_at(s), nibble(s + 2, e) - 8);
}
BLOCK(Q4_1, 32, 20)
{
    return __fadd_rn(times(half_at(s), nibble(s + 4, e)), half_at(s + 2));
}
BLOCK(Q5_0, 32, 22)
{
    return times(half_at(s), (nibble(s + 6, e) | (int)(word32(s + 2) >> e & 1) << 4) - 16);
}
BLOCK(Q5_1, 32, 24)
{
    return __fadd_rn(times(half_at(s), nibble(s + 8, e) | (int)(word32(s + 4) >> e & 1) << 4), half_at(s + 2));
}
BLOCK(Q8_0, 32, 34)
{
    return times(half_at(s), (int8_t)s[2 + e]);
}
BLOCK(IQ4_NL, 32, 18)
{
    return times(half_at(s), iq4_value[nibble(s + 2, e)]);
}
BLOCK(IQ4_XS, 256, 136)
{
    int b = e / 32, scale = (s[4 + b / 2] >> 4 * (b % 2) & 15) | (int)(word16(s + 2) >> 2 * b & 3) << 4;
    return times(times(half_at(s), scale - 32), iq4_value[nibble(s + 8 + 16 * b, e % 32)]);
}
BLOCK(Q2_K, 256, 84)
{
    int g = e / 16, q = s[16 + 32 * (e / 128) + e % 32] >> 2 * (e % 128 / 32) & 3;
    return __fsub_rn(times(times(half_at(s + 80), s[g] & 15), q), times(half_at(s + 82), s[g] >> 4));
}
BLOCK(Q3_K, 256, 110)
{
    const uint8_t *sc = s + 96;
    int g = e / 16, q = s[32 + 32 * (e / 128) + e % 32] >> 2 * (e % 128 / 32) & 3, third = s[e % 32] >> e / 32 & 1;
    int scale = ((g < 8 ? sc[g] & 15 : sc[g - 8] >> 4) | (sc[8 + g % 4] >> 2 * (g / 4) & 3) << 4) - 32;
    return times(times(half_at(s + 108), scale), q - (third ? 0 : 4));
}
BLOCK(Q4_K, 256, 144)
{
    int g = e / 32, q = s[16 + 32 * (e / 64) + e % 32] >> 4 * (g % 2) & 15;
    return __fsub_rn(times(times(half_at(s), scale_of(s + 4, g)), q), times(half_at(s + 2), min_of(s + 4, g)));
}
BLOCK(Q5_K, 256, 176)
{
    int g = e / 32, q = (s[48 + 32 * (e / 64) + e % 32] >> 4 * (g % 2) & 15) + (s[16 + e % 32] >> g & 1) * 16;
    return __fsub_rn(times(times(half_at(s), scale_of(s + 4, g)), q), times(half_at(s + 2), min_of(s + 4, g)));
}
BLOCK(Q6_K, 256, 210)
{
    int n = e / 128, k = e % 128 / 32, l = e % 32;
    int q = (s[64 * n + 32 * (k & 1) + l] >> 4 * (k / 2) & 15) | (s[128 + 32 * n + l] >> 2 * k & 3) << 4;
    return times(times(half_at(s + 208), (int8_t)s[192 + e / 16]), q - 32);
}

template <int TYPE>
__global__ void expand(size_t n, size_t n_col, const uint8_t *src, void *dst, int bits, uint64_t first, uint64_t *found)
{
    typedef block<TYPE> B;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) {
        float x = B::value(src + i / B::N * B::BYTES, (int)(i % B::N));
        uint32_t u = __float_as_uint(x);
        bool lost = false;
        if (bits == 32) {
            ((uint32_t *)dst)[i] = u;
        } else {
            ((uint16_t *)dst)[i] = (uint16_t)(bits == 17 ? kv_bf16_bits(u) : kv_f16_bits(u));
            lost = bits == 17 ? kv_bf16_over(u) : kv_f16_over(u);
        }
        bool bad = !isfinite(x);
        if (bad || lost) atomicMin((unsigned long long *)found + !bad, (unsigned long long)(first + i / n_col));
    }
}
} // namespace

extern "C" int kv_expand_dev(uint32_t type, size_t n_row, size_t n_col, const void *src, void *dst, int bits,
                             uint64_t first, uint64_t *found, kv_gpu_stream s)
{
    const kv_quant *q = kv_quant_find(type);
    const size_t n = n_row * n_col, blocks = (n + THREADS - 1) / THREADS;
    const unsigned grid = (unsigned)(blocks < 32768 ? blocks : 32768);
    if (!n) return 0;
    if (!q || n_col % q->block || (bits != 32 && bits != 16 && bits != 17)) return cudaErrorInvalidValue;
    switch (type) {
#define CASE(name)                                                                                                     \
    case name: expand<name><<<grid, THREADS, 0, s>>>(n, n_col, (const uint8_t *)src, dst, bits, first, found); break
        CASE(F32);
        CASE(F16);
        CASE(BF16);
        CASE(Q4_0);
        CASE(Q4_1);
        CASE(Q5_0);
        CASE(Q5_1);
        CASE(Q8_0);
        CASE(IQ4_NL);
        CASE(IQ4_XS);
        CASE(Q2_K);
        CASE(Q3_K);
        CASE(Q4_K);
        CASE(Q5_K);
        CASE(Q6_K);
#undef CASE
    default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
