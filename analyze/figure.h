/* figure.h - one figure: data as CSV, drawn by gnuplot from plots/NAME.gp as SVG and PNG. plots/README.md is the
 * manual. */
#ifndef KV_FIGURE_H
#define KV_FIGURE_H

#include "analyze/query.h"

/* Where the .sql and .gp files are: $KVTRACE_PLOTS, else ../plots or ../../plots beside the executable (build/ and
 * build/san-x/), else ../share/kvtrace/plots (installed). Absolute path, malloc'd. KV_EMISSING names the places tried.
 */
kv_status kv_plots_folder(char **out, kv_error *err);
/* Make the folder (parents too) and return its absolute path, malloc'd. */
kv_status kv_figure_folder(const char *path, char **out, kv_error *err);

/* What a .gp gets, in this order, as ARG4.. (ARG1 = CSV, ARG2 = file to write, ARG3 = svg or png). NULL = "". */
#define KV_FIGURE_WORDS 6
typedef struct {
    const char *word[KV_FIGURE_WORDS]; /* metric, unit, subtitle, budget, policy, what bands are ("" = none drawn) */
} kv_figure_words;

/* Write FOLDER/NAME.csv from the bytes, then run gnuplot twice for FOLDER/NAME.svg and NAME.png. Each file appears
 * whole or not at all. Words are made plain and reach gnuplot as string variables, never as commands. */
kv_status kv_figure_draw(const char *plots, const char *folder, const char *name, const char *csv, size_t n_csv,
                         const kv_figure_words *words, kv_error *err);

/* plot attention (attention_map.c). layer UINT32_MAX: the middle one of those recorded. */
kv_status kv_figure_attention(const char *plots, const char *folder, const char *trace, const char *policy,
                              const char *budget, uint32_t layer, uint32_t head, kv_error *err);

/* plot cake (cake_figure.c): what CAKE sees in a trace and makes of it at this budget. */
kv_status kv_figure_cake(const char *plots, const char *folder, const char *trace, const char *budget, kv_error *err);

#endif
