/* load.c - from a description and a store to weights: every role's tensor is found, compared with the description, cut
 * into matrices (kv_tensor) and, for KV_WEIGHTS_F32, expanded. Vectors are always expanded: a vector is a matrix of one
 * column here, so that cutting and reordering are the same thing for a weight and its bias. */
#include "capture/arch.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels/parallel.h"

/* One matrix or vector to expand. */
typedef struct {
    kv_tensor t;
    kv_tensor *matrix; /* gets the floats, or NULL */
    float **vector;    /* gets them, or NULL */
    size_t arena_at;
    bool plus_one;
} job;

typedef struct {
    kv_loader *l;
    size_t dim[KV_D_COUNT];
    job *job;
    size_t n_job, cap;
    size_t n_float;
} planner;

static const char *const gguf_dims[KV_D_COUNT] = {
    "",
    "embedding_length",
    "feed_forward_length",
    "the vocabulary",
    "context_length",
    "attention.head_count x key_length",
    "attention.head_count_kv x key_length",
    "key_length",
    "key_length",
    "expert_count",
};
static const char *const hf_dims[KV_D_COUNT] = {
    "",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "num_attention_heads x head_dim",
    "num_key_value_heads x head_dim",
    "head_dim",
    "head_dim",
    "the number of experts",
};

#define NAME(l, i) kv_show(kv_store_at((l)->m->store, i)->name.p, kv_store_at((l)->m->store, i)->name.n).s

/* ------------------------------------------------------------------------------------------------ planning */
/* Tensor i of the store has rows x cols (x depth) elements of a type that can be expanded. */
static kv_status check_shape(const planner *p, uint32_t i, size_t rows, size_t cols, size_t depth, kv_dim rows_are,
                             kv_dim cols_are)
{
    kv_loader *l = p->l;
    const kv_stored *s = kv_store_at(l->m->store, i);
    const char *const *says = l->hf ? hf_dims : gguf_dims;
    if (s->ne[0] != cols || s->ne[1] != rows || s->ne[2] != depth || s->ne[3] != 1)
        return KV_BAD(l, KV_EFORMAT,
                      "tensor '%s' has shape [%llu, %llu, %llu, %llu] where the %s asks for [%zu, %zu, %zu] (%s%s%s)",
                      NAME(l, i), (unsigned long long)s->ne[0], (unsigned long long)s->ne[1],
                      (unsigned long long)s->ne[2], (unsigned long long)s->ne[3], l->hf ? "config.json" : "metadata",
                      cols, rows, depth, says[cols_are], rows_are ? ", " : "", says[rows_are]);
    if (!s->quant->expand)
        return KV_BAD(l, KV_EUNSUPPORTED, "tensor '%s' has type %s, which is not supported (%s are)", NAME(l, i),
                      s->quant->name, kv_quant_supported());
    l->used[i] = 1;
    return KV_OK;
}

/* Note a part of tensor i: rows `first` .. of it, straight. */
static kv_tensor part_of(const planner *p, uint32_t i, size_t first, size_t rows, size_t cols)
{
    const kv_stored *s = kv_store_at(p->l->m->store, i);
    return (kv_tensor){.rows = (uint32_t)rows,
                       .cols = (uint32_t)cols,
                       .type = s->quant,
                       .row_bytes = cols / s->quant->block * s->quant->bytes,
                       .stored = i,
                       .first = (uint32_t)first,
                       .group = (uint32_t)rows,
                       .stride = (uint32_t)rows};
}

static kv_status add_job(planner *p, kv_tensor t, kv_tensor *matrix, float **vector, bool plus_one)
{
    size_t n;
    if (matrix) *matrix = t;
    if (p->n_job == p->cap) {
        size_t cap = p->cap ? 2 * p->cap : 256;
        job *more = realloc(p->job, cap * sizeof *more);
        if (!more) return kv_fail(p->l->err, KV_ENOMEM, "out of memory for a list of tensors");
        p->job = more, p->cap = cap;
    }
    p->job[p->n_job++] =
        (job){.t = t, .matrix = matrix, .vector = vector, .arena_at = p->n_float, .plus_one = plus_one};
    /* every tensor starts on a 64-byte line */
    if (!kv_mul(t.rows, t.cols, &n) || !kv_add(n, 15, &n) || !kv_add(p->n_float, n & ~(size_t)15, &p->n_float))
        return KV_BAD(p->l, KV_EFORMAT, "the size of tensor '%s' overflows", NAME(p->l, t.stored));
    return KV_OK;
}

