/* tokenizer.c - text to token ids: byte-level BPE and SentencePiece-style BPE by score.
 *
 *   text -> special tokens cut out, longest first -> (BPE: pieces by regular expressions) -> merges -> ids
 *
 * Merging is one algorithm for both kinds: symbols in a list, the best adjacent pair from a heap, (key, position)
 * ascending; the key is the merge's rank or the inverted score. n symbols cost O(n log n) also when a text is one
 * piece. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>

#include "capture/vocab.h"

#define TEXT_MAX (1u << 28) /* bytes of one text */
#define STAGES   4

/* ------------------------------------------------------------------------------------------------ pre-tokenisers */

/* Unicode White_Space as class members. PCRE2's own \s would also take U+180E, which left that property in Unicode 6.3.
 */
#define S    "\\t-\\r\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" S "\\p{L}\\p{N}]+|[" S "]+(?![^" S "])"
#define LLAMA3(numbers)                                                                                                \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" numbers "| ?[^" S "\\p{L}\\p{N}]+[\\r\\n]*|"         \
    "[" S "]*[\\r\\n]+|[" S "]+(?![^" S "])|[" S "]+"
#define SPACES "|[" S "]+"

/* Each stage cuts the pieces of the stage before it; what lies between two matches is a piece too. */
typedef struct {
    const char *names; /* values of tokenizer.ggml.pre, each between two spaces */
    const char *stage[STAGES];
    bool llama3; /* whole pieces before merges (ignore_merges), and BOS unless the file says otherwise */
} pre_row;

static const pre_row pre_table[] = {
    {" gpt-2 phi-2 ", {GPT2 SPACES}, false},
    {" smollm starcoder refact command-r ", {"\\p{N}", GPT2 SPACES}, false},
    {" llama-bpe llama3 llama-v3 ", {LLAMA3("\\p{N}{1,3}")}, true},
    {" qwen2 deepseek-r1-qwen ", {LLAMA3("\\p{N}")}, false},
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

/* ------------------------------------------------------------------------------------------------ tokenizer */

struct kv_tokenizer {
    kv_vocab v;
    bool add_bos, ignore_merges;
    pcre2_code *re[STAGES];
    int n_stage;
    /* tokens that are cut out of a text as they stand */
    kv_slice *special; /* [n_special] */
    uint32_t *special_id;
    uint32_t n_special;
    kv_strmap by_special;
    size_t *length; /* [n_length] the different lengths, descending */
    size_t n_length;
    bool first[256]; /* the bytes they begin with */
    char describe[240];
};

static kv_status compile(kv_tokenizer *t, kv_error *err)
{
    const pre_row *pre = find_pre(t->v.pre.s);
    if (!pre)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "pre-tokeniser '%s' (tokenizer.ggml.pre) is not known, and a wrong one would change the tokens",
                       t->v.pre.s);
    t->ignore_merges = pre->llama3;
    if (t->v.add_bos < 0) t->add_bos = pre->llama3;
    for (int i = 0; i < STAGES && pre->stage[i]; i++, t->n_stage++) {
        int code;
        PCRE2_SIZE at;
        t->re[i] = pcre2_compile((PCRE2_SPTR)pre->stage[i], PCRE2_ZERO_TERMINATED,
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code, &at, NULL);
        if (!t->re[i])
            return kv_fail(err, KV_EUNSUPPORTED, "regular expression of pre-tokeniser '%s': PCRE2 error %d at %zu",
                           t->v.pre.s, code, (size_t)at);
        pcre2_jit_compile(t->re[i], PCRE2_JIT_COMPLETE); /* without it the interpreter matches the same */
    }
    return KV_OK;
}

static int longer_first(const void *a, const void *b)
{
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x < y) - (x > y);
}

static bool is_special(const kv_vocab *v, uint32_t i)
{
    uint8_t type = v->type[i];
    /* a string that is not UTF-8 cannot occur in a text that is */
    return (type == KV_TOKEN_CONTROL || type == KV_TOKEN_USER || type == KV_TOKEN_UNKNOWN) && v->raw[i].n &&
           kv_utf8_bad(v->raw[i].p, v->raw[i].n) == v->raw[i].n;
}

