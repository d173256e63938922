// Packed matrix products y = x W^T, with the same kernels for one row (decode) and thousands
// (prompts). Variants have the tiles of int8.
#include "kernels.h"

#include <math.h>
#include <string.h>

enum {
    GROUP_BYTES = 192 * 1024,  // weights that stay in the second-level cache for a block's rows
    TASK_BYTES = 192 * 1024,   // weights of a task with few rows
    TILE_PANELS = 2,           // of a tile: gate and up
};

enum { MAX_TILE_ROWS = 32, MAX_BLOCK_PARTS = 256, BLOCK_PARTS_BYTES = 1024 * 1024 };

// Rows of a tile.
static int64_t tile_height(const matrix *w) {
    return w->kind == MATRIX_F32 ? MAX_ROWS : w->kind == MATRIX_INT8 ? MAX_ROWS_INT8 : BF16_ROWS / parts_of(w);
}

// c[rows][16 * panels] (+)= a[rows][k] * b; rows and panels are constants after inlining. Prefetches
// `ahead`.
ALWAYS_INLINE void tile_f32(
    const int rows, const int panels, const float *a, int64_t lda, column_panels b, float *c, int64_t ldc, int64_t k, int add,
    fetch ahead) {
    enum { VECTORS = PANEL / WIDE, ROWS_PER_POINTER = 3 };
    const int pointers = (rows + ROWS_PER_POINTER - 1) / ROWS_PER_POINTER;
    f32w sums[MAX_ROWS][MAX_PANELS * VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < panels * VECTORS; v++) sums[r][v] = add ? load_wide(c + r * ldc + v * WIDE) : splat_wide(0);
    const float *at[MAX_ROWS / ROWS_PER_POINTER];
#pragma GCC unroll 4
    for (int i = 0; i < pointers; i++) at[i] = a + ROWS_PER_POINTER * i * lda;
    for (int64_t i = 0; i < k; i++, b.data += b.row, ahead.begin += ahead.step) {
        f32w numbers[MAX_PANELS * VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < panels * VECTORS; v++) numbers[v] = load_wide(b.data + v / VECTORS * b.panel + v % VECTORS * WIDE);
#pragma GCC unroll 2
        for (int p = 0; p < panels; p++) __builtin_prefetch(ahead.begin + p * ahead.panel_bytes);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            f32w x = splat_wide(at[r / ROWS_PER_POINTER][r % ROWS_PER_POINTER * lda]);
#pragma GCC unroll 4
            for (int v = 0; v < panels * VECTORS; v++) sums[r][v] = fma_wide(x, numbers[v], sums[r][v]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < pointers; j++) {
            at[j]++;
            // Few pointers: with one for each row the compiler would run out of registers.
            __asm__("" : "+r"(at[j]));
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < panels * VECTORS; v++) store_wide(c + r * ldc + v * WIDE, sums[r][v]);
}

#define TILE_OF_ROWS(rows) \
    case rows: \
        if (panels < MAX_PANELS) \
            tile_f32(rows, 1, a, lda, b, c, ldc, k, add, ahead); \
        else \
            tile_f32(rows, MAX_PANELS, a, lda, b, c, ldc, k, add, ahead); \
        break

static void tile_rows_f32(
    int64_t rows, int64_t panels, const float *a, int64_t lda, column_panels b, float *c, int64_t ldc, int64_t k, int add,
    fetch ahead) {
    switch (rows) {
        TILE_OF_ROWS(1);
        TILE_OF_ROWS(2);
        TILE_OF_ROWS(3);
        TILE_OF_ROWS(4);
        TILE_OF_ROWS(5);
        TILE_OF_ROWS(6);
#if MAX_ROWS == 12
        TILE_OF_ROWS(7);
        TILE_OF_ROWS(8);
        TILE_OF_ROWS(9);
        TILE_OF_ROWS(10);
        TILE_OF_ROWS(11);
        TILE_OF_ROWS(12);
#endif
    }
}

#undef TILE_OF_ROWS

typedef struct {
    const matrix *w;
    int64_t num_rows, rows_per_block, num_blocks, num_panels, panels_per_task, tasks_per_block, panels_per_group, num_threads;
    const char *following;     // the next product: the first task of each thread
    int64_t following_bytes;   // of each task
    const float *x;
    const quantized_rows *q;
    float *out;
    int64_t ldo;
    int mode;
} product;

static int64_t panel_bytes(const matrix *w) {
    return w->k * PANEL * (w->kind == MATRIX_F32 ? 4 : w->kind == MATRIX_INT8 ? 1 : 2);
}

static int64_t prepared_bytes(const matrix *w, int64_t num_rows) {
    if (w->kind == MATRIX_F32) return 0;
    if (w->kind == MATRIX_INT8) return padded_rows(num_rows) * w->k;
    int64_t num_tiles = (num_rows * parts_of(w) + BF16_ROWS - 1) / BF16_ROWS;
    return num_tiles * BF16_ROWS * w->k * (int64_t)sizeof(bf16_part);
}

// Where a row's values begin; the first of a block, where rows lie in blocks.
static uint8_t *prepared_row(const matrix *w, const quantized_rows *q, int64_t row) {
    return q->values + row * w->k * (w->kind == MATRIX_INT8 ? 1 : parts_of(w) * (int64_t)sizeof(bf16_part));
}

static void prepare_rows(const matrix *w, int64_t begin, int64_t end, const float *x, const quantized_rows *out) {
    if (w->kind == MATRIX_F32) return;
    uint8_t *values = prepared_row(w, out, begin);
    if (w->kind == MATRIX_INT8) {
        quantized_rows part = {values, out->scales + begin * (w->k / GROUP)};
        quantize_rows(end - begin, w->k, x + begin * w->k, &part);
    } else {
        take_rows_apart(w, end - begin, x + begin * w->k, values);
    }
}

// Rows [row, row + rows) of 16 columns each of TILE_PANELS panels, or of the last one. Prefetches
// part `part` of `num_parts` of as many bytes at `ahead`.
typedef struct {
    int64_t row, rows, panel, panels, part, num_parts;
    const char *ahead;
} tile_place;

// c[rows][width] (+)= the sum of a row's parts.
ALWAYS_INLINE void add_parts(const float *sums, int64_t num_parts, int64_t rows, int64_t width, float *c, int64_t ldc, int add) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i += WIDE) {
            const float *from = sums + r * num_parts * BF16_WIDTH + i;
            f32w sum = load_wide(from);
            if (num_parts == 2) sum += load_wide(from + BF16_WIDTH);
            store_wide(c + r * ldc + i, add ? load_wide(c + r * ldc + i) + sum : sum);
        }
}

