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

/* INSERT of the values named; other columns that must not be NULL get 0 or '' (columns are added more often than these
 * tests need them). Takes sqlite3_mprintf's texts: "a,b" and "1,'x'". */
static inline void tiny_insert(sqlite3 *db, const char *table, char *columns, char *values)
{
    sqlite3_stmt *q = NULL;
    char *cols = sqlite3_mprintf("%s", columns), *vals = sqlite3_mprintf("%s", values);
    CHECK(sqlite3_prepare_v2(db,
                             "SELECT name, type FROM pragma_table_info(?1) WHERE \"notnull\" AND pk = 0 AND dflt_value "
                             "IS NULL AND instr(',' || ?2 || ',', ',' || name || ',') = 0",
                             -1, &q, NULL) == SQLITE_OK);
    sqlite3_bind_text(q, 1, table, -1, SQLITE_STATIC), sqlite3_bind_text(q, 2, columns, -1, SQLITE_STATIC);
    while (sqlite3_step(q) == SQLITE_ROW) {
        const char *name = (const char *)sqlite3_column_text(q, 0), *type = (const char *)sqlite3_column_text(q, 1);
        cols = sqlite3_mprintf("%z,%s", cols, name);
        vals = sqlite3_mprintf("%z,%s", vals, strcmp(type, "TEXT") ? "0" : "''");
    }
    sqlite3_finalize(q);
    tiny_sql(db, sqlite3_mprintf("INSERT INTO %s (%z) VALUES (%z)", table, cols, vals));
    sqlite3_free(columns), sqlite3_free(values);
}

static inline long tiny_put(sqlite3 *db, tiny_run r)
{
    double bytes = r.bytes > 0 ? r.bytes : 4000 * r.frac;
    tiny_insert(
        db, "run",
        sqlite3_mprintf("run_id,trace_id,policy,spec,base,verified,budget,budget_tokens,budget_frac,granularity,page,"
                        "cut,protect,rows,kept_slots,kept_bytes,mean_bytes,peak_bytes,nominal_bytes,full_bytes,seed,"
                        "detail,build,wall_s"),
        sqlite3_mprintf("lower(hex(randomblob(16))),%d,%Q,%Q,%Q,'definition',%Q,%d,%.17g,'kv_head',%d,%Q,'none',%d,"
                        "%d,%d,%.17g,%d,%d,4000.0,%d,1,%Q,0.5",
                        r.trace, r.policy, r.policy, r.policy, r.budget, (int)(100 * r.frac), r.frac,
                        r.page ? r.page : 1, r.cut ? r.cut : "prompt", r.rows ? r.rows : 8, (int)(bytes / 10),
                        (int)bytes, bytes, (int)bytes, (int)(4000 * r.frac), r.seed, r.build ? r.build : "build 1"));
    long id = (long)sqlite3_last_insert_rowid(db);
    char *value = r.value == r.value ? sqlite3_mprintf("%.17g", r.value) : sqlite3_mprintf("NULL");
    tiny_sql(db, sqlite3_mprintf("INSERT INTO metric VALUES (%ld, 1, -1, -1, -1, %z, 8)", id, value));
    return id;
}

static inline void tiny_slots(sqlite3 *db, long run, int layer, int head, int slots)
{
    tiny_insert(db, "slots", sqlite3_mprintf("run,layer,head,slots,bytes"),
                sqlite3_mprintf("%ld,%d,%d,%d,%d", run, layer, head, slots, 10 * slots));
}

#endif
