/* test_tokenizer_hf.c - tokenizer.json: the golden tokenizers against what Hugging Face's library makes of the same
 * texts, rules one by one, and files that must be refused. */
#include <jansson.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "capture/pretok.h"
#include "capture/tokenizer.h"
#include "tests/check.h"

#define GOLDEN "tests/golden/tokenizers/"

static char dir[] = "/tmp/kv_test_XXXXXX";

/* ------------------------------------------------------------------------------------------------ goldens */

/* Ids as expected, offsets ascending; `exact`: what the tokens stand for, one behind the other, is the text. */
static bool vector_ok(const kv_tokenizer *t, const json_t *v, bool exact)
{
    static char text[1 << 16];
    const json_t *ids = json_object_get(v, "ids");
    size_t n = kv_unhex(json_string_value(json_object_get(v, "hex")), text);
    kv_tokens k;
    kv_error err = {""};
    if (kv_tokenize(t, text, n, true, false, &k, &err)) return printf("%s\n", err.msg), false;
    bool ok = k.n == json_array_size(ids) && k.offset[k.n] == n;
    for (size_t i = 0; i < k.n && ok; i++) {
        size_t len;
        const char *s = kv_token_bytes(t, k.id[i], &len);
        ok = k.id[i] == (uint32_t)json_integer_value(json_array_get(ids, i)) && k.offset[i] <= k.offset[i + 1];
        if (ok && exact) ok = k.offset[i] + len <= n && !memcmp(text + k.offset[i], s, len);
    }
    kv_tokens_free(&k);
    return ok;
}

static void check_golden(const char *name, bool exact, bool bos)
{
    char path[256];
    kv_tokenizer *t;
    kv_error err = {""};
    static char line[1 << 18];
    size_t n = 0, bad = 0;
    snprintf(path, sizeof path, GOLDEN "%s", name);
    kv_status st = kv_tokenizer_open_hf(path, 480, &t, &err);
    CHECKF(!st, "%s: %s", name, err.msg);
    snprintf(path, sizeof path, GOLDEN "%s/vectors.jsonl", name);
    FILE *f = fopen(path, "r");
    CHECKF(f != NULL, "%s", path);
    if (st || !f) return;
    for (; fgets(line, sizeof line, f); n++) {
        json_t *v = json_loads(line, JSON_ALLOW_NUL, NULL);
        if (!vector_ok(t, v, exact)) bad++, printf("%s: %s", path, line);
        json_decref(v);
    }
    fclose(f);
    CHECKF(!bad && n >= 80, "%s: %zu of %zu differ", name, bad, n);
    kv_tokens k;
    CHECK(!kv_tokenize(t, "", 0, false, true, &k, &err) && k.n == bos);
    kv_tokens_free(&k);
    kv_tokenizer_close(t);
}

/* ------------------------------------------------------------------------------------------------ small files */

static void write_in_dir(const char *name, const char *text, size_t n)
{
    char path[96];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    if (!f || fwrite(text, 1, n, f) != n || fclose(f)) abort();
}

static void remove_in_dir(const char *name)
{
    char path[96];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    remove(path);
}

#define BYTES                                                                                                          \
    "\"a\":0,\"b\":1,\"c\":2,\"\xc4\xa0\":3,\"ab\":4,\"\xc4\xa0"                                                       \
    "a\":5,\"<e>\":6,\"1\":7,\"2\":8"

/* A byte-level file of eight tokens; every part can be replaced. */
typedef struct {
    const char *added, *norm, *pre, *post, *vocab, *merges, *model;
} parts;

static void write_parts(const parts *p)
{
    static char text[1 << 16];
#define OR(part, usual) (p->part ? p->part : usual)
    int n = snprintf(text, sizeof text,
                     "{\"added_tokens\":%s,\"normalizer\":%s,\"pre_tokenizer\":%s,\"post_processor\":%s,"
                     "\"model\":{\"type\":\"BPE\",%s\"vocab\":{%s},\"merges\":%s}}",
                     OR(added, "[{\"id\":6,\"content\":\"<e>\",\"special\":true}]"), OR(norm, "null"),
                     OR(pre, "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}"), OR(post, "null"), OR(model, ""),
                     OR(vocab, BYTES), OR(merges, "[\"a b\",[\"\xc4\xa0\",\"a\"]]"));
    write_in_dir("tokenizer.json", text, (size_t)n);
}

static kv_status open_parts(const parts *p, kv_tokenizer **t, kv_error *err)
{
    write_parts(p);
    *err = (kv_error){""};
    return kv_tokenizer_open_hf(dir, 10, t, err);
}

