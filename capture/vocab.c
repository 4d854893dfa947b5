/* vocab.c - tokenizer.ggml.* of a GGUF file into a token table. Ids and lengths are checked here once, so the tokenizer
 * can index without tests. */
#include "capture/vocab.h"

#include <math.h>
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

/* ------------------------------------------------------------------------------------------------ reading */

static kv_status read_strings(const kv_gguf *g, const kv_gguf_value *value, kv_vocab *v, kv_error *err)
{
    kv_slice *s = NULL;
    size_t bytes = 0;
    kv_status st = kv_gguf_strings(g, value, &s, err);
    if (st) return st;
    for (uint32_t i = 0; i < v->n && !st; i++) {
        if (s[i].n > KV_TOKEN_BYTES_MAX)
            st = kv_fail(err, KV_EFORMAT, "token %u of tokenizer.ggml.tokens has %zu bytes (at most %u)", i, s[i].n,
                         KV_TOKEN_BYTES_MAX);
        if (s[i].n > v->longest) v->longest = s[i].n;
        bytes += 2 * s[i].n; /* raw and text, which is never longer */
    }
    if (!st) st = kv_array(&v->pool, bytes, 1, err);
    if (!st) st = kv_array(&v->raw, v->n, sizeof *v->raw, err);
    if (!st) st = kv_array(&v->text, v->n, sizeof *v->text, err);
    if (!st) st = kv_strmap_init(&v->by_raw, v->raw, v->n, err);
    char *p = v->pool;
    for (uint32_t i = 0; i < v->n && !st; i++) {
        memcpy(p, s[i].p, s[i].n);
        v->raw[i] = (kv_slice){p, s[i].n};
        p += s[i].n;
        v->text[i].p = p;
        if (v->kind == KV_VOCAB_SPM)
            v->text[i].n = unescape(v->raw[i], v->type[i], p);
        else
            v->text[i].n = unspell(v->raw[i], p);
        p += v->text[i].n;
        if (s[i].n) kv_strmap_replace(&v->by_raw, i); /* of equal strings the last counts, as in llama.cpp */
    }
    free(s);
    return st;
}

static kv_status read_types(const kv_gguf *g, kv_vocab *v, kv_error *err)
{
    static const char key[] = "tokenizer.ggml.token_type";
    const kv_gguf_value *value = kv_gguf_find(g, key);
    kv_status st = kv_array(&v->type, v->n, 1, err);
    if (st) return st;
    if (value && (!value->array || value->n != v->n))
        return kv_fail(err, KV_EFORMAT, "%s has %u elements for %u tokens", key, value->n, v->n);
    for (uint32_t i = 0; i < v->n; i++) {
        uint64_t t = KV_TOKEN_NORMAL;
        if (value && (!kv_gguf_uint(value, i, &t) || t > KV_TOKEN_BYTE))
            return kv_fail(err, KV_EFORMAT, "%s of token %u is not one of 0 to %d", key, i, KV_TOKEN_BYTE);
        v->type[i] = (uint8_t)t;
    }
    return KV_OK;
}

static kv_status read_scores(const kv_gguf *g, kv_vocab *v, kv_error *err)
{
    static const char key[] = "tokenizer.ggml.scores";
    const kv_gguf_value *value = kv_gguf_find(g, key);
    if (!value && v->kind == KV_VOCAB_BPE) return KV_OK;
    if (!value) return kv_fail(err, KV_EFORMAT, "%s is missing, which this kind of vocabulary needs", key);
    if (!value->array || value->n != v->n)
        return kv_fail(err, KV_EFORMAT, "%s has %u elements for %u tokens", key, value->n, v->n);
    kv_status st = kv_array(&v->score, v->n, sizeof *v->score, err);
    for (uint32_t i = 0; i < v->n && !st; i++) {
        double x;
        if (!kv_gguf_float(value, i, &x) || !isfinite(x))
            return kv_fail(err, KV_EFORMAT, "%s of token %u is not a finite number", key, i);
        v->score[i] = (float)x;
    }
    return st;
}

