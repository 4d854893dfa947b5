/* token_view.c - loading and the page's JSON (token_view.h). */
#include "analyze/token_view.h"

#include <math.h>
#include <stdlib.h>

#include "analyze/sheet.h"
#include "kernels/kernels.h"
#include "traces/cli.h"

#define MASS_FLOOR 1e-7 /* smallest mass the page tells apart from none */

static kv_status load_words(kv_token_view *v, kv_error *err)
{
    const kv_trace_info *i = v->info;
    size_t n_text = 0;
    kv_status st = kv_array(&v->evidence, i->n_prompt, 1, err);
    if (st || !kv_trace_has(v->trace, KV_S_OFFSETS, 0, 0, 0, i->n_token + 1)) return st;
    if ((st = kv_trace_read_bytes(v->trace, KV_S_TEXT, &v->text, &n_text, err))) return st;
    if ((st = kv_array(&v->offset, (size_t)i->n_token + 1, sizeof *v->offset, err)) ||
        (st = kv_trace_read_u32(v->trace, KV_S_OFFSETS, 0, i->n_token + 1, v->offset, err)))
        return st;
    for (uint32_t k = 0; k < i->n_token; k++)
        if (v->offset[k] > v->offset[k + 1] || v->offset[k + 1] > n_text)
            return kv_fail(err, KV_EFORMAT, "trace '%s': offset of token %u lies outside the text",
                           kv_trace_path(v->trace), k + 1);
    for (uint32_t k = 0; k < i->n_prompt; k++)
        for (uint32_t e = 0; e < i->n_evidence && !v->evidence[k]; e++)
            v->evidence[k] = v->offset[k] < i->evidence[e].end && v->offset[k + 1] > i->evidence[e].start;
    for (uint32_t k = 0; k < i->n_prompt; k++) v->n_evidence += v->evidence[k];
    return KV_OK;
}

