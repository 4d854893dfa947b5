/* measure_gpu.c - one layer on the device: products and weights of each KV head, sums over the pieces between the
 * checkpoints of every ranking, looks at the checkpoints, then one product with W_O for all points. Rows become sums on
 * the host, outside the lock, by the same functions as on the CPU (account.c). */
#include "sim/measure_gpu.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>

#include "kernels/cuda.h"
#include "kernels/gpu.h"
#include "kernels/walk_dev.h"
#include "sim/dmath.h"
#include "traces/cli.h"

enum { PIECE = 256, PROJECT_ROWS = 4096 }; /* keys of a piece; rows of differences in a product */

enum {
    B_K,
    B_V,
    B_Q,
    B_P,
    B_LSE,
    B_SCRATCH,
    B_ORDER,
    B_FLAG,
    B_PIECE,
    B_STEP,
    B_PART,
    B_PMASS,
    B_PCMASS,
    B_BASE,
    B_BMASS,
    B_O,
    B_MASS,
    B_OUT,
    B_DIFF,
    B_CHECK,
    B_A,
    B_W32,
    B_W16,
    B_C,
    B_NORM,
    N_BUFFER
};

struct kv_gpu_pass {
    pthread_mutex_t lock;
    kv_gpu_stream stream;
    kv_gpu_blas *blas;
    void *p[N_BUFFER];
    size_t size[N_BUFFER];
};

/* What one unit's checkpoints showed, for the accounts. */
typedef struct {
    const kv_checkpoints *c;
    uint32_t h0;
    size_t heads, col;
    double *mass; /* [4][n][heads * rows]: mass, contested, error2, dot */
} seen;

/* One block of rows of one layer. */
typedef struct {
    kv_gpu_pass *g;
    kv_measure *m;
    size_t r0, n, R, ld;
    kv_checkpoints **checks;
    seen *seen;
    size_t n_seen;
    size_t n_slot, *slot_point;     /* points with a difference */
    float *norm;                    /* [n_slot][n] */
    double *full_mass, *full_cmass; /* [Hq * n] */
    kv_error *err;
} block;

static kv_status device_failed(int code, kv_error *err)
{
    return kv_fail(err, code == KV_GPU_ENOMEM ? KV_ENOMEM : KV_EIO, "replay on the GPU: %s%s", kv_gpu_text(code),
                   code == KV_GPU_ENOMEM ? "; use --backend cpu, or fewer points at a time" : "");
}

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        int code_ = (call);                                                                                            \
        if (code_) return device_failed(code_, b->err);                                                                \
    } while (0)

static void *buffer(kv_gpu_pass *g, int which, size_t n, int *code)
{
    if (*code) return NULL;
    if (g->size[which] >= n && g->p[which]) return g->p[which];
    kv_gpu_free(g->p[which]);
    g->p[which] = NULL, g->size[which] = 0;
    if (!(*code = kv_gpu_alloc(n + n / 4, &g->p[which]))) g->size[which] = n + n / 4;
    return g->p[which];
}

kv_status kv_gpu_pass_open(kv_gpu_pass **out, kv_error *err)
{
    kv_gpu_pass *g = NULL;
    *out = NULL;
    if (kv_gpu_count() < 1)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "--backend cuda: no CUDA device that this build can use; take --backend cpu");
    kv_status st = kv_array(&g, 1, sizeof *g, err);
    if (st) return st;
    pthread_mutex_init(&g->lock, NULL);
    int code = kv_gpu_select(0);
    if (!code) code = kv_gpu_stream_open(false, &g->stream);
    if (!code) code = kv_gpu_blas_open(g->stream, &g->blas);
    if (code) {
        kv_gpu_pass_close(g);
        return device_failed(code, err);
    }
    *out = g;
    return KV_OK;
}

void kv_gpu_pass_close(kv_gpu_pass *g)
{
    if (!g) return;
    for (int i = 0; i < N_BUFFER; i++) kv_gpu_free(g->p[i]);
    kv_gpu_blas_close(g->blas);
    kv_gpu_stream_close(g->stream);
    pthread_mutex_destroy(&g->lock);
    free(g);
}

