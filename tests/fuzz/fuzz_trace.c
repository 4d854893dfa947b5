/* fuzz_trace.c - targets trace and chunks: the .kvt reader, verify, recover, replay.
 *
 * trace   the bytes of a file, as they are and with the checksums of its skippable frames put right
 * chunks  what stands behind the checksums: metadata and chunks as the input has them, in a file whose checksums hold.
 *         u32 bytes of metadata, the JSON; then any number of: a record of 64 bytes (FORMAT.md), u32 bytes of payload,
 *         the payload uncompressed. Numbers of frames and bytes that a record leaves 0 are filled in. */
#include <stdlib.h>
#include <unistd.h>
#include <zstd.h>

#include "sim/replay.h"
#include "tests/fuzz/fuzz.h"
#include "traces/format.h"

enum { ROWS = 4096, PAYLOAD_MAX = 1 << 16, FRAMES_MAX = 64, CHUNKS_MAX = 64, FILE_MAX = 1 << 20 };

static void replay(const kv_trace *t)
{
    kv_scene sc = {0};
    kv_spec *spec = NULL;
    kv_budget *budget = NULL;
    kv_plan plan = {0};
    kv_replay rp = {0};
    kv_point point[4] = {{0}};
    size_t n_spec = 0, n_budget = 0, n = 0;
    const kv_trace_info *in = kv_trace_get_info(t);
    /* time, not truth: large ones are read, but not replayed */
    if (in->n_token > 512 || in->n_layer > 4 || in->n_q_head > 16 || in->head_dim > 64 || in->hidden > 1024) return;
    if (kv_scene_open(t, "prompt", in->n_token == in->n_prompt ? 1 : 0, &sc, NULL)) return;
    kv_status st = kv_spec_parse("snapkv,h2o,oracle,cake", &spec, &n_spec, NULL);
    if (!st) st = kv_budget_parse("20%", &budget, &n_budget, NULL);
    if (!st) st = kv_plan_build(&sc, spec, n_spec, 1, &plan, NULL);
    for (size_t i = 0; i < n_spec && !st; i++, n++) {
        point[i].spec = i;
        point[i].c = kv_budget_resolve(budget, sc.n_cut, sc.slot_bytes, sc.n_evict, sc.info->n_kv_head);
        st = kv_array(&point[i].counts, (size_t)sc.n_evict * plan.ranking[plan.ranking_of[i]].n_unit, sizeof(uint32_t),
                      NULL);
        if (!st) st = kv_plan_counts(&plan, i, &point[i].c, point[i].counts, NULL);
    }
    if (!st) kv_replay_run(&plan, point, n, KV_M_ALL, 1, NULL, NULL, &rp, NULL);
    for (size_t i = 0; i < 4; i++) free(point[i].counts);
    for (size_t i = 0; i < n_spec; i++) kv_spec_free(&spec[i]);
    free(spec), free(budget);
    kv_replay_free(&rp);
    kv_plan_free(&plan);
    kv_scene_close(&sc);
}

