/* allocation.h - how far the slots of a policy stand from those of the oracle that may move them over the whole model.
 */
#ifndef KV_ALLOCATION_H
#define KV_ALLOCATION_H

#include "analyze/group.h"
#include "analyze/query.h"

/* One line per (model, variant) at s->budget: columns model policy spec granularity page cut protect, moved_units,
 * mean, low, high, n, undefined, label, series, variant. mean = share of the bytes that lie in other layers than
 * oracle-global's (half the sum of the differences of the layers' shares); moved_units = the same over (layer, head)
 * units, NULL where the oracle has another granularity. Policies without an oracle-global run of the same trace, page,
 * cut and protection are left out; no line at all when there is none. */
kv_status kv_allocation_load(kv_db *db, const kv_selection *s, kv_sheet *out, kv_group_note *note, kv_error *err);
/* The table of it, with a head line and a line that explains it; nothing for an empty sheet. */
kv_status kv_allocation_print(FILE *f, const kv_sheet *s, kv_error *err);

#endif
