// Attention of one layer over the paged KV pool.
#ifndef KVRELAY_ATTENTION_H
#define KVRELAY_ATTENTION_H

#include "kernels.h"

enum { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2 };

// Items of the dtype's size in a head's row: in int8 the scale's four bytes lie behind the head's numbers.
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

// Rows [row_begin, row_begin + num_rows) of the flat batch are positions [position, ...) of one sequence.
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
    int64_t window;  // tokens that a token sees, itself included; 0: all
    float *out;      // [num_tokens][num_heads * head_dim]
} attention_call;

// Most rows (tokens times the query heads that share a key) of a tile.
enum { TILE_ROWS = 48 };

void attend(const attention_call *call, const kv_layer *kv);

// Writes K and V of all rows. slots: [num_tokens], block * block_size + offset. keys, values: [num_tokens][stride].
void write_kv(const kv_layer *kv, int64_t num_tokens, const int64_t *slots, const float *keys, const float *values, int64_t stride);

// ---------------------------------------------------------------- between attention.c and attention_int8.c

enum { TILE_KEYS = 64 };

// Where the keys of a tile lie in either side of the pool, for one KV head: offsets in items.
typedef struct {
    int64_t num_keys;
    int64_t offsets[TILE_KEYS];
} key_tile;

void write_kv_int8(
    const kv_layer *kv, int64_t num_tokens, const int64_t *slots, const float *keys, const float *values, int64_t stride);

// queries, to: [num_rows][head_dim]; scales: [num_rows].
void quantize_queries(int64_t num_rows, int64_t head_dim, const float *queries, int16_t *to, float *scales);

// scores: [num_rows][TILE_KEYS], those up to num_keys; some behind them are overwritten.
void score_keys_int8(
    const kv_layer *kv, const key_tile *tile, int64_t num_rows, const int16_t *queries, const float *query_scales, float *scores);

// Weights times the values' scales, which leaves integers to sum. weights: [num_rows][TILE_KEYS].
void scale_weights_int8(const kv_layer *kv, const key_tile *tile, int64_t num_rows, float *weights);

// out[num_rows][head_dim] += weights * values' integers, straight from the pool. Returns 0 when there are too many rows for that.
int add_values_int8(const kv_layer *kv, const key_tile *tile, int64_t num_rows, const float *weights, float *out);

// The values' integers: [num_keys][head_dim].
void load_values_int8(const kv_layer *kv, const key_tile *tile, float *to);

#endif
