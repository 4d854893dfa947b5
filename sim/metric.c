/* metric.c - from sums to values, with the reductions of design.md section 4: rows, then query heads, then layers. */
#include "sim/metric.h"

#include <math.h>
#include <stdlib.h>

#include "traces/cli.h"

#define BOUNDS_COST "as costly as all layer errors again: norms of v W_O, and ||y - y_hat|| in L1"

const kv_metric_def kv_metric_defs[KV_M_COUNT] = {
    [KV_M_RECALL] = {"recall", "share", "higher", "R; mean over rows, query heads, layers",
                     "design.md 4; CateKV, SampleAttention", NULL},
    [KV_M_RECALL_CONTESTED] = {"recall_contested", "share", "higher",
                               "sum over rows of kept mass outside F / of mass outside F, per query head, then means; "
                               "F = first 4 and last 32 prompt tokens and all tokens after the cut",
                               "metrics.md 1.5", NULL},
    [KV_M_RECALL_PROMPT] = {"recall_prompt", "share", "higher",
                            "kept prompt mass / prompt mass of the row; mean over rows, query heads, layers",
                            "design.md 4", NULL},
    [KV_M_NATS_LOST] = {"nats_lost", "nats", "lower",
                        "-ln R per row, capped at 20; mean over rows, query heads, layers",
                        "metrics.md 1.2: KL of the kept distribution from the full one", NULL},
    [KV_M_RECALL_P10] = {"recall_p10", "share", "higher", "0.1 quantile over (layer, query head) of the mean recall",
                         "design.md 4", NULL},
    [KV_M_RECALL_MIN] = {"recall_min", "share", "higher", "smallest R over rows, query heads, layers",
                         "CRA, arXiv 2406.15486", NULL},
    [KV_M_HEAD_ERROR] = {"head_error", "relative to ||o||", "lower",
                         "||o - o_hat|| / ||o||; mean over rows, query heads, layers", "metrics.md 1.6 M3", NULL},
    [KV_M_VALUE_DISTANCE] = {"value_distance", "relative to ||o||", "none",
                             "||mu_E - mu_S|| / ||o|| = head_error / (1 - R), over rows that lost mass",
                             "metrics.md 1.4", NULL},
    [KV_M_LAYER_ERROR] = {"layer_error", "relative to ||x||", "lower",
                          "||sum_h (o_h - o_hat_h) W_O[h]|| / ||x||, x the residual stream entering the block "
                          "(imported traces: the layer's own output); mean over rows; over layers the root of the sum "
                          "of squares",
                          "metrics.md 1.6 M4", NULL},
    [KV_M_AMBIGUOUS_SHARE] = {"ambiguous_share", "share", "none",
                              "kept slots whose score equals the first dropped one's / kept slots; over layers: of all "
                              "slots together",
                              "metrics.md 1.5: which of them stay is decided by the tie rule alone", NULL},
    [KV_M_TOTAL_VARIATION] = {"total_variation", "share", "lower",
                              "1/2 sum |p - p_hat| over all positions; mean over rows, query heads, layers. Stored "
                              "where positions are cache slots (reindex=1) or keys are projected (select=mixdim): "
                              "everywhere else it is 1 - recall",
                              "design.md 4, metrics.md 1.2", NULL},
    [KV_M_DELTA_NLL] = {"delta_nll", "nats per token", "lower",
                        "nll with the evicted cache - nll with the full one, of the recorded tokens; mean over the "
                        "predictions of tokens "
                        "P..N-1; needs --model",
                        "metrics.md 1.6 M5", NULL},
    [KV_M_KL] = {"kl", "nats per token", "lower",
                 "KL(full || evicted) of the next token; mean over predictions; needs --model", "metrics.md 1.6 M5",
                 NULL},
    [KV_M_TOP1_AGREE] = {"top1_agree", "share", "higher",
                         "the most likely token is the full cache's; mean over predictions; needs --model",
                         "metrics.md 1.6 M5", NULL},
    [KV_M_TOP5_OVERLAP] =
        {"top5_overlap", "share", "higher",
         "share of the five most likely tokens that are the full cache's; mean over predictions; needs --model",
         "metrics.md 1.6 M5", NULL},
    [KV_M_CLOSED_HEAD_ERROR] = {"closed_head_error", "relative to ||o||", "lower",
                                "||o - o_hat|| / ||o|| with o_hat of the evicted model, errors of earlier layers "
                                "included (layer 0: head_error); "
                                "mean over rows, query heads, layers; needs --model",
                                "metrics.md 2.1", NULL},
    [KV_M_STREAM_ERROR] =
        {"stream_error", "relative to ||x||", "lower",
         "||x - x_hat|| / ||x|| of the residual stream entering the block; mean over rows, layers; needs --model",
         "metrics.md 2.1", NULL},
    [KV_M_NLL_NOISE] = {"nll_noise", "nats per token", "none",
                        "|nll of the full cache here - nll at capture|: the same model, its rows cut another way; mean "
                        "over predictions. "
                        "No delta_nll inside it is a loss; needs --model",
                        "metrics.md 6.3 (9)", NULL},
    [KV_M_ANSWER_FOUND] =
        {"answer_found", "share", "higher",
         "share of what the prompt's answer asks for that 64 greedy tokens under eviction hold: the strings of "
         "`answers`, "
         "else the numbers of four digits and more in `answer`, else all of it; needs --model --generate",
         "metrics.md 1.6 M6", NULL},
    [KV_M_FIRST_DIVERGENCE] =
        {"first_divergence", "tokens", "higher",
         "greedy tokens before the first that differs from the full cache's; 64 = none of 64; needs --model --generate",
         "metrics.md 1.6 M6", NULL},
    [KV_M_NATS_LOST_PROMPT] =
        {"nats_lost_prompt", "nats", "lower",
         "-ln(kept prompt mass / prompt mass) per row, capped at 20; mean over rows, query heads, "
         "layers",
         "design.md 4: the prompt-only variant of nats_lost", NULL},
    [KV_M_RECALL_PROMPT_P10] = {"recall_prompt_p10", "share", "higher",
                                "0.1 quantile over (layer, query head) of the mean recall_prompt", "design.md 4", NULL},
    [KV_M_RECALL_PROMPT_MIN] = {"recall_prompt_min", "share", "higher",
                                "smallest recall_prompt over rows, query heads, layers", "design.md 4", NULL},
    [KV_M_HEAD_COSINE] = {"head_cosine", "cosine", "higher",
                          "o . o_hat / (||o|| ||o_hat||), 0 where nothing is visible; mean over rows, query heads, "
                          "layers",
                          "metrics.md 1.6 M3", NULL},
    [KV_M_GAP_CLOSED] = {"gap_closed", "share", "higher",
                         "(policy - base) / (oracle - base) of recall_contested; base = streaming, oracle = oracle, of "
                         "the policy's granularity, protection and page, each with the policy's mean slots in every "
                         "layer and head; undefined where oracle - base < 0.01",
                         "design.md 4, metrics.md 1.6 M2", NULL},
    [KV_M_EVIDENCE_KEPT] = {"evidence_kept", "share", "higher",
                            "share of the evidence tokens that a head's kept set holds; mean over rows, query heads, "
                            "layers",
                            "KVDiagnosis (arXiv 2608.09412) ERR_slot", NULL},
    [KV_M_EVIDENCE_SPAN_HALF] =
        {"evidence_span_half", "share", "higher",
         "share of the evidence spans of which a head's kept set holds at least half; mean over "
         "rows, query heads, layers",
         "KVDiagnosis (arXiv 2608.09412) ECov_slot(0.5)", NULL},
    [KV_M_EVIDENCE_LOST] = {"evidence_lost_everywhere", "share", "lower",
                            "share of the evidence tokens that no head keeps: of the layer, of all layers together; "
                            "mean over rows",
                            "GER, arXiv 2603.01426", NULL},
    [KV_M_BREADTH] = {"breadth", "share", "none",
                      "distinct prompt positions that some head of the layer holds / slots of the layer (Hkv C where "
                      "all heads hold C); over layers: positions that any layer holds / all slots. Its inverse is the "
                      "mean number of heads that hold a kept position",
                      "metrics.md 1.6 M8; K-VEC, arXiv 2606.29563", NULL},
    [KV_M_OUTPUT_L1] = {"output_l1", "L1 norm", "lower", "||y - y_hat||_1; mean over rows, layers",
                        "what the bounds below bound", BOUNDS_COST},
    [KV_M_BOUND_ADA] = {"bound_ada", "L1 norm", "none",
                        "2 C sum_h (1 - R_h), C = largest ||v_i W_O[h]||_1 of the layer over heads and visible tokens; "
                        "mean over rows, layers",
                        "Ada-KV (arXiv 2407.11550) Theorem 3.1", BOUNDS_COST},
    [KV_M_BOUND_CRITICAL] = {"bound_critical", "L1 norm", "none",
                             "sum_h theta_h, theta = sum_i p_i n_i - (2 - 1/R) sum_S p_i n_i, n_i = ||v_i W_O[h]||_1; "
                             "mean over rows, layers",
                             "CriticalKV (arXiv 2502.03805)", BOUNDS_COST},
    [KV_M_BOUND_LAVA] =
        {"bound_lava", "L1 norm", "none",
         "2 ||W_O^T||_1 sum_h (1 - R_h) V_h, V_h = largest ||v_i||_1 of the head's visible tokens; mean "
         "over rows, layers",
         "LAVa (arXiv 2509.09754) Theorem 1", BOUNDS_COST},
    [KV_M_BOUND_RATIO] = {"bound_ratio", "ratio", "lower",
                          "bound_ada / output_l1, each summed over the rows, per layer; mean over layers",
                          "metrics.md 1.6 M9: how loose the bound is, 1 = exact", BOUNDS_COST},
    [KV_M_BOUND_RATIO_CRITICAL] = {"bound_ratio_critical", "ratio", "lower",
                                   "bound_critical / output_l1, as bound_ratio", "metrics.md 1.6 M9", BOUNDS_COST},
    [KV_M_BOUND_RATIO_LAVA] = {"bound_ratio_lava", "ratio", "lower", "bound_lava / output_l1, as bound_ratio",
                               "metrics.md 1.6 M9", BOUNDS_COST},
};

