/* compare.c - kv-analyze compare: policies against a baseline on the same prompts. Without --budget the two curves are
 * compared: one test of their mean height over log2 bytes, instead of a budget picked after the fact. */
#include "analyze/analysis.h"
#include "analyze/contrast.h"

#include <math.h>
#include <stdlib.h>

#define CURVE SIZE_MAX /* in place of a budget's index */

typedef struct {
    size_t a, budget; /* variant; index or CURVE */
    kv_pairs pairs;
    kv_contrast c;
    double low, high; /* curve: mean ends, log2 bytes */
    size_t *shared, n_shared;
} entry;

typedef struct {
    const kv_analysis *a;
    kv_grid g;
    size_t baseline, n;
    entry *e;
    kv_allow allow;
} comparison;

static void comparison_free(comparison *k)
{
    for (size_t i = 0; k->e && i < k->n; i++) kv_pairs_free(&k->e[i].pairs), free(k->e[i].shared);
    free(k->e);
    kv_grid_free(&k->g);
}

static const char *at_text(const comparison *k, const entry *e)
{
    return e->budget == CURVE ? "curve" : k->g.budget[e->budget].label;
}

static kv_status fill(comparison *k, entry *e, kv_error *err)
{
    const kv_grid *g = &k->g;
    const char *a = g->variant[e->a].label, *b = g->variant[k->baseline].label;
    kv_status st;
    if (e->budget == CURVE) {
        if ((st = kv_array(&e->shared, g->n_budget, sizeof *e->shared, err))) return st;
        for (size_t i = 0; i < g->n_budget; i++) e->shared[i] = i;
        e->n_shared = k->allow.common ? kv_grid_shared(g, e->a, k->baseline, k->allow, e->shared) : g->n_budget;
        if ((st = kv_grid_comparable(g, e->a, k->baseline, e->shared, e->n_shared, k->allow, err))) return st;
        e->n_shared = kv_grid_shared(g, e->a, k->baseline, k->allow, e->shared);
        st = kv_grid_area(g, e->a, k->baseline, e->shared, e->n_shared, &e->pairs, &e->low, &e->high, err);
        if (!st && !e->pairs.n)
            st = kv_fail(err, KV_EMISSING,
                         "cannot compare the curves of '%s' and '%s': they share fewer than two budgets, or no bytes "
                         "(-b compares at one budget)",
                         a, b);
    } else {
        if ((st = kv_grid_comparable(g, e->a, k->baseline, &e->budget, 1, k->allow, err))) return st;
        st = kv_grid_pairs(g, e->a, k->baseline, e->budget, &e->pairs, err);
        if (!st && !e->pairs.n)
            st = kv_fail(err, KV_EMISSING, "cannot compare '%s' with '%s' at budget '%s': %s", a, b,
                         g->budget[e->budget].label,
                         e->pairs.undefined ? "the metric is undefined on every prompt" : "no runs of both");
    }
    if (!st) st = kv_contrast_of(&e->pairs, g->better, k->a->tie, k->a->margin, &e->c, err);
    return st;
}

/* ------------------------------------------------------------------------------------------------ data */
static const char *const COLUMNS[] = {"policy",
                                      "baseline",
                                      "model",
                                      "metric",
                                      "unit",
                                      "better",
                                      "at",
                                      "n",
                                      "undefined",
                                      "families",
                                      "mean",
                                      "baseline_mean",
                                      "difference",
                                      "low",
                                      "high",
                                      "median",
                                      "sd",
                                      "d_z",
                                      "these_low",
                                      "these_high",
                                      "new_low",
                                      "new_high",
                                      "wins",
                                      "ties",
                                      "losses",
                                      "win_low",
                                      "win_high",
                                      "test",
                                      "p",
                                      "rank_biserial",
                                      "p_holm",
                                      "worse_by_at_most",
                                      "margin",
                                      "noninferior",
                                      "bytes",
                                      "baseline_bytes",
                                      "log2_bytes_low",
                                      "log2_bytes_high"};
enum { N_COLUMN = sizeof COLUMNS / sizeof *COLUMNS };

