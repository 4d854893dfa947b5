/* test_compare.c - kv-analyze compare, power, recommend, heads, predict and merge on databases worked out by hand: the
 * numbers, and what is refused instead of averaged. Run from the repository root. */
#include <jansson.h>
#include <stdlib.h>

#include "analyze/analysis.h"
#include "analyze/spawn.h"
#include "analyze/stats.h"
#include "tests/tiny_db.h"

static char dir[64];
static kv_error err;

typedef kv_status command(const kv_analysis *, kv_error *);

/* The command with words behind its name, on a database, as JSON; NULL when it failed (err says why). */
static json_t *ask(command *cmd, kv_analysis a, const char *path, const char *const *words, size_t n_word)
{
    const char *rest[8] = {"command"};
    char *out = NULL, *talk = NULL;
    size_t n, m;
    for (size_t i = 0; i < n_word; i++) rest[1 + i] = words[i];
    a.db = path, a.format = KV_OUT_JSON, a.rest = (kv_list){rest, 1 + n_word};
    err.msg[0] = 0;
    a.out = open_memstream(&out, &n), a.talk = open_memstream(&talk, &m);
    kv_status st = cmd(&a, &err);
    fclose(a.out), fclose(a.talk);
    json_error_t why;
    json_t *j = st ? NULL : json_loads(out, 0, &why);
    CHECKF(st || j, "%s: %.200s", why.text, out);
    free(talk), talk = NULL;
    a.format = KV_OUT_TABLE, a.out = open_memstream(&talk, &m), a.talk = a.out; /* as text: the same verdict */
    kv_error again;
    CHECK((cmd(&a, &again) != KV_OK) == (st != KV_OK));
    fclose(a.out);
    free(out), free(talk);
    return j;
}

static void refused(command *cmd, kv_analysis a, const char *path, const char *const *words, size_t n, const char *says)
{
    json_t *j = ask(cmd, a, path, words, n);
    CHECKF(!j && strstr(err.msg, says), "'%s' lacks '%s'", err.msg, says);
    json_decref(j);
}

static json_t *row(json_t *j, const char *list, size_t i)
{
    return json_array_get(json_object_get(j, list), i);
}
static double num(json_t *r, const char *key)
{
    json_t *v = json_object_get(r, key);
    return json_is_number(v) ? json_number_value(v) : NAN;
}
static bool is(json_t *r, const char *key, const char *text)
{
    const char *s = json_string_value(json_object_get(r, key));
    return s && !strcmp(s, text);
}

static kv_analysis plain(void)
{
    return kv_analysis_defaults();
}

static const char *const A_B[] = {"a", "b"};

/* Six prompts of two families at two budgets; a is better than b by 1..6 hundredths at 10 %, equal at 50 %. */
static sqlite3 *six(const char *path)
{
    sqlite3 *db = tiny_new_db(path);
    tiny_metric(db, 1, "layer_error", "lower");
    for (int t = 1; t <= 6; t++) {
        tiny_trace(db, t, t <= 3 ? "prose" : "code");
        tiny_put(db, (tiny_run){t, "a", "10%", 0.1, .value = 0.5 - 0.01 * t});
        tiny_put(db, (tiny_run){t, "b", "10%", 0.1, .value = 0.5});
        tiny_put(db, (tiny_run){t, "a", "50%", 0.5, .value = 0.1});
        tiny_put(db, (tiny_run){t, "b", "50%", 0.5, .value = 0.1});
        tiny_put(db, (tiny_run){t, "full", "10%", 0.1, .value = 0, .bytes = 4000});
    }
    return db;
}

