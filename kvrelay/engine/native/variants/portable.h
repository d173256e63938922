// Any processor: vectors of the compiler, which turns them into what the base instructions have.
#define HAVE_AVX2 0

typedef double f64x4 __attribute__((vector_size(32)));
typedef int64_t i64x4 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

// a * b + c in one rounding, without the instruction. The product of two floats is exact in double;
// the sum there is rounded to odd, so that the rounding to float is the only one that counts.
ALWAYS_INLINE f64x4 fma_to_odd(f32x4 a, f32x4 b, f32x4 c) {
    const f64x4 zero = {0};
    f64x4 product = __builtin_convertvector(a, f64x4) * __builtin_convertvector(b, f64x4);
    f64x4 other = __builtin_convertvector(c, f64x4), sum = product + other, part = sum - product;
    f64x4 error = (product - (sum - part)) + (other - part);  // exactly what the sum lacks
    i64x4 bits = (i64x4)sum, inexact = (error < zero) | (error > zero), is_odd = bits & 1;
    i64x4 toward_zero = (bits ^ (i64x4)error) < 0;
    bits += inexact & (is_odd - 1) & (toward_zero | 1);  // the odd neighbour on the error's side
    return (f64x4)bits;
}

typedef union {
    f32x8 whole;
    f32x4 halves[2];
} f32x8_halves;

#if defined(__FP_FAST_FMAF)
ALWAYS_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

ALWAYS_INLINE f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
    f32x8 sum;
    for (int i = 0; i < 8; i++) sum[i] = fma1(a[i], b[i], c[i]);
    return sum;
}
#else
// Not inlined: it is long, and the kernels have hundreds of them.
static __attribute__((noinline)) f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
    f32x8_halves x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++)
        z.halves[i] = __builtin_convertvector(fma_to_odd(x.halves[i], y.halves[i], z.halves[i]), f32x4);
    return z.whole;
}

ALWAYS_INLINE float fma1(float a, float b, float c) { return fma8(splat8(a), splat8(b), splat8(c))[0]; }
#endif

// Numbers below the smallest normal one become 0, also where the processor would keep them.
typedef int flush_state;

ALWAYS_INLINE flush_state begin_flushing(void) { return 0; }
ALWAYS_INLINE int end_flushing(flush_state before) {
    (void)before;
    return 0;
}

ALWAYS_INLINE f32x8 flushed_input(f32x8 v) {
    i32x8 bits = (i32x8)v, is_normal = (bits & 0x7f800000) != 0;
    return (f32x8)(bits & (is_normal | INT32_MIN));
}

#define add_flushing(a, b) flushed_input((a) + (b))

// A result counts as small if its 24 bits are below the smallest normal number.
static __attribute__((noinline)) f32x8 fma_flushing(f32x8 a, f32x8 b, f32x8 c) {
    const double limit = 0x1.ffffffp-127;
    const f64x4 smallest = {limit, limit, limit, limit};
    f32x8_halves x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) {
        i64x4 bits = (i64x4)fma_to_odd(x.halves[i], y.halves[i], z.halves[i]);
        i64x4 is_small = (f64x4)(bits & INT64_MAX) < smallest;
        z.halves[i] = __builtin_convertvector((f64x4)(bits & (~is_small | INT64_MIN)), f32x4);
    }
    return z.whole;
}

ALWAYS_INLINE f32x8 max8(f32x8 a, f32x8 b) {
    i32x8 m = a > b;
    return (f32x8)((m & (i32x8)a) | (~m & (i32x8)b));
}

ALWAYS_INLINE f32x8 swap_lanes(f32x8 v, const int distance) {
    f32x8 swapped;
    for (int i = 0; i < 8; i++) swapped[i] = v[i ^ distance];
    return swapped;
}

ALWAYS_INLINE f32x8 widen_int8(const void *from) {
    const int8_t *integers = from;
    f32x8 v;
    for (int i = 0; i < 8; i++) v[i] = integers[i];
    return v;
}

ALWAYS_INLINE f32x8 widen_bf16(const void *from) {
    const uint16_t *halves = from;
    i32x8 bits;
    for (int i = 0; i < 8; i++) bits[i] = (int32_t)((uint32_t)halves[i] << 16);
    return (f32x8)bits;
}

// Transposes 8 x 8.
ALWAYS_INLINE void transpose8(f32x8 r[8]) {
    f32x8 columns[8] = {0};
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) columns[j][i] = r[i][j];
    for (int i = 0; i < 8; i++) r[i] = columns[i];
}

#include "wide8.h"

#define widen_int8_wide widen_int8
#define widen_bf16_wide widen_bf16

static void tile_rows_int8(
    int64_t rows, int64_t panels, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add,
    fetch ahead) {
    int64_t num_groups = w->k / GROUP;
    (void)ahead;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < panels; p++)
            for (int64_t g = 0; g < num_groups; g++) {
                const int8_t *weights = (const int8_t *)w->data + ((panel + p) * w->k + g * GROUP) * PANEL;
                const uint8_t *values = x->values + r * w->k + g * GROUP;
                int64_t column = ((panel + p) * num_groups + g) * PANEL;
                float *sums = c + r * ldc + p * PANEL, s = x->scales[r * num_groups + g];
                int32_t exact[PANEL];
                for (int n = 0; n < PANEL; n++) exact[n] = -128 * w->sums[column + n];
                for (int i = 0; i < GROUP; i++)
                    for (int n = 0; n < PANEL; n++) exact[n] += values[i] * weights[i / 4 * 4 * PANEL + 4 * n + i % 4];
                for (int n = 0; n < PANEL; n += 8) {
                    f32x8 integers;
                    for (int i = 0; i < 8; i++) integers[i] = (float)exact[n + i];
                    f32x8 sum = g > 0 || add ? load8(sums + n) : splat8(0);
                    store8(sums + n, fma8(integers, load8(w->scales + column + n) * splat8(s), sum));
                }
            }
}

ALWAYS_INLINE void quantize_group(const float *x, float inverse, uint8_t *out) {
    for (int i = 0; i < GROUP; i++) {
        float shifted = x[i] * inverse + ROUNDING;  // its last bits are the integer
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        out[i] = (uint8_t)(bits + 128);  // the constant's own last byte is 0
    }
}