static kv_status put_row(const comparison *k, const entry *e, const char *model, kv_sheet *s, kv_error *err)
{
    kv_cell *unused;
    const kv_contrast *c = &e->c;
    size_t r = s->n_row;
    kv_status st;
    if ((st = kv_sheet_add(s, &unused, err)) || (st = kv_set_text(s, r, "policy", k->g.variant[e->a].label, err)) ||
        (st = kv_set_text(s, r, "baseline", k->g.variant[k->baseline].label, err)) ||
        (st = kv_set_text(s, r, "model", model, err)) || (st = kv_set_text(s, r, "metric", k->g.metric, err)) ||
        (st = kv_set_text(s, r, "unit", k->g.unit, err)) ||
        (st = kv_set_text(s, r, "better",
                          k->g.better > 0   ? "higher"
                          : k->g.better < 0 ? "lower"
                                            : "none",
                          err)) ||
        (st = kv_set_text(s, r, "at", at_text(k, e), err)) ||
        (st = kv_set_text(s, r, "test",
                          c->binary  ? "mcnemar, exact"
                          : c->exact ? "wilcoxon, exact"
                                     : "wilcoxon, normal",
                          err)))
        return st;
    const struct {
        const char *name;
        double v;
    } real[] = {{"mean", c->mean_a},
                {"baseline_mean", c->mean_b},
                {"difference", c->diff.mean},
                {"low", c->diff.low},
                {"high", c->diff.high},
                {"median", c->median},
                {"sd", c->sd},
                {"d_z", c->d_z},
                {"these_low", c->these.low},
                {"these_high", c->these.high},
                {"new_low", c->fresh.low},
                {"new_high", c->fresh.high},
                {"win_low", c->win_low},
                {"win_high", c->win_high},
                {"p", c->p},
                {"rank_biserial", c->rank_biserial},
                {"p_holm", c->p_holm},
                {"worse_by_at_most", c->worse_bound},
                {"margin", c->margin},
                {"bytes", e->budget == CURVE ? NAN : c->bytes_a},
                {"baseline_bytes", e->budget == CURVE ? NAN : c->bytes_b},
                {"log2_bytes_low", e->budget == CURVE ? e->low : NAN},
                {"log2_bytes_high", e->budget == CURVE ? e->high : NAN}};
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) kv_set_real(s, r, real[i].name, real[i].v);
    kv_set_int(s, r, "n", (int64_t)c->n), kv_set_int(s, r, "undefined", (int64_t)c->undefined);
    kv_set_int(s, r, "families", (int64_t)c->n_family), kv_set_int(s, r, "wins", (int64_t)c->wins);
    kv_set_int(s, r, "ties", (int64_t)c->ties), kv_set_int(s, r, "losses", (int64_t)c->losses);
    if (c->margin == c->margin) kv_set_int(s, r, "noninferior", c->noninferior);
    return KV_OK;
}

/* One line per family: n, mean difference, its smallest and largest prompt. */
static kv_status family_rows(const comparison *k, const entry *e, kv_sheet *s, kv_error *err)
{
    const char *const cols[] = {"policy", "family", "n", "difference", "least", "most"};
    kv_status st = s->n_col ? KV_OK : kv_sheet_init(s, 6, cols, err);
    for (uint32_t f = 0; f < k->g.n_family && !st; f++) {
        double sum = 0, least = INFINITY, most = -INFINITY;
        size_t n = 0;
        kv_cell *row;
        for (size_t i = 0; i < e->pairs.n; i++) {
            double d = e->pairs.d[i];
            if (e->pairs.family[i] != f) continue;
            sum += d, n++, least = fmin(least, d), most = fmax(most, d);
        }
        if (!n) continue;
        if ((st = kv_sheet_add(s, &row, err))) break;
        const char *name = *k->g.family[f] ? k->g.family[f] : "(none)";
        if ((st = kv_sheet_text(s, &row[0], k->g.variant[e->a].label, strlen(k->g.variant[e->a].label), err)) ||
            (st = kv_sheet_text(s, &row[1], name, strlen(name), err)))
            break;
        row[2] = kv_int((int64_t)n), row[3] = kv_real(sum / (double)n), row[4] = kv_real(least), row[5] = kv_real(most);
    }
    return st;
}

