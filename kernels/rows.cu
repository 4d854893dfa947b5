/* rows.cu - everything of a forward pass that is not a product or attention: norms, rotation, gates, sums.
 * All of it moves memory, so accesses are four elements wide where shapes and addresses allow. A row belongs to one
 * block or warp and its sums have a fixed order, whatever other rows there are. */
#include "kernels/cuda.h"
#include "kernels/tensor.cuh"

namespace
{
const int THREADS = 256;

KV_DEV float get(const void *p, int bits, size_t i)
{
    return bits == 32   ? ((const float *)p)[i]
           : bits == 16 ? __half2float(((const __half *)p)[i])
                        : __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}
KV_DEV void put(void *p, int bits, size_t i, float x)
{
    if (bits == 32)
        ((float *)p)[i] = x;
    else if (bits == 16)
        ((__half *)p)[i] = __float2half_rn(x);
    else
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
}

/* V elements at i, V = 1 or 4; for 4, p + i is aligned to the four. */
template <int V> struct vec {
    float x[V];
};
template <int V> KV_DEV vec<V> load(const void *p, int bits, size_t i)
{
    vec<V> r;
    if (V == 1) {
        r.x[0] = get(p, bits, i);
    } else if (bits == 32) {
        float4 y = *(const float4 *)((const float *)p + i);
        r.x[0] = y.x, r.x[1 % V] = y.y, r.x[2 % V] = y.z, r.x[3 % V] = y.w;
    } else {
        uint2 y = *(const uint2 *)((const uint16_t *)p + i);
        for (int k = 0; k < 4; k++) {
            uint32_t u = (k < 2 ? y.x : y.y) >> (k & 1) * 16 & 0xffff;
            r.x[k % V] = bits == 17 ? __uint_as_float(u << 16) : __half2float(__ushort_as_half((unsigned short)u));
        }
    }
    return r;
}
template <int V> KV_DEV void save(void *p, int bits, size_t i, const vec<V> &v)
{
    if (V == 1) {
        put(p, bits, i, v.x[0]);
    } else if (bits == 32) {
        *(float4 *)((float *)p + i) = make_float4(v.x[0], v.x[1 % V], v.x[2 % V], v.x[3 % V]);
    } else if (bits == 17) {
        *(uint2 *)((uint16_t *)p + i) =
            make_uint2(kv_pair<__nv_bfloat16>(v.x[0], v.x[1 % V]), kv_pair<__nv_bfloat16>(v.x[2 % V], v.x[3 % V]));
    } else {
        *(uint2 *)((uint16_t *)p + i) =
            make_uint2(kv_pair<__half>(v.x[0], v.x[1 % V]), kv_pair<__half>(v.x[2 % V], v.x[3 % V]));
    }
}

KV_DEV float warp_sum(float x)
{
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}
KV_DEV double warp_sum(double x)
{
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
    return x;
}
/* The sum over the block, to all its threads; part: THREADS / 32 places. */
template <typename F> KV_DEV F block_sum(F x, F *part)
{
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = part[0];
    for (int i = 1; i < THREADS / 32; i++) x += part[i];
    return x;
}

KV_DEV float active(int act, float g)
{
    if (act == KV_GATE_GELU) return 0.5f * g * (1.f + erff(g * 0.70710678f));
    float u =
        act == KV_GATE_SILU ? g : 1.5957691216f * (g + 0.044715f * g * g * g); /* 0.5 (1 + tanh y) = 1 / (1 + e^-2y) */
    return g / (1.f + expf(-u));
}

__global__ void embed(size_t n, uint32_t n_vocab, const uint32_t *token, const void *table, int bits, float scale,
                      float *x)
{
    const uint32_t id = token[blockIdx.x];
    for (size_t i = threadIdx.x; i < n; i += THREADS)
        x[blockIdx.x * n + i] = id < n_vocab ? get(table, bits, id * n + i) * scale : NAN;
}

template <int V>
__global__ void rmsnorm(size_t n, const float *x, size_t ld_x, const float *w, float w_add, float eps, void *y,
                        int bits, size_t ld_y)
{
    __shared__ float part[THREADS / 32];
    const size_t at = blockIdx.x * ld_x, to = blockIdx.x * ld_y;
    float sum = 0;
    for (size_t i = threadIdx.x * V; i < n; i += THREADS * V) {
        vec<V> a = load<V>(x, 32, at + i);
        for (int k = 0; k < V; k++) sum = fmaf(a.x[k], a.x[k], sum);
    }
    const float f = 1.f / sqrtf(block_sum(sum, part) / (float)n + eps);
    for (size_t i = threadIdx.x * V; i < n; i += THREADS * V) {
        vec<V> a = load<V>(x, 32, at + i), b = load<V>(w, 32, i);
        for (int k = 0; k < V; k++) a.x[k] = a.x[k] * f * (b.x[k] + w_add);
        save<V>(y, bits, to + i, a);
    }
}

__global__ void layernorm(size_t n, const float *x, size_t ld_x, const float *w, const float *b, float eps, void *y,
                          int bits, size_t ld_y)
{
    __shared__ float part[THREADS / 32];
    x += blockIdx.x * ld_x;
    float sum = 0, square = 0;
    for (size_t i = threadIdx.x; i < n; i += THREADS) sum += x[i];
    const float mean = block_sum(sum, part) / (float)n;
    for (size_t i = threadIdx.x; i < n; i += THREADS) square = fmaf(x[i] - mean, x[i] - mean, square);
    const float f = 1.f / sqrtf(block_sum(square, part) / (float)n + eps);
    for (size_t i = threadIdx.x; i < n; i += THREADS)
        put(y, bits, blockIdx.x * ld_y + i, fmaf((x[i] - mean) * f, w[i], b ? b[i] : 0.f));
}

__global__ void rope_table(size_t n, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *table)
{
    size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x, half = rot / 2;
    if (i >= n * half) return;
    double s, c;
    sincos((double)(pos0 + i / half) * (double)inv_freq[i % half], &s, &c);
    table[i / half * rot + i % half] = (float)c * mscale;
    table[i / half * rot + half + i % half] = (float)s * mscale;
}

/* One warp for a head of a row; each lane turns whole pairs. */
__global__ void heads(size_t n_row, size_t n_head, size_t d, const void *proj, int in_bits, size_t ld_proj,
                      const float *bias, const float *norm_w, float w_add, float eps, const float *table, size_t rot,
                      void *out, int bits, size_t out_head, uint32_t *over)
{
    const size_t id = blockIdx.x * (size_t)(THREADS / 32) + threadIdx.x / 32;
    const uint32_t lane = threadIdx.x % 32;
    if (id >= n_row * n_head) return;
    const size_t row = id / n_head, h = id % n_head, at = row * ld_proj + h * d, to = h * out_head + row * d;
    if (bias) bias += h * d;
    float f = 1;
    if (norm_w) {
        float sum = 0;
        for (size_t i = lane; i < d; i += 32) {
            float x = get(proj, in_bits, at + i) + (bias ? bias[i] : 0.f);
            sum = fmaf(x, x, sum);
        }
        f = 1.f / sqrtf(warp_sum(sum) / (float)d + eps);
    }
    auto value = [&](size_t i) {
        float x = get(proj, in_bits, at + i) + (bias ? bias[i] : 0.f);
        return norm_w ? x * f * (norm_w[i] + w_add) : x;
    };
    uint32_t lost = 0;
    auto write = [&](size_t i, float x) {
        put(out, bits, to + i, x);
        lost += bits != 32 && isfinite(x) && isinf(get(out, bits, to + i));
    };
    const size_t half = table ? rot / 2 : 0;
    for (size_t i = lane; i < half; i += 32) {
        float a = value(i), b = value(i + half), c = table[row * rot + i], s = table[row * rot + half + i];
        write(i, a * c - b * s);
        write(i + half, b * c + a * s);
    }
    for (size_t i = 2 * half + lane; i < d; i += 32) write(i, value(i));
    if (lost && over) atomicAdd(&over[h], lost); /* whole numbers: the order does not show */
}

/* The same for the usual shapes: d / 8 = LANES lanes hold a head, lane i elements 4 i.. and those d / 2 further on,
 * which are its partners in the rotation. */
template <int LANES>
__global__ void heads8(size_t n_row, size_t n_head, const void *proj, int in_bits, size_t ld_proj, const float *bias,
                       const float *norm_w, float w_add, float eps, const float *table, void *out, int bits,
                       size_t out_head, uint32_t *over)
{
    const size_t d = LANES * 8, half = d / 2, id = (blockIdx.x * (size_t)THREADS + threadIdx.x) / LANES;
    const size_t i = threadIdx.x % LANES * 4;
    const bool there = id < n_row * n_head;
    const size_t row = there ? id / n_head : 0, h = there ? id % n_head : 0;
    const size_t at = row * ld_proj + h * d + i, to = h * out_head + row * d + i;
    vec<4> a = load<4>(proj, in_bits, at), b = load<4>(proj, in_bits, at + half);
    if (bias) {
        vec<4> x = load<4>(bias, 32, h * d + i), y = load<4>(bias, 32, h * d + half + i);
        for (int k = 0; k < 4; k++) a.x[k] += x.x[k], b.x[k] += y.x[k];
    }
    if (norm_w) {
        float sum = 0;
        for (int k = 0; k < 4; k++) sum = fmaf(a.x[k], a.x[k], sum), sum = fmaf(b.x[k], b.x[k], sum);
        for (int k = LANES / 2; k; k >>= 1) sum += __shfl_xor_sync(~0u, sum, k);
        const float f = 1.f / sqrtf(sum / (float)d + eps);
        vec<4> x = load<4>(norm_w, 32, i), y = load<4>(norm_w, 32, half + i);
        for (int k = 0; k < 4; k++) a.x[k] *= f * (x.x[k] + w_add), b.x[k] *= f * (y.x[k] + w_add);
    }
    if (table) {
        vec<4> c = load<4>(table, 32, row * d + i), s = load<4>(table, 32, row * d + half + i);
        for (int k = 0; k < 4; k++) {
            float x = a.x[k], y = b.x[k];
            a.x[k] = x * c.x[k] - y * s.x[k];
            b.x[k] = y * c.x[k] + x * s.x[k];
        }
    }
    if (!there) return;
    save<4>(out, bits, to, a);
    save<4>(out, bits, to + half, b);
    if (!over || bits == 32) return;
    /* halfway past the largest, and more: to infinity */
    const float limit = bits == 16 ? 65520.f : __uint_as_float(0x7f7f8000u);
    uint32_t lost = 0;
    for (int k = 0; k < 4; k++)
        lost += (fabsf(a.x[k]) >= limit && isfinite(a.x[k])) + (fabsf(b.x[k]) >= limit && isfinite(b.x[k]));
    if (lost) atomicAdd(&over[h], lost);
}

template <int V>
__global__ void gate_up(size_t n_row, size_t n, int act, const void *gate, const void *up, int in_bits, size_t ld_in,
                        const float *bias, void *out, int bits)
{
    const size_t per = n / V, step = (size_t)gridDim.x * THREADS;
    for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < n_row * per; i += step) {
        const size_t row = i / per, col = i % per * V;
        vec<V> g = load<V>(gate, in_bits, row * ld_in + col), u;
        if (up) u = load<V>(up, in_bits, row * ld_in + col);
        for (int k = 0; k < V; k++) g.x[k] = active(act, g.x[k] + (bias ? bias[col + k] : 0.f)) * (up ? u.x[k] : 1.f);
        save<V>(out, bits, row * n + col, g);
    }
}

