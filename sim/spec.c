/* spec.c - policy arguments: NAME:key=value,... into filled specs. */
#include <stdlib.h>

#include "sim/plugin.h"
#include "traces/cli.h"

static const kv_policy MASK_ROW = {"mask",
                                   "kept sets or a schedule made elsewhere, from a NumPy file",
                                   "yours",
                                   "the file",
                                   "not verified: the file is taken as it is",
                                   "no: one set, whatever the budget",
                                   ""};
static const kv_policy PLUGIN_ROW = {.name = "plugin"}; /* until the file is loaded and brings its own */

void kv_spec_free(kv_spec *s)
{
    if (!s) return;
    free(s->file), free(s->canonical), free(s->ranking_key), free(s->unread);
    free(s->mean_file), free(s->cov_file), free(s->importance), free(s->protect_segment);
    free(s->filters), free(s->pattern), free(s->cosine);
    kv_plug_close(s->plugin);
    *s = (kv_spec){0};
}

/* key=value,... of a row or of the command line, every value plain. A plug-in's own parameters come before the slots.
 */
static kv_status apply(kv_spec *s, const char *params, kv_error *err)
{
    kv_status st = KV_OK;
    char *copy = kv_format("%s", params), *save = NULL;
    if (!copy) return kv_fail(err, KV_ENOMEM, "out of memory");
    for (char *item = strtok_r(copy, ",", &save); item && !st; item = strtok_r(NULL, ",", &save)) {
        char *eq = strchr(item, '=');
        bool done = false;
        if (!eq)
            st = kv_fail(err, KV_EMISUSE, "'%s': want key=value", item);
        else
            *eq = 0;
        if (!st && s->plugin) st = kv_plug_set(s->plugin, item, eq + 1, &done, err);
        if (!st && !done) st = kv_spec_set(s, item, eq + 1, err);
    }
    free(copy);
    return st;
}

static kv_status find_row(const char *name, const kv_policy **out, kv_error *err)
{
    const char *names[128] = {0};
    size_t n = 0;
    for (const kv_policy *p = kv_policies; p->name; p++) {
        if (!strcmp(p->name, name)) return *out = p, KV_OK;
        if (n < sizeof names / sizeof *names) names[n++] = p->name;
    }
    if (!strcmp(name, "mask") || !strcmp(name, "plugin"))
        return kv_fail(err, KV_EMISUSE, "%s:FILE takes the whole argument: give it a -p of its own", name);
    const char *near = kv_nearest(name, names, n);
    char list[800] = "";
    for (size_t i = 0, at = 0; i < n && at < sizeof list; i++)
        if (!strchr(names[i], '.'))
            at += (size_t)snprintf(list + at, sizeof list - at, "%s%s", at ? " " : "", names[i]);
    return kv_fail(err, KV_EMISUSE,
                   "unknown policy '%s'%s%s%s; known: %s mask:FILE plugin:FILE, and the presets of `kv-sim policies`",
                   name, near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "", list);
}

static kv_status push(kv_spec **out, size_t *n, const kv_spec *s, kv_error *err)
{
    if (!(*n & (*n - 1))) { /* room for twice as many whenever n reaches a power of two */
        kv_spec *more = realloc(*out, (*n ? 2 * *n : 1) * sizeof *more);
        if (!more) return kv_fail(err, KV_ENOMEM, "out of memory");
        *out = more;
    }
    (*out)[(*n)++] = *s;
    return KV_OK;
}

static kv_status parse_mask(const char *file, kv_spec **out, size_t *n, kv_error *err)
{
    if (!*file) return kv_fail(err, KV_EMISUSE, "mask: needs a file, mask:KEPT.npy");
    kv_spec s = {.row = &MASK_ROW, .file = kv_format("%s", file)};
    kv_status st = s.file ? kv_spec_seal(&s, err) : kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st) st = push(out, n, &s, err);
    if (st) kv_spec_free(&s);
    return st;
}

/* One policy with its parameter text; values with '|' expand, last parameter fastest. plugin: NULL or the file of a
 * plug-in, which every spec loads for itself. */
