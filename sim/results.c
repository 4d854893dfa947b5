/* results.c - writing results.db. */
#include "sim/results.h"

#include <math.h>
#include <sqlite3.h>
#include <stdlib.h>

#include "traces/cli.h"
#include "traces/memtext.h"

static const char SCHEMA[] =
#include "sim/schema.sql.h"
    ;
enum { APPLICATION_ID = 0x4b565452, USER_VERSION = 3, BUSY_MS = 60000 };

struct kv_results {
    sqlite3 *db;
    char *path;
    sqlite3_stmt *has, *drop_metric, *drop_slots, *run, *metric, *slots;
};

static kv_status fail(kv_results *r, const char *what, kv_error *err)
{
    int code = sqlite3_errcode(r->db);
    const char *hint = code == SQLITE_BUSY   ? " (another program is writing to it; try again)"
                       : code == SQLITE_FULL ? " (disk full)"
                                             : "";
    return kv_fail(err, KV_EIO, "cannot %s results database '%s': %s%s", what, r->path, sqlite3_errmsg(r->db), hint);
}

static kv_status exec(kv_results *r, const char *sql, const char *what, kv_error *err)
{
    return sqlite3_exec(r->db, sql, NULL, NULL, NULL) == SQLITE_OK ? KV_OK : fail(r, what, err);
}

static kv_status pragma(kv_results *r, const char *name, int64_t *out, kv_error *err)
{
    sqlite3_stmt *s = NULL;
    char sql[64];
    snprintf(sql, sizeof sql, "PRAGMA %s", name);
    if (sqlite3_prepare_v2(r->db, sql, -1, &s, NULL) != SQLITE_OK || sqlite3_step(s) != SQLITE_ROW) {
        kv_status st = fail(r, "read", err);
        sqlite3_finalize(s);
        return st;
    }
    *out = sqlite3_column_int64(s, 0);
    sqlite3_finalize(s);
    return KV_OK;
}

static kv_status prepare(kv_results *r, const char *sql, sqlite3_stmt **s, kv_error *err)
{
    return sqlite3_prepare_v3(r->db, sql, -1, SQLITE_PREPARE_PERSISTENT, s, NULL) == SQLITE_OK ? KV_OK
                                                                                               : fail(r, "write", err);
}

