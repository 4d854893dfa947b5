/* merge.c - kv-analyze merge: several results databases into a new one.
 *
 *   runs     by run_id, which names everything that determines a result. One that is there already must say the same:
 *            slots and bytes exactly, metrics to TOLERANCE. The first file's numbers stay; metrics only the later one
 *            has are added to them.
 *   traces   by content; they must agree on model, prompt and shape, their file names need not
 *   builds   must be the same everywhere, unless told otherwise: a mended bug changes numbers, not run_ids
 *
 * Written beside the output and renamed at the end. */
#include <errno.h>
#include <fcntl.h>
#include <sqlite3.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "analyze/analysis.h"
#include "sim/results.h"

/* Error metrics go through a BLAS, whose order of sums depends on the machine and on how many budgets are computed at
 * once: up to 4e-9 on one machine (2026-11), 1e-6 promised between machines (design.md 6). */
#define TOLERANCE "1e-6"

typedef struct {
    sqlite3 *h;
    const char *into; /* the partial file */
    size_t fresh, known;
} merger;

static int stop_on_signal(void *unused)
{
    (void)unused;
    return kv_interrupted();
}

static kv_status sql_fail(merger *m, const char *file, kv_error *err)
{
    if ((sqlite3_errcode(m->h) & 0xff) == SQLITE_INTERRUPT)
        return kv_fail(err, KV_EINTERRUPTED, "interrupted; nothing was written");
    if ((sqlite3_errcode(m->h) & 0xff) == SQLITE_FULL)
        return kv_fail(err, KV_EIO, "cannot write '%s': disk full", m->into);
    return kv_fail(err, KV_EIO, "cannot merge '%s': %s", file, sqlite3_errmsg(m->h));
}

static kv_status run_sql(merger *m, const char *file, const char *sql, kv_error *err)
{
    return sqlite3_exec(m->h, sql, NULL, NULL, NULL) == SQLITE_OK ? KV_OK : sql_fail(m, file, err);
}

/* First column of the first row as text (malloc'd), NULL when there is no row. */
static kv_status first_text(merger *m, const char *file, const char *sql, char **out, kv_error *err)
{
    sqlite3_stmt *q = NULL;
    *out = NULL;
    int rc = sqlite3_prepare_v2(m->h, sql, -1, &q, NULL);
    if (rc == SQLITE_OK) rc = sqlite3_step(q);
    kv_status st = rc == SQLITE_ROW || rc == SQLITE_DONE ? KV_OK : sql_fail(m, file, err);
    if (rc == SQLITE_ROW && sqlite3_column_type(q, 0) != SQLITE_NULL)
        if (!(*out = strdup((const char *)sqlite3_column_text(q, 0)))) st = kv_fail(err, KV_ENOMEM, "out of memory");
    sqlite3_finalize(q);
    return st;
}

/* Refuse when the query has a row: `why` with the row's text for %s. */
static kv_status refuse_if(merger *m, const char *file, const char *sql, const char *advice, kv_error *err)
{
    char *text = NULL;
    kv_status st = first_text(m, file, sql, &text, err);
    if (!st && text) st = kv_fail(err, KV_EFORMAT, "cannot merge '%s': %s (%s)", file, text, advice);
    free(text);
    return st;
}

static const char BUILD_SQL[] =
    "SELECT printf('it was made by ''%s'', what stands before it by ''%s''', s.build, m.build)"
    " FROM src.run s, main.run m WHERE s.build <> m.build LIMIT 1";
static const char OWN_BUILD_SQL[] =
    "SELECT printf('its runs come from different builds, ''%s'' and ''%s''', min(build), max(build)) FROM src.run"
    " HAVING min(build) <> max(build)";
static const char TRACE_SQL[] =
    "SELECT printf('trace ''%s'' has the content of ''%s'', but another model, prompt or shape', s.name, m.name)"
    " FROM src.trace s JOIN main.trace m USING (sha256) WHERE (s.model, s.arch, s.prompt, s.category, s.prompt_tokens,"
    " s.decode_tokens, s.layers, s.q_heads, s.kv_heads, s.head_dim) IS NOT (m.model, m.arch, m.prompt, m.category,"
    " m.prompt_tokens, m.decode_tokens, m.layers, m.q_heads, m.kv_heads, m.head_dim) LIMIT 1";
#define WHICH_RUN "m.policy, m.budget, (SELECT name FROM main.trace WHERE trace_id = m.trace_id)"
static const char RUN_SQL[] =
    "SELECT printf('''%s'' at %s on trace ''%s'': another number of slots or bytes kept', " WHICH_RUN ")"
    " FROM same x JOIN src.run s ON s.id = x.src JOIN main.run m ON m.id = x.id"
    " WHERE (s.spec, s.budget, s.budget_tokens, s.rows, s.kept_slots, s.kept_bytes, s.nominal_bytes) IS NOT"
    " (m.spec, m.budget, m.budget_tokens, m.rows, m.kept_slots, m.kept_bytes, m.nominal_bytes) LIMIT 1";
