// Packed matrix products y = x W^T, with the same kernels for one row (decode) and thousands
// (prompts). matrices_int8.c has the tiles of int8.
#include "kernels.h"

#include <math.h>
#include <string.h>

enum {
    ROWS_PER_BLOCK = 264,      // rows of a task
    GROUP_BYTES = 192 * 1024,  // weights that stay in the second-level cache for a block's rows
    TASK_BYTES = 192 * 1024,   // weights of a task with few rows
    TASK_WORK = 4000000,       // multiply-adds of a task with many rows
};

// c[rows][16] (+)= a[rows][k] * b[k][16]; rows is a constant after inlining. Prefetches `ahead`.
ALWAYS_INLINE void tile_f32(
    const int rows, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t k, int add,
    fetch ahead) {
    f32x8 sums[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        sums[r][0] = add ? load8(c + r * ldc) : splat8(0);
        sums[r][1] = add ? load8(c + r * ldc + 8) : splat8(0);
    }
    for (int64_t i = 0; i < k; i++) {
        f32x8 b0 = load8(b + i * ldb), b1 = load8(b + i * ldb + 8);
        __builtin_prefetch(ahead.begin + i * ahead.step);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32x8 x = splat8(a[r * lda + i]);
            sums[r][0] = fma8(x, b0, sums[r][0]);
            sums[r][1] = fma8(x, b1, sums[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        store8(c + r * ldc, sums[r][0]);
        store8(c + r * ldc + 8, sums[r][1]);
    }
}

// 1 to MAX_ROWS rows; attention uses it too.
void tile_rows_f32(
    int64_t rows, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t k, int add,
    fetch ahead) {
    switch (rows) {
        case 1: tile_f32(1, a, lda, b, ldb, c, ldc, k, add, ahead); break;
        case 2: tile_f32(2, a, lda, b, ldb, c, ldc, k, add, ahead); break;
        case 3: tile_f32(3, a, lda, b, ldb, c, ldc, k, add, ahead); break;
        case 4: tile_f32(4, a, lda, b, ldb, c, ldc, k, add, ahead); break;
        case 5: tile_f32(5, a, lda, b, ldb, c, ldc, k, add, ahead); break;
        default: tile_f32(6, a, lda, b, ldb, c, ldc, k, add, ahead); break;
    }
}

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

static int64_t panel_bytes(const matrix *w) { return w->k * PANEL * (w->kind == MATRIX_F32 ? 4 : 1); }

// Rows [row, row + rows) of one panel's 16 columns. Prefetches part `part` of `num_parts` of a
// panel's bytes at `ahead`.
typedef struct {
    int64_t row, rows, panel, part, num_parts;
    const char *ahead;
} tile_place;

static void multiply_tile(const product *p, tile_place at, float *c, int64_t ldc, int add) {
    int64_t k = p->w->k, num_bytes = panel_bytes(p->w);
    const char *data = p->w->data;
    fetch ahead = {at.ahead + num_bytes * at.part / at.num_parts, 0};
    if (p->w->kind == MATRIX_F32) {
        const float *b = (const float *)(data + at.panel * num_bytes);
        ahead.step = 4 * PANEL / at.num_parts;
        tile_rows_f32(at.rows, p->x + at.row * k, k, b, PANEL, c, ldc, k, add, ahead);
    } else {
        quantized_rows rows = {p->q->values + at.row * k, p->q->scales + at.row * (k / GROUP)};
        ahead.step = 4 * PANEL / at.num_parts;
        tile_rows_int8(at.rows, &rows, p->w, at.panel, c, ldc, add, ahead);
    }
}

static void add_bias(const product *p, int64_t rows, int64_t column, float *c, int64_t ldc, int64_t num_columns) {
    if (p->w->bias == NULL) return;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < num_columns; i++) c[r * ldc + i] += p->w->bias[column + i];
}

ALWAYS_INLINE f32x8 silu8(f32x8 x) { return x / (splat8(1.0f) + exp8_inline(-x)); }

static void multiply_gated(const product *p, tile_place at) {
    float gate[MAX_ROWS * PANEL], up[MAX_ROWS * PANEL];
    tile_place at_up = at;
    at_up.panel++;
    at_up.ahead += panel_bytes(p->w);
    multiply_tile(p, at, gate, PANEL, 0);
    multiply_tile(p, at_up, up, PANEL, 0);
    add_bias(p, at.rows, at.panel * PANEL, gate, PANEL, PANEL);
    add_bias(p, at.rows, at_up.panel * PANEL, up, PANEL, PANEL);
    for (int64_t r = 0; r < at.rows; r++) {
        float *out = p->out + (at.row + r) * p->ldo + at.panel / 2 * PANEL;
        for (int64_t i = 0; i < PANEL; i += 8)
            store8(out + i, silu8(load8(gate + r * PANEL + i)) * load8(up + r * PANEL + i));
    }
}

static void multiply_plain(const product *p, tile_place at) {
    float *c = p->out + at.row * p->ldo + at.panel * PANEL;
    int64_t num_columns = p->w->n - at.panel * PANEL;
    int add = p->mode == OUTPUT_ADD;
    if (num_columns >= PANEL) {
        multiply_tile(p, at, c, p->ldo, add);
        add_bias(p, at.rows, at.panel * PANEL, c, p->ldo, PANEL);
        return;
    }
    // The last panel is wider than the output.
    float padded[MAX_ROWS * PANEL] = {0};
    for (int64_t r = 0; add && r < at.rows; r++) memcpy(padded + r * PANEL, c + r * p->ldo, num_columns * sizeof(float));
    multiply_tile(p, at, padded, PANEL, add);
    add_bias(p, at.rows, at.panel * PANEL, padded, PANEL, num_columns);
    for (int64_t r = 0; r < at.rows; r++) memcpy(c + r * p->ldo, padded + r * PANEL, num_columns * sizeof(float));
}

// The rows of a block times a group of panels that stays in the second-level cache. Prefetches as
// many bytes at `ahead`.
static void multiply_group(
    const product *p, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end, const char *ahead) {
    int64_t step = p->mode == OUTPUT_GATED ? 2 : 1, num_rows = row_end - row_begin;
    int64_t num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        // Tiles of even height, because two extra rows cost almost as much as six.
        tile_place at = {.row = row_begin + num_rows * tile / num_tiles, .part = tile, .num_parts = num_tiles};
        at.rows = row_begin + num_rows * (tile + 1) / num_tiles - at.row;
        for (at.panel = panel_begin; at.panel < panel_end; at.panel += step) {
            at.ahead = ahead + (at.panel - panel_begin) * panel_bytes(p->w);
            if (p->mode == OUTPUT_GATED)
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
    for (int64_t panel = panel_begin; panel < panel_end; panel += p->panels_per_group) {
        int64_t end = panel + p->panels_per_group < panel_end ? panel + p->panels_per_group : panel_end;
        const char *data = p->w->data;
        const char *ahead = end < panel_end ? data + end * panel_bytes(p->w) : needed_after(p, task, data + panel * panel_bytes(p->w));
        multiply_group(p, row_begin, row_end, panel, end, ahead);
    }
}

static int64_t round_up_to_even(int64_t n) { return (n + 1) / 2 * 2; }

// Cuts a product into tasks.
static product plan(const matrix *w, int64_t num_rows) {
    product p = {.w = w, .num_rows = num_rows};
    p.num_panels = (w->n + PANEL - 1) / PANEL;
    p.rows_per_block = num_rows < ROWS_PER_BLOCK ? num_rows : ROWS_PER_BLOCK;
    p.num_blocks = (num_rows + p.rows_per_block - 1) / p.rows_per_block;
    p.num_threads = num_threads();
    p.panels_per_group = round_up_to_even(GROUP_BYTES / panel_bytes(w));
    if (p.panels_per_group < 2) p.panels_per_group = 2;
    // Longer than a claim, shorter than the wait for the last task: by multiply-adds or bytes.
    int64_t work = p.rows_per_block * w->k * PANEL * (w->kind == MATRIX_F32 ? 2 : 1);
    int64_t by_work = TASK_WORK / work, by_bytes = TASK_BYTES / panel_bytes(w);
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

void multiply(
    const matrix *w, int64_t num_rows, const float *x, const quantized_rows *q, float *out, int64_t ldo, int mode,
    const matrix *following) {
    if (num_rows == 0) return;  // a step without sampling
    product p = plan(w, num_rows);
    p.x = x;
    p.q = q;
    p.out = out;
    p.ldo = ldo;
    p.mode = mode;
    if (following != NULL && num_rows > MAX_ROWS) {  // fewer rows are bound by memory
        p.following = following->data;
        p.following_bytes = plan(following, num_rows).panels_per_task * panel_bytes(following);
    }
    parallel_for(p.num_blocks * p.tasks_per_block, run_product_task, &p);
}
