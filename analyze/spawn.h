/* spawn.h - run another program (gnuplot, kv-sim) without a shell, so that no name can turn into a command. */
#ifndef KV_SPAWN_H
#define KV_SPAWN_H

#include "traces/base.h"

/* Run argv[0] (looked up in PATH when it has no slash) with stdin and stdout on /dev/null, the environment plus env[]
 * ("K=V", ends with NULL, may be NULL). Waits. *code = exit code (128 + n when signal n ended it). *said = the first 4
 * KiB of what it wrote to stderr, malloc'd, for messages. KV_EMISSING when there is no such program. */
kv_status kv_spawn(const char *const *argv, const char *const *env, int *code, char **said, kv_error *err);

/* Folder of the running executable, malloc'd. */
char *kv_exe_folder(void);

#endif
