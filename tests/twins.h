/* twins.h - what brute-force twins share: seeded worlds with every attention row in double, and decisions that know how
 * close they were.
 *
 * A twin repeats a rule in plain double loops over whole attention rows. The program scores in float, so the two may
 * part where values are nearly equal: every decision of a twin (a cut, a truncation) lowers `kv_gap` to its relative
 * distance, and a case with a gap below KV_NEAR is counted as a near tie and not compared. Values that are exactly
 * equal are no near tie: the tie rule decides them. */
#ifndef KV_TWINS_H
#define KV_TWINS_H

#include "sim/schedule.h"
#include "sim/scorer.h"
#include "tests/check.h"
#include "tests/tiny.h"

#define KV_NEAR 1e-5
#ifndef KV_SHOW
#define KV_SHOW 5
#endif

typedef struct {
    kv_tiny s;
    kv_tiny_data t;
    uint32_t n_layer, H, U, g, d, L, N; /* query heads, KV heads, group, head dimension, prompt, tokens */
    double *a;                          /* [layer][query head][row][column], 0 behind the row */
    kv_trace *trace;
    kv_scene scene;
} kv_world;

/* Attention of a row of a query head. */
static inline double *kv_row(const kv_world *w, size_t l, size_t h, size_t r)
{
    return w->a + ((l * w->H + h) * w->N + r) * w->N;
}

static inline const float *kv_value_at(const kv_world *w, size_t l, size_t u, size_t i)
{
    return w->t.v + ((l * w->U + u) * w->N + i) * w->d;
}

static inline const float *kv_key(const kv_world *w, size_t l, size_t u, size_t i)
{
    return w->t.k + ((l * w->U + u) * w->N + i) * w->d;
}

static inline void kv_world_attend(kv_world *w)
{
    w->a = calloc((size_t)w->n_layer * w->H * w->N * w->N + 1, sizeof *w->a);
    for (size_t l = 0; l < w->n_layer; l++)
        for (size_t h = 0; h < w->H; h++)
            for (size_t r = 0; r < w->N; r++) {
                const float *q = w->t.q + ((l * w->H + h) * w->N + r) * w->d;
                double *a = kv_row(w, l, h, r), max = -INFINITY, sum = 0;
                for (size_t i = 0; i <= r; i++) {
                    for (size_t j = 0; j < w->d; j++) a[i] += (double)q[j] * kv_key(w, l, h / w->g, i)[j] / sqrt(w->d);
                    max = fmax(max, a[i]);
                }
                for (size_t i = 0; i <= r; i++) sum += a[i] = exp(a[i] - max);
                for (size_t i = 0; i <= r; i++) a[i] /= sum;
            }
}

/* Write what is in w->t and open it as a trace; false after a failed CHECK. */
static inline bool kv_world_open_data(kv_world *w, const char *path)
{
    kv_error e = {""};
    kv_status st = kv_tiny_write(&w->s, &w->t, path, &e);
    if (!st) st = kv_trace_open(path, &w->trace, &e);
    if (!st) st = kv_scene_open(w->trace, "prompt", 0, &w->scene, &e);
    CHECKF(!st, "seed %llu: %s", (unsigned long long)w->s.seed, e.msg);
    kv_world_attend(w);
    return !st;
}

static inline void kv_world_make(kv_world *w, const kv_tiny *s)
{
    *w = (kv_world){.s = *s,
                    .n_layer = s->n_layer,
                    .H = s->n_q_head,
                    .U = s->n_kv_head,
                    .g = s->n_q_head / s->n_kv_head,
                    .d = s->d,
                    .L = s->n_prompt,
                    .N = s->n_token,
                    .t = kv_tiny_make(s)};
}

static inline bool kv_world_open(kv_world *w, const char *path, const kv_tiny *s)
{
    kv_world_make(w, s);
    return kv_world_open_data(w, path);
}

