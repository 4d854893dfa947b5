/* help.c - what kv-analyze and its commands say about themselves (analysis.h). */
#include "analyze/analysis.h"

const char kv_help[] =
    "usage: kv-analyze COMMAND [--db results.db] [options]        kv-analyze COMMAND --help: its options and examples\n"
    "\n"
    "  summary    policies x budgets: mean and interval over prompts, bytes kept, the oracle of the same class\n"
    "  curve      a metric against the bytes kept, per policy, with intervals and a band for the whole curve\n"
    "  compare    A B.. : policies against the last one on the same prompts: difference, intervals, signed ranks, "
    "wins\n"
    "  power      A B.. : how many prompts to show a difference, or that there is none that matters\n"
    "  recommend  the smallest cache that loses less than --margin against the full one, per policy, in bytes\n"
    "  layers     a metric by layer at one budget, the slots each layer was given, and how far from the oracle's\n"
    "  gap        was it the budget or the policy: the loss taken apart (after kv-sim run --gap)\n"
    "  heads      A B : which heads lose more under A than under B\n"
    "  predict    rank correlation of every metric with the model's own loss\n"
    "  export     rows of a view as CSV, JSON or JSON lines\n"
    "  merge      A.db B.db.. -o OUT.db: join shards; results that contradict each other are refused\n"
    "  plot       [NAME|all] -o DIR: SVG and PNG figures and the CSV behind each (plots/NAME.sql, plots/NAME.gp)\n"
    "  text       T.kvt -p A[,B] -b BUDGET: two kept sets on the prompt's own words\n"
    "  report     -o FILE.html [T.kvt..]: one page with everything, opens from disk without a network\n"
    "\n"
    "      --db FILE       results database (default results.db)\n"
    "  -m, --metric NAME   default: layer_error if it was measured, else recall\n"
    "  -p, --policy LIST   only these policies (names, or canonical specs in full)\n"
    "  -b, --budget LIST   only these budgets, as given to kv-sim\n"
    "      --trace LIST    only these traces      --category LIST   only these kinds of prompt\n"
    "      --model NAME    only this model        --granularity G, --page N, --cut C   only runs with these\n"
    "      --csv  --json   for programs\n"
    "      --help  --version\n"
    "\n"
    "The prompt is the unit: a metric is aggregated to one number per prompt; means and 95% intervals (bootstrap, "
    "fixed\n"
    "seed, printed) are over prompts. Databases are read, never written.\n"
    "\n"
    "  kv-analyze summary --db results.db -b 10%\n"
    "  kv-analyze plot all --db results.db -o figures\n";

#define COMMON                                                                                                         \
    "--metric, --policy, --budget, --trace, --category, --model, --granularity, --page, --cut, --csv, --json: "        \
    "kv-analyze --help\n"

