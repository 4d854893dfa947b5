/* power.c - kv-analyze power: from the paired differences of a pilot to the number of prompts. The paired t-test stands
 * for what compare will do: Wilcoxon's test needs about 5 % more prompts on normal differences and fewer on long
 * tails. */
#include "analyze/analysis.h"
#include "analyze/contrast.h"
#include "analyze/dist.h"

#include <math.h>
#include <stdlib.h>

#define POWER 0.8
#define ALPHA 0.05

/* sd at quantiles of the resampled prompts: what the pilot itself does not know. */
static kv_status sd_range(const double *d, size_t n, double *low, double *high, kv_error *err)
{
    double *sd = NULL, *v = NULL;
    kv_rng rng = {.s = KV_BOOT_SEED};
    kv_status st = kv_array(&sd, KV_BOOT_RESAMPLES, sizeof *sd, err);
    if (!st) st = kv_array(&v, n, sizeof *v, err);
    for (uint32_t b = 0; b < KV_BOOT_RESAMPLES && !st; b++) {
        for (size_t i = 0; i < n; i++) v[i] = d[(size_t)((kv_rng_next(&rng) >> 32) * n >> 32)];
        sd[b] = kv_sd(v, n);
    }
    if (!st) {
        *low = kv_quantile_of(sd, KV_BOOT_RESAMPLES, (1 - KV_BOOT_LEVEL) / 2);
        *high = kv_quantile_of(sd, KV_BOOT_RESAMPLES, (1 + KV_BOOT_LEVEL) / 2);
    }
    free(sd), free(v);
    return st;
}

typedef struct {
    const char *name;
    double v;
} field;

/* "37", or "> 10000000" */
static kv_status put_n(kv_sheet *t, kv_cell *c, uint32_t n, kv_error *err)
{
    if (n) return *c = kv_int(n), KV_OK;
    return kv_cell_format(t, c, err, "never");
}

static kv_status one(const kv_analysis *a, const kv_grid *g, size_t who, size_t baseline, size_t budget, kv_sheet *data,
                     kv_sheet *table, kv_error *err)
{
    kv_pairs p = {0};
    kv_contrast c;
    double lo = NAN, hi = NAN;
    kv_status st;
    kv_cell *row;
    kv_allow allow = {a->common, a->any_build};
    if ((st = kv_grid_comparable(g, who, baseline, &budget, 1, allow, err)) ||
        (st = kv_grid_pairs(g, who, baseline, budget, &p, err)))
        goto out;
    if (p.n < 3) {
        st = kv_fail(err, KV_EMISSING, "a pilot of %zu prompts says nothing about the spread: at least 3, better 12",
                     p.n);
        goto out;
    }
    if ((st = kv_contrast_of(&p, g->better, 0, a->margin, &c, err)) || (st = sd_range(p.d, p.n, &lo, &hi, err)))
        goto out;
    bool margin = a->margin == a->margin, assumed = a->difference == a->difference;
    double loss = g->better < 0 ? c.diff.mean : -c.diff.mean; /* how much worse A is */
    double effect = margin ? a->margin - (assumed ? a->difference : loss) : assumed ? a->difference : c.diff.mean;
    int sides = margin ? 1 : 2;
    /* prompts of one family say less about new families: the design effect multiplies n */
    double wide = c.fresh.high - c.fresh.low, narrow = c.diff.high - c.diff.low;
    double design = c.fresh.has_interval && narrow > 0 ? fmax(1, wide / narrow * (wide / narrow)) : NAN;
    uint32_t n = kv_t_power_n(effect / c.sd, POWER, ALPHA, sides),
             n_lo = kv_t_power_n(effect / lo, POWER, ALPHA, sides),
             n_hi = kv_t_power_n(effect / hi, POWER, ALPHA, sides);
    size_t r = data->n_row;
    double t = kv_student_quantile(1 - ALPHA / sides, (double)p.n - 1) + kv_student_quantile(POWER, (double)p.n - 1);
    double detectable = t * c.sd / sqrt((double)p.n);
    const char *label = g->variant[who].label, *b = g->variant[baseline].label, *at = g->budget[budget].label;
    if (!(c.sd > 0)) {
        st = kv_fail(err, KV_EMISSING,
                     "'%s' and '%s' differ by the same on every prompt at budget '%s': nothing to plan", label, b, at);
        goto out;
    }
    if ((st = kv_sheet_add(data, &row, err)) || (st = kv_set_text(data, r, "policy", label, err)) ||
        (st = kv_set_text(data, r, "baseline", b, err)) || (st = kv_set_text(data, r, "metric", g->metric, err)) ||
        (st = kv_set_text(data, r, "budget", at, err)) ||
        (st = kv_set_text(data, r, "question", margin ? "non-inferior, one-sided" : "different, two-sided", err)))
        goto out;
    const field real[] = {{"difference", c.diff.mean},
                          {"sd", c.sd},
                          {"effect", effect},
                          {"margin", a->margin},
                          {"alpha", ALPHA},
                          {"power", POWER},
                          {"detectable", detectable},
                          {"design_effect", design}};
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) kv_set_real(data, r, real[i].name, real[i].v);
    kv_set_int(data, r, "pilot", (int64_t)p.n);
    if (n) kv_set_int(data, r, "prompts", n);
    if (n_lo) kv_set_int(data, r, "prompts_low", n_lo);
    if (n_hi) kv_set_int(data, r, "prompts_high", n_hi);
    int dec = kv_decimals(fmax(fabs(c.diff.mean), c.sd));
    if ((st = kv_sheet_add(table, &row, err)) || (st = kv_sheet_text(table, &row[0], label, strlen(label), err)) ||
        (st = kv_sheet_text(table, &row[1], at, strlen(at), err)))
        goto out;
    row[2] = kv_int((int64_t)p.n);
    if ((st = kv_cell_format(table, &row[3], err, "%+.*f", dec, c.diff.mean)) ||
        (st = kv_cell_format(table, &row[4], err, "%.*f", dec, c.sd)) ||
        (st = kv_cell_format(table, &row[5], err, "%.*f", dec, effect)) || (st = put_n(table, &row[6], n, err)))
        goto out;
    if (n_lo && n_hi)
        st = kv_cell_format(table, &row[7], err, "%u to %u", n_lo, n_hi);
    else if (n_lo)
        st = kv_cell_format(table, &row[7], err, "%u or more", n_lo);
    if (!st) st = kv_cell_format(table, &row[8], err, "%.*f", dec, detectable);
    if (!st && design == design) st = kv_cell_format(table, &row[9], err, "%.1f", design);
