/* normal.h - what happens to a stretch of text before it is cut into pieces: Unicode normal form C, spaces written as
 * U+2581, a space put in front. Each byte of the result knows the byte of the text that it comes from. */
#ifndef KV_NORMAL_H
#define KV_NORMAL_H

#include "traces/base.h"

/* How spaces are written (SentencePiece-style vocabularies). */
typedef enum {
    KV_PREFIX_NONE,
    KV_PREFIX_ALWAYS,  /* one more space in front */
    KV_PREFIX_MISSING, /* unless there is one */
    KV_PREFIX_FIRST,   /* the same, only at the start of the whole text */
} kv_prefix;

typedef struct {
    kv_prefix prefix;
    bool mark; /* spaces become U+2581; without it the prefix is a plain space */
} kv_space_rule;

/* A stretch of text on its way. Owned by the caller: start with {0}, end with kv_stretch_free. */
typedef struct {
    char *p;          /* [n], valid UTF-8 */
    uint32_t *origin; /* [n] byte of the text; ascending */
    size_t n, cap, origin_cap;
} kv_stretch;

/* Each overwrites `to` and leaves `from` as it is. first: the stretch begins at the start of the whole text. */
kv_status kv_stretch_set(kv_stretch *to, const char *p, size_t n, size_t origin, kv_error *err);
kv_status kv_stretch_nfc(const kv_stretch *from, kv_stretch *to, kv_error *err);
kv_status kv_stretch_spaces(const kv_stretch *from, kv_space_rule rule, bool first, kv_stretch *to, kv_error *err);
void kv_stretch_free(kv_stretch *s);

/* Grow *p (elements of `size` bytes) to hold at least n. */
kv_status kv_grow(void *p, size_t *cap, size_t n, size_t size, kv_error *err);
/* Bytes of the character that begins with this byte, in valid UTF-8. */
size_t kv_char_bytes(char first);

#endif