/* Differences budget by budget with a band that holds for all of them at once. */
static kv_status point_rows(const comparison *k, const entry *e, kv_sheet *s, kv_error *err)
{
    const char *const cols[] = {"policy",     "budget",   "bytes",     "baseline_bytes",
                                "difference", "band_low", "band_high", "n"};
    const kv_grid *g = &k->g;
    double *v = NULL, *half = NULL, factor, *bytes = NULL;
    bool *whole = NULL;
    size_t n = 0;
    kv_pairs p = {0};
    kv_status st;
    if (!s->n_col && (st = kv_sheet_init(s, 8, cols, err))) return st;
    if ((st = kv_array(&v, e->n_shared * g->n_prompt, sizeof *v, err)) ||
        (st = kv_array(&half, e->n_shared, sizeof *half, err)) ||
        (st = kv_array(&bytes, 2 * e->n_shared, sizeof *bytes, err)) ||
        (st = kv_array(&whole, g->n_prompt, sizeof *whole, err)))
        goto out;
    for (size_t i = 0; i < g->n_prompt * e->n_shared; i++) v[i] = NAN;
    for (size_t b = 0; b < e->n_shared; b++) {
        if ((st = kv_grid_pairs(g, e->a, k->baseline, e->shared[b], &p, err))) goto out;
        for (size_t i = 0; i < p.n; i++) v[b * g->n_prompt + p.prompt[i]] = p.d[i];
        bytes[2 * b] = p.bytes_a, bytes[2 * b + 1] = p.bytes_b;
        kv_pairs_free(&p);
    }
    for (size_t q = 0; q < g->n_prompt; q++) { /* prompts with a value everywhere, packed to the left */
        bool ok = true;
        for (size_t b = 0; b < e->n_shared; b++) ok &= v[b * g->n_prompt + q] == v[b * g->n_prompt + q];
        whole[q] = ok, n += ok;
    }
    for (size_t b = 0, at = 0; b < e->n_shared; b++)
        for (size_t q = 0; q < g->n_prompt; q++)
            if (whole[q]) v[at++] = v[b * g->n_prompt + q];
    if ((st = kv_band(v, e->n_shared, n, KV_BOOT_RESAMPLES, KV_BOOT_SEED, KV_BOOT_LEVEL, half, &factor, err))) goto out;
    for (size_t b = 0; b < e->n_shared && n; b++) {
        double mean = kv_mean(v + b * n, n);
        const char *label = g->budget[e->shared[b]].label, *policy = g->variant[e->a].label;
        kv_cell *row;
        if ((st = kv_sheet_add(s, &row, err)) || (st = kv_sheet_text(s, &row[0], policy, strlen(policy), err)) ||
            (st = kv_sheet_text(s, &row[1], label, strlen(label), err)))
            goto out;
        row[2] = kv_real(bytes[2 * b]), row[3] = kv_real(bytes[2 * b + 1]), row[4] = kv_real(mean);
        row[5] = kv_real(mean - half[b]), row[6] = kv_real(mean + half[b]), row[7] = kv_int((int64_t)n);
    }
out:
    kv_pairs_free(&p);
    free(v), free(half), free(bytes), free(whole);
    return st;
}

/* ------------------------------------------------------------------------------------------------ words */
static void put_range(FILE *f, const kv_interval *i, int dec)
{
    if (i->has_interval)
        fprintf(f, "[%.*f, %.*f]", dec, i->low, dec, i->high);
    else
        fputs("-", f);
}

static int decimals(const comparison *k)
{
    double most = 0;
    for (size_t i = 0; i < k->n; i++) most = fmax(most, fabs(k->e[i].c.diff.mean));
    return most > 0 ? kv_decimals(most) + 1 > 6 ? 6 : kv_decimals(most) + 1 : 4;
}

