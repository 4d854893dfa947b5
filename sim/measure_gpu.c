/* measure_gpu.c - one layer on the device: attention of the measured rows, the full cache's outputs, then for all units
 * of all rankings together the sums over the pieces between their checkpoints, looks at the checkpoints, and one
 * product with W_O for all points. Rows become sums on the host, by the same functions as on the CPU (account.c). */
#include "sim/measure_gpu.h"

#include <math.h>
#include <stdlib.h>

#include "kernels/cuda.h"
#include "kernels/exact_dev.h"
#include "kernels/walk_dev.h"
#include "sim/dmath.h"
#include "traces/cli.h"

#define SLOT_BYTES ((size_t)1 << 30)       /* of differences at a time */
#define PART_BYTES ((size_t)1 << 30)       /* of sums of pieces at a time */
enum { PIECE = 512, PROJECT_ROWS = 4096 }; /* entries of a piece; rows of differences in a product */

/* One block of rows of one layer on a lane. */
typedef struct {
    kv_gpu_lane *lane;
    kv_gpu_layer *dev;
    const uint8_t *contested; /* on the device */
    kv_measure *m;
    size_t r0, n; /* rows of the block */
    kv_turned t;
    float *p, *sum, *o, *base_out;
    double *base_mass;
    kv_checkpoints **checks; /* [ranking][unit] of the points from..to-1 */
    size_t from, to, n_slot;
    int32_t *slot;                  /* [to - from] place among the points that drop something, or -1 */
    double *full_mass, *full_cmass; /* [Hq * n] */
    kv_error *err;
} block;

/* What one launch walks: units of equal width, whose pieces, steps and slots stand in tables of the same order. */
typedef struct {
    kv_walk_unit *unit;
    const kv_checkpoints **checks; /* [n_unit] */
    kv_walk_piece *piece;
    uint32_t *step, *first, *slot;
    size_t n_unit, n_piece, n_check, n_slot, width; /* width = columns of a unit */
} batch;

bool kv_measure_gpu_can(const kv_measure *m)
{
    const kv_scene *sc = m->plan->scene;
    bool layer = m->out->layer_error != NULL;
    return sc->n_row && sc->info->head_dim <= 1024 && !(layer && (sc->info->post_norm_eps > 0 || m->out->own_output));
}

static kv_walk_set walk_set(const block *b, size_t n_col, const kv_walk_unit *unit, const kv_walk_piece *piece)
{
    const kv_scene *sc = b->m->plan->scene;
    return (kv_walk_set){.n_col = (uint32_t)n_col,
                         .d = b->m->l.d,
                         .n_key = sc->n_token,
                         .ld = b->t.ld,
                         .p = b->p,
                         .flag = b->contested,
                         .unit = unit,
                         .piece = piece,
                         .exact_v = sc->info->dtype != KV_F32};
}

