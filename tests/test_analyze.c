/* test_analyze.c - kv-analyze: statistics with known answers, a database small enough to work out by hand, hostile
 * names, files that are not results databases, and figures that come out the same twice. Run from the repository root.
 */
#include <jansson.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "analyze/analysis.h"
#include "analyze/figure.h"
#include "analyze/spawn.h"
#include "analyze/stats.h"
#include "tests/tiny_db.h"

static char dir[64];
static kv_error err;

#define EVIL "evil\n\x1b[31m'\"`touch pwned`,\xe2\x80\xae\xff"

static bool same_file(const char *a, const char *b)
{
    uint8_t *x = NULL, *y = NULL;
    size_t n = 0, m = 0;
    bool same = !kv_read_file(a, 1 << 26, &x, &n, NULL) && !kv_read_file(b, 1 << 26, &y, &m, NULL) && n == m && n &&
                !memcmp(x, y, n);
    free(x), free(y);
    return same;
}

/* ---------------------------------------------------------------------------------------------- statistics */
static void test_stats(void)
{
    const double v[] = {1, 2, 4, 9};
    CHECK(kv_mean(v, 4) == 4 && isnan(kv_mean(v, 0)));
    CHECK(kv_quantile(v, 4, 0) == 1 && kv_quantile(v, 4, 1) == 9 && kv_quantile(v, 4, 0.5) == 3);
    CHECK(kv_close(kv_quantile(v, 4, 0.25), 1.75, 1e-15, 0)); /* numpy.quantile([1, 2, 4, 9], .25) */
    double s[] = {3, NAN, -1, 2};
    kv_sort_doubles(s, 4);
    CHECK(s[0] == -1 && s[1] == 2 && s[2] == 3 && isnan(s[3]));

    kv_interval a, b;
    CHECK(!kv_bootstrap_mean(v, 4, 2000, 7, 0.95, &a, &err) && !kv_bootstrap_mean(v, 4, 2000, 7, 0.95, &b, &err));
    CHECK(a.has_interval && a.mean == 4 && a.low == b.low && a.high == b.high && a.low < 4 && a.high > 4);
    CHECK(!kv_bootstrap_mean(v, 4, 2000, 8, 0.95, &b, &err));
    CHECK(!kv_bootstrap_mean(v, 1, 2000, 7, 0.95, &a, &err) && !a.has_interval && isnan(a.low) && a.mean == 1);
    CHECK(!kv_bootstrap_mean(v, 0, 2000, 7, 0.95, &a, &err) && !a.has_interval && isnan(a.mean));
    const double same[] = {0.3, 0.3, 0.3};
    CHECK(!kv_bootstrap_mean(same, 3, 100, 1, 0.95, &a, &err) && kv_close(a.low, 0.3, 1e-15, 0) &&
          kv_close(a.high, 0.3, 1e-15, 0));
    /* Means of two draws from {0, 1}: 0, 1/2, 1 with 1/4, 1/2, 1/4. */
    const double coin[] = {0, 1};
    CHECK(!kv_bootstrap_mean(coin, 2, 10000, 1, 0.95, &a, &err) && a.low == 0 && a.high == 1);
    CHECK(!kv_bootstrap_mean(coin, 2, 10000, 1, 0.4, &a, &err) && a.low == 0.5 && a.high == 0.5);

    /* Coverage: 400 samples of 25 normals; the percentile interval is known to run a little short of 95%. */
    kv_rng rng = {.s = 42};
    int hit = 0;
    for (int i = 0; i < 400; i++) {
        double x[25];
        for (int k = 0; k < 25; k++) x[k] = kv_rng_normal(&rng);
        CHECK(!kv_bootstrap_mean(x, 25, 500, 1, 0.95, &a, &err));
        hit += a.low <= 0 && 0 <= a.high;
    }
    CHECKF(hit >= 355 && hit <= 392, "%d of 400 intervals hold the mean", hit);
}

