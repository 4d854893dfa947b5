/* test_tokenizer.c - byte-level BPE and BPE by score on vocabularies made here, against a naive twin, and on the
 * vectors of the golden files. */
#include <jansson.h>
#include <unistd.h>

#include "kernels/parallel.h"
#include "tests/check.h"
#include "tests/make_gguf.h"

#define SMOLLM  "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
#define GOLDEN  "tests/golden/models/"
#define SHARED  "../shared/golden/models/gguf/"
#define QWEN2   "qwen2_256.Q4_K_M.gguf"
#define E_ACUTE "\xc3\xa9"

/* Is `text` turned into these ids at these offsets? want: "id@offset id@offset ...". */
static bool gives(const kv_tokenizer *t, const char *text, size_t n, bool special, bool bos, const char *want)
{
    kv_tokens k;
    kv_error err = {""};
    char got[1024] = "";
    kv_status st = kv_tokenize(t, text, n, special, bos, &k, &err);
    if (st)
        snprintf(got, sizeof got, "%s", err.msg);
    else
        for (size_t i = 0, at = 0; i < k.n; i++, at = strlen(got))
            snprintf(got + at, sizeof got - at, "%s%u@%u", at ? " " : "", k.id[i], k.offset[i]);
    bool ok = !st && !strcmp(got, want) && k.offset[k.n] == n;
    if (!ok) printf("text '%s': got '%s', want '%s'\n", text, got, want);
    kv_tokens_free(&k);
    return ok;
}

#define GIVES(t, text, want)         CHECK(gives(t, text, strlen(text), false, true, want))
#define GIVES_SPECIAL(t, text, want) CHECK(gives(t, text, strlen(text), true, true, want))

static kv_model *made(const recipe *r)
{
    kv_model *m;
    kv_error err = {""};
    kv_status st = open_recipe(r, &m, &err);
    CHECKF(!st && m->tok, "%s", st ? err.msg : m->no_tok);
    if (st || !m->tok) exit(kv_tally());
    return m;
}

/* Bytes are ids 0..255, ab 256, abc 257, Ga 258, <x> 259 and <xx> 260 control, ab! 261 user-defined. */
static void test_byte_level(void)
{
    recipe r = plain;
    kv_model *m = made(&r);
    const kv_tokenizer *t = m->tok;
    CHECK(!strcmp(kv_tokenizer_describe(t), "byte-level BPE, pre gpt-2, 262 tokens") && kv_tokenizer_eos(t) == KV_NONE);
    GIVES(t, "", "");
    GIVES(t, "abc", "257@0");
    GIVES(t, "aab abab", "97@0 256@1 32@3 256@4 256@6");
    GIVES(t, " a", "258@0");
    GIVES(t, "xab!ab!ab", "120@0 261@1 261@4 256@7");
    GIVES(t, "<xx>", "60@0 120@1 120@2 62@3");
    GIVES_SPECIAL(t, "<xx><x>a<x", "260@0 259@4 97@7 60@8 120@9");
    GIVES(t, E_ACUTE, "195@0 169@1");
    CHECK(gives(t, "a\0ab", 4, false, true, "97@0 0@1 256@2"));
    size_t n;
    const char *s = kv_token_bytes(t, 258, &n);
    CHECK(n == 2 && !memcmp(s, " a", 2));
    s = kv_token_bytes(t, 173, &n);
    CHECK(n == 1 && *s == (char)173);
    s = kv_token_bytes(t, 259, &n);
    CHECK(n == 3 && !memcmp(s, "<x>", 3));
    CHECK(!kv_token_bytes(t, 262, &n) && n == 0);
    kv_model_close(m);

    r.add_bos = 1;
    m = made(&r);
    GIVES(m->tok, "ab", "1@0 256@0");
    CHECK(gives(m->tok, "ab", 2, false, false, "256@0"));
    kv_model_close(m);
}

static void test_invalid_utf8(void)
{
    static const struct {
        const char *s;
        int at;
    } bad[] = {{"a\xff\x62", 1},        {"\xc3", 0},         {"x\xe4\xbd", 1},      {"\xf0\x9f\x98", 0},
               {"\xc1\xbf", 0},         {"\xe0\x9f\xbf", 0}, {"ok\xed\xa0\x80", 2}, {"\xf4\x90\x80\x80", 0},
               {"\xf0\x8f\xbf\xbf", 0}, {"\x80", 0},         {"\xc3(", 0}};
    recipe r = plain;
    kv_model *m = made(&r);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kv_tokens k;
        kv_error err = {""};
        char says[32];
        snprintf(says, sizeof says, "at byte %d", bad[i].at);
        CHECK(kv_tokenize(m->tok, bad[i].s, strlen(bad[i].s), false, true, &k, &err) == KV_EFORMAT && !k.n);
        CHECKF(strstr(err.msg, says), "%s", err.msg);
    }
    kv_model_close(m);
}

