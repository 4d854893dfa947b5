/* kv-capture - run a model once and write down its attention. */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "capture/model.h"
#include "capture/run.h"
#include "capture/tasks.h"
#include "capture/tokenizer.h"
#include "kernels/gpu.h"
#include "kernels/parallel.h"
#include "traces/cli.h"
#include "traces/json.h"
#include "traces/plain.h"

#define MAX_BYTES_DEFAULT 50000000000u
#define MAP_ROWS_DEFAULT  64u
#define TEXT_MAX          ((size_t)1 << 30)

static const char help[] =
    "usage: kv-capture run -m MODEL (--text S | --file F | --tokens T.json | --prompts P.jsonl) -o OUT.kvt|DIR "
    "[options]\n"
    "       kv-capture info -m MODEL [--json]\n"
    "       kv-capture prompts --kind needle|multikey|vartrack -o P.jsonl [--count N] [--words N] [--depth P] "
    "[--digits N] [--seed S]\n"
    "       kv-capture tokenize -m MODEL (--text S | --file F) [--special] [--chat NAME] [--json]\n"
    "\n"
    "Runs a model and records what its attention consumed and produced. MODEL is a GGUF file, or "
    "synthetic:NAME[:SEED]\n"
    "for weights at random in a known shape (tiny, tiny-qwen, smol-135m, qwen-0.5b, llama-1b, llama-8b).\n"
    "\n"
    "  -m, --model FILE        the model\n"
    "  -o, --output PATH       trace, or a folder (then ID.kvt in it)\n"
    "      --text S, --file F  the prompt; a BOS token is added when the model's file says so\n"
    "      --tokens T.json     JSON array of ids, used as given; --prompt-tokens N: the rest is the continuation\n"
    "                          or random:N[:SEED]: ids at random\n"
    "      --prompts P.jsonl   a prompt set, a trace for each; finished ones are skipped; --only ID,.. picks some\n"
    "      --shard I/N         the I-th of N parts of the prompt set, for arrays of jobs, into one folder\n"
    "      --special           parse special tokens in the text\n"
    "      --chat NAME         the prompt as a user's turn in the chat template of a family: auto (the model's), "
    "chatml,\n"
    "                          deepseek, gemma, granite, llama2, llama3, llama3.1, mistral, mistral-v3, "
    "mistral-tekken,\n"
    "                          olmo2, phi3, phi4, qwen2, qwen2.5, smollm2, zephyr\n"
    "      --decode N          tokens after the prompt: of the continuation, else chosen greedily\n"
    "      --record LEVEL      qkv (default), obs, stats, tokens\n"
    "      --maps window[:W]|full  attention maps too: the last W (64) prompt rows, or all rows\n"
    "      --dtype T           f16 (default), bf16, f32: Q, K and V are rounded to it before they are used; on CUDA "
    "the\n"
    "                          model computes in it (default there: bf16 for bf16 weights)\n"
    "      --wo W              W_O: auto (default), embed, none, or a side file to share\n"
    "      --layers L          record only these, as 0,3,7 or 0:8\n"
    "      --backend B         auto (CUDA where there is a device), cpu, cuda;  --gpus N: layers spread over N "
    "devices\n"
    "      --threads N         default: all cores; the trace does not depend on it\n"
    "      --max-bytes B       refuse a larger trace (default 50GB before compression)\n"
    "      --dry-run           print the size of every stream and stop\n"
    "      --json              sizes, or what was done: seconds, bytes, memory, how busy each stage was\n"
    "      --logits F.npy      logits as float32 [rows, vocabulary]; --logits-rows 0,1,100:110\n"
    "      --kind K            prompts: a needle, two of eight needles, or chains of variables, in made-up text of "
    "--words (800)\n"
    "                          words; --count (8) prompts; the first statement at --depth percent (default: spread); "
    "values of\n"
    "                          --digits (7) digits; evidence, question and answer are in the set; --seed (1)\n"
    "      --help, --version\n"
    "\n"
    "  kv-capture run -m model.gguf --text 'The quick brown fox' -o fox.kvt\n"
    "  kv-capture run -m model.gguf --prompts prompts.jsonl --record obs -o traces/\n"
    "  kv-capture prompts --kind multikey --words 3000 --count 20 -o needles.jsonl\n";

typedef struct {
    const char *model, *output, *text, *file, *tokens, *prompts, *only;
    const char *chat, *record, *maps, *dtype, *wo, *layers, *backend, *logits, *logits_rows, *shard;
    uint32_t prompt_tokens, decode, gpus, threads;
    uint64_t max_bytes;
    bool special, dry_run, json;
    kv_task_request task;
} options;

