/* attention.cu - attention on tensor cores with mma.sync (any GPU from sm_80 on), and the choice between kernels.
 *
 * Flash attention 2: a block of four warps owns ROWS query rows of one head and walks the keys it sees in tiles of
 * KEYS. Q stays in shared memory, S = Q K^T and the output in registers, softmax online between the two products as in
 * attention.c (same recurrences, in base 2). The next K tile is copied while P V is computed, V while Q K^T is.
 * Blocks with the most keys start first. attention_sm90.cu does the same with wgmma, attention_plain.cu without tensor
 * cores. */
#include "kernels/attention.cuh"
#include "kernels/tensor.cuh"

namespace
{
const int THREADS = 128;

/* MT: 16-row tiles of a warp. SEEN: kv_own_keys or kv_branch_keys. */
template <typename T, int D, int MT, int KEYS, bool STAT, template <typename> class SEEN>
__global__ void __launch_bounds__(THREADS, D <= 128 ? 2 : 1)
    attention_mma(const kv_attn_args all, const kv_cuda_branches branches)
{
    const int ROWS = 64 * MT, PITCH = kv_pitch<D>::bytes, NT = KEYS / 8, DT = D / 8;
    extern __shared__ __align__(16) unsigned char smem[];
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane >> 2, t = lane & 3;
    const uint32_t head = blockIdx.x, r0 = (gridDim.y - 1 - blockIdx.y) * ROWS;
    const SEEN<T> seen(all, branches, head);
    const kv_attn_args &g = seen.g;
    const kv_cuda_attn &a = g.a;
    auto key = [&](uint32_t j) { return seen.key(j); };
    auto value = [&](uint32_t j) { return seen.value(j); };
    const uint32_t sq = kv_smem(smem), sk = sq + ROWS * PITCH, sv = sk + KEYS * PITCH;

    uint32_t last = min(r0 + ROWS, a.n_row) - 1, first_key, end_key, unused;
    kv_sees(a, r0, &first_key, &unused);
    kv_sees(a, last, &unused, &end_key);
    first_key = first_key / KEYS * KEYS;
    const uint32_t n_tile = end_key > first_key ? (end_key - first_key + KEYS - 1) / KEYS : 0;

    kv_copy_tile<ROWS, D, THREADS>(sq, seen.q, a.q_row, r0, a.n_row, a.d);
    if (n_tile) kv_copy_rows<KEYS, D, THREADS>(sk, seen.keys, key, first_key, a.n_key, a.d);
    kv_copy_commit();

    float o[MT][DT][4] = {};
    kv_row row[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) row[m][0] = row[m][1] = kv_row{KV_MASKED, 0, 0, 0, 0};
    /* addresses of this lane in ldmatrix: of Q (rows of the warp), of K, of V turned */
    const uint32_t aq = sq + (warp * 16 * MT + (lane & 15)) * PITCH + (lane >> 4) * 16;
    const uint32_t ak = sk + ((lane & 7) + (lane >> 4) * 8) * PITCH + ((lane >> 3) & 1) * 16;
    const uint32_t av = sv + ((lane & 7) + ((lane >> 3) & 1) * 8) * PITCH + (lane >> 4) * 16;
    const uint32_t my = r0 + warp * 16 * MT + quad; /* row of tile 0, upper half */
    const float cap2 = 2 * KV_LOG2E / a.softcap;

    for (uint32_t i = 0; i < n_tile; i++) {
        const uint32_t j0 = first_key + i * KEYS;
        kv_copy_wait<0>();
        __syncthreads(); /* K is there, and nobody reads the last V any more */
        kv_copy_rows<KEYS, D, THREADS>(sv, seen.values, value, j0, a.n_key, a.d);
        kv_copy_commit();

        float s[MT][NT][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t fq[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) kv_ldmatrix(fq[m], aq + m * 16 * PITCH + kk * 32);
#pragma unroll
            for (int n = 0; n < NT / 2; n++) {
                uint32_t fk[4];
                kv_ldmatrix(fk, ak + n * 16 * PITCH + kk * 32);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    kv_mma<T>(s[m][2 * n], fq[m], fk[0], fk[1]);
                    kv_mma<T>(s[m][2 * n + 1], fq[m], fk[2], fk[3]);
                }
            }
        }
        kv_copy_wait<0>();
        __syncthreads(); /* V is there, and nobody reads this K any more */
        if (i + 1 < n_tile) kv_copy_rows<KEYS, D, THREADS>(sk, seen.keys, key, j0 + KEYS, a.n_key, a.d);
        kv_copy_commit();

        if (a.softcap > 0) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int x = 0; x < NT * 4; x++)
                    s[m][x / 4][x % 4] = kv_cap_dev(s[m][x / 4][x % 4] * a.scale, a.softcap, cap2);
        }
        const bool whole =
            a.row0 + r0 + 1 >= j0 + KEYS && j0 + KEYS <= a.n_key && (!a.window || a.row0 + last - j0 < a.window);
        if (!whole) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint32_t lo, hi;
                    kv_sees(a, my + m * 16 + h * 8, &lo, &hi);
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int x = 0; x < 2; x++) {
                            uint32_t j = j0 + n * 8 + t * 2 + x;
                            if (j < lo || j >= hi) s[m][n][h * 2 + x] = KV_MASKED;
                        }
                }
        }

