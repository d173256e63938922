// NEON: four floats, or bytes of four columns, in one of 32 registers. Bytes are multiplied in fours
// with the instructions of `dotprod`, and two rows at a time in eights with those of `i8mm`.
//
// Values are stored less 128, so that their products need no zero point.
#include <arm_neon.h>

#define HAVE_AVX2 0
#define HAVE_NEON 1
#define WIDE 4

#define MAX_ROWS 6  // times 16 columns: 24 registers of sums
#define MAX_PANELS 1
#define ROWS_PER_BLOCK 264
#define TASK_WORK 1000000

#define MAX_ROWS_INT8 6
#define ROWS_PER_BLOCK_INT8 264
#define ROW_BLOCK 1
#define TASK_WORK_INT8 4000000

#define MAX_PARTS 2  // times 16 columns of even and of odd inputs
#define PARTS_PANELS 1
#define TASK_WORK_BF16 500000

typedef float f32w __attribute__((vector_size(16)));
typedef int32_t i32w __attribute__((vector_size(16)));

ALWAYS_INLINE f32w load_wide(const float *p) { return (f32w)vld1q_f32(p); }
ALWAYS_INLINE void store_wide(float *p, f32w v) { vst1q_f32(p, (float32x4_t)v); }
ALWAYS_INLINE f32w splat_wide(float v) { return (f32w)vdupq_n_f32(v); }
ALWAYS_INLINE f32w fma_wide(f32w a, f32w b, f32w c) { return (f32w)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }

// As on other processors: of numbers that have no order, the second.
ALWAYS_INLINE f32w max_wide(f32w a, f32w b) {
    return (f32w)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}

ALWAYS_INLINE float max_lanes_wide(f32w v) { return vmaxvq_f32((float32x4_t)v); }

ALWAYS_INLINE f32w widen_int8_wide(const void *from) {
    uint32_t four;
    memcpy(&four, from, sizeof four);
    return (f32w)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
}

ALWAYS_INLINE f32w widen_bf16_wide(const void *from) { return (f32w)vshll_n_u16(vld1_u16(from), 16); }

// ---------------------------------------------------------------- eight floats

typedef union {
    f32x8 whole;
    f32w halves[2];
} f32x8_halves;

ALWAYS_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

ALWAYS_INLINE f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
    f32x8_halves x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 2; i++) z.halves[i] = fma_wide(x.halves[i], y.halves[i], z.halves[i]);
    return z.whole;
}

ALWAYS_INLINE f32x8 max8(f32x8 a, f32x8 b) {
    f32x8_halves x = {a}, y = {b};
    for (int i = 0; i < 2; i++) x.halves[i] = max_wide(x.halves[i], y.halves[i]);
    return x.whole;
}

ALWAYS_INLINE f32x8 widen_bf16(const void *from) {
    f32x8_halves x = {.halves = {widen_bf16_wide(from), widen_bf16_wide((const uint16_t *)from + 4)}};
    return x.whole;
}

ALWAYS_INLINE f32w swap_lanes_of_half(f32w v, const int distance) {
    return distance == 2 ? (f32w)vextq_f32((float32x4_t)v, (float32x4_t)v, 2) : (f32w)vrev64q_f32((float32x4_t)v);
}

ALWAYS_INLINE f32x8 swap_lanes(f32x8 v, const int distance) {
    f32x8_halves x = {v}, swapped;
    for (int i = 0; i < 2; i++)
        swapped.halves[i] = distance == 4 ? x.halves[1 - i] : swap_lanes_of_half(x.halves[i], distance);
    return swapped.whole;
}

// Adds to eight sums, in the order of the numbers.
ALWAYS_INLINE f32x8 add_to_eight(f32x8 sums, const f32w *v) {
    f32x8_halves x = {sums};
    for (int i = 0; i < 2; i++) x.halves[i] += v[i];
    return x.whole;
}

// ---------------------------------------------------------------- keys

ALWAYS_INLINE f32w join_pairs(float32x4_t a, float32x4_t b, const int upper) {
    float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
    return (f32w)vreinterpretq_f32_f64(upper ? vtrn2q_f64(x, y) : vtrn1q_f64(x, y));
}

