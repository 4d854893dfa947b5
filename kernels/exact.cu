/* exact.cu - see exact_dev.h. Compiled without contraction: a + b * c is two operations here, as on the CPU. */
#include <cuda_runtime.h>

#include "kernels/exact_dev.h"
#include "kernels/math.h"

namespace
{
int last()
{
    return (int)cudaGetLastError();
}

unsigned blocks(size_t n, size_t each)
{
    return (unsigned)((n + each - 1) / each);
}

/* ------------------------------------------------------------------------------------------------ scores */
const int TILE = 128, DEPTH = 16; /* keys and columns of a block; elements of the head size at a time */

/* Four elements i0..i0+3 of a row of d, 0 behind its end. */
template <bool VEC> __device__ float4 part_of(const float *row, int i0, int d)
{
    if (!row || i0 >= d) return make_float4(0, 0, 0, 0);
    if (VEC) return *(const float4 *)(row + i0);
    return make_float4(row[i0], i0 + 1 < d ? row[i0 + 1] : 0, i0 + 2 < d ? row[i0 + 2] : 0,
                       i0 + 3 < d ? row[i0 + 3] : 0);
}

__device__ void put(float (*to)[TILE + 4], int i, int row, float4 x)
{
    to[i][row] = x.x, to[i + 1][row] = x.y, to[i + 2][row] = x.z, to[i + 3][row] = x.w;
}

/* 128 keys by 128 columns of one KV head; every sum is one chain of fused multiply-adds over the head size, in order. */
template <bool VEC, bool VEC_OUT> __global__ __launch_bounds__(256, 2) void scores(kv_turned t, const float *q, const float *k, float *p)
{
    __shared__ __align__(16) float ks[2][DEPTH][TILE + 4], qs[2][DEPTH][TILE + 4];
    const int group = (int)(t.n_q_head / t.n_kv_head), n_col = group * (int)t.n_row, d = (int)t.d;
    const int kv = blockIdx.z, c0 = (int)blockIdx.y * TILE, tid = threadIdx.x;
    const size_t key0 = (size_t)blockIdx.x * TILE;
    const float *krow[2], *qrow[2];
    const int i4 = tid % 4 * 4; /* of the depth; rows tid / 4 and tid / 4 + 64 */
    for (int m = 0; m < 2; m++) {
        size_t key = key0 + tid / 4 + 64 * m;
        int c = c0 + tid / 4 + 64 * m;
        krow[m] = key < t.n_key ? k + kv * t.k_head + key * d : NULL;
        qrow[m] = c < n_col ? q + ((size_t)kv * group + c / t.n_row) * t.q_head + (size_t)(c % t.n_row) * d : NULL;
    }
    float sum[8][8] = {};
    float4 kx[2], qx[2];
    for (int m = 0; m < 2; m++) kx[m] = part_of<VEC>(krow[m], i4, d), qx[m] = part_of<VEC>(qrow[m], i4, d);
    for (int m = 0; m < 2; m++) put(ks[0], i4, tid / 4 + 64 * m, kx[m]), put(qs[0], i4, tid / 4 + 64 * m, qx[m]);
    __syncthreads();
    const int ty = tid / 16 * 4, tx = tid % 16 * 4;
    int now = 0;
    for (int i0 = 0; i0 < d; i0 += DEPTH, now ^= 1) {
        bool more = i0 + DEPTH < d;
        for (int m = 0; m < 2 && more; m++)
            kx[m] = part_of<VEC>(krow[m], i0 + DEPTH + i4, d), qx[m] = part_of<VEC>(qrow[m], i0 + DEPTH + i4, d);
#pragma unroll 2
        for (int i = 0; i < DEPTH; i++) {
            float4 a0 = *(const float4 *)&ks[now][i][ty], a1 = *(const float4 *)&ks[now][i][ty + 64];
            float4 b0 = *(const float4 *)&qs[now][i][tx], b1 = *(const float4 *)&qs[now][i][tx + 64];
            const float a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
            const float b[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
            for (int m = 0; m < 8; m++)
#pragma unroll
                for (int n = 0; n < 8; n++) sum[m][n] = fmaf(a[m], b[n], sum[m][n]);
        }
        for (int m = 0; m < 2 && more; m++) {
            put(ks[now ^ 1], i4, tid / 4 + 64 * m, kx[m]);
            put(qs[now ^ 1], i4, tid / 4 + 64 * m, qx[m]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 8; m++) {
        size_t key = key0 + ty + m % 4 + (m < 4 ? 0 : 64);
        if (key >= t.n_key) continue;
        float *row = p + key * t.ld + (size_t)kv * n_col;
#pragma unroll
        for (int n = 0; n < 8; n += 4) {
            int c = c0 + tx + (n < 4 ? 0 : 64);
            float s[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[i] = sum[m][n + i] * t.scale;
                if (t.softcap > 0) s[i] = kv_cap(s[i], t.softcap);
            }
            if (VEC_OUT && c < n_col) *(float4 *)(row + c) = make_float4(s[0], s[1], s[2], s[3]);
            for (int i = 0; i < 4 && !VEC_OUT; i++)
                if (c + i < n_col) row[c + i] = s[i];
        }
    }
}

/* ------------------------------------------------------------------------------------------------ softmax */
const int SPLIT = 64; /* parts of the keys in the search for the largest */

__device__ size_t seen_by(const kv_turned &t, size_t c)
{
    size_t end = t.row0 + c % t.n_row + 1;
    return end < t.n_key ? end : t.n_key;
}

/* top[split][column]: 32 columns a block, 8 keys side by side. */
__global__ void largest(kv_turned t, size_t n_col, const float *p, float *top)
{
    __shared__ float part[8][32];
    size_t c = blockIdx.x * (size_t)32 + threadIdx.x, each = (t.n_key + SPLIT - 1) / SPLIT;
    size_t a = blockIdx.y * each, b = a + each;
    float m = -INFINITY;
    if (c < n_col) {
        size_t end = seen_by(t, c);
        if (b > end) b = end;
        for (size_t j = a + threadIdx.y; j < b; j += 8) {
            float x = p[j * t.ld + c];
            if (x > m) m = x;
        }
    }
    part[threadIdx.y][threadIdx.x] = m;
    __syncthreads();
    if (threadIdx.y || c >= n_col) return;
    for (int w = 1; w < 8; w++) m = part[w][threadIdx.x] > m ? part[w][threadIdx.x] : m;
    top[blockIdx.y * n_col + c] = m;
}

/* e in place, 0 behind what a column sees: 32 columns by 64 keys a block. */
__global__ void exponents(kv_turned t, size_t n_col, const float *top, float *p)
{
    __shared__ float most[8][32];
    const size_t c = blockIdx.x * (size_t)32 + threadIdx.x, j0 = blockIdx.y * (size_t)64 + threadIdx.y;
    float m = -INFINITY;
    for (int k = threadIdx.y; k < SPLIT && c < n_col; k += 8) m = top[k * n_col + c] > m ? top[k * n_col + c] : m;
    most[threadIdx.y][threadIdx.x] = m;
    __syncthreads();
    for (int k = 0; k < 8; k++) m = most[k][threadIdx.x] > m ? most[k][threadIdx.x] : m;
    const size_t end = c < n_col ? seen_by(t, c) : 0, n = c < n_col ? t.n_key : 0;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = j0 + 8 * i < end ? p[(j0 + 8 * i) * t.ld + c] : 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (j0 + 8 * i < n) p[(j0 + 8 * i) * t.ld + c] = j0 + 8 * i < end ? kv_expf(x[i] - m) : 0;
}

/* The normaliser's eight lanes are eight threads, each of which adds its keys in order (probs_ref.c). */
const int COLS = 8, AHEAD = 16;
__global__ void normalisers(kv_turned t, size_t n_col, const float *top, const float *p, float *sum, float *lse)
{
    __shared__ double lanes[COLS][8];
    const size_t c = blockIdx.x * (size_t)COLS + threadIdx.x, lane = threadIdx.y, n = c < n_col ? t.n_key : 0;
    const float *at = p + lane * t.ld + c;
    double s = 0;
    float x[AHEAD], next[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) next[i] = lane + 8 * i < n ? at[8 * i * t.ld] : 0;
    for (size_t j0 = lane; j0 < n; j0 += 8 * AHEAD) {
        at += 8 * AHEAD * t.ld;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) x[i] = next[i], next[i] = j0 + 8 * (AHEAD + i) < n ? at[8 * i * t.ld] : 0;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) s += x[i];
    }
    lanes[threadIdx.x][lane] = s;
    __syncthreads();
    if (lane || c >= n_col) return;
    const double all = kv_sum8(lanes[threadIdx.x]);
    sum[c] = (float)all;
    if (!lse) return;
    float m = -INFINITY;
    for (int k = 0; k < SPLIT; k++) m = top[k * n_col + c] > m ? top[k * n_col + c] : m;
    lse[c] = (float)(m + kv_logd(all));
}

/* ------------------------------------------------------------------------------------------------ reductions */
const int KEYS = KV_SUM_BLOCK, ROWS = 32; /* keys of a block (a thread each), rows staged at a time */
static_assert(KEYS == 8 * ROWS, "a warp is a lane of the sums, its threads are rows");

/* Rows r0.. of one head at KEYS keys as probabilities, tile[key][row], 0 behind n. Returns the sum of this thread's
 * terms of the entropy: one row, one lane (kv_entropy), which are what it staged. */
template <bool STATS>
__device__ double stage(const kv_turned &t, size_t col, uint32_t rows, uint32_t n, size_t key0, const float *p,
                        const float *sum, float eps, float (*tile)[ROWS + 1])
{
    const uint32_t r = threadIdx.x % ROWS, lane = threadIdx.x / ROWS;
    const uint32_t end = r < rows ? n - (uint32_t)key0 : 0; /* of this row's keys, from key0 */
    const float all = r < rows ? sum[col + r] : 1, *at = p + (key0 + lane) * t.ld + col + r;
    double terms = 0;
    __syncthreads();
    for (uint32_t k = lane; k < KEYS; k += 8 * 8, at += 8 * 8 * t.ld) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = k + 8 * i < end ? at[8 * i * t.ld] : 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float a = __fdiv_rn(x[i], all);
            tile[k + 8 * i][r] = a;
            if (STATS) terms += a * kv_logf(a + eps);
        }
    }
    __syncthreads();
    return terms;
}

