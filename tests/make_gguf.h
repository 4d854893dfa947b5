/* make_gguf.h - tiny GGUF models for tests: one layer, F32 tensors whose elements count up through the file, and a
 * vocabulary of the test's choice. */
#ifndef KV_MAKE_GGUF_H
#define KV_MAKE_GGUF_H

#include <stdio.h>
#include <stdlib.h>

#include "capture/model.h"
#include "capture/tokenizer.h"
#include "capture/vocab.h"

static char dir[] = "/tmp/kv_test_XXXXXX"; /* for mkdtemp */

typedef struct {
    uint8_t p[1 << 16];
    size_t n;
} bytes;

static void put(bytes *b, const void *p, size_t n)
{
    if (n > sizeof b->p - b->n) abort();
    memcpy(b->p + b->n, p, n);
    b->n += n;
}
static void put32(bytes *b, uint32_t v)
{
    uint8_t x[4];
    kv_put32(x, v);
    put(b, x, 4);
}
static void put64(bytes *b, uint64_t v)
{
    uint8_t x[8];
    kv_put64(x, v);
    put(b, x, 8);
}
static void put_str(bytes *b, const char *s)
{
    put64(b, strlen(s));
    put(b, s, strlen(s));
}
static void put_f32(bytes *b, float f)
{
    put(b, &f, 4);
}

/* A model of one layer: hidden 8, 2 query heads and 1 KV head of 4, ffn 4. Fields change what is written. */
typedef struct {
    const char *arch, *pre, *kind;
    const char **token; /* NULL: the default vocabulary of 256 bytes, merges "a b", "ab c", "Ġ a", and "<x>", "ab!" */
    const uint32_t *type;
    const char **merge; /* ends with NULL */
    uint32_t n_token;
    bool output, bias, freqs;
    float nan_in_norm, linear;
    const char *extra_u32; /* a further key = 2 */
    const char *skip_key;  /* left out */
    const char *extra_tensor;
    int add_bos; /* -1: no key */
} recipe;

static const recipe plain = {.arch = "llama", .pre = "gpt-2", .kind = "gpt2", .add_bos = -1};

static uint32_t default_tokens(char store[][8], const char **token, uint32_t *type)
{
    uint32_t n = 0;
    for (uint32_t b = 0; b < 256; b++) {
        char c = (char)b;
        size_t len;
        kv_vocab_spell(&c, 1, store[b], &len);
        store[b][len] = 0;
        token[n++] = store[b];
    }
    static const char *const more[] = {"ab", "abc", "\xc4\xa0\x61", "<x>", "<xx>", "ab!"};
    for (size_t i = 0; i < 6; i++) {
        type[n] = i < 3 ? 1 : i < 5 ? 3 : 4; /* normal, control, user-defined */
        token[n++] = more[i];
    }
    for (uint32_t b = 0; b < 256; b++) type[b] = 1;
    return n;
}

static uint64_t n_written; /* keys or tensors of the section being written */

static bool key(bytes *b, const recipe *r, const char *arch, const char *name, uint32_t type)
{
    char full[96];
    snprintf(full, sizeof full, "%s%s%s", arch, *arch ? "." : "", name);
    if (r->skip_key && !strcmp(full, r->skip_key)) return false;
    put_str(b, full), put32(b, type), n_written++;
    return true;
}

static void key_u32(bytes *b, const recipe *r, const char *name, uint32_t v)
{
    if (key(b, r, r->arch, name, KV_GGUF_U32)) put32(b, v);
}

static void key_strings(bytes *b, const recipe *r, const char *name, const char *const *s, uint32_t n)
{
    if (!key(b, r, "", name, KV_GGUF_ARRAY)) return;
    put32(b, KV_GGUF_STRING), put64(b, n);
    for (uint32_t i = 0; i < n; i++) put_str(b, s[i]);
}

static uint64_t data_at;
static float next_value;

static void tensor(bytes *head, bytes *data, const char *name, uint32_t ne0, uint32_t ne1)
{
    put_str(head, name), put32(head, ne1 ? 2 : 1), put64(head, ne0);
    if (ne1) put64(head, ne1);
    put32(head, 0), put64(head, data_at), n_written++;
    for (uint32_t i = 0; i < ne0 * (ne1 ? ne1 : 1); i++) put_f32(data, next_value++);
    while (data->n % 32) put(data, "", 1);
    data_at = data->n;
}

