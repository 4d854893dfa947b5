/* record.h - the hook that writes what an engine computes into a trace, from memory or, block by block and without
 * waiting, from a device.
 *
 *   level    streams of every recorded layer                                    of the whole trace
 *   tokens                                                                      tokens, offsets, text
 *   stats    lse, rowstat, xnorm, colsum (and colsum_ctx)                       + nll, logits
 *   obs      + k, v, w_o; q of the last obs_rows rows before each cut point and of all decode rows
 *   qkv      + q of all rows
 *
 * A layer's rows are written when the layer is done, so that a trace whose capture was killed holds whole layers. Works
 * for the whole sequence in one call and for a prompt followed by one row a call; decode rows are then written in
 * blocks of 64. */
#ifndef KV_RECORD_H
#define KV_RECORD_H

#include "capture/engine.h"
#include "traces/trace.h"

typedef enum { KV_RECORD_TOKENS, KV_RECORD_STATS, KV_RECORD_OBS, KV_RECORD_QKV, KV_RECORD_COUNT } kv_record_level;
const char *kv_record_name(kv_record_level l); /* "tokens" "stats" "obs" "qkv" */
bool kv_record_parse(const char *s, kv_record_level *out);

#define KV_RECORD_TOP_K    64u /* next-token logits kept per decode row */
#define KV_RECORD_OBS_ROWS 64u

typedef struct {
    kv_record_level level;
    uint32_t map_rows; /* attention map of the last map_rows prompt rows; 0 = none */
    bool map_full;     /* attention map of all rows */
    bool wo;           /* put W_O of each layer into the trace */
    uint32_t threads;  /* for column sums, maps and next-token statistics; the bytes do not depend on it */
} kv_record_options;

/* raw[stream] = bytes before compression of everything that depends on the shape; `n_text` bytes of text. W_O is
 * counted when o->wo. KV_EUNSUPPORTED when the sum passes 2^63. */
kv_status kv_record_sizes(const kv_trace_info *info, const kv_record_options *o, uint32_t n_vocab, size_t n_text,
                          uint64_t raw[32], kv_error *err);

typedef struct kv_recorder kv_recorder;

/* All pointers are borrowed and must outlive the recorder. info: N and P are final. token [N]: token[r + 1] must be
 * known when the logits of row r arrive. Nothing is written before the first call of the hook. */
kv_status kv_recorder_open(const kv_trace_info *info, const kv_record_options *o, const kv_model *m,
                           const uint32_t *token, kv_trace_writer *w, kv_recorder **out, kv_error *err);
/* For kv_engine_run. The prompt must arrive in one call that begins at row 0. */
kv_engine_hook kv_recorder_hook(kv_recorder *r);
/* Rows still held back, nll and logits. All N rows must have been run. */
kv_status kv_recorder_finish(kv_recorder *r, kv_error *err);
void kv_recorder_close(kv_recorder *r); /* NULL accepted */

#endif
