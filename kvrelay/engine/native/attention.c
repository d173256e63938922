// Flash attention (Dao et al. 2022) over the paged pool, by tiles of 64 keys with online softmax.
//
// Tiles begin at multiples of 64 of the position, never at a chunk's edge, so the order of a row's
// sums does not depend on how its prompt was cut.
#include "attention.h"

#include <math.h>
#include <stdlib.h>

enum { TILES_PER_THREAD = 4, ALL_LINES = INT32_MAX, VECTORS_TOGETHER = WIDE < 8 ? 8 / WIDE : 1 };

static workspace *get_workspace(int64_t head_dim) {
    static _Thread_local workspace space;
    if (space.head_dim < head_dim) {
        free(space.queries);
        int64_t num_parts = (2 * TILE_ROWS + BF16_ROWS) * in_bf16_steps(head_dim) + BF16_ROWS * TILE_KEYS;
        int64_t num_floats = 3 * TILE_ROWS * head_dim + TILE_ROWS * TILE_KEYS + 2 * TILE_KEYS * in_bf16_steps(head_dim) + num_parts;
        space.queries = aligned_alloc(64, num_floats * sizeof(float));
        if (space.queries == NULL) abort();
        space.out = space.queries + TILE_ROWS * head_dim;
        space.scores = space.out + TILE_ROWS * head_dim;
        space.keys = space.scores + TILE_ROWS * TILE_KEYS;
        space.values = space.keys + TILE_KEYS * in_bf16_steps(head_dim);
        space.integers = (int16_t *)(space.values + TILE_KEYS * in_bf16_steps(head_dim));
        space.weight_parts = (bf16_part *)((float *)space.integers + TILE_ROWS * head_dim);
        space.query_parts = space.weight_parts + BF16_ROWS * TILE_KEYS;
        space.split_integers = (int8_t *)space.query_parts;
        space.head_dim = head_dim;
    }
    return &space;
}

static inline uint16_t f32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The layer, starting at one of its heads.
static kv_layer from_head(const kv_layer *kv, int64_t head) {
    kv_layer of_head = *kv;
    of_head.keys = (char *)kv->keys + head * kv_row_bytes(kv->dtype, kv->head_dim);
    of_head.values = (char *)kv->values + head * kv_row_bytes(kv->dtype, kv->head_dim);
    return of_head;
}

// Finds up to TILE_KEYS keys from key_begin to `last`; none if key_begin is after `last`.
static void find_keys(const kv_layer *kv, const segment *s, int64_t key_begin, int64_t last, key_tile *tile) {
    int64_t row = kv->num_kv_heads * kv_row_items(kv->dtype, kv->head_dim);
    int64_t block = key_begin / kv->block_size, within = key_begin % kv->block_size, num_left = last + 1 - key_begin;
    tile->num_keys = num_left < 0 ? 0 : num_left < TILE_KEYS ? num_left : TILE_KEYS;
    int64_t key = 0;
    for (; key < tile->num_keys; block++, within = 0) {
        int64_t offset = (s->block_ids[block] * kv->block_size + within) * row;
        for (; within < kv->block_size && key < tile->num_keys; within++, key++, offset += row) tile->offsets[key] = offset;
    }
    for (; key % PANEL != 0; key++) tile->offsets[key] = tile->offsets[key - 1];
}

// A tile's rows of one side, for the layer's first heads.
static row_fetch rows_to_fetch(const kv_layer *kv, const void *side, const key_tile *tile, int64_t num_heads) {
    return (row_fetch){
        .side = side, .tile = tile, .item_bytes = kv_item_bytes(kv->dtype),
        .row_bytes = num_heads * kv_row_bytes(kv->dtype, kv->head_dim)};
}

// Hides scores of whole vectors from a row that does not see them. Returns the highest of the others.
static float hide_scores(float *scores, key_range seen, key_range whole) {
    if (seen.begin >= seen.end) return -INFINITY;
    for (int64_t i = whole.begin; i < seen.begin; i++) scores[i] = -INFINITY;
    for (int64_t i = seen.end; i < whole.end; i++) scores[i] = -INFINITY;
    f32w highest = load_wide(scores + whole.begin);
    for (int64_t i = whole.begin + WIDE; i < whole.end; i += WIDE) highest = max_wide(highest, load_wide(scores + i));
    return max_lanes_wide(highest);
}

