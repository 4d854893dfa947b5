/* format.c - the fixed parts of the trace format: streams, records, skippable frames (format.h, FORMAT.md). */
#include "traces/format.h"

#include <inttypes.h>
#include <stdlib.h>

const char kvt_tags[KVT_TAG_COUNT][9] = {"KVTHEAD1", "KVTCHNK1", "KVTCKPT1", "KVTINDX1", "KVTFOOT1"};

static const kvt_stream_info streams[] = {
    [KV_S_Q] = {"q", 'h', "--record qkv"},
    [KV_S_K] = {"k", 'g', "--record obs or qkv"},
    [KV_S_V] = {"v", 'g', "--record obs or qkv"},
    [KV_S_OUT] = {"out", 'h', NULL},
    [KV_S_X] = {"x", 'l', NULL},
    [KV_S_ROWSTAT] = {"rowstat", 'h', "--record stats, obs or qkv"},
    [KV_S_COLSUM] = {"colsum", 'h', "--record stats, obs or qkv"},
    [KV_S_MAP_WINDOW] = {"map_window", 'h', "--maps window"},
    [KV_S_MAP] = {"map", 'h', "--maps full"},
    [KV_S_WO] = {"wo", 'l', "--wo embed"},
    [KV_S_TOKENS] = {"tokens", 't', NULL},
    [KV_S_LOGITS] = {"logits", 't', NULL},
    [KV_S_TEXT] = {"text", 'b', NULL},
    [KV_S_META] = {"meta", 'b', NULL},
    [KV_S_XNORM] = {"xnorm", 'l', "--record stats, obs or qkv"},
    [KV_S_NLL] = {"nll", 't', NULL},
    [KV_S_COLSUM_CTX] = {"colsum_ctx", 'h', "--record stats, obs or qkv"},
    [KV_S_OFFSETS] = {"offsets", 't', NULL},
    [KV_S_PROVENANCE] = {"provenance", 'b', NULL},
    [KV_S_LSE] = {"lse", 'h', "--record stats, obs or qkv"},
    [KV_S_POST_NORM] = {"post_norm", 'l', "--record obs or qkv"},
};
#define N_STREAM (sizeof streams / sizeof *streams)

const kvt_stream_info *kvt_stream(uint32_t s)
{
    return s < N_STREAM && streams[s].name ? &streams[s] : NULL;
}

const char *kv_stream_name(kv_stream s)
{
    const kvt_stream_info *i = kvt_stream((uint32_t)s);
    return i ? i->name : NULL;
}

bool kv_stream_parse(const char *name, kv_stream *out)
{
    for (uint32_t s = 0; s < N_STREAM; s++)
        if (streams[s].name && !strcmp(streams[s].name, name)) return *out = (kv_stream)s, true;
    return false;
}

uint32_t kvt_heads(const kv_trace_info *i, uint32_t stream)
{
    const kvt_stream_info *s = kvt_stream(stream);
    return s && s->kind == 'h' ? i->n_q_head : s && s->kind == 'g' ? i->n_kv_head : 1;
}

void kvt_put_record(uint8_t *p, const kvt_entry *e)
{
    memset(p, 0, KVT_REC_BYTES);
    kv_put64(p, e->seq);
    kv_put16(p + 8, e->stream), kv_put16(p + 10, e->layer);
    kv_put16(p + 12, e->head_first), kv_put16(p + 14, e->head_count);
    kv_put64(p + 16, e->token_first);
    kv_put32(p + 24, e->token_count);
    p[28] = e->dtype, p[29] = e->filter, p[30] = e->planes;
    kv_put32(p + 32, e->width), kv_put32(p + 36, e->frames);
    kv_put64(p + 40, e->stored), kv_put64(p + 48, e->raw);
    kv_put32(p + 56, e->crc), kv_put32(p + 60, e->check);
}

void kvt_get_record(const uint8_t *p, kvt_entry *e)
{
    e->seq = kv_get64(p);
    e->stream = kv_get16(p + 8), e->layer = kv_get16(p + 10);
    e->head_first = kv_get16(p + 12), e->head_count = kv_get16(p + 14);
    e->token_first = kv_get64(p + 16);
    e->token_count = kv_get32(p + 24);
    e->dtype = p[28], e->filter = p[29], e->planes = p[30];
    e->width = kv_get32(p + 32), e->frames = kv_get32(p + 36);
    e->stored = kv_get64(p + 40), e->raw = kv_get64(p + 48);
    e->crc = kv_get32(p + 56), e->check = kv_get32(p + 60);
}

