/* text.c - kv-analyze text: two policies on the prompt's own words.
 *
 * A slot is one (layer, KV head) of the trace. Over one slot a token is kept by both, by A only, by B only or by
 * neither. Over several slots each token carries the four counts, and the text shows the most frequent one (ties: the
 * first in this order): never a union, which would call a token kept when one head of a hundred holds it. */
#include "analyze/analysis.h"
#include "analyze/page.h"

#include <stdlib.h>
#include <unistd.h>

typedef struct {
    const kv_analysis *a;
    const kv_token_view *v;
    uint32_t layer0, layer1, head0, head1; /* layer indices, KV heads */
    kv_token_state *state;                 /* [n_prompt] */
    double heavy, light;                   /* tokens above `heavy` hold half of the mass, above `light` 90 % */
} view;

static int most(const kv_token_state *s)
{
    int best = 0;
    for (int k = 1; k < KV_TOKEN_STATES; k++)
        if (s->slots[k] > s->slots[best]) best = k;
    return best;
}

static double mass_of(const kv_token_state *s)
{
    return s->mass[KV_BOTH] + s->mass[KV_ONLY_A] + s->mass[KV_ONLY_B] + s->mass[KV_NEITHER];
}

static int descending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* The mass above which tokens hold half, and nine tenths, of what is at stake. */
static kv_status levels(view *w, kv_error *err)
{
    uint32_t n = w->v->info->n_prompt;
    double *m = NULL, all = 0, sum = 0;
    kv_status st = kv_array(&m, n, sizeof *m, err);
    for (uint32_t i = 0; i < n && !st; i++) all += m[i] = mass_of(&w->state[i]);
    if (st) return st;
    qsort(m, n, sizeof *m, descending);
    w->heavy = w->light = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (sum < 0.5 * all) w->heavy = m[i];
        if (sum < 0.9 * all) w->light = m[i];
        sum += m[i];
    }
    free(m);
    return KV_OK;
}

/* Colour where a terminal shows it: weight of the letters = mass, colour and underline = who keeps it. */
static void put_text(const view *w, bool colour)
{
    static const char *const OPEN[KV_TOKEN_STATES] = {"", "[-", "{+", "~"}, *const CLOSE[KV_TOKEN_STATES] = {"", "-]",
                                                                                                             "+}", "~"};
    static const char *const HUE[KV_TOKEN_STATES] = {"39", "4;34", "4;33", "9;90"};
    const kv_token_view *v = w->v;
    uint32_t n = v->info->n_prompt;
    FILE *f = w->a->out;
    int before = KV_BOTH;
    bool in_evidence = false;
    for (uint32_t i = 0; i <= n; i++) {
        int now = i < n ? most(&w->state[i]) : KV_BOTH;
        bool evidence = i < n && v->evidence[i];
        if (!colour && before != KV_BOTH && now != before) fputs(CLOSE[before], f);
        if (in_evidence && !evidence) fputs("\xc2\xbb", f);
        if (!in_evidence && evidence) fputs("\xc2\xab", f);
        in_evidence = evidence;
        if (i == n) break;
        if (!colour && now != KV_BOTH && (now != before || i == 0)) fputs(OPEN[now], f);
        if (colour)
            fprintf(f, "\033[%s%sm",
                    !v->mass                            ? ""
                    : mass_of(&w->state[i]) >= w->heavy ? "1;"
                    : mass_of(&w->state[i]) >= w->light ? ""
                                                        : "2;",
                    HUE[now]);
        if (v->offset) {
            const char *s = v->text + v->offset[i], *end = v->text + v->offset[i + 1];
            while (s < end) { /* line breaks as they are, the rest plain */
                const char *nl = memchr(s, '\n', (size_t)(end - s));
                kv_put_plain(f, s, (size_t)((nl ? nl : end) - s));
                if (nl) putc('\n', f);
                s = nl ? nl + 1 : end;
            }
        } else
            fprintf(f, "<%u>", i);
        if (colour) fputs("\033[0m", f);
        before = now;
    }
    putc('\n', f);
}

/* Shares of the slots' tokens and of the mass in each state, over all tokens or over the evidence. */
typedef struct {
    double share[KV_TOKEN_STATES], mass[KV_TOKEN_STATES];
} totals;

