// bf16: takes rows apart, and has the products of variants without tiles for them.
//
// All variants sum as TDPBF16PS does. Of 32 inputs the even and the odd ones are summed apart from
// 0, each product in one rounding; the two sums are added, and then added to the result. Numbers
// below the smallest normal one count as 0, before and after each operation.
#include "kernels.h"

#include <float.h>

// ---------------------------------------------------------------- rows

// The nearest numbers of 16 bits. Finite ones stay finite.
ALWAYS_INLINE i32w round_to_bf16(f32w x) {
    const i32w largest = (i32w)splat_wide(0) + 0x7f7f8000, infinite = (i32w)splat_wide(0) + 0x7f800000;
    i32w bits = (i32w)x, magnitude = bits & 0x7fffffff, upper = ~0xffff & bits;
    i32w rounded = (bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff;
    i32w is_large = magnitude >= largest, is_nan = magnitude > infinite;
    return (is_large & (upper | (is_nan & 0x400000))) | (~is_large & rounded);
}

// What the first part lacks; nothing if it is not finite.
ALWAYS_INLINE i32w second_part(f32w x, i32w first) {
    const i32w infinite = (i32w)splat_wide(0) + 0x7f800000;
    i32w is_finite = ((i32w)x & 0x7fffffff) < infinite;
    return round_to_bf16(x - (f32w)first) & is_finite;
}

#ifndef HAVE_AMX
// Their upper halves, as neighbours.
ALWAYS_INLINE void store_parts(bf16_part *to, i32w first, i32w second) {
    store_wide(to, flushed_input((f32w)first));
    store_wide(to + WIDE, flushed_input((f32w)second));
}
#endif

// Where a product's rows have inputs [i, i + 2 * WIDE) of a part.
ALWAYS_INLINE bf16_part *place_of_part(bf16_part *parts, int64_t k, int64_t part, int64_t i) {
    if (ROW_BLOCK == 1) return parts + part * k + i;
    return parts + part / ROW_BLOCK * ROW_BLOCK * k + (i / BF16_STEP * ROW_BLOCK + part % ROW_BLOCK) * BF16_STEP + i % BF16_STEP;
}

// 2 * WIDE numbers into one part, or two.
ALWAYS_INLINE void take_apart(const float *x, int64_t num_parts, bf16_part *first_part, bf16_part *next_part) {
    f32w x0 = load_wide(x), x1 = load_wide(x + WIDE);
    i32w first0 = round_to_bf16(x0), first1 = round_to_bf16(x1);
    store_parts(first_part, first0, first1);
    if (num_parts == 2) store_parts(next_part, second_part(x0, first0), second_part(x1, first1));
}

static void take_rows_apart(const matrix *w, int64_t num_rows, const float *x, void *out) {
    const int64_t k = w->k, num_parts = parts_of(w);
    for (int64_t part = 0; part < num_rows * num_parts; part += num_parts, x += k)
        for (int64_t i = 0; i < k; i += 2 * WIDE)
            take_apart(x + i, num_parts, place_of_part(out, k, part, i), place_of_part(out, k, part + 1, i));
}

static void unpack_row_bf16(const matrix *w, int64_t row, float *out) {
    const uint16_t *pairs = (const uint16_t *)w->data + (row / PANEL * w->k * PANEL + row % PANEL * 2);
    for (int64_t i = 0; i < w->k; i++) {
        uint32_t bits = (uint32_t)pairs[i / 2 * 2 * PANEL + i % 2] << 16;
        memcpy(out + i, &bits, sizeof(float));
    }
}

// ---------------------------------------------------------------- products

#ifndef HAVE_AMX
enum { PARTS_VECTORS = PARTS_PANELS * PANEL / WIDE };

// c[rows][...] += the products of BF16_STEP inputs; rows and panels are constants after inlining.
ALWAYS_INLINE void multiply_step_bf16(
    const int rows, const int panels, const bf16_part *a, int64_t k, const uint16_t *b, float *c, fetch ahead) {
    const int vectors = panels * PANEL / WIDE, vectors_of_panel = PANEL / WIDE;
    f32w even[MAX_PARTS][PARTS_VECTORS], odd[MAX_PARTS][PARTS_VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) even[r][v] = odd[r][v] = splat_wide(0);
    for (int64_t i = 0; i < BF16_STEP; i += 2, b += 2 * PANEL, ahead.begin += ahead.step) {
        f32w even_weights[PARTS_VECTORS], odd_weights[PARTS_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            i32w pairs = (i32w)load_wide((const float *)(b + v / vectors_of_panel * k * PANEL) + v % vectors_of_panel * WIDE);
            even_weights[v] = flushed_input((f32w)(pairs << 16));
            odd_weights[v] = flushed_input((f32w)(pairs & ~0xffff));
        }
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) __builtin_prefetch(ahead.begin + p * ahead.panel_bytes);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32w x = splat_wide(a[r * k + i]), y = splat_wide(a[r * k + i + 1]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                even[r][v] = fma_flushing(x, even_weights[v], even[r][v]);
                odd[r][v] = fma_flushing(y, odd_weights[v], odd[r][v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *to = c + r * BF16_WIDTH + v * WIDE;
            store_wide(to, add_flushing(load_wide(to), add_flushing(even[r][v], odd[r][v])));
        }
}

#define STEP_OF_ROWS(rows) \
    case rows: \
        if (panels < PARTS_PANELS) \
            multiply_step_bf16(rows, 1, a, k, b, c, ahead); \
        else \
            multiply_step_bf16(rows, PARTS_PANELS, a, k, b, c, ahead); \
        break

static void multiply_rows_bf16(
    int64_t rows, int64_t panels, const bf16_part *a, int64_t k, const uint16_t *b, float *c, fetch ahead) {
    switch (rows) {
        STEP_OF_ROWS(1);
        STEP_OF_ROWS(2);
#if MAX_PARTS == 6
        STEP_OF_ROWS(3);
        STEP_OF_ROWS(4);
        STEP_OF_ROWS(5);
        STEP_OF_ROWS(6);
#endif
    }
}

#undef STEP_OF_ROWS

// Not inlined: what it computes must stay within the region that flushes.
static __attribute__((noinline)) void sum_tile_bf16(
    int64_t num_parts, int64_t panels, const bf16_rows *x, int64_t k, const uint16_t *b, float *c, fetch ahead) {
    for (int64_t p = 0; p < panels; p += PARTS_PANELS, ahead.begin += PARTS_PANELS * ahead.panel_bytes) {
        const uint16_t *weights = b + p * k * PANEL;
        fetch part = ahead;
        for (int64_t i = 0; i < k; i += BF16_STEP, weights += BF16_STEP * PANEL, part.begin += BF16_STEP / 2 * ahead.step) {
            fetch rows_ahead = part;
            for (int64_t r = 0; r < num_parts; r += MAX_PARTS) {
                int64_t rows = num_parts - r < MAX_PARTS ? num_parts - r : MAX_PARTS;
                multiply_rows_bf16(rows, panels - p, (const bf16_part *)x->parts + r * k + i, k, weights, c + r * BF16_WIDTH + p * PANEL, rows_ahead);
                rows_ahead.step = 0;  // only the first rows fetch
            }
        }
    }
}

static float normal_or_zero(float x) { return __builtin_fabsf(x) < FLT_MIN ? __builtin_copysignf(0, x) : x; }

// sums[PANEL] += x * weights[PANEL]. A sum is 0 if its 24 bits are below the smallest normal number; in
// double that is decided exactly, because x and the weights have eight bits each.
static void add_or_zero(float x, const uint16_t *pairs, int is_odd, float *sums) {
    x = normal_or_zero(x);
    for (int n = 0; n < PANEL; n++) {
        uint32_t bits;
        float weight;
        memcpy(&bits, pairs + 2 * n, sizeof bits);
        bits = is_odd ? bits & 0xffff0000 : bits << 16;
        memcpy(&weight, &bits, sizeof weight);
        weight = normal_or_zero(weight);
        double sum = (double)x * weight + sums[n];
        float fused = fma1(x, weight, sums[n]);
        sums[n] = __builtin_fabs(sum) < 0x1.ffffffp-127 ? __builtin_copysignf(0, fused) : fused;
    }
}

// The same sums one by one, for variants that do not decide it in this way.
static __attribute__((noinline)) void sum_tile_exactly(
    int64_t num_parts, int64_t panels, const bf16_part *x, int64_t k, const uint16_t *b, float *c) {
    for (int64_t p = 0; p < panels; p++, b += k * PANEL)
        for (int64_t r = 0; r < num_parts; r++) {
            float *to = c + r * BF16_WIDTH + p * PANEL;
            memset(to, 0, PANEL * sizeof(float));
            for (int64_t i = 0; i < k; i += BF16_STEP) {
                float even[PANEL] = {0}, odd[PANEL] = {0};
                for (int64_t j = i; j < i + BF16_STEP; j += 2) {
                    add_or_zero(x[r * k + j], b + j * PANEL, 0, even);
                    add_or_zero(x[r * k + j + 1], b + j * PANEL, 1, odd);
                }
                for (int n = 0; n < PANEL; n++) to[n] = normal_or_zero(to[n] + normal_or_zero(even[n] + odd[n]));
            }
        }
}

static void tile_rows_bf16(
    int64_t num_parts, int64_t panels, const bf16_rows *x, const matrix *w, int64_t panel, float *c, fetch ahead) {
    flush_state before = begin_flushing();
    memset(c, 0, num_parts * BF16_WIDTH * sizeof(float));
    const uint16_t *weights = (const uint16_t *)w->data + panel * w->k * PANEL;
    sum_tile_bf16(num_parts, panels, x, w->k, weights, c, ahead);
    if (end_flushing(before)) sum_tile_exactly(num_parts, panels, x->parts, w->k, weights, c);
}
#endif
