// Keys and values in int8: a head's row is head_dim numbers from -127 to 127 and a float scale.
//
// Scores are dot products of integers, so their sums are exact in any order. Queries have 14 bits;
// their rounding error is negligible beside that of the keys' seven.
#include "attention.h"

#include <float.h>
#include <math.h>

enum { KV_LEVELS = 127, QUERY_LEVELS = 8191, INT8_ROWS_TOGETHER = WIDE == 16 ? 6 : 3, INT8_KEYS_TOGETHER = 4 };

// The scale of a row's integers, of which the largest becomes `levels`; 0 for rows of zeros.
static float scale_of(const float *x, int64_t width, float levels) {
    f32x8 largest = splat8(0);
    for (int64_t i = 0; i < width; i += 8) largest = max8(largest, abs8(load8(x + i)));
    float scale = max_lanes(largest) / levels;
    return scale >= FLT_MIN ? scale : 0;
}

#if HAVE_AVX2
// Eight numbers times a factor, rounded, as int16 in the same order.
ALWAYS_INLINE __m128i round8(const float *x, __m256 factor) {
    __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), factor));
    return _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
#endif

static void quantize_kv_row(const float *x, int64_t head_dim, int8_t *to) {
    float scale = scale_of(x, head_dim, KV_LEVELS), inverse = scale > 0 ? 1.0f / scale : 0;
#if HAVE_AVX2
    const __m256 factor = _mm256_set1_ps(inverse);
    for (int64_t i = 0; i < head_dim; i += 16)
        _mm_storeu_si128((__m128i *)(to + i), _mm_packs_epi16(round8(x + i, factor), round8(x + i + 8, factor)));
#else
    for (int64_t i = 0; i < head_dim; i++) to[i] = (int8_t)rintf(x[i] * inverse);
#endif
    memcpy(to + head_dim, &scale, sizeof scale);
}

static void write_kv_int8(
    const kv_layer *kv, int64_t num_tokens, const int64_t *slots, const float *keys, const float *values, int64_t stride) {
    int64_t row_bytes = kv_row_bytes(kv->dtype, kv->head_dim);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t head = 0; head < kv->num_kv_heads; head++) {
            int64_t from = t * stride + head * kv->head_dim, to = (slots[t] * kv->num_kv_heads + head) * row_bytes;
            quantize_kv_row(keys + from, kv->head_dim, (int8_t *)kv->keys + to);
            quantize_kv_row(values + from, kv->head_dim, (int8_t *)kv->values + to);
        }
}

static void quantize_query_rows(int64_t num_rows, int64_t head_dim, const float *queries, int16_t *to, float *scales) {
    for (int64_t row = 0; row < num_rows; row++, queries += head_dim, to += head_dim) {
        scales[row] = scale_of(queries, head_dim, QUERY_LEVELS);
        float inverse = scales[row] > 0 ? 1.0f / scales[row] : 0;
#if HAVE_AVX2
        const __m256 factor = _mm256_set1_ps(inverse);
        for (int64_t i = 0; i < head_dim; i += 8) _mm_storeu_si128((__m128i *)(to + i), round8(queries + i, factor));
#else
        for (int64_t i = 0; i < head_dim; i++) to[i] = (int16_t)rintf(queries[i] * inverse);
#endif
    }
}

ALWAYS_INLINE float scale_at(const int8_t *row, int64_t head_dim) {
    float scale;
    memcpy(&scale, row + head_dim, sizeof scale);
    return scale;
}

#if defined(HAVE_AMX)
// A query has two rows in int8, of which the second is less significant: q = 128 * first + second.
enum { SECOND_BITS = 7, SECOND_LEVELS = 1 << SECOND_BITS };

ALWAYS_INLINE int64_t in_int8_steps(int64_t head_dim) { return (head_dim + GROUP - 1) / GROUP * GROUP; }

static void split_integers(int64_t num_rows, int64_t head_dim, const int16_t *queries, int8_t *to) {
    const int64_t k = in_int8_steps(head_dim);
    for (int64_t row = 0; row < num_rows; row++, queries += head_dim, to += 2 * k) {
        for (int64_t i = 0; i < head_dim; i++) {
            int16_t first = (int16_t)((queries[i] + SECOND_LEVELS / 2) >> SECOND_BITS);
            to[i] = (int8_t)first;
            to[k + i] = (int8_t)(queries[i] - first * SECOND_LEVELS);
        }
        memset(to + head_dim, 0, k - head_dim);
        memset(to + k + head_dim, 0, k - head_dim);
    }
}

