/* sim_run.c - `kv-sim run`: traces x policies x budgets into results.db. Only what is missing is computed. */
#include <malloc.h>
#include <math.h>
#include <stdlib.h>

#include "kernels/blas.h"
#include "kernels/parallel.h"
#include "sim/bounds.h"
#include "sim/closed.h"
#include "sim/commands.h"
#include "sim/gap_closed.h"
#include "sim/generate.h"
#include "sim/measure_gpu.h"
#include "sim/oracle.h"
#include "sim/results.h"
#include "sim/schedule.h"
#include "traces/plain.h"

static const char HELP[] =
    "usage: kv-sim run TRACE.. -p POLICY[,..] -b BUDGET[,..] --db results.db [options]\n"
    "\n"
    "Replays every policy at every budget against the recorded attention and stores recall and output error by layer "
    "and\n"
    "head. Runs that are in the database already are not computed again; a killed sweep leaves whole runs.\n"
    "\n"
    "  -p, --policy P        policies, e.g. snapkv,cake:alpha=0.2 (see `kv-sim policies`); repeatable\n"
    "  -b, --budget B        512 (tokens per KV head and layer), 5%, 64MiB, ratio=0.9, auto (16 values); repeatable\n"
    "      --db FILE         results database (results.db)\n"
    "  -j N                  threads (all cores); the results do not depend on it\n"
    "      --granularity G   query_head, kv_head or layer, for every policy\n"
    "      --protect S       sink=4,recent=32,segment=NAME: kept first, inside the budget, by every policy\n"
    "      --page N          whole pages of N tokens are kept or dropped\n"
    "      --cut C           prompt (default) or context: cut before the question is seen\n"
    "      --decode-rows N   of a prompt-only trace: the last N rows are the measured ones\n"
    "      --metrics LIST    e.g. recall,layer_error or default,gap_closed or all (see `kv-sim metrics`)\n"
    "      --detail D        run, layer (default), head, or step: how finely metrics are stored; step = by head, and "
    "every\n"
    "                        measured row over all layers and heads\n"
    "      --match-bytes     rescale every policy's budget until it holds the bytes that the budget means\n"
    "      --shard I/N       the I-th of N parts of the work, for arrays of jobs; merge the databases afterwards\n"
    "      --seed S          of random policies (0)\n"
    "      --gap             also what `kv-analyze gap` needs: each policy with its order, heads and layers in the "
    "hands\n"
    "                        of an oracle, and the oracle of its class (up to 18 more runs a policy and budget)\n"
    "      --mem-limit B     e.g. 2GiB: fewer layers at a time, so that memory stays below it; a trace may be larger\n"
    "      --backend B       auto: policies are ranked and measured on a CUDA device where there is one; cpu; cuda: "
    "the\n"
    "                        model runs there too (in the trace's dtype; policies that decide while decoding are "
    "refused)\n"
    "      --model MODEL     run the model itself with the evicted cache: delta_nll, kl, top1_agree, top5_overlap\n"
    "      --generate        with --model: let it answer by itself, 64 greedy tokens: answer_found, first_divergence\n"
    "\n"
    "  kv-sim run traces/samples/*.kvt -p snapkv,cake,oracle -b 5%,20% --db results.db\n"
    "  kv-sim run traces/samples/prose.kvt -p 'snapkv:window=16|32|64' -b auto --db results.db\n";

#define UNMATCHED 0.05 /* bytes off by more than this share are worth a note */

typedef struct {
    kv_request rq;
    const char *db, *metrics, *detail_name, *shard, *backend, *model_path;
    kv_model *model;  /* NULL without --model */
    kv_gpu_pass *gpu; /* NULL: on the CPU */
    bool model_cuda;  /* the model runs on the device */
    kv_closed_device device;
    bool generate;
    uint32_t jobs, shard_i, shard_n;
    uint32_t layers; /* of the trace under way: no more than so many threads have work */
    kv_metric_set wanted;
    uint64_t mem_limit;
    int detail;
    bool gap;
    bool match;
    size_t n_new, n_old;
} options;