static void test_numbers(void)
{
    const char *path = kv_in_dir(dir, "six.db");
    sqlite3_close(six(path));
    kv_analysis a = plain();
    const char *ten[] = {"10%"};
    a.budgets = (kv_list){ten, 1};
    a.margin = 0.005;
    json_t *j = ask(kv_cmd_compare, a, path, A_B, 2), *r = row(j, "rows", 0);
    CHECK(kv_close(num(r, "difference"), -0.035, 1e-12, 0) && num(r, "n") == 6 && num(r, "families") == 2);
    CHECK(kv_close(num(r, "sd"), 0.01 * sqrt(3.5), 1e-12, 0) && kv_close(num(r, "median"), -0.035, 1e-12, 0));
    CHECK(kv_close(num(r, "d_z"), -3.5 / sqrt(3.5), 1e-9, 0) && num(r, "wins") == 6 && num(r, "losses") == 0);
    CHECK(num(r, "p") == 2.0 / 64 && num(r, "p_holm") == num(r, "p") && num(r, "rank_biserial") == -1);
    CHECK(is(r, "test", "wilcoxon, exact") && is(r, "policy", "a") && is(r, "baseline", "b") && is(r, "at", "10%"));
    CHECK(num(r, "low") < -0.035 && num(r, "high") > -0.035 && num(r, "new_low") < num(r, "new_high"));
    /* within families the means are -0.02 and -0.05, so that the spread is smaller than over all six */
    CHECK(num(r, "these_high") - num(r, "these_low") < num(r, "high") - num(r, "low"));
    CHECK(num(r, "worse_by_at_most") < -0.01 && num(r, "noninferior") == 1 && num(r, "bytes") == 400);
    CHECK(json_array_size(json_object_get(j, "by_family")) == 2 &&
          kv_close(num(row(j, "by_family", 0), "difference"), -0.05, 1e-12, 0)); /* code first */
    json_decref(j);
    a.tie = 0.025; /* 1 and 2 hundredths are ties now */
    j = ask(kv_cmd_compare, a, path, A_B, 2);
    CHECK(num(row(j, "rows", 0), "ties") == 2 && num(row(j, "rows", 0), "wins") == 4);
    json_decref(j);

    /* curves: from 10 % to 50 % both are straight in log2 bytes, so the mean difference is half of that at 10 % */
    j = ask(kv_cmd_compare, plain(), path, A_B, 2), r = row(j, "rows", 0);
    CHECK(is(r, "at", "curve") && kv_close(num(r, "difference"), -0.0175, 1e-12, 0));
    CHECK(kv_close(num(r, "log2_bytes_low"), log2(400), 1e-12, 0) &&
          kv_close(num(r, "log2_bytes_high"), log2(2000), 1e-12, 0));
    CHECK(json_array_size(json_object_get(j, "by_budget")) == 2 && num(row(j, "by_budget", 1), "band_low") == 0 &&
          num(row(j, "by_budget", 0), "band_low") < -0.045);
    json_t *again = ask(kv_cmd_compare, plain(), path, A_B, 2);
    CHECK(json_equal(j, again));
    json_decref(j), json_decref(again);

    /* Holm over two, baseline by option, `full` left out */
    a = plain(), a.budgets = (kv_list){ten, 1}, a.baseline = "b";
    sqlite3 *db = NULL;
    CHECK(sqlite3_open(path, &db) == SQLITE_OK);
    for (int t = 1; t <= 6; t++)
        tiny_put(db, (tiny_run){t, "c", "10%", 0.1, .value = 0.5 + 0.01 * (t % 2 ? 1 : -1) * t});
    sqlite3_close(db);
    j = ask(kv_cmd_compare, a, path, NULL, 0);
    CHECK(json_array_size(json_object_get(j, "rows")) == 2 && num(row(j, "rows", 0), "p_holm") == 4.0 / 64 &&
          num(row(j, "rows", 1), "p_holm") == num(row(j, "rows", 1), "p"));
    json_decref(j);

    /* power: the sd is 0.01871; a difference of 0.02 is 1.069 sd */
    a = plain(), a.budgets = (kv_list){ten, 1}, a.difference = 0.02;
    j = ask(kv_cmd_power, a, path, A_B, 2), r = row(j, "rows", 0);
    CHECKF(num(r, "prompts") == 9 && num(r, "pilot") == 6 && num(r, "prompts_low") < 9 && num(r, "prompts_high") > 9,
           "%g prompts", num(r, "prompts"));
    json_decref(j);
    refused(kv_cmd_power, a, path, A_B, 1, "two policies");
    a.difference = 0;
    refused(kv_cmd_power, a, path, A_B, 2, "--difference");
}