static totals sum_up(const view *w, bool evidence_only)
{
    totals t = {0};
    double slots = 0, mass = 0;
    for (uint32_t i = 0; i < w->v->info->n_prompt; i++) {
        const kv_token_state *s = &w->state[i];
        if (evidence_only && !w->v->evidence[i]) continue;
        for (int k = 0; k < KV_TOKEN_STATES; k++) t.share[k] += s->slots[k], t.mass[k] += s->mass[k];
    }
    for (int k = 0; k < KV_TOKEN_STATES; k++) slots += t.share[k], mass += t.mass[k];
    for (int k = 0; k < KV_TOKEN_STATES; k++) {
        t.share[k] = slots > 0 ? t.share[k] / slots : 0;
        t.mass[k] = mass > 0 ? t.mass[k] / mass : 0;
    }
    return t;
}

static const char *const NAMES[KV_TOKEN_STATES] = {"both", "A only", "B only", "neither"};

static void put_totals(const view *w)
{
    FILE *f = w->a->out;
    totals all = sum_up(w, false), evidence = sum_up(w, true);
    fprintf(f, "\n  %-8s  %13s  %12s%s\n", "kept by", "of the tokens", "of the mass",
            w->v->n_evidence ? "   of the evidence" : "");
    for (int k = 0; k < KV_TOKEN_STATES; k++) {
        fprintf(f, "  %-8s  %12.2f%%  ", NAMES[k], 100 * all.share[k]);
        w->v->mass ? fprintf(f, "%11.2f%%", 100 * all.mass[k]) : fprintf(f, "%12s", "-");
        if (w->v->n_evidence) fprintf(f, "  %15.2f%%", 100 * evidence.share[k]);
        putc('\n', f);
    }
    fputs("\nmass: full-cache attention of the decoded rows on prompt tokens, mean over the slots shown\n", f);
}

static void put_heading(const view *w, bool colour)
{
    const kv_trace_info *i = w->v->info;
    FILE *f = w->a->out;
    for (int k = 0; k < 2; k++) {
        fprintf(f, "%c = ", "AB"[k]);
        kv_put_plain(f, w->v->pick[k].policy, strlen(w->v->pick[k].policy));
        fprintf(f, " at %s   ", w->v->pick[k].budget);
    }
    fputs("prompt ", f);
    kv_put_plain(f, i->prompt_id ? i->prompt_id : "?", strlen(i->prompt_id ? i->prompt_id : "?"));
    fprintf(f, ", %u tokens\n", i->n_prompt);
    uint32_t layers = w->layer1 - w->layer0, heads = w->head1 - w->head0;
    if (layers * heads == 1)
        fprintf(f, "layer %u, KV head %u\n", i->layer[w->layer0], w->head0);
    else
        fprintf(f, "%u slots (%u layer%s x %u KV head%s); a token shows what most of them do with it\n", layers * heads,
                layers, layers == 1 ? "" : "s", heads, heads == 1 ? "" : "s");
    if (colour)
        fprintf(f, "both: plain   \033[4;34mA only\033[0m   \033[4;33mB only\033[0m   \033[9;90mneither\033[0m   "
                   "\xc2\xab"
                   "evidence\xc2\xbb   bold: half of the mass, dim: the last tenth\n\n");
    else
        fprintf(f, "both: plain   [-A only-]   {+B only+}   ~neither~   \xc2\xab"
                   "evidence\xc2\xbb\n\n");
}

static void put_data(const view *w)
{
    FILE *f = w->a->out;
    fputs("{\"view\":", f);
    kv_token_view_json(f, w->v);
    fprintf(f, ",\"layers\":[%u,%u],\"kv_heads\":[%u,%u],\"tokens\":[", w->layer0, w->layer1, w->head0, w->head1);
    for (uint32_t i = 0; i < w->v->info->n_prompt; i++) {
        const kv_token_state *s = &w->state[i];
        kv_cell mass = kv_real(mass_of(s));
        fprintf(f, "%s\n{\"token\":%u,\"both\":%u,\"a_only\":%u,\"b_only\":%u,\"neither\":%u,\"evidence\":%s,\"mass\":",
                i ? "," : "", i, s->slots[0], s->slots[1], s->slots[2], s->slots[3],
                w->v->evidence[i] ? "true" : "false");
        kv_put_cell_json(f, &mass);
        putc('}', f);
    }
    fputs("]}\n", f);
}