kv_status kv_results_open(const char *path, kv_results **out, kv_error *err)
{
    kv_status st = KV_OK;
    kv_results *r = calloc(1, sizeof *r);
    int64_t app, version, pages;
    *out = NULL;
    if (!r || !(r->path = kv_format("%s", path))) {
        free(r);
        return kv_fail(err, KV_ENOMEM, "out of memory");
    }
    if (sqlite3_open_v2(path, &r->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, NULL) != SQLITE_OK) {
        st = fail(r, "open", err);
        goto out;
    }
    sqlite3_extended_result_codes(r->db, 0);
    sqlite3_busy_timeout(r->db, BUSY_MS);
    st = exec(r, "PRAGMA foreign_keys = ON; BEGIN IMMEDIATE", "open", err); /* one process makes the tables */
    if (!st) st = pragma(r, "application_id", &app, err);
    if (!st) st = pragma(r, "user_version", &version, err);
    if (!st) st = pragma(r, "page_count", &pages, err);
    if (st) goto out;
    if (app == 0 && version == 0 && pages <= 1) {
        sqlite3_stmt *any = NULL;
        st = prepare(r, "SELECT count(*) FROM sqlite_schema", &any, err);
        bool empty = !st && sqlite3_step(any) == SQLITE_ROW && sqlite3_column_int(any, 0) == 0;
        sqlite3_finalize(any);
        if (!st && !empty)
            st = kv_fail(err, KV_EFORMAT, "'%s' is an SQLite database of something else; choose another --db", path);
        if (!st) st = exec(r, SCHEMA, "create", err);
    } else if (app != APPLICATION_ID) {
        st = kv_fail(err, KV_EFORMAT, "'%s' is an SQLite database of something else; choose another --db", path);
    } else if (version != USER_VERSION) {
        st = kv_fail(err, KV_EFORMAT,
                     "results database '%s' has schema %lld, this program writes schema %d; choose another --db", path,
                     (long long)version, USER_VERSION);
    }
    if (!st) st = exec(r, "COMMIT", "create", err);
    if (!st) st = prepare(r, "SELECT detail, wanted FROM run WHERE run_id = ?1", &r->has, err);
    if (!st) st = prepare(r, "DELETE FROM metric WHERE run = ?1 AND metric_id = ?2", &r->drop_metric, err);
    if (!st) st = prepare(r, "DELETE FROM slots WHERE run = ?1", &r->drop_slots, err);
    if (!st)
        st = prepare(
            r,
            "INSERT INTO run (run_id, trace_id, policy, spec, verified, budget, budget_tokens, budget_frac, "
            "granularity, page, cut, protect, rows, kept_slots, kept_bytes, mean_bytes, peak_bytes, nominal_bytes, "
            "full_bytes, prefill_bytes, read_bytes, matched_tokens, overspent, seed, detail, wanted, build, wall_s, "
            "base, corner, target, oracle) VALUES "
            "(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16,?17,?18,?19,?20,"
            "?21,?22,?23,?24,?25,?26,?27,?28,?29,?30,?31,?32) ON CONFLICT (run_id) DO UPDATE SET "
            "detail = iif(wanted & ~excluded.wanted, min(detail, excluded.detail), excluded.detail), "
            "wanted = wanted | excluded.wanted, build = excluded.build, wall_s = excluded.wall_s RETURNING id",
            &r->run, err);
    if (!st) st = prepare(r, "INSERT INTO metric VALUES (?1,?2,?3,?4,?5,?6,?7)", &r->metric, err);
    if (!st) st = prepare(r, "INSERT INTO slots VALUES (?1,?2,?3,?4,?5,?6)", &r->slots, err);
out:
    if (st)
        kv_results_close(r);
    else
        *out = r;
    return st;
}

void kv_results_close(kv_results *r)
{
    if (!r) return;
    sqlite3_finalize(r->has), sqlite3_finalize(r->drop_metric), sqlite3_finalize(r->drop_slots),
        sqlite3_finalize(r->run);
    sqlite3_finalize(r->metric), sqlite3_finalize(r->slots);
    sqlite3_close(r->db);
    free(r->path);
    free(r);
}

kv_status kv_results_begin(kv_results *r, kv_error *err)
{
    return exec(r, "BEGIN IMMEDIATE", "write to", err);
}

kv_status kv_results_commit(kv_results *r, kv_error *err)
{
    kv_status st = kv_text_lost() ? kv_fail(err, KV_ENOMEM, "out of memory: nothing written to '%s'", r->path)
                                  : exec(r, "COMMIT", "write to", err);
    if (st) kv_results_rollback(r);
    return st;
}

void kv_results_rollback(kv_results *r)
{
    sqlite3_exec(r->db, "ROLLBACK", NULL, NULL, NULL);
}

kv_status kv_results_has(kv_results *r, const char *run_id, int detail, kv_metric_set wanted, bool *has, kv_error *err)
{
    sqlite3_bind_text(r->has, 1, run_id, -1, SQLITE_STATIC);
    int code = sqlite3_step(r->has);
    *has = code == SQLITE_ROW && sqlite3_column_int(r->has, 0) >= detail &&
           ((kv_metric_set)sqlite3_column_int64(r->has, 1) & wanted) == wanted;
    sqlite3_reset(r->has);
    return code == SQLITE_ROW || code == SQLITE_DONE ? KV_OK : fail(r, "read", err);
}

static void text(sqlite3_stmt *s, int i, const char *v)
{
    sqlite3_bind_text(s, i, v, -1, SQLITE_TRANSIENT);
}

static kv_status step(kv_results *r, sqlite3_stmt *s, kv_error *err)
{
    int code = sqlite3_step(s);
    kv_status st = code == SQLITE_DONE || code == SQLITE_ROW ? KV_OK : fail(r, "write to", err);
    sqlite3_reset(s);
    return st;
}

