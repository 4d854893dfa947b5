/* literals.c - zstd frames of bytes in which nothing repeats: Huffman's coding and no search (RFC 8878).
 *
 *   frame = magic, header (content size, checksum follows), blocks of 128 KiB at most, checksum
 *   block = bytes as they are | one byte and how often | tree, four streams of codes, "no sequences"
 *
 * Any zstd reads these frames. Its own encoder looks up one byte at a time; planes of floats have a few dozen values,
 * so here two bytes cost one look-up in a table of pairs. The ratio is that of zstd. */
#include "traces/format.h"

#include <stdlib.h>

enum {
    BLOCK = 128 << 10, /* bytes of content in a block, at most */
    BITS = 11,         /* of a code, at most: the format's limit for literals */
    SHORT = 256,       /* blocks below this are stored as they are */
    STRIDE = 40,       /* of the sample that tells noise from the rest */
    TREE_MAX = 128,    /* bytes of a tree */
    LOG = 6,           /* log2 of the states that code the tree */
    STATES = 1 << LOG
};
#define CODE (~(uint64_t)63) /* of a word of codes: all but the length */

struct kvt_coder {
    uint32_t count[8][256]; /* eight, so that equal neighbours do not wait for one another */
    /* Codes of a byte and of two, [first + 256 second]: the code in the highest bits, its length in the lowest. */
    uint64_t one[256], pair[65536];
};

kvt_coder *kvt_coder_open(void)
{
    return malloc(sizeof(kvt_coder));
}

size_t kvt_literals_bound(size_t n)
{
    /* Streams are coded before it is known whether they are shorter: BITS a byte, then tree, sizes and a word more. */
    return 9 + n + n / 2 + 3 * (n / BLOCK + 1) + 2 * TREE_MAX + 4;
}

/* ------------------------------------------------------------------------------------------- checksum */
static uint64_t rotl(uint64_t x, int n)
{
    return x << n | x >> (64 - n);
}

/* XXH64 with seed 0, the checksum of zstd's frames. */
static uint64_t xxh64(const uint8_t *p, size_t n)
{
    const uint64_t a = 0x9e3779b185ebca87, b = 0xc2b2ae3d27d4eb4f, c = 0x165667b19e3779f9, d = 0x85ebca77c2b2ae63,
                   e = 0x27d4eb2f165667c5;
    uint64_t v[4] = {a + b, b, 0, 0 - a}, h = e, total = n;
    for (; n >= 32; n -= 32, p += 32) {
        v[0] = rotl(v[0] + kv_get64(p) * b, 31) * a;
        v[1] = rotl(v[1] + kv_get64(p + 8) * b, 31) * a;
        v[2] = rotl(v[2] + kv_get64(p + 16) * b, 31) * a;
        v[3] = rotl(v[3] + kv_get64(p + 24) * b, 31) * a;
    }
    if (total >= 32) {
        h = rotl(v[0], 1) + rotl(v[1], 7) + rotl(v[2], 12) + rotl(v[3], 18);
        for (int k = 0; k < 4; k++) h = (h ^ rotl(v[k] * b, 31) * a) * a + d;
    }
    h += total;
    for (; n >= 8; n -= 8, p += 8) h = rotl(h ^ rotl(kv_get64(p) * b, 31) * a, 27) * a + d;
    for (; n >= 4; n -= 4, p += 4) h = rotl(h ^ kv_get32(p) * a, 23) * b + c;
    for (; n; n--, p++) h = rotl(h ^ *p * e, 11) * a;
    h = (h ^ h >> 33) * b;
    h = (h ^ h >> 29) * c;
    return h ^ h >> 32;
}