/* ------------------------------------------------------------------------------------------------ small parsers */
/* "0,3,100:110" as numbers, ranges half open. */
static kv_status parse_rows(const char *option, const char *s, uint32_t **out, uint32_t *n, kv_error *err)
{
    char *text = kv_format("%s", s), *save = NULL;
    size_t room = 16;
    uint32_t *v = NULL;
    kv_status st = text ? kv_array(&v, room, sizeof *v, err) : kv_fail(err, KV_ENOMEM, "out of memory");

    *n = 0;
    for (char *item = st ? NULL : strtok_r(text, ",", &save); item && !st; item = strtok_r(NULL, ",", &save)) {
        uint64_t a, b;
        char *colon = strchr(item, ':');
        if (colon) *colon = 0;
        bool ok = kv_parse_u64(item, &a) && a < KV_TOKENS_MAX && (!colon || (kv_parse_u64(colon + 1, &b) && b > a));
        if (ok && !colon) b = a + 1;
        if (!ok || b > KV_TOKENS_MAX || b - a > KV_TOKENS_MAX - *n) {
            if (colon) *colon = ':';
            st = kv_fail(err, KV_EMISUSE, "--%s '%s': '%s' is neither a number nor a range FROM:TO", option, s, item);
            break;
        }
        while (*n + (b - a) > room) room *= 2;
        uint32_t *more = realloc(v, room * sizeof *v);
        if (!more) {
            st = kv_fail(err, KV_ENOMEM, "out of memory for --%s", option);
            break;
        }
        for (v = more; a < b; a++) v[(*n)++] = (uint32_t)a;
    }
    if (!st && !*n) st = kv_fail(err, KV_EMISUSE, "--%s '%s' names nothing", option, s);
    free(text);
    if (st) free(v), v = NULL;
    *out = v;
    return st;
}

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static kv_status parse_maps(const char *s, kv_capture_request *q, kv_error *err)
{
    uint64_t rows = MAP_ROWS_DEFAULT;
    if (!s) return KV_OK;
    if (!strcmp(s, "full")) return q->map_full = true, KV_OK;
    bool ok = !strcmp(s, "window") || (!strncmp(s, "window:", 7) && kv_parse_u64(s + 7, &rows));
    if (!ok || !rows || rows > KV_TOKENS_MAX)
        return kv_fail(err, KV_EMISUSE, "--maps '%s': use window, window:ROWS or full", s);
    q->map_rows = (uint32_t)rows;
    return KV_OK;
}

/* The request, and the arrays it points to. */
typedef struct {
    kv_capture_request q;
    uint32_t *layer, *logit_row;
    char wo_sha256[65];
    kv_engine *engine;
} request;

static kv_status parse_request(const options *o, request *r, kv_error *err)
{
    kv_capture_request *q = &r->q;
    kv_status st;

    q->wo = o->wo, q->shard = o->shard, q->logits = o->logits, q->wo_sha256 = r->wo_sha256;
    q->threads = o->threads ? o->threads : kv_cpu_count();
    if (!kv_record_parse(o->record, &q->level))
        return kv_fail(err, KV_EMISUSE, "--record '%s': use qkv, obs, stats or tokens", o->record);
    q->dtype = KV_F16;
    if ((o->dtype && !kv_dtype_parse(o->dtype, &q->dtype)) ||
        (q->dtype != KV_F32 && q->dtype != KV_F16 && q->dtype != KV_BF16))
        return kv_fail(err, KV_EMISUSE, "--dtype '%s': use f16, bf16 or f32", o->dtype);
    if ((st = parse_maps(o->maps, q, err))) return st;
    if (o->maps && q->level == KV_RECORD_TOKENS)
        return kv_fail(err, KV_EMISUSE, "--maps needs --record stats, obs or qkv");
    if (strcmp(o->backend, "auto") && strcmp(o->backend, "cpu") && strcmp(o->backend, "cuda"))
        return kv_fail(err, KV_EMISUSE, "--backend '%s': use auto, cpu or cuda", o->backend);
    int devices = strcmp(o->backend, "cpu") ? kv_gpu_count() : 0;
    if (!strcmp(o->backend, "cuda") && !devices)
        return kv_fail(err, KV_EUNSUPPORTED,
                       "--backend cuda: no CUDA device that this build can use; use --backend cpu");
    if (o->gpus && !strcmp(o->backend, "cpu"))
        return kv_fail(err, KV_EMISUSE, "--gpus %u needs --backend cuda", o->gpus);
    if (o->gpus > (uint32_t)devices)
        return kv_fail(err, KV_EUNSUPPORTED, "--gpus %u: %d CUDA devices that this build can use", o->gpus, devices);
    q->cuda = devices > 0, q->gpus = o->gpus, q->engine = &r->engine;
    if (o->logits_rows && !o->logits) return kv_fail(err, KV_EMISUSE, "--logits-rows needs --logits FILE");
    if (o->logits_rows && (st = parse_rows("logits-rows", o->logits_rows, &r->logit_row, &q->n_logit_row, err)))
        return st;
    q->logit_row = r->logit_row;
    if (o->layers) {
        uint32_t n = 0;
        if ((st = parse_rows("layers", o->layers, &r->layer, &q->n_layer, err))) return st;
        qsort(r->layer, q->n_layer, sizeof *r->layer, by_number);
        for (uint32_t i = 0; i < q->n_layer; i++)
            if (!n || r->layer[n - 1] != r->layer[i]) r->layer[n++] = r->layer[i];
        q->n_layer = n, q->layer = r->layer;
    }
    return KV_OK;
}