/* ------------------------------------------------------------------------------------------------ the full cache */
/* Log-sum-exps, the full cache's outputs and masses: on the device as base, on the host as m's rows. */
static kv_status full_rows(block *b)
{
    kv_measure *m = b->m;
    const kv_scene *sc = m->plan->scene;
    size_t d = m->l.d, Hkv = m->l.n_kv_head, n_col = m->l.group * b->n, R = Hkv * n_col, T = sc->n_row, N = sc->n_token;
    size_t late = (N - sc->n_cut + PIECE - 1) / PIECE, early = (sc->n_cut + PIECE - 1) / PIECE, each = late + early;
    size_t table = Hkv * sizeof(kv_walk_unit), pieces = Hkv * each * sizeof(kv_walk_piece), steps = 3 * Hkv * 4;
    size_t o_bytes = m->errors ? R * d * 4 : 0, results = 4 * R * 8 + R * 4 + o_bytes;
    int code = 0;
    char *dev = kv_gpu_buffer(b->lane, KV_B_TABLE, table + pieces + steps, &code);
    char *host = kv_gpu_pinned(b->lane, table + pieces + steps + results, &code);
    float *lse = kv_gpu_buffer(b->lane, KV_B_LSE, R * 4, &code);
    float *part = m->errors ? kv_gpu_buffer(b->lane, KV_B_PART, Hkv * each * n_col * d * 4, &code) : NULL;
    double *pm = kv_gpu_buffer(b->lane, KV_B_PIECE_MASS, 2 * Hkv * each * n_col * 8, &code);
    double *mass = kv_gpu_buffer(b->lane, KV_B_LOOK, 4 * R * 8 + 2 * R * d * 4, &code);
    void *scratch = kv_gpu_buffer(b->lane, KV_B_SCRATCH, kv_softmax_scratch(&b->t), &code);
    b->p = kv_gpu_buffer(b->lane, KV_B_P, N * b->t.ld * 4, &code);
    b->sum = kv_gpu_buffer(b->lane, KV_B_SUM, b->t.ld * 4, &code);
    b->base_out = kv_gpu_buffer(b->lane, KV_B_BASE, R * d * 4, &code);
    b->base_mass = kv_gpu_buffer(b->lane, KV_B_BASE_MASS, R * 8, &code);
    b->o = kv_gpu_buffer(b->lane, KV_B_O, R * d * 4, &code);
    if (code) return kv_gpu_failed(code, b->err);
    kv_walk_unit *unit = (kv_walk_unit *)(void *)host;
    kv_walk_piece *piece = (kv_walk_piece *)(void *)(host + table);
    uint32_t *step = (uint32_t *)(void *)(host + table + pieces);
    for (size_t u = 0; u < Hkv; u++) {
        unit[u] = (kv_walk_unit){.v = b->dev->v + u * N * d,
                                 .first = sc->n_cut,
                                 .col = (uint32_t)(u * n_col),
                                 .piece = (uint32_t)(u * each),
                                 .check = (uint32_t)(2 * u),
                                 .n_check = 2};
        for (size_t i = 0; i < each; i++) { /* the tokens after the cut first, then the prompt */
            size_t a = i < late ? i * PIECE : N - sc->n_cut + (i - late) * PIECE, end = i < late ? N - sc->n_cut : N;
            piece[u * each + i] =
                (kv_walk_piece){(uint32_t)u, (uint32_t)a, (uint32_t)(a + PIECE < end ? a + PIECE : end)};
        }
        step[3 * u] = 0, step[3 * u + 1] = (uint32_t)late, step[3 * u + 2] = (uint32_t)each;
    }
    kv_walk_set w = walk_set(b, n_col, (kv_walk_unit *)(void *)dev, (kv_walk_piece *)(void *)(dev + table));
    float *look_out = (float *)(void *)(mass + 4 * R);
    kv_look look = {.step = (uint32_t *)(void *)(dev + table + pieces),
                    .part = part,
                    .sum = b->sum,
                    .piece_mass = pm,
                    .piece_cmass = pm + Hkv * each * n_col,
                    .mass = mass,
                    .cmass = mass + 2 * R,
                    .out = part ? look_out : NULL};
    code = kv_gpu_copy(dev, host, table + pieces + steps, b->lane->stream);
    if (!code) code = kv_scores_dev(&b->t, b->dev->q_row + b->r0 * d, b->dev->k, b->p, b->lane->stream);
    if (!code) code = kv_softmax_dev(&b->t, b->p, b->sum, lse, scratch, b->lane->stream);
    if (!code) code = kv_walk_dev(&w, Hkv * each, part, pm, pm + Hkv * each * n_col, b->lane->stream);
    if (!code) code = kv_look_dev(&w, Hkv, &look, b->lane->stream);
    if (!code)
        code = kv_full_rows_dev(Hkv, n_col, part ? d : 0, b->sum, mass, look_out, b->base_mass, b->base_out, b->o,
                                b->lane->stream);
    char *back = host + table + pieces + steps;
    double *got = (double *)(void *)back;
    float *got_lse = (float *)(void *)(got + 4 * R), *got_o = got_lse + R;
    if (!code) code = kv_gpu_copy(got, mass, 4 * R * 8, b->lane->stream);
    if (!code) code = kv_gpu_copy(got_lse, lse, R * 4, b->lane->stream);
    if (!code && o_bytes) code = kv_gpu_copy(got_o, b->o, o_bytes, b->lane->stream);
    if (!code) code = kv_gpu_stream_sync(b->lane->stream);
    if (code) return kv_gpu_failed(code, b->err);
    for (size_t c = 0; c < R; c++) {
        size_t u = c / n_col, h = c / b->n, at = h * T + b->r0 + c % b->n, late_at = 2 * u * n_col + c % n_col;
        if (!isfinite(got_lse[c]))
            return kv_fail(b->err, KV_EFORMAT, "trace '%s': layer %u head %zu row %zu: attention is not finite",
                           kv_trace_path(sc->trace), m->l.number, h, sc->row_first + b->r0 + c % b->n);
        m->lse[at] = got_lse[c], m->base_mass[at] = got[late_at];
        b->full_mass[c] = got[late_at + n_col], b->full_cmass[c] = got[2 * R + late_at + n_col];
        if (m->contest) m->contested_mass[at] = b->full_cmass[c];
        if (!m->errors) continue;
        memcpy(m->o + at * d, got_o + c * d, d * 4);
        m->norm_o[at] = kv_length(d, got_o + c * d);
    }
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ batches of units */
/* A unit of ranking r in this layer with its pieces: at most PIECE entries each, ending at every checkpoint. The whole
 * prompt needs no walk: its rows are the full cache's. NULL tables: only counts. */
static void add_unit(const block *b, size_t r, size_t u, uint32_t kv, uint32_t col, batch *x)
{
    const kv_scene *sc = b->m->plan->scene;
    const kv_checkpoints *c = &b->checks[r][u];
    size_t first_piece = x->n_piece, first_check = x->n_check, L = sc->n_cut;
    uint32_t at = 0;
    if (x->unit) {
        x->checks[x->n_unit] = c;
        x->unit[x->n_unit] = (kv_walk_unit){.order = b->dev->order + kv_gpu_order_at(b->m->plan, r) + u * L,
                                            .v = b->dev->v + (size_t)kv * sc->n_token * b->m->l.d,
                                            .col = col,
                                            .piece = (uint32_t)first_piece,
                                            .check = (uint32_t)first_check,
                                            .n_check = (uint32_t)c->n};
        x->step[first_check + x->n_unit] = 0, x->first[first_check + x->n_unit] = (uint32_t)x->n_slot;
    }
    for (size_t k = 0; k < c->n; k++) {
        while (at < c->count[k] && c->count[k] < L) {
            uint32_t end = c->count[k] - at > PIECE ? at + PIECE : c->count[k];
            if (x->unit) x->piece[x->n_piece] = (kv_walk_piece){(uint32_t)x->n_unit, at, end};
            x->n_piece++, at = end;
        }
        for (size_t i = c->first[k]; i < c->first[k + 1] && c->count[k] < L; i++) {
            int32_t slot = b->slot[c->point[i] - b->from];
            if (slot < 0) continue;
            if (x->unit) x->slot[x->n_slot] = (uint32_t)slot;
            x->n_slot++;
        }
        if (!x->unit) continue;
        x->step[first_check + x->n_unit + k + 1] = (uint32_t)(x->n_piece - first_piece);
        x->first[first_check + x->n_unit + k + 1] = (uint32_t)x->n_slot;
    }
    x->n_check += c->n, x->n_unit++;
}

/* All units of ranking r in this layer. */
static void add_ranking(const block *b, size_t r, batch *x)
{
    const kv_ranking *rk = &b->m->plan->ranking[r];
    size_t group = b->m->l.group, units = rk->granularity == KV_GRAN_QUERY_HEAD ? group : 1, heads = group / units;
    for (uint32_t kv = 0; kv < b->m->l.n_kv_head; kv++)
        for (size_t i = 0; i < units; i++) {
            size_t u = rk->granularity == KV_GRAN_LAYER ? 0 : kv * units + i;
            if (b->checks[r][u].n) add_unit(b, r, u, kv, (uint32_t)((kv * group + i * heads) * b->n), x);
        }
}

static void account(block *b, const batch *x, const double *mass, size_t n_check)
{
    kv_measure *m = b->m;
    const kv_scene *sc = m->plan->scene;
    size_t n = b->n, T = sc->n_row, plane = n_check * x->width;
    for (size_t u = 0; u < x->n_unit; u++) {
        const kv_checkpoints *c = x->checks[u];
        for (size_t k = 0; k < c->n; k++)
            for (size_t g = 0; g < x->width / n; g++) {
                size_t h = x->unit[u].col / n + g, at = (x->unit[u].check + k) * x->width + g * n;
                bool whole = c->count[k] == sc->n_cut;
                kv_kept_rows rows = {.head = (uint32_t)h,
                                     .r0 = b->r0,
                                     .n = n,
                                     .whole = whole,
                                     .mass = whole ? b->full_mass + h * n : mass + at,
                                     .after = m->base_mass + h * T + b->r0,
                                     .contested = !m->contest ? NULL
                                                  : whole     ? b->full_cmass + h * n
                                                              : mass + plane + at,
                                     .error2 = m->errors ? mass + 2 * plane + at : NULL,
                                     .dot = m->errors ? mass + 3 * plane + at : NULL};
                kv_account_rows(m, c->point + c->first[k], c->first[k + 1] - c->first[k], &rows);
            }
    }
}

/* Walk and look at the units of x (counted); results become sums. */
static kv_status walk_batch(block *b, const size_t *ranking, size_t n_ranking, batch *x)
{
    kv_measure *m = b->m;
    size_t d = m->l.d, width = (size_t)m->l.n_q_head * d, units = x->n_unit, checks = x->n_check, pieces = x->n_piece;
    size_t at[6], bytes = 0, sizes[6] = {units * sizeof(kv_walk_unit), pieces * sizeof(kv_walk_piece),
                                         (checks + units) * 4,         (checks + units) * 4,
                                         (x->n_slot + 1) * 4,          0};
    size_t plane = checks * x->width;
    int code = 0;
    for (int i = 0; i < 6; i++) at[i] = bytes, bytes += (sizes[i] + 15) / 16 * 16;
    char *dev = kv_gpu_buffer(b->lane, KV_B_TABLE, bytes, &code);
    char *host = kv_gpu_pinned(b->lane, bytes + 4 * plane * 8, &code);
    float *part = m->errors ? kv_gpu_buffer(b->lane, KV_B_PART, (pieces + 1) * x->width * d * 4, &code) : NULL;
    double *pm = kv_gpu_buffer(b->lane, KV_B_PIECE_MASS, 2 * (pieces + 1) * x->width * 8, &code);
    double *mass = kv_gpu_buffer(b->lane, KV_B_LOOK, 4 * plane * 8, &code), *got = NULL;
    if (code) return kv_gpu_failed(code, b->err);
    x->unit = (kv_walk_unit *)(void *)(host + at[0]), x->piece = (kv_walk_piece *)(void *)(host + at[1]);
    x->step = (uint32_t *)(void *)(host + at[2]), x->first = (uint32_t *)(void *)(host + at[3]);
    x->slot = (uint32_t *)(void *)(host + at[4]), got = (double *)(void *)(host + bytes);
    kv_status st = kv_array(&x->checks, units, sizeof *x->checks, b->err);
    if (st) return st;
    x->n_unit = x->n_piece = x->n_check = x->n_slot = 0;
    for (size_t i = 0; i < n_ranking; i++) add_ranking(b, ranking[i], x);
    kv_walk_set w =
        walk_set(b, x->width, (kv_walk_unit *)(void *)(dev + at[0]), (kv_walk_piece *)(void *)(dev + at[1]));
    double *pc = m->contest ? pm + (pieces + 1) * x->width : NULL;
    kv_look look = {.step = (uint32_t *)(void *)(dev + at[2]),
                    .first = b->n_slot ? (uint32_t *)(void *)(dev + at[3]) : NULL,
                    .slot = (uint32_t *)(void *)(dev + at[4]),
                    .part = part,
                    .sum = b->sum,
                    .base_out = b->base_out,
                    .o = m->errors ? b->o : NULL,
                    .piece_mass = pm,
                    .piece_cmass = pc,
                    .base_mass = b->base_mass,
                    .mass = mass,
                    .cmass = pc ? mass + plane : NULL,
                    .error2 = mass + 2 * plane,
                    .dot = mass + 3 * plane,
                    .to = b->lane->buffer[KV_B_SLOTS],
                    .n_row = b->n,
                    .width = width,
                    .scale = 16384 / b->dev->v_top};
    code = kv_gpu_copy(dev, host, bytes, b->lane->stream);
    if (!code) code = kv_walk_dev(&w, pieces, part, pm, pc, b->lane->stream);
    if (!code) code = kv_look_dev(&w, units, &look, b->lane->stream);
    if (!code) code = kv_gpu_copy(got, mass, 4 * plane * 8, b->lane->stream);
    if (!code) code = kv_gpu_stream_sync(b->lane->stream);
    if (!code) account(b, x, got, checks);
    free(x->checks);
    return code ? kv_gpu_failed(code, b->err) : KV_OK;
}

/* All rankings: those whose units are as wide go together, as many as fit. */
static kv_status walk_all(block *b)
{
    const kv_plan *p = b->m->plan;
    size_t *ranking = NULL;
    kv_status st = kv_array(&ranking, p->n_ranking, sizeof *ranking, b->err);
    for (int wide = 0; wide < 2 && !st; wide++) {
        size_t width = (wide ? b->m->l.group : 1) * b->n, n = 0;
        batch x = {.width = width};
        if (wide && b->m->l.group == 1) break;
        for (size_t r = 0; r <= p->n_ranking && !st; r++) {
            bool heads = r < p->n_ranking && p->ranking[r].granularity == KV_GRAN_QUERY_HEAD;
            if (r < p->n_ranking && (b->m->l.group == 1 ? wide : heads == wide)) continue;
            batch more = x;
            if (r < p->n_ranking) add_ranking(b, r, &more);
            bool fits = more.n_piece * width * b->m->l.d * 4 <= PART_BYTES && more.n_unit <= 65535;
            if (r == p->n_ranking || (n && !fits)) {
                if (x.n_unit) st = walk_batch(b, ranking, n, &x);
                x = (batch){.width = width}, n = 0;
                if (r < p->n_ranking) add_ranking(b, r, &x), ranking[n++] = r;
            } else {
                x = more, ranking[n++] = r;
            }
            if (!st && kv_interrupted()) st = kv_fail(b->err, KV_EINTERRUPTED, "interrupted");
        }
    }
    free(ranking);
    return st;
}

/* ------------------------------------------------------------------------------------------------ points */
/* Norms of all differences behind W_O. */
static kv_status project(block *b)
{
    kv_measure *m = b->m;
    size_t width = (size_t)m->l.n_q_head * m->l.d, hidden = m->plan->scene->info->hidden, rows = b->n_slot * b->n;
    const uint16_t *a = b->lane->buffer[KV_B_SLOTS];
    int code = 0;
    float *c = kv_gpu_buffer(b->lane, KV_B_C, PROJECT_ROWS * hidden * 4, &code),
          *norm = kv_gpu_buffer(b->lane, KV_B_NORM, rows * 4 + 4, &code);
    float *host = (float *)(void *)kv_gpu_pinned(b->lane, rows * 4, &code);
    for (size_t i = 0; i < rows && !code; i += PROJECT_ROWS) {
        size_t n = rows - i < PROJECT_ROWS ? rows - i : PROJECT_ROWS;
        code = kv_gpu_matmul(b->lane->blas, n, hidden, width, 16, b->dev->v_top / 16384, a + i * width, width,
                             b->dev->wo, 32, c, hidden, false);
        if (!code) code = kv_length_dev(n, hidden, c, norm + i, b->lane->stream);
    }
    if (!code && rows) code = kv_gpu_copy(host, norm, rows * 4, b->lane->stream);
    if (!code) code = kv_gpu_stream_sync(b->lane->stream);
    if (code) return kv_gpu_failed(code, b->err);
    for (size_t i = b->from; i < b->to; i++)
        if (b->slot[i - b->from] >= 0) kv_account_norms(m, i, b->r0, b->n, host + (size_t)b->slot[i - b->from] * b->n);
    return KV_OK;
}

/* Points that drop something in this layer. */
static void find_slots(block *b)
{
    const kv_measure *m = b->m;
    b->n_slot = 0;
    for (size_t i = b->from; i < b->to; i++) {
        const kv_ranking *rk = &m->plan->ranking[m->plan->ranking_of[m->point[i].spec]];
        bool drops = false;
        for (size_t u = 0; u < rk->n_unit; u++)
            drops |= m->point[i].counts[m->l.order * rk->n_unit + u] != m->plan->scene->n_cut;
        drops &= m->out->layer_error && !kv_schedule_used(m->plan, m->point[i].spec);
        b->slot[i - b->from] = drops ? (int32_t)b->n_slot++ : -1;
    }
}

static kv_status some_points(block *b)
{
    kv_measure *m = b->m;
    size_t width = (size_t)m->l.n_q_head * m->l.d;
    int code = 0;
    kv_status st = KV_OK;
    for (size_t r = 0; r < m->plan->n_ranking && !st; r++)
        st = kv_checkpoints_make(m, r, b->from, b->to, &b->checks[r], b->err);
    if (!st) st = kv_array(&b->slot, b->to - b->from, sizeof *b->slot, b->err);
    if (!st) find_slots(b);
    if (!st && b->n_slot) {
        void *a = kv_gpu_buffer(b->lane, KV_B_SLOTS, b->n_slot * b->n * width * 2, &code);
        if (!code) code = kv_gpu_zero(a, b->n_slot * b->n * width * 2, b->lane->stream);
    }
    if (!st && code) st = kv_gpu_failed(code, b->err);
    if (!st) st = walk_all(b);
    if (!st && b->n_slot) st = project(b);
    for (size_t r = 0; r < m->plan->n_ranking; r++) {
        if (b->checks[r]) kv_checkpoints_free(b->checks[r], m->plan->ranking[r].n_unit);
        b->checks[r] = NULL;
    }
    free(b->slot), b->slot = NULL;
    return st;
}

kv_status kv_measure_prefixes_gpu(kv_gpu_pass *g, kv_measure *m, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t Hq = l->n_q_head, most = sc->n_row < KV_LAYER_ROWS ? sc->n_row : KV_LAYER_ROWS;
    size_t at_once = SLOT_BYTES / (most * Hq * l->d * 2) + 1;
    double *contested = NULL;
    block b = {.m = m, .err = err, .lane = kv_gpu_lane_take(g, err)};
    if (!b.lane) return KV_EIO;
    kv_status st = kv_gpu_layer_take(g, b.lane, m->plan, l->order, &b.dev, err);
    b.contested = kv_gpu_contested(g);
    if (!st && !b.dev->ordered) st = kv_gpu_orders(b.lane, m->plan, l->order, NULL, b.dev, err);
    if (!st && m->out->layer_error && !b.dev->wo) st = kv_fail(err, KV_EMISSING, "no W_O on the device");
    if (!st) st = kv_array(&b.checks, m->plan->n_ranking, sizeof *b.checks, err);
    if (!st) st = kv_array(&b.full_mass, Hq * most, sizeof *b.full_mass, err);
    if (!st) st = kv_array(&b.full_cmass, Hq * most, sizeof *b.full_cmass, err);
    if (!st) st = kv_array(&contested, Hq, sizeof *contested, err);
    for (b.r0 = 0; b.r0 < sc->n_row && !st; b.r0 += b.n) {
        b.n = sc->n_row - b.r0 < most ? sc->n_row - b.r0 : most;
        b.t = (kv_turned){.n_q_head = l->n_q_head,
                          .n_kv_head = l->n_kv_head,
                          .n_row = (uint32_t)b.n,
                          .row0 = (uint32_t)(sc->row_first + b.r0),
                          .n_key = sc->n_token,
                          .d = l->d,
                          .scale = l->scale,
                          .softcap = l->softcap,
                          .q_head = (size_t)sc->n_row * l->d,
                          .k_head = (size_t)sc->n_token * l->d,
                          .ld = (Hq * b.n + 31) / 32 * 32};
        st = full_rows(&b);
        for (size_t i = 0; i < Hq * b.n && !st; i++) contested[i / b.n] += b.full_cmass[i];
        for (b.from = 0; b.from < m->n_point && !st; b.from = b.to) {
            b.to = m->n_point - b.from < at_once ? m->n_point : b.from + at_once;
            st = some_points(&b);
        }
    }
    for (size_t i = 0; i < m->n_point && !st; i++)
        for (uint32_t h = 0; h < Hq; h++) kv_measure_sums(m, i, h)->contested_all = contested[h];
    free(b.checks), free(b.full_mass), free(b.full_cmass), free(contested);
    kv_gpu_layer_give(b.dev);
    kv_gpu_lane_give(g, b.lane);
    return st;
}
