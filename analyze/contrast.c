/* contrast.c - what paired differences say (contrast.h). */
#include "analyze/contrast.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/ranks.h"
#include "analyze/signif.h"

static bool all_binary(const double *v, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (v[i] != 0 && v[i] != 1) return false;
    return true;
}

/* Discordant pairs are the wins and losses without a tie margin. */
static double mcnemar(const kv_pairs *p)
{
    uint64_t up = 0, down = 0;
    for (size_t i = 0; i < p->n; i++) up += p->d[i] > 0, down += p->d[i] < 0;
    return kv_mcnemar(up, down);
}

kv_status kv_contrast_of(const kv_pairs *p, int better, double tie, double margin, kv_contrast *out, kv_error *err)
{
    kv_contrast c = {.n = p->n, .undefined = p->undefined, .margin = margin, .worse_bound = NAN};
    double *v = NULL;
    kv_wilcoxon_result w;
    kv_status st;
    uint32_t families = 0;
    for (size_t i = 0; i < p->n; i++)
        if (p->family[i] >= families) families = p->family[i] + 1;
    if ((st = kv_array(&v, p->n, sizeof *v, err)) || (st = kv_mean_interval(p->d, p->n, &c.diff, err)) ||
        (st = kv_family_intervals(p->d, p->family, p->n, families, KV_BOOT_RESAMPLES, KV_BOOT_SEED, KV_BOOT_LEVEL,
                                  &c.these, &c.fresh, err)) ||
        (st = kv_wilcoxon(p->d, p->n, KV_WILCOXON_EXACT_MAX, &w, err)))
        goto out;
    for (uint32_t f = 0; f < families; f++) {
        bool used = false;
        for (size_t i = 0; i < p->n && !used; i++) used = p->family[i] == f;
        c.n_family += used;
    }
    c.mean_a = kv_mean(p->a, p->n), c.mean_b = kv_mean(p->b, p->n);
    c.sd = kv_sd(p->d, p->n);
    c.d_z = c.sd > 1e-14 * fabs(c.diff.mean) ? c.diff.mean / c.sd : NAN;
    memcpy(v, p->d, p->n * sizeof *v);
    c.median = p->n ? kv_quantile_of(v, p->n, 0.5) : NAN;
    for (size_t i = 0; i < p->n; i++) {
        double gain = better < 0 ? -p->d[i] : p->d[i];
        v[i] = -gain; /* how much worse A is */
        c.wins += gain > tie, c.losses += gain < -tie;
    }
    c.ties = p->n - c.wins - c.losses;
    kv_wilson(c.wins, c.wins + c.losses, KV_BOOT_LEVEL, &c.win_low, &c.win_high);
    c.binary = p->n && all_binary(p->a, p->n) && all_binary(p->b, p->n);
    c.p = c.p_holm = c.binary ? mcnemar(p) : w.p;
    c.exact = c.binary || w.exact;
    c.rank_biserial = c.binary ? NAN : w.rank_biserial;
    c.bytes_a = p->bytes_a, c.bytes_b = p->bytes_b;
    if (better)
        st = kv_upper_bound(v, p->n, KV_BOOT_RESAMPLES, KV_BOOT_SEED, KV_NONINFERIOR_LEVEL, &c.worse_bound, err);
    c.noninferior = c.worse_bound < margin;
    *out = c;
out:
    free(v);
    return st;
}

kv_status kv_contrast_holm(kv_contrast *c, size_t n, kv_error *err)
{
    double *p = NULL;
    kv_status st = kv_array(&p, n, sizeof *p, err);
    for (size_t i = 0; i < n && !st; i++) p[i] = c[i].p;
    if (!st) st = kv_holm(p, n, err);
    for (size_t i = 0; i < n && !st; i++) c[i].p_holm = p[i];
    free(p);
    return st;
}
