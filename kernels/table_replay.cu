/* table_replay.cu - the checks of the device kernels of a replay (exact_dev.h, walk_dev.h) against the CPU's functions:
 * equal bytes for what decides kept sets, tolerances for what is measured. */
#include "kernels/exact_dev.h"
#include "kernels/math.h"
#include "kernels/table_cuda.cuh"
#include "kernels/walk_dev.h"

#define COUNT(a) (sizeof(a) / sizeof *(a))

namespace
{
const size_t HQ = 6, HKV = 2;

/* Six query heads on two KV heads, rows at the end of the keys unless row0 says otherwise. */
struct rows {
    kv_turned t;
    float *q, *k, *p, *sum, *lse; /* host: q, k, then p [HQ][n_row][n_key] and lse of the definition */
    void *dq, *dk, *dp, *dsum, *dlse;
};

void *scratch_of(pool *p, size_t n)
{
    return device(p, n + 1);
}

void same(pool *p, const char *what, const void *got, const void *want, size_t bytes)
{
    if (!p->error && memcmp(got, want, bytes)) fail(p->v, what);
}

void *fetch(pool *p, const void *dev, size_t bytes)
{
    float *x = floats(p, bytes / 4 + 1, 0);
    if (!p->error) p->error = cudaMemcpy(x, dev, bytes, cudaMemcpyDeviceToHost);
    return x;
}

void did(pool *p, int code)
{
    if (!p->error) p->error = (cudaError_t)code;
}

rows attend(pool *p, const kv_case *c)
{
    rows r;
    memset(&r, 0, sizeof r);
    kv_turned *t = &r.t;
    t->n_q_head = HQ, t->n_kv_head = HKV, t->n_row = (uint32_t)c->n_row, t->n_key = (uint32_t)c->n_key;
    t->row0 = (uint32_t)c->row0, t->d = (uint32_t)c->d, t->scale = 1 / sqrtf((float)c->d), t->softcap = c->softcap;
    t->q_head = (c->n_row + 1) * c->d, t->k_head = (c->n_key + 3) * c->d;
    t->ld = (HQ * c->n_row + 31) / 32 * 32;
    r.q = floats(p, HQ * t->q_head, 2), r.k = floats(p, HKV * t->k_head, 1);
    r.p = floats(p, HQ * c->n_row * c->n_key, 0), r.lse = floats(p, HQ * c->n_row, 0);
    r.dq = upload(p, 32, HQ * t->q_head, r.q), r.dk = upload(p, 32, HKV * t->k_head, r.k);
    r.dp = device(p, c->n_key * t->ld * 4), r.dsum = device(p, t->ld * 4), r.dlse = device(p, t->ld * 4);
    kv_attn_shape s = {c->n_row, c->n_key, c->d, c->row0, 0, t->scale, t->softcap};
    float *turned = floats(p, c->n_key * t->ld, 1);
    for (size_t h = 0; h < HQ; h++) {
        const float *q = r.q + h * t->q_head, *k = r.k + h / (HQ / HKV) * t->k_head;
        if (!kv_probs_ref(&s, q, k, r.p + h * c->n_row * c->n_key) ||
            !kv_probs_turned_ref(&s, 1, q, t->q_head, k, turned, (c->n_row + 15) / 16 * 16, r.lse + h * c->n_row))
            abort();
    }
    did(p, kv_scores_dev(t, (float *)r.dq, (float *)r.dk, (float *)r.dp, 0));
    did(p, kv_softmax_dev(t, (float *)r.dp, (float *)r.dsum, (float *)r.dlse, scratch_of(p, kv_softmax_scratch(t)), 0));
    return r;
}

void check_probs(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    rows r = attend(&p, c);
    float *e = (float *)fetch(&p, r.dp, c->n_key * r.t.ld * 4), *sum = (float *)fetch(&p, r.dsum, r.t.ld * 4);
    float *got = floats(&p, HQ * c->n_row * c->n_key, 1);
    for (size_t i = 0; i < HQ * c->n_row; i++)
        for (size_t j = 0; j < c->n_key; j++) got[i * c->n_key + j] = e[j * r.t.ld + i] / sum[i];
    same(&p, "probabilities differ", got, r.p, HQ * c->n_row * c->n_key * 4);
    same(&p, "log-sum-exps differ", fetch(&p, r.dlse, HQ * c->n_row * 4), r.lse, HQ * c->n_row * 4);
    (void)self;
    close_pool(&p);
}

/* window = w; the first n_key - w columns. */
void check_rows(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    rows r = attend(&p, c);
    const uint32_t w = (uint32_t)c->window, n = (uint32_t)(c->n_key - w);
    float *want = floats(&p, HQ * c->n_key, 0);
    double *sum = (double *)floats(&p, 2 * n + 2, 1), *var = (double *)floats(&p, 2 * n + 2, 1);
    void *out = device(&p, HQ * c->n_key * 4);
    for (int how = KV_ROWS_SUM; how <= KV_ROWS_MAX; how++) {
        for (size_t h = 0; h < HQ; h++)
            kv_reduce_rows((kv_row_reduce)how, 200, w, n, r.p + (h * c->n_row + c->n_row - w) * c->n_key, c->n_key, sum,
                           var, want + h * c->n_key);
        did(&p, kv_reduce_rows_dev(&r.t, (kv_row_reduce)how, 200, w, n, (float *)r.dp, (float *)r.dsum, (float *)out,
                                   c->n_key, 0, NULL, 0));
        same(&p, "reduced rows differ", fetch(&p, out, HQ * c->n_key * 4), want, HQ * c->n_key * 4);
    }
    double *stats = (double *)floats(&p, 2 * HQ * (w + 1), 1), *dev = (double *)device(&p, kv_window_stats(&r.t, w, n));
    for (size_t h = 0; h < HQ; h++) {
        const float *x = r.p + (h * c->n_row + c->n_row - w) * c->n_key;
        for (size_t i = 0; i < w; i++) stats[h * w + i] = kv_entropy_ref(n, x + i * c->n_key, 1e-10f);
        kv_column_spread_ref(w, n, x, c->n_key, sum, var);
        for (size_t i = 0; i < n; i++) var[i] = w > 1 ? var[i] / ((double)w - 1) : 0;
        stats[HQ * w + h] = kv_sum_blocks(n, var);
    }
    did(&p, kv_reduce_rows_dev(&r.t, KV_ROWS_MAX, 0, w, n, (float *)r.dp, (float *)r.dsum, (float *)out, c->n_key, 1e-10f,
                               dev, 0));
    same(&p, "entropies or spreads differ", fetch(&p, dev, 8 * HQ * (w + 1)), stats, 8 * HQ * (w + 1));
    same(&p, "reduced rows beside them differ", fetch(&p, out, HQ * c->n_key * 4), want, HQ * c->n_key * 4);
    (void)self;
    close_pool(&p);
}

/* n_key positions of HQ heads; kernel d. Then norms and shares. */
void check_units(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t n = c->n_key, ld = n + 5;
    float *x = floats(&p, HQ * ld, 1), *copy = floats(&p, HQ * ld, 1), *tmp = floats(&p, n, 1);
    void *dx = upload(&p, 32, HQ * ld, x), *out = device(&p, HQ * ld * 4);
    const size_t UNITS[] = {HQ, HKV, 1};
    for (int how = 0; how < 3 * 5 * 3 * 2; how++) {
        kv_grouping g = {HQ,       UNITS[how % 3],         c->d, (kv_group_reduce)(how / 3 % 5), (kv_pooling)(how / 15 % 3),
                         how >= 45};
        float *want = floats(&p, HQ * ld, 0);
        memcpy(copy, x, HQ * ld * 4);
        kv_group_heads(&g, n, ld, copy, want, tmp);
        if (!p.error) p.error = cudaMemset(out, 0xff, HQ * ld * 4);
        did(&p, kv_group_heads_dev(&g, n, ld, (float *)dx, (float *)out, 0));
        float *got = (float *)fetch(&p, out, HQ * ld * 4);
        same(&p, "units differ", got, want, g.n_unit * ld * 4);
        free(got), free(want), p.n_host -= 2;
    }
    const size_t d = c->n_row, m = HQ * ld / d; /* rows of d in x */
    float *norm = floats(&p, HQ * ld, 0), *want = floats(&p, HQ * ld, 0);
    for (size_t i = 0; i < m; i++) norm[i] = -1 * (float)kv_length(d, x + i * d);
    did(&p, kv_norms_dev(1, m, d, 0, -1, (float *)dx, (float *)out, ld, 0));
    same(&p, "norms differ", fetch(&p, out, m * 4), norm, m * 4);
    for (size_t i = 0; i < n; i++) {
        double sum = (double)x[i] + x[ld + i];
        want[i] = (float)(sum / 2);
    }
    did(&p, kv_spread_kv_dev(HKV, 1, n, ld, (float *)dx, (float *)out, 0));
    same(&p, "means of KV heads differ", fetch(&p, out, n * 4), want, n * 4);
    did(&p, kv_spread_kv_dev(HKV, HQ, n, ld, (float *)dx, (float *)out, 0));
    float *got = (float *)fetch(&p, out, HQ * ld * 4);
    for (size_t u = 0; u < HQ; u++) same(&p, "copies of KV heads differ", got + u * ld, x + u / 3 * ld, n * 4);
    for (size_t i = 0; i < n; i++) want[i] = x[i] / (float)(n - i);
    did(&p, kv_column_share_dev(1, n, ld, true, (float *)dx, (float *)out, 0));
    same(&p, "shares of columns differ", fetch(&p, out, n * 4), want, n * 4);
    (void)self;
    close_pool(&p);
}

/* n_row units of n_key scores with many ties, `window` of them forced. */
void check_rank(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t U = c->n_row, n = c->n_key, nf = c->window, m = n - nf;
    float *x = floats(&p, U * n, 3), *sorted = floats(&p, U * n, 0);
    for (size_t i = 0; i < U * n; i++) {
        if (c->kind) x[i] = rintf(x[i]);
        if (c->kind && i % 11 == 0) x[i] = i % 2 ? 0.f : -0.f;
        if (c->kind && i % 97 == 5) x[i] = i % 2 ? NAN : -INFINITY;
    }
    uint32_t *list = (uint32_t *)floats(&p, n, 1), *order = (uint32_t *)floats(&p, n, 1);
    uint32_t *want = (uint32_t *)floats(&p, U * n, 0);
    for (size_t i = 0; i < nf; i++) list[i] = (uint32_t)(n - 1 - i);
    for (size_t i = nf; i < n; i++) list[i] = (uint32_t)(i - nf);
    for (size_t u = 0; u < U; u++) {
        if (!kv_rank_ref(n, x + u * n, order)) abort();
        memcpy(want + u * n, list, nf * 4);
        for (size_t i = 0, k = 0; i < n; i++)
            if (order[i] < m) sorted[u * m + k] = x[u * n + order[i]], want[u * n + nf + k++] = order[i];
    }
    float *dx = (float *)device(&p, U * n * 4), *ds = (float *)device(&p, U * n * 4);
    uint32_t *dl = (uint32_t *)device(&p, n * 4), *dorder = (uint32_t *)device(&p, U * n * 4);
    if (!p.error) p.error = cudaMemcpy(dx, x, U * n * 4, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(dl, list, n * 4, cudaMemcpyHostToDevice);
    kv_rank_unit *unit = (kv_rank_unit *)floats(&p, U * sizeof *unit / 4, 1);
    for (size_t u = 0; u < U; u++) {
        kv_rank_unit one = {dx + u * n, dl, dorder + u * n, ds + u * m, (uint32_t)n, (uint32_t)nf, (uint32_t)(u * m)};
        unit[u] = one;
    }
    void *du = device(&p, U * sizeof *unit);
    if (!p.error) p.error = cudaMemcpy(du, unit, U * sizeof *unit, cudaMemcpyHostToDevice);
    did(&p, kv_rank_dev(U, (kv_rank_unit *)du, U * m, n, scratch_of(&p, kv_rank_scratch(U, U * m)), 0));
    same(&p, "orders differ", fetch(&p, dorder, U * n * 4), want, U * n * 4);
    same(&p, "sorted scores differ", fetch(&p, ds, U * m * 4), sorted, U * m * 4);
    (void)self;
    close_pool(&p);
}

/* One unit: n_row columns, n_key keys of which all but the last 3 are walked in uneven pieces, looks after each. kind 16:
 * values of 16 bits. */
void check_walk(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t R = c->n_row, N = c->n_key, d = c->d, ld = (R + 31) / 32 * 32, n = N > 3 ? N - 3 : N;
    float *e = floats(&p, N * ld, 1), *x = floats(&p, N * d, 1), *o = floats(&p, R * d, 0.1f), *sum = floats(&p, R, 1);
    float *base = floats(&p, R * d, 1), *order_score = floats(&p, N, 1);
    uint32_t *order = (uint32_t *)floats(&p, N, 1);
    uint8_t *flag = (uint8_t *)floats(&p, N / 4 + 1, 1);
    double *base_mass = (double *)floats(&p, 2 * R, 1);
    for (size_t i = 0; i < N * ld; i++) e[i] = fabsf(e[i]);
    for (size_t i = 0; i < R; i++) sum[i] = 5 + fabsf(sum[i]), base_mass[i] = 1.5 + 0.01 * (double)i;
    for (size_t i = 0; i < N; i++) flag[i] = i % 3 == 1;
    if (!kv_rank_ref(N, order_score, order)) abort();
    void *de = upload(&p, 32, N * ld, e), *dx = upload(&p, 32, N * d, x), *dbase = upload(&p, 32, R * d, base);
    if (c->kind == 16) {
        kv_round_ref(16, N * d, x);
        if (!p.error) p.error = cudaMemcpy(dx, x, N * d * 4, cudaMemcpyHostToDevice);
    }
    void *dsum = upload(&p, 32, R, sum), *dor = device(&p, N * 4), *df = device(&p, N), *dbm = device(&p, 8 * R);
    void *doo = upload(&p, 32, R * d, o);
    if (!p.error) p.error = cudaMemcpy(dor, order, N * 4, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(df, flag, N, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(dbm, base_mass, 8 * R, cudaMemcpyHostToDevice);
    kv_walk_piece piece[64];
    uint32_t step[65] = {0}, first[65] = {0}, slot[64];
    size_t np = 0, nc = 0;
    for (size_t at = 0; at < n && np < 64;) {
        size_t len = np == 63 ? n - at : 1 + np * np % 97;
        if (len > n - at) len = n - at;
        kv_walk_piece one = {0, (uint32_t)at, (uint32_t)(at + len)};
        piece[np++] = one, at += len;
        if (np % 2 == 0 || at == n) slot[nc] = (uint32_t)(nc * 7 % 64), step[++nc] = (uint32_t)np, first[nc] = (uint32_t)nc;
    }
    kv_walk_unit unit = {(uint32_t *)dor, (float *)dx, 0, 0, 0, 0, (uint32_t)nc};
    void *du = device(&p, sizeof unit), *dpc = device(&p, sizeof piece), *dst = device(&p, sizeof step);
    void *dfi = device(&p, sizeof first), *dsl = device(&p, sizeof slot);
    if (!p.error) p.error = cudaMemcpy(du, &unit, sizeof unit, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(dpc, piece, sizeof piece, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(dst, step, sizeof step, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(dfi, first, sizeof first, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(dsl, slot, sizeof slot, cudaMemcpyHostToDevice);
    kv_walk_set w = {(uint32_t)R,       (uint32_t)d,           (uint32_t)N, ld, (float *)de, (uint8_t *)df, (kv_walk_unit *)du,
                     (kv_walk_piece *)dpc, c->kind == 16};
    float *part = (float *)device(&p, np * R * d * 4);
    double *pm = (double *)device(&p, np * R * 8), *pc = (double *)device(&p, np * R * 8);
    double *mass = (double *)device(&p, 4 * nc * R * 8);
    void *to = device(&p, 64 * R * d * 2);
    kv_look l;
    memset(&l, 0, sizeof l);
    l.step = (uint32_t *)dst, l.first = (uint32_t *)dfi, l.slot = (uint32_t *)dsl, l.part = part, l.sum = (float *)dsum;
    l.base_out = (float *)dbase, l.o = (float *)doo, l.piece_mass = pm, l.piece_cmass = pc, l.base_mass = (double *)dbm;
    l.mass = mass, l.cmass = mass + nc * R, l.error2 = mass + 2 * nc * R, l.dot = mass + 3 * nc * R;
    l.to = to, l.n_row = R, l.width = d, l.scale = 4;
    did(&p, kv_walk_dev(&w, np, part, pm, pc, 0));
    did(&p, kv_look_dev(&w, 1, &l, 0));
    double *got = (double *)fetch(&p, mass, 4 * nc * R * 8);
    float *diff16 = download(&p, 16, 64 * R * d, to);
    float *out = floats(&p, R * d, 1), *rest = floats(&p, R * d, 1), *diff = floats(&p, R * d, 1);
    double *m = (double *)floats(&p, 2 * R, 1), *f = (double *)floats(&p, 2 * R, 1), *e2 = (double *)floats(&p, 2 * R, 1);
    double *dot = (double *)floats(&p, 2 * R, 1);
    memcpy(out, base, R * d * 4), memcpy(m, base_mass, 8 * R), memset(rest, 0, R * d * 4), memset(f, 0, 8 * R);
    float *a = floats(&p, 4 * R, 1), *b = floats(&p, 4 * R, 1);
    size_t at = 0;
    for (size_t k = 0; k < nc; k++) {
        size_t end = piece[step[k + 1] - 1].end;
        kv_walk_ref(R, d, e, ld, x, at, end - at, order + at, flag, m, f, out, rest);
        kv_walk_compare_ref(R, d, m, out, rest, o, e2, dot, diff, d);
        at = end;
        for (size_t i = 0; i < R; i++) {
            const double *g = got + k * R + i;
            a[i] = (float)g[0], b[i] = (float)(m[i] / sum[i]);
            a[R + i] = (float)g[nc * R], b[R + i] = (float)(f[i] / sum[i]);
            a[2 * R + i] = (float)sqrt(g[2 * nc * R]), b[2 * R + i] = (float)sqrt(e2[i]);
            a[3 * R + i] = (float)g[3 * nc * R], b[3 * R + i] = (float)dot[i];
        }
        compare(&p, "look", 4 * R, a, b, self->tol);
        for (size_t i = 0; i < R * d; i++) diff[i] *= 4;
        compare(&p, "difference as f16", R * d, diff16 + slot[k] * R * d, diff, 2e-3);
        p.n_host -= 4; /* the copies that compare made */
        for (int i = 0; i < 4; i++) free(p.host[p.n_host + i]);
    }
    close_pool(&p);
}

/* The full cache's rows from looks, and a power of two above the largest. */
void check_full(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t U = HKV, R = c->n_row, d = c->d;
    float *sum = floats(&p, U * R, 1), *x = floats(&p, 2 * U * R * d, 1), *o = floats(&p, U * R * d, 0);
    double *mass = (double *)floats(&p, 4 * U * R, 1);
    float top = 0;
    for (size_t i = 0; i < U * R; i++) sum[i] = 2 + fabsf(sum[i]);
    for (size_t i = 0; i < 2 * U * R; i++) mass[i] = 0.5 + 0.001 * (double)i;
    void *ds = upload(&p, 32, U * R, sum), *dx = upload(&p, 32, 2 * U * R * d, x), *dm = device(&p, 16 * U * R);
    if (!p.error) p.error = cudaMemcpy(dm, mass, 16 * U * R, cudaMemcpyHostToDevice);
    void *bm = device(&p, 8 * U * R), *bo = device(&p, 4 * U * R * d), *dout = device(&p, 4 * U * R * d);
    did(&p, kv_full_rows_dev(U, R, d, (float *)ds, (double *)dm, (float *)dx, (double *)bm, (float *)bo, (float *)dout, 0));
    float *base = floats(&p, U * R * d, 0);
    for (size_t i = 0; i < U * R; i++) {
        size_t late = i / R * 2 * R + i % R, all = late + R;
        for (size_t j = 0; j < d; j++) {
            base[i * d + j] = x[late * d + j];
            o[i * d + j] = (float)(x[all * d + j] / (mass[all] * sum[i]));
        }
    }
    compare(&p, "o", U * R * d, download(&p, 32, U * R * d, dout), o, self->tol);
    compare(&p, "base", U * R * d, download(&p, 32, U * R * d, bo), base, self->tol);
    for (size_t i = 0; i < 2 * U * R * d; i++) top = fmaxf(top, fabsf(x[i]));
    float *dt = (float *)device(&p, 4), *got;
    did(&p, kv_largest_dev(2 * U * R * d, (float *)dx, dt, (float *)device(&p, 4096), 0));
    got = (float *)fetch(&p, dt, 4);
    int e;
    if (!(*got > top && *got <= 2 * top && frexpf(*got, &e) == 0.5f)) fail(v, "not the next power of two");
    close_pool(&p);
}

const kv_case rows_cases[] = {{1, 1, 4, 0, 1, 0, 0},        {3, 40, 8, 37, 2, 0, 0},     {7, 333, 20, 326, 7, 0, 0},
                              {32, 1000, 64, 968, 32, 0, 0}, {40, 700, 128, 660, 33, 0, 0}, {64, 513, 96, 449, 1, 30, 0},
                              {5, 260, 7, 255, 5, 5, 0},    {16, 2500, 128, 2484, 16, 0, 0}};
const kv_case unit_cases[] = {{8, 100, 7, 0, 0, 0, 0}, {7, 3, 5, 0, 0, 0, 0}, {128, 3000, 5, 0, 0, 0, 0},
                              {5, 1, 3, 0, 0, 0, 0},   {64, 777, 63, 0, 0, 0, 0}};
const kv_case rank_cases[] = {{1, 1, 0, 0, 0, 0, 0},     {3, 5, 0, 0, 5, 0, 0},       {4, 1000, 0, 0, 32, 0, 0},
                              {9, 1000, 0, 0, 32, 0, 1}, {2, 70000, 0, 0, 64, 0, 1}, {48, 4097, 0, 0, 1, 0, 0}};
const kv_case walk_cases[] = {{4, 5, 8, 0, 0, 0, 32},      {64, 500, 64, 0, 0, 0, 16}, {256, 3000, 128, 0, 0, 0, 16},
                              {256, 1500, 128, 0, 0, 0, 32}, {3, 130, 7, 0, 0, 0, 32},  {130, 900, 96, 0, 0, 0, 16},
                              {10, 300, 257, 0, 0, 0, 32}, {1, 40, 1000, 0, 0, 0, 16}};
const kv_case full_cases[] = {{1, 0, 4, 0, 0, 0, 0}, {33, 0, 128, 0, 0, 0, 0}, {256, 0, 96, 0, 0, 0, 0}};

#define ROW(name, cls, tol, cases, check)                                                                              \
    {                                                                                                                  \
        name, cls, tol, cases, COUNT(cases), NULL, check                                                               \
    }
} // namespace

extern const kv_kernel kv_replay_table[] = {
    ROW("replay probs", KV_EXACT, 0, rows_cases, check_probs), ROW("replay rows", KV_EXACT, 0, rows_cases, check_rows),
    ROW("replay units", KV_EXACT, 0, unit_cases, check_units), ROW("replay rank", KV_EXACT, 0, rank_cases, check_rank),
    ROW("replay walk", KV_CLOSE, 1e-5, walk_cases, check_walk), ROW("replay full", KV_CLOSE, 1e-6, full_cases, check_full),
};
extern const size_t kv_replay_count = COUNT(kv_replay_table);