// Turns a row's scores into weights, 0 outside of `whole`. Returns their sum.
static float make_weights(float *scores, key_range whole, float highest) {
    f32x8 sum = splat8(0);
    for (int64_t i = 0; i < TILE_KEYS;) {
        f32w weights[VECTORS_TOGETHER];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS_TOGETHER; v++, i += WIDE) {
            int is_seen = i >= whole.begin && i < whole.end;
            weights[v] = is_seen ? exp_bounded_wide(load_wide(scores + i) - splat_wide(highest)) : splat_wide(0);
            store_wide(scores + i, weights[v]);
        }
        sum = add_to_eight(sum, weights);
    }
    return sum_lanes(sum);
}

// Turns the scores of up to WIDE rows in one tile into weights, and rescales their sums so far.
static void update_softmax(workspace *w, const tile_view *view, int64_t row_begin, int64_t num_rows) {
    float *highest = w->highest + row_begin, *total = w->total + row_begin, before[WIDE], factors[WIDE];
    key_range wholes[WIDE];
    int renewed = 0;
    store_wide(before, load_wide(highest));
    for (int64_t r = 0; r < num_rows; r++) {
        key_range seen = keys_seen_from(view, w->positions[row_begin + r]);
        wholes[r] = in_wholes_of(WIDE, seen);
        float of_tile = hide_scores(w->scores + (row_begin + r) * TILE_KEYS, seen, wholes[r]);
        if (of_tile == -INFINITY) wholes[r] = (key_range){0, 0};
        renewed |= of_tile > before[r];
        highest[r] = of_tile > before[r] ? of_tile : before[r];
    }
    if (renewed) {
        f32w factor = exp_bounded_wide(load_wide(before) - load_wide(highest));
        store_wide(factors, factor);
        store_wide(total, load_wide(total) * factor);
    }
    for (int64_t r = 0; r < num_rows; r++) {
        total[r] += make_weights(w->scores + (row_begin + r) * TILE_KEYS, wholes[r], highest[r]);
        if (highest[r] == before[r] || before[r] == -INFINITY) continue;
        float *out = w->out + (row_begin + r) * w->head_dim;
        for (int64_t d = 0; d < w->head_dim; d += WIDE) store_wide(out + d, load_wide(out + d) * splat_wide(factors[r]));
    }
}

// Rows that attend to one head's keys together.
typedef struct {
    kv_layer kv;
    int64_t row_begin, num_rows;  // of the workspace
    row_block blocks[TILE_ROWS / BLOCK_ROWS];
    int64_t num_blocks;
} head_rows;

// Cuts the rows into blocks, by what they see of a tile.
static void find_blocks(const workspace *w, const tile_view *view, head_rows *h) {
    const int64_t most_rows = w->num_parts > 0 ? BF16_ROWS / w->num_parts : BLOCK_ROWS;
    h->num_blocks = 0;
    for (int64_t row = 0; row < h->num_rows; row += most_rows) {
        row_block b = {h->row_begin + row, h->num_rows - row < most_rows ? h->num_rows - row : most_rows, {0, 0}};
        b.seen.begin = keys_seen_from(view, w->positions[b.row_begin]).begin;
        b.seen.end = keys_seen_from(view, w->positions[b.row_begin + b.num_rows - 1]).end;
        h->blocks[h->num_blocks++] = b;
    }
}

// The rows' scores with the keys they see; the others are undefined. Prefetches the next tile.
static void score_keys(workspace *w, const head_rows *h, const key_tile *tile, row_fetch *ahead) {
    const kv_layer *kv = &h->kv;
    if (kv->dtype == KV_INT8) {
        score_keys_int8(w, h->blocks, h->num_blocks, kv, tile, ahead);
        return;
    }
    if (w->num_parts > 0) {
        score_keys_bf16(w, h->blocks, h->num_blocks, kv, tile, ahead);
        return;
    }
    const float *queries = w->queries + h->row_begin * kv->head_dim;
    if (score_few_rows(kv, tile, h->num_rows, queries, w->scores + h->row_begin * TILE_KEYS, ahead)) return;
    fetch_lines(ahead, ALL_LINES);
    score_many_rows(w, h->blocks, h->num_blocks, kv, tile);
}

