// Shared by the kernels: vector types, the thread pool, and the matrices. Built by build.py.
//
// One rule holds in every file: a row's result depends on that row alone, not on the number of
// rows, threads, or tokens in a chunk. So a token has the same bits alone, in a batch, in a prompt
// and on another worker after a failure.
#ifndef KVRELAY_KERNELS_H
#define KVRELAY_KERNELS_H

#include <stdint.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define HAVE_AVX2 1
#else
#define HAVE_AVX2 0
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x8_unaligned __attribute__((vector_size(32), aligned(4)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

ALWAYS_INLINE f32x8 load8(const float *p) { return *(const f32x8_unaligned *)p; }
ALWAYS_INLINE void store8(float *p, f32x8 v) { *(f32x8_unaligned *)p = v; }
ALWAYS_INLINE f32x8 splat8(float v) { return (f32x8){v, v, v, v, v, v, v, v}; }

// a * b + c in one rounding where the machine has it; the same instruction in every kernel.
ALWAYS_INLINE f32x8 fma8(f32x8 a, f32x8 b, f32x8 c) {
#if HAVE_AVX2
    return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

ALWAYS_INLINE f32x8 max8(f32x8 a, f32x8 b) {
#if HAVE_AVX2
    return (f32x8)_mm256_max_ps((__m256)a, (__m256)b);
#else
    i32x8 m = a > b;
    return (f32x8)((m & (i32x8)a) | (~m & (i32x8)b));
#endif
}

ALWAYS_INLINE f32x8 swap_lanes(f32x8 v, const int distance) {
#if HAVE_AVX2
    if (distance == 4) return (f32x8)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
    return (f32x8)(distance == 2 ? _mm256_permute_ps((__m256)v, 0x4e) : _mm256_permute_ps((__m256)v, 0xb1));
#else
    f32x8 swapped;
    for (int i = 0; i < 8; i++) swapped[i] = v[i ^ distance];
    return swapped;
#endif
}

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

// 1.5 * 2^23: adding it rounds a float to an integer, the difference of the two bit patterns.
#define ROUNDING 12582912.0f

ALWAYS_INLINE f32x8 exp8_inline(f32x8 x) {
    // exp(x) = 2^n * exp(r), |r| <= ln2 / 2, by a polynomial; 0 below the smallest normal number.
    const f32x8 lowest = splat8(-87.0f), highest = splat8(88.0f);
    i32x8 underflow = x < lowest;
    x = max8(x, lowest);
    x = -max8(-x, -highest);
    f32x8 shifted = fma8(x, splat8(1.44269504089f), splat8(ROUNDING));
    f32x8 n = shifted - splat8(ROUNDING);
    f32x8 r = fma8(n, splat8(-0.693359375f), x);
    r = fma8(n, splat8(2.12194440e-4f), r);
    f32x8 p = splat8(1.9875691500e-4f);
    p = fma8(p, r, splat8(1.3981999507e-3f));
    p = fma8(p, r, splat8(8.3334519073e-3f));
    p = fma8(p, r, splat8(4.1665795894e-2f));
    p = fma8(p, r, splat8(1.6666665459e-1f));
    p = fma8(p, r, splat8(5.0000001201e-1f));
    p = fma8(p, r * r, r + splat8(1.0f));
    i32x8 exponent = ((i32x8)shifted - (i32x8)splat8(ROUNDING)) << 23;
    i32x8 bits = (i32x8)p + exponent;
    return (f32x8)(bits & ~underflow);
}

// ---------------------------------------------------------------- threads

// A task of a parallel loop.
typedef void (*task_function)(void *argument, int64_t task);

// Runs tasks 0 .. num_tasks - 1 < MAX_TASKS on the calling thread and on free threads of the pool.
// Returns when all are done.
enum { MAX_TASKS = 65536 };
void parallel_for(int64_t num_tasks, task_function function, void *argument);

// Threads that currently work on loops, the caller's included.
int64_t num_threads(void);

// ---------------------------------------------------------------- matrices

enum { PANEL = 16 };    // output columns that are stored and computed together
enum { MAX_ROWS = 6 };  // rows computed together: 6 x 16 sums fill 12 of 16 vector registers
enum { GROUP = 64 };    // int8: inputs that share a scale

enum { MATRIX_F32 = 0, MATRIX_INT8 = 1 };

// W of y = x W^T + bias, [n, k], packed.
//   f32:   data = float [n / PANEL][k][PANEL]
//   int8:  data = int8_t [n / PANEL][k / 4][PANEL][4], chosen by quantize_weights
//          scales = float, sums (of each group) = int16_t, both [n / PANEL][k / GROUP][PANEL]
// n is padded with zero rows to a multiple of PANEL; k must be a multiple of GROUP for int8.
typedef struct {
    int64_t n, k, kind;
    const void *data;
    const float *scales;
    const int16_t *sums;
    const float *bias;  // [n] or NULL
} matrix;

// Rows of numbers x ~ scale * (value - 128), 1 <= value <= 255, with a scale for each GROUP of
// them.
typedef struct {
    uint8_t *values;  // [num_rows][k]
    float *scales;    // [num_rows][k / GROUP]
} quantized_rows;

// Memory to bring into the cache: `step` bytes for each step of a loop.
typedef struct {
    const char *begin;
    int64_t step;
} fetch;

// c[rows][16] (+)= a[rows][k] * b[k][16] for 1 to 6 rows; the core of products and attention.
void tile_rows_f32(
    int64_t rows, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t k, int add, fetch ahead);

// The destination of a product.
enum { OUTPUT_STORE = 0, OUTPUT_ADD = 1, OUTPUT_GATED = 2 };

// out = x W^T (+ bias), or out += x W^T, or out = silu(gate) * up with alternating panels in W.
//   x: [num_rows][k]; q: the same rows, quantized for int8
//   out: [num_rows][ldo], ldo >= n (GATED: n / 2)
//   following: the next product, whose first weights are prefetched; or NULL
void multiply(
    const matrix *w, int64_t num_rows, const float *x, const quantized_rows *q, float *out, int64_t ldo, int mode,
    const matrix *following);

// int8, 1 to 6 rows: c[rows][16] (+)= x * the panel's columns; x begins with the first row.
void tile_rows_int8(
    int64_t rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead);

void quantize_rows(int64_t num_rows, int64_t k, const float *x, quantized_rows *out);

// Quantizes W [n][k] into zeroed data, scales and sums of a matrix.
void quantize_weights(int64_t n, int64_t k, const float *weights, int8_t *data, float *scales, int16_t *sums);

#endif
