/* wofile.c - writing the side file (traces/trace.h: wo_sha256). */
#include "capture/wofile.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "traces/trace.h"

kv_status kv_wo_sha256(const kv_model *m, uint32_t n_layer, const uint32_t *layer, kv_dtype dtype, char sha[65],
                       kv_error *err)
{
    const kv_model_desc *d = &m->desc;
    uint32_t width = d->n_q_head * d->head_dim;
    size_t n = (size_t)d->hidden * width;
    void *raw = NULL;
    float *wo = NULL;
    kv_sha256 s;
    kv_status st = kv_array(&raw, n, kv_dtype_bytes(dtype), err);

    if (!st) st = kv_array(&wo, n, sizeof *wo, err);
    kv_sha256_init(&s);
    for (uint32_t i = 0; i < n_layer && !st; i++) {
        uint32_t l = layer[i];
        if ((st = kv_tensor_floats(m, &m->layer[l].wo, 0, d->hidden, wo, err))) break;
        if (!kv_encode_f32(dtype, wo, n, raw))
            st = kv_fail(err, KV_EUNSUPPORTED, "layer %u: W_O overflows %s: run with --dtype bf16 or f32", l,
                         kv_dtype_name(dtype));
        kv_wo_hash(&s, l, d->hidden, width, dtype, raw);
    }
    kv_sha256_hex(&s, sha);
    free(raw), free(wo);
    return st;
}

/* A side file has the metadata of a trace with one token and nothing but W_O in it. */
static kv_status write_side(const kv_model *m, uint32_t n_layer, const uint32_t *layer, kv_dtype dtype, const char *sha,
                            const char *path, uint32_t threads, kv_error *err)
{
    const kv_model_desc *d = &m->desc;
    kv_trace_info i = {.model = d->name,
                       .arch = d->arch,
                       .model_sha256 = d->sha256[0] ? (char *)d->sha256 : NULL,
                       .n_layer = n_layer,
                       .layer = (uint32_t *)layer,
                       .n_layer_model = d->n_layer,
                       .n_q_head = d->n_q_head,
                       .n_kv_head = d->n_kv_head,
                       .head_dim = d->head_dim,
                       .hidden = d->hidden,
                       .n_token = 1,
                       .n_prompt = 1,
                       .scale = d->scale,
                       .softcap = d->softcap,
                       .rope_mscale = 1,
                       .dtype = dtype,
                       .record = "tokens",
                       .wo_sha256 = (char *)sha};
    kv_trace_writer *w = NULL;
    float *wo = NULL;
    kv_status st = kv_array(&i.window, n_layer, sizeof *i.window, err);

    if (st || (st = kv_array(&wo, (size_t)d->hidden * d->n_q_head * d->head_dim, sizeof *wo, err))) goto out;
    for (uint32_t l = 0; l < n_layer; l++) i.window[l] = d->window[layer[l]];
    if ((st = kv_trace_create(path, &i, NULL, threads, &w, err))) goto out;
    for (uint32_t l = 0; l < n_layer; l++) {
        kv_chunk c = {.stream = KV_S_WO, .layer = layer[l], .head_count = 1, .token_count = d->hidden, .dtype = dtype};
        c.width = d->n_q_head * d->head_dim;
        if ((st = kv_tensor_floats(m, &m->layer[layer[l]].wo, 0, d->hidden, wo, err)) ||
            (st = kv_trace_put_f32(w, &c, wo, err)))
            goto out;
    }
    st = kv_trace_finish(w, err);
    w = NULL;
out:
    kv_trace_abandon(w);
    free(i.window), free(wo);
    return st;
}

/* Is `path` a finished side file with this hash? Fails only where memory is too short to tell. */
static kv_status is_side(const char *path, const char *sha, bool *is, kv_error *err)
{
    kv_trace *t = NULL;
    kv_status st = kv_trace_open(path, &t, err);
    const char *have = st ? NULL : kv_trace_get_info(t)->wo_sha256;
    *is = have && !strcmp(have, sha);
    kv_trace_close(t);
    return st == KV_ENOMEM ? st : KV_OK;
}

/* Captures that find it missing at the same time: on one machine they wait for the first. Shards may be on several,
 * where folders are seldom locked: each writes a file of its own, and the last one to finish replaces the equal file of
 * another. */
static kv_status place_side(const kv_model *m, uint32_t n_layer, const uint32_t *layer, kv_dtype dtype, const char *sha,
                            const char *path, const char *shard, uint32_t threads, kv_error *err)
{
    if (!shard) {
        bool there = false;
        int folder = kv_open_folder_of(path);
        if (folder >= 0) flock(folder, LOCK_EX);
        kv_status st = is_side(path, sha, &there, err);
        if (!st && !there) st = write_side(m, n_layer, layer, dtype, sha, path, threads, err);
        if (folder >= 0) close(folder);
        return st;
    }
    char *own = kv_format("%s.%.*s", path, (int)strcspn(shard, "/"), shard);
    kv_status st = own ? write_side(m, n_layer, layer, dtype, sha, own, threads, err)
                       : kv_fail(err, KV_ENOMEM, "out of memory for a path");
    if (!st && rename(own, path)) st = kv_fail(err, KV_EIO, "cannot write '%s': %s", path, strerror(errno));
    free(own);
    return st;
}

kv_status kv_wo_provide(const kv_model *m, uint32_t n_layer, const uint32_t *layer, kv_dtype dtype, const char *sha,
                        const char *trace_path, const char *file, const char *shard, uint32_t threads, kv_error *err)
{
    char *beside = kv_wo_path(trace_path, sha), *target = NULL;
    kv_status st = beside ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory for a path");

    bool there = false;
    if (st || (st = is_side(beside, sha, &there, err)) || there) goto out;
    if (!file) {
        st = place_side(m, n_layer, layer, dtype, sha, beside, shard, threads, err);
        goto out;
    }
    if ((st = is_side(file, sha, &there, err)) ||
        (!there && (st = place_side(m, n_layer, layer, dtype, sha, file, shard, threads, err))))
        goto out;
    if (!(target = realpath(file, NULL)))
        st = kv_fail(err, KV_EIO, "cannot find '%s': %s", file, strerror(errno));
    else if ((unlink(beside) && errno != ENOENT) || symlink(target, beside))
        st = kv_fail(err, KV_EIO, "cannot link '%s' to '%s': %s", beside, file, strerror(errno));
out:
    free(beside), free(target);
    return st;
}
