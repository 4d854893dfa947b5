/* keep.c - `kv-sim keep`: kept sets as NumPy files, the ledger as JSON on stdout. */
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/parallel.h"
#include "sim/commands.h"
#include "sim/mask.h"
#include "sim/schedule.h"
#include "traces/json.h"

static const char HELP[] =
    "usage: kv-sim keep TRACE -p POLICY[,..] -b BUDGET[,..] -o KEPT.npy|DIR/ [options]\n"
    "\n"
    "Writes which positions a policy keeps, and the ledger (budgets, counts per layer and head, bytes) as JSON.\n"
    "The array is int32 [layers, heads, tokens]: -1 = kept, 0 = dropped when the prompt is cut.\n"
    "\n"
    "  -p, --policy P        policies, e.g. snapkv,cake:alpha=0.2 (see `kv-sim policies`); repeatable\n"
    "  -b, --budget B        512 (tokens per KV head and layer), 5%, 64MiB, ratio=0.9, auto; repeatable\n"
    "  -o, --output F        one file, or a folder (ends with /) for several policies and budgets\n"
    "      --mask            uint8 instead: 1 = kept\n"
    "      --at-step N       the set after N decode rows; tokens not yet decoded are 0 in a mask\n"
    "      --granularity G   query_head, kv_head or layer, for every policy\n"
    "      --protect S       sink=4,recent=32,segment=NAME: kept first, inside the budget\n"
    "      --page N          whole pages of N tokens are kept or dropped\n"
    "      --cut C           prompt (default) or context: cut before the question is seen\n"
    "      --decode-rows N   of a prompt-only trace: the last N rows are the decoded ones\n"
    "      --seed S          of random policies (0)\n"
    "      --scores          add the smallest kept score per layer and head to the ledger\n"
    "\n"
    "  kv-sim keep traces/samples/prose.kvt -p snapkv -b 10% -o kept.npy\n"
    "  kv-sim keep traces/samples/prose.kvt -p cake,oracle -b 5%,20% --mask -o kept/\n";

static json_t *ledger(const kv_plan *p, size_t i, const kv_budget *b, const kv_budget_resolved *c,
                      const uint32_t *counts, bool scores)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    const kv_scene *sc = p->scene;
    json_t *slots = json_array(), *bound = json_array();
    uint64_t kept = kv_plan_slots(p, i, counts), nominal = (uint64_t)c->tokens * sc->n_evict * sc->info->n_kv_head;
    for (uint32_t l = 0; l < sc->n_evict; l++) {
        json_t *row = json_array(), *brow = json_array();
        for (uint32_t u = 0; u < r->n_unit; u++) {
            uint32_t k = counts[(size_t)l * r->n_unit + u];
            json_array_append_new(row, json_integer(k));
            if (scores && !r->fixed && k > r->n_forced && k < sc->n_cut)
                json_array_append_new(
                    brow,
                    json_real(
                        r->sorted[((size_t)l * r->n_unit + u) * (sc->n_cut - r->n_forced) + k - r->n_forced - 1]));
            else
                json_array_append_new(brow, json_null());
        }
        json_array_append_new(slots, row);
        json_array_append_new(bound, brow);
    }
    json_t *layers = json_array();
    for (uint32_t l = 0; l < sc->n_evict; l++)
        json_array_append_new(layers, json_integer(sc->info->layer[sc->evict[l]]));
    json_t *o =
        json_pack("{s:s, s:s, s:s, s:s, s:i, s:f, s:s, s:o, s:o, s:I, s:I, s:I, s:I, s:b}", "policy",
                  p->spec[i].row->name, "spec", p->spec[i].canonical, "verified", p->spec[i].row->verified, "budget",
                  b->text, "budget_tokens", (int)c->tokens, "budget_frac", c->frac, "granularity",
                  (const char *[]){"query_head", "kv_head", "layer"}[r->granularity], "layers", layers, "counts", slots,
                  "kept_slots", (json_int_t)kept, "nominal_slots", (json_int_t)nominal, "full_slots",
                  (json_int_t)((uint64_t)sc->n_cut * sc->n_evict * sc->info->n_kv_head), "kept_bytes",
                  (json_int_t)(kept * sc->slot_bytes), "overspent", kept > nominal && !p->spec[i].keep_all);
    if (scores)
        json_object_set_new(o, "boundary_scores", bound);
    else
        json_decref(bound);
    return o;
}

