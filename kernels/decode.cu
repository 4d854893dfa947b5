/* decode.cu - attention of a few rows against a long cache: reading K and V once is all the work there is.
 *
 * The query heads of a KV head (times the rows) are the rows of one product, 16 at a time, so K and V are read once for
 * the whole group. Keys are split over blocks so that every multiprocessor reads; in a block, tiles of 64 keys come
 * through three stages of asynchronous copies and each of four warps takes 16 keys of a tile with a softmax of its own.
 * The warps are joined in shared memory, the blocks by a second kernel, both in a fixed order: no atomics. */
#include "kernels/attention.cuh"
#include "kernels/tensor.cuh"

namespace
{
const int THREADS = 128, KEYS = 64, ROWS = 16;
enum { M, L, A, C, ARG, N_SUM }; /* what a part of the keys says of a row; ARG is exact in a float below 2^24 */

/* On Hopper the next kernel may be set up while this one runs; before touching memory it waits for the one before it.
 */
KV_DEV void after_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Row x of a KV head: query head and row. */
struct place {
    uint32_t head, row;
    bool there;
};
KV_DEV place place_of(const kv_attn_args &g, uint32_t kv_head, uint32_t x)
{
    place p = {kv_head * g.group + x / g.a.n_row, x % g.a.n_row, x < g.group * g.a.n_row};
    if (!p.there) p.head = kv_head * g.group, p.row = 0;
    return p;
}

/* Joins the four warps' sums of a row, with the weights of their outputs. */
KV_DEV void join(const float (*sums)[ROWS][N_SUM], uint32_t r, float c1, float (&total)[N_SUM], float (&weight)[4])
{
    const float m = fmaxf(fmaxf(sums[0][r][M], sums[1][r][M]), fmaxf(sums[2][r][M], sums[3][r][M]));
    total[M] = m, total[L] = total[A] = total[C] = 0, total[ARG] = 3e38f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *s = sums[i][r], l = s[L], x = (m - s[M]) * c1;
        weight[i] = l != 0 ? kv_exp2(-x) : 0.f; /* l = 0: it saw nothing */
        if (l == 0) continue;
        total[L] += weight[i] * l;
        total[A] += weight[i] * (s[A] - x * l);
        total[C] += weight[i] * weight[i] * s[C];
        if (s[M] == m) total[ARG] = fminf(total[ARG], s[ARG]);
    }
}

KV_DEV float finish(const kv_attn_args &g, const place &p, const float total[N_SUM], bool write)
{
    const bool seen = total[M] > KV_UNSEEN;
    float inv = seen ? 1.f / total[L] : 0.f, log_l = logf(total[L]);
    if (!write) return inv;
    size_t at = p.head * g.a.lse_head + p.row;
    g.lse[at] = seen ? total[M] * (g.a.softcap > 0 ? 1.f : g.a.scale) + log_l : -INFINITY;
    if (g.stat) {
        g.stat[4 * at] = inv;
        g.stat[4 * at + 1] = seen ? total[ARG] : 0.f;
        g.stat[4 * at + 2] = seen ? log_l - total[A] * KV_LN2 * inv : 0.f;
        g.stat[4 * at + 3] = total[C] * inv * inv;
    }
    return inv;
}

template <typename T> KV_DEV void store(const kv_attn_args &g, const place &p, uint32_t i, float x)
{
    size_t to = p.head * g.a.out_head + p.row * g.a.out_row + i;
    if (g.a.out_bits == 32)
        ((float *)g.out)[to] = x;
    else
        ((T *)g.out)[to] = kv_narrow<T>(x);
}

