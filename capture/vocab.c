/* vocab.c - a token table: how tokens are spelled, how they are found, what they merge to. Where it comes from:
 * vocab_gguf.c, vocab_hf.c. */
#include "capture/vocab.h"

#include <stdlib.h>

/* Byte-level vocabularies write each byte as a printable code point: 33-126, 161-172 and 174-255 stand for themselves,
 * the other 68 are 256, 257, ... in order (GPT-2's bytes_to_unicode). All are below U+0800: one or two UTF-8 bytes. */
static uint32_t point_of_byte(uint8_t b)
{
    if (b < 33) return 256u + b;
    if (b < 127) return b;
    if (b < 161) return 256u + 33 + (b - 127u);
    return b == 173 ? 256 + 67 : b;
}

/* -1 for a code point outside the alphabet. */
static int byte_of_point(uint32_t p)
{
    if (p < 256) return (p >= 33 && p <= 126) || (p >= 161 && p != 173) ? (int)p : -1;
    if (p < 256 + 33) return (int)p - 256;
    if (p < 256 + 67) return (int)p - 256 - 33 + 127;
    return p == 256 + 67 ? 173 : -1;
}

static size_t put_point(uint32_t point, char *out)
{
    if (point < 0x80) {
        out[0] = (char)point;
        return 1;
    }
    out[0] = (char)(0xc0 | point >> 6), out[1] = (char)(0x80 | (point & 63));
    return 2;
}

void kv_vocab_spell(const char *bytes, size_t n, char *out, size_t *n_out)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) at += put_point(point_of_byte((uint8_t)bytes[i]), out + at);
    *n_out = at;
}

/* The bytes a byte-level token stands for; a string with code points outside the alphabet stands for itself. */
static size_t unspell(kv_slice raw, char *out)
{
    const uint8_t *p = (const uint8_t *)raw.p;
    size_t n = 0;
    for (size_t i = 0; i < raw.n;) {
        uint32_t point = p[i++];
        if (point >= 0xc2 && point <= 0xdf && i < raw.n) point = (point & 31) << 6 | (p[i++] & 63);
        int b = byte_of_point(point);
        if (b < 0) {
            memcpy(out, raw.p, raw.n);
            return raw.n;
        }
        out[n++] = (char)b;
    }
    return n;
}

/* The byte of "<0xAB>", or -1. */
static int byte_token(kv_slice s)
{
    static const char hex[] = "0123456789ABCDEF";
    if (s.n != 6 || memcmp(s.p, "<0x", 3) || s.p[5] != '>') return -1;
    const char *hi = s.p[3] ? strchr(hex, s.p[3]) : NULL, *lo = s.p[4] ? strchr(hex, s.p[4]) : NULL;
    return hi && lo ? (int)((hi - hex) * 16 + (lo - hex)) : -1;
}

/* SentencePiece tokens write a space as U+2581. */
static size_t unescape(kv_slice raw, uint8_t type, char *out)
{
    size_t n = 0;
    int b = type == KV_TOKEN_BYTE ? byte_token(raw) : -1;
    if (b >= 0) {
        out[0] = (char)b;
        return 1;
    }
    for (size_t i = 0; i < raw.n;) {
        bool space = raw.n - i >= 3 && !memcmp(raw.p + i, "\xe2\x96\x81", 3);
        out[n++] = space ? ' ' : raw.p[i];
        i += space ? 3 : 1;
    }
    return n;
}

uint32_t kv_vocab_find(const kv_vocab *v, const char *raw, size_t n)
{
    return n > v->longest ? KV_NONE : kv_strmap_get(&v->by_raw, raw, n);
}

static kv_merge *merge_slot(const kv_vocab *v, uint64_t pair)
{
    uint64_t h = pair * 0x9e3779b97f4a7c15u;
    uint32_t at = (uint32_t)((h ^ h >> 32) * 0x9e3779b97f4a7c15u >> 32) & v->merge_mask;
    while (v->merge[at].pair != pair && v->merge[at].pair != KV_NO_PAIR) at = (at + 1) & v->merge_mask;
    return &v->merge[at];
}

const kv_merge *kv_vocab_merge(const kv_vocab *v, uint32_t left, uint32_t right)
{
    const kv_merge *m = merge_slot(v, (uint64_t)left << 32 | right);
    return m->pair == KV_NO_PAIR ? NULL : m;
}

