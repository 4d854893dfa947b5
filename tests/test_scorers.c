/* test_scorers.c - every scorer with arithmetic of its own against a twin of plain double loops, on seeded tiny layers
 * of odd shapes. */
#include <unistd.h>

#include "kernels/kernels.h"
#include "sim/plan.h"
#include "sim/query_stats.h"
#include "sim/scorer.h"
#include "tests/check.h"
#include "tests/tiny.h"
#include "traces/npy.h"

static char dir[] = "/tmp/kvtest.XXXXXX";

/* ------------------------------------------------------------------------------------- layers without a file */
typedef struct {
    kv_trace_info info;
    kv_scene scene;
    kv_layer l;
    float inv_freq[8];
} box;

static float *rows(const float *from, size_t n_head, size_t n_token, size_t a, size_t b, size_t d)
{
    float *to = malloc(n_head * (b - a) * d * sizeof *to + 1);
    for (size_t h = 0; h < n_head; h++)
        memcpy(to + h * (b - a) * d, from + (h * n_token + a) * d, (b - a) * d * sizeof *to);
    return to;
}

/* A layer with L prompt tokens and a few decoded ones behind them, its own RoPE, and windows of up to 40 rows. The box
 * points into itself and must stay where it is. */
static void box_open(box *b, kv_rng *r, bool rope)
{
    static const uint32_t GROUPS[] = {1, 3, 8}, DIMS[] = {1, 2, 4, 6, 10, 16},
                          LENGTHS[] = {1, 2, 3, 5, 8, 9, 16, 17, 33, 48, 70, 100};
    uint32_t L = LENGTHS[kv_rng_next(r) % 12], d = DIMS[(rope ? 1 : 0) + kv_rng_next(r) % (rope ? 5 : 6)],
             n_kv = 1 + kv_rng_next(r) % 2;
    kv_tiny s = {1,     n_kv * GROUPS[kv_rng_next(r) % 3], n_kv,          d, L + (uint32_t)(kv_rng_next(r) % 3), L,
                 false, kv_rng_next(r) % 8 == 0,           kv_rng_next(r)};
    kv_tiny_data t = kv_tiny_make(&s);
    uint32_t w = L < 40 ? L : 40;
    *b = (box){.info = {.n_layer = 1,
                        .n_layer_model = 1,
                        .n_q_head = s.n_q_head,
                        .n_kv_head = n_kv,
                        .head_dim = d,
                        .n_token = s.n_token,
                        .n_prompt = L,
                        .rope_mscale = 1}};
    for (int j = 0; j < 8; j++) b->inv_freq[j] = 1.0f / (float)(1 + 3 * j);
    if (rope) {
        b->info.rope_theta = kv_rng_next(r) % 2 ? 10000 : 0;
        b->info.inv_freq = b->info.rope_theta > 0 ? NULL : b->inv_freq;
        b->info.rope_dim = d > 2 && kv_rng_next(r) % 2 ? d - 2 : 0;
        b->info.rope_mscale = kv_rng_next(r) % 2 ? 1 : 1.25f;
    }
    b->scene = (kv_scene){.info = &b->info,
                          .n_cut = L,
                          .n_prompt = L,
                          .row_first = L,
                          .n_row = s.n_token - L,
                          .n_token = s.n_token,
                          .n_evict = 1};
    b->l = (kv_layer){.scene = &b->scene,
                      .n_q_head = s.n_q_head,
                      .n_kv_head = n_kv,
                      .group = s.n_q_head / n_kv,
                      .d = d,
                      .L = L,
                      .scale = 1 / sqrtf((float)d),
                      .max_window = w,
                      .k = rows(t.k, n_kv, s.n_token, 0, s.n_token, d),
                      .v = rows(t.v, n_kv, s.n_token, 0, s.n_token, d),
                      .q_all = rows(t.q, s.n_q_head, s.n_token, 0, L, d),
                      .q_win = rows(t.q, s.n_q_head, s.n_token, L - w, L, d)};
    kv_tiny_free(&t);
}

static kv_status box_score(box *b, const char *policy, kv_spec *s, float **score, kv_error *e)
{
    kv_spec *list = NULL;
    size_t n = 0;
    kv_status st = kv_spec_parse(policy, &list, &n, e);
    if (st) return st;
    *s = list[0];
    free(list);
    *score = calloc((size_t)kv_unit_count(&b->l, s->granularity) * b->l.L + 1, sizeof **score);
    return kv_scorers[s->scorer]->score(&b->l, s, *score, e);
}

static const float *key(const kv_layer *l, size_t q_head, size_t i)
{
    return l->k + (q_head / l->group * l->scene->n_token + i) * l->d;
}

