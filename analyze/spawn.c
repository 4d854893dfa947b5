/* spawn.c - run another program (spawn.h). */
#include "analyze/spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define SAID_MAX 4096

static void child(const char *const *argv, const char *const *env, int err_fd, int status_fd)
{
    int null = open("/dev/null", O_RDWR);
    if (null >= 0 && dup2(null, 0) >= 0 && dup2(null, 1) >= 0 && dup2(err_fd, 2) >= 0) {
        for (; env && *env; env++) putenv((char *)(uintptr_t)*env);
        execvp(argv[0], (char *const *)(uintptr_t)argv);
    }
    int e = errno;
    ssize_t n = write(status_fd, &e, sizeof e); /* the parent reads why; on success exec closes the pipe */
    _exit(n == sizeof e ? 127 : 126);
}

static void drain(int fd, char *to, size_t cap)
{
    char b[1024];
    size_t n = 0;
    ssize_t k;
    while ((k = read(fd, b, sizeof b)) > 0 || (k < 0 && errno == EINTR))
        for (ssize_t i = 0; i < k; i++)
            if (n + 1 < cap) to[n++] = b[i];
    to[n] = 0;
}

kv_status kv_spawn(const char *const *argv, const char *const *env, int *code, char **said, kv_error *err)
{
    int text[2] = {-1, -1}, why[2] = {-1, -1}, exec_errno = 0, ws = 0;
    kv_status st = KV_OK;
    *code = -1;
    *said = calloc(1, SAID_MAX);
    if (!*said) return kv_fail(err, KV_ENOMEM, "out of memory");
    if (pipe2(text, O_CLOEXEC) || pipe2(why, O_CLOEXEC)) {
        st = kv_fail(err, KV_EIO, "cannot run '%s': %s", argv[0], strerror(errno));
        goto out;
    }
    fflush(NULL); /* nothing buffered may be written twice */
    pid_t pid = fork();
    if (pid < 0) {
        st = kv_fail(err, KV_EIO, "cannot run '%s': %s", argv[0], strerror(errno));
        goto out;
    }
    if (!pid) child(argv, env, text[1], why[1]);
    close(text[1]), close(why[1]);
    text[1] = why[1] = -1;
    drain(text[0], *said, SAID_MAX);
    ssize_t n;
    while ((n = read(why[0], &exec_errno, sizeof exec_errno)) < 0 && errno == EINTR) continue;
    while (waitpid(pid, &ws, 0) < 0 && errno == EINTR) continue;
    if (n == sizeof exec_errno)
        st = kv_fail(err, exec_errno == ENOENT ? KV_EMISSING : KV_EIO, "cannot run '%s': %s", argv[0],
                     strerror(exec_errno));
    else
        *code = WIFEXITED(ws) ? WEXITSTATUS(ws) : 128 + WTERMSIG(ws);
out:
    for (int i = 0; i < 2; i++) {
        if (text[i] >= 0) close(text[i]);
        if (why[i] >= 0) close(why[i]);
    }
    return st;
}

char *kv_exe_folder(void)
{
    char path[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n <= 0) return NULL;
    path[n] = 0;
    char *slash = strrchr(path, '/');
    return slash ? strndup(path, (size_t)(slash - path)) : NULL;
}
