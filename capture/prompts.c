/* prompts.c - prompt sets (prompts.h). */
#include "capture/prompts.h"

#include <stdlib.h>

#include "traces/json.h"

#define SET_MAX    ((size_t)1 << 30) /* bytes of a set or of one text */
#define ID_MAX     200u
#define VALUES_MAX (1u << 20) /* JSON values of a prompt */

/* Where an error is. */
typedef struct {
    const char *path;
    size_t line;
} place;

static kv_status bad(kv_error *err, const place *at, const char *field, const char *why)
{
    return kv_fail(err, KV_EFORMAT, "prompts '%s', line %zu: field '%s' %s", at->path, at->line, field, why);
}

/* Ids become file names. */
static bool id_ok(const char *id)
{
    if (!*id || *id == '.' || *id == '-' || strlen(id) > ID_MAX) return false;
    for (const char *c = id; *c; c++)
        if ((unsigned char)*c <= ' ' || *c == '/' || *c == 127) return false;
    return true;
}

/* Removes the field from the object; *out stays as it is when the field is absent or null. */
static kv_status take_string(json_t *o, const char *field, char **out, const place *at, kv_error *err)
{
    json_t *v = json_object_get(o, field);
    if (v && !json_is_null(v)) {
        if (!json_is_string(v) || strlen(json_string_value(v)) != json_string_length(v))
            return bad(err, at, field, "is not a string without zero bytes");
        if (!(*out = kv_format("%s", json_string_value(v))))
            return kv_fail(err, KV_ENOMEM, "out of memory for a prompt");
    }
    json_object_del(o, field);
    return KV_OK;
}

static kv_status take_size(json_t *o, const char *field, size_t *out, const place *at, kv_error *err)
{
    json_t *v = json_object_get(o, field);
    if (v && !json_is_null(v)) {
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > (json_int_t)SET_MAX)
            return bad(err, at, field, "is not a byte position");
        *out = (size_t)json_integer_value(v);
    }
    json_object_del(o, field);
    return KV_OK;
}

static bool span_of(const json_t *v, kv_span *out)
{
    json_t *a = json_array_get(v, 0), *b = json_array_get(v, 1);
    if (json_array_size(v) != 2 || !json_is_integer(a) || !json_is_integer(b)) return false;
    json_int_t from = json_integer_value(a), to = json_integer_value(b);
    if (from < 0 || to < from || to > (json_int_t)SET_MAX) return false;
    *out = (kv_span){(uint32_t)from, (uint32_t)to};
    return true;
}

static kv_status take_spans(json_t *o, kv_prompt *p, const place *at, kv_error *err)
{
    json_t *question = json_object_get(o, "question_span"), *evidence = json_object_get(o, "evidence");
    kv_status st;
    if (question && !json_is_null(question) && !span_of(question, &p->question))
        return bad(err, at, "question_span", "is not [start, end) in bytes");
    if (evidence && !json_is_null(evidence)) {
        if (!json_is_array(evidence)) return bad(err, at, "evidence", "is not a list of [start, end)");
        if ((st = kv_array(&p->evidence, json_array_size(evidence), sizeof *p->evidence, err))) return st;
        for (; p->n_evidence < json_array_size(evidence); p->n_evidence++)
            if (!span_of(json_array_get(evidence, p->n_evidence), &p->evidence[p->n_evidence]))
                return bad(err, at, "evidence", "is not a list of [start, end) in bytes");
    }
    json_object_del(o, "question_span");
    json_object_del(o, "evidence");
    return KV_OK;
}

/* The set's folder joined with a path in it. */
static char *beside(const char *set, const char *file)
{
    const char *slash = strrchr(set, '/');
    if (*file == '/' || !slash) return kv_format("%s", file);
    return kv_format("%.*s/%s", (int)(slash - set), set, file);
}