/* kv_reduce_rows at KEYS keys of a head. STATS: also what these keys add to the head's entropies and to its spread. */
template <bool STATS>
__global__ __launch_bounds__(KEYS, 5) void reduce_rows(kv_turned t, int how, double gamma, uint32_t w, uint32_t n,
                                                    const float *p, const float *sum, float *out, size_t ld_out,
                                                    float eps, double *part)
{
    __shared__ float tile[KEYS][ROWS + 1];
    __shared__ double lanes[8 * ROWS];
    const uint32_t tid = threadIdx.x;
    const size_t h = blockIdx.y, key0 = (size_t)blockIdx.x * KEYS, col = h * t.n_row + (t.n_row - w), i = key0 + tid;
    const float *mine = tile[tid];
    double s = 0, top = 0, var = 0;
    if (STATS) part += blockIdx.x * (size_t)t.n_q_head * (w + 1);
    for (uint32_t r0 = 0; r0 < w; r0 += ROWS) {
        uint32_t m = w - r0 < ROWS ? w - r0 : ROWS;
        double terms = stage<STATS>(t, col + r0, m, n, key0, p, sum, eps, tile);
        for (uint32_t r = 0; r < m; r++) {
            double a = mine[r];
            s += a;
            if (how == KV_ROWS_MAX) top = a > top ? a : top;
        }
        if (!STATS) continue;
        lanes[tid % ROWS * 8 + tid / ROWS] = terms;
        __syncthreads();
        if (tid < m) part[h * w + r0 + tid] = -kv_sum8(lanes + tid * 8);
    }
    const double mean = s / (double)w;
    for (uint32_t r0 = 0; r0 < w && (STATS || how == KV_ROWS_MEAN_VAR); r0 += ROWS) {
        uint32_t m = w - r0 < ROWS ? w - r0 : ROWS;
        if (w > ROWS) stage<false>(t, col + r0, m, n, key0, p, sum, eps, tile);
        for (uint32_t r = 0; r < m; r++) {
            double d = mine[r] - mean;
            var += d * d;
        }
    }
    var = w > 1 ? var / ((double)w - 1) : 0;
    if (i < n)
        out[h * ld_out + i] = how == KV_ROWS_MEAN       ? (float)mean
                              : how == KV_ROWS_MEAN_VAR ? (float)(mean + gamma * var)
                              : how == KV_ROWS_MAX      ? (float)top
                                                        : (float)s;
    if (!STATS) return;
    __syncthreads();
    lanes[tid] = var; /* 0 behind n */
    __syncthreads();
    if (tid >= 8) return;
    double x = 0;
    for (int k = 0; k < KEYS; k += 8) x += lanes[k + tid];
    lanes[tid] = x; /* nobody else reads that one */
    __syncwarp(0xff);
    if (!tid) part[(size_t)t.n_q_head * w + h] = kv_sum8(lanes);
}

