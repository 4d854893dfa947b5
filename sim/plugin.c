/* plugin.c - loading plug-ins and checking what they say about themselves before anything believes it. */
#include "sim/plugin.h"

#include <dlfcn.h>
#include <elf.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "sim/layer.h"

#define FILE_MAX   ((size_t)256 << 20)
#define NAME_CHARS "abcdefghijklmnopqrstuvwxyz0123456789._-"
enum { KNOWN_NEEDS = 31, WINDOW_MAX = 1 << 20 };

/* The segments that loading maps lie inside the file: dlopen does not look, and dies of SIGBUS on a copy that was cut
 * short. */
static bool is_whole_elf(const uint8_t *b, size_t n)
{
    Elf64_Ehdr h;
    if (n < sizeof h || memcmp(b, ELFMAG, SELFMAG) || b[EI_CLASS] != ELFCLASS64) return false;
    memcpy(&h, b, sizeof h);
    if (h.e_phentsize != sizeof(Elf64_Phdr) || h.e_phoff > n || (n - h.e_phoff) / sizeof(Elf64_Phdr) < h.e_phnum)
        return false;
    for (size_t i = 0; i < h.e_phnum; i++) {
        Elf64_Phdr p;
        memcpy(&p, b + h.e_phoff + i * sizeof p, sizeof p);
        if (p.p_offset > n || p.p_filesz > n - p.p_offset) return false;
    }
    return true;
}

static kv_status check_file(kv_plug *p, kv_error *err)
{
    struct stat sb;
    uint8_t *bytes = NULL;
    size_t n = 0;
    kv_sha256 h;
    if (!strchr(p->path, '/'))
        return kv_fail(err, KV_EMISUSE,
                       "plug-in '%s': give a path with a '/', such as plugin:./%s (nothing is searched)", p->path,
                       p->path);
    if (strpbrk(p->path, ",|"))
        return kv_fail(err, KV_EMISUSE, "plug-in '%s': plugin: takes a whole -p; give other policies a -p of their own",
                       p->path);
    if (!stat(p->path, &sb) && !S_ISREG(sb.st_mode))
        return kv_fail(err, KV_EFORMAT, "cannot load plug-in '%s': not a regular file", p->path);
    kv_status st = kv_read_file(p->path, FILE_MAX, &bytes, &n, err);
    if (st) return st;
    if (!is_whole_elf(bytes, n))
        st = kv_fail(
            err, KV_EFORMAT,
            "cannot load plug-in '%s': not a 64-bit shared object, or cut short; build it with cc -shared -fPIC",
            p->path);
    kv_sha256_init(&h), kv_sha256_update(&h, bytes, n), kv_sha256_hex(&h, p->sha256);
    free(bytes);
    return st;
}

static bool one_line(const char *s)
{
    return s && *s && strlen(s) < 512 && !strpbrk(s, "\n\r");
}

/* "key=default,..." with keys of [a-z0-9_] that are nobody else's. */
static kv_status check_params(const kv_plug *p, kv_error *err)
{
    for (const char *s = p->entry->params; s && *s;) {
        char key[41] = "";
        size_t n = strspn(s, "abcdefghijklmnopqrstuvwxyz0123456789_"), v = strcspn(s, ",");
        snprintf(key, sizeof key, "%.*s", (int)(n < 40 ? n : 40), s);
        bool taken = !strcmp(key, "file") || !strcmp(key, "sha256");
        for (size_t i = 0; i < kv_slot_count(); i++) taken |= !strcmp(key, kv_slot_describe(i).name);
        for (const char *e = p->entry->params; e < s; e += strcspn(e, ",") + 1)
            taken |= strspn(e, NAME_CHARS) == n && !memcmp(e, s, n);
        if (!n || n > 40 || s[n] != '=' || v <= n + 1 || (s[v] && !s[v + 1]) || memchr(s, '|', v))
            return kv_fail(err, KV_EFORMAT, "plug-in '%s': its parameters '%s' are not written key=default,...",
                           p->path, p->entry->params);
        if (taken)
            return kv_fail(err, KV_EFORMAT,
                           "plug-in '%s': its parameter '%s' stands twice or is a name kvtrace uses itself; rename it",
                           p->path, key);
        s += v + (s[v] == ',');
    }
    return KV_OK;
}

kv_status kv_plug_check(const kv_plug *p, kv_error *err)
{
    const kv_plugin *e = p->entry;
    const char *wrong = NULL;
    if (!e) return kv_fail(err, KV_EFORMAT, "plug-in '%s': kv_plugin_entry returned NULL", p->path);
    if (e->abi != KV_PLUGIN_ABI)
        return kv_fail(
            err, KV_EUNSUPPORTED,
            "plug-in '%s' was built for ABI %u, this program has %u: rebuild it with this version's kvtrace_policy.h",
            p->path, e->abi, KV_PLUGIN_ABI);
    if (e->size != sizeof *e)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "plug-in '%s' says its kv_plugin has %u bytes, here it has %zu: rebuild it with this version's "
                       "kvtrace_policy.h",
                       p->path, e->size, sizeof *e);
    if (!e->name || !*e->name || strlen(e->name) > 40 || e->name[strspn(e->name, NAME_CHARS)])
        wrong = "name must be 1 to 40 of a-z 0-9 . _ -";
    else if (!one_line(e->summary) || !one_line(e->paper))
        wrong = "summary and paper must be one line each, not empty";
    else if (e->needs & ~(unsigned)KNOWN_NEEDS)
        wrong = "needs has bits that mean nothing";
    else if (e->granularity > KV_PLUGIN_PER_LAYER)
        wrong = "granularity must be one of KV_PLUGIN_PER_*";
    else if (e->window > WINDOW_MAX)
        wrong = "window must be at most 1048576";
    else if (!e->score)
        wrong = "score is NULL";
    if (wrong) return kv_fail(err, KV_EFORMAT, "plug-in '%s': %s", p->path, wrong);
    return check_params(p, err);
}