/* "left right", split at the first space behind the first byte. */
static kv_status add_merge(kv_vocab *v, kv_slice s, uint32_t rank, char *joined, kv_error *err)
{
    static const char key[] = "tokenizer.ggml.merges";
    const char *space = s.n > 1 ? memchr(s.p + 1, ' ', s.n - 1) : NULL;
    size_t l = space ? (size_t)(space - s.p) : 0, r = space ? s.n - l - 1 : 0;
    if (!r)
        return kv_fail(err, KV_EFORMAT, "%s: entry %u '%s' is not a pair 'left right'", key, rank, kv_show(s.p, s.n).s);
    uint32_t left = kv_vocab_find(v, s.p, l), right = kv_vocab_find(v, space + 1, r), id = KV_NONE;
    if (l + r <= v->longest) {
        memcpy(joined, s.p, l), memcpy(joined + l, space + 1, r);
        id = kv_vocab_find(v, joined, l + r);
    }
    if (left == KV_NONE || right == KV_NONE || id == KV_NONE)
        return kv_fail(err, KV_EFORMAT, "%s: entry %u '%s': a part or the result is not in the vocabulary", key, rank,
                       kv_show(s.p, s.n).s);
    kv_merge *m = merge_slot(v, (uint64_t)left << 32 | right);
    if (m->pair == KV_NO_PAIR) *m = (kv_merge){(uint64_t)left << 32 | right, rank, id}; /* the first one counts */
    return KV_OK;
}

static kv_status read_merges(const kv_gguf *g, kv_vocab *v, kv_error *err)
{
    static const char key[] = "tokenizer.ggml.merges";
    const kv_gguf_value *value = kv_gguf_find(g, key);
    kv_slice *s = NULL;
    char *joined = NULL;
    size_t size = 16;
    if (!value) return kv_fail(err, KV_EFORMAT, "%s is missing, which this kind of vocabulary needs", key);
    if (value->n > KV_MERGES_MAX)
        return kv_fail(err, KV_EFORMAT, "%s has %u elements (at most %u)", key, value->n, KV_MERGES_MAX);
    while (size < 2 * (size_t)value->n) size *= 2;
    kv_status st = kv_gguf_strings(g, value, &s, err);
    if (!st) st = kv_array(&joined, v->longest + 1, 1, err);
    if (!st) st = kv_array(&v->merge, size, sizeof *v->merge, err);
    if (!st) {
        v->merge_mask = (uint32_t)(size - 1);
        for (size_t i = 0; i < size; i++) v->merge[i].pair = KV_NO_PAIR;
    }
    for (uint32_t i = 0; i < value->n && !st; i++) st = add_merge(v, s[i], i, joined, err);
    free(s), free(joined);
    return st;
}

static kv_status read_id(const kv_gguf *g, const char *key, const kv_vocab *v, uint32_t absent, uint32_t *out,
                         kv_error *err)
{
    const kv_gguf_value *value = kv_gguf_find(g, key);
    uint64_t id;
    *out = absent < v->n ? absent : KV_NONE;
    if (!value) return KV_OK;
    if (value->array || !kv_gguf_uint(value, 0, &id)) return kv_fail(err, KV_EFORMAT, "%s is not a token id", key);
    if (id >= v->n)
        return kv_fail(err, KV_EFORMAT, "%s is %llu, but the vocabulary has %u tokens", key, (unsigned long long)id,
                       v->n);
    *out = (uint32_t)id;
    return KV_OK;
}

static kv_status read_flag(const kv_gguf *g, const char *key, bool *found, bool *out, kv_error *err)
{
    const kv_gguf_value *value = kv_gguf_find(g, key);
    *found = value;
    if (value && !kv_gguf_bool(value, out)) return kv_fail(err, KV_EFORMAT, "%s is not a boolean", key);
    return KV_OK;
}