/* stats[i] = the sum of part[block][i], i < m, blocks in order. */
__global__ void add_blocks(size_t n_block, size_t m, const double *part, double *stats)
{
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= m) return;
    double s = 0;
#pragma unroll 16
    for (size_t b = 0; b < n_block; b++) s += part[b * m + i];
    stats[i] = s;
}

/* ------------------------------------------------------------------------------------------------ units */
/* Smoothed x[i] of n. `at` gives the value at a position. */
template <typename F> __device__ float pooled(int pooling, size_t kernel, size_t n, size_t i, F at)
{
    size_t half = kernel / 2;
    if (pooling == KV_POOL_NONE || half == 0) return at(i);
    size_t a = i > half ? i - half : 0, b = i + half < n ? i + half : n - 1;
    double sum = 0;
    float max = at(a);
    for (size_t j = a; j <= b; j++) {
        float x = at(j);
        sum += x;
        if (x > max) max = x;
    }
    return pooling == KV_POOL_AVG ? (float)(sum / (double)kernel) : max;
}

__global__ void group_heads(kv_grouping g, size_t n, size_t ld, const float *per_head, float *score)
{
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, u = blockIdx.y;
    if (i >= n) return;
    const size_t count = g.reduce == KV_GROUP_ALL ? g.n_q_head : g.n_q_head / g.n_unit;
    const size_t first = g.reduce == KV_GROUP_ALL ? 0 : u * count;
    auto group = [&](size_t j) {
        double sum = 0;
        float max = -INFINITY;
        for (size_t h = first; h < first + count; h++) {
            auto head = [&](size_t k) { return per_head[h * ld + k]; };
            float x = g.pool_first ? pooled(g.pooling, g.kernel, n, j, head) : head(j);
            sum += x;
            if (h == first || x > max) max = x;
        }
        return g.reduce == KV_GROUP_MAX   ? max
               : g.reduce == KV_GROUP_SUM ? (float)sum
                                          : (float)(sum / (double)count);
    };
    score[u * ld + i] = g.pool_first ? group(i) : pooled(g.pooling, g.kernel, n, i, group);
}

