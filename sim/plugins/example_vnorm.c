/* example_vnorm - a whole plug-in: what a position contributes to the output of attention,
 *     s_i = (mean over the unit's query heads and the last 32 rows of a_i) * (mean over its KV heads of ||v_i||_2)
 * after VATP (arXiv 2406.12335), which takes column sums and the L1 norm.
 * tests/test_plugin.c holds it against a twin. */
#include <math.h>

#include "kvtrace_policy.h"

static int score(const kv_plugin_layer *l, const kv_plugin_unit *u, const void *state, float *out, char *err,
                 size_t size)
{
    (void)state, (void)err, (void)size;
    for (uint32_t i = 0; i < l->L; i++) {
        double a = 0, v = 0;
        for (uint32_t h = u->q_first; h < u->q_first + u->n_q; h++)
            for (uint32_t r = 0; r < l->window; r++) a += (double)kv_plugin_prob_row(l, h, r)[i];
        for (uint32_t h = u->kv_first; h < u->kv_first + u->n_kv; h++) {
            double sum = 0;
            for (uint32_t j = 0; j < l->head_dim; j++) sum += pow((double)kv_plugin_value(l, h, i)[j], 2);
            v += sqrt(sum);
        }
        out[i] = (float)(a / (u->n_q * l->window) * v / u->n_kv);
    }
    return 0;
}

const kv_plugin *kv_plugin_entry(void)
{
    static const kv_plugin me = {.abi = KV_PLUGIN_ABI,
                                 .size = sizeof me,
                                 .name = "vnorm",
                                 .paper = "after VATP, arXiv 2406.12335",
                                 .summary = "attention of the last rows times the norm of the value",
                                 .needs = KV_PLUGIN_NEEDS_PROBS,
                                 .window = 32,
                                 .granularity = KV_PLUGIN_PER_KV_HEAD,
                                 .score = score};
    return &me;
}
