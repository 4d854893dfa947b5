/* plain.c - text for terminals (plain.h). */
#include "traces/plain.h"

size_t kv_utf8_next(const char *s, size_t n, uint32_t *cp)
{
    const uint8_t *b = (const uint8_t *)s;
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    if (b[0] < 0x80) return *cp = b[0], 1;
    size_t len = b[0] >= 0xc2 && b[0] < 0xe0   ? 2
                 : b[0] >= 0xe0 && b[0] < 0xf0 ? 3
                 : b[0] >= 0xf0 && b[0] < 0xf5 ? 4
                                               : 0;
    if (!len || len > n) return 0;
    uint32_t c = b[0] & (0xffu >> (len + 1));
    for (size_t i = 1; i < len; i++) {
        if ((b[i] & 0xc0) != 0x80) return 0;
        c = c << 6 | (b[i] & 0x3f);
    }
    if (c < least[len] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return 0;
    return *cp = c, len;
}

bool kv_obeyed(uint32_t c)
{
    return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x061c || (c >= 0x200b && c <= 0x200f) ||
           (c >= 0x2028 && c <= 0x202e) || (c >= 0x2060 && c <= 0x206f) || c == 0xfeff || (c >= 0xe0000 && c < 0xe0080);
}

/* What stands at s, at most n bytes, spelled out into `out`; returns the bytes of s it stands for. */
static size_t spell(const char *s, size_t n, char out[16])
{
    uint32_t c = 0;
    size_t len = kv_utf8_next(s, n, &c);
    if (!len)
        snprintf(out, 16, "\\x%02x", (unsigned char)s[0]);
    else if (c == '\n' || c == '\t' || c == '\r')
        snprintf(out, 16, "\\%c", c == '\n' ? 'n' : c == '\t' ? 't' : 'r');
    else if (kv_obeyed(c))
        snprintf(out, 16, c < 0x80 ? "\\x%02x" : "\\u{%x}", c);
    else
        memcpy(out, s, len), out[len] = 0;
    return len ? len : 1;
}

void kv_put_plain(FILE *f, const char *s, size_t n)
{
    char piece[16];
    for (size_t i = 0; i < n;) {
        i += spell(s + i, n - i, piece);
        fputs(piece, f);
    }
}

kv_shown_text kv_plain(const char *s)
{
    kv_shown_text out = {""};
    size_t n = s ? strlen(s) : 0, at = 0;
    char piece[16];
    for (size_t i = 0; i < n;) {
        i += spell(s + i, n - i, piece);
        size_t len = strlen(piece);
        if (at + len + 4 > sizeof out.s) {
            memcpy(out.s + at, "...", 4);
            break;
        }
        memcpy(out.s + at, piece, len + 1);
        at += len;
    }
    return out;
}
