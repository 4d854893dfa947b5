/* bad_size - the ABI number is right, the structure is not. */
#include "kvtrace_policy.h"

const kv_plugin *kv_plugin_entry(void)
{
    static const uint32_t other[2] = {KV_PLUGIN_ABI, 8};
    return (const kv_plugin *)(const void *)other;
}