bool kv_gpu_pass_can(const kv_measure *m)
{
    return !m->l.post_norm && !m->out->own_output && m->plan->scene->n_token <= 8 * 65535u && m->l.d <= 1024;
}

/* ------------------------------------------------------------------------------------------------ one KV head */
/* Raw products, weights, log-sum-exps, and the full cache's rows. */
static kv_status full_rows(block *b, uint32_t kv)
{
    kv_gpu_pass *g = b->g;
    kv_measure *m = b->m;
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, N = sc->n_token, R = b->R, T = sc->n_row, n = b->n;
    uint32_t h0 = kv * l->group;
    kv_turned t = {N, R, b->ld, (uint32_t)n, (uint32_t)(sc->row_first + b->r0), l->scale, l->softcap};
    int code = 0;
    float *q = buffer(g, B_Q, R * d * 4, &code), *p = buffer(g, B_P, N * b->ld * 4, &code);
    float *lse = buffer(g, B_LSE, R * 4, &code), *base = buffer(g, B_BASE, 2 * R * d * 4, &code);
    void *scratch = buffer(g, B_SCRATCH, kv_turned_scratch(&t), &code);
    double *bmass = buffer(g, B_BMASS, 4 * R * 8, &code);
    float *o = buffer(g, B_O, R * d * 4, &code);
    if (code) return device_failed(code, b->err);
    for (uint32_t i = 0; i < l->group; i++)
        TRY(kv_gpu_copy(q + i * n * d, l->q_row + ((h0 + i) * T + b->r0) * d, n * d * 4, g->stream));
    TRY(kv_gpu_matmul(g->blas, N, R, d, 32, 1, (float *)g->p[B_K] + kv * N * d, d, q, 32, p, b->ld, false));
    TRY(kv_turned_dev(&t, p, lse, scratch, g->stream));

    /* Pieces of the identity: the tokens after the cut first, then the prompt. */
    size_t late = (N - sc->n_cut + PIECE - 1) / PIECE, early = (sc->n_cut + PIECE - 1) / PIECE, n_piece = late + early;
    uint32_t *piece = NULL, *order = NULL;
    kv_status st = kv_array(&piece, n_piece + 5, sizeof *piece, b->err);
    if (!st) st = kv_array(&order, N, sizeof *order, b->err);
    if (st) return free(piece), st;
    for (size_t i = 0; i < N; i++) order[i] = (uint32_t)((sc->n_cut + i) % N);
    for (size_t i = 0; i <= late; i++) piece[i] = (uint32_t)(i * PIECE < N - sc->n_cut ? i * PIECE : N - sc->n_cut);
    for (size_t i = 1; i <= early; i++)
        piece[late + i] = (uint32_t)(N - sc->n_cut + (i * PIECE < sc->n_cut ? i * PIECE : sc->n_cut));
    uint32_t step[3] = {0, (uint32_t)late, (uint32_t)n_piece};
    uint32_t *dorder = buffer(g, B_ORDER, N * 4, &code), *dpiece = buffer(g, B_PIECE, (n_piece + 1) * 4, &code);
    uint32_t *dstep = buffer(g, B_STEP, sizeof step, &code);
    float *part = buffer(g, B_PART, n_piece * R * d * 4, &code);
    double *pm = buffer(g, B_PMASS, n_piece * R * 8, &code), *pc = buffer(g, B_PCMASS, n_piece * R * 8, &code);
    if (!code) code = kv_gpu_copy(dorder, order, N * 4, g->stream);
    if (!code) code = kv_gpu_copy(dpiece, piece, (n_piece + 1) * 4, g->stream);
    if (!code) code = kv_gpu_copy(dstep, step, sizeof step, g->stream);
    if (!code)
        code = kv_walk_dev(R, d, p, b->ld, (float *)g->p[B_V] + kv * N * d, dorder, g->p[B_FLAG], n_piece, dpiece, part,
                           pm, pc, g->stream);
    kv_look look = {.n_col = R,
                    .d = d,
                    .n_check = 2,
                    .step = dstep,
                    .part = part,
                    .piece_mass = pm,
                    .piece_cmass = pc,
                    .mass = bmass,
                    .cmass = bmass + 2 * R,
                    .out = base};
    if (!code) code = kv_look_dev(&look, g->stream);
    /* m->o and the masses are wanted on the host, o on the device too. */
    double *mass = NULL;
    float *out = NULL, *ls = NULL;
    if (!code && !(st = kv_array(&mass, 4 * R, sizeof *mass, b->err)) &&
        !(st = kv_array(&out, R * d, sizeof *out, b->err)) && !(st = kv_array(&ls, R, sizeof *ls, b->err))) {
        code = kv_gpu_copy(mass, bmass, 4 * R * 8, g->stream);
        if (!code) code = kv_gpu_copy(out, base + R * d, R * d * 4, g->stream);
        if (!code) code = kv_gpu_copy(ls, lse, R * 4, g->stream);
        if (!code) code = kv_gpu_stream_sync(g->stream);
        for (size_t i = 0; i < R && !code && !st; i++) {
            size_t h = h0 + i / n, at = h * T + b->r0 + i % n;
            if (!isfinite(ls[i]))
                st = kv_fail(b->err, KV_EFORMAT, "trace '%s': layer %u head %zu row %zu: attention is not finite",
                             kv_trace_path(sc->trace), l->number, h, sc->row_first + b->r0 + i % n);
            m->lse[at] = ls[i], m->base_mass[at] = mass[i];
            b->full_mass[h * n + i % n] = mass[R + i], b->full_cmass[h * n + i % n] = mass[3 * R + i];
            if (m->contest) m->contested_mass[at] = mass[3 * R + i];
            float inv = (float)(1 / mass[R + i]);
            for (size_t j = 0; j < d; j++) m->o[at * d + j] = out[i * d + j] *= inv;
            m->norm_o[at] = kv_norm(d, m->o + at * d);
        }
        if (!code && !st) code = kv_gpu_copy(o, out, R * d * 4, g->stream);
        if (!code && !st) code = kv_gpu_stream_sync(g->stream); /* `out` goes */
    }
    free(piece), free(order), free(mass), free(out), free(ls);
    return st ? st : code ? device_failed(code, b->err) : KV_OK;
}

