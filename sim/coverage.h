/* coverage.h - what kept sets hold of the prompt, without attention: evidence spans and breadth.
 *
 * KVDiagnosis (arXiv 2608.09412) counts slots first: the share of the evidence that each unit keeps, then the mean over
 * units; GER (arXiv 2603.01426) asks which evidence tokens no head keeps at all. Breadth (K-VEC, arXiv 2606.29563) is
 * how many distinct positions the slots hold. Sets that change from row to row (decode rules, masks) count as the mean
 * over the measured rows of what the row sees. */
#ifndef KV_COVERAGE_H
#define KV_COVERAGE_H

#include <pthread.h>

#include "sim/metric.h"
#include "sim/schedule.h"

/* Evidence of a trace as tokens before the cut. */
typedef struct {
    uint32_t n_span, n_token;
    uint32_t *first, *past; /* [n_span] tokens first..past-1 of each span, at least one */
    uint32_t *token;        /* [n_token] of all spans together, ascending, each once */
} kv_evidence;

/* n_token = 0 when the trace marks no evidence before the cut, or has no byte offsets. */
kv_status kv_evidence_open(const kv_scene *sc, kv_evidence *out, kv_error *err);
void kv_evidence_close(kv_evidence *e);

/* Position i of the prompt is seen by rows 0..until[i]-1 of some unit of some layer; rows that may see it again
 * are in `seen` instead. */
typedef struct {
    uint32_t rows;   /* that are told apart: 1 where the set does not change, else n_row */
    uint32_t *until; /* [n_cut] */
    uint8_t *seen;   /* NULL, or [n_row][(n_cut+7)/8] */
} kv_model_cover;

typedef struct {
    const kv_plan *plan;
    size_t n_point;
    kv_evidence evidence;
    double *kept, *half;   /* [n_point][n_evict][n_q_head]: evidence_kept, evidence_span_half of the head's set */
    kv_layer_cover *layer; /* [n_point][n_evict] */
    kv_model_cover *model; /* [n_point] */
    pthread_mutex_t lock;  /* of model */
} kv_coverage;

kv_status kv_coverage_open(const kv_plan *p, size_t n_point, kv_coverage *out, kv_error *err);
void kv_coverage_close(kv_coverage *c);
/* Layer `layer` (among the evicting ones) of a point of policy i: the first counts[unit] of each order, or the schedule
 * when sch is not NULL. Safe from several threads on different layers. */
kv_status kv_coverage_add(kv_coverage *c, size_t point, size_t i, const uint32_t *counts, uint32_t layer,
                          const kv_schedule *sch, kv_error *err);
/* Over all layers, after all were added: share of the evidence tokens that no head of the model sees; distinct
 * positions over all slots. */
void kv_coverage_model(const kv_coverage *c, size_t point, double *lost, double *breadth);

#endif
