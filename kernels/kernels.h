/* kernels.h - every hot operation as a plain function on arrays.
 *
 * kv_NAME_ref is the definition: plain loops, in NAME_ref.c. kv_NAME is the fast CPU version, checked against it by
 * kernels/table.c. kv_NAME_cuda, where it exists, takes the same arguments (host pointers) and returns 0 or a CUDA
 * error code. No function here knows a trace, a policy or a file, allocates per row, prints or fails on valid input;
 * scratch memory is allocated inside once per call, and a function that could not get it returns false.
 *
 * Two classes, marked at each prototype:
 *   EXACT   fixed order of operations (explicit fused multiply-add, lanes fixed by definition, kv_expf of
 * kernels/math.h): _ref, fast and every machine give the same bytes. All that decides a kept set is EXACT. CLOSE   may
 * use BLAS and tiles of its own; agrees with _ref within the tolerance in table.c. The bytes do not depend on the
 * number of threads.
 *
 * Arrays are row-major float unless said otherwise, and do not overlap. Row r of a query block sits at position
 * row0 + r and sees key j when j <= row0 + r and (window == 0 or row0 + r - j < window). n_key counts keys from
 * position 0. score = scale * q.k, then softcap * tanh(score / softcap) when softcap > 0. */
#ifndef KV_KERNELS_H
#define KV_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    size_t n_row, n_key, d; /* query rows, keys, head size */
    size_t row0;            /* position of row 0 */
    size_t window;          /* sliding window in tokens, 0 = none */
    float scale, softcap;
} kv_attn_shape;

/* CLOSE. Attention of one query head. q [n_row][d], k v [n_key][d]; out [n_row] rows of d at stride ld_out;
 * lse [n_row] = ln sum exp(score) (natural log); stat NULL or [n_row][4] = largest p, its column (lowest on ties),
 * entropy in nats, sum of p^2. A row that sees no key has output 0, lse -infinity, stat 0. Never an n_row x n_key
 * matrix in memory. */
bool kv_attention_ref(const kv_attn_shape *s, const float *q, const float *k, const float *v, float *out, size_t ld_out,
                      float *lse, float *stat);
bool kv_attention(const kv_attn_shape *s, const float *q, const float *k, const float *v, float *out, size_t ld_out,
                  float *lse, float *stat);

/* EXACT. acc[j] += p[r][j] for every row r that sees key j, rows ascending, in double; p = exp(score - lse[r]). Two
 * calls on consecutive blocks of rows give the bytes of one call on both. */
bool kv_colsum_ref(const kv_attn_shape *s, const float *q, const float *k, const float *lse, double *acc);
bool kv_colsum(const kv_attn_shape *s, const float *q, const float *k, const float *lse, double *acc);

/* EXACT. p [n_row][n_key]: softmax rows with their own normaliser, 0 where not visible. For windows of a few hundred
 * rows. */
bool kv_probs_ref(const kv_attn_shape *s, const float *q, const float *k, float *p);
bool kv_probs(const kv_attn_shape *s, const float *q, const float *k, float *p);

/* EXACT. The same rows for n_head heads that share keys, turned: p[j][h * n_row + r], n_key rows of p at stride ld, a
 * multiple of 16 and >= n_head * n_row; the columns between are 0. Head h's queries [n_row][d] start at q + h * q_head.
 * lse[h * n_row + r] = ln sum exp(score). What a walk reads (kv_walk). */
bool kv_probs_turned_ref(const kv_attn_shape *s, size_t n_head, const float *q, size_t q_head, const float *k, float *p,
                         size_t ld, float *lse);
bool kv_probs_turned(const kv_attn_shape *s, size_t n_head, const float *q, size_t q_head, const float *k, float *p,
                     size_t ld, float *lse);

/* EXACT. order[0..n) = positions by (score descending, position ascending). NaN counts as lower than everything;
 * -0 equals +0. n < 2^32. */
bool kv_rank_ref(size_t n, const float *score, uint32_t *order);
bool kv_rank(size_t n, const float *score, uint32_t *order);

/* EXACT. The next n keys of a walk along a ranking, order[0..n) its entries at..at+n-1, for all rows at once:
 *   mass[r] += p[key][r]; cmass[r] += the same where flag[key];
 *   part[r] = fmaf(p[key][r], v[key], part[r]); after every KV_WALK_BLOCK-th entry out[r] += part[r], part[r] = 0.
 * p: rows of keys at stride ld, columns = query rows (kv_probs_turned); v [n_key][d]; mass, cmass [n_row] double; out,
 * part [n_row][d]. A step of n is the same bytes as two steps of n1 + n2 = n: checkpoints cost nothing but the look at
 * them. cmass NULL (then flag is not read) = not wanted; out NULL (then v and part are not read) = masses only. */
enum { KV_WALK_BLOCK = 64 };
void kv_walk_ref(size_t n_row, size_t d, const float *p, size_t ld, const float *v, size_t at, size_t n,
                 const uint32_t *order, const uint8_t *flag, double *mass, double *cmass, float *out, float *part);