static void test_binary(void)
{
    const char *path = kv_in_dir(dir, "binary.db");
    sqlite3 *db = tiny_new_db(path);
    tiny_metric(db, 1, "hit", "higher");
    for (int t = 1; t <= 12; t++) { /* a hits all, b misses six */
        tiny_trace(db, t, "needle");
        tiny_put(db, (tiny_run){t, "a", "10%", 0.1, .value = 1});
        tiny_put(db, (tiny_run){t, "b", "10%", 0.1, .value = t > 6});
    }
    sqlite3_close(db);
    kv_analysis a = plain();
    const char *ten[] = {"10%"};
    a.budgets = (kv_list){ten, 1};
    json_t *j = ask(kv_cmd_compare, a, path, A_B, 2), *r = row(j, "rows", 0);
    CHECK(is(r, "test", "mcnemar, exact") && num(r, "p") == 2.0 / 64 && isnan(num(r, "rank_biserial")) &&
          num(r, "ties") == 6);
    json_decref(j);
}

/* Each of these must be refused, and pass when it is put right or allowed. */
static void test_refusals(void)
{
    const char *path = kv_in_dir(dir, "odd.db"), *ten[] = {"10%"};
    const char *const same[] = {"a", "a"}, *const wrong[] = {"a", "bb"}, *const one[] = {"a"};
    kv_analysis a = plain(), allowed = plain();
    a.budgets = allowed.budgets = (kv_list){ten, 1};
    sqlite3_close(six(path));
    refused(kv_cmd_compare, a, path, same, 2, "both sides");
    refused(kv_cmd_compare, a, path, wrong, 2, "'bb'");
    refused(kv_cmd_compare, a, path, one, 1, "two policies");
    a.margin = -1;
    refused(kv_cmd_compare, a, path, A_B, 2, "--margin");
    a.margin = NAN;

    sqlite3 *db = six(path); /* a trace that only a has */
    tiny_trace(db, 7, "prose");
    tiny_put(db, (tiny_run){7, "a", "10%", 0.1, .value = 0.4});
    sqlite3_close(db);
    refused(kv_cmd_compare, a, path, A_B, 2, "'b' has no run on trace 'trace7'");
    refused(kv_cmd_compare, plain(), path, A_B, 2, "trace7");
    allowed.common = true;
    json_t *j = ask(kv_cmd_compare, allowed, path, A_B, 2);
    CHECK(num(row(j, "rows", 0), "n") == 6);
    json_decref(j);

    db = six(path); /* a budget that only b has: the curves do not match */
    for (int t = 1; t <= 6; t++) tiny_put(db, (tiny_run){t, "b", "20%", 0.2, .value = 0.3});
    sqlite3_close(db);
    refused(kv_cmd_compare, plain(), path, A_B, 2, "at budget '20%'");
    kv_analysis common = plain();
    common.common = true;
    j = ask(kv_cmd_compare, common, path, A_B, 2);
    CHECK(kv_close(num(row(j, "rows", 0), "difference"), -0.0175, 1e-12, 0));
    json_decref(j);

    db = six(path); /* one result of another build */
    tiny_sql(db, sqlite3_mprintf("UPDATE run SET build = 'build 2' WHERE policy = 'a' AND trace_id = 4"));
    sqlite3_close(db);
    refused(kv_cmd_compare, a, path, A_B, 2, "different builds, 'build 2' and 'build 1'");
    refused(kv_cmd_power, a, path, A_B, 2, "different builds");
    kv_analysis any = a;
    any.any_build = true;
    json_decref(ask(kv_cmd_compare, any, path, A_B, 2));
    CHECK(!err.msg[0]);
    any = plain(), any.margin = 0.6;
    refused(kv_cmd_recommend, any, path, NULL, 0, "different builds");

    db = six(path); /* other rows measured */
    tiny_sql(db, sqlite3_mprintf("UPDATE run SET rows = 16 WHERE policy = 'a'"));
    sqlite3_close(db);
    refused(kv_cmd_compare, a, path, A_B, 2, "numbers of rows");

    db = six(path); /* another cut; and two variants of one name */
    tiny_sql(db, sqlite3_mprintf("UPDATE run SET cut = 'context' WHERE policy = 'a'"));
    for (int t = 1; t <= 6; t++) tiny_put(db, (tiny_run){t, "b", "10%", 0.1, .value = 0.4, .page = 16});
    sqlite3_close(db);
    const char *const by_label[] = {"a", "b page=1"};
    refused(kv_cmd_compare, a, path, A_B, 2, "several variants");
    CHECK(strstr(err.msg, "b page=16"));
    refused(kv_cmd_compare, a, path, by_label, 2, "cuts after the context");
    a.page = "16";
    const char *const full_b[] = {"full", "b"};
    refused(kv_cmd_compare, a, path, full_b, 2, "'full' is not among these runs");
    a.page = "17";
    refused(kv_cmd_compare, a, path, A_B, 2, "no page '17'");
    a.page = NULL, a.granularity = "layer";
    refused(kv_cmd_compare, a, path, A_B, 2, "no granularity 'layer'");

    db = six(path); /* one metric in two units */
    tiny_sql(db, sqlite3_mprintf(
                     "INSERT INTO metric_name VALUES (2, 'layer_error', 'relative to ||layer output||', 'lower')"));
    tiny_sql(db,
             sqlite3_mprintf("UPDATE metric SET metric_id = 2 WHERE run IN (SELECT id FROM run WHERE trace_id = 3)"));
    sqlite3_close(db);
    a = plain();
    refused(kv_cmd_compare, a, path, A_B, 2, "measured in");

    db = six(path); /* undefined for one prompt: left out and counted */
    tiny_sql(db,
             sqlite3_mprintf("UPDATE metric SET value = NULL WHERE run IN (SELECT id FROM run WHERE trace_id = 3 AND "
                             "policy = 'a')"));
    sqlite3_close(db);
    a.budgets = (kv_list){ten, 1};
    j = ask(kv_cmd_compare, a, path, A_B, 2);
    CHECK(num(row(j, "rows", 0), "n") == 5 && num(row(j, "rows", 0), "undefined") == 1);
    json_decref(j);
}

