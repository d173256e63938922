// Flash attention (Dao et al. 2022) over the paged pool: keys pass by in tiles of 64, the softmax is renewed with each tile.
//
// Tiles begin at multiples of 64 of the position, never at a chunk's edge, so a row sums in one order however its prompt was cut.
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { FEW_ROWS = 12 };

// What one tile of rows needs while its keys pass by; one per thread, kept.
typedef struct {
    int64_t head_dim;
    float *queries;        // [TILE_ROWS][head_dim], scaled
    float *scores;         // [TILE_ROWS][TILE_KEYS], then weights
    float *out;            // [TILE_ROWS][head_dim]
    float *keys;           // [head_dim][TILE_KEYS]
    float *values;         // [TILE_KEYS][head_dim]
    int16_t *integers;     // [TILE_ROWS][head_dim], queries for keys in int8
    float integer_scales[TILE_ROWS];
    float highest[TILE_ROWS], total[TILE_ROWS];
} workspace;

static workspace *get_workspace(int64_t head_dim) {
    static _Thread_local workspace space;
    if (space.head_dim < head_dim) {
        free(space.queries);
        int64_t num_floats = 3 * TILE_ROWS * head_dim + TILE_ROWS * TILE_KEYS + 2 * TILE_KEYS * head_dim;
        space.queries = aligned_alloc(64, num_floats * sizeof(float));
        if (space.queries == NULL) abort();
        space.out = space.queries + TILE_ROWS * head_dim;
        space.scores = space.out + TILE_ROWS * head_dim;
        space.keys = space.scores + TILE_ROWS * TILE_KEYS;
        space.values = space.keys + TILE_KEYS * head_dim;
        space.integers = (int16_t *)(space.values + TILE_KEYS * head_dim);
        space.head_dim = head_dim;
    }
    return &space;
}