static inline void kv_world_close(kv_world *w)
{
    kv_scene_close(&w->scene), kv_trace_close(w->trace), kv_tiny_free(&w->t), free(w->a);
}

/* Query heads that unit u of a granularity reads, and how many units there are. */
static inline uint32_t kv_units(const kv_world *w, uint32_t granularity)
{
    return granularity == KV_GRAN_LAYER ? 1 : granularity == KV_GRAN_KV_HEAD ? w->U : w->H;
}

static inline uint32_t kv_heads_of(const kv_world *w, uint32_t granularity, uint32_t u, uint32_t *first)
{
    uint32_t n = w->H / kv_units(w, granularity);
    *first = u * n;
    return n;
}

/* ------------------------------------------------------------------------------------- decisions */
static double kv_gap;
static const double *kv_sort_key;

static inline void kv_close_call(double a, double b)
{
    double big = fmax(fabs(a), fabs(b));
    if (a != b && fabs(a - b) < kv_gap * big) kv_gap = fabs(a - b) / big;
}

static inline int kv_by_key(const void *a, const void *b)
{
    uint32_t i = *(const uint32_t *)a, j = *(const uint32_t *)b;
    double x = kv_sort_key[i], y = kv_sort_key[j];
    return x > y ? -1 : x < y ? 1 : (i > j) - (i < j);
}

/* Indices of x by (value descending, index ascending). */
static inline void kv_sorted(const double *x, uint32_t n, uint32_t *order)
{
    for (uint32_t i = 0; i < n; i++) order[i] = i;
    kv_sort_key = x;
    qsort(order, n, sizeof *order, kv_by_key);
}

/* in[i] = x[i] is among the k largest. */
static inline void kv_top(const double *x, uint32_t n, uint64_t k, bool *in)
{
    uint32_t *order = malloc(n * sizeof *order + 1);
    kv_sorted(x, n, order);
    for (uint32_t i = 0; i < n; i++) in[order[i]] = i < k;
    if (k && k < n) kv_close_call(x[order[k - 1]], x[order[k]]);
    free(order);
}

/* int(x) of a share that was computed by dividing: next to a whole number the two programs may truncate apart. */
static inline int64_t kv_truncate(double x)
{
    double whole = nearbyint(x);
    if (whole != 0) kv_gap = fmin(kv_gap, fabs(x - whole) / whole);
    return (int64_t)x;
}

/* ------------------------------------------------------------------------------------- the program's side */
typedef struct {
    kv_spec *spec;
    size_t n_spec;
    kv_plan plan;
    kv_layer layer[32]; /* loaded where some policy makes schedules */
    uint32_t n_layer;
} kv_run;

/* Parse and rank; kv_run_close also after a failure. */
static inline kv_status kv_run_open(kv_run *run, const kv_world *w, const char *policies, kv_error *e)
{
    *run = (kv_run){0};
    bool load = false;
    kv_status st = kv_spec_parse(policies, &run->spec, &run->n_spec, e);
    if (!st) st = kv_plan_build(&w->scene, run->spec, run->n_spec, 1, &run->plan, e);
    for (size_t i = 0; i < run->n_spec; i++) load |= kv_schedule_needed(&run->spec[i]);
    for (; run->n_layer < w->n_layer && load && !st; run->n_layer++)
        st =
            kv_layer_load(&w->scene, run->n_layer, run->plan.needs, run->plan.max_window, &run->layer[run->n_layer], e);
    return st;
}

static inline void kv_run_close(kv_run *run)
{
    for (uint32_t l = 0; l < run->n_layer; l++) kv_layer_free(&run->layer[l]);
    for (size_t i = 0; i < run->n_spec; i++) kv_spec_free(&run->spec[i]);
    free(run->spec), kv_plan_free(&run->plan);
}

static inline kv_budget_resolved kv_tokens(const kv_world *w, uint32_t C)
{
    kv_budget b = {.kind = KV_BUDGET_TOKENS, .value = C};
    return kv_budget_resolve(&b, w->L, 8, 1, 1);
}