template <typename T, int D, int STAGES>
__global__ void __launch_bounds__(THREADS) decode_split(const kv_attn_args g, float *scratch, uint32_t split_tiles)
{
    const int PITCH = kv_pitch<D>::bytes, TILE = KEYS * PITCH, DT = D / 8;
    extern __shared__ __align__(16) unsigned char smem[];
    __shared__ float sums[4][ROWS][N_SUM];
    const kv_cuda_attn &a = g.a;
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quad = lane >> 2, t = lane & 3;
    const uint32_t split = blockIdx.x, kv_head = blockIdx.y, x0 = blockIdx.z * ROWS;
    const T *k = (const T *)g.k + kv_head * a.kv_head, *v = (const T *)g.v + kv_head * a.kv_head;

    uint32_t first, end, unused;
    kv_sees(a, 0, &first, &unused);
    kv_sees(a, a.n_row - 1, &unused, &end);
    first = first / KEYS * KEYS + split * split_tiles * KEYS;
    end = min(end, first + split_tiles * KEYS);
    const uint32_t n_tile = end > first ? (end - first + KEYS - 1) / KEYS : 0;

    after_previous();
    /* Q as fragments, straight from memory: it is small. Lane (quad, t) holds rows quad, quad + 8. */
    const place at[2] = {place_of(g, kv_head, x0 + quad), place_of(g, kv_head, x0 + quad + 8)};
    uint32_t fq[D / 16][4];
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
            const place &p = at[x & 1];
            uint32_t c = kk * 16 + x / 2 * 8 + t * 2;
            fq[kk][x] =
                p.there && c < a.d ? *(const uint32_t *)((const T *)g.q + p.head * a.q_head + p.row * a.q_row + c) : 0;
        }
    uint32_t lo[2], hi[2];
#pragma unroll
    for (int h = 0; h < 2; h++) kv_sees(a, at[h].row, &lo[h], &hi[h]);

    const uint32_t base = kv_smem(smem);
    auto fetch = [&](uint32_t i) {
        uint32_t to = base + i % STAGES * 2 * TILE;
        kv_copy_tile<KEYS, D, THREADS>(to, k, a.kv_token, first + i * KEYS, end, a.d);
        kv_copy_tile<KEYS, D, THREADS>(to + TILE, v, a.kv_token, first + i * KEYS, end, a.d);
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < n_tile) fetch(i);
        kv_copy_commit();
    }
    float o[DT][4] = {};
    kv_row row[2];
    row[0] = row[1] = kv_row{KV_MASKED, 0, 0, 0, 0};
    const float cap2 = 2 * KV_LOG2E / a.softcap;
    for (uint32_t i = 0; i < n_tile; i++) {
        kv_copy_wait<STAGES - 2>();
        __syncthreads(); /* tile i is there, and tile i - 1 is done with */
        if (i + STAGES - 1 < n_tile) fetch(i + STAGES - 1);
        kv_copy_commit();
        const uint32_t sk = base + i % STAGES * 2 * TILE + warp * 16 * PITCH, sv = sk + TILE;
        const uint32_t j0 = first + i * KEYS + warp * 16;
        float s[2][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; kk++) {
            uint32_t fk[4];
            kv_ldmatrix(fk, sk + ((lane & 7) + (lane >> 4) * 8) * PITCH + ((lane >> 3) & 1) * 16 + kk * 32);
            kv_mma<T>(s[0], fq[kk], fk[0], fk[1]);
            kv_mma<T>(s[1], fq[kk], fk[2], fk[3]);
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            kv_row &r = row[h];
            float top = KV_MASKED;
            uint32_t best = ~0u;
#pragma unroll
            for (int x = 3; x >= 0; x--) {
                uint32_t j = j0 + x / 2 * 8 + t * 2 + x % 2;
                float &y = s[x / 2][h * 2 + x % 2];
                if (a.softcap > 0) y = kv_cap_dev(y * a.scale, a.softcap, cap2);
                if (j < lo[h] || j >= min(hi[h], end)) y = KV_MASKED;
                if (y >= top) top = y, best = j;
            }
            float mine = top;
            top = kv_quad_max(top);
            if (g.stat) {
                best = kv_quad_min(mine == top ? best : ~0u);
                if (top > r.m) r.arg = best;
            }
            float f = kv_row_raise<true>(r, top, g.c1), off = r.m > KV_UNSEEN ? -r.m * g.c1 : 0.f;
#pragma unroll
            for (int n = 0; n < DT; n++) o[n][h * 2] *= f, o[n][h * 2 + 1] *= f;
#pragma unroll
            for (int x = 0; x < 4; x++) {
                float y = fmaf(s[x / 2][h * 2 + x % 2], g.c1, off), e = kv_exp2(y);
                s[x / 2][h * 2 + x % 2] = e;
                r.l += e;
                r.a = fmaf(e, y, r.a);
                r.c = fmaf(e, e, r.c);
            }
        }
        uint32_t p[4];
#pragma unroll
        for (int x = 0; x < 4; x++) p[x] = kv_pair<T>(s[x / 2][x % 2 * 2], s[x / 2][x % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < DT / 2; n++) {
            uint32_t fv[4];
            kv_ldmatrix_t(fv, sv + ((lane & 7) + ((lane >> 3) & 1) * 8) * PITCH + (lane >> 4) * 16 + n * 32);
            kv_mma<T>(o[2 * n], p, fv[0], fv[1]);
            kv_mma<T>(o[2 * n + 1], p, fv[2], fv[3]);
        }
    }

    /* join the warps: outputs [4][ROWS][D] where the tiles were */
    kv_copy_wait<0>();
    __syncthreads();
    float *s_out = (float *)smem;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float l = kv_quad_sum(row[h].l), sa = kv_quad_sum(row[h].a), c = kv_quad_sum(row[h].c);
        uint32_t r = quad + h * 8;
        if (row[h].m <= KV_UNSEEN) l = sa = c = 0;
        if (t == 0) {
            float *to = sums[warp][r];
            to[M] = row[h].m, to[L] = l, to[A] = sa, to[C] = c, to[ARG] = (float)row[h].arg;
        }
#pragma unroll
        for (int n = 0; n < DT; n++)
            *(float2 *)&s_out[(warp * ROWS + r) * D + n * 8 + t * 2] = make_float2(o[n][h * 2], o[n][h * 2 + 1]);
    }
    __syncthreads();
    const uint32_t n_x = g.group * a.n_row;
    for (uint32_t r = warp; r < ROWS && x0 + r < n_x; r += 4) {
        const place p = place_of(g, kv_head, x0 + r);
        float total[N_SUM], w[4];
        join(sums, r, g.c1, total, w);
        const float inv = gridDim.x == 1 ? finish(g, p, total, lane == 0) : 1.f;
        float *part = scratch + ((size_t)split * a.n_q_head * a.n_row + p.head * a.n_row + p.row) * (a.d + 8);
        for (uint32_t i = lane; i < a.d; i += 32) {
            float x = 0;
            for (int u = 0; u < 4; u++) x += w[u] * s_out[(u * ROWS + r) * D + i];
            if (gridDim.x == 1)
                store<T>(g, p, i, x * inv);
            else
                part[i] = x;
        }
        if (gridDim.x > 1 && lane == 0) {
#pragma unroll
            for (int i = 0; i < N_SUM; i++) part[a.d + i] = total[i];
        }
    }
}