static bool gives(const kv_tokenizer *t, const char *text, bool special, bool bos, const char *want)
{
    kv_tokens k;
    kv_error err = {""};
    char got[256] = "";
    if (kv_tokenize(t, text, strlen(text), special, bos, &k, &err)) snprintf(got, sizeof got, "%s", err.msg);
    for (size_t i = 0, at = 0; i < k.n; i++, at = strlen(got))
        snprintf(got + at, sizeof got - at, "%s%u@%u", at ? " " : "", k.id[i], k.offset[i]);
    kv_tokens_free(&k);
    if (strcmp(got, want)) printf("text '%s': got '%s', want '%s'\n", text, got, want);
    return !strcmp(got, want);
}

static void test_rules(void)
{
    kv_tokenizer *t;
    kv_error err;
    CHECK(!open_parts(&(parts){0}, &t, &err));
    CHECK(gives(t, "ab a", false, true, "4@0 5@2"));
    CHECK(gives(t, "a<e>b", true, false, "0@0 6@1 1@4"));
    CHECK(gives(t, "a<e>", false, false, "cannot tokenize byte 0x3c at 1: the vocabulary has no token for it"));
    CHECK(!strcmp(kv_tokenizer_describe(t), "byte-level BPE, tokenizer.json, 10 tokens"));
    CHECK(kv_tokenizer_eos(t) == UINT32_MAX && !kv_tokenizer_template(t));
    kv_tokenizer_close(t);

    /* of equal pairs the last one counts; ranks, not ids, decide */
    CHECK(!open_parts(&(parts){.vocab = BYTES ",\"bc\":9", .merges = "[\"a b\",\"b c\",\"a b\"]"}, &t, &err));
    CHECK(gives(t, "abc", false, false, "0@0 9@1"));
    kv_tokenizer_close(t);

    /* BOS by the post-processor; the configuration has the last word; two kinds of naming a token */
    parts bos = {.post =
                     "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<e>\"}},{\"Sequence\":"
                     "{\"id\":\"A\"}}],\"special_tokens\":{\"<e>\":{\"ids\":[6]}}}"};
    CHECK(!open_parts(&bos, &t, &err));
    CHECK(gives(t, "b", false, true, "6@0 1@0") && gives(t, "b", false, false, "1@0"));
    kv_tokenizer_close(t);
    static const char config[] = "{\"model_max_length\":1000000000000000019884624838656,\"add_bos_token\":false,\"eos_"
                                 "token\":{\"content\":\"<e>\"},\"bos_token\":\"ab\","
                                 "\"chat_template\":[{\"name\":\"rag\",\"template\":\"no\"},{\"name\":\"default\","
                                 "\"template\":\"yes\"}]}";
    write_in_dir("tokenizer_config.json", config, strlen(config));
    CHECK(!open_parts(&bos, &t, &err));
    CHECK(gives(t, "b", false, true, "1@0") && kv_tokenizer_eos(t) == 6);
    CHECK(kv_tokenizer_template(t) && !strcmp(kv_tokenizer_template(t), "yes"));
    kv_tokenize_options always = {.special = true, .bos = KV_BOS_ALWAYS, .literal_at = 3, .literal_n = 3};
    kv_tokens k;
    CHECK(kv_tokenize_with(t, "<e><e>", 6, &always, &k, &err) == KV_EFORMAT); /* the second one is text: no byte '<' */
    CHECK(!kv_tokenize_with(t, "<e>bab", 6, &always, &k, &err) && k.n == 4 && k.id[0] == 4 && k.id[1] == 6);
    kv_tokens_free(&k);
    kv_tokenizer_close(t);
    write_in_dir("chat_template.jinja", "file", 4);
    CHECK(!open_parts(&bos, &t, &err) && !strcmp(kv_tokenizer_template(t), "file"));
    kv_tokenizer_close(t);
    remove_in_dir("chat_template.jinja"), remove_in_dir("tokenizer_config.json");

    /* a token beyond the embedding is not used */
    CHECK(!open_parts(&(parts){.added = "[{\"id\":99,\"content\":\"ab\",\"special\":false}]"}, &t, &err));
    CHECK(gives(t, "ab", true, false, "4@0"));
    kv_tokenizer_close(t);
}

/* ------------------------------------------------------------------------------------------------ refused */

/* unusable: the model can still be run on ids. */
static void refused(const parts *p, bool unusable, const char *says)
{
    kv_tokenizer *t = NULL;
    kv_error err;
    kv_status st = open_parts(p, &t, &err);
    CHECKF(st == (unusable ? KV_EUNSUPPORTED : KV_EFORMAT) && !t, "'%s': status %d, %s", says, st, err.msg);
    CHECKF(strstr(err.msg, says) && strstr(err.msg, "tokenizer.json"), "%s, not '%s'", err.msg, says);
    kv_tokenizer_close(t);
}