out:
    kv_pairs_free(&p);
    return st;
}

kv_status kv_cmd_power(const kv_analysis *a, kv_error *err)
{
    const char *const cols[] = {"policy",     "baseline",    "metric",       "budget",     "question",     "pilot",
                                "difference", "sd",          "effect",       "margin",     "alpha",        "power",
                                "prompts",    "prompts_low", "prompts_high", "detectable", "design_effect"};
    const char *const head[] = {
        "policy",         "budget",    "pilot", "difference", "sd", "to show", "prompts", "from the pilot's own doubt",
        "detectable now", "x families"};
    kv_grid g = {0};
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_sheet data = {0}, table = {0};
    size_t *who = NULL, n = 0, baseline = 0;
    kv_status st, why = KV_OK;
    if (a->margin <= 0 || a->difference == 0)
        return kv_fail(err, KV_EMISUSE, "--%s must %s", a->margin <= 0 ? "margin" : "difference",
                       a->margin <= 0 ? "be above 0" : "not be 0");
    if ((st = kv_analysis_open(a, &db, &s, err)) || (st = kv_selection_model(db, &s, err)) ||
        (st = kv_selection_metric(db, &s, a->metric, kv_default_metrics, err)) ||
        (st = kv_selection_budget(db, &s, err)) || (st = kv_grid_load(db, &s, &g, err)) ||
        (st = kv_array(&who, g.n_variant + a->rest.n, sizeof *who, err)) ||
        (st = kv_grid_sides(&g, &a->rest, a->baseline, who, &n, &baseline, err)) ||
        (st = kv_sheet_init(&data, sizeof cols / sizeof *cols, cols, err)) ||
        (st = kv_sheet_init(&table, 10, head, err)))
        goto out;
    if (a->margin == a->margin && !g.better) {
        st = kv_fail(err, KV_EMISUSE, "--margin: '%s' has no better direction", g.metric);
        goto out;
    }
    for (size_t b = 0; b < g.n_budget && !st; b++) {
        if (a->budgets.n == 0 && strcmp(g.budget[b].label, s.budget)) continue;
        for (size_t i = 0; i < n && !st; i++) {
            st = one(a, &g, who[i], baseline, b, &data, &table, err);
            if (a->rest.n > 1 || (st != KV_EFORMAT && st != KV_EMISSING) || !err) continue;
            kv_print_left_out(a->talk, err); /* of all others, those that can be planned for */
            why = st, st = KV_OK;
        }
    }
    if (!st && !data.n_row) st = why;
    if (st) goto out;
    if (a->format == KV_OUT_CSV)
        kv_print_csv(a->out, &data);
    else if (a->format == KV_OUT_JSON) {
        fputs("{\"rows\": ", a->out);
        kv_print_json(a->out, &data);
        fputs("}\n", a->out);
    } else {
        fprintf(a->out, "%s (%s): prompts for %g%% power, ", g.metric, g.unit, 100 * POWER);
        if (a->margin == a->margin)
            fprintf(a->out, "policy non-inferior to ");
        else
            fprintf(a->out, "policy different from ");
        kv_put_plain(a->out, g.variant[baseline].label, strlen(g.variant[baseline].label));
        if (a->margin == a->margin) fprintf(a->out, " by the margin %g", a->margin);
        fprintf(a->out, ", %s alpha %g\n\n", a->margin == a->margin ? "one-sided" : "two-sided", ALPHA);
        kv_print_table(a->out, &table, "lrrrrrrrrr", 2);
        fputs("\nto show: ", a->out);
        fputs(
            a->margin == a->margin ? "margin minus the loss of the pilot (or of --difference); never: the loss is past "
                                     "the margin, prompts do not help"
            : a->difference == a->difference ? "the difference asked for"
                                             : "the pilot's own difference; --difference X plans for one that matters",
            a->out);
        fputs(
            "\nprompts: paired t-test, sd of the pilot; doubt: at the 95% limits of that sd (bootstrap over prompts)\n"
            "x families: for a claim about new families, multiply by this design effect\n",
            a->out);
    }
out:
    kv_sheet_free(&data), kv_sheet_free(&table);
    kv_grid_free(&g);
    free(who);
    kv_selection_free(&s);
    kv_db_close(db);
    return st;
}
