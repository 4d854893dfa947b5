/* model.c - opening, naming and hashing a model of either container. */
#include "capture/model.h"

#include <stdlib.h>
#include <sys/stat.h>

#include "capture/arch.h"
#include "capture/synthetic.h"
#include "capture/tokenizer.h"

/* "Q4_1 x 210, F32 x 61": tensors by type, most frequent first. */
kv_status kv_describe_tensors(kv_loader *l)
{
    uint32_t count[64] = {0};
    char text[512] = "";
    for (uint32_t i = 0; i < kv_store_count(l->m->store); i++) {
        const kv_stored *t = kv_store_at(l->m->store, i);
        count[t->quant->id]++;
        l->m->desc.n_params += t->n_row * t->ne[0]; /* at most 8 x the files' size */
    }
    for (;;) {
        uint32_t best = 0;
        for (uint32_t i = 0; i < 64; i++)
            if (count[i] > count[best]) best = i;
        if (!count[best]) break;
        size_t at = strlen(text);
        snprintf(text + at, sizeof text - at, "%s%s x %u", at ? ", " : "", kv_quant_find(best)->name, count[best]);
        count[best] = 0;
    }
    l->m->desc.quant = kv_format("%s", text);
    return l->m->desc.quant ? KV_OK : kv_fail(l->err, KV_ENOMEM, "out of memory");
}

/* general.name is often the training run's; people know a model by its file. */
kv_status kv_name_model(kv_loader *l)
{
    kv_model_desc *d = &l->m->desc;
    const char *path = kv_store_path(l->m->store), *base = path + strlen(path);
    while (base > path && base[-1] == '/') base--;
    size_t n = (size_t)(base - path);
    while (base > path && base[-1] != '/') base--;
    n -= (size_t)(base - path);
    d->file = kv_format("%.*s", (int)n, base);
    if (!d->file) return kv_fail(l->err, KV_ENOMEM, "out of memory");
    /* a file's name may be any bytes; this copy is shown and goes into JSON */
    for (size_t bad_at; (bad_at = kv_utf8_bad(d->file, strlen(d->file))) < strlen(d->file);) d->file[bad_at] = '?';
    n = strlen(d->file);
    d->name = kv_format("%.*s", (int)(n > 5 && !strcmp(d->file + n - 5, ".gguf") ? n - 5 : n), d->file);
    return d->name ? KV_OK : kv_fail(l->err, KV_ENOMEM, "out of memory");
}

kv_status kv_model_open(const char *path, kv_weights weights, uint32_t threads, kv_model **out, kv_error *err)
{
    kv_loader l = {.err = err};
    struct stat sb;
    if (kv_synthetic_named(path)) return kv_synthetic_open(path, weights, threads, out, err);
    kv_status st = kv_array(&l.m, 1, sizeof *l.m, err);
    *out = NULL;
    if (st || (st = kv_store_create(path, &l.m->store, err))) goto out;
    if (!stat(path, &sb) && S_ISDIR(sb.st_mode))
        st = kv_open_hf(&l, path);
    else
        st = kv_open_gguf(&l, path);
    if (!st && !(st = kv_load_weights(&l, weights, threads))) *out = l.m;
out:
    free(l.used);
    if (st) kv_model_close(l.m);
    return st;
}

kv_status kv_model_hash(kv_model *m, kv_error *err)
{
    uint32_t n = kv_store_files(m->store);
    kv_sha256 all;
    kv_status st = KV_OK;
    kv_sha256_init(&all);
    for (uint32_t i = 0; i < n && !st; i++) {
        st = kv_sha256_file(kv_store_file_path(m->store, i), m->desc.sha256, err);
        kv_sha256_update(&all, m->desc.sha256, 64);
    }
    if (!n) kv_synthetic_hash(m, m->desc.sha256);
    if (!st && n > 1) kv_sha256_hex(&all, m->desc.sha256);
    if (st) m->desc.sha256[0] = 0;
    return st;
}

const kv_rope_freqs *kv_model_rope(const kv_model_desc *d)
{
    if (!d->n_rope) return NULL;
    for (uint32_t l = 0; l < d->n_layer; l++)
        if (!d->window[l]) return &d->rope[d->layer_rope[l]];
    return &d->rope[d->layer_rope[0]];
}

void kv_model_close(kv_model *m)
{
    if (!m) return;
    kv_model_desc *d = &m->desc;
    kv_tokenizer_close(m->tok);
    kv_store_close(m->store);
    for (int i = 0; i < 2; i++) free(d->rope[i].inv_freq), free(d->rope[i].inv_freq_far);
    free(d->name), free(d->arch), free(d->file), free(d->quant), free(d->layer_rope), free(d->window);
    free(m->layer), free(m->ffns), free(m->arena);
    free(m);
}

uint32_t kv_model_eos(const kv_model *m)
{
    return m->tok ? kv_tokenizer_eos(m->tok) : UINT32_MAX;
}

const char *kv_model_token_bytes(const kv_model *m, uint32_t id, size_t *n)
{
    *n = 0;
    return m->tok ? kv_token_bytes(m->tok, id, n) : NULL;
}
