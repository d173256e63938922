// Packed matrix products: y = x W^T for f32 and int8 weights, from one row (decode) to thousands (prompts) with the same kernels.
#include "kernels.h"

#include <math.h>
#include <string.h>

enum {
    MAX_ROWS = 6,              // rows computed together: 6 x 16 sums fill 12 of 16 vector registers
    ROWS_PER_BLOCK = 264,      // rows of a task
    GROUP_BYTES = 128 * 1024,  // weights that stay in the second-level cache while a block's rows pass by
    TASK_BYTES = 192 * 1024,   // weights of a task with few rows
    TASK_WORK = 4000000,       // multiply-adds of a task with many rows
};

// c[rows][16] (+)= a[rows][k] * b[k][16]; rows is a constant after inlining. Meanwhile memory from `ahead.begin` on is fetched.
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

// Any number of rows from 1 to MAX_ROWS; also what attention is made of.
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

#if HAVE_AVX2
// sums + products of four neighbours: x unsigned, w signed. Pairs are summed in int16, which 2 * 255 * 63 does not overflow, so the
// result is exact and the same as that of the instruction which sums all four at once.
ALWAYS_INLINE __m256i add_products(__m256i sums, __m256i x, __m256i w) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, x, w);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, x, w);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
#endif
}

// -128 * the sums of 8 columns: what the values' zero point adds to their products.
ALWAYS_INLINE __m256i zero_point(const int16_t *sums) {
    __m256i wide = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)sums));
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(wide, 7));
}

// As tile_f32, for rows of quantized numbers and an int8 panel.
ALWAYS_INLINE void tile_int8(
    const int rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    int64_t num_groups = w->k / GROUP;
    const uint8_t *values = x->values;
    const int8_t *weights = (const int8_t *)w->data + panel * w->k * PANEL;
    const float *scales = w->scales + panel * num_groups * PANEL;
    const int16_t *group_sums = w->sums + panel * num_groups * PANEL;
    f32x8 sums[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        sums[r][0] = add ? load8(c + r * ldc) : splat8(0);
        sums[r][1] = add ? load8(c + r * ldc + 8) : splat8(0);
    }
    for (int64_t g = 0; g < num_groups; g++) {
        __m256i exact[MAX_ROWS][2], z0 = zero_point(group_sums + g * PANEL), z1 = zero_point(group_sums + g * PANEL + 8);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            exact[r][0] = z0;
            exact[r][1] = z1;
        }
        for (int64_t i = 0; i < GROUP / 4; i++) {
            __m256i w0 = _mm256_loadu_si256((const __m256i *)(weights + i * 64));
            __m256i w1 = _mm256_loadu_si256((const __m256i *)(weights + i * 64 + 32));
            __builtin_prefetch(ahead.begin + i * ahead.step);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, values + r * w->k + 4 * i, 4);
                __m256i fours = _mm256_set1_epi32(four);
                exact[r][0] = add_products(exact[r][0], fours, w0);
                exact[r][1] = add_products(exact[r][1], fours, w1);
                // Row by row: left to itself the compiler loads all rows first, and has no registers left for the sums.
                __asm__("" : "+x"(exact[r][0]), "+x"(exact[r][1]));
            }
        }
        f32x8 s0 = load8(scales + g * PANEL), s1 = load8(scales + g * PANEL + 8);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32x8 s = splat8(x->scales[r * num_groups + g]);
            sums[r][0] = fma8((f32x8)_mm256_cvtepi32_ps(exact[r][0]), s0 * s, sums[r][0]);
            sums[r][1] = fma8((f32x8)_mm256_cvtepi32_ps(exact[r][1]), s1 * s, sums[r][1]);
        }
        weights += GROUP * PANEL;
        ahead.begin += GROUP / 4 * ahead.step;
        values += GROUP;
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        store8(c + r * ldc, sums[r][0]);
        store8(c + r * ldc + 8, sums[r][1]);
    }
}
#else
static void tile_int8(
    const int rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    int64_t num_groups = w->k / GROUP;
    (void)ahead;
    for (int r = 0; r < rows; r++) {
        float sums[PANEL];
        for (int n = 0; n < PANEL; n++) sums[n] = add ? c[r * ldc + n] : 0;
        for (int64_t g = 0; g < num_groups; g++) {
            int32_t exact[PANEL];
            const int8_t *weights = (const int8_t *)w->data + (panel * w->k + g * GROUP) * PANEL;
            const uint8_t *values = x->values + r * w->k + g * GROUP;
            int64_t column = (panel * num_groups + g) * PANEL;
            for (int n = 0; n < PANEL; n++) exact[n] = -128 * w->sums[column + n];
            for (int64_t i = 0; i < GROUP; i++)
                for (int n = 0; n < PANEL; n++) exact[n] += values[i] * weights[i / 4 * 64 + 4 * n + i % 4];
            float s = x->scales[r * num_groups + g];
            for (int n = 0; n < PANEL; n++) sums[n] += (float)exact[n] * (w->scales[column + n] * s);
        }
        for (int n = 0; n < PANEL; n++) c[r * ldc + n] = sums[n];
    }
}
#endif

static void tile_rows_int8(
    int64_t rows, const quantized_rows *x, const matrix *w, int64_t panel, float *c, int64_t ldc, int add, fetch ahead) {
    switch (rows) {
        case 1: tile_int8(1, x, w, panel, c, ldc, add, ahead); break;
        case 2: tile_int8(2, x, w, panel, c, ldc, add, ahead); break;
        case 3: tile_int8(3, x, w, panel, c, ldc, add, ahead); break;
        case 4: tile_int8(4, x, w, panel, c, ldc, add, ahead); break;
        case 5: tile_int8(5, x, w, panel, c, ldc, add, ahead); break;
        default: tile_int8(6, x, w, panel, c, ldc, add, ahead); break;
    }
}

