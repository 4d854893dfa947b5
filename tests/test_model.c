/* test_model.c - GGUF reader, dequantisation, model loading, on files made here (tests/make_gguf.h) and on goldens. */
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/check.h"
#include "tests/make_gguf.h"
#include "traces/npy.h"

#define SMOLLM "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"

/* ------------------------------------------------------------------------------------------------ quantisation */

/* Element e of one block by the index formulas of the format notes: another way round than the code under test, which
 * walks groups. */
static float half(const uint8_t *p)
{
    return kv_f16_to_f32(kv_get16(p));
}

static int nibble(const uint8_t *q, int e)
{
    return e < 16 ? q[e] & 15 : q[e - 16] >> 4;
}

static const int iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static float legacy_value(uint32_t type, const uint8_t *b, int e)
{
    switch (type) {
    case 2: return half(b) * (float)(nibble(b + 2, e) - 8);
    case 3: return half(b) * (float)nibble(b + 4, e) + half(b + 2);
    case 6: return half(b) * (float)((nibble(b + 6, e) | (int)(kv_get32(b + 2) >> e & 1) << 4) - 16);
    case 7: return half(b) * (float)(nibble(b + 8, e) | (int)(kv_get32(b + 4) >> e & 1) << 4) + half(b + 2);
    case 8: return half(b) * (float)(int8_t)b[2 + e];
    case 20: return half(b) * (float)iq4[nibble(b + 2, e)];
    case 1: return half(b);
    case 30: return kv_bf16_to_f32(kv_get16(b));
    default: return NAN;
    }
}

static float k_value(uint32_t type, const uint8_t *b, int e)
{
    int g = e / 16, q = 0, s, m;
    const uint8_t *sc;
    switch (type) {
    case 10:
        q = b[16 + 32 * (e / 128) + e % 32] >> (2 * ((e % 128) / 32)) & 3;
        return half(b + 80) * (float)(b[g] & 15) * (float)q - half(b + 82) * (float)(b[g] >> 4);
    case 11:
        sc = b + 96;
        q = b[32 + 32 * (e / 128) + e % 32] >> (2 * ((e % 128) / 32)) & 3;
        s = (g < 8 ? sc[g] & 15 : sc[g - 8] >> 4) | ((sc[8 + g % 4] >> (2 * (g / 4))) & 3) << 4;
        return half(b + 108) * (float)(s - 32) * (float)(q - (b[e % 32] >> (e / 32) & 1 ? 0 : 4));
    case 12:
    case 13:
        sc = b + 4, g = e / 32;
        s = g < 4 ? sc[g] & 63 : (sc[g + 4] & 15) | (sc[g - 4] >> 6) << 4;
        m = g < 4 ? sc[g + 4] & 63 : (sc[g + 4] >> 4) | (sc[g] >> 6) << 4;
        q = b[(type == 12 ? 16 : 48) + 32 * (e / 64) + e % 32];
        q = e % 64 < 32 ? q & 15 : q >> 4;
        if (type == 13) q += 16 * (b[16 + e % 32] >> g & 1);
        return half(b) * (float)s * (float)q - half(b + 2) * (float)m;
    case 14: {
        int n = e / 128, r = e % 128, l = r % 32, k = r / 32, v = b[64 * n + l + 32 * (k & 1)];
        int lo = k < 2 ? v & 15 : v >> 4, hi = (b[128 + 32 * n + l] >> 2 * k) & 3;
        return half(b + 208) * (float)(int8_t)b[192 + e / 16] * (float)((lo | hi << 4) - 32);
    }
    case 23:
        s = (b[4 + e / 64] >> (4 * (e / 32 % 2)) & 15) | (int)(kv_get16(b + 2) >> (2 * (e / 32)) & 3) << 4;
        return half(b) * (float)(s - 32) * (float)iq4[nibble(b + 8 + 16 * (e / 32), e % 32)];
    default: return legacy_value(type, b, e);
    }
}

static bool same_bits(float a, float b)
{
    return !memcmp(&a, &b, sizeof a);
}

