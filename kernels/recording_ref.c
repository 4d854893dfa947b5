/* recording_ref.c - the definitions of the kernels of a capture; see gpu.h. */
#include "kernels/gpu.h"
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

void kv_planes_ref(size_t n_head, size_t n, const float *src, size_t src_head, uint8_t *dst, int bits, bool split)
{
    size_t size = bits == 32 ? 4 : 2;
    for (size_t h = 0; h < n_head; h++, dst += n * size) {
        kv_pack_ref(bits, n, src + h * src_head, dst);
        for (size_t i = 0; !split && i < n; i++) { /* one element after the other */
            uint8_t one[4];
            kv_pack_ref(bits, 1, src + h * src_head + i, one);
            memcpy(dst + i * size, one, size);
        }
    }
}

void kv_nll_ref(size_t n_row, size_t n_vocab, const float *logits, const uint32_t *target, float *nll)
{
    for (size_t r = 0; r < n_row; r++, logits += n_vocab) {
        double top = -INFINITY, sum = 0;
        for (size_t i = 0; i < n_vocab; i++) top = fmax(top, (double)logits[i]);
        for (size_t i = 0; i < n_vocab; i++) sum += exp((double)logits[i] - top);
        nll[r] = (float)(log(sum) + top - (double)logits[target[r]]);
    }
}

void kv_router_ref(size_t n_row, size_t n_expert, size_t used, bool norm, float *weight)
{
    for (float *w = weight; w < weight + n_row * n_expert; w += n_expert) {
        double sum = 0, kept = 0;
        float least = INFINITY; /* the last chosen */
        size_t least_at = 0;
        for (size_t i = 0; i < n_expert; i++) sum += exp((double)w[i]);
        for (size_t u = 0; u < used; u++) {
            size_t best = n_expert;
            for (size_t i = 0; i < n_expert; i++)
                if ((w[i] < least || (w[i] == least && i > least_at)) && (best == n_expert || w[i] > w[best])) best = i;
            least = w[best], least_at = best;
            kept += exp((double)least) / sum;
        }
        for (size_t i = 0; i < n_expert; i++) {
            bool in = w[i] > least || (w[i] == least && i <= least_at);
            w[i] = in ? (float)(exp((double)w[i]) / sum / (norm ? kept : 1)) : 0;
        }
    }
}

void kv_map_ref(const kv_gpu_map *m, const float *q, const float *k, const float *lse, float *p)
{
    for (size_t h = m->head_first; h < m->head_first + m->n_head; h++)
        for (size_t r = 0; r < m->n_row; r++)
            for (size_t j = 0; j < m->width; j++) {
                size_t at = m->row0 + r;
                double s = 0;
                bool seen = j <= at && (!m->window || at - j < m->window);
                for (size_t c = 0; seen && c < m->d; c++)
                    s += (double)q[h * m->q_head + r * m->d + c] * (double)k[h / m->group * m->kv_head + j * m->d + c];
                s *= (double)m->scale;
                if (m->softcap > 0) s = (double)m->softcap * tanh(s / (double)m->softcap);
                *p++ = seen ? (float)exp(s - (double)lse[h * m->lse_head + r]) : 0;
            }
}