/* ------------------------------------------------------------------------------------------------ prompts */
/* One text as a set of one prompt. */
static kv_status single_prompt(const options *o, kv_prompts *set, kv_error *err)
{
    kv_status st = kv_array(&set->v, 1, sizeof *set->v, err);
    const char *base = o->file ? strrchr(o->file, '/') : NULL;

    if (st) return st;
    kv_prompt *p = &set->v[0];
    set->n = 1;
    p->prompt_end = p->context_end = p->bytes = SIZE_MAX;
    base = base ? base + 1 : o->file ? o->file : "text";
    p->id = kv_format("%.*s", (int)(*base == '.' ? strlen(base) : strcspn(base, ".")), base);
    if (o->file)
        return p->id && (p->path = kv_format("%s", o->file)) ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory");
    p->text = kv_format("%s", o->text);
    if (!p->id || !p->text) return kv_fail(err, KV_ENOMEM, "out of memory");
    p->n_text = strlen(p->text);
    return KV_OK;
}

/* keep[i] = prompt i is wanted: all, or those named in --only; of these every N-th with --shard. */
static kv_status pick(const kv_prompts *set, const char *only, const char *shard, bool *keep, kv_error *err)
{
    char *text = kv_format("%s", only ? only : ""), *save = NULL;
    const char **name = NULL;
    size_t named = 0;
    kv_status st = text ? kv_array(&name, set->n, sizeof *name, err) : kv_fail(err, KV_ENOMEM, "out of memory");

    for (size_t i = 0; i < set->n && !st; i++) name[i] = set->v[i].id, keep[i] = !only;
    for (char *id = st ? NULL : strtok_r(text, ",", &save); id; id = strtok_r(NULL, ",", &save), named++) {
        size_t i = 0;
        while (i < set->n && strcmp(set->v[i].id, id)) i++;
        if (i < set->n) {
            keep[i] = true;
            continue;
        }
        const char *near = kv_nearest(id, name, set->n);
        st = kv_fail(err, KV_EMISUSE, "--only names prompt '%s', which the set does not have%s%s%s", id,
                     near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "");
        break;
    }
    uint32_t part = 0, parts = 1;
    size_t nth = 0;
    if (!st && shard) st = kv_parse_shard(shard, &part, &parts, err);
    for (size_t i = 0; i < set->n && !st; i++)
        if (keep[i]) keep[i] = nth++ % parts == part;
    if (!st && only && !named) st = kv_fail(err, KV_EMISUSE, "--only '%s' names nothing", only);
    free(text), free(name);
    return st;
}

/* ------------------------------------------------------------------------------------------------ output */
static bool is_folder(const char *path)
{
    struct stat sb;
    return !stat(path, &sb) && S_ISDIR(sb.st_mode);
}

/* mkdir -p */
static kv_status make_folder(const char *path, kv_error *err)
{
    char *p = kv_format("%s", path);
    kv_status st = p ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory for a path");
    for (char *c = p; c && *c && !st; c++) {
        if (c == p || (c[1] && c[1] != '/')) continue;
        char keep = c[1];
        c[1] = 0;
        if (*c != '/' && mkdir(p, 0777) && errno != EEXIST)
            st = kv_fail(err, KV_EIO, "cannot make folder '%s': %s", p, strerror(errno));
        c[1] = keep;
    }
    if (!st && !is_folder(path)) st = kv_fail(err, KV_EIO, "cannot write to '%s': not a folder", path);
    free(p);
    return st;
}

static void print_bytes(FILE *to, uint64_t n)
{
    if (n < 10240)
        fprintf(to, "%llu B", (unsigned long long)n);
    else if (n < 10u << 20)
        fprintf(to, "%.1f KiB", (double)n / 1024);
    else if (n < 10ull << 30)
        fprintf(to, "%.1f MiB", (double)n / (1u << 20));
    else
        fprintf(to, "%.1f GiB", (double)n / (1u << 30));
}

static void print_plan(const kv_capture_plan *p, const kv_job *j, const kv_capture_request *q)
{
    printf("%s: %u prompt + %u decoded tokens, %u layers, %s at %s; bytes before compression\n", kv_plain(j->id).s,
           j->n_prompt, j->n_token - j->n_prompt, p->info.n_layer, kv_record_name(q->level), kv_dtype_name(q->dtype));
    for (int s = 0; s < 32; s++)
        if (p->raw[s]) printf("  %-12s %15llu\n", kv_stream_name((kv_stream)s), (unsigned long long)p->raw[s]);
    printf("  %-12s %15llu\n", "total", (unsigned long long)p->total);
    if (p->wo_side) printf("  and %llu of W_O once in a side file\n", (unsigned long long)p->wo_bytes);
    if (j->n_greedy) printf("  and the text of %u generated tokens\n", j->n_greedy);
}