static void put(kv_sheet *s, const char *const *text) /* numbers where the text is one */
{
    kv_cell *row;
    CHECK(!kv_sheet_add(s, &row, &err));
    for (size_t c = 0; c < s->n_col; c++) {
        double d;
        if (!text[c]) continue;
        if (kv_parse_f64(text[c], &d))
            row[c] = kv_real(d);
        else
            CHECK(!kv_sheet_text(s, &row[c], text[c], strlen(text[c]), &err));
    }
}

static void test_group(void)
{
    kv_sheet in, out;
    kv_group_note note;
    const char *const cols[] = {"policy", "prompt", "bytes", "value", "unit"};
    CHECK(!kv_sheet_init(&in, 5, cols, &err));
    put(&in, (const char *const[]){"b", "p1", "10", "1", "u"});
    put(&in, (const char *const[]){"a", "p1", "100", "5", "u"});
    put(&in, (const char *const[]){"b", "p2", "30", "3", "u"});
    put(&in, (const char *const[]){"b", "p2", "50", "5", "u"}); /* second seed: prompt p2 is 4 at 40 bytes */
    put(&in, (const char *const[]){"b", "p3", "1000", NULL, "u"});
    CHECK(!kv_group_prompts(&in, &out, &note, &err) && out.n_row == 2 && out.n_col == 8);
    CHECK(!strcmp(kv_cell_text(kv_sheet_at(&out, 0, 0)), "b") && !strcmp(kv_cell_text(kv_sheet_at(&out, 1, 0)), "a"));
    CHECK(kv_cell_number(kv_sheet_at(&out, 0, kv_sheet_find(&out, "mean"))) == 2.5);
    CHECK(kv_cell_number(kv_sheet_at(&out, 0, kv_sheet_find(&out, "bytes"))) == 25); /* p3 has no value: left out */
    CHECK(kv_cell_number(kv_sheet_at(&out, 0, kv_sheet_find(&out, "n"))) == 2);
    CHECK(kv_cell_number(kv_sheet_at(&out, 0, kv_sheet_find(&out, "undefined"))) == 1);
    CHECK(kv_cell_number(kv_sheet_at(&out, 0, kv_sheet_find(&out, "low"))) == 1);
    CHECK(kv_sheet_at(&out, 1, kv_sheet_find(&out, "low"))->kind == KV_CELL_NULL); /* one prompt: no interval */
    CHECK(note.merged == 1 && note.undefined == 1 && note.n_min == 1 && note.n_max == 2);
    kv_sheet_free(&out);
    kv_sheet_free(&in);
    CHECK(!kv_sheet_init(&in, 2, cols, &err));
    CHECK(kv_group_prompts(&in, &out, &note, &err) == KV_EFORMAT); /* no value */
    kv_sheet_free(&in);

    const char *const named[] = {"policy", "spec", "page"};
    CHECK(!kv_sheet_init(&in, 3, named, &err));
    put(&in, (const char *const[]){"snapkv", "snapkv:kernel=7,window=32", "1"});
    put(&in, (const char *const[]){"snapkv", "snapkv:kernel=7,window=16", "1"});
    put(&in, (const char *const[]){"oracle", "oracle:window=32", "1"});
    put(&in, (const char *const[]){"snapkv", "snapkv:kernel=7,window=16", "8"});
    put(&in, (const char *const[]){"full", "full", "1"});
    CHECK(!kv_label_series(&in, &err));
    static const char *const want[] = {"full", "snapkv:window=16 page=1", "snapkv:window=16 page=8",
                                       "snapkv:window=32 page=1", "oracle"};
    for (size_t r = 0; r < 5; r++) {
        const char *got = kv_cell_text(kv_sheet_at(&in, r, kv_sheet_find(&in, "label")));
        CHECKF(!strcmp(got, want[r]), "'%s'", got);
        CHECK(kv_cell_number(kv_sheet_at(&in, r, kv_sheet_find(&in, "series"))) == (double)r);
    }
    CHECK(kv_cell_number(kv_sheet_at(&in, 3, kv_sheet_find(&in, "variant"))) == 2);
    kv_sheet_free(&in);
}

/* ---------------------------------------------------------------------------------------------- a tiny database */
static int64_t n_run;

