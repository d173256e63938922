// int8: quantizes weights and rows.
//
// Without VNNI, bytes are multiplied in pairs whose 16-bit sum must then be widened. Weights are
// chosen so that two pairs fit (`quantize_group_weights`): half the widenings, and exact sums.
#include "kernels.h"

#include <float.h>
#include <math.h>

// Inputs whose products are summed before widening. Their eight bytes make two sums per output, of
// inputs 0 1 4 5 and 2 3 6 7, because the instruction adds neighbours and inputs lie in fours.
enum { STEP = 8 };

// ---------------------------------------------------------------- rows

// Where a row's group lies, counted in groups.
ALWAYS_INLINE int64_t place_of_group(int64_t num_groups, int64_t row, int64_t group) {
    return (row / ROW_BLOCK * num_groups + group) * ROW_BLOCK + row % ROW_BLOCK;
}

static void quantize_rows(int64_t num_rows, int64_t k, const float *x, quantized_rows *out) {
    int64_t num_groups = k / GROUP;
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t g = 0; g < num_groups; g++) {
            const float *from = x + row * k + g * GROUP;
            int64_t place = place_of_group(num_groups, row, g);
            float scale = max_lanes(largest_of_group(from)) / 127.0f;
            if (scale < FLT_MIN) scale = 0;  // its inverse would not be finite
            out->scales[place] = scale;
            quantize_group(from, scale > 0 ? 1.0f / scale : 0, out->values + place * GROUP);
        }
    // The rest of the last block: what is left there could be numbers that take long.
    for (int64_t row = num_rows; row < padded_rows(num_rows); row++)
        for (int64_t g = 0; g < num_groups; g++) out->scales[place_of_group(num_groups, row, g)] = 0;
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

// The largest sum that a pair of fours can make in one place of a group's numbers. Values of rows are
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
} weights_args;

static void quantize_panel(void *argument, int64_t panel) {
    const weights_args *args = argument;
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

// Quantizes W [n][k] into zeroed data, scales and sums of a matrix.
void EXPORTED(quantize_weights)(int64_t n, int64_t k, const float *weights, int8_t *data, float *scales, int16_t *sums) {
    weights_args args = {n, k, weights, data, scales, sums};
    parallel_for((n + PANEL - 1) / PANEL, quantize_panel, &args);
}
