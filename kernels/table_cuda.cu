/* table_cuda.cu - the checks of the device kernels of cuda.h against their definitions; see table.h.
 * A check fills host arrays, rounds them to the element type, runs the definition on them, uploads them, runs the
 * kernel twice (the bytes must agree) and compares. Outputs start poisoned, so what was not written shows. */
#include "kernels/attention.cuh"
#include "kernels/gpu.h"
#include "kernels/quant.h"
#include "kernels/random.h"
#include "kernels/table_cuda.cuh"
#include "kernels/tensor.cuh"

namespace
{
#define COUNT(a) (sizeof(a) / sizeof *(a))

/* Six query heads on two KV heads, strides that leave gaps. */
kv_cuda_attn shape_of(const kv_case *c, int bits, int out_bits)
{
    kv_cuda_attn a;
    memset(&a, 0, sizeof a);
    a.n_q_head = 6, a.n_kv_head = 2, a.d = (uint32_t)c->d;
    a.n_row = (uint32_t)c->n_row, a.n_key = (uint32_t)c->n_key, a.row0 = (uint32_t)c->row0;
    a.window = (uint32_t)c->window, a.scale = 1 / sqrtf((float)c->d), a.softcap = c->softcap;
    a.bits = bits, a.out_bits = out_bits;
    a.q_row = c->d + 8, a.q_head = a.q_row * c->n_row + 8;
    a.kv_token = c->d + 16, a.kv_head = a.kv_token * (c->n_key + 2) + 8;
    a.out_head = c->d, a.out_row = 6 * c->d + 8, a.lse_head = c->n_row + 3;
    return a;
}

float query_factor(const kv_case *c)
{
    return c->kind == 2 ? 8.f : 1.f;
}

/* The row's columns of the largest p differ: are they as good as each other? Then both become 0. */
void same_column(pool *p, const kv_cuda_attn *a, const float *q, const float *k, float *got, float *want)
{
    if (got[1] == want[1]) return;
    double s[2] = {0, 0};
    if (!(got[1] >= 0 && got[1] < (float)a->n_key)) {
        fail(p->v, "column of the largest p is out of range");
        return;
    }
    for (uint32_t i = 0; i < a->d; i++) {
        s[0] += (double)q[i] * k[(size_t)got[1] * a->kv_token + i];
        s[1] += (double)q[i] * k[(size_t)want[1] * a->kv_token + i];
    }
    if (!(s[0] * a->scale >= s[1] * a->scale - 1e-4)) fail(p->v, "column of the largest p is wrong");
    got[1] = want[1];
}

enum { DECODE = 3 }; /* beside the KV_PATH values */

int attend(const kv_cuda_attn *a, int path, const void *q, const void *k, const void *v, void *out, float *lse,
           float *stat, void *scratch)
{
    return path == DECODE ? kv_decode_dev(a, q, k, v, out, lse, stat, scratch, 0)
                          : kv_attention_path(a, path, q, k, v, out, lse, stat, 0);
}

/* A head's rows packed, as the definitions want them. */
float *packed(pool *p, size_t n, size_t d, const float *x, size_t stride)
{
    float *y = floats(p, n * d, 1);
    for (size_t r = 0; r < n; r++) memcpy(y + r * d, x + r * stride, d * sizeof *y);
    return y;
}

kv_attn_shape host_shape(const kv_cuda_attn *a)
{
    kv_attn_shape s = {a->n_row, a->n_key, a->d, a->row0, a->window, a->scale, a->softcap};
    return s;
}

template <int BITS, int PATH>
void check_attention(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    for (int wide = 0; wide < 2; wide++) {
        pool p = {v, seed + (uint64_t)wide};
        kv_cuda_attn a = shape_of(c, BITS, wide ? 32 : BITS);
        size_t n_q = 6 * a.q_head, n_kv = 2 * a.kv_head, n_out = a.n_row * a.out_row, n_lse = 6 * a.lse_head;
        float *q = floats(&p, n_q, query_factor(c)), *k = floats(&p, n_kv, 1), *x = floats(&p, n_kv, 1);
        void *dq = upload(&p, BITS, n_q, q), *dk = upload(&p, BITS, n_kv, k), *dv = upload(&p, BITS, n_kv, x);
        void *out[2] = {device(&p, n_out * 4), device(&p, n_out * 4)}, *scratch = NULL;
        float *lse[2] = {(float *)device(&p, n_lse * 4), (float *)device(&p, n_lse * 4)};
        float *stat = (float *)device(&p, n_lse * 16);
        if (PATH == DECODE) scratch = device(&p, kv_decode_scratch(&a));
        for (int i = 0; i < 2 && !p.error; i++)
            p.error = (cudaError_t)attend(&a, PATH, dq, dk, dv, out[i], lse[i], i ? NULL : stat, scratch);

        float *got = download(&p, a.out_bits, n_out, out[0]), *got_lse = download(&p, 32, n_lse, lse[0]);
        float *got_stat = download(&p, 32, 4 * n_lse, stat), *again = download(&p, a.out_bits, n_out, out[1]);
        float *want = floats(&p, n_out, 0), *want_lse = floats(&p, n_lse, 0), *want_stat = floats(&p, 4 * n_lse, 0);
        kv_attn_shape s = host_shape(&a);
        for (size_t h = 0; h < 6; h++) {
            float *hq = packed(&p, a.n_row, a.d, q + h * a.q_head, a.q_row);
            float *hk = packed(&p, a.n_key, a.d, k + h / 3 * a.kv_head, a.kv_token);
            float *hv = packed(&p, a.n_key, a.d, x + h / 3 * a.kv_head, a.kv_token);
            if (!kv_attention_ref(&s, hq, hk, hv, want + h * a.out_head, a.out_row, want_lse + h * a.lse_head,
                                  want_stat + 4 * h * a.lse_head))
                fail(v, "kv_attention_ref failed");
            for (size_t r = 0; r < a.n_row; r++)
                same_column(&p, &a, hq + r * a.d, k + h / 3 * a.kv_head, got_stat + 4 * (h * a.lse_head + r),
                            want_stat + 4 * (h * a.lse_head + r));
            for (int i = 0; i < 3; i++) free(p.host[--p.n_host]);
        }
        /* a score of some tens in float is off by some 1e-6, and p by as much in proportion */
        const double peaked = c->kind == 2 ? 4 : 1, exact = (BITS == 32 ? 5e-6 : 1e-5) * peaked;
        const double tol = self->tol * (BITS == 32 ? peaked : 1);
        compare(&p, "out", n_out, got, want, tol);
        compare(&p, "out without stat", n_out, again, want, tol);
        compare(&p, "lse", n_lse, got_lse, want_lse, exact);
        compare(&p, "stat", 4 * n_lse, got_stat, want_stat, 4 * exact);
        if (v->ok && !p.error) {
            /* the same launch again: the same bytes */
            p.error = (cudaError_t)attend(&a, PATH, dq, dk, dv, out[1], lse[1], stat, scratch);
            float *twice = download(&p, a.out_bits, n_out, out[1]), *lse2 = download(&p, 32, n_lse, lse[1]);
            if (memcmp(twice, got, n_out * sizeof *got)) fail(v, "two runs differ");
            float *lse1 = download(&p, 32, n_lse, lse[0]);
            if (memcmp(lse2, lse1, n_lse * sizeof *lse1)) fail(v, "lse of two runs differs");
        }
        close_pool(&p);
    }
}

template <int BITS, int PATH> void check_colsum(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    kv_cuda_attn a = shape_of(c, BITS, 32);
    kv_attn_shape s = host_shape(&a);
    size_t n_q = 6 * a.q_head, n_kv = 2 * a.kv_head, n_lse = 6 * a.lse_head, ld = a.n_key + 5;
    float *q = floats(&p, n_q, query_factor(c)), *k = floats(&p, n_kv, 1), *lse = floats(&p, n_lse, 0);
    void *dq = upload(&p, BITS, n_q, q), *dk = upload(&p, BITS, n_kv, k);
    double *acc = (double *)malloc(3 * 6 * ld * sizeof *acc), *want = acc + 6 * ld, *start = want + 6 * ld;
    float *narrow[2] = {floats(&p, 6 * ld, 1), floats(&p, 6 * ld, 1)};
    if (!acc) abort();
    for (size_t i = 0; i < 6 * ld; i++) start[i] = want[i] = (double)(i % ld % 7) / 8;
    for (size_t h = 0; h < 6; h++) {
        float *hq = packed(&p, a.n_row, a.d, q + h * a.q_head, a.q_row);
        float *hk = packed(&p, a.n_key, a.d, k + h / 3 * a.kv_head, a.kv_token);
        float *o = floats(&p, a.n_row * a.d, 1);
        if (!kv_attention_ref(&s, hq, hk, hk, o, a.d, lse + h * a.lse_head, NULL) ||
            !kv_colsum_ref(&s, hq, hk, lse + h * a.lse_head, want + h * ld))
            fail(v, "out of memory");
        for (int i = 0; i < 3; i++) free(p.host[--p.n_host]);
    }
    float *d_lse = (float *)upload(&p, 32, n_lse, lse);
    double *d_acc = (double *)device(&p, 6 * ld * sizeof *acc);
    for (int run = 0; run < 2; run++) {
        if (!p.error) p.error = cudaMemcpy(d_acc, start, 6 * ld * sizeof *acc, cudaMemcpyHostToDevice);
        if (!p.error) p.error = (cudaError_t)kv_colsum_path(&a, PATH, dq, dk, d_lse, d_acc, ld, 0);
        double *to = run ? start : acc;
        if (!p.error) p.error = cudaMemcpy(to, d_acc, 6 * ld * sizeof *acc, cudaMemcpyDeviceToHost);
    }
    if (memcmp(acc, start, 6 * ld * sizeof *acc)) fail(v, "two runs differ");
    for (size_t i = 0; i < 6 * ld; i++) narrow[0][i] = (float)acc[i], narrow[1][i] = (float)want[i];
    kv_compare("acc", 6 * ld, narrow[0], narrow[1], self->tol * (c->kind == 2 ? 4 : 1), v);
    free(acc);
    close_pool(&p);
}

/* ---------------------------------------------------------------------------------------------- rows and elements */
/* kind of these cases: the element type of the output */
void check_rmsnorm(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, n = c->d, ld = n + 4;
    float *x = floats(&p, m * ld, 3), *w = floats(&p, n, 1), *want = floats(&p, m * ld, 0), *w1 = floats(&p, n, 1);
    for (size_t i = 0; i < n; i++) w1[i] = w[i] + 1;
    for (size_t r = 0; r < m; r++) kv_rmsnorm_ref(1, n, x + r * ld, w1, 1e-5f, want + r * ld);
    void *dx = upload(&p, 32, m * ld, x), *dw = upload(&p, 32, n, w), *dy = device(&p, m * ld * 4);
    if (!p.error)
        p.error = (cudaError_t)kv_rmsnorm_dev(m, n, (float *)dx, ld, (float *)dw, 1, 1e-5f, dy, c->kind, ld, 0);
    compare(&p, "y", m * ld, download(&p, c->kind, m * ld, dy), want,
            c->kind == 32   ? self->tol
            : c->kind == 16 ? 6e-4
                            : 5e-3);
    close_pool(&p);
}

void check_layernorm(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, n = c->d;
    float *x = floats(&p, m * n, 3), *w = floats(&p, n, 1), *b = floats(&p, n, 1), *want = floats(&p, m * n, 0);
    for (size_t i = 0; i < m * n; i++) x[i] += 2;
    kv_layernorm_dev_ref(m, n, x, w, b, 1e-5f, want);
    void *dx = upload(&p, 32, m * n, x), *dw = upload(&p, 32, n, w), *db = upload(&p, 32, n, b);
    void *dy = device(&p, m * n * 4);
    if (!p.error)
        p.error =
            (cudaError_t)kv_layernorm_dev(m, n, (float *)dx, n, (float *)dw, (float *)db, 1e-5f, dy, c->kind, n, 0);
    compare(&p, "y", m * n, download(&p, c->kind, m * n, dy), want,
            c->kind == 32   ? self->tol
            : c->kind == 16 ? 6e-4
                            : 5e-3);
    close_pool(&p);
}

/* n_row rows of n_key heads of d, window = rotated elements (0 none), softcap != 0: with bias and norm */
void check_heads(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, nh = c->n_key, d = c->d, rot = c->window, oh = (m + 2) * d;
    const size_t ld = nh * d + (c->row0 % 2 ? 3 : 4); /* rows that may be read four elements at a time, and others */
    const bool more = c->softcap > 0;
    float *x = floats(&p, m * ld, 2), *bias = floats(&p, nh * d, 1), *w = floats(&p, d, 1);
    float *freq = floats(&p, rot / 2 + 1, 1), *want = floats(&p, nh * oh, 0);
    if (c->kind == 16) x[d / 2] = 3e5f;
    for (size_t i = 0; i < rot / 2; i++) freq[i] = powf(1e4f, -2 * (float)i / (float)rot);
    kv_heads_ref(m, nh, d, x, ld, more ? bias : NULL, more ? w : NULL, 1, 1e-6f, rot ? freq : NULL, 1.25f, c->row0, rot,
                 want, 32, oh);
    void *dx = upload(&p, 32, m * ld, x), *db = upload(&p, 32, nh * d, bias), *dw = upload(&p, 32, d, w);
    void *df = upload(&p, 32, rot / 2 + 1, freq), *out = device(&p, nh * oh * 4), *over = device(&p, nh * 4);
    float *table = (float *)device(&p, m * rot * 4 + 4);
    if (!p.error) p.error = cudaMemset(over, 0, nh * 4);
    if (!p.error && rot) p.error = (cudaError_t)kv_rope_table_dev(m, rot, c->row0, (float *)df, 1.25f, table, 0);
    if (!p.error)
        p.error = (cudaError_t)kv_heads_dev(m, nh, d, dx, 32, ld, more ? (float *)db : NULL, more ? (float *)dw : NULL,
                                            1, 1e-6f, rot ? table : NULL, rot, out, c->kind, oh, (uint32_t *)over, 0);
    float *got = download(&p, c->kind, nh * oh, out);
    uint32_t lost[64] = {0}, expect = 0, total = 0;
    if (!p.error && nh <= 64) p.error = cudaMemcpy(lost, over, nh * 4, cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < nh; i++) total += lost[i];
    for (size_t i = 0; i < nh * oh; i++) {
        float r = want[i];
        kv_round_ref(c->kind, 1, &r);
        if (isfinite(want[i]) && isinf(r)) expect++, got[i] = got[i] == r ? want[i] : 0;
    }
    if (total != expect) fail(v, "count of overflows differs");
    compare(&p, "out", nh * oh, got, want, c->kind == 32 ? self->tol : c->kind == 16 ? 6e-4 : 5e-3);
    close_pool(&p);
}

/* row0: which; window 1: without up */
void check_gate(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, n = c->d, ld = 2 * n;
    const int act = (int)c->row0;
    float *x = floats(&p, m * ld, 10), *want = floats(&p, m * n, 0), *bias = floats(&p, n, 1), *g = floats(&p, n, 1);
    void *dx = upload(&p, c->kind, m * ld, x), *db = upload(&p, 32, n, bias), *out = device(&p, m * n * 4);
    for (size_t r = 0; r < m; r++) {
        for (size_t i = 0; i < n; i++) g[i] = x[r * ld + i] + (c->window ? bias[i] : 0);
        kv_gate_ref(n, act, g, c->window ? NULL : x + r * ld + n, want + r * n);
    }
    const size_t wide = c->kind == 32 ? 4 : 2;
    if (!p.error)
        p.error = (cudaError_t)kv_gate_dev(m, n, act, dx, c->window ? NULL : (char *)dx + n * wide, c->kind, ld,
                                           c->window ? (float *)db : NULL, out, 32, 0);
    compare(&p, "out", m * n, download(&p, 32, m * n, out), want, self->tol);
    close_pool(&p);
}

/* add, length, cast, softcap and embed in one: each a line of its own */
void check_elements(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, n = c->d;
    float *x = floats(&p, m * n, 2), *y = floats(&p, m * n, 1), *b = floats(&p, n, 1), *want = floats(&p, m * n, 0);
    float *norm = floats(&p, m, 1), *twice = floats(&p, m * n, 0);
    void *dx = upload(&p, 32, m * n, x), *dy = upload(&p, c->kind, m * n, y), *db = upload(&p, 32, n, b);
    void *dn = device(&p, m * 4), *dc = device(&p, m * n * 4), *over = device(&p, 4), *tok = device(&p, 4 * m);
    for (size_t i = 0; i < m * n; i++) want[i] = x[i] + (y[i] + b[i % n]);
    if (!p.error) p.error = (cudaError_t)kv_add_dev(m, n, (float *)dx, dy, c->kind, n, (float *)db, 0);
    float *sum = download(&p, 32, m * n, dx);
    compare(&p, "add", m * n, sum, want, self->tol);

    for (size_t r = 0; r < m; r++) {
        double q = 0;
        for (size_t i = 0; i < n; i++) q += (double)sum[r * n + i] * sum[r * n + i];
        norm[r] = (float)sqrt(q);
    }
    if (!p.error) p.error = (cudaError_t)kv_length_dev(m, n, (float *)dx, (float *)dn, 0);
    compare(&p, "length", m, download(&p, 32, m, dn), norm, self->tol);

    memcpy(twice, sum, m * n * sizeof *sum);
    size_t lost = kv_round_ref(c->kind, m * n, twice);
    uint32_t got_lost = 0;
    if (!p.error) p.error = cudaMemset(over, 0, 4);
    if (!p.error) p.error = (cudaError_t)kv_cast_dev(m * n, (float *)dx, dc, c->kind, (uint32_t *)over, 0);
    if (!p.error) p.error = cudaMemcpy(&got_lost, over, 4, cudaMemcpyDeviceToHost);
    if (got_lost != lost) fail(v, "count of overflows differs");
    if (memcmp(download(&p, c->kind, m * n, dc), twice, m * n * sizeof *twice)) fail(v, "cast is not the rounding");

    for (size_t i = 0; i < m * n; i++) want[i] = (float)(3 * tanh((double)sum[i] / 3));
    if (!p.error) p.error = (cudaError_t)kv_softcap_dev(m * n, (float *)dx, 3, 0);
    compare(&p, "softcap", m * n, download(&p, 32, m * n, dx), want, self->tol);

    uint32_t *ids = (uint32_t *)floats(&p, m, 1); /* rows of y, backwards; the last beyond the table */
    for (size_t r = 0; r < m; r++) ids[r] = (uint32_t)(r + 1 == m && m > 1 ? m : m - 1 - r);
    for (size_t i = 0; i < m * n; i++) {
        uint32_t id = ids[i / n];
        want[i] = id < m ? y[id * n + i % n] * 2.5f : NAN;
    }
    if (!p.error) p.error = cudaMemcpy(tok, ids, 4 * m, cudaMemcpyHostToDevice);
    if (!p.error)
        p.error = (cudaError_t)kv_embed_dev(m, n, (uint32_t)m, (uint32_t *)tok, dy, c->kind, 2.5f, (float *)dx, 0);
    compare(&p, "embed", m * n, download(&p, 32, m * n, dx), want, self->tol);
    close_pool(&p);
}

/* n_row n_key d row0 window cap kind; kind 2 = peaked scores */
const kv_case attn_cases[] = {
    {1, 1, 64, 0, 0, 0, 0},          {130, 130, 64, 0, 0, 0, 0},     {257, 300, 128, 43, 0, 0, 2},
    {300, 300, 128, 0, 0, 0, 0},     {64, 640, 128, 576, 0, 0, 0},   {200, 500, 128, 100, 0, 50, 2},
    {300, 420, 128, 120, 150, 0, 0}, {200, 600, 64, 400, 256, 0, 2}, {150, 400, 64, 250, 17, 30, 2},
    {70, 530, 80, 460, 0, 0, 0},     {129, 257, 96, 128, 0, 0, 0},   {100, 200, 16, 100, 0, 0, 0},
    {90, 190, 24, 100, 0, 0, 2},     {65, 150, 48, 80, 33, 0, 0},    {140, 333, 256, 193, 0, 0, 0},
    {70, 200, 256, 130, 64, 50, 2},  {20, 30, 64, 40, 16, 30, 0},    {9, 21, 7, 12, 0, 0, 0},
    {5, 40, 128, 60, 0, 0, 0},       {12, 50, 320, 38, 0, 0, 0},     {385, 385, 72, 0, 1, 0, 0}};
/* Rows of a branch, tokens of the prompt, head size; row0: branches; kind: bits of the type, plus 100 for the kernel
 * without tensor cores. */
const kv_case branch_f32_cases[] = {
    {1, 1, 64, 1, 0, 0, 32}, {7, 90, 24, 5, 0, 0, 32}, {20, 130, 64, 4, 33, 30, 32}, {33, 200, 128, 3, 0, 0, 32}};
const kv_case branch_bf16_cases[] = {{96, 700, 128, 5, 0, 0, 17},  {1, 40, 64, 9, 0, 0, 17},  {130, 300, 64, 3, 100, 0, 17},
                                     {50, 260, 256, 3, 0, 50, 17}, {20, 64, 80, 4, 17, 0, 17}, {9, 33, 7, 3, 0, 0, 17},
                                     {30, 128, 128, 3, 0, 0, 117}};
const kv_case branch_f16_cases[] = {
    {96, 1000, 128, 4, 0, 0, 16}, {40, 300, 96, 5, 64, 0, 16}, {65, 200, 32, 3, 0, 30, 16}};
/* Rows, rows of the base, vocabulary; row0: the first row's number. */
const kv_case logit_cases[] = {
    {1, 1, 2, 0, 0, 0, 0}, {9, 4, 511, 2, 0, 0, 0}, {5, 3, 49152, 1, 0, 0, 0}, {40, 7, 1000, 5, 0, 0, 0}};
/* Rows, rows of the base, width; row0: units. */
const kv_case distance_cases[] = {{12, 4, 64, 6, 0, 0, 32}, {5, 5, 576, 1, 0, 0, 32}, {30, 10, 128, 32, 0, 0, 17}, {6, 2, 7, 3, 0, 0, 16}};
const kv_case decode_cases[] = {
    {1, 1, 128, 0, 0, 0, 0},        {1, 64, 128, 63, 0, 0, 0},     {1, 5000, 128, 4999, 0, 0, 0},
    {1, 20011, 64, 20010, 0, 0, 2}, {1, 3000, 80, 2999, 0, 50, 2}, {1, 2500, 256, 2499, 0, 0, 0},
    {1, 700, 128, 699, 100, 0, 0},  {7, 900, 128, 893, 0, 0, 0},   {3, 400, 32, 397, 65, 0, 0},
    {4, 333, 20, 329, 0, 0, 0},     {2, 100, 64, 150, 20, 0, 0}};
const kv_case norm_cases[] = {{3, 0, 576, 0, 0, 0, 32},
                              {2, 0, 4096, 0, 0, 0, 17},
                              {5, 0, 37, 0, 0, 0, 16},
                              {1, 0, 1, 0, 0, 0, 32},
                              {300, 0, 896, 0, 0, 0, 32}};
const kv_case heads_cases[] = {
    {70, 3, 64, 131000, 64, 0, 32}, {33, 5, 128, 4000, 128, 1, 17}, {20, 2, 80, 61, 32, 1, 16},
    {9, 4, 48, 0, 0, 0, 16},        {1, 8, 256, 7, 256, 1, 32},     {11, 2, 7, 3, 4, 0, 32},
    {37, 6, 64, 500, 64, 1, 17},    {50, 3, 128, 90, 0, 0, 16},     {21, 2, 256, 8, 256, 1, 16}};
const kv_case gate_cases[] = {{3, 0, 1536, KV_GATE_SILU, 0, 0, 32},    {2, 0, 14336, KV_GATE_GELU_TANH, 0, 0, 17},
                              {5, 0, 37, KV_GATE_GELU_TANH, 1, 0, 16}, {4, 0, 99, KV_GATE_SILU, 0, 0, 17},
                              {3, 0, 64, KV_GATE_SILU, 1, 0, 32},      {3, 0, 1536, KV_GATE_GELU, 0, 0, 32},
                              {2, 0, 41, KV_GATE_GELU, 1, 0, 17}};
const kv_case element_cases[] = {{3, 0, 576, 0, 0, 0, 32}, {2, 0, 4096, 0, 0, 0, 17}, {5, 0, 37, 0, 0, 0, 16}};

/* ------------------------------------------------------------------------------------------------ of a capture (gpu.h)
 */
/* kind: of the source; 64 = doubles. window 1: not split; softcap 1: 16-bit values of floats. */
void check_planes(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t nh = c->n_row, n = c->n_key, ld = n + 6;
    const int bits = c->kind == 64 ? 32 : c->softcap > 0 ? 17 : c->kind;
    const size_t out_size = bits == 32 ? 4 : 2;
    float *x = floats(&p, nh * ld, 100);
    void *dx = upload(&p, c->kind == 64 ? 32 : c->kind, nh * ld, x);
    uint8_t *want = (uint8_t *)floats(&p, nh * n + 1, 0), *got = (uint8_t *)floats(&p, nh * n + 1, 0);
    void *out = device(&p, nh * n * out_size);
    if (c->kind == 64) {
        double *wide = (double *)floats(&p, 2 * nh * ld, 0);
        for (size_t i = 0; i < nh * ld; i++) wide[i] = (double)x[i] * 1.00000003, x[i] = (float)wide[i];
        dx = device(&p, 8 * nh * ld);
        if (!p.error) p.error = cudaMemcpy(dx, wide, 8 * nh * ld, cudaMemcpyHostToDevice);
    }
    kv_planes_ref(nh, n, x, ld, want, bits, !c->window);
    if (!p.error) p.error = (cudaError_t)kv_planes_dev(nh, n, dx, c->kind, ld, (uint8_t *)out, bits, !c->window, 0);
    if (!p.error) p.error = cudaMemcpy(got, out, nh * n * out_size, cudaMemcpyDeviceToHost);
    if (memcmp(got, want, nh * n * out_size)) fail(v, "planes differ");
    (void)self;
    close_pool(&p);
}

void check_nll(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, n = c->d;
    float *x = floats(&p, m * n, 6), *want = floats(&p, m, 0);
    uint32_t *target = (uint32_t *)floats(&p, m, 0);
    for (size_t r = 0; r < m; r++) target[r] = (uint32_t)((seed + r * 7919) % n), x[r * n + r % n] += 40;
    kv_nll_ref(m, n, x, target, want);
    void *dx = upload(&p, 32, m * n, x), *dt = device(&p, 4 * m), *out = device(&p, 4 * m);
    if (!p.error) p.error = cudaMemcpy(dt, target, 4 * m, cudaMemcpyHostToDevice);
    if (!p.error) p.error = (cudaError_t)kv_nll_dev(m, n, (float *)dx, (uint32_t *)dt, (float *)out, 0);
    compare(&p, "nll", m, download(&p, 32, m, out), want, self->tol);
    uint32_t flag[2] = {0, 0};
    void *df = device(&p, 8);
    if (!p.error) p.error = cudaMemset(df, 0, 8);
    if (!p.error) p.error = (cudaError_t)kv_finite_dev(m * n, (float *)dx, (uint32_t *)df, 0);
    float bad = INFINITY;
    if (!p.error) p.error = cudaMemcpy((float *)dx + m * n / 2, &bad, 4, cudaMemcpyHostToDevice);
    if (!p.error) p.error = (cudaError_t)kv_finite_dev(m * n, (float *)dx, (uint32_t *)df + 1, 0);
    if (!p.error) p.error = cudaMemcpy(flag, df, 8, cudaMemcpyDeviceToHost);
    if (flag[0] || flag[1] != 1) fail(v, "finite_dev does not see an infinity, or sees one");
    close_pool(&p);
}

/* n_key experts, row0 used; window 1: divided by their sum. Then x += weight * y by the first expert. */
void check_router(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t m = c->n_row, n = c->n_key, d = c->d;
    float *w = floats(&p, m * n, 2), *x = floats(&p, m * d, 1), *y = floats(&p, m * d, 1);
    if (n > 2) w[2] = w[1]; /* a tie */
    void *dw = upload(&p, 32, m * n, w), *dx = upload(&p, 32, m * d, x), *dy = upload(&p, 32, m * d, y);
    kv_router_ref(m, n, c->row0, c->window, w);
    if (!p.error) p.error = (cudaError_t)kv_router_dev(m, n, c->row0, c->window, (float *)dw, 0);
    compare(&p, "weight", m * n, download(&p, 32, m * n, dw), w, self->tol);
    for (size_t i = 0; i < m * d; i++) x[i] += w[i / d * n] * y[i];
    if (!p.error) p.error = (cudaError_t)kv_add_weighted_dev(m, d, (float *)dx, (float *)dy, (float *)dw, n, 0);
    compare(&p, "sum", m * d, download(&p, 32, m * d, dx), x, self->tol);
    close_pool(&p);
}

/* Four query heads on two KV heads, the last two of them asked for. */
void check_map(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    kv_gpu_map m;
    memset(&m, 0, sizeof m);
    m.head_first = 2, m.n_head = 2, m.group = 2, m.d = (uint32_t)c->d, m.n_row = (uint32_t)c->n_row;
    m.row0 = (uint32_t)c->row0, m.width = (uint32_t)c->n_key, m.window = (uint32_t)c->window;
    m.scale = 1 / sqrtf((float)c->d), m.softcap = c->softcap, m.bits = c->kind;
    m.q_head = c->n_row * c->d + 8, m.kv_head = c->n_key * c->d + 8, m.lse_head = c->n_row + 1;
    float *q = floats(&p, 4 * m.q_head, 1), *k = floats(&p, 2 * m.kv_head, 1), *lse = floats(&p, 4 * m.lse_head, 1);
    const size_t n = m.n_head * c->n_row * c->n_key;
    for (size_t i = 0; i < 4 * m.lse_head; i++) lse[i] = 3 + fabsf(lse[i]);
    void *dq = upload(&p, c->kind, 4 * m.q_head, q), *dk = upload(&p, c->kind, 2 * m.kv_head, k);
    void *dl = upload(&p, 32, 4 * m.lse_head, lse), *out = device(&p, 2 * n);
    float *want = floats(&p, n, 0);
    kv_map_ref(&m, q, k, lse, want);
    if (!p.error) p.error = (cudaError_t)kv_map_dev(&m, dq, dk, (float *)dl, out, 0);
    compare(&p, "p", n, download(&p, 16, n, out), want, self->tol);
    close_pool(&p);
}

void check_random(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const size_t n = c->n_row * c->d;
    float *want = floats(&p, n, 0);
    double sum = 0, squares = 0;
    void *out = device(&p, 4 * n);
    for (size_t i = 0; i < n; i++) {
        want[i] = kv_random_weight(seed, 1000 + i, 0.37f);
        sum += want[i], squares += (double)want[i] * want[i];
    }
    if (n > 10000 && (fabs(sum / n) > 0.02 || fabs(sqrt(squares / n) - 0.37) > 0.01))
        fail(v, "not of the deviation asked for");
    if (!p.error) p.error = (cudaError_t)kv_random_dev(seed, 1000, n, 0.37f, out, c->kind, 0);
    if (memcmp(download(&p, c->kind, n, out), want, 4 * n) && c->kind != 16) fail(v, "weights differ");
    (void)self;
    close_pool(&p);
}

/* n_row rows of d elements of ggml's type `kind`, as row0 bits; then one value of the last row is infinite, and one of
 * the row before it too large for f16. */
void check_expand(const kv_kernel *self, const kv_case *c, uint64_t seed, kv_verdict *v)
{
    pool p = {v, seed};
    const kv_quant *q = kv_quant_find((uint32_t)c->kind);
    const size_t m = c->n_row, n = m * c->d, row = c->d / q->block * q->bytes, size = c->row0 == 32 ? 4 : 2;
    /* the high byte of a block's first scale (of the value itself) and the halves there are */
    const size_t high = (q->id == 0 ? 2 : q->id == 10 ? 80 : q->id == 11 ? 108 : q->id == 14 ? 208 : 0) + 1;
    const bool two = q->id == 3 || q->id == 7 || q->id == 10 || q->id == 12 || q->id == 13;
    uint8_t *raw = (uint8_t *)floats(&p, m * row / 4 + 1, 1), *got = (uint8_t *)floats(&p, n, 1);
    float *want = floats(&p, n, 0);
    uint32_t x = (uint32_t)seed;
    for (size_t i = 0; i < m * row; i++) raw[i] = (uint8_t)((x = x * 1664525u + 1013904223u) >> 24);
    for (size_t b = high; b < m * row; b += q->bytes) raw[b] &= 0xbf, raw[b + 2 * two] &= 0xbf; /* finite */
    q->expand(raw, n / q->block, want);
    const uint64_t none[2] = {UINT64_MAX, UINT64_MAX};
    uint64_t found[2];
    void *src = device(&p, m * row), *dst = device(&p, n * size), *df = device(&p, sizeof none);
    for (int turn = 0; turn < 2; turn++) {
        if (!p.error) p.error = cudaMemcpy(src, raw, m * row, cudaMemcpyHostToDevice);
        if (!p.error) p.error = cudaMemcpy(df, none, sizeof none, cudaMemcpyHostToDevice);
        if (!p.error)
            p.error = (cudaError_t)kv_expand_dev(q->id, m, c->d, src, dst, (int)c->row0, 1000, (uint64_t *)df, 0);
        if (!p.error) p.error = cudaMemcpy(found, df, sizeof found, cudaMemcpyDeviceToHost);
        if (!turn && !p.error) p.error = cudaMemcpy(got, dst, n * size, cudaMemcpyDeviceToHost);
        if (found[0] != (turn ? 1000 + m - 1 : UINT64_MAX)) fail(v, "the row that is not finite");
        if (turn && q->id == 0 && c->row0 == 16 && found[1] > 1000 + m - 2) fail(v, "the row that is too large");
        raw[(m - 1) * row + high] |= 0x7f, raw[(m - 1) * row + high - 1] |= 0x80;
        raw[(m - 2) * row + high] |= 0x4f, raw[(m - 2) * row + high] &= 0xcf;
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t u, is = 0;
        memcpy(&u, want + i, 4);
        memcpy(&is, got + size * i, size);
        if (is != (size == 4 ? u : c->row0 == 17 ? kv_bf16_bits(u) : kv_f16_bits(u))) fail(v, "values differ");
    }
    (void)self;
    close_pool(&p);
}

const kv_case planes_cases[] = {{1, 1, 0, 0, 0, 0, 32},   {3, 1024, 0, 0, 0, 0, 17}, {2, 1001, 0, 0, 0, 0, 16},
                                {2, 77, 0, 0, 0, 0, 32},  {2, 77, 0, 0, 1, 0, 17},   {1, 300, 0, 0, 1, 0, 32},
                                {3, 130, 0, 0, 0, 0, 64}, {4, 64, 0, 0, 1, 0, 64},   {2, 5000, 0, 0, 0, 1, 32}};
const kv_case nll_cases[] = {
    {1, 0, 2, 0, 0, 0, 0}, {5, 0, 511, 0, 0, 0, 0}, {3, 0, 49152, 0, 0, 0, 0}, {70, 0, 1000, 0, 0, 0, 0}};
const kv_case router_cases[] = {
    {1, 1, 8, 1, 0, 0, 0}, {9, 4, 33, 2, 1, 0, 0}, {17, 64, 20, 6, 0, 0, 0}, {5, 130, 7, 8, 1, 0, 0}};
const kv_case map_cases[] = {{7, 30, 16, 23, 0, 0, 32}, {9, 300, 64, 100, 40, 0, 17}, {3, 600, 24, 500, 0, 5, 16}};
const kv_case random_cases[] = {{1, 0, 1, 0, 0, 0, 32}, {300, 0, 70, 0, 0, 0, 17}, {300, 0, 70, 0, 0, 0, 32}};

#define ALL(type, d)                                                                                                   \
    {3, 0, d, 32, 0, 0, type}, {5, 0, 2 * d, 17, 0, 0, type},                                                          \
    {                                                                                                                  \
        70, 0, 4 * d, 16, 0, 0, type                                                                                   \
    }
const kv_case expand_cases[] = {ALL(0, 33),   ALL(1, 33),   ALL(30, 33),  ALL(2, 32),   ALL(3, 32),
                                ALL(6, 32),   ALL(7, 32),   ALL(8, 32),   ALL(20, 32),  ALL(10, 256),
                                ALL(11, 256), ALL(12, 256), ALL(13, 256), ALL(14, 256), ALL(23, 256)};

#define ROW(name, cls, tol, cases, check)                                                                              \
    {                                                                                                                  \
        name, cls, tol, cases, COUNT(cases), NULL, check                                                               \
    }
} // namespace

