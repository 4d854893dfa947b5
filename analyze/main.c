/* main.c - kv-analyze: reads results.db, answers questions, draws figures. One file per command beside this one. */
#include "analyze/analysis.h"

#include <stdlib.h>
#include <unistd.h>

enum {
    SUMMARY = 1 << 0,
    CURVE = 1 << 1,
    COMPARE = 1 << 2,
    POWER = 1 << 3,
    RECOMMEND = 1 << 4,
    LAYERS = 1 << 5,
    HEADS = 1 << 6,
    PREDICT = 1 << 7,
    EXPORT = 1 << 8,
    MERGE = 1 << 9,
    PLOT = 1 << 10,
    TEXT = 1 << 11,
    REPORT = 1 << 12,
    GAP = 1 << 13,
    READS = SUMMARY | CURVE | COMPARE | POWER | RECOMMEND | LAYERS | GAP | HEADS | PREDICT | EXPORT,
    PAIRED = COMPARE | POWER | RECOMMEND | HEADS | PREDICT, /* refuse results of several builds */
    ANY = READS | MERGE | PLOT | TEXT | REPORT,
    WORDS = COMPARE | POWER | HEADS | MERGE | PLOT | TEXT | REPORT /* take arguments behind the command */
};

static const struct {
    const char *name;
    unsigned bit;
    kv_status (*run)(const kv_analysis *, kv_error *);
} COMMANDS[] = {{"summary", SUMMARY, kv_cmd_summary},
                {"curve", CURVE, kv_cmd_curve},
                {"compare", COMPARE, kv_cmd_compare},
                {"power", POWER, kv_cmd_power},
                {"recommend", RECOMMEND, kv_cmd_recommend},
                {"layers", LAYERS, kv_cmd_layers},
                {"gap", GAP, kv_cmd_gap},
                {"heads", HEADS, kv_cmd_heads},
                {"predict", PREDICT, kv_cmd_predict},
                {"export", EXPORT, kv_cmd_export},
                {"merge", MERGE, kv_cmd_merge},
                {"plot", PLOT, kv_cmd_plot},
                {"text", TEXT, kv_cmd_text},
                {"report", REPORT, kv_cmd_report}};
#define N_COMMAND (sizeof COMMANDS / sizeof *COMMANDS)

typedef struct {
    kv_analysis a;
    bool help, version, csv, json, jsonl;
} settings;

static void settings_free(settings *s)
{
    kv_list_free(&s->a.policies), kv_list_free(&s->a.budgets), kv_list_free(&s->a.traces);
    kv_list_free(&s->a.categories), kv_list_free(&s->a.rest), kv_list_free(&s->a.text_policies);
}