static kv_status resolve(options *o, kv_error *err)
{
    static const char *const DETAIL[] = {"run", "layer", "head", "step"};
    kv_status st = kv_request_resolve(&o->rq, err);
    if (!st && o->gap) st = kv_request_add_gap(&o->rq, err);
    if (st) return st;
    if (!o->db) o->db = "results.db";
    if (!o->jobs) o->jobs = kv_cpu_count();
    if (!o->backend) o->backend = "auto";
    if (strcmp(o->backend, "auto") && strcmp(o->backend, "cpu") && strcmp(o->backend, "cuda"))
        return kv_fail(err, KV_EMISUSE, "--backend '%s': want auto, cpu or cuda", o->backend);
    o->detail = -1;
    for (int d = 0; d < 4; d++)
        if (!strcmp(o->detail_name ? o->detail_name : "layer", DETAIL[d])) o->detail = d;
    if (o->detail < 0) return kv_fail(err, KV_EMISUSE, "--detail '%s': want run, layer, head or step", o->detail_name);
    if (o->generate && !o->model_path)
        return kv_fail(err, KV_EMISUSE, "--generate needs --model MODEL, the file the traces were captured with");
    if (o->generate && !strcmp(o->backend, "cuda"))
        return kv_fail(err, KV_EMISUSE, "--generate runs on the CPU: leave out --backend cuda");
    for (size_t i = 0; i < o->rq.n_spec && o->model_path && !strcmp(o->backend, "cuda"); i++)
        if ((st = kv_closed_on_device(&o->rq.spec[i], err))) return st;
    kv_metric_set possible = KV_M_ALL & ~(!o->model_path ? KV_M_CLOSED : 0) & ~(!o->generate ? KV_M_GENERATED : 0);
    if ((st = kv_metric_parse(o->metrics, possible, &o->wanted, err))) return st;
    for (size_t b = 0; b < o->rq.n_budget && o->match; b++) { /* a label of its own: another series */
        kv_budget *x = &o->rq.budget[b];
        size_t n = strlen(x->text);
        snprintf(x->text + n, sizeof x->text - n, " matched");
    }
    o->shard_n = 1;
    return o->shard ? kv_parse_shard(o->shard, &o->shard_i, &o->shard_n, err) : KV_OK;
}

/* What decides the numbers, and the budget's label: "5%" and "16" may be the same tokens, and are two rows. */
static kv_status run_id(const kv_scene *sc, const kv_spec *s, const char *cut, const kv_budget *b,
                        const kv_budget_resolved *c, char out[33], kv_error *err)
{
    char hex[65],
        *text = kv_format("kvtrace run 1\n%s\n%s\n%s\n%s\n%u\n%.17g\n%u\n", kv_trace_content_sha256(sc->trace),
                          s->canonical, cut, b->text, c->tokens, c->real, sc->n_row);
    kv_sha256 h;
    kv_status st = text ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory");
    kv_sha256_init(&h);
    if (!st) kv_sha256_update(&h, text, strlen(text));
    const char *const files[] = {s->file, s->importance, s->mean_file, s->cov_file};
    for (int i = 0; i < 4 && !st; i++) { /* what the files hold, not only their names */
        char sum[65];
        if (!files[i]) continue;
        st = kv_sha256_file(files[i], sum, err);
        kv_sha256_update(&h, sum, strlen(sum));
    }
    kv_sha256_hex(&h, hex);
    snprintf(out, 33, "%.32s", hex);
    free(text);
    return st;
}

/* Shards split by (trace, ranking), so that policies that share a ranking stay together. */
static bool in_shard(const options *o, const kv_scene *sc, const kv_spec *s)
{
    if (o->shard_n == 1) return true;
    char hex[65], part[9];
    kv_sha256 h;
    kv_sha256_init(&h);
    kv_sha256_update(&h, kv_trace_content_sha256(sc->trace), 64);
    kv_sha256_update(&h, s->ranking_key, strlen(s->ranking_key));
    kv_sha256_hex(&h, hex);
    snprintf(part, sizeof part, "%.8s", hex);
    return strtoul(part, NULL, 16) % o->shard_n == o->shard_i;
}

static void tick(void *bar, size_t done)
{
    kv_progress_step(bar, (double)done, NULL);
}

static void closed_tick(void *bar, double done)
{
    kv_progress_step(bar, done, NULL);
}