ALWAYS_INLINE void transpose4(const f32w rows[4], f32w to[4]) {
    float32x4_t even[2], odd[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        even[i] = vtrn1q_f32((float32x4_t)rows[2 * i], (float32x4_t)rows[2 * i + 1]);
        odd[i] = vtrn2q_f32((float32x4_t)rows[2 * i], (float32x4_t)rows[2 * i + 1]);
    }
    to[0] = join_pairs(even[0], even[1], 0);
    to[1] = join_pairs(odd[0], odd[1], 0);
    to[2] = join_pairs(even[0], even[1], 1);
    to[3] = join_pairs(odd[0], odd[1], 1);
}

ALWAYS_INLINE void transpose_f32(const void *const *from, f32w to[8]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        f32w rows[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) rows[i] = load_wide((const float *)from[i] + 4 * half);
        transpose4(rows, to + 4 * half);
    }
}

ALWAYS_INLINE void transpose_bf16(const void *const *from, f32w to[8]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        f32w rows[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) rows[i] = widen_bf16_wide((const uint16_t *)from[i] + 4 * half);
        transpose4(rows, to + 4 * half);
    }
}

// ---------------------------------------------------------------- bf16

// Within a region that flushes, numbers below the smallest normal one count as 0. Whether a result
// is so small is decided before it is rounded; on other processors, after that.
typedef uint64_t flush_state;

enum { FLUSH_TO_ZERO = 1 << 24, UNDERFLOWED = 1 << 3 };

ALWAYS_INLINE flush_state begin_flushing(void) {
    uint64_t before, status;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("mrs %0, fpsr" : "=r"(status));
    __asm__ volatile("msr fpsr, %0" : : "r"(status & ~(uint64_t)UNDERFLOWED));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | FLUSH_TO_ZERO) : "memory");
    return before;
}

// Returns whether a result became 0 that might have been rounded up.
ALWAYS_INLINE int end_flushing(flush_state before) {
    uint64_t status;
    __asm__ volatile("mrs %0, fpsr" : "=r"(status) : : "memory");
    __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory");
    return (status & UNDERFLOWED) != 0;
}

#define flushed_input(x) (x)
#define fma_flushing fma_wide
#define add_flushing(a, b) ((a) + (b))

// ---------------------------------------------------------------- int8