/* --------------------------------------------------------------------------------------------- lengths */
/* How often each value occurs in eight bytes of every `stride`. */
static void count(kvt_coder *c, const uint8_t *src, size_t n, size_t stride, uint32_t sum[256])
{
    size_t i = 0;
    memset(c->count, 0, sizeof c->count);
    for (; i + 8 <= n; i += stride) {
        uint64_t v = kv_get64(src + i);
        c->count[0][v & 255]++, c->count[1][v >> 8 & 255]++, c->count[2][v >> 16 & 255]++;
        c->count[3][v >> 24 & 255]++, c->count[4][v >> 32 & 255]++, c->count[5][v >> 40 & 255]++;
        c->count[6][v >> 48 & 255]++, c->count[7][v >> 56]++;
    }
    for (; i < n; i++) c->count[0][src[i]]++;
    for (int s = 0; s < 256; s++) {
        sum[s] = 0;
        for (int k = 0; k < 8; k++) sum[s] += c->count[k][s];
    }
}

/* No code saves 1/64: by the sample sum p^2 < 2^-7.875, and no entropy is less than -log2 of that sum. */
static bool noise(const uint32_t sum[256])
{
    uint64_t n = 0, pairs = 0;
    for (int s = 0; s < 256; s++) n += sum[s], pairs += (uint64_t)sum[s] * (sum[s] - 1);
    return 235 * pairs < n * (n - 1);
}

/* Counts the bytes that without their highest bit are not within lo..hi, four words at a time while there are none. */
static void count_strays(const uint8_t *src, size_t n, uint32_t lo, uint32_t hi, uint32_t sum[256])
{
    const uint64_t each = 0x0101010101010101, top = each << 7, over = each * (127 - hi), under = each * (128 - lo);
    for (size_t i = 0, end; i < n; i = end) {
        end = i + 32;
        if (end <= n) {
            uint64_t a = kv_get64(src + i) & ~top, b = kv_get64(src + i + 8) & ~top;
            uint64_t c = kv_get64(src + i + 16) & ~top, d = kv_get64(src + i + 24) & ~top;
            uint64_t high = (a + over) | (b + over) | (c + over) | (d + over);
            uint64_t low = (a + under) & (b + under) & (c + under) & (d + under);
            if (!((high | ~low) & top)) continue;
        } else {
            end = n;
        }
        for (size_t k = i; k < end; k++) sum[src[k]] += (src[k] & 127) < lo || (src[k] & 127) > hi;
    }
}

/* Counts for the lengths of codes, more than 0 for each value that occurs; false: noise. Exponents lie side by side, of
 * either sign: a run of them is counted by a sample, which says nearly as much as counting all bytes and takes a
 * fraction of the time, and the bytes outside are counted one by one. Where these are not few, or the run has many
 * values that the sample does not, all bytes are counted. */
static bool estimate(kvt_coder *c, const uint8_t *src, size_t n, uint32_t sum[256])
{
    uint32_t both[129], lo = 0, hi, outside = 0, total = 0, missing = 0;
    count(c, src, n, STRIDE, sum);
    if (noise(sum)) return false;
    for (uint32_t s = 0; s < 128; s++) {
        total += both[s] = sum[s] + sum[s + 128];
        if (both[s] > both[lo]) lo = s;
    }
    both[128] = 0;
    for (hi = lo; both[hi + 1];) hi++;
    while (lo && both[lo - 1]) lo--;
    for (uint32_t s = 0; s < 128; s++)
        if (s < lo || s > hi)
            outside += both[s];
        else
            missing += !sum[s] + !sum[s + 128];
    if (outside > total / 256 || missing > (hi - lo + 1) / 4) {
        count(c, src, n, 8, sum);
        return true;
    }
    for (uint32_t s = 0; s < 256; s++) {
        bool in = (s & 127) >= lo && (s & 127) <= hi;
        sum[s] = !in ? 0 : sum[s] ? sum[s] * (STRIDE / 8) : 1;
    }
    count_strays(src, n, lo, hi, sum);
    return true;
}

/* The best lengths of at most BITS bits for k >= 2 values (package-merge, Larmore and Hirschberg 1990). Level by level,
 * the values and the sums of pairs of the level before are put in order; then the first 2k - 2 of the last level are
 * taken apart, level by level, and a value is as long as it was met often. */
