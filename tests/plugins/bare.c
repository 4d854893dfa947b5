/* bare - asks for nothing beyond keys and values, and fails when it is shown more: what a plug-in sees must not hang on
 * which policies run beside it. */
#include <stdio.h>

#include "kvtrace_policy.h"

static int score(const kv_plugin_layer *l, const kv_plugin_unit *u, const void *state, float *out, char *err,
                 size_t size)
{
    (void)state;
    if (l->q || l->probs || l->colsum || l->wo) return snprintf(err, size, "shown more than it asked for");
    for (uint32_t i = 0; i < l->L; i++)
        if (out[i] != 0) return snprintf(err, size, "scores of unit %u are not zero on entry", u->index);
    for (uint32_t i = 0; i < l->L; i++) out[i] = -kv_plugin_key(l, u->kv_first, i)[0];
    return 0;
}

const kv_plugin *kv_plugin_entry(void)
{
    static const kv_plugin me = {.abi = KV_PLUGIN_ABI,
                                 .size = sizeof me,
                                 .name = "bare",
                                 .summary = "keys and values only",
                                 .paper = "none",
                                 .granularity = KV_PLUGIN_PER_LAYER,
                                 .score = score};
    return &me;
}
