/* blas.c - OpenBLAS, told once to leave threads to us: its own would fight ours, and the split would decide the bytes.
 */
#include "kernels/blas.h"

#include <cblas.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void one_thread(void)
{
    openblas_set_num_threads(1);
}

void kv_blas_one_thread(void)
{
    pthread_once(&once, one_thread);
}

/* OpenBLAS's own pool of buffers, exported and not declared; another BLAS may have none. */
__attribute__((weak)) void *blas_memory_alloc(int where);
__attribute__((weak)) void blas_memory_free(void *buffer);

#define BUFFER ((size_t)128 << 20)
enum { BUFFERS_MAX = 64 }; /* with more of them than it was built for it grows its table, and says so */

static pthread_mutex_t room_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_uint room;

static bool address_space(size_t n)
{
    void *p = mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p != MAP_FAILED) munmap(p, n);
    return p != MAP_FAILED;
}

uint32_t kv_blas_room(uint32_t threads)
{
    uint32_t want = threads < BUFFERS_MAX ? threads : BUFFERS_MAX, have = atomic_load(&room), more;
    if (have >= want || !blas_memory_alloc || !blas_memory_free) return threads;
    pthread_mutex_lock(&room_lock);
    have = atomic_load(&room);
    more = have < want ? want - have : 0;
    while (more && !address_space((have + more > 1 ? 2 : 1) * more * BUFFER)) more--;
    void *buffer[BUFFERS_MAX];
    for (uint32_t i = 0; i < (more ? have + more : 0); i++) buffer[i] = blas_memory_alloc(0);
    for (uint32_t i = 0; i < (more ? have + more : 0); i++) blas_memory_free(buffer[i]);
    atomic_store(&room, have += more);
    pthread_mutex_unlock(&room_lock);
    return have >= want ? threads : have;
}

void kv_sgemm_nt(size_t m, size_t n, size_t k, float alpha, const float *a, size_t lda, const float *b, size_t ldb,
                 float beta, float *c, size_t ldc)
{
    kv_blas_one_thread();
    if (m == 1) /* one row: read the matrix once instead of packing it */
        cblas_sgemv(CblasRowMajor, CblasNoTrans, (int)n, (int)k, alpha, b, (int)ldb, a, 1, beta, c, 1);
    else
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)m, (int)n, (int)k, alpha, a, (int)lda, b, (int)ldb,
                    beta, c, (int)ldc);
}

void kv_sgemm_nn(size_t m, size_t n, size_t k, float alpha, const float *a, size_t lda, const float *b, size_t ldb,
                 float beta, float *c, size_t ldc)
{
    kv_blas_one_thread();
    if (m == 1)
        cblas_sgemv(CblasRowMajor, CblasTrans, (int)k, (int)n, alpha, b, (int)ldb, a, 1, beta, c, 1);
    else
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)m, (int)n, (int)k, alpha, a, (int)lda, b, (int)ldb,
                    beta, c, (int)ldc);
}