/* Ends of pieces of at most PIECE keys that also end at every checkpoint; step[k] = first piece behind checkpoint k-1.
 * The whole prompt needs no walk: its rows are the full cache's. */
static kv_status pieces_of(const kv_checkpoints *c, uint32_t n_cut, uint32_t **piece, uint32_t **step, size_t *n,
                           kv_error *err)
{
    uint32_t at = 0;
    kv_status st = kv_array(piece, n_cut / PIECE + c->n + 2, sizeof **piece, err);
    if (!st) st = kv_array(step, c->n + 1, sizeof **step, err);
    *n = 0;
    for (size_t k = 0; k < c->n && !st; k++) {
        while (at < c->count[k] && c->count[k] < n_cut) {
            at = c->count[k] - at > PIECE ? at + PIECE : c->count[k];
            (*piece)[++*n] = at;
        }
        (*step)[k + 1] = (uint32_t)*n;
    }
    return st;
}

/* The walk of one unit of a ranking: its heads are columns col.. of p. */
static kv_status walk_unit(block *b, uint32_t kv, const uint32_t *order, size_t heads, size_t col, uint32_t h0,
                           const kv_checkpoints *c)
{
    kv_gpu_pass *g = b->g;
    const kv_scene *sc = b->m->plan->scene;
    size_t d = b->m->l.d, N = sc->n_token, n = b->n, R = heads * n, width = (size_t)b->m->l.n_q_head * d, n_piece = 0;
    uint32_t *piece = NULL, *step = NULL;
    int32_t *check = NULL;
    int code = 0;
    seen *s = &b->seen[b->n_seen++];
    *s = (seen){.c = c, .h0 = h0, .heads = heads, .col = col};
    kv_status st = pieces_of(c, sc->n_cut, &piece, &step, &n_piece, b->err);
    if (!st) st = kv_array(&s->mass, 4 * c->n * R, sizeof *s->mass, b->err);
    if (!st) st = kv_array(&check, b->n_slot + 1, sizeof *check, b->err);
    if (st) goto out;
    uint32_t *dorder = buffer(g, B_ORDER, (size_t)N * 4, &code), *dpiece = buffer(g, B_PIECE, (n_piece + 1) * 4, &code);
    uint32_t *dstep = buffer(g, B_STEP, (c->n + 1) * 4, &code);
    float *part = buffer(g, B_PART, (n_piece + 1) * R * d * 4, &code);
    double *pm = buffer(g, B_PMASS, (n_piece + 1) * R * 8, &code),
           *pc = buffer(g, B_PCMASS, (n_piece + 1) * R * 8, &code);
    double *mass = buffer(g, B_MASS, 4 * c->n * R * 8, &code);
    void *diff = buffer(g, B_DIFF, c->n * R * d * 2, &code);
    if (!code && n_piece) code = kv_gpu_copy(dorder, order, piece[n_piece] * sizeof *order, g->stream);
    if (!code) code = kv_gpu_copy(dpiece, piece, (n_piece + 1) * 4, g->stream);
    if (!code) code = kv_gpu_copy(dstep, step, (c->n + 1) * 4, g->stream);
    if (!code)
        code = kv_walk_dev(R, d, (float *)g->p[B_P] + col, b->ld, (float *)g->p[B_V] + kv * N * d, dorder, g->p[B_FLAG],
                           n_piece, dpiece, part, pm, pc, g->stream);
    kv_look look = {.n_col = R,
                    .d = d,
                    .n_check = c->n,
                    .step = dstep,
                    .part = part,
                    .piece_mass = pm,
                    .piece_cmass = pc,
                    .base_out = (float *)g->p[B_BASE] + col * d,
                    .base_mass = (double *)g->p[B_BMASS] + col,
                    .o = (float *)g->p[B_O] + col * d,
                    .mass = mass,
                    .cmass = mass + c->n * R,
                    .error2 = mass + 2 * c->n * R,
                    .dot = mass + 3 * c->n * R,
                    .diff = diff};
    if (!code) code = kv_look_dev(&look, g->stream);
    for (size_t i = 0; i < b->n_slot; i++) { /* where each point with a difference stands in this unit */
        check[i] = -2;
        for (size_t k = 0; k < c->n; k++)
            for (size_t p = c->first[k]; p < c->first[k + 1]; p++)
                if (c->point[p] == b->slot_point[i]) check[i] = c->count[k] == sc->n_cut ? -1 : (int32_t)k;
    }
    /* Slots of other rankings are not ours: they are placed one run of own slots at a time. */
    int32_t *dcheck = buffer(g, B_CHECK, (b->n_slot + 1) * 4, &code);
    if (!code && b->n_slot) code = kv_gpu_copy(dcheck, check, b->n_slot * 4, g->stream);
    for (size_t i = 0, to; i < b->n_slot && !code; i = to) {
        for (to = i + 1; to < b->n_slot && (check[to] == -2) == (check[i] == -2); to++) {
        }
        if (check[i] == -2) continue;
        code = kv_place_diff_dev(to - i, dcheck + i, heads, n, d, diff, width,
                                 (uint16_t *)g->p[B_A] + (i * n * width + (size_t)h0 * d), g->stream);
    }
    if (!code) code = kv_gpu_copy(s->mass, mass, 4 * c->n * R * 8, g->stream);
    if (!code) code = kv_gpu_stream_sync(g->stream);
    if (code) st = device_failed(code, b->err);
out:
    free(piece), free(step), free(check);
    return st;
}

