/* test_plugin.c - plug-ins: the shipped example and a few that read everything against brute-force twins, the engine's
 * slots on top of a plug-in, specs and their parameters, and files that must be refused with one clear line. The .so
 * files are built by the Makefile from sim/plugins/ and tests/plugins/. */
#include <sys/stat.h>
#include <unistd.h>

#include "sim/plugin.h"
#include "tests/twins.h"

static char dir[] = "/tmp/kvtest.XXXXXX";
static char *example, *plugins; /* the example, and the folder of the others */

/* ------------------------------------------------------------------------------------- twins */
static double dot(size_t n, const float *x, const float *y)
{
    double sum = 0;
    for (size_t j = 0; j < n; j++) sum += (double)x[j] * y[j];
    return sum;
}

static const float *query(const kv_world *w, size_t l, size_t h, size_t i)
{
    return w->t.q + ((l * w->H + h) * w->N + i) * w->d;
}

/* Mean attention of the last rows over the unit's heads times the mean norm of its values. */
static double vnorm(const kv_world *w, const kv_spec *s, size_t l, uint32_t u, size_t i)
{
    uint32_t first, n = kv_heads_of(w, s->granularity, u, &first), rows = s->window < w->L ? s->window : w->L;
    double a = 0, v = 0;
    for (uint32_t h = first; h < first + n; h++) {
        for (size_t r = w->L - rows; r < w->L; r++) a += kv_row(w, l, h, r)[i] / (n * rows);
        v += sqrt(dot(w->d, kv_value_at(w, l, h / w->g, i), kv_value_at(w, l, h / w->g, i))) / n;
    }
    return a * v;
}

static double everything(const kv_world *w, const kv_spec *s, size_t l, uint32_t u, size_t i)
{
    uint32_t first, n = kv_heads_of(w, s->granularity, u, &first);
    double a, b, sum = 0;
    if (sscanf(s->plugin->params, "a=%lf,b=%lf", &a, &b) != 2) return NAN;
    for (uint32_t h = first; h < first + n; h++) {
        const float *k = kv_key(w, l, h / w->g, i), *v = kv_value_at(w, l, h / w->g, i),
                    *wo = w->t.wo + l * w->H * w->d * w->H * w->d + h * w->d;
        for (size_t r = i; r < w->L; r++) sum += a * kv_row(w, l, h, r)[i];
        sum += a * kv_row(w, l, h, w->L - 1)[i];
        sum += b * dot(w->d, k, query(w, l, h, w->L - 1)) * dot(w->d, v, wo) +
               dot(w->d, k, query(w, l, h, i)) / sqrt(w->d);
    }
    return sum;
}

static double queries(const kv_world *w, const kv_spec *s, size_t l, uint32_t u, size_t i)
{
    uint32_t first, n = kv_heads_of(w, s->granularity, u, &first), rows = s->window < w->L ? s->window : w->L;
    double sum = 0;
    for (uint32_t h = first; h < first + n; h++)
        for (size_t r = w->L - rows; r < w->L; r++) sum -= dot(w->d, kv_key(w, l, h / w->g, i), query(w, l, h, r));
    return sum;
}

static double bare(const kv_world *w, const kv_spec *s, size_t l, uint32_t u, size_t i)
{
    uint32_t first;
    kv_heads_of(w, s->granularity, u, &first);
    return -(double)kv_key(w, l, first / w->g, i)[0];
}

/* The policies called plugin.NAME among the arguments, at every budget C with uniform counts: what the plan keeps is
 * the twin's C best. The others only run beside them. */