/* DIR/policy@budget.npy; where the request has several specs of one policy, their hash stands behind the name. */
static char *file_name(const char *dir, const kv_request *rq, size_t i, const char *budget)
{
    const char *name = rq->spec[i].row->name;
    char hash[12] = "", hex[65];
    for (size_t k = 0; k < rq->n_spec; k++)
        if (k != i && !strcmp(rq->spec[k].row->name, name)) {
            kv_sha256 h;
            kv_sha256_init(&h);
            kv_sha256_update(&h, rq->spec[i].canonical, strlen(rq->spec[i].canonical));
            kv_sha256_hex(&h, hex);
            snprintf(hash, sizeof hash, "-%.8s", hex);
            break;
        }
    char *s = kv_format("%s%.80s%s@%s.npy", dir, name, hash, budget);
    for (char *c = s ? s + strlen(dir) : NULL; c && *c; c++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_@%", *c)) *c = '_';
    return s;
}

kv_status kv_sim_keep(int argc, char **argv, kv_error *err)
{
    kv_request rq = {0};
    kv_list rest = {0};
    bool mask = false, scores = false, help = false;
    const char *out = NULL;
    uint32_t at_step = UINT32_MAX;
    kv_trace *t = NULL;
    kv_scene sc = {0};
    kv_plan plan = {0};
    uint32_t *counts = NULL;
    json_t *all = json_array();
    kv_opt opts[] = {KV_REQUEST_OPTIONS(&rq),
                     {"output", 'o', KV_OPT_STR, &out},
                     {"mask", 0, KV_OPT_FLAG, &mask},
                     {"at-step", 0, KV_OPT_U32, &at_step},
                     {"scores", 0, KV_OPT_FLAG, &scores},
                     {"help", 'h', KV_OPT_FLAG, &help},
                     {0}};
    kv_status st = kv_cli_parse(argc, argv, opts, &rest, err);
    if (!st && help) {
        fputs(HELP, stdout);
        goto out;
    }
    if (!st && rest.n != 1) st = kv_fail(err, KV_EMISUSE, "keep takes one trace, got %zu", rest.n);
    if (!st && !out) st = kv_fail(err, KV_EMISUSE, "no output: give -o KEPT.npy or -o DIR/");
    if (!st) st = kv_request_resolve(&rq, err);
    if (!st) kv_spec_print_unread(rq.spec, rq.n_spec);
    if (st) goto out;
    bool dir = out[strlen(out) - (*out != 0)] == '/';
    if (!dir && rq.n_spec * rq.n_budget > 1) {
        st = kv_fail(err, KV_EMISUSE, "%zu policies x %zu budgets need a folder: -o DIR/ (with the slash)", rq.n_spec,
                     rq.n_budget);
        goto out;
    }
    if (dir && mkdir(out, 0777) && access(out, W_OK)) {
        st = kv_fail(err, KV_EIO, "cannot make folder '%s'", out);
        goto out;
    }
    if ((st = kv_trace_open(rest.v[0], &t, err))) goto out;
    if ((st = kv_scene_open(t, rq.cut, rq.decode_rows, &sc, err))) goto out;
    if (at_step == UINT32_MAX) at_step = sc.n_row;
    if (at_step > sc.n_row) {
        st = kv_fail(err, KV_EMISUSE, "--at-step %u: trace '%s' has %u decoded rows", at_step, rest.v[0], sc.n_row);
        goto out;
    }
    if ((st = kv_plan_build(&sc, rq.spec, rq.n_spec, kv_cpu_count(), &plan, err))) goto out;
    for (size_t i = 0; i < rq.n_spec && !st; i++) {
        free(counts);
        st = kv_array(&counts, (size_t)sc.n_evict * plan.ranking[plan.ranking_of[i]].n_unit, sizeof *counts, err);
        for (size_t b = 0; b < rq.n_budget && !st; b++) {
            kv_budget_resolved c =
                kv_budget_resolve(&rq.budget[b], sc.n_cut, sc.slot_bytes, sc.n_evict, sc.info->n_kv_head);
            char *path = dir ? file_name(out, &rq, i, rq.budget[b].text) : kv_format("%s", out);
            st = path ? kv_plan_counts(&plan, i, &c, counts, err) : kv_fail(err, KV_ENOMEM, "out of memory");
            if (!st) st = kv_mask_write(path, &plan, i, &c, counts, mask, at_step, err);
            if (!st) {
                json_t *o = ledger(&plan, i, &rq.budget[b], &c, counts, scores);
                json_object_set_new(o, "file", json_string(path));
                json_array_append_new(all, o);
            }
            free(path);
        }
    }
    if (!st) {
        kv_json_print(stdout, rq.n_spec * rq.n_budget == 1 && !dir ? json_array_get(all, 0) : all,
                      JSON_COMPACT | JSON_REAL_PRECISION(9));
        if (fflush(stdout) || ferror(stdout)) st = kv_fail(err, KV_EIO, "cannot write the ledger to stdout");
    }
out:
    json_decref(all);
    free(counts);
    kv_plan_free(&plan);
    kv_scene_close(&sc);
    kv_trace_close(t);
    kv_request_free(&rq);
    kv_list_free(&rest);
    return st;
}