static kv_status collect_special(kv_tokenizer *t, kv_error *err)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->v.n; i++) n += is_special(&t->v, i);
    kv_status st;
    if ((st = kv_array(&t->special, n, sizeof *t->special, err)) ||
        (st = kv_array(&t->special_id, n, sizeof *t->special_id, err)) ||
        (st = kv_array(&t->length, n, sizeof *t->length, err)) ||
        (st = kv_strmap_init(&t->by_special, t->special, n, err)))
        return st;
    for (uint32_t i = 0; i < t->v.n; i++) {
        if (!is_special(&t->v, i)) continue;
        uint32_t k = t->n_special++;
        t->special[k] = t->v.raw[i], t->special_id[k] = i;
        kv_strmap_put(&t->by_special, k);
        t->first[(uint8_t)t->v.raw[i].p[0]] = true;
        t->length[k] = t->v.raw[i].n;
    }
    qsort(t->length, n, sizeof *t->length, longer_first);
    for (uint32_t i = 0; i < n; i++)
        if (!i || t->length[i] != t->length[i - 1]) t->length[t->n_length++] = t->length[i];
    return KV_OK;
}

kv_status kv_tokenizer_create(kv_vocab *v, kv_tokenizer **out, kv_error *err)
{
    kv_tokenizer *t = NULL;
    *out = NULL;
    kv_status st = kv_array(&t, 1, sizeof *t, err);
    if (st) {
        kv_vocab_free(v);
        return st;
    }
    t->v = *v;
    memset(v, 0, sizeof *v);
    t->add_bos = t->v.add_bos < 0 ? t->v.kind == KV_VOCAB_SPM : t->v.add_bos;
    if (t->v.kind == KV_VOCAB_BPE) st = compile(t, err);
    if (!st) st = collect_special(t, err);
    if (st) {
        kv_tokenizer_close(t);
        return st;
    }
    if (t->v.bos == KV_NONE) t->add_bos = false;
    if (t->v.kind == KV_VOCAB_SPM)
        snprintf(t->describe, sizeof t->describe, "SentencePiece-style BPE by score, %u tokens", t->v.n);
    else
        snprintf(t->describe, sizeof t->describe, "byte-level BPE, pre %s%s, %u tokens", t->v.pre.s,
                 t->v.pre_named ? "" : " (a guess: the file names none, so tokens may differ from the model's own)",
                 t->v.n);
    *out = t;
    return KV_OK;
}

void kv_tokenizer_close(kv_tokenizer *t)
{
    if (!t) return;
    for (int i = 0; i < STAGES; i++) pcre2_code_free(t->re[i]);
    kv_strmap_fini(&t->by_special);
    free(t->special), free(t->special_id), free(t->length);
    kv_vocab_free(&t->v);
    free(t);
}

const char *kv_token_bytes(const kv_tokenizer *t, uint32_t id, size_t *n)
{
    *n = id < t->v.n ? t->v.text[id].n : 0;
    return id < t->v.n ? t->v.text[id].p : NULL;
}

const char *kv_tokenizer_describe(const kv_tokenizer *t)
{
    return t->describe;
}

uint32_t kv_tokenizer_eos(const kv_tokenizer *t)
{
    return t->v.eos;
}

const char *kv_tokenizer_template(const kv_tokenizer *t)
{
    return t->v.chat_template;
}

/* ------------------------------------------------------------------------------------------------ one text */

/* A stretch of the text: a special token, or text still to be tokenised (id KV_NONE). */
typedef struct {
    size_t at, n;
    uint32_t id;
} fragment;

/* A symbol is known by the byte where it begins; the next one begins at at + len. len 0: merged into the one before. */
typedef struct {
    uint32_t len, prev, id;
} symbol;

/* A pair that may be merged. It is out of date when one of the two has another length than it had. */
typedef struct {
    uint32_t key, left, left_len, right_len, id;
} pair;

/* The state of one call. */
typedef struct {
    const kv_tokenizer *t;
    const char *text;
    size_t n;
    fragment *frag, *next_frag;
    size_t n_frag, n_next, frag_cap, next_cap;
    symbol *sym;
    size_t sym_cap;
    pair *heap;
    size_t n_heap, heap_cap;
    char *buf;        /* a piece as the vocabulary spells it (SPM: with U+2581) */
    uint32_t *origin; /* SPM: place in the text of each byte of buf */
    size_t buf_cap, origin_cap;
    uint32_t *id, *offset;
    size_t n_out, id_cap, offset_cap;
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    kv_error *err;
} job;

/* Grow *p (elements of `size` bytes) to hold at least n. */
static kv_status grow(void *p, size_t *cap, size_t n, size_t size, kv_error *err)
{
    void *old, *fresh;
    size_t want = n < 64 ? 64 : n + n / 2, bytes;
    if (n <= *cap) return KV_OK;
    memcpy(&old, p, sizeof old);
    if (!kv_mul(want, size, &bytes) || !(fresh = realloc(old, bytes)))
        return kv_fail(err, KV_ENOMEM, "out of memory for %zu symbols of a text", want);
    memcpy(p, &fresh, sizeof fresh);
    *cap = want;
    return KV_OK;
}

