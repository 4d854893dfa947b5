/* run.c - plans and runs one capture (run.h). */
#include "capture/run.h"

#include <jansson.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "capture/tokenizer.h"
#include "capture/wofile.h"
#include "kernels/kernels.h"
#include "traces/cli.h"
#include "traces/npy.h"

/* ------------------------------------------------------------------------------------------------ metadata */
/* A jansson object as a string of our own; the object is released. */
static char *dump(json_t *o)
{
    char *text = o ? json_dumps(o, JSON_SORT_KEYS | JSON_COMPACT) : NULL;
    json_decref(o);
    return text;
}

/* What is not in the metadata proper and decides nothing: where the model came from, how the tokens were made. */
static char *extra_json(const kv_model *m, const kv_capture_request *q, const kv_job *j)
{
    const kv_model_desc *d = &m->desc;
    const char *decode = j->n_greedy ? "greedy" : j->n_token > j->n_prompt ? "given" : "none";
    json_t *o = json_pack(
        "{s:{s:s,s:s,s:I,s:i,s:i,s:i,s:f,s:f,s:b},s:s?,s:{s:s,s:s,s:i,s:b,s:s*}}", "source", "file", d->file, "tensors",
        d->quant, "parameters", (json_int_t)d->n_params, "vocabulary", (int)d->n_vocab, "ffn", (int)d->ffn, "context",
        (int)d->n_ctx, "norm_eps", (double)d->norm_eps, "final_softcap", (double)d->final_softcap, "tied", (int)d->tied,
        "tokenizer", m->tok ? kv_tokenizer_describe(m->tok) : NULL, "run", "engine", q->cuda ? "cuda" : "cpu", "decode",
        decode, "map_rows", (int)q->map_rows, "map_full", (int)q->map_full, "chat", j->chat);
    json_t *prompt = o && j->extra ? json_loads(j->extra, JSON_ALLOW_NUL, NULL) : NULL;
    if (prompt && json_object_set_new(o, "prompt", prompt)) json_decref(o), o = NULL;
    return dump(o);
}

/* What differs between two captures of the same run. */
static char *provenance_json(const kv_capture_request *q)
{
    char host[256] = "", when[32] = "";
    time_t now = time(NULL);
    struct tm utc;
    if (gethostname(host, sizeof host - 1)) host[0] = 0;
    if (gmtime_r(&now, &utc)) strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    char device[64] = "";
    if (q->cuda) kv_cuda_device(device, sizeof device);
    return dump(json_pack("{s:s,s:s,s:s,s:s,s:i,s:s,s:s,s:i}", "time", when, "host", host, "program",
                          "kv-capture " KV_VERSION, "build", kv_build_id(), "threads", (int)q->threads, "backend",
                          q->cuda ? "cuda" : "cpu", "device", device, "gpus",
                          q->cuda ? (int)(q->gpus ? q->gpus : 1) : 0));
}

static bool copy_string(const char *from, char **to)
{
    return !from || !*from || (*to = kv_format("%s", from));
}

