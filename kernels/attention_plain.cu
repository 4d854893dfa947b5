/* attention_plain.cu - attention and column sums without tensor cores: f32, and every shape the other kernels refuse.
 *
 * A block of eight warps owns eight query rows of a head, one a warp; K and V come in tiles of 32 keys. Each lane
 * scores one key of the tile; the products with V go the other way, lanes over the head size. Sums of the softmax are
 * double. Column sums turn it round: a lane owns a key, a warp every eighth row. */
#include "kernels/attention.cuh"
#include "kernels/tensor.cuh"

namespace
{
const int WARPS = 8, KEYS = 32, THREADS = WARPS * 32;

/* In four sums side by side: closer than one chain, and the multiply-adds overlap. Natural units and expf: a score in
 * units of ln 2 would lose bits that f32 has. */
KV_DEV float score_of(const kv_cuda_attn &a, const float *q, const float *k)
{
    float dot[4] = {0, 0, 0, 0};
    uint32_t i = 0;
    for (; i + 4 <= a.d; i += 4)
        for (int x = 0; x < 4; x++) dot[x] = fmaf(q[i + x], k[i + x], dot[x]);
    for (; i < a.d; i++) dot[0] = fmaf(q[i], k[i], dot[0]);
    float s = ((dot[0] + dot[1]) + (dot[2] + dot[3])) * a.scale;
    return a.softcap > 0 ? a.softcap * tanhf(s / a.softcap) : s;
}

KV_DEV double warp_sum(double x)
{
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

/* rows at .. at+count-1 into shared memory as float, rows `pitch` apart; zeros from row n on. Row i is where row(i) says
 */
template <typename ROW>
KV_DEV void fill_rows(float *dst, uint32_t pitch, ROW row, uint32_t at, uint32_t count, uint32_t n, uint32_t d)
{
    for (uint32_t i = threadIdx.x; i < count * d; i += THREADS) {
        uint32_t r = i / d, c = i % d;
        dst[r * pitch + c] = at + r < n ? kv_wide(row(at + r)[c]) : 0.f;
    }
}
template <typename T>
KV_DEV void fill(float *dst, uint32_t pitch, const T *x, size_t stride, uint32_t at, uint32_t count, uint32_t n,
                 uint32_t d)
{
    fill_rows(dst, pitch, [=](uint32_t i) { return x + (size_t)i * stride; }, at, count, n, d);
}

/* PER: elements of the output a lane holds, 32 * PER >= d. SEEN: kv_own_keys or kv_branch_keys. */
template <typename T, int PER, template <typename> class SEEN>
__global__ void __launch_bounds__(THREADS) attention_plain(const kv_attn_args all, const kv_cuda_branches branches)
{
    extern __shared__ __align__(16) float tile[];
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.x;
    const SEEN<T> seen(all, branches, head);
    const kv_attn_args &g = seen.g;
    const kv_cuda_attn &a = g.a;
    const uint32_t d = a.d, pitch = d | 1, r0 = (gridDim.y - 1 - blockIdx.y) * WARPS, row = r0 + warp;
    float *sq = tile, *sk = sq + WARPS * d, *sv = sk + KEYS * pitch;
    uint32_t first, end, lo = 0, hi = 0, unused;
    kv_sees(a, r0, &first, &unused);
    kv_sees(a, min(r0 + WARPS, a.n_row) - 1, &unused, &end);
    if (row < a.n_row) kv_sees(a, row, &lo, &hi);
    fill(sq, d, seen.q, a.q_row, r0, WARPS, a.n_row, d);

    float m = -INFINITY, o[PER] = {};
    double l = 0, s1 = 0, s2 = 0;
    uint32_t arg = 0;
    for (uint32_t j0 = first; j0 < end; j0 += KEYS) {
        __syncthreads();
        fill_rows(sk, pitch, [&](uint32_t i) { return seen.key(i); }, j0, KEYS, a.n_key, d);
        fill_rows(sv, d, [&](uint32_t i) { return seen.value(i); }, j0, KEYS, a.n_key, d);
        __syncthreads();
        uint32_t j = j0 + lane;
        float s = j >= lo && j < hi ? score_of(a, sq + warp * d, sk + lane * pitch) : -INFINITY;
        float top = s;
        for (int i = 16; i; i >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
        if (top > m) { /* the same for all lanes of the warp */
            float x = top - m, f = expf(-x);
            if (m > -INFINITY) {
                s1 = (s1 - (double)x * l) * f;
                s2 *= (double)f * f;
                l *= f;
            }
            for (int i = 0; i < PER; i++) o[i] *= f;
            arg = j0 + __ffs(__ballot_sync(~0u, s == top)) - 1;
            m = top;
        }
        float e = s > -INFINITY ? expf(s - m) : 0.f;
        if (e > 0) {
            l += e;
            s1 += (double)e * (s - m);
            s2 += (double)e * e;
        } else if (s != s) {
            l += s;
        }
        uint32_t n = min(end - j0, (uint32_t)KEYS);
        for (uint32_t x = 0; x < n; x++) {
            float p = __shfl_sync(~0u, e, x);
#pragma unroll
            for (int i = 0; i < PER; i++)
                if (i * 32 + lane < d) o[i] = fmaf(p, sv[x * d + i * 32 + lane], o[i]);
        }
    }
    l = warp_sum(l), s1 = warp_sum(s1), s2 = warp_sum(s2);
    if (row >= a.n_row) return;
    double inv = l > 0 ? 1 / l : l;
    size_t at = head * a.lse_head + row, to = head * a.out_head + row * a.out_row;
#pragma unroll
    for (int i = 0; i < PER; i++)
        if (i * 32 + lane < d) {
            float x = (float)(o[i] * inv);
            if (a.out_bits == 32)
                ((float *)g.out)[to + i * 32 + lane] = x;
            else
                ((T *)g.out)[to + i * 32 + lane] = kv_narrow<T>(x);
        }
    if (lane) return;
    g.lse[at] = l > 0 ? (float)(m + log(l)) : l == 0 ? -INFINITY : (float)l;
    if (!g.stat) return;
    g.stat[4 * at] = (float)inv;
    g.stat[4 * at + 1] = (float)arg;
    g.stat[4 * at + 2] = l > 0 ? (float)(log(l) - s1 * inv) : 0.f;
    g.stat[4 * at + 3] = (float)(s2 * inv * inv);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) colsum_plain(const kv_attn_args g, double *acc, size_t acc_head)
{
    extern __shared__ __align__(16) float tile[];
    const kv_cuda_attn &a = g.a;
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.x, d = a.d, pitch = d | 1;
    const uint32_t j0 = blockIdx.y * KEYS, j = j0 + lane;
    const T *q = (const T *)g.q + head * a.q_head, *k = (const T *)g.k + head / g.group * a.kv_head;
    float *sq = tile, *sk = sq + WARPS * d;
    __shared__ double part[WARPS][KEYS];
    fill(sk, pitch, k, a.kv_token, j0, KEYS, a.n_key, d);
    uint32_t first = j0 > a.row0 ? j0 - a.row0 : 0, end = a.n_row;
    if (a.window) {
        uint32_t past = j0 + KEYS - 1 + a.window; /* first position that sees none of these keys */
        end = past <= a.row0 ? 0 : min(end, past - a.row0);
    }
    double sum = 0;
    for (uint32_t r0 = first / WARPS * WARPS; r0 < end; r0 += WARPS) {
        __syncthreads();
        fill(sq, d, q, a.q_row, r0, WARPS, a.n_row, d);
        __syncthreads();
        uint32_t row = r0 + warp, lo = 0, hi = 0;
        if (row < a.n_row) kv_sees(a, row, &lo, &hi);
        if (j >= lo && j < hi)
            sum += expf(score_of(a, sq + warp * d, sk + lane * pitch) - g.lse[head * a.lse_head + row]);
    }
    part[warp][lane] = sum;
    __syncthreads();
    if (warp || j >= a.n_key) return;
    for (int w = 1; w < WARPS; w++) sum += part[w][lane];
    acc[head * acc_head + j] += sum;
}

template <typename T, int PER, template <typename> class SEEN>
int launch(const kv_attn_args &g, const kv_cuda_branches &b, cudaStream_t stream)
{
    size_t smem = ((size_t)(WARPS + KEYS) * g.a.d + KEYS * (g.a.d | 1)) * sizeof(float);
    dim3 grid(g.a.n_q_head, (g.a.n_row + WARPS - 1) / WARPS, b.n_branch);
    if (grid.y > 65535 || grid.z > 65535) return (int)cudaErrorInvalidValue;
    auto kernel = attention_plain<T, PER, SEEN>;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
    if (e) return (int)e;
    kernel<<<grid, THREADS, smem, stream>>>(g, b);
    return (int)cudaGetLastError();
}

template <typename T, template <typename> class SEEN>
int by_size(const kv_attn_args &g, const kv_cuda_branches &b, cudaStream_t stream)
{
    if (g.a.d <= 64) return launch<T, 2, SEEN>(g, b, stream);
    if (g.a.d <= 128) return launch<T, 4, SEEN>(g, b, stream);
    if (g.a.d <= 256) return launch<T, 8, SEEN>(g, b, stream);
    return launch<T, 16, SEEN>(g, b, stream);
}

template <template <typename> class SEEN>
int by_type(const kv_attn_args &g, const kv_cuda_branches &b, cudaStream_t stream)
{
    if (g.a.bits == 32) return by_size<float, SEEN>(g, b, stream);
    return g.a.bits == 16 ? by_size<__half, SEEN>(g, b, stream) : by_size<__nv_bfloat16, SEEN>(g, b, stream);
}

template <typename T> int launch_colsum(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream)
{
    size_t smem = ((size_t)WARPS * g.a.d + KEYS * (g.a.d | 1)) * sizeof(float);
    dim3 grid(g.a.n_q_head, (g.a.n_key + KEYS - 1) / KEYS);
    if (grid.y > 65535) return (int)cudaErrorInvalidValue;
    cudaError_t e = cudaFuncSetAttribute(colsum_plain<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
    if (e) return (int)e;
    colsum_plain<T><<<grid, THREADS, smem, stream>>>(g, acc, acc_head);
    return (int)cudaGetLastError();
}
} // namespace

int kv_attention_plain(const kv_attn_args &g, cudaStream_t stream)
{
    kv_cuda_branches one = {};
    one.n_branch = 1;
    return by_type<kv_own_keys>(g, one, stream);
}

int kv_attention_branches_plain(const kv_attn_args &g, const kv_cuda_branches &b, cudaStream_t stream)
{
    return by_type<kv_branch_keys>(g, b, stream);
}

int kv_colsum_plain(const kv_attn_args &g, double *acc, size_t acc_head, cudaStream_t stream)
{
    if (g.a.bits == 32) return launch_colsum<float>(g, acc, acc_head, stream);
    return g.a.bits == 16 ? launch_colsum<__half>(g, acc, acc_head, stream)
                          : launch_colsum<__nv_bfloat16>(g, acc, acc_head, stream);
}