static json_t *plan_json(const kv_capture_plan *p, const kv_job *j)
{
    json_t *raw = json_object();
    for (int s = 0; s < 32; s++)
        if (p->raw[s]) json_object_set_new(raw, kv_stream_name((kv_stream)s), json_integer((json_int_t)p->raw[s]));
    return json_pack("{s:s,s:i,s:i,s:i,s:s,s:s,s:o,s:I,s:I}", "id", j->id, "prompt_tokens", (int)j->n_prompt,
                     "decode_tokens", (int)(j->n_token - j->n_prompt), "layers", (int)p->info.n_layer, "record",
                     p->info.record, "dtype", kv_dtype_name(p->info.dtype), "bytes", raw, "total", (json_int_t)p->total,
                     "wo_side_bytes", (json_int_t)(p->wo_side ? p->wo_bytes : 0));
}

/* ------------------------------------------------------------------------------------------------ run */
typedef struct {
    const options *o;
    request r;
    kv_model *light, *full; /* without and with weights; the second is opened when the first job needs it */
    kv_prompts set;
    bool *keep;
    size_t n_keep;
    bool folder;  /* -o is a folder */
    json_t *list; /* --json: what was planned or done, a prompt each */
    bool warned;
    uint32_t n_done, n_skipped;
} batch;

/* On a device the default is what it computes in: as the file has its weights, else f16, which holds more digits. */
static kv_status open_light(batch *b, kv_error *err)
{
    kv_capture_request *q = &b->r.q;
    kv_status st = kv_model_open(b->o->model, KV_WEIGHTS_NONE, q->threads, &b->light, err);
    if (st || b->o->dtype) return st;
    const kv_tensor *t = &b->light->layer[0].wq;
    if (q->cuda && (t->random > 0 || (t->type && !strcmp(t->type->name, "BF16")))) q->dtype = KV_BF16;
    return KV_OK;
}

static kv_status need_model(batch *b, kv_error *err)
{
    kv_status st;
    if (b->full) return KV_OK;
    kv_weights w = b->r.q.cuda ? KV_WEIGHTS_STORED : KV_WEIGHTS_F32;
    if ((st = kv_model_open(b->o->model, w, b->r.q.threads, &b->full, err))) return st;
    memcpy(b->full->desc.sha256, b->light->desc.sha256, sizeof b->full->desc.sha256);
    return KV_OK;
}

static void warn_length(batch *b, const kv_job *j)
{
    const kv_model_desc *d = &b->light->desc;
    if (b->warned || !d->n_ctx || j->n_token <= d->n_ctx) return;
    fprintf(stderr, "kv-capture: warning: '%s' has %u tokens, more than the %u '%s' was made for\n", kv_plain(j->id).s,
            j->n_token, d->n_ctx, kv_plain(d->name).s);
    b->warned = true;
}

static void print_result(const kv_job *j, const char *path, const kv_capture_result *res)
{
    fprintf(stderr, "kv-capture: %s: %u tokens in %.1f s (%.0f tokens/s), ", kv_plain(j->id).s, j->n_token, res->run_s,
            res->run_s > 0 ? j->n_token / res->run_s : 0);
    print_bytes(stderr, res->raw);
    fputs(" -> ", stderr);
    print_bytes(stderr, res->stored);
    fprintf(stderr, " (%.2fx), %s\n", res->stored ? (double)res->raw / (double)res->stored : 1, kv_plain(path).s);
    const kv_engine_usage *e = &res->engine;
    if (!e->n_device) return;
    fputs("kv-capture: ", stderr);
    for (int i = 0; i < KV_STAGE_COUNT; i++)
        fprintf(stderr, "%s %.0f%%%s", kv_stage_name((kv_stage)i), 100 * res->busy[i],
                i + 1 < KV_STAGE_COUNT ? ", " : "");
    fprintf(stderr, " busy: limited by %s (%u threads compress)\n", kv_stage_name(res->limit), res->threads);
    fprintf(stderr, "kv-capture: device memory %.2f GiB: weights %.2f, cache %.2f and %.1f%% more; %u x %s\n",
            (double)e->device_bytes / 0x1p30, (double)e->weight_bytes / 0x1p30, (double)e->cache_bytes / 0x1p30,
            100 * ((double)e->device_bytes / (double)(e->weight_bytes + e->cache_bytes) - 1), e->n_device, e->device);
}

static json_t *result_json(const kv_job *j, const char *path, const kv_capture_result *res)
{
    const kv_engine_usage *e = &res->engine;
    json_t *busy = json_object();
    for (int i = 0; i < KV_STAGE_COUNT; i++)
        json_object_set_new(busy, kv_stage_name((kv_stage)i), json_real(res->busy[i]));
    return json_pack("{s:s,s:s,s:i,s:f,s:f,s:f,s:I,s:I,s:o,s:s,s:i,s:{s:s,s:s,s:i,s:I,s:I,s:I,s:I}}", "id", j->id,
                     "path", path, "tokens", (int)j->n_token, "seconds", res->run_s, "model_seconds", res->model_s,
                     "load_seconds", res->load_s, "raw_bytes", (json_int_t)res->raw, "stored_bytes",
                     (json_int_t)res->stored, "busy", busy, "limited_by",
                     e->backend ? kv_stage_name(res->limit) : "disk", "threads", (int)res->threads, "engine", "backend",
                     e->backend ? e->backend : "none", "device", e->device, "devices", (int)e->n_device, "weight_bytes",
                     (json_int_t)e->weight_bytes, "cache_bytes", (json_int_t)e->cache_bytes, "device_bytes",
                     (json_int_t)e->device_bytes, "device_used_bytes", (json_int_t)e->device_used);
}