/* One prompt captured twice, and two seeds: one number per prompt. */
static void test_unit(void)
{
    const char *path = kv_in_dir(dir, "unit.db"), *ten[] = {"10%"};
    sqlite3 *db = six(path);
    tiny_trace(db, 7, "prose");
    tiny_sql(db, sqlite3_mprintf("UPDATE trace SET prompt = 'p1' WHERE trace_id = 7"));
    tiny_put(db, (tiny_run){7, "a", "10%", 0.1, .value = 0.47});
    tiny_put(db, (tiny_run){7, "b", "10%", 0.1, .value = 0.5});
    tiny_put(db, (tiny_run){2, "a", "10%", 0.1, .value = 0.46, .seed = 1}); /* with 0.48: mean 0.47 */
    sqlite3_close(db);
    kv_analysis a = plain();
    a.budgets = (kv_list){ten, 1};
    json_t *j = ask(kv_cmd_compare, a, path, A_B, 2);
    /* p1: mean of -0.01 and -0.03; p2: -0.03; then -0.03 .. -0.06 */
    CHECK(num(row(j, "rows", 0), "n") == 6 &&
          kv_close(num(row(j, "rows", 0), "difference"), -(0.02 + 0.03 + 0.03 + 0.04 + 0.05 + 0.06) / 6, 1e-12, 0));
    json_decref(j);
}