kv_status kv_results_trace(kv_results *r, const kv_trace *t, const kv_scene *sc, int64_t *trace_id, kv_error *err)
{
    const kv_trace_info *in = sc->info;
    const char *path = kv_trace_path(t), *base = strrchr(path, '/');
    char *name = kv_format("%s", base ? base + 1 : path), *layers = kv_format("%s", "");
    sqlite3_stmt *s = NULL;
    kv_status st = name && layers ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory");
    size_t n = name ? strlen(name) : 0;
    if (n > 4 && !strcmp(name + n - 4, ".kvt")) name[n - 4] = 0;
    for (uint32_t l = 0; l < in->n_layer && !st; l++) {
        char *more = kv_format("%s%s%u", layers, l ? "+" : "", in->layer[l]);
        free(layers);
        if (!(layers = more)) st = kv_fail(err, KV_ENOMEM, "out of memory");
    }
    if (!st)
        st = prepare(
            r,
            "INSERT INTO trace (sha256, name, model, arch, prompt, category, prompt_tokens, decode_tokens, layers, "
            "q_heads, kv_heads, head_dim) VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12) ON CONFLICT (sha256) DO "
            "UPDATE SET "
            "name = name RETURNING trace_id",
            &s, err);
    if (!st) {
        text(s, 1, kv_trace_content_sha256(t)), text(s, 2, name), text(s, 3, in->model), text(s, 4, in->arch);
        text(s, 5, in->prompt_id ? in->prompt_id : name), text(s, 6, in->category ? in->category : "");
        sqlite3_bind_int64(s, 7, in->n_prompt), sqlite3_bind_int64(s, 8, in->n_token - in->n_prompt);
        text(s, 9, layers);
        sqlite3_bind_int64(s, 10, in->n_q_head), sqlite3_bind_int64(s, 11, in->n_kv_head),
            sqlite3_bind_int64(s, 12, in->head_dim);
        if (sqlite3_step(s) == SQLITE_ROW)
            *trace_id = sqlite3_column_int64(s, 0);
        else
            st = fail(r, "write to", err);
    }
    sqlite3_finalize(s);
    free(name), free(layers);
    return st;
}

static const char *unit_of(const kv_run *run, int m)
{
    return m == KV_M_LAYER_ERROR && run->own_output ? "relative to ||layer output||" : kv_metric_defs[m].unit;
}

/* Numbers of the metrics' names, registered on first use. */
static kv_status metric_names(kv_results *r, const kv_run *run, int64_t *id, kv_error *err)
{
    sqlite3_stmt *s = NULL;
    kv_status st =
        prepare(r,
                "INSERT INTO metric_name (name, unit, better) VALUES (?1,?2,?3) ON CONFLICT DO UPDATE SET name = name "
                "RETURNING metric_id",
                &s, err);
    for (int m = 0; m < KV_M_COUNT && !st; m++) {
        if (!(run->wanted >> m & 1)) continue;
        text(s, 1, kv_metric_defs[m].name), text(s, 2, unit_of(run, m)), text(s, 3, kv_metric_defs[m].better);
        if (sqlite3_step(s) == SQLITE_ROW)
            id[m] = sqlite3_column_int64(s, 0);
        else
            st = fail(r, "write to", err);
        sqlite3_reset(s);
    }
    sqlite3_finalize(s);
    return st;
}

/* What run `id` holds of the metrics measured now, and its slots. */
static kv_status forget(kv_results *r, int64_t id, const kv_run *run, const int64_t *metric_id, kv_error *err)
{
    sqlite3_bind_int64(r->drop_slots, 1, id);
    kv_status st = step(r, r->drop_slots, err);
    for (int m = 0; m < KV_M_COUNT && !st; m++) {
        if (!(run->wanted >> m & 1)) continue;
        sqlite3_bind_int64(r->drop_metric, 1, id), sqlite3_bind_int64(r->drop_metric, 2, metric_id[m]);
        st = step(r, r->drop_metric, err);
    }
    return st;
}

