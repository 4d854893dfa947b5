/* memtext.c - streams into memory, and what happens when there is none (memtext.h). */
#include "traces/memtext.h"

#include <errno.h>
#include <jansson.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

static atomic_bool lost;

bool kv_text_lost(void)
{
    return atomic_load(&lost);
}

void kv_text_lose(void)
{
    atomic_store(&lost, true);
}

/* jansson (2.14) runs into an assertion when it is short of memory inside a string: better to end here. */
static void *json_alloc(size_t n)
{
    void *p = malloc(n);
    if (p) return p;
    fprintf(stderr, "%s: out of memory: cannot allocate %zu bytes for JSON\n", program_invocation_short_name, n);
    _exit(1);
}

__attribute__((constructor)) static void json_memory(void)
{
    json_set_alloc_funcs(json_alloc, free);
}

typedef struct {
    char **text;
    size_t *n, room;
} sink;

static ssize_t sink_write(void *ctx, const char *from, size_t n)
{
    sink *s = ctx;
    size_t need = *s->n + n + 1;
    if (!*s->text) return 0;
    if (need > s->room) {
        size_t room = need > 2 * s->room ? need : 2 * s->room;
        char *more = realloc(*s->text, room);
        if (!more) {
            free(*s->text);
            *s->text = NULL, *s->n = 0;
            kv_text_lose();
            return 0;
        }
        *s->text = more, s->room = room;
    }
    memcpy(*s->text + *s->n, from, n);
    (*s->text)[ *s->n += n] = 0;
    return (ssize_t)n;
}

static int sink_close(void *ctx)
{
    sink *s = ctx;
    bool whole = *s->text != NULL;
    free(s);
    return whole ? 0 : EOF;
}

FILE *kv_text_stream(char **text, size_t *n)
{
    static const size_t first = 256;
    cookie_io_functions_t io = {.write = sink_write, .close = sink_close};
    sink *s = malloc(sizeof *s);
    FILE *f = NULL;
    *text = malloc(first), *n = 0;
    if (s && *text) {
        **text = 0;
        *s = (sink){text, n, first};
        f = fopencookie(s, "w", io);
    }
    if (!f) {
        free(s), free(*text);
        *text = NULL;
        kv_text_lose();
    }
    return f;
}
