/* cuda_forward.c - the forward pass of model.h on a device, a chunk of rows at a time. Launches only: whatever goes
 * wrong on the device shows at the next synchronisation. */
#include "capture/cuda_engine.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "traces/cli.h"

static void *at(const void *p, size_t elements, size_t size)
{
    return (uint8_t *)p + elements * size;
}

static size_t q_width(const kv_model_desc *d)
{
    return (size_t)d->n_q_head * d->head_dim;
}

static size_t qkv_width(const kv_model_desc *d)
{
    return ((size_t)d->n_q_head + 2 * (size_t)d->n_kv_head) * d->head_dim;
}

/* Bytes of one element of gate and up: f32 where a bias must be added to `up` alone. */
static size_t gate_size(const kv_cuda *e)
{
    const kv_layer_weights *w = e->m->layer;
    return e->m->desc.gated && w->ffn && w->ffn->b_up ? sizeof(float) : e->size;
}

/* Projections and attention output live before the feed-forward does. */
size_t kv_cuda_work_bytes(const kv_cuda *e, uint32_t n)
{
    const kv_model_desc *d = &e->m->desc;
    size_t a = qkv_width(d) * sizeof(float) + q_width(d) * e->size;
    size_t b = (d->gated ? 2 : 1) * (size_t)d->ffn * gate_size(e) + d->ffn * e->size;
    size_t c = (n < KV_CUDA_LOGITS ? n : KV_CUDA_LOGITS) * (size_t)d->n_vocab * sizeof(float);
    size_t ab = n * (a > b ? a : b) + 1024;
    /* Logits in fewer rows rather than in more memory. */
    size_t least = (n < 16 ? n : 16) * (size_t)d->n_vocab * sizeof(float);
    return c <= ab ? ab : ab > least ? ab : least;
}

static int norm(const kv_model_desc *d, size_t n, size_t width, const float *x, size_t ld_x, const kv_cuda_norm *w,
                void *y, int bits, size_t ld_y, kv_gpu_stream s)
{
    if (d->norm == KV_NORM_LAYER) return kv_layernorm_dev(n, width, x, ld_x, w->w, w->b, d->norm_eps, y, bits, ld_y, s);
    return kv_rmsnorm_dev(n, width, x, ld_x, w->w, 0, d->norm_eps, y, bits, ld_y, s);
}

/* h = norm(x), or x where there is no norm. */
static int normed_input(kv_cuda *e, kv_cuda_gpu *v, uint32_t n, const float *x, const kv_cuda_norm *w, void *h)
{
    const kv_model_desc *d = &e->m->desc;
    if (!w->w) return kv_cast_dev((size_t)n * d->hidden, x, h, e->bits, NULL, v->run);
    return norm(d, n, d->hidden, x, d->hidden, w, h, e->bits, d->hidden, v->run);
}

/* x += residual_scale * (a w^T + bias), through post_norm when there is one; or x += weight * (a w^T + bias). */
static int add_product(kv_cuda *e, kv_cuda_gpu *v, uint32_t n, size_t k, const void *a, const void *w,
                       const float *bias, const kv_cuda_norm *post, const float *weight, size_t ld_weight, float *x)
{
    const kv_model_desc *d = &e->m->desc;
    size_t hidden = d->hidden;
    int g;

    if (!weight && !(post && post->w) && (!bias || d->residual_scale == 1)) {
        if ((g = kv_gpu_matmul(v->blas, n, hidden, k, e->bits, d->residual_scale, a, k, w, 32, x, hidden, true)))
            return g;
        return bias ? kv_add_dev(n, hidden, x, NULL, 32, hidden, bias, v->run) : 0;
    }
    if ((g = kv_gpu_matmul(v->blas, n, hidden, k, e->bits, 1, a, k, w, 32, v->tmp, hidden, false))) return g;
    if (bias && (g = kv_add_dev(n, hidden, v->tmp, NULL, 32, hidden, bias, v->run))) return g;
    if (weight) return kv_add_weighted_dev(n, hidden, x, v->tmp, weight, ld_weight, v->run);
    if (post && post->w && (g = norm(d, n, hidden, v->tmp, hidden, post, v->tmp, 32, hidden, v->run))) return g;
    return kv_add_weighted_dev(n, hidden, x, v->tmp, v->residual, 0, v->run);
}