static void add_weighted_values(workspace *w, const head_rows *h, const key_tile *tile, row_fetch *ahead) {
    const kv_layer *kv = &h->kv;
    if (w->num_parts > 0) {
        add_values_bf16(w, h->blocks, h->num_blocks, kv, tile, ahead);
        return;
    }
    float *weights = w->scores + h->row_begin * TILE_KEYS, *out = w->out + h->row_begin * kv->head_dim;
    if (kv->dtype == KV_INT8) scale_weights_int8(kv, tile, h->num_rows, weights);
    if (add_few_rows(kv, tile, h->num_rows, weights, out, ahead)) return;
    fetch_lines(ahead, ALL_LINES);
    add_many_rows(w, h->blocks, h->num_blocks, kv, tile);
}

typedef struct {
    const attention_call *call;
    const kv_layer *kv;
    int enough_tiles;
} attention_args;

static void load_queries(
    const attention_call *c, const attention_tile *tile, int64_t head, int64_t group, workspace *w, const head_rows *h) {
    int64_t head_dim = w->head_dim;
    const f32w scale = splat_wide(c->scale);
    float *queries = w->queries + h->row_begin * head_dim;
    for (int64_t t = 0; t < tile->num_tokens; t++) {
        int64_t row = c->segments[tile->segment].row_begin + tile->token_begin + t;
        const float *from = c->queries + row * c->query_stride + head * group * head_dim;
        float *to = queries + t * group * head_dim;
        for (int64_t i = 0; i < group * head_dim; i += WIDE) store_wide(to + i, load_wide(from + i) * scale);
    }
    if (h->kv.dtype == KV_INT8)
        quantize_queries(w, h->row_begin, h->num_rows, queries);
    bf16_part *parts = w->query_parts + h->row_begin * w->num_parts * in_bf16_steps(head_dim);
    if (w->num_parts > 0) split_queries(h->num_rows, head_dim, w->num_parts, queries, parts);
}

static void store_out(
    const attention_call *c, const attention_tile *tile, int64_t head, int64_t group, const workspace *w, const head_rows *h) {
    int64_t head_dim = w->head_dim;
    for (int64_t t = 0; t < tile->num_tokens; t++)
        for (int64_t g = 0; g < group; g++) {
            int64_t from = h->row_begin + t * group + g;
            int64_t row = c->segments[tile->segment].row_begin + tile->token_begin + t;
            float *to = c->out + (row * c->num_heads + head * group + g) * head_dim;
            f32w factor = splat_wide(1.0f / w->total[from]);
            for (int64_t d = 0; d < head_dim; d += WIDE) store_wide(to + d, load_wide(w->out + from * head_dim + d) * factor);
        }
}

static int64_t last_key_of(const attention_call *c, const attention_tile *tile) {
    return c->segments[tile->segment].position + tile->token_begin + tile->num_tokens - 1;
}

// First key of the first tile that the rows see.
static int64_t first_key_of(const attention_call *c, const attention_tile *tile) {
    int64_t first = c->segments[tile->segment].position + tile->token_begin;
    return (c->window > 0 && first >= c->window ? first - c->window + 1 : 0) / TILE_KEYS * TILE_KEYS;
}

