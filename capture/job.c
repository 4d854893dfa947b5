/* job.c - from texts and token files to jobs (job.h). */
#include "capture/job.h"

#include <stdlib.h>

#include "capture/tokenizer.h"
#include "traces/cli.h"
#include "traces/json.h"

#define TOKEN_FILE_MAX ((size_t)1 << 30)
#define RANDOM         "random:"

static kv_status no_memory(kv_error *err)
{
    return kv_fail(err, KV_ENOMEM, "out of memory for the tokens of a prompt");
}

static kv_status check_length(const kv_job *j, kv_error *err)
{
    if (!j->n_prompt) return kv_fail(err, KV_EMISUSE, "prompt '%s' has no tokens", j->id);
    if (j->n_token > KV_TOKENS_MAX)
        return kv_fail(err, KV_EUNSUPPORTED, "prompt '%s' has more than %u tokens", j->id, KV_TOKENS_MAX);
    return KV_OK;
}

/* Room for n_greedy more tokens when the text has no continuation. */
static kv_status add_greedy(kv_job *j, uint32_t decode, kv_error *err)
{
    if (j->n_token > j->n_prompt || decode == KV_JOB_DECODE_ALL || !decode) return KV_OK;
    if (decode > KV_TOKENS_MAX - j->n_token)
        return kv_fail(err, KV_EUNSUPPORTED, "prompt '%s': --decode %u makes more than %u tokens", j->id, decode,
                       KV_TOKENS_MAX);
    uint32_t *more = realloc(j->token, ((size_t)j->n_token + decode) * sizeof *more);
    if (!more) return no_memory(err);
    memset(more + j->n_token, 0, decode * sizeof *more);
    j->token = more, j->n_greedy = decode, j->n_token += decode;
    return KV_OK;
}

static kv_status copy_string(const char *from, char **to, kv_error *err)
{
    if (from && !(*to = kv_format("%s", from))) return no_memory(err);
    return KV_OK;
}

/* The spans that lie inside the text; a continuation that is cut short may leave some outside. */
static kv_status copy_spans(const kv_prompt *p, kv_job *j, kv_error *err)
{
    kv_status st = kv_array(&j->evidence, p->n_evidence, sizeof *j->evidence, err);
    if (st) return st;
    for (uint32_t i = 0; i < p->n_evidence; i++)
        if (p->evidence[i].end <= j->n_text) j->evidence[j->n_evidence++] = p->evidence[i];
    if (p->question.end <= j->n_text) j->question = p->question;
    return KV_OK;
}