static void quantize_queries(workspace *w, int64_t row_begin, int64_t num_rows, const float *queries) {
    int16_t *integers = w->integers + row_begin * w->head_dim;
    quantize_query_rows(num_rows, w->head_dim, queries, integers, w->integer_scales + row_begin);
    split_integers(num_rows, w->head_dim, integers, w->split_integers + row_begin * 2 * in_int8_steps(w->head_dim));
}

// Keys as columns, in fours of their numbers: [keys / PANEL][in_int8_steps(head_dim) / 4][PANEL][4].
static void load_key_fours(const kv_layer *kv, const key_tile *tile, int8_t *to, row_fetch *ahead) {
    for (int64_t key = 0; key < tile->num_keys; key += PANEL, to += in_int8_steps(kv->head_dim) * PANEL) {
        const void *from[WIDE];
        for (int i = 0; i < WIDE; i++) from[i] = (const int8_t *)kv->keys + tile->offsets[key + i];
        for (int64_t d = 0; d < kv->head_dim; d += 16) {
            __m512 fours[4];
            transpose_dwords(from, d, fours);
            fetch_lines(ahead, 8);  // a row of 64 numbers and their scale touches two
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) _mm512_store_ps(to + (d + 4 * i) * PANEL, fours[i]);
        }
    }
}

static void score_keys_int8(
    workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile, row_fetch *ahead) {
    const int64_t k = in_int8_steps(kv->head_dim);
    int8_t *keys = (int8_t *)w->keys;
    float key_scales[TILE_KEYS];
    for (int64_t key = 0; key < TILE_KEYS; key++)
        key_scales[key] = key < tile->num_keys ? scale_at((const int8_t *)kv->keys + tile->offsets[key], kv->head_dim) : 0;
    load_key_fours(kv, tile, keys, ahead);
    for (const row_block *b = blocks; b < blocks + num_blocks; b++) {
        key_range seen = in_wholes_of(PANEL, b->seen);
        const int8_t *queries = w->split_integers + b->row_begin * 2 * k;
        for (int64_t key = seen.begin; key < seen.end; key += 2 * PANEL) {
            int32_t sums[2 * BLOCK_ROWS + 8][2 * PANEL] __attribute__((aligned(64)));
            int64_t num_panels = (seen.end - key) / PANEL;
            tile_rows_exact(2 * b->num_rows, num_panels, queries, k, keys + key * k, sums[0]);
            for (int64_t r = 0; r < b->num_rows; r++)
                for (int64_t i = 0; i < 2 && i < num_panels; i++) {
                    __m512i first = _mm512_load_si512(sums[2 * r] + i * PANEL), second = _mm512_load_si512(sums[2 * r + 1] + i * PANEL);
                    __m512i exact = _mm512_add_epi32(_mm512_slli_epi32(first, SECOND_BITS), second);
                    f32w scale = splat_wide(w->integer_scales[b->row_begin + r]) * load_wide(key_scales + key + i * PANEL);
                    float *score = w->scores + (b->row_begin + r) * TILE_KEYS + key + i * PANEL;
                    store_wide(score, (f32w)_mm512_cvtepi32_ps(exact) * scale);
                }
        }
    }
}
#elif WIDE == 16
// Keys as pairs of neighbouring numbers in int16, [head_dim / 2][TILE_KEYS].
static void load_key_pairs(const kv_layer *kv, const key_tile *tile, int32_t *to, row_fetch *ahead) {
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
    const __m512i second = _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
    for (int64_t key = 0; key < tile->num_keys; key += WIDE) {
        const void *from[WIDE];
        for (int i = 0; i < WIDE; i++) from[i] = (const int8_t *)kv->keys + tile->offsets[key + i];
        for (int64_t d = 0; d < kv->head_dim; d += 16) {
            __m512 fours[4];
            transpose_dwords(from, d, fours);
            fetch_lines(ahead, 8);  // a row of 64 numbers and their scale touches two
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                // Each number becomes the upper byte of an int16, and is shifted down.
                __m512i four = _mm512_castps_si512(fours[i]);
                int32_t *at = to + (d / 2 + 2 * i) * TILE_KEYS + key;
                _mm512_store_si512(at, _mm512_srai_epi16(_mm512_shuffle_epi8(four, first), 8));
                _mm512_store_si512(at + TILE_KEYS, _mm512_srai_epi16(_mm512_shuffle_epi8(four, second), 8));
            }
        }
    }
}

