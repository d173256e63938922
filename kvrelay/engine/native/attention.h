// Attention of one layer over the paged KV pool.
#ifndef KVRELAY_ATTENTION_H
#define KVRELAY_ATTENTION_H

#include "kernels.h"

enum { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2 };

// Items of a head's row; in int8 the four bytes of the scale follow the head's numbers.
ALWAYS_INLINE int64_t kv_row_items(int64_t dtype, int64_t head_dim) {
    return dtype == KV_INT8 ? head_dim + (int64_t)sizeof(float) : head_dim;
}

ALWAYS_INLINE int64_t kv_item_bytes(int64_t dtype) { return dtype == KV_F32 ? 4 : dtype == KV_BF16 ? 2 : 1; }

ALWAYS_INLINE int64_t kv_row_bytes(int64_t dtype, int64_t head_dim) { return kv_row_items(dtype, head_dim) * kv_item_bytes(dtype); }

// K and V of one layer: each [num_blocks][block_size][num_kv_heads][a head's row].
typedef struct {
    void *keys, *values;
    int64_t dtype, block_size, num_kv_heads, head_dim;
} kv_layer;

// Rows [row_begin, row_begin + num_rows) of the flat batch: a sequence from `position` on.
typedef struct {
    int64_t row_begin, num_rows, position;
    const int64_t *block_ids;
} segment;

// Rows of one segment that are attended to together.
typedef struct {
    int64_t segment, token_begin, num_tokens;
} attention_tile;

typedef struct {
    const segment *segments;
    const attention_tile *tiles;
    int64_t num_tiles;
    const float *queries;  // [num_tokens][query_stride], the first num_heads * head_dim of each row
    int64_t query_stride, num_heads;
    float scale;
    int64_t num_parts;   // of queries and weights for KV in bf16; 0: computed in float32, as other KV is
    int64_t window;      // tokens that a token sees, itself included; 0: all
    const float *sinks;  // [num_heads], scores in the softmax that have no value; or NULL
    float *out;          // [num_tokens][num_heads * head_dim]
} attention_call;

// Most rows of a tile: tokens times the query heads that share a key.
enum { TILE_ROWS = 96 };

// ------------------------------------------------------------ shared by the attention_*.c files

enum { TILE_KEYS = 64 };

enum { MAX_FEW_ROWS = 12 };  // with at most this many rows, keys and values are read in place

// Offsets, in items, of a tile's keys in each side of the pool, for the first KV head. After
// num_keys the last one is repeated up to a whole panel.
typedef struct {
    int64_t num_keys;
    int64_t offsets[TILE_KEYS];
} key_tile;

// A tile's rows of one side of the pool, fetched a few lines at a time, in the order of memory,
// while the previous tile is computed. All at once, or in another order, is half as fast.
typedef struct {
    const char *side, *line, *row_end;
    const key_tile *tile;
    int64_t item_bytes, row_bytes, key;
} row_fetch;

enum { LINE_BYTES = 64 };

ALWAYS_INLINE void fetch_lines(row_fetch *f, const int64_t num_lines) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < num_lines; i++, f->line += LINE_BYTES) {
        if (f->line >= f->row_end) {
            if (f->key >= f->tile->num_keys) return;
            f->line = f->side + f->tile->offsets[f->key++] * f->item_bytes;
            f->row_end = f->line + f->row_bytes;
        }
        __builtin_prefetch(f->line);
    }
}

// Numbers [d, d + 8) of WIDE keys in f32 or bf16, as columns.
ALWAYS_INLINE void load_key_columns(const void *side, const int64_t dtype, const int64_t *offsets, int64_t d, f32w columns[8]) {
    const void *from[WIDE];
#pragma GCC unroll 16
    for (int i = 0; i < WIDE; i++) from[i] = (const char *)side + (offsets[i] + d) * kv_item_bytes(dtype);
    if (dtype == KV_F32)
        transpose_f32(from, columns);
    else
        transpose_bf16(from, columns);
}

// WIDE numbers of a value at `offset`, in int8 without their scale.
ALWAYS_INLINE f32w load_kv_wide(const void *side, int64_t dtype, int64_t offset) {
    if (dtype == KV_F32) return load_wide((const float *)side + offset);
    const void *from = (const char *)side + offset * kv_item_bytes(dtype);
    return dtype == KV_INT8 ? widen_int8_wide(from) : widen_bf16_wide(from);
}