static void test_recommend(void)
{
    const char *path = kv_in_dir(dir, "recommend.db");
    static const char *const budget[] = {"5%", "10%", "20%", "50%", "100%"};
    static const double frac[] = {0.05, 0.1, 0.2, 0.5, 1}, loss[] = {0.9, 0.3, 0.4, 0.1, 0};
    sqlite3 *db = tiny_new_db(path);
    tiny_metric(db, 1, "delta_nll", "lower");
    for (int t = 1; t <= 8; t++) {
        tiny_trace(db, t, "prose");
        for (int b = 0; b < 5; b++) {
            double wobble = b == 4 ? 0 : 0.01 * t;
            tiny_put(db, (tiny_run){t, "a", budget[b], frac[b], .value = loss[b] + wobble});
            tiny_put(db, (tiny_run){t, "b", budget[b], frac[b], .value = loss[b] + 5 * wobble + (b < 4 ? 0.3 : 0)});
            tiny_put(db, (tiny_run){t, "oracle", budget[b], frac[b], .value = 0});
        }
    }
    sqlite3_close(db);
    kv_analysis a = plain();
    a.margin = 0.2;
    json_t *j = ask(kv_cmd_recommend, a, path, NULL, 0), *r = row(j, "rows", 0);
    /* 50% loses 0.145; 20% loses more than the margin, and 10%, below it, is not looked at */
    CHECK(json_array_size(json_object_get(j, "rows")) == 2 && is(r, "policy", "a") && is(r, "budget", "50%"));
    CHECK(num(r, "bytes") == 2000 && kv_close(num(r, "bytes_per_1000_tokens"), 2000 / 108.0 * 1000, 1e-9, 0));
    CHECK(num(r, "of_full") == 0.5 && kv_close(num(r, "loss"), 0.145, 1e-12, 0) && num(r, "worse_by_at_most") < 0.2);
    CHECK(is(r, "next_budget", "20%") && isnan(num(r, "next_prompts_needed")));
    r = row(j, "rows", 1); /* b never passes, though it keeps everything at 100% */
    CHECK(is(r, "policy", "b") && is(r, "verdict", "none") && is(r, "next_budget", "50%"));
    json_decref(j);
    a.margin = 0.16; /* a's loss of 0.145 is below, its bound is not far: more prompts decide */
    j = ask(kv_cmd_recommend, a, path, NULL, 0), r = row(j, "rows", 0);
    CHECK(is(r, "verdict", "none") && num(r, "next_prompts_needed") > 8 && num(r, "next_prompts_needed") < 40);
    json_decref(j);
    CHECK(sqlite3_open(path, &db) == SQLITE_OK); /* a policy with runs missing has no answer; the others have */
    tiny_put(db, (tiny_run){1, "c", "50%", 0.5, .value = 0.01});
    sqlite3_close(db);
    j = ask(kv_cmd_recommend, a, path, NULL, 0);
    CHECK(json_array_size(json_object_get(j, "rows")) == 2);
    json_decref(j);
    const char *only[] = {"c"};
    kv_analysis one = a;
    one.policies = (kv_list){only, 1};
    j = ask(kv_cmd_recommend, one, path, NULL, 0); /* by itself it is all the traces there are */
    CHECK(json_array_size(json_object_get(j, "rows")) == 1 && is(row(j, "rows", 0), "verdict", "none"));
    json_decref(j);
    a.margin = NAN;
    refused(kv_cmd_recommend, a, path, NULL, 0, "--margin");
    CHECK(sqlite3_open(path, &db) == SQLITE_OK);
    tiny_sql(db, sqlite3_mprintf("UPDATE metric_name SET name = 'odd'"));
    sqlite3_close(db);
    a.margin = 0.1;
    refused(kv_cmd_recommend, a, path, NULL, 0, "full cache's 'odd' is not known");
}

/* Two layers of four query heads and two KV heads, eight prompts; head (5, 3) of `a` loses, the others wobble. */
static void test_heads(void)
{
    const char *path = kv_in_dir(dir, "heads.db");
    sqlite3 *db = tiny_new_db(path);
    tiny_metric(db, 1, "head_error", "lower");
    for (int t = 1; t <= 8; t++) {
        tiny_trace(db, t, "prose");
        for (int p = 0; p < 3; p++) {
            static const char *const who[] = {"a", "oracle", "oracle-global"};
            long id = tiny_put(db, (tiny_run){t, who[p], "10%", 0.1, .value = 0.1});
            for (int l = 0; l < 2; l++) {
                for (int h = 0; h < 4; h++)
                    tiny_sql(db,
                             sqlite3_mprintf("INSERT INTO metric VALUES (%ld, 1, %d, %d, -1, %.17g, 8)", id, 5 * l, h,
                                             0.1 + (p             ? 0
                                                    : l && h == 3 ? 0.2 + 0.001 * t
                                                                  : (t % 2 ? 1 : -1) * 0.001 * t)));
                for (int u = 0; u < 2; u++) /* oracle-global: three quarters to layer 5, all of it to unit 1 */
                    tiny_slots(db, id, 5 * l, u, p == 2 ? (l ? u * 30 : 5) : 10);
            }
        }
    }
    sqlite3_close(db);
    json_t *j = ask(kv_cmd_heads, plain(), path, NULL, 0), *r;
    CHECK(json_array_size(json_object_get(j, "rows")) == 8 && is(j, "policy", "a") && is(j, "baseline", "oracle"));
    size_t i, sure = 0;
    json_array_foreach(json_object_get(j, "rows"), i, r)
    {
        bool hit = num(r, "layer") == 5 && num(r, "head") == 3;
        sure += num(r, "q") < 0.05;
        if (!hit) continue;
        CHECK(kv_close(num(r, "difference"), 0.2045, 1e-12, 0) && num(r, "p") == 2.0 / 256 &&
              num(r, "q") == 16.0 / 256);
        CHECK(num(r, "slots") == 10 && num(r, "baseline_slots") == 10 && num(r, "n") == 8);
    }
    CHECK(sure == 0); /* eight tests: 1/128 is no discovery any more */
    r = row(j, "allocation", 0);
    /* layers: a 1/2 1/2, oracle-global 1/4 3/4; units: 1/4 each against 1/8 1/8 0 3/4 */
    CHECK(is(r, "policy", "a") && kv_close(num(r, "mean"), 0.25, 1e-12, 0) &&
          kv_close(num(r, "moved_units"), 0.5, 1e-12, 0));
    json_decref(j);
    const char *const words[] = {"oracle-global", "a"};
    j = ask(kv_cmd_heads, plain(), path, words, 2);
    json_array_foreach(json_object_get(j, "rows"), i, r) if (num(r, "layer") == 5)
        CHECK(num(r, "slots") == (num(r, "head") < 2 ? 0 : 30));
    json_decref(j);
    CHECK(sqlite3_open(path, &db) == SQLITE_OK);
    tiny_sql(db, sqlite3_mprintf("DELETE FROM metric WHERE layer = 0 AND head = 2 AND run = 1"));
    sqlite3_close(db);
    refused(kv_cmd_heads, plain(), path, NULL, 0, "not replayed on the same traces");
    CHECK(sqlite3_open(path, &db) == SQLITE_OK);
    tiny_sql(db, sqlite3_mprintf("DELETE FROM metric WHERE layer >= 0"));
    sqlite3_close(db);
    refused(kv_cmd_heads, plain(), path, NULL, 0, "--detail head");
}