/* Norms of all differences behind W_O. */
static kv_status project(block *b)
{
    kv_gpu_pass *g = b->g;
    size_t width = (size_t)b->m->l.n_q_head * b->m->l.d, hidden = b->m->plan->scene->info->hidden,
           rows = b->n_slot * b->n;
    int code = 0;
    float *c = buffer(g, B_C, PROJECT_ROWS * hidden * 4, &code), *norm = buffer(g, B_NORM, rows * 4 + 4, &code);
    for (size_t i = 0; i < rows && !code; i += PROJECT_ROWS) {
        size_t n = rows - i < PROJECT_ROWS ? rows - i : PROJECT_ROWS;
        code = kv_gpu_matmul(g->blas, n, hidden, width, 16, 1, (uint16_t *)g->p[B_A] + i * width, width, g->p[B_W16],
                             32, c, hidden, false);
        if (!code) code = kv_length_dev(n, hidden, c, norm + i, g->stream);
    }
    if (!code && rows) code = kv_gpu_copy(b->norm, norm, rows * 4, g->stream);
    if (!code) code = kv_gpu_stream_sync(g->stream);
    return code ? device_failed(code, b->err) : KV_OK;
}

/* ------------------------------------------------------------------------------------------------ one block of rows */
static kv_status on_device(block *b)
{
    kv_gpu_pass *g = b->g;
    kv_measure *m = b->m;
    const kv_scene *sc = m->plan->scene;
    const kv_layer *l = &m->l;
    size_t d = l->d, N = sc->n_token, cache = (size_t)l->n_kv_head * N * d, width = (size_t)l->n_q_head * d;
    size_t hidden = sc->info->hidden;
    int code = kv_gpu_select(0);
    buffer(g, B_K, cache * 4, &code), buffer(g, B_V, cache * 4, &code), buffer(g, B_FLAG, N, &code);
    if (b->n_slot) buffer(g, B_A, b->n_slot * b->n * width * 2, &code), buffer(g, B_W16, width * hidden * 2, &code);
    if (b->n_slot) buffer(g, B_W32, width * hidden * 4, &code);
    if (!code) code = kv_gpu_copy(g->p[B_K], l->k, cache * 4, g->stream);
    if (!code) code = kv_gpu_copy(g->p[B_V], l->v, cache * 4, g->stream);
    if (!code) code = kv_gpu_copy(g->p[B_FLAG], m->contested, N, g->stream);
    if (!code && b->n_slot) code = kv_gpu_copy(g->p[B_W32], l->wo, width * hidden * 4, g->stream);
    if (!code && b->n_slot) code = kv_cast_dev(width * hidden, g->p[B_W32], g->p[B_W16], 16, NULL, g->stream);
    if (code) return device_failed(code, b->err);
    kv_status st = KV_OK;
    for (uint32_t kv = 0; kv < l->n_kv_head && !st; kv++) {
        st = full_rows(b, kv);
        for (size_t r = 0; r < m->plan->n_ranking && !st; r++) {
            const kv_ranking *rk = &m->plan->ranking[r];
            size_t units = rk->granularity == KV_GRAN_QUERY_HEAD ? l->group : 1, heads = l->group / units;
            for (size_t i = 0; i < units && !st; i++) {
                size_t u = rk->granularity == KV_GRAN_LAYER ? 0 : kv * units + i;
                if (b->checks[r][u].n)
                    st = walk_unit(b, kv, rk->order + (l->order * (size_t)rk->n_unit + u) * sc->n_cut, heads,
                                   i * heads * b->n, (uint32_t)(kv * l->group + i * heads), &b->checks[r][u]);
            }
        }
        if (!st && kv_interrupted()) st = kv_fail(b->err, KV_EINTERRUPTED, "interrupted");
    }
    return st || !b->n_slot ? st : project(b);
}

