/* tr_verify.c - kv-trace verify and recover. */
#include "traces/json.h"
#include "traces/plain.h"
#include "traces/tr.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/stat.h>

/* --------------------------------------------------------------------------------------------- verify */
static kv_status verify_one(const char *path, bool deep, kvt_checked *c, kv_error *err)
{
    kv_trace *t = NULL;
    kv_status st = kv_trace_open(path, &t, err);
    if (!st) st = kvt_verify(t, deep, c, err);
    kv_trace_close(t);
    return st;
}

static kv_status run_verify(int argc, char **argv, int *code, kv_error *err)
{
    bool deep = false, json = false;
    kv_list rest = {0};
    const kv_opt opts[] = {{"deep", 0, KV_OPT_FLAG, &deep}, {"json", 0, KV_OPT_FLAG, &json}, {0}};
    kv_status st = tr_parse(argc, argv, opts, &rest, 1, SIZE_MAX, err);
    json_t *all = json_array();
    size_t bad = 0;
    for (size_t i = 0; !st && i < rest.n; i++) {
        kvt_checked c = {0};
        kv_error why = {""};
        kv_status one = verify_one(rest.v[i], deep, &c, &why);
        if (one == KV_EINTERRUPTED || one == KV_ENOMEM) { /* says nothing about the trace */
            st = one;
            if (err) *err = why;
            break;
        }
        bad += one != KV_OK;
        if (json) {
            json_t *o = json_pack("{s:s,s:b,s:I,s:I,s:I}", "path", rest.v[i], "ok", one == KV_OK, "chunks",
                                  (json_int_t)c.chunks, "stored_bytes", (json_int_t)c.bytes, "rows_recomputed",
                                  (json_int_t)c.rows);
            if (one) json_object_set_new(o, "error", json_string(why.msg));
            if (c.note[0]) json_object_set_new(o, "note", json_string(c.note));
            json_array_append_new(all, o);
        } else if (one) {
            fflush(stdout);
            fprintf(stderr, "kv-trace verify: %s\n", kv_plain(why.msg).s);
        } else {
            printf("%s: ok, %" PRIu64 " chunks, %" PRIu64 " bytes", kv_plain(rest.v[i]).s, c.chunks, c.bytes);
            if (deep) printf(", all decoded, %" PRIu64 " rows recomputed", c.rows);
            printf("%s%s\n", c.note[0] ? "; note: " : "", c.note);
        }
    }
    if (json && !st && !kv_json_print(stdout, all, JSON_INDENT(2))) st = kv_fail(err, KV_ENOMEM, "out of memory");
    json_decref(all);
    kv_list_free(&rest);
    *code = bad ? 1 : 0;
    return st;
}

const tr_command tr_verify = {
    "verify", "are these traces whole",
    "usage: kv-trace verify TRACE.. [--deep] [--json]\n\n"
    "Checks the checksum of every chunk and that every byte belongs to something. --deep also decodes everything and\n"
    "checks that values are finite, that column sums add up to the number of prompt rows, that recomputed rows of\n"
    "attention (a sample) add up to one, and the hash of the W_O side file. Exit 1 when any trace is not whole.\n\n"
    "  kv-trace verify a.kvt b.kvt\n"
    "  kv-trace verify --deep a.kvt\n",
    run_verify};

/* -------------------------------------------------------------------------------------------- recover */
static kv_status run_recover(int argc, char **argv, int *code, kv_error *err)
{
    kv_list rest = {0};
    const kv_opt opts[] = {{0}};
    kv_trace *t = NULL;
    kvt_damage d;
    kvt_part part = {0};
    kvt_checked c = {0};
    uint32_t layers = 0, tokens = 0;
    char *fresh = NULL;
    struct stat sb;
    kv_status st = tr_parse(argc, argv, opts, &rest, 2, 2, err);
    if (st) goto out;
    if (!stat(rest.v[1], &sb) && !S_ISREG(sb.st_mode)) {
        st = kv_fail(err, KV_EMISUSE, "cannot recover to '%s': not a regular file", rest.v[1]);
        goto out;
    }
    if (!(fresh = kv_format("%s.recovered", rest.v[1]))) {
        st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    /* Not OUT.partial, which may well be IN; and OUT only once it has been read back: a recovery that cannot be read
     * again is none. */
    if ((st = kvt_salvage(rest.v[0], &t, &d, err)) || (st = kvt_consistent(t, &part, &layers, &tokens, err)) ||
        (st = kvt_copy(t, &part, fresh, tr_threads(), err)))
        goto out;
    if ((st = verify_one(fresh, true, &c, err))) {
        remove(fresh);
        goto out;
    }
    if (rename(fresh, rest.v[1])) {
        st = kv_fail(err, KV_EIO, "cannot write '%s': %s", rest.v[1], strerror(errno));
        remove(fresh);
        goto out;
    }
    bool ids = kv_trace_has(t, KV_S_TOKENS, 0, 0, 0, part.n_token);
    bool lost = d.bad_chunks || layers || tokens || !ids || !d.ended;
    printf("%s: %u of %u layers, %u of %u tokens, %" PRIu64 " chunks%s\n", kv_plain(rest.v[1]).s, part.n_layer,
           t->info.n_layer, part.n_token, t->info.n_token, c.chunks, lost ? "" : ", nothing lost");
    if (lost)
        printf("lost: %" PRIu64 " chunks damaged or missing, %u layers and %u tokens incomplete%s, %" PRIu64
               " bytes unreadable%s\n",
               d.bad_chunks, layers, tokens, ids ? "" : ", token ids", d.bad_bytes,
               d.finished ? "" : " (the writer had not finished)");
    *code = lost ? 3 : 0;
out:
    free(part.layer);
    free(fresh);
    kv_trace_close(t);
    kv_list_free(&rest);
    return st;
}

const tr_command tr_recover = {"recover", "save what can be read of a damaged or unfinished trace",
                               "usage: kv-trace recover IN OUT\n\n"
                               "Scans IN (a .kvt or a .kvt.partial), leaves out layers and trailing tokens that are "
                               "not complete, writes the rest\n"
                               "to OUT and verifies it. Exit: 0 everything was recovered, 3 something was lost (it "
                               "says what), 1 nothing usable.\n\n"
                               "  kv-trace recover a.kvt.partial a.kvt\n"
                               "  kv-trace recover damaged.kvt saved.kvt\n",
                               run_recover};
