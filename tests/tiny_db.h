/* tiny_db.h - results databases small enough to work out by hand. */
#ifndef KV_TINY_DB_H
#define KV_TINY_DB_H

#include <sqlite3.h>
#include <stdlib.h>
#include <unistd.h>

#include "tests/check.h"
#include "traces/base.h"

/* An empty database of the present schema, in place of whatever stood there. */
static inline sqlite3 *tiny_new_db(const char *path)
{
    sqlite3 *db = NULL;
    uint8_t *sql = NULL;
    size_t n;
    unlink(path);
    CHECK(!kv_read_file("sim/schema.sql", 1 << 20, &sql, &n, NULL));
    CHECK(sqlite3_open(path, &db) == SQLITE_OK && sql && sqlite3_exec(db, (char *)sql, NULL, NULL, NULL) == SQLITE_OK);
    free(sql);
    CHECK(sqlite3_exec(db, "PRAGMA synchronous = OFF; PRAGMA journal_mode = MEMORY", NULL, NULL, NULL) == SQLITE_OK);
    return db;
}

static inline void tiny_sql(sqlite3 *db, char *sql) /* takes sqlite3_mprintf's text */
{
    char *why = NULL;
    CHECKF(sqlite3_exec(db, sql, NULL, NULL, &why) == SQLITE_OK, "%s: %s", sql, why ? why : "");
    sqlite3_free(why);
    sqlite3_free(sql);
}

/* The rows of one run; what is 0 or NULL gets the value beside it. */
typedef struct {
    int trace;          /* 1..: made by tiny_trace */
    const char *policy; /* the spec is the same text */
    const char *budget; /* "10%" */
    double frac;        /* 0.1 */
    double value;       /* of metric 1; NaN = undefined */
    double bytes;       /* frac * 4000 */
    const char *build;  /* "build 1" */
    const char *cut;    /* "prompt" */
    int page;           /* 1 */
    int rows;           /* 8 */
    int seed;
} tiny_run;

static inline void tiny_trace(sqlite3 *db, int id, const char *category)
{
    tiny_sql(db, sqlite3_mprintf("INSERT INTO trace VALUES (%d, 'sha%d', 'trace%d', 'model', 'llama', 'p%d', %Q, 100, "
                                 "8, '0+5', 4, 2, 16)",
                                 id, id, id, id, category));
}

static inline void tiny_metric(sqlite3 *db, int id, const char *name, const char *better)
{
    tiny_sql(db, sqlite3_mprintf("INSERT INTO metric_name VALUES (%d, %Q, 'unit', %Q)", id, name, better));
}

static inline long tiny_put(sqlite3 *db, tiny_run r)
{
    double bytes = r.bytes > 0 ? r.bytes : 4000 * r.frac;
    tiny_sql(db,
             sqlite3_mprintf(
                 "INSERT INTO run (run_id, trace_id, policy, spec, base, corner, target, oracle, verified, budget, "
                 "budget_tokens, "
                 "budget_frac, granularity, page, cut, protect, rows, kept_slots, kept_bytes, "
                 "mean_bytes, peak_bytes, nominal_bytes, full_bytes, prefill_bytes, read_bytes, overspent, seed, "
                 "detail, wanted, "
                 "build, wall_s) VALUES (lower(hex(randomblob(16))), %d, %Q, %Q, %Q, '', '', '', 'definition', %Q, %d, "
                 "%.17g, 'kv_head', %d, %Q, 'none', %d, %d, %d, %.17g, %d, %d, 4000.0, 0, 0, 0, %d, 1, 0, %Q, "
                 "0.5)",
                 r.trace, r.policy, r.policy, r.policy, r.budget, (int)(100 * r.frac), r.frac, r.page ? r.page : 1,
                 r.cut ? r.cut : "prompt", r.rows ? r.rows : 8, (int)(bytes / 10), (int)bytes, bytes, (int)bytes,
                 (int)(4000 * r.frac), r.seed, r.build ? r.build : "build 1"));
    long id = (long)sqlite3_last_insert_rowid(db);
    char *value = r.value == r.value ? sqlite3_mprintf("%.17g", r.value) : sqlite3_mprintf("NULL");
    tiny_sql(db, sqlite3_mprintf("INSERT INTO metric VALUES (%ld, 1, -1, -1, -1, %s, 8)", id, value));
    sqlite3_free(value);
    return id;
}

#endif
