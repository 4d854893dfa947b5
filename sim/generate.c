/* generate.c - greedy decoding of all points side by side, one token each a step. */
#include "sim/generate.h"

#include <ctype.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/kernels.h"
#include "kernels/parallel.h"
#include "sim/closed_attend.h"
#include "sim/schedule.h"
#include "traces/cli.h"
#include "traces/memtext.h"

/* One layer of a branch whose set is no prefix of a ranking. */
typedef struct {
    int32_t *at;     /* [n_unit][n_token of the run's scene] as in kv_schedule; NULL: a prefix, or nothing is evicted */
    kv_steps *steps; /* NULL: the cut fixed the set */
} follow;

/* Branch 0 is the full cache. */
typedef struct {
    const kv_plan *plan;
    kv_scene scene;         /* the prompt and n_step rows, the answer's */
    const kv_point **point; /* [n_branch - 1] */
    uint32_t n_branch, n_step, step, threads, n_vocab;
    kv_layer *layer; /* [n_layer] prompt keys and values; behind them the rows of the branch that is followed at hand */
    float **k, **v;  /* [n_layer] of [n_branch][kv_heads][n_step][d]: rows decoded so far */
    float **q;       /* [n_layer] of [n_branch][q_heads][n_step][d], where branches are followed; else of nothing */
    follow *follow;  /* [n_branch][n_layer] */
    uint32_t branch; /* followed at hand */
    bool follows;    /* some branch does */
    uint32_t *next;  /* [n_branch] */
    const kv_attn_view *a;
    kv_status *st;
    kv_error *err;
} run;

static follow *follow_of(const run *g, uint32_t branch, uint32_t layer)
{
    return &g->follow[(size_t)branch * g->plan->scene->info->n_layer + layer];
}

static kv_status attend_head(run *g, uint32_t branch, uint32_t kv, kv_error *err)
{
    const kv_attn_view *a = g->a;
    const kv_layer *l = &g->layer[a->layer];
    if (follow_of(g, branch, a->layer)->at) return KV_OK;
    const kv_scene *sc = g->plan->scene;
    const kv_point *p = branch ? g->point[branch - 1] : NULL;
    bool ranked = l->order != KV_NEVER_EVICTS;
    bool each = p && ranked && g->plan->ranking[g->plan->ranking_of[p->spec]].n_unit > l->n_kv_head;
    size_t d = l->d, own = (((size_t)branch * l->n_kv_head + kv) * g->n_step) * d, n = 0, t = g->step + 1;
    float *k = NULL, *v = NULL, lse;
    kv_status st = kv_array(&k, (sc->n_cut + t) * d, sizeof *k, err);
    if (!st) st = kv_array(&v, (sc->n_cut + t) * d, sizeof *v, err);
    float *mine_k = g->k[a->layer] + own, *mine_v = g->v[a->layer] + own;
    memcpy(mine_k + g->step * d, a->k + ((size_t)kv * a->kv_stride + branch) * d, d * sizeof *k);
    memcpy(mine_v + g->step * d, a->v + ((size_t)kv * a->kv_stride + branch) * d, d * sizeof *v);
    for (uint32_t q = kv * l->group; q < (kv + 1) * l->group && !st; q++) {
        if (q == kv * l->group || each) {
            n = kv_gather_kept(g->plan, p, ranked, l, q, k, v);
            memcpy(k + n * d, mine_k, t * d * sizeof *k);
            memcpy(v + n * d, mine_v, t * d * sizeof *v);
        }
        uint32_t window = ranked ? 0 : sc->info->window[l->index];
        kv_attn_shape s = {1, n + t, d, n + t - 1, window, l->scale, l->softcap};
        float *out = a->out + ((size_t)branch * l->n_q_head + q) * d;
        if (!kv_attention(&s, a->q + ((size_t)q * a->n_row + branch) * d, k, v, out, d, &lse, NULL))
            st = kv_fail(err, KV_ENOMEM, "out of memory");
    }
    free(k), free(v);
    return st;
}

static void attend_task(void *ctx, size_t i)
{
    run *g = ctx;
    uint32_t heads = g->layer[0].n_kv_head;
    g->st[i] = attend_head(g, (uint32_t)(i / heads), (uint32_t)(i % heads), &g->err[i]);
}

