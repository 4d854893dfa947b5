/* test_traces.c - the trace format: write-read identity, threads, truncation and damage at every place, hostile counts,
 * recovery, the W_O side file, and the commands of kv-trace on top. */
#include "tests/check.h"
#include "traces/derive.h"
#include "traces/npy.h"
#include "traces/tr.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char dir[64];

static const char *in_dir(const char *name)
{
    static char path[8][256];
    static int turn;
    char *p = path[turn++ % 8];
    snprintf(p, 256, "%s/%s", dir, name);
    return p;
}

static bool exists(const char *name)
{
    struct stat sb;
    return !stat(in_dir(name), &sb);
}

/* ------------------------------------------------------------------------------------- a trace with it all */
enum { LAYERS = 3, QH = 4, KVH = 2, DIM = 8, HIDDEN = 12 };

static uint32_t layer_no[LAYERS] = {2, 5, 7}, window[LAYERS] = {0, 16, 0};
static float inv_freq[DIM / 2] = {1, 0.1f, 0.01f, 0.3333333f};
static kv_span evidence[2] = {{3, 7}, {10, 22}};

static kv_trace_info sample_info(uint32_t n)
{
    kv_trace_info i = {.model = "a \"model\" \xc3\xa9", .arch = "llama", .prompt_id = "p1", .category = "code"};
    i.model_sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    i.n_layer = LAYERS, i.layer = layer_no, i.window = window, i.n_layer_model = 9;
    i.n_q_head = QH, i.n_kv_head = KVH, i.head_dim = DIM, i.hidden = HIDDEN;
    i.n_token = n, i.n_prompt = n - n / 10, i.n_context = n / 2;
    i.scale = 0.35355338f, i.rope_theta = 10000.7f, i.inv_freq = inv_freq, i.rope_mscale = 1.1f;
    i.dtype = KV_F16, i.record = "qkv", i.obs_rows = 32, i.evidence = evidence, i.n_evidence = 2;
    i.question = (kv_span){30, 40};
    i.extra = "{\"run\":{\"threads\":2},\"x\":[1,2.5,null]}";
    return i;
}

static float value(uint32_t stream, uint32_t layer, uint32_t head, uint32_t i)
{
    kv_rng r = {stream * 1000003ull + layer * 10007ull + head * 101ull + (uint64_t)i * 7919};
    return kv_f16_to_f32(kv_f32_to_f16((float)kv_rng_normal(&r)));
}

static kv_status put_floats(kv_trace_writer *w, kv_stream s, uint32_t layer, uint32_t heads, uint32_t rows,
                            uint32_t width, kv_dtype d, kv_error *err)
{
    kv_chunk c = {.stream = s, .layer = layer, .head_count = heads, .token_count = rows, .width = width, .dtype = d};
    float *v = malloc(sizeof *v * heads * rows * width);
    for (uint32_t h = 0; h < heads; h++)
        for (uint32_t i = 0; i < rows * width; i++) v[(size_t)h * rows * width + i] = value((uint32_t)s, layer, h, i);
    kv_status st = kv_trace_put_f32(w, &c, v, err);
    free(v);
    return st;
}

/* Writes the streams in pieces as a capture would; stops after `stop` layers and then abandons when stop < LAYERS. */
static kv_status write_sample(const char *path, uint32_t n, uint32_t threads, uint32_t stop, const char *wo,
                              kv_error *err)
{
    kv_trace_info in = sample_info(n);
    kv_trace_writer *w = NULL;
    uint32_t *ids = malloc(sizeof *ids * (n + 1));
    char *text = malloc(n * 3);
    kv_status st;
    in.wo_sha256 = (char *)wo;
    for (uint32_t i = 0; i <= n; i++) ids[i] = i * 3;
    for (uint32_t i = 0; i < n; i++) memcpy(text + 3 * i, "ab ", 3);
    kv_chunk c = {.stream = KV_S_OFFSETS, .head_count = 1, .token_count = n + 1, .width = 1, .dtype = KV_U32};
    if ((st = kv_trace_create(path, &in, "{\"host\":\"h\"}", threads, &w, err))) goto out;
    if ((st = kv_trace_put(w, &c, ids, err))) goto out;
    c.stream = KV_S_TOKENS, c.token_count = n;
    if ((st = kv_trace_put(w, &c, ids, err)) || (st = kv_trace_put_bytes(w, KV_S_TEXT, text, n * 3, err)) ||
        (st = put_floats(w, KV_S_NLL, 0, 1, n - 1, 1, KV_F32, err)))
        goto out;
    for (uint32_t l = 0; l < stop && !st; l++) {
        if ((st = put_floats(w, KV_S_Q, layer_no[l], QH, n, DIM, KV_F16, err)) ||
            (st = put_floats(w, KV_S_K, layer_no[l], KVH, n, DIM, KV_F16, err)) ||
            (st = put_floats(w, KV_S_V, layer_no[l], KVH, n, DIM, KV_BF16, err)) ||
            (st = put_floats(w, KV_S_XNORM, layer_no[l], 1, n, 1, KV_F32, err)))
            break;
    }
    if (!st && stop == LAYERS) {
        st = kv_trace_finish(w, err);
    } else {
        kv_trace_abandon(w);
    }
    w = NULL;
out:
    kv_trace_abandon(w);
    free(ids), free(text);
    return st;
}

/* The same bits as written, all of every stream. */
static bool same_sample(const kv_trace *t, uint32_t n, uint32_t layers)
{
    static const struct {
        kv_stream s;
        uint32_t heads, width;
    } list[] = {{KV_S_Q, QH, DIM}, {KV_S_K, KVH, DIM}, {KV_S_V, KVH, DIM}, {KV_S_XNORM, 1, 1}};
    float *v = malloc(sizeof *v * n * DIM);
    uint32_t *ids = malloc(sizeof *ids * (n + 1));
    bool ok = kv_trace_read_u32(t, KV_S_TOKENS, 0, n, ids, NULL) == KV_OK;
    for (uint32_t i = 0; i < n && ok; i++) ok = ids[i] == i * 3;
    for (uint32_t l = 0; l < layers; l++)
        for (size_t k = 0; k < 4; k++)
            for (uint32_t h = 0; h < list[k].heads && ok; h++) {
                ok = kv_trace_read_f32(t, list[k].s, layer_no[l], h, 0, n, v, NULL) == KV_OK;
                for (uint32_t i = 0; i < n * list[k].width && ok; i++) {
                    float x = value((uint32_t)list[k].s, layer_no[l], h, i);
                    if (list[k].s == KV_S_V) x = kv_bf16_to_f32(kv_f32_to_bf16(x));
                    ok = !memcmp(&v[i], &x, 4);
                }
            }
    free(v), free(ids);
    return ok;
}

/* A kv-trace command in this process; returns the exit code the program would. `say` (NULL allowed) gets the message.
 */