static void multiply_tile_bf16(const product *p, tile_place at, float *c, int64_t ldc, int add, fetch ahead) {
    float sums[BF16_ROWS * BF16_WIDTH] __attribute__((aligned(64)));
    int64_t num_parts = parts_of(p->w);
    bf16_rows x = {
        .parts = prepared_row(p->w, p->q, at.row), .row = ROW_BLOCK == 1 ? p->w->k : BF16_STEP,
        .step = ROW_BLOCK * BF16_STEP};
    tile_rows_bf16(at.rows * num_parts, at.panels, &x, p->w, at.panel, sums, ahead);
    add_parts(sums, num_parts, at.rows, at.panels * PANEL, c, ldc, add);
}

static void multiply_tile(const product *p, tile_place at, float *c, int64_t ldc, int add) {
    int64_t k = p->w->k, num_bytes = panel_bytes(p->w);
    fetch ahead = {at.ahead + num_bytes * at.part / at.num_parts, 4 * PANEL / at.num_parts, num_bytes};
    if (p->w->kind == MATRIX_INT8) {
        quantized_rows rows = {p->q->values + at.row * k, p->q->scales + at.row * (k / GROUP)};
        tile_rows_int8(at.rows, at.panels, &rows, p->w, at.panel, c, ldc, add, ahead);
        return;
    }
    if (p->w->kind != MATRIX_F32) {
        multiply_tile_bf16(p, at, c, ldc, add, ahead);
        return;
    }
    for (int64_t i = 0; i < at.panels; i += MAX_PANELS, ahead.begin += MAX_PANELS * num_bytes) {
        column_panels b = {(const float *)p->w->data + (at.panel + i) * k * PANEL, PANEL, k * PANEL};
        tile_rows_f32(at.rows, at.panels - i, p->x + at.row * k, k, b, c + i * PANEL, ldc, k, add, ahead);
    }
}

static void add_bias(const product *p, int64_t rows, int64_t column, float *c, int64_t ldc, int64_t num_columns) {
    if (p->w->bias == NULL) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < num_columns; i++) c[r * ldc + i] += p->w->bias[column + i];
}

static int is_gated(int mode) { return mode == OUTPUT_SILU_GATED || mode == OUTPUT_GELU_GATED || mode == OUTPUT_CLAMPED_GATED; }

