/* job.h - what one capture runs: tokens, where the prompt and the context end, and the text behind them. */
#ifndef KV_JOB_H
#define KV_JOB_H

#include "capture/chat.h"
#include "capture/model.h"
#include "capture/prompts.h"

#define KV_JOB_DECODE_ALL UINT32_MAX /* the whole continuation, or nothing where there is none */

typedef struct {
    char *id, *category; /* category may be NULL */
    uint32_t *token;     /* [n_token]; prompt, then what is decoded: the last n_greedy are chosen by the model */
    uint32_t *offset;    /* [n_token - n_greedy + 1] byte offset of each token in the text, then its end */
    uint32_t n_token, n_prompt, n_context, n_greedy; /* n_context 0 = not known */
    char *text;
    size_t n_text;
    kv_span *evidence;
    uint32_t n_evidence;
    kv_span question;
    char *extra;      /* JSON object with the prompt's other fields, or NULL */
    const char *chat; /* name of the chat template, or NULL */
} kv_job;

typedef struct {
    bool special;        /* parse special tokens in the text */
    uint32_t decode;     /* tokens of the continuation to use, or to generate where there is none */
    const kv_chat *chat; /* the prompt is a user's turn, or NULL; its own tokens are parsed in any case */
} kv_job_options;

/* The prompt must be loaded. KV_EFORMAT, KV_EMISUSE name the prompt. */
kv_status kv_job_from_prompt(const kv_model *m, const kv_prompt *p, const kv_job_options *o, kv_job *out,
                             kv_error *err);
/* A file with a JSON array of ids, used as given, or random:N[:SEED], ids at random; the first n_prompt are the prompt
 * (0 = all). */
kv_status kv_job_from_tokens(const kv_model *m, const char *path, uint32_t n_prompt, uint32_t decode, kv_job *out,
                             kv_error *err);
/* When the greedy tokens are known: their bytes behind the text, their offsets behind the others. */
kv_status kv_job_add_text(const kv_model *m, kv_job *j, kv_error *err);
void kv_job_free(kv_job *j);

#endif
