/* engine.c - what all engines share: dispatch, and the loss of given tokens. */
#include "capture/engine.h"

#include <math.h>

#include "kernels/isa.h"
#include "kernels/math.h"

kv_status kv_engine_run(kv_engine *e, const uint32_t *token, uint32_t n, const kv_engine_hook *hook, float *last_logits,
                        kv_error *err)
{
    return e->ops->run(e, token, n, hook, last_logits, err);
}

kv_status kv_engine_branches(kv_engine *e, const uint32_t *token, uint32_t row0, uint32_t n, uint32_t n_branch,
                             const kv_engine_hook *hook, kv_error *err)
{
    if (!e->ops->branches)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "this backend cannot run several continuations at once: use --backend cpu");
    return e->ops->branches(e, token, row0, n, n_branch, hook, err);
}

kv_status kv_engine_compare(kv_engine *e, const uint32_t *token, const uint32_t *target, uint32_t row0, uint32_t n,
                            uint32_t n_branch, const kv_branch_source *source, kv_branch_losses *out, kv_error *err)
{
    if (!e->ops->compare) return kv_fail(err, KV_EUNSUPPORTED, "this backend does not compare branches itself");
    return e->ops->compare(e, token, target, row0, n, n_branch, source, out, err);
}

uint32_t kv_engine_compare_room(kv_engine *e, uint32_t row0, uint32_t n)
{
    return e->ops->compare_room ? e->ops->compare_room(e, row0, n) : 2;
}

kv_status kv_engine_resize(kv_engine *e, uint32_t capacity, kv_error *err)
{
    if (!e->ops->resize) return kv_fail(err, KV_EUNSUPPORTED, "this engine keeps the size it was opened with");
    return e->ops->resize(e, capacity, err);
}

kv_engine_usage kv_engine_get_usage(const kv_engine *e)
{
    return e->ops->usage ? e->ops->usage(e) : (kv_engine_usage){.backend = "cpu"};
}

bool kv_engine_memory(const kv_engine *e, kv_trace_memory *out)
{
    return e->ops->memory && e->ops->memory(e, out);
}

void kv_engine_reset(kv_engine *e)
{
    e->ops->reset(e);
}

void kv_engine_close(kv_engine *e)
{
    if (e) e->ops->close(e);
}

/* 16 lanes, so that the loop has no chain of additions; which machine runs it makes no difference to the result. */
KV_INLINE double sum_exp(const float *l, uint32_t n, float top)
{
    double sum[16] = {0}, all = 0;
    uint32_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (uint32_t j = 0; j < 16; j++) sum[j] += (double)kv_expf(l[i + j] - top);
    for (; i < n; i++) all += (double)kv_expf(l[i] - top);
    for (uint32_t j = 0; j < 16; j++) all += sum[j];
    return all;
}

static double sum_exp_base(const float *l, uint32_t n, float top)
{
    return sum_exp(l, n, top);
}
KV_V3 static double sum_exp_v3(const float *l, uint32_t n, float top)
{
    return sum_exp(l, n, top);
}

void kv_nll_rows(uint32_t n_row, uint32_t n_vocab, const float *logits, const uint32_t *target, float *nll)
{
    for (uint32_t r = 0; r < n_row; r++) {
        const float *l = logits + (size_t)r * n_vocab;
        float top = l[0];
        for (uint32_t j = 1; j < n_vocab; j++) top = l[j] > top ? l[j] : top;
        double sum = KV_HAVE_V3 && kv_has_v3() ? sum_exp_v3(l, n_vocab, top) : sum_exp_base(l, n_vocab, top);
        nll[r] = (float)(log(sum) + (double)top - (double)l[target[r]]);
    }
}