static void lengths(const uint32_t sum[256], uint8_t len[256])
{
    uint32_t key[257], list[2][512];
    bool pair[BITS][512];
    uint32_t k = 0, n = 0;
    memset(len, 0, 256);
    for (uint32_t s = 0; s < 256; s++) {
        if (!sum[s]) continue;
        uint32_t v = sum[s] << 8 | s, i = k++;
        for (; i && key[i - 1] > v; i--) key[i] = key[i - 1];
        key[i] = v;
    }
    key[k] = UINT32_MAX;
    for (int level = 0; level < BITS; level++) { /* without branches, which nobody could predict */
        uint32_t *old = list[~level & 1], *now = list[level & 1], pairs = n / 2, a = 0, b = 0;
        for (uint32_t i = 0; i < pairs; i++) old[i] = old[2 * i] + old[2 * i + 1];
        old[pairs] = UINT32_MAX >> 8;
        for (n = 0; n < k + pairs; n++) {
            bool two = old[b] < key[a] >> 8;
            pair[level][n] = two;
            now[n] = two ? old[b] : key[a] >> 8;
            a += !two, b += two;
        }
    }
    for (uint32_t level = BITS, take = 2 * k - 2; level--;) {
        uint32_t pairs = 0;
        for (uint32_t i = 0; i < take; i++) pairs += pair[level][i];
        for (uint32_t i = 0; i < take - pairs; i++) len[key[i] & 255]++;
        take = 2 * pairs;
    }
}

/* ------------------------------------------------------------------------------------------------ tree */
/* Bits from the lowest upwards. */
typedef struct {
    uint8_t *p;
    uint64_t acc;
    uint32_t n;
} bits;

static void put_bits(bits *b, uint32_t v, uint32_t n)
{
    b->acc |= (uint64_t)v << b->n;
    for (b->n += n; b->n >= 8; b->n -= 8, b->acc >>= 8) *b->p++ = (uint8_t)b->acc;
}

static uint32_t log2_floor(uint32_t v)
{
    return 31 - (uint32_t)__builtin_clz(v);
}

/* Shares of `n` weights among the states, at least one for each that occurs. */
static void shares(const uint8_t *w, uint32_t n, uint32_t share[BITS + 1])
{
    uint32_t left = STATES, most = 0, sum[BITS + 1] = {0};
    for (uint32_t i = 0; i < n; i++) sum[w[i]]++;
    for (uint32_t s = 0; s <= BITS; s++) {
        share[s] = sum[s] ? 1 + sum[s] * (STATES - BITS - 1) / n : 0;
        left -= share[s];
        if (sum[s] > sum[most]) most = s;
    }
    share[most] += left;
}