static kv_status run_job(batch *b, kv_job *j, kv_error *err)
{
    const kv_capture_request *q = &b->r.q;
    kv_capture_result res;
    kv_capture_plan p;
    char *path = NULL;
    kv_status st = kv_capture_plan_open(b->light, q, j, &p, err);

    if (st) return st;
    if (b->o->dry_run) {
        if (b->list)
            json_array_append_new(b->list, plan_json(&p, j));
        else
            print_plan(&p, j, q);
        goto out;
    }
    path = b->folder ? kv_format("%s/%s.kvt", b->o->output, j->id) : kv_format("%s", b->o->output);
    if (!path) {
        st = kv_fail(err, KV_ENOMEM, "out of memory for a path");
        goto out;
    }
    if (b->o->prompts && kv_capture_plan_done(&p, j, path)) {
        b->n_skipped++;
        goto out;
    }
    if (q->map_full) {
        fprintf(stderr, "kv-capture: %s: ", kv_plain(j->id).s);
        print_bytes(stderr, p.total);
        fputs(" before compression, ", stderr);
        print_bytes(stderr, p.raw[KV_S_MAP]);
        fputs(" of it attention maps\n", stderr);
    }
    if (p.total > b->o->max_bytes) {
        st = kv_fail(err, KV_EUNSUPPORTED,
                     "the trace of '%s' would have %.3g bytes before compression, more than --max-bytes %.3g", j->id,
                     (double)p.total, (double)b->o->max_bytes);
        goto out;
    }
    warn_length(b, j);
    if ((st = need_model(b, err)) || (st = kv_capture_plan_run(&p, b->full, q, j, path, &res, err))) goto out;
    print_result(j, path, &res);
    if (b->list) json_array_append_new(b->list, result_json(j, path, &res));
    b->n_done++;
out:
    free(path);
    kv_capture_plan_close(&p);
    return st;
}

static kv_status run_prompt(batch *b, kv_prompt *p, kv_error *err)
{
    kv_job j = {0};
    kv_status st = kv_prompt_load(p, err);
    if (st) return st;
    kv_job_options o = {.special = b->o->special, .decode = b->o->decode};
    if (b->o->chat && b->light->tok) st = kv_chat_find(b->o->chat, b->light->tok, &o.chat, err);
    if (!st) st = kv_job_from_prompt(b->light, p, &o, &j, err);
    kv_prompt_unload(p);
    if (!st) st = run_job(b, &j, err);
    kv_job_free(&j);
    return st;
}

static kv_status check_options(const options *o, const kv_list *rest, kv_error *err)
{
    int inputs = !!o->text + !!o->file + !!o->tokens + !!o->prompts;
    if (rest->n) return kv_fail(err, KV_EMISUSE, "unexpected argument '%s'", rest->v[0]);
    if (!o->model) return kv_fail(err, KV_EMISUSE, "no model: give --model FILE");
    if (inputs != 1)
        return kv_fail(err, KV_EMISUSE, "%s: give one of --text, --file, --tokens, --prompts",
                       inputs ? "more than one input" : "nothing to run");
    if (!o->output && !o->dry_run) return kv_fail(err, KV_EMISUSE, "no output: give -o FILE or -o FOLDER");
    if (o->shard && !o->prompts) return kv_fail(err, KV_EMISUSE, "--shard needs --prompts");
    if (o->only && !o->prompts) return kv_fail(err, KV_EMISUSE, "--only needs --prompts");
    if (o->prompt_tokens && !o->tokens) return kv_fail(err, KV_EMISUSE, "--prompt-tokens needs --tokens");
    if (o->chat && o->tokens) return kv_fail(err, KV_EMISUSE, "--chat is for text, not for --tokens");
    if (o->special && o->tokens) return kv_fail(err, KV_EMISUSE, "--special is for text, not for --tokens");
    return KV_OK;
}

/* The set, what of it is wanted, that every text of it is sound, and where the traces go. */
static kv_status prepare(batch *b, kv_error *err)
{
    const options *o = b->o;
    struct stat sb;
    kv_status st = o->prompts ? kv_prompts_read(o->prompts, &b->set, err) : single_prompt(o, &b->set, err);

    if (st || (st = kv_array(&b->keep, b->set.n, sizeof *b->keep, err)) ||
        (st = pick(&b->set, o->only, o->shard, b->keep, err)))
        return st;
    for (size_t i = 0; i < b->set.n; i++) {
        if (!b->keep[i]) continue;
        b->n_keep++;
        if ((st = kv_prompt_load(&b->set.v[i], err))) return st;
        kv_prompt_unload(&b->set.v[i]);
    }
    if (o->logits && b->n_keep > 1)
        return kv_fail(err, KV_EMISUSE, "--logits takes one prompt, not %zu: pick one with --only", b->n_keep);
    if (o->dry_run) return KV_OK;
    size_t n = strlen(o->output);
    bool file = (!stat(o->output, &sb) && !S_ISDIR(sb.st_mode)) || (n > 4 && !strcmp(o->output + n - 4, ".kvt"));
    b->folder = is_folder(o->output) || (o->prompts && !(file && b->n_keep == 1));
    return b->folder ? make_folder(o->output, err) : KV_OK;
}

