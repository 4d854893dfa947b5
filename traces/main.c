/* main.c - kv-trace: look at, check, save, cut and make traces. */
#include "traces/tr.h"

#include <stdlib.h>

static const tr_command *const commands[] = {&tr_info, &tr_verify, &tr_recover, &tr_diff, &tr_slice,
                                             &tr_cat,  &tr_import, &tr_export,  &tr_synth};
#define N_COMMAND (sizeof commands / sizeof *commands)

static void usage(FILE *f)
{
    fputs("usage: kv-trace COMMAND [options]\n\n"
          "Look at, check, save, cut and make attention traces (.kvt).\n\n",
          f);
    for (size_t i = 0; i < N_COMMAND; i++) fprintf(f, "  %-9s %s\n", commands[i]->name, commands[i]->summary);
    fputs(
        "\n'kv-trace COMMAND --help' tells more. Exit: 0 done, 1 failed, 2 misused (recover: 3 something was lost).\n\n"
        "  kv-trace synth -o /tmp/s.kvt\n"
        "  kv-trace info /tmp/s.kvt\n",
        f);
}

static const tr_command *find(const char *name, kv_error *err)
{
    const char *names[N_COMMAND];
    for (size_t i = 0; i < N_COMMAND; i++) {
        names[i] = commands[i]->name;
        if (!strcmp(name, names[i])) return commands[i];
    }
    const char *near = kv_nearest(name, names, N_COMMAND);
    kv_fail(err, KV_EMISUSE, "unknown command '%s'%s%s%s", name, near ? ", did you mean '" : "", near ? near : "",
            near ? "'" : "");
    return NULL;
}

int main(int argc, char **argv)
{
    kv_error err = {""};
    char prog[64];
    int code = 0;
    if (argc < 2) {
        usage(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        usage(stdout);
        return kv_cli_exit("kv-trace", KV_OK, NULL);
    }
    if (!strcmp(argv[1], "--version")) {
        kv_cli_version("kv-trace");
        return kv_cli_exit("kv-trace", KV_OK, NULL);
    }
    const tr_command *c = find(argv[1], &err);
    if (!c) return kv_cli_exit("kv-trace", KV_EMISUSE, &err);
    for (int i = 2; i < argc && strcmp(argv[i], "--"); i++)
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            fputs(c->help, stdout);
            return kv_cli_exit("kv-trace", KV_OK, NULL);
        }
    snprintf(prog, sizeof prog, "kv-trace %s", c->name);
    kv_catch_signals();
    kv_status st = c->run(argc - 1, argv + 1, &code, &err);
    int exit_code = kv_cli_exit(prog, st, &err);
    return exit_code ? exit_code : code;
}
