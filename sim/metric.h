/* metric.h - the table of metrics: name, unit, better direction, formula, source, and how sums become values.
 *
 * Notation: one measured row t of query head h in layer l; p = its full-cache softmax; S = what the policy leaves
 * visible (kept prompt positions and everything after the cut); R = sum of p over S; o = sum p v; o_hat = sum_S p v /
 * R; y, y_hat = the sums over heads of o W_O[h], o_hat W_O[h]. Identities: TV(p, p_S/R) = 1 - R, KL(p_S/R || p) = -ln
 * R, o - o_hat = (1 - R)(mu_E - mu_S). */
#ifndef KV_METRIC_H
#define KV_METRIC_H

#include "traces/base.h"

/* The numbers stand in results databases (run.wanted): new ones go to the end. */
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
    KV_M_DELTA_NLL, /* from here to FIRST_DIVERGENCE: measured with the model (closed.h) */
    KV_M_KL,
    KV_M_TOP1_AGREE,
    KV_M_TOP5_OVERLAP,
    KV_M_CLOSED_HEAD_ERROR,
    KV_M_STREAM_ERROR,
    KV_M_NLL_NOISE,
    KV_M_ANSWER_FOUND, /* and these when it answers by itself (generate.h) */
    KV_M_FIRST_DIVERGENCE,
    KV_M_NATS_LOST_PROMPT,
    KV_M_RECALL_PROMPT_P10,
    KV_M_RECALL_PROMPT_MIN,
    KV_M_HEAD_COSINE,
    KV_M_GAP_CLOSED,
    KV_M_EVIDENCE_KEPT,
    KV_M_EVIDENCE_SPAN_HALF,
    KV_M_EVIDENCE_LOST,
    KV_M_BREADTH,
    KV_M_OUTPUT_L1,
    KV_M_BOUND_ADA,
    KV_M_BOUND_CRITICAL,
    KV_M_BOUND_LAVA,
    KV_M_BOUND_RATIO,
    KV_M_BOUND_RATIO_CRITICAL,
    KV_M_BOUND_RATIO_LAVA,
    KV_M_COUNT
} kv_metric_id;

typedef uint64_t kv_metric_set; /* bit per kv_metric_id */
#define KV_M_BIT(m) ((kv_metric_set)1 << (m))
#define KV_M_ALL    (KV_M_BIT(KV_M_COUNT) - 1)
/* Metrics that need outputs, the evidence of the trace, sums through W_O by absolute value. */
#define KV_M_OUTPUTS                                                                                                   \
    (KV_M_BIT(KV_M_HEAD_ERROR) | KV_M_BIT(KV_M_VALUE_DISTANCE) | KV_M_BIT(KV_M_LAYER_ERROR) |                          \
     KV_M_BIT(KV_M_HEAD_COSINE))
#define KV_M_EVIDENCE  (KV_M_BIT(KV_M_EVIDENCE_KEPT) | KV_M_BIT(KV_M_EVIDENCE_SPAN_HALF) | KV_M_BIT(KV_M_EVIDENCE_LOST))
/* Those that need the model. */
#define KV_M_CLOSED    (KV_M_BIT(KV_M_FIRST_DIVERGENCE + 1) - KV_M_BIT(KV_M_DELTA_NLL))
#define KV_M_GENERATED (KV_M_BIT(KV_M_ANSWER_FOUND) | KV_M_BIT(KV_M_FIRST_DIVERGENCE))
#define KV_M_BOUNDS    (KV_M_ALL & ~(KV_M_BIT(KV_M_OUTPUT_L1) - 1))

typedef struct {
    const char *name, *unit, *better, *formula, *source;
    const char *asked; /* why it is computed only when asked for by name; NULL = in the default set */
} kv_metric_def;
extern const kv_metric_def kv_metric_defs[KV_M_COUNT];
/* The metrics whose `asked` is NULL. */
kv_metric_set kv_metric_default(void);
/* "recall,layer_error", where "default" and "all" stand for those of them that are possible; NULL = default. possible =
 * all but what needs a model or an answer that is not there. KV_EMISUSE names the nearest, or what is missing. */
