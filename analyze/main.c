/* main.c - kv-analyze: reads results.db, answers questions, draws figures. One file per command beside this one. */
#include "analyze/analysis.h"

#include <stdlib.h>
#include <unistd.h>

static const char HELP[] =
    "usage: kv-analyze COMMAND [--db results.db] [options]\n"
    "\n"
    "  summary   policies x budgets: mean and interval over prompts, bytes kept, the oracle of the same class\n"
    "  curve     a metric against the bytes kept, per policy, with intervals\n"
    "  layers    a metric by layer at one budget, and the slots each layer was given\n"
    "  export    rows of a view: --what run|metric|slots\n"
    "  plot      [NAME|all] -o DIR: SVG and PNG figures and the CSV behind each (plots/NAME.sql, plots/NAME.gp)\n"
    "            plot attention --trace-file T.kvt -p POLICY -b BUDGET [--layer L --head H] -o DIR\n"
    "  text      T.kvt -p A[,B] -b BUDGET [--layer L --head H]: two kept sets on the prompt's own words\n"
    "  report    -o FILE.html [T.kvt..] [--text P,..]: one page with everything, opens from disk without a network\n"
    "\n"
    "      --db FILE       results database (default results.db)\n"
    "      --metric NAME   default: layer_error if it was measured, else recall\n"
    "  -p, --policy LIST   only these policies (names, or canonical specs in full)\n"
    "  -b, --budget LIST   only these budgets, as given to kv-sim; layers and plot: the one to show\n"
    "                      (default: the one nearest to 10%)\n"
    "      --trace LIST    only these traces      --category LIST   only these kinds of prompt\n"
    "      --model NAME    only this model\n"
    "      --csv  --json   for programs           --jsonl           export: one object per line\n"
    "  -o, --output DIR    plot: where the files go; report: the page\n"
    "      --html FILE     text: a page with pickers instead of the terminal\n"
    "      --text LIST     report: up to 4 policies for the words of the traces given (default snapkv, cake,\n"
    "                      streaming and oracle), at the first two of -b\n"
    "      --help  --version\n"
    "\n"
    "The prompt is the unit: a metric is aggregated to one number per prompt; means and 95% intervals (percentile\n"
    "bootstrap, fixed seed, printed) are over prompts. The database is never written.\n"
    "\n"
    "  kv-analyze summary --db results.db -b 10%\n"
    "  kv-analyze plot all --db results.db -o figures\n";

enum {
    SUMMARY = 1,
    CURVE = 2,
    LAYERS = 4,
    EXPORT = 8,
    PLOT = 16,
    TEXT = 32,
    REPORT = 64,
    ANY = 127,
    TABLES = SUMMARY | CURVE | LAYERS
};

static const struct {
    const char *name;
    unsigned bit;
    kv_status (*run)(const kv_analysis *, kv_error *);
} COMMANDS[] = {{"summary", SUMMARY, kv_cmd_summary}, {"curve", CURVE, kv_cmd_curve}, {"layers", LAYERS, kv_cmd_layers},
                {"export", EXPORT, kv_cmd_export},    {"plot", PLOT, kv_cmd_plot},    {"text", TEXT, kv_cmd_text},
                {"report", REPORT, kv_cmd_report}};
#define N_COMMAND (sizeof COMMANDS / sizeof *COMMANDS)

typedef struct {
    kv_analysis a;
    bool help, version, csv, json, jsonl;
} settings;

static void settings_free(settings *s)
{
    kv_list_free(&s->a.policies), kv_list_free(&s->a.budgets), kv_list_free(&s->a.traces);
    kv_list_free(&s->a.categories), kv_list_free(&s->a.rest);
}

/* Options of the commands in `who`; an option of another command is unknown. */
static kv_status parse(int argc, char **argv, unsigned who, settings *s, kv_error *err)
{
    *s = (settings){.a = {.db = "results.db", .layer = UINT32_MAX, .head = UINT32_MAX, .out = stdout, .talk = stderr}};
    const struct {
        unsigned who;
        kv_opt opt;
    } all[] = {
        {ANY, {"help", 'h', KV_OPT_FLAG, &s->help}},
        {ANY, {"version", 0, KV_OPT_FLAG, &s->version}},
        {ANY, {"db", 0, KV_OPT_STR, &s->a.db}},
        {ANY, {"metric", 'm', KV_OPT_STR, &s->a.metric}},
        {ANY, {"policy", 'p', KV_OPT_LIST, &s->a.policies}},
        {ANY, {"budget", 'b', KV_OPT_LIST, &s->a.budgets}},
        {ANY, {"trace", 0, KV_OPT_LIST, &s->a.traces}},
        {ANY, {"category", 0, KV_OPT_LIST, &s->a.categories}},
        {ANY, {"model", 0, KV_OPT_STR, &s->a.model}},
        {TABLES | EXPORT, {"csv", 0, KV_OPT_FLAG, &s->csv}},
        {TABLES | EXPORT | TEXT, {"json", 0, KV_OPT_FLAG, &s->json}},
        {EXPORT, {"jsonl", 0, KV_OPT_FLAG, &s->jsonl}},
        {EXPORT, {"what", 0, KV_OPT_STR, &s->a.what}},
        {PLOT | REPORT, {"output", 'o', KV_OPT_STR, &s->a.folder}},
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
    char list[128] = "";
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

/* Messages may quote names out of the database or SQLite's words about them: one line, nothing a terminal obeys. */
static int leave(kv_status st, const kv_error *err)
{
    kv_error plain = {.msg = ""};
    FILE *m = fmemopen(plain.msg, sizeof plain.msg - 1, "w");
    if (m) {
        kv_put_plain(m, err->msg, strlen(err->msg));
        fclose(m);
    }
    return kv_cli_exit("kv-analyze", st, &plain);
}

int main(int argc, char **argv)
{
    kv_error err = {.msg = ""};
    settings s;
    kv_status st = parse(argc, argv, ANY, &s, &err); /* to find the command, wherever it stands */
    if (!st && s.help)
        fputs(HELP, stdout), st = kv_flush_output(stdout, "standard output", &err);
    else if (!st && s.version)
        kv_cli_version("kv-analyze"), st = kv_flush_output(stdout, "standard output", &err);
    else if (!st && !s.a.rest.n)
        st = kv_fail(&err, KV_EMISUSE, "no command (summary, curve, layers, export or plot)");
    else if (!st) {
        const char *name = s.a.rest.v[0];
        size_t k = 0;
        while (k < N_COMMAND && strcmp(name, COMMANDS[k].name)) k++;
        settings_free(&s);
        st = k == N_COMMAND ? unknown_command(name, &err) : parse(argc, argv, COMMANDS[k].bit, &s, &err);
        if (!st && s.csv + s.json + s.jsonl > 1)
            st = kv_fail(&err, KV_EMISUSE, "choose one of --csv, --json and --jsonl");
        if (!st && s.a.rest.n > 1 && !(COMMANDS[k].bit & (PLOT | TEXT | REPORT)))
            st = kv_fail(&err, KV_EMISUSE, "unexpected argument '%s' (the database goes with --db)", s.a.rest.v[1]);
        if (!st) {
            s.a.format = s.csv ? KV_OUT_CSV : s.json ? KV_OUT_JSON : s.jsonl ? KV_OUT_JSONL : KV_OUT_TABLE;
            kv_catch_signals();
            st = COMMANDS[k].run(&s.a, &err);
        }
        if (!st) st = kv_flush_output(stdout, "standard output", &err);
    }
    settings_free(&s);
    return leave(st, &err);
}