/* "cake is better than snapkv: 11 of 12 prompts, p = 0.0015", or that nothing was shown. */
static void put_verdict(const comparison *k, const entry *e, FILE *f)
{
    const kv_contrast *c = &e->c;
    const char *a = k->g.variant[e->a].label, *b = k->g.variant[k->baseline].label;
    char p[16];
    bool sure = c->p_holm < 1 - KV_BOOT_LEVEL;
    kv_p_text(c->p_holm, p);
    fputs("  ", f);
    kv_put_plain(f, a, strlen(a));
    if (!sure)
        fputs(" and ", f);
    else if (!k->g.better)
        fputs(c->diff.mean > 0 ? " is higher than " : " is lower than ", f);
    else
        fputs(c->diff.mean * k->g.better > 0 ? " is better than " : " is worse than ", f);
    kv_put_plain(f, b, strlen(b));
    if (!sure)
        fprintf(f, ": no difference shown, which is not evidence that there is none (p %s%s)", *p == '<' ? "" : "= ",
                p);
    else
        fprintf(f, " (p %s%s)", *p == '<' ? "" : "= ", p);
    if (c->margin == c->margin) {
        fprintf(f, "; %s by the margin %g", c->noninferior ? "non-inferior" : "not shown to be non-inferior",
                c->margin);
    }
    fputs("\n", f);
}

static void print_one(const comparison *k, const entry *e, int dec, FILE *f)
{
    const kv_contrast *c = &e->c;
    char p[16];
    fprintf(f, "  %-18s %.*f against %.*f\n", "mean", dec, c->mean_a, dec, c->mean_b);
    fprintf(f, "  %-18s %+.*f  ", "difference", dec, c->diff.mean);
    put_range(f, &c->diff, dec);
    fputs(" over prompts\n", f);
    fprintf(f, "  %-18s ", "these families");
    put_range(f, &c->these, dec);
    fputs(c->these.has_interval ? "\n" : " (needs two prompts in every family)\n", f);
    fprintf(f, "  %-18s ", "new families");
    put_range(f, &c->fresh, dec);
    fprintf(f, " (%zu famil%s%s)\n", c->n_family, c->n_family == 1 ? "y" : "ies",
            c->n_family < KV_FAMILIES_ENOUGH ? ": too few, unreliable" : "");
    fprintf(f, "  %-18s %+.*f, d_z ", "median", dec, c->median);
    fprintf(f, isnan(c->d_z) ? "-\n" : "%.2f\n", c->d_z);
    fprintf(f, "  %-18s %zu / %zu / %zu", k->g.better ? "win / tie / loss" : "higher/tie/lower", c->wins, c->ties,
            c->losses);
    if (c->wins + c->losses) fprintf(f, ", wins [%.0f%%, %.0f%%]", 100 * c->win_low, 100 * c->win_high);
    if (k->a->tie > 0) fprintf(f, ", ties within %g", k->a->tie);
    fprintf(f, "\n  %-18s p = %s",
            c->binary  ? "McNemar, exact"
            : c->exact ? "Wilcoxon, exact"
                       : "Wilcoxon",
            kv_p_text(c->p, p));
    if (!c->binary) fprintf(f, ", rank-biserial %+.2f", c->rank_biserial);
    if (k->n > 1) fprintf(f, ", Holm over %zu: p = %s", k->n, kv_p_text(c->p_holm, p));
    fputs("\n", f);
    if (c->worse_bound == c->worse_bound) {
        fprintf(f, "  %-18s %s by %s %.*f (one-sided 95%%, studentised bootstrap)", "at the worst",
                c->worse_bound > 0 ? "worse" : "better", c->worse_bound > 0 ? "less than" : "more than", dec,
                fabs(c->worse_bound));
        if (c->margin == c->margin)
            fprintf(f, "; margin %g: %s", c->margin, c->noninferior ? "non-inferior" : "not shown");
        fputs("\n", f);
    }
    if (e->budget == CURVE)
        fprintf(f, "  %-18s means of the curves' heights over log2 bytes, %.3g to %.3g MiB\n", "curves",
                exp2(e->low) / (1 << 20), exp2(e->high) / (1 << 20));
    else {
        char x[24], y[24];
        double ratio = c->bytes_a / c->bytes_b;
        fprintf(f, "  %-18s %s against %s%s\n", "bytes kept", kv_bytes_text(c->bytes_a, x),
                kv_bytes_text(c->bytes_b, y),
                fabs(ratio - 1) > 0.01 ? ": not the same bytes; the curves (no -b) or --match-bytes are fairer" : "");
    }
}

