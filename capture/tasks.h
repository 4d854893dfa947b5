/* tasks.h - prompts made to order, whose answer and evidence are known: needles, needles among needles, chains of
 * variables (the recipes of RULER, arXiv 2404.06654, with sentences of our own). */
#ifndef KV_TASKS_H
#define KV_TASKS_H

#include "traces/base.h"

typedef struct {
    const char *kind; /* needle: one key and value; multikey: two of eight keys are asked for; vartrack: which variables
                         hold a value, over chains of assignments */
    uint32_t count;   /* prompts */
    uint32_t words;   /* of filler text, about 1.3 tokens each */
    double depth;     /* where the first needle stands, percent of the text; < 0: spread over the prompts */
    uint32_t digits;  /* of a value */
    uint64_t seed;    /* equal requests give equal bytes */
} kv_task_request;

/* A prompt set (prompts.h) with the texts in it; each prompt also says question, answer, `answers` (the strings an
 * answer must hold) and how it was made. KV_EMISUSE names what is out of range. Written whole or not at all. */
kv_status kv_tasks_write(const kv_task_request *q, const char *path, kv_error *err);

#endif
