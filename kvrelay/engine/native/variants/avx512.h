// AVX-512 with VNNI: sixteen floats, or the bytes of 16 columns, in one of 32 registers.
#include "avx2_vectors.h"

#define WIDE 16

#define MAX_ROWS 12  // times two panels: 24 registers of sums
#define MAX_PANELS 2
#define ROWS_PER_BLOCK 264
#define TASK_WORK 4000000

#define MAX_PARTS 6  // times two panels, of even and odd inputs
#define PARTS_PANELS 2
#ifndef TASK_WORK_BF16
#define TASK_WORK_BF16 2000000
#endif

#ifndef ROW_BLOCK
#define MAX_ROWS_INT8 6  // times two panels, each as floats and as integers
#define ROWS_PER_BLOCK_INT8 264
#define ROW_BLOCK 1
#define TASK_WORK_INT8 8000000
#define VALUE_SIGN 0
#endif

typedef float f32w __attribute__((vector_size(64)));
typedef int32_t i32w __attribute__((vector_size(64)));

ALWAYS_INLINE f32w load_wide(const float *p) { return (f32w)_mm512_loadu_ps(p); }
ALWAYS_INLINE void store_wide(float *p, f32w v) { _mm512_storeu_ps(p, (__m512)v); }
ALWAYS_INLINE f32w splat_wide(float v) { return (f32w)_mm512_set1_ps(v); }
ALWAYS_INLINE f32w fma_wide(f32w a, f32w b, f32w c) { return (f32w)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ALWAYS_INLINE f32w max_wide(f32w a, f32w b) { return (f32w)_mm512_max_ps((__m512)a, (__m512)b); }

ALWAYS_INLINE f32x8 low_half(f32w v) { return (f32x8)_mm512_castps512_ps256((__m512)v); }
ALWAYS_INLINE f32x8 high_half(f32w v) { return (f32x8)_mm512_extractf32x8_ps((__m512)v, 1); }

// Adds to eight sums, in the order of the numbers.
ALWAYS_INLINE f32x8 add_to_eight(f32x8 sums, const f32w *v) { return (sums + low_half(v[0])) + high_half(v[0]); }

#define max_lanes_wide(v) max_lanes(max8(low_half(v), high_half(v)))

ALWAYS_INLINE f32w widen_int8_wide(const void *from) {
    return (f32w)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
}

ALWAYS_INLINE f32w widen_bf16_wide(const void *from) {
    return (f32w)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from)), 16);
}

// 16 bytes at each of 16 addresses, as four vectors with a dword of each.
ALWAYS_INLINE void transpose_dwords(const void *const *from, int64_t byte, __m512 to[4]) {
    __m512 rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_castps128_ps512(_mm_loadu_ps((const float *)((const char *)from[i] + byte)));
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps((const float *)((const char *)from[i + 4] + byte)), 1);
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps((const float *)((const char *)from[i + 8] + byte)), 2);
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps((const float *)((const char *)from[i + 12] + byte)), 3);
    }
    __m512d low[2], high[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        low[i] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]));
        high[i] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
    }
    to[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
    to[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
    to[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
    to[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
}

ALWAYS_INLINE void transpose_f32(const void *const *from, f32w to[8]) {
    transpose_dwords(from, 0, (__m512 *)to);
    transpose_dwords(from, 16, (__m512 *)to + 4);
}

ALWAYS_INLINE void transpose_bf16(const void *const *from, f32w to[8]) {
    __m512 pairs[4];
    transpose_dwords(from, 0, pairs);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i pair = _mm512_castps_si512(pairs[i]);
        to[2 * i] = (f32w)_mm512_slli_epi32(pair, 16);
        to[2 * i + 1] = (f32w)_mm512_and_si512(pair, _mm512_set1_epi32((int32_t)0xffff0000));
    }
}

// -128 * the sums of 16 columns: removes the values' zero point from the products.
ALWAYS_INLINE __m512i zero_point(const int16_t *sums) {
    __m512i wide = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)sums));
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(wide, 7));
}

// rows and panels are constants after inlining.
ALWAYS_INLINE void tile_int8(
    const int rows, const int panels, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add,
    fetch ahead) {
    const int64_t num_groups = w->k / GROUP, panel_bytes = w->k * PANEL;
    const int64_t row_bytes = ROW_BLOCK == 1 ? w->k : GROUP, row_scales = ROW_BLOCK == 1 ? num_groups : 1;
    const int8_t *weights = (const int8_t *)w->data + panel * panel_bytes;
    f32w sums[6][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) sums[r][p] = add ? load_wide(c + r * ldc + p * PANEL) : splat_wide(0);
    for (int64_t g = 0; g < num_groups; g++) {
        const uint8_t *values = x->values + g * GROUP * ROW_BLOCK;
        __m512i exact[6][2];
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
            __m512i zero = zero_point(w->sums + ((panel + p) * num_groups + g) * PANEL);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) exact[r][p] = zero;
        }
        for (int64_t i = 0; i < GROUP; i += 4, weights += 4 * PANEL, ahead.begin += ahead.step) {
            __m512i numbers[2];
#pragma GCC unroll 2
            for (int p = 0; p < panels; p++) {
                numbers[p] = _mm512_loadu_si512(weights + p * panel_bytes);
                __builtin_prefetch(ahead.begin + p * ahead.panel_bytes);
            }
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                __m512i four = _mm512_set1_epi32(four_values(values + r * row_bytes + i));
                if (VALUE_SIGN) four = _mm512_xor_si512(four, _mm512_set1_epi32(VALUE_SIGN));
#pragma GCC unroll 2
                for (int p = 0; p < panels; p++) exact[r][p] = _mm512_dpbusd_epi32(exact[r][p], four, numbers[p]);
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) {
            f32w scales = load_wide(w->scales + ((panel + p) * num_groups + g) * PANEL);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                f32w scale = scales * splat_wide(x->scales[r * row_scales + g * ROW_BLOCK]);
                sums[r][p] = fma_wide((f32w)_mm512_cvtepi32_ps(exact[r][p]), scale, sums[r][p]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) store_wide(c + r * ldc + p * PANEL, sums[r][p]);
}

#define TILE_OF_ROWS(rows) \
    case rows: \
        if (panels == 1) \
            tile_int8(rows, 1, x, w, panel, c, ldc, add, ahead); \
        else \
            tile_int8(rows, 2, x, w, panel, c, ldc, add, ahead); \
        break

static void tile_rows_vnni(
    int64_t rows, int64_t panels, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add,
    fetch ahead) {
    switch (rows) {
        TILE_OF_ROWS(1);
        TILE_OF_ROWS(2);
        TILE_OF_ROWS(3);
        TILE_OF_ROWS(4);
        TILE_OF_ROWS(5);
        TILE_OF_ROWS(6);
    }
}

#undef TILE_OF_ROWS

#ifndef HAVE_AMX
#define tile_rows_int8 tile_rows_vnni
#endif

ALWAYS_INLINE void quantize_group(const float *x, float inverse, uint8_t *out) {
    const __m512 factor = _mm512_set1_ps(inverse);
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += 16) {
        // The last byte, as in every variant. Its sign turned is its sum with 128.
        __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor)));
        if (!VALUE_SIGN) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
        _mm_storeu_si128((__m128i *)(out + i), bytes);
    }
}
