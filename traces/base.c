/* base.c - status and error text, allocation, half floats, hashes, the seeded generator, files (base.h). */
#include "traces/base.h"
#include "traces/memtext.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined __x86_64__ && defined __GNUC__
#include <immintrin.h>
#endif

kv_status kv_fail(kv_error *err, kv_status st, const char *fmt, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(err->msg, sizeof err->msg, fmt, ap);
        va_end(ap);
        /* Names come from files: a control character in one must not break the single line. */
        for (char *p = err->msg; *p; p++)
            if ((unsigned char)*p < 32 || *p == 127) *p = '?';
    }
    return st;
}

kv_status kv_array(void *out, size_t n, size_t size, kv_error *err)
{
    void *p = calloc(n ? n : 1, size ? size : 1);
    memcpy(out, &p, sizeof p);
    if (!p) return kv_fail(err, KV_ENOMEM, "out of memory: cannot allocate %zu elements of %zu bytes", n, size);
    return KV_OK;
}

char *kv_format(const char *fmt, ...)
{
    char *s = NULL;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&s, fmt, ap) < 0) s = NULL, kv_text_lose();
    va_end(ap);
    return s;
}

/* ------------------------------------------------------------------------------------------ element types */
static const struct {
    const char *name;
    size_t bytes;
} dtypes[KV_DTYPE_COUNT] = {{"f32", 4}, {"f16", 2}, {"bf16", 2}, {"u8", 1}, {"u32", 4}, {"i32", 4}};

size_t kv_dtype_bytes(kv_dtype t)
{
    return (unsigned)t < KV_DTYPE_COUNT ? dtypes[t].bytes : 0;
}

const char *kv_dtype_name(kv_dtype t)
{
    return (unsigned)t < KV_DTYPE_COUNT ? dtypes[t].name : "?";
}

bool kv_dtype_parse(const char *s, kv_dtype *out)
{
    for (int i = 0; i < KV_DTYPE_COUNT; i++)
        if (!strcmp(s, dtypes[i].name)) return *out = (kv_dtype)i, true;
    return false;
}

static inline float bits_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint32_t float_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

/* a where the condition holds, else b, without a branch, so that the bulk loops below become vector code. */
static inline uint32_t pick(bool cond, uint32_t a, uint32_t b)
{
    uint32_t m = 0u - (uint32_t)cond;
    return (a & m) | (b & ~m);
}

/* Subnormals: the ten bits are put into the mantissa of 2^-14 and 2^-14 is taken off again, which is exact.
 * Signalling NaNs come out quiet, as the hardware does it. */
static inline float half_float(uint16_t h)
{
    uint32_t mag = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t normal = mag + (112u << 23);
    uint32_t special = mag | 0x7f800000u | pick(mag > 0x0f800000u, 0x400000u, 0);
    uint32_t tiny = float_bits(bits_float(mag + (113u << 23)) - bits_float(113u << 23));
    return bits_float(pick(mag >= 0x0f800000u, special, pick(mag < 0x00800000u, tiny, normal)) | sign);
}

float kv_f16_to_f32(uint16_t h)
{
    return half_float(h);
}

/* Nearest, ties to even. Below 2^-14 the addition of 0.5 makes the FPU round at the bit where a half's subnormals
 * end; above, the rounding is added to the bits, and a carry out of the mantissa is the next exponent (or infinity). */
