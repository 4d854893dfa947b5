/* metric.h - the table of metrics: name, unit, better direction, formula, source, and how sums become values.
 *
 * Notation: one measured row t of query head h in layer l; p = its full-cache softmax; S = what the policy leaves
 * visible (kept prompt positions and everything after the cut); R = sum of p over S; o = sum p v; o_hat = sum_S p v /
 * R. Identities: TV(p, p_S/R) = 1 - R, KL(p_S/R || p) = -ln R, o - o_hat = (1 - R)(mu_E - mu_S). */
#ifndef KV_METRIC_H
#define KV_METRIC_H

#include "traces/base.h"

typedef enum {
    KV_M_RECALL,
    KV_M_RECALL_CONTESTED,
    KV_M_RECALL_PROMPT,
    KV_M_NATS_LOST,
    KV_M_RECALL_P10,
    KV_M_RECALL_MIN,
    KV_M_HEAD_ERROR,
    KV_M_VALUE_DISTANCE,
    KV_M_LAYER_ERROR,
    KV_M_AMBIGUOUS_SHARE,
    KV_M_TOTAL_VARIATION,
    KV_M_DELTA_NLL, /* from here on: measured with the model (closed.h) */
    KV_M_KL,
    KV_M_TOP1_AGREE,
    KV_M_TOP5_OVERLAP,
    KV_M_CLOSED_HEAD_ERROR,
    KV_M_STREAM_ERROR,
    KV_M_NLL_NOISE,
    KV_M_ANSWER_FOUND, /* and these when it answers by itself (generate.h) */
    KV_M_FIRST_DIVERGENCE,
    KV_M_COUNT
} kv_metric_id;

#define KV_M_CLOSED    ((1u << KV_M_COUNT) - (1u << KV_M_DELTA_NLL)) /* bits of those that need the model */
#define KV_M_GENERATED (1u << KV_M_ANSWER_FOUND | 1u << KV_M_FIRST_DIVERGENCE)

typedef struct {
    const char *name, *unit, *better, *formula, *source;
} kv_metric_def;
extern const kv_metric_def kv_metric_defs[KV_M_COUNT];

/* Sums over the measured rows of one (policy, budget, layer, query head). */
typedef struct {
    double recall, nats, recall_min;
    double recall_prompt; /* over n_prompt rows that give the prompt any mass */
    double contested_kept, contested_all;
    double total_variation;                              /* where keys change: reindex=1, select=mixdim */
    double head_error, value_distance;                   /* the latter over n_distance rows that lost anything */
    uint32_t n, n_prompt, n_capped, n_distance, n_whole; /* n_whole: rows that saw everything */
} kv_head_sums;

/* One value of one metric. layer, head = -1 where aggregated. */
typedef struct {
    kv_metric_id metric;
    int32_t layer, head;
    double value; /* NAN = undefined */
    uint32_t n;
} kv_value;

enum { KV_DETAIL_RUN, KV_DETAIL_LAYER, KV_DETAIL_HEAD };

/* Kept items inside the tie class at the cut, and all kept ones, of one layer. */
typedef struct {
    uint64_t tied, kept;
} kv_tie_count;

/* Values of one point, in the order metric, (all, layer, its heads, next layer ...), appended to out (room for
 * kv_metric_room). head [n_layer][n_q_head]; layer_error [n_layer] = sum over n_row rows, NULL when not measured; tie
 * [n_layer]; number = the layers' numbers; wanted = bit per metric. Returns how many were written. */
size_t kv_metric_values(const kv_head_sums *head, const double *layer_error, const kv_tie_count *tie,
                        const uint32_t *number, uint32_t n_layer, uint32_t n_q_head, uint32_t n_row, unsigned wanted,
                        int detail, kv_value *out);
size_t kv_metric_room(uint32_t n_layer, uint32_t n_q_head);

#endif
