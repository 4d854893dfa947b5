/* vocab.h - the token table of a model file: strings, types, scores, merges, and the rules that go with them. Read by
 * the tokenizer; filled from GGUF metadata (tokenizer.ggml.*). */
#ifndef KV_VOCAB_H
#define KV_VOCAB_H

#include "capture/gguf.h"
#include "capture/tokenizer.h"

#define KV_VOCAB_MAX       (1u << 20)
#define KV_MERGES_MAX      (1u << 21)
#define KV_TOKEN_BYTES_MAX (1u << 16) /* of one token */

typedef enum { KV_VOCAB_BPE, KV_VOCAB_SPM } kv_vocab_kind; /* byte-level BPE by merge rank; BPE by score */

enum { KV_TOKEN_NORMAL = 1, KV_TOKEN_UNKNOWN, KV_TOKEN_CONTROL, KV_TOKEN_USER, KV_TOKEN_UNUSED, KV_TOKEN_BYTE };

typedef struct {
    uint64_t pair; /* left id << 32 | right id; KV_NO_PAIR = empty */
    uint32_t rank; /* lower merges first */
    uint32_t id;   /* the merged token */
} kv_merge;
#define KV_NO_PAIR UINT64_MAX

typedef struct {
    kv_vocab_kind kind;
    kv_shown pre;   /* name of the pre-tokeniser (BPE) */
    bool pre_named; /* false: the file names none, "default" is a guess */
    uint32_t n;
    char *pool;             /* all strings; `raw` and `text` point into it */
    kv_slice *raw;          /* [n] as written in the file: what merges and pieces are looked up by */
    kv_slice *text;         /* [n] the bytes a token stands for */
    uint8_t *type;          /* [n] KV_TOKEN_* */
    float *score;           /* [n] finite; SPM */
    uint32_t byte_id[256];  /* the token of a single byte, KV_NONE when there is none */
    uint32_t bos, eos, unk; /* KV_NONE when the file names none */
    int add_bos;            /* 1, 0, or -1: the file does not say */
    bool add_space_prefix;
    char *chat_template; /* as the file gives it, or NULL */
    size_t longest;      /* bytes of the longest raw string */
    kv_strmap by_raw;
    kv_merge *merge; /* open addressing */
    uint32_t merge_mask;
} kv_vocab;

/* KV_EUNSUPPORTED when the kind of vocabulary is one that is not implemented or there is none (a model can be run on
 * token ids all the same); every other error means that the file is damaged. n_vocab: rows of the embedding. */
kv_status kv_vocab_read(const kv_gguf *g, uint32_t n_vocab, kv_vocab *v, kv_error *err);
void kv_vocab_free(kv_vocab *v);
uint32_t kv_vocab_find(const kv_vocab *v, const char *raw, size_t n);             /* KV_NONE when absent */
const kv_merge *kv_vocab_merge(const kv_vocab *v, uint32_t left, uint32_t right); /* NULL when there is none */

/* How a byte-level vocabulary writes these bytes; `out` holds 2n. */
void kv_vocab_spell(const char *bytes, size_t n, char *out, size_t *n_out);

/* Takes over what `v` holds, also on failure. KV_EUNSUPPORTED when the pre-tokeniser is unknown. */
kv_status kv_tokenizer_create(kv_vocab *v, kv_tokenizer **out, kv_error *err);

#endif
