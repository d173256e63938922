// Attention of few rows, as in decoding: keys go straight from the pool to the registers.
//
// Memory is the bottleneck, so the next tile is prefetched a few lines at a time. Sums have the
// order of tile_rows_f32: the result has the same bits as with many rows.
#include "attention.h"

enum { MAX_GROUPS = WIDE == 4 ? 4 : 2, MAX_VECTORS = 4, ROWS_TOGETHER = 6 };

// Vectors of a row's sums that are added to together.
enum { FEW_VECTORS = 4, MANY_ROWS_VECTORS = WIDE == 8 ? 2 : 4 };

// Rows are split into parts of even size: 7 into 4 and 3.
static int64_t end_of_part(int64_t row, int64_t num_rows) {
    int64_t num_parts = (num_rows - row + ROWS_TOGETHER - 1) / ROWS_TOGETHER;
    return row + (num_rows - row + num_parts - 1) / num_parts;
}

// ---------------------------------------------------------------- scores

#if HAVE_AVX2 || HAVE_NEON
// Scores of `groups` times WIDE keys for `rows` queries; rows, groups and dtype are constants
// after inlining.
ALWAYS_INLINE void score_groups(
    const int rows, const int groups, const int64_t dtype, const kv_layer *kv, const key_tile *tile, int64_t first_key,
    const float *queries, float *scores, row_fetch *ahead) {
    const int64_t head_dim = kv->head_dim, item_bytes = kv_item_bytes(dtype), line_items = LINE_BYTES / item_bytes;
    f32w sums[MAX_GROUPS][ROWS_TOGETHER];
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) sums[g][r] = splat_wide(0);
    for (int64_t d = 0; d < head_dim; d += 8)
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            f32w columns[8];
            load_key_columns(kv->keys, dtype, tile->offsets + first_key + g * WIDE, d, columns);
            if (d % line_items == 0) fetch_lines(ahead, WIDE);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++)
                    sums[g][r] = fma_wide(splat_wide(queries[r * head_dim + d + j]), columns[j], sums[g][r]);
        }
#pragma GCC unroll 4
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) store_wide(scores + r * TILE_KEYS + first_key + g * WIDE, sums[g][r]);
}

ALWAYS_INLINE void score_tile(
    const int rows, const int groups, const int64_t dtype, const kv_layer *kv, const key_tile *tile, const float *queries,
    float *scores, row_fetch *ahead) {
    int64_t key = 0;
    for (; key + (groups - 1) * WIDE < tile->num_keys; key += groups * WIDE)
        score_groups(rows, groups, dtype, kv, tile, key, queries, scores, ahead);
    for (; key < tile->num_keys; key += WIDE) score_groups(rows, 1, dtype, kv, tile, key, queries, scores, ahead);
}

ALWAYS_INLINE void score_rows(
    const int64_t dtype, const kv_layer *kv, const key_tile *tile, int64_t num_rows, const float *queries, float *scores,
    row_fetch *ahead) {
    switch (num_rows) {
        case 1: score_tile(1, MAX_GROUPS, dtype, kv, tile, queries, scores, ahead); break;
        case 2: score_tile(2, MAX_GROUPS, dtype, kv, tile, queries, scores, ahead); break;
        case 3: score_tile(3, MAX_GROUPS, dtype, kv, tile, queries, scores, ahead); break;
        case 4: score_tile(4, MAX_GROUPS / 2, dtype, kv, tile, queries, scores, ahead); break;
        case 5: score_tile(5, MAX_GROUPS / 2, dtype, kv, tile, queries, scores, ahead); break;
        default: score_tile(6, MAX_GROUPS / 2, dtype, kv, tile, queries, scores, ahead); break;
    }
}

