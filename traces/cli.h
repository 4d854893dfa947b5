/* cli.h - the command line of all four programs: options from one table, numbers parsed whole, one progress bar.
 * stdout is data, stderr is talk. Exit codes: 0 done, 1 failed, 2 misused. */
#ifndef KV_CLI_H
#define KV_CLI_H

#include "traces/base.h"

typedef enum {
    KV_OPT_FLAG,  /* bool   * set to true                                                        */
    KV_OPT_STR,   /* const char * *, last one wins                                                */
    KV_OPT_LIST,  /* kv_list *, every occurrence appended                                         */
    KV_OPT_U32,   /* uint32_t *                                                                  */
    KV_OPT_U64,   /* uint64_t *                                                                  */
    KV_OPT_F64,   /* double *                                                                    */
    KV_OPT_BYTES, /* uint64_t *, accepts 64MiB 2G 1e9 ...                                         */
} kv_opt_kind;

typedef struct {
    const char **v;
    size_t n;
} kv_list;
void kv_list_free(kv_list *l); /* frees the array, not the strings */

typedef struct {
    const char *name; /* "budget", without dashes */
    char letter;      /* 'b' or 0 */
    kv_opt_kind kind;
    void *to;
} kv_opt;

/* Parse argv[1..] by `opts` (ends with name == NULL); everything else is appended to `rest`. "--x=v", "--x v", "-xv",
 * "-x v", "--" are understood. KV_EMISUSE with a message that names the argument and the nearest known one. */
kv_status kv_cli_parse(int argc, char **argv, const kv_opt *opts, kv_list *rest, kv_error *err);
/* Print "prog: message" and, for KV_EMISUSE, "try 'prog --help'" on stderr; returns the exit code (0, 1 or 2). What was
 * printed must have arrived: KV_OK is 1 when stdout could not be written. */
int kv_cli_exit(const char *prog, kv_status st, const kv_error *err);
/* "kv-sim 0.1.0 (commit, compiler, cuda or not)" on stdout. */
void kv_cli_version(const char *prog);
const char *kv_build_id(void); /* commit, compiler, CUDA or not: one token per field, no dates */

/* The whole of `s` as a number, or false. */
bool kv_parse_u64(const char *s, uint64_t *out);
bool kv_parse_f64(const char *s, double *out); /* finite, locale-free */
bool kv_parse_bytes(const char *s, uint64_t *out);
/* "I/N" of --shard, 1 <= I <= N <= 1000000: *i counts from 0. KV_EMISUSE. */
kv_status kv_parse_shard(const char *s, uint32_t *i, uint32_t *n, kv_error *err);
/* The nearest of names[0..n) to `s` by edit distance, or NULL when nothing is near. */
const char *kv_nearest(const char *s, const char *const *names, size_t n);

/* One line on stderr with rate and ETA, redrawn at most 10 times a second, only when stderr is a terminal and the job
 * has run for more than a second. total = 0: unknown. note may be NULL. Thread-safe. */
typedef struct kv_progress kv_progress;
kv_progress *kv_progress_start(const char *what, double total, const char *unit);
void kv_progress_step(kv_progress *p, double done, const char *note);
void kv_progress_end(kv_progress *p); /* erases the line; NULL accepted */

/* SIGINT/SIGTERM set a flag; long loops look at it and return KV_EINTERRUPTED. A second signal kills. */
void kv_catch_signals(void);
bool kv_interrupted(void);
/* The same for work that is done piece by piece: the first signal asks to stop behind the piece under way (note, NULL
 * allowed, then goes to the terminal), the second one interrupts, the third kills. */
void kv_catch_signals_between(const char *note);
bool kv_stop_wanted(void);

#endif
