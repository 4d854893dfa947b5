/* predict_layers.h - the error of one layer alone against what has accumulated by that layer, for `predict`. */
#ifndef KV_PREDICT_LAYERS_H
#define KV_PREDICT_LAYERS_H

#include "analyze/analysis.h"

/* Appends to the rows of predict, one a model and layer: metric head_error, target closed_head_error, scope "layer",
 * name = the layer's number; spearman = over policies of one prompt and budget, mean over budgets, then over prompts
 * with its interval; factor = median of target / metric. Nothing where one of the two is not there. */
kv_status kv_predict_layers(kv_db *db, const kv_selection *s, kv_sheet *out, kv_error *err);
/* The rows of one model as a table for people, below the others; nothing without any. */
kv_status kv_predict_layers_print(FILE *f, const kv_sheet *rows, const char *model, kv_error *err);

#endif