static inline float bf16_to_f32(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t f32_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Finds up to TILE_KEYS keys from key_begin on, those up to `last`.
static void find_keys(const kv_layer *kv, const segment *s, int64_t head, int64_t key_begin, int64_t last, key_tile *tile) {
    int64_t head_items = kv_row_items(kv->dtype, kv->head_dim), row = kv->num_kv_heads * head_items;
    int64_t block = key_begin / kv->block_size, within = key_begin % kv->block_size;
    tile->num_keys = last + 1 - key_begin < TILE_KEYS ? last + 1 - key_begin : TILE_KEYS;
    for (int64_t key = 0; key < tile->num_keys; block++, within = 0) {
        int64_t offset = (s->block_ids[block] * kv->block_size + within) * row + head * head_items;
        for (; within < kv->block_size && key < tile->num_keys; within++, key++, offset += row) tile->offsets[key] = offset;
    }
}

// Eight floats of a key or value at `offset`.
ALWAYS_INLINE f32x8 load_kv8(const void *side, int64_t dtype, int64_t offset) {
    if (dtype == KV_F32) return load8((const float *)side + offset);
    const uint16_t *p = (const uint16_t *)side + offset;
#if HAVE_AVX2
    return (f32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    f32x8 v;
    for (int i = 0; i < 8; i++) v[i] = bf16_to_f32(p[i]);
    return v;
#endif
}

// rows[i][j] -> to[j * stride + i]
ALWAYS_INLINE void transpose8(f32x8 r[8], float *to, int64_t stride) {
#if HAVE_AVX2
    __m256 t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(u[i], u[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(u[i], u[i + 4], 0x31));
    }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) to[j * stride + i] = r[i][j];
#endif
}

// Brings a tile's rows into the cache: a head's rows lie apart, which hides them from the processor's own prefetching.
static void fetch_rows(const kv_layer *kv, const void *side, const key_tile *tile) {
    int64_t item = kv_item_bytes(kv->dtype), row_bytes = kv_row_bytes(kv->dtype, kv->head_dim);
    for (int64_t key = 0; key < tile->num_keys; key++)
        for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch((const char *)side + tile->offsets[key] * item + i);
}

// The tile's keys, turned: [head_dim][TILE_KEYS]. Columns beyond num_keys are zero up to a whole panel.
static void load_keys(const kv_layer *kv, const key_tile *tile, float *to) {
    for (int64_t key = 0; key < tile->num_keys || key % PANEL != 0; key += 8) {
        int64_t num_present = tile->num_keys - key;
        for (int64_t d = 0; d < kv->head_dim; d += 8) {
            f32x8 rows[8];
            for (int i = 0; i < 8; i++)
                rows[i] = i < num_present ? load_kv8(kv->keys, kv->dtype, tile->offsets[key + i] + d) : splat8(0);
            transpose8(rows, to + d * TILE_KEYS + key, TILE_KEYS);
        }
    }
}

static void load_values(const kv_layer *kv, const key_tile *tile, float *to) {
    if (kv->dtype == KV_INT8) {
        load_values_int8(kv, tile, to);
        return;
    }
    for (int64_t key = 0; key < tile->num_keys; key++)
        for (int64_t d = 0; d < kv->head_dim; d += 8)
            store8(to + key * kv->head_dim + d, load_kv8(kv->values, kv->dtype, tile->offsets[key] + d));
}

// c[rows][num_columns] (+)= a[rows][k] b[k][num_columns]
static void multiply_tiles(
    int64_t num_rows, int64_t num_columns, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
    int64_t k, int add) {
    const fetch nothing = {(const char *)b, 0};
    // A column of b stays in the first-level cache while the rows pass by.
    for (int64_t column = 0; column < num_columns; column += PANEL)
        for (int64_t row = 0; row < num_rows; row += 6) {
            int64_t rows = num_rows - row < 6 ? num_rows - row : 6;
            tile_rows_f32(rows, a + row * lda, lda, b + column, ldb, c + row * ldc + column, ldc, k, add, nothing);
        }
}

// Turns a row's scores of one tile into weights, and scales what it has summed so far.
static void renew_softmax(workspace *w, int64_t row, int64_t first_visible, int64_t num_visible_end) {
    float *scores = w->scores + row * TILE_KEYS;
    for (int64_t i = 0; i < first_visible && i < TILE_KEYS; i++) scores[i] = -INFINITY;
    for (int64_t i = num_visible_end < 0 ? 0 : num_visible_end; i < TILE_KEYS; i++) scores[i] = -INFINITY;
    f32x8 highest = load8(scores);
    for (int64_t i = 8; i < TILE_KEYS; i += 8) highest = max8(highest, load8(scores + i));
    float tile_highest = max_lanes(highest);
    if (tile_highest == -INFINITY) {
        memset(scores, 0, TILE_KEYS * sizeof(float));
        return;
    }
    float renewed = tile_highest > w->highest[row] ? tile_highest : w->highest[row];
    f32x8 sum = splat8(0);
    for (int64_t i = 0; i < TILE_KEYS; i += 8) {
        f32x8 weight = exp8_inline(load8(scores + i) - splat8(renewed));
        store8(scores + i, weight);
        sum += weight;
    }
    float total = sum_lanes(sum);
    if (renewed != w->highest[row] && w->highest[row] != -INFINITY) {
        f32x8 factor = exp8_inline(splat8(w->highest[row] - renewed));
        w->total[row] *= factor[0];
        float *out = w->out + row * w->head_dim;
        for (int64_t d = 0; d < w->head_dim; d += 8) store8(out + d, load8(out + d) * factor);
    }
    w->total[row] += total;
    w->highest[row] = renewed;
}

// The rows' scores with a tile's keys, of which those behind num_keys may be anything.
static void score_keys(workspace *w, const kv_layer *kv, const key_tile *tile, int64_t num_rows) {
    if (kv->dtype == KV_INT8) {
        score_keys_int8(kv, tile, num_rows, w->integers, w->integer_scales, w->scores);
        return;
    }
    load_keys(kv, tile, w->keys);
    int64_t num_columns = (tile->num_keys + PANEL - 1) / PANEL * PANEL;
    multiply_tiles(num_rows, num_columns, w->queries, kv->head_dim, w->keys, TILE_KEYS, w->scores, TILE_KEYS, kv->head_dim, 0);
}

static void add_weighted_values(workspace *w, const kv_layer *kv, const key_tile *tile, int64_t key_begin, int64_t num_rows) {
    int64_t head_dim = kv->head_dim;
    if (kv->dtype == KV_INT8) {
        scale_weights_int8(kv, tile, num_rows, w->scores);
        if (add_values_int8(kv, tile, num_rows, w->scores, w->out)) return;
    }
    if (kv->dtype != KV_F32 || num_rows >= FEW_ROWS) {
        load_values(kv, tile, w->values);
        multiply_tiles(num_rows, head_dim, w->scores, TILE_KEYS, w->values, head_dim, w->out, w->head_dim, tile->num_keys, 1);
        return;
    }
    // Few rows: straight from the pool, a block at a time.
    int64_t run = kv->block_size - key_begin % kv->block_size;
    for (int64_t key = 0; key < tile->num_keys; key += run, run = kv->block_size) {
        if (run > tile->num_keys - key) run = tile->num_keys - key;
        const float *values = (const float *)kv->values + tile->offsets[key];
        multiply_tiles(
            num_rows, head_dim, w->scores + key, TILE_KEYS, values, kv->num_kv_heads * head_dim, w->out, w->head_dim, run, 1);
    }
}

typedef struct {
    const attention_call *call;
    const kv_layer *kv;
} attention_job;

static void load_queries(const attention_call *c, const segment *s, const attention_tile *tile, int64_t head, int64_t group, workspace *w) {
    int64_t head_dim = w->head_dim;
    for (int64_t t = 0; t < tile->num_tokens; t++) {
        const float *from = c->queries + (s->row_begin + tile->token_begin + t) * c->query_stride + head * group * head_dim;
        float *to = w->queries + t * group * head_dim;
        for (int64_t i = 0; i < group * head_dim; i += 8) store8(to + i, load8(from + i) * splat8(c->scale));
    }
}

static void store_out(const attention_call *c, const segment *s, const attention_tile *tile, int64_t head, int64_t group, const workspace *w) {
    int64_t head_dim = w->head_dim;
    for (int64_t t = 0; t < tile->num_tokens; t++)
        for (int64_t g = 0; g < group; g++) {
            int64_t row = t * group + g;
            float *to = c->out + ((s->row_begin + tile->token_begin + t) * c->num_heads + head * group + g) * head_dim;
            f32x8 factor = splat8(1.0f / w->total[row]);
            for (int64_t d = 0; d < head_dim; d += 8) store8(to + d, load8(w->out + row * head_dim + d) * factor);
        }
}

static void attend_tile(void *argument, int64_t task) {
    const attention_job *job = argument;
    const attention_call *c = job->call;
    const kv_layer *kv = job->kv;
    const attention_tile *tile = &c->tiles[task / kv->num_kv_heads];
    const segment *s = &c->segments[tile->segment];
    int64_t head = task % kv->num_kv_heads, group = c->num_heads / kv->num_kv_heads;
    workspace *w = get_workspace(kv->head_dim);
    w->head_dim = kv->head_dim;
    int64_t num_rows = tile->num_tokens * group;
    int64_t first = s->position + tile->token_begin, last = first + tile->num_tokens - 1;
    load_queries(c, s, tile, head, group, w);
    if (kv->dtype == KV_INT8) quantize_queries(num_rows, kv->head_dim, w->queries, w->integers, w->integer_scales);
    memset(w->out, 0, num_rows * kv->head_dim * sizeof(float));
    for (int64_t r = 0; r < num_rows; r++) {
        w->highest[r] = -INFINITY;
        w->total[r] = 0;
    }
    int64_t first_key = c->window > 0 && first >= c->window ? first - c->window + 1 : 0;
    key_tile keys, next_keys;
    find_keys(kv, s, head, first_key / TILE_KEYS * TILE_KEYS, last, &next_keys);
    for (int64_t key = first_key / TILE_KEYS * TILE_KEYS; key <= last; key += TILE_KEYS) {
        keys = next_keys;
        fetch_rows(kv, kv->values, &keys);
        score_keys(w, kv, &keys, num_rows);
        for (int64_t r = 0; r < num_rows; r++) {
            int64_t position = first + r / group;
            int64_t visible = c->window > 0 ? position - c->window + 1 - key : 0;
            renew_softmax(w, r, visible, position + 1 - key);
        }
        if (key + TILE_KEYS <= last) {
            find_keys(kv, s, head, key + TILE_KEYS, last, &next_keys);
            fetch_rows(kv, kv->keys, &next_keys);
        }
        add_weighted_values(w, kv, &keys, key, num_rows);
    }
    store_out(c, s, tile, head, group, w);
}

void attend(const attention_call *call, const kv_layer *kv) {
    attention_job job = {call, kv};
    parallel_for(call->num_tiles * kv->num_kv_heads, attend_tile, &job);
}

void write_kv(const kv_layer *kv, int64_t num_tokens, const int64_t *slots, const float *keys, const float *values, int64_t stride) {
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