static const char METRIC_SQL[] =
    "SELECT printf('''%s'' at %s on trace ''%s'': %s is %s here and %s before', " WHICH_RUN ", n.name,"
    " iif(s.value IS NULL, 'undefined', printf('%.9g', s.value)),"
    " iif(o.value IS NULL, 'undefined', printf('%.9g', o.value)))"
    " FROM same x JOIN main.run m ON m.id = x.id JOIN src.metric s ON s.run = x.src JOIN metric_map k ON k.src = "
    "s.metric_id"
    " JOIN main.metric o ON o.run = x.id AND o.metric_id = k.id AND o.layer = s.layer AND o.head = s.head AND o.step = "
    "s.step"
    " JOIN main.metric_name n ON n.metric_id = k.id"
    " WHERE (s.value IS NULL) <> (o.value IS NULL) OR"
    " abs(s.value - o.value) > " TOLERANCE " * (1 + max(abs(s.value), abs(o.value))) LIMIT 1";
static const char SLOTS_SQL[] =
    "SELECT printf('''%s'' at %s on trace ''%s'': other slots in layer %d', " WHICH_RUN ", s.layer)"
    " FROM same x JOIN main.run m ON m.id = x.id JOIN src.slots s ON s.run = x.src"
    " JOIN main.slots o ON o.run = x.id AND o.layer = s.layer AND o.head = s.head"
    " WHERE (s.slots, s.bytes) IS NOT (o.slots, o.bytes) LIMIT 1";

/* detail and wanted of a run that two files hold: what all its metrics are stored at. */
static const char DETAIL_SQL[] = "UPDATE main.run SET (detail, wanted) = (SELECT CASE"
                                 "   WHEN s.wanted = run.wanted THEN max(s.detail, run.detail)"
                                 "   WHEN s.wanted & run.wanted = s.wanted AND run.detail >= s.detail THEN run.detail"
                                 "   WHEN s.wanted & run.wanted = run.wanted AND s.detail >= run.detail THEN s.detail"
                                 "   ELSE min(s.detail, run.detail) END, s.wanted | run.wanted"
                                 "  FROM same x JOIN src.run s ON s.id = x.src WHERE x.id = run.id)"
                                 " WHERE id IN (SELECT id FROM same)";

/* INSERT of all columns of a table but `skip`, those in `map` replaced. Column lists come from the schema itself. */
static kv_status copy(merger *m, const char *file, const char *table, const char *verb, const char *columns_but,
                      const char *lead_to, const char *lead_from, const char *join, kv_error *err)
{
    char *ask = sqlite3_mprintf(
             "SELECT group_concat('\"' || name || '\"', ', ') FROM pragma_table_info(%Q) WHERE name NOT IN (%s)", table,
             columns_but),
         *cols = NULL, *from = NULL, *sql = NULL;
    kv_status st = ask ? first_text(m, file, ask, &cols, err) : kv_fail(err, KV_ENOMEM, "out of memory");
    sqlite3_free(ask);
    ask =
        st ? NULL
           : sqlite3_mprintf(
                 "SELECT group_concat('s.\"' || name || '\"', ', ') FROM pragma_table_info(%Q) WHERE name NOT IN (%s)",
                 table, columns_but);
    if (!st) st = ask ? first_text(m, file, ask, &from, err) : kv_fail(err, KV_ENOMEM, "out of memory");
    sqlite3_free(ask);
    if (!st) {
        sql = sqlite3_mprintf("%s INTO main.%s (%s%s) SELECT %s%s FROM src.%s s %s", verb, table, lead_to, cols,
                              lead_from, from, table, join);
        st = sql ? run_sql(m, file, sql, err) : kv_fail(err, KV_ENOMEM, "out of memory");
        sqlite3_free(sql);
    }
    free(cols), free(from);
    return st;
}

