/* tokenizer.c - text to token ids: byte-level BPE and SentencePiece-style BPE.
 *
 *   text -> special tokens cut out -> normalised -> other added tokens cut out -> pieces (pretok.h) -> merges -> ids
 *
 * Merging is one algorithm for all kinds: symbols in a list, the best adjacent pair from a heap, (key, position)
 * ascending; the key is the merge's rank or the inverted score. n symbols cost O(n log n) also when a text is one
 * piece. */
#include <stdlib.h>

#include "capture/vocab.h"

#define TEXT_MAX (1u << 28) /* bytes of one text */

/* Tokens that are cut out of a text as they stand. */
typedef struct {
    kv_slice *s; /* [n] */
    uint32_t *id;
    uint32_t n;
    kv_strmap map;
    size_t *length; /* [n_length] the different lengths, descending */
    size_t n_length;
    bool first[256]; /* the bytes they begin with */
} token_set;

struct kv_tokenizer {
    kv_vocab v;
    bool add_bos;
    token_set raw, normalized; /* looked for in the text; in the normalised text */
    char *pool;                /* strings of `normalized` */
    char describe[240];
};

/* ------------------------------------------------------------------------------------------------ tokenizer */

static int longer_first(const void *a, const void *b)
{
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x < y) - (x > y);
}

static bool is_special(const kv_vocab *v, uint32_t i)
{
    uint8_t type = v->type[i];
    if (v->flags && !(v->flags[i] & KV_ADDED)) return false;
    /* a string that is not UTF-8 cannot occur in a text that is */
    return (type == KV_TOKEN_CONTROL || type == KV_TOKEN_USER || type == KV_TOKEN_UNKNOWN) && v->raw[i].n &&
           kv_utf8_bad(v->raw[i].p, v->raw[i].n) == v->raw[i].n;
}

static bool is_normalized(const kv_vocab *v, uint32_t i)
{
    return v->flags && v->flags[i] & KV_ADDED_NORMALIZED;
}

/* The special tokens that are looked for in the text (or in the normalised text). */
static kv_status collect(const kv_vocab *v, bool normalized, token_set *s, kv_error *err)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < v->n; i++) n += is_special(v, i) && is_normalized(v, i) == normalized;
    kv_status st;
    if ((st = kv_array(&s->s, n, sizeof *s->s, err)) || (st = kv_array(&s->id, n, sizeof *s->id, err)) ||
        (st = kv_array(&s->length, n, sizeof *s->length, err)))
        return st;
    for (uint32_t i = 0; i < v->n; i++)
        if (is_special(v, i) && is_normalized(v, i) == normalized) s->s[s->n] = v->raw[i], s->id[s->n++] = i;
    return KV_OK;
}

static kv_status index_set(token_set *s, kv_error *err)
{
    kv_status st = kv_strmap_init(&s->map, s->s, s->n, err);
    if (st) return st;
    for (uint32_t k = 0; k < s->n; k++) {
        s->length[k] = s->s[k].n;
        if (!s->s[k].n) continue;
        kv_strmap_put(&s->map, k);
        s->first[(uint8_t)s->s[k].p[0]] = true;
    }
    qsort(s->length, s->n, sizeof *s->length, longer_first);
    for (uint32_t i = 0; i < s->n; i++)
        if (s->length[i] && (!i || s->length[i] != s->length[i - 1])) s->length[s->n_length++] = s->length[i];
    return KV_OK;
}

/* Normal form C and the rule for spaces that belongs to it. *a holds the text, then the result. */
static kv_status normalize(const kv_vocab *v, bool first, kv_stretch *a, kv_stretch *b, kv_error *err)
{
    kv_status st = KV_OK;
    if (v->nfc && !(st = kv_stretch_nfc(a, b, err))) {
        kv_stretch swap = *a;
        *a = *b, *b = swap;
    }
    if (!st && (v->normal.prefix || v->normal.mark) && !(st = kv_stretch_spaces(a, v->normal, first, b, err))) {
        kv_stretch swap = *a;
        *a = *b, *b = swap;
    }
    return st;
}

