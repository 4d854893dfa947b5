/* test_stream.c - blocks that arrive late: the trace has the bytes it has when they are there at once, whatever the
 * threads; a source that fails fails the trace and leaves the partial file; memory of the caller's kind is used. */
#include "kernels/kernels.h"
#include "tests/check.h"
#include "traces/trace.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

enum { HEADS = 3, ROWS = 2500, DIM = 16 };

static char dir[64];
static uint32_t layers[2] = {0, 1}, windows[2];

static kv_trace_info info(void)
{
    kv_trace_info i = {.model = "m", .arch = "llama", .n_layer = 2, .layer = layers, .n_layer_model = 2};
    i.window = windows, i.n_q_head = i.n_kv_head = HEADS, i.head_dim = DIM, i.hidden = 8;
    i.n_token = i.n_prompt = ROWS, i.scale = 0.25f, i.rope_mscale = 1, i.dtype = KV_BF16, i.record = "qkv";
    return i;
}

static const char *path(const char *name)
{
    static char p[4][128];
    static int turn;
    char *s = p[turn++ % 4];
    snprintf(s, 128, "%s/%s", dir, name);
    return s;
}

/* A device of sorts: a copy is begun by fill and done by a thread a little later; wait joins it. */
enum { TICKETS = 64 };
typedef struct {
    const float *from;        /* [heads][ROWS][DIM] */
    int fail_fill, fail_wait; /* the n-th of them, from 1 */
    atomic_int n_fill, n_wait;
    struct copy {
        pthread_t thread;
        const float *from;
        kv_chunk c;
        uint32_t planes;
        uint8_t *dst;
    } copy[TICKETS];
} device;

static void *copy_late(void *arg)
{
    struct copy *c = arg;
    size_t n = (size_t)c->c.token_count * DIM;
    usleep(300);
    for (uint32_t h = 0; h < c->c.head_count; h++) {
        const float *src = c->from + ((size_t)(c->c.head_first + h) * ROWS + c->c.token_first) * DIM;
        if (c->planes == 2)
            kv_pack(17, n, src, c->dst + h * n * 2);
        else
            kv_encode_f32(KV_BF16, src, n, c->dst + h * n * 2);
    }
    return NULL;
}

static kv_status fill(void *ctx, const kv_chunk *block, uint32_t planes, uint8_t *dst, uint64_t *ticket, kv_error *err)
{
    device *d = ctx;
    int n = atomic_fetch_add(&d->n_fill, 1);
    if (n + 1 == d->fail_fill) return kv_fail(err, KV_EIO, "the device is gone");
    struct copy *c = &d->copy[n];
    *c = (struct copy){.from = d->from, .c = *block, .planes = planes, .dst = dst};
    *ticket = (uint64_t)n;
    return pthread_create(&c->thread, NULL, copy_late, c) ? kv_fail(err, KV_ENOMEM, "no thread") : KV_OK;
}

static kv_status wait(void *ctx, uint64_t ticket, kv_error *err)
{
    device *d = ctx;
    pthread_join(d->copy[ticket].thread, NULL);
    if (atomic_fetch_add(&d->n_wait, 1) + 1 == d->fail_wait) return kv_fail(err, KV_EIO, "the copy was lost");
    return KV_OK;
}

static atomic_int n_alloc, n_free;
static void *counted_alloc(size_t n)
{
    atomic_fetch_add(&n_alloc, 1);
    return malloc(n);
}
static void counted_free(void *p)
{
    if (p) atomic_fetch_add(&n_free, 1);
    free(p);
}

/* Two layers of K and V, and one block too small to be split into planes. */
static kv_status write_trace(const char *to, uint32_t threads, const float *v, device *d, kv_error *err)
{
    kv_trace_info i = info();
    kv_trace_source src = {.ctx = d, .fill = fill, .wait = wait};
    kv_trace_memory room = {counted_alloc, counted_free};
    kv_trace_writer *w = NULL;
    kv_status st = kv_trace_create(to, &i, NULL, threads, &w, err);
    if (!st && d) st = kv_trace_writer_memory(w, &room, 1000, err);
    for (uint32_t l = 0; l < 4 && !st; l++) {
        kv_chunk c = {.stream = l % 2 ? KV_S_V : KV_S_K, .layer = l / 2, .head_count = HEADS, .token_count = ROWS};
        c.width = DIM, c.dtype = KV_BF16;
        if (l == 3) c.token_count = 5;
        if (d && l == 2) st = kv_trace_flush(w, err);
        if (st) break;
        if (d) {
            st = kv_trace_put_from(w, &c, &src, err);
        } else {
            float *part = malloc(sizeof *part * HEADS * c.token_count * DIM);
            for (size_t h = 0; h < HEADS; h++)
                memcpy(part + h * c.token_count * DIM, v + h * ROWS * DIM, c.token_count * DIM * sizeof *part);
            st = kv_trace_put_f32(w, &c, part, err);
            free(part);
        }
    }
    if (!st) return kv_trace_finish(w, err);
    kv_trace_abandon(w);
    return st;
}

static uint8_t *bytes_of(const char *p, size_t *n)
{
    uint8_t *b = NULL;
    kv_read_file(p, (size_t)1 << 30, &b, n, NULL);
    return b;
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/kv_stream_XXXXXX");
    if (!mkdtemp(dir)) return perror("mkdtemp"), 1;
    float *v = malloc(sizeof *v * HEADS * ROWS * DIM);
    kv_rng r = {5};
    for (size_t i = 0; v && i < HEADS * ROWS * DIM; i++) v[i] = (float)kv_rng_normal(&r);
    kv_error err = {""};
    size_t n0 = 0, n;
    CHECKF(v && write_trace(path("plain.kvt"), 0, v, NULL, &err) == KV_OK, "%s", err.msg);
    uint8_t *want = bytes_of(path("plain.kvt"), &n0), *got;
    static device d;
    for (uint32_t threads = 0; threads <= 3; threads++) {
        d = (device){.from = v};
        n_alloc = n_free = 0;
        CHECKF(write_trace(path("late.kvt"), threads, v, &d, &err) == KV_OK, "%s", err.msg);
        got = bytes_of(path("late.kvt"), &n);
        CHECKF(got && n == n0 && !memcmp(got, want, n), "%u threads", threads);
        CHECK(d.n_fill == 10 && d.n_wait == 10);
        CHECK(n_alloc > 0 && n_alloc == n_free);
        free(got);
    }
    /* Whichever copy fails: the first failure is what is reported, every copy begun is waited for, nothing stands under
     * the final name. */
    for (int k = 1; k <= 10; k++)
        for (int side = 0; side < 2; side++)
            for (uint32_t threads = 0; threads <= 2; threads += 2) {
                d = (device){.from = v, .fail_fill = side ? k : 0, .fail_wait = side ? 0 : k};
                n_alloc = n_free = 0;
                remove(path("bad.kvt"));
                kv_status st = write_trace(path("bad.kvt"), threads, v, &d, &err);
                CHECKF(st == KV_EIO && strstr(err.msg, side ? "the device is gone" : "the copy was lost"), "%d %d: %s",
                       k, side, err.msg);
                CHECK(access(path("bad.kvt"), F_OK) && !access(path("bad.kvt.partial"), F_OK));
                CHECK(d.n_wait == d.n_fill - (side != 0) && n_alloc == n_free);
            }
    free(want), free(v);
    char *rm = kv_format("rm -rf '%s'", dir);
    if (!rm || system(rm)) printf("could not remove %s\n", dir);
    free(rm);
    return kv_tally();
}
