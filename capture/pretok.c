/* pretok.c - pre-tokenisers (pretok.h). */
#include "capture/pretok.h"

#include <stdlib.h>

#include "capture/strmap.h"

/* Unicode White_Space as class members. PCRE2's own \s would also take U+180E, which left that property in Unicode 6.3.
 */
#define S    "\\t-\\r\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" S "\\p{L}\\p{N}]+|[" S "]+(?![^" S "])"
#define LLAMA3(numbers)                                                                                                \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numbers "| ?[^" S "\\p{L}\\p{N}]+[\\r\\n]*|"         \
    "[" S "]*[\\r\\n]+|[" S "]+(?![^" S "])|[" S "]+"
/* The later families tell upper from lower case: words begin at a capital. */
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define CASED(contraction, numbers)                                                                                    \
    "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" contraction "|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER "*" contraction \
    "|" numbers "| ?[^" S "\\p{L}\\p{N}]+[\\r\\n/]*|[" S "]*[\\r\\n]+|[" S "]+(?![^" S "])|[" S "]+"
#define CONTRACTION "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
#define DEEPSEEK3                                                                                                      \
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"               \
    " ?[\\p{P}\\p{S}]+[\\r\\n]*|[" S "]*[\\r\\n]+|[" S "]+(?![^" S "])|[" S "]+"
#define SPACES "|[" S "]+"

const char kv_pretok_gpt2[] = GPT2 SPACES;

/* What lies between two matches is a piece too. */
typedef struct {
    const char *names; /* values of tokenizer.ggml.pre, each between two spaces */
    const char *stage[4];
    bool llama3;
} pre_row;

static const pre_row pre_table[] = {
    {" gpt-2 phi-2 olmo mpt jais trillion granite-docling exaone4 gigachat mellum a.x-4.0 modern-bert ",
     {GPT2 SPACES},
     false},
    {" smollm starcoder refact command-r codeshell exaone minerva-7b mellum2 ", {"\\p{N}", GPT2 SPACES}, false},
    {" llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0 ", {LLAMA3("\\p{N}{1,3}")}, true},
    {" dbrx smaug-bpe glm4 chatglm-bpe ", {LLAMA3("\\p{N}{1,3}")}, false},
    {" qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open grok-2 ", {LLAMA3("\\p{N}")}, false},
    {" tekken ", {CASED("", "\\p{N}")}, true},
    {" gpt-4o llama4 minimax-m2 ", {CASED(CONTRACTION, "\\p{N}{1,3}")}, false},
    {" deepseek-v3 hunyuan-dense ", {"\\p{N}{1,3}", "[\\x{4e00}-\\x{9fa5}\\x{3040}-\\x{30ff}]+", DEEPSEEK3}, false},
    {" falcon ", {"[\\p{P}\\$\\+<=>\\^~\\|`]+", GPT2, "[0-9][0-9][0-9]"}, false},
    {" default ", {"[\\p{P}\\$\\+<=>\\^~\\|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"}, false},
};

static const pre_row *find_pre(const char *name)
{
    char padded[sizeof(kv_shown) + 2];
    snprintf(padded, sizeof padded, " %s ", name);
    for (size_t i = 0; i < sizeof pre_table / sizeof *pre_table; i++)
        if (!strchr(name, ' ') && strstr(pre_table[i].names, padded)) return &pre_table[i];
    return NULL;
}

kv_status kv_pretok_named(const char *name, kv_pretok *p, bool *llama3, kv_error *err)
{
    const pre_row *pre = find_pre(name);
    kv_status st = KV_OK;
    *p = (kv_pretok){.n = 0};
    if (!pre)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "pre-tokeniser '%s' (tokenizer.ggml.pre) is not known, and a wrong one would change the tokens",
                       name);
    *llama3 = pre->llama3;
    for (size_t i = 0; i < sizeof pre->stage / sizeof *pre->stage && pre->stage[i] && !st; i++)
        st = kv_pretok_add(p, pre->stage[i], KV_CUT_ISOLATED, false, err);
    return st;
}