static const float *value(const kv_layer *l, size_t q_head, size_t i)
{
    return l->v + (q_head / l->group * l->scene->n_token + i) * l->d;
}

static double dot(size_t d, const float *a, const float *b)
{
    double s = 0;
    for (size_t j = 0; j < d; j++) s += (double)a[j] * b[j];
    return s;
}

static void soften(size_t n, double *x)
{
    double max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) max = fmax(max, x[i]);
    for (size_t i = 0; i < n; i++) sum += x[i] = exp(x[i] - max);
    for (size_t i = 0; i < n; i++) x[i] /= sum;
}

/* ------------------------------------------------------------------------------------- twins: one value per query head
 */
/* They fill want [n_q_head][L] (the harness averages over the heads of a unit); false = a decision hangs on the last
 * bits. */
typedef bool (*twin)(const kv_layer *l, const kv_spec *s, double *want);

static bool twin_keydiff(const kv_layer *l, const kv_spec *s, double *want)
{
    size_t d = l->d, L = l->L;
    (void)s;
    for (size_t h = 0; h < l->n_q_head; h++) {
        double a[16] = {0}, aa = 0;
        for (size_t i = 0; i < L; i++)
            for (size_t j = 0; j < d; j++)
                a[j] += key(l, h, i)[j] / sqrt(dot(d, key(l, h, i), key(l, h, i))) / (double)L;
        for (size_t j = 0; j < d; j++) aa += a[j] * a[j];
        if (aa < 1e-6) return false; /* directions that cancel */
        for (size_t i = 0; i < L; i++) {
            double x = 0;
            for (size_t j = 0; j < d; j++) x += a[j] * key(l, h, i)[j];
            want[h * L + i] = -x / sqrt(aa * dot(d, key(l, h, i), key(l, h, i)));
        }
    }
    return true;
}

static bool twin_cur(const kv_layer *l, const kv_spec *s, double *want)
{
    size_t d = l->d, L = l->L, w = s->local_window;
    for (size_t h = 0; h < l->n_q_head; h++) {
        double all = 0;
        for (size_t i = 0; i < L; i++) {
            double k = 0, v = 0;
            for (size_t j = i / w * w; j < i / w * w + w && j < L; j++)
                k += dot(d, key(l, h, j), key(l, h, j)), v += dot(d, value(l, h, j), value(l, h, j));
            all += want[h * L + i] =
                dot(d, key(l, h, i), key(l, h, i)) / k * dot(d, value(l, h, i), value(l, h, i)) / v;
        }
        for (size_t i = 0; i < L; i++) want[h * L + i] = i < s->sinks ? 1 : want[h * L + i] / all;
    }
    return true;
}

static bool twin_noncausal(const kv_layer *l, const kv_spec *s, double *want)
{
    size_t d = l->d, L = l->L, c = s->chunk_size;
    double *z = malloc(c * sizeof *z), *x = malloc(L * sizeof *x);
    for (size_t h = 0; h < l->n_q_head; h++) {
        memset(x, 0, L * sizeof *x);
        for (size_t r = 0; r < (L + c - 1) / c * c; r++) { /* rows and keys from L on are zero */
            size_t a = r / c * c;
            for (size_t j = 0; j < c; j++)
                z[j] = r < L && a + j < L ? dot(d, l->q_all + (h * L + r) * d, key(l, h, a + j)) : 0;
            soften(c, z);
            for (size_t j = 0; j < c && a + j < L; j++) x[a + j] += z[j];
        }
        for (size_t i = 0; i < L; i++) x[i] *= sqrt(dot(d, value(l, h, i), value(l, h, i)));
        for (size_t i = 0; i < L; i++) want[h * L + i] = (x[i] + (i ? x[i - 1] : 0) + (i + 1 < L ? x[i + 1] : 0)) / 3;
    }
    free(z), free(x);
    return true;
}

