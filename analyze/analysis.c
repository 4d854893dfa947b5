/* analysis.c - what the commands share (analysis.h). */
#include "analyze/analysis.h"
#include "analyze/stats.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>

const char *const kv_default_metrics[] = {"layer_error", "recall", NULL};

kv_analysis kv_analysis_defaults(void)
{
    return (kv_analysis){.db = "results.db",
                         .margin = NAN,
                         .difference = NAN,
                         .layer = UINT32_MAX,
                         .head = UINT32_MAX,
                         .out = stdout,
                         .talk = stderr};
}

kv_status kv_analysis_open(const kv_analysis *a, kv_db **db, kv_selection *s, kv_error *err)
{
    kv_status st = kv_db_open(a->db, db, err);
    if (st) return st;
    st = kv_selection_init(*db, &a->policies, &a->budgets, &a->traces, &a->categories, a->model, s, err);
    if (!st) st = kv_selection_variant(*db, s, a->granularity, a->page, a->cut, err);
    if (st) kv_selection_free(s);
    if (st) kv_db_close(*db), *db = NULL;
    return st;
}

void kv_print_note(FILE *talk, const kv_group_note *note)
{
    if (note->merged)
        fprintf(talk,
                "note: %zu times one prompt had several runs (seeds, rows or traces) under one policy and budget; they "
                "were averaged first\n",
                note->merged);
    if (note->undefined)
        fprintf(talk, "note: %zu values are undefined and left out (column undefined)\n", note->undefined);
    if (note->n_min != note->n_max)
        fprintf(talk, "note: not every line has the same number of prompts (%zu to %zu): compare lines with care\n",
                note->n_min, note->n_max);
    if (note->n_max == 1) fputs("note: one prompt only, so there are no intervals\n", talk);
}

void kv_print_left_out(FILE *talk, const kv_error *err)
{
    fputs("left out: ", talk);
    kv_put_plain(talk, err->msg, strlen(err->msg));
    fputs("\n", talk);
}

void kv_print_interval_line(FILE *f)
{
    fprintf(f, "%g%% interval over prompts: BCa bootstrap (percentile from %u prompts on), %u resamples, seed %u",
            KV_BOOT_LEVEL * 100, KV_BOOT_BCA_BELOW, KV_BOOT_RESAMPLES, KV_BOOT_SEED);
}

void kv_print_interval_json(FILE *f)
{
    fprintf(f,
            "{\"level\": %g, \"method\": \"bootstrap over prompts: BCa below %u prompts, percentile from there on\", "
            "\"resamples\": %u, \"seed\": %u}",
            KV_BOOT_LEVEL, KV_BOOT_BCA_BELOW, KV_BOOT_RESAMPLES, KV_BOOT_SEED);
}

kv_status kv_print_data(const kv_analysis *a, const char *metric, kv_sheet *s, kv_error *err)
{
    if (a->format == KV_OUT_CSV) {
        kv_status st;
        if ((st = kv_sheet_add_col(s, "resamples", err)) || (st = kv_sheet_add_col(s, "seed", err))) return st;
        for (size_t r = 0; r < s->n_row; r++) {
            *kv_sheet_at(s, r, (int)s->n_col - 2) = kv_int(KV_BOOT_RESAMPLES);
            *kv_sheet_at(s, r, (int)s->n_col - 1) = kv_int(KV_BOOT_SEED);
        }
        kv_print_csv(a->out, s);
        return KV_OK;
    }
    fputs("{\"metric\": ", a->out);
    kv_put_json(a->out, metric, strlen(metric));
    fputs(", \"interval\": ", a->out);
    kv_print_interval_json(a->out);
    fputs(",\n \"rows\": ", a->out);
    kv_print_json(a->out, s);
    fputs("}\n", a->out);
    return KV_OK;
}

void kv_print_heading(FILE *f, const kv_sheet *s)
{
    static const char *const col[] = {"metric", "unit", "better"}, *const after[] = {" (", "), ", " is better"};
    for (int i = 0; i < 3 && s->n_row; i++) {
        const kv_cell *c = kv_sheet_at(s, 0, kv_sheet_find(s, col[i]));
        kv_put_plain(f, kv_cell_text(c), strlen(kv_cell_text(c)));
        fputs(after[i], f);
    }
}

double kv_column_largest(const kv_sheet *s, int col)
{
    double m = 0;
    for (size_t r = 0; r < s->n_row; r++) {
        double v = fabs(kv_cell_number(kv_sheet_at(s, r, col)));
        if (v > m) m = v;
    }
    return m;
}

int kv_decimals(double largest)
{
    if (!(largest > 0) || !isfinite(largest)) return 4;
    int d = 3 - (int)floor(log10(largest));
    return d < 0 ? 0 : d > 6 ? 6 : d;
}

kv_status kv_cell_format(kv_sheet *s, kv_cell *c, kv_error *err, const char *fmt, ...)
{
    char b[512];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(b, sizeof b, fmt, ap);
    va_end(ap);
    if (n < 0) n = 0;
    return kv_sheet_text(s, c, b, (size_t)n < sizeof b ? (size_t)n : sizeof b - 1, err);
}

kv_status kv_items(const kv_list *l, bool spec, const char *option, size_t max, char **item, size_t *n, kv_error *err)
{
    *n = 0;
    for (size_t i = 0; i < l->n; i++)
        for (const char *s = l->v[i];;) {
            size_t len = kv_item_length(s, spec);
            if (!len) return kv_fail(err, KV_EMISUSE, "empty name in --%s '%s'", option, l->v[i]);
            if (*n == max) return kv_fail(err, KV_EMISUSE, "--%s takes at most %zu names here", option, max);
            if (!(item[*n] = strndup(s, len))) return kv_fail(err, KV_ENOMEM, "out of memory");
            ++*n;
            if (!*(s += len)) break;
            s++;
        }
    return KV_OK;
}

kv_status kv_set_text(kv_sheet *s, size_t row, const char *col, const char *text, kv_error *err)
{
    return kv_sheet_text(s, kv_sheet_at(s, row, kv_sheet_find(s, col)), text, strlen(text), err);
}

void kv_set_real(kv_sheet *s, size_t row, const char *col, double v)
{
    *kv_sheet_at(s, row, kv_sheet_find(s, col)) = isfinite(v) ? kv_real(v) : (kv_cell){.kind = KV_CELL_NULL};
}

void kv_set_int(kv_sheet *s, size_t row, const char *col, int64_t v)
{
    *kv_sheet_at(s, row, kv_sheet_find(s, col)) = kv_int(v);
}

const char *kv_p_text(double p, char buffer[16])
{
    if (!(p == p))
        snprintf(buffer, 16, "-");
    else if (p < 1e-6)
        snprintf(buffer, 16, "< 1e-6");
    else
        snprintf(buffer, 16, p < 0.001 ? "%.1e" : p < 0.1 ? "%.4f" : "%.2f", p);
    return buffer;
}

const char *kv_bytes_text(double bytes, char buffer[24])
{
    static const char *const unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    int k = 0;
    while (bytes >= 1024 && k < 4) bytes /= 1024, k++;
    snprintf(buffer, 24, "%.*f %s", k && bytes < 100 ? bytes < 10 ? 2 : 1 : 0, bytes, unit[k]);
    return buffer;
}
