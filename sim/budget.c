/* budget.c - budgets as users write them, and as tokens of one trace (design.md section 4). */
#include <math.h>
#include <stdlib.h>

#include "sim/policy.h"
#include "traces/cli.h"

static kv_status push(kv_budget **out, size_t *n, kv_budget b, kv_error *err)
{
    kv_budget *more = realloc(*out, (*n + 1) * sizeof *more);
    if (!more) return kv_fail(err, KV_ENOMEM, "out of memory");
    *out = more;
    more[(*n)++] = b;
    return KV_OK;
}

/* 16 values, log-spaced from 1 % to 100 %, with the nearest one moved to the 3.2 % that papers speak of. */
static const char *const AUTO[16] = {"1%",    "1.36%", "1.85%", "2.51%", "3.2%",  "4.64%", "6.31%", "8.58%",
                                     "11.7%", "15.8%", "21.5%", "29.3%", "39.8%", "54.1%", "73.6%", "100%"};

static kv_status parse_one(const char *s, kv_budget **out, size_t *n, kv_error *err)
{
    kv_budget b = {0};
    uint64_t u;
    size_t len = strlen(s);
    char num[32];
    if (!strcmp(s, "auto")) {
        for (int i = 0; i < 16; i++) {
            kv_status st = parse_one(AUTO[i], out, n, err);
            if (st) return st;
        }
        return KV_OK;
    }
    if (len == 0 || len >= sizeof b.text) goto bad;
    snprintf(b.text, sizeof b.text, "%s", s);
    snprintf(num, sizeof num, "%.*s", (int)(len - 1), s);
    if (!strncmp(s, "ratio=", 6)) {
        b.kind = KV_BUDGET_RATIO;
        if (!kv_parse_f64(s + 6, &b.value) || b.value < 0 || b.value > 1) goto bad;
    } else if (s[len - 1] == '%') {
        b.kind = KV_BUDGET_PERCENT;
        if (!kv_parse_f64(num, &b.value) || b.value < 0 || b.value > 100) goto bad;
    } else if (kv_parse_u64(s, &u) && u <= KV_BUDGET_TOKENS_MAX) {
        b.kind = KV_BUDGET_TOKENS;
        b.value = (double)u;
    } else if (strpbrk(s, "BbKkMmGgTt") && kv_parse_bytes(s, &u)) {
        b.kind = KV_BUDGET_BYTES;
        b.value = (double)u;
    } else {
        goto bad;
    }
    return push(out, n, b, err);
bad:
    return kv_fail(err, KV_EMISUSE,
                   "budget '%.40s': want tokens (512), a share (5%%), bytes (64MiB), ratio=0.9 or auto", s);
}

kv_status kv_budget_parse(const char *arg, kv_budget **out, size_t *n, kv_error *err)
{
    kv_status st = KV_OK;
    for (const char *p = arg; !st;) {
        size_t len = strcspn(p, ",");
        char *item = kv_format("%.*s", (int)len, p);
        if (!item) return kv_fail(err, KV_ENOMEM, "out of memory");
        st = parse_one(item, out, n, err);
        free(item);
        if (!p[len]) break;
        p += len + 1;
    }
    return st;
}

kv_budget_resolved kv_budget_resolve(const kv_budget *b, uint32_t n_tokens, size_t slot_bytes, uint32_t n_layer,
                                     uint32_t n_kv_head)
{
    double L = n_tokens, c = 0;
    kv_budget_resolved r = {0};
    switch (b->kind) {
    case KV_BUDGET_TOKENS: c = b->value; break;
    case KV_BUDGET_PERCENT:
        /* 5 % of 640 must not become 31 because 0.05 is not a binary fraction */
        c = floor(b->value * L / 100.0 + 1e-9);
        if (c < 1) c = 1;
        break;
    case KV_BUDGET_BYTES: c = floor(b->value / ((double)slot_bytes * n_layer * n_kv_head)); break;
    case KV_BUDGET_RATIO: c = (double)(int64_t)(L * (1 - b->value)); break;
    }
    r.real = b->kind == KV_BUDGET_RATIO ? L * (1 - b->value) : c;
    r.tokens = c > L ? n_tokens : (uint32_t)c;
    r.frac = n_tokens ? r.tokens / L : 0;
    r.share = b->kind == KV_BUDGET_RATIO ? 1 - b->value : r.frac;
    return r;
}