/* pre [n][d] = rows first.. before RoPE; R [d][d] = average rotation of the positions to come. */
static void unrotate(const kv_layer *l, size_t h, size_t first, uint32_t n_future, double *pre, double *R)
{
    const kv_trace_info *in = l->scene->info;
    size_t d = l->d, rot = in->rope_dim ? in->rope_dim : d, half = rot / 2;
    memset(R, 0, d * d * sizeof *R);
    for (size_t j = rot; j < d; j++) R[j * d + j] = 1;
    for (size_t j = 0; j < half; j++) {
        double f = in->inv_freq ? in->inv_freq[j] : pow(in->rope_theta, -2.0 * (double)j / (double)rot),
               m = in->rope_mscale;
        for (uint32_t t = l->L; t < l->L + n_future; t++) {
            double c = cos(t * f) * m / n_future, s = sin(t * f) * m / n_future;
            R[j * d + j] += c, R[(j + half) * d + j + half] += c, R[j * d + j + half] -= s, R[(j + half) * d + j] += s;
        }
        for (size_t t = first; t < l->L; t++) {
            const float *q = l->q_all + (h * l->L + t) * d;
            double c = cos((double)t * f) / m, s = sin((double)t * f) / m;
            pre[(t - first) * d + j] = q[j] * c + q[j + half] * s;
            pre[(t - first) * d + j + half] = q[j + half] * c - q[j] * s;
        }
    }
    for (size_t t = first; t < l->L; t++)
        for (size_t j = rot; j < d; j++) pre[(t - first) * d + j] = l->q_all[(h * l->L + t) * d + j];
}

/* mu [d] and S [d][d] of one head, before the average rotation. */
static void statistics(size_t n, size_t d, const double *pre, double *mu, double *S)
{
    memset(mu, 0, d * sizeof *mu), memset(S, 0, d * d * sizeof *S);
    for (size_t t = 0; t < n; t++)
        for (size_t j = 0; j < d; j++) mu[j] += pre[t * d + j] / (double)n;
    for (size_t t = 0; t < n; t++)
        for (size_t i = 0; i < d; i++)
            for (size_t j = 0; j < d; j++)
                S[i * d + j] += (pre[t * d + i] - mu[i]) * (pre[t * d + j] - mu[j]) / (double)n;
}

static bool twin_expected(const kv_layer *l, const kv_spec *s, double *want)
{
    size_t d = l->d, L = l->L, first = s->sinks < L ? s->sinks : L, n = L - first;
    double *pre = malloc(L * d * sizeof *pre), *z = malloc(L * sizeof *z), R[256], mu[16], S[256];
    for (size_t h = 0; h < l->n_q_head && n; h++) {
        unrotate(l, h, first, s->n_future, pre, R);
        statistics(n, d, pre, mu, S);
        for (size_t i = 0; i < n; i++) {
            const float *k = key(l, h, first + i);
            double turned[16], a = 0, b = 0; /* k^T R, so that k^T R S R^T k = turned S turned^T */
            for (size_t j = 0; j < d; j++) {
                turned[j] = 0;
                for (size_t m = 0; m < d; m++) turned[j] += k[m] * R[m * d + j];
                a += turned[j] * mu[j];
            }
            for (size_t j = 0; j < d * d; j++) b += turned[j / d] * S[j] * turned[j % d];
            z[i] = a / sqrt((double)d) + (s->use_covariance ? b / (double)d / 2 : 0);
        }
        soften(n, z);
        for (size_t i = 0; i < n; i++)
            want[h * L + first + i] =
                s->use_vnorm ? (z[i] + s->epsilon) * sqrt(dot(d, value(l, h, first + i), value(l, h, first + i)))
                             : z[i];
    }
    free(pre), free(z);
    return true;
}

/* x = M^-1 b by elimination; M [d][d] is destroyed. */
static void solve(size_t d, double *M, double *x)
{
    for (size_t j = 0; j < d; j++)
        for (size_t i = j + 1; i < d; i++) {
            double f = M[i * d + j] / M[j * d + j];
            for (size_t k = j; k < d; k++) M[i * d + k] -= f * M[j * d + k];
            x[i] -= f * x[j];
        }
    for (size_t i = d; i-- > 0; x[i] /= M[i * d + i])
        for (size_t k = i + 1; k < d; k++) x[i] -= M[i * d + k] * x[k];
}

static bool twin_capkv(const kv_layer *l, const kv_spec *s, double *want)
{
    size_t d = l->d, L = l->L, first = s->sinks < L ? s->sinks : L, n = L - first;
    double *pre = malloc(L * d * sizeof *pre), *w = malloc(L * sizeof *w), R[256], mu[16], S[256], M[256], N[256];
    for (size_t h = 0; h < l->n_q_head && n; h++) {
        double anchor[16] = {0}, aa = 0, max = -INFINITY;
        unrotate(l, h, first, s->n_future, pre, R);
        statistics(n, d, pre, mu, S);
        for (size_t j = 0; j < d * d; j++) anchor[j / d] += R[j] * mu[j % d];
        for (size_t j = 0; j < d; j++) aa += anchor[j] * anchor[j];
        for (size_t i = 0; i < n; i++) {
            const float *k = key(l, h, first + i);
            w[i] = 0;
            for (size_t j = 0; j < d; j++) w[i] += k[j] * anchor[j] / sqrt(aa * dot(d, k, k));
            max = fmax(max, w[i] *= s->tau);
        }
        for (size_t j = 0; j < d * d; j++) M[j] = j / d == j % d;
        for (size_t i = 0; i < n; i++) {
            const float *v = value(l, h, first + i);
            w[i] = exp(w[i] - max);
            for (size_t j = 0; j < d * d; j++) M[j] += (w[i] + s->epsilon) * v[j / d] * v[j % d];
        }
        for (size_t i = 0; i < n; i++) {
            const float *v = value(l, h, first + i);
            double x[16], sum = 0;
            for (size_t j = 0; j < d; j++) x[j] = v[j];
            memcpy(N, M, sizeof N);
            solve(d, N, x);
            for (size_t j = 0; j < d; j++) sum += v[j] * x[j];
            want[h * L + first + i] = w[i] * sum;
        }
    }
    free(pre), free(w);
    return true;
}

