/* quant_ref.c - block formats of ggml, for loading on the CPU and as the definition of quant.cu. Every format is one
 * function; within a block, fields are in file order.
 *
 * Notation: d, m = IEEE halves; q = a quant; element e of a block. The 256-element formats share two scale packings:
 * 16 4-bit pairs (Q2_K) and 8 6-bit pairs in 12 bytes (Q4_K, Q5_K). Compiled with -ffp-contract=off. */
#include "kernels/quant.h"

#include <string.h>

static inline uint32_t get16(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8;
}

static inline uint32_t get32(const uint8_t *p)
{
    return get16(p) | get16(p + 2) << 16;
}

static inline float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Exponents 1..30 and subnormals at once: the half's bits as those of a float are 2^112 too small. */
static inline float half(const uint8_t *p)
{
    uint32_t h = get16(p), mag = h & 0x7fff, sign = (h & 0x8000) << 16, u;
    float x = float_of(mag << 13) * 0x1p112f;
    memcpy(&u, &x, 4);
    return float_of(sign | (mag < 0x7c00 ? u : mag << 13 | 0x7f800000u));
}

static void expand_f32(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 4) *y++ = float_of(get32(s));
}

static void expand_f16(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 2) *y++ = half(s);
}

static void expand_bf16(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 2) *y++ = float_of(get16(s) << 16);
}

/* d qs[16]: low nibbles are elements 0..15, high nibbles 16..31 */
static void expand_q4_0(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 18, y += 32) {
        float d = half(s);
        for (int j = 0; j < 16; j++) {
            y[j] = (float)((s[2 + j] & 15) - 8) * d;
            y[j + 16] = (float)((s[2 + j] >> 4) - 8) * d;
        }
    }
}

/* d m qs[16] */
static void expand_q4_1(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 20, y += 32) {
        float d = half(s), m = half(s + 2);
        for (int j = 0; j < 16; j++) {
            y[j] = (float)(s[4 + j] & 15) * d + m;
            y[j + 16] = (float)(s[4 + j] >> 4) * d + m;
        }
    }
}

/* d qh[4] qs[16]: bit e of qh is the fifth bit of element e */
static void expand_q5_0(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 22, y += 32) {
        float d = half(s);
        uint32_t qh = get32(s + 2);
        for (int j = 0; j < 16; j++) {
            int lo = (s[6 + j] & 15) | (int)(qh >> j & 1) << 4, hi = s[6 + j] >> 4 | (int)(qh >> (j + 16) & 1) << 4;
            y[j] = (float)(lo - 16) * d;
            y[j + 16] = (float)(hi - 16) * d;
        }
    }
}

/* d m qh[4] qs[16] */
static void expand_q5_1(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 24, y += 32) {
        float d = half(s), m = half(s + 2);
        uint32_t qh = get32(s + 4);
        for (int j = 0; j < 16; j++) {
            int lo = (s[8 + j] & 15) | (int)(qh >> j & 1) << 4, hi = s[8 + j] >> 4 | (int)(qh >> (j + 16) & 1) << 4;
            y[j] = (float)lo * d + m;
            y[j + 16] = (float)hi * d + m;
        }
    }
}

/* d qs[32], signed */
static void expand_q8_0(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 34, y += 32) {
        float d = half(s);
        for (int j = 0; j < 32; j++) y[j] = (float)(int8_t)s[2 + j] * d;
    }
}

static const int8_t iq4_value[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* d qs[16]: as Q4_0 with the values from a table */
static void expand_iq4_nl(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 18, y += 32) {
        float d = half(s);
        for (int j = 0; j < 16; j++) {
            y[j] = d * (float)iq4_value[s[2 + j] & 15];
            y[j + 16] = d * (float)iq4_value[s[2 + j] >> 4];
        }
    }
}

/* d scales_h(u16) scales_l[4] qs[128]: eight IQ4_NL blocks of 32 with 6-bit scales */
static void expand_iq4_xs(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 136) {
        float d = half(s);
        uint32_t high = get16(s + 2);
        const uint8_t *low = s + 4, *q = s + 8;
        for (int b = 0; b < 8; b++, q += 16, y += 32) {
            int ls = (low[b / 2] >> 4 * (b % 2) & 15) | (int)(high >> 2 * b & 3) << 4;
            float dl = d * (float)(ls - 32);
            for (int j = 0; j < 16; j++) {
                y[j] = dl * (float)iq4_value[q[j] & 15];
                y[j + 16] = dl * (float)iq4_value[q[j] >> 4];
            }
        }
    }
}

/* scales[16] qs[64] d dmin: groups of 16 elements; scale in the low nibble, minimum in the high one */
static void expand_q2_k(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 84, y += 256) {
        float d = half(s + 80), dmin = half(s + 82);
        for (int g = 0; g < 16; g++) {
            float dl = d * (float)(s[g] & 15), ml = dmin * (float)(s[g] >> 4);
            const uint8_t *q = s + 16 + 32 * (g / 8) + 16 * (g % 2);
            int shift = g % 8 / 2 * 2;
            for (int j = 0; j < 16; j++) y[16 * g + j] = dl * (float)(q[j] >> shift & 3) - ml;
        }
    }
}

