/* cli.c - options, numbers, progress, signals (cli.h). */
#include "traces/cli.h"
#include "traces/memtext.h"
#include "traces/plain.h"

#include <ctype.h>
#include <errno.h>
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#if __has_include("build_id.h")
#include "build_id.h"
#else
#define KV_BUILD_ID "unknown cc cpu" /* compiled by hand, outside the Makefile */
#endif

/* --------------------------------------------------------------------------------------------- numbers */
bool kv_parse_u64(const char *s, uint64_t *out)
{
    uint64_t v = 0;
    if (!*s) return false;
    for (; *s; s++) {
        if (!isdigit((unsigned char)*s)) return false;
        if (__builtin_mul_overflow(v, (uint64_t)10, &v) || __builtin_add_overflow(v, (uint64_t)(*s - '0'), &v))
            return false;
    }
    return *out = v, true;
}

static locale_t c_locale;
static pthread_once_t c_locale_once = PTHREAD_ONCE_INIT;

static void c_locale_init(void)
{
    c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
}

/* A decimal number at the start of s; *end = what follows. */
static bool lead_f64(const char *s, double *out, const char **end)
{
    char *e;
    size_t n = strspn(s, "0123456789+-.eE");
    if (!n || s[0] == 'e' || s[0] == 'E') return false; /* no nan, inf, hex or blanks, which strtod would take */
    pthread_once(&c_locale_once, c_locale_init);
    double v = c_locale ? strtod_l(s, &e, c_locale) : strtod(s, &e);
    if (e == s || (size_t)(e - s) > n || !isfinite(v)) return false;
    return *out = v, *end = e, true;
}

bool kv_parse_f64(const char *s, double *out)
{
    const char *end;
    double v;
    if (!lead_f64(s, &v, &end) || *end) return false;
    return *out = v, true;
}

/* K, KiB = 1024; KB = 1000; so for M, G, T. */
bool kv_parse_bytes(const char *s, uint64_t *out)
{
    static const char *const unit = "KMGT";
    const char *end, *u;
    double v, f = 1;
    if (kv_parse_u64(s, out)) return true;
    if (!lead_f64(s, &v, &end) || v < 0) return false;
    while (*end == ' ') end++;
    if (*end && *end != 'B' && *end != 'b') {
        if (!(u = strchr(unit, toupper((unsigned char)*end)))) return false;
        end++;
        bool thousand = (*end == 'B' || *end == 'b');
        if (*end == 'i') end++;
        for (long i = 0; i <= u - unit; i++) f *= thousand ? 1000 : 1024;
    }
    if (*end == 'B' || *end == 'b') end++;
    if (*end || v * f >= 0x1p63) return false;
    return *out = (uint64_t)(v * f), true;
}

kv_status kv_parse_shard(const char *s, uint32_t *i, uint32_t *n, kv_error *err)
{
    const char *slash = strchr(s, '/');
    char first[16];
    uint64_t part, parts;
    snprintf(first, sizeof first, "%.*s", slash ? (int)(slash - s) : 0, s);
    if (!slash || !kv_parse_u64(first, &part) || !kv_parse_u64(slash + 1, &parts) || part < 1 || part > parts ||
        parts > 1000000)
        return kv_fail(err, KV_EMISUSE, "--shard '%s': want I/N with 1 <= I <= N", s);
    *i = (uint32_t)part - 1, *n = (uint32_t)parts;
    return KV_OK;
}

static size_t edit_distance(const char *a, const char *b)
{
    size_t row[65], na = strlen(a), nb = strlen(b);
    if (na > 64 || nb > 64) return 99;
    for (size_t j = 0; j <= nb; j++) row[j] = j;
    for (size_t i = 1; i <= na; i++) {
        size_t diag = row[0];
        row[0] = i;
        for (size_t j = 1; j <= nb; j++) {
            size_t best = diag + (a[i - 1] != b[j - 1]);
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            diag = row[j];
            row[j] = best;
        }
    }
    return row[nb];
}

const char *kv_nearest(const char *s, const char *const *names, size_t n)
{
    const char *best = NULL;
    size_t least = 99, len = strlen(s);
    for (size_t i = 0; i < n; i++) {
        size_t d = edit_distance(s, names[i]);
        /* An unfinished name is near, whatever is missing. */
        if (len >= 3 && !strncmp(s, names[i], len)) d = 1;
        if (d < least) least = d, best = names[i];
    }
    return least <= (len <= 3 ? 1 : 1 + len / 4) ? best : NULL;
}

/* --------------------------------------------------------------------------------------------- options */
void kv_list_free(kv_list *l)
{
    free(l->v);
    l->v = NULL, l->n = 0;
}

