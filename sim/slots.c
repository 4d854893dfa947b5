/* slots.c - the parameters of policies: one table gives parsing, canonical strings and help. */
#include <stdlib.h>

#include "sim/oracle.h"
#include "sim/plugin.h"
#include "sim/schedule.h"
#include "sim/scorer.h"
#include "traces/cli.h"

typedef enum {
    T_CHOICE,
    T_U32,
    T_F64,
    T_U64,
    T_BOOL,
    T_LAYERS,
    T_PYRAMID,
    T_SCORER,
    T_FILE,
    T_RECENT,
    T_BASE,
    T_PARTS
} slot_type;
enum { R_RANK = 1, R_COUNT = 2 }; /* what the parameter determines: the ranking, the counts */

typedef struct {
    const char *name, *alias[3]; /* aliases are the names of other code bases */
    slot_type type;
    size_t at;
    uint32_t lo, hi;
    unsigned role;
    const char *choices, *help;
} slot;

#define AT(f) offsetof(kv_spec, f)
static const slot SLOTS[] = {
    {"alpha",
     {"floor", "floor_alpha", "alpha_safeguard"},
     T_F64,
     AT(alpha),
     0,
     1,
     R_COUNT,
     0,
     "share of a head's budget that is uniform (heads=ada); select=spans-first: share of the slots that spans get"},
    {"beta",
     {0},
     T_F64,
     AT(beta),
     1,
     100000,
     R_COUNT,
     0,
     "pyramid: the last layer gets B/beta; heads=table: B/beta of every budget is shared"},
    {"base",
     {0},
     T_BASE,
     AT(scorer),
     0,
     0,
     0,
     0,
     "score the press wraps (kvpress's name): snapkv or keydiff, as the row has it"},
    {"bin",
     {0},
     T_U32,
     AT(bin),
     0,
     1u << 20,
     R_COUNT,
     0,
     "what decode= drops waits, still visible, until so many leave together; 0: it leaves at once"},
    {"block_size", {0}, T_U32, AT(block_size), 1, 1u << 20, R_COUNT, 0, "tokens appended at a time (select=blocks)"},
    {"cascading",
     {0},
     T_BOOL,
     AT(cascading),
     0,
     1,
     R_COUNT,
     0,
     "1: budgets recomputed after every layer, cut layers never grow back; 0: one shot"},
    {"chunk_length",
     {0},
     T_U32,
     AT(chunk_length),
     1,
     1u << 20,
     R_RANK | R_COUNT,
     0,
     "tokens of a chunk (select=chunks) or span (select=spans-first)"},
    {"chunk_size", {0}, T_U32, AT(chunk_size), 1, 1u << 20, R_RANK, 0, "tokens of a chunk (score=noncausal)"},
    {"cosine",
     {0},
     T_FILE,
     AT(cosine),
     0,
     0,
     R_RANK,
     0,
     "cosine between the residual stream before and after attention, .npy [layers] (layers=squeeze)"},
    {"cov", {0}, T_FILE, AT(cov_file), 0, 0, R_RANK, 0, "query covariances, .npy [layers, query heads, d, d]"},
    {"cover",
     {0},
     T_U32,
     AT(cover),
     1,
     1024,
     R_RANK | R_COUNT,
     0,
     "heads of a layer that keep each span (select=spans-first)"},
    {"decode",
     {0},
     T_CHOICE,
     AT(decode),
     0,
     0,
     R_COUNT,
     "keep|tova|streaming|h2o|cake|h2o-mask|rkv|vatp|belady|match|steps",
     "what leaves after each decoded row"},
    {"epsilon", {0}, T_F64, AT(epsilon), 0, 1000, R_RANK | R_COUNT, 0, "added to a score before it is weighted"},
    {"every",
     {0},
     T_U32,
     AT(every),
     1,
     1u << 20,
     R_COUNT,
     0,
     "decode= evicts every so many decoded rows (decode=rkv: processed tokens)"},
    {"filters",
     {0},
     T_FILE,
     AT(filters),
     0,
     0,
     R_RANK,
     0,
     "filter of each head, .npy [layers, KV heads, head size] (score=qfilter)"},
    {"first_stage_ratio",
     {0},
     T_F64,
     AT(first_stage_ratio),
     0,
     1,
     R_COUNT,
     0,
     "share of the budget filled by the plain score (select=two-stage)"},
    {"gamma",
     {0},
     T_F64,
     AT(gamma),
     0,
     1000000,
     R_RANK,
     0,
     "weight of the variance over rows (row_reduce=mean+gamma*var)"},
    {"granularity",
     {0},
     T_CHOICE,
     AT(granularity),
     0,
     0,
     R_RANK | R_COUNT,
     "query_head|kv_head|layer",
     "what has a kept set of its own"},
    {"group_reduce",
     {0},
     T_CHOICE,
     AT(group_reduce),
     0,
     0,
     R_RANK,
     "none|mean|max|sum|all",
     "how the query heads of a unit are combined; all = mean over every head of the layer"},
    {"guard",
     {0},
     T_CHOICE,
     AT(guard),
     0,
     0,
     R_COUNT,
     "none|window|beyond",
     "nothing is evicted while L <= C (none), L <= C + window (window), L < C (beyond)"},
    {"heads",
     {0},
     T_CHOICE,
     AT(heads),
     0,
     0,
     R_COUNT,
     "uniform|ada|pool|safeguard|table|duo",
     "how a layer's slots are split over its units"},
    {"heavy_ratio",
     {0},
     T_F64,
     AT(heavy_ratio),
     0,
     1,
     R_COUNT,
     0,
     "heavy hitters as a share of the prompt (decode=h2o-mask)"},
    {"importance",
     {0},
     T_FILE,
     AT(importance),
     0,
     0,
     R_RANK,
     0,
     "importance of each head, .npy [layers, query heads] (heads=table)"},
    {"keep_all", {0}, T_BOOL, AT(keep_all), 0, 1, R_COUNT, 0, "1: the budget is ignored, nothing is evicted"},
    {"kernel", {0}, T_U32, AT(kernel), 1, 999, R_RANK, 0, "pooling width, odd"},
    {"lag_size", {0}, T_U32, AT(lag_size), 1, 1u << 20, R_RANK, 0, "tokens of a chunk (score=lag)"},
    {"layer_weight",
     {0},
     T_CHOICE,
     AT(layer_weight),
     0,
     0,
     R_RANK,
     "none|stream",
     "layers=pool: factor on a layer's scores; stream = mean norm of v W_O / norm of the residual stream"},
    {"layers",
     {0},
     T_CHOICE,
     AT(layers),
     0,
     0,
     R_COUNT,
     "uniform|pyramid-kvf|pyramid-ffy0|pyramid-kvpress|cake|pool|lava|lava-code|squeeze",
     "how many slots each layer gets"},
    {"leverage_type",
     {0},
     T_CHOICE,
     AT(leverage_type),
     0,
     0,
     R_RANK,
     "kv_product",
     "how key and value leverage are combined (score=cur); the other kinds of kvpress are not here"},
    {"local_window", {0}, T_U32, AT(local_window), 1, 1u << 20, R_RANK, 0, "tokens of a local window (score=cur)"},
    {"lookahead", {0}, T_U32, AT(lookahead), 0, 1u << 27, R_RANK, 0, "score=future: measured rows it sees, 0 = all"},
    {"mean", {0}, T_FILE, AT(mean_file), 0, 0, R_RANK, 0, "query means before RoPE, .npy [layers, query heads, d]"},
    {"mix_lambda", {0}, T_F64, AT(mix_lambda), 0, 1, R_RANK, 0, "weight of attention against redundancy (score=rkv)"},
    {"n_future", {0}, T_U32, AT(n_future), 1, 1u << 20, R_RANK, 0, "future positions the rotation is averaged over"},
    {"normalize", {0}, T_BOOL, AT(normalize), 0, 1, R_COUNT, 0, "1: heads compete with scores times their top-B share"},
    {"observe",
     {0},
     T_CHOICE,
     AT(observe),
     0,
     0,
     R_RANK,
     "past|future",
     "rows the scorer looks at; future: as many of the measured rows, spread evenly (an oracle)"},
    {"oracle",
     {0},
     T_PARTS,
     AT(oracle),
     0,
     0,
     R_COUNT,
     "none|rank|heads|layers|steps|window",
     "parts the oracle takes over, joined by '+': rank at the policy's own counts, the split over heads, over layers, "
     "own sets for every row (steps); window: the same scorer on rows of the future"},
    {"p",
     {0},
     T_F64,
     AT(squeeze),
     0,
     1,
     R_COUNT,
     0,
     "share of its even budget that a layer keeps which attention changes least (layers=squeeze)"},
    {"page",
     {0},
     T_U32,
     AT(page),
     1,
     4096,
     R_RANK | R_COUNT,
     0,
     "tokens of a page; whole pages are kept or dropped, a page's score is the largest in it"},
    {"pattern",
     {0},
     T_FILE,
     AT(pattern),
     0,
     0,
     R_RANK,
     0,
     "how much each head needs everything, .npy [layers, KV heads] (heads=duo)"},
    {"per_row",
     {0},
     T_BOOL,
     AT(per_row),
     0,
     1,
     R_RANK,
     0,
     "1: column sums divided by the number of rows that see the column"},
    {"pool_first", {0}, T_BOOL, AT(pool_first), 0, 1, R_RANK, 0, "1: pooling before the group reduction"},
    {"pooling", {0}, T_CHOICE, AT(pooling), 0, 0, R_RANK, "none|avgpool|maxpool", "smoothing over positions"},
    {"prompt_cut",
     {0},
     T_CHOICE,
     AT(prompt_cut),
     0,
     0,
     R_COUNT,
     "score|rule",
     "what cuts the prompt: score and allocation, or the decode rule itself"},
    {"protect_recent",
     {0},
     T_U32,
     AT(protect_recent),
     0,
     1u << 27,
     R_RANK | R_COUNT,
     0,
     "newest positions kept first, inside the budget"},
    {"protect_segment",
     {0},
     T_FILE,
     AT(protect_segment),
     0,
     0,
     R_RANK | R_COUNT,
     0,
     "part of the prompt kept first, inside the budget: a segment's kind or title, evidence, question"},
    {"protect_sink",
     {0},
     T_U32,
     AT(protect_sink),
     0,
     1u << 27,
     R_RANK | R_COUNT,
     0,
     "first positions kept first, inside the budget"},
    {"pyramid",
     {0},
     T_PYRAMID,
     AT(layers),
     0,
     1,
     0,
     0,
     "1 is layers=pyramid-ffy0, 0 is layers=uniform (name used by FFY0)"},
    {"recent",
     {0},
     T_RECENT,
     AT(recent),
     0,
     1u << 27,
     R_COUNT,
     0,
     "newest entries a decode rule protects, half = C/2; heads=duo: recent tokens of a streaming head"},
    {"recent_ratio",
     {0},
     T_F64,
     AT(recent_ratio),
     0,
     1,
     R_COUNT,
     0,
     "recent entries as a share of the prompt (decode=h2o-mask)"},
    {"reindex",
     {0},
     T_BOOL,
     AT(reindex),
     0,
     1,
     R_COUNT,
     0,
     "1: positions are cache slots, so scores of moved keys are rotated anew (decode=streaming)"},
    {"retain_direction",
     {0},
     T_CHOICE,
     AT(retain_direction),
     0,
     0,
     R_RANK,
     "last|first",
     "which similar key of a row counts as the kept one (score=rkv)"},
    {"row_reduce",
     {0},
     T_CHOICE,
     AT(row_reduce),
     0,
     0,
     R_RANK,
     "sum|mean|mean+gamma*var|max",
     "how the rows of the window are combined"},
    {"score", {0}, T_SCORER, AT(scorer), 0, 0, R_RANK | R_COUNT, 0, "the scorer"},
    {"scores",
     {0},
     T_CHOICE,
     AT(scores),
     0,
     0,
     R_COUNT,
     "renorm|raw",
     "weights of a decoded row: over what is live, or the recorded ones"},
    {"seed", {0}, T_U64, AT(seed), 0, 0, R_RANK, 0, "seed of score=random"},
    {"select",
     {0},
     T_CHOICE,
     AT(select),
     0,
     0,
     R_RANK | R_COUNT,
     "prefix|chunks|two-stage|blocks|mass-first|spans-first|mixdim",
     "how a kept set is taken from scores"},
    {"sinks",
     {0},
     T_U32,
     AT(sinks),
     0,
     1u << 27,
     R_RANK,
     0,
     "first positions that score above all others (score=recency)"},
    {"skip_layers",
     {0},
     T_LAYERS,
     AT(skip_layers),
     0,
     1023,
     R_COUNT,
     0,
     "layers that are never cut, by position among the evicting layers: 0+1, none"},
    {"target",
     {0},
     T_CHOICE,
     AT(target),
     0,
     0,
     R_RANK | R_COUNT,
     "recall|recall_contested",
     "what an oracle, or its part in oracle=, maximises"},
    {"tau", {0}, T_F64, AT(tau), 0, 1000, R_RANK, 0, "sharpness of the anchor weights (score=capkv)"},
    {"tau_table",
     {0},
     T_CHOICE,
     AT(tau_table),
     0,
     0,
     R_COUNT,
     "none|llama3.1-8b|llama2-7b|llama2-13b|mistral-0.3-7b|qwen2.5-7b",
     "CAKE's scripts: tau by model at C = 1024 and 128, 1.0 elsewhere"},
    {"tau1", {0}, T_F64, AT(tau1), 0, 1000, R_COUNT, 0, "CAKE: entropy enters as H^(1/tau1)"},
    {"tau2", {0}, T_F64, AT(tau2), 0, 1000, R_COUNT, 0, "CAKE: variance enters as V^(1/tau2)"},
    {"use_covariance",
     {0},
     T_BOOL,
     AT(use_covariance),
     0,
     1,
     R_RANK,
     0,
     "1: the covariance term of expected attention"},
    {"use_vnorm", {0}, T_BOOL, AT(use_vnorm), 0, 1, R_RANK, 0, "1: times the norm of the value"},
    {"value",
     {0},
     T_CHOICE,
     AT(value),
     0,
     0,
     R_RANK,
     "none|norm|head-max-l1|wo-l1|wo-share|loo",
     "value term the score is multiplied with"},
    {"window",
     {0},
     T_U32,
     AT(window),
     0,
     1u << 20,
     R_RANK | R_COUNT,
     0,
     "last rows that observe; their positions are protected inside the budget"},
    {"window_share",
     {0},
     T_CHOICE,
     AT(window_share),
     0,
     0,
     R_RANK,
     "code|paper",
     "what lowers the 0.9 of select=mass-first: attention on the last columns before the window (code), on the window "
     "(paper)"},
};
#define N_SLOT (sizeof SLOTS / sizeof *SLOTS)