template <int V>
__global__ void add(size_t n_row, size_t n, float *x, const void *y, int in_bits, size_t ld_y, const float *bias)
{
    const size_t per = n / V, step = (size_t)gridDim.x * THREADS;
    for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < n_row * per; i += step) {
        const size_t row = i / per, col = i % per * V;
        vec<V> a = load<V>(x, 32, row * n + col), b;
        if (y) b = load<V>(y, in_bits, row * ld_y + col);
        for (int k = 0; k < V; k++) a.x[k] += (y ? b.x[k] : 0.f) + (bias ? bias[col + k] : 0.f);
        save<V>(x, 32, row * n + col, a);
    }
}

__global__ void length(size_t n, const float *x, float *norm)
{
    __shared__ double part[THREADS / 32];
    x += blockIdx.x * n;
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += THREADS) sum = fma((double)x[i], (double)x[i], sum);
    sum = block_sum(sum, part);
    if (threadIdx.x == 0) norm[blockIdx.x] = (float)sqrt(sum);
}

__global__ void cast(size_t n, const float *src, void *dst, int bits, uint32_t *over)
{
    uint32_t lost = 0;
    for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS) {
        put(dst, bits, i, src[i]);
        lost += bits != 32 && isfinite(src[i]) && isinf(get(dst, bits, i));
    }
    if (lost && over) atomicAdd(over, lost);
}