/* ------------------------------------------------------------------------------------------------ followed branches */
/* The branch's rows behind the prompt of its layer, and their queries. */
static void lend_rows(run *g, uint32_t branch)
{
    const kv_attn_view *a = g->a;
    kv_layer *l = &g->layer[a->layer];
    size_t d = l->d, N = g->scene.n_token, t = g->step, rows = g->n_step;
    for (uint32_t h = 0; h < l->n_kv_head; h++) {
        size_t own = ((size_t)branch * l->n_kv_head + h) * rows * d, to = (h * N + g->scene.n_prompt) * d;
        float *k = g->k[a->layer] + own, *v = g->v[a->layer] + own;
        memcpy(k + t * d, a->k + ((size_t)h * a->kv_stride + branch) * d, d * sizeof *k);
        memcpy(v + t * d, a->v + ((size_t)h * a->kv_stride + branch) * d, d * sizeof *v);
        memcpy(l->k + to, k, (t + 1) * d * sizeof *k), memcpy(l->v + to, v, (t + 1) * d * sizeof *v);
    }
    for (uint32_t h = 0; h < l->n_q_head; h++) {
        float *q = g->q[a->layer] + ((size_t)branch * l->n_q_head + h) * rows * d;
        memcpy(q + t * d, a->q + ((size_t)h * a->n_row + branch) * d, d * sizeof *q);
        memcpy(l->q_row + h * rows * d, q, (t + 1) * d * sizeof *q);
    }
}

static kv_status follow_head(run *g, uint32_t kv, kv_error *err)
{
    const kv_layer *l = &g->layer[g->a->layer];
    const kv_point *p = g->point[g->branch - 1];
    const int32_t *at = follow_of(g, g->branch, g->a->layer)->at;
    uint32_t U = g->plan->ranking[g->plan->ranking_of[p->spec]].n_unit, row = g->scene.n_prompt + g->step;
    kv_list_room room;
    kv_status st = kv_list_room_open(l, &room, err);
    for (uint32_t i = 0; i < l->group && !st; i++) {
        uint32_t h = kv * l->group + i, n = 0;
        const int32_t *mine = at + (size_t)kv_unit_of(U, l->n_kv_head, l->n_q_head, h) * g->scene.n_token;
        for (uint32_t k = 0; k <= row; k++)
            if (mine[k] < 0 || (uint32_t)mine[k] > g->step) room.list[n++] = k;
        st = kv_attend_list(l, g->plan->spec[p->spec].reindex, NULL, h, row, kv_step_query(l, h, g->step), room.list, n,
                            !i || U > l->n_kv_head, &room, g->a->out + ((size_t)g->branch * l->n_q_head + h) * l->d,
                            err);
    }
    kv_list_room_close(&room);
    return st;
}

static void follow_task(void *ctx, size_t i)
{
    run *g = ctx;
    g->st[i] = follow_head(g, (uint32_t)i, &g->err[i]);
}

static kv_status first_failure(const run *g, size_t n, kv_error *err)
{
    for (size_t i = 0; i < n; i++)
        if (g->st[i]) return *err = g->err[i], g->st[i];
    return KV_OK;
}

static kv_status on_attend(void *ctx, const kv_attn_view *a, bool *done, kv_error *err)
{
    run *g = ctx;
    size_t heads = g->layer[0].n_kv_head;
    g->a = a;
    kv_parallel(g->n_branch * heads, g->threads, attend_task, g);
    kv_status st = first_failure(g, g->n_branch * heads, err);
    for (uint32_t b = 1; b < g->n_branch && !st; b++) {
        follow *f = follow_of(g, b, a->layer);
        if (!f->at) continue;
        g->branch = b;
        lend_rows(g, b);
        kv_parallel(heads, g->threads, follow_task, g);
        st = first_failure(g, heads, err);
        if (!st && f->steps) st = kv_steps_row(f->steps, g->step, err);
    }
    *done = !st;
    return st;
}

static kv_status on_logits(void *ctx, uint32_t row0, uint32_t n_row, const float *logits, kv_error *err)
{
    run *g = ctx;
    (void)err;
    for (uint32_t i = 0; i < n_row; i++) {
        const float *l = logits + (size_t)i * g->n_vocab;
        uint32_t best = 0;
        for (uint32_t j = 1; j < g->n_vocab; j++)
            if (l[j] > l[best]) best = j;
        g->next[row0 + i] = best;
    }
    return KV_OK;
}

