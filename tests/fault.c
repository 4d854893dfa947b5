/* fault.c - a library to preload (tests/faults.py): one call of a kind fails, or the process dies at it.
 *
 *   KV_FAULT=KIND:N     the N-th call (from 1, since main began) of that kind fails, once
 *   KV_FAULT=KIND:N+    it and all that follow: a disk that is full, memory that is used up. The first write is a short
 * one KV_FAULT=KIND:N!    the process is killed (SIGKILL) instead of the call KV_FAULT=count      nothing fails
 *   KV_FAULT_SAYS=FILE  gets the word "fired" when it came to that, and at the end "KIND CALLS" for every kind
 *   KV_FAULT=serve      starting takes longer than most runs: every line of stdin is a run of this program in a child
 *                       (FOLDER FAULT OUT ERR SAYS ARGUMENT.., with tabs between), and stdout gets its wait status
 *
 * Kinds: alloc (malloc, calloc, realloc, aligned), open, read, write, sync (fsync, fdatasync, of files), rename, remove
 * (unlink), thread (pthread_create). Streams of fopen and stdout are made of the same calls, so that what stdio writes
 * is counted too; stderr is left alone. SQLite, zstd, jansson and the C library come here as the programs do; processes
 * that are started from here do not. time() stands still, so that equal runs write equal files. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ALLOC, OPEN, READ, WRITE, SYNC, RENAME, REMOVE, THREAD, KINDS };
static const char *const NAME[KINDS] = {"alloc", "open", "read", "write", "sync", "rename", "remove", "thread"};
static const int REASON[KINDS] = {ENOMEM, EMFILE, EIO, ENOSPC, EIO, EIO, EIO, EAGAIN};

static atomic_long calls[KINDS];
static atomic_bool armed, fired, told;
static int kind = -1;
static long nth;
static char how; /* 0, '+', '!' */
static char says[512];
static pid_t own;

static void say(const char *text)
{
    int fd = says[0] ? (int)syscall(SYS_openat, AT_FDCWD, says, O_WRONLY | O_CREAT | O_APPEND, 0666) : -1;
    if (fd < 0) return;
    syscall(SYS_write, fd, text, strlen(text));
    syscall(SYS_close, fd);
}

/* Is this the call? Sets errno then. */
static bool fails(int k)
{
    if (!atomic_load_explicit(&armed, memory_order_relaxed)) return false;
    long n = atomic_fetch_add(&calls[k], 1) + 1;
    if (k != kind || n < nth || (n > nth && how != '+') || getpid() != own) return false;
    if (!atomic_exchange(&fired, true)) say("fired\n"), atomic_store(&told, true);
    while (!atomic_load(&told)) sched_yield(); /* nobody ends the process before that is written down */
    if (how == '!') kill(own, SIGKILL);
    errno = REASON[k];
    return true;
}

/* ------------------------------------------------------------------------------------------------- memory */
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t align, size_t n);

void *malloc(size_t n)
{
    return fails(ALLOC) ? NULL : __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
    return fails(ALLOC) ? NULL : __libc_calloc(n, size);
}

void *realloc(void *p, size_t n)
{
    return fails(ALLOC) ? NULL : __libc_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n)
{
    return fails(ALLOC) ? NULL : __libc_memalign(align, n);
}

int posix_memalign(void **p, size_t align, size_t n)
{
    void *got = fails(ALLOC) ? NULL : __libc_memalign(align, n);
    if (got) *p = got;
    return got ? 0 : ENOMEM;
}

/* -------------------------------------------------------------------------------------------------- files */
int open(const char *path, int flags, ...)
{
    va_list a;
    va_start(a, flags);
    int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(a, int) : 0;
    va_end(a);
    return fails(OPEN) ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) __attribute__((alias("open")));

ssize_t read(int fd, void *to, size_t n)
{
    return fails(READ) ? -1 : syscall(SYS_read, fd, to, n);
}