void kv_walk(size_t n_row, size_t d, const float *p, size_t ld, const float *v, size_t at, size_t n,
             const uint32_t *order, const uint8_t *flag, double *mass, double *cmass, float *out, float *part);
/* EXACT. A look at a walk: o_hat = (out + part) / mass (0 where mass is 0), diff = o - o_hat, error2[r] = sum diff^2,
 * dot[r] = sum o diff, both in double lanes as in kv_probs. diff NULL or rows at stride ld_diff. */
void kv_walk_compare_ref(size_t n_row, size_t d, const double *mass, const float *out, const float *part,
                         const float *o, double *error2, double *dot, float *diff, size_t ld_diff);
void kv_walk_compare(size_t n_row, size_t d, const double *mass, const float *out, const float *part, const float *o,
                     double *error2, double *dot, float *diff, size_t ld_diff);

/* CLOSE. What a prefix of a ranking keeps, at all checkpoints in one pass.
 * n_row query rows q [n_row][d] with lse [n_row] of their full attention (rows of all query heads of a group may be
 * stacked); keys and values k v [n_key][d], indexed by order[0..n_order); check[0..n_check) ascending counts <=
 * n_order. base_mass [n_row], base_out [n_row][d]: mass and sum p v of what is always visible (decoded tokens), NULL =
 * none; contested NULL or [n_key] 1 = counts for contested mass. order is not read beyond the last checkpoint; v may be
 * NULL when out is. Every row sees every key of the order. At checkpoint c, with S = first check[c] of order: mass
 * [n_check][n_row] = sum_S p + base_mass (double sums); cmass NULL or [n_check][n_row] = sum of p over S with contested
 * != 0; out NULL or [n_check][n_row][d] = (sum_S p v + base_out) / mass (0 where mass is 0). */
bool kv_prefix_ref(size_t n_row, size_t d, const float *q, const float *lse, float scale, float softcap, const float *k,
                   const float *v, size_t n_order, const uint32_t *order, size_t n_check, const uint32_t *check,
                   const double *base_mass, const float *base_out, const uint8_t *contested, double *mass,
                   double *cmass, float *out);
bool kv_prefix(size_t n_row, size_t d, const float *q, const float *lse, float scale, float softcap, const float *k,
               const float *v, size_t n_order, const uint32_t *order, size_t n_check, const uint32_t *check,
               const double *base_mass, const float *base_out, const uint8_t *contested, double *mass, double *cmass,
               float *out);

/* CLOSE. norm[r] = || w x[r] ||_2 for rows x [n_row][n_in], w [n_out][n_in]: layer error through W_O. The last bits
 * of a row may depend on its number and on n_row, not on the other rows. */
bool kv_project_norm_ref(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm);
bool kv_project_norm(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm);

/* CLOSE. The same where w[o][i] is 0 for i < o (those elements are not read) and n_out <= n_in: half the products. */
bool kv_project_norm_upper_ref(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm);
bool kv_project_norm_upper(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, double *norm);
/* CLOSE. The triangular factor of w [n_out][n_in]: r [min(n_out, n_in)][n_in], 0 below its diagonal, with ||r x|| =
 * ||w x|| for every x (w = q r, the columns of q orthonormal). Work in double, about 2 n_out n_in^2 operations, as
 * long as w is not wider than high. */
bool kv_triangle_ref(size_t n_out, size_t n_in, const float *w, float *r);
bool kv_triangle(size_t n_out, size_t n_in, const float *w, float *r);

/* EXACT. norm[r] = sum over outputs of |w x[r]|: rows x [n_row][n_in], w n_out rows of n_in at stride ld_w. Each output
 * is a chain acc = fmaf(x[k], w[k], acc), k ascending; their sum in eight double lanes as in kv_probs. */
bool kv_project_l1_ref(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, size_t ld_w,
                       double *norm);
bool kv_project_l1(size_t n_row, size_t n_in, size_t n_out, const float *x, const float *w, size_t ld_w, double *norm);

/* EXACT. Scores from attention. Rows of a window: out[i] = the sum, mean, mean + gamma var (divisor n_row - 1) or
 * largest of p[r][i], n_row rows of n at stride ld, in double, rows ascending; sum and var [n] are scratch. */
typedef enum { KV_ROWS_SUM, KV_ROWS_MEAN, KV_ROWS_MEAN_VAR, KV_ROWS_MAX } kv_row_reduce;
void kv_reduce_rows(kv_row_reduce how, double gamma, size_t n_row, size_t n, const float *p, size_t ld, double *sum,
                    double *var, float *out);
/* EXACT. x[0..n) smoothed in place over `kernel` positions; tmp [n]. AVG divides by the kernel also at the ends (torch
 * counts the zero padding); MAX takes the neighbours there are. */
typedef enum { KV_POOL_NONE, KV_POOL_AVG, KV_POOL_MAX } kv_pooling;
void kv_pool(kv_pooling pooling, size_t kernel, size_t n, float *x, float *tmp);
/* EXACT. From query heads (n of each, rows of per_head at stride ld; overwritten) to units (rows of score at ld):
 * smoothing, and over the heads of a unit (NONE: a unit is one head; ALL: every unit is the mean over all heads), which
 * of them first by pool_first. tmp [n]. */