static kv_status take_text(json_t *o, kv_prompt *p, const place *at, kv_error *err)
{
    json_t *text = json_object_get(o, "text");
    char *file = NULL;
    kv_status st = take_string(o, "file", &file, at, err);

    if (st) goto out;
    if (file && text)
        st = bad(err, at, "file", "stands beside 'text': give one of the two");
    else if (!file && !json_is_string(text))
        st = bad(err, at, "file", "or 'text' is missing");
    else if (file) {
        if (!*file)
            st = bad(err, at, "file", "is empty");
        else if (!(p->path = beside(at->path, file)))
            st = kv_fail(err, KV_ENOMEM, "out of memory for a prompt");
    } else if (!(st = kv_array(&p->text, json_string_length(text) + 1, 1, err))) {
        memcpy(p->text, json_string_value(text), p->n_text = json_string_length(text));
    }
    json_object_del(o, "text");
out:
    free(file);
    return st;
}

static kv_status parse_line(const char *line, size_t n, kv_prompt *p, const place *at, kv_error *err)
{
    json_error_t why;
    json_t *o = kv_json_load(line, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, VALUES_MAX, &why);
    kv_status st = KV_OK;

    p->prompt_end = p->context_end = p->bytes = SIZE_MAX;
    if (!json_is_object(o)) {
        st = kv_fail(err, KV_EFORMAT, "prompts '%s', line %zu: not a JSON object%s%s", at->path, at->line,
                     o ? "" : ": ", o ? "" : why.text);
        goto out;
    }
    if ((st = take_string(o, "id", &p->id, at, err))) goto out;
    if (!p->id || !id_ok(p->id)) {
        st = bad(err, at, "id", p->id ? "is not fit for a file name (no '/', blanks or leading dot)" : "is missing");
        goto out;
    }
    if ((st = take_string(o, "category", &p->category, at, err)) ||
        (st = take_string(o, "sha256", &p->sha256, at, err)) || (st = take_text(o, p, at, err)) ||
        (st = take_size(o, "bytes", &p->bytes, at, err)) ||
        (st = take_size(o, "prompt_end_byte", &p->prompt_end, at, err)) ||
        (st = take_size(o, "context_end_byte", &p->context_end, at, err)) || (st = take_spans(o, p, at, err)))
        goto out;
    if (json_object_size(o)) {
        char *dump = json_dumps(o, JSON_SORT_KEYS | JSON_COMPACT);
        p->extra = dump ? kv_format("%s", dump) : NULL; /* a copy: jansson may have an allocator of its own */
        free(dump);
        if (!p->extra) st = kv_fail(err, KV_ENOMEM, "out of memory for a prompt");
    }
out:
    json_decref(o);
    return st;
}

static int by_id(const void *a, const void *b)
{
    return strcmp((*(const kv_prompt *const *)a)->id, (*(const kv_prompt *const *)b)->id);
}

static kv_status check_unique(const kv_prompts *p, const char *path, kv_error *err)
{
    const kv_prompt **sorted = NULL;
    kv_status st = kv_array(&sorted, p->n, sizeof(const kv_prompt *), err);
    if (st) return st;
    for (size_t i = 0; i < p->n; i++) sorted[i] = &p->v[i];
    qsort(sorted, p->n, sizeof *sorted, by_id);
    for (size_t i = 1; i < p->n && !st; i++)
        if (!strcmp(sorted[i]->id, sorted[i - 1]->id))
            st = kv_fail(err, KV_EFORMAT, "prompts '%s': id '%s' occurs twice", path, sorted[i]->id);
    free(sorted);
    return st;
}

static bool blank(const char *s, size_t n)
{
    while (n && (*s == ' ' || *s == '\t' || *s == '\r')) s++, n--;
    return !n;
}