static void account(block *b)
{
    kv_measure *m = b->m;
    const kv_scene *sc = m->plan->scene;
    size_t n = b->n, T = sc->n_row;
    for (size_t i = 0; i < b->n_seen; i++) {
        const seen *s = &b->seen[i];
        size_t R = s->heads * n, each = s->c->n * R;
        for (size_t k = 0; k < s->c->n; k++)
            for (size_t g = 0; g < s->heads; g++) {
                size_t h = s->h0 + g, at = k * R + g * n;
                bool whole = s->c->count[k] == sc->n_cut;
                kv_kept_rows x = {.head = (uint32_t)h,
                                  .r0 = b->r0,
                                  .n = n,
                                  .whole = whole,
                                  .mass = whole ? b->full_mass + h * n : s->mass + at,
                                  .after = m->base_mass + h * T + b->r0,
                                  .contested = !m->contest ? NULL
                                               : whole     ? b->full_cmass + h * n
                                                           : s->mass + each + at,
                                  .error2 = m->errors ? s->mass + 2 * each + at : NULL,
                                  .dot = m->errors ? s->mass + 3 * each + at : NULL};
                kv_account_rows(m, s->c->point + s->c->first[k], s->c->first[k + 1] - s->c->first[k], &x);
            }
    }
    for (size_t i = 0; i < b->n_slot; i++) kv_account_norms(m, b->slot_point[i], b->r0, n, b->norm + i * n);
}