/* Random blocks of every type against the formulas, bit for bit. */
static void test_quants_random(void)
{
    static const uint32_t types[] = {1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30};
    static const int halves[][2] = {[1] = {0, -1},    [2] = {0, -1},   [3] = {0, 2},     [6] = {0, -1}, [7] = {0, 2},
                                    [8] = {0, -1},    [10] = {80, 82}, [11] = {108, -1}, [12] = {0, 2}, [13] = {0, 2},
                                    [14] = {208, -1}, [20] = {0, -1},  [23] = {0, -1},   [30] = {0, -1}};
    kv_rng rng = {1};
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        const kv_quant *q = kv_quant_find(types[t]);
        CHECK(q && q->expand && strstr(kv_quant_supported(), q->name));
        if (!q || !q->expand) continue;
        uint8_t b[3 * 256];
        float y[3 * 256];
        int wrong = 0;
        for (int round = 0; round < 200; round++) {
            for (uint32_t i = 0; i < 3 * q->bytes; i++) b[i] = (uint8_t)(kv_rng_next(&rng) >> 32);
            for (int k = 0; k < 3; k++)
                for (int h = 0; h < 2; h++) /* finite scales, both signs, denormals among them */
                    if (halves[q->id][h] >= 0) b[k * q->bytes + (uint32_t)halves[q->id][h] + 1] &= 0xbb;
            q->expand(b, 3, y);
            for (uint32_t e = 0; e < 3 * q->block; e++)
                wrong += !same_bits(y[e], k_value(q->id, b + e / q->block * q->bytes, (int)(e % q->block)));
        }
        CHECKF(wrong == 0, "%s: %d of %d values differ", q->name, wrong, 600 * q->block);
    }
}

/* Blocks whose values can be worked out by hand. */
static void test_quants_by_hand(void)
{
    float y[256];
    uint8_t b[256] = {0};
    kv_put16(b, 0x3800), kv_put16(b + 2, 0xbc00); /* d = 0.5, m = -1 */
    b[4] = 0xf3, b[19] = 0x07;
    kv_quant_find(3)->expand(b, 1, y); /* Q4_1 */
    CHECK(y[0] == 0.5f && y[16] == 6.5f && y[15] == 2.5f && y[31] == -1.0f && y[1] == -1.0f);

    memset(b, 0, sizeof b);
    kv_put16(b, 0x4000), b[2] = 0x80, b[33] = 0x7f; /* Q8_0: d = 2 */
    kv_quant_find(8)->expand(b, 1, y);
    CHECK(y[0] == -256.0f && y[31] == 254.0f && y[5] == 0.0f);

    memset(b, 0, sizeof b);
    kv_put16(b, 0x3c00), kv_put32(b + 2, 0x80000001), b[6] = 0x01, b[21] = 0xf0; /* Q5_0: d = 1 */
    kv_quant_find(6)->expand(b, 1, y);
    CHECK(y[0] == 1.0f && y[31] == 15.0f && y[1] == -16.0f);

    /* IQ4_XS: d = 1; scale of block 1 is 0x21 = 33 -> 1, of block 0 0 -> -32, of block 7 0x3f -> 31 */
    memset(b, 0, sizeof b);
    kv_put16(b, 0x3c00), kv_put16(b + 2, 2u << 2 | 3u << 14), b[4] = 0x10, b[7] = 0xf0;
    b[8] = 0x0f, b[8 + 16] = 0xf0, b[8 + 7 * 16 + 15] = 0x80;
    kv_quant_find(23)->expand(b, 1, y);
    CHECK(y[0] == -32.0f * 113 && y[16] == 32.0f * 127 && y[32] == -127.0f && y[48] == 113.0f && y[255] == 31.0f);

    CHECK(!kv_quant_find(4) && !kv_quant_find(5) && !kv_quant_find(31) && !kv_quant_find(38) &&
          !kv_quant_find(1u << 31));
    CHECK(kv_quant_find(16) && !kv_quant_find(16)->expand);
}