static kv_status fill_info(const kv_model *m, const kv_capture_request *q, const kv_job *j, kv_trace_info *i,
                           kv_error *err)
{
    const kv_model_desc *d = &m->desc;
    const kv_rope_freqs *rope = kv_model_rope(d);
    kv_status st;

    i->n_layer = q->layer ? q->n_layer : d->n_layer;
    i->n_layer_model = d->n_layer;
    if (i->n_layer && q->layer && q->layer[i->n_layer - 1] >= d->n_layer)
        return kv_fail(err, KV_EMISUSE, "--layers names layer %u: '%s' has layers 0 to %u", q->layer[i->n_layer - 1],
                       d->name, d->n_layer - 1);
    i->n_q_head = d->n_q_head, i->n_kv_head = d->n_kv_head, i->head_dim = d->head_dim, i->hidden = d->hidden;
    i->n_token = j->n_token, i->n_prompt = j->n_prompt, i->n_context = j->n_context;
    i->scale = d->scale, i->softcap = d->softcap;
    i->rope_theta = rope ? rope->theta : 0, i->rope_dim = d->rope_dim, i->rope_mscale = rope ? rope->mscale : 1;
    i->post_norm_eps = d->post_norm ? d->norm_eps : 0, i->out_scale = d->residual_scale;
    i->dtype = q->dtype, i->obs_rows = q->level == KV_RECORD_OBS ? KV_RECORD_OBS_ROWS : 0;
    i->question = j->question;
    if ((st = kv_array(&i->layer, i->n_layer, sizeof *i->layer, err)) ||
        (st = kv_array(&i->window, i->n_layer, sizeof *i->window, err)) ||
        (st = kv_array(&i->evidence, j->n_evidence, sizeof *i->evidence, err)))
        return st;
    for (uint32_t l = 0; l < i->n_layer; l++) {
        i->layer[l] = q->layer ? q->layer[l] : l;
        i->window[l] = d->window[i->layer[l]];
    }
    if (j->n_evidence) memcpy(i->evidence, j->evidence, j->n_evidence * sizeof *i->evidence);
    i->n_evidence = j->n_evidence;
    if (rope) {
        if ((st = kv_array(&i->inv_freq, d->rope_dim / 2, sizeof *i->inv_freq, err))) return st;
        memcpy(i->inv_freq, kv_rope_of_run(rope, j->n_token), d->rope_dim / 2 * sizeof *i->inv_freq);
    }
    if (!copy_string(d->name, &i->model) || !copy_string(d->arch, &i->arch) ||
        !copy_string(d->sha256, &i->model_sha256) || !copy_string(j->id, &i->prompt_id) ||
        !copy_string(j->category, &i->category) || !copy_string(kv_record_name(q->level), &i->record) ||
        !(i->extra = extra_json(m, q, j)))
        return kv_fail(err, KV_ENOMEM, "out of memory for the metadata of '%s'", j->id);
    return KV_OK;
}

kv_status kv_capture_plan_open(const kv_model *m, const kv_capture_request *q, const kv_job *j, kv_capture_plan *out,
                               kv_error *err)
{
    kv_capture_plan *p = out;
    bool none = !strcmp(q->wo, "none"), embed = !strcmp(q->wo, "embed"), automatic = !strcmp(q->wo, "auto");
    kv_status st;

    *p = (kv_capture_plan){0};
    p->record =
        (kv_record_options){.level = q->level, .map_rows = q->map_rows, .map_full = q->map_full, .threads = q->threads};
    if ((st = fill_info(m, q, j, &p->info, err)) ||
        (st = kv_record_sizes(&p->info, &p->record, m->desc.n_vocab, j->n_text, p->raw, err)))
        goto out;
    for (int s = 0; s < 32; s++) p->total += p->raw[s];
    if (q->level >= KV_RECORD_OBS && !none) {
        uint64_t layer = (uint64_t)p->info.hidden * p->info.n_q_head * p->info.head_dim * kv_dtype_bytes(q->dtype);
        uint64_t wo = layer * p->info.n_layer;
        p->record.wo = embed || (automatic && wo < (p->total + wo) / 4);
        p->wo_side = !p->record.wo;
        p->wo_bytes = p->wo_side ? layer * m->desc.n_layer : wo;
        if (p->record.wo) p->raw[KV_S_WO] = wo, p->total += wo;
    }
    return KV_OK;
out:
    kv_capture_plan_close(p);
    return st;
}

void kv_capture_plan_close(kv_capture_plan *p)
{
    kv_trace_info_free(&p->info);
    *p = (kv_capture_plan){0};
}

/* ------------------------------------------------------------------------------------------------ done already? */
static bool same_string(const char *a, const char *b)
{
    return a && b ? !strcmp(a, b) : a == b;
}