/* Special ids and flags; the defaults are llama.cpp's. */
static kv_status read_rules(const kv_gguf *g, kv_vocab *v, kv_error *err)
{
    bool spm = v->kind == KV_VOCAB_SPM, found, flag = false;
    uint32_t pad;
    kv_status st;
    if ((st = read_id(g, "tokenizer.ggml.bos_token_id", v, spm ? 1 : KV_NONE, &v->bos, err)) ||
        (st = read_id(g, "tokenizer.ggml.eos_token_id", v, spm ? 2 : KV_NONE, &v->eos, err)) ||
        (st = read_id(g, "tokenizer.ggml.unknown_token_id", v, spm ? 0 : KV_NONE, &v->unk, err)) ||
        (st = read_id(g, "tokenizer.ggml.padding_token_id", v, KV_NONE, &pad, err)) ||
        (st = read_flag(g, "tokenizer.ggml.add_bos_token", &found, &flag, err)))
        return st;
    v->add_bos = found ? flag : -1;
    if (found && flag && v->bos == KV_NONE)
        return kv_fail(err, KV_EFORMAT,
                       "tokenizer.ggml.add_bos_token is set, but tokenizer.ggml.bos_token_id is missing");
    st = read_flag(g, "tokenizer.ggml.add_space_prefix", &found, &flag, err);
    v->add_space_prefix = spm && (!found || flag);
    return st;
}

static kv_status read_template(const kv_gguf *g, kv_vocab *v, kv_error *err)
{
    const kv_gguf_value *value = kv_gguf_find(g, "tokenizer.chat_template");
    kv_slice s;
    if (!value) return KV_OK;
    if (!kv_gguf_string(value, &s)) return kv_fail(err, KV_EFORMAT, "tokenizer.chat_template is not a string");
    v->chat_template = kv_format("%.*s", (int)s.n, s.p); /* a zero byte in it would end it: no harm done */
    return v->chat_template ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory for the chat template");
}

static kv_status read_kind(const kv_gguf *g, kv_vocab *v, kv_error *err)
{
    const kv_gguf_value *kind = kv_gguf_find(g, "tokenizer.ggml.model"), *pre = kv_gguf_find(g, "tokenizer.ggml.pre");
    kv_slice s;
    if (!kind) return kv_fail(err, KV_EUNSUPPORTED, "the file has no vocabulary (tokenizer.ggml.model)");
    if (!kv_gguf_string(kind, &s)) return kv_fail(err, KV_EFORMAT, "tokenizer.ggml.model is not a string");
    if (s.n == 4 && !memcmp(s.p, "gpt2", 4))
        v->kind = KV_VOCAB_BPE;
    else if (s.n == 5 && !memcmp(s.p, "llama", 5))
        v->kind = KV_VOCAB_SPM;
    else
        return kv_fail(err, KV_EUNSUPPORTED,
                       "vocabularies of the kind '%s' (tokenizer.ggml.model) are not supported; known: gpt2 llama",
                       kv_show(s.p, s.n).s);
    v->pre = kv_show("default", 7);
    if (!pre) return KV_OK;
    if (!kv_gguf_string(pre, &s)) return kv_fail(err, KV_EFORMAT, "tokenizer.ggml.pre is not a string");
    v->pre = kv_show(s.p, s.n);
    v->pre_named = true;
    return KV_OK;
}

kv_status kv_vocab_read(const kv_gguf *g, uint32_t n_vocab, kv_vocab *v, kv_error *err)
{
    memset(v, 0, sizeof *v);
    kv_status st = read_kind(g, v, err);
    if (st) return st;
    const kv_gguf_value *tokens = kv_gguf_find(g, "tokenizer.ggml.tokens");
    if (!tokens) return kv_fail(err, KV_EFORMAT, "tokenizer.ggml.tokens is missing");
    if (tokens->n != n_vocab)
        return kv_fail(err, KV_EFORMAT, "tokenizer.ggml.tokens has %u elements, but the embedding has %u rows",
                       tokens->n, n_vocab);
    v->n = n_vocab;
    if ((st = read_types(g, v, err)) || (st = read_strings(g, tokens, v, err)) || (st = read_scores(g, v, err)) ||
        (st = read_rules(g, v, err)) || (st = read_template(g, v, err)) ||
        (v->kind == KV_VOCAB_BPE && (st = read_merges(g, v, err)))) {
        kv_vocab_free(v);
        return st;
    }
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
    return KV_OK;
}

void kv_vocab_free(kv_vocab *v)
{
    kv_strmap_fini(&v->by_raw);
    free(v->pool), free(v->raw), free(v->text), free(v->type), free(v->score), free(v->merge), free(v->chat_template);
    memset(v, 0, sizeof *v);
}