static kv_status load(kv_plug *p, kv_error *err)
{
    const kv_plugin *(*entry)(void);
    if (!(p->library = dlopen(p->path, RTLD_NOW | RTLD_LOCAL))) {
        const char *why = dlerror();
        size_t n = strlen(p->path);
        if (!why) why = "unknown reason";
        if (!strncmp(why, p->path, n) && !strncmp(why + n, ": ", 2)) why += n + 2; /* it names the file too */
        return kv_fail(err, KV_EFORMAT, "cannot load plug-in '%s': %.*s", p->path, (int)strcspn(why, "\n"), why);
    }
    void *symbol = dlsym(p->library, "kv_plugin_entry");
    if (!symbol)
        return kv_fail(err, KV_EFORMAT,
                       "plug-in '%s' exports no kv_plugin_entry; is it a plug-in? (kvtrace_policy.h tells)", p->path);
    memcpy(&entry, &symbol, sizeof entry); /* ISO C has no cast from an object's address to a function's */
    p->entry = entry();
    return kv_plug_check(p, err);
}

static kv_status make_row(kv_plug *p, kv_error *err)
{
    static const char *const granularity[] = {"query_head", "kv_head", "layer"};
    const kv_plugin *e = p->entry;
    p->params = kv_format("%s", e->params ? e->params : "");
    p->text[0] = kv_format("plugin.%s", e->name);
    p->text[1] = kv_format("%s", e->summary);
    p->text[2] = kv_format("%s", e->paper);
    p->text[3] = kv_format("score=plugin,window=%u,granularity=%s", e->window, granularity[e->granularity]);
    for (int i = 0; i < 4; i++)
        if (!p->text[i] || !p->params) return kv_fail(err, KV_ENOMEM, "out of memory");
    p->row = (kv_policy){
        p->text[0], p->text[1], p->text[2], p->path, "not verified: plug-in", "yes with uniform layers and heads",
        p->text[3]};
    return KV_OK;
}

kv_status kv_plug_open(const char *path, kv_plug **out, kv_error *err)
{
    kv_plug *p = NULL;
    kv_status st = kv_array(&p, 1, sizeof *p, err);
    *out = NULL;
    if (!st && !(p->path = kv_format("%s", path))) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st) st = check_file(p, err);
    if (!st) st = load(p, err);
    if (!st) st = make_row(p, err);
    if (st)
        kv_plug_close(p);
    else
        *out = p;
    return st;
}

void kv_plug_close(kv_plug *p)
{
    if (!p) return;
    if (p->started && p->entry->fini) p->entry->fini(p->state);
    if (p->library) dlclose(p->library);
    for (int i = 0; i < 4; i++) free(p->text[i]);
    free(p->path), free(p->params), free(p);
}

kv_status kv_plug_set(kv_plug *p, const char *key, const char *value, bool *mine, kv_error *err)
{
    size_t n = strlen(key);
    *mine = true;
    if (!strcmp(key, "sha256"))
        return !strcmp(value, p->sha256)
                   ? KV_OK
                   : kv_fail(err, KV_EMISUSE,
                             "plug-in '%s' is another file than the one asked for: its SHA-256 is %s, not '%s'",
                             p->path, p->sha256, value);
    for (const char *s = p->params; *s; s += strcspn(s, ","), s += *s == ',') {
        if (strncmp(s, key, n) || s[n] != '=') continue;
        if (!*value) return kv_fail(err, KV_EMISUSE, "plug-in '%s': parameter '%s' needs a value", p->path, key);
        char *now = kv_format("%.*s=%s%s", (int)(s - p->params + (ptrdiff_t)n), p->params, value, s + strcspn(s, ","));
        if (!now) return kv_fail(err, KV_ENOMEM, "out of memory");
        free(p->params), p->params = now;
        return KV_OK;
    }
    *mine = false;
    return KV_OK;
}

const char *kv_plug_reason(char why[KV_PLUG_REASON])
{
    why[KV_PLUG_REASON - 1] = 0;
    why[strcspn(why, "\n\r")] = 0;
    return *why ? why : "no reason given";
}

kv_status kv_plug_start(kv_plug *p, kv_error *err)
{
    char why[KV_PLUG_REASON] = "";
    int rc = p->entry->init ? p->entry->init(p->params, &p->state, why, sizeof why) : 0;
    if (rc)
        return kv_fail(err, KV_EMISUSE, "plug-in '%s' refuses its parameters '%s': %s", p->path, p->params,
                       kv_plug_reason(why));
    p->started = true;
    return KV_OK;
}

char *kv_plug_identity(const kv_plug *p)
{
    return kv_format("file=%s,sha256=%s%s%s", p->path, p->sha256, *p->params ? "," : "", p->params);
}

unsigned kv_plug_needs(const kv_plug *p)
{
    unsigned n = p->entry->needs;
    return (n & (KV_PLUGIN_NEEDS_PROBS | KV_PLUGIN_NEEDS_WINDOW_QUERIES) ? KV_NEED_WINDOW : 0u) |
           (n & KV_PLUGIN_NEEDS_ALL_QUERIES ? KV_NEED_QUERIES : 0u) |
           (n & KV_PLUGIN_NEEDS_COLSUM ? KV_NEED_COLSUM : 0u) | (n & KV_PLUGIN_NEEDS_WO ? KV_NEED_WO : 0u);
}