static bool same_run(const kv_trace *t, const kv_capture_plan *p)
{
    const kv_trace_info *a = kv_trace_get_info(t), *b = &p->info;
    uint32_t rows = p->record.map_rows, np = b->n_prompt, layer = b->n_layer ? b->layer[0] : 0;
    if (rows > np) rows = np;
    return b->model_sha256 && same_string(a->model_sha256, b->model_sha256) && same_string(a->record, b->record) &&
           a->dtype == b->dtype && a->n_layer == b->n_layer && a->n_token == b->n_token && a->n_prompt == b->n_prompt &&
           a->n_context == b->n_context && a->obs_rows == b->obs_rows &&
           !memcmp(a->layer, b->layer, b->n_layer * sizeof *b->layer) &&
           (!rows || kv_trace_has(t, KV_S_MAP_WINDOW, layer, 0, np - rows, np)) &&
           (!p->record.map_full || kv_trace_has(t, KV_S_MAP, layer, 0, 0, b->n_token)) &&
           (!(p->record.wo || p->wo_side) || kv_trace_has_wo(t, layer));
}

bool kv_capture_plan_done(const kv_capture_plan *p, const kv_job *j, const char *path)
{
    uint32_t known = j->n_token - j->n_greedy, *token = NULL;
    struct stat sb;
    kv_trace *t = NULL;
    bool done = false;

    if (stat(path, &sb) || !S_ISREG(sb.st_mode) || kv_trace_open(path, &t, NULL)) return false;
    if (same_run(t, p) && !kv_array(&token, known, sizeof *token, NULL) &&
        !kv_trace_read_u32(t, KV_S_TOKENS, 0, known, token, NULL))
        done = !memcmp(token, j->token, known * sizeof *token);
    free(token);
    kv_trace_close(t);
    return done;
}

/* ------------------------------------------------------------------------------------------------ the run */
/* What stands between engine and recorder: greedy choice, the rows of --logits, progress. */
typedef struct {
    kv_engine_hook to; /* the recorder */
    kv_job *job;
    uint32_t n_vocab, n_layer;
    uint32_t n_known; /* tokens of the job that are known */
    const kv_capture_request *q;
    float *kept; /* [rows of --logits][n_vocab] */
    kv_progress *bar;
    uint32_t layers_done; /* of the prompt's call */
    kv_engine *engine;
    kv_trace_writer *w;
    double began;
} session;

const char *kv_stage_name(kv_stage s)
{
    static const char *const name[KV_STAGE_COUNT] = {"compute", "copy", "compression", "disk"};
    return name[s];
}

/* Shares of `seconds` and which stage has the largest. */
static kv_stage busy_stage(const kv_engine_usage *e, const kv_trace_usage *w, double seconds,
                           double busy[KV_STAGE_COUNT])
{
    kv_stage most = KV_STAGE_COMPUTE;
    busy[KV_STAGE_COMPUTE] = e->n_device ? e->compute_s : seconds - w->wait_s - w->copy_s;
    busy[KV_STAGE_COPY] = e->copy_s + w->copy_s;
    busy[KV_STAGE_COMPRESS] = w->compress_s / (w->threads ? w->threads : 1);
    busy[KV_STAGE_DISK] = w->write_s;
    for (int i = 0; i < KV_STAGE_COUNT; i++) {
        busy[i] = seconds > 0 && busy[i] > 0 ? busy[i] / seconds : 0;
        if (busy[i] > busy[most]) most = (kv_stage)i;
    }
    return most;
}

static unsigned session_want(void *ctx, uint32_t layer)
{
    session *s = ctx;
    return s->to.want(s->to.ctx, layer);
}

static kv_status session_record(void *ctx, const kv_attn_view *a, kv_error *err)
{
    session *s = ctx;
    kv_status st = s->to.record(s->to.ctx, a, err);
    char note[80];
    if (!a->row0 && !st) s->layers_done = a->layer + 1;
    if (!a->row0) {
        double busy[KV_STAGE_COUNT];
        kv_engine_usage e = kv_engine_get_usage(s->engine);
        kv_trace_usage w = kv_trace_writer_usage(s->w);
        kv_stage most = busy_stage(&e, &w, kv_seconds(CLOCK_MONOTONIC) - s->began, busy);
        snprintf(note, sizeof note, "layer %u of %u, limited by %s", a->layer + 1, s->n_layer, kv_stage_name(most));
    }
    kv_progress_step(s->bar, a->row0 + (double)a->n_row * (a->layer + 1) / (s->n_layer + 1.0), a->row0 ? NULL : note);
    return st;
}

