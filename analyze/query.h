/* query.h - results.db, read-only: open and check, run one statement with parameters bound by name, choose what to look
 * at.
 *
 * The file is somebody else's: schema code is not trusted, nothing is ever written, Ctrl-C stops a statement. */
#ifndef KV_QUERY_H
#define KV_QUERY_H

#include "analyze/sheet.h"
#include "traces/cli.h"

#define KV_DB_APPLICATION 0x4b565452 /* sim/schema.sql */
#define KV_DB_VERSION     3
#define KV_DB_TEXT_MAX    (16 << 20) /* bytes of a value, whatever a view of somebody else's makes of it */

typedef struct kv_db kv_db;

/* KV_EFORMAT for anything that is not a results database of this version. All statements of a handle see one state of
 * the file, even while kv-sim goes on writing. */
kv_status kv_db_open(const char *path, kv_db **out, kv_error *err);
void kv_db_close(kv_db *db); /* NULL accepted */
const char *kv_db_path(const kv_db *db);

/* A named parameter; text NULL binds NULL. */
typedef struct {
    const char *name; /* ":metric" */
    const char *text;
} kv_bind;

/* Run exactly one statement. Every parameter in it must be among bind[0..n_bind). `what` names the statement in
 * messages (a command or a file). each() gets the column names with the first row (n_col cells, text valid during the
 * call); a statement without rows calls it once with row == NULL. */
typedef kv_status (*kv_row_fn)(void *ctx, size_t n_col, const char *const *names, const kv_cell *row, kv_error *err);
kv_status kv_query_each(kv_db *db, const char *what, const char *sql, const kv_bind *bind, size_t n_bind,
                        kv_row_fn each, void *ctx, kv_error *err);
/* The same into a fresh sheet (free it; it is empty on failure). */
kv_status kv_query(kv_db *db, const char *what, const char *sql, const kv_bind *bind, size_t n_bind, kv_sheet *out,
                   kv_error *err);
/* True in *out when the statement has a row. */
kv_status kv_query_any(kv_db *db, const char *what, const char *sql, const kv_bind *bind, size_t n_bind, bool *out,
                       kv_error *err);

/* ------------------------------------------------------------------------------------------------ selection */
/* What the user chose, resolved against the database. In SQL the lists are JSON arrays or NULL (= all). */
#define KV_BINDS_MAX 12
typedef struct {
    char *policies, *budgets, *traces, *categories; /* JSON */
    char *policy, *budget;                          /* the first one given, NULL when none */
    char *model, *metric;
    char *granularity, *page, *cut; /* NULL = all */
    kv_bind bind[KV_BINDS_MAX]; /* :policies :budgets :traces :categories :policy :budget :model :metric :granularity
                                   :page :cut */
    size_t n_bind;
} kv_selection;

/* The filter over `v_run r` that every built-in statement ends with; figures write it out (plots/README.md). */
#define KV_WHERE_RUN                                                                                                   \
    " (:policies IS NULL OR r.policy IN (SELECT value FROM json_each(:policies))"                                      \
    "  OR r.spec IN (SELECT value FROM json_each(:policies)))"                                                         \
    " AND (:budgets IS NULL OR r.budget IN (SELECT value FROM json_each(:budgets)))"                                   \
    " AND (:traces IS NULL OR r.trace IN (SELECT value FROM json_each(:traces)))"                                      \
    " AND (:categories IS NULL OR r.category IN (SELECT value FROM json_each(:categories)))"                           \
    " AND (:model IS NULL OR r.model = :model)"                                                                        \
    " AND (:granularity IS NULL OR r.granularity = :granularity)"                                                      \
    " AND (:page IS NULL OR r.page = CAST(:page AS INTEGER))"                                                          \
    " AND (:cut IS NULL OR r.cut = :cut) "

/* Length of the first item of a comma list; in specs a comma whose next item has '=' before any ':' does not end it. */
size_t kv_item_length(const char *s, bool spec);
/* Lists as on the command line: items separated by commas; in policies an item with '=' before any ':' continues the
 * one before it (canonical specs hold commas). Every name must occur in the database; otherwise KV_EMISSING lists the
 * known ones, nearest first. An empty database and a selection without runs are errors that say so. model NULL = all
 * models. */
kv_status kv_selection_init(kv_db *db, const kv_list *policies, const kv_list *budgets, const kv_list *traces,
                            const kv_list *categories, const char *model, kv_selection *out, kv_error *err);
/* Narrow it to runs with these properties; NULL = any. */
kv_status kv_selection_variant(kv_db *db, kv_selection *s, const char *granularity, const char *page, const char *cut,
                               kv_error *err);
void kv_selection_free(kv_selection *s);
void kv_selection_rebind(kv_selection *s); /* after a field was replaced */

/* Fill s->metric: `name` when the database has it, else the first of `prefer` (ends with NULL) that has a defined value
 * aggregated over layers, heads and rows in the selection, else the first metric there is. */
kv_status kv_selection_metric(kv_db *db, kv_selection *s, const char *name, const char *const *prefer, kv_error *err);
/* Fill s->budget when none was given: the one nearest to 10 % of the prompt on a log scale. Smaller ones are often all
 * window on prompts of a thousand tokens and would show no policy at all. */
kv_status kv_selection_budget(kv_db *db, kv_selection *s, kv_error *err);
/* Fill s->model when the selection holds one model; KV_EMISUSE names them when there are several. */
kv_status kv_selection_model(kv_db *db, kv_selection *s, kv_error *err);

#endif
