/* fails - at layer 1, unit 1, in the way `how` says: nan, inf, text, silent; everywhere else position i scores i. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "kvtrace_policy.h"

static int init(const char *params, void **state, char *err, size_t size)
{
    static const char *const known[] = {"nan", "inf", "text", "silent"};
    for (int i = 0; i < 4; i++)
        if (!strcmp(params + strlen("how="), known[i])) return *state = (void *)(uintptr_t)known[i], 0;
    snprintf(err, size, "how is nan, inf, text or silent\nand this is a second line");
    return -1;
}

static int score(const kv_plugin_layer *l, const kv_plugin_unit *u, const void *state, float *out, char *err,
                 size_t size)
{
    const char *how = state;
    for (uint32_t i = 0; i < l->L; i++) out[i] = (float)i;
    if (l->layer != 1 || u->index != 1) return 0;
    if (!strcmp(how, "text")) snprintf(err, size, "matrix is singular at %d\nsecond line", 7);
    if (!strcmp(how, "nan")) out[3] = nanf("");
    if (!strcmp(how, "inf")) out[2] = -INFINITY;
    return !strcmp(how, "text") || !strcmp(how, "silent");
}

const kv_plugin *kv_plugin_entry(void)
{
    static const kv_plugin me = {.abi = KV_PLUGIN_ABI,
                                 .size = sizeof me,
                                 .name = "fails",
                                 .summary = "fails as asked",
                                 .paper = "none",
                                 .granularity = KV_PLUGIN_PER_KV_HEAD,
                                 .params = "how=nan",
                                 .init = init,
                                 .score = score};
    return &me;
}
