/* attention_map.c - plot attention: the attention map of one head, recomputed from Q and K by plain softmax, with the
 * columns a policy keeps marked.
 *
 * Rows are the queries the trace holds: all of them at level qkv, observation and decoded rows at level obs. A map
 * wider than GRID cells is binned; a cell is the largest weight in it, so a single sharp column stays visible. The kept
 * set comes from `kv-sim keep`, the same program that made the results. */
#include "analyze/figure.h"
#include "analyze/kept.h"
#include "kernels/kernels.h"
#include "traces/cli.h"
#include "traces/memtext.h"
#include "traces/trace.h"

#include <math.h>
#include <stdlib.h>

#define GRID      320u /* cells per side */
#define ROW_BLOCK 64u
#define LEAST     1e-9 /* weights below are drawn as this; the colour scale ends far above */

typedef struct {
    const kv_trace *t;
    const kv_trace_info *i;
    uint32_t layer, layer_index, head;
    uint32_t row0;             /* first query row the trace has */
    uint32_t row_bin, col_bin; /* tokens per cell */
    uint32_t n_row_cell, n_col_cell;
    float *cell;      /* [n_row_cell][n_col_cell] largest weight; < 0 = nothing visible */
    uint8_t *kept;    /* [N]; tokens after the prompt are kept */
    double kept_mass; /* mean over decoded rows of the weight on kept columns; NaN without decoded rows */
} map;

static kv_status find_layer(map *m, kv_error *err)
{
    if (m->layer == UINT32_MAX && m->i->n_layer) m->layer = m->i->layer[m->i->n_layer / 2];
    for (uint32_t k = 0; k < m->i->n_layer; k++)
        if (m->i->layer[k] == m->layer) return m->layer_index = k, KV_OK;
    return kv_fail(err, KV_EMISSING, "no layer %u in trace '%s' (it has %u layers, %u to %u)", m->layer,
                   kv_trace_path(m->t), m->i->n_layer, m->i->n_layer ? m->i->layer[0] : 0,
                   m->i->n_layer ? m->i->layer[m->i->n_layer - 1] : 0);
}

/* The longest stored tail of query rows. */
static kv_status find_rows(map *m, kv_error *err)
{
    uint32_t n = m->i->n_token, p = m->i->n_prompt, obs = m->i->obs_rows;
    const uint32_t from[] = {0, obs < p ? p - obs : 0, p};
    for (int k = 0; k < 3; k++)
        if (from[k] < n && kv_trace_has(m->t, KV_S_Q, m->layer, m->head, from[k], n)) return m->row0 = from[k], KV_OK;
    return kv_fail(err, KV_EMISSING, "no queries of layer %u head %u in trace '%s': record at level obs or qkv",
                   m->layer, m->head, kv_trace_path(m->t));
}

static kv_status load_kept(map *m, const char *policy, const char *budget, kv_error *err)
{
    kv_kept k = {0};
    kv_status st = kv_kept_load(m->t, policy, budget, &k, err);
    if (st) return st;
    memset(m->kept, 1, m->i->n_token);
    memcpy(m->kept, kv_kept_row(&k, m->i, m->layer_index, m->head), m->i->n_prompt);
    kv_kept_free(&k);
    return KV_OK;
}

static kv_status fill(map *m, kv_error *err)
{
    const kv_trace_info *i = m->i;
    uint32_t n = i->n_token, d = i->head_dim, n_decoded = 0, kv_head = m->head / (i->n_q_head / i->n_kv_head);
    float *q = NULL, *k = NULL, *p = NULL;
    size_t n_kd = 0, n_p = 0;
    double mass = 0;
    kv_progress *bar = NULL;
    kv_status st;
    if (!kv_mul(n, d, &n_kd) || !kv_mul(n, ROW_BLOCK, &n_p)) return kv_fail(err, KV_ENOMEM, "out of memory");
    if ((st = kv_array(&q, (size_t)ROW_BLOCK * d, sizeof *q, err)) || (st = kv_array(&k, n_kd, sizeof *k, err)) ||
        (st = kv_array(&p, n_p, sizeof *p, err)) ||
        (st = kv_trace_read_f32(m->t, KV_S_K, m->layer, kv_head, 0, n, k, err)))
        goto out;
    bar = kv_progress_start("attention map", n - m->row0, "rows");
    for (uint32_t row = m->row0; row < n; row += ROW_BLOCK) {
        uint32_t rows = n - row < ROW_BLOCK ? n - row : ROW_BLOCK, keys = row + rows;
        if (kv_interrupted()) st = kv_fail(err, KV_EINTERRUPTED, "interrupted");
        if (!st) st = kv_trace_read_f32(m->t, KV_S_Q, m->layer, m->head, row, row + rows, q, err);
        kv_attn_shape s = {.n_row = rows,
                           .n_key = keys,
                           .d = d,
                           .row0 = row,
                           .window = i->window ? i->window[m->layer_index] : 0,
                           .scale = i->scale,
                           .softcap = i->softcap};
        if (!st && !kv_probs(&s, q, k, p)) st = kv_fail(err, KV_ENOMEM, "out of memory");
        if (st) goto out;
        for (uint32_t r = 0; r < rows; r++) {
            const float *w = p + (size_t)r * keys;
            float *cell = m->cell + (size_t)((row + r - m->row0) / m->row_bin) * m->n_col_cell;
            for (uint32_t j = 0; j <= row + r; j++)
                if (w[j] > cell[j / m->col_bin]) cell[j / m->col_bin] = w[j];
            if (row + r < i->n_prompt) continue;
            for (uint32_t j = 0; j <= row + r; j++) mass += m->kept[j] ? (double)w[j] : 0;
            n_decoded++;
        }
        kv_progress_step(bar, row + rows - m->row0, NULL);
    }
    m->kept_mass = n_decoded ? mass / n_decoded : NAN;
out:
    kv_progress_end(bar);
    free(q), free(k), free(p);
    return st;
}

