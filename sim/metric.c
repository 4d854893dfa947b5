/* metric.c - from sums to values, with the reductions of design.md section 4: rows, then query heads, then layers. */
#include "sim/metric.h"

#include <math.h>
#include <stdlib.h>

const kv_metric_def kv_metric_defs[KV_M_COUNT] = {
    {"recall", "share", "higher", "R; mean over rows, query heads, layers", "design.md 4; CateKV, SampleAttention"},
    {"recall_contested", "share", "higher",
     "sum over rows of kept mass outside F / of mass outside F, per query head, then means; F = first 4 and last 32 "
     "prompt tokens and "
     "all tokens after the cut",
     "metrics.md 1.5"},
    {"recall_prompt", "share", "higher",
     "kept prompt mass / prompt mass of the row; mean over rows, query heads, layers", "design.md 4"},
    {"nats_lost", "nats", "lower", "-ln R per row, capped at 20; mean over rows, query heads, layers",
     "metrics.md 1.2: KL of the kept "
     "distribution from the full one"},
    {"recall_p10", "share", "higher", "0.1 quantile over (layer, query head) of the mean recall", "design.md 4"},
    {"recall_min", "share", "higher", "smallest R over rows, query heads, layers", "CRA, arXiv 2406.15486"},
    {"head_error", "relative to ||o||", "lower", "||o - o_hat|| / ||o||; mean over rows, query heads, layers",
     "metrics.md 1.6 M3"},
    {"value_distance", "relative to ||o||", "none",
     "||mu_E - mu_S|| / ||o|| = head_error / (1 - R), over rows that lost mass", "metrics.md 1.4"},
    {"layer_error", "relative to ||x||", "lower",
     "||sum_h (o_h - o_hat_h) W_O[h]|| / ||x||, x the residual stream entering the block (imported traces: the layer's "
     "own output); mean over "
     "rows; over layers the root of the sum of squares",
     "metrics.md 1.6 M4"},
    {"ambiguous_share", "share", "none",
     "kept slots whose score equals the first dropped one's / kept slots; over layers: of all slots together",
     "metrics.md 1.5: which of them stay is decided by the tie rule alone"},
    {"total_variation", "share", "lower",
     "1/2 sum |p - p_hat| over all positions; mean over rows, query heads, layers. Stored where positions are cache "
     "slots (reindex=1) or keys are projected (select=mixdim): "
     "everywhere else it is 1 - recall",
     "design.md 4, metrics.md 1.2"},
    {"delta_nll", "nats per token", "lower",
     "nll with the evicted cache - nll with the full one, of the recorded tokens; mean over the predictions of tokens "
     "P..N-1; needs --model",
     "metrics.md 1.6 M5"},
    {"kl", "nats per token", "lower", "KL(full || evicted) of the next token; mean over predictions; needs --model",
     "metrics.md 1.6 M5"},
    {"top1_agree", "share", "higher", "the most likely token is the full cache's; mean over predictions; needs --model",
     "metrics.md 1.6 M5"},
    {"top5_overlap", "share", "higher",
     "share of the five most likely tokens that are the full cache's; mean over predictions; needs --model",
     "metrics.md 1.6 M5"},
    {"closed_head_error", "relative to ||o||", "lower",
     "||o - o_hat|| / ||o|| with o_hat of the evicted model, errors of earlier layers included (layer 0: head_error); "
     "mean over rows, query heads, layers; needs --model",
     "metrics.md 2.1"},
    {"stream_error", "relative to ||x||", "lower",
     "||x - x_hat|| / ||x|| of the residual stream entering the block; mean over rows, layers; needs --model",
     "metrics.md 2.1"},
    {"nll_noise", "nats per token", "none",
     "|nll of the full cache here - nll at capture|: the same model, its rows cut another way; mean over predictions. "
     "No delta_nll inside it is a loss; needs --model",
     "metrics.md 6.3 (9)"},
    {"answer_found", "share", "higher",
     "share of what the prompt's answer asks for that 64 greedy tokens under eviction hold: the strings of `answers`, "
     "else the numbers of four digits and more in `answer`, else all of it; needs --model --generate",
     "metrics.md 1.6 M6"},
    {"first_divergence", "tokens", "higher",
     "greedy tokens before the first that differs from the full cache's; 64 = none of 64; needs --model --generate",
     "metrics.md 1.6 M6"},
};

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double of_head(kv_metric_id m, const kv_head_sums *s)
{
    switch (m) {
    case KV_M_RECALL: return s->recall / s->n;
    case KV_M_RECALL_CONTESTED: /* numerator and denominator are two sums: 1 exactly where nothing was dropped, never
                                   above */
        if (!(s->contested_all > 0)) return NAN;
        return s->n_whole == s->n ? 1 : fmin(s->contested_kept / s->contested_all, 1);
    case KV_M_RECALL_PROMPT: return s->n_prompt ? s->recall_prompt / s->n_prompt : NAN;
    case KV_M_NATS_LOST: return s->nats / s->n;
    case KV_M_RECALL_MIN: return s->recall_min;
    case KV_M_TOTAL_VARIATION: return s->total_variation / s->n;
    case KV_M_HEAD_ERROR: return s->head_error / s->n;
    case KV_M_VALUE_DISTANCE: return s->n_distance ? s->value_distance / s->n_distance : NAN;
    default: return NAN;
    }
}

