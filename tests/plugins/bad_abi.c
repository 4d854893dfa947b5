/* bad_abi - speaks an ABI of another time; nothing but the first field may be believed. */
#include "kvtrace_policy.h"

const kv_plugin *kv_plugin_entry(void)
{
    static const uint32_t other[2] = {KV_PLUGIN_ABI + 98, 8};
    return (const kv_plugin *)(const void *)other;
}
