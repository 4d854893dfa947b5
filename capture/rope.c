/* rope.c - rotation frequencies with every scaling applied (Llama 3; YaRN: arXiv 2309.00071; longrope). */
#include "capture/arch.h"

#include <math.h>
#include <stdlib.h>

#define TWO_PI 6.283185307179586

/* What f is divided by: factor for long waves, 1 for short ones. Rounded to float, as GGUF files store it
 * (rope_freqs.weight), so that both containers give the same bits. */
static float llama3(const kv_rope_scaling *s, double f)
{
    double wave = TWO_PI / f, mix = (s->near_ctx / wave - s->low) / (s->high - s->low);
    mix = mix < 0 ? 0 : mix > 1 ? 1 : mix;
    return (float)(1 / ((1 - mix) / s->factor + mix));
}

/* The pair that turns `turns` times within the context before scaling. */
static double pair_of(const kv_rope_scaling *s, double turns, uint32_t dim)
{
    return dim * log(s->near_ctx / (turns * TWO_PI)) / (2 * log(s->theta));
}

static double yarn(const kv_rope_scaling *s, double f, uint32_t i, uint32_t dim)
{
    double low = pair_of(s, s->beta_fast, dim), high = pair_of(s, s->beta_slow, dim);
    if (!s->whole) low = floor(low), high = ceil(high);
    if (low < 0) low = 0;
    if (high > dim - 1) high = dim - 1;
    if (high - low < 0.001) high = low + 0.001;
    double ramp = (i - low) / (high - low);
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    return f / s->factor * ramp + f * (1 - ramp);
}

static bool make(const kv_rope_scaling *s, const float *factors, uint32_t dim, float *out)
{
    for (uint32_t i = 0; i < dim / 2; i++) {
        double f = pow(s->theta, -2.0 * i / dim);
        if (factors && !(isfinite(factors[i]) && factors[i] > 0)) return false;
        if (factors) f /= (double)factors[i];
        switch (s->kind) {
        case KV_ROPE_PLAIN: break;
        case KV_ROPE_LINEAR: f /= s->factor; break;
        case KV_ROPE_LLAMA3: f /= (double)llama3(s, f); break;
        case KV_ROPE_YARN: f = yarn(s, f, i, dim); break;
        }
        out[i] = (float)f;
        if (!isfinite(out[i])) return false;
    }
    return true;
}

kv_status kv_rope_make(kv_loader *l, const kv_rope_scaling *s, const char *keys)
{
    kv_model_desc *d = &l->m->desc;
    kv_rope_freqs *r = &d->rope[d->n_rope++];
    uint32_t half = d->rope_dim / 2;
    kv_status st = kv_array(&r->inv_freq, half, sizeof *r->inv_freq, l->err);
    if (!st && s->factors_far) st = kv_array(&r->inv_freq_far, half, sizeof *r->inv_freq_far, l->err);
    if (st) return st;
    r->theta = (float)s->theta, r->mscale = (float)s->mscale;
    r->n_near = s->near_ctx < UINT32_MAX ? (uint32_t)s->near_ctx : UINT32_MAX;
    if (!make(s, s->factors, d->rope_dim, r->inv_freq) ||
        (s->factors_far && !make(s, s->factors_far, d->rope_dim, r->inv_freq_far)) || !isfinite(r->mscale))
        return KV_BAD(l, KV_EFORMAT, "the RoPE frequencies are not finite (%s)", keys);
    return KV_OK;
}
