/* colsum.cu - column sums of the attention matrix on tensor cores with mma.sync, and the choice between kernels.
 *
 * S is computed a second time, turned: a block of four warps owns KEYS keys of one query head (fragments of K stay in
 * registers) and walks the query rows that see them in tiles of ROWS, so each column has one owner and a fixed order:
 * no atomics, no second kernel. p = e^(s - lse) = exp2(c1 s - lse log2 e); a row beyond the last has lse = infinity
 * there, which makes its p 0. Sums of a tile are f32, across tiles double. No product with V: half the work of a
 * forward pass. Blocks whose keys most rows see (the first ones) start first. */
#include "kernels/attention.cuh"
#include "kernels/tensor.cuh"

namespace
{
const int THREADS = 128, ROWS = 64;

template <typename T, int D, int MT>
__global__ void __launch_bounds__(THREADS, 2) colsum_mma(const kv_attn_args g, double *acc, size_t acc_head)
{
    const int KEYS = 64 * MT, PITCH = kv_pitch<D>::bytes, NT = ROWS / 8;
    extern __shared__ __align__(16) unsigned char smem[];
    const kv_cuda_attn &a = g.a;
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane >> 2, t = lane & 3;
    const uint32_t head = blockIdx.x, j0 = blockIdx.y * KEYS;
    const T *q = (const T *)g.q + head * a.q_head, *k = (const T *)g.k + head / g.group * a.kv_head;
    const float *lse = g.lse + head * a.lse_head;
    /* two tiles of Q, and their lse; the first tile of Q lies where K was. */
    const int TILE = (KEYS > ROWS ? KEYS : ROWS) * PITCH;
    const uint32_t sq[2] = {kv_smem(smem), kv_smem(smem) + TILE};
    float *s_lse = (float *)(smem + TILE + ROWS * PITCH); /* [2][ROWS] */

    kv_copy_tile<KEYS, D, THREADS>(sq[0], k, a.kv_token, j0, a.n_key, a.d);
    kv_copy_commit();
    kv_copy_wait<0>();
    __syncthreads();
    uint32_t fk[MT][D / 16][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
            kv_ldmatrix(fk[m][kk],
                        sq[0] + (warp * 16 * MT + m * 16 + (lane & 15)) * PITCH + (lane >> 4) * 16 + kk * 32);
    __syncthreads();

    /* rows that see a key of the block */
    uint32_t first = j0 > a.row0 ? (j0 - a.row0) / ROWS * ROWS : 0, end = a.n_row;
    if (a.window) {
        uint32_t past = j0 + KEYS - 1 + a.window; /* first position that sees none */
        end = past <= a.row0 ? 0 : min(end, past - a.row0);
    }
    const uint32_t n_tile = end > first ? (end - first + ROWS - 1) / ROWS : 0;
    const float cap2 = 2 * KV_LOG2E / a.softcap;
    const uint32_t my = j0 + warp * 16 * MT + quad;
    double sum[MT][2] = {};

    auto fetch = [&](uint32_t i) {
        uint32_t r0 = first + i * ROWS;
        kv_copy_tile<ROWS, D, THREADS>(sq[i & 1], q, a.q_row, r0, a.n_row, a.d);
        if (threadIdx.x < ROWS)
            s_lse[(i & 1) * ROWS + threadIdx.x] =
                r0 + threadIdx.x < a.n_row ? lse[r0 + threadIdx.x] * KV_LOG2E : INFINITY;
    };
    if (n_tile) fetch(0);
    kv_copy_commit();
    for (uint32_t i = 0; i < n_tile; i++) {
        if (i + 1 < n_tile) fetch(i + 1);
        kv_copy_commit();
        kv_copy_wait<1>();
        __syncthreads();
        const uint32_t r0 = first + i * ROWS;
        const uint32_t bq = sq[i & 1] + ((lane & 7) + (lane >> 4) * 8) * PITCH + ((lane >> 3) & 1) * 16;
        float s[MT][NT][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
            for (int n = 0; n < NT / 2; n++) {
                uint32_t fq[4];
                kv_ldmatrix(fq, bq + n * 16 * PITCH + kk * 32);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    kv_mma<T>(s[m][2 * n], fk[m][kk], fq[0], fq[1]);
                    kv_mma<T>(s[m][2 * n + 1], fk[m][kk], fq[2], fq[3]);
                }
            }
        const bool whole = a.row0 + r0 >= j0 + KEYS - 1 && j0 + KEYS <= a.n_key &&
                           (!a.window || a.row0 + r0 + ROWS - 1 - j0 < a.window);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            float part[2] = {0, 0};
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float2 l = *(const float2 *)&s_lse[(i & 1) * ROWS + n * 8 + t * 2];
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    float y = s[m][n][x];
                    if (a.softcap > 0) y = kv_cap_dev(y * a.scale, a.softcap, cap2);
                    float p = kv_exp2(fmaf(y, g.c1, x & 1 ? -l.y : -l.x));
                    if (!whole) {
                        uint32_t lo, hi, j = my + m * 16 + x / 2 * 8;
                        kv_sees(a, r0 + n * 8 + t * 2 + (x & 1), &lo, &hi);
                        p = j >= lo && j < hi ? p : 0.f;
                    }
                    part[x / 2] += p;
                }
            }
            sum[m][0] += part[0];
            sum[m][1] += part[1];
        }
        __syncthreads(); /* before the next but one tile overwrites this one */
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            double x = sum[m][h];
            x += __shfl_xor_sync(~0u, x, 1);
            x += __shfl_xor_sync(~0u, x, 2);
            uint32_t j = my + m * 16 + h * 8;
            if (t == 0 && j < a.n_key) acc[head * acc_head + j] += x;
        }
}