/* Of a key, with R-KV's floor, which a key of one small element shows. */
static double length(const kv_layer *l, size_t h, size_t i)
{
    return sqrt(dot(l->d, key(l, h, i), key(l, h, i))) + 1e-8;
}

static bool twin_rkv(const kv_layer *l, const kv_spec *s, double *want)
{
    size_t d = l->d, L = l->L, w = s->window < L ? s->window : L, n = L - w;
    double *z = malloc(L * sizeof *z), *att = malloc(L * sizeof *att), *red = malloc(L * sizeof *red);
    bool clear = true;
    for (size_t h = 0; h < l->n_q_head && n; h++) {
        memset(att, 0, L * sizeof *att), memset(red, 0, L * sizeof *red);
        for (size_t r = 0; r < w; r++) {
            for (size_t i = 0; i < n; i++) {
                z[i] = -INFINITY;
                for (size_t g = h / l->group * l->group; g < (h / l->group + 1) * l->group; g++)
                    z[i] = fmax(z[i], dot(d, l->q_all + (g * L + n + r) * d, key(l, h, i)) / sqrt((double)d));
            }
            soften(n, z);
            for (size_t i = 0; i < n; i++) att[i] += z[i] / (double)w;
        }
        for (size_t i = 0; i < L; i++) {
            size_t retain = 0;
            for (size_t j = 0; j < L; j++) {
                z[j] = i == j ? 0 : dot(d, key(l, h, i), key(l, h, j)) / (length(l, h, i) * length(l, h, j));
                if (fabs(z[j] - 0.5) < 1e-5) clear = false;
                if (z[j] > 0.5 && !s->retain_direction) retain = j;
            }
            z[retain] = 0;
            for (size_t j = 0; j < L; j++) red[j] += z[j] / (double)L;
        }
        soften(L, red);
        for (size_t i = 0; i < n; i++) {
            double top = -INFINITY;
            for (size_t j = i > s->kernel / 2 ? i - s->kernel / 2 : 0; j <= i + s->kernel / 2 && j < n; j++)
                top = fmax(top, att[j]);
            want[h * L + i] = s->mix_lambda * top - (1 - s->mix_lambda) * red[i];
        }
    }
    free(z), free(att), free(red);
    return clear;
}

/* ------------------------------------------------------------------------------------- the comparison */
enum { PLAIN, RAISED, Z_SCORED };

static void standardise(size_t n, double *x)
{
    double mean = 0, var = 0;
    for (size_t i = 0; i < n; i++) mean += x[i] / (double)n;
    for (size_t i = 0; i < n; i++) var += (x[i] - mean) * (x[i] - mean) / ((double)n - 1);
    for (size_t i = 0; i < n; i++) x[i] = n > 1 ? (x[i] - mean) / fmax(sqrt(var), 1e-6) : 0;
}

/* Positions whose score is off; -1 = not comparable. `tol` is relative to the largest score of the layer. */
static int disagree(const kv_layer *l, const kv_spec *s, const float *got, twin of, int kind, double tol)
{
    size_t L = l->L, U = kv_unit_count(l, s->granularity),
           n = kv_scorers[s->scorer]->windowed ? L - (s->window < L ? s->window : L) : L;
    double *per_head = calloc(l->n_q_head * L + 1, sizeof *per_head), *want = calloc(U * L + 1, sizeof *want), top = 0,
           above = INFINITY;
    int bad = of(l, s, per_head) ? 0 : -1;
    for (uint32_t u = 0; u < U; u++) {
        uint32_t first, count;
        kv_unit_heads(l, s->granularity, u, &first, &count);
        for (size_t i = 0; i < L; i++)
            for (uint32_t h = first; h < first + count; h++) want[u * L + i] += per_head[h * L + i] / count;
    }
    if (kind == Z_SCORED) standardise(U * L, want);
    for (size_t j = 0; j < U * L; j++) top = fmax(top, fabs(want[j]));
    for (size_t j = 0; j < U * L && bad >= 0; j++) {
        if (kind == RAISED && j % L < s->sinks)
            above = fmin(above, got[j]);
        else if (j % L < n)
            bad += !kv_close(got[j], want[j], tol * top, tol);
    }
    for (size_t j = 0; j < U * L && bad >= 0 && kind == RAISED; j++)
        if (j % L >= s->sinks && !(got[j] < above)) bad++;
    free(per_head), free(want);
    return bad;
}

