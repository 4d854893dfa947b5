/* gap_closed.c - how much of the way to the oracle. */
#include "sim/gap_closed.h"

#include <math.h>
#include <stdlib.h>

/* recall_contested over all layers and heads. */
static kv_status contested(const kv_scene *sc, const kv_replay *rp, size_t point, double *out, kv_error *err)
{
    kv_value v[KV_M_COUNT + 1];
    size_t n_head = (size_t)sc->n_evict * sc->info->n_q_head;
    kv_point_sums in = {
        .n_layer = sc->n_evict, .n_q_head = sc->info->n_q_head, .n_row = sc->n_row, .head = rp->head + point * n_head};
    if (kv_metric_values(&in, KV_M_BIT(KV_M_RECALL_CONTESTED), KV_DETAIL_RUN, v) != 1)
        return kv_fail(err, KV_ENOMEM, "out of memory");
    *out = v[0].value;
    return KV_OK;
}

/* `streaming` or `oracle` with what policy s may not choose for itself. */
static kv_status frame(const kv_spec *s, uint32_t granularity, const char *name, kv_spec **out, size_t *n,
                       kv_error *err)
{
    static const char *const GRANULARITY[] = {"query_head", "kv_head", "layer"};
    char number[16];
    kv_status st = kv_spec_parse(name, out, n, err);
    if (st) return st;
    kv_spec *f = &(*out)[*n - 1];
    const struct {
        const char *name;
        uint32_t value;
    } P[] = {{"protect_sink", s->protect_sink}, {"protect_recent", s->protect_recent}, {"page", s->page ? s->page : 1}};
    st = kv_spec_set(f, "granularity", GRANULARITY[granularity], err);
    for (size_t i = 0; i < sizeof P / sizeof *P && !st; i++) {
        snprintf(number, sizeof number, "%u", P[i].value);
        st = kv_spec_set(f, P[i].name, number, err);
    }
    if (!st && s->protect_segment) st = kv_spec_set(f, "protect_segment", s->protect_segment, err);
    return st ? st : kv_spec_seal(f, err);
}

/* Index of the spec with f's canonical string among the first n, where f = the last; f is dropped when it is there. */
static size_t known(kv_spec *all, size_t *n)
{
    size_t i = 0;
    while (strcmp(all[i].canonical, all[*n - 1].canonical)) i++;
    if (i < *n - 1) kv_spec_free(&all[--*n]);
    return i;
}

kv_status kv_gap_closed(const kv_plan *p, const kv_point *point, size_t n_point, const kv_replay *rp, uint32_t threads,
                        double *gap, kv_error *err)
{
    const kv_scene *sc = p->scene;
    kv_spec *spec = NULL;
    size_t n_spec = 0, n = 0, *at = NULL; /* at [n_point][2]: of base and oracle among `mark` */
    kv_point *mark = NULL;
    kv_plan plan = {0};
    kv_replay marks = {0};
    kv_status st = kv_array(&at, 2 * n_point, sizeof *at, err);
    if (!st) st = kv_array(&mark, 2 * n_point, sizeof *mark, err);
    for (size_t i = 0; i < n_point && !st; i++) {
        const kv_ranking *rk = &p->ranking[p->ranking_of[point[i].spec]];
        size_t units = (size_t)sc->n_evict * rk->n_unit;
        uint64_t sum = 0;
        for (size_t k = 0; k < units; k++) sum += point[i].counts[k];
        uint32_t C = (uint32_t)((sum + units / 2) / units);
        for (int oracle = 0; oracle < 2 && !st; oracle++) {
            st = frame(&p->spec[point[i].spec], rk->granularity, oracle ? "oracle" : "streaming", &spec, &n_spec, err);
            if (st) break;
            size_t s = known(spec, &n_spec), k = 0;
            while (k < n && (mark[k].spec != s || mark[k].c.tokens != C)) k++;
            if (k == n)
                mark[n++] = (kv_point){
                    .spec = s,
                    .nominal = C,
                    .c = {.tokens = C, .real = C, .share = (double)C / sc->n_cut, .frac = (double)C / sc->n_cut}};
            at[2 * i + oracle] = k;
        }
    }
    if (!st) st = kv_plan_build(sc, spec, n_spec, threads, &plan, err);
    for (size_t k = 0; k < n && !st; k++) {
        size_t units = (size_t)sc->n_evict * plan.ranking[plan.ranking_of[mark[k].spec]].n_unit;
        st = kv_array(&mark[k].counts, units, sizeof *mark[k].counts, err);
        if (!st) st = kv_plan_counts(&plan, mark[k].spec, &mark[k].c, mark[k].counts, err);
    }
    if (!st) st = kv_replay_run(&plan, mark, n, KV_M_BIT(KV_M_RECALL_CONTESTED), threads, NULL, NULL, &marks, err);
    for (size_t i = 0; i < n_point && !st; i++) {
        double own, base, oracle;
        st = contested(sc, rp, i, &own, err);
        if (!st) st = contested(sc, &marks, at[2 * i], &base, err);
        if (!st) st = contested(sc, &marks, at[2 * i + 1], &oracle, err);
        gap[i] = !st && oracle - base >= KV_GAP_LEAST ? (own - base) / (oracle - base) : NAN;
    }
    for (size_t k = 0; k < n; k++) free(mark[k].counts);
    for (size_t k = 0; k < n_spec; k++) kv_spec_free(&spec[k]);
    kv_replay_free(&marks);
    kv_plan_free(&plan);
    free(spec), free(mark), free(at);
    return st;
}