kv_status kv_job_from_prompt(const kv_model *m, const kv_prompt *p, const kv_job_options *o, kv_job *out, kv_error *err)
{
    kv_tokenize_options as = {.special = o->special, .bos = KV_BOS_FILE};
    uint32_t decode = o->decode;
    size_t prompt_end, literal_n;
    kv_prompt turn = {0};
    kv_tokens prompt = {0}, rest = {0};
    kv_error why;
    kv_job *j = out;
    kv_status st;

    *j = (kv_job){0};
    if ((st = copy_string(p->id, &j->id, err)) || (st = copy_string(p->category, &j->category, err)) ||
        (st = copy_string(p->extra, &j->extra, err)))
        goto out;
    if (!m->tok) {
        st = kv_fail(err, KV_EMISSING, "model '%s' has no vocabulary: give the prompt with --tokens", m->desc.file);
        goto out;
    }
    if (o->chat) {
        if ((st = kv_chat_wrap(o->chat, p, &turn, &as.literal_at, &literal_n, err))) goto out;
        as.literal_n = o->special ? 0 : literal_n;
        as.special = true, as.bos = o->chat->bos;
        p = &turn, j->chat = o->chat->name;
    }
    prompt_end = p->prompt_end == SIZE_MAX ? p->n_text : p->prompt_end;
    if ((st = kv_tokenize_with(m->tok, p->text, prompt_end, &as, &prompt, &why)) ||
        (decode &&
         (st = kv_tokenize(m->tok, p->text + prompt_end, p->n_text - prompt_end, o->special, false, &rest, &why)))) {
        kv_fail(err, st, "prompt '%s': %s", p->id, why.msg);
        goto out;
    }
    if (rest.n > decode) rest.n = decode;
    if (prompt.n > KV_TOKENS_MAX || rest.n > KV_TOKENS_MAX) {
        st = kv_fail(err, KV_EUNSUPPORTED, "prompt '%s' has more than %u tokens", p->id, KV_TOKENS_MAX);
        goto out;
    }
    j->n_prompt = (uint32_t)prompt.n, j->n_token = (uint32_t)(prompt.n + rest.n);
    if ((st = check_length(j, err)) || (st = kv_array(&j->token, j->n_token, sizeof *j->token, err)) ||
        (st = kv_array(&j->offset, j->n_token + (size_t)1, sizeof *j->offset, err)))
        goto out;
    memcpy(j->token, prompt.id, prompt.n * sizeof *j->token);
    memcpy(j->offset, prompt.offset, prompt.n * sizeof *j->offset);
    j->n_text = prompt_end;
    for (size_t i = 0; i < rest.n; i++) {
        j->token[prompt.n + i] = rest.id[i];
        j->offset[prompt.n + i] = (uint32_t)prompt_end + rest.offset[i];
    }
    if (rest.n) j->n_text += rest.offset[rest.n]; /* a continuation cut short ends where its next token begins */
    j->offset[j->n_token] = (uint32_t)j->n_text;
    if ((st = kv_array(&j->text, j->n_text + 1, 1, err))) goto out;
    memcpy(j->text, p->text, j->n_text);
    /* The context is what ends before the question begins: a token across the border has seen the question. */
    for (uint32_t i = 0; p->context_end != SIZE_MAX && i < j->n_prompt; i++) {
        size_t end = i + 1 < j->n_prompt ? j->offset[i + 1] : prompt_end;
        if (end <= p->context_end) j->n_context = i + 1;
    }
    if (j->n_context == j->n_prompt) j->n_context = 0; /* no question: nothing to cut before */
    if ((st = copy_spans(p, j, err))) goto out;
    st = add_greedy(j, decode, err);
out:
    kv_tokens_free(&prompt);
    kv_tokens_free(&rest);
    kv_chat_unwrap(&turn);
    if (st) kv_job_free(j);
    return st;
}

/* The bytes of tokens first..n_token-1 behind the text. A model without vocabulary gives tokens of no bytes. */
static kv_status append_text(const kv_model *m, kv_job *j, uint32_t first, kv_error *err)
{
    size_t total = j->n_text, n;
    for (uint32_t i = first; m->tok && i < j->n_token; i++) {
        kv_token_bytes(m->tok, j->token[i], &n);
        if (!kv_add(total, n, &total) || total >= UINT32_MAX)
            return kv_fail(err, KV_EUNSUPPORTED, "prompt '%s': the text of its tokens passes 4 GiB", j->id);
    }
    char *text = realloc(j->text, total + 1);
    if (text) j->text = text;
    uint32_t *offset = realloc(j->offset, ((size_t)j->n_token + 1) * sizeof *offset);
    if (offset) j->offset = offset;
    if (!text || !offset) return no_memory(err);
    for (uint32_t i = first; i < j->n_token; i++) {
        offset[i] = (uint32_t)j->n_text;
        if (!m->tok) continue;
        const char *bytes = kv_token_bytes(m->tok, j->token[i], &n);
        memcpy(text + j->n_text, bytes, n);
        j->n_text += n;
    }
    offset[j->n_token] = (uint32_t)j->n_text;
    text[j->n_text] = 0;
    return KV_OK;
}

