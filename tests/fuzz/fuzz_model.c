/* fuzz_model.c - targets gguf, safetensors and tokenizer: what comes with a model. */
#include <stdlib.h>
#include <unistd.h>

#include "capture/chat.h"
#include "capture/engine.h"
#include "capture/gguf.h"
#include "capture/tokenizer.h"
#include "tests/fuzz/fuzz.h"

/* Some of everything that pre-tokenisers tell apart; ends in the middle of nothing special. */
static const char TEXT[] =
    "Hello  world\n\n\tIt's 12345 caf\xc3\xa9 \xe4\xbd\xa0\xe5\xa5\xbd <s> <|im_start|> \xe2\x96\x81";

static void tokenize(const kv_tokenizer *t, const char *text, size_t n, uint32_t n_vocab)
{
    kv_tokens k;
    size_t len;
    for (int special = 0; special < 2; special++) {
        if (!kv_tokenize(t, text, n, special, true, &k, NULL)) {
            for (size_t i = 0; i < k.n; i++) {
                fuzz_must(k.id[i] < n_vocab, "token ids are below the vocabulary's size");
                fuzz_must(k.offset[i] <= k.offset[i + 1], "offsets ascend");
                kv_token_bytes(t, k.id[i], &len);
            }
            fuzz_must(k.offset[k.n] == n, "the last offset is the length of the text");
        }
        kv_tokens_free(&k);
    }
    const kv_chat *chat;
    kv_chat_find("auto", t, &chat, NULL);
    kv_tokenizer_describe(t), kv_tokenizer_eos(t);
}

void fuzz_model(const char *path)
{
    kv_model *m = NULL;
    kv_engine *e = NULL;
    kv_error err;
    if (kv_model_open(path, KV_WEIGHTS_F32, 1, &m, &err)) {
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
        return;
    }
    if (m->tok) tokenize(m->tok, TEXT, sizeof TEXT - 1, m->desc.n_vocab);
    const kv_engine_options o = {.dtype = KV_F32, .threads = 1, .capacity = 3};
    const uint32_t token[3] = {0, m->desc.n_vocab - 1, m->desc.n_vocab / 2};
    if (m->desc.n_params < 1 << 20 && !kv_engine_open_cpu(m, &o, &e, &err)) {
        float *logits = malloc(m->desc.n_vocab * sizeof *logits);
        fuzz_must(logits, "a row of logits fits into memory");
        kv_engine_run(e, token, 3, &(kv_engine_hook){0}, logits, &err);
        kv_engine_close(e);
        free(logits);
    }
    kv_model_close(m);
}

int fuzz_gguf(const uint8_t *p, size_t n)
{
    kv_gguf *g = NULL;
    kv_slice *s = NULL;
    if (!kv_gguf_open_mem(p, n, "fuzz", &g, NULL)) {
        uint32_t count;
        const kv_gguf_tensor *t = kv_gguf_tensors(g, &count);
        for (uint32_t i = 0; i < count; i++) {
            uint8_t *row = malloc(t[i].row_bytes);
            if (row) kv_gguf_read_rows(g, &t[i], t[i].n_row - 1, 1, row, NULL);
            free(row);
        }
        const kv_gguf_value *v = kv_gguf_find(g, "tokenizer.ggml.tokens");
        if (v && !kv_gguf_strings(g, v, &s, NULL))
            for (uint32_t i = 0; i < v->n; i++) kv_show(s[i].p, s[i].n);
        free(s);
        kv_gguf_close(g);
    }
    fuzz_model(fuzz_file(p, n));
    return 0;
}

/* config.json 0 model.safetensors.index.json (may be empty) 0 a safetensors file */
int fuzz_safetensors(const uint8_t *p, size_t n)
{
    fuzz_part config = fuzz_cut(&p, &n), index = fuzz_cut(&p, &n);
    fuzz_put("config.json", config.p, config.n);
    if (index.n)
        fuzz_put("model.safetensors.index.json", index.p, index.n);
    else
        unlink(fuzz_name("model.safetensors.index.json"));
    fuzz_put(index.n ? "model-00001-of-00001.safetensors" : "model.safetensors", p, n);
    fuzz_model(fuzz_folder());
    return 0;
}

/* tokenizer.json 0 tokenizer_config.json 0 a text */
int fuzz_tokenizer(const uint8_t *p, size_t n)
{
    fuzz_part json = fuzz_cut(&p, &n), config = fuzz_cut(&p, &n);
    enum { N_VOCAB = 300 };
    kv_tokenizer *t = NULL;
    kv_error err;
    fuzz_put("tokenizer.json", json.p, json.n);
    fuzz_put("tokenizer_config.json", config.p, config.n);
    if (kv_tokenizer_open_hf(fuzz_folder(), N_VOCAB, &t, &err)) {
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
        return 0;
    }
    tokenize(t, TEXT, sizeof TEXT - 1, N_VOCAB);
    tokenize(t, (const char *)p, n, N_VOCAB);
    kv_tokenizer_close(t);
    return 0;
}
