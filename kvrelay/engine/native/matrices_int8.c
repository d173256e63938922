// int8: quantizes weights and rows, and multiplies them.
//
// Without VNNI, bytes are multiplied in pairs whose 16-bit sum must then be widened. Weights are
// chosen so that two pairs fit (`quantize_group_weights`): half the widenings, and exact sums.
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

// Inputs whose products are summed before widening. Their eight bytes make two sums per output, of
// inputs 0 1 4 5 and 2 3 6 7, because the instruction adds neighbours and inputs lie in fours.
enum { STEP = 8 };

// ---------------------------------------------------------------- products

#if HAVE_AVX2
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define ADD_FOUR_PRODUCTS _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define ADD_FOUR_PRODUCTS _mm256_dpbusd_avx_epi32
#endif

// sums + products of four neighbours, x unsigned and w signed: in int16 as two sums of pairs, or in
// int32 with VNNI.
ALWAYS_INLINE __m256i add_products(__m256i sums, __m256i x, __m256i w) {
#ifdef ADD_FOUR_PRODUCTS
    return ADD_FOUR_PRODUCTS(sums, x, w);
#else
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(x, w));
#endif
}

ALWAYS_INLINE __m256i widen(__m256i sums) {
#ifdef ADD_FOUR_PRODUCTS
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

// The products of a row's two fours with 8 columns, summed up in int32.
ALWAYS_INLINE __m256i multiply_step(__m256i first, __m256i second, const int8_t *weights) {
    __m256i sums = add_products(_mm256_setzero_si256(), first, _mm256_loadu_si256((const __m256i *)weights));
    return widen(add_products(sums, second, _mm256_loadu_si256((const __m256i *)(weights + 4 * PANEL))));
}

ALWAYS_INLINE __m256i splat_four(const uint8_t *values) {
    int32_t four;
    memcpy(&four, values, 4);
    return _mm256_set1_epi32(four);
}

// c[rows][16] (+)= x * a panel's columns; rows is a constant after inlining.
ALWAYS_INLINE void tile_int8(
    const int rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    int64_t num_groups = w->k / GROUP;
    const uint8_t *values = x->values;
    const int8_t *weights = (const int8_t *)w->data + panel * w->k * PANEL;
    const float *scales = w->scales + panel * num_groups * PANEL;
    const int16_t *group_sums = w->sums + panel * num_groups * PANEL;
    f32x8 sums[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        sums[r][0] = add ? load8(c + r * ldc) : splat8(0);
        sums[r][1] = add ? load8(c + r * ldc + 8) : splat8(0);
    }
    for (int64_t g = 0; g < num_groups; g++) {
        __m256i exact[MAX_ROWS][2], z0 = zero_point(group_sums + g * PANEL), z1 = zero_point(group_sums + g * PANEL + 8);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            exact[r][0] = z0;
            exact[r][1] = z1;
        }
        for (int64_t i = 0; i < GROUP; i += STEP) {
            const int8_t *columns = weights + i * PANEL;
            __builtin_prefetch(ahead.begin);
            __builtin_prefetch(ahead.begin + ahead.step);
            ahead.begin += STEP / 4 * ahead.step;
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                const uint8_t *at = values + r * w->k + i;
                __m256i first = splat_four(at), second = splat_four(at + 4);
                exact[r][0] = _mm256_add_epi32(exact[r][0], multiply_step(first, second, columns));
                exact[r][1] = _mm256_add_epi32(exact[r][1], multiply_step(first, second, columns + 32));
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
#else
static void tile_int8(
    const int rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    int64_t num_groups = w->k / GROUP;
    (void)ahead;
    for (int r = 0; r < rows; r++) {
        float sums[PANEL];
        for (int n = 0; n < PANEL; n++) sums[n] = add ? c[r * ldc + n] : 0;
        for (int64_t g = 0; g < num_groups; g++) {
            int32_t exact[PANEL];
            const int8_t *weights = (const int8_t *)w->data + (panel * w->k + g * GROUP) * PANEL;
            const uint8_t *values = x->values + r * w->k + g * GROUP;
            int64_t column = (panel * num_groups + g) * PANEL;
            for (int n = 0; n < PANEL; n++) exact[n] = -128 * w->sums[column + n];
            for (int64_t i = 0; i < GROUP; i++)
                for (int n = 0; n < PANEL; n++) exact[n] += values[i] * weights[i / 4 * 64 + 4 * n + i % 4];
            float s = x->scales[r * num_groups + g];
            for (int n = 0; n < PANEL; n++) sums[n] += (float)exact[n] * (w->scales[column + n] * s);
        }
        for (int n = 0; n < PANEL; n++) c[r * ldc + n] = sums[n];
    }
}
#endif

void tile_rows_int8(
    int64_t rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    switch (rows) {
        case 1: tile_int8(1, x, w, panel, c, ldc, add, ahead); break;
        case 2: tile_int8(2, x, w, panel, c, ldc, add, ahead); break;
        case 3: tile_int8(3, x, w, panel, c, ldc, add, ahead); break;
        case 4: tile_int8(4, x, w, panel, c, ldc, add, ahead); break;
        case 5: tile_int8(5, x, w, panel, c, ldc, add, ahead); break;
        default: tile_int8(6, x, w, panel, c, ldc, add, ahead); break;
    }
}

// ---------------------------------------------------------------- rows

// Values of GROUP numbers: x * inverse + 128, rounded.
#if HAVE_AVX2
static void quantize_group(const float *x, float inverse, uint8_t *out) {
    const __m256 factor = _mm256_set1_ps(inverse);
    for (int i = 0; i < GROUP; i += 32) {
        __m256i quarters[4];
        for (int j = 0; j < 4; j++) {
            __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor));
            quarters[j] = _mm256_add_epi32(rounded, _mm256_set1_epi32(128));
        }
        __m256i low = _mm256_packus_epi32(quarters[0], quarters[1]), high = _mm256_packus_epi32(quarters[2], quarters[3]);
        // Packing works within halves: groups of four then have the order 0 2 4 6 1 3 5 7.
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *)(out + i), bytes);
    }
}
#else
static void quantize_group(const float *x, float inverse, uint8_t *out) {
    for (int i = 0; i < GROUP; i++) out[i] = (uint8_t)(rintf(x[i] * inverse) + 128);
}
#endif