static int score_few_rows(
    const kv_layer *kv, const key_tile *tile, int64_t num_rows, const float *queries, float *scores, row_fetch *ahead) {
    if (num_rows > MAX_FEW_ROWS) return 0;
    for (int64_t row = 0, end; row < num_rows; row = end) {
        end = end_of_part(row, num_rows);
        const float *from = queries + row * kv->head_dim;
        if (kv->dtype == KV_F32)
            score_rows(KV_F32, kv, tile, end - row, from, scores + row * TILE_KEYS, ahead);
        else
            score_rows(KV_BF16, kv, tile, end - row, from, scores + row * TILE_KEYS, ahead);
    }
    return 1;
}
#else
static int score_few_rows(
    const kv_layer *kv, const key_tile *tile, int64_t num_rows, const float *queries, float *scores, row_fetch *ahead) {
    (void)kv, (void)tile, (void)num_rows, (void)queries, (void)scores, (void)ahead;
    return 0;
}
#endif

// ---------------------------------------------------------------- values

// out[rows][vectors * WIDE] += weights[rows][keys] * values[keys][from item d on]; rows, vectors and
// dtype are constants after inlining.
ALWAYS_INLINE void add_columns(
    const int rows, const int vectors, const int64_t dtype, const kv_layer *kv, const key_tile *tile, int64_t d,
    const float *weights, float *out, row_fetch *ahead) {
    const int64_t head_dim = kv->head_dim, item_bytes = kv_item_bytes(dtype), line_items = LINE_BYTES / item_bytes;
    f32w sums[ROWS_TOGETHER][MAX_VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = load_wide(out + r * head_dim + d + WIDE * v);
    for (int64_t key = 0; key < tile->num_keys; key++) {
        f32w numbers[MAX_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) numbers[v] = load_kv_wide(kv->values, dtype, tile->offsets[key] + d + WIDE * v);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            if ((d + WIDE * v) % line_items == 0) fetch_lines(ahead, 1);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32w weight = splat_wide(weights[r * TILE_KEYS + key]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] = fma_wide(weight, numbers[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store_wide(out + r * head_dim + d + WIDE * v, sums[r][v]);
}

ALWAYS_INLINE void add_values(
    const int rows, const int vectors, const int64_t dtype, const kv_layer *kv, const key_tile *tile, const float *weights,
    float *out, row_fetch *ahead) {
    int64_t d = 0;
    for (; d + WIDE * vectors <= kv->head_dim; d += WIDE * vectors) add_columns(rows, vectors, dtype, kv, tile, d, weights, out, ahead);
    for (; d < kv->head_dim; d += WIDE) add_columns(rows, 1, dtype, kv, tile, d, weights, out, ahead);
}

ALWAYS_INLINE void add_values_of(
    const int64_t dtype, const kv_layer *kv, const key_tile *tile, int64_t num_rows, const float *weights, float *out,
    row_fetch *ahead) {
    switch (num_rows) {
        case 1: add_values(1, FEW_VECTORS, dtype, kv, tile, weights, out, ahead); break;
        case 2: add_values(2, FEW_VECTORS, dtype, kv, tile, weights, out, ahead); break;
        case 3: add_values(3, FEW_VECTORS, dtype, kv, tile, weights, out, ahead); break;
        case 4: add_values(4, MANY_ROWS_VECTORS, dtype, kv, tile, weights, out, ahead); break;
        case 5: add_values(5, MANY_ROWS_VECTORS, dtype, kv, tile, weights, out, ahead); break;
        default: add_values(6, MANY_ROWS_VECTORS, dtype, kv, tile, weights, out, ahead); break;
    }
}

static int add_few_rows(
    const kv_layer *kv, const key_tile *tile, int64_t num_rows, const float *weights, float *out, row_fetch *ahead) {
    if (num_rows > MAX_FEW_ROWS) return 0;
    for (int64_t row = 0, end; row < num_rows; row = end) {
        end = end_of_part(row, num_rows);
        const float *from = weights + row * TILE_KEYS;
        float *to = out + row * kv->head_dim;
        switch (kv->dtype) {
            case KV_F32: add_values_of(KV_F32, kv, tile, end - row, from, to, ahead); break;
            case KV_BF16: add_values_of(KV_BF16, kv, tile, end - row, from, to, ahead); break;
            default: add_values_of(KV_INT8, kv, tile, end - row, from, to, ahead);
        }
    }
    return 1;
}