/* The first rows of a tensor as ggml expands them: a file of the folder, the tensor, the expected values. */
static void quant_golden(const char *folder, const char *file, const char *tensor, const char *expected)
{
    char path[256];
    kv_gguf *g = NULL;
    kv_npy want = {0};
    kv_error err = {""};
    snprintf(path, sizeof path, "%s/%s.npy", folder, expected);
    kv_status st = kv_npy_read(path, &want, &err);
    snprintf(path, sizeof path, "%s/%s", folder, file);
    if (!st) st = kv_gguf_open(path, &g, &err);
    const kv_gguf_tensor *t = g ? kv_gguf_tensor_find(g, tensor) : NULL;
    CHECKF(t && want.rank == 2 && want.shape[0] <= t->n_row && want.shape[1] == t->ne[0], "%s", err.msg);
    if (t) {
        uint8_t *raw = malloc(want.shape[0] * (size_t)t->row_bytes);
        float *y = malloc(want.n * sizeof *y);
        CHECK(!kv_gguf_read_rows(g, t, 0, want.shape[0], raw, &err));
        t->quant->expand(raw, want.n / t->quant->block, y);
        CHECKF(!memcmp(y, want.data, want.n * sizeof *y), "%s", expected);
        free(raw), free(y);
    }
    kv_npy_free(&want);
    kv_gguf_close(g);
}

static void test_quants_golden(void)
{
    static const char *const here[][3] = {
        {"llama256.F16.gguf", "blk.0.attn_k.weight", "F16.deq.F16"},
        {"llama256.Q2_K.gguf", "blk.0.attn_k.weight", "Q2_K.deq.Q2_K"},
        {"llama256.Q2_K.gguf", "blk.0.attn_v.weight", "Q2_K.deq.Q3_K"},
        {"llama256.Q2_K.gguf", "output.weight", "Q2_K.deq.Q6_K"},
        {"llama256.Q4_K_M.gguf", "blk.0.attn_k.weight", "Q4_K_M.deq.Q4_K"},
        {"llama256.Q4_K_M.gguf", "blk.1.attn_v.weight", "Q4_K_M.deq.Q6_K"},
    };
    static const char *const shared[][3] = {
        {"llama256/llama256.F32.gguf", "blk.0.attn_k.weight", "llama256/F32.deq.F32"},
        {"llama256/llama256.Q4_0.gguf", "blk.0.attn_k.weight", "llama256/Q4_0.deq.Q4_0"},
        {"llama256/llama256.Q5_1.gguf", "blk.0.attn_k.weight", "llama256/Q5_1.deq.Q5_1"},
        {"llama256/llama256.Q8_0.gguf", "blk.0.attn_k.weight", "llama256/Q8_0.deq.Q8_0"},
        {"llama256/llama256.IQ4_NL.gguf", "blk.0.attn_k.weight", "llama256/IQ4_NL.deq.IQ4_NL"},
        {"gemma2_256/gemma2_256.BF16.gguf", "blk.0.attn_k.weight", "gemma2_256/BF16.deq.BF16"},
        {"gemma2_256/gemma2_256.Q6_K.gguf", "blk.0.attn_k.weight", "gemma2_256/Q6_K.deq.Q6_K"},
        {"qwen2_256/qwen2_256.Q4_K_M.gguf", "blk.1.attn_v.weight", "qwen2_256/Q4_K_M.deq.Q6_K"},
    };
    static const char folder[] = "../shared/golden/models/gguf";
    for (size_t c = 0; c < sizeof here / sizeof *here; c++)
        quant_golden("tests/golden/models/gguf/llama256", here[c][0], here[c][1], here[c][2]);
    if (access(folder, R_OK)) {
        SKIP("no ../shared/golden");
        return;
    }
    for (size_t c = 0; c < sizeof shared / sizeof *shared; c++)
        quant_golden(folder, shared[c][0], shared[c][1], shared[c][2]);
}

/* ------------------------------------------------------------------------------------------------ container */