/* Rules that see what is to come, or hide what may come back, are not followed; nor keys that are held in part. */
static bool able(const kv_plan *p, const kv_point *point)
{
    const kv_spec *s = &p->spec[point->spec];
    if (!kv_schedule_used(p, point->spec)) return true;
    return !s->file && !(s->oracle & KV_ORACLE_STEPS) && s->select != KV_SELECT_MIXDIM &&
           !(kv_decode_rules[s->decode].flags & (KV_RULE_FORESEES | KV_RULE_HIDES));
}

/* heads x n rows of d as heads x room rows; those that are too many are left out. */
static kv_status relay(float **p, size_t heads, size_t n, size_t room, size_t d, kv_error *err)
{
    float *to = NULL;
    kv_status st = kv_array(&to, heads * room * d, sizeof *to, err);
    for (size_t h = 0; h < heads && !st; h++)
        memcpy(to + h * room * d, *p + h * n * d, (n < room ? n : room) * d * sizeof *to);
    if (!st) free(*p), *p = to;
    return st;
}

/* The branch's set after the cut, where the cut fixes it: from the layer as the plan's scene has it. */
static kv_status fixed_set(const run *g, const kv_point *p, kv_layer *l, int32_t *at, kv_error *err)
{
    const kv_scene *sc = g->plan->scene;
    size_t N = g->scene.n_token;
    kv_schedule sch;
    kv_status st = kv_schedule_make(g->plan, p->spec, &p->c, p->counts, l, &sch, err);
    if (st) return st;
    for (uint32_t u = 0; u < sch.n_unit; u++)
        for (uint32_t i = 0; i < sc->n_cut; i++)
            if (!kv_schedule_visible(&sch, sc, u, i, 0)) at[u * N + i] = 0;
    kv_schedule_free(&sch);
    return KV_OK;
}

/* Branches that are no prefixes: sets that the cut fixes, then room in the layer for the answer's rows, then rules that
 * go on, which begin on that. */
static kv_status follow_layer(run *g, uint32_t layer, kv_error *err)
{
    kv_layer *l = &g->layer[layer];
    size_t N = g->scene.n_token, before = g->plan->scene->n_token;
    kv_status st = KV_OK;
    for (int rules = 0; rules < 2 && !st; rules++) {
        if (rules) {
            st = relay(&l->k, l->n_kv_head, before, N, l->d, err);
            if (!st) st = relay(&l->v, l->n_kv_head, before, N, l->d, err);
            if (!st) st = relay(&l->q_row, l->n_q_head, g->plan->scene->n_row, g->n_step, l->d, err);
            l->scene = &g->scene;
        }
        for (uint32_t b = 1; b < g->n_branch && !st && l->order != KV_NEVER_EVICTS; b++) {
            const kv_point *p = g->point[b - 1];
            follow *f = follow_of(g, b, layer);
            size_t n = g->plan->ranking[g->plan->ranking_of[p->spec]].n_unit * N;
            if (!kv_schedule_used(g->plan, p->spec) || kv_schedule_fixed(&g->plan->spec[p->spec]) == rules) continue;
            st = kv_array(&f->at, n, sizeof *f->at, err);
            for (size_t i = 0; i < n && !st; i++) f->at[i] = -1;
            if (!st)
                st = rules ? kv_steps_open(g->plan, p->spec, &p->c, p->counts, l, f->at, &f->steps, err)
                           : fixed_set(g, p, l, f->at, err);
        }
    }
    return st;
}

static kv_status load(run *g, const kv_model *m, kv_error *err)
{
    const kv_scene *sc = g->plan->scene;
    uint32_t L = m->desc.n_layer;
    kv_status st = kv_array(&g->layer, L, sizeof *g->layer, err);
    if (!st) st = kv_array(&g->k, L, sizeof *g->k, err);
    if (!st) st = kv_array(&g->v, L, sizeof *g->v, err);
    if (!st) st = kv_array(&g->q, L, sizeof *g->q, err);
    if (!st) st = kv_array(&g->follow, (size_t)g->n_branch * L, sizeof *g->follow, err);
    for (uint32_t i = 0; i < L && !st; i++) {
        size_t room = 0;
        st = kv_layer_load_at(sc, i, g->follows ? KV_NEED_FUTURE | g->plan->needs : 0, g->plan->max_window,
                              &g->layer[i], err);
        if (!st && (!kv_mul((size_t)g->n_branch * g->n_step, (size_t)sc->info->n_q_head * sc->info->head_dim, &room)))
            st = kv_fail(err, KV_ENOMEM, "too many branches");
        if (!st) st = kv_array(&g->k[i], room, sizeof(float), err);
        if (!st) st = kv_array(&g->v[i], room, sizeof(float), err);
        if (!st && g->follows) st = kv_array(&g->q[i], room, sizeof(float), err);
        if (!st && g->follows) st = follow_layer(g, i, err);
    }
    return st;
}

