/* tasks.c - texts from a seed: filler sentences, statements put between them, a question, the answer (tasks.h). */
#include "capture/tasks.h"

#include <jansson.h>
#include <stdlib.h>

#include "traces/cli.h"
#include "traces/memtext.h"

enum { KEYS = 8, HOPS = 4, CHAINS = 2, STATEMENTS_MAX = 32 };

typedef struct {
    char *text;   /* of the statement */
    bool asked;   /* evidence */
    double depth; /* place in the filler, 0..1 */
} statement;

typedef struct {
    const kv_task_request *q;
    kv_rng rng;
    statement s[STATEMENTS_MAX];
    size_t n;
    char *question, *answer;
    json_t *answers;
} task;

static uint32_t below(task *t, uint32_t n)
{
    return (uint32_t)((kv_rng_next(&t->rng) >> 32) * n >> 32);
}

#define PICK(t, list) (list)[below(t, sizeof(list) / sizeof *(list))]

/* A sentence without digits or rare words, so that nothing but the statements looks like an answer. */
static void put_sentence(task *t, FILE *f)
{
    static const char *const WHO[] = {"The baker",    "A sailor",    "The old clerk", "My neighbour",
                                      "The gardener", "A teacher",   "The miller",    "Her cousin",
                                      "The postman",  "A carpenter", "The librarian", "Their guide"};
    static const char *const DID[] = {"walked",  "waited", "looked", "sat down", "turned", "worked",
                                      "stopped", "talked", "rested", "sang",     "stood",  "listened"};
    static const char *const WHERE[] = {"by the river",      "near the market", "under the bridge", "behind the mill",
                                        "along the harbour", "at the old gate", "beside the road",  "in the garden",
                                        "on the hill",       "before the inn",  "in the long hall", "at the station"};
    static const char *const WHEN[] = {"in the morning", "after the rain",    "before supper", "while the bells rang",
                                       "all afternoon",  "until it was dark", "as usual",      "for a short while",
                                       "without a word", "on market days",    "in the winter", "once more"};
    static const char *const THEN[] = {"and the wind was cold",    "and nobody noticed",      "but the road was empty",
                                       "and the lamps were lit",   "while the geese flew by", "but the shop was closed",
                                       "and the air smelt of hay", "as the boats came in",    "and the day went on"};
    fprintf(f, "%s %s %s", PICK(t, WHO), PICK(t, DID), PICK(t, WHERE));
    if (below(t, 3)) fprintf(f, " %s", PICK(t, WHEN));
    if (below(t, 3) == 0) fprintf(f, ", %s", PICK(t, THEN));
    fputs(". ", f);
}

static char *digits(task *t)
{
    char *s = malloc(t->q->digits + 1);
    for (uint32_t i = 0; s && i < t->q->digits; i++) s[i] = (char)('0' + (i ? below(t, 10) : 1 + below(t, 9)));
    if (s) s[t->q->digits] = 0;
    return s;
}

static void state(task *t, char *text, bool asked, double depth)
{
    t->s[t->n++] = (statement){text, asked, depth};
}

/* One of `n` places, evenly spread, the first at `depth` when one is asked for; a little apart from each other. */
static double place(task *t, uint32_t i, uint32_t n, uint32_t prompt)
{
    if (!i && t->q->depth >= 0) return t->q->depth / 100;
    if (n == 1) return (prompt + 0.5) / t->q->count;
    return (i + kv_rng_unit(&t->rng) * 0.9) / n;
}

