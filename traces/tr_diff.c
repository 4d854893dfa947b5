/* tr_diff.c - kv-trace diff: how far apart are two traces of the same thing. */
#include "traces/json.h"
#include "traces/plain.h"
#include "traces/tr.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

typedef struct {
    uint32_t stream;
    uint64_t n, differ, only_a, only_b; /* elements compared, different; elements in one trace only */
    double most;                        /* largest absolute difference */
    uint32_t layer, head, row;          /* where */
} result;

/* One head of one layer, rows that both have. */
static kv_status compare_head(const kv_trace *a, const kv_trace *b, uint32_t layer, uint32_t head, result *r,
                              kv_error *err)
{
    kv_stream s = (kv_stream)r->stream;
    size_t count, first = kvt_group(a, r->stream, layer, &count);
    float *x = NULL, *y = NULL;
    kv_status st = KV_OK;
    uint32_t width = 0;
    for (size_t k = first; k < first + count && !st; k++) {
        const kvt_entry *e = &a->entry[k];
        uint32_t t0 = (uint32_t)e->token_first, t1 = t0 + e->token_count;
        size_t n = (size_t)e->token_count * e->width;
        if (head < e->head_first || head - e->head_first >= e->head_count) continue;
        width = e->width;
        if (!kv_trace_has(b, s, layer, head, t0, t1) || kv_trace_width(b, s) != width) {
            r->only_a += n;
            continue;
        }
        free(x), free(y), x = y = NULL;
        if ((st = kv_array(&x, n, sizeof *x, err)) || (st = kv_array(&y, n, sizeof *y, err))) break;
        if (e->dtype == KV_U32) {
            if ((st = kv_trace_read_u32(a, s, t0, t1, (uint32_t *)(void *)x, err)) ||
                (st = kv_trace_read_u32(b, s, t0, t1, (uint32_t *)(void *)y, err)))
                break;
        } else if ((st = kv_trace_read_f32(a, s, layer, head, t0, t1, x, err)) ||
                   (st = kv_trace_read_f32(b, s, layer, head, t0, t1, y, err))) {
            break;
        }
        for (size_t i = 0; i < n; i++) {
            if (!memcmp(&x[i], &y[i], 4)) continue;
            uint32_t u[2];
            memcpy(&u[0], &x[i], 4), memcpy(&u[1], &y[i], 4);
            double d = e->dtype == KV_U32 ? fabs((double)u[0] - (double)u[1]) : fabs((double)x[i] - (double)y[i]);
            if (isnan(d)) d = INFINITY;
            r->differ += d > 0;
            if (d > r->most) r->most = d, r->layer = layer, r->head = head, r->row = t0 + (uint32_t)(i / width);
        }
        r->n += n;
    }
    free(x), free(y);
    return st;
}

static uint64_t elements(const kv_trace *t, uint32_t stream)
{
    uint64_t n = 0;
    for (size_t k = 0; k < t->n; k++)
        if (t->entry[k].stream == stream) n += t->entry[k].raw / kv_dtype_bytes((kv_dtype)t->entry[k].dtype);
    return n;
}

static kv_status compare(const kv_trace *a, const kv_trace *b, uint32_t stream, result *r, kv_error *err)
{
    const kvt_stream_info *s = kvt_stream(stream);
    kv_status st = KV_OK;
    bool one = s->kind == 't';
    *r = (result){.stream = stream};
    if (s->kind == 'b') {
        char *x = NULL, *y = NULL;
        size_t nx = 0, ny = 0;
        bool ha = elements(a, stream), hb = elements(b, stream);
        if (!ha || !hb) {
            r->only_a = elements(a, stream), r->only_b = elements(b, stream);
            return KV_OK;
        }
        if (!(st = kv_trace_read_bytes(a, (kv_stream)stream, &x, &nx, err)) &&
            !(st = kv_trace_read_bytes(b, (kv_stream)stream, &y, &ny, err))) {
            r->n = nx;
            r->differ = nx != ny || memcmp(x, y, nx);
            r->most = r->differ ? INFINITY : 0;
        }
        free(x), free(y);
        return st;
    }
    for (uint32_t l = 0; l < (one ? 1 : a->info.n_layer) && !st; l++)
        for (uint32_t h = 0; h < kvt_heads(&a->info, stream) && !st; h++)
            st = compare_head(a, b, one ? 0 : a->info.layer[l], h, r, err);
    uint64_t nb = elements(b, stream);
    r->only_b = nb > r->n ? nb - r->n : 0;
    return st;
}

/* Shapes that make a comparison meaningless. */
static kv_status same_shape(const kv_trace *a, const kv_trace *b, kv_error *err)
{
    const kv_trace_info *x = &a->info, *y = &b->info;
    if (x->n_q_head != y->n_q_head || x->n_kv_head != y->n_kv_head || x->head_dim != y->head_dim ||
        x->n_token != y->n_token || x->n_prompt != y->n_prompt)
        return kv_fail(err, KV_EFORMAT,
                       "different shapes: %u/%u heads of %u, %u+%u tokens in '%s'; %u/%u heads of %u, %u+%u tokens in "
                       "'%s'",
                       x->n_q_head, x->n_kv_head, x->head_dim, x->n_prompt, x->n_token - x->n_prompt, a->path,
                       y->n_q_head, y->n_kv_head, y->head_dim, y->n_prompt, y->n_token - y->n_prompt, b->path);
    return KV_OK;
}

