/* sheet.c - a table in memory (sheet.h). What leaves the program is in sheet_print.c. */
#include "analyze/sheet.h"

#include <math.h>
#include <stdlib.h>

#define BLOCK_BYTES ((size_t)64 << 10)

struct kv_sheet_block {
    kv_sheet_block *next;
    size_t used, cap;
    char data[];
};

kv_status kv_sheet_init(kv_sheet *s, size_t n_col, const char *const *names, kv_error *err)
{
    *s = (kv_sheet){0};
    if (n_col > KV_SHEET_COLS_MAX)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot hold a table of %zu columns: at most %u", n_col,
                       KV_SHEET_COLS_MAX);
    for (size_t i = 0; i < n_col; i++) {
        kv_status st = kv_sheet_add_col(s, names[i], err);
        if (st) return kv_sheet_free(s), st;
    }
    return KV_OK;
}

void kv_sheet_free(kv_sheet *s)
{
    if (!s) return;
    for (size_t i = 0; i < s->n_col; i++) free(s->col[i]);
    for (kv_sheet_block *b = s->block, *next; b; b = next) next = b->next, free(b);
    free(s->cell);
    *s = (kv_sheet){0};
}

kv_status kv_sheet_add(kv_sheet *s, kv_cell **row, kv_error *err)
{
    *row = NULL;
    if (s->n_row == s->cap_row) {
        size_t cap = s->cap_row ? s->cap_row * 2 : 64, bytes;
        if (s->n_row >= KV_SHEET_ROWS_MAX)
            return kv_fail(err, KV_EUNSUPPORTED, "cannot hold more than %u rows: narrow the selection",
                           KV_SHEET_ROWS_MAX);
        if (!kv_mul(cap, s->n_col * sizeof *s->cell, &bytes)) return kv_fail(err, KV_ENOMEM, "out of memory");
        kv_cell *cell = realloc(s->cell, bytes ? bytes : 1);
        if (!cell) return kv_fail(err, KV_ENOMEM, "cannot hold %zu rows: out of memory", cap);
        s->cell = cell, s->cap_row = cap;
    }
    *row = s->cell + s->n_row++ * s->n_col;
    for (size_t i = 0; i < s->n_col; i++) (*row)[i] = (kv_cell){.kind = KV_CELL_NULL};
    return KV_OK;
}

kv_status kv_sheet_add_col(kv_sheet *s, const char *name, kv_error *err)
{
    if (s->n_col == KV_SHEET_COLS_MAX)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot hold a table of more than %u columns", KV_SHEET_COLS_MAX);
    char *copy = strdup(name);
    kv_cell *cell = NULL;
    size_t bytes;
    if (!copy) return kv_fail(err, KV_ENOMEM, "out of memory");
    if (s->cap_row) {
        if (!kv_mul(s->cap_row, (s->n_col + 1) * sizeof *cell, &bytes) || !(cell = malloc(bytes)))
            return free(copy), kv_fail(err, KV_ENOMEM, "out of memory");
        for (size_t r = 0; r < s->n_row; r++) {
            memcpy(cell + r * (s->n_col + 1), s->cell + r * s->n_col, s->n_col * sizeof *cell);
            cell[r * (s->n_col + 1) + s->n_col] = (kv_cell){.kind = KV_CELL_NULL};
        }
        free(s->cell);
        s->cell = cell;
    }
    s->col[s->n_col++] = copy;
    return KV_OK;
}

kv_status kv_sheet_text(kv_sheet *s, kv_cell *c, const char *text, size_t n, kv_error *err)
{
    if (n > UINT32_MAX - 1) return kv_fail(err, KV_EUNSUPPORTED, "cannot hold a text of %zu bytes", n);
    kv_sheet_block *b = s->block;
    if (!b || b->cap - b->used < n + 1) {
        size_t cap = n + 1 > BLOCK_BYTES ? n + 1 : BLOCK_BYTES;
        if (!(b = malloc(sizeof *b + cap))) return kv_fail(err, KV_ENOMEM, "out of memory");
        *b = (kv_sheet_block){.next = s->block, .cap = cap};
        s->block = b;
    }
    char *to = b->data + b->used;
    if (n) memcpy(to, text, n);
    to[n] = 0;
    b->used += n + 1;
    *c = (kv_cell){.kind = KV_CELL_TEXT, .len = (uint32_t)n, .u.s = to};
    return KV_OK;
}

