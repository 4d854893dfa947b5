/* tr_slice.c - kv-trace slice: a part of a trace as a trace. */
#include "traces/tr.h"

#include <stdlib.h>

static kv_status run(int argc, char **argv, int *code, kv_error *err)
{
    const char *layers = NULL, *heads = NULL, *tokens = NULL;
    kv_list rest = {0};
    const kv_opt opts[] = {
        {"layers", 0, KV_OPT_STR, &layers}, {"heads", 0, KV_OPT_STR, &heads}, {"tokens", 0, KV_OPT_STR, &tokens}, {0}};
    kv_trace *t = NULL;
    kvt_part part = {0};
    uint32_t known[KV_HEADS_MAX], a = 0;
    kv_status st = tr_parse(argc, argv, opts, &rest, 2, 2, err);
    (void)code;
    if (st || (st = kv_trace_open(rest.v[0], &t, err))) goto out;
    const kv_trace_info *in = kv_trace_get_info(t);
    for (uint32_t h = 0; h < in->n_kv_head; h++) known[h] = h;
    if ((layers && (st = tr_numbers(layers, "layers", in->layer, in->n_layer, &part.layer, &part.n_layer, err))) ||
        (heads && (st = tr_numbers(heads, "heads", known, in->n_kv_head, &part.head, &part.n_head, err))) ||
        (tokens && (st = tr_range(tokens, in->n_token, &a, &part.n_token, err))))
        goto out;
    if (a) {
        st = kv_fail(err, KV_EMISUSE,
                     "--tokens '%s': only a prefix 0:B can be cut out; later rows attend to the tokens before them",
                     tokens);
        goto out;
    }
    st = kvt_copy(t, &part, rest.v[1], tr_threads(), err);
out:
    free(part.layer), free(part.head);
    kv_trace_close(t);
    kv_list_free(&rest);
    return st;
}

const tr_command tr_slice = {
    "slice", "some layers, heads or a prefix of the tokens as a new trace",
    "usage: kv-trace slice IN OUT [--layers 0,3,7:10] [--heads 0:2] [--tokens 0:B]\n\n"
    "--layers are numbers of the model and keep them. --heads are KV heads, which bring their query heads and their\n"
    "columns of W_O and are numbered anew. --tokens keeps a prefix: what is known about later rows is left out, and "
    "so\n"
    "are the prompt's column sums when it ends inside the prompt. Ranges do not include their end.\n\n"
    "  kv-trace slice a.kvt small.kvt --layers 0:4 --heads 0\n"
    "  kv-trace slice a.kvt prefix.kvt --tokens 0:512\n",
    run};
