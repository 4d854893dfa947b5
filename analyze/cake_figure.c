/* cake_figure.c - plot cake: spatial dispersion H, temporal shift V and preference of every layer, and the budgets
 * after each stage of the cascade (CAKE, arXiv 2503.12491; policies.md 4.1 to 4.5), from one trace.
 *
 * Stage l is the moment when layer l has attended: the total is shared by layers 0..l, and what was cut never grows
 * again. */
#include <stdlib.h>

#include "analyze/figure.h"
#include "sim/plan.h"
#include "kernels/parallel.h"
#include "traces/memtext.h"

/* layer,stage,dispersion,shift,share,slots: one row a layer (stage empty), then one a (stage, layer). */
static kv_status put_csv(FILE *f, const kv_plan *p, const kv_budget_resolved *c, kv_error *err)
{
    const kv_scene *sc = p->scene;
    const kv_ranking *r = &p->ranking[0];
    uint32_t n = sc->n_evict, forced = r->n_forced;
    int64_t *b = NULL, each = c->tokens > forced ? (int64_t)c->tokens - forced : 0;
    double *pref = NULL, sum = 0;
    kv_status st = kv_array(&b, n, sizeof *b, err);
    if (!st) st = kv_array(&pref, n, sizeof *pref, err);
    if (!st) kv_cake_preference(&p->spec[0], r, n, c->tokens, pref);
    for (uint32_t l = 0; l < n && !st; l++) sum += pref[l];
    fputs("layer,stage,dispersion,shift,share,slots\n", f);
    for (uint32_t l = 0; l < n && !st; l++)
        fprintf(f, "%u,,%.9g,%.9g,%.9g,\n", sc->info->layer[sc->evict[l]], r->entropy[l], r->variance[l],
                sum > 0 ? pref[l] / sum : 0);
    for (uint32_t stage = 0; stage < n && !st; stage++) {
        st = kv_cake_budgets(pref, stage + 1, each * n, (int64_t)sc->n_cut - forced, true, b, NULL, err);
        for (uint32_t l = 0; l <= stage && !st; l++)
            fprintf(f, "%u,%u,,,,%lld\n", sc->info->layer[sc->evict[l]], sc->info->layer[sc->evict[stage]],
                    (long long)(b[l] + forced));
    }
    free(b), free(pref);
    return st;
}

kv_status kv_figure_cake(const char *plots, const char *folder, const char *trace, const char *budget, kv_error *err)
{
    kv_trace *t = NULL;
    kv_scene sc = {0};
    kv_spec *spec = NULL;
    kv_budget *b = NULL;
    size_t n_spec = 0, n_budget = 0, n_csv = 0;
    kv_plan plan = {0};
    char *csv = NULL, *what = NULL, *tokens = NULL;
    kv_status st = kv_trace_open(trace, &t, err);
    if (!st) st = kv_scene_open(t, "prompt", 0, &sc, err);
    if (!st) st = kv_spec_parse("cake", &spec, &n_spec, err);
    if (!st) st = kv_budget_parse(budget, &b, &n_budget, err);
    if (!st && n_budget != 1) st = kv_fail(err, KV_EMISUSE, "plot cake needs one --budget, got '%s'", budget);
    if (!st) st = kv_plan_build(&sc, spec, n_spec, kv_cpu_count(), &plan, err);
    FILE *f = st ? NULL : kv_text_stream(&csv, &n_csv);
    if (f) {
        kv_budget_resolved c = kv_budget_resolve(b, sc.n_cut, sc.slot_bytes, sc.n_evict, sc.info->n_kv_head);
        st = put_csv(f, &plan, &c, err);
        const kv_trace_info *i = sc.info;
        what = kv_format("%s, prompt %s of %u tokens", i->model ? i->model : "?", i->prompt_id ? i->prompt_id : "?",
                         sc.n_cut);
        tokens = kv_format("%u", c.tokens);
        if (fclose(f) || !what || !tokens) st = kv_fail(err, KV_ENOMEM, "out of memory");
        kv_figure_words w = {{"CAKE's preference", "", what, budget, tokens, ""}};
        if (!st) st = kv_figure_draw(plots, folder, "cake", csv, n_csv, &w, err);
    } else if (!st)
        st = kv_fail(err, KV_ENOMEM, "out of memory");
    free(csv), free(what), free(tokens);
    kv_plan_free(&plan);
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    free(spec), free(b);
    kv_scene_close(&sc);
    kv_trace_close(t);
    return st;
}
