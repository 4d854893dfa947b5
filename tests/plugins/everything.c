/* everything - a score made of all a plug-in can ask for, with parameters and a state of its own. */
#include <stdio.h>
#include <stdlib.h>

#include "kvtrace_policy.h"

typedef struct {
    double a, b;
} weights;

static int init(const char *params, void **state, char *err, size_t size)
{
    weights *w = malloc(sizeof *w);
    *state = w;
    if (!w || sscanf(params, "a=%lf,b=%lf", &w->a, &w->b) != 2) {
        free(w);
        return snprintf(err, size, "want two numbers");
    }
    return 0;
}

static double dot(uint32_t n, const float *x, const float *y)
{
    double sum = 0;
    for (uint32_t j = 0; j < n; j++) sum += (double)x[j] * (double)y[j];
    return sum;
}

/* a * (column sum + attention of the newest row) + b * (key . newest query) * (value . first row of W_O) + key . query
 * of its own row, summed over the unit's query heads */
static int score(const kv_plugin_layer *l, const kv_plugin_unit *u, const void *state, float *out, char *err,
                 size_t size)
{
    const weights *w = state;
    uint32_t d = l->head_dim;
    if (!l->q || !l->probs || !l->colsum || !l->wo || l->group * l->n_kv_head != l->n_q_head ||
        u->n_q != l->n_q_head / l->n_unit)
        return snprintf(err, size, "something is missing");
    for (uint32_t i = 0; i < l->L; i++) {
        double sum = 0;
        for (uint32_t h = u->q_first; h < u->q_first + u->n_q; h++) {
            const float *k = kv_plugin_key(l, h / l->group, i), *v = kv_plugin_value(l, h / l->group, i);
            sum += w->a * (double)(l->colsum[(size_t)h * l->L + i] + kv_plugin_prob_row(l, h, l->window - 1)[i]);
            sum += w->b * dot(d, k, kv_plugin_query(l, h, l->L - 1)) * dot(d, v, l->wo + (size_t)h * d);
            sum += (double)l->scale * dot(d, k, kv_plugin_query(l, h, i));
        }
        out[i] = (float)sum;
    }
    return 0;
}

const kv_plugin *kv_plugin_entry(void)
{
    static const kv_plugin me = {.abi = KV_PLUGIN_ABI,
                                 .size = sizeof me,
                                 .name = "everything",
                                 .summary = "all there is",
                                 .paper = "none",
                                 .needs = KV_PLUGIN_NEEDS_PROBS | KV_PLUGIN_NEEDS_ALL_QUERIES | KV_PLUGIN_NEEDS_COLSUM |
                                          KV_PLUGIN_NEEDS_WO,
                                 .window = 2,
                                 .granularity = KV_PLUGIN_PER_QUERY_HEAD,
                                 .params = "a=1,b=0.5",
                                 .init = init,
                                 .fini = free,
                                 .score = score};
    return &me;
}
