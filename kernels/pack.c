/* pack.c - rounding and byte planes, a block at a time so that every step is a loop over L1. */
#include "kernels/half.h"
#include "kernels/isa.h"
#include "kernels/math.h"

#define BLOCK 1024

KV_INLINE size_t pack_body(int bits, size_t n, const float *src, uint8_t *dst)
{
    size_t over = 0;
    for (size_t i0 = 0; i0 < n; i0 += BLOCK) {
        size_t m = n - i0 < BLOCK ? n - i0 : BLOCK;
        uint32_t u[BLOCK], count = 0;
        uint16_t h[BLOCK];
        memcpy(u, src + i0, m * sizeof *u);
        if (bits == 32) {
            for (int b = 0; b < 4; b++) {
                uint8_t *to = dst + b * n + i0;
                for (size_t i = 0; i < m; i++) to[i] = (uint8_t)(u[i] >> 8 * b);
            }
            continue;
        }
        if (bits == 17)
            for (size_t i = 0; i < m; i++) h[i] = (uint16_t)kv_bf16_bits(u[i]), count += kv_bf16_over(u[i]);
        else
            for (size_t i = 0; i < m; i++) h[i] = (uint16_t)kv_f16_bits(u[i]), count += kv_f16_over(u[i]);
        uint8_t *low = dst + i0, *high = low + n;
        for (size_t i = 0; i < m; i++) low[i] = (uint8_t)h[i];
        for (size_t i = 0; i < m; i++) high[i] = (uint8_t)(h[i] >> 8);
        over += count;
    }
    return over;
}

KV_INLINE size_t round_body(int bits, size_t n, float *x)
{
    size_t over = 0;
    for (size_t i0 = 0; i0 < n && bits != 32; i0 += BLOCK) {
        size_t m = n - i0 < BLOCK ? n - i0 : BLOCK;
        uint32_t u[BLOCK], count = 0;
        memcpy(u, x + i0, m * sizeof *u);
        if (bits == 17)
            for (size_t i = 0; i < m; i++) count += kv_bf16_over(u[i]), u[i] = kv_bf16_bits(u[i]) << 16;
        else
            for (size_t i = 0; i < m; i++) count += kv_f16_over(u[i]), u[i] = kv_f16_round(u[i]);
        memcpy(x + i0, u, m * sizeof *u);
        over += count;
    }
    return over;
}

static size_t pack_plain(int bits, size_t n, const float *src, uint8_t *dst)
{
    return pack_body(bits, n, src, dst);
}

KV_V3 static size_t pack_v3(int bits, size_t n, const float *src, uint8_t *dst)
{
    return pack_body(bits, n, src, dst);
}

static size_t round_plain(int bits, size_t n, float *x)
{
    return round_body(bits, n, x);
}

KV_V3 static size_t round_v3(int bits, size_t n, float *x)
{
    return round_body(bits, n, x);
}

size_t kv_pack(int bits, size_t n, const float *src, uint8_t *dst)
{
    return (kv_has_v3() ? pack_v3 : pack_plain)(bits, n, src, dst);
}

size_t kv_round(int bits, size_t n, float *x)
{
    return (kv_has_v3() ? round_v3 : round_plain)(bits, n, x);
}
