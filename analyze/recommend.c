/* recommend.c - kv-analyze recommend: the smallest cache that loses less than a margin against the full one, policy by
 * policy.
 *
 * Budgets are tested from the largest down and the first one that fails ends the row (a fixed sequence of tests), so a
 * policy's answer holds with 95 % although many budgets were looked at. Each policy's answer stands for itself. */
#include "analyze/analysis.h"
#include "analyze/contrast.h"
#include "analyze/dist.h"

#include <math.h>
#include <stdlib.h>

#define POWER 0.8

/* What a full cache scores, where that needs no run. */
static double known_full(const char *metric)
{
    static const char *const one[] = {"recall",       "recall_contested", "recall_prompt",     "recall_p10",
                                      "recall_min",   "head_cosine",      "gap_closed",        "top1_agree",
                                      "top5_overlap", "evidence_kept",    "evidence_span_half"};
    static const char *const zero[] = {"nats_lost",         "head_error",   "layer_error",
                                       "total_variation",   "delta_nll",    "kl",
                                       "closed_head_error", "stream_error", "evidence_lost_everywhere"};
    for (size_t i = 0; i < sizeof one / sizeof *one; i++)
        if (!strcmp(metric, one[i])) return 1;
    for (size_t i = 0; i < sizeof zero / sizeof *zero; i++)
        if (!strcmp(metric, zero[i])) return 0;
    return NAN;
}

/* reference[t]: the full cache on each trace, measured if `full` was run, else what is known. */
static kv_status full_cache(const kv_grid *g, double *reference, kv_error *err)
{
    bool any = false;
    for (size_t t = 0; t < g->n_trace; t++) {
        double sum = 0, n = 0;
        for (size_t v = 0; v < g->n_variant; v++)
            for (size_t b = 0; b < g->n_budget && !strcmp(g->variant[v].policy, "full"); b++) {
                const kv_grid_cell *c = kv_grid_at(g, v, b, t);
                if (c->runs && c->defined) sum += c->value, n++;
            }
        reference[t] = n > 0 ? sum / n : known_full(g->metric);
        any |= reference[t] == reference[t];
    }
    return any ? KV_OK
               : kv_fail(err, KV_EMISSING, "the full cache's '%s' is not known: replay it too (kv-sim run -p full)",
                         g->metric);
}

typedef struct {
    size_t budget;
    kv_contrast c;
    double bytes, per_1000, share, tokens; /* means over prompts */
    uint32_t needed;                       /* prompts that would decide; 0 = none can */
    bool whole;                            /* keeps everything: true of itself, and no answer */
} step;

static int by_bytes_down(const void *a, const void *b)
{
    const step *x = a, *y = b;
    if (x->bytes != y->bytes) return x->bytes < y->bytes ? 1 : -1;
    return (x->budget < y->budget) - (x->budget > y->budget);
}

/* The bytes of one budget of one variant; *there = false when it was not run. */
static kv_status look(const kv_analysis *a, const kv_grid *g, size_t v, size_t b, const double *reference, step *out,
                      bool *there, kv_error *err)
{
    size_t n = 0, missing = 0;
    *out = (step){.budget = b};
    for (size_t t = 0; t < g->n_trace; t++) {
        const kv_grid_cell *c = kv_grid_at(g, v, b, t);
        if (reference[t] != reference[t]) continue;
        if (!c->runs) {
            missing = t + 1;
            continue;
        }
        out->bytes += c->bytes, out->share += c->bytes / c->full_bytes, out->tokens += c->tokens, n++;
        out->per_1000 += c->bytes / (double)g->trace[t].tokens * 1000;
    }
    *there = n > 0;
    if (!n) return KV_OK;
    if (missing && !a->common)
        return kv_fail(err, KV_EFORMAT,
                       "'%s' has no run on trace '%s' at budget '%s' (kv-sim run completes it; --common takes the "
                       "traces there are)",
                       g->variant[v].label, g->trace[missing - 1].name, g->budget[b].label);
    out->bytes /= (double)n, out->share /= (double)n, out->tokens /= (double)n, out->per_1000 /= (double)n;
    out->whole = out->share >= 0.9999;
    return KV_OK;
}

