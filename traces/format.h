/* format.h - inside of the trace format, for the files in traces/ only; the words are in FORMAT.md.
 *
 * file   = head, chunk*, index, footer; checkpoints may stand between chunks
 * chunk  = header (skippable frame), zstd frames: one per (head, byte plane)
 * Every byte belongs to a zstd frame or a zstd skippable frame. */
#ifndef KV_FORMAT_H
#define KV_FORMAT_H

#include "traces/trace.h"
#include <pthread.h>

#define KVT_MAJOR      1u
#define KVT_MINOR      0u
#define KVT_SKIPPABLE  0x184D2A50u
#define KVT_HEAD_BYTES 48u
#define KVT_FOOT_BYTES 64u
#define KVT_REC_BYTES  64u /* the fixed part of a chunk header */
#define KVT_ENT_BYTES  72u /* the same and the chunk's offset: an index entry */
#define KVT_CHUNK_MIN  96u /* bytes of a chunk header without its frame table */
#define KVT_INDEX_MIN  40u /* bytes of an index without entries */

#define KVT_BLOCK_ROWS  1024u          /* tokens in a chunk, at most (writer) */
#define KVT_BLOCK_BYTES KV_TRACE_BLOCK /* raw bytes in a chunk, at most, unless a row of a head is more (writer) */
#define KVT_BYTES_MAX   (256u << 20)   /* raw bytes in a chunk of bytes, at most */
#define KVT_PLANE_MIN   256u           /* elements of a head in a chunk below which bytes are not split (writer) */
#define KVT_CHECKPOINT  (256u << 20)   /* bytes of file between two checkpoints */
#define KVT_RAW_MAX     (1u << 30)     /* raw bytes of a chunk (reader refuses more) */
#define KVT_INDEX_MAX   (256u << 20)
#define KVT_META_MAX    (16u << 20)
#define KVT_HIDDEN_MAX  (1u << 20)

typedef enum { KVT_HEAD, KVT_CHUNK, KVT_CKPT, KVT_INDEX, KVT_FOOT, KVT_TAG_COUNT } kvt_tag;
extern const char kvt_tags[KVT_TAG_COUNT][9];

/* One chunk: its header without the frame table, and where it stands. */
typedef struct {
    uint64_t seq, offset;
    uint64_t stored, raw; /* bytes of all frames, compressed and not */
    uint64_t token_first;
    uint32_t token_count, width, frames;
    uint32_t crc, check; /* CRC-32 of the stored frames; CRC-32 over the frames' content checksums */
    uint16_t stream, layer, head_first, head_count;
    uint8_t dtype, filter, planes;
    bool walk; /* salvaged: the header is damaged, the sizes of the frames come from the frames themselves */
} kvt_entry;

enum { KVT_FILTER_NONE = 0, KVT_FILTER_PLANES = 1 };

/* Facts about streams. kind: 'h' per query head, 'g' per KV head, 'l' per layer, 't' whole trace, 'b' bytes. */
typedef struct {
    const char *name;
    char kind;
    const char *level; /* what to record to have it */
} kvt_stream_info;
const kvt_stream_info *kvt_stream(uint32_t s); /* NULL when unknown */

void kvt_put_record(uint8_t *p, const kvt_entry *e);
void kvt_get_record(const uint8_t *p, kvt_entry *e);
/* Sizes of header + payload; the record must have been checked. */
static inline size_t kvt_header_bytes(const kvt_entry *e)
{
    return KVT_CHUNK_MIN + 8 * (size_t)e->frames;
}
static inline size_t kvt_frame_raw(const kvt_entry *e)
{
    return e->frames ? (size_t)(e->raw / e->frames) : 0;
}
/* The numbers of a record agree with each other and with the limits. `path` and e->offset go into the message. */
kv_status kvt_check_record(const kvt_entry *e, const char *path, kv_error *err);

/* Frame a skippable frame of `bytes` in all: magic, size and tag in front, CRC-32 behind. */
void kvt_seal(uint8_t *p, size_t bytes, kvt_tag tag);
/* The tag and CRC of a whole skippable frame are right. */
bool kvt_sealed(const uint8_t *p, size_t bytes, kvt_tag tag);
/* The tag at p (16 bytes readable), or -1; *bytes = size of the skippable frame in all. */
int kvt_tag_at(const uint8_t *p, size_t *bytes);

/* --- metadata (meta.c) --- */
kv_status kvt_check_info(const kv_trace_info *i, kv_error *err);
kv_status kvt_info_to_json(const kv_trace_info *i, char **json, kv_error *err);
kv_status kvt_info_from_json(const char *json, size_t n, kv_trace_info *i, kv_error *err);

/* --- reader internals (reader.c) --- */
typedef struct kvt_scratch {
    struct kvt_scratch *next;
    void *dctx;
    uint8_t *head, *in, *plane, *raw;
    size_t head_cap, in_cap, plane_cap, raw_cap;
} kvt_scratch;

struct kv_trace {
    char *path;
    int fd;             /* -1: from memory */
    const uint8_t *mem; /* borrowed */
    uint64_t size, data_end;
    uint16_t minor;
    kvt_entry *entry; /* [n] by (stream, layer, token_first, head_first, seq) */
    size_t n;
    kv_trace_info info;
    bool have_info;
    char sha[65];
    pthread_mutex_t lock; /* scratch list and side file */
    kvt_scratch *scratch;
    kv_trace *side;
    bool side_tried;
    kv_error side_why;
};

