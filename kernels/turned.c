/* turned.c - softmax rows with the keys down and the query rows across: sixteen rows as a panel, all keys past it, then
 * the softmax for the sixteen side by side. The bytes are those of kv_probs (probs_ref.c). */
#include "kernels/lanes.h"
#include "kernels/score.h"

#include <stdlib.h>

enum { C = KV_PANEL };

typedef struct {
    size_t lo[C], hi[C];   /* what each column sees */
    size_t lo_all, hi_all; /* keys that every column sees */
    size_t first, end;     /* keys that some column sees */
} sight;

static sight look(const kv_attn_shape *s, size_t n_head, size_t c0)
{
    sight v = {.hi_all = s->n_key, .first = s->n_key};
    for (size_t c = 0; c < C; c++) {
        if (c0 + c < n_head * s->n_row)
            kv_visible(s, (c0 + c) % s->n_row, &v.lo[c], &v.hi[c]);
        else
            v.lo[c] = v.lo_all, v.hi[c] = v.hi_all; /* a column of zeros: must not slow the others down */
        if (v.lo[c] > v.lo_all) v.lo_all = v.lo[c];
        if (v.hi[c] < v.hi_all) v.hi_all = v.hi[c];
        if (v.lo[c] < v.hi[c] && v.lo[c] < v.first) v.first = v.lo[c];
        if (v.hi[c] > v.end) v.end = v.hi[c];
    }
    if (v.hi_all < v.lo_all) v.hi_all = v.lo_all;
    return v;
}

/* The softmax of the first n columns; the others become 0. */
KV_INLINE void strip(const bool cap, const sight *v, const kv_attn_shape *s, size_t n, float *p, size_t ld,
                     float lse[C])
{
    double lane[8][C] = {{0}};
    float m[C], sum[C], scale = s->scale, softcap = s->softcap;
    for (size_t c = 0; c < C; c++) m[c] = -__builtin_inff();
    for (size_t j = v->first; j < v->end; j++) {
        float *x = p + j * ld;
        for (size_t c = 0; c < C; c++) x[c] *= scale;
        if (cap)
            for (size_t c = 0; c < C; c++) x[c] = kv_cap(x[c], softcap);
        if (j < v->lo_all || j >= v->hi_all)
            for (size_t c = 0; c < C; c++) x[c] = j >= v->lo[c] && j < v->hi[c] ? x[c] : -__builtin_inff();
        for (size_t c = 0; c < C; c += 8) {
            kv_f8 a = KV_LOAD8(x + c), b = KV_LOAD8(m + c);
            kv_i8 gt = a > b;
            b = (kv_f8)(((kv_i8)a & gt) | ((kv_i8)b & ~gt));
            memcpy(m + c, &b, sizeof b);
        }
    }
    for (size_t c = 0; c < C; c++) sum[c] = m[c] == -__builtin_inff() ? 0 : m[c]; /* what is subtracted */
    for (size_t j = v->first; j < v->end; j++) {
        float *x = p + j * ld;
        double *l = lane[j % 8];
        for (size_t c = 0; c < C; c++) x[c] = kv_expf(x[c] - sum[c]); /* 0 where -infinity */
        for (size_t c = 0; c < C; c += 4) {
            kv_d4 a = KV_LOAD(kv_d4, l + c) + KV_WIDE4(x + c);
            memcpy(l + c, &a, sizeof a);
        }
    }
    for (size_t c = 0; c < C; c++) {
        double of[8];
        for (int i = 0; i < 8; i++) of[i] = lane[i][c];
        double all = kv_sum8(of);
        lse[c] = v->lo[c] < v->hi[c] ? (float)(m[c] + kv_logd(all)) : m[c];
        sum[c] = c >= n ? __builtin_inff() : v->lo[c] < v->hi[c] ? (float)all : 1;
    }
    for (size_t j = v->first; j < v->end; j++)
        for (size_t c = 0; c < C; c++) p[j * ld + c] /= sum[c];
}

KV_INLINE void body(const bool v3, const kv_attn_shape *s, size_t n_head, const float *q, size_t q_head, const float *k,
                    float *p, size_t ld, float *lse, float *rows, float *panel)
{
    size_t real = n_head * s->n_row;
    for (size_t c0 = 0; c0 < ld; c0 += C) {
        size_t n = c0 >= real ? 0 : real - c0 < C ? real - c0 : C;
        float part[C];
        sight v = look(s, n_head, c0);
        for (size_t c = 0; c < n; c++)
            memcpy(rows + c * s->d, q + (c0 + c) / s->n_row * q_head + (c0 + c) % s->n_row * s->d, s->d * sizeof *rows);
        for (size_t j = 0; j < s->n_key; j++)
            if (j < v.first || j >= v.end) memset(p + j * ld + c0, 0, C * sizeof *p);
        if (v.first >= v.end) {
            for (size_t c = 0; c < n; c++) lse[c0 + c] = -__builtin_inff();
            continue;
        }
        kv_panel_fill(v3, n, s->d, rows, panel);
        kv_panel_dots(v3, v.end - v.first, s->d, k + v.first * s->d, panel, p + v.first * ld + c0, ld);
        if (s->softcap > 0)
            strip(true, &v, s, n, p + c0, ld, part);
        else
            strip(false, &v, s, n, p + c0, ld, part);
        memcpy(lse + c0, part, n * sizeof *lse);
    }
}

static void plain(const kv_attn_shape *s, size_t n_head, const float *q, size_t q_head, const float *k, float *p,
                  size_t ld, float *lse, float *rows, float *panel)
{
    body(false, s, n_head, q, q_head, k, p, ld, lse, rows, panel);
}

KV_V3 static void v3(const kv_attn_shape *s, size_t n_head, const float *q, size_t q_head, const float *k, float *p,
                     size_t ld, float *lse, float *rows, float *panel)
{
    body(KV_HAVE_V3, s, n_head, q, q_head, k, p, ld, lse, rows, panel);
}

bool kv_probs_turned(const kv_attn_shape *s, size_t n_head, const float *q, size_t q_head, const float *k, float *p,
                     size_t ld, float *lse)
{
    if (s->d > SIZE_MAX / (2 * C * sizeof(float)) - 1) return false;
    float *rows = malloc((s->d + 1) * 2 * C * sizeof *rows);
    if (!rows) return false;
    (kv_has_v3() ? v3 : plain)(s, n_head, q, q_head, k, p, ld, lse, rows, rows + s->d * C);
    free(rows);
    return true;
}
