/* sheet_print.c - tables as text, CSV and JSON; escapes for text that comes from a database (sheet.h). */
#include "analyze/sheet.h"
#include "traces/memtext.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

void kv_put_json(FILE *f, const char *s, size_t n)
{
    putc('"', f);
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        size_t len = kv_utf8_next(s + i, n - i, &c);
        if (!len)
            fputs("\xef\xbf\xbd", f), len = 1;
        else if (c == '"' || c == '\\')
            putc('\\', f), putc((int)c, f);
        else if (c == '\n')
            fputs("\\n", f);
        else if (c < 0x10000 && kv_obeyed(c))
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
    FILE *m = kv_text_stream(&b, &n);
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
            char *t = r ? plain_cell(kv_sheet_at(s, r - 1, (int)c), "-") : kv_format("%s", s->col[c]);
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