/* One row, columns by name, so that a column added to the schema with a NOT NULL is noticed here. */
static void add_run(sqlite3 *db, int trace, const char *policy, const char *budget, double frac, int64_t kept,
                    int overspent, const char *verified, double error)
{
    char *q =
        sqlite3_mprintf("INSERT INTO run (id, run_id, trace_id, policy, spec, base, corner, target, oracle, verified, "
                        "budget, budget_tokens, "
                        "budget_frac, granularity, page, "
                        "cut, protect, rows, kept_slots, kept_bytes, mean_bytes, peak_bytes, nominal_bytes, "
                        "full_bytes, prefill_bytes, read_bytes, overspent, seed, "
                        "detail, wanted, build, wall_s) VALUES (%lld, '%032llx', %d, %Q, %Q, %Q, '', '', '', "
                        "%Q, %Q, %d, %.17g, "
                        "'kv_head', 1, 'prompt', "
                        "'none', 8, %lld, %lld, %.17g, %lld, %lld, 4000.0, 4000, 4000.0, %d, 0, 1, 0, 'test', 0.5)",
                        n_run, n_run, trace, policy, policy, policy, verified, budget, (int)(100 * frac), frac, kept,
                        kept * 10, (double)kept * 10, kept * 10, (int64_t)(4000 * frac), overspent);
    CHECK(sqlite3_exec(db, q, NULL, NULL, NULL) == SQLITE_OK);
    sqlite3_free(q);
    q = sqlite3_mprintf("INSERT INTO metric VALUES (%lld, 1, -1, -1, -1, %.17g, 8), (%lld, 1, 0, -1, -1, %.17g, 8), "
                        "(%lld, 1, 5, -1, -1, NULL, 0)",
                        n_run, error, n_run, error / 2, n_run);
    CHECK(sqlite3_exec(db, q, NULL, NULL, NULL) == SQLITE_OK);
    sqlite3_free(q);
    /* Two layers (0 and 5) of two KV heads; cake gives layer 0 three quarters. */
    bool uneven = !strcmp(policy, "cake") || !strcmp(policy, "oracle-global");
    for (int k = 0; k < 4; k++) {
        int64_t s = uneven ? (k < 2 ? kept * 3 / 8 : kept / 8) : kept / 4;
        q = sqlite3_mprintf("INSERT INTO slots VALUES (%lld, %d, %d, %lld, %lld, %lld)", n_run, k < 2 ? 0 : 5, k % 2, s,
                            s * 10, s * 10);
        CHECK(sqlite3_exec(db, q, NULL, NULL, NULL) == SQLITE_OK);
        sqlite3_free(q);
    }
    n_run++;
}

static void make_db(const char *path, bool hostile)
{
    sqlite3 *db = tiny_new_db(path);
    CHECK(sqlite3_exec(db, "INSERT INTO metric_name VALUES (1, 'layer_error', 'relative', 'lower')", NULL, NULL,
                       NULL) == SQLITE_OK);
    n_run = 1;
    for (int t = 1; t <= 2; t++) {
        char *q =
            sqlite3_mprintf("INSERT INTO trace VALUES (%d, 'sha%d', 'trace%d', 'model', 'llama', 'p%d', %Q, 100, 8, "
                            "'0+5', 4, 2, 16)",
                            t, t, t, t, t == 1 ? "prose" : "code");
        CHECK(sqlite3_exec(db, q, NULL, NULL, NULL) == SQLITE_OK);
        sqlite3_free(q);
        add_run(db, t, "full", "10%", 0.1, 400, 0, "definition", 0);
        add_run(db, t, "snapkv", "10%", 0.1, 40, 0, "authors' code", t == 1 ? 0.2 : 0.4);
        add_run(db, t, "cake", "10%", 0.1, 48, t == 2, "not verified: example", t == 1 ? 0.1 : 0.3);
        add_run(db, t, "oracle", "10%", 0.1, 40, 0, "definition", t == 1 ? 0.05 : 0.15);
        add_run(db, t, "oracle-global", "10%", 0.1, 40, 0, "definition", t == 1 ? 0.02 : 0.04);
        add_run(db, t, "snapkv", "50%", 0.5, 200, 0, "authors' code", t == 1 ? 0.02 : 0.04);
        if (hostile) add_run(db, t, EVIL, "10%", 0.1, 40, 0, EVIL, 0.9);
    }
    CHECK(sqlite3_close(db) == SQLITE_OK);
}