static kv_status run_batch(batch *b, kv_error *err)
{
    const options *o = b->o;
    kv_status st = KV_OK;

    if (o->tokens) {
        kv_job j = {0};
        if (!o->dry_run) b->folder = is_folder(o->output);
        if ((st = open_light(b, err))) return st;
        if (!o->dry_run && (st = kv_model_hash(b->light, err))) return st;
        st = kv_job_from_tokens(b->light, o->tokens, o->prompt_tokens, o->decode, &j, err);
        if (!st) st = run_job(b, &j, err);
        kv_job_free(&j);
        return st;
    }
    if ((st = prepare(b, err)) || (st = open_light(b, err))) return st;
    if (!o->dry_run && (st = kv_model_hash(b->light, err))) return st;
    for (size_t i = 0; i < b->set.n && !st; i++) {
        if (!b->keep[i]) continue;
        if (kv_interrupted())
            st = kv_fail(err, KV_EINTERRUPTED, "stopped by a signal; the same command goes on");
        else
            st = run_prompt(b, &b->set.v[i], err);
    }
    if (o->prompts && !o->dry_run && b->n_keep > 1)
        fprintf(stderr, "kv-capture: %u captured, %u finished before, %zu to do\n", b->n_done, b->n_skipped,
                b->n_keep - b->n_done - b->n_skipped);
    else if (b->n_skipped)
        fprintf(stderr, "kv-capture: finished before, nothing to do\n");
    return st;
}

static kv_status cmd_run(const options *o, const kv_list *rest, kv_error *err)
{
    batch b = {.o = o};
    kv_status st = check_options(o, rest, err);

    if (!st) st = parse_request(o, &b.r, err);
    if (!st && o->json && !(b.list = json_array())) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st) st = run_batch(&b, err);
    if (!st && b.list) {
        if (!kv_json_print(stdout, b.list, JSON_INDENT(1))) st = kv_fail(err, KV_ENOMEM, "out of memory");
    }
    json_decref(b.list);
    kv_engine_close(b.r.engine);
    kv_prompts_free(&b.set);
    free(b.keep), free(b.r.layer), free(b.r.logit_row);
    kv_model_close(b.light), kv_model_close(b.full);
    return st;
}

