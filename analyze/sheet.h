/* sheet.h - a table in memory with named columns, and how it leaves the program: text for people, CSV, JSON, JSON
 * lines.
 *
 * Every command has the same shape: SQL -> sheet -> one number per prompt -> mean and interval -> sheet -> print. Text
 * comes from a database somebody else wrote, so it is escaped at each exit: control bytes, bidirectional overrides and
 * broken UTF-8 never reach a terminal. */
#ifndef KV_SHEET_H
#define KV_SHEET_H

#include "traces/plain.h"

typedef enum { KV_CELL_NULL, KV_CELL_INT, KV_CELL_REAL, KV_CELL_TEXT } kv_cell_kind;

typedef struct {
    kv_cell_kind kind;
    uint32_t len; /* bytes of text */
    union {
        int64_t i;
        double d;
        const char *s; /* owned by the sheet; a zero byte stands behind it */
    } u;
} kv_cell;

#define KV_SHEET_COLS_MAX 64u
#define KV_SHEET_ROWS_MAX (1u << 24)

typedef struct kv_sheet_block kv_sheet_block;
typedef struct {
    size_t n_col, n_row;
    char *col[KV_SHEET_COLS_MAX];
    kv_cell *cell; /* [n_row][n_col] */
    size_t cap_row;
    kv_sheet_block *block; /* text */
} kv_sheet;

/* An empty sheet with these columns. free with kv_sheet_free (zeroed sheets and NULL are accepted). */
kv_status kv_sheet_init(kv_sheet *s, size_t n_col, const char *const *names, kv_error *err);
void kv_sheet_free(kv_sheet *s);
/* *row = n_col NULL cells at the end; valid until the next row is added. */
kv_status kv_sheet_add(kv_sheet *s, kv_cell **row, kv_error *err);
/* Add a column of NULL cells at the right. */
kv_status kv_sheet_add_col(kv_sheet *s, const char *name, kv_error *err);
/* Copy text into the sheet and point the cell at it. */
kv_status kv_sheet_text(kv_sheet *s, kv_cell *c, const char *text, size_t n, kv_error *err);
kv_status kv_sheet_copy_cell(kv_sheet *s, kv_cell *to, const kv_cell *from, kv_error *err);
int kv_sheet_find(const kv_sheet *s, const char *name); /* column, or -1 */

static inline kv_cell *kv_sheet_at(const kv_sheet *s, size_t row, int col)
{
    return &s->cell[row * s->n_col + (size_t)col];
}
static inline kv_cell kv_int(int64_t i)
{
    return (kv_cell){.kind = KV_CELL_INT, .u.i = i};
}
/* A number; NaN becomes NULL. */
static inline kv_cell kv_real(double d)
{
    return d == d ? (kv_cell){.kind = KV_CELL_REAL, .u.d = d} : (kv_cell){.kind = KV_CELL_NULL};
}
double kv_cell_number(const kv_cell *c);    /* NaN for NULL and text */
const char *kv_cell_text(const kv_cell *c); /* "" for anything but text */
/* Total order: NULL < numbers < text (bytes). 0 = equal. */
int kv_cell_cmp(const kv_cell *a, const kv_cell *b);

/* Sort rows by cmp(sheet, row a, row b), ties in their present order. */
kv_status kv_sheet_sort(kv_sheet *s, int (*cmp)(const kv_sheet *s, const kv_cell *a, const kv_cell *b, const void *ctx),
                        const void *ctx, kv_error *err);

/* ------------------------------------------------------------------------------------------------ output */
/* "..." with JSON escapes; broken UTF-8 becomes U+FFFD. */
void kv_put_json(FILE *f, const char *s, size_t n);
/* RFC 4180: quoted when it holds a comma, quote or line break. */
void kv_put_csv(FILE *f, const char *s, size_t n);
/* A cell; numbers with the fewest digits that read back the same. NULL is empty (CSV) or null (JSON). */
void kv_put_cell_csv(FILE *f, const kv_cell *c);
void kv_put_cell_json(FILE *f, const kv_cell *c);

void kv_print_csv(FILE *f, const kv_sheet *s);
void kv_print_json(FILE *f, const kv_sheet *s); /* [ {..}, .. ] without a final newline */
void kv_print_jsonl(FILE *f, const kv_sheet *s);
/* The CSV gnuplot reads: as kv_print_csv, but text is made plain first (kv_put_plain) and '"' becomes "'", which
 * gnuplot cannot unquote. Header included. */
void kv_print_plot_csv(FILE *f, const kv_sheet *s);
/* Aligned columns, two blanks between them, header first. align: one 'l' or 'r' per column. Cells are printed plain,
 * numbers as in CSV, NULL as "-". `indent` blanks before each line. */
void kv_print_table(FILE *f, const kv_sheet *s, const char *align, int indent);

/* KV_EIO when anything written to f so far was lost (full disk, closed pipe). */
kv_status kv_flush_output(FILE *f, const char *name, kv_error *err);

#endif
