/* test_literals.c - frames of traces/literals.c against libzstd, the slow and obvious reference: what it decodes is
 * what went in, for shapes of planes and for histograms made to be hard. */
#include <stdlib.h>
#include <zstd.h>

#include "tests/check.h"
#include "traces/format.h"

enum { N_MAX = 400000, BLOCK = 128 << 10 };
static uint8_t src[N_MAX], back[N_MAX];
static kvt_coder *coder, *other;
static kv_rng rng = {1};

static uint32_t below(uint32_t n)
{
    return (uint32_t)(kv_rng_next(&rng) % n);
}

/* src[0..n) as a frame: decodes to itself in memory of exactly the promised size, a flipped bit is never taken for
 * content, a coder that did other work writes the same. Returns the bytes. */
static size_t frame(const char *what, size_t n)
{
    uint8_t *dst = malloc(kvt_literals_bound(n)), *again = malloc(kvt_literals_bound(n));
    size_t bytes = kvt_literals(coder, dst, src, n), quiet = 0;
    CHECKF(bytes <= n + 13 + 3 * (n / BLOCK + 1), "%s, %zu bytes -> %zu", what, n, bytes);
    CHECKF(ZSTD_getFrameContentSize(dst, bytes) == n && ZSTD_findFrameCompressedSize(dst, bytes) == bytes, "%s, %zu",
           what, n);
    size_t got = ZSTD_decompress(back, N_MAX, dst, bytes);
    CHECKF(got == n && !memcmp(src, back, n), "%s, %zu: %s", what, n,
           ZSTD_isError(got) ? ZSTD_getErrorName(got) : "other bytes");
    CHECKF(kvt_literals(other, again, src, n) == bytes && !memcmp(dst, again, bytes), "%s, %zu", what, n);
    for (int i = 0; i < 12; i++) {
        size_t at = 5 + below((uint32_t)(i < 6 && bytes > 80 ? 75 : bytes - 5));
        uint8_t bit = (uint8_t)(1 << below(8));
        dst[at] ^= bit;
        got = ZSTD_decompress(back, N_MAX, dst, bytes);
        quiet += !ZSTD_isError(got) && (got != n || memcmp(src, back, n));
        dst[at] ^= bit;
    }
    CHECKF(!quiet, "%s, %zu: %zu flips", what, n, quiet);
    free(dst), free(again);
    return bytes;
}

/* What zstd makes of the same bytes when it does not look for repeats. */
static size_t theirs(size_t n)
{
    ZSTD_CCtx *c = ZSTD_createCCtx();
    size_t cap = ZSTD_compressBound(n);
    void *dst = malloc(cap);
    ZSTD_CCtx_setParameter(c, ZSTD_c_compressionLevel, 1);
    ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, 1);
    ZSTD_CCtx_setParameter(c, ZSTD_c_minMatch, 7);
    ZSTD_CCtx_setParameter(c, ZSTD_c_hashLog, 6);
    size_t got = ZSTD_compress2(c, dst, cap, src, n);
    free(dst), ZSTD_freeCCtx(c);
    return got;
}

/* Bytes drawn with these odds. */
static void draw(const uint32_t odds[256], size_t n)
{
    uint64_t up[256], sum = 0;
    for (int s = 0; s < 256; s++) up[s] = sum += odds[s];
    for (size_t i = 0; i < n; i++) {
        uint64_t v = kv_rng_next(&rng) % sum;
        int s = 0;
        while (up[s] <= v) s++;
        src[i] = (uint8_t)s;
    }
}

static void test_planes(void)
{
    static const size_t size[] = {256, 257, 1000, 4099, 65536, BLOCK, BLOCK + 1, BLOCK + 300, 3 * BLOCK + 77};
    for (int kind = 0; kind < 4; kind++)
        for (size_t k = 0; k < sizeof size / sizeof *size; k++) {
            size_t n = size[k];
            for (size_t i = 0; i < n; i++) { /* rows of 64 with a scale each, as the elements of a head have */
                float v = (float)(kv_rng_normal(&rng) * (0.1 + (double)(i % 64)));
                uint16_t h = kv_f32_to_bf16(v);
                if (kind & 1) kv_encode_f32(KV_F16, &v, 1, &h);
                src[i] = (uint8_t)(kind & 2 ? h : h >> 8);
            }
            size_t ours = frame(kind & 2 ? "mantissas" : "exponents", n), zstd = theirs(n);
            CHECKF((double)ours <= 1.002 * (double)zstd + 24, "%d: %zu of %zu, zstd %zu", kind, ours, n, zstd);
        }
}