__global__ void softcap(size_t n, float *x, float cap)
{
    for (size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS)
        x[i] = cap * tanhf(x[i] / cap);
}

bool is_type(int bits)
{
    return bits == 16 || bits == 17 || bits == 32;
}
size_t width(int bits)
{
    return bits == 32 ? 4 : 2;
}
/* May rows of n elements at stride ld be read four elements at a time? */
bool four(const void *p, int bits, size_t n, size_t ld)
{
    return n % 4 == 0 && ld % 4 == 0 && (size_t)p % (4 * width(bits)) == 0;
}
/* Blocks of a loop over n items, enough to fill any device. */
unsigned blocks_of(size_t n)
{
    size_t b = (n + THREADS - 1) / THREADS;
    return (unsigned)(b < 16384 ? b : 16384);
}
const size_t ROWS_MAX = 0x7fffffff;
const int BAD = (int)cudaErrorInvalidValue;
} // namespace

int kv_embed_dev(size_t n_row, size_t n, uint32_t n_vocab, const uint32_t *token, const void *table, int bits,
                 float scale, float *x, cudaStream_t stream)
{
    if (!is_type(bits) || n_row > ROWS_MAX) return BAD;
    if (!n_row || !n) return 0;
    embed<<<(unsigned)n_row, THREADS, 0, stream>>>(n, n_vocab, token, table, bits, scale, x);
    return (int)cudaGetLastError();
}