kv_status kv_pretok_add(kv_pretok *p, const char *pattern, kv_cut how, bool invert, kv_error *err)
{
    int code;
    PCRE2_SIZE at;
    uint32_t empty;
    if (p->n == KV_PRETOK_STAGES)
        return kv_fail(err, KV_EUNSUPPORTED, "the pre-tokeniser has more than %d stages", KV_PRETOK_STAGES);
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &at, NULL);
    if (!re)
        return kv_fail(err, KV_EUNSUPPORTED, "regular expression '%.200s' of the pre-tokeniser: PCRE2 error %d at %zu",
                       pattern, code, (size_t)at);
    if (pcre2_pattern_info(re, PCRE2_INFO_MATCHEMPTY, &empty) || empty) {
        pcre2_code_free(re);
        return kv_fail(err, KV_EUNSUPPORTED, "regular expression '%.200s' of the pre-tokeniser can match nothing",
                       pattern);
    }
    pcre2_jit_compile(re, PCRE2_JIT_COMPLETE); /* without it the interpreter matches the same */
    p->stage[p->n++] = (kv_pretok_stage){re, how, invert};
    return KV_OK;
}

void kv_pretok_free(kv_pretok *p)
{
    for (int i = 0; i < p->n; i++) pcre2_code_free(p->stage[i].re);
    p->n = 0;
}

/* ------------------------------------------------------------------------------------------------ translation */

/* A pattern being rewritten: every construct is known, or refused. */
typedef struct {
    const char *p, *end;
    char *out;
    size_t n;
    bool in_class, negated;
    kv_error *err;
} rewriter;

static kv_status refuse(const rewriter *r, const char *at, const char *what)
{
    size_t n = (size_t)(r->end - at) < 12 ? (size_t)(r->end - at) : 12;
    return kv_fail(r->err, KV_EUNSUPPORTED, "the pre-tokeniser's regular expression has %s at '%s', which is not known",
                   what, kv_show(at, n).s);
}

static void put(rewriter *r, const char *s, size_t n)
{
    memcpy(r->out + r->n, s, n);
    r->n += n;
}

static void put_text(rewriter *r, const char *s)
{
    put(r, s, strlen(s));
}

/* \p{L}: general categories mean the same everywhere; scripts and other properties do not. */
static kv_status rewrite_property(rewriter *r, const char *from)
{
    static const char names[] = " L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So "
                                "Z Zs Zl Zp C Cc Cf Co ";
    char name[8] = " ";
    if (r->end - r->p < 3 || *r->p != '{') return refuse(r, from, "a property");
    r->p++;
    bool negated = *r->p == '^';
    r->p += negated;
    size_t n = 0;
    while (n < 4 && r->p + n < r->end && r->p[n] != '}') n++;
    if (n > 3 || r->p + n == r->end) return refuse(r, from, "a property");
    memcpy(name + 1, r->p, n);
    memcpy(name + 1 + n, " ", 2);
    if (!strstr(names, name)) return refuse(r, from, "a property");
    r->p += n + 1;
    put(r, from, (size_t)(r->p - from));
    return KV_OK;
}