static void test_twins(void)
{
    static const struct {
        const char *policy;
        twin of;
        int kind;
        bool rope;
        double tol;
    } T[] = {
        {"kvpress.keydiff", twin_keydiff, PLAIN, false, 1e-6},
        {"keydiff:granularity=layer", twin_keydiff, PLAIN, false, 1e-6},
        {"kvpress.cur:granularity=query_head", twin_cur, PLAIN, false, 1e-6},
        {"kvpress.cur:sinks=1,local_window=5", twin_cur, PLAIN, false, 1e-6},
        {"kvpress.cur:sinks=0,granularity=layer", twin_cur, PLAIN, false, 1e-6},
        {"kvpress.noncausal_attn", twin_noncausal, Z_SCORED, false, 2e-5},
        {"kvpress.noncausal_attn:chunk_size=8", twin_noncausal, Z_SCORED, false, 2e-5},
        {"kvpress.noncausal_attn:chunk_size=1,granularity=layer", twin_noncausal, Z_SCORED, false, 2e-5},
        {"kvpress.noncausal_attn:chunk_size=11,granularity=query_head", twin_noncausal, Z_SCORED, false, 2e-5},
        {"kvpress.expected_attention:n_future=3", twin_expected, RAISED, true, 1e-5},
        {"kvpress.expected_attention:sinks=0,use_covariance=0", twin_expected, RAISED, true, 1e-5},
        {"kvpress.expected_attention:sinks=7,epsilon=0.02,granularity=query_head", twin_expected, RAISED, true, 1e-5},
        {"expected-attention:use_vnorm=0,n_future=1,granularity=layer", twin_expected, RAISED, true, 1e-5},
        {"kvpress.capkv:n_future=3", twin_capkv, RAISED, true, 1e-5},
        {"kvpress.capkv:sinks=0,tau=0.5,epsilon=0.1", twin_capkv, RAISED, true, 1e-5},
        {"kvpress.capkv:tau=900,granularity=query_head", twin_capkv, RAISED, true, 1e-3},
        {"rkv.prompt", twin_rkv, PLAIN, false, 2e-6},
        {"rkv.prompt:retain_direction=first,window=1,kernel=3", twin_rkv, PLAIN, false, 2e-6},
        {"rkv.prompt:mix_lambda=0.5,window=20,granularity=query_head", twin_rkv, PLAIN, false, 2e-6},
    };
    for (size_t i = 0; i < sizeof T / sizeof *T; i++) {
        int compared = 0, skipped = 0;
        for (uint64_t seed = 0; seed < 150; seed++) {
            kv_rng r = {seed * 1000 + i};
            kv_error e = {""};
            kv_spec s = {0};
            float *got = NULL;
            box b;
            box_open(&b, &r, T[i].rope);
            kv_status st = box_score(&b, T[i].policy, &s, &got, &e);
            int bad = st ? 1 : disagree(&b.l, &s, got, T[i].of, T[i].kind, T[i].tol);
            if (bad > 0)
                CHECKF(bad == 0, "%s seed %d: %d off; %u tokens, %u/%u heads of %u %s", T[i].policy, (int)seed, bad,
                       b.l.L, b.l.n_q_head, b.l.n_kv_head, b.l.d, e.msg);
            compared += bad >= 0, skipped += bad < 0;
            free(got), kv_spec_free(&s), kv_layer_free(&b.l);
        }
        CHECKF(compared >= 100, "%s: %d compared, %d at a threshold", T[i].policy, compared, skipped);
    }
}

/* ------------------------------------------------------------------------------------- LagKV: ranks */
/* x [n] += half the softmaxed deviation of chunk at `a`; NaN everywhere when a channel of the next chunk is constant.
 */
