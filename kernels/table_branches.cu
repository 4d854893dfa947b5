/* table_branches.cu - the checks of attention of branches and of what compares them (table_cuda.cuh). */
#include "kernels/attention.cuh"
#include "kernels/table_cuda.cuh"

/* Six query heads on two KV heads. Branch 0 sees all of the prompt; of the others, odd ones share a set in a KV head,
 * even ones have one for each head; the last sees nothing of it. */
void kv_check_branches(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const int bits = c->kind % 100, path = c->kind >= 100 ? KV_PATH_PLAIN : KV_PATH_BEST;
    const size_t nb = c->row0, rows = nb * c->n_row, L = c->n_key, d = c->d;
    kv_cuda_attn a;
    kv_cuda_branches b, on_host;
    memset(&a, 0, sizeof a), memset(&b, 0, sizeof b);
    a.n_q_head = 6, a.n_kv_head = 2, a.d = (uint32_t)d, a.n_row = (uint32_t)c->n_row, a.n_key = (uint32_t)L;
    a.window = (uint32_t)c->window, a.scale = 1 / sqrtf((float)d), a.softcap = c->softcap;
    a.bits = a.out_bits = bits, a.q_row = d + 8, a.q_head = a.q_row * rows + 8;
    a.kv_token = d + 16, a.kv_head = a.kv_token * (L + 2) + 8;
    a.out_head = d, a.out_row = 6 * d + 8, a.lse_head = rows + 3;
    b.n_branch = (uint32_t)nb, b.own_head = rows * d + 8;
    const size_t n_q = 6 * a.q_head, n_kv = 2 * a.kv_head, n_own = 2 * b.own_head, n_out = rows * a.out_row,
                 n_lse = 6 * a.lse_head, heads = 6 * nb;
    float *q = floats(&p, n_q, 1), *k = floats(&p, n_kv, 1), *x = floats(&p, n_kv, 1);
    float *ok = floats(&p, n_own, 1), *ov = floats(&p, n_own, 1);
    uint32_t *list = (uint32_t *)floats(&p, heads * L, 1), *first = (uint32_t *)floats(&p, heads, 1),
             *count = (uint32_t *)floats(&p, heads, 1);
    for (size_t i = 0; i < heads; i++) {
        const size_t branch = i / 6, set = branch % 2 ? i / 3 * 3 : i, step = 1 + set % 3;
        first[i] = branch ? (uint32_t)(set * L) : KV_WHOLE;
        count[i] = branch && branch == nb - 1 ? 0 : (uint32_t)((L + step - 1) / step);
        for (size_t j = 0; j < L; j++) list[i * L + j] = (uint32_t)(j * step % L < L ? L - 1 - j * step % L : 0);
    }
    void *dq = upload(&p, bits, n_q, q), *dk = upload(&p, bits, n_kv, k), *dv = upload(&p, bits, n_kv, x);
    void *dok = upload(&p, bits, n_own, ok), *dov = upload(&p, bits, n_own, ov);
    on_host = b, on_host.own_k = ok, on_host.own_v = ov;
    on_host.list = list, on_host.first = first, on_host.count = count;
    uint32_t *dl = (uint32_t *)device(&p, heads * L * 4 + 4), *df = (uint32_t *)device(&p, heads * 4),
             *dc = (uint32_t *)device(&p, heads * 4);
    if (!p.error) p.error = cudaMemcpy(dl, list, heads * L * 4, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(df, first, heads * 4, cudaMemcpyHostToDevice);
    if (!p.error) p.error = cudaMemcpy(dc, count, heads * 4, cudaMemcpyHostToDevice);
    b.own_k = dok, b.own_v = dov, b.list = dl, b.first = df, b.count = dc;
    void *out[2] = {device(&p, n_out * 4), device(&p, n_out * 4)};
    float *lse[2] = {(float *)device(&p, n_lse * 4), (float *)device(&p, n_lse * 4)};
    for (int i = 0; i < 2 && !p.error; i++)
        p.error = (cudaError_t)kv_attention_branches_path(&a, &b, path, dq, dk, dv, out[i], lse[i], 0);
    float *got = download(&p, bits, n_out, out[0]), *again = download(&p, bits, n_out, out[1]);
    float *want = floats(&p, n_out, 0), *want_lse = floats(&p, n_lse, 0);
    if (!kv_attention_branches_ref(&a, &on_host, q, k, x, want, want_lse)) fail(v, "out of memory");
    if (memcmp(got, again, n_out * sizeof *got)) fail(v, "two runs differ");
    for (size_t i = 0; i < nb; i++) { /* each by its own size: who sees little has larger outputs */
        const size_t n = c->n_row * a.out_row, at = i * n;
        compare(&p, "out", n, got + at, want + at, self->tol);
        for (int k = 0; k < 2; k++) free(p.host[--p.n_host]);
    }
    compare(&p, "lse", n_lse, download(&p, 32, n_lse, lse[0]), want_lse, 1e-5);
    close_pool(&p);
}

void kv_check_logits(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, nb = c->n_key, n = c->d;
    float *base = floats(&p, nb * n, 4), *x = floats(&p, m * n, 1), *want = floats(&p, 4 * m, 0);
    uint32_t *target = (uint32_t *)floats(&p, nb, 0);
    kv_logit_row *said = (kv_logit_row *)floats(&p, nb * sizeof *said / 4, 0),
                 *got = (kv_logit_row *)floats(&p, nb * sizeof *said / 4, 0);
    for (size_t i = 0; i < nb; i++) target[i] = (uint32_t)((seed + i * 7919) % n);
    for (size_t i = 0; i < nb && n > 40; i++) base[i * n + 40] = base[i * n + 7]; /* a tie */
    for (size_t r = 0; r < m; r++) /* near the base, and row 1 the base itself */
        for (size_t i = 0; i < n; i++)
            x[r * n + i] = base[(c->row0 + r) % nb * n + i] + (r == 1 ? 0 : x[r * n + i] / (1 + (float)(r % 3)));
    float *db = (float *)upload(&p, 32, nb * n, base), *dx = (float *)upload(&p, 32, m * n, x);
    uint32_t *dt = (uint32_t *)device(&p, 4 * nb);
    kv_logit_row *ds = (kv_logit_row *)device(&p, nb * sizeof *ds);
    float *out = (float *)device(&p, 16 * m);
    kv_logit_rows_ref(nb, n, base, target, said);
    kv_logit_compare_ref(m, n, x, c->row0, nb, base, said, target, want);
    if (!p.error) p.error = cudaMemcpy(dt, target, 4 * nb, cudaMemcpyHostToDevice);
    if (!p.error) p.error = (cudaError_t)kv_logit_rows_dev(nb, n, db, dt, ds, 0);
    if (!p.error) p.error = (cudaError_t)kv_logit_compare_dev(m, n, dx, c->row0, nb, db, ds, dt, out, 0);
    if (!p.error) p.error = cudaMemcpy(got, ds, nb * sizeof *got, cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < nb; i++) {
        if (memcmp(got[i].top, said[i].top, sizeof said[i].top)) fail(v, "the largest logits are others");
        if (!(fabs(got[i].lse - said[i].lse) < 1e-5 && fabsf(got[i].nll - said[i].nll) < 1e-5f)) fail(v, "lse is wrong");
    }
    compare(&p, "out", 4 * m, download(&p, 32, 4 * m, out), want, self->tol);
    close_pool(&p);
}

void kv_check_distance(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, nb = c->n_key, width = c->d, nu = c->row0, n = width * nu;
    float *base = floats(&p, nb * n, 1), *x = floats(&p, m * n, 1), *want = floats(&p, m, 0);
    for (size_t i = 0; i < width; i++) base[i] = 0; /* a unit of nothing */
    for (size_t i = 0; i < n; i++) x[i] = base[i];  /* a row that is the base's */
    void *db = upload(&p, c->kind, nb * n, base), *dx = upload(&p, c->kind, m * n, x), *out = device(&p, 4 * m);
    kv_row_distance_ref(m, nb, nu, width, base, x, want);
    if (!p.error) p.error = (cudaError_t)kv_row_distance_dev(m, nb, nu, width, c->kind, db, dx, (float *)out, 0);
    compare(&p, "distance", m, download(&p, 32, m, out), want, self->tol);
    close_pool(&p);
}
