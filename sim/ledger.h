/* ledger.h - what a point costs: slots and bytes kept, held at most, read by every decode step.
 *
 * A slot is one (layer, KV head, token): K and V in the trace's dtype. A query head's entry costs a slot of its own
 * (such a cache stores repeated heads), an entry of a set for the whole layer one in every KV head. Over the layers
 * that evict. */
#ifndef KV_LEDGER_H
#define KV_LEDGER_H

#include "sim/replay.h"

typedef struct {
    uint64_t kept_slots, nominal_slots; /* right after the cut; C in every KV head and layer */
    uint64_t kept_bytes, nominal_bytes;
    uint64_t peak_bytes;    /* sum over layers of the most that a measured row saw */
    uint64_t prefill_bytes; /* most at one time while the prompt goes through, each layer cut as soon as it can be */
    double mean_bytes;      /* over measured rows, later tokens included */
    double match_bytes;     /* what mean_bytes would be with nominal slots and every later token kept */
    double full_bytes;      /* mean over measured rows of a full cache of KV heads */
    double read_bytes;      /* K and V that one decode step reads, mean over measured rows, in whole pages */
    size_t entry_bytes;     /* of one entry of a unit */
    double *unit_read;      /* [n_evict][n_unit] the units' parts of read_bytes */
} kv_ledger;

/* Ledger of point i of a replay; `page` tokens share a page of memory. unit_read is the caller's, room for
 * [n_evict][n_q_head]. */
void kv_ledger_fill(const kv_plan *p, const kv_point *point, const kv_replay *rp, size_t i, uint32_t page,
                    kv_ledger *out);

/* --match-bytes: change point->c (and counts) until mean bytes are as near to match_bytes as whole tokens allow. Points
 * with schedules are replayed for it, once for every bit of the prompt's length. */
kv_status kv_ledger_match(const kv_plan *p, kv_point *point, size_t n_point, uint32_t threads, kv_error *err);

#endif