/* ------------------------------------------------------------------------------------------------ info, tokenize */
static kv_status cmd_info(const options *o, const kv_list *rest, kv_error *err)
{
    kv_model *m = NULL;
    kv_status st;

    if (rest->n) return kv_fail(err, KV_EMISUSE, "unexpected argument '%s'", rest->v[0]);
    if (!o->model) return kv_fail(err, KV_EMISUSE, "no model: give --model FILE");
    if ((st = kv_model_open(o->model, KV_WEIGHTS_NONE, kv_cpu_count(), &m, err)) || (st = kv_model_hash(m, err)))
        goto out;
    const kv_model_desc *d = &m->desc;
    const char *tok = m->tok ? kv_tokenizer_describe(m->tok) : "none: give prompts with --tokens";
    const kv_rope_freqs *rope = kv_model_rope(d);
    double theta = rope ? (double)rope->theta : 0;
    static const char *const norms[] = {"rms", "layer"}, *const qk_norms[] = {"none", "head", "all"};
    static const char *const acts[] = {"silu", "gelu_tanh", "gelu"};
    uint32_t windowed = 0;
    for (uint32_t l = 0; l < d->n_layer; l++) windowed += d->window[l] != 0;
    if (o->json) {
        json_t *window = json_array();
        for (uint32_t l = 0; l < d->n_layer; l++) json_array_append_new(window, json_integer(d->window[l]));
        json_t *j = json_pack(
            "{s:s,s:s,s:s,s:s,s:s,s:I,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:f,s:f,s:i,s:f,s:f,s:f,s:o,s:b,"
            "s:s,s:s,s:b,s:b,s:s,s:b,s:i,s:i,s:s?}",
            "model", d->name, "architecture", d->arch, "file", d->file, "sha256", d->sha256, "tensors", d->quant,
            "parameters", (json_int_t)d->n_params, "layers", (int)d->n_layer, "q_heads", (int)d->n_q_head, "kv_heads",
            (int)d->n_kv_head, "head_dim", (int)d->head_dim, "hidden", (int)d->hidden, "ffn", (int)d->ffn, "vocabulary",
            (int)d->n_vocab, "context", (int)d->n_ctx, "norm_eps", (double)d->norm_eps, "rope_theta", theta, "rope_dim",
            (int)d->rope_dim, "scale", (double)d->scale, "softcap", (double)d->softcap, "final_softcap",
            (double)d->final_softcap, "window", window, "tied", (int)d->tied, "norm", norms[d->norm], "activation",
            acts[d->act], "gated", (int)d->gated, "parallel", (int)d->parallel, "qk_norm", qk_norms[d->qk_norm],
            "post_norm", (int)d->post_norm, "experts", (int)d->n_expert, "experts_used", (int)d->n_expert_used,
            "tokenizer", m->tok ? tok : NULL);
        if (!j) {
            st = kv_fail(err, KV_EFORMAT, "model '%s': its name is not UTF-8", o->model);
            goto out;
        }
        if (!kv_json_print(stdout, j, JSON_INDENT(1))) st = kv_fail(err, KV_ENOMEM, "out of memory");
        json_decref(j);
        goto out;
    }
    printf("model        %s (%s), %s\n", kv_plain(d->name).s, kv_plain(d->arch).s, kv_plain(d->file).s);
    printf("sha256       %s\n", d->sha256);
    printf("parameters   %.1f M: %s\n", (double)d->n_params / 1e6, d->quant);
    printf("shape        %u layers, %u query heads on %u KV heads of %u, hidden %u, feed-forward %u\n", d->n_layer,
           d->n_q_head, d->n_kv_head, d->head_dim, d->hidden, d->ffn);
    printf("context      %u tokens, rope theta %g over %u of %u elements\n", d->n_ctx, theta, d->rope_dim, d->head_dim);
    printf("attention    scale %g, softcap %g, %u of %u layers with a sliding window\n", (double)d->scale,
           (double)d->softcap, windowed, d->n_layer);
    printf("block        %s norm%s%s, %s%s%s", norms[d->norm], d->post_norm ? ", and behind each part" : "",
           d->qk_norm ? ", and of queries and keys" : "", acts[d->act], d->gated ? " gated" : "",
           d->parallel ? ", attention and feed-forward in parallel" : "");
    if (d->n_expert) printf(", %u of %u experts", d->n_expert_used, d->n_expert);
    putchar('\n');
    printf("vocabulary   %u tokens%s; %s\n", d->n_vocab, d->tied ? ", output tied to it" : "", kv_plain(tok).s);
    printf("KV cache     %zu bytes a token at f16\n", (size_t)4 * d->n_layer * d->n_kv_head * d->head_dim);
out:
    kv_model_close(m);
    return st;
}

/* As on a terminal, and a backslash doubled: what is shown can be read back. */
static void print_escaped(const char *s, size_t n)
{
    for (size_t i = 0, len; i < n; i += len + (i + len < n)) {
        const char *slash = memchr(s + i, '\\', n - i);
        len = slash ? (size_t)(slash - s) - i : n - i;
        kv_put_plain(stdout, s + i, len);
        if (slash) fputs("\\\\", stdout);
    }
}

static kv_status cmd_tokenize(const options *o, const kv_list *rest, kv_error *err)
{
    kv_model *m = NULL;
    kv_tokens t = {0};
    kv_prompt turn = {0};
    uint8_t *bytes = NULL;
    size_t n = o->text ? strlen(o->text) : 0;
    kv_error why;
    kv_status st;

    if (rest->n) return kv_fail(err, KV_EMISUSE, "unexpected argument '%s'", rest->v[0]);
    if (!o->model) return kv_fail(err, KV_EMISUSE, "no model: give --model FILE");
    if (!o->text == !o->file)
        return kv_fail(err, KV_EMISUSE, "%s: give --text or --file",
                       o->text ? "both --text and --file" : "nothing to tokenize");
    if (o->file && (st = kv_read_file(o->file, TEXT_MAX, &bytes, &n, err))) return st;
    if ((st = kv_model_open(o->model, KV_WEIGHTS_NONE, kv_cpu_count(), &m, err))) goto out;
    if (!m->tok) {
        st = kv_fail(err, KV_EMISSING, "model '%s' has no vocabulary", o->model);
        goto out;
    }
    kv_tokenize_options as = {.special = o->special};
    kv_prompt text = {.text = bytes ? (char *)bytes : (char *)o->text, .n_text = n, .prompt_end = n}, *p = &text;
    text.context_end = SIZE_MAX;
    if (o->chat) {
        const kv_chat *chat;
        if ((st = kv_chat_find(o->chat, m->tok, &chat, err)) ||
            (st = kv_chat_wrap(chat, &text, &turn, &as.literal_at, &as.literal_n, err)))
            goto out;
        if (o->special) as.literal_n = 0;
        as.special = true, as.bos = chat->bos, p = &turn;
    }
    if ((st = kv_tokenize_with(m->tok, p->text, p->n_text, &as, &t, &why))) {
        kv_fail(err, st, "cannot tokenize '%s': %s", o->file ? o->file : "--text", why.msg);
        goto out;
    }
    if (o->json) putchar('[');
    for (size_t i = 0; i < t.n; i++) {
        if (o->json) {
            printf("%s%u", i ? ", " : "", t.id[i]);
            continue;
        }
        size_t len;
        const char *s = kv_token_bytes(m->tok, t.id[i], &len);
        printf("%u\t%u\t", t.id[i], t.offset[i]);
        print_escaped(s, len);
        putchar('\n');
    }
    if (o->json) puts("]");
out:
    kv_chat_unwrap(&turn);
    kv_tokens_free(&t);
    kv_model_close(m);
    free(bytes);
    return st;
}