size_t kv_slot_count(void)
{
    return N_SLOT;
}

kv_slot_help kv_slot_describe(size_t i)
{
    return (kv_slot_help){SLOTS[i].name, SLOTS[i].help, SLOTS[i].choices};
}

/* Index of `v` in "a|b|c", or -1. */
static int choice_index(const char *choices, const char *v)
{
    size_t n = strlen(v);
    int i = 0;
    for (const char *c = choices; c; i++) {
        const char *bar = strchr(c, '|');
        size_t len = bar ? (size_t)(bar - c) : strlen(c);
        if (len == n && !memcmp(c, v, n)) return i;
        c = bar ? bar + 1 : NULL;
    }
    return -1;
}

static void choice_name(const char *choices, uint32_t i, char *out, size_t n)
{
    while (i-- && choices) choices = strchr(choices, '|') + 1;
    snprintf(out, n, "%.*s", (int)strcspn(choices, "|"), choices);
}

static kv_status set_layers(kv_spec *s, const char *v, kv_error *err)
{
    uint64_t bits[16] = {0};
    if (strcmp(v, "none")) {
        for (const char *p = v;;) {
            char item[16];
            size_t n = strcspn(p, "+");
            uint64_t l;
            snprintf(item, sizeof item, "%.*s", (int)(n < 15 ? n : 15), p);
            if (n > 15 || !kv_parse_u64(item, &l) || l > 1023)
                return kv_fail(err, KV_EMISUSE, "skip_layers='%s': want layer positions joined by '+', or none", v);
            bits[l / 64] |= (uint64_t)1 << (l % 64);
            if (!p[n]) break;
            p += n + 1;
        }
    }
    memcpy(s->skip_layers, bits, sizeof bits);
    return KV_OK;
}