/* The full cache's most likely token after the prompt: the first of the ids recorded with its best logits. */
static kv_status first_token(run *g, kv_error *err)
{
    const kv_scene *sc = g->plan->scene;
    uint32_t width = kv_trace_width(sc->trace, KV_S_LOGITS), at = sc->n_prompt - 1;
    float *row = NULL;
    if (!width || !kv_trace_has(sc->trace, KV_S_LOGITS, 0, 0, at, at + 1))
        return kv_fail(err, KV_EMISSING,
                       "trace '%s' does not hold the logits of its prompt's last row: capture it again",
                       kv_trace_path(sc->trace));
    kv_status st = kv_array(&row, width, sizeof *row, err);
    if (!st) st = kv_trace_read_f32(sc->trace, KV_S_LOGITS, 0, 0, at, at + 1, row, err);
    for (uint32_t b = 0; b < g->n_branch && !st; b++) g->next[b] = (uint32_t)row[0];
    free(row);
    return st;
}

kv_status kv_generate(const kv_plan *p, const kv_point *point, size_t n_point, const kv_model *m, uint32_t threads,
                      void (*tick)(void *ctx, double done), void *ctx, kv_generated *out, kv_error *err)
{
    const uint32_t n_step = KV_GENERATE_STEPS;
    const kv_scene *sc = p->scene;
    run g = {.plan = p, .scene = *sc, .n_step = n_step, .threads = threads, .n_vocab = m->desc.n_vocab, .n_branch = 1};
    kv_engine *e = NULL;
    size_t *of = NULL, n;
    uint32_t eos = kv_model_eos(m);
    kv_engine_options o = {
        .dtype = sc->info->dtype, .threads = threads, .capacity = sc->n_prompt + n_step, .no_cache = true};
    *out = (kv_generated){.n_point = n_point, .n_step = n_step};
    if (sc->n_cut != sc->n_prompt)
        return kv_fail(err, KV_EMISUSE, "--generate works with --cut prompt: the question must be in the cache");
    g.scene.n_row = n_step, g.scene.n_token = sc->n_prompt + n_step;
    if (!kv_mul(n_point + 1, n_step, &n)) return kv_fail(err, KV_ENOMEM, "too many points");
    kv_status st = kv_array(&out->token, n, sizeof *out->token, err);
    if (!st) st = kv_array(&out->able, n_point + 1, sizeof *out->able, err);
    if (!st) st = kv_array(&of, n_point + 1, sizeof *of, err);
    if (!st) st = kv_array(&g.point, n_point + 1, sizeof *g.point, err);
    for (size_t i = 0; i < n && !st; i++) out->token[i] = UINT32_MAX;
    for (size_t i = 0; i < n_point && !st; i++)
        if ((out->able[i] = able(p, &point[i]))) {
            of[g.n_branch] = i, g.point[g.n_branch++ - 1] = &point[i];
            g.follows |= kv_schedule_used(p, point[i].spec);
        }
    if (!st) of[0] = n_point, st = kv_array(&g.next, g.n_branch, sizeof *g.next, err);
    if (!st) st = kv_array(&g.st, (size_t)g.n_branch * sc->info->n_kv_head, sizeof *g.st, err);
    if (!st) st = kv_array(&g.err, (size_t)g.n_branch * sc->info->n_kv_head, sizeof *g.err, err);
    if (!st) st = load(&g, m, err);
    if (!st) st = kv_engine_open_cpu(m, &o, &e, err);
    if (!st) st = first_token(&g, err);
    kv_engine_hook hook = {.ctx = &g, .attend = on_attend, .logits = on_logits};
    for (uint32_t t = 0; t < n_step && !st; t++) {
        for (uint32_t b = 0; b < g.n_branch; b++) {
            uint32_t *seq = out->token + of[b] * n_step;
            if (!t || seq[t - 1] != UINT32_MAX) seq[t] = g.next[b] == eos ? UINT32_MAX : g.next[b];
        }
        g.step = t;
        if (t + 1 < n_step) st = kv_engine_branches(e, g.next, sc->n_prompt + t, 1, g.n_branch, &hook, err);
        if (tick) tick(ctx, (t + 1.0) / n_step);
    }
    kv_engine_close(e);
    for (uint32_t l = 0; l < m->desc.n_layer && g.layer; l++) {
        kv_layer_free(&g.layer[l]);
        if (g.k) free(g.k[l]);
        if (g.v) free(g.v[l]);
        if (g.q) free(g.q[l]);
        for (uint32_t b = 0; b < g.n_branch && g.follow; b++)
            kv_steps_close(follow_of(&g, b, l)->steps), free(follow_of(&g, b, l)->at);
    }
    free(g.layer), free(g.k), free(g.v), free(g.q), free(g.follow), free(g.next), free(g.st), free(g.err),
        free(g.point), free(of);
    if (st) kv_generated_free(out);
    return st;
}