/* Outputs of the 16-bit kernels: p is rounded before it meets v, and the output when it is stored. */
extern const kv_kernel kv_cuda_table[] = {
    ROW("attention f32", KV_CLOSE, 5e-6, attn_cases, (check_attention<32, KV_PATH_BEST>)),
    ROW("attention bf16 plain", KV_CLOSE, 5e-3, attn_cases, (check_attention<17, KV_PATH_PLAIN>)),
    ROW("attention bf16 mma", KV_CLOSE, 1e-2, attn_cases, (check_attention<17, KV_PATH_MMA>)),
    ROW("attention f16 mma", KV_CLOSE, 1.5e-3, attn_cases, (check_attention<16, KV_PATH_MMA>)),
    ROW("attention bf16 best", KV_CLOSE, 1e-2, attn_cases, (check_attention<17, KV_PATH_BEST>)),
    ROW("attention f16 best", KV_CLOSE, 1.5e-3, attn_cases, (check_attention<16, KV_PATH_BEST>)),
    ROW("decode bf16", KV_CLOSE, 1e-2, decode_cases, (check_attention<17, DECODE>)),
    ROW("decode f16", KV_CLOSE, 1.5e-3, decode_cases, (check_attention<16, DECODE>)),
    ROW("decode f32", KV_CLOSE, 5e-6, decode_cases, (check_attention<32, DECODE>)),
    ROW("branches f32", KV_CLOSE, 5e-6, branch_f32_cases, kv_check_branches),
    ROW("branches bf16", KV_CLOSE, 1e-2, branch_bf16_cases, kv_check_branches),
    ROW("branches f16", KV_CLOSE, 1.5e-3, branch_f16_cases, kv_check_branches),
    ROW("logits of branches", KV_CLOSE, 1e-5, logit_cases, kv_check_logits),
    ROW("distance of branches", KV_CLOSE, 1e-6, distance_cases, kv_check_distance),
    ROW("colsum f32", KV_CLOSE, 5e-6, attn_cases, (check_colsum<32, KV_PATH_BEST>)),
    ROW("colsum bf16 plain", KV_CLOSE, 5e-6, attn_cases, (check_colsum<17, KV_PATH_PLAIN>)),
    ROW("colsum bf16 mma", KV_CLOSE, 1e-5, attn_cases, (check_colsum<17, KV_PATH_MMA>)),
    ROW("colsum f16 mma", KV_CLOSE, 1e-5, attn_cases, (check_colsum<16, KV_PATH_MMA>)),
    ROW("colsum bf16 best", KV_CLOSE, 1e-5, attn_cases, (check_colsum<17, KV_PATH_BEST>)),
    ROW("colsum f16 best", KV_CLOSE, 1e-5, attn_cases, (check_colsum<16, KV_PATH_BEST>)),
    ROW("rmsnorm", KV_CLOSE, 1e-6, norm_cases, check_rmsnorm),
    ROW("layernorm", KV_CLOSE, 2e-6, norm_cases, check_layernorm),
    ROW("heads", KV_CLOSE, 2e-6, heads_cases, check_heads),
    ROW("gate", KV_CLOSE, 2e-6, gate_cases, check_gate),
    ROW("elements", KV_CLOSE, 1e-6, element_cases, check_elements),
    ROW("planes", KV_EXACT, 0, planes_cases, check_planes),
    ROW("nll", KV_CLOSE, 2e-6, nll_cases, check_nll),
    ROW("router", KV_CLOSE, 2e-6, router_cases, check_router),
    ROW("map", KV_CLOSE, 1e-3, map_cases, check_map),
    ROW("random", KV_EXACT, 0, random_cases, check_random),
    ROW("expand", KV_EXACT, 0, expand_cases, check_expand),
};
extern const size_t kv_cuda_count = COUNT(kv_cuda_table);
