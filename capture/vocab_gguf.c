/* vocab_gguf.c - tokenizer.ggml.* of a GGUF file into a token table. Ids and lengths are checked here once, so the
 * tokenizer can index without tests. */
#include "capture/vocab.h"

#include <math.h>
#include <stdlib.h>

static kv_status read_strings(const kv_gguf *g, const kv_gguf_value *value, kv_vocab *v, kv_error *err)
{
    kv_slice *s = NULL;
    kv_status st = kv_gguf_strings(g, value, &s, err);
    if (!st) st = kv_vocab_set_strings(v, s, NULL, "tokenizer.ggml.tokens", err);
    /* of equal strings the last counts, as in llama.cpp */
    for (uint32_t i = 0; i < v->n && !st; i++)
        if (s[i].n) kv_strmap_replace(&v->by_raw, i);
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
static kv_status read_merges(const kv_gguf *g, kv_vocab *v, kv_error *err)
{
    static const char key[] = "tokenizer.ggml.merges";
    const kv_gguf_value *value = kv_gguf_find(g, key);
    kv_slice *s = NULL;
    if (!value) return kv_fail(err, KV_EFORMAT, "%s is missing, which this kind of vocabulary needs", key);
    kv_status st = kv_gguf_strings(g, value, &s, err);
    if (!st) st = kv_vocab_begin_merges(v, value->n, key, err);
    for (uint32_t i = 0; i < value->n && !st; i++) {
        const char *space = s[i].n > 1 ? memchr(s[i].p + 1, ' ', s[i].n - 1) : NULL;
        size_t l = space ? (size_t)(space - s[i].p) : 0, r = space ? s[i].n - l - 1 : 0;
        if (!r)
            st = kv_fail(err, KV_EFORMAT, "%s: entry %u '%s' is not a pair 'left right'", key, i,
                         kv_show(s[i].p, s[i].n).s);
        else
            st = kv_vocab_add_merge(v, (kv_slice){s[i].p, l}, (kv_slice){space + 1, r}, i, false, key, err);
    }
    free(s);
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
    v->before_cut = (kv_space_rule){spm && (!found || flag) ? KV_PREFIX_ALWAYS : KV_PREFIX_NONE, spm};
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

/* Phi-3's special tokens take the white space behind them along, but for three. The file does not say so;
 * tokenizer.json of these models does, and llama.cpp knows it too. */
static kv_status phi3_flags(const kv_gguf *g, kv_vocab *v, kv_error *err)
{
    static const char *const keep[] = {"<unk>", "<s>", "<|endoftext|>"};
    const kv_gguf_value *arch = kv_gguf_find(g, "general.architecture");
    kv_slice s;
    if (v->kind != KV_VOCAB_SPM || !arch || !kv_gguf_string(arch, &s) || s.n != 4 || memcmp(s.p, "phi3", 4))
        return KV_OK;
    kv_status st = kv_array(&v->flags, v->n, 1, err);
    for (uint32_t i = 0; i < v->n && !st; i++) {
        bool strip = v->type[i] == KV_TOKEN_CONTROL || v->type[i] == KV_TOKEN_USER;
        for (int k = 0; k < 3; k++)
            strip &= v->raw[i].n != strlen(keep[k]) || memcmp(v->raw[i].p, keep[k], v->raw[i].n);
        v->flags[i] = (uint8_t)(KV_ADDED | (strip ? KV_ADDED_STRIP_RIGHT : 0));
    }
    return st;
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
        (st = read_rules(g, v, err)) || (st = read_template(g, v, err)) || (st = phi3_flags(g, v, err)) ||
        (v->kind == KV_VOCAB_BPE && (st = read_merges(g, v, err)))) {
        kv_vocab_free(v);
        return st;
    }
    kv_vocab_find_bytes(v);
    return KV_OK;
}