static void test_gguf_damaged(void)
{
    static bytes b;
    recipe r = plain;
    kv_gguf *g;
    kv_error err;
    build(&r, &b);
    CHECK(!kv_gguf_open_mem(b.p, b.n, "mem", &g, &err));
    kv_gguf_close(g);
    /* every truncation is noticed; padding behind the last tensor may be missing */
    uint32_t accepted = 0, silent = 0;
    for (size_t n = 0; n + 32 < b.n; n++) {
        uint8_t *copy = malloc(n + 1); /* exact size: reading past it is an error under ASan */
        memcpy(copy, b.p, n);
        err.msg[0] = 0;
        if (!kv_gguf_open_mem(copy, n, "mem", &g, &err)) accepted++, kv_gguf_close(g);
        silent += !strstr(err.msg, "cannot read model 'mem': ");
        free(copy);
    }
    CHECKF(!accepted && !silent, "%u accepted, %u without a message", accepted, silent);

    /* every field of eight or four bytes in the header, set to something absurd: an error or a file, never a crash */
    static const uint64_t absurd[] = {UINT64_MAX, UINT64_MAX - 23, 1ull << 63, 1ull << 61, 1ull << 32, 0x7fffffff};
    size_t head = b.n - (8 * 262 * 4 + 1024);
    uint32_t opened = 0;
    for (size_t at = 4; at + 8 < head; at++) {
        uint8_t saved[8];
        memcpy(saved, b.p + at, 8);
        for (size_t k = 0; k < 6; k++) {
            kv_put64(b.p + at, absurd[k]);
            if (!kv_gguf_open_mem(b.p, b.n, "mem", &g, &err)) opened++, kv_gguf_close(g);
        }
        memcpy(b.p + at, saved, 8);
    }
    CHECK(opened > 0); /* inside strings any bytes will do */
}

typedef struct {
    size_t at; /* offset of the field */
    uint64_t value;
    int width;
    const char *says;
} patch;

/* Named fields with values that must be refused, and what the message must mention. */
static void test_gguf_fields(void)
{
    static bytes b;
    recipe r = plain;
    build(&r, &b);
    /* "general.architecture" is the first key: its length at 24, type at 52, string length at 56 */
    const patch p[] = {
        {0, 0x46554748, 4, "magic"},
        {4, 1, 4, "version"},
        {4, 4, 4, "version"},
        {4, 0x03000000, 4, "big-endian"},
        {8, 0, 8, "tensor_count"},
        {8, UINT64_MAX, 8, "tensor_count"},
        {8, 1ull << 40, 8, "tensor_count"},
        {16, 0, 8, "metadata_kv_count"},
        {16, UINT64_MAX, 8, "metadata_kv_count"},
        {24, 0, 8, "metadata key 0"},
        {24, 1ull << 63, 8, "metadata key 0"},
        {24, UINT64_MAX - 31, 8, "metadata key 0"},
        {52, 13, 4, "general.architecture"},
        {52, 9, 4, "general.architecture"},
        {56, 1ull << 62, 8, "general.architecture"},
        {56, 1ull << 24, 8, "general.architecture"},
    };
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) {
        uint8_t saved[8];
        kv_model *m;
        kv_error err = {""};
        memcpy(saved, b.p + p[i].at, 8);
        if (p[i].width == 8)
            kv_put64(b.p + p[i].at, p[i].value);
        else
            kv_put32(b.p + p[i].at, (uint32_t)p[i].value);
        CHECK(open_bytes(&b, true, &m, &err) == KV_EFORMAT && !m);
        CHECKF(strstr(err.msg, p[i].says) && strstr(err.msg, "made.gguf"), "field %zu: %s", p[i].at, err.msg);
        memcpy(b.p + p[i].at, saved, 8);
    }
    kv_model *m;
    kv_put32(b.p + 4, 2); /* version 2 has the same layout */
    CHECK(!open_bytes(&b, true, &m, NULL));
    kv_model_close(m);
}

/* Random bytes changed anywhere in the header: kv_model_open answers, whatever it answers. */
static void test_model_mutated(void)
{
    static bytes b, c;
    recipe r = plain;
    kv_rng rng = {7};
    r.bias = r.freqs = true;
    build(&r, &b);
    uint32_t errors = 0, unnamed = 0;
    for (int i = 0; i < 400; i++) {
        kv_model *m;
        kv_error err = {""};
        c.n = b.n;
        memcpy(c.p, b.p, b.n);
        for (int k = 0; k < 1 + i % 3; k++) {
            /* the middle of the header is the vocabulary: aim at the parts around it more often */
            size_t at = kv_rng_next(&rng) % (k ? 640 : b.n - 9000);
            c.p[at] = (uint8_t)kv_rng_next(&rng);
        }
        if (open_bytes(&c, i % 2, &m, &err)) errors++, unnamed += !strstr(err.msg, "made.gguf");
        kv_model_close(m);
    }
    CHECK(errors > 50);
    CHECKF(!unnamed, "%u messages do not name the file", unnamed);
}