/* A part of tensor i as the weight of a role: rows (elements of a vector) `first` .., with what the role and the
 * architecture say about their order. */
static kv_status add_part(planner *p, kv_role role, uint32_t i, size_t first, void *base)
{
    const kv_role_row *r = &kv_role_table[role];
    const kv_loader *l = p->l;
    bool vector = r->rows == KV_D_1;
    size_t rows = vector ? p->dim[r->cols] : p->dim[r->rows], cols = vector ? 1 : p->dim[r->cols];
    kv_tensor t = part_of(p, i, first, rows, cols);
    void *to = (char *)base + r->field;
    uint32_t hd = l->m->desc.head_dim;

    if (vector && t.type->block != 1)
        return KV_BAD(l, KV_EUNSUPPORTED, "tensor '%s' has type %s, which is not supported for a vector", NAME(l, i),
                      t.type->name);
    if (r->heads && !l->hf && l->arch->flags & KV_ARCH_PAIRED) t.paired = true, t.group = t.stride = hd;
    if (l->hf && l->arch->flags & KV_ARCH_TURNED && !vector && role >= KV_R_Q) t.turned = true;
    if (l->hf && l->arch->flags & KV_ARCH_QKV_BY_HEAD && role >= KV_R_Q && role <= KV_R_BV) {
        uint32_t which = (uint32_t)(role - (vector ? KV_R_BQ : KV_R_Q));
        t.first = which * hd, t.group = hd, t.stride = 3 * hd;
    }
    return add_job(p, t, vector ? NULL : to, vector ? to : NULL,
                   r->unit && l->hf && l->arch->flags & KV_ARCH_UNIT_NORM);
}

/* The tensor of a role, alone in its tensor. */
static kv_status plan_role(planner *p, kv_role role, uint32_t layer, uint32_t expert, void *base, bool required)
{
    const kv_role_row *r = &kv_role_table[role];
    kv_loader *l = p->l;
    char name[128];
    uint32_t i = kv_loader_find(l, role, layer, expert, name);
    if (i == KV_NONE) return required ? KV_BAD(l, KV_EFORMAT, "tensor '%s' is missing", name) : KV_OK;
    bool turned = l->hf && l->arch->flags & KV_ARCH_TURNED && r->rows != KV_D_1 && role >= KV_R_Q;
    kv_dim rows = turned ? r->cols : r->rows, cols = turned ? r->rows : r->cols;
    kv_status st = check_shape(p, i, p->dim[rows], p->dim[cols], 1, rows, cols);
    return st ? st : add_part(p, role, i, 0, base);
}

/* Q, K and V (or their biases) out of one tensor. */
static kv_status plan_fused_qkv(planner *p, kv_role fused, kv_role first, uint32_t i, kv_layer_weights *w)
{
    kv_loader *l = p->l;
    size_t nq = p->dim[KV_D_Q], nk = p->dim[KV_D_KV], all = nq + 2 * nk, hidden = p->dim[KV_D_HIDDEN];
    bool vector = fused == KV_R_BQKV, turned = l->hf && l->arch->flags & KV_ARCH_TURNED;
    size_t rows = vector ? 1 : turned ? hidden : all, cols = vector || turned ? all : hidden;
    kv_status st = check_shape(p, i, rows, cols, 1, KV_D_Q, KV_D_HIDDEN);
    if (!st && l->hf && l->arch->flags & KV_ARCH_QKV_BY_HEAD && nq != nk)
        st = KV_BAD(l, KV_EUNSUPPORTED, "tensor '%s': fused heads with fewer KV heads are not supported", NAME(l, i));
    if (!st) st = add_part(p, first, i, 0, w);
    if (!st) st = add_part(p, first + 1, i, nq, w);
    return st ? st : add_part(p, first + 2, i, nq + nk, w);
}

