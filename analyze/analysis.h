/* analysis.h - what the commands of kv-analyze share: the options, one function per command, a few words of output. */
#ifndef KV_ANALYSIS_H
#define KV_ANALYSIS_H

#include "analyze/group.h"
#include "analyze/query.h"

typedef enum { KV_OUT_TABLE, KV_OUT_CSV, KV_OUT_JSON, KV_OUT_JSONL } kv_output;

typedef struct {
    const char *db; /* path of results.db */
    kv_output format;
    const char *metric, *model;                    /* NULL = default, all */
    kv_list policies, budgets, traces, categories; /* as given; empty = all */
    const char *granularity, *cut, *page;          /* only runs with these; NULL = all */
    const char *what;                              /* export: run | metric | slots */
    const char *baseline;                          /* compare, power, heads: policy on the other side */
    double margin, difference;                     /* NaN = not given */
    double tie;                                    /* compare: differences up to this are ties */
    bool common, any_build, first;                 /* kv_allow; merge: where results differ, the first file's */
    const char *folder, *trace_file;               /* plot; merge, report: the file to write */
    const char *html;                              /* text: a page instead of the terminal */
    kv_list text_policies;                         /* report: whose kept words are shown */
    uint32_t layer, head; /* plot attention; UINT32_MAX = not given: the middle layer, head 0 */
    kv_list rest;         /* arguments after the command */
    FILE *out, *talk;     /* data, notes */
} kv_analysis;

kv_status kv_cmd_summary(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_curve(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_layers(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_compare(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_power(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_recommend(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_heads(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_predict(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_merge(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_export(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_plot(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_gap(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_text(const kv_analysis *a, kv_error *err);
kv_status kv_cmd_report(const kv_analysis *a, kv_error *err);

/* What --help prints; the text of one command, or kv_help for a name that is none. */
extern const char kv_help[];
const char *kv_help_of(const char *command);

/* The options as a command without any has them. */
kv_analysis kv_analysis_defaults(void);
/* Open the database and resolve the filters of the command line. */
kv_status kv_analysis_open(const kv_analysis *a, kv_db **db, kv_selection *s, kv_error *err);
/* layer_error, recall: the metric when --metric is not given (ends with NULL). */
extern const char *const kv_default_metrics[];

/* One line per (model, policy variant, budget): columns model policy spec granularity page cut protect metric unit
 * budget budget_tokens budget_frac bytes full_bytes frac overspent verified better mean low high n undefined label
 * series variant, sorted by series and bytes. bytes = mean_bytes of the run, frac = bytes / full_bytes, both averaged
 * over prompts; overspent = share of the prompts that kept more than nominal. KV_EMISSING when no run has the metric.
 */
kv_status kv_curve_load(kv_db *db, const kv_selection *s, kv_sheet *out, kv_group_note *note, kv_error *err);

/* The terms of v_gap (sim/schema.sql), one line per (model, policy variant, budget, way, term): columns model policy
 * spec granularity page cut protect budget metric unit way term budget_frac place layer_error oracle_layer_error mean
 * low high n undefined label series variant. KV_EMISSING when no run has what the decomposition needs. */
kv_status kv_gap_load(kv_db *db, const kv_selection *s, kv_sheet *out, kv_group_note *note, kv_error *err);

/* What `gap` prints under its tables: a sentence (and a line) a policy about where its loss comes from, at s->budget,
 * for s->metric. KV_EMISSING as kv_gap_load. */
kv_status kv_gap_sentences(kv_db *db, const kv_selection *s, FILE *f, kv_error *err);
/* The statement that gives the numbers in them, and the metrics to try in this order. */
extern const char kv_gap_means[], *const kv_gap_metrics[];

/* Lines about rows that were merged, left out, or not the same prompts everywhere. Empty when there is nothing to say.
 */
void kv_print_note(FILE *talk, const kv_group_note *note);
/* "left out: " and the message, one line. */
void kv_print_left_out(FILE *talk, const kv_error *err);
/* "95% interval over prompts: BCa bootstrap (percentile from 50 prompts), 10000 resamples, seed 1", no line end. */
void kv_print_interval_line(FILE *f);
/* The same as a JSON value. */
void kv_print_interval_json(FILE *f);
/* NAME stands in the sheet's row: set it. Text is copied. */
kv_status kv_set_text(kv_sheet *s, size_t row, const char *col, const char *text, kv_error *err);
void kv_set_real(kv_sheet *s, size_t row, const char *col, double v);
void kv_set_int(kv_sheet *s, size_t row, const char *col, int64_t v);
/* "0.012", "0.0003", "< 1e-6": enough digits of a p-value. */
const char *kv_p_text(double p, char buffer[16]);
/* "12.3 MiB" */
const char *kv_bytes_text(double bytes, char buffer[24]);
/* CSV or JSON of a sheet; JSON is an object with the metric, the interval's recipe and "rows". */
kv_status kv_print_data(const kv_analysis *a, const char *metric, kv_sheet *s, kv_error *err);

/* "layer_error (relative), lower is better" without a line end, from the first row. */
void kv_print_heading(FILE *f, const kv_sheet *s);
/* Largest absolute value of a column; 0 for an empty one. */
double kv_column_largest(const kv_sheet *s, int col);
/* Decimals that show four significant digits of the largest value, 0..6. */
int kv_decimals(double largest);
/* The items of a list of lists, each malloc'd, at most max of them; the rest is an error that names the option. */
kv_status kv_items(const kv_list *l, bool spec, const char *option, size_t max, char **item, size_t *n, kv_error *err);
/* Set a cell to formatted text. */
kv_status kv_cell_format(kv_sheet *s, kv_cell *c, kv_error *err, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

#endif