static void compare(const kv_world *w, const char *const *args, const char *name,
                    double (*twin)(const kv_world *, const kv_spec *, size_t, uint32_t, size_t), kv_count *count)
{
    kv_spec *spec = NULL;
    size_t n = 0;
    kv_plan plan;
    kv_error e = {""};
    kv_status st = KV_OK;
    for (; *args && !st; args++) st = kv_spec_parse(*args, &spec, &n, &e);
    if (!st) st = kv_plan_build(&w->scene, spec, n, 2, &plan, &e);
    CHECKF(!st, "%s", e.msg);
    for (size_t i = 0; i < n && !st; i++) {
        if (!spec[i].plugin || strcmp(spec[i].plugin->entry->name, name)) continue;
        const kv_ranking *rk = &plan.ranking[plan.ranking_of[i]];
        for (uint32_t C = 0; C <= w->L + 1; C += 1 + C / 3) {
            kv_budget_resolved c = {
                .tokens = C < w->L ? C : w->L, .real = C, .share = (double)C / w->L, .frac = (double)C / w->L};
            uint32_t counts[8 * 32];
            CHECK(!kv_plan_counts(&plan, i, &c, counts, &e));
            for (uint32_t k = 0; k < w->n_layer * rk->n_unit; k++) {
                double x[256];
                bool got[256] = {false}, want[256];
                for (uint32_t p = 0; p < w->L; p++)
                    x[p] = p + spec[i].window >= w->L ? ldexp(1e100, (int)p)
                                                      : twin(w, &spec[i], k / rk->n_unit, k % rk->n_unit, p);
                kv_gap = 1;
                kv_top(x, w->L, C, want);
                for (uint32_t p = 0; p < counts[k]; p++) got[rk->order[(size_t)k * w->L + p]] = true;
                KV_COMPARE(count, !memcmp(got, want, w->L), "%s: seed %llu, layer %u, unit %u, C %u", spec[i].canonical,
                           (unsigned long long)w->s.seed, k / rk->n_unit, k % rk->n_unit, C);
            }
        }
    }
    if (!st) kv_plan_free(&plan);
    for (size_t i = 0; i < n; i++) kv_spec_free(&spec[i]);
    free(spec);
}

static void test_twins(void)
{
    static const kv_tiny SHAPES[] = {{2, 1, 1, 4, 9, 8, true, false, 0},    {3, 6, 2, 8, 60, 50, true, false, 0},
                                     {2, 8, 1, 16, 40, 33, true, false, 0}, {2, 4, 4, 8, 30, 3, true, false, 0},
                                     {1, 4, 2, 8, 70, 64, true, false, 0},  {2, 2, 2, 4, 12, 1, true, false, 0},
                                     {2, 4, 2, 8, 48, 40, true, true, 0}};
    char *path = kv_format("%s/t.kvt", dir), *v[3], *all[3];
    kv_count a = {0}, b = {0}, c = {0}, d = {0};
    v[0] = kv_format("plugin:%s", example),
    v[1] = kv_format("plugin:%s:granularity=query_head|layer,window=1|5", example), v[2] = NULL;
    all[0] = kv_format("plugin:%s/everything.so:granularity=query_head|kv_head|layer", plugins);
    all[1] = kv_format("plugin:%s/everything.so:a=0.25|3,b=-1,window=7", plugins), all[2] = NULL;
    char *q = kv_format("plugin:%s/queries.so:window=3|9,granularity=kv_head|query_head", plugins),
         *n = kv_format("plugin:%s/bare.so:granularity=layer|kv_head,window=0|2", plugins);
    for (uint64_t seed = 1; seed <= 21; seed++) {
        kv_tiny s = SHAPES[seed % 7];
        kv_world w;
        s.seed = seed;
        if (!kv_world_open(&w, path, &s)) continue;
        compare(&w, (const char *const[]){v[0], v[1], NULL}, "vnorm", vnorm, &a);
        compare(&w, (const char *const[]){all[0], all[1], NULL}, "everything", everything, &b);
        compare(&w, (const char *const[]){"snapkv", q, NULL}, "queries", queries, &c);
        /* policies that make the layer load all there is, before and after */
        compare(&w, (const char *const[]){"h2o,criticalkv", n, all[0], "snapkv", NULL}, "bare", bare, &d);
        kv_world_close(&w);
    }
    kv_judge("example_vnorm", &a, 4000), kv_judge("everything", &b, 5000), kv_judge("queries", &c, 2000),
        kv_judge("bare", &d, 2000);
    free(path), free(v[0]), free(v[1]), free(all[0]), free(all[1]), free(q), free(n);
}

/* ------------------------------------------------------------------------------------- the engine's slots on a plug-in
 */