typedef enum { KV_GROUP_NONE, KV_GROUP_MEAN, KV_GROUP_MAX, KV_GROUP_SUM, KV_GROUP_ALL } kv_group_reduce;
typedef struct {
    size_t n_q_head, n_unit, kernel;
    kv_group_reduce reduce;
    kv_pooling pooling;
    bool pool_first;
} kv_grouping;
void kv_group_heads(const kv_grouping *g, size_t n, size_t ld, float *per_head, float *score, float *tmp);

/* EXACT. -sum a ln(a + eps) for a >= 0, eps > 0: terms in float, ln is kv_logf of math.h; summed in double as by
 * kv_sum_blocks. */
double kv_entropy_ref(size_t n, const float *a, float eps);
double kv_entropy(size_t n, const float *a, float eps);
/* EXACT. Columns of p, n_row rows of n at stride ld, in double, rows ascending: mean[i] = (sum of p) / n_row, sq[i] =
 * sum of (p - mean[i])^2. */
void kv_column_spread_ref(size_t n_row, size_t n, const float *p, size_t ld, double *mean, double *sq);
void kv_column_spread(size_t n_row, size_t n, const float *p, size_t ld, double *mean, double *sq);
/* EXACT. Sum of n doubles: eight lanes (as in kv_probs) in each block of KV_SUM_BLOCK, blocks in order. */
enum { KV_SUM_BLOCK = 256 };
double kv_sum_blocks(size_t n, const double *x);
/* EXACT. Sum of (a - b)^2, differences in float, squares in double lanes; diff NULL or [n] gets a - b. */
double kv_diff_squares_ref(size_t n, const float *a, const float *b, float *diff);
double kv_diff_squares(size_t n, const float *a, const float *b, float *diff);

/* CLOSE. c[m][n] = a[m][k] b[n][k]^T, rows of c at stride ldc. Weights as files store them: b is (out, in). kv_matmul
 * splits the rows of c and of b in fixed blocks over `threads`. */
bool kv_matmul_ref(size_t m, size_t n, size_t k, const float *a, const float *b, float *c, size_t ldc);
bool kv_matmul(size_t m, size_t n, size_t k, const float *a, const float *b, float *c, size_t ldc, uint32_t threads);
int kv_matmul_cuda(size_t m, size_t n, size_t k, const float *a, const float *b, float *c, size_t ldc);

/* CLOSE. y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * w, rows of n. x and y may be the same. */
void kv_rmsnorm_ref(size_t n_row, size_t n, const float *x, const float *w, float eps, float *y);
void kv_rmsnorm(size_t n_row, size_t n, const float *x, const float *w, float eps, float *y);
/* CLOSE. y[r] = (x[r] - mean) / sqrt(variance + eps) * w + b, rows of n, variance over n. x and y may be the same. */
void kv_layernorm_ref(size_t n_row, size_t n, const float *x, const float *w, const float *b, float eps, float *y);
void kv_layernorm(size_t n_row, size_t n, const float *x, const float *w, const float *b, float eps, float *y);
/* CLOSE. Rotate x [n_row][d] in place: element pairs (i, i + rot/2), i < rot/2, angle (pos0 + r) * inv_freq[i], cos and
 * sin multiplied by mscale; elements rot..d-1 stay. Angles are formed in double. */
void kv_rope_ref(size_t n_row, size_t d, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *x,
                 size_t ld);
void kv_rope(size_t n_row, size_t d, size_t rot, size_t pos0, const float *inv_freq, float mscale, float *x, size_t ld);
/* CLOSE. gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]. */
void kv_swiglu_ref(size_t n, float *gate, const float *up);
void kv_swiglu(size_t n, float *gate, const float *up);
/* CLOSE. gate[i] = gelu(gate[i]) * up[i] (up NULL: 1); gelu(x) = x/2 (1 + erf(x / sqrt 2)), or with `tanh` the usual
 * approximation x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). */
void kv_geglu_ref(bool tanh, size_t n, float *gate, const float *up);
void kv_geglu(bool tanh, size_t n, float *gate, const float *up);

/* EXACT. Round to `bits` (32 = f32, 16 = f16, 17 = bf16; to nearest, ties to even, a NaN stays one) and split into byte
 * planes, least significant byte first: plane b of element i at dst[b * n + i]. Returns the number of finite values
 * that overflowed to infinity. */
size_t kv_pack_ref(int bits, size_t n, const float *src, uint8_t *dst);
size_t kv_pack(int bits, size_t n, const float *src, uint8_t *dst);
int kv_pack_cuda(int bits, size_t n, const float *src, uint8_t *dst, size_t *n_overflow);
/* EXACT. The same rounding, in place, kept as float: what attention consumes. Same return value. */
size_t kv_round_ref(int bits, size_t n, float *x);
size_t kv_round(int bits, size_t n, float *x);

/* True when a usable CUDA device is present (false in builds without CUDA); name gets its name. */
bool kv_cuda_device(char *name, size_t n);

#ifdef __cplusplus
}
#endif
#endif