/* Words of d->choices joined by '+' as bits, the first word alone as none. */
static kv_status set_parts(uint32_t *to, const slot *d, const char *v, kv_error *err)
{
    uint32_t bits = 0;
    for (const char *p = v;;) {
        char item[16];
        size_t n = strcspn(p, "+");
        snprintf(item, sizeof item, "%.*s", (int)(n < 15 ? n : 15), p);
        int c = n < 16 ? choice_index(d->choices, item) : -1;
        if (c < 0 || (c == 0 && (p != v || p[n])))
            return kv_fail(err, KV_EMISUSE, "%s='%s': want %s, joined by '+'", d->name, v, d->choices);
        if (c) bits |= 1u << (c - 1);
        if (!p[n]) break;
        p += n + 1;
    }
    *to = bits;
    return KV_OK;
}

static kv_status set_slot(kv_spec *s, const slot *d, const char *v, kv_error *err)
{
    void *to = (char *)s + d->at;
    uint64_t u;
    double f;
    int c;
    switch (d->type) {
    case T_CHOICE:
        if ((c = choice_index(d->choices, v)) < 0)
            return kv_fail(err, KV_EMISUSE, "%s='%s': want one of %s", d->name, v, d->choices);
        *(uint32_t *)to = (uint32_t)c;
        return KV_OK;
    case T_PYRAMID:
    case T_BOOL:
    case T_U32:
        if (!kv_parse_u64(v, &u) || u < d->lo || u > d->hi)
            return kv_fail(err, KV_EMISUSE, "%s='%s': want a whole number from %u to %u", d->name, v, d->lo, d->hi);
        *(uint32_t *)to = d->type == T_PYRAMID ? (u ? KV_LAYERS_PYRAMID_FFY0 : KV_LAYERS_UNIFORM) : (uint32_t)u;
        return KV_OK;
    case T_U64:
        if (!kv_parse_u64(v, &u)) return kv_fail(err, KV_EMISUSE, "%s='%s': want a whole number", d->name, v);
        *(uint64_t *)to = u;
        return KV_OK;
    case T_F64:
        if (!kv_parse_f64(v, &f) || f < d->lo || f > d->hi)
            return kv_fail(err, KV_EMISUSE, "%s='%s': want a number from %u to %u", d->name, v, d->lo, d->hi);
        *(double *)to = f;
        return KV_OK;
    case T_LAYERS: return set_layers(s, v, err);
    case T_PARTS: return set_parts(to, d, v, err);
    case T_BASE: /* a statement about the row, not a choice */
        if (strcmp(v, s->select == KV_SELECT_BLOCKS ? "keydiff" : "snapkv"))
            return kv_fail(err, KV_EMISUSE, "base='%s': policy '%s' wraps %s; change its slots instead", v,
                           s->row->name, s->select == KV_SELECT_BLOCKS ? "keydiff" : "snapkv");
        return KV_OK;
    case T_RECENT:
        if (strcmp(v, "half") && (!kv_parse_u64(v, &u) || u > d->hi))
            return kv_fail(err, KV_EMISUSE, "%s='%s': want a whole number or half", d->name, v);
        *(uint32_t *)to = strcmp(v, "half") ? (uint32_t)u : KV_RECENT_HALF;
        return KV_OK;
    case T_FILE:
        if (!*v) return kv_fail(err, KV_EMISUSE, "%s needs a file", d->name);
        char *file = kv_format("%s", v);
        if (!file) return kv_fail(err, KV_ENOMEM, "out of memory");
        free(*(char **)to);
        *(char **)to = file;
        return KV_OK;
    case T_SCORER:
        for (uint32_t i = 0; i < kv_n_scorers; i++)
            if (!strcmp(kv_scorers[i]->name, v)) return s->scorer = i, KV_OK;
        char known[512] = "";
        for (uint32_t i = 0, at = 0; i < kv_n_scorers && at < sizeof known; i++)
            at += (uint32_t)snprintf(known + at, sizeof known - at, "%s%s", i ? ", " : "", kv_scorers[i]->name);
        return kv_fail(err, KV_EMISUSE, "score='%s': known scorers are %s", v, known);
    }
    return KV_OK;
}