static uint32_t best_token(const float *logit, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        if (logit[i] > logit[best]) best = i;
    return best;
}

static kv_status session_logits(void *ctx, uint32_t row0, uint32_t n_row, const float *logits, kv_error *err)
{
    session *s = ctx;
    const kv_capture_request *q = s->q;
    size_t row_bytes = s->n_vocab * sizeof *logits;

    if (row0 + n_row == s->n_known && s->n_known < s->job->n_token)
        s->job->token[s->n_known++] = best_token(logits + (size_t)(n_row - 1) * s->n_vocab, s->n_vocab);
    for (uint32_t i = 0; s->kept && i < (q->logit_row ? q->n_logit_row : s->job->n_token); i++) {
        uint32_t row = q->logit_row ? q->logit_row[i] : i;
        if (row >= row0 && row - row0 < n_row)
            memcpy(s->kept + (size_t)i * s->n_vocab, logits + (size_t)(row - row0) * s->n_vocab, row_bytes);
    }
    return s->to.logits ? s->to.logits(s->to.ctx, row0, n_row, logits, err) : KV_OK;
}

static bool session_wants_logits(void *ctx, uint32_t row)
{
    const session *s = ctx;
    const kv_capture_request *q = s->q;
    if (s->to.wants_logits && s->to.wants_logits(s->to.ctx, row)) return true;
    if (!s->kept || !q->logit_row) return s->kept;
    for (uint32_t i = 0; i < q->n_logit_row; i++)
        if (q->logit_row[i] == row) return true;
    return false;
}

static kv_status session_nll(void *ctx, uint32_t row0, uint32_t n_row, const float *nll, kv_error *err)
{
    session *s = ctx;
    return s->to.nll ? s->to.nll(s->to.ctx, row0, n_row, nll, err) : KV_OK;
}

static kv_status need_engine(session *s, const kv_model *m, kv_error *err)
{
    const kv_capture_request *q = s->q;
    kv_engine_options o = {.dtype = q->dtype, .threads = q->threads, .capacity = s->job->n_token, .gpus = q->gpus};
    kv_status st;
    if (!q->cuda) return kv_engine_open_cpu(m, &o, &s->engine, err);
    if (q->engine && *q->engine) {
        st = kv_engine_resize(*q->engine, o.capacity, err);
        s->engine = *q->engine;
        return st;
    }
    st = kv_engine_open_cuda(m, &o, &s->engine, err);
    if (!st && q->engine) *q->engine = s->engine;
    return st;
}

/* After a failure a device may be of no use any more. */
static void drop_engine(session *s, bool failed)
{
    kv_engine **kept = s->q->cuda ? s->q->engine : NULL;
    if (kept && !failed) return;
    kv_engine_close(s->engine);
    if (kept) *kept = NULL;
}

/* The ring's memory is what copies from the engine are fastest to: of the size of its most frequent block. */
static kv_status fit_ring(const session *s, const kv_trace_info *i, kv_error *err)
{
    kv_trace_memory room;
    size_t rows = i->n_token < 1024 ? i->n_token : 1024, bytes = rows * i->head_dim * kv_dtype_bytes(i->dtype);
    if (!kv_engine_memory(s->engine, &room)) return KV_OK;
    bytes *= s->q->level == KV_RECORD_QKV ? i->n_q_head : i->n_kv_head;
    return kv_trace_writer_memory(s->w, &room, bytes < KV_TRACE_BLOCK ? bytes : KV_TRACE_BLOCK, err);
}