void quantize_rows(int64_t num_rows, int64_t k, const float *x, quantized_rows *out) {
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t g = 0; g < k / GROUP; g++) {
            const float *from = x + row * k + g * GROUP;
            f32x8 largest = splat8(0);
            for (int i = 0; i < GROUP; i += 8) largest = max8(largest, max8(load8(from + i), -load8(from + i)));
            float scale = max_lanes(largest) / 127.0f;
            out->scales[row * (k / GROUP) + g] = scale;
            quantize_group(from, scale > 0 ? 1.0f / scale : 0, out->values + row * k + g * GROUP);
        }
}

// ---------------------------------------------------------------- weights

enum {
    LARGEST_WEIGHT = 127,
    LARGEST_SUM = 128,  // 128 * 255, the largest value of a row, is less than 2^15
};

// weights ~ scale * numbers. Returns the squared error.
ALWAYS_INLINE float round_group(const f32x8 *weights, float scale, f32x8 *numbers) {
    const f32x8 inverse = splat8(1.0f / scale);
    f32x8 errors = splat8(0);
    for (int i = 0; i < GROUP / 8; i++) {
        numbers[i] = fma8(weights[i], inverse, splat8(ROUNDING)) - splat8(ROUNDING);
        f32x8 error = fma8(weights[i], inverse, -numbers[i]);
        errors = fma8(error, error, errors);
    }
    return sum_lanes(errors) * scale * scale;
}

// The largest sum that add_products can make in one place of a group's numbers. Values of rows are
// not negative, so numbers of one sign alone are the worst case.
ALWAYS_INLINE float largest_sum(const f32x8 *numbers) {
    f32x8 largest = splat8(0);
    for (int i = 0; i < GROUP / STEP; i++) {
        f32x8 above = max8(numbers[i], splat8(0)), below = above - numbers[i];
        above += swap_lanes(above, 4);  // a group of four and the next
        below += swap_lanes(below, 4);
        above += swap_lanes(above, 1);  // neighbours
        below += swap_lanes(below, 1);
        largest = max8(largest, max8(above, below));
    }
    return max_lanes(largest);
}

// Quantizes one group so that pair sums fit 16 bits. Tries scales from the finest that fits down to
// 7/8 of it and returns the one with the least error.
static float quantize_group_weights(const float *from, f32x8 *numbers) {
    f32x8 weights[GROUP / 8], largest = splat8(0);
    for (int i = 0; i < GROUP / 8; i++) {
        weights[i] = load8(from + 8 * i);
        numbers[i] = splat8(0);
        largest = max8(largest, max8(weights[i], -weights[i]));
    }
    float max = max_lanes(largest), best_scale = 0, least_error = 0;
    if (!(max >= FLT_MIN * LARGEST_WEIGHT)) return 0;
    // Rounding four numbers takes at most 2 from their sum.
    float finest_possible = (LARGEST_SUM + 2) * max / largest_sum(weights);
    int levels = finest_possible < LARGEST_WEIGHT ? (int)finest_possible : LARGEST_WEIGHT;
    for (int finest = 0; levels > 0 && 8 * levels >= 7 * finest; levels--) {
        float scale = max / (float)levels, error = round_group(weights, scale, numbers);
        if ((finest > 0 && error >= least_error) || largest_sum(numbers) > LARGEST_SUM) continue;
        if (finest == 0) finest = levels;
        least_error = error;
        best_scale = scale;
    }
    round_group(weights, best_scale, numbers);
    return best_scale;
}

typedef struct {
    int64_t n, k;
    const float *weights;
    int8_t *data;
    float *scales;
    int16_t *sums;
} quantize_args;

static void quantize_panel(void *argument, int64_t panel) {
    const quantize_args *args = argument;
    int64_t num_groups = args->k / GROUP;
    for (int64_t column = 0; column < PANEL && panel * PANEL + column < args->n; column++)
        for (int64_t g = 0; g < num_groups; g++) {
            f32x8 numbers[GROUP / 8];
            float scale = quantize_group_weights(args->weights + (panel * PANEL + column) * args->k + g * GROUP, numbers);
            int8_t *to = args->data + (panel * args->k + g * GROUP) * PANEL + column * 4;
            float sum = 0;
            for (int i = 0; i < GROUP; i++) {
                float number = numbers[i / 8][i % 8];
                to[i / 4 * 4 * PANEL + i % 4] = (int8_t)number;
                sum += number;
            }
            args->scales[(panel * num_groups + g) * PANEL + column] = scale;
            args->sums[(panel * num_groups + g) * PANEL + column] = (int16_t)sum;
        }
}

void quantize_weights(int64_t n, int64_t k, const float *weights, int8_t *data, float *scales, int16_t *sums) {
    quantize_args args = {n, k, weights, data, scales, sums};
    parallel_for((n + PANEL - 1) / PANEL, quantize_panel, &args);
}