static void write_bytes(const char *path, const uint8_t *p, size_t n)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(p, 1, n, f) == n);
    if (f) fclose(f);
}

/* The same with a folder: bytes of config.json, of the header of model.safetensors, and its length. */
static void test_folder_mutated(void)
{
    static const char *const file[2] = {"config.json", "model.safetensors"};
    uint8_t *whole[2] = {NULL, NULL};
    size_t n[2] = {0, 0}, errors = 0, unnamed = 0;
    char folder[80], path[2][128];
    kv_rng rng = {11};
    kv_error err = {""};
    snprintf(folder, sizeof folder, "%s/folder", dir);
    CHECK(!mkdir(folder, 0777));
    for (int i = 0; i < 2; i++) {
        char from[128];
        snprintf(from, sizeof from, "tests/golden/models_extra/tiny/qwen3_moe/%s", file[i]);
        snprintf(path[i], sizeof path[i], "%s/%s", folder, file[i]);
        CHECKF(!kv_read_file(from, 1 << 20, &whole[i], &n[i], &err), "%s", err.msg);
        if (whole[i]) write_bytes(path[i], whole[i], n[i]);
    }
    for (int i = 0; i < 400 && whole[0] && whole[1]; i++) {
        int which = i % 2;
        uint8_t keep[3];
        size_t at[3], head = which ? 8 + (size_t)kv_get64(whole[1]) : n[0], left = n[which];
        kv_model *m;
        for (int k = 0; k < 3; k++) {
            at[k] = kv_rng_next(&rng) % (k ? head : which ? 8 : head), keep[k] = whole[which][at[k]];
            if (k <= i % 3) whole[which][at[k]] = (uint8_t)(kv_rng_next(&rng) % (i % 5 ? 256 : 16) + (i % 5 ? 0 : '0'));
        }
        if (i % 7 == 0) left = kv_rng_next(&rng) % n[which]; /* cut */
        write_bytes(path[which], whole[which], left);
        if (kv_model_open(folder, i % 4 < 2 ? KV_WEIGHTS_F32 : KV_WEIGHTS_STORED, 2, &m, &err))
            errors++, unnamed += !strstr(err.msg, folder);
        kv_model_close(m);
        for (int k = 2; k >= 0; k--) whole[which][at[k]] = keep[k];
        write_bytes(path[which], whole[which], n[which]);
    }
    kv_model *m;
    CHECKF(!kv_model_open(folder, KV_WEIGHTS_F32, 2, &m, &err), "%s", err.msg); /* unharmed it loads */
    kv_model_close(m);
    CHECKF(errors > 200 && !unnamed, "%zu errors, %zu do not name the folder", errors, unnamed);
    for (int i = 0; i < 2; i++) remove(path[i]), free(whole[i]);
    rmdir(folder);
}

/* Matrices that stay in the file: what kv_tensor_read and kv_tensor_floats give is what the expanded model holds, in
 * any cut, for cut, turned, interleaved and reordered tensors. */
