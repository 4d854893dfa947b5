/* tr_info.c - kv-trace info: what a trace holds. */
#include "traces/json.h"
#include "traces/plain.h"
#include "traces/tr.h"

#include <inttypes.h>
#include <stdlib.h>

static json_t *streams_json(const kv_trace *t)
{
    kv_trace_usage u = kv_trace_reader_usage(t);
    json_t *a = json_array();
    for (uint32_t s = 0; s < 32; s++) {
        const kvt_stream_info *i = kvt_stream(s);
        if (!i || !u.stored[s]) continue;
        uint64_t chunks = 0;
        const kvt_entry *e = NULL;
        for (size_t k = 0; k < t->n; k++)
            if (t->entry[k].stream == s) chunks++, e = &t->entry[k];
        json_array_append_new(a, json_pack("{s:s,s:s,s:I,s:I,s:I,s:I,s:f}", "stream", i->name, "dtype",
                                           kv_dtype_name((kv_dtype)e->dtype), "width", (json_int_t)e->width, "chunks",
                                           (json_int_t)chunks, "raw_bytes", (json_int_t)u.raw[s], "stored_bytes",
                                           (json_int_t)u.stored[s], "ratio", (double)u.raw[s] / (double)u.stored[s]));
    }
    return a;
}

static kv_status print_json(const kv_trace *t, kv_error *err)
{
    kv_status st = KV_OK;
    char *text = NULL;
    size_t n;
    json_error_t why;
    json_t *o = json_object(), *meta = NULL, *prov = NULL;
    if ((st = kvt_info_to_json(&t->info, &text, err))) goto out;
    meta = json_loads(text, 0, NULL);
    json_object_set_new(o, "path", json_string(t->path));
    json_object_set_new(o, "format", json_pack("[i,i]", (int)KVT_MAJOR, (int)t->minor));
    json_object_set_new(o, "file_bytes", json_integer((json_int_t)t->size));
    json_object_set_new(o, "content_sha256", json_string(t->sha));
    json_object_update(o, meta);
    json_object_set_new(o, "streams", streams_json(t));
    free(text), text = NULL;
    if (kv_trace_has(t, KV_S_PROVENANCE, 0, 0, 0, 0)) {
        if ((st = kv_trace_read_bytes(t, KV_S_PROVENANCE, &text, &n, err))) goto out;
        if ((prov = kv_json_load(text, n, JSON_DECODE_ANY, 1 << 16, &why))) json_object_set(o, "provenance", prov);
    }
    if (!kv_json_print(stdout, o, JSON_INDENT(2))) st = kv_fail(err, KV_ENOMEM, "out of memory");
out:
    json_decref(o), json_decref(meta), json_decref(prov);
    free(text);
    return st;
}

/* Layer numbers as "0-29" or "0,3,7-9". */
static void print_layers(const kv_trace_info *i)
{
    for (uint32_t a = 0, b; a < i->n_layer; a = b) {
        for (b = a + 1; b < i->n_layer && i->layer[b] == i->layer[b - 1] + 1; b++) continue;
        printf(b - a > 1 ? "%s%u-%u" : "%s%u", a ? "," : "", i->layer[a], i->layer[b - 1]);
    }
}

static void print_table(const kv_trace *t)
{
    const kv_trace_info *i = &t->info;
    kv_trace_usage u = kv_trace_reader_usage(t);
    uint32_t windowed = 0;
    for (uint32_t l = 0; l < i->n_layer; l++) windowed += i->window[l] > 0;
    printf("%s  (format %u.%u, %" PRIu64 " bytes)\n", kv_plain(t->path).s, KVT_MAJOR, t->minor, t->size);
    printf("model     %s, %s\n", kv_plain(i->model).s, kv_plain(i->arch).s);
    if (i->prompt_id)
        printf("prompt    %s%s%s\n", kv_plain(i->prompt_id).s, i->category ? ", " : "", kv_plain(i->category).s);
    printf("shape     layers ");
    print_layers(i);
    printf(" of %u, %u query heads on %u KV heads of %u, hidden %u\n", i->n_layer_model, i->n_q_head, i->n_kv_head,
           i->head_dim, i->hidden);
    printf("tokens    %u: %u prompt, %u decoded", i->n_token, i->n_prompt, i->n_token - i->n_prompt);
    if (i->n_context) printf(", question from %u", i->n_context);
    printf("\nrecorded  %s at %s, scale %.6g", kv_plain(i->record).s, kv_dtype_name(i->dtype), (double)i->scale);
    if (i->softcap > 0) printf(", softcap %.6g", (double)i->softcap);
    if (windowed) printf(", %u sliding-window layers", windowed);
    if (i->wo_sha256) printf(", W_O in wo-%.16s.kvw", i->wo_sha256);
    printf("\ncontent   %s\n\n%-11s %-5s %7s %14s %14s %7s\n", t->sha, "stream", "type", "chunks", "raw bytes",
           "stored bytes", "ratio");
    for (uint32_t s = 0; s < 32; s++) {
        const kvt_stream_info *si = kvt_stream(s);
        uint64_t chunks = 0;
        const kvt_entry *e = NULL;
        for (size_t k = 0; k < t->n; k++)
            if (t->entry[k].stream == s) chunks++, e = &t->entry[k];
        if (!si || !e) continue;
        printf("%-11s %-5s %7" PRIu64 " %14" PRIu64 " %14" PRIu64 " %7.3f\n", si->name,
               kv_dtype_name((kv_dtype)e->dtype), chunks, u.raw[s], u.stored[s],
               (double)u.raw[s] / (double)u.stored[s]);
    }
}

static kv_status run(int argc, char **argv, int *code, kv_error *err)
{
    bool json = false;
    kv_list rest = {0};
    const kv_opt opts[] = {{"json", 0, KV_OPT_FLAG, &json}, {0}};
    kv_trace *t = NULL;
    kv_status st = tr_parse(argc, argv, opts, &rest, 1, 1, err);
    (void)code;
    if (st || (st = kv_trace_open(rest.v[0], &t, err))) goto out;
    if (json)
        st = print_json(t, err);
    else
        print_table(t);
out:
    kv_trace_close(t);
    kv_list_free(&rest);
    return st;
}

const tr_command tr_info = {"info", "what a trace holds: model, shape, streams, sizes",
                            "usage: kv-trace info TRACE [--json]\n\n"
                            "Shows the metadata, the content hash and, per stream, raw and stored bytes.\n\n"
                            "  kv-trace info a.kvt\n"
                            "  kv-trace info a.kvt --json\n",
                            run};
