// Attention of one layer over the paged KV pool.
#ifndef KVRELAY_ATTENTION_H
#define KVRELAY_ATTENTION_H

#include "kernels.h"

enum { KV_F32 = 0, KV_BF16 = 1 };

// K and V of one layer: each [num_blocks][block_size][num_kv_heads][head_dim].
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

#endif
