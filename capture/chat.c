/* chat.c - chat templates by name (chat.h). */
#include "capture/chat.h"

#include <stdlib.h>

#include "traces/cli.h"

#define CHATML(system)                                                                                                 \
    "<|im_start|>system\n" system "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"

/* Marks stand in a template from which line breaks, written or real, have been taken, with ' for every ". The first row
 * that fits counts. */
static const kv_chat table[] = {
    {"smollm2", CHATML("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), KV_BOS_NEVER, false,
     "<|im_start|>", "assistant named SmolLM, trained by Hugging Face<|im_end|>", "/think"},
    {"qwen2.5", CHATML("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), KV_BOS_NEVER, false,
     "<|im_start|>", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", NULL},
    {"qwen2", CHATML("You are a helpful assistant."), KV_BOS_NEVER, false, "<|im_start|>",
     "<|im_start|>systemYou are a helpful assistant.<|im_end|>", NULL},
    {"phi4", "<|im_start|>user<|im_sep|>", "<|im_end|><|im_start|>assistant<|im_sep|>", KV_BOS_NEVER, false,
     "<|im_sep|>", "<|im_sep|>", NULL},
    {"chatml", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", KV_BOS_NEVER, false, "<|im_start|>",
     "<|im_start|>", "You are a"},
    {"llama3", "<|start_header_id|>user<|end_header_id|>\n\n",
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", KV_BOS_ALWAYS, true, "<|start_header_id|>",
     "<|start_header_id|>", "Today Date"},
    {"llama3.1",
     "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul "
     "2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", KV_BOS_ALWAYS, true, "<|start_header_id|>",
     "Cutting Knowledge Date: December 2023", "strftime_now"},
    {"llama2", "[INST] ", " [/INST]", KV_BOS_ALWAYS, true, NULL, "'[INST] ' + content.strip() + ' [/INST]'", NULL},
    {"mistral", "[INST] ", " [/INST]", KV_BOS_ALWAYS, false, NULL, "{{ '[INST] ' + message['content'] + ' [/INST]' }}",
     NULL},
    {"mistral-v3", "[INST] ", "[/INST]", KV_BOS_ALWAYS, false, "[INST]", "'[INST] ' + message['content'] + '[/INST]'",
     NULL},
    {"mistral-tekken", "[INST]", "[/INST]", KV_BOS_ALWAYS, false, "[INST]", "'[INST]' + message['content'] + '[/INST]'",
     "[SYSTEM_PROMPT]"},
    {"gemma", "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", KV_BOS_ALWAYS, true, "<start_of_turn>",
     "<start_of_turn>", NULL},
    {"phi3", "<|user|>\n", "<|end|>\n<|assistant|>\n", KV_BOS_FILE, false, "<|end|>", "<|end|>", "<|im_"},
    {"zephyr", "<|user|>\n", "</s>\n<|assistant|>\n", KV_BOS_NEVER, false, "</s>",
     "'<|user|>' + message['content'] + eos_token", NULL},
    {"olmo2", "<|user|>\n", "\n<|assistant|>\n", KV_BOS_ALWAYS, false, NULL,
     "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>' + "
     "message['content'] + '' }}",
     NULL},
    {"granite", "<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
     KV_BOS_NEVER, false, "<|start_of_role|>", "<|start_of_role|>", "Knowledge Cutoff"},
    {"deepseek", "<\xef\xbd\x9cUser\xef\xbd\x9c>",
     "<\xef\xbd\x9c"
     "Assistant\xef\xbd\x9c>",
     KV_BOS_ALWAYS, false, "<\xef\xbd\x9cUser\xef\xbd\x9c>", "'<\xef\xbd\x9cUser\xef\xbd\x9c>' + message['content']",
     "<\xef\xbd\x9c"
     "Assistant\xef\xbd\x9c><think>"},
};
enum { N_CHAT = sizeof table / sizeof *table };

static kv_status no_memory(kv_error *err)
{
    return kv_fail(err, KV_ENOMEM, "out of memory for a chat template");
}

/* Without line breaks and with one kind of quote: templates differ in these where they mean the same. */
static char *simplify(const char *s)
{
    char *out = malloc(strlen(s) + 1);
    size_t n = 0;
    for (; out && *s; s++) {
        if (*s == '\n' || (*s == '\\' && s[1] == 'n')) {
            s += *s == '\\';
            continue;
        }
        out[n++] = *s == '"' ? '\'' : *s;
    }
    if (out) out[n] = 0;
    return out;
}

static kv_status find_auto(const kv_tokenizer *t, const kv_chat **out, kv_error *err)
{
    const char *given = kv_tokenizer_template(t);
    if (!given)
        return kv_fail(err, KV_EMISUSE, "--chat auto: the model's files hold no chat template; name the family");
    char *s = simplify(given);
    if (!s) return no_memory(err);
    for (size_t i = 0; i < N_CHAT && !*out; i++)
        if (strstr(s, table[i].mark) && !(table[i].not &&strstr(s, table[i].not ))) *out = &table[i];
    free(s);
    if (*out) return KV_OK;
    return kv_fail(err, KV_EMISUSE,
                   "--chat auto: the model's chat template is none of the families known here; write the turns out in "
                   "the text and use --special");
}

kv_status kv_chat_find(const char *name, const kv_tokenizer *t, const kv_chat **out, kv_error *err)
{
    static const kv_tokenize_options special = {.special = true};
    kv_tokens k;
    kv_status st = KV_OK;
    *out = NULL;
    if (!strcmp(name, "auto")) {
        if ((st = find_auto(t, out, err))) return st;
    } else {
        const char *names[N_CHAT];
        char all[400] = "auto";
        for (size_t i = 0; i < N_CHAT; i++) {
            names[i] = table[i].name;
            snprintf(all + strlen(all), sizeof all - strlen(all), " %s", names[i]);
            if (!strcmp(name, names[i])) *out = &table[i];
        }
        const char *near = kv_nearest(name, names, N_CHAT);
        if (!*out)
            return kv_fail(err, KV_EMISUSE,
                           "--chat '%s' is not known%s%s%s; known: %s (others: write the turns out in the text and use "
                           "--special)",
                           name, near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "", all);
    }
    const char *token = (*out)->token;
    if (!token) return KV_OK;
    /* a vocabulary without it cuts it into pieces, or cannot spell it at all */
    if (kv_tokenize_with(t, token, strlen(token), &special, &k, NULL) || k.n != 1)
        st = kv_fail(err, KV_EMISUSE, "--chat %s: the model's vocabulary has no token '%s', so it is of another family",
                     (*out)->name, token);
    kv_tokens_free(&k);
    if (st) *out = NULL;
    return st;
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* A byte of the prompt in the new text; what was trimmed off falls on the nearest byte that is left. */
static size_t moved(size_t at, size_t a, size_t b, size_t open)
{
    return open + ((at < a ? a : at > b ? b : at) - a);
}

kv_status kv_chat_wrap(const kv_chat *c, const kv_prompt *p, kv_prompt *out, size_t *literal_at, size_t *literal_n,
                       kv_error *err)
{
    size_t end = p->prompt_end == SIZE_MAX ? p->n_text : p->prompt_end, a = 0, b = end;
    size_t open = strlen(c->open), close = strlen(c->close), rest = p->n_text - end;
    kv_status st;
    *out = *p;
    out->text = NULL, out->evidence = NULL;
    if (c->trim) {
        while (a < b && is_space(p->text[a])) a++;
        while (b > a && is_space(p->text[b - 1])) b--;
    }
    size_t n = open + (b - a) + close + rest;
    if ((st = kv_array(&out->text, n + 1, 1, err)) ||
        (st = kv_array(&out->evidence, p->n_evidence, sizeof *out->evidence, err))) {
        kv_chat_unwrap(out);
        return st;
    }
    memcpy(out->text, c->open, open);
    memcpy(out->text + open, p->text + a, b - a);
    memcpy(out->text + open + (b - a), c->close, close);
    memcpy(out->text + open + (b - a) + close, p->text + end, rest);
    out->n_text = n;
    out->prompt_end = n - rest;
    if (p->context_end != SIZE_MAX) out->context_end = moved(p->context_end, a, b, open);
    for (uint32_t i = 0; i < p->n_evidence; i++) {
        const kv_span *e = &p->evidence[i];
        /* in the continuation, what lies behind the prompt only moves on */
        size_t from = e->start >= end ? out->prompt_end + (e->start - end) : moved(e->start, a, b, open);
        size_t to = e->end > end ? out->prompt_end + (e->end - end) : moved(e->end, a, b, open);
        out->evidence[i] = (kv_span){(uint32_t)from, (uint32_t)to};
    }
    if (p->question.end)
        out->question =
            (kv_span){(uint32_t)moved(p->question.start, a, b, open), (uint32_t)moved(p->question.end, a, b, open)};
    *literal_at = open, *literal_n = b - a;
    return KV_OK;
}

void kv_chat_unwrap(kv_prompt *p)
{
    free(p->text), free(p->evidence);
    p->text = NULL, p->evidence = NULL;
}