/* n weights as finite state entropy codes (RFC 8878 4.1, 4.2.1.2): bytes at dst, or 0 when they cannot be. */
static size_t put_weights(uint8_t *dst, const uint8_t *w, uint32_t n)
{
    uint32_t share[BITS + 1], next[BITS + 1], left = STATES + 1, top = STATES, width = LOG + 1;
    uint8_t value[STATES], width_of[STATES], base[STATES], from[BITS + 1][STATES], first[BITS + 1], state[2];
    bits b = {dst, 0, 0};
    shares(w, n, share);
    for (uint32_t s = 0; s <= BITS; s++)
        if (share[s] == STATES) return 0; /* one weight only: not in this coding */
    put_bits(&b, LOG - 5, 4);
    for (uint32_t s = 0; left > 1;) {
        uint32_t v = share[s] + 1, spare = 2 * top - 1 - left; /* that many values are a bit shorter */
        bool zero = !share[s];
        left -= share[s++];
        if (v >= top) v += spare;
        put_bits(&b, v, width - (v < spare));
        for (; left < top; top >>= 1) width--;
        if (!zero) continue;
        uint32_t more = 0;
        while (!share[s + more]) more++;
        for (s += more; more >= 3; more -= 3) put_bits(&b, 3, 2);
        put_bits(&b, more, 2);
    }
    if (b.n) put_bits(&b, 0, 8 - b.n);
    /* States as the decoder numbers them; from[s][t]: the state of weight s that can be followed by state t. */
    for (uint32_t s = 0, at = 0; s <= BITS; s++)
        for (uint32_t i = 0; i < share[s]; i++, at = (at + STATES / 2 + STATES / 8 + 3) % STATES)
            value[at] = (uint8_t)s;
    memcpy(next, share, sizeof next);
    for (uint32_t i = STATES; i--;) first[value[i]] = (uint8_t)i;
    for (uint32_t i = 0; i < STATES; i++) {
        uint32_t x = next[value[i]]++, wide = LOG - log2_floor(x);
        width_of[i] = (uint8_t)wide, base[i] = (uint8_t)((x << wide) - STATES);
        for (uint32_t t = 0; t < 1u << wide; t++) from[value[i]][base[i] + t] = (uint8_t)i;
    }
    /* Two chains of states take turns; they are coded from the last weight to the first. A chain ends in the first
     * state of its weight, which asks for bits that are not there: so the decoder knows the end. */
    for (uint32_t i = n; i--;) {
        uint8_t *t = &state[i & 1];
        if (i + 2 >= n) {
            *t = first[w[i]];
            continue;
        }
        uint32_t s = from[w[i]][*t];
        put_bits(&b, (uint32_t)*t - base[s], width_of[s]);
        *t = (uint8_t)s;
    }
    put_bits(&b, state[1], LOG), put_bits(&b, state[0], LOG);
    put_bits(&b, 1, 1);
    if (b.n) put_bits(&b, 0, 8 - b.n);
    return (size_t)(b.p - dst);
}

/* Codes of the lengths, and their tree at dst: its bytes, or 0 when it cannot be written. The longest codes come first,
 * equal ones in the order of the values; the weight of the last value follows from the others. */
static size_t put_tree(kvt_coder *c, uint8_t *dst, const uint8_t len[256])
{
    uint32_t n[BITS + 2] = {0}, code[BITS + 2] = {0}, longest = 0, last = 0;
    uint8_t w[256], packed[2 * TREE_MAX];
    for (uint32_t s = 0; s < 256; s++) {
        n[len[s]]++;
        if (len[s] > longest) longest = len[s];
        if (len[s]) last = s;
    }
    for (uint32_t l = longest; l > 1; l--) code[l - 1] = (code[l] + n[l]) >> 1;
    for (uint32_t s = 0; s <= last; s++) {
        w[s] = len[s] ? (uint8_t)(longest + 1 - len[s]) : 0;
        c->one[s] = len[s] ? (uint64_t)code[len[s]]++ << (64 - len[s]) | len[s] : 0;
    }
    if (last <= 128) {
        dst[0] = (uint8_t)(127 + last);
        w[last] = 0;
        for (uint32_t i = 0; i < last; i += 2) dst[1 + i / 2] = (uint8_t)(w[i] << 4 | w[i + 1]);
        return 1 + (last + 1) / 2;
    }
    size_t bytes = put_weights(packed, w, last);
    if (bytes >= TREE_MAX) return 0;
    dst[0] = (uint8_t)bytes;
    memcpy(dst + 1, packed, bytes);
    return bytes ? 1 + bytes : 0;
}

/* -------------------------------------------------------------------------------------------- streams */
/* Where values are many for so few bytes, filling the table would cost more than it saves. */
static bool fill_pairs(kvt_coder *c, const uint8_t len[256], size_t n)
{
    uint32_t present[256], k = 0;
    for (uint32_t s = 0; s < 256; s++)
        if (len[s]) present[k++] = s;
    if ((size_t)k * k > n) return false;
    for (uint32_t i = 0; i < k; i++) {
        uint64_t second = c->one[present[i]], code = second & CODE, l = second & 63, *row = c->pair + 256 * present[i];
        for (uint32_t j = 0; j < k; j++) {
            uint64_t first = c->one[present[j]];
            row[present[j]] = first + l + (code >> (first & 63));
        }
    }
    return true;
}

/* n bytes as one stream, from the last byte to the first; up to 7 bytes behind its end are overwritten. The highest
 * `have` bits of acc wait to be stored; what lies below them, lengths too, falls off. Four pairs go with one store when
 * their codes fit, as they nearly always do. */