/* Two specs that kept the same sets at every budget where something was chosen: usually an option that does nothing. */
static kv_status twins(const kv_plan *p, const kv_point *point, size_t n, uint32_t threads, const char *path,
                       kv_error *err)
{
    uint64_t *print = NULL;
    kv_status st = kv_array(&print, n, sizeof *print, err);
    if (!st) kv_points_print(p, point, n, threads, print);
    for (size_t i = 0; i < n && !st; i++)
        if (kv_schedule_used(p, point[i].spec)) print[i] = i;
    for (size_t a = 0; a < p->n_spec && !st; a++)
        for (size_t b = a + 1; b < p->n_spec; b++) {
            size_t same = 0, differ = 0;
            if (p->spec[a].oracle || p->spec[b].oracle) continue; /* corners of a decomposition coincide by design */
            for (size_t i = 0; i < n; i++)
                for (size_t k = 0; k < n && point[i].spec == a; k++) {
                    if (point[k].spec != b || point[k].budget != point[i].budget) continue;
                    uint32_t least = p->ranking[p->ranking_of[a]].n_forced,
                             other = p->ranking[p->ranking_of[b]].n_forced;
                    bool chosen =
                        point[i].c.tokens < p->scene->n_cut && point[i].c.tokens > (least > other ? least : other);
                    if (chosen) *(print[i] == print[k] ? &same : &differ) += 1;
                }
            if (same && !differ)
                fprintf(stderr,
                        "kv-sim: note: %s and %s kept the same sets at every budget of '%s' (%zu): is a parameter "
                        "without effect?\n",
                        kv_plain(p->spec[a].canonical).s, kv_plain(p->spec[b].canonical).s, kv_plain(path).s, same);
        }
    free(print);
    return st;
}

/* What the replay measured of one point. */
static kv_point_sums point_sums(const kv_scene *sc, const kv_replay *rp, size_t i)
{
    size_t layers = i * sc->n_evict, heads = layers * sc->info->n_q_head;
    kv_point_sums in = {.n_layer = sc->n_evict,
                        .n_q_head = sc->info->n_q_head,
                        .n_row = sc->n_row,
                        .head = rp->head + heads,
                        .layer_error = rp->layer_error ? rp->layer_error + layers : NULL,
                        .bound = rp->bound ? rp->bound + layers : NULL,
                        .step = rp->step ? rp->step + i * sc->n_row : NULL};
    if (rp->coverage) {
        in.cover = rp->coverage->layer + layers;
        kv_coverage_model(rp->coverage, i, &in.lost, &in.breadth);
        if (rp->coverage->evidence.n_token)
            in.evidence_kept = rp->coverage->kept + heads, in.span_half = rp->coverage->half + heads;
    }
    return in;
}