/* What it loses. */
static kv_status test(const kv_analysis *a, const kv_grid *g, size_t v, const double *reference, step *s, kv_error *err)
{
    kv_pairs p = {0};
    kv_status st = kv_grid_against(g, v, reference, s->budget, &p, err);
    if (!st) st = kv_contrast_of(&p, g->better, 0, a->margin, &s->c, err);
    kv_pairs_free(&p);
    return st;
}

typedef struct {
    size_t variant;
    bool found, has_next;
    step best, next; /* the answer; the first budget that failed */
} answer;

static kv_status ask(const kv_analysis *a, const kv_grid *g, size_t v, const double *reference, answer *out,
                     kv_error *err)
{
    step *s = NULL;
    size_t n = 0;
    kv_status st = kv_array(&s, g->n_budget, sizeof *s, err);
    *out = (answer){.variant = v};
    for (size_t b = 0; b < g->n_budget && !st; b++) {
        bool there;
        st = look(a, g, v, b, reference, &s[n], &there, err);
        n += there;
    }
    if (!st && n > 1) qsort(s, n, sizeof *s, by_bytes_down);
    for (size_t i = 0; i < n && !st && !out->has_next; i++) {
        if (s[i].whole) continue;
        if ((st = test(a, g, v, reference, &s[i], err))) break;
        if (s[i].c.noninferior)
            out->found = true, out->best = s[i];
        else
            out->has_next = true, out->next = s[i];
    }
    const kv_contrast *c = &out->next.c;
    if (out->has_next && c->n > 1) {
        double loss = g->better < 0 ? c->diff.mean : -c->diff.mean;
        out->next.needed = kv_t_power_n((a->margin - loss) / c->sd, POWER, 1 - KV_NONINFERIOR_LEVEL, 1);
    }
    free(s);
    return st;
}

static int by_answer(const void *a, const void *b)
{
    const answer *x = a, *y = b;
    if (x->found != y->found) return x->found ? -1 : 1;
    if (x->found) { /* steps of 1 % of the bytes: shares of a budget are rounded, and that decides nothing */
        double p = floor(100 * log(x->best.bytes)), q = floor(100 * log(y->best.bytes));
        if (p != q) return p < q ? -1 : 1;
    }
    double p = (x->found ? x->best : x->next).c.worse_bound, q = (y->found ? y->best : y->next).c.worse_bound;
    if (p != q) return p < q ? -1 : 1;
    return (x->variant > y->variant) - (x->variant < y->variant);
}

/* ------------------------------------------------------------------------------------------------ output */
static const char *const COLUMNS[] = {"policy",
                                      "granularity",
                                      "page",
                                      "verdict",
                                      "budget",
                                      "budget_tokens",
                                      "bytes",
                                      "bytes_per_1000_tokens",
                                      "of_full",
                                      "loss",
                                      "worse_by_at_most",
                                      "margin",
                                      "metric",
                                      "n",
                                      "next_budget",
                                      "next_bytes",
                                      "next_loss",
                                      "next_worse_by_at_most",
                                      "next_prompts_needed"};

static kv_status put_row(const kv_grid *g, const answer *r, double margin, kv_sheet *s, kv_error *err)
{
    const kv_grid_variant *v = &g->variant[r->variant];
    double sign = g->better < 0 ? 1 : -1;
    size_t at = s->n_row;
    kv_cell *unused;
    kv_status st;
    if ((st = kv_sheet_add(s, &unused, err)) || (st = kv_set_text(s, at, "policy", v->label, err)) ||
        (st = kv_set_text(s, at, "granularity", v->granularity, err)) ||
        (st = kv_set_text(s, at, "verdict", r->found ? "non-inferior" : "none", err)) ||
        (st = kv_set_text(s, at, "metric", g->metric, err)))
        return st;
    kv_set_int(s, at, "page", v->page), kv_set_real(s, at, "margin", margin);
    kv_set_int(s, at, "n", (int64_t)(r->found ? r->best.c.n : r->next.c.n));
    if (r->found) {
        if ((st = kv_set_text(s, at, "budget", g->budget[r->best.budget].label, err))) return st;
        kv_set_real(s, at, "budget_tokens", r->best.tokens), kv_set_real(s, at, "bytes", r->best.bytes);
        kv_set_real(s, at, "bytes_per_1000_tokens", r->best.per_1000), kv_set_real(s, at, "of_full", r->best.share);
        kv_set_real(s, at, "loss", sign * r->best.c.diff.mean);
        kv_set_real(s, at, "worse_by_at_most", r->best.c.worse_bound);
    }
    if (r->has_next) {
        if ((st = kv_set_text(s, at, "next_budget", g->budget[r->next.budget].label, err))) return st;
        kv_set_real(s, at, "next_bytes", r->next.bytes), kv_set_real(s, at, "next_loss", sign * r->next.c.diff.mean);
        kv_set_real(s, at, "next_worse_by_at_most", r->next.c.worse_bound);
        if (r->next.needed) kv_set_int(s, at, "next_prompts_needed", r->next.needed);
    }
    return KV_OK;
}

