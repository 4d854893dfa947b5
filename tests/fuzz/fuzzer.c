/* fuzzer.c - libFuzzer's entry for one target; TARGET is fuzz_NAME (Makefile: fuzz). */
#include "tests/fuzz/fuzz.h"

#ifndef TARGET
#define TARGET fuzz_gguf
#endif

int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n)
{
    return TARGET(p, n);
}
