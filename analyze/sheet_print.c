/* sheet_print.c - tables as text, CSV and JSON; escapes for text that comes from a database (sheet.h). */
#include "analyze/sheet.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

/* Length of the well-formed UTF-8 sequence at s (n bytes left) and its code point, or 0. */
static size_t utf8(const char *s, size_t n, uint32_t *cp)
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

/* Code points a terminal obeys instead of showing: controls, line separators, marks that reorder or hide text. */
static bool obeyed(uint32_t c)
{
    return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x061c || (c >= 0x200b && c <= 0x200f) ||
           (c >= 0x2028 && c <= 0x202e) || (c >= 0x2060 && c <= 0x206f) || c == 0xfeff || (c >= 0xe0000 && c < 0xe0080);
}

void kv_put_plain(FILE *f, const char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        size_t len = utf8(s + i, n - i, &c);
        if (!len)
            fprintf(f, "\\x%02x", (unsigned char)s[i]), len = 1;
        else if (c == '\n')
            fputs("\\n", f);
        else if (c == '\t')
            fputs("\\t", f);
        else if (c == '\r')
            fputs("\\r", f);
        else if (c < 0x80 && obeyed(c))
            fprintf(f, "\\x%02x", c);
        else if (obeyed(c))
            fprintf(f, "\\u{%x}", c);
        else
            fwrite(s + i, 1, len, f);
        i += len;
    }
}

void kv_put_json(FILE *f, const char *s, size_t n)
{
    putc('"', f);
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        size_t len = utf8(s + i, n - i, &c);
        if (!len)
            fputs("\xef\xbf\xbd", f), len = 1;
        else if (c == '"' || c == '\\')
            putc('\\', f), putc((int)c, f);
        else if (c == '\n')
            fputs("\\n", f);
        else if (c < 0x10000 && obeyed(c))
            fprintf(f, "\\u%04x", c);
        else
            fwrite(s + i, 1, len, f);
        i += len;
    }
    putc('"', f);
}

void kv_put_csv(FILE *f, const char *s, size_t n)
{
    bool quote = false;
    for (size_t i = 0; i < n; i++) quote |= s[i] == ',' || s[i] == '"' || s[i] == '\n' || s[i] == '\r';
    if (!quote) {
        fwrite(s, 1, n, f);
        return;
    }
    putc('"', f);
    for (size_t i = 0; i < n; i++) {
        if (s[i] == '"') putc('"', f);
        putc(s[i], f);
    }
    putc('"', f);
}

static void put_double(FILE *f, double d)
{
    char b[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(b, sizeof b, "%.*g", digits, d);
        if (strtod(b, NULL) == d) break;
    }
    fputs(b, f);
}

void kv_put_cell_csv(FILE *f, const kv_cell *c)
{
    if (c->kind == KV_CELL_TEXT)
        kv_put_csv(f, c->u.s, c->len);
    else if (c->kind == KV_CELL_INT)
        fprintf(f, "%lld", (long long)c->u.i);
    else if (c->kind == KV_CELL_REAL)
        put_double(f, c->u.d);
}

void kv_put_cell_json(FILE *f, const kv_cell *c)
{
    if (c->kind == KV_CELL_TEXT)
        kv_put_json(f, c->u.s, c->len);
    else if (c->kind == KV_CELL_NULL || (c->kind == KV_CELL_REAL && !isfinite(c->u.d)))
        fputs("null", f);
    else
        kv_put_cell_csv(f, c);
}

void kv_print_csv(FILE *f, const kv_sheet *s)
{
    for (size_t c = 0; c < s->n_col; c++) {
        if (c) putc(',', f);
        kv_put_csv(f, s->col[c], strlen(s->col[c]));
    }
    putc('\n', f);
    for (size_t r = 0; r < s->n_row; r++)
        for (size_t c = 0; c < s->n_col; c++) {
            kv_put_cell_csv(f, kv_sheet_at(s, r, (int)c));
            putc(c + 1 < s->n_col ? ',' : '\n', f);
        }
}

