/* colsum_sm90.cu - column sums for Hopper: colsum.cu with wgmma and bulk copies.
 *
 * A block owns 64 keys for each of its WGS consumer warpgroups; their K stays in shared memory. One producer warp
 * copies the query rows in tiles of 128, with lse log2 e of each row beside them (infinity beyond the last row), two or
 * three deep. S^T = K Q^T is 64 keys by 128 rows a warpgroup, so a thread owns two keys. At d = 128 the products and
 * the exponentials need the same time of their units, so warpgroups go in pairs: one multiplies while the other adds
 * up. */
#include "kernels/attention.cuh"
#include "kernels/sm90.cuh"
#include "kernels/wgmma.cuh"

namespace
{
const int ROWS = 128;

template <int D, int WGS, int STAGES> struct layout {
    static const int KEYS = 64 * WGS, THREADS = WGS * 128 + 32;
    static const int K_PANEL = KEYS * 128, Q_PANEL = ROWS * 128, K_TILE = KEYS * D * 2, Q_TILE = ROWS * D * 2;
    static const int Q = K_TILE, LSE = Q + STAGES * Q_TILE, BARS = LSE + STAGES * ROWS * 4, BYTES = BARS + 128 + 1024;
};

template <typename T, int D, int WGS, int STAGES>
__global__ void __launch_bounds__(WGS * 128 + 32, 1)
    colsum_wgmma(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                 const kv_attn_args g, double *acc, size_t acc_head)
{
    typedef layout<D, WGS, STAGES> L;
    extern __shared__ unsigned char smem[];
    const kv_cuda_attn &a = g.a;
    const uint32_t start = kv_smem(smem), base = (start + 1023) & ~1023u, bars = base + L::BARS;
    const uint32_t k_full = bars, full = bars + 8, empty = full + 8 * STAGES;
    float *s_lse = (float *)(smem + (base - start) + L::LSE);
    const uint32_t head = blockIdx.x, j0 = blockIdx.y * L::KEYS, warp = threadIdx.x / 32, lane = threadIdx.x & 31;

    /* rows that see a key of the block */
    uint32_t first = j0 > a.row0 ? (j0 - a.row0) / ROWS * ROWS : 0, end = a.n_row;
    if (a.window) {
        uint32_t past = j0 + L::KEYS - 1 + a.window; /* first position that sees none */
        end = past <= a.row0 ? 0 : min(end, past - a.row0);
    }
    const uint32_t n_tile = end > first ? (end - first + ROWS - 1) / ROWS : 0;
    if (!n_tile) return;

    if (threadIdx.x == 0) {
        kv_bar_init(k_full, 1);
        for (int i = 0; i < STAGES; i++) {
            kv_bar_init(full + 8 * i, 1);
            kv_bar_init(empty + 8 * i, 4 * WGS); /* one arrival of each consumer warp */
        }
        kv_bar_init_done();
    }
    __syncthreads();

    if (warp == 4 * WGS) {
        const float *lse = g.lse + head * a.lse_head;
        if (lane == 0) {
            kv_bar_expect(k_full, L::K_TILE);
            for (int p = 0; p < D / 64; p++)
                kv_bulk_copy(base + p * L::K_PANEL, &map_k, k_full, p * 64, j0, head / g.group);
        }
        for (uint32_t i = 0; i < n_tile; i++) {
            const uint32_t stage = i % STAGES, r0 = first + i * ROWS;
            float x[ROWS / 32];
#pragma unroll
            for (int y = 0; y < ROWS / 32; y++)
                x[y] = r0 + y * 32 + lane < a.n_row ? lse[r0 + y * 32 + lane] * KV_LOG2E : INFINITY;
            kv_bar_wait(empty + 8 * stage, (i / STAGES & 1) ^ 1);
#pragma unroll
            for (int y = 0; y < ROWS / 32; y++) s_lse[stage * ROWS + y * 32 + lane] = x[y];
            __syncwarp();
            if (lane == 0) {
                kv_bar_expect(full + 8 * stage, L::Q_TILE);
                for (int p = 0; p < D / 64; p++)
                    kv_bulk_copy(base + L::Q + stage * L::Q_TILE + p * L::Q_PANEL, &map_q, full + 8 * stage, p * 64, r0,
                                 head);
            }
        }
        return;
    }

    const uint32_t quad = lane >> 2, t = lane & 3, wg = warp / 4, other = wg ^ WGS / 2;
    const uint32_t mine = j0 + wg * 64; /* first key of the warpgroup */
    const uint32_t my = mine + (warp & 3) * 16 + quad;
    const uint64_t desc_k = kv_desc(base + warp / 4 * 64 * 128, 0), desc_q = kv_desc(base + L::Q, 0);
    const float cap2 = 2 * KV_LOG2E / a.softcap;
    double sum[2] = {0, 0};
    float part[2] = {0, 0};
    kv_bar_wait(k_full, 0);
    /* The second of a pair lets the first go first. */
    if (wg >= WGS / 2) kv_named_arrive(1 + other, 256);
    for (uint32_t i = 0; i < n_tile; i++) {
        const uint32_t stage = i % STAGES, r0 = first + i * ROWS;
        kv_bar_wait(full + 8 * stage, i / STAGES & 1);
        kv_named_sync(1 + wg, 256); /* until the other of the pair has its product */
        /* past the diagonal's tile for the later keys of the block there is nothing to add */
        const bool some = mine <= a.row0 + r0 + ROWS - 1;
        float s[64];
        if (some) {
            kv_wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < D / 16; kk++)
                kv_wgmma<T, ROWS>::ss(s, desc_k + (kk / 4 * L::K_PANEL + kk % 4 * 32) / 16,
                                      desc_q + stage * (L::Q_TILE / 16) + (kk / 4 * L::Q_PANEL + kk % 4 * 32) / 16,
                                      kk > 0);
            kv_wgmma_commit();
            kv_wgmma_wait<0>();
            kv_hold(s);
        }
        if (wg < WGS / 2 || i + 1 < n_tile) kv_named_arrive(1 + other, 256);
        if (some) {
            if (a.softcap > 0) {
#pragma unroll
                for (int x = 0; x < 64; x++) s[x] = kv_cap_dev(s[x] * a.scale, a.softcap, cap2);
            }
            const bool whole = a.row0 + r0 >= mine + 63 && mine + 64 <= a.n_key &&
                               (!a.window || a.row0 + r0 + ROWS - 1 - mine < a.window);
            const float *l2 = s_lse + stage * ROWS + t * 2;
            if (whole) {
#pragma unroll
                for (int n = 0; n < 16; n++) {
                    const float2 l = *(const float2 *)(l2 + n * 8);
#pragma unroll
                    for (int x = 0; x < 4; x++) part[x / 2] += kv_exp2(fmaf(s[n * 4 + x], g.c1, x & 1 ? -l.y : -l.x));
                }
            } else {
#pragma unroll
                for (int n = 0; n < 16; n++) {
                    const float2 l = *(const float2 *)(l2 + n * 8);
#pragma unroll
                    for (int x = 0; x < 4; x++) {
                        uint32_t lo, hi, j = my + x / 2 * 8;
                        kv_sees(a, r0 + n * 8 + t * 2 + (x & 1), &lo, &hi);
                        float p = kv_exp2(fmaf(s[n * 4 + x], g.c1, x & 1 ? -l.y : -l.x));
                        part[x / 2] += j >= lo && j < hi ? p : 0.f;
                    }
                }
            }
        }
        if (i % 4 == 3 || i + 1 == n_tile) { /* f32 over 512 rows, a quarter of them in this lane */
            sum[0] += part[0], sum[1] += part[1];
            part[0] = part[1] = 0;
        }
        __syncwarp();
        if (lane == 0) kv_bar_arrive(empty + 8 * stage);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        double x = sum[h];
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        const uint32_t j = my + h * 8;
        if (t == 0 && j < a.n_key) acc[head * acc_head + j] += x;
    }
}

