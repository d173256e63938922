// AVX2 and FMA: processors of 2013 and later. With AVX-VNNI the products of bytes are one instruction.
#include "avx2_vectors.h"
#include "wide8.h"

#define widen_int8_wide widen_int8
#define widen_bf16_wide widen_bf16

// sums + products of four neighbours, x unsigned and w signed: in int16 as two sums of pairs, or in
// int32 with VNNI.
ALWAYS_INLINE __m256i add_products(__m256i sums, __m256i x, __m256i w) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, x, w);
#else
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(x, w));
#endif
}

ALWAYS_INLINE __m256i widen_products(__m256i sums) {
#if defined(__AVXVNNI__)
    return sums;
#else
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#endif
}

// -128 * the sums of 8 columns: removes the values' zero point from the products.
ALWAYS_INLINE __m256i zero_point(const int16_t *sums) {
    __m256i wide = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)sums));
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(wide, 7));
}

// The products of a row's two fours with 8 columns, summed up in int32. Two fours are added before
// widening: weights are chosen so that they fit (`quantize_group_weights`).
ALWAYS_INLINE __m256i multiply_step(__m256i first, __m256i second, const int8_t *weights) {
    __m256i sums = add_products(_mm256_setzero_si256(), first, _mm256_loadu_si256((const __m256i *)weights));
    return widen_products(add_products(sums, second, _mm256_loadu_si256((const __m256i *)(weights + 4 * PANEL))));
}

// One panel; rows is a constant after inlining.
ALWAYS_INLINE void tile_int8(
    const int rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    int64_t num_groups = w->k / GROUP;
    const uint8_t *values = x->values;
    const int8_t *weights = (const int8_t *)w->data + panel * w->k * PANEL;
    const float *scales = w->scales + panel * num_groups * PANEL;
    const int16_t *group_sums = w->sums + panel * num_groups * PANEL;
    f32x8 sums[MAX_ROWS_INT8][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        sums[r][0] = add ? load8(c + r * ldc) : splat8(0);
        sums[r][1] = add ? load8(c + r * ldc + 8) : splat8(0);
    }
    for (int64_t g = 0; g < num_groups; g++) {
        __m256i exact[MAX_ROWS_INT8][2], z0 = zero_point(group_sums + g * PANEL), z1 = zero_point(group_sums + g * PANEL + 8);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            exact[r][0] = z0;
            exact[r][1] = z1;
        }
        for (int64_t i = 0; i < GROUP; i += 8) {
            const int8_t *numbers = weights + i * PANEL;
            __builtin_prefetch(ahead.begin);
            __builtin_prefetch(ahead.begin + ahead.step);
            ahead.begin += 2 * ahead.step;
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                const uint8_t *at = values + r * w->k + i;
                __m256i first = _mm256_set1_epi32(four_values(at)), second = _mm256_set1_epi32(four_values(at + 4));
                exact[r][0] = _mm256_add_epi32(exact[r][0], multiply_step(first, second, numbers));
                exact[r][1] = _mm256_add_epi32(exact[r][1], multiply_step(first, second, numbers + 32));
                // Row by row: otherwise the compiler loads all weights first and spills the sums.
                __asm__("" : "+x"(exact[r][0]), "+x"(exact[r][1]) : : "memory");
            }
        }
        f32x8 s0 = load8(scales + g * PANEL), s1 = load8(scales + g * PANEL + 8);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32x8 s = splat8(x->scales[r * num_groups + g]);
            sums[r][0] = fma8((f32x8)_mm256_cvtepi32_ps(exact[r][0]), s0 * s, sums[r][0]);
            sums[r][1] = fma8((f32x8)_mm256_cvtepi32_ps(exact[r][1]), s1 * s, sums[r][1]);
        }
        weights += GROUP * PANEL;
        values += GROUP;
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        store8(c + r * ldc, sums[r][0]);
        store8(c + r * ldc + 8, sums[r][1]);
    }
}

static void tile_rows_int8(
    int64_t rows, int64_t panels, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add,
    fetch ahead) {
    for (int64_t p = 0; p < panels; p++, panel++, c += PANEL, ahead.begin += ahead.panel_bytes)
        switch (rows) {
            case 1: tile_int8(1, x, w, panel, c, ldc, add, ahead); break;
            case 2: tile_int8(2, x, w, panel, c, ldc, add, ahead); break;
            case 3: tile_int8(3, x, w, panel, c, ldc, add, ahead); break;
            case 4: tile_int8(4, x, w, panel, c, ldc, add, ahead); break;
            case 5: tile_int8(5, x, w, panel, c, ldc, add, ahead); break;
            default: tile_int8(6, x, w, panel, c, ldc, add, ahead); break;
        }
}

ALWAYS_INLINE void quantize_group(const float *x, float inverse, uint8_t *out) {
    const __m256 factor = _mm256_set1_ps(inverse);
    for (int i = 0; i < GROUP; i += 32) {
        __m256i quarters[4];
        for (int j = 0; j < 4; j++) {
            __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor));
            // The last byte, as in every variant: NaN becomes 128, too.
            quarters[j] = _mm256_and_si256(_mm256_add_epi32(rounded, _mm256_set1_epi32(128)), _mm256_set1_epi32(255));
        }
        __m256i low = _mm256_packus_epi32(quarters[0], quarters[1]), high = _mm256_packus_epi32(quarters[2], quarters[3]);
        // Packing works within halves: groups of four then have the order 0 2 4 6 1 3 5 7.
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *)(out + i), bytes);
    }
}
