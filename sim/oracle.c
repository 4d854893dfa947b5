/* oracle.c - the oracle of a policy's class, and which parts of a policy it can take over. */
#include "sim/oracle.h"

#include <stdlib.h>

#include "sim/schedule.h"
#include "sim/scorer.h"

kv_status kv_oracle_check(const kv_spec *s, bool observes, kv_error *err)
{
    const char *who = s->row->name;
    uint32_t parts = s->oracle, free_counts = parts & (KV_ORACLE_HEADS | KV_ORACLE_LAYERS);
    if (s->observe && !observes)
        return kv_fail(err, KV_EMISUSE, "policy '%s': score=%s looks at no rows; leave observe=past", who,
                       kv_scorers[s->scorer]->name);
    if (!parts) return KV_OK;
    if (s->decode || s->select == KV_SELECT_MIXDIM)
        return kv_fail(err, KV_EMISUSE, "policy '%s': oracle= takes over parts of one cut of whole tokens; %s", who,
                       s->decode ? "leave decode=keep" : "select=mixdim keeps parts of them");
    if (parts & KV_ORACLE_WINDOW && (parts != KV_ORACLE_WINDOW || !observes || s->observe))
        return kv_fail(err, KV_EMISUSE,
                       "policy '%s': oracle=window stands alone and needs a score that looks at rows of the past "
                       "(window, colsum, maxclamp)",
                       who);
    if (free_counts && !(parts & KV_ORACLE_RANK) && s->select >= KV_SELECT_TWO_STAGE)
        return kv_fail(err, KV_EMISUSE,
                       "policy '%s': its kept sets are no prefixes of one order: oracle=heads and layers need rank",
                       who);
    return KV_OK;
}

kv_status kv_oracle_future(const kv_spec *s, uint32_t L, kv_spec *out, kv_error *err)
{
    kv_spec *one = NULL;
    size_t n = 0;
    bool chunks = s->select == KV_SELECT_CHUNKS && L >= s->chunk_length; /* their window competes (plan.c) */
    kv_status st = kv_spec_parse("oracle", &one, &n, err);
    if (st) return st;
    *out = *one;
    free(one);
    out->granularity = s->granularity, out->page = s->page, out->window = chunks ? 0 : s->window;
    out->target = s->target;
    out->protect_sink = s->protect_sink, out->protect_recent = s->protect_recent;
    if (s->protect_segment && !(out->protect_segment = kv_format("%s", s->protect_segment)))
        st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st) st = kv_spec_seal(out, err);
    if (st) kv_spec_free(out);
    return st;
}

size_t kv_oracle_corners(const kv_spec *s, uint32_t parts[KV_ORACLE_CORNERS])
{
    enum { R = KV_ORACLE_RANK, H = KV_ORACLE_HEADS, L = KV_ORACLE_LAYERS };
    size_t n = 0;
    if (s->keep_all || s->file || s->decode || kv_scorers[s->scorer]->future || s->oracle || s->observe ||
        s->select == KV_SELECT_MIXDIM)
        return 0;
    if (kv_spec_observes(s)) parts[n++] = KV_ORACLE_WINDOW;
    if (s->select < KV_SELECT_TWO_STAGE) parts[n++] = H, parts[n++] = L, parts[n++] = H | L;
    parts[n++] = R, parts[n++] = R | H, parts[n++] = R | L, parts[n++] = R | H | L;
    parts[n++] = R | H | L | KV_ORACLE_STEPS;
    return n;
}