/* Q, K and V of n rows whose normed input is v->h. */
static int project(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, uint32_t n, const kv_cuda_qkv *to)
{
    const kv_model_desc *d = &e->m->desc;
    const kv_cuda_layer *w = &e->layer[l];
    size_t hd = d->head_dim, nq = d->n_q_head, nk = d->n_kv_head, ld = qkv_width(d);
    bool all = d->qk_norm == KV_QK_NORM_ALL, head = d->qk_norm == KV_QK_NORM_HEAD;
    const float *rope = d->n_rope ? v->rope[d->layer_rope[l]] + (size_t)to->first * d->rope_dim : NULL;
    float *proj = v->work, *k = proj + nq * hd, *val = k + nk * hd;
    uint32_t *over = e->bits == 32 ? NULL : to->health + KV_HEALTH_OVER;
    int g;

    if ((g = kv_gpu_matmul(v->blas, n, ld, d->hidden, e->bits, 1, v->h, d->hidden, w->qkv, 32, proj, ld, false)))
        return g;
    if (all && w->q_norm.w && (g = norm(d, n, nq * hd, proj, ld, &w->q_norm, proj, 32, ld, v->run))) return g;
    if (all && w->k_norm.w && (g = norm(d, n, nk * hd, k, ld, &w->k_norm, k, 32, ld, v->run))) return g;
    if ((g = kv_heads_dev(n, nq, hd, proj, 32, ld, w->bq, head ? w->q_norm.w : NULL, 0, d->norm_eps, rope, d->rope_dim,
                          to->q, e->bits, to->q_head, over, v->run)))
        return g;
    if ((g = kv_heads_dev(n, nk, hd, k, 32, ld, w->bk, head ? w->k_norm.w : NULL, 0, d->norm_eps, rope, d->rope_dim,
                          to->k, e->bits, to->kv_head, over ? over + nq : NULL, v->run)))
        return g;
    return kv_heads_dev(n, nk, hd, val, 32, ld, w->bv, NULL, 0, 0, NULL, 0, to->v, e->bits, to->kv_head,
                        over ? over + nq + nk : NULL, v->run);
}

static kv_cuda_attn attention_shape(const kv_cuda *e, uint32_t l, uint32_t first, uint32_t n)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_attn a = {.n_q_head = d->n_q_head, .n_kv_head = d->n_kv_head, .d = d->head_dim, .n_row = n};
    a.row0 = e->n_past + first, a.n_key = a.row0 + n, a.window = d->window[l], a.scale = d->scale;
    a.softcap = d->softcap, a.bits = a.out_bits = e->bits, a.q_head = e->call_rows * (size_t)d->head_dim;
    a.q_row = d->head_dim, a.kv_head = e->o.capacity * (size_t)d->head_dim, a.kv_token = d->head_dim;
    a.out_head = d->head_dim, a.out_row = q_width(d), a.lse_head = e->call_rows;
    return a;
}

static int attend(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, kv_cuda_slot *s, uint32_t first, uint32_t n, void *out)
{
    const kv_cuda_layer *w = &e->layer[l];
    kv_cuda_attn a = attention_shape(e, l, first, n);
    const void *q = at(s->q, (size_t)first * a.d, e->size);
    float *stat = e->stat ? s->stat + 4 * (size_t)first : NULL;
    if (n == 1) return kv_decode_dev(&a, q, w->k, w->v, out, s->lse + first, stat, v->scratch, v->run);
    return kv_attention_dev(&a, q, w->k, w->v, out, s->lse + first, stat, v->run);
}

