/* tr.h - the commands of kv-trace: one table row and one file each; small helpers they share. */
#ifndef KV_TR_H
#define KV_TR_H

#include "traces/cli.h"
#include "traces/format.h"

typedef struct {
    const char *name, *summary; /* one line for --help */
    const char *help;           /* one screen, ends with two commands that can be pasted */
    /* *code is the exit code when the status is KV_OK (preset to 0). */
    kv_status (*run)(int argc, char **argv, int *code, kv_error *err);
} tr_command;

extern const tr_command tr_info, tr_verify, tr_recover, tr_diff, tr_slice, tr_cat, tr_import, tr_export, tr_synth;

/* kv_cli_parse plus the check that `least`..`most` names follow. */
kv_status tr_parse(int argc, char **argv, const kv_opt *opts, kv_list *rest, size_t least, size_t most, kv_error *err);
/* "A:B", "A:", ":B", "A" (one row) within 0..max. */
kv_status tr_range(const char *s, uint32_t max, uint32_t *a, uint32_t *b, kv_error *err);
/* "0,3,7:10" as ascending numbers, each of which must be in known[0..n_known). *out is malloc'd. */
kv_status tr_numbers(const char *s, const char *what, const uint32_t *known, uint32_t n_known, uint32_t **out,
                     uint32_t *n, kv_error *err);
uint32_t tr_threads(void); /* processors of this machine, at most 16 */
/* A fresh info for traces that come from no model: layers 0..n-1, full attention. */
kv_status tr_new_info(kv_trace_info *i, const char *arch, uint32_t layers, uint32_t q_heads, uint32_t kv_heads,
                      uint32_t head_dim, uint32_t tokens, kv_error *err);

#endif