/* "11.7%: loses 0.031 here, prompts cannot help" */
static kv_status put_next(const kv_grid *g, const answer *r, int dec, kv_sheet *t, kv_cell *c, kv_error *err)
{
    const char *label = g->budget[r->next.budget].label;
    double loss = (g->better < 0 ? 1 : -1) * r->next.c.diff.mean;
    if (!r->has_next) return kv_cell_format(t, c, err, "nothing smaller was tried");
    if (!r->next.needed) return kv_cell_format(t, c, err, "%s loses %.*f: too much", label, dec, loss);
    size_t n = r->next.c.n;
    if (r->next.needed <= n) return kv_cell_format(t, c, err, "%s loses %.*f: undecided", label, dec, loss);
    return kv_cell_format(t, c, err, "%s loses %.*f: %zu more prompts may decide", label, dec, loss,
                          r->next.needed - n);
}

static kv_status print_text(const kv_analysis *a, const kv_grid *g, const answer *r, size_t n, kv_error *err)
{
    const char *const head[] = {"policy",  "budget", "tokens",  "per request", "per 1000 tokens",
                                "of full", "loss",   "worse <", "n",           "the next smaller"};
    kv_sheet t = {0};
    double most = a->margin;
    size_t found = 0;
    kv_status st = kv_sheet_init(&t, 10, head, err);
    int dec = kv_decimals(most);
    for (size_t i = 0; i < n && !st; i++) {
        const step *s = &r[i].best;
        char x[24], y[24];
        kv_cell *row;
        const kv_grid_variant *v = &g->variant[r[i].variant];
        if ((st = kv_sheet_add(&t, &row, err)) ||
            (st = kv_cell_format(&t, &row[0], err, "%s%s", v->label, v->unverified ? " ?" : "")))
            break;
        found += r[i].found;
        row[8] = kv_int((int64_t)(r[i].found ? s->c.n : r[i].next.c.n));
        if (!r[i].found)
            st = kv_cell_format(&t, &row[1], err, "none");
        else if (!(st = kv_cell_format(&t, &row[1], err, "%s", g->budget[s->budget].label)) &&
                 !(st = kv_cell_format(&t, &row[2], err, "%.0f", s->tokens)) &&
                 !(st = kv_cell_format(&t, &row[3], err, "%s", kv_bytes_text(s->bytes, x))) &&
                 !(st = kv_cell_format(&t, &row[4], err, "%s", kv_bytes_text(s->per_1000, y))) &&
                 !(st = kv_cell_format(&t, &row[5], err, "%.1f%%", 100 * s->share)) &&
                 !(st = kv_cell_format(&t, &row[6], err, "%.*f", dec, (g->better < 0 ? 1 : -1) * s->c.diff.mean)))
            st = kv_cell_format(&t, &row[7], err, "%.*f", dec, fmax(0, s->c.worse_bound));
        if (!st) st = put_next(g, &r[i], dec, &t, &row[9], err);
    }
    if (st) goto out;
    fprintf(a->out,
            "%s (%s): the smallest cache that loses less than %g against the full one, with %g%% confidence\n\n",
            g->metric, g->unit, a->margin, 100 * KV_NONINFERIOR_LEVEL);
    kv_print_table(a->out, &t, "lrrrrrrrrl", 2);
    fputs("\n", a->out);
    if (found) {
        char x[24], y[24];
        kv_put_plain(a->out, g->variant[r[0].variant].label, strlen(g->variant[r[0].variant].label));
        fprintf(a->out, " at %s is the smallest: %s per request, %s per 1000 tokens, %.1f%% of the full cache\n",
                g->budget[r[0].best.budget].label, kv_bytes_text(r[0].best.bytes, x),
                kv_bytes_text(r[0].best.per_1000, y), 100 * r[0].best.share);
    } else
        fputs("none: no cache tried here is shown to lose less than the margin\n", a->out);
    fputs(
        "worse <: one-sided bound, studentised bootstrap over prompts; budgets are tested from the largest down, so it "
        "holds for the whole row\n"
        "more prompts: for 80% power at the loss and spread seen here. bytes: mean over the measured rows, K and V\n",
        a->out);
    for (size_t i = 0; i < n; i++)
        if (g->variant[r[i].variant].unverified) {
            fputs("?  not verified against its source (kv-sim policies NAME)\n", a->out);
            break;
        }
out:
    kv_sheet_free(&t);
    return st;
}