/* Ids 0..255 bytes; then 12 256, 123 257, GG 258 (two spaces), ll 259, 'l 260, 'll 261, 45 262, xyz 263 (no merge). */
static void test_pre_tokenisers(void)
{
    static char store[256][8];
    static const char *token[512];
    static uint32_t type[512];
    static const char *merge[] = {"1 2", "12 3", "\xc4\xa0 \xc4\xa0", "L L", "' L", "' LL", "4 5", NULL};
    recipe r = plain;
    uint32_t n = default_tokens(store, token, type) - 6;
    static const char *const more[] = {"12", "123", "\xc4\xa0\xc4\xa0", "LL", "'L", "'LL", "45", "xyz"};
    for (int i = 0; i < 8; i++) type[n] = 1, token[n++] = more[i];
    r.token = token, r.n_token = n, r.merge = merge, r.type = type;

    kv_model *m = made(&r); /* gpt-2: runs of digits, "\s+(?!\S)", contractions in lower case only */
    GIVES(m->tok, "12345", "257@0 262@3");
    GIVES(m->tok, "a  b", "97@0 32@1 32@2 98@3");
    GIVES(m->tok, "a   1", "97@0 258@1 32@3 49@4");
    GIVES(m->tok, "a  ", "97@0 258@1");
    GIVES(m->tok, "a'LL", "97@0 39@1 259@2");
    GIVES(m->tok, "xyz", "120@0 121@1 122@2");
    kv_model_close(m);

    r.pre = "smollm"; /* digits alone, and the run of spaces before one ends where the digit begins */
    m = made(&r);
    GIVES(m->tok, "12345", "49@0 50@1 51@2 52@3 53@4");
    GIVES(m->tok, "a  1", "97@0 258@1 49@3");
    GIVES(m->tok, "a  b", "97@0 32@1 32@2 98@3");
    kv_model_close(m);

    r.pre = "llama-bpe"; /* digits by three, contractions in any case, whole pieces first, BOS */
    m = made(&r);
    GIVES(m->tok, "12345", "1@0 257@0 262@3");
    GIVES(m->tok, "1245", "1@0 256@0 52@2 53@3");
    GIVES(m->tok, "a'LL", "1@0 97@0 261@1");
    GIVES(m->tok, "xyz", "1@0 263@0");
    GIVES(m->tok, "a\n\n", "1@0 97@0 10@1 10@2");
    kv_model_close(m);
    r.add_bos = 0;
    m = made(&r);
    GIVES(m->tok, "xyz", "263@0");
    kv_model_close(m);
    r.add_bos = -1;

    r.pre = "qwen2";
    m = made(&r);
    GIVES(m->tok, "12'LL", "49@0 50@1 261@2");
    kv_model_close(m);

    r.pre = NULL; /* nothing named: llama.cpp's default, said so */
    m = made(&r);
    CHECK(strstr(kv_tokenizer_describe(m->tok), "pre default (a guess"));
    GIVES(m->tok, "012345", "48@0 256@1 51@3 262@4");
    GIVES(m->tok, "a++12", "97@0 43@1 43@2 256@3");
    kv_model_close(m);
}