/* Output of a command on a database, malloc'd; NULL when it failed. */
static char *run(kv_status (*command)(const kv_analysis *, kv_error *), kv_analysis *a)
{
    char *out = NULL, *talk = NULL;
    size_t n, m;
    err.msg[0] = 0;
    a->out = open_memstream(&out, &n), a->talk = open_memstream(&talk, &m);
    kv_status st = command(a, &err);
    fclose(a->out), fclose(a->talk);
    free(talk);
    if (st) free(out), out = NULL;
    return out;
}

static kv_analysis on(const char *db, kv_output format)
{
    kv_analysis a = kv_analysis_defaults();
    a.db = db, a.format = format;
    return a;
}

static double cell(const kv_sheet *s, size_t row, const char *col)
{
    return kv_cell_number(kv_sheet_at(s, row, kv_sheet_find(s, col)));
}

static void test_numbers(void)
{
    const char *path = kv_in_dir(dir, "results.db");
    make_db(path, false);
    kv_db *db = NULL;
    kv_selection s = {0};
    kv_sheet t = {0};
    kv_group_note note;
    kv_analysis a = on(path, KV_OUT_TABLE);
    CHECK(!kv_analysis_open(&a, &db, &s, &err) && !kv_selection_metric(db, &s, NULL, kv_default_metrics, &err));
    CHECK(s.metric && !strcmp(s.metric, "layer_error"));
    CHECK(!kv_curve_load(db, &s, &t, &note, &err) && t.n_row == 6);
    /* full, snapkv 10%, snapkv 50%, cake, oracle, oracle-global */
    CHECK(!strcmp(kv_cell_text(kv_sheet_at(&t, 1, kv_sheet_find(&t, "label"))), "snapkv"));
    CHECK(kv_close(cell(&t, 1, "mean"), 0.3, 1e-12, 0) && cell(&t, 1, "bytes") == 400 && cell(&t, 1, "frac") == 0.1);
    CHECK(kv_close(cell(&t, 1, "low"), 0.2, 1e-12, 0) && kv_close(cell(&t, 1, "high"), 0.4, 1e-12, 0));
    CHECK(cell(&t, 1, "n") == 2 && cell(&t, 2, "bytes") == 2000 && kv_close(cell(&t, 2, "mean"), 0.03, 1e-12, 0));
    CHECK(kv_close(cell(&t, 3, "mean"), 0.2, 1e-12, 0) && cell(&t, 3, "overspent") == 0.5 &&
          cell(&t, 3, "bytes") == 480);
    kv_sheet_free(&t);
    CHECK(!kv_selection_budget(db, &s, &err) && !strcmp(s.budget, "10%"));
    CHECK(!kv_selection_model(db, &s, &err) && !strcmp(s.model, "model"));
    kv_selection_free(&s);
    kv_db_close(db);

    char *out = run(kv_cmd_summary, &a);
    CHECK(out && strstr(out, "layer_error (relative), lower is better"));
    /* cake moves slots between layers, so its bound is the global oracle; snapkv's is the oracle of even counts */
    CHECK(out && strstr(out, "cake           0.2000  [0.1000, 0.3000]   12.0%  0.000  2  0.0300  global    *?"));
    CHECK(out && strstr(out, "snapkv         0.3000  [0.2000, 0.4000]   10.0%  0.000  2  0.1000  head"));
    CHECK(out && strstr(out, "?  cake: not verified: example"));
    CHECK(out && strstr(out, "10000 resamples, seed 1"));
    CHECK(out && strstr(out, "oracle-global") < strstr(out, "cake") && strstr(out, "cake") < strstr(out, "snapkv"));
    free(out);

    a.format = KV_OUT_JSON;
    out = run(kv_cmd_summary, &a);
    json_t *j = out ? json_loads(out, 0, NULL) : NULL;
    CHECK(json_array_size(json_object_get(j, "rows")) == 6);
    CHECK(json_integer_value(json_object_get(json_object_get(j, "interval"), "seed")) == 1);
    json_decref(j);
    free(out);

    const char *one[] = {"cake"}, *code[] = {"code"};
    a.policies = (kv_list){one, 1}; /* the oracle stands beside it all the same */
    a.format = KV_OUT_CSV;
    out = run(kv_cmd_summary, &a);
    CHECK(out && strstr(out, ",global,oracle-global,0.03,10000,1\n") && !strstr(out, "snapkv"));
    free(out);
    a.categories = (kv_list){code, 1}; /* one prompt: no interval */
    out = run(kv_cmd_curve, &a);
    CHECK(out && strstr(out, ",,,1,0,cake,0,0,,,10000,1\n"));
    free(out);

    a = on(path, KV_OUT_TABLE);
    out = run(kv_cmd_layers, &a);
    CHECK(out && strstr(out, "layer  uniform  cake  oracle-global"));
    /* nominal 10% of 4000 bytes over 2 layers is 200 bytes = 20 slots; cake's 48 slots go 36 : 12 */
    CHECK(out && strstr(out, "      0     20.0  36.0           30.0"));
    CHECK(out && strstr(out, "      5     20.0  12.0           10.0"));
    free(out);

    a.format = KV_OUT_JSONL, a.what = "metric";
    out = run(kv_cmd_export, &a);
    size_t lines = 0;
    for (const char *p = out; p && *p; p++) lines += *p == '\n';
    CHECKF(lines == 36, "%zu lines", lines);
    CHECK(out && strstr(out, "\"layer\": 5, \"head\": null, \"step\": null, \"value\": null, \"n\": 0}"));
    free(out);
    a.what = "slots", a.format = KV_OUT_CSV, a.policies = (kv_list){one, 1};
    out = run(kv_cmd_export, &a);
    CHECK(out && !strncmp(out, "run_id,layer,head,slots,bytes,read_bytes\n", 41) && strstr(out, ",0,1,18,180,180\n"));
    free(out);
    a.what = "everything";
    CHECK(!run(kv_cmd_export, &a) && strstr(err.msg, "everything"));
}