kv_status kv_corner_of(const kv_spec *s, kv_corner *out, kv_error *err)
{
    kv_status st = KV_OK;
    *out = (kv_corner){.target = ""};
    if (!s->oracle || strstr(s->row->slots, "oracle=")) {
        out->base = kv_format("%s", s->canonical), out->parts = kv_format("%s", "");
    } else {
        kv_spec plain = *s; /* its strings stay s's */
        plain.oracle = plain.target = 0, plain.canonical = plain.ranking_key = NULL;
        st = kv_spec_seal(&plain, err);
        out->base = plain.canonical;
        free(plain.ranking_key);
        for (size_t i = 0; i < kv_slot_count(); i++)
            if (!strcmp(kv_slot_describe(i).name, "oracle")) out->parts = kv_slot_value(s, i);
        if (s->oracle != KV_ORACLE_WINDOW)
            out->target = s->target == KV_TARGET_CONTESTED ? "recall_contested" : "recall";
    }
    if (!st && (!out->base || !out->parts)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (st) kv_corner_free(out);
    return st;
}

void kv_corner_free(kv_corner *c)
{
    free(c->base), free(c->parts);
    *c = (kv_corner){0};
}

/* One of the oracle rows with the units, pages and protection of s. */
static kv_status row_for(const kv_spec *s, const char *name, kv_spec *out, kv_error *err)
{
    kv_spec *one = NULL, f;
    size_t n = 0;
    kv_status st = kv_spec_parse(name, &one, &n, err);
    if (st) return st;
    *out = *one;
    free(one);
    out->granularity = s->granularity;
    if (out->decode) return kv_spec_seal(out, err);
    if ((st = kv_oracle_future(s, UINT32_MAX, &f, err))) return st;
    f.row = out->row, f.heads = out->heads, f.layers = out->layers, f.oracle = out->oracle;
    kv_spec_free(out);
    *out = f;
    return kv_spec_seal(out, err);
}

kv_status kv_oracle_of(const kv_spec *s, char **spec, char **class, kv_error *err)
{
    static const char *const UNIT[] = {"query head", "KV head", "layer"};
    kv_spec o = {0};
    kv_status st = KV_OK;
    const char *unit = UNIT[s->granularity];
    bool model = s->layers != KV_LAYERS_UNIFORM || s->heads == KV_HEADS_TABLE || s->heads == KV_HEADS_DUO,
         layer = s->heads != KV_HEADS_UNIFORM;
    *spec = *class = NULL;
    if (s->keep_all) {
        *class = kv_format("nothing is dropped: no oracle");
    } else if (s->file) {
        *class = kv_format("a set made elsewhere: look at oracle-global at its slots");
    } else if (s->select == KV_SELECT_MIXDIM) {
        *class = kv_format("tokens kept in part: an oracle of whole tokens is no bound");
    } else if (kv_decode_rules[s->decode].flags & KV_RULE_HIDES) {
        *class = kv_format("one set per %s, entries may come back, shares of the prompt instead of a budget: look at "
                           "oracle-steps.decode at its slots",
                           unit);
    } else if (s->oracle & KV_ORACLE_STEPS || s->decode == KV_DECODE_STEPS) {
        *class = kv_format("every row its own set: nothing bounds it but the full cache");
    } else if (s->decode && (model || layer || s->every > 1 || s->bin)) {
        *class = kv_format("one set per %s, dropped for good, row by row, %s: no oracle of its class yet", unit,
                           model || layer ? "caches of different sizes" : "more than the budget between two cuts");
    } else if (s->decode) { /* above the best sequence of drops stands only what never drops for good */
        *class = kv_format("one set per %s, dropped for good, row by row", unit);
        st = row_for(s, s->decode == KV_DECODE_MATCH ? "oracle-steps.decode" : "oracle-match", &o, err);
    } else {
        *class = kv_format("one set per %s for all rows, %s", unit,
                           model   ? "slots move over the whole model"
                           : layer ? "slots move over the heads of a layer"
                                   : "the same count everywhere");
        st = row_for(s, model ? "oracle-global" : layer ? "oracle-layer" : "oracle", &o, err);
    }
    if (!st && !*class) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st && o.canonical && !(*spec = kv_format("%s", o.canonical))) st = kv_fail(err, KV_ENOMEM, "out of memory");
    kv_spec_free(&o);
    if (st) free(*spec), free(*class), *spec = *class = NULL;
    return st;
}