static void test_by_score(void)
{
    /* the score of token i is -i: earlier ones merge first */
    static const char *token[] = {"<unk>",
                                  "<s>",
                                  "</s>",
                                  "\xe2\x96\x81",
                                  "aa",
                                  "ab",
                                  "\xe2\x96\x81\x61\x62",
                                  "\xe2\x96\x81\x61",
                                  "<0xC3>",
                                  "<0xA9>",
                                  "a",
                                  "b",
                                  "[m]",
                                  "\xe2\x96\x81\xe2\x96\x81"};
    static const uint32_t type[] = {2, 3, 3, 1, 1, 1, 1, 1, 6, 6, 1, 1, 4, 1};
    recipe r = plain;
    r.kind = "llama", r.pre = "default", r.token = token, r.type = type, r.n_token = 14;
    kv_model *m = made(&r);
    const kv_tokenizer *t = m->tok;
    CHECK(!strcmp(kv_tokenizer_describe(t), "SentencePiece-style BPE by score, 14 tokens") && kv_tokenizer_eos(t) == 2);
    GIVES(t, "", "1@0");
    GIVES(t, "ab", "1@0 6@0");
    GIVES(t, "aaa", "1@0 3@0 4@0 10@2"); /* leftmost of two equal pairs; the artificial space begins where it stands */
    GIVES(t, "b ab", "1@0 3@0 11@0 6@1");
    GIVES(t, "a" E_ACUTE, "1@0 7@0 8@1 9@2"); /* bytes of what is no token */
    GIVES(t, "az", "1@0 7@0 0@1");            /* not even those: unknown */
    GIVES(t, "a[m]a", "1@0 7@0 12@1 7@4");    /* user-defined; a space is put behind it again */
    GIVES(t, "  a", "1@0 13@0 7@1");
    GIVES_SPECIAL(t, "<s>a", "1@0 1@0 7@3");
    size_t n;
    const char *s = kv_token_bytes(t, 6, &n);
    CHECK(n == 3 && !memcmp(s, " ab", 3));
    s = kv_token_bytes(t, 8, &n);
    CHECK(n == 1 && *s == (char)0xc3);
    kv_model_close(m);
}

/* The tokenizer of a GGUF file, whatever the model in it. */
static kv_status open_vocabulary(const char *path, kv_tokenizer **t, kv_error *err)
{
    kv_gguf *g = NULL;
    kv_vocab v;
    kv_status st = kv_gguf_open(path, &g, err);
    const kv_gguf_value *tokens = st ? NULL : kv_gguf_find(g, "tokenizer.ggml.tokens");
    *t = NULL;
    if (!st) st = kv_vocab_read(g, tokens ? tokens->n : 0, &v, err);
    if (!st) st = kv_tokenizer_create(&v, t, err);
    kv_gguf_close(g);
    return st;
}

/* phi3: what the file does not say about its special tokens. */
static void test_phi3(void)
{
    static const char *token[] = {"<unk>", "<s>", "</s>", "\xe2\x96\x81", "a", "<|user|>", "<0x0A>", "<|endoftext|>"};
    static const uint32_t type[] = {2, 3, 3, 1, 1, 3, 6, 3};
    recipe r = plain;
    kv_model *m = NULL;
    kv_tokenizer *t;
    kv_error err = {""};
    char path[64];
    r.kind = "llama", r.pre = "default", r.token = token, r.type = type, r.n_token = 8;
    for (int phi = 0; phi < 2; phi++) {
        r.arch = phi ? "phi3" : "llama";
        open_recipe(&r, &m, &err); /* its tensors are llama's; the vocabulary is what counts here */
        kv_model_close(m), m = NULL;
        snprintf(path, sizeof path, "%s/made.gguf", dir);
        CHECKF(!open_vocabulary(path, &t, &err), "%s", err.msg);
        GIVES_SPECIAL(t, "<|user|>\n a<s> a",
                      phi ? "1@0 5@0 3@10 4@10 1@11 3@14 3@14 4@15" : "1@0 5@0 3@8 6@8 3@9 4@10 1@11 3@14 3@14 4@15");
        kv_tokenizer_close(t);
    }
}

/* ------------------------------------------------------------------------------------------------ naive twin */

enum { TWIN_MERGES = 40, TWIN_LONGEST = 15 };
typedef struct {
    char s[40];
} word;
static word twin_part[TWIN_MERGES][2], twin_token[TWIN_MERGES], twin_merge[TWIN_MERGES];

static word join(word a, const char *between, word b)
{
    word r = {""};
    size_t n = strlen(a.s), k = strlen(between);
    memcpy(r.s, a.s, n), memcpy(r.s + n, between, k), memcpy(r.s + n + k, b.s, strlen(b.s) + 1);
    return r;
}

/* Merge the lowest-ranked adjacent pair, leftmost first, until there is none; the text is letters only. */
static size_t twin(const char *text, word *out)
{
    size_t n = strlen(text);
    for (size_t i = 0; i < n; i++) out[i] = (word){{text[i], 0}};
    for (;;) {
        int best = TWIN_MERGES;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++)
            for (int r = 0; r < best; r++)
                if (!strcmp(out[i].s, twin_part[r][0].s) && !strcmp(out[i + 1].s, twin_part[r][1].s)) best = r, at = i;
        if (best == TWIN_MERGES) return n;
        out[at] = join(out[at], "", out[at + 1]);
        memmove(&out[at + 1], &out[at + 2], (n - at - 2) * sizeof *out);
        n--;
    }
}

