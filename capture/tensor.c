/* tensor.c - rows of a weight matrix out of the stored tensor: cut, turned, reordered (model.h: kv_tensor). */
#include "capture/store.h"

#include <stdlib.h>

#include "capture/model.h"
#include "capture/synthetic.h"

/* The place in the half-split layout of row r of a head whose rows are stored in RoPE pairs: row 2j+s goes to
 * s*rope_dim/2 + j; rows that are not rotated stay. */
static size_t half_split_row(size_t r, uint32_t rope_dim)
{
    return r < rope_dim ? r % 2 * (rope_dim / 2) + r / 2 : r;
}

/* Rows that are columns in the file: element e of row r is element r of stored row e. */
static kv_status read_turned(const kv_model *m, const kv_tensor *t, uint32_t row, uint32_t n, uint8_t *dst,
                             kv_error *err)
{
    const kv_stored *s = kv_store_at(m->store, t->stored);
    size_t size = s->quant->bytes;
    uint8_t *part = NULL;
    kv_status st = kv_array(&part, n, size, err);
    for (uint32_t e = 0; e < t->cols && !st; e++) {
        uint64_t at = e * s->row_bytes + (t->first + row) * (uint64_t)size;
        st = kv_store_read(m->store, t->stored, at, n * size, part, err);
        for (uint32_t r = 0; r < n && !st; r++) memcpy(dst + r * t->row_bytes + e * size, part + r * size, size);
    }
    free(part);
    return st;
}

/* Rows a .. b-1 of one group. */
static kv_status read_group(const kv_model *m, const kv_tensor *t, uint32_t group, uint32_t a, uint32_t b, uint8_t *dst,
                            kv_error *err)
{
    uint64_t start = (t->first + (uint64_t)group * t->stride) * t->row_bytes;
    size_t bytes = t->row_bytes;
    if (!t->paired) return kv_store_read(m->store, t->stored, start + a * bytes, (b - a) * bytes, dst, err);
    uint8_t *all = NULL;
    kv_status st = kv_array(&all, t->group, bytes, err);
    if (!st) st = kv_store_read(m->store, t->stored, start, t->group * bytes, all, err);
    for (uint32_t r = 0; r < t->group && !st; r++) {
        size_t to = half_split_row(r, m->desc.rope_dim);
        if (to >= a && to < b) memcpy(dst + (to - a) * bytes, all + r * bytes, bytes);
    }
    free(all);
    return st;
}

kv_status kv_tensor_read(const kv_model *m, const kv_tensor *t, uint32_t row, uint32_t n, void *dst, kv_error *err)
{
    kv_status st = KV_OK;
    if (t->turned) return read_turned(m, t, row, n, dst, err);
    for (uint32_t r = row, end = row + n; r < end && !st;) {
        uint32_t g = r / t->group, a = r % t->group, left = end - r, b = t->group - a < left ? t->group : a + left;
        st = read_group(m, t, g, a, b, (uint8_t *)dst + (r - row) * t->row_bytes, err);
        r += b - a;
    }
    return st;
}

static bool all_finite(const float *x, size_t n)
{
    uint32_t bad_bits = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &x[i], 4);
        bad_bits |= (uint32_t)((u & 0x7f800000) == 0x7f800000);
    }
    return !bad_bits;
}

kv_status kv_tensor_floats(const kv_model *m, const kv_tensor *t, uint32_t row, uint32_t n, float *dst, kv_error *err)
{
    if (t->f32) {
        memcpy(dst, t->f32 + (size_t)row * t->cols, (size_t)n * t->cols * sizeof *dst);
        return KV_OK;
    }
    if (t->random > 0) return kv_synthetic_floats(t, row, n, dst), KV_OK;
    uint8_t *raw = NULL;
    size_t per_row = t->cols / t->type->block;
    kv_status st = kv_array(&raw, n, t->row_bytes, err);
    if (!st) st = kv_tensor_read(m, t, row, n, raw, err);
    for (uint32_t r = 0; r < n && !st; r++) {
        float *y = dst + (size_t)r * t->cols;
        t->type->expand(raw + r * t->row_bytes, per_row, y);
        if (!all_finite(y, t->cols))
            st = kv_store_fail(
                m->store, KV_EFORMAT, err, "tensor '%s' holds NaN or infinite values in row %u",
                kv_show(kv_store_at(m->store, t->stored)->name.p, kv_store_at(m->store, t->stored)->name.n).s, row + r);
    }
    free(raw);
    return st;
}
