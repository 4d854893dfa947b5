/* segments.c - byte spans of the prompt set, through the token offsets of the trace. */
#include "sim/segments.h"

#include <jansson.h>
#include <stdlib.h>

typedef struct {
    const uint32_t *offset; /* [n + 1] */
    uint32_t n;
    bool *in;
    size_t hits;
} marker;

void kv_span_tokens(const uint32_t *offset, uint32_t n, int64_t start, int64_t end, uint32_t *first, uint32_t *past)
{
    uint32_t a = 0, b = n; /* offsets ascend, so the tokens are a run */
    while (a < n && offset[a + 1] <= start) a++;
    while (b > a && offset[b - 1] >= end) b--;
    *first = a, *past = b;
}

static void mark(marker *m, json_int_t start, json_int_t end)
{
    uint32_t first, past;
    m->hits++;
    kv_span_tokens(m->offset, m->n, start, end, &first, &past);
    for (uint32_t i = first; i < past; i++) m->in[i] = true;
}

kv_status kv_segment_tokens(const kv_trace *t, const char *name, uint32_t n, bool *in, kv_error *err)
{
    const kv_trace_info *info = kv_trace_get_info(t);
    uint32_t *offset = NULL;
    json_t *extra = info->extra ? json_loads(info->extra, 0, NULL) : NULL, *seg;
    char known[256] = "";
    size_t i, used = 0;
    kv_status st = kv_array(&offset, n + 1, sizeof *offset, err);
    if (!st) st = kv_trace_read_u32(t, KV_S_OFFSETS, 0, n + 1, offset, err);
    marker m = {offset, n, in, 0};
    memset(in, 0, n * sizeof *in);
    if (!st && !strcmp(name, "evidence"))
        for (uint32_t k = 0; k < info->n_evidence; k++) mark(&m, info->evidence[k].start, info->evidence[k].end);
    if (!st && !strcmp(name, "question") && info->question.end) mark(&m, info->question.start, info->question.end);
    json_array_foreach(json_object_get(json_object_get(extra, "prompt"), "segments"), i, seg)
    {
        const char *kind = json_string_value(json_object_get(seg, "kind")),
                   *title = json_string_value(json_object_get(seg, "title"));
        if (!st && ((kind && !strcmp(kind, name)) || (title && !strcmp(title, name))))
            mark(&m, json_integer_value(json_object_get(seg, "start")),
                 json_integer_value(json_object_get(seg, "end")));
        if (kind && !strstr(known, kind))
            used +=
                (size_t)snprintf(known + used, sizeof known - used > 64 ? 64 : 0, "%s%.60s", used ? ", " : "", kind);
        if (used > 180) break;
    }
    if (!st && !m.hits)
        st = kv_fail(err, KV_EMISSING, "trace '%s' has no segment '%s'; it has%s%s%s%s", kv_trace_path(t), name,
                     info->n_evidence ? " evidence" : "", info->question.end ? " question" : "",
                     *known                                   ? " "
                     : info->n_evidence || info->question.end ? ""
                                                              : " none",
                     known);
    json_decref(extra);
    free(offset);
    return st;
}