/* The example computes what score=window with value=norm computes, so every allocation must agree. */
static void test_slots(void)
{
    static const char *const SLOT[] = {"",
                                       "heads=ada,layers=cake,",
                                       "heads=pool,",
                                       "layers=pool,",
                                       "layers=lava,heads=safeguard,",
                                       "layers=pyramid-ffy0,heads=ada,alpha=0.5,normalize=1,",
                                       "granularity=layer,layers=cake,",
                                       "granularity=query_head,heads=ada,",
                                       "select=chunks,chunk_length=5,",
                                       "protect_sink=3,protect_recent=12,",
                                       "page=4,"};
    enum { N = sizeof SLOT / sizeof *SLOT };
    kv_tiny shape = {3, 6, 2, 8, 120, 100, true, false, 77};
    char *path = kv_format("%s/s.kvt", dir);
    kv_spec *spec = NULL;
    kv_plan plan, once;
    kv_world w;
    kv_error e = {""};
    size_t n = 0;
    kv_status st = KV_OK;
    if (!kv_world_open(&w, path, &shape)) return;
    for (int i = 0; i < N && !st; i++) {
        const char *own = strstr(SLOT[i], "granularity=query_head") ? "none" : "mean";
        char *mine = kv_format("plugin:%s:%swindow=8", example, SLOT[i]);
        char *theirs = kv_format("snapkv:%swindow=8,pooling=none,value=norm,group_reduce=%s", SLOT[i], own);
        st = kv_spec_parse(mine, &spec, &n, &e);
        if (!st) st = kv_spec_parse(theirs, &spec, &n, &e);
        CHECKF(!st && n == (size_t)(2 * i + 2), "%s: %s", mine, e.msg);
        free(mine), free(theirs);
    }
    if (!st) st = kv_plan_build(&w.scene, spec, n, 4, &plan, &e);
    CHECKF(!st, "%s", e.msg);
    if (st) return;
    CHECKF(plan.n_ranking == plan.ranking_of[n - 1] + 1 && plan.ranking_of[0] == plan.ranking_of[2] &&
               plan.ranking_of[0] == plan.ranking_of[4],
           "allocations of one plug-in share its ranking: %zu rankings", plan.n_ranking);
    for (size_t i = 0; i < n; i += 2) {
        const kv_ranking *a = &plan.ranking[plan.ranking_of[i]], *b = &plan.ranking[plan.ranking_of[i + 1]];
        CHECKF(a->n_unit == b->n_unit &&
                   !memcmp(a->order, b->order, (size_t)w.n_layer * a->n_unit * w.L * sizeof *a->order),
               "%s: another order", spec[i].canonical);
        for (uint32_t C = 0; C <= w.L; C += 7) {
            kv_budget_resolved c = {C, C, (double)C / w.L, (double)C / w.L};
            uint32_t x[64] = {0}, y[64] = {0};
            CHECK(!kv_plan_counts(&plan, i, &c, x, &e) && !kv_plan_counts(&plan, i + 1, &c, y, &e));
            CHECKF(!memcmp(x, y, sizeof x), "%s at C=%u", spec[i].canonical, C);
        }
    }
    /* alone and on one thread, the same bytes */
    CHECK(!kv_plan_build(&w.scene, spec, 1, 1, &once, &e));
    CHECK(!memcmp(once.ranking[0].order, plan.ranking[0].order, (size_t)w.n_layer * w.U * w.L * sizeof(uint32_t)));
    CHECK(!memcmp(once.ranking[0].sorted, plan.ranking[0].sorted, (size_t)w.n_layer * w.U * (w.L - 8) * sizeof(float)));
    kv_plan_free(&once), kv_plan_free(&plan);
    for (size_t i = 0; i < n; i++) kv_spec_free(&spec[i]);
    kv_world_close(&w);
    free(spec), free(path);
}

/* ------------------------------------------------------------------------------------- specs */
static void copy_file(const char *from, const char *to, size_t drop, const char *tail)
{
    uint8_t *b;
    size_t n;
    FILE *f;
    kv_error e = {""};
    if (kv_read_file(from, 1u << 28, &b, &n, &e) || !(f = fopen(to, "wb"))) {
        CHECKF(false, "%s", e.msg);
        return;
    }
    CHECK(fwrite(b, 1, n - drop * n / 10, f) == n - drop * n / 10 && fputs(tail, f) >= 0 && !fclose(f));
    free(b);
}