static void test_stored(void)
{
    static const char *const name[] = {"tests/golden/models_extra/tiny/gpt2", "tests/golden/models_extra/tiny/gptneox",
                                       "tests/golden/models_extra/tiny/phi3_long",
                                       "tests/golden/models/gguf/llama256/llama256.Q4_K_M.gguf"};
    for (size_t i = 0; i < sizeof name / sizeof *name; i++) {
        kv_model *a, *b;
        kv_error err = {""};
        kv_status sa = kv_model_open(name[i], KV_WEIGHTS_F32, 2, &a, &err);
        kv_status sb = kv_model_open(name[i], KV_WEIGHTS_STORED, 1, &b, &err);
        CHECKF(!sa && !sb, "%s", err.msg);
        if (sa || sb) continue;
        const kv_layer_weights *x = &a->layer[1], *y = &b->layer[1];
        const kv_tensor *of_a[] = {&x->wq, &x->wk, &x->wv, &x->wo, &x->ffn->up, &x->ffn->down, &a->output};
        const kv_tensor *of_b[] = {&y->wq, &y->wk, &y->wv, &y->wo, &y->ffn->up, &y->ffn->down, &b->output};
        CHECK(y->attn_norm.w && !memcmp(y->attn_norm.w, x->attn_norm.w, a->desc.hidden * sizeof(float)));
        for (size_t t = 0; t < sizeof of_a / sizeof *of_a; t++) {
            const kv_tensor *u = of_a[t], *v = of_b[t];
            float *got = malloc(sizeof *got * u->rows * u->cols), *row = malloc(sizeof *row * u->cols);
            uint8_t *raw = malloc(v->row_bytes * u->rows);
            CHECK(u->f32 && !v->f32 && v->rows == u->rows && v->cols == u->cols);
            for (uint32_t r = 0, step; r < u->rows; r += step) { /* pieces that do not agree with heads */
                step = u->rows - r < 7 ? u->rows - r : 7;
                CHECK(!kv_tensor_floats(b, v, r, step, got + (size_t)r * u->cols, &err));
            }
            CHECKF(!memcmp(got, u->f32, sizeof *got * u->rows * u->cols), "%s tensor %zu", name[i], t);
            CHECK(!kv_tensor_read(b, v, 0, u->rows, raw, &err));
            uint32_t last = u->rows - 1;
            v->type->expand(raw + last * v->row_bytes, v->cols / v->type->block, row);
            CHECK(!memcmp(row, u->f32 + (size_t)last * u->cols, sizeof *row * u->cols));
            free(got), free(row), free(raw);
        }
        kv_model_close(a), kv_model_close(b);
    }
}

/* ------------------------------------------------------------------------------------------------ model */

static void test_layout(void)
{
    recipe r = plain;
    kv_model *m;
    kv_error err = {""};
    r.bias = r.freqs = true, r.linear = 4;
    kv_status st = open_recipe(&r, &m, &err);
    CHECKF(!st, "%s", err.msg);
    if (st) return;
    const kv_model_desc *d = &m->desc;
    CHECK(d->n_layer == 1 && d->n_q_head == 2 && d->n_kv_head == 1 && d->head_dim == 4 && d->hidden == 8);
    CHECK(d->ffn == 4 && d->n_vocab == 262 && d->n_ctx == 64 && d->norm_eps == 1e-5f && d->rope[0].theta == 10000);
    CHECK(d->tied && m->output.f32 == m->tok_embd.f32 && d->rope_dim == 4 && d->rope[0].mscale == 1 &&
          d->scale == 0.5f);
    CHECK(d->softcap == 0 && d->window[0] == 0 && !strcmp(d->arch, "llama") && !strcmp(d->file, "made.gguf"));
    CHECK(!strcmp(d->name, "made") && !strcmp(d->quant, "F32 x 14") && d->n_params == 8 * 262 + 2 + 324);
    /* theta^0 / 1 / 4 and theta^(-1/2) / 8 / 4 */
    CHECK(d->rope[0].inv_freq[0] == 0.25f && kv_close(d->rope[0].inv_freq[1], 0.01 / 32, 0, 1e-7));

    const kv_layer_weights *w = &m->layer[0];
    /* values count up through the file: rows of a head come back as 0 2 1 3, in both heads of Q and in K only */
    float q0 = 8 * 262 + 2 + 8, k0 = q0 + 64, v0 = k0 + 32, bq0 = v0 + 32 + 64;
    static const int from[8] = {0, 2, 1, 3, 4, 6, 5, 7};
    int wrong = 0;
    for (int i = 0; i < 64; i++) wrong += w->wq.f32[i] != q0 + (float)(from[i / 8] * 8 + i % 8);
    for (int i = 0; i < 32; i++) wrong += w->wk.f32[i] != k0 + (float)(from[i / 8] * 8 + i % 8);
    for (int i = 0; i < 32; i++) wrong += w->wv.f32[i] != v0 + (float)i;
    for (int i = 0; i < 8; i++) wrong += w->bq[i] != bq0 + (float)from[i];
    for (int i = 0; i < 4; i++) wrong += w->bv[i] != bq0 + 8 + (float)i;
    CHECKF(!wrong, "%d values in the wrong place", wrong);
    CHECK(!w->bk && !w->bo && w->ffn->down.f32[0] == bq0 + 12 + 8 + 64 &&
          m->out_norm.w[7] == bq0 + 12 + 8 + 64 + 32 + 7);
    CHECK(m->tok_embd.f32[262 * 8 - 1] == 262 * 8 - 1);
    kv_model_close(m);

    r = plain, r.output = true;
    CHECK(!open_recipe(&r, &m, &err) && !m->desc.tied && m->output.f32 != m->tok_embd.f32);
    kv_model_close(m);
}