template <bool VEC> __global__ void norms(size_t n, size_t d, size_t x_head, float sign, const float *x, float *score, size_t ld)
{
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, u = blockIdx.y;
    if (i >= n) return;
    const float *row = x + u * x_head + i * d;
    double s = 0;
#pragma unroll 4
    for (size_t j = 0; j < d && VEC; j += 4) { /* kv_length, four elements a load */
        const float4 v = *(const float4 *)(row + j);
        s += (double)v.x * v.x, s += (double)v.y * v.y, s += (double)v.z * v.z, s += (double)v.w * v.w;
    }
    score[u * ld + i] = sign * (float)(VEC ? sqrt(s) : kv_length(d, row));
}

__global__ void spread_kv(size_t n_kv, size_t n_unit, size_t n, size_t ld, const float *per_kv, float *score)
{
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, u = blockIdx.y;
    if (i >= n) return;
    double sum = 0;
    for (size_t h = 0; h < n_kv && n_unit == 1; h++) sum += per_kv[h * ld + i];
    score[u * ld + i] = n_unit == 1 ? (float)(sum / (double)n_kv) : per_kv[u * n_kv / n_unit * ld + i];
}

__global__ void column_share(size_t n, size_t ld, bool per_row, const float *x, float *score)
{
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, h = blockIdx.y;
    if (i < n) score[h * ld + i] = per_row ? __fdiv_rn(x[h * ld + i], (float)(n - i)) : x[h * ld + i];
}
} // namespace

