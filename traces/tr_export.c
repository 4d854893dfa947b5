/* tr_export.c - kv-trace export: what a learned evictor is trained on. For each token how much later rows will attend
 * to it, computed from the trace's Q and K, layer by layer; heads side by side. */
#include "traces/derive.h"
#include "traces/npy.h"
#include "traces/tr.h"

#include <errno.h>
#include <jansson.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/stat.h>

enum { MEAN, MOST, LAST, N_FILE }; /* ROWS and the description are written at once */
static const char *const names[N_FILE] = {"mean.npy", "max.npy", "last.npy"};

/* One layer in the making; threads take heads. */
typedef struct {
    const kv_trace *t;
    uint32_t layer, n_head, n, a, b; /* n tokens; rows a..b-1 are measured */
    double threshold;
    float *mean, *most; /* [n_head][n] */
    int32_t *last;      /* [n_head][n] */
    pthread_mutex_t lock;
    uint32_t next;
    kv_progress *bar;
    double done;
    kv_status st; /* the first failure */
    kv_error err;
} layer_job;

typedef struct {
    layer_job *j;
    double *sum; /* [n] */
    float *most;
    int32_t *last;
} head_job;

/* Row i counts for the tokens before it: a token's own row is not its future. */
static kv_status on_row(void *ctx, uint32_t row, const double *p, double lse, kv_error *err)
{
    head_job *h = ctx;
    (void)lse, (void)err;
    for (uint32_t c = 0; c < row; c++) {
        h->sum[c] += p[c];
        if ((float)p[c] > h->most[c]) h->most[c] = (float)p[c];
        if (p[c] >= h->j->threshold) h->last[c] = (int32_t)row;
    }
    return KV_OK;
}

static uint32_t rows_of(const layer_job *j, uint32_t token)
{
    uint32_t from = token + 1 > j->a ? token + 1 : j->a;
    return from < j->b ? j->b - from : 0;
}

static kv_status one_head(layer_job *j, uint32_t head, double *sum, kv_error *err)
{
    size_t at = (size_t)head * j->n;
    head_job h = {j, sum, j->most + at, j->last + at};
    for (uint32_t c = 0; c < j->n; c++) sum[c] = 0, h.most[c] = 0, h.last[c] = -1;
    kv_status st = kvt_derive(j->t, j->layer, head, j->a, j->b, 1, on_row, &h, err);
    for (uint32_t c = 0; c < j->n && !st; c++) j->mean[at + c] = rows_of(j, c) ? (float)(sum[c] / rows_of(j, c)) : 0;
    return st;
}

static void *worker(void *ctx)
{
    layer_job *j = ctx;
    double *sum = NULL;
    kv_error err = {""};
    kv_status st = kv_array(&sum, j->n, sizeof *sum, &err);
    pthread_mutex_lock(&j->lock);
    while (!st && !j->st && j->next < j->n_head) {
        uint32_t head = j->next++;
        pthread_mutex_unlock(&j->lock);
        st = one_head(j, head, sum, &err);
        pthread_mutex_lock(&j->lock);
        kv_progress_step(j->bar, ++j->done, NULL);
    }
    if (st && !j->st) j->st = st, j->err = err;
    pthread_mutex_unlock(&j->lock);
    free(sum);
    return NULL;
}

static kv_status one_layer(layer_job *j, kv_error *err)
{
    pthread_t thread[16];
    uint32_t n = tr_threads(), started = 0;
    j->next = 0;
    while (started + 1 < n && started + 1 < j->n_head && !pthread_create(&thread[started], NULL, worker, j)) started++;
    worker(j);
    while (started) pthread_join(thread[--started], NULL);
    if (j->st && err) *err = j->err;
    return j->st;
}

static kv_status put(kv_outfile *o, const void *p, size_t bytes, kv_error *err)
{
    if (fwrite(p, 1, bytes, o->f) == bytes) return KV_OK;
    return kv_fail(err, KV_EIO, "cannot write '%s': %s", o->path, strerror(errno));
}

static char *in_folder(const char *folder, const char *name, kv_error *err)
{
    char *path = kv_format("%s/%s", folder, name);
    if (!path) kv_fail(err, KV_ENOMEM, "out of memory for a path");
    return path;
}

/* rows.npy, and targets.json: what the numbers are and what they come from. */
static kv_status write_rest(const layer_job *j, const char *folder, kv_error *err)
{
    const kv_trace_info *in = kv_trace_get_info(j->t);
    char *rows_path = in_folder(folder, "rows.npy", err), *path = in_folder(folder, "targets.json", err), *text = NULL;
    int32_t *rows = NULL;
    json_t *layers = json_array(), *o = NULL;
    size_t shape[1] = {j->n};
    kv_status st = rows_path && path ? kv_array(&rows, j->n, sizeof *rows, err) : KV_ENOMEM;
    if (st) goto out;
    for (uint32_t c = 0; c < j->n; c++) rows[c] = (int32_t)rows_of(j, c);
    for (uint32_t l = 0; l < in->n_layer; l++) json_array_append_new(layers, json_integer(in->layer[l]));
    o = json_pack("{s:s,s:s,s:s,s:[i,i],s:f,s:[i,i,i],s:O,s:s,s:s,s:s,s:s}", "trace", kv_trace_path(j->t),
                  "content_sha256", kv_trace_content_sha256(j->t), "model", in->model, "measured_rows", (int)j->a,
                  (int)j->b, "threshold", j->threshold, "shape", (int)in->n_layer, (int)j->n_head, (int)j->n, "layers",
                  layers, "mean.npy", "mean of p over the measured rows behind the token", "max.npy",
                  "largest p of these rows", "last.npy",
                  "last of these rows with p >= threshold, -1 where there is none", "rows.npy",
                  "number of these rows, per token");
    text = o ? json_dumps(o, JSON_INDENT(1)) : NULL;
    if (!text)
        st = kv_fail(err, KV_ENOMEM, "out of memory for '%s'", path);
    else if (!(st = kv_npy_write(rows_path, "<i4", 1, shape, rows, err)))
        st = kv_write_file(path, text, strlen(text), err);
out:
    json_decref(o), json_decref(layers);
    free(rows), free(rows_path), free(path), free(text);
    return st;
}

