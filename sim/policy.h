/* policy.h - a policy is data: one row that fills the slots below; the engine does the rest.
 *
 *   score     a number for every (layer, query head or KV head, position) of the prompt sim/scorers/score_NAME.c reduce
 * rows -> query heads of a unit -> pooling, in the order the row says                 sim/reduce.c protect   positions
 * that are kept first: the policy's window and sinks, plus --protect        sim/ranking.c layers    how many slots each
 * layer gets                                                      sim/layers.c heads     how a layer's slots are split
 * over its units                                        sim/heads.c
 *
 * A unit is what has a kept set of its own: a query head, a KV head, or a layer (one set for all heads). The ranking of
 * a unit lists all prompt positions: protected ones first (newest first), then by (score descending, position
 * ascending). A kept set is a prefix of it, so one ranking serves every policy that shares it and every budget. */
#ifndef KV_POLICY_H
#define KV_POLICY_H

#include "kernels/kernels.h" /* kv_row_reduce, kv_group_reduce, kv_pooling */
#include "traces/base.h"

typedef enum { KV_GRAN_QUERY_HEAD, KV_GRAN_KV_HEAD, KV_GRAN_LAYER } kv_granularity;
/* When nothing is evicted: L <= C (NONE), L <= C + window (WINDOW: CAKE), L < C (BEYOND: Ada-KV's code, whose truncated
 * floor may drop one token per head at L = C). */
typedef enum { KV_GUARD_NONE, KV_GUARD_WINDOW, KV_GUARD_BEYOND } kv_guard;
typedef enum {
    KV_LAYERS_UNIFORM,
    KV_LAYERS_PYRAMID_KVF,     /* uniform below L < 2B (policies.md 3.3, KVCache-Factory) */
    KV_LAYERS_PYRAMID_FFY0,    /* the same progression, a layer is left whole when it would hold everything */
    KV_LAYERS_PYRAMID_KVPRESS, /* real-valued progression, rounded; the count includes the window */
    KV_LAYERS_CAKE,            /* preference shares, policies.md 4.3-4.5 */
    KV_LAYERS_POOL,            /* one flat top-k over all layers, units and positions */
    KV_LAYERS_LAVA,            /* shares by the entropy of the layer's scores, largest remainder (LAVa's paper) */
    KV_LAYERS_LAVA_CODE,       /* the repository's stages and frozen floor, heads included (policies.md section 6) */
    KV_LAYERS_SQUEEZE          /* layers that attention changes least get less (SqueezeAttention, policies.md 8.3) */
} kv_layer_alloc;
typedef enum {
    KV_HEADS_UNIFORM,
    KV_HEADS_ADA,       /* round(n_h (1-alpha) + int(alpha B)), policies.md 5.2 */
    KV_HEADS_POOL,      /* one flat top-k over the units of a layer */
    KV_HEADS_SAFEGUARD, /* int(C alpha) of every unit are immune, the rest one flat top-k with protected entries on top
                           (kvpress) */
    KV_HEADS_TABLE,     /* by an importance table (HeadKV, policies.md section 7) */
    KV_HEADS_DUO /* the best heads of the model keep everything, the others sinks and recent tokens (DuoAttention) */
} kv_head_alloc;
/* WO_SHARE: the projected norm divided by its sum over the units of the layer at the position (DefensiveKV). LOO: ||o -
 * v|| / (1 - a), which turns a score of mean attention a into the error of evicting just that position (CAOTE). */
