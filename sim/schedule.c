/* schedule.c - schedules of one layer: from masks, selections that depend on the budget, or decode rules. */
#include "sim/schedule.h"

#include <stdlib.h>

#include "sim/future.h"
#include "sim/mixdim.h"
#include "sim/select.h"

const char *const kv_replay_class_names[] = {"ranking", "chain", "simulated"};

kv_replay_class kv_replay_class_of(const kv_spec *s)
{
    if (s->oracle & KV_ORACLE_STEPS) return KV_REPLAY_SIMULATED;
    if (s->oracle & KV_ORACLE_RANK) return KV_REPLAY_RANKING; /* a prefix of the oracle's order */
    if (s->decode != KV_DECODE_KEEP || s->select == KV_SELECT_BLOCKS) return KV_REPLAY_SIMULATED;
    return s->select >= KV_SELECT_TWO_STAGE ? KV_REPLAY_CHAIN : KV_REPLAY_RANKING;
}

bool kv_schedule_needed(const kv_spec *s)
{
    return kv_replay_class_of(s) != KV_REPLAY_RANKING;
}

bool kv_schedule_fixed(const kv_spec *s)
{
    return s->decode == KV_DECODE_KEEP && !(s->oracle & KV_ORACLE_STEPS) && !s->reindex &&
           s->select != KV_SELECT_MIXDIM;
}

bool kv_schedule_used(const kv_plan *p, size_t i)
{
    const kv_ranking *r = &p->ranking[p->ranking_of[i]];
    return p->spec[i].file ? r->at || r->seen : kv_schedule_needed(&p->spec[i]);
}

bool kv_schedule_planned(const kv_plan *p, size_t i)
{
    const kv_spec *s = &p->spec[i];
    return s->file || (kv_schedule_fixed(s) && s->select != KV_SELECT_BLOCKS);
}

void kv_schedule_free(kv_schedule *s)
{
    free(s->at), free(s->seen), free(s->k), free(s->v), free(s->slots);
    *s = (kv_schedule){0};
}

bool kv_schedule_visible(const kv_schedule *s, const kv_scene *sc, uint32_t u, uint32_t p, uint32_t r)
{
    if (s->seen) return s->seen[((size_t)r * s->n_unit + u) * ((sc->n_token + 7) / 8) + p / 8] >> (p % 8) & 1;
    int32_t at = s->at[(size_t)u * sc->n_token + p];
    return at < 0 || (uint32_t)at > r;
}

uint32_t kv_schedule_slots(const kv_schedule *s, const kv_scene *sc, uint32_t u)
{
    uint32_t n = 0;
    if (s->slots) return s->slots[u];
    for (uint32_t i = 0; i < sc->n_cut; i++) n += kv_schedule_visible(s, sc, u, i, 0);
    return n;
}

kv_status kv_schedule_make(const kv_plan *p, size_t i, const kv_budget_resolved *c, const uint32_t *counts, kv_layer *l,
                           kv_schedule *out, kv_error *err)
{
    const kv_spec *s = &p->spec[i];
    const kv_scene *sc = p->scene;
    const kv_ranking *rk = &p->ranking[p->ranking_of[i]];
    *out = (kv_schedule){.n_unit = rk->n_unit};
    size_t n = (size_t)out->n_unit * sc->n_token, row = out->n_unit * (size_t)((sc->n_token + 7) / 8);
    kv_status st = kv_array(&out->at, n, sizeof *out->at, err);
    for (size_t k = 0; k < n && !st; k++) out->at[k] = s->file && rk->at ? rk->at[l->order * n + k] : -1;
    if (!st && s->file && rk->seen) {
        st = kv_array(&out->seen, sc->n_row + (size_t)1, row, err);
        for (size_t r = 0; r <= sc->n_row && !st; r++)
            memcpy(out->seen + r * row, rk->seen + (r * sc->n_evict + l->order) * row, row);
    }
    if (st || s->file) goto out;
    if (s->oracle & KV_ORACLE_STEPS || kv_decode_rules[s->decode].flags & KV_RULE_FORESEES)
        st = kv_oracle_rows(p, i, c, counts, l, out, err);
    else if (s->select == KV_SELECT_TWO_STAGE)
        st = kv_select_two_stage(p, i, c, counts, l, out->at, err);
    else if (s->select == KV_SELECT_BLOCKS)
        st = kv_select_blocks(p, i, c, l, out->at, err);
    else if (s->select == KV_SELECT_MASS || s->select == KV_SELECT_SPANS)
        st = kv_select_first(p, i, c, counts, l, out->at, err);
    else if (s->select == KV_SELECT_MIXDIM)
        st = kv_mixdim_make(p, i, counts, l, out, err);
    else if (kv_decode_rules[s->decode].flags & KV_RULE_HIDES)
        st = kv_hide_rows(s, l, out, err);
    else
        st = kv_step_rows(p, i, c, counts, l, out, err);
out:
    if (st) kv_schedule_free(out);
    return st;
}
