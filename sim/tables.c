/* tables.c - NumPy files of policies. */
#include "sim/tables.h"

#include <math.h>

kv_status kv_table_read(const kv_trace_info *in, const char *what, const char *path, size_t a, size_t b, kv_npy *out,
                        kv_error *err)
{
    uint32_t rank = 1 + (a > 0) + (b > 0);
    kv_status st = kv_npy_read(path, out, err);
    if (st) return st;
    bool fits =
        out->rank == rank && out->kind == 'f' && (out->shape[0] == in->n_layer || out->shape[0] == in->n_layer_model);
    if (fits && a) fits = out->shape[1] == a;
    if (fits && b) fits = out->shape[2] == b;
    if (!fits) {
        char want[64] = "", of_model[32] = "";
        if (a) snprintf(want, sizeof want, ", %zu", a);
        if (b) snprintf(want + strlen(want), sizeof want - strlen(want), ", %zu", b);
        if (in->n_layer != in->n_layer_model) snprintf(of_model, sizeof of_model, " (or %u)", in->n_layer_model);
        return kv_fail(err, KV_EFORMAT, "%s='%s': want floats [%u layers%s%s]", what, path, in->n_layer, of_model,
                       want);
    }
    st = kv_npy_to_f32(out, err);
    for (size_t i = 0; i < out->n && !st; i++)
        if (!isfinite(((float *)out->data)[i]))
            st = kv_fail(err, KV_EFORMAT, "%s='%s': entry %zu is not a finite number", what, path, i);
    return st;
}

const float *kv_table_layer(const kv_trace_info *in, const kv_npy *a, uint32_t index)
{
    size_t row = a->n / a->shape[0], layer = a->shape[0] == in->n_layer ? index : in->layer[index];
    return (const float *)a->data + layer * row;
}