/* ---------------------------------------------------------------------------------------------- refusals */
static void expect_refusal(const char *path, const char *says)
{
    kv_db *db = NULL;
    err.msg[0] = 0;
    CHECK(kv_db_open(path, &db, &err) && !db);
    CHECKF(strstr(err.msg, says), "'%s' lacks '%s'", err.msg, says);
}

static void test_refusals(void)
{
    const char *path = kv_in_dir(dir, "bad.db");
    expect_refusal(kv_in_dir(dir, "none.db"), "No such file");
    expect_refusal(dir, "not a regular file");
    CHECK(!kv_write_file(path, "certainly not a database, whatever its name says", 48, &err));
    expect_refusal(path, "not an SQLite file");
    CHECK(!kv_write_file(path, "", 0, &err));
    expect_refusal(path, "not a results database");
    sqlite3 *db = NULL;
    unlink(path);
    CHECK(sqlite3_open(path, &db) == SQLITE_OK &&
          sqlite3_exec(db, "CREATE TABLE t (x)", NULL, NULL, NULL) == SQLITE_OK);
    sqlite3_close(db);
    expect_refusal(path, "not a results database");
    db = tiny_new_db(path);
    CHECK(sqlite3_exec(db, "PRAGMA user_version = 99", NULL, NULL, NULL) == SQLITE_OK);
    sqlite3_close(db);
    expect_refusal(path, "schema version 99");

    sqlite3_close(tiny_new_db(path)); /* right, but empty */
    kv_analysis a = on(path, KV_OUT_TABLE);
    CHECK(!run(kv_cmd_summary, &a) && strstr(err.msg, "no runs"));

    /* A database whose views are gone or never end must give one line, not a crash. */
    make_db(path, false);
    CHECK(sqlite3_open(path, &db) == SQLITE_OK &&
          sqlite3_exec(db, "DROP VIEW v_metric", NULL, NULL, NULL) == SQLITE_OK);
    sqlite3_close(db);
    CHECK(!run(kv_cmd_curve, &a) && strstr(err.msg, "v_metric"));
    struct stat sb;
    CHECK(!stat(path, &sb) && !truncate(path, sb.st_size / 2));
    CHECK(!run(kv_cmd_summary, &a) && err.msg[0]);

    make_db(path, false);
    const char *wrong[] = {"snapvk"}, *odd[] = {"full,cake:alpha=1,beta=2"}, *both[] = {"full,cake"},
               *empty[] = {"full,"};
    a.policies = (kv_list){wrong, 1};
    CHECK(!run(kv_cmd_summary, &a) && strstr(err.msg, "no policy 'snapvk'") && strstr(err.msg, "(it has: snapkv "));
    a.policies = (kv_list){odd, 1}; /* an item with '=' before any ':' continues the spec */
    CHECK(!run(kv_cmd_summary, &a) && strstr(err.msg, "'cake:alpha=1,beta=2'"));
    a.policies = (kv_list){empty, 1};
    CHECK(!run(kv_cmd_summary, &a) && strstr(err.msg, "empty name"));
    a.policies = (kv_list){both, 1};
    char *out = run(kv_cmd_summary, &a);
    CHECK(out && strstr(out, "cake") && strstr(out, "full") && !strstr(out, "snapkv"));
    free(out);
    a = on(path, KV_OUT_TABLE);
    a.metric = "layer_eror";
    CHECK(!run(kv_cmd_curve, &a) && strstr(err.msg, "(it has: layer_error)"));

    kv_db *q = NULL;
    kv_sheet s = {0};
    CHECK(!kv_db_open(path, &q, &err));
    CHECK(kv_query(q, "it", "SELECT :nope", NULL, 0, &s, &err) == KV_EFORMAT && strstr(err.msg, ":nope"));
    CHECK(kv_query(q, "it", "SELECT 1; SELECT 2", NULL, 0, &s, &err) == KV_EFORMAT);
    CHECK(kv_query(q, "it", "DELETE FROM run", NULL, 0, &s, &err) == KV_EFORMAT);
    CHECK(kv_query(q, "it", "-- nothing", NULL, 0, &s, &err) == KV_EFORMAT);
    CHECK(!kv_query(q, "it", "SELECT 1 AS a; -- fine\n", NULL, 0, &s, &err) && s.n_row == 1);
    kv_sheet_free(&s);
    kv_db_close(q);
}