// Scores of `vectors` times WIDE keys for `rows` queries; both are constants after inlining.
ALWAYS_INLINE void score_pairs(
    const int rows, const int vectors, int64_t head_dim, const int16_t *queries, const float *query_scales, const int32_t *pairs,
    const float *key_scales, float *scores) {
    __m512i sums[INT8_ROWS_TOGETHER][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_si512();
    for (int64_t d = 0; d < head_dim; d += 2, pairs += TILE_KEYS) {
        __m512i keys[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) keys[v] = _mm512_load_si512(pairs + v * WIDE);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, queries + r * head_dim + d, sizeof pair);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpwssd_epi32(sums[r][v], keys[v], _mm512_set1_epi32(pair));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            f32w scale = splat_wide(query_scales[r]) * load_wide(key_scales + v * WIDE);
            store_wide(scores + r * TILE_KEYS + v * WIDE, (f32w)_mm512_cvtepi32_ps(sums[r][v]) * scale);
        }
}

#define SCORE_OF_ROWS(rows) \
    case rows: \
        if (end - key > WIDE) \
            score_pairs(rows, 2, head_dim, queries, query_scales, pairs + key, key_scales + key, scores + key); \
        else \
            score_pairs(rows, 1, head_dim, queries, query_scales, pairs + key, key_scales + key, scores + key); \
        break

static void score_rows_int8(
    int64_t rows, key_range seen, int64_t head_dim, const int16_t *queries, const float *query_scales, const int32_t *pairs,
    const float *key_scales, float *scores) {
    for (int64_t key = seen.begin, end = seen.end; key < end; key += 2 * WIDE)
        switch (rows) {
            SCORE_OF_ROWS(1);
            SCORE_OF_ROWS(2);
            SCORE_OF_ROWS(3);
            SCORE_OF_ROWS(4);
            SCORE_OF_ROWS(5);
            SCORE_OF_ROWS(6);
        }
}

#undef SCORE_OF_ROWS

static void score_keys_int8(
    workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile, row_fetch *ahead) {
    int32_t *pairs = (int32_t *)w->keys;
    float key_scales[TILE_KEYS];
    for (int64_t key = 0; key < TILE_KEYS; key++)
        key_scales[key] = key < tile->num_keys ? scale_at((const int8_t *)kv->keys + tile->offsets[key], kv->head_dim) : 0;
    load_key_pairs(kv, tile, pairs, ahead);
    for (const row_block *b = blocks; b < blocks + num_blocks; b++)
        for (int64_t row = b->row_begin, end = row + b->num_rows; row < end; row += INT8_ROWS_TOGETHER) {
            int64_t rows = end - row < INT8_ROWS_TOGETHER ? end - row : INT8_ROWS_TOGETHER;
            score_rows_int8(
                rows, in_wholes_of(WIDE, b->seen), kv->head_dim, w->integers + row * kv->head_dim, w->integer_scales + row, pairs,
                key_scales, w->scores + row * TILE_KEYS);
        }
}
#else
// Scores of INT8_KEYS_TOGETHER keys for `rows` queries; rows is a constant after inlining.
ALWAYS_INLINE void score_tile_int8(
    const int rows, int64_t head_dim, const int16_t *queries, const float *query_scales, const int8_t *const *keys, float *scores) {
    float key_scales[INT8_KEYS_TOGETHER];
    for (int j = 0; j < INT8_KEYS_TOGETHER; j++) key_scales[j] = scale_at(keys[j], head_dim);
#if HAVE_AVX2
    __m256i sums[INT8_ROWS_TOGETHER][INT8_KEYS_TOGETHER];
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < INT8_KEYS_TOGETHER; j++) sums[r][j] = _mm256_setzero_si256();
    for (int64_t d = 0; d < head_dim; d += 16)
#pragma GCC unroll 4
        for (int j = 0; j < INT8_KEYS_TOGETHER; j++) {
            __m256i key = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(keys[j] + d)));
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) {
                __m256i query = _mm256_loadu_si256((const __m256i *)(queries + r * head_dim + d));
                sums[r][j] = _mm256_add_epi32(sums[r][j], _mm256_madd_epi16(key, query));
            }
        }
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++) {
        __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[r][0], sums[r][1]), _mm256_hadd_epi32(sums[r][2], sums[r][3]));
        __m128i total = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
        __m128 scale = _mm_mul_ps(_mm_set1_ps(query_scales[r]), _mm_loadu_ps(key_scales));
        _mm_storeu_ps(scores + r * TILE_KEYS, _mm_mul_ps(_mm_cvtepi32_ps(total), scale));
    }
