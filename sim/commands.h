/* commands.h - the commands of kv-sim. Each takes argv from its own name on and returns a status. */
#ifndef KV_SIM_COMMANDS_H
#define KV_SIM_COMMANDS_H

#include "sim/plan.h"
#include "traces/cli.h"

kv_status kv_sim_run(int argc, char **argv, kv_error *err);
kv_status kv_sim_keep(int argc, char **argv, kv_error *err);
kv_status kv_sim_policies(int argc, char **argv, kv_error *err);
kv_status kv_sim_metrics(int argc, char **argv, kv_error *err);
kv_status kv_sim_selftest(int argc, char **argv, kv_error *err);

/* What `run` and `keep` share: policies, budgets and constraints of the command line. */
typedef struct {
    kv_list policies, budgets;
    const char *granularity, *protect, *cut;
    uint32_t decode_rows, page;
    uint64_t seed;
    kv_spec *spec;
    size_t n_spec;
    kv_budget *budget;
    size_t n_budget;
} kv_request;
#define KV_REQUEST_OPTIONS(r)                                                                                          \
    {"policy", 'p', KV_OPT_LIST, &(r)->policies}, {"budget", 'b', KV_OPT_LIST, &(r)->budgets},                         \
        {"granularity", 0, KV_OPT_STR, &(r)->granularity}, {"protect", 0, KV_OPT_STR, &(r)->protect},                  \
        {"page", 0, KV_OPT_U32, &(r)->page}, {"cut", 0, KV_OPT_STR, &(r)->cut},                                        \
        {"decode-rows", 0, KV_OPT_U32, &(r)->decode_rows},                                                             \
    {                                                                                                                  \
        "seed", 0, KV_OPT_U64, &(r)->seed                                                                              \
    }
/* Parse them into spec and budget; duplicates (same canonical string, same text) are dropped. */
kv_status kv_request_resolve(kv_request *r, kv_error *err);
/* Add the runs that `kv-analyze gap` reads: every policy with parts of it taken over by the oracle (sim/oracle.h), and
 * the oracle of its class. */
kv_status kv_request_add_gap(kv_request *r, kv_error *err);
/* Say on stderr which parameters were given to policies that do not read them. */
void kv_spec_print_unread(const kv_spec *s, size_t n);
void kv_request_free(kv_request *r);

#endif
