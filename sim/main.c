/* main.c - kv-sim: replay eviction policies against recorded attention. */
#include <stdlib.h>

#include "sim/commands.h"
#include "sim/metric.h"
#include "sim/oracle.h"
#include "sim/plugin.h"
#include "sim/schedule.h"
#include "sim/scorer.h"
#include "traces/json.h"

static const struct {
    const char *name, *help;
    kv_status (*run)(int, char **, kv_error *);
} COMMANDS[] = {
    {"run", "traces x policies x budgets into results.db", kv_sim_run},
    {"keep", "the kept sets only, as NumPy files, and the ledger", kv_sim_keep},
    {"policies", "the table of policies; `policies NAME` prints one with its parameters", kv_sim_policies},
    {"metrics", "the table of metrics with their formulas", kv_sim_metrics},
    {"selftest", "identities that must hold on a trace", kv_sim_selftest},
};
enum { N_COMMAND = sizeof COMMANDS / sizeof *COMMANDS };

/* The next "key=value" of a plug-in's own parameters at *at, which starts as NULL; false at the end. */
static bool next_own(const kv_spec *s, const char **at, char key[48], char value[256])
{
    const char *p = *at ? *at : s->plugin ? s->plugin->params : "";
    size_t k = strcspn(p, "="), n = strcspn(p, ",");
    if (!*p) return false;
    snprintf(key, 48, "%.*s", (int)k, p);
    snprintf(value, 256, "%.*s", (int)(n - k - 1), p + k + 1);
    *at = p + n + (p[n] == ',');
    return true;
}

/* s is NULL for a policy that does not work without a file. */
static json_t *policy_json(const kv_policy *p, const kv_spec *s)
{
    json_t *params = json_object();
    const char *at = NULL;
    char key[48], value[256];
    while (s && next_own(s, &at, key, value)) json_object_set_new(params, key, json_string(value));
    for (size_t i = 0; i < kv_slot_count() && s; i++) {
        char *v = kv_slot_value(s, i);
        if (v) json_object_set_new(params, kv_slot_describe(i).name, json_string(v));
        free(v);
    }
    char *oracle = NULL, *class = NULL;
    if (s) kv_oracle_of(s, &oracle, &class, NULL);
    const char *replay = s ? kv_replay_class_names[kv_replay_class_of(s)] : NULL;
    json_t *o = json_pack("{s:s, s:s, s:s, s:s, s:s, s:s, s:s?, s:s?, s:s?, s:o}", "name", p->name, "summary",
                          p->summary, "paper", p->paper, "source", p->source, "verified", p->verified, "nested",
                          p->nested, "class", class, "oracle", oracle, "replay", replay, "parameters", params);
    free(oracle), free(class);
    return o;
}

static kv_status append_json(const char *arg, json_t *all, kv_error *err)
{
    const kv_policy *p = kv_policies;
    kv_spec *s = NULL;
    size_t n = 0;
    while (p->name && strcmp(p->name, arg)) p++;
    kv_status st = kv_spec_parse(arg, &s, &n, err);
    if (st && p->name) st = KV_OK, json_array_append_new(all, policy_json(p, NULL));
    for (size_t k = 0; k < n && !st; k++) json_array_append_new(all, policy_json(s[k].row, &s[k]));
    for (size_t k = 0; k < n; k++) kv_spec_free(&s[k]);
    free(s);
    return st;
}