kv_status kv_prompts_read(const char *path, kv_prompts *out, kv_error *err)
{
    place at = {.path = path};
    uint8_t *bytes = NULL;
    size_t n = 0, lines = 1;
    kv_status st = kv_read_file(path, SET_MAX, &bytes, &n, err);

    *out = (kv_prompts){0};
    if (st) return st;
    for (size_t i = 0; i < n; i++) lines += bytes[i] == '\n';
    for (size_t i = 0, a = 0; i <= n; i++) { /* count first: a prompt takes more memory than a line break */
        if (i < n && bytes[i] != '\n') continue;
        if (blank((char *)bytes + a, i - a)) lines--;
        a = i + 1;
    }
    if ((st = kv_array(&out->v, lines, sizeof *out->v, err))) goto out;
    for (size_t i = 0, a = 0; i <= n; i++) {
        if (i < n && bytes[i] != '\n') continue;
        at.line++;
        if (!blank((char *)bytes + a, i - a) &&
            (st = parse_line((char *)bytes + a, i - a, &out->v[out->n++], &at, err)))
            goto out;
        a = i + 1;
    }
    if (!out->n)
        st = kv_fail(err, KV_EFORMAT, "prompts '%s': no prompts in it", path);
    else
        st = check_unique(out, path, err);
out:
    free(bytes);
    if (st) kv_prompts_free(out);
    return st;
}

void kv_prompts_free(kv_prompts *p)
{
    for (size_t i = 0; i < p->n; i++) {
        kv_prompt *q = &p->v[i];
        free(q->id), free(q->category), free(q->path), free(q->sha256), free(q->text), free(q->evidence),
            free(q->extra);
    }
    free(p->v);
    *p = (kv_prompts){0};
}

static kv_status check_spans(const kv_prompt *p, kv_error *err)
{
    size_t end = p->prompt_end == SIZE_MAX ? p->n_text : p->prompt_end;
    if (end > p->n_text)
        return kv_fail(err, KV_EFORMAT, "prompt '%s': prompt_end_byte %zu is past the text's %zu bytes", p->id, end,
                       p->n_text);
    if (p->context_end != SIZE_MAX && p->context_end > end)
        return kv_fail(err, KV_EFORMAT, "prompt '%s': context_end_byte %zu is past the prompt's %zu bytes", p->id,
                       p->context_end, end);
    if (p->question.end > p->n_text)
        return kv_fail(err, KV_EFORMAT, "prompt '%s': question_span ends at %u, past the text's %zu bytes", p->id,
                       p->question.end, p->n_text);
    for (uint32_t i = 0; i < p->n_evidence; i++)
        if (p->evidence[i].end > p->n_text)
            return kv_fail(err, KV_EFORMAT, "prompt '%s': evidence %u ends at %u, past the text's %zu bytes", p->id, i,
                           p->evidence[i].end, p->n_text);
    return KV_OK;
}

kv_status kv_prompt_load(kv_prompt *p, kv_error *err)
{
    char hex[65];
    kv_sha256 sha;
    kv_status st;

    if (p->path && !p->text && (st = kv_read_regular(p->path, SET_MAX, (uint8_t **)&p->text, &p->n_text, err)))
        return st;
    kv_sha256_init(&sha);
    kv_sha256_update(&sha, p->text, p->n_text);
    kv_sha256_hex(&sha, hex);
    if (p->sha256 && strcmp(hex, p->sha256))
        st = kv_fail(err, KV_EFORMAT, "prompt '%s': sha256 of '%s' is %.12s..., the set says %.12s...", p->id,
                     p->path ? p->path : "text", hex, p->sha256);
    else if (p->bytes != SIZE_MAX && p->bytes != p->n_text)
        st = kv_fail(err, KV_EFORMAT, "prompt '%s': '%s' has %zu bytes, the set says %zu", p->id,
                     p->path ? p->path : "text", p->n_text, p->bytes);
    else
        st = check_spans(p, err);
    if (st) kv_prompt_unload(p);
    return st;
}

void kv_prompt_unload(kv_prompt *p)
{
    if (!p->path) return; /* the text stands in the set and has nowhere else to come from */
    free(p->text);
    p->text = NULL, p->n_text = 0;
}
