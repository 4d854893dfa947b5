/* fuzz_results.c - targets plugin and merge: what a plug-in says of itself, somebody else's results database. */
#include <stdlib.h>
#include <unistd.h>

#include "analyze/analysis.h"
#include "sim/plugin.h"
#include "tests/fuzz/fuzz.h"

static int never(const kv_plugin_layer *l, const kv_plugin_unit *u, const void *state, float *score, char *err,
                 size_t err_size)
{
    (void)l, (void)u, (void)state, (void)score, (void)err, (void)err_size;
    abort();
}

/* abi, size, needs, window, granularity as u32; which of the four texts and the function are NULL as bits of a byte;
 * name 0 summary 0 paper 0 params 0; then a key 0 and a value, given to the plug-in as a user does. */
int fuzz_plugin(const uint8_t *p, size_t n)
{
    if (n < 21) return 0;
    uint32_t field[5];
    uint8_t absent = p[20];
    for (int i = 0; i < 5; i++) field[i] = kv_get32(p + 4 * i);
    p += 21, n -= 21;
    char *text[6];
    for (int i = 0; i < 6; i++) text[i] = fuzz_text(&p, &n);
    const kv_plugin table = {.abi = field[0],
                             .size = field[1],
                             .name = absent & 1 ? NULL : text[0],
                             .summary = absent & 2 ? NULL : text[1],
                             .paper = absent & 4 ? NULL : text[2],
                             .needs = field[2],
                             .window = field[3],
                             .granularity = field[4],
                             .params = absent & 8 ? NULL : text[3],
                             .score = absent & 16 ? NULL : never};
    kv_plug plug = {.entry = &table, .path = text[0]};
    kv_error err;
    bool mine;
    if (kv_plug_check(&plug, &err)) {
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
    } else {
        plug.params = kv_format("%s", table.params ? table.params : "");
        fuzz_must(plug.params, "a short text fits into memory");
        /* keys and values have passed the command line's syntax */
        if (*text[4] && !strpbrk(text[4], ",=|") && !strpbrk(text[5], ",|")) {
            kv_plug_set(&plug, text[4], text[5], &mine, NULL);
            if (!kv_plug_set(&plug, text[4], "1", &mine, NULL) && mine)
                fuzz_must(strstr(plug.params, "=1"), "a parameter that was set stands in the list");
        }
        char *identity = kv_plug_identity(&plug);
        kv_plug_needs(&plug);
        free(identity), free(plug.params);
    }
    for (int i = 0; i < 6; i++) free(text[i]);
    return 0;
}

static FILE *nowhere(void)
{
    static FILE *f;
    if (!f) f = fopen("/dev/null", "we");
    fuzz_must(f, "/dev/null can be opened");
    return f;
}

/* The bytes of a database: read by the commands, then merged with itself (a copy) into a new one. */
int fuzz_merge(const uint8_t *p, size_t n)
{
    static kv_status (*const command[])(const kv_analysis *, kv_error *) = {kv_cmd_summary, kv_cmd_layers, kv_cmd_gap,
                                                                            kv_cmd_export};
    kv_analysis a = kv_analysis_defaults();
    kv_error err;
    const char *rest[3] = {"merge"};
    rest[1] = a.db = fuzz_put("a.db", p, n);
    rest[2] = fuzz_put("b.db", p, n);
    a.out = a.talk = nowhere();
    for (size_t i = 0; i < sizeof command / sizeof *command; i++) {
        a.format = (kv_output)(i % 4);
        if (command[i](&a, &err)) fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
    }
    a.folder = fuzz_name("out.db");
    a.rest = (kv_list){rest, 3};
    unlink(a.folder);
    if (kv_cmd_merge(&a, &err)) {
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
        fuzz_must(access(a.folder, F_OK), "a merge that failed leaves nothing behind");
    }
    return 0;
}
