/* walk.cu - see walk_dev.h. Sums of pieces are small products with gathered rows on both sides, on the tensor cores: e is
 * split into two numbers of 11 bits, so a product of it with a 16-bit value is exact to 22 bits. Running sums over the
 * pieces of a unit then give every checkpoint one look. */
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include "kernels/walk_dev.h"

namespace
{
const int TILE = 128, DEPTH = 16, STAGES = 4; /* columns of a block; entries in a stage; stages in flight */
const int PLD = TILE + 8;                     /* 8 mod 32: fragments without bank conflicts */

__device__ void copy16(float *to, const float *from, bool there)
{
    unsigned s = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s), "l"(from), "r"(there ? 16 : 0));
}

__device__ void copy4(float *to, const float *from, bool there)
{
    unsigned s = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(s), "l"(from), "r"(there ? 4 : 0));
}

/* Elements i..i+3 of a row of n, zeros behind its end. */
template <bool VEC> __device__ void copy_part(float *to, const float *row, int i, int n, bool there)
{
    if (VEC) copy16(to, there && i < n ? row + i : row, there && i < n);
    for (int m = 0; m < 4 && !VEC; m++) copy4(to + m, there && i + m < n ? row + i + m : row, there && i + m < n);
}

__device__ float high_part(float x)
{
    return __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}

__device__ void multiply(float c[4], const float a[4], const float b[2])
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                   "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