/* Several policies: a line each. */
static kv_status print_many(const comparison *k, int dec, kv_error *err)
{
    const char *const head[] = {
        "policy", "at", "difference", "95% interval", "new families", "w/t/l", "p", "Holm", "worse <", "bytes x", ""};
    kv_sheet t = {0};
    kv_status st = kv_sheet_init(&t, 11, head, err);
    for (size_t i = 0; i < k->n && !st; i++) {
        const entry *e = &k->e[i];
        const kv_contrast *c = &e->c;
        const char *label = k->g.variant[e->a].label, *at = at_text(k, e);
        char p[16];
        kv_cell *row;
        if ((st = kv_sheet_add(&t, &row, err)) || (st = kv_sheet_text(&t, &row[0], label, strlen(label), err)) ||
            (st = kv_sheet_text(&t, &row[1], at, strlen(at), err)) ||
            (st = kv_cell_format(&t, &row[2], err, "%+.*f", dec, c->diff.mean)))
            break;
        if (c->diff.has_interval)
            st = kv_cell_format(&t, &row[3], err, "[%.*f, %.*f]", dec, c->diff.low, dec, c->diff.high);
        if (!st && c->fresh.has_interval)
            st = kv_cell_format(&t, &row[4], err, "[%.*f, %.*f]", dec, c->fresh.low, dec, c->fresh.high);
        if (!st) st = kv_cell_format(&t, &row[5], err, "%zu/%zu/%zu", c->wins, c->ties, c->losses);
        if (!st) st = kv_cell_format(&t, &row[6], err, "%s", kv_p_text(c->p, p));
        if (!st) st = kv_cell_format(&t, &row[7], err, "%s", kv_p_text(c->p_holm, p));
        if (!st && isfinite(c->worse_bound)) st = kv_cell_format(&t, &row[8], err, "%+.*f", dec, c->worse_bound);
        if (!st && e->budget != CURVE && c->bytes_b > 0)
            st = kv_cell_format(&t, &row[9], err, "%.2f", c->bytes_a / c->bytes_b);
        if (!st)
            st = kv_cell_format(&t, &row[10], err, "%s%s%s", c->p_holm < 1 - KV_BOOT_LEVEL ? "*" : "",
                                c->noninferior ? " non-inferior" : "", k->g.variant[e->a].unverified ? " ?" : "");
    }
    if (!st) kv_print_table(k->a->out, &t, "llrrrrrrrrl", 2);
    kv_sheet_free(&t);
    return st;
}

