/* test_corrupt.c - every bit of a small trace changed, every byte the end: what `verify` and `recover` make of it.
 *
 *   test_corrupt        every bit is verified; recover at every chunk's borders and at every 61st bit and 23rd byte
 *   test_corrupt all    recover at every bit and every byte too (`make faults`), and the figures for tests/README.md */
#include "tests/check.h"
#include "traces/tr.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static char dir[64], bad[80], back[80];

static int quietly(const tr_command *c, int argc, char **argv)
{
    int code = 0, keep, quiet;
    fflush(stdout);
    keep = dup(1), quiet = open("/dev/null", O_WRONLY);
    dup2(quiet, 1), close(quiet);
    kv_status st = c->run(argc, argv, &code, NULL);
    fflush(stdout);
    dup2(keep, 1), close(keep);
    return st == KV_EMISUSE ? 2 : st ? 1 : code;
}

static bool whole(const uint8_t *b, size_t n, bool deep)
{
    kv_trace *t = NULL;
    kvt_checked c;
    kv_error err = {""};
    bool ok = kv_trace_open_mem(b, n, &t, &err) == KV_OK && kvt_verify(t, deep, &c, &err) == KV_OK;
    CHECK(ok == !err.msg[0]);
    kv_trace_close(t);
    return ok;
}

/* Exit code of recover on the image. 0 and 3 leave a trace that passes verify --deep and holds nothing that `good` does
 * not, 0 all of it; 1 leaves nothing. */
static int recovered(const uint8_t *b, size_t n, const kv_trace *good)
{
    kv_trace *t = NULL;
    kvt_checked c;
    struct stat sb;
    unlink(back);
    CHECK(kv_write_file(bad, b, n, NULL) == KV_OK);
    int code = quietly(&tr_recover, 3, (char *[]){"recover", bad, back});
    CHECKF(code == 0 || code == 1 || code == 3, "exit %d", code);
    CHECK(!stat(back, &sb) == (code != 1));
    if (code == 1) return code;
    CHECK(kv_trace_open(back, &t, NULL) == KV_OK && kvt_verify(t, true, &c, NULL) == KV_OK);
    if (code == 0) CHECK(t && !strcmp(kv_trace_content_sha256(t), kv_trace_content_sha256(good)));
    kv_trace_close(t);
    return code;
}

/* Chunks that end at or before `n`, metadata apart (it stands twice, and recover writes its own). */
static size_t whole_chunks(const kv_trace *t, size_t n)
{
    size_t whole = 0;
    for (size_t i = 0; i < t->n; i++)
        whole += t->entry[i].stream != KV_S_META &&
                 t->entry[i].offset + kvt_header_bytes(&t->entry[i]) + t->entry[i].stored <= n;
    return whole;
}

/* What salvage finds of the first n bytes: every whole chunk, once there is metadata. */
static void check_salvage(const uint8_t *b, size_t n, const kv_trace *good)
{
    kv_trace *t = NULL;
    kvt_damage d;
    CHECK(kv_write_file(bad, b, n, NULL) == KV_OK);
    kv_status st = kvt_salvage(bad, &t, &d, NULL);
    size_t want = whole_chunks(good, n), got = t ? whole_chunks(t, n) : 0;
    CHECKF(st == KV_OK ? got == want : want == 0, "cut at %zu: %zu whole chunks found of %zu", n, got, want);
    kv_trace_close(t);
}

static void test_bits(uint8_t *b, size_t n, const kv_trace *good, bool all)
{
    size_t unseen = 0, tried = 0, codes[4] = {0};
    for (size_t bit = 0; bit < 8 * n; bit++) {
        b[bit / 8] ^= (uint8_t)(1 << bit % 8);
        bool seen = !whole(b, n, false);
        if (!seen && whole(b, n, true)) unseen++, printf("unnoticed: bit %zu of byte %zu\n", bit % 8, bit / 8);
        if (!seen) printf("only verify --deep notices: bit %zu of byte %zu\n", bit % 8, bit / 8);
        CHECK(seen);
        tried++;
        if (all || bit % 61 == 0) codes[recovered(b, n, good)]++;
        b[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    CHECKF(unseen == 0 && tried == 8 * n, "%zu of %zu", unseen, tried);
    /* metadata and index stand twice and layers are apart: one bit never costs everything */
    CHECKF(codes[1] == 0 && codes[0] && codes[3], "%zu whole, %zu in part, %zu nothing", codes[0], codes[3], codes[1]);
    if (all)
        printf("bits flipped: %zu, noticed by verify: %zu; recovered whole %zu, in part %zu, refused %zu\n", tried,
               tried - unseen, codes[0], codes[3], codes[1]);
}

static void test_cuts(const uint8_t *b, size_t n, const kv_trace *good, bool all)
{
    size_t codes[4] = {0}, tried = 0, opened = 0;
    bool *at = calloc(n + 1, sizeof *at);
    for (size_t i = 0; i < good->n; i++)
        for (size_t k = 0; k < 3; k++) {
            at[good->entry[i].offset - 1 + k] = true;
            at[good->entry[i].offset + kvt_header_bytes(&good->entry[i]) - 1 + k] = true;
        }
    for (size_t cut = 0; cut < n; cut++) {
        opened += whole(b, cut, false);
        check_salvage(b, cut, good);
        if (!all && !at[cut] && cut % 23) continue;
        codes[recovered(b, cut, good)]++, tried++;
    }
    CHECKF(opened == 0, "%zu cut traces passed as whole", opened);
    CHECKF(codes[0] && codes[1] && codes[3], "%zu whole, %zu in part, %zu nothing", codes[0], codes[3], codes[1]);
    if (all)
        printf("cut at every byte: %zu, noticed %zu; recovered whole %zu, in part %zu, nothing usable %zu\n", tried,
               tried - opened, codes[0], codes[3], codes[1]);
    free(at);
}

int main(int argc, char **argv)
{
    bool all = argc > 1 && !strcmp(argv[1], "all");
    uint8_t *b = NULL;
    size_t n = 0;
    kv_trace *good = NULL;
    snprintf(dir, sizeof dir, "%s/kv_corrupt_XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    if (!mkdtemp(dir)) return perror("mkdtemp"), 1;
    snprintf(bad, sizeof bad, "%s/bad.kvt", dir), snprintf(back, sizeof back, "%s/back.kvt", dir);
    char *const synth[] = {"synth", "--layers", "2",  "--q-heads",       "1",  "--kv-heads", "1", "--head-dim",
                           "2",     "--tokens", "24", "--prompt-tokens", "20", "-o",         bad};
    CHECK(quietly(&tr_synth, sizeof synth / sizeof *synth, (char **)synth) == 0);
    CHECK(kv_read_file(bad, 1 << 20, &b, &n, NULL) == KV_OK && kv_trace_open_mem(b, n, &good, NULL) == KV_OK);
    CHECKF(n > 1000 && n < 10000 && whole(b, n, true), "%zu bytes", n);
    test_bits(b, n, good, all);
    test_cuts(b, n, good, all);
    kv_trace_close(good);
    free(b);
    unlink(bad), unlink(back), rmdir(dir);
    return kv_tally();
}
