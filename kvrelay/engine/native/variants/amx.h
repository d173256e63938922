// AVX-512 with the tiles of AMX for the products of int8: 16 rows, a group of 64 inputs and 16
// columns in one instruction. The panels' layout is that of a tile already.
//
// Values are stored less 128, so that the tiles' products need no zero point. Their rows lie in
// blocks of a tile: one row after another would often share a set of the first-level cache.
#define HAVE_AMX 1
#define ROW_BLOCK 16
#define MAX_ROWS_INT8 ROW_BLOCK
#define ROWS_PER_BLOCK_INT8 272
#define TASK_WORK_INT8 16000000
#define VALUE_SIGN ((int32_t)0x80808080)  // turns value - 128 into value, and back

#include "avx512.h"

enum { FEW_ROWS = 6 };  // up to as many rows of a tile are computed without AMX

enum { TILE_BYTES = 1024 };

ALWAYS_INLINE int uses_tiles(const matrix *w, int64_t num_rows) { return w->kind == MATRIX_INT8 && num_rows > FEW_ROWS; }

// For a task: no thread keeps tiles while it waits, or while another process uses its core.
static void configure_tiles(const matrix *w, int64_t num_rows) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } configuration = {1, 0, {0}, {64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16}};
    if (uses_tiles(w, num_rows)) _tile_loadconfig(&configuration);
}

static void release_tiles(const matrix *w, int64_t num_rows) {
    if (uses_tiles(w, num_rows)) _tile_release();
}

// A group's products into memory. Takes three tiles, so that two groups overlap.
#define MULTIPLY_TILES(sums, x, y, values, weights, to) \
    do { \
        _tile_zero(sums); \
        _tile_loadd(x, values, GROUP); \
        _tile_loadd(y, weights, 4 * PANEL); \
        _tile_dpbssd(sums, x, y); \
        _tile_stored(sums, to, 4 * PANEL); \
    } while (0)

// sums += the products of one group, in floats and scaled.
ALWAYS_INLINE void add_scaled(f32w *sums, const int32_t *exact, const float *row_scales, const float *column_scales) {
    const f32w scales = load_wide(column_scales);
#pragma GCC unroll 16
    for (int r = 0; r < ROW_BLOCK; r++) {
        f32w integers = (f32w)_mm512_cvtepi32_ps(_mm512_load_si512(exact + r * PANEL));
        sums[r] = fma_wide(integers, scales * splat_wide(row_scales[r]), sums[r]);
    }
}

// Fetches part of a panel: `step` bytes for each four inputs of a group.
ALWAYS_INLINE void fetch_group(const char *begin, int64_t step) {
    for (int64_t byte = 0; byte < GROUP / 4 * step; byte += 64) __builtin_prefetch(begin + byte);
}

static void tile_amx(
    int64_t rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    const int64_t num_groups = w->k / GROUP;
    const int8_t *weights = (const int8_t *)w->data + panel * w->k * PANEL;
    const float *scales = w->scales + panel * num_groups * PANEL;
    int32_t exact[2][ROW_BLOCK * PANEL] __attribute__((aligned(64)));
    f32w sums[ROW_BLOCK];
#pragma GCC unroll 16
    for (int r = 0; r < ROW_BLOCK; r++) sums[r] = add && r < rows ? load_wide(c + r * ldc) : splat_wide(0);
    MULTIPLY_TILES(0, 2, 3, x->values, weights, exact[0]);
    for (int64_t g = 0; g < num_groups; g++) {
        if (g + 1 < num_groups) {
            const uint8_t *next = x->values + (g + 1) * TILE_BYTES;
            if (g % 2 == 0)
                MULTIPLY_TILES(1, 4, 5, next, weights + (g + 1) * TILE_BYTES, exact[1]);
            else
                MULTIPLY_TILES(0, 2, 3, next, weights + (g + 1) * TILE_BYTES, exact[0]);
        }
        fetch_group(ahead.begin + g * (GROUP / 4) * ahead.step, ahead.step);
        add_scaled(sums, exact[g % 2], x->scales + g * ROW_BLOCK, scales + g * PANEL);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROW_BLOCK; r++)
        if (r < rows) store_wide(c + r * ldc, sums[r]);
}

static void tile_rows_int8(
    int64_t rows, int64_t panels, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add,
    fetch ahead) {
    if (rows <= FEW_ROWS) {
        tile_rows_vnni(rows, panels, x, w, panel, c, ldc, add, ahead);
        return;
    }
    for (int64_t p = 0; p < panels; p++, ahead.begin += ahead.panel_bytes)
        tile_amx(rows, x, w, panel + p, c + p * PANEL, ldc, add, ahead);
}