/* Such tokens are found in their normalised spelling. */
static kv_status normalize_set(kv_tokenizer *t, kv_error *err)
{
    token_set *s = &t->normalized;
    kv_stretch a = {0}, b = {0};
    size_t total = 0, at = 0;
    kv_status st = KV_OK;
    for (int pass = 0; pass < 2 && !st; pass++) {
        if (pass) st = kv_array(&t->pool, total, 1, err);
        for (uint32_t k = 0; k < s->n && !st; k++) {
            kv_slice raw = t->v.raw[s->id[k]];
            if ((st = kv_stretch_set(&a, raw.p, raw.n, 0, err)) || (st = normalize(&t->v, true, &a, &b, err))) break;
            if (!pass) {
                total += a.n;
                continue;
            }
            memcpy(t->pool + at, a.p, a.n);
            s->s[k] = (kv_slice){t->pool + at, a.n};
            at += a.n;
        }
    }
    kv_stretch_free(&a), kv_stretch_free(&b);
    return st;
}

static void describe(kv_tokenizer *t)
{
    const kv_vocab *v = &t->v;
    const char *nfc = v->nfc ? ", NFC" : "";
    if (v->hf)
        snprintf(t->describe, sizeof t->describe, "%s BPE, tokenizer.json%s, %u tokens",
                 v->kind == KV_VOCAB_SPM ? "SentencePiece-style" : "byte-level", nfc, v->n);
    else if (v->kind == KV_VOCAB_SPM)
        snprintf(t->describe, sizeof t->describe, "SentencePiece-style BPE by score, %u tokens", v->n);
    else
        snprintf(t->describe, sizeof t->describe, "byte-level BPE, pre %s%s, %u tokens", v->pre.s,
                 v->pre_named ? "" : " (a guess: the file names none, so tokens may differ from the model's own)",
                 v->n);
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
    if (t->v.kind == KV_VOCAB_BPE && !t->v.hf) {
        bool llama3 = false;
        st = kv_pretok_named(t->v.pre.s, &t->v.cut, &llama3, err);
        t->v.ignore_merges = llama3;
        if (t->v.add_bos < 0) t->add_bos = llama3;
    }
    if (!st) st = collect(&t->v, false, &t->raw, err);
    if (!st) st = collect(&t->v, true, &t->normalized, err);
    if (!st) st = normalize_set(t, err);
    if (!st) st = index_set(&t->raw, err);
    if (!st) st = index_set(&t->normalized, err);
    if (st) {
        kv_tokenizer_close(t);
        return st;
    }
    if (t->v.bos == KV_NONE) t->add_bos = false;
    describe(t);
    *out = t;
    return KV_OK;
}

static void free_set(token_set *s)
{
    kv_strmap_fini(&s->map);
    free(s->s), free(s->id), free(s->length);
}

void kv_tokenizer_close(kv_tokenizer *t)
{
    if (!t) return;
    free_set(&t->raw), free_set(&t->normalized);
    free(t->pool);
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

/* A stretch of a text: a special token, or text still to be tokenised (id KV_NONE). */
typedef struct {
    size_t at, n;
    uint32_t id;
} fragment;

typedef struct {
    fragment *v, *next;
    size_t n, n_next, cap, next_cap;
} fragments;

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
    const kv_tokenize_options *o;
    fragments frag, inner;
    kv_stretch text, a, b; /* a and b: on the way */
    const char *view;      /* the piece that is being merged */
    const uint32_t *origin;
    const kv_stretch *from; /* what pieces are cut from, from byte from_at */
    size_t from_at;
    symbol *sym;
    size_t sym_cap;
    pair *heap;
    size_t n_heap, heap_cap;
    char *spelled;
    size_t spelled_cap;
    uint32_t *id, *offset;
    size_t n_out, id_cap, offset_cap;
    uint32_t unk_end; /* the last token is the unknown one, and its text ends here */
    kv_pretok_room room;
    kv_error *err;
} job;

