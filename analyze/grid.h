/* grid.h - one metric as numbers: variant x budget x trace, and from that one number per prompt. What every paired
 * comparison starts from. */
#ifndef KV_GRID_H
#define KV_GRID_H

#include "analyze/query.h"

typedef struct {
    uint32_t runs;                           /* 0 = not there; several: seeds and the like, averaged */
    uint32_t defined;                        /* runs whose value is defined */
    int build;                               /* number of the build, -1 = several */
    int64_t rows;                            /* measured rows, -1 = several */
    double value, bytes, full_bytes, tokens; /* tokens = the budget in tokens per KV head and layer */
} kv_grid_cell;

/* Strings belong to `rows`. */
typedef struct {
    const char *policy, *spec, *granularity, *cut, *protect, *label;
    int64_t page;
    bool unverified;
} kv_grid_variant;
typedef struct {
    const char *label; /* "5%" */
    double frac;       /* mean share of the prompt */
} kv_grid_budget;
typedef struct {
    const char *name, *sha256;
    size_t prompt; /* index */
    int64_t tokens;
} kv_grid_trace;
typedef struct {
    const char *name; /* "category/prompt" */
    uint32_t family;
} kv_grid_prompt;

typedef struct {
    kv_sheet rows;
    const char *metric, *unit;
    int better; /* +1 higher, -1 lower, 0 neither */
    size_t n_variant, n_budget, n_trace, n_prompt, n_family, n_build;
    kv_grid_variant *variant; /* in the order of legends */
    kv_grid_budget *budget;   /* ascending */
    kv_grid_trace *trace;
    kv_grid_prompt *prompt;
    const char **family, **build;
    kv_grid_cell *cell; /* [variant][budget][trace] */
} kv_grid;

/* Values aggregated over layers, heads and rows, of s->metric and the rest of the selection (one model). KV_EMISSING
 * when there are none; KV_EFORMAT when the metric has two units (then they are not one metric). free in either case. */
kv_status kv_grid_load(kv_db *db, const kv_selection *s, kv_grid *out, kv_error *err);
void kv_grid_free(kv_grid *g);

static inline const kv_grid_cell *kv_grid_at(const kv_grid *g, size_t variant, size_t budget, size_t trace)
{
    return &g->cell[(variant * g->n_budget + budget) * g->n_trace + trace];
}

/* The variant a word of the command line means: its label, else its spec, else its policy's name when that has one
 * variant. KV_EMISSING lists what there is. */
kv_status kv_grid_find(const kv_grid *g, const char *word, size_t *variant, kv_error *err);
kv_status kv_grid_find_budget(const kv_grid *g, const char *label, size_t *budget, kv_error *err);

/* Two sides from the command line: words[1..] are policies, the last one is the baseline unless `baseline` names it; no
 * word but a baseline means every other policy except `full`. who[n_variant + words->n] gets variants. KV_EMISUSE when
 * a policy is named twice, or stands on both sides, or there is nothing to compare. */
kv_status kv_grid_sides(const kv_grid *g, const kv_list *words, const char *baseline, size_t *who, size_t *n,
                        size_t *against, kv_error *err);
/* Refuse results of several builds. */
kv_status kv_grid_one_build(const kv_grid *g, kv_error *err);

/* Numbers per prompt, in the order of g->prompt. */
typedef struct {
    size_t n;
    double *d, *a, *b; /* d = a - b for the prompts of prompt[] */
    uint32_t *family;
    size_t *prompt;
    size_t undefined; /* prompts left out because a value is undefined */
    double bytes_a, bytes_b;
} kv_pairs;
void kv_pairs_free(kv_pairs *p);

/* What may differ between two sides; everything else is refused. */
typedef struct {
    bool common;    /* take the traces (and budgets) both have instead of refusing */
    bool any_build; /* results of different builds */
} kv_allow;

/* Refuse a comparison that would not compare like with like: traces, measured rows, cut or builds that differ between
 * variants a and b at the n budgets of budget[]. KV_EFORMAT says which and what to do. */
kv_status kv_grid_comparable(const kv_grid *g, size_t a, size_t b, const size_t *budget, size_t n, kv_allow allow,
                             kv_error *err);
/* Differences at one budget. */
kv_status kv_grid_pairs(const kv_grid *g, size_t a, size_t b, size_t budget, kv_pairs *out, kv_error *err);
/* Differences from a value per trace; traces whose reference is NaN are left out. bytes_b stays 0. */
kv_status kv_grid_against(const kv_grid *g, size_t a, const double *reference, size_t budget, kv_pairs *out,
                          kv_error *err);
/* Differences of the mean height of the two curves over log2 bytes: per trace, piecewise linear through the n budgets,
 * over the bytes both curves cover, area / width. Traces whose curves do not overlap are left out and counted as
 * undefined. *low, *high: mean ends in log2 bytes. */
kv_status kv_grid_area(const kv_grid *g, size_t a, size_t b, const size_t *budget, size_t n, kv_pairs *out, double *low,
                       double *high, kv_error *err);
/* Budgets that both variants have for every trace that either of them has (allow.common: for some trace), ascending,
 * into budget[n_budget]. */
size_t kv_grid_shared(const kv_grid *g, size_t a, size_t b, kv_allow allow, size_t *budget);

#endif
