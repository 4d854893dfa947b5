/* normal.c - what happens to a stretch of text before it is cut (normal.h). */
#include "capture/normal.h"

#include <stdlib.h>
#include <utf8proc.h>

#define MARK  "\xe2\x96\x81" /* U+2581 */
#define BLOCK 4096u          /* bytes normalised at a time; blocks end where nothing combines across */
#define UNIT  (1u << 14)     /* bytes that may combine with each other: sorting them is quadratic */

kv_status kv_grow(void *p, size_t *cap, size_t n, size_t size, kv_error *err)
{
    void *old, *fresh;
    size_t want = n < 64 ? 64 : n + n / 2, bytes;
    if (n <= *cap) return KV_OK;
    memcpy(&old, p, sizeof old);
    if (!kv_mul(want, size, &bytes) || !(fresh = realloc(old, bytes)))
        return kv_fail(err, KV_ENOMEM, "out of memory for %zu symbols of a text", want);
    memcpy(p, &fresh, sizeof fresh);
    *cap = want;
    return KV_OK;
}

size_t kv_char_bytes(char first)
{
    uint8_t c = (uint8_t)first;
    return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

static kv_status room(kv_stretch *s, size_t n, kv_error *err)
{
    kv_status st = kv_grow(&s->p, &s->cap, n, 1, err);
    return st ? st : kv_grow(&s->origin, &s->origin_cap, n, sizeof *s->origin, err);
}

kv_status kv_stretch_set(kv_stretch *to, const char *p, size_t n, size_t origin, kv_error *err)
{
    kv_status st = room(to, n + 1, err); /* never NULL, also for no text */
    if (st) return st;
    memcpy(to->p, p, n);
    for (size_t i = 0; i < n; i++) to->origin[i] = (uint32_t)(origin + i);
    to->n = n;
    return KV_OK;
}

/* Nothing that stands before this character can combine with it. Characters that combine backwards are marks (also
 * some of class 0) and the vowels and finals of Hangul. */
static bool begins(const char *p, size_t n)
{
    utf8proc_int32_t c;
    if (!((uint8_t)*p & 0x80)) return true;
    if (utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)n, &c) < 0) return true;
    if (c >= 0x1160 && c <= 0x11ff) return false;
    const utf8proc_property_t *k = utf8proc_get_property(c);
    return !k->combining_class && k->category != UTF8PROC_CATEGORY_MN && k->category != UTF8PROC_CATEGORY_MC &&
           k->category != UTF8PROC_CATEGORY_ME;
}

/* Bytes at .. of the unit that begins there: at least `least` bytes, up to a character that begins one. */
static size_t unit(const kv_stretch *s, size_t at, size_t least)
{
    size_t end = at + kv_char_bytes(s->p[at]);
    while (end < s->n && (end - at < least || !begins(s->p + end, s->n - end))) end += kv_char_bytes(s->p[end]);
    return end - at;
}

/* Append the normal form of bytes at .. at+n-1; *same tells that it is equal (then nothing is appended). */
static kv_status compose(const kv_stretch *from, size_t at, size_t n, kv_stretch *to, bool *same, kv_error *err)
{
    utf8proc_uint8_t *out = NULL;
    utf8proc_ssize_t len = utf8proc_map((const utf8proc_uint8_t *)from->p + at, (utf8proc_ssize_t)n, &out,
                                        UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    kv_status st = KV_OK;
    *same = len == (utf8proc_ssize_t)n && !memcmp(out, from->p + at, n);
    if (len < 0) {
        st = kv_fail(err, KV_EFORMAT, "cannot normalise the text at byte %u: %s", from->origin[at],
                     utf8proc_errmsg(len));
    } else if (!*same && !(st = room(to, to->n + (size_t)len, err))) {
        memcpy(to->p + to->n, out, (size_t)len);
        /* where lengths agree piece by piece cannot be told: all of it begins where the unit does */
        for (size_t i = 0; i < (size_t)len; i++) to->origin[to->n + i] = from->origin[at];
        to->n += (size_t)len;
    }
    free(out);
    return st;
}

static kv_status copy(const kv_stretch *from, size_t at, size_t n, kv_stretch *to, kv_error *err)
{
    kv_status st = room(to, to->n + n, err);
    if (st) return st;
    memcpy(to->p + to->n, from->p + at, n);
    memcpy(to->origin + to->n, from->origin + at, n * sizeof *to->origin);
    to->n += n;
    return KV_OK;
}

kv_status kv_stretch_nfc(const kv_stretch *from, kv_stretch *to, kv_error *err)
{
    kv_status st = room(to, from->n, err);
    to->n = 0;
    for (size_t at = 0, n; at < from->n && !st; at += n) {
        bool same, ascii = true;
        n = unit(from, at, BLOCK);
        if (n > BLOCK + UNIT)
            return kv_fail(err, KV_EUNSUPPORTED, "cannot normalise the text at byte %u: more than %u combining bytes",
                           from->origin[at], UNIT);
        for (size_t i = at; i < at + n && ascii; i++) ascii = !((uint8_t)from->p[i] & 0x80);
        size_t before = to->n;
        if (ascii)
            same = true;
        else if ((st = compose(from, at, n, to, &same, err)))
            break;
        if (same) {
            st = copy(from, at, n, to, err);
            continue;
        }
        to->n = before; /* something in the block changes: unit by unit, so that the others keep their places */
        for (size_t i = at, k; i < at + n && !st; i += k) {
            k = unit(from, i, 1);
            if (!(st = compose(from, i, k, to, &same, err)) && same) st = copy(from, i, k, to, err);
        }
    }
    return st;
}

kv_status kv_stretch_spaces(const kv_stretch *from, kv_space_rule rule, bool first, kv_stretch *to, kv_error *err)
{
    const char *space = rule.mark ? MARK : " ";
    size_t w = strlen(space), spaces = 1;
    kv_prefix prefix = from->n ? rule.prefix : KV_PREFIX_NONE;
    for (size_t i = 0; i < from->n; i++) spaces += from->p[i] == ' ';
    kv_status st = room(to, from->n + spaces * w, err);
    if (st) return st;
    bool has = from->n && (*from->p == ' ' || (rule.mark && from->n >= w && !memcmp(from->p, MARK, w)));
    bool add = prefix == KV_PREFIX_ALWAYS || (prefix == KV_PREFIX_MISSING && !has) ||
               (prefix == KV_PREFIX_FIRST && first && !has);
    to->n = 0;
    for (size_t i = 0; i < from->n + add; i++) {
        size_t k = i - add; /* the byte of `from`; before the first one when a space is put in front */
        bool put = (add && !i) || (rule.mark && from->p[k] == ' ');
        size_t origin = add && !i ? from->origin[0] : from->origin[k], n = put ? w : 1;
        memcpy(to->p + to->n, put ? space : from->p + k, n);
        for (size_t b = 0; b < n; b++) to->origin[to->n++] = (uint32_t)origin;
    }
    return KV_OK;
}

void kv_stretch_free(kv_stretch *s)
{
    free(s->p), free(s->origin);
    *s = (kv_stretch){0};
}