static kv_status emit(job *j, uint32_t id, size_t at)
{
    kv_status st = grow(&j->id, &j->id_cap, j->n_out + 1, sizeof *j->id, j->err);
    if (!st) st = grow(&j->offset, &j->offset_cap, j->n_out + 2, sizeof *j->offset, j->err);
    if (!st) j->id[j->n_out] = id, j->offset[j->n_out++] = (uint32_t)at;
    return st;
}

/* --- heap: smallest (key, left) first --- */

static bool before(const pair *a, const pair *b)
{
    return a->key != b->key ? a->key < b->key : a->left < b->left;
}

static kv_status heap_put(job *j, pair p)
{
    kv_status st = grow(&j->heap, &j->heap_cap, j->n_heap + 1, sizeof *j->heap, j->err);
    if (st) return st;
    size_t i = j->n_heap++;
    for (; i && before(&p, &j->heap[(i - 1) / 2]); i = (i - 1) / 2) j->heap[i] = j->heap[(i - 1) / 2];
    j->heap[i] = p;
    return KV_OK;
}

static pair heap_take(job *j)
{
    pair top = j->heap[0], last = j->heap[--j->n_heap];
    size_t i = 0, c;
    while ((c = 2 * i + 1) < j->n_heap) {
        if (c + 1 < j->n_heap && before(&j->heap[c + 1], &j->heap[c])) c++;
        if (!before(&j->heap[c], &last)) break;
        j->heap[i] = j->heap[c];
        i = c;
    }
    j->heap[i] = last;
    return top;
}

/* --- merging --- */

/* A key that ascends as the score descends; equal scores give equal keys. */
static uint32_t key_of_score(float score)
{
    uint32_t u;
    score += 0.0f; /* -0 */
    memcpy(&u, &score, sizeof u);
    u = u >> 31 ? ~u : u | 0x80000000u;
    return ~u;
}

/* Offer the pair of the symbols at `left` and `right` to the heap when it can be merged. */
static kv_status offer(job *j, uint32_t left, uint32_t right)
{
    const kv_vocab *v = &j->t->v;
    const symbol *l = &j->sym[left], *r = &j->sym[right];
    pair p = {.left = left, .left_len = l->len, .right_len = r->len};
    if (v->kind == KV_VOCAB_BPE) {
        const kv_merge *m = kv_vocab_merge(v, l->id, r->id);
        if (!m) return KV_OK;
        p.key = m->rank, p.id = m->id;
    } else {
        p.id = kv_vocab_find(v, j->buf + left, (size_t)l->len + r->len);
        if (p.id == KV_NONE) return KV_OK;
        p.key = key_of_score(v->score[p.id]);
    }
    return heap_put(j, p);
}

/* Merge the symbols of bytes 0..n-1 until no pair is left. */
static kv_status merge_all(job *j, uint32_t n)
{
    kv_status st = KV_OK;
    j->n_heap = 0;
    for (uint32_t i = j->sym[0].len; i < n && !st; i += j->sym[i].len) st = offer(j, j->sym[i].prev, i);
    while (j->n_heap && !st) {
        pair p = heap_take(j);
        symbol *l = &j->sym[p.left];
        uint32_t right = p.left + p.left_len;
        if (l->len != p.left_len || right >= n || j->sym[right].len != p.right_len) continue;
        j->sym[right].len = 0;
        l->len += p.right_len, l->id = p.id;
        uint32_t next = p.left + l->len;
        if (next < n) j->sym[next].prev = p.left;
        if (p.left) st = offer(j, l->prev, p.left);
        if (next < n && !st) st = offer(j, p.left, next);
    }
    return st;
}

/* Byte-level BPE of one piece, bytes at .. at+n-1 of the text. */
static kv_status bpe_piece(job *j, size_t at, size_t n)
{
    const kv_vocab *v = &j->t->v;
    kv_status st;
    if (j->t->ignore_merges && n <= v->longest) {
        size_t spelled;
        if ((st = grow(&j->buf, &j->buf_cap, 2 * n, 1, j->err))) return st;
        kv_vocab_spell(j->text + at, n, j->buf, &spelled);
        uint32_t id = kv_vocab_find(v, j->buf, spelled);
        if (id != KV_NONE) return emit(j, id, at);
    }
    if ((st = grow(&j->sym, &j->sym_cap, n, sizeof *j->sym, j->err))) return st;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t b = (uint8_t)j->text[at + i];
        if (v->byte_id[b] == KV_NONE)
            return kv_fail(j->err, KV_EFORMAT, "cannot tokenize byte 0x%02x at %zu: the vocabulary has no token for it",
                           b, at + i);
        j->sym[i] = (symbol){1, i - 1, v->byte_id[b]};
    }
    st = merge_all(j, (uint32_t)n);
    for (uint32_t i = 0; i < n && !st; i += j->sym[i].len) st = emit(j, j->sym[i].id, at + i);
    return st;
}