/* A piece, 128 columns, DT elements of the output. Eight warps: four times 32 columns by two times DT / 2. */
template <int DT, bool VEC, bool EXACT_V>
__global__ __launch_bounds__(256, 2) void walk_sums(kv_walk_set w, float *part, double *mass, double *cmass)
{
    extern __shared__ __align__(16) float shared[];
    const int VLD = DT + 8, NT = DT / 16; /* tiles of 8 outputs of a warp */
    float *const ps = shared, *const vs = shared + STAGES * DEPTH * PLD;
    __shared__ uint8_t marked[STAGES][DEPTH];
    const kv_walk_piece piece = w.piece[blockIdx.x];
    const kv_walk_unit unit = w.unit[piece.unit];
    const int c0 = blockIdx.y * TILE, j0 = blockIdx.z * DT, d = (int)w.d, tid = threadIdx.x;
    const int n_col = (int)w.n_col - c0 < TILE ? (int)w.n_col - c0 : TILE, n = (int)(piece.end - piece.begin);
    const int warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4, wc = warp % 4 * 32, wj = warp / 4 * (DT / 2);
    const float *const p = w.p + unit.col + c0;
    const bool sums = !blockIdx.z; /* two threads a column, half of each stage */
    const int column = tid % TILE, half = tid / TILE;
    auto entry = [&](int i) -> uint32_t {
        uint32_t at = piece.begin + i;
        if (unit.order) return unit.order[at];
        at += unit.first;
        return at < w.n_key ? at : at - w.n_key;
    };
    auto fetch = [&](int stage, int i0) {
        float *pt = ps + stage * DEPTH * PLD, *vt = vs + stage * DEPTH * VLD;
        for (int x = tid; x < DEPTH * TILE / 4; x += 256) {
            int k = x / (TILE / 4), i = x % (TILE / 4) * 4;
            bool there = i0 + k < n;
            uint32_t key = there ? entry(i0 + k) : 0;
            copy_part<VEC>(pt + k * PLD + i, p + key * w.ld, i, n_col, there);
            if (!i) marked[stage][k] = there && cmass && w.flag[key];
        }
        for (int x = tid; x < DEPTH * DT / 4 && part; x += 256) {
            int k = x / (DT / 4), i = x % (DT / 4) * 4;
            bool there = i0 + k < n;
            uint32_t key = there ? entry(i0 + k) : 0;
            copy_part<VEC>(vt + k * VLD + i, unit.v + (size_t)key * d + j0, i, d - j0, there);
        }
    };
    float sum[2][NT][4] = {};
    double m = 0, m2 = 0, f = 0, f2 = 0;
    for (int s = 0; s < STAGES - 1; s++) {
        if (s * DEPTH < n) fetch(s, s * DEPTH);
        asm volatile("cp.async.commit_group;");
    }
    for (int i0 = 0, stage = 0; i0 < n; i0 += DEPTH, stage = (stage + 1) % STAGES) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads();
        int ahead = i0 + (STAGES - 1) * DEPTH;
        if (ahead < n) fetch((stage + STAGES - 1) % STAGES, ahead);
        asm volatile("cp.async.commit_group;");
        const float *pt = ps + stage * DEPTH * PLD, *vt = vs + stage * DEPTH * VLD;
        if (sums) { /* entries behind the end are 0 */
            float x[DEPTH / 2]; /* four at a time in f32, then in double */
#pragma unroll
            for (int k = 0; k < DEPTH / 2; k++) x[k] = pt[(half * (DEPTH / 2) + k) * PLD + column];
            m += (x[0] + x[1]) + (x[2] + x[3]), m2 += (x[4] + x[5]) + (x[6] + x[7]);
            if (cmass) {
#pragma unroll
                for (int k = 0; k < DEPTH / 2; k++) x[k] = marked[stage][half * (DEPTH / 2) + k] ? x[k] : 0;
                f += (x[0] + x[1]) + (x[2] + x[3]), f2 += (x[4] + x[5]) + (x[6] + x[7]);
            }
        }
        if (!part) continue;
#pragma unroll
        for (int k0 = 0; k0 < DEPTH; k0 += 8) {
            float hi[2][4], lo[2][4];
#pragma unroll
            for (int a = 0; a < 2; a++)
#pragma unroll
                for (int x = 0; x < 4; x++) {
                    float e = pt[(k0 + t + x / 2 * 4) * PLD + wc + a * 16 + g + x % 2 * 8];
                    hi[a][x] = high_part(e), lo[a][x] = e - hi[a][x];
                }
#pragma unroll
            for (int b = 0; b < NT; b++) {
                float v[2], vh[2], vl[2];
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    v[x] = vt[(k0 + t + x * 4) * VLD + wj + b * 8 + g];
                    vh[x] = EXACT_V ? v[x] : high_part(v[x]), vl[x] = v[x] - vh[x];
                }
#pragma unroll
                for (int a = 0; a < 2 && !EXACT_V; a++) multiply(sum[a][b], hi[a], vl);
#pragma unroll
                for (int a = 0; a < 2; a++) multiply(sum[a][b], lo[a], vh);
#pragma unroll
                for (int a = 0; a < 2; a++) multiply(sum[a][b], hi[a], vh);
            }
        }
    }
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    double2 *const other = (double2 *)shared;
    const double2 mine = make_double2(m + m2, f + f2);
    if (half) other[column] = mine;
    __syncthreads();
    if (sums && !half && column < n_col) {
        size_t at = (size_t)blockIdx.x * w.n_col + c0 + column;
        mass[at] = mine.x + other[column].x;
        if (cmass) cmass[at] = mine.y + other[column].y;
    }
    if (!part) return;
#pragma unroll
    for (int a = 0; a < 2; a++)
#pragma unroll
        for (int b = 0; b < NT; b++)
#pragma unroll
            for (int x = 0; x < 4; x++) {
                int c = wc + a * 16 + g + x / 2 * 8, j = j0 + wj + b * 8 + 2 * t + x % 2;
                if (c < n_col && j < d) part[((size_t)blockIdx.x * w.n_col + c0 + c) * d + j] = sum[a][b][x];
            }
}