static kv_status plan_attention(planner *p, uint32_t n, kv_layer_weights *w)
{
    kv_loader *l = p->l;
    char name[128];
    kv_status st = KV_OK;
    bool biased = l->arch->flags & KV_ARCH_QKV_BIAS;
    uint32_t qkv = kv_loader_find(l, KV_R_QKV, n, 0, name), bqkv = kv_loader_find(l, KV_R_BQKV, n, 0, name);
    if (qkv != KV_NONE) {
        if ((st = plan_fused_qkv(p, KV_R_QKV, KV_R_Q, qkv, w)) ||
            (bqkv != KV_NONE && (st = plan_fused_qkv(p, KV_R_BQKV, KV_R_BQ, bqkv, w))))
            return st;
        if (biased && bqkv == KV_NONE) return KV_BAD(l, KV_EFORMAT, "tensor '%s' is missing", name);
    } else {
        for (int r = KV_R_Q; r <= KV_R_V && !st; r++) st = plan_role(p, (kv_role)r, n, 0, w, true);
        for (int r = KV_R_BQ; r <= KV_R_BV && !st; r++) st = plan_role(p, (kv_role)r, n, 0, w, biased);
    }
    for (int r = KV_R_Q_NORM; r <= KV_R_K_NORM && !st && l->m->desc.qk_norm; r++)
        st = plan_role(p, (kv_role)r, n, 0, w, true);
    if (!st) st = plan_role(p, KV_R_O, n, 0, w, true);
    return st ? st : plan_role(p, KV_R_BO, n, 0, w, false);
}

/* gate and up out of one tensor of twice the rows. */
static kv_status plan_gate_up(planner *p, uint32_t i, kv_ffn *f)
{
    kv_status st = check_shape(p, i, 2 * p->dim[KV_D_FFN], p->dim[KV_D_HIDDEN], 1, KV_D_FFN, KV_D_HIDDEN);
    if (!st) st = add_part(p, KV_R_GATE, i, 0, f);
    return st ? st : add_part(p, KV_R_UP, i, p->dim[KV_D_FFN], f);
}

static kv_status plan_dense(planner *p, uint32_t n, kv_ffn *f)
{
    kv_loader *l = p->l;
    char name[128];
    uint32_t both = kv_loader_find(l, KV_R_GATE_UP, n, 0, name);
    bool fused = l->m->desc.gated && both != KV_NONE && kv_loader_find(l, KV_R_GATE, n, 0, name) == KV_NONE;
    kv_status st = KV_OK;
    if (fused)
        st = plan_gate_up(p, both, f);
    else
        for (int r = l->m->desc.gated ? KV_R_GATE : KV_R_UP; r <= KV_R_UP && !st; r++)
            st = plan_role(p, (kv_role)r, n, 0, f, true);
    if (!st) st = plan_role(p, KV_R_DOWN, n, 0, f, true);
    for (int r = KV_R_B_GATE; r <= KV_R_B_DOWN && !st; r++) st = plan_role(p, (kv_role)r, n, 0, f, false);
    return st;
}

/* Expert weights: one tensor for all experts of a layer, or one for each. */
static kv_status plan_experts(planner *p, uint32_t n, kv_ffn *f)
{
    kv_loader *l = p->l;
    uint32_t n_expert = l->m->desc.n_expert;
    char name[128];
    for (int k = 0; k < 3; k++) {
        kv_role all = KV_R_EXPERTS_GATE + (kv_role)k, one = KV_R_EXPERT_GATE + (kv_role)k;
        const kv_role_row *r = &kv_role_table[all];
        uint32_t i = kv_loader_find(l, all, n, 0, name);
        kv_status st = KV_OK;
        if (i != KV_NONE && (uint64_t)n_expert * p->dim[r->rows] > UINT32_MAX)
            st = KV_BAD(l, KV_EUNSUPPORTED, "tensor '%s' has more than %u rows", NAME(l, i), UINT32_MAX);
        else if (i != KV_NONE)
            st = check_shape(p, i, p->dim[r->rows], p->dim[r->cols], n_expert, r->rows, r->cols);
        for (uint32_t e = 0; e < n_expert && !st; e++)
            st = i == KV_NONE ? plan_role(p, one, n, e, &f[e], true) : add_part(p, all, i, e * p->dim[r->rows], &f[e]);
        if (st) return st;
    }
    return KV_OK;
}