// Attention of a tile's rows to KV heads [head_begin, head_end). Goes head by head through each
// tile of keys, in the order of memory. Prefetches the first keys of `next`, if there is one.
static void attend_heads(
    const attention_call *c, const kv_layer *kv, const attention_tile *tile, const attention_tile *next, int64_t head_begin,
    int64_t head_end) {
    const segment *s = &c->segments[tile->segment];
    int64_t group = c->num_heads / kv->num_kv_heads, num_rows = tile->num_tokens * group, num_heads = head_end - head_begin;
    workspace *w = get_workspace(kv->head_dim);
    w->head_dim = kv->head_dim;
    w->num_parts = kv->dtype == KV_BF16 ? c->num_parts : 0;
    int64_t height = num_rows * (kv->dtype == KV_INT8 ? 2 : w->num_parts);  // of tiles, 0: without
    if (height > ROW_BLOCK) height = ROW_BLOCK;
    begin_tiles(height);
    int64_t first = s->position + tile->token_begin, last = last_key_of(c, tile);
    int64_t first_key = first_key_of(c, tile);
    key_tile keys, next_keys;
    find_keys(kv, s, first_key, last, &next_keys);
    const kv_layer of_heads = from_head(kv, head_begin);
    row_fetch keys_ahead = rows_to_fetch(kv, of_heads.keys, &next_keys, num_heads);
    fetch_lines(&keys_ahead, ALL_LINES);
    head_rows heads[TILE_ROWS];
    for (int64_t h = 0; h < num_heads; h++) {
        heads[h] = (head_rows){.kv = from_head(kv, head_begin + h), .row_begin = h * num_rows, .num_rows = num_rows};
        load_queries(c, tile, head_begin + h, group, w, &heads[h]);
    }
    memset(w->out, 0, num_heads * num_rows * kv->head_dim * sizeof(float));
    for (int64_t r = 0; r < num_heads * num_rows; r++) {
        const int64_t head = (head_begin + r / num_rows) * group + r % group;
        w->positions[r] = first + r % num_rows / group;
        w->highest[r] = c->sinks == NULL ? -INFINITY : c->sinks[head];
        w->total[r] = c->sinks == NULL ? 0 : 1;
    }
    for (int64_t key = first_key; key <= last; key += TILE_KEYS) {
        keys = next_keys;
        if (key + TILE_KEYS <= last || next == NULL)
            find_keys(kv, s, key + TILE_KEYS, last, &next_keys);
        else
            find_keys(kv, &c->segments[next->segment], first_key_of(c, next), last_key_of(c, next), &next_keys);
        row_fetch values_ahead = rows_to_fetch(kv, of_heads.values, &keys, num_heads);
        keys_ahead = rows_to_fetch(kv, of_heads.keys, &next_keys, num_heads);
        const tile_view view = {key, c->window};
        for (int64_t h = 0; h < num_heads; h++) {
            find_blocks(w, &view, &heads[h]);
            score_keys(w, &heads[h], &keys, &values_ahead);
        }
        for (int64_t r = 0; r < num_heads * num_rows; r += WIDE)
            update_softmax(w, &view, r, num_heads * num_rows - r < WIDE ? num_heads * num_rows - r : WIDE);
        for (int64_t h = 0; h < num_heads; h++) add_weighted_values(w, &heads[h], &keys, &keys_ahead);
    }
    end_tiles(height);
    for (int64_t h = 0; h < num_heads; h++) store_out(c, tile, head_begin + h, group, w, &heads[h]);
}

// One task per tile and head. If there are enough tiles, one with few rows does all heads at once.
static void attend_tile(void *argument, int64_t task) {
    const attention_args *args = argument;
    const attention_call *c = args->call;
    int64_t num_kv_heads = args->kv->num_kv_heads, head = task % num_kv_heads;
    int64_t number = task / num_kv_heads, next = number + num_threads();  // others take those between
    const attention_tile *tile = &c->tiles[number];
    if (!args->enough_tiles || tile->num_tokens * c->num_heads > TILE_ROWS)
        attend_heads(c, args->kv, tile, NULL, head, head + 1);
    else if (head == 0)
        attend_heads(c, args->kv, tile, next < c->num_tiles ? &c->tiles[next] : NULL, 0, num_kv_heads);
}

// A token's result does not depend on the other tokens of its tile or call.
static void attend(const attention_call *call, const kv_layer *kv) {
    int64_t threads = num_threads();
    attention_args args = {call, kv, threads == 1 || call->num_tiles >= TILES_PER_THREAD * threads};
    parallel_for(call->num_tiles * kv->num_kv_heads, attend_tile, &args);
}

// Writes K and V of all rows. slots: [num_tokens], block * block_size + offset. keys, values:
// [num_tokens][stride].
static void write_kv(
    const kv_layer *kv, int64_t num_tokens, const int64_t *slots, const float *keys, const float *values, int64_t stride) {
    if (kv->dtype == KV_INT8) {
        write_kv_int8(kv, num_tokens, slots, keys, values, stride);
        return;
    }
    int64_t row = kv->num_kv_heads * kv->head_dim;
    for (int64_t t = 0; t < num_tokens; t++) {
        if (kv->dtype == KV_F32) {
            memcpy((float *)kv->keys + slots[t] * row, keys + t * stride, row * sizeof(float));
            memcpy((float *)kv->values + slots[t] * row, values + t * stride, row * sizeof(float));
            continue;
        }
        uint16_t *k = (uint16_t *)kv->keys + slots[t] * row, *v = (uint16_t *)kv->values + slots[t] * row;
        for (int64_t i = 0; i < row; i++) {
            k[i] = f32_to_bf16(keys[t * stride + i]);
            v[i] = f32_to_bf16(values[t * stride + i]);
        }
    }
}

void EXPORTED(attend)(const attention_call *call, const kv_layer *kv) { attend(call, kv); }

void EXPORTED(write_kv)(
    const kv_layer *kv, int64_t num_tokens, const int64_t *slots, const float *keys, const float *values, int64_t stride) {
    write_kv(kv, num_tokens, slots, keys, values, stride);
}