static kv_status expand(const kv_policy *row, const char *plugin, const char *params, kv_spec **out, size_t *n,
                        kv_error *err)
{
    const char *bar = strchr(params, '|');
    if (bar) {
        const char *from = bar, *to = bar + strcspn(bar, ",");
        while (from > params && from[-1] != '=' && from[-1] != ',') from--;
        for (const char *v = from; v <= to;) {
            size_t len = strcspn(v, "|,");
            char *one = kv_format("%.*s%.*s%s", (int)(from - params), params, (int)len, v, to);
            kv_status st = one ? expand(row, plugin, one, out, n, err) : kv_fail(err, KV_ENOMEM, "out of memory");
            free(one);
            if (st) return st;
            if (*n > 10000)
                return kv_fail(err, KV_EMISUSE, "policy '%s': the grid has more than 10,000 points", row->name);
            v += len + 1;
        }
        return KV_OK;
    }
    kv_spec s = {.row = row,
                 .granularity = KV_GRAN_KV_HEAD,
                 .row_reduce = KV_ROWS_MEAN,
                 .group_reduce = KV_GROUP_MEAN,
                 .kernel = 1,
                 .page = 1,
                 .beta = 20,
                 .cascading = 1,
                 .gamma = 200,
                 .alpha = 0.2,
                 .tau1 = 1,
                 .tau2 = 1,
                 .n_future = 512,
                 .use_covariance = 1,
                 .use_vnorm = 1,
                 .lag_size = 128,
                 .chunk_size = 256,
                 .local_window = 16,
                 .chunk_length = 20,
                 .block_size = 128,
                 .tau = 5,
                 .mix_lambda = 0.07,
                 .first_stage_ratio = 0.5,
                 .squeeze = 0.35,
                 .cover = 1,
                 .recent = KV_RECENT_HALF,
                 .every = 1,
                 .heavy_ratio = 0.1,
                 .recent_ratio = 0.1,
                 .epsilon = 0};
    kv_status st = plugin ? kv_plug_open(plugin, &s.plugin, err) : KV_OK;
    if (!st && plugin) s.row = &s.plugin->row;
    if (!st) st = apply(&s, s.row->slots, err);
    kv_spec row_only = s; /* to compare fields with; its pointers are not used */
    if (!st) st = apply(&s, params, err);
    if (!st && plugin) st = kv_plug_start(s.plugin, err);
    if (!st) st = kv_spec_seal(&s, err);
    if (!st) st = kv_spec_note_unread(&s, &row_only, params, err);
    if (!st) st = push(out, n, &s, err);
    if (st) kv_spec_free(&s);
    return st;
}

/* The ':' behind which key=value,... begins, or the end. */
static const char *params_at(const char *s)
{
    for (const char *c = strchr(s, ':'); c; c = strchr(c + 1, ':')) {
        size_t k = strspn(c + 1, "abcdefghijklmnopqrstuvwxyz0123456789_");
        if (k && c[1 + k] == '=') return c;
    }
    return s + strlen(s);
}

/* FILE[:key=value,...], or NAME:file=FILE[,key=value,...] as canonical strings have it. */
static kv_status parse_plugin(const char *arg, bool canonical, kv_spec **out, size_t *n, kv_error *err)
{
    const char *from = arg, *to = params_at(arg);
    if (canonical) {
        if (strncmp(to, ":file=", 6))
            return kv_fail(err, KV_EMISUSE, "plugin.%s: want plugin:FILE.so, or plugin.NAME:file=FILE.so", arg);
        from = to + 6, to = from + strcspn(from, ",");
    }
    char *file = kv_format("%.*s", (int)(to - from), from);
    size_t first = *n;
    kv_status st = file ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st && !*file) st = kv_fail(err, KV_EMISUSE, "plugin: needs a file, plugin:./FILE.so");
    if (!st) st = expand(&PLUGIN_ROW, file, *to ? to + 1 : "", out, n, err);
    for (size_t i = first; i < *n && !st && canonical; i++) {
        size_t len = strcspn(arg, ":");
        const char *name = (*out)[i].plugin->entry->name;
        if (strlen(name) != len || memcmp(name, arg, len))
            st = kv_fail(err, KV_EMISUSE, "plug-in '%s' is '%s', not '%.*s'", file, name, (int)len, arg);
    }
    free(file);
    return st;
}

kv_status kv_spec_parse(const char *arg, kv_spec **out, size_t *n, kv_error *err)
{
    kv_status st = KV_OK;
    if (!strncmp(arg, "mask:", 5)) return parse_mask(arg + 5, out, n, err);
    if (!strncmp(arg, "plugin:", 7) || !strncmp(arg, "plugin.", 7))
        return parse_plugin(arg + 7, arg[6] == '.', out, n, err);
    if (!*arg) return kv_fail(err, KV_EMISUSE, "empty policy; `kv-sim policies` lists them");
    char *copy = kv_format("%s", arg), *params = kv_format("%s", "");
    const kv_policy *row = NULL;
    if (!copy || !params) {
        st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    for (char *item = copy; item && !st;) {
        char *comma = strchr(item, ',');
        if (comma) *comma = 0;
        char *colon = strchr(item, ':'), *eq = strchr(item, '=');
        if (eq && (!colon || eq < colon)) { /* continues the last policy */
            if (!row) st = kv_fail(err, KV_EMISUSE, "'%s': a parameter before any policy", item);
            char *more = kv_format("%s%s%s", params, *params ? "," : "", item);
            if (!more)
                st = kv_fail(err, KV_ENOMEM, "out of memory");
            else
                free(params), params = more;
        } else {
            if (row) st = expand(row, NULL, params, out, n, err);
            if (colon) *colon = 0;
            if (!st) st = find_row(item, &row, err);
            char *fresh = kv_format("%s", colon ? colon + 1 : "");
            if (!fresh)
                st = kv_fail(err, KV_ENOMEM, "out of memory");
            else
                free(params), params = fresh;
        }
        item = comma ? comma + 1 : NULL;
    }
    if (!st && row) st = expand(row, NULL, params, out, n, err);
out:
    free(copy), free(params);
    return st;
}