/* Cut bytes at .. at+n-1 by the expression of `stage`, hand the pieces to the next one. */
static kv_status split(job *j, int stage, size_t at, size_t n)
{
    if (!n) return KV_OK;
    if (stage == j->t->n_stage) return bpe_piece(j, at, n);
    size_t done = 0;
    while (done < n) {
        /* the piece is a subject of its own: look-ahead must not see what another stage has cut off */
        int r =
            pcre2_match(j->t->re[stage], (PCRE2_SPTR)j->text + at, n, done, PCRE2_NO_UTF_CHECK, j->match, j->context);
        if (r == PCRE2_ERROR_NOMATCH) break;
        if (r < 0)
            return kv_fail(j->err, KV_EFORMAT, "cannot tokenize the text at byte %zu: PCRE2 error %d", at + done, r);
        const PCRE2_SIZE *o = pcre2_get_ovector_pointer(j->match);
        size_t a = o[0], b = o[1];
        if (b <= a || a < done)
            return kv_fail(j->err, KV_EFORMAT, "cannot tokenize the text at byte %zu: empty match", at);
        kv_status st = split(j, stage + 1, at + done, a - done);
        if (!st) st = split(j, stage + 1, at + a, b - a);
        if (st) return st;
        done = b;
    }
    return split(j, stage + 1, at + done, n - done);
}

static size_t char_bytes(char first)
{
    uint8_t c = (uint8_t)first;
    return c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
}

/* Bytes of symbol `at` that is no token: <0xXX> for each, or the unknown token. */
static kv_status emit_bytes(job *j, uint32_t at, uint32_t len)
{
    const kv_vocab *v = &j->t->v;
    kv_status st = KV_OK;
    for (uint32_t i = at; i < at + len && !st; i++) {
        uint8_t b = (uint8_t)j->buf[i];
        if (v->byte_id[b] != KV_NONE)
            st = emit(j, v->byte_id[b], j->origin[i]);
        else if (v->unk != KV_NONE)
            return emit(j, v->unk, j->origin[i]);
        else
            st = kv_fail(j->err, KV_EFORMAT, "cannot tokenize byte 0x%02x at %u: the vocabulary has no token for it", b,
                         j->origin[i]);
    }
    return st;
}

/* BPE by score of one stretch of text: spaces as U+2581, one in front when `prefix` (at the start of the text and
 * behind each special token: wherever a stretch begins). */
static kv_status spm_fragment(job *j, size_t at, size_t n, bool prefix)
{
    size_t spaces = prefix, len = 0;
    for (size_t i = 0; i < n; i++) spaces += j->text[at + i] == ' ';
    size_t total = n + 2 * spaces + prefix;
    kv_status st;
    if ((st = grow(&j->buf, &j->buf_cap, total, 1, j->err)) ||
        (st = grow(&j->origin, &j->origin_cap, total, sizeof *j->origin, j->err)) ||
        (st = grow(&j->sym, &j->sym_cap, total, sizeof *j->sym, j->err)))
        return st;
    uint32_t prev = 0;
    for (size_t i = prefix ? SIZE_MAX : 0; i == SIZE_MAX || i < n;) {
        bool space = i == SIZE_MAX || j->text[at + i] == ' ';
        const char *c = space ? "\xe2\x96\x81" : j->text + at + i;
        size_t bytes = char_bytes(*c);
        memcpy(j->buf + len, c, bytes);
        for (size_t k = 0; k < bytes; k++)
            j->origin[len + k] = (uint32_t)(i == SIZE_MAX ? at : space ? at + i : at + i + k);
        j->sym[len] = (symbol){(uint32_t)bytes, prev, kv_vocab_find(&j->t->v, c, bytes)};
        prev = (uint32_t)len;
        len += bytes;
        i = i == SIZE_MAX ? 0 : i + (space ? 1 : bytes);
    }
    st = merge_all(j, (uint32_t)len);
    for (uint32_t i = 0; i < len && !st; i += j->sym[i].len)
        st = j->sym[i].id == KV_NONE ? emit_bytes(j, i, j->sym[i].len) : emit(j, j->sym[i].id, j->origin[i]);
    return st;
}

/* --- special tokens --- */

