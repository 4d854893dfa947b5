/* gpu_pass.h - a replay on a device.
 *
 *   gpu_pass.c     layers of the trace on the device, lanes that work on them
 *   rank_gpu.c     rankings: the same bytes as on the CPU (kernels/exact_dev.h)
 *   measure_gpu.c  the metric pass of prefix points, behind the boundary of measure.h
 *
 * A layer's keys, values, measured queries, window, column sums and W_O go to the device once and stay while there is
 * room (else they go again for each pass); its rankings stay beside them. Layers are independent tasks; each task takes
 * a lane - a stream, its buffers, page-locked memory - so several layers are on the device at a time and the accounts
 * of one are kept while the next is measured. */
#ifndef KV_GPU_PASS_H
#define KV_GPU_PASS_H

#include "kernels/gpu.h"
#include "sim/plan.h"

typedef struct kv_gpu_pass kv_gpu_pass;

/* Device 0. KV_EUNSUPPORTED without a device: says why. Serves one trace after another, each with any number of
 * threads.
 */
kv_status kv_gpu_pass_open(kv_gpu_pass **out, kv_error *err);
void kv_gpu_pass_close(kv_gpu_pass *g); /* NULL accepted */
/* Forget the layers of the last trace (before it is closed). NULL accepted. */
void kv_gpu_pass_clear(kv_gpu_pass *g);
/* Wall seconds that kv_gpu_load took for the plans so far: reading, decompression and upload. */
double kv_gpu_load_seconds(const kv_gpu_pass *g);

/* Layers of the plan's trace to the device, as many as there is room for; nothing where they are there already. */
kv_status kv_gpu_load(kv_gpu_pass *g, const kv_plan *p, uint32_t threads, kv_error *err);
/* The rankings of one layer that a device can make: done[ranking] = true. KV_ENOMEM says what was short. */
kv_status kv_gpu_rank(kv_gpu_pass *g, kv_plan *p, uint32_t layer, bool *done, kv_error *err);
/* The other rankings of the layer, made on the CPU, beside those, where the layer stays on the device. */
kv_status kv_gpu_rank_done(kv_gpu_pass *g, const kv_plan *p, uint32_t layer, const bool *done, kv_error *err);

/* ---- for rank_gpu.c and measure_gpu.c ---- */
enum {
    KV_B_P,
    KV_B_SUM,
    KV_B_LSE,
    KV_B_SCRATCH,
    KV_B_SCORE,
    KV_B_HEAD,
    KV_B_STATS,
    KV_B_SORTED,
    KV_B_SORT,
    KV_B_TABLE,
    KV_B_PART,
    KV_B_PIECE_MASS,
    KV_B_LOOK,
    KV_B_BASE,
    KV_B_BASE_MASS,
    KV_B_O,
    KV_B_SLOTS,
    KV_B_C,
    KV_B_NORM,
    KV_N_BUFFER
};
enum { KV_GPU_PARTS = 7 };
/* One evicting layer on the device; f32 unless said otherwise, shapes as in kv_layer. */
typedef struct {
    void *memory;
    size_t bytes, size[KV_GPU_PARTS];      /* of its parts */
    float *k, *v, *q_win, *q_row, *colsum; /* [n_kv_head][n_token][d] twice, ...; NULL = not loaded */
    void *wo;                              /* [hidden][n_q_head * d], f16, or NULL */
    float v_top;                           /* a power of two above every |v| */
    uint32_t max_window;
    uint32_t *order; /* of all rankings one after the other, each [n_unit][L] */
    bool ordered;    /* order is filled */
    bool kept;
} kv_gpu_layer;
typedef struct {
    kv_gpu_stream stream;
    kv_gpu_blas *blas;
    void *buffer[KV_N_BUFFER];
    size_t size[KV_N_BUFFER];
    char *pinned; /* results, tables on their way */
    size_t pinned_size;
    char *stage[2];
    kv_gpu_event sent[2];
    bool busy;
} kv_gpu_lane;

kv_gpu_lane *kv_gpu_lane_take(kv_gpu_pass *g, kv_error *err); /* waits for one; NULL: err says why */
void kv_gpu_lane_give(kv_gpu_pass *g, kv_gpu_lane *l);
/* Layer `index` (among the evicting ones) with what plan and measurement need; loaded where it is not there. Give it
 * back before the lane. */
kv_status kv_gpu_layer_take(kv_gpu_pass *g, kv_gpu_lane *lane, const kv_plan *p, uint32_t index, kv_gpu_layer **out,
                            kv_error *err);
void kv_gpu_layer_give(kv_gpu_layer *l);
/* Rankings of the layer from the plan to the device: all of them (skip NULL), or those not in skip [n_ranking]. */
kv_status kv_gpu_orders(kv_gpu_lane *lane, const kv_plan *p, uint32_t index, const bool *skip, kv_gpu_layer *l,
                        kv_error *err);
/* Where ranking r begins in a layer's `order`. */
size_t kv_gpu_order_at(const kv_plan *p, size_t r);
/* 1 where a position counts for contested recall, [n_token], on the device. */
const uint8_t *kv_gpu_contested(const kv_gpu_pass *g);
/* A buffer of at least n bytes; its contents last until it is asked for again. *code: 0, or the error so far. */
void *kv_gpu_buffer(kv_gpu_lane *l, int which, size_t n, int *code);
char *kv_gpu_pinned(kv_gpu_lane *l, size_t n, int *code); /* the same, page-locked on the host */
kv_status kv_gpu_failed(int code, kv_error *err);

#endif
