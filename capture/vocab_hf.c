/* vocab_hf.c - the tokenizer of a Hugging Face folder: tokenizer.json into a token table.
 *
 * Understood: models of the type BPE, byte-level or with spaces as U+2581 (byte fallback); the normalisers NFC, Prepend
 * and Replace (of a space), the pre-tokenisers Split, Digits, ByteLevel and Metaspace, and sequences of them; added
 * tokens with their flags; BOS from the post-processor or from tokenizer_config.json. Anything else is KV_EUNSUPPORTED
 * by name: half a tokeniser gives other tokens than the model was trained on. */
#include <stdlib.h>
#include <unistd.h>

#include "capture/vocab.h"
#include "traces/json.h"

#define FILE_MAX     (64u << 20) /* bytes */
#define CONFIG_MAX   (16u << 20) /* of tokenizer_config.json, chat_template.jinja */
#define VALUES_MAX   (8u << 20)  /* JSON values */
#define SEQUENCE_MAX 16

typedef struct {
    kv_vocab v;
    kv_slice *s;          /* [v.n] strings by id, in the JSON tree */
    bool *plain;          /* [v.n] an added token */
    bool *model;          /* [v.n] in model.vocab */
    kv_strmap by_content; /* all of them */
    bool byte_level;
    kv_error *err;
} loader;

#define BAD(l, status, ...) kv_fail((l)->err, status, __VA_ARGS__)

static kv_status unknown(const loader *l, const char *what, const json_t *o)
{
    const char *type = json_string_value(json_object_get(o, "type"));
    return BAD(l, KV_EUNSUPPORTED, "%s '%.60s' is not supported", what, type ? type : "?");
}

static bool is_type(const json_t *o, const char *type)
{
    const char *s = json_string_value(json_object_get(o, "type"));
    return s && !strcmp(s, type);
}

static kv_slice string_of(const json_t *s)
{
    return (kv_slice){json_string_value(s), json_string_length(s)};
}

static bool is_text(const json_t *s, const char *want)
{
    return json_is_string(s) && json_string_length(s) == strlen(want) && !strcmp(json_string_value(s), want);
}