static kv_status load_mass(kv_token_view *v, kv_error *err)
{
    const kv_trace_info *i = v->info;
    uint32_t n = i->n_token, p = i->n_prompt, rows = n - p, d = i->head_dim, group = i->n_q_head / i->n_kv_head;
    size_t n_prob, n_key;
    float *q = NULL, *k = NULL, *prob = NULL;
    kv_progress *bar = NULL;
    kv_status st;
    if (!rows) return KV_OK;
    if (!kv_mul(rows, n, &n_prob) || !kv_mul(n, d, &n_key)) return kv_fail(err, KV_ENOMEM, "out of memory");
    if ((st = kv_array(&v->mass, (size_t)i->n_layer * i->n_kv_head * p, sizeof *v->mass, err)) ||
        (st = kv_array(&q, (size_t)rows * d, sizeof *q, err)) || (st = kv_array(&k, n_key, sizeof *k, err)) ||
        (st = kv_array(&prob, n_prob, sizeof *prob, err)))
        goto out;
    bar = kv_progress_start(i->prompt_id ? i->prompt_id : "mass of the tokens", i->n_layer, "layers");
    for (uint32_t l = 0; l < i->n_layer && !st; l++) {
        kv_attn_shape s = {.n_row = rows, .n_key = n, .d = d, .row0 = p, .scale = i->scale, .softcap = i->softcap};
        s.window = i->window ? i->window[l] : 0;
        for (uint32_t h = 0; h < i->n_q_head && !st; h++) {
            float *sum = v->mass + ((size_t)l * i->n_kv_head + h / group) * p;
            if (h % group == 0) st = kv_trace_read_f32(v->trace, KV_S_K, i->layer[l], h / group, 0, n, k, err);
            if (!st) st = kv_trace_read_f32(v->trace, KV_S_Q, i->layer[l], h, p, n, q, err);
            if (!st && !kv_probs(&s, q, k, prob)) st = kv_fail(err, KV_ENOMEM, "out of memory");
            for (uint32_t r = 0; r < rows && !st; r++)
                for (uint32_t j = 0; j < p; j++) sum[j] += prob[(size_t)r * n + j] / (float)(rows * group);
        }
        if (!st && kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
        kv_progress_step(bar, l + 1, NULL);
    }
out:
    kv_progress_end(bar);
    free(q), free(k), free(prob);
    return st;
}

kv_status kv_token_view_open(const char *path, kv_token_view *out, kv_error *err)
{
    *out = (kv_token_view){0};
    kv_status st = kv_trace_open(path, &out->trace, err);
    if (st) return st;
    out->info = kv_trace_get_info(out->trace);
    if (!out->info->n_layer)
        return kv_fail(err, KV_EMISSING, "trace '%s' holds no layers: record at level obs or qkv", path);
    if (!(st = load_words(out, err))) st = load_mass(out, err);
    return st;
}

kv_status kv_token_view_pick(kv_token_view *v, const char *policy, const char *budget, kv_error *err)
{
    kv_pick *grown = realloc(v->pick, (v->n_pick + 1) * sizeof *grown);
    if (!grown) return kv_fail(err, KV_ENOMEM, "out of memory");
    v->pick = grown;
    kv_pick *p = &v->pick[v->n_pick];
    *p = (kv_pick){.policy = strdup(policy), .budget = strdup(budget)};
    v->n_pick++;
    if (!p->policy || !p->budget) return kv_fail(err, KV_ENOMEM, "out of memory");
    return kv_kept_load(v->trace, policy, budget, &p->kept, err);
}

void kv_token_view_free(kv_token_view *v)
{
    for (size_t i = 0; i < v->n_pick; i++) {
        free(v->pick[i].policy), free(v->pick[i].budget);
        kv_kept_free(&v->pick[i].kept);
    }
    free(v->pick), free(v->text), free(v->offset), free(v->evidence), free(v->mass);
    kv_trace_close(v->trace);
    *v = (kv_token_view){0};
}

kv_token_state kv_token_state_of(const kv_token_view *v, size_t a, size_t b, uint32_t layer0, uint32_t layer1,
                                 uint32_t head0, uint32_t head1, uint32_t token)
{
    const kv_trace_info *i = v->info;
    const kv_kept *ka = &v->pick[a].kept, *kb = &v->pick[b].kept;
    uint32_t group = i->n_q_head / i->n_kv_head, n = 0;
    bool per_query = ka->n_head > i->n_kv_head || kb->n_head > i->n_kv_head;
    kv_token_state s = {0};
    for (uint32_t l = layer0; l < layer1; l++)
        for (uint32_t h = head0; h < head1; h++)
            for (uint32_t g = 0; g < (per_query ? group : 1); g++, n++) {
                bool in_a = kv_kept_row(ka, i, l, h * group + g)[token];
                bool in_b = kv_kept_row(kb, i, l, h * group + g)[token];
                int k = in_a && in_b ? KV_BOTH : in_a ? KV_ONLY_A : in_b ? KV_ONLY_B : KV_NEITHER;
                s.slots[k]++;
                if (v->mass) s.mass[k] += (double)v->mass[((size_t)l * i->n_kv_head + h) * i->n_prompt + token];
            }
    for (int k = 0; k < KV_TOKEN_STATES && n; k++) s.mass[k] /= n;
    return s;
}

/* ------------------------------------------------------------------------------------------------ the page's JSON */
static void put_base64(FILE *f, const uint8_t *p, size_t n)
{
    static const char SET[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    putc('"', f);
    for (size_t i = 0; i < n; i += 3) {
        uint32_t w = (uint32_t)p[i] << 16 | (i + 1 < n ? (uint32_t)p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0);
        putc(SET[w >> 18], f), putc(SET[w >> 12 & 63], f);
        putc(i + 1 < n ? SET[w >> 6 & 63] : '=', f), putc(i + 2 < n ? SET[w & 63] : '=', f);
    }
    putc('"', f);
}

/* One byte per mass: 0 = below MASS_FLOOR, then 255 steps of equal ratio up to 1 (6.5 % each). */
static void put_mass(FILE *f, const kv_token_view *v)
{
    size_t n = (size_t)v->info->n_layer * v->info->n_kv_head * v->info->n_prompt;
    uint8_t *byte = v->mass ? malloc(n ? n : 1) : NULL;
    for (size_t i = 0; byte && i < n; i++) {
        double m = (double)v->mass[i], step = 1 + 254 * (log(m) - log(MASS_FLOOR)) / -log(MASS_FLOOR);
        byte[i] = (uint8_t)(!(m >= MASS_FLOOR) ? 0 : step > 255 ? 255 : floor(step + 0.5));
    }
    fputs(",\"mass\":", f);
    if (byte)
        put_base64(f, byte, n);
    else
        fputs("null", f);
    free(byte);
}

void kv_token_view_json(FILE *f, const kv_token_view *v)
{
    const kv_trace_info *i = v->info;
    const char *name = i->prompt_id ? i->prompt_id : "prompt";
    fputs("{\"name\":", f), kv_put_json(f, name, strlen(name));
    fputs(",\"model\":", f), kv_put_json(f, i->model ? i->model : "?", strlen(i->model ? i->model : "?"));
    fprintf(f, ",\"P\":%u,\"kv\":%u,\"q\":%u,\"layers\":[", i->n_prompt, i->n_kv_head, i->n_q_head);
    for (uint32_t l = 0; l < i->n_layer; l++) fprintf(f, "%s%u", l ? "," : "", i->layer[l]);
    fputs("],\"ev\":[", f);
    for (uint32_t k = 0, n = 0; k < i->n_prompt; k++)
        if (v->evidence[k]) fprintf(f, "%s%u", n++ ? "," : "", k);
    fputs("],\"len\":", f);
    if (v->offset) {
        putc('[', f);
        for (uint32_t k = 0; k < i->n_prompt; k++) fprintf(f, "%s%u", k ? "," : "", v->offset[k + 1] - v->offset[k]);
        fputs("],\"text\":", f);
        put_base64(f, (const uint8_t *)v->text + v->offset[0], v->offset[i->n_prompt] - v->offset[0]);
    } else
        fputs("null,\"text\":null", f);
    put_mass(f, v);
    fputs(",\"picks\":[", f);
    for (size_t p = 0; p < v->n_pick; p++) {
        const kv_kept *k = &v->pick[p].kept;
        size_t rows = (size_t)i->n_layer * k->n_head, bit = 0;
        uint8_t *bits = calloc((rows * i->n_prompt + 7) / 8 + 1, 1);
        for (size_t r = 0; bits && r < rows; r++)
            for (uint32_t t = 0; t < i->n_prompt; t++, bit++)
                bits[bit / 8] |= (uint8_t)((k->kept[r * k->n_token + t] != 0) << (7 - bit % 8));
        fprintf(f, "%s{\"policy\":", p ? "," : "");
        kv_put_json(f, v->pick[p].policy, strlen(v->pick[p].policy));
        fputs(",\"budget\":", f), kv_put_json(f, v->pick[p].budget, strlen(v->pick[p].budget));
        fprintf(f, ",\"heads\":%u,\"kept\":", k->n_head);
        if (bits)
            put_base64(f, bits, (bit + 7) / 8);
        else
            fputs("\"\"", f);
        putc('}', f), free(bits);
    }
    fputs("]}", f);
}