static void test_specs(void)
{
    kv_spec *s = NULL;
    size_t n = 0;
    kv_error e = {""};
    char *everywhere = kv_format("plugin:%s/everything.so", plugins),
         *grid = kv_format("%s:a=1|2,heads=ada,b=7", everywhere), *plain = kv_format("plugin:%s", example);
    char *again, *moved = kv_format("%s/moved:by.so", dir), *next = kv_format("%s/next.so", dir),
                 *odd = kv_format("plugin:%s:window=4", moved), hex[65];
    CHECKF(!kv_spec_parse(plain, &s, &n, &e) && n == 1, "%s", e.msg);
    CHECK(!strcmp(s[0].row->name, "plugin.vnorm") && s[0].window == 32 &&
          !strcmp(s[0].row->verified, "not verified: plug-in"));
    CHECK(!kv_sha256_file(example, hex, &e) && strstr(s[0].canonical, hex) && strstr(s[0].canonical, example));
    CHECKF(!kv_spec_parse(everywhere, &s, &n, &e) && n == 2 && strstr(s[1].canonical, ",a=1,b=0.5,"), "defaults: %s",
           n == 2 ? s[1].canonical : e.msg);
    CHECKF(!kv_spec_parse(grid, &s, &n, &e) && n == 4, "%s", e.msg);
    CHECK(strstr(s[2].canonical, ",a=1,b=7,") && strstr(s[3].canonical, ",a=2,b=7,") && s[2].heads == KV_HEADS_ADA &&
          s[3].heads == KV_HEADS_ADA);
    CHECK(strcmp(s[2].ranking_key, s[3].ranking_key));
    for (size_t i = 0; i < n; i++) { /* canonical specs parse to themselves, the pinned hash with them */
        kv_spec *back = NULL;
        size_t m = 0;
        CHECKF(!kv_spec_parse(s[i].canonical, &back, &m, &e) && m == 1 && !strcmp(back[0].canonical, s[i].canonical),
               "%s: %s", s[i].canonical, e.msg);
        for (size_t k = 0; k < m; k++) kv_spec_free(&back[k]);
        free(back);
    }
    /* the bytes are part of the identity: one more, another run, and the old spec is refused */
    copy_file(example, moved, 0, "");
    CHECKF(!kv_spec_parse(odd, &s, &n, &e) && n == 5 && s[4].window == 4, "a ':' in a path: %s", e.msg);
    copy_file(example, next, 0, "x");
    CHECK(!rename(next, moved)); /* another file, not the same one under the loader's feet */
    CHECK(!kv_spec_parse(odd, &s, &n, &e) && n == 6 && strcmp(s[4].canonical, s[5].canonical) &&
          strcmp(s[4].ranking_key, s[5].ranking_key));
    again = kv_format("%s", s[4].canonical);
    CHECKF(kv_spec_parse(again, &s, &n, &e) == KV_EMISUSE && n == 6 && strstr(e.msg, "SHA-256"), "%s", e.msg);
    for (size_t i = 0; i < n; i++) kv_spec_free(&s[i]);
    free(s), free(everywhere), free(grid), free(plain), free(again), free(moved), free(next), free(odd);
}

/* ------------------------------------------------------------------------------------- refusals */
static void refused(kv_status want, const char *word, const char *fmt, const char *path)
{
    kv_spec *s = NULL;
    size_t n = 0;
    kv_error e = {""};
    char *arg =
        kv_format("%.*s%s%s", (int)strcspn(fmt, "#"), fmt, path, fmt + strcspn(fmt, "#") + (strchr(fmt, '#') != NULL));
    kv_status st = kv_spec_parse(arg, &s, &n, &e);
    CHECKF(st == want, "%s: status %d: %s", arg, st, e.msg);
    CHECKF(strstr(e.msg, word) && !strchr(e.msg, '\n'), "%s: '%s' is not in: %s", arg, word, e.msg);
    for (size_t i = 0; i < n; i++) kv_spec_free(&s[i]);
    free(arg), free(s);
}

static void refused_here(kv_status want, const char *word, const char *file)
{
    char *path = kv_format("%s/%.*s", plugins, (int)strcspn(file, ":"), file),
         *fmt = kv_format("plugin:#%s", file + strcspn(file, ":"));
    refused(want, word, fmt, path);
    free(path), free(fmt);
}