/* Merges of letters and of what earlier merges made, all results different. */
static void make_twin_merges(kv_rng *rng)
{
    for (int k = 0; k < TWIN_MERGES;) {
        for (int side = 0; side < 2; side++) {
            uint64_t pick = kv_rng_next(rng) % (uint64_t)(3 + k);
            twin_part[k][side] = pick < 3 ? (word){{(char)('a' + pick), 0}} : twin_token[pick - 3];
        }
        twin_token[k] = join(twin_part[k][0], "", twin_part[k][1]);
        twin_merge[k] = join(twin_part[k][0], " ", twin_part[k][1]);
        bool again = strlen(twin_token[k].s) > TWIN_LONGEST;
        for (int o = 0; o < k; o++) again |= !strcmp(twin_token[o].s, twin_token[k].s);
        k += !again;
    }
}

static void test_against_twin(void)
{
    static char store[256][8];
    static const char *token[512], *merge[TWIN_MERGES + 1];
    static uint32_t type[512];
    kv_rng rng = {11};
    for (int round = 0; round < 8; round++) {
        recipe r = plain;
        uint32_t n = default_tokens(store, token, type) - 6, first = n;
        make_twin_merges(&rng);
        for (int k = 0; k < TWIN_MERGES; k++) merge[k] = twin_merge[k].s, type[n] = 1, token[n++] = twin_token[k].s;
        r.token = token, r.n_token = n, r.merge = merge, r.type = type;
        kv_model *m = made(&r);
        int wrong = 0;
        for (int i = 0; i < 200; i++) {
            char text[80];
            word want[80];
            size_t len = kv_rng_next(&rng) % 79;
            for (size_t c = 0; c < len; c++) text[c] = (char)('a' + kv_rng_next(&rng) % 3);
            text[len] = 0;
            kv_tokens k;
            if (kv_tokenize(m->tok, text, len, false, false, &k, NULL)) wrong++;
            size_t n_want = twin(text, want);
            wrong += k.n != n_want;
            for (size_t c = 0; c < k.n && c < n_want; c++)
                wrong += strcmp(k.id[c] < first ? store[k.id[c]] : twin_token[k.id[c] - first].s, want[c].s) != 0;
            kv_tokens_free(&k);
        }
        CHECKF(!wrong, "%d differences in vocabulary %d", wrong, round);
        kv_model_close(m);
    }
}

/* One piece of a mebibyte: a quadratic merge would take hours. */
static void test_long_piece(void)
{
    recipe r = plain;
    kv_model *m = made(&r);
    size_t n = 1 << 20;
    char *text = malloc(n);
    for (size_t i = 0; i < n; i++) text[i] = "ab"[i % 2];
    kv_tokens k;
    CHECK(!kv_tokenize(m->tok, text, n, false, true, &k, NULL) && k.n == n / 2 && k.id[n / 4] == 256);
    kv_tokens_free(&k);
    memset(text, ' ', n);
    CHECK(!kv_tokenize(m->tok, text, n, false, true, &k, NULL) && k.n == n);
    kv_tokens_free(&k);
    free(text);
    kv_model_close(m);
}

/* ------------------------------------------------------------------------------------------------ goldens */

/* Ids as expected; what the tokens stand for, one behind the other, is the text (byte-level); offsets say so too. */
static bool vector_ok(const kv_tokenizer *t, const char *text, size_t n, bool special, const json_t *ids, bool exact)
{
    kv_tokens k;
    kv_error err = {""};
    if (kv_tokenize(t, text, n, special, false, &k, &err)) {
        printf("%s\n", err.msg);
        return false;
    }
    bool ok = k.n == json_array_size(ids) && k.offset[k.n] == n;
    for (size_t i = 0; i < k.n && ok; i++) {
        size_t len;
        const char *s = kv_token_bytes(t, k.id[i], &len);
        ok = k.id[i] == (uint32_t)json_integer_value(json_array_get(ids, i)) && k.offset[i] <= k.offset[i + 1];
        if (ok && exact) ok = k.offset[i + 1] - k.offset[i] == len && !memcmp(text + k.offset[i], s, len);
    }
    kv_tokens_free(&k);
    return ok;
}