static kv_status print_text(const comparison *k, const char *model, const kv_sheet *families, const kv_sheet *points,
                            kv_error *err)
{
    FILE *f = k->a->out;
    const char *b = k->g.variant[k->baseline].label;
    int dec = decimals(k);
    kv_status st = KV_OK;
    bool few = false;
    size_t n = k->e[0].c.n;
    fprintf(f, "%s (%s)%s; ", k->g.metric, k->g.unit,
            k->g.better > 0   ? ", higher is better"
            : k->g.better < 0 ? ", lower is better"
                              : "");
    kv_put_plain(f, model, strlen(model));
    for (size_t i = 0; i < k->n; i++) few |= k->e[i].c.n_family < KV_FAMILIES_ENOUGH;
    if (k->n == 1) {
        fputs("\n", f);
        kv_put_plain(f, k->g.variant[k->e[0].a].label, strlen(k->g.variant[k->e[0].a].label));
        fputs(" minus ", f);
    } else
        fputs("\neach policy minus ", f);
    kv_put_plain(f, b, strlen(b));
    fprintf(f, k->n == 1 && k->e[0].budget != CURVE ? ", budget %s, %zu prompts\n\n" : ", %s, %zu prompts\n\n",
            k->n == 1 || k->e[0].budget == CURVE ? at_text(k, &k->e[0]) : "by budget", n);
    if (k->n == 1)
        print_one(k, &k->e[0], dec, f);
    else
        st = print_many(k, dec, err);
    if (!st && points->n_row && k->n == 1) {
        fputs("\nby budget; the band holds for all budgets at once (max-t)\n", f);
        kv_sheet t = {0};
        const char *const head[] = {"budget", "bytes x", "difference", "band low", "band high"};
        st = kv_sheet_init(&t, 5, head, err);
        for (size_t r = 0; r < points->n_row && !st; r++) {
            const kv_cell *c = kv_sheet_at(points, r, 0);
            kv_cell *row;
            if ((st = kv_sheet_add(&t, &row, err)) || (st = kv_sheet_copy_cell(&t, &row[0], &c[1], err)) ||
                (st = kv_cell_format(&t, &row[1], err, "%.2f", kv_cell_number(&c[2]) / kv_cell_number(&c[3]))))
                break;
            for (int i = 0; i < 3 && !st; i++)
                if (c[4 + i].kind != KV_CELL_NULL)
                    st = kv_cell_format(&t, &row[2 + i], err, "%+.*f", dec, kv_cell_number(&c[4 + i]));
        }
        if (!st) kv_print_table(f, &t, "rrrrr", 2);
        kv_sheet_free(&t);
    }
    if (!st && few && k->n == 1 && families->n_row) {
        fprintf(f, "\nby family (fewer than %u: no claim about new families)\n", KV_FAMILIES_ENOUGH);
        kv_sheet t = {0};
        const char *const head[] = {"family", "n", "difference", "least", "most"};
        st = kv_sheet_init(&t, 5, head, err);
        for (size_t r = 0; r < families->n_row && !st; r++) {
            const kv_cell *c = kv_sheet_at(families, r, 0);
            kv_cell *row;
            if ((st = kv_sheet_add(&t, &row, err)) || (st = kv_sheet_copy_cell(&t, &row[0], &c[1], err))) break;
            row[1] = c[2];
            for (int i = 0; i < 3 && !st; i++)
                st = kv_cell_format(&t, &row[2 + i], err, "%+.*f", dec, kv_cell_number(&c[3 + i]));
        }
        if (!st) kv_print_table(f, &t, "lrrrr", 2);
        kv_sheet_free(&t);
    }
    if (st) return st;
    fputs("\n", f);
    for (size_t i = 0; i < k->n && k->n == 1; i++) put_verdict(k, &k->e[i], f);
    kv_print_interval_line(f);
    fputs("\nnew families: families are drawn, then prompts within them", f);
    if (few) fprintf(f, "; fewer than %u families: unreliable", KV_FAMILIES_ENOUGH);
    if (k->n > 1)
        fputs("\n*  p < 0.05 after Holm's correction   worse <: worse by less than this (one-sided 95%)\n"
              "w/t/l: prompts won, tied, lost   bytes x: bytes kept / the baseline's   ?  not verified against its "
              "source",
              f);
    fputs("\n", f);
    return KV_OK;
}

static kv_status print(const comparison *k, const char *model, kv_error *err)
{
    kv_sheet rows = {0}, families = {0}, points = {0};
    kv_status st = kv_sheet_init(&rows, N_COLUMN, COLUMNS, err);
    for (size_t i = 0; i < k->n && !st; i++) {
        st = put_row(k, &k->e[i], model, &rows, err);
        if (!st) st = family_rows(k, &k->e[i], &families, err);
        if (!st && k->e[i].budget == CURVE) st = point_rows(k, &k->e[i], &points, err);
    }
    if (!st && k->a->format == KV_OUT_CSV)
        kv_print_csv(k->a->out, &rows);
    else if (!st && k->a->format == KV_OUT_JSON) {
        fputs("{\"metric\": ", k->a->out);
        kv_put_json(k->a->out, k->g.metric, strlen(k->g.metric));
        fputs(", \"interval\": ", k->a->out);
        kv_print_interval_json(k->a->out);
        fprintf(k->a->out, ", \"tie\": %g,\n \"rows\": ", k->a->tie);
        kv_print_json(k->a->out, &rows);
        fputs(",\n \"by_budget\": ", k->a->out);
        kv_print_json(k->a->out, &points);
        fputs(",\n \"by_family\": ", k->a->out);
        kv_print_json(k->a->out, &families);
        fputs("}\n", k->a->out);
    } else if (!st)
        st = print_text(k, model, &families, &points, err);
    kv_sheet_free(&rows), kv_sheet_free(&families), kv_sheet_free(&points);
    return st;
}