static inline uint16_t float_half(float f)
{
    uint32_t u = float_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    uint32_t normal = (a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13;
    uint32_t tiny = float_bits(bits_float(a) + 0.5f) - float_bits(0.5f);
    uint32_t special = pick(a > 0x7f800000u, 0x7e00 | (a >> 13 & 0x3ff), 0x7c00);
    return (uint16_t)(pick(a >= 0x47800000u, special, pick(a < (113u << 23), tiny, normal)) | sign);
}

uint16_t kv_f32_to_f16(float f)
{
    return float_half(f);
}

static inline uint16_t float_bf16(float f)
{
    uint32_t u = float_bits(f), nan = (u & 0x7fffffff) > 0x7f800000u;
    return (uint16_t)(nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}

uint16_t kv_f32_to_bf16(float f)
{
    return float_bf16(f);
}

#define LANES 16 /* a fixed inner count is what gcc -O2 needs to vectorise */

void kv_decode_f32(kv_dtype t, const void *src, size_t n, float *dst)
{
    const uint8_t *s = src;
    uint16_t h[LANES];
    size_t i = 0;
    switch (t) {
    case KV_F32:
        if (n) memcpy(dst, src, n * 4);
        return;
    case KV_F16:
        for (; i + LANES <= n; i += LANES) {
            memcpy(h, s + 2 * i, sizeof h);
            for (int k = 0; k < LANES; k++) dst[i + k] = half_float(h[k]);
        }
        for (; i < n; i++) dst[i] = half_float(kv_get16(s + 2 * i));
        return;
    case KV_BF16:
        for (; i + LANES <= n; i += LANES) {
            memcpy(h, s + 2 * i, sizeof h);
            for (int k = 0; k < LANES; k++) dst[i + k] = kv_bf16_to_f32(h[k]);
        }
        for (; i < n; i++) dst[i] = kv_bf16_to_f32(kv_get16(s + 2 * i));
        return;
    default: assert(0 && "not a float type");
    }
}

bool kv_encode_f32(kv_dtype t, const float *src, size_t n, void *dst)
{
    uint8_t *d = dst;
    uint16_t h[LANES];
    uint32_t over = 0;
    size_t i = 0;
    switch (t) {
    case KV_F32:
        if (n) memcpy(dst, src, n * 4);
        return true;
    case KV_F16:
        for (; i + LANES <= n; i += LANES) {
            for (int k = 0; k < LANES; k++) h[k] = float_half(src[i + k]);
            for (int k = 0; k < LANES; k++)
                over |= (uint32_t)((h[k] & 0x7fff) == 0x7c00) & (uint32_t)((float_bits(src[i + k]) << 1) < 0xff000000u);
            memcpy(d + 2 * i, h, sizeof h);
        }
        for (; i < n; i++) {
            uint16_t v = float_half(src[i]);
            over |= (uint32_t)((v & 0x7fff) == 0x7c00) & (uint32_t)((float_bits(src[i]) << 1) < 0xff000000u);
            kv_put16(d + 2 * i, v);
        }
        return !over;
    case KV_BF16:
        for (; i + LANES <= n; i += LANES) {
            for (int k = 0; k < LANES; k++) h[k] = float_bf16(src[i + k]);
            memcpy(d + 2 * i, h, sizeof h);
        }
        for (; i < n; i++) kv_put16(d + 2 * i, float_bf16(src[i]));
        return true;
    default: assert(0 && "not a float type");
    }
    return false;
}

/* ---------------------------------------------------------------------------------------------- hashes */
static uint32_t crc_table[8][256];
static pthread_once_t crc_once = PTHREAD_ONCE_INIT;

static void crc_init(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
        crc_table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++)
            crc_table[k][i] = crc_table[k - 1][i] >> 8 ^ crc_table[0][crc_table[k - 1][i] & 255];
}

/* Slicing by eight: eight table look-ups a word that do not wait for one another. crc is the inverted state. */
static uint32_t crc_slice(uint32_t crc, const uint8_t *b, size_t n)
{
    pthread_once(&crc_once, crc_init);
    for (; n >= 8; n -= 8, b += 8) {
        uint64_t v = kv_get64(b) ^ crc;
        crc = crc_table[7][v & 255] ^ crc_table[6][v >> 8 & 255] ^ crc_table[5][v >> 16 & 255] ^
              crc_table[4][v >> 24 & 255] ^ crc_table[3][v >> 32 & 255] ^ crc_table[2][v >> 40 & 255] ^
              crc_table[1][v >> 48 & 255] ^ crc_table[0][v >> 56];
    }
    for (; n; n--, b++) crc = crc >> 8 ^ crc_table[0][(crc ^ *b) & 255];
    return crc;
}

#if defined __x86_64__ && defined __GNUC__
/* The same with carry-less multiplication: four 128-bit remainders are folded 512 bits ahead, then into one, then
 * reduced (Gopal et al., "Fast CRC computation for generic polynomials using PCLMULQDQ", Intel 2009; constants for the
 * reflected polynomial from there). Slicing was a fifth of the time of writing a trace. n >= 64, a multiple of 16. */
__attribute__((target("pclmul,sse4.1"))) static uint32_t crc_fold(uint32_t crc, const uint8_t *b, size_t n)
{
    const __m128i k12 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), k34 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i k5 = _mm_set_epi64x(0, 0x0163cd6124), poly = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low = _mm_setr_epi32(-1, 0, -1, 0);
    __m128i x[4], y;
    for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128((const __m128i *)(const void *)(b + 16 * i));
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
    for (b += 64, n -= 64; n >= 64; b += 64, n -= 64)
        for (int i = 0; i < 4; i++) {
            y = _mm_clmulepi64_si128(x[i], k12, 0x00);
            x[i] = _mm_xor_si128(_mm_clmulepi64_si128(x[i], k12, 0x11), y);
            x[i] = _mm_xor_si128(x[i], _mm_loadu_si128((const __m128i *)(const void *)(b + 16 * i)));
        }
    for (int i = 1; i < 4; i++) {
        y = _mm_clmulepi64_si128(x[0], k34, 0x00);
        x[0] = _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x[0], k34, 0x11), y), x[i]);
    }
    for (; n >= 16; b += 16, n -= 16) {
        y = _mm_clmulepi64_si128(x[0], k34, 0x00);
        x[0] = _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x[0], k34, 0x11), y),
                             _mm_loadu_si128((const __m128i *)(const void *)b));
    }
    x[0] = _mm_xor_si128(_mm_srli_si128(x[0], 8), _mm_clmulepi64_si128(x[0], k34, 0x10));
    y = _mm_srli_si128(x[0], 4);
    x[0] = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(x[0], low), k5, 0x00), y);
    y = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(x[0], low), poly, 0x10), low);
    x[0] = _mm_xor_si128(x[0], _mm_clmulepi64_si128(y, poly, 0x00));
    return (uint32_t)_mm_extract_epi32(x[0], 1);
}
#endif