static void lag_values(const float *x, size_t n, size_t d, double *to)
{
    double dev[64];
    for (size_t t = 0; t < n; t++) {
        double u[16], mean = 0, var = 0;
        for (size_t j = 0; j < d; j++) {
            double lo = INFINITY, hi = -INFINITY;
            for (size_t i = n; i < 2 * n; i++) lo = fmin(lo, x[i * d + j]), hi = fmax(hi, x[i * d + j]);
            mean += (u[j] = (x[t * d + j] - lo) / (hi - lo)) / (double)d;
        }
        for (size_t j = 0; j < d; j++) var += (u[j] - mean) * (u[j] - mean);
        dev[t] = d > 1 ? sqrt(var / (double)(d - 1)) : NAN;
    }
    bool nan = false;
    for (size_t t = 0; t < n; t++) nan |= dev[t] != dev[t];
    soften(n, dev);
    for (size_t t = 0; t < n; t++) to[t] += nan ? NAN : dev[t] / 2;
}

static void test_lag(void)
{
    static const uint32_t LAGS[] = {1, 2, 5, 16, 64}, SINKS[] = {0, 1, 4, 200};
    int chunks = 0, ramps = 0;
    for (uint64_t seed = 0; seed < 400; seed++) {
        kv_rng r = {seed};
        kv_spec s = {0};
        kv_error e = {""};
        float *got = NULL;
        box b;
        box_open(&b, &r, false);
        char *policy =
            kv_format("kvpress.lagkv:lag_size=%u,sinks=%u", LAGS[kv_rng_next(&r) % 5], SINKS[kv_rng_next(&r) % 4]);
        kv_status st = box_score(&b, policy, &s, &got, &e);
        size_t L = b.l.L, n = s.lag_size, bad = st != KV_OK, a = s.sinks;
        for (size_t h = 0; h < b.l.n_kv_head && !st; h++) {
            const float *k = key(&b.l, h * b.l.group, 0), *v = value(&b.l, h * b.l.group, 0), *to = got + h * L;
            for (size_t i = 0; i < s.sinks && i < L; i++) bad += to[i] != 1;
            if (L < s.sinks + 2 * n) {
                for (size_t i = s.sinks; i < L; i++)
                    bad += to[i] != (float)((double)(i - s.sinks) / (double)(L - s.sinks));
                ramps++;
                continue;
            }
            for (a = s.sinks; a + 2 * n <= L; a += n, chunks++) {
                double x[64] = {0};
                uint64_t seen = 0;
                lag_values(k + a * b.l.d, n, b.l.d, x);
                lag_values(v + a * b.l.d, n, b.l.d, x);
                for (size_t t = 0; t < n; t++) seen |= (uint64_t)1 << lrintf(to[a + t] * (float)n);
                bad += seen != UINT64_MAX >> (64 - n); /* every rank once */
                for (size_t t = 0; t < n; t++)
                    for (size_t i = 0; i < t; i++) {
                        if (x[i] != x[i] || x[i] == x[t])
                            bad += !(to[a + i] > to[a + t]);
                        else if (fabs(x[i] - x[t]) > 1e-6 * x[t])
                            bad += (to[a + i] > to[a + t]) != (x[i] > x[t]);
                    }
            }
            for (size_t i = a; i < L; i++) bad += to[i] != 1;
        }
        if (bad) CHECKF(bad == 0, "%s seed %d: %zu of %zu, d %u %s", policy, (int)seed, bad, L, b.l.d, e.msg);
        free(policy), free(got), kv_spec_free(&s), kv_layer_free(&b.l);
    }
    CHECKF(chunks > 500 && ramps > 50, "%d chunks, %d short prompts", chunks, ramps);
}

