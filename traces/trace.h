/* trace.h - reading and writing .kvt traces (format: traces/FORMAT.md).
 *
 * A trace holds what attention consumed and produced in one run of one model over one token sequence. Rows are
 * numbered 0..N-1: prompt tokens 0..P-1, decoded tokens P..N-1. All vectors are post-RoPE, heads in Hugging Face's
 * half-split layout; query head h reads KV head h / (q_heads / kv_heads).
 *
 * A layer is named by its number in the model everywhere outside this file's `layer index` (0..n_layer-1, position
 * among the recorded layers): a trace may hold some of the layers (`--layers`, `slice`). */
#ifndef KV_TRACE_H
#define KV_TRACE_H

#include "traces/base.h"

/* Streams. Shapes are [head][token][width]; streams with one head per layer have head count 1, streams of the whole
 * trace have layer 0 and head 0. Numbers are part of the format and never reused. */
typedef enum {
    KV_S_Q = 1,          /* q_heads  x tokens x head_dim   queries after RoPE, in the trace's dtype              */
    KV_S_K = 2,          /* kv_heads x tokens x head_dim   keys after RoPE                                       */
    KV_S_V = 3,          /* kv_heads x tokens x head_dim   values                                                */
    KV_S_OUT = 4,        /* q_heads  x tokens x head_dim   attention output before W_O (optional)                */
    KV_S_X = 5,          /* 1 x tokens x hidden            residual stream entering the block (optional)         */
    KV_S_ROWSTAT = 6,    /* q_heads x tokens x 4           f32: largest p, its column, entropy (nats), sum of p^2 */
    KV_S_COLSUM = 7,     /* q_heads x P x 1                f32: sum of p over prompt rows                         */
    KV_S_MAP_WINDOW = 9, /* q_heads x rows x P             f16: rows P-W..P-1 of the attention map                */
    KV_S_MAP = 10,       /* q_heads x rows x N             f16: attention map, row i has i+1 entries, rest 0      */
    KV_S_WO = 12,        /* 1 x hidden x q_heads*head_dim  output projection (out, in), as HF stores o_proj       */
    KV_S_TOKENS = 14,    /* 1 x N x 1                      u32 token ids                                          */
    KV_S_LOGITS =
        15, /* 1 x rows x 2*top_k             f32: ids then logits of the best next tokens, decode rows and row P-1 */
    KV_S_TEXT = 16,       /* bytes                          UTF-8 text of prompt and continuation                  */
    KV_S_META = 17,       /* bytes                          metadata JSON                                          */
    KV_S_XNORM = 19,      /* 1 x tokens x 1                 f32: L2 norm of the residual stream entering the block */
    KV_S_NLL = 20,        /* 1 x N-1 x 1                    f32: -ln p(token t+1 | tokens 0..t)                    */
    KV_S_COLSUM_CTX = 21, /* q_heads x context x 1          f32: as 7, rows and columns 0..context-1               */
    KV_S_OFFSETS = 22,    /* 1 x N+1 x 1                    u32: byte offset of each token in the text, then its end */
    KV_S_PROVENANCE = 23, /* bytes                          JSON: times, host, threads; outside the content hash   */
    KV_S_LSE = 24,        /* q_heads x tokens x 1           f32: ln sum exp(score) over visible columns            */
    KV_S_POST_NORM = 25,  /* 1 x hidden x 2                 f32: RMS norm behind W_O: its weight, and W_O's bias   */
} kv_stream;
const char *kv_stream_name(kv_stream s); /* "q", "k", "lse", ... ; NULL when unknown */
bool kv_stream_parse(const char *name, kv_stream *out);

#define KV_LAYERS_MAX   1024u
#define KV_HEADS_MAX    1024u
#define KV_HEAD_DIM_MAX 1024u
#define KV_TOKENS_MAX   (1u << 27)

typedef struct {
    uint32_t start, end; /* bytes of the text, [start, end) */
} kv_span;

