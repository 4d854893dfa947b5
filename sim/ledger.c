/* ledger.c - slots, bytes and reads of points; budgets rescaled to equal bytes. */
#include "sim/ledger.h"

#include <math.h>
#include <stdlib.h>

/* No layer can be cut before every layer has been seen. */
static bool waits_for_all(const kv_spec *s)
{
    return s->layers == KV_LAYERS_POOL || s->layers == KV_LAYERS_LAVA || (s->layers == KV_LAYERS_CAKE && !s->cascading);
}

/* Slots held at most while the prompt passes: a full layer stands beside the layers before it. */
static uint64_t prefill_slots(const kv_plan *p, const kv_point *x, uint64_t kept)
{
    const kv_scene *sc = p->scene;
    const kv_spec *s = &p->spec[x->spec];
    const kv_ranking *rk = &p->ranking[p->ranking_of[x->spec]];
    uint64_t Hkv = sc->info->n_kv_head, full = sc->n_cut * Hkv, n = sc->n_evict, last = 0,
             total = x->c.tokens * n * Hkv;
    if (!s->file && waits_for_all(s)) return n * full;
    if (!s->file && s->select == KV_SELECT_BLOCKS) { /* goes through in blocks */
        uint64_t most = (uint64_t)x->c.tokens + s->block_size;
        return n * Hkv * (most < sc->n_cut ? most : sc->n_cut);
    }
    if (!s->file && ((s->layers == KV_LAYERS_CAKE && s->cascading) || s->layers == KV_LAYERS_LAVA_CODE)) {
        uint64_t before = (n - 1) * full; /* the first layers may hold the whole budget until later ones take it */
        return full + (total < before ? total : before);
    }
    for (uint32_t u = 0; u < rk->n_unit; u++) last += x->counts[(n - 1) * rk->n_unit + u];
    return kept - (rk->granularity == KV_GRAN_LAYER ? last * Hkv : last) + full;
}

/* Entries in whole pages that rows read, summed over the measured rows, of a unit that keeps `count` and every later
 * token, stored densely. */
static uint64_t prefix_reads(const kv_scene *sc, uint64_t count, uint32_t page)
{
    uint64_t sum = 0, first = count + (sc->row_first - sc->n_cut) + 1;
    for (uint64_t r = 0; r < sc->n_row; r++) sum += (first + r + page - 1) / page * page;
    return sum;
}

void kv_ledger_fill(const kv_plan *p, const kv_point *point, const kv_replay *rp, size_t i, uint32_t page,
                    kv_ledger *out)
{
    const kv_scene *sc = p->scene;
    const kv_point *x = &point[i];
    const kv_ranking *rk = &p->ranking[p->ranking_of[x->spec]];
    uint32_t Hkv = sc->info->n_kv_head, Hq = sc->info->n_q_head, U = rk->n_unit;
    /* tokens after the cut: one slot per KV head and layer, per query head where heads are stored repeated */
    uint64_t layer_token = rk->granularity == KV_GRAN_QUERY_HEAD ? Hq : Hkv, n = sc->n_evict;
    double later = sc->n_row ? (double)(sc->row_first - sc->n_cut) + (sc->n_row + 1) / 2.0 : 0;
    double *unit_read = out->unit_read, slot = (double)sc->slot_bytes;
    bool schedule = kv_schedule_used(p, x->spec);
    *out = (kv_ledger){.unit_read = unit_read};
    out->entry_bytes = sc->slot_bytes * (rk->granularity == KV_GRAN_LAYER ? Hkv : 1);
    out->kept_slots = kv_plan_slots(p, x->spec, x->counts);
    out->nominal_slots = (uint64_t)x->nominal * n * Hkv;
    out->kept_bytes = out->kept_slots * sc->slot_bytes, out->nominal_bytes = out->nominal_slots * sc->slot_bytes;
    out->prefill_bytes = prefill_slots(p, x, out->kept_slots) * sc->slot_bytes;
    out->mean_bytes = (double)out->kept_bytes + later * (double)(n * layer_token) * slot;
    out->peak_bytes = out->kept_bytes + (uint64_t)(sc->n_token - sc->n_cut) * n * layer_token * sc->slot_bytes;
    out->match_bytes = (double)out->nominal_bytes + later * (double)(n * Hkv) * slot;
    out->full_bytes = (sc->n_cut + later) * (double)(n * Hkv) * slot;
    if (schedule) out->mean_bytes = 0, out->peak_bytes = 0; /* counted row by row, later tokens included */
    for (uint32_t l = 0; l < n; l++) {
        if (schedule) {
            const kv_row_slots *rows = &rp->rows[i * n + l];
            out->mean_bytes += (double)rows->sum / sc->n_row * (double)out->entry_bytes;
            out->peak_bytes += rows->peak * out->entry_bytes;
        }
        for (uint32_t u = 0; u < U; u++) {
            uint64_t sum =
                schedule ? rp->read[(i * n + l) * Hq + u] : prefix_reads(sc, x->counts[(size_t)l * U + u], page);
            unit_read[(size_t)l * U + u] = (double)sum / sc->n_row * (double)out->entry_bytes;
            out->read_bytes += unit_read[(size_t)l * U + u];
        }
    }
}