#define SPLIT(regex)                                                                                                   \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex                    \
    "\"},\"behavior\":\"Isolated\"},{\"type\":\"ByteLevel\",\"use_regex\":false,\"add_prefix_space\":false}]}"

static void test_refused(void)
{
    refused(&(parts){.norm = "{\"type\":\"Lowercase\"}"}, true, "normaliser 'Lowercase'");
    refused(&(parts){.norm = "{\"type\":\"NFKC\"}"}, true, "normaliser 'NFKC'");
    refused(&(parts){.norm = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Strip\"}]}"}, true,
            "'Strip'");
    refused(&(parts){.norm = "7"}, false, "normalizers");
    refused(&(parts){.pre = "{\"type\":\"BertPreTokenizer\"}"}, true, "pre-tokeniser 'BertPreTokenizer'");
    refused(&(parts){.pre = "null"}, true, "neither byte-level");
    refused(&(parts){.post = "{\"type\":\"RobertaProcessing\"}"}, true, "post-processor 'RobertaProcessing'");
    refused(&(parts){.model = "\"dropout\":0.1,"}, true, "random");
    refused(&(parts){.model = "\"end_of_word_suffix\":\"</w>\","}, true, "end_of_word_suffix");
    refused(&(parts){.model = "\"ignore_merges\":3,"}, false, "ignore_merges");
    refused(&(parts){.vocab = BYTES ",\"zz\":10"}, false, "'zz' is not one of 0 to 9");
    refused(&(parts){.vocab = BYTES ",\"zz\":-1"}, false, "'zz' is not one of 0 to 9");
    refused(&(parts){.vocab = BYTES ",\"zz\":1.5"}, false, "'zz' is not one of 0 to 9");
    refused(&(parts){.vocab = BYTES ",\"zz\":4294967297"}, false, "'zz' is not one of 0 to 9");
    refused(&(parts){.vocab = BYTES ",\"zz\":4"}, false, "'ab' and 'zz' have the same id 4");
    refused(&(parts){.vocab = BYTES ",\"ab\":9"}, false, "duplicate");
    refused(&(parts){.merges = "[\"a z\"]"}, false, "'a' + 'z'");
    refused(&(parts){.merges = "[\"b a\"]"}, false, "'b' + 'a'");
    refused(&(parts){.merges = "[\"ab\"]"}, false, "entry 0 is not a pair");
    refused(&(parts){.merges = "[\"a b c\"]"}, false, "entry 0 is not a pair");
    refused(&(parts){.merges = "[\"a b\",[\"a\"]]"}, false, "entry 1 is not a pair");
    refused(&(parts){.merges = "{}"}, false, "model.merges");
    refused(&(parts){.added = "[{\"id\":4,\"content\":\"<e>\"}]"}, false, "'<e>' has the id 4 of 'ab'");
    refused(&(parts){.added = "[{\"id\":9,\"content\":\"ab\"}]"}, false, "two ids");
    refused(&(parts){.added = "[{\"id\":9}]"}, false, "entry 0");
    refused(&(parts){.added = "[{\"id\":9,\"content\":\"x\",\"single_word\":true}]"}, true, "'x' is a single word");
    refused(&(parts){.pre = SPLIT("a|(?<x>b)")}, true, "a group");
    refused(&(parts){.pre = SPLIT("\\\\w+")}, true, "an escape at '\\w+'");
    refused(&(parts){.pre = SPLIT("\\\\p{Han}+")}, true, "a property");
    refused(&(parts){.pre = SPLIT("^a")}, true, "an anchor");
    refused(&(parts){.pre = SPLIT("[a&&b]")}, true, "a nested class");
    refused(&(parts){.pre = SPLIT("[a[b]]")}, true, "a nested class");
    refused(&(parts){.pre = SPLIT("a{2}+")}, true, "a count");
    refused(&(parts){.pre = SPLIT("[ab")}, true, "an open class");
    refused(&(parts){.pre = SPLIT("(a")}, true, "PCRE2 error");
    refused(&(parts){.pre = SPLIT("a*")}, true, "can match nothing");
    refused(&(parts){.pre = SPLIT("(*LIMIT_MATCH=1)a")}, true, "a verb");
    kv_tokenizer *t = NULL;
    kv_error err = {""};
    CHECK(kv_tokenizer_open_hf("/nonexistent", 10, &t, &err) == KV_EMISSING && !t && strstr(err.msg, "tokenizer.json"));
    write_parts(&(parts){0});
    CHECK(kv_tokenizer_open_hf(dir, 0, &t, &err) == KV_EUNSUPPORTED && !t);
    CHECK(kv_tokenizer_open_hf(dir, 7, &t, &err) == KV_EFORMAT && !t && strstr(err.msg, "'1' is not one of 0 to 6"));
    write_in_dir("tokenizer_config.json", "[1", 2);
    CHECK(kv_tokenizer_open_hf(dir, 10, &t, &err) == KV_EFORMAT && !t && strstr(err.msg, "tokenizer_config.json"));
    remove_in_dir("tokenizer_config.json");
}

