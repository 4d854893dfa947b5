/* bench_decode.cu - what eviction gives decoding, attention alone: one new token against the tokens a policy kept, and
 * against the full cache.
 *
 * The shape is that of an 8B model: LAYERS layers of 32 query heads on 8 KV heads, d 128, bf16, batch 1. Every layer
 * has keys and values of its own, so that nothing is read from a cache of the GPU twice; all layers of a token are one
 * CUDA graph, so that launches do not hide the difference. `bench_decode [KEPT]` (default 1024). */
#include "kernels/cuda.h"

#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRY(x)                                                                                                         \
    do {                                                                                                               \
        int e_ = (int)(x);                                                                                             \
        if (e_) {                                                                                                      \
            fprintf(stderr, "bench_decode: %s: %s\n", #x, cudaGetErrorString((cudaError_t)e_));                        \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

enum { LAYERS = 32, HEADS = 32, KV_HEADS = 8, D = 128, RUNS = 31 };

/* Pairs of bf16 in [0.5, 1), of either sign. */
static __global__ void fill(size_t n, uint32_t *x)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        x[i] = (uint32_t)(z >> 32 & 0x807f807fu) | 0x3f003f00u;
    }
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

struct cache {
    char *q, *k, *v, *out, *scratch;
    float *lse;
    size_t layer; /* bytes of a layer's keys */
};

/* Median milliseconds of one token: all layers, `length` keys each. */
static float token_ms(const cache *c, uint32_t length)
{
    kv_cuda_attn a;
    memset(&a, 0, sizeof a);
    a.n_q_head = HEADS, a.n_kv_head = KV_HEADS, a.d = D, a.n_row = 1, a.n_key = length, a.row0 = length - 1;
    a.scale = 1 / sqrtf((float)D), a.bits = a.out_bits = 17;
    a.q_row = a.q_head = a.kv_token = a.out_head = D, a.kv_head = (size_t)length * D;
    a.out_row = HEADS * D, a.lse_head = 1;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    float t[RUNS];
    TRY(cudaStreamCreate(&stream));
    TRY(cudaEventCreate(&from));
    TRY(cudaEventCreate(&to));
    TRY(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int l = 0; l < LAYERS; l++)
        TRY(kv_decode_dev(&a, c->q, c->k + l * c->layer, c->v + l * c->layer, c->out, c->lse, NULL, c->scratch,
                          stream));
    TRY(cudaStreamEndCapture(stream, &graph));
    TRY(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = -3; i < RUNS; i++) {
        TRY(cudaEventRecord(from, stream));
        TRY(cudaGraphLaunch(exec, stream));
        TRY(cudaEventRecord(to, stream));
        TRY(cudaEventSynchronize(to));
        if (i >= 0) TRY(cudaEventElapsedTime(&t[i], from, to));
    }
    TRY(cudaGraphExecDestroy(exec));
    TRY(cudaGraphDestroy(graph));
    TRY(cudaEventDestroy(from));
    TRY(cudaEventDestroy(to));
    TRY(cudaStreamDestroy(stream));
    qsort(t, RUNS, sizeof *t, by_value);
    return t[RUNS / 2];
}

int main(int argc, char **argv)
{
    char *end = NULL;
    unsigned long kept = argc > 1 ? strtoul(argv[1], &end, 10) : 1024;
    cudaDeviceProp p;
    if (argc > 2 || (end && (*end || end == argv[1])) || kept < 1 || kept > 131072) {
        fprintf(stderr, "usage: bench_decode [KEPT]   tokens a policy keeps, 1 to 131072 (default 1024)\n");
        return 2;
    }
    if (cudaGetDeviceProperties(&p, 0)) {
        fprintf(stderr, "bench_decode: no CUDA device\n");
        return 1;
    }
    /* as long as the device holds, up to 128k tokens */
    size_t free_bytes = 0, total = 0, token = 2ul * LAYERS * KV_HEADS * D * 2;
    TRY(cudaMemGetInfo(&free_bytes, &total));
    uint32_t most = 131072;
    while (most > 8192 && most * token > free_bytes / 10 * 9) most /= 2;

    cache c;
    c.layer = (size_t)most * KV_HEADS * D * 2;
    TRY(cudaMalloc(&c.k, LAYERS * c.layer));
    TRY(cudaMalloc(&c.v, LAYERS * c.layer));
    TRY(cudaMalloc(&c.q, HEADS * D * 2));
    TRY(cudaMalloc(&c.out, HEADS * D * 2));
    TRY(cudaMalloc(&c.lse, HEADS * 4));
    TRY(cudaMalloc(&c.scratch, 64ul << 20));
    fill<<<1024, 256>>>(LAYERS * c.layer / 4, (uint32_t *)c.k);
    fill<<<1024, 256>>>(LAYERS * c.layer / 4, (uint32_t *)c.v);
    fill<<<8, 256>>>(HEADS * D / 2, (uint32_t *)c.q);
    TRY(cudaDeviceSynchronize());

    printf("%s: decode attention of one token, %d layers, %d query heads on %d KV heads, d %d, bf16, batch 1,\n"
           "one CUDA graph a token, median of %d\n\n",
           p.name, LAYERS, HEADS, KV_HEADS, D, RUNS);
    float few = token_ms(&c, (uint32_t)kept);
    printf("%9s %10s %9s %12s %9s\n", "tokens", "ms/token", "GB/s", "kept tokens", "ratio");
    printf("%9lu %10.4f %9.0f %12s %9s\n", kept, few, kept * token / few / 1e6, "", "");
    for (uint32_t n = 8192; n <= most; n *= 2) {
        float full = token_ms(&c, n), again = token_ms(&c, (uint32_t)kept); /* beside each other */
        printf("%9u %10.4f %9.0f %12lu %8.1fx\n", n, full, n * token / full / 1e6, kept, full / again);
    }
    printf(
        "\nLeft out: the projections, the feed-forward and the head, which cost the same either way; the policy's own\n"
        "work; every layer and head keeps the same number; kept tokens lie in one piece.\n");
    return 0;
}