ssize_t pread(int fd, void *to, size_t n, off_t at)
{
    return fails(READ) ? -1 : syscall(SYS_pread64, fd, to, n, at);
}
ssize_t pread64(int fd, void *to, size_t n, off_t at) __attribute__((alias("pread")));

/* The first failure of many is a short write. */
static size_t allowed(size_t n)
{
    bool first = !atomic_load(&fired);
    if (!fails(WRITE)) return n;
    return how == '+' && first && n > 1 ? n / 2 : 0;
}

ssize_t write(int fd, const void *from, size_t n)
{
    struct stat sb;
    bool device = fd != STDOUT_FILENO && fstat(fd, &sb) == 0 && S_ISCHR(sb.st_mode); /* /dev/null */
    size_t part = fd == STDERR_FILENO || device ? n : allowed(n);
    return n && !part ? -1 : syscall(SYS_write, fd, from, part);
}

ssize_t pwrite(int fd, const void *from, size_t n, off_t at)
{
    size_t part = allowed(n);
    return n && !part ? -1 : syscall(SYS_pwrite64, fd, from, part, at);
}
ssize_t pwrite64(int fd, const void *from, size_t n, off_t at) __attribute__((alias("pwrite")));

/* Some file systems cannot sync a folder, so that is asked for and not insisted on. */
static bool sync_fails(int fd)
{
    struct stat sb;
    return !(fstat(fd, &sb) == 0 && S_ISDIR(sb.st_mode)) && fails(SYNC);
}

int fsync(int fd)
{
    return sync_fails(fd) ? -1 : (int)syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    return sync_fails(fd) ? -1 : (int)syscall(SYS_fdatasync, fd);
}