template <typename T, int D, int MT>
int launch(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream)
{
    const int keys = 64 * MT, smem = ((keys > ROWS ? keys : ROWS) + ROWS) * kv_pitch<D>::bytes + 2 * ROWS * 4;
    auto kernel = colsum_mma<T, D, MT>;
    dim3 grid(g.a.n_q_head, (g.a.n_key + keys - 1) / keys);
    if (grid.y > 65535) return (int)cudaErrorInvalidValue;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (e) return (int)e;
    kernel<<<grid, THREADS, smem, stream>>>(g, acc, acc_head);
    return (int)cudaGetLastError();
}

template <typename T> int by_size(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream)
{
    if (g.a.d <= 32) return launch<T, 32, 2>(g, acc, acc_head, stream);
    if (g.a.d <= 64) return launch<T, 64, 2>(g, acc, acc_head, stream);
    if (g.a.d <= 96) return launch<T, 96, 2>(g, acc, acc_head, stream);
    if (g.a.d <= 128) return launch<T, 128, 2>(g, acc, acc_head, stream);
    return launch<T, 256, 1>(g, acc, acc_head, stream);
}
} // namespace

int kv_colsum_path(const kv_cuda_attn *a, int path, const void *q, const void *k, const float *lse, double *acc,
                   size_t acc_head, cudaStream_t stream)
{
    int e = kv_attn_check(a);
    if (e || !a->n_row || !a->n_key) return e;
    kv_attn_args g = kv_attn_args_of(a, q, k, nullptr, nullptr, (float *)lse, nullptr);
    if (path == KV_PATH_PLAIN || !kv_attn_tensor(a, q, k, nullptr, nullptr))
        return kv_colsum_plain(g, acc, acc_head, stream);
    if (path != KV_PATH_MMA && kv_colsum_sm90(g, acc, acc_head, stream, &e)) return e;
    return a->bits == 16 ? by_size<__half>(g, acc, acc_head, stream) : by_size<__nv_bfloat16>(g, acc, acc_head, stream);
}

int kv_colsum_dev(const kv_cuda_attn *a, const void *q, const void *k, const float *lse, double *acc, size_t acc_head,
                  cudaStream_t stream)
{
    return kv_colsum_path(a, KV_PATH_BEST, q, k, lse, acc, acc_head, stream);
}
