/* query.c - results.db, read-only (query.h). */
#include "analyze/query.h"

#include <errno.h>
#include <sqlite3.h>
#include <stdlib.h>
#include <sys/stat.h>

#define BUSY_MS 10000

struct kv_db {
    sqlite3 *h;
    char *path;
};

static int stop_on_signal(void *unused)
{
    (void)unused;
    return kv_interrupted();
}

static kv_status sql_fail(kv_db *db, int rc, const char *what, kv_error *err)
{
    const char *why = sqlite3_errmsg(db->h);
    switch (rc & 0xff) {
    case SQLITE_NOMEM: return kv_fail(err, KV_ENOMEM, "cannot read database '%s': out of memory", db->path);
    case SQLITE_INTERRUPT: return kv_fail(err, KV_EINTERRUPTED, "interrupted while reading '%s'", db->path);
    case SQLITE_BUSY:
        return kv_fail(err, KV_EIO, "cannot read database '%s': locked by another program (is kv-sim writing it?)",
                       db->path);
    case SQLITE_NOTADB:
        return kv_fail(err, KV_EFORMAT,
                       "cannot open '%s': not an SQLite file (a results database is made by "
                       "kv-sim run --db)",
                       db->path);
    case SQLITE_READONLY:
        return kv_fail(err, KV_EIO,
                       "cannot read database '%s': a killed program left '%s-journal' behind, and it cannot be undone "
                       "without write access (kv-sim run --db does it too)",
                       db->path, db->path);
    case SQLITE_CORRUPT: return kv_fail(err, KV_EFORMAT, "cannot read database '%s': %s", db->path, why);
    case SQLITE_IOERR:
    case SQLITE_CANTOPEN:
    case SQLITE_PERM: return kv_fail(err, KV_EIO, "cannot read database '%s': %s", db->path, why);
    default: return kv_fail(err, KV_EFORMAT, "cannot run %s on '%s': %s", what, db->path, why);
    }
}

/* A program killed in the middle of a write leaves its journal, and SQLite undoes the write when somebody reads who may
 * write. */
static void undo_killed_write(const char *name)
{
    sqlite3 *h = NULL;
    if (sqlite3_open_v2(name, &h, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, NULL) == SQLITE_OK) {
        sqlite3_busy_timeout(h, BUSY_MS);
        sqlite3_exec(h, "PRAGMA schema_version", NULL, NULL, NULL);
    }
    sqlite3_close(h);
}

static kv_status pragma_int(kv_db *db, const char *sql, int64_t *out, kv_error *err)
{
    sqlite3_stmt *q = NULL;
    int rc = sqlite3_prepare_v2(db->h, sql, -1, &q, NULL);
    if (rc == SQLITE_OK && (rc = sqlite3_step(q)) == SQLITE_ROW) *out = sqlite3_column_int64(q, 0), rc = SQLITE_OK;
    kv_status st = rc == SQLITE_OK ? KV_OK : sql_fail(db, rc, sql, err);
    sqlite3_finalize(q);
    return st;
}

