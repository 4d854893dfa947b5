/* check.h - the whole test framework: CHECK, SKIP, a tally. A test program ends with `return kv_tally();`, which prints
 * "N passed, N failed, N skipped" and returns 1 when something failed or nothing passed. */
#ifndef KV_CHECK_H
#define KV_CHECK_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static int kv_n_pass, kv_n_fail, kv_n_skip;

/* One assertion; a failure prints the place and the text and goes on. */
#define CHECK(cond)                                                                                                    \
    do {                                                                                                               \
        if (cond)                                                                                                      \
            kv_n_pass++;                                                                                               \
        else                                                                                                           \
            kv_n_fail++, printf("FAIL %s:%d: %s\n", __FILE__, __LINE__, #cond);                                        \
    } while (0)
/* The same with a reason in printf form: the seed, the values. */
#define CHECKF(cond, ...)                                                                                              \
    do {                                                                                                               \
        if (cond)                                                                                                      \
            kv_n_pass++;                                                                                               \
        else                                                                                                           \
            kv_n_fail++, printf("FAIL %s:%d: %s: ", __FILE__, __LINE__, #cond), printf(__VA_ARGS__), putchar('\n');    \
    } while (0)
#define SKIP(why) (kv_n_skip++, printf("SKIP %s:%d: %s\n", __FILE__, __LINE__, why))

/* True when got is within atol + rtol*|want|. NaN is never close, to anything: the test is written with <= and no file
 * here is compiled with fast-math. */
static inline bool kv_close(double got, double want, double atol, double rtol)
{
    return fabs(got - want) <= atol + rtol * fabs(want);
}

/* "e29c" as bytes; returns how many. */
static inline size_t kv_unhex(const char *hex, char *out)
{
    size_t n = strlen(hex) / 2;
    for (size_t i = 0; i < n; i++) {
        unsigned x = 0;
        sscanf(hex + 2 * i, "%2x", &x);
        out[i] = (char)x;
    }
    return n;
}

/* "DIR/NAME" in one of four buffers that take turns. */
static inline const char *kv_in_dir(const char *dir, const char *name)
{
    static char path[4][256];
    static int k;
    k = (k + 1) % 4;
    snprintf(path[k], sizeof path[k], "%s/%s", dir, name);
    return path[k];
}

static inline int kv_tally(void)
{
    printf("%d passed, %d failed, %d skipped\n", kv_n_pass, kv_n_fail, kv_n_skip);
    return kv_n_fail || !kv_n_pass;
}

#endif