static kv_status read_ids(const char *path, kv_job *j, uint32_t n_vocab, kv_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    json_error_t why;
    kv_status st = kv_read_file(path, TOKEN_FILE_MAX, &bytes, &n, err);
    if (st) return st;
    json_t *a = kv_json_load(bytes, n, 0, KV_TOKENS_MAX + (size_t)1, &why);
    free(bytes);
    if (!json_is_array(a)) {
        st = kv_fail(err, KV_EFORMAT, "tokens '%s': not a JSON array of token ids%s%s", path, a ? "" : ": ",
                     a ? "" : why.text);
        goto out;
    }
    if (json_array_size(a) > KV_TOKENS_MAX) {
        st = kv_fail(err, KV_EUNSUPPORTED, "tokens '%s': more than %u tokens", path, KV_TOKENS_MAX);
        goto out;
    }
    j->n_token = (uint32_t)json_array_size(a);
    if ((st = kv_array(&j->token, j->n_token, sizeof *j->token, err))) goto out;
    for (uint32_t i = 0; i < j->n_token; i++) {
        json_t *v = json_array_get(a, i);
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= (json_int_t)n_vocab) {
            char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT);
            st = kv_fail(err, KV_EMISUSE, "tokens '%s': entry %u is %.40s, not a token id below %u", path, i,
                         text ? text : "?", n_vocab);
            free(text);
            goto out;
        }
        j->token[i] = (uint32_t)json_integer_value(v);
    }
out:
    json_decref(a);
    return st;
}

/* "random:N" or "random:N:SEED". */
static kv_status random_ids(const char *what, kv_job *j, uint32_t n_vocab, kv_error *err)
{
    char *text = kv_format("%s", what + strlen(RANDOM)), *colon = text ? strchr(text, ':') : NULL;
    uint64_t n = 0;
    kv_rng r = {1};
    kv_status st = text ? KV_OK : no_memory(err);

    if (colon) *colon = 0;
    if (!st && (!kv_parse_u64(text, &n) || !n || n > KV_TOKENS_MAX || (colon && !kv_parse_u64(colon + 1, &r.s))))
        st =
            kv_fail(err, KV_EMISUSE, "tokens '%s': use random:N or random:N:SEED, N from 1 to %u", what, KV_TOKENS_MAX);
    j->n_token = (uint32_t)n;
    if (!st) st = kv_array(&j->token, j->n_token, sizeof *j->token, err);
    for (uint32_t i = 0; i < j->n_token && !st; i++) j->token[i] = (uint32_t)(kv_rng_next(&r) % n_vocab);
    free(text);
    return st;
}

kv_status kv_job_from_tokens(const kv_model *m, const char *path, uint32_t n_prompt, uint32_t decode, kv_job *out,
                             kv_error *err)
{
    kv_job *j = out;
    const char *base = strrchr(path, '/');
    kv_status st;

    bool random = !strncmp(path, RANDOM, strlen(RANDOM));

    *j = (kv_job){0};
    base = base && !random ? base + 1 : path;
    if (!(j->id = kv_format("%.*s", (int)strcspn(base, "."), base))) return no_memory(err);
    for (char *c = j->id; random && *c; c++) *c = *c == ':' ? '-' : *c;
    st = random ? random_ids(path, j, m->desc.n_vocab, err) : read_ids(path, j, m->desc.n_vocab, err);
    if (st) goto out;
    if (n_prompt > j->n_token) {
        st = kv_fail(err, KV_EMISUSE, "tokens '%s': --prompt-tokens %u of %u tokens", path, n_prompt, j->n_token);
        goto out;
    }
    j->n_prompt = n_prompt ? n_prompt : j->n_token;
    if (j->n_token - j->n_prompt > decode) j->n_token = j->n_prompt + decode;
    if ((st = check_length(j, err))) goto out;
    if ((st = append_text(m, j, 0, err))) goto out;
    st = add_greedy(j, decode, err);
out:
    if (st) kv_job_free(j);
    return st;
}

kv_status kv_job_add_text(const kv_model *m, kv_job *j, kv_error *err)
{
    return append_text(m, j, j->n_token - j->n_greedy, err);
}

void kv_job_free(kv_job *j)
{
    free(j->id), free(j->category), free(j->token), free(j->offset), free(j->text), free(j->evidence), free(j->extra);
    *j = (kv_job){0};
}