/* x += ffn(h) of one feed-forward; weight: of a row for this expert, else NULL. */
static int feed_forward(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, const kv_cuda_ffn *f, uint32_t n, const float *weight,
                        float *x)
{
    const kv_model_desc *d = &e->m->desc;
    size_t ffn = d->ffn, hidden = d->hidden, wide = gate_size(e);
    int bits = wide == e->size ? e->bits : 32, g;
    int act = d->act == KV_ACT_SILU ? KV_GATE_SILU : d->act == KV_ACT_GELU ? KV_GATE_GELU : KV_GATE_GELU_TANH;
    void *gate = v->work, *up = at(gate, n * ffn, wide), *inner = at(gate, n * ffn * (d->gated ? 2 : 1), wide);

    if (!d->gated) {
        if ((g = kv_gpu_matmul(v->blas, n, ffn, hidden, e->bits, 1, v->h, hidden, f->gate_up, bits, gate, ffn, false)))
            return g;
        g = kv_gate_dev(n, ffn, act, gate, NULL, bits, ffn, f->b_up, inner, e->bits, v->run);
    } else if (!f->b_up) {
        if ((g = kv_gpu_matmul(v->blas, n, 2 * ffn, hidden, e->bits, 1, v->h, hidden, f->gate_up, bits, gate, 2 * ffn,
                               false)))
            return g;
        g = kv_gate_dev(n, ffn, act, gate, at(gate, ffn, wide), bits, 2 * ffn, f->b_gate, inner, e->bits, v->run);
    } else {
        const void *w_up = at(f->gate_up, ffn * hidden, e->size);
        if ((g = kv_gpu_matmul(v->blas, n, ffn, hidden, e->bits, 1, v->h, hidden, f->gate_up, 32, gate, ffn, false)) ||
            (g = kv_gpu_matmul(v->blas, n, ffn, hidden, e->bits, 1, v->h, hidden, w_up, 32, up, ffn, false)) ||
            (g = kv_add_dev(n, ffn, up, NULL, 32, ffn, f->b_up, v->run)))
            return g;
        g = kv_gate_dev(n, ffn, act, gate, up, 32, ffn, f->b_gate, inner, e->bits, v->run);
    }
    if (g) return g;
    return add_product(e, v, n, ffn, inner, f->down, f->b_down, &e->layer[l].post_ffn_norm, weight, d->n_expert, x);
}

static int mixture(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, uint32_t n, float *x)
{
    const kv_model_desc *d = &e->m->desc;
    const kv_cuda_layer *w = &e->layer[l];
    int g;
    if ((g = kv_gpu_matmul(v->blas, n, d->n_expert, d->hidden, e->bits, 1, v->h, d->hidden, w->router, 32, v->expert,
                           d->n_expert, false)) ||
        (g = kv_router_dev(n, d->n_expert, d->n_expert_used, d->expert_norm, v->expert, v->run)))
        return g;
    for (uint32_t i = 0; i < d->n_expert && !g; i++) g = feed_forward(e, v, l, &w->ffn[i], n, v->expert + i, x);
    return g;
}

int kv_cuda_before(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, uint32_t n, const float *x, float *x_norm,
                   const kv_cuda_qkv *to)
{
    int g;
    if ((g = kv_length_dev(n, e->m->desc.hidden, x, x_norm, v->run)) ||
        (g = normed_input(e, v, n, x, &e->layer[l].attn_norm, v->h)))
        return g;
    return project(e, v, l, n, to);
}

void *kv_cuda_attended(const kv_cuda *e, const kv_cuda_gpu *v, uint32_t n)
{
    return at(v->work, n * qkv_width(&e->m->desc), sizeof(float));
}

int kv_cuda_after(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, uint32_t n, float *x)
{
    const kv_model_desc *d = &e->m->desc;
    const kv_cuda_layer *w = &e->layer[l];
    const void *out = kv_cuda_attended(e, v, n);
    int g;

    if (d->parallel && (g = normed_input(e, v, n, x, &w->ffn_norm, v->h))) return g;
    if ((g = add_product(e, v, n, q_width(d), out, w->wo, w->bo, &w->post_attn_norm, NULL, 0, x))) return g;
    if (!d->parallel && (g = normed_input(e, v, n, x, &w->ffn_norm, v->h))) return g;
    return d->n_expert ? mixture(e, v, l, n, x) : feed_forward(e, v, l, w->ffn, n, NULL, x);
}