// Inputs of a score in bf16, of which the last may be zeros.
ALWAYS_INLINE int64_t in_bf16_steps(int64_t head_dim) { return (head_dim + BF16_STEP - 1) / BF16_STEP * BF16_STEP; }

// Buffers for one tile of rows; one workspace per thread, reused.
typedef struct {
    int64_t head_dim;
    float *queries;        // [TILE_ROWS][head_dim], scaled
    float *scores;         // [TILE_ROWS][TILE_KEYS], then weights
    float *out;            // [TILE_ROWS][head_dim]
    float *keys;           // [head_dim][TILE_KEYS]
    float *values;         // [TILE_KEYS][head_dim]
    int16_t *integers;     // [TILE_ROWS][head_dim], queries for keys in int8
    int64_t num_parts;     // 0: not computed in bf16
    bf16_part *query_parts;   // [TILE_ROWS][num_parts][in_bf16_steps(head_dim)], and room for a tile
    bf16_part *weight_parts;  // [BF16_ROWS][TILE_KEYS]
    float integer_scales[TILE_ROWS];
    int8_t *split_integers;  // what tiles take of them: [TILE_ROWS][2][head_dim in steps]; with query_parts
    float highest[TILE_ROWS], total[TILE_ROWS];
    int64_t positions[TILE_ROWS];  // of the rows' tokens
} workspace;

// What the rows of a tile see: of the tile's keys, the first is at position `first_key`.
typedef struct {
    int64_t first_key, window;  // as in attention_call
} tile_view;

// Keys [begin, end) of a tile; none if begin >= end.
typedef struct {
    int64_t begin, end;
} key_range;

ALWAYS_INLINE key_range keys_seen_from(const tile_view *view, int64_t position) {
    int64_t end = position + 1 - view->first_key, begin = view->window > 0 ? end - view->window : 0;
    return (key_range){begin > 0 ? begin : 0, end < TILE_KEYS ? end : TILE_KEYS};
}

ALWAYS_INLINE key_range in_wholes_of(int64_t size, key_range keys) {
    return (key_range){keys.begin / size * size, (keys.end + size - 1) / size * size};
}

// Rows of the workspace, which are computed without the keys that none of them sees.
typedef struct {
    int64_t row_begin, num_rows;
    key_range seen;
} row_block;

enum { BLOCK_ROWS = 12 };

// Scores of f32 or bf16 keys, [num_rows][TILE_KEYS]; undefined after num_keys. Returns 0 if there
// are too many rows.
static int score_few_rows(
    const kv_layer *kv, const key_tile *tile, int64_t num_rows, const float *queries, float *scores, row_fetch *ahead);

// out[num_rows][head_dim] += weights[num_rows][TILE_KEYS] * values, in int8 without their
// scales. Returns 0 if there are too many rows.
static int add_few_rows(
    const kv_layer *kv, const key_tile *tile, int64_t num_rows, const float *weights, float *out, row_fetch *ahead);

// The same for any number of rows. Scores of keys that a block does not see are undefined.
static void score_many_rows(workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile);

static void add_many_rows(workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile);

static void write_kv_int8(
    const kv_layer *kv, int64_t num_tokens, const int64_t *slots, const float *keys, const float *values, int64_t stride);

// queries: [num_rows][head_dim].
static void quantize_queries(workspace *w, int64_t row_begin, int64_t num_rows, const float *queries);

// Scores of int8 keys for any number of rows, as of score_many_rows.
static void score_keys_int8(
    workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile, row_fetch *ahead);

// The same in bf16, and out += weights * values.
static void score_keys_bf16(
    workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile, row_fetch *ahead);

static void add_values_bf16(
    workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile, row_fetch *ahead);

// to: [num_rows][num_parts][in_bf16_steps(head_dim)].
static void split_queries(int64_t num_rows, int64_t head_dim, int64_t num_parts, const float *queries, bf16_part *to);

// Multiplies weights by the values' scales, so that integers remain to sum. weights:
// [num_rows][TILE_KEYS].
static void scale_weights_int8(const kv_layer *kv, const key_tile *tile, int64_t num_rows, float *weights);

#endif
