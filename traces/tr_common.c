/* tr_common.c - what the commands of kv-trace share (tr.h). */
#include "traces/tr.h"

#include <math.h>
#include <stdlib.h>
#include <unistd.h>

kv_status tr_parse(int argc, char **argv, const kv_opt *opts, kv_list *rest, size_t least, size_t most, kv_error *err)
{
    kv_status st = kv_cli_parse(argc, argv, opts, rest, err);
    if (st) return st;
    if (rest->n < least)
        return kv_fail(err, KV_EMISUSE, "%zu file name%s expected, %zu given", least, least == 1 ? "" : "s", rest->n);
    if (rest->n > most) return kv_fail(err, KV_EMISUSE, "unexpected argument '%s'", rest->v[most]);
    return KV_OK;
}

/* A number up to max at *s; *s moves behind it. */
static bool number(const char **s, uint32_t max, uint32_t *out)
{
    char digits[16];
    size_t n = strspn(*s, "0123456789");
    uint64_t v;
    if (!n || n >= sizeof digits) return false;
    memcpy(digits, *s, n), digits[n] = 0;
    if (!kv_parse_u64(digits, &v) || v > max) return false;
    return *out = (uint32_t)v, *s += n, true;
}

kv_status tr_range(const char *s, uint32_t max, uint32_t *a, uint32_t *b, kv_error *err)
{
    const char *p = s;
    *a = 0, *b = max;
    bool ok = *p == ':' || number(&p, max, a);
    if (ok && *p == ':') {
        p++;
        if (*p) ok = number(&p, max, b);
    } else {
        *b = *a + 1;
    }
    if (!ok || *p || *a >= *b || *b > max)
        return kv_fail(err, KV_EMISUSE, "bad range '%s': A:B with 0 <= A < B <= %u is expected", s, max);
    return KV_OK;
}

kv_status tr_numbers(const char *s, const char *what, const uint32_t *known, uint32_t n_known, uint32_t **out,
                     uint32_t *n, kv_error *err)
{
    const char *p = s;
    uint32_t *v = NULL, count = 0;
    uint32_t last = n_known ? known[n_known - 1] : 0;
    bool *take = NULL;
    kv_status st = KV_OK;
    *out = NULL, *n = 0;
    if ((st = kv_array(&take, n_known, sizeof *take, err)) || (st = kv_array(&v, n_known, sizeof *v, err))) goto out;
    while (*p) {
        uint32_t a = 0, b = 0;
        bool open = *p == ':', range = false;
        if (!open && !number(&p, UINT32_MAX - 1, &a)) goto bad;
        b = a;
        if (*p == ':') {
            p++, range = true;
            if (!*p || *p == ',')
                b = last;
            else if (!number(&p, UINT32_MAX - 1, &b) || !b--)
                goto bad;
        }
        bool any = false;
        for (uint32_t i = 0; i < n_known; i++)
            if (known[i] >= a && known[i] <= b) take[i] = any = true;
        if (!any || (!range && a != b)) {
            st = kv_fail(err, KV_EMISUSE, "--%s '%s': the trace has no %.*s %u", what, s, (int)strcspn(what, "s"), what,
                         a);
            goto out;
        }
        if (*p == ',' && p[1])
            p++;
        else if (*p)
            goto bad;
    }
    for (uint32_t i = 0; i < n_known; i++)
        if (take[i]) v[count++] = known[i];
    if (!count) goto bad;
    *out = v, *n = count;
    v = NULL;
    goto out;
bad:
    st = kv_fail(err, KV_EMISUSE, "--%s '%s': a list like 0,3,7 or 0:4 is expected", what, s);
out:
    free(take);
    free(v);
    return st;
}

uint32_t tr_threads(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 16 ? 16 : (uint32_t)n;
}

kv_status tr_new_info(kv_trace_info *i, const char *arch, uint32_t layers, uint32_t q_heads, uint32_t kv_heads,
                      uint32_t head_dim, uint32_t tokens, kv_error *err)
{
    kv_status st;
    memset(i, 0, sizeof *i);
    i->model = kv_format("%s", arch), i->arch = kv_format("%s", arch), i->record = kv_format("qkv");
    if (!i->model || !i->arch || !i->record) return kv_fail(err, KV_ENOMEM, "out of memory");
    if ((st = kv_array(&i->layer, layers, sizeof *i->layer, err)) ||
        (st = kv_array(&i->window, layers, sizeof *i->window, err)))
        return st;
    for (uint32_t l = 0; l < layers; l++) i->layer[l] = l;
    i->n_layer = i->n_layer_model = layers;
    i->n_q_head = q_heads, i->n_kv_head = kv_heads, i->head_dim = head_dim;
    i->hidden = q_heads * head_dim;
    i->n_token = i->n_prompt = tokens;
    i->scale = (float)(1 / sqrt((double)head_dim));
    i->rope_mscale = 1;
    return KV_OK;
}
