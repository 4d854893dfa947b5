/* pretok.h - pre-tokenisers: how a stretch of text is cut into the pieces that are merged, each on its own.
 *
 * Stages are regular expressions; each cuts the pieces of the stage before it. GGUF files name a known sequence of them
 * (tokenizer.ggml.pre), Hugging Face files spell them out, in Oniguruma's language: what means the same there and in
 * PCRE2 is taken over, what might not is refused by name. A stage never matches nothing. */
#ifndef KV_PRETOK_H
#define KV_PRETOK_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "traces/base.h"

#define KV_PRETOK_STAGES  10
#define KV_PRETOK_PATTERN (1u << 14) /* bytes of one expression of a file */

/* GPT-2's expression, which byte-level pre-tokenisers use unless told otherwise. */
extern const char kv_pretok_gpt2[];

/* What becomes of a match. The text between two matches is a piece of its own in any case. */
typedef enum {
    KV_CUT_ISOLATED,   /* a piece */
    KV_CUT_REMOVED,    /* nothing */
    KV_CUT_PREVIOUS,   /* the end of the piece before it */
    KV_CUT_NEXT,       /* the beginning of the piece behind it */
    KV_CUT_CONTIGUOUS, /* a piece, together with the matches that touch it */
} kv_cut;

typedef struct {
    pcre2_code *re;
    kv_cut how;
    bool invert; /* what lies between the matches counts as match */
} kv_pretok_stage;

typedef struct {
    kv_pretok_stage stage[KV_PRETOK_STAGES];
    int n;
} kv_pretok;

/* The stages of tokenizer.ggml.pre. *llama3: whole pieces before merges (ignore_merges), and BOS unless the file says
 * otherwise. KV_EUNSUPPORTED when the name is not known: a guess would change the tokens. */
kv_status kv_pretok_named(const char *name, kv_pretok *p, bool *llama3, kv_error *err);
/* One more stage. `pattern` is in PCRE2's language, zero-terminated. */
kv_status kv_pretok_add(kv_pretok *p, const char *pattern, kv_cut how, bool invert, kv_error *err);
/* An expression in Oniguruma's language (UTF-8, not zero-terminated) in PCRE2's; free() it. KV_EUNSUPPORTED names what
 * is not understood. */
kv_status kv_pretok_translate(const char *pattern, size_t n, char **out, kv_error *err);
void kv_pretok_free(kv_pretok *p);

/* Room for matching, one per thread. */
typedef struct {
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
} kv_pretok_room;
kv_status kv_pretok_room_init(kv_pretok_room *r, kv_error *err);
void kv_pretok_room_free(kv_pretok_room *r);

/* piece(ctx, at, n) for each piece of text[0..n), in order; valid UTF-8. Stops at the first that fails. */
kv_status kv_pretok_split(const kv_pretok *p, const kv_pretok_room *r, const char *text, size_t n,
                          kv_status (*piece)(void *ctx, size_t at, size_t n), void *ctx, kv_error *err);

#endif
