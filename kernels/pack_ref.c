/* pack_ref.c - rounding to half floats, case by case, and splitting into byte planes.
 * To nearest, ties to even; too large gives infinity; a NaN stays a NaN with its sign and upper payload bits. */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <math.h>

/* f as f16 (bits 16) or bf16 (bits 17). */
static uint16_t half_of(int bits, float f)
{
    uint32_t u = kv_float_bits(f), sign = u >> 16 & 0x8000, mag = u & 0x7fffffff;
    if (bits == 17) {
        if (mag > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
        uint32_t up = u >> 16, rest = u & 0xffff;
        return (uint16_t)(up + (rest > 0x8000 || (rest == 0x8000 && (up & 1))));
    }
    if (mag > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (mag >> 13 & 0x3ff));
    double x = fabs((double)f);
    if (x >= 65520) return (uint16_t)(sign | 0x7c00);                           /* halfway past the largest, and more */
    if (x < 0x1p-14) return (uint16_t)(sign | (uint32_t)nearbyint(x * 0x1p24)); /* multiples of 2^-24 */
    int e;
    double m = frexp(x, &e); /* x = m 2^e, 0.5 <= m < 1 */
    /* 11 bits of mantissa; when they round up to 2048 the sum carries into the exponent, as it should */
    return (uint16_t)(sign | (((uint32_t)(e + 13) << 10) + (uint32_t)nearbyint(m * 2048)));
}

static float half_value(int bits, uint16_t h)
{
    if (bits == 17) return kv_bits_float((uint32_t)h << 16);
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 0x3ff;
    if (e == 31) return kv_bits_float(sign | 0x7f800000 | m << 13);
    double x = e ? ldexp(1024 + m, (int)e - 25) : ldexp(m, -24);
    return kv_bits_float(sign | kv_float_bits((float)x));
}

static bool overflowed(int bits, float f, uint16_t h)
{
    return isfinite(f) && isinf(half_value(bits, h));
}

size_t kv_pack_ref(int bits, size_t n, const float *src, uint8_t *dst)
{
    size_t over = 0;
    for (size_t i = 0; i < n; i++) {
        if (bits == 32) {
            for (int b = 0; b < 4; b++) dst[b * n + i] = (uint8_t)(kv_float_bits(src[i]) >> 8 * b);
            continue;
        }
        uint16_t h = half_of(bits, src[i]);
        dst[i] = (uint8_t)h;
        dst[n + i] = (uint8_t)(h >> 8);
        over += overflowed(bits, src[i], h);
    }
    return over;
}

size_t kv_round_ref(int bits, size_t n, float *x)
{
    size_t over = 0;
    for (size_t i = 0; i < n && bits != 32; i++) {
        uint16_t h = half_of(bits, x[i]);
        over += overflowed(bits, x[i], h);
        x[i] = half_value(bits, h);
    }
    return over;
}
