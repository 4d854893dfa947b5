/* page.h - one HTML file that opens from disk: escaped text, embedded style and script, no request to anywhere.
 *
 * Everything out of a database or a trace goes through kv_html_put (text and attributes) or stands as JSON in a script
 * element of a type browsers do not run, with '<' escaped; the page's content security policy forbids the rest. */
#ifndef KV_PAGE_H
#define KV_PAGE_H

#include "analyze/query.h"
#include "analyze/token_view.h"

typedef struct {
    const char *id, *title;
} kv_page_section;

/* From <!doctype> to <main>; sections make the navigation. */
void kv_page_begin(FILE *f, const char *title, const char *subtitle, const kv_page_section *section, size_t n);
/* tokens = JSON of the token views, or NULL: </main>, data, script. */
void kv_page_end(FILE *f, const char *tokens);

/* Text of an element or of an attribute in double quotes. Control bytes are shown as kv_put_plain shows them. */
void kv_html_put(FILE *f, const char *s, size_t n);
void kv_html_puts(FILE *f, const char *s);
void kv_html_format(FILE *f, const char *fmt, ...) __attribute__((format(printf, 2, 3))); /* escaped as a whole */
/* The statement as it was run, parameters written out as literals, in a <details>: paste it into sqlite3. */
void kv_html_sql(FILE *f, const char *what, const char *sql, const kv_bind *bind, size_t n_bind);

/* The section with the pickers; the words themselves are put there by the script from the JSON. */
void kv_page_token_section(FILE *f);
/* JSON of n views as kv_page_end wants it, malloc'd; NULL = out of memory. */
char *kv_page_tokens(const kv_token_view *v, size_t n);
/* A page with nothing but the token views. */
kv_status kv_page_text(const char *path, const kv_token_view *v, size_t n, kv_error *err);

#endif
