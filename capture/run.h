/* run.h - one capture: from a job to a finished trace. */
#ifndef KV_RUN_H
#define KV_RUN_H

#include "capture/job.h"
#include "capture/record.h"

typedef struct {
    kv_record_level level;
    uint32_t map_rows; /* as kv_record_options */
    bool map_full;
    kv_dtype dtype;
    const char *wo;        /* "auto", "embed", "none", or the path of a side file to share between folders */
    const char *shard;     /* I/N where other processes may write into the same folder, or NULL */
    const uint32_t *layer; /* [n_layer] ascending; NULL = all */
    uint32_t n_layer;
    uint32_t threads;
    bool cuda; /* run on CUDA devices, `gpus` of them (0 = one) */
    uint32_t gpus;
    kv_engine **engine; /* a CUDA engine kept between jobs of one model; the caller closes it. NULL: one for each job */
    const char *logits; /* .npy file for logits, or NULL */
    const uint32_t *logit_row; /* [n_logit_row]; NULL = all rows */
    uint32_t n_logit_row;
    char *wo_sha256; /* [65] hash of the model's W_O, kept between jobs; "" = not known yet. NULL accepted */
} kv_capture_request;

/* What a job will write, known before the model runs. */
typedef struct {
    kv_trace_info info;
    kv_record_options record;
    uint64_t raw[32], total; /* bytes before compression, by stream, and their sum */
    bool wo_side;            /* W_O goes into a file of its own, `wo_bytes` long before compression */
    uint64_t wo_bytes;
} kv_capture_plan;

/* The model may be open without its weights. desc.sha256, when filled, goes into the trace. */
kv_status kv_capture_plan_open(const kv_model *m, const kv_capture_request *q, const kv_job *j, kv_capture_plan *out,
                               kv_error *err);
void kv_capture_plan_close(kv_capture_plan *p);
/* True when `path` is a finished trace of the same run: model, tokens, level, dtype, layers, cut points, maps, W_O. */
bool kv_capture_plan_done(const kv_capture_plan *p, const kv_job *j, const char *path);

typedef enum { KV_STAGE_COMPUTE, KV_STAGE_COPY, KV_STAGE_COMPRESS, KV_STAGE_DISK, KV_STAGE_COUNT } kv_stage;
const char *kv_stage_name(kv_stage s); /* "compute", "copy", "compression", "disk" */

typedef struct {
    double run_s;         /* seconds of the capture; weights are in place by then where the engine is kept */
    double model_s;       /* seconds of it until the last block of the model's was written */
    double load_s;        /* seconds that opening the engine took (weights on their way to a device) */
    uint64_t raw, stored; /* bytes of all streams before and after compression */
    /* The stages work side by side: the share of model_s that each was busy (of all its threads), and the busiest. On
     * the CPU compute is what is left of the time. */
    double busy[KV_STAGE_COUNT];
    kv_stage limit;
    uint32_t threads; /* that compressed */
    kv_engine_usage engine;
} kv_capture_result;

/* Runs the model and writes `path`; on failure PATH.partial holds the layers that were done. Fills the job's greedy
 * tokens. */
kv_status kv_capture_plan_run(kv_capture_plan *p, const kv_model *m, const kv_capture_request *q, kv_job *j,
                              const char *path, kv_capture_result *out, kv_error *err);

#endif
