/* sort.cu - rankings of many units in one stable radix sort (CUB's), by (unit, score descending, position ascending);
 * see exact_dev.h. */
#include <cub/device/device_radix_sort.cuh>
#include <cuda_runtime.h>

#include "kernels/exact_dev.h"
#include "kernels/math.h"

namespace
{
size_t aligned(size_t n)
{
    return (n + 255) / 256 * 256;
}

__global__ void fill(const kv_rank_unit *unit, uint64_t *key, uint32_t *pos)
{
    const kv_rank_unit u = unit[blockIdx.y];
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= u.n) return;
    uint32_t x = u.list[i];
    if (i < u.n_forced) {
        u.order[i] = x;
        return;
    }
    key[u.at + i - u.n_forced] = (uint64_t)blockIdx.y << 32 | kv_rank_key(u.score[x]);
    pos[u.at + i - u.n_forced] = x;
}

__global__ void spill(const kv_rank_unit *unit, const uint32_t *pos)
{
    const kv_rank_unit u = unit[blockIdx.y];
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= u.n - u.n_forced) return;
    uint32_t x = pos[u.at + i];
    u.order[u.n_forced + i] = x;
    u.sorted[i] = u.score[x];
}

int bits_of(size_t n)
{
    int b = 0;
    while (n >> b) b++;
    return b;
}
} // namespace

extern "C" size_t kv_rank_scratch(size_t n_unit, size_t total)
{
    size_t sort = 0;
    cub::DoubleBuffer<uint64_t> key;
    cub::DoubleBuffer<uint32_t> pos;
    cub::DeviceRadixSort::SortPairs(NULL, sort, key, pos, (int)total, 0, 32 + bits_of(n_unit));
    return 2 * aligned(8 * total) + 2 * aligned(4 * total) + aligned(sort) + 256;
}

extern "C" int kv_rank_dev(size_t n_unit, const kv_rank_unit *unit, size_t total, size_t most, void *scratch,
                           struct CUstream_st *stream)
{
    if (!n_unit) return 0;
    if (total > 0x7fffffff || n_unit > 65535) return (int)cudaErrorInvalidValue;
    char *at = (char *)scratch;
    uint64_t *k0 = (uint64_t *)at, *k1 = (uint64_t *)(at += aligned(8 * total));
    uint32_t *p0 = (uint32_t *)(at += aligned(8 * total)), *p1 = (uint32_t *)(at += aligned(4 * total));
    at += aligned(4 * total);
    dim3 grid((unsigned)((most + 255) / 256), (unsigned)n_unit);
    cub::DoubleBuffer<uint64_t> key(k0, k1);
    cub::DoubleBuffer<uint32_t> pos(p0, p1);
    size_t sort = 0;
    fill<<<grid, 256, 0, stream>>>(unit, k0, p0);
    cudaError_t e = cub::DeviceRadixSort::SortPairs(NULL, sort, key, pos, (int)total, 0, 32 + bits_of(n_unit), stream);
    if (!e && total) e = cub::DeviceRadixSort::SortPairs(at, sort, key, pos, (int)total, 0, 32 + bits_of(n_unit), stream);
    if (e) return (int)e;
    spill<<<grid, 256, 0, stream>>>(unit, pos.Current());
    return (int)cudaGetLastError();
}