static kv_status print_policy(const char *name, kv_error *err)
{
    kv_spec *s = NULL;
    size_t n = 0;
    kv_status st = kv_spec_parse(name, &s, &n, err);
    if (!st) kv_spec_print_unread(s, n);
    for (size_t k = 0; k < n && !st; k++) {
        const kv_policy *p = s[k].row;
        unsigned needs = kv_spec_needs(&s[k]);
        const char *at = NULL;
        char key[48], value[256], *oracle = NULL, *class = NULL;
        bool foresees = kv_scorers[s[k].scorer]->future || s[k].oracle || s[k].observe ||
                        kv_decode_rules[s[k].decode].flags & KV_RULE_FORESEES;
        if ((st = kv_oracle_of(&s[k], &oracle, &class, err))) break;
        printf("%s\n  %s\n  paper     %s\n  source    %s\n  verified  %s\n  nested    %s\n", p->name, p->summary,
               p->paper, p->source, p->verified, p->nested);
        if (!s[k].file) {
            printf("  needs     %s%s%s%s%s\n", needs & KV_NEED_WINDOW ? "queries of the last prompt rows, " : "",
                   needs & KV_NEED_COLSUM    ? "column sums or all prompt queries, "
                   : needs & KV_NEED_QUERIES ? "all prompt queries (--record qkv), "
                                             : "",
                   foresees ? "the measured rows themselves (an oracle), " : "", needs & KV_NEED_WO ? "W_O, " : "",
                   s[k].layer_weight ? "norms of the residual stream, keys and values" : "keys and values");
            const kv_decode_rule *rule = &kv_decode_rules[s[k].decode];
            printf("  phase     %s; %s\n", s[k].prompt_cut ? "the decode rule cuts the prompt too" : "one cut",
                   s[k].decode ? rule->help : "every later token is kept");
            static const char *const REPLAY[] = {"one walk along the ranking serves every budget",
                                                 "the order is formed once, every budget makes its set from it",
                                                 "every budget is simulated"};
            kv_replay_class replay = kv_replay_class_of(&s[k]);
            printf("  replay    %s: %s\n", kv_replay_class_names[replay], REPLAY[replay]);
            printf("  class     %s\n", class);
            if (oracle) printf("  oracle    %s\n", oracle);
            printf("  parameters (all can be changed: %s%s:key=value,...)\n", s[k].plugin ? "plugin:" : "",
                   s[k].plugin ? s[k].plugin->path : p->name);
        }
        while (next_own(&s[k], &at, key, value)) printf("    %-15s %-16s the plug-in's own\n", key, value);
        for (size_t i = 0; i < kv_slot_count(); i++) {
            char *v = kv_slot_value(&s[k], i);
            kv_slot_help h = kv_slot_describe(i);
            if (v)
                printf("    %-15s %-16s %s%s%s%s\n", h.name, v, h.help, h.choices ? " (" : "",
                       h.choices ? h.choices : "", h.choices ? ")" : "");
            free(v);
        }
        printf("  spec      %s\n", s[k].canonical);
        free(oracle), free(class);
    }
    for (size_t k = 0; k < n; k++) kv_spec_free(&s[k]);
    free(s);
    return st;
}

/* A line of the table. A policy that wants a file is asked for one that is not read here. */
static kv_status print_row(const kv_policy *p, kv_error *err)
{
    kv_spec *s = NULL;
    size_t n = 0;
    char *arg = kv_format("%s%s", p->name, strstr(p->slots, "heads=table") ? ":importance=FILE" : "");
    kv_status st = arg ? kv_spec_parse(arg, &s, &n, err) : kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st)
        printf("%-27s %-62s %-9s %s\n", p->name, p->summary, kv_replay_class_names[kv_replay_class_of(s)], p->nested);
    for (size_t k = 0; k < n; k++) kv_spec_free(&s[k]);
    free(s), free(arg);
    return st;
}

kv_status kv_sim_policies(int argc, char **argv, kv_error *err)
{
    kv_list rest = {0};
    bool json = false, help = false;
    kv_opt opts[] = {{"json", 0, KV_OPT_FLAG, &json}, {"help", 'h', KV_OPT_FLAG, &help}, {0}};
    kv_status st = kv_cli_parse(argc, argv, opts, &rest, err);
    if (!st && help) {
        printf("usage: kv-sim policies [NAME[:key=value,..]|plugin:FILE.so] [--json]\n\n  kv-sim policies\n  kv-sim "
               "policies cake:alpha=0.2,heads=ada\n");
    } else if (!st && json) {
        json_t *all = json_array();
        for (const kv_policy *p = kv_policies; p->name && !rest.n && !st; p++) st = append_json(p->name, all, err);
        for (size_t i = 0; i < rest.n && !st; i++) st = append_json(rest.v[i], all, err);
        if (!st) kv_json_print(stdout, all, JSON_INDENT(1));
        json_decref(all);
    } else if (!st && rest.n) {
        for (size_t i = 0; i < rest.n && !st; i++) st = print_policy(rest.v[i], err);
    } else if (!st) {
        printf("%-27s %-62s %-9s %s\n", "policy", "what it keeps", "replay", "nested in the budget");
        for (const kv_policy *p = kv_policies; p->name && !st; p++) st = print_row(p, err);
        printf("%-27s %-62s %-9s %s\n", "mask:FILE.npy", "a kept set made elsewhere", "as it is", "no");
        printf("%-27s %-62s %-9s %s\n", "plugin:./FILE.so", "a score of your own (sim/kvtrace_policy.h)", "ranking",
               "yes with uniform layers and heads");
        printf("\nplain names: per KV head, window inside the budget; SOURCE.NAME reproduces a code base\n");
    }
    kv_list_free(&rest);
    return st;
}