static void test_predict(void)
{
    const char *path = kv_in_dir(dir, "predict.db");
    sqlite3 *db = tiny_new_db(path);
    static const char *const who[] = {"a", "b", "c", "d", "e", "full"};
    static const double good[] = {5, 4, 3, 2, 1, 0}, swapped[] = {4, 5, 3, 2, 1, 0};
    tiny_metric(db, 1, "delta_nll", "lower");
    tiny_metric(db, 2, "perfect", "higher"); /* turned round: less of it, more loss */
    tiny_metric(db, 3, "nearly", "lower");
    tiny_metric(db, 4, "head_error", "lower");
    tiny_metric(db, 5, "closed_head_error", "lower");
    for (int t = 1; t <= 4; t++) {
        tiny_trace(db, t, t <= 2 ? "prose" : "code");
        for (int b = 0; b < 2; b++)
            for (int p = 0; p < 6; p++) {
                long id = tiny_put(
                    db, (tiny_run){t, who[p], b ? "50%" : "10%", b ? 0.5 : 0.1, .value = good[p] + 10 * !b + t});
                tiny_sql(db,
                         sqlite3_mprintf("INSERT INTO metric VALUES (%ld, 2, -1, -1, -1, %g, 8), (%ld, 3, -1, -1, -1, "
                                         "%g, 8)",
                                         id, -good[p] - 10 * !b - t, id, swapped[p] + 10 * !b + t));
                for (int l = 0; l < 2; l++) /* what layer 1 loses alone is in another order than what arrives there */
                    tiny_sql(db, sqlite3_mprintf("INSERT INTO metric VALUES (%ld, 4, %d, -1, -1, %g, 8), (%ld, 5, %d, "
                                                 "-1, -1, %g, 8)",
                                                 id, 3 * l, good[p] + 1, id, 3 * l,
                                                 (l ? 3 : 1) * ((l ? swapped : good)[p] + 1)));
            }
    }
    sqlite3_close(db);
    json_t *j = ask(kv_cmd_predict, plain(), path, NULL, 0), *r;
    size_t i, seen = 0, layers = 0;
    json_array_foreach(json_object_get(j, "rows"), i, r)
    {
        if (is(r, "scope", "layer")) {
            bool first = is(r, "name", "0");
            CHECK(first || is(r, "name", "3"));
            CHECK(kv_close(num(r, "spearman"), first ? 1 : 0.9, 1e-12, 0) && num(r, "factor") == (first ? 1 : 3));
            CHECK(num(r, "prompts") == 4 && num(r, "cells") == 40 && is(r, "target", "closed_head_error"));
            layers++;
            continue;
        }
        bool perfect = is(r, "metric", "perfect"), pooled = is(r, "scope", "pooled");
        seen += pooled;
        /* five policies, two of them swapped: tau 1 - 2/10, rho 1 - 6*2/(5*24); pooled 10 cells with two swaps */
        double tau = perfect ? 1 : pooled ? 1 - 4.0 / 45 : 0.8, rho = perfect ? 1 : pooled ? 1 - 6 * 4.0 / 990 : 0.9;
        CHECKF(kv_close(num(r, "kendall"), tau, 1e-12, 0) && kv_close(num(r, "spearman"), rho, 1e-12, 0), "%s %s",
               json_string_value(json_object_get(r, "metric")), json_string_value(json_object_get(r, "scope")));
        CHECK(num(r, "cells") == (is(r, "scope", "budget") ? 5 : 10));     /* `full` is not among them */
        if (pooled) CHECK(kv_close(num(r, "kendall_low"), tau, 1e-12, 0)); /* all prompts agree */
    }
    CHECK(seen == 2 && layers == 2);
    json_decref(j);
    kv_analysis a = plain();
    a.metric = "nearly";
    j = ask(kv_cmd_predict, a, path, NULL, 0);
    CHECK(json_array_size(json_object_get(j, "rows")) == 2 * 7);
    json_decref(j);
    a.metric = "perfekt";
    refused(kv_cmd_predict, a, path, NULL, 0, "perfect");
    sqlite3_close(six(path));
    refused(kv_cmd_predict, plain(), path, NULL, 0, "kv-sim run --model");
}