int kv_rmsnorm_dev(size_t n_row, size_t n, const float *x, size_t ld_x, const float *w, float w_add, float eps, void *y,
                   int bits, size_t ld_y, cudaStream_t stream)
{
    if (!is_type(bits) || n_row > ROWS_MAX) return BAD;
    if (!n_row || !n) return 0;
    if (four(x, 32, n, ld_x) && four(w, 32, n, n) && four(y, bits, n, ld_y))
        rmsnorm<4><<<(unsigned)n_row, THREADS, 0, stream>>>(n, x, ld_x, w, w_add, eps, y, bits, ld_y);
    else
        rmsnorm<1><<<(unsigned)n_row, THREADS, 0, stream>>>(n, x, ld_x, w, w_add, eps, y, bits, ld_y);
    return (int)cudaGetLastError();
}

int kv_layernorm_dev(size_t n_row, size_t n, const float *x, size_t ld_x, const float *w, const float *b, float eps,
                     void *y, int bits, size_t ld_y, cudaStream_t stream)
{
    if (!is_type(bits) || n_row > ROWS_MAX) return BAD;
    if (!n_row || !n) return 0;
    layernorm<<<(unsigned)n_row, THREADS, 0, stream>>>(n, x, ld_x, w, b, eps, y, bits, ld_y);
    return (int)cudaGetLastError();
}

int kv_rope_table_dev(size_t n_row, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *table,
                      cudaStream_t stream)
{
    size_t n = n_row * (rot / 2);
    if (rot % 2 || n_row > ROWS_MAX || n / THREADS >= ROWS_MAX) return BAD;
    if (!n) return 0;
    rope_table<<<(unsigned)((n + THREADS - 1) / THREADS), THREADS, 0, stream>>>(n_row, rot, pos0, inv_freq, mscale,
                                                                                table);
    return (int)cudaGetLastError();
}

