/* dist.c - normal, Student, binomial, power of the t-test (dist.h). */
#include "analyze/dist.h"

#include <math.h>

double kv_normal_cdf(double z)
{
    return 0.5 * erfc(-z * 0.70710678118654752440);
}

static double ratio(const double *num, const double *den, double r)
{
    double a = num[7], b = den[6];
    for (int i = 6; i >= 0; i--) a = a * r + num[i];
    for (int i = 5; i >= 0; i--) b = b * r + den[i];
    return a / (b * r + 1);
}

double kv_normal_quantile(double p)
{
    static const double a[] = {3.3871328727963666080,   1.3314166789178437745e2, 1.9715909503065514427e3,
                               1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
                               3.3430575583588128105e4, 2.5090809287301226727e3},
                        b[] = {4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
                               2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
                               5.2264952788528545610e3},
                        c[] = {1.42343711074968357734,    4.63033784615654529590,   5.76949722146069140550,
                               3.64784832476320460504,    1.27045825245236838258,   2.41780725177450611770e-1,
                               2.27238449892691845833e-2, 7.74545014278341407640e-4},
                        d[] = {2.05319162663775882187,    1.67638483018380384940,    6.89767334985100004550e-1,
                               1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
                               1.05075007164441684324e-9},
                        e[] = {6.65790464350110377720,    5.46378491116411436990,    1.78482653991729133580,
                               2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
                               2.71155556874348757815e-5, 2.01033439929228813265e-7},
                        f[] = {5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
                               7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
                               2.04426310338993978564e-15};
    double q = p - 0.5;
    if (!(p > 0)) return p == 0 ? -INFINITY : NAN;
    if (!(p < 1)) return p == 1 ? INFINITY : NAN;
    if (fabs(q) <= 0.425) return q * ratio(a, b, 0.180625 - q * q);
    double r = sqrt(-log(q < 0 ? p : 1 - p)), z = r <= 5 ? ratio(c, d, r - 1.6) : ratio(e, f, r - 5);
    return q < 0 ? -z : z;
}

/* Regularised incomplete beta function by its continued fraction (modified Lentz). */
static double beta_fraction(double a, double b, double x)
{
    double c = 1, d = 1 - (a + b) * x / (a + 1), h;
    d = 1 / (fabs(d) < 1e-300 ? 1e-300 : d);
    h = d;
    for (int m = 1; m < 10000; m++) {
        for (int odd = 0; odd < 2; odd++) {
            double k = odd ? -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
                           : m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
            d = 1 + k * d, c = 1 + k / c;
            d = 1 / (fabs(d) < 1e-300 ? 1e-300 : d);
            if (fabs(c) < 1e-300) c = 1e-300;
            h *= d * c;
        }
        if (fabs(d * c - 1) < 1e-15) break;
    }
    return h;
}

static double beta_cdf(double a, double b, double x)
{
    if (!(x > 0)) return 0;
    if (!(x < 1)) return 1;
    int sign; /* lgamma_r: lgamma writes a global */
    double front = exp(lgamma_r(a + b, &sign) - lgamma_r(a, &sign) - lgamma_r(b, &sign) + a * log(x) + b * log1p(-x));
    if (x < (a + 1) / (a + b + 2)) return front * beta_fraction(a, b, x) / a;
    return 1 - front * beta_fraction(b, a, 1 - x) / b;
}

double kv_student_cdf(double t, double df)
{
    double tail = 0.5 * beta_cdf(df / 2, 0.5, df / (df + t * t));
    return t < 0 ? tail : 1 - tail;
}

double kv_student_quantile(double p, double df)
{
    double hi = 1, lo, q = p < 0.5 ? 1 - p : p;
    if (q == 0.5) return 0;
    while (kv_student_cdf(hi, df) < q && hi < 1e300) hi *= 2;
    lo = hi > 1 ? hi / 2 : 0;
    for (int i = 0; i < 200 && lo < hi; i++) {
        double mid = lo + (hi - lo) / 2;
        if (mid == lo || mid == hi) break;
        *(kv_student_cdf(mid, df) < q ? &lo : &hi) = mid;
    }
    return p < 0.5 ? -hi : hi;
}

double kv_binomial_cdf(uint64_t k, uint64_t n)
{
    if (k >= n) return 1;
    return 1 - beta_cdf((double)k + 1, (double)(n - k), 0.5);
}

/* P(T > t) of a noncentral t = (Z + shift) / S, S^2 = chi^2 / df: the normal tail averaged over S (Simpson's rule over
 * ten standard deviations of S; the integrand is smooth). */
static double noncentral_above(double t, double df, double shift)
{
    int sign;
    int steps = df < 3 ? 10000 : 2000; /* t is large there, and the normal tail steep near s = 0 */
    double sd = 1 / sqrt(2 * df), lo = fmax(0, 1 - 10 * sd), hi = 1 + 10 * sd, h = (hi - lo) / steps, sum = 0;
    double constant = log(2) + df / 2 * log(df / 2) - lgamma_r(df / 2, &sign);
    for (int i = 0; i <= steps; i++) {
        double s = lo + h * i, w = i == 0 || i == steps ? 1 : i % 2 ? 4 : 2;
        double density = s > 0 ? exp(constant + (df - 1) * log(s) - df * s * s / 2) : df == 1 ? exp(constant) : 0;
        sum += w * density * kv_normal_cdf(shift - t * s);
    }
    return fmin(1, sum * h / 3);
}

double kv_t_power(double effect, double n, double alpha, int sides)
{
    double df = n - 1, shift = effect * sqrt(n), t = kv_student_quantile(1 - alpha / sides, df);
    double above = noncentral_above(t, df, shift);
    return sides == 2 ? above + noncentral_above(t, df, -shift) : above;
}

uint32_t kv_t_power_n(double effect, double power, double alpha, int sides)
{
    uint32_t lo = 1, hi = 2;
    if (sides == 2) effect = fabs(effect);
    if (!(effect > 0)) return 0;
    while (kv_t_power(effect, hi, alpha, sides) < power) {
        if (hi > KV_POWER_N_MAX / 2) return 0;
        lo = hi, hi *= 2;
    }
    while (hi - lo > 1) {
        uint32_t mid = lo + (hi - lo) / 2;
        *(kv_t_power(effect, mid, alpha, sides) < power ? &lo : &hi) = mid;
    }
    return hi;
}