/* Runs of one trace that are missing: plan, replay, write. */
static kv_status run_trace(options *o, kv_results *db, const char *path, kv_error *err)
{
    kv_trace *t = NULL;
    kv_scene sc = {0};
    kv_plan plan = {0};
    kv_replay rp = {0};
    kv_closed closed = {0};
    kv_generated answers = {0};
    kv_spec *spec = NULL;
    kv_point *point = NULL;
    kv_value *value = NULL;
    char(*id)[33] = NULL;
    uint32_t *number = NULL;
    kv_tie_count *tie = NULL;
    size_t n_old = 0, n_spec = 0, n_point = 0, room = o->rq.n_spec * o->rq.n_budget;
    kv_progress *bar = NULL;
    bool open = false;
    int64_t trace_id = 0;
    double *gap = NULL;
    kv_ledger ledger = {0};
    double began = kv_seconds(CLOCK_MONOTONIC);
    kv_status st = kv_trace_open(path, &t, err);
    if (!st) st = kv_scene_open(t, o->rq.cut, o->rq.decode_rows, &sc, err);
    o->layers = sc.n_evict;
    sc.n_asked = room, sc.mem_limit = o->mem_limit, sc.gpu = o->gpu;
    sc.wanted = o->wanted | (o->detail >= KV_DETAIL_STEP ? KV_M_STEPS : 0);
    if (!st) st = kv_array(&spec, o->rq.n_spec, sizeof *spec, err);
    if (!st) st = kv_array(&point, room, sizeof *point, err);
    if (!st) st = kv_array(&id, room, sizeof *id, err);
    for (size_t i = 0; i < o->rq.n_spec && !st; i++) {
        bool used = false;
        if (!in_shard(o, &sc, &o->rq.spec[i])) continue;
        for (size_t b = 0; b < o->rq.n_budget && !st; b++) {
            kv_point p = {
                .spec = n_spec,
                .budget = b,
                .c = kv_budget_resolve(&o->rq.budget[b], sc.n_cut, sc.slot_bytes, sc.n_evict, sc.info->n_kv_head)};
            bool has = false;
            p.nominal = p.c.tokens;
            st = run_id(&sc, &o->rq.spec[i], o->rq.cut, &o->rq.budget[b], &p.c, id[n_point], err);
            if (!st) st = kv_results_has(db, id[n_point], o->detail, o->wanted, &has, err);
            if (has)
                n_old++;
            else
                point[n_point++] = p, used = true;
        }
        if (used) spec[n_spec++] = o->rq.spec[i];
    }
    if (st || !n_point) goto out;
    bar = kv_progress_start(path, sc.n_evict, "layers");
    st = kv_plan_build(&sc, spec, n_spec, o->jobs, &plan, err);
    if (!st) st = kv_points_count(&plan, point, n_point, o->jobs, err);
    if (!st && o->match) st = kv_ledger_match(&plan, point, n_point, o->jobs, err);
    bool want_gap = o->wanted >> KV_M_GAP_CLOSED & 1;
    kv_metric_set measure =
        o->wanted | (want_gap ? KV_M_BIT(KV_M_RECALL_CONTESTED) : 0) | (o->detail >= KV_DETAIL_STEP ? KV_M_STEPS : 0);
    if (!st) st = kv_replay_run(&plan, point, n_point, measure, o->jobs, tick, bar, &rp, err);
    if (!st && want_gap) st = kv_array(&gap, n_point, sizeof *gap, err);
    if (!st && want_gap) st = kv_gap_closed(&plan, point, n_point, &rp, o->jobs, gap, err);
    kv_progress_end(bar), bar = NULL;
    if (!st && o->wanted & KV_M_CLOSED & ~KV_M_GENERATED) {
        bar = kv_progress_start("closed loop", 1, "");
        st = kv_closed_run(&plan, point, n_point, o->model, o->jobs, o->model_cuda ? &o->device : NULL, closed_tick,
                           bar, &closed, err);
        kv_progress_end(bar), bar = NULL;
        if (!st && o->model_cuda)
            fprintf(stderr, "kv-sim: %u branches of %u rows behind %u tokens in %.2f s on the GPU\n", closed.n_branch,
                    sc.n_token - sc.n_cut, sc.n_cut, closed.wall_s);
    }
    if (!st && o->wanted & KV_M_GENERATED) {
        bar = kv_progress_start("answers", 1, "");
        st = kv_generate(&plan, point, n_point, o->model, o->jobs, closed_tick, bar, &answers, err);
    }
    if (!st)
        st = kv_array(&value,
                      kv_metric_room(sc.n_evict, sc.info->n_q_head, sc.n_row, o->detail) +
                          KV_CLOSED_ROOM(sc.n_evict, sc.n_row),
                      sizeof *value, err);
    if (!st) st = kv_array(&number, sc.n_evict, sizeof *number, err);
    if (!st) st = kv_array(&tie, sc.n_evict, sizeof *tie, err);
    if (!st) st = kv_array(&ledger.unit_read, (size_t)sc.n_evict * sc.info->n_q_head, sizeof(double), err);
    for (uint32_t l = 0; l < sc.n_evict && !st; l++) number[l] = sc.info->layer[sc.evict[l]];
    if (!st) st = kv_results_begin(db, err);
    open = !st;
    if (!st) st = kv_results_trace(db, t, &sc, &trace_id, err);
    double wall = kv_seconds(CLOCK_MONOTONIC) - began;
    for (size_t i = 0; i < n_point && !st; i++) {
        const kv_ranking *rk = &plan.ranking[plan.ranking_of[point[i].spec]];
        kv_ledger_fill(&plan, point, &rp, i, o->rq.page ? o->rq.page : 1, &ledger);
        double off = ledger.match_bytes > 0 ? ledger.mean_bytes / ledger.match_bytes - 1 : 0;
        if (o->match && fabs(off) > UNMATCHED)
            fprintf(stderr, "kv-sim: note: %s at %s of '%s' holds %+.0f %% bytes: no budget comes nearer\n",
                    spec[point[i].spec].row->name, o->rq.budget[point[i].budget].text, kv_plain(path).s, 100 * off);
        kv_run run = {.spec = &spec[point[i].spec],
                      .budget = &o->rq.budget[point[i].budget],
                      .c = point[i].c,
                      .nominal = point[i].nominal,
                      .nominal_frac = sc.n_cut ? (double)point[i].nominal / sc.n_cut : 0,
                      .matched = o->match,
                      .cut = o->rq.cut,
                      .protect = o->rq.protect,
                      .page = o->rq.page ? o->rq.page : 1,
                      .rows = sc.n_row,
                      .seed = o->rq.seed,
                      .detail = o->detail,
                      .wanted = o->wanted,
                      .granularity = (const char *[]){"query_head", "kv_head", "layer"}[rk->granularity],
                      .ledger = &ledger,
                      .counts = point[i].counts,
                      .number = number,
                      .n_layer = sc.n_evict,
                      .n_unit = rk->n_unit,
                      .value = value,
                      .own_output = rp.own_output,
                      .wall_s = wall / (double)n_point};
        memcpy(run.run_id, id[i], sizeof run.run_id);
        kv_corner corner = {0};
        st = kv_corner_of(run.spec, &corner, err);
        char *oracle = NULL, *class = NULL;
        if (!st) st = kv_oracle_of(run.spec, &oracle, &class, err);
        run.oracle = oracle ? oracle : "";
        run.base = corner.base, run.corner = corner.parts, run.target = corner.target;
        for (uint32_t l = 0; l < sc.n_evict; l++)
            kv_plan_ambiguous(&plan, point[i].spec, point[i].counts, l, &tie[l].tied, &tie[l].kept);
        /* total variation is 1 - recall, and the distance of the means a quotient of the two errors, unless keys were
         * rotated anew or are only in part there */
        kv_metric_set shown = o->wanted & ~(kv_bounds_apply(run.spec) ? KV_M_BIT(KV_M_TOTAL_VARIATION)
                                                                      : KV_M_BIT(KV_M_VALUE_DISTANCE) | KV_M_BOUNDS);
        kv_point_sums in = point_sums(&sc, &rp, i);
        in.number = number, in.tie = tie, in.gap = gap ? &gap[i] : NULL;
        run.n_value = kv_metric_values(&in, shown, o->detail, value);
        if (run.n_value != SIZE_MAX && closed.n_point)
            run.n_value += kv_closed_values(&closed, i, number, sc.n_evict, o->wanted, o->detail, value + run.n_value);
        if (run.n_value != SIZE_MAX && answers.n_point)
            run.n_value += kv_generated_values(&answers, i, o->model, sc.info, o->wanted, value + run.n_value);
        if (!st && run.n_value == SIZE_MAX)
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        else if (!st)
            st = kv_results_put(db, trace_id, &run, err);
        kv_corner_free(&corner), free(oracle), free(class);
    }
    if (!st) st = kv_results_commit(db, err), open = false;
    if (!st) st = twins(&plan, point, n_point, o->jobs, path, err);
    if (!st && !rp.layer_error && (o->wanted >> KV_M_LAYER_ERROR & 1))
        fprintf(stderr, "kv-sim: '%s' carries no W_O: layer_error is left out\n", kv_plain(path).s);
    if (!st && !rp.bound && (o->wanted & KV_M_BOUNDS))
        fprintf(stderr, "kv-sim: '%s' carries no W_O: bounds are left out\n", kv_plain(path).s);
    if (!st && (o->wanted & KV_M_EVIDENCE) && (kv_metric_default() & ~KV_M_CLOSED & ~o->wanted) && rp.coverage &&
        !rp.coverage->evidence.n_token)
        fprintf(stderr, "kv-sim: '%s' marks no evidence before the cut: evidence metrics are left out\n",
                kv_plain(path).s);
out:
    if (!st) o->n_new += n_point, o->n_old += n_old;
    kv_progress_end(bar);
    if (open) kv_results_rollback(db);
    for (size_t i = 0; i < n_point; i++) free(point[i].counts);
    kv_replay_free(&rp);
    kv_closed_free(&closed);
    kv_generated_free(&answers);
    kv_plan_free(&plan);
    free(spec), free(point), free(value), free(id), free(number), free(tie);
    free(gap), free(ledger.unit_read);
    kv_scene_close(&sc);
    kv_gpu_pass_clear(o->gpu);
    kv_trace_close(t);
    return st;
}

