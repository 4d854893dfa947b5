/* strmap.h - a hash table from byte strings to their place in an array of strings: duplicate tests, vocabularies.
 * Built once, then only read (and then safe to share between threads). */
#ifndef KV_STRMAP_H
#define KV_STRMAP_H

#include "traces/base.h"

#define KV_NONE UINT32_MAX

typedef struct {
    const char *p; /* not zero-terminated */
    size_t n;
} kv_slice;

typedef struct {
    const kv_slice *key; /* borrowed; an entry is an index into it */
    uint32_t *slot;      /* index + 1, 0 = empty */
    uint32_t mask;
} kv_strmap;

uint64_t kv_hash_bytes(const void *p, size_t n); /* in-memory use only: never stored */
/* A table for at most `capacity` (<= 2^28) of the strings in `key`. */
kv_status kv_strmap_init(kv_strmap *m, const kv_slice *key, uint32_t capacity, kv_error *err);
/* Enter key[i]. Returns i, or the entry that already holds an equal string (the table is then unchanged). */
uint32_t kv_strmap_put(kv_strmap *m, uint32_t i);
/* Enter key[i] in place of an equal string, if there is one. */
void kv_strmap_replace(kv_strmap *m, uint32_t i);
uint32_t kv_strmap_get(const kv_strmap *m, const char *p, size_t n); /* KV_NONE when absent */
void kv_strmap_fini(kv_strmap *m);

/* The first bytes of s as one printable, zero-terminated word for messages; what is not ASCII text shows as '?'. */
typedef struct {
    char s[96];
} kv_shown;
kv_shown kv_show(const char *p, size_t n);
/* Byte offset of the first ill-formed UTF-8 sequence (overlong, surrogate, beyond U+10FFFF, truncated), n when there is
 * none. */
size_t kv_utf8_bad(const char *p, size_t n);

#endif