kv_status kvt_read_at(const kv_trace *t, uint64_t at, size_t n, void *dst, kv_error *err);
/* A trace object over a file with nothing but path and size filled in; kv_trace_close() frees it. */
kv_status kvt_attach(const char *path, kv_trace **out, kv_error *err);
/* Sort the entries, compute the content hash. */
kv_status kvt_adopt(kv_trace *t, kv_error *err);
/* Load the last metadata chunk; check that the chunks fit it. */
kv_status kvt_load_info(kv_trace *t, kv_error *err);
/* Parse an index or checkpoint of `bytes` at p (sealed): appends to entry[0..n). */
kv_status kvt_parse_index(const uint8_t *p, size_t bytes, kvt_entry **entry, size_t *n, const char *path,
                          kv_error *err);
/* Raw elements [head][token][width] of a whole chunk. */
kv_status kvt_read_chunk(const kv_trace *t, const kvt_entry *e, uint8_t *dst, kv_error *err);
/* Rows a..b-1 (inside the chunk) of one head (of the trace), as floats (to = KV_F32) or in the chunk's own dtype. */
kv_status kvt_read_head(const kv_trace *t, const kvt_entry *e, uint32_t head, uint32_t a, uint32_t b, kv_dtype to,
                        void *dst, kv_error *err);
/* Header and stored bytes of a chunk against their CRCs, without decoding. */
kv_status kvt_check_chunk(const kv_trace *t, const kvt_entry *e, kv_error *err);
/* Entries of (stream, layer): first index and count. */
size_t kvt_group(const kv_trace *t, uint32_t stream, uint32_t layer, size_t *count);
/* The rows of (stream, layer, head) that are stored, as "0:64,128:640"; "none" when there are none. */
void kvt_rows_text(const kv_trace *t, uint32_t stream, uint32_t layer, uint32_t head, char *s, size_t n);
/* One past the last row of the run of stored rows that begins at `from`. */
uint64_t kvt_run_end(const kv_trace *t, uint32_t stream, uint32_t layer, uint32_t head, uint64_t from);
uint32_t kvt_heads(const kv_trace_info *i, uint32_t stream); /* heads of a stream in a layer */
const kv_trace *kvt_side(const kv_trace *t, kv_error *err);  /* the W_O side file, NULL with a reason */

/* A part of a trace. */
typedef struct {
    uint32_t *layer; /* numbers in the model, ascending; NULL = all */
    uint32_t n_layer;
    uint32_t *head; /* KV heads, ascending; NULL = all */
    uint32_t n_head;
    uint32_t n_token; /* rows 0..n_token-1; 0 = all */
} kvt_part;

/* --- zstd frames of bytes in which nothing repeats (literals.c) --- */
typedef struct kvt_coder kvt_coder; /* for one thread */
kvt_coder *kvt_coder_open(void);    /* NULL: out of memory; free() it */
size_t kvt_literals_bound(size_t n);
/* 1 <= n < 2^32 bytes as one zstd frame with content size and checksum at dst, which has room for
 * kvt_literals_bound(n); returns its bytes. It cannot fail: what Huffman's coding does not make smaller is stored as it
 * is. */
size_t kvt_literals(kvt_coder *c, uint8_t *dst, const uint8_t *src, size_t n);

/* --- writer.c: stop, and remove the partial too: for conversions, which can simply be run again. NULL accepted. */
void kvt_discard(kv_trace_writer *w);

/* --- salvage (recover.c) --- */
typedef struct {
    uint64_t bad_bytes;  /* bytes that belong to nothing readable */
    uint64_t bad_chunks; /* chunks that are known to have been there and are not readable, metadata apart */
    bool finished;       /* there was a footer */
    bool ended;          /* or the metadata that the writer puts last: no chunk can be missing behind the others */
} kvt_damage;
/* Everything readable of a damaged or unfinished trace, as a trace; KV_EFORMAT when there is no metadata or no chunk.
 */
kv_status kvt_salvage(const char *path, kv_trace **out, kvt_damage *d, kv_error *err);

/* The consistent part of a salvaged trace: layers and a token prefix for which everything is there that is there for
 * some layer. *dropped_layers and *dropped_tokens say what it leaves out. KV_EFORMAT when nothing is whole.
 * part->layer is malloc'd. */
kv_status kvt_consistent(const kv_trace *t, kvt_part *part, uint32_t *dropped_layers, uint32_t *dropped_tokens,
                         kv_error *err);

/* --- checking (verify.c) --- */
typedef struct {
    uint64_t chunks, bytes, frames; /* looked at */
    uint64_t rows;                  /* deep: rows whose attention was recomputed */
    char note[256];                 /* something worth a remark that is no damage, or "" */
} kvt_checked;
/* Checksums of every chunk and that every byte of the file belongs to something; deep: decode all, finite values,
 * column sums, row sums, the hash of W_O. The first thing that is wrong is the error. */
kv_status kvt_verify(const kv_trace *t, bool deep, kvt_checked *c, kv_error *err);

/* --- copying a part (copy.c) --- */
kv_status kvt_copy(const kv_trace *t, const kvt_part *part, const char *out, uint32_t threads, kv_error *err);

#endif
