/* test_metrics.c - every metric of a replay against plain double loops over whole attention rows, and what must hold
 * whatever the numbers: Ada-KV's, CriticalKV's and LAVa's bounds are never exceeded, a gap is 0 for its base and 1 for
 * its oracle, equal bytes are equal. The kept sets themselves are checked elsewhere (test_twins*.c). */
#include <unistd.h>

#include "sim/bounds.h"
#include "sim/gap_closed.h"
#include "sim/ledger.h"
#include "tests/twins.h"

static char dir[] = "/tmp/kvtest.XXXXXX";

/* One policy at one budget of a world, with what every row sees. */
typedef struct {
    kv_world *w;
    uint32_t n_unit, T;
    bool *sees; /* [layer][unit][row][token] */
} sets;

static bool *row_sees(const sets *s, uint32_t l, uint32_t u, uint32_t r)
{
    return s->sees + (((size_t)l * s->n_unit + u) * s->T + r) * s->w->N;
}

static bool sets_make(sets *s, kv_world *w, const kv_plan *p, const kv_point *x, kv_error *e)
{
    const kv_ranking *rk = &p->ranking[p->ranking_of[x->spec]];
    *s = (sets){.w = w, .n_unit = rk->n_unit, .T = w->N - w->L};
    s->sees = calloc((size_t)w->n_layer * s->n_unit * s->T * w->N, sizeof *s->sees);
    for (uint32_t l = 0; l < w->n_layer; l++) {
        kv_layer layer;
        kv_schedule sch = {0};
        bool used = kv_schedule_used(p, x->spec);
        if (kv_layer_load(&w->scene, l, KV_NEED_FUTURE | p->needs, p->max_window, &layer, e)) return false;
        bool bad = used && kv_schedule_make(p, x->spec, &x->c, x->counts, &layer, &sch, e);
        for (uint32_t u = 0; u < s->n_unit && !bad; u++)
            for (uint32_t r = 0; r < s->T; r++) {
                bool *sees = row_sees(s, l, u, r);
                const uint32_t *order = rk->order + ((size_t)l * s->n_unit + u) * w->L;
                for (uint32_t i = 0; i <= w->L + r; i++)
                    sees[i] = used ? kv_schedule_visible(&sch, &w->scene, u, i, r) : i >= w->L;
                for (uint32_t k = 0; k < x->counts[l * s->n_unit + u] && !used; k++) sees[order[k]] = true;
            }
        kv_schedule_free(&sch), kv_layer_free(&layer);
        if (bad) return false;
    }
    return true;
}

/* ------------------------------------------------------------------------------------- one row, in double */
typedef struct {
    double R, prompt, nats, nats_prompt, contested, kept, all, error, cosine, distance;
    double theta, lost_v; /* (1 - R) max ||v||_1 */
    bool whole;
} row_facts;

static double norm_wo(const kv_world *w, uint32_t l, uint32_t h, const double *v) /* ||v W_O[h]||_1 */
{
    uint32_t W = w->H * w->d;
    double sum = 0;
    for (uint32_t o = 0; o < W; o++) {
        double x = 0;
        for (uint32_t j = 0; j < w->d; j++) x += v[j] * w->t.wo[((size_t)l * W + o) * W + h * w->d + j];
        sum += fabs(x);
    }
    return sum;
}