static void make_keys(task *t, uint32_t n, uint32_t asked, uint32_t prompt)
{
    static const char *const A[] = {"amber", "brisk", "copper", "dappled", "gentle", "hollow", "ivory", "quiet"};
    static const char *const B[] = {"anchor", "beacon", "canyon", "easel", "ferry", "garnet", "hammock", "lantern"};
    uint32_t at = below(t, 8), by = 1 + 2 * below(t, 4), b = below(t, 8);
    char *key[KEYS], *value[KEYS], *question = NULL, *answer = NULL;
    size_t n_question, n_answer;
    FILE *q = kv_text_stream(&question, &n_question), *a = kv_text_stream(&answer, &n_answer);
    for (uint32_t i = 0; i < n; i++) { /* keys differ in their first word */
        key[i] = kv_format("%s-%s", A[(at + i * by) % 8], B[(b + i) % 8]);
        value[i] = digits(t);
        state(t, kv_format("The number to remember for %s is %s. ", key[i], value[i]), i < asked,
              place(t, i, n, prompt));
    }
    fputs(asked == 1 ? "What is the number to remember for " : "What are the numbers to remember for ", q);
    for (uint32_t i = 0; i < asked; i++) {
        fprintf(q, "%s%s", i ? " and " : "", key[i]);
        fprintf(a, "%sThe number to remember for %s is %s.", i ? " " : "", key[i], value[i]);
        json_array_append_new(t->answers, json_string(value[i] ? value[i] : ""));
    }
    fputs("?", q);
    fclose(q), fclose(a);
    for (uint32_t i = 0; i < n; i++) free(key[i]), free(value[i]);
    t->question = question, t->answer = answer;
}

static void make_chains(task *t)
{
    static const char *const NAME[] = {"ALPHA", "CEDAR", "DELTA", "EMBER", "FALCON", "GRANITE", "HARBOR", "INDIGO"};
    uint32_t first = below(t, 8), by = 1 + 2 * below(t, 4);
    char *names = NULL;
    size_t n_names;
    FILE *f = kv_text_stream(&names, &n_names);
    for (uint32_t c = 0; c < CHAINS; c++) {
        const char *name = NAME[(first + c * by) % 8];
        char *value = digits(t);
        for (uint32_t h = 0; h <= HOPS; h++) {
            char *text = h ? kv_format("VAR %s%u = VAR %s%u. ", name, h + 1, name, h)
                           : kv_format("VAR %s1 = %s. ", name, value ? value : "");
            double from = t->q->depth < 0 ? 0 : t->q->depth / 100, step = (h + kv_rng_unit(&t->rng) * 0.9) / (HOPS + 1);
            state(t, text, c == 0, !c && !h && t->q->depth >= 0 ? from : from + (1 - from) * step);
            if (c) continue;
            char *variable = kv_format("%s%u", name, h + 1);
            fprintf(f, "%s%s", h ? h == HOPS ? " and " : ", " : "", variable ? variable : "");
            json_array_append_new(t->answers, json_string(variable ? variable : ""));
            free(variable);
        }
        if (!c) t->question = kv_format("Which variables hold the value %s?", value ? value : "");
        free(value);
    }
    fclose(f);
    t->answer = kv_format("The variables that hold it are %s.", names ? names : "");
    free(names);
}

/* A chain must be read in order: sort by depth, earlier statements first among equals (insertion is stable). */
static void in_order(task *t)
{
    for (size_t i = 1; i < t->n; i++)
        for (size_t k = i; k && t->s[k].depth < t->s[k - 1].depth; k--) {
            statement swap = t->s[k];
            t->s[k] = t->s[k - 1], t->s[k - 1] = swap;
        }
}

static json_t *span(size_t a, size_t b)
{
    return json_pack("[I,I]", (json_int_t)a, (json_int_t)b);
}