static void refused(const char *what, const recipe *r, kv_status want, const char *says)
{
    kv_model *m;
    kv_error err = {""};
    kv_status st = open_recipe(r, &m, &err);
    CHECKF(st == want && !m && strstr(err.msg, says) && strstr(err.msg, "made.gguf"), "%s: status %d, '%s'", what, st,
           err.msg);
    kv_model_close(m);
}

#define REFUSED(want, says, ...)                                                                                       \
    do {                                                                                                               \
        recipe r_ = plain;                                                                                             \
        __VA_ARGS__;                                                                                                   \
        refused(#__VA_ARGS__, &r_, want, says);                                                                        \
    } while (0)

static void test_refusals(void)
{
    static const char *bad_merge[] = {"a b", "nospace", NULL}, *foreign_merge[] = {"a b", "c d", NULL};
    static const char *two[] = {"a", "b"};
    static const uint32_t types[] = {1, 7};
    REFUSED(KV_EUNSUPPORTED, "'mamba'", r_.arch = "mamba");
    REFUSED(KV_EFORMAT, "llama.expert_used_count", r_.extra_u32 = "expert_count");
    REFUSED(KV_EUNSUPPORTED, "kv_lora_rank", r_.extra_u32 = "attention.kv_lora_rank");
    REFUSED(KV_EUNSUPPORTED, "blk.0.attn_q_norm.weight", r_.extra_tensor = "blk.0.attn_q_norm.weight");
    REFUSED(KV_EUNSUPPORTED, "llama.attention.value_length", r_.extra_u32 = "attention.value_length");
    REFUSED(KV_EFORMAT, "llama.vocab_size", r_.extra_u32 = "vocab_size");
    REFUSED(KV_EFORMAT, "general.architecture", r_.skip_key = "general.architecture");
    REFUSED(KV_EFORMAT, "llama.block_count", r_.skip_key = "llama.block_count");
    REFUSED(KV_EFORMAT, "epsilon", r_.skip_key = "llama.attention.layer_norm_rms_epsilon");
    REFUSED(KV_EFORMAT, "occurs twice", r_.extra_u32 = "block_count");
    REFUSED(KV_EFORMAT, "occurs twice", r_.extra_tensor = "blk.0.ffn_up.weight");
    REFUSED(KV_EFORMAT, "blk.0.attn_norm.weight", r_.nan_in_norm = NAN);
    REFUSED(KV_EFORMAT, "blk.0.attn_norm.weight", r_.nan_in_norm = -INFINITY);
    REFUSED(KV_EUNSUPPORTED, "tokenizer.ggml.pre", r_.pre = "gpt-3");
    REFUSED(KV_EUNSUPPORTED, "tokenizer.ggml.pre", r_.pre = "");
    REFUSED(KV_EFORMAT, "tokenizer.ggml.merges", r_.merge = bad_merge);
    REFUSED(KV_EFORMAT, "tokenizer.ggml.merges", r_.merge = foreign_merge);
    REFUSED(KV_EFORMAT, "tokenizer.ggml.merges", r_.skip_key = "tokenizer.ggml.merges");
    REFUSED(KV_EFORMAT, "tokenizer.ggml.token_type", r_.token = two, r_.n_token = 2, r_.type = types);
    REFUSED(KV_EFORMAT, "tokenizer.ggml.bos_token_id", r_.add_bos = 1, r_.skip_key = "tokenizer.ggml.bos_token_id");
    REFUSED(KV_EFORMAT, "tokenizer.ggml.scores", r_.kind = "llama", r_.skip_key = "tokenizer.ggml.scores");

    kv_model *m;
    kv_error err = {""};
    CHECK(kv_model_open(dir, KV_WEIGHTS_F32, 1, &m, &err) == KV_EIO && strstr(err.msg, "config.json"));
    CHECK(kv_model_open("/dev/zero", KV_WEIGHTS_F32, 1, &m, &err) == KV_EFORMAT && strstr(err.msg, "/dev/zero"));
    CHECK(kv_model_open("no/such.gguf", KV_WEIGHTS_F32, 1, &m, &err) == KV_EIO && strstr(err.msg, "no/such.gguf"));

    /* a vocabulary of an unknown kind, or none, leaves the model usable on token ids */
    recipe r = plain;
    r.kind = "rwkv";
    CHECK(!open_recipe(&r, &m, &err) && !m->tok && strstr(m->no_tok, "rwkv"));
    kv_model_close(m);
    r.kind = NULL;
    CHECK(!open_recipe(&r, &m, &err) && !m->tok && *m->no_tok);
    kv_model_close(m);
}

/* The real file, when `make models` has fetched it: what its metadata says, and rows against their raw blocks. */
static void test_smollm(void)
{
    kv_model *m;
    kv_error err = {""};
    if (access(SMOLLM, R_OK)) {
        SKIP("no " SMOLLM);
        return;
    }
    kv_status st = kv_model_open(SMOLLM, KV_WEIGHTS_F32, 2, &m, &err);
    CHECKF(!st, "%s", err.msg);
    if (st) return;
    const kv_model_desc *d = &m->desc;
    CHECK(d->n_layer == 30 && d->n_q_head == 9 && d->n_kv_head == 3 && d->head_dim == 64 && d->hidden == 576);
    CHECK(d->ffn == 1536 && d->n_vocab == 49152 && d->rope[0].theta == 1e5f && d->tied && d->n_params == 134515008);
    CHECK(!strcmp(d->quant, "Q4_1 x 210, F32 x 61, Q8_0 x 1") && m->tok && !d->sha256[0]);
    /* row 3 of a head of wq in the file is element pair 1, second half: row 32 + 1 */
    kv_gguf *g;
    uint8_t raw[576 / 32 * 20];
    float y[576];
    CHECK(!kv_gguf_open(SMOLLM, &g, &err));
    const kv_gguf_tensor *t = kv_gguf_tensor_find(g, "blk.7.attn_q.weight");
    CHECK(t && t->quant->id == 3 && !kv_gguf_read_rows(g, t, 2 * 64 + 3, 1, raw, &err));
    kv_quant_find(3)->expand(raw, 18, y);
    CHECK(!memcmp(y, m->layer[7].wq.f32 + (2 * 64 + 33) * 576, sizeof y));
    kv_gguf_close(g);
    CHECK(!kv_model_hash(m, &err));
    CHECK(!strcmp(d->sha256, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"));

    /* the same weights whatever the threads */
    kv_model *one;
    CHECK(!kv_model_open(SMOLLM, KV_WEIGHTS_F32, 1, &one, &err));
    CHECK(!memcmp(one->tok_embd.f32, m->tok_embd.f32, 49152ul * 576 * 4));
    CHECK(!memcmp(one->layer[29].wk.f32, m->layer[29].wk.f32, 192ul * 576 * 4));
    kv_model_close(one);
    kv_model_close(m);
}

int main(void)
{
    if (!mkdtemp(dir)) return perror(dir), 1;
    test_quants_random();
    test_quants_by_hand();
    test_quants_golden();
    test_gguf_damaged();
    test_gguf_fields();
    test_model_mutated();
    test_folder_mutated();
    test_stored();
    test_layout();
    test_refusals();
    test_smollm();
    char path[64];
    snprintf(path, sizeof path, "%s/made.gguf", dir);
    remove(path), rmdir(dir);
    return kv_tally();
}