typedef enum {
    KV_VALUE_NONE,
    KV_VALUE_NORM,
    KV_VALUE_HEAD_MAX_L1,
    KV_VALUE_WO_L1,
    KV_VALUE_WO_SHARE,
    KV_VALUE_LOO
} kv_value_term;
typedef enum {
    KV_WEIGHT_NONE,
    KV_WEIGHT_STREAM
} kv_layer_weight; /* STREAM: mean projected value norm / norm of the residual stream */
typedef enum { KV_SHARE_CODE, KV_SHARE_PAPER } kv_window_share;
typedef enum {
    KV_SELECT_PREFIX,    /* the first entries of the ranking */
    KV_SELECT_CHUNKS,    /* whole chunks by mean score, shared by the layer (ChunkKV) */
    KV_SELECT_TWO_STAGE, /* a share by the score, the rest by score times projected value norm (CriticalKV) */
    KV_SELECT_BLOCKS, /* the prompt in blocks, re-scored by key diversity after each (kvpress BlockPress + KeyDiff) */
    KV_SELECT_MASS,  /* what carries most of the window's mean attention first, the rest one flat top-k (DefensiveKV) */
    KV_SELECT_SPANS, /* the best spans of the layer first, each in the heads that score it most, the rest one flat top-k
                      */
    KV_SELECT_MIXDIM /* every token some dimensions of its key and value, by losses (MixedDimKV, mixdim.h) */
} kv_select;
typedef enum {
    KV_DECODE_KEEP,
    KV_DECODE_TOVA,
    KV_DECODE_STREAMING,
    KV_DECODE_H2O,
    KV_DECODE_CAKE,
    KV_DECODE_H2O_MASK,
    KV_DECODE_RKV,
    KV_DECODE_VATP,
    KV_DECODE_BELADY,
    KV_DECODE_MATCH,
    KV_DECODE_STEPS
} kv_decode;
/* KV_TAU_NONE: tau1 and tau2 as given. */
typedef enum {
    KV_TAU_NONE,
    KV_TAU_LLAMA31_8B,
    KV_TAU_LLAMA2_7B,
    KV_TAU_LLAMA2_13B,
    KV_TAU_MISTRAL_7B,
    KV_TAU_QWEN25_7B
} kv_tau_table;
/* Parts of a policy that the oracle takes over (bits of kv_spec.oracle; sim/oracle.h). */
enum {
    KV_ORACLE_RANK = 1,   /* the order in each unit: future mass, at the policy's own counts */
    KV_ORACLE_HEADS = 2,  /* how the slots of a layer are split over its units */
    KV_ORACLE_LAYERS = 4, /* how the model's slots are split over layers */
    KV_ORACLE_STEPS = 8,  /* every measured row has its own best set of the same size */
    KV_ORACLE_WINDOW = 16 /* the policy's scorer sees rows of the future instead of the window's, at its own counts */
};
typedef enum { KV_TARGET_RECALL, KV_TARGET_CONTESTED, KV_TARGET_COUNT } kv_target; /* what an oracle maximises */
typedef enum { KV_SCORES_RENORM, KV_SCORES_RAW } kv_scores;
#define KV_RECENT_HALF UINT32_MAX /* recent = C/2 */

typedef struct kv_policy kv_policy;
struct kv_plug; /* sim/plugin.h */

/* A policy with every slot filled. Owned strings are freed by kv_spec_free. */
typedef struct {
    const kv_policy *row;
    uint32_t scorer; /* index into kv_scorers */
    uint32_t granularity, row_reduce, group_reduce, pooling, pool_first, guard, layers, heads;
    uint32_t layer_weight, window_share, cover;
    uint32_t window; /* observation rows of window scores, and the recent positions protected inside the budget */
    uint32_t sinks;  /* first positions that score above everything (fixed-pattern scores) */
    uint32_t kernel;
    uint32_t normalize, cascading;
    uint32_t value, select, decode, scores;
    uint32_t recent;                  /* newest entries a decode rule protects */
    uint32_t every;                   /* a decode rule evicts every so many rows */
    uint32_t bin;                     /* what a decode rule drops waits, visible, until so many can leave together */
    uint32_t prompt_cut;              /* 1: the decode rule cuts the prompt itself, instead of score and allocation */
    uint32_t reindex;                 /* 1: positions are cache slots (StreamingLLM) */
    double heavy_ratio, recent_ratio; /* of H2O's masking variant, shares of the prompt */
    uint32_t keep_all;                /* full: every count is L */
    uint32_t per_row;                 /* column sums divided by the number of rows that see the column */
    uint32_t protect_sink, protect_recent; /* from --protect */
    char *protect_segment;                 /* kind or title of a prompt segment, "evidence", "question", or NULL */
    uint32_t page;                         /* whole pages of so many tokens are kept or dropped */
    uint32_t tau_table;                    /* CAKE: tau by model and budget, as its scripts have it (policies.md 4.7) */
    double gamma, alpha, beta, tau1, tau2;
    /* read by single scorers and selectors, which say so in their `params` */
    uint32_t n_future, use_covariance, use_vnorm, lag_size, chunk_size, local_window, leverage_type, retain_direction,
        chunk_length, block_size;
    double epsilon, tau, mix_lambda, first_stage_ratio, squeeze;
    char *mean_file, *cov_file, *importance, *filters, *pattern, *cosine;
    uint32_t lookahead;       /* score=future: measured rows it sees, 0 = all */
    uint32_t oracle;          /* KV_ORACLE_* */
    uint32_t target;          /* kv_target */
    uint32_t observe;         /* 1: the scorer sees rows of the future (an oracle) */
    uint64_t seed;            /* of `random` */
    uint64_t skip_layers[16]; /* bitmap over layer indices that are never cut */
    char *file;               /* mask: the NumPy file */
    struct kv_plug *plugin;   /* plugin: the loaded file, its parameters; owned */
    char *canonical;          /* "snapkv:granularity=kv_head,...": every parameter that matters, sorted by name */
    char *unread;             /* parameters given that no slot of this policy reads, joined by ", ", or NULL */
    char *ranking_key;        /* the part of it that determines the ranking: equal keys share one ranking */
} kv_spec;

