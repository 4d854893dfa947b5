/* fuzz.c - files for targets whose code takes paths (fuzz.h). */
#include "tests/fuzz/fuzz.h"

#include <dirent.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

void fuzz_must(bool kept, const char *promise)
{
    if (kept) return;
    fprintf(stderr, "broken: %s\n", promise);
    abort();
}

static void put_all(int fd, const uint8_t *p, size_t n)
{
    while (n) {
        ssize_t w = write(fd, p, n);
        fuzz_must(w > 0, "a scratch file can be written");
        p += w, n -= (size_t)w;
    }
}

const char *fuzz_file(const uint8_t *p, size_t n)
{
    static int fd = -1;
    static char path[40];
    if (fd >= 0) close(fd);
    fd = memfd_create("fuzz", MFD_CLOEXEC);
    fuzz_must(fd >= 0, "a file in memory can be made");
    put_all(fd, p, n);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return path;
}

static char folder[64];

static void remove_folder(void)
{
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));)
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlink(fuzz_name(e->d_name));
    if (d) closedir(d);
    rmdir(folder);
}

const char *fuzz_folder(void)
{
    if (folder[0]) return folder;
    snprintf(folder, sizeof folder, "%s/kv_fuzz_XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
    fuzz_must(mkdtemp(folder), "a folder can be made");
    atexit(remove_folder);
    return folder;
}

const char *fuzz_name(const char *name)
{
    static char path[4][400];
    static int k;
    k = (k + 1) % 4;
    snprintf(path[k], sizeof path[k], "%s/%s", fuzz_folder(), name);
    return path[k];
}

const char *fuzz_put(const char *name, const uint8_t *p, size_t n)
{
    const char *path = fuzz_name(name);
    FILE *f = fopen(path, "wbe");
    fuzz_must(f, "a scratch file can be made");
    fuzz_must(fwrite(p, 1, n, f) == n, "a scratch file can be written");
    fclose(f);
    return path;
}

fuzz_part fuzz_cut(const uint8_t **p, size_t *n)
{
    const uint8_t *zero = *n ? memchr(*p, 0, *n) : NULL;
    fuzz_part part = {*p, zero ? (size_t)(zero - *p) : *n};
    size_t skip = part.n + (zero != NULL);
    *p += skip, *n -= skip;
    return part;
}

char *fuzz_text(const uint8_t **p, size_t *n)
{
    fuzz_part part = fuzz_cut(p, n);
    char *s = kv_format("%.*s", (int)part.n, (const char *)part.p);
    fuzz_must(s, "a short text fits into memory");
    return s;
}
