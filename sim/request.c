/* request.c - the options `run` and `keep` share. */
#include <stdlib.h>

#include "sim/commands.h"
#include "sim/oracle.h"
#include "sim/scorer.h"
#include "traces/plain.h"

/* --protect sink=4,recent=32,segment=NAME */
static kv_status protect(kv_spec *s, const char *text, kv_error *err)
{
    kv_status st = KV_OK;
    char *copy = kv_format("%s", text), *save = NULL;
    if (!copy) return kv_fail(err, KV_ENOMEM, "out of memory");
    for (char *item = strtok_r(copy, ",", &save); item && !st; item = strtok_r(NULL, ",", &save)) {
        char *eq = strchr(item, '=');
        if (eq) *eq = 0;
        char name[32];
        snprintf(name, sizeof name, "protect_%s", item);
        if (!eq || (strcmp(item, "sink") && strcmp(item, "recent") && strcmp(item, "segment")))
            st = kv_fail(err, KV_EMISUSE, "--protect '%s': want sink=N,recent=N,segment=NAME", text);
        else
            st = kv_spec_set(s, name, eq + 1, err);
    }
    free(copy);
    return st;
}

static void drop_repeats(kv_request *r)
{
    for (size_t i = 0; i < r->n_spec; i++)
        for (size_t k = i + 1; k < r->n_spec;)
            if (strcmp(r->spec[i].canonical, r->spec[k].canonical)) {
                k++;
            } else {
                if (!r->spec[i].unread) r->spec[i].unread = r->spec[k].unread, r->spec[k].unread = NULL;
                kv_spec_free(&r->spec[k]);
                memmove(&r->spec[k], &r->spec[k + 1], (--r->n_spec - k) * sizeof *r->spec);
            }
}

kv_status kv_request_resolve(kv_request *r, kv_error *err)
{
    kv_status st = KV_OK;
    if (!r->policies.n) return kv_fail(err, KV_EMISUSE, "no policy: give -p NAME (see `kv-sim policies`)");
    if (!r->budgets.n) return kv_fail(err, KV_EMISUSE, "no budget: give -b 5%%,512 or -b auto");
    if (!r->cut) r->cut = "prompt";
    if (strcmp(r->cut, "prompt") && strcmp(r->cut, "context"))
        return kv_fail(err, KV_EMISUSE, "--cut '%s': want prompt or context", r->cut);
    for (size_t i = 0; i < r->policies.n && !st; i++) st = kv_spec_parse(r->policies.v[i], &r->spec, &r->n_spec, err);
    for (size_t i = 0; i < r->budgets.n && !st; i++)
        st = kv_budget_parse(r->budgets.v[i], &r->budget, &r->n_budget, err);
    for (size_t i = 0; i < r->n_spec && !st; i++) {
        kv_spec *s = &r->spec[i];
        char seed[32];
        snprintf(seed, sizeof seed, "%llu", (unsigned long long)r->seed);
        if (s->file) continue; /* a kept set made elsewhere: nothing to change */
        if (r->granularity) st = kv_spec_set(s, "granularity", r->granularity, err);
        if (!st && r->protect) st = protect(s, r->protect, err);
        if (!st && r->page) {
            snprintf(seed, sizeof seed, "%u", r->page);
            st = kv_spec_set(s, "page", seed, err);
            snprintf(seed, sizeof seed, "%llu", (unsigned long long)r->seed);
        }
        if (!st && r->seed) st = kv_spec_set(s, "seed", seed, err);
        if (!st) st = kv_spec_seal(s, err);
    }
    if (!st) drop_repeats(r);
    for (size_t i = 0; i < r->n_budget && !st; i++)
        for (size_t k = i + 1; k < r->n_budget;)
            if (strcmp(r->budget[i].text, r->budget[k].text))
                k++;
            else
                memmove(&r->budget[k], &r->budget[k + 1], (--r->n_budget - k) * sizeof *r->budget);
    return st;
}

kv_status kv_request_add_gap(kv_request *r, kv_error *err)
{
    kv_status st = KV_OK;
    size_t n = r->n_spec;
    for (size_t i = 0; i < n && !st; i++) {
        uint32_t parts[KV_ORACLE_CORNERS];
        size_t n_part = kv_oracle_corners(&r->spec[i], parts);
        for (size_t k = 0; k < n_part * KV_TARGET_COUNT && !st; k++) {
            uint32_t part = parts[k / KV_TARGET_COUNT], target = k % KV_TARGET_COUNT;
            if (part == KV_ORACLE_WINDOW && target) continue; /* the policy's own scorer has no target */
            st = kv_spec_parse(r->spec[i].canonical, &r->spec, &r->n_spec, err);
            if (st) break;
            r->spec[r->n_spec - 1].oracle = part, r->spec[r->n_spec - 1].target = target;
            st = kv_spec_seal(&r->spec[r->n_spec - 1], err);
        }
        char *own = NULL, *class = NULL;
        if (!st && !kv_scorers[r->spec[i].scorer]->future) st = kv_oracle_of(&r->spec[i], &own, &class, err);
        while (!st && own) { /* and the oracle above that one */
            st = kv_spec_parse(own, &r->spec, &r->n_spec, err);
            const kv_spec *o = &r->spec[r->n_spec - 1];
            bool above = !st && o->decode == KV_DECODE_MATCH;
            free(own), free(class);
            own = class = NULL;
            if (above) st = kv_oracle_of(o, &own, &class, err);
        }
        free(class);
    }
    if (!st) drop_repeats(r);
    return st;
}

void kv_spec_print_unread(const kv_spec *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        bool said = false; /* once for a grid */
        for (size_t k = 0; k < i; k++)
            said |= s[k].row == s[i].row && s[k].unread && s[i].unread && !strcmp(s[k].unread, s[i].unread);
        if (s[i].unread && !said)
            fprintf(stderr,
                    "kv-sim: note: nothing in this form of policy '%s' reads %s: no effect (`kv-sim policies %s` lists "
                    "what it reads)\n",
                    s[i].row->name, kv_plain(s[i].unread).s, s[i].row->name);
    }
}

void kv_request_free(kv_request *r)
{
    for (size_t i = 0; i < r->n_spec; i++) kv_spec_free(&r->spec[i]);
    free(r->spec), free(r->budget);
    kv_list_free(&r->policies), kv_list_free(&r->budgets);
    *r = (kv_request){0};
}