void kv_generated_free(kv_generated *g)
{
    free(g->token), free(g->able);
    *g = (kv_generated){0};
}

/* ------------------------------------------------------------------------------------------------ judging */
uint32_t kv_first_divergence(const kv_generated *g, size_t i)
{
    const uint32_t *a = g->token + i * g->n_step, *full = g->token + g->n_point * g->n_step;
    uint32_t t = 0;
    while (t < g->n_step && a[t] == full[t]) t++;
    return t;
}

/* Lower case, runs of white space as one blank, none at the ends; malloc'd. */
static char *fold(const char *s, size_t n)
{
    char *out = malloc(n + 1);
    size_t m = 0;
    for (size_t i = 0; out && i < n; i++) {
        bool space = isspace((unsigned char)s[i]) != 0;
        if (space && (!m || out[m - 1] == ' ')) continue;
        out[m++] = space ? ' ' : (char)tolower((unsigned char)s[i]);
    }
    while (out && m && out[m - 1] == ' ') m--;
    if (out) out[m] = 0;
    return out;
}

static void look_for(const char *text, const char *s, size_t n, uint32_t *found, uint32_t *wanted)
{
    char *folded = fold(s, n);
    if (folded && *folded) ++*wanted, *found += strstr(text, folded) != NULL;
    free(folded);
}

double kv_answer_found(const kv_generated *g, size_t i, const kv_model *m, const kv_trace_info *info)
{
    json_t *extra = info->extra ? json_loads(info->extra, JSON_ALLOW_NUL, NULL) : NULL;
    json_t *prompt = json_object_get(extra, "prompt"), *answers = json_object_get(prompt, "answers");
    const char *answer = json_string_value(json_object_get(prompt, "answer"));
    uint32_t found = 0, wanted = 0;
    char *bytes = NULL, *text = NULL;
    size_t n = 0, k;
    json_t *one;
    FILE *f = m->tok ? kv_text_stream(&bytes, &n) : NULL;
    for (uint32_t t = 0; f && t < g->n_step && g->token[i * g->n_step + t] != UINT32_MAX; t++) {
        size_t len;
        const char *piece = kv_model_token_bytes(m, g->token[i * g->n_step + t], &len);
        if (piece) fwrite(piece, 1, len, f);
    }
    if (f && !fclose(f)) text = fold(bytes, n);
    if (text) {
        json_array_foreach(answers, k, one) if (json_is_string(one))
            look_for(text, json_string_value(one), json_string_length(one), &found, &wanted);
        for (const char *p = wanted ? NULL : answer; p && *p;) {
            size_t digits = strspn(p, "0123456789");
            if (digits >= 4) look_for(text, p, digits, &found, &wanted);
            p += digits ? digits : 1;
        }
        if (!wanted && answer) look_for(text, answer, strlen(answer), &found, &wanted);
    }
    free(bytes), free(text);
    json_decref(extra);
    return wanted ? (double)found / wanted : NAN;
}

size_t kv_generated_values(const kv_generated *g, size_t i, const kv_model *m, const kv_trace_info *info,
                           kv_metric_set wanted, kv_value *out)
{
    size_t n = 0;
    double found = g->able[i] ? kv_answer_found(g, i, m, info) : NAN;
    if (wanted >> KV_M_ANSWER_FOUND & 1) out[n++] = (kv_value){KV_M_ANSWER_FOUND, -1, -1, -1, found, 1};
    if (wanted >> KV_M_FIRST_DIVERGENCE & 1)
        out[n++] =
            (kv_value){KV_M_FIRST_DIVERGENCE, -1, -1, -1, g->able[i] ? (double)kv_first_divergence(g, i) : NAN, 1};
    return n;
}
