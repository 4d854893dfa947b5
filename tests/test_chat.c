/* test_chat.c - chat templates by name: what becomes of a prompt's text and spans, which family a model's own template
 * is taken for, and what is refused. */
#include <stdlib.h>
#include <unistd.h>

#include "capture/chat.h"
#include "tests/check.h"

static char dir[] = "/tmp/kv_test_XXXXXX";

/* A vocabulary with the special tokens of every family. */
static const char vocabulary[] =
    "{\"added_tokens\":[{\"id\":1,\"content\":\"<|im_start|>\",\"special\":true},{\"id\":2,\"content\":\"<|im_sep|>\","
    "\"special\":true},{\"id\":3,\"content\":\"<|start_header_id|>\",\"special\":true},{\"id\":4,\"content\":\"<start_"
    "of_"
    "turn>\",\"special\":true},{\"id\":5,\"content\":\"<|end|>\",\"special\":true},{\"id\":6,\"content\":\"</s>\","
    "\"special\":true},{\"id\":7,\"content\":\"<|start_of_role|>\",\"special\":true},{\"id\":8,\"content\":\"[INST]\","
    "\"special\":true},{\"id\":9,\"content\":\"<\xef\xbd\x9cUser\xef\xbd\x9c>\",\"special\":true}],\"pre_tokenizer\":{"
    "\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}";

static void write_file(const char *name, const char *text)
{
    char path[96];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f)) abort();
}

/* The family that a template is taken for, "" when it is refused. */
static const char *taken_for(const char *jinja)
{
    const kv_chat *c = NULL;
    kv_tokenizer *t;
    kv_error err = {""};
    write_file("chat_template.jinja", jinja);
    if (kv_tokenizer_open_hf(dir, 10, &t, &err)) return printf("%s\n", err.msg), "broken";
    kv_status st = kv_chat_find("auto", t, &c, &err);
    CHECK(st ? st == KV_EMISUSE && strstr(err.msg, "--special") : c != NULL);
    kv_tokenizer_close(t);
    return st ? "" : c->name;
}

#define TAKEN(jinja, name) CHECKF(!strcmp(taken_for(jinja), name), "%s: %s", name, taken_for(jinja))

/* The telling lines of the templates that models carry. */
static void test_families(void)
{
    TAKEN(
        "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant "
        "named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}",
        "smollm2");
    TAKEN("{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
          "assistant.<|im_end|>\\n' }}",
          "qwen2.5");
    TAKEN("{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}", "qwen2");
    TAKEN("{{- '<|im_start|>' + message.role + '\\n' }} You are provided with function signatures", "chatml");
    TAKEN("{{ '<|im_start|>system\nYou are a pirate<|im_end|>' }}", "");
    TAKEN("{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}", "phi4");
    TAKEN("{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
          "trim %}",
          "llama3");
    TAKEN("<|start_header_id|>system {{- \"Cutting Knowledge Date: December 2023\\n\" }}{{- \"Today Date: \" + "
          "date_string }}",
          "llama3.1");
    TAKEN("<|start_header_id|> Cutting Knowledge Date: December 2023 Today Date: {{ strftime_now('%d %b %Y') }}", "");
    TAKEN("{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}", "llama2");
    TAKEN("{{ '[INST] ' + message['content'] + ' [/INST]' }}", "mistral");
    TAKEN("{{- \"[INST] \" + message[\"content\"] + \"[/INST]\" }}", "mistral-v3");
    TAKEN("{{- \"[INST]\" + message[\"content\"] + \"[/INST]\" }}", "mistral-tekken");
    TAKEN("{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}", "gemma");
    TAKEN("{{'<|user|>' + '\\n' + message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}", "phi3");
    TAKEN("{{ '<|user|>\\n' + message['content'] + eos_token }}", "zephyr");
    TAKEN("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + "
          "message['content'] + '\\n' }}",
          "olmo2");
    TAKEN("{{- '<|start_of_role|>user<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}", "granite");
    TAKEN("{{'<\xef\xbd\x9cUser\xef\xbd\x9c>' + message['content']}}", "deepseek");
    TAKEN("{{ 'GPT4 Correct User: ' }}", "");
}

static const kv_chat *named(const kv_tokenizer *t, const char *name)
{
    const kv_chat *c;
    kv_error err = {""};
    CHECKF(!kv_chat_find(name, t, &c, &err), "%s", err.msg);
    return c;
}