static const slot *find_slot(const char *name)
{
    for (size_t i = 0; i < N_SLOT; i++) {
        if (!strcmp(SLOTS[i].name, name)) return &SLOTS[i];
        for (size_t a = 0; a < 3 && SLOTS[i].alias[a]; a++)
            if (!strcmp(SLOTS[i].alias[a], name)) return &SLOTS[i];
    }
    return NULL;
}

kv_status kv_spec_set(kv_spec *s, const char *name, const char *value, kv_error *err)
{
    const char *names[N_SLOT];
    const slot *found = find_slot(name);
    if (found) return set_slot(s, found, value, err);
    for (size_t i = 0; i < N_SLOT; i++) names[i] = SLOTS[i].name;
    const char *near = kv_nearest(name, names, N_SLOT);
    return kv_fail(err, KV_EMISUSE, "unknown parameter '%s' of policy '%s'%s%s%s; `kv-sim policies %s%s` lists them",
                   name, s->row->name, near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "",
                   s->plugin ? "plugin:" : "", s->plugin ? s->plugin->path : s->row->name);
}

/* `name` is a word of the list `words`. */
static bool listed(const char *words, const char *name)
{
    size_t n = strlen(name);
    for (const char *w = words; w && *w; w += strcspn(w, " "), w += *w == ' ')
        if (strcspn(w, " ") == n && !memcmp(w, name, n)) return true;
    return false;
}

