/* walk_dev.h - the metric pass of a replay on a device: walks along rankings and looks at their checkpoints.
 * Conventions of cuda.h: device pointers, a stream, no allocation, 0 or a CUDA error code. Sums are taken in an order
 * fixed by the arguments, so the same call gives the same bytes. The definitions are kv_walk and kv_walk_compare of
 * kernels.h (CLOSE: sums of outputs in f32, of masses in double).
 *
 * p: keys as rows of ld, columns = query rows, as kv_softmax_dev leaves it: e = exp(score - largest) with sum [column],
 * so weights are e / sum. A unit is what one walk serves: n_col adjacent columns, one order, the values of one KV head.
 */
#ifndef KV_WALK_DEV_H
#define KV_WALK_DEV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

typedef struct {
    const uint32_t *order; /* NULL: entry i is key (first + i) mod n_key */
    const float *v;        /* [n_key][d] */
    uint32_t first, col;   /* column of its first row */
    uint32_t piece, check; /* its first piece; its first checkpoint among those of the call */
    uint32_t n_check;
} kv_walk_unit;
typedef struct {
    uint32_t unit, begin, end; /* entries of its order */
} kv_walk_piece;
/* All units have n_col columns; `exact_v`: values have at most 11 bits of mantissa (16-bit types), which halves a part
 * of the work. */
typedef struct {
    uint32_t n_col, d, n_key;
    size_t ld;
    const float *p;
    const uint8_t *flag; /* [n_key] */
    const kv_walk_unit *unit;
    const kv_walk_piece *piece;
    bool exact_v;
} kv_walk_set;

/* part [n_piece][n_col][d] = sum e v over each piece (f32, products of the tensor cores with e in two parts; NULL = not
 * wanted), mass, cmass [n_piece][n_col] = sum e, the same where flag. */
int kv_walk_dev(const kv_walk_set *w, size_t n_piece, float *part, double *mass, double *cmass,
                struct CUstream_st *stream);

/* Checkpoint k of a unit = its base and its pieces before step[k + 1], steps counted from its first piece; step and
 * first start at the unit's `check` (+ its number among the units: they have n_check + 1 entries a unit).
 *   mass, cmass [check][n_col]: of weights. out (NULL = not wanted) [check][n_col][d]: sum e v.
 *   with o [column][d] (the full cache's outputs, addressed by column): error2 = sum (o - o_hat)^2, dot = sum o (o -
 *   o_hat) for o_hat = sum e v / sum e; and, where slots are given, scale * (o - o_hat) as f16 into row slot * n_row +
 * r of `to` at width, for the head and row of the column, for each of slot[first[k] .. first[k + 1] - 1]. base_out
 * [column][d], base_mass [column]: sums over e of what is always visible, or NULL. d <= 1024. */
typedef struct {
    const uint32_t *step, *first, *slot;
    const float *part, *sum, *base_out, *o;
    const double *piece_mass, *piece_cmass, *base_mass;
    double *mass, *cmass, *error2, *dot;
    float *out;
    void *to;
    size_t n_row, width;
    float scale;
} kv_look;
int kv_look_dev(const kv_walk_set *w, size_t n_unit, const kv_look *l, struct CUstream_st *stream);

/* The full cache from a look at two checkpoints of every unit, one unit a KV head in order: what is always visible (the
 * first), everything (the second). look_mass [2 n_unit][n_col] of weights, look_out [2 n_unit][n_col][d] of e:
 *   base_mass [column] and base_out [column][d] of e, o [column][d] = sum e v / sum e. */
int kv_full_rows_dev(size_t n_unit, size_t n_col, size_t d, const float *sum, const double *look_mass,
                     const float *look_out, double *base_mass, float *base_out, float *o, struct CUstream_st *stream);

/* top[0] = largest |x| of n floats, as a power of two above it; x finite. scratch: 1,024 floats. */
int kv_largest_dev(size_t n, const float *x, float *top, float *scratch, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif
#endif