static kv_status emit(job *j, uint32_t id, size_t at)
{
    kv_status st = kv_grow(&j->id, &j->id_cap, j->n_out + 1, sizeof *j->id, j->err);
    if (!st) st = kv_grow(&j->offset, &j->offset_cap, j->n_out + 2, sizeof *j->offset, j->err);
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
    kv_status st = kv_grow(&j->heap, &j->heap_cap, j->n_heap + 1, sizeof *j->heap, j->err);
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
    if (v->kind == KV_VOCAB_BPE || v->by_rank) {
        const kv_merge *m = kv_vocab_merge(v, l->id, r->id);
        if (!m) return KV_OK;
        p.key = m->rank, p.id = m->id;
    } else {
        p.id = kv_vocab_find(v, j->view + left, (size_t)l->len + r->len);
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

/* A byte that no token stands for. */
static kv_status no_token(const job *j, size_t i)
{
    return kv_fail(j->err, KV_EFORMAT, "cannot tokenize byte 0x%02x at %u: the vocabulary has no token for it",
                   (uint8_t)j->view[i], j->origin[i]);
}

/* The whole piece as a token, where pieces that are tokens stay whole. */
static kv_status whole_piece(job *j, size_t n, bool *done)
{
    const kv_vocab *v = &j->t->v;
    const char *s = j->view;
    size_t len = n;
    *done = false;
    if (!v->ignore_merges || n > v->longest) return KV_OK;
    if (v->kind == KV_VOCAB_BPE) {
        kv_status st = kv_grow(&j->spelled, &j->spelled_cap, 2 * n, 1, j->err);
        if (st) return st;
        kv_vocab_spell(s, n, j->spelled, &len);
        s = j->spelled;
    }
    uint32_t id = kv_vocab_find(v, s, len);
    *done = id != KV_NONE;
    return *done ? emit(j, id, j->origin[0]) : KV_OK;
}

/* One symbol a byte. */
static kv_status byte_symbols(job *j, size_t n)
{
    const kv_vocab *v = &j->t->v;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t b = (uint8_t)j->view[i];
        if (v->byte_id[b] == KV_NONE) return no_token(j, i);
        j->sym[i] = (symbol){1, i - 1, v->byte_id[b]};
    }
    return KV_OK;
}

/* One symbol a character. By rank, a character that is no token is its bytes from the beginning, by score in the end:
 * it may still become part of a longer token. */
static void char_symbols(job *j, size_t n)
{
    const kv_vocab *v = &j->t->v;
    uint32_t prev = 0;
    for (uint32_t i = 0; i < n;) {
        uint32_t bytes = (uint32_t)kv_char_bytes(j->view[i]), id = kv_vocab_find(v, j->view + i, bytes), k = 0;
        while (v->by_rank && id == KV_NONE && k < bytes && v->byte_id[(uint8_t)j->view[i + k]] != KV_NONE) k++;
        if (k < bytes) {
            j->sym[i] = (symbol){bytes, prev, id};
            prev = i, i += bytes;
            continue;
        }
        for (k = 0; k < bytes; k++, prev = i++) j->sym[i] = (symbol){1, prev, v->byte_id[(uint8_t)j->view[i]]};
    }
}

/* Bytes of a symbol that is no token: <0xXX> for each, or the unknown token. */
static kv_status emit_bytes(job *j, uint32_t at, uint32_t len)
{
    const kv_vocab *v = &j->t->v;
    kv_status st = KV_OK;
    for (uint32_t i = at; i < at + len && !st; i++) {
        uint8_t b = (uint8_t)j->view[i];
        if (v->byte_id[b] != KV_NONE && !v->by_rank) {
            st = emit(j, v->byte_id[b], j->origin[i]);
        } else if (v->unk != KV_NONE) {
            bool again = v->fuse_unk && j->n_out && j->id[j->n_out - 1] == v->unk && j->unk_end == j->origin[at];
            j->unk_end = j->origin[at] + len;
            return again ? KV_OK : emit(j, v->unk, j->origin[i]);
        } else {
            st = no_token(j, i);
        }
    }
    return st;
}

/* One piece of what is being cut. */
static kv_status merge_piece(void *ctx, size_t at, size_t n)
{
    job *j = ctx;
    kv_status st;
    bool done;
    j->view = j->from->p + j->from_at + at, j->origin = j->from->origin + j->from_at + at;
    if ((st = whole_piece(j, n, &done)) || done) return st;
    if ((st = kv_grow(&j->sym, &j->sym_cap, n, sizeof *j->sym, j->err))) return st;
    if (j->t->v.kind == KV_VOCAB_SPM)
        char_symbols(j, n);
    else if ((st = byte_symbols(j, n)))
        return st;
    st = merge_all(j, (uint32_t)n);
    for (uint32_t i = 0; i < n && !st; i += j->sym[i].len)
        st = j->sym[i].id == KV_NONE ? emit_bytes(j, i, j->sym[i].len) : emit(j, j->sym[i].id, j->origin[i]);
    return st;
}

/* --- special tokens --- */

/* Bytes of the white space character (Unicode White_Space) at p, 0 when there is none. */
static size_t space_at(const char *p, size_t n)
{
    static const char *const wide[] = {"\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\xa8",
                                       "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"};
    if (n && (*p == ' ' || (*p >= '\t' && *p <= '\r'))) return 1;
    if (n >= 3 && !memcmp(p, "\xe2\x80", 2) && (uint8_t)p[2] >= 0x80 && (uint8_t)p[2] <= 0x8a) return 3;
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (n >= strlen(wide[i]) && !memcmp(p, wide[i], strlen(wide[i]))) return strlen(wide[i]);
    return 0;
}

static kv_status add_fragment(job *j, fragments *f, size_t at, size_t n, uint32_t id)
{
    if (!n) return KV_OK;
    kv_status st = kv_grow(&f->next, &f->next_cap, f->n_next + 1, sizeof *f->next, j->err);
    if (!st) f->next[f->n_next++] = (fragment){at, n, id};
    return st;
}

/* May the token stand at bytes i .. of the text? Control tokens stand where the caller wants them parsed. */
static bool allowed(const job *j, const kv_stretch *s, size_t i, size_t n, uint32_t id)
{
    const kv_tokenize_options *o = j->o;
    if (j->t->v.type[id] == KV_TOKEN_USER) return true;
    size_t a = s->origin[i], b = s->origin[i + n - 1];
    return o->special && (b < o->literal_at || a >= o->literal_at + o->literal_n);
}

/* The token of the set, of one of these lengths, that stands at byte i, KV_NONE when none does. */
static uint32_t token_at(const job *j, const token_set *set, const kv_stretch *s, size_t i, size_t end,
                         const size_t *length, size_t n_length, size_t *n)
{
    if (!set->first[(uint8_t)s->p[i]]) return KV_NONE;
    for (size_t l = 0; l < n_length; l++) {
        uint32_t k = length[l] <= end - i ? kv_strmap_get(&set->map, s->p + i, length[l]) : KV_NONE;
        if (k == KV_NONE || !allowed(j, s, i, length[l], set->id[k])) continue;
        *n = length[l];
        return set->id[k];
    }
    return KV_NONE;
}

/* Cut the tokens of some lengths out of one fragment. */
static kv_status cut_fragment(job *j, const token_set *set, const kv_stretch *s, fragment f, fragments *to,
                              const size_t *length, size_t n_length)
{
    size_t from = f.at, end = f.at + f.n, n, w;
    kv_status st = KV_OK;
    if (f.id != KV_NONE) return add_fragment(j, to, f.at, f.n, f.id);
    for (size_t i = f.at; i < end && !st;) {
        uint32_t id = token_at(j, set, s, i, end, length, n_length, &n);
        if (id == KV_NONE) {
            i++;
            continue;
        }
        uint8_t flags = j->t->v.flags ? j->t->v.flags[id] : 0;
        size_t at = i, stop = i + n;
        if (flags & KV_ADDED_STRIP_LEFT)
            for (bool more = true; more;) {
                more = false;
                for (size_t k = 1; k <= 3 && at >= from + k && !more; k++)
                    if (space_at(s->p + at - k, k) == k) at -= k, more = true;
            }
        if (flags & KV_ADDED_STRIP_RIGHT)
            while (stop < end && (w = space_at(s->p + stop, end - stop))) stop += w;
        if (at > from) st = add_fragment(j, to, from, at - from, KV_NONE);
        if (!st) st = add_fragment(j, to, at, stop - at, id);
        /* the white space behind a token may be a token too: it then stands twice, as with Hugging Face */
        i += n, from = stop;
    }
    return st ? st : add_fragment(j, to, from, end - from, KV_NONE);
}

/* Cut the tokens of the set out of s: leftmost, then longest (Hugging Face), or the longest first (llama.cpp). */
static kv_status cut_special(job *j, const token_set *set, const kv_stretch *s, fragments *f)
{
    size_t passes = j->t->v.hf ? 1 : set->n_length;
    f->n_next = 0;
    kv_status st = add_fragment(j, f, 0, s->n, KV_NONE);
    for (size_t pass = 0; pass <= passes && !st; pass++) {
        fragment *swap = f->v;
        size_t cap = f->cap;
        f->v = f->next, f->cap = f->next_cap, f->n = f->n_next;
        f->next = swap, f->next_cap = cap, f->n_next = 0;
        if (pass == passes) break;
        for (size_t i = 0; i < f->n && !st; i++)
            st = j->t->v.hf ? cut_fragment(j, set, s, f->v[i], f, set->length, set->n_length)
                            : cut_fragment(j, set, s, f->v[i], f, set->length + pass, 1);
    }
    return st;
}

/* A stretch of normalised text without special tokens: bytes at .. at+n-1 of s. */
static kv_status cut_text(job *j, const kv_stretch *s, size_t at, size_t n)
{
    const kv_vocab *v = &j->t->v;
    kv_status st;
    j->from = s, j->from_at = at;
    if (v->before_cut.prefix || v->before_cut.mark) {
        kv_stretch part = {.p = s->p + at, .origin = s->origin + at, .n = n};
        if ((st = kv_stretch_spaces(&part, v->before_cut, !s->origin[at], &j->b, j->err))) return st;
        j->from = &j->b, j->from_at = 0, n = j->b.n;
    }
    return kv_pretok_split(&v->cut, &j->room, j->from->p + j->from_at, n, merge_piece, j, j->err);
}

/* A stretch of the text between special tokens. */
static kv_status tokenize_text(job *j, fragment f)
{
    const kv_vocab *v = &j->t->v;
    kv_status st = KV_OK;
    if (!v->nfc && !v->normal.prefix && !v->normal.mark && !j->t->normalized.n) return cut_text(j, &j->text, f.at, f.n);
    if ((st = kv_stretch_set(&j->a, j->text.p + f.at, f.n, f.at, j->err)) ||
        (st = normalize(v, !f.at, &j->a, &j->b, j->err)) || (st = cut_special(j, &j->t->normalized, &j->a, &j->inner)))
        return st;
    for (size_t i = 0; i < j->inner.n && !st; i++) {
        fragment g = j->inner.v[i];
        st = g.id != KV_NONE ? emit(j, g.id, j->a.origin[g.at]) : cut_text(j, &j->a, g.at, g.n);
    }
    return st;
}

kv_status kv_tokenize_with(const kv_tokenizer *t, const char *text, size_t n, const kv_tokenize_options *o,
                           kv_tokens *out, kv_error *err)
{
    job j = {.t = t, .o = o, .err = err};
    memset(out, 0, sizeof *out);
    if (n > TEXT_MAX)
        return kv_fail(err, KV_EUNSUPPORTED, "cannot tokenize %zu bytes at once (at most %u)", n, TEXT_MAX);
    size_t bad = kv_utf8_bad(text, n);
    if (bad < n) return kv_fail(err, KV_EFORMAT, "cannot tokenize the text: not valid UTF-8 at byte %zu", bad);
    kv_status st = kv_pretok_room_init(&j.room, err);
    if (!st) st = kv_stretch_set(&j.text, text, n, 0, err);
    if (!st) st = cut_special(&j, &t->raw, &j.text, &j.frag);
    if (!st && t->v.bos != KV_NONE && (o->bos == KV_BOS_ALWAYS || (o->bos == KV_BOS_FILE && t->add_bos)))
        st = emit(&j, t->v.bos, 0);
    for (size_t i = 0; i < j.frag.n && !st; i++) {
        fragment f = j.frag.v[i];
        st = f.id != KV_NONE ? emit(&j, f.id, f.at) : tokenize_text(&j, f);
    }
    /* never NULL, also for no tokens */
    if (!st) st = kv_grow(&j.id, &j.id_cap, j.n_out + 1, sizeof *j.id, err);
    if (!st) st = kv_grow(&j.offset, &j.offset_cap, j.n_out + 1, sizeof *j.offset, err);
    if (!st) {
        j.offset[j.n_out] = (uint32_t)n;
        *out = (kv_tokens){j.id, j.offset, j.n_out};
        j.id = j.offset = NULL;
    }
    kv_pretok_room_free(&j.room);
    kv_stretch_free(&j.text), kv_stretch_free(&j.a), kv_stretch_free(&j.b);
    free(j.frag.v), free(j.frag.next), free(j.inner.v), free(j.inner.next);
    free(j.sym), free(j.heap), free(j.spelled), free(j.id), free(j.offset);
    return st;
}

kv_status kv_tokenize(const kv_tokenizer *t, const char *text, size_t n, bool special, bool bos, kv_tokens *out,
                      kv_error *err)
{
    kv_tokenize_options o = {.special = special, .bos = bos ? KV_BOS_FILE : KV_BOS_NEVER};
    return kv_tokenize_with(t, text, n, &o, out, err);
}

void kv_tokens_free(kv_tokens *t)
{
    free(t->id), free(t->offset);
    memset(t, 0, sizeof *t);
}