/* ---------------------------------------------------------------------------------------------- merge */
static void count(const char *path, const char *sql, int64_t want)
{
    sqlite3 *db = NULL;
    sqlite3_stmt *q = NULL;
    CHECK(sqlite3_open_v2(path, &db, SQLITE_OPEN_READONLY, NULL) == SQLITE_OK);
    bool ok = sqlite3_prepare_v2(db, sql, -1, &q, NULL) == SQLITE_OK && sqlite3_step(q) == SQLITE_ROW;
    CHECKF(ok && sqlite3_column_int64(q, 0) == want, "%s: %lld", sql, ok ? (long long)sqlite3_column_int64(q, 0) : -1);
    sqlite3_finalize(q);
    sqlite3_close(db);
}

static kv_status join(const char *x, const char *y, const char *out, bool any_build, bool first)
{
    const char *rest[] = {"merge", x, y};
    char *talk = NULL;
    size_t n;
    kv_analysis a = plain();
    a.rest = (kv_list){rest, 3}, a.folder = out, a.any_build = any_build, a.first = first;
    a.talk = open_memstream(&talk, &n);
    err.msg[0] = 0;
    kv_status st = kv_cmd_merge(&a, &err);
    fclose(a.talk);
    free(talk);
    return st;
}

static void change(const char *path, const char *sql)
{
    sqlite3 *db = NULL;
    CHECK(sqlite3_open(path, &db) == SQLITE_OK);
    tiny_sql(db, sqlite3_mprintf("PRAGMA synchronous = OFF; %s", sql));
    sqlite3_close(db);
}

/* Two databases of one world: x holds prompts 1..4, y 3..6 (3 and 4 in both), metric numbers in another order. */
static void two(const char *x, const char *y)
{
    for (int k = 0; k < 2; k++) {
        sqlite3 *db = tiny_new_db(k ? y : x);
        if (k) tiny_sql(db, sqlite3_mprintf("INSERT INTO metric_name VALUES (7, 'recall', 'share', 'higher')"));
        tiny_metric(db, 1, "layer_error", "lower");
        for (int t = k ? 3 : 1; t <= (k ? 6 : 4); t++) {
            tiny_trace(db, t, "prose");
            long id =
                tiny_put(db, (tiny_run){t, "a", "10%", 0.1, .value = 0.1 * t + (k ? 3e-9 : 0)}); /* a BLAS apart */
            tiny_sql(db, sqlite3_mprintf("UPDATE run SET run_id = printf('%%032d', %d), wanted = %d WHERE id = %ld", t,
                                         k ? 3 : 1, id));
            tiny_slots(db, id, 0, 0, 5);
            if (k) tiny_sql(db, sqlite3_mprintf("INSERT INTO metric VALUES (%ld, 7, -1, -1, -1, 0.9, 8)", id));
        }
        sqlite3_close(db);
    }
}