int kv_heads_dev(size_t n_row, size_t n_head, size_t d, const void *proj, int in_bits, size_t ld_proj,
                 const float *bias, const float *norm_w, float w_add, float eps, const float *table, size_t rot,
                 void *out, int bits, size_t out_head, uint32_t *over, cudaStream_t stream)
{
    const size_t warps = THREADS / 32, blocks = (n_row * n_head + warps - 1) / warps;
    if (!is_type(bits) || !is_type(in_bits) || d > 1024 || (table && (rot > d || rot % 2)) || n_row > ROWS_MAX ||
        n_head > ROWS_MAX || blocks > ROWS_MAX)
        return BAD;
    if (!blocks) return 0;
    if ((d == 64 || d == 128 || d == 256) && (!table || rot == d) && four(proj, in_bits, d, ld_proj) &&
        four(out, bits, d, out_head) && four(bias, 32, d, d) && four(norm_w, 32, d, d) && four(table, 32, d, d)) {
        auto kernel = d == 64 ? heads8<8> : d == 128 ? heads8<16> : heads8<32>;
        const size_t n = (n_row * n_head * (d / 8) + THREADS - 1) / THREADS;
        kernel<<<(unsigned)n, THREADS, 0, stream>>>(n_row, n_head, proj, in_bits, ld_proj, bias, norm_w, w_add, eps,
                                                    table, out, bits, out_head, over);
        return (int)cudaGetLastError();
    }
    heads<<<(unsigned)blocks, THREADS, 0, stream>>>(n_row, n_head, d, proj, in_bits, ld_proj, bias, norm_w, w_add, eps,
                                                    table, rot, out, bits, out_head, over);
    return (int)cudaGetLastError();
}

int kv_gate_dev(size_t n_row, size_t n, int act, const void *gate, const void *up, int in_bits, size_t ld_in,
                const float *gate_bias, void *out, int bits, cudaStream_t stream)
{
    if (!is_type(bits) || !is_type(in_bits) || act < KV_GATE_SILU || act > KV_GATE_GELU) return BAD;
    if (!n_row || !n) return 0;
    if (four(gate, in_bits, n, ld_in) && four(up, in_bits, n, ld_in) && four(out, bits, n, n))
        gate_up<4><<<blocks_of(n_row * n / 4), THREADS, 0, stream>>>(n_row, n, act, gate, up, in_bits, ld_in, gate_bias,
                                                                     out, bits);
    else
        gate_up<1><<<blocks_of(n_row * n), THREADS, 0, stream>>>(n_row, n, act, gate, up, in_bits, ld_in, gate_bias,
                                                                 out, bits);
    return (int)cudaGetLastError();
}

int kv_add_dev(size_t n_row, size_t n, float *x, const void *y, int in_bits, size_t ld_y, const float *bias,
               cudaStream_t stream)
{
    if (!is_type(in_bits)) return BAD;
    if (!n_row || !n) return 0;
    if (four(x, 32, n, n) && four(y, in_bits, n, ld_y))
        add<4><<<blocks_of(n_row * n / 4), THREADS, 0, stream>>>(n_row, n, x, y, in_bits, ld_y, bias);
    else
        add<1><<<blocks_of(n_row * n), THREADS, 0, stream>>>(n_row, n, x, y, in_bits, ld_y, bias);
    return (int)cudaGetLastError();
}

int kv_length_dev(size_t n_row, size_t n, const float *x, float *norm, cudaStream_t stream)
{
    if (n_row > ROWS_MAX) return BAD;
    if (!n_row) return 0;
    length<<<(unsigned)n_row, THREADS, 0, stream>>>(n, x, norm);
    return (int)cudaGetLastError();
}

int kv_cast_dev(size_t n, const float *src, void *dst, int bits, uint32_t *over, cudaStream_t stream)
{
    if (!is_type(bits)) return BAD;
    if (!n) return 0;
    cast<<<blocks_of(n), THREADS, 0, stream>>>(n, src, dst, bits, over);
    return (int)cudaGetLastError();
}

int kv_softcap_dev(size_t n, float *x, float cap, cudaStream_t stream)
{
    if (!(cap > 0)) return BAD;
    if (!n) return 0;
    softcap<<<blocks_of(n), THREADS, 0, stream>>>(n, x, cap);
    return (int)cudaGetLastError();
}
