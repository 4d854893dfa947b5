/* branches_ref.c - the definitions of attention of branches and of what compares them; see cuda.h. */
#include "kernels/cuda.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"

bool kv_attention_branches_ref(const kv_cuda_attn *a, const kv_cuda_branches *b, const float *q, const float *k,
                               const float *v, float *out, float *lse)
{
    size_t d = a->d, R = a->n_row, room = ((size_t)a->n_key + R) * d + 1;
    float *keys = malloc(room * sizeof *keys), *values = malloc(room * sizeof *values),
          *rows = malloc((R * d + 1) * sizeof *rows);
    bool ok = keys && values && rows;
    for (size_t i = 0; i < (size_t)b->n_branch * a->n_q_head && ok; i++) {
        size_t branch = i / a->n_q_head, head = i % a->n_q_head, kv = head / (a->n_q_head / a->n_kv_head);
        bool whole = b->first[i] == KV_WHOLE;
        size_t n = whole ? a->n_key : b->count[i], own = kv * b->own_head + branch * R * d;
        for (size_t j = 0; j < n; j++) {
            size_t at = kv * a->kv_head + (whole ? j : b->list[b->first[i] + j]) * a->kv_token;
            memcpy(keys + j * d, k + at, d * sizeof *keys);
            memcpy(values + j * d, v + at, d * sizeof *values);
        }
        memcpy(keys + n * d, (const float *)b->own_k + own, R * d * sizeof *keys);
        memcpy(values + n * d, (const float *)b->own_v + own, R * d * sizeof *values);
        for (size_t r = 0; r < R; r++)
            memcpy(rows + r * d, q + head * a->q_head + (branch * R + r) * a->q_row, d * sizeof *rows);
        kv_attn_shape s = {R, n + R, d, n, whole ? a->window : 0, a->scale, a->softcap};
        ok = kv_attention_ref(&s, rows, keys, values, out + head * a->out_head + branch * R * a->out_row, a->out_row,
                              lse + head * a->lse_head + branch * R, NULL);
    }
    free(keys), free(values), free(rows);
    return ok;
}

static double log_sum(size_t n, const float *l)
{
    double top = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) top = fmax(top, (double)l[i]);
    for (size_t i = 0; i < n; i++) sum += exp((double)l[i] - top);
    return log(sum) + top;
}

void kv_logit_rows_ref(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, kv_logit_row *out)
{
    for (size_t r = 0; r < n_row; r++, logits += n_vocab, out++) {
        out->lse = log_sum(n_vocab, logits);
        out->nll = (float)(out->lse - (double)logits[target[r]]);
        uint32_t have = 0;
        for (uint32_t i = 0; i < n_vocab; i++) {
            uint32_t k = have;
            while (k && logits[i] > logits[out->top[k - 1]]) k--;
            if (k == KV_TOP) continue;
            have += have < KV_TOP;
            memmove(out->top + k + 1, out->top + k, (have - k - 1) * sizeof *out->top);
            out->top[k] = i;
        }
        for (; have < KV_TOP; have++) out->top[have] = UINT32_MAX;
    }
}

void kv_logit_compare_ref(size_t n_row, size_t n_vocab, const float *logits, size_t first, size_t n_base,
                          const float *base, const kv_logit_row *said, const uint32_t *target, float *out)
{
    for (size_t r = 0; r < n_row; r++, logits += n_vocab, out += 4) {
        size_t which = (first + r) % n_base;
        const float *b = base + which * n_vocab;
        const kv_logit_row *full = said + which;
        double kl = 0;
        int common = 0;
        kv_logit_row own;
        kv_logit_rows_ref(1, n_vocab, logits, target + which, &own);
        for (size_t i = 0; i < n_vocab; i++)
            kl += exp((double)b[i] - full->lse) * (((double)b[i] - full->lse) - ((double)logits[i] - own.lse));
        for (int i = 0; i < KV_TOP; i++)
            for (int j = 0; j < KV_TOP; j++) common += own.top[i] == full->top[j] && own.top[i] != UINT32_MAX;
        out[0] = own.nll - full->nll;
        out[1] = kl <= 0 ? 0 : (float)kl;
        out[2] = own.top[0] == full->top[0];
        out[3] = (float)common / KV_TOP;
    }
}

void kv_row_distance_ref(size_t n_row, size_t n_base, size_t n_unit, size_t width, const float *base, const float *x,
                         float *out)
{
    for (size_t r = 0; r < n_row; r++) {
        double mean = 0;
        for (size_t u = 0; u < n_unit; u++) {
            const float *b = base + (r % n_base * n_unit + u) * width, *a = x + (r * n_unit + u) * width;
            double size = 0;
            for (size_t i = 0; i < width; i++) size += (double)b[i] * (double)b[i];
            if (size > 0) mean += sqrt(kv_diff_squares_ref(width, b, a, NULL) / size);
        }
        out[r] = (float)(mean / (double)n_unit);
    }
}
