/* kvtrace_policy.h - a KV-cache eviction policy as a plug-in: one C file and this header, nothing else of kvtrace.
 *
 *     cc -shared -fPIC -O2 -ffp-contract=off -I sim mine.c -o mine.so
 *     kv-sim run TRACE.. -p plugin:./mine.so -p snapkv,oracle -b auto --db my.db
 *
 * A plug-in scores: every position of a prompt gets a number, and the largest are kept. What is protected, ties (the
 * lower position wins), budgets, the split over layers and heads, pages, metrics and figures are kvtrace's, and their
 * parameters work on a plug-in as on any policy: plugin:./mine.so:heads=ada,window=16,layers=cake. The path needs a '/'
 * (nothing is searched) and ends where the first ":key=" begins; plugin: takes a whole -p.
 *
 * What a plug-in exports is one function, kv_plugin_entry, that returns a constant kv_plugin.
 * sim/plugins/example_vnorm.c is a whole one. The rules:
 *   - equal input, equal scores: no clock, no unseeded randomness, sums in a fixed order, best in double;
 *   - score() runs in several threads at once, on different layers; state is read-only after init();
 *   - positions from L on, which the arrays of keys and values hold too, come after the cut: never read them;
 *   - make everything but kv_plugin_entry static.
 * A plug-in is native code that runs with your rights: load only what you would run. */
#ifndef KVTRACE_POLICY_H
#define KVTRACE_POLICY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KV_PLUGIN_ABI 1 /* raised when anything below changes its meaning, place or size */

/* What has a kept set of its own: a unit. A user's granularity=... wins over the plug-in's. */
enum { KV_PLUGIN_PER_QUERY_HEAD, KV_PLUGIN_PER_KV_HEAD, KV_PLUGIN_PER_LAYER };

/* What score() reads beyond keys and values. Pointers that were not asked for are NULL. */
enum {
    KV_PLUGIN_NEEDS_PROBS = 1,          /* attention of the last `window` rows */
    KV_PLUGIN_NEEDS_WINDOW_QUERIES = 2, /* queries of those rows */
    KV_PLUGIN_NEEDS_ALL_QUERIES = 4,    /* queries of the whole prompt (traces recorded with qkv) */
    KV_PLUGIN_NEEDS_COLSUM = 8,         /* attention each column got from all rows of the prompt */
    KV_PLUGIN_NEEDS_WO = 16             /* the output projection */
};

/* One layer of one prompt, all arrays of float, row-major, keys and queries as attention consumed them (after RoPE).
 * Everything belongs to kvtrace and is gone when score() returns. */
typedef struct {
    uint32_t layer;                      /* number in the model */
    uint32_t index, n_layer;             /* place among the layers that evict, and how many those are */
    uint32_t n_q_head, n_kv_head, group; /* query head h reads KV head h / group */
    uint32_t head_dim, hidden;
    uint32_t L;                   /* positions to score: 0..L-1 */
    uint32_t window;              /* rows that observe, L-window..L-1; their positions are protected. At most L */
    uint32_t granularity, n_unit; /* KV_PLUGIN_PER_*, and units of this layer */
    float scale, softcap;         /* logit x = scale * q.k, then softcap * tanh(x / softcap) where softcap > 0 */
    size_t kv_stride, q_stride;   /* rows from one head to the next in k and v, in q */
    uint32_t q_first;             /* position of the first row in q */
    const float *k, *v;           /* [n_kv_head][kv_stride][head_dim]; or kv_plugin_key, kv_plugin_value */
    const float *q;               /* [n_q_head][q_stride][head_dim], positions q_first..L-1; or kv_plugin_query */
    const float *probs;           /* [n_q_head][window][L], each row a softmax over L; or kv_plugin_prob_row */
    const float *colsum;          /* [n_q_head][L] */
    const float *wo;              /* [hidden][n_q_head * head_dim] */
} kv_plugin_layer;

/* The unit to score and the heads it covers: query heads q_first..q_first+n_q-1, KV heads kv_first..kv_first+n_kv-1. */
typedef struct {
    uint32_t index, q_first, n_q, kv_first, n_kv;
} kv_plugin_unit;

typedef struct {
    uint32_t abi;         /* KV_PLUGIN_ABI */
    uint32_t size;        /* sizeof(kv_plugin) */
    const char *name;     /* 1 to 40 of a-z 0-9 . _ -; results call the policy plugin.NAME */
    const char *summary;  /* one line: what it keeps */
    const char *paper;    /* title or arXiv number */
    uint32_t needs;       /* KV_PLUGIN_NEEDS_* */
    uint32_t window;      /* newest positions protected, and rows that observe; a user's window=... wins */
    uint32_t granularity; /* KV_PLUGIN_PER_* */
    /* Parameters of its own with their defaults, "power=1,floor=0.2", or NULL. Users set them like any other
     * (plugin:./mine.so:power=2); names that kvtrace uses itself are taken. init() gets them all, in this order, so
     * that sscanf(params, "power=%lf,floor=%lf", &p, &f) == 2 reads them; it may leave something in *state for score().
     * init and fini may be NULL. */
    const char *params;
    int (*init)(const char *params, void **state, char *err, size_t err_size);
    void (*fini)(void *state);
    /* score[0..L-1] of one unit, zeros on entry, larger is kept longer, finite. Scores of protected positions are
     * ignored. Returns 0, or anything else after putting one line into err (snprintf(err, err_size, ...)): the run
     * fails with it. */
    int (*score)(const kv_plugin_layer *l, const kv_plugin_unit *u, const void *state, float *score, char *err,
                 size_t err_size);
} kv_plugin;

__attribute__((visibility("default"))) const kv_plugin *kv_plugin_entry(void);

/* Vectors of head_dim floats. */
static inline const float *kv_plugin_key(const kv_plugin_layer *l, uint32_t kv_head, uint32_t position)
{
    return l->k + (kv_head * l->kv_stride + position) * l->head_dim;
}
static inline const float *kv_plugin_value(const kv_plugin_layer *l, uint32_t kv_head, uint32_t position)
{
    return l->v + (kv_head * l->kv_stride + position) * l->head_dim;
}
static inline const float *kv_plugin_query(const kv_plugin_layer *l, uint32_t q_head, uint32_t position)
{
    return l->q + (q_head * l->q_stride + (position - l->q_first)) * l->head_dim;
}
/* Attention of row L-window+row over positions 0..L-1. */
static inline const float *kv_plugin_prob_row(const kv_plugin_layer *l, uint32_t q_head, uint32_t row)
{
    return l->probs + ((size_t)q_head * l->window + row) * l->L;
}

#ifdef __cplusplus
}
#endif
#endif
