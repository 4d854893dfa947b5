/* no_entry - a shared object that is no plug-in. */
extern const int kv_plugin_entri;
const int kv_plugin_entri = 1;