uint32_t kv_crc32(uint32_t crc, const void *p, size_t n)
{
    const uint8_t *b = p;
    crc = ~crc;
#if defined __x86_64__ && defined __GNUC__
    if (n >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        size_t whole = n & ~(size_t)15;
        crc = crc_fold(crc, b, whole);
        b += whole, n -= whole;
    }
#endif
    return ~crc_slice(crc, b, n);
}

static const uint32_t sha_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static inline uint32_t rotr(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void sha_block(uint32_t h[8], const uint8_t *p)
{
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++) w[i] = __builtin_bswap32(kv_get32(p + 4 * i));
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t s1 = rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    memcpy(s, h, 32);
    for (int i = 0; i < 64; i++) {
        uint32_t e1 = rotr(s[4], 6) ^ rotr(s[4], 11) ^ rotr(s[4], 25);
        uint32_t t1 = s[7] + e1 + ((s[4] & s[5]) ^ (~s[4] & s[6])) + sha_k[i] + w[i];
        uint32_t e0 = rotr(s[0], 2) ^ rotr(s[0], 13) ^ rotr(s[0], 22);
        uint32_t t2 = e0 + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        s[7] = s[6], s[6] = s[5], s[5] = s[4], s[4] = s[3] + t1;
        s[3] = s[2], s[2] = s[1], s[1] = s[0], s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

void kv_sha256_init(kv_sha256 *s)
{
    static const uint32_t h0[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->h, h0, sizeof h0);
    s->n_bytes = 0;
}

void kv_sha256_update(kv_sha256 *s, const void *p, size_t n)
{
    const uint8_t *b = p;
    size_t have = s->n_bytes % 64;
    s->n_bytes += n;
    if (have) {
        size_t k = n < 64 - have ? n : 64 - have;
        memcpy(s->buf + have, b, k);
        b += k, n -= k;
        if (have + k < 64) return;
        sha_block(s->h, s->buf);
    }
    for (; n >= 64; n -= 64, b += 64) sha_block(s->h, b);
    if (n) memcpy(s->buf, b, n);
}

void kv_sha256_final(kv_sha256 *s, uint8_t out[32])
{
    uint64_t bits = s->n_bytes * 8;
    static const uint8_t pad[64] = {0x80};
    uint8_t len[8];
    kv_sha256_update(s, pad, 1 + (119 - s->n_bytes % 64) % 64);
    for (int i = 0; i < 8; i++) len[i] = (uint8_t)(bits >> (56 - 8 * i));
    kv_sha256_update(s, len, 8);
    for (int i = 0; i < 32; i++) out[i] = (uint8_t)(s->h[i / 4] >> (24 - 8 * (i % 4)));
}

void kv_sha256_hex(kv_sha256 *s, char out[65])
{
    uint8_t b[32];
    kv_sha256_final(s, b);
    for (int i = 0; i < 32; i++) {
        out[2 * i] = "0123456789abcdef"[b[i] >> 4];
        out[2 * i + 1] = "0123456789abcdef"[b[i] & 15];
    }
    out[64] = 0;
}

kv_status kv_sha256_file(const char *path, char out[65], kv_error *err)
{
    kv_status st = KV_OK;
    uint8_t *buf = NULL;
    kv_sha256 s;
    int fd = -1;
    out[0] = 0;
    if ((st = kv_array(&buf, 1 << 20, 1, err))) goto out;
    if ((fd = open(path, O_RDONLY | O_CLOEXEC)) < 0) {
        st = kv_fail(err, KV_EIO, "cannot read '%s': %s", path, strerror(errno));
        goto out;
    }
    kv_sha256_init(&s);
    for (;;) {
        ssize_t got = read(fd, buf, 1 << 20);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            st = kv_fail(err, KV_EIO, "cannot read '%s': %s", path, strerror(errno));
            goto out;
        }
        if (!got) break;
        kv_sha256_update(&s, buf, (size_t)got);
    }
    kv_sha256_hex(&s, out);
out:
    if (fd >= 0) close(fd);
    free(buf);
    return st;
}

/* ------------------------------------------------------------------------------------------- generator */
uint64_t kv_rng_next(kv_rng *r)
{
    uint64_t z = r->s += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

double kv_rng_unit(kv_rng *r)
{
    return (double)(kv_rng_next(r) >> 11) * 0x1p-53;
}

double kv_rng_normal(kv_rng *r)
{
    double s = -6;
    for (int i = 0; i < 12; i++) s += kv_rng_unit(r);
    return s;
}

/* ----------------------------------------------------------------------------------------------- files */
kv_status kv_read_file(const char *path, size_t max, uint8_t **out, size_t *n, kv_error *err)
{
    kv_status st = KV_OK;
    uint8_t *buf = NULL, *more;
    size_t cap = 0, len = 0;
    struct stat sb;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    *out = NULL, *n = 0;
    if (fd < 0 || fstat(fd, &sb)) goto io;
    if (S_ISDIR(sb.st_mode)) {
        errno = EISDIR;
        goto io;
    }
    if (S_ISREG(sb.st_mode) && (uint64_t)sb.st_size > max) goto large;
    /* The size is a first guess only: files in /proc say 0, files grow, pipes have none. */
    cap = S_ISREG(sb.st_mode) ? (size_t)sb.st_size + 1 : 65536;
    for (;;) {
        if (!buf || len == cap) {
            if (buf && !kv_mul(cap, 2, &cap)) goto large;
            if (!(more = realloc(buf, cap + 1))) {
                st = kv_fail(err, KV_ENOMEM, "cannot read '%s': out of memory", path);
                goto out;
            }
            buf = more;
        }
        ssize_t got = read(fd, buf + len, cap - len);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) goto io;
        if (!got) break;
        len += (size_t)got;
        if (len > max) goto large;
    }
    buf[len] = 0;
    *out = buf, *n = len;
    buf = NULL;
    goto out;
large:
    st =
        kv_fail(err, KV_EFORMAT, "cannot read '%s': larger than %zu bytes, the limit for this kind of file", path, max);
    goto out;
io:
    st = kv_fail(err, KV_EIO, "cannot read '%s': %s", path, strerror(errno));
out:
    free(buf);
    if (fd >= 0) close(fd);
    return st;
}

kv_status kv_read_regular(const char *path, size_t max, uint8_t **out, size_t *n, kv_error *err)
{
    struct stat sb;
    *out = NULL, *n = 0;
    if (stat(path, &sb)) return kv_fail(err, KV_EIO, "cannot read '%s': %s", path, strerror(errno));
    if (!S_ISREG(sb.st_mode)) return kv_fail(err, KV_EIO, "cannot read '%s': not a regular file", path);
    return kv_read_file(path, max, out, n, err);
}

int kv_open_folder_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *dir = slash ? kv_format("%.*s", (int)(slash - path + 1), path) : kv_format(".");
    int fd = dir ? open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    free(dir);
    return fd;
}

