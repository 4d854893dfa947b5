/* scores.c - from attention rows to one number a position: rows of a window, smoothing, heads of a group (policies.md
 * 2.1 to 2.4). Plain loops: the fast versions are those of a device (exact_dev.h). */
#include "kernels/kernels.h"
#include "kernels/math.h"

#include <string.h>

void kv_reduce_rows(kv_row_reduce how, double gamma, size_t n_row, size_t n, const float *p, size_t ld, double *sum,
                    double *var, float *out)
{
    double w = (double)n_row;
    memset(sum, 0, n * sizeof *sum);
    memset(var, 0, n * sizeof *var);
    for (size_t r = 0; r < n_row; r++)
        for (size_t i = 0; i < n; i++) {
            double a = p[r * ld + i];
            if (how == KV_ROWS_MAX)
                sum[i] = a > sum[i] ? a : sum[i];
            else
                sum[i] += a;
        }
    for (size_t r = 0; r < n_row && how == KV_ROWS_MEAN_VAR; r++)
        for (size_t i = 0; i < n; i++) {
            double d = p[r * ld + i] - sum[i] / w;
            var[i] += d * d;
        }
    for (size_t i = 0; i < n; i++)
        out[i] = how == KV_ROWS_MEAN       ? (float)(sum[i] / w)
                 : how == KV_ROWS_MEAN_VAR ? (float)(sum[i] / w + (n_row > 1 ? gamma * (var[i] / (w - 1)) : 0))
                                           : (float)sum[i];
}

void kv_pool(kv_pooling pooling, size_t kernel, size_t n, float *x, float *tmp)
{
    size_t half = kernel / 2;
    if (pooling == KV_POOL_NONE || half == 0) return;
    memcpy(tmp, x, n * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        size_t a = i > half ? i - half : 0, b = i + half < n ? i + half : n - 1;
        double sum = 0;
        float max = tmp[a];
        for (size_t j = a; j <= b; j++) {
            sum += tmp[j];
            if (tmp[j] > max) max = tmp[j];
        }
        x[i] = pooling == KV_POOL_AVG ? (float)(sum / (double)kernel) : max;
    }
}

void kv_group_heads(const kv_grouping *g, size_t n, size_t ld, float *per_head, float *score, float *tmp)
{
    if (g->pool_first)
        for (size_t h = 0; h < g->n_q_head; h++) kv_pool(g->pooling, g->kernel, n, per_head + h * ld, tmp);
    for (size_t u = 0; u < g->n_unit; u++) {
        size_t count = g->reduce == KV_GROUP_ALL ? g->n_q_head : g->n_q_head / g->n_unit;
        size_t first = g->reduce == KV_GROUP_ALL ? 0 : u * count;
        for (size_t i = 0; i < n; i++) {
            double sum = 0;
            float max = per_head[first * ld + i];
            for (size_t h = first; h < first + count; h++) {
                float v = per_head[h * ld + i];
                sum += v;
                if (v > max) max = v;
            }
            score[u * ld + i] = g->reduce == KV_GROUP_MAX   ? max
                                : g->reduce == KV_GROUP_SUM ? (float)sum
                                                            : (float)(sum / (double)count);
        }
        if (!g->pool_first) kv_pool(g->pooling, g->kernel, n, score + u * ld, tmp);
    }
}

double kv_sum_blocks(size_t n, const double *x)
{
    double sum = 0;
    for (size_t b = 0; b < n; b += KV_SUM_BLOCK) {
        double lane[8] = {0};
        for (size_t i = b; i < n && i < b + KV_SUM_BLOCK; i++) lane[i % 8] += x[i];
        sum += kv_sum8(lane);
    }
    return sum;
}
