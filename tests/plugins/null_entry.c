/* null_entry - an entry that has nothing to say. */
#include "kvtrace_policy.h"

const kv_plugin *kv_plugin_entry(void)
{
    return NULL;
}