bool kv_spec_observes(const kv_spec *s)
{
    return !s->file && !s->plugin && listed(kv_scorers[s->scorer]->params, "observe");
}

/* A parameter matters when the scorer or some slot reads it; the others have no place in the canonical string. */
static bool matters(const kv_spec *s, const slot *d)
{
    const char *n = d->name;
    bool pyramid = s->layers == KV_LAYERS_PYRAMID_KVF || s->layers == KV_LAYERS_PYRAMID_FFY0 ||
                   s->layers == KV_LAYERS_PYRAMID_KVPRESS;
    if (s->file || d->type == T_PYRAMID || d->type == T_BASE) return false; /* `pyramid` is another name of layers= */
    if (!strcmp(n, "protect_segment")) return s->protect_segment != NULL;
    if (!strcmp(n, "page")) return s->page > 1;
    if (!strcmp(n, "keep_all") || !strcmp(n, "guard") || !strcmp(n, "oracle") || !strncmp(n, "protect", 7))
        return *(const uint32_t *)((const char *)s + d->at) != 0;
    if (!strcmp(n, "granularity")) return true;
    if (s->keep_all) return false;
    if (!strcmp(n, "score") || !strcmp(n, "heads") || !strcmp(n, "layers")) return true;
    if (!strcmp(n, "skip_layers")) {
        for (int i = 0; i < 16; i++)
            if (s->skip_layers[i]) return true;
        return false;
    }
    if (!strcmp(n, "value") || !strcmp(n, "select") || !strcmp(n, "decode") || !strcmp(n, "bin") ||
        !strcmp(n, "prompt_cut") || !strcmp(n, "reindex"))
        return *(const uint32_t *)((const char *)s + d->at) != 0;
    if (!strcmp(n, "target") && s->oracle & ~(uint32_t)KV_ORACLE_WINDOW) return s->target;
    if (!strcmp(n, "every")) return s->every > 1;
    if (!strcmp(n, "recent") && s->heads == KV_HEADS_DUO) return true;
    if (s->decode && listed(kv_decode_rules[s->decode].params, n)) return true;
    if (!strcmp(n, "window") && (s->window || s->layers == KV_LAYERS_CAKE)) return true;
    if (!strcmp(n, "alpha"))
        return s->heads == KV_HEADS_ADA || s->heads == KV_HEADS_SAFEGUARD || s->layers == KV_LAYERS_LAVA_CODE ||
               s->select == KV_SELECT_SPANS;
    if (!strcmp(n, "normalize")) return s->heads == KV_HEADS_ADA;
    if (!strcmp(n, "importance")) return s->heads == KV_HEADS_TABLE;
    if (!strcmp(n, "beta")) return pyramid || s->heads == KV_HEADS_TABLE;
    if (!strcmp(n, "tau_table")) return s->layers == KV_LAYERS_CAKE && s->tau_table;
    if (!strcmp(n, "cascading") || !strcmp(n, "tau1") || !strcmp(n, "tau2")) return s->layers == KV_LAYERS_CAKE;
    if (!strcmp(n, "chunk_length")) return s->select == KV_SELECT_CHUNKS || s->select == KV_SELECT_SPANS;
    if (!strcmp(n, "cover")) return s->select == KV_SELECT_SPANS;
    if (!strcmp(n, "window_share")) return s->select == KV_SELECT_MASS;
    if (!strcmp(n, "layer_weight")) return s->layers == KV_LAYERS_POOL && s->layer_weight;
    if (!strcmp(n, "pattern")) return s->heads == KV_HEADS_DUO;
    if (!strcmp(n, "cosine") || !strcmp(n, "p")) return s->layers == KV_LAYERS_SQUEEZE;
    if (!strcmp(n, "block_size")) return s->select == KV_SELECT_BLOCKS;
    if (!strcmp(n, "first_stage_ratio") || (!strcmp(n, "epsilon") && s->select == KV_SELECT_TWO_STAGE))
        return s->select == KV_SELECT_TWO_STAGE;
    if (!listed(kv_scorers[s->scorer]->params, n)) return false;
    if (!strcmp(n, "lookahead")) return s->lookahead > 0;
    if (!strcmp(n, "observe")) return s->observe;
    if (!strcmp(n, "target")) return s->target;
    if (!strcmp(n, "gamma")) return s->row_reduce == KV_ROWS_MEAN_VAR;
    if (!strcmp(n, "kernel")) return s->pooling != KV_POOL_NONE;
    if (!strcmp(n, "pool_first")) return s->pooling != KV_POOL_NONE && s->group_reduce != KV_GROUP_NONE;
    return true;
}