extern "C" int kv_scores_dev(const kv_turned *t, const float *q, const float *k, float *p, struct CUstream_st *stream)
{
    if (!t->n_key || t->n_key > 64 * 65535u || !t->n_row || !t->n_kv_head || t->n_q_head % t->n_kv_head || t->ld < (size_t)t->n_q_head * t->n_row)
        return (int)cudaErrorInvalidValue;
    size_t n_col = (size_t)t->n_q_head / t->n_kv_head * t->n_row;
    dim3 grid(blocks(t->n_key, TILE), blocks(n_col, TILE), t->n_kv_head);
    bool vec = !(t->d % 4 || t->q_head % 4 || t->k_head % 4 || (size_t)q % 16 || (size_t)k % 16);
    bool out = !(n_col % 4 || t->ld % 4 || (size_t)p % 16);
    (vec && out ? scores<true, true> : vec ? scores<true, false> : scores<false, false>)<<<grid, 256, 0, stream>>>(
        *t, q, k, p);
    return last();
}

extern "C" size_t kv_softmax_scratch(const kv_turned *t)
{
    return SPLIT * (size_t)t->n_q_head * t->n_row * sizeof(float);
}

extern "C" int kv_softmax_dev(const kv_turned *t, float *p, float *sum, float *lse, void *scratch,
                              struct CUstream_st *stream)
{
    size_t n_col = (size_t)t->n_q_head * t->n_row;
    largest<<<dim3(blocks(n_col, 32), SPLIT), dim3(32, 8), 0, stream>>>(*t, n_col, p, (float *)scratch);
    exponents<<<dim3(blocks(n_col, 32), blocks(t->n_key, 64)), dim3(32, 8), 0, stream>>>(*t, n_col, (float *)scratch, p);
    normalisers<<<blocks(n_col, COLS), dim3(COLS, 8), 0, stream>>>(*t, n_col, (float *)scratch, p, sum, lse);
    return last();
}

extern "C" size_t kv_window_stats(const kv_turned *t, uint32_t w, uint32_t n)
{
    return (1 + (size_t)blocks(n, KEYS)) * t->n_q_head * (w + 1) * sizeof(double);
}

extern "C" int kv_reduce_rows_dev(const kv_turned *t, kv_row_reduce how, double gamma, uint32_t w, uint32_t n,
                                  const float *p, const float *sum, float *out, size_t ld_out, float eps, double *stats,
                                  struct CUstream_st *stream)
{
    const size_t m = (size_t)t->n_q_head * (w + 1);
    if (w > t->n_row || n > t->n_key) return (int)cudaErrorInvalidValue;
    dim3 grid(blocks(n, KEYS), t->n_q_head);
    if (n)
        (stats ? reduce_rows<true> : reduce_rows<false>)<<<grid, KEYS, 0, stream>>>(*t, how, gamma, w, n, p, sum, out, ld_out,
                                                                                  eps, stats ? stats + m : NULL);
    if (stats) add_blocks<<<blocks(m, 64), 64, 0, stream>>>(grid.x, m, stats + m, stats);
    return last();
}

extern "C" int kv_group_heads_dev(const kv_grouping *g, size_t n, size_t ld, const float *per_head, float *score,
                                  struct CUstream_st *stream)
{
    if (!n) return 0;
    group_heads<<<dim3(blocks(n, 256), (unsigned)g->n_unit), 256, 0, stream>>>(*g, n, ld, per_head, score);
    return last();
}

extern "C" int kv_norms_dev(size_t n_unit, size_t n, size_t d, size_t x_head, float sign, const float *x, float *score,
                            size_t ld, struct CUstream_st *stream)
{
    if (!n || !n_unit) return 0;
    bool vec = !(d % 4 || x_head % 4 || (size_t)x % 16);
    (vec ? norms<true> : norms<false>)<<<dim3(blocks(n, 128), (unsigned)n_unit), 128, 0, stream>>>(n, d, x_head, sign, x,
                                                                                                 score, ld);
    return last();
}

extern "C" int kv_spread_kv_dev(size_t n_kv, size_t n_unit, size_t n, size_t ld, const float *per_kv, float *score,
                                struct CUstream_st *stream)
{
    if (!n || !n_unit) return 0;
    spread_kv<<<dim3(blocks(n, 256), (unsigned)n_unit), 256, 0, stream>>>(n_kv, n_unit, n, ld, per_kv, score);
    return last();
}

extern "C" int kv_column_share_dev(size_t n_head, size_t n, size_t ld, bool per_row, const float *x, float *score,
                                   struct CUstream_st *stream)
{
    if (!n || !n_head) return 0;
    column_share<<<dim3(blocks(n, 256), (unsigned)n_head), 256, 0, stream>>>(n, ld, per_row, x, score);
    return last();
}