/* One block a row: warp 0 joins the sums with a lane for every 32nd part, then all threads add the outputs. */
template <typename T>
__global__ void __launch_bounds__(128) decode_join(const kv_attn_args g, const float *scratch, uint32_t n_split)
{
    extern __shared__ float weight[]; /* [n_split], then 1 / l */
    const kv_cuda_attn &a = g.a;
    const place p = {blockIdx.x / a.n_row, blockIdx.x % a.n_row, true};
    const size_t row = a.d + 8, step = (size_t)a.n_q_head * a.n_row * row;
    const float *part = scratch + (p.head * a.n_row + p.row) * row;
    after_previous();
    if (threadIdx.x < 32) {
        const uint32_t lane = threadIdx.x;
        float m = KV_MASKED, total[N_SUM];
        for (uint32_t i = lane; i < n_split; i += 32) m = fmaxf(m, part[i * step + a.d + M]);
        for (int i = 16; i; i >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
        total[M] = m, total[L] = total[A] = total[C] = 0, total[ARG] = 3e38f;
        for (uint32_t i = lane; i < n_split; i += 32) {
            const float *s = part + i * step + a.d;
            const float l = s[L], x = (m - s[M]) * g.c1, f = l != 0 ? kv_exp2(-x) : 0.f; /* l = 0: it saw nothing */
            weight[i] = f;
            if (l == 0) continue;
            total[L] += f * l;
            total[A] += f * (s[A] - x * l);
            total[C] += f * f * s[C];
            if (s[M] == m) total[ARG] = fminf(total[ARG], s[ARG]);
        }
        for (int i = 16; i; i >>= 1) {
#pragma unroll
            for (int x = L; x <= C; x++) total[x] += __shfl_xor_sync(~0u, total[x], i);
            total[ARG] = fminf(total[ARG], __shfl_xor_sync(~0u, total[ARG], i));
        }
        const float inv = finish(g, p, total, lane == 0);
        if (lane == 0) weight[n_split] = inv;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a.d; i += 128) {
        float x = 0;
#pragma unroll 8
        for (uint32_t u = 0; u < n_split; u++) x = fmaf(weight[u], part[u * step + i], x);
        store<T>(g, p, i, x * weight[n_split]);
    }
}

/* Blocks the keys may be split over, at most: two for every multiprocessor. */
uint32_t most_splits(const kv_cuda_attn *a)
{
    int device = 0, sm = 1;
    if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&sm, cudaDevAttrMultiProcessorCount, device)) sm = 1;
    uint32_t rows = a->n_q_head / a->n_kv_head * a->n_row, others = a->n_kv_head * ((rows + ROWS - 1) / ROWS);
    uint32_t n = 2 * (uint32_t)sm / others;
    return n ? n : 1;
}