void fuzz_read_trace(kv_trace *t)
{
    const kv_trace_info *in = kv_trace_get_info(t);
    kvt_checked checked;
    kv_trace_info copy;
    uint32_t *ids = NULL;
    size_t n;
    for (uint32_t s = 1; s < 32; s++) {
        const kvt_stream_info *si = kvt_stream(s);
        uint32_t width = si ? kv_trace_width(t, (kv_stream)s) : 0;
        if (!width) continue;
        if (si->kind == 'b') {
            char *text = NULL;
            kv_trace_read_bytes(t, (kv_stream)s, &text, &n, NULL);
            free(text);
            continue;
        }
        uint32_t rows = in->n_token < ROWS ? in->n_token : ROWS;
        float *v = width < PAYLOAD_MAX ? malloc((size_t)rows * width * sizeof *v) : NULL;
        for (uint32_t l = 0; v && l < in->n_layer && l < 4; l++)
            for (uint32_t h = 0; h < kvt_heads(in, s) && h < 16; h++)
                for (uint32_t a = 0; a < rows; a = a ? rows : rows / 2 + 1)
                    kv_trace_read_f32(t, (kv_stream)s, si->kind == 't' ? 0 : in->layer[l], h, a, rows, v, NULL);
        free(v);
    }
    n = in->n_token < ROWS ? in->n_token : ROWS;
    if (!kv_array(&ids, n, sizeof *ids, NULL)) kv_trace_read_u32(t, KV_S_TOKENS, 0, (uint32_t)n, ids, NULL);
    free(ids);
    if (!kv_trace_info_copy(in, &copy, NULL)) {
        char *json = NULL;
        kv_trace_info again;
        if (!kvt_info_to_json(&copy, &json, NULL)) {
            fuzz_must(!kvt_info_from_json(json, strlen(json), &again, NULL), "metadata can be read back");
            kv_trace_info_free(&again);
        }
        free(json);
        kv_trace_info_free(&copy);
    }
    if (!kvt_verify(t, true, &checked, NULL)) replay(t);
}

static void recover(const char *path)
{
    kv_trace *t = NULL, *saved = NULL;
    kvt_damage damage;
    kvt_part part = {0};
    uint32_t layers, tokens;
    kvt_checked checked;
    kv_error err = {""};
    const char *to = fuzz_name("saved.kvt");
    unlink(to);
    if (!kvt_salvage(path, &t, &damage, NULL) && !kvt_consistent(t, &part, &layers, &tokens, NULL) &&
        !kvt_copy(t, &part, to, 0, NULL)) {
        /* the message says what recover wrote that it should not have */
        fuzz_must(!kv_trace_open(to, &saved, &err), err.msg);
        fuzz_must(!kvt_verify(saved, false, &checked, &err), err.msg);
    }
    free(part.layer);
    kv_trace_close(saved);
    kv_trace_close(t);
}

static void read_both_ways(const uint8_t *p, size_t n)
{
    kv_trace *t = NULL;
    kv_error err;
    if (!kv_trace_open_mem(p, n, &t, &err))
        fuzz_read_trace(t);
    else
        fuzz_must(err.msg[0] && !strpbrk(err.msg, "\n\r\033"), "a message is one plain line");
    kv_trace_close(t);
    recover(fuzz_file(p, n));
}

int fuzz_trace(const uint8_t *p, size_t n)
{
    bool changed = false;
    uint8_t *b;
    read_both_ways(p, n);
    if (!(b = malloc(n + 1))) return 0;
    memcpy(b, p, n);
    for (size_t at = 0; at + 20 <= n; at++) {
        size_t bytes;
        int tag = kvt_tag_at(b + at, &bytes);
        if (tag < 0 || bytes > n - at || kvt_sealed(b + at, bytes, (kvt_tag)tag)) continue;
        kvt_seal(b + at, bytes, (kvt_tag)tag);
        changed = true;
    }
    if (changed) read_both_ways(b, n);
    free(b);
    return 0;
}

/* ---------------------------------------------------------------------------------------------------- chunks */
typedef struct {
    uint8_t *p;
    size_t n;
    uint8_t entry[CHUNKS_MAX * KVT_ENT_BYTES];
    uint32_t n_entry;
} file;

static uint8_t *room(file *f, size_t n)
{
    fuzz_must(n <= FILE_MAX - f->n, "a small input makes a small file");
    memset(f->p + f->n, 0, n);
    f->n += n;
    return f->p + f->n - n;
}