/* Only printable ASCII, UTF-8 letters and line ends: nothing a terminal obeys. */
static bool tame(const char *s)
{
    for (; *s; s++)
        if (((unsigned char)*s < 0x20 && *s != '\n') || *s == 0x7f || (unsigned char)*s == 0xff ||
            !strncmp(s, "\xe2\x80\xae", 3))
            return false;
    return true;
}

static void test_hostile(void)
{
    const char *path = kv_in_dir(dir, "evil.db");
    make_db(path, true);
    kv_analysis a = on(path, KV_OUT_TABLE);
    kv_status (*const commands[])(const kv_analysis *, kv_error *) = {kv_cmd_summary, kv_cmd_curve, kv_cmd_layers,
                                                                      kv_cmd_compare, kv_cmd_recommend};
    const char *words[] = {"compare"};
    a.baseline = "snapkv", a.margin = 10, a.rest = (kv_list){words, 1};
    const char *ten[] = {"10%"};
    a.budgets = (kv_list){ten, 1};
    for (int k = 0; k < 5; k++) {
        char *out = run(commands[k], &a);
        CHECKF(out && tame(out), "command %d: %s", k, err.msg);
        CHECK(out && strstr(out, "evil\\n\\x1b[31m'\"`touch pwned`,\\u{202e}\\xff"));
        free(out);
        a.format = KV_OUT_JSON;
        out = run(commands[k], &a);
        json_t *j = out ? json_loads(out, 0, NULL) : NULL;
        CHECK(j && strstr(out, "evil\\n\\u001b[31m'\\\"`"));
        json_decref(j);
        free(out);
        a.format = KV_OUT_TABLE;
    }
    a.what = "run", a.format = KV_OUT_CSV;
    char *out = run(kv_cmd_export, &a);
    CHECK(out && strstr(out, "\"evil\n\x1b[31m'\"\"`touch pwned`,")); /* CSV is data: as it is, quoted */
    free(out);
}