static kv_status plan_layer(planner *p, uint32_t n, kv_layer_weights *w)
{
    const kv_model_desc *d = &p->l->m->desc;
    unsigned flags = p->l->arch->flags;
    bool pre = !(flags & KV_ARCH_NO_PRE_NORM), post = flags & KV_ARCH_POST_NORM, bias = d->norm == KV_NORM_LAYER;
    kv_status st = KV_OK;
    if ((pre && (st = plan_role(p, KV_R_ATTN_NORM, n, 0, w, true))) ||
        (pre && bias && (st = plan_role(p, KV_R_ATTN_NORM_B, n, 0, w, true))) || (st = plan_attention(p, n, w)) ||
        (post && (st = plan_role(p, KV_R_POST_ATTN_NORM, n, 0, w, true))) ||
        (pre && (st = plan_role(p, KV_R_FFN_NORM, n, 0, w, true))) ||
        (pre && bias && (st = plan_role(p, KV_R_FFN_NORM_B, n, 0, w, true))) ||
        (post && (st = plan_role(p, KV_R_POST_FFN_NORM, n, 0, w, true))))
        return st;
    if (!d->n_expert) return plan_dense(p, n, w->ffn);
    st = plan_role(p, KV_R_ROUTER, n, 0, w, true);
    return st ? st : plan_experts(p, n, w->ffn);
}

