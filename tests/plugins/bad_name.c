/* bad_name - a name that would break specs and file names. */
#include "kvtrace_policy.h"

static int score(const kv_plugin_layer *l, const kv_plugin_unit *u, const void *state, float *out, char *err,
                 size_t size)
{
    (void)l, (void)u, (void)state, (void)out, (void)err, (void)size;
    return 0;
}

const kv_plugin *kv_plugin_entry(void)
{
    static const kv_plugin me = {
        .abi = KV_PLUGIN_ABI, .size = sizeof me, .name = "My Policy:1", .summary = "s", .paper = "p", .score = score};
    return &me;
}