#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                kv_row &r = row[m][h];
                float top = s[m][0][h * 2];
#pragma unroll
                for (int n = 0; n < NT; n++) top = fmaxf(top, fmaxf(s[m][n][h * 2], s[m][n][h * 2 + 1]));
                top = kv_quad_max(top);
                if (STAT && __any_sync(~0u, top > r.m)) {
                    uint32_t arg = ~0u;
#pragma unroll
                    for (int x = NT * 2 - 1; x >= 0; x--)
                        if (s[m][x / 2][h * 2 + x % 2] == top) arg = j0 + x / 2 * 8 + t * 2 + x % 2;
                    arg = kv_quad_min(arg);
                    if (top > r.m) r.arg = arg;
                }
                float f = kv_row_raise<STAT>(r, top, g.c1), base = r.m > KV_UNSEEN ? -r.m * g.c1 : 0.f;
#pragma unroll
                for (int n = 0; n < DT; n++) o[m][n][h * 2] *= f, o[m][n][h * 2 + 1] *= f;
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int x = 0; x < 2; x++) {
                        float y = fmaf(s[m][n][h * 2 + x], g.c1, base), e = kv_exp2(y);
                        s[m][n][h * 2 + x] = e;
                        r.l += e;
                        if (STAT) r.a = fmaf(e, y, r.a), r.c = fmaf(e, e, r.c);
                    }
            }