/* ---------------------------------------------------------------------------------------------- figures */
static void test_figures(void)
{
    const char *path = kv_in_dir(dir, "evil.db"); /* the hostile policy must be drawn, and nothing of it run */
    const char *const version[] = {"gnuplot", "--version", NULL};
    const char *rest[] = {"plot", "all"};
    int code;
    char *said = NULL, second[256];
    setenv("KVTRACE_PLOTS", "plots", 1);
    kv_analysis a = on(path, KV_OUT_TABLE);
    a.rest = (kv_list){rest, 2};
    a.folder = kv_in_dir(dir, "fig/one");
    bool have = !kv_spawn(version, NULL, &code, &said, &err) && !code;
    free(said);
    if (!have)
        SKIP("gnuplot is not installed");
    else {
        free(run(kv_cmd_plot, &a));
        CHECKF(!err.msg[0] || strstr(err.msg, "no data for figure"), "%s", err.msg); /* what it was not measured for */
        snprintf(second, sizeof second, "%s/fig/two", dir);
        a.folder = second;
        free(run(kv_cmd_plot, &a));
        static const char *const files[] = {"curve.svg",  "curve.png",   "curve.csv",
                                            "curves.svg", "budgets.svg", "budgets.png"};
        for (int k = 0; k < 6; k++) {
            char x[512], y[512];
            snprintf(x, sizeof x, "%s/fig/one/%s", dir, files[k]), snprintf(y, sizeof y, "%s/%s", second, files[k]);
            CHECKF(same_file(x, y), "%s differs between two runs", files[k]);
        }
        CHECK(access("pwned", F_OK) && access(kv_in_dir(dir, "fig/one/pwned"), F_OK) && access("plots/pwned", F_OK));
        uint8_t *svg = NULL;
        size_t n;
        CHECK(!kv_read_file(kv_in_dir(dir, "fig/one/curve.svg"), 1 << 24, &svg, &n, &err) &&
              strstr((char *)svg, "touch pwned"));
        CHECK(svg && strstr((char *)svg, "n = 2 prompts"));
        free(svg);
        rest[1] = "curv";
        CHECK(!run(kv_cmd_plot, &a) && strstr(err.msg, "unknown figure 'curv' (known: curve"));
        rest[1] = "heads";
        CHECK(!run(kv_cmd_plot, &a) && strstr(err.msg, "no data for figure 'heads'"));
    }
    const char *was = getenv("PATH");
    char *keep = strdup(was ? was : "");
    setenv("PATH", "/nonexistent", 1);
    rest[1] = "curve";
    CHECK(!run(kv_cmd_plot, &a) && strstr(err.msg, "gnuplot-nox"));
    setenv("PATH", keep, 1);
    free(keep);
    setenv("KVTRACE_PLOTS", dir, 1);
    CHECK(!run(kv_cmd_plot, &a) && strstr(err.msg, "KVTRACE_PLOTS"));
    unsetenv("KVTRACE_PLOTS");
    a.folder = NULL;
    CHECK(!run(kv_cmd_plot, &a) && strstr(err.msg, "-o DIR"));
}

static void remove_all(void)
{
    const char *const argv[] = {"rm", "-rf", dir, NULL};
    int code;
    char *said = NULL;
    CHECK(!kv_spawn(argv, NULL, &code, &said, &err) && !code);
    free(said);
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/kv-analyze-test-XXXXXX");
    if (!mkdtemp(dir)) return perror(dir), 1;
    test_stats();
    test_group();
    test_numbers();
    test_refusals();
    test_hostile();
    test_figures();
    remove_all();
    return kv_tally();
}