static kv_status add_fragment(job *j, size_t at, size_t n, uint32_t id)
{
    if (!n) return KV_OK;
    kv_status st = grow(&j->next_frag, &j->next_cap, j->n_next + 1, sizeof *j->next_frag, j->err);
    if (!st) j->next_frag[j->n_next++] = (fragment){at, n, id};
    return st;
}

/* Cut the tokens of one length out of f. */
static kv_status cut_length(job *j, fragment f, size_t length, bool control)
{
    const kv_tokenizer *t = j->t;
    size_t from = f.at, end = f.at + f.n;
    kv_status st = KV_OK;
    for (size_t i = f.at; f.id == KV_NONE && !st && length <= end - i;) {
        uint32_t k = t->first[(uint8_t)j->text[i]] ? kv_strmap_get(&t->by_special, j->text + i, length) : KV_NONE;
        if (k == KV_NONE || (!control && t->v.type[t->special_id[k]] != KV_TOKEN_USER)) {
            i++;
            continue;
        }
        st = add_fragment(j, from, i - from, KV_NONE);
        if (!st) st = add_fragment(j, i, length, t->special_id[k]);
        i = from = i + length;
    }
    return st ? st : add_fragment(j, from, end - from, f.id);
}

static kv_status cut_special(job *j, bool control)
{
    kv_status st = add_fragment(j, 0, j->n, KV_NONE);
    for (size_t l = 0; l <= j->t->n_length && !st; l++) {
        fragment *swap = j->frag;
        size_t cap = j->frag_cap;
        j->frag = j->next_frag, j->frag_cap = j->next_cap, j->n_frag = j->n_next;
        j->next_frag = swap, j->next_cap = cap, j->n_next = 0;
        if (l == j->t->n_length) break;
        for (size_t i = 0; i < j->n_frag && !st; i++) st = cut_length(j, j->frag[i], j->t->length[l], control);
    }
    return st;
}

static kv_status start_matching(job *j)
{
    j->match = pcre2_match_data_create(1, NULL);
    j->context = pcre2_match_context_create(NULL);
    j->stack = pcre2_jit_stack_create(32 * 1024, 4 << 20, NULL);
    if (!j->match || !j->context || !j->stack) return kv_fail(j->err, KV_ENOMEM, "out of memory for the tokenizer");
    pcre2_jit_stack_assign(j->context, NULL, j->stack);
    /* linear for these expressions; the limits only turn a surprise into an error */
    pcre2_set_match_limit(j->context, 2000000000);
    pcre2_set_heap_limit(j->context, 1 << 20);
    return KV_OK;
}

kv_status kv_tokenize(const kv_tokenizer *t, const char *text, size_t n, bool special, bool bos, kv_tokens *out,
                      kv_error *err)
{
    job j = {.t = t, .text = text, .n = n, .err = err};
    memset(out, 0, sizeof *out);
    if (n > TEXT_MAX)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot tokenize %zu bytes at once (at most %u)", n, TEXT_MAX);
    size_t bad = kv_utf8_bad(text, n);
    if (bad < n) return kv_fail(err, KV_EFORMAT, "cannot tokenize the text: not valid UTF-8 at byte %zu", bad);
    kv_status st = start_matching(&j);
    if (!st) st = cut_special(&j, special);
    if (!st && bos && t->add_bos) st = emit(&j, t->v.bos, 0);
    for (size_t i = 0; i < j.n_frag && !st; i++) {
        fragment f = j.frag[i];
        if (f.id != KV_NONE)
            st = emit(&j, f.id, f.at);
        else if (t->v.kind == KV_VOCAB_BPE)
            st = split(&j, 0, f.at, f.n);
        else
            st = spm_fragment(&j, f.at, f.n, t->v.add_space_prefix);
    }
    /* never NULL, also for no tokens */
    if (!st) st = grow(&j.id, &j.id_cap, j.n_out + 1, sizeof *j.id, err);
    if (!st) st = grow(&j.offset, &j.offset_cap, j.n_out + 1, sizeof *j.offset, err);
    if (!st) {
        j.offset[j.n_out] = (uint32_t)n;
        *out = (kv_tokens){j.id, j.offset, j.n_out};
        j.id = j.offset = NULL;
    }
    pcre2_match_data_free(j.match);
    pcre2_match_context_free(j.context);
    pcre2_jit_stack_free(j.stack);
    free(j.frag), free(j.next_frag), free(j.sym), free(j.heap), free(j.buf), free(j.origin), free(j.id), free(j.offset);
    return st;
}

void kv_tokens_free(kv_tokens *t)
{
    free(t->id), free(t->offset);
    memset(t, 0, sizeof *t);
}