/* Points that drop something in this layer. */
static void find_slots(block *b)
{
    const kv_measure *m = b->m;
    for (size_t i = 0; i < m->n_point; i++) {
        const kv_ranking *rk = &m->plan->ranking[m->plan->ranking_of[m->point[i].spec]];
        bool drops = false;
        for (size_t u = 0; u < rk->n_unit; u++)
            drops |= m->point[i].counts[m->l.order * rk->n_unit + u] != m->plan->scene->n_cut;
        if (drops && !kv_schedule_used(m->plan, m->point[i].spec)) b->slot_point[b->n_slot++] = i;
    }
}

kv_status kv_measure_prefixes_gpu(kv_gpu_pass *g, kv_measure *m, kv_error *err)
{
    const kv_scene *sc = m->plan->scene;
    size_t Hq = m->l.n_q_head, most = sc->n_row < KV_LAYER_ROWS ? sc->n_row : KV_LAYER_ROWS, n_unit = 0;
    double *contested = NULL;
    block b = {.g = g, .m = m, .err = err};
    kv_status st = kv_array(&b.checks, m->plan->n_ranking, sizeof *b.checks, err);
    for (size_t r = 0; r < m->plan->n_ranking && !st; r++) {
        st = kv_checkpoints_make(m, r, 0, m->n_point, &b.checks[r], err);
        n_unit += m->plan->ranking[r].granularity == KV_GRAN_LAYER ? m->l.n_kv_head : m->plan->ranking[r].n_unit;
    }
    if (!st) st = kv_array(&b.seen, n_unit + 1, sizeof *b.seen, err);
    if (!st) st = kv_array(&b.slot_point, m->n_point + 1, sizeof *b.slot_point, err);
    if (!st && m->out->layer_error) find_slots(&b);
    if (!st) st = kv_array(&b.norm, b.n_slot * most + 1, sizeof *b.norm, err);
    if (!st) st = kv_array(&b.full_mass, Hq * most, sizeof *b.full_mass, err);
    if (!st) st = kv_array(&b.full_cmass, Hq * most, sizeof *b.full_cmass, err);
    if (!st) st = kv_array(&contested, Hq, sizeof *contested, err);
    for (b.r0 = 0; b.r0 < sc->n_row && !st; b.r0 += b.n) {
        b.n = sc->n_row - b.r0 < most ? sc->n_row - b.r0 : most;
        b.R = m->l.group * b.n, b.ld = (b.R + 31) / 32 * 32;
        pthread_mutex_lock(&g->lock);
        st = on_device(&b);
        pthread_mutex_unlock(&g->lock);
        for (size_t i = 0; i < Hq * b.n && !st; i++) contested[i / b.n] += b.full_cmass[i];
        if (!st) account(&b);
        for (size_t i = 0; i < b.n_seen; i++) free(b.seen[i].mass);
        b.n_seen = 0;
    }
    for (size_t i = 0; i < m->n_point && !st; i++)
        for (uint32_t h = 0; h < Hq; h++) kv_measure_sums(m, i, h)->contested_all = contested[h];
    for (size_t r = 0; r < m->plan->n_ranking && b.checks; r++)
        if (b.checks[r]) kv_checkpoints_free(b.checks[r], m->plan->ranking[r].n_unit);
    free(b.checks), free(b.seen), free(b.slot_point), free(b.norm), free(b.full_mass), free(b.full_cmass),
        free(contested);
    return st;
}