int kv_cuda_layer_rows(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, kv_cuda_slot *s, uint32_t first, uint32_t n)
{
    const kv_model_desc *d = &e->m->desc;
    size_t hd = d->head_dim, row = e->n_past + first;
    float *x = v->x + (size_t)first * d->hidden;
    kv_cuda_qkv to = {.first = first,
                      .q = at(s->q, first * hd, e->size),
                      .k = at(e->layer[l].k, row * hd, e->size),
                      .v = at(e->layer[l].v, row * hd, e->size),
                      .q_head = e->call_rows * hd,
                      .kv_head = e->o.capacity * hd,
                      .health = s->health};
    int g;

    if ((g = kv_cuda_before(e, v, l, n, x, s->x_norm + first, &to)) ||
        (g = attend(e, v, l, s, first, n, kv_cuda_attended(e, v, n))))
        return g;
    return kv_cuda_after(e, v, l, n, x);
}

/* Sums over the rows before the first cut point, kept, then over the rest. */
int kv_cuda_column_sums(kv_cuda *e, kv_cuda_gpu *v, uint32_t l, kv_cuda_slot *s)
{
    uint32_t c = e->n_context, p = e->n_prompt;
    kv_cuda_attn a = attention_shape(e, l, 0, c);
    int g = kv_gpu_zero(s->sum, (size_t)a.n_q_head * p * sizeof *s->sum, v->run);
    if (g) return g;
    if (c && ((g = kv_colsum_dev(&a, s->q, e->layer[l].k, s->lse, s->sum, p, v->run)) ||
              (g = kv_planes_dev(a.n_q_head, c, s->sum, 64, p, (uint8_t *)s->sum_ctx, 32, false, v->run))))
        return g;
    if (c == p) return 0;
    a = attention_shape(e, l, c, p - c);
    return kv_colsum_dev(&a, at(s->q, (size_t)c * a.d, e->size), e->layer[l].k, s->lse + c, s->sum, p, v->run);
}

/* ------------------------------------------------------------------------------------------------ logits */
int kv_cuda_logit_rows(kv_cuda *e, kv_cuda_gpu *v, uint32_t first, uint32_t n, float *logits)
{
    const kv_model_desc *d = &e->m->desc;
    int g;

    if ((g = normed_input(e, v, n, v->x + (size_t)first * d->hidden, &v->out_norm, v->h)) ||
        (g = kv_gpu_matmul(v->blas, n, d->n_vocab, d->hidden, e->bits, d->logit_scale, v->h, d->hidden, v->output, 32,
                           logits, d->n_vocab, false)))
        return g;
    return d->final_softcap > 0 ? kv_softcap_dev((size_t)n * d->n_vocab, logits, d->final_softcap, v->run) : 0;
}

/* Logits of rows first.. of the call into `work`; their losses into nll when the next tokens are known. */
static int logit_block(kv_cuda *e, kv_cuda_gpu *v, uint32_t first, uint32_t n, bool losses)
{
    int g = kv_cuda_logit_rows(e, v, first, n, v->work);
    if (g || !losses) return g;
    return kv_nll_dev(n, e->m->desc.n_vocab, v->work, v->token + first + 1, v->nll + first, v->run);
}

uint32_t kv_cuda_logit_step(const kv_cuda *e, const kv_cuda_gpu *v)
{
    size_t most = v->work_bytes / (e->m->desc.n_vocab * sizeof(float));
    if (most > KV_CUDA_LOGITS) most = KV_CUDA_LOGITS;
    return (uint32_t)(most < e->chunk ? most : e->chunk);
}

static kv_status check_finite(const float *x, size_t n, kv_error *err)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(x[i]) <= FLT_MAX))
            return kv_fail(err, KV_EFORMAT,
                           "the logits are not finite: the model's weights are damaged, or too large for this dtype: "
                           "run with --dtype bf16 or f32");
    return KV_OK;
}

/* Does somebody want the logits of this row, or only its loss? */
static bool whole(const kv_engine_hook *hook, uint32_t row)
{
    return !hook->nll || !hook->wants_logits || hook->wants_logits(hook->ctx, row);
}

