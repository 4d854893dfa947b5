/* figure.c - CSV in, SVG and PNG out, through gnuplot (figure.h). */
#include "analyze/figure.h"
#include "analyze/spawn.h"
#include "traces/memtext.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

kv_status kv_plots_folder(char **out, kv_error *err)
{
    static const char *const beside[] = {"../plots", "../../plots", "../share/kvtrace/plots"};
    const char *env = getenv("KVTRACE_PLOTS");
    char *exe = env && *env ? NULL : kv_exe_folder();
    *out = NULL;
    errno = 0;
    if (env && *env) {
        char *style = kv_format("%s/style.gp", env);
        if (style && !access(style, R_OK)) *out = realpath(env, NULL);
        free(style);
        if (errno == ENOMEM) return kv_fail(err, KV_ENOMEM, "out of memory");
        return *out ? KV_OK : kv_fail(err, KV_EMISSING, "no plots in KVTRACE_PLOTS='%s': style.gp is not there", env);
    }
    for (size_t i = 0; exe && i < sizeof beside / sizeof *beside && !*out; i++) {
        char *dir = kv_format("%s/%s", exe, beside[i]), *style = kv_format("%s/%s/style.gp", exe, beside[i]);
        if (dir && style && !access(style, R_OK)) *out = realpath(dir, NULL);
        free(dir), free(style);
    }
    kv_status st = *out              ? KV_OK
                   : errno == ENOMEM ? kv_fail(err, KV_ENOMEM, "out of memory")
                                     : kv_fail(err, KV_EMISSING,
                                               "cannot find the folder 'plots' beside '%s' (../plots, "
                                               "../share/kvtrace/plots): set KVTRACE_PLOTS",
                                               exe ? exe : "kv-analyze");
    free(exe);
    return st;
}

kv_status kv_figure_folder(const char *path, char **out, kv_error *err)
{
    char *p = strdup(path);
    *out = NULL;
    if (!p) return kv_fail(err, KV_ENOMEM, "out of memory");
    for (char *s = p + 1; *p; s++) {
        char c = *s;
        if (c && c != '/') continue;
        *s = 0;
        bool failed = mkdir(p, 0777) && errno != EEXIST;
        *s = c;
        if (failed || !c) break;
    }
    free(p);
    struct stat sb;
    if (stat(path, &sb)) return kv_fail(err, KV_EIO, "cannot make folder '%s': %s", path, strerror(errno));
    if (!S_ISDIR(sb.st_mode)) return kv_fail(err, KV_EIO, "cannot write into '%s': not a folder", path);
    *out = realpath(path, NULL);
    return *out ? KV_OK : kv_fail(err, KV_EIO, "cannot use folder '%s': %s", path, strerror(errno));
}

/* Words for titles: plain, and without what gnuplot's string variables could not show. malloc'd. */
static char *plain(const char *s)
{
    char *b = NULL;
    size_t n;
    FILE *m = kv_text_stream(&b, &n);
    if (!m) return NULL;
    kv_put_plain(m, s ? s : "", s ? strlen(s) : 0);
    return fclose(m) ? free(b), NULL : b;
}

/* The last line gnuplot said, without its "line 12:" decoration taken apart: it names file and line already. */
static void last_line(char *s)
{
    size_t n = strlen(s);
    while (n && (s[n - 1] == '\n' || s[n - 1] == ' ')) s[--n] = 0;
    char *nl = strrchr(s, '\n');
    if (nl) memmove(s, nl + 1, strlen(nl + 1) + 1);
}

static kv_status draw(const char *plots, const char *gp, const char *csv, const char *out, const char *terminal,
                      char *const *words, kv_error *err)
{
    char *partial = kv_format("%s.partial", out), *lib = kv_format("GNUPLOT_LIB=%s", plots), *said = NULL;
    int code = 0;
    kv_status st = KV_OK;
    struct stat sb;
    if (!partial || !lib) {
        st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    /* -d: nobody's ~/.gnuplot; the C locale: points in numbers. */
    const char *const argv[] = {"gnuplot", "-d",     "-c",     gp,       csv,      partial,  terminal,
                                words[0],  words[1], words[2], words[3], words[4], words[5], NULL};
    const char *const env[] = {lib, "LC_ALL=C.UTF-8", NULL};
    unlink(partial);
    st = kv_spawn(argv, env, &code, &said, err);
    if (st == KV_EMISSING)
        st = kv_fail(err, KV_EUNSUPPORTED,
                     "cannot draw '%s': gnuplot is not installed (Debian package gnuplot-nox); the data is in "
                     "'%s'",
                     out, csv);
    if (st) goto out;
    if (code || stat(partial, &sb) || !sb.st_size) {
        last_line(said);
        st = kv_fail(err, KV_EUNSUPPORTED, "cannot draw '%s': gnuplot failed: %s", out,
                     *said ? said : "it wrote nothing");
    } else if (rename(partial, out))
        st = kv_fail(err, KV_EIO, "cannot write '%s': %s", out, strerror(errno));
out:
    if (st && partial) unlink(partial);
    free(partial), free(lib), free(said);
    return st;
}

kv_status kv_figure_draw(const char *plots, const char *folder, const char *name, const char *csv, size_t n_csv,
                         const kv_figure_words *words, kv_error *err)
{
    static const char *const kind[] = {"svg", "png"};
    char *w[KV_FIGURE_WORDS] = {NULL};
    char *gp = kv_format("%s/%s.gp", plots, name), *data = kv_format("%s/%s.csv", folder, name);
    kv_status st = gp && data ? KV_OK : kv_fail(err, KV_ENOMEM, "out of memory");
    for (int i = 0; i < KV_FIGURE_WORDS; i++)
        if (!(w[i] = plain(words->word[i])) && !st) st = kv_fail(err, KV_ENOMEM, "out of memory");
    if (!st && access(gp, R_OK)) st = kv_fail(err, KV_EMISSING, "cannot draw '%s': no script '%s'", name, gp);
    if (!st) st = kv_write_file(data, csv, n_csv, err);
    for (int i = 0; i < 2 && !st; i++) {
        char *out = kv_format("%s/%s.%s", folder, name, kind[i]);
        st = out ? draw(plots, gp, data, out, kind[i], w, err) : kv_fail(err, KV_ENOMEM, "out of memory");
        free(out);
    }
    for (int i = 0; i < KV_FIGURE_WORDS; i++) free(w[i]);
    free(gp), free(data);
    return st;
}
