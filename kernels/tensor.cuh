/* tensor.cuh - what the tensor-core kernels share: types, asynchronous copies, ldmatrix, mma, softmax arithmetic.
 * Everything here is inline device code; the launchers are in the .cu files. */
#ifndef KV_TENSOR_CUH
#define KV_TENSOR_CUH

#include "kernels/cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KV_DEV __device__ __forceinline__

/* A score no row reaches. Not infinity: 0 * infinity would make the entropy of a masked score a NaN. */
#define KV_MASKED (-1e30f)
#define KV_UNSEEN (-1e29f) /* a maximum below this means that the row has seen no key yet */
#define KV_LOG2E  1.44269504088896341f
#define KV_LN2    0.69314718055994531f

/* What a kernel is given. c1 turns a raw dot product (without softcap) or a capped score (with it) into a score in
 * units of ln 2, so that e^score = exp2(c1 x). */
struct kv_attn_args {
    kv_cuda_attn a;
    const void *q, *k, *v;
    void *out;
    float *lse, *stat;
    float c1;
    uint32_t group; /* query heads of a KV head */
};

KV_DEV float kv_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* cap tanh(x / cap), from exp2 and a division: tanh.approx has 11 good bits, and scores go up to 50. */
KV_DEV float kv_cap_dev(float x, float cap, float two_log2e_over_cap)
{
    float a = fabsf(x), e = kv_exp2(a * two_log2e_over_cap);
    float y = cap - __fdividef(2.f * cap, e + 1.f); /* e = infinity gives cap; fdividef is defined to 2^126 */
    y = e > 1e30f ? cap : y;
    /* near 0 the difference above cancels: x - x^3 / (3 cap^2) + 2 x^5 / (15 cap^4) */
    float z = __fdividef(a, cap), z2 = z * z;
    float near = a * (1.f - z2 * (0.33333333f - z2 * (0.13333333f - z2 * 0.053968254f)));
    return copysignf(z < 0.1f ? near : y, x);
}

/* Row at position pos sees keys *lo <= j < *hi; end = keys there are. */
KV_DEV void kv_sees(const kv_cuda_attn &a, uint32_t row, uint32_t *lo, uint32_t *hi)
{
    uint32_t end = a.row0 + row + 1;
    *hi = end < a.n_key ? end : a.n_key;
    *lo = a.window && end > a.window ? end - a.window : 0;
    if (*lo > *hi) *lo = *hi;
}

/* Two floats as two 16-bit numbers in a register, the first in the low half. */
template <typename T> KV_DEV uint32_t kv_pair(float lo, float hi);
template <> KV_DEV uint32_t kv_pair<__half>(float lo, float hi)
{
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <> KV_DEV uint32_t kv_pair<__nv_bfloat16>(float lo, float hi)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

KV_DEV float kv_wide(float x)
{
    return x;
}
KV_DEV float kv_wide(__half x)
{
    return __half2float(x);
}
KV_DEV float kv_wide(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

template <typename T> KV_DEV T kv_narrow(float x);
template <> KV_DEV float kv_narrow<float>(float x)
{
    return x;
}
template <> KV_DEV __half kv_narrow<__half>(float x)
{
    return __float2half_rn(x);
}
template <> KV_DEV __nv_bfloat16 kv_narrow<__nv_bfloat16>(float x)
{
    return __float2bfloat16_rn(x);
}

KV_DEV uint32_t kv_smem(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* 16 bytes to shared memory; zeros when !valid (the address is then not read). */
KV_DEV void kv_copy16(uint32_t dst, const void *src, bool valid)
{
    int n = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(n) : "memory");
}
KV_DEV void kv_copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> KV_DEV void kv_copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

KV_DEV void kv_ldmatrix(uint32_t (&r)[4], uint32_t addr)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}
KV_DEV void kv_ldmatrix_t(uint32_t (&r)[4], uint32_t addr)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}