char *kv_slot_value(const kv_spec *s, size_t i)
{
    const slot *d = &SLOTS[i];
    const void *at = (const char *)s + d->at;
    char b[64];
    if (!matters(s, d)) return NULL;
    switch (d->type) {
    case T_CHOICE: choice_name(d->choices, *(const uint32_t *)at, b, sizeof b); break;
    case T_SCORER: snprintf(b, sizeof b, "%s", kv_scorers[s->scorer]->name); break;
    case T_F64: snprintf(b, sizeof b, "%.12g", *(const double *)at); break;
    case T_RECENT:
        snprintf(b, sizeof b, *(const uint32_t *)at == KV_RECENT_HALF ? "half" : "%u", *(const uint32_t *)at);
        break;
    case T_FILE: return *(char *const *)at ? kv_format("%s", *(char *const *)at) : NULL;
    case T_U64: snprintf(b, sizeof b, "%llu", (unsigned long long)*(const uint64_t *)at); break;
    case T_PARTS: {
        size_t n = 0;
        for (uint32_t k = 0; k < 5; k++)
            if (*(const uint32_t *)at >> k & 1) {
                char one[16];
                choice_name(d->choices, k + 1, one, sizeof one);
                n += (size_t)snprintf(b + n, sizeof b - n, "%s%s", n ? "+" : "", one);
            }
        break;
    }
    case T_LAYERS: {
        char *out = kv_format("%s", "");
        for (unsigned l = 0; l < 1024 && out; l++)
            if (s->skip_layers[l / 64] >> (l % 64) & 1) {
                char *next = kv_format("%s%s%u", out, *out ? "+" : "", l);
                free(out);
                out = next;
            }
        return out;
    }
    default: snprintf(b, sizeof b, "%u", *(const uint32_t *)at);
    }
    return kv_format("%s", b);
}

/* The field holds the same in both. */
static bool same_field(const kv_spec *a, const kv_spec *b, const slot *d)
{
    const char *x = (const char *)a + d->at, *y = (const char *)b + d->at;
    switch (d->type) {
    case T_FILE: return !*(char *const *)x == !*(char *const *)y;
    case T_LAYERS: return !memcmp(x, y, sizeof a->skip_layers);
    case T_F64:
    case T_U64: return !memcmp(x, y, 8);
    default: return !memcmp(x, y, 4);
    }
}

