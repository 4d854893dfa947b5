/* test_fuzz.c - the saved inputs of the fuzzers, each through its target: tests/fuzz/corpus/NAME/ holds the minimised
 * corpus and everything that was ever found. Arguments TARGET FILE.. run these instead.
 *
 * One check a target; a crash names the input. Together they must stay below MEMORY_MB, and each below SECONDS. */
#include <dirent.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tests/check.h"
#include "tests/fuzz/fuzz.h"

enum { SECONDS = 20, MEMORY_MB = 600, INPUT_MAX = 1 << 22 };

static const struct {
    const char *name;
    int (*run)(const uint8_t *p, size_t n);
} target[] = {
#define ROW(name) {#name, fuzz_##name},
    FUZZ_TARGETS(ROW)};
enum { N_TARGET = sizeof target / sizeof *target };

static char now[600]; /* the input at work */

static void dying(int sig)
{
    static const char said[] = "FAIL tests/test_fuzz.c: a crash or more than 20 seconds at ";
    if (write(STDOUT_FILENO, said, sizeof said - 1) > 0 && write(STDOUT_FILENO, now, strlen(now)) > 0)
        (void)!write(STDOUT_FILENO, "\n", 1);
    signal(sig, SIG_DFL);
    raise(sig);
}

static void one(size_t t, const char *path)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    snprintf(now, sizeof now, "%s", path);
    CHECKF(!kv_read_file(path, INPUT_MAX, &bytes, &n, NULL), "%s", path);
    uint8_t *exact = malloc(n ? n : 1); /* without the zero byte behind it: one too many is then seen */
    if (exact && n) memcpy(exact, bytes, n);
    free(bytes);
    alarm(SECONDS);
    if (exact) target[t].run(exact, n);
    alarm(0);
    free(exact);
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static void corpus(size_t t)
{
    char folder[200];
    struct dirent **e = NULL;
    snprintf(folder, sizeof folder, "tests/fuzz/corpus/%s", target[t].name);
    int n = scandir(folder, &e, NULL, by_name), files = 0;
    for (int i = 0; i < n; i++) {
        char path[500];
        snprintf(path, sizeof path, "%s/%s", folder, e[i]->d_name);
        if (e[i]->d_name[0] != '.') one(t, path), files++;
        free(e[i]);
    }
    free(e);
    CHECKF(files > 0, "%s holds no inputs", folder);
}

int main(int argc, char **argv)
{
    setenv("OPENBLAS_NUM_THREADS", "1", 0);
    signal(SIGABRT, dying), signal(SIGALRM, dying);
#if !defined __SANITIZE_ADDRESS__ /* its own report says more */
    signal(SIGSEGV, dying), signal(SIGBUS, dying), signal(SIGFPE, dying);
#endif
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t t = 0; t < N_TARGET; t++)
        if (argc < 2)
            corpus(t);
        else if (!strcmp(argv[1], target[t].name))
            for (int i = 2; i < argc; i++) one(t, argv[i]);
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
#if defined __SANITIZE_ADDRESS__
    CHECK(u.ru_maxrss > 0); /* what its shadow takes says nothing */
#else
    CHECKF(u.ru_maxrss < MEMORY_MB * 1024L, "%ld MB", u.ru_maxrss / 1024);
#endif
    return kv_tally();
}