kv_status kv_cmd_recommend(const kv_analysis *a, kv_error *err)
{
    kv_grid g = {0};
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_sheet data = {0};
    double *reference = NULL;
    answer *r = NULL;
    size_t n = 0;
    kv_status st, incomplete = KV_OK;
    if (!(a->margin > 0))
        return kv_fail(err, KV_EMISUSE,
                       "recommend needs --margin X, the loss that does not matter (above 0, in the metric's unit)");
    if ((st = kv_analysis_open(a, &db, &s, err)) || (st = kv_selection_model(db, &s, err)) ||
        (st = kv_selection_metric(db, &s, a->metric, kv_default_metrics, err)) || (st = kv_grid_load(db, &s, &g, err)))
        goto out;
    if (!g.better) {
        st = kv_fail(err, KV_EMISUSE, "'%s' has no better direction: nothing to recommend by", g.metric);
        goto out;
    }
    if ((!a->any_build && (st = kv_grid_one_build(&g, err))) ||
        (st = kv_array(&reference, g.n_trace, sizeof *reference, err)) || (st = full_cache(&g, reference, err)) ||
        (st = kv_array(&r, g.n_variant, sizeof *r, err)))
        goto out;
    for (size_t v = 0; v < g.n_variant && !st; v++) {
        const char *p = g.variant[v].policy; /* oracles look ahead: no cache can be built that way */
        if (!strcmp(p, "full") || (kv_policy_place(p) >= 1000 && !a->policies.n)) continue;
        st = ask(a, &g, v, reference, &r[n], err);
        if (st == KV_EFORMAT && err) { /* runs are missing: said, and no answer for this one */
            kv_print_left_out(a->talk, err);
            incomplete = st, st = KV_OK;
            continue;
        }
        n += r[n].found || r[n].has_next;
    }
    if (!st && !n && incomplete) {
        st = incomplete; /* with the last reason */
        goto out;
    }
    if (!st && !n)
        st = kv_fail(err, KV_EMISSING, "no runs smaller than the full cache in this selection of '%s'", a->db);
    if (st) goto out;
    qsort(r, n, sizeof *r, by_answer);
    if ((st = kv_sheet_init(&data, sizeof COLUMNS / sizeof *COLUMNS, COLUMNS, err))) goto out;
    for (size_t i = 0; i < n && !st; i++) st = put_row(&g, &r[i], a->margin, &data, err);
    if (st) goto out;
    if (a->format == KV_OUT_CSV)
        kv_print_csv(a->out, &data);
    else if (a->format == KV_OUT_JSON) {
        fputs("{\"rows\": ", a->out);
        kv_print_json(a->out, &data);
        fputs("}\n", a->out);
    } else
        st = print_text(a, &g, r, n, err);
    if (g.n_prompt < 12)
        fprintf(a->talk, "note: %zu prompt%s: a bound from so few is wide, and only as good as they are typical\n",
                g.n_prompt, g.n_prompt == 1 ? "" : "s");
out:
    kv_sheet_free(&data);
    kv_grid_free(&g);
    free(reference), free(r);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
