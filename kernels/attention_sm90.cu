/* attention_sm90.cu - attention for Hopper: wgmma, bulk copies, a producer and two consumer warpgroups.
 *
 * A block owns 128 query rows of one head, 64 a consumer. The producer's one thread copies Q once and K and V in tiles
 * of 128 keys, two deep. A consumer starts S(i) = Q K(i)^T and O += P(i-1) V(i-1) together, does the softmax of S(i)
 * while the second product runs, then rescales O and turns S(i) into P(i) (flash attention 3). The consumers take turns
 * in starting products, so that the softmax of one hides behind the products of the other.
 *
 *   shared memory: Q | K0 K1 | V0 V1, each in panels of 64 elements a row, swizzled by the copy engine
 *   barriers: Q full; K full, K empty, V full, V empty for each of the two stages
 *
 * Head sizes up to 128 (64, or 128 with zeros beyond d); the arithmetic and the statistics are those of attention.cu.
 */
#include "kernels/attention.cuh"
#include "kernels/sm90.cuh"
#include "kernels/wgmma.cuh"

namespace
{
const int ROWS = 128, STAGES = 2, THREADS = 384;

/* Bytes; keys in a tile: what fits beside the rows. */
template <int D> struct layout {
    static const int KEYS = D <= 128 ? 128 : 64;
    static const int Q_TILE = ROWS * D * 2, Q_PANEL = ROWS * 128, TILE = KEYS * D * 2, PANEL = KEYS * 128;
    static const int K = Q_TILE, V = K + STAGES * TILE, BARS = V + STAGES * TILE, BYTES = BARS + 128 + 1024;
};

/* One tile of D / 64 panels. */
template <int D>
KV_DEV void fetch(uint32_t dst, int tile, int panel, const CUtensorMap *map, uint32_t bar, uint32_t row, uint32_t head)
{
    kv_bar_expect(bar, tile);
#pragma unroll
    for (int p = 0; p < D / 64; p++) kv_bulk_copy(dst + p * panel, map, bar, p * 64, row, head);
}

/* S = Q K^T: 64 rows by N keys, both tiles with the head size along the rows. */
template <typename T, int D, int N> KV_DEV void scores(float (&s)[N / 2], uint64_t q, uint64_t k)
{
#pragma unroll
    for (int i = 0; i < D / 16; i++)
        kv_wgmma<T, N>::ss(s, q + (i / 4 * layout<D>::Q_PANEL + i % 4 * 32) / 16,
                           k + (i / 4 * layout<D>::PANEL + i % 4 * 32) / 16, i > 0);
}

/* O += P V */
template <typename T, int D, int N> KV_DEV void output(float (&o)[D / 2], const uint32_t (&p)[N / 16][4], uint64_t v)
{
#pragma unroll
    for (int i = 0; i < N / 16; i++) kv_wgmma<T, D>::rs(o, p[i], v + i * (16 * 128 / 16), 1);
}

/* The scores of a thread, 64 or 32: s[4 n + 2 h + x] is row quad + 8 h, key 8 n + 2 t + x. Score i of row h: */
template <int N> KV_DEV float mine(const float (&s)[N], int h, int i)
{
    return s[i / 2 * 4 + h * 2 + i % 2];
}

/* The first key whose score is `top`, ~0 without one; key: the thread's first, part: the maxima of its quarters. Looks
 * for the quarter, then in it: a tile that raises a maximum is no longer rare when there are few tiles. */
template <int N> KV_DEV uint32_t first_of(const float (&s)[N], int h, const float (&part)[4], float top, uint32_t key)
{
    const int Q = N / 8;
    const bool in0 = part[0] == top, in1 = part[1] == top, in2 = part[2] == top;
    uint32_t at = ~0u;
#pragma unroll
    for (int x = Q - 1; x >= 0; x--) {
        float v = in0 ? mine(s, h, x) : in1 ? mine(s, h, Q + x) : in2 ? mine(s, h, 2 * Q + x) : mine(s, h, 3 * Q + x);
        if (v == top) at = key + x / 2 * 8 + x % 2;
    }
    return at == ~0u ? at : at + (in0 ? 0 : in1 ? 1 : in2 ? 2 : 3) * (Q / 2 * 8);
}

/* Masks, raises the maxima, leaves e^(s - m) in s, and gives what O must be multiplied by; false: by nothing. */
template <bool STAT, int N>
KV_DEV bool softmax(const kv_attn_args &g, float (&s)[N], kv_row (&row)[2], float (&factor)[2], uint32_t my,
                    uint32_t j0, uint32_t t, bool whole)
{
    const kv_cuda_attn &a = g.a;
    if (a.softcap > 0) {
        const float cap2 = 2 * KV_LOG2E / a.softcap;
#pragma unroll
        for (int x = 0; x < N; x++) s[x] = kv_cap_dev(s[x] * a.scale, a.softcap, cap2);
    }
    if (!whole) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t lo, hi;
            kv_sees(a, my + h * 8, &lo, &hi);
#pragma unroll
            for (int n = 0; n < N / 4; n++)
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    uint32_t j = j0 + n * 8 + t * 2 + x;
                    if (j < lo || j >= hi) s[n * 4 + h * 2 + x] = KV_MASKED;
                }
        }
    }
    /* both rows' maxima first, and their sums side by side: neither waits for the other */
    float top[2], part[2][4], off[2];
    bool moved = false;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            part[h][i] = KV_MASKED;
