/* parallel.c - threads that take numbered tasks from a counter until none is left. */
#include "kernels/parallel.h"
#include "kernels/blas.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#define THREADS_MAX 1024

typedef struct {
    atomic_size_t next;
    size_t n;
    void (*fn)(void *ctx, size_t i);
    void *ctx;
} job;

static void *work(void *arg)
{
    job *j = arg;
    for (size_t i; (i = atomic_fetch_add(&j->next, 1)) < j->n;) j->fn(j->ctx, i);
    return NULL;
}

void kv_parallel(size_t n, uint32_t threads, void (*fn)(void *ctx, size_t i), void *ctx)
{
    if (threads > n) threads = (uint32_t)n;
    if (threads > THREADS_MAX) threads = THREADS_MAX;
    if (threads > 1) threads = kv_blas_room(threads); /* 0: the caller's own, as 1 */
    pthread_t *tid = threads > 1 ? malloc((threads - 1) * sizeof *tid) : NULL;
    if (!tid) {
        for (size_t i = 0; i < n; i++) fn(ctx, i);
        return;
    }
    job j = {.n = n, .fn = fn, .ctx = ctx};
    atomic_init(&j.next, 0);
    /* Signals are for the program's own threads: Ctrl-C must not interrupt a worker. */
    sigset_t all, old;
    sigfillset(&all);
    int masked = pthread_sigmask(SIG_SETMASK, &all, &old) == 0;
    uint32_t started = 0;
    while (started < threads - 1 && pthread_create(&tid[started], NULL, work, &j) == 0) started++;
    if (masked) pthread_sigmask(SIG_SETMASK, &old, NULL);
    work(&j);
    for (uint32_t t = 0; t < started; t++) pthread_join(tid[t], NULL);
    free(tid);
}

uint32_t kv_cpu_count(void)
{
    /* The mask may be longer than cpu_set_t on large machines; the kernel says EINVAL until it fits. */
    for (int bits = 1024; bits <= 1 << 18; bits *= 2) {
        cpu_set_t *set = CPU_ALLOC(bits);
        if (!set) break;
        int n = sched_getaffinity(0, CPU_ALLOC_SIZE(bits), set) == 0 ? CPU_COUNT_S(CPU_ALLOC_SIZE(bits), set) : 0;
        CPU_FREE(set);
        if (n > 0) return (uint32_t)n;
    }
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (uint32_t)n : 1;
}