/* hmask[32] qs[64] scales[12] d: 6-bit signed scales, third bit of a quant in hmask (set = no 4 to subtract) */
static void expand_q3_k(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 110, y += 256) {
        const uint8_t *sc = s + 96;
        float d = half(s + 108);
        for (int g = 0; g < 16; g++) {
            int scale = ((g < 8 ? sc[g] & 15 : sc[g - 8] >> 4) | (sc[8 + g % 4] >> 2 * (g / 4) & 3) << 4) - 32;
            float dl = d * (float)scale;
            const uint8_t *mask = s + 16 * (g % 2), *q = s + 32 + 32 * (g / 8) + 16 * (g % 2);
            int shift = g % 8 / 2 * 2;
            for (int j = 0; j < 16; j++)
                y[16 * g + j] = dl * (float)((q[j] >> shift & 3) - (mask[j] >> (g / 2) & 1 ? 0 : 4));
        }
    }
}

/* The 6-bit scale and minimum of group g (of 8) out of 12 bytes. */
static inline void scale_min(const uint8_t *sc, int g, int *scale, int *min)
{
    *scale = g < 4 ? sc[g] & 63 : (sc[g + 4] & 15) | (sc[g - 4] >> 6) << 4;
    *min = g < 4 ? sc[g + 4] & 63 : sc[g + 4] >> 4 | (sc[g] >> 6) << 4;
}

/* d dmin scales[12] qs[128]: groups of 32; two groups share 32 bytes, low nibbles first */
static void expand_q4_k(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 144, y += 256) {
        float d = half(s), dmin = half(s + 2);
        for (int g = 0; g < 8; g++) {
            int sc, m;
            scale_min(s + 4, g, &sc, &m);
            float dl = d * (float)sc, ml = dmin * (float)m;
            const uint8_t *q = s + 16 + 32 * (g / 2);
            int shift = 4 * (g % 2);
            for (int j = 0; j < 32; j++) y[32 * g + j] = dl * (float)(q[j] >> shift & 15) - ml;
        }
    }
}

/* d dmin scales[12] qh[32] qs[128]: as Q4_K, bit g of qh[j] is the fifth bit */
static void expand_q5_k(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 176, y += 256) {
        float d = half(s), dmin = half(s + 2);
        const uint8_t *qh = s + 16;
        for (int g = 0; g < 8; g++) {
            int sc, m;
            scale_min(s + 4, g, &sc, &m);
            float dl = d * (float)sc, ml = dmin * (float)m;
            const uint8_t *q = s + 48 + 32 * (g / 2);
            int shift = 4 * (g % 2);
            for (int j = 0; j < 32; j++)
                y[32 * g + j] = dl * (float)((q[j] >> shift & 15) + (qh[j] >> g & 1) * 16) - ml;
        }
    }
}

/* ql[128] qh[64] scales[16] (signed) d: 4 low bits in ql, 2 high bits in qh, groups of 16 */
static void expand_q6_k(const uint8_t *s, size_t n, float *y)
{
    for (; n--; s += 210, y += 256) {
        float d = half(s + 208);
        for (int g = 0; g < 16; g++) {
            int half_block = g / 8, k = g % 8 / 2, at = 16 * (g % 2);
            float dl = d * (float)(int8_t)s[192 + g];
            const uint8_t *ql = s + 64 * half_block + 32 * (k & 1) + at, *qh = s + 128 + 32 * half_block + at;
            for (int j = 0; j < 16; j++) {
                int q = (ql[j] >> 4 * (k / 2) & 15) | (qh[j] >> 2 * k & 3) << 4;
                y[16 * g + j] = dl * (float)(q - 32);
            }
        }
    }
}

/* Types without a function have a size, so that a file which carries such a tensor can be described. */
static const kv_quant table[] = {
    {"F32", 0, 1, 4, expand_f32},
    {"F16", 1, 1, 2, expand_f16},
    {"Q4_0", 2, 32, 18, expand_q4_0},
    {"Q4_1", 3, 32, 20, expand_q4_1},
    {"Q5_0", 6, 32, 22, expand_q5_0},
    {"Q5_1", 7, 32, 24, expand_q5_1},
    {"Q8_0", 8, 32, 34, expand_q8_0},
    {"Q8_1", 9, 32, 36, NULL},
    {"Q2_K", 10, 256, 84, expand_q2_k},
    {"Q3_K", 11, 256, 110, expand_q3_k},
    {"Q4_K", 12, 256, 144, expand_q4_k},
    {"Q5_K", 13, 256, 176, expand_q5_k},
    {"Q6_K", 14, 256, 210, expand_q6_k},
    {"Q8_K", 15, 256, 292, NULL},
    {"IQ2_XXS", 16, 256, 66, NULL},
    {"IQ2_XS", 17, 256, 74, NULL},
    {"IQ3_XXS", 18, 256, 98, NULL},
    {"IQ1_S", 19, 256, 50, NULL},
    {"IQ4_NL", 20, 32, 18, expand_iq4_nl},
    {"IQ3_S", 21, 256, 110, NULL},
    {"IQ2_S", 22, 256, 82, NULL},
    {"IQ4_XS", 23, 256, 136, expand_iq4_xs},
    {"I8", 24, 1, 1, NULL},
    {"I16", 25, 1, 2, NULL},
    {"I32", 26, 1, 4, NULL},
    {"I64", 27, 1, 8, NULL},
    {"F64", 28, 1, 8, NULL},
    {"IQ1_M", 29, 256, 56, NULL},
    {"BF16", 30, 1, 2, expand_bf16},
    {"TQ1_0", 34, 256, 54, NULL},
    {"TQ2_0", 35, 256, 66, NULL},
    {"MXFP4", 39, 32, 17, NULL},
};

const kv_quant *kv_quant_find(uint32_t ggml_type)
{
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].id == ggml_type) return &table[i];
    return NULL;
}

const char *kv_quant_supported(void)
{
    return "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL IQ4_XS Q2_K Q3_K Q4_K Q5_K Q6_K";
}