ALWAYS_INLINE int8x16_t four_values(const int8_t *values) {
    int32_t four;
    memcpy(&four, values, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// Fetches what lies `ahead` of some inputs.
ALWAYS_INLINE void fetch_inputs(fetch *ahead, const int num_inputs) {
#pragma GCC unroll 2
    for (int i = 0; i < num_inputs; i += 4, ahead->begin += ahead->step) __builtin_prefetch(ahead->begin);
}

#if defined(__ARM_FEATURE_DOTPROD)
// exact[rows] += the products of a group; rows is a constant after inlining.
ALWAYS_INLINE void add_products_in_fours(
    const int rows, const int8_t *values, int64_t row_bytes, const int8_t *weights, int32x4_t exact[][4], fetch *ahead) {
    for (int64_t i = 0; i < GROUP; i += 4, weights += 4 * PANEL) {
        int8x16_t numbers[4];
        fetch_inputs(ahead, 4);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) numbers[v] = vld1q_s8(weights + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            int8x16_t four = four_values(values + r * row_bytes + i);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) exact[r][v] = vdotq_s32(exact[r][v], numbers[v], four);
        }
    }
}
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
// The same, two rows and two columns at a time.
ALWAYS_INLINE void add_products(
    const int rows, const int8_t *values, int64_t row_bytes, const int8_t *weights, int32x4_t exact[][4], fetch *ahead) {
    const int pairs = (rows + 1) / 2;
    int32x4_t squares[MAX_ROWS_INT8 / 2][8];
    if (rows == 1) {
        add_products_in_fours(rows, values, row_bytes, weights, exact, ahead);
        return;
    }
#pragma GCC unroll 3
    for (int p = 0; p < pairs; p++)
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) squares[p][v] = vdupq_n_s32(0);
    for (int64_t i = 0; i < GROUP; i += 8, weights += 8 * PANEL) {
        int8x16_t eights[MAX_ROWS_INT8 / 2];
        fetch_inputs(ahead, 8);
#pragma GCC unroll 3
        for (int p = 0; p < pairs; p++) {
            const int second = 2 * p + 1 < rows ? 2 * p + 1 : 2 * p;
            eights[p] = vcombine_s8(vld1_s8(values + 2 * p * row_bytes + i), vld1_s8(values + second * row_bytes + i));
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            int32x4_t first = vreinterpretq_s32_s8(vld1q_s8(weights + 16 * v));
            int32x4_t second = vreinterpretq_s32_s8(vld1q_s8(weights + 4 * PANEL + 16 * v));
            int8x16_t left = vreinterpretq_s8_s32(vzip1q_s32(first, second)), right = vreinterpretq_s8_s32(vzip2q_s32(first, second));
#pragma GCC unroll 3
            for (int p = 0; p < pairs; p++) {
                squares[p][2 * v] = vmmlaq_s32(squares[p][2 * v], eights[p], left);
                squares[p][2 * v + 1] = vmmlaq_s32(squares[p][2 * v + 1], eights[p], right);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            int64x2_t left = vreinterpretq_s64_s32(squares[r / 2][2 * v]), right = vreinterpretq_s64_s32(squares[r / 2][2 * v + 1]);
            exact[r][v] = vreinterpretq_s32_s64(r % 2 == 0 ? vtrn1q_s64(left, right) : vtrn2q_s64(left, right));
        }
}
#elif defined(__ARM_FEATURE_DOTPROD)
#define add_products add_products_in_fours
#else
// The same in int16, in which two fours and their neighbours fit: weights are chosen so
// (`quantize_group_weights`), and values of either sign are at most 127.
ALWAYS_INLINE void add_products(
    const int rows, const int8_t *values, int64_t row_bytes, const int8_t *weights, int32x4_t exact[][4], fetch *ahead) {
    for (int64_t i = 0; i < GROUP; i += 8, weights += 8 * PANEL) {
        fetch_inputs(ahead, 8);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            int8x16_t first = vld1q_s8(weights + 16 * v), second = vld1q_s8(weights + 4 * PANEL + 16 * v);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int8x16_t x = four_values(values + r * row_bytes + i), y = four_values(values + r * row_bytes + i + 4);
                int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(first), vget_low_s8(x)), vget_low_s8(second), vget_low_s8(y));
                int16x8_t high = vmlal_high_s8(vmull_high_s8(first, x), second, y);
                exact[r][v] = vpadalq_s16(exact[r][v], vpaddq_s16(low, high));
            }
        }
    }
}
#endif

// One panel; rows is a constant after inlining.
ALWAYS_INLINE void tile_int8(
    const int rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    const int64_t num_groups = w->k / GROUP;
    const int8_t *values = (const int8_t *)x->values, *weights = (const int8_t *)w->data + panel * w->k * PANEL;
    f32w sums[MAX_ROWS_INT8][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sums[r][v] = add ? load_wide(c + r * ldc + 4 * v) : splat_wide(0);
    for (int64_t g = 0; g < num_groups; g++) {
        int32x4_t exact[MAX_ROWS_INT8][4];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) exact[r][v] = vdupq_n_s32(0);
        add_products(rows, values + g * GROUP, w->k, weights + g * GROUP * PANEL, exact, &ahead);
        const float *scales = w->scales + (panel * num_groups + g) * PANEL;
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                f32w scale = load_wide(scales + 4 * v) * splat_wide(x->scales[r * num_groups + g]);
                sums[r][v] = fma_wide((f32w)vcvtq_f32_s32(exact[r][v]), scale, sums[r][v]);
            }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) store_wide(c + r * ldc + 4 * v, sums[r][v]);
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

// The last bits of x * inverse + ROUNDING are the integer.
ALWAYS_INLINE int16x8_t round_to_int16(const float *x, float inverse) {
    f32w low = load_wide(x) * splat_wide(inverse) + splat_wide(ROUNDING), high = load_wide(x + 4) * splat_wide(inverse) + splat_wide(ROUNDING);
    return vuzp1q_s16((int16x8_t)low, (int16x8_t)high);
}

ALWAYS_INLINE void quantize_group(const float *x, float inverse, uint8_t *out) {
    for (int i = 0; i < GROUP; i += 16) {
        int16x8_t low = round_to_int16(x + i, inverse), high = round_to_int16(x + i + 8, inverse);
        vst1q_u8(out + i, vuzp1q_u8((uint8x16_t)low, (uint8x16_t)high));
    }
}