kv_status kvt_check_record(const kvt_entry *e, const char *path, kv_error *err)
{
    const kvt_stream_info *s = kvt_stream(e->stream);
    const char *what;
    size_t raw;
    if (e->frames > KVT_RAW_MAX / 8) goto frames;
    /* zstd cannot make more than 32,768 bytes out of one: a lie about raw bytes must not become an allocation. */
    if ((what = "raw bytes", e->raw > KVT_RAW_MAX || e->raw / 65536 > e->stored) ||
        (what = "stored bytes", e->stored > 2 * (uint64_t)KVT_RAW_MAX))
        goto bad;
    if (!s) return KV_OK; /* a stream of a later version: known size, unknown meaning */
    if (e->dtype >= KV_DTYPE_COUNT || e->filter > KVT_FILTER_PLANES)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "cannot read trace '%s': chunk at byte %" PRIu64
                       " has element type %u and filter %u, which this "
                       "version does not know",
                       path, e->offset, e->dtype, e->filter);
    size_t bytes = kv_dtype_bytes((kv_dtype)e->dtype);
    if ((what = "byte stream's size", s->kind == 'b' && e->raw > KVT_BYTES_MAX) ||
        (what = "plane count", e->planes != (e->filter == KVT_FILTER_PLANES ? bytes : 1)) ||
        (what = "layer", e->layer >= KV_LAYERS_MAX) ||
        (what = "head range", !e->head_count || (uint32_t)e->head_first + e->head_count > KV_HEADS_MAX) ||
        (what = "width", !e->width || e->width > KV_TOKENS_MAX) ||
        (what = "token range", e->token_first > KVT_RAW_MAX || e->token_count > KVT_RAW_MAX) ||
        (what = "token count", !e->token_count && s->kind != 'b') ||
        (what = "shape", !kv_mul(e->token_count, e->width, &raw) || !kv_mul(raw, bytes, &raw) ||
                             !kv_mul(raw, e->head_count, &raw) || raw != e->raw) ||
        (what = "byte stream's type",
         s->kind == 'b' && (e->dtype != KV_U8 || e->width != 1 || e->head_count != 1 || e->token_first)))
        goto bad;
    if (e->frames == (uint32_t)e->head_count * e->planes) return KV_OK;
frames:
    what = "frame count";
bad:
    return kv_fail(err, KV_EFORMAT, "cannot read trace '%s': bad %s in the chunk at byte %" PRIu64, path, what,
                   e->offset);
}

void kvt_seal(uint8_t *p, size_t bytes, kvt_tag tag)
{
    kv_put32(p, KVT_SKIPPABLE);
    kv_put32(p + 4, (uint32_t)(bytes - 8));
    memcpy(p + 8, kvt_tags[tag], 8);
    kv_put32(p + bytes - 4, kv_crc32(0, p + 8, bytes - 12));
}

bool kvt_sealed(const uint8_t *p, size_t bytes, kvt_tag tag)
{
    return bytes >= 20 && kv_get32(p) == KVT_SKIPPABLE && kv_get32(p + 4) == bytes - 8 &&
           !memcmp(p + 8, kvt_tags[tag], 8) && kv_get32(p + bytes - 4) == kv_crc32(0, p + 8, bytes - 12);
}

int kvt_tag_at(const uint8_t *p, size_t *bytes)
{
    *bytes = (size_t)kv_get32(p + 4) + 8;
    if (kv_get32(p) != KVT_SKIPPABLE || *bytes < 20) return -1;
    for (int i = 0; i < KVT_TAG_COUNT; i++)
        if (!memcmp(p + 8, kvt_tags[i], 8)) return i;
    return -1;
}

void kv_wo_hash(kv_sha256 *s, uint32_t layer, uint32_t rows, uint32_t width, kv_dtype t, const void *raw)
{
    uint8_t h[16];
    kv_put32(h, layer), kv_put32(h + 4, rows), kv_put32(h + 8, width), kv_put32(h + 12, (uint32_t)t);
    kv_sha256_update(s, h, sizeof h);
    kv_sha256_update(s, raw, (size_t)rows * width * kv_dtype_bytes(t));
}

char *kv_wo_path(const char *trace_path, const char *wo_sha256)
{
    const char *slash = strrchr(trace_path, '/');
    int n = slash ? (int)(slash - trace_path + 1) : 0;
    return kv_format("%.*swo-%.16s.kvw", n, trace_path, wo_sha256);
}