/* Blocks of logits of rows first .. end-1 to the device's queue, and behind them the copy of what is wanted. */
static int queue_rows(kv_cuda *e, kv_cuda_gpu *v, uint32_t first, uint32_t end, bool losses)
{
    size_t row_bytes = e->m->desc.n_vocab * sizeof(float);
    uint32_t step = kv_cuda_logit_step(e, v);
    int g = kv_gpu_event_record(v->logits_begun, v->run);
    for (uint32_t r = first; r < end && !g; r += step)
        g = logit_block(e, v, r, end - r < step ? end - r : step, losses);
    if (!g)
        g = losses ? kv_gpu_copy(e->nll_host, v->nll + first, (end - first) * sizeof(float), v->run)
                   : kv_gpu_copy(e->logits_host, v->work, (end - first) * row_bytes, v->run);
    return g ? g : kv_gpu_event_record(v->logits_done, v->run);
}

/* The end of the run of rows from r on of which the same is wanted: whole logits, at most a block of them, or losses.
 * The last row's next token is not known. */
static uint32_t run_end(const kv_cuda *e, const kv_engine_hook *hook, uint32_t r, uint32_t limit, bool *w)
{
    uint32_t end = r + 1, n = e->call_rows;
    *w = r == n - 1 || whole(hook, e->n_past + r);
    if (!*w) limit = n;
    while (end < n && end - r < limit && (end == n - 1 || whole(hook, e->n_past + end)) == *w) end++;
    return end;
}

/* The losses that a call begins with are computed while its last layer is recorded. */
int kv_cuda_begin_losses(kv_cuda *e, const kv_engine_hook *hook)
{
    kv_cuda_gpu *v = &e->dev[e->n_dev - 1];
    bool w = true;
    e->losses_begun = 0;
    if (!hook || !hook->logits) return 0;
    uint32_t end = run_end(e, hook, 0, 1, &w);
    int g = w ? 0 : kv_gpu_select(v->id);
    if (!w && !g) g = queue_rows(e, v, 0, end, true);
    if (!w && !g) e->losses_begun = end;
    return g;
}

kv_status kv_cuda_logits(kv_cuda *e, const kv_engine_hook *hook, float *last, kv_error *err)
{
    const kv_model_desc *d = &e->m->desc;
    kv_cuda_gpu *v = &e->dev[e->n_dev - 1];
    uint32_t n = e->call_rows, most = kv_cuda_logit_step(e, v), end;
    bool all = hook && hook->logits;
    size_t n_vocab = d->n_vocab;
    kv_status st;

    if (!all && !last) return KV_OK;
    if (most > e->logits_host_rows) most = e->logits_host_rows;
    if ((st = kv_cuda_check(v, kv_gpu_select(v->id), "the device", err))) return st;
    for (uint32_t r = all ? 0 : n - 1; r < n && !st; r = end) {
        bool w = true;
        double seconds = 0;
        end = all ? run_end(e, hook, r, most, &w) : n;
        if (kv_interrupted()) return kv_fail(err, KV_EINTERRUPTED, "stopped by a signal while computing logits");
        int g = r < e->losses_begun ? 0 : queue_rows(e, v, r, end, !w);
        if (!g) g = kv_gpu_event_sync(v->logits_done);
        if (!g) g = kv_gpu_event_seconds(v->logits_begun, v->logits_done, &seconds);
        e->compute_s += seconds;
        if ((st = kv_cuda_check(v, g, "the logits", err)) ||
            (st = check_finite(w ? e->logits_host : e->nll_host, w ? (end - r) * n_vocab : end - r, err)))
            break;
        if (all && w) st = hook->logits(hook->ctx, e->n_past + r, end - r, e->logits_host, err);
        if (all && !w) st = hook->nll(hook->ctx, e->n_past + r, end - r, e->nll_host, err);
        if (last && end == n) memcpy(last, e->logits_host + (end - r - 1) * n_vocab, n_vocab * sizeof *last);
    }
    e->losses_begun = 0;
    return st;
}
