/* queries - the window's queries without their probabilities: minus the key's mean product with them. */
#include "kvtrace_policy.h"

static int score(const kv_plugin_layer *l, const kv_plugin_unit *u, const void *state, float *out, char *err,
                 size_t size)
{
    (void)state, (void)err, (void)size;
    if (l->probs || l->q_first != l->L - l->window) return 1;
    for (uint32_t i = 0; i < l->L; i++) {
        double sum = 0;
        for (uint32_t h = u->q_first; h < u->q_first + u->n_q; h++)
            for (uint32_t r = l->L - l->window; r < l->L; r++)
                for (uint32_t j = 0; j < l->head_dim; j++)
                    sum -= (double)kv_plugin_key(l, h / l->group, i)[j] * (double)kv_plugin_query(l, h, r)[j];
        out[i] = (float)sum;
    }
    return 0;
}

const kv_plugin *kv_plugin_entry(void)
{
    static const kv_plugin me = {.abi = KV_PLUGIN_ABI,
                                 .size = sizeof me,
                                 .name = "queries",
                                 .summary = "the window's queries",
                                 .paper = "none",
                                 .needs = KV_PLUGIN_NEEDS_WINDOW_QUERIES,
                                 .window = 3,
                                 .granularity = KV_PLUGIN_PER_KV_HEAD,
                                 .score = score};
    return &me;
}