#elif HAVE_NEON
    int32x4_t sums[INT8_ROWS_TOGETHER][INT8_KEYS_TOGETHER];
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < INT8_KEYS_TOGETHER; j++) sums[r][j] = vdupq_n_s32(0);
    for (int64_t d = 0; d < head_dim; d += 8)
#pragma GCC unroll 4
        for (int j = 0; j < INT8_KEYS_TOGETHER; j++) {
            int16x8_t key = vmovl_s8(vld1_s8(keys[j] + d));
#pragma GCC unroll 3
            for (int r = 0; r < rows; r++) {
                int16x8_t query = vld1q_s16(queries + r * head_dim + d);
                sums[r][j] = vmlal_s16(sums[r][j], vget_low_s16(key), vget_low_s16(query));
                sums[r][j] = vmlal_high_s16(sums[r][j], key, query);
            }
        }
#pragma GCC unroll 3
    for (int r = 0; r < rows; r++) {
        int32x4_t total = vpaddq_s32(vpaddq_s32(sums[r][0], sums[r][1]), vpaddq_s32(sums[r][2], sums[r][3]));
        store_wide(scores + r * TILE_KEYS, (f32w)vcvtq_f32_s32(total) * (splat_wide(query_scales[r]) * load_wide(key_scales)));
    }
#else
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < INT8_KEYS_TOGETHER; j++) {
            int32_t sum = 0;
            for (int64_t d = 0; d < head_dim; d++) sum += queries[r * head_dim + d] * keys[j][d];
            scores[r * TILE_KEYS + j] = (float)sum * (query_scales[r] * key_scales[j]);
        }
#endif
}

static void score_rows_int8(
    int64_t num_rows, key_range seen, const kv_layer *kv, const key_tile *tile, const int16_t *queries, const float *query_scales,
    float *scores, row_fetch *ahead) {
    int64_t head_dim = kv->head_dim;
    for (int64_t key = seen.begin; key < seen.end; key += INT8_KEYS_TOGETHER) {
        const int8_t *keys[INT8_KEYS_TOGETHER];
        for (int j = 0; j < INT8_KEYS_TOGETHER; j++) keys[j] = (const int8_t *)kv->keys + tile->offsets[key + j];
        fetch_lines(ahead, 2 * INT8_KEYS_TOGETHER);  // a row of 64 numbers and their scale touches two
        for (int64_t row = 0; row < num_rows; row += INT8_ROWS_TOGETHER) {
            const int16_t *from = queries + row * head_dim;
            float *to = scores + row * TILE_KEYS + key;
            switch (num_rows - row) {
                case 1: score_tile_int8(1, head_dim, from, query_scales + row, keys, to); break;
                case 2: score_tile_int8(2, head_dim, from, query_scales + row, keys, to); break;
                default: score_tile_int8(3, head_dim, from, query_scales + row, keys, to); break;
            }
        }
    }
}

static void score_keys_int8(
    workspace *w, const row_block *blocks, int64_t num_blocks, const kv_layer *kv, const key_tile *tile, row_fetch *ahead) {
    for (const row_block *b = blocks; b < blocks + num_blocks; b++)
        score_rows_int8(
            b->num_rows, in_wholes_of(INT8_KEYS_TOGETHER, b->seen), kv, tile, w->integers + b->row_begin * kv->head_dim,
            w->integer_scales + b->row_begin, w->scores + b->row_begin * TILE_KEYS, ahead);
}
#endif

#if !defined(HAVE_AMX)
static void quantize_queries(workspace *w, int64_t row_begin, int64_t num_rows, const float *queries) {
    quantize_query_rows(num_rows, w->head_dim, queries, w->integers + row_begin * w->head_dim, w->integer_scales + row_begin);
}
#endif

static void scale_weights_int8(const kv_layer *kv, const key_tile *tile, int64_t num_rows, float *weights) {
    float scales[TILE_KEYS] = {0};
    for (int64_t key = 0; key < tile->num_keys; key++)
        scales[key] = scale_at((const int8_t *)kv->values + tile->offsets[key], kv->head_dim);
    for (int64_t row = 0; row < num_rows; row++, weights += TILE_KEYS)
        for (int64_t i = 0; i < TILE_KEYS; i += WIDE) store_wide(weights + i, load_wide(weights + i) * load_wide(scales + i));
}