/* Metadata. Strings and arrays belong to the trace (reader) or the caller (writer). */
typedef struct {
    char *model, *arch;         /* display name; "llama", ... ; "import", "synth" where there is no model */
    char *model_sha256;         /* of the model file, or NULL */
    char *prompt_id, *category; /* or NULL */
    uint32_t n_layer;           /* recorded layers */
    uint32_t *layer;            /* [n_layer] their numbers in the model, ascending */
    uint32_t n_layer_model;     /* layers of the model */
    uint32_t n_q_head, n_kv_head, head_dim, hidden;
    uint32_t n_token, n_prompt; /* N and P; 1 <= P <= N */
    uint32_t n_context;         /* tokens before the question (cut "context"), 0 = not known */
    uint32_t *window;           /* [n_layer] sliding window of the layer in tokens, 0 = full attention */
    float scale;                /* score = q.k * scale */
    float softcap;              /* 0 = none; else score = cap * tanh(score / cap) */
    float rope_theta;           /* 0 = unknown or no RoPE */
    uint32_t rope_dim;          /* rotated elements of a head (0 = all) */
    float *inv_freq;            /* [rope_dim/2] effective inverse frequencies, or NULL: theta^(-2j/rope_dim) */
    float rope_mscale;          /* factor on cos and sin (YaRN, longrope); 1 when there is none */
    float post_norm_eps;        /* > 0: the attention output is normalised behind W_O (KV_S_POST_NORM); 0 = it is not */
    float out_scale;            /* factor on the attention output where it enters the stream; 0 or 1 = none */
    kv_dtype dtype;             /* of Q, K and V */
    char *record;               /* "tokens" "stats" "obs" "qkv"; "map": an imported map */
    uint32_t obs_rows;          /* at level obs: query rows kept before each cut point */
    kv_span *evidence;
    uint32_t n_evidence;
    kv_span question; /* {0,0} = none */
    char *wo_sha256;  /* hash naming the side file with W_O ("wo-<first 16>.kvw"), NULL = embedded or none */
    char *extra;      /* JSON object with everything else (source, tokenizer, run, segments, ...), or NULL */
} kv_trace_info;

/* ------------------------------------------------------------------------------------------------ reading */
typedef struct kv_trace kv_trace;

/* Open and validate: head, footer, index, metadata. The payload is checked when read (zstd checksum and CRC).
 * KV_EFORMAT names the field and the offset; a file whose writer never finished says so and points to `recover`.
 * A handle may be read from several threads at once. */
kv_status kv_trace_open(const char *path, kv_trace **out, kv_error *err);
kv_status kv_trace_open_mem(const void *bytes, size_t n, kv_trace **out, kv_error *err); /* borrows; no side file */
void kv_trace_close(kv_trace *t);                                                        /* NULL accepted */

const kv_trace_info *kv_trace_get_info(const kv_trace *t);
const char *kv_trace_path(const kv_trace *t);
/* SHA-256 (hex) over the content: every chunk header except provenance, with its checksums, in canonical order
 * (stream, layer, head, token). Two captures of the same run on the same machine have the same content hash. */
const char *kv_trace_content_sha256(const kv_trace *t);

/* Bytes of the largest chunk, decoded: three times that is what a thread's reads take at most. */
uint64_t kv_trace_largest_chunk(const kv_trace *t);
/* True when every row a..b-1 of (stream, layer number, head) is stored. Whole-trace streams: layer = head = 0. */
bool kv_trace_has(const kv_trace *t, kv_stream s, uint32_t layer, uint32_t head, uint32_t a, uint32_t b);
/* Elements per token of a stored stream (head_dim, 4, 1, ...); 0 when the stream is absent. */
uint32_t kv_trace_width(const kv_trace *t, kv_stream s);
/* Rows a..b-1 as float [b-a][width]. KV_EMISSING names what is absent and the record level that would have it. */
kv_status kv_trace_read_f32(const kv_trace *t, kv_stream s, uint32_t layer, uint32_t head, uint32_t a, uint32_t b,
                            float *dst, kv_error *err);
/* The same for u32 streams (tokens, offsets). */
kv_status kv_trace_read_u32(const kv_trace *t, kv_stream s, uint32_t a, uint32_t b, uint32_t *dst, kv_error *err);
/* A byte stream (text, meta, provenance) whole, with a zero byte behind it; free() it. */
kv_status kv_trace_read_bytes(const kv_trace *t, kv_stream s, char **out, size_t *n, kv_error *err);
/* W_O of a layer as float [hidden][q_heads*head_dim], embedded or from the side file beside the trace (its hash is
 * checked). KV_EMISSING when there is none. */
bool kv_trace_has_wo(const kv_trace *t, uint32_t layer);
kv_status kv_trace_read_wo(const kv_trace *t, uint32_t layer, float *dst, kv_error *err);

/* The side file is itself a trace (metadata with wo_sha256 set, KV_S_WO chunks). wo_sha256 is the SHA-256 over, for
 * each of its layers in ascending order, four u32 (layer number, rows, width, dtype) and the raw elements in row order;
 * feed the layers to kv_wo_hash, then kv_sha256_hex. kv_wo_path: "<folder of trace_path>/wo-<first 16>.kvw", free() it.
 */
void kv_wo_hash(kv_sha256 *s, uint32_t layer, uint32_t rows, uint32_t width, kv_dtype t, const void *raw);
char *kv_wo_path(const char *trace_path, const char *wo_sha256);