kv_status kv_spec_note_unread(kv_spec *s, const kv_spec *was, const char *params, kv_error *err)
{
    for (const char *p = params; *p;) {
        char name[48];
        size_t n = strcspn(p, ",");
        snprintf(name, sizeof name, "%.*s", (int)strcspn(p, "="), p);
        const slot *d = find_slot(name);
        if (d && d->type != T_PYRAMID && d->type != T_BASE && !matters(s, d) && !same_field(s, was, d)) {
            char *more = kv_format("%s%s%s", s->unread ? s->unread : "", s->unread ? ", " : "", name);
            if (!more) return kv_fail(err, KV_ENOMEM, "out of memory");
            free(s->unread);
            s->unread = more;
        }
        p += n + (p[n] == ',');
    }
    return KV_OK;
}

/* A decode rule and what goes with it. */
static kv_status seal_decode(const kv_spec *s, kv_error *err)
{
    const kv_decode_rule *rule = &kv_decode_rules[s->decode];
    const char *who = s->row->name, *name = rule->name;
    bool hides = rule->flags & KV_RULE_HIDES, foresees = rule->flags & KV_RULE_FORESEES;
    if (!s->decode && (s->every > 1 || s->bin || s->prompt_cut || s->reindex))
        return kv_fail(err, KV_EMISUSE, "policy '%s': every, bin, prompt_cut and reindex need a decode rule (decode=)",
                       who);
    if (s->prompt_cut && !(rule->flags & KV_RULE_CUTS))
        return kv_fail(err, KV_EMISUSE, "policy '%s': decode=%s cannot cut the prompt; leave prompt_cut=score", who,
                       name);
    if (hides && !s->prompt_cut)
        return kv_fail(err, KV_EMISUSE, "policy '%s': decode=%s works with prompt_cut=rule only", who, name);
    if (hides && (s->every > 1 || s->bin))
        return kv_fail(err, KV_EMISUSE, "policy '%s': decode=%s takes no every and no bin: its entries may come back",
                       who, name);
    if (foresees && (s->every > 1 || s->bin))
        return kv_fail(err, KV_EMISUSE, "policy '%s': decode=%s looks at every row; it takes no every and no bin", who,
                       name);
    if (s->decode == KV_DECODE_STEPS && !s->prompt_cut)
        return kv_fail(err, KV_EMISUSE, "policy '%s': decode=steps works with prompt_cut=rule only", who);
    if (s->decode == KV_DECODE_VATP && s->granularity == KV_GRAN_LAYER)
        return kv_fail(err, KV_EMISUSE, "policy '%s': decode=vatp works per query or KV head", who);
    if (rule->flags & KV_RULE_RANKED && s->granularity != KV_GRAN_KV_HEAD)
        return kv_fail(err, KV_EMISUSE, "policy '%s': decode=%s works per KV head", who, name);
    if (s->decode == KV_DECODE_RKV && !s->window)
        return kv_fail(err, KV_EMISUSE, "policy '%s': decode=rkv needs window >= 1", who);
    if (s->reindex && s->decode != KV_DECODE_STREAMING)
        return kv_fail(err, KV_EMISUSE, "policy '%s': reindex=1 goes with decode=streaming", who);
    return KV_OK;
}

