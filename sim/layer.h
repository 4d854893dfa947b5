/* layer.h - one layer of a trace as floats, loaded once and shared by every scorer and metric. */
#ifndef KV_LAYER_H
#define KV_LAYER_H

#include "traces/trace.h"

enum {
    KV_NEED_WINDOW = 1,  /* queries of the last rows before the cut */
    KV_NEED_COLSUM = 2,  /* column sums of the rows before the cut */
    KV_NEED_FUTURE = 4,  /* queries of the measured rows */
    KV_NEED_WO = 16,     /* the output projection */
    KV_NEED_QUERIES = 8, /* queries of all rows before the cut */
    KV_NEED_SHAPE = 32,  /* nothing but the layer's shape: kv_layer_shape will do */
};

/* What a replay of one trace is about; fixed before any layer is loaded. */
typedef struct {
    const kv_trace *trace;
    const kv_trace_info *info;
    uint32_t n_cut;            /* L: tokens at the cut; kept sets are over positions 0..L-1, later tokens stay */
    uint32_t n_prompt;         /* tokens before the first measured row */
    uint32_t row_first, n_row; /* measured rows */
    uint32_t n_token;          /* row_first + n_row, or L when there are no rows */
    uint32_t n_evict;          /* layers that evict (no sliding window) */
    uint32_t *evict;           /* [n_evict] their layer indices */
    size_t slot_bytes;         /* K and V of one token of one KV head in the trace's dtype */
    /* set by the caller, 0 from kv_scene_open */
    uint64_t mem_limit; /* bytes that ranking and replay may hold, or 0 = no limit */
    uint64_t wanted; /* metrics that will be measured, bit per kv_metric_id: a pass that does not fit is refused before
                        the one ahead of it begins */
    struct kv_gpu_pass *gpu; /* where layers are ranked and prefix points measured (gpu_pass.h); NULL = on the CPU */
    size_t n_asked; /* (policy, budget) points of the whole request, those of other shards and those that are stored
                       already among them: what decides how W_O is applied must be the same for all of them */
} kv_scene;

/* Position i counts for contested recall: outside F = the first 4 and last 32 prompt tokens and all tokens after the
 * cut (metrics.md 1.5). */
static inline bool kv_contested(const kv_scene *s, uint32_t i)
{
    return i >= 4 && i < s->n_cut && i + 32 < s->n_prompt;
}

/* cut "prompt" or "context"; decode_rows > 0 makes the last rows of a prompt-only trace the measured ones. */
kv_status kv_scene_open(const kv_trace *t, const char *cut, uint32_t decode_rows, kv_scene *s, kv_error *err);
void kv_scene_close(kv_scene *s);

typedef struct {
    const kv_scene *scene;
    uint32_t index, number; /* layer index in the trace, number in the model */
    uint32_t order;         /* position among the evicting layers */
    uint32_t n_q_head, n_kv_head, group, d, L;
    float scale, softcap;
    float *k, *v;        /* [n_kv_head][n_token][d] */
    float *q_row;        /* [n_q_head][n_row][d] measured rows, or NULL */
    uint32_t max_window; /* rows of q_win */
    float *q_win;        /* [n_q_head][max_window][d] rows L-max_window..L-1, or NULL */
    float *q_all;        /* [n_q_head][L][d] all rows before the cut, or NULL */
    float *wo;           /* [hidden][n_q_head*d], or NULL */
    float *post_norm;    /* [hidden][2] weight and bias of the norm behind W_O, loaded with it; NULL: there is none */
    float *colsum;       /* [n_q_head][L], or NULL */
    /* softmax rows of a window, computed once per window length and shared by the scorers of a layer */
    uint32_t probs_window;
    bool ahead, probs_ahead; /* set by the ranking pass: windows are rows of the future; what probs holds */
    float *probs;            /* [n_q_head][probs_window][L] */
    double *value_norm;      /* [n_kv_head][L] mean over a KV head's query heads of ||v W_O||_1, or NULL before it is
                                asked for */
    double *basis;           /* [2][n_kv_head][d][d] of keys and values (mixdim.h), or NULL before they are asked for */
} kv_layer;

#define KV_NEVER_EVICTS UINT32_MAX /* `order` of a layer with a sliding window */

/* A layer without its arrays. evict_index as in kv_layer_load. */
kv_layer kv_layer_shape(const kv_scene *s, uint32_t evict_index);
/* Load what the needs say. A layer belongs to one thread. */
kv_status kv_layer_load(const kv_scene *s, uint32_t evict_index, unsigned needs, uint32_t max_window, kv_layer *l,
                        kv_error *err);
/* The same by the layer's index in the trace, whether it evicts or not. */
kv_status kv_layer_load_at(const kv_scene *s, uint32_t index, unsigned needs, uint32_t max_window, kv_layer *l,
                           kv_error *err);
void kv_layer_free(kv_layer *l);
/* Attention rows of the last w positions before the cut, [n_q_head][w][L]; valid until others are asked for. With
 * l->ahead: w of the measured rows, spread evenly, with repeats when there are fewer. */
kv_status kv_layer_probs(kv_layer *l, uint32_t w, const float **p, kv_error *err);
/* value_norm, formed on the first call from values and W_O: 2 L n_q_head d hidden operations, by far the dearest number
 * of a layer (policies.md 8.1). */
kv_status kv_layer_value_norms(kv_layer *l, const double **norm, kv_error *err);

#endif