template <typename T, int D, int WGS, int STAGES>
int launch(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream)
{
    typedef layout<D, WGS, STAGES> L;
    const kv_cuda_attn &a = g.a;
    CUtensorMap q, k;
    auto kernel = colsum_wgmma<T, D, WGS, STAGES>;
    dim3 grid(a.n_q_head, (a.n_key + L::KEYS - 1) / L::KEYS);
    if (grid.y > 65535) return (int)cudaErrorInvalidValue;
    int e = kv_tensor_map(&q, a.bits, g.q, a.d, a.n_row, a.n_q_head, a.q_row, a.q_head, ROWS);
    if (!e) e = kv_tensor_map(&k, a.bits, g.k, a.d, a.n_key, a.n_kv_head, a.kv_token, a.kv_head, L::KEYS);
    if (!e) e = (int)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::BYTES);
    if (e) return e;
    kernel<<<grid, L::THREADS, L::BYTES, stream>>>(q, k, g, acc, acc_head);
    return (int)cudaGetLastError();
}

template <typename T> int by_size(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream)
{
    if (g.a.d <= 64) return launch<T, 64, 4, 3>(g, acc, acc_head, stream);
    if (g.a.d <= 128) return launch<T, 128, 4, 3>(g, acc, acc_head, stream);
    return launch<T, 256, 2, 2>(g, acc, acc_head, stream);
}
} // namespace

bool kv_colsum_sm90(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream, int *status)
{
    /* small heads would be half zeros */
    if (g.a.d < 64 || !kv_is_sm90()) return false;
    *status =
        g.a.bits == 16 ? by_size<__half>(g, acc, acc_head, stream) : by_size<__nv_bfloat16>(g, acc, acc_head, stream);
    return true;
}