/* row,column: centre of the cell in tokens; weight empty above the diagonal; kept: share of the cell's columns. */
static void put_csv(FILE *f, const map *m)
{
    uint32_t n = m->i->n_token;
    fputs("row,column,weight,kept\n", f);
    for (uint32_t r = 0; r < m->n_row_cell; r++)
        for (uint32_t c = 0; c < m->n_col_cell; c++) {
            uint32_t from = c * m->col_bin, to = from + m->col_bin < n ? from + m->col_bin : n, kept = 0;
            for (uint32_t j = from; j < to; j++) kept += m->kept[j] != 0;
            float w = m->cell[(size_t)r * m->n_col_cell + c];
            fprintf(f, "%g,%g,", m->row0 + (r + 0.5) * m->row_bin - 0.5, from + 0.5 * m->col_bin - 0.5);
            if (w >= 0) fprintf(f, "%.4g", fmax((double)w, LEAST));
            fprintf(f, ",%.4g\n", kept / (double)(to - from));
        }
}

kv_status kv_figure_attention(const char *plots, const char *folder, const char *trace, const char *policy,
                              const char *budget, uint32_t layer, uint32_t head, kv_error *err)
{
    kv_trace *t = NULL;
    map m = {.layer = layer, .head = head};
    char *csv = NULL, *word[5] = {NULL}, mass[64] = "";
    size_t n_csv = 0, n_cell = 0, n_kept = 0;
    kv_status st = kv_trace_open(trace, &t, err);
    if (st) return st;
    m.t = t, m.i = kv_trace_get_info(t);
    uint32_t n = m.i->n_token;
    if (head >= m.i->n_q_head) {
        st = kv_fail(err, KV_EMISSING, "no head %u in trace '%s': it has %u query heads", head, trace, m.i->n_q_head);
        goto out;
    }
    if ((st = find_layer(&m, err)) || (st = find_rows(&m, err))) goto out;
    m.row_bin = (n - m.row0 + GRID - 1) / GRID, m.col_bin = (n + GRID - 1) / GRID;
    m.n_row_cell = (n - m.row0 + m.row_bin - 1) / m.row_bin, m.n_col_cell = (n + m.col_bin - 1) / m.col_bin;
    n_cell = (size_t)m.n_row_cell * m.n_col_cell;
    if ((st = kv_array(&m.cell, n_cell, sizeof *m.cell, err)) || (st = kv_array(&m.kept, n, 1, err))) goto out;
    for (size_t c = 0; c < n_cell; c++) m.cell[c] = -1;
    if ((st = load_kept(&m, policy, budget, err)) || (st = fill(&m, err))) goto out;
    for (uint32_t j = 0; j < m.i->n_prompt; j++) n_kept += m.kept[j] != 0;
    FILE *f = kv_text_stream(&csv, &n_csv);
    if (f) put_csv(f, &m);
    if (m.kept_mass == m.kept_mass)
        snprintf(mass, sizeof mass, ", holding %.3f of the decoded rows' mass", m.kept_mass);
    word[0] = kv_format("%s: %s at %s keeps %zu of %u columns%s", m.i->prompt_id ? m.i->prompt_id : "prompt", policy,
                        budget, n_kept, m.i->n_prompt, mass);
    word[1] = kv_format("%u", m.i->n_prompt);
    word[2] = kv_format("%u", m.col_bin);
    word[3] = kv_format("%u %u %u", m.row0, m.row_bin, n);
    word[4] = kv_format("attention of %s, layer %u, head %u", m.i->model ? m.i->model : "?", m.layer, head);
    if (!f || fclose(f) || !word[0] || !word[1] || !word[2] || !word[3] || !word[4]) {
        st = kv_fail(err, KV_ENOMEM, "out of memory");
        goto out;
    }
    kv_figure_words w = {{word[4], NULL, word[0], word[1], word[2], word[3]}};
    st = kv_figure_draw(plots, folder, "attention", csv, n_csv, &w, err);
out:
    for (int k = 0; k < 5; k++) free(word[k]);
    free(csv), free(m.cell), free(m.kept);
    kv_trace_close(t);
    return st;
}
