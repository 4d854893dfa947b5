/* wgmma.cuh - Hopper's own instructions (sm_90a): warpgroup products, bulk tensor copies, barriers in shared memory.
 *
 * Shared tiles are panels of 64 elements (128 bytes) a row, swizzled by 128 bytes, which is what a bulk copy with that
 * swizzle writes; a panel starts at a multiple of 1024 bytes. A tile with D = 128 has two panels, one behind the other.
 * kv_desc gives the descriptor of a tile; adding bytes / 16 moves it. 64 x N accumulators are
 * N/2 floats a thread, laid out per warp (16 rows) like those of mma m16n8. */
#ifndef KV_WGMMA_CUH
#define KV_WGMMA_CUH

#include "kernels/tensor.cuh"

#include <cuda.h>

/* stride: bytes from one panel to the next, used only when the panel is turned (V: rows are the summed index). */
KV_DEV uint64_t kv_desc(uint32_t addr, uint32_t stride)
{
    return (uint64_t)(addr >> 4 & 0x3fff) | (uint64_t)(stride >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}
KV_DEV void kv_wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
KV_DEV void kv_wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> KV_DEV void kv_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* Keeps the compiler from moving uses of accumulators across the asynchronous products. */
template <int N> KV_DEV void kv_hold(float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

KV_DEV void kv_bar_init(uint32_t bar, uint32_t count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
/* After the inits: make them visible to the copy engine. */
KV_DEV void kv_bar_init_done()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}
KV_DEV void kv_bar_expect(uint32_t bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
KV_DEV void kv_bar_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
KV_DEV void kv_bar_wait(uint32_t bar, uint32_t parity)
{
    asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\n"
                 "bra AGAIN;\nDONE:\n}" ::"r"(bar),
                 "r"(parity)
                 : "memory");
}
/* Box of a 3-dimensional map (element, row, head) to shared memory; completes on bar. */
KV_DEV void kv_bulk_copy(uint32_t dst, const CUtensorMap *map, uint32_t bar, uint32_t col, uint32_t row, uint32_t head)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(col), "r"(row), "r"(head)
        : "memory");
}
KV_DEV void kv_named_sync(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
KV_DEV void kv_named_arrive(int id, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int N> KV_DEV void kv_regs_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> KV_DEV void kv_regs_fewer()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* d (64 x N) = add ? d + a b : a b, 16 deep. SS: a (64 rows) and b (N rows) both from shared memory, summed index along
 * the rows: b is a tile of K or Q. RS: a from registers as in mma m16n8k16, b a turned tile: N elements of 16 rows (V).
 */
template <typename T, int N> struct kv_wgmma;

/* Accumulators d[i..] as operands, and their numbers as the instruction lists them. */
#define KV_D4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KV_D16(i) KV_D4(i), KV_D4(i + 4), KV_D4(i + 8), KV_D4(i + 12)
#define KV_D32    KV_D16(0), KV_D16(16)
#define KV_D64    KV_D32, KV_D16(32), KV_D16(48)
#define KV_D128   KV_D64, KV_D16(64), KV_D16(80), KV_D16(96), KV_D16(112)
#define KV_N32                                                                                                         \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                                           \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define KV_N64                                                                                                         \
    KV_N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                         \
           "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define KV_N128                                                                                                        \
    KV_N64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                                         \
           "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"                                          \
           "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"                              \
           "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

/* regs = N / 2 accumulators; a0.. the numbers of the operands behind them. */
#define KV_WGMMA_SS(type, N, regs, a0, a1, a2)                                                                         \
    KV_DEV static void ss(float (&d)[regs], uint64_t a, uint64_t b, int add)                                           \
    {                                                                                                                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a2 ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" KV_N##regs "}, %" #a0         \
                     ", %" #a1 ", p, 1, 1, 0, 0;\n}"                                                                   \
                     : KV_D##regs                                                                                      \
                     : "l"(a), "l"(b), "r"(add));                                                                      \
    }
#define KV_WGMMA_RS(type, N, regs, a0, a1, a2, a3, a4, a5)                                                             \
    KV_DEV static void rs(float (&d)[regs], const uint32_t (&a)[4], uint64_t b, int add)                               \
    {                                                                                                                  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a5 ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" KV_N##regs "}, {%" #a0 ",%" #a1 \
                     ",%" #a2 ",%" #a3 "}, %" #a4 ", p, 1, 1, 1;\n}"                                                   \
                     : KV_D##regs                                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                  \
    }
#define KV_WGMMA(T, type)                                                                                              \
    template <> struct kv_wgmma<T, 64> {                                                                               \
        KV_WGMMA_SS(type, 64, 32, 32, 33, 34) KV_WGMMA_RS(type, 64, 32, 32, 33, 34, 35, 36, 37)                        \
    };                                                                                                                 \
    template <> struct kv_wgmma<T, 128> {                                                                              \
        KV_WGMMA_SS(type, 128, 64, 64, 65, 66) KV_WGMMA_RS(type, 128, 64, 64, 65, 66, 67, 68, 69)                      \
    };                                                                                                                 \
    template <> struct kv_wgmma<T, 256> {                                                                              \
        KV_WGMMA_RS(type, 256, 128, 128, 129, 130, 131, 132, 133)                                                      \
    };
KV_WGMMA(__nv_bfloat16, "bf16")
KV_WGMMA(__half, "f16")

#endif
