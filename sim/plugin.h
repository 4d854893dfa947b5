/* plugin.h - plug-ins (kvtrace_policy.h) as the program sees them: loaded, checked, with their parameters. */
#ifndef KV_PLUGIN_H
#define KV_PLUGIN_H

#include "sim/kvtrace_policy.h"
#include "sim/policy.h"

typedef struct kv_plug {
    void *library;
    const kv_plugin *entry;
    void *state; /* from init */
    bool started;
    char *path;      /* as given */
    char sha256[65]; /* of the file */
    char *params;    /* "power=1,floor=0.2": all of them, in the plug-in's order; "" when it has none */
    char *text[4];   /* what row points to */
    kv_policy row;   /* name "plugin.NAME" */
} kv_plug;

/* Load a file; path must hold a '/' (nothing is searched). Errors, one line each: KV_EMISUSE path without '/', KV_EIO
 * no such file, KV_EFORMAT not a shared object, cut short, or an entry that makes no sense, KV_EUNSUPPORTED another
 * ABI. */
kv_status kv_plug_open(const char *path, kv_plug **out, kv_error *err);
/* The part of it that believes p->entry nothing: texts, numbers and parameters make sense. */
kv_status kv_plug_check(const kv_plug *p, kv_error *err);
/* Takes key=value if it is one of the plug-in's own parameters (*mine says) or sha256, which must then be that of the
 * file. */
kv_status kv_plug_set(kv_plug *p, const char *key, const char *value, bool *mine, kv_error *err);
/* Hand the parameters to init(); once, before the first score. */
kv_status kv_plug_start(kv_plug *p, kv_error *err);
void kv_plug_close(kv_plug *p); /* NULL accepted */
/* "file=PATH,sha256=HEX[,power=1]", for canonical specs. free(). */
char *kv_plug_identity(const kv_plug *p);
/* What a plug-in wrote into its error text, as one line that ends. */
#define KV_PLUG_REASON 256
const char *kv_plug_reason(char why[KV_PLUG_REASON]);
unsigned kv_plug_needs(const kv_plug *p); /* KV_NEED_* */

#endif
