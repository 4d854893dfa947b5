/* memory.h - --mem-limit: how many layers may be in work at a time. Layers are loaded, ranked or measured, and let go
 * one by one, so a trace may be larger than memory; one layer must fit. The numbers are upper bounds for what this
 * process allocates, code and libraries among them. */
#ifndef KV_MEMORY_H
#define KV_MEMORY_H

#include "sim/plan.h"
#include "sim/replay.h"

/* Bytes that a layer takes while it is ranked (every ranking of the plan after another) or measured. */
uint64_t kv_memory_rank(const kv_plan *p);
uint64_t kv_memory_measure(const kv_plan *p, size_t n_point, kv_metric_set wanted);
/* Bytes that stay for the whole run: orders and scores of the rankings; with points their counts and sums too. */
uint64_t kv_memory_held(const kv_plan *p, size_t n_point, kv_metric_set wanted);
/* Lower *threads to what fits under the scene's mem_limit (0: any number) when each thread holds `task` bytes and all
 * together `held`. KV_EMISUSE when not even one fits; it says what would do. doing = "ranking", "measuring". */
kv_status kv_memory_fit(const kv_scene *sc, const char *doing, uint64_t held, uint64_t task, uint32_t *threads,
                        kv_error *err);

#endif