kv_metric_set kv_metric_default(void)
{
    kv_metric_set s = 0;
    for (int m = 0; m < KV_M_COUNT; m++)
        if (!kv_metric_defs[m].asked) s |= KV_M_BIT(m);
    return s;
}

kv_status kv_metric_parse(const char *list, kv_metric_set possible, kv_metric_set *out, kv_error *err)
{
    const char *names[KV_M_COUNT + 2];
    for (int m = 0; m < KV_M_COUNT; m++) names[m] = kv_metric_defs[m].name;
    names[KV_M_COUNT] = "default", names[KV_M_COUNT + 1] = "all";
    *out = list ? 0 : kv_metric_default() & possible;
    for (const char *p = list; p && *p;) {
        size_t n = strcspn(p, ",");
        int m = 0;
        while (m < KV_M_COUNT + 2 && (strlen(names[m]) != n || memcmp(names[m], p, n))) m++;
        if (m == KV_M_COUNT + 2) {
            char bad[64];
            snprintf(bad, sizeof bad, "%.*s", (int)(n < 60 ? n : 60), p);
            const char *near = kv_nearest(bad, names, KV_M_COUNT + 2);
            return kv_fail(err, KV_EMISUSE, "--metrics: unknown metric '%s'%s%s%s; `kv-sim metrics` lists them", bad,
                           near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "");
        }
        if (m < KV_M_COUNT && !(possible >> m & 1))
            return kv_fail(err, KV_EMISUSE, "--metrics: '%s' and the like need %s--model MODEL", names[m],
                           KV_M_GENERATED >> m & 1 ? "--generate and " : "");
        *out |= m < KV_M_COUNT ? KV_M_BIT(m) : possible & (m == KV_M_COUNT ? kv_metric_default() : KV_M_ALL);
        p += n + (p[n] == ',');
    }
    return KV_OK;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* A quantile over heads is one of this metric's values by head. */
static kv_metric_id of_what(kv_metric_id m)
{
    return m == KV_M_RECALL_P10 ? KV_M_RECALL : m == KV_M_RECALL_PROMPT_P10 ? KV_M_RECALL_PROMPT : m;
}

/* Value of a head and how many samples it has. */
static double of_head(kv_metric_id m, const kv_point_sums *in, size_t at, uint32_t *n)
{
    const kv_head_sums *s = in->head + at;
    *n = s->n;
    switch (m) {
    case KV_M_RECALL: return s->recall / s->n;
    case KV_M_RECALL_CONTESTED: /* numerator and denominator are two sums: 1 exactly where nothing was dropped, never
                                   above */
        if (!(s->contested_all > 0)) return NAN;
        return s->n_whole == s->n ? 1 : fmin(s->contested_kept / s->contested_all, 1);
    case KV_M_NATS_LOST: return s->nats / s->n;
    case KV_M_RECALL_MIN: return s->recall_min;
    case KV_M_TOTAL_VARIATION: return s->total_variation / s->n;
    case KV_M_HEAD_ERROR: return s->head_error / s->n;
    case KV_M_HEAD_COSINE: return s->cosine / s->n;
    case KV_M_VALUE_DISTANCE: return *n = s->n_distance, *n ? s->value_distance / *n : NAN;
    case KV_M_RECALL_PROMPT: return *n = s->n_prompt, *n ? s->recall_prompt / *n : NAN;
    case KV_M_NATS_LOST_PROMPT: return *n = s->n_prompt, *n ? s->nats_prompt / *n : NAN;
    case KV_M_RECALL_PROMPT_MIN: return *n = s->n_prompt, *n ? s->prompt_min : NAN;
    case KV_M_EVIDENCE_KEPT: return in->evidence_kept[at];
    case KV_M_EVIDENCE_SPAN_HALF: return in->span_half[at];
    default: return NAN;
    }
}

/* Metrics that have a value by layer and none by head. */
static double of_layer(kv_metric_id m, const kv_point_sums *in, uint32_t l, uint32_t *n)
{
    const kv_bound_sums *b = in->bound ? in->bound + l : NULL;
    *n = in->n_row;
    switch (m) {
    case KV_M_LAYER_ERROR: return in->layer_error[l] / in->n_row;
    case KV_M_AMBIGUOUS_SHARE: return *n = 1, in->tie[l].kept ? (double)in->tie[l].tied / (double)in->tie[l].kept : NAN;
    case KV_M_EVIDENCE_LOST: return in->cover[l].lost;
    case KV_M_BREADTH: return in->cover[l].slots ? (double)in->cover[l].distinct / (double)in->cover[l].slots : NAN;
    case KV_M_OUTPUT_L1: return b->actual / in->n_row;
    case KV_M_BOUND_ADA: return b->ada / in->n_row;
    case KV_M_BOUND_CRITICAL: return b->critical / in->n_row;
    case KV_M_BOUND_LAVA: return b->lava / in->n_row;
    case KV_M_BOUND_RATIO: return b->actual > 0 ? b->ada / b->actual : NAN;
    case KV_M_BOUND_RATIO_CRITICAL: return b->actual > 0 ? b->critical / b->actual : NAN;
    case KV_M_BOUND_RATIO_LAVA: return b->actual > 0 ? b->lava / b->actual : NAN;
    default: return NAN;
    }
}

static bool by_layer_only(kv_metric_id m)
{
    return m == KV_M_LAYER_ERROR || m == KV_M_AMBIGUOUS_SHARE || m == KV_M_EVIDENCE_LOST || m == KV_M_BREADTH ||
           (KV_M_BOUNDS >> m & 1);
}

static bool measured(kv_metric_id m, const kv_point_sums *in)
{
    if (m == KV_M_LAYER_ERROR) return in->layer_error != NULL;
    if (m == KV_M_AMBIGUOUS_SHARE) return in->tie != NULL;
    if (KV_M_CLOSED >> m & 1) return false; /* kv_closed_values writes them */
    if (m == KV_M_GAP_CLOSED) return in->gap != NULL;
    if (m == KV_M_BREADTH) return in->cover != NULL;
    if (KV_M_EVIDENCE >> m & 1) return in->evidence_kept != NULL;
    return KV_M_BOUNDS >> m & 1 ? in->bound != NULL : in->head != NULL;
}

/* Mean of the defined values, or the smallest for the minima. */
static double reduce(kv_metric_id m, const double *v, size_t n, uint32_t *used)
{
    double sum = 0, min = INFINITY;
    *used = 0;
    for (size_t i = 0; i < n; i++)
        if (!isnan(v[i])) {
            sum += v[i];
            if (v[i] < min) min = v[i];
            ++*used;
        }
    if (!*used) return NAN;
    return m == KV_M_RECALL_MIN || m == KV_M_RECALL_PROMPT_MIN ? min : sum / *used;
}

/* numpy.quantile's linear interpolation, over the defined values. */
static double quantile(double *v, size_t n_all, double q, uint32_t *used)
{
    size_t n = 0;
    for (size_t i = 0; i < n_all; i++)
        if (!isnan(v[i])) v[n++] = v[i];
    *used = (uint32_t)n;
    if (!n) return NAN;
    qsort(v, n, sizeof *v, ascending);
    double at = q * (double)(n - 1);
    size_t i = (size_t)at;
    return i + 1 < n ? v[i] + (at - (double)i) * (v[i + 1] - v[i]) : v[n - 1];
}

/* Over layers. by_head is spoilt where the metric is a quantile. */
static double of_model(kv_metric_id m, const kv_point_sums *in, const double *by_layer, double *by_head, uint32_t *used)
{
    double square = 0;
    kv_tie_count sum = {0};
    *used = in->n_layer;
    switch (m) {
    case KV_M_RECALL_P10:
    case KV_M_RECALL_PROMPT_P10: return quantile(by_head, (size_t)in->n_layer * in->n_q_head, 0.1, used);
    case KV_M_LAYER_ERROR:
        for (uint32_t l = 0; l < in->n_layer; l++) square += by_layer[l] * by_layer[l];
        return sqrt(square);
    case KV_M_AMBIGUOUS_SHARE:
        for (uint32_t l = 0; l < in->n_layer; l++) sum.tied += in->tie[l].tied, sum.kept += in->tie[l].kept;
        return sum.kept ? (double)sum.tied / (double)sum.kept : NAN;
    case KV_M_EVIDENCE_LOST: return in->lost;
    case KV_M_BREADTH: return in->breadth;
    case KV_M_GAP_CLOSED: return *used = 1, *in->gap;
    default: return reduce(m, by_layer, in->n_layer, used);
    }
}

/* The metrics that have a value at every row, and what it is made of. */
static int step_kind(kv_metric_id m)
{
    switch (m) {
    case KV_M_RECALL: return KV_STEP_RECALL;
    case KV_M_RECALL_CONTESTED: return KV_STEP_CONTESTED;
    case KV_M_RECALL_PROMPT: return KV_STEP_PROMPT;
    case KV_M_NATS_LOST: return KV_STEP_NATS;
    case KV_M_NATS_LOST_PROMPT: return KV_STEP_NATS_PROMPT;
    case KV_M_RECALL_MIN: return KV_STEP_MIN;
    case KV_M_RECALL_PROMPT_MIN: return KV_STEP_PROMPT_MIN;
    case KV_M_HEAD_ERROR: return KV_STEP_HEAD_ERROR;
    case KV_M_HEAD_COSINE: return KV_STEP_COSINE;
    case KV_M_VALUE_DISTANCE: return KV_STEP_DISTANCE;
    case KV_M_TOTAL_VARIATION: return KV_STEP_VARIATION;
    case KV_M_LAYER_ERROR: return KV_STEP_SQUARE;
    default: return -1;
    }
}

static double of_step(int kind, const kv_step_sums *s)
{
    if (!s->n[kind]) return NAN;
    if (kind == KV_STEP_SQUARE) return sqrt(s->v[kind]);
    return kind < KV_STEP_MEANS ? s->v[kind] / s->n[kind] : s->v[kind];
}

size_t kv_metric_room(uint32_t n_layer, uint32_t n_q_head, uint32_t n_row, int detail)
{
    return KV_M_COUNT * (1 + (size_t)n_layer * (1 + n_q_head) + (detail >= KV_DETAIL_STEP ? n_row : 0));
}

size_t kv_metric_values(const kv_point_sums *in, kv_metric_set wanted, int detail, kv_value *out)
{
    size_t n = 0, n_head = (size_t)in->n_layer * in->n_q_head;
    uint32_t used, *n_of_head = calloc(n_head, sizeof *n_of_head);
    double *by_layer = calloc(in->n_layer + n_head, sizeof *by_layer), *by_head = by_layer + in->n_layer;
    if (!by_layer || !n_of_head) return free(by_layer), free(n_of_head), SIZE_MAX;
    for (kv_metric_id m = 0; m < KV_M_COUNT; m++) {
        bool quantile_of = of_what(m) != m, single = quantile_of || m == KV_M_GAP_CLOSED;
        if (!(wanted >> m & 1) || !measured(m, in)) continue;
        size_t all_at = n++; /* the aggregate stands first */
        for (uint32_t l = 0; l < in->n_layer; l++) {
            size_t at = (size_t)l * in->n_q_head;
            if (by_layer_only(m)) {
                by_layer[l] = of_layer(m, in, l, &used);
            } else if (m != KV_M_GAP_CLOSED) {
                for (uint32_t h = 0; h < in->n_q_head; h++)
                    by_head[at + h] = of_head(of_what(m), in, at + h, &n_of_head[at + h]);
                by_layer[l] = reduce(m, by_head + at, in->n_q_head, &used);
            }
            if (detail >= KV_DETAIL_LAYER && !single)
                out[n++] = (kv_value){m, (int32_t)in->number[l], -1, -1, by_layer[l], used};
            for (uint32_t h = 0; h < in->n_q_head && detail >= KV_DETAIL_HEAD && !single && !by_layer_only(m); h++)
                out[n++] = (kv_value){m, (int32_t)in->number[l], (int32_t)h, -1, by_head[at + h], n_of_head[at + h]};
        }
        double all = of_model(m, in, by_layer, by_head, &used);
        out[all_at] = (kv_value){m, -1, -1, -1, all, used};
        int kind = step_kind(m);
        for (uint32_t r = 0; r < in->n_row && detail >= KV_DETAIL_STEP && in->step && kind >= 0; r++)
            out[n++] = (kv_value){m, -1, -1, (int32_t)r, of_step(kind, &in->step[r]), in->step[r].n[kind]};
    }
    free(by_layer), free(n_of_head);
    return n;
}