/* ---------------------------------------------------------------------------------------------- looks */
/* Two sums over a warp, in trees of fixed shape; every lane has the result. */
__device__ double2 warp_sum(double2 x)
{
    for (int n = 16; n; n >>= 1) {
        x.x += __shfl_xor_sync(0xffffffffu, x.x, n);
        x.y += __shfl_xor_sync(0xffffffffu, x.y, n);
    }
    return x;
}

/* A column of a unit a warp; lane j % 32 has element j of the output, NE of them. */
template <int NE> __global__ __launch_bounds__(128) void look(kv_walk_set w, kv_look l)
{
    const kv_walk_unit unit = w.unit[blockIdx.y];
    const size_t c = blockIdx.x * (size_t)4 + threadIdx.x / 32, lane = threadIdx.x % 32, d = w.d;
    if (c >= w.n_col) return;
    const size_t column = unit.col + c, head = column / (l.n_row ? l.n_row : 1), row = l.n_row ? column % l.n_row : 0;
    const uint32_t *step = l.step + unit.check + blockIdx.y, *first = l.first ? l.first + unit.check + blockIdx.y : NULL;
    double mass = l.base_mass ? l.base_mass[column] : 0, cmass = 0;
    const double inv = 1 / (double)l.sum[column];
    float out[NE], o[NE];
#pragma unroll
    for (int i = 0; i < NE; i++) {
        const size_t j = lane + 32 * i;
        out[i] = j < d && l.base_out ? l.base_out[column * d + j] : 0;
        o[i] = j < d && l.o ? l.o[column * d + j] : 0;
    }
    for (uint32_t k = 0; k < unit.n_check; k++) {
#pragma unroll 4
        for (size_t x = unit.piece + step[k]; x < unit.piece + step[k + 1]; x++) {
            mass += l.piece_mass[x * w.n_col + c];
            if (l.cmass) cmass += l.piece_cmass[x * w.n_col + c];
#pragma unroll
            for (int i = 0; i < NE; i++)
                if (l.part && lane + 32 * i < d) out[i] += l.part[(x * w.n_col + c) * d + lane + 32 * i];
        }
        const size_t to = (unit.check + k) * (size_t)w.n_col + c;
        if (!lane) {
            l.mass[to] = mass * inv;
            if (l.cmass) l.cmass[to] = cmass * inv;
        }
        for (int i = 0; i < NE && l.out; i++)
            if (lane + 32 * i < d) l.out[to * d + lane + 32 * i] = out[i];
        if (!l.o) continue;
        const float share = mass > 0 ? (float)(1 / mass) : 0;
        float diff[NE];
        double2 s = make_double2(0, 0);
#pragma unroll
        for (int i = 0; i < NE; i++) {
            diff[i] = o[i] - out[i] * share;
            s.x += (double)diff[i] * diff[i], s.y += (double)o[i] * diff[i];
        }
        s = warp_sum(s);
        if (!lane) l.error2[to] = s.x, l.dot[to] = s.y;
        for (uint32_t x = first ? first[k] : 0; x < (first ? first[k + 1] : 0); x++) {
            __half *at = (__half *)l.to + (l.slot[x] * l.n_row + row) * l.width + head * d;
#pragma unroll
            for (int i = 0; i < NE; i++)
                if (lane + 32 * i < d) at[lane + 32 * i] = __float2half_rn(diff[i] * l.scale);
        }
    }
}

__global__ void full_rows(size_t n_col, size_t d, const float *sum, const double *look_mass, const float *look_out,
                          double *base_mass, float *base_out, float *o)
{
    const size_t u = blockIdx.y, c = blockIdx.x, column = u * n_col + c, late = (2 * u) * n_col + c, all = late + n_col;
    if (!threadIdx.x) base_mass[column] = look_mass[late] * (double)sum[column];
    const float inv = (float)(1 / (look_mass[all] * (double)sum[column]));
    for (size_t j = threadIdx.x; j < d; j += blockDim.x) {
        base_out[column * d + j] = look_out[late * d + j];
        o[column * d + j] = look_out[all * d + j] * inv;
    }
}