static json_t *different_keys(const kv_trace *a, const kv_trace *b)
{
    char *x = NULL, *y = NULL;
    json_t *keys = json_array(), *p = NULL, *q = NULL, *v;
    const char *k;
    if (!kvt_info_to_json(&a->info, &x, NULL) && !kvt_info_to_json(&b->info, &y, NULL)) {
        p = json_loads(x, 0, NULL), q = json_loads(y, 0, NULL);
        json_object_foreach(p, k, v) if (!json_equal(v, json_object_get(q, k)))
            json_array_append_new(keys, json_string(k));
        json_object_foreach(q, k, v) if (!json_object_get(p, k)) json_array_append_new(keys, json_string(k));
    }
    json_decref(p), json_decref(q);
    free(x), free(y);
    return keys;
}

static kv_status run(int argc, char **argv, int *code, kv_error *err)
{
    double tol = 0;
    bool json = false, beyond = false;
    kv_list rest = {0};
    const kv_opt opts[] = {{"tol", 0, KV_OPT_F64, &tol}, {"json", 0, KV_OPT_FLAG, &json}, {0}};
    kv_trace *a = NULL, *b = NULL;
    json_t *keys = NULL, *list = json_array(), *v;
    size_t i;
    kv_status st = tr_parse(argc, argv, opts, &rest, 2, 2, err);
    if (!st && !(tol >= 0)) st = kv_fail(err, KV_EMISUSE, "--tol %g: zero or more is expected", tol);
    if (st || (st = kv_trace_open(rest.v[0], &a, err)) || (st = kv_trace_open(rest.v[1], &b, err)) ||
        (st = same_shape(a, b, err)))
        goto out;
    keys = different_keys(a, b);
    kv_progress *bar = kv_progress_start("comparing", 32, "streams");
    for (uint32_t s = 0; s < 32 && !st; s++) {
        result r;
        if (!kvt_stream(s) || s == KV_S_META || s == KV_S_PROVENANCE || (!elements(a, s) && !elements(b, s))) continue;
        if ((st = compare(a, b, s, &r, err))) break;
        bool bad = !(r.most <= tol) || r.only_a || r.only_b;
        beyond |= bad;
        if (json) {
            json_array_append_new(list,
                                  json_pack("{s:s,s:b,s:I,s:I,s:o,s:I,s:I}", "stream", kvt_stream(s)->name, "same",
                                            !bad, "compared", (json_int_t)r.n, "different", (json_int_t)r.differ,
                                            "max_difference", isfinite(r.most) ? json_real(r.most) : json_null(),
                                            "only_in_a", (json_int_t)r.only_a, "only_in_b", (json_int_t)r.only_b));
        } else {
            printf("%-11s %12" PRIu64 " compared %12" PRIu64 " differ, at most %.6g", kvt_stream(s)->name, r.n,
                   r.differ, r.most);
            if (r.differ && kvt_stream(s)->kind != 'b') printf(" (layer %u head %u row %u)", r.layer, r.head, r.row);
            if (r.only_a || r.only_b)
                printf(", only in the first: %" PRIu64 ", only in the second: %" PRIu64, r.only_a, r.only_b);
            puts(bad ? "  <- beyond" : "");
        }
        kv_progress_step(bar, s, NULL);
    }
    kv_progress_end(bar);
    if (st) goto out;
    if (json) {
        json_t *o = json_pack("{s:b,s:f,s:O,s:O}", "same", !beyond, "tol", tol, "streams", list, "metadata", keys);
        if (!kv_json_print(stdout, o, JSON_INDENT(2))) st = kv_fail(err, KV_ENOMEM, "out of memory");
        json_decref(o);
    } else if (json_array_size(keys)) {
        printf("metadata that differs (not judged):");
        json_array_foreach(keys, i, v) printf(" %s", kv_plain(json_string_value(v)).s);
        putchar('\n');
    }
    *code = beyond ? 1 : 0;
out:
    json_decref(keys), json_decref(list);
    kv_trace_close(a), kv_trace_close(b);
    kv_list_free(&rest);
    return st;
}

const tr_command tr_diff = {
    "diff", "largest difference per stream of two traces",
    "usage: kv-trace diff A B [--tol X] [--json]\n\n"
    "Compares every stream element by element. Exit 1 when a difference is above X (default 0)\n"
    "or something is in one trace only. Metadata that differs is listed and not judged;\n"
    "provenance is not looked at.\n\n"
    "  kv-trace diff cpu.kvt gpu.kvt --tol 1e-3\n"
    "  kv-trace diff a.kvt again.kvt\n",
    run};