/* May a kernel be set up before the one ahead of it ends? */
bool can_overlap()
{
    int device = 0, major = 0;
    return !cudaGetDevice(&device) && !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) &&
           major >= 9;
}

template <typename T, int D, int STAGES> int launch(const kv_attn_args &g, float *scratch, cudaStream_t stream)
{
    const kv_cuda_attn &a = g.a;
    const int tiles_bytes = STAGES * 2 * KEYS * kv_pitch<D>::bytes, join_bytes = 4 * ROWS * D * 4;
    const int smem = tiles_bytes > join_bytes ? tiles_bytes : join_bytes;
    uint32_t end = a.row0 + a.n_row < a.n_key ? a.row0 + a.n_row : a.n_key;
    uint32_t lo = a.window && a.row0 + 1 > a.window ? a.row0 + 1 - a.window : 0;
    lo = lo / KEYS * KEYS;
    uint32_t tiles = end > lo ? (end - lo + KEYS - 1) / KEYS : 1, split = most_splits(&a);
    if (split > tiles) split = tiles;
    const uint32_t per = (tiles + split - 1) / split;
    split = (tiles + per - 1) / per;
    auto kernel = decode_split<T, D, STAGES>;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (e) return (int)e;
    dim3 grid(split, a.n_kv_head, (g.group * a.n_row + ROWS - 1) / ROWS);
    if (grid.y > 65535 || grid.z > 65535) return (int)cudaErrorInvalidValue;
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t c = {};
    c.gridDim = grid, c.blockDim = THREADS, c.dynamicSmemBytes = (size_t)smem, c.stream = stream;
    c.attrs = &early, c.numAttrs = can_overlap() ? 1 : 0;
    e = cudaLaunchKernelEx(&c, kernel, g, scratch, per);
    if (e || split == 1) return (int)e;
    c.gridDim = a.n_q_head * a.n_row;
    c.dynamicSmemBytes = (split + 4) / 4 * 16; /* whole 16 bytes: the compiler reads four weights at a time */
    return (int)cudaLaunchKernelEx(&c, decode_join<T>, g, (const float *)scratch, split);
}

template <typename T> int by_size(const kv_attn_args &g, float *scratch, cudaStream_t stream)
{
    if (g.a.d <= 32) return launch<T, 32, 3>(g, scratch, stream);
    if (g.a.d <= 64) return launch<T, 64, 3>(g, scratch, stream);
    if (g.a.d <= 96) return launch<T, 96, 3>(g, scratch, stream);
    if (g.a.d <= 128) return launch<T, 128, 3>(g, scratch, stream);
    return launch<T, 256, 2>(g, scratch, stream);
}
} // namespace

size_t kv_decode_scratch(const kv_cuda_attn *a)
{
    if (kv_attn_check(a)) return 0;
    size_t most = most_splits(a), tiles = ((size_t)a->n_key + KEYS - 1) / KEYS + 1;
    return (most < tiles ? most : tiles) * a->n_q_head * a->n_row * (a->d + 8) * sizeof(float);
}

int kv_decode_dev(const kv_cuda_attn *a, const void *q, const void *k, const void *v, void *out, float *lse,
                  float *stat, void *scratch, cudaStream_t stream)
{
    int e = kv_attn_check(a);
    if (e || !a->n_row) return e;
    if (!kv_attn_tensor(a, q, k, v, out)) return kv_attention_dev(a, q, k, v, out, lse, stat, stream);
    kv_attn_args g = kv_attn_args_of(a, q, k, v, out, lse, stat);
    return a->bits == 16 ? by_size<__half>(g, (float *)scratch, stream)
                         : by_size<__nv_bfloat16>(g, (float *)scratch, stream);
}
