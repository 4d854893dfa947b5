/* oracle.h - which oracle a policy is to be measured by, and the parts of a policy that an oracle can take over
 * (metrics.md 5.3; policies.md 9: O6, O12, O13).
 *
 * oracle=rank+heads+layers on any policy of one cut replaces, at the policy's own slots,
 *   rank    the order within each unit by future mass (O13 alone)
 *   heads   the split of each layer's slots over its units
 *   layers  the split of the model's slots over layers; while the heads stay the policy's, each layer shares what it
 *           gets in the policy's proportions
 *   steps   every measured row has its own best set of the same size
 * and oracle=window shows the policy's own scorer rows of the future, at the policy's own counts. So rank+heads+layers
 * is oracle-global at the policy's slots, and heads+layers keeps the policy's order with the best counts (O12).
 * The difference between two such runs is one part's share of the loss. */
#ifndef KV_ORACLE_H
#define KV_ORACLE_H

#include "sim/plan.h"

/* The oracle of the policy's own class: same units, pages and protection, free to move slots where the policy moves
 * them. *spec = its canonical string, NULL when nothing bounds the policy; *class = the class in words. free() both. */
kv_status kv_oracle_of(const kv_spec *s, char **spec, char **class, kv_error *err);

/* Values of oracle= that a decomposition of this policy's loss needs beside the policy itself; 0 when it has none
 * (decode rules, masks, `full`, an oracle's own parts). Those that keep the policy's order are left out where its kept
 * sets are no prefixes of one order. */
#define KV_ORACLE_CORNERS 9
size_t kv_oracle_corners(const kv_spec *s, uint32_t parts[KV_ORACLE_CORNERS]);
/* How a run stands in results.db: base = canonical string of the policy without oracle= and target=, corner = the
 * parts, target = what the oracle maximises ("" with oracle=window). An ordinary policy, or an oracle row whose own
 * slots say oracle=, has its own string and "". kv_corner_free. */
typedef struct {
    char *base, *parts;
    const char *target;
} kv_corner;
kv_status kv_corner_of(const kv_spec *s, kv_corner *out, kv_error *err);
void kv_corner_free(kv_corner *c);
/* What kv_spec_seal checks of oracle= and observe=. */
kv_status kv_oracle_check(const kv_spec *s, bool observes, kv_error *err);

/* The spec of future mass with the units, pages and protection that s has in a prompt of L tokens. kv_spec_free. */
kv_status kv_oracle_future(const kv_spec *s, uint32_t L, kv_spec *out, kv_error *err);

/* Reallocate the items of policy i: counts [n_evict][n_unit] as the policy has them, changed in place. The sum stays.
 * Units that hold less than what is protected stay as they are. */
kv_status kv_oracle_counts(const kv_plan *p, size_t i, uint32_t *counts, kv_error *err);

/* Entries taken from the front of each of n lists of gains [n][m], len [n] <= m long: their sum is min(k, sum of len),
 * their gain large. Each list's sums are replaced by their upper concave hull, steepest segments first; what is left
 * when a segment does not fit goes to the best averages that do (LU-KV, arXiv 2602.08585). Exact where gains descend,
 * else short of the optimum by less than the gain of one segment. */
kv_status kv_hull_alloc(const float *gain, size_t n, size_t m, const uint32_t *len, uint64_t k, uint32_t *won,
                        kv_error *err);

#endif
