/* fuzz.h - what somebody else's file can reach, one function of bytes a target: libFuzzer calls it (`make fuzz
 * FUZZ=name`, fuzzer.c), and test_fuzz.c runs the saved inputs through it in every build.
 *
 * A target hands the bytes to the code that programs hand a file to, looks at everything that came out, and frees it.
 * It returns 0; a crash, a leak, undefined behaviour, too much memory or time, or a broken promise (fuzz_must) is a
 * finding. Where one input needs several files they stand in it one behind the other, a zero byte between. */
#ifndef KV_FUZZ_H
#define KV_FUZZ_H

#include "traces/base.h"

#define FUZZ_TARGETS(X)                                                                                                \
    X(gguf) X(safetensors) X(tokenizer) X(trace) X(chunks) X(npy) X(prompts) X(specs) X(plugin) X(merge)
#define FUZZ_DECLARE(name) int fuzz_##name(const uint8_t *p, size_t n);
FUZZ_TARGETS(FUZZ_DECLARE)

/* Ends the program when a promise is broken. */
void fuzz_must(bool kept, const char *promise);
/* The path of a file with these bytes, valid until the next call: it has no place in any folder. */
const char *fuzz_file(const uint8_t *p, size_t n);
/* A folder of this process, removed at its end. NAME in it: fuzz_put writes it, fuzz_name gives its path (of the last
 * four), both replace what stood there. */
const char *fuzz_folder(void);
const char *fuzz_name(const char *name);
const char *fuzz_put(const char *name, const uint8_t *p, size_t n);
/* The bytes up to the next zero byte, which is skipped; *p and *n move on. */
typedef struct {
    const uint8_t *p;
    size_t n;
} fuzz_part;
fuzz_part fuzz_cut(const uint8_t **p, size_t *n);
/* The same as a string; free() it. */
char *fuzz_text(const uint8_t **p, size_t *n);
/* Every stream of a trace, a deep check and a replay (trace.c). */
struct kv_trace;
void fuzz_read_trace(struct kv_trace *t);
/* Open a model, tokenise, run a few tokens (model.c). */
void fuzz_model(const char *path);

#endif