static int command(const tr_command *c, const char *line, kv_error *say)
{
    static char copy[1024];
    char *argv[24] = {(char *)c->name};
    int argc = 1, code = 0;
    kv_error err = {""};
    snprintf(copy, sizeof copy, "%s", line);
    for (char *p = strtok(copy, " "); p; p = strtok(NULL, " ")) argv[argc++] = p;
    fflush(stdout);
    int keep = dup(1), quiet = open("/dev/null", O_WRONLY);
    dup2(quiet, 1);
    kv_status st = c->run(argc, argv, &code, &err);
    fflush(stdout);
    dup2(keep, 1), close(keep), close(quiet);
    if (say) *say = err;
    return st == KV_EMISUSE ? 2 : st ? 1 : code;
}

static int command2(const tr_command *c, const char *a, const char *b, const char *more)
{
    char line[1024];
    snprintf(line, sizeof line, "%s %s %s", a, b, more);
    return command(c, line, NULL);
}

/* --------------------------------------------------------------------------------------- identity */
static void check_info(const kv_trace_info *a, const kv_trace_info *b)
{
    char *x = NULL, *y = NULL;
    CHECK(kvt_info_to_json(a, &x, NULL) == KV_OK && kvt_info_to_json(b, &y, NULL) == KV_OK && !strcmp(x, y));
    CHECK(!strcmp(a->model, b->model) && a->scale == b->scale && a->rope_theta == b->rope_theta);
    CHECK(!memcmp(a->inv_freq, b->inv_freq, sizeof inv_freq) && !memcmp(a->window, b->window, sizeof window));
    CHECK(a->n_evidence == b->n_evidence && !memcmp(a->evidence, b->evidence, sizeof evidence));
    CHECK(b->extra && strstr(b->extra, "\"threads\":2") && strstr(b->extra, "2.5"));
    free(x), free(y);
}

static void test_identity(void)
{
    const uint32_t n = 1300; /* more than one block */
    kv_error err = {""};
    kv_trace *t = NULL, *m = NULL;
    kv_trace_info in = sample_info(n);
    uint8_t *b[3] = {0};
    size_t len[3] = {0};
    const uint32_t threads[3] = {0, 1, 3};
    for (int i = 0; i < 3; i++) {
        CHECKF(write_sample(in_dir("id.kvt"), n, threads[i], LAYERS, NULL, &err) == KV_OK, "%s", err.msg);
        CHECK(!exists("id.kvt.partial"));
        CHECK(kv_read_file(in_dir("id.kvt"), 1 << 26, &b[i], &len[i], &err) == KV_OK);
    }
    CHECK(len[0] == len[1] && !memcmp(b[0], b[1], len[0]));
    CHECK(len[0] == len[2] && !memcmp(b[0], b[2], len[0]));
    CHECKF(kv_trace_open(in_dir("id.kvt"), &t, &err) == KV_OK, "%s", err.msg);
    CHECKF(kv_trace_open_mem(b[0], len[0], &m, &err) == KV_OK, "%s", err.msg);
    if (!t || !m) return;
    CHECK(same_sample(t, n, LAYERS) && same_sample(m, n, LAYERS));
    CHECK(!strcmp(kv_trace_content_sha256(t), kv_trace_content_sha256(m)));
    check_info(&in, kv_trace_get_info(t));
    /* any range of rows, across and inside of blocks */
    float v[40 * DIM];
    static const uint32_t range[][2] = {{0, 1}, {1000, 1040}, {1023, 1024}, {1024, 1025}, {1299, 1300}, {5, 5}};
    for (size_t i = 0; i < sizeof range / sizeof *range; i++) {
        uint32_t a = range[i][0], e = range[i][1], bad = 0;
        CHECK(kv_trace_read_f32(t, KV_S_Q, 5, 3, a, e, v, &err) == KV_OK);
        for (uint32_t k = 0; k < (e - a) * DIM; k++) bad += v[k] != value(KV_S_Q, 5, 3, a * DIM + k);
        CHECKF(!bad, "rows %u:%u", a, e);
    }
    CHECK(kv_trace_has(t, KV_S_Q, 7, 3, 0, n) && !kv_trace_has(t, KV_S_Q, 7, 3, 0, n + 1));
    CHECK(!kv_trace_has(t, KV_S_Q, 7, 4, 0, 1) && !kv_trace_has(t, KV_S_Q, 3, 0, 0, 1));
    CHECK(!kv_trace_has(t, KV_S_LSE, 2, 0, 0, 1) && kv_trace_has(t, KV_S_TEXT, 0, 0, 0, 0));
    CHECK(kv_trace_width(t, KV_S_Q) == DIM && kv_trace_width(t, KV_S_NLL) == 1 && !kv_trace_width(t, KV_S_LSE));
    CHECK(kv_trace_read_f32(t, KV_S_LSE, 2, 0, 0, 1, v, &err) == KV_EMISSING && strstr(err.msg, "--record"));
    CHECK(kv_trace_read_f32(t, KV_S_Q, 2, 0, 1299, 1301, v, &err) == KV_EMISSING && strstr(err.msg, "0:1300"));
    CHECK(kv_trace_read_f32(t, KV_S_TOKENS, 0, 0, 0, 1, v, &err) == KV_EMISSING);
    CHECK(!kv_trace_has_wo(t, 2) && kv_trace_read_wo(t, 2, v, &err) == KV_EMISSING);
    kv_trace_usage u = kv_trace_reader_usage(t);
    CHECK(u.raw[KV_S_Q] == 2ull * LAYERS * QH * n * DIM && u.stored[KV_S_Q] < u.raw[KV_S_Q]);
    char *text = NULL;
    size_t nt;
    CHECK(kv_trace_read_bytes(t, KV_S_TEXT, &text, &nt, &err) == KV_OK && nt == 3 * n && !strncmp(text, "ab ab ", 6));
    free(text);
    /* every byte belongs to a zstd frame or a skippable frame */
    if (system("zstd --version >/dev/null 2>&1") == 0) {
        char *cmd = kv_format("zstd -q -t '%s'", in_dir("id.kvt"));
        CHECK(cmd && system(cmd) == 0);
        free(cmd);
    } else {
        SKIP("no zstd program");
    }
    kvt_checked c;
    CHECKF(kvt_verify(t, true, &c, &err) == KV_OK, "%s", err.msg);
    CHECK(c.bytes > 0 && c.chunks == t->n);
    /* provenance and replaced metadata are outside of the content hash; anything else is inside */
    kv_trace_close(m);
    m = NULL;
    kv_trace_writer *w = NULL;
    char sha[3][65];
    for (int i = 0; i < 3; i++) {
        in.extra = i == 1 ? "{\"stale\":1}" : NULL;
        CHECK(kv_trace_create(in_dir("sha.kvt"), &in, i ? "{\"host\":\"other\"}" : NULL, 0, &w, &err) == KV_OK);
        in.extra = NULL, in.n_token = n - (uint32_t)(i == 2), in.n_prompt = 1, in.n_context = 0;
        CHECK(kv_trace_set_info(w, &in, &err) == KV_OK);
        CHECK(put_floats(w, KV_S_K, 2, KVH, 9, DIM, KV_F16, &err) == KV_OK && kv_trace_finish(w, &err) == KV_OK);
        CHECK(kv_trace_open(in_dir("sha.kvt"), &m, &err) == KV_OK);
        CHECK(m->info.n_token == in.n_token && m->info.n_prompt == 1 && !m->info.extra);
        memcpy(sha[i], kv_trace_content_sha256(m), 65);
        kv_trace_close(m);
        m = NULL;
        in = sample_info(n);
    }
    CHECK(!strcmp(sha[0], sha[1]) && strcmp(sha[0], sha[2]));
    kv_trace_close(t);
    for (int i = 0; i < 3; i++) free(b[i]);
}