/* A and B: two policies at one budget, one policy at two, two of each, or one policy against the oracle. */
static kv_status choose(const kv_analysis *a, kv_token_view *v, kv_error *err)
{
    char *p[2] = {NULL}, *b[2] = {NULL};
    size_t n_p, n_b = 0;
    kv_status st = kv_items(&a->policies, true, "policy", 2, p, &n_p, err);
    if (!st) st = kv_items(&a->budgets, false, "budget", 2, b, &n_b, err);
    if (!st && (!n_p || !n_b))
        st =
            kv_fail(err, KV_EMISUSE,
                    "text compares two kept sets: give -p A,B (or one policy, compared with the oracle) and -b BUDGET");
    if (!st) st = kv_token_view_pick(v, p[0], b[0], err);
    if (!st) st = kv_token_view_pick(v, n_p == 2 ? p[1] : n_b == 2 ? p[0] : "oracle", b[n_b - 1], err);
    free(p[0]), free(p[1]), free(b[0]), free(b[1]);
    return st;
}

static kv_status slots(const kv_analysis *a, view *w, kv_error *err)
{
    const kv_trace_info *i = w->v->info;
    uint32_t group = i->n_q_head / i->n_kv_head;
    w->layer0 = 0, w->layer1 = i->n_layer, w->head0 = 0, w->head1 = i->n_kv_head;
    if (a->layer != UINT32_MAX) {
        uint32_t k = 0;
        while (k < i->n_layer && i->layer[k] != a->layer) k++;
        if (k == i->n_layer)
            return kv_fail(err, KV_EMISSING, "no layer %u in trace '%s' (it has %u layers, %u to %u)", a->layer,
                           kv_trace_path(w->v->trace), i->n_layer, i->layer[0], i->layer[i->n_layer - 1]);
        w->layer0 = k, w->layer1 = k + 1;
    }
    if (a->head != UINT32_MAX) {
        if (a->head >= i->n_q_head)
            return kv_fail(err, KV_EMISSING, "no head %u in trace '%s': it has %u query heads", a->head,
                           kv_trace_path(w->v->trace), i->n_q_head);
        w->head0 = a->head / group, w->head1 = w->head0 + 1;
    }
    return KV_OK;
}

kv_status kv_cmd_text(const kv_analysis *a, kv_error *err)
{
    kv_token_view v = {0};
    view w = {.a = a, .v = &v};
    const char *path = a->trace_file ? a->trace_file : a->rest.n > 1 ? a->rest.v[1] : NULL;
    if (!path) return kv_fail(err, KV_EMISUSE, "text needs a trace: kv-analyze text T.kvt -p A -p B -b BUDGET");
    if (a->rest.n > 2) return kv_fail(err, KV_EMISUSE, "unexpected argument '%s': one trace", a->rest.v[2]);
    kv_status st = kv_token_view_open(path, &v, err);
    if (!st) st = slots(a, &w, err);
    if (!st) st = choose(a, &v, err);
    if (!st && a->html) st = kv_page_text(a->html, &v, 1, err);
    if (!st && a->html) fprintf(a->talk, "%s\n", a->html);
    if (!st && !a->html) st = kv_array(&w.state, v.info->n_prompt, sizeof *w.state, err);
    if (st || a->html) goto out;
    for (uint32_t i = 0; i < v.info->n_prompt; i++)
        w.state[i] = kv_token_state_of(&v, 0, 1, w.layer0, w.layer1, w.head0, w.head1, i);
    if ((st = levels(&w, err))) goto out;
    if (a->format == KV_OUT_JSON)
        put_data(&w);
    else {
        bool colour = isatty(fileno(a->out)) && !getenv("NO_COLOR");
        put_heading(&w, colour);
        put_text(&w, colour);
        put_totals(&w);
    }
out:
    free(w.state);
    kv_token_view_free(&v);
    return st;
}
