// Attention of many rows, as in prompts: a tile's keys and values are copied so that the rows of a
// matrix product find them side by side.
#include "attention.h"

// The tile's keys, transposed: [head_dim][TILE_KEYS]. Columns after num_keys are undefined.
static void load_keys(const kv_layer *kv, const key_tile *tile, float *to) {
    for (int64_t key = 0; key < tile->num_keys; key += WIDE)
        for (int64_t d = 0; d < kv->head_dim; d += 8) {
            f32w columns[8];
            if (kv->dtype == KV_F32)
                load_key_columns(kv->keys, KV_F32, tile->offsets + key, d, columns);
            else
                load_key_columns(kv->keys, KV_BF16, tile->offsets + key, d, columns);
            for (int i = 0; i < 8; i++) store_wide(to + (d + i) * TILE_KEYS + key, columns[i]);
        }
}

static void load_values(const kv_layer *kv, const key_tile *tile, float *to) {
    for (int64_t key = 0; key < tile->num_keys; key++)
        for (int64_t d = 0; d < kv->head_dim; d += WIDE)
            store_wide(to + key * kv->head_dim + d, load_kv_wide(kv->values, kv->dtype, tile->offsets[key] + d));
}

// c[rows][16 * panels] (+)= a[rows][k] b[k][16 * panels] for up to BLOCK_ROWS rows.
static void multiply_block(
    int64_t rows, int64_t panels, const float *a, int64_t lda, column_panels b, float *c, int64_t ldc, int64_t k, int add) {
    const fetch nothing = {(const char *)b.data, 0, 0};
    for (int64_t row = 0; row < rows; row += MAX_ROWS) {
        int64_t count = rows - row < MAX_ROWS ? rows - row : MAX_ROWS;
        tile_rows_f32(count, panels, a + row * lda, lda, b, c + row * ldc, ldc, k, add, nothing);
    }
}

// The rows' scores with a tile's keys. Some columns of keys stay in the first-level cache for all
// rows.
static void score_many_rows(workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile) {
    enum { COLUMNS = MAX_PANELS * PANEL };
    load_keys(kv, tile, w->keys);
    for (int64_t column = 0; column < tile->num_keys; column += COLUMNS)
        for (const row_block *b = blocks; b < blocks + num_blocks; b++) {
            key_range keys = in_wholes_of(PANEL, b->seen);
            if (keys.begin < column) keys.begin = column;
            if (keys.end > column + COLUMNS) keys.end = column + COLUMNS;
            if (keys.begin >= keys.end) continue;
            column_panels from = {w->keys + keys.begin, TILE_KEYS, PANEL};
            const float *queries = w->queries + b->row_begin * kv->head_dim;
            float *to = w->scores + b->row_begin * TILE_KEYS + keys.begin;
            multiply_block(b->num_rows, (keys.end - keys.begin) / PANEL, queries, kv->head_dim, from, to, TILE_KEYS, kv->head_dim, 0);
        }
}

static void add_many_rows(workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile) {
    load_values(kv, tile, w->values);
    for (int64_t column = 0; column < kv->head_dim; column += MAX_PANELS * PANEL)
        for (const row_block *b = blocks; b < blocks + num_blocks; b++) {
            if (b->seen.begin >= b->seen.end) continue;
            column_panels from = {w->values + b->seen.begin * kv->head_dim + column, kv->head_dim, PANEL};
            const float *weights = w->scores + b->row_begin * TILE_KEYS + b->seen.begin;
            float *to = w->out + b->row_begin * kv->head_dim + column;
            int64_t panels = (kv->head_dim - column) / PANEL, num_keys = b->seen.end - b->seen.begin;
            multiply_block(b->num_rows, panels, weights, TILE_KEYS, from, to, kv->head_dim, num_keys, 1);
        }
}