#pragma unroll
            for (int x = 0; x < N / 8; x++) part[h][i] = fmaxf(part[h][i], mine(s, h, i * (N / 8) + x));
        }
#pragma unroll
    for (int h = 0; h < 2; h++)
        top[h] = kv_quad_max(fmaxf(fmaxf(part[h][0], part[h][1]), fmaxf(part[h][2], part[h][3])));
#pragma unroll
    for (int h = 0; h < 2; h++) {
        kv_row &r = row[h];
        factor[h] = 1;
        if (__any_sync(~0u, top[h] > r.m)) {
            if (STAT) {
                uint32_t arg = kv_quad_min(first_of(s, h, part[h], top[h], j0 + t * 2));
                if (top[h] > r.m) r.arg = arg;
            }
            factor[h] = kv_row_raise<STAT>(r, top[h], g.c1);
            moved = true;
        }
        off[h] = r.m > KV_UNSEEN ? -r.m * g.c1 : 0.f;
    }
#pragma unroll
    for (int n = 0; n < N / 4; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int x = 0; x < 2; x++) {
                kv_row &r = row[h];
                float y = fmaf(s[n * 4 + h * 2 + x], g.c1, off[h]), e = kv_exp2(y);
                s[n * 4 + h * 2 + x] = e;
                r.l += e;
                if (STAT) r.a = fmaf(e, y, r.a), r.c = fmaf(e, e, r.c);
            }
    return moved;
}

template <typename T, int N> KV_DEV void halves(const float (&s)[N], uint32_t (&p)[N / 8][4])
{
#pragma unroll
    for (int i = 0; i < N / 8; i++)
#pragma unroll
        for (int x = 0; x < 4; x++) p[i][x] = kv_pair<T>(s[i * 8 + x * 2], s[i * 8 + x * 2 + 1]);
}