/* A flag; absent or null is `absent`. */
static kv_status flag(const loader *l, const json_t *o, const char *key, bool absent, bool *out)
{
    const json_t *f = json_object_get(o, key);
    *out = f && !json_is_null(f) ? json_is_true(f) : absent;
    if (f && !json_is_null(f) && !json_is_boolean(f)) return BAD(l, KV_EFORMAT, "'%s' is not true or false", key);
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ parsing */

static kv_status parse_file(const char *path, size_t max, size_t flags, json_t **out, kv_error *err)
{
    uint8_t *text = NULL;
    size_t n;
    json_error_t why;
    *out = NULL;
    kv_status st = kv_read_regular(path, max, &text, &n, err);
    if (st) return st;
    if (!(*out = kv_json_load(text, n, flags | JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, VALUES_MAX, &why)))
        st = kv_fail(err, KV_EFORMAT, "'%s' is not valid: %s (line %d)", path, why.text, why.line);
    else if (!json_is_object(*out))
        st = kv_fail(err, KV_EFORMAT, "'%s' is not a JSON object", path);
    free(text);
    if (st) json_decref(*out), *out = NULL;
    return st;
}

/* ------------------------------------------------------------------------------------------------ tokens */

static kv_status read_tokens(loader *l, json_t *vocab)
{
    const char *name;
    json_t *value;
    json_object_foreach(vocab, name, value)
    {
        json_int_t id = json_integer_value(value);
        if (!json_is_integer(value) || id < 0 || id >= (json_int_t)l->v.n)
            return BAD(l, KV_EFORMAT, "model.vocab: the id of token '%s' is not one of 0 to %u",
                       kv_show(name, strlen(name)).s, l->v.n - 1);
        if (l->model[id])
            return BAD(l, KV_EFORMAT, "model.vocab: tokens '%s' and '%s' have the same id %u",
                       kv_show(l->s[id].p, l->s[id].n).s, kv_show(name, strlen(name)).s, (uint32_t)id);
        l->s[id] = (kv_slice){name, strlen(name)};
        l->model[id] = true;
        l->v.type[id] = KV_TOKEN_NORMAL;
    }
    return KV_OK;
}

static kv_status read_added(loader *l, const json_t *added)
{
    size_t i;
    json_t *a;
    if (added && !json_is_array(added)) return BAD(l, KV_EFORMAT, "added_tokens is not an array");
    json_array_foreach(added, i, a)
    {
        const json_t *value = json_object_get(a, "id"), *content = json_object_get(a, "content");
        bool special, left, right, normalized, word;
        json_int_t id = json_integer_value(value);
        kv_status st;
        if (!json_is_integer(value) || id < 0 || !json_string_length(content))
            return BAD(l, KV_EFORMAT, "added_tokens: entry %zu has no id or no content", i);
        if ((st = flag(l, a, "special", false, &special)) || (st = flag(l, a, "lstrip", false, &left)) ||
            (st = flag(l, a, "rstrip", false, &right)) || (st = flag(l, a, "single_word", false, &word)) ||
            (st = flag(l, a, "normalized", !special, &normalized)))
            return st;
        /* some vocabularies name tokens that the model has no embedding for: they can never be used */
        if (id >= (json_int_t)l->v.n) continue;
        kv_slice s = string_of(content), old = l->s[id];
        if (old.n && (old.n != s.n || memcmp(old.p, s.p, s.n)))
            return BAD(l, KV_EFORMAT, "added_tokens: '%s' has the id %u of '%s'", kv_show(s.p, s.n).s, (uint32_t)id,
                       kv_show(old.p, old.n).s);
        if (word)
            return BAD(l, KV_EUNSUPPORTED, "the added token '%s' is a single word, which is not supported",
                       kv_show(s.p, s.n).s);
        l->s[id] = s;
        l->plain[id] = true;
        l->v.type[id] = special ? KV_TOKEN_CONTROL : KV_TOKEN_USER;
        l->v.flags[id] = (uint8_t)(KV_ADDED | (left ? KV_ADDED_STRIP_LEFT : 0) | (right ? KV_ADDED_STRIP_RIGHT : 0) |
                                   (normalized ? KV_ADDED_NORMALIZED : 0));
    }
    return KV_OK;
}

/* Strings into the table; what the model knows by itself into by_raw, everything into by_content. */
static kv_status index_tokens(loader *l, bool byte_fallback)
{
    for (uint32_t i = 0; i < l->v.n; i++) {
        bool byte = byte_fallback && l->s[i].n == 6 && !memcmp(l->s[i].p, "<0x", 3) && l->s[i].p[5] == '>';
        if (byte && l->v.type[i] == KV_TOKEN_NORMAL) l->v.type[i] = KV_TOKEN_BYTE;
    }
    kv_status st = kv_vocab_set_strings(&l->v, l->s, l->plain, "tokenizer.json", l->err);
    if (!st) st = kv_strmap_init(&l->by_content, l->v.raw, l->v.n, l->err);
    for (uint32_t i = 0; i < l->v.n && !st; i++) {
        if (!l->v.raw[i].n) continue;
        uint32_t same = kv_strmap_put(&l->by_content, i);
        if (same != i)
            st = BAD(l, KV_EFORMAT, "token '%s' has two ids, %u and %u", kv_show(l->s[i].p, l->s[i].n).s, same, i);
        if (l->model[i]) kv_strmap_put(&l->v.by_raw, i);
    }
    if (!st) kv_vocab_find_bytes(&l->v);
    /* without byte fallback, tokens that look like bytes are ordinary ones */
    for (int b = 0; b < 256 && l->v.kind == KV_VOCAB_SPM && !byte_fallback; b++) l->v.byte_id[b] = KV_NONE;
    return st;
}

static kv_status read_merges(loader *l, const json_t *merges)
{
    static const char where[] = "model.merges";
    size_t i;
    json_t *m;
    if (!json_is_array(merges)) return BAD(l, KV_EFORMAT, "model.merges is not an array");
    kv_status st = kv_vocab_begin_merges(&l->v, json_array_size(merges), where, l->err);
    if (st) return st;
    json_array_foreach(merges, i, m)
    {
        kv_slice a = string_of(m), b = {NULL, 0};
        if (json_is_array(m) && json_array_size(m) == 2) {
            a = string_of(json_array_get(m, 0)), b = string_of(json_array_get(m, 1));
        } else if (a.n) {
            const char *space = memchr(a.p, ' ', a.n);
            b = space ? (kv_slice){space + 1, a.n - (size_t)(space - a.p) - 1} : b;
            a.n = space ? (size_t)(space - a.p) : 0;
            if (b.n && memchr(b.p, ' ', b.n)) a.n = 0;
        }
        if (!a.n || !b.n) return BAD(l, KV_EFORMAT, "%s: entry %zu is not a pair of tokens", where, i);
        if ((st = kv_vocab_add_merge(&l->v, a, b, (uint32_t)i, true, where, l->err))) return st;
    }
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ rules */

/* Walk a value that is null, one step, or a Sequence of steps under `key`. */
static kv_status walk(loader *l, const json_t *o, const char *key, int depth,
                      kv_status (*step)(loader *, const json_t *))
{
    size_t i;
    json_t *e;
    if (!o || json_is_null(o)) return KV_OK;
    if (!json_is_object(o)) return BAD(l, KV_EFORMAT, "%s are not objects", key);
    if (!is_type(o, "Sequence")) return step(l, o);
    const json_t *list = json_object_get(o, key);
    if (!json_is_array(list) || json_array_size(list) > SEQUENCE_MAX || depth > 4)
        return BAD(l, KV_EFORMAT, "a Sequence has no array '%s' of at most %d", key, SEQUENCE_MAX);
    json_array_foreach(list, i, e)
    {
        kv_status st = walk(l, e, key, depth + 1, step);
        if (st) return st;
    }
    return KV_OK;
}

/* The value of {"String": s}. */
static const json_t *literal(const json_t *pattern)
{
    return json_object_get(pattern, "String");
}

static kv_status normalizer(loader *l, const json_t *o)
{
    kv_space_rule *r = &l->v.normal;
    if (is_type(o, "NFC") && !r->prefix && !r->mark) return l->v.nfc = true, KV_OK;
    /* a prefix behind the replacement would stay a mark of its own: the same, since it is put as U+2581 */
    if (is_type(o, "Prepend") && is_text(json_object_get(o, "prepend"), "\xe2\x96\x81"))
        return r->prefix = KV_PREFIX_ALWAYS, KV_OK;
    if (is_type(o, "Replace") && is_text(literal(json_object_get(o, "pattern")), " ") &&
        is_text(json_object_get(o, "content"), "\xe2\x96\x81"))
        return r->mark = true, KV_OK;
    return unknown(l, "normaliser", o);
}

static kv_status split_step(loader *l, const json_t *o)
{
    static const struct {
        const char *name;
        kv_cut how;
    } behaviour[] = {{"Isolated", KV_CUT_ISOLATED},
                     {"Removed", KV_CUT_REMOVED},
                     {"MergedWithPrevious", KV_CUT_PREVIOUS},
                     {"MergedWithNext", KV_CUT_NEXT},
                     {"Contiguous", KV_CUT_CONTIGUOUS}};
    const json_t *pattern = json_object_get(o, "pattern"), *re = json_object_get(pattern, "Regex");
    const char *name = json_string_value(json_object_get(o, "behavior"));
    bool invert;
    char *translated = NULL;
    size_t b = 0;
    kv_status st = flag(l, o, "invert", false, &invert);
    if (st) return st;
    while (b < 5 && (!name || strcmp(name, behaviour[b].name))) b++;
    if (b == 5) return BAD(l, KV_EUNSUPPORTED, "behaviour '%.40s' of a Split is not known", name ? name : "?");
    if (re)
        st = kv_pretok_translate(json_string_value(re), json_string_length(re), &translated, l->err);
    else if (is_text(literal(pattern), " "))
        translated = kv_format("[ ]");
    else
        return BAD(l, KV_EUNSUPPORTED, "the pattern of a Split is neither a Regex nor a space");
    if (!st)
        st = translated ? kv_pretok_add(&l->v.cut, translated, behaviour[b].how, invert, l->err)
                        : BAD(l, KV_ENOMEM, "out of memory for a regular expression");
    free(translated);
    return st;
}

static kv_status byte_level_step(loader *l, const json_t *o)
{
    bool prefix, regex;
    kv_status st;
    if ((st = flag(l, o, "add_prefix_space", true, &prefix)) || (st = flag(l, o, "use_regex", true, &regex))) return st;
    if (prefix && l->v.cut.n)
        return BAD(l, KV_EUNSUPPORTED, "add_prefix_space behind other pre-tokenisers is not supported");
    if (prefix) l->v.before_cut = (kv_space_rule){KV_PREFIX_MISSING, false};
    l->byte_level = true;
    return regex ? kv_pretok_add(&l->v.cut, kv_pretok_gpt2, KV_CUT_ISOLATED, false, l->err) : KV_OK;
}

static kv_status metaspace_step(loader *l, const json_t *o)
{
    static const struct {
        const char *name;
        kv_prefix prefix;
    } scheme[] = {{"always", KV_PREFIX_MISSING}, {"first", KV_PREFIX_FIRST}, {"never", KV_PREFIX_NONE}};
    const json_t *named = json_object_get(o, "prepend_scheme");
    bool old, cut;
    size_t i = 0;
    kv_status st;
    if ((st = flag(l, o, "add_prefix_space", true, &old)) || (st = flag(l, o, "split", true, &cut))) return st;
    if (!is_text(json_object_get(o, "replacement"), "\xe2\x96\x81") || l->v.cut.n)
        return BAD(l, KV_EUNSUPPORTED, "Metaspace is not the first step, or not with U+2581");
    if (named)
        while (i < 3 && !is_text(named, scheme[i].name)) i++;
    else
        i = old ? 0 : 2;
    if (i == 3) return BAD(l, KV_EUNSUPPORTED, "prepend_scheme of Metaspace is not known");
    l->v.before_cut = (kv_space_rule){scheme[i].prefix, true};
    return cut ? kv_pretok_add(&l->v.cut, "\\x{2581}", KV_CUT_NEXT, false, l->err) : KV_OK;
}

static kv_status pre_tokenizer(loader *l, const json_t *o)
{
    if (l->byte_level) return BAD(l, KV_EUNSUPPORTED, "a pre-tokeniser behind ByteLevel is not supported");
    if (is_type(o, "ByteLevel")) return byte_level_step(l, o);
    if (is_type(o, "Split")) return split_step(l, o);
    if (is_type(o, "Metaspace")) return metaspace_step(l, o);
    if (is_type(o, "Digits")) {
        bool each;
        kv_status st = flag(l, o, "individual_digits", false, &each);
        return st ? st : kv_pretok_add(&l->v.cut, each ? "\\p{N}" : "\\p{N}+", KV_CUT_ISOLATED, false, l->err);
    }
    return unknown(l, "pre-tokeniser", o);
}

/* TemplateProcessing: the special token in front of the text is BOS; what stands behind it is for pairs and for
 * classifiers, and a prompt is not closed. */
static kv_status post_processor(loader *l, const json_t *o)
{
    size_t i;
    json_t *e;
    if (is_type(o, "ByteLevel")) return KV_OK; /* offsets only */
    if (!is_type(o, "TemplateProcessing")) return unknown(l, "post-processor", o);
    const json_t *single = json_object_get(o, "single"), *known = json_object_get(o, "special_tokens");
    l->v.add_bos = 0;
    json_array_foreach(single, i, e)
    {
        const char *name = json_string_value(json_object_get(json_object_get(e, "SpecialToken"), "id"));
        if (!name) break;
        const json_t *id = json_array_get(json_object_get(json_object_get(known, name), "ids"), 0);
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= (json_int_t)l->v.n)
            return BAD(l, KV_EFORMAT, "post_processor: the special token '%.60s' has no id of 0 to %u", name,
                       l->v.n - 1);
        if (i) return BAD(l, KV_EUNSUPPORTED, "it puts more than one token in front of a text, which is not supported");
        l->v.bos = (uint32_t)json_integer_value(id);
        l->v.add_bos = 1;
    }
    return KV_OK;
}

static kv_status check_model(loader *l, const json_t *model, bool *byte_fallback)
{
    static const char *const empty[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const json_t *dropout = json_object_get(model, "dropout");
    kv_status st;
    if (!json_is_object(model)) return BAD(l, KV_EFORMAT, "it has no object 'model'");
    if (json_object_get(model, "type") ? !is_type(model, "BPE") : !json_object_get(model, "merges"))
        return unknown(l, "model", model);
    if (!json_is_object(json_object_get(model, "vocab"))) return BAD(l, KV_EFORMAT, "model.vocab is not an object");
    for (int i = 0; i < 2; i++)
        if (json_string_length(json_object_get(model, empty[i])))
            return BAD(l, KV_EUNSUPPORTED, "%s is not supported", empty[i]);
    if (json_number_value(dropout) != 0) return BAD(l, KV_EUNSUPPORTED, "dropout: tokens would be random");
    if ((st = flag(l, model, "byte_fallback", false, byte_fallback)) ||
        (st = flag(l, model, "fuse_unk", false, &l->v.fuse_unk)))
        return st;
    return flag(l, model, "ignore_merges", false, &l->v.ignore_merges);
}

static kv_status read_tokenizer(loader *l, const json_t *root)
{
    const json_t *model = json_object_get(root, "model");
    bool byte_fallback;
    kv_status st;
    if ((st = check_model(l, model, &byte_fallback)) ||
        (st = walk(l, json_object_get(root, "normalizer"), "normalizers", 0, normalizer)) ||
        (st = walk(l, json_object_get(root, "pre_tokenizer"), "pretokenizers", 0, pre_tokenizer)))
        return st;
    bool spaces = l->v.normal.mark || l->v.before_cut.mark;
    if (l->byte_level == spaces)
        return BAD(l, KV_EUNSUPPORTED, "it is neither byte-level nor one that writes spaces as U+2581");
    if (l->v.normal.prefix && !l->v.normal.mark)
        return BAD(l, KV_EUNSUPPORTED, "the normaliser 'Prepend' without 'Replace' is not supported");
    l->v.kind = l->byte_level ? KV_VOCAB_BPE : KV_VOCAB_SPM;
    l->v.by_rank = l->v.hf = true;
    if ((st = read_tokens(l, json_object_get(model, "vocab"))) ||
        (st = read_added(l, json_object_get(root, "added_tokens"))) || (st = index_tokens(l, byte_fallback)) ||
        (st = read_merges(l, json_object_get(model, "merges"))))
        return st;
    kv_slice unk = string_of(json_object_get(model, "unk_token"));
    if (unk.n) l->v.unk = kv_vocab_find(&l->v, unk.p, unk.n);
    return walk(l, json_object_get(root, "post_processor"), "processors", 0, post_processor);
}

/* ------------------------------------------------------------------------------------------------ folder */

/* A token given as "<s>" or as {"content": "<s>", ...}. */
static uint32_t named_token(const loader *l, const json_t *o)
{
    kv_slice s = string_of(json_is_object(o) ? json_object_get(o, "content") : o);
    return s.n ? kv_strmap_get(&l->by_content, s.p, s.n) : KV_NONE;
}

static kv_status read_config(loader *l, const json_t *config)
{
    const json_t *add = json_object_get(config, "add_bos_token"), *tmpl = json_object_get(config, "chat_template");
    uint32_t bos = named_token(l, json_object_get(config, "bos_token"));
    size_t i;
    json_t *e;
    l->v.eos = named_token(l, json_object_get(config, "eos_token"));
    if (l->v.bos == KV_NONE) l->v.bos = bos;
    if (json_is_boolean(add)) {
        l->v.add_bos = json_is_true(add);
        if (bos != KV_NONE) l->v.bos = bos;
    }
    if (json_is_array(tmpl)) /* several, by name */
        json_array_foreach(tmpl, i, e) if (is_text(json_object_get(e, "name"), "default")) tmpl =
            json_object_get(e, "template");
    if (!json_string_length(tmpl) || l->v.chat_template) return KV_OK;
    l->v.chat_template = kv_format("%s", json_string_value(tmpl));
    return l->v.chat_template ? KV_OK : BAD(l, KV_ENOMEM, "out of memory for the chat template");
}

/* chat_template.jinja beside it counts before the one in the configuration. */
static kv_status read_template(loader *l, const char *folder)
{
    uint8_t *text = NULL;
    size_t n;
    char *path = kv_format("%s/chat_template.jinja", folder);
    if (!path) return BAD(l, KV_ENOMEM, "out of memory for a path");
    kv_status st = access(path, F_OK) ? KV_OK : kv_read_regular(path, CONFIG_MAX, &text, &n, l->err);
    free(path);
    if (!st) l->v.chat_template = (char *)text;
    return st;
}

kv_status kv_tokenizer_open_hf(const char *folder, uint32_t n_vocab, kv_tokenizer **out, kv_error *err)
{
    char *path = kv_format("%s/tokenizer.json", folder), *side = kv_format("%s/tokenizer_config.json", folder);
    json_t *root = NULL, *config = NULL;
    kv_error why = {""};
    loader l = {.err = &why};
    kv_status st;
    *out = NULL;
    l.v.n = n_vocab, l.v.bos = l.v.eos = l.v.unk = KV_NONE, l.v.add_bos = 0;
    if (!path || !side) {
        st = kv_fail(err, KV_ENOMEM, "out of memory for a path");
        goto out;
    }
    if (access(path, F_OK)) {
        st = kv_fail(err, KV_EMISSING, "the folder has no tokenizer.json (other vocabulary files are not read)");
        goto out;
    }
    if (!n_vocab || n_vocab > KV_VOCAB_MAX) {
        st = kv_fail(err, KV_EUNSUPPORTED, "a vocabulary of %u tokens (1 to %u)", n_vocab, KV_VOCAB_MAX);
        goto out;
    }
    /* the configuration gives "no limit" as an integer of 100 bits */
    if ((st = parse_file(path, FILE_MAX, 0, &root, err)) ||
        (!access(side, F_OK) && (st = parse_file(side, CONFIG_MAX, JSON_DECODE_INT_AS_REAL, &config, err))) ||
        (st = kv_array(&l.s, n_vocab, sizeof *l.s, err)) || (st = kv_array(&l.plain, n_vocab, sizeof *l.plain, err)) ||
        (st = kv_array(&l.model, n_vocab, sizeof *l.model, err)) || (st = kv_array(&l.v.type, n_vocab, 1, err)) ||
        (st = kv_array(&l.v.flags, n_vocab, 1, err)))
        goto out;
    memset(l.v.type, KV_TOKEN_UNUSED, n_vocab);
    if ((st = read_tokenizer(&l, root)) || (st = read_template(&l, folder)) ||
        (config && (st = read_config(&l, config))))
        kv_fail(err, st, "'%s': %s", path, why.msg);
out:
    kv_strmap_fini(&l.by_content);
    if (st)
        kv_vocab_free(&l.v);
    else
        st = kv_tokenizer_create(&l.v, out, err);
    json_decref(root), json_decref(config);
    free(l.s), free(l.plain), free(l.model), free(path), free(side);
    return st;
}