static void build(const recipe *r, bytes *out)
{
    static bytes data;
    static char store[256][8];
    static const char *token[512], *merge[] = {"a b", "ab c", "\xc4\xa0 a", NULL};
    static uint32_t type[512];
    uint32_t n = r->n_token;
    const char *const *tok = r->token, *const *mer = r->merge ? r->merge : merge;
    const uint32_t *typ = r->type;
    if (!tok) n = default_tokens(store, token, type), tok = token, typ = type;
    out->n = data.n = 0, data_at = 0, next_value = 0, n_written = 0;
    put(out, "GGUF", 4), put32(out, 3), put64(out, 0), put64(out, 0);

    if (key(out, r, "", "general.architecture", KV_GGUF_STRING)) put_str(out, r->arch);
    key_u32(out, r, "block_count", 1), key_u32(out, r, "context_length", 64), key_u32(out, r, "embedding_length", 8);
    key_u32(out, r, "feed_forward_length", 4), key_u32(out, r, "attention.head_count", 2);
    key_u32(out, r, "attention.head_count_kv", 1);
    if (key(out, r, r->arch, "attention.layer_norm_rms_epsilon", KV_GGUF_F32)) put_f32(out, 1e-5f);
    if (r->linear > 0 && key(out, r, r->arch, "rope.scaling.factor", KV_GGUF_F32)) put_f32(out, r->linear);
    if (r->extra_u32) key_u32(out, r, r->extra_u32, 2);
    if (r->kind && key(out, r, "", "tokenizer.ggml.model", KV_GGUF_STRING)) put_str(out, r->kind);
    if (r->pre && key(out, r, "", "tokenizer.ggml.pre", KV_GGUF_STRING)) put_str(out, r->pre);
    key_strings(out, r, "tokenizer.ggml.tokens", tok, n);
    if (typ && key(out, r, "", "tokenizer.ggml.token_type", KV_GGUF_ARRAY)) {
        put32(out, KV_GGUF_I32), put64(out, n);
        for (uint32_t i = 0; i < n; i++) put32(out, typ[i]);
    }
    uint32_t n_merge = 0;
    while (mer[n_merge]) n_merge++;
    key_strings(out, r, "tokenizer.ggml.merges", mer, n_merge);
    if (r->kind && !strcmp(r->kind, "llama") && key(out, r, "", "tokenizer.ggml.scores", KV_GGUF_ARRAY)) {
        put32(out, KV_GGUF_F32), put64(out, n);
        for (uint32_t i = 0; i < n; i++) put_f32(out, -(float)i);
    }
    if (key(out, r, "", "tokenizer.ggml.bos_token_id", KV_GGUF_U32)) put32(out, 1);
    if (r->add_bos >= 0 && key(out, r, "", "tokenizer.ggml.add_bos_token", KV_GGUF_BOOL)) put(out, &r->add_bos, 1);
    kv_put64(out->p + 16, n_written);

    n_written = 0;
    tensor(out, &data, "token_embd.weight", 8, n);
    if (r->freqs) {
        tensor(out, &data, "rope_freqs.weight", 2, 0);
        float f[2] = {1, 8};
        memcpy(data.p + data.n - 32, f, 8);
    }
    tensor(out, &data, "blk.0.attn_norm.weight", 8, 0);
    if (r->nan_in_norm != 0) memcpy(data.p + data.n - 4, &r->nan_in_norm, 4);
    tensor(out, &data, "blk.0.attn_q.weight", 8, 8), tensor(out, &data, "blk.0.attn_k.weight", 8, 4);
    tensor(out, &data, "blk.0.attn_v.weight", 8, 4), tensor(out, &data, "blk.0.attn_output.weight", 8, 8);
    if (r->bias) tensor(out, &data, "blk.0.attn_q.bias", 8, 0), tensor(out, &data, "blk.0.attn_v.bias", 4, 0);
    tensor(out, &data, "blk.0.ffn_norm.weight", 8, 0), tensor(out, &data, "blk.0.ffn_gate.weight", 8, 4);
    tensor(out, &data, "blk.0.ffn_up.weight", 8, 4), tensor(out, &data, "blk.0.ffn_down.weight", 4, 8);
    if (r->extra_tensor) tensor(out, &data, r->extra_tensor, 8, 0);
    tensor(out, &data, "output_norm.weight", 8, 0);
    if (r->output) tensor(out, &data, "output.weight", 8, n);
    kv_put64(out->p + 8, n_written);
    while (out->n % 32) put(out, "", 1);
    put(out, data.p, data.n);
}

static kv_status open_bytes(const bytes *b, bool weights, kv_model **m, kv_error *err)
{
    char path[128];
    snprintf(path, sizeof path, "%s/made.gguf", dir);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(b->p, 1, b->n, f) != b->n || fclose(f)) abort();
    return kv_model_open(path, weights ? KV_WEIGHTS_F32 : KV_WEIGHTS_NONE, 2, m, err);
}

static kv_status open_recipe(const recipe *r, kv_model **m, kv_error *err)
{
    static bytes b;
    build(r, &b);
    return open_bytes(&b, true, m, err);
}

#endif