template <typename T, int D, bool STAT>
__global__ void __launch_bounds__(THREADS, 1)
    attention_wgmma(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                    const __grid_constant__ CUtensorMap map_v, const kv_attn_args g)
{
    typedef layout<D> L;
    const int KEYS = L::KEYS;
    extern __shared__ unsigned char smem[];
    const kv_cuda_attn &a = g.a;
    const uint32_t base = (kv_smem(smem) + 1023) & ~1023u, bars = base + L::BARS;
    const uint32_t q_full = bars, k_full = bars + 8, k_empty = k_full + 16, v_full = k_empty + 16,
                   v_empty = v_full + 16;
    const uint32_t head = blockIdx.x, r0 = (gridDim.y - 1 - blockIdx.y) * ROWS, group = threadIdx.x / 128;

    const uint32_t last = min(r0 + ROWS, a.n_row) - 1;
    uint32_t first_key, end_key, unused;
    kv_sees(a, r0, &first_key, &unused);
    kv_sees(a, last, &unused, &end_key);
    first_key = first_key / KEYS * KEYS;
    const uint32_t n_tile = end_key > first_key ? (end_key - first_key + KEYS - 1) / KEYS : 0;

    if (threadIdx.x == 0) {
        kv_bar_init(q_full, 1);
        for (int i = 0; i < STAGES; i++) {
            kv_bar_init(k_full + 8 * i, 1);
            kv_bar_init(v_full + 8 * i, 1);
            kv_bar_init(k_empty + 8 * i, 8); /* one arrival of each consumer warp */
            kv_bar_init(v_empty + 8 * i, 8);
        }
        kv_bar_init_done();
    }
    __syncthreads();

    if (group == 0) {
        kv_regs_fewer<24>();
        if (threadIdx.x == 0 && n_tile) {
            const uint32_t kv_head = head / g.group;
            fetch<D>(base, L::Q_TILE, L::Q_PANEL, &map_q, q_full, r0, head);
            for (uint32_t i = 0; i < n_tile; i++) {
                const uint32_t stage = i % STAGES, free = (i / STAGES & 1) ^ 1, j0 = first_key + i * KEYS;
                kv_bar_wait(k_empty + 8 * stage, free);
                fetch<D>(base + L::K + stage * L::TILE, L::TILE, L::PANEL, &map_k, k_full + 8 * stage, j0, kv_head);
                kv_bar_wait(v_empty + 8 * stage, free);
                fetch<D>(base + L::V + stage * L::TILE, L::TILE, L::PANEL, &map_v, v_full + 8 * stage, j0, kv_head);
            }
        }
    } else {
        kv_regs_more<240>();
        const uint32_t me = group - 1, lane = threadIdx.x & 31, quad = lane >> 2, t = lane & 3;
        const uint32_t my = r0 + me * 64 + (threadIdx.x >> 5 & 3) * 16 + quad;
        const uint64_t desc_q = kv_desc(base + me * 64 * 128, 0);
        const uint64_t desc_k = kv_desc(base + L::K, 0), desc_v = kv_desc(base + L::V, L::PANEL);
        float s[KEYS / 2], o[D / 2] = {}, factor[2];
        uint32_t p[KEYS / 16][4];
        kv_row row[2];
        row[0] = row[1] = kv_row{KV_MASKED, 0, 0, 0, 0};

        auto whole = [&](uint32_t j0) {
            return a.row0 + r0 + me * 64 + 1 >= j0 + KEYS && j0 + KEYS <= a.n_key &&
                   (!a.window || a.row0 + last - j0 < a.window);
        };
        if (n_tile) {
            kv_bar_wait(q_full, 0);
            kv_bar_wait(k_full, 0);
            kv_wgmma_fence();
            scores<T, D, KEYS>(s, desc_q, desc_k);
            kv_wgmma_commit();
            kv_wgmma_wait<0>();
            kv_hold(s);
            if (lane == 0) kv_bar_arrive(k_empty);
            softmax<STAT>(g, s, row, factor, my, first_key, t, whole(first_key));
            halves<T>(s, p);
        }
        /* Turns: barrier 1 lets consumer 0 start its products, barrier 2 consumer 1. */
        if (me == 1 && n_tile > 1) kv_named_arrive(1, 256);
        for (uint32_t i = 1; i < n_tile; i++) {
            const uint32_t stage = i % STAGES, before = (i - 1) % STAGES, j0 = first_key + i * KEYS;
            kv_bar_wait(k_full + 8 * stage, i / STAGES & 1);
            kv_named_sync(1 + me, 256);
            kv_hold(o);
            kv_wgmma_fence();
            scores<T, D, KEYS>(s, desc_q, desc_k + stage * (L::TILE / 16));
            kv_wgmma_commit();
            kv_bar_wait(v_full + 8 * before, (i - 1) / STAGES & 1);
            kv_wgmma_fence();
            output<T, D, KEYS>(o, p, desc_v + before * (L::TILE / 16));
            kv_wgmma_commit();
            if (me == 0 || i + 1 < n_tile) kv_named_arrive(2 - me, 256);
            kv_wgmma_wait<1>();
            kv_hold(s);
            if (lane == 0) kv_bar_arrive(k_empty + 8 * stage);
            const bool moved = softmax<STAT>(g, s, row, factor, my, j0, t, whole(j0));
            kv_wgmma_wait<0>();
            kv_hold(o);
            if (lane == 0) kv_bar_arrive(v_empty + 8 * before);
            if (moved) {
#pragma unroll
                for (int n = 0; n < D / 8; n++)
#pragma unroll
                    for (int x = 0; x < 4; x++) o[n * 4 + x] *= factor[x / 2];
            }
            halves<T>(s, p);
        }
        if (n_tile) {
            const uint32_t i = n_tile - 1;
            kv_bar_wait(v_full + 8 * (i % STAGES), i / STAGES & 1);
            kv_hold(o);
            kv_wgmma_fence();
            output<T, D, KEYS>(o, p, desc_v + i % STAGES * (L::TILE / 16));
            kv_wgmma_commit();
            kv_wgmma_wait<0>();
            kv_hold(o);
        }

#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint32_t r = my + h * 8;
            const bool there = r < a.n_row;
            const size_t at = head * a.lse_head + (there ? r : 0);
            const float inv = kv_row_finish<STAT>(row[h], a.softcap > 0 ? 1.f : a.scale, there && t == 0, g.lse + at,
                                                  g.stat + 4 * at);
            if (!there) continue;
            const size_t to = head * a.out_head + r * a.out_row + t * 2;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                if (n * 8 >= (int)a.d) break;
                float x = o[n * 4 + h * 2] * inv, y = o[n * 4 + h * 2 + 1] * inv;
                if (a.out_bits == 32)
                    *(float2 *)((float *)g.out + to + n * 8) = make_float2(x, y);
                else
                    *(uint32_t *)((T *)g.out + to + n * 8) = kv_pair<T>(x, y);
            }
        }
    }
}

