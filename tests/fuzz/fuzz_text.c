/* fuzz_text.c - targets npy, prompts and specs: arrays, prompt sets, what stands on a command line. */
#include <stdlib.h>

#include "capture/chat.h"
#include "capture/prompts.h"
#include "sim/metric.h"
#include "sim/policy.h"
#include "tests/fuzz/fuzz.h"
#include "traces/arrays.h"
#include "traces/cli.h"

static void look(kv_npy *a)
{
    size_t all = a->size;
    for (uint32_t i = 0; i < a->rank; i++) all *= a->shape[i];
    fuzz_must(all == a->n * a->size, "an array has as many elements as its shape says");
    volatile uint8_t sum = 0;
    for (size_t i = 0; i < all; i++) sum = (uint8_t)(sum + ((uint8_t *)a->data)[i]);
    if (all <= 1 << 20) kv_npy_to_f32(a, NULL);
    kv_npy_free(a);
}

/* One byte (0: no name; else bytes of it), the name, then a .npy, .npz or safetensors file. */
int fuzz_npy(const uint8_t *p, size_t n)
{
    kv_npy a;
    kv_error err;
    if (!n) return 0;
    size_t name = p[0] < n - 1 ? p[0] : n - 1;
    char *s = kv_format("%.*s", (int)name, (const char *)p + 1);
    fuzz_must(s, "a short text fits into memory");
    p += 1 + name, n -= 1 + name;
    char *spec = kv_format(*s ? "%s:%s" : "%s%s", fuzz_file(p, n), s);
    fuzz_must(spec, "a short text fits into memory");
    if (kv_array_load(spec, &a, &err))
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
    else
        look(&a);
    if (!kv_npy_parse(p, n, "fuzz", &a, NULL)) look(&a);
    free(s), free(spec);
    return 0;
}

int fuzz_prompts(const uint8_t *p, size_t n)
{
    static const kv_chat chat = {.name = "fuzz", .open = "<u>", .close = "</u>", .trim = true};
    kv_prompts set;
    kv_error err;
    if (kv_prompts_read(fuzz_file(p, n), &set, &err)) {
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
        return 0;
    }
    for (size_t i = 0; i < set.n; i++) {
        kv_prompt *q = &set.v[i], turn;
        size_t at, len;
        if (q->path || kv_prompt_load(q, NULL)) continue; /* texts in other files are not this input's */
        if (kv_chat_wrap(&chat, q, &turn, &at, &len, NULL)) continue;
        fuzz_must(turn.prompt_end <= turn.n_text && at + len <= turn.n_text, "a turn's ends lie in its text");
        for (uint32_t k = 0; k < turn.n_evidence; k++)
            fuzz_must(turn.evidence[k].start <= turn.evidence[k].end && turn.evidence[k].end <= turn.n_text,
                      "a turn's evidence lies in its text");
        kv_chat_unwrap(&turn);
    }
    kv_prompts_free(&set);
    return 0;
}

/* A policy argument 0 a budget argument 0 a metric list 0 a number. A policy's canonical form means itself. */
int fuzz_specs(const uint8_t *p, size_t n)
{
    char *policies = fuzz_text(&p, &n), *budgets = fuzz_text(&p, &n), *metrics = fuzz_text(&p, &n);
    char *number = fuzz_text(&p, &n);
    kv_spec *spec = NULL, *again = NULL;
    kv_budget *budget = NULL;
    size_t n_spec = 0, n_again = 0, n_budget = 0;
    kv_metric_set set;
    kv_error err;
    uint64_t u;
    double d;
    /* a plug-in is code: it is not for a fuzzer to find one */
    if (n < 4096 && !strstr(policies, "plugin") && kv_spec_parse(policies, &spec, &n_spec, &err))
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
    for (size_t i = 0; i < n_spec && i < 8; i++) {
        for (size_t k = 0; k < kv_slot_count(); k++) free(kv_slot_value(&spec[i], k));
        if (!kv_spec_parse(spec[i].canonical, &again, &n_again, NULL))
            fuzz_must(n_again == 1 && !strcmp(again->canonical, spec[i].canonical), "a canonical policy means itself");
        for (size_t k = 0; k < n_again; k++) kv_spec_free(&again[k]);
        free(again), again = NULL, n_again = 0;
    }
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    if (kv_budget_parse(budgets, &budget, &n_budget, &err))
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
    for (size_t i = 0; i < n_budget; i++) {
        kv_budget_resolved r = kv_budget_resolve(&budget[i], 1000, 256, 3, 2);
        fuzz_must(r.tokens <= 1000 && r.frac >= 0 && r.frac <= 1, "a budget is at most the prompt");
    }
    kv_metric_parse(metrics, KV_M_ALL, &set, NULL);
    kv_parse_u64(number, &u), kv_parse_f64(number, &d), kv_parse_bytes(number, &u);
    free(spec), free(budget);
    free(policies), free(budgets), free(metrics), free(number);
    return 0;
}