static const struct {
    const char *name, *text;
} HELPS[] = {
    {"summary",
     "usage: kv-analyze summary [--db results.db] [-b BUDGET,..] [-m METRIC] [options]\n"
     "\n"
     "A table per budget: mean over prompts, its 95% interval, bytes kept, and the oracle that may move slots as the\n"
     "policy does. Best first.\n"
     "\n" COMMON "\n"
     "  kv-analyze summary --db results.db -b 10%,50%\n"
     "  kv-analyze summary --db results.db --metric recall --csv\n"},
    {"curve", "usage: kv-analyze curve [--db results.db] [-m METRIC] [-p POLICY,..] [options]\n"
              "\n"
              "A metric against the bytes kept. low and high: interval of one point; band: holds for all budgets of a "
              "policy at\n"
              "once (max-t), so that the whole curve may be read against it.\n"
              "\n" COMMON "\n"
              "  kv-analyze curve --db results.db -p snapkv,cake\n"
              "  kv-analyze curve --db results.db --metric nats_lost --json\n"},
    {"compare",
     "usage: kv-analyze compare A B [--db results.db] [-b BUDGET,..] [options]\n"
     "       kv-analyze compare A B C.. | [A..] --baseline P\n"
     "\n"
     "Each policy minus the baseline (the last one named, or P; without names every other policy), prompt by prompt:\n"
     "mean and median difference, d_z, Wilcoxon's signed ranks (McNemar's test for a metric of 0 and 1), wins, Holm's\n"
     "correction over the rows, and two intervals: over prompts of these families, and for new families.\n"
     "Without -b the curves are compared: one test of their mean height over log2 bytes.\n"
     "\n"
     "  --margin X      test non-inferiority: is A worse by less than X, one-sided 95%?\n"
     "  --tie X         differences up to X are ties (0)\n"
     "  --common        take the traces and budgets both have; else what only one has is refused\n"
     "  --any-build     results of different builds together; else refused\n" COMMON "\n"
     "  kv-analyze compare cake snapkv --db results.db\n"
     "  kv-analyze compare cake snapkv --db results.db -b 10% --margin 0.02\n"
     "  kv-analyze compare --baseline snapkv --db results.db --json\n"},
    {"power",
     "usage: kv-analyze power A B [--db results.db] [-b BUDGET] (--difference X | --margin X) [options]\n"
     "\n"
     "From the paired differences of these prompts (the pilot) to the number of prompts for 80% power: to show that A\n"
     "and B differ by X (two-sided 5%), or that A is worse by less than the margin (one-sided 5%). Names and "
     "--baseline\n"
     "as in compare; default budget: the one nearest to 10%; --common, --any-build as in compare.\n"
     "\n" COMMON "\n"
     "  kv-analyze power cake snapkv --db results.db -b 50% --difference 0.01\n"
     "  kv-analyze power --baseline snapkv --db results.db -b 50% --margin 0.05\n"},
    {"recommend",
     "usage: kv-analyze recommend --margin X [--db results.db] [-m METRIC] [--page N] [--granularity G] [options]\n"
     "\n"
     "For each policy the smallest cache that loses less than X of the metric against the full one, with 95% "
     "confidence,\n"
     "in tokens, bytes per request and bytes per 1,000 tokens; or none, and how many more prompts may decide. Budgets "
     "are\n"
     "tested from the largest down. The full cache: measured (kv-sim run -p full), or known (recall 1, errors 0).\n"
     "--common, --any-build as in compare.\n"
     "\n" COMMON "\n"
     "  kv-analyze recommend --db results.db --margin 0.3\n"
     "  kv-analyze recommend --db results.db --metric recall --margin 0.05 -p snapkv,cake --json\n"},
    {"layers", "usage: kv-analyze layers [--db results.db] [-b BUDGET] [-m METRIC] [options]\n"
               "\n"
               "A metric by layer at one budget (default: the one nearest to 10%), the KV slots each layer was given, "
               "and the share\n"
               "of them that oracle-global would keep in other layers.\n"
               "\n" COMMON "\n"
               "  kv-analyze layers --db results.db -b 10%\n"
               "  kv-analyze layers --db results.db -p cake,oracle --csv\n"},
    {"gap",
     "usage: kv-analyze gap [--db results.db] [-b BUDGET,..] [-m METRIC] [options]\n"
     "\n"
     "Where each policy's loss comes from: its ranking (past rows instead of future ones, pooling and averaging), "
     "its split\n"
     "over heads and over layers, one set for all rows, and what no choice of slots could keep. The terms add up "
     "to the\n"
     "loss, in both orders and averaged over all six; one sentence a policy. Default metric: recall_contested; "
     "rules that\n"
     "drop row by row are taken apart in recall. Needs the runs of kv-sim run --gap.\n"
     "\n" COMMON "\n"
     "  kv-analyze gap --db results.db -b 10%\n"
     "  kv-analyze gap --db results.db -b 10% --metric recall --json\n"},
    {"heads", "usage: kv-analyze heads [A [B]] [--db results.db] [-b BUDGET] [-m METRIC] [options]\n"
              "\n"
              "Which query heads lose more under A than under B (default: oracle): paired differences by head, "
              "Wilcoxon's test with\n"
              "Benjamini-Hochberg over all heads, and the slots both gave them. Needs kv-sim run --detail head.\n"
              "\n"
              "  --baseline P    as B      --any-build   as in compare\n" COMMON "\n"
              "  kv-analyze heads cake --db results.db -b 10%\n"
              "  kv-analyze heads cake snapkv --db results.db -b 10% --metric recall --json\n"},
    {"predict",
     "usage: kv-analyze predict [--db results.db] [-m TARGET] [options]\n"
     "\n"
     "Rank correlation (Spearman, Kendall's tau-b) of every metric with delta_nll, or another TARGET, over caches "
     "(policy,\n"
     "budget): pooled, within a budget, prompt by prompt and by family; prompts are resampled for the intervals.\n"
     "\n"
     "  --any-build     results of different builds together; else refused\n" COMMON "\n"
     "  kv-analyze predict --db results.db --metric head_error\n"
     "  kv-analyze predict --db results.db --metric recall -p snapkv,cake,streaming,oracle --csv\n"},
    {"export",
     "usage: kv-analyze export [--db results.db] [--what run|metric|slots] [--csv | --json | --jsonl] [options]\n"
     "\n"
     "Rows of v_run, v_metric or v_slots (the README names the columns), in a fixed order.\n"
     "\n"
     "  --what V        run (default), metric or slots\n"
     "  --jsonl         one object per line\n" COMMON "\n"
     "  kv-analyze export --db results.db --what metric --metric recall --csv\n"
     "  kv-analyze export --db results.db --what slots --jsonl\n"},
    {"merge",
     "usage: kv-analyze merge A.db [B.db ..] -o OUT.db\n"
     "\n"
     "Joins databases of shards. Runs are known by run_id; one that is in several files must agree: slots and bytes\n"
     "exactly, metrics to 1e-6 (sums depend on the BLAS); the first file's numbers stay, metrics it lacks are added.\n"
     "\n"
     "  -o, --output F  the new database; an existing one is replaced at the end\n"
     "      --any-build files made by different builds; else refused\n"
     "      --first     where results differ, take the first file's; else refused\n"
     "\n"
     "  kv-analyze merge results.db -o merged.db\n"
     "  kv-analyze merge results.db merged.db -o merged.db\n"},
    {"plot",
     "usage: kv-analyze plot [NAME|all] -o DIR [--db results.db] [options]\n"
     "       kv-analyze plot attention --trace-file T.kvt -p POLICY -b BUDGET [--layer L --head H] -o DIR\n"
     "\n"
     "SVG and PNG figures and the CSV behind each; plots/README.md tells how to add one.\n"
     "curve, curves, tradeoff, budgets; heads (kv-sim run --detail head), staleness (--detail step), gap (--gap),\n"
     "nll (--model); from a trace cake, attention. all = those the database has data for.\n"
     "\n"
     "  -o, --output DIR, --trace-file T.kvt, --layer L, --head H\n"
     "  --metric, --policy, --budget, --trace, --category, --model: kv-analyze --help\n"
     "\n"
     "  kv-analyze plot all --db results.db -o figures\n"
     "  kv-analyze plot curve --db results.db -o figures --metric recall\n"},
    {"text", "usage: kv-analyze text T.kvt -p A[,B] -b BUDGET [--layer L --head H] [--html FILE] [--json]\n"
             "\n"
             "What one policy keeps of a prompt, or two, on its own words; needs the trace, not the database.\n"
             "\n"
             "  --layer, --head one place instead of the whole model      --html FILE     a page with pickers\n"
             "\n"
             "  kv-analyze text traces/samples/prose.kvt -p snapkv -b 10%\n"
             "  kv-analyze text traces/samples/prose.kvt -p snapkv,cake -b 10% --html words.html\n"},
    {"report",
     "usage: kv-analyze report -o FILE.html [T.kvt..] [--text P,..] [--db results.db] [options]\n"
     "\n"
     "One page with everything. For the words, name the traces.\n"
     "\n"
     "  --text LIST     up to 4 policies for the words of the traces given (default snapkv, cake, streaming and "
     "oracle),\n"
     "                  at the first two of -b\n" COMMON "\n"
     "  kv-analyze report --db results.db -o report.html\n"
     "  kv-analyze report --db results.db traces/samples/prose.kvt --text snapkv,cake -b 10% -o report.html\n"},
};

const char *kv_help_of(const char *command)
{
    for (size_t i = 0; i < sizeof HELPS / sizeof *HELPS; i++)
        if (!strcmp(HELPS[i].name, command)) return HELPS[i].text;
    return kv_help;
}
