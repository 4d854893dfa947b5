/* strmap.c - open addressing with linear probing, at most half full; string helpers of the model readers. */
#include "capture/strmap.h"

#include "traces/plain.h"

#include <stdlib.h>

uint64_t kv_hash_bytes(const void *p, size_t n)
{
    const uint8_t *b = p;
    uint64_t h = 0xcbf29ce484222325u ^ n;
    for (; n >= 8; n -= 8, b += 8) {
        h = (h ^ kv_get64(b)) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    for (; n; n--, b++) h = (h ^ *b) * 0x100000001b3u;
    h = (h ^ h >> 32) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 29;
}

kv_status kv_strmap_init(kv_strmap *m, const kv_slice *key, uint32_t capacity, kv_error *err)
{
    uint32_t size = 16;
    while (size < 2 * capacity) size *= 2;
    m->key = key, m->mask = size - 1;
    return kv_array(&m->slot, size, sizeof *m->slot, err);
}

/* The slot that holds (p, n), or the empty one where it would go. */
static uint32_t find(const kv_strmap *m, const char *p, size_t n)
{
    uint32_t at = (uint32_t)kv_hash_bytes(p, n) & m->mask;
    for (; m->slot[at]; at = (at + 1) & m->mask) {
        const kv_slice *k = &m->key[m->slot[at] - 1];
        if (k->n == n && !memcmp(k->p, p, n)) break;
    }
    return at;
}

uint32_t kv_strmap_put(kv_strmap *m, uint32_t i)
{
    uint32_t at = find(m, m->key[i].p, m->key[i].n);
    if (!m->slot[at]) m->slot[at] = i + 1;
    return m->slot[at] - 1;
}

void kv_strmap_replace(kv_strmap *m, uint32_t i)
{
    m->slot[find(m, m->key[i].p, m->key[i].n)] = i + 1;
}

uint32_t kv_strmap_get(const kv_strmap *m, const char *p, size_t n)
{
    uint32_t s = m->slot[find(m, p, n)];
    return s ? s - 1 : KV_NONE;
}

void kv_strmap_fini(kv_strmap *m)
{
    free(m->slot);
    m->slot = NULL;
}

kv_shown kv_show(const char *p, size_t n)
{
    kv_shown r;
    size_t max = sizeof r.s - 4, k = n < max ? n : max;
    for (size_t i = 0; i < k; i++) r.s[i] = (char)(p[i] >= 0x20 && p[i] < 0x7f ? p[i] : '?');
    strcpy(r.s + k, n > max ? "..." : "");
    return r;
}

size_t kv_utf8_bad(const char *p, size_t n)
{
    uint32_t c;
    for (size_t i = 0, len; i < n; i += len)
        if (!(len = kv_utf8_next(p + i, n - i, &c))) return i;
    return n;
}