/* A file cut off anywhere, and one with a byte changed anywhere, opens or is refused; it never does anything else. */
static void test_damaged(void)
{
    uint8_t *text;
    size_t n, refusals = 0;
    kv_error err;
    CHECK(!kv_read_file(GOLDEN "llama2/tokenizer.json", 1 << 20, &text, &n, &err));
    for (size_t at = 0; at < n; at += 61) {
        kv_tokenizer *t = NULL;
        write_in_dir("tokenizer.json", (char *)text, at);
        CHECK(kv_tokenizer_open_hf(dir, 480, &t, &err) == KV_EFORMAT && !t);
        uint8_t was = text[at];
        text[at] = (uint8_t)(was ^ (1u << at % 8));
        write_in_dir("tokenizer.json", (char *)text, n);
        text[at] = was;
        refusals += kv_tokenizer_open_hf(dir, 480, &t, &err) != KV_OK;
        kv_tokenizer_close(t);
    }
    CHECK(refusals > n / 61 / 4);
    free(text);
}

/* Megabytes of nothing: refused before they are parsed, or when they are too deep. */
static void test_huge(void)
{
    size_t n = 20 << 20;
    char *text = malloc(n);
    kv_tokenizer *t = NULL;
    kv_error err = {""};
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    memset(text, '[', n);
    write_in_dir("tokenizer.json", text, n);
    CHECK(kv_tokenizer_open_hf(dir, 10, &t, &err) == KV_EFORMAT && strstr(err.msg, "values"));
    for (size_t i = 0; i < n; i++) text[i] = i % 2 ? ',' : '1';
    memcpy(text, "{\"a\":[", 6);
    write_in_dir("tokenizer.json", text, n);
    CHECK(kv_tokenizer_open_hf(dir, 10, &t, &err) == KV_EFORMAT && strstr(err.msg, "values"));
    memset(text, '[', 1 << 20);
    write_in_dir("tokenizer.json", text, 1 << 20);
    CHECK(kv_tokenizer_open_hf(dir, 10, &t, &err) == KV_EFORMAT && strstr(err.msg, "depth"));
    getrusage(RUSAGE_SELF, &after);
    CHECKF(after.ru_maxrss - before.ru_maxrss < 128 << 10, "%ld KiB", after.ru_maxrss - before.ru_maxrss);
    free(text);
}

/* An expression of the file that backtracks without end stops with an error. */
static void test_backtracking(void)
{
    kv_tokenizer *t;
    kv_error err;
    CHECK(!open_parts(&(parts){.pre = SPLIT("(?:a+)+[bc]")}, &t, &err));
    static char text[1 << 12];
    memset(text, 'a', sizeof text);
    kv_tokens k;
    CHECK(kv_tokenize(t, text, sizeof text, false, false, &k, &err) == KV_EFORMAT && strstr(err.msg, "PCRE2 error"));
    kv_tokenizer_close(t);
    /* and a sound one does not mind a mebibyte without a break */
    size_t n = 1 << 20;
    char *many = malloc(n);
    memset(many, 'a', n);
    CHECK(!open_parts(&(parts){.norm = "{\"type\":\"NFC\"}",
                               .pre = SPLIT("[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\s+(?!\\\\S)|\\\\s+")},
                      &t, &err));
    CHECK(!kv_tokenize(t, many, n, false, false, &k, &err) && k.n == n);
    kv_tokens_free(&k);
    /* marks without end on one letter are no text */
    for (size_t i = 0; i + 1 < n; i += 2) memcpy(many + i, i % 4 ? "\xcc\x81" : "\xcc\xa3", 2);
    CHECK(kv_tokenize(t, many, n, false, false, &k, &err) == KV_EUNSUPPORTED && strstr(err.msg, "combin"));
    kv_tokenizer_close(t);
    free(many);
}

int main(void)
{
    if (!mkdtemp(dir)) return perror(dir), 1;
    check_golden("gpt2", false, false);
    check_golden("smollm", false, false);
    check_golden("llama3", false, true);
    check_golden("qwen2", false, false);
    check_golden("o200k", false, false);
    check_golden("cuts", true, false);
    check_golden("llama2", false, true);
    check_golden("gemma", false, false);
    check_golden("metaspace", false, false);
    check_golden("metaspace_cut", false, false);
    test_rules();
    test_refused();
    test_damaged();
    test_huge();
    test_backtracking();
    remove_in_dir("tokenizer.json");
    rmdir(dir);
    return kv_tally();
}