kv_status kv_results_put(kv_results *r, int64_t trace_id, const kv_run *run, kv_error *err)
{
    char protect[64] = "none";
    sqlite3_stmt *s = r->run;
    int64_t metric_id[KV_M_COUNT] = {0};
    kv_status st = metric_names(r, run, metric_id, err);
    if (run->protect) snprintf(protect, sizeof protect, "%s", run->protect);
    bool old = false;
    if (!st) st = kv_results_has(r, run->run_id, 0, 0, &old, err);
    if (st) return st;
    text(s, 1, run->run_id), sqlite3_bind_int64(s, 2, trace_id), text(s, 3, run->spec->row->name);
    text(s, 4, run->spec->canonical), text(s, 5, run->spec->row->verified), text(s, 6, run->budget->text);
    const kv_ledger *g = run->ledger;
    sqlite3_bind_int64(s, 7, run->nominal), sqlite3_bind_double(s, 8, run->nominal_frac), text(s, 9, run->granularity);
    sqlite3_bind_int64(s, 10, run->page), text(s, 11, run->cut), text(s, 12, protect),
        sqlite3_bind_int64(s, 13, run->rows);
    sqlite3_bind_int64(s, 14, (int64_t)g->kept_slots), sqlite3_bind_int64(s, 15, (int64_t)g->kept_bytes);
    sqlite3_bind_double(s, 16, g->mean_bytes), sqlite3_bind_int64(s, 17, (int64_t)g->peak_bytes);
    sqlite3_bind_int64(s, 18, (int64_t)g->nominal_bytes), sqlite3_bind_double(s, 19, g->full_bytes);
    sqlite3_bind_int64(s, 20, (int64_t)g->prefill_bytes), sqlite3_bind_double(s, 21, g->read_bytes);
    if (run->matched)
        sqlite3_bind_int64(s, 22, run->c.tokens);
    else
        sqlite3_bind_null(s, 22);
    sqlite3_bind_int64(s, 23, g->kept_slots > g->nominal_slots && !run->spec->keep_all),
        sqlite3_bind_int64(s, 24, (int64_t)run->seed);
    sqlite3_bind_int64(s, 25, run->detail), sqlite3_bind_int64(s, 26, (int64_t)run->wanted), text(s, 27, kv_build_id());
    sqlite3_bind_double(s, 28, run->wall_s);
    text(s, 29, run->base), text(s, 30, run->corner), text(s, 31, run->target), text(s, 32, run->oracle);
    int64_t id = 0;
    if (sqlite3_step(s) == SQLITE_ROW)
        id = sqlite3_column_int64(s, 0);
    else
        st = fail(r, "write to", err);
    sqlite3_reset(s);
    if (!st && old) st = forget(r, id, run, metric_id, err);
    for (size_t i = 0; i < run->n_value && !st; i++) {
        const kv_value *v = &run->value[i];
        sqlite3_bind_int64(r->metric, 1, id);
        sqlite3_bind_int64(r->metric, 2, metric_id[v->metric]);
        sqlite3_bind_int(r->metric, 3, v->layer), sqlite3_bind_int(r->metric, 4, v->head);
        sqlite3_bind_int(r->metric, 5, v->step);
        if (isfinite(v->value))
            sqlite3_bind_double(r->metric, 6, v->value);
        else
            sqlite3_bind_null(r->metric, 6);
        sqlite3_bind_int64(r->metric, 7, v->n);
        st = step(r, r->metric, err);
    }
    for (uint32_t l = 0; l < run->n_layer && !st; l++)
        for (uint32_t u = 0; u < run->n_unit && !st; u++) {
            uint32_t k = run->counts[(size_t)l * run->n_unit + u];
            sqlite3_bind_int64(r->slots, 1, id), sqlite3_bind_int64(r->slots, 2, run->number[l]);
            sqlite3_bind_int64(r->slots, 3, u), sqlite3_bind_int64(r->slots, 4, k);
            sqlite3_bind_int64(r->slots, 5, (int64_t)(k * run->ledger->entry_bytes));
            sqlite3_bind_double(r->slots, 6, run->ledger->unit_read[(size_t)l * run->n_unit + u]);
            st = step(r, r->slots, err);
        }
    return st;
}
