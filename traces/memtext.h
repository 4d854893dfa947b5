/* memtext.h - text that is built piece by piece in memory. The pieces are too many to ask each whether there was memory
 * for it (open_memstream would not even say), so that is remembered for the process: nothing incomplete is given its
 * final name, and no program that made something incomplete exits with 0. JSON values are built in pieces too; where
 * jansson gets no memory the process ends with a line that says so and exit 1. */
#ifndef KV_MEMTEXT_H
#define KV_MEMTEXT_H

#include "traces/base.h"

/* A stream that appends to *text (malloc'd, a zero byte behind it) and sets *n, at every fflush and at fclose. fclose
 * is not 0 when memory was short; *text then is NULL. NULL when there is no memory for the stream. */
FILE *kv_text_stream(char **text, size_t *n);

/* True when a piece of a text (of a stream, of kv_format) got lost for want of memory, anywhere in this process so far.
 * kv_text_lose: so it was. */
bool kv_text_lost(void);
void kv_text_lose(void);

#endif
