/* walk.cu - see walk_dev.h. Three steps: weights (two passes over the products), sums of pieces (a small product with
 * gathered rows on both sides), running sums over the pieces of a ranking with a look at each checkpoint. */
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/walk_dev.h"

namespace
{
const int COLS = 32, SPLIT = 64; /* columns of a block, parts of the keys in the first pass */

__device__ float score_of(const kv_turned &t, float product)
{
    float s = product * t.scale;
    return t.softcap > 0 ? t.softcap * tanhf(s / t.softcap) : s;
}

/* Largest score and sum of exponentials of part blockIdx.y of the keys, a column a lane; 8 warps share the keys. */
__global__ void turned_sums(kv_turned t, const float *p, float2 *part)
{
    __shared__ float2 warp[8][COLS];
    size_t col = blockIdx.x * (size_t)COLS + threadIdx.x, each = (t.n_key + SPLIT - 1) / SPLIT;
    size_t a = blockIdx.y * each, b = a + each < t.n_key ? a + each : t.n_key;
    float top = -INFINITY, sum = 0;
    if (col < t.n_col) {
        size_t last = t.row0 + col % t.n_row + 1;
        if (b > last) b = last;
        for (size_t k = a + threadIdx.y; k < b; k += 8) {
            float s = score_of(t, p[k * t.ld + col]);
            if (s > top) sum = sum * expf(top - s) + 1, top = s;
            else sum += expf(s - top);
        }
    }
    warp[threadIdx.y][threadIdx.x] = make_float2(top, sum);
    __syncthreads();
    if (threadIdx.y || col >= t.n_col) return;
    for (int w = 1; w < 8; w++) {
        float2 x = warp[w][threadIdx.x];
        float m = fmaxf(top, x.x);
        if (m == -INFINITY) continue;
        sum = sum * expf(top - m) + x.y * expf(x.x - m), top = m;
    }
    part[blockIdx.y * t.n_col + col] = make_float2(top, sum);
}

__global__ void turned_join(size_t n_col, const float2 *part, float *lse)
{
    size_t col = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (col >= n_col) return;
    float top = -INFINITY;
    double sum = 0;
    for (int i = 0; i < SPLIT; i++) top = fmaxf(top, part[i * n_col + col].x);
    for (int i = 0; i < SPLIT && top > -INFINITY; i++) {
        float2 x = part[i * n_col + col];
        sum += (double)x.y * exp((double)x.x - (double)top);
    }
    lse[col] = (float)((double)top + log(sum));
}

__global__ void turned_weights(kv_turned t, float *p, const float *lse)
{
    size_t col = blockIdx.x * (size_t)COLS + threadIdx.x, key = blockIdx.y * (size_t)blockDim.y + threadIdx.y;
    if (col >= t.n_col || key >= t.n_key) return;
    float *x = p + key * t.ld + col;
    *x = key <= t.row0 + col % t.n_row ? expf(score_of(t, *x) - lse[col]) : 0;
}

/* ---------------------------------------------------------------------------------------------- pieces */
const int TILE = 64, DEPTH = 16; /* columns and elements of a block's tile, keys at a time */

/* part[piece][c0..c0+63][j0..j0+63]; 256 threads, 4 x 4 values each. */
__global__ void __launch_bounds__(256) walk_outputs(size_t n_col, size_t d, const float *p, size_t ld, const float *v,
                                                    const uint32_t *order, const uint32_t *piece, float *part)
{
    __shared__ float ps[DEPTH][TILE], vs[DEPTH][TILE];
    size_t c0 = blockIdx.y * (size_t)TILE, j0 = blockIdx.z * (size_t)TILE, i = blockIdx.x;
    uint32_t a = piece[i], b = piece[i + 1];
    int t = threadIdx.x, tc = t / 16 * 4, tj = t % 16 * 4;
    float sum[4][4] = {};
    for (uint32_t k0 = a; k0 < b; k0 += DEPTH) {
        for (int e = t; e < DEPTH * TILE; e += 256) {
            uint32_t k = k0 + e / TILE;
            size_t key = k < b ? (order ? order[k] : k) : 0, c = c0 + e % TILE, j = j0 + e % TILE;
            ps[e / TILE][e % TILE] = k < b && c < n_col ? p[key * ld + c] : 0;
            vs[e / TILE][e % TILE] = k < b && j < d ? v[key * d + j] : 0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            float4 x = *(const float4 *)&ps[k][tc], y = *(const float4 *)&vs[k][tj];
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++) sum[m][n] = fmaf(xs[m], ys[n], sum[m][n]);
        }
        __syncthreads();
    }
    for (int m = 0; m < 4; m++)
        for (int n = 0; n < 4; n++)
            if (c0 + tc + m < n_col && j0 + tj + n < d) part[(i * n_col + c0 + tc + m) * d + j0 + tj + n] = sum[m][n];
}

__global__ void walk_masses(size_t n_col, const float *p, size_t ld, const uint32_t *order, const uint8_t *flag,
                            const uint32_t *piece, double *mass, double *cmass)
{
    size_t c = blockIdx.y * (size_t)blockDim.x + threadIdx.x, i = blockIdx.x;
    if (c >= n_col) return;
    double m = 0, f = 0;
    for (uint32_t k = piece[i]; k < piece[i + 1]; k++) {
        size_t key = order ? order[k] : k;
        double x = p[key * ld + c];
        m += x;
        if (cmass && flag[key]) f += x;
    }
    mass[i * n_col + c] = m;
    if (cmass) cmass[i * n_col + c] = f;
}