static void *read_all(void *arg)
{
    return same_sample(arg, 1300, LAYERS) ? arg : NULL;
}

static void test_reading_threads(void)
{
    kv_trace *t = NULL;
    pthread_t id[4];
    CHECK(kv_trace_open(in_dir("id.kvt"), &t, NULL) == KV_OK);
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&id[i], NULL, read_all, t) == 0);
    for (int i = 0; i < 4; i++) {
        void *ok = NULL;
        CHECK(pthread_join(id[i], &ok) == 0 && ok);
    }
    kv_trace_close(t);
}

/* Chunks are cut into blocks by one rule; odd shapes survive it. */
static void test_shapes(void)
{
    kv_trace_info in = sample_info(40);
    kv_trace_writer *w = NULL;
    kv_trace *t = NULL;
    kv_error err = {""};
    uint32_t wide = 5u << 20; /* rows of 20 MiB: blocks of three rows, two heads of which do not fit */
    in.n_token = in.n_prompt = 4, in.n_context = 0;
    float *v = calloc((size_t)wide * 4, 4), *back = malloc((size_t)wide * 4);
    for (uint32_t i = 0; i < 4; i++) v[(size_t)i * wide + i] = (float)(i + 1);
    kv_chunk c = {.stream = KV_S_MAP, .layer = 2, .head_count = 1, .token_count = 4, .width = wide, .dtype = KV_F32};
    CHECK(kv_trace_create(in_dir("shape.kvt"), &in, NULL, 2, &w, &err) == KV_OK);
    CHECKF(kv_trace_put(w, &c, v, &err) == KV_OK, "%s", err.msg);
    kv_chunk bad[] = {c, c, c, c, c};
    bad[0].width = 0, bad[1].head_first = KV_HEADS_MAX, bad[2].layer = KV_LAYERS_MAX, bad[3].stream = KV_S_TEXT;
    bad[4].token_count = 0;
    for (int i = 0; i < 5; i++) CHECKF(kv_trace_put(w, &bad[i], v, &err) == KV_EMISUSE, "bad chunk %d", i);
    v[0] = 70000;
    c.dtype = KV_F16, c.layer = 5, c.width = 4;
    CHECK(kv_trace_put_f32(w, &c, v, &err) == KV_EUNSUPPORTED && strstr(err.msg, "layer 5"));
    CHECK(kv_trace_put_bytes(w, KV_S_K, "x", 1, &err) == KV_EMISUSE);
    CHECK(kv_trace_put_bytes(w, KV_S_TEXT, "", 0, &err) == KV_OK);
    CHECKF(kv_trace_finish(w, &err) == KV_OK, "%s", err.msg);
    CHECKF(kv_trace_open(in_dir("shape.kvt"), &t, &err) == KV_OK, "%s", err.msg);
    for (uint32_t i = 0; i < 4 && t; i++) {
        CHECK(kv_trace_read_f32(t, KV_S_MAP, 2, 0, i, i + 1, back, &err) == KV_OK);
        CHECK(back[i] == (float)(i + 1) && back[wide - 1] == 0);
    }
    char *text = NULL;
    size_t n = 9;
    CHECK(t && kv_trace_read_bytes(t, KV_S_TEXT, &text, &n, &err) == KV_OK && n == 0 && text[0] == 0);
    free(text), free(v), free(back);
    kv_trace_close(t);
    /* a target that is not a regular file is written in place */
    CHECK(write_sample("/dev/null", 50, 2, LAYERS, NULL, &err) == KV_OK && !exists("null.partial"));
    CHECK(write_sample(dir, 50, 0, LAYERS, NULL, &err) == KV_EIO);
    CHECK(write_sample(in_dir("no/such.kvt"), 50, 0, LAYERS, NULL, &err) == KV_EIO);
    if (!access("/dev/full", W_OK)) CHECK(write_sample("/dev/full", 50, 2, LAYERS, NULL, &err) == KV_EIO);
    in.n_kv_head = 3;
    CHECK(kv_trace_create(in_dir("bad.kvt"), &in, NULL, 0, &w, &err) == KV_EFORMAT && !w && !exists("bad.kvt.partial"));
}

/* --------------------------------------------------------------------------------------------- damage */
/* Open and verify a memory image; true when everything about it is right. */
static bool whole(const uint8_t *b, size_t n)
{
    kv_trace *t = NULL;
    kvt_checked c;
    kv_error err = {""};
    bool ok = kv_trace_open_mem(b, n, &t, &err) == KV_OK && kvt_verify(t, true, &c, &err) == KV_OK;
    if (!ok) CHECK(err.msg[0] && !strchr(err.msg, '\n'));
    kv_trace_close(t);
    return ok;
}

/* Recover of the image gives an exit code of its own; 0 and 3 mean a good trace of the old content. */
static int recover_image(const uint8_t *b, size_t n, uint32_t rows)
{
    remove(in_dir("out.kvt"));
    CHECK(kv_write_file(in_dir("in.kvt"), b, n, NULL) == KV_OK);
    int code = command2(&tr_recover, in_dir("in.kvt"), in_dir("out.kvt"), "");
    kv_trace *t = NULL;
    CHECKF(code == 0 || code == 1 || code == 3, "exit %d", code);
    CHECK(exists("out.kvt") == (code != 1) && !exists("out.kvt.recovered") && !exists("out.kvt.recovered.partial"));
    if (code == 1) return code;
    CHECK(kv_trace_open(in_dir("out.kvt"), &t, NULL) == KV_OK);
    if (code == 0) CHECK(t && same_sample(t, rows, LAYERS));
    kv_trace_close(t);
    return code;
}

