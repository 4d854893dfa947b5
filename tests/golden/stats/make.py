#!/usr/bin/env python3
"""make.py - writes expected.json beside it: what SciPy says about small inputs. Run by hand (pip install scipy numpy), not by the
tests; tests/test_stats.c reads the file. The resamples of the bootstrap cases are those of the program (splitmix64), handed to SciPy."""
import json
import os

import numpy as np
import scipy
from scipy import stats

rng = np.random.default_rng(20261122)


def resampled_means(v, resamples, seed):
    mask, state, n, out = (1 << 64) - 1, seed, len(v), np.empty(resamples)
    for b in range(resamples):
        total = 0.0
        for _ in range(n):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = state
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            total += v[((z ^ (z >> 31)) >> 32) * n >> 32]
        out[b] = total / n
    return out


def bootstrap(v, resamples, seed, level):
    class Before:  # n_resamples=0 with a distribution at hand: SciPy's interval of our resamples
        bootstrap_distribution = resampled_means(v, resamples, seed)

    case = {"v": v, "resamples": resamples, "seed": seed, "level": level}
    for method in ("percentile", "BCa"):
        ci = stats.bootstrap((np.array(v),), np.mean, n_resamples=0, bootstrap_result=Before, confidence_level=level, method=method).confidence_interval
        case[method] = [ci.low, ci.high]
    return case


def signed_rank(d, method):
    d = [float(x) for x in d]
    r = stats.wilcoxon(d, zero_method="wilcox", correction=False, method=method)
    nz = np.array([x for x in d if x])
    ranks = stats.rankdata(abs(nz))
    plus, minus = ranks[nz > 0].sum(), ranks[nz < 0].sum()
    return {"d": d, "p": float(r.pvalue), "w_plus": plus, "rank_biserial": (plus - minus) / (plus + minus)}


def power(effect, n, alpha, sides):
    t = stats.t.ppf(1 - alpha / sides, n - 1)
    shift = effect * np.sqrt(n)
    p = stats.nct.sf(t, n - 1, shift)
    below = stats.nct.cdf(-t, n - 1, shift) if sides == 2 else 0
    return float(p + np.nan_to_num(below))  # SciPy says nan where it underflows


def ints(n, k):
    return [int(x) for x in rng.integers(0, k, n)]


out = {
    "made_by": f"tests/golden/stats/make.py with SciPy {scipy.__version__}, NumPy {np.__version__}",
    "normal_quantile": [[p, stats.norm.ppf(p)] for p in (1e-12, 1e-6, 0.001, 0.025, 0.2, 0.5, 0.77, 0.95, 0.975, 0.9999, 1 - 1e-9)],
    "normal_cdf": [[z, stats.norm.cdf(z)] for z in (-9, -3.2, -1, 0, 0.3, 1.96, 5)],
    "student_cdf": [[t, df, stats.t.cdf(t, df)] for t in (-40, -2.2, -0.1, 0, 0.7, 3, 25) for df in (1, 2, 3.5, 11, 23, 400)],
    "student_quantile": [[p, df, stats.t.ppf(p, df)] for p in (0.001, 0.05, 0.4, 0.6, 0.95, 0.975, 0.999) for df in (1, 2, 11, 23, 400)],
    "binomial_cdf": [[k, n, stats.binom.cdf(k, n, 0.5)] for n in (1, 5, 12, 100) for k in (0, n // 3, n // 2, n - 1, n)],
    "power": [[e, n, a, s, power(e, n, a, s)] for e in (0.05, 0.2, 0.5, 1.1, 3) for n in (2, 3, 5, 12, 60, 900) for a, s in ((0.05, 2), (0.05, 1), (0.01, 2))],
    "mcnemar": [[a, b, stats.binomtest(a, a + b, 0.5).pvalue] for a, b in ((0, 1), (0, 6), (3, 4), (12, 3), (40, 61), (5, 5))],
    "wilson": [[k, n, *stats.binomtest(k, n).proportion_ci(0.95, method="wilson")] for k, n in ((0, 7), (7, 7), (3, 12), (50, 99))],
    "wilcoxon_exact": [signed_rank(rng.standard_normal(n) + m, "exact") for n, m in ((1, 0), (2, 0), (5, 0.5), (12, 0.4), (24, -0.3), (50, 0.2))],
    "wilcoxon_exact_ties": [signed_rank(np.array(ints(n, 9)) - 3, stats.PermutationMethod(n_resamples=np.inf)) for n in (4, 8, 12)],
    "wilcoxon_normal": [signed_rank(rng.standard_normal(n) + m, "asymptotic") for n, m in ((12, 0.5), (60, 0.2), (200, 0.05))]
    + [signed_rank(np.array(ints(n, k)) - k // 2, "asymptotic") for n, k in ((15, 7), (80, 5), (60, 30))],
    "kendall": [],
    "spearman": [],
    "benjamini_hochberg": [],
    "bootstrap": [bootstrap([float(x) for x in v], b, s, level) for v, b, s, level in (
        (rng.exponential(size=12), 2000, 1, 0.95), (rng.standard_normal(24), 2000, 7, 0.95), (-rng.exponential(size=7) ** 2, 999, 3, 0.9),
        ([0.2, 0.4], 500, 1, 0.95), (ints(30, 3), 2000, 5, 0.99))],
}
for n, k in ((2, 50), (5, 50), (12, 4), (40, 1000), (120, 6), (300, 100000)):
    x = ints(n, k)
    y = [a + b for a, b in zip(x, ints(n, k))]
    out["kendall"].append({"x": x, "y": y, "r": float(stats.kendalltau(x, y).statistic)})
    out["spearman"].append({"x": x, "y": y, "r": float(stats.spearmanr(x, y).statistic)})
for n in (1, 3, 10, 270):
    p = [float(x) for x in rng.random(n) ** 3]
    out["benjamini_hochberg"].append({"p": p, "q": [float(x) for x in stats.false_discovery_control(p)]})

def tidy(x):
    if isinstance(x, dict):
        return {k: tidy(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [tidy(v) for v in x]
    return float(f"{float(x):.12g}") if isinstance(x, (float, np.floating)) else x


def exact(x):  # inputs keep every digit
    if isinstance(x, dict):
        return {k: v if k in ("v", "d", "x", "y", "p") and isinstance(v, list) else tidy(v) for k, v in x.items()}
    return tidy(x)


for key, value in out.items():
    out[key] = [exact(c) for c in value] if isinstance(value, list) else value
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "expected.json"), "w") as f:
    f.write("{\n" + ",\n".join(f"{json.dumps(k)}: " + (json.dumps(v) if not isinstance(v, list) else "[\n  " + ",\n  ".join(json.dumps(c) for c in v) + "]") for k, v in out.items()) + "\n}\n")
