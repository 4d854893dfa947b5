/* closed.h - downstream error: the model itself runs on the recorded tokens with the evicted cache (metrics.md 1.6 M5,
 * 2.1, 2.3).
 *
 * The prompt's hidden states never see a cut that comes after them, so its keys and values are those of the trace and
 * no prefill is needed. The rows behind the cut of all points, and of the full cache as the reference, run as branches
 * of one forward pass. Exact for prompt-time policies; decode rules decide, layer by layer, on the evicted model's own
 * queries and keys, so they are exact too. */
#ifndef KV_CLOSED_H
#define KV_CLOSED_H

#include "capture/engine.h"
#include "sim/replay.h"

typedef struct {
    size_t n_point;
    uint32_t n_pred;  /* predictions of tokens P..N-1, from rows P-1..N-2 */
    float *delta_nll; /* [n_point][n_pred] nats: nll with the evicted cache - nll with the full one */
    float *kl;        /* [n_point][n_pred] nats: KL(full || evicted) of the next token */
    float *top1;      /* [n_point][n_pred] 1 = the most likely token is the same */
    float *top5;      /* [n_point][n_pred] share of the five most likely that are the same */
    /* Means over the rows P..N-1 (and query heads): what accumulates where the open loop measures one layer alone. */
    double *head_error;   /* [n_point][n_evict] ||o - o_hat|| / ||o||; in the first layer the open loop's number, on the
                             CPU the same bytes (on a device outputs are rounded to its type before they are compared) */
    double *stream_error; /* [n_point][n_evict] ||x - x_hat|| / ||x|| of the residual stream entering the block */
    double noise; /* mean over predictions of |nll here, full cache - nll in the trace|: the same model, cut into rows
                     in another way. NAN when the trace has none */
    uint32_t n_branch; /* that were run, the full cache among them */
    double wall_s;     /* of the passes, reading the prompt's keys and values from the trace included */
} kv_closed;

/* An engine on a device, kept from trace to trace so that weights are loaded once; engine NULL: not open yet. */
typedef struct {
    kv_engine *engine;
    kv_dtype dtype;
    uint32_t chunk; /* of kv_engine_options; set by the caller */
} kv_closed_device;
void kv_closed_device_close(kv_closed_device *d);
/* KV_EUNSUPPORTED: this policy's sets are not fixed by the cut. */
kv_status kv_closed_on_device(const kv_spec *s, kv_error *err);

/* A model fits a trace when the trace was captured with this very file, and holds all its layers. KV_EMISUSE says what
 * differs; hashes the model file once. */
kv_status kv_closed_check(kv_model *m, const kv_scene *sc, kv_error *err);

/* counts of points as after kv_plan_counts; those of scheduled points are not changed. One prediction a decoded token;
 * the first comes from the prompt's last row, which no cut after the prompt reaches. tick(ctx, share of the work
 * done). device NULL: on the CPU, m with KV_WEIGHTS_F32. Else on a device, in the trace's dtype, m with
 * KV_WEIGHTS_STORED: the policies are those whose sets the cut fixes (KV_EUNSUPPORTED names another). KV_EMISSING when
 * there are no decoded tokens. */
kv_status kv_closed_run(const kv_plan *p, const kv_point *point, size_t n_point, const kv_model *m, uint32_t threads,
                        kv_closed_device *device, void (*tick)(void *ctx, double done), void *ctx, kv_closed *out,
                        kv_error *err);
void kv_closed_free(kv_closed *c);
/* Values of point i, as kv_metric_values gives them: out has room for KV_CLOSED_ROOM(n_layer, n_pred). Step t is the
 * prediction of decoded token t. Returns how many. */
#define KV_CLOSED_ROOM(n_layer, n_pred) (7 + 2 * ((size_t)(n_layer) + 1) + 4 * (size_t)(n_pred))
size_t kv_closed_values(const kv_closed *c, size_t i, const uint32_t *number, uint32_t n_layer, kv_metric_set wanted,
                        int detail, kv_value *out);

#endif