kv_status kv_cmd_compare(const kv_analysis *a, kv_error *err)
{
    comparison k = {.a = a, .allow = {a->common, a->any_build}};
    kv_db *db = NULL;
    kv_selection s = {0};
    size_t *who = NULL, n_who = 0, n_word = a->rest.n, *budget = NULL, n_budget = 0;
    kv_contrast *c = NULL;
    kv_status st;
    if (a->tie < 0 || a->margin < 0)
        return kv_fail(err, KV_EMISUSE, "--%s must not be negative", a->tie < 0 ? "tie" : "margin");
    if ((st = kv_analysis_open(a, &db, &s, err)) || (st = kv_selection_model(db, &s, err)) ||
        (st = kv_selection_metric(db, &s, a->metric, kv_default_metrics, err)) ||
        (st = kv_grid_load(db, &s, &k.g, err)) || (st = kv_array(&who, k.g.n_variant + n_word, sizeof *who, err)) ||
        (st = kv_grid_sides(&k.g, &a->rest, a->baseline, who, &n_who, &k.baseline, err)))
        goto out;
    if (a->margin == a->margin && !k.g.better) {
        st = kv_fail(err, KV_EMISUSE, "--margin: '%s' has no better direction", k.g.metric);
        goto out;
    }
    if ((st = kv_array(&budget, k.g.n_budget, sizeof *budget, err))) goto out;
    if (a->budgets.n) /* the selection holds only the budgets asked for */
        for (n_budget = 0; n_budget < k.g.n_budget; n_budget++) budget[n_budget] = n_budget;
    else
        n_budget = 1, budget[0] = CURVE;
    if ((st = kv_array(&k.e, n_who * n_budget, sizeof *k.e, err)) ||
        (st = kv_array(&c, n_who * n_budget, sizeof *c, err)))
        goto out;
    for (size_t b = 0; b < n_budget; b++)
        for (size_t i = 0; i < n_who; i++) {
            k.e[k.n] = (entry){.a = who[i], .budget = budget[b]};
            if (!(st = fill(&k, &k.e[k.n++], err))) continue;
            /* of all others, those that can be compared; a policy that was named must be */
            if (n_word > 1 || (st != KV_EFORMAT && st != KV_EMISSING) || !err) goto out;
            kv_print_left_out(a->talk, err);
            kv_pairs_free(&k.e[--k.n].pairs);
            free(k.e[k.n].shared);
            k.e[k.n] = (entry){0};
        }
    if (!k.n) goto out; /* with the last reason */
    st = KV_OK;
    for (size_t i = 0; i < k.n; i++) c[i] = k.e[i].c;
    if ((st = kv_contrast_holm(c, k.n, err))) goto out;
    for (size_t i = 0; i < k.n; i++) k.e[i].c = c[i];
    if ((st = print(&k, s.model ? s.model : "", err))) goto out;
    size_t undefined = 0, least = SIZE_MAX;
    for (size_t i = 0; i < k.n; i++) {
        undefined += k.e[i].c.undefined;
        if (k.e[i].c.n < least) least = k.e[i].c.n;
    }
    if (undefined) fprintf(a->talk, "note: %zu values are undefined and left out\n", undefined);
    if (least < 6)
        fprintf(a->talk, "note: %zu prompt%s: no p-value of the signed ranks can be below 0.05\n", least,
                least == 1 ? "" : "s");
out:
    comparison_free(&k);
    free(who), free(budget), free(c);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
