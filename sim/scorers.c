/* scorers.c - the list of scorers. */
#include "sim/scorer.h"

#define X(name) extern const kv_scorer kv_scorer_##name;
KV_SCORER_LIST(X)
#undef X
#define X(name) &kv_scorer_##name,
const kv_scorer *const kv_scorers[] = {KV_SCORER_LIST(X)};
#undef X
const size_t kv_n_scorers = sizeof kv_scorers / sizeof *kv_scorers;
