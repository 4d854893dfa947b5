/* kept.c - kv-sim keep, then its mask: uint8 [layers][1, KV heads or query heads][P or N]. */
#include "analyze/kept.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "analyze/spawn.h"
#include "traces/npy.h"

kv_status kv_kept_load(const kv_trace *t, const char *policy, const char *budget, kv_kept *out, kv_error *err)
{
    const char *tmp = getenv("TMPDIR");
    char *dir = kv_format("%s/kv-analyze-XXXXXX", tmp && *tmp ? tmp : "/tmp"), *npy = NULL, *sim = NULL, *said = NULL;
    char *exe = kv_exe_folder(), *trace = realpath(kv_trace_path(t), NULL);
    const kv_trace_info *i = kv_trace_get_info(t);
    kv_npy a = {0};
    int code = 0;
    bool made = dir && mkdtemp(dir);
    kv_status st = made ? KV_OK : kv_fail(err, KV_EIO, "cannot make a folder for the kept set: %s", strerror(errno));
    *out = (kv_kept){0};
    if (!st && (!exe || !trace || !(sim = kv_format("%s/kv-sim", exe)) || !(npy = kv_format("%s/kept.npy", dir))))
        st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (st) goto out;
    const char *const argv[] = {sim, "keep", trace, "-p", policy, "-b", budget, "-o", npy, "--mask", NULL};
    st = kv_spawn(argv, NULL, &code, &said, err);
    if (st == KV_EMISSING) st = kv_fail(err, KV_EMISSING, "cannot find '%s', which computes what is kept", sim);
    if (!st && code) {
        said[strcspn(said, "\n")] = 0;
        st = kv_fail(err, KV_EIO, "cannot compute what '%s' keeps at budget '%s': %s", policy, budget,
                     *said ? said : "kv-sim keep failed");
    }
    if (st || (st = kv_npy_read(npy, &a, err))) goto out;
    size_t heads = a.rank == 3 ? a.shape[1] : 0, tokens = a.rank == 3 ? a.shape[2] : 0, n;
    if (a.size != 1 || a.rank != 3 || a.shape[0] != i->n_layer || (tokens != i->n_prompt && tokens != i->n_token) ||
        (heads != 1 && heads != i->n_kv_head && heads != i->n_q_head) || !kv_mul(i->n_layer * heads, tokens, &n)) {
        st = kv_fail(err, KV_EFORMAT, "cannot use the kept set of '%s': its shape does not fit the trace", policy);
        goto out;
    }
    if ((st = kv_array(&out->kept, n, 1, err))) goto out;
    memcpy(out->kept, a.data, n);
    out->n_head = (uint32_t)heads, out->n_token = tokens;
out:
    if (npy) unlink(npy);
    if (made) rmdir(dir);
    kv_npy_free(&a);
    free(dir), free(npy), free(sim), free(said), free(exe), free(trace);
    return st;
}

void kv_kept_free(kv_kept *k)
{
    free(k->kept);
    *k = (kv_kept){0};
}

const uint8_t *kv_kept_row(const kv_kept *k, const kv_trace_info *i, uint32_t layer_index, uint32_t q_head)
{
    size_t unit = k->n_head == 1 ? 0 : k->n_head == i->n_q_head ? q_head : q_head / (i->n_q_head / i->n_kv_head);
    return k->kept + ((size_t)layer_index * k->n_head + unit) * k->n_token;
}