template <typename T, int D, bool STAT> int launch(const kv_attn_args &g, cudaStream_t stream)
{
    const kv_cuda_attn &a = g.a;
    CUtensorMap q, k, v;
    auto kernel = attention_wgmma<T, D, STAT>;
    dim3 grid(a.n_q_head, (a.n_row + ROWS - 1) / ROWS);
    if (grid.y > 65535) return (int)cudaErrorInvalidValue;
    int e = kv_tensor_map(&q, a.bits, g.q, a.d, a.n_row, a.n_q_head, a.q_row, a.q_head, ROWS);
    if (!e) e = kv_tensor_map(&k, a.bits, g.k, a.d, a.n_key, a.n_kv_head, a.kv_token, a.kv_head, layout<D>::KEYS);
    if (!e) e = kv_tensor_map(&v, a.bits, g.v, a.d, a.n_key, a.n_kv_head, a.kv_token, a.kv_head, layout<D>::KEYS);
    if (!e) e = (int)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout<D>::BYTES);
    if (e) return e;
    kernel<<<grid, THREADS, layout<D>::BYTES, stream>>>(q, k, v, g);
    return (int)cudaGetLastError();
}

template <typename T> int by_size(const kv_attn_args &g, cudaStream_t stream)
{
    if (g.a.d <= 64) return g.stat ? launch<T, 64, true>(g, stream) : launch<T, 64, false>(g, stream);
    if (g.a.d <= 128) return g.stat ? launch<T, 128, true>(g, stream) : launch<T, 128, false>(g, stream);
    return g.stat ? launch<T, 256, true>(g, stream) : launch<T, 256, false>(g, stream);
}
} // namespace

bool kv_attention_sm90(const kv_attn_args &g, cudaStream_t stream, int *status)
{
    /* a small head would be half zeros */
    if (g.a.d < 64 || !g.a.n_key || !kv_is_sm90()) return false;
    *status = g.a.bits == 16 ? by_size<__half>(g, stream) : by_size<__nv_bfloat16>(g, stream);
    return true;
}