static void check_vectors(const char *model, const char *vectors, size_t at_least, bool exact)
{
    kv_tokenizer *t;
    kv_error err = {""};
    kv_status st = open_vocabulary(model, &t, &err);
    FILE *f = fopen(vectors, "r");
    CHECKF(!st && f, "%s %s", err.msg, vectors);
    if (st || !f) return;
    static char line[1 << 20], text[1 << 19];
    size_t n_ok = 0, n_bad = 0, n_refused = 0;
    while (fgets(line, sizeof line, f)) {
        json_t *v = json_loads(line, JSON_ALLOW_NUL, NULL), *ids = json_object_get(v, "ids");
        const char *hex = json_string_value(json_object_get(v, "hex"));
        size_t n = hex ? kv_unhex(hex, text) : 0;
        bool special = json_is_true(json_object_get(v, "parse_special"));
        if (!json_is_array(ids)) { /* invalid UTF-8 */
            kv_tokens k;
            n_refused += kv_tokenize(t, text, n, special, false, &k, NULL) == KV_EFORMAT;
        } else if (vector_ok(t, text, n, special, ids, exact))
            n_ok++;
        else
            n_bad++, printf("vector %s of %s\n", hex ? hex : "?", vectors);
        json_decref(v);
    }
    fclose(f);
    CHECKF(!n_bad && n_ok >= at_least, "%s: %zu wrong, %zu right, %zu refused", vectors, n_bad, n_ok, n_refused);
    kv_tokenizer_close(t);
}

static void test_chat(const char *model)
{
    kv_model *m;
    json_t *chats = json_load_file(GOLDEN "smollm2/chat.json", 0, NULL), *c;
    CHECK(chats && !kv_model_open(model, KV_WEIGHTS_NONE, 1, &m, NULL));
    if (!chats) return;
    size_t i;
    json_array_foreach(chats, i, c)
    {
        const char *text = json_string_value(json_object_get(c, "rendered"));
        CHECK(text && vector_ok(m->tok, text, strlen(text), true, json_object_get(c, "ids"), true));
    }
    CHECK(i > 0 && kv_tokenizer_eos(m->tok) == 2);
    json_decref(chats);
    kv_model_close(m);
}

typedef struct {
    const kv_tokenizer *t;
    const char *text;
    kv_tokens out[8];
} shared_job;

static void tokenize_one(void *ctx, size_t i)
{
    shared_job *j = ctx;
    if (kv_tokenize(j->t, j->text, strlen(j->text), false, true, &j->out[i], NULL)) j->out[i].n = 0;
}

static void test_threads(void)
{
    recipe r = plain;
    kv_model *m = made(&r);
    char text[4096];
    for (size_t i = 0; i < sizeof text - 1; i++) text[i] = "ab abc 12"[i * 7 % 9];
    text[sizeof text - 1] = 0;
    shared_job j = {.t = m->tok, .text = text};
    kv_parallel(8, 4, tokenize_one, &j);
    for (int i = 0; i < 8; i++) {
        CHECK(j.out[i].n && j.out[i].n == j.out[0].n && !memcmp(j.out[i].id, j.out[0].id, 4 * j.out[i].n));
        if (i) kv_tokens_free(&j.out[i]);
    }
    kv_tokens_free(&j.out[0]);
    kv_model_close(m);
}

int main(void)
{
    if (!mkdtemp(dir)) return perror(dir), 1;
    test_byte_level();
    test_invalid_utf8();
    test_pre_tokenisers();
    test_by_score();
    test_phi3();
    test_against_twin();
    test_long_piece();
    test_threads();
    check_vectors(GOLDEN "gguf/llama256/llama256.Q2_K.gguf", GOLDEN "gguf/llama256/tokenizer_vectors.jsonl", 111,
                  false);
    if (access(SHARED, R_OK)) {
        SKIP("no " SHARED);
    } else {
        check_vectors(SHARED "gemma2_256/gemma2_256.Q6_K.gguf", SHARED "gemma2_256/tokenizer_vectors.jsonl", 111,
                      false);
        check_vectors(SHARED "qwen2_256/" QWEN2, SHARED "qwen2_256/tokenizer_vectors.jsonl", 111, true);
    }
    if (access(SMOLLM, R_OK))
        SKIP("no " SMOLLM);
    else
        check_vectors(SMOLLM, GOLDEN "smollm2/tokenizer_vectors.jsonl", 133, true), test_chat(SMOLLM);
    char path[64];
    snprintf(path, sizeof path, "%s/made.gguf", dir);
    remove(path), rmdir(dir);
    return kv_tally();
}
