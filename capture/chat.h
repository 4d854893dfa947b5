/* chat.h - chat templates of the common families, by name: the prompt becomes the user's turn, and the model's turn is
 * open behind it. Templates are Jinja programs and are not run; what the families' programs make of one user message is
 * written here. Conversations of several turns can be written out in the text and given with --special. */
#ifndef KV_CHAT_H
#define KV_CHAT_H

#include "capture/prompts.h"
#include "capture/tokenizer.h"

typedef struct {
    const char *name;
    const char *open, *close; /* in front of the user's text and behind it */
    kv_bos bos;
    bool trim;               /* white space around the user's text goes */
    const char *token;       /* a token that the vocabulary must have, or NULL */
    const char *mark, *not ; /* in the template of a model of this family; in none of them */
} kv_chat;

/* The family of that name, or with "auto" the one whose template the model's files hold. KV_EMISUSE with the names when
 * there is none, or when the vocabulary lacks the family's tokens. */
kv_status kv_chat_find(const char *name, const kv_tokenizer *t, const kv_chat **out, kv_error *err);
/* p (loaded) with the template around its prompt: text, ends and spans moved along. The user's text is at literal_at ..
 * +literal_n-1. Release with kv_chat_unwrap. */
kv_status kv_chat_wrap(const kv_chat *c, const kv_prompt *p, kv_prompt *out, size_t *literal_at, size_t *literal_n,
                       kv_error *err);
void kv_chat_unwrap(kv_prompt *p);

#endif
