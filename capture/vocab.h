/* vocab.h - the token table of a model: strings, types, scores, merges, and the rules that go with them. Read by the
 * tokenizer; filled from GGUF metadata (vocab_gguf.c) or from tokenizer.json (vocab_hf.c). */
#ifndef KV_VOCAB_H
#define KV_VOCAB_H

#include "capture/gguf.h"
#include "capture/normal.h"
#include "capture/pretok.h"
#include "capture/tokenizer.h"

#define KV_VOCAB_MAX       (1u << 20)
#define KV_MERGES_MAX      (1u << 21)
#define KV_TOKEN_BYTES_MAX (1u << 16) /* of one token */

/* Byte-level BPE, merges by rank; BPE of characters with spaces as U+2581, merges by score or (by_rank) by rank. */
typedef enum { KV_VOCAB_BPE, KV_VOCAB_SPM } kv_vocab_kind;

enum { KV_TOKEN_NORMAL = 1, KV_TOKEN_UNKNOWN, KV_TOKEN_CONTROL, KV_TOKEN_USER, KV_TOKEN_UNUSED, KV_TOKEN_BYTE };

typedef struct {
    uint64_t pair; /* left id << 32 | right id; KV_NO_PAIR = empty */
    uint32_t rank; /* lower merges first */
    uint32_t id;   /* the merged token */
} kv_merge;
#define KV_NO_PAIR UINT64_MAX

/* Of an added token (flags). */
enum {
    KV_ADDED = 1,             /* found in the text before it is cut, never inside a piece */
    KV_ADDED_STRIP_LEFT = 2,  /* takes the white space in front of it along */
    KV_ADDED_STRIP_RIGHT = 4, /* and behind it */
    KV_ADDED_NORMALIZED = 8,  /* looked for when the text has been normalised */
};

typedef struct {
    kv_vocab_kind kind;
    kv_shown pre;   /* name of the pre-tokeniser (BPE) */
    bool pre_named; /* false: the file names none, "default" is a guess */
    uint32_t n;
    char *pool;                       /* all strings; `raw` and `text` point into it */
    kv_slice *raw;                    /* [n] as written in the file: what merges and pieces are looked up by */
    kv_slice *text;                   /* [n] the bytes a token stands for */
    uint8_t *type;                    /* [n] KV_TOKEN_* */
    float *score;                     /* [n] finite; SPM */
    uint32_t byte_id[256];            /* the token of a single byte, KV_NONE when there is none */
    uint32_t bos, eos, unk;           /* KV_NONE when the file names none */
    int add_bos;                      /* 1, 0, or -1: the file does not say */
    bool by_rank;                     /* SPM: merges by rank */
    bool hf;                          /* from tokenizer.json */
    bool nfc;                         /* the text is brought into normal form C */
    bool ignore_merges;               /* a piece that is a token stays one */
    bool fuse_unk;                    /* what is not in the vocabulary, one behind the other, is one unknown token */
    kv_space_rule normal, before_cut; /* part of normalising (seen by added tokens); behind that */
    kv_pretok cut;
    uint8_t *flags;      /* [n] KV_ADDED_*, or NULL */
    char *chat_template; /* as the file gives it, or NULL */
    size_t longest;      /* bytes of the longest raw string */
    kv_strmap by_raw;
    char *joined;    /* [longest + 1] room */
    kv_merge *merge; /* open addressing */
    uint32_t merge_mask;
} kv_vocab;

/* KV_EUNSUPPORTED when the kind of vocabulary is one that is not implemented or there is none (a model can be run on
 * token ids all the same); every other error means that the file is damaged. n_vocab: rows of the embedding. */
kv_status kv_vocab_read(const kv_gguf *g, uint32_t n_vocab, kv_vocab *v, kv_error *err);
void kv_vocab_free(kv_vocab *v);
uint32_t kv_vocab_find(const kv_vocab *v, const char *raw, size_t n);             /* KV_NONE when absent */
const kv_merge *kv_vocab_merge(const kv_vocab *v, uint32_t left, uint32_t right); /* NULL when there is none */

/* Filling. kind, n and type are set first. plain[i]: the token stands for its bytes as they are. by_raw is left empty.
 * `where` names the field in messages. */
kv_status kv_vocab_set_strings(kv_vocab *v, const kv_slice *s, const bool *plain, const char *where, kv_error *err);
/* A table for n merges, then each one. replace: of equal pairs the last counts, else the first. KV_EFORMAT when a part
 * or the result is no token (by_raw must be complete). */
kv_status kv_vocab_begin_merges(kv_vocab *v, size_t n, const char *where, kv_error *err);
kv_status kv_vocab_add_merge(kv_vocab *v, kv_slice left, kv_slice right, uint32_t rank, bool replace, const char *where,
                             kv_error *err);
void kv_vocab_find_bytes(kv_vocab *v); /* byte_id, from by_raw */

/* How a byte-level vocabulary writes these bytes; `out` holds 2n. */
void kv_vocab_spell(const char *bytes, size_t n, char *out, size_t *n_out);

/* Takes over what `v` holds, also on failure. KV_EUNSUPPORTED when the pre-tokeniser is unknown. */
kv_status kv_tokenizer_create(kv_vocab *v, kv_tokenizer **out, kv_error *err);

#endif
