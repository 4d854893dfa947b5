/* scorers.c - the list of scorers. */
#include "sim/plugin.h"
#include "sim/scorer.h"

#define X(name) extern const kv_scorer kv_scorer_##name;
KV_SCORER_LIST(X)
#undef X
#define X(name) &kv_scorer_##name,
const kv_scorer *const kv_scorers[] = {KV_SCORER_LIST(X)};
#undef X
const size_t kv_n_scorers = sizeof kv_scorers / sizeof *kv_scorers;

unsigned kv_scorer_needs(const kv_spec *s)
{
    return kv_scorers[s->scorer]->needs | (s->plugin ? kv_plug_needs(s->plugin) : 0);
}