/* Mean of the defined values, or the smallest for recall_min. */
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
    return m == KV_M_RECALL_MIN ? min : sum / *used;
}

/* numpy.quantile's linear interpolation. */
static double quantile(double *v, size_t n, double q)
{
    qsort(v, n, sizeof *v, ascending);
    double at = q * (double)(n - 1);
    size_t i = (size_t)at;
    return i + 1 < n ? v[i] + (at - (double)i) * (v[i + 1] - v[i]) : v[n - 1];
}

size_t kv_metric_room(uint32_t n_layer, uint32_t n_q_head)
{
    return KV_M_COUNT * (1 + (size_t)n_layer * (1 + n_q_head));
}

size_t kv_metric_values(const kv_head_sums *head, const double *layer_error, const kv_tie_count *tie,
                        const uint32_t *number, uint32_t n_layer, uint32_t n_q_head, uint32_t n_row, unsigned wanted,
                        int detail, kv_value *out)
{
    size_t n = 0;
    double *by_layer = calloc(n_layer + (size_t)n_layer * n_q_head, sizeof *by_layer), *by_head = by_layer + n_layer;
    if (!by_layer) return 0;
    for (int m = 0; m < KV_M_COUNT; m++) {
        uint32_t used, all_used = 0;
        if (!(wanted >> m & 1) || (m == KV_M_LAYER_ERROR && !layer_error)) continue;
        size_t all_at = n++; /* the aggregate stands first */
        if (m == KV_M_AMBIGUOUS_SHARE) {
            kv_tie_count sum = {0};
            for (uint32_t l = 0; l < n_layer; l++) {
                sum.tied += tie[l].tied, sum.kept += tie[l].kept;
                if (detail >= KV_DETAIL_LAYER)
                    out[n++] = (kv_value){m, (int32_t)number[l], -1,
                                          tie[l].kept ? (double)tie[l].tied / (double)tie[l].kept : NAN, 1};
            }
            out[all_at] = (kv_value){m, -1, -1, sum.kept ? (double)sum.tied / (double)sum.kept : NAN, n_layer};
            continue;
        }
        double square = 0;
        for (uint32_t l = 0; l < n_layer; l++) {
            for (uint32_t h = 0; h < n_q_head; h++)
                by_head[l * n_q_head + h] =
                    of_head(m == KV_M_RECALL_P10 ? KV_M_RECALL : (kv_metric_id)m, &head[l * n_q_head + h]);
            if (m == KV_M_RECALL_P10) continue;
            if (m == KV_M_LAYER_ERROR)
                by_layer[l] = layer_error[l] / n_row, square += by_layer[l] * by_layer[l], used = n_row;
            else
                by_layer[l] = reduce((kv_metric_id)m, by_head + l * n_q_head, n_q_head, &used);
            if (detail >= KV_DETAIL_LAYER) out[n++] = (kv_value){m, (int32_t)number[l], -1, by_layer[l], used};
            if (detail >= KV_DETAIL_HEAD && m != KV_M_LAYER_ERROR)
                for (uint32_t h = 0; h < n_q_head; h++) {
                    const kv_head_sums *s = &head[l * n_q_head + h];
                    out[n++] = (kv_value){m, (int32_t)number[l], (int32_t)h, by_head[l * n_q_head + h],
                                          m == KV_M_VALUE_DISTANCE  ? s->n_distance
                                          : m == KV_M_RECALL_PROMPT ? s->n_prompt
                                                                    : s->n};
                }
        }
        double all = m == KV_M_RECALL_P10    ? quantile(by_head, (size_t)n_layer * n_q_head, 0.1)
                     : m == KV_M_LAYER_ERROR ? sqrt(square)
                                             : reduce((kv_metric_id)m, by_layer, n_layer, &all_used);
        if (m == KV_M_RECALL_P10) all_used = n_layer * n_q_head;
        if (m == KV_M_LAYER_ERROR) all_used = n_layer;
        out[all_at] = (kv_value){m, -1, -1, all, all_used};
    }
    free(by_layer);
    return n;
}