static json_t *write_prompt(task *t, uint32_t number)
{
    char *text = NULL, *id = kv_format("%s-%04u", t->q->kind, number + 1),
         *category = kv_format("synthetic_%s", t->q->kind);
    size_t size = 0, at[STATEMENTS_MAX], next = 0, words = 0;
    json_t *evidence = json_array(), *o = NULL;
    FILE *f = kv_text_stream(&text, &size);
    if (!f || !id || !category) goto out;
    fputs("Some statements are hidden in the following text. Read it and remember them; a question follows.\n\n", f);
    while (words < t->q->words || next < t->n) {
        while (next < t->n && (words >= t->q->words || t->s[next].depth * t->q->words <= (double)words)) {
            fflush(f);
            at[next] = size;
            fputs(t->s[next++].text, f);
        }
        if (words >= t->q->words) break;
        fflush(f);
        size_t before = size;
        put_sentence(t, f);
        if (fflush(f)) break;
        for (size_t i = before; i < size; i++) words += text[i] == ' ';
    }
    fflush(f);
    size_t context = size, question, prompt;
    fputs("\n\nQuestion: ", f), fflush(f);
    question = size;
    fputs(t->question, f), fflush(f);
    size_t question_end = size;
    fputs("\nAnswer:", f), fflush(f);
    prompt = size;
    fprintf(f, " %s", t->answer);
    if (fclose(f)) goto out;
    for (size_t i = 0; i < t->n; i++) /* without the blank behind it */
        if (t->s[i].asked) json_array_append_new(evidence, span(at[i], at[i] + strlen(t->s[i].text) - 1));
    o = json_pack("{s:s,s:s,s:s,s:I,s:I,s:O,s:s,s:o,s:s,s:O,s:{s:s,s:i,s:i,s:f,s:I}}", "id", id, "category", category,
                  "text", text, "prompt_end_byte", (json_int_t)prompt, "context_end_byte", (json_int_t)context,
                  "evidence", evidence, "question", t->question, "question_span", span(question, question_end),
                  "answer", t->answer, "answers", t->answers, "made", "kind", t->q->kind, "words", (int)t->q->words,
                  "digits", (int)t->q->digits, "depth", t->q->depth, "seed", (json_int_t)t->q->seed);
out:
    free(text), free(id), free(category);
    json_decref(evidence);
    return o;
}

kv_status kv_tasks_write(const kv_task_request *q, const char *path, kv_error *err)
{
    static const char *const KINDS[] = {"needle", "multikey", "vartrack"};
    char *lines = NULL;
    size_t size = 0, kind = 0;
    kv_status st = KV_OK;
    while (kind < 3 && strcmp(q->kind, KINDS[kind])) kind++;
    if (kind == 3) return kv_fail(err, KV_EMISUSE, "--kind '%s': want needle, multikey or vartrack", q->kind);
    if (q->count < 1 || q->count > 100000 || q->words > 1000000 || q->digits < 1 || q->digits > 64 || q->depth > 100)
        return kv_fail(err, KV_EMISUSE,
                       "want 1 to 100000 prompts (--count), up to 1000000 words (--words), 1 to 64 digits (--digits) "
                       "and a depth of 0 to 100 percent (--depth)");
    FILE *f = kv_text_stream(&lines, &size);
    for (uint32_t i = 0; f && i < q->count && !st; i++) {
        task t = {.q = q, .rng = {q->seed * 1000003u + i}, .answers = json_array()};
        kv_rng_next(&t.rng);
        kind == 2 ? make_chains(&t) : make_keys(&t, kind ? KEYS : 1, kind ? 2 : 1, i);
        in_order(&t);
        bool whole = t.question && t.answer;
        for (size_t k = 0; k < t.n; k++) whole &= t.s[k].text != NULL;
        json_t *o = whole ? write_prompt(&t, i) : NULL;
        char *line = o ? json_dumps(o, JSON_COMPACT) : NULL;
        if (line)
            fprintf(f, "%s\n", line);
        else
            st = kv_fail(err, KV_ENOMEM, "out of memory");
        free(line), json_decref(o), json_decref(t.answers);
        for (size_t k = 0; k < t.n; k++) free(t.s[k].text);
        free(t.question), free(t.answer);
    }
    if (!f || fclose(f)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st) st = kv_write_file(path, lines, size, err);
    free(lines);
    return st;
}