static kv_status run_model(session *s, kv_error *err)
{
    kv_engine_hook hook = {.ctx = s, .want = session_want, .record = session_record};
    uint32_t row = s->job->n_token - s->job->n_greedy;
    kv_status st;

    if (s->to.logits || s->kept || s->job->n_greedy)
        hook.logits = session_logits, hook.wants_logits = session_wants_logits, hook.nll = session_nll;
    hook.n_prompt = s->to.n_prompt, hook.n_context = s->to.n_context;
    s->n_known = row;
    st = kv_engine_run(s->engine, s->job->token, row, &hook, NULL, err);
    for (; !st && row < s->job->n_token; row++) st = kv_engine_run(s->engine, s->job->token + row, 1, &hook, NULL, err);
    return st;
}

static kv_status put_u32(kv_trace_writer *w, kv_stream s, const uint32_t *v, uint32_t first, uint32_t n, kv_error *err)
{
    kv_chunk c = {.stream = s, .head_count = 1, .token_first = first, .token_count = n, .width = 1, .dtype = KV_U32};
    return n ? kv_trace_put(w, &c, v + first, err) : KV_OK;
}

static kv_status put_text(kv_trace_writer *w, const kv_job *j, kv_error *err)
{
    kv_status st = put_u32(w, KV_S_OFFSETS, j->offset, 0, j->n_token + 1, err);
    return st ? st : kv_trace_put_bytes(w, KV_S_TEXT, j->text, j->n_text, err);
}

static kv_status write_logits(const session *s, kv_error *err)
{
    size_t shape[2] = {s->q->logit_row ? s->q->n_logit_row : s->job->n_token, s->n_vocab};
    return kv_npy_write(s->q->logits, "<f4", 2, shape, s->kept, err);
}

/* The hash of the model's W_O goes into the metadata, so it is known before the file that it names. */
static kv_status name_wo(kv_capture_plan *p, const kv_model *m, const kv_capture_request *q, kv_error *err)
{
    char fresh[65] = "", *sha = q->wo_sha256 ? q->wo_sha256 : fresh;
    kv_status st = *sha ? KV_OK : kv_wo_sha256(m, p->info.n_layer, p->info.layer, q->dtype, sha, err);
    if (!st && !(p->info.wo_sha256 = kv_format("%s", sha))) st = kv_fail(err, KV_ENOMEM, "out of memory for a hash");
    return st;
}

/* Bytes per stream: of the finished file where it can be read back, else what the writer counted so far. */
static void count_bytes(const kv_trace_usage *u, kv_capture_result *out)
{
    out->raw = out->stored = 0;
    for (int s = 0; s < 32; s++) out->raw += u->raw[s], out->stored += u->stored[s];
}

