/* json.c - see json.h. */
#include "traces/json.h"

#include <stdlib.h>

#include "traces/plain.h"

/* Values in the text: every one stands behind a comma or an opening bracket. */
static size_t count_values(const uint8_t *p, size_t n)
{
    size_t count = 1;
    bool quoted = false;
    for (size_t i = 0; i < n; i++) {
        if (quoted && p[i] == '\\')
            i++;
        else if (p[i] == '"')
            quoted = !quoted;
        else if (!quoted)
            count += p[i] == ',' || p[i] == '[' || p[i] == '{';
    }
    return count;
}

json_t *kv_json_load(const void *p, size_t n, size_t flags, size_t values, json_error_t *why)
{
    if (count_values(p, n) <= values) return json_loadb(p, n, flags, why);
    *why = (json_error_t){.line = 1};
    snprintf(why->text, sizeof why->text, "more than %zu values", values);
    return NULL;
}

bool kv_json_print(FILE *f, const json_t *v, size_t flags)
{
    char *text = json_dumps(v, flags);
    size_t n = text ? strlen(text) : 0;
    for (size_t i = 0, len; i < n; i += len) { /* outside strings there is nothing but ASCII and white space */
        uint32_t c = 0;
        len = kv_utf8_next(text + i, n - i, &c);
        if (!len) len = 1;
        if (c < 0x7f || !kv_obeyed(c))
            fwrite(text + i, 1, len, f);
        else if (c < 0x10000)
            fprintf(f, "\\u%04x", c);
        else
            fprintf(f, "\\u%04x\\u%04x", 0xd800 + ((c - 0x10000) >> 10), 0xdc00 + (c & 0x3ff));
    }
    free(text);
    if (text) putc('\n', f);
    return text != NULL;
}