static void test_truncation(void)
{
    const uint32_t n = 60;
    kv_error err = {""};
    kv_trace *t = NULL;
    uint8_t *b = NULL;
    size_t len = 0, tried = 0;
    int codes[4] = {0};
    CHECK(write_sample(in_dir("tr.kvt"), n, 0, LAYERS, NULL, &err) == KV_OK);
    CHECK(kv_read_file(in_dir("tr.kvt"), 1 << 26, &b, &len, &err) == KV_OK && whole(b, len));
    CHECK(kv_trace_open(in_dir("tr.kvt"), &t, &err) == KV_OK);
    if (!t) return;
    /* every offset: refused, and says so without reading beyond */
    for (size_t cut = 0; cut < len; cut++) {
        uint8_t *exact = malloc(cut ? cut : 1); /* so that the sanitizer sees one byte too many */
        kv_trace *x = NULL;
        memcpy(exact, b, cut);
        if (kv_trace_open_mem(exact, cut, &x, &err) == KV_OK) CHECKF(false, "opened when cut at %zu of %zu", cut, len);
        kv_trace_close(x);
        free(exact);
        tried++;
    }
    CHECKF(tried == len, "%zu", tried);
    /* recovery at every frame boundary and one byte beside it */
    for (size_t i = 0; i < t->n; i++) {
        size_t ends[3] = {t->entry[i].offset, t->entry[i].offset + kvt_header_bytes(&t->entry[i])};
        ends[2] = ends[1] + t->entry[i].stored;
        for (int k = 0; k < 9; k++) codes[recover_image(b, ends[k / 3] + (size_t)(k % 3) - 1, n)]++;
    }
    CHECKF(codes[0] > 0 && codes[1] > 0 && codes[3] > 0, "%d whole, %d nothing, %d in part", codes[0], codes[1],
           codes[3]);
    CHECK(recover_image(b, len, n) == 0 && recover_image(b, len - 1, n) == 0 && recover_image(b, len - 65, n) == 0);
    CHECK(recover_image(b, 0, n) == 1 && recover_image(b, 48, n) == 1);
    CHECK(recover_image((const uint8_t *)"not a trace at all, but long enough to look at it", 49, n) == 1);
    kv_trace_close(t);
    free(b);
}

static void test_flips(void)
{
    const uint32_t n = 60;
    uint8_t *b = NULL;
    size_t len = 0, quiet = 0, partly = 0;
    int codes[4] = {0};
    kv_rng r = {11};
    CHECK(kv_read_file(in_dir("tr.kvt"), 1 << 26, &b, &len, NULL) == KV_OK);
    for (size_t at = 0; at<len; at += len> 20000 ? 3 : 1) {
        uint8_t old = b[at];
        b[at] ^= (uint8_t)(1u << kv_rng_next(&r) % 8);
        if (whole(b, len)) quiet++, printf("unnoticed: bit in byte %zu of %zu\n", at, len);
        if (at % 97 == 0) {
            int code = recover_image(b, len, n);
            codes[code]++, partly += code != 1;
        }
        b[at] = old;
    }
    CHECKF(quiet == 0, "%zu flips unnoticed", quiet);
    /* one damaged place never costs everything: metadata stands twice, layers are independent */
    CHECKF(codes[1] == 0 && partly > 10, "%d of %zu recoveries found nothing", codes[1], partly);
    /* a damaged chunk header is replaced by what the index knows: nothing is lost */
    kv_trace *t = NULL;
    CHECK(kv_trace_open(in_dir("tr.kvt"), &t, NULL) == KV_OK);
    size_t count, first = kvt_group(t, KV_S_K, 5, &count);
    b[t->entry[first].offset + 30] ^= 255;
    CHECK(recover_image(b, len, n) == 0);
    memset(b + t->entry[first].offset, 0, 96); /* lost frame, lost tag */
    CHECK(recover_image(b, len, n) == 0);
    b[t->entry[first].offset + 300] ^= 1; /* and its payload: the layer goes, the others stay */
    CHECK(recover_image(b, len, n) == 3);
    kv_trace *o = NULL;
    CHECK(kv_trace_open(in_dir("out.kvt"), &o, NULL) == KV_OK);
    CHECK(o && o->info.n_layer == 2 && o->info.layer[0] == 2 && o->info.layer[1] == 7 && o->info.window[1] == 0);
    kv_trace_close(o);
    kv_trace_close(t);
    free(b);
}

static void reseal(uint8_t *p, kvt_tag tag)
{
    kvt_seal(p, (size_t)kv_get32(p + 4) + 8, tag);
}

/* Numbers that are lies, under right checksums. */
static void test_lies(void)
{
    uint8_t *good = NULL, *b;
    size_t len = 0;
    kv_error err;
    CHECK(kv_read_file(in_dir("tr.kvt"), 1 << 26, &good, &len, NULL) == KV_OK);
    b = malloc(len);
    size_t foot = len - KVT_FOOT_BYTES, index = kv_get64(good + foot + 16), n = kv_get64(good + foot + 32);
    static const struct {
        int at, bytes;
        uint64_t v;
    } entry[] = {{8, 2, 99},          {10, 2, 900},
                 {12, 2, 1023},       {14, 2, 0},
                 {14, 2, 65535},      {16, 8, 1ull << 62},
                 {24, 4, 0},          {24, 4, 0xffffffff},
                 {28, 1, 77},         {29, 1, 9},
                 {30, 1, 0},          {30, 1, 200},
                 {32, 4, 0},          {32, 4, 0xffffffff},
                 {36, 4, 0},          {36, 4, 0xffffffff},
                 {40, 8, 1ull << 63}, {40, 8, 0},
                 {48, 8, 1ull << 63}, {48, 8, 1ull << 29},
                 {64, 8, 0},          {64, 8, 0xffffffffffff}};
    uint32_t refused = 0;
    for (size_t e = 0; e < n; e += 3)
        for (size_t i = 0; i < sizeof entry / sizeof *entry; i++) {
            memcpy(b, good, len);
            memcpy(b + index + 32 + e * KVT_ENT_BYTES + entry[i].at, &entry[i].v, (size_t)entry[i].bytes);
            reseal(b + index, KVT_INDEX);
            refused += !whole(b, len);
        }
    CHECKF(refused == (n + 2) / 3 * (sizeof entry / sizeof *entry), "%u", refused);
    static const struct {
        int at;
        uint64_t v;
    } footer[] = {{16, 0}, {16, 1ull << 63}, {24, 0}, {24, UINT64_MAX}, {32, 0}, {32, UINT64_MAX}, {48, 0}};
    for (size_t i = 0; i < sizeof footer / sizeof *footer; i++) {
        memcpy(b, good, len);
        kv_put64(b + foot + footer[i].at, footer[i].v);
        reseal(b + foot, KVT_FOOT);
        CHECKF(!whole(b, len), "footer lie %zu", i);
    }
    static const uint32_t counts[][2] = {{16, 0}, {16, 71}, {16, 0xffffffff}, {20, 0}, {20, 0xffffffff}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        memcpy(b, good, len);
        kv_put32(b + index + counts[i][0], counts[i][1]);
        reseal(b + index, KVT_INDEX);
        CHECKF(!whole(b, len), "index lie %zu", i);
    }
    /* versions and features of tomorrow */
    kv_trace *t = NULL;
    memcpy(b, good, len);
    kv_put64(b + 24, 4), reseal(b, KVT_HEAD);
    CHECK(kv_trace_open_mem(b, len, &t, &err) == KV_EUNSUPPORTED && recover_image(b, len, 60) == 1);
    memcpy(b, good, len);
    kv_put16(b + 16, 2), reseal(b, KVT_HEAD);
    CHECK(kv_trace_open_mem(b, len, &t, &err) == KV_EUNSUPPORTED && strstr(err.msg, "2.0"));
    memcpy(b, good, len);
    kv_put64(b + 32, 4), kv_put16(b + 18, 9), reseal(b, KVT_HEAD);
    CHECK(whole(b, len)); /* unknown but compatible */
    /* other files */
    static const char *const foreign[][2] = {{"GGUF", "GGUF"},
                                             {"\x1f\x8b", "gzip"},
                                             {"\x28\xb5\x2f\xfd", "zstd"},
                                             {"\x93NUMPY", "NumPy"},
                                             {"SQLite format 3", "database"},
                                             {"", "magic"}};
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        memset(b, 'x', len);
        memcpy(b, foreign[i][0], strlen(foreign[i][0]));
        CHECKF(kv_trace_open_mem(b, len, &t, &err) == KV_EFORMAT && strstr(err.msg, foreign[i][1]), "%s", err.msg);
    }
    CHECK(kv_trace_open(dir, &t, &err) == KV_EIO && kv_trace_open(in_dir("absent"), &t, &err) == KV_EIO);
    CHECK(kv_trace_open("/dev/zero", &t, &err) == KV_EIO && !t);
    free(b), free(good);
}

