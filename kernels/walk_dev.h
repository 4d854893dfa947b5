/* walk_dev.h - the metric pass of a replay on a device: probabilities with keys as rows, walks along rankings, looks at
 * their checkpoints. Conventions of cuda.h: device pointers, a stream, no allocation, 0 or a CUDA error code. Sums are
 * taken in an order fixed by the arguments, so the same call gives the same bytes. The definitions are kv_probs_turned,
 * kv_walk and kv_walk_compare of kernels.h (CLOSE: sums of outputs in f32, of masses in double). */
#ifndef KV_WALK_DEV_H
#define KV_WALK_DEV_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

/* Columns are query rows: column c = row c % n_row of head c / n_row, at position row0 + c % n_row. */
typedef struct {
    size_t n_key, n_col, ld; /* p is n_key rows of n_col at ld */
    uint32_t n_row, row0;
    float scale, softcap;
} kv_turned;

/* p: raw products q.k in, weights out (0 where a key is not visible); lse [n_col]. scratch: kv_turned_scratch bytes.
 * At most 524,280 keys. */
size_t kv_turned_scratch(const kv_turned *t);
int kv_turned_dev(const kv_turned *t, float *p, float *lse, void *scratch, struct CUstream_st *stream);

/* Sums over pieces of a ranking: piece i is order[piece[i] .. piece[i+1]-1] (order NULL: the identity).
 * part [n_piece][n_col][d] = sum p v, NULL = not wanted; mass [n_piece][n_col] = sum p, cmass (NULL = not wanted) the
 * same where flag[key]. p: columns from p on at ld; v [n_key][d]. Pieces of some hundred keys keep a device busy. */
int kv_walk_dev(size_t n_col, size_t d, const float *p, size_t ld, const float *v, const uint32_t *order,
                const uint8_t *flag, size_t n_piece, const uint32_t *piece, float *part, double *mass, double *cmass,
                struct CUstream_st *stream);

/* Checkpoint k = all pieces before step[k+1] and the base: mass, cmass [n_check][n_col]; out (NULL = not wanted)
 * [n_check][n_col][d] = sum p v; with o [n_col][d]: o_hat = out / mass, diff = o - o_hat as f16 [n_check][n_col][d]
 * (NULL = not wanted), error2 = sum diff^2, dot = sum o diff, before rounding. base_out [n_col][d] and base_mass
 * [n_col] may be NULL, part and o too (masses only). d <= 1024. */
typedef struct {
    size_t n_col, d, n_check;
    const uint32_t *step; /* [n_check + 1] */
    const float *part, *base_out, *o;
    const double *piece_mass, *piece_cmass, *base_mass;
    double *mass, *cmass, *error2, *dot;
    float *out;
    void *diff;
} kv_look;
int kv_look_dev(const kv_look *l, struct CUstream_st *stream);

/* to[(slot * n_row + r) * width + head * d + j] = diff[check[slot]][head * n_row + r][j] for heads 0..n_head-1, f16; 0
 * where check[slot] < 0. `to` begins at the first head's columns. */
int kv_place_diff_dev(size_t n_slot, const int32_t *check, size_t n_head, size_t n_row, size_t d, const void *diff,
                      size_t width, void *to, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