/* c (16 x 8) += a (16 x 16) b (16 x 8). Lane 4g + t holds c[g][2t], c[g][2t+1], c[g+8][2t], c[g+8][2t+1]. */
template <typename T> KV_DEV void kv_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> KV_DEV void kv_mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> KV_DEV void kv_mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Rows of D 16-bit elements in shared memory lie D * 2 + 16 bytes apart: then the eight 16-byte rows that one ldmatrix
 * phase reads fall into different banks for every D that is a multiple of 32. */
template <int D> struct kv_pitch {
    static const int bytes = D * 2 + 16;
};

/* rows x D tile of a matrix with `n` rows and d <= D columns (d a multiple of 8), from row `at` on; zeros beyond. Row i
 * is where row(i) says; any: an address that may be named where nothing is read. */
template <int ROWS, int D, int THREADS, typename T, typename ROW>
KV_DEV void kv_copy_rows(uint32_t dst, const T *any, ROW row, uint32_t at, uint32_t n, uint32_t d)
{
    const int chunks = D / 8;
#pragma unroll
    for (int i = 0; i < (ROWS * chunks + THREADS - 1) / THREADS; i++) {
        int x = i * THREADS + (int)threadIdx.x, r = x / chunks, c = x % chunks;
        if (ROWS * chunks % THREADS && x >= ROWS * chunks) break;
        bool valid = at + r < n && (uint32_t)c * 8 < d;
        kv_copy16(dst + r * kv_pitch<D>::bytes + c * 16, valid ? row(at + r) + c * 8 : any, valid);
    }
}
/* Rows at a stride. */
template <int ROWS, int D, int THREADS, typename T>
KV_DEV void kv_copy_tile(uint32_t dst, const T *src, size_t stride, uint32_t at, uint32_t n, uint32_t d)
{
    kv_copy_rows<ROWS, D, THREADS>(dst, src, [=](uint32_t i) { return src + (size_t)i * stride; }, at, n, d);
}

/* What a block's query head attends to. Here: keys one behind the other. */
template <typename T> struct kv_own_keys {
    kv_attn_args g;
    const T *q, *keys, *values;
    KV_DEV kv_own_keys(const kv_attn_args &all, const kv_cuda_branches &, uint32_t head) : g(all)
    {
        q = (const T *)g.q + head * g.a.q_head;
        keys = (const T *)g.k + head / g.group * g.a.kv_head;
        values = (const T *)g.v + head / g.group * g.a.kv_head;
    }
    KV_DEV const T *key(uint32_t j) const
    {
        return keys + (size_t)j * g.a.kv_token;
    }
    KV_DEV const T *value(uint32_t j) const
    {
        return values + (size_t)j * g.a.kv_token;
    }
};

/* Of branch blockIdx.z: what it kept of the prompt, then its own rows. `g` becomes that of this branch and head. */
template <typename T> struct kv_branch_keys {
    kv_attn_args g;
    const T *q, *keys, *values, *own_keys, *own_values;
    const uint32_t *list;
    uint32_t n;
    KV_DEV kv_branch_keys(const kv_attn_args &all, const kv_cuda_branches &b, uint32_t head) : g(all)
    {
        const uint32_t i = blockIdx.z * g.a.n_q_head + head, kv_head = head / g.group;
        const size_t row = (size_t)blockIdx.z * g.a.n_row, own = kv_head * b.own_head + row * g.a.d;
        const bool whole = b.first[i] == KV_WHOLE;
        n = whole ? g.a.n_key : b.count[i];
        list = whole ? nullptr : b.list + b.first[i];
        q = (const T *)g.q + head * g.a.q_head + row * g.a.q_row;
        keys = (const T *)g.k + kv_head * g.a.kv_head, values = (const T *)g.v + kv_head * g.a.kv_head;
        own_keys = (const T *)b.own_k + own, own_values = (const T *)b.own_v + own;
        g.out = (char *)g.out + row * g.a.out_row * (g.a.out_bits == 32 ? 4 : 2);
        g.lse += row;
        g.a.row0 = n, g.a.n_key = n + g.a.n_row;
        if (!whole) g.a.window = 0;
    }
    KV_DEV const T *at(const T *prompt, const T *own, uint32_t j) const
    {
        return j >= n ? own + (size_t)(j - n) * g.a.d : prompt + (size_t)(list ? list[j] : j) * g.a.kv_token;
    }
    KV_DEV const T *key(uint32_t j) const
    {
        return at(keys, own_keys, j);
    }
    KV_DEV const T *value(uint32_t j) const
    {
        return at(values, own_values, j);
    }
};