/* Metadata is JSON from a stranger. */
static void test_metadata(void)
{
    static const char *const bad[] = {
        "",
        "[]",
        "{",
        "null",
        "{\"model\":1}",
        "{\"layers\":[0],\"window\":[0],\"model\":\"m\"}", /* most of it missing */
    };
    static const char *const swap[][2] = {
        {"\"layers\":[2,5,7]", "\"layers\":[2,2,7]"},
        {"\"layers\":[2,5,7]", "\"layers\":[2,5,99]"},
        {"\"layers\":[2,5,7]", "\"layers\":[]"},
        {"\"layers\":[2,5,7]", "\"layers\":{}"},
        {"\"kv_heads\":2", "\"kv_heads\":3"},
        {"\"kv_heads\":2", "\"kv_heads\":0"},
        {"\"q_heads\":4", "\"q_heads\":4000000000"},
        {"\"q_heads\":4", "\"q_heads\":-4"},
        {"\"q_heads\":4", "\"q_heads\":4.0"},
        {"\"head_dim\":8", "\"head_dim\":99999"},
        {"\"tokens\":60", "\"tokens\":0"},
        {"\"tokens\":60", "\"tokens\":9999999999"},
        {"\"prompt_tokens\":54", "\"prompt_tokens\":61"},
        {"\"context_tokens\":30", "\"context_tokens\":55"},
        {"\"dtype\":\"f16\"", "\"dtype\":\"f17\""},
        {"\"dtype\":\"f16\"", "\"dtype\":\"u8\""},
        {"\"scale\":", "\"scale\":1e999,\"y\":"},
        {"\"scale\":", "\"scale\":1e300,\"y\":"},
        {"\"rope_dim\":0", "\"rope_dim\":7"},
        {"\"rope_dim\":0", "\"rope_dim\":4294967295"},
        {"\"arch\":\"llama\"", "\"arch\":null"},
        {"\"model_sha256\":\"0", "\"model_sha256\":\"../../x"},
        {"\"window\":[0,16,0]", "\"window\":[0]"},
        {"\"evidence\":[[3,7]", "\"evidence\":[[7,3]"},
        {"\"evidence\":[[3,7]", "\"evidence\":[[7]"},
        {"\"question\":[30,40]", "\"question\":[40,30]"},
        {"\"obs_rows\":32", "\"tokens\":32"}, /* a key twice */
    };
    kv_trace_info in = sample_info(60), back;
    kv_error err;
    char *json = NULL;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECKF(kvt_info_from_json(bad[i], strlen(bad[i]), &back, &err) == KV_EFORMAT, "%s", bad[i]);
    CHECK(kvt_info_to_json(&in, &json, &err) == KV_OK && kvt_info_from_json(json, strlen(json), &back, &err) == KV_OK);
    kv_trace_info_free(&back);
    for (size_t i = 0; json && i < sizeof swap / sizeof *swap; i++) {
        char *at = strstr(json, swap[i][0]), *lie;
        CHECKF(at != NULL, "%s in %s", swap[i][0], json);
        if (!at) continue;
        lie = kv_format("%.*s%s%s", (int)(at - json), json, swap[i][1], at + strlen(swap[i][0]));
        CHECKF(kvt_info_from_json(lie, strlen(lie), &back, &err) == KV_EFORMAT, "%s", swap[i][1]);
        free(lie);
    }
    free(json);
    in.model = "\xff\xfe";
    CHECK(kvt_info_to_json(&in, &json, &err) == KV_EFORMAT && strstr(err.msg, "UTF-8"));
    in = sample_info(60);
    in.extra = "{\"tokens\":1}";
    CHECK(kvt_info_to_json(&in, &json, &err) == KV_EMISUSE);
    in.extra = "[1]";
    CHECK(kvt_info_to_json(&in, &json, &err) == KV_EMISUSE);
}

/* ------------------------------------------------------------------------------- unfinished and full disks */
static void test_unfinished(void)
{
    kv_error err = {""};
    kv_trace *t = NULL;
    const uint32_t n = 60;
    /* stopped after two of three layers */
    CHECK(write_sample(in_dir("un.kvt"), n, 2, 2, NULL, &err) == KV_OK);
    CHECK(!exists("un.kvt") && exists("un.kvt.partial"));
    CHECK(kv_trace_open(in_dir("un.kvt.partial"), &t, &err) == KV_EFORMAT && strstr(err.msg, "recover"));
    CHECK(command2(&tr_recover, in_dir("un.kvt.partial"), in_dir("un.kvt"), "") == 3);
    CHECK(exists("un.kvt.partial")); /* IN is OUT.partial here and must survive */
    CHECK(kv_trace_open(in_dir("un.kvt"), &t, &err) == KV_OK && t->info.n_layer == 2 && same_sample(t, n, 2));
    kv_trace_close(t);
    /* a run that stopped while decoding: all layers, fewer tokens */
    kv_trace_info in = sample_info(60);
    kv_trace_writer *w = NULL;
    uint32_t ids[60] = {0};
    in.n_prompt = 40, in.n_context = 0;
    CHECK(kv_trace_create(in_dir("dec.kvt"), &in, NULL, 1, &w, &err) == KV_OK);
    kv_chunk c = {.stream = KV_S_TOKENS, .head_count = 1, .token_count = 60, .width = 1, .dtype = KV_U32};
    CHECK(kv_trace_put(w, &c, ids, &err) == KV_OK);
    float v[QH * 60 * DIM] = {0};
    c.width = DIM, c.dtype = KV_F16;
    for (uint32_t step = 0; step < 3; step++) /* rows 0:40, 40:50, 50:60; the last reaches layer 2 only */
        for (uint32_t l = 0; l < (step < 2 ? LAYERS : 1u); l++)
            for (kv_stream s = KV_S_Q; s <= KV_S_V; s++) {
                c.stream = s, c.layer = layer_no[l], c.head_count = s == KV_S_Q ? QH : KVH;
                c.token_first = step ? 30 + 10 * step : 0, c.token_count = step ? 10 : 40;
                CHECK(kv_trace_put_f32(w, &c, v, &err) == KV_OK);
            }
    kv_trace_abandon(w);
    CHECK(command2(&tr_recover, in_dir("dec.kvt.partial"), in_dir("dec.kvt"), "") == 3);
    CHECK(kv_trace_open(in_dir("dec.kvt"), &t, &err) == KV_OK);
    CHECK(t && t->info.n_layer == LAYERS && t->info.n_token == 50 && t->info.n_prompt == 40);
    CHECK(t && kv_trace_has(t, KV_S_Q, 7, 3, 0, 50) && !kv_trace_has(t, KV_S_Q, 2, 0, 50, 51));
    CHECK(t && kv_trace_has(t, KV_S_TOKENS, 0, 0, 0, 50) && !kv_trace_has(t, KV_S_TOKENS, 0, 0, 0, 51));
    kv_trace_close(t);
    /* a full disk, at many places: an error, never a file under the final name, and the partial can be recovered */
    uint32_t saved = 0;
    struct stat sb;
    CHECK(stat(in_dir("tr.kvt"), &sb) == 0);
    for (rlim_t limit = 0; limit < (rlim_t)sb.st_size; limit += 1500) {
        remove(in_dir("full.kvt.partial"));
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            struct rlimit rl = {limit, limit};
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &rl);
            _exit(write_sample(in_dir("full.kvt"), 60, limit % 2000 ? 2 : 0, LAYERS, NULL, &err) == KV_EIO ? 7 : 8);
        }
        int status = 0;
        CHECK(pid > 0 && waitpid(pid, &status, 0) == pid);
        CHECKF(WIFEXITED(status) && WEXITSTATUS(status) == 7 && !exists("full.kvt"), "limit %d", (int)limit);
        if (!exists("full.kvt.partial")) continue;
        saved += command2(&tr_recover, in_dir("full.kvt.partial"), in_dir("full_saved.kvt"), "") == 3;
    }
    CHECKF(saved > 3, "%u recovered", saved);
}