ALWAYS_INLINE f32w gated_wide(int mode, f32w x, f32w y) {
    if (mode == OUTPUT_CLAMPED_GATED) return clamped_gated_wide(x, y);
    return (mode == OUTPUT_SILU_GATED ? silu_wide(x) : gelu_wide(x)) * y;
}

static void activate(const product *p, int64_t rows, float *c, int64_t ldc, int64_t num_columns) {
    if (p->mode != OUTPUT_GELU) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < num_columns; i += WIDE) store_wide(c + r * ldc + i, gelu_wide(load_wide(c + r * ldc + i)));
}

static void multiply_gated(const product *p, tile_place at) {
    enum { WIDTH = TILE_PANELS * PANEL };
    float both[MAX_TILE_ROWS * WIDTH];
    multiply_tile(p, at, both, WIDTH, 0);
    add_bias(p, at.rows, at.panel * PANEL, both, WIDTH, WIDTH);
    for (int64_t r = 0; r < at.rows; r++) {
        const float *gate = both + r * WIDTH, *up = gate + PANEL;
        float *out = p->out + (at.row + r) * p->ldo + at.panel / 2 * PANEL;
        for (int64_t i = 0; i < PANEL; i += WIDE) store_wide(out + i, gated_wide(p->mode, load_wide(gate + i), load_wide(up + i)));
    }
}

static void multiply_plain(const product *p, tile_place at) {
    enum { WIDTH = TILE_PANELS * PANEL };
    float *c = p->out + at.row * p->ldo + at.panel * PANEL;
    int64_t num_columns = p->w->n - at.panel * PANEL;
    int add = p->mode == OUTPUT_ADD;
    if (num_columns >= at.panels * PANEL) {
        multiply_tile(p, at, c, p->ldo, add);
        add_bias(p, at.rows, at.panel * PANEL, c, p->ldo, at.panels * PANEL);
        activate(p, at.rows, c, p->ldo, at.panels * PANEL);
        return;
    }
    // The last panel is wider than the output.
    float padded[MAX_TILE_ROWS * WIDTH] = {0};
    for (int64_t r = 0; add && r < at.rows; r++) memcpy(padded + r * WIDTH, c + r * p->ldo, num_columns * sizeof(float));
    multiply_tile(p, at, padded, WIDTH, add);
    add_bias(p, at.rows, at.panel * PANEL, padded, WIDTH, num_columns);
    activate(p, at.rows, padded, WIDTH, at.panels * PANEL);
    for (int64_t r = 0; r < at.rows; r++) memcpy(c + r * p->ldo, padded + r * WIDTH, num_columns * sizeof(float));
}

// The rows of a block times a group of panels that stays in the second-level cache. Prefetches as
// many bytes at `ahead`.
static void multiply_group(
    const product *p, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end, const char *ahead) {
    int64_t num_rows = row_end - row_begin, height = tile_height(p->w);
    int64_t num_tiles = (num_rows + height - 1) / height;
    int in_blocks = p->w->kind == MATRIX_INT8 ? ROW_BLOCK > 1 : p->w->kind != MATRIX_F32;
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        // Tiles of even height, because two extra rows cost almost as much as six. In blocks all
        // but the last are whole.
        int64_t begin = in_blocks ? tile * height : num_rows * tile / num_tiles;
        int64_t end = in_blocks ? begin + height : num_rows * (tile + 1) / num_tiles;
        if (end > num_rows) end = num_rows;
        tile_place at = {.row = row_begin + begin, .rows = end - begin, .part = tile, .num_parts = num_tiles};
        for (at.panel = panel_begin; at.panel < panel_end; at.panel += TILE_PANELS) {
            at.panels = at.panel + TILE_PANELS <= panel_end ? TILE_PANELS : panel_end - at.panel;
            at.ahead = ahead + (at.panel - panel_begin) * panel_bytes(p->w);
            if (is_gated(p->mode))
                multiply_gated(p, at);
            else
                multiply_plain(p, at);
        }
    }
}

// The weights that this thread needs after a task: of its own next task, or of its first task in
// the next product; else `otherwise`.
static const char *needed_after(const product *p, int64_t task, const char *otherwise) {
    int64_t next = (task % p->tasks_per_block + p->num_threads) * p->panels_per_task;
    int64_t last = p->num_blocks * p->tasks_per_block - p->num_threads;
    if (next < p->num_panels) return (const char *)p->w->data + next * panel_bytes(p->w);
    return p->following != NULL && task >= last ? p->following + (task - last) * p->following_bytes : otherwise;
}