/* One row of the table. `slots` is a parameter string in the syntax of the command line; it sets every slot that
 * differs from the defaults in kv_slot_table. */
struct kv_policy {
    const char *name;
    const char *summary;  /* one line */
    const char *paper;    /* title or arXiv number, or "baseline" */
    const char *source;   /* repository and file whose arithmetic this is, or "definition" */
    const char *verified; /* how it was checked; appears beside every result */
    const char *nested;   /* "yes", "no: why" - does a larger budget keep a superset? */
    const char *slots;
};
extern const kv_policy kv_policies[]; /* ends with name == NULL */

/* Parse "-p" arguments: commas separate policies, except that an item with '=' before any ':' continues the last one;
 * a value with '|' expands to a grid. mask:FILE and plugin:FILE[:key=value,...] take the whole argument, and so does a
 * plug-in's canonical form, plugin.NAME:file=FILE,... Appends to *out (realloc'd). KV_EMISUSE lists what is known,
 * nearest first. */
kv_status kv_spec_parse(const char *arg, kv_spec **out, size_t *n, kv_error *err);
/* Change one parameter by name (used by --granularity, --seed, --protect); call kv_spec_seal afterwards. */
kv_status kv_spec_set(kv_spec *s, const char *name, const char *value, kv_error *err);
/* The scorer looks at rows before the cut and can be shown rows of the future instead (observe=). */
bool kv_spec_observes(const kv_spec *s);
/* Check that slots fit together and (re)build the canonical strings. */
kv_status kv_spec_seal(kv_spec *s, kv_error *err);
void kv_spec_free(kv_spec *s);
/* Name, kind, choices and meaning of every parameter, for `kv-sim policies NAME`. */
typedef struct {
    const char *name, *help;
    const char *choices; /* "sum|mean|..." or NULL for numbers */
} kv_slot_help;
size_t kv_slot_count(void);
kv_slot_help kv_slot_describe(size_t i);
/* Value of parameter i in s, as text for the command line, or NULL where it does not matter for this spec. free(). */
char *kv_slot_value(const kv_spec *s, size_t i);
/* Add the parameters of `params` (key=value,... as kv_spec_set took them) that matter to no slot of s to s->unread;
 * `was` = s before they were set: a value that changed nothing is not worth a word. */
kv_status kv_spec_note_unread(kv_spec *s, const kv_spec *was, const char *params, kv_error *err);

/* ------------------------------------------------------------------------------------------------ budgets */
#define KV_BUDGET_TOKENS_MAX (1u << 30)
typedef enum { KV_BUDGET_TOKENS, KV_BUDGET_PERCENT, KV_BUDGET_BYTES, KV_BUDGET_RATIO } kv_budget_kind;
typedef struct {
    kv_budget_kind kind;
    double value;
    char text[32]; /* as given, for labels */
} kv_budget;

/* Budget resolved for one trace. */
typedef struct {
    uint32_t tokens; /* C, 0..L (capped at the tokens at the cut) */
    double real;     /* before truncation: L(1-r) for ratios, else C uncapped; kvpress's pyramid uses it */
    double share;    /* 1-r for ratios, else C / L */
    double frac;     /* C / L */
} kv_budget_resolved;

/* "512", "5%", "64MiB", "ratio=0.9", "auto" (16 values), comma-separated. Appends. */
kv_status kv_budget_parse(const char *arg, kv_budget **out, size_t *n, kv_error *err);
/* n_tokens at the cut, slot_bytes of one KV head's token (K and V), evicting layers and KV heads of the trace. */
kv_budget_resolved kv_budget_resolve(const kv_budget *b, uint32_t n_tokens, size_t slot_bytes, uint32_t n_layer,
                                     uint32_t n_kv_head);

#endif