/* ------------------------------------------------------------------------------------------------ writing */
typedef struct kv_trace_writer kv_trace_writer;

typedef struct {
    kv_stream stream;
    uint32_t layer;                  /* number in the model */
    uint32_t head_first, head_count; /* heads in this chunk */
    uint32_t token_first, token_count;
    uint32_t width; /* elements per (head, token) */
    kv_dtype dtype;
} kv_chunk;

/* Creates PATH.partial (a non-regular target such as /dev/null is written in place), writes head and metadata.
 * `info` is copied. `threads` compressors run beside the caller (0 = compress in kv_trace_put); the bytes of the file
 * do not depend on it. provenance: JSON object or NULL. */
kv_status kv_trace_create(const char *path, const kv_trace_info *info, const char *provenance, uint32_t threads,
                          kv_trace_writer **out, kv_error *err);
/* Append one chunk. `raw` is [head][token][width] in c->dtype, contiguous; copied before return. Chunks larger than
 * the block (1,024 tokens, KV_TRACE_BLOCK bytes) are split by the writer. The caller's order is the file's order. */
kv_status kv_trace_put(kv_trace_writer *w, const kv_chunk *c, const void *raw, kv_error *err);
/* The same from floats: rounded to c->dtype first (KV_EUNSUPPORTED when f16 overflows: says which layer). */
kv_status kv_trace_put_f32(kv_trace_writer *w, const kv_chunk *c, const float *v, kv_error *err);
kv_status kv_trace_put_bytes(kv_trace_writer *w, kv_stream s, const void *p, size_t n, kv_error *err);
/* Metadata changes that are only known at the end (n_token of a greedy run, extra): a second META chunk, the last one
 * counts. */
kv_status kv_trace_set_info(kv_trace_writer *w, const kv_trace_info *info, kv_error *err);
/* Index, footer, fsync, rename. The writer is gone afterwards, whatever the result. */
kv_status kv_trace_finish(kv_trace_writer *w, kv_error *err);
/* Stop without finishing: what was written stays under PATH.partial for `recover`. NULL accepted. */
void kv_trace_abandon(kv_trace_writer *w);

/* Where bytes come from that are not in memory yet: on their way from a device, say. A block is [head][plane][token x
 * width]: `planes` byte planes, lowest first, of the elements in c->dtype (one plane: the elements themselves).
 *   fill   start filling dst and return; whatever *ticket is then handed to
 *   wait   returns when dst is complete; called from a compressor, once for each fill that succeeded, in any order
 * The source outlives the next kv_trace_flush. */
typedef struct {
    void *ctx;
    kv_status (*fill)(void *ctx, const kv_chunk *block, uint32_t planes, uint8_t *dst, uint64_t *ticket, kv_error *err);
    kv_status (*wait)(void *ctx, uint64_t ticket, kv_error *err);
} kv_trace_source;
/* As kv_trace_put; fill is called from the caller's thread, block by block in the file's order. */
kv_status kv_trace_put_from(kv_trace_writer *w, const kv_chunk *c, const kv_trace_source *src, kv_error *err);
/* Wait until everything handed in is in the file. The first failure, if there was one. */
kv_status kv_trace_flush(kv_trace_writer *w, kv_error *err);
/* Where the ring's raw bytes lie from now on (page-locked memory, say), slot_bytes of it in every slot at once. `free`
 * accepts NULL. Flushes first. */
#define KV_TRACE_BLOCK ((size_t)2 << 20) /* raw bytes of a block, at most, unless one row of a head is more */
typedef struct {
    void *(*alloc)(size_t n);
    void (*free)(void *p);
} kv_trace_memory;
kv_status kv_trace_writer_memory(kv_trace_writer *w, const kv_trace_memory *room, size_t slot_bytes, kv_error *err);

/* Bytes in and out per stream, for `info`, --dry-run checks and benches; arrays are indexed by stream number. */
typedef struct {
    uint64_t raw[32], stored[32];
    double compress_s; /* CPU seconds of compressing, of all `threads` */
    double write_s;    /* seconds in write() and fdatasync() */
    double wait_s;     /* seconds a caller waited for room in the ring */
    double copy_s;     /* seconds a caller copied bytes into it */
    uint32_t threads;
} kv_trace_usage;
kv_trace_usage kv_trace_writer_usage(const kv_trace_writer *w);
kv_trace_usage kv_trace_reader_usage(const kv_trace *t);

/* Deep copy and release of metadata. */
kv_status kv_trace_info_copy(const kv_trace_info *from, kv_trace_info *to, kv_error *err);
void kv_trace_info_free(kv_trace_info *i);

#endif
