/* expected - attention that later queries are expected to pay (Expected Attention, arXiv 2510.00636, kvpress
 * expected_attention_press.py; policies.md 8.1). Queries before RoPE are taken as normal with mean mu and covariance S,
 * both turned by the average rotation of the next n_future positions: z_i = scale <mu, k_i> + scale^2 / 2 k_i^T S k_i,
 * score_i = (mean over the group of softmax(z)_i + epsilon) |v_i| over the positions behind `sinks`, which score above
 * all others. mu and S come from the prompt's queries behind the sinks (divisor n), or for score=expected_stats from
 * files. scale is the trace's, 1/sqrt(d) in kvpress. */
#include <math.h>
#include <stdlib.h>

#include "sim/query_stats.h"
#include "sim/scorer.h"
#include "traces/npy.h"

/* The block of n doubles that belongs to (layer, head) of a file [layers, query heads, ...]; layers are those of the
 * trace, or all of the model. */
static kv_status file_rows(const kv_layer *l, const char *path, const char *what, uint32_t rank, kv_npy *a,
                           kv_error *err)
{
    const kv_trace_info *in = l->scene->info;
    kv_status st = kv_npy_read(path, a, err);
    if (st) return st;
    bool fits = a->rank == rank && (a->shape[0] == in->n_layer || a->shape[0] == in->n_layer_model) &&
                a->shape[1] == l->n_q_head;
    for (uint32_t i = 2; i < rank && fits; i++) fits = a->shape[i] == l->d;
    if (!fits)
        return kv_fail(err, KV_EFORMAT, "%s='%s': want an array [%u layers, %u query heads, %u%s]", what, path,
                       in->n_layer, l->n_q_head, l->d, rank == 4 ? ", head size again" : "");
    return kv_npy_to_f32(a, err);
}

static const float *block(const kv_layer *l, const kv_npy *a, size_t h, size_t n)
{
    size_t layer = a->shape[0] == l->scene->info->n_layer ? l->index : l->number;
    return (const float *)a->data + (layer * l->n_q_head + h) * n;
}

/* to[0..L-first) = probabilities of one query head; k = its keys from position `first` on. */
static kv_status head_probs(const kv_layer *l, const kv_spec *s, const double *mu, double *cov, size_t n,
                            const float *k, double *z, kv_error *err)
{
    size_t d = l->d, ld = kv_pad4(d);
    double max = -INFINITY, sum = 0;
    memset(z, 0, n * sizeof *z);
    if (s->use_covariance) {
        for (size_t i = 0; i < d; i++) /* k^T S k from the lower triangle */
            for (size_t j = 0; j < i; j++) cov[i * ld + j] += cov[j * ld + i];
        if (!kv_lower_forms(n, d, cov, k, false, z)) return kv_fail(err, KV_ENOMEM, "out of memory");
    }
    for (size_t i = 0; i < n; i++) {
        double dot = 0;
        for (size_t j = 0; j < d; j++) dot += mu[j] * k[i * d + j];
        z[i] = dot * l->scale + z[i] * l->scale * l->scale / 2;
        if (z[i] > max) max = z[i];
    }
    for (size_t i = 0; i < n; i++) sum += z[i] = kv_exp_below(z[i] - max);
    for (size_t i = 0; i < n; i++) z[i] /= sum;
    return KV_OK;
}

