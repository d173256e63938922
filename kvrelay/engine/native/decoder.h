// What a decoder is, and the rows of its steps.
#ifndef KVRELAY_DECODER_H
#define KVRELAY_DECODER_H

#include "attention.h"

// Of each `width` numbers of a row: x / rms(x) * weight; with a bias, x is less its mean first.
typedef struct {
    const float *weight, *bias;  // [width]; no weight: no norm
    int64_t width;
    float epsilon;
} row_norm;

// out = activated(x up) down
typedef struct {
    matrix up, down;
} mlp;

typedef struct {
    row_norm attention_norm, attention_out_norm, mlp_norm, mlp_out_norm, query_norm, key_norm;
    matrix qkv, output;
    matrix router;  // f32, to num_experts; with one expert there is none
    const mlp *experts;
    int64_t num_experts, experts_per_token;
    int64_t shares_of_chosen;  // an expert's share is of those that a token has chosen, else of all
    int64_t up_mode;           // an OUTPUT_...
    int64_t window;
    int64_t rope;        // which angles; -1: none
    const float *sinks;  // [num_heads] or NULL
    float attention_scale;
} decoder_layer;

enum { MAX_ROPES = 2 };

typedef struct {
    int64_t num_layers, hidden, intermediate /* the widest */, num_heads, num_kv_heads, head_dim, rotary_dim;
    const float *cosines[MAX_ROPES], *sines[MAX_ROPES];  // [max_positions][rotary_dim / 2]
    const float *embeddings;                             // [vocab_size][hidden], or NULL
    const uint16_t *narrow_embeddings;                   // the same in bf16, or NULL; with neither, token_rows
    const float *position_embeddings;                    // [max_positions][hidden] or NULL
    float embedding_scale;
    const decoder_layer *layers;
    row_norm final_norm;
    matrix lm_head;
    matrix token_rows;  // bf16; may be lm_head
} decoder;

typedef struct {
    int64_t num_tokens, num_segments, num_tiles, num_logits;
    const int64_t *token_ids, *positions, *slots;  // [num_tokens]
    const segment *segments;
    const attention_tile *tiles;
    const int64_t *logit_rows;  // [num_logits]
    void *pool;                 // [num_layers][2][num_blocks][block_size][num_kv_heads][a head's row]
    int64_t kv_dtype, num_blocks, block_size;
    float *logits;  // [num_logits][vocab_size]
} decoder_step;

// Rows of a step between the operations.
typedef struct {
    float *hidden, *normed, *qkv, *attended, *activated;
    quantized_rows quantized;
    // Of layers with experts; a pair is a row and an expert that it has chosen.
    float *routing;       // [num_tokens][columns_of_routing]
    int32_t *chosen;      // [num_tokens][experts_per_token], the most likely first
    float *shares;        // [num_tokens][experts_per_token]
    int32_t *pairs;       // [num_tokens * experts_per_token], by expert and then by row
    int64_t *pair_begin;  // [num_experts + 1]
    float *gathered;      // [num_tokens][hidden], of one expert
    float *expert_out;    // [num_tokens][hidden]
} rows;

// The argument of operations on rows.
typedef struct {
    const decoder *d;
    const decoder_layer *layer;
    const decoder_step *step;
    const rows *r;
    const float *from;     // of norms and quantization
    const row_norm *norm;
    int64_t num_rows, width;
    const matrix *next;    // input for this product
    kv_layer kv;
    const int32_t *pairs;  // of one expert: num_rows of them
} row_args;

// Runs tasks of ROWS_PER_TASK rows.
static void for_rows(row_args *args, task_function function);

static void rows_of(const row_args *args, int64_t task, int64_t *begin, int64_t *end);

// Makes rows ready for a product: through the norm, if there is one, and as its kind wants them. Returns
// where they are.
static const float *input_of(row_args args, const float *from, int64_t width, const row_norm *norm, const matrix *next);

// Places the arrays of layers with experts behind `*at`, which may be NULL to count.
static void place_experts(const decoder *d, int64_t num_tokens, char **at, rows *r);

// hidden += experts(normed). following: the product after the layer.
static void add_experts(row_args args, const float *x, const matrix *following);

ALWAYS_INLINE char *reserve(char **at, int64_t num_bytes) {
    char *begin = *at;
    *at += (num_bytes + 63) / 64 * 64;
    return begin;
}

#endif
