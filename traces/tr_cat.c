/* tr_cat.c - kv-trace cat: a stream as a NumPy file or as text. Arrays are written row by row as they are read or
 * derived, so their size is bounded by the disk only. */
#include "traces/derive.h"
#include "traces/npy.h"
#include "traces/plain.h"
#include "traces/tr.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

/* What the names of streams in `cat` stand for when the trace does not store them but has Q and K. */
typedef enum { STORED, MAP, LSE, COLSUM, ROWSTAT } kind;

typedef struct {
    const kv_trace *t;
    const kv_trace_info *in;
    kv_stream stream;
    kind how;
    uint32_t *layer, n_layer, head0, n_head, a, b; /* what is printed */
    uint32_t width, step;                          /* elements per row; rows read at a time */
    bool layer_axis, head_axis, row_axis;
    kv_outfile out; /* .f NULL: text */
    kv_dtype type;
    float *row; /* [width] */
    uint8_t *half;
    double *sum; /* column sums, [n_prompt] */
    kv_progress *bar;
    double done;
} job;

/* ------------------------------------------------------------------------------------------- output */
static kv_status put_text(const float *v, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) printf(i ? " %.9g" : "%.9g", (double)v[i]);
    putchar('\n');
    return KV_OK;
}

/* n elements, in the type of the file. */
static kv_status put(job *j, const float *v, size_t n, kv_error *err)
{
    const void *p = v;
    size_t size = kv_dtype_bytes(j->type);
    if (!j->out.f) return put_text(v, (uint32_t)n);
    if (j->type == KV_F16) {
        kv_encode_f32(KV_F16, v, n, j->half);
        p = j->half;
    }
    if (fwrite(p, size, n, j->out.f) != n)
        return kv_fail(err, KV_EIO, "cannot write '%s': %s", j->out.path, strerror(errno));
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------- derived */
static kv_status on_row(void *ctx, uint32_t row, const double *p, double lse, kv_error *err)
{
    job *j = ctx;
    kv_status st = KV_OK;
    j->done += row + 1;
    kv_progress_step(j->bar, j->done, NULL);
    switch (j->how) {
    case LSE: j->row[0] = (float)lse; break;
    case ROWSTAT: kvt_row_stat(p, row, j->row); break;
    case COLSUM:
        for (uint32_t c = 0; c <= row; c++) j->sum[c] += p[c];
        return KV_OK;
    default:
        memset(j->row, 0, j->width * sizeof *j->row);
        for (uint32_t c = 0; c <= row; c++) j->row[c] = (float)p[c];
        break;
    }
    if ((st = put(j, j->row, j->width, err))) return st;
    return KV_OK;
}

static kv_status derive(job *j, uint32_t layer, uint32_t head, kv_error *err)
{
    uint32_t n_prompt = j->in->n_prompt;
    kv_status st;
    if (j->how != COLSUM) return kvt_derive(j->t, layer, head, j->a, j->b, 1, on_row, j, err);
    memset(j->sum, 0, n_prompt * sizeof *j->sum);
    if ((st = kvt_derive(j->t, layer, head, 0, n_prompt, 1, on_row, j, err))) return st;
    for (uint32_t c = j->a; c < j->b && !st; c++) {
        j->row[0] = (float)j->sum[c];
        st = put(j, j->row, 1, err);
    }
    return st;
}

static kv_status stored(job *j, uint32_t layer, uint32_t head, kv_error *err)
{
    float *v = NULL;
    size_t n;
    kv_status st = KV_OK;
    uint32_t step = j->step;
    if (!kv_mul(step, j->width, &n) || (st = kv_array(&v, n, sizeof *v, err)))
        return st ? st : kv_fail(err, KV_EFORMAT, "rows of %u elements", j->width);
    for (uint32_t r = j->a; r < j->b && !st; r += step) {
        uint32_t end = j->b - r < step ? j->b : r + step;
        if ((st = kv_trace_read_f32(j->t, j->stream, layer, head, r, end, v, err))) break;
        if (j->out.f) st = put(j, v, (size_t)(end - r) * j->width, err);
        for (uint32_t k = r; k < end && !j->out.f; k++) st = put(j, v + (size_t)(k - r) * j->width, j->width, err);
        if (kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
    }
    free(v);
    return st;
}

/* --------------------------------------------------------------------------------------------- arrays */
/* Is it stored for everything that was asked for? */
static bool all_stored(const job *j)
{
    for (uint32_t l = 0; l < j->n_layer; l++)
        for (uint32_t h = 0; h < j->n_head; h++)
            if (!kv_trace_has(j->t, j->stream, j->layer[l], j->head0 + h, j->a, j->b)) return false;
    return true;
}

static bool can_derive(const job *j)
{
    uint32_t g = j->in->n_q_head / j->in->n_kv_head, a = j->how == COLSUM ? 0 : j->a;
    uint32_t b = j->how == COLSUM ? j->in->n_prompt : j->b;
    for (uint32_t l = 0; l < j->n_layer; l++)
        for (uint32_t h = j->head0; h < j->head0 + j->n_head; h++)
            if (!kv_trace_has(j->t, KV_S_Q, j->layer[l], h, a, b) ||
                !kv_trace_has(j->t, KV_S_K, j->layer[l], h / g, 0, b))
                return false;
    return true;
}

static kv_status begin(job *j, const char *path, kv_error *err)
{
    size_t shape[4];
    uint32_t rank = 0;
    if (j->layer_axis) shape[rank++] = j->n_layer;
    if (j->head_axis) shape[rank++] = j->n_head;
    shape[rank++] = j->b - j->a;
    if (j->width != 1 || j->row_axis) shape[rank++] = j->width;
    kv_status st = kv_outfile_open(path, &j->out, err);
    return st ? st : kv_npy_begin(&j->out, j->type == KV_F16 ? "<f2" : "<f4", rank, shape, err);
}

static kv_status cat_array(job *j, const char *path, kv_error *err)
{
    kv_status st = KV_OK;
    bool derived = false;
    if (!all_stored(j)) {
        derived = j->how != STORED && can_derive(j);
        if (!derived) {
            /* Let the reader say what is missing. */
            float *v = NULL;
            uint32_t a = j->a, l = 0, h = 0;
            for (l = 0; l < j->n_layer && !v; l++)
                for (h = 0; h < j->n_head; h++)
                    if (!kv_trace_has(j->t, j->stream, j->layer[l], j->head0 + h, a, j->b)) goto found;
        found:
            a = (uint32_t)kvt_run_end(j->t, (uint32_t)j->stream, j->layer[l], j->head0 + h, a);
            if ((st = kv_array(&v, (size_t)j->width, sizeof *v, err))) return st;
            st = kv_trace_read_f32(j->t, j->stream, j->layer[l], j->head0 + h, a, a + 1, v, err);
            free(v);
            return st ? st : kv_fail(err, KV_EMISSING, "not stored");
        }
    }
    j->type = KV_F32;
    size_t count, first = kvt_group(j->t, (uint32_t)j->stream, j->layer[0], &count);
    if (!derived && count && j->t->entry[first].dtype == KV_F16) j->type = KV_F16;
    if (!derived) j->width = kv_trace_width(j->t, j->stream);
    /* Whole blocks where they fit: a block is decoded anew for every step in it. */
    size_t most = ((size_t)16 << 20) / j->width;
    j->step = most < 1 ? 1 : most > KVT_BLOCK_ROWS ? KVT_BLOCK_ROWS : (uint32_t)most;
    most = (size_t)j->step * j->width;
    if ((st = kv_array(&j->row, j->width, sizeof *j->row, err)) || (st = kv_array(&j->half, most, 2, err)) ||
        (st = kv_array(&j->sum, derived && j->how == COLSUM ? j->in->n_prompt : 0, sizeof *j->sum, err)) ||
        (path && (st = begin(j, path, err))))
        return st;
    double per_head = j->how == COLSUM ? 0.5 * j->in->n_prompt * j->in->n_prompt
                                       : 0.5 * (double)(j->b - j->a) * ((double)j->a + j->b);
    j->bar = kv_progress_start(kv_stream_name(j->stream), derived ? per_head * j->n_layer * j->n_head : 0, "scores");
    for (uint32_t l = 0; l < j->n_layer && !st; l++)
        for (uint32_t h = j->head0; h < j->head0 + j->n_head && !st; h++) {
            if (!path && (j->layer_axis || j->head_axis)) {
                printf("# layer %u", j->layer[l]);
                printf(j->head_axis ? " head %u\n" : "\n", h);
            }
            st = derived ? derive(j, j->layer[l], h, err) : stored(j, j->layer[l], h, err);
        }
    kv_progress_end(j->bar);
    if (!st && path) st = kv_outfile_commit(&j->out, err);
    return st;
}

/* ---------------------------------------------------------------------------------------- other shapes */
static kv_status cat_bytes(const kv_trace *t, kv_stream s, const char *path, kv_error *err)
{
    char *p = NULL;
    size_t n;
    kv_status st = kv_trace_read_bytes(t, s, &p, &n, err);
    if (!st && path)
        st = kv_write_file(path, p, n, err);
    else if (!st && !isatty(STDOUT_FILENO))
        fwrite(p, 1, n, stdout);
    for (size_t i = 0, len; !st && !path && isatty(STDOUT_FILENO) && i < n; i += len + 1) { /* line by line */
        const char *end = memchr(p + i, '\n', n - i);
        len = end ? (size_t)(end - p) - i : n - i;
        kv_put_plain(stdout, p + i, len);
        putchar('\n');
    }
    free(p);
    return st;
}

/* On stdout a JSON array, as --tokens of kv-capture and of import reads it. */
static kv_status cat_u32(const kv_trace *t, kv_stream s, uint32_t a, uint32_t b, const char *path, kv_error *err)
{
    uint32_t *v = NULL;
    size_t n = b - a;
    kv_status st;
    /* Ask before allocating: the count is only a claim of the metadata. */
    bool has = kv_trace_has(t, s, 0, 0, a, b);
    if ((st = kv_array(&v, has ? n : 1, sizeof *v, err)) ||
        (st = kv_trace_read_u32(t, s, a, has ? b : a + 1, v, err)) ||
        (!has && (st = kv_fail(err, KV_EMISSING, "trace '%s' does not hold all %s", t->path, kv_stream_name(s)))))
        goto out;
    if (path) {
        st = kv_npy_write(path, "<u4", 1, &n, v, err);
    } else {
        for (size_t i = 0; i < n; i++) printf(i ? ", %u" : "[%u", v[i]);
        puts("]");
    }
out:
    free(v);
    return st;
}

static kv_status cat_wo(const kv_trace *t, const uint32_t *layer, uint32_t n_layer, bool layer_axis, const char *path,
                        kv_error *err)
{
    const kv_trace_info *in = &t->info;
    size_t rows = in->hidden, width = (size_t)in->n_q_head * in->head_dim, n, shape[3] = {n_layer, rows, width};
    kv_outfile o = {0};
    float *v = NULL;
    uint8_t *half = NULL;
    kv_status st = KV_OK;
    for (uint32_t l = 0; l < n_layer; l++)
        if (!kv_trace_has_wo(t, layer[l])) n_layer = 1, layer += l, rows = 0; /* reading it says what is missing */
    if (!kv_mul(rows, width, &n) || (st = kv_array(&v, n, sizeof *v, err)))
        return st ? st : kv_fail(err, KV_EFORMAT, "W_O of %zu x %zu elements", rows, width);
    if (!rows) {
        st = kv_trace_read_wo(t, layer[0], v, err);
        goto out;
    }
    size_t count, first = kvt_group(t, KV_S_WO, layer[0], &count);
    const kv_trace *from = count ? t : kvt_side(t, err);
    if (!count && from) first = kvt_group(from, KV_S_WO, layer[0], &count);
    bool f16 = from && count && from->entry[first].dtype == KV_F16;
    if (path && ((st = kv_outfile_open(path, &o, err)) || (st = kv_array(&half, f16 ? n : 0, 2, err)) ||
                 (st = kv_npy_begin(&o, f16 ? "<f2" : "<f4", layer_axis ? 3 : 2, shape + !layer_axis, err))))
        goto out;
    for (uint32_t l = 0; l < n_layer && !st; l++) {
        if ((st = kv_trace_read_wo(t, layer[l], v, err))) break;
        if (path) {
            if (f16) kv_encode_f32(KV_F16, v, n, half);
            if (fwrite(f16 ? (void *)half : (void *)v, f16 ? 2 : 4, n, o.f) != n)
                st = kv_fail(err, KV_EIO, "cannot write '%s': %s", path, strerror(errno));
            continue;
        }
        if (layer_axis) printf("# layer %u\n", layer[l]);
        for (size_t r = 0; r < rows; r++)
            for (size_t c = 0; c < width; c++) printf("%.9g%c", (double)v[r * width + c], c + 1 < width ? ' ' : '\n');
    }
    if (!st && path) st = kv_outfile_commit(&o, err);
out:
    if (o.f) kv_outfile_abandon(&o);
    free(v);
    free(half);
    return st;
}

/* ------------------------------------------------------------------------------------------------ main */
/* Rows of a stream when all of them are there: the tokens, the prompt, one less, one more. */
static uint32_t all_rows(const kv_trace *t, kv_stream s)
{
    const kv_trace_info *i = &t->info;
    switch (s) {
    case KV_S_COLSUM: return i->n_prompt;
    case KV_S_COLSUM_CTX: return i->n_context;
    case KV_S_NLL: return i->n_token - 1;
    case KV_S_OFFSETS: return i->n_token + 1;
    case KV_S_POST_NORM: return i->hidden;
    default: return i->n_token;
    }
}

static kv_status run(int argc, char **argv, int *code, kv_error *err)
{
    const char *stream = NULL, *layer = NULL, *head = NULL, *rows = NULL, *path = NULL;
    kv_list rest = {0};
    const kv_opt opts[] = {{"stream", 's', KV_OPT_STR, &stream}, {"layer", 'l', KV_OPT_STR, &layer},
                           {"head", 0, KV_OPT_STR, &head},       {"rows", 0, KV_OPT_STR, &rows},
                           {"output", 'o', KV_OPT_STR, &path},   {0}};
    kv_trace *t = NULL;
    job j = {0};
    (void)code;
    kv_status st = tr_parse(argc, argv, opts, &rest, 1, 1, err);
    if (st) goto out;
    if (!stream || !kv_stream_parse(stream, &j.stream)) {
        st = kv_fail(err, KV_EMISUSE,
                     "--stream %s: one of q k v map lse colsum rowstat nll tokens text wo is expected%s",
                     stream ? stream : "is missing", stream ? " (or another of info's streams)" : "");
        goto out;
    }
    if ((st = kv_trace_open(rest.v[0], &t, err))) goto out;
    const kvt_stream_info *s = kvt_stream((uint32_t)j.stream);
    j.t = t, j.in = &t->info;
    bool whole = s->kind == 't' || s->kind == 'b';
    if ((whole && layer) || (head && s->kind != 'h' && s->kind != 'g') ||
        (rows && (s->kind == 'b' || j.stream == KV_S_WO))) {
        st = kv_fail(err, KV_EMISUSE, "stream %s has no --%s", s->name,
                     whole && layer                             ? "layer"
                     : head && s->kind != 'h' && s->kind != 'g' ? "head"
                                                                : "rows");
        goto out;
    }
    if (s->kind == 'b') {
        st = cat_bytes(t, j.stream, path, err);
        goto out;
    }
    uint32_t max = all_rows(t, j.stream);
    if (!rows && (j.stream == KV_S_MAP_WINDOW || j.stream == KV_S_LOGITS)) {
        /* Only some rows are meant to be there: all of the first run. */
        size_t count, first = kvt_group(t, (uint32_t)j.stream, whole ? 0 : j.in->layer[0], &count);
        j.a = count ? (uint32_t)t->entry[first].token_first : 0;
        j.b = count ? (uint32_t)kvt_run_end(t, (uint32_t)j.stream, t->entry[first].layer, 0, j.a) : max;
    } else if (rows) {
        if ((st = tr_range(rows, max, &j.a, &j.b, err))) goto out;
    } else {
        j.b = max;
    }
    if (j.a >= j.b) {
        st = kv_fail(err, KV_EMISSING, "trace '%s' holds no %s", t->path, s->name);
        goto out;
    }
    if (layer) {
        if ((st = tr_numbers(layer, "layer", j.in->layer, j.in->n_layer, &j.layer, &j.n_layer, err))) goto out;
    } else {
        j.n_layer = whole ? 1 : j.in->n_layer;
        if ((st = kv_array(&j.layer, j.n_layer, sizeof *j.layer, err))) goto out;
        if (!whole) memcpy(j.layer, j.in->layer, j.n_layer * sizeof *j.layer);
    }
    j.n_head = kvt_heads(j.in, (uint32_t)j.stream);
    if (head) {
        uint32_t end;
        if ((st = tr_range(head, j.n_head, &j.head0, &end, err))) goto out;
        j.n_head = end - j.head0;
    }
    j.layer_axis = !whole && !(layer && j.n_layer == 1);
    j.head_axis = (s->kind == 'h' || s->kind == 'g') && !(head && j.n_head == 1);
    j.row_axis = j.stream != KV_S_LSE && j.stream != KV_S_COLSUM && j.stream != KV_S_COLSUM_CTX &&
                 j.stream != KV_S_NLL && j.stream != KV_S_XNORM;
    if (j.stream == KV_S_TOKENS || j.stream == KV_S_OFFSETS) {
        st = cat_u32(t, j.stream, j.a, j.b, path, err);
        goto out;
    }
    if (j.stream == KV_S_WO) {
        st = cat_wo(t, j.layer, j.n_layer, j.layer_axis, path, err);
        goto out;
    }
    j.how = j.stream == KV_S_MAP       ? MAP
            : j.stream == KV_S_LSE     ? LSE
            : j.stream == KV_S_COLSUM  ? COLSUM
            : j.stream == KV_S_ROWSTAT ? ROWSTAT
                                       : STORED;
    j.width = j.how == MAP ? j.in->n_token : j.how == ROWSTAT ? 4 : 1;
    st = cat_array(&j, path, err);
out:
    if (j.out.f) kv_outfile_abandon(&j.out);
    free(j.layer), free(j.row), free(j.half), free(j.sum);
    kv_trace_close(t);
    kv_list_free(&rest);
    return st;
}

const tr_command tr_cat = {"cat", "a stream as a NumPy file or as text",
                           "usage: kv-trace cat TRACE --stream S [--layer L] [--head H] [--rows A:B] [-o FILE]\n\n"
                           "S: q k v map lse colsum rowstat nll tokens text wo, or any other stream that info shows. "
                           "Arrays are [layers, heads,\n"
                           "tokens(, width)]; --layer or --head with one number drops that axis. lse, colsum, rowstat "
                           "and map are computed from\n"
                           "Q and K, exactly and in double, when they are not stored. Without -o: text; with it: .npy "
                           "(f16 streams as float16,\n"
                           "others as float32, tokens as uint32), or the bytes of text. rowstat is largest p, its "
                           "column, entropy, sum of p^2.\n\n"
                           "  kv-trace cat a.kvt --stream tokens\n"
                           "  kv-trace cat a.kvt --stream map --layer 3 --head 1 -o map.npy\n",
                           run};