static kv_status plan_all(planner *p)
{
    kv_loader *l = p->l;
    kv_model *m = l->m;
    const kv_model_desc *d = &m->desc;
    size_t n_ffn = d->n_expert ? d->n_expert : 1;
    bool all = d->qk_norm == KV_QK_NORM_ALL;
    kv_status st;
    if ((st = kv_array(&m->layer, d->n_layer, sizeof *m->layer, l->err)) ||
        (st = kv_array(&m->ffns, d->n_layer * n_ffn, sizeof *m->ffns, l->err)))
        return st;
    p->dim[KV_D_1] = 1, p->dim[KV_D_HIDDEN] = d->hidden, p->dim[KV_D_FFN] = d->ffn, p->dim[KV_D_VOCAB] = d->n_vocab;
    p->dim[KV_D_CTX] = d->n_ctx, p->dim[KV_D_EXPERTS] = d->n_expert;
    p->dim[KV_D_Q] = (size_t)d->n_q_head * d->head_dim, p->dim[KV_D_KV] = (size_t)d->n_kv_head * d->head_dim;
    p->dim[KV_D_Q_NORM] = all ? p->dim[KV_D_Q] : d->head_dim, p->dim[KV_D_K_NORM] = all ? p->dim[KV_D_KV] : d->head_dim;
    if ((st = plan_role(p, KV_R_TOK_EMBD, 0, 0, m, true)) ||
        (l->arch->flags & KV_ARCH_POSITIONS && (st = plan_role(p, KV_R_POS_EMBD, 0, 0, m, true))) ||
        (st = plan_role(p, KV_R_OUT_NORM, 0, 0, m, true)) ||
        (d->norm == KV_NORM_LAYER && (st = plan_role(p, KV_R_OUT_NORM_B, 0, 0, m, true))) ||
        (!d->tied && (st = plan_role(p, KV_R_OUTPUT, 0, 0, m, true))))
        return st;
    for (uint32_t n = 0; n < d->n_layer; n++) {
        m->layer[n].ffn = m->ffns + n * n_ffn;
        if ((st = plan_layer(p, n, &m->layer[n]))) return st;
    }
    for (uint32_t i = 0; i < kv_store_count(m->store); i++)
        if (!l->used[i])
            return KV_BAD(l, KV_EUNSUPPORTED, "tensor '%s' is not one of an ordinary %s model of %u layers", NAME(l, i),
                          d->arch, d->n_layer);
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ expanding */
/* Rows first .. first+n-1 of a job: the unit of parallel work. */
typedef struct {
    const job *j;
    uint32_t first, n;
} part;

typedef struct {
    const kv_model *m;
    const part *parts;
    float *arena;
    pthread_mutex_t lock;
    size_t failed; /* the lowest part that failed: the same message whatever the threads */
    kv_status st;
    kv_error err;
} expansion;

static void expand_part(void *ctx, size_t i)
{
    expansion *x = ctx;
    const part *p = &x->parts[i];
    const job *j = p->j;
    float *to = x->arena + j->arena_at + (size_t)p->first * j->t.cols;
    kv_error err;
    kv_status st = kv_tensor_floats(x->m, &j->t, p->first, p->n, to, &err);
    for (size_t e = 0; !st && j->plus_one && e < (size_t)p->n * j->t.cols; e++) to[e] += 1;
    if (!st) return;
    pthread_mutex_lock(&x->lock);
    if (!x->st || i < x->failed) x->failed = i, x->st = st, x->err = err;
    pthread_mutex_unlock(&x->lock);
}

/* The wanted jobs, cut into parts of some 2^18 elements and whole groups. */
static kv_status cut_jobs(const planner *p, bool matrices, part **out, size_t *n_part)
{
    enum { PART = 1 << 18 };
    for (int pass = 0; pass < 2; pass++) {
        size_t n = 0;
        for (size_t i = 0; i < p->n_job; i++) {
            const job *j = &p->job[i];
            if (j->matrix && !matrices) continue;
            uint32_t step = PART / j->t.cols ? PART / j->t.cols : 1;
            if (j->t.group < j->t.rows) step = step < j->t.group ? j->t.group : step / j->t.group * j->t.group;
            for (uint32_t r = 0; r < j->t.rows; n++) {
                uint32_t count = j->t.rows - r < step ? j->t.rows - r : step;
                if (pass) (*out)[n] = (part){j, r, count};
                r += count;
            }
        }
        *n_part = n;
        kv_status st = pass ? KV_OK : kv_array(out, n, sizeof **out, p->l->err);
        if (st) return st;
    }
    return KV_OK;
}

static kv_status expand_all(planner *p, bool matrices, uint32_t threads)
{
    kv_loader *l = p->l;
    kv_model *m = l->m;
    size_t bytes, n_part;
    part *parts = NULL;
    if (!matrices) { /* close the gaps */
        p->n_float = 0;
        for (size_t i = 0; i < p->n_job; i++)
            if (p->job[i].vector) p->job[i].arena_at = p->n_float, p->n_float += (p->job[i].t.rows + 15u) & ~15u;
    }
    if (!kv_mul(p->n_float, sizeof(float), &bytes)) return KV_BAD(l, KV_EFORMAT, "the size of the weights overflows");
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    /* the kernel would grant it and kill the process later */
    if (pages > 0 && page > 0 && bytes / (size_t)page >= (size_t)pages)
        return KV_BAD(l, KV_ENOMEM, "the weights need %.1f GiB as f32, this machine has %.1f", (double)bytes / 0x1p30,
                      (double)pages * (double)page / 0x1p30);
    if (posix_memalign((void **)&m->arena, 64, bytes)) {
        m->arena = NULL;
        return KV_BAD(l, KV_ENOMEM, "out of memory for %.1f GiB of weights", (double)bytes / 0x1p30);
    }
    kv_status st = cut_jobs(p, matrices, &parts, &n_part);
    if (st) return st;
    expansion x = {.m = m, .parts = parts, .arena = m->arena, .lock = PTHREAD_MUTEX_INITIALIZER};
    kv_parallel(n_part, threads, expand_part, &x);
    free(parts);
    if (x.st && l->err) *l->err = x.err;
    for (size_t i = 0; i < p->n_job; i++) {
        const job *j = &p->job[i];
        if (j->vector) *j->vector = m->arena + j->arena_at;
        if (j->matrix && matrices) j->matrix->f32 = m->arena + j->arena_at;
    }
    return x.st;
}

kv_status kv_load_weights(kv_loader *l, kv_weights weights, uint32_t threads)
{
    planner p = {.l = l};
    kv_status st = plan_all(&p);
    if (!st && weights != KV_WEIGHTS_NONE) st = expand_all(&p, weights == KV_WEIGHTS_F32, threads);
    if (!st && l->m->desc.tied) l->m->output = l->m->tok_embd;
    free(p.job);
    return st;
}