static void test_histograms(void)
{
    uint32_t odds[256];
    for (size_t n = 1; n < 700; n += n < 5 || n > 250 ? 1 : 13) {
        memset(src, 7, n);
        frame("one value", n);
        for (size_t i = 0; i < n; i++) src[i] = (uint8_t)(i % 3 ? 200 : 201);
        frame("two values", n);
        for (size_t i = 0; i < n; i++) src[i] = (uint8_t)i;
        frame("all values", n);
    }
    memset(src, 7, BLOCK + 5);
    CHECK(frame("one value", BLOCK) == 9 + 4 + 4);
    CHECK(frame("one value, a short block behind", BLOCK + 5) == 9 + 4 + 8 + 4);
    src[BLOCK / 2] = 8;
    CHECK(frame("one value but once", BLOCK) < BLOCK / 8 + 60);
    for (size_t i = 0; i < BLOCK; i++) src[i] = (uint8_t)i;
    CHECK(frame("all values", BLOCK) == BLOCK + 16);
    /* Codes as long as Fibonacci's numbers ask for, many times the limit */
    for (uint32_t k = 2; k <= 40; k++) {
        uint64_t a = 1, b = 1;
        memset(odds, 0, sizeof odds);
        for (uint32_t s = 0; s < k; s++, b += a, a = b - a)
            odds[s * 83 & 255] = (uint32_t)(a < 1u << 30 ? a : 1u << 30);
        draw(odds, 40000);
        frame("Fibonacci", 40000);
    }
    /* 192 codes of eight bits and one of two: one weight only in front of the last, which its coding cannot say */
    for (size_t i = 0; i < BLOCK; i++) src[i] = (uint8_t)(i % 256 < 192 ? i % 256 : 192);
    CHECK(frame("one weight", BLOCK) == BLOCK + 16);
    for (size_t i = 0; i < BLOCK; i++) src[i] = (uint8_t)(i % 256 < 64 ? 0 : i % 256);
    CHECK(frame("many weights", BLOCK) < BLOCK * 7 / 8);
    for (int round = 0; round < 400; round++) {
        uint32_t k = 1 + below(round & 1 ? 256 : 40), steep = 1 + below(20);
        size_t n = 256 + below(round % 8 ? 6000 : 2 * BLOCK);
        memset(odds, 0, sizeof odds);
        for (uint32_t i = 0; i < k; i++) odds[below(256)] = 1 + (below(1u << 20) >> below(steep));
        draw(odds, n);
        frame("drawn", n);
    }
}

/* What a sample says is not what the rest is. */
static void test_samples(void)
{
    for (int kind = 0; kind < 4; kind++)
        for (uint32_t step = 8; step <= 136; step += 8) {
            for (size_t i = 0; i < BLOCK; i++) {
                bool seen = i % step < 8;
                if (kind == 0) src[i] = (uint8_t)(seen ? 0x3f : below(256));
                if (kind == 1) src[i] = (uint8_t)(seen && below(9) ? 0x3f : below(256));
                if (kind == 2) src[i] = (uint8_t)(seen ? below(256) : 0x3f + below(2));
                if (kind == 3) src[i] = (uint8_t)(seen ? 0x3e + below(2) : i == BLOCK / 2 ? 0 : 0x40 + below(2));
            }
            frame("sample", BLOCK);
        }
}

int main(void)
{
    coder = kvt_coder_open(), other = kvt_coder_open();
    if (!coder || !other) return 1;
    test_planes();
    test_histograms();
    test_samples();
    free(coder), free(other);
    return kv_tally();
}