static void test_refusals(void)
{
    char *path = kv_format("%s/file.so", dir);
    refused(KV_EMISUSE, "needs a file", "plugin:#", "");
    refused(KV_EMISUSE, "'/'", "plugin:#", "example_vnorm.so");
    refused(KV_EMISUSE, "a -p of their own", "plugin:#,snapkv", example);
    refused(KV_EIO, "none.so", "plugin:#", "./none.so");
    refused(KV_EFORMAT, "not a regular file", "plugin:#", dir);
    copy_file("LICENSE", path, 0, "");
    refused(KV_EFORMAT, "not a 64-bit shared object", "plugin:#", path);
    copy_file("LICENSE", path, 10, "");
    refused(KV_EFORMAT, "not a 64-bit shared object", "plugin:#", path);
    for (size_t tenths = 1; tenths < 10; tenths++) { /* cut short: refused, or whole enough to load; never a crash */
        kv_spec *s = NULL;
        size_t n = 0;
        kv_error e = {""};
        char *arg = kv_format("plugin:%s", path);
        unlink(path);
        copy_file(example, path, tenths, "");
        kv_status st = kv_spec_parse(arg, &s, &n, &e);
        CHECKF(st == KV_EFORMAT || (!st && n == 1), "%zu tenths missing: %s", tenths, e.msg);
        CHECK(st || tenths < 5);
        for (size_t i = 0; i < n; i++) kv_spec_free(&s[i]);
        free(s), free(arg);
    }
    refused_here(KV_EFORMAT, "no kv_plugin_entry", "no_entry.so");
    refused_here(KV_EFORMAT, "returned NULL", "null_entry.so");
    refused_here(KV_EUNSUPPORTED, "ABI 99, this program has 1", "bad_abi.so");
    refused_here(KV_EUNSUPPORTED, "8 bytes", "bad_size.so");
    refused_here(KV_EFORMAT, "name must be", "bad_name.so");
    refused_here(KV_EFORMAT, "'window'", "bad_params.so");
    refused_here(KV_EMISUSE, "unknown parameter 'c'", "everything.so:c=1");
    refused_here(KV_EMISUSE, "needs a value", "everything.so:a=");
    refused_here(KV_EMISUSE, "want two numbers", "everything.so:a=1,b=x");
    refused_here(KV_EMISUSE, "how is nan, inf, text or silent", "fails.so:how=maybe");
    refused_here(KV_EMISUSE, "window >= 1", "everything.so:window=0");
    refused_here(KV_EMISUSE, "the score is the plug-in's", "everything.so:score=knorm");
    refused_here(KV_EMISUSE, "heads='most'", "everything.so:heads=most");
    refused(KV_EMISUSE, "plugin:FILE.so", "#", "snapkv:score=plugin");
    refused(KV_EMISUSE, "plugin.NAME:file=", "#", "plugin.vnorm:window=3");
    refused(KV_EMISUSE, "is 'vnorm', not 'other'", "plugin.other:file=#", example);
    free(path);
}

/* Scores that fail while the plan is built: which layer, which unit, which position. */
static void test_failing_scores(void)
{
    static const struct {
        const char *how, *words[3];
    } CASES[] = {{"nan", {"layer 1, KV head 1, position 3", "nan", "finite"}},
                 {"inf", {"layer 1, KV head 1, position 2", "inf", "finite"}},
                 {"text", {"layer 1, KV head 1", "matrix is singular at 7", "fails.so"}},
                 {"silent", {"layer 1, KV head 1", "no reason given", "fails.so"}}};
    kv_tiny shape = {3, 4, 2, 8, 30, 20, false, false, 5};
    char *path = kv_format("%s/f.kvt", dir);
    kv_world w;
    if (!kv_world_open(&w, path, &shape)) return;
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        char *arg = kv_format("plugin:%s/fails.so:how=%s", plugins, CASES[i].how);
        kv_spec *s = NULL;
        size_t n = 0;
        kv_plan plan;
        kv_error e = {""};
        CHECKF(!kv_spec_parse(arg, &s, &n, &e) && n == 1, "%s", e.msg);
        CHECK(n == 1 && kv_plan_build(&w.scene, s, n, 2, &plan, &e) == KV_EFORMAT);
        for (int k = 0; k < 3; k++)
            CHECKF(strstr(e.msg, CASES[i].words[k]), "'%s' is not in: %s", CASES[i].words[k], e.msg);
        CHECK(!strchr(e.msg, '\n'));
        /* granularity=layer has no unit 1: the same plug-in works */
        if (n == 1)
            CHECK(!kv_spec_set(s, "granularity", "layer", &e) && !kv_spec_seal(s, &e) &&
                  !kv_plan_build(&w.scene, s, 1, 2, &plan, &e));
        kv_plan_free(&plan);
        for (size_t k = 0; k < n; k++) kv_spec_free(&s[k]);
        free(s), free(arg);
    }
    kv_world_close(&w);
    free(path);
}

int main(int argc, char **argv)
{
    const char *slash = argc ? strrchr(argv[0], '/') : NULL;
    int n = slash ? (int)(slash - argv[0]) : 0;
    example = kv_format("%.*s/../plugins/example_vnorm.so", n, argv[0]);
    plugins = kv_format("%.*s/plugins", n, argv[0]);
    if (!slash || !mkdtemp(dir)) return printf("cannot make %s, or not called by a path\n", dir), 1;
    test_twins();
    test_slots();
    test_specs();
    test_refusals();
    test_failing_scores();
    char *rm = kv_format("rm -rf %s", dir);
    if (system(rm)) printf("could not remove %s\n", dir);
    free(rm), free(example), free(plugins);
    return kv_tally();
}