static void put_chunk(file *f, kvt_entry *e, const uint8_t *raw, size_t n)
{
    uint8_t header[KVT_CHUNK_MIN + 8 * FRAMES_MAX] = {0}, *data;
    size_t stored = 0, per;
    if (!e->frames || e->frames > FRAMES_MAX) e->frames = 1;
    per = n / e->frames;
    if (!e->raw) e->raw = per * e->frames;
    data = malloc(e->frames * ZSTD_compressBound(per));
    ZSTD_CCtx *z = ZSTD_createCCtx();
    fuzz_must(data && z, "a small file fits into memory");
    ZSTD_CCtx_setParameter(z, ZSTD_c_checksumFlag, 1);
    e->check = 0;
    for (uint32_t i = 0; i < e->frames; i++) {
        size_t made = ZSTD_compress2(z, data + stored, ZSTD_compressBound(per), raw + i * per, per);
        fuzz_must(!ZSTD_isError(made), "bytes can be compressed");
        kv_put32(header + 88 + 8 * i, (uint32_t)made), kv_put32(header + 92 + 8 * i, (uint32_t)per);
        stored += made;
        e->check = kv_crc32(e->check, data + stored - 4, 4);
    }
    ZSTD_freeCCtx(z);
    e->seq = f->n_entry, e->offset = f->n, e->stored = stored, e->crc = kv_crc32(0, data, stored);
    size_t bytes = KVT_CHUNK_MIN + 8 * (size_t)e->frames;
    kv_put32(header + 16, KVT_REC_BYTES);
    kvt_put_record(header + 24, e);
    uint8_t *entry = f->entry + f->n_entry++ * KVT_ENT_BYTES;
    kvt_put_record(entry, e), kv_put64(entry + KVT_REC_BYTES, e->offset);
    kvt_seal(header, bytes, KVT_CHUNK);
    memcpy(room(f, bytes), header, bytes);
    memcpy(room(f, stored), data, stored);
    free(data);
}

static void finish(file *f, uint32_t n_token)
{
    uint64_t at = f->n;
    size_t bytes = KVT_INDEX_MIN + (size_t)f->n_entry * KVT_ENT_BYTES;
    uint8_t *p = room(f, bytes);
    kv_put32(p + 16, KVT_ENT_BYTES), kv_put32(p + 20, f->n_entry);
    memcpy(p + 32, f->entry, (size_t)f->n_entry * KVT_ENT_BYTES);
    kvt_seal(p, bytes, KVT_INDEX);
    p = room(f, KVT_FOOT_BYTES);
    kv_put64(p + 16, at), kv_put64(p + 24, bytes), kv_put64(p + 32, f->n_entry), kv_put64(p + 40, n_token);
    memcpy(p + 48, "KVTDONE1", 8);
    kvt_seal(p, KVT_FOOT_BYTES, KVT_FOOT);
}

int fuzz_chunks(const uint8_t *p, size_t n)
{
    file f = {.p = malloc(FILE_MAX)};
    kvt_entry e = {.stream = KV_S_META, .head_count = 1, .dtype = KV_U8, .planes = 1, .width = 1, .frames = 1};
    size_t json = n < 4 ? 0 : kv_get32(p) < n - 4 ? kv_get32(p) : n - 4;
    fuzz_must(f.p, "a small file fits into memory");
    if (n < 4 || n > 1 << 18) goto out;
    uint8_t *head = room(&f, KVT_HEAD_BYTES);
    kv_put16(head + 16, KVT_MAJOR);
    kvt_seal(head, KVT_HEAD_BYTES, KVT_HEAD);
    e.token_count = (uint32_t)json;
    put_chunk(&f, &e, p + 4, json);
    for (p += 4 + json, n -= 4 + json; n >= KVT_REC_BYTES + 4 && f.n_entry < CHUNKS_MAX;) {
        size_t bytes = kv_get32(p + KVT_REC_BYTES), left = n - KVT_REC_BYTES - 4;
        if (bytes > left) bytes = left;
        if (bytes > PAYLOAD_MAX) bytes = PAYLOAD_MAX;
        memset(&e, 0, sizeof e);
        kvt_get_record(p, &e);
        put_chunk(&f, &e, p + KVT_REC_BYTES + 4, bytes);
        p += KVT_REC_BYTES + 4 + bytes, n -= KVT_REC_BYTES + 4 + bytes;
    }
    finish(&f, 0);
    read_both_ways(f.p, f.n);
out:
    free(f.p);
    return 0;
}