static void run_product_task(void *argument, int64_t task) {
    const product *p = argument;
    int64_t block = task / p->tasks_per_block, part = task % p->tasks_per_block;
    int64_t row_begin = block * p->rows_per_block, row_end = row_begin + p->rows_per_block;
    if (row_end > p->num_rows) row_end = p->num_rows;
    int64_t panel_begin = part * p->panels_per_task, panel_end = panel_begin + p->panels_per_task;
    if (panel_end > p->num_panels) panel_end = p->num_panels;
    int64_t height = tile_height_of(p->w, row_end - row_begin);
    begin_tiles(height);
    for (int64_t panel = panel_begin; panel < panel_end; panel += p->panels_per_group) {
        int64_t end = panel + p->panels_per_group < panel_end ? panel + p->panels_per_group : panel_end;
        const char *data = p->w->data;
        const char *ahead = end < panel_end ? data + end * panel_bytes(p->w) : needed_after(p, task, data + panel * panel_bytes(p->w));
        multiply_group(p, row_begin, row_end, panel, end, ahead);
    }
    end_tiles(height);
}

static int64_t round_up_to_even(int64_t n) { return (n + 1) / 2 * 2; }

static int64_t rows_per_block(const matrix *w) {
    if (w->kind == MATRIX_F32) return ROWS_PER_BLOCK;
    if (w->kind == MATRIX_INT8) return ROWS_PER_BLOCK_INT8;
    // Their parts stay in the second-level cache.
    int64_t num_parts = BLOCK_PARTS_BYTES / (w->k * (int64_t)sizeof(bf16_part)) / BF16_ROWS * BF16_ROWS;
    if (num_parts > MAX_BLOCK_PARTS) num_parts = MAX_BLOCK_PARTS;
    return (num_parts > BF16_ROWS ? num_parts : BF16_ROWS) / parts_of(w);
}

// Cuts a product into tasks.
static product plan(const matrix *w, int64_t num_rows) {
    product p = {.w = w, .num_rows = num_rows};
    p.num_panels = (w->n + PANEL - 1) / PANEL;
    p.rows_per_block = rows_per_block(w);
    if (num_rows < p.rows_per_block) p.rows_per_block = num_rows;
    p.num_blocks = (num_rows + p.rows_per_block - 1) / p.rows_per_block;
    p.num_threads = num_threads();
    p.panels_per_group = round_up_to_even(GROUP_BYTES / panel_bytes(w));
    if (p.panels_per_group < 2) p.panels_per_group = 2;
    // Longer than a claim, shorter than the wait for the last task: by multiply-adds or bytes.
    int64_t work = w->kind == MATRIX_F32 ? TASK_WORK : w->kind == MATRIX_INT8 ? TASK_WORK_INT8 : TASK_WORK_BF16;
    int64_t by_work = work / (p.rows_per_block * w->k * PANEL), by_bytes = TASK_BYTES / panel_bytes(w);
    p.panels_per_task = round_up_to_even(by_work < by_bytes ? by_work : by_bytes);
    if (p.panels_per_task < 2) p.panels_per_task = 2;
    p.tasks_per_block = (p.num_panels + p.panels_per_task - 1) / p.panels_per_task;
    if (p.num_blocks == 1) {  // the same number for each thread
        p.tasks_per_block = (p.tasks_per_block + p.num_threads - 1) / p.num_threads * p.num_threads;
        p.panels_per_task = round_up_to_even((p.num_panels + p.tasks_per_block - 1) / p.tasks_per_block);
        p.tasks_per_block = (p.num_panels + p.panels_per_task - 1) / p.panels_per_task;
    }
    while (p.num_blocks * p.tasks_per_block >= MAX_TASKS) {
        p.panels_per_task *= 2;
        p.tasks_per_block = (p.num_panels + p.panels_per_task - 1) / p.panels_per_task;
    }
    return p;
}

static void multiply(
    const matrix *w, int64_t num_rows, const float *x, const quantized_rows *q, float *out, int64_t ldo, int mode,
    const matrix *following) {
    if (num_rows == 0) return;  // a step without sampling
    product p = plan(w, num_rows);
    p.x = x;
    p.q = q;
    p.out = out;
    p.ldo = ldo;
    p.mode = mode;
    if (following != NULL && num_rows > 6) {  // fewer rows are bound by memory
        p.following = following->data;
        p.following_bytes = plan(following, num_rows).panels_per_task * panel_bytes(following);
    }
    parallel_for(p.num_blocks * p.tasks_per_block, run_product_task, &p);
}