kv_status kv_capture_plan_run(kv_capture_plan *p, const kv_model *m, const kv_capture_request *q, kv_job *j,
                              const char *path, kv_capture_result *out, kv_error *err)
{
    session s = {.job = j, .q = q, .n_vocab = m->desc.n_vocab, .n_layer = m->desc.n_layer};
    uint32_t known = j->n_token - j->n_greedy;
    size_t n_row = q->logit_row ? q->n_logit_row : j->n_token;
    kv_recorder *rec = NULL;
    kv_trace *back = NULL;
    kv_outfile logits;
    char *provenance = provenance_json(q);
    struct stat sb;
    bool regular = stat(path, &sb) || S_ISREG(sb.st_mode);
    bool runs = q->level != KV_RECORD_TOKENS || j->n_greedy || q->logits;
    double began;
    kv_status st;

    *out = (kv_capture_result){0};
    s.began = kv_seconds(CLOCK_MONOTONIC);
    for (uint32_t i = 0; q->logit_row && i < q->n_logit_row; i++)
        if (q->logit_row[i] >= j->n_token) {
            st = kv_fail(err, KV_EMISUSE, "--logits-rows names row %u: '%s' has rows 0 to %u", q->logit_row[i], j->id,
                         j->n_token - 1);
            goto out;
        }
    if (q->logits) { /* written last: a path that cannot be written is found before the run, not behind it */
        if (stat(q->logits, &sb) || S_ISREG(sb.st_mode)) { /* a pipe must be opened once only */
            if ((st = kv_outfile_open(q->logits, &logits, err))) goto out;
            kv_outfile_abandon(&logits);
        }
        if ((st = kv_array(&s.kept, n_row * s.n_vocab, sizeof *s.kept, err))) goto out;
    }
    if (runs && (st = need_engine(&s, m, err))) goto out;
    began = kv_seconds(CLOCK_MONOTONIC);
    out->load_s = began - s.began;
    if (p->wo_side && !regular) p->wo_side = false; /* nowhere to put a file beside it */
    if (p->wo_side && (st = name_wo(p, m, q, err))) goto out;
    if ((st = kv_trace_create(path, &p->info, provenance, q->threads, &s.w, err))) goto out;
    if (p->wo_side && (st = kv_wo_provide(m, p->info.n_layer, p->info.layer, q->dtype, p->info.wo_sha256, path,
                                          strcmp(q->wo, "auto") ? q->wo : NULL, q->shard, q->threads, err)))
        goto out;
    if ((st = put_u32(s.w, KV_S_TOKENS, j->token, 0, known, err)) || (!j->n_greedy && (st = put_text(s.w, j, err))))
        goto out;

    if (runs) {
        if ((st = fit_ring(&s, &p->info, err)) ||
            (st = kv_recorder_open(&p->info, &p->record, m, j->token, s.w, &rec, err)))
            goto out;
        s.to = kv_recorder_hook(rec);
        s.bar = kv_progress_start(j->id, j->n_token, "tokens");
        s.began = kv_seconds(CLOCK_MONOTONIC);
        st = run_model(&s, err);
        kv_progress_end(s.bar);
        if (st || (st = kv_recorder_finish(rec, err)) || (st = kv_trace_flush(s.w, err))) goto out;
        out->model_s = kv_seconds(CLOCK_MONOTONIC) - s.began;
        out->engine = kv_engine_get_usage(s.engine);
    }
    if (j->n_greedy) {
        if ((st = put_u32(s.w, KV_S_TOKENS, j->token, known, j->n_greedy, err)) || (st = kv_job_add_text(m, j, err)) ||
            (st = put_text(s.w, j, err)))
            goto out;
    }
    if (s.kept && (st = write_logits(&s, err))) goto out;
    kv_trace_usage used = kv_trace_writer_usage(s.w);
    out->threads = used.threads;
    if (runs) out->limit = busy_stage(&out->engine, &used, out->model_s, out->busy);
    st = kv_trace_finish(s.w, err);
    s.w = NULL;
    if (st) goto out;
    out->run_s = kv_seconds(CLOCK_MONOTONIC) - began;
    if (regular && !kv_trace_open(path, &back, NULL)) used = kv_trace_reader_usage(back);
    count_bytes(&used, out);
out:;
    /* Nothing may be on its way from the engine any more; and were all layers that it handed in written? */
    bool written = s.w && !kv_trace_flush(s.w, NULL);
    if (st == KV_EINTERRUPTED)
        kv_fail(err, st,
                "capture of '%s' stopped by a signal after %u of %u layers: '%s.partial' keeps them "
                "('kv-trace recover' makes a trace of it); the same command starts it anew",
                j->id, s.layers_done, s.n_layer, path);
    else if (st && s.layers_done && regular && s.w) {
        kv_error why = err ? *err : (kv_error){""};
        if (!strstr(why.msg, "recover"))
            kv_fail(err, st, "%.700s; '%s.partial' keeps %s%u of %u layers ('kv-trace recover' makes a trace of them)",
                    why.msg, path, written ? "" : "at most ", s.layers_done, s.n_layer);
    }
    kv_trace_close(back);
    if (runs) drop_engine(&s, st);
    kv_trace_abandon(s.w);
    kv_recorder_close(rec);
    free(s.kept), free(provenance);
    return st;
}