kv_status kv_db_open(const char *path, kv_db **out, kv_error *err)
{
    struct stat sb;
    kv_status st = KV_OK;
    kv_db *db = NULL;
    char *name = NULL;
    int64_t app = 0, version = 0;
    *out = NULL;
    if (stat(path, &sb))
        return kv_fail(err, KV_EIO, "cannot open database '%s': %s%s", path, strerror(errno),
                       errno == ENOENT ? " (kv-sim run --db makes one; --db names another)" : "");
    if (!S_ISREG(sb.st_mode)) return kv_fail(err, KV_EFORMAT, "cannot open database '%s': not a regular file", path);
    /* "./" keeps SQLite from reading "file:..." and ":memory:" as anything but names. */
    db = calloc(1, sizeof *db);
    name = kv_format("%s%s", path[0] == '/' ? "" : "./", path);
    if (!db || !name || !(db->path = strdup(path))) {
        st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    int rc = sqlite3_open_v2(name, &db->h, SQLITE_OPEN_READONLY | SQLITE_OPEN_NOMUTEX, NULL);
    if (rc != SQLITE_OK) {
        st = sql_fail(db, rc, "open", err);
        goto out;
    }
    sqlite3_db_config(db->h, SQLITE_DBCONFIG_DEFENSIVE, 1, NULL);
    sqlite3_db_config(db->h, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, NULL);
    sqlite3_limit(db->h, SQLITE_LIMIT_LENGTH, KV_DB_TEXT_MAX);
    sqlite3_busy_timeout(db->h, BUSY_MS);
    sqlite3_progress_handler(db->h, 20000, stop_on_signal, NULL);
    if (sqlite3_exec(db->h, "PRAGMA application_id", NULL, NULL, NULL) == SQLITE_READONLY) undo_killed_write(name);
    if ((st = pragma_int(db, "PRAGMA application_id", &app, err)) ||
        (st = pragma_int(db, "PRAGMA user_version", &version, err)))
        goto out;
    if (app != KV_DB_APPLICATION) {
        st = kv_fail(err, KV_EFORMAT,
                     "cannot use '%s': an SQLite file, but not a results database (application id "
                     "0x%08llx, expected 0x%08x; kv-sim run --db makes one)",
                     path, (unsigned long long)app & 0xffffffffu, KV_DB_APPLICATION);
        goto out;
    }
    if (version != KV_DB_VERSION) {
        st = kv_fail(err, KV_EUNSUPPORTED, "cannot use '%s': schema version %lld, this program reads version %d", path,
                     (long long)version, KV_DB_VERSION);
        goto out;
    }
    rc = sqlite3_exec(db->h, "BEGIN", NULL, NULL, NULL);
    if (rc != SQLITE_OK) st = sql_fail(db, rc, "BEGIN", err);
out:
    free(name);
    if (st)
        kv_db_close(db);
    else
        *out = db;
    return st;
}

void kv_db_close(kv_db *db)
{
    if (!db) return;
    sqlite3_close(db->h);
    free(db->path);
    free(db);
}

const char *kv_db_path(const kv_db *db)
{
    return db->path;
}

static kv_status bind_all(kv_db *db, sqlite3_stmt *q, const char *what, const kv_bind *bind, size_t n_bind,
                          kv_error *err)
{
    for (int i = 1; i <= sqlite3_bind_parameter_count(q); i++) {
        const char *name = sqlite3_bind_parameter_name(q, i);
        size_t k = 0;
        while (k < n_bind && (!name || strcmp(name, bind[k].name))) k++;
        if (k == n_bind)
            return kv_fail(err, KV_EFORMAT,
                           "cannot run %s: unknown parameter '%s' (known: :metric :budget :policy :model "
                           ":policies :budgets :traces :categories :granularity :page :cut)",
                           what, name ? name : "?");
        int rc = bind[k].text ? sqlite3_bind_text(q, i, bind[k].text, -1, SQLITE_STATIC) : sqlite3_bind_null(q, i);
        if (rc != SQLITE_OK) return sql_fail(db, rc, what, err);
    }
    return KV_OK;
}

static kv_cell column_cell(sqlite3_stmt *q, int c)
{
    switch (sqlite3_column_type(q, c)) {
    case SQLITE_NULL: return (kv_cell){.kind = KV_CELL_NULL};
    case SQLITE_INTEGER: return kv_int(sqlite3_column_int64(q, c));
    case SQLITE_FLOAT: return kv_real(sqlite3_column_double(q, c));
    default: {
        const char *s = (const char *)sqlite3_column_text(q, c);
        int n = sqlite3_column_bytes(q, c);
        return (kv_cell){.kind = KV_CELL_TEXT, .len = s ? (uint32_t)n : 0, .u.s = s ? s : ""};
    }
    }
}

kv_status kv_query_each(kv_db *db, const char *what, const char *sql, const kv_bind *bind, size_t n_bind,
                        kv_row_fn each, void *ctx, kv_error *err)
{
    sqlite3_stmt *q = NULL, *more = NULL;
    const char *tail = NULL, *names[KV_SHEET_COLS_MAX];
    kv_cell row[KV_SHEET_COLS_MAX];
    kv_status st = KV_OK;
    int rc = sqlite3_prepare_v2(db->h, sql, -1, &q, &tail);
    if (rc == SQLITE_OK && tail && *tail) rc = sqlite3_prepare_v2(db->h, tail, -1, &more, NULL);
    if (rc != SQLITE_OK) {
        st = sql_fail(db, rc, what, err);
        goto out;
    }
    if (!q || more) {
        st = kv_fail(err, KV_EFORMAT, "cannot run %s: it must hold exactly one SQL statement", what);
        goto out;
    }
    int n_col = sqlite3_column_count(q);
    if (!sqlite3_stmt_readonly(q) || n_col < 1 || n_col > (int)KV_SHEET_COLS_MAX) {
        st = kv_fail(err, KV_EFORMAT, "cannot run %s: not a query of 1 to %u columns", what, KV_SHEET_COLS_MAX);
        goto out;
    }
    if ((st = bind_all(db, q, what, bind, n_bind, err))) goto out;
    for (int c = 0; c < n_col; c++)
        if (!(names[c] = sqlite3_column_name(q, c))) {
            st = kv_fail(err, KV_ENOMEM, "out of memory");
            goto out;
        }
    bool any = false;
    while ((rc = sqlite3_step(q)) == SQLITE_ROW) {
        any = true;
        for (int c = 0; c < n_col; c++) row[c] = column_cell(q, c);
        if ((st = each(ctx, (size_t)n_col, names, row, err))) goto out;
    }
    if (rc != SQLITE_DONE)
        st = sql_fail(db, rc, what, err);
    else if (!any)
        st = each(ctx, (size_t)n_col, names, NULL, err);
out:
    sqlite3_finalize(q);
    sqlite3_finalize(more);
    return st;
}

static kv_status into_sheet(void *ctx, size_t n_col, const char *const *names, const kv_cell *row, kv_error *err)
{
    kv_sheet *s = ctx;
    kv_cell *to;
    kv_status st;
    if (!s->n_col && (st = kv_sheet_init(s, n_col, names, err))) return st;
    if (!row) return KV_OK;
    if ((st = kv_sheet_add(s, &to, err))) return st;
    for (size_t c = 0; c < n_col; c++)
        if ((st = kv_sheet_copy_cell(s, &to[c], &row[c], err))) return st;
    return KV_OK;
}

kv_status kv_query(kv_db *db, const char *what, const char *sql, const kv_bind *bind, size_t n_bind, kv_sheet *out,
                   kv_error *err)
{
    *out = (kv_sheet){0};
    kv_status st = kv_query_each(db, what, sql, bind, n_bind, into_sheet, out, err);
    if (st) kv_sheet_free(out);
    return st;
}

/* Stops at the first row: KV_EMISSING is the signal, and never seen by the caller. */
static kv_status found_one(void *ctx, size_t n_col, const char *const *names, const kv_cell *row, kv_error *err)
{
    (void)n_col, (void)names, (void)err;
    *(bool *)ctx = row != NULL;
    return row ? KV_EMISSING : KV_OK;
}

kv_status kv_query_any(kv_db *db, const char *what, const char *sql, const kv_bind *bind, size_t n_bind, bool *out,
                       kv_error *err)
{
    *out = false;
    kv_status st = kv_query_each(db, what, sql, bind, n_bind, found_one, out, err);
    return *out ? KV_OK : st;
}