static void test_wrap(const kv_tokenizer *t)
{
    char text[] = " \nMoby Dick?  Ahab.";
    kv_span spans[] = {{2, 6}, {0, 1}, {14, 18}};
    kv_prompt p = {.text = text, .n_text = 19, .prompt_end = 14, .context_end = 7, .evidence = spans, .n_evidence = 3};
    kv_prompt w;
    size_t at, n;
    kv_error err;
    p.question = (kv_span){7, 12};

    /* nothing is trimmed: everything moves by what stands in front, the continuation by the rest too */
    CHECK(!kv_chat_wrap(named(t, "phi3"), &p, &w, &at, &n, &err));
    CHECKF(!strcmp(w.text, "<|user|>\n \nMoby Dick?  <|end|>\n<|assistant|>\nAhab."), "%s", w.text);
    CHECK(w.n_text == strlen(w.text) && !strcmp(w.text + w.prompt_end, "Ahab.") && at == 9 && n == 14);
    CHECK(!memcmp(w.text + w.evidence[0].start, "Moby", 4) && w.evidence[0].end - w.evidence[0].start == 4);
    CHECK(!strncmp(w.text + w.evidence[2].start, "Ahab", 4) && w.evidence[2].end == w.n_text - 1);
    CHECK(!strncmp(w.text + w.question.start, "Dick?", 5) && w.question.end - w.question.start == 5);
    CHECK(w.context_end == 16);
    kv_chat_unwrap(&w);

    /* trimmed: spans in what is gone are empty */
    CHECK(!kv_chat_wrap(named(t, "gemma"), &p, &w, &at, &n, &err));
    CHECKF(!strcmp(w.text, "<start_of_turn>user\nMoby Dick?<end_of_turn>\n<start_of_turn>model\nAhab."), "%s", w.text);
    CHECK(!strncmp(w.text + at, "Moby Dick?<", 11) && n == 10);
    CHECK(!memcmp(w.text + w.evidence[0].start, "Moby", 4) && w.evidence[1].start == w.evidence[1].end);
    CHECK(!strncmp(w.text + w.question.start, "Dick?", 5));
    kv_chat_unwrap(&w);

    /* the whole text is prompt; nothing known of a context */
    p.prompt_end = p.context_end = SIZE_MAX, p.n_evidence = 0, p.question = (kv_span){0, 0};
    CHECK(!kv_chat_wrap(named(t, "mistral-v3"), &p, &w, &at, &n, &err));
    CHECKF(!strcmp(w.text, "[INST]  \nMoby Dick?  Ahab.[/INST]") && w.prompt_end == w.n_text, "%s", w.text);
    CHECK(w.context_end == SIZE_MAX && !w.question.end);
    kv_chat_unwrap(&w);
}

static void test_refused(void)
{
    const kv_chat *c;
    kv_tokenizer *t;
    kv_error err = {""};
    char path[96];
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    remove(path);
    CHECK(!kv_tokenizer_open_hf(dir, 10, &t, &err));
    CHECK(kv_chat_find("auto", t, &c, &err) == KV_EMISUSE && !c && strstr(err.msg, "no chat template"));
    CHECK(kv_chat_find("gema", t, &c, &err) == KV_EMISUSE && !c && strstr(err.msg, "did you mean 'gemma'"));
    CHECK(strstr(err.msg, "smollm2 qwen2.5") && strstr(err.msg, "deepseek"));
    kv_tokenizer_close(t);
    CHECK(!kv_tokenizer_open_hf(dir, 4, &t, &err)); /* the tokens beyond are not the model's */
    CHECK(kv_chat_find("gemma", t, &c, &err) == KV_EMISUSE && strstr(err.msg, "another family"));
    CHECK(!c && !kv_chat_find("llama3", t, &c, &err) && c);
    kv_tokenizer_close(t);
}

int main(void)
{
    kv_tokenizer *t;
    kv_error err = {""};
    char path[96];
    if (!mkdtemp(dir)) return perror(dir), 1;
    write_file("tokenizer.json", vocabulary);
    test_families();
    CHECKF(!kv_tokenizer_open_hf(dir, 10, &t, &err), "%s", err.msg);
    test_wrap(t);
    kv_tokenizer_close(t);
    test_refused();
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    remove(path), rmdir(dir);
    return kv_tally();
}
