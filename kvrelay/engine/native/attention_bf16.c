// Attention in bfloat16: its two products are those of matrices in bf16, with their order of sums
// (matrices_bf16.c). For this a tile's keys and values become panels; queries and weights are taken
// apart. Few rows have the same path as many.
//
// Hidden keys have weights of 0, which change no sum of a product: none is -0 before its last step.
#include "attention.h"

// Keys as columns, the values of each of their numbers in pairs: [keys / PANEL][k / 2][PANEL][2].
static void load_key_panels(const kv_layer *kv, const key_tile *tile, float *to, row_fetch *ahead) {
    const int64_t k = in_bf16_steps(kv->head_dim);
    for (int64_t key = 0; key < tile->num_keys; key += WIDE) {
        float *panel = to + key / PANEL * PANEL * k / 2 + key % PANEL;
        int64_t d = 0;
        for (; d < kv->head_dim; d += 16) {
            const void *from[WIDE];
            f32w pairs[8];
#pragma GCC unroll 16
            for (int i = 0; i < WIDE; i++) from[i] = (const uint16_t *)kv->keys + tile->offsets[key + i] + d;
            transpose_f32(from, pairs);
            fetch_lines(ahead, WIDE / 2);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) store_wide(panel + (d / 2 + i) * PANEL, pairs[i]);
        }
        for (; d < k; d += 2) store_wide(panel + d / 2 * PANEL, splat_wide(0));
    }
}

// Numbers of a value, each in the upper half of 32 bits; 0 after num_keys.
ALWAYS_INLINE i32w load_upper_halves(const kv_layer *kv, const key_tile *tile, int64_t key, int64_t d) {
    if (key >= tile->num_keys) return (i32w)splat_wide(0);
    return (i32w)widen_bf16_wide((const uint16_t *)kv->values + tile->offsets[key] + d);
}

// Values of neighbouring keys in pairs: [head_dim / PANEL][TILE_KEYS / 2][PANEL][2].
static void load_value_panels(const kv_layer *kv, const key_tile *tile, float *to, row_fetch *ahead) {
    for (int64_t key = 0; key < TILE_KEYS; key += 2) {
        for (int64_t d = 0; d < kv->head_dim; d += WIDE) {
            i32w first = load_upper_halves(kv, tile, key, d), second = load_upper_halves(kv, tile, key + 1, d);
            float *at = to + (d / PANEL * TILE_KEYS + key) / 2 * PANEL + d % PANEL;
            store_wide(at, (f32w)((first >> 16 & 0xffff) | second));
        }
        fetch_lines(ahead, kv->head_dim / 16);
    }
}

static void split_queries(int64_t num_rows, int64_t head_dim, int64_t num_parts, const float *queries, bf16_part *to) {
    const int64_t k = in_bf16_steps(head_dim);
    for (int64_t row = 0; row < num_rows; row++, queries += head_dim, to += num_parts * k)
        for (int64_t i = 0; i < k; i += 2 * WIDE) {
            float numbers[2 * WIDE] = {0};
            for (int64_t j = 0; j < 2 * WIDE && i + j < head_dim; j += WIDE) store_wide(numbers + j, load_wide(queries + i + j));
            take_apart(numbers, num_parts, to + i, to + k + i);
        }
}

static void score_keys_bf16(
    workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile, row_fetch *ahead) {
    const int64_t k = in_bf16_steps(kv->head_dim), num_parts = w->num_parts;
    const matrix keys = {.n = TILE_KEYS, .k = k, .data = w->keys};
    const fetch nothing = {(const char *)w->keys, 0, 0};
    load_key_panels(kv, tile, w->keys, ahead);
    for (int64_t column = 0; column < tile->num_keys; column += BF16_WIDTH)
        for (const row_block *b = blocks; b < blocks + num_blocks; b++) {
            key_range seen = in_wholes_of(PANEL, b->seen);
            if (seen.begin < column) seen.begin = column;
            if (seen.end > column + BF16_WIDTH) seen.end = column + BF16_WIDTH;
            if (seen.begin >= seen.end) continue;
            float sums[BF16_ROWS * BF16_WIDTH] __attribute__((aligned(64)));
            bf16_rows queries = {.parts = w->query_parts + b->row_begin * num_parts * k, .row = k, .step = BF16_STEP};
            int64_t panels = (seen.end - seen.begin) / PANEL;
            tile_rows_bf16(b->num_rows * num_parts, panels, &queries, &keys, seen.begin / PANEL, sums, nothing);
            add_parts(sums, num_parts, b->num_rows, panels * PANEL, w->scores + b->row_begin * TILE_KEYS + seen.begin, TILE_KEYS, 0);
        }
}

// Weights lie between 0 and 1, so rounding to the nearest is an addition.
static void split_weights(int64_t num_rows, int64_t num_parts, const float *weights, bf16_part *to) {
    const i32w half = (i32w)splat_wide(0) + 0x8000;
    for (int64_t row = 0; row < num_rows; row++, weights += TILE_KEYS, to += num_parts * TILE_KEYS)
        for (int64_t i = 0; i < TILE_KEYS; i += 2 * WIDE) {
            f32w x0 = load_wide(weights + i), x1 = load_wide(weights + i + WIDE);
            i32w first0 = ((i32w)x0 + half) & ~0xffff, first1 = ((i32w)x1 + half) & ~0xffff;
            store_parts(to + i, first0, first1);
            if (num_parts == 1) continue;
            i32w next0 = (i32w)(x0 - (f32w)first0) + half, next1 = (i32w)(x1 - (f32w)first1) + half;
            store_parts(to + TILE_KEYS + i, next0 & ~0xffff, next1 & ~0xffff);
        }
}

static void add_values_bf16(
    workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile, row_fetch *ahead) {
    const int64_t num_parts = w->num_parts, head_dim = kv->head_dim;
    const matrix values = {.n = head_dim, .k = TILE_KEYS, .data = w->values};
    const fetch nothing = {(const char *)w->values, 0, 0};
    load_value_panels(kv, tile, w->values, ahead);
    for (const row_block *b = blocks; b < blocks + num_blocks; b++) {
        if (b->seen.begin >= b->seen.end) continue;
        split_weights(b->num_rows, num_parts, w->scores + b->row_begin * TILE_KEYS, w->weight_parts);
        for (int64_t column = 0; column < head_dim; column += BF16_WIDTH) {
            float sums[BF16_ROWS * BF16_WIDTH] __attribute__((aligned(64)));
            bf16_rows weights = {.parts = w->weight_parts, .row = TILE_KEYS, .step = BF16_STEP};
            int64_t panels = head_dim - column < BF16_WIDTH ? 1 : 2;
            tile_rows_bf16(b->num_rows * num_parts, panels, &weights, &values, column / PANEL, sums, nothing);
            add_parts(sums, num_parts, b->num_rows, panels * PANEL, w->out + b->row_begin * head_dim + column, head_dim, 1);
        }
    }
}
