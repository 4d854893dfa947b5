/* generate.h - free running: the model's own greedy answer under eviction (metrics.md 1.6 M6). */
#ifndef KV_GENERATE_H
#define KV_GENERATE_H

#include "sim/closed.h"

enum { KV_GENERATE_STEPS = 64 }; /* part of the metrics' definition */

typedef struct {
    size_t n_point;
    uint32_t n_step; /* KV_GENERATE_STEPS */
    uint32_t
        *token; /* [n_point + 1][n_step]: point i, and behind them the full cache; UINT32_MAX after the end token */
    bool *able; /* [n_point] false: a rule that hides or foresees, or keys held in part: not followed, no tokens */
} kv_generated;

/* Greedy continuation of the prompt by KV_GENERATE_STEPS tokens. The first token comes from the full cache (no cut
 * reaches the prompt's last row); ties: lower id. Stops a branch at the model's end token. Decode rules decide on the
 * evicted model's own queries, after every token of its own answer. */
kv_status kv_generate(const kv_plan *p, const kv_point *point, size_t n_point, const kv_model *m, uint32_t threads,
                      void (*tick)(void *ctx, double done), void *ctx, kv_generated *out, kv_error *err);
void kv_generated_free(kv_generated *g);

/* Tokens before the first that differs from the full cache's answer; n_step when none does. */
uint32_t kv_first_divergence(const kv_generated *g, size_t i);
/* Share of what the prompt's answer asks for that the text of point i holds (case and white space aside): the strings
 * of `answers` in the trace's metadata, else the numbers of four digits and more in `answer`, else `answer` itself.
 * NAN without an answer or a tokenizer. */
double kv_answer_found(const kv_generated *g, size_t i, const kv_model *m, const kv_trace_info *info);
/* Values of point i (undefined where it is not able); out has room for 2. Returns how many. */
size_t kv_generated_values(const kv_generated *g, size_t i, const kv_model *m, const kv_trace_info *info,
                           kv_metric_set wanted, kv_value *out);

#endif