static row_facts facts(const sets *s, uint32_t l, uint32_t h, uint32_t r, const double *n, double *diff)
{
    const kv_world *w = s->w;
    uint32_t row = w->L + r, d = w->d, u = h / (w->H / s->n_unit);
    const double *a = kv_row(w, l, h, row);
    const bool *in = row_sees(s, l, u, r);
    row_facts f = {.whole = true};
    double before = 0, kept_before = 0, o2 = 0, hat2 = 0, dot = 0, e2 = 0, most_v = 0, all_n = 0, kept_n = 0;
    for (uint32_t i = 0; i <= row; i++) {
        bool outside = i >= 4 && i + 32 < w->L;
        f.R += in[i] ? a[i] : 0, f.whole &= in[i];
        before += i < w->L ? a[i] : 0, kept_before += i < w->L && in[i] ? a[i] : 0;
        f.all += outside ? a[i] : 0, f.kept += outside && in[i] ? a[i] : 0;
        all_n += a[i] * n[i], kept_n += in[i] ? a[i] * n[i] : 0;
        double l1 = 0;
        for (uint32_t j = 0; j < d; j++) l1 += fabs((double)kv_value_at(w, l, h / w->g, i)[j]);
        most_v = fmax(most_v, l1);
    }
    for (uint32_t j = 0; j < d; j++) {
        double o = 0, hat = 0;
        for (uint32_t i = 0; i <= row; i++) {
            double x = a[i] * kv_value_at(w, l, h / w->g, i)[j];
            o += x, hat += in[i] ? x : 0;
        }
        hat = f.R > 0 ? hat / f.R : 0;
        diff[h * d + j] = f.whole ? 0 : o - hat;
        o2 += o * o, hat2 += hat * hat, dot += o * hat, e2 += (o - hat) * (o - hat);
    }
    if (f.whole) f.R = 1;
    f.prompt = before > 1e-9 ? kept_before / before : NAN;
    f.contested = f.all > 0 ? f.kept / f.all : NAN;
    f.nats = fmin(-log(f.R), 20), f.nats_prompt = fmin(-log(f.prompt), 20);
    f.error = sqrt(e2 / o2), f.cosine = hat2 > 0 ? dot / sqrt(o2 * hat2) : 0;
    f.distance = 1 - f.R > 1e-6 ? f.error / (1 - f.R) : NAN;
    f.theta = f.whole ? 0 : f.R > 0 ? all_n - (2 - 1 / f.R) * kept_n : all_n;
    f.lost_v = (1 - f.R) * most_v;
    return f;
}

/* ------------------------------------------------------------------------------------- values of the program */
static const kv_value *value(const kv_value *v, size_t n, kv_metric_id m, int layer, int head, int step)
{
    for (size_t i = 0; i < n; i++)
        if (v[i].metric == m && v[i].layer == layer && v[i].head == head && v[i].step == step) return &v[i];
    return NULL;
}

typedef struct {
    const kv_value *v;
    size_t n, wrong, right;
    const char *who;
} seen;

static void same(seen *s, kv_metric_id m, int layer, int head, int step, double want, double tol)
{
    const kv_value *got = value(s->v, s->n, m, layer, head, step);
    bool ok = got && (isnan(want) ? isnan(got->value) : kv_close(got->value, want, tol, tol));
    if (!ok && s->wrong++ < 3)
        CHECKF(ok, "%s: %s layer %d head %d row %d: %.9g for %.9g", s->who, kv_metric_defs[m].name, layer, head, step,
               got ? got->value : -99, want);
    s->right += ok;
}

typedef struct {
    double sum, least;
    uint32_t n;
} mean;

static void put(mean *m, double x)
{
    if (isnan(x)) return;
    if (!m->n++ || x < m->least) m->least = x;
    m->sum += x;
}

static double of(const mean *m)
{
    return m->n ? m->sum / m->n : NAN;
}

static double least(const mean *m)
{
    return m->n ? m->least : NAN;
}

/* rows -> heads -> layers of what is a mean. */
enum { F_RECALL, F_PROMPT, F_NATS, F_NATS_PROMPT, F_ERROR, F_COSINE, F_DISTANCE, F_COUNT };
static const kv_metric_id OF_ROWS[F_COUNT] = {KV_M_RECALL,           KV_M_RECALL_PROMPT, KV_M_NATS_LOST,
                                              KV_M_NATS_LOST_PROMPT, KV_M_HEAD_ERROR,    KV_M_HEAD_COSINE,
                                              KV_M_VALUE_DISTANCE};
static const double TOL[F_COUNT] = {3e-6, 3e-6, 2e-5, 2e-5, 2e-5, 2e-5, 3e-3};