/* ------------------------------------------------------------------------------------- statistics from files */
static void test_stats_files(void)
{
    char *mean_path = kv_format("%s/mean.npy", dir), *cov_path = kv_format("%s/cov.npy", dir);
    int compared = 0;
    for (uint64_t seed = 0; seed < 60; seed++) {
        kv_rng r = {seed + 77};
        kv_error e = {""};
        kv_spec s = {0}, s2 = {0};
        float *own = NULL, *read = NULL;
        box b;
        box_open(&b, &r, true);
        size_t d = b.l.d, L = b.l.L, H = b.l.n_q_head, first = L < 4 ? L : 4;
        double *pre = malloc(L * d * sizeof *pre), R[256], mu[16], S[256];
        float *mean = malloc(H * d * sizeof *mean), *cov = malloc(H * d * d * sizeof *cov);
        CHECK(!box_score(&b, "kvpress.expected_attention:n_future=5", &s, &own, &e));
        for (size_t h = 0; h < H; h++) {
            if (L > first) unrotate(&b.l, h, first, 5, pre, R), statistics(L - first, d, pre, mu, S);
            for (size_t j = 0; j < d; j++) mean[h * d + j] = L > first ? (float)mu[j] : 0;
            for (size_t j = 0; j < d * d; j++) cov[h * d * d + j] = L > first ? (float)S[j] : 0;
        }
        CHECK(!kv_npy_write(mean_path, "<f4", 3, (size_t[]){1, H, d}, mean, &e));
        CHECK(!kv_npy_write(cov_path, "<f4", 4, (size_t[]){1, H, d, d}, cov, &e));
        float *q_all = b.l.q_all;
        b.l.q_all = NULL; /* not asked for, so not there */
        char *policy = kv_format("kvpress.expected_attention_stats:n_future=5,mean=%s,cov=%s", mean_path, cov_path);
        kv_status st = box_score(&b, policy, &s2, &read, &e);
        b.l.q_all = q_all;
        CHECKF(!st, "%s", e.msg);
        size_t bad = 0, n = kv_unit_count(&b.l, s.granularity) * L;
        float top = 0;
        for (size_t j = 0; j < n; j++) top = j % L >= first && own[j] > top ? own[j] : top;
        for (size_t j = 0; j < n && !st; j++) bad += j % L >= first && !kv_close(read[j], own[j], 1e-5 * top, 1e-5);
        if (bad) CHECKF(bad == 0, "seed %d: %zu of %zu", (int)seed, bad, n);
        compared++;
        free(policy), free(pre), free(mean), free(cov), free(own), free(read), kv_spec_free(&s), kv_spec_free(&s2),
            kv_layer_free(&b.l);
    }
    CHECK(compared == 60);
    /* what is refused */
    kv_rng r = {5};
    box b;
    box_open(&b, &r, true);
    size_t d = b.l.d, H = b.l.n_q_head;
    float *zero = calloc(2 * H * d * d + 2, sizeof *zero);
    kv_npy_write(mean_path, "<f4", 3, (size_t[]){2, H, d}, zero, NULL); /* two layers, the trace has one */
    kv_npy_write(cov_path, "<f4", 3, (size_t[]){1, H, d}, zero, NULL);  /* one axis short */
    char *bad_mean = kv_format("kvpress.expected_attention_stats:use_covariance=0,mean=%s", mean_path);
    char *bad_cov = kv_format("kvpress.expected_attention_stats:mean=%s,cov=%s", cov_path, cov_path);
    char *ignored = kv_format("kvpress.expected_attention:mean=%s", mean_path);
    const struct {
        const char *policy;
        kv_status want;
        const char *word;
    } BAD[] = {{"kvpress.expected_attention_stats", KV_EMISUSE, "mean=FILE"},
               {bad_mean, KV_EFORMAT, "want an array"},
               {bad_cov, KV_EFORMAT, "want an array"},
               {"kvpress.expected_attention_stats:use_covariance=0,mean=/nonexistent.npy", KV_EIO, "/nonexistent.npy"},
               {ignored, KV_EMISUSE, "expected_stats"}};
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        kv_error e = {""};
        kv_spec s = {0};
        float *got = NULL;
        kv_status st = box_score(&b, BAD[i].policy, &s, &got, &e);
        if (i == 2)
            CHECKF(st == BAD[i].want, "%s: %d %s", BAD[i].policy, st, e.msg); /* mean fits, cov does not */
        else
            CHECKF(st == BAD[i].want && strstr(e.msg, BAD[i].word), "%s: %d %s", BAD[i].policy, st, e.msg);
        free(got), kv_spec_free(&s);
    }
    free(zero), free(bad_mean), free(bad_cov), free(ignored), free(mean_path), free(cov_path), kv_layer_free(&b.l);
}