kv_status kv_spec_seal(kv_spec *s, kv_error *err)
{
    kv_status st;
    const kv_scorer *sc = kv_scorers[s->scorer];
    const char *who = s->row->name;
    if (s->granularity == KV_GRAN_QUERY_HEAD && s->group_reduce != KV_GROUP_ALL) s->group_reduce = KV_GROUP_NONE;
    if (!s->file && listed(sc->params, "group_reduce") && s->group_reduce == KV_GROUP_NONE &&
        s->granularity != KV_GRAN_QUERY_HEAD)
        return kv_fail(err, KV_EMISUSE, "policy '%s': group_reduce=none needs granularity=query_head", who);
    if (s->pooling != KV_POOL_NONE && s->kernel % 2 == 0)
        return kv_fail(err, KV_EMISUSE, "policy '%s': kernel=%u must be odd", who, s->kernel);
    if (!s->file && (s->plugin != NULL) != !strcmp(sc->name, "plugin"))
        return kv_fail(err, KV_EMISUSE,
                       s->plugin ? "policy '%s': the score is the plug-in's; leave score out"
                                 : "policy '%s': score=plugin comes with plugin:FILE.so",
                       who);
    if ((sc->windowed || (s->plugin && kv_plug_needs(s->plugin) & KV_NEED_WINDOW)) && s->window == 0)
        return kv_fail(err, KV_EMISUSE, "policy '%s': score=%s needs window >= 1", who, sc->name);
    if (s->row_reduce == KV_ROWS_MEAN_VAR && s->window < 2 && sc->windowed)
        return kv_fail(err, KV_EMISUSE, "policy '%s': a variance over rows needs window >= 2", who);
    if (s->layers == KV_LAYERS_CAKE && (!(s->tau1 > 0) || !(s->tau2 > 0) || s->window < 2))
        return kv_fail(err, KV_EMISUSE, "policy '%s': layers=cake needs tau1, tau2 > 0 and window >= 2", who);
    if (s->heads == KV_HEADS_TABLE && s->layers != KV_LAYERS_UNIFORM)
        return kv_fail(err, KV_EMISUSE, "policy '%s': heads=table spreads over the whole model; leave layers=uniform",
                       who);
    if (s->select == KV_SELECT_CHUNKS && (s->protect_sink || s->protect_recent || s->protect_segment))
        return kv_fail(err, KV_EMISUSE,
                       "policy '%s': whole chunks compete by their mean; protection has no place in it", who);
    if (s->heads == KV_HEADS_TABLE && !s->importance)
        return kv_fail(err, KV_EMISUSE, "policy '%s' needs importance=FILE.npy, one number per layer and query head",
                       who);
    if (s->select == KV_SELECT_TWO_STAGE && s->granularity != KV_GRAN_KV_HEAD)
        return kv_fail(err, KV_EMISUSE, "policy '%s': select=two-stage works per KV head", who);
    if (s->select == KV_SELECT_MIXDIM && s->granularity != KV_GRAN_KV_HEAD)
        return kv_fail(err, KV_EMISUSE, "policy '%s': select=mixdim works per KV head", who);
    if (s->select == KV_SELECT_CHUNKS && (s->heads || s->layers))
        return kv_fail(err, KV_EMISUSE, "policy '%s': select=chunks needs heads=uniform and layers=uniform", who);
    if (s->page > 1 && (s->select || s->decode))
        return kv_fail(err, KV_EMISUSE,
                       "policy '%s': pages work with prompt-time prefixes only (no select=, no decode=)", who);
    if (s->decode && s->select) return kv_fail(err, KV_EMISUSE, "policy '%s': a decode rule needs select=prefix", who);
    if ((st = seal_decode(s, err)) || (st = kv_oracle_check(s, kv_spec_observes(s), err))) return st;
    if (s->layers == KV_LAYERS_LAVA_CODE && s->heads)
        return kv_fail(err, KV_EMISUSE, "policy '%s': layers=lava-code already splits over heads; leave heads=uniform",
                       who);
    if (s->layer_weight && s->layers != KV_LAYERS_POOL)
        return kv_fail(err, KV_EMISUSE, "policy '%s': layer_weight needs layers=pool", who);
    if (s->value == KV_VALUE_LOO && !s->window)
        return kv_fail(err, KV_EMISUSE, "policy '%s': value=loo needs window >= 1", who);
    if (s->select == KV_SELECT_MASS || s->select == KV_SELECT_SPANS) {
        if (!s->window) return kv_fail(err, KV_EMISUSE, "policy '%s': this select= needs window >= 1", who);
        if ((s->heads != KV_HEADS_POOL) == (s->layers != KV_LAYERS_POOL) || (s->layers != KV_LAYERS_POOL && s->layers))
            return kv_fail(err, KV_EMISUSE, "policy '%s': this select= needs one flat top-k, heads=pool or layers=pool",
                           who);
    }
    if (s->heads == KV_HEADS_DUO && (s->layers || s->select || s->page > 1 || s->recent == KV_RECENT_HALF ||
                                     s->granularity != KV_GRAN_KV_HEAD || strcmp(sc->name, "recency")))
        return kv_fail(err, KV_EMISUSE,
                       "policy '%s': heads=duo needs score=recency, recent=N, granularity=kv_head and no layers=, "
                       "select= or page=",
                       who);
    if (s->layers == KV_LAYERS_POOL && s->heads != KV_HEADS_UNIFORM)
        return kv_fail(err, KV_EMISUSE, "policy '%s': layers=pool already splits over heads; leave heads=uniform", who);
    free(s->canonical);
    free(s->ranking_key);
    char *own = s->plugin ? kv_plug_identity(s->plugin) : kv_format("%s", s->file ? s->file : "");
    if (!own) return s->canonical = s->ranking_key = NULL, kv_fail(err, KV_ENOMEM, "out of memory");
    s->canonical = kv_format("%s%s%s", who, *own ? ":" : "", own);
    s->ranking_key = own;
    char sep = s->plugin ? ',' : ':';
    for (size_t i = 0; i < N_SLOT && s->canonical && s->ranking_key; i++) {
        char *v = kv_slot_value(s, i);
        if (!v) continue;
        char *c = kv_format("%s%c%s=%s", s->canonical, sep, SLOTS[i].name, v);
        /* the target of oracle= says nothing about the policy's own ranking */
        bool ranks = SLOTS[i].role & R_RANK && (SLOTS[i].at != AT(target) || listed(sc->params, "target"));
        char *k = ranks ? kv_format("%s,%s=%s", s->ranking_key, SLOTS[i].name, v) : NULL;
        sep = ',';
        free(s->canonical), s->canonical = c;
        if (k) free(s->ranking_key), s->ranking_key = k;
        free(v);
    }
    if (!s->canonical || !s->ranking_key) return kv_fail(err, KV_ENOMEM, "out of memory");
    return KV_OK;
}
