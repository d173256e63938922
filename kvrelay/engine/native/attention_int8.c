// Keys and values in int8: a head's row is head_dim numbers from -127 to 127 and a float scale.
//
// Scores are dot products of integers, so their sums are exact in any order. Queries have 14 bits;
// their rounding error is negligible beside that of the keys' seven.
#include "attention.h"

#include <float.h>
#include <math.h>

enum { KV_LEVELS = 127, QUERY_LEVELS = 8191, INT8_ROWS_TOGETHER = 3, INT8_KEYS_TOGETHER = 4 };

// The scale of a row's integers, of which the largest becomes `levels`; 0 for rows of zeros.
static float scale_of(const float *x, int64_t width, float levels) {
    f32x8 largest = splat8(0);
    for (int64_t i = 0; i < width; i += 8) largest = max8(largest, max8(load8(x + i), -load8(x + i)));
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

static void quantize_queries(int64_t num_rows, int64_t head_dim, const float *queries, int16_t *to, float *scales) {
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
#else
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < INT8_KEYS_TOGETHER; j++) {
            int32_t sum = 0;
            for (int64_t d = 0; d < head_dim; d++) sum += queries[r * head_dim + d] * keys[j][d];
            scores[r * TILE_KEYS + j] = (float)sum * (query_scales[r] * key_scales[j]);
        }
#endif
}

static void score_keys_int8(
    const kv_layer *kv, const key_tile *tile, int64_t num_rows, const int16_t *queries, const float *query_scales, float *scores,
    row_fetch *ahead) {
    int64_t head_dim = kv->head_dim;
    for (int64_t key = 0; key < tile->num_keys; key += INT8_KEYS_TOGETHER) {
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

static void scale_weights_int8(const kv_layer *kv, const key_tile *tile, int64_t num_rows, float *weights) {
    float scales[TILE_KEYS] = {0};
    for (int64_t key = 0; key < tile->num_keys; key++)
        scales[key] = scale_at((const int8_t *)kv->values + tile->offsets[key], kv->head_dim);
    for (int64_t row = 0; row < num_rows; row++, weights += TILE_KEYS)
        for (int64_t i = 0; i < TILE_KEYS; i += 8) store8(weights + i, load8(weights + i) * load8(scales + i));
}
