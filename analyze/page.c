/* page.c - the frame of every HTML page, and its escaping (page.h). */
#include "analyze/page.h"
#include "traces/memtext.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdlib.h>

static const char STYLE[] =
#include "analyze/page.css.h"
    ;
static const char SCRIPT[] =
#include "analyze/page.js.h"
    ;

void kv_html_put(FILE *f, const char *s, size_t n)
{
    char *plain = NULL;
    size_t size = 0;
    FILE *m = kv_text_stream(&plain, &size);
    if (m) kv_put_plain(m, s, n);
    if (m && !fclose(m))
        for (size_t i = 0; i < size; i++) switch (plain[i]) {
            case '<': fputs("&lt;", f); break;
            case '>': fputs("&gt;", f); break;
            case '&': fputs("&amp;", f); break;
            case '"': fputs("&quot;", f); break;
            default: putc(plain[i], f);
            }
    free(plain);
}

void kv_html_puts(FILE *f, const char *s)
{
    kv_html_put(f, s, strlen(s));
}

void kv_html_format(FILE *f, const char *fmt, ...)
{
    char *s = NULL;
    va_list ap;
    va_start(ap, fmt);
    if (vasprintf(&s, fmt, ap) < 0) s = NULL, kv_text_lose();
    va_end(ap);
    if (s) kv_html_puts(f, s);
    free(s);
}

/* :name outside of quotes becomes its literal. */
void kv_html_sql(FILE *f, const char *what, const char *sql, const kv_bind *bind, size_t n_bind)
{
    char *text = NULL;
    size_t size = 0;
    FILE *m = kv_text_stream(&text, &size);
    char quote = 0;
    for (const char *p = sql; m && *p;) {
        if (quote)
            quote = *p == quote ? 0 : quote;
        else if (*p == '\'' || *p == '"')
            quote = *p;
        size_t n = 0;
        while (*p == ':' && !quote && (isalnum((unsigned char)p[n + 1]) || p[n + 1] == '_')) n++;
        size_t k = 0;
        while (n && k < n_bind && (strlen(bind[k].name) != n + 1 || memcmp(bind[k].name, p, n + 1))) k++;
        if (!n || k == n_bind)
            putc(*p++, m);
        else {
            const char *v = bind[k].text;
            fputs(v ? "'" : "NULL", m);
            for (const char *c = v; c && *c; c++) {
                if (*c == '\'') putc('\'', m); /* quotes inside are doubled */
                putc(*c, m);
            }
            if (v) putc('\'', m);
            p += n + 1;
        }
    }
    fputs("<details class=\"sql\"><summary>SQL: ", f);
    kv_html_puts(f, what);
    fputs("</summary><pre><code>", f);
    if (m && !fclose(m)) kv_html_puts(f, text);
    fputs(";</code></pre></details>\n", f);
    free(text);
}

void kv_page_begin(FILE *f, const char *title, const char *subtitle, const kv_page_section *section, size_t n)
{
    fputs("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
          "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
          "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'; img-src data:\">\n<meta name=\"color-scheme\" content=\"light dark\">\n<title>",
          f);
    kv_html_puts(f, title);
    fprintf(
        f, "</title>\n<style>\n%s</style>\n</head>\n<body>\n<a class=\"skip\" href=\"#main\">Skip to the content</a>\n",
        STYLE);
    fputs("<header>\n<h1>", f);
    kv_html_puts(f, title);
    fputs("</h1>\n<p>", f);
    kv_html_puts(f, subtitle);
    fputs("</p>\n</header>\n", f);
    if (n) {
        fputs("<nav aria-label=\"Sections\"><ul>\n", f);
        for (size_t i = 0; i < n; i++) fprintf(f, "<li><a href=\"#%s\">%s</a></li>\n", section[i].id, section[i].title);
        fputs("</ul></nav>\n", f);
    }
    fputs("<main id=\"main\">\n", f);
}

void kv_page_end(FILE *f, const char *tokens)
{
    fputs("</main>\n", f);
    if (tokens) {
        fputs("<script type=\"application/json\" id=\"tokens\">", f);
        for (const char *p = tokens; *p; p++) *p == '<' ? (void)fputs("\\u003c", f) : (void)putc(*p, f);
        fputs("</script>\n", f);
    }
    fprintf(f, "<script>\n%s</script>\n</body>\n</html>\n", SCRIPT);
}

char *kv_page_tokens(const kv_token_view *v, size_t n)
{
    char *text = NULL;
    size_t size = 0;
    FILE *m = kv_text_stream(&text, &size);
    if (!m) return NULL;
    putc('[', m);
    for (size_t i = 0; i < n; i++) {
        if (i) putc(',', m);
        kv_token_view_json(m, &v[i]);
    }
    putc(']', m);
    return fclose(m) ? free(text), NULL : text;
}

void kv_page_token_section(FILE *f)
{
    fputs(
        "<section id=\"text\">\n<h2>The prompt's own words</h2>\n"
        "<p>Each token as two kept sets treat it, over one slot (a layer and a KV head) or over many. Over many slots "
        "a token shows what most of them do; it is never called kept because a single head holds it. The background "
        "is the attention mass at stake: full-cache weight of the decoded rows, mean over the slots shown. Point at a "
        "token for its numbers.</p>\n"
        "<form id=\"pickers\" class=\"pickers\" hidden>\n"
        "<label>Prompt <select id=\"pick-trace\"></select></label>\n"
        "<label>A <select id=\"pick-a\"></select></label>\n<label>B <select id=\"pick-b\"></select></label>\n"
        "<label>Layer <select id=\"pick-layer\"></select></label>\n"
        "<label>KV head <select id=\"pick-head\"></select></label>\n</form>\n"
        "<p class=\"legend\" id=\"legend\" hidden><span class=\"both\">kept by both</span> "
        "<span class=\"a\">A only</span> <span class=\"b\">B only</span> <span class=\"none\">neither</span> "
        "<span class=\"ev\">evidence</span></p>\n"
        "<p id=\"token-summary\" role=\"status\" aria-live=\"polite\"></p>\n"
        "<div id=\"words\" class=\"words\" tabindex=\"0\" role=\"region\" aria-label=\"Text of the prompt\">"
        "<noscript>The words need JavaScript; <code>kv-analyze text</code> prints them in a "
        "terminal.</noscript></div>\n"
        "</section>\n",
        f);
}

kv_status kv_page_text(const char *path, const kv_token_view *v, size_t n, kv_error *err)
{
    char *tokens = kv_page_tokens(v, n), *page = NULL;
    size_t size = 0;
    FILE *f = tokens ? kv_text_stream(&page, &size) : NULL;
    kv_status st = KV_OK;
    if (f) {
        kv_page_begin(f, "kvtrace: kept words", v->info->model ? v->info->model : "", NULL, 0);
        kv_page_token_section(f);
        kv_page_end(f, tokens);
    }
    if (!f || fclose(f))
        st = kv_fail(err, KV_ENOMEM, "out of memory");
    else
        st = kv_write_file(path, page, size, err);
    free(tokens), free(page);
    return st;
}
