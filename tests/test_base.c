/* test_base.c - traces/base.h, cli.h, npy.h: known answers, every half float, hostile .npy headers. */
#include "tests/check.h"
#include "traces/cli.h"
#include "traces/npy.h"

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static char dir[64];

static const char *in_dir(const char *name)
{
    static char path[4][256];
    static int turn;
    char *p = path[turn++ % 4];
    snprintf(p, 256, "%s/%s", dir, name);
    return p;
}

/* ---------------------------------------------------------------------------------------------- hashes */
static uint32_t crc_by_bit(uint32_t crc, const uint8_t *p, size_t n)
{
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int k = 0; k < 8; k++) crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
    }
    return ~crc;
}

static void sha_of(const void *p, size_t n, size_t piece, char hex[65])
{
    kv_sha256 s;
    kv_sha256_init(&s);
    for (size_t at = 0; at < n; at += piece)
        kv_sha256_update(&s, (const uint8_t *)p + at, n - at < piece ? n - at : piece);
    kv_sha256_hex(&s, hex);
}

static void test_hashes(void)
{
    uint8_t b[1000];
    kv_rng r = {7};
    char hex[65], again[65];
    CHECK(kv_crc32(0, "123456789", 9) == 0xcbf43926u);
    CHECK(kv_crc32(0, "", 0) == 0);
    for (size_t i = 0; i < sizeof b; i++) b[i] = (uint8_t)kv_rng_next(&r);
    for (size_t n = 0; n < 700; n++)
        CHECKF(kv_crc32(5, b + n % 17, n) == crc_by_bit(5, b + n % 17, n), "length %zu", n);
    CHECK(kv_crc32(kv_crc32(0, b, 333), b + 333, 400) == kv_crc32(0, b, 733));
    sha_of("", 0, 1, hex);
    CHECK(!strcmp(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
    sha_of("abc", 3, 1, hex);
    CHECK(!strcmp(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
    sha_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56, 56, hex);
    CHECK(!strcmp(hex, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"));
    for (size_t n = 50; n < 140; n++) {
        sha_of(b, n, n, hex), sha_of(b, n, 7, again);
        CHECKF(!strcmp(hex, again), "length %zu in pieces of 7", n);
    }
    CHECK(kv_write_file(in_dir("abc"), "abc", 3, NULL) == KV_OK && kv_sha256_file(in_dir("abc"), hex, NULL) == KV_OK);
    CHECK(!strncmp(hex, "ba7816bf", 8));
    CHECK(kv_sha256_file(in_dir("absent"), hex, NULL) == KV_EIO);
}

/* ----------------------------------------------------------------------------------------------- halves */
/* The value of a finite half, by the definition. */
static double half_value(uint32_t h)
{
    int e = (int)(h >> 10 & 31), m = (int)(h & 1023);
    double v = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}

static void test_halves(void)
{
    uint16_t h[65536], back[65536];
    static float f[65536];
    uint32_t wrong = 0, ties = 0, n_nan = 0;
    for (uint32_t i = 0; i < 65536; i++) h[i] = (uint16_t)i;
    kv_decode_f32(KV_F16, h, 65536, f);
    CHECK(kv_encode_f32(KV_F16, f, 65536, back)); /* infinities that were infinite before are no overflow */
    for (uint32_t i = 0; i < 65536; i++) {
        float one = kv_f16_to_f32((uint16_t)i);
        if ((i & 0x7fff) > 0x7c00) { /* NaN: stays one, both ways */
            n_nan += isnan(f[i]) && isnan(one) && (kv_f32_to_f16(f[i]) & 0x7fff) > 0x7c00;
            continue;
        }
        if ((i & 0x7fff) == 0x7c00)
            wrong += !isinf(f[i]) || !!signbit(f[i]) != (int)(i >> 15);
        else
            wrong += (double)f[i] != half_value(i) || !!signbit(f[i]) != (int)(i >> 15);
        wrong += memcmp(&one, &f[i], 4) != 0 || back[i] != i || kv_f32_to_f16(f[i]) != i;
    }
    CHECKF(wrong == 0, "%u of 65536", wrong);
    CHECK(n_nan == 2 * 1023);
    /* between two neighbours: the nearer one, and the even one from exactly between */
    wrong = 0;
    for (uint32_t i = 0; i < 0x7bff; i++) {
        float mid = (float)((half_value(i) + half_value(i + 1)) / 2); /* exact: one more bit */
        wrong += kv_f32_to_f16(mid) != (i & 1 ? i + 1 : i);
        wrong += kv_f32_to_f16(nextafterf(mid, 0)) != i || kv_f32_to_f16(nextafterf(mid, 1e9f)) != i + 1;
        wrong += kv_f32_to_f16(-mid) != (0x8000 | (i & 1 ? i + 1 : i));
        ties++;
    }
    CHECKF(wrong == 0, "%u of %u", wrong, ties);
    const float big[4] = {65519.0f, 65520.0f, INFINITY, -1e30f};
    CHECK(kv_encode_f32(KV_F16, big, 1, back) && back[0] == 0x7bff);
    CHECK(!kv_encode_f32(KV_F16, big, 2, back) && back[1] == 0x7c00);
    CHECK(kv_encode_f32(KV_F16, big + 2, 1, back) && back[0] == 0x7c00);
    CHECK(!kv_encode_f32(KV_F16, big + 3, 1, back) && back[0] == 0xfc00);
    for (int i = 0; i < 40; i++) f[i] = i == 33 ? 1e6f : 1; /* noticed in the vector part as well as behind it */
    CHECK(!kv_encode_f32(KV_F16, f, 40, back) && kv_encode_f32(KV_F16, f, 33, back));
    f[33] = 1, f[3] = 1e6f;
    CHECK(!kv_encode_f32(KV_F16, f, 40, back));
}

static void test_bf16(void)
{
    kv_rng r = {3};
    uint32_t wrong = 0;
    for (int i = 0; i < 100000; i++) {
        uint32_t u = (uint32_t)kv_rng_next(&r);
        if (i % 3 == 0) u = (u & 0xffff0000u) | 0x8000; /* a tie */
        float v;
        memcpy(&v, &u, 4);
        if (isnan(v)) {
            wrong += !isnan(kv_bf16_to_f32(kv_f32_to_bf16(v)));
            continue;
        }
        uint32_t low = u & 0xffff, up = low > 0x8000 || (low == 0x8000 && (u >> 16 & 1));
        wrong += kv_f32_to_bf16(v) != (uint16_t)((u >> 16) + up);
    }
    CHECKF(wrong == 0, "%u of 100000", wrong);
    uint16_t b[37], one[37];
    float f[37], back[37];
    for (int i = 0; i < 37; i++) f[i] = (float)kv_rng_normal(&r), one[i] = kv_f32_to_bf16(f[i]);
    CHECK(kv_encode_f32(KV_BF16, f, 37, b) && !memcmp(b, one, sizeof b));
    kv_decode_f32(KV_BF16, b, 37, back);
    for (int i = 0; i < 37; i++) CHECK(back[i] == kv_bf16_to_f32(one[i]) && kv_close(back[i], f[i], 0, 0x1p-8));
    kv_dtype t;
    for (int i = 0; i < KV_DTYPE_COUNT; i++) CHECK(kv_dtype_parse(kv_dtype_name((kv_dtype)i), &t) && t == (kv_dtype)i);
    CHECK(!kv_dtype_parse("f8", &t) && kv_dtype_bytes(KV_DTYPE_COUNT) == 0);
}

/* ------------------------------------------------------------------------------------- numbers, options */
static void test_rng(void)
{
    kv_rng r = {0};
    CHECK(kv_rng_next(&r) == 0xe220a8397b1dcdafu && kv_rng_next(&r) == 0x6e789e6aa1b965f4u);
    double sum = 0, square = 0, least = 1, most = 0;
    for (int i = 0; i < 100000; i++) {
        double u = kv_rng_unit(&r), z = kv_rng_normal(&r);
        sum += z, square += z * z;
        if (u < least) least = u;
        if (u > most) most = u;
    }
    CHECK(least >= 0 && most < 1 && least < 1e-3 && most > 0.999);
    CHECK(kv_close(sum / 1e5, 0, 0.02, 0) && kv_close(square / 1e5, 1, 0.02, 0));
}

static void test_numbers(void)
{
    static const struct {
        const char *s;
        uint64_t v;
    } good[] = {{"0", 0},       {"64MiB", 64 << 20}, {"2G", 2ull << 30}, {"1e9", 1000000000},
                {"1.5k", 1536}, {"3KB", 3000},       {"10 B", 10},       {"18446744073709551615", UINT64_MAX}};
    static const char *const bad[] = {"", "x", "1x", "-1", "1e30", "0x10", "nan", "inf", " 1", "1MiBs", "1 M x"};
    uint64_t u;
    double d;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        CHECKF(kv_parse_bytes(good[i].s, &u) && u == good[i].v, "%s", good[i].s);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) CHECKF(!kv_parse_bytes(bad[i], &u), "%s", bad[i]);
    CHECK(!kv_parse_u64("18446744073709551616", &u) && !kv_parse_u64("+1", &u) && !kv_parse_u64("10x", &u));
    CHECK(kv_parse_f64("-1.5e-3", &d) && d == -1.5e-3);
    CHECK(!kv_parse_f64("1,5", &d) && !kv_parse_f64("1e999", &d) && !kv_parse_f64("", &d) && !kv_parse_f64("e5", &d));
    static const char *const names[] = {"snapkv", "h2o", "tova", "streaming"};
    const char *near = kv_nearest("snpkv", names, 4);
    CHECK(near == names[0] && kv_nearest("stream", names, 4) == names[3] && !kv_nearest("qwertyuiop", names, 4));
}

static kv_status parse(const char *line, const kv_opt *opts, kv_list *rest, kv_error *err)
{
    static char copy[256];
    char *argv[16] = {"prog"};
    int argc = 1;
    snprintf(copy, sizeof copy, "%s", line);
    for (char *p = strtok(copy, " "); p; p = strtok(NULL, " ")) argv[argc++] = p;
    return kv_cli_parse(argc, argv, opts, rest, err);
}

static void test_options(void)
{
    bool json = false, quiet = false;
    const char *out = NULL;
    kv_list p = {0}, rest = {0};
    uint32_t u = 0;
    uint64_t big = 0;
    double x = 0;
    const kv_opt opts[] = {{"json", 'j', KV_OPT_FLAG, &json}, {"quiet", 'q', KV_OPT_FLAG, &quiet},
                           {"output", 'o', KV_OPT_STR, &out}, {"policy", 'p', KV_OPT_LIST, &p},
                           {"layers", 0, KV_OPT_U32, &u},     {"mem", 0, KV_OPT_BYTES, &big},
                           {"tol", 0, KV_OPT_F64, &x},        {0}};
    kv_error err;
    CHECK(parse("-jq a -oX --policy=a -p b --layers 7 --mem=1K --tol 1e-3 - -- -p --x", opts, &rest, &err) == KV_OK);
    CHECK(json && quiet && !strcmp(out, "X") && u == 7 && big == 1024 && x == 1e-3);
    CHECK(p.n == 2 && !strcmp(p.v[0], "a") && !strcmp(p.v[1], "b"));
    CHECK(rest.n == 4 && !strcmp(rest.v[0], "a") && !strcmp(rest.v[1], "-") && !strcmp(rest.v[2], "-p"));
    static const char *const bad[][2] = {{"--layrs 3", "did you mean '--layers'"},
                                         {"--layers 3x", "--layers '3x'"},
                                         {"--layers 4294967296", "--layers"},
                                         {"--layers", "needs a value"},
                                         {"--json=1", "takes no value"},
                                         {"-z", "'-z'"},
                                         {"-o", "'-o'"},
                                         {"--tol 1e", "--tol"},
                                         {"--layer=1", "--layers"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECKF(parse(bad[i][0], opts, &rest, &err) == KV_EMISUSE && strstr(err.msg, bad[i][1]), "%s: %s", bad[i][0],
               err.msg);
    kv_list_free(&p), kv_list_free(&rest);
}

/* ------------------------------------------------------------------------------------------------ files */
static void test_files(void)
{
    uint8_t *b = NULL;
    size_t n;
    kv_error err;
    struct stat sb;
    CHECK(kv_write_file(in_dir("f"), "hello", 5, &err) == KV_OK && stat(in_dir("f.partial"), &sb) != 0);
    CHECK(kv_write_file(in_dir("f"), "world!", 6, &err) == KV_OK);
    CHECK(kv_read_file(in_dir("f"), 6, &b, &n, &err) == KV_OK && n == 6 && !memcmp(b, "world!", 7));
    free(b);
    CHECK(kv_read_file(in_dir("f"), 5, &b, &n, &err) == KV_EFORMAT && !b);
    CHECK(kv_read_file(dir, 5, &b, &n, &err) == KV_EIO && kv_read_file("/dev/zero", 1000, &b, &n, &err) == KV_EFORMAT);
    CHECK(kv_write_file("/dev/null", "x", 1, &err) == KV_OK && stat("/dev/null", &sb) == 0 && !S_ISREG(sb.st_mode));
    CHECK(kv_write_file(dir, "x", 1, &err) == KV_EIO && kv_write_file(in_dir("no/f"), "x", 1, &err) == KV_EIO);
    if (stat("/dev/full", &sb) == 0)
        CHECK(kv_write_file("/dev/full", "x", 1, &err) == KV_EIO && strstr(err.msg, "space"));
    kv_outfile o;
    CHECK(kv_outfile_open(in_dir("g"), &o, &err) == KV_OK);
    kv_outfile_abandon(&o);
    CHECK(stat(in_dir("g"), &sb) != 0 && stat(in_dir("g.partial"), &sb) != 0);
    CHECK(kv_fail(&err, KV_EIO, "a\nb\x1b[31m") == KV_EIO && !strcmp(err.msg, "a?b?[31m"));
}

/* -------------------------------------------------------------------------------------------------- npy */
/* A .npy image with the given header text. */
static size_t make_npy(uint8_t *b, int version, const char *head, size_t data)
{
    size_t n = strlen(head), at = version == 1 ? 10 : 12;
    memcpy(b, "\x93NUMPY", 6);
    b[6] = (uint8_t)version, b[7] = 0;
    if (version == 1)
        kv_put16(b + 8, (uint16_t)n);
    else
        kv_put32(b + 8, (uint32_t)n);
    memcpy(b + at, head, n);
    memset(b + at + n, 1, data);
    return at + n + data;
}

static void test_npy(void)
{
    uint8_t b[4096];
    kv_npy a;
    kv_error err;
    size_t n = make_npy(b, 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", 24);
    CHECK(kv_npy_parse(b, n, "x", &a, &err) == KV_OK && a.rank == 2 && a.n == 6 && a.shape[1] == 3 && a.size == 4);
    kv_npy_free(&a);
    for (size_t cut = 0; cut < n; cut++) CHECKF(kv_npy_parse(b, cut, "x", &a, &err) != KV_OK, "cut at %zu", cut);
    n = make_npy(b, 2, "{\"shape\":(), \"descr\":\"|u1\",\"fortran_order\":True}", 1);
    CHECK(kv_npy_parse(b, n, "x", &a, &err) == KV_OK && a.rank == 0 && a.n == 1);
    CHECK(kv_npy_to_f32(&a, &err) == KV_OK && *(float *)a.data == 1.0f);
    kv_npy_free(&a);
    static const struct {
        const char *head;
        size_t data;
        const char *says;
    } bad[] = {
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999,), }", 4, "9999999999999999999"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }", 0, "header"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4294967296, 4294967296, 2), }", 0, "header"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }", 4, "1000000000"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 1, 1, 1, 1, 1), }", 4, "header"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", 4, "header"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1), }", 4, "header"},
        {"{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", 4, "big-endian"},
        {"{'descr': '<f4', 'fortran_order': True, 'shape': (1, 1), }", 4, "column-major"},
        {"{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }", 8, "'<c8'"},
        {"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", 8, "'|O'"},
        {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", 4, "record"},
        {"{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", 4, "header"},
        {"{'descr': '<f4', 'shape': (1,), }", 4, "header"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), } x", 4, "header"},
        {"{'descr': '<f4", 4, "header"},
        {"", 0, "header"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        n = make_npy(b, 1, bad[i].head, bad[i].data);
        CHECKF(kv_npy_parse(b, n, "x", &a, &err) != KV_OK && strstr(err.msg, bad[i].says) && !a.data, "%zu: %s", i,
               err.msg);
    }
    /* through a file, and back */
    const double d[4] = {1, -2, 0.5, 1e10};
    const size_t shape[2] = {2, 2};
    CHECK(kv_npy_write(in_dir("d.npy"), "<f8", 2, shape, d, &err) == KV_OK);
    CHECK(kv_npy_read(in_dir("d.npy"), &a, &err) == KV_OK && a.kind == 'f' && a.size == 8 && !memcmp(a.data, d, 32));
    CHECK(kv_npy_to_f32(&a, &err) == KV_OK && ((float *)a.data)[1] == -2.0f && ((float *)a.data)[3] == 1e10f);
    kv_npy_free(&a);
    const int16_t s[3] = {-3, 0, 300};
    const size_t three = 3;
    CHECK(kv_npy_write(in_dir("s.npy"), "<i2", 1, &three, s, &err) == KV_OK);
    CHECK(kv_npy_read(in_dir("s.npy"), &a, &err) == KV_OK && kv_npy_to_f32(&a, &err) == KV_OK);
    CHECK(((float *)a.data)[0] == -3.0f && ((float *)a.data)[2] == 300.0f);
    kv_npy_free(&a);
    CHECK(kv_npy_write(in_dir("x.npy"), "<c8", 1, &three, s, &err) == KV_EUNSUPPORTED);
    CHECK(kv_npy_read(in_dir("absent.npy"), &a, &err) == KV_EIO && strstr(err.msg, "absent.npy"));
    CHECK(truncate(in_dir("d.npy"), 140) == 0 && kv_npy_read(in_dir("d.npy"), &a, &err) == KV_EFORMAT);
}

int main(void)
{
    snprintf(dir, sizeof dir, "/tmp/kv_base_XXXXXX");
    if (!mkdtemp(dir)) return perror("mkdtemp"), 1;
    test_hashes();
    test_halves();
    test_bf16();
    test_rng();
    test_numbers();
    test_options();
    test_files();
    test_npy();
    char *rm = kv_format("rm -rf '%s'", dir);
    if (!rm || system(rm)) printf("could not remove %s\n", dir);
    free(rm);
    return kv_tally();
}