typedef struct {
    const matrix *w;
    int64_t num_rows, rows_per_block, num_panels, panels_per_task, tasks_per_block, panels_per_group;
    const float *x;
    const quantized_rows *q;
    float *out;
    int64_t ldo;
    int mode;
} product;

static int64_t panel_bytes(const matrix *w) { return w->k * PANEL * (w->kind == MATRIX_F32 ? 4 : 1); }

// Rows [row, row + rows) of one panel's 16 columns; part `part` of `num_parts` of the panel `ahead` is fetched meanwhile.
typedef struct {
    int64_t row, rows, panel, ahead, part, num_parts;
} tile_place;

static void multiply_tile(const product *p, tile_place at, float *c, int64_t ldc, int add) {
    int64_t k = p->w->k, num_bytes = panel_bytes(p->w);
    const char *data = p->w->data;
    fetch ahead = {data + at.ahead * num_bytes + num_bytes * at.part / at.num_parts, 0};
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
    at_up.ahead++;
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

// The rows of a block times a group of panels that stays in the second-level cache; the next group is fetched meanwhile.
static void multiply_group(const product *p, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
    int64_t step = p->mode == OUTPUT_GATED ? 2 : 1, num_rows = row_end - row_begin;
    int64_t num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        // Tiles of even height: two rows more would cost almost as much as six.
        tile_place at = {.row = row_begin + num_rows * tile / num_tiles, .part = tile, .num_parts = num_tiles};
        at.rows = row_begin + num_rows * (tile + 1) / num_tiles - at.row;
        for (at.panel = panel_begin; at.panel < panel_end; at.panel += step) {
            int64_t ahead = at.panel + panel_end - panel_begin;
            at.ahead = ahead + step <= p->num_panels ? ahead : at.panel;
            if (p->mode == OUTPUT_GATED)
                multiply_gated(p, at);
            else
                multiply_plain(p, at);
        }
    }
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
        multiply_group(p, row_begin, row_end, panel, end);
    }
}

static int64_t round_up_to_even(int64_t n) { return (n + 1) / 2 * 2; }

void multiply(const matrix *w, int64_t num_rows, const float *x, const quantized_rows *q, float *out, int64_t ldo, int mode) {
    if (num_rows == 0) return;  // a step in which nobody samples
    product p = {.w = w, .num_rows = num_rows, .x = x, .q = q, .out = out, .ldo = ldo, .mode = mode};
    p.num_panels = (w->n + PANEL - 1) / PANEL;
    p.rows_per_block = num_rows < ROWS_PER_BLOCK ? num_rows : ROWS_PER_BLOCK;
    int64_t num_blocks = (num_rows + p.rows_per_block - 1) / p.rows_per_block;
    p.panels_per_group = round_up_to_even(GROUP_BYTES / panel_bytes(w));
    if (p.panels_per_group < 2) p.panels_per_group = 2;
    // Long against a claim, short against the wait for the last task: by work, and by bytes when there are few rows.
    int64_t work = p.rows_per_block * w->k * PANEL * (w->kind == MATRIX_F32 ? 2 : 1);
    int64_t by_work = TASK_WORK / work, by_bytes = TASK_BYTES / panel_bytes(w);
    p.panels_per_task = round_up_to_even(by_work < by_bytes ? by_work : by_bytes);
    if (p.panels_per_task < 2) p.panels_per_task = 2;
    p.tasks_per_block = (p.num_panels + p.panels_per_task - 1) / p.panels_per_task;
    while (num_blocks * p.tasks_per_block >= MAX_TASKS) {
        p.panels_per_task *= 2;
        p.tasks_per_block = (p.num_panels + p.panels_per_task - 1) / p.panels_per_task;
    }
    parallel_for(num_blocks * p.tasks_per_block, run_product_task, &p);
}

// Values of GROUP numbers: x * inverse + 128, rounded.
#if HAVE_AVX2
static void quantize_group(const float *x, float inverse, uint8_t *out) {
    const __m256 factor = _mm256_set1_ps(inverse);
    for (int i = 0; i < GROUP; i += 32) {
        __m256i quarters[4];
        for (int j = 0; j < 4; j++) {
            __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), factor));
            quarters[j] = _mm256_add_epi32(rounded, _mm256_set1_epi32(128));
        }
        __m256i low = _mm256_packus_epi32(quarters[0], quarters[1]), high = _mm256_packus_epi32(quarters[2], quarters[3]);
        // Packing works within halves: fours of numbers lie in the order 0 2 4 6 1 3 5 7 afterwards.
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
        _mm256_storeu_si256((__m256i *)(out + i), bytes);
    }
}
#else
static void quantize_group(const float *x, float inverse, uint8_t *out) {
    for (int i = 0; i < GROUP; i++) out[i] = (uint8_t)(rintf(x[i] * inverse) + 128);
}
#endif

void quantize_rows(int64_t num_rows, int64_t k, const float *x, quantized_rows *out) {
    for (int64_t row = 0; row < num_rows; row++)
        for (int64_t g = 0; g < k / GROUP; g++) {
            const float *from = x + row * k + g * GROUP;
            f32x8 largest = splat8(0);
            for (int i = 0; i < GROUP; i += 8) largest = max8(largest, max8(load8(from + i), -load8(from + i)));
            float scale = max_lanes(largest) / 127.0f;
            out->scales[row * (k / GROUP) + g] = scale;
            quantize_group(from, scale > 0 ? 1.0f / scale : 0, out->values + row * k + g * GROUP);
        }
}