#pragma unroll
        for (int kk = 0; kk < NT / 2; kk++) {
            uint32_t p[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int x = 0; x < 4; x++)
                    p[m][x] = kv_pair<T>(s[m][2 * kk + x / 2][x % 2 * 2], s[m][2 * kk + x / 2][x % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < DT / 2; n++) {
                uint32_t fv[4];
                kv_ldmatrix_t(fv, av + kk * 16 * PITCH + n * 32);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    kv_mma<T>(o[m][2 * n], p[m], fv[0], fv[1]);
                    kv_mma<T>(o[m][2 * n + 1], p[m], fv[2], fv[3]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t r = my + m * 16 + h * 8;
            bool there = r < a.n_row;
            size_t at = head * a.lse_head + (there ? r : 0);
            float inv = kv_row_finish<STAT>(row[m][h], a.softcap > 0 ? 1.f : a.scale, there && t == 0, g.lse + at,
                                            g.stat + 4 * at);
            if (!there) continue;
            size_t to = head * a.out_head + r * a.out_row + t * 2;
#pragma unroll
            for (int n = 0; n < DT; n++) {
                if (n * 8 >= (int)a.d) break;
                float x = o[m][n][h * 2] * inv, y = o[m][n][h * 2 + 1] * inv;
                if (a.out_bits == 32)
                    *(float2 *)((float *)g.out + to + n * 8) = make_float2(x, y);
                else
                    *(uint32_t *)((T *)g.out + to + n * 8) = kv_pair<T>(x, y);
            }
        }
}

template <typename T, int D, int MT, int KEYS, bool STAT, template <typename> class SEEN>
int launch(const kv_attn_args &g, const kv_cuda_branches &b, cudaStream_t stream)
{
    const int smem = (64 * MT + 2 * KEYS) * kv_pitch<D>::bytes;
    auto kernel = attention_mma<T, D, MT, KEYS, STAT, SEEN>;
    dim3 grid(g.a.n_q_head, (g.a.n_row + 64 * MT - 1) / (64 * MT), b.n_branch);
    if (grid.y > 65535 || grid.z > 65535) return (int)cudaErrorInvalidValue;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (e) return (int)e;
    kernel<<<grid, THREADS, smem, stream>>>(g, b);
    return (int)cudaGetLastError();
}

template <typename T, bool STAT, template <typename> class SEEN>
int by_size(const kv_attn_args &g, const kv_cuda_branches &b, cudaStream_t stream)
{
    if (g.a.d <= 32) return launch<T, 32, 2, 64, STAT, SEEN>(g, b, stream);
    if (g.a.d <= 64) return launch<T, 64, 2, 64, STAT, SEEN>(g, b, stream);
    if (g.a.d <= 96) return launch<T, 96, 2, 64, STAT, SEEN>(g, b, stream);
    if (g.a.d <= 128) return launch<T, 128, 2, 64, STAT, SEEN>(g, b, stream);
    return launch<T, 256, 1, 32, STAT, SEEN>(g, b, stream);
}

template <typename T> int by_stat(const kv_attn_args &g, cudaStream_t stream)
{
    kv_cuda_branches one = {};
    one.n_branch = 1;
    return g.stat ? by_size<T, true, kv_own_keys>(g, one, stream) : by_size<T, false, kv_own_keys>(g, one, stream);
}
} // namespace

int kv_attention_path(const kv_cuda_attn *a, int path, const void *q, const void *k, const void *v, void *out,
                      float *lse, float *stat, cudaStream_t stream)
{
    int e = kv_attn_check(a);
    if (e || !a->n_row) return e;
    kv_attn_args g = kv_attn_args_of(a, q, k, v, out, lse, stat);
    if (path == KV_PATH_PLAIN || !kv_attn_tensor(a, q, k, v, out)) return kv_attention_plain(g, stream);
    if (path != KV_PATH_MMA && kv_attention_sm90(g, stream, &e)) return e;
    return a->bits == 16 ? by_stat<__half>(g, stream) : by_stat<__nv_bfloat16>(g, stream);
}

int kv_attention_dev(const kv_cuda_attn *a, const void *q, const void *k, const void *v, void *out, float *lse,
                     float *stat, cudaStream_t stream)
{
    return kv_attention_path(a, KV_PATH_BEST, q, k, v, out, lse, stat, stream);
}

int kv_attention_branches_path(const kv_cuda_attn *a, const kv_cuda_branches *b, int path, const void *q, const void *k,
                               const void *v, void *out, float *lse, cudaStream_t stream)
{
    int e = kv_attn_check(a);
    if (e || !a->n_row || !b->n_branch) return e;
    kv_attn_args g = kv_attn_args_of(a, q, k, v, out, lse, NULL);
    const bool aligned = ((size_t)b->own_k | (size_t)b->own_v | 2 * b->own_head) % 16 == 0;
    if (path == KV_PATH_PLAIN || !aligned || !kv_attn_tensor(a, q, k, v, out))
        return kv_attention_branches_plain(g, *b, stream);
    return a->bits == 16 ? by_size<__half, false, kv_branch_keys>(g, *b, stream)
                         : by_size<__nv_bfloat16, false, kv_branch_keys>(g, *b, stream);
}

int kv_attention_branches_dev(const kv_cuda_attn *a, const kv_cuda_branches *b, const void *q, const void *k,
                              const void *v, void *out, float *lse, cudaStream_t stream)
{
    return kv_attention_branches_path(a, b, KV_PATH_BEST, q, k, v, out, lse, stream);
}