/* ------------------------------------------------------------------------------------------------- W_O */
static void test_side_file(void)
{
    enum { WIDTH = QH * DIM };
    uint16_t raw[LAYERS][HIDDEN * WIDTH];
    kv_trace_info in = sample_info(60);
    kv_trace_writer *w = NULL;
    kv_trace *t = NULL;
    kv_error err = {""};
    kv_sha256 s;
    char sha[65];
    float got[HIDDEN * WIDTH];
    kv_sha256_init(&s);
    for (uint32_t l = 0; l < LAYERS; l++) {
        for (uint32_t i = 0; i < HIDDEN * WIDTH; i++) raw[l][i] = kv_f32_to_f16(value(KV_S_WO, l, 0, i));
        kv_wo_hash(&s, layer_no[l], HIDDEN, WIDTH, KV_F16, raw[l]);
    }
    kv_sha256_hex(&s, sha);
    CHECK(write_sample(in_dir("wo.kvt"), 60, 0, LAYERS, sha, &err) == KV_OK);
    char *path = kv_wo_path(in_dir("wo.kvt"), sha);
    CHECK(path && !strncmp(path, dir, strlen(dir)) && strstr(path, "/wo-") &&
          strlen(strrchr(path, '/')) == 1 + 3 + 16 + 4);
    /* not there yet */
    CHECK(kv_trace_open(in_dir("wo.kvt"), &t, &err) == KV_OK && !kv_trace_has_wo(t, 2));
    CHECK(kv_trace_read_wo(t, 2, got, &err) == KV_EMISSING && strstr(err.msg, "side file"));
    kv_trace_close(t);
    for (int lie = 0; lie < 2; lie++) {
        in.wo_sha256 = lie ? (char *)"00000000000000000123456789abcdef0123456789abcdef0123456789abcdef" : sha;
        CHECK(kv_trace_create(path, &in, NULL, 0, &w, &err) == KV_OK);
        kv_chunk c = {.stream = KV_S_WO, .head_count = 1, .token_count = HIDDEN, .width = WIDTH, .dtype = KV_F16};
        for (uint32_t l = 0; l < LAYERS; l++) {
            c.layer = layer_no[l];
            CHECK(kv_trace_put(w, &c, raw[l], &err) == KV_OK);
        }
        CHECK(kv_trace_finish(w, &err) == KV_OK);
        CHECK(kv_trace_open(in_dir("wo.kvt"), &t, &err) == KV_OK);
        CHECK(kv_trace_has_wo(t, 7) == !lie && !kv_trace_has_wo(t, 3));
        if (lie) {
            CHECK(kv_trace_read_wo(t, 7, got, &err) == KV_EMISSING && strstr(err.msg, "other weights"));
        } else {
            uint32_t bad = 0;
            CHECK(kv_trace_read_wo(t, 7, got, &err) == KV_OK);
            for (uint32_t i = 0; i < HIDDEN * WIDTH; i++) bad += kv_f32_to_f16(got[i]) != raw[2][i];
            CHECK(!bad);
            CHECK(command2(&tr_verify, "--deep", path, in_dir("wo.kvt")) == 0);
            /* a part of the heads carries its columns with it */
            CHECK(command2(&tr_slice, in_dir("wo.kvt"), in_dir("head1.kvt"), "--heads 1 --layers 5") == 0);
            kv_trace *h = NULL;
            CHECK(kv_trace_open(in_dir("head1.kvt"), &h, &err) == KV_OK && h->info.n_q_head == 2 && !h->info.wo_sha256);
            CHECK(h && kv_trace_read_wo(h, 5, got, &err) == KV_OK && kv_trace_width(h, KV_S_WO) == WIDTH / 2);
            for (uint32_t r = 0; r < HIDDEN; r++)
                for (uint32_t i = 0; i < WIDTH / 2; i++)
                    bad += kv_f32_to_f16(got[r * WIDTH / 2 + i]) != raw[1][r * WIDTH + WIDTH / 2 + i];
            CHECK(!bad);
            kv_trace_close(h);
        }
        kv_trace_close(t);
    }
    /* weights that are not what their hash says */
    raw[1][5] ^= 1;
    in.wo_sha256 = sha;
    CHECK(kv_trace_create(path, &in, NULL, 0, &w, &err) == KV_OK);
    kv_chunk c = {.stream = KV_S_WO, .head_count = 1, .token_count = HIDDEN, .width = WIDTH, .dtype = KV_F16};
    for (uint32_t l = 0; l < LAYERS; l++) {
        c.layer = layer_no[l];
        CHECK(kv_trace_put(w, &c, raw[l], &err) == KV_OK);
    }
    kvt_checked checked;
    CHECK(kv_trace_finish(w, &err) == KV_OK && kv_trace_open(in_dir("wo.kvt"), &t, &err) == KV_OK);
    CHECK(t && kvt_verify(t, true, &checked, &err) == KV_EFORMAT && strstr(err.msg, "hash"));
    kv_trace_close(t);
    free(path);
}