static kv_status merge_one(merger *m, const kv_analysis *a, const char *file, kv_error *err)
{
    kv_db *look = NULL;
    sqlite3_stmt *attach = NULL;
    kv_status st = kv_db_open(file, &look, err); /* is it one at all? says so as every command does */
    kv_db_close(look);
    if (st) return st;
    char *name = kv_format("%s%s", file[0] == '/' ? "" : "./", file);
    if (!name) return kv_fail(err, KV_ENOMEM, "out of memory");
    if (sqlite3_prepare_v2(m->h, "ATTACH ?1 AS src", -1, &attach, NULL) != SQLITE_OK ||
        sqlite3_bind_text(attach, 1, name, -1, SQLITE_STATIC) != SQLITE_OK || sqlite3_step(attach) != SQLITE_DONE)
        st = sql_fail(m, file, err);
    sqlite3_finalize(attach);
    free(name);
    if (st) return st;
    if ((st = run_sql(m, file, "BEGIN", err)) ||
        (!a->any_build && ((st = refuse_if(m, file, OWN_BUILD_SQL, "--any-build joins them all the same", err)) ||
                           (st = refuse_if(m, file, BUILD_SQL, "--any-build joins them all the same", err)))) ||
        (!a->first && (st = refuse_if(m, file, TRACE_SQL, "--first keeps the first file's", err))) ||
        (st = copy(m, file, "trace", "INSERT", "'trace_id'", "", "",
                   "WHERE s.sha256 NOT IN (SELECT sha256 FROM main.trace) ORDER BY s.trace_id", err)) ||
        (st = copy(m, file, "metric_name", "INSERT OR IGNORE", "'metric_id'", "", "", "ORDER BY s.metric_id", err)) ||
        (st = run_sql(
             m, file,
             "CREATE TEMP TABLE metric_map AS SELECT s.metric_id AS src, n.metric_id AS id FROM src.metric_name s"
             " JOIN main.metric_name n USING (name, unit);"
             "CREATE TEMP TABLE same (src INTEGER PRIMARY KEY, id INTEGER NOT NULL);"
             "INSERT INTO same SELECT s.id, r.id FROM src.run s JOIN main.run r USING (run_id)",
             err)) ||
        (!a->first && ((st = refuse_if(m, file, RUN_SQL, "--first keeps the first file's", err)) ||
                       (st = refuse_if(m, file, METRIC_SQL, "--first keeps the first file's", err)) ||
                       (st = refuse_if(m, file, SLOTS_SQL, "--first keeps the first file's", err)))) ||
        (st = run_sql(m, file, DETAIL_SQL, err)))
        return st;
    m->known += (size_t)sqlite3_changes(m->h);
    if ((st = copy(m, file, "run", "INSERT", "'id', 'trace_id'", "trace_id, ", "t.trace_id, ",
                   "JOIN src.trace f ON f.trace_id = s.trace_id JOIN main.trace t ON t.sha256 = f.sha256"
                   " WHERE s.id NOT IN (SELECT src FROM same) ORDER BY s.id",
                   err)))
        return st;
    m->fresh += (size_t)sqlite3_changes(m->h);
    if ((st = run_sql(m, file,
                      "CREATE TEMP TABLE run_map (src INTEGER PRIMARY KEY, id INTEGER NOT NULL);"
                      "INSERT INTO run_map SELECT s.id, r.id FROM src.run s JOIN main.run r USING (run_id)",
                      err)) ||
        (st = copy(
             m, file, "metric", "INSERT OR IGNORE", "'run', 'metric_id'", "run, metric_id, ", "x.id, k.id, ",
             "JOIN run_map x ON x.src = s.run JOIN metric_map k ON k.src = s.metric_id ORDER BY s.run, s.metric_id,"
             " s.layer, s.head, s.step",
             err)) ||
        (st = copy(m, file, "slots", "INSERT OR IGNORE", "'run'", "run, ", "x.id, ",
                   "JOIN run_map x ON x.src = s.run ORDER BY s.run, s.layer, s.head", err)))
        return st;
    return run_sql(m, file, "DROP TABLE metric_map; DROP TABLE same; DROP TABLE run_map; COMMIT; DETACH src", err);
}

static void discard(const char *partial)
{
    char *journal = kv_format("%s-journal", partial);
    unlink(partial);
    if (journal) unlink(journal);
    free(journal);
}

static kv_status put_in_place(const char *partial, const char *path, kv_error *err)
{
    int fd = open(partial, O_RDONLY | O_CLOEXEC);
    bool ok = fd >= 0 && !fsync(fd);
    if (fd >= 0) close(fd);
    if (ok && !rename(partial, path)) return KV_OK;
    return kv_fail(err, KV_EIO, "cannot write '%s': %s", path, strerror(errno));
}

kv_status kv_cmd_merge(const kv_analysis *a, kv_error *err)
{
    merger m = {0};
    kv_results *made = NULL;
    char *partial = NULL;
    struct stat sb;
    kv_status st;
    if (!a->folder) return kv_fail(err, KV_EMISUSE, "merge needs -o OUT.db");
    if (a->rest.n < 2) return kv_fail(err, KV_EMISUSE, "merge needs databases: merge A.db B.db -o OUT.db");
    if (!stat(a->folder, &sb) && !S_ISREG(sb.st_mode))
        return kv_fail(err, KV_EIO, "cannot write '%s': not a regular file", a->folder);
    if (!(partial = kv_format("%s.partial", a->folder))) return kv_fail(err, KV_ENOMEM, "out of memory");
    m.into = partial;
    discard(partial);
    st = kv_results_open(partial, &made, err);
    kv_results_close(made);
    if (!st && sqlite3_open_v2(partial, &m.h, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, NULL) != SQLITE_OK)
        st = kv_fail(err, KV_EIO, "cannot write '%s': %s", partial, sqlite3_errmsg(m.h));
    if (!st) {
        sqlite3_db_config(m.h, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, NULL);
        sqlite3_progress_handler(m.h, 20000, stop_on_signal, NULL);
        st = run_sql(&m, partial, "PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; PRAGMA foreign_keys = ON",
                     err);
    }
    for (size_t i = 1; i < a->rest.n && !st; i++) st = merge_one(&m, a, a->rest.v[i], err);
    sqlite3_close(m.h);
    if (!st) st = put_in_place(partial, a->folder, err);
    if (st)
        discard(partial);
    else
        fprintf(a->talk, "kv-analyze: %zu runs in '%s', %zu more were in several files\n", m.fresh, a->folder, m.known);
    free(partial);
    return st;
}