/* ---------------------------------------------------------------------------------------------- looks */
/* Sum over a block of up to 1,024 threads, in a tree of fixed shape. */
__device__ double block_sum(double x, double *shared)
{
    shared[threadIdx.x] = x;
    __syncthreads();
    for (unsigned n = 512; n; n >>= 1) {
        if (threadIdx.x < n && threadIdx.x + n < blockDim.x) shared[threadIdx.x] += shared[threadIdx.x + n];
        __syncthreads();
    }
    double sum = shared[0];
    __syncthreads();
    return sum;
}

/* A column a block, an element of the output a thread. */
__global__ void look(kv_look l)
{
    extern __shared__ double shared[];
    size_t c = blockIdx.x, j = threadIdx.x, at = c * l.d + j;
    bool mine = j < l.d;
    double mass = l.base_mass ? l.base_mass[c] : 0, cmass = 0;
    float out = mine && l.base_out ? l.base_out[at] : 0, o = mine && l.o ? l.o[at] : 0;
    for (size_t k = 0; k < l.n_check; k++) {
        for (uint32_t i = l.step[k]; i < l.step[k + 1]; i++) {
            mass += l.piece_mass[i * l.n_col + c];
            if (l.cmass) cmass += l.piece_cmass[i * l.n_col + c];
            if (mine && l.part) out += l.part[i * l.n_col * l.d + at];
        }
        size_t row = k * l.n_col + c;
        if (!j) {
            l.mass[row] = mass;
            if (l.cmass) l.cmass[row] = cmass;
        }
        if (mine && l.out) l.out[row * l.d + j] = out;
        if (!l.o) continue;
        float diff = mine ? o - (mass > 0 ? out * (float)(1 / mass) : 0) : 0;
        double error2 = block_sum((double)diff * diff, shared), dot = block_sum((double)o * diff, shared);
        if (!j) l.error2[row] = error2, l.dot[row] = dot;
        if (mine && l.diff) ((__half *)l.diff)[row * l.d + j] = __float2half_rn(diff);
    }
}

__global__ void place(const int32_t *check, size_t n_col, size_t n_row, size_t d, const __half *diff, size_t width,
                      __half *to)
{
    size_t slot = blockIdx.x, c = blockIdx.y, head = c / n_row, r = c % n_row;
    int32_t k = check[slot];
    for (size_t j = threadIdx.x; j < d; j += blockDim.x)
        to[(slot * n_row + r) * width + head * d + j] =
            k < 0 ? __float2half_rn(0) : diff[((size_t)k * n_col + c) * d + j];
}

int last()
{
    return (int)cudaGetLastError();
}
} // namespace

extern "C" size_t kv_turned_scratch(const kv_turned *t)
{
    return SPLIT * t->n_col * sizeof(float2);
}

extern "C" int kv_turned_dev(const kv_turned *t, float *p, float *lse, void *scratch, struct CUstream_st *stream)
{
    if (!t->n_key || !t->n_col || !t->n_row || t->ld < t->n_col || t->n_key > 8 * 65535)
        return (int)cudaErrorInvalidValue; /* a grid has 65,535 rows of blocks */
    unsigned cols = (unsigned)((t->n_col + COLS - 1) / COLS);
    turned_sums<<<dim3(cols, SPLIT), dim3(COLS, 8), 0, stream>>>(*t, p, (float2 *)scratch);
    turned_join<<<(unsigned)((t->n_col + 127) / 128), 128, 0, stream>>>(t->n_col, (const float2 *)scratch, lse);
    turned_weights<<<dim3(cols, (unsigned)((t->n_key + 7) / 8)), dim3(COLS, 8), 0, stream>>>(*t, p, lse);
    return last();
}

extern "C" int kv_walk_dev(size_t n_col, size_t d, const float *p, size_t ld, const float *v, const uint32_t *order,
                           const uint8_t *flag, size_t n_piece, const uint32_t *piece, float *part, double *mass,
                           double *cmass, struct CUstream_st *stream)
{
    if (!n_piece) return 0;
    dim3 grid((unsigned)n_piece, (unsigned)((n_col + TILE - 1) / TILE), (unsigned)((d + TILE - 1) / TILE));
    if (part) walk_outputs<<<grid, 256, 0, stream>>>(n_col, d, p, ld, v, order, piece, part);
    walk_masses<<<dim3((unsigned)n_piece, (unsigned)((n_col + 127) / 128)), 128, 0, stream>>>(n_col, p, ld, order, flag,
                                                                                         piece, mass, cmass);
    return last();
}

extern "C" int kv_look_dev(const kv_look *l, struct CUstream_st *stream)
{
    unsigned threads = (unsigned)((l->d + 31) / 32 * 32);
    if (threads > 1024 || !l->n_check) return l->n_check ? (int)cudaErrorInvalidValue : 0;
    look<<<(unsigned)l->n_col, threads, threads * sizeof(double), stream>>>(*l);
    return last();
}

extern "C" int kv_place_diff_dev(size_t n_slot, const int32_t *check, size_t n_head, size_t n_row, size_t d,
                                 const void *diff, size_t width, void *to, struct CUstream_st *stream)
{
    if (!n_slot) return 0;
    place<<<dim3((unsigned)n_slot, (unsigned)(n_head * n_row)), 128, 0, stream>>>(
        check, n_head * n_row, n_row, d, (const __half *)diff, width, (__half *)to);
    return last();
}