/* Options of the commands in `who`; an option of another command is unknown. */
static kv_status parse(int argc, char **argv, unsigned who, settings *s, kv_error *err)
{
    *s = (settings){.a = kv_analysis_defaults()};
    const struct {
        unsigned who;
        kv_opt opt;
    } all[] = {
        {ANY, {"help", 'h', KV_OPT_FLAG, &s->help}},
        {ANY, {"version", 0, KV_OPT_FLAG, &s->version}},
        {ANY & ~MERGE, {"db", 0, KV_OPT_STR, &s->a.db}},
        {ANY & ~MERGE, {"metric", 'm', KV_OPT_STR, &s->a.metric}},
        {ANY & ~MERGE, {"policy", 'p', KV_OPT_LIST, &s->a.policies}},
        {ANY & ~MERGE, {"budget", 'b', KV_OPT_LIST, &s->a.budgets}},
        {ANY & ~MERGE, {"trace", 0, KV_OPT_LIST, &s->a.traces}},
        {ANY & ~MERGE, {"category", 0, KV_OPT_LIST, &s->a.categories}},
        {ANY & ~MERGE, {"model", 0, KV_OPT_STR, &s->a.model}},
        {READS, {"granularity", 0, KV_OPT_STR, &s->a.granularity}},
        {READS, {"page", 0, KV_OPT_STR, &s->a.page}},
        {READS, {"cut", 0, KV_OPT_STR, &s->a.cut}},
        {COMPARE | POWER | HEADS, {"baseline", 0, KV_OPT_STR, &s->a.baseline}},
        {COMPARE | POWER | RECOMMEND, {"margin", 0, KV_OPT_F64, &s->a.margin}},
        {COMPARE, {"tie", 0, KV_OPT_F64, &s->a.tie}},
        {POWER, {"difference", 0, KV_OPT_F64, &s->a.difference}},
        {COMPARE | POWER | RECOMMEND, {"common", 0, KV_OPT_FLAG, &s->a.common}},
        {PAIRED | MERGE, {"any-build", 0, KV_OPT_FLAG, &s->a.any_build}},
        {MERGE, {"first", 0, KV_OPT_FLAG, &s->a.first}},
        {READS, {"csv", 0, KV_OPT_FLAG, &s->csv}},
        {READS | TEXT, {"json", 0, KV_OPT_FLAG, &s->json}},
        {EXPORT, {"jsonl", 0, KV_OPT_FLAG, &s->jsonl}},
        {EXPORT, {"what", 0, KV_OPT_STR, &s->a.what}},
        {PLOT | MERGE | REPORT, {"output", 'o', KV_OPT_STR, &s->a.folder}},
        {PLOT, {"trace-file", 0, KV_OPT_STR, &s->a.trace_file}},
        {PLOT | TEXT, {"layer", 0, KV_OPT_U32, &s->a.layer}},
        {PLOT | TEXT, {"head", 0, KV_OPT_U32, &s->a.head}},
        {TEXT, {"html", 0, KV_OPT_STR, &s->a.html}},
        {REPORT, {"text", 0, KV_OPT_LIST, &s->a.text_policies}},
    };
    kv_opt opts[sizeof all / sizeof *all + 1];
    size_t n = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].who & who) opts[n++] = all[i].opt;
    opts[n] = (kv_opt){0};
    return kv_cli_parse(argc, argv, opts, &s->a.rest, err);
}

static kv_status unknown_command(const char *name, kv_error *err)
{
    const char *names[N_COMMAND];
    char list[256] = "";
    for (size_t i = 0; i < N_COMMAND; i++) names[i] = COMMANDS[i].name;
    const char *near = kv_nearest(name, names, N_COMMAND);
    if (near) strcat(list, near);
    for (size_t i = 0; i < N_COMMAND; i++) {
        if (near && !strcmp(near, names[i])) continue;
        if (*list) strcat(list, " ");
        strcat(list, names[i]);
    }
    return kv_fail(err, KV_EMISUSE, "unknown command '%s' (known: %s)", name, list);
}

int main(int argc, char **argv)
{
    kv_error err = {.msg = ""};
    settings s;
    kv_status st = parse(argc, argv, ANY, &s, &err); /* to find the command, wherever it stands */
    if (!st && s.help)
        fputs(s.a.rest.n ? kv_help_of(s.a.rest.v[0]) : kv_help, stdout),
            st = kv_flush_output(stdout, "standard output", &err);
    else if (!st && s.version)
        kv_cli_version("kv-analyze"), st = kv_flush_output(stdout, "standard output", &err);
    else if (!st && !s.a.rest.n)
        st = kv_fail(&err, KV_EMISUSE, "no command (summary, curve, compare, recommend, plot ..)");
    else if (!st) {
        const char *name = s.a.rest.v[0];
        size_t k = 0;
        while (k < N_COMMAND && strcmp(name, COMMANDS[k].name)) k++;
        settings_free(&s);
        st = k == N_COMMAND ? unknown_command(name, &err) : parse(argc, argv, COMMANDS[k].bit, &s, &err);
        if (!st && s.csv + s.json + s.jsonl > 1)
            st = kv_fail(&err, KV_EMISUSE, "choose one of --csv, --json and --jsonl");
        if (!st && s.a.rest.n > 1 && !(COMMANDS[k].bit & WORDS))
            st = kv_fail(&err, KV_EMISUSE, "unexpected argument '%s' (the database goes with --db)", s.a.rest.v[1]);
        if (!st) {
            s.a.format = s.csv ? KV_OUT_CSV : s.json ? KV_OUT_JSON : s.jsonl ? KV_OUT_JSONL : KV_OUT_TABLE;
            kv_catch_signals();
            st = COMMANDS[k].run(&s.a, &err);
        }
        if (!st) st = kv_flush_output(stdout, "standard output", &err);
    }
    settings_free(&s);
    return kv_cli_exit("kv-analyze", st, &err);
}
