/* memory.c - what a layer takes; see the allocations of layer.c, plan.c, measure*.c and the scorers. */
#include "sim/memory.h"

#include "sim/measure.h"
#include "sim/schedule.h"

/* The program, its libraries and their buffers (OpenBLAS's, SQLite's page cache), measured 2026-11: 12 MiB. */
#define FIXED    (24u << 20)
#define PER_TASK (4u << 20) /* OpenBLAS's buffer and stack of a thread */
#define ROUNDING 1.04       /* allocators round up */

/* K, V and what else a layer is asked for, and the reader's buffers for its largest chunk. */
static uint64_t load_bytes(const kv_plan *p, unsigned needs, uint32_t window)
{
    const kv_scene *sc = p->scene;
    const kv_trace_info *in = sc->info;
    uint64_t N = sc->n_token, L = sc->n_cut, T = sc->n_row, d = in->head_dim, Hq = in->n_q_head, Hkv = in->n_kv_head;
    uint64_t w = window < L ? window : L, b = 2 * Hkv * N * d;
    if (needs & KV_NEED_WINDOW) b += Hq * w * (d + L); /* queries, and the attention rows that scorers share */
    if (needs & KV_NEED_FUTURE) b += Hq * T * d;
    if (needs & KV_NEED_QUERIES) b += Hq * L * d;
    if (needs & KV_NEED_WO) b += Hq * d * in->hidden + 2 * Hkv * L; /* and norms of projected values */
    if (needs & KV_NEED_COLSUM) b += Hq * L + 2 * L * d + 4 * L;    /* and what derives them where they are missing */
    return 4 * b + 3 * kv_trace_largest_chunk(sc->trace);
}

/* Scratch of a scorer and of the order it leads to: a few numbers per head and position, one head's keys. */
static uint64_t score_bytes(const kv_scene *sc)
{
    uint64_t L = sc->n_cut, d = sc->info->head_dim, Hq = sc->info->n_q_head;
    return 4 * L * (4 * Hq + 2 * d + 16) + 16 * d * d;
}

uint64_t kv_memory_rank(const kv_plan *p)
{
    return load_bytes(p, p->needs, p->max_window) + score_bytes(p->scene);
}

/* Decode rules and selections: sets, states and weights of every unit, one layer at a time. */
static uint64_t schedule_bytes(const kv_plan *p, const kv_spec *s)
{
    const kv_scene *sc = p->scene;
    uint64_t N = sc->n_token, T = sc->n_row + 1, Hq = sc->info->n_q_head, U = Hq;
    uint64_t b = U * N * 48 + T * U * (N / 8 + 1) + Hq * N * 8 + N * 64 + T * N * 24;
    if (s->select == KV_SELECT_MIXDIM) b += 4 * sc->info->n_kv_head * N * sc->info->head_dim * 4;
    return b + score_bytes(sc);
}

uint64_t kv_memory_measure(const kv_plan *p, size_t n_point, kv_metric_set wanted)
{
    const kv_scene *sc = p->scene;
    const kv_trace_info *in = sc->info;
    uint64_t N = sc->n_token, T = sc->n_row, d = in->head_dim, Hq = in->n_q_head, width = Hq * d,
             rows = T < KV_LAYER_ROWS ? T : KV_LAYER_ROWS, R = in->n_q_head / in->n_kv_head * rows, schedule = 0;
    unsigned needs = KV_NEED_FUTURE;
    uint32_t window = 0;
    bool layer = wanted >> KV_M_LAYER_ERROR & 1;
    for (size_t i = 0; i < p->n_spec; i++) {
        if (!kv_schedule_used(p, i)) continue;
        uint64_t b = schedule_bytes(p, &p->spec[i]);
        if (b > schedule) schedule = b;
        needs |= p->needs, window = p->max_window;
    }
    uint64_t b = load_bytes(p, needs | (layer ? KV_NEED_WO : 0), window);
    b += Hq * T * (4 * d + 4 + 16) + T * 8 + N;                    /* the full cache's rows */
    b += N * ((R + 15) / 16 * 16) * 4 + N * 4 + R * (12 * d + 48); /* probabilities of a block, walks */
    b += n_point * (in->n_q_head + 1) * 48;                        /* checkpoints */
    if (layer) {
        uint64_t most = kv_measure_points_at_once(width), at_once = n_point < most ? n_point : most;
        b += at_once * rows * width * 4 + rows * width * 4;      /* differences */
        b += width * (uint64_t)in->hidden * (4 + 8) + (1 << 20); /* the triangle and the QR behind it */
    }
    if (wanted & KV_M_STEPS) b += n_point * T * sizeof(kv_step_sums);
    if (wanted & KV_M_BOUNDS) { /* rows of some points at a time, values through W_O (bounds.c) */
        b += (n_point < 64 ? n_point : 64) * 32 * (width * 4 + 64) + Hq * (N + T) * 8;
        b += (uint64_t)in->hidden * (rows + d + 256) * 4 + rows * N * 4;
    }
    if (wanted & (KV_M_EVIDENCE | KV_M_BIT(KV_M_BREADTH))) b += (Hq + 2) * N * 4 + (T + 1) * (N / 8 + 1);
    return b + schedule;
}

uint64_t kv_memory_held(const kv_plan *p, size_t n_point, kv_metric_set wanted)
{
    const kv_scene *sc = p->scene;
    uint64_t b = 0, E = sc->n_evict, Hq = sc->info->n_q_head;
    for (size_t r = 0; r < p->n_ranking; r++) {
        const kv_ranking *k = &p->ranking[r];
        uint64_t n = E * k->n_unit * sc->n_cut;
        b += n * (4 + 4 + (k->first_key ? 4 : 0) + (k->second ? 4 : 0)) + (k->at ? E * k->n_unit * sc->n_token * 4 : 0);
        if (k->seen) b += (sc->n_row + 1) * E * k->n_unit * ((sc->n_token + 7) / 8);
    }
    b += n_point * (E * (Hq * (sizeof(kv_head_sums) + 4 + 8) + 32) + 512);
    if (wanted & KV_M_STEPS) b += n_point * sc->n_row * sizeof(kv_step_sums);
    if (wanted & KV_M_BOUNDS) b += n_point * E * sizeof(kv_bound_sums);
    if (wanted & (KV_M_EVIDENCE | KV_M_BIT(KV_M_BREADTH))) /* `seen` where entries come back */
        b += n_point * (E * (Hq * 16 + sizeof(kv_layer_cover)) + sc->n_cut * 4 + sc->n_row * (sc->n_cut / 8 + 1));
    return b;
}

kv_status kv_memory_fit(const kv_scene *sc, const char *doing, uint64_t held, uint64_t task, uint32_t *threads,
                        kv_error *err)
{
    uint64_t fixed = FIXED + (uint64_t)((double)held * ROUNDING), one = PER_TASK + (uint64_t)((double)task * ROUNDING);
    if (!sc->mem_limit) return KV_OK;
    if (fixed + one > sc->mem_limit)
        return kv_fail(err, KV_EMISUSE,
                       "--mem-limit %.0fMiB: %s one layer of '%s' takes %.0f MiB beside the %.0f MiB that all layers "
                       "share; give at least %.0fMiB, or fewer policies at a time",
                       (double)sc->mem_limit / 0x1p20, doing, kv_trace_path(sc->trace), (double)one / 0x1p20,
                       (double)fixed / 0x1p20, (double)(fixed + one) / 0x1p20 + 1);
    uint64_t most = (sc->mem_limit - fixed) / one;
    if (*threads > most) *threads = (uint32_t)most;
    return KV_OK;
}