static kv_status run(kv_layer *l, const kv_spec *s, bool from_files, float *out, kv_error *err)
{
    size_t d = l->d, ld = kv_pad4(d), L = l->L, first = s->sinks < L ? s->sinks : L, n = L - first;
    kv_rotation rot = {0};
    kv_npy mean_file = {0}, cov_file = {0};
    float *q = NULL, *per_head = NULL;
    double *mu = NULL, *cov = NULL, *z = NULL;
    kv_status st = kv_rotation_open(l, from_files ? "expected_stats" : "expected", s->n_future, !from_files, &rot, err);
    if (!st && from_files) st = file_rows(l, s->mean_file, "mean", 3, &mean_file, err);
    if (!st && from_files && s->use_covariance) st = file_rows(l, s->cov_file, "cov", 4, &cov_file, err);
    if (!st) st = kv_array(&per_head, l->n_q_head * L, sizeof *per_head, err);
    if (!st && !from_files) st = kv_array(&q, n * d, sizeof *q, err);
    if (!st) st = kv_array(&mu, d, sizeof *mu, err);
    if (!st) st = kv_array(&cov, d * ld, sizeof *cov, err);
    if (!st) st = kv_array(&z, n, sizeof *z, err);
    for (size_t h = 0; h < l->n_q_head && !st && n; h++) {
        size_t kv = (h / l->group * l->scene->n_token + first) * d;
        if (from_files) {
            for (size_t j = 0; j < d; j++) mu[j] = block(l, &mean_file, h, d)[j];
            for (size_t i = 0; i < d && s->use_covariance; i++)
                for (size_t j = 0; j < d; j++) cov[i * ld + j] = block(l, &cov_file, h, d * d)[i * d + j];
        } else {
            kv_rotation_undo(&rot, l, (uint32_t)first, l->q_all + h * L * d, q);
            kv_mean_row(n, d, q, mu);
            memset(cov, 0, d * ld * sizeof *cov);
            if (s->use_covariance && !kv_gram(n, d, q, NULL, mu, cov)) st = kv_fail(err, KV_ENOMEM, "out of memory");
            for (size_t i = 0; i < d; i++)
                for (size_t j = 0; j <= i; j++) cov[j * ld + i] = cov[i * ld + j] /= (double)n;
        }
        kv_rotation_future(&rot, d, mu, s->use_covariance ? cov : NULL);
        if (!st) st = head_probs(l, s, mu, cov, n, l->k + kv, z, err);
        for (size_t i = 0; i < n && !st; i++) {
            double v2 = 0;
            for (size_t j = 0; j < d && s->use_vnorm; j++) v2 += (double)l->v[kv + i * d + j] * l->v[kv + i * d + j];
            per_head[h * L + first + i] = (float)(s->use_vnorm ? (z[i] + s->epsilon) * sqrt(v2) : z[i]);
        }
    }
    kv_spec plain = *s; /* the mean over the group, nothing smoothed */
    plain.group_reduce = KV_GROUP_MEAN, plain.pooling = KV_POOL_NONE;
    if (!st) st = kv_reduce_heads(l, &plain, L, per_head, out, err);
    if (!st) kv_raise_sinks(l, kv_unit_count(l, s->granularity), s->sinks, out);
    kv_rotation_close(&rot);
    kv_npy_free(&mean_file), kv_npy_free(&cov_file);
    free(q), free(per_head), free(mu), free(cov), free(z);
    return st;
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    if (s->mean_file || s->cov_file)
        return kv_fail(
            err, KV_EMISUSE,
            "policy '%s': mean= and cov= are read by score=expected_stats (kvpress.expected_attention_stats)",
            s->row->name);
    return run(l, s, false, out, err);
}

static kv_status score_stats(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    if (!s->mean_file || (s->use_covariance && !s->cov_file))
        return kv_fail(err, KV_EMISUSE, "policy '%s' needs mean=FILE.npy and, unless use_covariance=0, cov=FILE.npy",
                       s->row->name);
    return run(l, s, true, out, err);
}

const kv_scorer kv_scorer_expected = {"expected",
                                      "attention expected from normal queries of the prompt's mean and covariance",
                                      "sinks n_future use_covariance use_vnorm epsilon window",
                                      KV_NEED_QUERIES,
                                      false,
                                      false,
                                      score};
const kv_scorer kv_scorer_expected_stats = {"expected_stats",
                                            "the same with mean and covariance from files",
                                            "sinks n_future use_covariance use_vnorm epsilon mean cov window",
                                            0,
                                            false,
                                            false,
                                            score_stats};
