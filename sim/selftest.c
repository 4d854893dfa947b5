/* selftest.c - `kv-sim selftest`: what must hold on any trace, whatever the policy (metrics.md 8.2). */
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>

#include "kernels/parallel.h"
#include "sim/commands.h"
#include "sim/replay.h"

typedef struct {
    unsigned passed, failed;
} tally;

static void check(tally *t, bool ok, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
static void check(tally *t, bool ok, const char *fmt, ...)
{
    va_list ap;
    ok ? t->passed++ : t->failed++;
    if (ok) return;
    va_start(ap, fmt);
    fputs("FAIL ", stdout), vprintf(fmt, ap), putchar('\n');
    va_end(ap);
}

/* Column sums add up to the number of prompt rows, for each head. */
static kv_status column_sums(const kv_scene *sc, tally *t, kv_error *err)
{
    float *c = NULL;
    kv_status st = kv_array(&c, sc->info->n_prompt, sizeof *c, err);
    for (uint32_t l = 0; l < sc->info->n_layer && !st; l++)
        for (uint32_t h = 0; h < sc->info->n_q_head && !st; h++) {
            uint32_t layer = sc->info->layer[l], P = sc->info->n_prompt;
            if (!kv_trace_has(sc->trace, KV_S_COLSUM, layer, h, 0, P)) continue;
            st = kv_trace_read_f32(sc->trace, KV_S_COLSUM, layer, h, 0, P, c, err);
            double sum = 0;
            for (uint32_t i = 0; i < P; i++) sum += c[i];
            if (!st)
                check(t, fabs(sum - P) <= 1e-4 * P, "layer %u head %u: column sums add up to %.6f for %u rows", layer,
                      h, sum, P);
        }
    free(c);
    return st;
}

static kv_status one_trace(const char *path, tally *t, kv_error *err)
{
    static const char POLICIES[] = "full,random,recency,streaming,knorm,h2o,tova,snapkv,pyramidkv,ada-snapkv,ada-"
                                   "pyramidkv,cake,oracle,oracle-layer,oracle-global";
    static const char BUDGETS[] = "0,1,2%,5%,10%,20%,50%,100%";
    kv_trace *tr = NULL;
    kv_scene sc = {0};
    kv_spec *spec = NULL;
    kv_budget *budget = NULL;
    kv_plan plan = {0};
    kv_replay rp = {0};
    kv_point *point = NULL;
    size_t n_spec = 0, n_budget = 0, n = 0;
    double *all = NULL; /* [spec][budget] recall */
    kv_status st = kv_trace_open(path, &tr, err);
    if (!st)
        st = kv_scene_open(tr, "prompt", kv_trace_get_info(tr)->n_token == kv_trace_get_info(tr)->n_prompt ? 1 : 0, &sc,
                           err);
    if (!st) st = column_sums(&sc, t, err);
    if (!st) st = kv_spec_parse(POLICIES, &spec, &n_spec, err);
    if (!st) st = kv_budget_parse(BUDGETS, &budget, &n_budget, err);
    if (!st) st = kv_plan_build(&sc, spec, n_spec, kv_cpu_count(), &plan, err);
    if (!st) st = kv_array(&point, n_spec * n_budget, sizeof *point, err);
    if (!st) st = kv_array(&all, n_spec * n_budget, sizeof *all, err);
    for (size_t i = 0; i < n_spec && !st; i++)
        for (size_t b = 0; b < n_budget && !st; b++, n++) {
            point[n] =
                (kv_point){.spec = i,
                           .budget = b,
                           .c = kv_budget_resolve(&budget[b], sc.n_cut, sc.slot_bytes, sc.n_evict, sc.info->n_kv_head)};
            st = kv_array(&point[n].counts, (size_t)sc.n_evict * plan.ranking[plan.ranking_of[i]].n_unit,
                          sizeof(uint32_t), err);
            if (!st) st = kv_plan_counts(&plan, i, &point[n].c, point[n].counts, err);
        }
    if (!st) st = kv_replay_run(&plan, point, n, KV_M_ALL, kv_cpu_count(), NULL, NULL, &rp, err);
    for (size_t i = 0; i < n && !st; i++) {
        const kv_head_sums *h = rp.head + i * sc.n_evict * sc.info->n_q_head;
        const char *who = spec[point[i].spec].row->name;
        double worst = 0, sum = 0;
        for (size_t k = 0; k < (size_t)sc.n_evict * sc.info->n_q_head; k++) {
            double R = h[k].recall / h[k].n;
            check(t, R >= 0 && R <= 1 && h[k].recall_min >= 0, "%s %s: recall %.9f outside [0,1]", who,
                  budget[point[i].budget].text, R);
            if (h[k].head_error > worst) worst = h[k].head_error;
            sum += R;
        }
        all[i] = sum / ((double)sc.n_evict * sc.info->n_q_head);
        if (point[i].c.tokens == sc.n_cut)
            check(t, all[i] == 1 && worst == 0, "%s at the full budget: recall %.9f, head error %.3g", who, all[i],
                  worst);
        if (i % n_budget && !strncmp(spec[point[i].spec].row->nested, "yes", 3))
            check(t, all[i] >= all[i - 1] - 1e-9, "%s: recall falls from %.9f to %.9f between %s and %s", who,
                  all[i - 1], all[i], budget[i % n_budget - 1].text, budget[i % n_budget].text);
    }
    for (size_t i = 0; i < n * sc.n_evict && !st && rp.bound; i++) {
        const kv_bound_sums *b = &rp.bound[i];
        const kv_point *x = &point[i / sc.n_evict];
        check(t, b->tightest <= 1 + 1e-4 && b->disorder <= 1 + 1e-4,
              "%s %s: the error of a row is %.6f of CriticalKV's bound; bounds out of order by %.6f",
              spec[x->spec].row->name, budget[x->budget].text, b->tightest, b->disorder);
    }
    /* the oracle of the same class, protection and slots is never beaten */
    for (size_t i = 0; i < n && !st; i++) {
        const kv_spec *s = &spec[point[i].spec];
        size_t oracle = s->granularity != KV_GRAN_KV_HEAD || (s->window != 32)           ? n_spec
                        : s->layers == KV_LAYERS_UNIFORM && s->heads == KV_HEADS_UNIFORM ? n_spec - 3
                                                                                         : n_spec - 1;
        uint64_t slots = kv_plan_slots(&plan, point[i].spec, point[i].counts),
                 nominal = (uint64_t)point[i].c.tokens * sc.n_evict * sc.info->n_kv_head;
        if (oracle < n_spec && slots <= nominal && point[i].c.tokens >= 32)
            check(t, all[i] <= all[oracle * n_budget + point[i].budget] + 1e-6, "%s %s: recall %.9f beats %s's %.9f",
                  s->row->name, budget[point[i].budget].text, all[i], spec[oracle].row->name,
                  all[oracle * n_budget + point[i].budget]);
    }
    for (size_t i = 0; i < n; i++) free(point[i].counts);
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    free(point), free(spec), free(budget), free(all);
    kv_replay_free(&rp);
    kv_plan_free(&plan);
    kv_scene_close(&sc);
    kv_trace_close(tr);
    return st;
}

kv_status kv_sim_selftest(int argc, char **argv, kv_error *err)
{
    kv_list rest = {0};
    bool help = false;
    tally t = {0};
    kv_opt opts[] = {{"help", 'h', KV_OPT_FLAG, &help}, {0}};
    kv_status st = kv_cli_parse(argc, argv, opts, &rest, err);
    if (!st && help) {
        printf("usage: kv-sim selftest TRACE..\n\nChecks identities on each trace: recall in [0,1] and non-decreasing "
               "for nested policies, nothing lost at\n"
               "the full budget, column sums, errors below the papers' bounds, the oracle of the same class never "
               "beaten.\n\n  kv-sim selftest "
               "traces/samples/prose.kvt\n  kv-sim selftest traces/samples/*.kvt\n");
        goto out;
    }
    if (!st && !rest.n) st = kv_fail(err, KV_EMISUSE, "no trace given");
    for (size_t i = 0; i < rest.n && !st; i++) st = one_trace(rest.v[i], &t, err);
    if (!st) printf("%u passed, %u failed\n", t.passed, t.failed);
    if (!st && t.failed) st = kv_fail(err, KV_EFORMAT, "%u identities do not hold", t.failed);
out:
    kv_list_free(&rest);
    return st;
}