static uint8_t *put_stream(const kvt_coder *c, bool pairs, uint8_t *dst, const uint8_t *src, size_t n)
{
    uint64_t acc = 0, have = 0, a, b, l;
#define ADD(code, bits) (acc = acc >> (bits) | (code), have += (bits))
#define STORE()         (kv_put64(dst, acc >> (64 - have)), dst += have >> 3, have &= 7)
    for (; pairs ? n & 7 : n; n--) {
        a = c->one[src[n - 1]];
        ADD(a, a & 63);
        STORE();
    }
    for (; n; n -= 8) {
        a = c->pair[kv_get16(src + n - 2)], b = c->pair[kv_get16(src + n - 4)], l = (a + b) & 63;
        ADD(a >> (b & 63) | b, l);
        a = c->pair[kv_get16(src + n - 6)], b = c->pair[kv_get16(src + n - 8)], l = (a + b) & 63;
        if (have + l > 56) STORE();
        ADD(a >> (b & 63) | b, l);
        STORE();
    }
    ADD(1ull << 63, 1); /* where the stream ends */
    STORE();
    return dst + (have > 0);
#undef ADD
#undef STORE
}

/* A coded block's content at dst, its bytes; 0: not smaller by 1/64, or no tree. */
static size_t put_coded(kvt_coder *c, uint8_t *dst, const uint8_t *src, size_t n, const uint32_t sum[256])
{
    uint8_t len[256], *at = dst + 5;
    size_t tree, quarter = (n + 3) / 4, total = 0;
    lengths(sum, len);
    for (int s = 0; s < 256; s++) total += (size_t)sum[s] * len[s];
    if (total / 8 > n - n / 64 || !(tree = put_tree(c, at, len))) return 0;
    bool pairs = fill_pairs(c, len, n);
    uint8_t *jump = at += tree;
    at += 6;
    for (int k = 0; k < 4; k++) {
        uint8_t *from = at;
        at = put_stream(c, pairs, at, src + k * quarter, k < 3 ? quarter : n - 3 * quarter);
        if (k < 3) kv_put16(jump + 2 * k, (uint16_t)(at - from));
    }
    /* coded literals, four streams, both sizes in 18 bits */
    uint64_t head = 2 | 3 << 2 | (uint64_t)n << 4 | (uint64_t)(at - dst - 5) << 22;
    kv_put32(dst, (uint32_t)head), dst[4] = (uint8_t)(head >> 32);
    *at++ = 0; /* sequences */
    return at <= dst + n - n / 64 ? (size_t)(at - dst) : 0;
}

size_t kvt_literals(kvt_coder *c, uint8_t *dst, const uint8_t *src, size_t n)
{
    uint8_t *at = dst + 9;
    uint32_t sum[256];
    kv_put32(dst, 0xfd2fb528);
    dst[4] = 2 << 6 | 1 << 5 | 1 << 2; /* four bytes of content size, the window is the content, checksum */
    kv_put32(dst + 5, (uint32_t)n);
    for (size_t done = 0; done < n;) {
        size_t some = n - done < BLOCK ? n - done : BLOCK, bytes = 0;
        const uint8_t *p = src + done;
        uint32_t kind = 0;
        done += some;
        if (some >= SHORT) {
            bool coded = estimate(c, p, some, sum);
            if (coded && sum[*p] == some)
                kind = 1, at[3] = *p, bytes = 1;
            else if (coded && (bytes = put_coded(c, at + 3, p, some, sum)))
                kind = 2;
        }
        if (!kind) memcpy(at + 3, p, bytes = some);
        uint32_t head = (done == n) | kind << 1 | (uint32_t)(kind == 2 ? bytes : some) << 3;
        kv_put16(at, (uint16_t)head), at[2] = (uint8_t)(head >> 16);
        at += 3 + bytes;
    }
    kv_put32(at, (uint32_t)xxh64(src, n));
    return (size_t)(at + 4 - dst);
}