/* Every trace can be opened and cut as asked: said before a database is made. */
static kv_status look(const char *path, const options *o, kv_error *err)
{
    kv_trace *t = NULL;
    kv_scene sc = {0};
    kv_status st = kv_trace_open(path, &t, err);
    if (!st) st = kv_scene_open(t, o->rq.cut, o->rq.decode_rows, &sc, err);
    if (!st && o->model) st = kv_closed_check(o->model, &sc, err);
    kv_scene_close(&sc);
    kv_trace_close(t);
    return st;
}

/* Every thread holds a layer: where memory was too short, half as many hold half as much. Nothing of the trace has been
 * stored yet, and results do not depend on the number of threads. */
static bool fewer_jobs(options *o, const char *path)
{
    uint32_t had = o->layers && o->layers < o->jobs ? o->layers : o->jobs;
    if (had < 2) return false;
    o->jobs = had / 2;
    fprintf(stderr, "kv-sim: note: out of memory for '%s' with -j %u: goes on with -j %u\n", path, had, o->jobs);
    return true;
}

kv_status kv_sim_run(int argc, char **argv, kv_error *err)
{
    options o = {0};
    kv_list rest = {0};
    kv_results *db = NULL;
    bool help = false;
    kv_opt opts[] = {KV_REQUEST_OPTIONS(&o.rq),
                     {"db", 0, KV_OPT_STR, &o.db},
                     {"jobs", 'j', KV_OPT_U32, &o.jobs},
                     {"metrics", 0, KV_OPT_STR, &o.metrics},
                     {"detail", 0, KV_OPT_STR, &o.detail_name},
                     {"shard", 0, KV_OPT_STR, &o.shard},
                     {"gap", 0, KV_OPT_FLAG, &o.gap},
                     {"match-bytes", 0, KV_OPT_FLAG, &o.match},
                     {"mem-limit", 0, KV_OPT_BYTES, &o.mem_limit},
                     {"backend", 0, KV_OPT_STR, &o.backend},
                     {"model", 0, KV_OPT_STR, &o.model_path},
                     {"generate", 0, KV_OPT_FLAG, &o.generate},
                     {"help", 'h', KV_OPT_FLAG, &help},
                     {0}};
    kv_status st = kv_cli_parse(argc, argv, opts, &rest, err);
    if (!st && help) {
        fputs(HELP, stdout);
        goto out;
    }
    if (!st && !rest.n) st = kv_fail(err, KV_EMISUSE, "no trace given");
    if (!st) st = resolve(&o, err);
    if (!st) kv_spec_print_unread(o.rq.spec, o.rq.n_spec);
    o.model_cuda = !st && !strcmp(o.backend, "cuda");
    if (!st && (o.model_cuda || (!strcmp(o.backend, "auto") && !o.mem_limit && kv_gpu_count() > 0)))
        st = kv_gpu_pass_open(&o.gpu, err);
    if (!st && o.model_path)
        st = kv_model_open(o.model_path, o.model_cuda ? KV_WEIGHTS_STORED : KV_WEIGHTS_F32, o.jobs, &o.model, err);
    for (size_t i = 0; i < rest.n && !st; i++) st = look(rest.v[i], &o, err);
#ifdef M_MMAP_THRESHOLD
    if (o.mem_limit) mallopt(M_MMAP_THRESHOLD, 256 << 10); /* what is freed goes back to the system at once */
#endif
    if (!st) st = kv_results_open(o.db, &db, err);
    uint32_t room = st ? o.jobs : kv_blas_room(o.jobs);
    if (!st && !room) st = kv_fail(err, KV_ENOMEM, "out of memory: OpenBLAS needs 128 MiB of address space");
    if (!st && room < o.jobs) {
        fprintf(stderr, "kv-sim: note: not enough address space for -j %u: goes on with -j %u\n", o.jobs, room);
        o.jobs = room;
    }
    kv_catch_signals_between("\r\033[Kkv-sim: stops behind this trace (Ctrl-C again: at once)\n");
    for (size_t i = 0; i < rest.n && !st; i++) {
        st = kv_stop_wanted() ? KV_EINTERRUPTED : run_trace(&o, db, rest.v[i], err);
        while (st == KV_ENOMEM && fewer_jobs(&o, rest.v[i])) st = run_trace(&o, db, rest.v[i], err);
        if (st == KV_EINTERRUPTED)
            st = kv_fail(err, KV_EINTERRUPTED,
                         "interrupted; %zu new runs are stored in '%s', the same command goes on from there", o.n_new,
                         o.db);
    }
    if (!st)
        fprintf(stderr, "kv-sim: %zu new run%s, %zu already there, in '%s'\n", o.n_new, o.n_new == 1 ? "" : "s",
                o.n_old, kv_plain(o.db).s);
out:
    kv_results_close(db);
    kv_closed_device_close(&o.device);
    kv_model_close(o.model);
    kv_gpu_pass_close(o.gpu);
    kv_request_free(&o.rq);
    kv_list_free(&rest);
    return st;
}