kv_status kv_sheet_copy_cell(kv_sheet *s, kv_cell *to, const kv_cell *from, kv_error *err)
{
    if (from->kind == KV_CELL_TEXT) return kv_sheet_text(s, to, from->u.s, from->len, err);
    *to = *from;
    return KV_OK;
}

int kv_sheet_find(const kv_sheet *s, const char *name)
{
    for (size_t i = 0; i < s->n_col; i++)
        if (!strcmp(s->col[i], name)) return (int)i;
    return -1;
}

double kv_cell_number(const kv_cell *c)
{
    return c->kind == KV_CELL_INT ? (double)c->u.i : c->kind == KV_CELL_REAL ? c->u.d : NAN;
}

const char *kv_cell_text(const kv_cell *c)
{
    return c->kind == KV_CELL_TEXT ? c->u.s : "";
}

int kv_cell_cmp(const kv_cell *a, const kv_cell *b)
{
    int ka = a->kind == KV_CELL_TEXT ? 2 : a->kind != KV_CELL_NULL,
        kb = b->kind == KV_CELL_TEXT ? 2 : b->kind != KV_CELL_NULL;
    if (ka != kb || ka == 0) return ka - kb;
    if (ka == 2) {
        int c = memcmp(a->u.s, b->u.s, a->len < b->len ? a->len : b->len);
        return c ? c : (a->len > b->len) - (a->len < b->len);
    }
    if (a->kind == KV_CELL_INT && b->kind == KV_CELL_INT) return (a->u.i > b->u.i) - (a->u.i < b->u.i);
    double x = kv_cell_number(a), y = kv_cell_number(b);
    return (x > y) - (x < y);
}

/* Merge sort over row numbers: stable, and the comparison may carry a context. */
typedef struct {
    const kv_sheet *s;
    int (*cmp)(const kv_sheet *, const kv_cell *, const kv_cell *, const void *);
    const void *ctx;
} sorter;

static void merge_sort(const sorter *o, size_t *v, size_t *tmp, size_t n)
{
    if (n < 2) return;
    size_t h = n / 2, i = 0, j = h, k = 0, w = o->s->n_col;
    merge_sort(o, v, tmp, h);
    merge_sort(o, v + h, tmp, n - h);
    while (i < h && j < n)
        tmp[k++] = o->cmp(o->s, o->s->cell + v[i] * w, o->s->cell + v[j] * w, o->ctx) <= 0 ? v[i++] : v[j++];
    while (i < h) tmp[k++] = v[i++];
    memcpy(v, tmp, k * sizeof *v); /* what is left of the right half already stands in place */
}

kv_status kv_sheet_sort(kv_sheet *s, int (*cmp)(const kv_sheet *, const kv_cell *, const kv_cell *, const void *),
                        const void *ctx, kv_error *err)
{
    size_t *order = NULL, *tmp = NULL;
    kv_cell *cell = NULL;
    kv_status st;
    if ((st = kv_array(&order, s->n_row, sizeof *order, err)) || (st = kv_array(&tmp, s->n_row, sizeof *tmp, err)) ||
        (st = kv_array(&cell, s->n_row, s->n_col * sizeof *cell, err)))
        goto out;
    for (size_t i = 0; i < s->n_row; i++) order[i] = i;
    merge_sort(&(sorter){s, cmp, ctx}, order, tmp, s->n_row);
    for (size_t i = 0; i < s->n_row; i++)
        memcpy(cell + i * s->n_col, s->cell + order[i] * s->n_col, s->n_col * sizeof *cell);
    free(s->cell);
    s->cell = cell, s->cap_row = s->n_row, cell = NULL;
out:
    free(order), free(tmp), free(cell);
    return st;
}