int rename(const char *from, const char *to)
{
    return fails(RENAME) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlink(const char *path)
{
    return fails(REMOVE) ? -1 : (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int remove(const char *path)
{
    return unlink(path);
}

/* ------------------------------------------------------------------------------------------------- stdio */
enum { STREAMS = 64 };
static struct {
    FILE *f;
    int fd;
} stream[STREAMS];

static ssize_t stream_read(void *c, char *to, size_t n)
{
    return read((int)(intptr_t)c, to, n);
}

static ssize_t stream_write(void *c, const char *from, size_t n)
{
    ssize_t got = write((int)(intptr_t)c, from, n);
    return got < 0 ? 0 : got; /* as a cookie says that it failed; errno stays */
}

static int stream_seek(void *c, off64_t *at, int whence)
{
    off_t got = lseek((int)(intptr_t)c, *at, whence);
    if (got < 0) return -1;
    return *at = got, 0;
}

static int stream_close(void *c)
{
    for (int i = 0; i < STREAMS; i++)
        if (stream[i].f && stream[i].fd == (int)(intptr_t)c) stream[i].f = NULL;
    return close((int)(intptr_t)c);
}

static FILE *stream_of(int fd, const char *mode)
{
    cookie_io_functions_t io = {stream_read, stream_write, stream_seek, stream_close};
    FILE *f = fopencookie((void *)(intptr_t)fd, mode, io);
    for (int i = 0; f && i < STREAMS; i++) {
        if (stream[i].f) continue;
        stream[i].f = f, stream[i].fd = fd;
        break;
    }
    return f;
}

FILE *fopen(const char *path, const char *mode)
{
    int flags = strchr(mode, '+') ? O_RDWR : *mode == 'r' ? O_RDONLY : O_WRONLY;
    if (*mode != 'r') flags |= O_CREAT | (*mode == 'w' ? O_TRUNC : O_APPEND);
    int fd = open(path, flags | (strchr(mode, 'e') ? O_CLOEXEC : 0), 0666);
    if (fd < 0) return NULL;
    FILE *f = stream_of(fd, *mode == 'r' ? "r" : "w");
    if (!f) close(fd), errno = ENOMEM;
    return f;
}
FILE *fopen64(const char *path, const char *mode) __attribute__((alias("fopen")));

int fileno(FILE *f)
{
    for (int i = 0; i < STREAMS; i++)
        if (f && stream[i].f == f) return stream[i].fd;
    return f == stdin ? 0 : f == stdout ? 1 : f == stderr ? 2 : -1;
}

/* ------------------------------------------------------------------------------------------------- the rest */
typedef int create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

int pthread_create(pthread_t *to, const pthread_attr_t *attr, void *(*fn)(void *), void *arg)
{
    static create *real;
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return fails(THREAD) ? EAGAIN : real(to, attr, fn, arg);
}

time_t time(time_t *to)
{
    const time_t t = 1000000000;
    if (to) *to = t;
    return t;
}

static int (*real_main)(int, char **, char **);

/* One run of main with its calls counted. */
static int counted(const char *what, const char *file, int argc, char **argv, char **env)
{
    const char *colon = strchr(what, ':');
    snprintf(says, sizeof says, "%s", file);
    for (int k = 0; k < KINDS && colon; k++)
        if (strlen(NAME[k]) == (size_t)(colon - what) && !strncmp(NAME[k], what, strlen(NAME[k]))) kind = k;
    if (colon) {
        char *end;
        nth = strtol(colon + 1, &end, 10);
        how = *end;
    }
    own = getpid();
    stdout = stream_of(STDOUT_FILENO, "w");
    atomic_store(&armed, true);
    int rc = real_main(argc, argv, env);
    fflush(stdout);
    atomic_store(&armed, false);
    for (int k = 0; k < KINDS; k++) {
        char line[64];
        snprintf(line, sizeof line, "%s %ld\n", NAME[k], atomic_load(&calls[k]));
        say(line);
    }
    return rc;
}

static void child(char *line, char **argv, char **env)
{
    enum { FOLDER, FAULT, OUT, ERR, SAYS, ARGS, MOST = 128 };
    char *field[MOST + 1], *save = NULL;
    int n = 0, argc = 1;
    for (char *f = strtok_r(line, "\t\n", &save); f && n < MOST; f = strtok_r(NULL, "\t\n", &save)) field[n++] = f;
    field[n] = NULL;
    if (n < ARGS || chdir(field[FOLDER])) _exit(99);
    int null = open("/dev/null", O_RDONLY), out = open(field[OUT], O_WRONLY | O_CREAT | O_TRUNC, 0666);
    int err = open(field[ERR], O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (dup2(null, 0) || dup2(out, 1) != 1 || dup2(err, 2) != 2) _exit(99);
    close(null), close(out), close(err);
    alarm(60); /* a run that hangs dies of it */
    char *file = field[SAYS];
    for (field[SAYS] = argv[0]; field[SAYS + argc]; argc++) continue;
    int rc = counted(field[FAULT], file, argc, field + SAYS, env);
    fflush(NULL);
    _exit(rc); /* without the libraries' own endings: they take longer than the run */
}

static int serve(char **argv, char **env)
{
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, stdin) > 0) {
        int status = 0;
        pid_t pid = fork();
        if (!pid) child(line, argv, env);
        waitpid(pid, &status, 0);
        printf("%d\n", status);
        fflush(stdout);
    }
    return 0;
}

static int preloaded_main(int argc, char **argv, char **env)
{
    const char *what = getenv("KV_FAULT"), *file = getenv("KV_FAULT_SAYS");
    unsetenv("LD_PRELOAD"); /* what we start is left alone */
    if (what && !strcmp(what, "serve")) return serve(argv, env);
    return what ? counted(what, file ? file : "", argc, argv, env) : real_main(argc, argv, env);
}

typedef int start(int (*)(int, char **, char **), int, char **, void (*)(void), void (*)(void), void (*)(void), void *);

start __libc_start_main;
int __libc_start_main(int (*f)(int, char **, char **), int argc, char **argv, void (*init)(void), void (*fini)(void),
                      void (*ld)(void), void *end)
{
    start *real;
    *(void **)&real = dlsym(RTLD_NEXT, "__libc_start_main");
    real_main = f;
    return real(preloaded_main, argc, argv, init, fini, ld, end);
}
