// Shared by the kernels: vector types, the thread pool, and the matrices.
//
// variant.c compiles the kernels once for each variant, with the vectors of VARIANT_HEADER.
//
// One rule holds in every file: a row's result depends on that row alone, not on the number of
// rows, threads, or tokens in a chunk. So a token has the same bits alone, in a batch, in a prompt
// and on another worker after a failure. Variants give the same bits too: each sum has one order,
// and a multiply-add is fused where the code says fma and nowhere else.
#ifndef KVRELAY_KERNELS_H
#define KVRELAY_KERNELS_H

#include "threads.h"

#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

// A function that library.py calls, with the variant's name behind its own.
#define JOIN_NAMES(name, variant) name##_##variant
#define JOIN_EXPANDED(name, variant) JOIN_NAMES(name, variant)
#define EXPORTED(name) JOIN_EXPANDED(name, VARIANT)

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x8_unaligned __attribute__((vector_size(32), aligned(4)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

ALWAYS_INLINE f32x8 load8(const float *p) { return *(const f32x8_unaligned *)p; }
ALWAYS_INLINE void store8(float *p, f32x8 v) { *(f32x8_unaligned *)p = v; }
ALWAYS_INLINE f32x8 splat8(float v) { return (f32x8){v, v, v, v, v, v, v, v}; }

// ---------------------------------------------------------------- matrices

enum { PANEL = 16 };  // output columns that are stored together
enum { GROUP = 64 };  // int8: inputs that share a scale

enum { ROWS_PER_TASK = 16 };  // of operations on rows

enum { BF16_STEP = 32 };   // inputs that an instruction of AMX sums
enum { BF16_ROWS = 32, BF16_WIDTH = 2 * PANEL };  // of a tile: parts of rows, and columns

// bf16: rows in two parts that together have 16 bits, or in the first one alone.
enum { MATRIX_F32 = 0, MATRIX_INT8 = 1, MATRIX_BF16 = 2, MATRIX_BF16_PLAIN = 3 };

// W of y = x W^T + bias, [n, k], packed.
//   f32:   data = float [n / PANEL][k][PANEL]
//   int8:  data = int8_t [n / PANEL][k / 4][PANEL][4], chosen by quantize_weights
//          scales = float, sums (of each group) = int16_t, both [n / PANEL][k / GROUP][PANEL]
//   bf16:  data = uint16_t [n / PANEL][k / 2][PANEL][2]: BF16_STEP inputs of a panel are a tile of AMX
// n is padded with zero rows to a multiple of PANEL; k must be a multiple of GROUP for int8, and of
// BF16_STEP for bf16.
typedef struct {
    int64_t n, k, kind;
    const void *data;
    const float *scales;
    const int16_t *sums;
    const float *bias;  // [n] or NULL
} matrix;

ALWAYS_INLINE int is_bf16(const matrix *w) { return w->kind == MATRIX_BF16 || w->kind == MATRIX_BF16_PLAIN; }

// Rows of numbers x ~ scale * (value - 128), 1 <= value <= 255, with a scale for each GROUP of
// them. If ROW_BLOCK is not 1, rows lie in blocks, and are filled up to whole ones. For bf16 the
// values are bf16_part in the same blocks, with BF16_STEP in place of GROUP, and there are no scales.
typedef struct {
    uint8_t *values;  // [num_rows][k], or [num_rows / ROW_BLOCK][k / GROUP][ROW_BLOCK][GROUP]
    float *scales;    // [num_rows][k / GROUP], or [num_rows / ROW_BLOCK][k / GROUP][ROW_BLOCK]
} quantized_rows;

// Parts of rows for products with bf16. Of 16 parts, part r has its inputs [i, i + BF16_STEP) at
// parts + r * row + i / BF16_STEP * step. The next 16 are 16 * k further on.
typedef struct {
    const void *parts;  // bf16_part
    int64_t row, step;
} bf16_rows;

// Memory to bring into the cache: `step` bytes of each panel for each step of a loop.
typedef struct {
    const char *begin;
    int64_t step, panel_bytes;
} fetch;

// b[k][16] for each of some panels: a row is `row` numbers after the last, a panel `panel`.
typedef struct {
    const float *data;
    int64_t row, panel;
} column_panels;

// 1.5 * 2^23: adding it rounds a float to an integer, the difference of the two bit patterns.
#define ROUNDING 12582912.0f

// ---------------------------------------------------------------- the variant
//
// Besides functions on 8 floats (fma8, max8, swap_lanes) a variant has vectors of WIDE floats, and:
//   transpose_f32, transpose_bf16   8 numbers at each of WIDE addresses as 8 vectors of WIDE
//   MAX_ROWS, MAX_PANELS       of a tile of f32: as many sums as fit the registers
//   ROWS_PER_BLOCK             of a product's task; a multiple of MAX_ROWS
//   MAX_ROWS_INT8, ROWS_PER_BLOCK_INT8, ROW_BLOCK   the same for int8, and how its rows lie
//   TASK_WORK, TASK_WORK_INT8, TASK_WORK_BF16   multiply-adds of a task
//   tile_rows_int8             c[rows][16 * panels] (+)= x * columns; 1 to MAX_ROWS_INT8 rows,
//                              1 or 2 panels; x begins with the first row
//   quantize_group             values of GROUP numbers: x * inverse + 128, rounded
// With tiles (HAVE_AMX) it has begin_tiles and end_tiles, bf16_part, store_parts and tile_rows_bf16,
// else what matrices_bf16.c makes them of: MAX_PARTS, PARTS_PANELS, and sums that flush. Where a sum
// could have been taken for 0 wrongly, end_flushing says so, and sum_tile_exactly computes a tile again.
#include VARIANT_HEADER

#ifndef HAVE_AMX
typedef float bf16_part;

ALWAYS_INLINE int64_t tile_height_of(const matrix *w, int64_t num_rows) {
    (void)w, (void)num_rows;
    return 0;
}
ALWAYS_INLINE void begin_tiles(int64_t height) { (void)height; }
ALWAYS_INLINE void end_tiles(int64_t height) { (void)height; }
#endif

ALWAYS_INLINE f32x8 abs8(f32x8 v) { return (f32x8)((i32x8)v & INT32_MAX); }

// The largest absolute value of GROUP numbers.
ALWAYS_INLINE f32x8 largest_of_group(const float *x) {
    f32x8 largest = splat8(0);
#pragma GCC unroll 8
    for (int i = 0; i < GROUP; i += 8) largest = max8(largest, abs8(load8(x + i)));
    return largest;
}

// Rows for which quantized_rows has room.
ALWAYS_INLINE int64_t padded_rows(int64_t num_rows) { return (num_rows + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK; }

ALWAYS_INLINE float sum_lanes(f32x8 v) {
    v += swap_lanes(v, 4);
    v += swap_lanes(v, 2);
    return v[0] + v[1];
}

ALWAYS_INLINE float max_lanes(f32x8 v) {
    v = max8(v, swap_lanes(v, 4));
    v = max8(v, swap_lanes(v, 2));
    return v[0] > v[1] ? v[0] : v[1];
}

// exp(x) for x <= 88.
ALWAYS_INLINE f32w exp_bounded_wide(f32w x) {
    // exp(x) = 2^n * exp(r), |r| <= ln2 / 2, by a polynomial; 0 below the smallest normal number.
    const f32w lowest = splat_wide(-87.0f);
    i32w underflow = x < lowest;
    x = max_wide(x, lowest);
    f32w shifted = fma_wide(x, splat_wide(1.44269504089f), splat_wide(ROUNDING));
    f32w n = shifted - splat_wide(ROUNDING);
    f32w r = fma_wide(n, splat_wide(-0.693359375f), x);
    r = fma_wide(n, splat_wide(2.12194440e-4f), r);
    f32w p = splat_wide(1.9875691500e-4f);
    p = fma_wide(p, r, splat_wide(1.3981999507e-3f));
    p = fma_wide(p, r, splat_wide(8.3334519073e-3f));
    p = fma_wide(p, r, splat_wide(4.1665795894e-2f));
    p = fma_wide(p, r, splat_wide(1.6666665459e-1f));
    p = fma_wide(p, r, splat_wide(5.0000001201e-1f));
    p = fma_wide(p, r * r, r + splat_wide(1.0f));
    i32w bits = (i32w)p + ((i32w)shifted << 23);  // of ROUNDING itself nothing is left
    return (f32w)(bits & ~underflow);
}

ALWAYS_INLINE f32w exp_wide(f32w x) { return exp_bounded_wide(-max_wide(-x, splat_wide(-88.0f))); }

ALWAYS_INLINE f32w silu_wide(f32w x) { return x / (splat_wide(1.0f) + exp_wide(-x)); }

// GELU by tanh: x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
ALWAYS_INLINE f32w gelu_wide(f32w x) {
    f32w cubic = fma_wide(x * x, splat_wide(0.044715f) * x, x);
    return x / (splat_wide(1.0f) + exp_wide(splat_wide(-1.59576912f) * cubic));
}

// x sigmoid(1.702 x) (y + 1), with x at most 7 and y within 7 of 0, as gpt-oss has it.
ALWAYS_INLINE f32w clamped_gated_wide(f32w x, f32w y) {
    const f32w limit = splat_wide(7.0f);
    x = -max_wide(-x, -limit);
    y = max_wide(-max_wide(-y, -limit), -limit);
    return x / (splat_wide(1.0f) + exp_wide(splat_wide(-1.702f) * x)) * (y + splat_wide(1.0f));
}

// ---------------------------------------------------------------- products

// c[rows][16 * panels] (+)= a[rows][k] * b for 1 to MAX_ROWS rows and 1 to MAX_PANELS panels; the
// core of products and attention.
static void tile_rows_f32(
    int64_t rows, int64_t panels, const float *a, int64_t lda, column_panels b, float *c, int64_t ldc, int64_t k, int add,
    fetch ahead);

// What becomes of a product: stored, added to `out`, or activated. With a gate it is activated and
// multiplied, and W has panels of gates and of their factors in turns.
enum { OUTPUT_STORE = 0, OUTPUT_ADD = 1, OUTPUT_SILU_GATED = 2, OUTPUT_GELU_GATED = 3, OUTPUT_GELU = 4, OUTPUT_CLAMPED_GATED = 5 };

// out = x W^T + bias, or out += that, or what the mode makes of it.
//   x: [num_rows][k]; q: the same rows, quantized for int8
//   out: [num_rows][ldo], ldo >= n, with a gate n / 2
//   following: the next product, whose first weights are prefetched; or NULL
static void multiply(
    const matrix *w, int64_t num_rows, const float *x, const quantized_rows *q, float *out, int64_t ldo, int mode,
    const matrix *following);

static void quantize_rows(int64_t num_rows, int64_t k, const float *x, quantized_rows *out);

// Parts of a row for products with W.
ALWAYS_INLINE int64_t parts_of(const matrix *w) { return w->kind == MATRIX_BF16 ? 2 : 1; }

// c[num_parts][BF16_WIDTH] = x * columns, for 1 to BF16_ROWS parts, and 1 or 2 panels. Up to
// BF16_ROWS parts are read.
static void tile_rows_bf16(
    int64_t num_parts, int64_t panels, const bf16_rows *x, const matrix *w, int64_t panel, float *c, fetch ahead);

// Row `row` of W.
static void unpack_row_bf16(const matrix *w, int64_t row, float *out);

static void take_rows_apart(const matrix *w, int64_t num_rows, const float *x, void *out);

// How many bytes a product's rows have beside their floats: 0 if it takes these.
static int64_t prepared_bytes(const matrix *w, int64_t num_rows);

// Quantizes rows [begin, end) of x, or takes them apart, if the product wants that. begin is a
// multiple of ROWS_PER_TASK.
static void prepare_rows(const matrix *w, int64_t begin, int64_t end, const float *x, const quantized_rows *out);

#endif