kv_status kv_metric_parse(const char *list, kv_metric_set possible, kv_metric_set *out, kv_error *err);

/* Sums over the measured rows of one (policy, budget, layer, query head). */
typedef struct {
    double recall, nats, recall_min;
    double recall_prompt, nats_prompt, prompt_min; /* over n_prompt rows that give the prompt any mass */
    double contested_kept, contested_all;
    double total_variation;                              /* where keys change: reindex=1, select=mixdim */
    double head_error, cosine, value_distance;           /* the last over n_distance rows that lost anything */
    uint32_t n, n_prompt, n_capped, n_distance, n_whole; /* n_whole: rows that saw everything */
} kv_head_sums;

/* Kept items inside the tie class at the cut, and all kept ones, of one layer. */
typedef struct {
    uint64_t tied, kept;
} kv_tie_count;

/* What the kept sets of one layer hold of the prompt (sim/coverage.h). */
typedef struct {
    double lost;              /* share of the evidence tokens that no unit of the layer sees, mean over rows */
    uint64_t distinct, slots; /* positions of the prompt that some unit sees, slots they take; summed over rows */
} kv_layer_cover;

/* L1 norms of one layer, summed over the measured rows (sim/bounds.h). */
typedef struct {
    double actual;              /* ||y - y_hat||_1 */
    double ada, critical, lava; /* what the three papers bound it by */
    double tightest, disorder;  /* largest over rows: actual / critical; critical / ada and ada / lava. At most 1 */
} kv_bound_sums;

/* One measured row over all layers and heads: what per-step series are made of. */
enum {
    KV_STEP_RECALL,
    KV_STEP_CONTESTED,
    KV_STEP_PROMPT,
    KV_STEP_NATS,
    KV_STEP_NATS_PROMPT,
    KV_STEP_HEAD_ERROR,
    KV_STEP_COSINE,
    KV_STEP_DISTANCE,
    KV_STEP_VARIATION,
    KV_STEP_MEANS, /* the above are means of heads, then of layers, where defined */
    KV_STEP_MIN = KV_STEP_MEANS,
    KV_STEP_PROMPT_MIN,
    KV_STEP_SQUARE, /* of layer errors */
    KV_STEP_COUNT
};
typedef struct {
    double v[KV_STEP_COUNT];
    uint32_t n[KV_STEP_COUNT]; /* samples; a layer's heads while it is measured, then layers */
} kv_step_sums;

/* One value of one metric. layer, head, step = -1 where aggregated. */
typedef struct {
    kv_metric_id metric;
    int32_t layer, head, step;
    double value; /* NAN = undefined */
    uint32_t n;
} kv_value;

/* KV_DETAIL_STEP: as by head, and every measured row over all layers and heads. */
enum { KV_DETAIL_RUN, KV_DETAIL_LAYER, KV_DETAIL_HEAD, KV_DETAIL_STEP };

/* One point's sums; NULL where nothing was measured: the metrics made of it are then left out. */
typedef struct {
    uint32_t n_layer, n_q_head, n_row;
    const uint32_t *number;                  /* [n_layer] the layers' numbers */
    const kv_head_sums *head;                /* [n_layer][n_q_head] */
    const double *layer_error;               /* [n_layer] sums over rows */
    const kv_tie_count *tie;                 /* [n_layer] */
    const double *evidence_kept, *span_half; /* [n_layer][n_q_head] */
    const kv_layer_cover *cover;             /* [n_layer] */
    double lost, breadth;                    /* over the model: of the evidence, of `cover` */
    const kv_bound_sums *bound;              /* [n_layer] */
    const double *gap;                       /* gap_closed */
    const kv_step_sums *step;                /* [n_row] */
} kv_point_sums;

/* Values of one point, in the order metric, (all, layer, its heads, next layer ..., steps), appended to out (room for
 * kv_metric_room). Returns how many were written; SIZE_MAX when memory ran out. */
size_t kv_metric_values(const kv_point_sums *in, kv_metric_set wanted, int detail, kv_value *out);
size_t kv_metric_room(uint32_t n_layer, uint32_t n_q_head, uint32_t n_row, int detail);

#endif