/* ---------------------------------------------------------------------------------------------- commands */
static void test_commands(void)
{
    kv_error err = {""};
    kv_trace *a = NULL, *b = NULL;
    kv_npy x = {0}, y = {0};
    const char *synth = "--layers 3 --q-heads 4 --kv-heads 2 --head-dim 16 --tokens 200 --prompt-tokens 150 -o";
    CHECK(command2(&tr_synth, synth, in_dir("s.kvt"), "") == 0);
    CHECK(command2(&tr_synth, synth, in_dir("s2.kvt"), "--seed 2") == 0);
    CHECK(command2(&tr_synth, synth, in_dir("s1.kvt"), "--seed 1") == 0);
    CHECK(command2(&tr_diff, in_dir("s.kvt"), in_dir("s1.kvt"), "") == 0);
    CHECK(command2(&tr_diff, in_dir("s.kvt"), in_dir("s2.kvt"), "") == 1);
    CHECK(command2(&tr_diff, in_dir("s.kvt"), in_dir("tr.kvt"), "") == 1);
    CHECK(command2(&tr_info, in_dir("s.kvt"), "--json", "") == 0 && command2(&tr_info, in_dir("s.kvt"), "", "") == 0);
    CHECK(command2(&tr_verify, in_dir("s.kvt"), in_dir("s2.kvt"), "--deep") == 0);
    CHECK(command2(&tr_verify, in_dir("s.kvt"), in_dir("absent.kvt"), "--json") == 1);
    /* a slice of everything has the same content; parts agree with the whole */
    CHECK(command2(&tr_slice, in_dir("s.kvt"), in_dir("all.kvt"), "") == 0);
    CHECK(kv_trace_open(in_dir("s.kvt"), &a, &err) == KV_OK && kv_trace_open(in_dir("all.kvt"), &b, &err) == KV_OK);
    CHECK(!strcmp(kv_trace_content_sha256(a), kv_trace_content_sha256(b)));
    kv_trace_close(b);
    CHECK(command2(&tr_slice, in_dir("s.kvt"), in_dir("part.kvt"), "--layers 0,2 --heads 1 --tokens 0:120") == 0);
    CHECK(kv_trace_open(in_dir("part.kvt"), &b, &err) == KV_OK && b->info.n_layer == 2 && b->info.layer[1] == 2);
    CHECK(b->info.n_token == 120 && b->info.n_prompt == 120 && b->info.n_q_head == 2 && b->info.n_kv_head == 1);
    float p[120 * 16], q[120 * 16];
    for (uint32_t h = 0; h < 2; h++) {
        CHECK(kv_trace_read_f32(a, KV_S_Q, 2, 2 + h, 0, 120, p, &err) == KV_OK);
        CHECK(kv_trace_read_f32(b, KV_S_Q, 2, h, 0, 120, q, &err) == KV_OK && !memcmp(p, q, sizeof p));
    }
    uint32_t off[2];
    char *text = NULL;
    size_t n = 0;
    CHECK(kv_trace_read_u32(b, KV_S_OFFSETS, 119, 121, off, &err) == KV_OK);
    CHECK(kv_trace_read_bytes(b, KV_S_TEXT, &text, &n, &err) == KV_OK && n == off[1]);
    free(text);
    kv_trace_close(b);
    CHECK(command2(&tr_slice, in_dir("s.kvt"), in_dir("x.kvt"), "--tokens 5:20") == 2 && !exists("x.kvt"));
    CHECK(command2(&tr_slice, in_dir("s.kvt"), in_dir("x.kvt"), "--layers 3") == 2);
    CHECK(command2(&tr_slice, in_dir("s.kvt"), in_dir("x.kvt"), "--heads 0:3") == 0);
    CHECK(command2(&tr_slice, in_dir("s.kvt"), in_dir("x.kvt"), "--tokens 0:201") == 2);
    /* cat, then import, then cat: the same arrays */
    for (int i = 0; i < 4; i++) {
        char *line = kv_format("%s --stream %s -o %s/%s.npy", in_dir("s.kvt"), (const char *[]){"q", "k", "v", "wo"}[i],
                               dir, (const char *[]){"q", "k", "v", "wo"}[i]);
        CHECK(command(&tr_cat, line, &err) == 0);
        free(line);
    }
    CHECK(kv_npy_read(in_dir("q.npy"), &x, &err) == KV_OK && x.rank == 4 && x.size == 2);
    CHECK(x.shape[0] == 3 && x.shape[1] == 4 && x.shape[2] == 200 && x.shape[3] == 16);
    kv_npy_free(&x);
    char *line = kv_format("--q %s/q.npy --k %s/k.npy --v %s/v.npy --wo %s/wo.npy --prompt-tokens 150 -o %s/imp.kvt",
                           dir, dir, dir, dir, dir);
    CHECKF(command(&tr_import, line, &err) == 0, "%s", err.msg);
    free(line);
    CHECK(kv_trace_open(in_dir("imp.kvt"), &b, &err) == KV_OK && !strcmp(b->info.arch, "import"));
    for (uint32_t h = 0; h < 4; h++) {
        CHECK(kv_trace_read_f32(a, KV_S_Q, 1, h, 0, 120, p, &err) == KV_OK);
        CHECK(kv_trace_read_f32(b, KV_S_Q, 1, h, 0, 120, q, &err) == KV_OK && !memcmp(p, q, sizeof p));
    }
    CHECK(b->info.n_prompt == 150 && b->info.hidden == 64 && kv_trace_has_wo(b, 2));
    CHECK(kv_trace_has(b, KV_S_TOKENS, 0, 0, 0, 200) && !kv_trace_has(b, KV_S_LSE, 0, 0, 0, 1));
    kv_trace_close(b);
    /* derived streams: rows of the map add up to one, column sums to the prompt, lse is its logarithm */
    const char *const cat[] = {"--stream map -o", "map.npy", "--stream colsum -o",  "cs.npy",
                               "--stream lse -o", "lse.npy", "--stream rowstat -o", "rs.npy"};
    for (int i = 0; i < 8; i += 2) CHECK(command2(&tr_cat, in_dir("s.kvt"), cat[i], in_dir(cat[i + 1])) == 0);
    CHECK(kv_npy_read(in_dir("map.npy"), &x, &err) == KV_OK && x.rank == 4 && x.n == 3u * 4 * 200 * 200);
    CHECK(kv_npy_read(in_dir("cs.npy"), &y, &err) == KV_OK && y.rank == 3 && y.shape[2] == 150);
    double worst = 0, worst_cs = 0, above = 0;
    for (size_t h = 0; h < 12; h++) {
        const float *m = (const float *)x.data + h * 200 * 200, *cs = (const float *)y.data + h * 150;
        for (size_t r = 0; r < 200; r++) {
            double sum = 0;
            for (size_t k = 0; k < 200; k++) sum += m[r * 200 + k], above += k > r ? m[r * 200 + k] : 0;
            worst = fmax(worst, fabs(sum - 1));
        }
        for (size_t k = 0; k < 150; k++) {
            double sum = 0;
            for (size_t r = k; r < 150; r++) sum += m[r * 200 + k];
            worst_cs = fmax(worst_cs, fabs(sum - cs[k]));
        }
    }
    CHECKF(worst < 1e-5 && worst_cs < 1e-4 && above == 0, "%g %g %g", worst, worst_cs, above);
    kv_npy_free(&x), kv_npy_free(&y);
    /* a map goes in and out again and is then used as it is */
    line = kv_format("--map %s/map.npy -o %s/map.kvt --prompt-tokens 150", dir, dir);
    CHECK(command(&tr_import, line, &err) == 0 && command2(&tr_verify, "--deep", in_dir("map.kvt"), "") == 0);
    free(line);
    CHECK(command2(&tr_cat, in_dir("map.kvt"), "--stream map -o", in_dir("map2.npy")) == 0);
    CHECK(kv_npy_read(in_dir("map.npy"), &x, &err) == KV_OK && kv_npy_read(in_dir("map2.npy"), &y, &err) == KV_OK);
    CHECK(x.n == y.n && !memcmp(x.data, y.data, x.n * 4));
    kv_npy_free(&x), kv_npy_free(&y);
    CHECK(command2(&tr_cat, in_dir("map.kvt"), "--stream lse", "") == 1);
    /* misuse and lies */
    CHECK(command(&tr_cat, "", &err) == 2 && command2(&tr_cat, in_dir("s.kvt"), "--stream qq", "") == 2);
    CHECK(command2(&tr_cat, in_dir("s.kvt"), "--stream tokens --layer 1", "") == 2);
    CHECK(command2(&tr_cat, in_dir("s.kvt"), "--stream q --rows 150:201", "") == 2);
    CHECK(command2(&tr_cat, in_dir("s.kvt"), "--stream nll", "") == 1);
    CHECK(command2(&tr_cat, in_dir("s.kvt"), "--stream q --layer 1 --head 1 --rows 3:5", "") == 0);
    CHECK(command(&tr_synth, "--kv-heads 3 -o /dev/null", &err) == 2 && command(&tr_synth, "--seed 1", &err) == 2);
    CHECK(command(&tr_import, "-o /dev/null", &err) == 2 && strstr(err.msg, "--map"));
    static const char *const wrong[] = {"--q %s/k.npy --k %s/q.npy --v %s/v.npy -o %s/no.kvt",
                                        "--q %s/q.npy --k %s/k.npy --v %s/wo.npy -o %s/no.kvt",
                                        "--q %s/cs.npy --k %s/k.npy --v %s/v.npy -o %s/no.kvt",
                                        "--q %s/q.npy --k %s/k.npy --v %s/absent.npy -o %s/no.kvt",
                                        "--q %s/q.npy --k %s/k.npy --v %s/v.npy -o %s/no.kvt --prompt-tokens 201",
                                        "--q %s/q.npy --k %s/k.npy --v %s/v.npy -o %s/no.kvt --tokens /dev/null"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        line = kv_format(wrong[i], dir, dir, dir, dir);
#pragma GCC diagnostic pop
        int code = command(&tr_import, line, &err);
        CHECKF((code == 1 || code == 2) && err.msg[0] && !exists("no.kvt"), "%zu: exit %d", i, code);
        free(line);
    }
    kv_trace_close(a);
}