static kv_status write_targets(layer_job *j, const char *folder, kv_error *err)
{
    const kv_trace_info *in = kv_trace_get_info(j->t);
    kv_outfile file[N_FILE] = {{0}};
    size_t shape[3] = {in->n_layer, j->n_head, j->n}, n;
    uint32_t opened = 0;
    kv_status st = kv_mul(j->n_head, j->n, &n) ? KV_OK : kv_fail(err, KV_EUNSUPPORTED, "too many tokens");
    if (!st) st = kv_array(&j->mean, n, sizeof *j->mean, err);
    if (!st) st = kv_array(&j->most, n, sizeof *j->most, err);
    if (!st) st = kv_array(&j->last, n, sizeof *j->last, err);
    for (uint32_t f = 0; f < N_FILE && !st; f++) {
        char *path = in_folder(folder, names[f], err);
        st = path ? kv_outfile_open(path, &file[f], err) : KV_ENOMEM;
        free(path);
        if (st) break;
        opened++;
        st = kv_npy_begin(&file[f], f == LAST ? "<i4" : "<f4", 3, shape, err);
    }
    if (!st) j->bar = kv_progress_start("measuring", (double)in->n_layer * j->n_head, "heads");
    for (uint32_t l = 0; l < in->n_layer && !st; l++) {
        j->layer = in->layer[l];
        if ((st = one_layer(j, err)) || (st = put(&file[MEAN], j->mean, n * sizeof *j->mean, err)) ||
            (st = put(&file[MOST], j->most, n * sizeof *j->most, err)))
            break;
        st = put(&file[LAST], j->last, n * sizeof *j->last, err);
    }
    kv_progress_end(j->bar);
    for (uint32_t f = 0; f < opened; f++) {
        if (st)
            kv_outfile_abandon(&file[f]);
        else
            st = kv_outfile_commit(&file[f], err);
    }
    free(j->mean), free(j->most), free(j->last);
    return st ? st : write_rest(j, folder, err);
}

static kv_status run(int argc, char **argv, int *code, kv_error *err)
{
    const char *folder = NULL, *rows = NULL;
    bool targets = false;
    kv_list rest = {0};
    layer_job j = {.threshold = 0.01, .lock = PTHREAD_MUTEX_INITIALIZER};
    kv_trace *t = NULL;
    struct stat sb;
    const kv_opt opts[] = {{"targets", 0, KV_OPT_FLAG, &targets},
                           {"rows", 0, KV_OPT_STR, &rows},
                           {"threshold", 0, KV_OPT_F64, &j.threshold},
                           {"output", 'o', KV_OPT_STR, &folder},
                           {0}};
    kv_status st = tr_parse(argc, argv, opts, &rest, 1, 1, err);
    (void)code;
    if (st) goto out;
    if (!targets || !folder) {
        st = kv_fail(err, KV_EMISUSE, targets ? "-o FOLDER is missing" : "what to export: --targets is missing");
    } else if (!(j.threshold > 0 && j.threshold <= 1)) {
        st = kv_fail(err, KV_EMISUSE, "--threshold %g: more than 0 and at most 1 is expected", j.threshold);
    }
    if (st || (st = kv_trace_open(rest.v[0], &t, err))) goto out;
    const kv_trace_info *in = kv_trace_get_info(t);
    j.t = t, j.n = in->n_token, j.n_head = in->n_q_head, j.a = in->n_prompt, j.b = in->n_token;
    if (rows && (st = tr_range(rows, in->n_token, &j.a, &j.b, err))) goto out;
    if (j.a >= j.b || j.b < 2) {
        st = kv_fail(err, KV_EMISUSE,
                     "trace '%s' has no decoded rows to measure: give --rows A:B, as --rows 1:", rest.v[0]);
        goto out;
    }
    if (mkdir(folder, 0777) && (errno != EEXIST || stat(folder, &sb) || !S_ISDIR(sb.st_mode))) {
        st = kv_fail(err, KV_EIO, "cannot make folder '%s': %s", folder, strerror(errno));
        goto out;
    }
    st = write_targets(&j, folder, err);
out:
    kv_trace_close(t);
    kv_list_free(&rest);
    return st;
}

const tr_command tr_export = {
    "export", "attention targets for learned evictors, as NumPy files",
    "usage: kv-trace export --targets TRACE -o FOLDER [--rows A:B] [--threshold X]\n\n"
    "Writes how much later rows attend to each token: float32 [layers, q_heads, tokens]\n"
    "  mean.npy     mean of the probability over the measured rows behind the token\n"
    "  max.npy      the largest of them\n"
    "and int32\n"
    "  last.npy     [layers, q_heads, tokens] the last of these rows with a probability of X (0.01) or more, -1 = "
    "none\n"
    "  rows.npy     [tokens] how many rows that is; tokens with 0 have no future here\n"
    "and targets.json, which says what they come from. Measured are the decoded rows; --rows A:B takes others: with\n"
    "--rows 1: every token has its whole future. Inputs to learn from are in the trace: kv-trace cat --stream "
    "k|v|q.\n\n"
    "  kv-trace export --targets a.kvt -o targets\n"
    "  kv-trace export --targets a.kvt --rows 1: -o targets\n",
    run};