static kv_status cmd_prompts(const options *o, const kv_list *rest, kv_error *err)
{
    if (rest->n) return kv_fail(err, KV_EMISUSE, "unexpected argument '%s'", rest->v[0]);
    if (!o->task.kind) return kv_fail(err, KV_EMISUSE, "prompts needs --kind needle, multikey or vartrack");
    if (!o->output) return kv_fail(err, KV_EMISUSE, "prompts needs -o P.jsonl");
    return kv_tasks_write(&o->task, o->output, err);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        kv_status (*run)(const options *, const kv_list *, kv_error *);
    } command[] = {{"run", cmd_run}, {"info", cmd_info}, {"tokenize", cmd_tokenize}, {"prompts", cmd_prompts}};
    static const char *const names[] = {"run", "info", "tokenize", "prompts"};
    enum { N_COMMAND = sizeof names / sizeof *names };
    options o = {.record = "qkv", .wo = "auto", .backend = "auto"};
    bool want_help = false, want_version = false;
    kv_list rest = {0};
    kv_error err = {""};
    kv_status st;

    o.task = (kv_task_request){.count = 8, .words = 800, .depth = -1, .digits = 7, .seed = 1};
    o.decode = KV_JOB_DECODE_ALL, o.max_bytes = MAX_BYTES_DEFAULT;
    const kv_opt opts[] = {{"model", 'm', KV_OPT_STR, &o.model},
                           {"output", 'o', KV_OPT_STR, &o.output},
                           {"text", 0, KV_OPT_STR, &o.text},
                           {"file", 0, KV_OPT_STR, &o.file},
                           {"tokens", 0, KV_OPT_STR, &o.tokens},
                           {"prompt-tokens", 0, KV_OPT_U32, &o.prompt_tokens},
                           {"prompts", 0, KV_OPT_STR, &o.prompts},
                           {"only", 0, KV_OPT_STR, &o.only},
                           {"shard", 0, KV_OPT_STR, &o.shard},
                           {"special", 0, KV_OPT_FLAG, &o.special},
                           {"chat", 0, KV_OPT_STR, &o.chat},
                           {"decode", 0, KV_OPT_U32, &o.decode},
                           {"record", 0, KV_OPT_STR, &o.record},
                           {"maps", 0, KV_OPT_STR, &o.maps},
                           {"dtype", 0, KV_OPT_STR, &o.dtype},
                           {"wo", 0, KV_OPT_STR, &o.wo},
                           {"layers", 0, KV_OPT_STR, &o.layers},
                           {"backend", 0, KV_OPT_STR, &o.backend},
                           {"gpus", 0, KV_OPT_U32, &o.gpus},
                           {"threads", 0, KV_OPT_U32, &o.threads},
                           {"max-bytes", 0, KV_OPT_BYTES, &o.max_bytes},
                           {"dry-run", 0, KV_OPT_FLAG, &o.dry_run},
                           {"json", 0, KV_OPT_FLAG, &o.json},
                           {"logits", 0, KV_OPT_STR, &o.logits},
                           {"logits-rows", 0, KV_OPT_STR, &o.logits_rows},
                           {"kind", 0, KV_OPT_STR, &o.task.kind},
                           {"count", 0, KV_OPT_U32, &o.task.count},
                           {"words", 0, KV_OPT_U32, &o.task.words},
                           {"depth", 0, KV_OPT_F64, &o.task.depth},
                           {"digits", 0, KV_OPT_U32, &o.task.digits},
                           {"seed", 0, KV_OPT_U64, &o.task.seed},
                           {"help", 'h', KV_OPT_FLAG, &want_help},
                           {"version", 0, KV_OPT_FLAG, &want_version},
                           {0}};
    if ((st = kv_cli_parse(argc, argv, opts, &rest, &err))) goto out;
    if (want_help || want_version) {
        if (want_help)
            fputs(help, stdout);
        else
            kv_cli_version("kv-capture");
        goto out;
    }
    size_t c = 0;
    while (rest.n && c < N_COMMAND && strcmp(rest.v[0], command[c].name)) c++;
    if (!rest.n || c == N_COMMAND) {
        const char *near = rest.n ? kv_nearest(rest.v[0], names, N_COMMAND) : NULL;
        st = !rest.n ? kv_fail(&err, KV_EMISUSE, "no command: use run, info, tokenize or prompts")
                     : kv_fail(&err, KV_EMISUSE, "unknown command '%s'%s%s%s", rest.v[0],
                               near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "");
        goto out;
    }
    kv_catch_signals();
    st = command[c].run(&o, &(kv_list){.v = rest.v + 1, .n = rest.n - 1}, &err);
out:
    kv_list_free(&rest);
    return kv_cli_exit("kv-capture", st, &err);
}