/* Streams the capture writes are checked against one another. */
static kv_status lse_row(void *ctx, uint32_t row, const double *p, double lse, kv_error *err)
{
    (void)p, (void)err;
    ((float *)ctx)[row] = (float)lse;
    return KV_OK;
}

static void test_deep(void)
{
    kv_trace_info in = sample_info(60);
    kv_trace *t = NULL;
    kv_error err = {""};
    kvt_checked checked;
    CHECK(kv_trace_open(in_dir("tr.kvt"), &t, &err) == KV_OK);
    in.n_layer = 1, in.layer = &layer_no[1], in.window = &window[1];
    for (int lie = 0; lie < 4; lie++) {
        kv_trace_writer *w = NULL;
        kv_trace *x = NULL;
        float v[QH][60], cs[QH][54];
        for (uint32_t h = 0; h < QH; h++) {
            CHECK(kvt_derive(t, 5, h, 0, 60, 1, lse_row, v[h], &err) == KV_OK);
            for (uint32_t j = 0; j < 54; j++) cs[h][j] = 1;
        }
        if (lie == 1) v[3][48] += 0.02f;
        if (lie == 2) cs[2][0] += 1;
        if (lie == 3) cs[2][0] = INFINITY;
        CHECK(kv_trace_create(in_dir("deep.kvt"), &in, NULL, 0, &w, &err) == KV_OK);
        CHECK(put_floats(w, KV_S_Q, 5, QH, 60, DIM, KV_F16, &err) == KV_OK);
        CHECK(put_floats(w, KV_S_K, 5, KVH, 60, DIM, KV_F16, &err) == KV_OK);
        kv_chunk c = {.stream = KV_S_LSE, .layer = 5, .head_count = QH, .token_count = 60, .width = 1, .dtype = KV_F32};
        CHECK(kv_trace_put(w, &c, v, &err) == KV_OK);
        c.stream = KV_S_COLSUM, c.token_count = 54;
        CHECK(kv_trace_put(w, &c, cs, &err) == KV_OK && kv_trace_finish(w, &err) == KV_OK);
        CHECK(kv_trace_open(in_dir("deep.kvt"), &x, &err) == KV_OK);
        kv_status st = kvt_verify(x, true, &checked, &err);
        CHECKF((st == KV_OK) == (lie == 0), "lie %d: %s", lie, err.msg);
        CHECK(kvt_verify(x, false, &checked, &err) == KV_OK);
        kv_trace_close(x);
    }
    kv_trace_close(t);
}

/* A file of version 1 made long ago must stay readable, and synth must make the same content on every machine. */
static void test_sample(void)
{
    const char *const sha = "be394371cc4737addb7919df45eab50a5f2a038cd4e537c91c7e8570294383dc";
    const char *const synth =
        "--layers 2 --q-heads 2 --kv-heads 1 --head-dim 8 --tokens 48 --prompt-tokens 40 --seed 3 -o";
    kv_trace *t = NULL;
    kvt_checked c;
    kv_error err = {""};
    CHECK(kv_trace_open("tests/golden/v1.kvt", &t, &err) == KV_OK && kvt_verify(t, true, &c, &err) == KV_OK);
    CHECK(t && !strcmp(kv_trace_content_sha256(t), sha));
    kv_trace_close(t);
    CHECK(command2(&tr_synth, synth, in_dir("again.kvt"), "") == 0);
    CHECK(kv_trace_open(in_dir("again.kvt"), &t, &err) == KV_OK && !strcmp(kv_trace_content_sha256(t), sha));
    kv_trace_close(t);
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/kv_traces_XXXXXX");
    if (!mkdtemp(dir)) return perror("mkdtemp"), 1;
    test_identity();
    test_reading_threads();
    test_shapes();
    test_truncation();
    test_flips();
    test_lies();
    test_metadata();
    test_unfinished();
    test_side_file();
    test_commands();
    test_deep();
    test_sample();
    char *rm = kv_format("rm -rf '%s'", dir);
    if (!rm || system(rm)) printf("could not remove %s\n", dir);
    free(rm);
    return kv_tally();
}