static void test_merge(void)
{
    char x[256], y[256], out[256];
    snprintf(x, sizeof x, "%s", kv_in_dir(dir, "x.db")), snprintf(y, sizeof y, "%s", kv_in_dir(dir, "y.db"));
    snprintf(out, sizeof out, "%s", kv_in_dir(dir, "out.db"));
    two(x, y);
    CHECKF(!join(x, y, out, false, false), "%s", err.msg);
    count(out, "SELECT count(*) FROM v_run", 6);
    count(out, "SELECT count(*) FROM v_metric WHERE metric = 'layer_error'", 6);
    count(out, "SELECT count(*) FROM v_metric WHERE metric = 'recall'", 4);
    count(out, "SELECT count(*) FROM v_slots", 6);
    count(out,
          "SELECT count(*) FROM v_metric WHERE metric = 'layer_error' AND prompt = 'p3' AND abs(value - 0.3) < 1e-12",
          1);                                                   /* first wins */
    count(out, "SELECT count(*) FROM run WHERE wanted = 3", 4); /* 3 and 4 now hold both metrics */
    count(out, "SELECT count(*) FROM v_run WHERE trace = 'trace5' AND trace_sha256 = 'sha5'", 1);
    CHECK(!join(out, y, out, false, false)); /* onto itself, and nothing new */
    count(out, "SELECT count(*) FROM v_run", 6);
    unlink(out);

    static const struct {
        const char *sql, *says;
    } conflict[] = {{"UPDATE metric SET value = value + 1e-4 WHERE run = 1 AND metric_id = 1", "layer_error is 0.3001"},
                    {"UPDATE metric SET value = NULL WHERE run = 1 AND metric_id = 1", "layer_error is undefined here"},
                    {"UPDATE run SET kept_slots = kept_slots + 1 WHERE id = 2", "another number of slots"},
                    {"UPDATE slots SET slots = 6 WHERE run = 1", "other slots in layer 0"},
                    {"UPDATE trace SET model = 'other' WHERE trace_id = 3", "another model"}};
    for (size_t i = 0; i < sizeof conflict / sizeof *conflict; i++) {
        two(x, y);
        change(y, conflict[i].sql);
        CHECK(join(x, y, out, false, false) == KV_EFORMAT);
        CHECKF(strstr(err.msg, conflict[i].says), "'%s' lacks '%s'", err.msg, conflict[i].says);
        CHECK(access(out, F_OK) && access(kv_in_dir(dir, "out.db.partial"), F_OK));
        CHECKF(!join(x, y, out, false, true), "%s", err.msg); /* --first */
        count(
            out,
            "SELECT count(*) FROM v_metric WHERE metric = 'layer_error' AND prompt = 'p3' AND abs(value - 0.3) < 1e-12",
            1);
        unlink(out);
    }
    two(x, y);
    change(y, "UPDATE run SET build = 'build 2'");
    CHECK(join(x, y, out, false, true) == KV_EFORMAT && strstr(err.msg, "--any-build") && access(out, F_OK));
    CHECK(!join(x, y, out, true, false));
    unlink(out);
    change(y, "UPDATE run SET build = 'build 1' WHERE id = 1");
    CHECK(join(y, x, out, false, false) == KV_EFORMAT && strstr(err.msg, "different builds"));
    CHECK(join(x, kv_in_dir(dir, "none.db"), out, false, false) == KV_EIO && access(out, F_OK));
    CHECK(join(x, x, dir, false, false) == KV_EIO && strstr(err.msg, "not a regular file"));
    CHECK(join(x, x, NULL, false, false) == KV_EMISUSE);
    change(y, "DROP TABLE slots");
    CHECK(join(x, y, out, true, false) && strstr(err.msg, "slots") && access(out, F_OK));
}

int main(void)
{
    const char *const argv[] = {"rm", "-rf", dir, NULL};
    int code;
    char *said = NULL;
    snprintf(dir, sizeof dir, "/tmp/kv-compare-test-XXXXXX");
    if (!mkdtemp(dir)) return perror(dir), 1;
    test_numbers();
    test_binary();
    test_refusals();
    test_unit();
    test_recommend();
    test_heads();
    test_predict();
    test_merge();
    CHECK(!kv_spawn(argv, NULL, &code, &said, &err) && !code);
    free(said);
    return kv_tally();
}
