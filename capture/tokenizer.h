/* tokenizer.h - text to token ids with the model file's own vocabulary. */
#ifndef KV_TOKENIZER_H
#define KV_TOKENIZER_H

#include "traces/base.h"

typedef struct kv_tokenizer kv_tokenizer;

typedef struct {
    uint32_t *id; /* [n] */
    uint32_t *
        offset; /* [n+1] byte offset in the text where token i begins; offset[n] = length of the text.
                   A token inside a UTF-8 character begins at that byte; added tokens (BOS) begin where the next does */
    size_t n;
} kv_tokens;

/* special: parse special tokens in the text; bos: put the BOS token in front when the file says so. `text` is UTF-8 and
 * may contain zero bytes; KV_EFORMAT with the byte offset when it is not valid UTF-8. Thread-safe. */
kv_status kv_tokenize(const kv_tokenizer *t, const char *text, size_t n, bool special, bool bos, kv_tokens *out,
                      kv_error *err);
/* The same with more to say: control tokens are parsed (special) except in the bytes literal_at .. +literal_n-1, as
 * between the parts of a chat template; where BOS comes from. */
typedef enum { KV_BOS_NEVER, KV_BOS_FILE, KV_BOS_ALWAYS } kv_bos;
typedef struct {
    bool special;
    kv_bos bos;
    size_t literal_at, literal_n;
} kv_tokenize_options;
kv_status kv_tokenize_with(const kv_tokenizer *t, const char *text, size_t n, const kv_tokenize_options *o,
                           kv_tokens *out, kv_error *err);
void kv_tokens_free(kv_tokens *t);
/* Bytes of one token (not zero-terminated; belongs to the tokenizer). */
const char *kv_token_bytes(const kv_tokenizer *t, uint32_t id, size_t *n);
const char *kv_tokenizer_describe(const kv_tokenizer *t); /* "byte-level BPE, pre smollm, 49152 tokens" */
uint32_t kv_tokenizer_eos(const kv_tokenizer *t);         /* UINT32_MAX when the file names none */
/* The chat template as the model's files give it (Jinja), NULL when they give none. */
const char *kv_tokenizer_template(const kv_tokenizer *t);
void kv_tokenizer_close(kv_tokenizer *t);

/* The tokenizer of a Hugging Face folder: FOLDER/tokenizer.json, and tokenizer_config.json for BOS, EOS and the chat
 * template. n_vocab: rows of the embedding. KV_EMISSING: there is no tokenizer.json; KV_EUNSUPPORTED: it asks for what
 * this program does not do (the message names it), and a guess would give other tokens. In both cases the model can
 * be run on token ids all the same. Every other error means that the file is damaged. */
kv_status kv_tokenizer_open_hf(const char *folder, uint32_t n_vocab, kv_tokenizer **out, kv_error *err);

#endif