/* ------------------------------------------------------------------------------------------------ equal bytes */
/* A search over whole tokens: mean bytes rise with them, nearly always by steps. */
typedef struct {
    int64_t lo, hi;        /* lo gives too little, hi enough */
    uint32_t best;         /* nearest so far */
    double target, missed; /* bytes; by how much the best misses them */
    bool done;
} search;

static kv_status set_tokens(const kv_plan *p, kv_point *x, uint32_t tokens, kv_error *err)
{
    x->c.tokens = tokens, x->c.real = tokens;
    x->c.share = x->c.frac = p->scene->n_cut ? (double)tokens / p->scene->n_cut : 0;
    return kv_plan_counts(p, x->spec, &x->c, x->counts, err);
}

static void narrow(search *s, uint32_t tokens, double bytes)
{
    double missed = fabs(bytes - s->target);
    if (missed < s->missed || (missed <= s->missed && tokens < s->best)) s->missed = missed, s->best = tokens;
    if (bytes < s->target)
        s->lo = tokens;
    else
        s->hi = tokens;
    s->done = bytes == s->target || s->hi - s->lo <= 1;
}

kv_status kv_ledger_match(const kv_plan *p, kv_point *point, size_t n_point, uint32_t threads, kv_error *err)
{
    const kv_scene *sc = p->scene;
    search *s = NULL;
    kv_point *open = NULL;
    size_t *of = NULL, n = 0;
    double *unit = NULL;
    kv_status st = kv_array(&s, n_point, sizeof *s, err);
    if (!st) st = kv_array(&open, n_point, sizeof *open, err);
    if (!st) st = kv_array(&of, n_point, sizeof *of, err);
    if (!st) st = kv_array(&unit, (size_t)sc->n_evict * sc->info->n_q_head, sizeof *unit, err);
    for (size_t i = 0; i < n_point && !st; i++)
        s[i] = (search){.lo = -1, .hi = sc->n_cut + (int64_t)1, .missed = INFINITY, .best = point[i].c.tokens};
    /* the nominal budget first, then halves of what is left: no more rounds than tokens have bits */
    for (int round = 0; round < 34 && !st; round++) {
        kv_replay rp = {0};
        size_t n_replay = 0;
        n = 0;
        for (int prefix = 0; prefix < 2; prefix++) { /* those that must be replayed stand first */
            for (size_t i = 0; i < n_point && !st; i++) {
                if (s[i].done || kv_schedule_used(p, point[i].spec) == prefix) continue;
                if (round) st = set_tokens(p, &point[i], (uint32_t)(s[i].lo + (s[i].hi - s[i].lo) / 2), err);
                of[n] = i, open[n++] = point[i];
            }
            if (!prefix) n_replay = n;
        }
        if (st || !n) break;
        if (n_replay) st = kv_replay_run(p, open, n_replay, 0, threads, NULL, NULL, &rp, err);
        for (size_t k = 0; k < n && !st; k++) {
            kv_ledger l = {.unit_read = unit};
            kv_ledger_fill(p, open, &rp, k, 1, &l);
            s[of[k]].target = l.match_bytes;
            narrow(&s[of[k]], open[k].c.tokens, l.mean_bytes);
        }
        kv_replay_free(&rp);
    }
    for (size_t i = 0; i < n_point && !st; i++) st = set_tokens(p, &point[i], s[i].best, err);
    free(s), free(open), free(of), free(unit);
    return st;
}
