/* prompts.h - a prompt set: JSON lines that name texts, where the prompt ends in them, and what the answer needs.
 *
 * Fields: id, and file (relative to the set) or text. Optional: category, sha256 and bytes of the file, prompt_end_byte
 * (what follows is the continuation), context_end_byte (where the question begins), evidence [[start, end), ...] and
 * question_span in bytes of the text. Everything else is kept as it is and goes into the trace. */
#ifndef KV_PROMPTS_H
#define KV_PROMPTS_H

#include "traces/base.h"
#include "traces/trace.h"

typedef struct {
    char *id, *category; /* category may be NULL; id is fit for a file name */
    char *path, *sha256; /* of the text file; path is NULL when the text stands in the set */
    char *text;          /* NULL until loaded */
    size_t n_text;
    size_t prompt_end;  /* bytes; SIZE_MAX = the whole text is prompt */
    size_t context_end; /* bytes; SIZE_MAX = not known */
    size_t bytes;       /* size the set claims; SIZE_MAX = nothing claimed */
    kv_span *evidence;
    uint32_t n_evidence;
    kv_span question; /* {0,0} = none */
    char *extra;      /* the other fields as a JSON object, keys sorted, or NULL */
} kv_prompt;

typedef struct {
    kv_prompt *v;
    size_t n;
} kv_prompts;

/* Reads the set, not the texts. KV_EFORMAT names file, line and field; ids are unique. */
kv_status kv_prompts_read(const char *path, kv_prompts *out, kv_error *err);
void kv_prompts_free(kv_prompts *p);
/* Reads the text, checks its hash and that every span lies inside. Unloading a prompt that is not loaded is allowed. */
kv_status kv_prompt_load(kv_prompt *p, kv_error *err);
void kv_prompt_unload(kv_prompt *p);

#endif
