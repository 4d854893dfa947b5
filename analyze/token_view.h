/* token_view.h - a prompt's own words, what attention wants of each token, and what some policies keep of it. */
#ifndef KV_TOKEN_VIEW_H
#define KV_TOKEN_VIEW_H

#include "analyze/kept.h"

typedef struct {
    char *policy, *budget; /* as given */
    kv_kept kept;
} kv_pick;

typedef struct {
    kv_trace *trace;
    const kv_trace_info *info;
    char *text;        /* UTF-8 of the whole trace, or NULL: imported and synthetic traces have none */
    uint32_t *offset;  /* [n_token+1] bytes of the text, or NULL */
    uint8_t *evidence; /* [n_prompt] 1 = overlaps an evidence span */
    uint32_t n_evidence;
    float *mass; /* [n_layer][n_kv_head][n_prompt]: full-cache weight, mean over decoded rows and the group's query
                    heads; NULL when the trace has no decoded rows */
    kv_pick *pick;
    size_t n_pick;
} kv_token_view;

/* Opens the trace and measures the mass. free with kv_token_view_free, also after a failure. */
kv_status kv_token_view_open(const char *path, kv_token_view *out, kv_error *err);
kv_status kv_token_view_pick(kv_token_view *v, const char *policy, const char *budget, kv_error *err);
void kv_token_view_free(kv_token_view *v);

/* Of the slots of layers [layer0, layer1) and KV heads [head0, head1) (query heads where a set is per query head): how
 * many hold token i in both picks, only in a, only in b, in neither; and the token's mass in those slots, divided by
 * the number of all of them. */
enum { KV_BOTH, KV_ONLY_A, KV_ONLY_B, KV_NEITHER, KV_TOKEN_STATES };
typedef struct {
    uint32_t slots[KV_TOKEN_STATES];
    double mass[KV_TOKEN_STATES];
} kv_token_state;
kv_token_state kv_token_state_of(const kv_token_view *v, size_t a, size_t b, uint32_t layer0, uint32_t layer1,
                                 uint32_t head0, uint32_t head1, uint32_t token);

/* JSON of the view for the page: {"name", "P", "layers", "kv", "text" (base64), "off", "ev", "mass", "picks"}; see
 * page.js for the encodings. */
void kv_token_view_json(FILE *f, const kv_token_view *v);

#endif