static kv_status rewrite_escape(rewriter *r)
{
    const char *from = r->p++;
    if (r->p == r->end) return refuse(r, from, "an escape");
    char c = *r->p++;
    if (c == 'p' || c == 'P') return rewrite_property(r, from);
    if (c == 's') {
        put_text(r, r->in_class ? S : "[" S "]");
        return KV_OK;
    }
    if (c == 'S' && !r->in_class) {
        put_text(r, "[^" S "]");
        return KV_OK;
    }
    if (c == 'd') { /* decimal digits of every script */
        put_text(r, "\\p{Nd}");
        return KV_OK;
    }
    if (c == 'u' && r->end - r->p >= 4) {
        char code[16];
        for (int i = 0; i < 4; i++)
            if (!strchr("0123456789abcdefABCDEF", r->p[i]) || !r->p[i]) return refuse(r, from, "an escape");
        snprintf(code, sizeof code, "\\x{%.4s}", r->p);
        put_text(r, code);
        r->p += 4;
        return KV_OK;
    }
    if (!strchr("rntfv", c) && ((c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c & 0x80))
        return refuse(r, from, "an escape");
    if (c == 'v') /* a vertical tab, where PCRE2 has any vertical space */
        put_text(r, "\\x0b");
    else
        put(r, from, 2);
    return KV_OK;
}

/* A group's opening: plain, (?: (?i: (?= (?! (?<= (?<! (?> */
static kv_status rewrite_group(rewriter *r)
{
    static const char *const known[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    const char *from = r->p;
    if (r->end - from > 1 && from[1] == '?') {
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
            size_t n = strlen(known[i]);
            if ((size_t)(r->end - from) < n || memcmp(from, known[i], n)) continue;
            put(r, from, n);
            r->p += n;
            return KV_OK;
        }
        return refuse(r, from, "a group");
    }
    if (r->end - from > 1 && from[1] == '*') return refuse(r, from, "a verb");
    put_text(r, "(?:"); /* nothing refers to what a group caught */
    r->p++;
    return KV_OK;
}

/* {n}, {n,}, {n,m}: not {,m}, and no + behind, which is possessive in PCRE2 only. */
static kv_status rewrite_count(rewriter *r)
{
    const char *from = r->p++;
    size_t digits = 0;
    while (r->p < r->end && *r->p >= '0' && *r->p <= '9') r->p++, digits++;
    if (r->p < r->end && *r->p == ',')
        for (r->p++; r->p < r->end && *r->p >= '0' && *r->p <= '9';) r->p++;
    if (!digits || r->p == r->end || *r->p != '}') return refuse(r, from, "a count");
    r->p++;
    if (r->p < r->end && (*r->p == '+' || *r->p == '?')) return refuse(r, from, "a count");
    put(r, from, (size_t)(r->p - from));
    return KV_OK;
}

static kv_status rewrite_one(rewriter *r)
{
    char c = *r->p;
    if (c == '\\') return rewrite_escape(r);
    if (r->in_class) {
        if (c == '[' || (c == '&' && r->end - r->p > 1 && r->p[1] == '&')) return refuse(r, r->p, "a nested class");
        r->in_class = c != ']';
    } else if (c == '[') {
        r->in_class = true;
        bool caret = r->end - r->p > 1 && r->p[1] == '^';
        if (r->end - r->p > 1 + caret && r->p[1 + caret] == ']') return refuse(r, r->p, "an empty class");
        if (caret) put(r, r->p++, 1);
    } else if (c == '(') {
        return rewrite_group(r);
    } else if (c == '{') {
        return rewrite_count(r);
    } else if (c == '^' || c == '$') {
        return refuse(r, r->p, "an anchor");
    } else if (c == '.') {
        put_text(r, "[^\\n]");
        r->p++;
        return KV_OK;
    }
    put(r, r->p++, 1);
    return KV_OK;
}

kv_status kv_pretok_translate(const char *pattern, size_t n, char **out, kv_error *err)
{
    rewriter r = {.p = pattern, .end = pattern + n, .err = err};
    *out = NULL;
    if (n > KV_PRETOK_PATTERN || !n || memchr(pattern, 0, n))
        return kv_fail(err, KV_EUNSUPPORTED,
                       "a regular expression of the pre-tokeniser has %zu bytes (1 to %u, none zero)", n,
                       KV_PRETOK_PATTERN);
    /* two bytes (\s) become at most sizeof S + 3 */
    kv_status st = kv_array(&r.out, n * sizeof S + 8, 1, err);
    while (r.p < r.end && !st) st = rewrite_one(&r);
    if (!st && r.in_class) st = refuse(&r, pattern, "an open class");
    if (st)
        free(r.out);
    else
        *out = r.out;
    return st;
}

/* ------------------------------------------------------------------------------------------------ cutting */

kv_status kv_pretok_room_init(kv_pretok_room *r, kv_error *err)
{
    r->match = pcre2_match_data_create(1, NULL);
    r->context = pcre2_match_context_create(NULL);
    r->stack = pcre2_jit_stack_create(32 * 1024, 4 << 20, NULL);
    if (!r->match || !r->context || !r->stack) return kv_fail(err, KV_ENOMEM, "out of memory for the tokenizer");
    pcre2_jit_stack_assign(r->context, NULL, r->stack);
    /* the known expressions are linear; the limits turn what a file may bring along into an error */
    pcre2_set_match_limit(r->context, 50000000);
    pcre2_set_heap_limit(r->context, 1 << 20);
    return KV_OK;
}

void kv_pretok_room_free(kv_pretok_room *r)
{
    pcre2_match_data_free(r->match);
    pcre2_match_context_free(r->context);
    pcre2_jit_stack_free(r->stack);
}

typedef struct {
    const kv_pretok *p;
    const kv_pretok_room *r;
    const char *text;
    kv_status (*piece)(void *, size_t, size_t);
    void *ctx;
    kv_error *err;
} cutter;

/* What a stage has not handed on yet: a piece that may still grow. */
typedef struct {
    size_t at, n;
    bool open, match; /* there is one; it is a match */
} pending;

static kv_status cut(const cutter *c, int stage, size_t at, size_t n);

static kv_status flush(const cutter *c, int stage, pending *w)
{
    w->open = false;
    return cut(c, stage + 1, w->at, w->n);
}

/* One segment of a stage: a match or what lies between two. */
static kv_status segment(const cutter *c, int stage, pending *w, size_t at, size_t n, bool match)
{
    const kv_pretok_stage *s = &c->p->stage[stage];
    kv_status st = KV_OK;
    if (!n) return KV_OK;
    match ^= s->invert;
    if (s->how == KV_CUT_ISOLATED) return cut(c, stage + 1, at, n);
    if (s->how == KV_CUT_REMOVED) return match ? KV_OK : cut(c, stage + 1, at, n);
    bool joins = w->open && (s->how == KV_CUT_PREVIOUS ? match && !w->match
                             : s->how == KV_CUT_NEXT   ? w->match && !match
                                                       : w->match && match);
    if (joins) {
        w->n += n;
        w->match = match;
        return KV_OK;
    }
    if (w->open) st = flush(c, stage, w);
    *w = (pending){at, n, true, match};
    return st;
}

/* Cut bytes at .. at+n-1 by the expression of `stage`, hand the pieces to the next one. */
static kv_status cut(const cutter *c, int stage, size_t at, size_t n)
{
    size_t done = 0;
    pending w = {0};
    kv_status st = KV_OK;
    if (!n) return KV_OK;
    if (stage == c->p->n) return c->piece(c->ctx, at, n);
    while (done < n && !st) {
        /* the piece is a subject of its own: look-ahead must not see what another stage has cut off */
        int r = pcre2_match(c->p->stage[stage].re, (PCRE2_SPTR)c->text + at, n, done, PCRE2_NO_UTF_CHECK, c->r->match,
                            c->r->context);
        if (r == PCRE2_ERROR_NOMATCH) break;
        if (r < 0)
            return kv_fail(c->err, KV_EFORMAT, "cannot tokenize the text at byte %zu: PCRE2 error %d", at + done, r);
        const PCRE2_SIZE *o = pcre2_get_ovector_pointer(c->r->match);
        size_t a = o[0], b = o[1];
        if (b <= a || a < done)
            return kv_fail(c->err, KV_EFORMAT, "cannot tokenize the text at byte %zu: empty match", at + done);
        st = segment(c, stage, &w, at + done, a - done, false);
        if (!st) st = segment(c, stage, &w, at + a, b - a, true);
        done = b;
    }
    if (!st) st = segment(c, stage, &w, at + done, n - done, false);
    return !st && w.open ? flush(c, stage, &w) : st;
}

kv_status kv_pretok_split(const kv_pretok *p, const kv_pretok_room *r, const char *text, size_t n,
                          kv_status (*piece)(void *ctx, size_t at, size_t n), void *ctx, kv_error *err)
{
    cutter c = {p, r, text, piece, ctx, err};
    return cut(&c, 0, 0, n);
}