/* What one row of the softmax knows. Sums are a lane's share of its quad's columns until kv_row_finish.
 * m in units of the raw score; l = sum e, a = sum e (s - m) log2 e, c = sum e^2, with e = e^(s - m). */
struct kv_row {
    float m, l, a, c;
    uint32_t arg;
};

KV_DEV float kv_quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
KV_DEV float kv_quad_sum(float x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
KV_DEV uint32_t kv_quad_min(uint32_t x)
{
    x = min(x, __shfl_xor_sync(~0u, x, 1));
    return min(x, __shfl_xor_sync(~0u, x, 2));
}

/* The row's maximum becomes at least `top` (the quad's). Returns what earlier sums and outputs are multiplied by. */
template <bool STAT> KV_DEV float kv_row_raise(kv_row &r, float top, float c1)
{
    float m = fmaxf(r.m, top);
    float x = (m - r.m) * c1; /* 0 when nothing changed, huge when this is the first key */
    float f = kv_exp2(-x);
    if (STAT) {
        r.a = r.l > 0 ? (r.a - x * r.l) * f : 0.f;
        r.c *= f * f;
    }
    r.l *= f;
    r.m = m;
    return f;
}

/* Finish: reduce over the quad, write lse and stat (lane t == 0 of the quad), return 1 / l (0 for a row that saw
 * nothing). unit: what turns m into a score (scale, or 1 with a softcap). */
template <bool STAT> KV_DEV float kv_row_finish(kv_row &r, float unit, bool write, float *lse, float *stat)
{
    float l = kv_quad_sum(r.l), inv = r.m > KV_UNSEEN ? 1.f / l : 0.f;
    if (r.m <= KV_UNSEEN) l = 0;
    float log_l = logf(l);
    if (write) *lse = r.m > KV_UNSEEN ? r.m * unit + log_l : -INFINITY;
    if (STAT) {
        float a = kv_quad_sum(r.a), c = kv_quad_sum(r.c);
        if (write) {
            stat[0] = inv;
            stat[1] = inv > 0 ? (float)r.arg : 0.f;
            stat[2] = inv > 0 ? log_l - a * KV_LN2 * inv : 0.f;
            stat[3] = c * inv * inv;
        }
    }
    return inv;
}

/* On the host: shared checks. 0 or cudaErrorInvalidValue. */
static inline int kv_attn_check(const kv_cuda_attn *a)
{
    bool ok = a->n_q_head && a->n_kv_head && a->n_q_head % a->n_kv_head == 0 && a->d && a->d <= 512 && a->scale > 0 &&
              (a->bits == 16 || a->bits == 17 || a->bits == 32) && (a->out_bits == a->bits || a->out_bits == 32) &&
              a->n_row < 1u << 31 && a->n_key < 1u << 31 && a->row0 < 1u << 31 && a->window < 1u << 31;
    return ok ? 0 : (int)cudaErrorInvalidValue;
}
/* May q, k, v and out be moved 16 bytes at a time and multiplied by tensor cores? v and out may be NULL. */
static inline bool kv_attn_tensor(const kv_cuda_attn *a, const void *q, const void *k, const void *v, const void *out)
{
    size_t bits =
        (size_t)q | (size_t)k | (size_t)v | (size_t)out | 2 * (a->q_head | a->q_row | a->kv_head | a->kv_token);
    if (out) bits |= 2 * (a->out_head | a->out_row);
    return a->bits != 32 && a->d % 8 == 0 && a->d <= 256 && bits % 16 == 0;
}
static inline kv_attn_args kv_attn_args_of(const kv_cuda_attn *a, const void *q, const void *k, const void *v,
                                           void *out, float *lse, float *stat)
{
    kv_attn_args g = {
        *a, q, k, v, out, lse, stat, (a->softcap > 0 ? 1.f : a->scale) * KV_LOG2E, a->n_q_head / a->n_kv_head};
    return g;
}

#endif