/* seen [unit][row][position] of layer l under policy i with these counts: may measured row `row` attend to it? The
 * entry behind the last row is what stays after it. */
static inline kv_status kv_run_seen(kv_run *run, const kv_world *w, size_t i, const kv_budget_resolved *c,
                                    const uint32_t *counts, uint32_t l, bool *seen, kv_error *e)
{
    const kv_ranking *rk = &run->plan.ranking[run->plan.ranking_of[i]];
    kv_schedule sch = {0};
    bool scheduled = kv_schedule_needed(&run->spec[i]);
    uint32_t U = kv_units(w, run->spec[i].granularity), rows = w->N - w->L;
    kv_status st = scheduled ? kv_schedule_make(&run->plan, i, c, counts, &run->layer[l], &sch, e) : KV_OK;
    memset(seen, 0, (size_t)U * (rows + 1) * w->N);
    for (uint32_t u = 0; u < U && !st; u++)
        for (uint32_t r = 0; r <= rows; r++) {
            bool *to = seen + ((size_t)u * (rows + 1) + r) * w->N;
            for (uint32_t p = 0; p < w->L + r + (r < rows); p++)
                to[p] = scheduled ? kv_schedule_visible(&sch, run->plan.scene, u, p, r) : p >= w->L;
            for (uint32_t k = 0; k < counts[l * U + u] && !scheduled; k++)
                to[rk->order[((size_t)l * U + u) * w->L + k]] = true;
        }
    if (scheduled) kv_schedule_free(&sch);
    return st;
}

/* ------------------------------------------------------------------------------------- dice, scratch, and the tally of
 * a test */
static inline uint32_t kv_dice(kv_rng *r, uint32_t n)
{
    return (uint32_t)(kv_rng_next(r) >> 33) % n;
}

/* A folder in memory where there is one: hundreds of traces that nobody needs on a disk. */
/* Every string is refused as a policy, as a misuse, with words. */
static inline void kv_refuses(const char *const *bad, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        kv_spec *s = NULL;
        size_t n_spec = 0;
        kv_error e = {""};
        CHECKF(kv_spec_parse(bad[i], &s, &n_spec, &e) == KV_EMISUSE && e.msg[0], "'%s' was taken", bad[i]);
        for (size_t k = 0; k < n_spec; k++) kv_spec_free(&s[k]);
        free(s);
    }
}

static inline bool kv_scratch(char dir[32])
{
    return mkdtemp(strcpy(dir, "/dev/shm/kvtest.XXXXXX")) || mkdtemp(strcpy(dir, "/tmp/kvtest.XXXXXX"));
}

static inline void kv_scratch_remove(const char *dir)
{
    char *rm = kv_format("rm -rf %s", dir);
    if (rm && system(rm)) perror("rm");
    free(rm);
}

typedef struct {
    size_t n, near, bad;
} kv_count;

/* One comparison of a case whose decisions are in kv_gap. Prints the first failures only. */
#define KV_COMPARE(count, same, ...)                                                                                   \
    do {                                                                                                               \
        (count)->n++;                                                                                                  \
        if (kv_gap < KV_NEAR)                                                                                          \
            (count)->near++;                                                                                           \
        else if (!(same) && (count)->bad++ < KV_SHOW)                                                                  \
            printf("  "), printf(__VA_ARGS__), putchar('\n');                                                          \
    } while (0)

/* As many cases as promised, none wrong, and the comparison was not evaded through near ties. */
static inline void kv_judge(const char *what, const kv_count *c, size_t at_least)
{
    printf("%s: %zu cases, %zu near ties\n", what, c->n, c->near);
    CHECKF(c->n >= at_least, "%s: only %zu cases", what, c->n);
    CHECKF(c->near * 20 < c->n, "%s: %zu near ties of %zu", what, c->near, c->n);
    CHECKF(c->bad == 0, "%s: %zu of %zu cases differ", what, c->bad, c->n);
}

#endif
