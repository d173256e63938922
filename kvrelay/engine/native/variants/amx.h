// AVX-512 with the tiles of AMX for the products of int8 and bf16: 16 rows, a group of 64 inputs (in
// bf16 32) and 16 columns in one instruction. The panels' layout is that of a tile already.
//
// Values are stored less 128, so that the tiles' products need no zero point. Their rows lie in
// blocks of a tile: one row after another would often share a set of the first-level cache.
#define HAVE_AMX 1
#define ROW_BLOCK 16
#define MAX_ROWS_INT8 ROW_BLOCK
#define ROWS_PER_BLOCK_INT8 272
#define TASK_WORK_INT8 16000000
#define TASK_WORK_BF16 8000000
#define VALUE_SIGN ((int32_t)0x80808080)  // turns value - 128 into value, and back

#include "avx512.h"

enum { FEW_ROWS = 6 };  // up to as many rows of a tile are computed without AMX

enum { TILE_BYTES = 1024 };

// Rows of the tiles for a product's rows, of bf16 as few as there are: they take as few cycles.
// 0: without tiles.
ALWAYS_INLINE int64_t tile_height_of(const matrix *w, int64_t num_rows) {
    if (!is_bf16(w)) return w->kind == MATRIX_INT8 && num_rows > FEW_ROWS ? ROW_BLOCK : 0;
    int64_t num_parts = num_rows * (w->kind == MATRIX_BF16 ? 2 : 1);
    return num_parts < ROW_BLOCK ? num_parts : ROW_BLOCK;
}

// For a task: no thread keeps tiles while it waits, or while another process uses its core. Tiles 0
// to 5 have `height` rows.
static void begin_tiles(int64_t height) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } configuration = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (height == 0) return;
    for (int tile = 0; tile < 6; tile++) configuration.rows[tile] = (uint8_t)height;
    __asm__("" : : "r"(&configuration) : "memory");  // GCC 12 believes that only eight bytes are read
    _tile_loadconfig(&configuration);
}

static void end_tiles(int64_t height) {
    if (height > 0) _tile_release();
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

// ---------------------------------------------------------------- bf16

typedef uint16_t bf16_part;

// Their upper halves, as neighbours.
ALWAYS_INLINE void store_parts(bf16_part *to, i32w first, i32w second) {
    const __m512i ascending = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)first, ascending, (__m512i)second));
}

#define ADD_PRODUCTS(sums, x, y) \
    do { \
        if (is_int8) \
            _tile_dpbssd(sums, x, y); \
        else \
            _tile_dpbf16ps(sums, x, y); \
    } while (0)

// What lies as tiles of 16 rows of 64 bytes: row r of step i at bytes + r * row + i * step, the next 16
// rows `next` further on.
typedef struct {
    const char *bytes;
    int64_t row, step, next;
} row_tiles;

// Tiles 0 to 3: two by two sums; 4 and 5: rows; 6 and 7: panels, each `panel_bytes` long.
ALWAYS_INLINE void sum_tiles(
    const int is_int8, const int is_tall, const int is_wide, row_tiles x, int64_t num_steps, const char *panels, int64_t panel_bytes,
    void *c, fetch ahead) {
    const int64_t to_row = BF16_WIDTH * 4, step_bytes = BF16_STEP / 2 * ahead.step;
    _tile_zero(0);
    if (is_wide) _tile_zero(1);
    if (is_tall) _tile_zero(2);
    if (is_tall && is_wide) _tile_zero(3);
    for (int64_t i = 0; i < num_steps; i++, x.bytes += x.step, panels += TILE_BYTES, ahead.begin += step_bytes) {
        _tile_loadd(4, x.bytes, x.row);
        _tile_loadd(6, panels, 64);
        ADD_PRODUCTS(0, 4, 6);
        if (is_wide) {
            _tile_loadd(7, panels + panel_bytes, 64);
            ADD_PRODUCTS(1, 4, 7);
        }
        if (is_tall) {
            _tile_loadd(5, x.bytes + x.next, x.row);
            ADD_PRODUCTS(2, 5, 6);
        }
        if (is_tall && is_wide) ADD_PRODUCTS(3, 5, 7);
        for (int panel = 0; panel < 1 + is_wide; panel++)
            for (int64_t byte = 0; byte < step_bytes; byte += 64) __builtin_prefetch(ahead.begin + panel * ahead.panel_bytes + byte);
    }
    _tile_stored(0, c, to_row);
    if (is_wide) _tile_stored(1, (char *)c + 64, to_row);
    if (is_tall) _tile_stored(2, (char *)c + 16 * to_row, to_row);
    if (is_tall && is_wide) _tile_stored(3, (char *)c + 16 * to_row + 64, to_row);
}

#undef ADD_PRODUCTS

ALWAYS_INLINE void sum_rows(
    const int is_int8, int64_t num_rows, int64_t num_panels, row_tiles x, int64_t num_steps, const char *panels, int64_t panel_bytes,
    void *c, fetch ahead) {
    if (num_rows > 16 && num_panels > 1)
        sum_tiles(is_int8, 1, 1, x, num_steps, panels, panel_bytes, c, ahead);
    else if (num_rows > 16)
        sum_tiles(is_int8, 1, 0, x, num_steps, panels, panel_bytes, c, ahead);
    else if (num_panels > 1)
        sum_tiles(is_int8, 0, 1, x, num_steps, panels, panel_bytes, c, ahead);
    else
        sum_tiles(is_int8, 0, 0, x, num_steps, panels, panel_bytes, c, ahead);
}

static void tile_rows_bf16(
    int64_t num_parts, int64_t panels, const bf16_rows *x, const matrix *w, int64_t panel, float *c, fetch ahead) {
    const int64_t item = sizeof(bf16_part), panel_bytes = w->k * PANEL * item;
    row_tiles rows = {.bytes = x->parts, .row = x->row * item, .step = x->step * item, .next = 16 * w->k * item};
    sum_rows(0, num_parts, panels, rows, w->k / BF16_STEP, (const char *)w->data + panel * panel_bytes, panel_bytes, c, ahead);
}

// c[num_rows][2 * PANEL] = x * columns in int32, for 1 to 32 rows x[][k] and 1 or 2 panels [k / 4][PANEL][4].
// Up to 32 rows are read; k is a multiple of 64.
static void tile_rows_exact(int64_t num_rows, int64_t num_panels, const int8_t *x, int64_t k, const int8_t *panels, int32_t *c) {
    const fetch nothing = {(const char *)panels, 0, 0};
    row_tiles rows = {.bytes = (const char *)x, .row = k, .step = 64, .next = 16 * k};
    sum_rows(1, num_rows, num_panels, rows, k / 64, (const char *)panels, k * PANEL, c, nothing);
}
