/* random_protected - a seeded draw per unit and position, below it all first `sinks` positions and, where the trace
 * carries its text, the delimiters: tokens with a newline, and tokens that end a sentence (metrics.md 8.1, 7). The
 * baseline that a policy must beat: it knows where structure is and nothing of attention. */
#include <stdlib.h>

#include "sim/scorer.h"

/* Bytes of one token: a newline anywhere, or . ! ? (also the full-width ones) at the end, blanks behind it aside. */
static bool ends(const char *t, size_t n)
{
    if (memchr(t, '\n', n)) return true;
    while (n && t[n - 1] == ' ') n--;
    if (n && memchr(".!?", t[n - 1], 3)) return true;
    return n >= 3 && (!memcmp(t + n - 3, "\xe3\x80\x82", 3) || !memcmp(t + n - 3, "\xef\xbc\x81", 3) ||
                      !memcmp(t + n - 3, "\xef\xbc\x9f", 3));
}

static kv_status mark(const kv_layer *l, bool *delimiter, kv_error *err)
{
    const kv_trace *t = l->scene->trace;
    char *text = NULL;
    uint32_t *at = NULL;
    size_t n = 0;
    if (!kv_trace_has(t, KV_S_OFFSETS, 0, 0, 0, l->L + 1) || !kv_trace_width(t, KV_S_TEXT)) return KV_OK;
    kv_status st = kv_trace_read_bytes(t, KV_S_TEXT, &text, &n, err);
    if (!st) st = kv_array(&at, (size_t)l->L + 1, sizeof *at, err);
    if (!st) st = kv_trace_read_u32(t, KV_S_OFFSETS, 0, l->L + 1, at, err);
    for (uint32_t i = 0; i < l->L && !st; i++)
        delimiter[i] = at[i] < at[i + 1] && at[i + 1] <= n && ends(text + at[i], at[i + 1] - at[i]);
    free(text), free(at);
    return st;
}

static kv_status score(kv_layer *l, const kv_spec *s, float *out, kv_error *err)
{
    bool *delimiter = NULL;
    kv_status st = kv_array(&delimiter, l->L, sizeof *delimiter, err);
    if (!st) st = mark(l, delimiter, err);
    for (uint32_t u = 0; u < kv_unit_count(l, s->granularity) && !st; u++) {
        kv_rng r = {s->seed};
        r.s = kv_rng_next(&r) ^ ((uint64_t)l->number << 32 | u);
        for (uint32_t i = 0; i < l->L; i++) { /* 0, 1, 2 and a fraction of 20 bits: exact in a float */
            float draw = (float)(kv_rng_next(&r) >> 44) / (1 << 20);
            out[(size_t)u * l->L + i] = draw + (i < s->sinks ? 2 : delimiter[i] ? 1 : 0);
        }
    }
    free(delimiter);
    return st;
}

const kv_scorer kv_scorer_random_protected = {"random_protected",
                                              "seeded draw; first `sinks` tokens, newlines and sentence ends above it",
                                              "seed sinks window",
                                              0,
                                              false,
                                              false,
                                              score};
