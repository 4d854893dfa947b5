/* plain.h - text of somebody else's on a terminal: names, prompts and messages may hold what a terminal obeys instead
 * of showing (escape sequences, C1 controls, marks that hide or reorder), and are shown with that spelled out. Files
 * get their bytes as they are. */
#ifndef KV_PLAIN_H
#define KV_PLAIN_H

#include "traces/base.h"

/* Length of the well-formed UTF-8 sequence at s (n >= 1 bytes left) and its code point, or 0. */
size_t kv_utf8_next(const char *s, size_t n, uint32_t *cp);
/* Code points a terminal obeys instead of showing: controls, line separators, marks that reorder or hide text. */
bool kv_obeyed(uint32_t cp);

/* The text in one line: "\n", "\x1b", "\u{202e}"; bytes that are no UTF-8 as "\xff". */
void kv_put_plain(FILE *f, const char *s, size_t n);
/* The same for printf, cut at some 500 bytes: printf("%s", kv_plain(s).s). NULL is "". */
typedef struct {
    char s[512];
} kv_shown_text;
kv_shown_text kv_plain(const char *s);

#endif
