/* plugin - the number comes from a loaded file (kvtrace_policy.h): the layer is shown as it asked for it and as if it
 * were alone, whatever other policies made the layer load, and no score that is not finite gets through. */
#include <math.h>

#include "sim/plugin.h"
#include "sim/scorer.h"

static kv_status show(kv_layer *l, const kv_spec *s, kv_plugin_layer *v, kv_error *err)
{
    unsigned needs = s->plugin->entry->needs;
    uint32_t w = s->window < l->L ? s->window : l->L;
    *v = (kv_plugin_layer){.layer = l->number,
                           .index = l->order,
                           .n_layer = l->scene->n_evict,
                           .n_q_head = l->n_q_head,
                           .n_kv_head = l->n_kv_head,
                           .group = l->group,
                           .head_dim = l->d,
                           .hidden = l->scene->info->hidden,
                           .L = l->L,
                           .window = w,
                           .granularity = s->granularity,
                           .n_unit = kv_unit_count(l, s->granularity),
                           .scale = l->scale,
                           .softcap = l->softcap,
                           .kv_stride = l->scene->n_token,
                           .k = l->k,
                           .v = l->v};
    if (needs & KV_PLUGIN_NEEDS_ALL_QUERIES)
        v->q = l->q_all, v->q_stride = l->L;
    else if (needs & KV_PLUGIN_NEEDS_WINDOW_QUERIES && l->q_win)
        v->q = l->q_win + (size_t)(l->max_window - w) * l->d, v->q_stride = l->max_window, v->q_first = l->L - w;
    if (needs & KV_PLUGIN_NEEDS_COLSUM) v->colsum = l->colsum;
    if (needs & KV_PLUGIN_NEEDS_WO) v->wo = l->wo;
    return needs & KV_PLUGIN_NEEDS_PROBS ? kv_layer_probs(l, w, &v->probs, err) : KV_OK;
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    static const char *const kind[] = {"query head", "KV head", "all heads, set"};
    const kv_plug *p = s->plugin;
    kv_plugin_layer v;
    kv_status st = show(l, s, &v, err);
    for (uint32_t u = 0; u < v.n_unit && !st; u++) {
        kv_plugin_unit unit = {.index = u};
        float *to = out + (size_t)u * l->L;
        char why[KV_PLUG_REASON] = "";
        kv_unit_heads(l, s->granularity, u, &unit.q_first, &unit.n_q);
        unit.kv_first = unit.q_first / l->group;
        unit.n_kv = (unit.n_q + l->group - 1) / l->group;
        int rc = p->entry->score(&v, &unit, p->state, to, why, sizeof why);
        if (rc)
            st = kv_fail(err, KV_EFORMAT, "plug-in '%s' failed at layer %u, %s %u: %s", p->path, l->number,
                         kind[s->granularity], u, kv_plug_reason(why));
        for (uint32_t i = 0; i < l->L && !st; i++)
            if (!isfinite(to[i]))
                st = kv_fail(err, KV_EFORMAT,
                             "plug-in '%s' scored layer %u, %s %u, position %u with %s: scores must be finite", p->path,
                             l->number, kind[s->granularity], u, i,
                             isnan(to[i]) ? "nan"
                             : to[i] > 0  ? "inf"
                                          : "-inf");
    }
    return st;
}

const kv_scorer kv_scorer_plugin = {"plugin", "a number from a plug-in", "window", 0, false, false, score};