/* ------------------------------------------------------------------------------------------------ filling */

kv_status kv_vocab_set_strings(kv_vocab *v, const kv_slice *s, const bool *plain, const char *where, kv_error *err)
{
    size_t bytes = 0;
    kv_status st = KV_OK;
    for (uint32_t i = 0; i < v->n && !st; i++) {
        if (s[i].n > KV_TOKEN_BYTES_MAX)
            st = kv_fail(err, KV_EFORMAT, "token %u of %s has %zu bytes (at most %u)", i, where, s[i].n,
                         KV_TOKEN_BYTES_MAX);
        if (s[i].n > v->longest) v->longest = s[i].n;
        bytes += 2 * s[i].n; /* raw and text, which is never longer */
    }
    if (!st) st = kv_array(&v->pool, bytes, 1, err);
    if (!st) st = kv_array(&v->raw, v->n, sizeof *v->raw, err);
    if (!st) st = kv_array(&v->text, v->n, sizeof *v->text, err);
    if (!st) st = kv_array(&v->joined, v->longest + 1, 1, err);
    if (!st) st = kv_strmap_init(&v->by_raw, v->raw, v->n, err);
    char *p = v->pool;
    for (uint32_t i = 0; i < v->n && !st; i++) {
        if (s[i].n) memcpy(p, s[i].p, s[i].n);
        v->raw[i] = (kv_slice){p, s[i].n};
        p += s[i].n;
        if (plain && plain[i])
            v->text[i] = v->raw[i];
        else if (v->kind == KV_VOCAB_SPM)
            v->text[i] = (kv_slice){p, unescape(v->raw[i], v->type[i], p)};
        else
            v->text[i] = (kv_slice){p, unspell(v->raw[i], p)};
        p += v->text[i].n;
    }
    return st;
}

kv_status kv_vocab_begin_merges(kv_vocab *v, size_t n, const char *where, kv_error *err)
{
    size_t size = 16;
    if (n > KV_MERGES_MAX) return kv_fail(err, KV_EFORMAT, "%s has %zu elements (at most %u)", where, n, KV_MERGES_MAX);
    while (size < 2 * n) size *= 2;
    kv_status st = kv_array(&v->merge, size, sizeof *v->merge, err);
    if (st) return st;
    v->merge_mask = (uint32_t)(size - 1);
    for (size_t i = 0; i < size; i++) v->merge[i].pair = KV_NO_PAIR;
    return KV_OK;
}

kv_status kv_vocab_add_merge(kv_vocab *v, kv_slice l, kv_slice r, uint32_t rank, bool replace, const char *where,
                             kv_error *err)
{
    uint32_t left = kv_vocab_find(v, l.p, l.n), right = kv_vocab_find(v, r.p, r.n), id = KV_NONE;
    if (l.n <= v->longest && r.n <= v->longest - l.n) {
        memcpy(v->joined, l.p, l.n), memcpy(v->joined + l.n, r.p, r.n);
        id = kv_vocab_find(v, v->joined, l.n + r.n);
    }
    if (left == KV_NONE || right == KV_NONE || id == KV_NONE)
        return kv_fail(err, KV_EFORMAT, "%s: entry %u '%s' + '%s': a part or the result is not in the vocabulary",
                       where, rank, kv_show(l.p, l.n).s, kv_show(r.p, r.n).s);
    kv_merge *m = merge_slot(v, (uint64_t)left << 32 | right);
    if (m->pair == KV_NO_PAIR || replace) *m = (kv_merge){(uint64_t)left << 32 | right, rank, id};
    return KV_OK;
}

void kv_vocab_find_bytes(kv_vocab *v)
{
    for (uint32_t b = 0; b < 256; b++) {
        char name[8];
        size_t n;
        char byte = (char)b;
        if (v->kind == KV_VOCAB_BPE)
            kv_vocab_spell(&byte, 1, name, &n);
        else
            n = (size_t)snprintf(name, sizeof name, "<0x%02X>", b);
        v->byte_id[b] = kv_vocab_find(v, name, n);
    }
}

void kv_vocab_free(kv_vocab *v)
{
    kv_strmap_fini(&v->by_raw);
    free(v->pool), free(v->raw), free(v->text), free(v->type), free(v->score), free(v->merge), free(v->chat_template);
    free(v->flags), free(v->joined);
    kv_pretok_free(&v->cut);
    memset(v, 0, sizeof *v);
}
