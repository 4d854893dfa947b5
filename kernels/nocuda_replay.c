/* nocuda_replay.c - the replay's kernels (exact_dev.h, walk_dev.h) in builds without nvcc, as nocuda.c. An object of
 * its own: where a device in memory (tests/fake_gpu.h) stands for the other kernels these are linked beside it. */
#include "kernels/exact_dev.h"
#include "kernels/walk_dev.h"

#define NO_DEVICE 100 /* cudaErrorNoDevice */

int kv_scores_dev(const kv_turned *t, const float *q, const float *k, float *p, struct CUstream_st *stream)
{
    (void)t, (void)q, (void)k, (void)p, (void)stream;
    return NO_DEVICE;
}

size_t kv_softmax_scratch(const kv_turned *t)
{
    (void)t;
    return 0;
}

int kv_softmax_dev(const kv_turned *t, float *p, float *sum, float *lse, void *scratch, struct CUstream_st *stream)
{
    (void)t, (void)p, (void)sum, (void)lse, (void)scratch, (void)stream;
    return NO_DEVICE;
}

size_t kv_window_stats(const kv_turned *t, uint32_t w, uint32_t n)
{
    (void)t, (void)w, (void)n;
    return 0;
}

int kv_reduce_rows_dev(const kv_turned *t, kv_row_reduce how, double gamma, uint32_t w, uint32_t n, const float *p,
                       const float *sum, float *out, size_t ld_out, float eps, double *stats,
                       struct CUstream_st *stream)
{
    (void)t, (void)how, (void)gamma, (void)w, (void)n, (void)p, (void)sum, (void)out, (void)ld_out, (void)eps;
    (void)stats, (void)stream;
    return NO_DEVICE;
}

int kv_group_heads_dev(const kv_grouping *g, size_t n, size_t ld, const float *per_head, float *score,
                       struct CUstream_st *stream)
{
    (void)g, (void)n, (void)ld, (void)per_head, (void)score, (void)stream;
    return NO_DEVICE;
}

int kv_norms_dev(size_t n_unit, size_t n, size_t d, size_t x_head, float sign, const float *x, float *score, size_t ld,
                 struct CUstream_st *stream)
{
    (void)n_unit, (void)n, (void)d, (void)x_head, (void)sign, (void)x, (void)score, (void)ld, (void)stream;
    return NO_DEVICE;
}

int kv_spread_kv_dev(size_t n_kv, size_t n_unit, size_t n, size_t ld, const float *per_kv, float *score,
                     struct CUstream_st *stream)
{
    (void)n_kv, (void)n_unit, (void)n, (void)ld, (void)per_kv, (void)score, (void)stream;
    return NO_DEVICE;
}

int kv_column_share_dev(size_t n_head, size_t n, size_t ld, bool per_row, const float *x, float *score,
                        struct CUstream_st *stream)
{
    (void)n_head, (void)n, (void)ld, (void)per_row, (void)x, (void)score, (void)stream;
    return NO_DEVICE;
}

size_t kv_rank_scratch(size_t n_unit, size_t total)
{
    (void)n_unit, (void)total;
    return 0;
}

int kv_rank_dev(size_t n_unit, const kv_rank_unit *unit, size_t total, size_t most, void *scratch,
                struct CUstream_st *stream)
{
    (void)n_unit, (void)unit, (void)total, (void)most, (void)scratch, (void)stream;
    return NO_DEVICE;
}

int kv_walk_dev(const kv_walk_set *w, size_t n_piece, float *part, double *mass, double *cmass,
                struct CUstream_st *stream)
{
    (void)w, (void)n_piece, (void)part, (void)mass, (void)cmass, (void)stream;
    return NO_DEVICE;
}

int kv_look_dev(const kv_walk_set *w, size_t n_unit, const kv_look *l, struct CUstream_st *stream)
{
    (void)w, (void)n_unit, (void)l, (void)stream;
    return NO_DEVICE;
}

int kv_full_rows_dev(size_t n_unit, size_t n_col, size_t d, const float *sum, const double *look_mass,
                     const float *look_out, double *base_mass, float *base_out, float *o, struct CUstream_st *stream)
{
    (void)n_unit, (void)n_col, (void)d, (void)sum, (void)look_mass, (void)look_out, (void)base_mass, (void)base_out,
        (void)o, (void)stream;
    return NO_DEVICE;
}

int kv_largest_dev(size_t n, const float *x, float *top, float *scratch, struct CUstream_st *stream)
{
    (void)n, (void)x, (void)top, (void)scratch, (void)stream;
    return NO_DEVICE;
}
