/* isa.h - one source, compiled for the baseline and for AVX2 + FMA, chosen when the program runs.
 *
 * A kernel is written once as a KV_INLINE body; two wrappers give it to the compiler, one of them marked KV_V3, and the
 * public function asks kv_has_v3(). No ifunc is involved (target_clones needs one), so it also works where the C
 * library has none and before a sanitizer is ready. KV_NO_V3 leaves the second one out (every machine that is not
 * x86-64 does). */
#ifndef KV_ISA_H
#define KV_ISA_H

#include <stdbool.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(KV_NO_V3)
#define KV_HAVE_V3 1
#define KV_V3      __attribute__((target("avx2,fma")))
static inline bool kv_has_v3(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
#define KV_HAVE_V3 0
#define KV_V3
static inline bool kv_has_v3(void)
{
    return false;
}
#endif

#endif
