/* group.h - from rows per prompt to one line per group: the prompt is the unit of everything we claim. */
#ifndef KV_GROUP_H
#define KV_GROUP_H

#include "analyze/sheet.h"

/* What the rows were like, for the notes beside a table. */
typedef struct {
    size_t merged;       /* (group, prompt) pairs that had several rows (seeds, rows, traces of one prompt): averaged */
    size_t undefined;    /* (group, prompt) pairs whose value is undefined: left out, counted in the column */
    size_t n_min, n_max; /* smallest and largest n of a group */
} kv_group_note;

/* `in` has a column `prompt` and a column `value`. Columns left of `prompt` name the group; of those right of it
 * numbers are averaged (first within the prompt, then over prompts with a defined value) and text is taken from the
 * first row. `out`: the group's columns, the averaged ones in their order, and in place of value: mean, low, high, n,
 * undefined. low and high are the interval of stats.h (kv_mean_interval), NULL for n < 2; mean is NULL for n = 0.
 * Groups come in the order of their first row. KV_EFORMAT when a column is missing or stands in the wrong place. */
kv_status kv_group_prompts(const kv_sheet *in, kv_sheet *out, kv_group_note *note, kv_error *err);

/* For sheets with columns `policy` and `spec`: adds `label` (the policy's name; with the parameters that differ where
 * one policy is there in several variants), `series` (0.. in the order a legend should have) and `variant` (0.. within
 * the policy), and sorts the rows by (model, metric, series, layer, bytes) as far as these columns exist. */
kv_status kv_label_series(kv_sheet *s, kv_error *err);

/* Place of a policy in tables and legends: references, then published policies by family, then others, oracles last. */
int kv_policy_place(const char *policy);

/* Columns that together with `policy` make two runs comparable or not. */
extern const char *const kv_variant_columns[]; /* "spec", "granularity", "page", "cut", "protect", "unit", NULL */

#endif