kv_status kv_sim_metrics(int argc, char **argv, kv_error *err)
{
    kv_list rest = {0};
    bool json = false, help = false;
    kv_opt opts[] = {{"json", 0, KV_OPT_FLAG, &json}, {"help", 'h', KV_OPT_FLAG, &help}, {0}};
    kv_status st = kv_cli_parse(argc, argv, opts, &rest, err);
    json_t *all = json_array();
    if (!st && help) printf("usage: kv-sim metrics [--json]\n\n  kv-sim metrics\n  kv-sim metrics --json\n");
    for (int m = 0; m < KV_M_COUNT && !st && !help; m++) {
        const kv_metric_def *d = &kv_metric_defs[m];
        if (json)
            json_array_append_new(all, json_pack("{s:s, s:s, s:s, s:s, s:s, s:b, s:s?}", "name", d->name, "unit",
                                                 d->unit, "better", d->better, "formula", d->formula, "source",
                                                 d->source, "default", !d->asked, "cost", d->asked));
        else
            printf("%-24s  %s%s, unit: %s\n  %s\n  source: %s\n%s%s%s", d->name,
                   strcmp(d->better, "none") ? d->better : "no direction",
                   strcmp(d->better, "none") ? " is better" : "", d->unit, d->formula, d->source,
                   d->asked ? "  only when asked for: " : "", d->asked ? d->asked : "", d->asked ? "\n" : "");
    }
    if (!st && json && !help) kv_json_print(stdout, all, JSON_INDENT(1));
    json_decref(all);
    kv_list_free(&rest);
    return st;
}

static void usage(void)
{
    printf("usage: kv-sim COMMAND ...   replay KV-cache eviction policies against recorded attention\n\n");
    for (int i = 0; i < N_COMMAND; i++) printf("  %-10s %s\n", COMMANDS[i].name, COMMANDS[i].help);
    printf("\n`kv-sim COMMAND --help` tells the options. --version prints the build.\n\n"
           "  kv-sim run traces/samples/*.kvt -p snapkv,cake,oracle -b 5%%,20%% --db results.db\n"
           "  kv-sim policies cake\n");
}

int main(int argc, char **argv)
{
    kv_error err = {""};
    const char *names[N_COMMAND];
    if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")))
        return usage(), kv_cli_exit("kv-sim", KV_OK, NULL);
    if (argc > 1 && !strcmp(argv[1], "--version")) return kv_cli_version("kv-sim"), kv_cli_exit("kv-sim", KV_OK, NULL);
    for (int i = 0; i < N_COMMAND; i++) {
        names[i] = COMMANDS[i].name;
        if (argc > 1 && !strcmp(argv[1], names[i])) {
            kv_status st = COMMANDS[i].run(argc - 1, argv + 1, &err);
            return kv_cli_exit("kv-sim", st, &err);
        }
    }
    const char *near = argc > 1 ? kv_nearest(argv[1], names, N_COMMAND) : NULL;
    kv_status st =
        argc > 1 ? kv_fail(&err, KV_EMISUSE, "unknown command '%s'%s%s%s; known: run keep policies metrics selftest",
                           argv[1], near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "")
                 : kv_fail(&err, KV_EMISUSE, "no command; known: run keep policies metrics selftest");
    return kv_cli_exit("kv-sim", st, &err);
}