static kv_status list_push(kv_list *l, const char *s, kv_error *err)
{
    const char **v = realloc(l->v, (l->n + 1) * sizeof *v);
    if (!v) return kv_fail(err, KV_ENOMEM, "out of memory");
    l->v = v;
    l->v[l->n++] = s;
    return KV_OK;
}

static kv_status set_option(const kv_opt *o, const char *v, kv_error *err)
{
    uint64_t u = 0;
    double d = 0;
    switch (o->kind) {
    case KV_OPT_FLAG: *(bool *)o->to = true; return KV_OK;
    case KV_OPT_STR: *(const char **)o->to = v; return KV_OK;
    case KV_OPT_LIST: return list_push(o->to, v, err);
    case KV_OPT_U32:
        if (!kv_parse_u64(v, &u) || u > UINT32_MAX)
            return kv_fail(err, KV_EMISUSE, "--%s '%s': not a whole number from 0 to 4294967295", o->name, v);
        *(uint32_t *)o->to = (uint32_t)u;
        return KV_OK;
    case KV_OPT_U64:
        if (!kv_parse_u64(v, &u)) return kv_fail(err, KV_EMISUSE, "--%s '%s': not a whole number", o->name, v);
        *(uint64_t *)o->to = u;
        return KV_OK;
    case KV_OPT_F64:
        if (!kv_parse_f64(v, &d)) return kv_fail(err, KV_EMISUSE, "--%s '%s': not a number", o->name, v);
        *(double *)o->to = d;
        return KV_OK;
    case KV_OPT_BYTES:
        if (!kv_parse_bytes(v, &u))
            return kv_fail(err, KV_EMISUSE, "--%s '%s': not a size in bytes (as 1000000, 64MiB, 2G)", o->name, v);
        *(uint64_t *)o->to = u;
        return KV_OK;
    }
    return KV_OK;
}

static kv_status unknown_option(const char *arg, const kv_opt *opts, kv_error *err)
{
    const char *names[128], *near;
    char bare[64];
    size_t n = 0;
    if (arg[1] != '-') return kv_fail(err, KV_EMISUSE, "unknown option '%.64s'", arg);
    snprintf(bare, sizeof bare, "%.*s", (int)strcspn(arg + 2, "="), arg + 2);
    for (; opts[n].name && n < 128; n++) names[n] = opts[n].name;
    near = kv_nearest(bare, names, n);
    if (near) return kv_fail(err, KV_EMISUSE, "unknown option '--%s', did you mean '--%s'", bare, near);
    return kv_fail(err, KV_EMISUSE, "unknown option '--%s'", bare);
}

/* One argument that begins with a dash; *i moves on when the next one is its value. */
static kv_status parse_option(int argc, char **argv, int *i, const kv_opt *opts, kv_error *err)
{
    char *arg = argv[*i];
    const kv_opt *o;
    if (arg[1] == '-') {
        size_t n = strcspn(arg + 2, "=");
        const char *value = arg[2 + n] ? arg + 3 + n : NULL;
        for (o = opts; o->name && (strncmp(o->name, arg + 2, n) || o->name[n]); o++) continue;
        if (!o->name) return unknown_option(arg, opts, err);
        if (o->kind == KV_OPT_FLAG && value) return kv_fail(err, KV_EMISUSE, "option '--%s' takes no value", o->name);
        if (o->kind != KV_OPT_FLAG && !value) {
            if (*i + 1 >= argc) return kv_fail(err, KV_EMISUSE, "option '--%s' needs a value", o->name);
            value = argv[++*i];
        }
        return set_option(o, value, err);
    }
    for (char *p = arg + 1; *p; p++) { /* -v, -vq, -ofile, -o file */
        for (o = opts; o->name && o->letter != *p; o++) continue;
        if (!o->name) return unknown_option(arg, opts, err);
        if (o->kind == KV_OPT_FLAG) {
            set_option(o, NULL, err);
            continue;
        }
        if (p[1]) return set_option(o, p + 1, err);
        if (*i + 1 >= argc) return kv_fail(err, KV_EMISUSE, "option '-%c' needs a value", *p);
        return set_option(o, argv[++*i], err);
    }
    return KV_OK;
}

kv_status kv_cli_parse(int argc, char **argv, const kv_opt *opts, kv_list *rest, kv_error *err)
{
    kv_status st = KV_OK;
    bool plain = false; /* after "--" */
    for (int i = 1; i < argc && !st; i++) {
        if (!plain && !strcmp(argv[i], "--"))
            plain = true;
        else if (!plain && argv[i][0] == '-' && argv[i][1])
            st = parse_option(argc, argv, &i, opts, err);
        else
            st = list_push(rest, argv[i], err);
    }
    return st;
}

