/* scorers.c - the list of scorers. */
#include "sim/plugin.h"
#include "sim/schedule.h"
#include "sim/scorer.h"

#define X(name) &kv_scorer_##name,
const kv_scorer *const kv_scorers[] = {KV_SCORER_LIST(X)};
#undef X
const size_t kv_n_scorers = sizeof kv_scorers / sizeof *kv_scorers;

unsigned kv_spec_needs(const kv_spec *s)
{
    unsigned n = kv_scorers[s->scorer]->needs | kv_decode_rules[s->decode].needs;
    if (s->plugin) n |= kv_plug_needs(s->plugin);
    if (s->layers == KV_LAYERS_CAKE || s->value == KV_VALUE_LOO || s->select == KV_SELECT_MASS) n |= KV_NEED_WINDOW;
    if (s->value == KV_VALUE_WO_L1 || s->value == KV_VALUE_WO_SHARE || s->select == KV_SELECT_TWO_STAGE ||
        s->layer_weight)
        n |= KV_NEED_WO;
    if (s->decode || s->oracle || s->observe) n |= KV_NEED_FUTURE;
    return n;
}