/* A rename is only on the disk when its folder is. Some file systems cannot sync a folder; that is not an error. */
static void sync_folder(const char *path)
{
    int fd = kv_open_folder_of(path);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

kv_status kv_outfile_open(const char *path, kv_outfile *o, kv_error *err)
{
    struct stat sb;
    memset(o, 0, sizeof *o);
    bool in_place = stat(path, &sb) == 0 && !S_ISREG(sb.st_mode);
    if (!path[0]) return kv_fail(err, KV_EMISUSE, "cannot write '': empty file name");
    if (in_place && S_ISDIR(sb.st_mode)) return kv_fail(err, KV_EIO, "cannot write '%s': it is a folder", path);
    o->path = kv_format("%s", path);
    if (!in_place) o->partial = kv_format("%s.partial", path);
    if (!o->path || (!in_place && !o->partial)) {
        kv_outfile_abandon(o);
        return kv_fail(err, KV_ENOMEM, "cannot write '%s': out of memory", path);
    }
    if (!(o->f = fopen(o->partial ? o->partial : path, "wbe"))) {
        kv_status st = kv_fail(err, KV_EIO, "cannot write '%s': %s", path, strerror(errno));
        free(o->partial), o->partial = NULL; /* nothing of ours to remove */
        kv_outfile_abandon(o);
        return st;
    }
    return KV_OK;
}

kv_status kv_outfile_commit(kv_outfile *o, kv_error *err)
{
    kv_status st = KV_OK;
    FILE *f = o->f;
    bool lost = kv_text_lost(); /* what was written may lack a piece */
    bool bad = ferror(f) || fflush(f) || (o->partial && fsync(fileno(f)));
    int e = errno;
    o->f = NULL;
    if (fclose(f) && !bad) bad = true, e = errno;
    if (!bad && !lost && o->partial && rename(o->partial, o->path)) bad = true, e = errno;
    if (lost) {
        st = kv_fail(err, KV_ENOMEM, "cannot write '%s': out of memory", o->path);
    } else if (bad) {
        st = kv_fail(err, KV_EIO, "cannot write '%s': %s", o->path, e ? strerror(e) : "write error");
    } else if (o->partial) {
        sync_folder(o->path);
        free(o->partial), o->partial = NULL;
    }
    kv_outfile_abandon(o);
    return st;
}

void kv_outfile_abandon(kv_outfile *o)
{
    if (o->f) fclose(o->f);
    if (o->partial) remove(o->partial);
    free(o->path);
    free(o->partial);
    memset(o, 0, sizeof *o);
}

kv_status kv_write_file(const char *path, const void *data, size_t n, kv_error *err)
{
    kv_outfile o;
    kv_status st = kv_outfile_open(path, &o, err);
    if (st) return st;
    if (n && fwrite(data, 1, n, o.f) != n) {
        st = kv_fail(err, KV_EIO, "cannot write '%s': %s", path, strerror(errno));
        kv_outfile_abandon(&o);
        return st;
    }
    return kv_outfile_commit(&o, err);
}

double kv_seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