int kv_cli_exit(const char *prog, kv_status st, const kv_error *err)
{
    bool lost = kv_text_lost();
    if (st == KV_OK) {
        if (!fflush(stdout) && !ferror(stdout) && !lost) return 0;
        fprintf(stderr, "%s: cannot write to the standard output: %s\n", prog, strerror(lost ? ENOMEM : errno));
        return 1;
    }
    fflush(stdout);
    /* messages quote names out of files */
    const char *msg = err && err->msg[0] ? err->msg : "failed";
    fprintf(stderr, "%s: ", prog);
    kv_put_plain(stderr, msg, strlen(msg));
    fputs(lost && !strstr(msg, "memory") ? " (out of memory)\n" : "\n", stderr);
    if (st == KV_EMISUSE) fprintf(stderr, "try '%s --help'\n", prog);
    return st == KV_EMISUSE ? 2 : 1;
}

const char *kv_build_id(void)
{
    return KV_BUILD_ID;
}

void kv_cli_version(const char *prog)
{
    printf("%s %s (", prog, KV_VERSION);
    for (const char *p = KV_BUILD_ID; *p; p++) *p == ' ' ? fputs(", ", stdout) : putchar(*p);
    puts(")");
}

/* -------------------------------------------------------------------------------------------- progress */
struct kv_progress {
    pthread_mutex_t lock;
    const char *what, *unit;
    double total, start, shown; /* seconds of the steady clock */
    bool visible;
};

/* NULL when there is nobody to look at it: step and end accept that. */
kv_progress *kv_progress_start(const char *what, double total, const char *unit)
{
    if (!isatty(STDERR_FILENO)) return NULL;
    kv_progress *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    pthread_mutex_init(&p->lock, NULL);
    p->what = what, p->unit = unit ? unit : "", p->total = total;
    p->start = p->shown = kv_seconds(CLOCK_MONOTONIC);
    return p;
}

static void scaled(char s[16], double v)
{
    static const char *const suffix[] = {"", "k", "M", "G", "T"};
    int i = 0;
    while (v >= 10000 && i < 4) v /= 1000, i++;
    snprintf(s, 16, v < 10 && i == 0 && v != floor(v) ? "%.1f%s" : "%.0f%s", v, suffix[i]);
}

static void span(char s[24], double sec)
{
    unsigned t = sec < 0 ? 0 : sec > 359999 ? 359999 : (unsigned)(sec + 0.5);
    if (t >= 3600)
        snprintf(s, 24, "%u:%02u:%02u", t / 3600, t / 60 % 60, t % 60);
    else
        snprintf(s, 24, "%u:%02u", t / 60, t % 60);
}

void kv_progress_step(kv_progress *p, double done, const char *note)
{
    char d[16], r[16], of[16], t[24];
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    double at = kv_seconds(CLOCK_MONOTONIC), ran = at - p->start;
    if (ran > 1 && at - p->shown >= 0.1) {
        double rate = done / ran;
        scaled(d, done), scaled(r, rate), scaled(of, p->total);
        fprintf(stderr, "\r%s %s", p->what, d);
        if (p->total > 0) {
            span(t, rate > 0 ? (p->total - done) / rate : 359999);
            fprintf(stderr, " of %s %s (%.0f%%), %s %s/s, %s left", of, p->unit, 100 * done / p->total, r, p->unit, t);
        } else {
            fprintf(stderr, " %s, %s %s/s", p->unit, r, p->unit);
        }
        fprintf(stderr, "%s%.60s\033[K", note ? " " : "", kv_plain(note).s);
        p->shown = at, p->visible = true;
    }
    pthread_mutex_unlock(&p->lock);
}

void kv_progress_end(kv_progress *p)
{
    if (!p) return;
    if (p->visible) fputs("\r\033[K", stderr);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

/* --------------------------------------------------------------------------------------------- signals */
static volatile sig_atomic_t n_signal, enough = 1; /* `enough` of them interrupt, one more kills */
static const char *stop_note;

static void on_signal(int sig)
{
    int e = errno;
    if (++n_signal >= enough) signal(sig, SIG_DFL);
    if (n_signal == 1 && stop_note && isatty(STDERR_FILENO) && write(STDERR_FILENO, stop_note, strlen(stop_note)) < 0)
        stop_note = NULL;
    errno = e;
}

static void catch_signals(int before)
{
    struct sigaction a = {.sa_handler = on_signal};
    sigemptyset(&a.sa_mask);
    enough = before;
    sigaction(SIGINT, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
    /* A file-size limit then is a failed write with a message, not a death. */
    signal(SIGXFSZ, SIG_IGN);
}

void kv_catch_signals(void)
{
    catch_signals(1);
}

void kv_catch_signals_between(const char *note)
{
    stop_note = note;
    catch_signals(2);
}

bool kv_interrupted(void)
{
    return n_signal >= enough;
}

bool kv_stop_wanted(void)
{
    return n_signal > 0;
}
