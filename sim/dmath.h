/* dmath.h - natural logarithm, exponential and power in double from +, -, *, / alone, so that budgets that hang on a
 * truncation are the same on every machine (libm's differ in the last bit). Relative error below 1e-15 * (1 + |result's
 * exponent|). */
#ifndef KV_DMATH_H
#define KV_DMATH_H

#include <math.h>

#include "kernels/math.h"

/* ln x for normal x > 0 */
static inline double kv_log(double x)
{
    return kv_logd(x);
}

/* exp x for x < 700, 0 below -700: 2^n e^r with |r| <= ln2/2, Taylor to the 14th power. */
static inline double kv_exp(double x)
{
    static const double INV[] = {0,       1,       1.0 / 2,  1.0 / 3,  1.0 / 4,  1.0 / 5,  1.0 / 6, 1.0 / 7,
                                 1.0 / 8, 1.0 / 9, 1.0 / 10, 1.0 / 11, 1.0 / 12, 1.0 / 13, 1.0 / 14};
    if (x < -700) return 0;
    double n = floor(x * 1.4426950408889634 + 0.5);
    double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10, s = 1;
    for (int k = 14; k >= 1; k--) s = 1 + r * INV[k] * s;
    return ldexp(s, (int)n);
}

static inline double kv_pow(double x, double y)
{
    return y == 1 ? x : kv_exp(y * kv_log(x));
}

#endif