static void row_json(FILE *f, const kv_sheet *s, size_t r)
{
    putc('{', f);
    for (size_t c = 0; c < s->n_col; c++) {
        if (c) fputs(", ", f);
        kv_put_json(f, s->col[c], strlen(s->col[c]));
        fputs(": ", f);
        kv_put_cell_json(f, kv_sheet_at(s, r, (int)c));
    }
    putc('}', f);
}

void kv_print_json(FILE *f, const kv_sheet *s)
{
    putc('[', f);
    for (size_t r = 0; r < s->n_row; r++) {
        fputs(r ? ",\n  " : "\n  ", f);
        row_json(f, s, r);
    }
    putc(']', f);
}

void kv_print_jsonl(FILE *f, const kv_sheet *s)
{
    for (size_t r = 0; r < s->n_row; r++) {
        row_json(f, s, r);
        putc('\n', f);
    }
}

/* The text of a cell for people and for gnuplot, malloc'd; NULL when out of memory. */
static char *plain_cell(const kv_cell *c, const char *null_text)
{
    char *b = NULL;
    size_t n = 0;
    FILE *m = open_memstream(&b, &n);
    if (!m) return NULL;
    if (c->kind == KV_CELL_NULL)
        fputs(null_text, m);
    else if (c->kind == KV_CELL_TEXT)
        kv_put_plain(m, c->u.s, c->len);
    else
        kv_put_cell_csv(m, c);
    if (fclose(m)) free(b), b = NULL;
    return b;
}

void kv_print_plot_csv(FILE *f, const kv_sheet *s)
{
    for (size_t c = 0; c < s->n_col; c++) fprintf(f, "%s%s", c ? "," : "", s->col[c]);
    putc('\n', f);
    for (size_t r = 0; r < s->n_row; r++)
        for (size_t c = 0; c < s->n_col; c++) {
            char *t = plain_cell(kv_sheet_at(s, r, (int)c), "");
            for (char *p = t; p && *p; p++)
                if (*p == '"') *p = '\'';
            if (t) kv_put_csv(f, t, strlen(t));
            free(t);
            putc(c + 1 < s->n_col ? ',' : '\n', f);
        }
}

/* Columns a terminal needs for valid UTF-8 of single-width letters. */
static int width(const char *s)
{
    int n = 0;
    for (; *s; s++) n += ((unsigned char)*s & 0xc0) != 0x80;
    return n;
}

void kv_print_table(FILE *f, const kv_sheet *s, const char *align, int indent)
{
    int wide[KV_SHEET_COLS_MAX];
    for (size_t c = 0; c < s->n_col; c++) {
        wide[c] = width(s->col[c]);
        for (size_t r = 0; r < s->n_row; r++) {
            char *t = plain_cell(kv_sheet_at(s, r, (int)c), "-");
            int w = t ? width(t) : 0;
            if (w > wide[c]) wide[c] = w;
            free(t);
        }
    }
    for (size_t r = 0; r <= s->n_row; r++) { /* the header, then the rows */
        fprintf(f, "%*s", indent, "");
        int owed = 0; /* blanks are printed before the next text, so that no line ends in blanks */
        for (size_t c = 0; c < s->n_col; c++) {
            char *t = r ? plain_cell(kv_sheet_at(s, r - 1, (int)c), "-") : strdup(s->col[c]);
            int pad = t ? wide[c] - width(t) : 0;
            if (align[c] == 'r') owed += pad;
            if (t && *t) fprintf(f, "%*s%s", owed, "", t), owed = 0;
            if (align[c] != 'r') owed += pad;
            owed += 2;
            free(t);
        }
        putc('\n', f);
    }
}

kv_status kv_flush_output(FILE *f, const char *name, kv_error *err)
{
    if (fflush(f) || ferror(f))
        return kv_fail(err, KV_EIO, "cannot write to %s: %s", name, errno ? strerror(errno) : "write failed");
    return KV_OK;
}