static int rising(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double p10(double *v, size_t n)
{
    qsort(v, n, sizeof *v, rising);
    double at = 0.1 * (double)(n - 1);
    size_t i = (size_t)at;
    return i + 1 < n ? v[i] + (at - (double)i) * (v[i + 1] - v[i]) : v[i];
}

/* recall_contested over the model, in double. */
static double contested_of(const sets *s)
{
    const kv_world *w = s->w;
    mean layers = {0};
    double *diff = calloc(w->H * w->d, sizeof *diff), *n = calloc(w->N, sizeof *n);
    for (uint32_t l = 0; l < w->n_layer; l++) {
        mean heads = {0};
        for (uint32_t h = 0; h < w->H; h++) {
            double kept = 0, all = 0;
            for (uint32_t r = 0; r < s->T; r++) {
                row_facts f = facts(s, l, h, r, n, diff);
                kept += f.kept, all += f.all;
            }
            put(&heads, all > 0 ? kept / all : NAN);
        }
        put(&layers, of(&heads));
    }
    free(diff), free(n);
    return of(&layers);
}

/* Attention metrics of one point. */
static void check_rows(const sets *s, seen *v, const kv_bound_sums *bound)
{
    kv_world *w = s->w;
    uint32_t W = w->H * w->d, T = s->T;
    mean all[F_COUNT] = {{0}}, contested = {0}, low = {0}, low_prompt = {0}, ratio[3] = {{0}}, abs[4] = {{0}};
    mean(*step)[F_COUNT] = calloc(T, sizeof *step);
    mean *step_contested = calloc(T, sizeof *step_contested), *step_low = calloc(T, sizeof *step_low);
    double *square = calloc(T, sizeof *square), *diff = calloc(W, sizeof *diff), *out = calloc(W, sizeof *out),
           *n = calloc((size_t)w->H * w->N, sizeof *n), *head_recall = calloc(w->n_layer * w->H, sizeof *head_recall),
           *head_prompt = calloc(w->n_layer * w->H, sizeof *head_prompt), error2 = 0;
    size_t n_recall = 0, n_prompt = 0, exceeded = 0, disorder = 0;
    for (uint32_t l = 0; l < w->n_layer; l++) {
        mean layer[F_COUNT] = {{0}}, layer_contested = {0}, layer_low = {0}, layer_low_prompt = {0};
        mean(*head)[F_COUNT] = calloc(w->H, sizeof *head);
        mean(*row)[F_COUNT] = calloc(T, sizeof *row), *row_contested = calloc(T, sizeof *row_contested);
        double *kept = calloc(w->H, sizeof *kept), *outside = calloc(w->H, sizeof *outside), wo = 0, error = 0;
        double actual = 0, ada = 0, theta = 0, lava = 0;
        for (uint32_t j = 0; j < W; j++) {
            double column = 0;
            for (uint32_t o = 0; o < W; o++) column += fabs((double)w->t.wo[((size_t)l * W + o) * W + j]);
            wo = fmax(wo, column);
        }
        for (uint32_t h = 0; h < w->H; h++)
            for (uint32_t i = 0; i < w->N; i++) {
                double x[64];
                for (uint32_t j = 0; j < w->d; j++) x[j] = kv_value_at(w, l, h / w->g, i)[j];
                n[h * w->N + i] = norm_wo(w, l, h, x);
            }
        for (uint32_t r = 0; r < T; r++) {
            double C = 0, lost = 0, lost_v = 0, sum_theta = 0, y1 = 0, num = 0, den = 0;
            for (uint32_t h = 0; h < w->H; h++) {
                row_facts f = facts(s, l, h, r, n + h * w->N, diff);
                const double x[F_COUNT] = {
                    f.R, f.prompt, f.whole ? 0 : f.nats, f.whole ? 0 : f.nats_prompt, f.error, f.cosine, f.distance};
                for (int k = 0; k < F_COUNT; k++) put(&head[h][k], x[k]), put(&row[r][k], x[k]);
                put(&row_contested[r], f.contested), put(&step_low[r], f.R);
                put(&layer_low, f.R), put(&layer_low_prompt, f.prompt);
                kept[h] += f.kept, outside[h] += f.all;
                for (uint32_t i = 0; i <= w->L + r; i++) C = fmax(C, n[h * w->N + i]);
                lost += 1 - f.R, lost_v += f.lost_v, sum_theta += f.theta;
                for (uint32_t j = 0; j < w->d; j++) {
                    double o = 0;
                    for (uint32_t i = 0; i <= w->L + r; i++)
                        o += kv_row(w, l, h, w->L + r)[i] * kv_value_at(w, l, h / w->g, i)[j];
                    out[h * w->d + j] = o;
                }
            }
            for (uint32_t o = 0; o < W; o++) {
                double x = 0, y = 0;
                for (uint32_t j = 0; j < W; j++) {
                    double c = w->t.wo[((size_t)l * W + o) * W + j];
                    x += c * diff[j], y += c * out[j];
                }
                y1 += fabs(x), num += x * x, den += y * y;
            }
            exceeded += !(y1 <= sum_theta * (1 + 1e-12) + 1e-12);
            disorder += !(sum_theta <= 2 * C * lost * (1 + 1e-12) + 1e-12 && 2 * C * lost <= 2 * wo * lost_v + 1e-12);
            actual += y1, ada += 2 * C * lost, theta += sum_theta, lava += 2 * wo * lost_v;
            error += sqrt(num / den), square[r] += num / den;
        }
        for (uint32_t h = 0; h < w->H; h++) {
            for (int k = 0; k < F_COUNT; k++)
                same(v, OF_ROWS[k], (int)l, (int)h, -1, of(&head[h][k]), TOL[k]), put(&layer[k], of(&head[h][k]));
            put(&layer_contested, outside[h] > 0 ? kept[h] / outside[h] : NAN);
            head_recall[n_recall++] = of(&head[h][F_RECALL]);
            if (head[h][F_PROMPT].n) head_prompt[n_prompt++] = of(&head[h][F_PROMPT]);
        }
        for (int k = 0; k < F_COUNT; k++)
            same(v, OF_ROWS[k], (int)l, -1, -1, of(&layer[k]), TOL[k]), put(&all[k], of(&layer[k]));
        for (uint32_t r = 0; r < T; r++) {
            for (int k = 0; k < F_COUNT; k++) put(&step[r][k], of(&row[r][k]));
            put(&step_contested[r], of(&row_contested[r]));
        }
        same(v, KV_M_RECALL_CONTESTED, (int)l, -1, -1, of(&layer_contested), 5e-6);
        same(v, KV_M_RECALL_PROMPT_MIN, (int)l, -1, -1, least(&layer_low_prompt), 5e-6);
        same(v, KV_M_LAYER_ERROR, (int)l, -1, -1, error / T, 1e-4);
        put(&contested, of(&layer_contested)), put(&low, least(&layer_low)), put(&low_prompt, least(&layer_low_prompt));
        error2 += (error / T) * (error / T);
        const double bounds[4] = {actual / T, ada / T, theta / T, lava / T},
                     ratios[3] = {ada / actual, theta / actual, lava / actual};
        for (int k = 0; k < 4; k++)
            same(v, KV_M_OUTPUT_L1 + k, (int)l, -1, -1, bounds[k], 2e-4), put(&abs[k], bounds[k]);
        for (int k = 0; k < 3; k++) {
            bool any = actual > 1e-9;
            same(v, KV_M_BOUND_RATIO + k, (int)l, -1, -1, any ? ratios[k] : NAN, 1e-3),
                put(&ratio[k], any ? ratios[k] : NAN);
        }
        CHECKF(bound[l].tightest <= 1 + 1e-4 && bound[l].disorder <= 1 + 1e-6, "%s layer %u: error / bound %.7f, %.7f",
               v->who, l, bound[l].tightest, bound[l].disorder);
        free(head), free(row), free(row_contested), free(kept), free(outside);
    }
    CHECKF(!exceeded && !disorder, "%s: the error exceeds a bound in %zu rows, bounds out of order in %zu", v->who,
           exceeded, disorder);
    for (int k = 0; k < F_COUNT; k++) same(v, OF_ROWS[k], -1, -1, -1, of(&all[k]), TOL[k]);
    same(v, KV_M_RECALL_CONTESTED, -1, -1, -1, of(&contested), 5e-6);
    same(v, KV_M_RECALL_MIN, -1, -1, -1, least(&low), 5e-6);
    same(v, KV_M_RECALL_PROMPT_MIN, -1, -1, -1, least(&low_prompt), 5e-6);
    same(v, KV_M_RECALL_P10, -1, -1, -1, p10(head_recall, n_recall), 5e-6);
    same(v, KV_M_RECALL_PROMPT_P10, -1, -1, -1, p10(head_prompt, n_prompt), 5e-6);
    same(v, KV_M_LAYER_ERROR, -1, -1, -1, sqrt(error2), 1e-4);
    for (int k = 0; k < 4; k++) same(v, KV_M_OUTPUT_L1 + k, -1, -1, -1, of(&abs[k]), 2e-4);
    for (int k = 0; k < 3; k++) same(v, KV_M_BOUND_RATIO + k, -1, -1, -1, of(&ratio[k]), 1e-3);
    for (uint32_t r = 0; r < T; r++) {
        for (int k = 0; k < F_COUNT; k++) same(v, OF_ROWS[k], -1, -1, (int)r, of(&step[r][k]), TOL[k]);
        same(v, KV_M_RECALL_CONTESTED, -1, -1, (int)r, of(&step_contested[r]), 2e-5);
        same(v, KV_M_RECALL_MIN, -1, -1, (int)r, least(&step_low[r]), 5e-6);
        same(v, KV_M_LAYER_ERROR, -1, -1, (int)r, sqrt(square[r]), 1e-4);
    }
    free(step), free(step_contested), free(step_low), free(square), free(diff), free(out), free(n);
    free(head_recall), free(head_prompt);
}

/* Evidence and breadth of one point. */
static void check_cover(const sets *s, seen *v, bool by_layer)
{
    kv_world *w = s->w;
    uint32_t T = s->T, n_span = 0, n_token = 0, span[8][2];
    bool *is = calloc(w->L, sizeof *is);
    for (uint32_t k = 0; k < w->t.n_evidence;
         k++) { /* a token counts when any of its bytes does; one without bytes, inside */
        uint32_t in = 0, first = 0, last = 0;
        for (uint32_t i = 0; i < w->L; i++) {
            uint32_t from = w->t.offset[i], to = w->t.offset[i + 1];
            bool hit = from == to && from > w->t.evidence[k].start && from < w->t.evidence[k].end;
            for (uint32_t b = from; b < to; b++) hit |= b >= w->t.evidence[k].start && b < w->t.evidence[k].end;
            if (hit) first = in++ ? first : i, last = i, is[i] = true;
        }
        if (in) span[n_span][0] = first, span[n_span++][1] = last;
    }
    for (uint32_t i = 0; i < w->L; i++) n_token += is[i];
    mean kept = {0}, half = {0};
    double lost_all = 0, distinct_all = 0, slots_all = 0;
    for (uint32_t l = 0; l < w->n_layer; l++) {
        mean layer_kept = {0}, layer_half = {0};
        double lost = 0, distinct = 0, slots = 0;
        for (uint32_t h = 0; h < w->H; h++) {
            double a = 0, b = 0;
            for (uint32_t r = 0; r < T; r++) {
                const bool *in = row_sees(s, l, h / (w->H / s->n_unit), r);
                for (uint32_t i = 0; i < w->L; i++) a += is[i] && in[i];
                for (uint32_t k = 0; k < n_span; k++) {
                    double got = 0, m = span[k][1] - span[k][0] + 1;
                    for (uint32_t i = span[k][0]; i <= span[k][1]; i++) got += in[i];
                    b += got / m >= 0.5;
                }
            }
            same(v, KV_M_EVIDENCE_KEPT, (int)l, (int)h, -1, a / T / n_token, 1e-12);
            same(v, KV_M_EVIDENCE_SPAN_HALF, (int)l, (int)h, -1, b / T / n_span, 1e-12);
            put(&layer_kept, a / T / n_token), put(&layer_half, b / T / n_span);
        }
        for (uint32_t r = 0; r < T; r++)
            for (uint32_t i = 0; i < w->L; i++) {
                uint32_t units = 0;
                for (uint32_t u = 0; u < s->n_unit; u++) units += row_sees(s, l, u, r)[i];
                lost += is[i] && !units, distinct += units > 0, slots += units * (by_layer ? w->U : 1);
            }
        same(v, KV_M_EVIDENCE_KEPT, (int)l, -1, -1, of(&layer_kept), 1e-12);
        same(v, KV_M_EVIDENCE_LOST, (int)l, -1, -1, lost / T / n_token, 1e-12);
        same(v, KV_M_BREADTH, (int)l, -1, -1, slots > 0 ? distinct / slots : NAN, 1e-12);
        put(&kept, of(&layer_kept)), put(&half, of(&layer_half)), slots_all += slots;
    }
    for (uint32_t r = 0; r < T; r++)
        for (uint32_t i = 0; i < w->L; i++) {
            bool any = false;
            for (uint32_t l = 0; l < w->n_layer; l++)
                for (uint32_t u = 0; u < s->n_unit; u++) any |= row_sees(s, l, u, r)[i];
            lost_all += is[i] && !any, distinct_all += any;
        }
    same(v, KV_M_EVIDENCE_KEPT, -1, -1, -1, of(&kept), 1e-12);
    same(v, KV_M_EVIDENCE_SPAN_HALF, -1, -1, -1, of(&half), 1e-12);
    same(v, KV_M_EVIDENCE_LOST, -1, -1, -1, lost_all / T / n_token, 1e-12);
    same(v, KV_M_BREADTH, -1, -1, -1, slots_all > 0 ? distinct_all / slots_all : NAN, 1e-12);
    free(is);
}

/* Slots that rows read, counted entry by entry. */
static void check_ledger(const sets *s, const kv_ledger *g, uint32_t page, bool by_layer, const char *who)
{
    const kv_world *w = s->w;
    double read = 0, mean_bytes = 0, slot = 8.0 * w->d * (by_layer ? w->U : 1); /* f32 K and V */
    bool units = true;
    for (uint32_t l = 0; l < w->n_layer; l++)
        for (uint32_t u = 0; u < s->n_unit; u++) {
            double unit = 0;
            for (uint32_t r = 0; r < s->T; r++) {
                uint32_t n = 0;
                for (uint32_t i = 0; i <= w->L + r; i++) n += row_sees(s, l, u, r)[i];
                unit += (n + page - 1) / page * page * slot / s->T, mean_bytes += n * slot / s->T;
            }
            units &= kv_close(g->unit_read[l * s->n_unit + u], unit, 1e-9, 1e-9), read += unit;
        }
    CHECKF(units && kv_close(g->read_bytes, read, 1e-6, 1e-9) && kv_close(g->mean_bytes, mean_bytes, 1e-6, 1e-9),
           "%s, page %u: %g bytes read for %g, %g held for %g", who, page, g->read_bytes, read, g->mean_bytes,
           mean_bytes);
}

/* Slots held while the prompt goes through layer after layer. */
static void check_prefill(const kv_world *w, const kv_spec *spec, const kv_point *x, uint32_t units, const kv_ledger *g,
                          const char *who)
{
    uint64_t full = w->L * (uint64_t)w->U, before = 0, most = 0;
    bool cake = !strcmp(spec->row->name, "cake"), pool = !strcmp(spec->row->name, "oracle-global");
    for (uint32_t l = 0; l < w->n_layer; l++) {
        uint64_t budget = (uint64_t)x->nominal * w->n_layer * w->U;
        if (cake) before = budget < l * full ? budget : l * full; /* what the layers so far share */
        if (pool) before = l * full;                              /* nothing can go before all is seen */
        if (before + full > most) most = before + full;
        for (uint32_t u = 0; u < units && !cake && !pool; u++)
            before += x->counts[l * units + u] * (units == 1 ? w->U : 1);
    }
    CHECKF(g->prefill_bytes == most * 8 * w->d, "%s: %llu bytes at most for %llu", who,
           (unsigned long long)g->prefill_bytes, (unsigned long long)most * 8 * w->d);
}

static const char POLICIES[] =
    "full,random:window=0,streaming,snapkv:window=8,snapkv:window=8,granularity=layer,ada-snapkv:window=8,"
    "snapkv:window=8,granularity=query_head,oracle,oracle:granularity=layer,oracle-global,cake:window=8,tova.decode,"
    "h2o.mask,"
    "criticalkv:"
    "window=8,mixdim.ours:window=8";
static const uint32_t BUDGETS[] = {0, 1, 9, 40, 1000};
enum { N_BUDGET = sizeof BUDGETS / sizeof *BUDGETS };

static void write_text(kv_world *w, kv_rng *r)
{
    w->t.offset = calloc(w->N + 1, sizeof *w->t.offset);
    for (uint32_t i = 0; i < w->N; i++)
        w->t.offset[i + 1] = w->t.offset[i] + (uint32_t)(kv_rng_next(r) % 5); /* some empty */
    uint32_t bytes = w->t.offset[w->N];
    w->t.text = calloc(bytes + 1, 1), memset(w->t.text, 'a', bytes);
    w->t.n_evidence = 4;
    for (uint32_t k = 0; k < 4; k++) { /* overlapping, over the cut, behind it */
        uint32_t a = k < 3 ? (uint32_t)(kv_rng_next(r) % bytes) : w->t.offset[w->L],
                 n = 1 + (uint32_t)(kv_rng_next(r) % 25);
        w->t.evidence[k] = (kv_span){a, a + n < bytes ? a + n : bytes};
    }
    w->t.evidence[0] = (kv_span){w->t.offset[w->L / 2], w->t.offset[w->L / 2] + 9}; /* one is surely before the cut */
}

static void test_world(uint64_t seed)
{
    static const kv_tiny SHAPES[] = {{2, 4, 2, 8, 66, 56, true, false, 0},
                                     {3, 6, 2, 16, 50, 44, true, false, 0},
                                     {1, 3, 3, 8, 80, 60, true, false, 0},
                                     {2, 8, 1, 8, 47, 40, true, false, 0}};
    kv_tiny shape = SHAPES[seed % 4];
    kv_rng rng = {seed};
    kv_world w;
    kv_error e = {""};
    kv_plan p = {0};
    kv_replay rp = {0}, again = {0};
    kv_spec *spec = NULL;
    size_t n_spec = 0, n = 0;
    char *path = kv_format("%s/m.kvt", dir);
    shape.seed = seed + 100;
    kv_world_make(&w, &shape);
    write_text(&w, &rng);
    if (!kv_world_open_data(&w, path)) return;
    kv_status st = kv_spec_parse(POLICIES, &spec, &n_spec, &e);
    if (!st) st = kv_plan_build(&w.scene, spec, n_spec, 2, &p, &e);
    kv_point *point = calloc(n_spec * N_BUDGET, sizeof *point);
    for (size_t i = 0; i < n_spec && !st; i++)
        for (uint32_t b = 0; b < N_BUDGET && !st; b++) {
            kv_budget x = {KV_BUDGET_TOKENS, BUDGETS[b], ""};
            point[n] = (kv_point){.spec = i, .c = kv_budget_resolve(&x, w.L, 8 * w.d, w.n_layer, w.U)};
            point[n].nominal = point[n].c.tokens;
            point[n].counts = calloc(w.n_layer * w.H, sizeof(uint32_t));
            st = kv_plan_counts(&p, i, &point[n].c, point[n].counts, &e), n++;
        }
    if (!st) st = kv_replay_run(&p, point, n, KV_M_ALL | KV_M_STEPS, 2, NULL, NULL, &rp, &e);
    if (!st) st = kv_replay_run(&p, point, n, KV_M_ALL | KV_M_STEPS, 1, NULL, NULL, &again, &e);
    double *gap = calloc(n, sizeof *gap), *unit = calloc(w.n_layer * w.H, sizeof *unit);
    kv_tie_count *tie = calloc(w.n_layer, sizeof *tie);
    uint32_t number[8] = {0, 1, 2, 3, 4, 5, 6, 7}, T = w.N - w.L;
    if (!st) st = kv_gap_closed(&p, point, n, &rp, 2, gap, &e);
    CHECKF(!st, "seed %llu: %s", (unsigned long long)seed, e.msg);
    if (!st) { /* the number of threads changes nothing, to the last bit */
        CHECK(!memcmp(rp.step, again.step, n * T * sizeof *rp.step));
        CHECK(!memcmp(rp.head, again.head, n * w.n_layer * w.H * sizeof *rp.head));
        CHECK(!memcmp(rp.bound, again.bound, n * w.n_layer * sizeof *rp.bound));
        CHECK(!memcmp(rp.coverage->layer, again.coverage->layer, n * w.n_layer * sizeof *rp.coverage->layer));
    }
    size_t room = kv_metric_room(w.n_layer, w.H, T, KV_DETAIL_STEP);
    kv_value *value = calloc(room, sizeof *value);
    for (size_t i = 0; i < n && !st; i++) {
        const kv_ranking *rk = &p.ranking[p.ranking_of[point[i].spec]];
        bool by_layer = rk->granularity == KV_GRAN_LAYER, parts = spec[point[i].spec].select == KV_SELECT_MIXDIM;
        size_t layers = i * w.n_layer, heads = layers * w.H;
        kv_point_sums in = {.n_layer = w.n_layer,
                            .n_q_head = w.H,
                            .n_row = T,
                            .number = number,
                            .head = rp.head + heads,
                            .layer_error = rp.layer_error + layers,
                            .tie = tie,
                            .evidence_kept = rp.coverage->kept + heads,
                            .span_half = rp.coverage->half + heads,
                            .cover = rp.coverage->layer + layers,
                            .bound = rp.bound + layers,
                            .gap = &gap[i],
                            .step = rp.step + i * T};
        kv_coverage_model(rp.coverage, i, &in.lost, &in.breadth);
        char *who =
            kv_format("seed %llu, %s at %u", (unsigned long long)seed, spec[point[i].spec].canonical, point[i].nominal);
        seen v = {.v = value, .n = kv_metric_values(&in, KV_M_ALL, KV_DETAIL_STEP, value), .who = who};
        CHECK(v.n <= room);
        if (parts) { /* no kept set: nothing to say about evidence and breadth */
            same(&v, KV_M_EVIDENCE_KEPT, -1, -1, -1, NAN, 0), same(&v, KV_M_BREADTH, -1, -1, -1, NAN, 0);
            same(&v, KV_M_EVIDENCE_LOST, -1, -1, -1, NAN, 0);
            free(who);
            continue;
        }
        sets s;
        if (!sets_make(&s, &w, &p, &point[i], &e)) {
            CHECKF(false, "%s: %s", who, e.msg);
        } else {
            check_rows(&s, &v, rp.bound + layers);
            check_cover(&s, &v, by_layer);
            for (uint32_t page = 1; page <= 16; page += 5) {
                kv_ledger g = {.unit_read = unit};
                if (page > 1 && kv_schedule_used(&p, point[i].spec)) continue; /* kv-sim refuses the two together */
                kv_ledger_fill(&p, point, &rp, i, page, &g);
                check_ledger(&s, &g, page, by_layer, who);
                check_prefill(&w, &spec[point[i].spec], &point[i], rk->n_unit, &g, who);
            }
        }
        CHECKF(!v.wrong && v.right > 100, "%s: %zu wrong, %zu right", who, v.wrong, v.right);
        /* a policy that is the base, or the oracle, of its own gap */
        const char *name = spec[point[i].spec].row->name;
        if (!strcmp(name, "streaming") && !isnan(gap[i])) CHECKF(fabs(gap[i]) < 1e-9, "%s: %g", who, gap[i]);
        if (!strcmp(name, "oracle") && !isnan(gap[i])) CHECKF(fabs(gap[i] - 1) < 1e-9, "%s: %g", who, gap[i]);
        if (!strcmp(name, "snapkv") && rk->granularity == KV_GRAN_KV_HEAD && BUDGETS[i % N_BUDGET] == 40) {
            double c[3];
            for (size_t k = 0; k < n; k++) {
                const char *other = spec[point[k].spec].row->name;
                int to = k == i ? 0 : !strcmp(other, "streaming") ? 1 : !strcmp(other, "oracle") ? 2 : -1;
                sets x;
                if (to < 0 || k % N_BUDGET != i % N_BUDGET ||
                    p.ranking[p.ranking_of[point[k].spec]].granularity != rk->granularity)
                    continue;
                CHECK(sets_make(&x, &w, &p, &point[k], &e));
                c[to] = contested_of(&x);
                free(x.sees);
            }
            double want = c[2] - c[1] >= 0.01 ? (c[0] - c[1]) / (c[2] - c[1]) : NAN;
            CHECKF(isnan(want) ? isnan(gap[i]) : kv_close(gap[i], want, 1e-4, 1e-4), "%s: gap %g for %g", who, gap[i],
                   want);
        }
        free(s.sees), free(who);
    }
    for (size_t i = 0; i < n; i++) free(point[i].counts);
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    free(spec), free(point), free(gap), free(unit), free(tie), free(value), free(path);
    kv_replay_free(&rp), kv_replay_free(&again), kv_plan_free(&p), kv_world_close(&w);
}

int main(void)
{
    if (!mkdtemp(dir)) return 1;
    for (uint64_t seed = 0; seed < 8; seed++) test_world(seed);
    char *rm = kv_format("rm -rf %s", dir);
    if (rm && system(rm)) perror("rm");
    free(rm);
    return kv_tally();
}