/* ------------------------------------------------------------------------------------- rotation, traces */
static void test_rotation(void)
{
    for (uint64_t seed = 0; seed < 40; seed++) {
        kv_rng r = {seed};
        kv_rotation rot;
        kv_error e = {""};
        box b;
        box_open(&b, &r, true);
        size_t d = b.l.d, L = b.l.L, turned = b.info.rope_dim ? b.info.rope_dim : d, bad = 0;
        float f[8], *x = malloc(L * d * sizeof *x), *back = malloc(L * d * sizeof *back);
        for (size_t j = 0; j < turned / 2; j++)
            f[j] = b.info.inv_freq ? b.inv_freq[j] : powf(b.info.rope_theta, -2.0f * (float)j / (float)turned);
        memcpy(x, b.l.q_all, L * d * sizeof *x);
        kv_rope_ref(L, d, turned, 0, f, b.info.rope_mscale, x, d);
        CHECKF(!kv_rotation_open(&b.l, "x", 1, true, &rot, &e), "%s", e.msg);
        kv_rotation_undo(&rot, &b.l, 0, x, back);
        for (size_t j = 0; j < L * d; j++) bad += !kv_close(back[j], b.l.q_all[j], 1e-4, 0);
        CHECKF(bad == 0, "seed %d: %zu of %zu", (int)seed, bad, L * d);
        double one[16], two[256] = {0}; /* the rotation of position L: as RoPE does it, and R I R^T = mscale^2 I */
        float y[16];
        for (size_t j = 0; j < d; j++) one[j] = y[j] = b.l.q_all[j], two[j * kv_pad4(d) + j] = 1;
        kv_rope_ref(1, d, turned, L, f, b.info.rope_mscale, y, d);
        kv_rotation_future(&rot, d, one, two);
        for (size_t j = 0; j < d; j++) bad += !kv_close(one[j], y[j], 1e-4, 0);
        for (size_t j = 0; j < d * d; j++) {
            double m = b.info.rope_mscale, want = j / d != j % d ? 0 : j / d < turned ? m * m : 1;
            bad += !kv_close(two[j / d * kv_pad4(d) + j % d], want, 1e-6, 0);
        }
        CHECKF(bad == 0, "seed %d: average rotation of one position, %zu", (int)seed, bad);
        kv_rotation_close(&rot), free(x), free(back), kv_layer_free(&b.l);
    }
}

/* Through a real trace: rankings list every position once, protected ones first; what the trace cannot give is said. */
static void test_traces(void)
{
    static const kv_tiny SHAPES[] = {{2, 6, 2, 8, 50, 45, false, false, 1},
                                     {1, 1, 1, 2, 1, 1, false, false, 2},
                                     {1, 8, 1, 4, 30, 30, false, true, 3}};
    static const char POLICIES[] =
        "keydiff,kvpress.keydiff,kvpress.lagkv:lag_size=7,kvpress.cur,kvpress.noncausal_attn:chunk_size=16,rkv.prompt,"
        "rkv.prompt:granularity=layer,kvpress.lagkv:granularity=layer";
    char *path = kv_format("%s/t.kvt", dir);
    for (size_t k = 0; k < sizeof SHAPES / sizeof *SHAPES; k++) {
        kv_tiny_data data = kv_tiny_make(&SHAPES[k]);
        kv_error e = {""};
        kv_trace *t = NULL;
        kv_scene sc = {0};
        kv_spec *s = NULL, *expected = NULL;
        size_t n = 0, m = 0;
        kv_plan plan = {0}, none = {0};
        CHECKF(!kv_tiny_write(&SHAPES[k], &data, path, &e) && !kv_trace_open(path, &t, &e) &&
                   !kv_scene_open(t, "prompt", 0, &sc, &e),
               "%s", e.msg);
        CHECKF(!kv_spec_parse(POLICIES, &s, &n, &e) && !kv_plan_build(&sc, s, n, 2, &plan, &e), "%s", e.msg);
        for (size_t i = 0; i < plan.n_ranking; i++) {
            const kv_ranking *rk = &plan.ranking[i];
            uint32_t L = sc.n_cut, bad = 0;
            for (size_t u = 0; u < (size_t)sc.n_evict * rk->n_unit; u++) {
                bool seen[64] = {false};
                for (uint32_t j = 0; j < L; j++) {
                    uint32_t p = rk->order[u * L + j];
                    bad += p >= L || seen[p] || (j < rk->n_forced && p != L - 1 - j);
                    if (p < L) seen[p] = true;
                }
            }
            CHECKF(bad == 0, "%s: %u bad positions", rk->spec->canonical, bad);
        }
        CHECK(!kv_spec_parse("kvpress.capkv,expected-attention", &expected, &m, &e) && m == 2);
        for (size_t i = 0; i < m; i++) /* tiny traces do not know their RoPE */
            CHECKF(kv_plan_build(&sc, &expected[i], 1, 1, &none, &e) == KV_EMISSING && strstr(e.msg, "--rope-theta"),
                   "%s", e.msg);
        for (size_t i = 0; i < n; i++) kv_spec_free(&s[i]);
        for (size_t i = 0; i < m; i++) kv_spec_free(&expected[i]);
        free(s), free(expected), kv_plan_free(&plan), kv_scene_close(&sc), kv_trace_close(t), kv_tiny_free(&data);
    }
    free(path);
}

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    test_rotation();
    test_twins();
    test_lag();
    test_stats_files();
    test_traces();
    char *rm = kv_format("rm -rf %s", dir);
    if (rm && system(rm)) perror("rm");
    free(rm);
    return kv_tally();
}