__global__ void largest(size_t n, const float *x, float *top, bool power)
{
    __shared__ float part[256];
    float m = 0;
    for (size_t i = blockIdx.x * (size_t)256 + threadIdx.x; i < n; i += (size_t)gridDim.x * 256) m = fmaxf(m, fabsf(x[i]));
    part[threadIdx.x] = m;
    for (int s = 128; s; s >>= 1) {
        __syncthreads();
        if (threadIdx.x < s) part[threadIdx.x] = fmaxf(part[threadIdx.x], part[threadIdx.x + s]);
    }
    if (!threadIdx.x) top[blockIdx.x] = !power ? part[0] : part[0] > 0 ? exp2f((float)(ilogbf(part[0]) + 1)) : 1;
}

int last()
{
    return (int)cudaGetLastError();
}

template <int DT, bool VEC, bool EXACT_V>
int launch(const kv_walk_set *w, size_t n_piece, float *part, double *mass, double *cmass, struct CUstream_st *stream)
{
    const int bytes = STAGES * DEPTH * (PLD + DT + 8) * (int)sizeof(float);
    cudaError_t e =
        cudaFuncSetAttribute(walk_sums<DT, VEC, EXACT_V>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e) return (int)e;
    dim3 grid((unsigned)n_piece, (w->n_col + TILE - 1) / TILE, part ? (w->d + DT - 1) / DT : 1);
    walk_sums<DT, VEC, EXACT_V><<<grid, 256, bytes, stream>>>(*w, part, mass, cmass);
    return last();
}
} // namespace

extern "C" int kv_walk_dev(const kv_walk_set *w, size_t n_piece, float *part, double *mass, double *cmass,
                           struct CUstream_st *stream)
{
    if (!n_piece) return 0;
    if (!w->n_col || !w->d || w->d > 1024) return (int)cudaErrorInvalidValue;
    /* columns of units start at multiples of n_col */
    const bool vec = !(w->n_col % 4 || w->d % 4 || w->ld % 4 || (size_t)w->p % 16);
    if (w->d <= 64)
        return vec ? (w->exact_v ? launch<64, true, true> : launch<64, true, false>)(w, n_piece, part, mass, cmass, stream)
                   : launch<64, false, false>(w, n_piece, part, mass, cmass, stream);
    return vec ? (w->exact_v ? launch<128, true, true> : launch<128, true, false>)(w, n_piece, part, mass, cmass, stream)
               : launch<128, false, false>(w, n_piece, part, mass, cmass, stream);
}

extern "C" int kv_look_dev(const kv_walk_set *w, size_t n_unit, const kv_look *l, struct CUstream_st *stream)
{
    const dim3 grid((w->n_col + 3) / 4, (unsigned)n_unit);
    if (!n_unit) return 0;
    if (w->d > 1024) return (int)cudaErrorInvalidValue;
    (w->d <= 64    ? look<2>
     : w->d <= 128 ? look<4>
     : w->d <= 256 ? look<8>
                   : look<32>)<<<grid, 128, 0, stream>>>(*w, *l);
    return last();
}

extern "C" int kv_full_rows_dev(size_t n_unit, size_t n_col, size_t d, const float *sum, const double *look_mass,
                                const float *look_out, double *base_mass, float *base_out, float *o,
                                struct CUstream_st *stream)
{
    full_rows<<<dim3((unsigned)n_col, (unsigned)n_unit), 128, 0, stream>>>(n_col, d, sum, look_mass, look_out, base_mass,
                                                                         base_out, o);
    return last();
}

extern "C" int kv_largest_dev(size_t n, const float *x, float *top, float *scratch, struct CUstream_st *stream)
{
    largest<<<1024, 256, 0, stream>>>(n, x, scratch, false);
    largest<<<1, 256, 0, stream>>>(1024, scratch, top, true);
    return last();
}
